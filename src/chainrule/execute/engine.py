"""Running requests: look the plan up by the tape's signature, replay it, or plan it now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from chainrule.batching.duals import refuse_duals
from chainrule.batching.tensor import BatchTensor
from chainrule.capture.numbers import note_numbers
from chainrule.capture.tape import Tape
from chainrule.capture.whole_recorder import rehearsed
from chainrule.execute.accounts import SWEPT, UNCACHED, Ledger, account_of, current_ledger, uncollected
from chainrule.execute.cached_plans import CachedPlan, PlanCache
from chainrule.execute.collection import postponed_collection
from chainrule.execute.memory import Memory, current_watch, watching
from chainrule.execute.planning import is_large, key_of, plan_of, planned_dry
from chainrule.execute.replay import Source, Spent, bare, owned, without_values
from chainrule.execute.sweeps import RUNS, NotFiniteError, Seen, is_long, swept
from chainrule.plan.algebra import AlgebraRequest
from chainrule.plan.planner import Request

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
            planned = plan_of(tape, request, seeds)
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
    key = key_of(tape, request, seeds)
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
    if key is not None and is_large(tape, request) and (made := planned_dry(tape, request, seeds)) is not None:
        CACHE.put(key, made)
        if last and not made.staged:
            values, tape.values = Spent(tape.values), []
            tape.forget()
            return made.run(values, seeds)
        return made.run_on(tape, seeds)
    with rehearsed() as recorder:
        planned = plan_of(tape, request, seeds)
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


class Known(NamedTuple):
    """A request with seeds that was executed before on the same tape.

    Attributes:
        keys: of the results.
        apply: from the tape's values, `known` and seeds to the results.
        known: what does not depend on the seeds.
    """

    keys: Sequence[Any]
    apply: Callable[[Sequence[Any], Any, Sequence[torch.Tensor]], Sequence[torch.Tensor | None]]
    known: Any


def repeated_request(tape: Any, request: Request, seeds: Sequence[torch.Tensor]) -> Known | None:
    """What executes a request again that was executed with such seeds; None where it is executed otherwise."""
    plan = tape.prepared.get((request, tuple([(seed.shape, seed.dtype) for seed in seeds])))
    if plan is None or plan.runner is None or None in plan.runner.source_of.wanted:
        return None
    if plan.stages is None:
        return Known(plan.keys, lambda values, _, seeds: plan.results(values, seeds), None)  # type: ignore[no-any-return]
    found = tape.prepared.get((id(plan), torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
    return None if found is None else Known(plan.keys, plan.stages.apply, found[1])


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


def _execute_accounted(
    tape: Any, request: Request | AlgebraRequest, seeds: Sequence[torch.Tensor], ledger: Ledger
) -> dict[Any, torch.Tensor | None]:
    """Plan anew, run, and put the account of it into the ledger."""
    planned = plan_of(tape, request, seeds, compare=True)
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
