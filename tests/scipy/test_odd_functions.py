"""Linear and constant functions, single unknowns, outputs that are inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

scipy_optimize = pytest.importorskip("scipy.optimize")

from chainrule import scipy as chainrule_scipy  # noqa: E402


@pytest.mark.parametrize("layout", ["dense", "sparse", "operator"])
def test_linear_objective(layout):
    constraint = chainrule_scipy.nonlinear_constraint(
        lambda x: (x**2).sum(), -np.inf, 1.0, layout="dense" if layout == "operator" else layout
    )
    found = chainrule_scipy.minimize(lambda x: x[0], np.zeros(2), method="trust-constr", layout=layout, constraints=constraint)
    # The barrier method's own tolerance is 1e-8, in a direction along the circle its root.
    assert np.allclose(found.x, [-1, 0], atol=1e-3)


@pytest.mark.parametrize("layout", ["dense", "sparse", "operator"])
def test_constant_and_identical_residuals(layout):
    def residuals(x):
        return torch.cat([x, torch.ones(2, dtype=x.dtype, device=x.device)])

    found = chainrule_scipy.least_squares(residuals, np.ones(3), layout=layout, device="cpu")
    assert np.allclose(found.x, 0, atol=1e-8) and np.isclose(found.cost, 1)
    found = chainrule_scipy.least_squares(lambda x: x, np.ones(3), layout=layout)
    assert np.allclose(found.x, 0, atol=1e-8)


def test_constant_objective():
    for method in ("BFGS", "trust-exact", "Newton-CG"):
        found = chainrule_scipy.minimize(lambda x: torch.tensor(3.0, dtype=torch.float64), np.ones(2), method=method)
        assert np.array_equal(found.x, np.ones(2)) and found.fun == 3


def test_single_unknowns():
    assert np.isclose(chainrule_scipy.root(lambda x: x**2 - 2, 1.0).x[0], np.sqrt(2))
    assert np.isclose(chainrule_scipy.minimize(lambda x: ((x - 2) ** 2).sum(), 0.0, method="BFGS").x[0], 2)
    assert np.isclose(chainrule_scipy.least_squares(lambda x: x[0] - 2, 0.0).x[0], 2)
    x = np.linspace(0, 1, 9)
    assert np.isclose(chainrule_scipy.curve_fit(lambda x, a: a * x, x, 3 * x)[0][0], 3)


@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_linear_and_constant_systems(layout):
    found = chainrule_scipy.solve_ivp(lambda t, y: -y, (0, 1), np.ones(2), method="BDF", layout=layout, rtol=1e-6)
    assert np.allclose(found.y[:, -1], np.exp(-1), rtol=1e-4)
    found = chainrule_scipy.solve_ivp(lambda t, y: t.expand(2), (0, 1), np.zeros(2), method="Radau", layout=layout, rtol=1e-6)
    assert np.allclose(found.y[:, -1], 0.5, rtol=1e-4)


def test_functions_that_write_to_their_argument():
    def residuals(x):
        x *= 2
        return x - 4

    found = chainrule_scipy.least_squares(residuals, np.ones(3), layout="sparse")
    assert np.allclose(found.x, 2)


def test_program_without_curvature():
    problem = chainrule_scipy.nlp_problem(lambda x: x.sum(), np.ones(3), lambda x: x[1:] - x[:-1])
    assert len(problem.hessianstructure()[0]) == len(problem.hessian(np.ones(3), np.ones(2), 1.0))
    dense = np.zeros((2, 3))
    dense[problem.jacobianstructure()] = problem.jacobian(np.ones(3))
    assert np.array_equal(dense, [[-1, 1, 0], [0, -1, 1]])
