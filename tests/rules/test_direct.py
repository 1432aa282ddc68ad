"""Composite ops that are recorded as their parts, against torch.func."""

from __future__ import annotations

import pytest
import torch

import chainrule

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
