"""The table on the terminal, ``RESULTS.md`` and ``results.json``."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import plots
from benchmarks.limits import LIMITS
from benchmarks.measure import Row

if find_spec("rich"):
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
else:
    Console = Table = None  # type: ignore[assignment,misc]

SPARSE_TITLE = "section C: sparse derivatives and solvers"
COLUMNS = {
    "eager": "chainrule",
    "compiled": "compiled",
    "peer": "torch.func",
    "peer_compiled": "torch.compile",
    "autograd": "autograd.grad",
    "jax": "jax.jit",
    "hand": "by hand",
    "write": "write output",
}
RATIOS = {"peer_eager": ("tf/eager", ">="), "eager_hand": ("eager/hand", "<="), "best_compiled": ("best peer/compiled", ">=")}

#: The columns and ratios of section C, of sparse derivatives and solvers.
SPARSE_COLUMNS = {
    "eager": "chainrule",
    "compiled": "compiled",
    "function": "function itself",
    "peer": "torch.func",
    "coloured": "torch.func, coloured",
    "differences": "finite differences",
    "hand": "by hand",
}
SPARSE_RATIOS = {
    "eager_function": ("eager/function", "<="),
    "peer_eager": ("tf/eager", ">="),
    "differences_eager": ("differences/eager", ">="),
    "eager_hand": ("eager/hand", "<="),
}
_SIGNS = {name: sign for name, (_, sign) in (RATIOS | SPARSE_RATIOS).items()}


def processor(device: str) -> str:
    """The model of the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def seconds(value: float) -> str:
    """A time in readable units."""
    if math.isnan(value):
        return "–"
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs" if value >= 1e-5 else f"{value * 1e6:.1f} µs"
    if value < 1:
        return f"{value * 1e3:.2f} ms" if value < 0.1 else f"{value * 1e3:.0f} ms"
    return f"{value:.2f} s"


def size(value: int) -> str:
    """A number of bytes in readable units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value} B"


def ratio(row: Row, name: str) -> str:
    """A measured ratio with the one to reach; a row that misses it is marked with ``!``."""
    got, wanted = row.ratios.get(name), row.targets.get(name)
    if got is None:
        return "–" if wanted is None else f"– (want {wanted:g})"
    text = f"{got:.1f}" if got >= 10 else f"{got:.2f}"
    if wanted is None:
        return text
    reached = got >= wanted if _SIGNS[name] == ">=" else got <= wanted
    sign = "≥" if _SIGNS[name] == ">=" else "≤"
    return f"{text} ({sign} {wanted:g}{'' if reached else ' !'})"


def cells(row: Row) -> list[str]:
    """A row of the table of times."""
    return [
        row.key,
        row.title,
        *(seconds(row.times.get(column, math.nan)) for column in COLUMNS),
        *(ratio(row, name) for name in RATIOS),
    ]


def header() -> list[str]:
    """The head of the table of times."""
    return ["", "workload", *COLUMNS.values(), *(title for title, _ in RATIOS.values())]


def sparse_cells(row: Row) -> list[str]:
    """A row of section C's table."""
    return [
        row.key,
        row.title,
        "–" if row.nonzeros is None else str(row.nonzeros),
        seconds(row.plan),
        seconds(row.first_call),
        *(seconds(row.times.get(column, math.nan)) for column in SPARSE_COLUMNS),
        *(ratio(row, name) for name in SPARSE_RATIOS),
    ]


def sparse_header() -> list[str]:
    """The head of section C's table."""
    titles = (title for title, _ in SPARSE_RATIOS.values())
    return ["", "workload", "non-zeros", "planning", "first call", *SPARSE_COLUMNS.values(), *titles]


def tables(rows: Sequence[Row]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The tables of times: title, head and rows; section C has its own columns."""
    dense, other = [row for row in rows if row.section != "C"], [row for row in rows if row.section == "C"]
    found = [("times and ratios", header(), [cells(row) for row in dense])] if dense else []
    return found + ([(SPARSE_TITLE, sparse_header(), [sparse_cells(row) for row in other])] if other else [])


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
    """A table on the terminal, by ``rich`` where it is installed."""
    if Console is None:
        print(f"\n{title}\n{markdown_table(head, rows)}")
        return
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(head):
        table.add_column(name, justify="left" if number < 2 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console()
    Console(width=max(console.width, 190) if not console.is_terminal else None).print(table)


def markdown(
    rows: Sequence[Row],
    settings: Mapping[str, Any],
    budget: Mapping[str, float],
    growth: Sequence[Mapping[str, Any]],
    products: Mapping[str, Mapping[str, int]] | None = None,
) -> str:
    """The results as a document."""
    parts = ["# Results", "", "Written by `python -m benchmarks`.", ""]
    parts += [f"- {name}: {value}" for name, value in settings.items()]
    parts += [
        "",
        "Each time is the median over interleaved rounds of `torch.utils.benchmark.Timer.blocked_autorange`; where a library has",
        "several expressions of the same thing, the fastest one. All of them agree in float64 before anything is timed. `write",
        "output` is a copy of the result. `compiled` is `chainrule.compile`; where torch.compile was timed, also by its inductor",
        "backend (a table below names the faster one). Ratios: `tf/eager` is how many times faster than torch.func a plain call",
        "is, `eager/hand` how far it is from the formula written by hand, `best peer/compiled` compares us compiled with the",
        "best of all peers; in parentheses what is to be reached, with `!` where it is not.",
        "",
        *_tables(rows),
        *(f"![section {s}: how many times faster than torch.func](plots/ratios-{s}.svg)" for s in _sections(rows)),
        "",
        *_notes(rows),
        "## Which expression was the fastest, first call and peak memory",
        "",
        "Peak memory is the peak of the running sum of the allocator's events during one call (`torch.profiler`; on a GPU the",
        "caching allocator's own statistics), the result included. The prediction is that of the plans alone: what is made",
        "around the transforms (tangents and results in lists, the training step that follows) is not in it, and a plain",
        "`vmap` has no plan.",
        "",
        markdown_table(
            [
                "", "chainrule", "compiled", "torch.func", "jax.jit", "our first call", "peak: predicted", "chainrule",
                "torch.func", "by hand",
            ],  # fmt: skip
            [
                [
                    row.key,
                    row.names.get("eager", "–"),
                    row.names.get("compiled", "–"),
                    row.names.get("peer", "–"),
                    row.names.get("jax", "–"),
                    seconds(row.first_call),
                    *(size(row.memory[c]) if c in row.memory else "–" for c in ("predicted", "eager", "peer", "hand")),
                ]
                for row in rows
            ],
        ),
    ]
    for entry in growth:
        picture = f"![growth of {entry['key']}](plots/growth-{entry['key']}.svg)"
        parts += ["", f"## Growth of {entry['key']}", "", growth_table(entry), "", picture]
    if products:
        parts += ["", "## Peak memory of Hessian-vector products", "", *_PRODUCT_TEXT]
        parts += [markdown_table(["", *PRODUCTS], product_rows(products))]
    parts += ["", "## Every expression that was timed", "", *_EXPRESSION_TEXT]
    parts += [markdown_table(["", "library", "expressions"], _expressions(rows))]
    if budget:
        parts += ["", "## Overhead budget", "", markdown_table(["piece", "time"], budget_rows(budget))]
    missed = [row.key for row in rows if row.key in LIMITS and _misses(row, growth)]
    if missed:
        parts += ["", "## What limits the rows that miss a ratio", "", *(f"- {key}: {LIMITS[key]}" for key in missed)]
    problems = [f"- {row.key}: {problem}" for row in rows for problem in row.problems]
    if problems:
        parts += ["", "## What could not be run", "", *problems]
    return "\n".join(parts) + "\n"


def budget_rows(budget: Mapping[str, float]) -> list[list[str]]:
    """The overhead budget as rows."""
    return [[name.replace("  ", "· "), f"{value * 1e6:.2f} µs"] for name, value in budget.items()]


def growth_table(entry: Mapping[str, Any]) -> str:
    """Times and peak memory by size, and the fitted exponents; ``!`` where ours is over the one to reach."""
    head = ["", *(f"n={n}" for n in entry["sizes"]), "exponent"]
    rows = []
    for column in GROWING:
        shown = COLUMNS[column]
        for name, title, text in ((column, shown, seconds), (f"{column}_bytes", f"{shown}, peak memory", _size)):
            if name in entry:
                values = ("–" if value is None else text(value) for value in entry[name])
                rows.append([title, *values, _exponent(entry, name)])
    return markdown_table(head, rows)


#: The columns of a growth study.
GROWING = ("eager", "peer", "hand")


def _size(value: float) -> str:
    return size(int(value))


def _exponent(entry: Mapping[str, Any], name: str) -> str:
    found, wanted = entry.get(f"{name}_exponent"), entry.get("exponent")
    if found is None:
        return "–"
    if wanted is None or not name.startswith("eager"):
        return f"{found:.2f}"
    return f"{found:.2f} (≤ {wanted:g}{'' if found <= wanted else ' !'})"


PRODUCTS = ("chainrule, forward over reverse", "chainrule, reverse over reverse", "torch.func, forward over reverse",
            "torch.func, reverse over reverse")  # fmt: skip

_INTRODUCTIONS = {
    SPARSE_TITLE: (
        "## Section C",
        "",
        "Sparse Jacobians and Hessians in float64 (B17: float32), and solvers. `planning` is what the first call takes more than",
        "a later one. `function itself` is one evaluation of what is differentiated. `torch.func` is dense, for C7 the blocks",
        "gathered by hand. (C7 has 29 non-zeros per observation: of the 31 in the blocks of 2×15 and 1×1, those of each",
        "image coordinate by the other coordinate of the principal point are zero by structure.)",
        "`torch.func, coloured` pushes one tangent per colour, with a pattern and a colouring made beforehand.",
        "`by hand` is a formula with a pattern made beforehand. For C4 and C5 a whole solve is timed; `finite differences` are",
        "SciPy's.",
        "",
    ),
}

_PRODUCT_TEXT = (
    "The same product by a tangent through the gradient, and by the gradient of the gradient. A tangent lets go of each value of",
    "the record when it has passed. The gradient of the gradient keeps what its second part reads, and computes large factors",
    "again (from 64 kB on) where a call or two make them: so it may hold less than a tangent there.",
    "",
)

_EXPRESSION_TEXT = (
    "Each library with every expression that was tried, the fastest first. From the second round on only those within twice the",
    "fastest are timed again.",
    "",
)


def product_rows(products: Mapping[str, Mapping[str, int]]) -> list[list[str]]:
    """The memory of Hessian-vector products as rows."""
    return [[name, *(size(found[column]) for column in PRODUCTS)] for name, found in products.items()]


def _sections(rows: Sequence[Row]) -> list[str]:
    return sorted({row.section for row in rows})


def _misses(row: Row, growth: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a ratio or an exponent of the row is not the one to reach."""
    texts = [ratio(row, name) for name in _SIGNS]
    texts += [growth_table(entry) for entry in growth if entry["key"] == row.key]
    return any("!" in text for text in texts)


def _tables(rows: Sequence[Row]) -> list[str]:
    lines = []
    for title, head, found in tables(rows):
        lines += [*_INTRODUCTIONS.get(title, ()), markdown_table(head, found), ""]
    return lines


def _notes(rows: Sequence[Row]) -> list[str]:
    """What the accounts of the workloads say."""
    noted = [[row.key, name, text] for row in rows for name, text in row.notes.items()]
    if not noted:
        return []
    return ["## Runs, accuracy and memory of solves and products", "", markdown_table(["", "way", "account"], noted), ""]


def _expressions(rows: Sequence[Row]) -> list[list[str]]:
    found = []
    for row in rows:
        for column in (*COLUMNS, *(column for column in SPARSE_COLUMNS if column not in COLUMNS)):
            times = row.all_times.get(column)
            if times and column not in ("write", "function"):
                ordered = sorted(times, key=times.__getitem__)
                text = ", ".join(f"{name} {seconds(times[name])}" for name in ordered)
                found.append([row.key, (COLUMNS | SPARSE_COLUMNS)[column], text])
    return found


def write_results(
    folder: Path,
    rows: Sequence[Row],
    settings: Mapping[str, Any],
    budget: Mapping[str, float],
    growth: Sequence[Mapping[str, Any]],
    known: Sequence[str] = (),
    products: Mapping[str, Mapping[str, int]] | None = None,
) -> None:
    """Write ``RESULTS.md`` and ``results.json``; rows of an earlier run that were not measured now are kept.

    Args:
        folder: where to.
        rows: what was measured.
        settings: how.
        budget: the overhead budget.
        growth: the growth studies.
        known: the keys of all workloads, in their order; other rows of an earlier run are dropped.
        products: the memory of Hessian-vector products.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = _earlier(folder / "results.json")
    measured = {row.key: row for row in rows}
    kept = {e["key"]: Row(**_restored(e)) for e in before.get("rows", []) if e["key"] in known and e["key"] not in measured}
    if kept:
        settings = {**settings, "rows of an earlier run": ", ".join(kept)}
    both = {**kept, **measured}
    rows = [both[key] for key in (known or both) if key in both]
    studied = {entry["key"] for entry in growth}
    growth = [*growth, *(e for e in before.get("growth", []) if e["key"] in kept and e["key"] not in studied)]
    growth.sort(key=lambda e: [row.key for row in rows].index(e["key"]))
    budget = budget or before.get("overhead_seconds", {})
    products = products or before.get("product_bytes", {})
    (folder / "RESULTS.md").write_text(markdown(rows, settings, budget, growth, products))
    plots.write(folder / "plots", rows, growth)
    data = {
        "settings": dict(settings),
        "rows": [asdict(row) for row in rows],
        "overhead_seconds": dict(budget),
        "product_bytes": dict(products or {}),
        "growth": [dict(entry) for entry in growth],
    }
    (folder / "results.json").write_text(json.dumps(_finite(data), indent=1, ensure_ascii=False) + "\n")


def _earlier(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _restored(entry: dict[str, Any]) -> dict[str, Any]:
    """The numbers that JSON has no word for."""
    return {name: math.nan if name == "first_call" and value is None else value for name, value in entry.items()}


def _finite(item: Any) -> Any:
    if isinstance(item, dict):
        return {key: _finite(value) for key, value in item.items()}
    if isinstance(item, list):
        return [_finite(value) for value in item]
    if isinstance(item, float):
        return None if math.isnan(item) else float(f"{item:.6g}")
    return item
