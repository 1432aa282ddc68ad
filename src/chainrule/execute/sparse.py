"""Running sparse requests: one plan per signature and per value of the index tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from chainrule.batching.tensor import BatchTensor
from chainrule.capture.numbers import note_numbers
from chainrule.capture.recorder import WholeRecorder, whole_recorder
from chainrule.dispatch import unseen
from chainrule.execute.accounts import UNCACHED, Ledger, current_ledger
from chainrule.execute.engine import CACHE, CachedPlan, account_of
from chainrule.execute.replay import Runner, compile_program, owned
from chainrule.maps.sparse import plain
from chainrule.maps.staging import Staged
from chainrule.plan.patterns import Pattern
from chainrule.plan.planner import Request
from chainrule.plan.sparse import PlannedSparse, SparseExpression, SparseRequest, freeze, plan_sparse

#: So many patterns are kept per signature.
_PATTERNS = 8


@dataclass
class Layouts:
    """A pattern in the forms in which results hold it, made on request.

    Attributes:
        pattern: the pattern.
    """

    pattern: Pattern
    _coo: torch.Tensor | None = None
    _csr: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def coo(self) -> torch.Tensor:
        """The indices over all dimensions of output and input: ``(dimensions, entries)``."""
        if self._coo is None:
            pattern = self.pattern
            shape = (*pattern.out_shape, *pattern.in_shape)
            indices = pattern.keys.new_empty((len(shape), pattern.keys.numel()))
            rest = pattern.keys
            for number in reversed(range(len(shape))):
                torch.remainder(rest, max(shape[number], 1), out=indices[number])
                rest = torch.div(rest, max(shape[number], 1), rounding_mode="floor")
            self._coo = indices
        return self._coo

    @property
    def csr(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the rows of the flattened block begin, and the columns."""
        if self._csr is None:
            keys, columns = self.pattern.keys, max(self.pattern.columns, 1)
            starts = torch.arange(self.pattern.rows + 1, device=keys.device) * columns
            self._csr = torch.searchsorted(keys, starts), torch.remainder(keys, columns)
        return self._csr


Found = dict[Any, tuple[torch.Tensor, Layouts]]


@dataclass
class SparsePlan:
    """A plan for one value of the index tensors.

    Attributes:
        exact: tape slots of index tensors, and the values that the plan is for.
        computed: computes indices that are made from other tensors; None if there are none.
        expected: what it gave.
        values: computes the values of the entries.
        layouts: per block, where they stand.
    """

    exact: list[tuple[int, torch.Tensor]]
    computed: Runner | None
    expected: list[torch.Tensor]
    values: CachedPlan
    layouts: dict[tuple[int, int], Layouts]

    def fits(self, tape: Any) -> bool:
        """Whether the plan is for the index tensors of this run."""
        recorder = whole_recorder()
        for slot, known in self.exact:
            if not _has(tape.values[slot], known, recorder):
                return False
        if self.computed is not None:
            found = self.computed(tape.values, ())
            return all(_has(one, two, recorder) for one, two in zip(found, self.expected, strict=True))
        return True

    def run(self, tape: Any, seeds: Sequence[torch.Tensor] = ()) -> Found:
        """The values of a run."""
        values = self.values.run(tape.values, seeds)
        return {block: (values[block], layout) for block, layout in self.layouts.items()}  # type: ignore[misc]


@dataclass
class SparsePlans:
    """The plans of one signature, the last used first.

    Attributes:
        plans: the plans.
        by_levels: for a Hessian, whether gradient and Hessian cannot be one program.
        used: for the cache.
    """

    plans: list[SparsePlan] = field(default_factory=list)
    by_levels: bool = False
    used: bool = False

    def find(self, tape: Any) -> SparsePlan | None:
        """The plan for the index tensors of a run."""
        for number, plan in enumerate(self.plans):
            if plan.fits(tape):
                if number:
                    self.plans.insert(0, self.plans.pop(number))
                return plan
        return None

    def add(self, plan: SparsePlan) -> None:
        """Keep a plan."""
        self.plans.insert(0, plan)
        del self.plans[_PATTERNS:]


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


def execute_sparse(tape: Any, request: SparseRequest | SparseExpression, seeds: Sequence[torch.Tensor] = ()) -> Found:
    """The values of the entries of every block that has some, and where they stand.

    Args:
        tape: the finished tape, or several that are joined.
        request: what is asked.
        seeds: the factors that an expression names.
    """
    ledger = current_ledger()
    if ledger is not None and ledger is not UNCACHED:
        return _execute_accounted(tape, request, seeds, ledger)
    plans = plans_of(tape, (request, tuple([seed.dtype for seed in seeds])))
    plan = plans.find(tape)
    if plan is None:
        with planning(tape):
            plan = make_plan(plan_sparse(tape, request, seeds=seeds))
        plans.add(plan)
        if whole_recorder() is not None:
            plan.fits(tape)  # the recorder notes what the plan depends on
    return plan.run(tape, seeds)


def _has(tensor: torch.Tensor, known: torch.Tensor, recorder: WholeRecorder | None) -> bool:
    """Whether a tensor has known values; a record of the whole call is right only while it has them."""
    tensor = plain(tensor)
    if recorder is None:
        return torch.equal(tensor, known)
    with unseen():
        if not torch.equal(tensor, known):
            return False
    recorder.expect(tensor, known)
    return True


@contextmanager
def planning(tape: Any) -> Iterator[None]:
    """While a plan is made no other transform sees its calls, where that is possible; its results are those of a later run."""
    plainly = all(not isinstance(value, torch.Tensor) or value.__class__ is not BatchTensor for value in tape.values)
    with torch.no_grad(), unseen() if plainly else nullcontext():
        yield


def _execute_accounted(
    tape: Any, request: SparseRequest | SparseExpression, seeds: Sequence[torch.Tensor], ledger: Ledger
) -> Found:
    """Plan anew, run, and put the account of it into the ledger."""
    with planning(tape):
        planned = plan_sparse(tape, request, seeds=seeds)
        plan = make_plan(planned)
    asked = Request("sparse", request.inputs, request.outputs, request.order)
    source = plan.values.runner.source_of  # type: ignore[union-attr]
    source.observe(tape.values, ())
    account = account_of(tape, asked, planned.graph, planned.chosen, planned.candidates, source.kept, source.memory())
    account.blocks = planned.blocks
    ledger.accounts.append(account)
    return plan.run(tape, seeds)


def make_plan(planned: PlannedSparse) -> SparsePlan:
    """A plan without the tensors of the run that made it, but for its indices."""
    program, workspace = planned.program, planned.workspace
    exact, computed = workspace.guards()
    values = {staged.slot: staged.value for staged in program._input_values.values()}
    pairs = [(number, plain(values[slot]).clone()) for number, slot in exact.items() if isinstance(number, int)]
    runner = compile_program(program, computed) if computed else None
    expected = [plain(staged.value).clone() for staged in computed]
    results = owned(program, list(planned.results.values()))
    freeze(program, workspace, [r for r in results if r is not None])
    bare: list[Staged | None] = [Staged(program, r.slot, None) for r in results if r is not None]  # type: ignore[arg-type]
    program._input_values.clear()
    program._known.clear()
    program.masks.clear()
    cached = CachedPlan(list(planned.results), (program, bare))
    cached.compile()
    return SparsePlan(pairs, runner, expected, cached, {key: Layouts(p) for key, p in planned.patterns.items()})


__all__ = ["Layouts", "SparsePlan", "execute_sparse", "make_plan"]
