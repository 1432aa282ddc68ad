"""The tape: a straight-line record of one run of a function, made below autograd on real values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload

from chainrule.calls import shared_constant
from chainrule.capture.aliasing import AliasTracker
from chainrule.capture.other_objects import OtherObjects
from chainrule.capture.schema import OpFacts, Policy
from chainrule.dispatch import LightMode, again, refusal_of_operators, without_innermost
from chainrule.functions import COMPARISONS, Function
from chainrule.shortcuts import TAPE, configure, use_facts
from chainrule.subclasses import is_foreign, refuse_foreign

#: A function is run below autograd while it is recorded: its ops arrive whole, and cost less.
BelowAutograd = torch._C._AutoDispatchBelowADInplaceOrView


class Slot(NamedTuple):
    """A recorded value standing in an op's arguments."""

    index: int  # type: ignore[assignment]


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


_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})
#: Per policy, by the identity of the overload (its own hash is slow); the facts keep the overload alive.
_FACTS: dict[Any, dict[int, OpFacts]] = {}
#: Stands in the key before a record with a negative zero.
_NEGATIVE_ZERO = ("-0.0",)
#: Makes a record in half the time of its own constructor.
_new = tuple.__new__
_is_grad_enabled = torch.is_grad_enabled
_any_autocast = torch._C._is_any_autocast_enabled
_count_modes = torch._C._len_torch_dispatch_stack
_exclude = torch._C._dispatch_tls_set_dispatch_key_excluded
_PYTHON = torch._C.DispatchKey.Python
_ForceDispatchKeyGuard = torch._C._ForceDispatchKeyGuard
#: What the classes have whose results torch does not wrap into new objects.
_NO_FUNCTIONS = torch._C._disabled_torch_function_impl
#: Slots are made once: they stand in every record.
_SLOTS: list[Slot] = [Slot(number) for number in range(4096)]

configure(record=Record, slot_objects=_SLOTS)
use_facts(OpFacts)


def slot_object(number: int) -> Slot:
    """The slot of a number."""
    return _SLOTS[number] if number < 4096 else Slot(number)


def _meta(tensor: torch.Tensor) -> tuple[Any, ...]:
    if tensor.__class__ is not torch.Tensor:
        # What differs between the samples of a vmap is planned otherwise than what does not.
        return (tensor.shape, tensor.dtype, tensor.device, getattr(tensor, "batched", False))
    if tensor.layout is not torch.strided:
        return (tensor.shape, tensor.dtype, tensor.device, tensor.layout, tensor._nnz())
    return (tensor.shape, tensor.dtype, tensor.device)


def _differentiable(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and (tensor.dtype.is_floating_point or tensor.dtype.is_complex)


class Tape(LightMode):
    """Records the ATen ops that touch the inputs while it is active.

    Only ops with an *active* argument (one that depends on an input through floating-point values) are kept. Other
    tensors that such ops read are constants of the tape. The record is in static single assignment form: an in-place
    op gives the written tensor, and every view of the same memory, new slots (:mod:`chainrule.capture.aliasing`).

    Args:
        policy: which ops are constants for differentiation, and which are recorded in parts.
        respect_no_grad: whether ops run under ``torch.no_grad()`` inside the function are constants (as reverse mode
            in torch has it).
        kernels: whether ops are recorded whole whose own kernel serves a gradient best, and nothing else.
    """

    takes_functions = True
    supports_higher_order_operators = True

    def __init__(self, policy: Policy, *, respect_no_grad: bool = True, kernels: bool = False) -> None:
        super().__init__()
        self.kernels = kernels
        self.kind = TAPE
        self.policy = policy
        self.values: list[Any] = []
        self.active: list[bool] = []
        self.records: list[Record] = []
        self.inputs: list[int] = []
        self.key: list[Any] = []
        self.slots: dict[int, int] = {}
        # Tensors whose id stands in a table although no slot holds them any more: an id must not be used again.
        self.kept: list[Any] = []
        self.respect_no_grad = respect_no_grad
        # Constants for differentiation that are computed from what depends on the inputs, by identity, and those of them that
        # have a slot.
        self._derived: dict[int, Any] = {}
        self.derived: set[int] = set()
        # Whether an op was taken for a constant because of torch.no_grad().
        self.saw_blocked = False
        self._alias: AliasTracker | None = None
        self._facts = _FACTS.get(policy) or _FACTS.setdefault(policy, {})
        self.settle()
        # What plans computed on this tape that serves further seeds.
        self.prepared: dict[Any, Any] = {}
        self._origin: Any = None
        self._others: OtherObjects | None = None

    def fork(self) -> Tape:
        """A finished tape once more: what is recorded on it from now on does not change this one."""
        fork = Tape(self.policy, respect_no_grad=self.respect_no_grad, kernels=self.kernels)
        fork.values, fork.active, fork.records = [*self.values], [*self.active], [*self.records]
        fork.inputs, fork.key, fork.slots = [*self.inputs], [*self.key], dict(self.slots)
        fork.kept, fork.saw_blocked = [*self.kept], self.saw_blocked
        fork._derived, fork.derived = dict(self._derived), set(self.derived)
        return fork

    @property
    def alias(self) -> AliasTracker:
        """The views and writes of this run."""
        if self._alias is None:
            self._alias = AliasTracker(self)
        return self._alias

    def facts(self, op: OpOverload) -> OpFacts:
        """What is known of ``op`` under this tape's policy."""
        facts = self._facts.get(id(op))
        if facts is None:
            if not isinstance(op, OpOverload):
                raise RuntimeError(refusal_of_operators(f"{op} on functions"))
            facts = self._facts[id(op)] = OpFacts(op, self.policy)
        return facts

    def add_input(self, tensor: torch.Tensor) -> int:
        """Make ``tensor`` (a fresh alias that nobody else holds) an input of the tape."""
        slot = self._append(tensor, True)
        self.inputs.append(slot)
        self.key.append(_meta(tensor))
        return slot

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
        self.key.append(_meta(tensor))
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
        if tensor.grad_fn is not None:
            slot = self._other_objects().by_node(tensor, self.values)
        elif tensor.__class__ is not torch.Tensor and tensor.__class__.__torch_function__ is not _NO_FUNCTIONS:
            slot = self._other_objects().by_memory(tensor, self.values)
        if slot is not None:
            self.kept.append(tensor)
            self.slots[id(tensor)] = slot
        return slot

    def _other_objects(self) -> OtherObjects:
        if self._others is None:
            self._others = OtherObjects()
        return self._others


    def is_active(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor depends on the inputs."""
        slot = self.slot_of(tensor)
        return slot is not None and self.active[slot]

    def is_blocked(self) -> bool:
        """Whether what runs now is a constant by ``torch.no_grad()``."""
        if self.respect_no_grad and not torch.is_grad_enabled():
            self.saw_blocked = True
            return True
        return False

    def forget(self) -> None:
        """Let go of the tensors that views and writes were tracked by."""
        self._alias = None
        self._derived.clear()
        self.kept.clear()

    def settle(self) -> None:
        """Take what is active now (autograd, other modes) for what lies outside of this tape."""
        self._outside = (torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set())

    def outside(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``function`` as if from outside the handler: with autograd, and without this tape recording it."""
        with _ForceDispatchKeyGuard(*self._outside):
            return function(*args, **kwargs)

    def joins(self, args: Iterable[Any]) -> bool:
        """Whether torch's own autograd has to see a call, because a tensor among ``args`` requires grad or is complex.

        The function runs with autograd switched off, so that ops arrive whole and cheaply; it is switched on for just
        the calls that need it. Lazy conjugation, which kernels of complex ops rely on, is off where autograd is.
        """
        for item in args:
            if isinstance(item, torch.Tensor):
                if item.is_complex():
                    return True
                if item.requires_grad and torch.is_grad_enabled():
                    return True
            elif (item.__class__ is list or item.__class__ is tuple) and item and item[0].__class__ is not int:
                if self.joins(item):
                    return True
        return False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what runs inside."""
        with BelowAutograd(), self:
            yield

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one op and record it."""
        facts = self._facts.get(id(func)) or self.facts(func)
        if facts.common:
            if not kwargs:
                out = self._run_plain(facts, args, self._run_view if facts.is_view else _run_alone)
                if out is not NotImplemented:
                    return out
            joins = self.joins(args)
            if joins and facts.composite:
                with again(self):
                    return func.decompose(*args, **(kwargs or {}))
            if joins or facts.is_view:
                out = self.outside(func, *args, **kwargs) if kwargs else self.outside(func, *args)
                if facts.is_view:
                    self.alias.pending.append((func, args, kwargs, out))
            else:
                out = facts.call(*args, **kwargs) if kwargs else facts.call(*args)
            if not self.is_blocked():
                self._record(facts, args, kwargs, out)
            return out
        if facts.writes:
            return self.alias.run_write(func, facts, args, kwargs or {})
        # Composite views are recorded in parts also of constants: something active may be written through them later.
        joins = self.joins(args)
        expansion = facts.joined if joins and facts.joined is not None else facts.expansion
        if facts.whole is not None and not joins and facts.whole(args, self.kernels):
            expansion = None
        if expansion is not None and (facts.is_view or self._any_active(args, kwargs)):
            outer, self._origin = self._origin, self._origin or func
            try:
                if facts.direct is not None and not joins:
                    out = facts.direct(self._run_part, *args, **(kwargs or {}))
                    if out is not NotImplemented:
                        return out
                with again(self):
                    return expansion(*args, **(kwargs or {}))
            finally:
                self._origin = outer
        if facts.composite and joins:
            with again(self):
                return func.decompose(*args, **(kwargs or {}))
        if facts.is_view or joins:
            out = self.outside(func, *args, **(kwargs or {}))
        else:
            out = facts.call(*args, **(kwargs or {}))
        if facts.is_view and args:
            self.alias.pending.append((func, args, kwargs, out))
        if facts.inactive:
            if not facts.shaped:
                self._note_derived(args, kwargs, out)
        elif not self.is_blocked():
            self._record(facts, args, kwargs, out)
        return out

    def _run_part(self, op: OpOverload, *args: Any) -> Any:
        """Run and record an op that is a part of another one, inside of the handler."""
        if self.below is not None and _count_modes() == self._depth - 1:
            # The next mode takes the op itself, if it is one that can.
            _exclude(_PYTHON, True)
            try:
                out = self.run_op(op, args)
            finally:
                _exclude(_PYTHON, False)
            if out is not NotImplemented:
                return out
        return self.__torch_dispatch__(op, (), args)

    def read_data(self, tensor: torch.Tensor) -> torch.Tensor:
        """A constant for this tape alone: the transforms around it see the tensor itself, as in torch.func."""
        if _count_modes() != self._depth or not self.is_active(tensor):
            return tensor.data
        self.saw_blocked = True
        with without_innermost():
            out: torch.Tensor = self.outside(torch.ops.aten.alias.default, tensor)
        self.alias.pending.append((torch.ops.aten.detach.default, (tensor,), None, out))
        return out

    def run_function(self, function: Function, args: tuple[Any, ...]) -> Any:
        """Run a function that is one op, and record the op."""
        # What autocast turns a call into is recorded where it arrives.
        if not function.fewest <= len(args) <= function.most or _any_autocast():
            return NotImplemented
        op = function.op
        if function.number_op is not None:
            kind = args[1].__class__
            if kind is float or kind is int:
                op = function.number_op
            elif not isinstance(args[1], torch.Tensor):
                return NotImplemented
        elif len(args) > 1:
            if args[-1] is None:  # it is what the op takes it to be without being told
                args = args[:-1]
            if not all([isinstance(item, torch.Tensor) for item in args]):
                return NotImplemented
        facts = self._facts.get(id(op)) or self.facts(op)
        if not facts.common:
            return NotImplemented
        below = self.below
        if below is None:
            return self._run_plain(facts, args, _run_function, function)
        return self._run_plain(facts, args, below.run_function, function)

    def ignores(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> bool:
        """Whether a result has no derivative: of a comparison, or of constants without a graph."""
        if kwargs and ("out" in kwargs or "requires_grad" in kwargs):
            return False
        for item in (*args, *kwargs.values()) if kwargs else args:
            kind = item.__class__
            if kind is torch.Tensor:
                if item.requires_grad:
                    return False
            elif isinstance(item, (torch.Tensor, list)) or (kind is tuple and not all([n.__class__ is int for n in item])):
                return False
        return func in COMPARISONS or not self._any_active(args, kwargs)

    def note_ignored(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None, out: Any) -> None:
        """A mask that depends on the inputs is a value, though it has no derivative."""
        self._note_derived(args, kwargs, out)

    def run_op(self, op: OpOverload, args: tuple[Any, ...]) -> Any:
        """Run an op, and record it."""
        facts = self._facts.get(id(op)) or self.facts(op)
        if not facts.common or _any_autocast():
            return NotImplemented
        if self.below is None:
            return self._run_plain(facts, args, self._run_view if facts.is_view else _run_alone)
        return self._run_plain(facts, args, self._run_below)

    def _run_below(self, facts: OpFacts, args: tuple[Any, ...]) -> Any:
        assert self.below is not None
        out = self.below.run_op(facts.op, args)
        if facts.is_view and out is not NotImplemented:
            self.alias.pending.append((facts.op, args, None, out))
        return out

    def _run_view(self, facts: OpFacts, args: tuple[Any, ...]) -> Any:
        # Autograd must see views, so that writes through them are counted as writes.
        with _ForceDispatchKeyGuard(*self._outside):
            out = facts.fast(*args)
        self.alias.pending.append((facts.op, args, None, out))
        return out

    def _run_plain(
        self, facts: OpFacts, args: tuple[Any, ...], run: Callable[[Any, tuple[Any, ...]], Any], given: Any = None
    ) -> Any:
        """The common call in one pass: plain arguments and tensors that the tape knows or that are constants.

        Args:
            facts: the op's.
            args: its arguments.
            run: runs it; gets `given` (or the facts) and the arguments.
            given: what `run` needs to know.

        Returns:
            The result; NotImplemented, with nothing done, for other arguments or if `run` returns that.
        """
        known, active = self.slots.get, self.active
        touched = False
        new: list[int] | None = None
        lowered: list[Any] = []
        add = lowered.append
        for item in args:
            slot = known(id(item))
            if slot is not None:
                if item.requires_grad or item.is_complex():
                    return NotImplemented
                if active[slot]:
                    touched = True
                add(_SLOTS[slot] if slot < 4096 else Slot(slot))
                continue
            kind = item.__class__
            if kind in _PLAIN:
                add(item)
                if item == 0 and kind is float:
                    self._mark_sign(item)
            elif isinstance(item, torch.Tensor):
                if item.requires_grad or item.is_complex() or (kind is not torch.Tensor and is_foreign(kind)):
                    return NotImplemented
                if new is None:
                    new = []
                new.append(len(lowered))
                add(None)
            elif (kind is list or kind is tuple) and (not item or item[0].__class__ is int):
                add(tuple(item))
            elif kind is list and isinstance(item[0], torch.Tensor):
                for one in item:
                    if not isinstance(one, torch.Tensor) or one.requires_grad or one.is_complex():
                        return NotImplemented
                    slot = known(id(one))
                    if slot is not None and active[slot]:
                        touched = True
                if new is None:
                    new = []
                new.append(len(lowered))
                add(None)
            else:
                return NotImplemented
        out = run(facts if given is None else given, args)
        if out is NotImplemented:
            return out
        if self.respect_no_grad and not _is_grad_enabled():
            self.saw_blocked = True
            return out
        if new is not None:
            touched = touched or self._any_active(args, None)
            if touched:
                for position in new:
                    item = args[position]
                    if item.__class__ is list:
                        lowered[position] = self.lower(item)
                        continue
                    slot = self._slot_or_constant(item)
                    lowered[position] = _SLOTS[slot] if slot < 4096 else Slot(slot)
        if touched:
            if isinstance(out, torch.Tensor) and (dtype := out.dtype).is_floating_point:
                # What _append_record does, without the call.
                slot = len(active)
                self.values.append(out)
                active.append(True)
                self.slots[id(out)] = slot
                arguments = tuple(lowered)
                self.key.append((facts, arguments, (), out.shape, dtype))
                self.records.append(_new(Record, (facts.op, arguments, (), (slot,), False, self._origin)))
            else:
                self._append_record(facts, tuple(lowered), (), out)
        elif self._derived:
            self._note_derived(args, None, out)
        return out

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

    def _record(self, facts: OpFacts, args: tuple[Any, ...], kwargs: dict[str, Any] | None, out: Any) -> None:
        """Record an op that ran, if an argument is active and an output differentiable."""
        if self._any_active(args, kwargs):
            self._append_record(facts, self.lower(args), self.lower_kwargs(kwargs), out)
        elif self._derived:
            self._note_derived(args, kwargs, out)

    def _append_record(self, facts: OpFacts, args: tuple[Any, ...], kwargs: tuple[Any, ...], out: Any) -> None:
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
        self.key.append((self._key_of(func), args, kwargs, tuple(_meta(o) if isinstance(o, torch.Tensor) else None for o in out)))
        self.records.append(Record(func, args, kwargs, outputs, not (len(out) == 1 and _returns_one(func)), self._origin))
        return outputs

    def _key_of(self, func: Any) -> Any:
        return self.facts(func) if isinstance(func, OpOverload) else func

    def record_value(
        self, func: Any, slots: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor
    ) -> int:
        """Append an op on known slots that was not executed: ``out`` already holds its value."""
        active = any(self.active[slot] for slot in slots)
        lowered = (*(Slot(slot) for slot in slots), *self.lower(args))
        if not active:
            return self._append_constant(out)
        (slot,) = self.record_lowered(func, lowered, self.lower_kwargs(kwargs), [out])
        return slot

    def _append_constant(self, tensor: torch.Tensor) -> int:
        self.key.append(_meta(tensor))
        return self._append(tensor, False)

    def _mark_sign(self, zero: float) -> None:
        """Zeros of either sign are equal, and the key of another plan where they divide."""
        if math.copysign(1.0, zero) < 0:
            self.key.append(_NEGATIVE_ZERO)

    def lower(self, args: Iterable[Any]) -> tuple[Any, ...]:
        """Replace tensors by slots, lists by tuples."""
        slots = self.slots
        lowered: list[Any] = []
        for item in args:
            if isinstance(item, torch.Tensor):
                slot = slots.get(id(item))
                lowered.append(slot_object(self._slot_or_constant(item) if slot is None else slot))
            elif type(item) in _PLAIN:
                lowered.append(item)
                if item == 0 and type(item) is float:
                    self._mark_sign(item)
            elif isinstance(item, (list, tuple)):
                lowered.append(self.lower(item))
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

    def signature(self, extra: Any) -> tuple[Any, ...]:
        """What the plan depends on: ops, wiring, shapes, dtypes, devices and static arguments."""
        return (tuple(self.key), tuple(self.inputs), extra)


def _run_alone(facts: OpFacts, args: tuple[Any, ...]) -> Any:
    """Run an op as it arrives at the handler."""
    if facts.numbers and args[-1].__class__ is float and len(args) == 2 and _is_seen_by_none(args[0]):
        return facts.fast(args[0], shared_constant(args[1], args[0].dtype))
    return facts.fast(*args)


def _run_function(function: Function, args: tuple[Any, ...]) -> Any:
    """Run a function of the table by torch itself."""
    if function.numbers and (args[1].__class__ is float or args[1].__class__ is int) and args[0].__class__ is torch.Tensor:
        return function.call(args[0], shared_constant(args[1], args[0].dtype))
    return function.call(*args)


def _is_seen_by_none(tensor: Any) -> bool:
    """Whether a number beside a tensor may be a constant: no other mode sees the call."""
    return tensor.__class__ is torch.Tensor and not torch._C._len_torch_dispatch_stack()


def _tensors(items: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among ``items``, also in lists among them."""
    for item in items:
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from _tensors(item)


def _returns_one(func: Any) -> bool:
    if not isinstance(func, OpOverload):
        return False
    return len(func._schema.returns) == 1 and str(func._schema.returns[0].type) == "Tensor"
