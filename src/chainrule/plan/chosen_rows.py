"""Some rows or some columns of expressions in Jacobians, by sweeps that begin with them.

The rows are taken through the left side of a product and then through its right side, so that no matrix of the product's size, or
of a side's, is made: what is held has as many rows as are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from chainrule.maps.compose import Workspace
from chainrule.maps.linear_map import LinearMap, add_maps, as_one_factor
from chainrule.plan import elimination
from chainrule.plan.building import Builder
from chainrule.plan.expressions import Added, AlgebraRequest, Composed, Expression, Jacobian, Scaled, Transposed
from chainrule.plan.graph import Graph

#: For each Jacobian, the ops that lie between its inputs and outputs, and these.
Graphs = dict[Jacobian, tuple[Graph, list[int], list[int]]]


class Sweeps:
    """Takes some rows of an expression back to its inputs, from Jacobian to Jacobian: nothing on the way has more rows.

    Attributes:
        graphs: the local Jacobians that each Jacobian is made of.
        build: makes sums and multiples.
        total: what adds the rows that meet at a vertex; None for sums that keep their structure.
    """

    def __init__(self, graphs: Graphs, build: Builder, total: elimination.Total | None) -> None:
        self.graphs = graphs
        self.build = build
        self.total = total

    def pulled(self, expression: Expression, rows: dict[int, LinearMap], flipped: bool = False) -> dict[int, LinearMap]:
        """The product of some rows (by the leaves they stand on) with an expression, or with its transpose."""
        if isinstance(expression, Transposed):
            return self.pulled(expression.of, rows, not flipped)
        if isinstance(expression, Scaled):
            found = self.pulled(expression.of, rows, flipped)
            return {leaf: self.build.scaled(local, expression) for leaf, local in found.items()}
        if isinstance(expression, Added):
            return self._sums([pair for part in expression.parts for pair in self.pulled(part, rows, flipped).items()])
        if isinstance(expression, Composed):
            first, second = (expression.right, expression.left) if flipped else (expression.left, expression.right)
            return self.pulled(second, self.pulled(first, rows, flipped), flipped)
        graph, inputs, outputs = self.graphs[expression]
        workspace = self.build.workspace
        starts, ends = (expression.inputs, expression.outputs) if flipped else (expression.outputs, expression.inputs)
        begun = self._sums([(slot, rows[leaf]) for leaf, slot in enumerate(starts) if slot is not None and leaf in rows])
        if flipped:
            begun = {slot: local.transpose() for slot, local in begun.items()}
            pushed = elimination.sweep_forward(graph, begun, outputs, workspace, total=self.total)
            maps = {slot: local.transpose() for slot, local in pushed.items()}
        else:
            maps = elimination.sweep_back(graph, begun, inputs, workspace, total=self.total)
        return {leaf: maps[slot] for leaf, slot in enumerate(ends) if slot is not None and slot in maps}

    def _sums(self, parts: Sequence[tuple[int, LinearMap]]) -> dict[int, LinearMap]:
        sums: dict[int, list[LinearMap]] = {}
        for key, local in parts:
            sums.setdefault(key, []).append(local)
        return {key: several[0] if len(several) == 1 else self.build.added(several) for key, several in sums.items()}


def _filled(maps: list[LinearMap], workspace: Workspace) -> LinearMap:
    """The sum of some rows as an array: running sums and the like take it as it is, where relations would make a matrix."""
    whole = add_maps(maps, workspace)
    return replace(whole, terms=(as_one_factor(whole, workspace),)) if whole.terms else whole


#: How chosen rows that meet at a vertex are added: by their structure, or as arrays, as products with vectors are.
TOTALS: dict[str, elimination.Total | None] = {"selected": None, "filled": _filled}


def swept(request: AlgebraRequest, sweeps: Sweeps, tape: Any) -> Iterator[dict[Any, LinearMap]]:
    """Some rows of an expression by sweeps that begin with them, or some columns; some of both by either."""
    if request.kind != "blocks":
        return
    shapes = _shapes(request.expression, tape)
    build = sweeps.build
    for flipped, rows, columns in ((False, request.rows, request.columns), (True, request.columns, request.rows)):
        out_shapes, in_shapes = shapes[:: -1 if flipped else 1]
        if not rows or any(seed is None for _, seed in rows):
            continue
        found: dict[Any, LinearMap] = {}
        for number, seed in rows:
            if number not in out_shapes or seed is None:
                continue
            maps = sweeps.pulled(request.expression, {number: build.chosen([(out_shapes[number], seed)])}, flipped)
            for other, column in columns:
                if (local := maps.get(other)) is None:
                    continue
                if column is not None:
                    local = build.product(local, build.chosen([(in_shapes[other], column)]).transpose())
                if not local.is_zero:
                    found[(other, number) if flipped else (number, other)] = local.transpose() if flipped else local
        yield found


def _shapes(expression: Expression, tape: Any) -> tuple[dict[int, tuple[int, ...]], dict[int, tuple[int, ...]]]:
    """The shapes of the outputs and of the inputs of an expression, of those that it depends on."""
    if isinstance(expression, Transposed):
        return _shapes(expression.of, tape)[::-1]
    if isinstance(expression, Scaled):
        return _shapes(expression.of, tape)
    if isinstance(expression, Composed):
        return _shapes(expression.left, tape)[0], _shapes(expression.right, tape)[1]
    if isinstance(expression, Added):
        several = [_shapes(part, tape) for part in expression.parts]
        outs, ins = ({leaf: shape for one in several for leaf, shape in one[side].items()} for side in (0, 1))
        return outs, ins
    sides = [
        {leaf: tuple(tape.values[slot].shape) for leaf, slot in enumerate(slots) if slot is not None}
        for slots in (expression.outputs, expression.inputs)
    ]
    return sides[0], sides[1]


__all__ = ["TOTALS", "Graphs", "Sweeps", "swept"]
