"""Lists of entries that meet in both of their dimensions.

The Jacobian of a sum over a graph's edges is a list of entries, the same place of which may be named more than once. What is
summed over both dimensions of a product of two of them (a sum of squares, the diagonal of ``J Jᵀ``, the trace of ``J K``) needs
the pairs of entries that stand at one place. All other contractions of such lists read what they meet at the places of the
entries; here both sides are lists, and their places are sorted: that takes memory in the number of entries, where a mask of the
pairs, or the matrix, takes its square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from chainrule.maps.compose import Workspace, dense_factor, push_onehots
from chainrule.maps.linear_map import LinearMap
from chainrule.maps.nodes import Node
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Factor, OneHot, Term, dims_of, new_axes

#: To sort an entry's place takes as long as moving so many numbers.
_SORTED = 64

#: What ``explain`` calls this.
MEETING = "meeting entries"


def as_list(term: Term, workspace: Workspace) -> Term | None:
    """A term whose places in the output and in the input are both told by indices, ready to be listed; None for others."""
    if not term.onehots:
        return None
    term = push_onehots(term, workspace)
    targets = {h.target for h in term.onehots}
    sides = [{axis for dim in dims for axis in dim} for dims in (term.out_dims, term.in_dims)]
    told = [{h.target for h in term.onehots if h.affine is None and h.target in side} for side in sides]
    if not all(told) or not targets <= sides[0] | sides[1]:
        return None
    if any(source in targets for h in term.onehots for source in h.sources):  # chained
        return None
    outer = set().union(*sides)
    internal = {axis for h in term.onehots for axis in h.sources} - outer
    return term if internal and not any(axis in targets for f in term.factors for axis in f.axes) else None


def met(one: Term, two: Term, keep: bool, workspace: Workspace) -> Term:
    """The products of the entries of two lists that stand at the same place, summed in each row, or all of them.

    Args:
        one: a list, as :func:`as_list` gives it.
        two: another list between the same spaces, or the same one.
        keep: whether each row has a sum of its own.
        workspace: where nodes are shared.
    """
    rows, columns = (math.prod(axis.size for dim in dims for axis in dim) for dims in (one.out_dims, one.in_dims))
    lists = list(dict.fromkeys(_entries(term, workspace) for term in (one, two)))  # one where they are the same
    axes = new_axes([math.prod(axis.size for axis in dim) for dim in one.out_dims]) if keep else ()
    sizes = tuple(axis.size for axis in axes)
    counts = [values.numel for values, _ in lists]
    node = Node(
        sizes,
        tuple(node for entries in lists for node in entries),
        partial(_meeting, counts, (rows, max(columns, 1)), sizes, keep),
        flops=sum(counts),
        moved=_SORTED * sum(counts) + 2 * math.prod(sizes),
        label=MEETING,
    )
    return Term(dims_of(axes), (), (Factor(node, tuple(axes)),))


def _entries(term: Term, workspace: Workspace) -> tuple[Node, Node]:
    """The values of a list's entries, and their places: row times the number of columns plus column, -1 where there is none."""
    keys = [(name, term.out_dims, term.in_dims, term.factors, term.onehots, term.scale) for name in ("values", "places")]
    if keys[0] in workspace.memo:
        return workspace.memo[keys[0]], workspace.memo[keys[1]]
    targets = {h.target: h for h in term.onehots}
    outer = [axis for dims in (term.out_dims, term.in_dims) for dim in dims for axis in dim]
    grid = tuple(dict.fromkeys(a for axis in outer for a in (targets[axis].sources if axis in targets else (axis,))))
    sizes = tuple(axis.size for axis in grid)
    count = math.prod(sizes)
    factor = dense_factor(term.having(onehots=()), grid, workspace)
    device = workspace.device

    def values(program: Program, value: Staged) -> Staged:
        held = [axis.size if axis in factor.axes else 1 for axis in grid]
        return torch.reshape(torch.broadcast_to(torch.reshape(value, held), sizes), (count,))

    def places(program: Program, *indices: Staged) -> Staged:
        index_of = dict(zip(targets, indices, strict=True))
        total = valid = None
        stride = 1
        for axis in reversed(outer):
            if axis.size != 1:
                if (onehot := targets.get(axis)) is None:
                    place = _counted(program, axis, grid, device)
                else:
                    place = _aligned(onehot, index_of[axis], grid)
                    if onehot.partial:
                        here = torch.ge(place, 0)
                        valid = here if valid is None else torch.logical_and(valid, here)
                place = place * stride if stride != 1 else place
                total = place if total is None else total + place
            stride *= axis.size
        if total is None:
            total = program.constant(torch.zeros((), dtype=torch.long, device=device))
        total = torch.broadcast_to(total, sizes)
        if valid is not None:
            total = torch.where(torch.broadcast_to(valid, sizes), total, -1)
        return torch.reshape(total, (count,))

    indices = tuple(h.index for h in targets.values())
    workspace.memo[keys[0]] = Node((count,), (factor.node,), values, moved=count, label="entries")
    workspace.memo[keys[1]] = Node((count,), indices, places, moved=4 * count, label="places of entries")
    return workspace.memo[keys[0]], workspace.memo[keys[1]]


def _aligned(onehot: OneHot, index: Staged, grid: Sequence[Axis]) -> Staged:
    """A relation's index, broadcast against the grid."""
    order = sorted(range(len(onehot.sources)), key=lambda number: grid.index(onehot.sources[number]))
    if order != [*range(len(order))]:
        index = torch.permute(index, order)
    return torch.reshape(index, [axis.size if axis in onehot.sources else 1 for axis in grid])


def _counted(program: Program, axis: Axis, grid: Sequence[Axis], device: torch.device) -> Staged:
    return torch.reshape(
        program.constant(torch.arange(axis.size, device=device)), [axis.size if other is axis else 1 for other in grid]
    )


def _meeting(
    counts: Sequence[int], shape: tuple[int, int], sizes: tuple[int, ...], keep: bool, program: Program, *lists: Staged
) -> Staged:
    """The sum of products of entries at one place, of two lists or of one with itself."""
    values, places = lists[::2], lists[1::2]
    total = sum(counts)
    kind, device = values[0].dtype, values[0].device
    if total == 0:
        return program.call(torch.zeros, sizes, dtype=kind, device=device)
    joined = places[0] if len(places) == 1 else torch.cat([*places])
    ordered, order = torch.sort(joined)
    # Entries at one place have one number.
    first = torch.ne(torch.narrow(ordered, 0, 1, total - 1), torch.narrow(ordered, 0, 0, total - 1))
    numbers = torch.nn.functional.pad(torch.cumsum(first, 0), (1, 0))
    nothing = program.call(torch.zeros, (total,), dtype=torch.long, device=device)
    own = torch.scatter(nothing, 0, order, numbers)
    sums = []
    start = 0
    for count, value, place in zip(counts, values, places, strict=True):
        # What has no place is nothing.
        value = torch.where(torch.lt(place, 0), 0.0, value)
        zeros = program.call(torch.zeros, (total,), dtype=kind, device=device)
        sums.append(torch.index_add(zeros, 0, torch.narrow(own, 0, start, count), value))
        start += count
    product = sums[0] * sums[-1]
    if not keep:
        return torch.sum(product)
    rows = torch.div(torch.clamp(ordered, min=0), shape[1], rounding_mode="floor")
    row_of = torch.scatter(nothing, 0, numbers, rows)
    zeros = program.call(torch.zeros, (shape[0],), dtype=kind, device=device)
    return torch.reshape(torch.index_add(zeros, 0, row_of, product), sizes)


def lists_of(local: LinearMap, workspace: Workspace) -> list[Term]:
    """The terms of a map that are lists, ready to be listed."""
    return [listed for term in local.terms if (listed := as_list(term, workspace)) is not None]


def without_lists(local: LinearMap, workspace: Workspace) -> LinearMap:
    """A map without the terms that are lists."""
    return replace(local, terms=tuple(term for term in local.terms if as_list(term, workspace) is None))


__all__ = ["MEETING", "as_list", "lists_of", "met", "without_lists"]
