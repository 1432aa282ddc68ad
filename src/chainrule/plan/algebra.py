"""Sums, products and transposes of Jacobians, and what is read off them, as one network to be contracted.

An expression says how a map is put together from the Jacobians of recorded runs. Its blocks (one for each pair of an output
and an input) are networks of the Jacobians' terms; a request closes these networks (a trace, a diagonal, some rows, the sum of
squares), and the order of contraction that costs least is chosen for the whole. A matrix that is only on the way to a smaller
result is formed where that is the cheapest way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from chainrule.maps.compose import Workspace, settle
from chainrule.maps.coordinates import coordinates
from chainrule.maps.linear_map import LinearMap, add_maps, compose, densify, merge
from chainrule.maps.nodes import Node, leaf
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Factor, OneHot, Term, dims_of, new_axes
from chainrule.plan import elimination
from chainrule.plan.elimination import Candidate
from chainrule.plan.graph import Graph, build_graph
from chainrule.plan.planner import Planned, Request, accumulations, make_workspace

Blocks = dict[tuple[int, int], LinearMap]


@dataclass(frozen=True)
class Jacobian:
    """The Jacobian of some slots of a tape with respect to others; an output that depends on no input has no slot."""

    inputs: tuple[int, ...]
    outputs: tuple[int | None, ...]


@dataclass(frozen=True)
class Transposed:
    """The transpose of an expression."""

    of: Expression


@dataclass(frozen=True)
class Scaled:
    """An expression times a number, and times a seed of no dimensions, if there is one."""

    of: Expression
    number: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Added:
    """The sum of expressions between the same spaces."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True)
class Composed:
    """The composition ``left ∘ right``."""

    left: Expression
    right: Expression


Expression = Jacobian | Transposed | Scaled | Added | Composed

#: A number of an output or an input, and the seed that holds the flat positions of the wanted elements; None for all.
Selection = tuple[int, int | None]


@dataclass(frozen=True)
class AlgebraRequest:
    """What is asked of an expression.

    Attributes:
        kind: ``blocks`` (the blocks of some outputs and inputs, or some rows and columns of them), ``entries`` (single ones:
            the seeds of a pair of selections are read side by side), ``diagonal`` (of the blocks of an output and the input
            of the same number), ``trace`` (the sum of these), ``squares`` (the sum of the squares of all entries) or
            ``coordinates`` (of the entries that are not structurally zero).
        expression: the map.
        rows: which outputs, whole or in part.
        columns: which inputs, whole or in part; for ``entries``, the partners of ``rows``.
        symmetric: whether the map is symmetric: of ``blocks``, those above the diagonal are left out.
    """

    kind: str
    expression: Expression
    rows: tuple[Selection, ...] = ()
    columns: tuple[Selection, ...] = ()
    symmetric: bool = False
    order: str = "auto"

    @property
    def inputs(self) -> tuple[int, ...]:
        """The slots differentiated with respect to."""
        return tuple(slot for jacobian in jacobians(self.expression) for slot in jacobian.inputs)

    @property
    def outputs(self) -> tuple[int, ...]:
        """The slots differentiated."""
        return tuple(slot for jacobian in jacobians(self.expression) for slot in jacobian.outputs if slot is not None)


def jacobians(expression: Expression) -> list[Jacobian]:
    """The Jacobians that an expression is made of, each once."""
    return list(dict.fromkeys(_leaves(expression)))


def _leaves(expression: Expression) -> Iterator[Jacobian]:
    if isinstance(expression, Jacobian):
        yield expression
    elif isinstance(expression, Added):
        for part in expression.parts:
            yield from _leaves(part)
    elif isinstance(expression, Composed):
        yield from _leaves(expression.left)
        yield from _leaves(expression.right)
    else:
        yield from _leaves(expression.of)


class _Builder:
    """Makes the blocks of expressions in one workspace, from Jacobians that were accumulated in one order."""

    def __init__(self, found: dict[Jacobian, dict[tuple[int, int], LinearMap]], seeds: Any, workspace: Workspace) -> None:
        self.found = found
        self.seeds = seeds
        self.workspace = workspace

    def blocks(self, expression: Expression) -> Blocks:
        """The blocks by numbers of output and input; those that are zero are left out."""
        if isinstance(expression, Jacobian):
            maps = self.found[expression]
            return {
                (o, i): maps[slot, source]
                for o, slot in enumerate(expression.outputs)
                for i, source in enumerate(expression.inputs)
                if slot is not None and (slot, source) in maps
            }
        if isinstance(expression, Transposed):
            return {(i, o): local.transpose() for (o, i), local in self.blocks(expression.of).items()}
        if isinstance(expression, Scaled):
            return {key: self._scaled(local, expression) for key, local in self.blocks(expression.of).items()}
        if isinstance(expression, Added):
            sums: dict[tuple[int, int], list[LinearMap]] = {}
            for part in expression.parts:
                for key, local in self.blocks(part).items():
                    sums.setdefault(key, []).append(local)
            return {key: self.added(parts) for key, parts in sums.items()}
        return self._composed(self.blocks(expression.left), self.blocks(expression.right))

    def _composed(self, left: Blocks, right: Blocks) -> Blocks:
        sums: dict[tuple[int, int], list[LinearMap]] = {}
        for (o, middle), one in left.items():
            for (other, i), two in right.items():
                if other == middle:
                    sums.setdefault((o, i), []).append(self.product(one, two))
        found = {key: [part for part in parts if not part.is_zero] for key, parts in sums.items()}
        return {key: self.added(parts) for key, parts in found.items() if parts}

    def product(self, one: LinearMap, two: LinearMap) -> LinearMap:
        """The composition of two maps, left as a network."""
        return compose(one, two, self.workspace, eager=False)

    def added(self, parts: Sequence[LinearMap]) -> LinearMap:
        """The sum of maps between the same spaces."""
        return parts[0] if len(parts) == 1 else add_maps(parts, self.workspace)

    def _scaled(self, local: LinearMap, expression: Scaled) -> LinearMap:
        factors: tuple[Factor, ...] = ()
        if (number := expression.seed) is not None:
            factors = (Factor(self.seed(number, ()), ()),)
        terms = tuple(
            replace(term, factors=(*term.factors, *factors), scale=term.scale * expression.number) for term in local.terms
        )
        return replace(local, terms=terms)

    def seed(self, number: int, sizes: tuple[int, ...]) -> Node:
        """The array of a seed."""
        key = ("seed", number)
        node = self.workspace.memo.get(key)
        if node is None:
            node = self.workspace.memo[key] = leaf(
                sizes, lambda program: program.input(("seed", number), self.seeds[number]), label="seed"
            )
        return node

    def chosen(self, shapes: Sequence[tuple[tuple[int, ...], int]]) -> LinearMap:
        """The map that reads elements of a tensor, by their flat positions in one shape or in several side by side.

        Args:
            shapes: for each part of the tensor's shape, the part and the seed that holds positions in it.
        """
        count = int(self.seeds[shapes[0][1]].shape[0])
        source = Axis(count)
        in_dims: list[tuple[Axis, ...]] = []
        relations: list[OneHot] = []
        for shape, number in shapes:
            positions = self.seed(number, (count,))
            stride = math.prod(shape)
            for size in shape:
                stride //= max(size, 1)
                if size == 1:
                    in_dims.append(())
                    continue
                target = Axis(size)
                in_dims.append((target,))
                relations.append(OneHot(_digit(positions, stride, size), (source,), target))
        whole = tuple(size for shape, _ in shapes for size in shape)
        return LinearMap((count,), whole, (Term(((source,),), tuple(in_dims), (), tuple(relations)),))


def _digit(positions: Node, stride: int, size: int) -> Node:
    def compute(program: Program, value: Staged) -> Staged:
        if stride > 1:
            value = torch.div(value, stride, rounding_mode="floor")
        return torch.remainder(value, max(size, 1))

    return Node(positions.sizes, (positions,), compute, label="index digit")


def _as_vector(local: LinearMap) -> LinearMap:
    """The entries of a map as a map from nothing."""
    terms = tuple(replace(term, out_dims=(*term.out_dims, *term.in_dims), in_dims=()) for term in local.terms)
    return LinearMap((*local.out_shape, *local.in_shape), (), terms)


def _blocks(request: AlgebraRequest, blocks: Blocks, build: _Builder) -> dict[Any, LinearMap]:
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


def _entries(request: AlgebraRequest, blocks: Blocks, build: _Builder) -> dict[Any, LinearMap]:
    found = {}
    for number, ((o, row), (i, column)) in enumerate(zip(request.rows, request.columns, strict=True)):
        local = blocks.get((o, i))
        if local is not None:
            assert row is not None and column is not None
            reading = build.chosen([(local.out_shape, row), (local.in_shape, column)])
            found[number] = build.product(reading, _as_vector(local))
    return {key: local for key, local in found.items() if not local.is_zero}


def _diagonals(request: AlgebraRequest, blocks: Blocks, build: _Builder) -> dict[Any, LinearMap]:
    found: dict[Any, LinearMap] = {}
    for (o, i), local in blocks.items():
        if o == i:
            axes = dims_of(new_axes(local.in_shape))
            out_dims, out_shape = (axes, local.in_shape) if request.kind == "diagonal" else ((), ())
            same = LinearMap(out_shape, (*local.in_shape, *local.in_shape), (Term(out_dims, (*axes, *axes)),))
            found[o] = build.product(same, _as_vector(local))
    found = {key: local for key, local in found.items() if not local.is_zero}
    if request.kind == "trace" and found:
        return {"trace": build.added(list(found.values()))}
    return found


def _squares(request: AlgebraRequest, blocks: Blocks, build: _Builder) -> dict[Any, LinearMap]:
    parts = []
    for local in blocks.values():
        vector = _as_vector(local)
        parts.append(build.product(vector.transpose(), vector))
    parts = [part for part in parts if not part.is_zero]
    return {"squares": build.added(parts)} if parts else {}


_CLOSED: dict[str, Callable[[AlgebraRequest, Blocks, _Builder], dict[Any, LinearMap]]] = {
    "blocks": _blocks,
    "entries": _entries,
    "diagonal": _diagonals,
    "trace": _diagonals,
    "squares": _squares,
}


def _coordinates(blocks: Blocks, workspace: Workspace) -> dict[Any, Node]:
    """For each term of each block, the flat places of its entries and the entries."""
    found: dict[Any, Node] = {}
    for key, local in blocks.items():
        for number, term in enumerate(_settled(local, workspace)):
            found["places", *key, number], found["values", *key, number] = coordinates(term, workspace)
    return found


def _settled(local: LinearMap, workspace: Workspace) -> list[Term]:
    terms = [term for term in local.terms if not any(axis.size == 0 for axis in term.all_axes())]
    return [settle(term, workspace) for term in merge(terms, workspace, force=False)]


def _candidates(
    tape: Any, request: AlgebraRequest, seeds: Sequence[torch.Tensor], workspace: Workspace
) -> tuple[list[Candidate], dict[str, Blocks], Graph]:
    """The ways to compute what is asked, the blocks that each of them makes, and the ops that lie between."""
    made: dict[Jacobian, dict[str, Any]] = {}
    whole = Graph()
    for jacobian in jacobians(request.expression):
        inputs = list(dict.fromkeys(jacobian.inputs))
        outputs = list(dict.fromkeys(slot for slot in jacobian.outputs if slot is not None))
        graph = build_graph(tape, inputs, outputs, workspace)
        plain = Request("jacobian", tuple(inputs), tuple(outputs))
        made[jacobian] = accumulations(tape, plain, graph, inputs, outputs, workspace)
        _include(whole, graph)
    found: list[Candidate] = []
    blocks: dict[str, Blocks] = {}
    for name in dict.fromkeys(name for makers in made.values() for name in makers):
        maps = {jacobian: makers.get(name, makers["reverse"])[0]() for jacobian, makers in made.items()}
        build = _Builder(maps, seeds, workspace)
        blocks[name] = build.blocks(request.expression)
        if request.kind == "coordinates":
            nodes = _coordinates(blocks[name], workspace)
        else:
            closed = _CLOSED[request.kind](request, blocks[name], build)
            nodes = {key: densify(local, workspace) for key, local in closed.items()}
        eliminated = [slot for makers in made.values() for slot in makers.get(name, makers["reverse"])[1]]
        found.append(elimination.measure(Candidate(name, nodes, eliminated=eliminated)))
    return found, blocks, whole


def _include(whole: Graph, graph: Graph) -> None:
    """Add what a further graph of the same tape holds."""
    for target, edges in graph.into.items():
        if target not in whole.into:
            for source, local in edges:
                whole.add(source, target, local)
    whole.order = sorted({*whole.order, *graph.order})
    known = {step.outputs for step in whole.steps}
    whole.steps.extend(step for step in graph.steps if step.outputs not in known)


def plan_algebra(tape: Any, request: AlgebraRequest, seeds: Sequence[torch.Tensor]) -> Planned:
    """Plan a request on a finished tape (or several that are joined) and execute it once.

    Args:
        tape: the tape.
        request: what is asked.
        seeds: what the seeds that the request names are: factors, and flat positions.
    """
    workspace = make_workspace(tape, (*request.inputs, *request.outputs))
    found, _, graph = _candidates(tape, request, seeds, workspace)
    best = min(found, key=lambda c: c.cost)
    program = Program()
    keys: list[Any] = list(best.nodes)
    results = [node.force(program) for node in best.nodes.values()]
    workspace.memo.clear()
    return Planned(program, keys, list(results), graph, best.name, found)


def predicted_peak(tape: Any, request: AlgebraRequest, seeds: Sequence[torch.Tensor]) -> int:
    """The most elements that the cheapest plan of a request holds at once, beside the run's own values; nothing is computed."""
    workspace = make_workspace(tape, (*request.inputs, *request.outputs))
    found, _, _ = _candidates(tape, request, seeds, workspace)
    workspace.memo.clear()
    return min(found, key=lambda c: c.cost).peak


def described(tape: Any, request: AlgebraRequest, seeds: Sequence[torch.Tensor]) -> dict[tuple[int, int], list[Term]]:
    """The terms of the blocks of an expression, settled, in the order that costs least; nothing is computed."""
    workspace = make_workspace(tape, (*request.inputs, *request.outputs))
    found, blocks, _ = _candidates(tape, request, seeds, workspace)
    best = min(found, key=lambda c: c.cost)
    return {key: _settled(local, workspace) for key, local in blocks[best.name].items()}


__all__ = [
    "Added", "AlgebraRequest", "Composed", "Expression", "Jacobian", "Scaled", "Transposed", "described", "jacobians",
    "plan_algebra", "predicted_peak",
]  # fmt: skip
