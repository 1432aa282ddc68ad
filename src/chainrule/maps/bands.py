"""Bands: what a stencil, or a product of stencils, reads around each of its outputs.

The relation of a stencil is a shift, ``input == start + stride * output + dilation * tap``, with the output among the
outer axes and the tap summed. In a product of stencils the taps of all of them shift the same input; only their sum
matters. One axis, the *band axis*, takes their place: it numbers the places around an output that are reached at all, and
each entry of the product at (output, place) is a contraction over the taps that lead there. A band axis is internal but not
summed: for one output, different places are different inputs.

The idea is that of a convolution of kernels, generalised to factors between them that vary over the positions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from chainrule.maps.terms import Axis, OneHot, Term, constant_index, shift_of, shift_onehot

if TYPE_CHECKING:
    from chainrule.maps.compose import Workspace

#: Terms with fewer entries than this are as well padded with zeros.
LARGE = 1 << 16

#: Terms with as many entries as this are never written as dense ones: only entries of theirs are listed, and nothing is padded.
HUGE = 1 << 31


def band_axis(term: Term, onehot: OneHot) -> Axis | None:
    """The band axis of a relation of a term, if the relation is a band narrower than its target, or a slice of a large one."""
    if (axis := slice_axis(term, onehot)) is not None:
        return axis
    shift = shift_of(onehot)
    outer = term.outer_axes()
    inner = [axis for axis in onehot.sources if axis not in outer]
    if shift is None or len(inner) != 1 or onehot.target not in outer or _shared(term, onehot, inner):
        return None
    (axis,) = inner
    step = shift[1][onehot.sources.index(axis)]
    rows = math.prod(a.size for a in onehot.sources) // max(axis.size, 1)
    return axis if step and rows > 1 and axis.size < onehot.target.size else None


def slice_axis(term: Term, onehot: OneHot) -> Axis | None:
    """The axis that stands in a slice of the relation's target (and of other targets), where the term is large.

    It is kept: the entries are written where they stand, and products read the slice.
    """
    if onehot.affine is None or len(onehot.sources) != 1 or onehot.sources[0].size >= onehot.target.size:
        return None
    (axis,), outer = onehot.sources, term.outer_axes()
    # Of a vector zeros cost little, and to plan a slice of it takes its length.
    if len(outer) < 2 or axis in outer or axis.size < 2 or not LARGE <= math.prod(a.size for a in outer) < HUGE:
        return None
    readers = [h for h in term.onehots if axis in h.sources]
    plain = all(h.affine is not None and h.affine[1] > 0 and len(h.sources) == 1 and h.target in outer for h in readers)
    return axis if plain else None


def _shared(term: Term, onehot: OneHot, axes: list[Axis]) -> bool:
    """Whether another relation reads one of the axes too."""
    return any(axis in h.sources for h in term.onehots if h is not onehot for axis in axes)


def with_bands(term: Term, workspace: Workspace) -> Term:
    """Put one band axis in the place of the summed sources of each shift that has several.

    One of the sources is read off the band axis and the others. Factors that carry it have to be gathered afterwards (see
    :func:`~chainrule.maps.compose.push_onehots`).
    """
    for onehot in term.onehots:
        shift = shift_of(onehot)
        if shift is not None:
            term = _joined(term, onehot, shift, workspace)
    return term


def _joined(term: Term, onehot: OneHot, shift: tuple[int, tuple[int, ...]], workspace: Workspace) -> Term:
    outer = term.outer_axes()
    start, steps = shift
    inner = {axis: step for axis, step in zip(onehot.sources, steps, strict=True) if axis not in outer}
    kept = {axis: step for axis, step in zip(onehot.sources, steps, strict=True) if axis in outer}
    wide = {axis: step for axis, step in inner.items() if axis.size > 1 and step}
    still = any(axis.size > 1 and not step for axis, step in inner.items())
    if len(inner) < 2 or not wide or still or _shared(term, onehot, list(inner)):
        return term
    gap = math.gcd(*wide.values())
    reach = [step * (axis.size - 1) for axis, step in wide.items()]
    low, high = sum(min(0, r) for r in reach), sum(max(0, r) for r in reach)
    band = Axis((high - low) // gap + 1)
    if band.size >= onehot.target.size or math.prod(axis.size for axis in kept) < 2:
        return term
    read = min(wide, key=lambda axis: sum(f.node.numel for f in term.factors if axis in f.axes) * band.size // axis.size)
    others = {axis: step for axis, step in wide.items() if axis is not read}
    new = shift_onehot(
        (*kept, band), onehot.target, start + low, (*kept.values(), gap), workspace.memo, workspace.device
    )
    tie = _tie(read, wide[read], band, gap, low, others, workspace)
    onehots = tuple(new if h is onehot else h for h in term.onehots)
    return term.having(onehots=(*onehots, tie))


def _tie(
    read: Axis, step: int, band: Axis, gap: int, low: int, others: dict[Axis, int], workspace: Workspace
) -> OneHot:
    """The relation ``step * read == low + gap * band - sum of others``: which tap leads to a place, given the other taps."""
    sources = (band, *others)
    steps = (gap, *(-other for other in others.values()))
    if all(value % step == 0 for value in (low, *steps)):
        divided = tuple(value // step for value in steps)
        return shift_onehot(sources, read, low // step, divided, workspace.memo, workspace.device)
    sizes, size = tuple(axis.size for axis in sources), read.size

    def make(device: torch.device) -> torch.Tensor:
        total = torch.full(sizes, low, dtype=torch.long, device=device)
        for d, (count, value) in enumerate(zip(sizes, steps, strict=True)):
            total += value * torch.arange(count, device=device).reshape([-1 if e == d else 1 for e in range(len(sizes))])
        place = torch.div(total, step, rounding_mode="floor")
        return torch.where((total % step == 0) & (place >= 0) & (place < size), place, -1)

    return OneHot(constant_index(sizes, make, workspace.device), sources, read, partial=True)


__all__ = ["band_axis", "slice_axis", "with_bands"]
