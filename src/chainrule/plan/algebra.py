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
from chainrule.maps.linear_map import LinearMap, add_maps, compose, dense_term, densify, merge
from chainrule.maps.nodes import Node, leaf
from chainrule.maps.onehots import digit
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Factor, OneHot, Term, dims_of, new_axes
from chainrule.plan import elimination
from chainrule.plan.apart import added_apart
from chainrule.plan.elimination import Candidate
from chainrule.plan.graph import Graph, build_graph
from chainrule.plan.meetings import MEETING, lists_of, met, without_lists
from chainrule.plan.planner import Planned, Request, accumulations, is_settled, make_workspace

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


#: Before the key of a result, that of the sizes of its terms.
SIZES = "sizes"

#: More terms than this are merged where they can be, although their sizes are wanted.
_MANY = 64

#: What holds more than this many times the elements of inputs and outputs is large.
_WIDE = 8


class OfExpression:
    """A request about an expression in Jacobians.

    Attributes:
        expression: the map.
    """

    expression: Expression

    @property
    def inputs(self) -> tuple[int, ...]:
        """The slots differentiated with respect to."""
        return tuple(slot for jacobian in jacobians(self.expression) for slot in jacobian.inputs)

    @property
    def outputs(self) -> tuple[int, ...]:
        """The slots differentiated."""
        return tuple(slot for jacobian in jacobians(self.expression) for slot in jacobian.outputs if slot is not None)


@dataclass(frozen=True)
class AlgebraRequest(OfExpression):
    """What is asked of an expression.

    Attributes:
        kind: ``blocks`` (the blocks of some outputs and inputs, or some rows and columns of them), ``entries`` (single ones:
            the seeds of a pair of selections are read side by side), ``diagonal`` (of the blocks of an output and the input
            of the same number), ``trace`` (the sum of these) or ``squares`` (the sum of the squares of all entries).
        expression: the map.
        rows: which outputs, whole or in part.
        columns: which inputs, whole or in part; for ``entries``, the partners of ``rows``.
        symmetric: whether the map is symmetric: of ``blocks``, those above the diagonal are left out.
        sized: whether the sizes of the terms of ``squares``, ``diagonal`` and ``trace`` are wanted, too: for a result, under
            its key with :data:`SIZES` before it, the sum of the magnitudes of the terms that it is the sum of; nothing where
            there is one term.
    """

    kind: str
    expression: Expression
    rows: tuple[Selection, ...] = ()
    columns: tuple[Selection, ...] = ()
    symmetric: bool = False
    order: str = "auto"
    sized: bool = False


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


class Builder:
    """Makes the blocks of expressions in one workspace, from Jacobians that were accumulated in one order."""

    def __init__(
        self, found: dict[Jacobian, dict[tuple[int, int], LinearMap]], seeds: Any, workspace: Workspace, *, apart: bool = False
    ) -> None:
        self.found = found
        self.seeds = seeds
        self.workspace = workspace
        self.apart = apart

    def closed(self, parts: Sequence[LinearMap], request: AlgebraRequest) -> LinearMap:
        """The sum of closed products; where the sizes of its terms are wanted, these stay apart."""
        if request.sized:
            return replace(parts[0], terms=tuple(term for part in parts for term in part.terms))
        return self.added(parts)

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
            return {key: self.scaled(local, expression) for key, local in self.blocks(expression.of).items()}
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
        """The composition of two maps, left as a network where entries are not listed."""
        return compose(one, two, self.workspace, eager=self.workspace.sparse)

    def added(self, parts: Sequence[LinearMap]) -> LinearMap:
        """The sum of maps between the same spaces: its terms stay apart as long as they hold less than a dense array."""
        first = parts[0]
        if self.workspace.sparse:
            return add_maps(parts, self.workspace)
        if self.apart:
            return added_apart(parts, self.workspace)
        terms = tuple(term for part in parts for term in part.terms)
        dense = math.prod(first.out_shape) * math.prod(first.in_shape)
        if len(terms) > 2 and sum(factor.node.numel for term in terms for factor in term.factors) >= dense:
            return add_maps(parts, self.workspace, force=True)
        return replace(first, terms=terms)

    def scaled(self, local: LinearMap, expression: Scaled) -> LinearMap:
        """A map times the factors of an expression."""
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
                relations.append(OneHot(digit(positions, stride, size, math.prod(shape)), (source,), target))
        whole = tuple(size for shape, _ in shapes for size in shape)
        return LinearMap((count,), whole, (Term(((source,),), tuple(in_dims), (), tuple(relations)),))


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
    graphs: dict[Jacobian, tuple[Graph, list[int], list[int]]] = {}
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
    if not whole_blocks and _is_wide(tape, request, min(found, key=lambda c: c.cost)):
        other = elimination.measure(Candidate("apart", _apart(tape, request, seeds, graphs, workspace)))
        found.append(replace(other, name="met") if any(step[0] == MEETING for step in other.steps) else other)
    if (swept := _swept(request, whole, Builder({}, seeds, workspace), tape)) is not None:
        nodes = _results(swept, request, workspace)
        found.append(elimination.measure(Candidate("selected", nodes)))
    return found, blocks, whole


def _is_wide(tape: Any, request: AlgebraRequest, best: Candidate) -> bool:
    """Whether a plan holds arrays much larger than the inputs and the outputs are."""
    ends = sum(tape.values[slot].numel() for slot in {*request.inputs, *request.outputs})
    return best.peak > _WIDE * ends


def _apart(
    tape: Any,
    request: AlgebraRequest,
    seeds: Sequence[torch.Tensor],
    graphs: dict[Jacobian, tuple[Graph, list[int], list[int]]],
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


def _swept(request: AlgebraRequest, graph: Graph, build: Builder, tape: Any) -> dict[Any, LinearMap] | None:
    """Some rows of a Jacobian by a sweep that begins with them, or some columns; None where it is not that simple."""
    flipped = isinstance(request.expression, Transposed)
    jacobian = request.expression.of if isinstance(request.expression, Transposed) else request.expression
    if request.kind != "blocks" or not isinstance(jacobian, Jacobian):
        return None
    rows, columns = (request.columns, request.rows) if flipped else (request.rows, request.columns)
    by_rows = all(seed is not None for _, seed in rows) and bool(rows)
    if not by_rows and not (columns and all(seed is not None for _, seed in columns)):
        return None
    found: dict[Any, LinearMap] = {}
    shapes = [tuple(tape.values[slot].shape) for slot in jacobian.inputs]
    inputs, outputs = list(jacobian.inputs), [slot for slot in jacobian.outputs if slot is not None]
    for number, seed in rows if by_rows else columns:
        start = jacobian.outputs[number] if by_rows else jacobian.inputs[number]
        if start is None:
            continue
        chosen = build.chosen([(tuple(tape.values[start].shape), seed)])  # type: ignore[list-item]
        if by_rows:
            maps = elimination.sweep_back(graph, {start: chosen}, inputs, build.workspace)
        else:
            maps = elimination.sweep_forward(graph, {start: chosen.transpose()}, outputs, build.workspace)
        for other, column in columns if by_rows else rows:
            end = jacobian.inputs[other] if by_rows else jacobian.outputs[other]
            if end is None or (local := maps.get(end)) is None:
                continue
            if by_rows and column is not None:
                local = build.product(local, build.chosen([(shapes[other], column)]).transpose())
            elif not by_rows and column is not None:
                local = build.product(build.chosen([(tuple(tape.values[end].shape), column)]), local)
            if not local.is_zero:
                o, i = (number, other) if by_rows else (other, number)
                found[(i, o) if flipped else (o, i)] = local.transpose() if flipped else local
    return found


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


def predicted_peak(
    tape: Any, request: AlgebraRequest, seeds: Sequence[torch.Tensor], left_out: frozenset[str] = frozenset()
) -> int:
    """The most elements that the cheapest plan of a request holds at once, beside the run's own values; nothing is computed.

    Plans whose names are in `left_out` do not count: ``apart`` reads sums term by term, ``met`` sorts lists of entries, too.
    """
    workspace = make_workspace(tape, (*request.inputs, *request.outputs))
    found, _, _ = _candidates(tape, request, seeds, workspace)
    workspace.memo.clear()
    return min([c for c in found if c.name not in left_out], key=lambda c: c.cost).peak


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
