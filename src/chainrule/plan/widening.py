"""Where a pattern for all values is widened because selections have other numbers of elements at other values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from chainrule.maps.linear_map import LinearMap
from chainrule.plan.graph import Graph, argument_slots, between


def unselected(tape: Any, graph: Graph, inputs: Sequence[int], sized: frozenset[int]) -> frozenset[int]:
    """The inputs of ops without entries here that may have some where a selection has more elements.

    Nothing is known of such entries, nor of what an enclosed transform would have made of them.

    Args:
        tape: the finished tape.
        graph: its local maps.
        inputs: the slots differentiated with respect to.
        sized: slots of values of a shape that depends on values, and of what is computed from them.
    """
    sources = set(_sources(tape, graph, sized))
    if not sources:
        return frozenset()
    return frozenset(slot for slot in inputs if not sources.isdisjoint(between(tape.records, [slot], [])[2]))


def _sources(tape: Any, graph: Graph, sized: frozenset[int]) -> Iterator[int]:
    """The active arguments of ops on such values of which a result has no entry, or a term none."""
    for record in tape.records:
        read = argument_slots(record)
        every = [slot for slot in (*read, *record.outputs) if slot >= 0]
        if sized.isdisjoint(every):
            continue
        empty = any(isinstance(value := tape.values[slot], torch.Tensor) and not value.numel() for slot in every)
        for source in read:
            if tape.active[source]:
                targets = (local for slot, local in graph.out_of.get(source, ()) if slot in record.outputs)
                if empty or _is_empty(targets):
                    yield source


def _is_empty(edges: Iterable[LinearMap]) -> bool:
    return any(local.is_zero or any(axis.size == 0 for term in local.terms for axis in term.all_axes()) for local in edges)


__all__ = ["unselected"]
