"""Vertices that are eliminated before orders of elimination are compared: those through which only single entries pass.

An op that works element by element, or moves elements, has one entry in each row or column of its local Jacobian. A product
with it has no more entries than the other factor, in any order. So what such ops do between two stencils is one local
Jacobian, made once, and not multiplied with all that was accumulated so far, op by op.

Source: Griewank and Walther, *Evaluating Derivatives*, 2nd ed., chapter 9 (safe pre-elimination).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from chainrule.maps.compose import Workspace
from chainrule.maps.linear_map import LinearMap, add_maps, compose
from chainrule.maps.nonzeros import count_entries
from chainrule.maps.terms import Term
from chainrule.plan.graph import Graph

#: By source slot, then by target slot.
_Edges = dict[int, dict[int, LinearMap]]


def condensed(
    graph: Graph, inputs: Sequence[int], outputs: Sequence[int], shapes: Callable[[int], tuple[int, ...]], workspace: Workspace
) -> Graph:
    """The graph without the inner vertices whose elimination takes less than it saves in every order.

    Args:
        graph: the local Jacobians, each a sum of terms.
        inputs: the slots differentiated with respect to.
        outputs: the slots differentiated.
        shapes: the shape of each slot.
        workspace: where nodes are shared.
    """
    fixed = {*inputs, *outputs}
    inner = [slot for slot in graph.order if slot not in fixed]
    if len(inner) < 2:
        return graph
    edges = _Condensing(graph, shapes, workspace)
    gone = {slot for slot in inner if edges.eliminated(slot)}
    gone |= {slot for slot in reversed(inner) if slot not in gone and edges.eliminated(slot)}
    rest = Graph(order=[slot for slot in graph.order if slot not in gone], steps=graph.steps)
    for source in sorted(edges.out_of):
        for target, local in edges.out_of[source].items():
            rest.add(source, target, local)
    return rest


class _Condensing:
    """Local Jacobians while vertices are eliminated; there is one at most from one slot to another."""

    def __init__(self, graph: Graph, shapes: Callable[[int], tuple[int, ...]], workspace: Workspace) -> None:
        self._shapes, self._workspace = shapes, workspace
        self.out_of: _Edges = {}
        self._into: _Edges = {}
        parallel: dict[tuple[int, int], list[LinearMap]] = {}
        for target, incoming in graph.into.items():
            for source, local in incoming:
                parallel.setdefault((source, target), []).append(local)
        for (source, target), maps in parallel.items():
            self._put(source, target, maps)

    def _put(self, source: int, target: int, maps: list[LinearMap]) -> None:
        total = maps[0] if len(maps) == 1 else add_maps(maps, self._workspace)
        self.out_of.setdefault(source, {})[target] = total
        self._into.setdefault(target, {})[source] = total

    def eliminated(self, slot: int) -> bool:
        """Whether a vertex is one of those: then it is gone."""
        incoming, outgoing = self._into.get(slot, {}), self.out_of.get(slot, {})
        one = sum(len(local.terms) for local in incoming.values())
        two = sum(len(local.terms) for local in outgoing.values())
        if one * two > one + two:
            return False
        left = [self._is_sparse(local, slot, target) for target, local in outgoing.items()]
        right = [self._is_sparse(local, source, slot) for source, local in incoming.items()]
        if not (all(left) and all(right)):
            return False
        if not all(_single_rows(local) for local in incoming.values()) and not all(
            _single_rows(local.transpose()) for local in outgoing.values()
        ):
            return False
        self._into.pop(slot, None)
        self.out_of.pop(slot, None)
        for source in incoming:
            del self.out_of[source][slot]
        for target in outgoing:
            del self._into[target][slot]
        for target, after in outgoing.items():
            for source, before in incoming.items():
                joined = compose(after, before, self._workspace, eager=True)
                known = self.out_of.get(source, {}).get(target)
                if not joined.is_zero:
                    self._put(source, target, [joined] if known is None else [known, joined])
        return True

    def _is_sparse(self, local: LinearMap, source: int, target: int) -> bool:
        """Whether each term has no more entries than one side of it has elements."""
        most = max(math.prod(self._shapes(source)), math.prod(self._shapes(target)))
        return not local.operators and all(count_entries(term) <= most for term in local.terms)


def _single_rows(local: LinearMap) -> bool:
    """Whether it is seen of each term that it has one entry at most in each row."""
    return all(map(_has_single_rows, local.terms))


def _has_single_rows(term: Term) -> bool:
    by_target = {h.target: h for h in term.onehots}
    known = set()
    for dim in term.out_dims:
        for axis in dim:
            onehot = by_target.get(axis)
            if onehot is None:
                known.add(axis)
            elif onehot.affine is not None and onehot.affine[1] != 0:
                known.update((axis, *onehot.sources))
    return all(axis in known or axis.size == 1 or axis in by_target for axis in term.all_axes())


__all__ = ["condensed"]
