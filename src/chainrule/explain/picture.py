"""The picture of a plan: the graph of local Jacobians with sizes, the order of elimination, and what each step costs."""

from __future__ import annotations

import io
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chainrule.execute.accounts import Account

_COLOURS = {"structured": "#cfe3f5", "decomposed": "#d9f0d3", "opaque": "#f8d5c2", "": "#eeeeee"}
_ROLES = {"input": "#fff3bf", "output": "#ffd8a8"}

#: More boxes than this are folded: runs of ops become one box.
_BOXES = 36
#: Boxes in one line of the picture.
_PER_LINE = 8
#: Steps that are listed by themselves.
_STEPS = 14


@dataclass
class _Box:
    """One box of the picture.

    Attributes:
        slots: the values that it stands for.
        title: its first line.
        shape: its second line.
        colour: its colour.
        depth: how far it is from the inputs.
        role: ``input``, ``output`` or ``inner``.
    """

    slots: list[int]
    title: str
    shape: str
    colour: str
    depth: int = 0
    role: str = "inner"


def save(account: Account, path: Path, peak: int = 0) -> None:
    """Write the picture into a file.

    Args:
        account: the account of a plan.
        path: the file; its ending says how it is written.
        peak: the bytes that the whole call holds at the peak, for the title.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure = draw(account, peak)
    with _settings():
        figure.savefig(path, bbox_inches="tight", dpi=150, metadata=_metadata(path.suffix))


def svg(account: Account, peak: int = 0) -> str:
    """The picture as the text of an SVG element.

    Args:
        account: the account of a plan.
        peak: the bytes that the whole call holds at the peak, for the title.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure = draw(account, peak)
    text = io.StringIO()
    with _settings():
        figure.savefig(text, format="svg", bbox_inches="tight", metadata=_metadata(".svg"))
    return re.sub(r"^.*?(?=<svg)", "", text.getvalue(), flags=re.S)


def _metadata(suffix: str) -> dict[str, Any] | None:
    return {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(suffix)


def draw(account: Account, peak: int = 0) -> Any:
    """The picture as a figure of matplotlib.

    Args:
        account: the account of a plan.
        peak: the bytes that the whole call holds at the peak, for the title.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    settings = _settings()
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional

    boxes, edges = _boxes(account)
    places, lines, tallest = _layout(boxes, edges)
    steps = dearest_steps(account.steps)
    width = 2.1 * min(_PER_LINE, max(box.depth for box in boxes) + 1) + 0.6
    graph_height = 1.05 * tallest + 0.7
    steps_height = 0.27 * len(steps) + 1.0 if steps else 0.0
    with settings:
        figure = Figure(figsize=(max(width, 7.5), graph_height + steps_height))
        ratio = [graph_height, steps_height] if steps else [1.0]
        axes = figure.subplots(len(ratio), 1, squeeze=False, gridspec_kw={"height_ratios": ratio})[:, 0]
        _draw_graph(axes[0], account, boxes, edges, places, lines)
        axes[0].set_title(_title(account, peak), fontsize=9, loc="left")
        if steps:
            _draw_steps(axes[1], account, steps)
        figure.tight_layout()
    return figure


def _settings() -> Any:
    try:
        from matplotlib import rc_context  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ImportError("the picture of an explanation needs matplotlib; install chainrule[plot]") from error
    return rc_context({"svg.hashsalt": "chainrule", "font.size": 9})


def _boxes(account: Account) -> tuple[list[_Box], list[tuple[int, int, int, int]]]:
    """The boxes, and between them edges ``(from, to, numbers stored, numbers if dense)``."""
    groups = [[vertex] for vertex in account.vertices]
    if len(groups) > _BOXES:
        groups = _folded(account)
    where = {vertex["slot"]: number for number, group in enumerate(groups) for vertex in group}
    boxes = [_box(group) for group in groups]
    sums: dict[tuple[int, int], list[int]] = defaultdict(lambda: [0, 0])
    for edge in account.edges:
        pair = where[edge["source"]], where[edge["target"]]
        if pair[0] != pair[1]:
            sums[pair][0] += edge["stored"]
            sums[pair][1] += edge["dense"]
    edges = [(source, target, stored, dense) for (source, target), (stored, dense) in sums.items()]
    for _ in boxes:
        moved = False
        for source, target, _, _ in edges:
            if boxes[target].depth < boxes[source].depth + 1:
                boxes[target].depth, moved = boxes[source].depth + 1, True
        if not moved:
            break
    return boxes, edges


def _folded(account: Account) -> list[list[dict[str, Any]]]:
    """The vertices in groups of neighbours in tape order, inputs and outputs by themselves."""
    inner = [vertex for vertex in account.vertices if vertex["role"] == "inner"]
    ends = [vertex for vertex in account.vertices if vertex["role"] != "inner"]
    first = [[v] for v in ends[: _BOXES // 4]]
    rest = ends[_BOXES // 4 :]
    if rest:
        first.append(rest)
    size = math.ceil(len(inner) / (_BOXES - len(first))) if inner else 1
    groups = first + [inner[start : start + size] for start in range(0, len(inner), size)]
    return sorted(groups, key=lambda group: max(v["slot"] for v in group))


def _box(group: list[dict[str, Any]]) -> _Box:
    last = group[-1]
    shape = "×".join(map(str, last["shape"])) or "scalar"
    kinds = [v["kind"] for v in group]
    kind = next((k for k in ("opaque", "decomposed", "structured") if k in kinds), "")
    names = [_short(v["op"]) for v in group if v["op"]]
    title = names[-1] if names else "input"
    if len(group) > 1:
        title = f"{len(group)} values" if not names else f"{len(group)} ops: {names[0]} … {names[-1]}"
    roles = {v["role"] for v in group}
    role = next((r for r in ("output", "input") if r in roles), "inner")
    colour = _ROLES["input"] if role == "input" and not names else _COLOURS[kind]
    return _Box([v["slot"] for v in group], title, shape, colour, role=role)


def _short(op: str) -> str:
    return op.removeprefix("aten.").removesuffix(".default")


def _layout(
    boxes: list[_Box], edges: list[tuple[int, int, int, int]]
) -> tuple[dict[int, tuple[float, float]], int, int]:
    """Where each box stands: columns by depth, in lines of a few columns, each column ordered by its neighbours."""
    columns: dict[int, list[int]] = defaultdict(list)
    for number, box in enumerate(boxes):
        columns[box.depth].append(number)
    before: dict[int, list[int]] = defaultdict(list)
    for source, target, _, _ in edges:
        before[target].append(source)
    row: dict[int, float] = {}
    for depth in sorted(columns):
        members = sorted(columns[depth], key=lambda n: (sum(row[s] for s in before[n]) / len(before[n])) if before[n] else n)
        for position, number in enumerate(members):
            row[number] = position - (len(members) - 1) / 2
    lines = max(columns) // _PER_LINE + 1
    places: dict[int, tuple[float, float]] = {}
    base = 0.0
    for line in range(lines):
        inside = [depth for depth in columns if depth // _PER_LINE == line]
        tall = max(len(columns[depth]) for depth in inside)
        for depth in inside:
            for number in columns[depth]:
                places[number] = (depth % _PER_LINE, base - (tall - 1) / 2 + row[number])
        base -= tall + (0.35 if lines > 1 else 0)
    return places, lines, math.ceil(-base)


def _draw_graph(
    axes: Any, account: Account, boxes: list[_Box], edges: list[tuple[int, int, int, int]],
    places: dict[int, tuple[float, float]], lines: int,
) -> None:  # fmt: skip
    halves = [_half_width(box) for box in boxes]
    largest = max((stored for *_, stored, _ in edges), default=1) or 1
    for source, target, stored, dense in edges:
        (x0, y0), (x1, y1) = places[source], places[target]
        straight = abs(y0 - y1) < 0.2 and x1 - x0 == 1
        wraps = boxes[source].depth // _PER_LINE != boxes[target].depth // _PER_LINE
        bend = 0.0 if straight or wraps else -0.25
        style = {"arrowstyle": "-|>", "color": "#777777", "lw": 0.6 + 2.4 * math.sqrt(stored / largest)}
        style |= {"shrinkA": 0, "shrinkB": 0, "connectionstyle": f"arc3,rad={bend}", "mutation_scale": 9, "alpha": 0.8}
        if wraps:
            style["linestyle"] = "--"
        ends = ((x1 - halves[target], y1), (x0 + halves[source], y0)) if not wraps else ((x1, y1 + 0.16), (x0, y0 - 0.16))
        axes.annotate("", xy=ends[0], xytext=ends[1], arrowprops=style, zorder=1)
        if straight or len(edges) <= 24:
            label = _count(stored) if stored else "0"
            text = f"{label}\nof {_count(dense)}"
            middle = (x0 + halves[source] + x1 - halves[target]) / 2, (y0 + y1) / 2 + 0.06
            axes.text(*middle, text, ha="center", va="bottom", fontsize=5.5, color="#444444", zorder=4)
    order = {slot: number for number, slot in enumerate(account.eliminated, 1)}
    for number, box in enumerate(boxes):
        x, y = places[number]
        edge = "#c92a2a" if box.role == "output" else "#b08900" if box.role == "input" else "#555555"
        text = box.title if len(box.title) <= 18 else _wrapped(box.title)
        axes.text(
            x, y, f"{text}\n{box.shape}", ha="center", va="center", fontsize=6.5, zorder=3,
            bbox={"boxstyle": "round,pad=0.35", "facecolor": box.colour, "edgecolor": edge, "linewidth": 1.0},
        )  # fmt: skip
        turns = [order[slot] for slot in box.slots if slot in order]
        if turns:
            label = str(turns[0]) if len(turns) == 1 else f"{min(turns)}–{max(turns)}"
            axes.text(x + halves[number], y + 0.21, label, ha="center", va="center", fontsize=6, color="white", zorder=5,
                      bbox={"boxstyle": "circle,pad=0.18", "facecolor": "#364fc7", "edgecolor": "none"})  # fmt: skip
    xs, ys = zip(*places.values(), strict=True)
    axes.set_xlim(min(xs) - 0.6, max(max(xs), 3) + 0.6)
    axes.set_ylim(min(ys) - 0.65, max(ys) + 0.75)
    axes.axis("off")
    keys = [("structured", _COLOURS["structured"]), ("decomposed", _COLOURS["decomposed"]), ("opaque", _COLOURS["opaque"])]
    used = {box.colour for box in boxes}
    handles = [axes.scatter([], [], marker="s", s=40, color=colour, edgecolors="#555555", linewidths=0.5, label=name)
               for name, colour in keys if colour in used]  # fmt: skip
    if order:
        handles.append(axes.scatter([], [], marker="o", s=40, color="#364fc7", label="order of elimination"))
    if handles:
        axes.legend(handles=handles, loc="lower right", fontsize=6, ncols=4, frameon=False, bbox_to_anchor=(1.0, -0.06))


def _half_width(box: _Box) -> float:
    """Half the width of a box, in columns of the picture."""
    title = box.title if len(box.title) <= 18 else _wrapped(box.title)
    longest = max(len(line) for line in (*title.split("\n"), box.shape))
    return 0.05 + 0.0125 * longest


def _wrapped(title: str) -> str:
    head, _, tail = title.partition(": ")
    return f"{head}:\n{tail}" if tail else title[:17] + "…"


def _title(account: Account, peak: int) -> str:
    name = account.kind.replace("_", " ")
    contracted = "contracted as one network" if account.chosen == "network" else account.chosen
    text = f"{name}, {contracted}; on edges: numbers stored of numbers in the dense local Jacobian"
    if peak:
        text += f"; the whole call holds {_count(peak)}B at the peak"
    return text


def dearest_steps(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps to show: the dearest, in their order, and the others as one."""
    steps = [step for step in steps if step["flops"] or step["bytes"]]
    if len(steps) <= _STEPS:
        return steps
    limit = sorted((_cost(step) for step in steps), reverse=True)[_STEPS - 2]
    kept = [step for step in steps if _cost(step) >= limit][: _STEPS - 1]
    others = [step for step in steps if not any(step is other for other in kept)]
    total = {key: sum(step[key] for step in others) for key in ("flops", "bytes")}
    return [*kept, {"label": f"{len(others)} other steps", "shape": None, **total}]


def _cost(step: dict[str, Any]) -> float:
    return float(step["flops"]) + float(step["bytes"])


def _draw_steps(axes: Any, account: Account, steps: list[dict[str, Any]]) -> None:
    names = []
    for number, step in enumerate(steps, 1):
        shape = "" if step["shape"] is None else " " + ("×".join(map(str, step["shape"])) or "scalar")
        names.append(f"{number}. {step['label'] or 'value'}{shape}")
    positions = range(len(steps))
    for shift, key, colour, label in ((-0.2, "flops", "#4dabf7", "flops"), (0.2, "bytes", "#ffa94d", "bytes moved")):
        axes.barh([p + shift for p in positions], [step[key] for step in steps], height=0.36, color=colour, label=label)
    for position, step in zip(positions, steps, strict=True):
        for shift, key in ((-0.2, "flops"), (0.2, "bytes")):
            axes.text(max(step[key], 0.5), position + shift, " " + _count(step[key]), va="center", fontsize=5.5, color="#444444")
    axes.set_yticks(list(positions), names, fontsize=6.5)
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=10)
    axes.tick_params(axis="x", labelsize=6)
    axes.set_title("cost per step of the plan", fontsize=8, loc="left")
    axes.legend(fontsize=6, frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)  # above: no bar is under it
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.margins(x=0.12)


def _count(value: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}P"
