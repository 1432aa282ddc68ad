"""Pullbacks of single ops: planned once for ops that are alike, anew for those that differ in anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import chainrule
from chainrule.execute import engine
from chainrule.plan import single_ops

Tensor = torch.Tensor
DOUBLE = torch.float64


def planned(monkeypatch: pytest.MonkeyPatch, function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """How many pullbacks a first call of a Laplacian plans; it is compared with torch's, as is the call that replays it."""
    count = 0
    original = single_ops.plan

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return original(*args, **kwargs)

    engine.CACHE.clear()
    expected = torch.func.hessian(function)(x).reshape(x.numel(), x.numel()).trace()
    with monkeypatch.context() as patch:
        patch.setattr(single_ops, "plan", counted)
        transformed = chainrule.laplacian(function)
        for _ in range(2):
            torch.testing.assert_close(transformed(x), expected)
    return count


def loop(steps: int) -> Callable[[Tensor], Tensor]:
    """A loop over elements, slices and products."""

    def final(x: Tensor) -> Tensor:
        state = x
        for _ in range(steps):
            state = torch.stack([state[1] * state[0], torch.sin(state[0]), state[2] - 0.5 * state[1]])
        return (state * state).sum()

    return final


def test_steps_of_a_loop_share_their_pullbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(3, dtype=DOUBLE)
    assert planned(monkeypatch, loop(9), x) == planned(monkeypatch, loop(3), x) > 0


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (lambda x: x * 2.0, lambda x: x * 3.0),
        (lambda x: x * 1, lambda x: x * True),
        (lambda x: x.sum(0), lambda x: x.sum(1)),
        (lambda x: x[0] * x[1], lambda x: x[:1] * x[1:]),
        (lambda x: x * x, lambda x: x * x.detach()),
        (lambda x: x * x[0], lambda x: x[0] * x),
        (lambda x: torch.addcmul(x, x, x), lambda x: torch.addcmul(x, x, x.roll(1))),
        (lambda x: x.cumsum(0), lambda x: x.cumsum(1)),
        (lambda x: x.topk(1).values, lambda x: x.topk(1, largest=False).values),
    ],
)
def test_ops_that_differ_are_planned_apart(
    monkeypatch: pytest.MonkeyPatch, one: Callable[[Tensor], Tensor], two: Callable[[Tensor], Tensor]
) -> None:
    """In a number, its type, a dimension, a shape, what is differentiated, or which arguments are the same."""
    x = torch.rand(2, 2, dtype=DOUBLE) + 0.5
    planned(monkeypatch, lambda x: (torch.exp(one(x)).sum() * torch.sin(two(x)).sum()), x)
