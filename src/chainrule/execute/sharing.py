"""Equal calls of a program run once: also where they are called by other names, or with their operands exchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from chainrule.calls import FUNCTIONS, REAL, WITH_NUMBERS, fits
from chainrule.dispatch import undispatched
from chainrule.execute.renaming import renamed
from chainrule.maps.staging import Instruction, Program, Ref, freeze

aten = torch.ops.aten

#: Both ways to call each.
TRANSPOSES = (torch.t, aten.t.default._op, torch.transpose, aten.transpose.int._op)
_ALIAS = aten.alias.default._op
_COMMUTING = frozenset({torch.mul, torch.add})

#: What ``matmul`` is, by the numbers of dimensions of its operands.
_PRODUCTS = {(1, 1): torch.dot, (2, 1): torch.mv, (2, 2): torch.mm}

#: Constants of at most this many elements are compared with others.
_SMALL = 16


def share(
    program: Program,
    instructions: Sequence[Instruction],
    own: set[int],
    constants: Mapping[int, torch.Tensor],
    touched: Callable[[Instruction], bool],
) -> list[Instruction]:
    """Run equal calls once, and no call that copies.

    Args:
        program: the program; it is a recorded one.
        instructions: its instructions.
        own: results that must not share their memory.
        constants: those of its constants that nothing writes to.
        touched: whether an instruction reads or makes memory that is written to.
    """
    names, numbers = _equal_constants(constants)
    known: dict[Any, tuple[int, ...]] = {}
    transposed: dict[tuple[int, frozenset[Any]], int] = {}
    kept: list[Instruction] = []
    for instruction in instructions:
        instruction = renamed(instruction, names)
        args, kwargs = instruction.args, instruction.kwargs
        if not own.isdisjoint(instruction.outputs) or instruction.keep or not instruction.outputs or touched(instruction):
            kept.append(instruction)
            continue
        if len(instruction.outputs) == 1 and (source := program.copies.get(instruction.outputs[0])) is not None:
            names[instruction.outputs[0]] = names.get(source, source)
            continue
        if instruction.function is _ALIAS and isinstance(args[0], Ref):
            names[instruction.outputs[0]] = args[0].slot
            continue
        if instruction.function in TRANSPOSES and isinstance(args[0], Ref) and not kwargs:
            # A matrix transposed twice is the matrix.
            dimensions = frozenset(args[1:])
            if (source := transposed.get((args[0].slot, dimensions))) is not None:
                names[instruction.outputs[0]] = source
                continue
            transposed[instruction.outputs[0], dimensions] = args[0].slot
        try:
            key = (*_picture(program, instruction, numbers), tuple((k, freeze(v)) for k, v in sorted(kwargs.items())))
            earlier = known.get(key)
        except TypeError:
            kept.append(instruction)
            continue
        if earlier is None:
            known[key] = instruction.outputs
            kept.append(instruction)
        else:
            names.update(zip(instruction.outputs, earlier, strict=True))
    return kept


def _picture(program: Program, instruction: Instruction, numbers: Mapping[int, tuple[torch.dtype, str]]) -> tuple[Any, Any]:
    """The function and the arguments of a call, the same for calls that compute the same."""
    args = instruction.args
    function: Any = FUNCTIONS.get(instruction.function, instruction.function)
    if len(args) != 2 or instruction.kwargs or args[0].__class__ is not Ref:
        return function, freeze(args)
    one = program.kinds.get(args[0].slot)
    if one is None:
        return function, freeze(args)
    if function in WITH_NUMBERS and one[1] in REAL:
        # A number is the same as a constant of the tensor's dtype.
        if (number := _number(args[1], one[1], numbers)) is not None:
            return (torch.sub, (number, args[0])) if function is torch.rsub else (function, (args[0], number))
        other = program.kinds.get(args[1].slot) if args[1].__class__ is Ref else None
        if function is torch.sub and other is not None and other[1] == one[1]:
            if (number := _number(args[0], one[1], numbers)) is not None:
                return function, (number, args[1])
    if args[1].__class__ is Ref and (two := program.kinds.get(args[1].slot)) is not None:
        if function is torch.matmul:
            function = _PRODUCTS.get((len(one[0]), len(two[0])), function)
        elif function in _COMMUTING and one == two and args[1].slot < args[0].slot:
            args = args[::-1]
    return function, freeze(args)


def _number(item: Any, dtype: torch.dtype, numbers: Mapping[int, tuple[torch.dtype, str]]) -> tuple[str, str] | None:
    """A number, or a constant of a dtype that is one, by its digits; None where an argument is neither."""
    if item.__class__ is Ref:
        known = numbers.get(item.slot)
        return None if known is None or known[0] != dtype else ("number", known[1])
    return ("number", repr(float(item))) if fits(item) else None


def _equal_constants(
    constants: Mapping[int, torch.Tensor],
) -> tuple[dict[int, int], dict[int, tuple[torch.dtype, str]]]:
    """Small constants that are the same to the last bit, by slot, with the first of them; and those that are one number."""
    first: dict[Any, int] = {}
    names: dict[int, int] = {}
    numbers: dict[int, tuple[torch.dtype, str]] = {}
    with undispatched():
        for slot, value in constants.items():
            if value.__class__ is torch.Tensor and value.is_cpu and value.layout is torch.strided and value.numel() <= _SMALL:
                if not (value.requires_grad or value.is_quantized or value._is_zerotensor()):
                    # By their digits: 0.0 and -0.0 are equal, and nan is not.
                    digits = repr(value.tolist())
                    if not value.shape:
                        numbers[slot] = value.dtype, digits
                    found = first.setdefault((value.dtype, value.shape, value.stride(), digits), slot)
                    if found != slot:
                        names[slot] = found
    return names, numbers


__all__ = ["TRANSPOSES", "share"]
