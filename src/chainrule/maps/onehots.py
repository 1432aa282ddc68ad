"""What a one-hot factor does to dense factors: gather along its target, scatter along its sources."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from chainrule.maps import running_reads
from chainrule.maps.contract import contract, transpose_to
from chainrule.maps.nodes import Node, leaf
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Factor, OneHot
from chainrule.maps.views import expand_to, permute

Memo = dict[object, Node]

#: Adding an element at an index takes about as long as moving this many elements in order.
_SCATTERED = 6


def gather(factor: Factor, onehot: OneHot, memo: Memo) -> Factor:
    """Read a factor that carries the relation's target at ``index[sources]``: it then carries the sources instead."""
    target = onehot.target
    position = factor.axes.index(target)
    if factor.node.running is not None:
        if (read := running_reads.gathered(factor, onehot, memo)) is not None:
            return read
        if not any(axis in factor.axes for axis in onehot.sources):
            read = _gathered(factor, onehot, memo, position)
            return Factor(running_reads.note_gathered(factor, onehot, read.node, position, memo), read.axes)
    return _gathered(factor, onehot, memo, position)


def _gathered(factor: Factor, onehot: OneHot, memo: Memo, position: int) -> Factor:
    target = onehot.target
    if any(axis in factor.axes for axis in onehot.sources):
        return _gather_at(factor, onehot.sources, (target,), onehot.index, partial=onehot.partial, memo=memo)
    axes = factor.axes[:position] + onehot.sources + factor.axes[position + 1 :]
    sizes = tuple(axis.size for axis in axes)
    affine, partial = onehot.affine, onehot.partial
    length = onehot.sources[0].size if len(onehot.sources) == 1 else 0
    tail = len(factor.axes) - position - 1

    if affine is not None and affine[1] > 0:

        def slice_affine(program: Program, value: Staged) -> Staged:
            return program.view_of(value, lambda v: _slice(v, position, affine[0], affine[1], length))

        key = ("slice", id(factor.node), position, *affine, length)
        return Factor(_node(key, sizes, (factor.node,), slice_affine, memo), axes)

    if affine is not None and not onehot.sources:

        def select(program: Program, value: Staged) -> Staged:
            return program.view_of(value, lambda v: torch.select(v, position, affine[0]))

        key = ("select", id(factor.node), position, affine[0])
        return Factor(_node(key, sizes, (factor.node,), select, memo), axes)

    def index_select(program: Program, value: Staged, index: Staged) -> Staged:
        flat = torch.reshape(index, (-1,)) if index.ndim != 1 else index
        places = torch.clamp(flat, min=0) if partial else flat

        def read(entries: Staged) -> Staged:
            taken = torch.index_select(entries, position, places)
            if index.ndim != 1:
                taken = torch.reshape(taken, sizes)
            return _kept(torch.reshape(index >= 0, (*index.shape, *(1,) * tail)), taken) if partial else taken

        return program.view_of(value, read)

    key = ("gather", id(factor.node), position, id(onehot.index))
    node = _node(key, sizes, (factor.node, onehot.index), index_select, memo)
    if partial:
        node.bytes = 4 * node.numel  # one pass more, for the mask
    return Factor(node, axes)


def _node(key: object, sizes: Sequence[int], inputs: tuple[Node, ...], compute: object, memo: Memo) -> Node:
    node = memo.get(key)
    if node is None:
        numel = math.prod(sizes)
        node = memo[key] = Node(sizes, inputs, compute, flops=numel, moved=2 * numel, label=str(key[0]))  # type: ignore[arg-type, index]
    return node


def _slice(value: Staged, dim: int, start: int, step: int, length: int) -> Staged:
    if step == 1:
        return torch.narrow(value, dim, start, length)
    index = [slice(None)] * dim + [slice(start, start + step * (length - 1) + 1 if length else start, step)]
    return value[tuple(index)]


def _kept(valid: Staged, entries: Staged) -> Staged:
    """The entries at valid places, zero elsewhere."""
    return torch.logical_and(valid, entries) if entries.dtype == torch.bool else torch.where(valid, entries, 0.0)


def gather_flat(factor: Factor, group: Sequence[OneHot], memo: Memo) -> Factor | None:
    """Read a factor that carries the targets of several relations, which are the digits of one index, at that index."""
    group = [h for h in group if h.sources == group[0].sources]
    flat = _flat_places(group) if len(group) > 1 else None
    if flat is None or any(h.target not in factor.axes for h in group):
        return None
    sources = group[0].sources
    return _gather_at(factor, sources, tuple(h.target for h in group), flat, partial=False, memo=memo)


def _gather_at(
    factor: Factor, sources: tuple[Axis, ...], targets: tuple[Axis, ...], index: Node, *, partial: bool, memo: Memo
) -> Factor:
    """``torch.gather`` along the targets, taken as one; the factor may carry some of the relation's sources already."""
    shared = tuple(axis for axis in sources if axis in factor.axes)
    extra = tuple(axis for axis in sources if axis not in factor.axes)
    rest = tuple(a for a in factor.axes if a not in shared and a not in targets)
    moved = transpose_to(factor, (*shared, *rest, *targets), memo)
    axes = (*shared, *rest, *extra)
    lead, middle = tuple(a.size for a in shared), tuple(a.size for a in rest)
    count, extent = math.prod(a.size for a in extra), math.prod(a.size for a in targets)
    sizes = tuple(a.size for a in axes)
    permutation = tuple(sources.index(a) for a in (*shared, *extra))

    def compute(program: Program, value: Staged, places: Staged) -> Staged:
        places = torch.reshape(permute(places, permutation), (*lead, *(1,) * len(middle), count))
        places = torch.broadcast_to(places, (*lead, *middle, count))

        def read(entries: Staged) -> Staged:
            if len(targets) > 1:
                entries = torch.reshape(entries, (*lead, *middle, extent))
            taken = torch.gather(entries, -1, torch.clamp(places, min=0) if partial else places)
            return torch.reshape(_kept(places >= 0, taken) if partial else taken, sizes)

        return program.view_of(value, read)

    key = ("gather", id(moved.node), lead, permutation, id(index), len(targets))
    return Factor(_node(key, sizes, (moved.node, index), compute, memo), axes)


def scatter(
    factors: Sequence[Factor], group: Sequence[OneHot], keep: Sequence[Axis], dtype: torch.dtype, memo: Memo
) -> Factor:
    """Sum ``factors`` into the targets of ``group`` (one-hots with the same sources); the sources that are not kept go.

    Returns a factor over the kept axes that the factors carry, the sources among them last, followed by the targets.
    """
    sources = group[0].sources
    targets = tuple(onehot.target for onehot in group)
    summed = tuple(axis for axis in sources if axis not in keep)
    diagonal = tuple(axis for axis in sources if axis in keep)
    full = list(factors)
    carried = {axis for factor in full for axis in factor.axes}
    missing = [axis for axis in sources if axis not in carried]
    full.extend(Factor(ones((axis.size,), group[0].index, dtype), (axis,)) for axis in missing)
    carried.update(missing)
    rest = tuple(axis for axis in keep if axis in carried and axis not in sources)
    product = contract(full, (*rest, *diagonal, *summed), memo)
    axes = (*rest, *diagonal, *targets)
    count = math.prod(a.size for a in summed)
    extent = math.prod(a.size for a in targets)
    sizes = tuple(a.size for a in axes)
    permutation = tuple(sources.index(a) for a in (*diagonal, *summed))
    lead, middle = tuple(a.size for a in diagonal), tuple(a.size for a in rest)
    affine = group[0].affine if len(group) == 1 and len(sources) == 1 and not diagonal else None

    if affine is not None and affine[1] == 1:

        def pad(program: Program, value: Staged) -> Staged:
            return torch.nn.functional.pad(value, (affine[0], extent - affine[0] - count))

        key: object = ("pad", id(product.node), affine, extent)
        return Factor(_node(key, sizes, (product.node,), pad, memo), axes)

    inverse = group[0].index.inverse if len(group) == 1 == len(sources) and not diagonal and not group[0].partial else None
    if inverse is not None and count == extent:

        def read_back(program: Program, value: Staged, index: Staged) -> Staged:
            # As the value lies in memory: what is made then lies like it.
            strides = value.value.stride()
            order = tuple(sorted(range(value.ndim), key=lambda dim: -strides[dim]))
            back = tuple([order.index(dim) for dim in range(value.ndim)])
            return permute(torch.index_select(permute(value, order), back[-1], index), back)

        key = ("read back", id(product.node), id(group[0].index))
        return Factor(_node(key, sizes, (product.node, inverse()), read_back, memo), axes)

    flat = _flat_places(group)
    relations = tuple(o.index for o in group) if flat is None else (flat,)
    # Nothing has to be added where no two elements go to the same place.
    alone = flat is not None and flat.distinct.issuperset(sources.index(axis) for axis in summed)

    def compute(program: Program, value: Staged, *indices: Staged) -> Staged:
        linear, valid = _linear_index(group, indices) if flat is None else (indices[0], None)
        linear = permute(linear, permutation)
        if valid is not None:
            value = torch.where(permute(valid, permutation), value, 0.0)
        value = torch.reshape(value, (*middle, *lead, count))
        if not lead:
            zeros = program.call(torch.zeros, (*middle, extent), dtype=value.dtype, device=value.device)
            added = torch.index_add(zeros, -1, torch.reshape(linear, (count,)), value)
        else:
            linear = torch.broadcast_to(torch.reshape(linear, (*lead, count)), (*middle, *lead, count))
            zeros = program.call(torch.zeros, (*middle, *lead, extent), dtype=value.dtype, device=value.device)
            added = (torch.scatter if alone else torch.scatter_add)(zeros, -1, linear, value)
        return torch.reshape(added, sizes)

    key = ("scatter", id(product.node), tuple(id(o.index) for o in group), permutation, len(diagonal), sizes)
    node = _node(key, sizes, (product.node, *relations), compute, memo)
    node.bytes = 2 * node.numel + _SCATTERED * product.node.numel
    return Factor(node, axes)


def digit(flat: Node, stride: int, size: int, total: int) -> Node:
    """One coordinate of flat places among ``total``: ``flat // stride % size``."""

    def compute(program: Program, value: Staged) -> Staged:
        if stride > 1:
            value = torch.div(value, stride, rounding_mode="floor")
        return torch.remainder(value, max(size, 1))

    node = Node(flat.sizes, (flat,), compute, label="index")
    node.digit = (flat, stride, size, total)
    return node


def _flat_places(group: Sequence[OneHot]) -> Node | None:
    """The index whose digits the relations are, all of them in order: it is the index into all targets."""
    stride, flat, total = 1, None, -1
    for onehot in reversed(group):
        found = onehot.index.digit
        if found is None or onehot.partial or found[1:3] != (stride, onehot.target.size):
            return None
        total = found[3]
        if flat is not None and found[0] is not flat:
            return None
        flat = found[0]
        stride *= onehot.target.size
    return flat if stride == total else None


def _linear_index(group: Sequence[OneHot], indices: Sequence[Staged]) -> tuple[Staged, Staged | None]:
    """The row-major index into all targets, and where it counts (None: everywhere)."""
    linear = valid = None
    for onehot, index in zip(group, indices, strict=True):
        if onehot.partial:
            known = index >= 0
            valid = known if valid is None else torch.logical_and(valid, known)
            index = torch.clamp(index, min=0)
        linear = index if linear is None else linear * onehot.target.size + index
    assert linear is not None
    return linear, valid


def dense_relation(onehot: OneHot, dtype: torch.dtype, memo: Memo) -> Factor:
    """The relation as a dense array of zeros and ones over (sources, target)."""
    axes = (*onehot.sources, onehot.target)
    size = onehot.target.size

    def compute(program: Program, index: Staged) -> Staged:
        grid = program.constant(torch.arange(size, device=index.device))
        return torch.eq(torch.unsqueeze(index, -1), grid).to(dtype)

    key = ("relation", id(onehot.index), size, dtype)
    return Factor(_node(key, tuple(a.size for a in axes), (onehot.index,), compute, memo), axes)


def mask_factor(onehot: OneHot, dtype: torch.dtype, memo: Memo) -> Factor:
    """One where a partial relation has a target, zero elsewhere."""
    sizes = tuple(a.size for a in onehot.sources)
    key = ("mask", id(onehot.index), dtype)
    return Factor(
        _node(key, sizes, (onehot.index,), lambda program, index: (index >= 0).to(dtype), memo), onehot.sources
    )


def fixed_points(onehot: OneHot, dtype: torch.dtype, memo: Memo) -> Factor:
    """One where a relation takes an axis, which is one of its sources, to itself; zero elsewhere."""
    sizes = tuple(a.size for a in onehot.sources)
    place = onehot.sources.index(onehot.target)
    own = tuple(size if number == place else 1 for number, size in enumerate(sizes))

    def compute(program: Program, index: Staged) -> Staged:
        grid = program.constant(torch.arange(sizes[place], device=index.device).reshape(own))
        return torch.eq(index, grid).to(dtype)

    key = ("fixed", id(onehot.index), place, dtype)
    return Factor(_node(key, sizes, (onehot.index,), compute, memo), onehot.sources)


def ones(sizes: tuple[int, ...], beside: Node, dtype: torch.dtype) -> Node:
    """An array of ones on the device of ``beside``."""

    def compute(program: Program, value: Staged) -> Staged:
        return program.call(torch.ones, sizes, dtype=dtype, device=value.device)

    return Node(sizes, (beside,), compute, label="ones")


def eye(size: int, dtype: torch.dtype, device: torch.device) -> Node:
    """A dense identity matrix, for the few places where a diagonal has to become dense."""
    return leaf((size, size), lambda program: program.call(torch.eye, size, dtype=dtype, device=device), label="eye")


__all__ = [
    "Memo", "dense_relation", "digit", "expand_to", "eye", "fixed_points", "gather", "gather_flat", "mask_factor", "ones",
    "scatter",
]  # fmt: skip
