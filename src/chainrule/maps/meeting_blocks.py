"""Lists of entries that meet so often that their product is one of dense blocks.

The product of two lists has one entry for each pair of entries that meet in the dimension between. Of two running sums these
are as many as the cube of the length, at as many places as its square. Such pairs are counted before they are listed: where
they are many more than the elements of the blocks that the two lists and their product fill, the lists are written into blocks
and multiplied, and the places of the product are found by a product of their patterns. Only those are listed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from chainrule.maps.contract import contract
from chainrule.maps.nodes import MOVED_COST, reshaped
from chainrule.maps.onehots import gather, scatter
from chainrule.maps.sorted_places import places_among
from chainrule.maps.terms import Axis, Factor, OneHot, Term

if TYPE_CHECKING:
    from chainrule.maps.sparse import SparseWorkspace

#: Fewer pairs than this are always listed, and pairs of which there are not so many for each element of the blocks.
_PAIRS, _PER_ELEMENT = 1 << 14, 4
#: What a pair costs that is listed: it is read from both lists, multiplied and added, and its places are kept.
_LISTED = 2 + 6 * MOVED_COST
#: Numbers are counted in a list of all of them where these are at most so many times as many.
_SPREAD = 8
#: Patterns are multiplied so many elements of the result at a time.
_ROWS = 1 << 24


class _Side(NamedTuple):
    """One of two lists that meet.

    Attributes:
        source: what counts its entries.
        factors: the factors over it.
        leading: its relations to other dimensions.
        others: further axes of its factors.
    """

    source: Axis
    factors: tuple[Factor, ...]
    leading: tuple[OneHot, ...]
    others: tuple[Axis, ...]


class _Placed(NamedTuple):
    """Where the entries of a list stand in the block of those rows and columns that have some.

    Attributes:
        rows: the rows of the block, as numbers of places in the dimensions that the list leads to.
        place: for each entry row times the number of columns plus column of the block; -1 where there is no entry.
        shape: the shape of the block.
    """

    rows: torch.Tensor
    place: torch.Tensor
    shape: tuple[int, int]


def as_blocks(
    term: Term, tied: Sequence[tuple[OneHot, OneHot]], left: torch.Tensor, right: torch.Tensor, workspace: SparseWorkspace
) -> Term | None:
    """The product of two lists by blocks; None where that is not possible, or pairs may well be listed.

    Args:
        term: the term that holds both.
        tied: the relations with one target, the first list's and the second's.
        left: for each entry of the first list its targets as one number, negative where there are none.
        right: the same of the second list.
        workspace: where indices are known.
    """
    if left.numel() * right.numel() < _PAIRS or not left.numel() or not right.numel():
        return None
    sides = [_side(term, tied, number) for number in range(2)]
    if sides[0] is None or sides[1] is None:
        return None
    one, two = sides[0], sides[1]
    two = two._replace(factors=tuple(f for f in two.factors if not any(f is other for other in one.factors)))
    if {h.target for h in one.leading} & {h.target for h in two.leading}:
        return None
    # What stands between is read by one of the lists.
    targets = {h.target for h, _ in tied}
    known = (*one.factors, *two.factors)
    if any(not targets.isdisjoint(f.axes) and not any(f is other for other in known) for f in term.factors):
        return None
    size = math.prod(h.target.size for h, _ in tied)
    split = [left.numel(), right.numel()]
    if size > _SPREAD * sum(split):
        found, places = _numbered(torch.cat([left, right]), size)
        (left, right), size = places.split(split), found.numel()
    # The negative ones, counted first, meet nothing.
    met = torch.bincount(left + 1, minlength=size + 1) * torch.bincount(right + 1, minlength=size + 1)
    met[0] = 0
    pairs = int(met.sum())
    # Each entry is an element of a block.
    if pairs < _PAIRS or pairs <= _PER_ELEMENT * sum(split):
        return None
    # Only what meets is in the blocks.
    number = torch.where(met > 0, torch.cumsum(met > 0, 0) - 1, -1)
    first, second = (number.index_select(0, keys + 1) for keys in (left, right))
    width = int((met > 0).sum())
    placed = [_placed(side, own, width, workspace) for side, own in ((one, first), (two, second))]
    if not _pays(one, two, placed, pairs):
        return None
    return _multiplied(term, tied, (one, two), placed, workspace)


def times_list(term: Term, final: Mapping[Axis, OneHot], workspace: SparseWorkspace) -> Term | None:
    """The product of dense factors and a list whose entries are many more than its rows and columns, by its block.

    None where there is none, or the factors may well be read at the entries.

    Args:
        term: the term that holds both.
        final: by target, the relations whose sources are no targets themselves.
        workspace: where indices are known.
    """
    outer = term.outer_axes()
    for factor in term.factors:
        held = next((final[axis] for axis in factor.axes if axis in final and axis not in outer), None)
        if held is None or len(held.sources) != 1 or held.sources[0].size * factor.node.numel < _PAIRS * held.target.size:
            continue
        (source,) = held.sources
        tied = [(h, h) for h in term.onehots if h.sources == (source,) and h.target not in outer]
        if source in factor.axes or (side := _side(term, tied, 0)) is None:
            continue
        targets = {h.target for h, _ in tied}
        read = targets | {h.target for h in side.leading} | {source}
        # Factors with dimensions of their own are those that the list is multiplied by.
        dense = tuple(f for f in side.factors if source not in f.axes and not read.issuperset(f.axes))
        if not any(f is factor for f in dense) or any(h.target in f.axes for f in dense for h in side.leading):
            continue
        if any(not targets.isdisjoint(f.axes) and not any(f is other for other in side.factors) for f in term.factors):
            continue
        listed = tuple(f for f in side.factors if not any(f is other for other in dense))
        side = side._replace(factors=listed, others=tuple({a: None for f in listed for a in f.axes if a not in read}))
        keys = workspace.keys_of((source,), [h for h, _ in tied], ())
        columns, own = _numbered(keys, math.prod(h.target.size for h, _ in tied))
        placed = _placed(side, own, columns.numel(), workspace)
        others = dict.fromkeys(axis for f in dense for axis in f.axes if axis not in read)
        free, both = (math.prod(a.size for a in axes) for axes in (others, {**others, **dict.fromkeys(side.others)}))
        (height, width), entries = placed.shape, source.size
        held_by = free * width + math.prod(a.size for a in side.others) * height * width + both * height
        if not height or _PER_ELEMENT * held_by >= both * entries:
            continue
        if both * height * width + 3 * MOVED_COST * held_by < _LISTED * both * entries:
            return _times_block(term, [h for h, _ in tied], side, dense, placed, columns, workspace)
    return None


def _times_block(
    term: Term, relations: Sequence[OneHot], side: _Side, dense: Sequence[Factor], placed: _Placed, columns: torch.Tensor,
    workspace: SparseWorkspace,
) -> Term:
    rows, between = Axis(placed.shape[0]), Axis(placed.shape[1])
    read: dict[Axis, OneHot] = {}
    for h in reversed(relations):
        read[h.target] = workspace.relation(torch.remainder(columns, h.target.size), (between,), h.target)
        columns = torch.div(columns, h.target.size, rounding_mode="floor")
    block = _block(relations, side, placed, (rows, between), workspace)
    operands = [block, *(workspace.gathered(f, read) for f in dense)]
    others = dict.fromkeys(axis for f in operands for axis in f.axes if axis is not between and axis is not rows)
    product = contract(operands, (*others, rows), workspace.memo)
    spent = {side.source, *read}
    gone = {id(h) for h in (*relations, *side.leading)}
    factors = tuple(f for f in term.factors if spent.isdisjoint(f.axes))
    onehots = [h for h in term.onehots if id(h) not in gone]
    onehots.extend(_leading(side, rows, placed.rows, workspace))
    return term.having(factors=(*factors, product), onehots=tuple(onehots))


def _numbered(keys: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers below `size` that occur, ascending, and the place of each one among them; -1 for negative ones."""
    if size > _SPREAD * keys.numel():
        found, places = places_among(keys)
        negative = int((found < 0).sum())
        return found[negative:], (places - negative).clamp(min=-1)
    there = torch.zeros(size + 1, dtype=torch.bool, device=keys.device)
    there[keys] = True  # what is negative is put at the end
    there = there[:-1]
    places = torch.cumsum(there, 0).sub_(1)
    return torch.nonzero(there).squeeze(1), torch.where(keys >= 0, places[keys.clamp(min=0)], -1)


def _side(term: Term, tied: Sequence[tuple[OneHot, OneHot]], number: int) -> _Side | None:
    """One of two lists; None where it is more than a list of entries that are summed."""
    relations = [pair[number] for pair in tied]
    targets = {h.target for h in relations}
    outer = term.outer_axes()
    if any(h.sources != relations[0].sources for h in relations) or len(relations[0].sources) != 1:
        return None
    (source,) = relations[0].sources
    gone = {id(h) for pair in tied for h in pair}
    rest = [h for h in term.onehots if id(h) not in gone]
    leading = tuple(h for h in rest if source in h.sources)
    told = [h.target for h in term.onehots]
    if source in outer or source in told or any(axis in outer for axis in targets):
        return None
    if any(h.target in targets or not targets.isdisjoint(h.sources) for h in rest):
        return None
    if any(len(h.sources) != 1 or h.target not in outer or told.count(h.target) != 1 for h in leading):
        return None
    read = targets | {h.target for h in leading}
    factors: list[Factor] = []
    others: dict[Axis, None] = {}
    for f in term.factors:
        own = [axis for axis in f.axes if axis is not source and axis not in read]
        if any(axis not in outer or axis in told for axis in own):
            if source in f.axes:
                return None
        elif source in f.axes or not targets.isdisjoint(f.axes):
            factors.append(f)
            others.update(dict.fromkeys(own))
    return _Side(source, tuple(factors), leading, tuple(others))


def _placed(side: _Side, columns: torch.Tensor, width: int, workspace: SparseWorkspace) -> _Placed:
    """Where the entries of a list stand, whose columns are known (negative where there is none)."""
    keys = workspace.keys_of((side.source,), side.leading, ())
    present = (keys >= 0) & (columns >= 0)
    rows, place = _numbered(torch.where(present, keys, -1), math.prod(h.target.size for h in side.leading))
    return _Placed(rows, torch.where(present, place * width + columns, -1), (rows.numel(), width))


def _pays(one: _Side, two: _Side, placed: Sequence[_Placed], pairs: int) -> bool:
    """Whether blocks take less memory, and less time, than pairs."""
    (height, width), (other, _) = placed[0].shape, placed[1].shape
    sizes = [math.prod(axis.size for axis in axes) for axes in (one.others, two.others, {*one.others, *two.others})]
    held = [count * size for count, size in zip((height * width, width * other, height * other), sizes, strict=True)]
    flops = height * width * other * (sizes[2] + 1)  # once for the pattern
    return _PER_ELEMENT * sum(held) < pairs * sizes[2] and flops + 3 * MOVED_COST * sum(held) < _LISTED * pairs * sizes[2]


def _multiplied(
    term: Term, tied: Sequence[tuple[OneHot, OneHot]], sides: tuple[_Side, _Side], placed: Sequence[_Placed],
    workspace: SparseWorkspace,
) -> Term:
    gone = {id(h) for pair in tied for h in pair} | {id(h) for side in sides for h in side.leading}
    spent = {side.source for side in sides} | {h.target for h, _ in tied}
    factors = tuple(f for f in term.factors if spent.isdisjoint(f.axes))
    onehots = [h for h in term.onehots if id(h) not in gone]
    between = Axis(placed[0].shape[1])
    axes = [Axis(found.shape[0]) for found in placed]
    blocks = []
    for side, relations, found, axis in zip(sides, zip(*tied, strict=True), placed, axes, strict=True):
        blocks.append(_block(relations, side, found, (axis, between), workspace))
    others = tuple(dict.fromkeys((*sides[0].others, *sides[1].others)))
    product = contract(blocks, (*others, *axes), workspace.memo)
    places = _product_of_patterns(*placed)
    height, width = axes[0].size, axes[1].size
    if places.numel() == height * width:
        counted = list(zip(axes, (found.rows for found in placed), strict=True))
    else:
        listed, flat = Axis(places.numel()), Axis(height * width)
        kept = product.axes[:-2]
        whole = Factor(reshaped(product.node, (*(a.size for a in kept), flat.size)), (*kept, flat))
        product = gather(whole, workspace.relation(places, (listed,), flat), workspace.memo)
        numbers = torch.div(places, width, rounding_mode="floor"), torch.remainder(places, width)
        counted = [(listed, found.rows.index_select(0, own)) for found, own in zip(placed, numbers, strict=True)]
    for side, (source, rows) in zip(sides, counted, strict=True):
        onehots.extend(_leading(side, source, rows, workspace))
    return term.having(factors=(*factors, product), onehots=tuple(onehots))


def _block(
    relations: Sequence[OneHot], side: _Side, placed: _Placed, axes: tuple[Axis, Axis], workspace: SparseWorkspace
) -> Factor:
    """A list as a block, whose axes come last."""
    relation = workspace.relation(placed.place, (side.source,), Axis(math.prod(placed.shape)))
    final = {h.target: h for h in (*relations, *side.leading)}
    read = [workspace.gathered(f, final) if any(axis in final for axis in f.axes) else f for f in side.factors]
    dense = scatter(read, [relation], side.others, workspace.dtype, workspace.memo)
    kept = dense.axes[:-1]
    return Factor(reshaped(dense.node, [axis.size for axis in (*kept, *axes)]), (*kept, *axes))


def _leading(side: _Side, source: Axis, rows: torch.Tensor, workspace: SparseWorkspace) -> list[OneHot]:
    """The relations of a list to other dimensions, from an axis that counts `rows`."""
    made = []
    for h in reversed(side.leading):  # they were put into one number in order
        made.append(workspace.relation(torch.remainder(rows, h.target.size), (source,), h.target))
        rows = torch.div(rows, h.target.size, rounding_mode="floor")
    return made


def _product_of_patterns(one: _Placed, two: _Placed) -> torch.Tensor:
    """The places that the product of two blocks, the second one transposed, may have other than zero, in order."""
    first, second = (_pattern(found) for found in (one, two))
    step = max(_ROWS // max(second.shape[0], 1), 1)
    found = []
    for start in range(0, first.shape[0], step):
        # No sum of ones and zeros is zero by rounding.
        block = torch.nonzero((first[start : start + step] @ second.T).reshape(-1)).squeeze(1)
        found.append(block + start * second.shape[0])
    return torch.cat(found)


def _pattern(placed: _Placed) -> torch.Tensor:
    ones = torch.zeros(math.prod(placed.shape), device=placed.place.device)
    ones[placed.place[placed.place >= 0]] = 1.0
    return ones.reshape(placed.shape)


__all__ = ["as_blocks", "times_list"]
