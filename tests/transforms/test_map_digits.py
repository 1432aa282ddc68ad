"""Norms, Gram diagonals and traces of maps whose terms cancel: they are those of the dense matrix to all digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import chainrule
from chainrule import linear_map

Tensor = torch.Tensor
D = torch.float64

torch.manual_seed(0)
A = torch.randn(6, 6, dtype=D)
PLACES = torch.tensor([1, 0, 3, 2, 5, 4])
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "element-wise": torch.sin,
    "stencil": lambda x: x.roll(1) * x - x.roll(-1) ** 2,
    "dense": lambda x: torch.tanh(A @ x),
    "two layers": lambda x: torch.tanh(A @ torch.tanh(A.T @ x)),
    "low rank": lambda x: A[:, :2] @ (A[:2] @ x).tanh() + x**2,
    "running sum": lambda x: x.sin().cumsum(0),
    "gather": lambda x: x[PLACES] * x,
}
X, Y = torch.randn(6, dtype=D), torch.randn(6, dtype=D)


def difference(name: str, step: float, x: Tensor = X) -> tuple[Any, Tensor]:
    J, K = (linear_map(FUNCTIONS[name], point) for point in (x, x + step * Y))
    return J - K, J.dense() - K.dense()


def norm(matrix: Tensor) -> Tensor:
    return matrix.square().sum().sqrt()


@pytest.mark.parametrize("step", [1e-4, 1e-7, 1e-9])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_differences(name: str, step: float) -> None:
    found, dense = difference(name, step)
    # The entries of the two matrices have rounded by 1e-16 or so of some 1, each in its way.
    close = {"rtol": 1e-8 + 1e-14 / step, "atol": 0.0}
    torch.testing.assert_close(found.norm(), norm(dense), **close)
    torch.testing.assert_close(found.gram().trace(), dense.square().sum(), **close)
    close["atol"] = 1e-13 * float(norm(dense)) ** 2 + 1e-32
    torch.testing.assert_close(found.gram().diagonal(), dense.square().sum(1), **close)
    torch.testing.assert_close(found.normal().diagonal(), dense.square().sum(0), **close)


def softmax(x: Tensor) -> Tensor:
    return torch.softmax(x.reshape(2, 3), 1).reshape(-1)


@pytest.mark.parametrize(("dtype", "size"), [(D, 25.0), (torch.float32, 13.0)])
def test_one_map_whose_terms_cancel(dtype: torch.dtype, size: float) -> None:
    x = torch.tensor([size, 0.0, -1.0, size - 3, 3.0, 1.0], dtype=dtype)
    J, dense = linear_map(softmax, x), torch.func.jacrev(softmax)(x)
    torch.testing.assert_close(J.norm(), norm(dense))
    torch.testing.assert_close(J.gram().trace(), dense.square().sum(), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(J.gram().diagonal(), dense.square().sum(1), rtol=1e-5, atol=0.0)
    slope = chainrule.grad(lambda x: linear_map(softmax, x).norm())(x)
    wanted = torch.func.grad(lambda x: norm(torch.func.jacrev(softmax)(x)))(x)
    torch.testing.assert_close(slope, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("seed", range(4))
def test_how_symmetric_a_map_is(seed: int) -> None:
    B = torch.randn(5, 5, dtype=D, generator=torch.Generator().manual_seed(seed))
    J = linear_map(lambda x: B.T @ (B @ x).tanh(), X[:5])
    assert (J - J.T).norm() <= 1e-14 * J.norm()
    Q = torch.linalg.qr(B)[0]
    J = linear_map(lambda x: Q @ x, X[:5])
    assert (J.normal() - linear_map(lambda x: x * 1.0, X[:5])).norm() <= 1e-14


@pytest.mark.parametrize("name", ["element-wise", "stencil", "running sum"])
def test_under_vmap_and_in_gradients(name: str) -> None:
    points = torch.stack([X, Y, X * Y])

    def apart(x: Tensor) -> Tensor:
        return (linear_map(FUNCTIONS[name], x) - linear_map(FUNCTIONS[name], x + 1e-8 * x.detach())).norm()

    def wanted(x: Tensor) -> Tensor:
        J = torch.func.jacrev(FUNCTIONS[name])
        return norm(J(x) - J(x + 1e-8 * x.detach()))

    close = {"rtol": 1e-6, "atol": 0.0}
    for _ in range(3):
        norms = torch.stack([wanted(x) for x in points])
        torch.testing.assert_close(chainrule.vmap(apart)(points), norms, **close)
        torch.testing.assert_close(chainrule.vmap(chainrule.vmap(apart))(points[None])[0], norms, **close)
    slopes = torch.stack([torch.func.grad(wanted)(x) for x in points])
    assert (chainrule.vmap(chainrule.grad(apart))(points) - slopes).abs().max() <= 1e-4 * slopes.abs().max() + 1e-14
    assert (torch.stack([chainrule.grad(apart)(x) for x in points]) - slopes).abs().max() <= 1e-4 * slopes.abs().max() + 1e-14


def test_what_cannot_be_looked_at_is_never_below_zero() -> None:
    """A compiled call replays one way for all values."""

    def apart(x: Tensor) -> Tensor:
        return (linear_map(torch.sin, x) - linear_map(torch.sin, x + 1e-9)).norm()

    compiled = chainrule.compile(apart)
    for seed in range(20):
        x = torch.randn(6, dtype=D, generator=torch.Generator().manual_seed(seed))
        assert compiled(x) <= 1e-7


def test_rows_that_cancel_alone() -> None:
    """Only what has lost digits is taken of entries, leaf by leaf."""
    a, b = X, torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=D)
    shift = torch.tensor([1e-9, 1.0, 0.0, 1e-9, 0.5, 1e-8], dtype=D)

    def function(tree: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return tree[0].sin(), tree[1].exp()

    J, K = linear_map(function, (a, b)), linear_map(function, (a + shift, b + 1e-9))
    one, two = (J - K).gram().diagonal()
    torch.testing.assert_close(one, (a.cos() - (a + shift).cos()).square(), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(two, (b.exp() - (b + 1e-9).exp()).square(), rtol=1e-6, atol=0.0)
