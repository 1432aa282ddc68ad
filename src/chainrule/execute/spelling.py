"""Programs in their cheapest spelling (see :mod:`chainrule.calls`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from chainrule.calls import FUNCTIONS, REAL, WITH_NUMBERS, fits, number_constant
from chainrule.maps.staging import Instruction, Program, Ref

aten = torch.ops.aten

#: What makes a mask one of numbers.
_CONVERSIONS = frozenset({torch.Tensor.to})

#: Lets pass what a mask of numbers keeps. Up to so many elements a choice costs no more than that, and needs no such mask.
_SELECTS = aten.threshold_backward.default._op
_FEW = 1024


def spell(program: Program, kept: Sequence[Instruction]) -> tuple[list[Instruction], dict[int, torch.Tensor]]:
    """The same instructions in their cheapest form, and the constants that they need.

    Args:
        program: the program they belong to.
        kept: the instructions.
    """
    made: dict[int, torch.Tensor] = {}
    numbers: dict[tuple[torch.dtype, torch.device | str, str], int] = {}

    def constant(number: float, dtype: torch.dtype, device: torch.device | str = "cpu") -> int:
        # By its digits: 0.0 and -0.0 are equal, and nan is not.
        key = (dtype, device if str(device) != "cpu" else "cpu", repr(float(number)))
        slot = numbers.get(key)
        if slot is None:
            slot = numbers[key] = program.new_slot()
            made[slot] = number_constant(number, dtype, device)
        return slot

    spelled = []
    for instruction in _with_masks(program, kept):
        function = FUNCTIONS.get(getattr(instruction.function, "_op", instruction.function))
        if function is not None:
            instruction = instruction._replace(function=function)
        if instruction.function in WITH_NUMBERS and not instruction.kwargs and len(instruction.args) == 2:
            instruction = _without_number(program, instruction, constant)
        elif instruction.function is torch.where and not instruction.kwargs and len(instruction.args) == 3:
            instruction = _between_tensors(program, instruction, constant)
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


def _with_masks(program: Program, kept: Sequence[Instruction]) -> Sequence[Instruction]:
    """The same, with choices by a mask where few numbers would be let pass by the mask as numbers, which it is made for that."""
    if program.writes:
        return kept
    masks: dict[int, Ref] = {}
    for instruction in kept:
        mask = instruction.args[0] if instruction.function in _CONVERSIONS and len(instruction.args) == 2 else None
        kind = program.kinds.get(mask.slot) if isinstance(mask, Ref) else None
        if kind is not None and kind[1] is torch.bool and not instruction.kwargs and isinstance(mask, Ref):
            masks[instruction.outputs[0]] = mask
    if not masks:
        return kept
    inverse = {i.outputs[0]: i.args[0] for i in kept if i.function is torch.logical_not and isinstance(i.args[0], Ref)}
    found: list[Instruction] = []
    for instruction in kept:
        args = instruction.args
        if getattr(instruction.function, "_op", instruction.function) is _SELECTS and not instruction.kwargs and args[2] == 0:
            mask, kind = masks.get(getattr(args[1], "slot", -1)), program.kinds.get(instruction.outputs[0])
            if mask is not None and kind is not None and kind[0].numel() <= _FEW and kind[1] in REAL:
                other = inverse.get(mask.slot)
                kind = None if other is None else program.kinds.get(other.slot)
                if other is not None and kind is not None and kind[1] is torch.bool:
                    instruction = instruction._replace(function=torch.where, args=(other, 0.0, args[0]))
                else:
                    instruction = instruction._replace(function=torch.where, args=(mask, args[0], 0.0))
        found.append(instruction)
    return found


def _between_tensors(program: Program, instruction: Instruction, constant: Callable[..., int]) -> Instruction:
    """A choice between a tensor and a number as one between tensors, where torch would make the number a tensor in every call."""
    mask, *choices = instruction.args
    tensors = [item for item in choices if isinstance(item, Ref)]
    kind = program.kinds.get(tensors[0].slot) if len(tensors) == 1 else None
    if kind is None or kind[1] not in REAL or not all(isinstance(item, Ref) or fits(item) for item in choices):
        return instruction
    return instruction._replace(
        args=(mask, *[item if isinstance(item, Ref) else Ref(constant(item, kind[1], kind[2])) for item in choices])
    )


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
