"""Pointwise ops that torch does not tag, factories, and ops that no batch can run."""

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
    is_composite,
    logical_rank,
    logical_shape,
    mark,
    pad_rank,
    physical,
)
from chainrule.rules.batching_pointwise import align, align_inplace, copy_inplace, fill_inplace
from chainrule.shapes import broadcast_shapes

aten = torch.ops.aten


def cast(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """_to_copy and clone: a memory format that needs a rank of its own is dropped."""
    if kwargs.get("memory_format") in (torch.channels_last, torch.channels_last_3d):
        kwargs = {**kwargs, "memory_format": torch.preserve_format}
    return Batched(func(args[0].value, *args[1:], **kwargs))


def like_factory(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """zeros_like and its like: the result is the same for all samples, and becomes batched if written to."""
    source = args[0]
    if is_batched(source):
        value = source.value
        source = torch.empty_strided(source.shape, value.stride()[1:], dtype=value.dtype, device=value.device)
    if any(is_batched(arg) for arg in args[1:]):
        return NotImplemented
    return func(source, *args[1:], **kwargs)


def new_factory(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """new_zeros and its like: only the dtype and the device of the source count."""
    value = args[0].value if is_batched(args[0]) else args[0]
    if any(is_batched(arg) for arg in args[1:]):
        return NotImplemented
    source = torch.empty((), dtype=value.dtype, device=value.device)
    return func(source, *args[1:], **kwargs)


def broadcast_all(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """A pointwise op whose kernel takes its result's shape from the first argument: all get the common shape."""
    tensors = [x for x in args if is_batched(x) or isinstance(x, Tensor)]
    shape = broadcast_shapes(*[logical_shape(x) for x in tensors])
    values = [
        _padded(physical(x, size), len(shape)).expand([size, *shape]) if is_batched(x) or isinstance(x, Tensor) else x
        for x in args
    ]
    return mark(func(*values, **kwargs))


def _padded(value: Tensor, rank: int) -> Tensor:
    while value.dim() - 1 < rank:
        value = value.unsqueeze(1)
    return value


#: Losses whose kernels broadcast the second tensor themselves.
_BROADCASTING = frozenset({aten.mse_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default})


def loss(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """A pointwise loss with a reduction over the sample (0 none, 1 mean, 2 sum)."""
    bound = bind(func, args, kwargs)
    reduction = bound["reduction"]
    bound["reduction"] = 0
    # The kernels take their results' shape from the first tensor.
    whole = func in _BROADCASTING and is_batched(bound["self"]) and logical_shape(bound["self"]) == logical_shape(bound["target"])
    elementwise = (align if whole else broadcast_all)(func, [*bound.values()], {}, size).value
    if reduction == 0:
        return Batched(elementwise)
    flat = elementwise.reshape(size, elementwise.shape[1:].numel())
    return Batched(flat.mean(1) if reduction == 1 else flat.sum(1))


def loss_backward(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """The backward of `loss`: the mean's factor is that of one sample."""
    bound = bind(func, args, kwargs)
    reduction = bound["reduction"]
    grad, x, target = bound["grad_output"], bound["self"], bound["target"]
    shape = broadcast_shapes(logical_shape(x), logical_shape(target))
    if reduction == 1:
        count = max(shape.numel(), 1)
        grad = Batched(grad.value / count) if is_batched(grad) else grad / count
    bound["grad_output"] = grad
    bound["reduction"] = 2
    return broadcast_all(func, list(bound.values()), {}, size)


def masked_fill(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """masked_fill with a value that may be batched, which the kernel itself does not take."""
    source, mask, value = args
    if mask.value.dtype is not torch.bool if is_batched(mask) else mask.dtype is not torch.bool:
        raise RuntimeError("masked_fill only supports boolean masks")
    if not is_batched(value):
        rank = max(logical_rank(source), logical_rank(mask))
        return Batched(func(pad_rank(source, rank), pad_rank(mask, rank), value))
    dtype = source.value.dtype if is_batched(source) else source.dtype
    return align(aten.where.self, [mask, Batched(value.value.to(dtype)), source], {}, size)


def masked_fill_inplace(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """masked_fill_ on a batched `self`."""
    target = args[0]
    if is_batched(args[2]):
        target.value.copy_(masked_fill(func, args, kwargs, size).value)
    else:
        func(target.value, pad_rank(args[1], target.rank), args[2])
    return target


def functional_copy(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """Make a copy, or fill: the source in the shape and dtype of the first argument."""
    target, source = args[0], args[1]
    if func is aten.fill.Tensor and (rank := logical_rank(source)):
        raise RuntimeError(f"fill_ only supports 0-dimension value tensor but got tensor with {rank} dimensions.")
    dtype = target.value.dtype if is_batched(target) else target.dtype
    shape = logical_shape(target)
    value = pad_rank(source, len(shape)) if is_batched(source) else source
    return Batched(value.to(dtype).expand([size, *shape]).clone())


def masked_select(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """masked_select by a mask that is the same for all samples has a fixed shape."""
    source, mask = args
    if is_batched(mask):
        return NotImplemented
    shape = broadcast_shapes(source.shape, mask.shape)
    value = pad_rank(source, len(shape)).expand([size, *shape]).reshape(size, shape.numel())
    return Batched(value[:, mask.expand(shape).reshape(-1)])


def masked_scale(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """native_dropout_backward and _masked_scale: grad * mask * scale."""
    return align(func, [Batched(physical(args[0], size)), Batched(physical(args[1], size)), *args[2:]], kwargs, size)


def native_dropout(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """native_dropout outside training (the random case is not a matter of rules)."""
    return mark(func(args[0].value, *args[1:], **kwargs))


_UNTAGGED_POINTWISE = [
    "hardtanh_backward", "elu_backward", "softplus_backward", "leaky_relu_backward", "mish_backward", "hardtanh",
    "leaky_relu", "hardswish", "hardswish_backward", "hardsigmoid_backward", "softshrink_backward", "hardshrink_backward",
    "log_sigmoid_backward", "log_sigmoid_forward", "rrelu_with_noise_backward", "_prelu_kernel",
    "_prelu_kernel_backward", "gelu", "elu", "softplus", "threshold", "polar", "complex", "nan_to_num", "silu_backward",
    "_conj_physical", "native_dropout_backward", "_masked_scale", "frexp", "prelu", "hardshrink", "softshrink", "celu",
    "selu", "logit_backward", "copy", "fill",
]  # fmt: skip


def _pointwise_table() -> dict[Any, BatchStrategy]:
    table: dict[Any, BatchStrategy] = {}
    for name in _UNTAGGED_POINTWISE:
        packet = getattr(aten, name, None)
        if packet is None:
            continue
        for overload in packet.overloads():
            func = getattr(packet, overload)
            if not func._schema.is_mutable and not is_composite(func):
                table[func] = align
    table.pop(aten._conj_physical.default, None)
    table.pop(aten.copy.default, None)
    table[aten.native_dropout_backward.default] = masked_scale
    for op in (aten._standard_gamma_grad, aten._dirichlet_grad, aten.gelu_backward):
        table[op.default] = broadcast_all
    table[aten._to_copy.default] = cast
    table[aten.copy.default] = functional_copy
    table[aten.fill.Tensor] = functional_copy
    table[aten.masked_fill.Scalar] = masked_fill
    table[aten.masked_fill.Tensor] = masked_fill
    table[aten.masked_select.default] = masked_select
    table[aten.clone.default] = cast
    table[aten.native_dropout.default] = native_dropout
    for name in ("mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss"):
        table[getattr(aten, name).default] = loss
        table[getattr(aten, name + "_backward").default] = loss_backward
    for op in (aten.binary_cross_entropy.default, aten.binary_cross_entropy_with_logits.default):
        table[op] = loss
    table[aten._prelu_kernel.default] = broadcast_all
    return table


POINTWISE: dict[Any, BatchStrategy] = _pointwise_table()

POINTWISE_INPLACE: dict[Any, BatchStrategy] = {
    aten.copy_.default: copy_inplace,
    aten.fill_.Scalar: align_inplace,
    aten.fill_.Tensor: fill_inplace,
    aten.zero_.default: align_inplace,
    aten.masked_fill_.Scalar: masked_fill_inplace,
    aten.masked_fill_.Tensor: masked_fill_inplace,
    aten.detach_.default: align_inplace,
}

FACTORIES: dict[Any, BatchStrategy] = {
    **dict.fromkeys(
        [aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default, aten.full_like.default], like_factory
    ),
    **dict.fromkeys(
        [
            aten.new_zeros.default,
            aten.new_ones.default,
            aten.new_empty.default,
            aten.new_full.default,
            aten.new_empty_strided.default,
        ],
        new_factory,
    ),
}

_ITEM = (
    "vmap: the function asked for the Python value of a tensor that differs between samples: .item(), float(x), "
    "bool(x), a condition `if x:` or `while x:`, or indexing with a mapped 0-dimensional tensor. Use "
    "torch.where(condition, a, b) in place of a condition and torch.index_select or torch.gather in place of an index; "
    "or return the tensor."
)


def _dynamic(name: str, instead: str) -> str:
    return (
        f"vmap: {name} has a result whose shape depends on the values, which differ between samples, and so cannot be "
        f"batched. {instead}"
    )


def _data_dependent() -> dict[Any, str]:
    mask = "Use torch.where(mask, x, 0) and keep the shape."
    table = {
        aten._local_scalar_dense.default: _ITEM,
        aten.item.default: _ITEM,
        aten.is_nonzero.default: _ITEM,
        aten.nonzero.default: _dynamic("nonzero", "Use a mask, or torch.nonzero_static with a fixed size."),
        aten.masked_select.default: _dynamic("masked_select", mask),
        aten.equal.default: (
            "vmap: torch.equal returns one bool, but the answer differs between samples; use (a == b).all()."
        ),
    }
    for name in ("unique_dim", "_unique", "_unique2", "unique_consecutive", "unique_dim_consecutive"):
        table[getattr(aten, name).default] = _dynamic(name, "Use sort, which keeps the shape.")
    return table


DATA_DEPENDENT: dict[Any, str] = _data_dependent()

__all__ = ["DATA_DEPENDENT", "FACTORIES", "POINTWISE", "POINTWISE_INPLACE"]
