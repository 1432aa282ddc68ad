"""Ops in parts, where closed-over parameters require grad: what they write is what torch writes, and has no graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian

import chainrule

DOUBLE = torch.float64


def _squares(net: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: net(x).square().sum()


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)), (6, 3)),
    "batch-plain": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Tanh()), (6, 3)),
    "batch-cumulative": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=None), nn.Tanh()), (6, 3)),
    "batch-images": (lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten()), (4, 2, 3, 3)),
    "instance": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True, track_running_stats=True), nn.Tanh()),
        (4, 2, 5),
    ),
}

TRANSFORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "grad": (lambda net: chainrule.grad(_squares(net)), lambda net, x: jacobian(_squares(net), x)),
    "jacrev": (chainrule.jacrev, jacobian),
    "jacfwd": (chainrule.jacfwd, jacobian),
    "hessian": (lambda net: chainrule.hessian(_squares(net)), lambda net, x: hessian(_squares(net), x)),
    "jacrev-grad": (lambda net: chainrule.jacrev(chainrule.grad(_squares(net))), lambda net, x: hessian(_squares(net), x)),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", NETS)
def test_running_statistics_are_updated_as_by_torch_and_stay_without_a_graph(name: str, transform: str, compiled: bool) -> None:
    """Training, then evaluation, then training: derivatives, statistics to the last bit, and modules that can be copied."""
    if compiled and name == "batch-cumulative":
        pytest.skip("the module reads its count of batches into Python, which compile refuses")
    torch.manual_seed(0)
    make, shape = NETS[name]
    ours, theirs = (net := make().to(DOUBLE)), copy.deepcopy(net)
    take, oracle = TRANSFORMS[transform]
    derivative = take(ours)
    if compiled:
        derivative = chainrule.compile(derivative)
    for training in (True, True, True, True, False, True):
        ours.train(training)
        theirs.train(training)
        x = torch.randn(shape, dtype=DOUBLE)
        found = derivative(x)
        torch.testing.assert_close(found, oracle(copy.deepcopy(theirs), x))
        theirs(x)
        for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
            assert not mine.requires_grad
            # Compiled calls may sum in another order.
            torch.testing.assert_close(mine, other, rtol=1e-12 if compiled else 0.0, atol=1e-14 if compiled else 0.0)
    ours(torch.randn(shape, dtype=DOUBLE))
    copy.deepcopy(ours)


def test_running_statistics_are_constants() -> None:
    """What is computed with statistics that the function itself has updated, as in torch."""
    torch.manual_seed(0)
    weight = torch.randn(3, 4, dtype=DOUBLE, requires_grad=True)
    start = torch.randn(4, dtype=DOUBLE), torch.rand(4, dtype=DOUBLE) + 0.5

    def function(x: Tensor) -> Tensor:
        mean, variance = start[0].clone(), start[1].clone()
        trained = F.batch_norm(x @ weight, mean, variance, training=True)
        return trained.sin() + F.batch_norm(x @ weight, mean, variance).cos() * mean

    for transform in (chainrule.jacrev, chainrule.jacfwd, chainrule.compile(chainrule.jacobian(function))):
        derivative = transform(function) if transform in (chainrule.jacrev, chainrule.jacfwd) else transform
        for _ in range(4):
            x = torch.randn(5, 3, dtype=DOUBLE)
            torch.testing.assert_close(derivative(x), jacobian(function, x))


def test_buffers_that_are_given_stay_without_a_graph() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).to(DOUBLE)
    parameters = dict(net.named_parameters())
    mine = {name: item.clone() for name, item in net.named_buffers()}
    others = {name: item.clone() for name, item in net.named_buffers()}
    for _ in range(3):
        x = torch.randn(6, 3, dtype=DOUBLE)

        def loss(p: dict[str, Tensor], x: Tensor = x) -> Tensor:
            return chainrule.functional_call(net, (p, mine), (x,)).square().sum()

        found = chainrule.grad(loss)(parameters)
        value = torch.func.functional_call(net, (parameters, others), (x,)).square().sum()
        wanted = torch.autograd.grad(value, list(parameters.values()))
        torch.testing.assert_close(list(found.values()), list(wanted))
        for name, item in mine.items():
            assert not item.requires_grad
            torch.testing.assert_close(item, others[name], rtol=0.0, atol=0.0)


def test_a_derivative_between_forward_and_backward_of_the_same_module() -> None:
    """The penalty of a discriminator: what torch has kept for the backward is not counted as written to."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).to(DOUBLE)
    x, y = torch.randn(2, 6, 3, dtype=DOUBLE)
    loss = net(x).square().sum() + chainrule.grad(lambda y: net(y).sum())(y).square().sum()
    loss.backward()
    found = [parameter.grad for parameter in net.parameters()]
    y.requires_grad_()
    (by_input,) = torch.autograd.grad(net(y).sum(), y, create_graph=True)
    wanted = torch.autograd.grad(net(x).square().sum() + by_input.square().sum(), list(net.parameters()), allow_unused=True)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)
