"""Problems that are solved with exact derivatives and with SciPy's finite differences, in torch."""

from __future__ import annotations

import torch


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def rosenbrock_residuals(x):
    return torch.cat([10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]])


def coupled(x):
    """A sphere and a chain: two kinds of constraint in one vector."""
    return torch.cat([(x**2).sum()[None], x[1:] * x[:-1]])


def trigonometric_system(x):
    return torch.sin(x) + 3 * x - x.roll(1) ** 2 / 4 - 1


def robertson(t, y):
    a, b, c = 0.04 * y[0], 3e7 * y[1] ** 2, 1e4 * y[1] * y[2]
    return torch.stack([-a + c, a - b - c, b])


def brusselator(t, y):
    u, v = y.chunk(2)

    def diffusion(w):
        return 0.02 * (len(w) + 1) ** 2 * (w.roll(1) - 2 * w + w.roll(-1))

    return torch.cat([1 + u**2 * v - 4 * u + diffusion(u), 3 * u - u**2 * v + diffusion(v)])


def bratu(x, y):
    return torch.stack([y[1], -torch.exp(y[0])])


def bratu_ends(left, right):
    return torch.stack([left[0], right[0]])


def decay(x, amplitude, rate, offset):
    return amplitude * torch.exp(-rate * x) + offset


def numpy_of(function):
    """A torch function as SciPy's finite differences take one."""

    def of(*args):
        found = function(*(torch.tensor(a, dtype=torch.float64) for a in args))
        return found.numpy() if found.dim() else found.item()

    return of
