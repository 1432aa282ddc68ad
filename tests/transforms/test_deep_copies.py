"""``copy.deepcopy`` inside of transforms."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import chainrule


@pytest.mark.parametrize("function", [lambda x: (copy.deepcopy(x) * x).sum(), lambda x: (copy.deepcopy([x.sin()])[0] * x.sin()).sum()])
def test_copies_of_what_is_differentiated_have_derivatives(function):
    plain = torch.func.grad(lambda x: (x * x).sum())
    sines = torch.func.grad(lambda x: (x.sin() * x.sin()).sum())
    for _ in range(3):
        x = torch.randn(4, 3, dtype=torch.float64)
        expected = (plain if function(x[0]) == (x[0] * x[0]).sum() else sines)
        for transform in (chainrule.grad, chainrule.jacrev, chainrule.jacfwd):
            torch.testing.assert_close(transform(function)(x[0]), expected(x[0]))
            torch.testing.assert_close(chainrule.vmap(transform(function))(x), torch.stack([expected(row) for row in x]))


def test_tensors_and_modules_from_outside_are_copied():
    weight = torch.randn(3, dtype=torch.float64)
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False), nn.Tanh()).double().eval()
    network.requires_grad_(False)

    def function(x):
        copied = copy.deepcopy(network)
        return copied(x[None] * copy.deepcopy(weight))[0]

    for _ in range(4):
        x = torch.randn(5, 3, dtype=torch.float64)
        expected = network(x * weight)
        torch.testing.assert_close(chainrule.vmap(function)(x), expected)
        found = chainrule.vmap(chainrule.jacrev(function))(x)
        torch.testing.assert_close(found, torch.func.vmap(torch.func.jacrev(lambda x: network(x[None] * weight)[0]))(x))
        weight.mul_(1.5)
