"""Plans of sparse Jacobians: the pattern from the structure of the maps, the values by one short program."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from chainrule.maps.compose import settle
from chainrule.maps.linear_map import LinearMap, compose, merge
from chainrule.maps.nodes import Node
from chainrule.maps.nonzeros import count_entries, placed_entries
from chainrule.maps.row_form import in_rows
from chainrule.maps.sorted_places import TooManyError
from chainrule.maps.sparse import SparseWorkspace
from chainrule.maps.staging import Program, Staged, reads
from chainrule.maps.terms import Term, identity
from chainrule.maps.unmapped import kept, plain
from chainrule.plan import elimination
from chainrule.plan.building import Builder
from chainrule.plan.compression import by_columns, by_stars
from chainrule.plan.condensing import condensed
from chainrule.plan.elimination import Candidate
from chainrule.plan.expressions import Expression, Jacobian, OfExpression, jacobians
from chainrule.plan.graph import Graph, build_graph
from chainrule.plan.patterns import (
    Found,
    Key,
    Pattern,
    as_matrix,
    block_nodes,
    find_blocks,
    mirrored,
    triangle_of,
)
from chainrule.plan.picks import picked_slots
from chainrule.plan.planner import make_workspace
from chainrule.plan.widening import unselected
from chainrule.rules.zeros import static_zeros

#: From so many vertices on between inputs and outputs, local Jacobians are held by rows.
_CHAIN = 3
#: Up to so many entries ``explain`` looks at what colours would cost.
_SHOWN = 1 << 17
#: Maps of a chain have about as many entries where none has more than this many times those of another.
_EVEN = 1.5
#: With more entries than this the second order is not tried: it would take longer than it could save.
_LARGE = 1 << 22
#: Masks of up to so many elements are taken for any others, to see what costs less, where more than so many entries are summed
#: at one place.
_LITTLE, _SUMMED = 1 << 20, 4


class SparseRequest(NamedTuple):
    """What is asked of a tape.

    Attributes:
        inputs: the tape slots differentiated with respect to.
        outputs: the tape slots differentiated.
        order: ``forward``, ``reverse`` or ``auto``.
        cast: whether results take the dtype of the ``input``, of the ``output`` or of ``neither``.
        triangle: ``lower`` or ``upper``: outputs are derivatives with respect to the inputs, and that triangle is wanted; None
            for all.
        numbers: for a triangle or a symmetric matrix, the number of the input that each output is the derivative with
            respect to.
        symmetric: whether the blocks are those of a symmetric matrix: one triangle may be computed for both.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    order: str = "auto"
    cast: str = "input"
    triangle: str | None = None
    numbers: tuple[int, ...] = ()
    symmetric: bool = False


@dataclass(frozen=True)
class SparseExpression(OfExpression):
    """What is asked of an expression in Jacobians; its blocks are named by the numbers of output and input.

    Attributes:
        expression: the map.
        symmetric: whether it is symmetric.
        sizes: where one matrix of all blocks is wanted, the numbers of elements of its outputs and of its inputs.
    """

    expression: Expression
    symmetric: bool = False
    sizes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    order: str = "auto"


@dataclass
class PlannedSparse:
    """A sparse plan that ran once.

    Attributes:
        program: computes the values.
        results: per block ``(output slot, input slot)``, the staged values.
        patterns: per block, where they stand.
        workspace: what was known of the indices.
        graph: the local maps.
        candidates: the orders compared.
        chosen: the one taken.
        blocks: per block, for ``explain``: its slots, shape, entries, the arrays that its terms hold, where each
            term has entries, and whether all of it is dense.
    """

    program: Program
    results: dict[tuple[int, int], Staged]
    patterns: dict[tuple[int, int], Pattern]
    workspace: SparseWorkspace
    graph: Graph
    candidates: list[Candidate] = field(default_factory=list)
    chosen: str = ""
    blocks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def cost(self) -> float:
        """The predicted cost of a run."""
        return min(candidate.cost for candidate in self.candidates)


def sparse_workspace(
    tape: Any, slots: Sequence[int], widened: frozenset[int] = frozenset(), program: Program | None = None,
    masked: bool = True, chosen: bool = True, recorded: bool = False,
) -> SparseWorkspace:
    """A workspace for maps between these slots; `recorded` where all that is on is what records planning."""
    plainly = make_workspace(tape, slots)
    workspace = SparseWorkspace(plainly.dtype, plainly.device, widened, program, frozenset(tape.derived), masked, chosen)
    workspace.values = tape.values
    if masked and (recorded or not torch._C._len_torch_dispatch_stack()):
        workspace.constants = frozenset(
            slot for slot, value in enumerate(tape.values)
            if value.__class__ is torch.Tensor and value.layout is torch.strided and not value.requires_grad
            and not tape.active[slot] and slot not in tape.derived
        )  # fmt: skip
    return workspace


def structured_graph(tape: Any, inputs: list[int], outputs: list[int], workspace: SparseWorkspace) -> Graph:
    """The graph of local Jacobians, each a sum of terms with concrete relations."""
    graph = build_graph(tape, inputs, outputs, workspace)
    picked = picked_slots(tape, graph, workspace)
    if workspace.zeros is None or not picked <= workspace.picked:
        workspace.picked |= picked
        workspace.zeros = static_zeros(tape.records, tape.values, workspace.is_readable, workspace.picked)
    known: dict[int, LinearMap] = {}
    for edges in (graph.into, graph.out_of):
        for slot, incoming in edges.items():
            for _, local in incoming:
                if id(local) not in known:
                    known[id(local)] = _structured(local, workspace)
            edges[slot] = [(other, known[id(local)]) for other, local in incoming]
    return graph


def _refuse_complex(tape: Any, graph: Graph) -> None:
    """Maps to and from complex values are no arrays of numbers: their entries cannot be listed.

    Raises:
        RuntimeError: if there are complex values between inputs and outputs.
    """
    if _has_complex(tape, graph):
        raise RuntimeError(
            "chainrule: complex values between the inputs and the outputs: sparse layouts work on real ones only. Use "
            "layout='dense'"
        )


def _has_complex(tape: Any, graph: Graph) -> bool:
    return any(tape.values[slot].is_complex() for slot in (*graph.order, *graph.out_of))


def _structured(local: LinearMap, workspace: SparseWorkspace) -> LinearMap:
    terms = list(local.terms)
    for operator in local.operators:
        if operator.structure is not None:
            listed = operator.structure()
            if workspace.limit is not None and sum(map(count_entries, listed)) > workspace.limit:
                raise TooManyError
            terms.extend(listed)
            continue
        shape = local.out_shape
        seed = LinearMap(shape, shape, (identity(shape),))
        terms.extend(compose(seed, replace(local, terms=(), operators=(operator,)), workspace, eager=True).terms)
    kept = (workspace.from_tape(term) for term in terms)
    return LinearMap(local.out_shape, local.in_shape, tuple(term for term in kept if term.scale != 0.0))


def find_patterns(
    tape: Any,
    request: SparseRequest,
    widened: frozenset[int] = frozenset(),
    sized: frozenset[int] = frozenset(),
    *,
    everywhere: bool = False,
) -> tuple[dict[Key, Pattern], frozenset[int]]:
    """Where every block may have non-zeros, and the inputs of which nothing is known; nothing but indices is computed.

    Args:
        tape: the finished tape.
        request: what is asked.
        widened: slots of what depends on the inputs: indices and masks among them could select anything.
        sized: slots of what has a shape that depends on values, and of what follows from them.
        everywhere: whether what ops choose by value is any element.
    """
    workspace = sparse_workspace(tape, (*request.inputs, *request.outputs), widened)
    workspace.everywhere = everywhere
    local = structured_graph(tape, *_slots(request), workspace)
    graph = _condensed(tape, local, request, workspace)
    found = find_blocks(_accumulated(tape, graph, *_slots(request), "reverse", workspace), workspace)
    workspace.memo.clear()
    unknown = unselected(tape, local, request.inputs, sized) if sized else sized
    return {key: block.pattern for key, block in found.items()}, unknown


def _slots(request: SparseRequest | Jacobian) -> tuple[list[int], list[int]]:
    """The inputs and the outputs of a request, each once."""
    return list(dict.fromkeys(request.inputs)), [slot for slot in dict.fromkeys(request.outputs) if slot is not None]


def _accumulated(
    tape: Any, graph: Graph, inputs: list[int], outputs: list[int], order: str, workspace: SparseWorkspace
) -> dict[Key, LinearMap]:
    accumulate = elimination.forward if order == "forward" else elimination.reverse
    return accumulate(graph, inputs, outputs, _shapes(tape), workspace)


def _condensed(tape: Any, graph: Graph, request: SparseRequest | Jacobian, workspace: SparseWorkspace) -> Graph:
    workspace.stacks = False
    found = condensed(graph, *_slots(request), _shapes(tape), workspace)
    workspace.stacks = True
    if len(elimination.inner_slots(found, *_slots(request))) < _CHAIN or workspace.padded:
        return found
    # What is multiplied many times is held by rows.
    workspace.by_rows = True
    rows = Graph(order=found.order, steps=found.steps)
    for target, incoming in found.into.items():
        for source, local in incoming:
            rows.add(source, target, in_rows(local, workspace))
    return rows


def _shapes(tape: Any) -> Callable[[int], tuple[int, ...]]:
    return lambda slot: tuple(tape.values[slot].shape)


def plan_sparse(
    tape: Any,
    request: SparseRequest | SparseExpression,
    program: Program | None = None,
    seeds: Sequence[torch.Tensor] = (),
    *,
    masked: bool = True,
    chosen: bool = True,
    compare: bool = False,
) -> PlannedSparse:
    """Plan sparse maps on a finished tape (or several that are joined) and compute them once.

    Args:
        tape: the tape.
        request: what is asked.
        program: a program that made some of the tape's values, which the plan continues.
        seeds: the factors that an expression names.
        masked: whether the zeros of masks are left out of the pattern (see :class:`~chainrule.maps.sparse.SparseWorkspace`).
        chosen: whether what ops choose by value has the places of this run alone.
        compare: whether ways that will not be taken are costed, too (for ``explain``).
    """
    if isinstance(request, SparseExpression):
        if isinstance(request.expression, Jacobian):
            planned = plan_sparse(tape, _as_request(request, request.expression), masked=masked, chosen=chosen)
            planned = _renamed(planned, request.expression)
        else:
            planned = _plan_expression(tape, request, seeds, masked, chosen)
        return planned if request.sizes is None else _joined(planned, request.sizes)
    planned = _plan_request(tape, request, program, masked, chosen, compare)
    if not (masked and _sums_over_masks(planned)):
        return planned
    # Where a sum runs over the zeros of a mask, and all places are taken all the same, its kernel may be quicker than a list.
    other = _plan_request(tape, request, program, False, chosen, compare)
    return other if _is_better(other, planned) else planned


def _sums_over_masks(planned: PlannedSparse) -> bool:
    """Whether many entries for which the zeros of masks were left out are summed at few places."""
    masks = sum(mask.numel() for mask in planned.workspace.fixed.masks)
    terms = sum(keys.numel() for block in planned.blocks for keys in block["keys"])
    return 0 < masks <= _LITTLE and terms > _SUMMED * sum(block["entries"] for block in planned.blocks)


def _is_better(other: PlannedSparse, planned: PlannedSparse) -> bool:
    """Whether a plan that knows nothing of masks has the same pattern, and costs less."""
    if other.patterns.keys() != planned.patterns.keys() or other.cost >= planned.cost:
        return False
    if any(not torch.equal(other.patterns[key].keys, pattern.keys) for key, pattern in planned.patterns.items()):
        return False
    other.workspace.masked = True  # zeros of masks would have been left out
    return True


#: The shapes of output and input of a block, its dtype, and the values and keys of its terms' entries.
Terms = tuple[tuple[tuple[int, ...], tuple[int, ...]], torch.dtype, list[tuple[torch.Tensor, torch.Tensor]]]


def listed_terms(
    tape: Any, request: SparseRequest, order: str, is_same: Callable[[torch.Tensor], bool], *, masked: bool, padded: bool
) -> dict[Key, Terms]:
    """The terms of every block in one order, as planning finds them for indices of which ``is_same`` says which ones are fixed.

    Keys are negative where there is no entry. ``masked`` and ``padded`` are those of the
    :class:`~chainrule.maps.sparse.SparseWorkspace`.
    """
    inputs, outputs = _slots(request)
    workspace = sparse_workspace(tape, (*inputs, *outputs), masked=masked, recorded=True)
    workspace.forward, workspace.is_same, workspace.padded = request.cast == "output", is_same, padded
    graph = structured_graph(tape, inputs, outputs, workspace)
    _refuse_complex(tape, graph)
    maps = _accumulated(tape, _condensed(tape, graph, request, workspace), inputs, outputs, order, workspace)
    found: dict[Key, Terms] = {}
    for key, local in maps.items():
        terms = [t for t in local.terms if t.scale != 0.0 and not any(a.size == 0 for a in t.all_axes())]
        if terms:
            placed = [placed_entries(term, workspace) for term in merge(terms, workspace, force=False)]
            dtype = _dtype_of(request, tape, workspace)(key)
            found[key] = (local.out_shape, local.in_shape), dtype, placed
    return found


def _dtype_of(request: SparseRequest, tape: Any, workspace: SparseWorkspace) -> Callable[[Key], torch.dtype]:
    """The dtypes of the results."""
    dtypes = {"input": lambda key: tape.values[key[1]].dtype, "output": lambda key: tape.values[key[0]].dtype}
    return dtypes.get(request.cast, lambda key: workspace.dtype)


def _plan_request(
    tape: Any, request: SparseRequest, program: Program | None, masked: bool, chosen: bool, compare: bool
) -> PlannedSparse:
    inputs, outputs = _slots(request)
    workspace = sparse_workspace(tape, (*inputs, *outputs), program=program, masked=masked, chosen=chosen)
    workspace.forward = request.cast == "output"
    graph = structured_graph(tape, inputs, outputs, workspace)
    _refuse_complex(tape, graph)
    short = _condensed(tape, graph, request, workspace)

    def find(order: str) -> Found:
        found = find_blocks(_accumulated(tape, short, inputs, outputs, order, workspace), workspace)
        return found if request.triangle is None else triangle_of(found, position, request.triangle)

    def position(key: Key) -> Key:
        return request.numbers[request.outputs.index(key[0])], request.inputs.index(key[1])

    orders = ("reverse", "forward") if request.order == "auto" else (request.order,)
    if request.order == "auto" and not compare and _is_one_way(short, inputs):
        orders = ("reverse",)
    candidates = _compared(orders, find, workspace)
    if request.symmetric and request.triangle is None:
        candidates.append(_one_triangle(candidates, position, workspace))
    if request.order == "auto":
        _add_coloured(tape, request, candidates, workspace)
    others = _others(tape, request, candidates, workspace) if compare else []
    planned = _settled(candidates, graph, workspace, _dtype_of(request, tape, workspace))
    planned.candidates.extend(others)
    return planned


def _is_one_way(graph: Graph, inputs: Sequence[int]) -> bool:
    """Whether both orders take the same products."""
    direct = all(source in inputs for edges in graph.into.values() for source, _ in edges)
    return (direct and graph.into.keys().isdisjoint(inputs)) or _is_even_chain(graph)


def _is_even_chain(graph: Graph) -> bool:
    """Whether the graph is a long chain of maps with about as many entries each: then both orders take the same products."""
    into = [incoming[0][1] for incoming in graph.into.values() if len(incoming) == 1]
    if len(into) < max(len(graph.into), _CHAIN) or any(len(outgoing) > 1 for outgoing in graph.out_of.values()):
        return False
    counts = [sum(map(count_entries, local.terms)) for local in into]
    return max(counts) <= _EVEN * min(counts)


Candidates = list[tuple[Candidate, Found]]


def _compared(orders: Sequence[str], find: Callable[[str], Found], workspace: SparseWorkspace) -> Candidates:
    """The entries of every block, accumulated in several orders."""
    candidates: Candidates = []
    for order in orders:
        found = find(order)
        candidates.append((elimination.measure(Candidate(order, block_nodes(found, workspace))), found))
        if sum(e.keys.numel() for block in found.values() for e in block.entries) > _LARGE:
            break
    return candidates


def _one_triangle(
    candidates: Candidates, position: Callable[[Key], Key], workspace: SparseWorkspace
) -> tuple[Candidate, Found]:
    """The cheapest way to a symmetric matrix, for one triangle only."""
    best, found = min(candidates, key=lambda c: c[0].cost)
    half = mirrored(found, position)
    return elimination.measure(Candidate(f"{best.name}, one triangle", block_nodes(half, workspace))), half


def _add_coloured(tape: Any, request: SparseRequest, candidates: Candidates, workspace: SparseWorkspace) -> None:
    """Add the same entries from compressed columns, where that could cost less."""
    for kind in ("star colours", "colours"):
        best, found = min(candidates, key=lambda c: c[0].cost)
        nodes = _coloured(kind, tape, request, found, best.cost, workspace)
        if nodes:
            candidates.append((elimination.measure(Candidate(kind, nodes)), found))


def _coloured(
    kind: str, tape: Any, request: SparseRequest, found: Found, least: float, workspace: SparseWorkspace
) -> dict[Key, Node] | None:
    """The entries from compressed columns; None where they are not told apart by these colours, or cost more."""
    keys = {key: block.pattern.keys for key, block in found.items()}
    if kind == "star colours" and request.symmetric:
        numbers = dict(zip(request.outputs, request.numbers, strict=True))
        return by_stars(tape, keys, numbers, request.inputs, least, workspace.dtype, workspace.device)
    if kind == "colours" and request.triangle is None:
        return by_columns(tape, keys, least, workspace.dtype, workspace.device)
    return None


def _others(tape: Any, request: SparseRequest, candidates: Candidates, workspace: SparseWorkspace) -> list[Candidate]:
    """What compressed columns would cost, where they are not among the candidates."""
    found = candidates[0][1]
    if request.order != "auto" or sum(block.pattern.keys.numel() for block in found.values()) > _SHOWN:
        return []
    known = {candidate.name for candidate, _ in candidates}
    made = {
        kind: _coloured(kind, tape, request, found, math.inf, workspace)
        for kind in ("star colours", "colours") if kind not in known
    }  # fmt: skip
    return [elimination.measure(Candidate(kind, nodes)) for kind, nodes in made.items() if nodes]


def _settled(
    candidates: Candidates, graph: Graph, workspace: SparseWorkspace, dtype_of: Callable[[Key], torch.dtype]
) -> PlannedSparse:
    """Compute what costs least."""
    best, found = min(candidates, key=lambda c: c[0].cost)
    results: dict[Key, Staged] = {}
    for key, node in best.nodes.items():
        value, dtype = node.force(workspace.program), dtype_of(key)
        results[key] = value if value.dtype == dtype else value.to(dtype)
    workspace.memo.clear()
    patterns = {key: block.pattern for key, block in found.items()}
    blocks = [
        {
            "output": output, "input": slot, "shape": (p.rows, p.columns), "entries": p.keys.numel(),
            "terms": [e.factor.node.sizes for e in found[output, slot].entries],
            "keys": [e.keys for e in found[output, slot].entries], "dense": p.keys.numel() == p.rows * p.columns,
        }
        for (output, slot), p in patterns.items()
    ]  # fmt: skip
    every = [candidate for candidate, _ in candidates]
    return PlannedSparse(workspace.program, results, patterns, workspace, graph, every, best.name, blocks)


# Expressions.


def _as_request(request: SparseExpression, jacobian: Jacobian) -> SparseRequest:
    """A request for a Jacobian."""
    outputs = tuple(slot for slot in jacobian.outputs if slot is not None)
    numbers = tuple(number for number, slot in enumerate(jacobian.outputs) if slot is not None)
    symmetric = request.symmetric and len(set(outputs)) == len(outputs) and len(set(jacobian.inputs)) == len(jacobian.inputs)
    return SparseRequest(jacobian.inputs, outputs, cast="neither", numbers=numbers, symmetric=symmetric)


def _renamed(planned: PlannedSparse, jacobian: Jacobian) -> PlannedSparse:
    """A plan whose blocks are named by the numbers of output and input."""
    names = [
        ((o, i), (slot, source)) for o, slot in enumerate(jacobian.outputs) for i, source in enumerate(jacobian.inputs)
        if slot is not None and (slot, source) in planned.patterns
    ]  # fmt: skip
    return replace(
        planned, results={name: planned.results[key] for name, key in names},
        patterns={name: planned.patterns[key] for name, key in names},
    )  # fmt: skip


def _plan_expression(
    tape: Any, request: SparseExpression, seeds: Sequence[torch.Tensor], masked: bool, chosen: bool
) -> PlannedSparse:
    workspace = sparse_workspace(tape, (*request.inputs, *request.outputs), masked=masked, chosen=chosen)
    whole = Graph()
    graphs = {jacobian: structured_graph(tape, *_slots(jacobian), workspace) for jacobian in jacobians(request.expression)}
    for graph in graphs.values():
        _refuse_complex(tape, graph)
        whole.include(graph)
    short = {jacobian: _condensed(tape, graph, jacobian, workspace) for jacobian, graph in graphs.items()}

    def find(order: str) -> Found:
        made = {j: _accumulated(tape, graph, *_slots(j), order, workspace) for j, graph in short.items()}
        return find_blocks(Builder(made, seeds, workspace).blocks(request.expression), workspace)

    candidates = _compared(("reverse", "forward"), find, workspace)
    if request.symmetric:
        candidates.append(_one_triangle(candidates, lambda key: key, workspace))
    return _settled(candidates, whole, workspace, lambda key: workspace.dtype)


def described_entries(
    tape: Any, request: SparseExpression, seeds: Sequence[torch.Tensor], limit: int
) -> dict[Key, list[Term]] | None:
    """The terms of the blocks of an expression with relations in place of what a dense sum over them would be.

    Nothing but indices is computed. None where the entries cannot be listed (there are complex values in between), or those of
    one op, or the pairs of entries that meet in a product, are more than ``limit``.
    """
    workspace = sparse_workspace(tape, (*request.inputs, *request.outputs))
    workspace.limit = limit
    made: dict[Jacobian, dict[Key, LinearMap]] = {}
    try:
        for jacobian in jacobians(request.expression):
            graph = structured_graph(tape, *_slots(jacobian), workspace)
            if _has_complex(tape, graph):
                return None
            made[jacobian] = _accumulated(tape, graph, *_slots(jacobian), "reverse", workspace)
        blocks = Builder(made, seeds, workspace).blocks(request.expression)
        found = {key: [settle(term, workspace) for term in local.terms] for key, local in blocks.items()}
    except TooManyError:
        return None
    workspace.memo.clear()
    return found


def predicted_entries(tape: Any, request: SparseExpression, seeds: Sequence[torch.Tensor], limit: int) -> int | None:
    """How many entries the terms of an expression have, those of several terms at one place counted each.

    None where :func:`described_entries` has none.
    """
    found = described_entries(tape, request, seeds, limit)
    return None if found is None else sum(count_entries(term) for terms in found.values() for term in terms)


def _joined(planned: PlannedSparse, sizes: tuple[tuple[int, ...], tuple[int, ...]]) -> PlannedSparse:
    """A plan for one matrix of all blocks."""
    if not planned.patterns:
        return planned
    pattern, order = as_matrix(planned.patterns, sizes, planned.workspace.device)
    parts = [planned.results[key] for key in planned.patterns]
    value = parts[0]
    if order is not None:
        value = planned.program.call(torch.cat, parts)
        value = torch.index_select(value, 0, planned.program.constant(order))
    return replace(planned, results={(0, 0): value}, patterns={(0, 0): pattern})


def freeze(program: Program, workspace: SparseWorkspace, wanted: Sequence[Staged]) -> None:
    """Keep what is the same in every run with these indices as constants of the program."""
    exact = workspace.fixed.exact()
    values: dict[int, Any] = {}
    for staged in (*program._known.values(), *program._input_values.values()):
        for item in staged if isinstance(staged, tuple) else (staged,):
            values[item.slot] = item.value
    for key, slot in exact.items():
        program.constants[slot] = kept(values[slot])
        del program.inputs[key]
    rest = []
    for instruction in program.instructions:
        fixed = all(Staged(program, slot, None) in workspace.fixed for slot in instruction.outputs)  # type: ignore[arg-type]
        if not (fixed and instruction.outputs and all(slot in values for slot in instruction.outputs)):
            rest.append(instruction)
    made = {slot for instruction in rest for slot in instruction.outputs}
    read = {slot for i in rest for slot in reads(i)} | {staged.slot for staged in wanted}
    given = set(program.inputs.values())
    for slot in read - made - given - program.constants.keys():
        program.constants[slot] = plain(values[slot])
    program.constants = {slot: value for slot, value in program.constants.items() if slot in read}
    program.instructions = rest


__all__ = [
    "PlannedSparse", "SparseExpression", "SparseRequest", "described_entries", "find_patterns", "freeze", "listed_terms",
    "plan_sparse", "predicted_entries", "structured_graph",
]  # fmt: skip
