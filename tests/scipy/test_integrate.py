"""``solve_ivp`` and ``solve_bvp``: SciPy's own solutions in fewer evaluations, and exact Jacobians."""

from __future__ import annotations

import numpy as np
import pytest
import torch

scipy_integrate = pytest.importorskip("scipy.integrate")

from chainrule import scipy as chainrule_scipy  # noqa: E402
from tests.scipy.problems import bratu, bratu_ends, brusselator, numpy_of, robertson  # noqa: E402


@pytest.mark.parametrize("method", ["Radau", "BDF", "LSODA", scipy_integrate.BDF])
def test_robertson(method):
    options = {"rtol": 1e-6, "atol": 1e-10}
    start = np.array([1.0, 0.0, 0.0])
    ours = chainrule_scipy.solve_ivp(robertson, (0, 100), start, method=method, **options)
    theirs = scipy_integrate.solve_ivp(numpy_of(robertson), (0, 100), start, method=method, **options)
    assert ours.success
    # Both are within some tens of the tolerance of the solution.
    assert np.allclose(ours.y[:, -1], theirs.y[:, -1], rtol=1e-4, atol=1e-9)
    assert np.isclose(ours.y[:, -1].sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("layout", ["dense", "sparse"])
@pytest.mark.parametrize("method", ["Radau", "BDF"])
def test_brusselator(method, layout):
    size, calls, evaluations = 20, [], []
    start = np.concatenate([1 + np.sin(2 * np.pi * np.arange(size) / size), np.full(size, 3.0)])

    def counted(t, y):
        calls.append(1)
        return brusselator(t, y)

    reference = numpy_of(brusselator)

    def theirs_counted(t, y):
        evaluations.append(1)
        return reference(t, y)

    ours = chainrule_scipy.solve_ivp(counted, (0, 2), start, method=method, layout=layout)
    theirs = scipy_integrate.solve_ivp(theirs_counted, (0, 2), start, method=method)
    # The default rtol is 1e-3.
    assert np.allclose(ours.y[:, -1], theirs.y[:, -1], rtol=1e-2)
    assert len(calls) == ours.nfev + ours.njev
    assert len(calls) < len(evaluations)


def test_explicit_methods_arguments_and_events():
    def growth(t, y, rate):
        return rate * y

    def event(t, y, rate):
        return y[0] - 2

    for method in ("RK45", "DOP853", "BDF"):
        found = chainrule_scipy.solve_ivp(growth, (0, 1), np.ones(1), method=method, args=(1.0,), events=event, rtol=1e-6)
        assert np.isclose(found.y[0, -1], np.e, rtol=1e-4)
        assert np.isclose(found.t_events[0][0], np.log(2), rtol=1e-4)
    with pytest.raises(ValueError, match="takes no sparse Jacobian"):
        chainrule_scipy.solve_ivp(growth, (0, 1), np.ones(1), method="LSODA", args=(1.0,), layout="sparse")


def test_ivp_jacobian_is_exact(monkeypatch):
    seen = {}
    monkeypatch.setattr(scipy_integrate, "solve_ivp", lambda fun, span, y0, jac=None, **options: seen.update(jac=jac))
    y = np.random.default_rng(3).uniform(1, 2, 8)
    expected = torch.func.jacrev(brusselator, argnums=1)(torch.tensor(0.0), torch.tensor(y)).numpy()
    for layout in ("dense", "sparse"):
        chainrule_scipy.solve_ivp(brusselator, (0, 1), y, method="BDF", layout=layout)
        found = seen["jac"](0.0, y)
        assert np.allclose(found.toarray() if layout == "sparse" else found, expected, rtol=1e-13, atol=1e-13)


def test_bratu():
    mesh, guess, calls, evaluations = np.linspace(0, 1, 6), np.zeros((2, 6)), [], []

    def counted(x, y):
        calls.append(1)
        return bratu(x, y)

    reference = numpy_of(bratu)

    def theirs_counted(x, y):
        evaluations.append(1)
        return reference(x, y)

    ours = chainrule_scipy.solve_bvp(counted, bratu_ends, mesh, guess, tol=1e-6)
    theirs = scipy_integrate.solve_bvp(theirs_counted, numpy_of(bratu_ends), mesh, guess, tol=1e-6)
    at = np.linspace(0, 1, 11)
    assert ours.success
    assert np.allclose(ours.sol(at), theirs.sol(at), rtol=1e-5, atol=1e-7)
    # The closed form: y = 2 log(cosh(c) / cosh(c (1 - 2 x))) with 4 c = sqrt(2) cosh(c)... at its lower root.
    c = scipy_root_of_bratu()
    assert np.allclose(ours.sol(at)[0], 2 * np.log(np.cosh(c) / np.cosh(c * (1 - 2 * at))), atol=1e-5)
    assert len(calls) < len(evaluations)


def scipy_root_of_bratu():
    """The lower root of cosh(c) = 2 sqrt(2) c, from y'' = -exp(y) put into the closed form."""
    c = 0.3
    for _ in range(100):
        c = np.cosh(c) / np.sqrt(8)
    return c


def test_bvp_with_a_parameter():
    """y'' = -k² y with y(0) = y(1) = 0, y'(0) = k: k = π."""

    def wave(x, y, p):
        return torch.stack([y[1], -(p[0] ** 2) * y[0]])

    def ends(left, right, p):
        return torch.stack([left[0], right[0], left[1] - p[0]])

    mesh = np.linspace(0, 1, 7)
    found = chainrule_scipy.solve_bvp(wave, ends, mesh, np.stack([np.sin(3 * mesh), 3 * np.cos(3 * mesh)]), p=[3.0])
    assert found.success
    # The default tolerance is 1e-3.
    assert abs(found.p[0] - np.pi) < 1e-3


def test_bvp_jacobians_in_scipys_layout(monkeypatch):
    seen = {}
    monkeypatch.setattr(scipy_integrate, "solve_bvp", lambda fun, bc, x, y, **options: seen.update(options))

    def system(x, y, p):
        return torch.stack([y[1] * x * p[0], torch.sin(y[0]) * y[2] + p[1], y.prod(0)])

    def ends(left, right, p):
        return torch.cat([left * right, p**2])

    generator = np.random.default_rng(4)
    x, y, p = generator.normal(size=5), generator.normal(size=(3, 5)), generator.normal(size=2)
    chainrule_scipy.solve_bvp(system, ends, x, y, p)
    by_state, by_parameter = seen["fun_jac"](x, y, p)
    full, full_parameter = torch.func.jacrev(system, argnums=(1, 2))(*map(torch.tensor, (x, y, p)))
    assert np.allclose(by_state, full.diagonal(dim1=1, dim2=3).numpy(), rtol=1e-13)
    assert np.allclose(by_parameter, full_parameter.movedim(2, 1).numpy(), rtol=1e-13)
    found = seen["bc_jac"](y[:, 0], y[:, -1], p)
    expected = torch.func.jacrev(ends, argnums=(0, 1, 2))(*map(torch.tensor, (y[:, 0], y[:, -1], p)))
    assert all(np.allclose(a, b.numpy(), rtol=1e-13) for a, b in zip(found, expected, strict=True))
