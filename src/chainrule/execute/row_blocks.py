"""Thin matrix products whose rows fill the blocks of the kernel.

On a processor, a product of few rows with a large matrix reads that matrix once for the blocks of rows that the kernel computes
at a time, and once more for the rows that are left over. Rows of zeros that fill the last block cost less than that: a product
of 50 rows in double precision takes up to a sixth longer than one of 52, one of 7 rows up to a half longer than one of 8.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from math import prod

import torch

from chainrule.execute.products import FilledRows
from chainrule.execute.reuse import POINTWISE, WHOLE_VIEWS, is_fresh
from chainrule.maps.staging import Instruction, Program, Ref, reads

#: The rows that a kernel computes at a time.
_BLOCK = 4
#: Products of so many rows gain next to nothing, by the bytes of a number.
_MANY_ROWS = {8: 100, 4: 32}
#: Rows left over that cost as much as a block and more, by the bytes of a number.
_LEFT_OVER = {8: (2, 3), 4: (3,)}
#: Smaller matrices stay near the processor.
_LARGE_MATRIX = 1 << 16
#: A product with fewer columns costs not much more than copying its rows.
_COPIED = 256


def with_filled_rows(
    program: Program, instructions: Sequence[Instruction], kept: Iterable[int | None]
) -> list[Instruction] | None:
    """The same instructions, thin products with large matrices as such ones of whole blocks of rows; None where there are none.

    They are for plain tensors that nothing follows.

    Args:
        program: the program, for the sizes of its values.
        instructions: those of a block that is run as a whole.
        kept: what is read after the block.
    """
    if program.literal or program.writes:
        return None
    chosen = [number for number, instruction in enumerate(instructions) if _gains(program, instruction)]
    if not chosen:
        return None
    read = [slot for slot in kept if slot is not None]
    uses = Counter([*read, *(slot for instruction in instructions for slot in reads(instruction))])
    producers = {slot: i for i in instructions for slot in i.outputs}
    own = {_root(producers, slot) for slot in read}
    found, gone = list(instructions), set[int]()
    for number in chosen:
        filled = None if _root(producers, found[number].outputs[0]) in own else _filled(program, found[number], producers, uses)
        if filled is not None:
            found[number], between = filled
            gone |= between
    if all(map(operator.is_, found, instructions)):
        return None
    return [i for i in found if gone.isdisjoint(i.outputs)]


def _root(producers: dict[int, Instruction], slot: int) -> int:
    """The value whose memory a value may use."""
    while (producer := producers.get(slot)) is not None and producer.args and not is_fresh(producer.function):
        if not isinstance(producer.args[0], Ref):
            break
        slot = producer.args[0].slot
    return slot


def _gains(program: Program, instruction: Instruction) -> bool:
    """Whether an instruction is a thin product that leaves rows over."""
    if instruction.function is not torch.mm or instruction.kwargs or instruction.keep or len(instruction.args) != 2:
        return False
    if not all(isinstance(item, Ref) for item in instruction.args):
        return False
    kinds = [program.kinds.get(slot) for slot in (*reads(instruction), *instruction.outputs)]
    if any(kind is None or kind[1:] != kinds[0][1:] for kind in kinds):  # type: ignore[index]
        return False
    (rows, _), dtype, device = kinds[0]  # type: ignore[misc]
    matrix = kinds[1][0]  # type: ignore[index]
    size = dtype.itemsize
    if device.type != "cpu" or not dtype.is_floating_point or rows >= _MANY_ROWS.get(size, 0):
        return False
    return rows > _BLOCK and rows % _BLOCK in _LEFT_OVER[size] and prod(matrix) >= _LARGE_MATRIX


def _filled(
    program: Program, product: Instruction, producers: dict[int, Instruction], uses: Counter[int]
) -> tuple[Instruction, set[int]] | None:
    """A product of whole blocks of rows, and the values in between that are no longer made."""
    rows, matrix = (item.slot for item in product.args)
    (count, inner), _, _ = program.kinds[rows]
    whole = -(-count // _BLOCK) * _BLOCK
    place = torch.empty((count, inner), device="meta")
    slot, between = rows, set[int]()
    while uses[slot] == 1 and (producer := producers.get(slot)) is not None and not producer.keep and slot in program.kinds:
        between.add(slot)
        if producer.function in POINTWISE and len(producer.outputs) == 1:
            kinds = [program.kinds.get(item) for item in (slot, *reads(producer))]
            alike = all(kind is not None and kind[1:] == kinds[0][1:] for kind in kinds)  # type: ignore[index]
            if not alike or not all(isinstance(item, Ref) for item in producer.args):
                break
            layout = tuple(place.shape), place.stride()
            function = FilledRows(count, whole, producer.function, producer.kwargs, layout)
            return product._replace(function=function, args=(Ref(matrix), *producer.args)), between
        if producer.function not in WHOLE_VIEWS or not isinstance(producer.args[0], Ref):
            break
        slot = producer.args[0].slot
        above = program.kinds.get(slot)
        before = None if above is None else _before(producer, above[0], place)
        if before is None:
            break
        place = before
    if program.kinds[matrix][0][1] < _COPIED:
        return None
    layout = (count, inner), (inner, 1)
    return product._replace(function=FilledRows(count, whole, None, {}, layout), args=(Ref(matrix), Ref(rows))), set()


def _before(view: Instruction, shape: Sequence[int], place: torch.Tensor) -> torch.Tensor | None:
    """The place of the rows as it was before a view of them was taken; None where this is not known."""
    name = view.function.__name__
    if name in ("t", "transpose", "swapaxes"):
        found = place.transpose(*view.args[1:3]) if len(view.args) == 3 else place.t() if place.dim() == 2 else None
    elif name == "permute" and len(view.args) == 2:
        dims = [dim % len(shape) for dim in view.args[1]]
        found = place.permute(sorted(range(len(dims)), key=dims.__getitem__))
    elif name in ("reshape", "view", "flatten", "squeeze", "unsqueeze", "unflatten"):
        try:
            found = place.view(tuple(shape))
        except RuntimeError:
            return None
    else:
        return None
    return found if found is not None and tuple(found.shape) == tuple(shape) else None


__all__ = ["with_filled_rows"]
