"""Products with slopes that are made for them alone (``1 - y²``, ``y (1 - y)``), by the one kernel that torch has for both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from chainrule.calls import REAL
from chainrule.dispatch import undispatched
from chainrule.maps.staging import Instruction, Program, Ref, reads

aten = torch.ops.aten

_PRODUCT = (torch.mul, aten.mul.Tensor._op)
_DIFFERENCE = (torch.sub, aten.sub.Tensor._op)
_ONE_MINUS = (torch.rsub, aten.rsub.Scalar._op)
_SLOPE_CALLS = frozenset({*_PRODUCT, *_DIFFERENCE, *_ONE_MINUS, torch.addcmul})


def with_slope_kernels(
    program: Program,
    kept: list[Instruction],
    wanted: Sequence[int],
    constants: Mapping[int, torch.Tensor],
    touched: Callable[[Instruction], bool],
) -> list[Instruction]:
    """The instructions, with the slopes of ``tanh`` and ``sigmoid`` inside the products that alone read them.

    Args:
        program: the program, for the kinds of its values.
        kept: its instructions.
        wanted: the slots of its results.
        constants: its constants.
        touched: whether an instruction reads or makes memory that is written to.
    """
    if not any(i.function in _PRODUCT for i in kept):
        return kept
    uses = Counter(slot for i in kept for slot in reads(i))
    uses.update(wanted)
    alone = {
        i.outputs[0]: i for i in kept
        if i.function in _SLOPE_CALLS and len(i.outputs) == 1 and uses[i.outputs[0]] == 1 and not touched(i)
    }  # fmt: skip
    gone: set[int] = set()
    found: list[Instruction] = []
    for instruction in kept:
        slots = _operands(instruction) if instruction.function in _PRODUCT else None
        if slots is not None and gone.isdisjoint(instruction.outputs) and not touched(instruction):
            for value, slope in (slots, slots[::-1]):
                kind = program.kinds.get(slope)
                if kind is None or kind[1] not in REAL or program.kinds.get(value) != kind:
                    continue
                kernel, y, made = _slope(alone, slope, constants)
                if kernel is not None and program.kinds.get(y) == kind and gone.isdisjoint(made):
                    gone.update(made)
                    instruction = instruction._replace(function=kernel, args=(Ref(value), Ref(y)))
                    break
        found.append(instruction)
    return [i for i in found if gone.isdisjoint(i.outputs)] if gone else kept


def _slope(
    alone: Mapping[int, Instruction], slot: int, constants: Mapping[int, torch.Tensor]
) -> tuple[Any, int, tuple[int, ...]]:
    """The kernel for products with a slope, the function's value, and the calls (by their results) that are left out."""
    maker = alone.get(slot)
    if maker is None:
        return None, -1, ()
    if maker.function is torch.addcmul:
        if maker.kwargs != {"value": -1} or not all(isinstance(item, Ref) for item in maker.args):
            return None, -1, ()
        base, one, two = (item.slot for item in maker.args)
        if one == two and _is_one(base, constants):
            return aten.tanh_backward.default._op, one, (slot,)
        return None, -1, ()
    slots = _operands(maker) if maker.function in _PRODUCT else None
    for y, rest in (slots, slots[::-1]) if slots is not None else ():
        if (other := alone.get(rest)) is not None and _is_complement(other, y, constants):
            return aten.sigmoid_backward.default._op, y, (slot, rest)
    return None, -1, ()


def _operands(instruction: Instruction) -> tuple[int, int] | None:
    args = instruction.args
    if len(args) != 2 or instruction.kwargs or args[0].__class__ is not Ref or args[1].__class__ is not Ref:
        return None
    return args[0].slot, args[1].slot


def _is_complement(instruction: Instruction, y: int, constants: Mapping[int, torch.Tensor]) -> bool:
    """Whether a call makes ``1 - y``."""
    args = instruction.args
    if instruction.kwargs or len(args) != 2:
        return False
    if instruction.function in _ONE_MINUS:
        return args[0] == Ref(y) and type(args[1]) in (int, float) and args[1] == 1
    if instruction.function in _DIFFERENCE:
        return args[1] == Ref(y) and args[0].__class__ is Ref and _is_one(args[0].slot, constants)
    return False


def _is_one(slot: int, constants: Mapping[int, torch.Tensor]) -> bool:
    value = constants.get(slot)
    if value is None or not value.is_cpu or value.numel() != 1:
        return False
    with undispatched():
        return bool((value == 1).all())


__all__ = ["with_slope_kernels"]
