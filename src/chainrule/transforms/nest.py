"""Nests of derivative transforms as a whole: ``jacfwd(jacrev(f))`` and its like run ``f`` once, on one tape.

Each derivative transform leaves a `Level` on the function it returns. A transform that finds one on the function that it
is given does not run that function: it runs the innermost one on a tape, and the levels one after the other on that tape.
The first time, what the levels compute is recorded as one program; later calls of the same signature replay it, whatever
the depth of the nest.

``vmap`` leaves a `Mapping` on what it makes of such a function. The levels inside of it then have a tape of their own, with the
values of a sample, and those outside one with the stored values: both come from one run, and the program is one all the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.autograd import forward_ad

from chainrule.batching.duals import refuse_duals
from chainrule.capture.whole_recorder import rehearsed
from chainrule.dispatch import functions_are_replaced
from chainrule.execute import engine
from chainrule.execute.accounts import SWEPT, collecting, current_ledger
from chainrule.execute.replay import Spent
from chainrule.execute.sweeps import Seen, is_long
from chainrule.maps.first_run import LongRecordError
from chainrule.transforms.arguments import resolve_argnums, tree_unflatten
from chainrule.transforms.levels import Chain, Level, Part, Run, chain_of, mark_of
from chainrule.transforms.nest_parts import run_parts
from chainrule.transforms.nest_records import recorded_within
from chainrule.transforms.nest_routes import given_key, nest_route, shared_route
from chainrule.transforms.nest_runs import BY_LEVELS, cached_for, nest_key, run_innermost, run_of
from chainrule.transforms.routes import run_route
from chainrule.transforms.trace import Traced, trace

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
        route = nest_route(chain, count=len(args), given=given_key(seeds, args))
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
        key, cached = cached_for(nest_key([level], wanted, traced, ()), [traced.tape])
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
                result, cached = recorded_within(run, seeds)
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
        values = given_away(run)
    found = cached.run(values, seeds)
    leaves = [found[number] if source is None else leaves[number] for number, source in enumerate(cached.sources)]
    return tree_unflatten(leaves, cached.spec)


def given_away(run: Run) -> Spent:
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
