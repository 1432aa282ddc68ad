"""Steps under ``torch.no_grad()`` where forward and reverse transforms are nested, against torch.func."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import chainrule

Tensor = torch.Tensor
D = torch.float64


def one_step(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x.sin()
    return x * y


def two_steps(x: Tensor) -> Tensor:
    a = x * x
    with torch.no_grad():
        b = a.sin() * x
    c = b * a.exp()
    with torch.no_grad():
        d = c * x
        d.add_(x)
    return d * x + c


def all_hidden(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.cos() * x


def written(x: Tensor) -> Tensor:
    with torch.no_grad():
        z = x.clone()
        z[0] = x[1] * 2
    return torch.cat([z * x, x.outer(x) @ z])


FUNCTIONS = (one_step, two_steps, all_hidden, written)


def _linearized(m: Any, f: Any, x: Tensor) -> Any:
    # torch.func's linearize traces, which loses the state of gradients.
    return m.linearize(f, x)[1](3 * x) if m is chainrule else m.jvp(f, (x,), (3 * x,))[1]


LEVELS: dict[str, Any] = {
    "grad": lambda m, f: m.grad(lambda x: f(x).sum()),
    "jacrev": lambda m, f: lambda x: m.jacrev(f)(x).sum(0),
    "jvp": lambda m, f: lambda x: m.jvp(f, (x,), (2 * x,))[1],
    "value of jvp": lambda m, f: lambda x: m.jvp(f, (x,), (x.cos(),))[0],
    "linearize": lambda m, f: lambda x: _linearized(m, f, x),
    "jacfwd": lambda m, f: lambda x: m.jacfwd(f)(x).sum(0),
    "hessian": lambda m, f: lambda x: m.hessian(lambda y: f(y).sum())(x).sum(0),
    "vmap": lambda m, f: lambda x: m.vmap(f)(torch.stack([x, x.sin()])).sum(0),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("nest", [*itertools.product(LEVELS, repeat=2), ("jvp", "grad", "jvp"), ("grad", "jvp", "grad")])
def test_as_in_torch_func(nest: tuple[str, ...], function: Any) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        x = torch.randn(3, dtype=D)
        expected, found = function, function
        for name in nest:
            expected, found = LEVELS[name](torch.func, expected), LEVELS[name](chainrule, found)
        torch.testing.assert_close(found(x), expected(x))


def test_what_cannot_be_done_is_refused() -> None:
    x = torch.ones(3, dtype=D)
    for inner in (
        lambda x: chainrule.jacfwd(one_step, layout="sparse_coo")(x).to_dense(),
        lambda x: chainrule.jacfwd(one_step, layout="operator")(x) @ x,
        lambda x: chainrule.jet(one_step, (x,), ([x, x],))[1][1],
    ):
        inner(x)
        with pytest.raises(RuntimeError, match="no_grad"):
            chainrule.grad(lambda x: inner(x).sum())(x)  # noqa: B023 - called in this turn


def _by_view(y: Tensor, x: Tensor) -> None:
    y[0].mul_(2)
    y[1:].add_(x[:-1])


def _twice(y: Tensor, x: Tensor) -> None:
    y.mul_(x)
    y.add_(y.sin())


WRITES = {
    "mul_ by a number": lambda y, x: y.mul_(2),
    "mul_": lambda y, x: y.mul_(x),
    "sin_": lambda y, x: y.sin_(),
    "copy_": lambda y, x: y.copy_(2 * x),
    "zero_": lambda y, x: y.zero_(),
    "set": lambda y, x: y.__setitem__(0, x[1]),
    "set to a number": lambda y, x: y.__setitem__(0, 3.0),
    "views": _by_view,
    "twice": _twice,
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("nest", [("jvp", "grad"), ("jacfwd", "jacrev"), ("grad", "jvp"), ("jvp", "jvp", "grad"), ("jvp", "grad", "jvp")])
def test_writes_change_what_a_tangent_holds_and_not_its_derivative(nest: tuple[str, ...], write: str) -> None:
    def function(x: Tensor) -> Tensor:
        y = x * x
        part = y[:2]
        with torch.no_grad():
            WRITES[write](y, x)
        return y * y * y + part.sum() * y

    for seed in range(2):
        torch.manual_seed(seed)
        x = torch.randn(3, dtype=D)
        expected, found = function, function
        for name in nest:
            expected, found = LEVELS[name](torch.func, expected), LEVELS[name](chainrule, found)
        for _ in range(2):
            torch.testing.assert_close(found(x), expected(x))


def test_a_written_square_in_closed_form() -> None:
    x = torch.tensor([0.5, 2.0], dtype=D)

    def cubes(x: Tensor) -> Tensor:
        y = x * x
        with torch.no_grad():
            y.mul_(2)
        return (y**3).sum()

    # Along ones the tangent is 3 (2 x^2)^2 * 4 x; the reverse mode takes dy = 2 x dx and dt = 2 dx for y and its tangent t = 4 x.
    found = chainrule.grad(lambda z: chainrule.jvp(cubes, (z,), (torch.ones_like(z),))[1])(x)
    torch.testing.assert_close(found, 120 * x**4)
