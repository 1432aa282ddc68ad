"""Choosing a plan: candidates by elimination order, compared by cost, recorded as a program by their first execution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from chainrule.maps.compose import Workspace
from chainrule.maps.first_run import first_run, forced
from chainrule.maps.linear_map import LinearMap, add_maps, compose, densify
from chainrule.maps.nodes import Node, leaf
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Factor, Term, dims_of, new_axes
from chainrule.plan import elimination
from chainrule.plan.elimination import Candidate, Maps
from chainrule.plan.graph import Graph, build_graph

#: Up to this many vertices all orders of elimination are tried, greedy elimination among them.
_FEW_VERTICES = 64
#: From so many on one sweep is enough where the order matters little; below, both are looked at.
_MANY_VERTICES = 512


class Request(NamedTuple):
    """What is asked of a tape.

    Attributes:
        kind: ``jacobian``, ``pull`` (cotangents to the inputs), ``push`` (tangents to the outputs), ``trace`` (the sum of
            the traces of the Jacobians of the outputs with respect to the inputs, pair by pair) or ``gram`` (the products
            of Jacobians with transposed ones, summed over the inputs).
        inputs: the tape slots differentiated with respect to.
        outputs: the tape slots differentiated.
        order: ``forward``, ``reverse`` or ``auto`` (Jacobians only).
        seeds: which outputs (pull) or inputs (push) have a seed; the others' seeds are zero. Seeds with further dimensions
            behind those of their slot are several at once: these stand last in a push's results, first in a pull's.
        cast: whether results take the dtype of the ``input``, as in reverse mode, or of the ``output``, as in forward mode (whose
            derivative it is then, where torch's two modes differ).
        kernels: whether ops may pull single cotangents by kernels of their own, which nothing differentiates or batches.
        leading: whether several cotangents stand before the dimensions of their slot, as they do in the results.
        joined: whether torch's autograd makes a graph of the run: the fewest calls count then, also where some of them could
            be made once for many cotangents.
        mapped: whether mappings are around and nothing else: kernels that take samples as their batch serve there too.
    """

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    order: str = "auto"
    seeds: tuple[int, ...] = ()
    cast: str = "input"
    kernels: bool = False
    leading: bool = False
    joined: bool = False
    mapped: bool = False


@dataclass
class Planned:
    """A plan that ran once: its program, its results in that run, and how it was chosen.

    Attributes:
        keys: what each result is: ``(output slot, input slot)`` of a Jacobian, ``(output slot, output slot)`` of a gram,
            ``"trace"``, a slot otherwise.
        results: staged results, None for zeros.
    """

    program: Program
    keys: list[Any]
    results: list[Staged | None]
    graph: Graph
    chosen: str
    candidates: list[Candidate] = field(default_factory=list)


def make_workspace(tape: Any, slots: Sequence[int]) -> Workspace:
    """The dtype and device in which maps between these slots are computed."""
    dtype: torch.dtype | None = None
    device = torch.device("cpu")
    for slot in slots:
        value = tape.values[slot]
        real = value.dtype.to_real() if value.dtype.is_complex else value.dtype
        if real.is_floating_point:
            dtype = real if dtype is None else torch.promote_types(dtype, real)
            device = value.device
    return Workspace(dtype or torch.get_default_dtype(), device)


def plan(tape: Any, request: Request, seeds: Sequence[torch.Tensor], *, compare: bool = False) -> Planned:
    """Plan a request on a finished tape and execute it once.

    Args:
        tape: the tape.
        request: what is asked.
        seeds: the seed tensors, in the order of ``request.seeds``.
        compare: whether to predict the cost of the other orders too when the order is pinned (for ``explain``).
    """
    slots = (*request.inputs, *request.outputs)
    workspace = make_workspace(tape, slots)
    workspace.kernels, workspace.repeated = request.kernels, request.kind == "pull" and not request.joined
    workspace.mapped, workspace.forward = request.mapped, request.cast == "output"
    inputs, outputs = list(dict.fromkeys(request.inputs)), list(dict.fromkeys(request.outputs))
    graph = build_graph(tape, inputs, outputs, workspace)
    if request.kind in ("trace", "gram"):
        planned = _plan_contracted(tape, request, graph, inputs, outputs, workspace)
    elif request.kind == "jacobian":
        planned = _plan_jacobian(tape, request, graph, inputs, outputs, workspace, compare)
    else:
        planned = _plan_sweep(tape, request, graph, seeds, workspace)
    # Nodes refer to the tape and to each other: without this the run's tensors would wait for the garbage collector.
    workspace.memo.clear()
    return planned


def _shapes(tape: Any) -> Any:
    return lambda slot: tuple(tape.values[slot].shape)


def accumulations(
    tape: Any, request: Request, graph: Graph, inputs: list[int], outputs: list[int], workspace: Workspace
) -> dict[str, Any]:
    """The ways to accumulate that the request allows, by name: what makes the maps, and the order of elimination."""
    shapes = _shapes(tape)
    chosen: list[int] = []
    makers: dict[str, Any] = {
        "reverse": lambda: elimination.reverse(graph, inputs, outputs, shapes, workspace),
        "forward": lambda: elimination.forward(graph, inputs, outputs, shapes, workspace),
    }
    operators = [operator for edges in graph.into.values() for _, local in edges for operator in local.operators]
    if request.order != "auto":
        makers = {request.order: makers[request.order]}
    elif any(operator.whole for operator in operators):
        # What a user's backward makes of a cotangent, which it may clip.
        del makers["forward"]
    else:
        has_operators = bool(operators)
        makers["network"] = lambda: elimination.reverse(graph, inputs, outputs, shapes, workspace, eager=False)
        if not has_operators and len(graph.order) <= _FEW_VERTICES:
            makers["greedy"] = lambda: elimination.greedy(graph, inputs, outputs, shapes, workspace, chosen)
    inner = elimination.inner_slots(graph, inputs, outputs)
    orders = {"reverse": inner[::-1], "forward": inner, "network": [], "greedy": chosen}
    return {name: (makers[name], orders[name]) for name in _in_turn(tape, list(makers), graph, inputs, outputs)}


def _in_turn(tape: Any, names: list[str], graph: Graph, inputs: list[int], outputs: list[int]) -> list[str]:
    """The orders as they are tried: on a long tape the sweep that begins at the fewer elements first."""
    if len(graph.order) <= _FEW_VERTICES or "forward" not in names:
        return names
    rows, columns = (sum(tape.values[slot].numel() for slot in slots) for slots in (outputs, inputs))
    return names if rows <= columns else ["forward", *(name for name in names if name != "forward")]


def is_settled(found: Sequence[Candidate], vertices: int) -> bool:
    """Whether the plans so far, on a tape of so many vertices, are as good as any: the tape is long, and they are mostly calls.

    What a further order could save is then less than it takes to find it: a loop over small tensors takes a sweep or two.
    """
    enough = 1 if vertices > _MANY_VERTICES else 2
    return vertices > _FEW_VERTICES and len(found) >= enough and found[-1].is_mostly_calls


def compared(
    makers: dict[str, Any], vertices: int, evaluate: Callable[[str, Any], Candidate], first: str = ""
) -> list[Candidate]:
    """The candidates of the orders in `makers`, with their predicted costs, until one is as good as any.

    Args:
        makers: what :func:`accumulations` returns.
        vertices: how many vertices the graph has.
        evaluate: makes the candidate of a name and what makes its maps.
        first: the name of the order that is needed in any case.
    """
    found: list[Candidate] = []
    for name in sorted(makers, key=lambda name: name != first) if first else makers:
        make, eliminated = makers[name]
        candidate = evaluate(name, make)
        candidate.eliminated = eliminated
        found.append(elimination.measure(candidate))
        if is_settled(found, vertices):
            break
    return found


def candidates(
    tape: Any, request: Request, graph: Graph, inputs: list[int], outputs: list[int], workspace: Workspace, first: str = ""
) -> list[Candidate]:
    """The ways to compute a Jacobian that the request allows, with their predicted costs."""

    def evaluate(name: str, make: Callable[[], Maps]) -> Candidate:
        maps = make()
        return Candidate(name, {key: densify(m, workspace) for key, m in maps.items()}, maps)

    makers = accumulations(tape, request, graph, inputs, outputs, workspace)
    return compared(makers, len(graph.order), evaluate, first)


def _plan_jacobian(
    tape: Any, request: Request, graph: Graph, inputs: list[int], outputs: list[int], workspace: Workspace,
    compare: bool,
) -> Planned:
    asked = request._replace(order="auto") if compare else request
    pinned = "" if request.order == "auto" else request.order
    found = candidates(tape, asked, graph, inputs, outputs, workspace, pinned)
    allowed = found if request.order == "auto" else [c for c in found if c.name == request.order]
    if not allowed:  # what is pinned is not among what may be chosen
        found = allowed = candidates(tape, request, graph, inputs, outputs, workspace, pinned)
    best = min(allowed, key=lambda c: c.cost)
    program = first_run()
    keys = [(o, i) for o in outputs for i in inputs]
    results: list[Staged | None] = []
    for (output, slot), made in zip(keys, forced(program, [best.nodes.get(key) for key in keys]), strict=True):
        target = tape.values[output if request.cast == "output" else slot].dtype
        results.append(None if made is None else _cast(made, target))
    program.let_go({made.slot for made in results if made is not None})
    return Planned(program, keys, results, graph, best.name, found)


def _plan_contracted(
    tape: Any, request: Request, graph: Graph, inputs: list[int], outputs: list[int], workspace: Workspace
) -> Planned:
    """Traces and grams: the last product is left to the contraction, which need not form the Jacobian."""
    contracted = _traces if request.kind == "trace" else _grams

    def evaluate(name: str, make: Callable[[], Maps]) -> Candidate:
        maps = contracted(request, make(), workspace)
        return Candidate(name, {key: densify(m, workspace) for key, m in maps.items()})

    makers = accumulations(tape, request, graph, inputs, outputs, workspace)
    found = compared(makers, len(graph.order), evaluate)
    best = min(found, key=lambda c: c.cost)
    program = Program()
    keys: list[Any] = ["trace"] if request.kind == "trace" else [(one, two) for one in outputs for two in outputs]
    results: list[Staged | None] = []
    for key in keys:
        node = best.nodes.get(key)
        if node is None and request.kind == "gram" and (node := best.nodes.get((key[1], key[0]))) is not None:
            first, second = (len(tape.values[slot].shape) for slot in key)
            order = (*range(second, second + first), *range(second))
            results.append(torch.permute(node.force(program), order))
            continue
        results.append(None if node is None else node.force(program))
    return Planned(program, keys, results, graph, best.name, found)


def _traces(request: Request, maps: Maps, workspace: Workspace) -> dict[Any, LinearMap]:
    parts: list[LinearMap] = []
    for output, slot in zip(request.outputs, request.inputs, strict=True):
        if (local := maps.get((output, slot))) is not None:
            axes = dims_of(new_axes(local.in_shape))
            same = LinearMap((*local.in_shape, *local.in_shape), (), (Term((*axes, *axes), ()),))
            rows = tuple(replace(term, out_dims=(), in_dims=(*term.out_dims, *term.in_dims)) for term in local.terms)
            parts.append(compose(LinearMap((), same.out_shape, rows), same, workspace, eager=False))
    total = [part for part in parts if not part.is_zero]
    return {"trace": add_maps(total, workspace)} if total else {}


def _grams(request: Request, maps: Maps, workspace: Workspace) -> dict[Any, LinearMap]:
    """One triangle of the blocks."""
    found: dict[Any, LinearMap] = {}
    outputs = list(dict.fromkeys(request.outputs))
    for position, one in enumerate(outputs):
        for two in outputs[position:]:
            parts = [
                compose(maps[one, slot], maps[two, slot].transpose(), workspace, eager=False)
                for slot in dict.fromkeys(request.inputs)
                if (one, slot) in maps and (two, slot) in maps
            ]
            total = [part for part in parts if not part.is_zero]
            if total:
                found[one, two] = add_maps(total, workspace)
    return found


def _cast(value: Staged, dtype: torch.dtype) -> Staged:
    if value.dtype == dtype or value.dtype.is_complex != dtype.is_complex:
        return value
    return value.to(dtype)


def seed_map(
    tape: Any, slot: int, number: int, seeds: Sequence[torch.Tensor], transposed: bool, *, leading: bool = False
) -> LinearMap:
    """A cotangent as the map to a scalar, or a tangent as the map from one.

    A seed with further dimensions behind those of its slot (before them with ``leading``) stands for several: it is the map
    to (from) these dimensions.
    """
    shape, sizes = tuple(tape.values[slot].shape), tuple(seeds[number].shape)
    several = sizes[: len(sizes) - len(shape)] if leading else sizes[len(shape) :]
    axes, columns = new_axes(shape), new_axes(several)
    node = leaf(sizes, lambda program: program.input(("seed", number), seeds[number]), label="seed")
    factors = (Factor(node, (*columns, *axes) if leading else (*axes, *columns)),)
    if transposed:
        return LinearMap(shape, several, (Term(dims_of(axes), dims_of(columns), factors),))
    return LinearMap(several, shape, (Term(dims_of(columns), dims_of(axes), factors),))


def _plan_sweep(
    tape: Any, request: Request, graph: Graph, seeds: Sequence[torch.Tensor], workspace: Workspace
) -> Planned:
    inputs, outputs = list(dict.fromkeys(request.inputs)), list(dict.fromkeys(request.outputs))
    forward = request.kind == "push"
    seeded: dict[int, LinearMap] = {}
    extra: dict[int, list[LinearMap]] = {}
    for number, slot in enumerate(request.seeds):
        made = seed_map(tape, slot, number, seeds, forward, leading=request.leading)
        if slot in seeded:
            extra.setdefault(slot, [seeded[slot]]).append(made)
        else:
            seeded[slot] = made
    for slot, several in extra.items():
        seeded[slot] = elimination.add_maps(several, workspace, force=True)
    if forward:
        maps = elimination.sweep_forward(graph, seeded, outputs, workspace)
        keys = outputs
    else:
        maps = elimination.sweep_back(graph, seeded, inputs, workspace)
        keys = inputs
    nodes = {slot: densify(m, workspace) for slot, m in maps.items()}
    # Before they are computed: what is known already costs nothing.
    candidate = elimination.measure_nodes("forward" if forward else "reverse", nodes)
    program = first_run()
    results = [
        None if made is None else _cast(made, tape.values[slot].dtype)
        for slot, made in zip(keys, forced(program, [nodes.get(slot) for slot in keys]), strict=True)
    ]
    program.let_go({made.slot for made in results if made is not None})
    return Planned(program, list(keys), results, graph, candidate.name, [candidate])


__all__ = ["Node", "Planned", "Request", "accumulations", "candidates", "make_workspace", "plan"]
