"""Special functions, and ops of two and three operands: extrema, interpolation, remainders, element-wise losses."""

from __future__ import annotations

import math
from typing import Any

import torch

from chainrule.rules.base import Call, Rule
from chainrule.rules.conventions import TIES_ARE_SHARED, clamp_inside, clamp_up_to
from chainrule.rules.elementwise_named import Arguments, Over, Static, ZeroWith, elementwise, loss

aten = torch.ops.aten


def _safe(x: Any, condition: Any) -> Any:
    """``x`` with ones where the condition holds, so that an unused branch stays finite in every order."""
    return torch.where(condition, 1.0, x)


def _sinc(a: Arguments) -> Any:
    x, origin = a.self, a.self == 0
    safe = _safe(x, origin)
    return torch.where(origin, x * (-(math.pi**2) / 3), (torch.cos(math.pi * safe) - torch.sinc(safe)) / safe)


def _i1(a: Arguments) -> Any:
    x, origin = a.self, a.self == 0
    return torch.where(origin, 0.5, torch.special.i0(x) - a.out / _safe(x, origin))


def _i1e(a: Arguments) -> Any:
    x, origin = a.self, a.self == 0
    safe = _safe(x, origin)
    return torch.where(origin, 0.5, torch.special.i0e(x) - a.out * (torch.sgn(x) + torch.reciprocal(safe)))


def _log_gamma_slope(a: Arguments) -> Any:
    slope = torch.digamma(a.self)
    for j in range(1, a.p):
        slope = slope + torch.digamma(a.self - 0.5 * j)
    return slope


def _atan2(numerator: str, sign: float) -> Any:
    def slope(a: Arguments) -> Any:
        y, x = a.self, a.other
        square = y * y + x * x
        origin = square == 0
        return torch.where(origin, 0.0, getattr(a, numerator) * sign / _safe(square, origin))

    return slope


def _log_times(x: Any, y: Any, offset: int) -> Any:
    """The derivative of ``x * log(y + offset)`` with respect to ``x``; 0 where both are too small for a logarithm."""
    if isinstance(y, (int, float)):
        shifted = y + offset
        log = math.log(shifted) if shifted > 0 else -math.inf if shifted == 0 else math.nan
        return torch.full_like(x, log) if shifted > 0 else torch.where(x == 0, torch.zeros_like(x), log)
    return torch.where((x == 0) & (y <= -offset), 0.0, torch.log1p(y) if offset else torch.log(y))


def _larger(first: str, second: str) -> Any:
    """One where ``first`` is the larger, a half at ties; one for both beside NaN, as in torch's reverse rule."""

    def slope(a: Arguments) -> Any:
        x, y = getattr(a, first), getattr(a, second)
        return a.graded(torch.where(x == y, 0.5, torch.logical_not(x < y).to(a.out.dtype)))

    return slope


def _first_taken(a: Arguments, larger: bool) -> Any:
    x, y = a.self, a.other
    return torch.logical_or(x >= y if larger else x <= y, torch.isnan(y))


def _taken(larger: bool, first: bool) -> Any:
    if TIES_ARE_SHARED:
        return _larger("self", "other") if larger is first else _larger("other", "self")

    def slope(a: Arguments) -> Any:
        taken = _first_taken(a, larger)
        return (taken if first else torch.logical_not(taken)).to(a.out.dtype)

    return slope


def _between(a: Arguments) -> Any:
    """The derivative of a clamp between two tensors by the first: a half at a bound, one where the bounds are equal or NaN."""
    x, low, high = a.self, a.min, a.max
    inside = torch.logical_not((x < low) | (x > high))
    return a.graded(torch.where(((x == low) | (x == high)) & (low < high), 0.5, inside.to(a.out.dtype)))


def _bounded(a: Arguments, taken: Any, tie: Any) -> Any:
    """Likewise by a bound."""
    return a.graded(torch.where(tie & (a.min < a.max), 0.5, taken.to(a.out.dtype)))


def _clamp_self(a: Arguments) -> Any:
    x, low, high = a.self, a.min, a.max
    if TIES_ARE_SHARED:
        if low is None or high is None:
            return _larger("self", "min")(a) if high is None else _larger("max", "self")(a)
        return _between(a)
    inside = None if low is None else x >= low
    if high is not None:
        inside = x <= high if inside is None else inside & (x <= high)
    return torch.ones_like(x) if inside is None else inside.to(a.out.dtype)


def _clamp_low(a: Arguments) -> Any:
    if TIES_ARE_SHARED:
        if a.max is None:
            return _larger("min", "self")(a)
        return _bounded(a, (a.self < a.min) & (a.min <= a.max), a.self == a.min)
    below = a.self < a.min
    return (below if a.max is None else below & (a.min < a.max)).to(a.out.dtype)


def _clamp_high(a: Arguments) -> Any:
    if TIES_ARE_SHARED:
        if a.min is None:
            return _larger("self", "max")(a)
        return _bounded(a, ((a.self > a.max) & (a.min <= a.max)) | (a.max < a.min), a.self == a.max)
    above = a.self > a.max
    return (above if a.min is None else above | (a.max < a.min)).to(a.out.dtype)


def _log_ndtr(a: Arguments) -> Any:
    """The density over the distribution function: each of two forms where its own derivatives are finite and exact."""
    x = a.self
    left = math.sqrt(2 / math.pi) / torch.special.erfcx(torch.clamp(x, max=5) * -math.sqrt(0.5))
    right = torch.exp(-0.5 * x * x - a.out) * (1 / math.sqrt(2 * math.pi))
    return torch.where(x < 5, left, right)


def _copysign(a: Arguments) -> Any:
    origin = a.self == 0
    return torch.where(origin, 0.0, torch.sign(a.out / _safe(a.self, origin)))


def _value(call: Call) -> float:
    return float(call.argument("value"))


def _quotient(rounding: str) -> Any:
    return lambda a: -torch.div(a.self, a.other, rounding_mode=rounding)


_SPECIAL: dict[Any, Rule] = {
    aten.erf.default: elementwise(self_=lambda a: torch.exp(-a.self * a.self) * (2 / math.sqrt(math.pi))),
    aten.erfc.default: elementwise(self_=lambda a: torch.exp(-a.self * a.self) * (-2 / math.sqrt(math.pi))),
    aten.erfinv.default: elementwise(self_=lambda a: torch.exp(a.out * a.out) * (math.sqrt(math.pi) / 2)),
    aten.special_erfcx.default: elementwise(self_=lambda a: 2 * a.self * a.out - 2 / math.sqrt(math.pi)),
    aten.special_ndtri.default: elementwise(self_=lambda a: torch.exp(0.5 * a.out * a.out) * math.sqrt(2 * math.pi)),
    aten.special_log_ndtr.default: elementwise(self_=_log_ndtr),
    aten.special_entr.default: elementwise(self_=lambda a: -1 - torch.log(a.self)),
    aten.lgamma.default: elementwise(self_=lambda a: torch.digamma(a.self)),
    aten.digamma.default: elementwise(self_=lambda a: torch.polygamma(1, a.self)),
    aten.polygamma.default: elementwise(self_=lambda a: torch.polygamma(a.n + 1, a.self)),
    # What was drawn stays: the derivative is that of this sample, by the implicit function of its distribution.
    aten._standard_gamma.default: elementwise(self_=lambda a: torch._standard_gamma_grad(a.self, a.out)),
    aten.mvlgamma.default: elementwise(self_=_log_gamma_slope),
    aten.special_zeta.default: elementwise(other=lambda a: -a.self * torch.special.zeta(a.self + 1, a.other)),
    aten.special_zeta.self_scalar: elementwise(
        other=lambda a: torch.special.zeta(float(a.self) + 1, a.other) * -float(a.self)
    ),
    aten.sinc.default: elementwise(self_=_sinc),
    aten.i0.default: elementwise(self_=lambda a: torch.special.i1(a.self)),
    aten.special_i0e.default: elementwise(self_=lambda a: torch.special.i1e(a.self) - torch.sgn(a.self) * a.out),
    aten.special_i1.default: elementwise(self_=_i1),
    aten.special_i1e.default: elementwise(self_=_i1e),
    aten.deg2rad.default: elementwise(self_=math.pi / 180),
    aten.rad2deg.default: elementwise(self_=180 / math.pi),
    aten.frac.default: elementwise(self_=1.0),
    aten.nan_to_num.default: elementwise(self_=lambda a: torch.isfinite(a.self).to(a.out.dtype)),
}

_X_LOG_Y: dict[Any, Rule] = {
    aten.xlogy.Tensor: elementwise(self_=lambda a: _log_times(a.self, a.other, 0), other=lambda a: a.self / a.other),
    aten.xlogy.Scalar_Other: elementwise(self_=lambda a: _log_times(a.self, a.other, 0)),
    aten.xlogy.Scalar_Self: elementwise(other=lambda a: float(a.self) / a.other),
    aten.special_xlog1py.default: elementwise(
        self_=lambda a: _log_times(a.self, a.other, 1), other=lambda a: a.self / (a.other + 1)
    ),
    aten.special_xlog1py.other_scalar: elementwise(self_=lambda a: _log_times(a.self, a.other, 1)),
    aten.special_xlog1py.self_scalar: elementwise(other=lambda a: float(a.self) / (a.other + 1)),
}

_OPERANDS: dict[Any, Rule] = {
    aten.atan2.default: elementwise(self_=_atan2("other", 1.0), other=_atan2("self", -1.0)),
    aten.hypot.default: elementwise(self_=lambda a: a.self / a.out, other=lambda a: a.other / a.out),
    aten.fmod.Tensor: elementwise(self_=1.0, other=_quotient("trunc")),
    aten.fmod.Scalar: elementwise(self_=1.0),
    aten.remainder.Tensor: elementwise(self_=1.0, other=_quotient("floor")),
    aten.remainder.Scalar: elementwise(self_=1.0),
    aten.remainder.Scalar_Tensor: elementwise(
        other=lambda a: -torch.floor(torch.reciprocal(a.other) * float(a.self))
    ),
    aten.maximum.default: elementwise(self_=_larger("self", "other"), other=_larger("other", "self")),
    aten.minimum.default: elementwise(self_=_larger("other", "self"), other=_larger("self", "other")),
    aten.fmax.default: elementwise(self_=_taken(True, True), other=_taken(True, False)),
    aten.fmin.default: elementwise(self_=_taken(False, True), other=_taken(False, False)),
    aten.lerp.Scalar: elementwise(
        self_=Static(lambda call: 1 - call.argument("weight")), end=Static(lambda call: call.argument("weight"))
    ),
    aten.lerp.Tensor: elementwise(
        self_=Over("weight", lambda w: 1 - w), end=Over("weight", lambda w: w), weight=lambda a: a.end - a.self
    ),
    aten.addcmul.default: elementwise(
        self_=1.0,
        tensor1=ZeroWith("tensor2", lambda a: a.tensor2 * a.value),
        tensor2=ZeroWith("tensor1", lambda a: a.tensor1 * a.value),
    ),
    aten.addcdiv.default: elementwise(
        self_=1.0,
        tensor1=lambda a: torch.reciprocal(a.tensor2) * a.value,
        tensor2=ZeroWith("tensor1", lambda a: -a.tensor1 / (a.tensor2 * a.tensor2) * a.value),
    ),
    aten.clamp.Tensor: elementwise(self_=_clamp_self, min=_clamp_low, max=_clamp_high),
    aten.clamp_min.Tensor: elementwise(self_=_clamp_self, min=_clamp_low),
    aten.clamp_max.Tensor: elementwise(self_=_clamp_self, max=_clamp_high),
    aten.copysign.Tensor: elementwise(self_=_copysign),
    aten.copysign.Scalar: elementwise(self_=_copysign),
    aten.logaddexp.default: elementwise(
        self_=lambda a: torch.sigmoid(a.self - a.other), other=lambda a: torch.sigmoid(a.other - a.self)
    ),
    aten.logaddexp2.default: elementwise(
        self_=lambda a: torch.sigmoid((a.self - a.other) * math.log(2)),
        other=lambda a: torch.sigmoid((a.other - a.self) * math.log(2)),
    ),
    aten.angle.default: Rule("constant", lambda call: (), reads=False),
}


# Losses: the derivative of one element's loss with respect to the prediction, z = prediction - target.


def _smooth_slope(z: Any, beta: float) -> Any:
    return torch.sign(z) if beta == 0 else clamp_inside(z / beta, -1.0, 1.0)


def _smooth_bend(z: Any, beta: float) -> Any:
    return torch.zeros_like(z) if beta == 0 else (torch.abs(z) < beta).to(z.dtype) / beta


def _smooth_l1(a: Arguments) -> Any:
    return _smooth_slope(a.self - a.target, a.beta)


def _huber(a: Arguments) -> Any:
    return clamp_up_to(a.self - a.target, -a.delta, a.delta)


def _weighted(a: Arguments, value: Any) -> Any:
    return value if a.weight is None else value * a.weight


def _bce_self(a: Arguments) -> Any:
    x = a.self
    return _weighted(a, (x - a.target) / torch.clamp((1 - x) * x, min=1e-12))


def _bce_target(a: Arguments) -> Any:
    return _weighted(a, torch.clamp(torch.log1p(-a.self), min=-100) - torch.clamp(torch.log(a.self), min=-100))


def _bce_logits_self(a: Arguments) -> Any:
    s, t = torch.sigmoid(a.self), a.target
    if a.pos_weight is None:
        return _weighted(a, s - t)
    positive = a.pos_weight * t
    return _weighted(a, (positive + 1 - t) * s - positive)


def _bce_logits_target(a: Arguments) -> Any:
    x = a.self
    if a.pos_weight is None:
        return _weighted(a, -x)
    return _weighted(a, (1 - a.pos_weight) * torch.nn.functional.logsigmoid(x) - x)


def _bce_weight(a: Arguments) -> Any:
    surprise, other = torch.clamp(torch.log(a.self), min=-100), torch.clamp(torch.log1p(-a.self), min=-100)
    return -(a.target * surprise + (1 - a.target) * other)


def _bce_logits_weight(a: Arguments) -> Any:
    x, t = a.self, a.target
    surprise = torch.nn.functional.logsigmoid(x)
    return (1 - t) * x - (surprise if a.pos_weight is None else (1 + (a.pos_weight - 1) * t) * surprise)


def _bce_logits_positive(a: Arguments) -> Any:
    return _weighted(a, -a.target * torch.nn.functional.logsigmoid(a.self))


def _soft_margin_self(a: Arguments) -> Any:
    return -a.target * torch.sigmoid(-a.target * a.self)


_LOSSES: dict[Any, Rule] = {
    aten.mse_loss.default: loss(self_=lambda a: 2 * (a.self - a.target), target=lambda a: 2 * (a.target - a.self)),
    aten.smooth_l1_loss.default: loss(self_=_smooth_l1, target=lambda a: -_smooth_l1(a)),
    aten.huber_loss.default: loss(self_=_huber, target=lambda a: -_huber(a)),
    aten.binary_cross_entropy.default: loss(self_=_bce_self, target=_bce_target, weight=_bce_weight),
    aten.binary_cross_entropy_with_logits.default: loss(
        self_=_bce_logits_self,
        target=_bce_logits_target,
        weight=_bce_logits_weight,
        pos_weight=_bce_logits_positive,
    ),
    aten.soft_margin_loss.default: loss(
        self_=_soft_margin_self, target=lambda a: -a.self * torch.sigmoid(-a.target * a.self)
    ),
}


def _loss_backward(slope: Any, bend: Any) -> Rule:
    """A loss's backward op ``grad_output * slope(z) * scale``."""
    return elementwise(
        grad_output=lambda a: slope(a) * a.loss_scale,
        self_=lambda a: a.grad_output * bend(a) * a.loss_scale,
        target=lambda a: -a.grad_output * bend(a) * a.loss_scale,
    )


_LOSS_BACKWARD: dict[Any, Rule] = {
    aten.mse_loss_backward.default: _loss_backward(lambda a: 2 * (a.self - a.target), lambda a: 2.0),
    aten.smooth_l1_loss_backward.default: _loss_backward(
        _smooth_l1, lambda a: _smooth_bend(a.self - a.target, a.beta)
    ),
    aten.huber_loss_backward.default: _loss_backward(
        _huber, lambda a: (torch.abs(a.self - a.target) <= a.delta).to(a.self.dtype)
    ),
}

RULES: dict[Any, Rule] = {**_SPECIAL, **_X_LOG_Y, **_OPERANDS, **_LOSSES, **_LOSS_BACKWARD}

__all__ = ["RULES"]
