"""Selections by index tensors and masks: gathers, scatters, writes at given places, embeddings.

The relations' indices are values of the tape, staged when the plan runs. Where a place is written twice without
accumulation, torch leaves open which value stays; as in torch's own formulas every one of them gets the derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from chainrule.maps.nodes import Node, leaf, masking, selecting
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Factor, OneHot, Term, affine_onehot, constant_index, dims_of, new_axes
from chainrule.rules.base import Call, Edge, Rule, broadcast_axes, diagonal_term, formula_node, single, value_node
from chainrule.rules.families import view
from chainrule.rules.moves import written
from chainrule.rules.views import flat_relations
from chainrule.shapes import broadcast_shapes

aten = torch.ops.aten

Stager = Callable[[Program], Staged]


#: Up to so many places a remainder, which is one call, takes less time than the three calls of a choice.
_FEW_PLACES = 1024


def from_the_front(index: Staged, size: int) -> Staged:
    """Places among as many as `size`, with those counted from the end as places counted from the front."""
    if size and math.prod(index.shape) <= _FEW_PLACES:
        found: Staged = torch.remainder(index, size)
        return found
    return torch.where(index < 0, index + size, index)  # type: ignore[no-any-return]


def _index_node(
    call: Call, item: Any, size: int, sizes: Iterable[int] | None = None, *, negative: bool = True
) -> Node:
    """An index tensor of the tape, counted from the front, viewed with ``sizes``; ``negative`` where the op allows that."""
    shape = call.shape(item) if sizes is None else tuple(sizes)

    def stage(program: Program) -> Staged:
        index = call.stage(program, item)
        index = index if index.dtype == torch.long else index.to(torch.long)
        if negative:
            index = from_the_front(index, size)
        return index if tuple(index.shape) == shape else torch.reshape(index, shape)

    return leaf(shape, stage, label="index")


def rank_one(shape: Sequence[int]) -> tuple[int, ...]:
    """A scalar is indexed like a vector of one element."""
    return tuple(shape) if shape else (1,)


def _dims(axes: Sequence[Axis], shape: Sequence[int]) -> tuple[tuple[Axis, ...], ...]:
    return dims_of(axes) if shape else ()


def _dim(call: Call, shape: Sequence[int]) -> int:
    dim: int = call.argument("dim")
    return dim % max(len(shape), 1)


# One index along one dimension.


def _selected(call: Call, whole: Sequence[int], part: Sequence[int], item: Any) -> Term:
    """The term of ``index_select``: from a tensor of shape ``whole`` to one of shape ``part``."""
    dim = _dim(call, whole)
    axes = new_axes(rank_one(whole))
    source = Axis(rank_one(part)[dim])
    out = (*axes[:dim], source, *axes[dim + 1 :])
    relation = OneHot(_index_node(call, item, axes[dim].size, (source.size,), negative=False), (source,), axes[dim])
    return Term(_dims(out, part), _dims(axes, whole), (), (relation,))


def _index_select(call: Call) -> Term:
    return _selected(call, call.shape(call.args[0]), call.out_shape, call.argument("index"))


def _written_along(call: Call, source: Any) -> Term:
    return _selected(call, call.out_shape, call.shape(source), call.argument("index")).transpose()


def _line_mask(call: Call, axes: Sequence[Axis], inside: float, outside: float) -> Factor:
    """A factor over the indexed dimension alone: ``inside`` at the index, ``outside`` elsewhere."""
    dim = _dim(call, call.out_shape)
    size, item = axes[dim].size, call.argument("index")

    def formula(program: Program) -> Staged:
        index = torch.reshape(call.stage(program, item), (-1,))
        full = program.call(torch.full, (size,), outside, dtype=call.workspace.dtype, device=call.workspace.device)
        return torch.index_fill(full, 0, index.to(torch.long), inside)

    return Factor((selecting if outside else masking)(formula_node(call, (size,), formula)), (axes[dim],))


def self_edge(call: Call, factors: Callable[[tuple[Axis, ...]], Sequence[Factor]] = lambda axes: ()) -> Iterable[Edge]:
    """The edge from the first argument, of which the factors keep a part."""
    base = call.args[0]
    if call.is_active(base):
        axes = new_axes(rank_one(call.out_shape))
        made = factors(axes)
        shape = call.shape(base)
        yield single(call, base, [Term(_dims(axes, call.out_shape), _dims(axes, shape), tuple(made))])


def _index_add(call: Call) -> Iterable[Edge]:
    yield from self_edge(call)
    source = call.argument("source")
    if call.is_active(source):
        term = _written_along(call, source)
        alpha = float(call.argument("alpha"))
        yield single(call, source, [Term(term.out_dims, term.in_dims, (), term.onehots, alpha)])


def _index_copy(call: Call) -> Iterable[Edge]:
    yield from self_edge(call, lambda axes: [_line_mask(call, axes, 0.0, 1.0)])
    source = call.argument("source")
    if call.is_active(source):
        yield single(call, source, [_written_along(call, source)])


def _index_fill(call: Call) -> Iterable[Edge]:
    yield from self_edge(call, lambda axes: [_line_mask(call, axes, 0.0, 1.0)])
    value = call.argument("value")
    if call.is_active(value):
        axes = new_axes(rank_one(call.out_shape))
        yield single(call, value, [Term(_dims(axes, call.out_shape), (), (_line_mask(call, axes, 1.0, 0.0),))])


# gather and scatter: an index tensor over all dimensions.


def _gathered(call: Call, whole: Sequence[int], part: Sequence[int], item: Any) -> Term:
    """The term of ``gather`` from a tensor of shape ``whole``: ``part`` is the index's shape."""
    dim = _dim(call, whole)
    axes, out = list(new_axes(rank_one(whole))), new_axes(rank_one(part))
    if len(out) != len(axes):  # an empty index may have any rank
        return Term(_dims(out, part), _dims(axes, whole))
    relations = []
    for d, axis in enumerate(out):
        if d == dim:
            continue
        if axes[d].size == axis.size:
            axes[d] = axis
        else:
            relations.append(affine_onehot(axis, axes[d], 0, 1, call.workspace))
    index = _index_node(call, item, axes[dim].size, (a.size for a in out), negative=False)
    relations.append(OneHot(index, out, axes[dim]))
    return Term(_dims(out, part), _dims(axes, whole), (), tuple(relations))


def _gather(call: Call) -> Term:
    return _gathered(call, call.shape(call.args[0]), call.out_shape, call.argument("index"))


def scattered(call: Call, source: Any) -> Term:
    """The term that takes ``src`` of a scatter to its places; elements of it beyond the index go nowhere."""
    index, shape = call.argument("index"), call.shape(source)
    have, used = rank_one(shape), rank_one(call.shape(index))
    # The index may be a vector of one element where the source is a scalar, and the other way round.
    term = _gathered(call, call.out_shape, used, index).transpose()
    if have == used:
        return term if shape else replace(term, in_dims=())
    axes = new_axes(have)
    cut = tuple(
        affine_onehot(inner, axis, 0, 1, call.workspace) if inner.size != axis.size else None
        for (inner,), axis in zip(term.in_dims, axes, strict=True)
    )
    kept = tuple(dim if relation is None else (axis,) for dim, relation, axis in zip(term.in_dims, cut, axes, strict=True))
    return Term(term.out_dims, kept, (), (*term.onehots, *(relation for relation in cut if relation is not None)))


def place_mask(call: Call, axes: Sequence[Axis]) -> Factor:
    """Zero at the places that a scatter writes, one elsewhere."""
    sizes = tuple(a.size for a in axes)
    dim, item = _dim(call, call.out_shape), call.argument("index")
    shape = rank_one(call.shape(item))

    def formula(program: Program) -> Staged:
        index = torch.reshape(call.stage(program, item), shape if math.prod(shape) else (0,) * len(sizes))
        full = program.call(torch.ones, sizes, dtype=call.workspace.dtype, device=call.workspace.device)
        return torch.scatter(full, dim, index, 0.0)

    return Factor(selecting(formula_node(call, sizes, formula)), tuple(axes))


def _scatter(call: Call) -> Iterable[Edge]:
    yield from self_edge(call, lambda axes: [place_mask(call, axes)])
    source = call.argument("src")
    if call.is_active(source) and math.prod(call.shape(call.argument("index"))):
        yield single(call, source, [scattered(call, source)])


def _scatter_add(call: Call) -> Iterable[Edge]:
    yield from self_edge(call)
    source = call.argument("src")
    if call.is_active(source) and math.prod(call.shape(call.argument("index"))):
        yield single(call, source, [scattered(call, source)])


# Advanced indexing: several index tensors, broadcast against each other.


class _Advanced:
    """The structure of ``self[indices]``.

    Attributes:
        part: the axes of the result's dimensions.
        broadcast: those of them that the index tensors give.
        whole: the axes of the indexed tensor's dimensions.
        relations: how the indexed ones of these follow from the result's.
    """

    def __init__(self, call: Call, whole: Sequence[int], indices: Sequence[Any], part: Sequence[int]) -> None:
        self.call = call
        self.whole = new_axes(whole)
        indexed = _indexed_dims(call, indices)
        before = indexed[0] if indexed == list(range(indexed[0], indexed[0] + len(indexed))) else 0
        after = len(whole) - len(indexed) - before
        # How many elements a mask selects stands in the shape of what is read or written there.
        place = len(part) - after - 1
        count = part[place] if place >= 0 else 1
        shapes = [_index_shape(call, item, count) for item in indices if call.is_slot(item)]
        axes = new_axes(broadcast_shapes(*shapes))
        free = [axis for d, axis in enumerate(self.whole) if d not in indexed]
        self.part = (*free[:before], *axes, *free[before:])
        self.broadcast = axes
        self.relations = tuple(self._relations(indices, axes))

    def _relations(self, indices: Sequence[Any], axes: Sequence[Axis]) -> Iterable[OneHot]:
        call = self.call
        dim = 0
        for item in indices:
            if not call.is_slot(item):
                dim += 1
                continue
            shape = _index_shape(call, item, axes[-1].size if axes else 1)
            if not _is_mask(call, item):
                yield self._relation(dim, shape, lambda program, i=item: call.stage(program, i), axes)
                dim += 1
                continue
            for column in range(call.tensor(item).ndim):
                yield self._relation(dim, shape, lambda program, i=item, c=column, s=shape: torch.broadcast_to(
                    torch.select(torch.nonzero(call.stage(program, i)), 1, c), s), axes)
                dim += 1

    def _relation(self, dim: int, shape: tuple[int, ...], stage: Stager, axes: Sequence[Axis]) -> OneHot:
        own = axes[len(axes) - len(shape) :]
        sources = tuple(axis for axis, size in zip(own, shape, strict=True) if size != 1 or axis.size == 1)
        sizes, extent = tuple(axis.size for axis in sources), self.whole[dim].size

        def staged(program: Program) -> Staged:
            index = stage(program)
            index = index if index.dtype == torch.long else index.to(torch.long)
            index = from_the_front(index, extent)
            return index if tuple(index.shape) == sizes else torch.reshape(index, sizes)

        return OneHot(leaf(sizes, staged, label="index"), sources, self.whole[dim])

    def read(self) -> Term:
        """The term that reads the elements."""
        return Term(dims_of(self.part), dims_of(self.whole), (), self.relations)


def _is_mask(call: Call, item: Any) -> bool:
    return call.tensor(item).dtype in (torch.bool, torch.uint8)


def _index_shape(call: Call, item: Any, count: int) -> tuple[int, ...]:
    """The shape of an index; ``count`` elements for a mask."""
    return (count,) if _is_mask(call, item) else call.shape(item)


def _indexed_dims(call: Call, indices: Sequence[Any]) -> list[int]:
    """The dimensions that some index stands for."""
    indexed: list[int] = []
    dim = 0
    for item in indices:
        width = call.tensor(item).ndim if call.is_slot(item) and _is_mask(call, item) else 1
        if call.is_slot(item):
            indexed.extend(range(dim, dim + width))
        dim += width
    return indexed


def _index(call: Call) -> Iterable[Edge]:
    base, indices = call.args[:2]
    if not call.is_active(base):
        return
    if not any(call.is_slot(item) for item in indices):
        axes = new_axes(call.out_shape)
        yield single(call, base, [Term(dims_of(axes), dims_of(axes))])
        return
    yield single(call, base, [_Advanced(call, call.shape(base), indices, call.out_shape).read()])


def _places(call: Call, axes: Sequence[Axis], inside: float, outside: float) -> Factor:
    """A factor over the indexed dimensions alone: ``inside`` at the written places, ``outside`` elsewhere."""
    indices = call.args[1]
    own = [axes[d] for d in _indexed_dims(call, indices)]
    items = [item for item in indices if call.is_slot(item)]
    sizes = tuple(a.size for a in own)
    accumulate = bool(call.argument("accumulate"))

    def formula(program: Program) -> Staged:
        dtype, device = call.workspace.dtype, call.workspace.device
        full = program.call(torch.full, sizes, outside, dtype=dtype, device=device)
        value = program.call(torch.full, (), inside, dtype=dtype, device=device)
        return program.call(aten.index_put.default, full, [call.stage(program, item) for item in items], value, accumulate)

    return Factor((selecting if outside else masking)(formula_node(call, sizes, formula)), tuple(own))


def _index_put(call: Call) -> Iterable[Edge]:
    indices, values = call.args[1:3]
    if call.argument("accumulate"):
        yield from self_edge(call)
    else:
        yield from self_edge(call, lambda axes: [_places(call, axes, 0.0, 1.0)])
    if not call.is_active(values):
        return
    shape = call.shape(values)
    advanced = _Advanced(call, call.out_shape, indices, shape)
    dims = broadcast_axes(shape, advanced.part)
    offset = len(advanced.part) - len(shape)
    spread = [d for d, axis in enumerate(advanced.part) if axis in advanced.broadcast]
    if all(d < offset or shape[d - offset] == 1 for d in spread):
        # One value for all places along the indexed dimensions: no relation is needed.
        kept = tuple(() if d + offset in spread else dim for d, dim in enumerate(dims))
        yield single(call, values, [Term(dims_of(advanced.whole), kept, (_places(call, advanced.whole, 1.0, 0.0),))])
        return
    yield single(call, values, [Term(dims_of(advanced.whole), dims, (), advanced.relations)])


# Flat indices.


def _taken(call: Call, whole: Sequence[int], item: Any) -> Term:
    """The term of ``take``: a flat index into a tensor of shape ``whole``."""
    axes, out = new_axes(whole), new_axes(call.shape(item))
    flat = _index_node(call, item, math.prod(whole))
    return Term(dims_of(out), dims_of(axes), (), flat_relations(flat, out, axes, False))


def _take(call: Call) -> Term:
    return _taken(call, call.shape(call.args[0]), call.argument("index"))


def _put(call: Call) -> Iterable[Edge]:
    item, source = call.argument("index"), call.argument("source")
    shape = call.out_shape

    def outside(axes: tuple[Axis, ...]) -> list[Factor]:
        def formula(program: Program) -> Staged:
            total = math.prod(shape)
            full = program.call(torch.ones, (total,), dtype=call.workspace.dtype, device=call.workspace.device)
            index = _index_node(call, item, total, (math.prod(call.shape(item)),)).force(program)
            return torch.reshape(torch.index_fill(full, 0, index, 0.0), tuple(a.size for a in axes))

        return [Factor(selecting(formula_node(call, (a.size for a in axes), formula)), axes)]

    yield from (self_edge(call) if call.argument("accumulate") else self_edge(call, outside))
    if call.is_active(source):
        term = _taken(call, shape, item).transpose()
        if call.shape(source) != call.shape(item):
            count = Axis(math.prod(call.shape(item)))
            axes = new_axes(shape)
            flat = _index_node(call, item, math.prod(shape), (count.size,))
            dims = _flat_dims(call, source, count)
            term = Term(dims_of(axes), dims[0], (), (*flat_relations(flat, (count,), axes, False), *dims[1]))
        yield single(call, source, [term])


def _flat_dims(call: Call, item: Any, flat: Axis) -> tuple[tuple[tuple[Axis, ...], ...], tuple[OneHot, ...]]:
    """Dimensions of a tensor that is read in row-major order by the axis ``flat``, and the relations that say so."""
    axes = new_axes(call.shape(item))
    order = constant_index((flat.size,), lambda d: torch.arange(flat.size, device=d), call.workspace.device)
    return dims_of(axes), flat_relations(order, (flat,), axes, False)


# Masks.


def _kept(call: Call, axes: Sequence[Axis], inside: bool) -> Factor:
    """The mask argument (or its negation) as a factor over those output axes that it has."""
    item = call.argument("mask")
    dims = broadcast_axes(call.shape(item), axes)
    own = tuple(axis for dim in dims for axis in dim)

    def stage(program: Program) -> Staged:
        mask = call.stage(program, item)
        mask = torch.reshape(mask, tuple(a.size for a in own))
        return (mask if inside else torch.logical_not(mask)).to(call.workspace.dtype)

    return Factor(masking(leaf((a.size for a in own), stage, flops=1, label="mask")), own)


def _masked_fill(call: Call) -> Iterable[Edge]:
    base, value = call.args[0], call.argument("value")
    axes = new_axes(call.out_shape)
    if call.is_active(base):
        yield single(call, base, [diagonal_term(call.shape(base), axes, [_kept(call, axes, False)])])
    if call.is_active(value):
        yield single(call, value, [diagonal_term(call.shape(value), axes, [_kept(call, axes, True)])])


def _masked_select(call: Call) -> Term:
    shape, item = call.shape(call.args[0]), call.argument("mask")
    full = broadcast_shapes(shape, call.shape(item))
    count = Axis(call.out_shape[0])
    wide = new_axes(full)
    dims = broadcast_axes(shape, wide)
    relations = []
    for d, axis in enumerate(wide):
        if not any(axis in dim for dim in dims):
            continue

        def stage(program: Program, d: int = d) -> Staged:
            mask = torch.broadcast_to(call.stage(program, item), full)
            return torch.select(torch.nonzero(mask), 1, d)

        relations.append(OneHot(leaf((count.size,), stage, label="index"), (count,), axis))
    return Term(((count,),), dims, (), tuple(relations))


def _masked_scatter(call: Call) -> Iterable[Edge]:
    base, source, item = call.args[0], call.argument("source"), call.argument("mask")
    axes = new_axes(call.out_shape)
    if call.is_active(base):
        yield single(call, base, [diagonal_term(call.shape(base), axes, [_kept(call, axes, False)])])
    if not call.is_active(source):
        return
    shape = call.out_shape
    if not call.shape(source):  # no axis whose relation would leave out what is not taken
        yield single(call, source, [Term(dims_of(axes), (), (_kept(call, axes, True),))])
        return

    def stage(program: Program) -> Staged:
        mask = torch.broadcast_to(call.stage(program, item), shape)
        order = torch.cumsum(torch.reshape(mask, (-1,)).to(torch.long), 0) - 1
        return torch.where(mask, torch.reshape(order, shape), -1)

    in_axes = new_axes(call.shape(source))
    flat = leaf(shape, stage, label="index")
    yield single(call, source, [Term(dims_of(axes), dims_of(in_axes), (), flat_relations(flat, axes, in_axes, True))])


# Embeddings.


def _row_index(call: Call, item: Any, padding: int) -> Node:
    """An embedding's indices, -1 where they are the padding index (such rows get no derivative)."""
    shape = call.shape(item)

    def stage(program: Program) -> Staged:
        index = call.stage(program, item).to(torch.long)
        return index if padding < 0 else torch.where(index == padding, -1, index)

    return leaf(shape, stage, label="index")


def _looked_up(call: Call, rows: int, width: int, item: Any, padding: int) -> Term:
    places, columns, row = new_axes(call.shape(item)), Axis(width), Axis(rows)
    factors = []
    if call.argument("scale_grad_by_freq"):

        def frequency(program: Program) -> Staged:
            index = call.stage(program, item).to(torch.long)
            counts = torch.bincount(torch.reshape(index, (-1,)), minlength=rows)
            return torch.reciprocal(counts[index].to(call.workspace.dtype))

        factors.append(Factor(formula_node(call, (a.size for a in places), frequency), places))
    relation = OneHot(_row_index(call, item, padding), places, row, padding >= 0)
    return Term(dims_of((*places, columns)), ((row,), (columns,)), tuple(factors), (relation,))


def _embedding(call: Call) -> Term:
    rows, width = call.shape(call.args[0])
    # Torch's forward mode looks the tangents up like the values; its reverse mode leaves out the row of padding.
    padding = -1 if call.workspace.forward else call.argument("padding_idx")
    return _looked_up(call, rows, width, call.argument("indices"), padding)


def _embedding_dense_backward(call: Call) -> Term:
    rows, width = call.out_shape
    return _looked_up(call, rows, width, call.argument("indices"), call.argument("padding_idx")).transpose()


_SUM, _MEAN, _MAX = 0, 1, 2


def _bag_number(call: Call, count: int) -> Node:
    """For each index of an embedding bag, the number of its bag."""
    offsets = call.argument("offsets")

    def stage(program: Program) -> Staged:
        starts = call.stage(program, offsets).to(torch.long)
        places = program.call(torch.arange, count, device=call.workspace.device)
        return torch.searchsorted(starts, places, right=True) - 1

    return leaf((count,), stage, label="index")


def _bag_weights(call: Call, indices: Any, count: int, bags: int) -> Stager:
    """One over the number of the bag's entries that are no padding."""
    padding = call.argument("padding_idx")

    def stage(program: Program) -> Staged:
        bag = _bag_number(call, count).force(program)
        counted = torch.ne(call.stage(program, indices), padding).to(call.workspace.dtype)
        zeros = program.call(torch.zeros, (bags,), dtype=call.workspace.dtype, device=call.workspace.device)
        sizes = torch.index_add(zeros, 0, bag, counted)
        return torch.reciprocal(torch.clamp(sizes, min=1.0))[bag]

    return stage


def _embedding_bag(call: Call) -> Iterable[Edge]:
    weight, indices = call.args[0], call.argument("indices")
    mode, padding, per_sample = (call.argument(n) for n in ("mode", "padding_idx", "per_sample_weights"))
    (rows, width), (count,) = call.shape(weight), call.shape(indices)
    bags = call.out_shape[0]
    if mode == _MAX:
        if call.is_active(weight):
            yield single(call, weight, [_largest_in_bag(call, rows, bags, width)])
        return
    item, bag, columns, row = Axis(count), Axis(bags), Axis(width), Axis(rows)
    to_bag = OneHot(_bag_number(call, count), (item,), bag)
    to_row = OneHot(_row_index(call, indices, padding), (item,), row, padding >= 0)
    factors = []
    if mode == _MEAN:
        factors.append(Factor(formula_node(call, (count,), _bag_weights(call, indices, count, bags)), (item,)))
    if call.argument("scale_grad_by_freq"):

        def frequency(program: Program) -> Staged:
            index = call.stage(program, indices).to(torch.long)
            return torch.reciprocal(torch.bincount(index, minlength=rows)[index].to(call.workspace.dtype))

        factors.append(Factor(formula_node(call, (count,), frequency), (item,)))
    if call.is_active(weight):
        own = [*factors, Factor(value_node(call, per_sample), (item,))] if call.is_slot(per_sample) else factors
        yield single(call, weight, [Term(((bag,), (columns,)), ((row,), (columns,)), tuple(own), (to_bag, to_row))])
    if call.is_active(per_sample):
        read = (to_bag, to_row)
        table = Factor(value_node(call, weight), (row, columns))
        yield single(call, per_sample, [Term(((bag,), (columns,)), ((item,),), (table,), read)])


def _largest_in_bag(call: Call, rows: int, bags: int, width: int) -> Term:
    """``mode="max"``: each output element reads the row that the op names as the largest; empty bags read none."""
    bag, columns, row = Axis(bags), Axis(width), Axis(rows)
    count = call.shape(call.argument("indices"))[0]

    def stage(program: Program) -> Staged:
        chosen = call.stage_output(program, 3).to(torch.long)
        number = _bag_number(call, count).force(program)
        zeros = program.call(torch.zeros, (bags,), dtype=torch.long, device=call.workspace.device)
        counted = torch.ne(call.stage(program, call.argument("indices")), call.argument("padding_idx")).to(torch.long)
        filled = torch.index_add(zeros, 0, number, counted)
        return torch.where(torch.unsqueeze(filled, 1) > 0, chosen, -1)

    return Term(((bag,), (columns,)), ((row,), (columns,)), (), (OneHot(leaf((bags, width), stage), (bag, columns), row, True),))


_INDEX, _INDEX_PUT = Rule("selection", _index), Rule("selection", _index_put)
_MASKED_FILL, _INDEX_FILL = Rule("selection", _masked_fill), Rule("selection", _index_fill)
_EMBEDDING_BAG = Rule("selection", _embedding_bag)

RULES: dict[Any, Rule] = {
    aten.index_select.default: view(_index_select, reads=True, family="selection"),
    aten.index_add.default: Rule("selection", _index_add),
    aten.index_copy.default: Rule("selection", _index_copy),
    aten.index_fill.int_Scalar: _INDEX_FILL,
    aten.index_fill.int_Tensor: _INDEX_FILL,
    aten.gather.default: view(_gather, reads=True, family="selection"),
    aten.scatter.src: Rule("selection", _scatter),
    aten.scatter.value: Rule("selection", _scatter),
    aten.scatter_add.default: Rule("selection", _scatter_add),
    aten.index.Tensor: _INDEX,
    aten._unsafe_index.Tensor: _INDEX,
    aten.index_put.default: _INDEX_PUT,
    aten._unsafe_index_put.default: _INDEX_PUT,
    aten._index_put_impl.default: _INDEX_PUT,
    aten.take.default: view(_take, reads=True, family="selection"),
    aten.put.default: Rule("selection", _put),
    aten.masked_fill.Scalar: _MASKED_FILL,
    aten.masked_fill.Tensor: _MASKED_FILL,
    aten.masked_select.default: view(_masked_select, reads=True, family="selection"),
    aten.masked_scatter.default: Rule("selection", _masked_scatter),
    aten.embedding.default: view(_embedding, reads=True, family="selection"),
    aten.embedding_dense_backward.default: view(_embedding_dense_backward, reads=True, family="selection"),
    aten._embedding_bag.default: _EMBEDDING_BAG,
    aten._embedding_bag_forward_only.default: _EMBEDDING_BAG,
}

__all__ = ["RULES", "place_mask", "rank_one", "scattered", "self_edge", "written"]
