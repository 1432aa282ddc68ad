"""Linear maps as SciPy's operators, driven by SciPy's own solvers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import chainrule
from chainrule import linear_map

np = pytest.importorskip("numpy")
linalg = pytest.importorskip("scipy.sparse.linalg")

Tensor = torch.Tensor


def residual(x: Tensor) -> Tensor:
    return torch.cat([torch.sin(x) + 2 * x, x[1:] - x[:-1] ** 2])


def energy(x: Tensor) -> Tensor:
    return (x**4).sum() / 4 + ((x[1:] - x[:-1]) ** 2).sum() + (x**2).sum()


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(30, dtype=torch.float64)


def close(found: Any, expected: Any) -> None:
    """Sums of 60 products of numbers near one: 1e-12 is thousands of roundings."""
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_products(x: Tensor) -> None:
    J, matrix = linear_map(residual, x), torch.func.jacrev(residual)(x).numpy()
    operator = J.scipy()
    rng = np.random.default_rng(0)
    assert operator.shape == matrix.shape and operator.dtype == np.float64
    v, u, V, U = rng.normal(size=30), rng.normal(size=59), rng.normal(size=(30, 4)), rng.normal(size=(59, 2))  # noqa: N806
    close(operator @ v, matrix @ v)
    close(operator @ v[:, None], matrix @ v[:, None])
    close(operator.T @ u, matrix.T @ u)
    close(operator.H @ u, matrix.T @ u)
    close(operator @ V, matrix @ V)
    close(operator.T @ U, matrix.T @ U)
    close(operator @ v.astype(np.float32), matrix @ v.astype(np.float32))
    close((operator @ v[::-1]), matrix @ v[::-1])
    v.flags.writeable = False
    close(operator @ v, matrix @ v)
    close(J.gram().scipy() @ u, matrix @ (matrix.T @ u))


def test_trees_and_float32() -> None:
    p = {"a": torch.randn(2, 3), "b": torch.randn(3, requires_grad=True)}
    operator = linear_map(lambda p: (p["a"] @ p["b"], p["b"] * 2), p).scipy()
    assert operator.shape == (5, 9)
    found = operator @ np.ones(9)
    expected = torch.cat([p["b"].sum() + p["a"].sum(1), torch.full((3,), 2.0)]).detach().numpy()
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_least_squares_by_lsmr(x: Tensor) -> None:
    target = residual(x + 0.1).numpy()
    matrix = torch.func.jacrev(residual)(x).numpy()
    found = linalg.lsmr(linear_map(residual, x).scipy(), target, atol=1e-14, btol=1e-14)[0]
    np.testing.assert_allclose(found, np.linalg.lstsq(matrix, target, rcond=None)[0], rtol=1e-8, atol=1e-10)


def test_newton_by_conjugate_gradients(x: Tensor) -> None:
    """Newton's method on a convex energy with the Hessian as an operator reaches its minimum, the origin."""
    point = x
    for _ in range(30):
        H = chainrule.hessian(energy, layout="operator")(point)
        step, info = linalg.cg(H.scipy(), -H.output.numpy(), rtol=1e-12)
        assert info == 0
        point = point + torch.from_numpy(step)
    assert float(point.abs().max()) < 1e-12


def test_eigenvalues_by_lanczos(x: Tensor) -> None:
    H = chainrule.hessian(energy, layout="operator")(x)
    found = linalg.eigsh(H.scipy(), k=3, which="LA", return_eigenvectors=False, v0=np.ones(30))
    expected = torch.linalg.eigvalsh(torch.func.hessian(energy)(x))[-3:]
    np.testing.assert_allclose(np.sort(found), expected.numpy(), rtol=1e-10)


def test_no_columns(x: Tensor) -> None:
    operator = linear_map(residual, x).scipy()
    assert (operator @ np.zeros((30, 0))).shape == (59, 0)
    assert operator.rmatmat(np.zeros((59, 0))).shape == (30, 0)
