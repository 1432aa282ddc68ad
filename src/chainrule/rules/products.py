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


def _linear(call: Call) -> Iterable[Edge]:
    """``input @ weight.T + bias`` with any number of leading dimensions."""
    item, weight, bias = call.args[0], call.args[1], call.args[2] if len(call.args) > 2 else None
    letters = "abcdefghij"[: len(call.shape(item)) - 1]
    vector = len(call.shape(weight)) == 1
    out = letters if vector else letters + "o"
    yield from contraction_edges(call, f"{letters}k,{'k' if vector else 'ok'}->{out}", (0, 1))
    if bias is not None and call.is_active(bias):
        yield single(call, bias, [diagonal_term(call.shape(bias), new_axes(call.out_shape))])


def _trilinear(call: Call) -> Iterable[Edge]:
    """A product of three tensors, each repeated along its ``expand`` dimensions, summed over ``sumdim``."""
    rank = len(call.shape(call.args[0])) + len(call.argument("expand1"))
    letters = "abcdefghijklmnopqrstuvwxyz"[:rank]

    def without(name: str) -> str:
        left_out = {dim % rank for dim in call.argument(name)}
        return "".join(letter for dim, letter in enumerate(letters) if dim not in left_out)

    inputs = ",".join(without(name) for name in ("expand1", "expand2", "expand3"))
    yield from contraction_edges(call, f"{inputs}->{without('sumdim')}", (0, 1, 2))


RULES: dict[Any, Rule] = {
    aten._trilinear.default: Rule("contraction", _trilinear),
    aten.linear.default: Rule("contraction", _linear),
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
