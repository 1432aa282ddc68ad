"""Sums of terms with fewer terms: those of one structure are added, or all are made dense apart from common diagonals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from chainrule.maps.bands import slice_axis
from chainrule.maps.compose import Workspace, dense_factor, settle
from chainrule.maps.listed_terms import listed
from chainrule.maps.nodes import Node
from chainrule.maps.onehots import dense_relation
from chainrule.maps.running_products import of_sum
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Dims, Factor, Term
from chainrule.maps.views import expand_to

#: More terms than this at one vertex are summed into a dense one.
TERM_LIMIT = 4


def merge(
    terms: Sequence[Term], workspace: Workspace, *, force: bool, limit: int | None = TERM_LIMIT
) -> tuple[Term, ...]:
    """Add terms of one structure into one term; with ``force``, or when more than ``limit`` are left, make all of one."""
    if len(terms) < 2:
        return tuple(terms)
    settled = [settle(term, workspace, bands=True) for term in terms]
    merged = _merge_equal(settled, workspace, force)
    if workspace.sparse:
        return workspace.compress(merged)
    limit = 1 if force else limit
    if limit is not None and len(merged) > limit:
        # Terms at fixed places are taken together before those at one place are added: one call for all of them.
        together = listed(settled, workspace)
        if len(together) < len(settled):
            merged = _merge_equal(together, workspace, force)
    if limit is not None and len(merged) > limit:
        common = _common_diagonals(merged)
        merged = _merge_equal([_to_common(term, common, workspace) for term in merged], workspace, True)
    return tuple(merged)


def _merge_equal(terms: Sequence[Term], workspace: Workspace, force: bool) -> list[Term]:
    groups: dict[object, list[Term]] = {}
    for term in terms:
        groups.setdefault(pattern_of(term), []).append(term)
    merged: list[Term] = []
    for group in groups.values():
        stack = sorted(group, key=lambda t: -sum(f.node.numel for f in t.factors))
        merged.extend(taken_together(stack, lambda host, term: add_terms(host, term, workspace, force)))
    return merged


def pattern_of(term: Term) -> tuple[object, ...]:
    """The structure of a term apart from its factors: dimensions by axis numbers, sizes, relations."""
    names: dict[Axis, int] = {}
    dims = tuple(
        tuple(tuple(names.setdefault(axis, len(names)) for axis in dim if axis.size != 1) for dim in side)
        for side in (term.out_dims, term.in_dims)
    )
    sizes = tuple(axis.size for axis in names)
    relations = tuple(
        sorted(
            (id(h.index), tuple(names.setdefault(a, len(names)) for a in h.sources), names.setdefault(h.target, len(names)))
            for h in term.onehots
        )
    )
    return dims, sizes, relations


def taken_together(terms: Sequence[Term], add: Callable[[Term, Term], Term | None]) -> list[Term]:
    """Each term added to the first one before it that it can be added to; `add` returns None where it cannot."""
    kept: list[Term] = []
    for term in terms:
        for position, host in enumerate(kept):
            added = add(host, term)
            if added is not None:
                kept[position] = added
                break
        else:
            kept.append(term)
    return kept


def add_terms(host: Term, term: Term, workspace: Workspace, force: bool) -> Term | None:
    """The sum of two terms of one pattern as one term, unless it would carry more axes than either of them."""
    mapping = matching_axes(term, host)
    if mapping is None:
        return None
    term = term.rename(mapping)
    if host.factors and term.factors == host.factors:
        return host.having(scale=host.scale + term.scale)
    # What both are products with stays apart: c·a + c·b = c·(a + b).
    common, whole = shared_factors(host, term), host
    host, term = without_factors(host, common), without_factors(term, common)
    one, two = host.carried_axes(), term.carried_axes()
    if not force and not (two <= one or one <= two):
        return None
    if not force and (len(host.factors) > 1 or len(term.factors) > 1) and _outer_blowup(host, term):
        return None
    axes = [axis for axis in dict.fromkeys([*host.outer_axes(), *host.all_axes()]) if axis in one | two]
    first, second = dense_factor(host, axes, workspace), dense_factor(term, axes, workspace)
    order = tuple(range(len(axes)))
    names = {axis: number for number, axis in enumerate(axes)}
    left, right = tuple(names[a] for a in first.axes), tuple(names[a] for a in second.axes)

    def compute(program: Program, x: Staged, y: Staged) -> Staged:
        return program.call(torch.add, expand_to(x, left, order), expand_to(y, right, order))

    known = of_sum(first, second)
    if known is None and not force and (first.node.running or second.node.running) is not None:
        return None
    sizes = tuple(a.size for a in axes)
    numel = math.prod(sizes)
    node = Node(sizes, (first.node, second.node), compute, flops=numel, moved=3 * numel, label="add")
    node.running = known
    return whole.having(factors=(*common, Factor(node, tuple(axes))), scale=1.0)


def shared_factors(one: Term, two: Term) -> tuple[Factor, ...]:
    """The factors that two terms have in common."""
    rest = list(two.factors)
    found = []
    for factor in one.factors:
        if factor in rest:
            rest.remove(factor)
            found.append(factor)
    return tuple(found)


def without_factors(term: Term, factors: Sequence[Factor]) -> Term:
    """A term with some of its factors left out."""
    rest = list(term.factors)
    for factor in factors:
        rest.remove(factor)
    return term.having(factors=tuple(rest))


def _outer_blowup(host: Term, term: Term) -> bool:
    full = math.prod(axis.size for axis in host.carried_axes() | term.carried_axes())
    return full > 2 * max((f.node.numel for f in (*host.factors, *term.factors)), default=1)


def matching_axes(term: Term, host: Term) -> dict[Axis, Axis] | None:
    """Axes of ``term`` to the axes of ``host`` that stand in the same places (patterns are equal)."""
    mapping: dict[Axis, Axis] = {}
    for mine, theirs in ((term.out_dims, host.out_dims), (term.in_dims, host.in_dims)):
        for one, two in zip(mine, theirs, strict=True):
            big_one = [a for a in one if a.size != 1]
            big_two = [a for a in two if a.size != 1]
            for a, b in zip(big_one, big_two, strict=True):
                if mapping.setdefault(a, b) is not b:
                    return None
    for h in term.onehots:
        twin = next((o for o in host.onehots if o.index is h.index), None)
        if twin is None:
            return None
        for a, b in zip((*h.sources, h.target), (*twin.sources, twin.target), strict=True):
            if mapping.setdefault(a, b) is not b:
                return None
    return mapping


def _common_diagonals(terms: Sequence[Term]) -> set[tuple[int, int]]:
    """Pairs (output dimension, input dimension) that are one and the same axis in every term."""
    common: set[tuple[int, int]] | None = None
    for term in terms:
        pairs = {
            (o, i)
            for o, out in enumerate(term.out_dims)
            for i, inner in enumerate(term.in_dims)
            if len(out) == 1 and out == inner and out[0].size > 1
        }
        common = pairs if common is None else common & pairs
    return common or set()


def _to_common(term: Term, common: set[tuple[int, int]], workspace: Workspace) -> Term:
    """Make a term dense apart from the diagonals in ``common``, with one axis per dimension."""
    if any(slice_axis(term, h) is not None for h in term.onehots):
        term = settle(term, workspace)
    term = densify_onehots(term, workspace, lambda h: True)
    shared = {term.out_dims[o][0] for o, _ in common}
    used: set[Axis] = set()
    factors = list(term.factors)
    diagonal_in = {i: term.in_dims[i] for _, i in common}

    def fresh_dims(dims: Dims, fixed: dict[int, tuple[Axis, ...]]) -> Dims:
        result: list[tuple[Axis, ...]] = []
        for position, dim in enumerate(dims):
            if position in fixed:
                result.append(dim)
                continue
            axes = []
            for axis in dim:
                if axis in used or axis in shared:
                    new = Axis(axis.size)
                    factors.append(Factor(workspace.eye(axis.size), (axis, new)))
                    axes.append(new)
                else:
                    used.add(axis)
                    axes.append(axis)
            result.append(tuple(axes))
        return tuple(result)

    out_dims = fresh_dims(term.out_dims, {o: term.out_dims[o] for o, _ in common})
    in_dims = fresh_dims(term.in_dims, diagonal_in)
    carried = {axis for f in factors for axis in f.axes}
    for axis in dict.fromkeys(a for dims in (out_dims, in_dims) for dim in dims for a in dim):
        if axis not in carried and axis not in shared:
            factors.append(Factor(workspace.ones((axis.size,)), (axis,)))
    flat = settle(replace(term, out_dims=out_dims, in_dims=in_dims, factors=tuple(factors)), workspace)
    order = [axis for axis in flat.outer_axes() if axis in flat.carried_axes()]
    factor = dense_factor(flat, order, workspace)
    return _one_axis_per_dim(flat.having(factors=(factor,), scale=1.0), shared)


def _one_axis_per_dim(term: Term, shared: set[Axis]) -> Term:
    """Merge the axes of each dimension of a one-factor term (its factor's axes are in the order of the dimensions)."""
    (factor,) = term.factors
    dims = [dim for side in (term.out_dims, term.in_dims) for dim in side]
    if all(len(dim) == 1 for dim in dims):
        return term
    seen: set[Axis] = set()
    axes: list[Axis] = []
    merged: list[tuple[Axis, ...]] = []
    carried = set(factor.axes)
    for dim in dims:
        if len(dim) == 1 and (dim[0] in shared or dim[0] in seen):
            merged.append(dim)
            if dim[0] in carried and dim[0] not in seen:
                axes.append(dim[0])
            seen.add(dim[0])
            continue
        axis = Axis(math.prod(a.size for a in dim))
        merged.append((axis,))
        axes.append(axis)
        seen.update(dim)
    sizes = tuple(axis.size for axis in axes)
    node = Node(sizes, (factor.node,), lambda program, value: torch.reshape(value, sizes), label="reshape")
    count = len(term.out_dims)
    return Term(tuple(merged[:count]), tuple(merged[count:]), (Factor(node, tuple(axes)),))


def densify_onehots(term: Term, workspace: Workspace, which: Callable[..., bool]) -> Term:
    """A term with some of its relations as dense arrays of zeros and ones."""
    chosen = [h for h in term.onehots if which(h)]
    if not chosen:
        return term
    dense = tuple(dense_relation(h, workspace.dtype, workspace.memo) for h in chosen)
    kept = tuple(h for h in term.onehots if not which(h))
    return term.having(factors=term.factors + dense, onehots=kept)


__all__ = [
    "add_terms", "densify_onehots", "matching_axes", "merge", "pattern_of", "shared_factors", "taken_together", "without_factors",
]  # fmt: skip
