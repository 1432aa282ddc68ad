"""Lists whose length follows from values, at a fixed length: some elements stand twice, and count once."""

from __future__ import annotations

from typing import NamedTuple

import torch

from chainrule.modes_off import unseen

#: A list has room for so many elements more than it holds: a share of them, and a few.
_SHARE, _FEW = 8, 16


class Padded(NamedTuple):
    """A list at a fixed length.

    Attributes:
        places: its elements, and some of them once more (or several times).
        real: which of these are the list's own.
    """

    places: torch.Tensor
    real: torch.Tensor


def room_for(wanted: torch.Tensor) -> tuple[int, bool]:
    """How long a list is made, given how many elements it has; whether it has any.

    Whoever records this run sees only that there is room enough, and some elements.
    """
    with unseen():
        count = int(wanted)
    room = count + count // _SHARE + _FEW
    return room, bool((wanted > 0) & (wanted <= room)) if count else bool(wanted > 0)


def padded_places(flags: torch.Tensor, room: int) -> Padded:
    """The places at which a vector of truth values holds, some of which do, in a list of ``room``."""
    numbers = torch.arange(room, device=flags.device)
    rank = torch.cumsum(flags, 0)
    count = rank[-1:]
    # The others are all written behind the end.
    own = torch.where(flags, rank - 1, room)
    every = torch.zeros(room + 1, dtype=torch.long, device=flags.device)
    found = every.scatter(0, own, torch.arange(flags.numel(), device=flags.device))
    return Padded(found.index_select(0, torch.remainder(numbers, count)), numbers < count)


def padded_pairs(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """As :func:`~chainrule.maps.sorted_places.join_equal`: positions in both, at a fixed length, and which of the pairs count.

    None where there are none.
    """
    order = torch.argsort(right, stable=True)
    ordered = right.index_select(0, order)
    low, high = torch.searchsorted(ordered, left), torch.searchsorted(ordered, left, right=True)
    counts = torch.where(left < 0, 0, high - low)
    ends = torch.cumsum(counts, 0)
    room, some = room_for(ends[-1]) if left.numel() else (0, False)
    if not some:
        return None
    numbers = torch.arange(room, device=left.device)
    real = numbers < ends[-1:]
    numbers = torch.remainder(numbers, ends[-1:])
    first = torch.searchsorted(ends, numbers, right=True)
    offset = numbers - (ends - counts).index_select(0, first)
    return first, order.index_select(0, low.index_select(0, first) + offset), real


__all__ = ["Padded", "padded_pairs", "padded_places", "room_for"]
