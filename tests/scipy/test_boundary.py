"""What ``solve_bvp`` asks of a torch system: no point twice, and the Jacobians of a mesh and of its middles from one run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

scipy_integrate = pytest.importorskip("scipy.integrate")

from chainrule import scipy as chainrule_scipy  # noqa: E402
from tests.scipy.problems import numpy_of  # noqa: E402

DRAWN = np.random.default_rng(5)


def eigenvalue(x, y, p):
    return torch.stack([y[1], -(p[0] - 2 * torch.cos(2 * x)) * y[0]])


def eigenvalue_ends(left, right, p):
    return torch.stack([left[1], right[1], left[0] - 1 + 0 * p[0]])


def measles(x, y):
    infected = 1575 * (1 + torch.cos(2 * np.pi * x)) * y[0] * y[2]
    return torch.stack([0.02 - infected, infected - y[1] / 0.0279, y[1] / 0.0279 - y[2] / 0.01])


def layer(x, y):
    return torch.stack([y[1], (y[0] - y[0] * y[1]) / 0.05])


def sphere(x, y):
    return torch.stack([y[1], -(y[0] ** 5)])


MESH = np.linspace(0, np.pi, 10)
PROBLEMS = {
    "eigenvalue": (eigenvalue, eigenvalue_ends, MESH, np.stack([np.cos(4 * MESH), -4 * np.sin(4 * MESH)]), {"p": [15.0]}),
    "measles": (measles, lambda left, right: left - right, np.linspace(0, 1, 50), np.full((3, 50), 0.01), {}),
    "layer": (
        layer, lambda left, right: torch.stack([left[0] - 1, right[0] - 1 / 3]), np.linspace(0, 1, 20),
        np.stack([np.linspace(1, 1 / 3, 20), np.full(20, -2 / 3)]), {},
    ),
    "singular term": (
        sphere, lambda left, right: torch.stack([left[1], right[0] - np.sqrt(3) / 2]), np.linspace(0, 1, 6),
        np.full((2, 6), [[np.sqrt(3) / 2], [1e-4]]), {"S": np.array([[0.0, 0], [0, -2]])},
    ),
}  # fmt: skip


@pytest.mark.parametrize("compiled", [None, False, True])
@pytest.mark.parametrize("name", list(PROBLEMS))
def test_solutions_are_scipys(name, compiled):
    function, ends, mesh, guess, options = PROBLEMS[name]
    theirs = scipy_integrate.solve_bvp(numpy_of(function), numpy_of(ends), mesh, guess.copy(), tol=1e-6, **options)
    for _ in range(3):
        ours = chainrule_scipy.solve_bvp(function, ends, mesh, guess.copy(), tol=1e-6, compiled=compiled, **options)
        assert ours.success
        assert np.array_equal(ours.x, theirs.x)
        assert np.allclose(ours.y, theirs.y, rtol=1e-5, atol=1e-5 * np.abs(theirs.y).max())  # both to 1e-6 of the slopes
        if "p" in options:
            assert np.allclose(ours.p, theirs.p, rtol=1e-5)


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_no_point_is_computed_twice(name):
    function, ends, mesh, guess, options = PROBLEMS[name]
    seen, seen_ends, theirs = [], [], []

    def counted(x, y, *p):
        seen.append((x.detach().numpy().tobytes(), y.detach().numpy().tobytes(), *(q.detach().numpy().tobytes() for q in p)))
        return function(x, y, *p)

    def counted_ends(*args):
        seen_ends.append(tuple(a.detach().numpy().tobytes() for a in args))
        return ends(*args)

    def theirs_counted(*args):
        theirs.append(1)
        return numpy_of(function)(*args)

    found = []
    plain = chainrule_scipy.solve_bvp(function, ends, mesh, guess.copy(), compiled=False, **options)
    original = scipy_integrate.solve_bvp

    def spied(fun, bc, x, y, *, fun_jac, bc_jac, **others):
        def jacobian(*args):
            before = len(seen)
            result = fun_jac(*args)
            found.append(len(seen) - before)
            del seen[before:]
            return result

        def jacobian_ends(*args):
            before = len(seen_ends)
            result = bc_jac(*args)
            del seen_ends[before:]
            return result

        return original(fun, bc, x, y, fun_jac=jacobian, bc_jac=jacobian_ends, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scipy_integrate, "solve_bvp", spied)
        counted_plain = chainrule_scipy.solve_bvp(counted, counted_ends, mesh, guess.copy(), compiled=False, **options)
    original(theirs_counted, numpy_of(ends), mesh, guess.copy(), **options)
    assert np.array_equal(plain.y, counted_plain.y)
    assert len(seen) == len(set(seen))
    assert len(seen_ends) == len(set(seen_ends))
    assert found[::2] == [1] * (len(found) // 2)  # the mesh with its middles
    assert found[1::2] == [0] * (len(found) // 2)
    assert len(seen) + sum(found) < len(theirs)


def by_differences(function, x, y, *p):
    """Central differences of each column in its own place."""
    blocks = []
    for number, base in enumerate((y, *p)):
        parts = []
        for row in range(len(base)):
            step = 1e-6 * np.eye(len(base))[row].reshape(-1, *[1] * (base.ndim - 1))
            ends = [numpy_of(function)(x, *(b + s * step if n == number else b for n, b in enumerate((y, *p)))) for s in (1, -1)]
            parts.append((ends[0] - ends[1]) / 2e-6)
        blocks.append(np.stack(parts, 1))
    return blocks


@pytest.mark.parametrize("columns", [2, 3, 64, 65, 130])
@pytest.mark.parametrize("states", [1, 2, 5])
@pytest.mark.parametrize("parameters", [0, 1, 3])
@pytest.mark.parametrize("order", ["middles", "others", "no value before", "middles twice"])
def test_jacobians_of_any_points(monkeypatch, columns, states, parameters, order):
    """Also where they are not asked for as SciPy does."""
    matrix = torch.tensor(DRAWN.standard_normal((states, states)))

    def system(x, y, p=None):
        found = torch.sin(matrix @ y) * y**2 + torch.cos(x)
        return found if p is None else found * (p**2).sum() + p.cos().prod() * y

    seen = {}
    monkeypatch.setattr(scipy_integrate, "solve_bvp", lambda fun, bc, x, y, **options: seen.update(options, fun=fun))
    x = np.sort(DRAWN.standard_normal(columns))
    y = DRAWN.standard_normal((states, columns))
    p = [DRAWN.standard_normal(parameters)] if parameters else []
    chainrule_scipy.solve_bvp(system, lambda *args: args[0], x, y, *p)
    middle = (x[:-1] + x[1:]) / 2 if order != "others" else x[:-1]
    points = [(x, y, *p), (middle, DRAWN.standard_normal((states, columns - 1)), *p)]
    if order == "middles twice":
        points += points[1:]
    for _ in range(2):
        if order != "no value before":
            assert np.allclose(seen["fun"](*points[1]), numpy_of(system)(*points[1]))
        for point in points:
            found = seen["fun_jac"](*point)
            found = found if parameters else [found]
            expected = by_differences(system, *point)
            assert [f.shape for f in found] == [(states, states, len(point[0])), (states, parameters, len(point[0]))][: len(found)]
            for f, e in zip(found, expected, strict=True):
                assert np.allclose(f, e, rtol=1e-6, atol=1e-6)  # differences of 1e-6 of values of some tens


def test_what_scipy_writes_is_not_seen_again(monkeypatch):
    seen = {}
    monkeypatch.setattr(scipy_integrate, "solve_bvp", lambda fun, bc, x, y, **options: seen.update(options, fun=fun, bc=bc))
    x, y = np.linspace(0, 1, 4), DRAWN.standard_normal((2, 4))
    chainrule_scipy.solve_bvp(layer, lambda left, right: left * right, x, y)
    for callback, args in ((seen["fun"], (x, y)), (seen["bc"], (y[:, 0], y[:, -1])), (seen["fun_jac"], (x, y))):
        first = callback(*args)
        expected = first.copy()
        first[:] = np.nan
        assert np.array_equal(callback(*args), expected)


def test_points_that_are_changed_in_place_are_others(monkeypatch):
    seen = {}
    monkeypatch.setattr(scipy_integrate, "solve_bvp", lambda fun, bc, x, y, **options: seen.update(options, fun=fun))
    x, y = np.linspace(0, 1, 4), DRAWN.standard_normal((2, 4))
    chainrule_scipy.solve_bvp(layer, lambda left, right: left, x, y)
    for _ in range(3):
        y[0] += 1
        assert np.allclose(seen["fun"](x, y), numpy_of(layer)(x, y))
        assert np.allclose(seen["fun_jac"](x, y), by_differences(layer, x, y)[0], atol=1e-6)
