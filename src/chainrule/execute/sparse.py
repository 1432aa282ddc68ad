"""Running sparse requests: one plan per signature and per value of the index tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from chainrule.capture.guarded import GuardedRecorder
from chainrule.capture.numbers import note_numbers
from chainrule.capture.whole_recorder import whole_recorder
from chainrule.execute.accounts import UNCACHED, Ledger, account_of, current_ledger
from chainrule.execute.cached_plans import CachedPlan
from chainrule.execute.collection import postponed_collection
from chainrule.execute.engine import CACHE
from chainrule.execute.open_plans import OpenPlan, record_open_plan
from chainrule.execute.replay import compile_program, owned
from chainrule.execute.sparse_plans import (
    Computed,
    Found,
    Guard,
    Layouts,
    SparsePlan,
    SparsePlans,
    may_choose,
    planning,
    steps_of,
)
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Term
from chainrule.maps.unmapped import MappedPatternError, kept, unbatched
from chainrule.plan.patterns import dense_parts
from chainrule.plan.planner import Request
from chainrule.plan.sparse import (
    PlannedSparse,
    SparseExpression,
    SparseRequest,
    described_entries,
    freeze,
    plan_sparse,
    predicted_entries,
)

#: From so many entries on a plan is left where another one would have far fewer.
_MANY = 1 << 12


@dataclass
class ShortPlan:
    """A plan that serves every run of its signature, for the compiled handlers, which make its result, too.

    Attributes:
        quick: as for :class:`~chainrule.execute.cached_plans.CachedPlan`.
        used: for the cache.
    """

    quick: tuple[Any, ...]
    used: bool = False


def keep_short(tape: Any, extra: Any, plan: SparsePlan, maker: Callable[[Layouts], Callable[[torch.Tensor], Any]]) -> None:
    """Keep a plan for the compiled handlers, if it serves every run of its signature and has one block.

    Args:
        tape: the tape of a run that nothing is around.
        extra: what the key of the plan holds beside the run.
        plan: the plan.
        maker: of where the values of the block stand, what makes the result of them.
    """
    quick = plan.values.quick
    if quick is None or len(plan.layouts) != 1 or not plan.is_general:
        return
    replay, needs, _ = quick
    (layouts,) = plan.layouts.values()
    made = maker(layouts)

    def run(values: Sequence[Any], seeds: Sequence[torch.Tensor]) -> tuple[Any]:
        return (made(replay(values, seeds)[0]),)

    key: Any = tape.signature(extra)
    with suppress(TypeError):  # an unhashable static argument
        if CACHE.get(key) is None:
            short: Any = ShortPlan((run, needs, None))
            CACHE.put(key, short)


def sparse_key(request: SparseRequest | SparseExpression, seeds: Sequence[torch.Tensor] = ()) -> Any:
    """What the key of the plans of a request holds beside the run."""
    return request, tuple([seed.dtype for seed in seeds])


def plans_of(tape: Any, extra: Any) -> SparsePlans:
    """The plans of a tape's signature."""
    key: Any = tape.signature(("sparse", extra))
    try:
        plans: Any = CACHE.get(key)
    except TypeError:  # an unhashable static argument: such a plan is not kept
        return SparsePlans()
    if plans is None:
        note_numbers(tape)
        plans = SparsePlans()
        CACHE.put(key, plans)
    found: SparsePlans = plans
    return found


def execute_sparse(
    tape: Any, request: SparseRequest | SparseExpression, seeds: Sequence[torch.Tensor] = (), *, last: bool = False
) -> Found:
    """The values of the entries of every block that has some, and where they stand.

    Args:
        tape: the finished tape, or several that are joined.
        request: what is asked.
        seeds: the factors that an expression names.
        last: whether the tape serves nothing after this.
    """
    ledger = current_ledger()
    if ledger is not None and ledger is not UNCACHED:
        return _execute_accounted(tape, request, seeds, ledger)
    return find_plan(tape, request, seeds).run(tape, seeds, last=last)


def find_plan(
    tape: Any, request: SparseRequest | SparseExpression, seeds: Sequence[torch.Tensor] = ()
) -> SparsePlan | Computed:
    """The plan of a request for the values of a run; it is made where there is none."""
    plans = plans_of(tape, sparse_key(request, seeds))
    plan = plans.find(tape)
    if plan is None and isinstance(request, SparseRequest):
        asked = request
        found = plans.open(tape, partial(_record_planning, tape, asked))
        if found is not None:
            return Computed(found)
    if plan is None:
        with planning(tape):
            plan = make_plan(plan_sparse(tape, request, seeds=seeds, masked=plans.masked, chosen=may_choose(tape)))
        plans.add(plan)
        if whole_recorder() is not None:
            plan.relations.fits(tape)  # the recorder notes what the plan depends on
    return plan


def _record_planning(tape: Any, request: SparseRequest, order: str, masked: bool, padded: bool) -> OpenPlan | None:
    """A plan for any indices; None where there is none."""
    slots = {id(value): number for number, value in enumerate(tape.values)}

    def find(program: Program, tensor: torch.Tensor) -> Staged | None:
        number = slots.get(id(tensor))
        return None if number is None else program.input(number, tensor)

    with torch.no_grad(), postponed_collection():
        return record_open_plan(tape, request, order, GuardedRecorder(find), lambda key: key, masked=masked, padded=padded)


@dataclass
class KnownEntries:
    """How many entries an expression has.

    Attributes:
        count: how many; None where they cannot be listed.
        used: for the cache.
    """

    count: int | None
    used: bool = False


def entries_predicted(
    tape: Any, request: SparseExpression, seeds: Sequence[torch.Tensor], limit: int
) -> int | None:
    """How many entries the terms of an expression have; found out once per signature, nothing is run.

    Args:
        tape: the finished tape, or several that are joined.
        request: what is asked.
        seeds: the factors that an expression names.
        limit: more entries of one op than this are not listed.

    Returns:
        The number; None where entries cannot be listed, or stand at other places in each sample of a vmap.
    """
    key: Any = tape.signature(("entries", request, tuple([seed.dtype for seed in seeds]), mapped_slots(tape), limit))
    try:
        known: Any = CACHE.get(key)
    except TypeError:  # an unhashable static argument
        key = known = None
    if known is None:
        try:
            with planning(tape):
                known = KnownEntries(predicted_entries(tape, request, seeds, limit))
        except MappedPatternError:
            known = KnownEntries(None)
        if key is not None:
            CACHE.put(key, known)
    count: int | None = known.count
    return count


def terms_described(
    tape: Any, request: SparseExpression, seeds: Sequence[torch.Tensor], limit: int
) -> dict[tuple[int, int], list[Term]] | None:
    """The terms of the entries of an expression (see :func:`~chainrule.plan.sparse.described_entries`).

    None, too, where they stand at other places in each sample of a vmap.
    """
    try:
        with planning(tape):
            return described_entries(tape, request, seeds, limit)
    except MappedPatternError:
        return None


def mapped_slots(tape: Any) -> tuple[int, ...]:
    """Which values of a tape differ between the samples of a vmap: what is read off indices depends on it."""
    if not torch._C._len_torch_dispatch_stack():
        return ()
    return tuple(slot for slot, v in enumerate(tape.values) if isinstance(v, torch.Tensor) and unbatched(v) is None)


def _execute_accounted(
    tape: Any, request: SparseRequest | SparseExpression, seeds: Sequence[torch.Tensor], ledger: Ledger
) -> Found:
    """Plan anew, run, and put the account of it into the ledger."""
    with planning(tape):
        planned = plan_sparse(tape, request, seeds=seeds, chosen=may_choose(tape), compare=True)
        plan = make_plan(planned)
    asked = Request("sparse", request.inputs, request.outputs, request.order)
    source = plan.values.runner.source_of  # type: ignore[union-attr]
    source.observe(tape.values, ())
    account = account_of(tape, asked, planned.graph, planned.chosen, planned.candidates, source.kept, source.memory())
    with planning(tape):
        account.blocks = [
            {**block, "parts": [dense_parts(keys, block["shape"][1]) for keys in block.pop("keys")]} for block in planned.blocks
        ]
    ledger.accounts.append(account)
    return plan.run(tape, seeds)


def _guard(planned: PlannedSparse, staged: Sequence[Staged]) -> Guard:
    """What holds for indices or masks in the run that made a plan."""
    program = planned.program
    exact, computed = planned.workspace.fixed.guards(staged)
    values = {known.slot: known.value for known in program._input_values.values()}
    pairs = [(number, kept(values[slot])) for number, slot in exact.items() if isinstance(number, int)]
    runner = compile_program(program, computed) if computed else None
    expected = [kept(one.value) for one in computed]
    return Guard(pairs, runner, expected, () if runner is None else steps_of(runner))


def make_plan(planned: PlannedSparse) -> SparsePlan:
    """A plan without the tensors of the run that made it, but for its indices."""
    program, workspace = planned.program, planned.workspace
    guarded = (workspace.fixed.relations, workspace.fixed.masks, workspace.fixed.choices)
    relations, masks, choices = (_guard(planned, staged) for staged in guarded)
    entries = sum(pattern.keys.numel() for pattern in planned.patterns.values())
    full = workspace.fixed.filled() if entries >= _MANY else ()
    freeze(program, workspace, list(planned.results.values()))
    results = owned(program, list(planned.results.values()))  # entries that are constants of the plan, too, are copied
    bare: list[Staged | None] = [Staged(program, r.slot, None) for r in results if r is not None]  # type: ignore[arg-type]
    program._input_values.clear()
    program._known.clear()
    program.masks.clear()
    program.graded.clear()
    program.selecting.clear()
    cached = CachedPlan(list(planned.results), (program, bare))
    cached.compile()
    layouts = {key: Layouts(pattern) for key, pattern in planned.patterns.items()}
    return SparsePlan(relations, masks, choices, cached, layouts, workspace.masked, workspace.chosen, planned.chosen, full)


__all__ = [
    "entries_predicted", "execute_sparse", "find_plan", "keep_short", "make_plan", "mapped_slots", "plans_of", "sparse_key",
    "terms_described",
]  # fmt: skip
