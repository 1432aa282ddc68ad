"""Values that solvers ask for alone: replayed once that pays, as closures are at the time, and checked as plain ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")

from chainrule import scipy as solvers  # noqa: E402
from chainrule.scipy.functions import TorchFunction  # noqa: E402
from chainrule.scipy.replays import ATTRIBUTE, VALUES  # noqa: E402


def values_replayed(function):
    """How many graphs of values are kept with a function."""
    entries = function.__dict__[ATTRIBUTE].entries
    return sum(len(entry._graphs) for ((_, key), *_), entry in entries.items() if key[0] == "value")


def make_system(shift):
    """Three equations of a few ops each, with a root near one."""

    def system(x):
        return torch.stack([x[0] + x[1] + x[2] - 3 - shift, x[0] ** 2 + x[1] ** 2 + x[2] ** 2 - 5, torch.exp(x[0]) + x[0] * x[1] - 1])

    return system


def make_oscillator(rate):
    return lambda t, y: torch.stack([y[1], rate * (1 - y[0] ** 2) * y[1] - y[0] + 0 * t])


START = np.array([1.0, 2.0, 3.0])


def test_roots_of_replayed_values():
    system = make_system(0.0)
    plain = solvers.root(system, START, compiled=False)
    for _ in range(VALUES // plain.nfev + 2):
        found = solvers.root(system, START)
    assert values_replayed(system) == 1
    # A replay takes fused steps: a few units in the last place of values, through an iteration that stops at 1e-8.
    np.testing.assert_allclose(found.x, plain.x, rtol=1e-6)
    residual = system(torch.from_numpy(found.x)).abs().max()
    assert residual < 1e-9


def test_integration_by_replayed_values():
    function = make_oscillator(20.0)
    for method in ("RK45", "BDF"):
        plain = solvers.solve_ivp(function, (0, 4), np.array([2.0, 0.0]), method=method, compiled=False)
        for _ in range(2):
            found = solvers.solve_ivp(function, (0, 4), np.array([2.0, 0.0]), method=method)
        np.testing.assert_allclose(found.y[:, -1], plain.y[:, -1], rtol=1e-5)
    assert values_replayed(function) == 1


def test_values_without_derivatives():
    function = lambda x: (x[0] - 1) ** 2 + (x[1] - x[0]) ** 4 + 1  # noqa: E731
    for _ in range(3):
        found = solvers.minimize(function, np.zeros(2), method="Nelder-Mead")
    assert values_replayed(function) == 1
    assert abs(found.fun - 1) < 1e-6


def test_a_replaced_variable_is_seen():
    """What the closure holds may be another between two solves, or be written to."""
    shift = torch.zeros((), dtype=torch.float64)
    system = make_system(shift)
    for _ in range(VALUES):
        solvers.root(system, START)
        if values_replayed(system):
            break
    for _ in range(3):
        shift.add_(0.01)
        found = solvers.root(system, START)
        assert abs(found.x.sum() - 3 - float(shift)) < 1e-9
    system.__closure__[0].cell_contents = 0.05
    found = solvers.root(system, START)
    assert abs(found.x.sum() - 3.05) < 1e-9


def test_short_functions_are_called():
    """Of a few ops a replay saves nothing."""
    function = lambda t, y: -y * t  # noqa: E731
    for _ in range(3):
        solvers.solve_ivp(function, (0, 5), np.ones(2), method="RK45", max_step=0.05)
    assert values_replayed(function) == 0


def test_branches_are_taken():
    """A value that decides a branch is never replayed."""

    def function(t, y):
        return torch.stack([y[1], -y[0] - y[1]]) if y[0] > 0 else torch.stack([y[1], -2 * y[0] - y[1]])

    plain = solvers.solve_ivp(function, (0, 8), np.array([1.0, 0.0]), method="RK45", compiled=False)
    for _ in range(2):
        found = solvers.solve_ivp(function, (0, 8), np.array([1.0, 0.0]), method="RK45")
        assert np.array_equal(found.y, plain.y)


@pytest.mark.parametrize("compiled", [True, False])
def test_nan_is_told_from_infinities(compiled):
    """Infinities of both signs are passed on, NaN is not, in values of few and of many numbers, and in single ones."""
    function = TorchFunction(lambda x: x, "root", None, False)
    for count in (1, 9, 40):
        values = torch.cat([torch.tensor([np.inf, -np.inf]), torch.ones(count)]).double()
        assert np.array_equal(function.array(values), values.numpy())
    for size in (1, 3, 40):
        function = lambda x: torch.cat([x[:-1], (x[-1:] - 5).sqrt()])  # noqa: E731
        with pytest.raises(ValueError, match="its value is NaN"):
            solvers.root(function, np.ones(size), compiled=compiled, method="df-sane")
    with pytest.raises(ValueError, match="its value is NaN"):
        solvers.minimize(lambda x: (x[0] - 5).sqrt(), np.ones(1), compiled=compiled, method="Nelder-Mead")


@pytest.mark.parametrize("method", ["hybr", "lm"])
def test_one_jacobian_at_the_first_point(method):
    """SciPy looks at the first Jacobian and asks for it again: it is computed once, and is an array of the caller's own."""
    runs = []

    def function(x):
        runs.append(x.clone())
        return torch.stack([x[0] ** 2 - x[1], x[1] - 4])

    found = solvers.root(function, np.ones(2), method=method)
    assert np.allclose(found.x, [2, 4])
    first = sum(bool((run == 1).all()) for run in runs)
    assert first == 1  # values and Jacobian are from one run
