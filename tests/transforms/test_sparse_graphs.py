"""Sparse results that carry a graph: what is read of them is differentiable twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import chainrule

Tensor = torch.Tensor
SIZE = 5


def function(u: Tensor) -> Tensor:
    return u.roll(1) * u.sin() + u**3


def dense(x: Tensor) -> Tensor:
    return torch.func.jacrev(function)(x)


READS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "values": (lambda s, w: s.values().pow(3).sum(), lambda j, w: j.pow(3).sum()),
    "dense": (lambda s, w: (s.to_dense() * w).pow(3).sum(), lambda j, w: (j * w).pow(3).sum()),
    "product": (lambda s, w: (s @ w).sin().sum(), lambda j, w: (j @ w).sin().sum()),
    "square": (lambda s, w: ((s * s).to_dense() * w).sum(), lambda j, w: (j * j * w).sum()),
    # The gradient has entries where there are none, and none where there are some.
    "sum with another": (
        lambda s, w: ((s * (s + (w > 0.5).to(w.dtype).to_sparse())).to_dense() * w).sum(),
        lambda j, w: (j * (j + (w > 0.5)) * w).sum(),
    ),
}


@pytest.mark.parametrize("way", ["jacobian", "linear_map", "sparse_csr"])
@pytest.mark.parametrize("name", READS)
def test_second_derivatives(name: str, way: str) -> None:
    read, expected = READS[name]
    if way == "sparse_csr" and name in ("values", "sum with another"):
        pytest.skip("torch: the gradient of CSR values has no graph; no sums of the two layouts")
    torch.manual_seed(0)
    x, w = torch.randn(SIZE, dtype=torch.float64), torch.randn(SIZE, SIZE, dtype=torch.float64)
    first = torch.func.grad(lambda x: expected(dense(x), w))
    second = torch.func.grad(lambda x: first(x).sin().sum())
    for _ in range(4):
        x = x + 0.1
        leaf = x.clone().requires_grad_()
        if way == "linear_map":
            made = chainrule.linear_map(function, leaf).sparse()
        else:
            made = chainrule.jacobian(function, layout="sparse_coo" if way == "jacobian" else way)(leaf)
        (gradient,) = torch.autograd.grad(read(made, w), leaf, create_graph=True)
        torch.testing.assert_close(gradient, first(x))
        (again,) = torch.autograd.grad(gradient.sin().sum(), leaf)
        torch.testing.assert_close(again, second(x))


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
def test_values_of_a_batch(layout: str) -> None:
    x = torch.randn(3, SIZE, dtype=torch.float64, requires_grad=True)
    made = chainrule.vmap(chainrule.jacobian(function, layout=layout))(x)
    (gradient,) = torch.autograd.grad(made.values().pow(2).sum(), x, create_graph=True)
    first = torch.func.grad(lambda x: dense(x).pow(2).sum())
    torch.testing.assert_close(gradient, torch.stack([first(row) for row in x.detach()]))
    if layout == "sparse_coo":
        (again,) = torch.autograd.grad(gradient.sin().sum(), x)
        second = torch.func.grad(lambda x: first(x).sin().sum())
        torch.testing.assert_close(again, torch.stack([second(row) for row in x.detach()]))


def test_second_derivatives_of_a_hessian() -> None:
    def energy(u: Tensor) -> Tensor:
        return (function(u) ** 2).sum()

    x = torch.randn(SIZE, dtype=torch.float64, requires_grad=True)
    made = chainrule.hessian(energy, layout="sparse_coo")(x)
    (gradient,) = torch.autograd.grad(made.values().pow(2).sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(gradient.sin().sum(), x)
    first = torch.func.grad(lambda x: torch.func.hessian(energy)(x).pow(2).sum())
    torch.testing.assert_close(gradient, first(x.detach()))
    torch.testing.assert_close(again, torch.func.grad(lambda x: first(x).sin().sum())(x.detach()))
