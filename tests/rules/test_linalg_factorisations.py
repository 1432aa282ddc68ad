"""Factorisations against torch.func and finite differences in float64: every mode, three orders, batches, empty matrices."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import chainrule
from tests.rules.test_layers import assert_same, check_first, randn, scalar

Case = tuple[Callable[..., Any], tuple[torch.Tensor, ...]]


def regular(*shape: int) -> torch.Tensor:
    """A matrix of full rank with distinct, well separated singular values and pivots."""
    rows, columns = shape[-2:]
    return 0.4 * randn(*shape) + torch.eye(rows, columns, dtype=torch.float64) * torch.arange(1.0, columns + 1.0, dtype=torch.float64)


def symmetric(a: torch.Tensor) -> torch.Tensor:
    """A symmetric matrix made from any matrix."""
    return a + a.mT


def positive(*shape: int) -> torch.Tensor:
    """A well conditioned symmetric matrix."""
    return regular(*shape) @ regular(*shape).mT


def factor(*shape: int) -> torch.Tensor:
    """A Cholesky factor."""
    return torch.linalg.cholesky(positive(*shape))


def vectors(a: torch.Tensor) -> torch.Tensor:
    """Eigenvectors, whose signs do not matter."""
    values, found = torch.linalg.eigh(symmetric(a))
    return (found * values.unsqueeze(-2).sin()) @ found.mT


def singular(a: torch.Tensor, full: bool = False) -> torch.Tensor:
    """Singular vectors and values, whatever their signs."""
    u, s, vh = torch.linalg.svd(a, full_matrices=full)
    k = s.shape[-1]
    return (u[..., :k] * s.unsqueeze(-2).sin()) @ vh[..., :k, :]


def solved(left: bool, adjoint: bool) -> Callable[..., torch.Tensor]:
    """The solution by given factors."""

    def solve(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.linalg.lu_solve(*torch.linalg.lu_factor(a), b, left=left, adjoint=adjoint)

    return solve


def given_factors(left: bool, adjoint: bool) -> Callable[..., torch.Tensor]:
    """The solution as a function of the factors themselves."""
    pivots = torch.tensor([2, 3, 3], dtype=torch.int32)
    return lambda lu, b: torch.linalg.lu_solve(lu, pivots.expand(lu.shape[:-1]), b, left=left, adjoint=adjoint)


CASES: dict[str, Case] = {
    "determinant_1": (torch.linalg.det, (regular(1, 1),)),
    "determinant_2": (torch.linalg.det, (regular(2, 2),)),
    "determinant_3": (torch.linalg.det, (regular(2, 3, 3),)),
    "determinant_4": (torch.linalg.det, (regular(4, 4),)),
    "log_determinant": (lambda a: torch.logdet(a @ a.mT), (regular(2, 3, 3),)),
    "eigenvalues": (lambda a: torch.linalg.eigvalsh(symmetric(a)), (regular(2, 3, 3),)),
    "eigenvalues_upper": (lambda a: torch.linalg.eigvalsh(a, UPLO="U"), (positive(3, 3),)),
    "eigenvectors": (vectors, (regular(2, 3, 3),)),
    "eigenvectors_upper": (lambda a: torch.linalg.eigh(a, UPLO="U")[1].square(), (positive(3, 3),)),
    "singular_values": (torch.linalg.svdvals, (regular(2, 3, 2),)),
    "singular_values_wide": (torch.linalg.svdvals, (regular(2, 3),)),
    "singular_vectors_tall": (singular, (regular(2, 3, 2),)),
    "singular_vectors_wide": (singular, (regular(2, 3),)),
    "singular_vectors_square": (singular, (regular(3, 3),)),
    "singular_vectors_full": (lambda a: singular(a, True), (regular(3, 2),)),
    "singular_vectors_full_wide": (lambda a: singular(a, True), (regular(2, 3),)),
    "nuclear_norm": (lambda a: torch.linalg.norm(a, "nuc"), (regular(3, 2),)),
    "spectral_norm": (lambda a: torch.linalg.matrix_norm(a, 2), (regular(2, 3, 2),)),
    "condition_number": (torch.linalg.cond, (regular(3, 3),)),
    "qr_tall": (torch.linalg.qr, (regular(2, 3, 2),)),
    "qr_square": (torch.linalg.qr, (regular(3, 3),)),
    "qr_wide": (torch.linalg.qr, (regular(2, 3),)),
    "qr_complete": (lambda a: torch.linalg.qr(a, mode="complete"), (regular(3, 3),)),
    "qr_complete_wide": (lambda a: torch.linalg.qr(a, mode="complete"), (regular(2, 2, 3),)),
    "exponential": (torch.linalg.matrix_exp, (0.5 * regular(2, 2, 2),)),
    "lu_square": (lambda a: torch.linalg.lu(a)[1:], (randn(2, 3, 3),)),
    "lu_tall": (lambda a: torch.linalg.lu(a)[1:], (randn(3, 2),)),
    "lu_wide": (lambda a: torch.linalg.lu(a)[1:], (randn(2, 3),)),
    "lu_factor_square": (lambda a: torch.linalg.lu_factor(a)[0], (randn(2, 3, 3),)),
    "lu_factor_tall": (lambda a: torch.linalg.lu_factor(a)[0], (randn(4, 2),)),
    "lu_factor_wide": (lambda a: torch.linalg.lu_factor(a)[0], (randn(2, 4),)),
    "lu_unpack": (lambda a: torch.lu_unpack(a, torch.tensor([2, 3, 3], dtype=torch.int32))[1:], (regular(3, 3),)),
    "lu_unpack_tall": (lambda a: torch.lu_unpack(a, torch.tensor([2, 2], dtype=torch.int32))[1:], (regular(3, 2),)),
    "lu_unpack_wide": (lambda a: torch.lu_unpack(a, torch.tensor([2, 2], dtype=torch.int32))[1:], (regular(2, 3),)),
    **{
        f"lu_solve_{side}_{adjoint}": (solved(side, adjoint), (regular(2, 3, 3), randn(2, *((3, 2) if side else (2, 3)))))
        for side in (True, False) for adjoint in (True, False)
    },
    **{
        f"lu_factors_{side}_{adjoint}": (given_factors(side, adjoint), (regular(2, 3, 3), randn(2, *((3, 2) if side else (2, 3)))))
        for side in (True, False) for adjoint in (True, False)
    },
    "cholesky_solve": (torch.cholesky_solve, (randn(2, 3, 2), factor(2, 3, 3))),
    "cholesky_solve_upper": (lambda b, u: torch.cholesky_solve(b, u, upper=True), (randn(3, 2), factor(3, 3).mT.contiguous())),
    "cholesky_inverse": (torch.cholesky_inverse, (factor(2, 3, 3),)),
    "cholesky_inverse_upper": (lambda u: torch.cholesky_inverse(u, upper=True), (factor(3, 3).mT.contiguous(),)),
    "pseudo_inverse_tall": (torch.linalg.pinv, (regular(2, 3, 2),)),
    "pseudo_inverse_wide": (torch.linalg.pinv, (regular(2, 3),)),
    "pseudo_inverse_hermitian": (lambda a: torch.linalg.pinv(symmetric(a), hermitian=True), (regular(3, 3),)),
    "least_squares": (lambda a, b: torch.linalg.lstsq(a, b)[0], (regular(2, 4, 2), randn(2, 4, 3))),
    "least_squares_vector": (lambda a, b: torch.linalg.lstsq(a, b)[0], (regular(2, 4, 2), randn(2, 4))),
    "least_squares_wide": (lambda a, b: torch.linalg.lstsq(a, b)[0], (regular(2, 3), randn(2, 2))),
    "matrix_power": (lambda a: torch.linalg.matrix_power(a, -2), (regular(2, 2, 2),)),
    "cross": (torch.linalg.cross, (randn(2, 3), randn(1, 3))),
    "cross_first": (lambda a, b: torch.linalg.cross(a, b, dim=0), (randn(3, 2), randn(3, 2))),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_first_and_second_order(name: str) -> None:
    """Both modes, and every mix of two, agree with torch.func; the op is structured."""
    function, arguments = CASES[name]
    check_first(function, arguments)
    argnums = tuple(range(len(arguments)))
    total = scalar(function)
    wanted = torch.func.jacrev(torch.func.jacrev(total, argnums), argnums)(*arguments)
    assert_same(chainrule.hessian(total, argnums)(*arguments), wanted)
    for outer in (chainrule.jacfwd, chainrule.jacrev):
        for inner in (chainrule.jacfwd, chainrule.jacrev):
            assert_same(outer(inner(total, argnums), argnums)(*arguments), wanted)
    assert not chainrule.explain(chainrule.hessian(total, argnums))(*arguments).opaque


@pytest.mark.parametrize("name", CASES)
def test_under_vmap(name: str) -> None:
    """Jacobians per sample, and the Jacobian of the batch."""
    function, arguments = CASES[name]
    argnums = tuple(range(len(arguments)))
    batched = tuple(torch.stack([a, 0.9 * a, 1.1 * a]) for a in arguments)
    for transform in (chainrule.jacrev, chainrule.jacfwd):
        single = [tree_leaves(transform(function, argnums)(*(b[k] for b in batched))) for k in range(3)]
        got = chainrule.vmap(transform(function, argnums))(*batched)
        assert_same(got, [torch.stack(items) for items in zip(*single, strict=True)])
    grads = [torch.func.grad(scalar(function), argnums)(*(b[k] for b in batched)) for k in range(3)]
    got = chainrule.grad(scalar(chainrule.vmap(function)), argnums)(*batched)
    assert_same(got, [torch.stack(items) for items in zip(*grads, strict=True)])


@pytest.mark.parametrize("name", ["eigenvectors", "singular_vectors_tall", "qr_tall", "lu_factor_wide",
                                  "lu_solve_True_False", "cholesky_solve", "pseudo_inverse_tall", "least_squares", "exponential"])  # fmt: skip
def test_third_order(name: str) -> None:
    """The gradient of a directional second derivative, against torch.func."""
    function, arguments = CASES[name]
    first = arguments[0]
    direction = randn(*reversed(first.shape)).reshape(first.shape)
    total = scalar(function)

    def third(transforms: Any) -> Any:
        def along(x: torch.Tensor) -> torch.Tensor:
            return (transforms.grad(lambda y: total(y, *arguments[1:]))(x) * direction).sum()

        return transforms.jacfwd(transforms.jacrev(along))(first)

    assert_same(third(chainrule), third(torch.func))


@pytest.mark.parametrize("size", [3, 4])
def test_third_order_of_the_determinant(size: int) -> None:
    """Against the expansion over permutations; torch's own third derivative is wrong."""
    a, b = regular(size, size), randn(size, size)

    def expanded(a: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=a.dtype)
        for order in permutations(range(size)):
            sign = (-1) ** sum(order[i] > order[j] for i in range(size) for j in range(i + 1, size))
            total = total + sign * torch.stack([a[i, j] for i, j in enumerate(order)]).prod()
        return total

    def third(transforms: Any, function: Any) -> Any:
        along = lambda x: (transforms.grad(lambda y: function(y).sin())(x) * b).sum()  # noqa: E731
        return transforms.jacrev(transforms.jacrev(along))(a)

    assert_same(third(chainrule, torch.linalg.det), third(torch.func, expanded))


@pytest.mark.parametrize("name", CASES)
def test_finite_differences(name: str) -> None:
    """Central differences, with steps of 1e-6 good to about 1e-8."""
    if name in ("eigenvalues_upper", "eigenvectors_upper") or name.startswith("cholesky"):
        pytest.skip("the op reads one triangle, and torch's convention for its derivative is symmetric, or of the whole matrix")
    function, arguments = CASES[name]
    total = scalar(function)
    for number, argument in enumerate(arguments):
        direction = randn(*reversed(argument.shape)).reshape(argument.shape)

        def moved(step: float) -> torch.Tensor:
            return total(*(a + step * direction if k == number else a for k, a in enumerate(arguments)))

        (slope,) = torch.atleast_1d((moved(1e-6) - moved(-1e-6)) / 2e-6)
        got = chainrule.jvp(lambda x: total(*(x if k == number else a for k, a in enumerate(arguments))), (argument,), (direction,))[1]
        torch.testing.assert_close(got, slope, atol=1e-6, rtol=1e-6)


def hermitian(a: torch.Tensor) -> torch.Tensor:
    """A Hermitian matrix from a real one of twice the rows."""
    size = a.shape[-1]
    z = torch.complex(a[..., :size, :], a[..., size:, :])
    return z + z.mH


def rectangular(a: torch.Tensor) -> torch.Tensor:
    """A complex matrix from a real one of twice the rows."""
    half = a.shape[-2] // 2
    return torch.complex(a[..., :half, :], a[..., half:, :])


def complex_solution(a: torch.Tensor) -> torch.Tensor:
    """A solution by complex factors."""
    return torch.linalg.lu_solve(*torch.linalg.lu_factor(rectangular(a)), torch.ones(a.shape[-1], 1, dtype=torch.complex128)).abs()


COMPLEX: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "determinant": lambda a: torch.view_as_real(torch.linalg.det(rectangular(a))),
    "eigenvalues": lambda a: torch.linalg.eigvalsh(hermitian(a)),
    "eigenvectors": lambda a: torch.linalg.eigh(hermitian(a))[1].abs(),
    "singular_values": lambda a: torch.linalg.svdvals(rectangular(a)),
    "singular_vectors": lambda a: torch.linalg.svd(rectangular(a))[0].abs(),
    "singular_vectors_left_and_right": lambda a: singular(rectangular(a)).abs(),
    "singular_vectors_tall": lambda a: singular(torch.complex(a, a.flip(-1).sin())).abs(),
    "singular_vectors_wide": lambda a: singular(torch.complex(a, a.flip(-1).sin()).mT).imag,
    "nuclear_norm": lambda a: torch.linalg.norm(rectangular(a), "nuc", dim=(-2, -1)),
    "qr": lambda a: torch.linalg.qr(rectangular(a))[1].abs(),
    "qr_tall": lambda a: torch.view_as_real(torch.linalg.qr(torch.complex(a, a.flip(-1).sin()))[0]),
    "qr_wide": lambda a: torch.view_as_real(torch.cat(torch.linalg.qr(torch.complex(a, a.flip(-1).sin()).mT), -1)),
    "exponential": lambda a: torch.linalg.matrix_exp(rectangular(a)).abs(),
    "lu_solve": complex_solution,
    "general_eigenvalues": lambda a: torch.linalg.eigvals(rectangular(a)).abs(),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex(name: str) -> None:
    """Functions that do not depend on the phases, through complex matrices."""
    function, a = COMPLEX[name], regular(2, 4, 2) + torch.tensor([[1.0, 0.3], [0.0, 2.0], [0.4, 0.0], [0.2, 0.7]], dtype=torch.float64)
    # torch.func cannot batch some of the checks in torch's formulas.
    oracle = torch.autograd.functional
    assert_same(chainrule.jacrev(function)(a), oracle.jacobian(function, a))
    assert_same(chainrule.jacfwd(function)(a), oracle.jacobian(function, a))
    total = scalar(function)
    assert_same(chainrule.hessian(total)(a), oracle.hessian(total, a))
    batched = torch.stack([a, 1.2 * a])
    assert_same(chainrule.vmap(chainrule.jacrev(function))(batched), torch.stack([oracle.jacobian(function, x) for x in batched]))


EMPTY: dict[str, Callable[[torch.Tensor], Any]] = {
    "determinant": torch.linalg.det,
    "log_determinant": lambda a: torch.linalg.slogdet(a)[1],
    "eigenvectors": torch.linalg.eigh,
    "eigenvalues": torch.linalg.eigvalsh,
    "singular_vectors": lambda a: torch.linalg.svd(a, full_matrices=False),
    "singular_values": torch.linalg.svdvals,
    "qr": torch.linalg.qr,
    "exponential": torch.linalg.matrix_exp,
    "lu": lambda a: torch.linalg.lu(a)[1:],
    "lu_factor": lambda a: torch.linalg.lu_factor(a)[0],
    "lu_solve": lambda a: torch.linalg.lu_solve(*torch.linalg.lu_factor(a), a),
    "pseudo_inverse": torch.linalg.pinv,
    "cholesky_solve": lambda a: torch.cholesky_solve(a, a),
    "cholesky_inverse": torch.cholesky_inverse,
    "least_squares": lambda a: torch.linalg.lstsq(a, a)[0],
}


@pytest.mark.parametrize("shape", [(0, 0), (0, 3, 3), (2, 0, 0)])
@pytest.mark.parametrize("name", EMPTY)
def test_empty(name: str, shape: tuple[int, ...]) -> None:
    """No matrices, and matrices without elements: the shapes that plain evaluation implies."""
    a = torch.zeros(shape, dtype=torch.float64)
    wanted = [leaf.new_zeros((*leaf.shape, *a.shape)) for leaf in tree_leaves(EMPTY[name](a))]
    for transform in (chainrule.jacrev, chainrule.jacfwd):
        assert_same(transform(EMPTY[name])(a), wanted)
    total = lambda x: sum(leaf.sum() for leaf in tree_leaves(EMPTY[name](x)))  # noqa: E731
    assert_same(chainrule.hessian(total)(a), a.new_zeros((*shape, *shape)))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_determinant_of_singular_matrices(size: int) -> None:
    """The cofactors of rank ``size - 1`` have rank one; a vanishing last row makes them those of the minors."""
    a = regular(size, size)
    a[-1] = 0
    minors = torch.stack([
        (-1) ** (size - 1 + k) * torch.linalg.det(torch.cat([a[:-1, :k], a[:-1, k + 1 :]], -1)) for k in range(size)
    ])
    wanted = torch.zeros_like(a)
    wanted[-1] = minors
    assert_same(chainrule.jacrev(torch.linalg.det)(a), wanted)
    assert_same(chainrule.jacfwd(torch.linalg.det)(torch.stack([a, regular(size, size)]))[0, 0], wanted)
    if size <= 3:
        step = 1e-4 * randn(size, size)
        around = chainrule.grad(torch.linalg.det)
        change = (around(a + step) - around(a - step)) / 2
        assert_same((chainrule.hessian(torch.linalg.det)(a) * step).sum((-2, -1)), change)
    else:
        assert not chainrule.hessian(torch.linalg.det)(a).isfinite().all()


@pytest.mark.parametrize("size", [4, 5])
def test_determinant_of_matrices_that_are_singular_up_to_rounding(size: int) -> None:
    """Two equal rows: the determinant is not quite zero, and the inverse has no digits."""
    a = regular(size, size)
    a[0] = a[-1]
    minor = lambda i, k: torch.linalg.det(a[[r for r in range(size) if r != i]][:, [c for c in range(size) if c != k]])  # noqa: E731
    wanted = torch.stack([torch.stack([(-1) ** (i + k) * minor(i, k) for k in range(size)]) for i in range(size)])
    for transform in (chainrule.grad, chainrule.jacrev, chainrule.jacfwd):
        assert_same(transform(torch.linalg.det)(a), wanted)
    assert not chainrule.hessian(torch.linalg.det)(a).isfinite().all()
    assert_same(chainrule.grad(torch.linalg.det)(torch.zeros_like(a)), torch.zeros_like(a))


def test_determinant_of_an_orthogonal_matrix() -> None:
    """Equal singular values are no obstacle, in any order."""
    eye = torch.eye(4, dtype=torch.float64)
    wanted = torch.einsum("ij,kl->ijkl", eye, eye) - torch.einsum("il,kj->ijkl", eye, eye)
    assert_same(chainrule.hessian(torch.linalg.det)(eye), wanted)


def test_residuals_of_least_squares() -> None:
    """The squared residuals, against their definition."""
    a, b = regular(4, 2), randn(4, 3)

    def defined(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (b - a @ (torch.linalg.inv(a.mT @ a) @ (a.mT @ b))).square().sum(-2)

    def found(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.linalg.lstsq(a, b, driver="gels")[1]

    assert_same(chainrule.jacrev(found, (0, 1))(a, b), torch.func.jacrev(defined, (0, 1))(a, b))
    assert_same(chainrule.jacfwd(found, (0, 1))(a, b), torch.func.jacrev(defined, (0, 1))(a, b))
    total = lambda f: lambda a, b: f(a, b).sin().sum()  # noqa: E731
    assert_same(chainrule.hessian(total(found), (0, 1))(a, b), torch.func.hessian(total(defined), (0, 1))(a, b))


@pytest.mark.parametrize("function", [lambda a: torch.linalg.qr(a, mode="r")[1], lambda a: torch.linalg.qr(a, mode="complete")[1]])
def test_what_torch_does_not_differentiate(function: Callable[..., Any]) -> None:
    """The same errors as torch's own."""
    a = regular(3, 2)
    with pytest.raises(RuntimeError) as theirs:
        torch.func.jacrev(function)(a)
    for transform in (chainrule.jacrev, chainrule.jacfwd):
        with pytest.raises(RuntimeError) as ours:
            transform(function)(a)
        assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]


def test_broadcast_right_hand_sides() -> None:
    """Stacks of other shapes are solved by torch's own formula."""
    lu, pivots = torch.linalg.lu_factor(regular(3, 3))
    b = randn(2, 3, 2)
    got = chainrule.jacrev(lambda b: torch.linalg.lu_solve(lu, pivots, b))(b)
    assert_same(got, torch.func.jacrev(lambda b: torch.linalg.solve(regular(3, 3).expand(2, 3, 3), b))(b))


def test_results_join_torch_autograd() -> None:
    """Gradients flow through a structured Jacobian into torch's graph."""
    x = regular(3, 3).requires_grad_()
    for function in (vectors, torch.linalg.det, torch.linalg.qr, torch.linalg.pinv):
        (got,) = torch.autograd.grad(sum(leaf.sin().sum() for leaf in tree_leaves(chainrule.jacfwd(function)(x))), x)

        def total(y: torch.Tensor, function: Any = function) -> torch.Tensor:
            return sum(leaf.sin().sum() for leaf in tree_leaves(torch.func.jacrev(function)(y)))

        assert_same(got, torch.func.grad(total)(x.detach()))
