"""``minimize``: SciPy's own optimum in fewer evaluations, and exact callbacks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

scipy_optimize = pytest.importorskip("scipy.optimize")

from chainrule import scipy as chainrule_scipy  # noqa: E402
from chainrule.scipy.functions import TorchFunction  # noqa: E402
from chainrule.scipy.optimize import _Objective  # noqa: E402
from tests.scipy.problems import coupled, numpy_of, rosenbrock  # noqa: E402

# Optima are compared to the square root of the solvers' tolerances on gradients (1e-5 to 1e-8), by the Hessian's size (about 1e3).
NEAR = 1e-4


@pytest.mark.parametrize("method", ["BFGS", "CG", "L-BFGS-B", "SLSQP", "TNC", None])
def test_gradient_methods(method):
    x0, limits = np.full(50, 0.9), {"maxfun": 10**5} if method in ("L-BFGS-B", "TNC") else None
    ours = chainrule_scipy.minimize(rosenbrock, x0, method=method, options=limits)
    # The minimum is 0; SLSQP stops where the value changes by less than 1e-6, TNC likewise.
    assert ours.fun < 1e-3
    if method in ("BFGS", "L-BFGS-B", "SLSQP"):
        theirs = scipy_optimize.minimize(numpy_of(rosenbrock), x0, method=method, options=limits)
        assert ours.fun <= theirs.fun + 1e-6
        assert ours.nfev * 5 < theirs.nfev


@pytest.mark.parametrize("method", ["Newton-CG", "trust-ncg", "trust-krylov", "trust-exact", "dogleg", "trust-constr"])
def test_hessian_methods(method):
    calls = []

    def counted(x):
        calls.append(1)
        return rosenbrock(x)

    x0 = np.full(50, 1.05)
    ours = chainrule_scipy.minimize(counted, x0, method=method)
    # The minimum is 0; the loosest of the methods' own tolerances stops at gradients of 0.1, on curvatures of 1000.
    assert ours.fun < 1e-4
    # A run for value and gradient and one for the Hessian per point, at most.
    assert len(calls) <= 2 * (ours.nfev + 1)


@pytest.mark.parametrize("layout", ["dense", "sparse", "operator"])
def test_trust_constr_layouts(layout):
    ours = chainrule_scipy.minimize(rosenbrock, np.full(50, 1.05), method="trust-constr", layout=layout)
    assert np.allclose(ours.x, 1, atol=NEAR)


# SciPy's own quasi-Newton Hessians, in the comparison, warn where a step is too short.
@pytest.mark.filterwarnings("ignore:delta_grad == 0.0:UserWarning")
@pytest.mark.parametrize("layout", ["dense", "sparse"])
@pytest.mark.parametrize("method", ["trust-constr", "SLSQP"])
def test_constraints(method, layout):
    size = 8
    x0 = np.linspace(0.2, 0.6, size)
    lower, upper = np.array([1.0] + [-np.inf] * (size - 1)), np.array([2.0] + [0.3] * (size - 1))
    ours = chainrule_scipy.minimize(
        rosenbrock, x0, method=method, constraints=chainrule_scipy.nonlinear_constraint(coupled, lower, upper, layout=layout),
        bounds=scipy_optimize.Bounds(-2, 2), options={"maxiter": 1000},
    )  # fmt: skip
    theirs = scipy_optimize.minimize(
        numpy_of(rosenbrock), x0, method=method, constraints=scipy_optimize.NonlinearConstraint(numpy_of(coupled), lower, upper),
        bounds=scipy_optimize.Bounds(-2, 2), options={"maxiter": 1000},
    )  # fmt: skip
    # trust-constr's barrier ends at 1e-8, on values of size 10: 1e-4 is its own accuracy with finite differences.
    assert abs(ours.fun - theirs.fun) < 1e-4 * max(1, abs(theirs.fun))
    assert np.allclose(ours.x, theirs.x, atol=1e-3)
    assert ours.nfev < theirs.nfev


def test_constraint_callbacks_are_exact():
    x, weights = np.linspace(-1, 1, 6), np.linspace(2, 3, 6)
    at, v = torch.tensor(x), torch.tensor(weights)
    for layout in ("dense", "sparse"):
        constraint = chainrule_scipy.nonlinear_constraint(coupled, 0, 1, layout=layout)
        jacobian, curvature = constraint.jac(x), constraint.hess(x, weights)
        if layout == "sparse":
            jacobian, curvature = jacobian.toarray(), curvature.toarray()
        assert np.allclose(constraint.fun(x), coupled(at).numpy(), rtol=1e-14)
        assert np.allclose(jacobian, torch.func.jacrev(coupled)(at).numpy(), rtol=1e-14)
        assert np.allclose(curvature, torch.func.hessian(lambda x: (v * coupled(x)).sum())(at).numpy(), rtol=1e-13, atol=1e-14)


def test_value_and_gradient_in_one_run():
    calls = []

    def counted(x):
        calls.append(1)
        return rosenbrock(x)

    ours = chainrule_scipy.minimize(counted, np.zeros(5), method="BFGS")
    assert len(calls) == ours.nfev


def test_derivative_free_methods_and_arguments():
    target = np.array([1.0, 2.0])
    seen = []

    def distance(x, to, power):
        seen.append((type(to), power))
        return ((x - to) ** power).sum()

    for method in ("Nelder-Mead", "Powell", "COBYLA", "BFGS", "trust-exact"):
        found = chainrule_scipy.minimize(distance, np.zeros(2), args=(target, 2), method=method)
        assert np.allclose(found.x, target, atol=1e-3)
    assert set(seen) == {(torch.Tensor, 2)}


def test_callbacks_equal_torch_func():
    seen = {}

    def method(fun, x0, args, jac, hessp, **options):
        seen.update(value=fun(x0), gradient=jac(x0), product=hessp(x0, np.ones_like(x0)))
        return scipy_optimize.OptimizeResult(x=x0, success=True)

    x = np.random.default_rng(0).normal(size=7)
    chainrule_scipy.minimize(rosenbrock, x, method=method)
    at = torch.tensor(x)
    assert np.isclose(seen["value"], rosenbrock(at).item(), rtol=1e-14)
    assert np.allclose(seen["gradient"], torch.func.grad(rosenbrock)(at).numpy(), rtol=1e-13)
    expected = torch.func.hessian(rosenbrock)(at).sum(1).numpy()
    assert np.allclose(seen["product"], expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(("size", "count", "is_held"), [(4, 4, True), (4, 1, False), (200, 130, False)])
def test_products_with_small_hessians(size, count, is_held):
    """Where a solver asks for many at a point, they are made of the matrix; all are those of the Hessian at their point."""
    function = TorchFunction(rosenbrock, "minimize", None, False, None)
    objective = _Objective(function, "dense")
    for seed in range(3):
        generator = np.random.default_rng(seed)
        x = generator.standard_normal(size)
        expected = torch.func.hessian(rosenbrock)(torch.from_numpy(x)).numpy()
        for _ in range(count):
            vector = generator.standard_normal(size)
            assert np.allclose(objective.product(x, vector), expected @ vector, rtol=1e-10, atol=1e-8)
    assert objective._is_held == is_held
