"""The spaces that a linear map goes between: trees of tensors, as trees and flattened into one dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils._pytree import TreeSpec

from chainrule.batching.tensor import BatchTensor
from chainrule.capture.whole_recorder import whole_recorder
from chainrule.modes_off import unseen
from chainrule.transforms.arguments import tree_flatten, tree_unflatten


@dataclass(frozen=True)
class Space:
    """Trees of tensors of given shapes.

    Attributes:
        spec: the structure of a tree.
        shapes: the shapes of its leaves.
        dtypes: their dtypes.
        devices: their devices.
    """

    spec: TreeSpec
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[torch.device, ...]

    @classmethod
    def of(cls, leaves: Sequence[torch.Tensor], spec: TreeSpec) -> Space:
        """The space that some tensors lie in."""
        return cls(
            spec, tuple(t.shape for t in leaves), tuple(t.dtype for t in leaves), tuple(t.device for t in leaves)
        )

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of elements of the leaves."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def size(self) -> int:
        """The number of elements of all leaves."""
        return sum(self.sizes)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that holds all leaves."""
        found = self.dtypes[0]
        for dtype in self.dtypes[1:]:
            found = torch.promote_types(found, dtype)
        return found

    @property
    def shape_tree(self) -> Any:
        """The shapes in the structure of a tree."""
        return tree_unflatten(list(self.shapes), self.spec)

    def tree(self, leaves: list[Any]) -> Any:
        """A tree of leaves."""
        return tree_unflatten(leaves, self.spec)

    def zeros(self, number: int, dtype: torch.dtype, *, before: Sequence[int] = (), after: Sequence[int] = ()) -> torch.Tensor:
        """Zeros of the shape of a leaf, with further dimensions around."""
        return torch.zeros((*before, *self.shapes[number], *after), dtype=dtype, device=self.devices[number])

    def leaves_of(self, tree: Any, what: str, *, rows: bool = False) -> tuple[list[torch.Tensor], int | None]:
        """The leaves of an element of this space, or of several side by side in one more dimension behind.

        Args:
            tree: the element.
            what: what it is, for messages.
            rows: whether that dimension stands before the others.

        Returns:
            The leaves, and how many elements there are; None for a single one without the dimension.

        Raises:
            ValueError: if the structure, a shape or a device does not fit.
            TypeError: if a leaf is no tensor of the dtype of this space.
        """
        leaves, spec = tree_flatten(tree)
        if spec is not self.spec and spec != self.spec:
            raise ValueError(f"{what}: expected the structure {self.spec}, got {spec}")
        several: int | None = None
        for number, (leaf, shape) in enumerate(zip(leaves, self.shapes, strict=True)):
            where = f"{what}: leaf {number}" if len(leaves) > 1 else what
            if not isinstance(leaf, torch.Tensor):
                raise TypeError(f"{where}: expected a Tensor, got {type(leaf)}")
            columns = int(leaf.shape[0 if rows else -1]) if leaf.dim() == len(shape) + 1 else None
            wanted = shape if columns is None else (columns, *shape) if rows else (*shape, columns)
            if leaf.shape != wanted or (number and columns != several):
                many = ", ".join(["k", *map(str, shape)] if rows else [*map(str, shape), "k"])
                expected = f"{tuple(shape)}, or ({many}{'' if shape else ','}) for k at once"
                if number:
                    several_of = (several, *shape) if rows else (*shape, several)
                    expected = str(tuple(shape) if several is None else several_of)
                raise ValueError(f"{where}: expected the shape {expected}, got {tuple(leaf.shape)}")
            several = columns
            if leaf.dtype != self.dtypes[number]:
                raise TypeError(f"{where}: expected the dtype {self.dtypes[number]}, got {leaf.dtype}")
            if leaf.device != self.devices[number]:
                raise ValueError(f"{where}: expected a tensor on {self.devices[number]}, got one on {leaf.device}")
        return leaves, several

    def flatten(self, leaves: Sequence[torch.Tensor], columns: int | None = None) -> torch.Tensor:
        """The elements of leaves in one dimension, in order; columns stay behind it."""
        end = () if columns is None else (columns,)
        parts = [leaf.reshape((size, *end)) for leaf, size in zip(leaves, self.sizes, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def unflatten(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """The leaves that :meth:`flatten` made a vector of, in their dtypes and on their devices."""
        end = vector.shape[1:]
        return [
            part.reshape((*shape, *end)).to(device=device, dtype=dtype)
            for part, shape, dtype, device in zip(
                vector.split(self.sizes), self.shapes, self.dtypes, self.devices, strict=True
            )
        ]

    def fits(self, other: Space) -> bool:
        """Whether elements of one are elements of the other."""
        return self.shapes == other.shapes and self.dtypes == other.dtypes and self.spec == other.spec

    def __str__(self) -> str:
        return str(tree_unflatten([tuple(shape) for shape in self.shapes], self.spec))


@dataclass(frozen=True)
class Positions:
    """Some elements of a flattened tree.

    Attributes:
        index: their positions: int64, one dimension, none negative.
        single: whether they were given as one number.
        listed: whether they were given one by one, and not as a slice.
    """

    index: torch.Tensor
    single: bool = False
    listed: bool = True

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.index.shape[0])


def positions(index: Any, size: int, what: str) -> Positions:
    """Read an index into ``size`` elements.

    Args:
        index: a number, a slice, or a list, range or one-dimensional tensor of numbers or of truth values.
        size: how many elements there are.
        what: what is indexed, for messages.

    Raises:
        TypeError: if it is none of these, or differs between the samples of a vmap.
        IndexError: if it does not fit.
    """
    if isinstance(index, bool):
        raise TypeError(f"{what}: expected a number, a slice, or a list or tensor of them, got a bool")
    while index.__class__ is BatchTensor:
        if index.batched:
            raise TypeError(f"{what}: an index that differs between the samples of a vmap cannot choose rows or columns")
        index = index.inner
    if isinstance(index, torch.Tensor) and (recorder := whole_recorder()) is not None:
        with unseen():
            known = index.clone()
        recorder.expect(index, known)
    with unseen():
        if isinstance(index, slice):
            return Positions(torch.tensor(range(*index.indices(size)), dtype=torch.int64), listed=False)
        if isinstance(index, int):
            return Positions(_checked(torch.tensor([index]), size, what), single=True)
        if not isinstance(index, torch.Tensor):
            try:
                index = torch.as_tensor(list(index) if isinstance(index, range) else index)
            except (TypeError, ValueError, RuntimeError):
                index = torch.empty(0, 0)
            if index.numel() == 0 and index.dim() == 1:
                index = index.to(torch.int64)
        index = index.cpu()
        if index.dtype == torch.bool and index.shape == (size,):
            return Positions(index.nonzero().reshape(-1))
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool or index.dim() > 1:
            raise TypeError(
                f"{what}: expected a number, a slice, or a list or one-dimensional tensor of integers (or of {size} bools)"
            )
        return Positions(_checked(index.reshape(-1).to(torch.int64), size, what), single=index.dim() == 0)


def _checked(index: torch.Tensor, size: int, what: str) -> torch.Tensor:
    if index.numel() and not (-size <= int(index.min()) and int(index.max()) < size):
        raise IndexError(f"{what}: an index is out of range for {size} elements")
    return torch.where(index < 0, index + size, index)


@dataclass(frozen=True)
class Parts:
    """Chosen elements by the leaf that they belong to.

    Attributes:
        leaves: the numbers of the leaves that have some, in order.
        local: for each of these, the positions within the leaf; None for all of its elements.
        order: how the elements, leaf by leaf, are put into the order asked for; None if they are in it.
    """

    leaves: tuple[int, ...]
    local: tuple[torch.Tensor | None, ...]
    order: torch.Tensor | None


def by_leaf(space: Space, chosen: Positions | None) -> Parts:
    """Divide chosen elements of a space by its leaves; None for all."""
    if chosen is None:
        count = len(space.shapes)
        return Parts(tuple(range(count)), (None,) * count, None)
    with torch._C._DisableTorchDispatch():
        if len(space.shapes) == 1:
            return Parts((0,), (chosen.index.to(space.devices[0]),), None)
        leaves, local, places, start = [], [], [], 0
        index = chosen.index
        for number, size in enumerate(space.sizes):
            place = ((index >= start) & (index < start + size)).nonzero().reshape(-1)
            if place.numel():
                leaves.append(number)
                local.append((index[place] - start).to(space.devices[number]))
                places.append(place)
            start += size
        if not leaves:
            return Parts((), (), None)
        order = torch.cat(places).argsort()
        in_order = bool((order == torch.arange(len(order), device=order.device)).all())
        return Parts(tuple(leaves), tuple(local), None if in_order else order)


__all__ = ["Parts", "Positions", "Space", "by_leaf", "positions"]
