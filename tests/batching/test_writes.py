"""Writes in place under vmap give what the loop over the samples gives, through views, and to tensors made inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import chainrule

Tensor = torch.Tensor


def _made_inside(x: Tensor) -> Tensor:
    y = torch.zeros(3, dtype=x.dtype)
    z = y.add_(x)
    assert z is y
    return z * 2


def _through_a_view(x: Tensor) -> Tensor:
    y = x.clone()
    assert y.mul_(2) is y
    y[1:].add_(1).clamp_(max=1.5)
    y[0] = x[1]
    return y


def _view_of_one_made_inside(x: Tensor) -> Tensor:
    y = torch.ones(2, 3, dtype=x.dtype)
    row = y[1]
    row.copy_(x)
    y.mul_(x)
    return y + row.fill_(x[0])


WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "made inside": _made_inside,
    "through a view": _through_a_view,
    "view of one made inside": _view_of_one_made_inside,
    "constant": lambda x: x.clone().add_(torch.arange(3.0, dtype=x.dtype)).sub_(1).div_(2),
    "at places": lambda x: x.clone().index_put_((torch.tensor([2, 0]),), x[:2]).masked_fill_(torch.tensor([True, False, False]), 4),
    "added at places": lambda x: x.clone().index_add_(0, torch.tensor([1, 1]), x[1:]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_as_in_a_loop(name: str) -> None:
    function, x = WRITES[name], torch.rand(4, 3, dtype=torch.float64)
    for _ in range(4):  # calls that are made again may be replayed
        torch.testing.assert_close(chainrule.vmap(function)(x), torch.stack([function(sample) for sample in x]))
    many = torch.rand(2, 4, 3, dtype=torch.float64)
    twice = chainrule.vmap(chainrule.vmap(function))(many)
    torch.testing.assert_close(twice, torch.stack([torch.stack([function(sample) for sample in part]) for part in many]))
    loss = lambda x: function(x).square().sum()  # noqa: E731
    slopes = torch.stack([torch.func.grad(loss)(sample) for sample in x])
    torch.testing.assert_close(chainrule.vmap(chainrule.grad(loss))(x), slopes)
    torch.testing.assert_close(chainrule.grad(lambda x: chainrule.vmap(loss)(x).sum())(x), slopes)


def test_constants_from_outside() -> None:
    """What every sample would write there can be written; what differs between them cannot."""
    x, kept = torch.rand(4, 3), torch.zeros(3)
    torch.testing.assert_close(chainrule.vmap(lambda x: x + kept.add_(1))(x), x + 1)
    assert kept.eq(1).all()
    with pytest.raises(RuntimeError, match="would write a value that differs between samples"):
        chainrule.vmap(lambda x: kept.add_(x))(x)
    assert kept.eq(1).all()


@pytest.mark.parametrize("write", [lambda x: x.clone().add_(torch.ones(2, 3)), lambda x: x.clone().copy_(torch.ones(2, 3))])
def test_shapes_that_do_not_fit(write: Callable[[Tensor], Any]) -> None:
    with pytest.raises(RuntimeError):
        chainrule.vmap(write)(torch.rand(4, 3))


def test_a_factor_with_a_graph() -> None:
    factor = torch.rand(3, requires_grad=True)
    x = torch.rand(4, 3)
    found = chainrule.vmap(lambda x: (x * 1.0).mul_(factor))(x)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), factor)[0], x.sum(0))
