"""Pullbacks of single ops, planned once for all ops that are alike.

What one op does to a cotangent depends on little (the op, its static arguments, shapes and dtypes), and the steps of a loop
share it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload

from chainrule.capture.slots import Slot, slot_object
from chainrule.dispatch import mode_aside, seen_by
from chainrule.maps.entries import without_writes
from chainrule.maps.staging import Instruction, Ref, reads
from chainrule.plan.planner import Request, plan

Tensor = torch.Tensor


def described(record: Any, values: Sequence[Any], active: frozenset[int]) -> tuple[list[int], list[Any]]:
    """The slots of the arguments of an op, each once, and what a plan of it depends on beside its outputs.

    Args:
        record: the op.
        values: the values of its tape.
        active: the slots that are differentiated.
    """
    slots = list[int]()
    parts: list[Any] = [id(record.op), record.is_tuple]

    def describe(items: Sequence[Any]) -> None:
        for item in items:
            kind = item.__class__
            if kind is Slot:
                index = item.index
                if index in slots:
                    parts.append((slots.index(index),))
                    continue
                slots.append(index)
                value = values[index]
                known = isinstance(value, Tensor)  # not the context of a user's function
                parts.append((value.shape, value.dtype, value.device, index in active) if known else value.__class__)
            elif kind is tuple:
                parts.append(len(item))
                describe(item)
            else:
                # Numbers of different types, and zeros of either sign, are equal.
                parts.append((kind, item, math.copysign(1.0, item) if kind is float else None))

    describe(record.args)
    for name, item in record.kwargs:
        parts.append(name)
        describe((item,))
    return slots, parts


class OneOp:
    """One op as a tape of its own.

    Args:
        record: the op.
        local: the slots of its arguments and outputs, which get the numbers of their places here.
        values: the values of its tape.
        flags: for each of ``local`` whether it is differentiated.
    """

    def __init__(self, record: Any, local: Sequence[int], values: Sequence[Any], flags: list[bool]) -> None:
        numbers = {slot: number for number, slot in enumerate(local)}
        alone = record._replace(
            args=_renumbered(record.args, numbers),
            kwargs=tuple([(name, _renumbered(item, numbers)) for name, item in record.kwargs]),
            outputs=tuple([numbers[slot] if slot >= 0 else slot for slot in record.outputs]),
        )
        self.numbers = numbers
        self.records = [alone]
        self.values = [values[slot] for slot in local]
        self.active = flags


def _renumbered(tree: Any, numbers: dict[int, int]) -> Any:
    if tree.__class__ is Slot:
        return slot_object(numbers[tree.index])
    if tree.__class__ is tuple:
        return tuple([_renumbered(item, numbers) for item in tree])
    return tree


class _Pullback(NamedTuple):
    """What one op gives its arguments.

    Attributes:
        targets: the arguments that get something, by their numbers among the op's tensors.
        results: where that stands in the program.
        inputs: where the op's tensors (by their numbers) and the cotangents (from -1 downwards) stand in the program.
        instructions: the program.
    """

    targets: list[int]
    results: list[int]
    inputs: dict[int, int]
    instructions: list[Instruction]

    def run(self, values: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
        """The results; they may be views of ``values`` or of ``cotangents``."""
        mode = mode_aside()
        made = {slot: values[key] if key >= 0 else cotangents[-1 - key] for key, slot in self.inputs.items()}
        for function, args, kwargs, outputs, is_tuple, *_ in self.instructions:
            given = [made[item.slot] if item.__class__ is Ref else _filled(item, made) for item in args]
            named = {name: _filled(item, made) for name, item in kwargs.items()} if kwargs else {}
            result = function(*given, **named) if mode is None else seen_by(mode, function, given, named)
            made.update(zip(outputs, result if is_tuple else (result,), strict=True))
        return [made[slot] for slot in self.results]


def _filled(tree: Any, values: Mapping[int, Tensor]) -> Any:
    if tree.__class__ is Ref:
        return values[tree.slot]
    if tree.__class__ is tuple or tree.__class__ is list:
        return tree.__class__([_filled(item, values) for item in tree])
    return tree


class Pullbacks:
    """The pullbacks of the ops of one tape.

    Args:
        tape: the tape.
    """

    def __init__(self, tape: Any) -> None:
        self.values: list[Any] = tape.values
        self._known: dict[Any, _Pullback | None] = {}

    def pull(self, record: Any, wanted: Sequence[int], cotangents: dict[int, Tensor]) -> dict[int, Tensor]:
        """The cotangents that one op gives to its arguments, those of zeros left out.

        Args:
            record: the op.
            wanted: the slots of the arguments.
            cotangents: the cotangents of its outputs, by slot, of the outputs' shapes.
        """
        outputs = [slot for slot in record.outputs if slot >= 0]
        slots, parts = described(record, self.values, frozenset(wanted))
        for slot in outputs:
            value = self.values[slot]
            parts.append((value.shape, value.dtype, slot in cotangents))
        parts.append(tuple([bar.dtype for bar in cotangents.values()]))
        local = [*slots, *[slot for slot in outputs if slot not in slots]]
        usual = record.op.__class__ is OpOverload and all([self.values[slot].layout is torch.strided for slot in local])
        key: Any = tuple(parts) if usual else None
        try:
            known = self._known.get(key)
        except TypeError:  # an unhashable static argument
            key = known = None
        if known is not None:
            results = known.run([self.values[slot] for slot in local], list(cotangents.values()))
            return {local[number]: result for number, result in zip(known.targets, results, strict=True)}
        active = {*wanted, *outputs}
        part = OneOp(record, local, self.values, [slot in active for slot in local])
        given, sources = (tuple([part.numbers[slot] for slot in side]) for side in (cotangents, wanted))
        request = Request("pull", sources, given, seeds=given)
        planned = plan(part, request, list(cotangents.values()))
        made = {number: result for number, result in zip(planned.keys, planned.results, strict=True) if result is not None}
        if key is not None:
            self._known[key] = _pullback(planned.program, {number: result.slot for number, result in made.items()})
        return {local[number]: result.value for number, result in made.items()}


def _pullback(program: Any, results: dict[int, int]) -> _Pullback | None:
    """The pullback that a program is; None where it needs more than the tensors that it is given, or does more."""
    if program.constants or program.writes or any(i.keep or _holds_tensor(i.args) for i in program.instructions):
        return None
    needed, kept = {*results.values()}, list[Instruction]()
    for instruction in reversed(program.instructions):
        if not needed.isdisjoint(instruction.outputs):
            needed.update(reads(instruction))
            kept.append(without_writes(instruction))
    inputs = {key if key.__class__ is int else -1 - key[1]: slot for key, slot in program.inputs.items() if slot in needed}
    return _Pullback(list(results), list(results.values()), inputs, kept[::-1])


def _holds_tensor(tree: Any) -> bool:
    return isinstance(tree, torch.Tensor) or (isinstance(tree, (tuple, list)) and any(map(_holds_tensor, tree)))


__all__ = ["OneOp", "Pullbacks", "described"]
