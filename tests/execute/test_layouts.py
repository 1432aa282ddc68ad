"""Transposed products that meet matrices by rows are made by rows; others stay as they are planned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import chainrule
from chainrule.execute import engine, simplify
from chainrule.execute.layouts import with_even_layouts
from chainrule.maps.staging import Program

Tensor = torch.Tensor
DOUBLE = torch.float64


def even(build: Callable[..., Any], *values: Tensor) -> tuple[Program, list[Any] | None]:
    """What becomes of a program that ``build`` makes of some inputs."""
    program = Program()
    made = build(*[program.input(number, value) for number, value in enumerate(values)])
    found = with_even_layouts(program, program.instructions, {made.slot}, lambda instruction: False)
    return program, found


def turned(x: Any, y: Any) -> Any:
    return torch.t(torch.mm(torch.t(y), torch.t(x)))


X, Y, Z = torch.randn(40, 7, dtype=DOUBLE), torch.randn(7, 20, dtype=DOUBLE), torch.randn(40, 20, dtype=DOUBLE)


def run(program: Program, instructions: list[Any], values: dict[int, Tensor]) -> dict[int, Tensor]:
    """The values of all instructions."""
    given = {program.inputs[key]: value for key, value in values.items()}
    for function, args, kwargs, outputs, *_ in instructions:
        given[outputs[0]] = function(*[given[a.slot] if hasattr(a, "slot") else a for a in args], **kwargs)
    return given


@pytest.mark.parametrize(
    "build",
    [
        lambda x, y, z: torch.mul(turned(x, y), z) + 1.0,
        lambda x, y, z: torch.add(torch.exp(turned(x, y)), torch.mul(z, z)),
        lambda x, y, z: torch.mul(torch.mul(turned(x, y), turned(x, torch.mul(y, y))), z),
        lambda x, y, z: torch.mm(torch.mul(turned(x, y), z), torch.t(y)),
    ],
)
def test_products_beside_rows_are_by_rows(build: Callable[..., Any]) -> None:
    program, found = even(build, X, Y, Z)
    assert found is not None
    values = run(program, found, dict(enumerate((X, Y, Z))))
    products = [values[i.outputs[0]] for i in found if i.function is torch.mm and values[i.outputs[0]].shape == (40, 20)]
    assert products and all(p.is_contiguous() for p in products)
    torch.testing.assert_close(values[found[-1].outputs[0]], build(X, Y, Z))


@pytest.mark.parametrize(
    "build",
    [
        lambda x, y, z: torch.exp(turned(x, y)),
        lambda x, y, z: turned(x, y),
        lambda x, y, z: torch.mul(turned(x, y), torch.t(torch.t(torch.mul(z, 1.0)).contiguous())),
        lambda x, y, z: torch.mul(turned(x, torch.narrow(y, 1, 0, 8)), torch.narrow(z, 1, 0, 8)),
        lambda x, y, z: torch.mul(turned(x, y), torch.narrow(z, 0, 0, 1)),
    ],
    ids=["alone", "a result", "by columns", "narrow", "a row"],
)
def test_others_stay(build: Callable[..., Any]) -> None:
    assert even(build, X, Y, Z)[1] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_networks_agree_with_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = 0
    original = simplify.with_even_layouts

    def counted(*args: Any) -> Any:
        nonlocal changed
        found = original(*args)
        changed += found is not None
        return found

    monkeypatch.setattr(simplify, "with_even_layouts", counted)
    engine.CACHE.clear()
    one, two, three = (torch.randn(*shape, dtype=dtype) for shape in ((50, 20), (40, 50), (1, 40)))
    x = torch.randn(200, 20, dtype=dtype)

    def net(one: Tensor, two: Tensor) -> Tensor:
        return (torch.relu(torch.tanh(x @ one.T) @ two.T) @ three.T).square()

    tangents = (torch.randn_like(one), torch.randn_like(two))
    # Sums of some thousand products, in another order.
    close = {"rtol": 1e-3, "atol": 1e-2} if dtype is torch.float32 else {"rtol": 1e-9, "atol": 1e-8}
    for _ in range(4):
        found = chainrule.grad(lambda *w: net(*w).sum(), (0, 1))(one, two)
        torch.testing.assert_close(found, torch.func.grad(lambda *w: net(*w).sum(), (0, 1))(one, two), **close)
        found = chainrule.jvp(net, (one, two), tangents)[1]
        torch.testing.assert_close(found, torch.func.jvp(net, (one, two), tangents)[1], **close)
        found = chainrule.jvp(chainrule.grad(lambda w: net(w, two).sum()), (one,), tangents[:1])[1]
        torch.testing.assert_close(found, torch.func.jvp(torch.func.grad(lambda w: net(w, two).sum()), (one,), tangents[:1])[1], **close)
    assert changed
