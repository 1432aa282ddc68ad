"""Terms with bands as dense arrays: the entries around each output are written into zeros."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from chainrule.calls import new_zeros
from chainrule.maps.compose import Workspace, dense_factor
from chainrule.maps.nodes import Node
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, OneHot, Term, shift_of
from chainrule.maps.views import expand_to, permute

#: More boxes than this are written by index instead.
_MOST_BOXES = 300

#: First place and number of places, for each dimension.
Box = tuple[tuple[int, ...], tuple[int, ...]]


class _Layout(NamedTuple):
    """Where the entries of a term stand in a dense array.

    Attributes:
        axes: the free axes, outer ones first.
        strides: what a step along each of them moves by.
        offset: the place of the first entry.
        boxes: the parts of the free axes' product that stand within the array.
    """

    axes: list[Axis]
    strides: list[int]
    offset: int
    boxes: list[Box]


def banded_term(term: Term, workspace: Workspace, shape: tuple[int, ...]) -> Node:
    """A settled term, some relations of which are bands, as a dense array of ``shape``."""
    layout = _layout(term)
    if layout is None:
        return _indexed(term, workspace, shape)
    wide = [axis for axis in layout.axes if axis.size != 1]
    factor = dense_factor(term, wide, workspace)
    names = {axis: number for number, axis in enumerate(layout.axes)}
    carried = [axis for axis in factor.axes if axis in names]
    have, order = tuple(names[axis] for axis in carried), tuple(range(len(names)))
    sizes = tuple(axis.size for axis in carried)

    def compute(program: Program, value: Staged) -> Staged:
        value = value if tuple(value.shape) == sizes else torch.reshape(value, sizes)
        spread = expand_to(value, have, order)
        return program.call(embed_bands, spread, shape, tuple(layout.strides), layout.offset, tuple(layout.boxes))

    return Node(shape, (factor.node,), compute, moved=math.prod(shape) + factor.node.numel, label="written bands")


def _layout(term: Term) -> _Layout | None:
    """The strides of a term's entries; None when they are not the same everywhere, or not positive."""
    positions = [axis for side in (term.out_dims, term.in_dims) for dim in side for axis in dim]
    own: dict[Axis, int] = {}
    stride = 1
    for axis in reversed(positions):
        own[axis] = own.get(axis, 0) + stride
        stride *= axis.size
    strides = {axis: own[axis] for axis in dict.fromkeys(positions)}
    offset = 0
    edges: list[list[dict[Axis, tuple[int, int]]]] = []
    seen: set[Axis] = set()
    for onehot in term.onehots:
        shift = shift_of(onehot)
        if shift is None or seen.intersection(onehot.sources):
            return None
        seen.update(onehot.sources)
        start, steps = shift
        along = strides.pop(onehot.target)
        offset += start * along
        for axis, step in zip(onehot.sources, steps, strict=True):
            strides[axis] = strides.get(axis, 0) + step * along
        if onehot.partial and (found := _parts(onehot, start, steps)) is not None:
            edges.append(found)
        elif onehot.partial:
            return None
    if any(step < 1 for step in strides.values()) or math.prod(len(found) for found in edges) > _MOST_BOXES:
        return None
    axes = list(strides)
    boxes: list[Box] = []
    for combination in itertools.product(*edges):
        limits = {axis: limit for part in combination for axis, limit in part.items()}
        spans = [limits.get(axis, (0, axis.size)) for axis in axes]
        boxes.append((tuple(low for low, _ in spans), tuple(high - low for low, high in spans)))
    return _Layout(axes, [strides[axis] for axis in axes], offset, boxes)


def _parts(onehot: OneHot, start: int, steps: Sequence[int]) -> list[dict[Axis, tuple[int, int]]] | None:
    """Split a shift of two sources into the ranges of the first with one range of the second within the target."""
    if len(onehot.sources) != 2:
        return None
    (row, place), (step, gap) = onehot.sources, steps
    if gap < 1:
        return None
    parts: list[dict[Axis, tuple[int, int]]] = []
    for number in range(row.size):
        first = start + step * number
        low = min(max(0, -(first // gap)), place.size)
        high = max(low, min(place.size, (onehot.target.size - 1 - first) // gap + 1))
        if parts and parts[-1][place] == (low, high):
            parts[-1][row] = (parts[-1][row][0], number + 1)
        else:
            parts.append({row: (number, number + 1), place: (low, high)})
    return [part for part in parts if part[place][0] < part[place][1]]


def embed_bands(
    value: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...], offset: int, boxes: tuple[Box, ...]
) -> torch.Tensor:
    """Write the entries of ``value`` that stand in boxes into zeros.

    Args:
        value: broadcastable to the product of the free axes.
        shape: the shape of the result.
        strides: what a step along each dimension of ``value`` moves by in the result.
        offset: the place of the first entry of ``value``.
        boxes: which entries are written: first numbers and lengths along each dimension.

    Returns:
        A fresh tensor of ``shape``.
    """
    result = new_zeros(value, shape)
    value = value[(None,) * (len(strides) - value.dim())]
    for first, lengths in boxes:
        part = value
        for d, (low, length) in enumerate(zip(first, lengths, strict=True)):
            if value.shape[d] not in (1, length):
                part = torch.narrow(part, d, low, length)
        place = offset + sum(low * stride for low, stride in zip(first, strides, strict=True))
        result.as_strided(lengths, strides, place).copy_(part)
    return result


def _indexed(term: Term, workspace: Workspace, shape: tuple[int, ...]) -> Node:
    """One flat index per entry; entries without a target go to a place behind the array."""
    positions = [axis for side in (term.out_dims, term.in_dims) for dim in side for axis in dim]
    own: dict[Axis, int] = {}
    stride = 1
    for axis in reversed(positions):
        own[axis] = own.get(axis, 0) + stride
        stride *= axis.size
    total = stride
    relations = {h.target: h for h in term.onehots}
    free = [axis for axis in positions if axis not in relations]
    grid = [axis for axis in dict.fromkeys((*free, *(a for h in term.onehots for a in h.sources))) if axis.size != 1]
    names = {axis: number for number, axis in enumerate(grid)}
    order, sizes = tuple(range(len(grid))), tuple(axis.size for axis in grid)
    factor = dense_factor(term, grid, workspace)
    have = tuple(names[axis] for axis in factor.axes)

    def own_places(device: torch.device) -> torch.Tensor:
        places = torch.zeros(sizes, dtype=torch.long, device=device)
        for axis, number in names.items():
            counted = torch.arange(axis.size, device=device) * own.get(axis, 0)
            places = places + counted.reshape([-1 if n == number else 1 for n in order])
        return places

    def compute(program: Program, value: Staged, *indices: Staged) -> Staged:
        places = program.constant(own_places(value.device))
        value = torch.broadcast_to(expand_to(value, have, order), sizes)
        for onehot, index in zip(term.onehots, indices, strict=True):
            sources = [axis for axis in onehot.sources if axis.size != 1]
            index = torch.reshape(index, tuple(axis.size for axis in sources))
            ranked = sorted(sources, key=lambda axis: names[axis])
            index = permute(index, tuple(sources.index(axis) for axis in ranked))
            index = expand_to(index, tuple(names[axis] for axis in ranked), order)
            shifted = places + index * own[onehot.target]
            places = torch.where(torch.logical_and(index >= 0, places < total), shifted, total) if onehot.partial else shifted
        places = torch.clamp(torch.reshape(places, (-1,)), max=total)
        zeros = program.call(torch.zeros, (total + 1,), dtype=value.dtype, device=value.device)
        filled = torch.scatter(zeros, 0, places, torch.reshape(value, (-1,)))
        return torch.reshape(torch.narrow(filled, 0, 0, total), shape)

    inputs = (factor.node, *(h.index for h in term.onehots))
    return Node(shape, inputs, compute, moved=total + 4 * math.prod(sizes), label="written entries")


__all__ = ["banded_term", "embed_bands"]
