"""Parts of a linear map, read block by block and put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from chainrule.modes_off import unseen
from chainrule.transforms.map_blocks import entries_by_blocks, needs_blocks
from chainrule.transforms.map_entries import prefers_entries, single_entries
from chainrule.transforms.spaces import Parts, Positions, Space

if TYPE_CHECKING:
    from chainrule.transforms.linear_map import LinearMap


def pieces(linear_map: LinearMap, rows: Parts, columns: Parts) -> list[list[torch.Tensor]]:
    """Blocks for the chosen outputs and inputs, output by output.

    Each is of shape ``(*output.shape, *input.shape)``, with one dimension in place of a shape of which some elements are chosen.
    """
    whole = all(local is None for local in (*rows.local, *columns.local))
    found = linear_map.read("blocks", rows, columns, symmetric=linear_map.symmetric and whole)
    pieces = []
    for o, chosen in zip(rows.leaves, rows.local, strict=True):
        out_shape = linear_map.out_space.shapes[o] if chosen is None else chosen.shape
        line = []
        for i, taken in zip(columns.leaves, columns.local, strict=True):
            in_shape = linear_map.in_space.shapes[i] if taken is None else taken.shape
            piece = found.get((o, i))
            if piece is None and linear_map.symmetric and whole and o > i and (other := found.get((i, o))) is not None:
                piece = other.permute((*range(len(in_shape), other.dim()), *range(len(in_shape)))).clone()
            dtype = linear_map.block_dtype(o, i)
            if piece is None:
                piece = torch.zeros((*out_shape, *in_shape), dtype=dtype, device=linear_map.in_space.devices[i])
            line.append(piece.to(dtype))
        pieces.append(line)
    return pieces


def matrix(linear_map: LinearMap, rows: Parts, columns: Parts) -> torch.Tensor:
    """The chosen rows and columns of the flattened map as one matrix."""

    def size(space: Space, leaf: int, local: torch.Tensor | None) -> int:
        return space.sizes[leaf] if local is None else int(local.shape[0])

    heights = [size(linear_map.out_space, *pair) for pair in zip(rows.leaves, rows.local, strict=True)]
    widths = [size(linear_map.in_space, *pair) for pair in zip(columns.leaves, columns.local, strict=True)]
    if not heights or not widths:
        return torch.zeros((sum(heights), sum(widths)), dtype=linear_map.dtype, device=linear_map.out_space.devices[0])
    lines = []
    for height, line in zip(heights, pieces(linear_map, rows, columns), strict=True):
        parts = [piece.reshape(height, width).to(linear_map.dtype) for width, piece in zip(widths, line, strict=True)]
        lines.append(parts[0] if len(parts) == 1 else torch.cat(parts, 1))
    whole = lines[0] if len(lines) == 1 else torch.cat(lines)
    whole = whole if rows.order is None else whole.index_select(0, rows.order.to(whole.device))
    return whole if columns.order is None else whole.index_select(1, columns.order.to(whole.device))


def entries(linear_map: LinearMap, rows: Positions, columns: Positions, name: str) -> torch.Tensor:
    """Entries of the flattened map, rows and columns side by side.

    Raises:
        IndexError: if there are not as many rows as columns.
    """
    if rows.count != columns.count:
        raise IndexError(f"{name}: {rows.count} rows and {columns.count} columns cannot be read side by side")
    with unseen():
        leaf_of = [
            torch.bucketize(chosen.index, torch.tensor(space.sizes).cumsum(0), right=True)
            for chosen, space in ((rows, linear_map.out_space), (columns, linear_map.in_space))
        ]
        pairs = sorted(set(zip(leaf_of[0].tolist(), leaf_of[1].tolist(), strict=True)))
        places = [((leaf_of[0] == o) & (leaf_of[1] == i)).nonzero().reshape(-1) for o, i in pairs]
        halves = []
        for chosen, space, side in ((rows, linear_map.out_space, 0), (columns, linear_map.in_space, 1)):
            local = tuple(
                (chosen.index[place] - sum(space.sizes[: pair[side]])).to(space.devices[pair[side]])
                for pair, place in zip(pairs, places, strict=True)
            )
            halves.append(Parts(tuple(pair[side] for pair in pairs), local, None))
        order = torch.cat(places).argsort() if places else torch.zeros(0, dtype=torch.int64)
    listed = bool(pairs) and prefers_entries(linear_map, "entries", *halves)
    if pairs and not listed and needs_blocks(linear_map, "entries", *halves):
        return entries_by_blocks(linear_map, rows.index, columns.index)
    found = single_entries(linear_map, *halves) if listed else linear_map.read("entries", *halves) if pairs else {}
    device, dtype = linear_map.out_space.devices[0], linear_map.dtype
    parts = [
        torch.zeros(len(place), dtype=dtype, device=device) if (part := found.get(n)) is None else part.to(dtype)
        for n, place in enumerate(places)
    ]
    if len(parts) == 1:
        return parts[0]
    whole = torch.cat(parts) if parts else torch.zeros(0, dtype=dtype, device=device)
    return whole.index_select(0, order.to(whole.device))


__all__ = ["entries", "matrix", "pieces"]
