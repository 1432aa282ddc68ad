"""Batching of pointwise ops: align the ranks, keep the logical type promotion, run the op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chainrule.rules.batching_base import Batched, logical_rank, mark, pad_rank, value_of

aten = torch.ops.aten


def align(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """Run a pointwise op on the stored tensors after padding the logical ranks to a common one."""
    rank = -1
    equal = True
    dtype = None
    mixed = False
    for arg in args:
        if arg.__class__ is Batched:
            arg_rank = arg.value.dim() - 1
            arg_dtype = arg.value.dtype
        elif isinstance(arg, Tensor):
            arg_rank = arg.dim()
            arg_dtype = arg.dtype
        else:
            continue
        if rank < 0:
            rank, dtype = arg_rank, arg_dtype
            continue
        if arg_rank != rank:
            equal = False
            rank = max(rank, arg_rank)
        if arg_dtype is not dtype:
            mixed = True
    if mixed:
        args = keep_promotion(func, args)
    if equal:
        values = [arg.value if arg.__class__ is Batched else arg for arg in args]
    else:
        values = [pad_rank(arg, rank) if arg.__class__ is Batched else arg for arg in args]
    result = func(*values, **kwargs) if kwargs else func(*values)
    return Batched(result) if isinstance(result, Tensor) else mark(result)


def align_kwargs(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """`align` for the few pointwise ops that take tensors by keyword."""
    if not any(value.__class__ is Batched for value in kwargs.values()):
        return align(func, args, kwargs, size)
    tensors = [x for x in (*args, *kwargs.values()) if x.__class__ is Batched or isinstance(x, Tensor)]
    rank = max(logical_rank(x) for x in tensors)
    values = [pad_rank(arg, rank) if arg.__class__ is Batched else arg for arg in args]
    named = {key: pad_rank(arg, rank) if arg.__class__ is Batched else arg for key, arg in kwargs.items()}
    return mark(func(*values, **named))


def align_inplace(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """A pointwise in-place op on a batched `self`: it writes into the stored tensor, so that aliases see it."""
    target = args[0]
    rank = target.rank
    for arg in args[1:]:
        if (arg.__class__ is Batched or isinstance(arg, Tensor)) and logical_rank(arg) > rank:
            raise RuntimeError(
                f"{func}: output with shape {list(target.shape)} doesn't match the broadcast shape of its "
                f"arguments: an argument has logical rank {logical_rank(arg)}"
            )
    args = keep_promotion(func, args) if len(args) > 1 else args
    func(target.value, *[pad_rank(arg, rank) if arg.__class__ is Batched else arg for arg in args[1:]], **kwargs)
    return target


def copy_inplace(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """`copy_`: like a pointwise op, but leading ones of the source may be dropped."""
    target, source = args[0], args[1]
    if not isinstance(args[1], (Batched, Tensor)):  # a number
        target.value.copy_(source, *args[2:], **kwargs)
        return target
    extra = logical_rank(source) - target.rank
    if extra > 0:
        for _ in range(extra):
            source = Batched(source.value.squeeze(1)) if source.__class__ is Batched else source.squeeze(0)
        if logical_rank(source) > target.rank:
            raise RuntimeError(f"vmap: copy_ cannot broadcast its source to the shape {list(target.shape)}")
    target.value.copy_(pad_rank(source, target.rank), *args[2:], **kwargs)
    return target


def fill_inplace(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """`fill_` with a tensor, which has no dimensions."""
    if rank := logical_rank(args[1]):
        raise RuntimeError(f"fill_ only supports 0-dimension value tensor but got tensor with {rank} dimensions.")
    return copy_inplace(func, args, kwargs, size)


# Only these promote the types of their tensor arguments but must leave one argument (the condition) alone.
_UNPROMOTED_FIRST = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar}


def keep_promotion(func: Any, args: Sequence[Any]) -> Sequence[Any]:
    """Cast batched scalars so that they take part in type promotion as the 0-dimensional tensors they are.

    Physically a batched scalar has one dimension, and so would win over a vector of a lower type:
    ``float32 vector * float64 scalar`` must stay float32.
    """
    start = 1 if func in _UNPROMOTED_FIRST else 0
    tensors: list[Any] = [arg for arg in args[start:] if arg.__class__ is Batched or isinstance(arg, Tensor)]
    if all(logical_rank(x) > 0 or x.__class__ is not Batched for x in tensors):
        return args
    if len({x.value.dtype if x.__class__ is Batched else x.dtype for x in tensors}) < 2:
        return args
    common = logical_result_type(args[start:])
    return [
        Batched(arg.value.to(common))
        if position >= start and arg.__class__ is Batched and arg.value.dim() == 1 and arg.value.dtype != common
        else arg
        for position, arg in enumerate(args)
    ]


def logical_result_type(args: Sequence[Any]) -> torch.dtype:
    """Torch's result type of the arguments with their logical ranks."""
    dimensioned: torch.dtype | None = None
    scalars: torch.dtype | None = None
    numbers: torch.dtype | None = None
    for arg in args:
        if arg.__class__ is Batched or isinstance(arg, Tensor):
            dtype = value_of(arg).dtype
            if logical_rank(arg) > 0:
                dimensioned = _promote(dimensioned, dtype)
            else:
                scalars = _promote(scalars, dtype)
        elif isinstance(arg, (bool, int, float, complex)):
            numbers = _promote(numbers, _number_type(arg))
    common = _combine(dimensioned, _combine(scalars, numbers))
    if common is None:
        raise TypeError("vmap: no tensor among the arguments of a pointwise op")
    return common


def _number_type(number: bool | int | float | complex) -> torch.dtype:
    if isinstance(number, bool):
        return torch.bool
    if isinstance(number, int):
        return torch.int64
    if isinstance(number, float):
        return torch.get_default_dtype()
    return torch.complex128 if torch.get_default_dtype() == torch.float64 else torch.complex64


def _promote(first: torch.dtype | None, second: torch.dtype | None) -> torch.dtype | None:
    if first is None or second is None:
        return second if first is None else first
    return torch.promote_types(first, second)


def _combine(higher: torch.dtype | None, lower: torch.dtype | None) -> torch.dtype | None:
    """ATen's rule between categories: a lower category counts only if it is of a higher kind."""
    if higher is None or lower is None:
        return lower if higher is None else higher
    if higher.is_complex:
        return higher
    if higher.is_floating_point:
        return higher.to_complex() if lower.is_complex else higher
    if higher == torch.bool or lower.is_floating_point or lower.is_complex:
        return torch.promote_types(higher, lower)
    return higher
