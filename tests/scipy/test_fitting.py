"""``least_squares``, ``root`` and ``curve_fit``: SciPy's own solutions in fewer evaluations, and exact Jacobians."""

from __future__ import annotations

import numpy as np
import pytest
import torch

scipy_optimize = pytest.importorskip("scipy.optimize")

from scipy.sparse.linalg import LinearOperator  # noqa: E402

from chainrule import scipy as chainrule_scipy  # noqa: E402
from chainrule.scipy.functions import TorchFunction  # noqa: E402
from chainrule.scipy.linearised import Linearisation  # noqa: E402
from tests.scipy.problems import decay, numpy_of, rosenbrock_residuals, trigonometric_system  # noqa: E402

# Solutions agree to the solvers' default tolerances, 1e-8 in the value, which is 1e-4 in a flat direction.
NEAR = 1e-4


@pytest.mark.parametrize("layout", ["dense", "sparse", "operator"])
def test_least_squares(layout):
    calls = []

    def counted(x):
        calls.append(1)
        return rosenbrock_residuals(x)

    x0 = np.full(30, 0.8)
    ours = chainrule_scipy.least_squares(counted, x0, layout=layout, bounds=(-2, 3))
    evaluations = []
    reference = numpy_of(rosenbrock_residuals)

    def theirs_counted(x):
        evaluations.append(1)
        return reference(x)

    theirs = scipy_optimize.least_squares(theirs_counted, x0, bounds=(-2, 3))
    assert np.allclose(ours.x, theirs.x, atol=NEAR)
    # One run per point gives residuals and Jacobian.
    assert len(calls) == ours.nfev
    assert len(calls) * 3 < len(evaluations)


def test_least_squares_derivative_is_exact(monkeypatch):
    seen = {}

    def keep(fun, x0, jac, args, **options):
        seen.update(value=fun(x0, *args), jacobian=jac(x0, *args), options=options)

    monkeypatch.setattr(scipy_optimize, "least_squares", keep)
    x = np.random.default_rng(1).normal(size=6)
    at = torch.tensor(x)
    expected = torch.func.jacrev(lambda x: rosenbrock_residuals(x * 2))(at).numpy()

    def scaled(x, factor, *, power=1):
        return rosenbrock_residuals(x * factor**power)

    for layout in ("dense", "sparse", "operator"):
        chainrule_scipy.least_squares(scaled, x, layout=layout, args=(2.0,), kwargs={"power": 1})
        found = seen["jacobian"]
        found = found if layout == "dense" else found.toarray() if layout == "sparse" else found @ np.eye(6)
        assert np.allclose(found, expected, rtol=1e-13)
        assert np.allclose(seen["value"], rosenbrock_residuals(at * 2).numpy(), rtol=1e-14)
        assert seen["options"] == ({} if layout == "dense" else {"tr_solver": "lsmr"})


def test_least_squares_with_lm_and_loss():
    x0 = np.full(5, 0.5)
    assert np.allclose(chainrule_scipy.least_squares(rosenbrock_residuals, x0, method="lm").x, 1, atol=NEAR)
    assert np.allclose(chainrule_scipy.least_squares(rosenbrock_residuals, x0, loss="soft_l1", method="dogbox").x, 1, atol=NEAR)


@pytest.mark.parametrize("method", ["hybr", "lm", "krylov", "df-sane"])
def test_root(method):
    x0 = np.linspace(0, 1, 20)
    ours = chainrule_scipy.root(trigonometric_system, x0, method=method)
    theirs = scipy_optimize.root(numpy_of(trigonometric_system), x0, method=method)
    # df-sane and krylov stop at residuals of 1e-5 or so.
    assert np.allclose(ours.x, theirs.x, atol=NEAR)
    assert np.allclose(numpy_of(trigonometric_system)(ours.x), 0, atol=NEAR)
    if method in ("hybr", "lm"):
        assert ours.nfev * 2 < theirs.nfev


@pytest.mark.parametrize("options", [{}, {"p0": [1.0, 1.0, 0.0]}, {"bounds": (0, 10)}, {"method": "dogbox"}])
def test_curve_fit(options):
    x = np.linspace(0, 4, 60)
    noise = np.random.default_rng(2).normal(size=60)
    y = 2.5 * np.exp(-1.3 * x) + 0.5 + 0.05 * noise
    options = options | {"sigma": np.linspace(0.5, 1, 60)}
    ours = chainrule_scipy.curve_fit(decay, x, y, full_output=True, **options)
    reference = scipy_optimize.curve_fit(lambda x, a, b, c: a * np.exp(-b * x) + c, x, y, full_output=True, **options)
    assert np.allclose(ours[0], reference[0], rtol=1e-5)
    # The covariance is an inverse of JᵀJ: finite differences of step 1e-8 give it to about that.
    assert np.allclose(ours[1], reference[1], rtol=1e-3)
    if "bounds" not in options and options.get("method") is None:
        assert ours[2]["nfev"] < reference[2]["nfev"]


@pytest.mark.parametrize("method", ["hybr", "lm"])
def test_jacobians_of_one_point_are_separate_arrays(method, monkeypatch):
    """MINPACK writes its factors into the Jacobian that it is given; the next one of the same point is whole."""
    x0, seen = np.array([0.5, 1.5]), []

    def solve(value, x0, jac, **options):
        value(x0)
        first = jac(x0)
        expected = first.copy()
        first[:] = np.nan
        seen.append((jac(x0), jac(x0), expected))
        return solver(value, x0, jac=jac, **options)

    solver = scipy_optimize.root
    monkeypatch.setattr("chainrule.scipy.fitting.optimize.root", solve)
    found = chainrule_scipy.root(lambda x: torch.stack([x[0] ** 2 - x[1], x[1] * x[0] - 8]), x0, method=method)
    second, third, expected = seen[0]
    assert second is not third
    np.testing.assert_allclose(expected, [[1.0, -1.0], [1.5, 0.5]], rtol=1e-14)
    np.testing.assert_array_equal(second, expected)
    np.testing.assert_array_equal(third, expected)
    np.testing.assert_allclose(found.x, [2.0, 4.0], rtol=NEAR)


@pytest.mark.parametrize("sigma", [0.1, np.float64(0.1), np.array([0.1]), np.array([[0.1]]), [0.1]])
@pytest.mark.parametrize("absolute", [False, True])
def test_one_deviation_for_all_data(sigma, absolute):
    points = np.linspace(0, 1, 12)
    data = 3 * points + 1 + 0.1 * np.random.default_rng(0).normal(size=12)

    def model(x, a, b):
        return a * x + b

    expected = scipy_optimize.curve_fit(model, points, data, sigma=0.1, absolute_sigma=absolute)
    for found in (
        chainrule_scipy.curve_fit(model, points, data, sigma=sigma, absolute_sigma=absolute),
        chainrule_scipy.curve_fit(model, points, data, None, sigma, absolute),
    ):
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-6)


@pytest.mark.parametrize("size", [3, 300])
def test_jacobians_as_operators(size):
    """Those of few entries are arrays inside; all have the products of the Jacobian, at each point."""
    function = TorchFunction(rosenbrock_residuals, "least_squares", None, False, None)
    linearise = Linearisation(function, rosenbrock_residuals, "of a test", "operator")
    for seed in range(4):
        x = np.random.default_rng(seed).standard_normal(size)
        expected = torch.func.jacrev(rosenbrock_residuals)(torch.from_numpy(x)).numpy()
        found = linearise.at((x,)).jacobian()
        assert isinstance(found, LinearOperator)
        assert found.shape == expected.shape
        for vector in (np.arange(size) - 1.5, np.ones((size, 2))):
            assert np.allclose(found @ vector, expected @ vector, atol=1e-10)
        assert np.allclose(found.T @ np.ones(2 * size - 2), expected.sum(0), atol=1e-10)
    assert isinstance(linearise._at((x,), ())._found, np.ndarray | torch.Tensor) == (size == 3)


def test_models_with_another_number_of_values():
    times = np.linspace(0, 1, 9)
    with pytest.raises(ValueError, match=r"curve_fit.*must return shape \(8,\), one value for each of ydata, got \(9,\)"):
        chainrule_scipy.curve_fit(decay, times, times[1:])
    with pytest.raises(ValueError, match=r"must return shape \(9,\), one value for each of ydata, got \(8,\)"):
        chainrule_scipy.curve_fit(lambda x, a, b: (a * x + b)[1:], times, times)
    data = 2 * times
    data[3] = np.nan
    assert np.allclose(chainrule_scipy.curve_fit(lambda x, a: a * x, times, data, nan_policy="omit")[0], 2.0)
