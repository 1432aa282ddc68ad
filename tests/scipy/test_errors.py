"""What goes wrong in a user's function surfaces as that, names the function, and leaves nothing broken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")

from scipy import optimize  # noqa: E402

from chainrule import scipy as chainrule_scipy  # noqa: E402
from chainrule.scipy.functions import TorchFunction  # noqa: E402
from tests.scipy.problems import bratu, bratu_ends, decay  # noqa: E402


class Trouble(Exception):
    """An exception that no library raises."""


MESH = np.linspace(0, 1, 5)

# Each solves a problem in which a given function f(x) of one vector stands where the user's function does.
SOLVERS = {
    "minimize-BFGS": lambda f: chainrule_scipy.minimize(lambda x: f(x).sum(), np.ones(3)),
    "minimize-trust-exact": lambda f: chainrule_scipy.minimize(lambda x: f(x).sum(), np.ones(3), method="trust-exact"),
    "minimize-Newton-CG": lambda f: chainrule_scipy.minimize(lambda x: f(x).sum(), np.ones(3), method="Newton-CG"),
    "minimize-SLSQP": lambda f: chainrule_scipy.minimize(lambda x: f(x).sum(), np.ones(3), method="SLSQP"),
    "minimize-L-BFGS-B": lambda f: chainrule_scipy.minimize(lambda x: f(x).sum(), np.ones(3), method="L-BFGS-B"),
    "minimize-TNC": lambda f: chainrule_scipy.minimize(lambda x: f(x).sum(), np.ones(3), method="TNC"),
    "minimize-COBYLA": lambda f: chainrule_scipy.minimize(lambda x: f(x).sum(), np.ones(3), method="COBYLA"),
    "minimize-trust-constr": lambda f: chainrule_scipy.minimize(lambda x: f(x).sum(), np.ones(3), method="trust-constr", layout="sparse"),
    "constraint": lambda f: chainrule_scipy.minimize(
        lambda x: (x**2).sum(), np.ones(3), method="SLSQP", constraints=chainrule_scipy.nonlinear_constraint(f, 0.5, np.inf)
    ),
    "least_squares": lambda f: chainrule_scipy.least_squares(f, np.ones(3)),
    "least_squares-sparse": lambda f: chainrule_scipy.least_squares(f, np.ones(3), layout="sparse"),
    "least_squares-lm": lambda f: chainrule_scipy.least_squares(f, np.ones(3), method="lm"),
    "root-hybr": lambda f: chainrule_scipy.root(f, np.ones(3)),
    "root-lm": lambda f: chainrule_scipy.root(f, np.ones(3), method="lm"),
    "solve_ivp-Radau": lambda f: chainrule_scipy.solve_ivp(lambda t, y: -f(y), (0, 1), np.ones(3), method="Radau"),
    "solve_ivp-BDF": lambda f: chainrule_scipy.solve_ivp(lambda t, y: -f(y), (0, 1), np.ones(3), method="BDF", layout="sparse"),
    "solve_ivp-LSODA": lambda f: chainrule_scipy.solve_ivp(lambda t, y: -f(y), (0, 1), np.ones(3), method="LSODA"),
    "solve_ivp-RK45": lambda f: chainrule_scipy.solve_ivp(lambda t, y: -f(y), (0, 1), np.ones(3)),
    "solve_bvp": lambda f: chainrule_scipy.solve_bvp(lambda x, y: bratu(x, f(y)), bratu_ends, MESH, np.zeros((2, 5))),
    "solve_bvp-ends": lambda f: chainrule_scipy.solve_bvp(bratu, lambda a, b: bratu_ends(f(a), b), MESH, np.zeros((2, 5))),
    "curve_fit": lambda f: chainrule_scipy.curve_fit(lambda x, a, b: decay(f(x), a, b, 0), MESH, np.exp(-MESH)),
    "nlp_problem": lambda f: chainrule_scipy.nlp_problem(lambda x: f(x).sum(), np.ones(3)).objective(np.ones(3)),
}  # fmt: skip


def square(x):
    return x + x**2 / 10


@pytest.mark.parametrize("at_call", [1, 2, 3])
@pytest.mark.parametrize("name", SOLVERS)
def test_exceptions_come_through(name, at_call):
    calls = []

    def failing(x):
        calls.append(1)
        if len(calls) >= at_call:
            raise Trouble("of the user's own")
        return square(x)

    with pytest.raises(Trouble, match="of the user's own") as caught:
        SOLVERS[name](failing)
    assert any(note.startswith("(raised in chainrule.scipy.") for note in caught.value.__notes__)
    # The same solver and the transforms work as before.
    SOLVERS[name](square)
    x = torch.ones(2, dtype=torch.float64)
    assert torch.equal(TorchFunction(square, "here", None, False)(x), square(x))


@pytest.mark.parametrize("name", SOLVERS)
def test_nan_is_an_error(name):
    with pytest.raises(ValueError, match=r"chainrule\.scipy\.\w+: the function .* is NaN here"):
        SOLVERS[name](lambda x: x * float("nan"))


def test_nan_of_a_derivative():
    for method in ("BFGS", "trust-exact", "Newton-CG"):
        with pytest.raises(ValueError, match="its gradient is NaN"):
            chainrule_scipy.minimize(lambda x: x.sqrt().sum() * x.sum(), np.zeros(3), method=method)
    with pytest.raises(ValueError, match="its Hessian is NaN"):
        chainrule_scipy.minimize(lambda x: (x.abs() ** 1.5).sum() * x.sum(), np.zeros(3), method="trust-exact")
    for layout in ("dense", "sparse"):
        with pytest.raises(ValueError, match="its Jacobian is NaN"):
            chainrule_scipy.least_squares(lambda x: x.sqrt() * x, np.zeros(3), layout=layout)


def test_nan_on_request():
    def barrier(x):
        return (x - torch.log(x)).sum()

    found = chainrule_scipy.minimize(barrier, np.full(2, 3.0), method="Nelder-Mead", allow_nan=True)
    assert np.allclose(found.x, 1, atol=1e-3)


def test_shapes_and_types():
    with pytest.raises(ValueError, match=r"the function square must return a scalar \(shape \(\)\), got shape \(3,\)"):
        chainrule_scipy.minimize(square, np.ones(3))
    with pytest.raises(ValueError, match="must return a scalar"):
        chainrule_scipy.minimize(square, np.ones(3), method="Powell")
    with pytest.raises(ValueError, match=r"must return shape \(3,\), got \(2,\)"):
        chainrule_scipy.root(lambda x: x[:2], np.ones(3))
    with pytest.raises(ValueError, match=r"must return shape \(3,\), got \(2,\)"):
        chainrule_scipy.solve_ivp(lambda t, y: y[:2], (0, 1), np.ones(3), method="BDF")
    with pytest.raises(ValueError, match=r"must return shape \(2, 5\), got \(1, 5\)"):
        chainrule_scipy.solve_bvp(lambda x, y: y[:1], bratu_ends, MESH, np.zeros((2, 5)))
    with pytest.raises(ValueError, match=r"must return shape \(2,\), got \(1,\)"):
        chainrule_scipy.solve_bvp(bratu, lambda a, b: a[:1], MESH, np.zeros((2, 5)))
    for wrong in (lambda x: x[:, None] * x, lambda x: x.reshape(1, -1)):
        with pytest.raises(ValueError, match="must return a vector"):
            chainrule_scipy.least_squares(wrong, np.ones(3))
    with pytest.raises(TypeError, match="must return a tensor, got float"):
        chainrule_scipy.minimize(lambda x: float(x.sum()), np.ones(3))
    with pytest.raises(TypeError, match="real floating point"):
        chainrule_scipy.minimize(lambda x: x.sum().to(torch.complex128), np.ones(3))
    with pytest.raises(TypeError, match="complex"):
        chainrule_scipy.solve_ivp(lambda t, y: y, (0, 1), np.ones(2, dtype=complex))
    with pytest.raises(TypeError, match="expected a function"):
        chainrule_scipy.minimize(3, np.ones(3))


def test_options_that_are_derived_or_do_not_fit():
    with pytest.raises(TypeError, match="jac is derived"):
        chainrule_scipy.minimize(lambda x: x.sum(), np.ones(3), jac=True)
    with pytest.raises(TypeError, match="jac is derived"):
        chainrule_scipy.curve_fit(decay, MESH, MESH, None, None, False, None, (-1, 1), "lm", "2-point")
    with pytest.raises(ValueError, match="uses no Hessian"):
        chainrule_scipy.minimize(lambda x: x.sum(), np.ones(3), method="BFGS", layout="dense")
    with pytest.raises(ValueError, match="layout must be one of dense here"):
        chainrule_scipy.minimize(lambda x: x.sum(), np.ones(3), method="dogleg", layout="sparse")
    with pytest.raises(ValueError, match="layout must be one of"):
        chainrule_scipy.least_squares(square, np.ones(3), layout="csr")


def test_points_written_in_place_are_not_taken_for_the_last():
    function = TorchFunction(square, "here", None, False)
    x, seen = np.zeros(2), []
    for value in (1.0, 1.0, 2.0):
        x[:] = value
        function.once("value", (x,), lambda: seen.append(x.copy()))
    assert len(seen) == 2


def test_results_are_the_callers_own():
    problem = chainrule_scipy.nlp_problem(lambda x: (x**2).sum(), np.ones(2), square)
    for method in (problem.gradient, problem.constraints, problem.jacobian):
        first = method(np.ones(2))
        expected = first.copy()
        first[:] = 7
        assert np.array_equal(method(np.ones(2)), expected)


def test_callbacks_see_what_changed_between_solves():
    scale, x = [1.0], np.ones(3)

    def scaled(x):
        return scale[0] * square(x)

    constraint = chainrule_scipy.nonlinear_constraint(scaled, 0, 1)
    problem = chainrule_scipy.nlp_problem(lambda x: scaled(x).sum(), x, scaled)
    for callbacks in (
        [constraint.fun, constraint.jac], [problem.objective, problem.gradient], [problem.gradient, problem.objective],
        [problem.constraints, problem.jacobian], [problem.jacobian, problem.constraints],
    ):  # fmt: skip
        scale[0] = 1.0
        before = [callback(x) for callback in callbacks]
        scale[0] = 2.0
        for callback, value in zip(callbacks, before, strict=True):
            assert np.allclose(callback(x), 2 * value)


@pytest.mark.parametrize(("code", "message"), [
    ("import chainrule, sys; assert 'scipy' not in sys.modules", ""),
    ("import sys; sys.modules['scipy'] = None\nimport chainrule.scipy", "ImportError: chainrule.scipy needs SciPy; install chainrule[scipy]"),
])  # fmt: skip
def test_scipy_is_optional(code, message):
    source = str(Path(chainrule_scipy.__file__).parents[2])
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": source})
    assert message in found.stderr
    assert (found.returncode == 0) == (not message), found.stderr


@pytest.mark.parametrize("first", [1, 2, 3, 5])
@pytest.mark.parametrize("method", ["SLSQP", "trust-constr", "COBYLA", "COBYQA"])
def test_constraint_of_changing_length(method, first):
    calls = []

    def changing(x):
        calls.append(1)
        return x[:2] * x[1:3] if len(calls) <= first else x * x

    constraint = chainrule_scipy.nonlinear_constraint(changing, 0.0, 3.0)
    for _ in range(2):  # and nothing is left of it for the next solve
        calls.clear()
        with pytest.raises(ValueError, match=r"nonlinear_constraint: the function .*changing must return shape \(2,\), as at"):
            chainrule_scipy.minimize(lambda x: ((x - 2) ** 2).sum(), np.ones(4), method=method, constraints=constraint)
    calls[:] = [1] * 6
    result = chainrule_scipy.minimize(lambda x: ((x - 2) ** 2).sum(), np.ones(4), method=method, constraints=constraint)
    # First-order methods stop at a relative change of about 1e-4 in the solution at sqrt(3).
    assert np.allclose(result.x, np.sqrt(3), atol=1e-3)


def test_residuals_of_changing_length():
    calls = []

    def changing(x):
        calls.append(1)
        return x * x if len(calls) == 1 else x[:2]

    with pytest.raises(ValueError, match=r"least_squares: the function .*changing must return shape \(4,\), as at the first"):
        chainrule_scipy.least_squares(changing, np.ones(4))


def test_one_residual_as_in_scipy():
    """SciPy takes a scalar for a vector of one."""
    ours = chainrule_scipy.least_squares(lambda x: (x**2).sum() + 1, np.ones(2))
    theirs = optimize.least_squares(lambda x: (x**2).sum() + 1, np.ones(2))
    assert ours.fun.shape == theirs.fun.shape == (1,)
    assert np.allclose(ours.x, theirs.x, atol=1e-3)


@pytest.mark.parametrize("is_parametric", [False, True])
def test_shapes_that_are_wrong_in_a_jacobian_alone(is_parametric):
    """Jacobians are computed for more columns than the mesh has."""

    def system(x, y, p=None):
        found = torch.stack([y[1], -y[0] * (1 if p is None else p[0])])
        return found if y.shape[1] < 20 else found[:1]

    def ends(left, right, p=None):
        return torch.stack([left[0], right[0] - 1] if p is None else [left[0], right[0] - 1, left[1] - 1])

    p = np.ones(1) if is_parametric else None
    with pytest.raises(ValueError, match=r"solve_bvp: the function .*system must return shape \(2, \d+\), got \(1, \d+\)"):
        chainrule_scipy.solve_bvp(system, ends, np.linspace(0, 1, 5), np.zeros((2, 5)), p=p)
    calls = []

    def changing(left, right):
        calls.append(1)
        found = torch.stack([left[0], right[0] - 1])
        return found if len(calls) != 2 else found[:1]

    with pytest.raises(ValueError, match=r"solve_bvp: the function .*changing must return shape \(2,\), got \(1,\)"):
        chainrule_scipy.solve_bvp(lambda x, y: torch.stack([y[1], -y[0]]), changing, np.linspace(0, 1, 5), np.zeros((2, 5)))
