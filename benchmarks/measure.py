"""Agreement, times and peak memory of a workload's expressions."""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.benchmark import Timer

import chainrule
from benchmarks.workload import Expression, Workload
from chainrule.execute import engine
from chainrule.execute.memory import planned_peak, watching
from chainrule.execute.sweeps import RUNS, Seen

Runnable = tuple[Expression, tuple[Any, ...]]

#: Expressions that take more seconds are timed in two rounds.
SLOW = 3.0


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        device: ``cpu`` or ``cuda``.
        threads: threads of one operation, for every library.
        rounds: how often the expressions are timed in turn; the median over all rounds counts.
        seconds: least time spent on an expression in one round.
        compiled: whether ``torch.compile`` of the peers is timed.
        jax: the ``jax`` module, or None.
        first_call: whether the first call is timed, which forgets all plans.
        quick: whether workloads that are large are left out.
    """

    device: str = "cpu"
    threads: int = 1
    rounds: int = 5
    seconds: float = 0.1
    compiled: bool = True
    jax: Any = None
    first_call: bool = True
    quick: bool = False


@dataclass
class Row:
    """What was measured of a workload; times in seconds, memory in bytes.

    Attributes:
        key: the workload's key.
        title: its title.
        section: where the row belongs.
        times: time of the fastest expression by column: eager, compiled, peer, peer_compiled, autograd, jax, hand, write,
            function, coloured, differences.
        names: which expression was the fastest, by column.
        all_times: time of every expression, by column and name.
        first_call: time of the first call of ours in a process where its plan is not known yet.
        memory: peak of what the call allocates, by column, the result included; ``predicted`` is ours as the plans have it.
        nonzeros: the entries of our result, where it is sparse.
        ratios: the ratios of interest: peer_eager, eager_hand, best_compiled, eager_function, differences_eager.
        targets: the ratios to reach, by the same names.
        notes: what else the workload's account says.
        problems: what could not be run, and why.
    """

    key: str
    title: str
    section: str = ""
    times: dict[str, float] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    all_times: dict[str, dict[str, float]] = field(default_factory=dict)
    first_call: float = math.nan
    memory: dict[str, int] = field(default_factory=dict)
    nonzeros: int | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    targets: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.section = self.section or self.key[0]

    @property
    def plan(self) -> float:
        """What the first call takes more than a later one."""
        return max(self.first_call - self.times.get("eager", math.nan), 0.0)


class Disagreement(AssertionError):
    """Two expressions of a workload gave different results."""


def check_agreement(workload: Workload, device: str, jax: Any = None) -> float:
    """Compare every expression with the first one, or the workload's reference, in float64.

    Returns:
        The largest difference, relative to the largest entry.

    Raises:
        Disagreement: if one is off by more than the workload's tolerance.
    """
    inputs = workload.tensors(torch.float64, device)
    expressions: dict[tuple[str, str], Expression] = {}
    if workload.reference is not None:
        expressions["reference", ""] = workload.reference
    for column, made in (
        ("peer", workload.peers), ("eager", workload.ours), ("coloured", workload.coloured), ("differences", workload.differences)
    ):  # fmt: skip
        expressions |= {(column, name): expression for name, expression in made.items()}
    if workload.hand is not None:
        expressions["hand", "formula"] = workload.hand
    if workload.autograd is not None:
        expressions["autograd", "autograd.grad"] = workload.autograd
    reference: list[torch.Tensor] = []
    worst = 0.0
    for (column, name), expression in expressions.items():
        # Twice: the first call plans, the second replays the plan.
        for _ in range(2 if column == "eager" and not workload.solve else 1):
            result = _compared(workload, column, expression, inputs)
            reference = reference or result
            worst = max(worst, _compare(workload, f"{column} {name}", result, reference))
    if jax is not None and workload.jax is not None:
        arrays = _jax_arrays(jax, inputs)
        for name, expression in workload.jax(jax).items():
            result = [torch.from_numpy(np.array(leaf)) for leaf in tree_leaves(expression(*arrays))]
            # JAX has kernels of its own; where 1 - tanh² cancels, their last digits differ.
            _compare(workload, f"jax {name}", result, [leaf.cpu() for leaf in reference], 1e-6)
    return worst


def _compared(workload: Workload, column: str, expression: Expression, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    found = expression(*inputs)
    if workload.reduced is not None and column != "reference":
        found = workload.reduced(column, found, inputs)
    return [_dense(leaf.detach()) for leaf in tree_leaves(found)]


def _dense(leaf: torch.Tensor) -> torch.Tensor:
    return leaf if leaf.layout is torch.strided else leaf.to_dense()


def _jax_arrays(jax: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
    return tuple(jax.numpy.asarray(t.cpu().numpy()) for t in inputs)


def _compare(
    workload: Workload, name: str, result: list[torch.Tensor], reference: list[torch.Tensor], tolerance: float | None = None
) -> float:
    tolerance = workload.tolerance if tolerance is None else tolerance
    if len(result) != len(reference):
        raise Disagreement(f"{workload.key}: {name} returns {len(result)} tensors, expected {len(reference)}")
    worst = 0.0
    for got, expected in zip(result, reference, strict=True):
        if got.shape != expected.shape:
            raise Disagreement(f"{workload.key}: {name} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
        if not expected.numel():
            continue
        scale = max(expected.abs().max().item(), 1e-300)
        error = (got.to(expected.device) - expected).abs().max().item() / scale
        if not error <= tolerance:
            raise Disagreement(f"{workload.key}: {name} is off by {error:.2e} of the largest entry (tolerance {tolerance:.0e})")
        worst = max(worst, error)
    return worst


def measure(workload: Workload, options: Options) -> Row:
    """Check that all expressions agree, then time them in turn."""
    row = Row(workload.key, workload.title, workload.section, targets=_targets(workload))
    inputs = workload.tensors(workload.dtype, options.device)
    torch.set_num_threads(options.threads)
    ours = next(iter(workload.ours.values()))
    if options.first_call and workload.large:  # planning takes long: the plan serves the comparison too
        row.first_call = _first_call(ours, inputs, options)
    check_agreement(workload, options.device, options.jax)
    if options.first_call and not workload.large:
        row.first_call = _first_call(ours, inputs, options)
    columns = _columns(workload, inputs, options, row)
    times = _interleaved(columns, options)
    for column, by_name in times.items():
        if by_name:
            row.all_times[column] = by_name
            row.names[column] = min(by_name, key=by_name.__getitem__)
            row.times[column] = min(by_name.values())
    if not workload.solve:
        _measure_memory(columns, row, options.device)
    if workload.account is not None:
        row.notes = dict(workload.account(*inputs))
    row.ratios = _ratios(row.times)
    return row


def _measure_memory(columns: Mapping[str, Mapping[str, Runnable]], row: Row, device: str) -> None:
    for column in ("eager", "peer", "hand", "autograd", "function", "coloured"):
        if column in row.names:
            expression, arguments = columns[column][row.names[column]]
            row.memory[column] = peak_memory(expression, arguments, device)
    expression, arguments = columns["eager"][row.names["eager"]]
    with watching():  # some calls go another way while somebody watches, and have plans of that way
        expression(*arguments)
    if predicted := planned_peak(lambda: expression(*arguments)):
        row.memory["predicted"] = predicted


def _targets(workload: Workload) -> dict[str, float]:
    found = vars(workload.targets)
    return {name: value for name, value in found.items() if value is not None}


def _ratios(times: Mapping[str, float]) -> dict[str, float]:
    ratios = {}
    if "peer" in times:
        ratios["peer_eager"] = times["peer"] / times["eager"]
    if "hand" in times:
        ratios["eager_hand"] = times["eager"] / times["hand"]
    if "function" in times:
        ratios["eager_function"] = times["eager"] / times["function"]
    if "differences" in times:
        ratios["differences_eager"] = times["differences"] / times["eager"]
    peers = [times[name] for name in ("peer", "peer_compiled", "jax") if name in times]
    if "compiled" in times and ("peer_compiled" in times or "jax" in times):
        ratios["best_compiled"] = min(peers) / times["compiled"]
    return ratios


def _columns(workload: Workload, inputs: tuple[torch.Tensor, ...], options: Options, row: Row) -> dict[str, dict[str, Runnable]]:
    columns: dict[str, dict[str, Runnable]] = {
        "eager": {name: (made, inputs) for name, made in workload.ours.items()},
        "peer": {name: (made, inputs) for name, made in workload.peers.items()},
        "hand": {} if workload.hand is None else {"formula": (workload.hand, inputs)},
        "autograd": {} if workload.autograd is None else {"autograd.grad": (workload.autograd, inputs)},
        "function": {} if workload.function is None else {"function": (workload.function, inputs)},
        "coloured": {name: (made, inputs) for name, made in workload.coloured.items()},
        "differences": {name: (made, inputs) for name, made in workload.differences.items()},
        "write": {},
        "compiled": {},
        "peer_compiled": {},
        "jax": {},
    }
    if workload.solve:
        return columns
    result = next(iter(workload.ours.values()))(*inputs)
    row.nonzeros = sum(x.values().numel() for x in tree_leaves(result) if x.layout is not torch.strided) or None
    columns["write"]["clone"] = (lambda: tree_map(torch.clone, result), ())
    if not workload.compiled:
        return columns
    columns["compiled"] = _compiled(chainrule.compile, workload.ours, inputs, row, "chainrule.compile")
    if options.compiled and workload.peers:
        ours = {f"{name}, inductor": made for name, made in _fastest(workload.ours, inputs, options).items()}
        by_inductor = partial(chainrule.compile, backend="inductor")
        columns["compiled"].update(_compiled(by_inductor, ours, inputs, row, "chainrule.compile"))
        fastest = _fastest(workload.peers, inputs, options)
        columns["peer_compiled"] = _compiled(torch.compile, fastest, inputs, row, "torch.compile")
    if options.jax is not None and workload.jax is not None:
        columns["jax"] = _jitted(workload, options, row)
    return columns


def _fastest(expressions: Mapping[str, Expression], inputs: tuple[torch.Tensor, ...], options: Options) -> dict[str, Expression]:
    """The fastest of the expressions: the one worth compiling, which takes up to a minute."""
    times = {name: _time((made, inputs), options, 0.02) for name, made in expressions.items()}
    name = min(times, key=times.__getitem__)
    return {name: expressions[name]}


def _compiled(
    compiler: Expression, expressions: Mapping[str, Expression], inputs: tuple[torch.Tensor, ...], row: Row, label: str
) -> dict[str, Runnable]:
    found: dict[str, Runnable] = {}
    for name, expression in expressions.items():
        try:
            made = compiler(expression)
            made(*inputs)
            made(*inputs)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            row.problems.append(f"{label}({name}): {type(error).__name__}: {reason[:160]}")
        else:
            found[name] = (made, inputs)
    return found


def _jitted(workload: Workload, options: Options, row: Row) -> dict[str, Runnable]:
    jax = options.jax
    assert workload.jax is not None
    arrays = _jax_arrays(jax, workload.tensors(workload.dtype, "cpu"))
    found: dict[str, Runnable] = {}
    for name, expression in workload.jax(jax).items():
        try:
            jitted = jax.jit(expression)
            jax.block_until_ready(jitted(*arrays))
        except Exception as error:
            row.problems.append(f"jax.jit({name}): {type(error).__name__}: {str(error).splitlines()[0][:160]}")
        else:
            found[name] = (_blocking(jitted, jax.block_until_ready), arrays)
    return found


def _blocking(function: Expression, wait: Expression) -> Expression:
    def run(*args: Any) -> Any:
        return wait(function(*args))

    return run


def _first_call(expression: Expression, inputs: tuple[torch.Tensor, ...], options: Options) -> float:
    """The time of a call that has to plan first."""
    engine.CACHE.clear()
    _synchronize(options.device)
    start = time.perf_counter()
    expression(*inputs)
    _synchronize(options.device)
    return time.perf_counter() - start


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _time(runnable: Runnable, options: Options, seconds: float) -> float:
    expression, arguments = runnable
    expression(*arguments)
    timer = Timer("f(*a)", globals={"f": expression, "a": arguments}, num_threads=options.threads)
    return timer.blocked_autorange(min_run_time=seconds).median


def _settle(runnable: Runnable) -> None:
    """Call until nothing is left to be planned: of thousands of ops, only signatures that were seen often are planned."""
    expression, arguments = runnable
    for _ in range(RUNS + 2):
        before = _swept()
        expression(*arguments)
        if _swept() == before:
            return


def _swept() -> int:
    return sum(kept.runs for kept in engine.CACHE._plans.values() if isinstance(kept, Seen))


def _interleaved(columns: Mapping[str, Mapping[str, Runnable]], options: Options) -> dict[str, dict[str, float]]:
    """Every expression once per round, one after another; the median over the rounds.

    From the second round on, only expressions within twice the fastest of their column are timed again, and from the third on
    none that takes seconds.
    """
    for expressions in columns.values():
        for runnable in expressions.values():
            _settle(runnable)
    samples: dict[tuple[str, str], list[float]] = {}
    for number in range(options.rounds):
        for column, expressions in columns.items():
            fastest = min((statistics.median(s) for (c, _), s in samples.items() if c == column), default=math.inf)
            for name, runnable in expressions.items():
                known = statistics.median(samples[column, name]) if number else 0.0
                if known > 2 * fastest or (number > 1 and known > SLOW):
                    continue
                samples.setdefault((column, name), []).append(_time(runnable, options, options.seconds))
    return {
        column: {name: statistics.median(samples[column, name]) for name in expressions}
        for column, expressions in columns.items()
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on the error stream from native code: the profiler reports its start and stop there."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_memory(expression: Expression, arguments: tuple[Any, ...], device: str) -> int:
    """The most that one call holds at once, over what was held before, its result included.

    On a GPU by the caching allocator's statistics; on a CPU as the peak of the running sum of the allocator's events,
    as ``torch.profiler`` records them.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = expression(*arguments)
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = expression(*arguments)
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    del result
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
