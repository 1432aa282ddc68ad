"""Scans along a dimension: cumulative sums, products, extrema."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from chainrule.maps.contract import Merge
from chainrule.maps.halves import Half
from chainrule.maps.nodes import Node, leaf
from chainrule.maps.running import Running
from chainrule.maps.semiseparable import Semiseparable
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Factor, OneHot, Term, constant_index, dims_of, new_axes
from chainrule.rules.base import Call, Edge, Rule, formula_node, single
from chainrule.rules.families import operator_edge
from chainrule.rules.reductions import PICKS

aten = torch.ops.aten

#: Up to this length the triangle of a line is made for every product: that takes fewer calls than the recurrence.
_SHORT = 64


def _dim(call: Call) -> int:
    """The scanned dimension, from the front."""
    dim: int = call.argument("dim")
    return dim % max(len(call.shape(call.args[0])), 1)


def _cumsum(call: Call) -> Iterable[Edge]:
    """A running sum acts on each line along its dimension; transposed it runs backwards."""
    item = call.args[0]
    if not call.is_active(item):
        return
    shape = call.shape(item)
    if not shape:
        yield single(call, item, [Term((), ())])
        return
    dim = _dim(call)

    def push(call: Call, program: Program, rows: Staged, count: int) -> Staged:
        return torch.cumsum(rows, dim + 1)  # type: ignore[call-overload, no-any-return]

    def pull(call: Call, program: Program, rows: Staged, count: int) -> Staged:
        backwards = torch.flip(rows, [dim + 1])  # type: ignore[arg-type]
        return torch.flip(torch.cumsum(backwards, dim + 1), [dim + 1])  # type: ignore[return-value]

    diagonal = tuple((d, d) for d in range(len(shape)) if d != dim)
    structure = partial(_triangle_terms, call, shape, dim)
    terms = (_triangle_term(call, shape, dim),) if shape[dim] else ()
    yield operator_edge(call, item, push, pull, diagonal, math.prod(shape), terms=terms, structure=structure)


def _triangle_term(call: Call, shape: tuple[int, ...], dim: int) -> Term:
    """A running sum by its triangle of ones, which is made only where it has to be.

    Its diagonal is known, it is its own square, and what it is multiplied with and summed over one side is a running sum.
    """
    size, dtype, device = shape[dim], call.workspace.dtype, call.workspace.device

    def stage(program: Program) -> Staged:
        return torch.tril(program.call(torch.ones, (size, size), dtype=dtype, device=device))

    def ones(program: Program) -> Staged:
        return program.call(torch.ones, (size,), dtype=dtype, device=device)  # type: ignore[no-any-return]

    node = leaf((size, size), stage, flops=size * size, label="triangle")
    node.diagonal = 0, 1, lambda: leaf((size,), ones, label="ones")
    def counted(program: Program, summed: int) -> Staged:
        found = torch.cumsum(ones(program), 0)
        return torch.flip(found, [0]) if summed == 0 else found

    node.is_indicator = True
    node.merge = _running_sum
    node.sums = lambda summed: leaf((size,), lambda program: counted(program, summed), label="counts")
    if call.workspace.recurrences and size > _SHORT:
        column = leaf((size, 1), lambda program: torch.unsqueeze(ones(program), 1), label="ones")
        one = Semiseparable(size, leaf((size,), ones, label="ones"), Half(column, None, column), None)
        node.running = Running(0, 1, one, dtype=dtype)
    axes, result, argument = new_axes(shape), Axis(size), Axis(size)
    out, inner = ((*axes[:dim], place, *axes[dim + 1 :]) for place in (result, argument))
    return Term(dims_of(out), dims_of(inner), (Factor(node, (result, argument)),))


def _running_sum(triangle: Factor, other: Factor, still: set[Axis]) -> Merge | None:
    """A triangle times something that is summed over one of its sides: a running sum, forwards or backwards."""
    result, argument = triangle.axes
    if result is argument or result.size == 1:
        return None
    for summed, left, backwards in ((argument, result, False), (result, argument, True)):
        if summed in still or summed not in other.axes or left in other.axes or left not in still:
            continue
        if any(axis not in still for axis in other.axes if axis is not summed):
            return None
        place = other.axes.index(summed)

        def compute(program: Program, value: Staged, place: int = place, backwards: bool = backwards) -> Staged:
            if not backwards:
                return torch.cumsum(value, place)  # type: ignore[call-overload, no-any-return]
            turned = torch.cumsum(torch.flip(value, [place]), place)  # type: ignore[arg-type, call-overload]
            return torch.flip(turned, [place])

        axes = (*other.axes[:place], left, *other.axes[place + 1 :])
        return Merge(axes, compute, (6 if backwards else 2) * other.node.numel)
    return None


def _triangle_terms(call: Call, shape: tuple[int, ...], dim: int) -> tuple[Term, ...]:
    """A running sum by its pairs of positions."""
    size = shape[dim]
    pairs, result, argument = Axis(size * (size + 1) // 2), Axis(size), Axis(size)
    relations = []
    for side, target in enumerate((result, argument)):
        index = constant_index(
            (pairs.size,), lambda d, s=side: torch.tril_indices(size, size, device=d)[s], call.workspace.device
        )
        relations.append(OneHot(index, (pairs,), target))
    axes = new_axes(shape)
    out, inner = ((*axes[:dim], place, *axes[dim + 1 :]) for place in (result, argument))
    return (Term(dims_of(out), dims_of(inner), (), tuple(relations)),)


def _lines(
    entries: Callable[[Any, Any, int, int], Any],
    own: Callable[[Any, Any, int, int], Any],
    recurrence: Callable[[Program, Staged, Staged, int], tuple[Staged, Staged]]
) -> Rule:
    """A scan whose local Jacobian along its dimension is a lower triangle.

    Args:
        entries: makes the triangle from ``(x, out, dim, size)``. The array has the result's position at ``dim`` and the
            argument's right after it; the other dimensions are diagonal.
        own: makes the diagonals of the triangles from the same, of the shape of ``x``.
        recurrence: makes, of the shape of ``x``, ``c`` and ``a`` for which tangents ``t`` are pushed to
            ``h[i] = a[i] h[i - 1] + c[i] t[i]``: lines that are long are not worth a triangle for each product.
    """

    def matrices(call: Call, item: Any, dim: int) -> Semiseparable:
        """The triangles by their recurrence."""
        shape = call.shape(item)
        sizes = (*shape[:dim], *shape[dim + 1 :], shape[dim])

        def part(number: int, behind: int) -> Node:
            def formula(program: Program) -> Any:
                found = recurrence(program, call.stage(program, item), call.stage_output(program), dim)[number]
                found = torch.movedim(found, dim, -1) if len(sizes) > 1 else found
                return torch.reshape(found, (*sizes, *(1,) * behind)) if behind else found

            return formula_node(call, (*sizes, *(1,) * behind), formula)

        return Semiseparable(sizes[-1], part(0, 0), Half(part(1, 1), part(1, 2), part(0, 1)), None)

    def linearize(call: Call) -> Iterable[Edge]:
        item = call.args[0]
        if not call.is_active(item):
            return
        shape = call.shape(item)
        if not shape:
            yield single(call, item, [Term((), ())])
            return
        dim = _dim(call)
        axes = new_axes(shape)
        source = Axis(shape[dim])
        in_axes = (*axes[:dim], source, *axes[dim + 1 :])
        all_axes = (*axes[: dim + 1], source, *axes[dim + 1 :])

        def formula(program: Program) -> Any:
            return entries(call.stage(program, item), call.stage_output(program), dim, shape[dim])

        node = formula_node(call, (axis.size for axis in all_axes), formula)
        size = shape[dim]
        node.zeros = (dim, dim + 1), lambda device: torch.ones((size, size), dtype=torch.bool, device=device).tril()
        others = (*shape[:dim], *shape[dim + 1 :])

        def diagonal_formula(program: Program) -> Any:
            found = own(call.stage(program, item), call.stage_output(program), dim, size)
            return torch.movedim(found, dim, -1) if others else found

        node.diagonal = dim, dim + 1, lambda: formula_node(call, (*others, size), diagonal_formula)
        term = Term(dims_of(axes), dims_of(in_axes), (Factor(node, all_axes),))
        if size <= _SHORT:
            yield single(call, item, [term])
            return
        if call.workspace.recurrences:
            node.running = Running(dim, dim + 1, matrices(call, item, dim), dtype=call.workspace.dtype)

        def push(call: Call, program: Program, rows: Staged, count: int) -> Staged:
            weights, factors = recurrence(program, call.stage(program, item), call.stage_output(program), dim)
            return _recurrence(rows * weights, factors, dim, size).to(rows.dtype)  # type: ignore[no-any-return]

        def pull(call: Call, program: Program, rows: Staged, count: int) -> Staged:
            weights, factors = recurrence(program, call.stage(program, item), call.stage_output(program), dim)
            # Backwards, each factor belongs to the place before: the one in front of all others stands before nothing.
            turned = torch.roll(torch.flip(factors, [dim]), 1, dim)  # type: ignore[arg-type]
            backwards = torch.flip(rows.to(weights.dtype), [dim + 1])
            found = torch.flip(_recurrence(backwards, turned, dim, size), [dim + 1])
            return (found * weights).to(rows.dtype)

        diagonal = tuple((d, d) for d in range(len(shape)) if d != dim)
        flops = 2 * math.prod(shape) * size.bit_length()
        yield operator_edge(call, item, push, pull, diagonal, flops, terms=(term,), structure=lambda: (term,))

    return Rule("scan", linearize)


def _recurrence(rows: Any, factors: Any, dim: int, size: int) -> Any:
    """``h[i] = factors[i] h[i - 1] + rows[i]`` along a dimension (one further in ``rows``), in log₂(size) steps.

    After each step a place holds the sum over twice as many places before it, and its factor is the product over them. (The
    scan of Hillis and Steele, *Data parallel algorithms*, 1986; Blelloch, *Prefix sums and their applications*, 1990.)
    """
    step = 1
    while step < size:
        rest = size - step
        later = torch.narrow(factors, dim, step, rest)
        added = torch.narrow(rows, dim + 1, step, rest) + later * torch.narrow(rows, dim + 1, 0, rest)
        rows = torch.cat([torch.narrow(rows, dim + 1, 0, step), added], dim + 1)
        if 2 * step < size:
            product = later * torch.narrow(factors, dim, 0, rest)
            factors = torch.cat([torch.narrow(factors, dim, 0, step), product], dim)
        step *= 2
    return rows


def _before(value: Any, dim: int, size: int, first: float) -> Any:
    """At each place of a line the value of the place before it, and a number at the first place."""
    start = torch.full_like(torch.narrow(value, dim, 0, 1), first)
    return torch.cat([start, torch.narrow(value, dim, 0, size - 1)], dim)


def _pattern(x: Any, dim: int, size: int, diagonal: int | None) -> Any:
    """The lower triangle (or, without ``diagonal``, the identity) as a mask over ``(position, source)`` at ``dim``."""
    first = torch.arange(size, device=x.device)
    rows, columns = torch.reshape(first, (size, 1)), torch.reshape(first, (1, size))
    mask = columns <= rows if diagonal == 0 else columns == rows
    return torch.reshape(mask, (*((1,) * dim), size, size, *((1,) * (x.ndim - dim - 1))))


def _cumprod_entries(x: Any, out: Any, dim: int, size: int) -> Any:
    """Products up to each position with one element left out: no division, so zeros are no special case."""
    x = x if x.dtype == out.dtype else x.to(out.dtype)
    spread = torch.unsqueeze(x, dim + 1)
    without = torch.where(_pattern(x, dim, size, None), 1.0, spread)
    return torch.where(_pattern(x, dim, size, 0), torch.cumprod(without, dim), 0.0)


def _cumprod_own(x: Any, out: Any, dim: int, size: int) -> Any:
    """Products up to the place before."""
    return _before(out, dim, size, 1.0)


def _logcumsumexp_own(x: Any, out: Any, dim: int, size: int) -> Any:
    return torch.exp(x - torch.where(out == -math.inf, 0.0, out))


def _logcumsumexp_entries(x: Any, out: Any, dim: int, size: int) -> Any:
    exponent = torch.unsqueeze(x, dim) - torch.unsqueeze(torch.where(out == -math.inf, 0.0, out), dim + 1)
    return torch.exp(torch.where(_pattern(x, dim, size, 0), exponent, -math.inf))


def _cumprod_recurrence(program: Program, x: Any, out: Any, dim: int) -> tuple[Any, Any]:
    """Products of a stretch may be larger than those from the start: for shorter numbers, those of a longer kind hold them."""
    wide = torch.promote_types(out.dtype, torch.float64)
    x, out = x.to(wide), out.to(wide)
    return _before(out, dim, out.shape[dim], 1.0), x


def _logcumsumexp_recurrence(program: Program, x: Any, out: Any, dim: int) -> tuple[Any, Any]:
    """All exponents are at most zero."""
    base = torch.where(out == -math.inf, 0.0, out)
    return torch.exp(x - base), torch.exp(_before(out, dim, out.shape[dim], -math.inf) - base)


RULES: dict[Any, Rule] = {
    aten.cumsum.default: Rule("scan", _cumsum, reads=False),
    aten.cumprod.default: _lines(_cumprod_entries, _cumprod_own, _cumprod_recurrence),
    aten.logcumsumexp.default: _lines(_logcumsumexp_entries, _logcumsumexp_own, _logcumsumexp_recurrence),
    # The dispatched op has two outputs, the values and where they stand.
    aten.cummax.default: PICKS,
    aten.cummin.default: PICKS,
}

__all__ = ["RULES"]
