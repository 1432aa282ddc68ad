"""Accounts of executed plans, collected on request (``explain`` reads them)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from chainrule.execute.memory import Memory, Watch
from chainrule.maps.staging import Instruction
from chainrule.plan.algebra import AlgebraRequest
from chainrule.plan.elimination import Candidate
from chainrule.plan.graph import Graph
from chainrule.plan.planner import Request
from chainrule.settings import setting
from chainrule.shortcuts import configure


@dataclass
class Account:
    """What one execution of a request did.

    Attributes:
        kind: ``jacobian``, ``sparse``, ``pull`` or ``push``.
        order: the order asked for: ``forward``, ``reverse`` or ``auto``.
        chosen: the order taken.
        input_shapes: shapes of what is differentiated with respect to.
        output_shapes: shapes of what is differentiated.
        recorded: how many ops the tape holds.
        ops: the ops between inputs and outputs: name, kind (structured / decomposed / opaque), family, output shapes.
        alternatives: predicted cost of every order: flops, bytes moved, peak bytes.
        calls: the straight-line program: function names and result shapes.
        vertices: the values between inputs and outputs: slot, shape, role, and the op that makes it, with its kind and family.
        edges: the local Jacobians: source and target slot, number of terms, numbers stored, numbers that it would have dense.
        eliminated: the slots in the order in which they are eliminated; empty if the network is contracted as a whole.
        steps: what the plan computes: label, shape, flops, bytes moved.
        memory: predicted bytes: ``recorded`` (values of the run that are kept), ``temporaries``, ``results``, and
            ``peak``, the most of this level alone while all of its record is kept.
        uncounted: the calls whose work space is not in these figures.
        blocks: of a sparse result, per block its slots, shape, entries, the arrays that its terms hold, the
            dense blocks that these fill (how many, and their rows and columns; None for none), and whether all of it is dense.
    """

    kind: str
    order: str
    chosen: str
    input_shapes: list[tuple[int, ...]]
    output_shapes: list[tuple[int, ...]]
    recorded: int
    ops: list[dict[str, Any]] = field(default_factory=list)
    alternatives: list[dict[str, Any]] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    vertices: list[dict[str, Any]] = field(default_factory=list)
    edges: list[dict[str, Any]] = field(default_factory=list)
    eliminated: list[int] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    uncounted: list[str] = field(default_factory=list)
    blocks: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Ledger:
    """The accounts of one explained call.

    Attributes:
        accounts: one per executed request, innermost transforms first.
        loops: ops that ``vmap`` ran by a loop over the samples.
    """

    accounts: list[Account] = field(default_factory=list)
    loops: list[str] = field(default_factory=list)


_LEDGER: ContextVar[Ledger | None] = ContextVar("chainrule_ledger", default=None)
configure(ledger=_LEDGER)


#: In place of a ledger: plans are made anew, and nothing is written down.
UNCACHED = Ledger()

#: In place of a ledger: what suits a sweep is swept, the rest is planned anew.
SWEPT = Ledger()


#: The ledger that is being filled in this context, or None.
read_ledger = _LEDGER.get


def current_ledger() -> Ledger | None:
    """The ledger that is being filled in this context, if any."""
    return _LEDGER.get()


@contextmanager
def collecting(ledger: Ledger | None = None) -> Iterator[Ledger]:
    """Collect accounts of everything executed inside."""
    ledger = Ledger() if ledger is None else ledger
    token = _LEDGER.set(ledger)
    try:
        yield ledger
    finally:
        _LEDGER.reset(token)


def uncollected() -> AbstractContextManager[None]:
    """Run what is inside as if nobody collected accounts."""
    return setting(_LEDGER, None)


def account_of(
    tape: Any,
    request: Request | AlgebraRequest,
    graph: Graph,
    chosen: str,
    candidates: Sequence[Candidate],
    calls: Sequence[Instruction],
    memory: Memory | None = None,
) -> Account:
    """The account of a plan that ran."""
    taken = next((c for c in candidates if c.name == chosen), candidates[0] if candidates else None)
    watch = Watch()
    watch.add_run(tape)
    slots = dict.fromkeys((*request.inputs, *request.outputs))
    size = max((tape.values[slot].element_size() for slot in slots), default=4)
    return Account(
        kind=request.kind,
        order=chosen if request.kind in ("pull", "push") else request.order,
        chosen=chosen,
        input_shapes=[tuple(tape.values[slot].shape) for slot in dict.fromkeys(request.inputs)],
        output_shapes=[tuple(tape.values[slot].shape) for slot in dict.fromkeys(request.outputs)],
        recorded=len(tape.records),
        ops=[
            {"op": str(step.op), "kind": step.kind, "family": step.family, "shapes": list(step.out_shapes)}
            for step in graph.steps
        ],
        alternatives=[
            {"order": c.name, "flops": c.flops, "bytes": c.moved * size, "peak_bytes": c.peak * size, "cost": c.cost}
            for c in candidates
        ],
        calls=[{"call": getattr(i.function, "__name__", str(i.function)), "results": len(i.outputs)} for i in calls],
        vertices=_vertices(tape, request, graph),
        edges=[
            {
                "source": source, "target": target, "terms": len(local.terms),
                "stored": sum(factor.node.numel for term in local.terms for factor in term.factors),
                "dense": tape.values[source].numel() * tape.values[target].numel(),
            }
            for target, incoming in graph.into.items() for source, local in incoming
        ],
        eliminated=list(taken.eliminated) if taken is not None else [],
        steps=[
            {"label": label, "shape": list(sizes), "flops": flops, "bytes": moved * size}
            for label, sizes, flops, moved in (taken.steps if taken is not None else ())
        ],
        memory={}
        if memory is None
        else {
            "recorded": watch.held, "temporaries": memory.temporaries, "results": memory.results,
            "peak": max(watch.peak, watch.held + memory.peak),
        },
        uncounted=[] if memory is None else list(memory.uncounted),
    )  # fmt: skip


def _vertices(tape: Any, request: Request | AlgebraRequest, graph: Graph) -> list[dict[str, Any]]:
    made = {slot: step for step in graph.steps for slot in step.outputs}
    found = []
    for slot in sorted({*request.inputs, *request.outputs, *graph.order, *graph.out_of}):
        step = made.get(slot)
        role = "input" if slot in request.inputs else "output" if slot in request.outputs else "inner"
        vertex = {"slot": slot, "shape": list(tape.values[slot].shape), "role": role, "op": "", "kind": "", "family": ""}
        if step is not None:
            vertex.update(op=str(step.op), kind=step.kind, family=step.family)
        found.append(vertex)
    return found
