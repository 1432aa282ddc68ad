"""What cuts a derivative inside nests: ``data`` and ``detach_`` for the innermost transform only, ``detach`` for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.func

import chainrule

Tensor = torch.Tensor


def plain(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x * 1


CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "data": lambda x: x.data,
    "data of a result": lambda x: (x * 1).data,
    "data of a view": lambda x: x[:].data,
    "copy of data": lambda x: x.data.clone(),
    "detach": lambda x: x.detach(),
    "detach_": lambda x: (x * 1).detach_(),
    "no_grad": plain,
}

NESTS: dict[str, Callable[[Any, Any], Callable[[Tensor], Any]]] = {
    "grad": lambda m, f: m.grad(f),
    "tangent": lambda m, f: lambda x: m.jvp(f, (x,), (x,))[1],
    "reverse over reverse": lambda m, f: m.jacrev(m.grad(f)),
    "forward over reverse": lambda m, f: m.jacfwd(m.grad(f)),
    "reverse over forward": lambda m, f: m.jacrev(m.jacfwd(f)),
    "through functions": lambda m, f: m.grad(lambda x: m.grad(f)(x).sum()),
    "hessian": lambda m, f: m.hessian(f),
    "third order": lambda m, f: m.jacfwd(m.jacrev(m.grad(f))),
    "tangent of the gradient": lambda m, f: lambda x: m.jvp(m.grad(f), (x,), (x,))[1],
    "per sample": lambda m, f: lambda x: m.vmap(m.grad(f))(torch.stack([x, x.cos()])),
    "derivative of per sample": lambda m, f: lambda x: m.jacrev(m.vmap(m.grad(f)))(torch.stack([x, x.cos()])),
}


@pytest.mark.parametrize("nest", NESTS)
@pytest.mark.parametrize("cut", CUTS)
def test_as_in_torch_func(cut: str, nest: str) -> None:
    def function(x: Tensor) -> Tensor:
        return (x**3 * CUTS[cut](x) ** 2 * x.sum()).sum()

    for _ in range(2):
        x = torch.randn(3, dtype=torch.float64)
        torch.testing.assert_close(NESTS[nest](chainrule, function)(x), NESTS[nest](torch.func, function)(x))


@pytest.mark.parametrize("name", ["laplacian", "hessian_diagonal"])
def test_contractions_count_as_the_hessian(name: str) -> None:
    def function(x: Tensor) -> Tensor:
        return (x**3 * x.data**2).sum()

    x = torch.randn(3, dtype=torch.float64)
    diagonal = torch.func.hessian(function)(x).diagonal()
    expected = diagonal.sum() if name == "laplacian" else diagonal
    torch.testing.assert_close(getattr(chainrule, name)(function)(x), expected)
    torch.testing.assert_close(chainrule.hessian(function, layout="operator")(x).dense(), torch.func.hessian(function)(x))
    torch.testing.assert_close(chainrule.hessian(function, layout="sparse_coo")(x).to_dense(), torch.func.hessian(function)(x))


def test_writes_through_data_change_the_value_and_not_the_derivative() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2
        y.data.mul_(3)
        return (y**2).sum()

    x = torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(chainrule.grad(function)(x), 2 * (6 * x) * 2)
