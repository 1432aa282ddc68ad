"""Inputs of other dtypes, shapes and strides, at every solver, plain and replayed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")

from chainrule import scipy as solvers  # noqa: E402

STRIDED, LINE = np.arange(1.0, 9.0)[::2], np.linspace(0, 1, 20)


def square(x):
    return ((x - 2) ** 2).sum()


def single(x):
    return ((x.float() - 2) ** 2).sum()


def shifted(x):
    return x**2 - 4


def decaying(t, y):
    return -y


def oscillating(x, y):
    return torch.stack([y[1], -y[0]])


def ends(a, b):
    return torch.stack([a[0], b[0] - 1])


#: From options to a solution, what it is, and how far off it may be (the solvers' own tolerances).
CASES = {
    "minimize float32": (lambda **k: solvers.minimize(square, np.ones(3, np.float32), **k).x, 2, 1e-4),
    "minimize a float32 function": (lambda **k: solvers.minimize(single, np.ones(3), **k).x, 2, 1e-3),
    "minimize 0-d": (lambda **k: solvers.minimize(square, np.array(1.0), **k).x, 2, 1e-4),
    "minimize a number": (lambda **k: solvers.minimize(square, 1.0, **k).x, 2, 1e-4),
    "minimize whole numbers": (lambda **k: solvers.minimize(square, [1, 5], **k).x, 2, 1e-4),
    "minimize strided": (lambda **k: solvers.minimize(square, STRIDED, method="Newton-CG", **k).x, 2, 1e-4),
    "minimize size 1 sparse": (
        lambda **k: solvers.minimize(square, np.ones(1), method="trust-constr", layout="sparse", **k).x, 2, 1e-4),
    "constraint": (
        lambda **k: solvers.minimize(
            square, np.ones(2), method="SLSQP", constraints=solvers.nonlinear_constraint(lambda x: x.float().sum(), 1, 1, **k), **k).x,
        0.5, 1e-4),
    "least_squares float32": (lambda **k: solvers.least_squares(lambda x: shifted(x.float()), np.ones(3, np.float32), **k).x, 2, 1e-4),
    "least_squares scalar": (lambda **k: solvers.least_squares(lambda x: x.sum() - 2, 1.0, **k).x, 2, 1e-6),
    "least_squares sparse": (lambda **k: solvers.least_squares(shifted, STRIDED, layout="sparse", **k).x, 2, 1e-5),
    "least_squares operator": (lambda **k: solvers.least_squares(shifted, np.array([1.0, 3.0]), layout="operator", **k).x, 2, 1e-5),
    "root 0-d": (lambda **k: solvers.root(shifted, 1.0, **k).x, 2, 1e-6),
    "root scalar": (lambda **k: solvers.root(lambda x: shifted(x).sum(), np.ones(1), **k).x, 2, 1e-6),
    "root strided": (lambda **k: solvers.root(shifted, STRIDED, method="lm", **k).x, 2, 1e-6),
    "solve_ivp list": (lambda **k: solvers.solve_ivp(decaying, (0, 1), [1.0], method="BDF", **k).y[:, -1], np.exp(-1), 1e-2),
    "solve_ivp whole numbers": (
        lambda **k: solvers.solve_ivp(decaying, (0, 1), np.array([1, 1]), method="LSODA", **k).y[:, -1], np.exp(-1), 1e-2),
    "solve_ivp strided": (
        lambda **k: solvers.solve_ivp(decaying, (0, 1), STRIDED, method="Radau", layout="sparse", **k).y[:, -1],
        STRIDED * np.exp(-1), 1e-2),
    "solve_ivp backwards": (lambda **k: solvers.solve_ivp(decaying, (1, 0), [1.0], method="Radau", **k).y[:, -1], np.exp(1), 2e-2),
    "solve_bvp columns first": (
        lambda **k: solvers.solve_bvp(oscillating, ends, np.linspace(0, 1, 9)[::2], np.zeros((5, 2)).T, **k).sol(0.5)[0],
        np.sin(0.5) / np.sin(1), 1e-3),
    "solve_bvp one state": (
        lambda **k: solvers.solve_bvp(lambda x, y: -y, lambda a, b: a - 1, np.linspace(0, 1, 5), np.zeros((1, 5)), **k).sol(1.0),
        np.exp(-1), 1e-3),
    "curve_fit float32": (
        lambda **k: solvers.curve_fit(lambda x, a: (a * x).float(), LINE.astype(np.float32), (2 * LINE).astype(np.float32), **k)[0],
        2, 1e-5),
    "curve_fit lists": (lambda **k: solvers.curve_fit(lambda x, a: a * x, list(LINE), list(2 * LINE), **k)[0], 2, 1e-7),
    "curve_fit two variables": (lambda **k: solvers.curve_fit(lambda x, a: a * x[0] + x[1], np.stack([LINE, LINE]), 3 * LINE, **k)[0], 2, 1e-7),
    "curve_fit strided": (lambda **k: solvers.curve_fit(lambda x, a: a * x, np.repeat(LINE, 2)[::2], 2 * LINE, **k)[0], 2, 1e-7),
}  # fmt: skip


@pytest.mark.parametrize("compiled", [None, True, False])
@pytest.mark.parametrize("name", CASES)
def test_solution(name, compiled):
    solve, expected, tolerance = CASES[name]
    for _ in range(2):
        assert np.allclose(solve(compiled=compiled), expected, rtol=0, atol=tolerance * np.max(np.abs(expected)))
