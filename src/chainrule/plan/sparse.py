"""Plans of sparse Jacobians: the pattern from the structure of the maps, the values by one short program."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from chainrule.maps.linear_map import LinearMap, compose, merge
from chainrule.maps.nodes import Node
from chainrule.maps.nonzeros import Entries, entries_of, values_node
from chainrule.maps.sparse import SparseWorkspace, plain
from chainrule.maps.staging import Program, Staged, refs
from chainrule.maps.terms import identity
from chainrule.plan import elimination
from chainrule.plan.colouring import compressed_nodes, worth_colouring
from chainrule.plan.elimination import Candidate
from chainrule.plan.graph import Graph, build_graph
from chainrule.plan.planner import make_workspace

#: With more entries than this the second order is not tried: it would take longer than it could save.
_LARGE = 1 << 22


class SparseRequest(NamedTuple):
    """What is asked of a tape.

    Attributes:
        inputs: the tape slots differentiated with respect to.
        outputs: the tape slots differentiated.
        order: ``forward``, ``reverse`` or ``auto``.
        cast: whether results take the dtype of the ``input`` or of the ``output``.
        triangle: ``lower`` or ``upper``: outputs are derivatives with respect to the inputs, and that triangle is wanted; None
            for all.
        numbers: for a triangle, the number of the input that each output is the derivative with respect to.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    order: str = "auto"
    cast: str = "input"
    triangle: str | None = None
    numbers: tuple[int, ...] = ()


class Pattern(NamedTuple):
    """Where a block may have non-zeros.

    Attributes:
        out_shape: the shape of the output.
        in_shape: the shape of the input.
        keys: rows times the number of columns plus columns of the flattened block, sorted, each once.
    """

    out_shape: tuple[int, ...]
    in_shape: tuple[int, ...]
    keys: torch.Tensor

    @property
    def rows(self) -> int:
        """The number of rows of the flattened block."""
        return math.prod(self.out_shape)

    @property
    def columns(self) -> int:
        """The number of columns of the flattened block."""
        return math.prod(self.in_shape)


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
        blocks: per block, for ``explain``: its slots, shape, entries, the arrays that its terms hold, and whether it is dense.
    """

    program: Program
    results: dict[tuple[int, int], Staged]
    patterns: dict[tuple[int, int], Pattern]
    workspace: SparseWorkspace
    graph: Graph
    candidates: list[Candidate] = field(default_factory=list)
    chosen: str = ""
    blocks: list[dict[str, Any]] = field(default_factory=list)


Found = dict[tuple[int, int], tuple[Pattern, list[Entries]]]


def sparse_workspace(
    tape: Any, slots: Sequence[int], widened: frozenset[int] = frozenset(), program: Program | None = None
) -> SparseWorkspace:
    """A workspace for maps between these slots."""
    plainly = make_workspace(tape, slots)
    return SparseWorkspace(plainly.dtype, plainly.device, widened, program)


def structured_graph(tape: Any, inputs: list[int], outputs: list[int], workspace: SparseWorkspace) -> Graph:
    """The graph of local Jacobians, each a sum of terms with concrete relations."""
    graph = build_graph(tape, inputs, outputs, workspace)
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
    if any(tape.values[slot].is_complex() for slot in (*graph.order, *graph.out_of)):
        raise RuntimeError(
            "chainrule: complex values between the inputs and the outputs: sparse layouts work on real ones only. Use "
            "layout='dense'"
        )


def _structured(local: LinearMap, workspace: SparseWorkspace) -> LinearMap:
    terms = list(local.terms)
    for operator in local.operators:
        if operator.structure is not None:
            terms.extend(operator.structure())
            continue
        shape = local.out_shape
        seed = LinearMap(shape, shape, (identity(shape),))
        terms.extend(compose(seed, replace(local, terms=(), operators=(operator,)), workspace, eager=True).terms)
    return LinearMap(local.out_shape, local.in_shape, tuple(workspace.from_tape(term) for term in terms))


def find_entries(
    tape: Any, request: SparseRequest, graph: Graph, order: str, workspace: SparseWorkspace
) -> Found:
    """The entries of every block, accumulated in one order."""
    inputs, outputs = list(dict.fromkeys(request.inputs)), list(dict.fromkeys(request.outputs))
    shapes = lambda slot: tuple(tape.values[slot].shape)  # noqa: E731
    accumulate = elimination.forward if order == "forward" else elimination.reverse
    maps = accumulate(graph, inputs, outputs, shapes, workspace)
    found: Found = {}
    for (output, slot), local in maps.items():
        terms = [t for t in local.terms if t.scale != 0.0 and not any(a.size == 0 for a in t.all_axes())]
        entries = [entries_of(term, workspace) for term in merge(terms, workspace, force=False)]
        if not entries:
            continue
        if math.prod(local.out_shape) * math.prod(local.in_shape) >= 2**62:
            raise RuntimeError("chainrule: a sparse block of 2⁶² or more places is more than its indices can count")
        keys = torch.unique(torch.cat([e.keys for e in entries]))
        if request.triangle is not None:
            keys = keys[_in_triangle(keys, request, output, slot, math.prod(local.in_shape))]
        if keys.numel():
            found[output, slot] = Pattern(local.out_shape, local.in_shape, keys), entries
    return found


def find_patterns(
    tape: Any, request: SparseRequest, widened: frozenset[int] = frozenset()
) -> dict[tuple[int, int], Pattern]:
    """Where every block may have non-zeros; nothing but indices is computed.

    Args:
        tape: the finished tape.
        request: what is asked.
        widened: slots of indices and masks that could select anything.
    """
    inputs, outputs = list(dict.fromkeys(request.inputs)), list(dict.fromkeys(request.outputs))
    workspace = sparse_workspace(tape, (*inputs, *outputs), widened)
    graph = structured_graph(tape, inputs, outputs, workspace)
    found = find_entries(tape, request, graph, "reverse", workspace)
    workspace.memo.clear()
    return {key: pattern for key, (pattern, _) in found.items()}


def _in_triangle(keys: torch.Tensor, request: SparseRequest, output: int, slot: int, columns: int) -> torch.Tensor:
    row, column = request.numbers[request.outputs.index(output)], request.inputs.index(slot)
    if row != column:
        wanted = (row > column) == (request.triangle == "lower")
        return torch.full_like(keys, wanted, dtype=torch.bool)
    rows, places = keys // max(columns, 1), keys % max(columns, 1)
    return rows >= places if request.triangle == "lower" else rows <= places


def plan_sparse(tape: Any, request: SparseRequest, program: Program | None = None) -> PlannedSparse:
    """Plan sparse Jacobians on a finished tape and compute them once.

    Args:
        tape: the tape.
        request: what is asked.
        program: a program that made some of the tape's values, which the plan continues.
    """
    inputs, outputs = list(dict.fromkeys(request.inputs)), list(dict.fromkeys(request.outputs))
    workspace = sparse_workspace(tape, (*inputs, *outputs), program=program)
    graph = structured_graph(tape, inputs, outputs, workspace)
    _refuse_complex(tape, graph)
    orders = ("reverse", "forward") if request.order == "auto" else (request.order,)
    candidates: list[tuple[Candidate, Found]] = []
    for order in orders:
        found = find_entries(tape, request, graph, order, workspace)
        nodes: dict[tuple[int, int], Node] = {
            key: values_node(entries, pattern.keys, workspace) for key, (pattern, entries) in found.items()
        }
        candidates.append((elimination.measure(Candidate(order, nodes)), found))
        if sum(e.keys.numel() for _, entries in found.values() for e in entries) > _LARGE:
            break
    if request.order == "auto" and (coloured := _coloured(tape, candidates, workspace)) is not None:
        candidates.append(coloured)
    best, found = min(candidates, key=lambda c: c[0].cost)
    results: dict[tuple[int, int], Staged] = {}
    for key, node in best.nodes.items():
        value = node.force(workspace.program)
        dtype = tape.values[key[0] if request.cast == "output" else key[1]].dtype
        results[key] = value if value.dtype == dtype else value.to(dtype)
    workspace.memo.clear()
    patterns = {key: pattern for key, (pattern, _) in found.items()}
    every = [candidate for candidate, _ in candidates]
    blocks = [
        {
            "output": output, "input": slot, "shape": (p.rows, p.columns), "entries": p.keys.numel(),
            "terms": [e.factor.node.sizes for e in entries], "dense": p.keys.numel() == p.rows * p.columns,
        }
        for (output, slot), (p, entries) in found.items()
    ]  # fmt: skip
    return PlannedSparse(workspace.program, results, patterns, workspace, graph, every, best.name, blocks)


def _coloured(
    tape: Any, candidates: Sequence[tuple[Candidate, Found]], workspace: SparseWorkspace
) -> tuple[Candidate, Found] | None:
    """The same entries from compressed columns, where that could cost less."""
    best, found = min(candidates, key=lambda c: c[0].cost)
    nodes: dict[tuple[int, int], Node] = {}
    for source in dict.fromkeys(slot for _, slot in found):
        keys = {output: pattern.keys for (output, slot), (pattern, _) in found.items() if slot == source}
        columns = tape.values[source].numel()
        if not worth_colouring(list(keys.values()), columns, best.cost):
            return None
        made = compressed_nodes(tape, source, keys, workspace.dtype, workspace.device)
        nodes.update({(output, source): node for output, node in made.items()})
    return (elimination.measure(Candidate("colours", nodes)), found) if nodes else None


def freeze(program: Program, workspace: SparseWorkspace, wanted: Sequence[Staged]) -> None:
    """Keep what is the same in every run with these indices as constants of the program."""
    exact, _ = workspace.guards()
    values: dict[int, Any] = {}
    for staged in (*program._known.values(), *program._input_values.values()):
        for item in staged if isinstance(staged, tuple) else (staged,):
            values[item.slot] = item.value
    for key, slot in exact.items():
        program.constants[slot] = plain(values[slot]).clone()
        del program.inputs[key]
    kept = []
    for instruction in program.instructions:
        fixed = all(workspace.is_fixed(Staged(program, slot, None)) for slot in instruction.outputs)  # type: ignore[arg-type]
        if not (fixed and instruction.outputs and all(slot in values for slot in instruction.outputs)):
            kept.append(instruction)
    made = {slot for instruction in kept for slot in instruction.outputs}
    read = {slot for i in kept for slot in refs((i.args, tuple(i.kwargs.values())))} | {staged.slot for staged in wanted}
    given = set(program.inputs.values())
    for slot in read - made - given - program.constants.keys():
        program.constants[slot] = plain(values[slot])
    program.constants = {slot: value for slot, value in program.constants.items() if slot in read}
    program.instructions = kept


__all__ = [
    "Pattern", "PlannedSparse", "SparseRequest", "find_entries", "find_patterns", "freeze", "plan_sparse", "structured_graph",
]  # fmt: skip
