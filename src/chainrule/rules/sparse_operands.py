"""Constant sparse matrices as operands of products: their entries are a vector, and two relations say where these stand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chainrule.maps.nodes import leaf
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Factor, OneHot
from chainrule.rules.base import Call, value_node


def operand_network(call: Call, item: object, axes: Sequence[Axis]) -> tuple[tuple[Factor, ...], tuple[OneHot, ...]]:
    """An operand of a product over one axis for each of its dimensions: a dense array, or the entries of a sparse one.

    Raises:
        RuntimeError: for a sparse operand in another layout than COO, CSR or CSC, or with dense or batch dimensions.
    """
    value = call.tensor(item)
    if value.layout is torch.strided:
        return (Factor(value_node(call, item, (axis.size for axis in axes)), tuple(axes)),), ()
    plain = value.layout in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc) and value.dense_dim() == 0
    if not plain or (value.layout is not torch.sparse_coo and value.dim() != 2):
        raise RuntimeError(
            f"chainrule: {call.op} with a sparse tensor of layout {value.layout} and {value.dim()} dimensions; products with "
            "constant COO, CSR and CSC matrices (without dense or batch dimensions) are differentiated"
        )
    count = Axis(value._nnz())

    def places(dim: int) -> OneHot:
        def stage(program: Program) -> Staged:
            return program.call(sparse_places, call.stage(program, item), dim)  # type: ignore[no-any-return]

        return OneHot(leaf((count.size,), stage, label="index"), (count,), axes[dim])

    def entries(program: Program) -> Staged:
        return program.call(sparse_values, call.stage(program, item))  # type: ignore[no-any-return]

    factor = Factor(leaf((count.size,), entries, flops=1, label="entries"), (count,))
    return (factor,), tuple(places(dim) for dim in range(value.dim()))


def sparse_values(matrix: torch.Tensor) -> torch.Tensor:
    """The entries of a sparse tensor, in the order in which they are kept; they join its graph.

    Raises:
        RuntimeError: for a tensor with a graph that is not coalesced: torch has no derivative of its entries.
    """
    if matrix.layout is not torch.sparse_coo:
        return matrix.values()
    if not (matrix.requires_grad and torch.is_grad_enabled()):
        return matrix._values()
    if not matrix.is_coalesced():
        raise RuntimeError(
            "chainrule: a sparse tensor that requires grad and is not coalesced: torch has no derivative of its entries. Use "
            "coalesce() before the product"
        )
    return matrix.values()


def sparse_places(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    """Where the entries of a sparse tensor stand along one dimension."""
    if matrix.layout is torch.sparse_coo:
        return matrix._indices()[dim]
    by_rows = matrix.layout is torch.sparse_csr
    starts, inner = (
        (matrix.crow_indices(), matrix.col_indices()) if by_rows else (matrix.ccol_indices(), matrix.row_indices())
    )
    if by_rows == (dim == 1):
        return inner.to(torch.long)
    counted = torch.arange(inner.numel(), device=starts.device, dtype=starts.dtype)
    return torch.bucketize(counted, starts[1:], right=True)


__all__ = ["operand_network", "sparse_places", "sparse_values"]
