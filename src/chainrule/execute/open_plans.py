"""Sparse plans for any indices: planning itself, written down with what it saw of them.

A plan is made for the values of the index tensors and for what ops chose by value. Where these are others in every call (the
largest elements of rows, in a Newton iteration), planning takes the same course all the same: the same terms, of the same
sizes, with other relations. That course is recorded as a program from the values of a run to the values and places of the
entries of every term; what is left for each call is to put these into one list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from chainrule.capture.guarded import GuardedRecorder, OtherCourseError
from chainrule.execute.cached_plans import CachedPlan
from chainrule.execute.replay import bare, without_values
from chainrule.maps.sorted_places import ordering
from chainrule.plan.patterns import Key, Pattern
from chainrule.plan.sparse import SparseRequest, listed_terms

#: What a record holds for a tensor: the number of a result, or a tensor that is the same in every run.
_Part = int | torch.Tensor


class _Block(NamedTuple):
    """One block of the result.

    Attributes:
        key: its name.
        out_shape: the shape of the output.
        in_shape: the shape of the input.
        dtype: the dtype of the result.
        terms: of each term the values of the entries and their keys (negative where there is none).
        side: 1 where rows may not come before columns, -1 the other way round, 0 where every entry is wanted.
    """

    key: Key
    out_shape: tuple[int, ...]
    in_shape: tuple[int, ...]
    dtype: torch.dtype
    terms: list[tuple[_Part, _Part]]
    side: int


@dataclass
class OpenPlan:
    """A plan for all runs of a signature in which planning takes the same course.

    Attributes:
        values: computes what the terms consist of.
        blocks: the blocks of the result.
    """

    values: CachedPlan
    blocks: list[_Block]

    def run(self, values: Sequence[Any]) -> dict[Key, tuple[torch.Tensor, Pattern]] | None:
        """Values and places of the entries of every block that has some; None where planning takes another course."""
        try:
            found = self.values.results(values, ())
        except OtherCourseError:
            return None
        result = {}
        for block in self.blocks:
            parts = [tuple(found[p] if isinstance(p, int) else p for p in term) for term in block.terms]
            entries, keys = _listed([part[0] for part in parts], [part[1] for part in parts], block)
            if keys.numel():
                result[block.key] = entries.to(block.dtype), Pattern(block.out_shape, block.in_shape, keys)
        return result


def _listed(values: list[Any], places: list[Any], block: _Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries of several terms as one list: their values, added up where they meet, and their keys in order."""
    entries, keys = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in (values, places))
    wanted = None
    if keys.numel() and bool((keys < 0).any()):
        wanted = keys >= 0
    if block.side:
        columns = max(torch.Size(block.in_shape).numel(), 1)
        beyond = (torch.div(keys, columns, rounding_mode="floor") - torch.remainder(keys, columns)) * block.side >= 0
        wanted = beyond if wanted is None else wanted & beyond
    if wanted is not None:
        chosen = torch.nonzero(wanted).squeeze(1)
        entries, keys = entries.index_select(0, chosen), keys.index_select(0, chosen)
    if bool((keys[1:] > keys[:-1]).all()):
        return entries, keys
    order = ordering(keys)
    keys, entries = keys.index_select(0, order), entries.index_select(0, order)
    first = torch.ones(keys.numel(), dtype=torch.bool, device=keys.device)
    torch.ne(keys[1:], keys[:-1], out=first[1:])
    if bool(first.all()):
        return entries, keys
    starts = torch.nonzero(first).squeeze(1)
    rank = torch.cumsum(first, 0).sub_(1)
    return entries.new_zeros(starts.numel()).index_add(0, rank, entries), keys.index_select(0, starts)


def record_open_plan(
    tape: Any, request: SparseRequest, order: str, recorder: GuardedRecorder, rename: Callable[[Key], Key], *, masked: bool,
    padded: bool,
) -> OpenPlan | None:
    """Record planning on a finished tape; None where it does what no replay can do.

    Args:
        tape: the tape.
        request: what is asked.
        order: ``forward`` or ``reverse``.
        recorder: knows the values of the tape.
        rename: the names of blocks, by slots of output and input.
        masked: as for :func:`~chainrule.plan.sparse.plan_sparse`.
        padded: whether lists whose length follows from values have room for a few more.
    """
    with recorder:
        found = listed_terms(tape, request, order, recorder.is_same, masked=masked, padded=padded)
    if not recorder.pure:
        return None
    program = recorder.program
    results: list[Any] = []

    def part(tensor: torch.Tensor) -> _Part:
        staged = recorder.staged(tensor)
        assert staged is not None
        if staged.slot in program.constants:
            return program.constants[staged.slot]
        results.append(bare(staged))
        return len(results) - 1

    blocks = []
    for key, (shapes, dtype, terms) in found.items():
        row = column = side = 0
        if request.triangle is not None:
            row, column = request.numbers[request.outputs.index(key[0])], request.inputs.index(key[1])
            side = 1 if request.triangle == "lower" else -1
            if row != column and (row > column) != (side == 1):
                continue
        parts = [(part(value), part(keys)) for value, keys in terms]
        blocks.append(_Block(rename(key), *shapes, dtype, parts, side if row == column else 0))
    if not results:
        return None
    plan = CachedPlan(list(range(len(results))), (without_values(program), results))
    plan.compile()
    return OpenPlan(plan, blocks)


__all__ = ["OpenPlan", "record_open_plan"]
