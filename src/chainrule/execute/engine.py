"""Running requests: look the plan up by the tape's signature, replay it, or plan it now."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch.autograd import forward_ad

from chainrule.batching.duals import refuse_duals
from chainrule.batching.mode import VmapMode
from chainrule.batching.tensor import BatchTensor
from chainrule.capture.numbers import note_numbers
from chainrule.capture.recorder import WholeRecorder, rehearsed
from chainrule.capture.tape import Tape
from chainrule.dispatch import functions_are_replaced, functions_aside, functions_seen, undispatched
from chainrule.execute.accounts import SWEPT, UNCACHED, Account, Ledger, current_ledger, uncollected
from chainrule.execute.batched import (
    Stored,
    nested_values,
    record_apart,
    record_batched,
    stored_under_vmap,
    stored_values,
    without_graphs,
    wrap,
)
from chainrule.execute.collection import postponed_collection
from chainrule.execute.memory import Memory, Watch, current_watch, storage_of, watching
from chainrule.execute.replay import (
    Runner,
    Source,
    Spent,
    Stages,
    bare,
    compile_program,
    compile_stages,
    owned,
    part_constants,
    without_values,
)
from chainrule.execute.sweeps import RUNS, NotFiniteError, Seen, is_long, swept
from chainrule.execute.workspace import free, observe
from chainrule.maps.dry_run import DryRun, NotDryError, dry, is_complete
from chainrule.maps.staging import Instruction, Program, Staged
from chainrule.modes_off import without_innermost
from chainrule.plan.algebra import AlgebraRequest, plan_algebra, predicted_peak
from chainrule.plan.elimination import Candidate
from chainrule.plan.graph import Graph
from chainrule.plan.planner import Planned, Request, plan
from chainrule.settings import setting

#: Plans are compiled by one thread at a time.
COMPILING = threading.Lock()


#: From so many entries on, a Jacobian is planned without being run.
_LARGE = 1 << 17

#: Whether all plans are made so.
_FRUGAL: ContextVar[bool] = ContextVar("chainrule_frugal", default=False)


def frugal() -> AbstractContextManager[None]:
    """Plans that are made inside need no more memory than their later runs."""
    return setting(_FRUGAL, True)


@dataclass
class CachedPlan:
    """A plan without the tensors of the run that made it.

    Attributes:
        keys: what each result is.
        staged: whether what does not depend on the seeds is computed once for a run of the function.
    """

    keys: list[Any]
    recorded: tuple[Program, list[Staged | None]] | None
    runner: Runner | None = None
    used: bool = False
    needs: list[Any] = field(default_factory=list)
    batched: dict[Any, tuple[Runner | None, list[bool]]] = field(default_factory=dict)
    #: As ``batched``, under a vmap that stands in other modes: plans of their own.
    nested: dict[Any, tuple[CachedPlan | None, list[bool]]] = field(default_factory=dict)
    #: Whether it is such a plan, whose calls the mode below takes as functions.
    stored: bool = False
    staged: bool = False
    stages: Stages | None = None
    #: For the compiled handlers: what replays the plan on plain tensors, what it reads, and the structure of its results (None
    #: for one result, True for a tuple of them); where it is in parts, its own.
    quick: tuple[Any, ...] | None = None

    def structure(self) -> Any:
        """The structure of the results for `quick`; NotImplemented where they are put together otherwise."""
        return None if len(self.keys) == 1 else NotImplemented

    def compile(self) -> None:
        """Make the functions that replay the plan."""
        with COMPILING, postponed_collection():
            if self.recorded is not None:
                self.needs = list(self.recorded[0].inputs)
                if self.staged:
                    self.stages = compile_stages(*self.recorded)
                self.runner = compile_program(*self.recorded)
                if not self.staged:  # those that no call reads
                    self.runner.constants = self.runner.source_of.let_go()  # type: ignore[attr-defined]
                whole = all([staged is not None for staged in self.recorded[1]])
                self.recorded = None
                if whole:
                    if (structure := self.structure()) is not NotImplemented:
                        self.quick = self.runner.plain, tuple(self.needs), structure  # type: ignore[attr-defined]

    def compile_for(self, recorder: WholeRecorder) -> None:
        """As :meth:`compile`, for a plan that was made while a whole call is recorded, and is replayed in it now.

        A graph is made of the calls of a replay: they are fewer than those of planning.
        """
        self.compile()
        assert self.runner is not None
        recorder.take_constants(self.runner.constants)  # type: ignore[attr-defined]
        if self.stages is not None:
            recorder.take_constants(list(self.stages.source.constants.values()))

    def run_on(self, tape: Any, seeds: Sequence[torch.Tensor]) -> dict[Any, torch.Tensor | None]:
        """Replay the plan on a tape of the same signature; a second call on the same tape only does what the seeds change."""
        if self.runner is None:
            self.compile()
        if self.stages is None or torch._C._len_torch_dispatch_stack():
            return self.run(tape.values, seeds)
        watch = current_watch()
        key = (id(self), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        found = tape.prepared.get(key)
        if found is None:
            found = tape.prepared[key] = (self, self.stages.prepare(tape.values)[1])
            if watch is not None:
                watch.add_program(memory := self.stages.memory(0, tape.values, seeds))
                watch.add_results(found[1], memory)
        results = self.stages.apply(tape.values, found[1], seeds)
        if watch is not None:
            watch.add_program(memory := self.stages.memory(1, tape.values, seeds))
            watch.add_results(results, memory)
        return dict(zip(self.keys, results, strict=True))

    def run(self, values: Sequence[Any], seeds: Sequence[torch.Tensor]) -> dict[Any, torch.Tensor | None]:
        """Replay the plan on other values of the same signature: the results by their keys."""
        return dict(zip(self.keys, self.results(values, seeds), strict=True))

    def results(self, values: Sequence[Any], seeds: Sequence[torch.Tensor]) -> Sequence[torch.Tensor | None]:
        """The same, in the order of the keys."""
        if self.runner is None:
            self.compile()
        assert self.runner is not None
        runner = self.runner
        modes = torch._C._len_torch_dispatch_stack()
        if modes == 1:
            given = [values[key] if key.__class__ is int else seeds[key[1]] for key in self.needs]
            under = stored_under_vmap(given)
            if under is not None and not (under.joined and self._differentiates()):
                return self._run_batched(values, seeds, under)
        elif modes and (found := self._run_nested(values, seeds, modes)) is not None:
            return found
        if (watch := current_watch()) is not None:
            source = self.runner.source_of  # type: ignore[attr-defined]
            batched = any(value.__class__ is BatchTensor for value in (*values, *seeds))
            joined = not batched and self._is_joined(values, seeds)
            saved = {} if batched or (joined and self._differentiates()) else source.observe(values, seeds)
            spent = watch.spend(values, source.program.inputs) if values.__class__ is Spent else None
            if batched or (joined and not saved):
                taken = sum(dict(place for slot, place in (spent or {}).items() if slot in source.used).values())
                return _observed(watch, self.runner, values, seeds, taken)
            watch.add_program(memory := source.memory(spent, saved))
        if not modes and runner.plain is not runner and self._is_plain(values, seeds):  # type: ignore[attr-defined]
            runner = runner.plain  # type: ignore[attr-defined]
        if modes and self.stored:
            with functions_seen():
                results = runner(values, seeds)
        else:
            results = runner(values, seeds)
        if watch is not None:
            watch.add_results(results, memory)
        return results

    def run_stored(self, values: Sequence[Any], mode: VmapMode) -> tuple[Sequence[Any], list[bool]] | None:
        """Replay on the stored tensors of a vmap that was left, with no mode active.

        Args:
            values: the values of the tape.
            mode: the vmap.

        Returns:
            The stored results, and which of them have the batch dimension; None where the vmap has to be active: for the first
            replay of these layouts, and where calls look at the graphs of their arguments.
        """
        if self.runner is None:
            return None
        stored = stored_values([values[key] for key in self.needs], mode)
        if stored is None or (stored.joined and self._differentiates()):
            return None
        runner, flags = self.batched.get(stored.key, (None, []))
        if runner is None:
            return None
        if (watch := current_watch()) is not None:
            source = runner.source_of  # type: ignore[attr-defined]
            watch.add_program(memory := source.memory(saved=source.observe(stored.tensors, ())))
        results = (runner if stored.joined else runner.plain)(stored.tensors, ())  # type: ignore[attr-defined]
        if watch is not None:
            watch.add_results(results, memory)
        return results, flags

    def _is_plain(self, values: Sequence[Any], seeds: Sequence[torch.Tensor]) -> bool:
        """Whether the program's inputs are tensors whose calls nothing follows."""
        if forward_ad._current_level >= 0:
            return False
        for key in self.needs:
            value = values[key] if key.__class__ is int else seeds[key[1]]
            if value.__class__ is not torch.Tensor or value.requires_grad:
                return False
        return True

    def _is_joined(self, values: Sequence[Any], seeds: Sequence[torch.Tensor]) -> bool:
        """Whether torch's autograd makes a graph of the program's calls."""
        given = [values[key] if key.__class__ is int else seeds[key[1]] for key in self.needs] if torch.is_grad_enabled() else []
        return any([isinstance(value, torch.Tensor) and value.requires_grad for value in given])

    def _differentiates(self) -> bool:
        """Whether some calls make graphs of their own (opaque ops, users' functions): these look at those of their arguments."""
        kept = self.runner.source_of.kept  # type: ignore[union-attr]
        return any([instruction.function.__class__ is MethodType for instruction in kept])

    def _run_batched(self, values: Sequence[Any], seeds: Sequence[Any], stored: Stored) -> Sequence[Any]:
        """Replay on stored tensors under the one vmap that is active; record that form the first time."""
        assert self.runner is not None
        mode, tensors, key, joined = stored
        found = self.batched.get(key)
        runner = self.runner
        if found is None:
            given, recorded = (values, seeds), tensors
            if joined or len({id(t) for t in tensors}) < len(tensors):  # a recorder knows tensors by their identity
                given, recorded = self._without_graphs(values, seeds, stored)
            outcome = record_batched(lambda: runner(*given), mode, recorded, runner.constants)  # type: ignore[attr-defined]
            assert outcome is not None
            results, program, staged, flags = outcome
            part_constants(program, results)
            found = (compile_program(program, staged), flags) if staged else (None, [])
            if len(self.batched) < 64:
                self.batched[key] = found
            if not joined:
                return results
        batched_runner, flags = found
        watch = current_watch()
        if batched_runner is None:
            return runner(values, seeds) if watch is None else _observed(watch, runner, values, seeds)
        if watch is not None:
            source = batched_runner.source_of  # type: ignore[attr-defined]
            with undispatched():
                saved = source.observe(tensors, (), undispatched=True)
            watch.add_program(memory := source.memory(saved=saved))
        followed = joined or forward_ad._current_level >= 0
        with undispatched():
            results = (batched_runner if followed else batched_runner.plain)(tensors, ())  # type: ignore[attr-defined]
        if watch is not None:
            watch.add_results(results, memory)
        return wrap(results, flags, mode)

    def _without_graphs(self, values: Sequence[Any], seeds: Sequence[Any], stored: Stored) -> tuple[Any, list[torch.Tensor]]:
        """The values and seeds that the program reads, and the tensors behind them, without their graphs."""
        bare, tensors = without_graphs(stored, [values[key] if key.__class__ is int else seeds[key[1]] for key in self.needs])
        given, beside = [*values], [*seeds]
        for key, value in zip(self.needs, bare, strict=True):
            if key.__class__ is int:
                given[key] = value
            else:
                beside[key[1]] = value
        return (given, beside), tensors


    def _run_nested(self, values: Sequence[Any], seeds: Sequence[Any], modes: int) -> Sequence[Any] | None:
        """Replay on the stored tensors of a vmap inside of other modes, which see the calls; None for the usual way."""
        given = [values[key] if key.__class__ is int else seeds[key[1]] for key in self.needs]
        stored = nested_values(given, modes)
        if stored is None or current_watch() is not None or forward_ad._current_level >= 0:
            return None
        if (found := self.nested.get(stored.key)) is None:
            plan, flags = None, list[bool]()
            if not self._differentiates() and (recorded := self._record_nested(given, stored)) is not None:
                plan, flags = recorded
            found = plan, flags
            if len(self.nested) < 64:
                self.nested[stored.key] = found
        plan, flags = found
        if plan is None:
            return None
        with without_innermost(), stored.mode.outside():
            results = plan.results(stored.tensors, ())
        return wrap(results, flags, stored.mode)

    def _record_nested(self, given: list[Any], stored: Stored) -> tuple[CachedPlan, list[bool]] | None:
        """The plan on stored tensors, and which of its results are batched; None where it cannot be recorded."""
        assert self.runner is not None
        found = record_apart(self.runner, self.needs, stored, given)
        if found is None:
            return None
        program, staged, flags = found
        program.forget_values()
        plan = CachedPlan(list(range(len(flags))), None, compile_program(program, [bare(item) for item in staged]))
        plan.needs, plan.stored = list(program.inputs), True
        return plan, flags


def _observed(
    watch: Watch, runner: Runner, values: Sequence[Any], seeds: Sequence[torch.Tensor], taken: int = 0
) -> tuple[Any, ...]:
    """Run a program as a whole, where its memory cannot be told call by call.

    That is one that vmap takes op by op, some of them sample by sample, or one whose calls make graphs of their own.

    Args:
        watch: what counts.
        runner: runs the program.
        values: the values of the run.
        seeds: the seeds.
        taken: the bytes of the values that were given away to the program.
    """
    if not free():
        return runner(values, seeds)
    results, space = observe(lambda: runner(values, seeds))
    size = sum([storage_of(result)[1] for result in results if result is not None])
    memory = Memory(space.results, taken + space.results + space.work, graph=max(space.results - size, 0))
    watch.add_program(memory)
    watch.add_results(results, memory)
    found: tuple[Any, ...] = results
    return found


class PlanCache:
    """A bounded cache; a plan that was used since it was last looked at survives (second chance). Thread-safe."""

    def __init__(self, limit: int = 512) -> None:
        self.limit = limit
        self._plans: dict[Any, CachedPlan] = {}
        self._lock = threading.Lock()

    @property
    def plans(self) -> dict[Any, CachedPlan]:
        """The plans themselves, for the compiled handlers, which look them up."""
        return self._plans

    def get(self, key: Any) -> CachedPlan | None:
        """The plan for a key, if it is there."""
        found = self._plans.get(key)
        if found is not None:
            found.used = True
        return found

    def put(self, key: Any, value: CachedPlan) -> None:
        """Keep a plan, dropping the oldest unused ones when there are too many.

        One that was made under a user's function mode, which may have changed its calls, is not kept.
        """
        if functions_are_replaced():
            return
        with self._lock:
            if key not in self._plans:  # the new one is no candidate: it has had no time to be used
                while len(self._plans) >= self.limit:
                    oldest = next(iter(self._plans))
                    plan = self._plans.pop(oldest)
                    if plan.used:
                        plan.used = False
                        self._plans[oldest] = plan
            self._plans[key] = value

    def drop(self, key: Any) -> None:
        """Forget a plan, if it is there."""
        with self._lock:
            self._plans.pop(key, None)

    def __len__(self) -> int:
        """The number of plans kept."""
        return len(self._plans)

    def clear(self) -> None:
        """Forget every plan."""
        with self._lock:
            self._plans.clear()


CACHE = PlanCache()


def execute(
    tape: Any, request: Request | AlgebraRequest, seeds: Sequence[torch.Tensor] = (), *, last: bool = False
) -> dict[Any, torch.Tensor | None]:
    """The results of a request on a finished tape, by key; None stands for zeros.

    Args:
        tape: the tape.
        request: what is asked.
        seeds: the seed tensors, in the order of ``request.seeds`` (or by the numbers that an expression names).
        last: whether the tape serves nothing after this: its values are let go as the plan has read them.
    """
    if forward_ad._current_level >= 0:
        refuse_duals(seeds, "a derivative transform")
    ledger = current_ledger()
    if ledger is not None:
        if ledger is SWEPT and isinstance(request, Request):
            if (soon := swept(tape, request, seeds, always=True)) is not None:
                return soon
        if ledger is UNCACHED or ledger is SWEPT:
            planned = _planned(tape, request, seeds)
            results = owned(planned.program, planned.results)
            found = {k: None if r is None else r.value for k, r in zip(planned.keys, results, strict=True)}
            without_values(planned.program)
            return found
        return _execute_accounted(tape, request, seeds, ledger)
    again: Any = None
    if request.kind in ("pull", "push"):
        # The same request as before on the same tape: nothing has to be looked up by its whole signature.
        again = (request, tuple([(seed.shape, seed.dtype) for seed in seeds]))
        if (known := tape.prepared.get(again)) is not None:
            return known.run_on(tape, seeds)
    key = _key(tape, request, seeds)
    cached: Any = None
    try:
        cached = CACHE.get(key)
    except TypeError:  # an unhashable static argument: such a plan is not kept
        key = None
    if cached is None or cached.__class__ is Seen:
        return _executed_first(tape, request, seeds, key, cached, last=last)
    if cached.staged and not last:
        tape.prepared[again] = cached
        return cached.run_on(tape, seeds)
    values = tape.values
    if last:
        values, tape.values = Spent(values), []
        tape.forget()
    return cached.run(values, seeds)


def _executed_first(
    tape: Any, request: Request | AlgebraRequest, seeds: Sequence[torch.Tensor], key: Any, known: Any, *, last: bool
) -> dict[Any, torch.Tensor | None]:
    """As :func:`execute`, where there is no plan yet."""
    note_numbers(tape)
    if isinstance(request, Request) and is_long(tape.records):
        soon: dict[Any, torch.Tensor | None] | None = first_runs(key, known, lambda: swept(tape, request, seeds))
        if soon is not None:
            return soon
    if key is not None and _is_large(tape, request) and (made := _planned_dry(tape, request, seeds)) is not None:
        CACHE.put(key, made)
        if last and not made.staged:
            values, tape.values = Spent(tape.values), []
            tape.forget()
            return made.run(values, seeds)
        return made.run_on(tape, seeds)
    with rehearsed() as recorder:
        planned = _planned(tape, request, seeds)
        results = owned(planned.program, planned.results)
    found = {k: None if r is None else r.value for k, r in zip(planned.keys, results, strict=True)}
    if key is None and recorder is None:
        return found
    recorded = (without_values(planned.program), [bare(r) for r in results])
    made = CachedPlan(planned.keys, recorded, staged=request.kind in ("pull", "push"))
    if key is not None:
        CACHE.put(key, made)
    if recorder is None:
        return found
    made.compile_for(recorder)
    return made.run_on(tape, seeds)


def execute_known(tape: Any, request: Request) -> Sequence[torch.Tensor | None] | None:
    """The results of a Jacobian, the last thing asked of a tape, in the order of their keys; None if its plan is not known.

    This is :func:`execute` for the commonest request, with less on the way; where it gives None, nothing was done.

    Args:
        tape: the tape; its values are let go as the plan has read them.
        request: what is asked, without seeds.
    """
    if current_ledger() is not None:
        return None
    try:
        cached: Any = CACHE.get(((tuple(tape.key), tuple(tape.inputs), request), ()))
    except TypeError:  # an unhashable static argument
        return None
    if cached is None or cached.__class__ is Seen:
        return None
    values, tape.values = Spent(tape.values), []
    tape.forget()
    found: Sequence[torch.Tensor | None] = cached.results(values, ())
    return found


def first_runs(key: Any, known: Any, sweep: Callable[[], Any], levels: int = 1) -> Any:
    """The result of one of the first runs of a signature on a long tape; None where a plan is to be made.

    Args:
        key: the key of the plan; None where none would be kept.
        known: what the cache holds for it, which is no plan.
        sweep: computes the result without a plan; None where it cannot.
        levels: how many transforms are swept, each of which records those inside of it.
    """
    seen: Any = Seen() if known is None else known
    if seen.runs * levels >= RUNS or current_watch() is not None:
        return None
    # What is recorded for replays is planned, as is what a vmap sees; a transform around this one records a sweep as well.
    modes = range(torch._C._len_torch_dispatch_stack())
    if forward_ad._current_level >= 0 or any(torch._C._get_dispatch_stack_at(place).__class__ is not Tape for place in modes):
        return None
    try:
        with postponed_collection():
            found = sweep()
    except NotFiniteError:
        found = None
    if key is not None:
        seen.runs = RUNS if found is None else seen.runs + 1
        CACHE.put(key, seen)
    return found


def predicted(tape: Any, request: Request, limit: float = math.inf) -> Memory:
    """The memory of the plan of a request, which is made if it is not known, and run unless it needs more than `limit`.

    A run tells the work space of its calls, too. A plan that cannot be made without running it is run in any case.
    """
    if current_ledger() is None and (known := _known_plan(tape, request)) is not None:
        known.compile()
        source = known.runner.source_of  # type: ignore[union-attr]
        memory: Memory = source.memory()
        if memory.peak > limit:
            return memory
    with watching() as watch, uncollected():
        for _ in range(2):  # the first time plans
            execute(tape, request)
    return Memory(watch.results, watch.peak)


def forget(tape: Any, request: Request) -> None:
    """Forget the plan of a request, and the constants that it keeps."""
    try:
        CACHE.drop(_key(tape, request, ()))
    except TypeError:  # an unhashable static argument: it was not kept
        return


def _known_plan(tape: Any, request: Request) -> CachedPlan | None:
    """The plan of a Jacobian, made without being run if it is not known; None where that is not possible."""
    key: Any = _key(tape, request, ())
    try:
        cached: Any = CACHE.get(key)
    except TypeError:  # an unhashable static argument
        return None
    if cached is None or cached.__class__ is Seen:
        note_numbers(tape)
        cached = _planned_dry(tape, request, ())
        if cached is not None:
            CACHE.put(key, cached)
    return cached if cached.__class__ is CachedPlan and not cached.staged else None


@dataclass
class KnownPeak:
    """What a plan of a signature holds at once.

    Attributes:
        elements: how many elements.
        used: for the cache.
    """

    elements: int
    used: bool = False


def peak_elements(tape: Any, request: AlgebraRequest, seeds: Sequence[torch.Tensor] = ()) -> int:
    """The most elements that the cheapest plan of a request holds at once; predicted once per signature, nothing is run.

    Args:
        tape: the tape.
        request: what is asked.
        seeds: the seed tensors.
    """
    key: Any = ("peak", _key(tape, request, seeds))
    try:
        known: Any = CACHE.get(key)
    except TypeError:  # an unhashable static argument
        return predicted_peak(tape, request, seeds)
    if known is None:
        known = KnownPeak(predicted_peak(tape, request, seeds))
        CACHE.put(key, known)
    return int(known.elements)


def _is_large(tape: Any, request: Request | AlgebraRequest) -> bool:
    """Whether the first run of a plan is to hold no more than later ones do."""
    if not isinstance(request, Request) or request.kind not in ("jacobian", "pull", "push"):
        return False
    if _FRUGAL.get():
        return True
    outputs, inputs = ([tape.values[slot].numel() for slot in set(slots)] for slots in (request.outputs, request.inputs))
    return request.kind == "jacobian" and sum(outputs) * sum(inputs) >= _LARGE


def _planned_dry(tape: Any, request: Request | AlgebraRequest, seeds: Sequence[torch.Tensor]) -> CachedPlan | None:
    """The plan of a request, which nothing is run for; None where it can be made by running it only."""
    modes = range(torch._C._len_torch_dispatch_stack())
    if forward_ad._current_level >= 0 or any(torch._C._get_dispatch_stack_at(place).__class__ is not Tape for place in modes):
        return None
    if torch._C._are_functorch_transforms_active() or functions_are_replaced():
        return None
    try:
        with dry():
            planned = _planned(tape, request, seeds)
            results = owned(planned.program, planned.results)
    except (NotDryError, NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return None  # what is wrong with the request itself is said by the run
    if not isinstance(planned.program, DryRun) or not is_complete(planned.program):
        return None
    recorded = (without_values(planned.program), [bare(r) for r in results])
    return CachedPlan(planned.keys, recorded, staged=request.kind in ("pull", "push"))


def _planned(
    tape: Any, request: Request | AlgebraRequest, seeds: Sequence[torch.Tensor], *, compare: bool = False
) -> Planned:
    with postponed_collection(), functions_aside():
        if isinstance(request, AlgebraRequest):
            return plan_algebra(tape, request, seeds)
        return plan(tape, request, seeds, compare=compare)


def _execute_accounted(
    tape: Any, request: Request | AlgebraRequest, seeds: Sequence[torch.Tensor], ledger: Ledger
) -> dict[Any, torch.Tensor | None]:
    """Plan anew, run, and put the account of it into the ledger."""
    planned = _planned(tape, request, seeds, compare=True)
    results = owned(planned.program, planned.results)
    source = Source(planned.program, results)
    source.observe(tape.values, seeds)
    memory, calls = source.memory(), planned.program.instructions
    found = {k: None if r is None else r.value for k, r in zip(planned.keys, results, strict=True)}
    if any(value.__class__ is BatchTensor for value in (*tape.values, *seeds)):
        # What is on the tape has the shapes of one sample; memory is that of the whole batch.
        batched = CachedPlan(planned.keys, (without_values(planned.program), [bare(r) for r in results]))
        with watching() as watch, uncollected():
            batched.run(tape.values, seeds)  # finds its form on the stored tensors
            watch.peak = 0
            batched.run(tape.values, seeds)
        memory = Memory(watch.results, watch.peak, memory.uncounted)
    ledger.accounts.append(account_of(tape, request, planned.graph, planned.chosen, planned.candidates, calls, memory))
    return found


def account_of(
    tape: Any,
    request: Request | AlgebraRequest,
    graph: Graph,
    chosen: str,
    candidates: Sequence[Candidate],
    calls: Sequence[Instruction],
    memory: Memory | None = None,
) -> Account:
    """The account of a plan that ran."""
    taken = next((c for c in candidates if c.name == chosen), candidates[0] if candidates else None)
    watch = Watch()
    watch.add_run(tape)
    slots = dict.fromkeys((*request.inputs, *request.outputs))
    size = max((tape.values[slot].element_size() for slot in slots), default=4)
    return Account(
        kind=request.kind,
        order=chosen if request.kind in ("pull", "push") else request.order,
        chosen=chosen,
        input_shapes=[tuple(tape.values[slot].shape) for slot in dict.fromkeys(request.inputs)],
        output_shapes=[tuple(tape.values[slot].shape) for slot in dict.fromkeys(request.outputs)],
        recorded=len(tape.records),
        ops=[
            {"op": str(step.op), "kind": step.kind, "family": step.family, "shapes": list(step.out_shapes)}
            for step in graph.steps
        ],
        alternatives=[
            {"order": c.name, "flops": c.flops, "bytes": c.moved * size, "peak_bytes": c.peak * size, "cost": c.cost}
            for c in candidates
        ],
        calls=[{"call": getattr(i.function, "__name__", str(i.function)), "results": len(i.outputs)} for i in calls],
        vertices=_vertices(tape, request, graph),
        edges=[
            {
                "source": source, "target": target, "terms": len(local.terms),
                "stored": sum(factor.node.numel for term in local.terms for factor in term.factors),
                "dense": tape.values[source].numel() * tape.values[target].numel(),
            }
            for target, incoming in graph.into.items() for source, local in incoming
        ],
        eliminated=list(taken.eliminated) if taken is not None else [],
        steps=[
            {"label": label, "shape": list(sizes), "flops": flops, "bytes": moved * size}
            for label, sizes, flops, moved in (taken.steps if taken is not None else ())
        ],
        memory={}
        if memory is None
        else {
            "recorded": watch.held, "temporaries": memory.temporaries, "results": memory.results,
            "peak": max(watch.peak, watch.held + memory.peak),
        },
        uncounted=[] if memory is None else list(memory.uncounted),
    )  # fmt: skip


def _vertices(tape: Any, request: Request | AlgebraRequest, graph: Graph) -> list[dict[str, Any]]:
    made = {slot: step for step in graph.steps for slot in step.outputs}
    found = []
    for slot in sorted({*request.inputs, *request.outputs, *graph.order, *graph.out_of}):
        step = made.get(slot)
        role = "input" if slot in request.inputs else "output" if slot in request.outputs else "inner"
        vertex = {"slot": slot, "shape": list(tape.values[slot].shape), "role": role, "op": "", "kind": "", "family": ""}
        if step is not None:
            vertex.update(op=str(step.op), kind=step.kind, family=step.family)
        found.append(vertex)
    return found


def _key(tape: Any, request: Request | AlgebraRequest, seeds: Sequence[torch.Tensor]) -> Any:
    return (tape.signature(request), tuple([(seed.shape, seed.dtype) for seed in seeds]) if seeds else ())
