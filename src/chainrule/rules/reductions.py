"""Reductions over dimensions: sums, products, moments, norms, extrema and the elements they pick."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from chainrule.maps.nodes import Node, choosing, leaf
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Factor, OneHot, Term, dims_of, new_axes
from chainrule.rules.base import Call, Edge, Rule, broadcast_axes, formula_node, single
from chainrule.rules.elementwise_named import broadcast_shape
from chainrule.rules.families import linear_reduction, reduced_term, reduction_dims, weighted_reduction

aten = torch.ops.aten

Spread = Callable[[Staged], Staged]

_SUM = linear_reduction(lambda call, count: 1.0)
_MEAN = linear_reduction(lambda call, count: 1.0 / count)


def _wide_shape(call: Call, dims: Sequence[int]) -> tuple[int, ...]:
    """The shape of the first argument with the reduced dimensions of size one."""
    return tuple(1 if d in dims else size for d, size in enumerate(call.shape(call.args[0])))


def _spread_to(wide: tuple[int, ...]) -> Spread:
    return lambda value: value if tuple(value.shape) == wide else torch.reshape(value, wide)


def _safe(x: Any, condition: Any) -> Any:
    return torch.where(condition, 1.0, x)


# Sums of exponentials.


def _logsumexp(call: Call, program: Program, spread: Spread) -> Any:
    return torch.exp(call.stage(program, call.args[0]) - spread(call.stage_output(program)))


def _nansum(call: Call, program: Program, spread: Spread) -> Any:
    return torch.logical_not(torch.isnan(call.stage(program, call.args[0]))).to(call.workspace.dtype)


# Products.


def products_of_others(x: Any, dim: int) -> Any:
    """For each element along ``dim`` the product of all the others, right where elements are zero."""
    size = x.shape[dim]
    if size == 1:
        return torch.ones_like(x)
    one = torch.ones_like(torch.narrow(x, dim, 0, 1))
    before = torch.cumprod(torch.cat([one, torch.narrow(x, dim, 0, size - 1)], dim), dim)
    flipped = torch.flip(torch.narrow(x, dim, 1, size - 1), [dim])
    after = torch.flip(torch.cumprod(torch.cat([one, flipped], dim), dim), [dim])
    return before * after


def _prod(call: Call, program: Program, spread: Spread) -> Any:
    x = call.stage(program, call.args[0])
    shape = call.shape(call.args[0])
    if x.dtype != call.workspace.dtype:
        x = x.to(call.workspace.dtype)
    if not shape or math.prod(shape) == 0:
        return torch.ones_like(x)
    if call.argument("dim") is not None:
        return products_of_others(x, call.argument("dim") % len(shape))
    return torch.reshape(products_of_others(torch.reshape(x, (math.prod(shape),)), 0), shape)


# Moments.


def _moment(root: bool) -> Rule:
    """The variance (or its root) over dimensions, and the mean as a second output of the ops that have one."""

    def linearize(call: Call) -> Iterable[Edge]:
        item = call.args[0]
        if not call.is_active(item):
            return
        dims = reduction_dims(call)
        shape = call.shape(item)
        spread = _spread_to(_wide_shape(call, dims))
        count = math.prod(shape[d] for d in dims)
        if not count:
            return
        correction = call.argument("correction")
        freedom = count - (1 if correction is None else correction)
        rate = 1.0 / freedom if freedom > 0 else math.inf

        def formula(program: Program) -> Any:
            x = call.stage(program, item)
            centred = x - torch.mean(x, dim=list(dims), keepdim=True) if shape else x - x
            if not root:
                return centred * (2 * rate)
            deviation = spread(call.stage_output(program))
            flat = deviation == 0
            slope = torch.where(flat, 0.0, centred * rate / _safe(deviation, flat))
            return program.note_mask(slope, torch.logical_not(flat))

        node = formula_node(call, shape, formula)
        yield single(call, item, [reduced_term(call, dims, lambda axes: (Factor(node, axes),), 1.0)])
        if len(call.outputs) > 1:
            yield single(call, item, [reduced_term(call, dims, lambda axes: (), 1.0 / count)], output=1)

    return Rule("reduction", linearize)


# Norms.


def norm_slope(x: Any, norm: Any, order: float, dims: Sequence[int]) -> Any:
    """The derivative of a vector norm with respect to each element; 0 where torch takes the zero subgradient."""
    if order == 0:
        return torch.zeros_like(x)
    if order == 1:
        return torch.sgn(x)
    if abs(order) == math.inf:
        taken = (torch.abs(x) == norm).to(norm.dtype)
        count = torch.sum(taken, dim=list(dims), keepdim=True) if x.shape else taken
        return torch.sgn(x) * (taken / count)
    if order == 2:
        return x / torch.where(norm != 0, norm, math.inf)  # of zeros that is zero, and so are its derivatives
    none = norm == 0
    if order < 2:
        origin = x == 0
        power = torch.where(origin, 0.0, torch.pow(torch.abs(_safe(x, origin)), order - 1))
        return torch.where(none, 0.0, torch.sgn(x) * power / torch.pow(_safe(norm, none), order - 1))
    powers = torch.abs(x) if order == 3 else torch.pow(torch.abs(x), order - 2)
    return torch.where(none, 0.0, x * powers / torch.pow(_safe(norm, none), order - 1))


def _norm(name: str) -> Rule:
    def weights(call: Call, program: Program, spread: Spread) -> Any:
        order = call.argument(name)
        x = call.stage(program, call.args[0])
        norm = spread(call.stage_output(program))
        x = x if x.dtype == norm.dtype else x.to(norm.dtype)
        slope = norm_slope(x, norm, 2.0 if order is None else float(order), reduction_dims(call))
        return program.note_mask(slope, norm != 0)

    return weighted_reduction(weights, lambda call: _is_extremal(call.argument(name)))


def _is_extremal(order: Any) -> bool:
    """Whether a norm of this order is the largest or the smallest absolute value."""
    return order is not None and abs(float(order)) == math.inf


def _dist(call: Call) -> Iterable[Edge]:
    """The norm of the difference of two tensors that broadcast against each other."""
    shape = broadcast_shape(call)

    def formula(program: Program) -> Any:
        difference = call.stage(program, call.args[0]) - call.stage(program, call.args[1])
        order = float(call.argument("p"))
        return norm_slope(difference, call.stage_output(program), order, range(len(shape)))

    for position, sign in ((0, 1.0), (1, -1.0)):
        item = call.args[position]
        if call.is_active(item):
            axes = new_axes(shape)
            in_dims = broadcast_axes(call.shape(item), axes)
            node = formula_node(call, shape, formula)
            node.is_choice = _is_extremal(call.argument("p"))
            yield single(call, item, [Term((), in_dims, (Factor(node, axes),), (), sign)])


# Extrema that share the derivative among ties.


def _even(call: Call, output: int) -> Edge:
    item = call.args[0]
    dims = reduction_dims(call)
    spread = _spread_to(_wide_shape(call, dims))

    def formula(program: Program) -> Any:
        x = call.stage(program, item)
        out = spread(call.stage_output(program, output))
        taken = torch.logical_or(x == out, torch.logical_and(torch.isnan(x), torch.isnan(out)))
        taken = taken.to(call.workspace.dtype)
        if not call.shape(item):
            return taken
        return program.note_mask(taken / torch.sum(taken, dim=list(dims), keepdim=True), taken)

    node = choosing(formula_node(call, call.shape(item), formula))
    term = reduced_term(call, dims, lambda axes: (Factor(node, axes),), 1.0)
    return single(call, item, [term], output=output)


def _evenly(call: Call) -> Iterable[Edge]:
    if call.is_active(call.args[0]):
        for output, slot in enumerate(call.outputs):
            if call.tensor(slot).dtype.is_floating_point:
                yield _even(call, output)


# Extrema, order statistics: the op tells which element it picked.


def picked_term(call: Call, dim: int, output: int = 1) -> Term:
    """The term of an op that picks one element along ``dim`` for each element of its output, the index its output."""
    shape, out_shape = call.shape(call.args[0]), call.out_shape
    if not shape:
        return Term((), ())
    axes = list(new_axes(shape))
    kept = len(out_shape) == len(shape)
    scan = kept and out_shape[dim] == shape[dim] and call.argument("keepdim") is None
    source = Axis(shape[dim]) if scan else None
    out_dims: list[tuple[Axis, ...]] = []
    for d, axis in enumerate(axes):
        if d != dim:
            out_dims.append((axis,))
        elif source is not None:
            out_dims.append((source,))
        elif kept:
            out_dims.append(())
    sources = tuple(axis for dims in out_dims for axis in dims)
    node = _picked_index(call, output, tuple(axis.size for axis in sources))
    return Term(tuple(out_dims), dims_of(axes), (), (OneHot(node, sources, axes[dim]),))


def _picked_index(call: Call, output: int, sizes: tuple[int, ...]) -> Node:
    def stage(program: Program) -> Staged:
        index = call.stage_output(program, output)
        return index if tuple(index.shape) == sizes else torch.reshape(index, sizes)

    return leaf(sizes, stage, label="index")


def _picked(call: Call) -> Iterable[Edge]:
    item = call.args[0]
    if call.is_active(item):
        rank = max(len(call.shape(item)), 1)
        yield single(call, item, [picked_term(call, call.argument("dim") % rank)])


def _ordered(call: Call) -> Iterable[Edge]:
    """``sort`` and ``topk``: the second output says what each element of the first one reads."""
    item = call.args[0]
    if not call.is_active(item):
        return
    shape, out_shape = call.shape(item), call.out_shape
    if not shape:
        yield single(call, item, [Term((), ())])
        return
    dim = call.argument("dim") % len(shape)
    axes = new_axes(shape)
    out = (*axes[:dim], Axis(out_shape[dim]), *axes[dim + 1 :])
    relation = OneHot(_picked_index(call, 1, out_shape), out, axes[dim])
    relation.index.distinct = frozenset({dim})
    yield single(call, item, [Term(dims_of(out), dims_of(axes), (), (relation,))])


PICKS = Rule("selection", _picked)
_ORDERED = Rule("selection", _ordered)
_EVEN = Rule("reduction", _evenly)
_PROD = weighted_reduction(_prod)
_NANSUM = weighted_reduction(_nansum)

RULES: dict[Any, Rule] = {
    aten.sum.default: _SUM,
    aten.sum.dim_IntList: _SUM,
    aten.mean.default: _MEAN,
    aten.mean.dim: _MEAN,
    aten.nansum.default: _NANSUM,
    aten.logsumexp.default: weighted_reduction(_logsumexp),
    aten.prod.default: _PROD,
    aten.prod.dim_int: _PROD,
    aten.var.correction: _moment(root=False),
    aten.std.correction: _moment(root=True),
    aten.var_mean.correction: _moment(root=False),
    aten.std_mean.correction: _moment(root=True),
    aten.linalg_vector_norm.default: _norm("ord"),
    aten.norm.Scalar: _norm("p"),
    aten.norm.ScalarOpt_dim: _norm("p"),
    aten.norm.ScalarOpt_dim_dtype: _norm("p"),
    aten.norm.ScalarOpt_dtype: _norm("p"),
    aten.dist.default: Rule("reduction", _dist),
    aten.amax.default: _EVEN,
    aten.amin.default: _EVEN,
    aten.aminmax.default: _EVEN,
    aten.max.default: _EVEN,
    aten.min.default: _EVEN,
    aten.median.default: _EVEN,
    aten.nanmedian.default: _EVEN,
    aten.max.dim: PICKS,
    aten.min.dim: PICKS,
    aten.median.dim: PICKS,
    aten.nanmedian.dim: PICKS,
    aten.mode.default: PICKS,
    aten.kthvalue.default: PICKS,
    aten.sort.default: _ORDERED,
    aten.sort.stable: _ORDERED,
    aten.topk.default: _ORDERED,
}

__all__ = ["PICKS", "RULES", "norm_slope", "picked_term", "products_of_others"]
