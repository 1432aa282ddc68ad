"""Sums of padded pieces as one join: pieces that fill a tensor together are put side by side, with no zeros to be added.

The cotangent of what was cut into pieces (by ``chunk``, ``split`` or slices) is such a sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from chainrule.calls import FUNCTIONS
from chainrule.maps.staging import Instruction, Program, Ref, reads

aten = torch.ops.aten

_PADS = frozenset({torch.nn.functional.pad, torch.constant_pad_nd, aten.constant_pad_nd.default._op})


class _Piece(NamedTuple):
    """What is padded with zeros along one dimension.

    Attributes:
        slot: the piece.
        dim: the dimension.
        start: its first place there.
        stop: the place behind its last one.
    """

    slot: int
    dim: int
    start: int
    stop: int


class _Sum(NamedTuple):
    """Pieces that are added to each other, and the values between that nothing else reads."""

    pieces: list[_Piece]
    between: list[int]


def with_joins(
    program: Program, kept: list[Instruction], wanted: Sequence[int], touched: Callable[[Instruction], bool]
) -> list[Instruction]:
    """The same instructions, with joins in the place of sums of padded pieces that fill their sum.

    Args:
        program: the program they belong to.
        kept: the instructions.
        wanted: the results.
        touched: whether an instruction has to do with memory that is written to.
    """
    sums: dict[int, _Sum] = {}
    for instruction in kept:
        if (piece := _piece(program, instruction)) is not None and not touched(instruction):
            sums[instruction.outputs[0]] = _Sum([piece], [instruction.outputs[0]])
    if len(sums) < 2:
        return kept
    uses = Counter([*wanted, *(slot for instruction in kept for slot in reads(instruction))])
    joins: dict[int, Instruction] = {}
    dead: set[int] = set()
    for number, instruction in enumerate(kept):
        found = _added(program, instruction, sums, uses)
        if found is None or touched(instruction):
            continue
        (out,) = instruction.outputs
        pieces = sorted(found.pieces, key=lambda piece: (piece.start, piece.stop))
        dim = pieces[0].dim
        if any(one.stop > two.start for one, two in zip(pieces, pieces[1:], strict=False)):
            continue
        if sum(piece.stop - piece.start for piece in pieces) < program.kinds[out][0][dim]:
            sums[out] = _Sum(pieces, [*found.between, out])
            continue
        joins[number] = instruction._replace(function=torch.cat, args=([Ref(piece.slot) for piece in pieces], dim), kwargs={})
        dead.update(found.between)
    return [joins.get(number, i) for number, i in enumerate(kept) if number in joins or dead.isdisjoint(i.outputs)]


def _piece(program: Program, instruction: Instruction) -> _Piece | None:
    """What an instruction pads with zeros along one dimension; None if it does something else."""
    if instruction.function not in _PADS or instruction.keep or not isinstance(instruction.args[0], Ref):
        return None
    named = dict(instruction.kwargs)
    args = [*instruction.args[1:]]
    if instruction.function is torch.nn.functional.pad and (len(args) != 1 or named.pop("mode", "constant") != "constant"):
        return None
    pads = args[0] if args else None
    fill = args[1] if len(args) > 1 else named.pop("value", None)
    before, after = program.kinds.get(instruction.args[0].slot), program.kinds.get(instruction.outputs[0])
    if named or len(args) > 2 or not isinstance(pads, (list, tuple)) or fill not in (None, 0) or before is None or after is None:
        return None
    if not all([type(n) is int and n >= 0 for n in pads]) or before[1:] != after[1:]:
        return None
    dims = [n for n in range(len(pads) // 2) if pads[2 * n] or pads[2 * n + 1]]
    if len(dims) != 1:
        return None
    dim, start = len(after[0]) - 1 - dims[0], pads[2 * dims[0]]
    return _Piece(instruction.args[0].slot, dim, start, start + before[0][dim])


def _added(program: Program, instruction: Instruction, sums: dict[int, _Sum], uses: Counter[int]) -> _Sum | None:
    """The pieces of a sum of two sums of pieces along one dimension, that are read nowhere else; None for others."""
    if FUNCTIONS.get(instruction.function, instruction.function) is not torch.add or instruction.keep or instruction.kwargs:
        return None
    if len(instruction.args) != 2 or not all([isinstance(arg, Ref) and uses[arg.slot] == 1 for arg in instruction.args]):
        return None
    slots = [arg.slot for arg in instruction.args]
    if not all([slot in sums and program.kinds.get(slot) == program.kinds.get(instruction.outputs[0]) for slot in slots]):
        return None
    one, two = (sums[slot] for slot in slots)
    if one.pieces[0].dim != two.pieces[0].dim:
        return None
    return _Sum([*one.pieces, *two.pieces], [*one.between, *two.between])


__all__ = ["with_joins"]
