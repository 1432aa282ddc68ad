"""``segment_reduce``: sums, means and extrema of consecutive rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from chainrule.maps.nodes import choosing, leaf
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Factor, OneHot, Term, dims_of, new_axes
from chainrule.rules.base import Call, Edge, Rule, formula_node, single
from chainrule.rules.opaque import opaque_edges

aten = torch.ops.aten

#: Reductions with a rule; products are differentiated by torch's formula.
_REDUCTIONS = ("sum", "mean", "max", "min")


def _segment_reduce(call: Call) -> Iterable[Edge]:
    item, lengths, offsets = call.args[0], call.argument("lengths"), call.argument("offsets")
    marks = lengths if call.is_slot(lengths) else offsets
    shape, reduce = call.shape(item), call.argument("reduce")
    structured = reduce in _REDUCTIONS and call.is_slot(marks) and len(call.shape(marks)) == 1 and call.argument("axis") == 0
    if not structured or 0 in shape or 0 in call.out_shape:
        yield from opaque_edges(call)
        return
    rows, count = shape[0], call.out_shape[0]

    def sizes(program: Program) -> Staged:
        staged: Staged = call.stage(program, marks)
        return staged if call.is_slot(lengths) else torch.diff(staged)

    def segments(program: Program) -> Staged:
        """The segment of each row."""
        numbers = program.call(torch.arange, rows, device=call.workspace.device)
        ends = torch.cumsum(sizes(program), 0)  # type: ignore[call-overload]
        return torch.searchsorted(ends, numbers, right=True)  # type: ignore[no-any-return]

    def shares(program: Program) -> Staged:
        """One over the number of rows of each row's segment."""
        of_segments = torch.reciprocal(sizes(program).to(call.workspace.dtype))
        return torch.index_select(of_segments, 0, segments(program))

    def extremal(program: Program) -> Staged:
        """The share of each element in the extremum of its segment: ties share it."""
        x, index = call.stage(program, item), segments(program)
        taken = (x == torch.index_select(call.stage_output(program), 0, index)).to(call.workspace.dtype)
        zeros = program.call(torch.zeros, call.out_shape, dtype=call.workspace.dtype, device=call.workspace.device)
        ties = torch.clamp_min(torch.index_add(zeros, 0, index, taken), 1.0)
        return program.note_mask(taken / torch.index_select(ties, 0, index), taken)

    axes, segment = new_axes(shape), Axis(count)
    factors: tuple[Factor, ...] = ()
    if reduce == "mean":
        factors = (Factor(formula_node(call, (rows,), shares), axes[:1]),)
    elif reduce != "sum":
        factors = (Factor(choosing(formula_node(call, shape, extremal)), axes),)
    relation = OneHot(leaf((rows,), segments, label="index"), axes[:1], segment)
    yield single(call, item, [Term(dims_of((segment, *axes[1:])), dims_of(axes), factors, (relation,))])


RULES: dict[Any, Rule] = {aten.segment_reduce.default: Rule("selection", _segment_reduce)}

__all__ = ["RULES"]
