"""Terms that stand at fixed places, as one term with a list of places: the gradient of a loop over single elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from chainrule.maps.compose import Workspace, dense_factor
from chainrule.maps.nodes import Node
from chainrule.maps.terms import Axis, Factor, OneHot, Term, affine_onehot, listed_index

#: From so many terms on a list is shorter than the terms.
_FEW = 3


def listed(terms: Sequence[Term], workspace: Workspace) -> list[Term]:
    """The terms, those of one structure that differ in their fixed places (and factors) taken together.

    Each of them is an element, a row or a block that stands at some index. Together they are one factor with an axis that counts
    them, and a relation from that axis to the place.
    """
    groups: dict[Any, list[Term]] = {}
    for term in terms:
        groups.setdefault(_structure(term) or id(term), []).append(term)
    found: list[Term] = []
    for group in groups.values():
        found.extend(group if len(group) < _FEW else [_together(group, workspace)])
    return found


def _numbered(term: Term) -> dict[Axis, int]:
    """The outer axes with more than one element, in order."""
    return {axis: number for number, axis in enumerate(axis for axis in term.outer_axes() if axis.size != 1)}


def _structure(term: Term) -> Any:
    """What terms that are taken together share; None for a term without fixed places, or with other relations."""
    if not term.onehots or any(h.sources or h.affine is None or h.target.size == 1 for h in term.onehots):
        return None
    names = _numbered(term)
    fixed = {h.target for h in term.onehots}
    carried = term.carried_axes()
    if len(fixed) < len(term.onehots) or not fixed <= names.keys() or not carried <= names.keys() or fixed & carried:
        return None
    dims = tuple(
        tuple(tuple(names[axis] for axis in dim if axis.size != 1) for dim in side) for side in (term.out_dims, term.in_dims)
    )
    return (
        dims,
        tuple(axis.size for axis in names),
        frozenset(names[axis] for axis in fixed),
        frozenset(names[axis] for axis in carried),
    )


def _together(group: Sequence[Term], workspace: Workspace) -> Term:
    host = group[0]
    own = list(_numbered(host))
    carried = [number for number, axis in enumerate(own) if axis in host.carried_axes()]
    nodes: list[Node] = []
    places: dict[int, list[int]] = {}
    for term in group:
        names = _numbered(term)
        axes = list(names)
        bare = term.having(onehots=())
        nodes.append(dense_factor(bare, [axes[number] for number in carried], workspace).node)
        for onehot in term.onehots:
            assert onehot.affine is not None
            places.setdefault(names[onehot.target], []).append(onehot.affine[0])
    count = Axis(len(group))
    sizes = (count.size, *(own[number].size for number in carried))
    node = Node(sizes, tuple(nodes), lambda program, *values: torch.stack(values), label="stack")
    relations = tuple(_relation(count, own[number], tuple(listing), workspace) for number, listing in sorted(places.items()))
    factor = Factor(node, (count, *(own[number] for number in carried)))
    return host.having(factors=(factor,), onehots=relations, scale=1.0)


def _relation(count: Axis, target: Axis, places: tuple[int, ...], workspace: Workspace) -> OneHot:
    steps = {b - a for a, b in zip(places, places[1:], strict=False)}
    step = next(iter(steps))
    if len(steps) == 1 and step > 0:
        return affine_onehot(count, target, places[0], step, workspace)

    key = ("listed places", places)
    node = workspace.memo.get(key)
    if node is None:
        node = workspace.memo[key] = listed_index(places, workspace.device)
    return OneHot(node, (count,), target)


__all__ = ["listed"]
