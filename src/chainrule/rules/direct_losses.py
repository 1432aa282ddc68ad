"""Losses that torch has as compositions of ops, written as their parts (see :mod:`chainrule.rules.direct`)."""

from __future__ import annotations

from typing import Any

import torch

from chainrule.rules.direct import Run

aten = torch.ops.aten
Tensor = torch.Tensor

#: The numbers by which torch names the ways to reduce a loss.
_MEAN, _SUM = 1, 2

#: What torch adds to the squares of a length.
_EPSILON = 1e-12


def _reduced(run: Run, losses: Tensor, reduction: int) -> Any:
    if reduction == _MEAN:
        return run(aten.mean.default, losses)
    return run(aten.sum.default, losses) if reduction == _SUM else losses


def _are_alike(*items: Tensor) -> bool:
    """Whether all are of one real dtype and of as many dimensions: what torch promotes, it may promote itself."""
    first = items[0]
    return first.is_floating_point() and all([item.dtype is first.dtype and item.dim() == first.dim() for item in items])


def _zero(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=like.dtype, device=like.device)


def _hinge(run: Run, losses: Tensor, margin: float) -> Any:
    """``max(losses + margin, 0)``."""
    return run(aten.clamp_min.default, run(aten.add.Tensor, losses, margin) if margin else losses, 0)


def _l1_loss(run: Run, input: Tensor, target: Tensor, reduction: int = _MEAN) -> Any:
    if not _are_alike(input, target):
        return NotImplemented
    return _reduced(run, run(aten.abs.default, run(aten.sub.Tensor, input, target)), reduction)


def _kl_div(run: Run, input: Tensor, target: Tensor, reduction: int = _MEAN, *, log_target: bool = False) -> Any:
    if not _are_alike(input, target):
        return NotImplemented
    if log_target:
        losses = run(aten.mul.Tensor, run(aten.exp.default, target), run(aten.sub.Tensor, target, input))
    else:
        information = run(aten.xlogy.Tensor, target, target)
        losses = run(aten.sub.Tensor, information, run(aten.mul.Tensor, target, input))
    return _reduced(run, losses, reduction)


def _poisson_nll_loss(
    run: Run, input: Tensor, target: Tensor, log_input: bool, full: bool, eps: float, reduction: int
) -> Any:
    if full or not _are_alike(input, target):
        return NotImplemented
    if log_input:
        losses = run(aten.sub.Tensor, run(aten.exp.default, input), run(aten.mul.Tensor, target, input))
    else:
        logarithm = run(aten.log.default, run(aten.add.Tensor, input, eps))
        losses = run(aten.sub.Tensor, input, run(aten.mul.Tensor, target, logarithm))
    return _reduced(run, losses, reduction)


def _margin_ranking_loss(
    run: Run, one: Tensor, two: Tensor, target: Tensor, margin: float = 0.0, reduction: int = _MEAN
) -> Any:
    if not _are_alike(one, two, target):
        return NotImplemented
    losses = run(aten.mul.Tensor, run(aten.neg.default, target), run(aten.sub.Tensor, one, two))
    return _reduced(run, _hinge(run, losses, margin), reduction)


def _hinge_embedding_loss(run: Run, input: Tensor, target: Tensor, margin: float = 1.0, reduction: int = _MEAN) -> Any:
    if not input.is_floating_point():
        return NotImplemented
    nothing = _zero(input)
    apart = run(aten.clamp_min.default, run(aten.rsub.Scalar, input, margin), 0)
    apart = run(aten.where.self, run(aten.ne.Scalar, target, 1), apart, nothing)
    close = run(aten.where.self, run(aten.ne.Scalar, target, -1), input, nothing)
    return _reduced(run, run(aten.add.Tensor, apart, close), reduction)


def _cosine_embedding_loss(
    run: Run, one: Tensor, two: Tensor, target: Tensor, margin: float = 0.0, reduction: int = _MEAN
) -> Any:
    rank = target.dim()
    if rank > 1 or one.dim() != rank + 1 or not _are_alike(one, two):
        return NotImplemented
    products, squares, others = (
        run(aten.sum.dim_IntList, run(aten.mul.Tensor, *pair), [rank]) for pair in ((one, two), (one, one), (two, two))
    )
    squares, others = (run(aten.add.Tensor, item, _EPSILON) for item in (squares, others))
    cosine = run(aten.div.Tensor, products, run(aten.sqrt.default, run(aten.mul.Tensor, squares, others)))
    nothing = _zero(cosine)
    close = run(aten.where.self, run(aten.eq.Scalar, target, 1), run(aten.rsub.Scalar, cosine, 1), nothing)
    apart = run(aten.where.self, run(aten.eq.Scalar, target, -1), _hinge(run, cosine, -margin), nothing)
    return _reduced(run, run(aten.add.Tensor, close, apart), reduction)


def _distance(run: Run, one: Tensor, two: Tensor, p: float, eps: float) -> Any:
    difference = run(aten.add.Tensor, run(aten.sub.Tensor, one, two), eps)
    return run(aten.norm.ScalarOpt_dim, difference, p, [difference.dim() - 1], False)


def _triplet_margin_loss(
    run: Run, anchor: Tensor, positive: Tensor, negative: Tensor, margin: float = 1.0, p: float = 2.0, eps: float = 1e-6,
    swap: bool = False, reduction: int = _MEAN,
) -> Any:  # fmt: skip
    if not _are_alike(anchor, positive, negative) or not anchor.dim():
        return NotImplemented
    close, apart = (_distance(run, anchor, other, p, eps) for other in (positive, negative))
    if swap:
        apart = run(aten.minimum.default, apart, _distance(run, positive, negative, p, eps))
    return _reduced(run, _hinge(run, run(aten.sub.Tensor, close, apart), margin), reduction)


def multi_margin_loss(
    run: Run, input: Tensor, target: Tensor, p: float = 1, margin: float = 1, weight: Tensor | None = None,
    reduction: int = _MEAN,
) -> Any:  # fmt: skip
    """``sum_i max(0, margin - input[target] + input[i])^p / classes`` over the other classes; also of a single row."""
    rank, classes = input.dim(), input.shape[-1] if input.dim() else 0
    fits = target.shape == input.shape[:-1] or (rank == 1 and target.shape == (1,))
    if p not in (1, 2) or rank not in (1, 2) or not fits or not classes or not _is_labelled(input, target):
        return NotImplemented
    if weight is not None and (weight.dtype is not input.dtype or weight.shape != (classes,)):
        return NotImplemented
    place = target if target.dim() == rank == 1 else run(aten.unsqueeze.default, target, rank - 1)
    picked = run(aten.gather.default, input, rank - 1, place)
    losses = run(aten.sub.Tensor, input, picked)
    # At the kink itself torch's kernel has no slope, unlike that of the other losses with margins.
    losses = run(aten.relu.default, run(aten.add.Tensor, losses, margin)) if p == 1 else _hinge(run, losses, margin)
    if p == 2:
        losses = run(aten.mul.Tensor, losses, losses)
    if weight is not None:
        losses = run(aten.mul.Tensor, losses, run(aten.index.Tensor, weight, [place]))
    # The class itself does not count.
    others = run(aten.ne.Tensor, place, torch.arange(classes, device=target.device))
    losses = run(aten.where.self, others, losses, _zero(losses))
    if reduction == _MEAN:
        return run(aten.mean.default, losses)
    if reduction == _SUM:
        return run(aten.div.Tensor, run(aten.sum.default, losses), classes)
    return run(aten.mean.dim, losses, [rank - 1], target.dim() == rank)


def multilabel_margin_loss(run: Run, input: Tensor, target: Tensor, reduction: int = _MEAN) -> Any:
    """``sum_ij max(0, 1 - input[target[j]] + input[i]) / classes`` and the mask of the labels, in numbers.

    The labels ``target[j]`` are those before the first -1, and ``i`` is none of them.
    """
    found = _multilabel(run, input, target, reduction)
    if found is NotImplemented:
        return found
    loss, label = found
    return loss, run(aten._to_copy.default, run(aten.squeeze.dim, label, input.dim() - 1), dtype=input.dtype)


def is_plain_multilabel(input: Any, target: Any) -> bool:
    """Whether the op's own kernels serve a loss and its slopes: for rows of numbers with a row of labels each."""
    fits = input.dim() in (1, 2) and target.shape == input.shape and input.numel() > 0
    return fits and input.dtype in (torch.float32, torch.float64) and target.dtype is torch.long


def _multilabel_margin_loss_alone(run: Run, input: Tensor, target: Tensor, reduction: int = _MEAN) -> Any:
    if is_plain_multilabel(input, target):
        return run(aten.multilabel_margin_loss_forward.default, input, target, reduction)[0]
    found = _multilabel(run, input, target, reduction)
    return found if found is NotImplemented else found[0]


def _multilabel(run: Run, input: Tensor, target: Tensor, reduction: int) -> Any:
    """The loss, and which class is a label, with a dimension for the labels before that of the classes."""
    rank, classes = input.dim(), input.shape[-1] if input.dim() else 0
    if rank not in (1, 2) or target.shape != input.shape or not input.numel() or not _is_labelled(input, target):
        return NotImplemented
    # What depends on the labels alone is a constant.
    kept = run(aten.eq.Scalar, run(aten.cumsum.default, run(aten.lt.Scalar, target, 0), -1), 0)
    place = run(aten.mul.Tensor, target, kept)
    counted = run(aten.unsqueeze.default, kept, rank)
    grid = torch.arange(classes, device=target.device)
    label = run(aten.logical_and.default, counted, run(aten.eq.Tensor, run(aten.unsqueeze.default, place, rank), grid))
    label = run(aten.any.dim, label, rank - 1, True)
    picked = run(aten.unsqueeze.default, run(aten.gather.default, input, rank - 1, place), rank)
    losses = _hinge(run, run(aten.sub.Tensor, run(aten.unsqueeze.default, input, rank - 1), picked), 1.0)
    losses = run(aten.where.self, run(aten.gt.Tensor, counted, label), losses, _zero(losses))
    if reduction in (_MEAN, _SUM):
        total, count = run(aten.sum.default, losses), input.numel() if reduction == _MEAN else classes
    else:
        total, count = run(aten.sum.dim_IntList, losses, [rank - 1, rank]), classes
    return run(aten.div.Tensor, total, count), label


def _is_labelled(input: Tensor, target: Tensor) -> bool:
    return input.is_floating_point() and target.dtype is torch.long


#: By the op that arrives.
DIRECT_LOSSES: dict[Any, Any] = {
    aten.cosine_embedding_loss.default: _cosine_embedding_loss,
    aten.hinge_embedding_loss.default: _hinge_embedding_loss,
    aten.kl_div.default: _kl_div,
    aten.l1_loss.default: _l1_loss,
    aten.margin_ranking_loss.default: _margin_ranking_loss,
    aten.multi_margin_loss.default: multi_margin_loss,
    aten.multilabel_margin_loss.default: _multilabel_margin_loss_alone,
    aten.multilabel_margin_loss_forward.default: multilabel_margin_loss,
    aten.poisson_nll_loss.default: _poisson_nll_loss,
    aten.triplet_margin_loss.default: _triplet_margin_loss,
}

__all__ = ["DIRECT_LOSSES", "multi_margin_loss", "multilabel_margin_loss"]
