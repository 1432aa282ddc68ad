"""Plans as they are kept: compiled once, replayed on other values of the same signature, in a bounded cache."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch.autograd import forward_ad

from chainrule.batching.mode import VmapMode
from chainrule.batching.tensor import BatchTensor
from chainrule.capture.whole_recorder import WholeRecorder
from chainrule.dispatch import functions_are_replaced, functions_seen, undispatched
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
from chainrule.execute.memory import Memory, Watch, current_watch, storage_of
from chainrule.execute.replay import Runner, Source, Spent, Stages, bare, compile_program, compile_stages, part_constants
from chainrule.execute.workspace import free, observe
from chainrule.maps.staging import Program, Staged
from chainrule.modes_off import without_innermost

#: Plans are compiled by one thread at a time.
COMPILING = threading.Lock()


#: The classes of tensors whose calls nothing sees.
_UNFOLLOWED = (torch.Tensor, torch.nn.Parameter)


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
            under = stored_under_vmap([values[key] if key.__class__ is int else seeds[key[1]] for key in self.needs])
            if under is not None and not (under.joined and self._differentiates()):
                return self._run_batched(values, seeds, under)
        elif modes and (found := self._run_nested(values, seeds, modes)) is not None:
            return found
        plain = not modes and runner.plain is not runner and self._is_plain(values, seeds)  # type: ignore[attr-defined]
        if (watch := current_watch()) is not None:
            source = self.runner.source_of  # type: ignore[attr-defined]
            batched = any(value.__class__ is BatchTensor for value in (*values, *seeds))
            joined = not batched and self._is_joined(values, seeds)
            saved = {} if batched or (joined and self._differentiates()) else source.observe(values, seeds, plain=plain)
            spent = watch.spend(values, source.program.inputs) if values.__class__ is Spent else None
            if batched or (joined and not saved):
                taken = sum(dict(place for slot, place in (spent or {}).items() if slot in source.used).values())
                return _observed(watch, self.runner, values, seeds, taken)
            watch.add_program(memory := source.memory(spent, saved, plain=plain))
        if plain:
            runner = runner.plain  # type: ignore[attr-defined]
        if modes and self.stored:
            with functions_seen():
                results = runner(values, seeds)
        else:
            results = runner(values, seeds)
        if watch is not None:
            watch.add_results(results, memory)
        return results

    def run_stored(
        self, values: Sequence[Any], mode: VmapMode, give: Callable[[], None] | None = None
    ) -> tuple[Sequence[Any], list[bool]] | None:
        """Replay on the stored tensors of a vmap that was left, with no mode active.

        Args:
            values: the values of the tape.
            mode: the vmap.
            give: called before the replay, to let go of the values, where nothing else needs them.

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
            saved = source.observe(stored.tensors, (), plain=not stored.joined)
            spent = None if give is None else watch.spend(values, self._stored_slots(source))
            watch.add_program(memory := source.memory(spent, saved, plain=not stored.joined))
        tensors = stored.tensors
        if give is not None:
            tensors = Spent(tensors)
            stored.tensors.clear()
            give()
        results = (runner if stored.joined else runner.plain)(tensors, ())  # type: ignore[attr-defined]
        if watch is not None:
            watch.add_results(results, memory)
        return results, flags

    def _stored_slots(self, source: Source) -> dict[Any, int]:
        """The slots that a program on stored tensors has for values of the tape, by their numbers there."""
        return {self.needs[number]: slot for number, slot in source.program.inputs.items()}

    def _is_plain(self, values: Sequence[Any], seeds: Sequence[torch.Tensor]) -> bool:
        """Whether the program's inputs are tensors whose calls nothing follows."""
        if forward_ad._current_level >= 0:
            return False
        for key in self.needs:
            value = values[key] if key.__class__ is int else seeds[key[1]]
            if value.__class__ not in _UNFOLLOWED or value.requires_grad:
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
        followed = joined or forward_ad._current_level >= 0
        if batched_runner is None:
            return runner(values, seeds) if watch is None else _observed(watch, runner, values, seeds)
        if watch is not None:
            source = batched_runner.source_of  # type: ignore[attr-defined]
            with undispatched():
                saved = source.observe(tensors, (), undispatched=True, plain=not followed)
            spent = watch.spend(values, self._stored_slots(source)) if values.__class__ is Spent else None
            watch.add_program(memory := source.memory(spent, saved, plain=not followed))
        if values.__class__ is Spent:
            tensors = Spent(tensors)
            stored.tensors.clear()
            values.clear()
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
