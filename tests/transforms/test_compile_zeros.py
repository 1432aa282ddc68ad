"""Compiled second derivatives through formulas of torch that give zeros without memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

import chainrule

Tensor = torch.Tensor

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "norm 1": lambda x: (x.norm(1) * x).sum(),
    "norm inf": lambda x: (x.norm(math.inf) * x).sum(),
    "norm 0": lambda x: (x.norm(0) * x**2).sum(),
    "norm 1 of rows": lambda x: (x.reshape(2, -1).norm(1, dim=1) ** 2).sum(),
    "normalize": lambda x: (functional.normalize(x, p=1, dim=0) * x).sum(),
    "pairwise distance": lambda x: functional.pairwise_distance(x.reshape(2, -1), x.reshape(2, -1) ** 2, p=1).sum() * x.sum(),
    "renorm": lambda x: x.reshape(2, -1).renorm(1, 0, 0.5).pow(2).sum(),
    "l1 loss": lambda x: functional.l1_loss(x**2, x.sin()) * x.sum(),
    "sign": lambda x: (x.sign() * x**3).sum(),
    "round": lambda x: (x.round() * x**3).sum(),
    "relu": lambda x: (x.relu() * x**2).sum(),
}

TRANSFORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "hessian": (chainrule.hessian, lambda f: torch.func.jacrev(torch.func.grad(f))),
    "jacobian of grad": (lambda f: chainrule.jacobian(chainrule.grad(f)), lambda f: torch.func.jacrev(torch.func.grad(f))),
    "grad of grad": (
        lambda f: chainrule.grad(lambda x: chainrule.grad(f)(x).pow(2).sum()),
        lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).pow(2).sum()),
    ),
    "vmap of hessian": (
        lambda f: lambda x: chainrule.vmap(chainrule.hessian(f))(torch.stack([x, 2 * x])),
        lambda f: lambda x: torch.stack([torch.func.jacrev(torch.func.grad(f))(one) for one in (x, 2 * x)]),
    ),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives(name: str, transform: str, requires_grad: bool) -> None:
    ours, theirs = TRANSFORMS[transform]
    compiled = chainrule.compile(ours(FUNCTIONS[name]))
    for size in (6, 80):
        for _ in range(3):
            x = torch.randn(size, dtype=torch.float64)
            expected = theirs(FUNCTIONS[name])(x)
            torch.testing.assert_close(compiled(x.requires_grad_(requires_grad)).detach(), expected)
    assert compiled.cache_info().hits == 4


def test_zeros_without_memory_as_values() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        zeros = torch._efficientzerotensor(x.shape, dtype=x.dtype)
        return x + zeros, x.sin() * zeros

    compiled = chainrule.compile(function)
    for _ in range(3):
        x = torch.randn(5)
        total, product = compiled(x)
        assert total.equal(x) and product.equal(torch.zeros(5))
