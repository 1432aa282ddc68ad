"""Functions run on the device that is asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")

from chainrule import scipy as chainrule_scipy  # noqa: E402
from tests.scipy.problems import bratu, bratu_ends, brusselator, coupled, decay, rosenbrock, rosenbrock_residuals  # noqa: E402

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
def test_every_solver(device):
    def here(function):
        def of(*args):
            assert all(a.device.type == device for a in args)
            return function(*args)

        return of

    x0, x = np.full(4, 0.9), np.linspace(0, 1, 8)
    for layout in ("dense", "sparse", "operator"):
        assert chainrule_scipy.least_squares(here(rosenbrock_residuals), x0, layout=layout, device=device).success
        chainrule_scipy.minimize(here(rosenbrock), x0, method="trust-constr", layout=layout, device=device)
    constraint = chainrule_scipy.nonlinear_constraint(here(coupled), -10, 10, layout="sparse", device=device)
    chainrule_scipy.minimize(here(rosenbrock), x0, method="trust-constr", constraints=constraint, device=device)
    chainrule_scipy.minimize(here(rosenbrock), x0, method="trust-krylov", device=device)
    assert chainrule_scipy.root(here(lambda x: x**2 - 1), x0, device=device).success
    start = np.concatenate([np.ones(5), np.full(5, 3.0)])
    assert chainrule_scipy.solve_ivp(here(brusselator), (0, 1), start, method="BDF", layout="sparse", device=device).success
    assert chainrule_scipy.solve_bvp(here(bratu), here(bratu_ends), x, np.zeros((2, 8)), device=device).success

    def model(x, a, b):
        return decay(x, a, b, 0)

    assert np.allclose(chainrule_scipy.curve_fit(here(model), x, 2 * np.exp(-x), p0=[1, 1], device=device)[0], [2, 1])
    problem = chainrule_scipy.nlp_problem(here(rosenbrock), x0, here(coupled), device=device)
    assert problem.hessian(x0, np.ones(4), 1.0).shape == problem.hessianstructure()[0].shape
    assert problem.jacobian(x0).shape == problem.jacobianstructure()[0].shape
