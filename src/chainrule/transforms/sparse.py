"""Jacobians and Hessians as sparse tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from chainrule.batching.mode import VmapMode
from chainrule.batching.tensor import BatchTensor, wrap_batched
from chainrule.capture.guarded import GuardedRecorder
from chainrule.capture.recorder import Recorder
from chainrule.capture.tape import Tape
from chainrule.dispatch import TAKEN, LightMode, entry_point
from chainrule.execute.accounts import UNCACHED, collecting, current_ledger
from chainrule.execute.collection import postponed_collection
from chainrule.execute.engine import execute
from chainrule.execute.memory import counted
from chainrule.execute.open_plans import OpenPlan, record_open_plan
from chainrule.execute.sparse import execute_sparse, find_plan, keep_short, make_plan, plans_of, sparse_key
from chainrule.execute.sparse_plans import Found, Layouts, SparsePlan, planning
from chainrule.maps.staging import Program, Staged
from chainrule.modes_off import unseen, without_mode
from chainrule.plan.patterns import Pattern
from chainrule.plan.planner import Request
from chainrule.plan.sparse import SparseRequest, plan_sparse
from chainrule.rules.batching_base import Batched
from chainrule.rules.custom_function import FunctionOp
from chainrule.transforms.arguments import LEAF, Argnums, resolve_argnums, tree_unflatten
from chainrule.transforms.derivatives import grad
from chainrule.transforms.routes import NEST, Route, route_of, run_route
from chainrule.transforms.sparse_graphs import coo_tensor, csr_tensor
from chainrule.transforms.steps import refuse_hidden
from chainrule.transforms.tensor_hooks import refuse_hooks
from chainrule.transforms.trace import Traced, recording_on, trace

SPARSE = ("sparse_coo", "sparse_csr")


class _Way:
    """Holds a route, which knows of plans: for compiled functions, a transform that was called before is the same one."""

    __slots__ = ("route",)

    def __init__(self, route: Route | None) -> None:
        self.route = route


def sparse_jacobian(
    func: Callable[..., Any], argnums: Argnums, has_aux: bool, layout: str, name: str, order: str, cast: str,
    check: Callable[[Traced], None], triangle: str | None = None,
) -> Callable[..., Any]:
    """The transform of a sparse Jacobian.

    Args:
        func: the function.
        argnums: what it is differentiated with respect to.
        has_aux: whether it returns ``(output, aux)``.
        layout: ``sparse_coo`` or ``sparse_csr``.
        name: the transform's name, for messages.
        order: ``forward``, ``reverse`` or ``auto``.
        cast: whether results take the dtype of the ``input`` or of the ``output``.
        check: refuses runs that have no Jacobian.
        triangle: of a gradient's Jacobian, ``lower`` or ``upper`` for that triangle alone.
    """

    def extra(slot: int, grad_enabled: bool) -> Any:
        return (layout, *sparse_key(SparseRequest((0,), (slot,), order, cast)))

    routed = not has_aux and triangle is None
    way = _Way(route_of(func, name, argnums, NEST, extra, respect_no_grad=order != "forward") if routed else None)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        traced: Any = NotImplemented
        if way.route is not None:
            traced, result, _ = run_route(way.route, args, kwargs)
            if traced is None:
                return result
        positions, single = resolve_argnums(argnums, len(args), name)
        alone = traced is not NotImplemented
        if not alone:
            traced = trace(func, args, positions, kwargs, name, has_aux=has_aux, respect_no_grad=order != "forward")
        check(traced)
        refuse_hidden(traced.hidden, name)
        refuse_hooks(traced.tape, f"{name} with a sparse layout")
        sources, outputs = tuple(traced.in_slots), tuple(slot for slot in traced.out_slots if slot is not None)
        kinds = [(tuple(out.shape), out.dtype) for out in traced.out_leaves]
        found: Found = {}
        if triangle is None and outputs:
            traced.out_leaves = []  # the plan lets go of what it has read
            request = SparseRequest(sources, outputs, order, cast)
            if alone:
                plan = find_plan(traced.tape, request)
                if isinstance(plan, SparsePlan):
                    _shorten(traced, extra, layout, plan)
                found = plan.run(traced.tape, last=True)
            else:
                found = execute_sparse(traced.tape, request, last=True)
        blocks = []
        for number, (slot, (shape, out_dtype)) in enumerate(zip(traced.out_slots, kinds, strict=True)):
            if triangle is not None and slot is not None:
                # One gradient may serve two inputs, and have another part in the triangle for each.
                found = execute_sparse(traced.tape, SparseRequest(sources, (slot,), order, cast, triangle, (number,)))
            row = []
            for source, leaf in zip(traced.in_slots, traced.in_leaves, strict=True):
                known = found.get((slot, source)) if slot is not None else None
                dtype = out_dtype if cast == "output" else leaf.dtype
                row.append(sparse_tensor(known, shape, tuple(leaf.shape), dtype, leaf.device, layout, name))
            tree = tree_unflatten(row, traced.in_spec)
            blocks.append(tree[0] if single else tree)
        result = tree_unflatten(blocks, traced.out_spec)
        return (result, traced.aux) if has_aux else result

    return entry_point(wrapper, func)


def sparse_hessian(
    func: Callable[..., Any], argnums: Argnums, has_aux: bool, layout: str, triangular: str | None,
    check: Callable[[Traced], None],
) -> Callable[..., Any]:
    """The transform of a sparse Hessian.

    Args:
        func: the function.
        argnums: what it is differentiated with respect to.
        has_aux: whether it returns ``(output, aux)``.
        layout: ``sparse_coo`` or ``sparse_csr``.
        triangular: ``lower``, ``upper`` or None for all of it.
        check: refuses runs that have no Hessian.
    """
    of_gradient = sparse_jacobian(
        grad(func, argnums, has_aux), argnums, has_aux, layout, "hessian", "forward", "output", lambda traced: None, triangular
    )

    def extra(slot: int, grad_enabled: bool) -> Any:
        return layout, "hessian", (0,), slot, triangular, grad_enabled

    way = _Way(None if has_aux else route_of(func, "hessian", argnums, NEST, extra))

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        traced: Any = NotImplemented
        if way.route is not None:
            traced, result, _ = run_route(way.route, args, kwargs)
            if traced is None:
                return result
        positions, single = resolve_argnums(argnums, len(args), "hessian")
        alone = traced is not NotImplemented
        if not alone:
            traced = trace(func, args, positions, kwargs, "hessian", has_aux=has_aux)
        check(traced)
        refuse_hooks(traced.tape, "hessian with a sparse layout")
        if traced.tape.saw_blocked:
            # Only the first of the two derivatives takes what runs under no_grad for constant: not one tape.
            if len(traced.out_leaves) != 1 or traced.out_leaves[0].dim():
                raise RuntimeError(
                    "hessian: a part of the function runs under no_grad: the sparse layouts give the Hessian of one scalar then. "
                    "Use layout='dense'"
                )
            return of_gradient(*args, **kwargs)
        blocks = []
        for slot, out in zip(traced.out_slots, traced.out_leaves, strict=True):
            if slot is None:
                found: Found = {}
            elif out.numel() == 1:
                shorten = partial(_shorten, traced, extra, layout) if alone else None
                found = _curvature(traced, slot, triangular, shorten, last=len(traced.out_slots) == 1)
            else:
                found = _curvatures(traced, slot, triangular)
            rows = []
            for first, leaf in enumerate(traced.in_leaves):
                row = []
                for second, other in enumerate(traced.in_leaves):
                    known = found.get((first, second))
                    shape = (*out.shape, *leaf.shape)
                    row.append(sparse_tensor(known, shape, tuple(other.shape), leaf.dtype, leaf.device, layout, "hessian"))
                tree = tree_unflatten(row, traced.in_spec)
                rows.append(tree[0] if single else tree)
            tree = tree_unflatten(rows, traced.in_spec)
            blocks.append(tree[0] if single else tree)
        result = tree_unflatten(blocks, traced.out_spec)
        return (result, traced.aux) if has_aux else result

    return entry_point(wrapper, func)


def _shorten(traced: Traced, extra: Callable[[int, bool], Any], layout: str, plan: SparsePlan) -> None:
    """Let the compiled handlers do the next calls of a transform that nothing is around, where one plan serves all of them.

    Args:
        traced: the run.
        extra: what the key of the plan holds beside the run.
        layout: of the result.
        plan: its plan.
    """
    (slot, *others) = traced.out_slots
    if traced.out_spec is LEAF and slot is not None and not others:
        keep_short(traced.tape, extra(slot, traced.grad_enabled), plan, partial(_maker, layout))


def _maker(layout: str, layouts: Layouts) -> Callable[[torch.Tensor], torch.Tensor]:
    """What makes a sparse tensor of the values of a block, where nothing is around."""
    pattern = layouts.pattern
    shape, size = (*pattern.out_shape, *pattern.in_shape), (pattern.rows, pattern.columns)
    if layout == "sparse_coo":
        indices = layouts.coo
        return lambda values: coo_tensor(indices, values, shape)
    starts, columns = layouts.csr
    return lambda values: csr_tensor(starts, columns, values, size)


def _curvature(
    traced: Traced, slot: int, triangular: str | None, shorten: Callable[[SparsePlan], None] | None = None, *, last: bool = False
) -> Found:
    """The blocks of the Hessian of one number, by the numbers of the inputs; `shorten` is told of a plan that is known.

    The `last` thing asked of a run lets its values go.
    """
    tape, sources = traced.tape, tuple(traced.in_slots)
    plans = plans_of(tape, ("hessian", sources, slot, triangular, traced.grad_enabled))
    by_levels = plans.by_levels or current_ledger() is not None
    plan = None if by_levels else plans.find(tape)
    if plan is not None and shorten is not None:
        shorten(plan)  # not where it is made: the tape has further records then
    if plan is None and not by_levels:
        opened = plans.open(tape, partial(_open_curvature, traced, slot, triangular))
        if opened is not None:
            return opened
        plan = _plan_curvature(traced, slot, triangular, plans.masked)
        if plan is not None:
            plans.add(plan)
        elif not torch._C._len_torch_dispatch_stack():  # what is recorded, or mapped, goes by levels for that alone
            plans.by_levels = True
    if plan is not None:
        return plan.run(tape, last=last)
    with recording_on(tape)():
        gradient = execute(tape, Request("jacobian", sources, (slot,), "reverse"))
    request, names = _of_gradient(traced, slot, gradient, triangular)
    return {(names[o], sources.index(i)): value for (o, i), value in execute_sparse(tape, request).items()}


def _of_gradient(
    traced: Traced, slot: int, gradient: dict[Any, torch.Tensor | None], triangular: str | None
) -> tuple[SparseRequest, dict[int, int]]:
    """The request for the Jacobian of a gradient that stands on the tape, and which input each of its outputs is for."""
    tape = traced.tape
    names: dict[int, int] = {}
    for number, source in enumerate(traced.in_slots):
        value = gradient.get((slot, source))
        place = None if value is None else tape.slot_of(value)
        if place is not None and tape.active[place]:
            names[place] = number
    outputs, numbers = tuple(names), tuple(names.values())
    symmetric = is_symmetric(tape) and len(set(traced.in_slots)) == len(traced.in_slots)
    return SparseRequest(tuple(traced.in_slots), outputs, "auto", "output", triangular, numbers, symmetric), names


def is_symmetric(tape: Tape) -> bool:
    """Whether the derivative of a gradient on a tape is symmetric as a matter of course.

    It need not be where only the first of the two derivatives takes what runs under ``no_grad`` for constant, or where a
    derivative is the user's own.
    """
    return not tape.saw_blocked and not any(isinstance(record.op, FunctionOp) for record in tape.records)


def _plan_curvature(traced: Traced, slot: int, triangular: str | None, masked: bool) -> SparsePlan | None:
    """One program for gradient and Hessian; None where the gradient cannot be written down as one."""
    tape, sources = traced.tape, tuple(traced.in_slots)
    values = list(tape.values)
    if torch._C._len_torch_dispatch_stack() or not all(isinstance(value, torch.Tensor) for value in values):
        return None
    recorder = Recorder(_inputs(values))
    if (found := _recorded_gradient(traced, slot, triangular, recorder, values)) is None:
        return None
    request, names = found
    with planning(tape):
        plan = make_plan(plan_sparse(tape, request, recorder.program, masked=masked))
    plan.layouts = {(names[o], sources.index(i)): layout for (o, i), layout in plan.layouts.items()}
    plan.values.keys = list(plan.layouts)
    return plan


def _open_curvature(traced: Traced, slot: int, triangular: str | None, order: str, masked: bool, padded: bool) -> OpenPlan | None:
    """One program for gradient and Hessian, whatever its indices are; None where there is none."""
    tape, sources = traced.tape, tuple(traced.in_slots)
    recorder = GuardedRecorder(_inputs(list(tape.values)))
    if (found := _recorded_gradient(traced, slot, triangular, recorder, list(tape.values))) is None:
        return None
    request, names = found
    with torch.no_grad(), postponed_collection():
        return record_open_plan(
            tape, request, order, recorder, lambda key: (names[key[0]], sources.index(key[1])), masked=masked, padded=padded
        )


def _inputs(values: list[torch.Tensor]) -> Callable[[Program, torch.Tensor], Staged | None]:
    """What knows the values of a tape as the inputs of a program."""
    slots = {id(value): number for number, value in enumerate(values)}

    def find(program: Program, tensor: torch.Tensor) -> Staged | None:
        number = slots.get(id(tensor))
        return None if number is None else program.input(number, tensor)

    return find


def _recorded_gradient(
    traced: Traced, slot: int, triangular: str | None, recorder: Recorder, values: list[torch.Tensor]
) -> tuple[SparseRequest, dict[int, int]] | None:
    """Record the gradient, which stands on the tape then: what its Jacobian is asked for; None where no replay does the same."""
    tape = traced.tape
    with recorder, collecting(UNCACHED):
        tape.settle()
        with recording_on(tape)():
            gradient = execute(tape, Request("jacobian", tuple(traced.in_slots), (slot,), "reverse"))
    tape.settle()
    found = _of_gradient(traced, slot, gradient, triangular)
    program = recorder.program
    for number in range(len(values), len(tape.values)):
        staged = recorder.staged(tape.values[number])
        if staged is None:
            return None
        program._input_values[number] = staged
    return found if recorder.pure else None


def _curvatures(traced: Traced, slot: int, triangular: str | None) -> Found:
    """The blocks of the Hessian of several numbers: the derivatives of the entries of their sparse Jacobian."""
    tape, sources = traced.tape, tuple(traced.in_slots)
    request = SparseRequest(sources, (slot,), "reverse")
    execute_sparse(tape, request)  # planned outside of the record
    with recording_on(tape)():
        first = execute_sparse(tape, request)
    blocks: Found = {}
    for (_, source), (value, layouts) in first.items():
        place = tape.slot_of(value)
        if place is None or not tape.active[place]:
            continue
        outer, number = layouts.pattern, sources.index(source)
        for (_, other), (entries, inner) in execute_sparse(tape, SparseRequest(sources, (place,), "auto", "output")).items():
            columns = inner.pattern.columns
            keys = inner.pattern.keys
            rows = outer.keys.index_select(0, torch.div(keys, columns, rounding_mode="floor"))
            column = torch.remainder(keys, columns)
            second = sources.index(other)
            kept = _kept(torch.remainder(rows, outer.columns), column, number - second, triangular)
            if kept is not None:
                rows, column, entries = (t.index_select(-1, kept) for t in (rows, column, entries))
            pattern = Pattern((*outer.out_shape, *outer.in_shape), inner.pattern.in_shape, rows * columns + column)
            blocks[number, second] = entries, Layouts(pattern)
    return blocks


def _kept(rows: torch.Tensor, columns: torch.Tensor, offset: int, triangular: str | None) -> torch.Tensor | None:
    """Which entries stand in a triangle; None for all."""
    if triangular is None:
        return None
    if offset:
        wanted = torch.full_like(rows, (offset > 0) == (triangular == "lower"), dtype=torch.bool)
    else:
        wanted = rows >= columns if triangular == "lower" else rows <= columns
    return torch.nonzero(wanted).squeeze(1)


def sparse_tensor(
    known: tuple[torch.Tensor, Layouts] | None,
    out_shape: tuple[int, ...],
    in_shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    layout: str,
    name: str,
) -> torch.Tensor:
    """One block as a sparse tensor; `known` is None for zeros."""
    if known is None:
        empty = Layouts(Pattern(out_shape, in_shape, torch.empty(0, dtype=torch.long, device=device)))
        known = torch.empty(0, dtype=dtype, device=device), empty
    values, layouts = known
    _refuse_derivatives(values, name)
    if (mode := _surrounding_vmap(name)) is not None:
        with without_mode(mode):  # what is around the vmap sees the result being made
            stored = values.value if values.__class__ is BatchTensor else values  # type: ignore[attr-defined]
            if not getattr(values, "batched", False):
                stored = stored.expand(mode.size, -1)
            made = counted(lambda: _batched(stored, layouts, out_shape, in_shape, layout))
        return wrap_batched(Batched(made), mode)
    if layout == "sparse_coo":
        return coo_tensor(layouts.coo, values, (*out_shape, *in_shape))
    size = (math.prod(out_shape), math.prod(in_shape))
    return csr_tensor(*layouts.csr, values, size)


def _surrounding_vmap(name: str) -> VmapMode | None:
    """The vmap that a result is made under.

    Raises:
        RuntimeError: if there are several.
    """
    if not torch._C._len_torch_dispatch_stack():
        return None
    modes = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, VmapMode)]
    if len(modes) > 1:
        raise RuntimeError(f"{name}: a sparse layout works under one vmap, not under nested ones; use layout='dense'")
    return modes[0] if modes else None


def _batched(
    values: torch.Tensor, layouts: Layouts, out_shape: tuple[int, ...], in_shape: tuple[int, ...], layout: str
) -> torch.Tensor:
    """One block of all samples: the batch is the first sparse dimension (COO), or the batch dimension (CSR)."""
    batch, count = values.shape
    if layout == "sparse_coo":
        with unseen():
            samples = torch.arange(batch, device=values.device).repeat_interleave(count)
            indices = torch.cat([samples[None], layouts.coo.repeat(1, batch)])
        shape = (batch, *out_shape, *in_shape)
        return coo_tensor(indices, values.reshape(-1), shape)
    with unseen():
        starts, columns = (index.expand(batch, -1).contiguous() for index in layouts.csr)
    size = (batch, math.prod(out_shape), math.prod(in_shape))
    return csr_tensor(starts, columns, values.contiguous(), size)


def _to_dense(mode: LightMode, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``Tensor.to_dense``: a mapped tensor looks strided, whatever it holds, and torch would return it as it is."""
    if tensor.__class__ is not BatchTensor or tensor.value.layout is torch.strided:  # type: ignore[attr-defined]
        return torch.Tensor.to_dense(tensor, *args, **kwargs)
    with without_mode(tensor.level):  # type: ignore[attr-defined]
        dense = tensor.value.to_dense(*args, **kwargs)  # type: ignore[attr-defined]
    return wrap_batched(Batched(dense), tensor.level)  # type: ignore[attr-defined]


def install() -> None:
    """Have the modes take the conversion of sparse results to dense ones."""
    TAKEN[torch.Tensor.to_dense] = _to_dense


def _refuse_derivatives(values: torch.Tensor, name: str) -> None:
    """Refuse to hide values that an enclosing transform differentiates in a sparse tensor."""
    if not torch._C._len_torch_dispatch_stack():
        return
    stored = [values]  # a tape around a vmap knows what the vmap's tensor holds
    while stored[-1].__class__ is BatchTensor:
        stored.append(stored[-1].value)  # type: ignore[attr-defined]
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, Tape) and any(mode.is_active(value) for value in stored):
            dense = "dense()" if name.endswith(".sparse") else "layout='dense'"
            raise RuntimeError(
                f"{name}: a sparse result inside of a function that is differentiated: derivatives of sparse tensors are not "
                f"known. Use {dense} there, or make the sparse result outside of the function and hand it in as a constant"
            )


__all__ = ["SPARSE", "install", "sparse_hessian", "sparse_jacobian", "sparse_tensor"]
