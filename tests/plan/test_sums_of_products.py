"""Jacobians whose terms are summed as one product of matrices: values and derivatives through every transform around them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import chainrule

Tensor = torch.Tensor
LENGTH, WIDTH = 19, 17  # (19 · 17)² numbers: large enough for the plan to sum by a product

#: Sums of at most a few hundred products of numbers near one.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture
def head() -> Callable[[Tensor], Tensor]:
    weights = torch.randn(3, WIDTH, WIDTH, dtype=torch.float64) / math.sqrt(WIDTH)

    def attention(x: Tensor) -> Tensor:
        queries, keys, values = (x @ weight for weight in weights)
        return torch.softmax(queries @ keys.t() / math.sqrt(WIDTH), -1) @ values

    return attention


@pytest.fixture
def x() -> Tensor:
    return torch.randn(LENGTH, WIDTH, dtype=torch.float64)


def test_the_plan_sums_by_one_product(head: Callable[[Tensor], Tensor], x: Tensor) -> None:
    account = chainrule.explain(chainrule.jacobian(head))(x).accounts[-1]
    called = [call["call"] for call in account.calls]
    assert called.count("product_on_diagonals") == 1
    assert "embed_diagonals" not in called
    numbers = (LENGTH * WIDTH) ** 2
    found = next(a for a in account.alternatives if a["order"] == account.chosen)
    # One pass over the result, and what is stacked beside it.
    assert found["bytes"] <= 8 * 2.5 * numbers


@pytest.mark.parametrize("transform", [chainrule.jacobian, chainrule.jacrev, chainrule.jacfwd])
def test_jacobian(transform: Callable[..., Callable[..., Tensor]], head: Callable[[Tensor], Tensor], x: Tensor) -> None:
    expected = torch.func.jacrev(head)(x)
    for _ in range(2):  # planned, then replayed
        torch.testing.assert_close(transform(head)(x), expected, **CLOSE)
    torch.testing.assert_close(chainrule.compile(transform(head))(x), expected, **CLOSE)


def test_finite_differences(head: Callable[[Tensor], Tensor], x: Tensor) -> None:
    direction, step = torch.randn_like(x), 1e-5
    difference = (head(x + step * direction) - head(x - step * direction)) / (2 * step)
    # The error of central differences: step² times a third derivative near one, and rounding over step.
    torch.testing.assert_close(torch.tensordot(chainrule.jacobian(head)(x), direction, 2), difference, rtol=1e-6, atol=1e-6)


def test_under_vmap(head: Callable[[Tensor], Tensor]) -> None:
    batch = torch.randn(3, LENGTH, WIDTH, dtype=torch.float64)
    found = chainrule.vmap(chainrule.jacobian(head))
    for _ in range(2):
        torch.testing.assert_close(found(batch), torch.func.vmap(torch.func.jacrev(head))(batch), **CLOSE)


def test_differentiated_again(head: Callable[[Tensor], Tensor], x: Tensor) -> None:
    tangent = torch.randn_like(x)
    found = chainrule.jvp(chainrule.jacobian(head), (x,), (tangent,))[1]
    torch.testing.assert_close(found, torch.func.jvp(torch.func.jacrev(head), (x,), (tangent,))[1], **CLOSE)
    weights = torch.randn(LENGTH, WIDTH, LENGTH, WIDTH, dtype=torch.float64)
    gradient = chainrule.grad(lambda x: (chainrule.jacobian(head)(x) * weights).sum())(x)
    expected = torch.func.grad(lambda x: (torch.func.jacrev(head)(x) * weights).sum())(x)
    torch.testing.assert_close(gradient, expected, **CLOSE)


def test_results_carry_a_graph(head: Callable[[Tensor], Tensor], x: Tensor) -> None:
    tracked = x.clone().requires_grad_()
    weights = torch.randn(LENGTH, WIDTH, LENGTH, WIDTH, dtype=torch.float64)
    (chainrule.jacobian(head)(tracked) * weights).sum().backward()
    expected = torch.func.grad(lambda x: (torch.func.jacrev(head)(x) * weights).sum())(x)
    assert tracked.grad is not None
    torch.testing.assert_close(tracked.grad, expected, **CLOSE)


def test_the_same_factor_serves_another_result(head: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """What is written in place belongs to one result alone."""
    both = chainrule.jacobian(lambda x: (head(x), 2 * head(x) + x))
    for _ in range(2):
        one, two = both(x)
        torch.testing.assert_close(two - 2 * one, torch.eye(x.numel(), dtype=x.dtype).reshape(one.shape), **CLOSE)
    torch.testing.assert_close(one, torch.func.jacrev(head)(x), **CLOSE)


def test_a_residual_is_added_on_the_diagonal() -> None:
    one, two = torch.randn(2, 300, 300, dtype=torch.float64) / 30
    vector = torch.randn(300, dtype=torch.float64)

    def block(x: Tensor) -> Tensor:
        return x + two @ torch.tanh(one @ x)

    for _ in range(2):
        torch.testing.assert_close(chainrule.jacobian(block)(vector), torch.func.jacrev(block)(vector), **CLOSE)


def test_masks() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.relu(x)[:, None] * x[None] * 2 + x[:, None] * torch.relu(x)

    x = torch.randn(80, dtype=torch.float64)
    torch.testing.assert_close(chainrule.jacobian(function)(x), torch.func.jacrev(function)(x), **CLOSE)
