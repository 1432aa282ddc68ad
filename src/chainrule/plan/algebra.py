"""Sums, products and transposes of Jacobians, and what is read off them, as one network to be contracted.

An expression says how a map is put together from the Jacobians of recorded runs. Its blocks (one for each pair of an output
and an input) are networks of the Jacobians' terms; a request closes these networks (a trace, a diagonal, some rows, the sum of
squares), and the order of contraction that costs least is chosen for the whole. A matrix that is only on the way to a smaller
result is formed where that is the cheapest way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from chainrule.maps.compose import Workspace, settle
from chainrule.maps.linear_map import LinearMap, dense_term, densify, merge
from chainrule.maps.nodes import Node
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Term, dims_of, new_axes
from chainrule.plan import elimination
from chainrule.plan.apart import added_apart
from chainrule.plan.building import Blocks, Builder
from chainrule.plan.chosen_rows import TOTALS, Graphs, Sweeps, swept
from chainrule.plan.elimination import Candidate
from chainrule.plan.expressions import (
    SIZES,
    Added,
    AlgebraRequest,
    Composed,
    Expression,
    Jacobian,
    Scaled,
    Transposed,
    jacobians,
)
from chainrule.plan.graph import Graph, build_graph
from chainrule.plan.meetings import MEETING, lists_of, met, without_lists
from chainrule.plan.planner import Planned, Request, accumulations, is_settled, make_workspace

#: More terms than this are merged where they can be, although their sizes are wanted.
_MANY = 64

#: What holds more than this many times the elements of inputs and outputs is large.
_WIDE = 8

#: Some rows by way of an array of more than so many elements ...
_LARGE = 1 << 21

#: ... are made as products with vectors are if these hold less than one in so many, and cost at most so many times as much.
_PART, _DEARER = 8, 4.0


def _as_vector(local: LinearMap) -> LinearMap:
    """The entries of a map as a map from nothing."""
    terms = tuple(replace(term, out_dims=(*term.out_dims, *term.in_dims), in_dims=()) for term in local.terms)
    return LinearMap((*local.out_shape, *local.in_shape), (), terms)


def _blocks(request: AlgebraRequest, blocks: Blocks, build: Builder) -> dict[Any, LinearMap]:
    found = {}
    for o, row in request.rows:
        for i, column in request.columns:
            local = blocks.get((o, i))
            if local is None or (request.symmetric and o > i):
                continue
            out_shape, in_shape = local.out_shape, local.in_shape
            if row is not None:
                local = build.product(build.chosen([(out_shape, row)]), local)
            if column is not None:
                local = build.product(local, build.chosen([(in_shape, column)]).transpose())
            if not local.is_zero:
                found[o, i] = local
    return found


def _entries(request: AlgebraRequest, blocks: Blocks, build: Builder) -> dict[Any, LinearMap]:
    found = {}
    for number, ((o, row), (i, column)) in enumerate(zip(request.rows, request.columns, strict=True)):
        local = blocks.get((o, i))
        if local is not None:
            assert row is not None and column is not None
            reading = build.chosen([(local.out_shape, row), (local.in_shape, column)])
            found[number] = build.product(reading, _as_vector(local))
    return {key: local for key, local in found.items() if not local.is_zero}


def _diagonals(request: AlgebraRequest, blocks: Blocks, build: Builder) -> dict[Any, LinearMap]:
    parts = _diagonal_parts(request.expression, build, request.kind == "diagonal")
    found = {key: [local for local in several if not local.is_zero] for key, several in parts.items()}
    if request.kind == "trace":
        every = [local for several in found.values() for local in several]
        return {"trace": build.closed(every, request)} if every else {}
    return {key: build.closed(several, request) for key, several in found.items() if several}


def _diagonal_parts(expression: Expression, build: Builder, keep: bool) -> dict[int, list[LinearMap]]:
    """By the number of a space's leaf, summands of the diagonal of its block, or of its trace, as maps from nothing.

    A product is closed as a whole: its two sides meet on the diagonal before they meet in between.
    """
    found: dict[int, list[LinearMap]] = {}
    if isinstance(expression, Transposed):
        return _diagonal_parts(expression.of, build, keep)
    if isinstance(expression, Scaled):
        parts = _diagonal_parts(expression.of, build, keep)
        return {key: [build.scaled(local, expression) for local in several] for key, several in parts.items()}
    if isinstance(expression, Added):
        for part in expression.parts:
            for key, several in _diagonal_parts(part, build, keep).items():
                found.setdefault(key, []).extend(several)
        return found
    if isinstance(expression, Composed):
        right = build.blocks(expression.right)
        for (o, middle), one in build.blocks(expression.left).items():
            if (two := right.get((middle, o))) is not None:
                found.setdefault(o, []).extend(_closed_pairs(one, two, build, keep))
        return found
    for (o, i), local in build.blocks(expression).items():
        if o == i:
            axes = dims_of(new_axes(local.in_shape))
            out_dims, out_shape = (axes, local.in_shape) if keep else ((), ())
            same = LinearMap(out_shape, (*local.in_shape, *local.in_shape), (Term(out_dims, (*axes, *axes)),))
            found[o] = [build.product(same, _as_vector(local))]
    return found


def _closed_pairs(one: LinearMap, two: LinearMap, build: Builder, keep: bool) -> list[LinearMap]:
    """The diagonal of ``one ∘ two``, or its trace, as maps from nothing."""
    ones: Sequence[Term] = ()
    twos: Sequence[Term] = ()
    if build.apart:
        ones, twos = lists_of(one, build.workspace), lists_of(two.transpose(), build.workspace)
    if not (ones and twos):
        return [build.product(_closing(one, keep), _as_vector(two))]
    several = [met(a, b, keep, build.workspace) for a in ones for b in twos]
    plain, other = without_lists(one, build.workspace), without_lists(two.transpose(), build.workspace).transpose()
    listed = replace(one, terms=tuple(term for term in one.terms if not any(term is t for t in plain.terms)))
    pairs = [(plain, two), (listed, other)]
    found = [build.product(_closing(a, keep), _as_vector(b)) for a, b in pairs if a.terms and b.terms]
    return [*found, LinearMap(one.out_shape if keep else (), (), tuple(several))]


def _closing(one: LinearMap, keep: bool) -> LinearMap:
    """The map that closes a product with another one."""
    terms = tuple(replace(t, out_dims=t.out_dims if keep else (), in_dims=(*t.in_dims, *t.out_dims)) for t in one.terms)
    return LinearMap(one.out_shape if keep else (), (*one.in_shape, *one.out_shape), terms)


def _squares(request: AlgebraRequest, blocks: Blocks, build: Builder) -> dict[Any, LinearMap]:
    parts = []
    for local in blocks.values():
        alone = [replace(local, terms=(term,)) for term in local.terms]
        for number, one in enumerate(alone):
            parts.extend(_closed_pairs(one, one.transpose(), build, keep=False))
            # Two terms meet twice.
            rest = (m for two in alone[number + 1 :] for m in _closed_pairs(one, two.transpose(), build, keep=False))
            parts.extend(replace(m, terms=tuple(replace(t, scale=2.0 * t.scale) for t in m.terms)) for m in rest)
    parts = [part for part in parts if not part.is_zero]
    return {"squares": build.closed(parts, request)} if parts else {}


_CLOSED: dict[str, Callable[[AlgebraRequest, Blocks, Builder], dict[Any, LinearMap]]] = {
    "blocks": _blocks,
    "entries": _entries,
    "diagonal": _diagonals,
    "trace": _diagonals,
    "squares": _squares,
}


def _settled(local: LinearMap, workspace: Workspace, *, alone: bool = False) -> list[Term]:
    terms = [term for term in local.terms if not any(axis.size == 0 for axis in term.all_axes())]
    if not alone or len(terms) > _MANY:
        terms = merge(terms, workspace, force=False, limit=None)
    return [settle(term, workspace) for term in terms]


def _arrays(local: LinearMap, workspace: Workspace, *, alone: bool) -> list[Node]:
    """A result term by term: no relation becomes dense on the way, however many terms there are."""
    shape = (*local.out_shape, *local.in_shape)
    terms = _settled(local, workspace, alone=alone)
    if not terms or math.prod(shape) == 0:
        return [densify(replace(local, terms=()), workspace)]
    return [dense_term(term, workspace, shape) for term in terms]


def _total(nodes: Sequence[Node]) -> Node:
    total = nodes[0]
    for node in nodes[1:]:
        total = Node(total.sizes, (total, node), _sum_of_two, flops=node.numel, moved=3 * node.numel, label="add")
    return total


def _results(closed: dict[Any, LinearMap], request: AlgebraRequest, workspace: Workspace) -> dict[Any, Node]:
    """What is asked, and the sizes of its terms where these are, as arrays."""
    found: dict[Any, Node] = {}
    for key, local in closed.items():
        nodes = _arrays(local, workspace, alone=request.sized)
        found[key] = _total(nodes)
        if request.sized and len(nodes) > 1:
            sizes = [Node(n.sizes, (n,), _magnitude, flops=n.numel, moved=2 * n.numel, label="abs") for n in nodes]
            found[SIZES, key] = _total(sizes)
    return found


def _sum_of_two(program: Program, one: Staged, two: Staged) -> Staged:
    return torch.add(one, two)


def _magnitude(program: Program, value: Staged) -> Staged:
    return torch.abs(value)


def _candidates(
    tape: Any, request: AlgebraRequest, seeds: Sequence[torch.Tensor], workspace: Workspace
) -> tuple[list[Candidate], dict[str, Blocks], Graph]:
    """The ways to compute what is asked, the blocks that each of them makes, and the ops that lie between."""
    made: dict[Jacobian, dict[str, Any]] = {}
    whole = Graph()
    whole_blocks = request.kind == "blocks" and all(seed is None for _, seed in (*request.rows, *request.columns))
    workspace.recurrences = not whole_blocks
    graphs: Graphs = {}
    for jacobian in jacobians(request.expression):
        inputs = list(dict.fromkeys(jacobian.inputs))
        outputs = list(dict.fromkeys(slot for slot in jacobian.outputs if slot is not None))
        graph = build_graph(tape, inputs, outputs, workspace)
        plain = Request("jacobian", tuple(inputs), tuple(outputs))
        made[jacobian] = accumulations(tape, plain, graph, inputs, outputs, workspace)
        graphs[jacobian] = graph, inputs, outputs
        whole.include(graph)
    found: list[Candidate] = []
    blocks: dict[str, Blocks] = {}
    for name in dict.fromkeys(name for makers in made.values() for name in makers):
        maps = {jacobian: makers.get(name, makers["reverse"])[0]() for jacobian, makers in made.items()}
        build = Builder(maps, seeds, workspace)
        blocks[name] = {} if request.kind in ("diagonal", "trace") else build.blocks(request.expression)
        closed = _CLOSED[request.kind](request, blocks[name], build)
        if whole_blocks:
            nodes = {key: densify(local, workspace) for key, local in closed.items()}
        else:
            nodes = _results(closed, request, workspace)
        eliminated = [slot for makers in made.values() for slot in makers.get(name, makers["reverse"])[1]]
        found.append(elimination.measure(Candidate(name, nodes, eliminated=eliminated)))
        if is_settled(found, len(whole.order)):
            break
    ends = sum(tape.values[slot].numel() for slot in {*request.inputs, *request.outputs})
    best = min(found, key=lambda c: c.cost)
    for name, total in TOTALS.items():
        if name == "selected" or best.peak > _WIDE * ends * _count(request, seeds):
            for closed in swept(request, Sweeps(graphs, Builder({}, seeds, workspace), total), tape):
                nodes = _results(closed, request, workspace)
                found.append(elimination.measure(Candidate(name, nodes)))
            best = min(found, key=lambda c: c.cost)
    if not whole_blocks and _is_wide(best, ends):
        other = elimination.measure(Candidate("apart", _apart(tape, request, seeds, graphs, workspace)))
        found.append(replace(other, name="met") if any(step[0] == MEETING for step in other.steps) else other)
    return found, blocks, whole


def _count(request: AlgebraRequest, seeds: Sequence[torch.Tensor]) -> int:
    """How many rows or columns are chosen, whichever are fewer."""
    counts = [
        sum(int(seeds[seed].shape[0]) for _, seed in side if seed is not None)
        for side in (request.rows, request.columns)
        if side and all(seed is not None for _, seed in side)
    ]
    return min(counts, default=1)


def _apart(
    tape: Any,
    request: AlgebraRequest,
    seeds: Sequence[torch.Tensor],
    graphs: Graphs,
    workspace: Workspace,
) -> dict[Any, Node]:
    """What is asked, of sums whose terms stay networks until they are closed."""

    def shape(slot: int) -> tuple[int, ...]:
        return tuple(tape.values[slot].shape)

    maps = {
        jacobian: elimination.reverse(*found, shape, workspace, eager=False, total=added_apart)
        for jacobian, found in graphs.items()
    }
    build = Builder(maps, seeds, workspace, apart=True)
    blocks = {} if request.kind in ("diagonal", "trace") else build.blocks(request.expression)
    closed = _CLOSED[request.kind](request, blocks, build)
    return _results(closed, request, workspace)


def _is_wide(best: Candidate, ends: int) -> bool:
    """Whether a plan holds arrays much larger than the inputs and the outputs, which have so many elements."""
    return best.peak > _WIDE * ends


def _best(found: Sequence[Candidate]) -> Candidate:
    """The candidate that costs least, or one that costs little more and is made without a large array.

    What an operator is predicted to cost is that of a matrix, which its kernel is mostly cheaper than.
    """
    best = min(found, key=lambda c: c.cost)
    if best.peak <= _LARGE:
        return best
    others = [c for c in found if c.name == "filled" and c.peak * _PART < best.peak and c.cost <= _DEARER * best.cost]
    return min(others, key=lambda c: c.cost, default=best)


def plan_algebra(tape: Any, request: AlgebraRequest, seeds: Sequence[torch.Tensor]) -> Planned:
    """Plan a request on a finished tape (or several that are joined) and execute it once.

    Args:
        tape: the tape.
        request: what is asked.
        seeds: what the seeds that the request names are: factors, and flat positions.
    """
    workspace = make_workspace(tape, (*request.inputs, *request.outputs))
    found, _, graph = _candidates(tape, request, seeds, workspace)
    best = _best(found)
    program = Program()
    keys: list[Any] = list(best.nodes)
    results = [node.force(program) for node in best.nodes.values()]
    workspace.memo.clear()
    return Planned(program, keys, list(results), graph, best.name, found)


def predicted_peak(
    tape: Any, request: AlgebraRequest, seeds: Sequence[torch.Tensor], left_out: frozenset[str] = frozenset()
) -> int:
    """The most elements that the cheapest plan of a request holds at once, beside the run's own values; nothing is computed.

    Plans whose names are in `left_out` do not count: ``apart`` reads sums term by term, ``met`` sorts lists of entries, too.
    """
    workspace = make_workspace(tape, (*request.inputs, *request.outputs))
    found, _, _ = _candidates(tape, request, seeds, workspace)
    workspace.memo.clear()
    return _best([c for c in found if c.name not in left_out]).peak


def described(tape: Any, request: AlgebraRequest, seeds: Sequence[torch.Tensor]) -> dict[tuple[int, int], list[Term]]:
    """The terms of the blocks of an expression, settled, in the order that costs least; nothing is computed."""
    workspace = make_workspace(tape, (*request.inputs, *request.outputs))
    found, blocks, _ = _candidates(tape, request, seeds, workspace)
    best = min(found, key=lambda c: c.cost)
    return {key: _settled(local, workspace) for key, local in blocks[best.name].items()}


__all__ = [
    "SIZES", "Added", "AlgebraRequest", "Composed", "Expression", "Jacobian", "Scaled", "Transposed", "described", "jacobians",
    "plan_algebra", "predicted_peak",
]  # fmt: skip
