"""Several finished tapes read as one: what is planned across the runs of several functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chainrule.capture.records import Record
from chainrule.capture.slots import Slot, slot_object
from chainrule.capture.tape import Tape


class JoinedTape:
    """Finished tapes one after the other; the slots of each are shifted by its offset.

    Args:
        tapes: the tapes, each of them once.

    Attributes:
        tapes: the tapes.
        offsets: where the slots of each tape begin.
        values: the values of all.
        active: whether they depend on inputs.
        records: the ops of all.
        inputs: the inputs of all.
        derived: the constants that are computed from what depends on inputs.
        prepared: as on a tape.
        pending: as on the tapes.
    """

    def __init__(self, tapes: Sequence[Tape]) -> None:
        self.tapes = tapes
        self.offsets: list[int] = []
        self.values: list[Any] = []
        self.active: list[bool] = []
        self.records: list[Record] = []
        self.inputs: list[int] = []
        self.derived: set[int] = set()
        self.prepared: dict[Any, Any] = {}
        self.pending = [item for tape in tapes for item in tape.pending]
        for tape in tapes:
            offset = len(self.values)
            self.offsets.append(offset)
            self.values.extend(tape.values)
            self.active.extend(tape.active)
            self.inputs.extend(slot + offset for slot in tape.inputs)
            self.derived.update(slot + offset for slot in tape.derived)
            self.records.extend(_shifted(record, offset) if offset else record for record in tape.records)

    def signature(self, extra: Any) -> tuple[Any, ...]:
        """What a plan depends on."""
        return (tuple([tape.signature(None) for tape in self.tapes]), extra)


def _shifted(record: Record, offset: int) -> Record:
    return record._replace(
        args=_shift(record.args, offset),
        kwargs=tuple((name, _shift(item, offset)) for name, item in record.kwargs),
        outputs=tuple(slot + offset if slot >= 0 else slot for slot in record.outputs),
    )


def _shift(tree: Any, offset: int) -> Any:
    if isinstance(tree, Slot):
        return slot_object(tree.index + offset)
    if type(tree) is tuple:
        return tuple(_shift(item, offset) for item in tree)
    return tree


__all__ = ["JoinedTape"]
