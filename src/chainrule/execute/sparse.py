"""Running sparse requests: one plan per signature and per value of the index tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from chainrule.execute.engine import CACHE, CachedPlan
from chainrule.execute.replay import Runner, compile_program, owned
from chainrule.maps.sparse import plain
from chainrule.maps.staging import Staged
from chainrule.plan.sparse import Pattern, PlannedSparse, SparseRequest, freeze, plan_sparse

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
        for slot, known in self.exact:
            if not torch.equal(plain(tape.values[slot]), known):
                return False
        if self.computed is not None:
            found = self.computed(tape.values, ())
            return all(torch.equal(plain(one), two) for one, two in zip(found, self.expected, strict=True))
        return True


@dataclass
class SparsePlans:
    """The plans of one signature, the last used first."""

    plans: list[SparsePlan] = field(default_factory=list)
    used: bool = False


def execute_sparse(
    tape: Any, request: SparseRequest
) -> dict[tuple[int, int], tuple[torch.Tensor, Layouts]]:
    """The values of the entries of every block that has some, and where they stand.

    Args:
        tape: the finished tape.
        request: what is asked.
    """
    key: Any = tape.signature(("sparse", request))
    try:
        plans: Any = CACHE.get(key)
    except TypeError:  # an unhashable static argument: such a plan is not kept
        key = plans = None
    if plans is None:
        plans = SparsePlans()
        if key is not None:
            CACHE.put(key, plans)
    for number, plan in enumerate(plans.plans):
        if plan.fits(tape):
            if number:
                plans.plans.insert(0, plans.plans.pop(number))
            break
    else:
        plan = make_plan(plan_sparse(tape, request))
        plans.plans.insert(0, plan)
        del plans.plans[_PATTERNS:]
    values = plan.values.run(tape.values, ())
    return {block: (values[block], layout) for block, layout in plan.layouts.items()}  # type: ignore[misc]


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
