"""``scatter_reduce``: sums, means, products and extrema of what is scattered to one place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from chainrule.maps.nodes import choosing
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Factor, Term
from chainrule.rules.base import Call, Edge, Rule, formula_node, single
from chainrule.rules.opaque import opaque_edges
from chainrule.rules.selections import place_mask, rank_one, scattered, self_edge

aten = torch.ops.aten


def _vector(value: Staged) -> Staged:
    """A scalar as a vector of one element: the op takes either for the other."""
    return value if tuple(value.shape) else torch.reshape(value, (1,))


class _Groups:
    """The staged values of a call: which elements of the source go to which place (scalars as vectors)."""

    def __init__(self, call: Call, program: Program) -> None:
        self.dim: int = call.argument("dim")
        self.own = _vector(call.stage(program, call.args[0]))
        self.index = _vector(call.stage(program, call.argument("index")))
        self.source = _vector(call.stage(program, call.argument("src")))
        self.result = _vector(call.stage_output(program))
        self.includes = bool(call.argument("include_self"))

    def gathered(self, places: Staged) -> Staged:
        """What stands at the place of each element of the source."""
        return torch.gather(places, self.dim, self.index)

    def added(self, own: Staged, source: Staged) -> Staged:
        """Sums over the elements of each place, and its own one if that counts."""
        start = own if self.includes else torch.zeros_like(own)
        return torch.scatter_add(start, self.dim, self.index, source)

    def shares(self) -> Staged:
        """One over the number of elements of each place."""
        count = self.added(torch.ones_like(self.own), torch.ones_like(self.source))
        return torch.reciprocal(torch.clamp_min(count, 1.0))

    def extremal(self, of_source: bool) -> Staged:
        """For each element of the source (or of the tensor itself), its share in the extremum of its place: ties share it."""
        own = (self.own == self.result).to(self.result.dtype)
        source = (self.source == self.gathered(self.result)).to(self.result.dtype)
        share = torch.reciprocal(torch.clamp_min(self.added(own, source), 1.0))
        return source * self.gathered(share) if of_source else own * share

    def others(self, value: Staged, of_source: bool) -> Staged:
        """The product of all other elements at the place of each element of ``value`` (the source, or the tensor itself).

        An element that is not zero divides the product. The product without the only zero is that of what is not zero.
        Where there are several zeros, derivatives of higher order are undefined here, which the square root marks.
        """

        def at(places: Staged) -> Staged:
            return self.gathered(places) if of_source else places

        def one_for_zero(x: Staged) -> Staged:
            return torch.where(x == 0, 1.0, x)

        zeros = at(self.added((self.own == 0).to(self.own.dtype), (self.source == 0).to(self.source.dtype)))
        start = one_for_zero(self.own) if self.includes else torch.ones_like(self.own)
        rest = at(torch.scatter_reduce(start, self.dim, self.index, one_for_zero(self.source), "prod", include_self=True))
        several = torch.sqrt(torch.where((value == 0) & (zeros > 1), at(self.result), 1.0))
        return torch.where(value == 0, torch.where(zeros > 1, several, rest), at(self.result) / one_for_zero(value))


Formula = Callable[[_Groups], Staged]


def _scatter_reduce(call: Call) -> Iterable[Edge]:
    index, source = call.argument("index"), call.argument("src")
    reduce, shape = call.argument("reduce"), call.shape(index)
    plain = reduce == "sum" or rank_one(call.shape(source)) == rank_one(shape)
    if not plain or 0 in shape:
        yield from opaque_edges(call)
        return

    extremal: tuple[Formula, Formula] = (lambda g: g.extremal(False)), (lambda g: g.extremal(True))
    formulas: dict[str, tuple[Formula, Formula]] = {
        "mean": (_Groups.shares, lambda g: g.gathered(g.shares())),
        "prod": ((lambda g: g.others(g.own, False)), lambda g: g.others(g.source, True)),
        "amax": extremal,
        "amin": extremal,
    }

    def weights(axes: tuple[Axis, ...], formula: Formula) -> Factor:
        sizes = tuple(axis.size for axis in axes)
        node = formula_node(call, sizes, lambda program: torch.reshape(formula(_Groups(call, program)), sizes))
        return Factor(choosing(node) if reduce in ("amax", "amin") else node, axes)

    def own_factors(axes: Any) -> list[Factor]:
        if not call.argument("include_self"):
            return [place_mask(call, axes)]
        if reduce == "sum":
            return []
        formula = formulas[reduce][0]
        return [weights(tuple(axes), formula)]

    yield from self_edge(call, own_factors)
    if call.is_active(source):
        term: Term = scattered(call, source)
        axes = tuple(axis for dim in term.in_dims for axis in dim)
        if reduce != "sum":
            term = replace(term, factors=(weights(axes, formulas[reduce][1]),))
        yield single(call, source, [term])


RULES: dict[Any, Rule] = {aten.scatter_reduce.two: Rule("selection", _scatter_reduce)}

__all__ = ["RULES"]
