"""Entries and sums of squares of linear maps by products with some unit vectors at a time.

An op that is known by how it acts (a Fourier transform, a user's own) has no factors that could be contracted, and running sums
have none that are smaller than their triangle. What is asked for is then made from a few columns at a time: the work is that of
the matrix, but what is held is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from chainrule.execute.prediction import peak_elements
from chainrule.transforms.map_frame import Frame
from chainrule.transforms.spaces import Parts, Space

if TYPE_CHECKING:
    from chainrule.transforms.linear_map import LinearMap

#: What holds no more bytes than this at once is computed at once; blocks are made so large that they hold about as much.
BLOCK_BYTES = 1 << 24

#: A contraction that holds less than one in so many entries of the matrix is a good one, however large the matrix is.
_PART = 8

#: Arrays of the size of one column that a product with one column holds at once.
_ARRAYS = 4


def needs_blocks(linear_map: LinearMap, kind: str, *parts: Parts) -> bool:
    """Whether the cheapest contraction of a request would make an array of about the matrix's size, and that is large.

    It is found out once per signature.

    Args:
        linear_map: the map.
        kind: the request's kind (see :class:`~chainrule.plan.algebra.AlgebraRequest`).
        parts: what is selected.
    """
    rows, columns = linear_map.shape
    size = linear_map.dtype.itemsize
    if rows * columns * size <= BLOCK_BYTES:
        return False
    peak = peak_elements(*linear_map._request(kind, *parts))
    return peak * size > BLOCK_BYTES and peak * _PART > rows * columns


def _block_length(linear_map: LinearMap) -> int:
    """How many columns a block may have: they are held for the largest value on the way."""
    frame = Frame()
    linear_map._expression(frame)
    values = [value.numel() for value in frame.tape.values if isinstance(value, torch.Tensor)]
    width = max([1, *values, *linear_map.shape])
    return max(1, BLOCK_BYTES // (_ARRAYS * width * linear_map.dtype.itemsize))


def _unit_vectors(space: Space, places: torch.Tensor) -> list[torch.Tensor]:
    """Some unit vectors side by side, as leaves of the space."""
    device = space.devices[0]
    numbers = torch.arange(space.size, device=device).unsqueeze(1)
    return space.unflatten((numbers == places.to(device)).to(space.dtype))


def entries_by_blocks(linear_map: LinearMap, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Entries of the flattened map, read side by side.

    Args:
        linear_map: the map.
        rows: their rows, of shape ``(k,)``.
        columns: their columns, of the same shape.
    """
    length = _block_length(linear_map)
    found = []
    for places in torch.arange(rows.shape[0], device=rows.device).split(length):
        one = rows.index_select(0, places)
        two = one if columns is rows else columns.to(rows.device).index_select(0, places)
        found.append(_entries(linear_map, one, two))
    return found[0] if len(found) == 1 else torch.cat(found)


def _entries(linear_map: LinearMap, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Entries of one block. The two sides of a product meet in between: each is applied to what is on its own side."""
    count = int(rows.shape[0])
    if (halves := linear_map.halves) is None:
        whole = linear_map.out_space.flatten(linear_map._push(_unit_vectors(linear_map.in_space, columns), count), count)
        return whole.gather(0, rows.to(whole.device).unsqueeze(0)).squeeze(0)
    left, right = halves
    one = left.in_space.flatten(left._pull(_unit_vectors(left.out_space, rows), count), count)
    if columns is rows and (right is left.T or left is right.T):
        return one.square().sum(0)
    two = right.out_space.flatten(right._push(_unit_vectors(right.in_space, columns), count), count)
    return (one * two).sum(0)


def diagonal_by_blocks(linear_map: LinearMap) -> torch.Tensor:
    """The diagonal of a map of a space to itself, flat."""
    places = torch.arange(linear_map.shape[0], device=linear_map.out_space.devices[0])
    return entries_by_blocks(linear_map, places, places)


def squares_by_blocks(linear_map: LinearMap) -> torch.Tensor:
    """The sum of the squares of all entries, from the columns or from the rows, whichever are fewer."""
    total: torch.Tensor | None = None
    for block in column_blocks(linear_map):
        part = block.square().sum()
        total = part if total is None else total + part
    return linear_map._scalar(total)


def column_blocks(linear_map: LinearMap) -> Iterator[torch.Tensor]:
    """All entries: some columns at a time, or some rows where these are fewer."""
    flipped = linear_map.shape[0] < linear_map.shape[1]
    space, other = (linear_map.in_space, linear_map.out_space)[:: -1 if flipped else 1]
    apply = linear_map._pull if flipped else linear_map._push
    for places in torch.arange(space.size, device=space.devices[0]).split(_block_length(linear_map)):
        count = int(places.shape[0])
        yield other.flatten(apply(_unit_vectors(space, places), count), count)


__all__ = ["BLOCK_BYTES", "column_blocks", "diagonal_by_blocks", "entries_by_blocks", "needs_blocks", "squares_by_blocks"]
