"""Thin products with large matrices are computed with their rows filled up to whole blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import chainrule
from chainrule.execute import engine, replay
from chainrule.execute.products import FilledRows
from chainrule.execute.replay import compile_program
from chainrule.execute.row_blocks import with_filled_rows
from chainrule.maps.staging import Program

Tensor = torch.Tensor
DOUBLE = torch.float64


def filled(build: Callable[..., Any], *values: Tensor) -> tuple[Program, Any, list[Any]]:
    """A program that ``build`` makes of some inputs, its result, and the products in it whose rows are filled up."""
    program = Program()
    made = build(*[program.input(number, value) for number, value in enumerate(values)])
    found = with_filled_rows(program, program.instructions, [made.slot]) or []
    return program, made, [i.function for i in found if i.function.__class__ is FilledRows]



MATRIX = torch.randn(300, 260, dtype=DOUBLE)
ROWS = torch.randn(50, 300, dtype=DOUBLE)
SLOPES = torch.randn(300, dtype=DOUBLE)


@pytest.mark.parametrize(
    "build",
    [
        lambda x, s, w: torch.sum(torch.mm(torch.mul(x, s), w), (0,)),
        lambda x, s, w: torch.sum(torch.mm(torch.mul(torch.t(x), torch.unsqueeze(s, 1)).t(), w), (0,)),
        lambda x, s, w: torch.sum(
            torch.mm(
                torch.reshape(
                    torch.transpose(
                        torch.mul(torch.transpose(torch.reshape(x, [2, 25, 300]), 1, 2), torch.unsqueeze(s, 1)), 1, 2
                    ),
                    [50, 300],
                ),
                w,
            ),
            (0,),
        ),
        lambda x, s, w: torch.sum(torch.mm(torch.addcmul(x, x, s), w), (0,)),
        lambda x, s, w: torch.sum(torch.mm(torch.reshape(torch.permute(torch.mul(x, s), (0, 1)), [50, 300]), w), (0,)),
        lambda x, s, w: torch.sum(torch.mm(x, w), (0,)),
        lambda x, s, w: torch.sum(torch.mul(torch.mm(torch.mul(x, s), w), torch.mm(torch.mul(x, s), w)), (0,)),
        lambda x, s, w: torch.sum(torch.mm(torch.cat([torch.mul(x, s)]), w), (0,)),
    ],
    ids=["rows", "columns", "views", "added", "permuted", "given", "twice", "other"],
)
def test_thin_products_are_filled_up(build: Callable[..., Any]) -> None:
    program, made, found = filled(build, ROWS, SLOPES, MATRIX)
    assert found and all(product.whole == 52 for product in found)
    runner = compile_program(program, [made])
    for scale in (1.0, 2.0):
        values = (ROWS * scale, SLOPES, MATRIX)
        torch.testing.assert_close(runner.plain(values, ())[0], build(*values), rtol=1e-12, atol=1e-11)
        torch.testing.assert_close(runner(values, ())[0], build(*values), rtol=1e-12, atol=1e-11)


def test_what_a_product_is_made_of_may_be_read_elsewhere() -> None:
    def build(x: Any, s: Any, w: Any) -> Any:
        scaled = torch.mul(x, s)
        return torch.add(torch.sum(torch.mm(scaled, w), (1,)), torch.sum(scaled, (1,)))

    program, made, found = filled(build, ROWS, SLOPES, MATRIX)
    assert [product.function for product in found] == [None]
    plain = compile_program(program, [made]).plain
    torch.testing.assert_close(plain((ROWS, SLOPES, MATRIX), ())[0], build(ROWS, SLOPES, MATRIX), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(
    ("build", "rows", "matrix"),
    [
        (lambda x, w: torch.mm(x, w), 50, MATRIX),
        (lambda x, w: torch.reshape(torch.mm(x, w), [13000]), 50, MATRIX),
        (lambda x, w: torch.sum(torch.mm(x, w), (0,)), 52, MATRIX),
        (lambda x, w: torch.sum(torch.mm(x, w), (0,)), 49, MATRIX),
        (lambda x, w: torch.sum(torch.mm(x, w), (0,)), 3, MATRIX),
        (lambda x, w: torch.sum(torch.mm(x, w), (0,)), 150, MATRIX),
        (lambda x, w: torch.sum(torch.mm(x, w), (0,)), 50, MATRIX.float()),
        (lambda x, w: torch.sum(torch.mm(x, w), (0,)), 50, MATRIX[:, :100]),
    ],
    ids=["a result", "a view of it", "whole blocks", "one row", "one block", "many rows", "single precision", "a small matrix"],
)
def test_others_stay(build: Callable[..., Any], rows: int, matrix: Tensor) -> None:
    assert not filled(build, torch.randn(rows, 300, dtype=matrix.dtype), matrix)[2]


def test_infinite_weights_stay_in_their_places() -> None:
    def build(x: Any, s: Any, w: Any) -> Any:
        return torch.sum(torch.mm(torch.mul(x, s), w), (0,))

    matrix = MATRIX.clone()
    matrix[3, 4], matrix[7, 8] = torch.inf, torch.nan
    program, made, found = filled(build, ROWS.abs(), SLOPES.abs(), matrix)
    assert found
    values = (ROWS.abs(), SLOPES.abs(), matrix)
    result = compile_program(program, [made]).plain(values, ())[0]
    torch.testing.assert_close(result, build(*values), rtol=1e-12, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("inputs", [7, 50])
def test_laplacians_of_networks_agree_with_torch(inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = 0
    original = replay.with_filled_rows

    def counted(*args: Any) -> Any:
        nonlocal changed
        found = original(*args)
        changed += found is not None
        return found

    monkeypatch.setattr(replay, "with_filled_rows", counted)
    engine.CACHE.clear()
    sizes = ((280, inputs), (270, 280), (260, 270), (1, 260))
    weights = [torch.randn(*size, dtype=DOUBLE) / size[1] ** 0.5 for size in sizes]

    def net(x: Tensor, *weights: Tensor) -> Tensor:
        for weight in weights[:-1]:
            x = torch.tanh(x @ weight.T)
        return (x @ weights[-1].T).squeeze(-1)

    function = chainrule.vmap(chainrule.laplacian(net), (0, *[None] * 4))
    compiled = chainrule.compile(function)
    for _ in range(4):
        x = torch.randn(1, inputs, dtype=DOUBLE)
        expected = torch.func.hessian(lambda x: net(x, *weights))(x[0]).trace()[None]
        torch.testing.assert_close(function(x, *weights), expected)
        torch.testing.assert_close(compiled(x, *weights), expected)
        torch.testing.assert_close(chainrule.laplacian(net)(x, *weights), expected)
        followed = [weight.clone().requires_grad_() for weight in weights]
        (gradient,) = torch.autograd.grad(function(x, *followed).sum(), followed[1:2])
        wanted = torch.func.grad(lambda w: torch.func.hessian(lambda x: net(x, weights[0], w, *weights[2:]))(x[0]).trace())(weights[1])
        torch.testing.assert_close(gradient, wanted)
    assert changed
