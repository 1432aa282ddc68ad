"""One vmap directly around another, run as one: two batch dimensions are one that is longer.

``vmap(vmap(f, in_dims=(None, 0)), in_dims=(0, None))`` runs nothing of the user's between its levels. Where the arguments can be
given both dimensions at once for next to nothing, one level does the work of both, and each call passes one handler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

#: The most bytes of copies of arguments that are mapped by one of the levels.
_MOST_COPIED = 1 << 15

_PLAIN = (Tensor, torch.nn.Parameter)


class Copied(NamedTuple):
    """A copy that stands for an argument which one of the levels does not map.

    Attributes:
        whole: the argument with both dimensions in front, that of the other level of length 1.
        copy: the copy, with one dimension for the two.
        level: the level that does not map it.
        version: how often the copy had been written to.
    """

    whole: Tensor
    copy: Tensor
    level: int
    version: int


class Merged(NamedTuple):
    """What the innermost function is given.

    Attributes:
        values: its arguments, with one dimension in the place of two, the first.
        mapped: which of them have it.
        sizes: of the two levels.
        copied: the arguments that had to be copied.
    """

    values: list[Any]
    mapped: list[bool]
    sizes: tuple[int, int]
    copied: list[Copied]


def merged_inputs(outer: Any, inner: Any, args: Sequence[Any]) -> Merged | None:
    """The arguments of two levels for one; None where two serve better, or something is wrong.

    Args:
        outer: the ``in_dims`` of the outer level.
        inner: those of the inner one.
        args: the arguments.
    """
    if torch._C._len_torch_dispatch_stack() or forward_ad._current_level >= 0:
        return None
    count = len(args)
    dims = [(item,) * count if item.__class__ is int else item for item in (outer, inner)]
    if not all([item.__class__ is tuple and len(item) == count for item in dims]):
        return None
    found = [_places(arg, *pair) for arg, *pair in zip(args, *dims, strict=True)]
    sizes = [0, 0]
    for arg, places in zip(args, found, strict=True):
        if places is None:
            return None
        for level, place in enumerate(places):
            if place is not None:
                size = arg.shape[place]
                if sizes[level] not in (0, size):
                    return None
                sizes[level] = size
    if not all(sizes):
        return None
    merged = Merged([], [], (sizes[0], sizes[1]), [])
    spent = 0
    for arg, places in zip(args, found, strict=True):
        assert places is not None
        merged.mapped.append(places != (None, None))
        if not merged.mapped[-1]:
            merged.values.append(arg)
        elif None not in places:
            front = arg.permute(*places, *[dim for dim in range(arg.dim()) if dim not in places])
            if front.stride(0) != front.stride(1) * sizes[1]:  # it would have to be copied, and may be written to
                return None
            merged.values.append(front.flatten(0, 1))
        else:
            level = places.index(None)
            spent += arg.numel() * sizes[level] * arg.element_size()
            if spent > _MOST_COPIED:
                return None
            whole = arg.movedim(places[1 - level], 0).unsqueeze(level)
            copy = whole.expand(*sizes, *whole.shape[2:]).clone(memory_format=torch.contiguous_format).flatten(0, 1)
            merged.values.append(copy)
            merged.copied.append(Copied(whole, copy, level, copy._version))
    return merged


def _places(arg: Any, outer: Any, inner: Any) -> tuple[int | None, int | None] | None:
    """The dimensions of an argument that the two levels map; None for what is left to them."""
    if outer is None and inner is None:
        return None, None
    if arg.__class__ not in _PLAIN or arg.layout is not torch.strided or arg.is_conj() or arg.is_neg():
        return None
    rank = arg.dim()
    first = second = None
    if outer is not None:
        if outer.__class__ is not int or not -rank <= outer < rank:
            return None
        first = outer % rank
        rank -= 1
    if inner is not None:
        if inner.__class__ is not int or not -rank <= inner < rank:
            return None
        second = inner % rank
        if first is not None and second >= first:
            second += 1
    return first, second


def write_back(merged: Merged, name: Callable[[], str]) -> None:
    """Give the arguments what was written to their copies.

    Args:
        merged: what the function was given.
        name: its name, for the message.

    Raises:
        RuntimeError: if what was written differs between the samples of a level that does not map an argument.
    """
    for whole, copy, level, version in merged.copied:
        if copy._version == version:
            continue
        parts = copy.detach().unflatten(0, merged.sizes)
        first = parts.narrow(level, 0, 1)
        if not torch.equal(first.expand_as(parts), parts):
            raise RuntimeError(
                f"vmap({name()}, ...): a value that differs between samples was written into an argument with in_dims=None, "
                "which has no batch dimension there. Map that argument, or use the out-of-place version of the op."
            )
        whole.copy_(first)
