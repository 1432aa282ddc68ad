"""Every ordered pair and triple of transforms against the same nest in torch.func, fourth order, and perturbations."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.func

import chainrule

NAMES = ("vmap", "grad", "vjp", "jvp", "jacrev", "jacfwd", "hessian")
Function = Callable[[torch.Tensor], torch.Tensor]


def weight() -> torch.Tensor:
    return torch.linspace(-1.0, 1.0, 9, dtype=torch.float64).reshape(3, 3).cos()


def base(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(weight() @ x) * x.sum() + x**3


def weighted_sum(output: torch.Tensor) -> torch.Tensor:
    return (output * torch.linspace(0.3, 1.7, output.numel(), dtype=output.dtype).reshape(output.shape)).sum()


def wrap(library: Any, name: str, function: Function) -> Function:
    """``name`` applied to a function of one vector, as a function of one vector again."""

    def pulled(x: torch.Tensor) -> torch.Tensor:
        output, pullback = library.vjp(function, x)
        return pullback(torch.ones_like(output) * x.sum())[0]

    def mapped(x: torch.Tensor) -> torch.Tensor:
        scales = torch.linspace(0.5, 1.5, 2, dtype=x.dtype)
        return library.vmap(lambda scale, y: function(y * scale), in_dims=(0, None))(scales, x)

    if name == "vmap":
        return mapped
    if name == "vjp":
        return pulled
    if name == "grad":
        return lambda x: library.grad(lambda y: weighted_sum(function(y)))(x)
    if name == "jvp":
        return lambda x: library.jvp(function, (x,), (torch.cos(x),))[1]
    return lambda x: getattr(library, name)(function)(x)


def nests() -> list[tuple[str, ...]]:
    return [names for depth in (2, 3) for names in itertools.product(NAMES, repeat=depth)]


@pytest.mark.parametrize("names", nests(), ids="-".join)
def test_nest_agrees_with_torch_func(names: tuple[str, ...]) -> None:
    ours: Function = base
    theirs: Function = base
    for name in reversed(names):
        ours, theirs = wrap(chainrule, name, ours), wrap(torch.func, name, theirs)
    for _ in range(2):  # planned, then replayed
        x = torch.randn(3, dtype=torch.float64)
        # float64, up to six orders: rounding grows with the size of the derivatives.
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("names", list(itertools.product(("grad", "jacrev", "jacfwd", "jacobian"), repeat=4)), ids="-".join)
def test_fourth_derivative_in_closed_form(names: tuple[str, ...]) -> None:
    function: Function = lambda x: torch.sin(2 * x) * torch.exp(x)  # noqa: E731
    for name in names:
        function = getattr(chainrule, name)(function)
    x = torch.tensor(0.7, dtype=torch.float64)
    # f = Im exp((1 + 2i) x), so the fourth derivative is Im (1 + 2i)^4 exp((1 + 2i) x).
    factor = torch.tensor(complex(1, 2), dtype=torch.complex128)
    torch.testing.assert_close(function(x), (factor**4 * torch.exp(factor * x)).imag)


@pytest.mark.parametrize("outer", ["jacrev", "jacfwd", "jacobian"])
@pytest.mark.parametrize("inner", ["jacrev", "jacfwd", "jacobian"])
def test_perturbations_are_not_confused(outer: str, inner: str) -> None:
    d_outer, d_inner = getattr(chainrule, outer), getattr(chainrule, inner)
    x = torch.tensor(2.0, dtype=torch.float64)
    # d/dx [x * d/dy (x + y)] = 1
    assert d_outer(lambda a: a * d_inner(lambda y: a + y)(a))(x).item() == 1.0
    # d/dx [d/dy (x * y)] at y = x is 1
    assert d_outer(lambda a: d_inner(lambda y: a * y)(a))(x).item() == 1.0
    # d/dx [x * d/dy (x * y * y)] at y = x: x * 2 x^2 -> 6 x^2
    assert d_outer(lambda a: a * d_inner(lambda y: a * y * y)(a))(x).item() == 24.0
    # a view of the outer input beside a view of the inner one, over the same memory
    vector = torch.tensor([2.0, 3.0], dtype=torch.float64)
    found = d_outer(lambda a: d_inner(lambda y: y[0] * a[0])(a))(vector)
    assert torch.equal(found, torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64))


def test_triple_nest_through_closures() -> None:
    grad = chainrule.grad
    x = torch.tensor(1.5, dtype=torch.float64)
    found = grad(lambda a: grad(lambda b: grad(lambda c: a * b**2 * c**3)(a) * b)(a))(x)
    # inner: 3 a b^2 c^2 at c = a -> 3 a^3 b^2; times b, d/db -> 9 a^3 b^2 at b = a -> 9 a^5; d/da -> 45 a^4
    torch.testing.assert_close(found, 45 * x**4)
