"""Linear algebra against torch.func in float64: both modes, second order, batched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import chainrule
from tests.rules.test_layers import assert_same, check, randn


def positive(size: int) -> torch.Tensor:
    """A well conditioned symmetric matrix."""
    sample = randn(size, size)
    return sample @ sample.mT + size * torch.eye(size, dtype=torch.float64)


def regular(*shape: int) -> torch.Tensor:
    """A well conditioned matrix."""
    return randn(*shape) + 3.0 * torch.eye(shape[-1], dtype=torch.float64)


def gram(a: torch.Tensor) -> torch.Tensor:
    """A positive definite matrix made from any matrix."""
    return a @ a.mT + torch.eye(a.shape[-2], dtype=a.dtype)


CASES: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "solve": (torch.linalg.solve, (regular(2, 3, 3), randn(2, 3, 2))),
    "solve_vector": (torch.linalg.solve, (regular(3, 3), randn(3))),
    "solve_vectors": (torch.linalg.solve, (regular(2, 3, 3), randn(2, 3))),
    "solve_one_vector_by_all": (torch.linalg.solve, (regular(2, 3, 3), randn(3))),
    "solve_one_vector_by_stacks": (torch.linalg.solve, (regular(2, 2, 3, 3), randn(3))),
    "solve_right": (lambda a, b: torch.linalg.solve(a, b, left=False), (regular(2, 3, 3), randn(2, 4, 3))),
    "solve_broadcast": (torch.linalg.solve, (regular(2, 1, 3, 3), randn(2, 3, 2))),
    "solve_one": (torch.linalg.solve, (regular(1, 1), randn(1, 1))),
    "inverse": (torch.linalg.inv, (regular(2, 3, 3),)),
    "cholesky": (lambda a: torch.linalg.cholesky(gram(a)), (randn(2, 3, 3),)),
    "cholesky_upper": (lambda a: torch.linalg.cholesky(gram(a), upper=True), (randn(3, 3),)),
    "determinant": (torch.linalg.det, (randn(2, 3, 3),)),
    "log_determinant": (lambda a: torch.linalg.slogdet(a)[1], (regular(2, 3, 3),)),
    "eigenvalues": (lambda a: torch.linalg.eigvalsh(gram(a)), (randn(3, 3),)),
    "eigenvectors": (lambda a: (lambda e, v: v.abs() * e)(*torch.linalg.eigh(gram(a))), (randn(3, 3),)),
    "singular_values": (torch.linalg.svdvals, (randn(3, 2),)),
    "singular_vectors": (lambda a: (lambda u, s, v: (u * s.sin()) @ v)(*torch.linalg.svd(a, full_matrices=False)), (randn(3, 2),)),
    "qr": (torch.linalg.qr, (randn(4, 3),)),
    "lu": (lambda a: torch.linalg.lu(a)[1:], (regular(3, 3),)),
    "triangular": (lambda a, b: torch.linalg.solve_triangular(a, b, upper=False), (positive(3), randn(3, 2))),
    "triangular_unit": (
        lambda a, b: torch.linalg.solve_triangular(a, b, upper=True, left=False, unitriangular=True), (positive(3), randn(2, 3))
    ),
    "cholesky_solve": (torch.cholesky_solve, (randn(3, 2), positive(3))),
    "cholesky_inverse": (lambda a: torch.cholesky_inverse(torch.tril(a)), (positive(3),)),
    "matrix_exp": (torch.linalg.matrix_exp, (randn(3, 3),)),
    "matrix_power": (lambda a: torch.linalg.matrix_power(a, 3), (randn(3, 3),)),
    "pseudo_inverse": (torch.linalg.pinv, (randn(3, 2),)),
    "least_squares": (lambda a, b: torch.linalg.lstsq(a, b)[0], (randn(4, 2), randn(4, 3))),
    "complex_eigenvalues": (lambda a: torch.linalg.eigvals(a).abs().sum(), (randn(3, 3),)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_linear_algebra(name: str) -> None:
    """Every mode agrees with torch.func."""
    check(*CASES[name])


def test_one_matrix_for_a_batch_of_right_hand_sides() -> None:
    """torch.func fails on this broadcast: the oracle is the expanded matrix."""
    a, b = regular(3, 3), randn(2, 3, 2)
    got = chainrule.jacrev(torch.linalg.solve, (0, 1))(a, b)
    wanted = torch.func.jacrev(lambda a, b: torch.linalg.solve(a.expand(2, 3, 3), b), (0, 1))(a, b)
    assert_same(got, wanted)


def test_determinant_of_a_singular_matrix() -> None:
    """The cofactors are finite where the inverse is not."""
    a = torch.ones(2, 2, dtype=torch.float64)
    assert_same(chainrule.grad(torch.linalg.det)(a), torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64))


@pytest.mark.parametrize("function", [torch.linalg.pinv, lambda x: torch.linalg.vecdot(x, x.mT), lambda x: x.mH @ x.conj()])
def test_lazily_conjugated_values_are_right_while_recorded(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.randn(3, 3, dtype=torch.complex128)
    output, pullback = chainrule.vjp(function, x)
    expected, oracle = torch.func.vjp(function, x)
    torch.testing.assert_close(output, expected)
    cotangent = torch.randn_like(expected)
    torch.testing.assert_close(pullback(cotangent), oracle(cotangent))
    # A constant of the run is right too.
    found = chainrule.grad(lambda y: (y * function(x).abs().sum()).sum())(torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(found, expected.abs().sum().expand(2))


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("shape", [(3, 3), (1, 1), (2, 3, 3), (0, 0), (0, 2, 2)])
def test_gradients_of_cholesky_by_triangular_systems(shape: tuple[int, ...], upper: bool) -> None:
    eye = torch.eye(shape[-1], dtype=torch.float64)

    def loss(a: torch.Tensor) -> torch.Tensor:
        return torch.linalg.cholesky(a + 0.1 * a.mT, upper=upper).square().sin().sum()

    def weighted(lib: Any) -> Any:
        return lambda a: (lib.vmap(lib.grad(loss))(a) * a.cos()).sum()

    for _ in range(5):
        a = randn(3, *shape)
        a = a @ a.mT + shape[-1] * eye
        step = torch.randn_like(a)
        step = step + step.mT  # one triangle is read
        for transform in (
            lambda lib: lib.grad(loss)(a[0]),  # noqa: B023
            lambda lib: lib.vmap(lib.grad(loss))(a),  # noqa: B023
            lambda lib: lib.vmap(lib.vmap(lib.grad(loss)))(a[None]),  # noqa: B023
            lambda lib: lib.vmap(lambda a: lib.vjp(loss, a)[1](a.new_ones(())))(a),  # noqa: B023
            lambda lib: lib.grad(weighted(lib))(a),  # noqa: B023
        ):
            # Products of matrices of a few rows, with condition numbers of a few tens.
            torch.testing.assert_close(transform(chainrule), transform(torch.func), rtol=1e-9, atol=1e-10)
        wanted = torch.func.grad(weighted(torch.func))(a)
        given = a.clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(weighted(chainrule)(given), given)[0], wanted, rtol=1e-9, atol=1e-10)
        ahead, behind = (sum(loss(one) for one in a + sign * 1e-6 * step) for sign in (1, -1))
        found = (chainrule.vmap(chainrule.grad(loss))(a) * step).sum()
        torch.testing.assert_close(found, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-7)  # rounding over the step
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        chainrule.vmap(chainrule.grad(loss))(a)
    names = {event.name for event in profile.events()}
    assert not {"aten::linalg_inv_ex", "aten::eye"} & names
