"""Batching of reductions, scans, sorts and the ops that gather along a dimension."""

from __future__ import annotations

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
    physical,
    wrap_dim,
)
from chainrule.rules.batching_shift import ShiftPlan, map_results, plan_of, shift_dims, shift_view

aten = torch.ops.aten


def reduce_dims(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """A reduction over a list of dimensions, where None or an empty list means all."""
    plan = plan_of(func)
    if not kwargs and len(args) > 1 and plan.names[1] == "dim" and args[1] and args[1].__class__ is list and args[0].rank:
        rank = args[0].rank
        return mark(func(args[0].value, [wrap_dim(dim, rank) + 1 for dim in args[1]], *args[2:]))
    values = dict(zip(plan.names, args, strict=False))
    values.update(kwargs)
    source = values[plan.names[0]]
    rank = source.rank
    dims = values.get("dim", plan.dims["dim"])
    if isinstance(dims, int):
        dims = [dims]
    if not dims:
        dims = range(rank)
    dims = [wrap_dim(dim, rank) + 1 for dim in dims]
    value = source.value
    if rank == 0:
        values[plan.names[0]] = value.unsqueeze(1)
        values["dim"] = [1]
        return map_results(lambda t: Batched(t.reshape(size)), _call_with_dim(func, plan, values))
    values[plan.names[0]] = value
    values["dim"] = dims
    return mark(_call_with_dim(func, plan, values))


def _call_with_dim(func: Any, plan: ShiftPlan, values: dict[str, Any]) -> Any:
    """The call with `dim` present; arguments before it that were left out get their default."""
    args = []
    for argument in func._schema.arguments:
        if argument.kwarg_only:
            break
        if argument.name not in values and not (set(plan.names[plan.names.index(argument.name) :]) & values.keys()):
            break
        args.append(values.pop(argument.name, argument.default_value))
    return func(*args, **values)


def reduce_all(replacement: Any) -> BatchStrategy:
    """A reduction of everything by an op that reduces one dimension: the sample is flattened."""

    def reduce_flat(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
        value = args[0].value
        result = replacement(value.reshape(size, args[0].shape.numel()), 1, **kwargs)
        return Batched(result if isinstance(result, Tensor) else result[0])

    return reduce_flat


def reduce_all_dims(replacement: Any) -> BatchStrategy:
    """A reduction of everything by an op that takes a list of dimensions."""

    def reduce_every(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
        value = args[0].value
        if value.dim() == 1:
            value = value.unsqueeze(1)
        return Batched(replacement(value, list(range(1, value.dim())), *args[1:], **kwargs))

    return reduce_every


def arg_reduce(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """Argmax and argmin: `dim` None means the flattened sample."""
    bound = bind(func, args, kwargs)
    source = bound["self"]
    if bound["dim"] is not None:
        return shift_dims(func, args, kwargs, size)
    flat = func(source.value.reshape(size, source.shape.numel()), 1)
    if bound["keepdim"]:
        flat = flat.reshape([size] + [1] * source.rank)
    return Batched(flat)


def reduce_median(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """Median and nanmedian of everything."""
    along = aten.median.dim if func is aten.median.default else aten.nanmedian.dim
    return Batched(along(args[0].value.reshape(size, args[0].shape.numel()), 1)[0])


def aminmax(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """aminmax: `dim` None means all."""
    bound = bind(func, args, kwargs)
    if bound["dim"] is not None:
        return shift_dims(func, args, kwargs, size)
    source = bound["self"]
    low, high = func(source.value.reshape(size, source.shape.numel()), dim=1)
    shape = [size] + [1] * source.rank if bound["keepdim"] else [size]
    return Batched(low.reshape(shape)), Batched(high.reshape(shape))


def reduce_batch(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Tensor:
    """_is_all_true and _is_any_true, which code asks before it branches: one answer for all samples, as in torch.func."""
    result: Tensor = func(args[0].value)
    return result


def gather(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """gather: a scalar, as source or as index, counts as a vector of one element."""
    bound = bind(func, args, kwargs)
    source, index = physical(bound["self"], size), physical(bound["index"], size)
    dim = wrap_dim(bound["dim"], source.dim() - 1)
    shape = index.shape
    source = source.unsqueeze(1) if source.dim() == 1 else source
    index = index.unsqueeze(1) if index.dim() == 1 else index
    return Batched(func(source, dim + 1, index, sparse_grad=bound["sparse_grad"]).reshape(shape))


def renorm(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """renorm: the norm of each slice along one dimension, cut to `maxnorm`."""
    source, p, dim, maximum = args
    value = source.value
    dim = wrap_dim(dim, source.rank) + 1
    others = [d for d in range(1, value.dim()) if d != dim]
    norm = aten.linalg_vector_norm.default(value, p, others, True)
    factor = torch.where(norm > maximum, maximum / (norm + 1e-7), torch.ones_like(norm))
    return Batched(value * factor)


def searchsorted(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """searchsorted: leading dimensions must agree, and a vector of boundaries serves any values."""
    bound = bind(func, args, kwargs)
    boundaries, values, sorter = bound.pop("sorted_sequence"), bound.pop("self"), bound.pop("sorter", None)
    if not is_batched(values) and not isinstance(values, Tensor):
        return NotImplemented
    rank = logical_rank(values)
    if logical_rank(boundaries) == 1 and not is_batched(boundaries) and not is_batched(sorter):
        return Batched(func(boundaries, values.value, sorter=sorter, **bound))
    boundaries, sorter = physical(boundaries, size), physical(sorter, size)
    target = physical(values, size)
    shape = target.shape
    if boundaries.dim() == 2:
        target = target.reshape(size, shape[1:].numel())
    elif rank == 0:
        return NotImplemented
    result = func(boundaries.contiguous(), target.contiguous(), sorter=sorter, **bound)
    return Batched(result.reshape(shape))


def bucketize(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """Bucketize is searchsorted with its arguments exchanged."""
    bound = bind(func, args, kwargs)
    values, boundaries = bound.pop("self"), bound.pop("boundaries")
    return searchsorted(aten.searchsorted.Tensor, [boundaries, values], bound, size)


REDUCTIONS: dict[Any, BatchStrategy] = {
    **dict.fromkeys(
        [
            aten.sum.dim_IntList,
            aten.nansum.default,
            aten.mean.dim,
            aten.amax.default,
            aten.amin.default,
            aten.all.dims,
            aten.any.dims,
            aten.var.correction,
            aten.std.correction,
            aten.var_mean.correction,
            aten.std_mean.correction,
            aten.logsumexp.default,
            aten.count_nonzero.dim_IntList,
            aten.linalg_vector_norm.default,
            aten.norm.ScalarOpt_dim,
            aten.norm.ScalarOpt_dim_dtype,
        ],
        reduce_dims,
    ),
    **dict.fromkeys(
        [
            aten.prod.dim_int,
            aten.all.dim,
            aten.any.dim,
            aten.max.dim,
            aten.min.dim,
            aten.median.dim,
            aten.nanmedian.dim,
            aten.mode.default,
            aten.kthvalue.default,
        ],
        shift_dims,
    ),
    aten.sum.default: reduce_all_dims(aten.sum.dim_IntList),
    aten.mean.default: reduce_all_dims(aten.mean.dim),
    aten.prod.default: reduce_all(aten.prod.dim_int),
    aten.max.default: reduce_all_dims(aten.amax.default),
    aten.min.default: reduce_all_dims(aten.amin.default),
    aten.all.default: reduce_all(aten.all.dim),
    aten.any.default: reduce_all(aten.any.dim),
    aten.argmax.default: arg_reduce,
    aten.argmin.default: arg_reduce,
    aten.median.default: reduce_median,
    aten.nanmedian.default: reduce_median,
    aten.aminmax.default: aminmax,
    **dict.fromkeys([aten._is_all_true.default, aten._is_any_true.default], reduce_batch),
}

SCANS: dict[Any, BatchStrategy] = {
    **dict.fromkeys(
        [
            aten.cumsum.default,
            aten.cumprod.default,
            aten.logcumsumexp.default,
            aten._logcumsumexp.default,
            aten.cummax.default,
            aten.cummin.default,
            aten.sort.default,
            aten.sort.stable,
            aten.argsort.default,
            aten.argsort.stable,
            aten.topk.default,
            aten._softmax.default,
            aten._log_softmax.default,
            aten._softmax_backward_data.default,
            aten._log_softmax_backward_data.default,
            aten._safe_softmax.default,
            aten.scatter.src,
            aten.scatter.value,
            aten.scatter.reduce,
            aten.scatter.value_reduce,
            aten.scatter_add.default,
            aten.scatter_reduce.two,
            aten.glu.default,
        ],
        shift_dims,
    ),
    **dict.fromkeys([aten._fft_c2c.default, aten._fft_r2c.default, aten._fft_c2r.default], shift_view),
    aten.gather.default: gather,
    aten.renorm.default: renorm,
    aten.searchsorted.Tensor: searchsorted,
    aten.searchsorted.Scalar: searchsorted,
    aten.bucketize.Tensor: bucketize,
}
