"""Python numbers that change from call to call.

A number in a function is part of the signature of its plans, where it may simplify them (a factor of one, a term of zero). A
function whose number is another one in each call (a step size, a penalty, a point in time) would be planned each time. When
the same record has been met with several numbers, they are taken for values from then on: each becomes a constant of the tape,
and one plan serves all of them.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from chainrule.calls import REAL, fits, number_constant
from chainrule.capture.schema import OpFacts
from chainrule.capture.slots import Slot, slot_object
from chainrule.capture.tape import Tape
from chainrule.shortcuts import configure

aten = torch.ops.aten

#: Ops with a number as their second argument, and those that do the same with a tensor without dimensions.
_OPS: dict[Any, Any] = {
    aten.add.Tensor: aten.add.Tensor, aten.sub.Tensor: aten.sub.Tensor, aten.mul.Tensor: aten.mul.Tensor,
    aten.div.Tensor: aten.div.Tensor, aten.rsub.Scalar: aten.rsub.Tensor, aten.rsub.Tensor: aten.rsub.Tensor,
}  # fmt: skip

#: How many different numbers make them values.
_PATIENCE = 3

#: How many records are remembered.
_LIMIT = 4096

_lock = threading.Lock()
_met: dict[Any, set[tuple[float, ...]]] = {}

#: For a record, which of its numbers are values (by their place among them), and how many ops such records have.
_varying: dict[Any, frozenset[int]] = {}
_lengths: set[int] = set()
configure(lengths=_lengths, numbered=frozenset(_OPS))


def _stands_for_value(facts: Any, args: Any, kwargs: Any) -> bool:
    """Whether the second argument of a recorded call is a number that could be a tensor."""
    if facts.__class__ is not OpFacts or facts.op not in _OPS or kwargs or len(args) != 2:
        return False
    return args[0].__class__ is Slot and args[1].__class__ in (float, int)


def _without_numbers(tape: Tape) -> tuple[Any, tuple[float, ...]]:
    """The signature of a record but for such numbers, and the numbers."""
    numbers: list[float] = []
    parts: list[Any] = []
    for entry in tape.key:
        if len(entry) == 5 and _stands_for_value(entry[0], entry[1], entry[2]):
            numbers.append(entry[1][1])
            parts.append((entry[0], entry[1][0], *entry[3:]))
        else:
            parts.append(entry)
    return (tuple(parts), tuple(tape.inputs)), tuple(numbers)


def note_numbers(tape: Any) -> None:
    """Remember the numbers of a record (or of several joined) that no plan was found for."""
    for part in getattr(tape, "tapes", (tape,)):
        _note(part)


def _note(tape: Tape) -> None:
    try:
        signature, numbers = _without_numbers(tape)
        if not numbers:
            return
        with _lock:
            if len(_met) >= _LIMIT:
                _met.clear()
            met = _met.setdefault(signature, set())
            met.add(numbers)
            if len(met) >= _PATIENCE:
                if len(_varying) >= _LIMIT:
                    _varying.clear()
                del _met[signature]
                several = zip(*met, strict=True)
                _varying[signature] = frozenset(n for n, known in enumerate(several) if len(set(known)) > 1)
                _lengths.add(len(tape.records))
    except TypeError:  # an unhashable static argument: such a record has no plan that is kept
        return


def numbers_to_values(tape: Tape) -> None:
    """Make constants of the numbers of a record that are known to change; nothing where they are not."""
    if not _lengths or len(tape.records) not in _lengths:
        return
    try:
        while places := _varying.get(_without_numbers(tape)[0]):
            if not _replace(tape, places):
                return
    except TypeError:
        return


def _replace(tape: Tape, places: frozenset[int]) -> bool:
    """Make constants of the numbers at these places; whether there were some that could be."""
    replaced: dict[int, tuple[Any, ...]] = {}
    number_of = -1
    for place, record in enumerate(tape.records):
        if not _stands_for_value(tape.facts(record.op) if record.op in _OPS else None, record.args, record.kwargs):
            continue
        number_of += 1
        if number_of not in places:
            continue
        other, number = tape.values[record.args[0].index], record.args[1]
        if other.dtype in REAL and fits(number):
            constant = number_constant(number, other.dtype, other.device)
            args = (record.args[0], slot_object(tape.constant(constant)))
            replaced[id(record.args)] = args
            tape.records[place] = record._replace(op=_OPS[record.op], args=args)
    for place, entry in enumerate(tape.key):
        if len(entry) == 5 and id(entry[1]) in replaced:
            tape.key[place] = (tape.facts(_OPS[entry[0].op]), replaced[id(entry[1])], *entry[2:])
    return bool(replaced)
