"""Attention recorded in parts: the softmax of the scores, times the values, with a fused kernel's own outputs."""

from __future__ import annotations

import math
from typing import Any

import torch

Tensor = torch.Tensor


def _scores(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, aligned_last: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The scaled, masked scores, and which rows have no key left (None when that cannot be)."""
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.matmul(query * factor, key.transpose(-2, -1))
    if is_causal:
        rows, columns = query.shape[-2], key.shape[-2]
        offset = columns - rows if aligned_last else 0
        keep = torch.ones((rows, columns), dtype=torch.bool, device=query.device).tril(offset)
        scores = torch.where(keep, scores, torch.full((), -math.inf, dtype=scores.dtype, device=scores.device))
    if mask is None:
        return scores, None
    if mask.dtype == torch.bool:
        scores = torch.where(mask, scores, torch.full((), -math.inf, dtype=scores.dtype, device=scores.device))
    else:
        scores = scores + mask
    empty = torch.all(torch.eq(scores, -math.inf), dim=-1, keepdim=True)
    return torch.where(empty, torch.zeros((), dtype=scores.dtype, device=scores.device), scores), empty


def _weights(scores: Tensor, empty: Tensor | None) -> Tensor:
    weights = torch.softmax(scores, dim=-1)
    return weights if empty is None else torch.where(empty, torch.zeros((), dtype=weights.dtype, device=weights.device), weights)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` in parts."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    weights = _weights(*_scores(query, key, attn_mask, is_causal, scale))
    if dropout_p > 0.0:
        weights = torch.dropout(weights, dropout_p, True)
    return torch.matmul(weights, value)


def attention_with_normaliser(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The output of a fused kernel and the logarithm of its softmax's denominator."""
    scores, empty = _scores(query, key, mask, is_causal, scale)
    weights = _weights(scores, empty)
    if dropout_p > 0.0:
        weights = torch.dropout(weights, dropout_p, True)
    return torch.matmul(weights, value), torch.logsumexp(scores.detach(), -1)


def flash_attention_for_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``aten::_scaled_dot_product_flash_attention_for_cpu`` in parts."""
    return attention_with_normaliser(query, key, value, attn_mask, dropout_p, is_causal, scale)


def efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """``aten::_scaled_dot_product_efficient_attention`` in parts."""
    out, normaliser = attention_with_normaliser(query, key, value, attn_bias, dropout_p, is_causal, scale)
    seed = torch.zeros((), dtype=torch.int64, device=query.device)
    return out, normaliser, seed, torch.zeros_like(seed)


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """``aten::_scaled_dot_product_flash_attention`` in parts."""
    out, normaliser = attention_with_normaliser(query, key, value, None, dropout_p, is_causal, scale)
    seed = torch.zeros((2,), dtype=torch.uint64, device=query.device)
    nothing = torch.empty((0,), dtype=torch.int64, device=query.device)
    unused = torch.empty((), dtype=torch.uint64, device=query.device)
    debug = torch.empty((0,), dtype=query.dtype, device=query.device)
    return out, normaliser, nothing, nothing, query.shape[-2], key.shape[-2], seed, unused, debug


__all__ = ["efficient_attention", "flash_attention", "flash_attention_for_cpu", "scaled_dot_product_attention"]


def _fast_mask(mask: Tensor | None, kind: int | None) -> Tensor | None:
    """The mask of torch's inference kernels (true where masked) as one that broadcasts against (batch, head, row, key)."""
    if mask is None:
        return None
    keep = torch.logical_not(mask.to(torch.bool))
    return keep[:, None, None, :] if kind == 1 else keep


def native_multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Torch's inference kernel of ``nn.MultiheadAttention`` in parts."""
    heads = []
    for number, item in enumerate((query, key, value)):
        rows = slice(number * embed_dim, (number + 1) * embed_dim)
        projected = torch.nn.functional.linear(item, qkv_weight[rows], qkv_bias[rows])
        heads.append(projected.reshape(item.shape[0], item.shape[1], num_head, -1).transpose(1, 2))
    scores, empty = _scores(heads[0], heads[1], _fast_mask(mask, mask_type), False, None)
    weights = _weights(scores, empty)
    mixed = torch.matmul(weights, heads[2]).transpose(1, 2).reshape(query.shape[0], query.shape[1], embed_dim)
    output = torch.nn.functional.linear(mixed, proj_weight, proj_bias)
    if not need_weights:
        return output, output.new_empty(0)
    return output, weights.mean(1) if average_attn_weights else weights


def transformer_encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """Torch's inference kernel of ``nn.TransformerEncoderLayer`` in parts."""
    functional = torch.nn.functional

    def attend(item: Tensor) -> Tensor:
        return native_multi_head_attention(
            item, item, item, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, False, True, mask_type
        )[0]

    def feed(item: Tensor) -> Tensor:
        hidden = functional.linear(item, ffn_weight_1, ffn_bias_1)
        hidden = functional.gelu(hidden) if use_gelu else functional.relu(hidden)
        return functional.linear(hidden, ffn_weight_2, ffn_bias_2)

    def norm_1(item: Tensor) -> Tensor:
        return functional.layer_norm(item, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(item: Tensor) -> Tensor:
        return functional.layer_norm(item, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        src = src + attend(norm_1(src))
        return src + feed(norm_2(src))
    src = norm_1(src + attend(src))
    return norm_2(src + feed(src))
