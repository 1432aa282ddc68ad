"""What is known of view ops: how a write through each goes back into the tensor that it is a view of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

aten = torch.ops.aten

#: In-place changes of shape, and the views that they make of the tensor as it was.
IN_PLACE_VIEWS: dict[Any, OpOverload] = {
    aten.t_.default: aten.t.default,
    aten.transpose_.default: aten.transpose.int,
    aten.swapaxes_.default: aten.transpose.int,
    aten.swapdims_.default: aten.transpose.int,
    aten.unsqueeze_.default: aten.unsqueeze.default,
    aten.squeeze_.default: aten.squeeze.default,
    aten.squeeze_.dim: aten.squeeze.dim,
    aten.squeeze_.dims: aten.squeeze.dims,
}

SCATTERS: dict[Any, Any] = {
    aten.select.int: aten.select_scatter.default,
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.diagonal.default: aten.diagonal_scatter.default,
    aten.as_strided.default: aten.as_strided_scatter.default,
}

#: Views in which one place of memory may stand several times: a write to a part of one is seen in others.
OVERLAPPING = frozenset({aten.expand.default, aten.unfold.default})

#: Views of numbers as others, through which places cannot be followed.
OTHER_NUMBERS = frozenset({
    aten.view_as_real.default, aten.view_as_complex.default, aten._conj.default, aten.view.dtype, aten.detach.default,
})  # fmt: skip

#: By the identity of the op, whose own hash is slow.
SCATTERS_BY_ID = {id(op): scatter for op, scatter in SCATTERS.items()}

#: Ops that make a view always, likewise.
ALWAYS_VIEWS = {
    id(op): op
    for op in (
        *SCATTERS, aten.view.default, aten.transpose.int, aten.t.default, aten.permute.default, aten.unsqueeze.default,
        aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default,
    )
}  # fmt: skip

Inverse = Callable[[torch.Tensor, tuple[Any, ...]], tuple[Any, tuple[Any, ...]]]


def _back_to_shape(parent: torch.Tensor, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    return aten.view.default, (tuple(parent.shape),)


def _inverse_permute(parent: torch.Tensor, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    dims = [d % parent.ndim for d in args[0]]
    return aten.permute.default, (tuple(dims.index(d) for d in range(len(dims))),)


def _same_transpose(parent: torch.Tensor, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    return aten.transpose.int, args


def _inverse_t(parent: torch.Tensor, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    return aten.t.default, ()


INVERSES: dict[Any, Inverse] = {
    aten.view.default: _back_to_shape,
    aten._unsafe_view.default: _back_to_shape,
    aten.reshape.default: _back_to_shape,
    aten._reshape_alias.default: _back_to_shape,
    aten.squeeze.default: _back_to_shape,
    aten.squeeze.dim: _back_to_shape,
    aten.squeeze.dims: _back_to_shape,
    aten.unsqueeze.default: _back_to_shape,
    aten.alias.default: _back_to_shape,
    aten.lift_fresh.default: _back_to_shape,
    aten.permute.default: _inverse_permute,
    aten.transpose.int: _same_transpose,
    aten.t.default: _inverse_t,
    aten.view_as_real.default: lambda parent, args: (aten.view_as_complex.default, ()),
    aten.view_as_complex.default: lambda parent, args: (aten.view_as_real.default, ()),
    aten._conj.default: lambda parent, args: (aten._conj_physical.default, ()),
}


def _fill_diagonal(tensor: torch.Tensor, value: Any, wrap: bool = False) -> torch.Tensor:
    places = torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device).fill_diagonal_(True, wrap)
    return tensor.masked_fill_(places, value)


def _rrelu(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor.copy_(aten.rrelu.default(tensor, *args, **kwargs))


#: Writes without a functional form that has a rule, by others that have one.
EXPANDED_WRITES: dict[Any, Any] = {aten.fill_diagonal_.default: _fill_diagonal, aten.rrelu_.default: _rrelu}
