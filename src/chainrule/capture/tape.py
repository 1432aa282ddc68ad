"""The tape: a straight-line record of one run of a function, made below autograd on real values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch._ops import OpOverload

from chainrule.capture.aliasing import AliasTracker
from chainrule.capture.assignments import assign
from chainrule.capture.composites import Listening
from chainrule.capture.other_objects import OtherObjects
from chainrule.capture.plain_calls import are_plain, have_stored_graphs, is_elsewhere, run_alone, run_function_alone
from chainrule.capture.records import Record
from chainrule.capture.schema import LINEAR, PARTS, WHOLE, OpFacts, Policy, are_stacked_alike, linear_of_vector
from chainrule.capture.slots import PLAIN, SLOTS, Slot, meta
from chainrule.dispatch import DATA_UNDER_VMAP, KNOWS_STATE, TAKEN, again, without_handlers
from chainrule.functions import COMPARISONS, SHAPED, Function
from chainrule.modes_off import modes_inside_off, without_mode
from chainrule.norms import may_join
from chainrule.shortcuts import COMPILED, configure, use_facts

#: A function is run below autograd while it is recorded: its ops arrive whole, and cost less.
BelowAutograd = torch._C._AutoDispatchBelowADInplaceOrView


#: Classes of what a list holds of which a new tensor is made.
_NUMBERS = frozenset({int, float, bool})

#: Per policy, by the identity of the overload (its own hash is slow); the facts keep the overload alive.
_FACTS: dict[Any, dict[int, OpFacts]] = {}
#: Makes a record in half the time of its own constructor.
_new = tuple.__new__
_is_grad_enabled = torch.is_grad_enabled
_any_autocast = torch._C._is_any_autocast_enabled
_count_modes = torch._C._len_torch_dispatch_stack
_mode_at = torch._C._get_dispatch_stack_at
_ForceDispatchKeyGuard = torch._C._ForceDispatchKeyGuard
_excludes = torch._C._dispatch_tls_is_dispatch_key_excluded
_included = torch._C._dispatch_tls_local_include_set
_excluded = torch._C._dispatch_tls_local_exclude_set
_VIEWS = torch._C.DispatchKey.ADInplaceOrView

configure(record=Record, slot_objects=SLOTS, plain=PLAIN)
use_facts(OpFacts)
TAKEN[torch.Tensor.__setitem__] = assign


def facts_of(policy: Policy) -> dict[int, OpFacts]:
    """What is known of ops under a policy, by the identity of the op."""
    return _FACTS.get(policy) or _FACTS.setdefault(policy, {})


class Tape(Listening):
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
    reads_data = True
    differentiates = True
    supports_higher_order_operators = True

    respect_no_grad: bool
    kernels: bool
    #: What plans computed on this tape that serves further seeds.
    prepared: dict[Any, Any]
    #: By slot, what acts on the cotangents that arrive there.
    hooks: dict[int, Any]
    #: View calls that were not looked at yet: they matter only once something is written.
    pending: list[tuple[OpOverload, tuple[Any, ...], dict[str, Any] | None, Any]]
    #: Whether an op on something active was taken for a constant because of torch.no_grad().
    saw_blocked = False
    #: Whether something was made a constant that tapes around this one see (by ``data`` or ``detach_``).
    saw_cut = False
    #: How many values the tapes around this one had when it began.
    _begun: Mapping[int, int] = MappingProxyType({})
    _others: OtherObjects | None = None

    def __init__(self, policy: Policy, *, respect_no_grad: bool = True, kernels: bool = False) -> None:
        self._begin(facts_of(policy), policy, respect_no_grad, kernels)
        self._sees_views = not _excludes(_VIEWS)
        if count := _count_modes():
            self._begun = {id(mode): len(mode.values) for n in range(count) if isinstance(mode := _mode_at(n), Tape)}

    def expect_saved(self, *, views: bool) -> None:
        """Torch's autograd may bring tensors that it has kept from now on; with `views`, those that it made of values."""
        self.meets_saved = True
        if views:  # with views to track, no tensor is taken for a constant at first sight
            self.expects_views = self.alias is not None

    def fork(self) -> Tape:
        """A finished tape once more: what is recorded on it from now on does not change this one."""
        fork = Tape(self.policy, respect_no_grad=self.respect_no_grad, kernels=self.kernels)
        fork.values, fork.active, fork.records = [*self.values], [*self.active], [*self.records]
        fork.inputs, fork.key, fork.slots = [*self.inputs], [*self.key], dict(self.slots)
        fork.kept, fork.saw_blocked = [*self.kept], self.saw_blocked
        fork.hooks, fork.sources, fork.meets_saved = self.hooks, self.sources, self.meets_saved
        fork._derived, fork.derived = dict(self._derived), set(self.derived)
        return fork

    @property
    def alias(self) -> AliasTracker:
        """The views and writes of this run."""
        if self._alias is None:
            self._alias = AliasTracker(self)
        return self._alias

    def _note_same(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        self.alias.note_same(tensor, value)

    def add_input(self, tensor: torch.Tensor) -> int:
        """Make ``tensor`` (a fresh alias that nobody else holds) an input of the tape."""
        slot = len(self.values)
        self.values.append(tensor)
        self.active.append(True)
        self.slots[id(tensor)] = slot
        self.inputs.append(slot)
        self.key.append(meta(tensor))
        return slot

    def is_blocked(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> bool:
        """Whether what runs now, on these arguments, is a constant by ``torch.no_grad()``.

        That is noted where it would not be one by itself: levels of a nest agree on all else.
        """
        if self.respect_no_grad and not torch.is_grad_enabled():
            self._note_blocked(args, kwargs)
            return True
        return False

    def _note_blocked(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> None:
        if not self.saw_blocked and self._any_active(args, kwargs):
            self.saw_blocked = True

    def forget(self) -> None:
        """Let go of the tensors that views and writes were tracked by."""
        self._alias = None
        self.pending.clear()
        self._derived.clear()
        self.kept.clear()

    def settle(self) -> None:
        """Take what is active now (autograd, other modes) for what lies outside of this tape."""
        self._outside = (_included(), _excluded())
        # Whether torch keeps track there of which tensors are views of which.
        self._sees_views = not _excludes(_VIEWS)

    def outside(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``function`` as if from outside the handler: with autograd, and without this tape recording it."""
        with _ForceDispatchKeyGuard(*self._outside):
            return function(*args, **kwargs)

    def run_seen(self, call: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """The same for tensors without a graph, of which torch keeps track of views and of writes alone."""
        if COMPILED and self._sees_views and (out := self._run_seen(call, args)) is not NotImplemented:
            return out
        return self.outside(call, *args)

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

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function with what it runs recorded."""
        if KNOWS_STATE:
            return self._run_recorded(function, args, kwargs)
        with BelowAutograd(), self:
            return function(*args, **kwargs)

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one op and record it."""
        facts = self._facts.get(id(func)) or self.facts(func)
        if facts.common:
            if not kwargs:
                out = self._run_plain(facts, args, self._run_view if facts.is_view else run_alone)
                if out is not NotImplemented:
                    return out
            joins = self.joins(args)
            if joins and facts.composite:
                with again(self):
                    return func.decompose(*args, **(kwargs or {}))
            if joins or facts.is_view:
                out = self.outside(func, *args, **kwargs) if kwargs else self.outside(func, *args)
                if facts.is_view:
                    self.pending.append((func, args, kwargs, out))
            else:
                out = facts.call(*args, **kwargs) if kwargs else facts.call(*args)
            self._hear(facts, args, kwargs, out)
            if not self.is_blocked(args, kwargs):
                self._record(facts, args, kwargs, out)
            return out
        if facts.writes:
            if self.heard is not None:
                self.heard.append(None)
            return self.alias.run_write(func, facts, args, kwargs or {})
        # Composite views are recorded in parts also of constants: something active may be written through them later.
        joins = joins_parts = self.joins(args)
        alone = facts.alone if facts.alone and joins and not kwargs and self._joins_whole(facts, args) else None
        in_parts = facts.joined is not None and alone is None and (joins or have_stored_graphs(args))
        expansion = facts.joined if in_parts else facts.expansion
        whole = facts.whole is not None and not (joins and facts.composite and not self._takes_complex(facts, args))
        if whole and facts.whole(args, self.kernels, self.is_active):  # type: ignore[misc]
            expansion, joins_parts = None, False
        if expansion is not None and (facts.is_view or self._any_active(args, kwargs)):
            outer, self._origin = self._origin, self._origin or func
            try:
                if facts.direct is not None:
                    out = facts.direct(self._run_part, *args, **(kwargs or {}))
                    if out is not NotImplemented:
                        return out
                with again(self):
                    return expansion(*args, **(kwargs or {}))
            finally:
                self._origin = outer
        if facts.composite and joins_parts:
            with again(self):
                return func.decompose(*args, **(kwargs or {}))
        if facts.is_view or joins:
            out = self.outside(alone or func, *args, **(kwargs or {}))
        else:
            out = facts.call(*args, **(kwargs or {}))
        self._hear(facts, args, kwargs, out)
        if facts.is_view and args:
            self.pending.append((func, args, kwargs, out))
        if facts.inactive:
            if not facts.shaped:
                self._note_derived(args, kwargs, out)
        elif not self.is_blocked(args, kwargs):
            self._record(facts, args, kwargs, out)
        return out

    def _run_part(self, op: OpOverload, *args: Any, **kwargs: Any) -> Any:
        """Run and record an op that is a part of another one, inside of the handler."""
        if self.below is not None and not kwargs and _count_modes() == self._depth - 1:
            # The next mode takes the op itself, if it is one that can.
            without_handlers(True)
            try:
                out = self.run_op(op, args)
            finally:
                without_handlers(False)
            if out is not NotImplemented:
                return out
        return self.__torch_dispatch__(op, (), args, kwargs)

    def read_data(self, tensor: torch.Tensor) -> torch.Tensor:
        """A constant for the transform that the tensor belongs to: those around it see the tensor itself, as in torch.func.

        What is computed while this tape records belongs to it, also what does not depend on its inputs.
        """
        if not self.is_active(tensor):
            holder, stored = self.holder(tensor)
            if holder is None:
                return tensor.data
            assert isinstance(holder, Tape)
            slot = holder.slot_of(stored)
            if slot is not None and slot < self._begun.get(id(holder), 0):
                if stored is not tensor:
                    raise RuntimeError(DATA_UNDER_VMAP)
                return holder.read_data(tensor)
        else:
            self.saw_blocked = self.saw_cut = True
        with without_mode(self):
            out: torch.Tensor = self.outside(torch.ops.aten.alias.default, tensor)
        self.pending.append((torch.ops.aten.detach.default, (tensor,), None, out))
        return out

    def run_function(self, function: Function, args: tuple[Any, ...]) -> Any:
        """Run a function that is one op, and record the op."""
        # What autocast turns a call into is recorded where it arrives.
        if not function.fewest <= len(args) <= function.most or _any_autocast() or not isinstance(args[0], torch.Tensor):
            return NotImplemented
        op = function.op
        if function.number_op is not None:
            kind = args[1].__class__
            if kind is float or kind is int:
                op = function.number_op
            elif not isinstance(args[1], torch.Tensor):
                return NotImplemented
            if not isinstance(args[0], torch.Tensor):  # torch.pow(2.0, x) is another overload
                return NotImplemented
        elif len(args) > 1:
            if args[-1] is None:  # it is what the op takes it to be without being told
                args = args[:-1]
            if not all([isinstance(item, torch.Tensor) for item in args]):
                return NotImplemented
        facts = self._facts.get(id(op)) or self.facts(op)
        if not facts.plain:
            return NotImplemented
        below = self.below
        if below is None:
            out = self._run_plain(facts, args, run_function_alone, function)
            return out if out is not NotImplemented or facts.joined_direct is None else self._run_joined(facts, args)
        out = self._run_plain(facts, args, below.run_function, function)
        return out if out is not NotImplemented else self._run_plain(facts, args, self._run_below)

    def _takes_complex(self, facts: OpFacts, args: tuple[Any, ...]) -> bool:
        """Whether a contraction of complex tensors without a graph may be recorded whole."""
        return facts.with_complex and not any([item.requires_grad for item in args[1] if isinstance(item, torch.Tensor)])

    def make_shaped(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Have the vmap below replay what it has made before: nothing of it is recorded."""
        below = self.below
        calls = getattr(below, "replays_calls", None)
        if below is None or calls is None or self.heard is not None:
            return NotImplemented
        with modes_inside_off(below):
            return calls(func, args)

    def ignores(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> bool:
        """Whether a result has no derivative: of a comparison, or of constants without a graph."""
        if kwargs and ("out" in kwargs or "requires_grad" in kwargs):
            return False
        for item in (*args, *kwargs.values()) if kwargs else args:
            kind = item.__class__
            if kind is torch.Tensor:
                if item.requires_grad:
                    return False
            elif kind is list or kind is tuple:
                if not all([n.__class__ in _NUMBERS for n in item]):
                    return False
            elif isinstance(item, (torch.Tensor, list, tuple)):
                return False
        return func in COMPARISONS or func in SHAPED or not self._any_active(args, kwargs)

    def ignores_below(self, args: tuple[Any, ...]) -> bool:
        """Whether what is converted has no derivative and no graph."""
        return not any([isinstance(item, torch.Tensor) and (item.requires_grad or self.is_active(item)) for item in args])

    def note_ignored(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None, out: Any) -> None:
        """A mask that depends on the inputs is a value, though it has no derivative."""
        self._note_derived(args, kwargs, out)

    def run_op(self, op: OpOverload, args: tuple[Any, ...], named: tuple[tuple[str, Any], ...] = ()) -> Any:
        """Run an op, and record it."""
        facts = self._facts.get(id(op)) or self.facts(op)
        if _any_autocast():
            return NotImplemented
        if named:
            return self._run_named(facts, args, dict(named))
        if not facts.plain:
            return self._run_uncommon(facts, args)
        if facts.joined is not None and have_stored_graphs(args):
            return NotImplemented
        if COMPILED:
            out = self._run_common(facts, args)
            if out is not NotImplemented:
                return out
        if self.below is not None:
            return self._run_plain(facts, args, self._run_below)
        out = self._run_plain(facts, args, self._run_view if facts.is_view else run_alone)
        return out if out is not NotImplemented or facts.joined_direct is None else self._run_joined(facts, args)

    def stands_on_level(self) -> bool:
        """Whether this is the innermost mode, on a vmap that nothing is around, and what runs is recorded without more ado."""
        return (
            self._depth == 2 and _count_modes() == 2 and self.heard is None and not self.meets_saved
            and not (self.respect_no_grad and not _is_grad_enabled()) and not _any_autocast()
        )  # fmt: skip

    def _run_named(self, facts: OpFacts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An op with arguments that are given by name only, where no other mode has to see it."""
        if self.below is not None or facts.is_view or not are_plain(args):
            return NotImplemented
        if not facts.plain and (facts.whole is None or not facts.whole(args, self.kernels, self.is_active)):
            return NotImplemented
        out = facts.fast(*args, **kwargs)
        if not self.is_blocked(args, kwargs):
            self._record(facts, args, kwargs, out)
        return out

    def _run_joined(self, facts: OpFacts, args: tuple[Any, ...]) -> Any:
        """An op of tensors with a graph, in parts that torch's autograd may see as they are."""
        if not are_plain(args, joined=True) or not self.joins(args) or not self._any_active(args, None):
            return NotImplemented
        outer, self._origin = self._origin, self._origin or facts.op
        try:
            return facts.joined_direct(self._run_part_at_once, *args)  # type: ignore[misc]
        finally:
            self._origin = outer

    def _run_uncommon(self, facts: OpFacts, args: tuple[Any, ...]) -> Any:
        """An op that is a constant, recorded in parts, or a write."""
        inactive, below = facts.inactive, self.below
        if facts.writes:
            if self.heard is not None:
                self.heard.append(None)
            return self.alias.write_plainly(facts, args) if below is None and are_plain(args) else NotImplemented
        if not inactive and facts.direct is None and facts.whole is None:
            return NotImplemented
        if below is not None:
            if inactive:
                # Torch shows `detach` to the modes otherwise.
                out = NotImplemented if facts.is_view else below.run_op(facts.op, args)
                return out if out is NotImplemented else self._note_inactive(facts, args, out)
        elif not are_plain(args, joined=not inactive and _is_grad_enabled()):
            return NotImplemented
        if inactive:
            if not facts.is_view:
                return self._note_inactive(facts, args, facts.fast(*args))
            with _ForceDispatchKeyGuard(*self._outside):
                # Torch shows `detach` to the modes otherwise.
                without_handlers(True)
                out = facts.fast(*args)
            self.pending.append((facts.op, args, None, out))
            return self._note_inactive(facts, args, out)
        if facts.whole is not None and facts.whole(args, self.kernels, self.is_active):
            if COMPILED and (out := self._run_common(facts, args)) is not NotImplemented:
                return out
            alone = self._run_view if facts.is_view else run_alone
            return self._run_plain(facts, args, alone if below is None else self._run_below)
        if facts.direct is None or (not facts.is_view and not self._any_active(args, None)):
            return NotImplemented
        outer, self._origin = self._origin, self._origin or facts.op
        try:
            return facts.direct(self._run_part_at_once, *args)  # type: ignore[misc]
        finally:
            self._origin = outer

    def _note_inactive(self, facts: OpFacts, args: tuple[Any, ...], out: Any) -> Any:
        self._hear(facts, args, None, out)
        if not facts.shaped:
            self._note_derived(args, None, out)
        return out

    def _run_part_here(self, op: OpOverload, *args: Any, **kwargs: Any) -> Any:
        """Run and record a part of an op, where torch's handlers are off."""
        out = NotImplemented if kwargs else self.run_op(op, args)
        if out is not NotImplemented:
            return out
        without_handlers(False)
        try:
            if not any([_mode_at(place) is self for place in range(_count_modes())]):  # torch has called this tape's own handler
                return self.__torch_dispatch__(op, (), args, kwargs)
            with modes_inside_off(self):  # a vmap inside of this tape has handed the call on
                return op._op(*args, **kwargs)
        finally:
            without_handlers(True)

    def _run_below(self, facts: OpFacts, args: tuple[Any, ...]) -> Any:
        assert self.below is not None
        out = self.below.run_op(facts.op, args)
        if facts.is_view and out is not NotImplemented:
            self.pending.append((facts.op, args, None, out))
        return out

    def _run_view(self, facts: OpFacts, args: tuple[Any, ...]) -> Any:
        # Autograd must see views, so that writes through them are counted as writes.
        with _ForceDispatchKeyGuard(*self._outside):
            out = facts.fast(*args)
        self.pending.append((facts.op, args, None, out))
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
        touched = joined = False
        new: list[int] | None = None
        lowered: list[Any] = []
        add = lowered.append
        for item in args:
            slot = known(id(item))
            if slot is not None:
                if item.is_complex():
                    return NotImplemented
                joined = joined or item.requires_grad
                if active[slot]:
                    touched = True
                add(SLOTS[slot] if slot < 4096 else Slot(slot))
                continue
            kind = item.__class__
            if kind in PLAIN:
                add(item)
                if item == 0 and kind is float:
                    self._mark_sign(item)
            elif isinstance(item, torch.Tensor):
                if item.is_complex() or (kind is not torch.Tensor and is_elsewhere(item)):
                    return NotImplemented
                joined = joined or item.requires_grad
                if new is None:
                    new = []
                new.append(len(lowered))
                add(None)
            elif (kind is list or kind is tuple) and (not item or item[0].__class__ is int):
                add(tuple(item))
            elif kind is list and isinstance(item[0], torch.Tensor):
                for one in item:
                    if not isinstance(one, torch.Tensor) or one.is_complex():
                        return NotImplemented
                    joined = joined or one.requires_grad
                    slot = known(id(one))
                    if slot is None:
                        if one.__class__ is not torch.Tensor and is_elsewhere(one):
                            return NotImplemented
                    elif active[slot]:
                        touched = True
                if new is None:
                    new = []
                new.append(len(lowered))
                add(None)
            else:
                return NotImplemented
        if not joined:
            out = run(facts if given is None else given, args)
        elif not _is_grad_enabled() or not self._joins_whole(facts, args):
            return NotImplemented
        elif self.below is None or run is run_alone:  # torch's own autograd has to see the call
            with _ForceDispatchKeyGuard(*self._outside):
                if facts.joining == LINEAR and args[0].dim() == 1:
                    out = linear_of_vector(*args)
                elif facts.alone is not None:
                    without_handlers(True)  # torch shows them how results are kept otherwise
                    out = facts.alone(*args)
                else:
                    out = run(facts if given is None else given, args)
        else:  # the mode below shows it to autograd
            out = run(facts if given is None else given, args)
        if out is NotImplemented:
            return out
        if self.heard is not None:
            self._hear(facts, args, None, out, None if joined else False)
        if self.respect_no_grad and not _is_grad_enabled():
            self._note_blocked(args, None)
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
                    lowered[position] = SLOTS[slot] if slot < 4096 else Slot(slot)
        if touched:
            if isinstance(out, torch.Tensor) and (dtype := out.dtype).is_floating_point:
                # What append_record does, without the call.
                slot = len(active)
                self.values.append(out)
                active.append(True)
                self.slots[id(out)] = slot
                arguments = tuple(lowered)
                self.key.append((facts, arguments, (), out.shape, dtype))
                self.records.append(_new(Record, (facts.op, arguments, (), (slot,), False, self._origin)))
            else:
                self.append_record(facts, tuple(lowered), (), out)
        elif self._derived:
            self._note_derived(args, None, out)
        return out

    def _joins_whole(self, facts: OpFacts, args: tuple[Any, ...]) -> bool:
        """Whether torch's autograd keeps no values of a call but the arguments and the result (see ``OpFacts.joining``)."""
        if facts.joined is not None:
            return facts.alone is not None and self.below is None and self._depth == 1 and may_join(facts.op, args)
        if facts.joining in (WHOLE, PARTS):
            return facts.joining == WHOLE
        first, second = args[0], args[1]
        if self.below is not None:  # what is kept belongs to the stored tensors, of which no tape knows
            return True
        rank = first.dim()
        if facts.joining == LINEAR:
            return second.dim() == 2 and (rank in (1, 2) or (rank > 2 and first.is_contiguous()))
        return second.dim() in (1, 2) if rank == 2 else are_stacked_alike(first, second)
