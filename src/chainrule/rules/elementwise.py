"""Element-wise ops: one line each, the derivative in torch code."""

from __future__ import annotations

import math
from typing import Any

import torch

from chainrule.maps.staging import Staged
from chainrule.rules.base import Call, Rule
from chainrule.rules.conventions import TIES_ARE_SHARED
from chainrule.rules.elementwise_named import Over, ZeroWith, elementwise
from chainrule.rules.families import Number, Other, pointwise

aten = torch.ops.aten


def _alpha(*args: Any, alpha: float = 1, **_: Any) -> float:
    return args[2] if len(args) > 2 else alpha


def _minus_alpha(*args: Any, alpha: float = 1, **_: Any) -> float:
    return -_alpha(*args, alpha=alpha)


def _pow_scalar(x: Any, exponent: float, out: Any) -> Any:
    if exponent == 0:
        return torch.zeros_like(x)
    if exponent == 1:
        return torch.ones_like(x)
    if exponent == 2:
        return 2 * x
    return exponent * torch.pow(x, exponent - 1)


def _is_above_one(call: Call) -> bool:
    exponent = call.argument("exponent")
    return isinstance(exponent, int | float) and exponent > 1


def _pow_base(x: Any, exponent: Any, out: Any) -> Any:
    return torch.where(exponent == 0, 0.0, exponent * torch.pow(x, exponent - 1))


def _pow_exponent(x: Any, exponent: Any, out: Any) -> Any:
    origin = x == 0
    at_origin = torch.where(exponent < 0, -math.inf, 0.0).to(out.dtype)
    return torch.where(origin, at_origin, out * torch.log(torch.where(origin, 1.0, x)))


def _pow_scalar_base(base: float, exponent: Any, out: Any) -> Any:
    if base == 0:
        # log(0) times an infinite result is that result with the other sign; no factor is infinite where the result is not.
        return torch.where(exponent >= 0, 0.0, -out)
    return out * math.log(base) if base > 0 else out * math.nan


def _reciprocal(y: Any) -> Any:
    if not isinstance(y, (int, float)):
        return torch.reciprocal(y)
    return 1 / y if y else math.copysign(math.inf, y)


def _div_first(x: Any, y: Any, out: Any) -> Any:
    return _reciprocal(y)


def _div_second(x: Any, y: Any, out: Any) -> Any:
    return -out / y


def _div_mode_first(x: Any, y: Any, out: Any, rounding_mode: str | None = None) -> Any:
    return _div_first(x, y, out) if rounding_mode is None else 0.0


def _div_mode_second(x: Any, y: Any, out: Any, rounding_mode: str | None = None) -> Any:
    return _div_second(x, y, out) if rounding_mode is None else 0.0


def _at_least(x: Any, low: Any) -> Any:
    return x > low if TIES_ARE_SHARED else x >= low


def _at_most(x: Any, high: Any) -> Any:
    return x < high if TIES_ARE_SHARED else x <= high


def _clamp(x: Any, low: Any = None, high: Any = None, out: Any = None) -> Any:
    # Positional tail: (x, min, max, out), (x, min, out) or with keywords.
    inside = None
    if low is not None:
        inside = _at_least(x, low)
    if high is not None:
        upper = _at_most(x, high)
        inside = upper if inside is None else inside & upper
    return torch.ones_like(x) if inside is None else inside.to(x.dtype)


def _positive(out: Any) -> Any:
    """One where ``out``, which is never negative, is not zero."""
    number = (out != 0).to(out.dtype)
    if isinstance(number, Staged):
        # A product with it need not make the mask.
        number.program.masks[number.slot] = out
    return number


def _clamp_rule(*args: Any, min: Any = None, max: Any = None) -> Any:
    x, *bounds, _out = args
    low = bounds[0] if bounds else min
    high = bounds[1] if len(bounds) > 1 else max
    return _clamp(x, low, high)


RULES: dict[Any, Rule] = {
    # linear
    aten.add.Tensor: pointwise(1.0, Number(_alpha)),
    aten.add.Scalar: pointwise(1.0),
    aten.sub.Tensor: pointwise(1.0, Number(_minus_alpha)),
    aten.sub.Scalar: pointwise(1.0),
    aten.rsub.Tensor: pointwise(Number(_minus_alpha), 1.0),
    aten.rsub.Scalar: pointwise(Number(_minus_alpha)),
    aten.neg.default: pointwise(-1.0),
    aten.positive.default: pointwise(1.0),
    aten.clone.default: pointwise(1.0),
    aten.alias.default: pointwise(1.0),
    aten.lift_fresh.default: pointwise(1.0),
    aten.lift_fresh_copy.default: pointwise(1.0),
    aten._to_copy.default: pointwise(1.0),
    aten.contiguous.default: pointwise(1.0),
    aten.copy.default: pointwise(None, 1.0),
    aten.mul.Tensor: pointwise(Other(1), Other(0)),
    aten.mul.Scalar: pointwise(Other(1)),
    aten.div.Tensor: elementwise(self_=Over("other", _reciprocal), other=ZeroWith("out", lambda a: -a.out / a.other)),
    aten.div.Scalar: pointwise(Number(lambda x, y: _reciprocal(y))),
    aten.div.Tensor_mode: pointwise(_div_mode_first, _div_mode_second),
    aten.div.Scalar_mode: pointwise(_div_mode_first),
    aten.reciprocal.default: pointwise(lambda x, out: -(out * out)),
    # powers, exponentials, logarithms
    aten.pow.Tensor_Scalar: elementwise(
        self_=ZeroWith("self", lambda a: _pow_scalar(a.self, a.exponent, None), _is_above_one)
    ),
    aten.pow.Tensor_Tensor: pointwise(_pow_base, _pow_exponent),
    aten.pow.Scalar: pointwise(None, _pow_scalar_base),
    aten.square.default: elementwise(self_=ZeroWith("self", lambda a: 2 * a.self)),
    aten.sqrt.default: pointwise(lambda x, out: 0.5 / out),
    aten.rsqrt.default: pointwise(lambda x, out: -0.5 * out * out * out),
    aten.exp.default: pointwise(lambda x, out: out),
    aten.exp2.default: pointwise(lambda x, out: out * math.log(2)),
    aten.expm1.default: pointwise(lambda x, out: out + 1),
    aten.log.default: pointwise(lambda x, out: torch.reciprocal(x)),
    aten.log2.default: pointwise(lambda x, out: torch.reciprocal(x * math.log(2))),
    aten.log10.default: pointwise(lambda x, out: torch.reciprocal(x * math.log(10))),
    aten.log1p.default: pointwise(lambda x, out: torch.reciprocal(x + 1)),
    # trigonometric and hyperbolic
    aten.sin.default: pointwise(lambda x, out: torch.cos(x)),
    aten.cos.default: pointwise(lambda x, out: -torch.sin(x)),
    aten.tan.default: pointwise(lambda x, out: 1 + out * out),
    aten.asin.default: pointwise(lambda x, out: torch.rsqrt(1 - x * x)),
    aten.acos.default: pointwise(lambda x, out: -torch.rsqrt(1 - x * x)),
    aten.atan.default: pointwise(lambda x, out: torch.reciprocal(1 + x * x)),
    aten.sinh.default: pointwise(lambda x, out: torch.cosh(x)),
    aten.cosh.default: pointwise(lambda x, out: torch.sinh(x)),
    aten.tanh.default: pointwise(lambda x, out: 1 - out * out),
    aten.asinh.default: pointwise(lambda x, out: torch.rsqrt(x * x + 1)),
    aten.acosh.default: pointwise(lambda x, out: torch.rsqrt(x * x - 1)),
    aten.atanh.default: pointwise(lambda x, out: torch.reciprocal(1 - x * x)),
    # activations
    aten.sigmoid.default: pointwise(lambda x, out: out * (1 - out)),
    # NaN passes, as in torch.
    aten.relu.default: pointwise(lambda x, out: _positive(out)),
    aten.clamp.default: pointwise(_clamp_rule),
    aten.clamp_min.default: pointwise(lambda x, low, out: _at_least(x, low).to(x.dtype)),
    aten.clamp_max.default: pointwise(lambda x, high, out: _at_most(x, high).to(x.dtype)),
    aten.abs.default: pointwise(lambda x, out: torch.sign(x)),
    # Of real numbers; of complex ones it is a direction, which reads them (see complex_functions.py).
    aten.sgn.default: Rule("constant", lambda call: ()),
    aten.where.self: elementwise(
        self_=Over("condition", lambda c: c), other=Over("condition", lambda c: torch.logical_not(c))
    ),
}
