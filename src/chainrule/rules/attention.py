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
