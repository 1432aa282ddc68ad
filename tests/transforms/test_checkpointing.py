"""torch.utils.checkpoint inside of a transformed function, and around a transform."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.func
import torch.utils.checkpoint

import chainrule


def x() -> torch.Tensor:
    return torch.randn(4, dtype=torch.float64)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_under_vmap_and_with_parameters(reentrant: bool) -> None:
    weight, point = x().requires_grad_(), x()

    def plain(p: torch.Tensor) -> torch.Tensor:
        return torch.sin(p * weight) * p.sum()

    def saved(p: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(plain, p, use_reentrant=reentrant)

    rows = torch.stack([point, 2 * point])
    torch.testing.assert_close(chainrule.vmap(saved)(rows), torch.func.vmap(plain)(rows))
    torch.testing.assert_close(chainrule.vmap(chainrule.jacrev(saved))(rows), torch.func.vmap(torch.func.jacrev(plain))(rows))
    mine = torch.autograd.grad((chainrule.jacrev(saved)(point) ** 2).sum(), weight)
    torch.testing.assert_close(mine, torch.autograd.grad((torch.func.jacrev(plain)(point) ** 2).sum(), weight))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("transform", [chainrule.jacrev, chainrule.jacfwd, chainrule.hessian])
def test_checkpointing(reentrant: bool, transform: Any) -> None:
    def function(p: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(torch.sin, p, use_reentrant=reentrant)

    point = x()
    torch.testing.assert_close(transform(function)(point), transform(torch.sin)(point))


def scalar(function: Any) -> Any:
    return lambda p: function(p).sin().sum()


CHECKPOINTED: dict[str, Any] = {
    "jacobian": (lambda f: chainrule.jacobian(f), lambda f: torch.func.jacrev(f), False),
    "jacrev": (lambda f: chainrule.jacrev(f), lambda f: torch.func.jacrev(f), False),
    "jacfwd": (lambda f: chainrule.jacfwd(f), lambda f: torch.func.jacrev(f), False),
    "grad": (lambda f: chainrule.grad(scalar(f)), lambda f: torch.func.grad(scalar(f)), False),
    "hessian": (lambda f: chainrule.hessian(scalar(f)), lambda f: torch.func.hessian(scalar(f)), False),
    "vmap": (lambda f: chainrule.vmap(f), lambda f: torch.func.vmap(f), True),
    "vmap of grad": (
        lambda f: chainrule.vmap(chainrule.grad(scalar(f))), lambda f: torch.func.vmap(torch.func.grad(scalar(f))), True
    ),
    "vmap of hessian": (
        lambda f: chainrule.vmap(chainrule.hessian(scalar(f))), lambda f: torch.func.vmap(torch.func.hessian(scalar(f))), True
    ),
    "grad of vmap": (
        lambda f: chainrule.grad(lambda p: chainrule.vmap(f)(p).sin().sum()),
        lambda f: torch.func.grad(lambda p: torch.func.vmap(f)(p).sin().sum()), True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_backward_to_the_parameters_of_a_checkpointed_layer(name: str, reentrant: bool, requires_grad: bool) -> None:
    ours, theirs, batched = CHECKPOINTED[name]
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()

    def plain(p: torch.Tensor) -> torch.Tensor:
        return network(p) + p  # type: ignore[no-any-return]

    def saved(p: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(network, p, use_reentrant=reentrant) + p  # type: ignore[no-any-return]

    def gradients(result: torch.Tensor) -> Any:
        wanted = list(network.parameters())
        return torch.autograd.grad((result**2).sum(), wanted, allow_unused=True, materialize_grads=True)

    transform = ours(saved)
    for _ in range(4):
        point = torch.randn(2, 3, dtype=torch.float64) if batched else torch.randn(3, dtype=torch.float64)
        expected = gradients(theirs(plain)(point))
        found = gradients(transform(point.requires_grad_(requires_grad)))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_checkpointing_around_a_transform_computes_anew() -> None:
    runs, weight = [0], x().requires_grad_()

    def cubed(p: torch.Tensor) -> torch.Tensor:
        runs[0] += 1
        return chainrule.grad(lambda q: (q**3 * weight).sum())(p)  # type: ignore[no-any-return]

    point = x().requires_grad_()
    for _ in range(2):  # plans are made
        cubed(point)
    runs[0] = 0
    result = torch.utils.checkpoint.checkpoint(cubed, point, use_reentrant=False)
    assert runs[0] == 1
    found = torch.autograd.grad(result.sum(), (point, weight))
    assert runs[0] == 2
    torch.testing.assert_close(found, (6 * point * weight, 3 * point**2))
