"""Terms whose rows are counted by a dimension of the output itself, and not by what a relation leads to it from.

A tensor that is padded, or written into a part of another, has its rows at the targets of a relation. Where it leads to most
rows, and to none twice, its inverse says for each row where it is read from: then a product with another map reads one
relation through another, and no two relations meet at one target.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from chainrule.maps.compose import settle
from chainrule.maps.linear_map import LinearMap
from chainrule.maps.terms import Axis, OneHot, Term

if TYPE_CHECKING:
    from chainrule.maps.sparse import SparseWorkspace

#: Rows without an entry are listed, too: a smaller share of rows with one than this is left as it is.
_SHARE = 0.75


def in_rows(local: LinearMap, workspace: SparseWorkspace) -> LinearMap:
    """The same map, its terms by rows where that is possible, and those rows apart that are read at another distance."""
    terms = [part for term in local.terms for part in _evenly(by_rows(term, workspace), workspace)]
    return replace(local, terms=tuple(terms))


def _evenly(term: Term, workspace: SparseWorkspace) -> list[Term]:
    """A term whose rows read at one distance from themselves but for a few, and these few."""
    outside = {a for dim in term.out_dims for a in dim}
    for onehot in term.onehots:
        if len(onehot.sources) != 1 or onehot.sources[0] not in outside or onehot.affine is not None:
            continue
        (rows,), size = onehot.sources, max(onehot.target.size, 1)
        index = workspace.read(onehot.index).reshape(-1)
        far = torch.remainder(index - torch.arange(rows.size, device=index.device), size)
        most = torch.mode(far).values
        even, there = far == most, index >= 0
        count = int((even & there).sum())
        if count == int(there.sum()) or count < _SHARE * rows.size:
            continue
        whole = workspace.relation(torch.where(even, index, -1), (rows,), onehot.target)
        first = term.having(onehots=tuple(whole if h is onehot else h for h in term.onehots))
        some = torch.nonzero(there & ~even).squeeze(1)
        few = OneHot(workspace.index(some), (Axis(some.numel()),), rows)
        rest = settle(term.having(onehots=(*term.onehots, few)), workspace)
        return [*_evenly(first, workspace), *_evenly(rest, workspace)]
    return [term]


def by_rows(term: Term, workspace: SparseWorkspace) -> Term:
    """The same term by rows; as it is where some rows are read twice, or only a few of them are read."""
    for axis in [dim[0] for dim in term.out_dims if len(dim) == 1 and dim[0].size > 1]:
        onehot = _alone(term, axis)
        if onehot is not None:
            term = _inverted(term, onehot, workspace)
    return term


def _alone(term: Term, axis: Axis) -> OneHot | None:
    """The relation to an axis, from one source that is counted by nothing else, and that nothing else reads the target of."""
    to = [h for h in term.onehots if h.target is axis]
    outside = [a for dims in (term.out_dims, term.in_dims) for dim in dims for a in dim]
    if len(to) != 1 or len(to[0].sources) != 1 or outside.count(axis) != 1 or axis in term.carried_axes():
        return None
    (source,) = to[0].sources
    if any(axis in h.sources or h.target is source for h in term.onehots) or any(source in dim for dim in term.out_dims):
        return None
    # Without a relation to a column nothing would say any more that some rows have no entries.
    follows = any(source in h.sources for h in term.onehots if h is not to[0])
    return to[0] if follows or any(source in dim for dim in term.in_dims) else None


def _inverted(term: Term, onehot: OneHot, workspace: SparseWorkspace) -> Term:
    index, rows, source = workspace.read(onehot.index).reshape(-1), onehot.target, onehot.sources[0]
    read = torch.nonzero(index >= 0).squeeze(1)
    if read.numel() < _SHARE * rows.size:
        return term
    back = torch.full((rows.size,), -1, dtype=torch.long, device=index.device)
    back[index.index_select(0, read)] = read
    if int((back >= 0).sum()) < read.numel():
        return term
    inverse = workspace.relation(back, (rows,), source)
    final = {source: inverse}
    factors = tuple(workspace.gathered(f, final) if source in f.axes else f for f in term.factors)
    onehots = [workspace.chained(h, final) if source in h.sources else h for h in term.onehots if h is not onehot]
    if any(source in dim for dim in term.in_dims):
        onehots.append(inverse)
    return workspace.canonical(term.having(factors=factors, onehots=tuple(onehots)))


__all__ = ["by_rows", "in_rows"]
