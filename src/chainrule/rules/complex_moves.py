"""Complex values that are rearranged, conjugated, added or multiplied: what a derivative of complex steps mostly consists of.

Maps of complex tensors are R-linear, in torch's convention: a cotangent's pullback is the adjoint with respect to the real part
of the inner product. So the pullback of a product is the product with the conjugate of the other operand, and that of a
rearrangement the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from chainrule.maps.staging import Program, Staged
from chainrule.rules.base import Call, Edge
from chainrule.rules.families import operator_edge

aten = torch.ops.aten

#: Acts on rows ``(R, *shape)``.
Action = Callable[[Program, Staged], Staged]
Ways = tuple[Action, Action]


def complex_edge(call: Call, item: Any, ways: Ways, output: int = 0) -> Edge:
    """An edge by its pushforward and its pullback, whose rows come in the dtype of the value that they belong to."""
    given, made = call.tensor(item), call.tensor(call.outputs[output])

    def act(c: Call, program: Program, rows: Staged, count: int, action: Action, dtype: torch.dtype) -> Staged:
        return action(program, rows if rows.dtype == dtype else rows.to(dtype))

    forward, backward = partial(act, action=ways[0], dtype=given.dtype), partial(act, action=ways[1], dtype=made.dtype)
    return operator_edge(call, item, forward, backward, (), given.numel() + made.numel(), output)


def _reshaped(shape: tuple[int, ...]) -> Action:
    return lambda program, rows: torch.reshape(rows, (rows.shape[0], *shape))


def _reshape(call: Call) -> Ways:
    return _reshaped(call.shape(call.outputs[0])), _reshaped(call.shape(call.args[0]))


def _permuted(order: list[int]) -> Action:
    return lambda program, rows: torch.permute(rows, order)


def _permutation(call: Call) -> Ways:
    rank = len(call.shape(call.args[0]))
    order = list(range(rank))
    if call.op is aten.permute.default:
        order = [d % rank for d in call.args[1]]
    elif rank > 1 or call.op is not aten.t.default:
        one, two = (0, 1) if call.op is aten.t.default else (d % max(rank, 1) for d in call.args[1:3])
        if rank:
            order[one], order[two] = two, one
    back = [order.index(d) for d in range(rank)]
    return tuple(_permuted([0, *[d + 1 for d in way]]) for way in (order, back))  # type: ignore[return-value]


def _same(function: Callable[[Staged], Staged]) -> Callable[[Call], Ways]:
    action: Action = lambda program, rows: function(rows)  # noqa: E731
    return lambda call: (action, action)


def _taken(dim: int, index: int) -> Action:
    return lambda program, rows: torch.select(rows, dim + 1, index)


def _placed(shape: tuple[int, ...], dim: int, index: int) -> Action:
    def place(program: Program, rows: Staged) -> Staged:
        found: Staged = program.call(aten.select_backward.default, rows, [rows.shape[0], *shape], dim + 1, index)
        return found

    return place


def _selection(call: Call) -> Ways:
    shape, index = call.shape(call.args[0]), call.args[2]
    dim = call.args[1] % len(shape)
    return _taken(dim, index), _placed(shape, dim, index)


def _selection_back(call: Call) -> Ways:
    shape = tuple(call.args[1])
    dim = call.args[2] % len(shape)
    return _placed(shape, dim, call.args[3]), _taken(dim, call.args[3])


def _pairs(program: Program, rows: Staged) -> Staged:
    return torch.stack([torch.real(rows), torch.imag(rows)], -1)


def _numbers(program: Program, rows: Staged) -> Staged:
    return torch.view_as_complex(rows.contiguous())


def _expansion(call: Call) -> Ways:
    like, shape = call.tensor(call.args[0]), call.shape(call.outputs[0])
    return _expanded(shape), lambda program, rows: summed_to(rows, like)


def _expanded(shape: tuple[int, ...]) -> Action:
    return lambda program, rows: torch.broadcast_to(aligned(rows, len(shape)), (rows.shape[0], *shape))


def _total(call: Call) -> Ways:
    shape = call.shape(call.args[0])
    rank = len(shape)
    dims = [d % max(rank, 1) for d in call.args[1] or range(rank)] if rank else []
    kept = tuple(1 if d in dims else size for d, size in enumerate(shape))
    made = call.shape(call.outputs[0])

    def push(program: Program, rows: Staged) -> Staged:
        total = torch.sum(rows, [d + 1 for d in dims]) if dims else rows
        return torch.reshape(total, (rows.shape[0], *made))

    def pull(program: Program, rows: Staged) -> Staged:
        return torch.broadcast_to(torch.reshape(rows, (rows.shape[0], *kept)), (rows.shape[0], *shape))

    return push, pull


def _of_one(ways: Callable[[Call], Ways]) -> Callable[[Call], Iterable[Edge]]:
    """An op with one output whose first argument is its only tensor."""

    def edges(call: Call) -> Iterable[Edge]:
        return [complex_edge(call, call.args[0], ways(call))] if call.is_active(call.args[0]) else []

    return edges


def _unbind(call: Call) -> Iterable[Edge]:
    item = call.args[0]
    shape = call.shape(item)
    dim = (call.args[1] if len(call.args) > 1 else 0) % len(shape)
    numbers = range(len(call.outputs)) if call.is_active(item) else ()
    return [complex_edge(call, item, (_taken(dim, number), _placed(shape, dim, number)), number) for number in numbers]


def _stack(call: Call) -> Iterable[Edge] | None:
    shape = call.shape(call.outputs[0])
    if len({call.tensor(item).dtype for item in call.args[0]}) > 1:
        return None
    dim = (call.args[1] if len(call.args) > 1 else 0) % len(shape)
    return [
        complex_edge(call, item, (_placed(shape, dim, number), _taken(dim, number)))
        for number, item in enumerate(call.args[0])
        if call.is_active(item)
    ]


# Products. An operand that is real is one of its own dtype: the cotangent's imaginary part is nothing to it.


def summed_to(rows: Staged, like: torch.Tensor) -> Staged:
    """Rows of cotangents of what a tensor was broadcast to, as those of the tensor."""
    shape = tuple(like.shape)
    lead = rows.dim() - 1 - len(shape)
    gone = [*range(1, lead + 1), *[d + lead + 1 for d, size in enumerate(shape) if size == 1 and rows.shape[d + lead + 1] != 1]]
    found = torch.sum(rows, gone, keepdim=True) if gone else rows
    if lead:
        found = torch.reshape(found, (rows.shape[0], *shape))
    return torch.real(found) if found.is_complex() and not like.is_complex() else found


def conjugated(value: Any) -> Any:
    """The conjugate of a staged value or a number; what is real stays as it is."""
    if isinstance(value, Staged):
        return torch.conj_physical(value) if value.is_complex() else value
    return value.conjugate() if isinstance(value, complex) else value


def aligned(rows: Staged, rank: int) -> Staged:
    """Rows of a tensor of fewer dimensions, broadcast against those of one of ``rank``."""
    shape = tuple(rows.shape)
    return rows if len(shape) > rank else torch.reshape(rows, (shape[0], *[1] * (rank + 1 - len(shape)), *shape[1:]))


def _product(call: Call) -> Iterable[Edge]:
    out = call.tensor(call.outputs[0])
    found = []
    for item, other in (call.args[:2], call.args[1::-1]):
        if not call.is_active(item):
            continue
        like = call.tensor(item)

        def push(program: Program, rows: Staged, other: Any = other) -> Staged:
            value = torch.mul(aligned(rows, out.dim()), call.stage(program, other))
            return value if tuple(value.shape[1:]) == tuple(out.shape) else torch.broadcast_to(value, (rows.shape[0], *out.shape))

        def pull(program: Program, rows: Staged, other: Any = other, like: torch.Tensor = like) -> Staged:
            return summed_to(torch.mul(rows, conjugated(call.stage(program, other))), like)

        found.append(complex_edge(call, item, (push, pull)))
    return found


def _sum(call: Call) -> Iterable[Edge] | None:
    if call.kwargs:
        return None
    out = call.tensor(call.outputs[0])
    found = []
    for number, item in enumerate(call.args[:2]):
        if not call.is_active(item):
            continue
        negative, like = number == 1 and call.op is aten.sub.Tensor, call.tensor(item)

        def push(program: Program, rows: Staged, negative: bool = negative) -> Staged:
            rows = rows if rows.dtype == out.dtype else rows.to(out.dtype)
            value = torch.broadcast_to(aligned(rows, out.dim()), (rows.shape[0], *out.shape))
            return torch.neg(value) if negative else value

        def pull(program: Program, rows: Staged, negative: bool = negative, like: torch.Tensor = like) -> Staged:
            value = summed_to(rows, like)
            return torch.neg(value) if negative else value

        found.append(complex_edge(call, item, (push, pull)))
    return found


def _matrix_product(call: Call) -> Iterable[Edge]:
    """A matrix times a matrix or a vector, or several such products."""
    return _product_edges(call, *call.args[:2])


def _product_edges(call: Call, left: Any, right: Any) -> list[Edge]:
    vector = call.op is aten.mv.default
    found = []
    if call.is_active(left):

        def push_left(program: Program, rows: Staged) -> Staged:
            return torch.matmul(rows, call.stage(program, right))

        def pull_left(program: Program, rows: Staged) -> Staged:
            other = conjugated(call.stage(program, right))
            if vector:
                return torch.mul(torch.unsqueeze(rows, -1), other)
            return torch.matmul(rows, torch.transpose(other, -2, -1))

        found.append(complex_edge(call, left, (push_left, pull_left)))
    if call.is_active(right):

        def push_right(program: Program, rows: Staged) -> Staged:
            other = call.stage(program, left)
            return torch.matmul(rows, torch.t(other)) if vector else torch.matmul(other, rows)

        def pull_right(program: Program, rows: Staged) -> Staged:
            other = conjugated(call.stage(program, left))
            return torch.matmul(rows, other) if vector else torch.matmul(torch.transpose(other, -2, -1), rows)

        found.append(complex_edge(call, right, (push_right, pull_right)))
    return found


def _added_product(call: Call) -> Iterable[Edge] | None:
    """A product of matrices, and an array that is broadcast against it."""
    if call.kwargs or len(call.args) > 3:
        return None
    item, left, right = call.args
    found, shape = _product_edges(call, left, right), call.out_shape
    if call.is_active(item):
        like = call.tensor(item)

        def push(program: Program, rows: Staged) -> Staged:
            return torch.broadcast_to(aligned(rows, len(shape)), (rows.shape[0], *shape))

        found.append(complex_edge(call, item, (push, lambda program, rows: summed_to(rows, like))))
    return found


_RESHAPES = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.squeeze.default, aten.alias.default, aten.clone.default,
)  # fmt: skip

_CONJUGATES = (aten._conj.default, aten.conj_physical.default, aten._conj_physical.default)

#: How complex calls are linearised; None for a call that is left to torch's own formula.
MOVES: dict[Any, Callable[[Call], Iterable[Edge] | None]] = {
    **dict.fromkeys(_RESHAPES, _of_one(_reshape)),
    **dict.fromkeys((aten.t.default, aten.transpose.int, aten.permute.default), _of_one(_permutation)),
    **dict.fromkeys(_CONJUGATES, _of_one(_same(torch.conj_physical))),
    aten.neg.default: _of_one(_same(torch.neg)),
    aten.view_as_real.default: _of_one(lambda call: (_pairs, _numbers)),
    aten.view_as_complex.default: _of_one(lambda call: (_numbers, _pairs)),
    aten.select.int: _of_one(_selection),
    aten.select_backward.default: _of_one(_selection_back),
    aten.unbind.int: _unbind,
    aten.expand.default: _of_one(_expansion),
    aten.sum.dim_IntList: _of_one(_total),
    aten.stack.default: _stack,
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _product),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor), _sum),
    **dict.fromkeys((aten.mm.default, aten.mv.default, aten.bmm.default), _matrix_product),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default), _added_product),
}

__all__ = ["MOVES", "aligned", "complex_edge", "conjugated", "summed_to"]
