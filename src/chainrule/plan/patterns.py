"""Patterns of sparse maps: the entries of blocks, their triangles and mirror images, and several blocks as one matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from chainrule.maps.linear_map import LinearMap, merge
from chainrule.maps.nodes import Node
from chainrule.maps.nonzeros import Entries, Listed, entries_of, listed, restricted, values_node
from chainrule.maps.sorted_places import ordering
from chainrule.maps.sparse import SparseWorkspace
from chainrule.maps.staging import Program, Staged
from chainrule.maps.unmapped import plain

#: Names of output and input.
Key = tuple[int, int]

#: More places than this cannot be counted by the indices of one block.
_MOST_PLACES = 2**62


class Pattern(NamedTuple):
    """Where a block may have non-zeros.

    Attributes:
        out_shape: the shape of the output.
        in_shape: the shape of the input.
        keys: rows times the number of columns plus columns of the flattened block, sorted, each once.
    """

    out_shape: tuple[int, ...]
    in_shape: tuple[int, ...]
    keys: torch.Tensor

    @property
    def rows(self) -> int:
        """The number of rows of the flattened block."""
        return math.prod(self.out_shape)

    @property
    def columns(self) -> int:
        """The number of columns of the flattened block."""
        return math.prod(self.in_shape)

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows and the columns of the entries."""
        width = max(self.columns, 1)
        return torch.div(self.keys, width, rounding_mode="floor"), torch.remainder(self.keys, width)


@dataclass(frozen=True, eq=False)
class SparseBlock:
    """The entries of one block, before their values are computed.

    Attributes:
        pattern: where they stand.
        entries: the terms that are computed.
        every: where their entries stand in one list.
        read: which values of the list stand in the pattern; None for all, in order.
        image: the block whose mirror image this one is: ``read`` is of its values; None for none.
    """

    pattern: Pattern
    entries: list[Entries]
    every: Listed
    read: torch.Tensor | None = None
    image: Key | None = None


Found = dict[Key, SparseBlock]


def find_blocks(maps: Mapping[Key, LinearMap], workspace: SparseWorkspace) -> Found:
    """The entries of every block that has some.

    Raises:
        RuntimeError: if a block has more places than can be counted.
    """
    found: Found = {}
    for key, local in maps.items():
        terms = [t for t in local.terms if t.scale != 0.0 and not any(a.size == 0 for a in t.all_axes())]
        entries = [entries_of(term, workspace) for term in merge(terms, workspace, force=False)]
        entries = [one for one in entries if one.keys.numel()]
        if not entries:
            continue
        if math.prod(local.out_shape) * math.prod(local.in_shape) >= _MOST_PLACES:
            raise RuntimeError("chainrule: a sparse block of 2⁶² or more places is more than its indices can count")
        every = listed(entries, math.prod(local.out_shape) * math.prod(local.in_shape))
        found[key] = SparseBlock(Pattern(local.out_shape, local.in_shape, every.keys), entries, every)
    return found


def triangle_of(found: Found, position: Callable[[Key], Key], triangle: str) -> Found:
    """The entries in the lower or upper triangle of a matrix of blocks.

    Args:
        found: the blocks.
        position: the numbers of a block's row and column by its name.
        triangle: ``lower`` or ``upper``.
    """
    kept: Found = {}
    for key, block in found.items():
        row, column = position(key)
        if row != column:
            if (row > column) == (triangle == "lower"):
                kept[key] = block
            continue
        rows, columns = block.pattern.places()
        entries, every = restricted(block.entries, block.every, rows >= columns if triangle == "lower" else rows <= columns)
        if entries:
            kept[key] = SparseBlock(block.pattern._replace(keys=every.keys), entries, every)
    return kept


def mirrored(found: Found, position: Callable[[Key], Key]) -> Found:
    """The blocks of a symmetric matrix, of which only the lower triangle is computed.

    Args:
        found: the blocks.
        position: the numbers of a block's row and column by its name; invertible.
    """
    lower = triangle_of(found, position, "lower")
    name = {position(key): key for key in found}
    result: Found = {}
    for key, block in lower.items():
        row, column = position(key)
        pattern = block.pattern
        rows, columns = pattern.places()
        flipped = columns * pattern.rows + rows
        if row == column:
            strict = torch.nonzero(rows > columns).squeeze(1)
            keys = torch.cat([pattern.keys, flipped.index_select(0, strict)])
            order = ordering(keys)
            own = torch.arange(pattern.keys.numel(), device=keys.device)
            read = torch.cat([own, strict]).index_select(0, order)
            result[key] = replace(block, pattern=pattern._replace(keys=keys.index_select(0, order)), read=read)
            continue
        result[key] = block
        if (image := name.get((column, row))) is not None:
            order = ordering(flipped)
            turned = Pattern(pattern.in_shape, pattern.out_shape, flipped.index_select(0, order))
            result[image] = SparseBlock(turned, block.entries, block.every, order, key)
    return result


def block_nodes(found: Found, workspace: SparseWorkspace) -> dict[Key, Node]:
    """The values of the entries of blocks."""
    nodes: dict[Key, Node] = {}
    for key, block in found.items():
        if block.image is None:
            nodes[key] = values_node(block.entries, block.every, workspace, block.read)
        else:
            assert block.read is not None
            nodes[key] = read_node(nodes[block.image], block.read)
    return nodes


def read_node(node: Node, places: torch.Tensor) -> Node:
    """Some elements of a vector."""

    def compute(program: Program, value: Staged) -> Staged:
        return torch.index_select(value, 0, program.constant(places))

    return Node((places.numel(),), (node,), compute, flops=places.numel(), moved=2 * places.numel(), label="entries")


def dense_parts(keys: torch.Tensor, columns: int) -> tuple[int, int, int] | None:
    """Whether entries are those of equal dense blocks with no row and no column in common.

    Args:
        keys: rows times the number of columns plus columns of the entries, each once.
        columns: the number of columns.

    Returns:
        How many blocks there are, and the numbers of their rows and columns; None where there are no such blocks, or they are
        single rows or columns.
    """
    keys = plain(keys).sort().values
    rows, places = torch.div(keys, max(columns, 1), rounding_mode="floor"), torch.remainder(keys, max(columns, 1))
    _, widths = torch.unique_consecutive(rows, return_counts=True)
    _, heights = torch.unique(places, return_counts=True)
    if not keys.numel() or int(widths.min()) != int(widths.max()) or int(heights.min()) != int(heights.max()):
        return None
    height, width = int(heights[0]), int(widths[0])
    if height < 2 or width < 2:
        return None
    # Rows of one block have the columns of its first row.
    lines = places.reshape(-1, width)
    count = torch.unique(lines, dim=0).shape[0]
    return (count, height, width) if count * height == lines.shape[0] and count * width == heights.numel() else None


def as_matrix(
    patterns: Mapping[Key, Pattern], sizes: tuple[tuple[int, ...], tuple[int, ...]], device: torch.device
) -> tuple[Pattern, torch.Tensor | None]:
    """The pattern of the matrix that blocks are put together to, and the order in which it has their values.

    Args:
        patterns: the blocks' patterns by numbers of output and input.
        sizes: the numbers of elements of all outputs and of all inputs.
        device: where the pattern is made.
    """
    height, width = sum(sizes[0]), sum(sizes[1])
    lines = []
    for (o, i), pattern in patterns.items():
        rows, columns = pattern.places()
        lines.append((rows + sum(sizes[0][:o])) * width + columns + sum(sizes[1][:i]))
    keys = torch.cat(lines) if lines else torch.empty(0, dtype=torch.long, device=device)
    if len(lines) < 2:
        return Pattern((height,), (width,), keys), None
    order = ordering(keys)
    return Pattern((height,), (width,), keys.index_select(0, order)), order


__all__ = [
    "Found", "Key", "Pattern", "SparseBlock", "as_matrix", "block_nodes", "dense_parts", "find_blocks", "mirrored", "read_node",
    "triangle_of",
]  # fmt: skip
