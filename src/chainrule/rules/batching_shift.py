"""Batching of ops that name dimensions: views, reductions, scans, sorts. The dimensions move by one."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chainrule.rules.batching_base import (
    Batched,
    BatchStrategy,
    bind,
    is_batched,
    logical_rank,
    mark,
    pad_rank,
    physical,
    stand_for_views,
    wrap_dim,
)

aten = torch.ops.aten

_DIM_NAMES = frozenset({"dim", "dims", "dim0", "dim1", "dim2", "dimension", "axis", "axis0", "axis1"})


class ShiftPlan:
    """Which arguments of an op are dimensions, from its schema.

    Attributes:
        names: the names of all arguments, by position.
        dims: names of arguments that are a dimension or a list of them, with their defaults.
        tensors: names of tensor arguments.
        places: where those dimensions stand among the arguments.
        keepdim: whether the op has a `keepdim` argument.

    """

    __slots__ = ("dims", "keyword", "names", "places", "tensors")

    def __init__(self, func: Any) -> None:
        arguments = func._schema.arguments
        self.names = [argument.name for argument in arguments]
        self.keyword = {argument.name for argument in arguments if argument.kwarg_only}
        self.dims = {a.name: a.default_value for a in arguments if a.name in _DIM_NAMES}
        self.tensors = [a.name for a in arguments if "Tensor" in str(a.type)]
        self.places = [self.names.index(name) for name in self.dims]


@functools.cache
def plan_of(func: Any) -> ShiftPlan:
    """The plan of an op."""
    return ShiftPlan(func)


def _shifted(dims: Any, rank: int) -> Any:
    if isinstance(dims, (list, tuple)):
        return [wrap_dim(dim, rank) + 1 for dim in dims]
    return wrap_dim(dims, rank) + 1


def shift_dims(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """Run an op on tensors of one rank, its dimension arguments moved past the batch.

    Every tensor argument gets the batch. A scalar is run as a vector of one element.
    """
    plan = plan_of(func)
    values = dict(zip(plan.names, args, strict=False))
    values.update(kwargs)
    rank = -1
    for name in plan.tensors:
        value = values.get(name)
        if value.__class__ is Batched or isinstance(value, Tensor):
            rank = max(rank, logical_rank(value))
            values[name] = physical(value, size)
    for name, default in plan.dims.items():
        dims = values.get(name, default)
        if dims is not None:
            values[name] = _shifted(dims, rank)
    if rank <= 1:
        scalars = [n for n in plan.tensors if isinstance(values.get(n), Tensor) and values[n].dim() == 1]
        for name in scalars:
            values[name] = values[name].unsqueeze(1)
        if plan.tensors[0] in scalars:
            return map_results(lambda t: Batched(t.reshape(size)), _call(func, plan, values))
    return mark(_call(func, plan, values))


def _call(func: Any, plan: ShiftPlan, values: dict[str, Any]) -> Any:
    args = []
    for name in plan.names:
        if name not in values or name in plan.keyword:
            break
        args.append(values.pop(name))
    return func(*args, **values)


def map_results(function: Any, result: Any) -> Any:
    """`function` on every tensor of a result."""
    if isinstance(result, Tensor):
        return function(result)
    if isinstance(result, (list, tuple)):
        return tuple(map_results(function, item) for item in result)
    return result


def shift_view(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """A view of one tensor by dimensions."""
    source = args[0]
    rank = source.rank
    plan = plan_of(func)
    if not kwargs and plan.places[-1] < len(args):
        given = [source.value, *args[1:]]
        for place in plan.places:
            given[place] = _shifted(given[place], rank)
        return mark(func(*given))
    values = dict(zip(plan.names, args, strict=False))
    values.update(kwargs)
    values[plan.names[0]] = source.value
    for name, default in plan.dims.items():
        values[name] = _shifted(values.get(name, default), rank)
    return mark(_call(func, plan, values))


def diag_embed(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """diag_embed: its dimensions are those of the result."""
    values = bind(func, args, kwargs)
    rank = args[0].rank + 1
    dims = [wrap_dim(values.get(name, default), rank) + 1 for name, default in (("dim1", -2), ("dim2", -1))]
    return Batched(func(args[0].value, values.get("offset", 0), *dims))


# --- views whose arguments are not just dimensions ---------------------------------------------------------------


def identity_view(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """detach, alias, _conj: the op on the stored tensor."""
    return Batched(func(args[0].value, *args[1:], **kwargs))


def conjugate(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """_conj, at once: the wrapper could not show the lazy bit of the stored tensor."""
    return Batched(stand_for_views(aten.conj_physical.default(args[0].value)))


def negate(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """_neg_view, at once."""
    return Batched(stand_for_views(aten.neg.default(args[0].value)))


def select(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """select.int."""
    source, dim, index = args
    if source.rank == 0:
        raise IndexError("select() cannot be applied to a 0-dim tensor.")
    return Batched(source.value.select(wrap_dim(dim, source.rank) + 1, index))


def unsqueeze(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """unsqueeze: the new dimension counts in the range."""
    source, dim = args
    return Batched(source.value.unsqueeze(wrap_dim(dim, source.rank + 1) + 1))


def squeeze(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """squeeze, squeeze.dim, squeeze.dims."""
    source = args[0]
    shape = source.shape
    rank = len(shape)
    if len(args) == 1:
        dims = [dim for dim in range(rank) if shape[dim] == 1]
    else:
        given = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
        dims = [wrap_dim(dim, rank) for dim in given]
    if rank == 0:
        dims = []
    return Batched(aten.squeeze.dims(source.value, [dim + 1 for dim in dims]))


def transpose(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """transpose.int and t."""
    source = args[0]
    rank = source.rank
    first, second = (args[1], args[2]) if len(args) == 3 else (0, 1)
    if len(args) == 1 and rank > 2:
        raise RuntimeError(f"t() expects a tensor with <= 2 dimensions, but self is {rank}D")
    if rank == 0 or (rank == 1 and len(args) == 1):
        return Batched(aten.alias.default(source.value))
    return Batched(source.value.transpose(wrap_dim(first, rank) + 1, wrap_dim(second, rank) + 1))


def permute(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """Permute."""
    source, dims = args
    return Batched(source.value.permute(0, *[wrap_dim(dim, source.rank) + 1 for dim in dims]))


def resolve_size(shape: Sequence[int], numel: int) -> list[int]:
    """`shape` with a -1 replaced, so that an empty batch does not make it ambiguous."""
    if -1 not in shape:
        return list(shape)
    known = math.prod(length for length in shape if length != -1)
    if known == 0:
        if numel == 0:
            raise RuntimeError(
                f"cannot reshape tensor of 0 elements into shape {list(shape)} because the unspecified dimension "
                "size -1 can be any value and is ambiguous"
            )
        known = 1
    return [numel // known if length == -1 else length for length in shape]


def view(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """view, reshape, _unsafe_view: the size gets the batch."""
    source, shape = args[0], args[1]
    shape = resolve_size(shape, source.shape.numel())
    if math.prod(shape) != source.shape.numel():
        raise RuntimeError(f"shape '{list(shape)}' is invalid for input of size {source.shape.numel()}")
    value = source.value
    if func is aten._unsafe_view.default:
        return Batched(func(value, [size, *shape]))
    return Batched(value.reshape([size, *shape]) if func is aten.reshape.default else value.view([size, *shape]))


def reshape_alias(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """_reshape_alias: the strides are those of one sample; a view of the stored tensor has them too."""
    return Batched(args[0].value.view([size, *args[1]]))


def view_dtype(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """view.dtype: reinterprets the last dimension, which must not be the batch."""
    source, dtype = args
    if source.rank == 0:
        if dtype.itemsize != source.value.dtype.itemsize:
            raise RuntimeError("self.dim() cannot be 0 to view to a dtype of different element size")
        return Batched(func(source.value, dtype))
    return Batched(func(source.value, dtype))


def expand(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """Expand."""
    source, shape = args[0], args[1]
    if len(shape) < source.rank:
        raise RuntimeError(
            f"expand({list(source.shape)}, size={list(shape)}): the number of sizes provided ({len(shape)}) must be "
            f"greater or equal to the number of dimensions in the tensor ({source.rank})"
        )
    return Batched(func(pad_rank(source, len(shape)), [size, *shape], **kwargs))


def as_strided(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """as_strided: sizes and strides of one sample, with the batch's own stride in front."""
    bound = bind(func, args, kwargs)
    value = bound["self"].value
    offset = value.storage_offset() if bound["storage_offset"] is None else bound["storage_offset"]
    return Batched(func(value, [size, *bound["size"]], [value.stride(0) if size else 1, *bound["stride"]], offset))


def split(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """split, split_with_sizes, chunk, unbind."""
    source = args[0]
    if source.rank == 0:
        raise RuntimeError(f"{func} expects at least a 1-dimensional tensor")
    bound = bind(func, args, kwargs)
    names = list(bound)
    dim = wrap_dim(bound["dim"], source.rank) + 1
    middle = [bound[name] for name in names[1:-1]]
    return mark(func(source.value, *middle, dim))


# --- rearrangements -----------------------------------------------------------------------------------------------


def roll(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """roll: no dims means the flattened sample."""
    bound = bind(func, args, kwargs)
    source = bound["self"]
    if bound["dims"]:
        dims = _shifted(bound["dims"], source.rank)
        return Batched(
            func(source.value if source.rank else source.value.unsqueeze(1), bound["shifts"], dims).reshape_as(
                source.value
            )
        )
    flat = source.value.reshape(size, source.shape.numel())
    return Batched(func(flat, bound["shifts"], [1]).reshape(source.value.shape))


def repeat(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """Repeat and tile."""
    source, repeats = args
    if len(repeats) < source.rank:
        raise RuntimeError("Number of dimensions of repeat dims can not be smaller than number of dimensions of tensor")
    return Batched(func(pad_rank(source, len(repeats)), [1, *repeats]))


def cat(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """cat: a legacy empty vector is skipped, as ATen does."""
    bound = bind(func, args, kwargs)
    tensors = bound["tensors"]
    rank = max(logical_rank(x) for x in tensors)
    kept = [x for x in tensors if not (rank > 1 and logical_rank(x) == 1 and _length(x) == 0)]
    return Batched(func([physical(x, size) for x in kept], wrap_dim(bound["dim"], rank) + 1))


def _length(x: Any) -> int:
    shape = x.shape
    return int(shape[0])


def stack(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """Stack."""
    bound = bind(func, args, kwargs)
    rank = logical_rank(bound["tensors"][0])
    return Batched(func([physical(x, size) for x in bound["tensors"]], wrap_dim(bound["dim"], rank + 1) + 1))


def slice_or_select_backward(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """Backwards of views: `(grad, input_sizes, dims…)`; the dimensions count in `input_sizes`."""
    bound = bind(func, args, kwargs)
    shape = list(bound.pop("input_sizes"))
    grad = bound.pop("grad_output")
    for name in bound.keys() & _DIM_NAMES:
        bound[name] = wrap_dim(bound[name], len(shape)) + 1
    return Batched(func(physical(grad, size), [size, *shape], **bound))


def unfold_backward(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """unfold_backward."""
    grad, shape, dim, length, step = args
    if not shape:
        return NotImplemented
    return Batched(func(grad.value, [size, *shape], wrap_dim(dim, len(shape)) + 1, length, step))


def scatter_view(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """select_scatter, slice_scatter, diagonal_scatter: `src` stands in a view of `self`."""
    bound = bind(func, args, kwargs)
    source, inserted = bound.pop("self"), bound.pop("src")
    for name in bound.keys() & _DIM_NAMES:
        bound[name] = wrap_dim(bound[name], logical_rank(source)) + 1
    return Batched(func(physical(source, size), physical(inserted, size), **bound))


def trailing(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """An op on the last dimensions of one tensor, with any number of dimensions before."""
    return mark(func(args[0].value, *args[1:], **kwargs))


def repeat_interleave(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """repeat_interleave.self_int; with a tensor of repeats only when the repeats are not batched."""
    bound = bind(func, args, kwargs)
    source = bound["self"]
    if is_batched(bound["repeats"]) or not is_batched(source):
        return NotImplemented
    value, dim = source.value, bound["dim"]
    if dim is None or source.rank == 0:
        value, dim = value.reshape(size, source.shape.numel()), 0
    shifted = wrap_dim(dim, value.dim() - 1) + 1
    return Batched(func(value, bound["repeats"], shifted, output_size=bound["output_size"]))


def unfold(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """unfold: a scalar has one window."""
    source, dim, length, step = args
    if source.rank:
        return Batched(source.value.unfold(wrap_dim(dim, source.rank) + 1, length, step))
    return Batched(source.value.unsqueeze(1).unfold(1, length, step).squeeze(1))


def as_strided_scatter(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """as_strided_scatter, sample by sample: on copies in which each has its strides and its own storage."""
    bound = bind(func, args, kwargs)
    value, inserted = physical(bound["self"], size), physical(bound["src"], size)
    offset = 0 if bound["storage_offset"] is None else bound["storage_offset"] - value.storage_offset()
    results = [
        func(value.select(0, sample).clone(), inserted.select(0, sample), bound["size"], bound["stride"], offset)
        for sample in range(size)
    ]
    return Batched(torch.stack(results)) if results else Batched(value.clone())


def trilinear(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """_trilinear: a product of three tensors over named dimensions, then a sum."""
    bound = bind(func, args, kwargs)
    values = [physical(bound[name], size) for name in ("i1", "i2", "i3")]
    dims = [[dim + 1 for dim in bound[name]] for name in ("expand1", "expand2", "expand3", "sumdim")]
    return Batched(func(*values, *dims, bound["unroll_dim"] + 1))


def resize(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """Resize to the same number of elements is a reshape; any other needs storage that the sample has not."""
    source, shape = args[0], args[1]
    if math.prod(shape) != source.shape.numel():
        raise RuntimeError(
            f"vmap: resize_ of a batched tensor of shape {list(source.shape)} to {list(shape)} would change its number "
            "of elements; make a new tensor instead"
        )
    return Batched(source.value.reshape([size, *shape]))


VIEWS: dict[Any, BatchStrategy] = {
    aten.detach.default: identity_view,
    aten.alias.default: identity_view,
    aten.lift_fresh.default: identity_view,
    aten.lift_fresh_copy.default: identity_view,
    aten._conj.default: conjugate,
    aten._neg_view.default: negate,
    aten.view_as_real.default: identity_view,
    aten.view_as_complex.default: identity_view,
    aten.view.dtype: view_dtype,
    aten.view.default: view,
    aten.reshape.default: view,
    aten._unsafe_view.default: view,
    aten.view_copy.default: view,
    aten._reshape_alias.default: reshape_alias,
    aten.as_strided.default: as_strided,
    aten.expand.default: expand,
    aten.expand_copy.default: expand,
    aten.permute.default: permute,
    aten.transpose.int: transpose,
    aten.t.default: transpose,
    aten.select.int: select,
    aten.slice.Tensor: shift_view,
    aten.squeeze.default: squeeze,
    aten.squeeze.dim: squeeze,
    aten.squeeze.dims: squeeze,
    aten.unsqueeze.default: unsqueeze,
    aten.diagonal.default: shift_view,
    aten.diag_embed.default: diag_embed,
    aten.unfold.default: unfold,
    aten.split.Tensor: split,
    aten.split_with_sizes.default: split,
    aten.unsafe_split.Tensor: split,
    aten.unsafe_split_with_sizes.default: split,
    aten.unsafe_chunk.default: split,
    aten.unbind.int: split,
    aten.flip.default: shift_view,
    aten.roll.default: roll,
    aten.repeat.default: repeat,
    aten.cat.default: cat,
    aten.stack.default: stack,
    aten._stack.default: stack,
    aten.tril.default: trailing,
    aten.triu.default: trailing,
    aten.pixel_shuffle.default: trailing,
    aten.pixel_unshuffle.default: trailing,
    aten.constant_pad_nd.default: trailing,
    aten.repeat_interleave.self_int: repeat_interleave,
    aten.repeat_interleave.self_Tensor: repeat_interleave,
    aten.slice_backward.default: slice_or_select_backward,
    aten.select_backward.default: slice_or_select_backward,
    aten.diagonal_backward.default: slice_or_select_backward,
    aten.unfold_backward.default: unfold_backward,
    aten.select_scatter.default: scatter_view,
    aten.slice_scatter.default: scatter_view,
    aten.diagonal_scatter.default: scatter_view,
    aten.as_strided_scatter.default: as_strided_scatter,
    aten._trilinear.default: trilinear,
    aten.resize.default: resize,
}

# Ops that change the shape of the tensor object itself, and the view that they stand for.
METADATA_INPLACE: dict[Any, Any] = {
    aten.t_.default: aten.t.default,
    aten.transpose_.default: aten.transpose.int,
    aten.unsqueeze_.default: aten.unsqueeze.default,
    aten.squeeze_.default: aten.squeeze.default,
    aten.squeeze_.dim: aten.squeeze.dim,
    aten.squeeze_.dims: aten.squeeze.dims,
    aten.as_strided_.default: aten.as_strided.default,
    aten.resize_.default: aten.resize.default,
}
