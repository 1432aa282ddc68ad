"""Measure the workloads and print the tables; where all of them are measured, write RESULTS.md, results.json and plots, too."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch

from benchmarks import overhead, report, section_a, section_b, section_c
from benchmarks.measure import Disagreement, Options, Row, measure
from benchmarks.workload import Workload

#: Modules that hold a tuple ``WORKLOADS``; a further section is one more entry.
SECTIONS = (section_a, section_b, section_c)

#: Memory that was freed is kept by the C library and used again. With its default settings every result over 32 MB is
#: mapped anew, and the page faults of writing it hide the arithmetic of all peers alike.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000", "MALLOC_TOP_PAD_": "67108864"}


#: A run of no more rows than this is a look at them.
_FEW = 8


def _keep_freed_memory() -> None:
    """Start again with the allocator settings, which the C library reads only at start."""
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], {**os.environ, **ALLOCATOR})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen workloads; 0 if all expressions ran and agreed."""
    options, chosen, target, left_out = _parse(arguments)
    torch.set_num_threads(options.threads)
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module="torch")
    rows: list[Row] = []
    growth: list[dict[str, Any]] = []
    failed = []
    settings = _settings(options)
    everything = [workload.key for section in SECTIONS for workload in section.WORKLOADS]
    for workload in chosen:
        print(f"{workload.key} {workload.title}", file=sys.stderr, flush=True)
        try:
            rows.append(measure(workload, options))
            if target is not None:  # a growth study may take long
                report.write_results(target, rows, settings, {}, growth, everything, {})
            if workload.sizes:
                growth.append(_growth(workload, options))
            if target is not None:  # what a run that is cut off has measured is kept
                report.write_results(target, rows, settings, {}, growth, everything, {})
        except Disagreement as error:
            failed.append(str(error))
            print(f"DISAGREE {error}", file=sys.stderr)
        except Exception as error:  # the other rows are still wanted
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            failed.append(f"{workload.key}: {type(error).__name__}: {reason}")
            print(f"FAIL {failed[-1]}", file=sys.stderr)
    # What these tables explain; a look at single rows does without them.
    calls = any(workload.section != "C" for workload in chosen) and (target is not None or len(chosen) > _FEW)
    budget = overhead.overhead_budget(options.threads, options.seconds) if calls and options.device == "cpu" else {}
    products = overhead.product_memory(options.device) if calls else {}
    for name, value in settings.items():
        print(f"{name}: {value}")
    for title, head, found in report.tables(rows):
        report.print_table(head, found, title)
    for row in rows:
        for name, text in row.notes.items():
            print(f"{row.key} {name}: {text}")
    for entry in growth:
        print(f"\ngrowth of {entry['key']}\n{report.growth_table(entry)}")
    if budget:
        report.print_table(["piece", "time"], report.budget_rows(budget), "overhead budget")
    if products:
        report.print_table(["", *report.PRODUCTS], report.product_rows(products), "peak memory of Hessian-vector products")
    for row in rows:
        for problem in row.problems:
            print(f"{row.key}: {problem}")
    if target is not None:
        report.write_results(target, rows, settings, budget, growth, everything, products)
        print(f"written: {target / 'RESULTS.md'}, {target / 'results.json'}, {target / 'plots'}")
    if left_out:
        print(f"left out with --quick, as are the large sizes of growth studies: {', '.join(left_out)}")
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> tuple[Options, list[Workload], Path | None, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", default="", help="comma-separated rows or sections, such as A2,A3 or A")
    parser.add_argument("--quick", action="store_true", help="short measurements, nothing compiled, no large sizes")
    parser.add_argument("--short", action="store_true", help="short measurements of all sizes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of one operation (default 1)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="time torch.compile of the peers")
    parser.add_argument("--jax", action=argparse.BooleanOptionalAction, default=True, help="time jax.jit where jax is installed")
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        help="folder for RESULTS.md, results.json and plots, where the rows join those of earlier runs "
        "(default: the folder of the benchmarks if all rows are measured at length, none with --only or --quick)",
    )
    given = parser.parse_args(arguments)
    names = [name.strip() for name in given.only.split(",") if name.strip()]
    workloads = [workload for section in SECTIONS for workload in section.WORKLOADS]
    chosen = [w for w in workloads if not names or w.key in names or w.section in names or w.key.rstrip(ascii_lowercase) in names]
    if not chosen:
        parser.error(f"no workload matches {given.only!r}; there are {', '.join(w.key for w in workloads)}")
    options = Options(
        device=given.device,
        threads=given.threads,
        rounds=3 if given.quick or given.short else 7,
        seconds=0.03 if given.quick or given.short else 0.15,
        quick=given.quick,
        compiled=not given.quick if given.compile is None else given.compile,
        jax=_import_jax(given.threads) if given.jax and given.device == "cpu" else None,
    )
    left_out = [w.key for w in chosen if given.quick and w.large]
    chosen = [w for w in chosen if w.key not in left_out]
    output: Path | None = given.output
    if output is None and not names and not given.quick:
        output = Path(__file__).parent
    return options, chosen, output, left_out


def _import_jax(threads: int) -> Any:
    if find_spec("jax") is None:
        return None
    if threads == 1:
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)  # for the agreement; float32 arrays stay float32
    return jax


def _growth(workload: Workload, options: Options) -> dict[str, Any]:
    """Times and peak memory by size, with the fitted exponents; None where a peer has no such size."""
    short = replace(options, rounds=3, seconds=min(options.seconds, 0.1), compiled=False, jax=None, first_call=False)
    sizes = [n for n in sorted(workload.sizes) if not (options.quick and workload.sizes[n].large)]
    measured = [measure(workload.sizes[n], short) for n in sizes]
    entry: dict[str, Any] = {"key": workload.key, "sizes": sizes, "exponent": workload.exponent}
    for column in report.GROWING:
        for name, found in (
            (column, [row.times.get(column) for row in measured]),
            (f"{column}_bytes", [row.memory.get(column) for row in measured]),
        ):
            known = [(math.log(n), math.log(value)) for n, value in zip(sizes, found, strict=True) if value]
            if known:
                entry[name] = found
            if len(known) > 1:
                entry[f"{name}_exponent"] = _slope(*zip(*known, strict=True))
    return entry


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def _settings(options: Options) -> dict[str, Any]:
    found = {
        "processor": report.processor(options.device),
        "device": options.device,
        "threads": options.threads,
        "allocator": "freed memory is kept and used again" if "MALLOC_MMAP_MAX_" in os.environ else "default",
        "rounds": f"{options.rounds} of at least {options.seconds:g} s per expression",
        "Python": platform.python_version(),
        "torch": torch.__version__,
    }
    if options.jax is not None:
        found["jax"] = options.jax.__version__
    return found


if __name__ == "__main__":
    if "--default-allocator" in sys.argv:
        sys.argv.remove("--default-allocator")
    else:
        _keep_freed_memory()
    sys.exit(main())
