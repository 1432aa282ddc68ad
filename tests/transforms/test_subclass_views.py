"""Tensors of plain subclasses inside of transforms: writes to them, and plain tensors taken out of them."""

from __future__ import annotations

import pytest
import torch

import chainrule


class Sub(torch.Tensor):
    """A class with torch's own way to take functions."""


def _multiplied(x):
    y = x.clone()
    y.mul_(x)
    return y.sum()


def _turned(x):
    y = x.clone().as_subclass(Sub)
    y.mul_(x)
    return y.sum()


def _read_before(x):
    y = x.sin().as_subclass(Sub)
    return (x * y).sum() + y.zero_().sum()


def _after_exp(x):
    y = x.as_subclass(Sub).exp()
    z = y * 1.0
    y.add_(x)
    return (y * z).sum()


def _set_item(x):
    y = x.clone().as_subclass(Sub)
    total = (y * y).sum()
    y[0] = x[1] ** 2
    return total + y.sum()


def _of_both_objects(x):
    plain = x.clone()
    other = plain.as_subclass(Sub)
    other.mul_(x)
    return (plain * x).sum()


def _closed_over(x):
    weight = torch.tensor([3.0, 4.0, 5.0], dtype=torch.float64).as_subclass(Sub)
    return (weight * x).mul_(x).sum()


def _taken_out(x):
    return x.as_subclass(torch.Tensor).sin().sum()


def _taken_out_twice(x):
    return (x.as_subclass(Sub).as_subclass(torch.Tensor) * x).sum()


def _written_when_taken_out(x):
    y = x.clone()
    y.as_subclass(torch.Tensor).mul_(x)
    return y.sum()


PROGRAMS = [
    _multiplied, _turned, _read_before, _after_exp, _set_item, _of_both_objects, _closed_over, _taken_out, _taken_out_twice,
    _written_when_taken_out,
]  # fmt: skip


@pytest.mark.parametrize("as_input", [torch.Tensor, Sub])
@pytest.mark.parametrize("program", PROGRAMS)
def test_derivatives(program, as_input):
    """Torch's autograd refuses some of the programs: what they write over was saved."""
    for _ in range(3):
        x = torch.rand(3, dtype=torch.float64) + 0.5
        step = 1e-6 * torch.eye(3, dtype=torch.float64)
        expected = torch.stack([(program(x + s) - program(x - s)) / 2e-6 for s in step]).as_subclass(torch.Tensor)
        given = x.as_subclass(as_input)
        for transform in (chainrule.grad, chainrule.jacrev, chainrule.jacfwd):
            found = transform(program)(given).as_subclass(torch.Tensor)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_plain_tensors_under_vmap():
    x = torch.rand(4, 3, dtype=torch.float64)
    for _ in range(4):
        torch.testing.assert_close(chainrule.vmap(lambda x: x.as_subclass(torch.Tensor).sin())(x), x.sin())
        torch.testing.assert_close(chainrule.vmap(chainrule.grad(_taken_out))(x), x.cos())


def test_outside_of_transforms_it_is_torch_s_own():
    x = torch.rand(3)
    assert x.as_subclass(Sub).__class__ is Sub
    assert x.as_subclass(Sub).as_subclass(torch.Tensor).__class__ is torch.Tensor
    x.requires_grad_()
    assert x.as_subclass(torch.Tensor).grad_fn is not None
