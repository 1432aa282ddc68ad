"""Sums whose terms stay networks until they are closed.

The Jacobian of ``A @ tanh(B @ x) + x ** 2`` is a product of low rank and a diagonal. As one array their sum takes a square of
numbers, and neither its diagonal nor its trace nor the sum of its squares needs one: the diagonal of a sum is the sum of
diagonals, and the sum of squares that of the traces of ``Tᵢᵀ Tⱼ``, each of which is a contraction of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from chainrule.maps import running
from chainrule.maps.compose import Workspace, settle
from chainrule.maps.linear_map import LinearMap, add_maps, merge
from chainrule.maps.terms import Term

#: More terms than this at one vertex are added as they are elsewhere: their products would be many.
_MOST = 16


def added_apart(maps: Sequence[LinearMap], workspace: Workspace) -> LinearMap:
    """The sum of maps between the same spaces, without arrays that hold more than the factors that they are made of."""
    terms = [_condensed(term, workspace) for one in maps for term in one.terms if not term.is_empty]
    networks = [term for term in terms if _is_network(term)]
    merged = merge([term for term in terms if not _is_network(term)], workspace, force=False, limit=None)
    if len(networks) + len(merged) > _MOST or any(one.operators for one in maps):
        return add_maps(maps, workspace)
    return LinearMap(maps[0].out_shape, maps[0].in_shape, (*merged, *networks))


def _condensed(term: Term, workspace: Workspace) -> Term:
    """The term with its sums done where the result holds no more than its factors."""
    if not _is_network(term):
        return term
    settled = settle(term, workspace, bands=True)
    return settled if _held(settled) <= _held(term) else term


def _is_network(term: Term) -> bool:
    return len(term.all_axes()) > len(term.outer_axes())


def _held(term: Term) -> int:
    return sum(running.held(factor.node) for factor in term.factors)


__all__ = ["added_apart"]
