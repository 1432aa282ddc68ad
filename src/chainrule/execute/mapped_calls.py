"""Calls on mapped tensors as programs on the stored ones: worked out once per signature, then replayed.

A batching strategy is Python that looks at ranks, dimensions and numbers, and then makes a few calls of torch on the stored
tensors. Which calls depends on the signature alone: the function, the shapes, strides and dtypes of the stored tensors and
the values of everything else. The first calls with a signature run the strategy; then the calls that it makes are recorded,
and from there on they are replayed. The compiled handlers (``csrc/calls.h``) look up and replay in the same tables.
"""

from __future__ import annotations

import operator
import sys
import types
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chainrule.batching.entries import OpEntry
from chainrule.batching.mode import VmapMode
from chainrule.batching.tensor import BatchTensor, _make_wrapper, wrap_batched, wrap_constant
from chainrule.capture.composites import warnings_noted
from chainrule.capture.recorder import Recorder
from chainrule.dispatch import undispatched, without_handlers
from chainrule.execute.mapped_signatures import TENSORS, signature_number, signature_of
from chainrule.execute.replay import Runner, Source, compile_program
from chainrule.execute.simplify import root
from chainrule.function_arguments import READINGS
from chainrule.function_bodies import body_of
from chainrule.function_globals import calls_torch
from chainrule.maps.staging import Program, Ref, Staged
from chainrule.modes_off import without_innermost, without_modes
from chainrule.rules.batching_base import Batched, stand_for_views, stands_for_view
from chainrule.shortcuts import configure

#: Calls with a signature before it is recorded, which takes as long as some tens of calls.
_UNRECORDED = 2

#: Signatures that are kept; then all are forgotten.
_MOST = 4096

#: The kinds of functions that are calls of torch. What torch has in Python is one call, too; other functions are entered.
_CALLS = frozenset({types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType})

#: Which memory is viewed is not in a signature; ``data`` has meanings of its own.
_OTHERS = frozenset(
    {torch.as_strided, Tensor.as_strided, torch.as_strided_scatter, Tensor.as_strided_scatter, Tensor.data.__get__}  # type: ignore[attr-defined]
)

#: Signatures of tensors with a graph are recorded on copies of them; of what is larger than this, in bytes, none are made.
_LARGEST_COPY = 1 << 24

#: Stops derivatives; it is nothing to those who simplify programs.
_DETACH = torch.ops.aten.detach.default._op

#: Calls that stop derivatives inside, which a record of what they run does not say.
_STOPPING = frozenset({torch.cosine_similarity})

_grad_enabled = torch.is_grad_enabled
_any_autocast = torch._C._is_any_autocast_enabled



class Kind(NamedTuple):
    """What a result is; the fields are known to the compiled handlers.

    Attributes:
        shares: whether it shares memory with an argument, and so begins where that says.
        sample: the shape of one sample.
        strides: the strides of one sample, or None if the whole is contiguous and memory of its own.
        dtype: the dtype.
        device: the device, or None for the CPU.
        plain: whether the compiled handlers may know dtype and shape of it.
        number: the number of its signature.
        batched: whether it carries the batch; otherwise it is the same for all samples, and memory of its own.
    """

    shares: bool
    sample: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: torch.dtype
    device: torch.device | None
    plain: bool
    number: int
    batched: bool


class Replay(NamedTuple):
    """The calls of one signature, on the stored tensors.

    Attributes:
        run: from the stored tensors to the results; None for a call that is none of the level's.
        kinds: what the results are; without `run` the place of the argument that is the result, or -1 if the function is
            called as it is, on tensors without the batch.
        several: None for one result, else what makes the results of a list of them.
        single: the same as `run` where that is one call (see :func:`_single`), or None.
    """

    run: Runner | None
    kinds: tuple[Kind, ...] | int
    several: Any
    single: tuple[Any, ...] | None = None


class _Missing(NamedTuple):
    """Makes the results of a list of tensors, with None where no tensor is.

    Attributes:
        kind: their class.
        missing: where None stands.
    """

    kind: Any
    missing: tuple[bool, ...]

    def __call__(self, found: list[Any]) -> Any:
        given = iter(found)
        return self.kind([None if missing else next(given) for missing in self.missing])


def _noting(function: Any, warned: list[bool]) -> Any:
    """Note whether a function that is written in Python gives a warning."""
    return warnings_noted(lambda: warned.append(True)) if function.__class__ is types.FunctionType else nullcontext()


class MappedCalls:
    """The calls that are known, for all levels of vmap."""

    def __init__(self) -> None:
        # By signature: a replay, how often it was called, or None where it cannot be replayed.
        self.known: dict[Any, Replay | int | None] = {}
        # Functions that return no tensors, or write.
        self._never: set[Any] = set(_OTHERS)
        # Torch's functions that are written in Python, which the compiled handlers replay as well once they are known.
        self.written: set[Any] = set()

    def __call__(self, mode: VmapMode, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        """Call a function of mapped tensors; NotImplemented, with nothing done, leaves it to its own way.

        Args:
            mode: the level, the only mode that is on.
            function: the function.
            args: its positional arguments.
            kwargs: its keyword arguments.
        """
        kind: Any = function.__class__
        composed = kind is types.FunctionType and body_of(function) is not None
        written = (composed or (kind is types.FunctionType and function in READINGS)) and sys.getprofile() is None
        if not (written or kind in _CALLS) or function in self._never or mode.graphs or _any_autocast():
            return NotImplemented
        if kwargs and kwargs.get("out") is not None:  # a target that is the same for all samples gets other memory
            return NotImplemented
        values: list[Tensor] = []
        key = signature_of(function, mode, args, kwargs, values)
        if key is None:
            return NotImplemented
        joined = _have_graphs(values)
        if joined and ((written and not composed) or not _grad_enabled()):
            return NotImplemented
        if written and self.known.get(key, 0) is not None and not calls_torch(function):
            return NotImplemented
        replay = self._find(key, values)
        if isinstance(replay, Replay):
            if replay.kinds.__class__ is int and replay.kinds >= 0:
                return args[replay.kinds]
            without_handlers(True)
            try:
                if replay.run is None:
                    return function(*args, **(kwargs or {}))
                return _replayed(replay, mode, values)
            finally:
                without_handlers(False)
        if not replay:
            return NotImplemented
        if joined:
            return self._record_joined(key, mode, function, args, kwargs, values)
        loops = len(mode.fallbacks)
        recorder = _recorder(values)
        warned: list[bool] = []
        with without_innermost(), recorder, mode.resumed(guarded=True), _noting(function, warned):
            result = function(*args, **(kwargs or {}))
        if warned:  # which a replay would leave out
            return result
        if result.__class__ is not BatchTensor and not _is_tensors(result) or _writes(function):
            self._never.add(function)
        elif len(mode.fallbacks) == loops:
            after: list[Tensor] = []
            signature_of(function, mode, args, kwargs, after)
            same = len(after) == len(values) and all(map(operator.is_, after, values))  # else an argument was written
            if written:
                self.written.add(function)
            self.known[key] = _replay(function, recorder, result, mode, args, kwargs, joined=False) if same else None
        return result

    def _record_joined(
        self, key: Any, mode: VmapMode, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None, values: list[Tensor]
    ) -> Any:
        """Record a call on copies of its tensors without graphs: what autograd makes of views is not known to a recorder."""
        if function in _STOPPING or _writes(function):
            return NotImplemented
        copies = _copies(values)
        if copies is None:
            return NotImplemented
        bare = [_bare(item, mode, copies) for item in args]
        named = {name: _bare(item, mode, copies) for name, item in (kwargs or {}).items()}
        loops = len(mode.fallbacks)
        recorder = _recorder([copies[id(value)] for value in values])
        warned: list[bool] = []
        with without_innermost(), _same_random_numbers(values), recorder, mode.resumed(guarded=True), _noting(function, warned):
            found = function(*bare, **named)
        if len(mode.fallbacks) > loops or warned:
            del mode.fallbacks[loops:]
            return NotImplemented
        if function.__class__ is types.FunctionType:
            self.written.add(function)
        return self._keep_joined(key, _replay(function, recorder, found, mode, bare, kwargs, joined=True), mode, values)

    def _keep_joined(self, key: Any, replay: Replay | None, mode: VmapMode, values: list[Tensor]) -> Any:
        """Keep what was recorded without graphs if its results join those of the tensors; returns them."""
        if replay is None or replay.run is None:
            self.known[key] = replay
            return NotImplemented
        result = _replayed(replay, mode, values)
        leaves = [result] if isinstance(result, BatchTensor) else [leaf for leaf in result if leaf is not None]
        if not all([leaf.value.requires_grad or not leaf.value.is_floating_point() for leaf in leaves]):
            return NotImplemented
        self.known[key] = replay
        return result

    def op(
        self,
        mode: VmapMode,
        entry: OpEntry,
        args: Sequence[Any],
        inner: list[Any],
        kwargs: dict[str, Any] | None = None,
        named: dict[str, Any] | None = None,
    ) -> Any:
        """Run an op by its strategy, likewise. The modes' handlers are off, and autograd may be.

        Args:
            mode: the outermost level, and the mode below the one that is innermost.
            entry: the op.
            args: its arguments, of which one is mapped.
            inner: the same as its strategy takes them.
            kwargs: its keyword arguments.
            named: the same as its strategy takes them.
        """
        values: list[Tensor] = []
        key = signature_of(entry.op, mode, args, kwargs, values)
        if key is None or entry.strategy is None:
            return NotImplemented
        joined = _have_graphs(values)
        if joined and not _grad_enabled():
            return NotImplemented
        replay = self._find(key, values)
        if isinstance(replay, Replay):
            if not (joined or entry.aliases or any([value.is_complex() for value in values])):
                return _replayed(replay, mode, values)
            with mode.outside():  # autograd has to see views and what has a graph; lazy conjugation is off where handlers run
                return _replayed(replay, mode, values)
        if not replay:
            return NotImplemented
        copies = _copies(values) if joined else None
        if joined:
            if copies is None:
                return NotImplemented
            inner = [_bare(item, mode, copies) for item in inner]
            named = {name: _bare(item, mode, copies) for name, item in (named or {}).items()}
        recorder = _recorder(values if copies is None else [copies[id(value)] for value in values])
        with mode.outside(), without_modes(), recorder:
            result = entry.strategy(entry.op, inner, named or {}, mode.size)
        if result is NotImplemented:
            return result
        wrapped = mode.wrapped(result)
        found = _replay(entry.op, recorder, wrapped, mode, args, kwargs, joined=joined)
        if found is not None and found.run is None:
            found = None
        if joined:
            with mode.outside():
                return self._keep_joined(key, found, mode, values)
        self.known[key] = found
        return wrapped

    def _find(self, key: Any, values: Sequence[Tensor]) -> Replay | bool:
        """What replays a signature, or whether it is to be recorded now."""
        found = self.known.get(key, 0)
        if found is None or isinstance(found, Replay):
            return found or False
        if len(self.known) > _MOST:
            self.known.clear()
        # Torch leaves out what it computes of tensors of zeros that have no memory.
        record = found >= _UNRECORDED and not any([value._is_zerotensor() for value in values])
        self.known[key] = None if record else found + 1
        return record


def _recorder(values: Sequence[Tensor]) -> Recorder:
    """A recorder for which some tensors are the inputs."""
    places = {id(value): number for number, value in enumerate(values)}

    def find(program: Program, tensor: Tensor) -> Staged | None:
        number = places.get(id(tensor))
        return None if number is None else program.input(number, tensor)

    return Recorder(find)


def _writes(function: Any) -> bool:
    """Whether a function by its name writes to its first argument."""
    name = function.__name__
    return name.endswith("_") and not name.endswith("__") or (name.startswith("__i") and name not in ("__invert__", "__index__"))


def _is_tensors(result: Any) -> bool:
    """Whether a result is a plain tensor, or some tensors."""
    return result.__class__ in TENSORS or isinstance(result, (tuple, list))


def _have_graphs(values: Sequence[Tensor]) -> bool:
    """Whether one of the stored tensors has a graph, which the results are to join."""
    return any([value.requires_grad for value in values])


def _copies(values: Sequence[Tensor]) -> dict[int, Tensor] | None:
    """Copies without graphs of some tensors, by the identity of these, with the same strides; None if they are large."""
    found: dict[int, Tensor] = {}
    with undispatched():
        for value in values:
            storage = value.untyped_storage()
            if storage.nbytes() > _LARGEST_COPY:
                return None
            copy = torch.empty(0, dtype=value.dtype, device=value.device)
            found[id(value)] = copy.set_(storage.clone(), value.storage_offset(), value.shape, value.stride())  # type: ignore[call-overload]
    return found


def _bare(item: Any, mode: VmapMode, copies: dict[int, Tensor]) -> Any:
    """An argument with copies in the place of its tensors."""
    kind: Any = item.__class__
    if kind is BatchTensor:
        inner = item.inner
        if inner.__class__ is Batched:
            return wrap_batched(_bare(inner, mode, copies), mode)
        return wrap_constant(copies[id(inner)], mode)
    if kind is Batched:
        return Batched(copies[id(item.value)])
    if kind in TENSORS:
        return copies[id(item)]
    if kind is slice:
        return slice(*[_bare(part, mode, copies) for part in (item.start, item.stop, item.step)])
    return kind([_bare(part, mode, copies) for part in item]) if kind is list or kind is tuple else item


def _same_random_numbers(values: Sequence[Tensor]) -> Any:
    """Run a block that leaves the generators of random numbers as they were."""
    places = {value.device.index for value in values if value.device.type == "cuda"}
    return torch.random.fork_rng(devices=sorted(place for place in places if place is not None))


def _has_mapped(items: Sequence[Any]) -> bool:
    """Whether tensors of a level are among some arguments."""
    return any([
        item.__class__ is BatchTensor or (item.__class__ is list or item.__class__ is tuple) and _has_mapped(item)
        for item in items
    ])  # fmt: skip


def _replay(
    function: Any, recorder: Recorder, result: Any, mode: VmapMode, args: Sequence[Any], kwargs: dict[str, Any] | None, *,
    joined: bool,
) -> Replay | None:
    """What was recorded as something that can be run again, if it can; where ``joined``, on tensors with a graph."""
    if not (isinstance(result, BatchTensor) or _is_tensors(result)):
        return None
    leaves: list[Any] = [result] if isinstance(result, Tensor) else [leaf for leaf in result if leaf is not None]
    if not leaves and len(result):
        return None
    if not recorder.pure and not (leaves and function is torch.tensor):  # the recorder has not seen where its values come from
        return None
    if leaves and all([leaf.__class__ in TENSORS for leaf in leaves]):
        own = _has_mapped(args) or _has_mapped([*(kwargs or {}).values()])
        return None if own else Replay(None, -1, None)
    if not recorder.program.instructions:
        place = next((place for place, item in enumerate(args) if item is result), None)
        if place is not None:
            return Replay(None, place, None)
    given = {id(item) for item in args}
    if not all(leaf.__class__ is BatchTensor and leaf.level is mode for leaf in leaves):
        return None
    if any(id(leaf) in given for leaf in leaves):
        return None
    program = recorder.program
    if joined and any(instruction.function is _DETACH for instruction in program.instructions):
        return None
    staged = [_of_its_own(recorder, leaf) for leaf in leaves]
    producers = {slot: instruction for instruction in program.instructions for slot in instruction.outputs}
    inputs = set(program.inputs.values())
    for instruction in program.instructions:
        if any(root(program, producers, slot) in inputs for slot in instruction.writes):
            return None
    kinds: list[Kind] = []
    copies: list[bool] = []
    for leaf, found in zip(leaves, staged, strict=True):
        if found is None:
            return None
        source = root(program, producers, found.slot)
        if source in program.constants or source in inputs and found.slot == source:
            return None
        value, batched = leaf.value, leaf.batched
        copies.append(source not in inputs and stands_for_view(value))
        shares = found.slot in program.views or found.slot in program.shares
        if shares and not batched and len(leaves) == 1 and source not in inputs:
            shares = False  # with nothing but what this call has made
        if not batched and (shares or joined or value.__class__ is not Tensor or value.requires_grad):
            return None
        number = signature_number(value)
        if number is None:
            return None
        whole, cpu = value.is_contiguous(), value.device.type == "cpu"
        kinds.append(
            Kind(
                shares, tuple(value.shape[1:]), None if whole and not shares else value.stride()[1:], value.dtype,
                None if cpu else value.device,
                whole and not shares and cpu and not joined and value.dtype.is_floating_point, number, batched,
            )
        )  # fmt: skip
    runner = compile_program(program, staged, views=True)
    # The tensors of this run are not kept.
    program._input_values.clear()
    plain = runner.plain  # type: ignore[attr-defined]
    # A single call would not note that its result is a copy.
    single = None if any(copies) else _single(runner.source_of, joined=joined)  # type: ignore[attr-defined]
    del runner.source_of  # type: ignore[attr-defined]
    if any(copies):
        runner, plain = _noting_copies(runner, copies), _noting_copies(plain, copies)
    several: Any = None if isinstance(result, BatchTensor) else type(result)
    if several is not None and len(leaves) < len(result):
        several = _Missing(several, tuple([leaf is None for leaf in result]))
    return Replay(runner if joined else plain, tuple(kinds), several, single)


#: What an argument of a single call is: something that stays, the value of a number, a list or a tuple of such.
_FIXED, _VALUE, _LIST, _TUPLE = range(4)


def _single(source: Source, *, joined: bool) -> tuple[Any, ...] | None:
    """A program of one call and one result for the compiled handlers: the function, its arguments, the names of the last."""
    calls = source.kept if joined or source.plain is None else source.plain
    if len(calls) != 1 or source.copied or calls[0].is_tuple or list(calls[0].outputs) != source.wanted:
        return None
    numbers = {slot: key for key, slot in source.program.inputs.items() if isinstance(key, int)}

    def argument(item: Any) -> tuple[int, Any]:
        if isinstance(item, Ref):
            return (_VALUE, numbers[item.slot]) if item.slot in numbers else (_FIXED, source.constants[item.slot])
        if item.__class__ is list or item.__class__ is tuple:
            parts = tuple([argument(part) for part in item])
            if all([kind == _FIXED for kind, _ in parts]):
                return _FIXED, item.__class__([content for _, content in parts])
            return (_LIST if item.__class__ is list else _TUPLE), parts
        return _FIXED, item

    named = calls[0].kwargs
    return calls[0].function, tuple([argument(item) for item in (*calls[0].args, *named.values())]), tuple(named) or None


def _noting_copies(run: Runner, copies: Sequence[bool]) -> Runner:
    """A replay some of whose results are copies where torch has views."""
    def noting(values: Any, seeds: Any) -> tuple[Any, ...]:
        results = run(values, seeds)
        for result, copy in zip(results, copies, strict=True):
            if copy:
                stand_for_views(result)
        return results

    return noting


def _of_its_own(recorder: Recorder, leaf: BatchTensor) -> Staged | None:
    """What a result is in a program; a copy of a constant that is the same for all samples, which the function may write to."""
    value = leaf.value
    found = recorder.staged(value)
    program = recorder.program
    if leaf.batched or found is None or found.slot not in program.constants:
        return found
    made: dict[int, Staged] = {}
    with undispatched():
        program.constants[found.slot] = value.clone()  # the function has the first one, too
        program.append(torch.clone, (found,), {}, copy := value.clone(), made)
    return made[id(copy)]


def _replayed(replay: Replay, mode: VmapMode, values: list[Tensor]) -> Any:
    """The results for stored tensors of this signature."""
    assert replay.run is not None
    found = replay.run(values, ())
    results = [_wrapped(value, kind, mode) for value, kind in zip(found, replay.kinds, strict=True)]  # type: ignore[arg-type]
    return results[0] if replay.several is None else replay.several(results)


def _wrapped(value: Tensor, kind: Kind, mode: VmapMode) -> BatchTensor:
    if not kind.batched:
        return wrap_constant(value, mode)
    batched = Batched(value)
    batched.signature = kind.number
    offset = value.storage_offset() if kind.shares else None
    tensor: BatchTensor = _make_wrapper(
        BatchTensor, kind.sample, kind.strides, offset, None, kind.dtype, torch.strided, kind.device or torch.device("cpu")
    )
    tensor.inner = batched
    tensor.level = mode
    if kind.plain:
        batched.dtype, batched.sample = kind.dtype, kind.sample
    return tensor


#: What all levels use.
CALLS = MappedCalls()
configure(wrap_constant=wrap_constant, calls=_CALLS, known=CALLS.known, size=torch.Size, written=CALLS.written)
