"""Sums of terms that cancel: where the sum is much smaller than its terms, it has lost digits, and is taken another way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from chainrule.batching.mode import VmapMode
from chainrule.batching.tensor import BatchTensor
from chainrule.capture.tape import Tape
from chainrule.modes_off import unseen
from chainrule.plan.algebra import SIZES
from chainrule.transforms.map_blocks import diagonal_by_blocks, entries_by_blocks

if TYPE_CHECKING:
    from chainrule.transforms.linear_map import LinearMap

_count, _at = torch._C._len_torch_dispatch_stack, torch._C._get_dispatch_stack_at
_functorch = torch._C._are_functorch_transforms_active

#: A sum that is smaller than this power of the dtype's precision, as a part of its terms, has lost a third of its digits.
_POWER = 0.35

#: More entries than this are not made for a second look.
MOST = 1 << 28

#: Modes below which the values that a run has may be asked: what is done then is recorded, and mapped, as it happens.
_RUNS = frozenset({Tape, VmapMode})


def may_be_read(device: torch.device) -> bool:
    """Whether nothing is around that must not see a value being read: no record that is replayed with others."""
    if _functorch() or not all([_at(place).__class__ in _RUNS for place in range(_count())]):
        return False
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _are_lost(value: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    return value < torch.finfo(value.dtype).eps ** _POWER * sizes


def has_lost_digits(value: torch.Tensor, sizes: torch.Tensor | None) -> bool:
    """Whether a sum (some element of it, in some sample) is much smaller than the sum of the magnitudes of its terms."""
    if sizes is None:
        return False
    found = _are_lost(value, sizes)
    with unseen():
        while isinstance(found, BatchTensor):
            found = found.value
        return bool(found.any())


def is_of_squares(linear_map: LinearMap) -> bool:
    """Whether the diagonal is one of sums of squares, which entries give to all digits: that of a map times its transpose."""
    if (halves := linear_map.halves) is None:
        return False
    left, right = halves
    return (right is left.T or left is right.T) and left.shape[0] * left.shape[1] <= MOST


def diagonal_of_squares(linear_map: LinearMap) -> dict[int, torch.Tensor]:
    """By the number of the leaf, the diagonal of a map times its transpose; what has lost digits is taken of entries."""
    space = linear_map.in_space
    found = linear_map.read("diagonal", sized=may_be_read(space.devices[0]))
    sizes = {key[1]: found.pop(key) for key in list(found) if isinstance(key, tuple)}
    if _count():
        if any([has_lost_digits(found[number], size) for number, size in sizes.items()]):
            return dict(enumerate(space.unflatten(diagonal_by_blocks(linear_map))))
        return found
    for number, size in sizes.items():
        value = found[number]
        places = _are_lost(value.detach(), size.detach()).reshape(-1).nonzero().reshape(-1)
        if places.numel():
            there = places + sum(space.sizes[:number])
            entries = entries_by_blocks(linear_map, there, there).to(value.dtype)
            found[number] = value.reshape(-1).index_copy(0, places, entries).reshape(value.shape)
    return found


def trace_of_squares(linear_map: LinearMap) -> torch.Tensor | None:
    """The trace of a map times its transpose; None for a map of zeros."""
    found = linear_map.read("trace", sized=may_be_read(linear_map.in_space.devices[0]))
    value: torch.Tensor | None = found.get("trace")
    if value is not None and has_lost_digits(value, found.get((SIZES, "trace"))):
        return diagonal_by_blocks(linear_map).sum()
    return value


__all__ = [
    "MOST", "diagonal_of_squares", "has_lost_digits", "is_of_squares", "may_be_read", "trace_of_squares",
]  # fmt: skip
