"""All rules in one table, and what happens to an op that has none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload

from chainrule.rules import (
    constants,
    custom_function,
    elementwise,
    elementwise_activations,
    elementwise_special,
    grid_sampling,
    layers,
    linalg,
    linalg_factorisations,
    losses,
    moves,
    normalisations,
    pooling,
    products,
    reductions,
    scans,
    scatter_products,
    segments,
    selections,
    tensor_hooks,
    views,
)
from chainrule.rules.base import Rule
from chainrule.rules.decompositions import DECOMPOSITIONS, JOINED, LATE_DECOMPOSITIONS, composite
from chainrule.rules.direct import DIRECT, JOINED_DIRECT
from chainrule.rules.direct_algebra import DIRECT_ALGEBRA
from chainrule.rules.direct_losses import DIRECT_LOSSES
from chainrule.rules.opaque import opaque_rule


def _merged(tables: Iterable[Mapping[Any, Rule]]) -> dict[Any, Rule]:
    merged: dict[Any, Rule] = {}
    for table in tables:
        for op, rule in table.items():
            if op in merged:
                raise ValueError(f"two rules are declared for {op}")
            merged[op] = rule
    return merged


#: The families' tables; a new family is added here.
FAMILIES: tuple[Mapping[Any, Rule], ...] = (
    elementwise.RULES,
    elementwise_activations.RULES,
    elementwise_special.RULES,
    views.RULES,
    moves.RULES,
    selections.RULES,
    scatter_products.RULES,
    segments.RULES,
    products.RULES,
    reductions.RULES,
    scans.RULES,
    normalisations.RULES,
    layers.RULES,
    grid_sampling.RULES,
    losses.RULES,
    pooling.RULES,
    linalg.RULES,
    linalg_factorisations.RULES,
)

RULES: dict[Any, Rule] = _merged(FAMILIES)

#: Ops that have a composite form: which calls are recorded whole nevertheless.
WHOLE: dict[Any, Callable[[tuple[Any, ...], bool, Callable[[Any], bool]], bool]] = {
    **products.WHOLE, **layers.WHOLE, **losses.WHOLE
}


@cache
def _overload_rule(op: OpOverload) -> Rule:
    rule = RULES.get(op)
    return rule if rule is not None else opaque_rule(op)


def rule_for(op: Any) -> Rule:
    """The rule of an op: declared here, the user's own, or the opaque fallback (the op's own autograd formula)."""
    if isinstance(op, custom_function.FunctionOp):
        return custom_function.RULE
    if op is tensor_hooks.HOOKED:
        return tensor_hooks.RULE
    return _overload_rule(op)


class Rules:
    """How capture treats ops, from the tables (see ``chainrule.capture.schema.Policy``)."""

    def is_inactive(self, op: OpOverload) -> bool:
        """Whether the op's outputs do not depend differentiably on its inputs."""
        return constants.is_inactive(op)

    def expansion(self, op: OpOverload) -> Callable[..., Any] | None:
        """A composite form to record instead of the op, for ops without a rule of their own."""
        if op in RULES and op not in WHOLE:
            return None
        return DECOMPOSITIONS.get(op) or LATE_DECOMPOSITIONS.get(op._schema.name) or composite(op)

    def whole(self, op: OpOverload) -> Callable[[tuple[Any, ...], bool, Callable[[Any], bool]], bool] | None:
        """For an op that has a composite form: which calls are recorded whole nevertheless."""
        return WHOLE.get(op)

    def direct(self, op: OpOverload) -> Callable[..., Any] | None:
        """A composite form whose parts are run one by one, without a way through torch's dispatcher for each of them."""
        return DIRECT.get(op) or DIRECT_LOSSES.get(op) or DIRECT_ALGEBRA.get(op)

    def joined_expansion(self, op: OpOverload) -> Callable[..., Any] | None:
        """A composite form to record instead of the op when one of its arguments requires grad."""
        return JOINED.get(op)

    def joined_direct(self, op: OpOverload) -> Callable[..., Any] | None:
        """The same for calls with an argument that requires grad."""
        return JOINED_DIRECT.get(op)

    def reads_values(self, op: OpOverload) -> bool:
        """Whether the op's derivative needs values of the tape."""
        return rule_for(op).reads


POLICY = Rules()

__all__ = ["FAMILIES", "POLICY", "RULES", "rule_for", "torch"]
