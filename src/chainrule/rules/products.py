"""Contractions: their einsum strings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from chainrule.maps.terms import new_axes
from chainrule.rules.base import Call, Edge, Rule, diagonal_term, single
from chainrule.rules.families import contraction, contraction_edges

aten = torch.ops.aten


def _added(equation: str) -> Rule:
    """``beta * input + alpha * (product)``."""

    def linearize(call: Call) -> Iterable[Edge]:
        item = call.args[0]
        if call.is_active(item):
            beta = float(call.argument("beta"))
            yield single(call, item, [diagonal_term(call.shape(item), new_axes(call.out_shape), scale=beta)])
        yield from contraction_edges(call, equation, (1, 2), float(call.argument("alpha")))

    return Rule("contraction", linearize)


RULES: dict[Any, Rule] = {
    aten.mm.default: contraction("ik,kj->ij", (0, 1)),
    aten.bmm.default: contraction("bik,bkj->bij", (0, 1)),
    aten.mv.default: contraction("ik,k->i", (0, 1)),
    aten.dot.default: contraction("k,k->", (0, 1)),
    aten.vdot.default: contraction("k,k->", (0, 1)),
    aten.addmm.default: _added("ik,kj->ij"),
    aten.addmv.default: _added("ik,k->i"),
    aten.addr.default: _added("i,j->ij"),
    aten.baddbmm.default: _added("bik,bkj->bij"),
    aten.addbmm.default: _added("bik,bkj->ij"),
}
