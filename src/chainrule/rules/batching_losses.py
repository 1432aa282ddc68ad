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


LOSSES: dict[Any, BatchStrategy] = {aten.nll_loss_forward.default: nll_loss}

__all__ = ["LOSSES"]
