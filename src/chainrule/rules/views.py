"""Views and copies that only move elements: their Jacobians hold no dense factor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from chainrule.maps.terms import Axis, Term, affine_onehot, dims_of, new_axes
from chainrule.rules.base import Call, Edge, Rule, broadcast_axes, single
from chainrule.rules.families import reshape_term, slice_term, view

aten = torch.ops.aten


def _reshape(call: Call) -> Term:
    return reshape_term(call.shape(call.args[0]), call.out_shape, call.workspace.device)


def _permuted(call: Call, order: tuple[int, ...]) -> Term:
    axes = new_axes(call.shape(call.args[0]))
    return Term(dims_of([axes[d] for d in order]), dims_of(axes))


def _permute(call: Call) -> Term:
    rank = len(call.shape(call.args[0]))
    return _permuted(call, tuple(d % rank for d in call.argument("dims")))


def _transpose(call: Call) -> Term:
    rank = len(call.shape(call.args[0]))
    order = list(range(rank))
    if rank:
        one, two = call.argument("dim0") % rank, call.argument("dim1") % rank
        order[one], order[two] = order[two], order[one]
    return _permuted(call, tuple(order))


def _t(call: Call) -> Term:
    return _permuted(call, tuple(range(len(call.shape(call.args[0]))))[::-1])


def _expand(call: Call) -> Term:
    axes = new_axes(call.out_shape)
    return Term(dims_of(axes), broadcast_axes(call.shape(call.args[0]), axes))


def _select(call: Call) -> Term:
    shape = call.shape(call.args[0])
    dim = call.argument("dim") % len(shape)
    index = call.argument("index") % shape[dim]
    axes = new_axes(shape)
    source = Axis(1)
    onehot = affine_onehot(source, axes[dim], index, 1, call.workspace.device)
    # The source stands in no dimension of the output: it is a size-one axis beside the others.
    out = [(axis,) for d, axis in enumerate(axes) if d != dim]
    return Term(tuple(out), dims_of(axes), (), (onehot,))


def _slice(call: Call) -> Term:
    shape = call.shape(call.args[0])
    dim = call.argument("dim") % len(shape)
    start, _, step = slice(call.argument("start"), call.argument("end"), call.argument("step")).indices(shape[dim])
    return slice_term(shape, dim, start, step, call.out_shape[dim], call.workspace.device)


def _pieces(call: Call) -> Iterable[Edge]:
    """``split`` and its like: each output is a slice."""
    item = call.args[0]
    if not call.is_active(item):
        return
    shape = call.shape(item)
    dim = call.argument("dim") % len(shape)
    start = 0
    for number, slot in enumerate(call.outputs):
        length = call.shape(slot)[dim]
        yield single(call, item, [slice_term(shape, dim, start, 1, length, call.workspace.device)], (), number)
        start += length


def _unbind(call: Call) -> Iterable[Edge]:
    item = call.args[0]
    if not call.is_active(item):
        return
    shape = call.shape(item)
    dim = call.argument("dim") % len(shape)
    for number in range(len(call.outputs)):
        axes = new_axes(shape)
        onehot = affine_onehot(Axis(1), axes[dim], number, 1, call.workspace.device)
        out = tuple((axis,) for d, axis in enumerate(axes) if d != dim)
        yield single(call, item, [Term(out, dims_of(axes), (), (onehot,))], (), number)


RULES: dict[Any, Rule] = {
    aten.view.default: view(_reshape),
    aten._unsafe_view.default: view(_reshape),
    aten.reshape.default: view(_reshape),
    aten._reshape_alias.default: view(_reshape),
    aten.squeeze.default: view(_reshape),
    aten.squeeze.dim: view(_reshape),
    aten.squeeze.dims: view(_reshape),
    aten.unsqueeze.default: view(_reshape),
    aten.permute.default: view(_permute),
    aten.transpose.int: view(_transpose),
    aten.t.default: view(_t),
    aten.expand.default: view(_expand),
    aten.select.int: view(_select),
    aten.slice.Tensor: view(_slice),
    aten.split.Tensor: Rule("view", _pieces, reads=False),
    aten.split_with_sizes.default: Rule("view", _pieces, reads=False),
    aten.unbind.int: Rule("view", _unbind, reads=False),
}
