"""Where taps lead: for each of them a line of places, one for each row; lines that do not contradict each other are one.

Near the ends of a tensor that is padded or cut a tap leads nowhere. Two taps that lead to the same place wherever both of them
lead somewhere are one tap, which leads where either of them leads.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy
import torch


class Lines(NamedTuple):
    """Places along one dimension of the input.

    Attributes:
        parts: for each of several terms, the places over its taps and the rows; negative where there is none.
        size: the size of that dimension.
        counted: whether rows are counted along one dimension: then lines may be told by how far places are from them.
    """

    parts: list[torch.Tensor]
    size: int
    counted: bool


class Joined(NamedTuple):
    """Lines of several terms, each once.

    Attributes:
        count: how many there are.
        places: for each dimension of the input, the places over these and the rows.
        place: for every tap of all terms in order, which of them it is.
        missing: for each term, for each dimension of the input, where its own taps lead somewhere; None where that need not be
            known, since what they are now leads nowhere else.
    """

    count: int
    places: list[torch.Tensor]
    place: torch.Tensor
    missing: list[list[torch.Tensor] | None]


def join_lines(dims: Sequence[Lines]) -> Joined:
    """The lines of several terms, those that may be one as one.

    Args:
        dims: for each dimension of the input, the places of all terms.
    """
    lines = [torch.cat(own.parts) if len(own.parts) > 1 else own.parts[0] for own in dims]
    valid = [own >= 0 for own in lines]
    whole = all(map(_is_true, valid))
    joined = None
    if not whole:
        label = _sum_of([_distances(n, *one) for n, one in enumerate(zip(lines, valid, dims, strict=True))])
        joined = _joined(lines, label)
        bad = _contradicting(lines, valid, joined, whole=False)
        if bad is not None:
            # First those that keep no distance are told by all of their places, then whatever still is in a wrong company.
            exact = _exact(lines)
            even = torch.stack([_is_even(*one) for one in zip(lines, valid, dims, strict=True)]).all(0)
            label = torch.where(even, label, exact)
            joined = _joined(lines, label)
            bad = _contradicting(lines, valid, joined, whole=False)
            if bad is not None:
                joined = _joined(lines, torch.where(bad.index_select(0, joined[2]), exact, label))
                joined = joined if _contradicting(lines, valid, joined, whole=False) is None else None
    if joined is None:
        joined = _joined(lines, _exact(lines))
        if _contradicting(lines, valid, joined, whole=True) is not None:
            # Two different lines with one fingerprint: each tap stays by itself.
            count = lines[0].shape[0]
            joined = count, lines, torch.arange(count, device=lines[0].device)
    count, places, place = joined
    missing: list[list[torch.Tensor] | None] = [None] * len(dims[0].parts)
    if not whole and count < place.numel():
        own = [v.sum(1) for v in valid]
        fewer = [o < (p >= 0).sum(1).index_select(0, place) for o, p in zip(own, places, strict=True)]
        some = torch.stack(fewer).any(0)
        starts = [0, *itertools.accumulate(part.shape[0] for part in dims[0].parts)]
        for number, (start, stop) in enumerate(itertools.pairwise(starts)):
            if bool(some[start:stop].any()):
                missing[number] = [v[start:stop] for v in valid]
    return Joined(count, places, place, missing)


def _is_true(truth: torch.Tensor) -> bool:
    return bool(truth.all())


def _sum_of(labels: Sequence[torch.Tensor]) -> torch.Tensor:
    return sum(labels[1:], labels[0])


def _fingerprints(number: int, lines: torch.Tensor) -> torch.Tensor:
    """A number for each line, the same for the same line: a sum with random weights that wraps around."""
    weights = random_integers(number, -(2**62), 2**62, lines.shape[1]).to(lines.device)
    return torch.mv(lines, weights) if lines.device.type == "cpu" else (lines * weights).sum(1)


def _exact(lines: Sequence[torch.Tensor]) -> torch.Tensor:
    return _sum_of([_fingerprints(number, own) for number, own in enumerate(lines)])


def _distances(number: int, lines: torch.Tensor, valid: torch.Tensor, dim: Lines) -> torch.Tensor:
    """A number for how far from its row each line first leads, counted around the ends; it says what other rows read, if evenly.

    Where rows are not counted along one dimension, it is a number for the whole line.
    """
    if not dim.counted:
        return _fingerprints(number, lines)
    first = valid.to(torch.uint8).argmax(1, keepdim=True)
    far = torch.remainder(lines.gather(1, first) - first, max(dim.size, 1)).squeeze(1)
    weights = random_integers(2**20 + number, -(2**62), 2**62, 2)
    return far * int(weights[0]) + int(weights[1])


def _is_even(lines: torch.Tensor, valid: torch.Tensor, dim: Lines) -> torch.Tensor:
    """Which lines keep the same distance from their rows, counted around the ends."""
    if not dim.counted:
        return torch.ones(lines.shape[0], dtype=torch.bool, device=lines.device)
    size = max(dim.size, 1)
    far = torch.remainder(lines - torch.arange(lines.shape[1], device=lines.device), size)
    return torch.where(valid, far, size).amin(1) >= torch.where(valid, far, -1).amax(1)


def _joined(lines: Sequence[torch.Tensor], label: torch.Tensor) -> tuple[int, list[torch.Tensor], torch.Tensor]:
    """The lines of each label as one, in the order of their first ones; for every line, which it is."""
    _, label = torch.unique(label, return_inverse=True)
    first, place = _first_of(label)
    count = first.numel()
    if count == place.numel():
        return count, list(lines), place
    merged = []
    for own in lines:
        start = torch.full((count, own.shape[1]), -1, dtype=torch.long, device=own.device)
        merged.append(start.scatter_reduce_(0, place[:, None].expand_as(own), own, "amax"))
    return count, merged, place


def _contradicting(
    lines: Sequence[torch.Tensor], valid: Sequence[torch.Tensor], joined: tuple[int, list[torch.Tensor], torch.Tensor], *,
    whole: bool,
) -> torch.Tensor | None:
    """Which joined lines are none: two lead to different places, or it leads where none of them does; None if all are."""
    count, merged, place = joined
    if count == place.numel():
        return None
    wrong = torch.zeros(place.numel(), dtype=torch.bool, device=place.device)
    for own, known, one in zip(lines, valid, merged, strict=True):
        differs = own != one.index_select(0, place)
        wrong |= (differs & known).any(1)
    bad = torch.zeros(count, dtype=torch.bool, device=place.device)
    bad[place[wrong]] = True
    if not whole and len(lines) > 1:
        # Along one dimension what is led to is what one or the other leads to; along several, if one of them leads everywhere.
        full = torch.ones(place.numel(), dtype=torch.bool, device=place.device)
        for known, one in zip(valid, merged, strict=True):
            full &= known.sum(1) == (one >= 0).sum(1).index_select(0, place)
        led = torch.zeros(count, dtype=torch.bool, device=place.device)
        led[place[full]] = True
        bad |= ~led
    return bad if bool(bad.any()) else None


def _first_of(label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The position of the first of each label, ascending; for each position, which of them has its label."""
    count = int(label.max()) + 1
    positions = torch.arange(label.numel(), device=label.device)
    first = torch.full((count,), label.numel(), device=label.device).scatter_reduce_(0, label, positions, "amin")
    first, order = first.sort()
    rank = torch.empty_like(order).index_copy_(0, order, torch.arange(count, device=label.device))
    return first, rank.index_select(0, label)


def random_integers(seed: int, low: int, high: int, count: int) -> torch.Tensor:
    """The same integers each time; a vmap around knows nothing of them."""
    return torch.from_numpy(numpy.random.default_rng(seed).integers(low, high, count))


__all__ = ["Joined", "Lines", "join_lines", "random_integers"]
