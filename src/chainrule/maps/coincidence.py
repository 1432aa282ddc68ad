"""Two relations on one axis: where their targets coincide."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy
import torch

from chainrule.maps.nodes import Node
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Factor, IndexSpace, OneHot, Term, fixed_index, listed_index
from chainrule.maps.views import expand_to, permute

if TYPE_CHECKING:
    from chainrule.maps.compose import Workspace


def coincide(term: Term, one: OneHot, two: OneHot, workspace: Workspace) -> Term:
    """Leave one relation of two with the same target.

    Two affine relations tie their sources to each other (a slice of a slice written back, an element of a row); nothing
    becomes dense, and a term in which they never meet gets the scale zero. Of other relations, one is replaced by a mask
    over the sources of both.
    """
    if one.index is two.index and one.sources == two.sources:
        return term.having(onehots=tuple(h for h in term.onehots if h is not two))
    if workspace.recurrences and one.index is two.index and len(one.sources) == 1 and _is_distinct(one):
        # The same place is read by the same position only: the two axes are one.
        rest = tuple(h for h in term.onehots if h is not two)
        return term.having(onehots=rest).rename({two.sources[0]: one.sources[0]})
    if workspace.recurrences and _is_permutation(one) and _is_permutation(two):
        rest = tuple(h for h in term.onehots if h is not two)
        return term.having(onehots=(*rest, _between(one, two, workspace)))
    if one.affine is not None and two.affine is not None:
        solved = solve_affine(term, one, two, workspace)
        if solved is not None:
            return solved
    dropped, kept = (two, one) if one.affine is not None else (one, two)
    rest = tuple(h for h in term.onehots if h is not dropped)
    return term.having(factors=(*term.factors, _equality(dropped, kept, workspace)), onehots=rest)


def _is_distinct(onehot: OneHot) -> bool:
    return not onehot.partial and (0 in onehot.index.distinct or (onehot.affine is not None and onehot.affine[1] != 0))


def _is_permutation(onehot: OneHot) -> bool:
    return len(onehot.sources) == 1 and onehot.sources[0].size == onehot.target.size and _is_distinct(onehot)


def _between(one: OneHot, two: OneHot, workspace: Workspace) -> OneHot:
    """Which source of the second of two permutations has the target of a source of the first one."""
    if one.affine is not None and two.affine is not None:
        solved = _positions(two, one, two.sources[0])
        return _listed(solved, one.sources, two.sources[0], workspace)
    key = ("between", id(one.index), id(two.index))
    node = workspace.memo.get(key)
    if node is None:

        def compute(program: Program, first: Staged, second: Staged) -> Staged:
            return torch.index_select(torch.argsort(second), 0, first)

        node = workspace.memo[key] = Node(one.index.sizes, (one.index, two.index), compute, label="index")
        node.distinct = frozenset({0})
    return OneHot(node, one.sources, two.sources[0])


def solve_affine(term: Term, one: OneHot, two: OneHot, space: IndexSpace) -> Term | None:
    """Read the source of one affine relation off the other's, when nothing else ties it."""
    taken = {h.target for h in term.onehots}
    solutions = []
    for solved, kept in ((one, two), (two, one)):
        if not solved.sources:
            continue
        (unknown,) = solved.sources
        # Neither may follow from other axes: the new relation could close a circle.
        if unknown not in taken and unknown not in kept.sources and not taken.intersection(kept.sources):
            solutions.append((_positions(solved, kept, unknown), solved, kept, unknown))
    rest = tuple(h for h in term.onehots if h is not one and h is not two)
    if not one.sources and not two.sources:
        assert one.affine is not None
        assert two.affine is not None
        scale = term.scale if one.affine[0] == two.affine[0] else 0.0
        return term.having(onehots=(*rest, two), scale=scale)
    if not solutions:
        return None
    positions, _, kept, unknown = min(solutions, key=lambda found: bool((found[0] < 0).any()))
    if (positions < 0).all():
        return term.having(onehots=(*rest, kept), scale=0.0)
    return term.having(onehots=(*rest, kept, _listed(positions, kept.sources, unknown, space)))


def _positions(solved: OneHot, kept: OneHot, unknown: Axis) -> numpy.ndarray:
    """For each position of the kept relation's source: where the solved one's source has the same target, or -1."""
    assert solved.affine is not None
    assert kept.affine is not None
    start, step = solved.affine
    first, stride = kept.affine[0] - start, kept.affine[1]
    count = kept.sources[0].size if kept.sources else 1
    places, left = numpy.divmod(first + stride * numpy.arange(count), step)
    return numpy.where((left == 0) & (places >= 0) & (places < unknown.size), places, -1)


def _listed(positions: numpy.ndarray, sources: tuple[Axis, ...], target: Axis, space: IndexSpace) -> OneHot:
    if not sources:
        return fixed_index(target, int(positions[0]), space)
    index = listed_index(positions, space.device)
    steps = set(numpy.diff(positions).tolist()) or {1}
    partial = bool((positions < 0).any())
    affine = (int(positions[0]), steps.pop()) if not partial and len(steps) == 1 else None
    return OneHot(index, sources, target, partial, affine)


def _equality(dropped: OneHot, kept: OneHot, workspace: Workspace) -> Factor:
    """One where both relations have the same target, over the sources of both."""
    axes = tuple(dict.fromkeys((*kept.sources, *dropped.sources)))
    names = {axis: number for number, axis in enumerate(axes)}
    order = tuple(range(len(axes)))
    sizes = tuple(axis.size for axis in axes)

    def spread(value: Staged, sources: tuple[Axis, ...]) -> Staged:
        own = tuple(axis for axis in axes if axis in sources)
        value = permute(value, tuple(sources.index(axis) for axis in own))
        return expand_to(value, tuple(names[axis] for axis in own), order)

    def compute(program: Program, first: Staged, second: Staged) -> Staged:
        equal = torch.eq(spread(first, dropped.sources), spread(second, kept.sources))
        return torch.broadcast_to(equal, sizes).to(workspace.dtype)

    node = Node(sizes, (dropped.index, kept.index), compute, label="coincidence")
    node.flops = node.bytes = node.numel
    return Factor(node, axes)


def meeting(term: Term, one: OneHot, two: OneHot) -> list[tuple[OneHot, OneHot]]:
    """All pairs of relations of one target between the sources of two relations: they meet where all of these targets agree."""
    by_target: dict[Axis, list[OneHot]] = {}
    for onehot in term.onehots:
        by_target.setdefault(onehot.target, []).append(onehot)
    left, right = set(one.sources), set(two.sources)
    tied = [(one, two)]
    for target, several in by_target.items():
        if target is one.target or len(several) < 2:
            continue
        ones = [h for h in several if left.issuperset(h.sources)]
        others = [h for h in several if right.issuperset(h.sources)]
        if (found := next(((a, b) for a in ones for b in others if a is not b), None)) is not None:
            tied.append(found)
    return tied


__all__ = ["coincide", "meeting", "solve_affine"]
