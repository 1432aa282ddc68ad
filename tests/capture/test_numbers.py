"""Python numbers that change from call to call: one plan serves them, and the results are those of the numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import chainrule
from chainrule.execute import engine


def plans_made(call: Callable[[float], object], numbers: list[float]) -> list[int]:
    """How many plans each call adds to the cache."""
    made = []
    for number in numbers:
        before = len(engine.CACHE)
        call(number)
        made.append(len(engine.CACHE) - before)
    return made


def penalised(w: torch.Tensor, factor: float) -> torch.Tensor:
    """The number stands in products, sums, quotients and on both sides; other numbers stay."""
    fit = F.softplus(w * factor + 1.0).sum() * 1.0
    return fit + factor * w.square().sum() / 2 + ((w - factor).sin() / factor + (factor - w).cos()).sum()


TRANSFORMS = {
    "grad": (chainrule.grad, torch.func.grad),
    "jacobian": (chainrule.jacobian, torch.func.jacrev),
    "hessian": (chainrule.hessian, torch.func.hessian),
    "nest": (lambda f: chainrule.jacfwd(chainrule.grad(f)), torch.func.hessian),
    "vjp": (lambda f: lambda *a: chainrule.vjp(f, *a)[1](torch.ones((), dtype=a[0].dtype))[0], torch.func.grad),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_results_and_plans(name, dtype):
    engine.CACHE.clear()
    ours, theirs = TRANSFORMS[name]
    w = torch.randn(5, dtype=dtype)

    def call(number):
        def f(w, factor=number):
            return penalised(w, factor)

        # The terms are of size 10 at most, a few hundred roundings.
        tolerance = 1e-11 if dtype is torch.float64 else 3e-3
        torch.testing.assert_close(ours(f)(w), theirs(f)(w), rtol=tolerance, atol=tolerance)

    made = plans_made(call, [2.0, 3.5, -1.25, 0.75, 1.0, 0.125, 7.0, 2, 2.0])
    assert made[0] > 0 and not any(made[-4:])


def test_only_the_number_that_changes():
    """A factor of one beside it is still folded into the plan."""
    engine.CACHE.clear()
    x = torch.randn(4, dtype=torch.float64)
    calls = []
    for number in (2.0, 3.0, 4.0, 5.0, 6.0):
        function = chainrule.jacobian(lambda v, number=number: (v * 1.0).sin() * number + 1.0)
        function(x)
        calls.append(len(chainrule.explain(function)(x).accounts[0].calls))
    assert max(calls) - min(calls) <= 1


def test_under_vmap_and_sparse():
    x = torch.randn(6, dtype=torch.float64)
    for number in (2.0, 3.0, 4.0, 5.0, 6.0, 7.5):
        found = chainrule.vmap(chainrule.grad(lambda v, number=number: (v * number).sin()))(x)
        torch.testing.assert_close(found, number * (x * number).cos())
        sparse = chainrule.jacobian(lambda v, number=number: torch.roll(v, 1) * number, layout="sparse_coo")(x)
        expected = torch.zeros(6, 6, dtype=torch.float64)
        expected[torch.arange(6), (torch.arange(6) - 1) % 6] = number
        torch.testing.assert_close(sparse.to_dense(), expected)


def test_numbers_that_are_no_values():
    """What cannot be a constant to the last bit stays a number: zero in a half, an integer tensor, too large, NaN."""
    x = torch.randn(3, dtype=torch.float16)
    for number in (2.0, 3.0, 4.0, 5.0, 0.0, float("inf"), float("nan"), 2.0**60):
        found = chainrule.grad(lambda v, number=number: (v * number).sum())(x)
        torch.testing.assert_close(found, torch.full((3,), number, dtype=torch.float64).half(), equal_nan=True)
        found = chainrule.grad(lambda v, number=number: (v * number).sum())(x.double())
        torch.testing.assert_close(found, torch.full((3,), number, dtype=torch.float64), equal_nan=True)
