"""Terms: small networks of factors over named axes, whose sum is a linear map.

A term's entry at (output index, input index) is

    scale * sum over internal axes of  prod_f factor_f[axes of f] * prod_h [target_h == index_h[sources of h]]

Every output and input dimension is a row-major tuple of axes (empty for a dimension of size one).  An axis that stands
on both sides is a diagonal.  A one-hot factor ties its target axis to its source axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

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


@dataclass(frozen=True)
class Term:
    """One product of factors between output dimensions and input dimensions."""

    out_dims: Dims
    in_dims: Dims
    factors: tuple[Factor, ...] = ()
    onehots: tuple[OneHot, ...] = ()
    scale: float = 1.0

    def transpose(self) -> Term:
        """The same network read from the input to the output."""
        return replace(self, out_dims=self.in_dims, in_dims=self.out_dims)

    def outer_axes(self) -> dict[Axis, None]:
        """The axes of the output and input dimensions, in order, each once."""
        return dict.fromkeys(axis for dims in (self.out_dims, self.in_dims) for dim in dims for axis in dim)

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

    def all_axes(self) -> dict[Axis, None]:
        """Every axis that occurs anywhere in the term."""
        axes = self.outer_axes()
        for factor in self.factors:
            axes.update(dict.fromkeys(factor.axes))
        for onehot in self.onehots:
            axes.update(dict.fromkeys(onehot.sources))
            axes[onehot.target] = None
        return axes

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
    runs: list[list[int]] = []
    for place in positions:
        if runs and (runs[-1][2] == 1 or place == runs[-1][0] + runs[-1][1] * runs[-1][2]):
            run = runs[-1]
            run[1], run[2] = (place - run[0] if run[2] == 1 else run[1]), run[2] + 1
        else:
            runs.append([place, 0, 1])

    def make(wanted: torch.device) -> torch.Tensor:
        # Not torch.tensor, which puts a tensor of unknown origin into the record of a nest.
        return torch.cat([
            torch.arange(start, start + step * count, step, device=wanted)
            if step else torch.full((count,), start, dtype=torch.long, device=wanted)
            for start, step, count in runs
        ])  # fmt: skip

    return constant_index((len(positions),), make, device)


def affine_onehot(source: Axis, target: Axis, start: int, step: int, device: torch.device) -> OneHot:
    """The relation of a slice: ``target == start + step * source``."""
    size = source.size
    index = constant_index((size,), lambda d: start + step * torch.arange(size, device=d), device)
    return OneHot(index, (source,), target, False, (start, step))


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
