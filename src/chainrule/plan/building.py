"""The blocks of expressions in Jacobians, as networks of the Jacobians' terms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from chainrule.maps.compose import Workspace
from chainrule.maps.linear_map import LinearMap, add_maps, compose
from chainrule.maps.nodes import Node, leaf
from chainrule.maps.onehots import digit
from chainrule.maps.terms import Axis, Factor, OneHot, Term
from chainrule.plan.apart import added_apart
from chainrule.plan.expressions import Added, AlgebraRequest, Expression, Jacobian, Scaled, Transposed

Blocks = dict[tuple[int, int], LinearMap]


class Builder:
    """Makes the blocks of expressions in one workspace, from Jacobians that were accumulated in one order."""

    def __init__(
        self, found: dict[Jacobian, dict[tuple[int, int], LinearMap]], seeds: Any, workspace: Workspace, *, apart: bool = False
    ) -> None:
        self.found = found
        self.seeds = seeds
        self.workspace = workspace
        self.apart = apart

    def blocks(self, expression: Expression) -> Blocks:
        """The blocks by numbers of output and input; those that are zero are left out."""
        if isinstance(expression, Jacobian):
            maps = self.found[expression]
            return {
                (o, i): maps[slot, source]
                for o, slot in enumerate(expression.outputs)
                for i, source in enumerate(expression.inputs)
                if slot is not None and (slot, source) in maps
            }
        if isinstance(expression, Transposed):
            return {(i, o): local.transpose() for (o, i), local in self.blocks(expression.of).items()}
        if isinstance(expression, Scaled):
            return {key: self.scaled(local, expression) for key, local in self.blocks(expression.of).items()}
        if isinstance(expression, Added):
            sums: dict[tuple[int, int], list[LinearMap]] = {}
            for part in expression.parts:
                for key, local in self.blocks(part).items():
                    sums.setdefault(key, []).append(local)
            return {key: self.added(parts) for key, parts in sums.items()}
        return self._composed(self.blocks(expression.left), self.blocks(expression.right))

    def _composed(self, left: Blocks, right: Blocks) -> Blocks:
        sums: dict[tuple[int, int], list[LinearMap]] = {}
        for (o, middle), one in left.items():
            for (other, i), two in right.items():
                if other == middle:
                    sums.setdefault((o, i), []).append(self.product(one, two))
        found = {key: [part for part in parts if not part.is_zero] for key, parts in sums.items()}
        return {key: self.added(parts) for key, parts in found.items() if parts}

    def product(self, one: LinearMap, two: LinearMap) -> LinearMap:
        """The composition of two maps, left as a network where entries are not listed."""
        return compose(one, two, self.workspace, eager=self.workspace.sparse)

    def closed(self, parts: Sequence[LinearMap], request: AlgebraRequest) -> LinearMap:
        """The sum of closed products; where the sizes of its terms are wanted, these stay apart."""
        if request.sized:
            return replace(parts[0], terms=tuple(term for part in parts for term in part.terms))
        return self.added(parts)

    def added(self, parts: Sequence[LinearMap]) -> LinearMap:
        """The sum of maps between the same spaces: its terms stay apart as long as they hold less than a dense array."""
        first = parts[0]
        if self.workspace.sparse:
            return add_maps(parts, self.workspace)
        if self.apart:
            return added_apart(parts, self.workspace)
        terms = tuple(term for part in parts for term in part.terms)
        dense = math.prod(first.out_shape) * math.prod(first.in_shape)
        if len(terms) > 2 and sum(factor.node.numel for term in terms for factor in term.factors) >= dense:
            return add_maps(parts, self.workspace, force=True)
        return replace(first, terms=terms)

    def scaled(self, local: LinearMap, expression: Scaled) -> LinearMap:
        """A map times the factors of an expression."""
        factors: tuple[Factor, ...] = ()
        if (number := expression.seed) is not None:
            factors = (Factor(self.seed(number, ()), ()),)
        terms = tuple(
            replace(term, factors=(*term.factors, *factors), scale=term.scale * expression.number) for term in local.terms
        )
        return replace(local, terms=terms)

    def seed(self, number: int, sizes: tuple[int, ...]) -> Node:
        """The array of a seed."""
        key = ("seed", number)
        node = self.workspace.memo.get(key)
        if node is None:
            node = self.workspace.memo[key] = leaf(
                sizes, lambda program: program.input(("seed", number), self.seeds[number]), label="seed"
            )
        return node

    def chosen(self, shapes: Sequence[tuple[tuple[int, ...], int]]) -> LinearMap:
        """The map that reads elements of a tensor, by their flat positions in one shape or in several side by side.

        Args:
            shapes: for each part of the tensor's shape, the part and the seed that holds positions in it.
        """
        count = int(self.seeds[shapes[0][1]].shape[0])
        source = Axis(count)
        in_dims: list[tuple[Axis, ...]] = []
        relations: list[OneHot] = []
        for shape, number in shapes:
            positions = self.seed(number, (count,))
            stride = math.prod(shape)
            for size in shape:
                stride //= max(size, 1)
                if size == 1:
                    in_dims.append(())
                    continue
                target = Axis(size)
                in_dims.append((target,))
                relations.append(OneHot(digit(positions, stride, size, math.prod(shape)), (source,), target))
        whole = tuple(size for shape, _ in shapes for size in shape)
        return LinearMap((count,), whole, (Term(((source,),), tuple(in_dims), (), tuple(relations)),))


__all__ = ["Blocks", "Builder"]
