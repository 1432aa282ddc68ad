"""Element-wise rules against torch's own derivatives and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import chainrule
from chainrule.rules import elementwise_activations, elementwise_special

aten = torch.ops.aten

#: float64 round-off over a few operations is near 1e-12; torch's own hardsigmoid has 1/6 in single precision (3e-8).
TOLERANCE = {"rtol": 1e-7, "atol": 1e-10}

Function = Callable[..., torch.Tensor]


def _values(*shape: int, low: float = -3.0, high: float = 3.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(shape, dtype=torch.float64, generator=generator)


# Op -> (a function of tensors, the range of each argument).
WIDE = (-4.0, 4.0)
UNIT = (0.05, 0.95)
POSITIVE = (0.3, 3.0)

TABLE: dict[Any, tuple[Function, tuple[tuple[float, float], ...]]] = {
    aten.leaky_relu.default: (lambda x: F.leaky_relu(x, 0.2), (WIDE,)),
    aten.hardtanh.default: (lambda x: F.hardtanh(x, -1.0, 2.0), (WIDE,)),
    aten.hardsigmoid.default: (F.hardsigmoid, (WIDE,)),
    aten.hardswish.default: (F.hardswish, (WIDE,)),
    aten.hardshrink.default: (F.hardshrink, (WIDE,)),
    aten.softshrink.default: (F.softshrink, (WIDE,)),
    aten.threshold.default: (lambda x: F.threshold(x, 0.5, 2.0), (WIDE,)),
    aten.rrelu_with_noise.default: (lambda x: F.rrelu(x, 0.1, 0.3), (WIDE,)),
    aten._prelu_kernel.default: (lambda x, w: aten._prelu_kernel(x, w), (WIDE, UNIT)),
    aten.elu.default: (lambda x: F.elu(x, 1.5), (WIDE,)),
    aten.celu.default: (lambda x: F.celu(x, 1.5), (WIDE,)),
    aten.selu.default: (F.selu, (WIDE,)),
    aten.gelu.default: (lambda x: F.gelu(x) + F.gelu(x, approximate="tanh"), (WIDE,)),
    aten.silu.default: (F.silu, (WIDE,)),
    aten.mish.default: (F.mish, (WIDE,)),
    aten.log_sigmoid_forward.default: (F.logsigmoid, (WIDE,)),
    aten.softplus.default: (lambda x: F.softplus(x, 2.0, 5.0), (WIDE,)),
    aten.logit.default: (lambda x: torch.logit(x) + torch.logit(x, 0.1), (UNIT,)),
    aten.glu.default: (lambda x: F.glu(torch.cat([x, 2 * x], 0), 0), (WIDE,)),
    aten.tanh_backward.default: (aten.tanh_backward, (WIDE, WIDE)),
    aten.sigmoid_backward.default: (aten.sigmoid_backward, (WIDE, WIDE)),
    aten.threshold_backward.default: (lambda g, x: aten.threshold_backward(g, x, 0.5), (WIDE, WIDE)),
    aten.leaky_relu_backward.default: (lambda g, x: aten.leaky_relu_backward(g, x, 0.2, False), (WIDE, WIDE)),
    aten.hardtanh_backward.default: (lambda g, x: aten.hardtanh_backward(g, x, -1.0, 1.0), (WIDE, WIDE)),
    aten.hardsigmoid_backward.default: (aten.hardsigmoid_backward, (WIDE, WIDE)),
    aten.hardshrink_backward.default: (lambda g, x: aten.hardshrink_backward(g, x, 0.5), (WIDE, WIDE)),
    aten.softshrink_backward.default: (lambda g, x: aten.softshrink_backward(g, x, 0.5), (WIDE, WIDE)),
    aten.hardswish_backward.default: (aten.hardswish_backward, (WIDE, WIDE)),
    aten.gelu_backward.default: (
        lambda g, x: aten.gelu_backward(g, x) + aten.gelu_backward(g, x, approximate="tanh"),
        (WIDE, WIDE),
    ),
    aten.silu_backward.default: (aten.silu_backward, (WIDE, WIDE)),
    aten.mish_backward.default: (aten.mish_backward, (WIDE, WIDE)),
    aten.elu_backward.default: (lambda g, x: aten.elu_backward(g, 1.5, 1.0, 1.0, False, x), (WIDE, WIDE)),
    aten.softplus_backward.default: (lambda g, x: aten.softplus_backward(g, x, 2.0, 5.0), (WIDE, WIDE)),
    aten.log_sigmoid_backward.default: (lambda g, x: aten.log_sigmoid_backward(g, x, torch.exp(-x.abs())), (WIDE, WIDE)),
    aten.logit_backward.default: (aten.logit_backward, (WIDE, UNIT)),
    aten.erf.default: (torch.erf, (WIDE,)),
    aten.erfc.default: (torch.erfc, (WIDE,)),
    aten.erfinv.default: (torch.erfinv, (UNIT,)),
    aten.special_erfcx.default: (torch.special.erfcx, (WIDE,)),
    aten.special_ndtri.default: (torch.special.ndtri, (UNIT,)),
    aten.special_log_ndtr.default: (torch.special.log_ndtr, (WIDE,)),
    aten.special_entr.default: (torch.special.entr, (POSITIVE,)),
    aten.lgamma.default: (torch.lgamma, (POSITIVE,)),
    aten.digamma.default: (torch.digamma, (POSITIVE,)),
    aten.polygamma.default: (lambda x: torch.polygamma(1, x), (POSITIVE,)),
    aten.mvlgamma.default: (lambda x: torch.mvlgamma(x + 2, 3), (POSITIVE,)),
    aten.special_zeta.default: (lambda y: torch.special.zeta(torch.full_like(y, 3.0), y), (POSITIVE,)),
    aten.special_zeta.self_scalar: (lambda y: torch.special.zeta(3.0, y), (POSITIVE,)),
    aten.sinc.default: (torch.sinc, (WIDE,)),
    aten.i0.default: (torch.special.i0, (WIDE,)),
    aten.special_i0e.default: (torch.special.i0e, (WIDE,)),
    aten.special_i1.default: (torch.special.i1, (WIDE,)),
    aten.special_i1e.default: (torch.special.i1e, (WIDE,)),
    aten.deg2rad.default: (torch.deg2rad, (WIDE,)),
    aten.rad2deg.default: (torch.rad2deg, (WIDE,)),
    aten.frac.default: (torch.frac, (WIDE,)),
    aten.nan_to_num.default: (torch.nan_to_num, (WIDE,)),
    aten.angle.default: (torch.angle, (WIDE,)),
    aten.xlogy.Tensor: (torch.xlogy, (WIDE, POSITIVE)),
    aten.xlogy.Scalar_Other: (lambda x: torch.xlogy(x, 2.5), (WIDE,)),
    aten.xlogy.Scalar_Self: (lambda y: torch.xlogy(2.5, y), (POSITIVE,)),
    aten.special_xlog1py.default: (torch.special.xlog1py, (WIDE, POSITIVE)),
    aten.special_xlog1py.other_scalar: (lambda x: torch.special.xlog1py(x, 2.5), (WIDE,)),
    aten.special_xlog1py.self_scalar: (lambda y: torch.special.xlog1py(2.5, y), (POSITIVE,)),
    aten.atan2.default: (torch.atan2, (WIDE, WIDE)),
    aten.hypot.default: (torch.hypot, (WIDE, WIDE)),
    aten.fmod.Tensor: (torch.fmod, (WIDE, POSITIVE)),
    aten.fmod.Scalar: (lambda x: torch.fmod(x, 0.7), (WIDE,)),
    aten.remainder.Tensor: (torch.remainder, (WIDE, POSITIVE)),
    aten.remainder.Scalar: (lambda x: torch.remainder(x, 0.7), (WIDE,)),
    aten.remainder.Scalar_Tensor: (lambda y: torch.remainder(5.3, y), (POSITIVE,)),
    aten.maximum.default: (torch.maximum, (WIDE, WIDE)),
    aten.minimum.default: (torch.minimum, (WIDE, WIDE)),
    aten.fmax.default: (torch.fmax, (WIDE, WIDE)),
    aten.fmin.default: (torch.fmin, (WIDE, WIDE)),
    aten.lerp.Scalar: (lambda x, y: torch.lerp(x, y, 0.3), (WIDE, WIDE)),
    aten.lerp.Tensor: (torch.lerp, (WIDE, WIDE, UNIT)),
    aten.addcmul.default: (lambda x, y, z: torch.addcmul(x, y, z, value=0.5), (WIDE, WIDE, WIDE)),
    aten.addcdiv.default: (lambda x, y, z: torch.addcdiv(x, y, z, value=0.5), (WIDE, WIDE, POSITIVE)),
    aten.clamp.Tensor: (torch.clamp, (WIDE, (-2.0, 0.5), (0.0, 2.0))),
    aten.clamp_min.Tensor: (torch.clamp_min, (WIDE, WIDE)),
    aten.clamp_max.Tensor: (torch.clamp_max, (WIDE, WIDE)),
    aten.copysign.Tensor: (torch.copysign, (WIDE, WIDE)),
    aten.copysign.Scalar: (lambda x: torch.copysign(x, -2.0), (WIDE,)),
    aten.logaddexp.default: (torch.logaddexp, (WIDE, WIDE)),
    aten.logaddexp2.default: (torch.logaddexp2, (WIDE, WIDE)),
    aten.mse_loss.default: (F.mse_loss, (WIDE, WIDE)),
    aten.smooth_l1_loss.default: (lambda x, t: aten.smooth_l1_loss(x, t, 2, 0.7), (WIDE, WIDE)),
    aten.huber_loss.default: (lambda x, t: aten.huber_loss(x, t, 0, 0.7), (WIDE, WIDE)),
    aten.binary_cross_entropy.default: (lambda x, t: F.binary_cross_entropy(x, t, 0.5 * torch.ones_like(x)), (UNIT, UNIT)),
    aten.binary_cross_entropy_with_logits.default: (
        lambda x, t: F.binary_cross_entropy_with_logits(x, t, pos_weight=2 * torch.ones_like(x)),
        (WIDE, UNIT),
    ),
    aten.soft_margin_loss.default: (lambda x: F.soft_margin_loss(x, torch.ones_like(x)), (WIDE,)),
    aten.mse_loss_backward.default: (lambda g, x, t: aten.mse_loss_backward(g, x, t, 0), (WIDE, WIDE, WIDE)),
    aten.smooth_l1_loss_backward.default: (
        lambda g, x, t: aten.smooth_l1_loss_backward(g, x, t, 0, 0.7),
        (WIDE, WIDE, WIDE),
    ),
    aten.huber_loss_backward.default: (lambda g, x, t: aten.huber_loss_backward(g, x, t, 0, 0.7), (WIDE, WIDE, WIDE)),
}

#: Reached only inside capture of an op that writes to its noise.
WITHOUT_ROW = {aten.rrelu_with_noise_functional.default, aten._standard_gamma.default}  # random

#: Torch has no derivative of these: finite differences are their oracle.
UNKNOWN_TO_TORCH = {
    aten.hardsigmoid_backward.default, aten.silu_backward.default, aten.mish_backward.default,
    aten.log_sigmoid_backward.default, aten.logit_backward.default, aten.remainder.Scalar_Tensor,
}  # fmt: skip

KNOWN = [pytest.param(*row, id=str(op)) for op, row in TABLE.items() if op not in UNKNOWN_TO_TORCH]
ROWS = [pytest.param(*row, id=str(op)) for op, row in TABLE.items()]


def _arguments(ranges: tuple[tuple[float, float], ...], *shape: int) -> tuple[torch.Tensor, ...]:
    return tuple(_values(*shape, low=low, high=high, seed=n) for n, (low, high) in enumerate(ranges))


def _tangents(function: Function, arguments: tuple[torch.Tensor, ...], step: float = 1e-6) -> torch.Tensor:
    """A directional derivative by central differences, along ones."""
    up = function(*(a + step for a in arguments))
    down = function(*(a - step for a in arguments))
    return (up - down) / (2 * step)


def test_every_op_has_a_row() -> None:
    declared = {*elementwise_activations.RULES, *elementwise_special.RULES}
    assert declared - WITHOUT_ROW == set(TABLE)


@pytest.mark.parametrize(("function", "ranges"), KNOWN)
def test_jacobians_agree_with_torch(function: Function, ranges: Any) -> None:
    arguments = _arguments(ranges, 2, 3)
    numbers = tuple(range(len(arguments)))
    expected = torch.func.jacrev(function, numbers)(*arguments)
    torch.testing.assert_close(chainrule.jacrev(function, numbers)(*arguments), expected, **TOLERANCE)
    torch.testing.assert_close(chainrule.jacfwd(function, numbers)(*arguments), expected, **TOLERANCE)


@pytest.mark.parametrize(("function", "ranges"), ROWS)
def test_directional_derivatives_agree_with_finite_differences(function: Function, ranges: Any) -> None:
    arguments = _arguments(ranges, 3)
    ones = tuple(torch.ones_like(a) for a in arguments)
    _, tangent = chainrule.jvp(function, arguments, ones)
    # Central differences err by step**2 times the third derivative and round-off over the step: 1e-5 for order-ten values.
    torch.testing.assert_close(tangent, _tangents(function, arguments), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("function", "ranges"), ROWS)
def test_second_order_agrees_with_differences_of_the_first(function: Function, ranges: Any) -> None:
    arguments = _arguments(ranges, 2)
    second = chainrule.jacfwd(chainrule.jacrev(function))(*arguments)

    def first(x: torch.Tensor) -> torch.Tensor:
        return chainrule.jacrev(function)(x, *arguments[1:])

    step = 1e-6
    for k in range(2):
        shift = torch.zeros(2, dtype=torch.float64)
        shift[k] = step
        expected = (first(arguments[0] + shift) - first(arguments[0] - shift)) / (2 * step)
        torch.testing.assert_close(second[..., k], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("function", "ranges"), KNOWN)
def test_vmap_over_the_jacobian(function: Function, ranges: Any) -> None:
    arguments = _arguments(ranges, 2, 3)
    jacobians = chainrule.vmap(chainrule.jacrev(function))(*arguments)
    expected = torch.stack([torch.func.jacrev(function)(*(a[i] for a in arguments)) for i in range(2)])
    torch.testing.assert_close(jacobians, expected, **TOLERANCE)


SHAPES = [((), ()), ((0,), (0,)), ((1,), (3,)), ((2, 1), (1, 3)), ((), (2, 2)), ((3,), (2, 3))]
BROADCAST = [torch.maximum, torch.atan2, torch.logaddexp, torch.div, torch.mul, lambda x, y: torch.where(x > y, x, y * y)]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_broadcasting(shapes: Any) -> None:
    arguments = tuple(_values(*shape, low=0.5, seed=n) for n, shape in enumerate(shapes))
    for function in BROADCAST:
        expected = torch.func.jacrev(function, (0, 1))(*arguments)
        torch.testing.assert_close(chainrule.jacrev(function, (0, 1))(*arguments), expected, **TOLERANCE)
        torch.testing.assert_close(chainrule.jacfwd(function, (0, 1))(*arguments), expected, **TOLERANCE)


SPECIAL = torch.tensor([-math.inf, -3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, math.inf, math.nan], dtype=torch.float64)
KINKED = [
    F.relu, F.relu6, F.hardtanh, F.hardsigmoid, F.hardswish, F.hardshrink, F.softshrink, F.elu, F.celu, F.selu, F.leaky_relu,
    torch.abs, torch.nan_to_num, lambda x: torch.clamp(x, -1.0, 1.0), lambda x: torch.maximum(x, -x), F.softplus,
    lambda x: F.prelu(x, torch.ones(1, dtype=x.dtype)), lambda x: torch.fmax(x, torch.ones_like(x)),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(KINKED)))
def test_special_values_agree_with_torch(number: int) -> None:
    function = KINKED[number]
    pulled = torch.func.vjp(function, SPECIAL)[1](torch.ones_like(SPECIAL))[0]
    got = chainrule.vjp(function, SPECIAL)[1](torch.ones_like(SPECIAL))[0]
    torch.testing.assert_close(got, pulled, equal_nan=True, **TOLERANCE)


def test_sinc_at_the_origin_to_second_order() -> None:
    x = torch.zeros((), dtype=torch.float64)
    curvature = chainrule.jacfwd(chainrule.jacrev(torch.sinc))(x)
    torch.testing.assert_close(curvature, torch.tensor(-(math.pi**2) / 3, dtype=torch.float64))


def test_non_contiguous_and_single_precision() -> None:
    x = _values(3, 4).t()
    torch.testing.assert_close(chainrule.jacrev(F.gelu)(x), torch.func.jacrev(F.gelu)(x), **TOLERANCE)
    small = x.float()
    torch.testing.assert_close(chainrule.jacrev(F.gelu)(small), torch.func.jacrev(F.gelu)(small))


def test_factors_of_truth_values_and_of_small_integers_are_summed_as_numbers():
    one, two = torch.tensor([True, True, False]), torch.tensor([True, False, True])
    small, places = torch.tensor([3, 100, 7], dtype=torch.int8), torch.tensor([0, 0, 0])
    x = _values(3)
    expected = {
        "sum": (lambda x: x * one + x * two, torch.diag(torch.tensor([2.0, 1.0, 1.0], dtype=x.dtype))),
        "product": (lambda x: x * small * small, torch.diag(torch.tensor([9.0, 1e4, 49.0], dtype=x.dtype))),
        "read often": (lambda x: (x[places] * one).sum(), torch.tensor([2.0, 0.0, 0.0], dtype=x.dtype)),
    }
    for function, wanted in expected.values():
        for transform in (chainrule.jacrev, chainrule.jacfwd, chainrule.jacobian):
            for _ in range(2):
                # Small whole numbers: exact.
                torch.testing.assert_close(transform(function)(x), wanted, rtol=0, atol=0)


_NUMBER_FIRST = {
    "pow": lambda number: lambda x: torch.pow(number, x),
    "pow by name": lambda number: lambda x: torch.pow(self=number, exponent=x),
    "float_power": lambda number: lambda x: torch.float_power(number, x),
    "mul": lambda number: lambda x: torch.mul(number, x),
    "sub": lambda number: lambda x: torch.sub(number, x),
    "div": lambda number: lambda x: torch.div(number, x),
    "xlogy": lambda number: lambda x: torch.xlogy(number, x),
    "fmod": lambda number: lambda x: torch.fmod(torch.tensor(number), x),
    "where": lambda number: lambda x: torch.where(x > 0.8, number, x),
    "xlog1py": lambda number: lambda x: torch.special.xlog1py(number, x),
}


@pytest.mark.parametrize("number", [2.0, 3, 0])
@pytest.mark.parametrize("name", _NUMBER_FIRST)
def test_number_before_a_tensor(name, number):
    function = _NUMBER_FIRST[name](number)
    x = torch.rand(3, 4, dtype=torch.float64) + 0.4
    summed = lambda x: function(x).sum()  # noqa: E731
    for _ in range(3):  # the plans of the first call serve the later ones
        torch.testing.assert_close(chainrule.grad(summed)(x), torch.func.grad(summed)(x))
        torch.testing.assert_close(chainrule.hessian(summed)(x), torch.func.hessian(summed)(x))
        torch.testing.assert_close(chainrule.vmap(function)(x), function(x))
        torch.testing.assert_close(chainrule.vmap(chainrule.grad(summed))(x), torch.func.grad(summed)(x))
        torch.testing.assert_close(chainrule.vmap(chainrule.vmap(function))(x), function(x))
        ones = torch.ones_like(x)
        torch.testing.assert_close(chainrule.jvp(function, (x,), (ones,))[1], torch.func.jvp(function, (x,), (ones,))[1])


@pytest.mark.parametrize("base", [0, 0.0, -0.0])
def test_powers_of_zero(base):
    # Torch's gradient, and its derivative: where the result is not infinite, zero.
    x = torch.tensor([0.5, 2.0, 0.0, -1.0], dtype=torch.float64)
    function = lambda x: (base**x).sum()  # noqa: E731
    torch.testing.assert_close(chainrule.grad(function)(x), torch.func.grad(function)(x))
    expected = torch.func.hessian(function)(x)
    torch.testing.assert_close(chainrule.hessian(function)(x[:3]), expected[:3, :3])
    torch.testing.assert_close(chainrule.hessian(function)(x).diagonal(), expected.diagonal())
    torch.testing.assert_close(chainrule.vmap(chainrule.hessian(function))(x[:, None]).flatten(), expected.diagonal())
