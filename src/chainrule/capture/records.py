"""The records of a tape: what stands in them, and how they are appended."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload

from chainrule.capture.schema import OpFacts, Policy
from chainrule.capture.slots import Slot, Slots, meta, slot_object
from chainrule.uncompiled import refusal_of_operators

#: Makes a record in half the time of its own constructor.
_new = tuple.__new__


class Record(NamedTuple):
    """One recorded op.

    Attributes:
        op: the ATen overload (the functional twin of an in-place one).
        args: positional arguments, with :class:`Slot` for each tensor.
        kwargs: keyword arguments, likewise, sorted by name.
        outputs: the slots of the outputs (``-1`` for an output that is no tensor).
        is_tuple: whether the op returned several values.
        origin: the op that was recorded in parts, of which this is one.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    outputs: tuple[int, ...]
    is_tuple: bool
    origin: Any = None


def _differentiable(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and (tensor.dtype.is_floating_point or tensor.dtype.is_complex)


class Records(Slots):
    """The recorded ops of a tape.

    Attributes:
        records: the ops, in the order in which they ran.
        policy: which ops are constants for differentiation, and which are recorded in parts.
        inputs: the slots of the inputs.
        sources: by slot, the slot in which a value is before hooks act on its cotangent.
    """

    records: list[Record]
    policy: Policy
    inputs: list[int]
    sources: dict[int, int]
    _origin: Any
    _facts: dict[int, OpFacts]

    def facts(self, op: OpOverload) -> OpFacts:
        """What is known of ``op`` under this tape's policy."""
        facts = self._facts.get(id(op))
        if facts is None:
            if not isinstance(op, OpOverload):
                raise RuntimeError(refusal_of_operators(f"{op} on functions"))
            facts = self._facts[id(op)] = OpFacts(op, self.policy)
        return facts

    def _record(self, facts: OpFacts, args: tuple[Any, ...], kwargs: dict[str, Any] | None, out: Any) -> None:
        """Record an op that ran, if an argument is active and an output differentiable."""
        if self._any_active(args, kwargs):
            self.append_record(facts, self.lower(args), self.lower_kwargs(kwargs), out)
        elif self._derived:
            self._note_derived(args, kwargs, out)

    def append_record(self, facts: OpFacts, args: tuple[Any, ...], kwargs: tuple[Any, ...], out: Any) -> None:
        """Append a record whose arguments are lowered already; the outputs get new slots if one of them is differentiable."""
        if isinstance(out, torch.Tensor):
            dtype = out.dtype
            if not (dtype.is_floating_point or dtype.is_complex):
                self._derived[id(out)] = out
                return
            slot = len(self.values)
            self.values.append(out)
            self.active.append(True)
            self.slots[id(out)] = slot
            self.key.append((facts, args, kwargs, out.shape, dtype))
            self.records.append(_new(Record, (facts.op, args, kwargs, (slot,), False, self._origin)))
        elif isinstance(out, (list, tuple)) and any(_differentiable(o) for o in out):
            self.record_lowered(facts.op, args, kwargs, out)

    def record_lowered(self, func: Any, args: tuple[Any, ...], kwargs: tuple[Any, ...], out: Any) -> tuple[int, ...]:
        """Append a record whose arguments are lowered already; the outputs get new slots."""
        if isinstance(out, torch.Tensor):
            outputs: tuple[int, ...] = (self._append(out, True),)
            self.key.append((self._key_of(func), args, kwargs, out.shape, out.dtype))
            self.records.append(Record(func, args, kwargs, outputs, False, self._origin))
            return outputs
        outputs = tuple(self._append(o, _differentiable(o)) if isinstance(o, torch.Tensor) else -1 for o in out)
        one = len(out) == 1 and self._returns_one(func)
        if one and isinstance(out[0], torch.Tensor):
            self.key.append((self._key_of(func), args, kwargs, out[0].shape, out[0].dtype))
        else:
            said = tuple(meta(o) if isinstance(o, torch.Tensor) else None for o in out)
            self.key.append((self._key_of(func), args, kwargs, said))
        self.records.append(Record(func, args, kwargs, outputs, not one, self._origin))
        return outputs

    def insert_after(self, slot: int, func: Any, args: tuple[Any, ...]) -> None:
        """Put an op that passes a value on between what made the value in a slot (or the input there) and all who read it."""
        source = self._append(self.values[slot], True)
        self.slots[id(self.values[slot])] = slot
        self.sources[slot] = source
        self.key.append((func, slot, args))
        record = Record(func, (*args, Slot(source)), (), (slot,), False, self._origin)
        if slot in self.inputs:
            self.inputs[self.inputs.index(slot)] = source
            self.records.insert(0, record)
            return
        for place in reversed(range(len(self.records))):
            made = self.records[place]
            if slot in made.outputs:
                self.records[place] = made._replace(outputs=tuple([source if n == slot else n for n in made.outputs]))
                self.records.insert(place + 1, record)
                return

    def _returns_one(self, func: Any) -> bool:
        return isinstance(func, OpOverload) and self.facts(func).one

    def reads_values(self, func: Any) -> bool:
        """Whether an op's derivative needs the values of its inputs or outputs."""
        if not isinstance(func, OpOverload):
            return self.policy.reads_values(func)
        facts = self.facts(func)
        if facts.reads is None:
            facts.reads = self.policy.reads_values(func)
        return facts.reads

    def _key_of(self, func: Any) -> Any:
        return self.facts(func) if isinstance(func, OpOverload) else func

    def record_value(
        self, func: Any, slots: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor
    ) -> int:
        """Append an op on known slots that was not executed: ``out`` already holds its value."""
        known = self.active
        if not any([known[slot] for slot in slots]):
            self.lower(args)  # its constants
            return self._append_constant(out)
        lowered = (*[slot_object(slot) for slot in slots], *self.lower(args))
        (slot,) = self.record_lowered(func, lowered, self.lower_kwargs(kwargs), [out])
        return slot

    def signature(self, extra: Any) -> tuple[Any, ...]:
        """What the plan depends on: ops, wiring, shapes, dtypes, devices and static arguments."""
        return (tuple(self.key), tuple(self.inputs), extra)
