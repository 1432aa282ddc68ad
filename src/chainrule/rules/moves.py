"""Ops that move, repeat, join, pad or write elements at places known beforehand, and the transposes of views."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from chainrule.maps.nodes import Node, selecting
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import (
    Axis,
    Factor,
    IndexSpace,
    OneHot,
    Term,
    affine_onehot,
    constant_index,
    dims_of,
    listed_index,
    new_axes,
)
from chainrule.rules.base import Call, Edge, Rule, broadcast_axes, diagonal_term, formula_node, single
from chainrule.rules.families import slice_term, view
from chainrule.rules.views import (
    diagonal_relations,
    diagonal_view,
    fixed_index,
    flat_relations,
    select_term,
    sliced,
    strided_index,
    strided_view,
    unfold_view,
)

aten = torch.ops.aten


# Reordering.


def _flip(call: Call) -> Term:
    shape = call.shape(call.args[0])
    flipped = {d % len(shape) for d in call.argument("dims")} if shape else set()
    return _rearranged(shape, range(len(shape)), flipped, call.workspace)


def _rearranged(shape: Sequence[int], order: Iterable[int], flipped: Iterable[int], space: IndexSpace) -> Term:
    """Output dimension ``k`` is input dimension ``order[k]``, read backwards where it stands in ``flipped``."""
    axes = new_axes(shape)
    read: dict[int, Axis] = dict(enumerate(axes))
    relations = []
    for d in flipped:
        if shape[d] > 1:
            read[d] = Axis(shape[d])
            relations.append(affine_onehot(read[d], axes[d], shape[d] - 1, -1, space))
    return Term(dims_of([read[d] for d in order]), dims_of(axes), (), tuple(relations))


def _rot90(call: Call) -> Term:
    shape = call.shape(call.args[0])
    first, second = (d % len(shape) for d in call.argument("dims"))
    turns = call.argument("k") % 4
    order = list(range(len(shape)))
    if turns % 2:
        order[first], order[second] = second, first
    flipped = {0: (), 1: (second,), 2: (first, second), 3: (first,)}[turns]
    return _rearranged(shape, order, flipped, call.workspace)


def _roll(call: Call) -> Term:
    shape = call.shape(call.args[0])
    device = call.workspace.device
    shifts, dims = call.argument("shifts"), call.argument("dims")
    if not dims:
        total, shift = math.prod(shape), shifts[0]
        out, axes = new_axes(shape), new_axes(shape)
        flat = constant_index(
            shape, lambda d: torch.remainder(torch.arange(total, device=d) - shift, max(total, 1)).reshape(shape), device
        )
        relations = flat_relations(flat, out, axes, False)
        if len(shape) == 1:
            for onehot in relations:
                onehot.index.distinct = frozenset({0})
        return Term(dims_of(out), dims_of(axes), (), relations)
    total_shift: dict[int, int] = {}
    for shift, d in zip(shifts, dims, strict=True):
        total_shift[d % len(shape)] = total_shift.get(d % len(shape), 0) + shift
    axes = new_axes(shape)
    out_axes = list(axes)
    rolled = []
    for d, shift in total_shift.items():
        size = shape[d]
        if size == 0 or shift % size == 0:
            continue
        out_axes[d] = Axis(size)
        rolled.append(_listed(out_axes[d], axes[d], [(i - shift) % size for i in range(size)], device))
        rolled[-1].index.distinct = frozenset({0})
        rolled[-1].index.inverse = partial(_rolled_back, size, shift, device)
    return Term(dims_of(out_axes), dims_of(axes), (), tuple(rolled))


def _rolled_back(size: int, shift: int, device: torch.device) -> Node:
    """Where the elements of a roll come from when it is undone."""
    return listed_index([(i + shift) % size for i in range(size)], device)


def _listed(source: Axis, target: Axis, positions: Sequence[int], device: torch.device) -> OneHot:
    """The relation ``target == positions[source]``; negative positions read nothing."""
    return OneHot(listed_index(positions, device), (source,), target, any(p < 0 for p in positions))


def _repeat(call: Call) -> Term:
    shape = call.shape(call.args[0])
    repeats = call.argument("repeats")
    extra = len(repeats) - len(shape)
    axes = new_axes(shape)
    out = [(Axis(count), *((axes[k - extra],) if k >= extra else ())) for k, count in enumerate(repeats)]
    return Term(tuple(out), dims_of(axes))


def _pixel_shuffle(call: Call) -> Term:
    shape, factor = call.shape(call.args[0]), call.argument("upscale_factor")
    return _shuffled_pixels(shape, factor)


def _shuffled_pixels(shape: Sequence[int], factor: int) -> Term:
    batch = new_axes(shape[:-3])
    channel, height, width = Axis(shape[-3] // factor**2), Axis(shape[-2]), Axis(shape[-1])
    rows, columns = Axis(factor), Axis(factor)
    inner = (*dims_of(batch), (channel, rows, columns), (height,), (width,))
    return Term((*dims_of(batch), (channel,), (height, rows), (width, columns)), inner)


def _pixel_unshuffle(call: Call) -> Term:
    return _shuffled_pixels(call.out_shape, call.argument("downscale_factor")).transpose()


def _channel_shuffle(call: Call) -> Term:
    shape, groups = call.shape(call.args[0]), call.argument("groups")
    batch, *rest = new_axes(shape)
    group, channel = Axis(groups), Axis(shape[1] // groups)
    inner = dims_of(rest[1:])
    return Term(((batch,), (channel, group), *inner), ((batch,), (group, channel), *inner))


# Joining.


def _cat(call: Call) -> Iterable[Edge]:
    out_shape = call.out_shape
    dim = call.argument("dim") % max(len(out_shape), 1)
    start = 0
    for item in call.args[0]:
        shape = call.shape(item)
        if shape == (0,) and len(out_shape) != 1:
            continue  # an empty vector joins anything
        if call.is_active(item):
            yield single(call, item, [slice_term(out_shape, dim, start, 1, shape[dim], call.workspace).transpose()])
        start += shape[dim]


def _stack(call: Call) -> Iterable[Edge]:
    dim = call.argument("dim") % len(call.out_shape)
    for number, item in enumerate(call.args[0]):
        if call.is_active(item):
            yield single(call, item, [select_term(call.out_shape, dim, number, call.workspace).transpose()])


def _block_diag(call: Call) -> Iterable[Edge]:
    row = column = 0
    for item in call.args[0]:
        shape = call.shape(item)
        wide = (1,) * (2 - len(shape)) + shape
        if call.is_active(item):
            axes, out = new_axes(wide), new_axes(call.out_shape)
            starts = enumerate((row, column))
            relations = tuple(affine_onehot(axes[d], out[d], start, 1, call.workspace) for d, start in starts)
            in_axes = axes[2 - len(shape) :] if shape else ()
            yield single(call, item, [Term(dims_of(out), dims_of(in_axes), (), relations)])
        row, column = row + wide[0], column + wide[1]


# Padding.


def _padded_term(shape: Sequence[int], pads: Sequence[int], space: IndexSpace) -> Term:
    """``constant_pad_nd``: ``pads`` holds (before, after) from the last dimension on; negative ones cut."""
    out_axes, in_axes, relations = [], [], []
    for d, size in enumerate(shape):
        k = 2 * (len(shape) - 1 - d)
        before, after = (pads[k], pads[k + 1]) if k < len(pads) else (0, 0)
        axis = Axis(size)
        in_axes.append(axis)
        if before == after == 0:
            out_axes.append(axis)
            continue
        out = Axis(size + before + after)
        out_axes.append(out)
        if before >= 0 and after >= 0:
            relations.append(affine_onehot(axis, out, before, 1, space))
        elif before <= 0 and after <= 0:
            relations.append(affine_onehot(out, axis, -before, 1, space))
        else:
            positions = [i + before if 0 <= i + before < out.size else -1 for i in range(size)]
            relations.append(_listed(axis, out, positions, space.device))
    return Term(dims_of(out_axes), dims_of(in_axes), (), tuple(relations))


def _constant_pad(call: Call) -> Term:
    return _padded_term(call.shape(call.args[0]), call.argument("pad"), call.workspace)


def _reflected(position: int, size: int) -> int:
    position = abs(position)
    return 2 * (size - 1) - position if position >= size else position


def _replicated(position: int, size: int) -> int:
    return min(max(position, 0), size - 1)


def edge_padded(shape: Sequence[int], pads: Sequence[int], place: Callable[[int, int], int], device: torch.device) -> Term:
    """A padding that repeats elements: output position ``o`` reads input position ``place(o - before, size)``."""
    out_axes, in_axes, relations = [], [], []
    for d, size in enumerate(shape):
        k = 2 * (len(shape) - 1 - d)
        before, after = (pads[k], pads[k + 1]) if k < len(pads) else (0, 0)
        axis = Axis(size)
        in_axes.append(axis)
        if before == after == 0:
            out_axes.append(axis)
            continue
        out = Axis(size + before + after)
        out_axes.append(out)
        relations.append(_listed(out, axis, [place(o - before, size) for o in range(out.size)], device))
    return Term(dims_of(out_axes), dims_of(in_axes), (), tuple(relations))


def _edge_padding(place: Callable[[int, int], int]) -> Rule:
    def term(call: Call) -> Term:
        return edge_padded(call.shape(call.args[0]), call.argument("padding"), place, call.workspace.device)

    return view(term, family="selection")


def _edge_padding_backward(place: Callable[[int, int], int]) -> Rule:
    def term(call: Call) -> Term:
        return edge_padded(call.out_shape, call.argument("padding"), place, call.workspace.device).transpose()

    return view(term, family="selection")


# Windows of images.


def _patches(shape: Sequence[int], call: Call) -> Term:
    """``im2col`` of an image tensor of ``shape`` (batch dimensions, channels, height, width)."""
    device = call.workspace.device
    kernel, dilation, padding, stride = (call.argument(n) for n in ("kernel_size", "dilation", "padding", "stride"))
    axes = new_axes(shape)
    taps, places, relations = [], [], []
    for k in range(2):
        size = shape[len(shape) - 2 + k]
        count = (size + 2 * padding[k] - dilation[k] * (kernel[k] - 1) - 1) // stride[k] + 1
        tap, place = Axis(kernel[k]), Axis(count)
        taps.append(tap)
        places.append(place)

        def positions(d: torch.device, k: int = k, count: int = count, size: int = size) -> torch.Tensor:
            at = torch.arange(kernel[k], device=d).unsqueeze(1) * dilation[k] + torch.arange(count, device=d) * stride[k]
            return torch.where((at >= padding[k]) & (at < padding[k] + size), at - padding[k], -1)

        index = constant_index((kernel[k], count), positions, device)
        relations.append(OneHot(index, (tap, place), axes[len(shape) - 2 + k], True))
    channel = axes[len(shape) - 3]
    out_dims = (*dims_of(axes[: len(shape) - 3]), (channel, *taps), tuple(places))
    return Term(out_dims, dims_of(axes), (), tuple(relations))


def _im2col(call: Call) -> Term:
    return _patches(call.shape(call.args[0]), call)


def _col2im(call: Call) -> Term:
    return _patches(call.out_shape, call).transpose()


# Masks and sums along diagonals.


def weights(call: Call, make: Callable[[torch.device, torch.dtype], torch.Tensor], axes: Sequence[Axis]) -> Factor:
    """A dense factor that is the same in every run (a mask)."""
    dtype = call.workspace.dtype

    node = constant_index((a.size for a in axes), lambda d: make(d, dtype), call.workspace.device)
    return Factor(selecting(node), tuple(axes))


def _triangle(cut: Callable[..., torch.Tensor]) -> Callable[[Call], Term]:
    def term(call: Call) -> Term:
        shape, offset = call.shape(call.args[0]), call.argument("diagonal")
        axes = new_axes(shape)
        mask = weights(call, lambda d, t: cut(torch.ones(shape[-2:], dtype=t, device=d), offset), axes[-2:])
        return diagonal_term(shape, axes, [mask])

    return term


def _trace(call: Call) -> Term:
    view_term = diagonal_view(call.shape(call.args[0]), 0, 0, 1, call.workspace)
    return Term((), view_term.in_dims, (), view_term.onehots)


def _diag_embed(call: Call) -> Term:
    offset, one, two = (call.argument(name) for name in ("offset", "dim1", "dim2"))
    return diagonal_view(call.out_shape, offset, one, two, call.workspace).transpose()


# Transposes of views, as torch's backward formulas use them.


def _select_backward(call: Call) -> Term:
    dim = call.argument("dim") % len(call.out_shape)
    return select_term(call.out_shape, dim, call.argument("index") % call.out_shape[dim], call.workspace).transpose()


def _slice_backward(call: Call) -> Term:
    dim = call.argument("dim") % len(call.out_shape)
    spec = sliced(call, call.out_shape, call.shape(call.args[0])[dim])
    return slice_term(call.out_shape, *spec, call.workspace).transpose()


def _diagonal_backward(call: Call) -> Term:
    offset, one, two = (call.argument(name) for name in ("offset", "dim1", "dim2"))
    return diagonal_view(call.out_shape, offset, one, two, call.workspace).transpose()


def _unfold_backward(call: Call) -> Term:
    dim, size, step = (call.argument(name) for name in ("dim", "size", "step"))
    return unfold_view(call.out_shape, dim, size, step, call.workspace.device).transpose()


# Writes into a view: the first argument outside the view, the second inside.


def written(mask: Callable[[Call, tuple[Axis, ...]], Factor], inside: Callable[[Call], Term], reads: bool = False) -> Rule:
    """An op ``(self, src, ...)`` that gives ``self`` with a part replaced by ``src``.

    Args:
        mask: zero on the replaced part, one elsewhere, over some of the output's axes.
        inside: the term that takes ``src`` to its places.
        reads: whether they read values of the tape.
    """

    def linearize(call: Call) -> Iterable[Edge]:
        base, source = call.args[:2]
        if call.is_active(base):
            axes = new_axes(call.out_shape)
            yield single(call, base, [diagonal_term(call.shape(base), axes, [mask(call, axes)])])
        if call.is_active(source):
            yield single(call, source, [inside(call)])

    return Rule("selection", linearize, reads=reads)


def _outside_select(call: Call, axes: tuple[Axis, ...]) -> Factor:
    dim = call.argument("dim") % len(axes)
    size, index = axes[dim].size, call.argument("index")
    return weights(call, lambda d, t: torch.ones(size, dtype=t, device=d).index_fill(
        0, torch.full((1,), index % size, device=d), 0.0), [axes[dim]])


def _outside_slice(call: Call, axes: tuple[Axis, ...]) -> Factor:
    dim, start, step, length = sliced(call, call.out_shape, call.shape(call.args[1])[call.argument("dim") % len(axes)])
    size = axes[dim].size
    return weights(call, lambda d, t: torch.ones(size, dtype=t, device=d).index_fill(
        0, start + step * torch.arange(length, device=d), 0.0), [axes[dim]])


def _outside_diagonal(call: Call, axes: tuple[Axis, ...]) -> Factor:
    offset, one, two = (call.argument(name) for name in ("offset", "dim1", "dim2"))
    pair = [axes[one % len(axes)], axes[two % len(axes)]]

    def make(d: torch.device, t: torch.dtype) -> torch.Tensor:
        length = call.shape(call.args[1])[-1]
        return torch.diagonal_scatter(torch.ones([a.size for a in pair], dtype=t, device=d),
                                      torch.zeros(length, dtype=t, device=d), offset)

    return weights(call, make, pair)


def _outside_strided(call: Call, axes: tuple[Axis, ...]) -> Factor:
    size, stride, offset = (call.argument(name) for name in ("size", "stride", "storage_offset"))
    base = call.args[0]
    total = math.prod(call.out_shape)

    def formula(program: Program) -> Staged:
        flat = torch.reshape(program.call(strided_index, call.stage(program, base), size, stride, offset), (-1,))
        ones = program.call(torch.ones, total + 1, dtype=call.workspace.dtype, device=call.workspace.device)
        kept = torch.index_fill(ones, 0, torch.where(flat < 0, total, flat), 0.0)
        return torch.reshape(torch.narrow(kept, 0, 0, total), call.out_shape)

    return Factor(selecting(formula_node(call, call.out_shape, formula)), axes)


def _select_scatter(call: Call) -> Term:
    return _select_backward(call)


def _slice_scatter(call: Call) -> Term:
    dim = call.argument("dim") % len(call.out_shape)
    spec = sliced(call, call.out_shape, call.shape(call.args[1])[dim])
    return slice_term(call.out_shape, *spec, call.workspace).transpose()


def _filled(call: Call) -> Iterable[Edge]:
    value = call.args[1]
    if call.is_active(value):
        axes = new_axes(call.out_shape)
        yield single(call, value, [Term(dims_of(axes), broadcast_axes(call.shape(value), axes))])


def _unsupported(call: Call) -> Iterable[Edge]:
    raise RuntimeError(
        f"chainrule: {call.op} gives a tensor new memory or a new size; a tensor that depends on the inputs cannot be "
        "resized in place. Make a new tensor instead (torch.cat, torch.nn.functional.pad, slicing, clone)."
    )


_UNSUPPORTED = Rule("unsupported", _unsupported, reads=False)

RULES: dict[Any, Rule] = {
    aten.flip.default: view(_flip),
    aten.rot90.default: view(_rot90),
    aten.roll.default: view(_roll, family="selection"),
    aten.repeat.default: view(_repeat),
    aten.pixel_shuffle.default: view(_pixel_shuffle),
    aten.pixel_unshuffle.default: view(_pixel_unshuffle),
    aten.channel_shuffle.default: view(_channel_shuffle),
    aten.native_channel_shuffle.default: view(_channel_shuffle),
    aten.cat.default: Rule("selection", _cat, reads=False),
    aten.stack.default: Rule("selection", _stack, reads=False),
    aten.block_diag.default: Rule("selection", _block_diag, reads=False),
    aten.constant_pad_nd.default: view(_constant_pad, family="selection"),
    aten.reflection_pad1d.default: _edge_padding(_reflected),
    aten.reflection_pad2d.default: _edge_padding(_reflected),
    aten.reflection_pad3d.default: _edge_padding(_reflected),
    aten.replication_pad1d.default: _edge_padding(_replicated),
    aten.replication_pad2d.default: _edge_padding(_replicated),
    aten.replication_pad3d.default: _edge_padding(_replicated),
    aten.reflection_pad1d_backward.default: _edge_padding_backward(_reflected),
    aten.reflection_pad2d_backward.default: _edge_padding_backward(_reflected),
    aten.reflection_pad3d_backward.default: _edge_padding_backward(_reflected),
    aten.replication_pad1d_backward.default: _edge_padding_backward(_replicated),
    aten.replication_pad2d_backward.default: _edge_padding_backward(_replicated),
    aten.replication_pad3d_backward.default: _edge_padding_backward(_replicated),
    aten.im2col.default: view(_im2col, family="selection"),
    aten.col2im.default: view(_col2im, family="selection"),
    aten.tril.default: view(_triangle(torch.tril), family="selection"),
    aten.triu.default: view(_triangle(torch.triu), family="selection"),
    aten.trace.default: view(_trace, family="reduction"),
    aten.diag_embed.default: view(_diag_embed),
    aten.select_backward.default: view(_select_backward),
    aten.slice_backward.default: view(_slice_backward),
    aten.diagonal_backward.default: view(_diagonal_backward),
    aten.unfold_backward.default: view(_unfold_backward),
    aten.select_scatter.default: written(_outside_select, _select_scatter),
    aten.slice_scatter.default: written(_outside_slice, _slice_scatter),
    aten.diagonal_scatter.default: written(_outside_diagonal, _diagonal_backward),
    aten.as_strided_scatter.default: written(
        _outside_strided, lambda call: strided_view(call, call.args[0]).transpose(), reads=True
    ),
    aten.fill.Scalar: Rule("constant", lambda call: (), reads=False),
    aten.fill.Tensor: Rule("view", _filled, reads=False),
    aten.zero.default: Rule("constant", lambda call: (), reads=False),
    aten.resize.default: _UNSUPPORTED,
    aten.set.source_Tensor: _UNSUPPORTED,
    aten.set.source_Storage: _UNSUPPORTED,
}

__all__ = ["RULES", "diagonal_relations", "edge_padded", "fixed_index", "weights", "written"]
