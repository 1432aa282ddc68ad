"""The results as pictures: bars of ratios by section, and growth curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.measure import Row

_LINES = {"eager": ("chainrule", "#1971c2"), "peer": ("torch.func", "#e8590c"), "hand": ("by hand", "#868e96")}


def write(folder: Path, rows: Sequence[Row], growth: Sequence[Mapping[str, Any]]) -> None:
    """Write the pictures; nothing where matplotlib is not installed.

    Args:
        folder: where to.
        rows: the measured rows.
        growth: the growth studies.
    """
    if find_spec("matplotlib") is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for section in sorted({row.section for row in rows}):
        _ratios(folder / f"ratios-{section}.svg", [row for row in rows if row.section == section])
    for entry in growth:
        _growth(folder / f"growth-{entry['key']}.svg", entry)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import rc_context  # noqa: PLC0415 - optional

    with rc_context({"svg.hashsalt": "chainrule"}):
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def _ratios(path: Path, rows: Sequence[Row]) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional

    shown = [row for row in rows if "peer_eager" in row.ratios]
    figure = Figure(figsize=(8, 0.28 * len(shown) + 1.2))
    axes = figure.subplots()
    for place, row in enumerate(shown):
        got, wanted = row.ratios["peer_eager"], row.targets.get("peer_eager")
        reached = wanted is None or got >= wanted
        axes.barh(place, got, height=0.7, color="#4dabf7" if reached else "#ffa94d")
        if wanted is not None:
            axes.plot([wanted, wanted], [place - 0.42, place + 0.42], color="#212529", lw=1.6)
        axes.text(got, place, f" {got:.3g}", va="center", fontsize=7)
    axes.set_yticks(range(len(shown)), [row.key for row in shown], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="#c92a2a", lw=0.8)
    axes.set_title("time of the best torch.func expression / ours (plain calls); the stroke is what is to be reached", fontsize=8)
    axes.margins(x=0.1)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _save(figure, path)


def _growth(path: Path, entry: Mapping[str, Any]) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional

    has_memory = any(f"{column}_bytes" in entry for column in _LINES)
    figure = Figure(figsize=(9.5 if has_memory else 5, 3.4))
    panels = figure.subplots(1, 2 if has_memory else 1, squeeze=False)[0]
    for axes, suffix, unit in zip(panels, ("", "_bytes"), ("seconds", "bytes of peak memory"), strict=False):
        for column, (name, colour) in _LINES.items():
            points = [(n, y) for n, y in zip(entry["sizes"], entry.get(column + suffix, ()), strict=False) if y is not None]
            if points:
                exponent = entry.get(f"{column}{suffix}_exponent")
                label = name if exponent is None else f"{name}: exponent {exponent:.2f}"
                axes.loglog(*zip(*points, strict=True), "o-", color=colour, label=label, ms=4)
        if max(entry["sizes"]) / min(entry["sizes"]) < 100:
            axes.set_xticks(entry["sizes"], [str(n) for n in entry["sizes"]])
            axes.minorticks_off()
        axes.set_xlabel("size")
        axes.set_ylabel(unit)
        axes.set_title(f"growth of {entry['key']}", fontsize=9)
        axes.legend(fontsize=7, frameon=False)
    _save(figure, path)
