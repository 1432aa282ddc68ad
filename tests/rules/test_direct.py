"""Composite ops that are recorded as their parts, against torch.func."""

from __future__ import annotations

import pytest
import torch

import chainrule
from chainrule.transforms.trace import trace

#: Sums of some ten float64 products of numbers near 1, in another order.
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def _loop(cell, size):
    def function(x):
        state = x.new_zeros(*x.shape[1:-1], size)
        for step in x:
            state = cell(step, state)
        return state.square().sum()

    return function


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [
    lambda bias: torch.nn.RNNCell(3, 5, bias),
    lambda bias: torch.nn.RNNCell(3, 5, bias, "relu"),
    lambda bias: torch.nn.GRUCell(3, 5, bias),
])  # fmt: skip
@pytest.mark.parametrize("shape", [(4, 2, 3), (4, 3)])
def test_cells(make, bias, frozen, shape):
    function = _loop(make(bias).double().requires_grad_(not frozen), 5)
    x = torch.randn(shape, dtype=torch.float64)
    for _ in range(3):
        torch.testing.assert_close(chainrule.grad(function)(x), torch.func.grad(function)(x), **TOLERANCE)
        torch.testing.assert_close(chainrule.hessian(function)(x), torch.func.hessian(function)(x), **TOLERANCE)
        several = torch.stack([x, 2 * x])
        found = chainrule.vmap(chainrule.grad(function))(several)
        torch.testing.assert_close(found, torch.func.vmap(torch.func.grad(function))(several), **TOLERANCE)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("options", [
    {}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True, "bias": False},
])  # fmt: skip
def test_layers(nonlinearity, options):
    layers = torch.nn.RNN(3, 5, nonlinearity=nonlinearity, **options).double().requires_grad_(False)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    function = lambda x: sum(part.sin().sum() for part in layers(x))  # noqa: E731
    for _ in range(3):
        torch.testing.assert_close(chainrule.grad(function)(x), torch.func.grad(function)(x), **TOLERANCE)
        torch.testing.assert_close(chainrule.jvp(function, (x,), (x,)), torch.func.jvp(function, (x,), (x,)), **TOLERANCE)


@pytest.mark.parametrize(("shape", "pad"), [
    ((2, 3, 5), (1, 2)), ((2, 3, 4, 5), (1, 2, 3, 0)), ((1, 1, 3, 4, 2), (1, 1, 0, 3, 2, 2)), ((2, 3, 5), (0, 0)), ((2, 3, 5), (5, 5)),
    ((2, 3, 4, 5), (-1, 2, 0, 1)), ((3, 5), (1, 2)), ((1, 1, 1), (1, 0)),
])  # fmt: skip
def test_circular_padding(shape, pad):
    """The last values before the first ones: as slices and joins, in every mode, and with a graph."""
    x = torch.randn(shape, dtype=torch.float64)

    def function(x):
        return torch.nn.functional.pad(x.sin(), pad, mode="circular").cos()

    def loss(x):
        return (function(x) ** 3).sum()

    for _ in range(3):
        out, pull = chainrule.vjp(function, x)
        wanted, theirs = torch.func.vjp(function, x)
        cotangent, tangent = torch.randn_like(out), torch.randn_like(x)
        torch.testing.assert_close(out, wanted)
        torch.testing.assert_close(pull(cotangent), theirs(cotangent), **TOLERANCE)
        found = chainrule.jvp(function, (x,), (tangent,))
        torch.testing.assert_close(found, torch.func.jvp(function, (x,), (tangent,)), **TOLERANCE)
        both = torch.stack([x, 2 * x])
        mapped = chainrule.vmap(chainrule.grad(loss))(both)
        torch.testing.assert_close(mapped, torch.func.vmap(torch.func.grad(loss))(both), **TOLERANCE)
        joined = x.clone().requires_grad_()
        torch.testing.assert_close(
            torch.autograd.grad((chainrule.grad(loss)(joined) ** 2).sum(), joined),
            torch.autograd.grad((torch.func.grad(loss)(joined) ** 2).sum(), joined), **TOLERANCE,
        )  # fmt: skip


def test_circular_padding_is_a_few_ops():
    x = torch.randn(1, 2, 4, 5)
    tape = trace(lambda x: torch.nn.functional.pad(x, (1, 1, 1, 0), mode="circular"), (x,), (0,), {}, "jacobian").tape
    aten = torch.ops.aten
    ops = [aten.slice.Tensor, aten.slice.Tensor, aten.cat.default, aten.slice.Tensor, aten.cat.default]
    assert [record.op for record in tape.records] == ops
