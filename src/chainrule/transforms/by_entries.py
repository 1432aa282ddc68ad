"""Traces and diagonals of derivatives of one run, off the non-zeros where a contraction would hold more.

Forward maps through a scatter into the nodes of a graph are dense, and so are the traces of maps that are put together of
slices; the entries that they have are few. Which of the two ways holds less is found out once per signature.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from chainrule.batching.tensor import BatchTensor
from chainrule.execute.accounts import uncollected
from chainrule.execute.engine import CACHE, execute
from chainrule.execute.prediction import peak_elements
from chainrule.execute.sparse import mapped_slots
from chainrule.modes_off import outside
from chainrule.plan.algebra import AlgebraRequest, Jacobian
from chainrule.plan.planner import Request
from chainrule.plan.second_order import curvature_peak
from chainrule.transforms.map_entries import diagonal_of_expression, held_by, is_worth_looking
from chainrule.transforms.trace import Traced, recording_on

#: Plans that read sums term by term, by their names.
_SUMS = frozenset({"apart", "met"})


@dataclass
class Choice:
    """Which way holds less.

    Attributes:
        entries: whether it is that over the non-zeros.
        used: for the cache.
    """

    entries: bool
    used: bool = False


def _chosen(traced: Traced, kind: str, find: Callable[[], bool]) -> bool:
    """What ``find`` finds out for the signature of a run."""
    slots = (tuple(traced.in_slots), tuple(traced.out_slots))
    try:
        key: Any = traced.tape.signature(("by entries", kind, slots, mapped_slots(traced.tape)))
        known: Any = CACHE.get(key)
    except TypeError:  # an unhashable static argument
        key = known = None
    if known is None:
        with uncollected():
            known = Choice(find())
        if key is not None:
            CACHE.put(key, known)
    found: bool = known.entries
    return found


def _has_complex(traced: Traced) -> bool:
    tape = traced.tape
    return any(active and value.is_complex() for value, active in zip(tape.values, tape.active, strict=True))


def trace_prefers_entries(traced: Traced) -> bool:
    """Whether the trace of the Jacobian of a run holds less when it is summed over entries."""
    leaves = traced.in_leaves
    size = sum(leaf.numel() for leaf in leaves)
    if not is_worth_looking(size, size, leaves) or _has_complex(traced):
        return False
    if [leaf.shape for leaf in leaves] != [leaf.shape for leaf in traced.out_leaves]:
        return False
    if all(slot is None for slot in traced.out_slots):
        return False
    request = AlgebraRequest("trace", Jacobian(tuple(traced.in_slots), tuple(traced.out_slots)))

    def prefers() -> bool:
        # The other way is a plan of the run alone, which reads no sums term by term.
        return held_by(traced.tape, request, (), size, size, peak_elements(traced.tape, request, (), _SUMS)) is not None

    return _chosen(traced, "trace", prefers)


def trace_by_entries(traced: Traced) -> torch.Tensor | None:
    """The trace of the Jacobian of a run, whose outputs have the shapes of its inputs; None for zero."""
    total: torch.Tensor | None = None
    for slot, source in zip(traced.out_slots, traced.in_slots, strict=True):
        if slot is not None:
            for part in diagonal_of_expression(traced.tape, Jacobian((source,), (slot,)), ()).values():
                total = part.sum() if total is None else torch.add(total, part.sum())
    return total


def hessian_prefers_entries(traced: Traced, *, diagonal: bool) -> bool:
    """Whether the diagonal (or the trace) of the Hessian of a run's only output holds less when it is read off entries.

    Where values in between are complex, it is not read at all.
    """
    leaves = traced.in_leaves
    size = sum(leaf.numel() for leaf in leaves)
    if len(traced.out_leaves) != 1 or traced.out_slots[0] is None or traced.out_leaves[0].numel() != 1:
        return False
    if traced.tape.saw_blocked or not is_worth_looking(size, size, leaves) or _has_complex(traced):
        return False
    return _chosen(traced, "diagonal" if diagonal else "laplacian", lambda: _hessian_holds_less(traced, size, diagonal))


def _hessian_holds_less(traced: Traced, size: int, diagonal: bool) -> bool:
    (slot,), seed = traced.out_slots, torch.ones_like(traced.out_leaves[0])
    assert slot is not None
    is_mapped = any(value.__class__ is BatchTensor for value in traced.tape.values)
    with nullcontext() if is_mapped else outside():
        fork = traced.tape.fork()
        peak = curvature_peak(fork, traced.in_slots, slot, seed, recording_on(fork), diagonal=diagonal)
        fork = traced.tape.fork()
        gradients = _gradients(fork, traced.in_slots, slot)
        outputs = tuple(gradients.get(source) for source in traced.in_slots)
        if all(place is None for place in outputs):
            return False
        request = AlgebraRequest("diagonal", Jacobian(tuple(traced.in_slots), outputs))
        return held_by(fork, request, (), size, size, peak) is not None


def _gradients(tape: Any, sources: list[int], slot: int) -> dict[int, int]:
    """By the slot of an input, the slot of the gradient with respect to it, where that depends on the inputs."""
    with recording_on(tape)():
        first = execute(tape, Request("jacobian", tuple(sources), (slot,), "reverse"))
    found: dict[int, int] = {}
    for source in dict.fromkeys(sources):
        gradient = first.get((slot, source))
        place = None if gradient is None else tape.slot_of(gradient)
        if place is not None and tape.active[place]:
            found[source] = place
    return found


def hessian_by_entries(traced: Traced, slot: int, *, diagonal: bool) -> list[torch.Tensor | None]:
    """For each input the diagonal of the Hessian's block (of the input's size), or its trace; None for zero."""
    gradients = _gradients(traced.tape, traced.in_slots, slot)
    results: list[torch.Tensor | None] = []
    for source in traced.in_slots:
        place = gradients.get(source)
        found = {} if place is None else diagonal_of_expression(traced.tape, Jacobian((source,), (place,)), ())
        results.append((found[0] if diagonal else found[0].sum()) if found else None)
    return results


__all__ = ["hessian_by_entries", "hessian_prefers_entries", "trace_by_entries", "trace_prefers_entries"]
