"""The first runs of a long tape: swept op by op, with nothing planned but single ops.

A plan of thousands of ops takes many times as long to make as it takes to run, and pays only where its signature occurs again
and again. What one op does to a tangent or cotangent depends on little (the op, its static arguments, shapes and dtypes), and
the steps of a loop share it: it is planned once for all of them, and the sweep over the tape is a look-up and a call or two for
each op. No structure is kept between ops, as in a plain forward or reverse mode. Which step follows which is kept for the
next sweep of the same signature, which looks nothing up.

Source: Griewank and Walther, *Evaluating Derivatives*, 2nd ed., chapter 3.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload

from chainrule.dispatch import functions_aside, undispatched
from chainrule.execute.collection import postponed_collection
from chainrule.execute.replay import Runner, bare, compile_program, without_values
from chainrule.maps.entries import without_writes
from chainrule.maps.staging import Program, Staged
from chainrule.plan.graph import argument_slots, between
from chainrule.plan.planner import Request, plan
from chainrule.plan.single_ops import OneOp, described

Tensor = torch.Tensor

#: Tapes of fewer ops, counted once for each transform of a nest, are planned in their first run.
LONG = 1024

#: How many runs of a signature are swept before it is planned; a nest of transforms is swept so often over their number.
#: To plan and to compile takes as long as what 12 to 120 replays save beside as many sweeps (loops of small systems,
#: 3 000 to 10 000 ops). Whoever waits until the waiting has cost as much never pays more than twice the least possible.
#: Source: Karlin, Manasse, Rudolph and Sleator, "Competitive snoopy caching", Algorithmica 3, 1988.
RUNS = 24

#: Elements of a value, times the tangents or cotangents that are swept at once, up to which (on average) a call takes longer
#: than what structure between ops could save of it.
_SMALL = 1 << 14

#: How many plans of single ops are kept.
_LIMIT = 4096

#: How many steps all schedules that are kept have together.
_SCHEDULED = 1 << 18

_ORDINARY = (torch.Tensor, torch.nn.Parameter)
_lock = threading.Lock()


def is_long(records: Sequence[Any], levels: int = 1) -> bool:
    """Whether a tape with these ops is swept in the first runs of so many transforms."""
    return len(records) * levels >= LONG


class NotFiniteError(Exception):
    """A sweep met infinities or NaN, of which the structure of a plan may leave out some."""


@dataclass(slots=True)
class Seen:
    """In place of a plan: how often a signature was swept.

    Attributes:
        runs: how often.
        used: for the cache.
    """

    runs: int = 0
    used: bool = False


@dataclass(slots=True)
class Step:
    """What one op does to tangents or cotangents.

    Attributes:
        op: the op, whose identity stands in the key.
        targets: what the results belong to, by their numbers among the tensors of the op; those of zeros are left out.
        recorded: the program and its results, until it runs a second time.
        runner: runs it, from then on.
    """

    op: Any
    targets: list[int]
    recorded: tuple[Program, list[Staged | None]] | None
    runner: Runner | None = None

    def run(self, values: Sequence[Any], seeds: Sequence[Tensor]) -> Sequence[Any]:
        """The results on other values; they may be views of these, or of the seeds."""
        runner = self.runner
        if runner is None:
            with _lock:
                if self.recorded is not None:
                    self.runner = compile_program(*self.recorded, views=True)
                    self.recorded = None
                runner = self.runner
            assert runner is not None
        return runner(values, seeds)


_STEPS: dict[Any, Step] = {}


class Entry(NamedTuple):
    """One step of a sweep that was done before.

    Attributes:
        step: what is done.
        values: the slots of the values that it reads.
        given: the slots whose tangents or cotangents it takes on.
        targets: the slots that its results belong to.
        dropped: those of ``given`` that no later step takes on.
    """

    step: Step
    values: list[int]
    given: list[int]
    targets: list[int]
    dropped: list[int]


@dataclass(slots=True)
class Schedule:
    """A sweep that was done before, to be done on the values of another run.

    Attributes:
        passes: for each pass over the tape its steps.
        forward: whether the passes push tangents.
        classes: those of the tape's values.
    """

    passes: list[list[Entry]]
    forward: bool
    classes: frozenset[type]

    @property
    def length(self) -> int:
        """The number of steps."""
        return sum([len(entries) for entries in self.passes])

    def on(self, values: Sequence[Any]) -> _Pass:
        """The passes on the values of a run, one after the other."""
        remaining = iter(self.passes)

        def run(_: Request, seeds: dict[int, Tensor], __: int | None) -> dict[int, Tensor]:
            pending = dict(seeds)
            for step, read, given, targets, dropped in next(remaining):
                results = step.run([values[slot] for slot in read], [pending[slot] for slot in given])
                for slot in dropped:
                    del pending[slot]
                for slot, part in zip(targets, results, strict=True):
                    known = pending.get(slot)
                    pending[slot] = part if known is None else torch.add(known, part)
            return pending

        return run


#: A pass over a tape: from the request, the seeds by slot, and how many stand in each, what the slots at the other end get.
_Pass = Callable[[Request, dict[int, Tensor], int | None], dict[int, Tensor]]

_SCHEDULES: dict[Any, Schedule] = {}


class _Sweep:
    """A sweep over one tape.

    Args:
        tape: the tape.
        request: what is asked: its kind, convention and kernels.
        several: how many tangents or cotangents are swept at once; None for one.
    """

    def __init__(self, tape: Any, request: Request, several: int | None) -> None:
        self.values: list[Any] = tape.values
        self.request = request
        self.shared = (request.kind, several, request.cast, request.kernels)
        self.entries: list[Entry] = []

    def step(
        self, record: Any, given: list[int], wanted: list[int], seeds: Sequence[Tensor], dropped: list[int]
    ) -> list[tuple[int, Tensor]]:
        """Take tangents or cotangents through one op.

        Args:
            record: the op.
            given: the slots with a seed: outputs where cotangents are pulled, arguments where tangents are pushed.
            wanted: the slots on the other side.
            seeds: the seeds.
            dropped: those of ``given`` that no later op takes on.

        Returns:
            The slots that get something, with what.
        """
        pulls = self.request.kind == "pull"
        slots, parts = described(record, self.values, frozenset(wanted if pulls else given))
        outputs = record.outputs
        for slot in outputs:
            if slot >= 0:
                out = self.values[slot]
                parts.append((out.shape, out.dtype, slot in (given if pulls else wanted)))
        local = [*slots, *[slot for slot in outputs if slot >= 0]]
        values = [self.values[slot] for slot in local]
        key: Any = (self.shared, *parts)
        try:
            step = _STEPS.get(key)
        except TypeError:  # an unhashable static argument
            step = key = None
        results: Sequence[Tensor]
        if step is not None:
            results = step.run(values, seeds)
        else:
            step, results = self._planned(record, slots, local, (given, wanted), seeds)
            if key is not None:
                if len(_STEPS) >= _LIMIT:
                    _STEPS.clear()
                _STEPS[key] = step
        targets = [local[number] for number in step.targets]
        self.entries.append(Entry(step, local, given, targets, dropped))
        return list(zip(targets, results, strict=True))

    def _planned(
        self,
        record: Any,
        slots: list[int],
        local: list[int],
        sides: tuple[Sequence[int], Sequence[int]],
        seeds: Sequence[Tensor],
    ) -> tuple[Step, list[Tensor]]:
        pulls = self.request.kind == "pull"
        active = {*(sides[1] if pulls else sides[0])}
        flags = [slot in active or number >= len(slots) for number, slot in enumerate(local)]
        part = OneOp(record, local, self.values, flags)
        given, wanted = (tuple([part.numbers[slot] for slot in side]) for side in sides)
        inputs, outputs = (wanted, given) if pulls else (given, wanted)
        request = self.request._replace(inputs=inputs, outputs=outputs, order="auto", seeds=given, leading=pulls)
        with postponed_collection(), functions_aside():
            planned = plan(part, request, seeds)
        found = [(key, result) for key, result in zip(planned.keys, planned.results, strict=True) if result is not None]
        results = [result.value for _, result in found]
        program = without_values(planned.program)
        program.instructions = [without_writes(instruction) for instruction in program.instructions]
        recorded = (program, [bare(result) for _, result in found])
        return Step(record.op, [key for key, _ in found], recorded), results


class _Way:
    """What lies between some inputs and outputs of a tape."""

    def __init__(self, tape: Any, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        self.tape = tape
        self.inputs, self.outputs = list(inputs), list(outputs)
        self.records, self.needed, self.reachable = between(tape.records, inputs, outputs)
        self.arguments = [list(dict.fromkeys(argument_slots(record))) for record in self.records]
        self.passes: list[list[Entry]] = []

    def suits(self, several: int) -> bool:
        """Whether a sweep of so many tangents or cotangents is a good first run: ordinary ops on small tensors of one dtype."""
        values, reachable, active = self.tape.values, self.reachable, self.tape.active
        first = values[self.inputs[0]]
        dtype, total = first.dtype, 0
        if not dtype.is_floating_point or first.is_meta:
            return False
        for record, arguments in zip(self.records, self.arguments, strict=True):
            if record.op.__class__ is not OpOverload:
                return False
            largest = 0
            for slot in (*arguments, *record.outputs):
                if slot < 0:
                    continue
                value = values[slot]
                if value.__class__ not in _ORDINARY or value.layout is not torch.strided:
                    return False
                if slot in reachable and active[slot] and value.dtype != dtype:
                    return False
                largest = max(largest, value.numel())
            total += largest
        return total * several <= _SMALL * len(self.records)

    def pulled(self, request: Request, seeds: dict[int, Tensor], several: int | None) -> dict[int, Tensor]:
        """Cotangents of the inputs from those in ``seeds``; several stand in the first dimension."""
        sweep = _Sweep(self.tape, request._replace(kind="pull"), several)
        active, reachable = self.tape.active, self.reachable
        pending, inputs = dict(seeds), frozenset(self.inputs)
        for record, arguments in zip(reversed(self.records), reversed(self.arguments), strict=True):
            given = [slot for slot in record.outputs if slot in pending]
            if not given:
                continue
            dropped = [slot for slot in given if slot not in inputs]
            cotangents = [pending[slot] if slot in inputs else pending.pop(slot) for slot in given]
            wanted = [slot for slot in arguments if slot in reachable and active[slot]]
            for slot, part in sweep.step(record, given, wanted, cotangents, dropped):
                known = pending.get(slot)
                pending[slot] = part if known is None else torch.add(known, part)
        self.passes.append(sweep.entries)
        return {slot: pending[slot] for slot in self.inputs if slot in pending}

    def pushed(self, request: Request, seeds: dict[int, Tensor], several: int | None) -> dict[int, Tensor]:
        """Tangents of the outputs from those in ``seeds``; several stand in the last dimension."""
        sweep = _Sweep(self.tape, request._replace(kind="push"), several)
        needed, active = self.needed, self.tape.active
        last = {slot: number for number, arguments in enumerate(self.arguments) for slot in arguments}
        tangents, outputs = dict(seeds), frozenset(self.outputs)
        for number, (record, arguments) in enumerate(zip(self.records, self.arguments, strict=True)):
            given = [slot for slot in arguments if slot in tangents]
            if not given:
                continue
            dropped = [slot for slot in given if last[slot] == number and slot not in outputs]
            wanted = [slot for slot in record.outputs if slot in needed and active[slot]]
            for slot, part in sweep.step(record, given, wanted, [tangents[slot] for slot in given], dropped):
                known = tangents.get(slot)  # an input that is computed of another one
                tangents[slot] = part if known is None else torch.add(known, part)
            for slot in dropped:
                del tangents[slot]
        self.passes.append(sweep.entries)
        return {slot: tangents[slot] for slot in self.outputs if slot in tangents}


def swept(
    tape: Any, request: Request, seeds: Sequence[Tensor], *, always: bool = False
) -> dict[Any, Tensor | None] | None:
    """The results of a request by a sweep, by key as those of a plan; None where the request has to be planned.

    Args:
        tape: the finished tape.
        request: what is asked.
        seeds: the seeds.
        always: whether the number of ops does not matter.

    Raises:
        NotFiniteError: if the results hold infinities or NaN: zeros may have met them that a plan would know for zeros.
    """
    inputs, outputs = list(dict.fromkeys(request.inputs)), list(dict.fromkeys(request.outputs))
    if request.kind not in ("jacobian", "pull", "push") or not inputs or not outputs:
        return None
    classes = frozenset(map(type, tape.values))
    key: Any = tape.signature((request, tuple(tape.active), tape.saw_blocked, tuple([_kind(seed) for seed in seeds])))
    try:
        schedule = _SCHEDULES.get(key)
    except TypeError:  # an unhashable static argument
        schedule = key = None
    if schedule is None or schedule.classes != classes:
        way = _Way(tape, inputs, outputs)
        if not (always or is_long(way.records)):
            return None
        forward = _is_forward(way, request, seeds)
        if forward is None:
            return None
        found = _passes(tape.values, request, seeds, way.pushed if forward else way.pulled, forward=forward)
        schedule = Schedule(way.passes, forward, classes)
        if key is not None:
            _keep(key, schedule)
    else:
        forward = schedule.forward
        found = _passes(tape.values, request, seeds, schedule.on(tape.values), forward=forward)
    results: dict[Any, Tensor | None] = {}
    for name, result in found.items():
        # What the sweep returns may be a seed, or a view of a value.
        results[name] = None if result is None else result.clone(memory_format=torch.contiguous_format)
    with undispatched():
        if not all(bool(torch.isfinite(result).all()) for result in results.values() if result is not None):
            raise NotFiniteError
    return results


def _kind(seed: Tensor) -> tuple[Any, ...]:
    return seed.__class__, seed.shape, seed.dtype


def _keep(key: Any, schedule: Schedule) -> None:
    with _lock:
        steps = sum([kept.length for kept in _SCHEDULES.values()])
        if steps + schedule.length > _SCHEDULED:
            _SCHEDULES.clear()
        if schedule.length <= _SCHEDULED:
            _SCHEDULES[key] = schedule


def _is_forward(way: _Way, request: Request, seeds: Sequence[Tensor]) -> bool | None:
    """Whether tangents are pushed for a request, or cotangents pulled; None where it has to be planned."""
    values = way.tape.values
    if request.kind != "jacobian":
        for slot, seed in zip(request.seeds, seeds, strict=True):
            if seed.__class__ not in _ORDINARY or seed.shape != values[slot].shape or seed.dtype != values[slot].dtype:
                return None
        suits = len(set(request.seeds)) == len(request.seeds) and way.suits(1)
        return request.kind == "push" if suits else None
    rows, columns = (max([values[slot].numel() for slot in slots]) for slots in (way.outputs, way.inputs))
    total_rows, total_columns = (sum([values[slot].numel() for slot in slots]) for slots in (way.outputs, way.inputs))
    forward = request.order == "forward" or (request.order == "auto" and total_rows > total_columns)
    return forward if rows * columns and way.suits(columns if forward else rows) else None


def _passes(
    values: Sequence[Any], request: Request, seeds: Sequence[Tensor], sweep: _Pass, *, forward: bool
) -> dict[Any, Tensor | None]:
    """The results of a request, by key, by passes over the tape.

    A Jacobian is taken for one input or output after the other, so that blocks that are zero are not computed.
    """
    inputs, outputs = list(dict.fromkeys(request.inputs)), list(dict.fromkeys(request.outputs))
    if request.kind != "jacobian":
        single = sweep(request, dict(zip(request.seeds, seeds, strict=True)), None)
        return {slot: single.get(slot) for slot in (outputs if forward else inputs)}
    found: dict[Any, Tensor | None] = {(output, slot): None for output in outputs for slot in inputs}
    for slot in inputs if forward else outputs:
        value = values[slot]
        shape, count = tuple(value.shape), value.numel()
        several = count if shape else None
        seed = torch.eye(count, dtype=value.dtype, device=value.device)
        seed = seed.reshape((*shape, count) if forward else (count, *shape)) if shape else seed.reshape(())
        swept_once = sweep(request, {slot: seed}, several)
        for other in outputs if forward else inputs:
            part = swept_once.get(other)
            if part is None:
                continue
            if forward:
                found[other, slot] = part.reshape((*values[other].shape, *shape))
            else:
                found[slot, other] = part.reshape((*shape, *values[other].shape))
    return found


__all__ = ["LONG", "RUNS", "NotFiniteError", "Seen", "Step", "is_long", "swept"]
