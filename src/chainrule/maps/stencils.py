"""Stencils of stencils: taps that only matter by their sum become one.

An entry of the product of two convolutions stands at ``row + t + s``, for a tap ``t`` of the one and a tap ``s`` of the other.
With ``d = t + s`` in place of ``s``, the taps ``t`` that lead to one ``d`` are summed within the product, and each entry is
listed once.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from chainrule.maps.onehots import mask_factor
from chainrule.maps.terms import Axis, OneHot, Term

if TYPE_CHECKING:
    from chainrule.maps.sparse import SparseWorkspace

#: An entry that is listed (moved, selected, added at an index) takes about as long as this many multiply-adds.
_LISTED_COST = 100


def merge_taps(term: Term, workspace: SparseWorkspace) -> Term | None:
    """The term with two internal sources of a relation replaced by their sum; None where there are none that this is for."""
    outer = term.outer_axes()
    uses: dict[Axis, int] = {}
    for onehot in term.onehots:
        for axis in (*onehot.sources, onehot.target):
            uses[axis] = uses.get(axis, 0) + 1
    carried = term.carried_axes()
    summed = math.prod(axis.size for axis in carried if axis not in outer and axis not in uses)
    for onehot in term.onehots:
        if onehot.target not in outer:
            continue
        taps = [a for a in onehot.sources if a not in outer and uses[a] == 1 and a in carried and a.size > 1]
        for number, one in enumerate(taps):
            for two in taps[number + 1 :]:
                if (found := _merged(term, onehot, one, two, summed, workspace)) is not None:
                    return found
    return None


def _merged(term: Term, onehot: OneHot, one: Axis, two: Axis, summed: int, workspace: SparseWorkspace) -> Term | None:
    """The term with ``two`` replaced by a sum with ``one``, where that is right and costs less."""
    rest = tuple(axis for axis in onehot.sources if axis is not one and axis is not two)
    order = [onehot.sources.index(axis) for axis in (*rest, one, two)]
    index = workspace.read(onehot.index).reshape([axis.size for axis in onehot.sources]).permute(order)
    valid = index >= 0
    steps = [_step(index, valid, dim) for dim in (-2, -1)]
    if steps[0] is None or steps[1] is None:
        return None
    unit = math.gcd(*steps)
    first, second = steps[0] // unit, steps[1] // unit
    places = torch.arange(one.size)[:, None] * first + torch.arange(two.size) * second
    total = Axis(int(places[-1, -1]) + 1)
    if total.size * (one.size * summed + _LISTED_COST) > one.size * two.size * (summed + _LISTED_COST):
        return None
    places = places.to(index.device)
    merged = torch.full((*index.shape[:-2], total.size), -1, dtype=torch.long, device=index.device)
    merged.scatter_reduce_(-1, places.reshape(-1).expand(*index.shape[:-2], -1), index.flatten(-2), "amax")
    again = merged.index_select(-1, places.reshape(-1)).reshape(index.shape)
    # Where an entry is there, the sum says where; where none is there, either the sum or the first tap says so.
    present = valid.any(-1)
    if not torch.equal(torch.where(present[..., None], again, -1), index):
        return None
    wanted = torch.arange(total.size)[:, None] - torch.arange(one.size) * first
    tap = torch.div(wanted, second, rounding_mode="floor")
    tap = torch.where((wanted % second == 0) & (tap >= 0) & (tap < two.size), tap, -1).to(index.device)
    whole = workspace.relation(merged, (*rest, total), onehot.target)
    relations = tuple(h for h in term.onehots if h is not onehot)
    factors = term.factors
    if not bool(present.all()):
        mask = workspace.relation(torch.where(present, 0, -1), (*rest, one), Axis(1))
        factors = (*factors, mask_factor(mask, workspace.dtype, workspace.memo))
    return replace(term, factors=factors, onehots=(*relations, whole, workspace.relation(tap, (total, one), two)))


def _step(index: torch.Tensor, valid: torch.Tensor, dim: int) -> int | None:
    """By how much an index ascends from each place to the next, if that is the same everywhere, and positive."""
    size = index.shape[dim]
    both = valid.narrow(dim, 1, size - 1) & valid.narrow(dim, 0, size - 1)
    found = (index.narrow(dim, 1, size - 1) - index.narrow(dim, 0, size - 1))[both]
    if not found.numel():
        return None
    step = int(found[0])
    return step if step > 0 and bool((found == step).all()) else None


__all__ = ["merge_taps"]
