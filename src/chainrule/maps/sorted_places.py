"""Places as numbers: sorted and each once, with where each of them stands among those."""

from __future__ import annotations

import numpy
import torch

#: Numbers are counted in a list of all of them, not sorted, where these are at most so many times as many.
_SPREAD = 4


def ordering(numbers: torch.Tensor) -> torch.Tensor:
    """The order in which a vector of integers ascends; equal ones keep their order.

    Numbers that come in a few ascending runs, as those of a pattern do, are merged instead of sorted.
    """
    if numbers.device.type != "cpu" or numbers.numel() < 2 or torch._C._len_torch_dispatch_stack():
        # What a recorder is to see is torch's.
        return torch.argsort(numbers, stable=True)
    descents = int((numbers[1:] < numbers[:-1]).sum())
    if descents == 0:
        return torch.arange(numbers.numel())
    if descents * 32 < numbers.numel():
        # NumPy's stable sort is a merge of runs; torch's begins from nothing.
        return torch.from_numpy(numpy.argsort(numbers.numpy(), kind="stable"))
    return torch.argsort(numbers, stable=True)


def places_among(numbers: torch.Tensor, size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers of a vector, ascending and each once, and the place of every one of the vector among these.

    Args:
        numbers: the vector.
        size: where this is known, what they are all less than; then none is negative.
    """
    if size is not None and size <= _SPREAD * numbers.numel():
        there = torch.zeros(size, dtype=torch.bool, device=numbers.device)
        there.index_fill_(0, numbers, True)
        return torch.nonzero(there).squeeze(1), torch.cumsum(there, 0).sub_(1).index_select(0, numbers)
    order = ordering(numbers)
    ascending = numbers.index_select(0, order)
    first = torch.ones(numbers.numel(), dtype=torch.bool, device=numbers.device)
    torch.ne(ascending[1:], ascending[:-1], out=first[1:])
    rank = torch.cumsum(first, 0).sub_(1)
    return ascending[first], torch.empty_like(rank).index_copy_(0, order, rank)


def inverse(permutation: torch.Tensor) -> torch.Tensor:
    """The inverse of a permutation."""
    counted = torch.arange(permutation.numel(), device=permutation.device)
    return torch.empty_like(permutation).index_copy_(0, permutation, counted)


class TooManyError(Exception):
    """More entries than are wanted: it never reaches a user."""


def join_equal(
    left: torch.Tensor, right: torch.Tensor, limit: int | None = None, size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs of positions at which two vectors of numbers are equal (negative ones equal nothing).

    Args:
        left: the first vector.
        right: the second one.
        limit: how many pairs are wanted at most.
        size: where this is known, what all numbers are less than.

    Raises:
        TooManyError: if there are more than `limit`.
    """
    if 4 * left.numel() < right.numel():
        # The shorter one is sorted.
        second, first = join_equal(right, left, limit, size)
        return first, second
    order = torch.argsort(right, stable=True)
    if size is not None and size <= _SPREAD * left.numel():
        # How many there are of each number, the negative ones first.
        every = torch.bincount(right.clamp(min=-1) + 1, minlength=size + 1)
        place = left.clamp(min=-1) + 1
        low = (torch.cumsum(every, 0) - every).index_select(0, place)
        counts = every.index_select(0, place)
    else:
        ordered = right.index_select(0, order)
        low, high = torch.searchsorted(ordered, left), torch.searchsorted(ordered, left, right=True)
        counts = high - low
    counts = torch.where(left < 0, 0, counts)
    if limit is not None and int(counts.sum()) > limit:
        raise TooManyError
    first = torch.repeat_interleave(torch.arange(left.numel(), device=left.device), counts)
    start = torch.cumsum(counts, 0) - counts
    offset = torch.arange(first.numel(), device=left.device) - start.index_select(0, first)
    return first, order.index_select(0, low.index_select(0, first) + offset)


def affine(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Start and step of places that follow each other in equal steps; None for others."""
    if tensor.ndim != 1 or tensor.numel() == 0:
        return None
    start = int(tensor[0])
    if tensor.numel() == 1:
        return (start, 1) if start >= 0 else None
    step = int(tensor[1]) - start
    if step == 0 or start < 0 or int(tensor[-1]) < 0:
        return None
    if int(tensor[-1]) != start + step * (tensor.numel() - 1) or not bool((tensor.diff() == step).all()):
        return None
    return start, step


__all__ = ["TooManyError", "affine", "inverse", "join_equal", "ordering", "places_among"]
