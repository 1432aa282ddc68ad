"""Second derivatives without the first: traces and diagonals of Hessians as sums over the ops of a tape.

For a scalar ``v·f(x)``, the Hessian is the sum, over the ops ``y = g(a, b, …)`` of the tape, of

    (∂a/∂x)ᵀ · ∂²(ȳ·g)/∂a∂b · (∂b/∂x)

where ``ȳ`` is the op's cotangent: forward maps on both sides of the op's own curvature, which is diagonal for an element-wise
op and zero for a linear one. A trace or a diagonal contracts each summand to what is asked for; no Hessian is formed.

The formula is that of the forward Laplacian read per op (Li et al., *A computational framework for neural network-based
variational Monte Carlo with forward Laplacian*, Nature Machine Intelligence 2024), with the sources weighted by cotangents
instead of pushed forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from chainrule.maps.compose import Workspace
from chainrule.maps.linear_map import LinearMap, add_maps, compose, densify
from chainrule.maps.nodes import Node
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Term, dims_of, identity, new_axes
from chainrule.plan import elimination
from chainrule.plan.elimination import Candidate
from chainrule.plan.graph import Graph, argument_slots, build_graph, records_between
from chainrule.plan.planner import make_workspace
from chainrule.plan.single_ops import Pullbacks


class Curvature(NamedTuple):
    """The second derivative of one op's share of ``v·f``: with respect to the slots ``first`` and ``second``."""

    first: int
    second: int
    map: LinearMap


class _Part:
    """Some records of a tape, as a tape."""

    def __init__(self, tape: Any, records: Sequence[Any]) -> None:
        self.values = tape.values
        self.active = tape.active
        self.records = records


Recording = Callable[[], AbstractContextManager[Any]]


def curvatures(
    tape: Any, inputs: Sequence[int], output: int, seed: torch.Tensor, workspace: Workspace, recording: Recording
) -> list[Curvature]:
    """The curvatures of the ops between ``inputs`` and ``output``, and the pullback that they need.

    Args:
        tape: the tape; the pullback is run and recorded on it.
        inputs: slots differentiated with respect to.
        output: the slot of ``f``.
        seed: the cotangent ``v``, of the output's shape.
        workspace: where the maps of this plan are computed.
        recording: makes what runs inside be recorded on the tape.
    """
    records = list(tape.records)
    kept, reachable = records_between(records, inputs, [output])
    bars: dict[int, torch.Tensor] = {output: seed}
    found: list[Curvature] = []
    pullbacks = Pullbacks(tape)
    for record in reversed(kept):
        given = [slot for slot in record.outputs if slot in bars]
        if not given:
            continue
        start = len(tape.records)
        pulled = _pull(pullbacks, tape, record, reachable, {slot: bars[slot] for slot in given}, recording)
        found.extend(_curvatures_of(tape, record, tape.records[start:], pulled, workspace))
        with recording():
            for slot, value in pulled.items():
                bars[slot] = torch.add(bars[slot], value) if slot in bars else value
    return found


def _pull(
    pullbacks: Pullbacks, tape: Any, record: Any, reachable: set[int], bars: dict[int, torch.Tensor], recording: Recording
) -> dict[int, torch.Tensor]:
    """The cotangents that one op gives to its arguments."""
    sources = [slot for slot in dict.fromkeys(argument_slots(record)) if slot in reachable and tape.active[slot]]
    with recording():
        return pullbacks.pull(record, sources, bars)


def _curvatures_of(
    tape: Any, record: Any, pull: Sequence[Any], pulled: dict[int, torch.Tensor], workspace: Workspace
) -> list[Curvature]:
    """How the cotangents that an op gives depend on its own arguments."""
    made = {slot for r in pull for slot in r.outputs}
    outputs = {slot: tape.slot_of(value) for slot, value in pulled.items()}
    wanted = {slot: bar for slot, bar in outputs.items() if bar in made}
    if not wanted:
        return []
    sources = list(pulled)
    part = _Part(tape, [record, *pull])
    graph = build_graph(part, sources, list(dict.fromkeys(wanted.values())), workspace)
    shapes = lambda slot: tuple(tape.values[slot].shape)  # noqa: E731
    maps = elimination.reverse(graph, sources, list(dict.fromkeys(wanted.values())), shapes, workspace)
    found = []
    for position, first in enumerate(sources):
        # The matrix of curvatures is symmetric: one triangle, the other by twice.
        for second in sources[position:]:
            local = maps.get((wanted[first], second)) if first in wanted else None
            if local is not None and not local.is_zero:
                found.append(Curvature(first, second, local))
    return found


def contracted_hessian(
    tape: Any,
    source: int,
    needed: Sequence[Curvature],
    inner: dict[int, LinearMap],
    workspace: Workspace,
    diagonal: bool,
) -> LinearMap | None:
    """The trace, or the diagonal, of the Hessian with respect to one input, as a map from nothing.

    Args:
        tape: the tape.
        source: the input's slot.
        needed: the curvatures.
        inner: for each slot that they name, the forward map from the input.
        workspace: where the maps of this plan are computed.
        diagonal: the diagonal instead of its sum.
    """
    shape = tuple(tape.values[source].shape)
    axes = dims_of(new_axes(shape))
    same = LinearMap((*shape, *shape), shape if diagonal else (), (Term((*axes, *axes), axes if diagonal else ()),))
    parts: list[LinearMap] = []
    for first, second, local in needed:
        if first not in inner or second not in inner:
            continue
        right = compose(local, inner[second], workspace, eager=False)
        whole = compose(inner[first].transpose(), right, workspace, eager=False)
        weight = 1.0 if first == second else 2.0
        rows = tuple(
            Term((), (*t.out_dims, *t.in_dims), t.factors, t.onehots, weight * t.scale) for t in whole.terms
        )
        part = compose(LinearMap((), (*shape, *shape), rows), same, workspace, eager=False)
        if not part.is_zero:
            parts.append(part)
    return add_maps(parts, workspace) if parts else None


class Contracted(NamedTuple):
    """A plan for traces or diagonals that ran.

    Attributes:
        results: for each input slot, a scalar (or a tensor of the input's shape); an input without curvature is left out.
        graph: the ops between the inputs and the output.
        candidate: what the contraction costs, without the pullback.
        program: the calls of the contraction.
        staged: its results.
    """

    results: dict[int, torch.Tensor]
    graph: Graph
    candidate: Candidate
    program: Program
    staged: list[Staged]


class HoldsMore(Exception):  # noqa: N818 - never reaches a user
    """A plan holds more numbers at once than it may.

    Attributes:
        peak: how many it holds.
    """

    def __init__(self, peak: int) -> None:
        super().__init__(peak)
        self.peak = peak


def curvature_peak(
    tape: Any, inputs: Sequence[int], output: int, seed: torch.Tensor, recording: Recording, *, diagonal: bool
) -> int:
    """How many numbers the contraction of :func:`second_order` holds at once; of it, only the pullback is run."""
    try:
        second_order(tape, inputs, output, seed, recording, diagonal=diagonal, limit=-1)
    except HoldsMore as more:
        return more.peak
    raise AssertionError("a plan that holds less than nothing")


def second_order(
    tape: Any, inputs: Sequence[int], output: int, seed: torch.Tensor, recording: Recording, *, diagonal: bool,
    limit: int | None = None,
) -> Contracted:
    """Run the plan for the trace (or the diagonal) of the Hessian of ``seed·output`` with respect to each input.

    Raises:
        HoldsMore: the contraction would hold more than ``limit`` numbers at once; only the pullback has run.
    """
    records = list(tape.records)
    workspace = make_workspace(tape, (*inputs, output))
    needed = curvatures(tape, inputs, output, seed, workspace, recording)
    slots = list(dict.fromkeys(slot for c in needed for slot in (c.first, c.second)))
    program = Program()
    nodes: dict[tuple[int, int], Node] = {}
    for source in dict.fromkeys(inputs):
        graph = build_graph(_Part(tape, records), [source], slots, workspace)
        shape = tuple(tape.values[source].shape)
        seeds = {source: LinearMap(shape, shape, (identity(shape),))}
        inner = elimination.sweep_forward(graph, seeds, slots, workspace)
        if source in slots:
            inner.setdefault(source, seeds[source])
        total = contracted_hessian(tape, source, needed, inner, workspace, diagonal)
        if total is not None:
            nodes[output, source] = densify(total, workspace)
    whole = build_graph(_Part(tape, records), list(dict.fromkeys(inputs)), [output], workspace)
    candidate = elimination.measure(Candidate("curvatures", nodes))
    if limit is not None and candidate.peak > limit:
        raise HoldsMore(candidate.peak)
    staged = {source: node.force(program) for (_, source), node in nodes.items()}
    results = {source: made.value for source, made in staged.items()}
    workspace.memo.clear()
    return Contracted(results, whole, candidate, program, list(staged.values()))


__all__ = ["Curvature", "HoldsMore", "curvature_peak", "curvatures", "second_order"]
