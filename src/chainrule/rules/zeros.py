"""Values that are zero at places known beforehand: what is padded with zeros, embedded into them, or cut to a triangle.

A product reads its operands as derivatives of each other: where an operand is zero whatever the inputs are, there is no entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

aten = torch.ops.aten

#: Where a value may be other than zero, made on a device.
Places = Callable[[torch.device], torch.Tensor]

#: Ops that put zeros around or between the elements of their first argument.
_MAKE = frozenset(
    {
        aten.constant_pad_nd.default, aten.diag_embed.default, aten.tril.default, aten.triu.default, aten.select_backward.default,
        aten.slice_backward.default, aten.diagonal_backward.default,
    }
)  # fmt: skip

#: Ops that move the elements of their first argument, or give zero for a zero.
_KEEP = frozenset(
    {
        aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.squeeze.default, aten.squeeze.dim,
        aten.squeeze.dims, aten.unsqueeze.default, aten.slice.Tensor, aten.select.int, aten.transpose.int, aten.t.default,
        aten.permute.default, aten.expand.default, aten.flip.default, aten.roll.default, aten.clone.default, aten.alias.default,
    }
)  # fmt: skip

#: Element-wise ops of one argument, or of one and numbers, that give zero for a zero.
_FIXED = frozenset({aten.neg.default, aten.mul.Scalar, aten.div.Scalar, aten.sin.default, aten.tanh.default, aten.square.default})


def static_zeros(records: Sequence[Any], values: Sequence[Any]) -> dict[int, Places]:
    """For the slots of a tape whose values have zeros that are known, where they may be other than zero.

    Args:
        records: the ops of the tape, in order.
        values: its values, of which only the shapes are looked at.
    """
    found: dict[int, Places] = {}
    for record in records:
        if len(record.outputs) != 1 or record.kwargs:
            continue
        known = [found.get(item.index) if _is_slot(item) else None for item in record.args]
        op = record.op
        if op in _MAKE and _is_slot(record.args[0]) and (op is not aten.constant_pad_nd.default or not any(record.args[2:])):
            found[record.outputs[0]] = _moved(record, known[0], tuple(values[record.args[0].index].shape))
        elif not any(place is not None for place in known):
            continue
        elif op in _KEEP and known[0] is not None:
            found[record.outputs[0]] = _moved(record, known[0], ())
        elif op in _FIXED:
            shape = tuple(values[record.outputs[0]].shape)
            found[record.outputs[0]] = _joined([known[0]], shape, torch.logical_and)
        elif op is aten.mul.Tensor:
            shape = tuple(values[record.outputs[0]].shape)
            found[record.outputs[0]] = _joined([place for place in known if place is not None], shape, torch.logical_and)
        elif op in (aten.add.Tensor, aten.sub.Tensor) and len(record.args) == 2 and None not in known:
            shape = tuple(values[record.outputs[0]].shape)
            found[record.outputs[0]] = _joined(known, shape, torch.logical_or)
    return found


def _is_slot(item: Any) -> bool:
    return type(item).__name__ == "Slot"


def _moved(record: Any, place: Places | None, shape: tuple[int, ...]) -> Places:
    """What an op makes of the places of its first argument; of all places of ``shape`` where nothing is known of it."""

    def make(device: torch.device) -> torch.Tensor:
        given = torch.ones(shape, device=device) if place is None else place(device).to(torch.float32)
        moved: torch.Tensor = record.op(given, *record.args[1:])
        return moved != 0

    return _once(make)


def _joined(places: Sequence[Any], shape: tuple[int, ...], join: Callable[..., torch.Tensor]) -> Places:
    def make(device: torch.device) -> torch.Tensor:
        total = places[0](device)
        for place in places[1:]:
            total = join(total, place(device))
        return total.expand(shape)

    return _once(make)


def _once(make: Places) -> Places:
    kept: list[torch.Tensor] = []

    def made(device: torch.device) -> torch.Tensor:
        if not kept:
            kept.append(make(device))
        return kept[0]

    return made


__all__ = ["Places", "static_zeros"]
