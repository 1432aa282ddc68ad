"""Derivatives that do not depend on the point are part of the graph of inputs that require grad, in every transform and call.

The gradients through them are those of torch.func, zeros where it has none.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import chainrule

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "hardtanh": F.hardtanh,
    "threshold": lambda x: F.threshold(x, 0.0, 1.0),
    "softshrink": F.softshrink,
    "power of one": lambda x: x**1,
    "times zero": lambda x: x**2 * 0.0 + x,
    "lerp": lambda x: torch.lerp(x, x**2, 0.0),
    "add": lambda x: torch.add(x, x.sin(), alpha=0.0),
    "addmm": lambda x: torch.addmm(x.reshape(2, 2), x.reshape(2, 2) ** 2, x.reshape(2, 2), alpha=0.0),
    "linear": lambda x: 2 * x,
    "constant": lambda x: torch.ones(3, dtype=torch.float64),
    "sine": torch.sin,
}


def _ones(x: Tensor) -> Tensor:
    return torch.ones_like(x).detach()


def _of_vector(library: Any, f: Callable[[Tensor], Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    def total(x: Tensor) -> Tensor:
        return f(x).sum()

    return {
        "jacrev": library.jacrev(f),
        "jacfwd": library.jacfwd(f),
        "hessian": library.hessian(f),
        "grad": library.grad(total),
        "grad_and_value": lambda x: library.grad_and_value(total)(x)[0],
        "of a tree": lambda x: library.grad(lambda tree: total(tree["x"]) + tree["y"].sum())({"x": x, "y": _ones(x)})["x"],
        "vjp": lambda x: library.vjp(f, x)[1](_ones(f(x)))[0],
        "jvp": lambda x: library.jvp(f, (x,), (_ones(x),))[1],
        "linearize": lambda x: library.linearize(f, x)[1](_ones(x)),
        "nest": library.jacrev(library.grad(total)),
    }


def _of_samples(library: Any, f: Callable[[Tensor], Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    def total(x: Tensor) -> Tensor:
        return f(x).sum()

    return {
        "vmap of grad": library.vmap(library.grad(total)),
        "vmap of a function with grad": library.vmap(lambda row: library.grad(total)(row)),
        "vmap of jacrev": library.vmap(library.jacrev(f)),
        "vmap of jvp": library.vmap(lambda row: library.jvp(f, (row,), (torch.ones(4, dtype=row.dtype),))[1]),
        "vmap of grad_and_value": lambda x: library.vmap(library.grad_and_value(total))(x)[0],
        "two vmaps": lambda x: library.vmap(library.vmap(library.grad(total)))(x[None]),
        "another dimension": library.vmap(library.grad(total), out_dims=1),
        "vmap of hessian": library.vmap(library.hessian(total)),
        "chunks": library.vmap(library.grad(total), chunk_size=1),
    }


def _check(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor] | None, shape: tuple[int, ...]) -> None:
    for _ in range(4):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        found = ours(x)
        assert found.requires_grad
        (gradient,) = torch.autograd.grad(found.square().sum(), x)
        if theirs is not None:
            wanted = theirs(x)
            torch.testing.assert_close(found, wanted)
            if wanted.requires_grad:
                torch.testing.assert_close(gradient, torch.autograd.grad(wanted.square().sum(), x)[0])
            else:
                assert not gradient.any()
        with torch.no_grad():
            assert not ours(x).requires_grad
        assert not ours(x.detach()).requires_grad


@pytest.mark.parametrize("transform", [*_of_vector(torch.func, torch.sin)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_of_a_vector(name: str, transform: str) -> None:
    theirs = None if transform == "linearize" else _of_vector(torch.func, FUNCTIONS[name])[transform]
    _check(_of_vector(chainrule, FUNCTIONS[name])[transform], theirs, (4,))


@pytest.mark.parametrize("transform", [*_of_samples(torch.func, torch.sin)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_of_samples(name: str, transform: str) -> None:
    _check(_of_samples(chainrule, FUNCTIONS[name])[transform], _of_samples(torch.func, FUNCTIONS[name])[transform], (3, 4))


OWN: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]] = {
    "jacobian": chainrule.jacobian,
    "in chunks": lambda f: chainrule.jacobian(f, chunk_size=1),
    "laplacian": lambda f: chainrule.laplacian(lambda x: f(x).sum()),
    "hessian_diagonal": lambda f: chainrule.hessian_diagonal(lambda x: f(x).sum()),
    "divergence": lambda f: chainrule.divergence(lambda x: f(x).sum() * torch.ones(4, dtype=x.dtype)),
    "ntk": chainrule.ntk,
    "hvp": lambda f: lambda x: chainrule.hvp(lambda x: f(x).sum(), (x,), (_ones(x),)),
    "vhp": lambda f: lambda x: chainrule.vhp(lambda x: f(x).sum(), (x,), (_ones(x),)),
    "ggn": lambda f: lambda x: chainrule.ggn(f, lambda y: y.sum(), (x,), (_ones(x),)),
    "jet": lambda f: lambda x: chainrule.jet(f, (x,), ([_ones(x), _ones(x)],))[1][1],
    "value beside": lambda f: lambda x: chainrule.laplacian(lambda x: f(x).sum(), return_value=True)(x)[0],
    "compiled gradient": lambda f: chainrule.compile(chainrule.grad(lambda x: f(x).sum())),
    "compiled jacobian": lambda f: chainrule.compile(chainrule.jacobian(f)),
    "per sample": lambda f: lambda x: chainrule.laplacian(lambda x: f(x).sum(), in_dims=0)(x.expand(3, 4)),
}


@pytest.mark.parametrize("transform", OWN)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_of_own_transforms(name: str, transform: str) -> None:
    _check(OWN[transform](FUNCTIONS[name]), None, (4,))


def test_a_penalty_on_the_gradient_of_a_frozen_critic() -> None:
    critic = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 1)).double().requires_grad_(False)
    for _ in range(4):
        x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        slopes = chainrule.vmap(chainrule.grad(lambda row: critic(row).sum()))(x)
        torch.testing.assert_close(slopes, torch.func.vmap(torch.func.grad(lambda row: critic(row).sum()))(x))
        (slopes.norm(dim=1) - 1).square().mean().backward()
        assert x.grad is not None and not x.grad.any()


def test_results_may_be_written() -> None:
    x = torch.randn(4, requires_grad=True)
    found = chainrule.grad(lambda x: x.relu().sum())(x)
    found.mul_(2.0)
    (found * x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2.0 * (x > 0))


def test_only_what_is_differentiated_joins() -> None:
    x, y = torch.randn(4), torch.randn(4, requires_grad=True)
    assert not chainrule.grad(lambda x, y: (x.relu() + y).sum())(x, y).requires_grad
    assert chainrule.grad(lambda x, y: (x + y.relu()).sum(), argnums=(1,))(x, y)[0].requires_grad
    assert not chainrule.jacobian(lambda x: chainrule.grad(lambda y: (x * y.relu()).sum())(x.detach()))(x).requires_grad
