"""Views: their Jacobians hold no dense factor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from chainrule.maps.nodes import Node, masking
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
    fixed_index,
    new_axes,
)
from chainrule.rules.base import Call, Edge, Rule, broadcast_axes, single
from chainrule.rules.families import reshape_term, slice_term, view

aten = torch.ops.aten


def _reshape(call: Call) -> Term:
    return reshape_term(call.shape(call.args[0]), call.out_shape, call.workspace.device)


def _permuted(call: Call, order: Sequence[int]) -> Term:
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


def select_term(shape: Sequence[int], dim: int, index: int, space: IndexSpace) -> Term:
    """The term of a selection of one position along one dimension."""
    axes = new_axes(shape)
    out = [axis for d, axis in enumerate(axes) if d != dim]
    if shape[dim] == 1:  # nothing is left out
        return Term(dims_of(out), dims_of(axes))
    return Term(dims_of(out), dims_of(axes), (), (fixed_index(axes[dim], index, space),))


def _select(call: Call) -> Term:
    shape = call.shape(call.args[0])
    dim = call.argument("dim") % len(shape)
    return select_term(shape, dim, call.argument("index") % shape[dim], call.workspace)


def sliced(call: Call, shape: Sequence[int], length: int) -> tuple[int, int, int, int]:
    """``(dim, start, step, length)`` of a slice of a tensor of ``shape`` from the arguments of a slicing op."""
    dim = call.argument("dim") % len(shape)
    start, _, step = slice(call.argument("start"), call.argument("end"), call.argument("step")).indices(shape[dim])
    return dim, start, step, length


def _slice(call: Call) -> Term:
    shape = call.shape(call.args[0])
    dim = call.argument("dim") % len(shape)
    return slice_term(shape, *sliced(call, shape, call.out_shape[dim]), call.workspace)


def diagonal_relations(
    source: Axis, first: Axis, second: Axis, offset: int, space: IndexSpace
) -> tuple[OneHot, OneHot]:
    """The relations of a diagonal: position ``k`` is row ``k - min(offset, 0)`` and column ``k + max(offset, 0)``."""
    return (
        affine_onehot(source, first, max(-offset, 0), 1, space),
        affine_onehot(source, second, max(offset, 0), 1, space),
    )


def diagonal_view(shape: Sequence[int], offset: int, dim1: int, dim2: int, space: IndexSpace) -> Term:
    """The term of ``torch.diagonal`` of a tensor of ``shape``."""
    axes = new_axes(shape)
    one, two = dim1 % len(axes), dim2 % len(axes)
    rows, columns = shape[one] + min(offset, 0), shape[two] - max(offset, 0)
    source = Axis(max(min(rows, columns), 0))
    out = [axis for d, axis in enumerate(axes) if d not in (one, two)]
    relations = diagonal_relations(source, axes[one], axes[two], offset, space)
    return Term(dims_of([*out, source]), dims_of(axes), (), relations)


def _diagonal(call: Call) -> Term:
    offset, one, two = (call.argument(name) for name in ("offset", "dim1", "dim2"))
    return diagonal_view(call.shape(call.args[0]), offset, one, two, call.workspace)


def unfold_view(shape: Sequence[int], dim: int, size: int, step: int, device: torch.device) -> Term:
    """The term of ``Tensor.unfold`` of a tensor of ``shape``."""
    if not shape:
        return Term(((Axis(size),),), ())
    axes = new_axes(shape)
    dim %= len(shape)
    window, offset = Axis((shape[dim] - size) // step + 1), Axis(size)
    index = constant_index(
        (window.size, size),
        lambda d: torch.arange(window.size, device=d).unsqueeze(1) * step + torch.arange(size, device=d),
        device,
    )
    out = (*axes[:dim], window, *axes[dim + 1 :], offset)
    return Term(dims_of(out), dims_of(axes), (), (OneHot(index, (window, offset), axes[dim]),))


def _unfold(call: Call) -> Term:
    dim, size, step = (call.argument(name) for name in ("dimension", "size", "step"))
    return unfold_view(call.shape(call.args[0]), dim, size, step, call.workspace.device)


def index_digit(flat: Node, stride: int, size: int) -> Node:
    """One digit of a flat row-major index in a mixed-radix number; a negative index stays negative."""

    def compute(program: Program, value: Staged) -> Staged:
        digit = torch.remainder(torch.div(value, max(stride, 1), rounding_mode="floor"), max(size, 1))
        return torch.where(value < 0, value, digit)

    return Node(flat.sizes, (flat,), compute, label="index digit")


def flat_relations(flat: Node, sources: tuple[Axis, ...], targets: Sequence[Axis], partial: bool) -> tuple[OneHot, ...]:
    """The relations that tie ``targets`` to the digits of a flat index over ``sources``."""
    relations = []
    stride = 1
    for target in reversed(targets):
        relations.append(OneHot(index_digit(flat, stride, target.size), sources, target, partial))
        stride *= target.size
    return tuple(relations[::-1])


def strided_index(
    value: torch.Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None
) -> torch.Tensor:
    """For each element of ``as_strided(value, ...)``: the flat position in ``value`` of what it reads, -1 for none."""
    own = value.storage_offset()
    start = own if storage_offset is None else storage_offset
    reach = [first + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
             for first, shape, strides in ((own, value.shape, value.stride()), (start, size, stride))]
    memory = torch.full((max(reach) + 1,), -1, dtype=torch.long, device=value.device)
    positions = torch.arange(value.numel(), device=value.device).reshape(value.shape)
    memory.as_strided(value.shape, value.stride(), own).copy_(positions)
    return memory.as_strided(size, stride, start).clone()


def strided_view(call: Call, item: Any) -> Term:
    """The term of ``as_strided`` of the tensor ``item``: the relation depends on its strides, read when the plan runs."""
    in_axes = new_axes(call.shape(item))
    size, stride, offset = (call.argument(name) for name in ("size", "stride", "storage_offset"))
    out_axes = new_axes(size)
    flat = Node(
        size, (), lambda program: program.call(strided_index, call.stage(program, item), size, stride, offset), label="index"
    )
    factors: tuple[Factor, ...] = ()
    if not in_axes:  # no relation leaves out what reads memory around
        dtype = call.workspace.dtype
        own = Node(size, (flat,), lambda program, index: torch.ge(index, 0).to(dtype), flops=1, label="mask")
        factors = (Factor(masking(own), out_axes),)
    return Term(dims_of(out_axes), dims_of(in_axes), factors, flat_relations(flat, out_axes, in_axes, True))


def _as_strided(call: Call) -> Term:
    return strided_view(call, call.args[0])


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
        yield single(call, item, [slice_term(shape, dim, start, 1, length, call.workspace)], (), number)
        start += length


def _unbind(call: Call) -> Iterable[Edge]:
    item = call.args[0]
    if not call.is_active(item):
        return
    shape = call.shape(item)
    dim = call.argument("dim") % len(shape)
    for number in range(len(call.outputs)):
        yield single(call, item, [select_term(shape, dim, number, call.workspace)], (), number)


_RESHAPE, _PERMUTE, _TRANSPOSE, _T = view(_reshape), view(_permute), view(_transpose), view(_t)
_EXPAND, _SELECT, _SLICE, _DIAGONAL = view(_expand), view(_select), view(_slice), view(_diagonal)
_UNFOLD, _AS_STRIDED = view(_unfold), view(_as_strided, reads=True)
_PIECES, _UNBIND = Rule("view", _pieces, reads=False), Rule("view", _unbind, reads=False)

RULES: dict[Any, Rule] = {
    aten.view.default: _RESHAPE,
    aten.view_copy.default: _RESHAPE,
    aten._unsafe_view.default: _RESHAPE,
    aten.reshape.default: _RESHAPE,
    aten._reshape_alias.default: _RESHAPE,
    aten._reshape_alias_copy.default: _RESHAPE,
    aten._reshape_copy.default: _RESHAPE,
    aten.squeeze.default: _RESHAPE,
    aten.squeeze.dim: _RESHAPE,
    aten.squeeze.dims: _RESHAPE,
    aten.squeeze_copy.default: _RESHAPE,
    aten.squeeze_copy.dim: _RESHAPE,
    aten.squeeze_copy.dims: _RESHAPE,
    aten.unsqueeze.default: _RESHAPE,
    aten.unsqueeze_copy.default: _RESHAPE,
    aten.alias_copy.default: _RESHAPE,
    aten.lift.default: _RESHAPE,
    aten.permute.default: _PERMUTE,
    aten.permute_copy.default: _PERMUTE,
    aten.transpose.int: _TRANSPOSE,
    aten.transpose_copy.int: _TRANSPOSE,
    aten.t.default: _T,
    aten.t_copy.default: _T,
    aten.expand.default: _EXPAND,
    aten.expand_copy.default: _EXPAND,
    aten.select.int: _SELECT,
    aten.select_copy.int: _SELECT,
    aten.slice.Tensor: _SLICE,
    aten.slice_copy.Tensor: _SLICE,
    aten.diagonal.default: _DIAGONAL,
    aten.diagonal_copy.default: _DIAGONAL,
    aten.unfold.default: _UNFOLD,
    aten.unfold_copy.default: _UNFOLD,
    aten.as_strided.default: _AS_STRIDED,
    aten.as_strided_copy.default: _AS_STRIDED,
    aten.split.Tensor: _PIECES,
    aten.split_copy.Tensor: _PIECES,
    aten.unsafe_split.Tensor: _PIECES,
    aten.split_with_sizes.default: _PIECES,
    aten.split_with_sizes_copy.default: _PIECES,
    aten.unsafe_split_with_sizes.default: _PIECES,
    aten.unbind.int: _UNBIND,
    aten.unbind_copy.int: _UNBIND,
}
