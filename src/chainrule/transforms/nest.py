"""Nests of derivative transforms as a whole: ``jacfwd(jacrev(f))`` and its like run ``f`` once, on one tape.

Each derivative transform leaves a `Level` on the function it returns. A transform that finds one on the function that it
is given does not run that function: it runs the innermost one on a tape, and the levels one after the other on that tape.
The first time, what the levels compute is recorded as one program; later calls of the same signature replay it, whatever
the depth of the nest.

``vmap`` leaves a `Mapping` on what it makes of such a function. The levels inside of it then have a tape of their own, with the
values of a sample, and those outside one with the stored values: both come from one run, and the program is one all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.autograd import forward_ad

from chainrule.batching.duals import refuse_duals
from chainrule.batching.mode import VmapMode
from chainrule.batching.tensor import BatchTensor
from chainrule.capture.numbers import note_numbers
from chainrule.capture.recorder import Recorder, rehearsed
from chainrule.capture.tape import Tape
from chainrule.dispatch import entry_point, functions_are_replaced
from chainrule.execute import engine
from chainrule.execute.accounts import SWEPT, UNCACHED, collecting, current_ledger
from chainrule.execute.collection import postponed_collection
from chainrule.execute.engine import CachedPlan
from chainrule.execute.replay import Spent, part_constants
from chainrule.execute.sweeps import Seen, is_long
from chainrule.maps.first_run import LongRecordError, without_long_records
from chainrule.maps.staging import Program, Staged
from chainrule.shortcuts import FLOATING
from chainrule.transforms.arguments import (
    LEAF,
    PLAIN_ARGUMENT,
    flatten_inputs,
    resolve_argnums,
    structure_key,
    tree_flatten,
    tree_unflatten,
)
from chainrule.transforms.levels import (
    Chain,
    Level,
    Linearized,
    LinearPlan,
    NestPlan,
    Part,
    Run,
    agree,
    chain_of,
    is_apart,
    mark_of,
    note_apart,
)  # fmt: skip
from chainrule.transforms.nest_parts import run_parts
from chainrule.transforms.routes import NEST, Route, route_of, run_route
from chainrule.transforms.trace import PLAIN_CLASSES, Traced, trace
from chainrule.transforms.vmap import Mapping

#: In place of a plan: this nest is run level by level.
BY_LEVELS = CachedPlan([], None)

#: What :func:`run_nest` returns when there is no nest, or none that can be run as a whole.
NO_NEST = object()


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
    if (found := _routed(outer, args, kwargs, seeds)) is not NotImplemented:
        return found, None
    return _run_nest(outer, args, kwargs, seeds)


def _run_nest(
    outer: Level, args: tuple[Any, ...], kwargs: dict[str, Any], seeds: tuple[torch.Tensor, ...]
) -> tuple[Any, Any]:
    if current_ledger() is not None or functions_are_replaced() or (chain := chain_of(outer)) is None:
        return NO_NEST, None
    return _run_whole(chain, args, kwargs, seeds)


def _routed(
    outer: Level, args: tuple[Any, ...], kwargs: dict[str, Any], seeds: tuple[torch.Tensor, ...], *, alone: bool = False
) -> Any:
    """The result of a nest by its route; NotImplemented, with nothing done, where it has none or this call does not fit.

    It is NO_NEST where a run has shown that the levels have to be run one by one. With ``alone``, a transform of a plain function
    is a nest of itself.
    """
    route = None if seeds else outer.route
    if route is False:
        return NotImplemented
    chain = None
    if route is None:
        chain = chain_of(outer)
        if chain is None and alone and mark_of(outer.func) is None:
            chain = Chain([[outer]], [], outer.has_aux)
        route = nest_route(chain, count=len(args), given=_given(seeds, args))
        if outer.argnums is not None and not seeds:
            outer.route = route or False
        if route is None:
            return NotImplemented
    traced, result, _ = run_route(route, args, kwargs, seeds)
    if traced is None or traced is NotImplemented:
        return result if traced is None else traced
    if chain is None:
        chain = chain_of(outer) or Chain([[outer]], [], outer.has_aux)
    run = run_of(chain, traced, seeds)
    return NO_NEST if run is None else finish_run(run, seeds, last=True)


def nest_route(
    chain: Chain | None, dims: Any = None, *, count: int | None = None, given: Any = (), kind: int = NEST
) -> Route | None:
    """The route of a nest without mappings inside, whose levels all differentiate one argument; with ``dims`` in a vmap.

    Args:
        chain: the nest.
        dims: the dimensions that the arguments are mapped over.
        count: how many arguments there are, where levels may differentiate all of them; the route is for so many.
        given: what the key of a plan says of tangents that the outermost level reads.
        kind: the kind of route.
    """
    if chain is None or len(chain.levels) > 1 or chain.has_aux is not False:
        return None
    levels = chain.levels[0]
    number = 0 if levels[0].argnums is None else levels[0].argnums
    for level in levels:
        if level.argnums.__class__ is not int if level.argnums is not None else count != 1:
            return None
        if level.argnums is not None and level.argnums != number:
            return None
    places = tuple([(level.key, (number,), level.argnums is not None) for level in levels])

    def extra(slot: int, grad_enabled: bool) -> Any:
        return (places, *_PLAIN_KEYS, (slot,), given, grad_enabled, False)

    respects = len(levels) > 1 or levels[0].respect_no_grad
    return route_of(levels[0].func, levels[0].name, number, kind, extra, respect_no_grad=respects, dims=dims)


#: What a key says of one seed that is as the argument.
_ALIKE = "alike"


def _given(seeds: Sequence[torch.Tensor], leaves: Sequence[Any]) -> Any:
    """What a key says of seeds."""
    if len(seeds) == len(leaves) == 1 and isinstance(leaves[0], torch.Tensor):
        if seeds[0].shape == leaves[0].shape and seeds[0].dtype == leaves[0].dtype:
            return _ALIKE
    return tuple([(seed.shape, seed.dtype) for seed in seeds])


#: Routes of two levels of any plain function of one tensor.
_SHARED: dict[Any, Route | None] = {}


def shared_route(func: Callable[..., Any], outer: str, kind: int = NEST) -> tuple[Route | None, Callable[..., Any] | None]:
    """The route of a transform of all arguments over one level of a plain function, which the route does not know.

    It is for one argument, with a seed like it where the kind is a nest's.

    Args:
        func: the function that is transformed.
        outer: the key of the transform.
        kind: the kind of route.

    Returns:
        The route and the innermost function; None for both where there is none.
    """
    level = mark_of(func)
    if level.__class__ is not Level or level.has_aux or level.argnums.__class__ is not int or level.argnums:
        return None, None
    inner = level.func
    if mark_of(inner) is not None or is_apart(inner):
        return None, None
    key = level.name, level.key, outer, kind
    if key not in _SHARED:
        given = _ALIKE if kind == NEST else ()
        chain = Chain([[level, Level(func, outer, None, False, level.finish, (outer,))]], [], False)
        route = nest_route(chain, count=1, given=given, kind=kind)
        if len(_SHARED) >= _MOST_SHARED:
            _SHARED.clear()
        _SHARED[key] = None if route is None else route._replace(function=None)
    return _SHARED[key], inner


#: So many of them are kept.
_MOST_SHARED = 256


def run_pushed_nest(
    outer: Level, args: tuple[Any, ...], kwargs: dict[str, Any], seeds: tuple[torch.Tensor, ...]
) -> Any:
    """The result of a nest whose outermost level pushes one tangent through a level of a plain function.

    NotImplemented, with nothing done, where it is another nest, or one that cannot run as a whole.
    """
    route, inner = shared_route(outer.func, outer.key[0])
    if route is None:
        return NotImplemented
    traced, result, _ = run_route(route, args, kwargs, seeds, inner)
    if traced is None or traced is NotImplemented:
        return result if traced is None else traced
    chain = chain_of(outer)
    run = None if chain is None else run_of(chain, traced, seeds)
    return NotImplemented if run is None else finish_run(run, seeds, last=True)

def run_of(chain: Chain, traced: Traced, seeds: tuple[torch.Tensor, ...] = ()) -> Run | None:
    """A run by the route of a nest, as it goes on; None where it cannot run as a whole."""
    levels = chain.levels[0]
    if len(levels) > 1 and (traced.tape.hooks or not agree(levels, traced.tape)):
        note_apart(levels)
        return None
    traced.in_leaves = [traced.tape.values[slot] for slot in traced.in_slots]
    number: Any = 0 if levels[0].argnums is None else levels[0].argnums
    wanted = [((number,), level.argnums is not None) for level in levels]
    key, cached = key_and_plan(levels, wanted, traced, seeds)
    return Run([Part(levels, wanted, traced)], traced.tape.values, key, cached)


def key_and_plan(
    levels: Sequence[Level], wanted: Sequence[tuple[tuple[int, ...], bool]], traced: Traced, seeds: tuple[torch.Tensor, ...] = ()
) -> tuple[Any, Any]:
    """The key of the plan for some levels on a run, None if it is none, and the plan."""
    return _cached(_key_of(levels, wanted, traced, seeds), [traced.tape])


def run_planned(
    level: Level, args: tuple[Any, ...], kwargs: dict[str, Any], seeds: tuple[torch.Tensor, ...] = ()
) -> tuple[Any, Any]:
    """Run a transform whose result is computed in several steps: as part of its nest, or as a nest of itself.

    Returns:
        The result and the auxiliary output.
    """
    found = _routed(level, args, kwargs, seeds, alone=True), None
    if found[0] is NotImplemented:
        found = _run_nest(level, args, kwargs, seeds)
    if found[0] is NO_NEST and current_ledger() is None and not functions_are_replaced():
        found = _run_whole(Chain([[level]], [], level.has_aux), args, kwargs, seeds)
    if found[0] is not NO_NEST:
        return found
    assert level.argnums is not None
    positions, single = resolve_argnums(level.argnums, len(args), level.name)
    traced = trace(
        level.func, args, positions, kwargs, level.name, has_aux=level.has_aux, respect_no_grad=level.respect_no_grad
    )
    traced.seeds = seeds
    return level.finish(traced, single), traced.aux


def run_level(level: Level, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Run a transform whose result is one request: as part of its nest, or alone.

    Returns:
        The result and the auxiliary output.
    """
    if mark_of(level.func) is not None:
        found = run_nest(level, args, kwargs)
        if found[0] is not NO_NEST:
            return found
    assert level.argnums is not None
    positions, single = resolve_argnums(level.argnums, len(args), level.name)
    traced = trace(level.func, args, positions, kwargs, level.name, has_aux=level.has_aux, single=True)
    traced.alone = True
    return level.finish(traced, single), traced.aux


#: What stands for the structures of one tensor as the argument and of one as the output in a key.
_PLAIN_KEYS = structure_key(PLAIN_ARGUMENT), structure_key(LEAF)


class _NotWhole(Exception):  # noqa: N818 - never leaves this module
    """This nest cannot run as a whole."""


def run_innermost(
    chain: Chain, args: tuple[Any, ...], kwargs: dict[str, Any], seeds: tuple[torch.Tensor, ...] = (), *, owned: bool = False
) -> Run | None:
    """Run the innermost function and look the plan up; None where the nest cannot run as a whole.

    With ``owned``, mapped tensors among the arguments were made for this run.
    """
    parts: list[Part] = []
    try:
        _run_part(chain, len(chain.levels) - 1, args, kwargs, (), parts, owned=owned)
    except _NotWhole:
        return None
    keys: list[Any] = [_key_of(part.levels, part.wanted, part.traced, seeds) for part in parts]
    values = parts[-1].traced.tape.values
    if len(parts) > 1:
        values, wiring = _stored_values(parts)
        keys.append(wiring)
    return Run(parts, values, *_cached(keys[0] if len(keys) == 1 else tuple(keys), [part.traced.tape for part in parts]))


def _run_part(
    chain: Chain, number: int, args: tuple[Any, ...], kwargs: dict[str, Any], around: Sequence[Any], parts: list[Part], *,
    owned: bool = False,
) -> None:
    """Run the function of a part, which runs the parts inside of it, and append all of them."""
    levels = chain.levels[number]
    wanted, union = _positions(levels, args)
    func, first, has_aux = levels[0].func, levels[0], levels[0].has_aux
    if number:
        func = entry_point(lambda *args, **kwargs: _run_mapped(chain, number - 1, args, kwargs, parts))
    several = len(levels) > 1 or len(chain.levels) > 1
    traced = trace(
        func, args, union, kwargs, first.name, has_aux=has_aux, respect_no_grad=several or first.respect_no_grad, owned=owned
    )
    if traced.hidden or (several and (traced.tape.hooks or not agree([n for part in chain.levels for n in part], traced.tape))):
        # Hooks are those of the innermost level alone.
        note_apart(chain.levels[0])
        raise _NotWhole
    traced.in_leaves = [traced.tape.values[slot] for slot in traced.in_slots]
    parts.append(Part(levels, wanted, traced, around))


def _positions(levels: Sequence[Level], args: tuple[Any, ...]) -> tuple[list[tuple[tuple[int, ...], bool]], tuple[int, ...]]:
    """For each level the positions of what it differentiates, and whether that is one; and all of these positions."""
    count = len(args)
    number = levels[0].argnums
    if number is None and count == 1:
        number = 0
    if number.__class__ is int and 0 <= number < count:  # type: ignore[operator]
        # One tensor, the same for all levels.
        arg, argnums = args[number], [level.argnums for level in levels]  # type: ignore[index]
        if arg.__class__ in PLAIN_CLASSES and arg.dtype in FLOATING:
            if all([n.__class__ is int and n == number or n is None and count == 1 for n in argnums]):
                chosen: tuple[int, ...] = (number,)  # type: ignore[assignment]
                return [(chosen, n is not None) for n in argnums], chosen
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
            raise _NotWhole
    return wanted, union


def _run_mapped(
    chain: Chain, number: int, args: tuple[Any, ...], kwargs: dict[str, Any], parts: list[Part]
) -> list[torch.Tensor]:
    """Run a part inside of the mappings that lead to it; returns the stored outputs of its function."""
    around: list[tuple[Mapping, VmapMode]] = []

    def enter(mappings: list[Mapping], args: tuple[Any, ...]) -> None:
        if not mappings:
            _run_part(chain, number, args, kwargs, around, parts)
            return
        _, mode = mappings[0].enter(lambda *mapped: enter(mappings[1:], mapped), args)
        around.insert(0, (mappings[0], mode))
        if not mode.size:
            raise _NotWhole

    enter(chain.mappings[number], args)
    return [_stored(leaf, around)[0] for leaf in parts[-1].traced.out_leaves]


def _stored(tensor: Any, around: Sequence[tuple[Mapping, VmapMode]]) -> tuple[Any, tuple[bool, ...]]:
    """The tensor behind one of some mappings, and for each of their levels on the way to it whether it is batched there."""
    flags: list[bool] = []
    while tensor.__class__ is BatchTensor and any(tensor.level is mode for _, mode in around):
        flags.append(tensor.batched)
        tensor = tensor.value
    return tensor, tuple(flags)


def _stored_values(parts: Sequence[Part]) -> tuple[list[Any], Any]:
    """All stored values of the tapes of some parts, each once, and how the tapes are made of them."""
    values = [*parts[-1].traced.tape.values]
    known = {id(value): number for number, value in enumerate(values)}
    wiring: list[Any] = []
    around: list[tuple[Mapping, VmapMode]] = []
    for part in reversed(parts[:-1]):
        around.extend(part.around)
        for mapping, mode in part.around:
            dims, spec = tree_flatten(mapping.out_dims)
            wiring.append((mode.size, tuple(dims), structure_key(spec)))
        for value in part.traced.tape.values:
            tensor, flags = _stored(value, around)
            number = known.get(id(tensor))
            if number is not None:
                wiring.append((number, flags))
                continue
            known[id(tensor)] = len(values)
            values.append(tensor)
            wiring.append((flags, tensor.shape, tensor.dtype, tensor.device) if isinstance(tensor, torch.Tensor) else None)
    return values, tuple(wiring)


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
            _given(seeds, traced.in_leaves),
            traced.grad_enabled,
            # Steps that one level takes for constants look like constants for all of them, which another run may have.
            traced.tape.saw_blocked,
        )
    )


def _cached(key: Any, tapes: Sequence[Tape]) -> tuple[Any, Any]:
    """The key, None if it is none, and the plan for it."""
    try:
        cached: Any = engine.CACHE.get(key)
    except TypeError:
        key, cached = None, BY_LEVELS
    if cached is None:
        for tape in tapes:
            note_numbers(tape)
        if not all(isinstance(value, torch.Tensor) for tape in tapes for value in tape.values):
            cached = BY_LEVELS
    return key, cached


def run_recorded(level: Level, traced: Traced) -> Any:
    """The result of a level on a run that is there already, by a cached program; the run's tape is left as it is.

    Args:
        level: the level; its function is not called.
        traced: the run, as the level sees it.
    """
    wanted = [(tuple(range(len(traced.in_slots))), False)]
    key: Any = None
    cached: Any = BY_LEVELS
    if current_ledger() is None:
        key, cached = _cached(_key_of([level], wanted, traced, ()), [traced.tape])
    values = traced.tape.values
    if cached is None or cached is BY_LEVELS or cached.__class__ is Seen:
        traced = replace(traced, tape=traced.tape.fork())
        values = traced.tape.values
    return finish_run(Run([Part([level], wanted, traced)], values, key, cached))


def _run_whole(
    chain: Chain, args: tuple[Any, ...], kwargs: dict[str, Any], seeds: tuple[torch.Tensor, ...]
) -> tuple[Any, Any]:
    """Run the innermost function once, and the levels by one cached program."""
    run = run_innermost(chain, args, kwargs, seeds)
    if run is None:
        return NO_NEST, None
    return finish_run(run, seeds, last=True), run.traced.aux


def finish_run(run: Run, seeds: tuple[torch.Tensor, ...] = (), *, last: bool = False) -> Any:
    """The result of a nest, by its cached program; the last use of a run may let go of its values."""
    if forward_ad._current_level >= 0:
        refuse_duals(seeds, run.parts[-1].levels[-1].name)
    values, cached = run.values, run.cached
    if cached is None and _is_apart(run):
        cached = BY_LEVELS
        if run.key is not None:
            engine.CACHE.put(run.key, cached)
    if cached is BY_LEVELS:
        return run_parts(run.parts, seeds)
    if cached is None or cached.__class__ is Seen:
        if (soon := swept(run, seeds)) is not None:
            return soon
        try:
            with rehearsed() as recorder:
                result, cached = _recorded_within(run, seeds)
        except LongRecordError:
            engine.CACHE.put(run.key, BY_LEVELS)
            return run_parts(run.parts, seeds)
        if run.key is not None:
            engine.CACHE.put(run.key, cached)
        if cached is BY_LEVELS or recorder is None:
            return result
        cached.compile_for(recorder)
        last = False
    leaves = [None if source is None else values[source] for source in cached.sources]
    if last:
        values = _given_away(run)
    found = cached.run(values, seeds)
    leaves = [found[number] if source is None else leaves[number] for number, source in enumerate(cached.sources)]
    return tree_unflatten(leaves, cached.spec)


def _given_away(run: Run) -> Spent:
    """The values of a run, which nothing but the program that is given them holds any more."""
    values = Spent(run.values)
    run.values = []
    for part in run.parts:
        part.traced.tape.values = []
        part.traced.tape.forget()
        part.traced.in_leaves, part.traced.out_leaves = [], []
    return values


#: The kinds of levels whose results are requests that a sweep can serve.
_SWEEPABLE = frozenset({"grad", "grad_and_value", "vjp", "jvp", "linearize", "jacobian"})


def swept(run: Run, seeds: tuple[torch.Tensor, ...]) -> Any:
    """The result of one of the first runs of a nest on a long tape, level by level; None where a plan is to be made."""
    part = run.parts[0]
    if len(run.parts) > 1 or not is_long(part.traced.tape.records, len(part.levels)):
        return None
    if not all(level.key[0] in _SWEEPABLE for level in part.levels):
        return None

    def sweep() -> Any:
        # What the levels record must not stand on the tape if the nest is planned after all.
        here = replace(part, traced=replace(part.traced, tape=part.traced.tape.fork()))
        with collecting(SWEPT):
            return run_parts([here], seeds)

    return engine.first_runs(run.key, run.cached, sweep, len(part.levels))


def _is_apart(run: Run) -> bool:
    """Whether the innermost level has to run by itself."""
    part = run.parts[0]
    level, (positions, _) = part.levels[0], part.wanted[0]
    if level.apart is None or len(run.parts) > 1 or any(other != positions for other, _ in part.wanted):
        return False
    return level.apart(part.traced)


def _distinct(seeds: tuple[torch.Tensor, ...], taken: Collection[int]) -> tuple[torch.Tensor, ...]:
    """Seeds each of which is an object of its own, by which a program that others will serve tells it from the rest."""
    known = set(taken)
    found = []
    for seed in seeds:
        one = torch.ops.aten.alias.default(seed) if id(seed) in known else seed
        known.add(id(one))
        found.append(one)
    return tuple(found)


def _recorded_within(run: Run, seeds: tuple[torch.Tensor, ...]) -> tuple[Any, Any]:
    """As :func:`record_parts`, where the record of all levels does not have to be long.

    A record holds every value until it is complete. The plan of a large Jacobian that stands alone is made without running it.

    Raises:
        LongRecordError: if it would be long, and its last level can do without.
    """
    part = run.parts[0]
    alone = len(run.parts) == 1 and run.key is not None and not seeds and len(part.levels) > 1
    if not alone or part.levels[-1].key[0] != "jacobian" or torch._C._len_torch_dispatch_stack():
        return record_parts(run, seeds)
    # What the levels record must not stand on the tape if they are run one by one after all.
    here = replace(part, traced=replace(part.traced, tape=part.traced.tape.fork()))
    with without_long_records():
        return record_parts(replace(run, parts=[here]), seeds)


def record_parts(
    run: Run, seeds: tuple[torch.Tensor, ...], made: list[torch.Tensor] | None = None
) -> tuple[Any, Any]:
    """Run the levels and write down what they compute as one program."""
    slots = {id(value): slot for slot, value in enumerate(run.values)}
    seeds = _distinct(seeds, slots)
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
    with postponed_collection(), recorder, collecting(UNCACHED):
        run.traced.tape.settle()
        result = run_parts(run.parts, seeds, made)
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
        return result, BY_LEVELS
    part_constants(program, leaves)
    bare = [None if s is None else Staged(program, s.slot, None) for s in staged]  # type: ignore[arg-type]
    keys = list(range(len(leaves)))
    if linear is not None:
        first = len(linear.leaves)
        plan: NestPlan = LinearPlan(keys, (program, bare), first=first, active=linear.active, out_spec=linear.spec)
    else:
        plan = NestPlan(keys, (program, bare))
    plan.spec, plan.sources = spec, sources
    return result, plan
