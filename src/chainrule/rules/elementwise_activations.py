"""Activations and their backward ops: first derivatives, and second ones where a backward op needs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from chainrule.calls import hardsigmoid_backward, mish_backward, silu_backward
from chainrule.maps.staging import Program
from chainrule.maps.terms import Axis, Dims, Factor, Term, dims_of, new_axes
from chainrule.rules.base import Call, Edge, Rule, formula_node, single
from chainrule.rules.conventions import clamp_up_to
from chainrule.rules.elementwise_named import Arguments, Over, elementwise

aten = torch.ops.aten

_TANH_SCALE = math.sqrt(2 / math.pi)
_TANH_CUBE = 0.044715
SELU_ALPHA = 1.6732632423543772
SELU_SCALE = 1.0507009873554805


def _step(condition: Any, like: Any) -> Any:
    return condition.to(like.dtype)


def _density(x: Any) -> Any:
    return torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))


def _gelu(a: Arguments) -> Any:
    return a.by_kernel(aten.gelu_backward.default, a.self, approximate=a.approximate)


def gelu_curvature(x: Any, approximate: str) -> Any:
    """The second derivative of gelu."""
    if approximate == "none":
        return _density(x) * (2 - x * x)
    t = torch.tanh(_TANH_SCALE * (x + _TANH_CUBE * x * x * x))
    inner = _TANH_SCALE * (1 + 3 * _TANH_CUBE * x * x)
    bend = _TANH_SCALE * 6 * _TANH_CUBE * x
    return (1 - t * t) * (inner + 0.5 * x * (bend - 2 * t * inner * inner))


def _silu(a: Arguments) -> Any:
    return a.by_kernel(silu_backward, a.self)


def _silu_curvature(x: Any) -> Any:
    s = torch.sigmoid(x)
    return s * (1 - s) * (2 + x * (1 - 2 * s))


def _mish(a: Arguments) -> Any:
    return a.by_kernel(mish_backward, a.self)


def _mish_curvature(x: Any) -> Any:
    t, s = torch.tanh(torch.nn.functional.softplus(x)), torch.sigmoid(x)
    return (1 - t * t) * s * (2 + x * (1 - s - 2 * t * s))


def _elu(a: Arguments, x: Any, alpha: float, scale: float, input_scale: float) -> Any:
    return a.by_kernel(aten.elu_backward.default, alpha, scale, input_scale, False, x)


def _elu_backward_slope(a: Arguments) -> Any:
    if not a.is_result:
        return _elu(a, a.self_or_result, a.alpha, a.scale, a.input_scale)
    y = a.self_or_result
    return torch.where(y <= 0, (y + a.alpha * a.scale) * a.input_scale, a.scale)


def _elu_backward_curvature(a: Arguments) -> Any:
    y, rate = a.self_or_result, a.input_scale
    if a.is_result:
        return a.grad_output * torch.where(y < 0, torch.full_like(y, rate), 0.0)
    below = (a.alpha * a.scale * rate * rate) * torch.exp(torch.clamp(y, max=0) * rate)
    return a.grad_output * torch.where(y < 0, below, 0.0)


def _between(x: Any, low: float, high: float) -> Any:
    return _step((x > low) & (x < high), x)


def _passed(a: Arguments, op: Any, *numbers: Any) -> Any:
    """A derivative of ones and zeros, by the backward op."""
    passed = a.by_kernel(op, a.self, *numbers)
    return a.mask(passed, passed)


def _above(x: Any, bound: float) -> Any:
    return _step(torch.logical_not(x <= bound), x)


def _passing(a: Arguments) -> Any:
    """The mask of ``threshold_backward``, in the spelling of the op it is the derivative of, so that it is made once."""
    if a.threshold != 0:
        return _above(a.self, a.threshold)
    kept = a.self
    positive = a.producer("self") is aten.relu.default
    return a.mask(_step(kept != 0, kept) if positive else _above(kept, 0), kept)


def _hardsigmoid_slope(a: Arguments) -> Any:
    slope = a.by_kernel(hardsigmoid_backward, a.self)
    return a.behind(slope, slope)


def _hardswish_slope(a: Arguments) -> Any:
    return a.behind(_above(a.self, -3), a.by_kernel(aten.hardswish_backward.default, a.self))


def _softplus(a: Arguments) -> Any:
    return a.by_kernel(aten.softplus_backward.default, a.self, a.beta, a.threshold)


def _softplus_curvature(x: Any, beta: float, threshold: float) -> Any:
    s = torch.sigmoid(x * beta)
    return torch.where(x * beta >= threshold, 0.0, beta * s * (1 - s))


def logit_slope(x: Any, eps: float | None) -> Any:
    """The derivative of logit; NaN outside [0, 1] without ``eps``, 0 outside [eps, 1 - eps] with it."""
    if eps is None:
        return torch.where((x >= 0) & (x <= 1), torch.reciprocal(x * (1 - x)), math.nan)
    inside = (x >= eps) & (x <= 1 - eps)
    return torch.where(inside, torch.reciprocal(x * (1 - x)), 0.0)


def _logit_curvature(x: Any, eps: float | None) -> Any:
    slope = logit_slope(x, eps)
    return (2 * x - 1) * slope * slope


def _leaky(a: Arguments, slope: float) -> Any:
    return a.by_kernel(aten.leaky_relu_backward.default, a.self, slope, False)


def _rrelu(a: Arguments) -> Any:
    return _leaky(a, (a.lower + a.upper) / 2) if not a.training else a.out1


def _hardtanh(a: Arguments) -> Any:
    return _passed(a, aten.hardtanh_backward.default, a.min_val, a.max_val)


def _shrunk(a: Arguments) -> Any:
    return _passed(a, aten.softshrink_backward.default, a.lambd)


def _log_sigmoid(a: Arguments, buffer: Any) -> Any:
    # Some devices' kernels keep nothing, and need nothing kept.
    if tuple(buffer.shape) != tuple(a.self.shape):
        return torch.sigmoid(-a.self)
    return a.by_kernel(aten.log_sigmoid_backward.default, a.self, buffer)


def _sigmoid_bend(x: Any) -> Any:
    s = torch.sigmoid(x)
    return s * (1 - s)


def _glu(call: Call) -> Iterable[Edge]:
    """``first * sigmoid(second)`` of the two halves of a dimension."""
    item = call.args[0]
    if not call.is_active(item):
        return
    shape = call.shape(item)
    dim = call.argument("dim") % len(shape)
    half = shape[dim] // 2
    axes = new_axes(call.out_shape)
    # The input's dimension is two halves, each as long as the output's.
    which = Axis(2)
    halves = (*axes[:dim], which, *axes[dim:])

    def formula(program: Program) -> Any:
        gate = torch.sigmoid(torch.narrow(call.stage(program, item), dim, half, half))
        return torch.stack([gate, call.stage_output(program) * (1 - gate)], dim)

    node = formula_node(call, tuple(axis.size for axis in halves), formula)
    own = dims_of(axes)
    in_dims: Dims = (*own[:dim], (which, axes[dim]), *own[dim + 1 :])
    yield single(call, item, [Term(own, in_dims, (Factor(node, halves),))])


def _of(slope: Callable[[Any], Any]) -> Rule:
    return elementwise(self_=lambda a: slope(a.self))


def _backward(slope: Callable[[Arguments], Any], curvature: Callable[[Arguments], Any] | None = None) -> Rule:
    """A backward op ``grad_output * slope(self)``."""
    if curvature is None:
        return elementwise(grad_output=slope)
    bend = curvature
    return elementwise(grad_output=slope, self_=lambda a: a.grad_output * bend(a))


_LINEAR_PIECES: dict[Any, Rule] = {
    aten.leaky_relu.default: elementwise(self_=lambda a: _leaky(a, a.negative_slope)),
    aten.hardtanh.default: elementwise(self_=_hardtanh),
    aten.hardsigmoid.default: elementwise(self_=_hardsigmoid_slope),
    aten.hardswish.default: elementwise(self_=_hardswish_slope),
    aten.hardshrink.default: elementwise(self_=_shrunk),
    aten.softshrink.default: elementwise(self_=_shrunk),
    aten.threshold.default: elementwise(self_=lambda a: _above(a.self, a.threshold)),
    aten.rrelu_with_noise.default: elementwise(self_=lambda a: _leaky(a, (a.lower + a.upper) / 2)),
    aten.rrelu_with_noise_functional.default: elementwise(self_=_rrelu),
    aten._prelu_kernel.default: elementwise(
        self_=lambda a: torch.where(a.self > 0, 1.0, a.weight),
        weight=Over("self", lambda x: clamp_up_to(x, None, 0.0)),
    ),
}

_SMOOTH: dict[Any, Rule] = {
    aten.elu.default: elementwise(self_=lambda a: _elu(a, a.self, a.alpha, a.scale, a.input_scale)),
    aten.celu.default: elementwise(self_=lambda a: _elu(a, a.self, a.alpha, 1.0, 1.0 / a.alpha)),
    aten.selu.default: elementwise(self_=lambda a: _elu(a, a.self, SELU_ALPHA, SELU_SCALE, 1.0)),
    aten.gelu.default: elementwise(self_=_gelu),
    aten.silu.default: elementwise(self_=_silu),
    aten.mish.default: elementwise(self_=_mish),
    aten.log_sigmoid_forward.default: elementwise(self_=lambda a: _log_sigmoid(a, a.out1)),
    aten.softplus.default: elementwise(self_=_softplus),
    aten.logit.default: elementwise(self_=lambda a: logit_slope(a.self, a.eps)),
    aten.glu.default: Rule("pointwise", _glu),
}

_BACKWARD: dict[Any, Rule] = {
    aten.tanh_backward.default: elementwise(
        grad_output=lambda a: 1 - a.output * a.output, output=lambda a: -2 * a.output * a.grad_output
    ),
    aten.sigmoid_backward.default: elementwise(
        grad_output=lambda a: a.output * (1 - a.output), output=lambda a: a.grad_output * (1 - 2 * a.output)
    ),
    aten.threshold_backward.default: _backward(_passing),
    aten.leaky_relu_backward.default: _backward(lambda a: _leaky(a, a.negative_slope)),
    aten.hardtanh_backward.default: _backward(_hardtanh),
    aten.hardsigmoid_backward.default: _backward(_hardsigmoid_slope),
    aten.hardshrink_backward.default: elementwise(grad_out=_shrunk),
    aten.softshrink_backward.default: _backward(_shrunk),
    aten.hardswish_backward.default: _backward(_hardswish_slope, lambda a: _between(a.self, -3, 3) / 3),
    aten.gelu_backward.default: _backward(_gelu, lambda a: gelu_curvature(a.self, a.approximate)),
    aten.silu_backward.default: _backward(_silu, lambda a: _silu_curvature(a.self)),
    aten.mish_backward.default: _backward(_mish, lambda a: _mish_curvature(a.self)),
    aten.elu_backward.default: elementwise(grad_output=_elu_backward_slope, self_or_result=_elu_backward_curvature),
    aten.softplus_backward.default: _backward(
        _softplus, lambda a: _softplus_curvature(a.self, a.beta, a.threshold)
    ),
    aten.log_sigmoid_backward.default: _backward(
        lambda a: _log_sigmoid(a, a.buffer), lambda a: -_sigmoid_bend(a.self)
    ),
    aten.logit_backward.default: _backward(
        lambda a: logit_slope(a.self, a.eps), lambda a: _logit_curvature(a.self, a.eps)
    ),
}

RULES: dict[Any, Rule] = {**_LINEAR_PIECES, **_SMOOTH, **_BACKWARD}

__all__ = ["RULES", "SELU_ALPHA", "SELU_SCALE", "gelu_curvature", "logit_slope"]
