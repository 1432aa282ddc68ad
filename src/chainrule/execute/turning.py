"""Products with a transposed matrix that are the transposes of products with the matrix itself: made once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from chainrule.maps.staging import Instruction, Program, Ref

aten = torch.ops.aten

#: Element-wise ops as a recording calls them, whose operands are broadcast.
_ELEMENTWISE = frozenset({aten.mul.Tensor._op, aten.threshold_backward.default._op, torch.mul, aten.threshold_backward.default})
_TRANSPOSE = frozenset({aten.t.default._op, torch.t})
_UNSQUEEZE = frozenset({aten.unsqueeze.default._op, torch.unsqueeze})


def turned(
    program: Program, instructions: Sequence[Instruction], own: set[int], touched: Callable[[Instruction], bool]
) -> list[Instruction] | None:
    """The instructions, a product of a transposed matrix and a row as the transpose of that of the matrix and a column.

    Likewise with a column and a row.

    Only where the program has the latter too: it is then made once. Both have the same layout in memory.

    Args:
        program: the program; it is a recorded one.
        instructions: its instructions.
        own: values that must not share their memory.
        touched: whether an instruction reads or makes memory that is written to.

    Returns:
        The instructions; None where nothing changes.
    """
    transposes: dict[int, Instruction] = {}
    columns: dict[int, Instruction] = {}
    for i in instructions:
        if i.function in _TRANSPOSE and len(i.args) == 1 and _rank(program, i.args[0]) == 2 and not touched(i):
            transposes[i.outputs[0]] = i
        elif i.function in _UNSQUEEZE and i.args[1:] in ((1,), (-1,)) and _rank(program, i.args[0]) == 1:
            columns[i.outputs[0]] = i
    if not transposes or not columns:
        return None
    known = {_columnwise(i, columns) for i in instructions if _is_plain(i)}
    spelled = {column.args[0].slot: column for column in columns.values()}
    found: list[Instruction] = []
    for i in instructions:
        parts = None
        if _is_plain(i) and i.outputs[0] not in own and not touched(i):
            parts = _turned_parts(program, i, transposes, columns)
        if parts is not None and (i.function, *parts) in known:
            found += _transposed(program, i, transposes, columns, spelled)
        else:
            found.append(i)
    return found if len(found) > len(instructions) else None


def _transposed(
    program: Program,
    product: Instruction,
    transposes: dict[int, Instruction],
    columns: dict[int, Instruction],
    spelled: dict[int, Instruction],
) -> list[Instruction]:
    """The columns of rows (or the rows of columns), the product with them, and its transpose."""
    found: list[Instruction] = []
    args: list[Any] = []
    transpose = next(iter(transposes.values()))
    shape, dtype, device = program.kinds[product.outputs[0]]
    for item in product.args:
        if not isinstance(item, Ref):
            args.append(item)
        elif item.slot in transposes:
            transpose = transposes[item.slot]
            args.append(transpose.args[0])
        elif item.slot in columns:
            args.append(columns[item.slot].args[0])
        else:
            column = program.new_slot()
            program.kinds[column] = torch.Size((shape[1], 1)), dtype, device
            program.shares[column] = item.slot
            found.append(spelled[item.slot]._replace(outputs=(column,)))
            args.append(Ref(column))
    made, (out,) = program.new_slot(), product.outputs
    program.kinds[made] = torch.Size((shape[1], shape[0])), dtype, device
    program.shares[out] = made
    product = product._replace(args=tuple(args), outputs=(made,))
    return [*found, product, transpose._replace(args=(Ref(made),), outputs=(out,))]


def _rank(program: Program, item: Any) -> int:
    kind = program.kinds.get(item.slot) if isinstance(item, Ref) else None
    return -1 if kind is None else len(kind[0])


def _is_plain(instruction: Instruction) -> bool:
    single = len(instruction.outputs) == 1 and not (instruction.kwargs or instruction.writes or instruction.keep)
    return single and instruction.function in _ELEMENTWISE


def _columnwise(instruction: Instruction, columns: dict[int, Instruction]) -> tuple[Any, ...]:
    """What an op reads: matrices as they are, columns by the vectors that they are of."""
    parts: list[Any] = []
    for item in instruction.args:
        if isinstance(item, Ref):
            parts.append(("column", columns[item.slot].args[0].slot) if item.slot in columns else item)
        else:
            parts.append((type(item), item))
    return (instruction.function, *parts)


def _turned_parts(
    program: Program, instruction: Instruction, transposes: dict[int, Instruction], columns: dict[int, Instruction]
) -> tuple[Any, ...] | None:
    """What the transpose of an op would read; None where it is no product of a transposed matrix and vectors."""
    whole = program.kinds.get(instruction.outputs[0])
    given = [item for item in instruction.args if isinstance(item, Ref)]
    if whole is None or len(whole[0]) != 2 or {program.kinds[item.slot][1:] for item in given} != {whole[1:]}:
        return None
    parts: list[Any] = []
    shapes = {program.kinds[item.slot][0] for item in given if item.slot in transposes}
    for item in instruction.args:
        if not isinstance(item, Ref):
            parts.append((type(item), item))
        elif item.slot in transposes:
            parts.append(transposes[item.slot].args[0])
        # A vector of one element would be spread.
        elif item.slot in columns and program.kinds[item.slot][0][0] == whole[0][0]:
            parts.append(columns[item.slot].args[0])
        elif _rank(program, item) == 1 and program.kinds[item.slot][0][0] == whole[0][1]:
            parts.append(("column", item.slot))
        else:
            return None
    return tuple(parts) if shapes == {whole[0]} else None


__all__ = ["turned"]
