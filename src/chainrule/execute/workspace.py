"""The work space of calls: what they allocate and free themselves, observed by running them once beside the allocator.

A kernel's work space depends on shapes, dtypes and layouts, but no formula gives it: libraries choose algorithms, copy
what is not contiguous, loop over rows. Where a prediction is asked for (``explain``, ``max_memory``), the calls of a plan
are run once more, one after the other, and torch's allocator says what each of them held at most beside its results.
Nothing is run for a plain call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload

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


def of_instructions(instructions: Sequence[Instruction], values: Mapping[int, Any]) -> dict[int, Space] | None:
    """What instructions allocate, by the first slot that each makes.

    Args:
        instructions: those of a program, in their order; those that need something not given are left out.
        values: its inputs and constants, by slot.

    Returns:
        What was found; None if the instructions cannot be run just so: they write to what was there before, draw random
        numbers, or work on batched tensors.
    """
    if any(i.writes or i.keep for i in instructions):
        return None
    if any(isinstance(value, torch.Tensor) and not _is_plain(value) for value in values.values()):
        return None
    last: dict[int, int] = {}
    for number, instruction in enumerate(instructions):
        for slot in (*reads(instruction), *instruction.outputs):
            last[slot] = number
    dying: dict[int, list[int]] = {}
    for slot, number in last.items():
        dying.setdefault(number, []).append(slot)
    known, found = dict(values), dict[int, Space]()
    with torch.no_grad():
        for number, instruction in enumerate(instructions):
            if all(slot in known for slot in reads(instruction)) and instruction.outputs:
                args = _filled(instruction.args, known)
                named = {name: _filled(item, known) for name, item in instruction.kwargs.items()}
                result, found[instruction.outputs[0]] = observe(partial(instruction.function, *args, **named))
                known.update(zip(instruction.outputs, result if instruction.is_tuple else (result,), strict=True))
                del args, named, result
            for slot in dying.get(number, ()):
                known.pop(slot, None)
    return found


def of_run(tape: Tape) -> list[int]:
    """The work space of the ops on a tape, one after the other; 0 where it cannot be observed."""
    return [_of_record(tape, record) for record in tape.records]


def _of_record(tape: Tape, record: Any) -> int:
    op = record.op
    if not isinstance(op, OpOverload) or op.is_view or op in HIDDEN_WRITES or op._schema.is_mutable:
        return 0
    if torch.Tag.pointwise in op.tags or torch.Tag.nondeterministic_seeded in op.tags:
        return 0
    args, kwargs = _from_tape(record.args, tape.values), {name: _from_tape(item, tape.values) for name, item in record.kwargs}
    if not all(map(_is_plain, _tensors((args, tuple(kwargs.values()))))):
        return 0
    with torch.no_grad():
        return observe(partial(op, *args, **kwargs))[1].work


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.__class__ in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided


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
