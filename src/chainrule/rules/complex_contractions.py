"""Contractions of complex arrays that are recorded whole: ``einsum`` of one or two operands.

The convention is that of :mod:`chainrule.rules.complex_moves`: a pullback contracts with the conjugate of the other operand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from chainrule.maps.matrix_products import matrix_product
from chainrule.maps.staging import Program, Staged
from chainrule.maps.views import expand_to, permute
from chainrule.rules.base import Call, Edge
from chainrule.rules.complex_moves import complex_edge, conjugated
from chainrule.rules.equations import are_alike, einsum_letters

aten = torch.ops.aten

_Names = tuple[int, ...]

#: Stands before the names of a value that comes in rows.
_ROWS = -1


def _einsum(call: Call) -> Iterable[Edge] | None:
    equation, operands = call.args[:2]
    tensors = [call.tensor(item) for item in operands]
    if not are_alike(tensors):
        return None
    letters, output = einsum_letters(equation)
    names = [tuple([ord(letter) for letter in own]) for own in letters]
    made = tuple([ord(letter) for letter in output])
    sizes = {name: size for own, tensor in zip(names, tensors, strict=True) for name, size in zip(own, tensor.shape, strict=True)}
    found = []
    for place, item in enumerate(operands):
        if not call.is_active(item):
            continue
        others = [(operand, own) for number, (operand, own) in enumerate(zip(operands, names, strict=True)) if number != place]
        own = names[place]

        def push(program: Program, rows: Staged, own: _Names = own, others: Any = others) -> Staged:
            return _with_others(rows, own, [(call.stage(program, operand), n) for operand, n in others], made, sizes)

        def pull(program: Program, rows: Staged, own: _Names = own, others: Any = others) -> Staged:
            staged = [(conjugated(call.stage(program, operand)), n) for operand, n in others]
            return _with_others(rows, made, staged, own, sizes)

        found.append(complex_edge(call, item, (push, pull)))
    return found


def _with_others(
    rows: Staged, own: _Names, others: Sequence[tuple[Staged, _Names]], wanted: _Names, sizes: dict[int, int]
) -> Staged:
    """Rows contracted with what else is given, and repeated along what none of them has."""
    left, value = (_ROWS, *own), rows
    sizes = {**sizes, _ROWS: rows.shape[0]}
    goal = (_ROWS, *wanted)
    for other, names in others:
        value, left = _contracted(value, left, other, names, goal, sizes)
    value, left = _summed(value, left, goal)
    present = tuple([name for name in goal if name in left])
    value = permute(value, tuple([left.index(name) for name in present]))
    if len(present) < len(goal):
        value = torch.broadcast_to(expand_to(value, present, goal), tuple([sizes[name] for name in goal]))
    return value


def _summed(value: Staged, names: _Names, kept: Sequence[int]) -> tuple[Staged, _Names]:
    """The sum over the dimensions whose names nobody needs."""
    gone = tuple([place for place, name in enumerate(names) if name not in kept])
    if not gone:
        return value, names
    return torch.sum(value, gone), tuple([name for name in names if name in kept])


def _contracted(
    x: Staged, left: _Names, y: Staged, right: _Names, wanted: _Names, sizes: dict[int, int]
) -> tuple[Staged, _Names]:
    x, left = _summed(x, left, (*right, *wanted))
    y, right = _summed(y, right, (*left, *wanted))
    gone = tuple([name for name in left if name in right and name not in wanted])
    order = tuple([name for name in wanted if name in left or name in right])
    if not gone:
        return torch.mul(expand_to(x, left, order), expand_to(y, right, order)), order
    batch = tuple([name for name in left if name in right and name in wanted])
    left_only = tuple([name for name in left if name not in right])
    right_only = tuple([name for name in right if name not in left])
    value = matrix_product(x, left, y, right, (batch, left_only, right_only, gone), sizes)
    return value, (*batch, *left_only, *right_only)


#: How complex calls are linearised; None for a call that is left to torch's own formula.
CONTRACTIONS: dict[Any, Callable[[Call], Iterable[Edge] | None]] = {aten.einsum.default: _einsum}

__all__ = ["CONTRACTIONS"]
