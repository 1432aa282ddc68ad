"""Sums of terms that read their rows' entries at several places, as one term whose taps are the places.

After some steps of a stencil there are as many terms as a row has entries, each with a relation from rows to columns. Put
together, they are one array of values over taps and rows, and one relation: a product with a local Jacobian is then one
product, and not one for each term. Taps that lead all rows to the same places are one tap, with the sum of their values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from chainrule.maps.compose import dense_factor
from chainrule.maps.lines import Lines, join_lines, random_integers
from chainrule.maps.nodes import Node
from chainrule.maps.nonzeros import entries_of, listed, places_in, summed
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Factor, OneHot, Term
from chainrule.maps.views import expand_to

if TYPE_CHECKING:
    from chainrule.maps.sparse import SparseWorkspace

#: Terms with some taps each are put together where at most this share of the taps is left.
_SAVING = 0.75
#: So many rows are looked at for taps that meet in them, and so few places, as a share of the taps, say that they do.
_SAMPLE = 64
_DISTINCT = 0.8


class _Taps(NamedTuple):
    """A term by the places that its rows read.

    Attributes:
        term: the term.
        rows: the axes of the output.
        taps: the axes inside of it: what counts the places of one row.
        relations: for each dimension of the input, the relation to it; None where it is a dimension of the output, or has one
            element only.
        shared: for each dimension of the input, the number of the row axis that it is; -1 where it is none.
    """

    term: Term
    rows: tuple[Axis, ...]
    taps: tuple[Axis, ...]
    relations: tuple[OneHot | None, ...]
    shared: tuple[int, ...]

    @property
    def number(self) -> int:
        """How many places each row has."""
        return math.prod(axis.size for axis in self.taps)


def stacked(terms: Sequence[Term], workspace: SparseWorkspace, many: int) -> Sequence[Term]:
    """The terms, with those that only differ by the places that rows read as one term.

    Args:
        terms: settled terms between the same spaces.
        workspace: where indices are known.
        many: fewer taps than this, of all terms, are left as they are.
    """
    if len(terms) < 2 or any(term.is_empty for term in terms):
        return terms
    groups: dict[object, list[_Taps]] = {}
    rest: list[Term] = []
    for term in terms:
        read = _taps_of(term)
        if read is None:
            rest.append(term)
        else:
            groups.setdefault(tuple(axis.size for axis in read.rows), []).append(read)
    done = list(rest)
    for group in groups.values():
        count = sum(taps.number for taps in group)
        # What a description is not to look at is not listed to be put together either: all rows may be full.
        fits = workspace.limit is None or count * math.prod(axis.size for axis in group[0].rows) <= workspace.limit
        made = _as_one(group, workspace, many) if len(group) > 1 and count >= many and fits else None
        if made is not None and _meets_itself(made, workspace):
            # Taps that meet in most rows grow in number with every product: entries at one place are added up instead.
            own = [taps.term for taps in group]
            entries = [entries_of(term, workspace) for term in own]
            made = summed(own[0].out_dims, own[0].in_dims, entries, listed(entries, places_in(own[0])), workspace)
        done.extend([taps.term for taps in group] if made is None else [made])
    return terms if len(done) == len(terms) else done


def _taps_of(term: Term) -> _Taps | None:
    """The term by taps; None where its rows are not counted by axes of the output alone."""
    if any(len(dim) > 1 for dims in (term.out_dims, term.in_dims) for dim in dims):
        return None
    rows = tuple(axis for dim in term.out_dims for axis in dim if axis.size != 1)
    by_target = {h.target: h for h in term.onehots}
    if len(set(rows)) < len(rows) or len(by_target) < len(term.onehots) or any(axis in by_target for axis in rows):
        return None
    relations: list[OneHot | None] = []
    shared: list[int] = []
    for dim in term.in_dims:
        onehot = by_target.pop(dim[0], None) if dim else None
        relations.append(onehot)
        same = onehot is None and bool(dim) and dim[0].size != 1
        if same and dim[0] not in rows:
            return None
        shared.append(rows.index(dim[0]) if same else -1)
    if by_target:  # a relation to what is no dimension, or to one of several that are the same
        return None
    targets = {h.target for h in term.onehots}
    taps = tuple(axis for axis in term.all_axes() if axis not in targets and axis not in rows and axis.size != 1)
    read = {axis for h in term.onehots for axis in h.sources}
    if not targets.isdisjoint(read) or any(axis not in read for axis in taps) or not targets.isdisjoint(term.carried_axes()):
        return None
    return _Taps(term, rows, taps, tuple(relations), tuple(shared))


def _as_one(group: Sequence[_Taps], workspace: SparseWorkspace, many: int) -> Term | None:
    """The sum of terms with rows of the same shape; None where it is not worth it."""
    group = sorted(group, key=lambda taps: -taps.number)
    rows = tuple(Axis(axis.size) for axis in group[0].rows)
    dims = range(len(group[0].relations))
    #: Dimensions of the input that are the same dimension of the output in every term, or have one element in every term.
    same = {d for d in dims if all(t.relations[d] is None and t.shared[d] == group[0].shared[d] for t in group)}
    open_dims = [d for d in dims if d not in same]
    if not open_dims:
        return None
    needed = [sorted({n for t in group for n in _rows_read(t, d)}) for d in open_dims]
    lines = [
        Lines([_places(t, d, own, workspace).reshape(t.number, -1) for t in group], _size(group, d), len(own) == 1)
        for d, own in zip(open_dims, needed, strict=True)
    ]
    joined = join_lines(lines)
    if len(group) < many and joined.count > _SAVING * joined.place.numel():
        return None
    tap = Axis(joined.count)
    onehots: list[OneHot] = []
    in_dims: list[tuple[Axis, ...]] = []
    for d in dims:
        if d in same:
            number = group[0].shared[d]
            in_dims.append((rows[number],) if number >= 0 else ())
            continue
        number, target = open_dims.index(d), Axis(_size(group, d))
        own_rows = tuple(rows[n] for n in needed[number])
        index = joined.places[number].reshape(tap.size, *(a.size for a in own_rows))
        onehots.append(workspace.relation(index, (tap, *own_rows), target))
        in_dims.append((target,))
    taken = iter(rows)
    out_dims = tuple((next(taken),) if dim and dim[0].size != 1 else () for dim in group[0].term.out_dims)
    masks = [_mask(own, needed, rows) for own in joined.missing]
    factor = _values(group, rows, tap, joined.place, masks, workspace)
    return workspace.canonical(Term(out_dims, tuple(in_dims), (factor,), tuple(onehots)))


class _Mask(NamedTuple):
    """Which taps have an entry in which rows.

    Attributes:
        rows: the numbers of the row axes on which it depends.
        valid: truth values over taps and these.
    """

    rows: tuple[int, ...]
    valid: torch.Tensor


def _mask(
    valid: Sequence[torch.Tensor] | None, needed: Sequence[Sequence[int]], rows: Sequence[Axis]
) -> _Mask | None:
    """The entries that are there, of those that are where they are along each dimension of the input."""
    if valid is None:
        return None
    some = [(own, read) for own, read in zip(valid, needed, strict=True) if not bool(own.all())]
    every = sorted({n for _, read in some for n in read})
    whole = torch.ones((), dtype=torch.bool, device=valid[0].device)
    for own, read in some:
        whole = whole & own.reshape(-1, *(rows[n].size if n in read else 1 for n in every))
    return _Mask(tuple(every), whole)


def _meets_itself(term: Term, workspace: SparseWorkspace) -> bool:
    """Whether different taps lead many rows to the same places, by some of the rows."""
    tap = term.factors[0].axes[0]
    sizes = {axis: axis.size for h in term.onehots for axis in h.sources if axis is not tap}
    chosen = {axis: random_integers(number, 0, size, _SAMPLE) for number, (axis, size) in enumerate(sizes.items())}
    keys = torch.zeros((tap.size, _SAMPLE), dtype=torch.long, device=workspace.device)
    valid = torch.ones_like(keys, dtype=torch.bool)
    for onehot in term.onehots:
        index = workspace.read(onehot.index)
        rows = [chosen[axis].to(index.device) for axis in onehot.sources if axis is not tap]
        at: tuple[Any, ...] = (slice(None), *rows)
        place = index[at] if rows else index[:, None].expand(-1, _SAMPLE)
        keys = keys * onehot.target.size + place
        valid &= place >= 0
    keys = torch.where(valid, keys, -1).sort(0).values
    distinct = (keys[1:] != keys[:-1]).sum() + (keys[0] >= 0).sum()
    return bool(distinct < _DISTINCT * valid.sum())


def _size(group: Sequence[_Taps], d: int) -> int:
    """The size of a dimension of the input."""
    return max(math.prod(axis.size for axis in taps.term.in_dims[d]) for taps in group)


def _rows_read(taps: _Taps, d: int) -> list[int]:
    """Which row axes say where along a dimension of the input an entry stands."""
    onehot = taps.relations[d]
    if onehot is None:
        return [taps.shared[d]] if taps.shared[d] >= 0 else []
    return [taps.rows.index(axis) for axis in onehot.sources if axis in taps.rows]


def _places(taps: _Taps, d: int, needed: Sequence[int], workspace: SparseWorkspace) -> torch.Tensor:
    """Where along a dimension of the input the entries of each tap stand, over taps and row axes."""
    sizes = tuple(taps.rows[n].size for n in needed)
    onehot = taps.relations[d]
    if onehot is None:
        place = torch.zeros((), dtype=torch.long, device=workspace.device)
        if taps.shared[d] >= 0:
            place = torch.arange(taps.rows[taps.shared[d]].size, device=workspace.device)
            place = place.reshape([-1 if n == taps.shared[d] else 1 for n in needed])
        return place.expand(taps.number, *sizes)
    axes = (*taps.taps, *(taps.rows[n] for n in needed))
    names = {axis: number for number, axis in enumerate(axes)}
    sources = [axis for axis in onehot.sources if axis.size != 1]
    index = workspace.read(onehot.index).reshape([axis.size for axis in sources])
    index = index.permute(sorted(range(len(sources)), key=lambda n: names[sources[n]]))
    shape = [axis.size if axis in sources else 1 for axis in axes]
    return index.reshape(shape).expand([axis.size for axis in axes]).reshape(taps.number, *sizes)


def _values(
    group: Sequence[_Taps], rows: Sequence[Axis], tap: Axis, place: torch.Tensor, masks: Sequence[_Mask | None],
    workspace: SparseWorkspace,
) -> Factor:
    """The values of the sum over taps and those rows on which some term's values depend; zero where masks are false."""
    factors = [_own_values(taps, workspace) for taps in group]
    read = {taps.rows.index(a) for taps, f in zip(group, factors, strict=True) for a in f.axes if a in taps.rows}
    carried = sorted(read.union(*(mask.rows for mask in masks if mask is not None)))
    valid = [None if m is None else m.valid.reshape(-1, *(rows[n].size if n in m.rows else 1 for n in carried)) for m in masks]
    orders, shapes = [], []
    for taps, factor in zip(group, factors, strict=True):
        axes = [*taps.taps, *(taps.rows[n] for n in carried)]
        names = {axis: number for number, axis in enumerate(axes)}
        orders.append((tuple(names[axis] for axis in factor.axes), tuple(range(len(axes)))))
        shapes.append([axis.size for axis in axes])
    sizes = (tap.size, *(rows[n].size for n in carried))
    # Places that the first term reads come first (see _first_of): what others have there is added, the rest comes after.
    lead = group[0].number
    lead = lead if torch.equal(place[:lead], torch.arange(lead, device=place.device)) else 0
    rest = place[lead:]
    width = math.prod(sizes[1:])

    def compute(program: Program, *values: Staged) -> Staged:
        parts = []
        for value, (have, want), shape, taps, kept in zip(values, orders, shapes, group, valid, strict=True):
            value = expand_to(value, have, want)
            if tuple(value.shape) != tuple(shape):
                value = torch.broadcast_to(value, shape)
            value = torch.reshape(value, (taps.number, *sizes[1:]))
            if kept is not None:
                value = torch.where(program.constant(kept), value, 0.0)
            parts.append(value if value.dtype == workspace.dtype else value.to(workspace.dtype))
        if tap.size == place.numel():
            return program.call(torch.cat, parts)
        base: list[Staged] = parts[:1] if lead else []
        if tap.size > lead:
            zeros = torch.zeros((tap.size - lead, *sizes[1:]), dtype=workspace.dtype, device=workspace.device)
            base.append(program.constant(zeros))
        others = parts[1:] if lead else parts
        start, added = (program.call(torch.cat, some) if len(some) > 1 else some[0] for some in (base, others))
        return torch.index_add(start, 0, program.constant(rest), added)

    inputs = tuple(factor.node for factor in factors)
    count = place.numel() * width
    node = Node(sizes, inputs, compute, flops=count, moved=3 * count + 2 * math.prod(sizes), label="stack")
    return Factor(node, (tap, *(rows[n] for n in carried)))


def _own_values(taps: _Taps, workspace: SparseWorkspace) -> Factor:
    """The values of a term over its taps and those rows on which they depend."""
    term = taps.term
    axes = [axis for axis in (*taps.taps, *taps.rows) if any(axis in factor.axes for factor in term.factors)]
    return dense_factor(replace(term, onehots=()), axes, workspace)


__all__ = ["stacked"]
