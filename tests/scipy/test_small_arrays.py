"""Graphs as code of NumPy's: the same numbers, new arrays, and what is left to torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")

import chainrule  # noqa: E402
from chainrule import scipy as solvers  # noqa: E402
from chainrule.scipy.replays import ATTRIBUTE, CALLS, Replayed  # noqa: E402
from chainrule.scipy.small_arrays import SmallArrays, small_arrays  # noqa: E402
from tests.scipy.problems import bratu, bratu_ends, decay, robertson, rosenbrock, rosenbrock_residuals  # noqa: E402

float64 = torch.float64


def code_of(function, *arrays):
    """The code for a function, once it was recorded."""
    compiled = chainrule.compile(function)
    tensors = [torch.from_numpy(np.array(array)) for array in arrays]
    with torch.no_grad():
        compiled(*tensors)
        return small_arrays(compiled._held(*tensors))


def both(name):
    """A vector function with its Jacobian."""
    return chainrule.jacobian(lambda *x: (name(*x),) * 2, has_aux=True)


WEIGHTS, OTHERS = torch.randn(4, 3, dtype=float64), torch.randn(4, dtype=float64)

FUNCTIONS = {
    "elementwise": lambda x: torch.exp(-x) * x.sin() + (x.cos() - 2) / (1 + x * x) - x.tanh(),
    "more": lambda x: x.abs().sqrt() + x.abs().log1p() - x.expm1() + x.sigmoid() + (x**2 + 1).rsqrt() + (x**2 + 1).reciprocal(),
    "inverse": lambda x: (x / 9).asin() + (x / 9).acos() + x.atan() + torch.atan2(x, x + 5) + x.sinh() - x.cosh() + (x / 9).tan(),
    "powers": lambda x: x**2 + x**3 + x.abs() ** 1.5 + (x + 9) ** -1 + (x + 9) ** -2 + 2.0**x + (x + 9) ** (x / 9) + x.square(),
    "numbers": lambda x: 3 - x + 2 * x - x / 4 + 1 / (x + 9) + torch.sub(x, x * x, alpha=1),
    "pieces": lambda x: torch.stack([x[0] * x[-1], x[1], x[2] ** 2]),
    "unbound": lambda x: torch.stack([x.unbind()[0] * x.unbind()[2], x.unbind()[1]]),
    "slices": lambda x: torch.cat([x[1:] - x[:-1], x[::2], x.roll(1), x.roll(-2)]),
    "shapes": lambda x: (x[:, None] * x[None]).transpose(0, 1).reshape(-1),
    "matrices": lambda x: WEIGHTS @ x - OTHERS,
    "sums": lambda x: torch.stack([x.sum(), (x * x).mean(), (x[:, None] * x[None]).sum(1).sum(0), x.dot(x)]),
    "extremes": lambda x: torch.maximum(x, x * x) + torch.minimum(x, 1 - x),
    "selected": lambda x: torch.where(x > 0, x, 2 * x) + x.clone().masked_fill(x <= 0.1, 3.0) + (x != 0).double(),
    "signs": lambda x: x.sign() * x.exp(),
    "power": lambda x: x[0] * torch.linspace(1, 4, 5, dtype=float64) ** x[1],
    "padded": lambda x: torch.nn.functional.pad(x, (1, 2)) * 2,
    "rolled": lambda x: x.roll(1) * x - 1 + x**2 * 0.1,
    "band": lambda x: (3 - x) * x + 1 - torch.cat([x.new_zeros(1), x[:-1]]) - 2 * torch.cat([x[1:], x.new_zeros(1)]),
    "residuals": rosenbrock_residuals,
}  # fmt: skip


#: Those whose Jacobians have other calls.
LEFT = {"shapes", "padded"}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("is_derived", [False, True])
def test_numbers_are_those_of_torch(name, is_derived):
    function = FUNCTIONS[name]
    called = both(function) if is_derived else function
    drawn = np.random.default_rng(0)
    code = code_of(called, drawn.normal(size=3))
    if is_derived and name in LEFT:
        assert np.allclose(called(torch.ones(3, dtype=float64))[1].numpy(), function(torch.ones(3, dtype=float64)).numpy())
        return
    assert code is not None
    for _ in range(4):
        x = drawn.normal(size=3)
        given = x.copy()
        found = code((x,))
        expected = called(torch.from_numpy(x))
        expected = expected if is_derived else (expected,)
        assert len(found) == len(expected)
        for array, tensor in zip(found, expected, strict=True):
            assert array.__class__ is np.ndarray
            assert array.dtype == np.float64
            assert array.flags.c_contiguous
            assert array.flags.writeable
            assert np.allclose(array, tensor.numpy(), rtol=1e-12, atol=1e-14)
        if is_derived:
            exact = torch.func.jacrev(function)(torch.from_numpy(x))
            assert np.allclose(found[0], exact.numpy(), rtol=1e-12, atol=1e-13)
        # Nobody else has the results' memory.
        for array in found:
            array.fill(7.0)
        assert np.array_equal(x, given)
        assert np.allclose(code((x,))[-1], expected[-1].numpy(), rtol=1e-12, atol=1e-14)


def test_sizes_of_the_other_kinds():
    for shape in ((0,), (1,), (2, 3), (3, 1), ()):
        code = code_of(lambda x: (x.exp() * 2 + x, x, x.sum() + 1 if x.dim() else x + 1), np.ones(shape))
        assert code is not None
        x = np.random.default_rng(0).normal(size=shape)
        first, second, third = code((x,))
        assert first.shape == second.shape == shape
        assert third.shape == ()
        assert np.allclose(first, np.exp(x) * 2 + x)
        assert np.array_equal(second, x)
        assert not np.shares_memory(second, x)
    two = code_of(lambda x, y: (x[:, None] * y, x.sum() * y), np.ones(2), np.ones(3))
    x, y = np.array([1.0, 2, 3, 4])[::2], np.array([[1.0, 2], [3, 4], [5, 6]])[:, 1]
    assert np.array_equal(two((x, y))[0], np.outer(x, y))


def test_infinities_and_nan_come_without_warnings():
    code = code_of(lambda x: torch.stack([x[0] / x[1], x[0].log(), (1000 * x[0].exp()).exp(), x[1] ** -1, x[1] - x[1] / 0]), np.ones(2))
    for x in (np.ones(2), np.array([-1.0, 0.0]), np.array([0.0, 0.0])):
        exact = torch.stack([
            torch.tensor(x[0]) / x[1], torch.tensor(x[0]).log(), (1000 * torch.tensor(x[0]).exp()).exp(),
            torch.tensor(x[1]) ** -1, torch.tensor(x[1]) - torch.tensor(x[1]) / 0])  # fmt: skip
        assert np.allclose(code((x,))[0], exact.numpy(), equal_nan=True)


def test_signs_are_those_of_torch():
    code = code_of(lambda x: x.sign(), np.ones(4))
    assert np.array_equal(code((np.array([np.nan, -2.0, 0.0, np.inf]),))[0], [0.0, -1.0, 0.0, 1.0])


def test_roots_are_those_of_torch():
    x = np.array([-np.inf, np.inf, 0.0, -0.0, -1.0, np.nan, 2.0])
    for power in (0.5, -0.5):
        (found,) = code_of(lambda x, power=power: x**power, np.ones(7))((x,))
        assert np.array_equal(found, (torch.from_numpy(x) ** power).numpy(), equal_nan=True)


def test_what_is_left_to_torch():
    state, parameter = torch.ones(3, dtype=float64), torch.ones(3, dtype=float64, requires_grad=True)
    assert code_of(lambda x: x * state, np.ones(3)) is not None
    for function, x in (
        (lambda x: x.exp(), np.ones(1 << 13)),
        (lambda x: (x[:, None] * x).sum(), np.ones(100)),
        (lambda x: x.float().exp(), np.ones(3)),
        (lambda x: (x > 0) & (x < 1), np.ones(3)),
        (lambda x: x.cumsum(0), np.ones(3)),
        (lambda x: state.add_(x).sum() + x, np.ones(3)),
        (lambda x: torch.linalg.solve(torch.eye(3, dtype=float64) + x, x), np.ones(3)),
        (lambda x: x + torch.randn(3, dtype=float64), np.ones(3)),
        (lambda x: x * parameter, np.ones(3)),
        (lambda x: x.to_sparse(), np.ones(3)),
        (lambda x: {"a": x * 2}, np.ones(3)),
        (lambda x: (x * 2, 3), np.ones(3)),
    ):
        assert code_of(function, x) is None


def test_writes_are_those_of_torch():
    def written(x):
        out = x.new_zeros(2, 3)
        row = out[0]
        row[1:] = x[:2] * 2
        out[1, 0] = x[2]
        same = out[:, 1]
        out[1, 1] = 5 * x[0]
        return out.sum(0) + same.sum(), out

    code = code_of(written, np.ones(3))
    drawn = np.random.default_rng(0)
    for _ in range(3):
        x = drawn.normal(size=3)
        expected = written(torch.from_numpy(x))
        found = code((x,)) if code is not None else [e.numpy() for e in expected]
        assert all(np.allclose(a, b.numpy()) for a, b in zip(found, expected, strict=True))
    assert code is not None


def test_code_that_gives_something_else_is_refused():
    compiled = chainrule.compile(lambda x: x * 2 + 1)
    x = torch.ones(2, dtype=float64)
    compiled(x)
    wrong = SmallArrays(compiled._held(x), lambda given: (given[0] * 2,))
    for _ in range(4):
        assert not wrong.is_refused
        assert wrong((np.ones(2),)) is None
    assert wrong.is_refused
    other = SmallArrays(compiled._held(x), lambda given: (given[0][:1],))
    assert other((np.ones(2),)) is None


def test_replays_take_it_and_see_what_changes():
    scale, offset = 2.0, torch.zeros(3, dtype=float64)

    def shifted(x):
        return scale * (x - offset).exp() + x

    entry = Replayed(shifted, shifted, shifted, is_forced=True)
    x = np.array([1.0, 2.0, 3.0])
    for _ in range(4):
        entry(torch.from_numpy(x))
    assert np.allclose(entry.arrays((x,)), 2 * np.exp(x) + x)
    offset += 1  # in place
    assert np.allclose(entry.arrays((x,)), 2 * np.exp(x - 1) + x)
    assert entry.arrays((x[:2],)) is None  # another shape
    assert entry.arrays((x.astype(np.float32),)) is None
    assert entry.arrays(([1.0, 2.0, 3.0],)) is None
    scale = 3.0
    assert entry.arrays((x,)) is None
    offset = torch.full((3,), 2.0, dtype=float64)
    for _ in range(3):
        assert np.allclose(entry(torch.from_numpy(x)), 3 * np.exp(x - 2) + x)
    assert np.allclose(entry.arrays((x,)), 3 * np.exp(x - 2) + x)
    offset = torch.full((3,), 2.0, dtype=float64, requires_grad=True)
    assert entry.arrays((x,)) is None


def is_coded(function):
    return any(entry._small for entry in function.__dict__[ATTRIBUTE].entries.values())


SOLVES = {
    "least_squares": (lambda f: solvers.least_squares(f, np.full(4, 0.5)).x, lambda: lambda x: rosenbrock_residuals(x)),
    "minimize": (lambda f: solvers.minimize(f, np.full(3, 0.5)).x, lambda: lambda x: rosenbrock(x)),
    "trust-exact": (lambda f: solvers.minimize(f, np.full(3, 0.5), method="trust-exact").x, lambda: lambda x: rosenbrock(x)),
    "root": (lambda f: solvers.root(f, np.ones(2)).x, lambda: lambda x: torch.stack([x[0] ** 2 - x[1], x[1] - 4])),
    "lm": (lambda f: solvers.root(f, np.ones(2), method="lm").x, lambda: lambda x: torch.stack([x[0] ** 2 - x[1], x[1] - 4])),
    "curve_fit": (
        lambda f: solvers.curve_fit(f, np.linspace(0, 3, 20), 2 * np.exp(-np.linspace(0, 3, 20)) + 1, p0=np.ones(3) / 2)[0],
        lambda: lambda x, a, b, c: decay(x, a, b, c)),
    "solve_ivp": (
        lambda f: solvers.solve_ivp(f, (0, 10), np.array([1.0, 0, 0]), method="BDF").y[:, -1], lambda: lambda t, y: robertson(t, y)),
    "solve_bvp": (
        lambda f: solvers.solve_bvp(f, bratu_ends, np.linspace(0, 1, 5), np.zeros((2, 5))).sol(0.5), lambda: lambda x, y: bratu(x, y)),
    "constraint": (
        lambda f: solvers.minimize(
            rosenbrock, np.full(3, 0.3), method="trust-constr", constraints=solvers.nonlinear_constraint(f, 0, 1)).x,
        lambda: lambda x: (x**2).sum()),
}  # fmt: skip


@pytest.mark.parametrize("name", SOLVES)
def test_solvers_find_the_same(name):
    solve, make = SOLVES[name]
    function = make()
    first = solve(function)
    for _ in range(CALLS + 4):
        found = solve(function)
    assert is_coded(function)
    # Iterations stop at a tolerance.
    assert np.allclose(first, found, rtol=1e-5, atol=1e-7)


def test_nan_and_shapes_are_told_as_before():
    def logarithm(x):
        return (x - torch.log(x)).sum()

    for _ in range(12):
        solvers.minimize(logarithm, np.full(2, 3.0))
    assert is_coded(logarithm)
    with pytest.raises(ValueError, match="logarithm: its value is NaN here"):
        solvers.minimize(logarithm, np.full(2, -3.0))

    def roots(x):
        return torch.stack([x[0].sqrt() - 1, x[1] - 2])

    for _ in range(40):
        solvers.root(roots, np.ones(2) * 1.5)
    assert is_coded(roots)
    with pytest.raises(ValueError, match="roots: its .* is NaN here"):
        solvers.root(roots, np.array([-1.0, 1.0]))
