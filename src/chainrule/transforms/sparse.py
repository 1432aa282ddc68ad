"""Jacobians and Hessians as sparse tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from chainrule.batching.mode import wrap_batched
from chainrule.batching.tensor import BatchTensor
from chainrule.capture.tape import Tape
from chainrule.dispatch import hide_from_dynamo
from chainrule.execute.sparse import Layouts, execute_sparse
from chainrule.plan.sparse import Pattern, SparseRequest
from chainrule.rules.batching_base import Batched
from chainrule.transforms.arguments import Argnums, resolve_argnums, tree_unflatten
from chainrule.transforms.trace import Traced, trace

SPARSE = ("sparse_coo", "sparse_csr")


def sparse_jacobian(
    func: Callable[..., Any], argnums: Argnums, has_aux: bool, layout: str, name: str, order: str, cast: str,
    check: Callable[[Traced], None],
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
    """

    @wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        positions, single = resolve_argnums(argnums, len(args), name)
        traced = trace(func, args, positions, kwargs, name, has_aux=has_aux, respect_no_grad=order != "forward")
        check(traced)
        outputs = tuple(slot for slot in traced.out_slots if slot is not None)
        found = execute_sparse(traced.tape, SparseRequest(tuple(traced.in_slots), outputs, order, cast)) if outputs else {}
        blocks = []
        for slot, out in zip(traced.out_slots, traced.out_leaves, strict=True):
            row = []
            for source, leaf in zip(traced.in_slots, traced.in_leaves, strict=True):
                known = found.get((slot, source)) if slot is not None else None
                dtype = out.dtype if cast == "output" else leaf.dtype
                row.append(sparse_tensor(known, tuple(out.shape), tuple(leaf.shape), dtype, leaf.device, layout, name))
            tree = tree_unflatten(row, traced.in_spec)
            blocks.append(tree[0] if single else tree)
        result = tree_unflatten(blocks, traced.out_spec)
        return (result, traced.aux) if has_aux else result

    return hide_from_dynamo(wrapper)


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
    if values.__class__ is BatchTensor and values.batched:  # type: ignore[attr-defined]
        stored = values.value  # type: ignore[attr-defined]
        if stored.__class__ is not torch.Tensor:
            raise RuntimeError(f"{name}: a sparse layout works under one vmap, not under nested ones; use layout='dense'")
        with torch._C._DisableTorchDispatch():
            made = _batched(stored, layouts, out_shape, in_shape, layout)
        return wrap_batched(Batched(made), values.level)  # type: ignore[attr-defined]
    if layout == "sparse_coo":
        return torch.sparse_coo_tensor(layouts.coo, values, (*out_shape, *in_shape), is_coalesced=True, check_invariants=False)
    size = (math.prod(out_shape), math.prod(in_shape))
    return torch.sparse_csr_tensor(*layouts.csr, values, size, check_invariants=False)


def _batched(
    values: torch.Tensor, layouts: Layouts, out_shape: tuple[int, ...], in_shape: tuple[int, ...], layout: str
) -> torch.Tensor:
    """One block of all samples: the batch is the first sparse dimension (COO), or the batch dimension (CSR)."""
    batch, count = values.shape
    if layout == "sparse_coo":
        samples = torch.arange(batch, device=values.device).repeat_interleave(count)
        indices = torch.cat([samples[None], layouts.coo.repeat(1, batch)])
        shape = (batch, *out_shape, *in_shape)
        return torch.sparse_coo_tensor(indices, values.reshape(-1), shape, is_coalesced=True, check_invariants=False)
    starts, columns = (index.expand(batch, -1).contiguous() for index in layouts.csr)
    size = (batch, math.prod(out_shape), math.prod(in_shape))
    return torch.sparse_csr_tensor(starts, columns, values.contiguous(), size, check_invariants=False)


def _refuse_derivatives(values: torch.Tensor, name: str) -> None:
    """Refuse to hide values that an enclosing transform differentiates in a sparse tensor."""
    if not torch._C._len_torch_dispatch_stack():
        return
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, Tape) and mode.is_active(values):
            raise RuntimeError(
                f"{name}: a sparse result inside of a function that is differentiated: derivatives of sparse tensors are not "
                "known. Use layout='dense' there."
            )


__all__ = ["SPARSE", "sparse_jacobian", "sparse_tensor"]
