"""The blocks of a linear map as sparse tensors."""

from __future__ import annotations

from typing import Any

import torch

from chainrule.execute.sparse_plans import Found
from chainrule.transforms.spaces import Space
from chainrule.transforms.sparse import sparse_tensor


def sparse_blocks(found: Found, out_space: Space, in_space: Space, name: str) -> Any:
    """The tree of the blocks of a map.

    Args:
        found: by numbers of output and input, the values of the entries and where they stand.
        out_space: the space of the outputs.
        in_space: the space of the inputs.
        name: the method's name, for messages.
    """
    lines = []
    for o, (out_shape, out_dtype) in enumerate(zip(out_space.shapes, out_space.dtypes, strict=True)):
        line = []
        for i, (in_shape, in_dtype) in enumerate(zip(in_space.shapes, in_space.dtypes, strict=True)):
            dtype = torch.promote_types(out_dtype, in_dtype)
            line.append(_block(found, (o, i), out_shape, in_shape, dtype, in_space.devices[i], name))
        lines.append(in_space.tree(line))
    return out_space.tree(lines)


def sparse_matrix(found: Found, out_space: Space, in_space: Space, name: str) -> torch.Tensor:
    """All of a map as one matrix.

    Args:
        found: its entries, as those of the only block.
        out_space: the space of the outputs.
        in_space: the space of the inputs.
        name: the method's name, for messages.
    """
    dtype = torch.promote_types(out_space.dtype, in_space.dtype)
    return _block(found, (0, 0), (out_space.size,), (in_space.size,), dtype, in_space.devices[0], name)


def _block(
    found: Found, key: tuple[int, int], out_shape: tuple[int, ...], in_shape: tuple[int, ...], dtype: torch.dtype,
    device: torch.device, name: str,
) -> torch.Tensor:
    known = found.get(key)
    if known is not None and known[0].dtype != dtype:
        known = known[0].to(dtype), known[1]
    return sparse_tensor(known, out_shape, in_shape, dtype, device, "sparse_coo", name)


__all__ = ["sparse_blocks", "sparse_matrix"]
