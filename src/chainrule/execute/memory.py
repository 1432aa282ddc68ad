"""The memory that a program needs: predicted from the sizes and the lives of its values, before it runs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from chainrule.capture.joined import JoinedTape
from chainrule.capture.tape import Tape
from chainrule.execute.products import DistinctRows, FilledRows
from chainrule.execute.reuse import scattered, written_over
from chainrule.execute.workspace import Saved, Space, free, mapped_observable, observable, observe, of_run, saved_by_run
from chainrule.maps.staging import Instruction, Program, Ref, reads
from chainrule.settings import setting
from chainrule.shortcuts import configure

_convolution = torch.ops.aten.convolution.default
_CONVOLUTIONS = frozenset(
    {
        torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
        torch.convolution, _convolution, _convolution._op, torch.ops.aten.convolution_backward.default._op,
    }
)  # fmt: skip

#: Functions, beside element-wise ones and views, that hold nothing but their results (on contiguous arguments).
_WITHOUT_WORKSPACE = frozenset(
    {
        "mm", "bmm", "mv", "dot", "addmm", "addmv", "baddbmm", "matmul", "sum", "cat", "stack", "zeros", "ones", "full", "eye",
        "arange", "empty", "zeros_like", "ones_like", "new_zeros", "new_empty", "new_full", "new_ones", "reshape", "contiguous",
        "to", "gather", "index_select", "scatter_add", "scatter", "index_add", "where", "amax", "amin", "broadcast_to",
        "__getitem__", "flatten", "outer", "diag_embed", "cumsum", "flip", "tril", "triu", "linear", "clone", "narrow",
        "embed_diagonals", "assembled", "distinct_rows", "filled_rows", "symmetric_product",
    }
)  # fmt: skip

#: How many channels the library for convolutions computes at a time: what a register of the processor holds.
LANES = 16 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 8

#: On a CPU, the share of the free memory that a call may take without being asked.
_SHARE = 0.8


@dataclass(frozen=True)
class Memory:
    """What a program allocates, in bytes.

    Attributes:
        results: its results.
        peak: the most that it holds at once, results included.
        uncounted: the calls whose work space is not known.
        graph: what stays beside the results as long as they do, for their graph.
    """

    results: int
    peak: int
    uncounted: tuple[str, ...] = ()
    graph: int = 0

    @property
    def temporaries(self) -> int:
        """The most that it holds beside its results."""
        return self.peak - self.results


def predict(
    program: Program,
    kept: Sequence[Instruction],
    wanted: Sequence[int | None],
    copied: set[int],
    spent: Mapping[int, tuple[int, int]] | None = None,
    inside: Mapping[int, Space] | None = None,
    saved: Mapping[int, Saved] | None = None,
) -> Memory:
    """Predict what the instructions ``kept`` of a program allocate.

    A value lives from the call that makes it to the last call that reads it, or a view of it; results live on.

    Args:
        program: the program, for the sizes of its values.
        kept: its instructions, as they are run.
        wanted: the slots of the results.
        copied: the results (by number) that are copied at the end.
        spent: inputs (by slot) that nobody else holds, with the identity of their memory and its bytes: it is let go after
            the last use of the last of them.
        inside: what the instructions allocate, by the first slot that each makes, where it was observed.
        saved: what autograd keeps of them, likewise.
    """
    made: set[int] = {slot for instruction in kept for slot in instruction.outputs}
    shares = {i.outputs[0]: place for i in kept if (place := written_over(i)) is not None}
    joint: dict[int, Instruction] = {}
    for instruction in kept:  # what was seen to allocate nothing is a view
        space = (inside or {}).get(instruction.outputs[0]) if len(instruction.outputs) == 1 else None
        if space is not None and not space.results and instruction.args:
            if isinstance(instruction.args[0], Ref):
                shares.setdefault(instruction.outputs[0], instruction.args[0].slot)
            elif instruction.outputs[0] not in program.shares and _bytes(program, instruction.outputs[0]):
                joint[instruction.outputs[0]] = instruction  # or holds its arguments, as a sparse tensor does
        if instruction.function is scattered:  # in place of a view
            shares[instruction.outputs[0]] = instruction.outputs[0]

    def root(slot: int) -> int:
        while (source := shares.get(slot, program.shares.get(slot))) is not None and source != slot:
            slot = source
        return slot

    last: dict[int, int] = {}
    for number, instruction in enumerate(kept):
        for slot in (*reads(instruction), *instruction.outputs):
            last[root(slot)] = number
    end = len(kept)
    last.update((root(slot), end) for slot in wanted if slot is not None)
    for made_of in reversed(joint.values()):
        until = last[root(made_of.outputs[0])]
        last.update((root(slot), max(last[root(slot)], until)) for slot in reads(made_of))
    saved = saved or {}
    ends, beside = _ends_of_graphs(kept, wanted, saved), dict[int, int]()
    for first, number in ends.items():
        last.update((root(slot), max(last.get(root(slot), number), number)) for slot in saved[first].slots)
        beside[number] = beside.get(number, 0) + saved[first].beside
    dying: dict[int, list[int]] = {}
    for slot, number in last.items():
        dying.setdefault(number, []).append(slot)
    latest: dict[int, tuple[int, int, int]] = {}
    for slot, (memory, size) in (spent or {}).items():
        if slot in last:
            latest[memory] = max(latest.get(memory, (-1, slot, size)), (last[slot], slot, size))
    alive = {slot: size for _, slot, size in latest.values()}
    held = peak = sum(alive.values())
    for number, instruction in enumerate(kept):
        own = [slot for slot in instruction.outputs if slot == root(slot) and slot not in alive]
        sizes = [0 if slot in joint else _bytes(program, slot) for slot in own]
        space = (inside or {}).get(instruction.outputs[0]) if instruction.outputs else Space(0, 0)
        if instruction.outputs and instruction.outputs[0] in saved:
            space = saved[instruction.outputs[0]].space or space
        if space is not None and sizes:
            sizes[0] += max(space.results - sum(sizes), 0)
        alive.update(zip(own, sizes, strict=True))
        held += sum(sizes) + sum(saved[slot].beside for slot in instruction.outputs[:1] if slot in ends)
        work = _inside(program, instruction) if space is None else space.work
        if instruction.function.__class__ is DistinctRows or space is None and instruction.function.__class__ is FilledRows:
            work = instruction.function.held(_bytes(program, instruction.args[0].slot), sum(sizes))
        peak = max(peak, held + work)
        for slot in dying.get(number, ()):
            held -= alive.pop(slot, 0)
        held -= beside.get(number, 0)
    extra = sum(_bytes(program, slot) for n, slot in enumerate(wanted) if n in copied and slot is not None)
    results = {root(slot) for n, slot in enumerate(wanted) if slot is not None and n not in copied}
    for slot, made_of in reversed(joint.items()):
        if slot in results:
            results |= {root(item) for item in reads(made_of)}
    kept_bytes = sum(_bytes(program, slot) for slot in results - joint.keys() if slot in made) + extra
    uncounted = [name for i in kept if i.outputs and i.outputs[0] not in (inside or {}) and (name := _unknown(i.function))]
    given = {root(slot) for slot in wanted if slot is not None}
    graph = beside.get(end, 0) + sum(size for slot, size in alive.items() if slot not in given) if ends else 0
    return Memory(kept_bytes, max(peak, held + extra), tuple(dict.fromkeys(uncounted)), graph)


def _ends_of_graphs(kept: Sequence[Instruction], wanted: Sequence[int | None], saved: Mapping[int, Saved]) -> dict[int, int]:
    """Until which call the part of autograd's graph lives that belongs to a call, by the call's first slot.

    It lives as long as the call's results, and as those that were computed of them.
    """
    if not saved:
        return {}
    last = {slot: number for number, instruction in enumerate(kept) for slot in (*reads(instruction), *instruction.outputs)}
    last.update((slot, len(kept)) for slot in wanted if slot is not None)
    found: dict[int, int] = {}
    for instruction in reversed(kept):
        if instruction.outputs and instruction.outputs[0] in saved:
            end = found[instruction.outputs[0]] = max(last[slot] for slot in instruction.outputs)
            last.update((slot, max(last[slot], end)) for slot in reads(instruction))
    return found


def _bytes(program: Program, slot: int) -> int:
    kind = program.kinds.get(slot)
    return prod(kind[0]) * kind[1].itemsize if kind is not None else 0


def _unknown(function: Any) -> str:
    """The name of a function that needs work space of which nothing is known; empty for others."""
    name: str = getattr(function, "__name__", str(function)).partition(".")[0]
    if function in _CONVOLUTIONS or name in _WITHOUT_WORKSPACE:
        return ""
    if getattr(function, "__module__", "").startswith("chainrule.rules.opaque"):
        return f"{name} of an opaque op"
    packet = getattr(torch.ops.aten, name, None)
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet is not None else []
    return "" if any(torch.Tag.pointwise in o.tags or o.is_view for o in overloads) else name


def _inside(program: Program, instruction: Instruction) -> int:
    """What a call allocates and frees itself, where that was not observed."""
    if instruction.function not in _CONVOLUTIONS:
        return 0
    # The library computes in a layout of its own, of as many channels at a time as a register holds, and the result is
    # copied out of it.
    total = 0
    for shape, _, device in (kind for slot in instruction.outputs[:1] if (kind := program.kinds.get(slot)) is not None):
        if device.type == "cpu" and len(shape) > 2 and shape[1]:
            total += _bytes(program, instruction.outputs[0]) // shape[1] * (-(-shape[1] // LANES) * LANES)
    return total


@dataclass
class Watch:
    """The predicted memory of calls that run under :func:`watching`.

    Attributes:
        held: bytes that the records of runs hold.
        peak: the most that is held at once.
        results: bytes of the results of the last program.
        storages: the memory that is counted, or is not to be.
        made: of the runs' own memory the bytes, and what tells whether it is still there.
        joined: the memory that autograd keeps for graphs of runs.
        recorded: by the identity of a tape, what calls left on it that counts as long as the tape's run lasts.
    """

    held: int = 0
    peak: int = 0
    results: int = 0
    storages: set[int] = field(default_factory=set)
    made: dict[int, tuple[int, StorageWeakRef]] = field(default_factory=dict)
    joined: set[int] = field(default_factory=set)
    recorded: dict[int, list[tuple[int, Any]]] = field(default_factory=dict)

    def add_run(self, tape: Tape) -> None:
        """A run has ended whose values its tape holds."""
        self._let_go()
        for number, entry in self.recorded.pop(id(tape), ()):  # from here on its values count one by one
            if self.made.get(number) is entry:
                self.held -= self.made.pop(number)[0]
        spaces = of_run(tape) if observable() or mapped_observable() else [0] * len(tape.records)
        outputs = {slot for record in tape.records for slot in record.outputs}
        known = [n for n in range(len(tape.values)) if n not in outputs and not (tape.active[n] or _is_held_here(tape, n))]
        self.storages.update(storage_of(tape.values[n])[0] for n in (*tape.inputs, *known) if _is_tensor(tape.values[n]))
        for slot in range(len(tape.values)):
            if slot not in outputs:
                self._add(tape.values[slot])
        for record, space in zip(tape.records, spaces, strict=True):
            for slot in record.outputs:
                if slot >= 0:
                    self._add(tape.values[slot])
            self.peak = max(self.peak, self.held + space)
        if observable() or mapped_observable():
            for value, kept, beside in saved_by_run(tape):
                self.joined |= kept
                self._beside(value, beside)
        elif torch.is_grad_enabled():  # it is not known which ones are kept
            self.joined |= {storage_of(v)[0] for v in tape.values if _is_tensor(v) and _plain(v).requires_grad}
        self.peak = max(self.peak, self.held)

    def _beside(self, value: torch.Tensor, size: int) -> None:
        """So many bytes are held as long as a value is, or until the tape that records it has its values counted."""
        if size:
            self.held += size
            number = min((0, *self.made)) - 1
            self.made[number] = entry = size, StorageWeakRef(_plain(value).untyped_storage())
            if (tape := _recording_tape()) is not None:
                self.recorded.setdefault(id(tape), []).append((number, entry))

    def _add(self, value: Any) -> None:
        if _is_tensor(value):
            number, size = storage_of(value)
            if number not in self.storages:
                self.storages.add(number)
                if size:
                    self.made[number] = size, StorageWeakRef(_plain(value).untyped_storage())
                self.held += size

    def _let_go(self) -> None:
        """Values of earlier runs that are gone by now, with the tape that held them or before, are held no longer."""
        gone = [number for number, (_, reference) in self.made.items() if reference.expired()]
        self.held -= sum(self.made.pop(number)[0] for number in gone)
        self.storages.difference_update(gone)
        self.joined.difference_update(gone)

    def add_program(self, memory: Memory) -> None:
        """A program is run, or was run just now."""
        self._let_go()
        self.peak = max(self.peak, self.held + memory.peak)
        self.results = memory.results

    def add_results(self, results: Sequence[Any], memory: Memory) -> None:
        """A program has run: its results, and what their graph keeps, are held as long as somebody has them."""
        tensors = [value for value in results if _is_tensor(value)]
        for value in tensors:
            self._add(value)
        if tensors and memory.graph:
            self._beside(next((value for value in tensors if value.requires_grad), tensors[0]), memory.graph)

    def let_go(self, values: Sequence[Any], kept: set[int]) -> None:
        """Of the values of a run those stay that ``kept`` names by identity."""
        stay = {storage_of(value)[0] for value in values if _is_tensor(value) and id(value) in kept}
        gone = {storage_of(value)[0] for value in values if _is_tensor(value)} & self.made.keys() - stay - self.joined
        self.held -= sum(self.made.pop(storage)[0] for storage in gone)
        self.storages -= gone

    def spend(self, values: Sequence[Any], inputs: Mapping[Any, int]) -> dict[int, tuple[int, int]]:
        """The values of a run are given away to a program: what it takes, by its slots, with its memory and bytes."""
        found: dict[int, tuple[int, int]] = {}
        gone: set[int] = set()
        for number in range(len(values)):
            value = values[number]
            # What somebody else has is no longer held by the run alone: a result, what is recorded by a transform around.
            if not isinstance(value, torch.Tensor) or sys.getrefcount(value) > 3 + _in_graphs(value):
                continue
            storage = storage_of(value)[0]
            if storage in self.made and storage not in self.joined:
                gone.add(storage)
                if number in inputs:
                    found[inputs[number]] = storage, self.made[storage][0]
        self.held -= sum(self.made.pop(storage)[0] for storage in gone)
        # Where the tape of a transform around this one holds them all the same, its run adds them again.
        self.storages -= gone
        return found


def _recording_tape() -> Tape | None:
    """The innermost tape that is recording."""
    modes = (torch._C._get_dispatch_stack_at(n) for n in reversed(range(torch._C._len_torch_dispatch_stack())))
    return next((mode for mode in modes if isinstance(mode, Tape)), None)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_held_here(tape: Tape | JoinedTape, slot: int) -> bool:
    """Whether a constant of a run is held by its tape alone: then the run has made it."""
    value = tape.values[slot]
    mine = sum(item is value for _, args, _, out in tape.pending for item in (*args, out))
    # The tape's list (and that of the tape that is read with others as one), `value`, and the argument of the call.
    lists = 2 if isinstance(tape, JoinedTape) else 1
    if not _is_tensor(value) or value.__class__ is not torch.Tensor or value.layout is not torch.strided:
        return False
    if sys.getrefcount(value) > 2 + lists + mine + _in_graphs(value):
        return False
    # Its tensor's, and that of the object that was asked.
    return torch._C._storage_Use_Count(value.untyped_storage()._cdata) <= 2  # type: ignore[attr-defined]


def _in_graphs(tensor: torch.Tensor) -> int:
    """How many references to the object of a tensor graphs of autograd hold: all of them together one."""
    return int(tensor._use_count() > 1)  # type: ignore[attr-defined]


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    while tensor.__class__ is not torch.Tensor and hasattr(tensor, "value"):
        tensor = tensor.value
    return tensor


def storage_of(tensor: torch.Tensor) -> tuple[int, int]:
    """The identity of a tensor's memory, and its bytes; those of a sparse tensor are not counted."""
    tensor = _plain(tensor)
    if tensor.layout is not torch.strided:
        return id(tensor), 0
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()


_WATCH: ContextVar[Watch | None] = ContextVar("chainrule_memory", default=None)

current_watch = _WATCH.get
configure(watch=_WATCH)


@contextmanager
def watching() -> Iterator[Watch]:
    """Predict the memory of what runs inside, from its plans; a call that makes its plan needs more than later ones."""
    watch = Watch()
    token = _WATCH.set(watch)
    try:
        yield watch
    finally:
        _WATCH.reset(token)


def unwatched() -> AbstractContextManager[None]:
    """Run what is inside as if nobody predicted its memory."""
    return setting(_WATCH, None)


def planned_peak(call: Callable[[], Any]) -> int:
    """The bytes that a call with cached plans holds at the peak, as these predict it; 0 for one without plans.

    Args:
        call: the call, which has made its plans already. It is run.
    """
    with watching() as watch:
        result = call()
    del result
    return watch.peak


def counted(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Run a call that is part of no plan, and count what it holds if somebody watches."""
    watch = _WATCH.get()
    if watch is None or not free():
        return call()
    result, space = observe(call)
    watch.add_program(memory := Memory(space.results, space.results + space.work))
    watch.add_results([result], memory)
    return result


def peak_of(call: Callable[[], Any]) -> int:
    """The bytes that a call with cached plans holds at the peak.

    That is the prediction of its plans; or what torch's allocator saw the call hold, where that is more: the code around the
    transforms is part of no plan.

    Args:
        call: the call, which has made its plans already. It is run twice.
    """
    planned = planned_peak(call)
    if not free():
        return planned
    result, space = observe(call)
    del result
    return max(planned, space.results + space.work)


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(budget: int | str, name: str) -> int:
    """A number of bytes, or a string such as ``"512MB"`` or ``"2GiB"``, as a number of bytes.

    Raises:
        ValueError: if it is neither, or not positive.
    """
    if isinstance(budget, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", budget)
        unit = _UNITS.get(found[2].upper()) if found else None
        if found is None or unit is None:
            raise ValueError(f"{name}: max_memory should be a number of bytes or a string like '512MB' or '2GiB', got {budget!r}")
        budget = int(float(found[1]) * unit)
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise ValueError(f"{name}: max_memory should be a number of bytes or a string like '512MB', got {type(budget)}")
    if budget <= 0:
        raise ValueError(f"{name}: max_memory should be positive, got {budget}")
    return budget


def free_memory(device: torch.device) -> int | None:
    """The free memory of a device in bytes; None where it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(int(line.split()[1]) * 1024 * _SHARE)
    except OSError:
        pass
    try:
        return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _SHARE)
    except (ValueError, OSError, AttributeError):
        return None
