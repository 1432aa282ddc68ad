"""Comparisons, and functions of constants that make new tensors, go past the tape; whatever concerns it does not."""

from __future__ import annotations

import pytest
import torch

import chainrule
from chainrule.functions import FRESH

X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def written_by_out(x):
    out = torch.empty(3, dtype=x.dtype)
    torch.arange(3, out=out)
    return x * out


def written_mask(x):
    mask = torch.empty(3, dtype=torch.bool)
    torch.gt(x, 0, out=mask)
    return torch.where(mask, x**2, x)


def written_through(x):
    """The result of a conversion that changes nothing is the tensor itself."""
    base = torch.ones(3, dtype=x.dtype)
    same = base.to(x.dtype)
    same[0] = x[1]
    return base * x


def converted(x):
    return x.to(torch.float32).to(torch.float64) * x.double() + (x > 0).to(x.dtype) * x**2


def masked(x):
    grid = torch.linspace(0, 1, 3, dtype=x.dtype)
    return torch.where(x >= grid, x.exp(), x * grid) + (grid == 0).double() * x + torch.full((3,), 2.0) * x


def filled(x):
    return torch.full((3,), 1.0, dtype=x.dtype) * x + torch.eye(3, dtype=x.dtype) @ x.sin() + torch.ones(3, dtype=x.dtype).le(x) * x


def made(x):
    chosen = x.index_select(0, torch.tensor([2, 0, 1])) * torch.tensor(0.5)
    return x.sin() * torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype) + chosen + x * torch.tensor((True, False, True))


FUNCTIONS = [written_by_out, written_mask, written_through, converted, masked, filled, made]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_jacobians(function):
    if function is written_mask:  # torch.func has no forward mode for it
        expected = torch.diag(torch.where(X > 0, 2 * X, 1.0))
    elif function is written_through:  # nor does it let constants be written
        expected = torch.diag(torch.tensor([-1.0, 1, 1]).double())
        expected[0, 1] = X[0]
    else:
        expected = torch.func.jacfwd(function)(X)
    # One of them rounds to float32 on the way.
    for transform in (chainrule.jacfwd, chainrule.jacrev, chainrule.jacobian):
        torch.testing.assert_close(transform(function)(X), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(chainrule.jacfwd(chainrule.jacrev(function))(X), chainrule.jacrev(chainrule.jacfwd(function))(X))


def test_what_requires_a_gradient_keeps_its_graph():
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    found = chainrule.jacrev(lambda x: x**2 * weight.double() * weight.to(torch.float32))(X)
    found.sum().backward()
    torch.testing.assert_close(weight.grad, 4 * X)
    made = chainrule.jacrev(lambda x: (x * torch.ones(3, dtype=torch.float64, requires_grad=True)))(X)
    assert made.requires_grad


def test_tensors_made_of_values_of_the_inputs_are_constants():
    """By their numbers, and by tensors in the list, which the recorded call reads."""
    for read in (
        lambda x: torch.tensor([x[0].item(), x[1].item(), 2.0], dtype=x.dtype),
        lambda x: torch.tensor([x[0], x[1], 2.0], dtype=x.dtype),
    ):
        for values in (X, X + 1):
            found = chainrule.jacrev(lambda x, read=read: x * read(x))(values)
            torch.testing.assert_close(found, torch.diag(torch.stack([values[0], values[1], torch.tensor(2.0).double()])))


def test_a_new_tensor_with_a_gradient_is_followed():
    def own(x):
        weight = torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype, requires_grad=True)
        return x * torch.autograd.grad((weight**2).sum(), weight)[0]

    torch.testing.assert_close(chainrule.jacrev(own)(X), torch.diag(torch.tensor([2.0, 4.0, 6.0]).double()))


def test_other_modes_see_the_calls():
    seen = []

    class Seeing(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Seeing():
        chainrule.jacrev(lambda x: torch.where(x > 0, x, torch.linspace(0, 1, 3, dtype=x.dtype)))(X)
    assert torch.ops.aten.gt.Scalar in seen
    assert torch.ops.aten.linspace.default in seen


def test_table():
    assert torch.Tensor.to in FRESH
    assert torch.linspace in FRESH
    assert torch.tensor in FRESH
