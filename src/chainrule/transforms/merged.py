"""One vmap directly around another, run as one: two batch dimensions are one that is longer.

``vmap(vmap(f, in_dims=(None, 0)), in_dims=(0, None))`` runs nothing of the user's between its levels. Where the arguments can be
given both dimensions at once for next to nothing, one level does the work of both, and each call passes one handler. A function
that writes into its arguments, or asks for its level, is left to two levels: its first call is watched.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

#: The most bytes of copies of arguments that are mapped by one of the levels.
_MOST_COPIED = 1 << 15

_PLAIN = (Tensor, torch.nn.Parameter)


#: By the identity of a function's code, or of another callable: that object, and whether its first call let two levels be one.
_KNOWN: dict[int, tuple[weakref.ref[Any], bool]] = {}


class _Met:
    """How often something was met that has to know its own level."""

    met = 0


APART = _Met()


class Apart(BaseException):  # noqa: N818 -- no error, and no handler of a user's may take it
    """A run of two levels as one has met what has to know its own level."""


class Merged(NamedTuple):
    """What the innermost function is given.

    Attributes:
        values: its arguments, with one dimension in the place of two, the first.
        mapped: which of them have it.
        sizes: of the two levels.
        copies: those of the arguments that one of the levels does not map.
        versions: how often the tensors among the arguments had been written to.
    """

    values: list[Any]
    mapped: list[bool]
    sizes: tuple[int, int]
    copies: list[Tensor]
    versions: list[tuple[Tensor, int]]

    @property
    def wrote_copies(self) -> bool:
        """Whether copies have been written to, of which the arguments know nothing. They were fresh."""
        return any([copy._version for copy in self.copies])


def merged_inputs(outer: Any, inner: Any, args: Sequence[Any]) -> Merged | None:
    """The arguments of two levels for one; None where two serve better, or something is wrong.

    Args:
        outer: the ``in_dims`` of the outer level.
        inner: those of the inner one.
        args: the arguments.
    """
    if torch._C._len_torch_dispatch_stack() or forward_ad._current_level >= 0 or torch.is_inference_mode_enabled():
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
    merged = Merged([], [], (sizes[0], sizes[1]), [], versions_of(args))
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
            merged.copies.append(copy)
    return merged


def _places(arg: Any, outer: Any, inner: Any) -> tuple[int | None, int | None] | None:
    """The dimensions of an argument that the two levels map; None for what is left to them."""
    if outer is None and inner is None:
        return None, None
    if arg.__class__ not in _PLAIN or arg.layout is not torch.strided or arg.is_conj() or arg.is_neg() or arg.is_inference():
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


def versions_of(args: Sequence[Any]) -> list[tuple[Tensor, int]]:
    """The tensors among arguments, and how often each has been written to."""
    found = []
    for arg in args:
        leaves = (arg,) if arg.__class__ in _PLAIN else tree_leaves(arg)
        found += [(leaf, leaf._version) for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]
    return found


def written(versions: Sequence[tuple[Tensor, int]]) -> bool:
    """Whether one of the tensors has been written to since."""
    return any([tensor._version != version for tensor, version in versions])


def core_of(func: Callable[..., Any]) -> Any:
    """What a function that transforms may stand around is known by: its code, or the callable itself."""
    while True:
        if isinstance(func, functools.partial):
            func = func.func
        elif isinstance(func, MethodType):
            func = func.__func__
        elif (inner := getattr(func, "__dict__", {}).get("__wrapped__")) is not None:
            func = inner
        else:
            return getattr(func, "__code__", func)


def lets_merge(core: Any) -> bool | None:
    """Whether a function leaves its arguments as they are and does not ask for its level; None before its first call."""
    known = _KNOWN.get(id(core))
    return known[1] if known is not None and known[0]() is core else None


def note(core: Any, merges: bool) -> None:
    """Remember whether two levels around a function may be one."""
    number = id(core)
    try:
        _KNOWN[number] = weakref.ref(core, lambda reference: _forget(number, reference)), merges
    except TypeError:  # a callable without weak references stays unknown: two levels
        return


def _forget(number: int, reference: weakref.ref[Any]) -> None:
    if (known := _KNOWN.get(number)) is not None and known[0] is reference:
        del _KNOWN[number]
