"""Values that are zero at places known beforehand: what is padded with zeros, written into them, masked, or cut to a triangle.

A product reads its operands as derivatives of each other: where an operand is zero whatever the inputs are, there is no entry.
The places follow from the ops themselves, run on truth values: ones for what may be anything, zeros for what is zero. Sums and
products of numbers that are not negative are zero only where nothing else could be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from chainrule.maps.places import Places

aten = torch.ops.aten

#: Which constants of a tape may be read, by slot.
Readable = Callable[[int], bool]

#: Ops that put zeros around or between the elements of their first argument.
_MAKE = frozenset(
    {
        aten.constant_pad_nd.default, aten.diag_embed.default, aten.tril.default, aten.triu.default, aten.select_backward.default,
        aten.slice_backward.default, aten.diagonal_backward.default, aten.block_diag.default,
    }
)  # fmt: skip

#: Ops that move, add up or multiply the elements of their tensors of floating point, by indices and masks that are constants.
_KEEP = frozenset(
    {
        aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.squeeze.default, aten.squeeze.dim,
        aten.squeeze.dims, aten.unsqueeze.default, aten.slice.Tensor, aten.select.int, aten.transpose.int, aten.t.default,
        aten.permute.default, aten.expand.default, aten.flip.default, aten.roll.default, aten.clone.default, aten.alias.default,
        aten.diagonal.default, aten.repeat.default, aten.unfold.default, aten.cat.default, aten.stack.default,
        aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.take.default, aten.where.self,
        aten.index_put.default, aten.index_add.default, aten.index_copy.default, aten.scatter.src, aten.scatter_add.default,
        aten.slice_scatter.default, aten.select_scatter.default, aten.diagonal_scatter.default, aten.masked_scatter.default,
        aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default, aten.matmul.default, aten.sum.default,
        aten.sum.dim_IntList, aten.cumsum.default, aten.add.Tensor, aten.mul.Tensor, aten.split.Tensor,
        aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.addcmul.default, aten.addcdiv.default,
    }
)  # fmt: skip

#: Those of them, and of those that fill, whose integers and truth values say where; those of other ops are numbers.
_INDEXED = frozenset(
    {
        aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.take.default, aten.where.self,
        aten.index_put.default, aten.index_add.default, aten.index_copy.default, aten.scatter.src, aten.scatter_add.default,
        aten.masked_scatter.default, aten.masked_fill.Scalar, aten.index_fill.int_Scalar, aten.scatter.value,
    }
)  # fmt: skip

#: Ops whose numbers are operands, not dimensions.
_OPERANDS = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor})

#: Ops that write a number over some elements: the position of the number.
_FILLED = {aten.masked_fill.Scalar: 2, aten.index_fill.int_Scalar: 3, aten.scatter.value: 3}

#: Element-wise ops that give zero for a zero in their first argument.
_FIXED = frozenset(
    {
        aten.neg.default, aten.mul.Scalar, aten.div.Scalar, aten.sin.default, aten.tanh.default, aten.square.default,
        aten.abs.default, aten.relu.default, aten.sinh.default, aten.tan.default, aten.asin.default, aten.atan.default,
        aten.erf.default, aten.expm1.default, aten.log1p.default, aten.sqrt.default, aten.gelu.default, aten.silu.default,
        aten.div.Tensor, aten.pow.Tensor_Scalar, aten.tanh_backward.default, aten.sigmoid_backward.default,
        aten.threshold_backward.default, aten.silu_backward.default, aten.elu_backward.default, aten.softplus_backward.default,
        aten.leaky_relu_backward.default, aten.hardtanh_backward.default, aten.mish_backward.default,
        aten.hardswish_backward.default, aten.hardsigmoid_backward.default, aten.gelu_backward.default,
    }
)  # fmt: skip

#: What a difference of numbers that may be anything is on truth values.
_POSITIVE = {aten.sub.Tensor: aten.add.Tensor}

_PASSING = _KEEP | _FIXED | _POSITIVE.keys() | _FILLED.keys()

#: Arguments by name that are passed on; a number that scales a part of a sum is one, or zero.
_PASSED = frozenset({"accumulate", "memory_format", "alpha"})

#: A constant is read for its zeros if it is a mask, or has at most so many elements, or one in so many other than zero. (A single
#: number is only where an op chooses between two: a factor that is zero says nothing of the next one.)
_LITTLE = 1 << 10
_DENSE = 4


def static_zeros(
    records: Sequence[Any],
    values: Sequence[Any],
    readable: Readable = lambda slot: False,
    picked: frozenset[int] = frozenset(),
) -> dict[int, Places]:
    """For the slots of a tape whose values have zeros that are known, where they may be other than zero.

    Args:
        records: the ops of the tape, in order.
        values: its values, of which only the shapes are looked at, but for constants that are readable.
        readable: which slots hold constants whose values may be read.
        picked: those of them that hold what an op chose.
    """
    finder = _Finder(values, readable)
    for slot in picked:
        finder.found[slot] = Places(lambda device, slot=slot: values[slot] != 0, frozenset({slot}))
    for record in records:
        finder.add(record)
    return finder.found


class _Finder:
    """The places of values of a tape, found op by op."""

    def __init__(self, values: Sequence[Any], readable: Readable) -> None:
        self.found: dict[int, Places] = {}
        self._values, self._readable = values, readable
        self._constants: dict[int, Places | None] = {}

    def add(self, record: Any) -> None:
        """Note what is known of the results of an op."""
        op, args = record.op, record.args
        fills = op in _FILLED and _is_zero(args[_FILLED[op]])
        if op is aten.pow.Tensor_Scalar and not (isinstance(args[1], int | float) and args[1] > 0):
            return
        makes = fills or (op in _MAKE and (op is not aten.constant_pad_nd.default or not any(args[2:])))
        if not makes and op not in _PASSING:
            return
        slots = list(_slots(args[:1] if op in _FIXED else args))
        where = {slot for slot in slots if op in _INDEXED and not self._values[slot].dtype.is_floating_point}
        if op not in _FIXED and any(name not in _PASSED for name, _ in record.kwargs):
            return
        if any(self._values[slot].is_complex() for slot in slots):
            return
        known = {slot: self._places(slot, op is aten.where.self) for slot in slots if slot not in where}
        if (not makes and all(place is None for place in known.values())) or not all(map(self._readable, where)):
            return
        reads = frozenset(where).union(*[place.reads for place in known.values() if place is not None])
        kwargs = {name: int(value != 0) if name == "alpha" else value for name, value in record.kwargs}

        def run(device: torch.device) -> Any:
            if op in _FIXED:
                return self._ones(slots[0], known, device)
            given = [self._given(item, known, device) for item in args]
            if op in _FILLED:
                given[_FILLED[op]] = 0.0 if fills else 1.0
            elif op in _OPERANDS:
                given = [float(item != 0) if isinstance(item, int | float) else item for item in given]
            return _POSITIVE.get(op, op)(*given, **kwargs)

        for number, output in enumerate(record.outputs):
            if output >= 0:
                shape = tuple(self._values[output].shape)
                self.found[output] = _part(run, number if record.is_tuple else None, shape, reads)

    def _places(self, slot: int, is_single: bool) -> Places | None:
        """What is known of a value: by the ops that made it, or by its own zeros (also of a single number, or not)."""
        if slot in self.found:
            return self.found[slot]
        if slot not in self._constants:
            self._constants[slot] = self._of_constant(slot)
        return self._constants[slot] if is_single or self._values[slot].dim() else None

    def _of_constant(self, slot: int) -> Places | None:
        if not self._readable(slot):
            return None
        value = self._values[slot]
        places = value != 0
        count, total = int(places.sum()), value.numel()
        if count == total or (total > _LITTLE and count * _DENSE > total and not bool((value[places] == 1).all())):
            return None
        return Places(lambda device: places, frozenset({slot}))

    def _given(self, item: Any, known: dict[int, Places | None], device: torch.device) -> Any:
        """An argument of an op as it is run on truth values."""
        if _is_slot(item):
            return self._ones(item.index, known, device) if item.index in known else self._values[item.index]
        if isinstance(item, tuple | list) and any(map(_is_slot, item)):
            return [self._given(element, known, device) for element in item]
        return item

    def _ones(self, slot: int, known: dict[int, Places | None], device: torch.device) -> torch.Tensor:
        place = known[slot]
        shape = tuple(self._values[slot].shape)
        return torch.ones(shape, device=device, dtype=torch.float32) if place is None else place(device).to(torch.float32)


def _part(run: Callable[[torch.device], Any], number: int | None, shape: tuple[int, ...], reads: frozenset[int]) -> Places:
    """One result of an op that is run on truth values."""

    def make(device: torch.device) -> torch.Tensor:
        made = run(device)
        places: torch.Tensor = (made if number is None else made[number]) != 0
        return places if tuple(places.shape) == shape else places.expand(shape)

    return Places(make, reads)


def _is_zero(item: Any) -> bool:
    return isinstance(item, int | float) and item == 0


def _is_slot(item: Any) -> bool:
    return type(item).__name__ == "Slot"


def _slots(args: Sequence[Any]) -> Iterator[int]:
    """The slots among arguments and lists of them."""
    for item in args:
        if _is_slot(item):
            yield item.index
        elif isinstance(item, tuple | list):
            yield from _slots(item)


__all__ = ["static_zeros"]
