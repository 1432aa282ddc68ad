"""Vertices eliminated beforehand: how many products are left, and that the Jacobian is the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import chainrule
from chainrule.execute import engine
from chainrule.plan import condensing, elimination
from chainrule.plan import sparse as plan_of_sparse

DOUBLE = torch.float64


def unrolled(steps: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def f(u: torch.Tensor) -> torch.Tensor:
        for _ in range(steps):
            u = u + 0.1 * (u.roll(1) - 2 * u + u.roll(-1)) + 0.05 * u * (1 - u)
        return u

    return f


def products(monkeypatch: pytest.MonkeyPatch, f: Callable[[torch.Tensor], torch.Tensor], size: int) -> tuple[int, int]:
    """The products of maps and the terms in them that the orders take in a first call."""
    count = terms = 0
    original = elimination.compose

    def counted(left, right, *args, **kwargs):  # type: ignore[no-untyped-def]
        nonlocal count, terms
        count, terms = count + 1, terms + len(left.terms) * len(right.terms)
        return original(left, right, *args, **kwargs)

    engine.CACHE.clear()
    with monkeypatch.context() as patch:
        patch.setattr(elimination, "compose", counted)
        chainrule.jacobian(f, layout="sparse_csr")(torch.rand(size, dtype=DOUBLE))
    return count, terms


def test_planning_is_linear_in_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """One product of maps per step and order, and no more terms in it than three times those below which they stay apart."""
    found = {steps: products(monkeypatch, unrolled(steps), 400) for steps in (20, 30, 40)}
    assert found[40][0] - found[30][0] == found[30][0] - found[20][0]
    assert found[40][1] - found[30][1] == found[30][1] - found[20][1]


FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "steps": unrolled(3),
    "no derivative": lambda u: (u.detach() * 2).sin() + u.round() * u,
    "sums": lambda u: (u * u.sum()).exp() + u.mean().sin(),
    "through one element": lambda u: torch.stack([u[0] * u[1], u[2]]).sin().sum() * u,
    "matrices": lambda u: torch.outer(u, u).tanh() @ u.cos(),
    "parts": lambda u: torch.cat([u[2:] * 2, u[:2].sin()]).exp() * u,
    "gathers": lambda u: (u[torch.tensor([0, 0, 3, 4])] * 3).sin().repeat(2)[1:],
    "where": lambda u: torch.where(u > 0.5, u.roll(1) * u, u.flip(0)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The Jacobian is that of torch.func to rounding, and its pattern that of all products in order."""
    f, u = FUNCTIONS[name], torch.rand(7, dtype=DOUBLE)
    wanted = torch.func.jacrev(f)(u)
    patterns = []
    for taken in (True, False):
        engine.CACHE.clear()
        if not taken:
            monkeypatch.setattr(plan_of_sparse, "condensed", lambda graph, *args: graph)
        found = chainrule.jacobian(f, layout="sparse_coo")(u)
        assert torch.allclose(found.to_dense(), wanted, rtol=1e-12, atol=1e-13)
        patterns.append(found.indices())
    assert torch.equal(*patterns)
    engine.CACHE.clear()


def test_short_graphs_stay() -> None:
    """With less than two inner vertices there is nothing to save."""
    graph = plan_of_sparse.Graph(order=[1])
    assert condensing.condensed(graph, [0], [1], lambda slot: (1,), None) is graph  # type: ignore[arg-type]
