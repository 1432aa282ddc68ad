"""The cheapest spelling of a call gives the same values as the call."""

from __future__ import annotations

import math

import pytest
import torch

from chainrule.calls import FUNCTIONS
from chainrule.execute.replay import compile_program
from chainrule.execute.spelling import spell
from chainrule.maps.staging import Program

NUMBERS = [0, 1, -2, 0.1, -0.0, 1e-40, 3e38, 1e39, math.inf, -math.inf, math.nan, 2**60, 10**30, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.complex64])
@pytest.mark.parametrize("name", ["mul", "add", "sub", "div", "rsub", "eq", "ne", "gt", "lt", "ge", "le"])
def test_numbers_give_what_numbers_give(name: str, dtype: torch.dtype) -> None:
    function = getattr(torch, name)
    for value in (torch.tensor([0.0, 1.0, -2.5, 7.0, 100.0]).to(dtype), torch.tensor(3.0).to(dtype), torch.zeros(0, 2).to(dtype)):
        for number in NUMBERS:
            try:
                expected = function(value, number)
            except (RuntimeError, OverflowError):
                continue
            program = Program()
            staged = program.call(function, program.input(0, value), number)
            found = compile_program(program, [staged])([value], ())[0]
            assert found.dtype == expected.dtype
            assert found.shape == expected.shape
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
            if found.dtype.is_floating_point:
                assert torch.equal(torch.signbit(found), torch.signbit(expected))


@pytest.mark.parametrize("exponent", [2, 2.0, 3, -1, 0.5, True])
def test_powers(exponent: float) -> None:
    value = torch.tensor([-1.5, 0.0, 2.0, math.inf, math.nan])
    program = Program()
    staged = program.call(torch.pow, program.input(0, value), exponent)
    found = compile_program(program, [staged])([value], ())[0]
    torch.testing.assert_close(found, torch.pow(value, exponent), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int32, torch.complex64])
@pytest.mark.parametrize("first", [False, True])
def test_choices_beside_numbers(dtype: torch.dtype, first: bool) -> None:
    """A number in a choice is a constant of the other's dtype, if that is what torch makes of it."""
    mask = torch.tensor([[True], [False]])
    for value in (torch.tensor([0.0, 1.0, -2.5, 7.0]).to(dtype), torch.tensor(3.0).to(dtype), torch.zeros(0).to(dtype)):
        for number in NUMBERS:
            pair = (number, value) if first else (value, number)
            try:
                expected = torch.where(mask, *pair)
            except (RuntimeError, OverflowError):
                continue
            program = Program()
            given = program.input(0, value)
            staged = program.call(torch.where, program.input(1, mask), *((number, given) if first else (given, number)))
            found = compile_program(program, [staged])([value, mask], ())[0]
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
            if found.dtype.is_floating_point:
                assert torch.equal(torch.signbit(found), torch.signbit(expected))


@pytest.mark.parametrize("size", [5, 5000])
@pytest.mark.parametrize("inverse", [False, True])
def test_masks_that_few_numbers_pass(size: int, inverse: bool) -> None:
    """They choose as they are; many numbers are let pass by a mask of numbers, whose kernel is faster."""
    mask = torch.rand(size) > 0.5
    value = torch.randn(size)
    value[:4] = torch.tensor([math.inf, -math.inf, math.nan, -0.0])
    program = Program()
    passing = program.input(1, mask)
    passing = torch.logical_not(passing) if inverse else passing
    staged = program.call(torch.ops.aten.threshold_backward.default, program.input(0, value), passing.to(torch.float32), 0)
    run = compile_program(program, [staged])
    expected = torch.where(~mask if inverse else mask, value, 0.0)
    torch.testing.assert_close(run([value, mask], ())[0], expected, rtol=0, atol=0, equal_nan=True)
    used = {getattr(item, "__name__", "") for name, item in run.__globals__.items() if name[0] == "f"}
    assert ("where" in used, "to" in used) == (size == 5, size != 5)


def test_one_constant_for_equal_numbers() -> None:
    program = Program()
    x = program.input(0, torch.randn(3))
    y = (x * 0.5 + 0.5) * -0.0 + 0.0
    made = spell(program, program.instructions)[1]
    assert y.shape == (3,)
    assert sorted(str(t.item()) for t in made.values()) == ["-0.0", "0.0", "0.5"]


@pytest.mark.parametrize("function", sorted(FUNCTIONS.values(), key=lambda f: f.__name__), ids=lambda f: f.__name__)
def test_the_table_has_functions_of_the_op_s_name(function: object) -> None:
    names = {str(op) for op, f in FUNCTIONS.items() if f is function}
    assert names
    for op in torch.ops.aten.__dict__.values():
        for overload in getattr(op, "overloads", list)():
            found = FUNCTIONS.get(getattr(op, overload)._op)
            if found is function:
                assert op.__name__ == function.__name__  # type: ignore[attr-defined]
