"""Batches of sparse results: with the batch at another dimension, and put together from chunks."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def moved_batch(value: torch.Tensor, dim: int) -> torch.Tensor:
    """A sparse batch with its batch dimension, the first, at `dim`.

    Raises:
        RuntimeError: if it is no COO tensor and `dim` is another than the first.
    """
    if dim == 0:
        return value
    if value.layout is not torch.sparse_coo:
        raise RuntimeError(
            f"vmap: out_dims={dim} for a result of layout {value.layout}: torch has such tensors with the batch in front only. "
            "Use out_dims=0, or layout='sparse_coo'"
        )
    return value.movedim(0, dim).coalesce()


def join_chunks(chunks: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """The results of chunks of a batch, whose dimension stands at `dim`, as one.

    Raises:
        RuntimeError: if sparse CSR results of the chunks have different numbers of entries, which one tensor cannot hold.
    """
    layout = chunks[0].layout
    if layout is torch.strided:
        return torch.cat(list(chunks), dim)
    if layout is torch.sparse_coo:
        return torch.cat(list(chunks), dim).coalesce()
    if layout is not torch.sparse_csr:
        raise RuntimeError(f"vmap: results of layout {layout} cannot be put together from chunks; leave chunk_size out")
    counts = {int(chunk.values().shape[-1]) for chunk in chunks}
    if len(counts) > 1:
        raise RuntimeError(
            f"vmap: sparse CSR results of different chunks have {sorted(counts)} entries per sample, and torch's batched CSR "
            "tensors have one number of them. Use layout='sparse_coo'"
        )
    rows = torch.cat([chunk.crow_indices() for chunk in chunks])
    columns = torch.cat([chunk.col_indices() for chunk in chunks])
    values = torch.cat([chunk.values() for chunk in chunks])
    size = (rows.shape[0], *chunks[0].shape[1:])
    return torch.sparse_csr_tensor(rows, columns, values, size, check_invariants=False)


__all__ = ["join_chunks", "moved_batch"]
