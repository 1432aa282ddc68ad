"""Nests of transforms under ``vjp`` and ``linearize``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from chainrule.batching.duals import refuse_duals
from chainrule.capture.tape import Tape
from chainrule.dispatch import functions_are_replaced, undispatched
from chainrule.execute import engine
from chainrule.execute.accounts import current_ledger
from chainrule.execute.memory import current_watch
from chainrule.execute.sweeps import Seen
from chainrule.transforms.arguments import (
    tree_unflatten,
)
from chainrule.transforms.levels import (
    Level,
    Linearized,
    LinearPlan,
    chain_of,
)  # fmt: skip
from chainrule.transforms.nest import swept
from chainrule.transforms.nest_parts import run_parts
from chainrule.transforms.nest_records import record_parts
from chainrule.transforms.nest_routes import nest_route, shared_route
from chainrule.transforms.nest_runs import BY_LEVELS, run_innermost, run_of
from chainrule.transforms.routes import LINEARIZED, run_linearized_route
from chainrule.transforms.trace import Traced


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
    if current_ledger() is not None or torch._C._len_torch_dispatch_stack() or functions_are_replaced():
        return None
    run, chain = None, None
    route, inner = shared_route(outer.func, outer.name, LINEARIZED) if len(args) == 1 and not outer.has_aux else (None, None)
    if route is None:
        if (chain := chain_of(outer)) is None:
            return None
        route = nest_route(chain, count=len(args), kind=LINEARIZED)
        inner = None if route is None else route.function
    if route is not None and inner is not None:
        traced, linear_plan = run_linearized_route(route, args, kwargs, inner)
        if linear_plan.__class__ is LinearPlan:
            return _replayed(linear_plan, traced.tape.values, traced, [traced.tape])
        if (chain := chain or chain_of(outer)) is None or (traced is not None and (run := run_of(chain, traced)) is None):
            return None
    assert chain is not None

    def finish(traced: Traced, single: bool) -> Any:
        found = linear(traced)
        if traced.made is None:
            return found
        leaves = traced.in_leaves if outer.name == "linearize" else [found.leaves[n] for n in found.active]
        with undispatched():
            seeds = [torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device) for leaf in leaves]
        traced.made.extend(seeds)
        return [*found.leaves], found.call(tuple(seeds)), found

    chain.levels[-1][-1] = Level(outer.func, outer.name, None, outer.has_aux, finish, outer.key)
    if run is None and (run := run_innermost(chain, args, kwargs, ())) is None:
        return None
    plan = run.cached
    if plan is None or plan.__class__ is Seen:
        if (soon := swept(run, ())) is not None:
            first: Linearized = soon
            return first
        made: list[torch.Tensor] = []
        result, plan = record_parts(run, (), made)
        if run.key is not None:
            engine.CACHE.put(run.key, plan)
        if plan is BY_LEVELS:
            found: Linearized = result[2]
            return found
    if plan is BY_LEVELS:
        whole: Linearized = run_parts(run.parts, ())
        return whole
    values, run.values = run.values, []
    return _replayed(plan, values, run.traced, [part.traced.tape for part in run.parts])


def _replayed(plan: LinearPlan, found: list[Any], traced: Traced, tapes: Sequence[Tape]) -> Linearized:
    """The output and the linear function of a run, whose values and tapes are given, by its plan."""
    if plan.stages is None:
        plan.compile()
    assert plan.stages is not None
    # Of the values of the run only those stay that the plan reads: the run serves nothing else.
    stages = plan.stages
    values: list[Any] = [None] * len(found)
    for slot in plan.kept:
        values[slot] = found[slot]
    if (watch := current_watch()) is not None:
        watch.let_go(found, {id(value) for value in values if value is not None})
    for tape in tapes:
        tape.values = []
        tape.forget()
    found.clear()
    prepared: dict[Any, tuple[Any, Any]] = {}

    def prepare() -> tuple[Any, Any]:
        key = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        found = prepared.get(key)
        if found is None:
            found = prepared[key] = stages.prepare(values)
            if (watch := current_watch()) is not None:
                watch.add_program(memory := stages.memory(0, values, ()))
                watch.add_results([*found[0], *found[1]], memory)
        return found

    def call(seeds: tuple[torch.Tensor, ...]) -> Any:
        if forward_ad._current_level >= 0:
            refuse_duals(seeds, "a linear function")
        found = stages.apply(values, prepare()[1], seeds)
        if (watch := current_watch()) is not None:
            watch.add_program(memory := stages.memory(1, values, seeds))
            watch.add_results(found, memory)
        later = plan.sources[plan.first :]
        leaves = [values[source] if source is not None else leaf for leaf, source in zip(found, later, strict=True)]
        return tree_unflatten(leaves, plan.spec)

    first = prepare()[0]
    leaves = [
        traced.release(values[source]) if source is not None else leaf
        for leaf, source in zip(first, plan.sources[: plan.first], strict=True)
    ]
    return Linearized(leaves, plan.out_spec, plan.active, call, traced, tree_unflatten(leaves, plan.out_spec))
