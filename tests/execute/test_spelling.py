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
