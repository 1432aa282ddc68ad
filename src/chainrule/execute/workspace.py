"""The work space of calls: what they allocate and free themselves, observed by running them once beside the allocator.

A kernel's work space depends on shapes, dtypes and layouts, but no formula gives it: libraries choose algorithms, copy
what is not contiguous, loop over rows. Where a prediction is asked for (``explain``, ``max_memory``), the calls of a plan
are run once more, one after the other, and torch's allocator says what each of them held at most beside its results.
Nothing is run for a plain call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload

from chainrule.batching.mode import VmapMode
from chainrule.batching.tensor import BatchTensor
from chainrule.calls import FUNCTIONS
from chainrule.capture.recorder import HIDDEN_WRITES
from chainrule.capture.slots import Slot
from chainrule.capture.tape import Tape
from chainrule.maps.staging import Instruction, Ref, reads

_ENABLE = getattr(torch.autograd, "_enable_profiler_legacy", None)
_DISABLE = getattr(torch.autograd, "_disable_profiler_legacy", None)


def observable(*, undispatched: bool = False) -> bool:
    """Whether calls can be run once more here and observed: the allocator's events are free, and no mode would see them.

    Args:
        undispatched: whether the modes that are on are kept from seeing calls.
    """
    seen = torch._C._len_torch_dispatch_stack() and not undispatched
    return free() and not seen and not torch._C._are_functorch_transforms_active()


def mapped_observable() -> bool:
    """Whether calls on mapped tensors can be run once more here and observed: nothing but mappings would see them."""
    modes = {torch._C._get_dispatch_stack_at(place).__class__ for place in range(torch._C._len_torch_dispatch_stack())}
    return modes == {VmapMode} and free() and not torch._C._are_functorch_transforms_active()


def free() -> bool:
    """Whether nothing else listens to the allocator on this thread."""
    return _ENABLE is not None and _DISABLE is not None and not torch._C._autograd._profiler_enabled()


class Space(NamedTuple):
    """What a call allocated, in bytes.

    Attributes:
        work: the most that it held beyond its results.
        results: its results (an allocator may give more than was asked for, and some kernels ask for more).
    """

    work: int
    results: int


def observe(call: Callable[[], Any]) -> tuple[Any, Space]:
    """Run a call, and say what it allocated."""
    assert _ENABLE is not None and _DISABLE is not None
    kind = torch.autograd.ProfilerState.CPU  # type: ignore[attr-defined]
    config = torch.autograd.ProfilerConfig(  # type: ignore[attr-defined]
        kind, False, True, False, False, False, torch._C._profiler._ExperimentalConfig()
    )
    _ENABLE(config)
    try:
        result = call()
    finally:
        threads = _DISABLE()
    held = peak = 0
    for events in threads:
        for event in events:
            if event.kind() == "memory_alloc":
                held += event.cpu_memory_usage() + event.cuda_memory_usage()
                peak = max(peak, held)
    held = max(held, 0)
    return result, Space(peak - held, held)


class Saved(NamedTuple):
    """What torch's autograd keeps for the graph of a call's results.

    Attributes:
        slots: those of its arguments and results that are kept.
        beside: the bytes of other memory.
        space: what the call allocated beside that, with a graph: some calls go another way then.
    """

    slots: tuple[int, ...]
    beside: int
    space: Space | None = None


def saved_by(call: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, dict[int, int]]:
    """The results of a call, and the memory that autograd keeps for their graph: its bytes, by its identity.

    The graph is that of this call alone.
    """
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = call(*_own_leaves(args), **{name: _own_leaves(item) for name, item in kwargs.items()})
    return result, found


def _own_leaves(tree: Any) -> Any:
    if isinstance(tree, BatchTensor):  # its graph is that of the tensor behind it
        return tree
    if isinstance(tree, torch.Tensor):
        return tree.detach().requires_grad_() if tree.requires_grad else tree
    return type(tree)(map(_own_leaves, tree)) if type(tree) in (list, tuple) else tree


def saved_by_instructions(instructions: Sequence[Instruction], values: Mapping[int, Any]) -> dict[int, Saved]:
    """What autograd keeps of instructions, by the first slot that each makes; those without a graph are left out.

    Args:
        instructions: those of a program that :func:`of_instructions` can run.
        values: its inputs and constants, by slot.
    """
    known, found = dict(values), dict[int, Saved]()
    for instruction, dead in _in_turn(instructions):
        if all(slot in known for slot in reads(instruction)) and instruction.outputs:
            # What is written to is no leaf of a graph.
            given = {**known, **{slot: known[slot].detach() for slot in instruction.writes if slot in known}}
            args = _filled(instruction.args, given)
            named = {name: _filled(item, given) for name, item in instruction.kwargs.items()}
            (result, kept), space = observe(partial(saved_by, instruction.function, args, named))
            results = result if instruction.is_tuple else (result,)
            known.update(zip(instruction.outputs, results, strict=True))
            if any(isinstance(item, torch.Tensor) and item.requires_grad for item in results):
                near = {slot: _memory(known[slot]) for slot in (*reads(instruction), *instruction.outputs)}
                beside = sum(size for memory, size in kept.items() if memory not in near.values())
                slots = tuple(slot for slot, memory in near.items() if memory in kept)
                found[instruction.outputs[0]] = Saved(slots, beside, space._replace(results=max(space.results - beside, 0)))
            del args, named, given, result, results
        for slot in dead:
            known.pop(slot, None)
    return found


@contextmanager
def same_draws(instructions: Sequence[Instruction], values: Iterable[Any]) -> Iterator[None]:
    """Random numbers that instructions draw inside are drawn again afterwards.

    Args:
        instructions: the instructions.
        values: what they work on.
    """
    if not any(i.keep and i.outputs for i in instructions):
        yield
        return
    devices = {value.device for value in values if isinstance(value, torch.Tensor) and value.is_cuda}
    with torch.random.fork_rng(sorted(device.index or 0 for device in devices)):
        yield


def _memory(value: Any) -> int:
    value = _stored(value)
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) and _is_plain(value) else -1


def _in_turn(instructions: Sequence[Instruction]) -> Iterator[tuple[Instruction, Sequence[int]]]:
    """Instructions, each with the slots that no later one names."""
    last: dict[int, int] = {}
    for number, instruction in enumerate(instructions):
        for slot in (*reads(instruction), *instruction.outputs):
            last[slot] = number
    dying: dict[int, list[int]] = {}
    for slot, number in last.items():
        dying.setdefault(number, []).append(slot)
    for number, instruction in enumerate(instructions):
        yield instruction, dying.get(number, ())


def of_instructions(instructions: Sequence[Instruction], values: Mapping[int, Any]) -> dict[int, Space] | None:
    """What instructions allocate, by the first slot that each makes.

    Args:
        instructions: those of a program, in their order; those that need something not given are left out.
        values: its inputs and constants, by slot.

    Returns:
        What was found; None if the instructions cannot be run just so: they write to what was there before, draw random
        numbers of a user's generator, or work on batched tensors.
    """
    if any(isinstance(item, torch.Generator) for i in instructions if i.keep for item in (*i.args, *i.kwargs.values())):
        return None
    theirs = {_memory(value) for value in values.values()}
    if any(isinstance(value, torch.Tensor) and not _is_plain(value) for value in values.values()):
        return None
    known, found = dict(values), dict[int, Space]()
    with torch.no_grad():
        for instruction, dead in _in_turn(instructions):
            if all(slot in known for slot in reads(instruction)) and (instruction.outputs or instruction.writes):
                if any(_memory(known[slot]) in theirs for slot in _written(instruction, known)):
                    return None
                args = _filled(instruction.args, known)
                named = {name: _filled(item, known) for name, item in instruction.kwargs.items()}
                result, space = observe(partial(instruction.function, *args, **named))
                if instruction.outputs:
                    found[instruction.outputs[0]] = space
                    known.update(zip(instruction.outputs, result if instruction.is_tuple else (result,), strict=True))
                del args, named, result
            for slot in dead:
                known.pop(slot, None)
    return found


def _written(instruction: Instruction, known: Mapping[int, Any]) -> list[int]:
    """What an instruction writes to, by slots that are known: a chain of views may have become one that has another."""
    return [slot if slot in known else reads(instruction)[0] for slot in instruction.writes]


def of_run(tape: Tape) -> list[int]:
    """The work space of the ops on a tape, one after the other; 0 where it cannot be observed."""
    return [_of_record(tape, record) for record in tape.records]


def saved_by_run(tape: Tape) -> list[tuple[torch.Tensor, set[int], int]]:
    """What autograd keeps of the ops on a tape that have a graph.

    Returns:
        For each such op a result, which of the tape's memory is kept, by its identity, and the bytes of other memory.
    """
    found = []
    for record in tape.records:
        op, results = record.op, [tape.values[slot] if slot >= 0 else None for slot in record.outputs]
        if not isinstance(op, OpOverload) or op in HIDDEN_WRITES or op._schema.is_mutable:
            continue
        stored = [value for value in results if isinstance(value, torch.Tensor) and _is_plain(_stored(value))]
        joined = [value for value in stored if _stored(value).requires_grad]
        if not joined or torch.Tag.nondeterministic_seeded in op.tags:
            continue
        args, kwargs = _from_tape(record.args, tape.values), {name: _from_tape(item, tape.values) for name, item in record.kwargs}
        given = _tensors((args, tuple(kwargs.values())))
        if not all(_is_plain(_stored(tensor)) for tensor in given):
            continue
        made, kept = saved_by(op, args, kwargs)
        # Results of this run stand for those on the tape; what else was made is made for the graph.
        places = {_memory(one): _memory(other) for one, other in zip(made if record.is_tuple else (made,), results, strict=True)}
        places.update((memory, memory) for memory in map(_memory, given))
        del made
        beside = sum(size for memory, size in kept.items() if memory not in places)
        found.append((joined[0], {places[memory] for memory in kept if memory in places}, beside))
    return found


def _of_record(tape: Tape, record: Any) -> int:
    op = record.op
    if not isinstance(op, OpOverload) or op.is_view or op in HIDDEN_WRITES or op._schema.is_mutable:
        return 0
    if torch.Tag.pointwise in op.tags or torch.Tag.nondeterministic_seeded in op.tags:
        return 0
    args, kwargs = _from_tape(record.args, tape.values), {name: _from_tape(item, tape.values) for name, item in record.kwargs}
    if not all(_is_plain(_stored(tensor)) for tensor in _tensors((args, tuple(kwargs.values())))):
        return 0
    with torch.no_grad():
        # Of some ops the recorder calls a function in their place.
        return observe(partial(op if kwargs else FUNCTIONS.get(op._op, op), *args, **kwargs))[1].work


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.__class__ in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided


def _stored(tensor: Any) -> Any:
    """What mappings have stored for a tensor."""
    while isinstance(tensor, BatchTensor):
        tensor = tensor.value
    return tensor


def _filled(tree: Any, values: Mapping[int, Any]) -> Any:
    if isinstance(tree, Ref):
        return values[tree.slot]
    if type(tree) in (list, tuple):
        return type(tree)(_filled(item, values) for item in tree)
    return tree


def _from_tape(tree: Any, values: Sequence[Any]) -> Any:
    if isinstance(tree, Slot):
        return values[tree.index]
    return [_from_tape(item, values) for item in tree] if type(tree) is tuple else tree


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [tensor for item in tree for tensor in _tensors(item)] if isinstance(tree, (list, tuple)) else []
