"""Terms with relations as dense arrays: their entries are written into zeros, nothing is multiplied by a one-hot."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from chainrule.calls import new_zeros
from chainrule.maps.band_entries import banded_term
from chainrule.maps.compose import Workspace, dense_factor
from chainrule.maps.nodes import Node
from chainrule.maps.staging import Instruction, Program, Staged
from chainrule.maps.terms import Axis, OneHot, Term
from chainrule.maps.views import expand_to, permute

#: ``(position, start, step, length)`` of a slice of one dimension.
Slice = tuple[int, int, int, int]

#: The sizes of all positions of a result, and for each diagonal the positions that it ties together.
Places = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]


class Layout(NamedTuple):
    """A view of a dense array: slices of its dimensions, then diagonals of what is left.

    Attributes:
        sizes: the dimensions of the array, split into as many as there are axes.
        slices: the parts of these that are viewed; the others are viewed as a whole.
        pairs: for each diagonal, the dimensions that it ties together.
    """

    sizes: tuple[int, ...]
    slices: tuple[Slice, ...]
    pairs: tuple[tuple[int, ...], ...]

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of a contiguous tensor."""
        if tuple(tensor.shape) != self.sizes:
            tensor = tensor.view(self.sizes)
        for place, start, step, length in self.slices:
            tensor = torch.ops.aten.slice.Tensor(tensor, place, start, start + step * (length - 1) + 1, step)
        return diagonals_of(tensor, self.pairs)

    def shape(self) -> tuple[int, ...]:
        """The shape of the view."""
        sizes = list(self.sizes)
        for place, _, _, length in self.slices:
            sizes[place] = length
        tied = {place for places in self.pairs for place in places}
        single = [size for place, size in enumerate(sizes) if place not in tied]
        return (*single, *(sizes[places[0]] for places in self.pairs))


class Diagonal(NamedTuple):
    """A term that stands on diagonals of a dense array.

    Attributes:
        node: its entries.
        names: what the dimensions of ``node`` are among: the dimensions that stand once, in order, then one for each diagonal.
        count: how many dimensions these are.
        places: where they stand.
    """

    node: Node
    names: tuple[int, ...]
    count: int
    places: Places

    def read(self, value: Staged) -> Staged:
        """The entries, so that they broadcast to the diagonals."""
        return expand_to(value, self.names, tuple(range(self.count)))


def repeated_axes(term: Term) -> list[Axis]:
    """The axes that stand at several places among the dimensions of a term: its diagonals."""
    positions = _positions(term)
    return [axis for axis in dict.fromkeys(positions) if positions.count(axis) > 1 and axis.size != 1]


def on_diagonals(term: Term, workspace: Workspace) -> Diagonal:
    """The entries of a settled term with diagonals and without relations, and their places."""
    positions = _positions(term)
    repeated = repeated_axes(term)
    singles = [axis for axis in dict.fromkeys(positions) if axis not in repeated]
    # A size-one axis may stand twice as well: it is one position here, and a reshape puts the other back.
    positions = [axis for p, axis in enumerate(positions) if axis.size != 1 or axis not in positions[:p]]
    factor = dense_factor(term, [*singles, *repeated], workspace)
    names = {axis: number for number, axis in enumerate([*singles, *repeated])}
    pairs = tuple(tuple(p for p, a in enumerate(positions) if a is axis) for axis in repeated)
    sizes = tuple(axis.size for axis in positions)
    return Diagonal(factor.node, tuple(names[a] for a in factor.axes), len(names), (sizes, pairs))


def written_term(term: Term, workspace: Workspace, shape: tuple[int, ...]) -> Node:
    """A settled term with relations (each outer target tied by one, bands included) as a dense array of ``shape``."""
    if is_part(term):
        return _sliced_term(term, workspace, shape)
    outer = term.outer_axes()
    if any(axis not in outer for h in term.onehots for axis in h.sources):
        return banded_term(term, workspace, shape)
    return _scattered_term(term, workspace, shape)


def _positions(term: Term) -> list[Axis]:
    return [axis for side in (term.out_dims, term.in_dims) for dim in side for axis in dim]


def _is_slice(onehot: OneHot) -> bool:
    return onehot.affine is not None and (onehot.affine[1] > 0 or onehot.index.numel == 1)


class Part(NamedTuple):
    """A term that stands in slices of diagonals of a dense array, and is zero elsewhere.

    Attributes:
        node: its entries.
        names: which dimensions of the view those of ``node`` are (dimensions of one element aside).
        squeezed: the sizes of these.
        wide: the sizes of the view's dimensions: those that stand once, in order, then one for each diagonal.
        layout: where the view is.
    """

    node: Node
    names: tuple[int, ...]
    squeezed: tuple[int, ...]
    wide: tuple[int, ...]
    layout: Layout

    def read(self, value: Staged) -> Staged:
        """The entries, so that they broadcast to the view."""
        value = value if tuple(value.shape) == self.squeezed else torch.reshape(value, self.squeezed)
        return expand_to(value, self.names, tuple(range(len(self.wide))))


def is_part(term: Term) -> bool:
    """Whether a settled term stands in slices of diagonals."""
    return all(_is_slice(h) for h in term.onehots)


def part_of(term: Term, workspace: Workspace) -> Part:
    """A settled term for which :func:`is_part` holds: its entries and their place."""
    positions = _positions(term)
    relations = {h.target: h for h in term.onehots}
    slices: list[Slice] = []
    labels: list[Axis] = []
    for place, axis in enumerate(positions):
        relation = relations.get(axis)
        label = axis
        if relation is not None:
            assert relation.affine is not None
            start, step = relation.affine
            label = relation.sources[0] if relation.sources else Axis(1)
            slices.append((place, start, max(step, 1), label.size))
        labels.append(label if label.size != 1 else Axis(1))
    unique = list(dict.fromkeys(labels))
    repeated = [axis for axis in unique if labels.count(axis) > 1]
    order = [axis for axis in unique if axis not in repeated] + repeated
    factor = dense_factor(term, _wide(order), workspace)
    names = {axis: number for number, axis in enumerate(order)}
    carried = [axis for axis in factor.axes if axis in names]
    sizes = tuple(axis.size for axis in positions)
    pairs = tuple(tuple(p for p, a in enumerate(labels) if a is axis) for axis in repeated)
    squeezed, wide = (tuple(axis.size for axis in axes) for axes in (carried, order))
    return Part(factor.node, tuple(names[a] for a in carried), squeezed, wide, Layout(sizes, tuple(slices), pairs))


def _sliced_term(term: Term, workspace: Workspace, shape: tuple[int, ...]) -> Node:
    """All relations are slices: the entries stand in a strided view of the zeros."""
    part = part_of(term, workspace)
    sizes, slices, pairs = part.layout

    def compute(program: Program, value: Staged) -> Staged:
        return program.call(embed_diagonals, part.read(value), sizes, pairs, shape, slices)

    return Node(shape, (part.node,), compute, moved=math.prod(shape) + part.node.numel, label="written slices")


class Piece(NamedTuple):
    """A term that fills a slice of one position of a dense array, and is zero in the rest.

    Attributes:
        node: its entries.
        names: the positions that the dimensions of ``node`` are.
        place: the position that is sliced.
        start: where the slice begins.
        sizes: the sizes of the positions, the slice's length in place of that of the sliced one.
        whole: the sizes of the positions.
    """

    node: Node
    names: tuple[int, ...]
    place: int
    start: int
    sizes: tuple[int, ...]
    whole: tuple[int, ...]

    @property
    def length(self) -> int:
        """The slice's length."""
        return self.sizes[self.place]

    def read(self, value: Staged, order: tuple[int, ...]) -> Staged:
        """The entries over the positions in ``order``."""
        squeezed, sizes = tuple(self.sizes[n] for n in self.names), tuple(self.sizes[n] for n in order)
        value = expand_to(value if tuple(value.shape) == squeezed else torch.reshape(value, squeezed), self.names, order)
        return value if tuple(value.shape) == sizes else torch.broadcast_to(value, sizes)


def _piece(term: Term, workspace: Workspace) -> Piece | None:
    """A term as a piece, if it is one."""
    if len(term.onehots) != 1 or not _is_slice(term.onehots[0]) or term.onehots[0].target.size == 1:
        return None
    (onehot,), positions = term.onehots, _positions(term)
    assert onehot.affine is not None
    start, step = onehot.affine
    source = onehot.sources[0] if onehot.sources else Axis(1)
    labels = [source if axis is onehot.target else axis for axis in positions]
    wide = _wide(labels)
    if positions.count(onehot.target) != 1 or len(set(wide)) < len(wide) or (step != 1 and source.size != 1):
        return None
    factor = dense_factor(term, wide, workspace)
    names = tuple(labels.index(axis) for axis in factor.axes if axis.size != 1)
    sizes, whole = (tuple(axis.size for axis in axes) for axes in (labels, positions))
    return Piece(factor.node, names, positions.index(onehot.target), start, sizes, whole)


def joined_pieces(terms: Sequence[Term], workspace: Workspace, shape: tuple[int, ...]) -> tuple[list[Term], list[Node]]:
    """Those terms of a sum that fill different slices of one position, concatenated; the others are returned as they are.

    The Jacobian with respect to single elements, or to parts of a vector, is one stack of columns, not a sum of padded ones.
    """
    groups: dict[object, list[tuple[Term, Piece]]] = {}
    for term in terms:
        piece = _piece(term, workspace) if len(terms) > 1 else None
        if piece is not None:
            groups.setdefault((piece.place, piece.whole), []).append((term, piece))
    nodes: list[Node] = []
    joined: set[int] = set()
    for group in groups.values():
        group.sort(key=lambda pair: pair[1].start)
        pieces = [piece for _, piece in group]
        apart = all(a.start + a.length <= b.start for a, b in itertools.pairwise(pieces))
        if len(group) > 1 and apart and 2 * sum(p.length for p in pieces) > pieces[0].whole[pieces[0].place]:
            nodes.append(_concatenated(pieces, shape))
            joined.update(id(term) for term, _ in group)
    return [term for term in terms if id(term) not in joined], nodes


def _concatenated(pieces: Sequence[Piece], shape: tuple[int, ...]) -> Node:
    whole, place = pieces[0].whole, pieces[0].place
    extent = whole[place]
    single = len(pieces) == extent
    order = tuple(n for n in range(len(whole)) if n != place or not single)

    def compute(program: Program, *values: Staged) -> Staged:
        parts: list[Staged] = []
        end = 0
        for piece, value in zip(pieces, values, strict=True):
            if piece.start > end:
                parts.append(zeros(program, piece.start - end, value))
            parts.append(piece.read(value, order))
            end = piece.start + piece.length
        if end < extent:
            parts.append(zeros(program, extent - end, values[-1]))
        total = torch.stack(parts, place) if single else torch.cat(parts, place)
        return total if whole == shape else torch.reshape(total, shape)

    def zeros(program: Program, length: int, beside: Staged) -> Staged:
        sizes = (*whole[:place], length, *whole[place + 1 :])
        return program.call(torch.zeros, sizes, dtype=beside.dtype, device=beside.device)

    moved = math.prod(shape) + sum(piece.node.numel for piece in pieces)
    return Node(shape, tuple(piece.node for piece in pieces), compute, moved=moved, label="concatenated slices")


def _wide(axes: Sequence[Axis]) -> list[Axis]:
    return [axis for axis in axes if axis.size != 1]


def _scattered_term(term: Term, workspace: Workspace, shape: tuple[int, ...]) -> Node:
    """Relations by index tensors: one flat index per entry."""
    positions = _positions(term)
    relations = {h.target: h for h in term.onehots}
    grid = list(dict.fromkeys(axis for axis in positions if axis not in relations and axis.size != 1))
    names = {axis: number for number, axis in enumerate(grid)}
    order = tuple(range(len(grid)))
    sizes = tuple(axis.size for axis in grid)
    strides: dict[Axis, int] = {}
    stride = 1
    for axis in reversed(positions):
        strides[axis] = strides.get(axis, 0) + stride
        stride *= axis.size
    factor = dense_factor(term, grid, workspace)
    have = tuple(names[a] for a in factor.axes)
    tied = [h for h in term.onehots if h.target.size != 1 or h.partial]
    total = stride

    def own_places(device: torch.device) -> torch.Tensor:
        places = torch.zeros(sizes, dtype=torch.long, device=device)
        for axis, number in names.items():
            counted = torch.arange(axis.size, device=device) * strides[axis]
            places = places + counted.reshape([-1 if n == number else 1 for n in order])
        return places

    def compute(program: Program, value: Staged, *indices: Staged) -> Staged:
        places = program.constant(own_places(value.device))
        value = torch.broadcast_to(expand_to(value, have, order), sizes)
        for onehot, index in zip(tied, indices, strict=True):
            index = _over_grid(index, onehot, names, order)
            if onehot.partial:
                value = torch.where(index >= 0, value, 0.0)
                index = torch.clamp(index, min=0)
            places = places + index * strides[onehot.target]
        zeros = program.call(torch.zeros, (total,), dtype=value.dtype, device=value.device)
        places = torch.reshape(places, (-1,))
        return torch.reshape(torch.scatter(zeros, 0, places, torch.reshape(value, (-1,))), shape)

    count = math.prod(sizes)
    inputs = (factor.node, *(h.index for h in tied))
    return Node(shape, inputs, compute, moved=total + 4 * count, label="written entries")


def _over_grid(index: Staged, onehot: OneHot, names: dict[Axis, int], order: tuple[int, ...]) -> Staged:
    """View a relation's index so that it broadcasts over the grid of free axes."""
    sources = tuple(axis for axis in onehot.sources if axis in names)
    if len(sources) != len(onehot.sources):
        index = torch.reshape(index, tuple(axis.size for axis in sources))
    sorted_sources = sorted(sources, key=lambda axis: names[axis])
    index = permute(index, tuple(sources.index(axis) for axis in sorted_sources))
    return expand_to(index, tuple(names[axis] for axis in sorted_sources), order)


def embed_diagonals(
    value: torch.Tensor,
    sizes: tuple[int, ...],
    repeated: tuple[tuple[int, ...], ...],
    shape: tuple[int, ...],
    slices: tuple[Slice, ...] = (),
) -> torch.Tensor:
    """Write ``value`` into (slices of) the diagonals of zeros.

    Args:
        value: broadcastable to (dimensions that stand once, in order; then one dimension per diagonal).
        sizes: the sizes of all positions of the result, diagonals counted at each of their places.
        repeated: for each diagonal, the positions that it ties together.
        shape: the shape of the result (the same elements as ``sizes``).
        slices: the parts of positions that are written; the others are written as a whole.

    Returns:
        A fresh tensor of ``shape``.
    """
    result = new_zeros(value, sizes)
    Layout(sizes, slices, repeated).view(result).copy_(value)
    return result if tuple(sizes) == shape else result.reshape(shape)


def pad_zeros(
    value: torch.Tensor, sizes: tuple[int, ...], shape: tuple[int, ...], slices: tuple[Slice, ...] = ()
) -> torch.Tensor:
    """What :func:`embed_diagonals` does where there are no diagonals and no slices in steps, without writing to a tensor.

    A write that is recorded is several ops, of which each has derivatives.
    """
    inside, pads = [*sizes], [0] * (2 * len(sizes))
    for place, start, _, length in slices:
        inside[place] = length
        last = 2 * (len(sizes) - 1 - place)
        pads[last], pads[last + 1] = start, sizes[place] - start - length
    if list(value.shape) != inside:
        value = value.reshape(inside) if math.prod(inside) == value.numel() else torch.broadcast_to(value, inside)
    result = torch.constant_pad_nd(value, pads)
    return result if tuple(sizes) == shape else result.reshape(shape)


def without_writes(instruction: Instruction) -> Instruction:
    """The same call, by :func:`pad_zeros` where that does what :func:`embed_diagonals` would."""
    if instruction.function is not embed_diagonals or instruction.kwargs:
        return instruction
    value, sizes, repeated, shape, *rest = instruction.args
    slices = rest[0] if rest else ()
    if repeated or any(step != 1 for _, _, step, _ in slices):
        return instruction
    return instruction._replace(function=pad_zeros, args=(value, sizes, shape, slices))


def diagonals_of(tensor: torch.Tensor, repeated: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """A view of the diagonals that tie positions together: the other dimensions in order, then one for each diagonal."""
    present = list(range(tensor.dim()))
    for places in repeated:
        first = present.index(places[0])
        for later in places[1:]:
            second = present.index(later)
            tensor = torch.diagonal(tensor, 0, first, second)
            present = [p for i, p in enumerate(present) if i not in (first, second)] + [places[0]]
            first = len(present) - 1
    return tensor


__all__ = [
    "Layout",
    "Part",
    "embed_diagonals",
    "is_part",
    "joined_pieces",
    "on_diagonals",
    "pad_zeros",
    "part_of",
    "repeated_axes",
    "without_writes",
    "written_term",
]
