"""Calls that are many ops: which ones is found out once per signature, then the ops are run one after the other.

A function that torch has in Python (``F.multi_head_attention_forward``), or an op that is recorded in parts (``lstm``), looks at
shapes and numbers and then runs ops. Which ops depends on the signature alone: the shapes, strides, dtypes, graphs and activity
of the tensors, and the values of everything else. The first call with a signature is listened to. What it ran is kept as a
:class:`Composite`, without the tensors; the compiled handlers (``csrc/composites.h``) look it up, and run and record these ops.
"""

from __future__ import annotations

import itertools
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch

from chainrule.calls import shared_constant
from chainrule.capture.records import Records
from chainrule.capture.schema import OpFacts
from chainrule.capture.slots import PLAIN, Slots
from chainrule.dispatch import OTHERWISE, TAKEN, LightMode
from chainrule.function_arguments import READINGS
from chainrule.function_bodies import body_of
from chainrule.functions import FACTS, FRESH, MAKING_GRAPHS, REQUIRES_GRAD, TABLE, WRITERS
from chainrule.shortcuts import configure

#: Signatures that are kept; then all are forgotten.
_MOST = 4096

#: Ops that are no steps: the shape of what they return depends on values.
_BY_VALUE = frozenset((torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output))

#: Sorts of results.
_CONSTANT, _PLACE, _SEVERAL = range(3)


#: Dtypes of tensors that are masks where they stand in an index.
_MASKS = (torch.bool, torch.uint8)


def _is_by_value(facts: OpFacts, args: tuple[Any, ...]) -> bool:
    """Whether the shape of what an op returns depends on values."""
    if facts.op is torch.ops.aten.index.Tensor:  # only where it is given a mask
        return any([item is not None and item.dtype in _MASKS for item in args[1]])
    return not _BY_VALUE.isdisjoint(facts.op.tags)


class Step(NamedTuple):
    """An op of a composite; the fields are known to the compiled handlers.

    Attributes:
        facts: the op's.
        args: its arguments, with None for tensors.
        spots: where tensors stand among them.
        places: which ones: the number of an input of the composite, of the result of a step before this one, or a tuple of
            such numbers for a list of tensors (None for one that is missing).
        origin: the op of which it is a part, or None.
        results: how many results it has; None for one that is no tuple.
        how: of an op that is run and recorded, and nothing else, whether torch's autograd sees it; an ellipsis for one that is a
            constant whatever the values of the inputs are; None for others.
        call: the arguments as the cheapest call takes them, as `args`.
        lowered: the arguments as they stand in a record, likewise.
        named: what is given by name, where something is, to an op, or to a check (which returns nothing).
    """

    facts: OpFacts
    args: tuple[Any, ...]
    spots: tuple[int, ...]
    places: tuple[Any, ...]
    origin: Any
    results: int | None
    how: Any
    call: tuple[Any, ...]
    lowered: tuple[Any, ...]
    named: dict[str, Any] | None


class Composite(NamedTuple):
    """The ops of a call; the fields are known to the compiled handlers.

    Attributes:
        steps: the ops in their order.
        result: what is returned: a sort and a content, which is a constant, the number of a tensor, or a class and results.
        places: how many tensors there are, inputs and results of all steps.
        number: stands for the composite in the signature of a tape; none is given twice.
    """

    steps: tuple[Step, ...]
    result: tuple[int, Any]
    places: int
    number: int


#: By signature; None for calls that are not replayed.
COMPOSITES: dict[Any, Composite | None] = {}
_NUMBERS = itertools.count()
configure(composites=COMPOSITES)


class _OtherwiseError(Exception):
    """What was heard is not all that the call does."""


def _composed(
    tape: Slots, values: Sequence[torch.Tensor], heard: Sequence[Any], result: Any, first: int
) -> tuple[Composite, int]:
    """What a call has run.

    Args:
        tape: the tape.
        values: the tensors among the arguments.
        heard: what was run: ``(facts, args, result, origin, how)`` each, and what it gets by name of an op without results;
            or None for something that cannot be run so again.
        result: what the call returned.
        first: how many slots there were before.

    Returns:
        The composite, and how many slots a replay adds.
    """
    known = {id(value): number for number, value in enumerate(values)}
    places = len(values)
    steps: list[Step] = []
    added = 0
    made: set[int] = set()
    constants = {id(value) for value in values if tape.slots.get(id(value), -1) >= first}
    for item in heard:
        if item is None or _is_by_value(*item[:2]):
            raise _OtherwiseError
        facts, args, out, origin, how = item[:5]
        named = item[5] if len(item) > 5 else None
        if out is None:
            steps.append(_check(tape, facts, args, origin, named or {}, known))
            continue
        results = [out] if isinstance(out, torch.Tensor) else out
        if not isinstance(results, (list, tuple)) or not all([isinstance(one, torch.Tensor) for one in results]):
            raise _OtherwiseError
        recorded = [_is_recorded(tape, one) for one in results]
        added += sum(recorded)
        others = [id(one) for one, was in zip(results, recorded, strict=True) if not was]
        if named is not None and (results is out or not _are_plain(named) or (any(recorded) and not facts.plain)):
            raise _OtherwiseError
        constants.update([one for one in others if tape.slots.get(one, -1) >= first])
        if facts.is_view and facts.inactive and id(args[0]) not in known:
            continue  # torch's autograd keeps a result inside of the call that makes it
        if _is_constant(facts, args, results, results is out, recorded, made):
            made.add(id(out))
            how = ...
        elif not (facts.plain and torch.is_grad_enabled() and results and all(recorded)):
            how = None
        how = None if named is not None else how
        step = _step(facts, args, origin, how, None if results is not out else len(results), known)
        steps.append(step._replace(named=named and dict(sorted(named.items()))))
        for one in results:
            known[id(one)] = places
            places += 1
    return Composite(tuple(steps), _result(result, known), places, next(_NUMBERS)), added + len(constants)


def _are_plain(named: dict[str, Any]) -> bool:
    return all([value.__class__ in PLAIN and not (value.__class__ is float and value == 0.0) for value in named.values()])


def _is_constant(
    facts: OpFacts, args: tuple[Any, ...], results: Sequence[Any], several: bool, recorded: Sequence[bool], made: set[int]
) -> bool:
    """Whether a step depends on nothing but the shapes of tensors, and on what such steps have `made` (and on random numbers)."""
    if several or any(recorded) or facts.is_view or facts.writes or results[0].__class__ is not torch.Tensor:
        return False
    if results[0].requires_grad or any([isinstance(arg, (list, tuple)) and any(
        [isinstance(one, torch.Tensor) for one in arg]) for arg in args]):  # fmt: skip
        return False
    return facts.shaped or all([id(arg) in made for arg in args if isinstance(arg, torch.Tensor)])


def _step(
    facts: OpFacts, args: tuple[Any, ...], origin: Any, how: bool | None, results: int | None, known: dict[int, int]
) -> Step:
    given = [_argument(arg, known) for arg in args]
    spots = tuple([spot for spot, (_, place) in enumerate(given) if place is not None])
    places = tuple([given[spot][1] for spot in spots])
    static = tuple([item for item, _ in given])
    lowered = tuple([tuple(item) if item.__class__ is list else item for item in static])
    return Step(facts, static, spots, places, origin, results, how, _called(facts, args, static), lowered, None)


def _check(
    tape: Slots, facts: OpFacts, args: tuple[Any, ...], origin: Any, kwargs: dict[str, Any], known: dict[int, int]
) -> Step:
    """A step that returns nothing: it looks at values, and raises."""
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    if not facts.inactive or any([arg.__class__ is not torch.Tensor or _is_recorded(tape, arg) for arg in tensors]):
        raise _OtherwiseError
    if not _are_plain(kwargs):
        raise _OtherwiseError
    return _step(facts, args, origin, None, 0, known)._replace(named=kwargs)


def _is_recorded(tape: Slots, tensor: torch.Tensor) -> bool:
    slot = tape.slots.get(id(tensor))
    return slot is not None and tape.active[slot]


def _called(facts: OpFacts, args: tuple[Any, ...], static: tuple[Any, ...]) -> tuple[Any, ...]:
    """The static arguments of a call, with a constant in the place of a number that torch would make into one."""
    if facts.numbers and len(args) == 2 and args[1].__class__ is float and args[0].__class__ is torch.Tensor and args[0].is_cpu:
        return static[0], shared_constant(args[1], args[0].dtype)
    return static


def _argument(item: Any, known: dict[int, int]) -> tuple[Any, Any]:
    """What stands in a step for an argument: the argument itself, or the number of a tensor."""
    if isinstance(item, torch.Tensor):
        return None, _number(item, known)
    if isinstance(item, (list, tuple)) and any([isinstance(one, torch.Tensor) for one in item]):
        return None, tuple([None if one is None else _number(one, known) for one in item])
    if item.__class__ in PLAIN or (isinstance(item, (list, tuple)) and all([one.__class__ in PLAIN for one in item])):
        return item, None
    raise _OtherwiseError


def _number(tensor: Any, known: dict[int, int]) -> int:
    number = known.get(id(tensor))
    if number is None:  # it was made in a way that nobody heard
        raise _OtherwiseError
    return number


def _result(item: Any, known: dict[int, int]) -> tuple[int, Any]:
    if isinstance(item, torch.Tensor):
        return _PLACE, _number(item, known)
    if item.__class__ is tuple or item.__class__ is list or item.__class__.__module__ == "torch.return_types":
        return _SEVERAL, (item.__class__, *[_result(one, known) for one in item])
    if item.__class__ in PLAIN:
        return _CONSTANT, item
    raise _OtherwiseError


#: What shows a warning of Python's, and one that torch gives.
_WARNING = ("warn", "_showwarnmsg")


@contextmanager
def warnings_noted(note: Callable[[], None]) -> Iterator[None]:
    """Call `note` when a warning is given in the block: it is given in every call, by Python that a replay leaves out."""

    def look(frame: Any, event: str, called: Any) -> None:
        if called is warnings.warn if event == "c_call" else frame.f_code.co_name in _WARNING:
            note()

    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(None)


class Listening(Records, LightMode):
    """A tape that finds out what composites run.

    Attributes:
        heard: what has run since the call began that is listened to; None while none is.
    """

    heard: list[Any] | None

    def _listen(
        self, key: Any, values: Sequence[torch.Tensor], callee: Any, types: Any, args: tuple[Any, ...],
        kwargs: dict[str, Any] | None,
    ) -> Any:  # fmt: skip
        """Call a function, or run an op given by its facts, for the first time with a signature.

        NotImplemented, with nothing done, leaves the call to its own way.
        """
        is_function = callee.__class__ is not OpFacts
        if sys.getprofile() is not None and (is_function or callee.direct is None):  # warnings are found by a profiler
            return NotImplemented
        if is_function and not (is_heard(callee, args, kwargs) and self._takes(types)):
            return NotImplemented
        heard: list[Any] = []
        self.heard = heard
        first, said = len(self.values), len(self.key)
        try:
            if is_function:
                with warnings_noted(lambda: heard.append(None)):
                    out = self._run_body(callee, types, args, kwargs)
            else:
                out = self._run_uncommon(callee, args)
                if out is NotImplemented and callee.expansion is not None and self.below is None and sys.getprofile() is None:
                    with warnings_noted(lambda: heard.append(None)):
                        out = self._run_part_here(callee.op, *args)
        finally:
            self.heard = None
        if len(COMPOSITES) >= _MOST:
            COMPOSITES.clear()
        composite = None
        with suppress(_OtherwiseError):
            found, added = _composed(self, values, heard, out, first)
            if len(self.values) == first + added:  # a replay gives the same slots
                composite = found
                self.key[said:] = [(found.number, first, *[self.slots.get(id(value), -1) for value in values])]
        COMPOSITES[key] = composite
        return out

    def _hear(self, facts: OpFacts, args: Any, kwargs: dict[str, Any] | None, out: Any, how: bool | None = None) -> None:
        """Note an op that ran, where somebody listens; `how` as in a :class:`Step`."""
        if self.heard is not None:
            step = (facts, args, out, self._origin, how)
            self.heard.append((*step, kwargs) if kwargs else step)

    def _run_step(self, facts: OpFacts, args: tuple[Any, ...], named: dict[str, Any] | None) -> Any:
        """Run an op of a composite that the compiled handlers leave to Python; torch's are off."""
        return self._run_part_here(facts.op, *args, **(named or {}))

    def hear_function(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> None:
        """Note a call that may be more than the ops that it runs."""
        if self.heard is not None and not is_heard(function, args, kwargs):
            self.heard.append(None)

    def _run_uncommon(self, facts: OpFacts, args: tuple[Any, ...]) -> Any:
        raise NotImplementedError

    def _run_part_here(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


_BUILTIN = (types.BuiltinFunctionType, types.MethodDescriptorType, types.MethodWrapperType)

#: Functions that torch composes itself, and of tensors of whole numbers, but by none of their values.
_NOT_BY_VALUES = frozenset(("embedding_bag", "take_along_dim"))


#: Attributes of tensors that are views, which are ops of the same name.
_ATTRIBUTES = {getattr(torch.Tensor, name).__get__: name for name in ("real", "imag", "mH")}


def _name(function: Any) -> str:
    """The name of a function, or of the attribute of tensors that it gets."""
    if function.__class__ is types.MethodWrapperType and function.__name__ == "__get__":
        return _ATTRIBUTES.get(function, "_")
    return str(function.__name__)


def _ops_of(function: Any) -> list[Any]:
    """The ops that have the name of a function, but for those that write to an argument by the name of `out`."""
    packet = getattr(torch.ops.aten, _name(function), None)
    ops = [] if packet is None else [getattr(packet, name) for name in packet.overloads()]
    return [
        op for op in ops
        if torch._C._dispatch_has_kernel(op.name()) and not any([argument.is_out for argument in op._schema.arguments])
    ]  # fmt: skip


def _only_computes(function: Any) -> bool:
    """Whether all that a function of torch is known to do is to compute tensors, none of them at random."""
    if any([function in known for known in (TABLE, READINGS, FACTS, FRESH, WRITERS, MAKING_GRAPHS, TAKEN, OTHERWISE)]):
        return False
    ops = _ops_of(function)
    return bool(ops) and all([_returns_tensors(op._schema) and torch.Tag.nondeterministic_seeded not in op.tags for op in ops])


def _returns_tensors(schema: Any) -> bool:
    written = any([argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments])
    kinds = {str(returned.type) for returned in schema.returns}
    return not written and bool(kinds) and kinds <= {"Tensor", "List[Tensor]"}


class _Composed(dict[Any, bool]):
    """Whether functions of torch outside of the tables come to ops, and nothing else, by way of its dispatcher."""

    def __missing__(self, function: Any) -> bool:
        if not isinstance(function, _BUILTIN) or _name(function).startswith("_"):
            return False
        found = self[function] = _only_computes(function)
        return found


_COMPOSED = _Composed()
configure(composed=_COMPOSED)


def _is_by_numbers(function: Any) -> bool:
    """Whether which ops a function comes to may depend on whole numbers that torch reads in the memory of a tensor."""
    return _name(function) not in _NOT_BY_VALUES and any([op._can_decompose() for op in _ops_of(function)])


def _may_read(item: Any) -> bool:
    """Whether an argument of a function may be a tensor whose values say which ops it runs."""
    if isinstance(item, torch.Tensor):
        return not (item.is_floating_point() or item.is_complex())
    return isinstance(item, (list, tuple)) and any([_may_read(one) for one in item])


def is_heard(function: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> bool:
    """Whether a call does nothing but run ops, which a tape hears, and tells nothing but what a signature says."""
    if function in OTHERWISE or function in TAKEN:
        return False
    if function in FACTS:
        return bool(function != REQUIRES_GRAD)
    if function in TABLE or function in READINGS or body_of(function) is not None:
        return True
    return _COMPOSED[function] and not (_may_read([*args, *(kwargs or {}).values()]) and _is_by_numbers(function))


__all__ = ["COMPOSITES", "Composite", "Listening", "Step", "is_heard", "warnings_noted"]
