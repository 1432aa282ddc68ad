"""Products that are made where they are to stand: straight into their part of a larger result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from chainrule.maps.assembly import MAKERS, Assembly, Write, assembled
from chainrule.maps.staging import Instruction, Program, Ref, reads

#: Products of fewer elements than this are as well copied.
_SMALLEST = 1 << 12

_NAMES = {function: name for name, function in MAKERS.items()}


def with_destinations(program: Program, kept: list[Instruction], wanted: Sequence[int]) -> list[Instruction]:
    """The instructions, products that are only read to be written to a part of an array being made there.

    Args:
        program: the program.
        kept: its instructions.
        wanted: the slots of its results.
    """
    if program.writes or not any(instruction.function is assembled for instruction in kept):
        return kept
    uses = Counter(slot for instruction in kept for slot in reads(instruction))
    uses.update(wanted)
    producers = {slot: i for i in kept for slot in i.outputs}
    found: list[Instruction] = []
    for instruction in kept:
        if instruction.function is assembled:
            instruction = _made_in_place(program, instruction, producers, uses)
        found.append(instruction)
    needed, left = set(wanted), list[Instruction]()
    for instruction in reversed(found):
        if instruction.keep or not needed.isdisjoint(instruction.outputs):
            needed.update(reads(instruction))
            left.append(instruction)
    return left[::-1]


def _made_in_place(
    program: Program, instruction: Instruction, producers: dict[int, Instruction], uses: Counter[int]
) -> Instruction:
    plan: Assembly = instruction.args[0]
    writes: list[Write] = []
    operands: list[Ref] = []
    for write, item in zip(plan.writes, instruction.args[2:], strict=True):
        product, order = _product(program, item.slot, producers, uses) if not write.call else (None, ())
        kinds = [program.kinds.get(slot) for slot in (item.slot, *(reads(product) if product is not None else ()))]
        fits = product is not None and all(kind is not None and kind[1] is plan.dtype for kind in kinds)
        # A value that is spread over its part is made once and copied.
        if product is None or not fits or not _covers(tuple(kinds[0][0]), write.layout.shape()):  # type: ignore[index]
            writes.append(write)
            operands.append(item)
            continue
        writes.append(replace(write, call=_NAMES[product.function], order=order))
        operands.extend(product.args)
    return instruction._replace(args=(replace(plan, writes=tuple(writes)), instruction.args[1], *operands))


def _covers(shape: tuple[int, ...], part: tuple[int, ...]) -> bool:
    """Whether a value has the shape of a part, which may have dimensions of one place in front."""
    front = len(part) - len(shape)
    return front >= 0 and part[front:] == shape and all([size == 1 for size in part[:front]])


def _product(
    program: Program, slot: int, producers: dict[int, Instruction], uses: Counter[int]
) -> tuple[Instruction | None, tuple[int, ...]]:
    """The product that a value is, if nobody else reads it, and the order of its dimensions in the value (empty: as they are)."""
    order: tuple[int, ...] = ()
    while uses[slot] == 1 and (producer := producers.get(slot)) is not None and not producer.kwargs:
        if producer.function in _NAMES:
            kind = program.kinds.get(slot)
            plain = len(producer.args) == 2 and all(isinstance(item, Ref) for item in producer.args)
            return (producer, order) if plain and kind is not None and kind[0].numel() >= _SMALLEST else (None, ())
        if producer.function is torch.t:
            step: tuple[int, ...] = (1, 0)
        elif producer.function is torch.permute and len(producer.args) == 2:
            step = tuple(producer.args[1])
        else:
            break
        order = tuple(step[place] for place in order) if order else step
        slot = producer.args[0].slot
    return None, ()


__all__ = ["with_destinations"]
