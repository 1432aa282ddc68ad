"""The levels of a nest, one after the other: what is recorded the first time, and run where it cannot be one program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import TreeSpec

from chainrule.batching.mode import VmapMode
from chainrule.capture.tape import BelowAutograd
from chainrule.transforms.arguments import flatten_outputs, tree_flatten
from chainrule.transforms.levels import Level, Part
from chainrule.transforms.trace import Traced, active_slot
from chainrule.transforms.vmap import Mapping


def run_parts(parts: Sequence[Part], seeds: tuple[torch.Tensor, ...], made: list[torch.Tensor] | None = None) -> Any:
    """The levels of all parts one after the other; all but the last are recorded on the tape of the part outside of them."""
    part, inner = parts[-1], parts[:-1]
    traced = part.traced

    def resume() -> Any:
        inner[-1].traced.tape.settle()
        return run_parts(inner, ())

    if inner:
        with torch.enable_grad(), BelowAutograd(), traced.tape:
            result = _through(inner[-1].around, resume)
        leaves, spec = flatten_outputs(result, part.levels[0].name, part.levels[0].func)
        slots = [active_slot(traced.tape, leaf) for leaf in leaves]
        traced = replace(traced, out_leaves=leaves, out_spec=spec, out_slots=slots)
    return _run_levels(part.levels, part.wanted, traced, seeds, made)


def _through(around: Sequence[tuple[Mapping, VmapMode]], call: Callable[[], Any]) -> Any:
    """Call inside of mappings, and take the result out of them."""
    if not around:
        return call()
    mapping, mode = around[0]
    with mode.resumed():
        result = _through(around[1:], call)
    return mapping.leave(result, mode)


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
