"""Relations that lead in a circle: each follows from what the other one gives.

An index by rows that is followed by one by columns makes them: with ``row = s[i, column]`` and ``column = t[row, k]`` neither can
be read at the sources of the other. Where both hold is a join of two tables, whose rows a new axis counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from chainrule.maps.sorted_places import join_equal
from chainrule.maps.terms import Axis, OneHot, Term

if TYPE_CHECKING:
    from chainrule.maps.sparse import SparseWorkspace


def opened(term: Term, by_target: dict[Axis, OneHot], workspace: SparseWorkspace) -> Term | None:
    """The term with two relations of a circle as one table; None where none lead in a circle.

    Args:
        term: the term.
        by_target: its relations, of which no two have one target.
        workspace: where indices are made.
    """
    circle = _circle(by_target)
    if not circle:
        return None
    pairs = zip(circle, [*circle[1:], circle[0]], strict=True)
    one, two = min(pairs, key=lambda pair: max(h.index.numel for h in pair))
    columns = [_columns(h, workspace) for h in (one, two)]
    shared = [axis for axis in columns[0] if axis in columns[1]]
    chosen = join_equal(*(_keys(h, own, shared) for h, own in zip((one, two), columns, strict=True)))
    found = {
        axis: column.index_select(0, places)
        for own, places in zip(columns, chosen, strict=True)
        for axis, column in own.items()
    }
    counted = Axis(int(chosen[0].numel()))
    rest = tuple(h for h in term.onehots if h is not one and h is not two)
    listed = tuple(OneHot(workspace.index(column), (counted,), axis) for axis, column in found.items())
    return term.having(onehots=(*rest, *listed), scale=term.scale if counted.size else 0.0)


def _circle(by_target: dict[Axis, OneHot]) -> list[OneHot]:
    """Relations of which each reads the target of the next one, and the last that of the first."""
    left = dict(by_target)
    while ended := [axis for axis, h in left.items() if not any(source in left for source in h.sources)]:
        for axis in ended:
            del left[axis]
    path: dict[Axis, OneHot] = {}
    axis = next(iter(left), None)
    while axis is not None and axis not in path:
        path[axis] = left[axis]
        axis = next(source for source in left[axis].sources if source in left)
    targets = list(path)
    return [] if axis is None else [path[target] for target in targets[targets.index(axis) :]]


def _columns(onehot: OneHot, workspace: SparseWorkspace) -> dict[Axis, torch.Tensor]:
    """A relation as a table: for each of its places, in order, where its sources and its target are."""
    index = workspace.read(onehot.index).reshape([axis.size for axis in onehot.sources])
    columns = {}
    for dim, axis in enumerate(onehot.sources):
        counted = torch.arange(axis.size, device=index.device).reshape([-1 if d == dim else 1 for d in range(index.dim())])
        columns[axis] = counted.expand(index.shape).reshape(-1)
    columns[onehot.target] = index.reshape(-1)
    return columns


def _keys(onehot: OneHot, columns: dict[Axis, torch.Tensor], shared: list[Axis]) -> torch.Tensor:
    """The shared columns of a table as one number, negative where the relation has no target."""
    key = torch.zeros_like(columns[onehot.target])
    for axis in shared:
        key = key * axis.size + columns[axis]
    return torch.where(columns[onehot.target] < 0, -1, key)


__all__ = ["opened"]
