"""Running sums and products: what is read off their linear maps is computed by recurrences, and no triangle is made."""

from __future__ import annotations

import pytest
import torch

import chainrule
from chainrule.execute.memory import watching
from chainrule.plan import algebra
from chainrule.rules import scans

DOUBLE = torch.float64


def _backwards(scan, dim):
    return lambda x: scan(x.flip(dim), dim).flip(dim)


FUNCTIONS = {
    "sum": lambda x: x.cumsum(0),
    "product": lambda x: x.cumprod(0),
    "exponentials": lambda x: x.logcumsumexp(0),
    "last dimension": lambda x: x.cumprod(-1) * x.logcumsumexp(-1),
    "backwards": lambda x: _backwards(torch.cumsum, 0)(x.sin()) * x,
    "product backwards": _backwards(torch.cumprod, -1),
    "turned": lambda x: x.cumsum(0).flip(0).cos(),
    "turned before": lambda x: x.sin().flip(0).cumprod(0),
    "twice": lambda x: x.cumsum(0).sin().cumsum(0),
    "sum and product": lambda x: (x.cumsum(0).sin() + 1).cumprod(0),
    "three times": lambda x: x.cumsum(0).cumsum(0).cumsum(0),
    "both ways": lambda x: x.cumsum(0) + _backwards(torch.cumsum, 0)(x),
    "two": lambda x: x.cumprod(0) * x.cumsum(0),
    "rolled": lambda x: x.roll(1, 0).cumprod(0).roll(2, 0),
    "sorted": lambda x: x.sort(0).values.cumsum(0),
    "cut": lambda x: torch.cat([x.cumsum(0)[1:], x[:1]]),
    "window": lambda x: torch.cat([x.cumsum(0)[3:] - x.cumsum(0)[:-3], x[:3]]) if x.shape[0] > 3 else x.cumsum(0),
    "residual": lambda x: x + x.sin().cumsum(0).cos(),
    "stencil": lambda x: (x.roll(1, 0) - 2 * x + x.roll(-1, 0)).cumsum(0),
    "mean": lambda x: x.cumsum(0) - x.mean(0),
    "low rank": lambda x: (torch.linspace(0, 1, x.shape[0], dtype=x.dtype)[:, None] * x.sin().sum(0)).reshape(x.shape).cumsum(0) + x**2
    if x.dim() == 1 else x.cumsum(0) + x**2,
}  # fmt: skip

READ = {
    "diagonal": (lambda J: J.diagonal(), lambda M: M.diagonal()),
    "trace": (lambda J: J.trace(), lambda M: M.trace()),
    "norm": (lambda J: J.norm(), lambda M: M.norm()),
    "gram diagonal": (lambda J: J.gram().diagonal(), lambda M: (M @ M.T).diagonal()),
    "gram trace": (lambda J: J.gram().trace(), lambda M: (M @ M.T).trace()),
    "gram norm": (lambda J: J.gram().norm(), lambda M: (M @ M.T).norm()),
    "normal diagonal": (lambda J: J.normal().diagonal(), lambda M: (M.T @ M).diagonal()),
    "normal norm": (lambda J: J.normal().norm(), lambda M: (M.T @ M).norm()),
    "sum with the transpose": (lambda J: (J - 2 * J.T).norm(), lambda M: (M - 2 * M.T).norm()),
    "trace of the square": (lambda J: (J @ J).trace(), lambda M: (M @ M).trace()),
    "diagonal of the square": (lambda J: (J @ J).diagonal(), lambda M: (M @ M).diagonal()),
    "norm of the square": (lambda J: (J @ J).norm(), lambda M: (M @ M).norm()),
}


def matrix_of(function, x):
    return torch.func.jacrev(function)(x).reshape(x.numel(), x.numel())


def scale_of(expected):
    return max(1.0, float(expected.abs().max())) if expected.numel() else 1.0


@pytest.fixture
def recurrences(monkeypatch):
    """Short lines, too, are known by their recurrences, and these are used wherever they can be."""
    monkeypatch.setattr(scans, "_SHORT", 1)
    monkeypatch.setattr(algebra, "_is_wide", lambda *args: True)
    candidates = algebra._candidates

    def chosen(*args):
        found, blocks, graph = candidates(*args)
        apart = [candidate for candidate in found if candidate.name == "apart"]
        return apart or found, blocks, graph

    monkeypatch.setattr(algebra, "_candidates", chosen)
    chainrule.execute.engine.CACHE.clear()
    yield
    chainrule.execute.engine.CACHE.clear()


@pytest.mark.parametrize("shape", [(0,), (1,), (2,), (5,), (37,), (5, 3), (1, 4)], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_the_dense_matrix(name, shape, recurrences):
    function = FUNCTIONS[name]
    for dtype in (DOUBLE, torch.float32) if shape in ((37,), (5, 3)) else (DOUBLE,):
        generator = torch.Generator().manual_seed(len(shape) + sum(shape))
        x = torch.randn(shape, dtype=dtype, generator=generator)
        if x.numel() > 3:
            x.view(-1)[1] = 0.0  # behind a zero, products have derivatives all the same
        matrix = matrix_of(function, x)
        for read, (ours, theirs) in READ.items():
            expected = theirs(matrix).reshape(-1)
            # Sums of up to 37³ products; the largest of them sets the scale.
            tolerance = (1e-10 if dtype == DOUBLE else 2e-4) * scale_of(expected)
            for _ in range(3 if shape == (5,) else 1):
                found = ours(chainrule.linear_map(function, x)).reshape(-1)
                assert found.dtype == dtype
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=lambda m, r=read: f"{r}: {m}")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_and_entries(name, recurrences):
    function = FUNCTIONS[name]
    x = torch.randn(37, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))
    matrix, some, others = matrix_of(function, x), [0, 7, 36, 18], [36, 6, 0, 18]
    J = chainrule.linear_map(function, x)
    for found, expected in (
        (J.gram().rows(some), (matrix @ matrix.T)[some]),
        (J.normal().columns(some), (matrix.T @ matrix)[:, some]),
        (J[some, others], matrix[some, others]),
        (J.gram()[some, others], (matrix @ matrix.T)[some, others]),
    ):
        tolerance = 1e-11 * scale_of(expected)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["sum", "product", "exponentials", "backwards", "twice", "both ways"])
@pytest.mark.parametrize("read", ["norm", "gram diagonal", "gram norm", "trace of the square"])
def test_derivatives(name, read):
    """What is read off can be differentiated with respect to the point, and mapped."""
    function, (ours, theirs) = FUNCTIONS[name], READ[read]
    x = torch.rand(70, dtype=DOUBLE, generator=torch.Generator().manual_seed(1)) + 0.3
    x[4] = 0.0
    given = x.clone().requires_grad_()
    matrix = torch.autograd.functional.jacobian(function, given, create_graph=True)
    value = theirs(matrix).square().sum()
    value = value if value.requires_grad else value + 0 * given.sum()
    (expected,) = torch.autograd.grad(value, given)
    read_off = lambda y: ours(chainrule.linear_map(function, y)).square().sum()  # noqa: E731
    (found,) = torch.autograd.grad(read_off(given) + 0 * given.sum(), given)
    tolerance = 1e-9 * scale_of(expected)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(chainrule.grad(read_off)(x), expected, rtol=tolerance, atol=tolerance)
    points = torch.stack([x, x.flip(0) + 0.5])
    mapped = chainrule.vmap(read_off)(points)
    torch.testing.assert_close(mapped, torch.stack([read_off(point) for point in points]), rtol=1e-9, atol=1e-9)


LARGE = 2000

SQUARES = ("sum with the transpose", "trace of the square", "diagonal of the square", "norm of the square")

#: What has no closed form by recurrences of few numbers: it is computed from blocks of rows.
BY_BLOCKS = {
    "rolled": SQUARES, "sorted": SQUARES, "three times": ("gram norm", "normal norm", "norm of the square"),
    "stencil": ("gram diagonal", "gram norm", "normal norm", *SQUARES),
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in ("window", "cut")])
def test_what_is_held_is_linear(name):
    """A square takes 32 MB; numbers for each row are held, those of recurrences of several sums some hundreds."""
    function = FUNCTIONS[name]
    x = (torch.rand(LARGE, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)) - 0.5) / LARGE + 1
    J = chainrule.linear_map(function, x)
    for read, (ours, _) in READ.items():
        if read not in BY_BLOCKS.get(name, ()):
            ours(J)
            with watching() as watch:
                ours(J)
            assert watch.peak < 8 * 300 * LARGE, f"{read}: {watch.peak / 8 / LARGE:.0f} numbers for each row"


@pytest.mark.parametrize("kind", ["cumprod", "logcumsumexp"])
def test_time_does_not_grow_like_the_square(kind):
    """The plan's own count of multiply-adds and of numbers held at once, at ten times the length."""
    counts = []
    for size in (1000, 10000):
        x = torch.rand(size, dtype=DOUBLE)
        J = chainrule.linear_map(lambda x: getattr(x, kind)(0).sin(), x)
        tape, request, seeds = J.gram()._request("squares")
        found, _, _ = algebra._candidates(tape, request, seeds, algebra.make_workspace(tape, (*request.inputs, *request.outputs)))
        best = min(found, key=lambda candidate: candidate.cost)
        counts.append((best.cost, best.peak))
    assert counts[1][0] < 16 * counts[0][0]
    assert counts[1][1] < 12 * counts[0][1]
