"""Batching of neural-network layers: the batch is folded into a dimension that the kernel already treats as one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chainrule.calls import FUNCTIONS
from chainrule.rules.batching_base import (
    Batched,
    BatchStrategy,
    bind,
    is_batched,
    logical_rank,
    logical_shape,
    mark,
    physical,
    value_of,
)

aten = torch.ops.aten


# --- pooling, padding, resampling: fold the batch into N -----------------------------------------------------------


def fold_into_batch(full_rank: int, func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """An op on (N, C, spatial…): the batch joins N, or is N where the sample has none.

    Args:
        full_rank: the rank of (N, C, spatial…).
        func, args, kwargs, size: as for every strategy.

    """
    rank = max(logical_rank(x) for x in args if is_batched(x) or isinstance(x, Tensor))
    lead: list[int] = []

    def fold(x: Any) -> Any:
        if not (is_batched(x) or isinstance(x, Tensor)):
            return x
        value = physical(x, size)
        if rank < full_rank:
            return value
        lead[:] = [size, value.shape[1]]
        return value.reshape(size * value.shape[1], *value.shape[2:])

    values = [fold(x) for x in args]
    for position, argument in enumerate(func._schema.arguments[: len(values)]):
        if argument.name in ("input_size", "size") and lead:
            values[position] = [size * values[position][0], *values[position][1:]]
    result = FUNCTIONS.get(func._op, func)(*values, **{key: fold(x) for key, x in kwargs.items()})
    if not lead:
        return mark(result)
    results = (result,) if isinstance(result, Tensor) else result
    # An output that is not asked for (by an output mask) is None.
    unfolded = tuple(None if item is None else Batched(item.reshape(*lead, *item.shape[1:])) for item in results)
    return unfolded[0] if isinstance(result, Tensor) else unfolded


def channel_shuffle(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """channel_shuffle: samples of any rank, with the channels after the first dimension."""
    return fold_into_batch(logical_rank(args[0]), func, args, kwargs, size)


def attention(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """Fused attention and its backward on (N, heads, length, features): the batch joins N."""
    bound = bind(func, args, kwargs)
    query = bound["query"]
    samples = logical_shape(query)[0]
    names = ("query", "key", "value", "grad_out", "grad_out_", "out", "logsumexp", "attn_mask", "attn_bias")
    call_args, call_kwargs = [], {}
    for argument in func._schema.arguments:
        item = bound[argument.name]
        if argument.name in names and (is_batched(item) or isinstance(item, Tensor)):
            value = physical(item, size)
            if argument.name in ("attn_mask", "attn_bias"):
                value = _fold_mask(value, size, samples)
            else:
                value = value.reshape(size * samples, *value.shape[2:])
            item = value
        elif is_batched(item):
            return NotImplemented
        if argument.kwarg_only:
            call_kwargs[argument.name] = item
        else:
            call_args.append(item)
    results = func(*call_args, **call_kwargs)

    def unfold(item: Any) -> Any:
        if isinstance(item, Tensor) and item.dim() >= 3 and item.shape[0] == size * samples:
            return Batched(item.reshape(size, samples, *item.shape[1:]))
        return item

    return tuple(unfold(item) for item in results)


def _fold_mask(value: Tensor, size: int, samples: int) -> Tensor:
    """A mask (batch, [N, heads,] length, length) as (batch·N, heads or 1, length, length)."""
    while value.dim() < 5:
        value = value.unsqueeze(1)
    value = value.expand(size, samples, *value.shape[2:])
    return value.reshape(size * samples, *value.shape[2:])


# --- convolution ---------------------------------------------------------------------------------------------------


def convolution(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """convolution: batched inputs join N, batched weights become groups."""
    bound = bind(func, args, kwargs)
    x, weight, bias = bound["input"], bound["weight"], bound["bias"]
    groups, transposed = bound["groups"], bound["transposed"]
    settings = [bound[name] for name in ("stride", "padding", "dilation", "transposed", "output_padding")]
    if not is_batched(weight) and not is_batched(bias):
        value = x.value
        result = func(
            value.reshape(-1, *value.shape[2:]) if size else value.flatten(0, 1), weight, bias, *settings, groups
        )
        return Batched(result.reshape(size, value.shape[1], *result.shape[1:]))
    if is_batched(x) and is_batched(weight):
        result = _grouped_convolution(func, x.value, weight.value, settings, groups, size)
    elif is_batched(weight):
        result = _many_filters(func, x, weight.value, settings, groups, size, transposed)
    else:
        value = x.value if is_batched(x) else physical(x, size)
        result = func(value.flatten(0, 1), weight, None, *settings, groups)
        result = result.reshape(size, value.shape[1], *result.shape[1:])
    if bias is not None:
        stored = value_of(bias)
        spatial = [1] * (result.dim() - 3)
        result = result + (stored.reshape(size, 1, -1, *spatial) if is_batched(bias) else stored.reshape(-1, *spatial))
    return Batched(result)


def _grouped_convolution(
    func: Any, value: Tensor, weight: Tensor, settings: Sequence[Any], groups: int, size: int
) -> Tensor:
    """Inputs (batch, N, C, …) with weights (batch, …): the batch becomes groups."""
    folded = value.transpose(0, 1).flatten(1, 2)
    result = func(folded, weight.flatten(0, 1), None, *settings, groups * size)
    result = result.reshape(result.shape[0], size, result.shape[1] // size, *result.shape[2:])
    outputs: Tensor = result.transpose(0, 1)
    return outputs


def _many_filters(
    func: Any, x: Tensor, weight: Tensor, settings: Sequence[Any], groups: int, size: int, transposed: bool
) -> Tensor:
    """One input (N, C, …) with weights (batch, …): the batch joins the output channels of each group."""
    if transposed:
        filters = weight.transpose(0, 1).flatten(1, 2)
    else:
        _, outputs, *rest = weight.shape
        filters = weight.reshape(size, groups, outputs // groups, *rest).transpose(0, 1)
        filters = filters.reshape(groups * size * (outputs // groups), *rest)
    result = func(x, filters, None, *settings, groups)
    samples, channels, *spatial = result.shape
    per_group = channels // (groups * size)
    result = result.reshape(samples, groups, size, per_group, *spatial)
    result = result.permute(2, 0, 1, 3, *range(4, result.dim()))
    outputs_per_sample: Tensor = result.reshape(size, samples, groups * per_group, *spatial)
    return outputs_per_sample


def convolution_backward(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """convolution_backward: the input's gradient by N where the weight is shared, the rest by groups."""
    bound = bind(func, args, kwargs)
    grad, x, weight, mask = bound["grad_output"], bound["input"], bound["weight"], list(bound["output_mask"])
    groups = bound["groups"]
    settings = [bound[n] for n in ("stride", "padding", "dilation", "transposed", "output_padding")]
    grads: list[Any] = [None, None, None]
    grad_value, x_value = physical(grad, size), physical(x, size)
    if mask[0] and not is_batched(weight):
        (by_input, _, _) = func(
            grad_value.flatten(0, 1), x_value.flatten(0, 1), weight, None, *settings, groups, [True, False, False]
        )
        grads[0] = Batched(by_input.reshape(x_value.shape))
        mask[0] = False
    if mask[2]:
        grads[2] = Batched(grad_value.sum([1, *range(3, grad_value.dim())]))
        mask[2] = False
    if mask[0] or mask[1]:
        weight_value = physical(weight, size)
        # For the gradient of the weight only its shape counts.
        filters = weight_value.flatten(0, 1) if mask[0] else weight_value.new_empty(weight_value.shape).flatten(0, 1)
        by_input, by_weight, _ = func(
            grad_value.transpose(0, 1).flatten(1, 2),
            x_value.transpose(0, 1).flatten(1, 2),
            filters,
            None,
            *settings,
            groups * size,
            mask,
        )
        if mask[0]:
            shape = (x_value.shape[1], size, *x_value.shape[2:])
            grads[0] = Batched(by_input.reshape(shape).transpose(0, 1))
        if mask[1]:
            grads[1] = Batched(by_weight.reshape(weight_value.shape))
    return tuple(grads)


# --- normalisation -------------------------------------------------------------------------------------------------


def _channel_shape(value: Tensor, channels: int) -> list[int]:
    return [1, channels] + [1] * (value.dim() - 2)


def _fold_channels(x: Any, size: int) -> Tensor:
    """(batch, N, C, …) as (N, batch·C, …)."""
    value: Tensor = physical(x, size)
    return value.transpose(0, 1).flatten(1, 2)


def _unfold_channels(value: Tensor, size: int) -> Batched:
    return Batched(value.reshape(value.shape[0], size, value.shape[1] // size, *value.shape[2:]).transpose(0, 1))


def _per_channel(x: Any, size: int) -> Any:
    return None if x is None else physical(x, size).reshape(-1)


def batch_norm(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """Batch normalisation: each sample has channels of its own."""
    bound = bind(func, args, kwargs)
    x = bound["input"]
    mean, variance = bound.get("running_mean"), bound.get("running_var")
    training = bound.get("training", func is aten._batch_norm_with_update.default)
    if training and mean is not None and not (is_batched(mean) and is_batched(variance)):
        return NotImplemented  # torch's decomposition writes them, if they were made inside the function
    stored_mean, stored_variance = _per_channel(mean, size), _per_channel(variance, size)
    replaced = {
        "input": _fold_channels(x, size),
        "weight": _per_channel(bound["weight"], size),
        "bias": _per_channel(bound["bias"], size),
        "running_mean": stored_mean,
        "running_var": stored_variance,
    }
    values = [replaced.get(name, bound[name]) for name in bound]
    output, *statistics = func(*values)
    if training and mean is not None and variance is not None:
        mean.value.copy_(stored_mean.view(mean.value.shape))
        variance.value.copy_(stored_variance.view(variance.value.shape))
    channels = replaced["input"].shape[1] // size if size else 0
    unfolded = [
        Batched(item.reshape(size, channels)) if item.dtype.is_floating_point and item.numel() else item
        for item in statistics
    ]
    return (_unfold_channels(output, size), *unfolded)


def batch_norm_backward(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """native_batch_norm_backward and batch_norm_backward."""
    bound = bind(func, args, kwargs)
    replaced = {}
    for name, item in bound.items():
        if not (is_batched(item) or isinstance(item, Tensor)):
            continue
        rank = logical_rank(item)
        if name == "reserve":
            replaced[name] = value_of(item)
        elif rank == 1:
            replaced[name] = _per_channel(item, size)
        else:
            replaced[name] = _fold_channels(item, size)
    by_input, by_weight, by_bias = func(*[replaced.get(name, item) for name, item in bound.items()])
    return (
        None if by_input is None else _unfold_channels(by_input, size),
        *[
            Batched(item.reshape(size, -1)) if isinstance(item, Tensor) and item.numel() else item
            for item in (by_weight, by_bias)
        ],
    )


def _scale_and_shift(value: Tensor, weight: Any, bias: Any, shape: Any) -> Tensor:
    """`value * weight + bias`, where each may be batched; `shape` gives the stored parameter its place."""
    if weight is not None:
        value = value * shape(weight)
    if bias is not None:
        value = value + shape(bias)
    return value


def layer_norm(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """native_layer_norm: normalises trailing dimensions, so that only batched parameters need care."""
    x, normalized, weight, bias, epsilon = args
    if is_batched(x) and not is_batched(weight) and not is_batched(bias):
        return mark(func(x.value, normalized, weight, bias, epsilon))
    value = physical(x, size)
    output, mean, deviation = func(value, normalized, None, None, epsilon)
    between = [1] * (value.dim() - 1 - len(normalized))

    def place(parameter: Any) -> Any:
        return parameter.value.reshape(size, *between, *normalized) if is_batched(parameter) else parameter

    return mark((_scale_and_shift(output, weight, bias, place), mean, deviation))


def layer_norm_backward(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """native_layer_norm_backward: the parameters' gradients are sums over the sample's leading dimensions."""
    grad, x, normalized, mean, deviation, weight, bias, mask = args
    grad_value, value = physical(grad, size), physical(x, size)
    mean_value, deviation_value = physical(mean, size), physical(deviation, size)
    leading = list(range(1, value.dim() - len(normalized)))
    by_input = by_weight = by_bias = None
    if mask[1] and weight is not None:
        by_weight = grad_value * (value - mean_value) * deviation_value
        by_weight = Batched(by_weight.sum(leading) if leading else by_weight)
    if mask[2] and bias is not None:
        by_bias = Batched(grad_value.sum(leading) if leading else grad_value)
    if mask[0]:
        if is_batched(weight):
            grad_value = grad_value * weight.value.reshape(size, *[1] * len(leading), *normalized)
            weight = None
        by_input, _, _ = func(
            grad_value.contiguous(), value.contiguous(), normalized, mean_value.contiguous(),
            deviation_value.contiguous(), weight, None, [True, False, False],
        )  # fmt: skip
        by_input = Batched(by_input)
    return by_input, by_weight, by_bias


def group_norm(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """native_group_norm: the batch joins N; batched parameters are applied afterwards."""
    x, weight, bias, samples, channels, spatial, groups, epsilon = args
    value = physical(x, size)
    shared = not is_batched(weight) and not is_batched(bias)
    output, mean, deviation = func(
        value.flatten(0, 1).contiguous(),
        weight if shared else None,
        bias if shared else None,
        size * samples,
        channels,
        spatial,
        groups,
        epsilon,
    )
    output = output.reshape(value.shape)
    if not shared:
        ones = [1] * (value.dim() - 3)

        def place(parameter: Any) -> Any:
            if is_batched(parameter):
                return parameter.value.reshape(size, 1, channels, *ones)
            return parameter.reshape(channels, *ones)

        output = _scale_and_shift(output, weight, bias, place)
    return mark((output, mean.reshape(size, samples, groups), deviation.reshape(size, samples, groups)))


def group_norm_backward(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """native_group_norm_backward, by the same folding; the parameters' gradients are kept per sample."""
    grad, x, mean, deviation, weight, samples, channels, spatial, groups, mask = args
    grad_value, value = physical(grad, size), physical(x, size)
    mean_value, deviation_value = physical(mean, size), physical(deviation, size)
    by_input = by_weight = by_bias = None
    reduced = [1, *range(3, value.dim())]
    if mask[1]:
        per_channel = channels // groups
        shape = [size, samples, channels] + [1] * (value.dim() - 3)
        centre = mean_value.repeat_interleave(per_channel, 2).reshape(shape)
        scale = deviation_value.repeat_interleave(per_channel, 2).reshape(shape)
        by_weight = Batched((grad_value * (value - centre) * scale).sum(reduced))
    if mask[2]:
        by_bias = Batched(grad_value.sum(reduced))
    if mask[0]:
        if is_batched(weight):
            grad_value = grad_value * weight.value.reshape(size, 1, channels, *[1] * (value.dim() - 3))
            weight = None
        by_input, _, _ = func(
            grad_value.flatten(0, 1).contiguous(), value.flatten(0, 1).contiguous(),
            mean_value.flatten(0, 1).contiguous(), deviation_value.flatten(0, 1).contiguous(), weight,
            size * samples, channels, spatial, groups, [True, False, False],
        )  # fmt: skip
        by_input = Batched(by_input.reshape(value.shape))
    return by_input, by_weight, by_bias


# --- tables --------------------------------------------------------------------------------------------------------

_FOLDED: dict[int, list[str]] = {
    3: [
        "affine_grid_generator", "avg_pool1d", "adaptive_max_pool1d", "max_pool1d_with_indices", "max_pool1d",
        "adaptive_avg_pool1d", "reflection_pad1d", "reflection_pad1d_backward", "replication_pad1d", "replication_pad1d_backward",
        "upsample_nearest1d", "upsample_nearest1d_backward", "_upsample_nearest_exact1d",
        "_upsample_nearest_exact1d_backward", "upsample_linear1d", "upsample_linear1d_backward", "im2col", "col2im",
    ],
    4: [
        "avg_pool2d", "avg_pool2d_backward", "_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward",
        "adaptive_max_pool2d", "adaptive_max_pool2d_backward", "max_pool2d_with_indices",
        "max_pool2d_with_indices_backward", "max_unpool2d", "reflection_pad2d", "reflection_pad2d_backward",
        "replication_pad2d", "replication_pad2d_backward", "upsample_nearest2d", "upsample_nearest2d_backward",
        "_upsample_nearest_exact2d", "_upsample_nearest_exact2d_backward", "upsample_bilinear2d",
        "upsample_bilinear2d_backward", "upsample_bicubic2d", "upsample_bicubic2d_backward",
        "_upsample_bilinear2d_aa", "_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa",
        "_upsample_bicubic2d_aa_backward", "grid_sampler_2d", "grid_sampler_2d_backward",
        "mkldnn_max_pool2d",
    ],
    5: [
        "avg_pool3d", "avg_pool3d_backward", "_adaptive_avg_pool3d", "_adaptive_avg_pool3d_backward",
        "adaptive_max_pool3d", "adaptive_max_pool3d_backward", "max_pool3d_with_indices",
        "max_pool3d_with_indices_backward", "max_unpool3d", "reflection_pad3d", "reflection_pad3d_backward",
        "replication_pad3d", "replication_pad3d_backward", "upsample_nearest3d", "upsample_nearest3d_backward",
        "_upsample_nearest_exact3d", "_upsample_nearest_exact3d_backward", "upsample_trilinear3d",
        "upsample_trilinear3d_backward", "grid_sampler_3d", "grid_sampler_3d_backward",
    ],
}  # fmt: skip
_FOLDED_AT_THREE = {"im2col", "col2im"}


def _folded_table() -> dict[Any, BatchStrategy]:
    table: dict[Any, BatchStrategy] = {}
    for rank, names in _FOLDED.items():
        for name in names:
            full = 4 if name == "im2col" else rank
            func = getattr(getattr(aten, name, None), "default", None)
            if func is not None:
                table[func] = functools.partial(fold_into_batch, full)
    return table


_ATTENTION = [
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_efficient_attention_backward",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_cudnn_attention_backward",
]

LAYERS: dict[Any, BatchStrategy] = {
    **_folded_table(),
    **{getattr(aten, name).default: attention for name in _ATTENTION if hasattr(aten, name)},
    aten.channel_shuffle.default: channel_shuffle,
    aten.native_channel_shuffle.default: channel_shuffle,
    aten.convolution.default: convolution,
    aten.convolution_backward.default: convolution_backward,
    aten.native_batch_norm.default: batch_norm,
    aten._native_batch_norm_legit.default: batch_norm,
    aten._batch_norm_with_update.default: batch_norm,
    aten._batch_norm_no_update.default: batch_norm,
    aten.cudnn_batch_norm.default: batch_norm,
    aten.native_batch_norm_backward.default: batch_norm_backward,
    aten.batch_norm_backward.default: batch_norm_backward,
    aten.native_layer_norm.default: layer_norm,
    aten.native_layer_norm_backward.default: layer_norm_backward,
    aten.native_group_norm.default: group_norm,
    aten.native_group_norm_backward.default: group_norm_backward,
}
