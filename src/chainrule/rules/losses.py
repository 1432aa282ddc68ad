"""Losses of given classes, as one op: each sample picks one entry of its row, or compares those of its labels with the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from chainrule.maps.nodes import leaf, selecting
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Factor, OneHot, Term, dims_of, new_axes
from chainrule.rules.base import Call, Edge, Rule, formula_node, single
from chainrule.rules.direct import is_plain_nll
from chainrule.rules.direct_losses import is_plain_multilabel

aten = torch.ops.aten

#: The numbers by which torch names the ways to reduce a loss.
NONE, MEAN = 0, 1


def _nll(call: Call) -> Iterable[Edge]:
    """``-weight[target[n]] input[n, target[n]]``, summed or averaged over the targets that count; or that of one row."""
    item, target, shares = call.args[0], call.args[1], call.args[2]
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

    def counting(program: Program) -> Staged:
        kept = torch.ne(call.stage(program, target), ignored)
        return torch.reshape(kept.to(call.tensor(item).dtype), sizes)

    def weighting(program: Program) -> Staged:
        kept = torch.reshape(torch.ne(call.stage(program, target), ignored), sizes)
        weight = torch.reciprocal(call.stage_output(program, 1)) if reduction == MEAN else None
        if shares is not None:
            share = torch.index_select(call.stage(program, shares), 0, torch.reshape(chosen(program), (-1,)))
            share = torch.reshape(share, sizes)
            weight = share if weight is None else torch.mul(share, weight)
        return torch.where(kept, weight, 0.0)  # a total of nothing has no reciprocal

    relation = OneHot(leaf(sizes, chosen, label="index", batch=call.batch), samples, classes)
    # Of what does not count the derivative is zero, whatever it is multiplied with.
    factors = [Factor(selecting(formula_node(call, sizes, counting)), samples)]
    if shares is not None or reduction == MEAN:
        factors.append(Factor(formula_node(call, sizes, weighting), samples))
    relations: tuple[OneHot, ...] = (relation,)
    # One row, or a scalar: what is pulled back through one place of each row is dense soon.
    if not samples or (reduction != NONE and call.batch == 1):

        def rows(program: Program) -> Staged:
            grid = program.constant(torch.arange(classes.size, device=call.workspace.device))
            place = call.stage(program, target)
            place = torch.reshape(place, (*sizes, 1)) if sizes else torch.reshape(place, ())
            found = torch.eq(place, grid)
            if 0 <= ignored < classes.size:
                found = torch.logical_and(found, torch.ne(place, ignored))
            return found.to(call.tensor(item).dtype)

        factors[0], relations = Factor(selecting(formula_node(call, call.shape(item), rows)), axes), ()
        if shares is None and reduction == MEAN:

            def counted(program: Program) -> Staged:  # a total of nothing has no reciprocal
                return torch.reciprocal(torch.clamp_min(call.stage_output(program, 1), 1.0))

            factors[1] = Factor(formula_node(call, sizes, counted), samples)
    # A target may have a dimension of size one where there is only one sample.
    out_dims = dims_of(samples) if reduction == NONE and call.out_shape else ()
    yield single(call, item, [Term(out_dims, dims_of(axes), tuple(factors), relations, -1.0)])


def _multilabel(call: Call) -> Iterable[Edge]:
    """Linear piece by piece in each row: the slopes, dense in the rows, are constants, of which torch has no derivative."""
    item, target, reduction = call.args
    if not call.is_active(item):
        return
    axes = new_axes(call.shape(item))
    samples = axes[:-1] if reduction == NONE else ()
    loss = call.tensor(call.outputs[0])
    shape, dtype, device = call.out_shape, loss.dtype, loss.device

    def slopes(program: Program) -> Staged:
        ones = program.constant(torch.ones(shape, dtype=dtype, device=device))
        rows = program.call(aten.detach.default, call.stage(program, item))
        places, labels = call.stage(program, target), call.stage_output(program, 1)
        found: Staged = program.call(aten.multilabel_margin_loss_backward.default, ones, rows, places, reduction, labels)
        return found

    factor = Factor(formula_node(call, tuple(axis.size for axis in axes), slopes), axes)
    yield single(call, item, [Term(dims_of(samples), dims_of(axes), (factor,))])


#: Ops that have a composite form: which calls are recorded whole nevertheless.
WHOLE: dict[Any, Callable[[tuple[Any, ...], bool, Callable[[Any], bool]], bool]] = {
    # The losses of all rows, each of one entry, are less to compute in parts, and only a vmap makes them more to record.
    aten.nll_loss_forward.default: lambda args, kernels, is_active: (
        (kernels or args[3] != NONE or any(item.__class__ is not torch.Tensor for item in args[:2]))
        and is_plain_nll(*args[:3])
        and (args[2] is None or not is_active(args[2]))
    ),
    aten.multilabel_margin_loss_forward.default: lambda args, kernels, is_active: is_plain_multilabel(*args[:2]),
}

RULES: dict[Any, Rule] = {
    aten.nll_loss_forward.default: Rule("selection", _nll),
    aten.multilabel_margin_loss_forward.default: Rule("margins", _multilabel),
}

__all__ = ["RULES", "WHOLE"]
