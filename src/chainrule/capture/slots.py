"""Which tensors a tape knows: each has a slot, and is active or a constant."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from chainrule.capture.other_objects import OtherObjects
from chainrule.subclasses import refuse_foreign

if TYPE_CHECKING:
    from chainrule.capture.aliasing import AliasTracker


class Slot(NamedTuple):
    """A recorded value standing in an op's arguments."""

    index: int  # type: ignore[assignment]


#: Classes of arguments that stand in a record as they are.
PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})
#: Stands in the key before a record with a negative zero.
NEGATIVE_ZERO = ("-0.0",)
#: What the classes have whose results torch does not wrap into new objects.
_NO_FUNCTIONS = torch._C._disabled_torch_function_impl
#: Slots are made once: they stand in every record.
SLOTS: list[Slot] = [Slot(number) for number in range(4096)]


def has_negative_zero(number: complex) -> bool:
    """Whether a part of a complex number is a zero below zero, which a dictionary does not tell from other zeros."""
    return any([part == 0 and math.copysign(1.0, part) < 0 for part in (number.real, number.imag)])


def signs_of(number: complex) -> str:
    """The signs of both parts: zeros of either sign are equal, and lie on different sides of a cut."""
    parts = ["-" if math.copysign(1.0, part) < 0 else "+" for part in (number.real, number.imag)]
    return f"{parts[0]}{parts[1]}j"


def slot_object(number: int) -> Slot:
    """The slot of a number."""
    return SLOTS[number] if number < 4096 else Slot(number)


#: Tensors without ways of their own.
_ORDINARY = (torch.Tensor, torch.nn.Parameter)


def meta(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What the key of a plan says of a tensor."""
    if tensor.__class__ not in _ORDINARY:
        # What differs between the samples of a vmap is planned otherwise than what does not.
        return (tensor.shape, tensor.dtype, tensor.device, getattr(tensor, "batched", False))
    if tensor.layout is not torch.strided:
        return (tensor.shape, tensor.dtype, tensor.device, tensor.layout, tensor._nnz())
    return (tensor.shape, tensor.dtype, tensor.device)


def _tensors(items: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among ``items``, also in lists among them."""
    for item in items:
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from _tensors(item)


class Slots:
    """The values of a tape by slot, and the slots of tensors.

    Attributes:
        values: by slot, what stands there.
        active: by slot, whether it depends on the inputs through floating-point values.
        slots: the slots, by the identity of the tensors.
        key: what the plan depends on, in the order of recording.
        kept: tensors whose identity stands in a table although no slot holds them: it must not be used again.
        derived: the slots of constants for differentiation that are computed from what depends on the inputs.
        meets_saved: whether tensors may be met that torch's autograd kept for a backward: other objects of recorded values.
        expects_views: whether tensors may be met that torch's autograd made of recorded values by itself: views that it keeps.
    """

    expects_views = False

    meets_saved: bool
    values: list[Any]
    active: list[bool]
    slots: dict[int, int]
    key: list[Any]
    kept: list[Any]
    derived: set[int]
    # By identity, those that have no slot as well.
    _derived: dict[int, Any]
    _alias: AliasTracker | None
    _others: OtherObjects | None

    def _append(self, tensor: Any, active: bool) -> int:
        slot = len(self.values)
        self.values.append(tensor)
        self.active.append(active)
        self.slots[id(tensor)] = slot
        return slot

    def constant(self, tensor: torch.Tensor) -> int:
        """Give a tensor that the tape has not seen a slot as a constant.

        Raises:
            RuntimeError: if the tensor is of a class that cannot be seen through.
        """
        if tensor.__class__ is not torch.Tensor:
            refuse_foreign(tensor, "chainrule")
        slot = self._append(tensor, False)
        if id(tensor) in self._derived:
            self.derived.add(slot)
        self.key.append(meta(tensor))
        return slot

    def _note_derived(self, args: Iterable[Any], kwargs: dict[str, Any] | None, out: Any) -> None:
        """Note what an op gives that is not recorded, if it reads something active or noted (as a comparison does)."""
        derived = self._derived
        every = (*args, *kwargs.values()) if kwargs else args
        if self.touches(every) or (derived and any(id(item) in derived for item in _tensors(every))):
            derived.update((id(item), item) for item in _tensors((out,)))

    def add_object(self, item: Any) -> int:
        """Give something that is no tensor (the context of a user's function) a slot as a constant."""
        slot = len(self.values)
        self.values.append(item)
        self.active.append(False)
        return slot

    def slot_of(self, tensor: torch.Tensor) -> int | None:
        """The current slot of a tensor, or None for one that the tape has never seen."""
        slot = self.slots.get(id(tensor))
        if slot is not None:
            return slot
        if self._alias is not None and self._alias.has_writes:
            slot = self._alias.resolve(tensor)
            if slot is not None:
                return slot
        if self.meets_saved and tensor.grad_fn is not None:
            slot = self._other_objects().by_node(tensor, self.values)
        elif tensor.__class__ is not torch.Tensor and tensor.__class__.__torch_function__ is not _NO_FUNCTIONS:
            if tensor.grad_fn is None:
                slot = self._other_objects().by_memory(tensor, self.values)
                if slot is not None:
                    self._note_same(tensor, self.values[slot])
        if slot is None and self.expects_views and self._alias is not None and tensor.__class__ is torch.Tensor:
            place = self._other_objects().by_view(tensor, self.values)
            slot = None if place is None else self._alias.kept_view(tensor, *place)
        if slot is not None:
            self.kept.append(tensor)
            self.slots[id(tensor)] = slot
        return slot

    def _note_same(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Note that a tensor of another class is a value."""
        raise NotImplementedError

    def _other_objects(self) -> OtherObjects:
        if self._others is None:
            self._others = OtherObjects()
        return self._others

    def is_active(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor depends on the inputs."""
        slot = self.slot_of(tensor)
        return slot is not None and self.active[slot]

    def _any_active(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> bool:
        slots = self.slots
        for item in args:
            if isinstance(item, torch.Tensor):
                slot = slots.get(id(item))
                if slot is None:
                    slot = self.slot_of(item)
                if slot is not None and self.active[slot]:
                    return True
            elif type(item) is list or type(item) is tuple:
                if self.touches(item):
                    return True
        return bool(kwargs) and self.touches(kwargs.values())  # type: ignore[union-attr]

    def touches(self, items: Iterable[Any]) -> bool:
        """Whether an active tensor is among ``items``, at any depth of lists."""
        for item in items:
            if isinstance(item, torch.Tensor):
                if self.is_active(item):
                    return True
            elif isinstance(item, (list, tuple)) and self.touches(item):
                return True
        return False

    def _append_constant(self, tensor: torch.Tensor) -> int:
        self.key.append(meta(tensor))
        return self._append(tensor, False)

    def _mark_sign(self, zero: float) -> None:
        """Zeros of either sign are equal, and the key of another plan where they divide."""
        if math.copysign(1.0, zero) < 0:
            self.key.append(NEGATIVE_ZERO)

    def lower(self, args: Iterable[Any]) -> tuple[Any, ...]:
        """Replace tensors by slots, lists by tuples."""
        slots = self.slots
        lowered: list[Any] = []
        for item in args:
            if isinstance(item, torch.Tensor):
                slot = slots.get(id(item))
                lowered.append(slot_object(self._slot_or_constant(item) if slot is None else slot))
            elif type(item) in PLAIN:
                lowered.append(item)
                if item == 0 and type(item) is float:
                    self._mark_sign(item)
            elif isinstance(item, (list, tuple)):
                lowered.append(self.lower(item))
            elif type(item) is complex:
                lowered.append(item)
                if has_negative_zero(item):
                    self.key.append(signs_of(item))
            else:
                lowered.append(item)
        return tuple(lowered)

    def lower_kwargs(self, kwargs: dict[str, Any] | None) -> tuple[tuple[str, Any], ...]:
        """Lower keyword arguments, sorted by name."""
        if not kwargs:
            return ()
        names = sorted(kwargs)
        return tuple(zip(names, self.lower([kwargs[name] for name in names]), strict=True))

    def _slot_or_constant(self, tensor: torch.Tensor) -> int:
        slot = self.slot_of(tensor)
        return self.constant(tensor) if slot is None else slot
