"""Composition of terms: align dimensions, unify axes, push one-hot factors outwards, and contract on request."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from chainrule.maps import running_reads
from chainrule.maps.bands import band_axis, with_bands
from chainrule.maps.coincidence import coincide
from chainrule.maps.contract import contract, contract_any
from chainrule.maps.nodes import Node, leaf
from chainrule.maps.onehots import Memo, fixed_points, gather, gather_flat, mask_factor, scatter
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Dims, Factor, OneHot, Term, affine_index, regroup, shift_of, shift_onehot
from chainrule.maps.views import expand_to, permute


class Workspace:
    """What one plan shares: the dtype and device of its maps and the nodes it has made.

    Attributes:
        sparse: whether maps are kept by their entries: internal sources of relations are not summed, and terms not densified.
        kernels: whether ops may multiply single rows by kernels of their own.
        mapped: whether those that take samples as their batch may.
        repeated: whether many rows come one after the other: what does not depend on them is computed once.
        forward: whether torch's forward mode says what the derivative is, where it and reverse mode differ (rows of padding).
        recurrences: whether scans are known by their recurrences beside their triangles (see :mod:`chainrule.maps.running`).
    """

    sparse = False
    kernels = False
    mapped = False
    repeated = False
    forward = False
    recurrences = False

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self.memo: Memo = {}
        # The ops of the tape by the slot of their result, once a rule has asked for one (see chainrule/rules/base.py).
        self.producers: dict[int, Any] | None = None

    def ones(self, sizes: tuple[int, ...]) -> Node:
        """An array of ones."""
        key = ("ones", sizes)
        node = self.memo.get(key)
        if node is None:
            dtype, device = self.dtype, self.device
            node = self.memo[key] = leaf(
                sizes, lambda program: program.call(torch.ones, sizes, dtype=dtype, device=device), label="ones"
            )
        return node

    def canonical(self, term: Term) -> Term:
        """The term in the form in which it is kept."""
        return term

    def compress(self, terms: Sequence[Term]) -> tuple[Term, ...]:
        """The sum of terms in the form in which it is kept."""
        return tuple(terms)

    def thinned(self, term: Term) -> Term:
        """The term in fewer entries, where many of its entries meet."""
        return term

    def coincide(self, term: Term, one: OneHot, two: OneHot) -> Term:
        """The term with two relations of one target made into one."""
        return coincide(term, one, two, self)

    def push(self, term: Term) -> Term:
        """The term with its relations pushed outwards."""
        return push_onehots(term, self)

    def eye(self, size: int) -> Node:
        """A dense identity."""
        key = ("eye", size)
        node = self.memo.get(key)
        if node is None:
            dtype, device = self.dtype, self.device
            node = self.memo[key] = leaf(
                (size, size),
                lambda program: program.call(torch.eye, size, dtype=dtype, device=device),
                flops=size * size,
                label="eye",
            )
        return node


def join(left: Term, right: Term, workspace: Workspace) -> Term:
    """The composition ``left ∘ right`` as one network: nothing is multiplied yet, one-hots are pushed outwards.

    ``left`` maps from the space that ``right`` maps to. ``right`` is given fresh axes first.
    """
    if (joined := _join_as_it_is(left, right, workspace)) is not None:
        return joined
    right = right.fresh()
    left, right = align(left, right, workspace)
    mapping = _unify(left.in_dims, right.out_dims)
    merged = Term(
        left.out_dims,
        right.in_dims,
        left.factors + right.factors,
        left.onehots + right.onehots,
        left.scale * right.scale,
    ).rename(mapping)
    merged = merged.having(factors=tuple(without_repeats(f, workspace.memo) for f in merged.factors))
    merged = _without_circles(merged, workspace)
    between = dict.fromkeys(mapping.get(axis, axis) for dim in left.in_dims for axis in dim)
    return push_onehots(keep_count(merged, tuple(between)), workspace)


def _join_as_it_is(left: Term, right: Term, workspace: Workspace) -> Term | None:
    """The composition where the dimensions between the terms agree axis by axis and no two axes become one.

    Such a product (most products are) needs no alignment: the axes of ``right`` are those of ``left``, or new.
    """
    mapping: dict[Axis, Axis] = {}
    for one, two in zip(left.in_dims, right.out_dims, strict=True):
        if len(one) == len(two) == 1:
            (a,), (b,) = one, two
            if a.size != b.size or (a.size != 1 and mapping.setdefault(b, a) is not a):
                return None
            continue
        wide, other = ([axis for axis in dim if axis.size != 1] for dim in (one, two))
        if len(wide) != len(other):
            return None
        for a, b in zip(wide, other, strict=True):
            if a.size != b.size or mapping.setdefault(b, a) is not a:
                return None
    between = tuple(mapping.values())
    if len(set(between)) < len(between):
        return None

    def renamed(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
        found = []
        for axis in axes:
            own = mapping.get(axis)
            if own is None:
                own = mapping[axis] = Axis(axis.size)
            found.append(own)
        return tuple(found)

    in_dims = tuple([renamed(dim) for dim in right.in_dims])
    factors, onehots = left.factors, left.onehots
    if right.factors:
        factors = (*factors, *[Factor(factor.node, renamed(factor.axes)) for factor in right.factors])
    if right.onehots:
        moved = [h._replace(sources=renamed(h.sources), target=renamed((h.target,))[0]) for h in right.onehots]
        onehots = (*onehots, *moved)
    joined = keep_count(Term(left.out_dims, in_dims, factors, onehots, left.scale * right.scale), between)
    return push_onehots(joined, workspace) if onehots else joined


def without_repeats(factor: Factor, memo: Memo) -> Factor:
    """A factor two of whose axes have become one: its diagonal."""
    axes = list(factor.axes)
    while len(set(axes)) < len(axes):
        first = next(p for p, axis in enumerate(axes) if axis in axes[p + 1 :])
        second = axes.index(axes[first], first + 1)
        key = ("diagonal", id(factor.node), first, second)
        axes = [axis for p, axis in enumerate(axes) if p not in (first, second)] + [axes[first]]
        node = memo.get(key)
        if node is None and (known := factor.node.diagonal) is not None and known[:2] == (first, second):
            node = memo[key] = known[2]()
        if node is None and (read := running_reads.diagonal(factor.node, first, second)) is not None:
            node = memo[key] = read
        if node is None:
            node = memo[key] = Node(
                (axis.size for axis in axes),
                (factor.node,),
                lambda program, value, one=first, two=second: program.view_of(value, lambda v: torch.diagonal(v, 0, one, two)),
                label="diagonal",
            )
        factor = Factor(node, tuple(axes))
    return factor


def _without_circles(term: Term, workspace: Workspace) -> Term:
    """Relations of an axis to itself (in a trace or a diagonal) become masks over their sources."""
    onehots: list[OneHot] = []
    factors = list(term.factors)
    scale = term.scale
    for onehot in term.onehots:
        if len(set(onehot.sources)) < len(onehot.sources):
            read = without_repeats(Factor(onehot.index, onehot.sources), workspace.memo)
            onehot = onehot._replace(index=read.node, sources=read.axes, affine=None, shift=None)
        if onehot.target not in onehot.sources:
            onehots.append(onehot)
        elif onehot.affine is not None and onehot.affine[1] == 1:
            # A shifted axis never meets itself; one that is not shifted is itself everywhere.
            scale = scale if onehot.affine[0] == 0 else 0.0
        else:
            factors.append(fixed_points(onehot, workspace.dtype, workspace.memo))
    return term.having(factors=tuple(factors), onehots=tuple(onehots), scale=scale)


def _unify(first: Sequence[tuple[Axis, ...]], second: Sequence[tuple[Axis, ...]]) -> dict[Axis, Axis]:
    parent: dict[Axis, Axis] = {}

    def find(axis: Axis) -> Axis:
        while axis in parent:
            axis = parent[axis]
        return axis

    for one, two in zip(first, second, strict=True):
        big_one = [axis for axis in one if axis.size != 1]
        big_two = [axis for axis in two if axis.size != 1]
        for a, b in zip(big_one, big_two, strict=True):
            if a.size != b.size:
                raise AssertionError(f"axes of sizes {a.size} and {b.size} were to be one")
            a, b = find(a), find(b)
            if a is not b:
                parent[b] = a
    return {axis: find(axis) for axis in parent}


def align(left: Term, right: Term, workspace: Workspace) -> tuple[Term, Term]:
    """Split axes until each dimension between the two terms is the same tuple of sizes (size-one axes aside).

    An axis may stand in several dimensions (in a trace, or on a diagonal), so that what splits it in one undoes the agreement
    of another: the dimensions are gone through until none asks for a split.
    """
    before: tuple[Dims, Dims] | None = None
    while before != (left.in_dims, right.out_dims):
        before = left.in_dims, right.out_dims
        left, right = _align_once(left, right, workspace)
    return left, right


def _align_once(left: Term, right: Term, workspace: Workspace) -> tuple[Term, Term]:
    for position in range(len(left.in_dims)):
        while True:
            one = [axis for axis in left.in_dims[position] if axis.size != 1]
            two = [axis for axis in right.out_dims[position] if axis.size != 1]
            step = _first_difference(one, two)
            if step is None:
                break
            a, b = one[step], two[step]
            big, small = (a, b) if a.size > b.size else (b, a)
            if small.size == 0 or big.size % small.size:
                left = _bridge(left, position, right.out_dims[position], workspace)
                break
            parts = (Axis(small.size), Axis(big.size // small.size))
            if big is a:
                left = left.split(a, parts)
                # An axis may stand on several places of the term; positions are read again.
            else:
                right = right.split(b, parts)
    return left, right


def _first_difference(one: list[Axis], two: list[Axis]) -> int | None:
    for step, (a, b) in enumerate(zip(one, two, strict=False)):
        if a.size != b.size:
            return step
    return None


def _bridge(left: Term, position: int, wanted: tuple[Axis, ...], workspace: Workspace) -> Term:
    """Dimensions whose splits do not divide each other: tie the old axes to new ones by index relations."""
    old = left.in_dims[position]
    new = tuple(Axis(axis.size) for axis in wanted)
    onehots = [*left.onehots, *regroup(new, old, workspace.device)]
    in_dims = (*left.in_dims[:position], new, *left.in_dims[position + 1 :])
    return replace(left, in_dims=in_dims, onehots=tuple(onehots))


def push_onehots(term: Term, workspace: Workspace) -> Term:
    """Gather every dense factor (and every further relation) that carries a target, and drop relations that are done.

    Afterwards each target is an outer axis, is tied by one relation only, and stands neither in a dense factor nor among
    the sources of another relation.
    """
    if workspace.sparse:
        return workspace.push(term)
    if term.settled:
        return term
    while term.onehots:
        step = _push_one(term, workspace)
        if step is None:
            return term
        # Two relations that lead back to where they came from have become one of an axis to itself.
        circular = [h for h in step.onehots if h.target in h.sources or len(set(h.sources)) < len(h.sources)]
        # An axis that is itself everywhere, and stands nowhere else, is still summed over.
        tied = tuple(dict.fromkeys(axis for h in circular for axis in h.sources))
        term = keep_count(_without_circles(step, workspace), tied) if circular else step
    return term


def _push_one(term: Term, workspace: Workspace) -> Term | None:
    """The first push that changes the term, or None when nothing is left to do."""
    outer = term.outer_axes()
    read = {axis for h in term.onehots for axis in h.sources}
    # Relations that others read come first: what they are tied to is then a matter of free axes only.
    for onehot in sorted(term.onehots, key=lambda h: h.target not in read):
        target = onehot.target
        others = tuple(h for h in term.onehots if h is not onehot)
        twin = next((h for h in others if h.target is target), None)
        if twin is not None:
            joined = workspace.coincide(term, onehot, twin)
            return joined.having(factors=tuple(without_repeats(f, workspace.memo) for f in joined.factors))
        carried = any(target in f.axes for f in term.factors)
        chained = any(target in h.sources for h in others)
        if target in outer and not carried and not chained:
            continue
        if carried and onehot.index.digit is not None:
            read_at = [gather_flat(f, term.onehots, workspace.memo) or f if target in f.axes else f for f in term.factors]
            if any(new is not old for new, old in zip(read_at, term.factors, strict=True)):
                return term.having(factors=tuple(read_at))
        factors = tuple(gather(f, onehot, workspace.memo) if target in f.axes else f for f in term.factors)
        others = tuple(_chain(h, onehot, workspace) if target in h.sources else h for h in others)
        if target in outer:
            return term.having(factors=factors, onehots=(*others, onehot))
        # What was read through a shift is zero already where there is nothing to read.
        if onehot.partial and not (carried and onehot.shift is not None):
            factors = (*factors, mask_factor(onehot, workspace.dtype, workspace.memo))
        return keep_count(term.having(factors=factors, onehots=others), onehot.sources)
    return None


def keep_count(term: Term, axes: Sequence[Axis]) -> Term:
    """Axes that stand nowhere in the term any more are sums of ones: their sizes go into its scale."""
    if not axes:
        return term
    left = term.all_axes()
    lost = math.prod(axis.size for axis in axes if axis not in left)
    return term if lost == 1 else term.having(scale=term.scale * lost)


def _chain(outer: OneHot, inner: OneHot, workspace: Workspace) -> OneHot:
    """``target = outer[.., inner[sources], ..]``: one relation from the inner one's sources."""
    if (
        outer.affine is not None
        and inner.affine is not None
        and len(inner.sources) == 1
        and len(outer.sources) == 1
    ):
        start, step = outer.affine[0] + outer.affine[1] * inner.affine[0], outer.affine[1] * inner.affine[1]
        index = affine_index(inner.sources[0].size, start, step, workspace)
        return OneHot(index, inner.sources, outer.target, False, (start, step))
    if (shifted := _chain_shifts(outer, inner, workspace)) is not None:
        return shifted
    index = Factor(outer.index, outer.sources)
    plain = inner._replace(partial=False)
    if inner.partial:
        clamped = Node(inner.index.sizes, (inner.index,), lambda program, value: torch.clamp(value, min=0), label="index")
        plain = plain._replace(index=clamped)
    read = gather(index, plain, workspace.memo)
    node = read.node
    if inner.partial:
        shape = tuple(a.size if a in inner.sources else 1 for a in read.axes)
        order = tuple(inner.sources.index(a) for a in read.axes if a in inner.sources)

        def forget(program: Program, value: object, guard: object) -> object:
            valid = torch.reshape(torch.permute(guard, order), shape) >= 0  # type: ignore[arg-type]
            return torch.where(valid, value, -1)  # type: ignore[call-overload]

        node = Node(node.sizes, (node, inner.index), forget, label="index")  # type: ignore[arg-type]
    return OneHot(node, read.axes, outer.target, outer.partial or inner.partial)


def _chain_shifts(outer: OneHot, inner: OneHot, workspace: Workspace) -> OneHot | None:
    """A shift of a shift. Where the inner one has no target, the term is zero by the inner one's own mask or relation."""
    one, two = shift_of(outer), shift_of(inner)
    if one is None or two is None:
        return None
    factor = one[1][outer.sources.index(inner.target)]
    steps: dict[Axis, int] = {}
    for axis, step in zip(outer.sources, one[1], strict=True):
        if axis is not inner.target:
            steps[axis] = steps.get(axis, 0) + step
    for axis, step in zip(inner.sources, two[1], strict=True):
        steps[axis] = steps.get(axis, 0) + factor * step
    start = one[0] + factor * two[0]
    return shift_onehot(tuple(steps), outer.target, start, tuple(steps.values()), workspace.memo, workspace.device)


def internal_axes(term: Term) -> list[Axis]:
    """Axes that stand neither in an output nor in an input dimension."""
    outer, every = term.outer_axes(), term.all_axes()
    return [axis for axis in every if axis not in outer] if len(every) > len(outer) else []


def fold_uncarried(term: Term) -> Term:
    """Internal axes that no factor carries are sums of ones: their sizes go into the scale."""
    if not (internal := internal_axes(term)):
        return term
    carried = term.carried_axes()
    tied = {axis for h in term.onehots for axis in (*h.sources, h.target)}
    scale = term.scale
    for axis in internal:
        if axis not in carried and axis not in tied:
            scale *= axis.size
    return term if scale == term.scale else term.having(scale=scale)


def settle(term: Term, workspace: Workspace, *, bands: bool = False) -> Term:
    """Contract everything that a plan in a pinned order contracts: sums over internal axes, and factors into larger ones.

    The result has no internal axis, apart from those of bands (see :mod:`chainrule.maps.bands`) where these are asked for, and
    from the sources of relations where the workspace is sparse. Factors that share no summed axis and would only form an outer
    product stay apart.
    """
    if term.settled:
        return term
    term = fold_uncarried(push_onehots(term, workspace))
    if workspace.sparse:
        return _absorb(_contract_connected(workspace.canonical(term), workspace), workspace)
    if len(term.all_axes()) > len(term.outer_axes()):
        if bands and term.onehots:
            term = push_onehots(with_bands(term, workspace), workspace)
        term = _contract_connected(scatter_internal(term, workspace, bands=bands), workspace)
    term = _absorb(term, workspace)
    # Without internal axes nothing is left to be done, with bands or without.
    term.settled = len(term.all_axes()) == len(term.outer_axes())
    return term


def scatter_internal(term: Term, workspace: Workspace, *, bands: bool = False) -> Term:
    """Sum over the sources of relations when those sources are internal: the relation goes, its target becomes dense.

    With ``bands``, the relations of bands stay.
    """
    while True:
        outer = term.outer_axes()
        ready = next(
            (
                h
                for h in term.onehots
                if any(axis not in outer for axis in h.sources) and not (bands and band_axis(term, h) is not None)
            ),
            None,
        )
        if ready is None:
            return term
        group = _linked(ready, term.onehots, outer)
        sources = tuple(dict.fromkeys(axis for h in group for axis in h.sources))
        later = tuple(h for h in term.onehots if not any(h is g for g in group))
        gone = {axis for axis in sources if axis not in outer}
        touching = [f for f in term.factors if any(axis in gone for axis in f.axes)]
        if not touching and all(axis.size == 1 for axis in gone):
            # A single element is written to its place; a product with ones that stand there would be dense.
            touching = [f for f in term.factors if all(axis.size == 1 or axis in sources for axis in f.axes)]
        if workspace.recurrences:
            # What is summed over another axis is summed before, where the product grows by nothing.
            wide = {axis for f in touching for axis in f.axes}
            inner = wide.difference(outer)
            touching = [f for f in term.factors if f in touching or (wide.issuperset(f.axes) and not inner.isdisjoint(f.axes))]
        rest = tuple(f for f in term.factors if not any(f is t for t in touching))
        needed = {a for f in rest for a in f.axes} | set(outer) | {a for h in later for a in (*h.sources, h.target)}
        carried = [a for f in touching for a in f.axes]
        keep = dict.fromkeys(axis for axis in (*carried, *sources) if axis not in gone and axis in needed)
        # Internal axes that only these factors carry are summed by the contraction itself.
        dense = scatter(touching, [_spread(h, sources) for h in group], tuple(keep), workspace.dtype, workspace.memo)
        term = push_onehots(term.having(factors=(*rest, dense), onehots=later), workspace)


def _linked(first: OneHot, onehots: Sequence[OneHot], outer: Mapping[Axis, None]) -> list[OneHot]:
    """The relations that share an internal source with ``first``, directly or through each other."""
    group = [first]
    while True:
        inner = {axis for h in group for axis in h.sources if axis not in outer}
        more = [h for h in onehots if inner.intersection(h.sources)]
        if len(more) == len(group):
            return more
        group = more


def _spread(onehot: OneHot, sources: tuple[Axis, ...]) -> OneHot:
    """The same relation as a function of more sources, in the given order."""
    if onehot.sources == sources:
        return onehot
    own = tuple(axis for axis in sources if axis in onehot.sources)
    permutation = tuple(onehot.sources.index(axis) for axis in own)
    ranks = {axis: number for number, axis in enumerate(sources)}
    names, order = tuple(ranks[axis] for axis in own), tuple(range(len(sources)))
    sizes = tuple(axis.size for axis in sources)

    def compute(program: Program, value: Staged) -> Staged:
        return torch.broadcast_to(expand_to(permute(value, permutation), names, order), sizes)

    index = Node(sizes, (onehot.index,), compute, label="index")
    return onehot._replace(index=index, sources=sources, affine=None, shift=None)


def _needed_axes(term: Term) -> dict[Axis, None]:
    needed = dict(term.outer_axes())
    for onehot in term.onehots:
        needed.update(dict.fromkeys(onehot.sources))
        needed[onehot.target] = None
    return needed


def _contract_connected(term: Term, workspace: Workspace) -> Term:
    """Contract each group of factors that is held together by summed axes."""
    needed = _needed_axes(term)
    summed = {axis for f in term.factors for axis in f.axes if axis not in needed}
    if not summed:
        return term
    groups: list[list[Factor]] = []
    alone: list[Factor] = []
    for factor in term.factors:
        touched = {axis for axis in factor.axes if axis in summed}
        if not touched:
            alone.append(factor)
            continue
        linked = [g for g in groups if any(touched & set(f.axes) for f in g)]
        merged = [f for g in linked for f in g] + [factor]
        groups = [g for g in groups if not any(g is other for other in linked)] + [merged]
    results = [contract(group, list(needed), workspace.memo) for group in groups]
    scale = term.scale
    return term.having(factors=(*alone, *results), scale=scale)


def _over_the_same(axes: tuple[Axis, ...], others: tuple[Axis, ...]) -> bool:
    mine, theirs = set(axes), set(others)
    if mine == theirs:
        return True
    # Of an array that has an axis twice, the diagonal would be taken first.
    if len(mine) < len(axes) or len(theirs) < len(others):
        return False
    return all([axis.size == 1 for axis in mine ^ theirs])


def _absorb(term: Term, workspace: Workspace) -> Term:
    """Multiply factors over the same axes into one; an axis of size one makes no difference."""
    if len(term.factors) < 2:
        return term
    factors = sorted(term.factors, key=lambda f: -f.node.numel)
    kept: list[Factor] = []
    for factor in factors:
        host = next((i for i, other in enumerate(kept) if _over_the_same(other.axes, factor.axes)), None)
        if host is None:
            kept.append(factor)
        else:
            axes = [*kept[host].axes, *[axis for axis in factor.axes if axis not in kept[host].axes]]
            kept[host] = contract([kept[host], factor], axes, workspace.memo)
    if len(kept) == len(term.factors):
        return term
    return term.having(factors=tuple(kept))


def dense_factor(term: Term, axes: Sequence[Axis], workspace: Workspace, *, ordered: bool = True) -> Factor:
    """All factors of a settled term as one factor over exactly ``axes`` (scale included), in that order if `ordered`."""
    # Two axes of size one may have become one where terms were matched.
    factors = [without_repeats(factor, workspace.memo) for factor in term.factors] or [Factor(workspace.ones(()), ())]
    if term.scale != 1.0:
        # The smallest factor takes the scale: no second pass over the product.
        smallest = min(range(len(factors)), key=lambda number: factors[number].node.numel)
        factors[smallest] = scaled(factors[smallest], term.scale, workspace)
    if not term.factors:
        return factors[0]
    return (contract if ordered else contract_any)(factors, list(axes), workspace.memo)


def scaled(factor: Factor, scale: float, workspace: Workspace) -> Factor:
    """A factor times a number."""
    key = ("scale", id(factor.node), scale)
    node = workspace.memo.get(key)
    if node is None:
        node = workspace.memo[key] = Node(
            factor.node.sizes,
            (factor.node,),
            lambda program, value: program.scaled(value, scale),
            flops=factor.node.numel,
            moved=2 * factor.node.numel,
            label="scale",
        )
        if factor.node.running is not None:
            node.running = factor.node.running.multiplied(scale)
    return Factor(node, factor.axes)
