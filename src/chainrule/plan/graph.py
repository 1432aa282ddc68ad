"""The graph of local Jacobians of a tape, pruned to what connects the inputs with the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from chainrule.maps.compose import Workspace
from chainrule.maps.linear_map import LinearMap
from chainrule.rules.base import Call
from chainrule.rules.complex_parts import component_edges
from chainrule.rules.opaque import opaque_edges
from chainrule.rules.rows import rows_of
from chainrule.rules.table import rule_for


@dataclass
class Step:
    """One op on the way from inputs to outputs, for ``explain``."""

    op: Any
    kind: str
    family: str
    outputs: tuple[int, ...]
    out_shapes: tuple[tuple[int, ...], ...]


@dataclass
class Graph:
    """Vertices are tape slots, edges local Jacobians.

    Attributes:
        into: for each slot, its edges ``(source slot, local map)``.
        out_of: for each slot, its edges ``(target slot, local map)``.
        order: the slots that have edges into them, in tape order.
        steps: the ops, for ``explain``.
    """

    into: dict[int, list[tuple[int, LinearMap]]] = field(default_factory=dict)
    out_of: dict[int, list[tuple[int, LinearMap]]] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def add(self, source: int, target: int, local: LinearMap) -> None:
        """Insert an edge."""
        self.into.setdefault(target, []).append((source, local))
        self.out_of.setdefault(source, []).append((target, local))

    def include(self, graph: Graph) -> None:
        """Add what a further graph of the same tape holds."""
        for target, edges in graph.into.items():
            if target not in self.into:
                for source, local in edges:
                    self.add(source, target, local)
        self.order = sorted({*self.order, *graph.order})
        known = {step.outputs for step in self.steps}
        self.steps.extend(step for step in graph.steps if step.outputs not in known)


def build_graph(tape: Any, inputs: list[int], outputs: list[int], workspace: Workspace) -> Graph:
    """Make the local Jacobians of the ops that lie between ``inputs`` and ``outputs``.

    Args:
        tape: the finished tape.
        inputs: slots that are differentiated with respect to.
        outputs: slots that are differentiated.
        workspace: where nodes are shared.
    """
    kept, needed, reachable = between(tape.records, inputs, outputs)
    graph = Graph()
    active = _Reachable(tape, reachable)
    for record in kept:
        _add_record(graph, record, tape, needed, active, workspace, inputs)
    return graph


def between(
    records: Sequence[Any], inputs: Sequence[int], outputs: Sequence[int]
) -> tuple[list[Any], set[int], set[int]]:
    """The records on a way from inputs to outputs, the slots on such ways, and those that depend on the inputs."""
    reachable = set(inputs)
    read = [argument_slots(record) for record in records]
    for record, slots in zip(records, read, strict=True):
        if not reachable.isdisjoint(slots):
            reachable.update(record.outputs)
    needed = {slot for slot in outputs if slot in reachable}
    kept = []
    for record, slots in zip(reversed(records), reversed(read), strict=True):
        if not needed.isdisjoint(record.outputs):
            needed.update([slot for slot in slots if slot in reachable])
            kept.append(record)
    return kept[::-1], needed, reachable


def records_between(
    records: Sequence[Any], inputs: Sequence[int], outputs: Sequence[int]
) -> tuple[list[Any], set[int]]:
    """The records on a way from inputs to outputs, in tape order, and the slots that depend on the inputs."""
    kept, _, reachable = between(records, inputs, outputs)
    return kept, reachable


def argument_slots(record: Any) -> list[int]:
    """The slots among a record's arguments, at any depth."""
    found: list[int] = []
    stack: list[Any] = [record.args]
    if record.kwargs:
        stack.append(tuple([item for _, item in record.kwargs]))
    while stack:
        tree = stack.pop()
        for item in tree:
            if type(item).__name__ == "Slot":
                found.append(item.index)
            elif isinstance(item, tuple):
                stack.append(item)
    return found


def _involves_complex(record: Any, tape: Any) -> bool:
    values = [tape.values[slot] for slot in (*argument_slots(record), *record.outputs) if slot >= 0]
    return any([isinstance(value, torch.Tensor) and value.dtype.is_complex for value in values])


def _add_record(
    graph: Graph, record: Any, tape: Any, needed: set[int], active: _Reachable, workspace: Workspace, inputs: Sequence[int]
) -> None:
    call = Call(record, active, workspace)
    rule = rule_for(record.op)
    # Complex maps are R-linear, with conjugations: they are kept as operators in torch's convention.
    component = component_edges(call, inputs)
    is_complex = component is not None or _involves_complex(record, tape)
    edges = component if component is not None else opaque_edges(call) if is_complex else rule.linearize(call)
    rows = rows_of(call) if (workspace.kernels or workspace.mapped) and not is_complex else {}
    for edge in edges:
        target = record.outputs[edge.output]
        if target in needed and not edge.map.is_zero:
            row = rows.get(edge.source) if edge.output == 0 else None
            graph.add(edge.source, target, edge.map if row is None else replace(edge.map, row=row))
    graph.order.extend(slot for slot in record.outputs if slot in needed)
    kind = "opaque" if is_complex else rule.kind
    if record.origin is not None and kind == "structured":
        kind = "decomposed"
    shapes = tuple(tuple(tape.values[s].shape) for s in record.outputs if s >= 0)
    graph.steps.append(Step(record.op, kind, rule.family, record.outputs, shapes))


class _Reachable:
    """A tape on which only what depends on the wanted inputs counts as active."""

    def __init__(self, tape: Any, reachable: set[int]) -> None:
        self.values: list[torch.Tensor] = tape.values
        self.records: Sequence[Any] = tape.records
        self.active = _Activity(tape.active, reachable)


class _Activity:
    """Which slots are active: looked up one by one, as a plan makes many small graphs of a long tape."""

    __slots__ = ("_active", "_reachable")

    def __init__(self, active: Sequence[bool], reachable: set[int]) -> None:
        self._active, self._reachable = active, reachable

    def __getitem__(self, slot: int) -> bool:
        return slot in self._reachable and self._active[slot]
