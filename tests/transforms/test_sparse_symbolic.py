"""Sparse derivatives against SymPy: formulas written element by element, derived by symbols, evaluated at random points."""

from __future__ import annotations

import pytest
import torch

import chainrule

sympy = pytest.importorskip("sympy")

SIDE = 4
EDGES = [(0, 1), (1, 2), (2, 0), (3, 4), (4, 0), (1, 4)]
SOURCE, TARGET = (torch.tensor(ends) for ends in zip(*EDGES, strict=True))
BLOCKS = ((1, 2), (-1, 1))


# Each function twice: over tensors, and over a list of symbols in the order of the flattened input.


def brusselator(x):
    u, v = x.view(2, SIDE, SIDE)

    def around(w):
        return w.roll(1, 0) + w.roll(-1, 0) + w.roll(1, 1) + w.roll(-1, 1) - 4 * w

    product = u * u * v
    return torch.stack([1 + product - 4.4 * u + 90 * around(u), 3.4 * u - product + 90 * around(v)]).reshape(-1)


def brusselator_symbols(x):
    u, v = ({(i, j): x[k * SIDE**2 + i * SIDE + j] for i in range(SIDE) for j in range(SIDE)} for k in (0, 1))

    def around(w, i, j):
        near = [((i - 1) % SIDE, j), ((i + 1) % SIDE, j), (i, (j - 1) % SIDE), (i, (j + 1) % SIDE)]
        return sum(w[place] for place in near) - 4 * w[i, j]

    first = [1 + u[p] ** 2 * v[p] - sympy.Rational(44, 10) * u[p] + 90 * around(u, *p) for p in u]
    return first + [sympy.Rational(34, 10) * u[p] - u[p] ** 2 * v[p] + 90 * around(v, *p) for p in u]


def residuals(x):
    return torch.cat([10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]])


def residuals_symbols(x):
    return [10 * (b - a**2) for a, b in zip(x, x[1:], strict=False)] + [1 - a for a in x[:-1]]


def recurrence(x):
    """Two steps of a banded recurrence with boundary values."""
    for _ in range(2):
        wide = torch.nn.functional.pad(x, (1, 2))
        x = torch.sin(wide[:-3]) * wide[1:-2] + wide[2:-1] * wide[3:] / 2
    return x


def recurrence_symbols(x):
    for _ in range(2):
        wide = [sympy.Integer(0), *x, sympy.Integer(0), sympy.Integer(0)]
        x = [sympy.sin(wide[k]) * wide[k + 1] + wide[k + 2] * wide[k + 3] / 2 for k in range(len(x))]
    return x


def graph(x):
    flow = torch.tanh(x[TARGET] - x[SOURCE])
    return torch.zeros_like(x).index_add(0, SOURCE, flow).index_add(0, TARGET, -flow)


def graph_symbols(x):
    found = [sympy.Integer(0)] * len(x)
    for source, target in EDGES:
        flow = sympy.tanh(x[target] - x[source])
        found[source], found[target] = found[source] + flow, found[target] - flow
    return found


def blocks(x):
    coupling = torch.tensor(BLOCKS, dtype=x.dtype)
    return (torch.exp(x.view(-1, 2) @ coupling.T) * x.view(-1, 2)).reshape(-1)


def blocks_symbols(x):
    pairs = list(zip(x[::2], x[1::2], strict=True))
    return [
        sympy.exp(sum(c * w for c, w in zip(row, pair, strict=True))) * pair[n] for pair in pairs for n, row in enumerate(BLOCKS)
    ]


def products(x):
    """Every second element times its neighbours, and a shared one."""
    return torch.cat([x[::2] * x[1::2] * x[0], x[1:-1].cos() * x[2:]])


def products_symbols(x):
    return [a * b * x[0] for a, b in zip(x[::2], x[1::2], strict=True)] + [
        sympy.cos(a) * b for a, b in zip(x[1:-1], x[2:], strict=True)
    ]


VECTORS = {
    "brusselator": (brusselator, brusselator_symbols, 2 * SIDE**2),
    "rosenbrock residuals": (residuals, residuals_symbols, 6),
    "banded recurrence": (recurrence, recurrence_symbols, 7),
    "graph Laplacian": (graph, graph_symbols, 5),
    "blocks": (blocks, blocks_symbols, 6),
    "products": (products, products_symbols, 6),
}

SCALARS = {
    "rosenbrock": (
        lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum(),
        lambda x: sum(100 * (b - a**2) ** 2 + (1 - a) ** 2 for a, b in zip(x, x[1:], strict=False)), 6),
    "chain of springs": (
        lambda x: ((1 + (x[1:] - x[:-1]) ** 2).sqrt() - 1).sum() + torch.log1p(x[::3] ** 2).sum(),
        lambda x: sum(sympy.sqrt(1 + (b - a) ** 2) - 1 for a, b in zip(x, x[1:], strict=False))
        + sum(sympy.log(1 + a**2) for a in x[::3]), 7),
    "graph energy": (
        lambda x: ((x[TARGET] - x[SOURCE]) ** 4).sum() + (x[SOURCE] * x[TARGET]).sin().sum(),
        lambda x: sum((x[t] - x[s]) ** 4 + sympy.sin(x[s] * x[t]) for s, t in EDGES), 5),
    "squared recurrence": (
        lambda x: (recurrence(x) ** 2).sum(), lambda x: sum(item**2 for item in recurrence_symbols(x)), 6),
}  # fmt: skip


def compare(found, derived, symbols):
    """Values at the reported places, and zero elsewhere by the derivation."""
    evaluate = sympy.lambdify([symbols], derived.tolist(), modules="math")
    reported = {tuple(place) for place in found.coalesce().indices().t().tolist()}
    true = {(i, j) for i in range(derived.rows) for j in range(derived.cols) if not derived[i, j].is_zero}
    assert true <= reported
    return evaluate, reported


@pytest.mark.parametrize("name", VECTORS)
def test_jacobian(name):
    function, formula, size = VECTORS[name]
    symbols = sympy.symbols(f"x0:{size}", real=True)
    derived = sympy.Matrix(formula(list(symbols))).jacobian(symbols)
    for transform in (chainrule.jacobian, chainrule.jacfwd, chainrule.jacrev):
        of = transform(function, layout="sparse_coo")
        for _ in range(2):
            x = torch.randn(size, dtype=torch.float64)
            found = of(x)
            evaluate, _ = compare(found, derived, symbols)
            expected = torch.tensor(evaluate(x.tolist()), dtype=torch.float64)
            # Both round some ten operations per entry; numbers go up to a few hundred.
            torch.testing.assert_close(found.to_dense(), expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("name", SCALARS)
def test_hessian(name):
    function, formula, size = SCALARS[name]
    symbols = sympy.symbols(f"x0:{size}", real=True)
    derived = sympy.hessian(formula(list(symbols)), symbols)
    of = chainrule.hessian(function, layout="sparse_coo")
    for _ in range(2):
        x = torch.randn(size, dtype=torch.float64)
        found = of(x)
        evaluate, reported = compare(found, derived, symbols)
        expected = torch.tensor(evaluate(x.tolist()), dtype=torch.float64)
        torch.testing.assert_close(found.to_dense(), expected, rtol=1e-12, atol=1e-10)
        assert reported == {(j, i) for i, j in reported}


@pytest.mark.parametrize("name", ["brusselator", "rosenbrock residuals", "blocks"])
def test_pattern_is_that_of_the_derivation(name):
    function, formula, size = VECTORS[name]
    symbols = sympy.symbols(f"x0:{size}", real=True)
    derived = sympy.Matrix(formula(list(symbols))).jacobian(symbols)
    _, reported = compare(chainrule.jacobian(function, layout="sparse_coo")(torch.randn(size).double()), derived, symbols)
    assert reported == {(i, j) for i in range(derived.rows) for j in range(derived.cols) if not derived[i, j].is_zero}
