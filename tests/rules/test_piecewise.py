"""Activations whose slopes are multiplied by a kernel of torch's: against torch.func, at the kinks, to third order."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import chainrule

tf = torch.func
Tensor = torch.Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "leaky_relu of a negative slope": lambda x: F.leaky_relu(x, -0.5),
    "hardtanh": F.hardtanh,
    "relu6": F.relu6,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "threshold": lambda x: F.threshold(x, 0.5, 2.0),
    "elu": lambda x: F.elu(x, 1.3),
    "selu": F.selu,
    "softplus": lambda x: F.softplus(x, 2.0, 1.0),
    "hardswish": F.hardswish,
}

#: Every kink of these functions is among the values.
POINTS = torch.tensor([[0.0, -3.0, 3.0, 1.0, -1.0], [0.5, -0.5, 6.0, 0.25, -7.0], [1.5, 8.0, -0.0, 0.7, -0.2]], dtype=torch.float64)
FACTORS = torch.linspace(-1.0, 2.0, 15, dtype=torch.float64).reshape(3, 5)


def transforms(f: Callable[[Tensor], Tensor]) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """Derivatives of a function of the points, and what torch.func says."""

    def whole(x: Tensor) -> Tensor:
        return (f(x).sin() * FACTORS).sum()

    def trace(x: Tensor) -> Tensor:
        return tf.jacrev(tf.jacrev(whole))(x).reshape(15, 15).trace()

    return {
        "grad": (chainrule.grad(whole), tf.grad(whole)),
        "jvp": (lambda x: chainrule.jvp(f, (x,), (FACTORS,))[1], lambda x: tf.jvp(f, (x,), (FACTORS,))[1]),
        "vjp": (lambda x: chainrule.vjp(f, x)[1](FACTORS)[0], lambda x: tf.vjp(f, x)[1](FACTORS)[0]),
        "jacrev": (chainrule.jacrev(f), tf.jacrev(f)),
        "jacfwd": (chainrule.jacfwd(f), tf.jacrev(f)),
        "vmap-grad": (chainrule.vmap(chainrule.grad(lambda x: f(x).sin().sum())), tf.vmap(tf.grad(lambda x: f(x).sin().sum()))),
        "hessian": (chainrule.hessian(whole), tf.jacrev(tf.jacrev(whole))),
        "third": (chainrule.jacrev(chainrule.hessian(whole)), tf.jacrev(tf.jacrev(tf.jacrev(whole)))),
        "laplacian": (chainrule.laplacian(whole), trace),
        "compiled": (chainrule.compile(chainrule.grad(whole)), tf.grad(whole)),
    }


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_are_those_of_torch(name: str) -> None:
    for transform, (ours, theirs) in transforms(ACTIVATIONS[name]).items():
        expected = theirs(POINTS)
        for call in range(4):  # later calls take other ways
            torch.testing.assert_close(
                ours(POINTS), expected, rtol=1e-12, atol=1e-12, msg=lambda m, c=(transform, call): f"{c}: {m}"
            )


@pytest.mark.parametrize("name", ["hardtanh", "relu6", "hardshrink", "softshrink", "threshold", "hardsigmoid"])
def test_their_zeros_win_over_infinities(name: str) -> None:
    f = ACTIVATIONS.get(name, F.hardsigmoid)
    x = torch.tensor([-9.0, 0.1, -9.0, 0.2, 9.0], dtype=torch.float64)
    factors = torch.tensor([math.inf, 1.0, -math.inf, 2.0, math.nan], dtype=torch.float64)

    def weighted(x: Tensor) -> Tensor:
        return f(x) * factors

    expected = tf.vjp(weighted, x)[1](torch.ones_like(x))[0]
    for _ in range(4):
        torch.testing.assert_close(chainrule.vjp(weighted, x)[1](torch.ones_like(x))[0], expected, equal_nan=True)
        torch.testing.assert_close(chainrule.grad(lambda x: weighted(x)[:4].sum())(x)[:4], expected[:4], equal_nan=True)
        torch.testing.assert_close(chainrule.jacrev(weighted)(x).diagonal(), expected, equal_nan=True)


def test_nan_passes_as_in_torch() -> None:
    x = torch.tensor([math.nan, 1.0, -1.0], dtype=torch.float64)
    for name in ("leaky_relu", "hardtanh", "softshrink", "threshold", "elu"):
        f = ACTIVATIONS[name]
        expected = tf.vjp(f, x)[1](torch.ones_like(x))[0]
        for _ in range(3):
            torch.testing.assert_close(chainrule.vjp(f, x)[1](torch.ones_like(x))[0], expected, equal_nan=True)


@pytest.mark.parametrize("tangent", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (3, 1), (3, 3)])
def test_shapes_and_broadcasts(shape: tuple[int, ...], tangent: torch.dtype) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    column = torch.randn(3, 1, dtype=tangent)

    def f(x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.3) * F.hardtanh(x).mT * column if x.dim() == 2 else F.leaky_relu(x, 0.3) * F.hardtanh(x)

    for _ in range(3):
        torch.testing.assert_close(chainrule.jacrev(f)(x), tf.jacrev(f)(x))
        torch.testing.assert_close(chainrule.jacfwd(f)(x), tf.jacrev(f)(x))
        torch.testing.assert_close(chainrule.jvp(f, (x,), (x,))[1], tf.jvp(f, (x,), (x,))[1])


@pytest.mark.parametrize("name", [*ACTIVATIONS, "hardsigmoid"])
def test_torchs_backward_reaches_through(name: str) -> None:
    f = ACTIVATIONS.get(name, F.hardsigmoid)

    def whole(x: Tensor) -> Tensor:
        return (f(x).sin() * FACTORS).sum()

    expected = torch.stack([_second(whole, step) for step in (1e-5, -1e-5)]).mean(0)
    for _ in range(4):
        x = (POINTS + 0.03).requires_grad_()
        (found,) = torch.autograd.grad(chainrule.grad(whole)(x).sum(), x)
        # Differences of a function without kinks nearby: their error is near 1e-10.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def _second(whole: Callable[[Tensor], Tensor], step: float) -> Tensor:
    """Row sums of a diagonal Hessian, by differences."""
    x = POINTS + 0.03
    return (tf.grad(whole)(x + step) - tf.grad(whole)(x)) / step
