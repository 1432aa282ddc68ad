"""Nests of derivative transforms as a whole: ``jacfwd(jacrev(f))`` and its like run ``f`` once, on one tape.

Each derivative transform leaves a `Level` on the function it returns. A transform that finds one on the function that it
is given does not run that function: it runs the innermost one on a tape, and the levels one after the other on that tape.
The first time, what the levels compute is recorded as one program; later calls of the same signature replay it, whatever
the depth of the nest.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._pytree import TreeSpec

from chainrule.capture.numbers import note_numbers
from chainrule.capture.recorder import Recorder
from chainrule.capture.tape import BelowAutograd, Tape
from chainrule.dispatch import undispatched
from chainrule.execute import engine
from chainrule.execute.accounts import UNCACHED, collecting, current_ledger
from chainrule.execute.engine import CachedPlan
from chainrule.execute.memory import current_watch
from chainrule.execute.replay import compile_stages
from chainrule.maps.staging import Program, Staged
from chainrule.transforms.arguments import (
    Argnums,
    flatten_inputs,
    flatten_outputs,
    resolve_argnums,
    structure_key,
    tree_flatten,
    tree_unflatten,
)
from chainrule.transforms.trace import Traced, active_slot, trace

Finish = Callable[[Traced, bool], Any]


@dataclass(slots=True)
class Level:
    """One derivative transform of a function.

    Attributes:
        func: the function.
        name: the transform's name, for messages.
        argnums: what is differentiated; None for all positional arguments.
        has_aux: whether the function returns ``(output, aux)``.
        finish: computes the transform's result (without aux) from a run; the flag is whether ``argnums`` is one.
        key: what the result depends on beside the run.
        owner: the function that carries this level.
    """

    func: Callable[..., Any]
    name: str
    argnums: Argnums | None
    has_aux: bool
    finish: Finish
    key: tuple[Any, ...]
    owner: Callable[[], Any] | None = None

    def mark(self, wrapper: Callable[..., Any]) -> None:
        """Put this level on the function that the transform returns."""
        self.owner = weakref.ref(wrapper)
        wrapper._chainrule_level = self  # type: ignore[attr-defined]


@dataclass
class NestPlan(CachedPlan):
    """The program of a whole nest, and how its results are put together."""

    spec: Any = None
    sources: list[int | None] = field(default_factory=list)


#: In place of a plan: this nest is run level by level.
_BY_LEVELS = CachedPlan([], None)

#: What :func:`run_nest` returns when there is no nest, or none that can be run as a whole.
NO_NEST = object()


def level_of(func: Any) -> Level | None:
    """The level that a function carries. A decorator that copies attributes does not make its function carry one."""
    level = getattr(func, "_chainrule_level", None)
    if level is None or level.owner is None or level.owner() is not func:
        return None
    found: Level = level
    return found


def run_nest(
    outer: Level, args: tuple[Any, ...], kwargs: dict[str, Any], seeds: tuple[torch.Tensor, ...] = ()
) -> tuple[Any, Any]:
    """Run a nest of transforms.

    Args:
        outer: the outermost transform.
        args: the user's arguments.
        kwargs: the user's keyword arguments.
        seeds: tangents that the outermost level reads from ``Traced.seeds``.

    Returns:
        The result and the auxiliary output; ``(NO_NEST, None)`` when the caller has to go its usual way.
    """
    inner = level_of(outer.func)
    if inner is None or current_ledger() is not None:
        return NO_NEST, None
    levels = [inner, outer]
    while (inner := level_of(levels[0].func)) is not None:
        levels.insert(0, inner)
    if any(level.has_aux != outer.has_aux for level in levels):
        return NO_NEST, None
    return _run_whole(levels, args, kwargs, seeds)


def run_planned(
    level: Level, args: tuple[Any, ...], kwargs: dict[str, Any], seeds: tuple[torch.Tensor, ...] = ()
) -> tuple[Any, Any]:
    """Run a transform whose result is computed in several steps: as part of its nest, or as a nest of itself.

    Returns:
        The result and the auxiliary output.
    """
    found = run_nest(level, args, kwargs, seeds)
    if found[0] is NO_NEST and current_ledger() is None:
        found = _run_whole([level], args, kwargs, seeds)
    if found[0] is not NO_NEST:
        return found
    assert level.argnums is not None
    positions, single = resolve_argnums(level.argnums, len(args), level.name)
    traced = trace(level.func, args, positions, kwargs, level.name, has_aux=level.has_aux)
    traced.seeds = seeds
    return level.finish(traced, single), traced.aux


def run_level(level: Level, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Run a transform whose result is one request: as part of its nest, or alone.

    Returns:
        The result and the auxiliary output.
    """
    if level_of(level.func) is not None:
        found = run_nest(level, args, kwargs)
        if found[0] is not NO_NEST:
            return found
    assert level.argnums is not None
    positions, single = resolve_argnums(level.argnums, len(args), level.name)
    traced = trace(level.func, args, positions, kwargs, level.name, has_aux=level.has_aux, single=True)
    traced.alone = True
    return level.finish(traced, single), traced.aux


@dataclass(slots=True)
class _Run:
    """One run of the innermost function of a nest, and the nest's cached plan."""

    levels: Sequence[Level]
    wanted: Sequence[tuple[tuple[int, ...], bool]]
    traced: Traced
    key: Any
    cached: Any


def _run_innermost(
    levels: Sequence[Level], args: tuple[Any, ...], kwargs: dict[str, Any], seeds: tuple[torch.Tensor, ...]
) -> _Run | None:
    """Run the innermost function and look the plan up; None where the nest cannot run as a whole."""
    count = len(args)
    wanted = []
    checked: tuple[int, ...] = ()
    for level in reversed(levels):
        if level.argnums is None:
            positions, single = tuple(range(count)), False
        else:
            positions, single = resolve_argnums(level.argnums, count, level.name)
        if positions != checked:
            flatten_inputs(tuple([args[p] for p in positions]), level.name)
            checked = positions
        wanted.append((positions, single))
    wanted.reverse()
    union = wanted[0][0]
    if any(positions != union for positions, _ in wanted):
        union = tuple(sorted({p for positions, _ in wanted for p in positions}))
        if not all(isinstance(args[p], torch.Tensor) for p in union):
            return None
    first = levels[0]
    traced = trace(first.func, args, union, kwargs, first.name, has_aux=first.has_aux)
    tape = traced.tape
    if tape.saw_blocked and len(levels) > 1:
        # Under no_grad the levels may differ in what they count as constant.
        return None
    traced.in_leaves = [tape.values[slot] for slot in traced.in_slots]
    key: Any = _key_of(levels, wanted, traced, seeds)
    return _Run(levels, wanted, traced, *_cached(key, tape))


def _key_of(
    levels: Sequence[Level],
    wanted: Sequence[tuple[tuple[int, ...], bool]],
    traced: Traced,
    seeds: tuple[torch.Tensor, ...],
) -> Any:
    return traced.tape.signature(
        (
            tuple([(level.key, *place) for level, place in zip(levels, wanted, strict=True)]),
            structure_key(traced.in_spec),
            structure_key(traced.out_spec),
            tuple([
                (leaf.shape, leaf.dtype, leaf.device) if slot is None else slot
                for slot, leaf in zip(traced.out_slots, traced.out_leaves, strict=True)
            ]),
            tuple([(seed.shape, seed.dtype) for seed in seeds]),
            traced.grad_enabled,
        )
    )


def _cached(key: Any, tape: Tape) -> tuple[Any, Any]:
    """The key, None if it is none, and the plan for it."""
    try:
        cached: Any = engine.CACHE.get(key)
    except TypeError:
        key, cached = None, _BY_LEVELS
    if cached is None:
        note_numbers(tape)
        if not all(isinstance(value, torch.Tensor) for value in tape.values):
            cached = _BY_LEVELS
    return key, cached


def run_recorded(level: Level, traced: Traced) -> Any:
    """The result of a level on a run that is there already, by a cached program; the run's tape is left as it is.

    Args:
        level: the level; its function is not called.
        traced: the run, as the level sees it.
    """
    wanted = [(tuple(range(len(traced.in_slots))), False)]
    key: Any = None
    cached: Any = _BY_LEVELS
    if current_ledger() is None:
        key, cached = _cached(_key_of([level], wanted, traced, ()), traced.tape)
    if cached is not None and cached is not _BY_LEVELS:
        values = traced.tape.values
        found = cached.run(values, ())
        leaves = [values[source] if source is not None else found[number] for number, source in enumerate(cached.sources)]
        return tree_unflatten(leaves, cached.spec)
    forked = replace(traced, tape=traced.tape.fork())
    if cached is _BY_LEVELS:
        return _run_levels([level], wanted, forked, ())
    result, plan = _record_levels([level], wanted, forked, ())
    if key is not None:
        engine.CACHE.put(key, plan)
    return result


def _run_whole(
    levels: Sequence[Level], args: tuple[Any, ...], kwargs: dict[str, Any], seeds: tuple[torch.Tensor, ...]
) -> tuple[Any, Any]:
    """Run the innermost function once, and the levels by one cached program."""
    run = _run_innermost(levels, args, kwargs, seeds)
    if run is None:
        return NO_NEST, None
    traced, cached = run.traced, run.cached
    if cached is _BY_LEVELS:
        return _run_levels(levels, run.wanted, traced, seeds), traced.aux
    if cached is not None:
        values = traced.tape.values
        found = cached.run(values, seeds)
        leaves = [values[source] if source is not None else found[number] for number, source in enumerate(cached.sources)]
        return tree_unflatten(leaves, cached.spec), traced.aux
    result, plan = _record_levels(levels, run.wanted, traced, seeds)
    if run.key is not None:
        engine.CACHE.put(run.key, plan)
    return result, traced.aux


@dataclass(slots=True)
class Linearized:
    """The output of a function and the linear function that goes with it (its pullback or its pushforward).

    Attributes:
        leaves: the output's leaves.
        spec: their structure.
        active: which of them depend on the inputs.
        call: the linear function, from seeds to a tree.
        traced: the run.
        output: the output as the user gets it.
    """

    leaves: list[torch.Tensor]
    spec: TreeSpec
    active: list[int]
    call: Callable[[tuple[torch.Tensor, ...]], Any]
    traced: Traced
    output: Any


@dataclass
class LinearPlan(NestPlan):
    """The program of a nest under ``vjp`` or ``linearize``: the output first, then what depends on the seeds."""

    first: int = 0
    active: list[int] = field(default_factory=list)
    out_spec: Any = None

    def compile(self) -> None:
        """Make the two functions that replay the plan."""
        with engine.COMPILING:
            if self.recorded is not None:
                self.stages = compile_stages(*self.recorded, first=self.first)
                self.recorded = None


def run_linearized(
    outer: Level, args: tuple[Any, ...], kwargs: dict[str, Any], linear: Callable[[Traced], Linearized]
) -> Linearized | None:
    """Run a nest under ``vjp`` or ``linearize``: the innermost function once, what does not depend on the seeds once.

    Args:
        outer: the level of ``vjp`` or ``linearize``.
        args: the user's arguments.
        kwargs: the user's keyword arguments.
        linear: linearizes a run on its tape.

    Returns:
        The output and the linear function; None when there is no nest, or none that can be run as a whole.
    """
    inner = level_of(outer.func)
    if inner is None or current_ledger() is not None or torch._C._len_torch_dispatch_stack():
        return None
    levels = [inner, outer]
    while (inner := level_of(levels[0].func)) is not None:
        levels.insert(0, inner)
    if any(level.has_aux != outer.has_aux for level in levels):
        return None

    def finish(traced: Traced, single: bool) -> Any:
        found = linear(traced)
        if traced.made is None:
            return found
        leaves = traced.in_leaves if outer.name == "linearize" else [found.leaves[n] for n in found.active]
        with undispatched():
            seeds = [torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device) for leaf in leaves]
        traced.made.extend(seeds)
        return [*found.leaves], found.call(tuple(seeds)), found

    levels[-1] = Level(outer.func, outer.name, None, outer.has_aux, finish, outer.key)
    run = _run_innermost(levels, args, kwargs, ())
    if run is None:
        return None
    traced, plan = run.traced, run.cached
    if plan is None:
        made: list[torch.Tensor] = []
        result, plan = _record_levels(levels, run.wanted, traced, (), made)
        if run.key is not None:
            engine.CACHE.put(run.key, plan)
        if plan is _BY_LEVELS:
            found: Linearized = result[2]
            return found
    if plan is _BY_LEVELS:
        whole: Linearized = _run_levels(levels, run.wanted, traced, ())
        return whole
    return _replayed(plan, traced)


def _replayed(plan: LinearPlan, traced: Traced) -> Linearized:
    if plan.stages is None:
        plan.compile()
    assert plan.stages is not None
    # Of the values of the run only those stay that the plan reads: the run serves nothing else.
    stages = plan.stages
    needed = {key for key, slot in stages.source.program.inputs.items() if slot in stages.source.used} | {*plan.sources}
    values: list[Any] = [value if number in needed else None for number, value in enumerate(traced.tape.values)]
    traced.tape.values = []
    traced.tape.forget()
    prepared: dict[Any, tuple[Any, Any]] = {}

    def prepare() -> tuple[Any, Any]:
        key = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        found = prepared.get(key)
        if found is None:
            found = prepared[key] = stages.prepare(values)
            if (watch := current_watch()) is not None:
                watch.add_program(stages.memory(0, values, ()), kept=True)
        return found

    def call(seeds: tuple[torch.Tensor, ...]) -> Any:
        found = stages.apply(values, prepare()[1], seeds)
        if (watch := current_watch()) is not None:
            watch.add_program(stages.memory(1, values, seeds))
        later = plan.sources[plan.first :]
        leaves = [values[source] if source is not None else leaf for leaf, source in zip(found, later, strict=True)]
        return tree_unflatten(leaves, plan.spec)

    first = prepare()[0]
    leaves = [
        traced.release(values[source]) if source is not None else leaf
        for leaf, source in zip(first, plan.sources[: plan.first], strict=True)
    ]
    return Linearized(leaves, plan.out_spec, plan.active, call, traced, tree_unflatten(leaves, plan.out_spec))


def _run_levels(
    levels: Sequence[Level],
    wanted: Sequence[tuple[tuple[int, ...], bool]],
    traced: Traced,
    seeds: tuple[torch.Tensor, ...],
    made: list[torch.Tensor] | None = None,
) -> Any:
    """The levels one after the other on the tape of the innermost run; all but the last are recorded on it."""
    tape = traced.tape
    union = wanted[0][0]
    if any(positions != union for positions, _ in wanted):
        union = tuple(sorted({p for positions, _ in wanted for p in positions}))
    whole, last = traced, len(levels) - 1
    result: Any = None
    for number, (level, (positions, single)) in enumerate(zip(levels, wanted, strict=True)):
        if number:
            leaves, spec = flatten_outputs(result, level.name, level.func)
            slots = [active_slot(tape, leaf) for leaf in leaves]
        else:
            leaves, spec, slots = whole.out_leaves, whole.out_spec, whole.out_slots
        here = _restricted(whole, union, positions, leaves, spec, slots)
        if number == last:
            here.seeds = seeds
            here.made = made
            here.grad_enabled = whole.grad_enabled
            result = level.finish(here, single)
            break
        torch._C._set_grad_enabled(True)
        try:
            with BelowAutograd(), tape:
                result = level.finish(here, single)
        finally:
            torch._C._set_grad_enabled(whole.grad_enabled)
    return result


def _restricted(
    whole: Traced, union: tuple[int, ...], positions: tuple[int, ...], leaves: list[Any], spec: TreeSpec, slots: list[int | None]
) -> Traced:
    """The run as one level sees it: its own inputs, and the outputs of the level inside it."""
    in_leaves, in_slots, in_spec = whole.in_leaves, whole.in_slots, whole.in_spec
    if positions != union:
        places = [union.index(p) for p in positions]
        in_leaves, in_slots = [in_leaves[p] for p in places], [in_slots[p] for p in places]
        in_spec = tree_flatten(tuple(in_leaves))[1]
    columns = [None] * len(in_slots)
    return Traced(whole.tape, in_leaves, in_spec, in_slots, leaves, spec, slots, None, True, columns)  # type: ignore[arg-type]


def _record_levels(
    levels: Sequence[Level],
    wanted: Sequence[tuple[tuple[int, ...], bool]],
    traced: Traced,
    seeds: tuple[torch.Tensor, ...],
    made: list[torch.Tensor] | None = None,
) -> tuple[Any, Any]:
    """Run the levels and write down what they compute as one program."""
    tape = traced.tape
    slots = {id(value): slot for slot, value in enumerate(tape.values)}
    numbers = {id(seed): number for number, seed in enumerate(seeds)}

    def find(program: Program, tensor: torch.Tensor) -> Staged | None:
        slot = slots.get(id(tensor))
        if slot is not None:
            return program.input(slot, tensor)
        number = numbers.get(id(tensor))
        if number is None and made:
            number = next((n for n, seed in enumerate(made) if seed is tensor), None)
        return None if number is None else program.input(("seed", number), tensor)

    recorder = Recorder(find)
    with recorder, collecting(UNCACHED):
        tape.settle()
        result = _run_levels(levels, wanted, traced, seeds, made)
    linear: Linearized | None = None
    if made is not None:
        outputs, pulled, linear = result
        later, spec = tree_flatten(pulled)
        leaves = [*outputs, *later]
    else:
        leaves, spec = tree_flatten(result)
    sources: list[int | None] = [slots.get(id(leaf)) for leaf in leaves]
    staged = [None if source is not None else recorder.staged(leaf) for leaf, source in zip(leaves, sources, strict=True)]
    whole = all(s is not None or source is not None for s, source in zip(staged, sources, strict=True))
    program = recorder.program
    program._input_values.clear()  # a cycle that would hold the tensors of this run
    if not (recorder.pure and whole) or (linear is not None and program.writes):
        return result, _BY_LEVELS
    bare = [None if s is None else Staged(program, s.slot, None) for s in staged]  # type: ignore[arg-type]
    keys = list(range(len(leaves)))
    if linear is not None:
        first = len(linear.leaves)
        plan: NestPlan = LinearPlan(keys, (program, bare), first=first, active=linear.active, out_spec=linear.spec)
    else:
        plan = NestPlan(keys, (program, bare))
    plan.spec, plan.sources = spec, sources
    return result, plan
