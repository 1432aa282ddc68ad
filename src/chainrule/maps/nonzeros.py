"""The non-zeros of terms: their values and places, sums of them as vectors, and dense blocks that they fill."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from chainrule.maps.compose import dense_factor
from chainrule.maps.nodes import Node
from chainrule.maps.sorted_places import inverse, ordering, places_among
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Dims, Factor, OneHot, Term
from chainrule.maps.views import expand_to

if TYPE_CHECKING:
    from chainrule.maps.sparse import SparseWorkspace


#: Entries are put in line by turning at most so many dimensions.
_MOST_TURNED = 6

#: Terms of fewer entries are left as they are; in others, those that meet are counted in one row of so many.
_HEAVY, _SAMPLE = 1 << 12, 17

#: Of a sample, so many entries stand alone where those of all are not listed.
_APART = 0.7

#: From this many terms on at one vertex, their entries are counted, and summed if that makes them fewer.
MANY = 12

#: Never more terms than this at one vertex.
_MOST = 64

#: Where at most one entry in so many is not in a term by rows, such entries are one term.
_FEW = 4


class Entries(NamedTuple):
    """The entries of one term.

    Attributes:
        factor: their values, over some axes of the grid.
        grid: the axes that number them.
        keys: for each, row times the number of columns plus column.
        kept: which points of the grid have an entry; None for all.
    """

    factor: Factor
    grid: tuple[Axis, ...]
    keys: torch.Tensor
    kept: torch.Tensor | None


def count_entries(term: Term) -> int:
    """How many entries a settled term has."""
    targets = {h.target for h in term.onehots}
    return math.prod(axis.size for axis in term.all_axes() if axis not in targets)


def without_shared(terms: Sequence[Term]) -> tuple[list[Term], Callable[[Term], Term]]:
    """Terms without the relations that all of them have on the same dimension: its sources are dimensions in its place.

    Returns:
        The terms, and what gives a term with their dimensions the relations back.
    """
    relations = [{h.target: h for h in term.onehots} for term in terms]
    shared: dict[tuple[int, int], OneHot] = {}
    for side in range(2):
        for d in range(len((terms[0].out_dims, terms[0].in_dims)[side])):
            dims = [(term.out_dims, term.in_dims)[side][d] for term in terms]
            first = relations[0].get(dims[0][0]) if len(dims[0]) == 1 else None
            if first is None or not first.sources:
                continue
            found = [known.get(dim[0]) if len(dim) == 1 else None for dim, known in zip(dims, relations, strict=True)]
            if all(h is not None and h.index is first.index for h in found):
                shared[side, d] = first

    def places(term: Term) -> list[list[tuple[Axis, ...]]]:
        known = {h.target: h for h in term.onehots}
        opened: list[list[tuple[Axis, ...]]] = [[], []]
        for side, dims in enumerate((term.out_dims, term.in_dims)):
            for d, dim in enumerate(dims):
                opened[side].extend([(a,) for a in known[dim[0]].sources] if (side, d) in shared else [dim])
        return opened

    def restore(term: Term) -> Term:
        onehots = list(term.onehots)
        closed: list[list[tuple[Axis, ...]]] = [[], []]
        for side, dims in enumerate((term.out_dims, term.in_dims)):
            rest = list(dims)
            for d in range(counts[side]):
                h = shared.get((side, d))
                if h is None:
                    closed[side].append(rest.pop(0))
                    continue
                own, rest = rest[: len(h.sources)], rest[len(h.sources) :]
                # A source of size one may stand for itself without an axis.
                sources = tuple(dim[0] if dim else Axis(1) for dim in own)
                target = Axis(h.target.size)
                onehots.append(h._replace(sources=sources, target=target))
                closed[side].append((target,))
        return replace(term, out_dims=tuple(closed[0]), in_dims=tuple(closed[1]), onehots=tuple(onehots))

    counts = len(terms[0].out_dims), len(terms[0].in_dims)
    bare = []
    for term in terms:
        out_dims, in_dims = places(term)
        gone = {(term.out_dims, term.in_dims)[side][d][0] for side, d in shared}
        # A target that stands in another dimension, too (a block of a diagonal), is still tied there.
        gone -= {axis for side in (out_dims, in_dims) for dim in side for axis in dim}
        kept = tuple(h for h in term.onehots if h.target not in gone)
        bare.append(replace(term, out_dims=tuple(out_dims), in_dims=tuple(in_dims), onehots=kept))
    return bare, restore


def diagonals(terms: Sequence[Term]) -> list[tuple[int, int]]:
    """Pairs (output dimension, input dimension) that are one and the same axis in every term."""
    first = terms[0]
    return [
        (o, i)
        for o, out in enumerate(first.out_dims)
        for i, inner in enumerate(first.in_dims)
        if all(len(t.out_dims[o]) == 1 and t.out_dims[o] == t.in_dims[i] and t.out_dims[o][0].size > 1 for t in terms)
    ]


def block_size(terms: Sequence[Term]) -> int | None:
    """How many entries a block has that is dense but for the diagonals that all terms have.

    None where there is no such diagonal.
    """
    pairs = diagonals(terms)
    if not pairs or len({o for o, _ in pairs}) < len(pairs) or len({i for _, i in pairs}) < len(pairs):
        return None
    out_shape, in_shape = _dims_shape(terms[0].out_dims), _dims_shape(terms[0].in_dims)
    bound = {i for _, i in pairs}
    return math.prod(out_shape) * math.prod(size for i, size in enumerate(in_shape) if i not in bound)


def block_keys(terms: Sequence[Term], device: torch.device) -> torch.Tensor:
    """The keys of the block of :func:`block_size`, in the order of :func:`as_block`."""
    out_shape, in_shape = _dims_shape(terms[0].out_dims), _dims_shape(terms[0].in_dims)
    bound = {i: o for o, i in diagonals(terms)}
    free = [i for i in range(len(in_shape)) if i not in bound]
    sizes = [*out_shape, *(in_shape[i] for i in free)]
    keys = torch.zeros((1,) * len(sizes), dtype=torch.long, device=device)
    stride = math.prod(out_shape) * math.prod(in_shape)
    for position, size in enumerate((*out_shape, *in_shape)):
        stride //= max(size, 1)
        number = position - len(out_shape)
        place = position if number < 0 else bound[number] if number in bound else len(out_shape) + free.index(number)
        keys = keys + (torch.arange(size, device=device) * stride).reshape([-1 if n == place else 1 for n in range(len(sizes))])
    return keys.expand(sizes).reshape(-1)


def as_block(
    terms: Sequence[Term], entries: Sequence[Entries], block: torch.Tensor, every: Listed, workspace: SparseWorkspace
) -> Term:
    """The sum of terms that fill the block ``block``, whose keys are those that are listed, as one dense factor."""
    bound = {i: o for o, i in diagonals(terms)}
    out_shape, in_shape = _dims_shape(terms[0].out_dims), _dims_shape(terms[0].in_dims)
    out = [Axis(size) for size in out_shape]
    inner = [out[bound[i]] if i in bound else Axis(size) for i, size in enumerate(in_shape)]
    axes = tuple(dict.fromkeys((*out, *inner)))
    node = values_node(entries, every, workspace)
    sizes = tuple(axis.size for axis in axes)
    back = None if torch.equal(every.keys, block) else inverse(ordering(block))

    def compute(program: Program, value: Staged) -> Staged:
        if back is not None:
            value = torch.index_select(value, 0, program.constant(back))
        return torch.reshape(value, sizes)

    made = Node(sizes, (node,), compute, moved=0 if back is None else 2 * block.numel(), label="block")
    return Term(tuple((axis,) for axis in out), tuple((axis,) for axis in inner), (Factor(made, axes),))


def places_in(term: Term) -> int:
    """The number of places of the matrix that a term is."""
    return math.prod(_dims_shape(term.out_dims)) * math.prod(_dims_shape(term.in_dims))


def _dims_shape(dims: Dims) -> tuple[int, ...]:
    return tuple(math.prod(axis.size for axis in dim) for dim in dims)


def entries_of(term: Term, workspace: SparseWorkspace) -> Entries:
    """The entries of a settled term."""
    factor, grid, keys, valid = _keys_of(term, workspace)
    if valid is None:
        return Entries(factor, grid, keys, None)
    kept = torch.nonzero(valid).squeeze(1)
    return Entries(factor, grid, keys.index_select(0, kept), kept)


def placed_entries(term: Term, workspace: SparseWorkspace) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of the entries of a settled term, and their keys: negative where there is none."""
    factor, grid, keys, valid = _keys_of(term, workspace)
    names = {axis: number for number, axis in enumerate(grid)}
    value = expand_to(factor.node.force(workspace.program), tuple(names[a] for a in factor.axes), tuple(range(len(grid))))
    flat = value.value.expand([axis.size for axis in grid]).reshape(-1)
    return flat.to(workspace.dtype), keys if valid is None else torch.where(valid, keys, -1)


def _keys_of(
    term: Term, workspace: SparseWorkspace
) -> tuple[Factor, tuple[Axis, ...], torch.Tensor, torch.Tensor | None]:
    """The values of a settled term, the grid of its points, the key of each, and whether it is an entry; None for all."""
    targets = {h.target: h for h in term.onehots}
    every = [axis for axis in term.all_axes() if axis not in targets and axis.size != 1]
    positions = [[axis for dim in dims for axis in dim] for dims in (term.out_dims, term.in_dims)]
    # In the order of rows, then of columns.
    first = [a for axis in positions[0] for a in (targets[axis].sources if axis in targets else (axis,)) if a.size != 1]
    grid = tuple(dict.fromkeys([*first, *every]))
    factor = dense_factor(term, grid, workspace, ordered=False)
    # Entries are numbered as their values come.
    grid = (*factor.axes, *(axis for axis in grid if axis not in factor.axes))
    names = {axis: number for number, axis in enumerate(grid)}
    sizes = tuple(axis.size for axis in grid)
    columns = math.prod(axis.size for axis in positions[1])
    keys = torch.zeros((), dtype=torch.long, device=workspace.device)
    valid: torch.Tensor | None = None
    for side, scale in ((0, columns), (1, 1)):
        stride = scale
        for axis in reversed(positions[side]):
            if axis in targets:
                place = over_grid(targets[axis], workspace, names)
                if targets[axis].partial:
                    valid = place >= 0 if valid is None else valid & (place >= 0)
                keys = keys + place * stride
            elif axis.size != 1:
                counted = torch.arange(axis.size, device=workspace.device) * stride
                keys = keys + counted.reshape([-1 if n == names[axis] else 1 for n in range(len(grid))])
            stride *= axis.size
    for onehot in term.onehots:
        if onehot.partial:
            here = over_grid(onehot, workspace, names) >= 0
            valid = here if valid is None else valid & here
    return factor, grid, keys.expand(sizes).reshape(-1), None if valid is None else valid.expand(sizes).reshape(-1)


def over_grid(onehot: OneHot, workspace: SparseWorkspace, names: dict[Axis, int]) -> torch.Tensor:
    """A relation's index, broadcast against the grid."""
    index = workspace.read(onehot.index)
    sources = [axis for axis in onehot.sources if axis in names]
    index = index.reshape([axis.size for axis in sources])
    order = sorted(range(len(sources)), key=lambda n: names[sources[n]])
    shape = [1] * len(names)
    for axis in sources:
        shape[names[axis]] = axis.size
    return index.permute(order).reshape(shape)


def summed(out_dims: Dims, in_dims: Dims, entries: Sequence[Entries], listed: Listed, workspace: SparseWorkspace) -> Term:
    """One term of the entries of several, which stand at the keys ``listed``."""
    keys = listed.keys
    node = values_node(entries, listed, workspace)
    axis = Axis(keys.numel())
    onehots: list[OneHot] = []
    dims: list[tuple[Axis, ...]] = []
    shapes = _dims_shape(out_dims), _dims_shape(in_dims)
    stride = math.prod(shapes[0]) * math.prod(shapes[1])
    for size in (*shapes[0], *shapes[1]):
        stride //= max(size, 1)
        target = Axis(size)
        dims.append((target,))
        if size != 1:
            onehots.append(OneHot(workspace.index(keys // max(stride, 1) % size), (axis,), target))
    made = Term(tuple(dims[: len(shapes[0])]), tuple(dims[len(shapes[0]) :]), (Factor(node, (axis,)),), tuple(onehots))
    return workspace.canonical(made)


def thinned(term: Term, workspace: SparseWorkspace) -> Term:
    """A settled list of entries with one at each place, where there are twice as many or more; other terms as they are."""
    rows, columns = (math.prod(_dims_shape(dims)) for dims in (term.out_dims, term.in_dims))
    count = count_entries(term)
    if count < max(_HEAVY, 2 * rows, 2 * columns) or len({h.sources for h in term.onehots}) != 1:
        return term
    if len(term.onehots[0].sources) != 1 or term.onehots[0].sources[0].size != count:
        return term
    entries = entries_of(term, workspace)
    some = entries.keys[entries.keys // max(columns, 1) % _SAMPLE == 1]
    if 2 * some.unique().numel() > some.numel():
        return term
    every = listed([entries], rows * columns)
    return summed(term.out_dims, term.in_dims, [entries], every, workspace) if 2 * every.keys.numel() <= count else term


def few_apart(terms: Sequence[Term], workspace: SparseWorkspace) -> tuple[Term, ...] | None:
    """Terms by rows as they are, and all others as one term; None where these are none, or more than a few entries."""
    others = [term for term in terms if any(h.target in dim for h in term.onehots for dim in term.out_dims)]
    few, count = sum(map(count_entries, others)), sum(map(count_entries, terms))
    if len(others) == len(terms) or _FEW * few > count:
        return None
    if len(others) < 2:
        return tuple(terms)
    entries = [entries_of(term, workspace) for term in others]
    added = summed(others[0].out_dims, others[0].in_dims, entries, listed(entries, places_in(others[0])), workspace)
    return (*(term for term in terms if not any(term is other for other in others)), added)


def fewer(terms: Sequence[Term], workspace: SparseWorkspace) -> tuple[Term, ...]:
    """The same sum as one block or one list, where the terms fill the block, or are many and meet; as it is elsewhere."""
    block = block_size(terms)
    if len(terms) < MANY and (block is None or block > sum(count_entries(term) for term in terms)):
        return tuple(terms)
    entries = [entries_of(term, workspace) for term in terms]
    count = sum(e.keys.numel() for e in entries)
    if (block is None or block > count) and len(terms) <= _MOST and count >= _HEAVY and _are_apart(entries):
        return tuple(terms)
    every = listed(entries, places_in(terms[0]))
    found = every.keys.numel()
    if found == block:
        return (as_block(terms, entries, block_keys(terms, workspace.device), every, workspace),)
    if len(terms) < MANY or found > 0.6 * count and len(terms) <= _MOST:
        return tuple(terms)
    return (summed(terms[0].out_dims, terms[0].in_dims, entries, every, workspace),)


def _are_apart(entries: Sequence[Entries]) -> bool:
    """Whether few entries of several terms meet, by a sample of the places."""
    some = torch.cat([e.keys[torch.remainder(e.keys, _SAMPLE) == 1] for e in entries])
    return some.unique().numel() > _APART * some.numel()


class Listed(NamedTuple):
    """Where entries of several terms stand in one list.

    Attributes:
        keys: the keys of the list, sorted, each once.
        places: for each term, the place of each of its entries in the list; -1 where it is left out.
    """

    keys: torch.Tensor
    places: tuple[torch.Tensor, ...]


def listed(entries: Sequence[Entries], size: int | None = None) -> Listed:
    """All entries of some terms in one list; `size` is the number of places that there are."""
    if len(entries) == 1 and bool((entries[0].keys[1:] > entries[0].keys[:-1]).all()):
        keys = entries[0].keys
        return Listed(keys, (torch.arange(keys.numel(), device=keys.device),))
    keys, places = places_among(torch.cat([e.keys for e in entries]), size)
    return Listed(keys, places.split([e.keys.numel() for e in entries]))


def restricted(entries: Sequence[Entries], every: Listed, wanted: torch.Tensor) -> tuple[list[Entries], Listed]:
    """Entries at some places of a list only; terms that have none there are gone.

    Args:
        entries: the entries.
        every: where they stand.
        wanted: for each key of the list whether it is kept.
    """
    renumbered = torch.where(wanted, torch.cumsum(wanted, 0) - 1, -1)
    kept: list[Entries] = []
    places: list[torch.Tensor] = []
    for one, own in zip(entries, every.places, strict=True):
        found = renumbered.index_select(0, own)
        if bool((found >= 0).any()):
            kept.append(one)
            places.append(found)
    return kept, Listed(every.keys[wanted], tuple(places))


def values_node(
    entries: Sequence[Entries], every: Listed, workspace: SparseWorkspace, read: torch.Tensor | None = None
) -> Node:
    """The values of a sum of entries in the order of a list.

    Args:
        entries: the entries.
        every: where they stand.
        workspace: where values that are the same in every run are known.
        read: which values of the list to return, in which order; None for all.
    """
    count, total = sum(places.numel() for places in every.places), every.keys.numel()

    def compute(program: Program, *values: Staged) -> Staged:
        parts: list[tuple[Staged, torch.Tensor | None]] = []
        places: list[torch.Tensor] = []
        base = torch.zeros(total, dtype=workspace.dtype, device=workspace.device)
        for one, own, value in zip(entries, every.places, values, strict=True):
            flat, kept, slots = _flat(value, one, own)
            if flat.dtype != workspace.dtype:
                flat = flat.to(workspace.dtype)
            if flat in workspace.fixed:
                fixed = workspace.plain(flat.value)
                base = base.index_add(0, slots, fixed if kept is None else fixed.index_select(0, kept))
            else:
                parts.append((flat, kept))
                places.append(slots)
        if not parts:
            start = program.constant(base if read is None else base.index_select(0, read))
            return program.call(torch.clone, start)
        where = torch.cat(places) if len(places) > 1 else places[0]
        order = _order_of(where, total) if not bool(base.any()) else None
        if order is not None and read is not None:
            order = order.index_select(0, read)
        flat, kept = parts[0]
        if order is not None and len(parts) == 1 and kept is not None:
            return torch.index_select(flat, 0, program.constant(kept.index_select(0, order)))
        if order is not None and len(parts) == 1 and read is None and 0 not in flat.value.stride():
            turn = _turn_of(where)
            if turn is not None and len(turn[1]) > 1:  # a copy of a view in place of reading one by one
                return torch.reshape(torch.permute(torch.reshape(flat, turn[0]), turn[1]), (-1,))
        chosen = [f if k is None else torch.index_select(f, 0, program.constant(k)) for f, k in parts]
        joined = program.call(torch.cat, chosen) if len(chosen) > 1 else chosen[0]
        if order is None:
            summed = torch.index_add(program.constant(base), 0, program.constant(where), joined)
            return summed if read is None else torch.index_select(summed, 0, program.constant(read))
        if order.numel() == where.numel() and bool((order[1:] > order[:-1]).all()):
            return program.call(torch.clone, joined) if program.recorded else joined
        return torch.index_select(joined, 0, program.constant(order))

    results = total if read is None else read.numel()
    inputs = tuple(one.factor.node for one in entries)
    moved = 5 * count + total + (0 if read is None else 2 * results)
    return Node((results,), inputs, compute, flops=count, moved=moved, label="entries")


def _order_of(places: torch.Tensor, total: int) -> torch.Tensor | None:
    """The order in which entries at ``places`` come in a list of ``total``; None unless each place is taken once."""
    if places.numel() != total:
        return None
    order = torch.full((total,), -1, dtype=torch.long, device=places.device)
    order.index_copy_(0, places, torch.arange(total, device=places.device))
    return None if bool((order < 0).any()) else order


def _turn_of(places: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The shape and the order of its dimensions by which entries at these places come to stand in line; None for no such order.

    Args:
        places: for each entry its place; all places are taken once.
    """
    sizes: list[int] = []
    steps: list[int] = []
    rest = places
    while rest.numel() > 1:  # the places along the last dimension keep their distance
        step = int(rest[1]) - int(rest[0])
        breaks = torch.nonzero(rest.diff() != step)
        size = int(breaks[0]) + 1 if breaks.numel() else rest.numel()
        if step <= 0 or rest.numel() % size or len(sizes) >= _MOST_TURNED:
            return None
        sizes.insert(0, size)
        steps.insert(0, step)
        rest = rest[::size]
    dims = tuple(sorted(range(len(sizes)), key=lambda n: -steps[n]))
    found = torch.arange(places.numel(), device=places.device).reshape([sizes[n] for n in dims])
    found = found.permute([dims.index(n) for n in range(len(dims))]).reshape(-1)
    return (tuple(sizes), dims) if torch.equal(found, places) else None


def _flat(value: Staged, entries: Entries, places: torch.Tensor) -> tuple[Staged, torch.Tensor | None, torch.Tensor]:
    """The values of entries as a vector, in the order in which they lie in memory; which of them have a place; their places."""
    grid, factor = entries.grid, entries.factor
    names = {axis: number for number, axis in enumerate(grid)}
    sizes = tuple(axis.size for axis in grid)
    have = tuple(names[a] for a in factor.axes)
    value = expand_to(value, have, tuple(range(len(grid))))
    if tuple(value.shape) != sizes:
        value = torch.broadcast_to(value, sizes)
    if entries.kept is not None:
        places = torch.full((math.prod(sizes),), -1, device=places.device).index_copy_(0, entries.kept, places)
    strides = value.value.stride()
    order = sorted(range(len(sizes)), key=lambda n: -strides[n])
    if order != list(range(len(sizes))) and 0 not in strides:
        value = torch.permute(value, order)
        places = places.reshape(sizes).permute(order).reshape(-1)
    if len(sizes) != 1:
        value = torch.reshape(value, (-1,))
    present = places >= 0
    if bool(present.all()):
        return value, None, places
    kept = torch.nonzero(present).squeeze(1)
    return value, kept, places.index_select(0, kept)


__all__ = [
    "MANY", "Entries", "Listed", "block_keys", "count_entries", "entries_of", "few_apart", "fewer", "listed", "over_grid",
    "placed_entries", "places_in", "restricted", "summed", "thinned", "values_node", "without_shared",
]  # fmt: skip
