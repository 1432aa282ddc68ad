"""Batching of losses that are one op: the samples' rows are rows of one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from chainrule.rules.batching_base import Batched, BatchStrategy, bind, is_batched, logical_rank, physical

aten = torch.ops.aten

_NONE, _MEAN = 0, 1


def nll_loss(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """nll_loss_forward of rows or of one row, with weights that are the same for all samples: the loss of every row, then sums.

    The total weight that the op returns beside is that of each sample; torch leaves it open where nothing is reduced.
    """
    bound = bind(func, args, kwargs)
    item, target, weight, reduction = bound["self"], bound["target"], bound["weight"], bound["reduction"]
    rank = logical_rank(item)
    if rank not in (1, 2) or logical_rank(target) != rank - 1 or is_batched(weight) or not size:
        return NotImplemented
    rows, places = physical(item, size), physical(target, size)
    shape, ignored = places.shape, bound["ignore_index"]
    places = places.reshape(-1)
    losses = aten.nll_loss_forward.default(rows.reshape(-1, rows.shape[-1]), places, weight, _NONE, ignored)[0].view(shape)
    if reduction == _NONE:
        return Batched(losses), losses.new_zeros(())
    kept = places.ne(ignored)
    if weight is None:
        totals = kept.view(shape).sum(list(range(1, rank)), dtype=losses.dtype) if rank > 1 else kept.to(losses.dtype)
    else:
        shares = torch.where(kept, weight.index_select(0, torch.where(kept, places, 0)), 0.0).view(shape)
        totals = shares.sum(1) if rank > 1 else shares
    total = losses.sum(1) if rank > 1 else losses
    if reduction == _MEAN:
        # The mean over no target is NaN, and constant.
        some = kept.view(shape).any(1) if rank > 1 else kept
        total = torch.where(some, total / torch.where(some, totals, 1.0), math.nan)
    return Batched(total), Batched(totals)


def multilabel_margin_loss(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """multilabel_margin_loss_forward of rows or of one row: the loss of every row, then sums."""
    bound = bind(func, args, kwargs)
    item, target, reduction = bound["self"], bound["target"], bound["reduction"]
    rows, places = physical(item, size), physical(target, size)
    if logical_rank(item) not in (1, 2) or rows.shape != places.shape or not rows.numel():
        return NotImplemented
    losses, labels = func(_flat_rows(rows), _flat_rows(places), _NONE)
    losses = losses.view(rows.shape[:-1])
    if rows.dim() > 2 and reduction != _NONE:
        losses = losses.mean(1) if reduction == _MEAN else losses.sum(1)
    return Batched(losses), Batched(labels.view(rows.shape))


def multilabel_margin_loss_backward(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """The same of multilabel_margin_loss_backward: each row has the cotangent of its own loss."""
    bound = bind(func, args, kwargs)
    reduction = bound["reduction"]
    rows, places, labels = (physical(bound[name], size) for name in ("self", "target", "is_target"))
    if logical_rank(bound["self"]) not in (1, 2) or not rows.shape == places.shape == labels.shape or not rows.numel():
        return NotImplemented
    cotangents = physical(bound["grad_output"], size)
    if rows.dim() > 2 and reduction != _NONE:
        cotangents = (cotangents / rows.shape[1] if reduction == _MEAN else cotangents).reshape(size, 1)
    cotangents = cotangents.expand(rows.shape[:-1]).reshape(-1)
    found = func(cotangents, _flat_rows(rows), _flat_rows(places), _NONE, _flat_rows(labels))
    return Batched(found.view(rows.shape))


def _flat_rows(rows: torch.Tensor) -> torch.Tensor:
    return rows.reshape(-1, rows.shape[-1])


LOSSES: dict[Any, BatchStrategy] = {
    aten.nll_loss_forward.default: nll_loss,
    aten.multilabel_margin_loss_forward.default: multilabel_margin_loss,
    aten.multilabel_margin_loss_backward.default: multilabel_margin_loss_backward,
}

__all__ = ["LOSSES"]
