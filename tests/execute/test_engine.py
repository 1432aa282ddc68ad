"""Plans are cached by signature, replayed on other values, bounded, and hold no tensors of the run that made them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import chainrule
from chainrule.execute import planning


def test_a_second_call_replays_and_does_not_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) * x.sum()

    x = torch.randn(11, dtype=torch.float64)
    chainrule.jacrev(function)(x)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("planned again")

    monkeypatch.setattr(planning, "plan", refuse)
    for _ in range(3):
        y = torch.randn(11, dtype=torch.float64)
        expected = torch.diag(torch.cos(y) * y.sum()) + torch.sin(y)[:, None]
        torch.testing.assert_close(chainrule.jacrev(function)(y), expected)
    with pytest.raises(AssertionError, match="planned again"):
        chainrule.jacrev(function)(torch.randn(12, dtype=torch.float64))


def test_a_branch_on_a_value_is_never_replayed_stale() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x**2 if x.sum() > 0 else -x

    assert torch.equal(chainrule.jacrev(function)(torch.ones(2)), 2 * torch.eye(2))
    assert torch.equal(chainrule.jacrev(function)(-torch.ones(2)), -torch.eye(2))
    assert torch.equal(chainrule.jacrev(function)(torch.ones(2)), 2 * torch.eye(2))


def test_static_arguments_are_part_of_the_signature() -> None:
    for factor in (2.0, 3.0, 2):
        assert chainrule.grad(lambda x, f=factor: (x * f).sum())(torch.ones(2)).tolist() == [factor, factor]


def test_results_are_fresh_memory() -> None:
    weight = torch.randn(3, 3)
    jacobian = chainrule.jacobian(lambda x: weight @ x)(torch.randn(3))
    before = weight.clone()
    jacobian.add_(1.0)
    assert torch.equal(weight, before)
    first, second = chainrule.jacobian(lambda x: (x * 2, x * 2))(torch.randn(3))
    first.zero_()
    assert torch.equal(second, 2 * torch.eye(3))
    chainrule.grad(lambda x: x.sum())(torch.randn(3)).add_(1.0)


@pytest.mark.parametrize("transform", [chainrule.jacrev, chainrule.jacfwd, chainrule.hessian])
def test_tensors_of_a_call_are_freed_without_the_garbage_collector(transform: object) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        hidden = torch.sin(x)
        alive.append(weakref.ref(hidden))
        return (hidden * hidden).cumsum(0)

    gc.disable()
    try:
        for size in (3, 3, 3, 5):
            transform(function)(torch.randn(size))  # type: ignore[operator]
        assert all(reference() is None for reference in alive)
    finally:
        gc.enable()
