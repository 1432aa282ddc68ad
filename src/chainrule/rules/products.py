"""Contractions: their einsum strings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from chainrule.maps.terms import Axis, Term, dims_of, new_axes
from chainrule.rules.base import Call, Edge, Rule, broadcast_axes, diagonal_term, single
from chainrule.rules.equations import are_alike, einsum_letters, is_plain_einsum
from chainrule.rules.families import contraction, contraction_edges
from chainrule.rules.opaque import opaque_edges
from chainrule.rules.sparse_operands import operand_network

aten = torch.ops.aten


def _added(equation: str) -> Rule:
    """``beta * input + alpha * (product)``."""

    def linearize(call: Call) -> Iterable[Edge]:
        item = call.args[0]
        if call.is_active(item):
            beta = float(call.argument("beta"))
            yield single(call, item, [diagonal_term(call.shape(item), new_axes(call.out_shape), scale=beta)])
        yield from contraction_edges(call, equation, call.args[1:3], float(call.argument("alpha")))

    return Rule("contraction", linearize)


_ADDMM = _added("ik,kj->ij")


def _sparse_addmm(call: Call) -> Iterable[Edge]:
    """The same with a sparse first factor; a derivative with respect to that one is torch's own."""
    differentiated = any(call.is_active(item) and call.tensor(item).layout is not torch.strided for item in call.args[:3])
    yield from opaque_edges(call) if differentiated else _ADDMM.linearize(call)


def _linear(call: Call) -> Iterable[Edge]:
    """``input @ weight.T + bias`` with any number of leading dimensions."""
    item, weight, bias = call.args[0], call.args[1], call.args[2] if len(call.args) > 2 else None
    letters = "abcdefghij"[: len(call.shape(item)) - 1]
    vector = len(call.shape(weight)) == 1
    out = letters if vector else letters + "o"
    yield from contraction_edges(call, f"{letters}k,{'k' if vector else 'ok'}->{out}", call.args[:2])
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
    yield from contraction_edges(call, f"{inputs}->{without('sumdim')}", call.args[:3])


def _matmul(call: Call) -> Iterable[Edge]:
    """The product of vectors, matrices and stacks of matrices, whose leading dimensions broadcast."""
    first, second = call.args[:2]
    left, right = call.shape(first), call.shape(second)
    rows, columns = len(left) > 1, len(right) > 1
    batch_shape = call.out_shape[: len(call.out_shape) - rows - columns]
    for is_first in (True, False):
        item, other = (first, second) if is_first else (second, first)
        if not call.is_active(item):
            continue
        batch = new_axes(batch_shape)
        inner = Axis(left[-1])
        row = dims_of(new_axes(left[-2:-1] if rows else ()))
        column = dims_of(new_axes(right[-1:] if columns else ()))
        left_dims = (*broadcast_axes(left[:-2], batch), *row, (inner,))
        right_dims = (*broadcast_axes(right[:-2], batch), (inner,), *column)
        mine, others = (left_dims, right_dims) if is_first else (right_dims, left_dims)
        axes = tuple(axis for dim in others for axis in dim)
        factors, relations = operand_network(call, other, axes)
        yield single(call, item, [Term((*dims_of(batch), *row, *column), mine, factors, relations)])


def _einsum(call: Call) -> Iterable[Edge]:
    letters, output = einsum_letters(call.args[0])
    yield from contraction_edges(call, ",".join(letters) + "->" + output, call.args[1])


#: Ops that have a rule and a composite form: whether a call is recorded whole.
WHOLE: dict[Any, Callable[[tuple[Any, ...], bool, Callable[[Any], bool]], bool]] = {
    aten.einsum.default: lambda args, kernels, is_active: is_plain_einsum(args) and are_alike(args[1])
}

RULES: dict[Any, Rule] = {
    aten.einsum.default: Rule("contraction", _einsum),
    aten.matmul.default: Rule("contraction", _matmul),
    aten._trilinear.default: Rule("contraction", _trilinear),
    aten.linear.default: Rule("contraction", _linear),
    aten.mm.default: contraction("ik,kj->ij", (0, 1)),
    aten.bmm.default: contraction("bik,bkj->bij", (0, 1)),
    aten.mv.default: contraction("ik,k->i", (0, 1)),
    aten.dot.default: contraction("k,k->", (0, 1)),
    aten.vdot.default: contraction("k,k->", (0, 1)),
    aten.addmm.default: _ADDMM,
    aten._sparse_addmm.default: Rule("contraction", _sparse_addmm),
    aten.addmv.default: _added("ik,k->i"),
    aten.addr.default: _added("i,j->ij"),
    aten.baddbmm.default: _added("bik,bkj->bij"),
    aten.addbmm.default: _added("bik,bkj->ij"),
}
