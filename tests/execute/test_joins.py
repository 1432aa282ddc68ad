"""Sums of padded pieces as joins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import chainrule
from chainrule.execute.replay import compile_program
from chainrule.maps.staging import Program, Staged

Tensor = torch.Tensor
DOUBLE = torch.float64


def padded(piece: Any, start: int, size: int, dim: int, call: Callable[..., Any]) -> Any:
    length = piece.shape[dim]
    pads = [0, 0] * (piece.ndim - 1 - dim) + [start, size - start - length]
    return call(torch.constant_pad_nd, piece, pads) if start % 2 else call(F.pad, piece, tuple(pads))


#: Lengths and starts of the pieces of a dimension of 7, the dimension, and whether they are one join.
CASES = {
    "in order": (((3, 0), (2, 3), (2, 5)), 1, True),
    "in reverse order": (((2, 5), (2, 3), (3, 0)), 1, True),
    "the first dimension": (((4, 3), (3, 0)), 0, True),
    "a piece of none": (((3, 0), (0, 3), (4, 3)), 1, True),
    "a gap": (((3, 0), (2, 3)), 1, False),
    "an overlap": (((3, 0), (3, 2), (2, 5)), 1, False),
    "an overlap of all": (((4, 0), (4, 3)), 1, False),
}


@pytest.mark.parametrize("name", CASES)
def test_pieces_of_a_sum(name: str) -> None:
    places, dim, joined = CASES[name]
    program = Program()
    sizes = [[length if d == dim else 2 for d in range(2)] for length, _ in places]

    def build(pieces: list[Any], call: Callable[..., Any]) -> Any:
        made = [padded(piece, start, 7, dim, call) for piece, (_, start) in zip(pieces, places, strict=True)]
        total = made[0]
        for item in made[1:]:
            total = call(torch.add, total, item)
        return total

    values = [torch.randn(size, dtype=DOUBLE) for size in sizes]
    result = build([program.input(number, value) for number, value in enumerate(values)], program.call)
    run: Any = compile_program(program, [result])
    calls = [instruction.function for instruction in run.source_of.kept]
    assert (calls == [torch.cat]) == joined, calls
    for _ in range(2):
        values = [torch.randn(size, dtype=DOUBLE) for size in sizes]
        torch.testing.assert_close(run(values, ())[0], build(values, lambda function, *args: function(*args)))


@pytest.mark.parametrize("other", ["the pad", "the sum between", "twice", "a number", "another size", "another dimension"])
def test_what_is_read_elsewhere_or_is_no_such_sum_stays(other: str) -> None:
    program = Program()
    shape = (2, 2)

    def build(x: Any, y: Any, z: Any, call: Callable[..., Any]) -> list[Any]:
        one, two, three = (padded(item, start, 6, 1, call) for item, start in ((x, 0), (y, 2), (z, 4)))
        if other == "twice":
            return [call(torch.add, one, one)]
        if other == "a number":
            one = call(F.pad, x, (0, 4), "constant", 2.0)
        if other == "another size":
            one = call(F.pad, call(torch.sum, x, (0,), True), (0, 4))
        if other == "another dimension":
            one = call(F.pad, call(torch.cat, [x, x, x], 1), (0, 0, 0, 0))
        between = call(torch.add, one, two)
        results = [call(torch.add, between, three)]
        return results + ([one] if other == "the pad" else [between] if other == "the sum between" else [])

    inputs = [program.input(number, torch.randn(shape, dtype=DOUBLE)) for number in range(3)]
    results: list[Staged] = build(*inputs, program.call)
    run: Any = compile_program(program, results)
    values = [torch.randn(shape, dtype=DOUBLE) for _ in range(3)]
    torch.testing.assert_close([*run(values, ())], build(*values, lambda function, *args: function(*args)))


def test_gradients_of_pieces() -> None:
    """Chunks, splits and slices, below a vmap and in second derivatives too."""

    def function(x: Tensor) -> Tensor:
        one, two, three = x.chunk(3, -1)
        four, five = (one * two.sin()).split([1, x.shape[-1] // 3 - 1], -1)
        return (four.exp() * three[..., :1]).sum() + (five * three[..., 1:]).cos().sum() + (x[..., ::2] * x[..., 1::2]).sum()

    x, batch = torch.randn(2, 6, dtype=DOUBLE), torch.randn(3, 2, 6, dtype=DOUBLE)
    for _ in range(4):
        torch.testing.assert_close(chainrule.grad(function)(x), torch.func.grad(function)(x))
        torch.testing.assert_close(chainrule.vmap(chainrule.grad(function))(batch), torch.func.vmap(torch.func.grad(function))(batch))
        torch.testing.assert_close(chainrule.hessian(function)(x), torch.func.hessian(function)(x))
        joined = x.clone().requires_grad_()
        one, two = (torch.autograd.grad(library.grad(function)(joined).sin().sum(), joined)[0] for library in (chainrule, torch.func))
        torch.testing.assert_close(one, two)
