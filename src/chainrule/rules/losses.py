"""Negative log-likelihoods of given classes, as one op: each sample picks one entry of its row."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from chainrule.maps.nodes import leaf
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Factor, OneHot, Term, dims_of, new_axes
from chainrule.rules.base import Call, Edge, Rule, formula_node, single
from chainrule.rules.direct import is_plain_nll

aten = torch.ops.aten

#: The numbers by which torch names the ways to reduce a loss.
NONE, MEAN = 0, 1


def _nll(call: Call) -> Iterable[Edge]:
    """``-input[n, target[n]]``, summed or averaged over the targets that count."""
    item, target = call.args[0], call.args[1]
    if not call.is_active(item):
        return
    reduction, ignored = call.argument("reduction"), call.argument("ignore_index")
    axes = new_axes(call.shape(item))
    samples, classes = axes[:-1], axes[-1]
    sizes = tuple(axis.size for axis in samples)

    def chosen(program: Program) -> Staged:
        place = call.stage(program, target)
        place = torch.where(torch.ne(place, ignored), place, 0)
        return place if tuple(place.shape) == sizes else torch.reshape(place, sizes)

    def weighting(program: Program) -> Any:
        kept = torch.ne(call.stage(program, target), ignored)
        # A number, or the total that torch divides by: nothing where no target counts.
        weight = torch.reciprocal(call.stage_output(program, 1)) if reduction == MEAN else None
        dtype = call.tensor(item).dtype
        scaled = kept.to(dtype) if weight is None else torch.where(kept, weight, 0.0)
        return torch.neg(torch.reshape(scaled, sizes))

    relation = OneHot(leaf(sizes, chosen, label="index", batch=call.batch), samples, classes)
    factor = Factor(formula_node(call, sizes, weighting), samples)
    # A target may have a dimension of size one where there is only one sample.
    out_dims = dims_of(samples) if reduction == NONE and call.out_shape else ()
    yield single(call, item, [Term(out_dims, dims_of(axes), (factor,), (relation,))])


#: Ops that have a composite form: which calls are recorded whole nevertheless.
WHOLE: dict[Any, Callable[[tuple[Any, ...], bool], bool]] = {
    aten.nll_loss_forward.default: lambda args, kernels: kernels and is_plain_nll(*args[:3])
}

RULES: dict[Any, Rule] = {aten.nll_loss_forward.default: Rule("selection", _nll)}

__all__ = ["RULES", "WHOLE"]
