"""Terms: small networks of factors over named axes, whose sum is a linear map.

A term's entry at (output index, input index) is

    scale * sum over internal axes of  prod_f factor_f[axes of f] * prod_h [target_h == index_h[sources of h]]

Every output and input dimension is a row-major tuple of axes (empty for a dimension of size one).  An axis that stands
on both sides is a diagonal.  A one-hot factor ties its target axis to its source axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy
import torch

from chainrule.maps.nodes import Node, reshaped
from chainrule.maps.staging import Program, Staged


class Axis:
    """A named index with a size. Two axes are the same only if they are the same object."""

    __slots__ = ("size",)

    def __init__(self, size: int) -> None:
        self.size = size

    def __repr__(self) -> str:
        """Return a short name with the size."""
        return f"a{id(self) // 64 % 10000}:{self.size}"


Dims = tuple[tuple[Axis, ...], ...]


class Factor(NamedTuple):
    """A dense factor: an array with one axis per dimension."""

    node: Node
    axes: tuple[Axis, ...]


class OneHot(NamedTuple):
    """An integer relation ``target == index[sources]``; a negative index stands for no target (a zero row).

    ``affine`` is ``(start, step)`` when the index is ``start + step * source`` and always in range; ``(start, 0)`` when
    there is no source.

    ``shift`` is ``(start, steps)`` when the index is ``start + sum of step * source`` wherever that lies within the target,
    and negative elsewhere: what an output of a stencil reads by each of its taps.
    """

    index: Node
    sources: tuple[Axis, ...]
    target: Axis
    partial: bool = False
    affine: tuple[int, int] | None = None
    shift: tuple[int, tuple[int, ...]] | None = None


@dataclass(slots=True, eq=False)
class Term:
    """One product of factors between output dimensions and input dimensions. Terms are never changed, only made anew.

    Attributes:
        out_dims: the axes of every output dimension.
        in_dims: the axes of every input dimension.
        factors: the dense factors.
        onehots: the relations.
        scale: a number that everything is multiplied with.
        settled: whether there is nothing to settle (see :func:`chainrule.maps.compose.settle`); false where it is not known.
    """

    out_dims: Dims
    in_dims: Dims
    factors: tuple[Factor, ...] = ()
    onehots: tuple[OneHot, ...] = ()
    scale: float = 1.0
    settled: bool = field(default=False, init=False, repr=False)
    _outer: dict[Axis, None] | None = field(default=None, init=False, repr=False)
    _all: dict[Axis, None] | None = field(default=None, init=False, repr=False)

    def transpose(self) -> Term:
        """The same network read from the input to the output."""
        return Term(self.in_dims, self.out_dims, self.factors, self.onehots, self.scale)

    def having(
        self,
        factors: tuple[Factor, ...] | None = None,
        onehots: tuple[OneHot, ...] | None = None,
        scale: float | None = None,
    ) -> Term:
        """The term with other factors, relations or another scale: `dataclasses.replace` at a fraction of its time."""
        return Term(
            self.out_dims,
            self.in_dims,
            self.factors if factors is None else factors,
            self.onehots if onehots is None else onehots,
            self.scale if scale is None else scale,
        )

    def outer_axes(self) -> Mapping[Axis, None]:
        """The axes of the output and input dimensions, in order, each once."""
        if self._outer is None:
            self._outer = {axis: None for dims in (self.out_dims, self.in_dims) for dim in dims for axis in dim}
        return self._outer

    def carried_axes(self) -> set[Axis]:
        """The axes that some dense factor carries."""
        return {axis for factor in self.factors for axis in factor.axes}

    def rename(self, mapping: dict[Axis, Axis]) -> Term:
        """Replace axes by axes of the same size."""
        if not mapping:
            return self

        def one(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
            return tuple(mapping.get(axis, axis) for axis in axes)

        return Term(
            tuple(one(dim) for dim in self.out_dims),
            tuple(one(dim) for dim in self.in_dims),
            tuple(Factor(f.node, one(f.axes)) for f in self.factors),
            tuple(h._replace(sources=one(h.sources), target=mapping.get(h.target, h.target)) for h in self.onehots),
            self.scale,
        )

    def fresh(self) -> Term:
        """The same term with axes of its own, so that it can be joined to another use of itself."""
        mapping: dict[Axis, Axis] = {}
        for axis in self.all_axes():
            mapping[axis] = Axis(axis.size)
        return self.rename(mapping)

    def all_axes(self) -> Mapping[Axis, None]:
        """Every axis that occurs anywhere in the term, the outer ones first."""
        if self._all is None:
            axes = dict(self.outer_axes())
            for factor in self.factors:
                for axis in factor.axes:
                    axes[axis] = None
            for onehot in self.onehots:
                for axis in onehot.sources:
                    axes[axis] = None
                axes[onehot.target] = None
            self._all = axes
        return self._all

    @property
    def is_empty(self) -> bool:
        """Whether an axis has no element."""
        return any([axis.size == 0 for axis in self.all_axes()])

    def split(self, axis: Axis, parts: tuple[Axis, ...]) -> Term:
        """Replace ``axis`` by the row-major product of ``parts`` everywhere."""

        def one(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
            return tuple(item for a in axes for item in (parts if a is axis else (a,)))

        factors = []
        for factor in self.factors:
            axes = one(factor.axes)
            factors.append(Factor(reshaped(factor.node, (a.size for a in axes)), axes))
        onehots: list[OneHot] = []
        for onehot in self.onehots:
            sources = one(onehot.sources)
            index = onehot.index
            affine = onehot.affine
            if sources != onehot.sources:
                index, affine = reshaped(index, (a.size for a in sources)), None
            if onehot.target is not axis:
                onehots.append(OneHot(index, sources, onehot.target, onehot.partial, affine))
                continue
            stride = axis.size
            for part in parts:
                stride //= max(part.size, 1)
                onehots.append(OneHot(_index_digit(index, stride, part.size), sources, part, onehot.partial))
        return Term(
            tuple(one(dim) for dim in self.out_dims),
            tuple(one(dim) for dim in self.in_dims),
            tuple(factors),
            tuple(onehots),
            self.scale,
        )


def _index_digit(index: Node, stride: int, size: int) -> Node:
    """The digit of an index in a mixed-radix split; -1 stays -1."""

    def compute(program: Program, value: Staged) -> Staged:
        digit = torch.remainder(torch.div(value, max(stride, 1), rounding_mode="floor"), max(size, 1))
        return torch.where(value < 0, value, digit)

    return Node(index.sizes, (index,), compute, label="index digit")


def constant_index(sizes: Iterable[int], make: Callable[[torch.device], torch.Tensor], device: torch.device) -> Node:
    """An index node that is the same in every run: computed once and kept in the program."""
    return Node(tuple(sizes), (), lambda program: program.constant(make(device)), label="index")


def listed_index(positions: Sequence[int], device: torch.device) -> Node:
    """The index node of a list of places."""
    places = numpy.asarray(positions, dtype=numpy.int64)
    steps = numpy.diff(places)
    changes = (numpy.flatnonzero(steps[1:] != steps[:-1]) + 1).tolist()
    runs: list[tuple[int, int, int]] = []
    first = 0
    for change in [*changes, len(places) - 1]:
        # The step at a change leads from one run to the next: that run may begin with it only.
        if change >= first:
            step = int(steps[first]) if change > first else 0
            runs.append((int(places[first]), step, change - first + 1))
            first = change + 1

    def make(wanted: torch.device) -> torch.Tensor:
        # Not torch.tensor, which puts a tensor of unknown origin into the record of a nest.
        return torch.cat([
            torch.arange(start, start + step * count, step, device=wanted)
            if step else torch.full((count,), start, dtype=torch.long, device=wanted)
            for start, step, count in runs
        ])  # fmt: skip

    return constant_index((len(positions),), make, device)


class IndexSpace(Protocol):
    """Where relations are made: the device of their indices, and the nodes that the plan has made so far."""

    device: torch.device
    memo: dict[object, Node]


def fixed_index(target: Axis, index: int, space: IndexSpace) -> OneHot:
    """The relation ``target == index``, which has no sources."""
    key = ("fixed index", index)
    node = space.memo.get(key)
    if node is None:
        # Not torch.tensor, which puts a tensor of unknown origin into the record of a nest.
        node = space.memo[key] = constant_index(
            (), lambda d: torch.full((), index, dtype=torch.long, device=d), space.device
        )
    return OneHot(node, (), target, False, (index, 0))


def affine_onehot(source: Axis, target: Axis, start: int, step: int, space: IndexSpace) -> OneHot:
    """The relation of a slice: ``target == start + step * source``."""
    return OneHot(affine_index(source.size, start, step, space), (source,), target, False, (start, step))


def affine_index(size: int, start: int, step: int, space: IndexSpace) -> Node:
    """The index ``start + step * position``; equal ones are one node, so that equal relations are known as such."""
    key = ("affine index", size, start, step)
    node = space.memo.get(key)
    if node is None:
        node = space.memo[key] = constant_index((size,), lambda d: start + step * torch.arange(size, device=d), space.device)
    return node


def shift_of(onehot: OneHot) -> tuple[int, tuple[int, ...]] | None:
    """The start and the steps of a relation that is a shift (a slice is one), or None."""
    if onehot.shift is None and onehot.affine is not None:
        start, step = onehot.affine
        return start, (step,) * len(onehot.sources)
    return onehot.shift


def shift_onehot(
    sources: tuple[Axis, ...], target: Axis, start: int, steps: tuple[int, ...], memo: dict[object, Node], device: torch.device
) -> OneHot:
    """The relation ``target == start + sum of step * source``, where that lies within the target."""
    sizes, size = tuple(axis.size for axis in sources), target.size
    key = ("shift", sizes, size, start, steps)
    index = memo.get(key)
    if index is None:

        def make(wanted: torch.device) -> torch.Tensor:
            place = torch.full(sizes, start, dtype=torch.long, device=wanted)
            for d, (count, step) in enumerate(zip(sizes, steps, strict=True)):
                place += step * torch.arange(count, device=wanted).reshape([-1 if e == d else 1 for e in range(len(sizes))])
            return torch.where((place >= 0) & (place < size), place, -1)

        index = memo[key] = constant_index(sizes, make, device)
    reach = [step * (count - 1) for step, count in zip(steps, sizes, strict=True)]
    low, high = start + sum(min(0, r) for r in reach), start + sum(max(0, r) for r in reach)
    partial = low < 0 or high >= size
    affine = (start, steps[0]) if len(sources) == 1 and not partial else None
    return OneHot(index, sources, target, partial, affine, (start, steps))


def regroup(sources: tuple[Axis, ...], targets: tuple[Axis, ...], device: torch.device) -> list[OneHot]:
    """One relation per target axis: both tuples enumerate the same elements in row-major order."""
    sizes = tuple(axis.size for axis in sources)
    total = math.prod(sizes)
    relations = []
    stride = total
    for target in targets:
        stride = stride // target.size if target.size else 0
        current, extent = max(stride, 1), max(target.size, 1)
        index = constant_index(
            sizes, lambda d, s=current, e=extent: (torch.arange(total, device=d) // s % e).reshape(sizes), device
        )
        relations.append(OneHot(index, sources, target))
    return relations


def new_axes(shape: Iterable[int]) -> tuple[Axis, ...]:
    """One fresh axis per dimension."""
    return tuple(Axis(size) for size in shape)


def dims_of(axes: Iterable[Axis]) -> Dims:
    """One dimension per axis."""
    return tuple((axis,) for axis in axes)


def identity(shape: Iterable[int]) -> Term:
    """The identity map on tensors of ``shape``: nothing is stored for it."""
    dims = dims_of(new_axes(shape))
    return Term(dims, dims)


def dims_size(dims: Dims) -> int:
    """The number of elements of a tensor with these dimensions."""
    return math.prod(axis.size for dim in dims for axis in dim)
