"""Programs in their cheapest spelling (see :mod:`chainrule.calls`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from chainrule.calls import FUNCTIONS, REAL, WITH_NUMBERS, fits, number_constant
from chainrule.maps.staging import Instruction, Program, Ref

aten = torch.ops.aten


def spell(program: Program, kept: Sequence[Instruction]) -> tuple[list[Instruction], dict[int, torch.Tensor]]:
    """The same instructions in their cheapest form, and the constants that they need.

    Args:
        program: the program they belong to.
        kept: the instructions.
    """
    made: dict[int, torch.Tensor] = {}
    numbers: dict[tuple[torch.dtype, str], int] = {}

    def constant(number: float, dtype: torch.dtype) -> int:
        # By its digits: 0.0 and -0.0 are equal, and nan is not.
        key = (dtype, repr(float(number)))
        slot = numbers.get(key)
        if slot is None:
            slot = numbers[key] = program.new_slot()
            made[slot] = number_constant(number, dtype)
        return slot

    spelled = []
    for instruction in kept:
        function = FUNCTIONS.get(getattr(instruction.function, "_op", instruction.function))
        if function is not None:
            instruction = instruction._replace(function=function)
        if instruction.function in WITH_NUMBERS and not instruction.kwargs and len(instruction.args) == 2:
            instruction = _without_number(program, instruction, constant)
        elif instruction.function is aten.slice.Tensor._op:
            instruction = _narrowed(program, instruction)
        elif instruction.function is torch.pow and len(instruction.args) == 2 and not instruction.kwargs:
            instruction = _without_power(program, instruction)
        spelled.append(instruction)
    return spelled, made


def _without_number(
    program: Program, instruction: Instruction, constant: Callable[[float, torch.dtype], int]
) -> Instruction:
    tensor, number = instruction.args
    if not isinstance(tensor, Ref) or not fits(number):
        return instruction
    kind = program.kinds.get(tensor.slot)
    if kind is None or kind[1] not in REAL:
        return instruction
    if instruction.function is torch.rsub:
        return instruction._replace(function=torch.sub, args=(Ref(constant(number, kind[1])), tensor))
    return instruction._replace(args=(tensor, Ref(constant(number, kind[1]))))


def _without_power(program: Program, instruction: Instruction) -> Instruction:
    base, exponent = instruction.args
    if type(exponent) not in (int, float) or exponent != 2 or not isinstance(base, Ref):
        return instruction
    kind = program.kinds.get(base.slot)
    if kind is None or kind[1] not in REAL:
        return instruction
    return instruction._replace(function=torch.mul, args=(base, base))


def _narrowed(program: Program, instruction: Instruction) -> Instruction:
    """A slice of consecutive places, whose shapes are known, in torch's cheaper spelling."""
    defaults: tuple[Any, ...] = (None, 0, None, None, 1)
    tensor, dim, start, _, step = instruction.args + defaults[len(instruction.args) :]
    before, after = program.kinds.get(tensor.slot), program.kinds.get(instruction.outputs[0])
    if instruction.kwargs or step != 1 or before is None or after is None or not all(type(n) is int for n in (dim, start or 0)):
        return instruction
    size = before[0][dim]
    start = min(max((start or 0) + (size if (start or 0) < 0 else 0), 0), size)
    return instruction._replace(function=torch.narrow, args=(tensor, dim, start, after[0][dim]))
