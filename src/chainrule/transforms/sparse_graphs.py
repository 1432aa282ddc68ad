"""Sparse tensors of values that carry a graph: differentiable as often as what reads them is.

The derivative that torch has for the making of a sparse tensor has no graph of its own, so that what is differentiated twice
through it lacks the terms of second order, without an error. Here it is a read of entries, whose derivative is such a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class _Places(NamedTuple):
    """Where the entries of a sparse tensor stand.

    Attributes:
        parts: the indices (COO), or the starts of the rows and the columns (CSR).
        shape: the shape of the tensor.
    """

    parts: tuple[torch.Tensor, ...]
    shape: tuple[int, ...]

    def tensor(self, values: torch.Tensor) -> torch.Tensor:
        """The sparse tensor of some values."""
        if len(self.parts) == 1:
            return torch.sparse_coo_tensor(self.parts[0], values, self.shape, is_coalesced=True, check_invariants=False)
        starts, columns = self.parts
        return torch.sparse_csr_tensor(starts, columns, values, self.shape, check_invariants=False)

    def indices(self) -> torch.Tensor:
        """The indices of the entries, one row per dimension, in order."""
        if len(self.parts) == 1:
            return self.parts[0]
        starts, columns = self.parts
        counts = starts.diff(dim=-1).reshape(-1)
        rows = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts)
        height = self.shape[-2]
        within = torch.stack([rows % height, columns.reshape(-1)])
        return within if len(self.shape) == 2 else torch.cat([(rows // height)[None], within])

    def values_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The values that a tensor of this shape and of any layout has there."""
        if tensor.layout is torch.sparse_csr and len(self.parts) > 1:
            own = (tensor.crow_indices(), tensor.col_indices())
            if all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(own, self.parts, strict=True)):
                return tensor.values()
        indices = self.indices()
        shape = self.parts[-1].shape if len(self.parts) > 1 else (-1,)
        if tensor.layout is torch.strided:
            return tensor[tuple(indices)].reshape(shape)
        if tensor.layout is not torch.sparse_coo:
            tensor = tensor.to_sparse_coo() if tensor.dim() == 2 else tensor.to_dense().to_sparse_coo()
        tensor = tensor.coalesce()
        if tensor.dense_dim():
            return tensor.to_dense()[tuple(indices)].reshape(shape)
        found, values = tensor.indices(), tensor.values()
        if found.shape == indices.shape and torch.equal(found, indices):
            return values.reshape(shape)
        if not values.numel():
            return values.new_zeros(indices.shape[1]).reshape(shape)
        wanted, keys = (_flat(own, self.shape) for own in (indices, found))
        at = torch.searchsorted(keys, wanted).clamp_max(keys.numel() - 1)
        return torch.where(keys[at] == wanted, values[at], values.new_zeros(())).reshape(shape)


def _flat(indices: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Each place as one number."""
    keys = torch.zeros(indices.shape[1], dtype=torch.long, device=indices.device)
    for size, own in zip(shape, indices, strict=True):
        keys = keys * size + own
    return keys


class _Stored(torch.autograd.Function):
    """The sparse tensor of some values."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, places: _Places) -> torch.Tensor:  # type: ignore[override]
        ctx.places = places
        return places.tensor(values)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return _Read.apply(grad, ctx.places), None  # type: ignore[no-untyped-call]


class _Read(torch.autograd.Function):
    """The values that a tensor of any layout has at the places of a sparse one."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, places: _Places) -> torch.Tensor:  # type: ignore[override]
        ctx.places, ctx.layout = places, tensor.layout
        return places.values_of(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        made = _Stored.apply(grad, ctx.places)  # type: ignore[no-untyped-call]
        return made.to_dense() if ctx.layout == torch.strided else made, None


def coo_tensor(indices: torch.Tensor, values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A COO tensor of values at indices in order."""
    if values.requires_grad and torch.is_grad_enabled():
        return _Stored.apply(values, _Places((indices,), shape))  # type: ignore[no-any-return, no-untyped-call]
    return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=True, check_invariants=False)


def csr_tensor(starts: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A CSR tensor of values in order, or a batch of them."""
    if values.requires_grad and torch.is_grad_enabled():
        return _Stored.apply(values, _Places((starts, columns), shape))  # type: ignore[no-any-return, no-untyped-call]
    return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


__all__ = ["coo_tensor", "csr_tensor"]
