"""Elimination orders: how the local Jacobians of a graph become the Jacobian from inputs to outputs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from chainrule.maps.compose import Workspace
from chainrule.maps.linear_map import LinearMap, add_maps, compose
from chainrule.maps.nodes import CALL_COST, MOVED_COST, Node, postorder
from chainrule.maps.terms import identity
from chainrule.plan.graph import Graph

Maps = dict[tuple[int, int], LinearMap]

#: What adds the maps that meet at a vertex.
Total = Callable[[list[LinearMap], Workspace], LinearMap]

#: A plan whose arithmetic costs less than this share of its calls is not worth comparing with others.
_LITTLE = 0.25


@dataclass
class Candidate:
    """One way to compute the wanted maps: lazy nodes and what they cost.

    Attributes:
        name: ``forward``, ``reverse``, ``network`` or ``greedy``.
        nodes: for each (output slot, input slot), the dense Jacobian to be computed; absent when it is zero.
        flops: predicted multiply-adds.
        moved: predicted elements read and written.
        peak: predicted elements alive at once.
        steps: the steps that cost something: label, sizes, multiply-adds, elements moved.
        eliminated: the slots in the order in which they are eliminated.
    """

    name: str
    nodes: dict[tuple[int, int], Node]
    maps: Maps = field(default_factory=dict)
    flops: int = 0
    moved: int = 0
    peak: int = 0
    steps: list[tuple[str, tuple[int, ...], int, int]] = field(default_factory=list)
    eliminated: list[int] = field(default_factory=list)

    @property
    def cost(self) -> float:
        """One number to compare: a moved element costs a few multiply-adds."""
        return self.flops + MOVED_COST * self.moved

    @property
    def is_mostly_calls(self) -> bool:
        """Whether the arithmetic is so little beside the calls themselves that another order of it saves next to nothing."""
        return self.cost <= _LITTLE * CALL_COST * len(self.steps)


def measure(candidate: Candidate) -> Candidate:
    """Fill in the predicted cost of a candidate from the nodes it would compute."""
    order = postorder(candidate.nodes.values())
    candidate.flops = sum(node.flops * node.batch for node in order)
    candidate.moved = sum(node.bytes * node.batch for node in order)
    candidate.steps = [
        (node.label, node.sizes, node.flops * node.batch, node.bytes * node.batch) for node in order if node.flops or node.bytes
    ]
    candidate.peak = _peak(order, list(candidate.nodes.values()))
    return candidate


def measure_nodes(name: str, nodes: dict[int, Node]) -> Candidate:
    """The cost of a sweep, whose results are named by one slot each."""
    return measure(Candidate(name, {(slot, slot): node for slot, node in nodes.items()}))


def _peak(order: list[Node], roots: list[Node]) -> int:
    uses: dict[int, int] = {}
    for node in order:
        for item in node.inputs:
            uses[id(item)] = uses.get(id(item), 0) + 1
    for root in roots:
        uses[id(root)] = uses.get(id(root), 0) + 1
    alive = peak = 0
    for node in order:
        if node.flops or node.bytes:
            alive += node.numel * node.batch
        peak = max(peak, alive)
        for item in node.inputs:
            uses[id(item)] -= 1
            if uses[id(item)] == 0 and (item.flops or item.bytes):
                alive -= item.numel * item.batch
    return peak


def reverse(graph: Graph, inputs: list[int], outputs: list[int], shapes: Callable[[int], tuple[int, ...]],
            workspace: Workspace, *, eager: bool = True, total: Total | None = None) -> Maps:
    """Accumulate from each output backwards."""
    result: Maps = {}
    for output in outputs:
        shape = shapes(output)
        seed = LinearMap(shape, shape, (identity(shape),))
        found = sweep_back(graph, {output: seed}, inputs, workspace, eager=eager, total=total)
        result.update({(output, slot): m for slot, m in found.items()})
    return result


def _total(maps: list[LinearMap], workspace: Workspace) -> LinearMap:
    total = maps[0] if len(maps) == 1 and len(maps[0].terms) < 2 else add_maps(maps, workspace)
    terms = tuple([workspace.thinned(term) for term in total.terms])
    return total if all(map(operator.is_, terms, total.terms)) else replace(total, terms=terms)


def sweep_back(
    graph: Graph, seeds: dict[int, LinearMap], inputs: list[int], workspace: Workspace, *, eager: bool = True,
    total: Total | None = None,
) -> dict[int, LinearMap]:
    """Pull the maps in ``seeds`` (from slots to some common output space) back to ``inputs``; `total` adds those of one slot."""
    total = total or _total
    pending: dict[int, list[LinearMap]] = {slot: [seed] for slot, seed in seeds.items()}
    for slot in reversed(graph.order):
        if slot not in pending:
            continue
        maps = pending[slot] if slot in inputs else pending.pop(slot)
        added = total(maps, workspace)
        for source, local in graph.into.get(slot, ()):
            joined = compose(added, local, workspace, eager=eager)
            if not joined.is_zero:
                pending.setdefault(source, []).append(joined)
    return {slot: total(pending[slot], workspace) for slot in inputs if slot in pending}


def forward(graph: Graph, inputs: list[int], outputs: list[int], shapes: Callable[[int], tuple[int, ...]],
            workspace: Workspace, *, eager: bool = True) -> Maps:
    """Accumulate from each input forwards."""
    result: Maps = {}
    for slot in inputs:
        shape = shapes(slot)
        seed = LinearMap(shape, shape, (identity(shape),))
        found = sweep_forward(graph, {slot: seed}, outputs, workspace, eager=eager)
        result.update({(output, slot): m for output, m in found.items()})
    return result


def sweep_forward(
    graph: Graph, seeds: dict[int, LinearMap], outputs: list[int], workspace: Workspace, *, eager: bool = True,
    total: Total | None = None,
) -> dict[int, LinearMap]:
    """Push the maps in ``seeds`` (from some common input space to slots) on to ``outputs``; `total` is as for a sweep back."""
    total = total or _total
    pending: dict[int, list[LinearMap]] = {slot: [seed] for slot, seed in seeds.items()}
    totals: dict[int, LinearMap] = {}
    for slot in graph.order:
        for source, local in graph.into.get(slot, ()):
            if source not in pending:
                continue
            if source not in totals:
                totals[source] = total(pending[source], workspace)
            joined = compose(local, totals[source], workspace, eager=eager)
            if not joined.is_zero:
                pending.setdefault(slot, []).append(joined)
    return {slot: totals.get(slot) or total(pending[slot], workspace) for slot in outputs if slot in pending}


def inner_slots(graph: Graph, inputs: list[int], outputs: list[int]) -> list[int]:
    """The vertices between inputs and outputs, in tape order."""
    fixed = {*inputs, *outputs}
    return [slot for slot in graph.order if slot not in fixed]


def greedy(graph: Graph, inputs: list[int], outputs: list[int], shapes: Callable[[int], tuple[int, ...]],
           workspace: Workspace, eliminated: list[int]) -> Maps:
    """Eliminate intermediate vertices one by one, the cheapest first (Markowitz's rule with real sizes).

    The order taken is appended to `eliminated`.

    Source: Griewank and Walther, *Evaluating Derivatives*, 2nd ed., chapter 9.
    """
    edges: dict[int, dict[int, list[LinearMap]]] = {}
    into: dict[int, set[int]] = {}
    for target, incoming in graph.into.items():
        for source, local in incoming:
            edges.setdefault(source, {}).setdefault(target, []).append(local)
            into.setdefault(target, set()).add(source)
    remaining = inner_slots(graph, inputs, outputs)

    def weight(slot: int) -> int:
        total = 0
        for source in into.get(slot, ()):
            for target in edges.get(slot, {}):
                total += _numel(shapes(source)) * _numel(shapes(slot)) * _numel(shapes(target))
        return total

    while remaining:
        slot = min(remaining, key=weight)
        remaining.remove(slot)
        eliminated.append(slot)
        outgoing = {t: _total(_plain(ms, workspace), workspace) for t, ms in edges.pop(slot, {}).items()}
        for source in into.pop(slot, set()):
            incoming = _total(_plain(edges[source].pop(slot), workspace), workspace)
            for target, local in outgoing.items():
                joined = compose(local, incoming, workspace, eager=True)
                if not joined.is_zero:
                    edges[source].setdefault(target, []).append(joined)
                    into.setdefault(target, set()).add(source)
        for target in outgoing:
            into[target].discard(slot)
    return _collect(edges, inputs, outputs, graph, shapes, workspace)


def _plain(maps: list[LinearMap], workspace: Workspace) -> list[LinearMap]:
    return maps


def _collect(edges: dict[int, dict[int, list[LinearMap]]], inputs: list[int], outputs: list[int], graph: Graph,
             shapes: Callable[[int], tuple[int, ...]], workspace: Workspace) -> Maps:
    """What is left are edges between inputs and outputs (an output may feed another): finish in reverse."""
    rest = Graph(order=[slot for slot in graph.order if slot in set(outputs)])
    for source, targets in edges.items():
        for target, maps in targets.items():
            rest.add(source, target, _total(maps, workspace))
    return reverse(rest, inputs, outputs, shapes, workspace)


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
