"""``vmap`` of a derivative transform as a whole: ``vmap(jacobian(f))`` looks one plan up and replays it outside of the level.

The function runs once, under the vmap and one tape. What the transforms compute then is a program on the stored tensors, whose
batch dimension is the first: it is replayed without the vmap, and its results are those of the call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from chainrule.batching.mode import VmapMode
from chainrule.batching.tensor import BatchTensor
from chainrule.dispatch import unasked
from chainrule.execute.accounts import current_ledger
from chainrule.execute.batched import wrap
from chainrule.transforms.arguments import tree_unflatten
from chainrule.transforms.graphs import with_graph
from chainrule.transforms.levels import Chain, Level, NestPlan, Run, agree, chain_of, is_apart, mark_of, note_apart
from chainrule.transforms.nest import finish_run, given_away
from chainrule.transforms.nest_routes import nest_route
from chainrule.transforms.nest_runs import run_innermost, run_of
from chainrule.transforms.routes import run_route
from chainrule.transforms.vmap import Mapping


def run_mapped(mapping: Mapping, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a vmap of a derivative transform returns.

    Args:
        mapping: the vmap.
        args: the user's arguments, some of which are mapped.
        kwargs: the user's keyword arguments, which are not.

    Returns:
        The result; NotImplemented, with nothing done, where the vmap has to go its usual way.
    """
    if (found := mapping.route) is None:
        found = mapping.route = _route_of(mapping)
    if found is not False and not found[1].by_itself:
        route, level, chain = found
        traced, result, mode = run_route(route, args, kwargs)
        if traced is None:
            return result
        if traced is not NotImplemented:
            return _in_graph(_finished(run_of(chain, traced), mapping, mode, level), level, args)
    level = mark_of(mapping.func)
    if level.__class__ is not Level or level.has_aux or level.by_itself or mapping.out_dims.__class__ is not int:
        return NotImplemented
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() or forward_ad._current_level >= 0:
        return NotImplemented
    if current_ledger() is not None:
        return NotImplemented
    chain = _chain(level)
    if chain is None:
        return NotImplemented
    entered = mapping.enter_plain(lambda mapped: run_innermost(chain, mapped, kwargs, owned=True), args)
    if entered is None:
        return NotImplemented
    return _in_graph(_finished(entered[0], mapping, entered[1], level), level, args)


def _in_graph(result: Any, level: Level, args: tuple[Any, ...]) -> Any:
    """The results of a level with the graph of what was differentiated; the values beside the derivatives have their own."""
    if result is NotImplemented:
        return result
    if level.key[0] == "grad_and_value" or level.key[1:] == (True,):
        return with_graph(result[0], args, level.argnums), result[1]
    return with_graph(result, args, level.argnums)


def _route_of(mapping: Mapping) -> Any:
    """The route of a vmap of a derivative transform, with its level and its nest; False where it has none."""
    level, dims = mark_of(mapping.func), mapping.in_dims
    if level.__class__ is not Level or level.has_aux or mapping.out_dims.__class__ is not int or mapping.out_dims != 0:
        return False
    if mapping.randomness != "error":
        return False
    if not all([dim is None or dim.__class__ is int for dim in (dims if dims.__class__ is tuple else (dims,))]):
        return False
    chain = _chain(level)
    route = nest_route(chain, dims)
    return False if route is None else (route, level, chain)


def _finished(run: Run | None, mapping: Mapping, mode: VmapMode, level: Level) -> Any:
    """The results of a run in the level of a mapping, which was left."""
    if run is None or _needs_itself(run):
        # Another run does all of it, and so do later calls.
        level.by_itself = True
        if run is not None:
            note_apart(run.parts[0].levels)
        return NotImplemented
    if run.cached.__class__ is NestPlan and (results := _replayed(run, run.cached, mapping, mode)) is not NotImplemented:
        return results
    with mode.resumed(), unasked(mode):
        result = finish_run(run)
    return mapping.leave(result, mode)


def _chain(level: Level) -> Chain | None:
    """The nest that a level is the outermost of, which may be the level alone; None where it cannot run as a whole."""
    if mark_of(level.func) is None:
        if is_apart(level.func):
            return None
        return Chain([[level]], [], level.has_aux)
    return chain_of(level)


def _needs_itself(run: Run) -> bool:
    """Whether the function did what a level alone treats in ways of its own: steps under ``torch.no_grad()``, hooks."""
    levels = [level for part in run.parts for level in part.levels]
    return any([part.traced.tape.hooks or part.traced.steps or not agree(levels, part.traced.tape) for part in run.parts])


def _replayed(run: Run, plan: NestPlan, mapping: Mapping, mode: VmapMode) -> Any:
    """The results of a plan that is known, outside of the level; NotImplemented where it has to be replayed inside."""
    values = run.values
    beside = [None if source is None else values[source] for source in plan.sources]

    def give() -> None:
        given_away(run).clear()
        values.clear()

    found = plan.run_stored(values, mode, give)
    if found is None:
        return NotImplemented
    results, flags = found
    leaves: list[Any] = []
    plain = mapping.out_dims == 0
    for number, source in enumerate(plan.sources):
        if source is None:
            plain = plain and flags[number]
            leaves.append(results[number])
        else:
            value = beside[number]
            plain = plain and value.__class__ is BatchTensor and value.level is mode and value.batched
            leaves.append(value)
    if plain:
        stored = [leaf.value if leaf.__class__ is BatchTensor else leaf for leaf in leaves]
        return tree_unflatten(stored, plan.spec)
    made = wrap([None if source is not None else leaf for leaf, source in zip(leaves, plan.sources, strict=True)], flags, mode)
    whole = [leaf if new is None else new for leaf, new in zip(leaves, made, strict=True)]
    return mapping.leave(tree_unflatten(whole, plan.spec), mode)


def install() -> None:
    """Have vmaps of derivative transforms run as a whole."""
    Mapping.whole = staticmethod(run_mapped)
