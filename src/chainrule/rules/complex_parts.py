"""Complex values of which parts are taken, placed, joined, chosen or summed: what surrounds Fourier transforms.

All of it is linear with real coefficients, so that a pullback is the transpose: what is taken goes back to its place, what is
repeated is summed. The convention is that of :mod:`chainrule.rules.complex_moves`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from chainrule.maps.staging import Program, Staged
from chainrule.rules.base import Call, Edge
from chainrule.rules.complex_moves import Action, Ways, aligned, complex_edge, summed_to

aten = torch.ops.aten

Edges = Iterable[Edge] | None


def _sliced(shape: Sequence[int], dim: int, start: int | None, end: int | None, step: int) -> Ways:
    """A slice, and what puts one back among zeros."""
    place = (dim + 1, *slice(start, end, step).indices(shape[dim]))

    def take(program: Program, rows: Staged) -> Staged:
        found: Staged = program.call(aten.slice.Tensor, rows, *place)
        return found

    def put(program: Program, rows: Staged) -> Staged:
        found: Staged = program.call(aten.slice_backward.default, rows, [rows.shape[0], *shape], *place)
        return found

    return take, put


def _given(call: Call, *names: str) -> tuple[Any, ...]:
    return tuple([call.argument(name) for name in names])


def _one(call: Call, ways: Ways | None) -> Edges:
    """The edge of the first argument; None without ways."""
    if ways is None:
        return None
    return [complex_edge(call, call.args[0], ways)] if call.is_active(call.args[0]) else []


def _slice(call: Call) -> Edges:
    shape = call.shape(call.args[0])
    dim, start, end, step = _given(call, "dim", "start", "end", "step")
    return _one(call, _sliced(shape, dim % len(shape), start, end, step))


def _slice_back(call: Call) -> Edges:
    shape = tuple(call.args[1])
    dim, start, end, step = _given(call, "dim", "start", "end", "step")
    return _one(call, _sliced(shape, dim % len(shape), start, end, step)[::-1])


def _split(call: Call) -> Edges:
    item = call.args[0]
    if not call.is_active(item):
        return []
    shape, start, found = call.shape(item), 0, []
    dim = call.argument("dim") % len(shape)
    for number, slot in enumerate(call.outputs):
        end = start + call.shape(slot)[dim]
        found.append(complex_edge(call, item, _sliced(shape, dim, start, end, 1), number))
        start = end
    return found


def _joined(call: Call) -> Edges:
    made, items = call.tensor(call.outputs[0]), call.args[0]
    tensors = [call.tensor(item) for item in items]
    if any([tensor.dtype != made.dtype or tensor.dim() != made.dim() for tensor in tensors]):
        return None
    dim, start, found = call.argument("dim") % made.dim(), 0, []
    for item, tensor in zip(items, tensors, strict=True):
        end = start + tensor.shape[dim]
        if call.is_active(item):
            found.append(complex_edge(call, item, _sliced(tuple(made.shape), dim, start, end, 1)[::-1]))
        start = end
    return found


def _op(op: Any, *arguments: Any) -> Action:
    def act(program: Program, rows: Staged) -> Staged:
        found: Staged = program.call(op, rows, *arguments)
        return found

    return act


def _pad(call: Call) -> Edges:
    pads = list(call.args[1])
    return _one(call, (_op(aten.constant_pad_nd.default, pads), _op(aten.constant_pad_nd.default, [-pad for pad in pads])))


def _flip(call: Call) -> Edges:
    rank = len(call.shape(call.args[0]))
    act = _op(aten.flip.default, [d % rank + 1 for d in call.args[1]] if rank else [])
    return _one(call, (act, act))


def _roll(call: Call) -> Edges:
    shifts, dims = _given(call, "shifts", "dims")
    if not dims:
        return None
    rank = len(call.shape(call.args[0]))
    places = [d % rank + 1 for d in dims]
    return _one(call, (_op(aten.roll.default, list(shifts), places), _op(aten.roll.default, [-s for s in shifts], places)))


def _triangle(call: Call) -> Edges:
    act = _op(call.op, call.argument("diagonal"))
    return _one(call, (act, act))


def _diagonals(shape: Sequence[int], offset: int, one: int, two: int) -> Ways:
    place = (offset, one % len(shape) + 1, two % len(shape) + 1)

    def put(program: Program, rows: Staged) -> Staged:
        found: Staged = program.call(aten.diagonal_backward.default, rows, [rows.shape[0], *shape], *place)
        return found

    return _op(aten.diagonal.default, *place), put


def _diagonal(call: Call) -> Edges:
    return _one(call, _diagonals(call.shape(call.args[0]), *_given(call, "offset", "dim1", "dim2")))


def _diagonal_back(call: Call) -> Edges:
    return _one(call, _diagonals(tuple(call.args[1]), *_given(call, "offset", "dim1", "dim2"))[::-1])


def _windows(shape: Sequence[int], dim: int, size: int, step: int) -> Ways | None:
    if not shape:
        return None
    place = (dim % len(shape) + 1, size, step)

    def put(program: Program, rows: Staged) -> Staged:
        found: Staged = program.call(aten.unfold_backward.default, rows, [rows.shape[0], *shape], *place)
        return found

    return _op(aten.unfold.default, *place), put


def _unfold(call: Call) -> Edges:
    return _one(call, _windows(call.shape(call.args[0]), *call.args[1:4]))


def _unfold_back(call: Call) -> Edges:
    ways = _windows(tuple(call.args[1]), *call.args[2:5])
    return None if ways is None else _one(call, ways[::-1])


def _repeat(call: Call) -> Edges:
    shape, times = call.shape(call.args[0]), list(call.args[1])
    sizes = [1] * (len(times) - len(shape)) + list(shape)
    apart = [size for pair in zip(times, sizes, strict=True) for size in pair]

    def push(program: Program, rows: Staged) -> Staged:
        return torch.reshape(rows, (rows.shape[0], *sizes)).repeat(1, *times)

    def pull(program: Program, rows: Staged) -> Staged:
        split = torch.reshape(rows, (rows.shape[0], *apart))
        total = torch.sum(split, list(range(1, 2 * len(times) + 1, 2))) if times else split
        return torch.reshape(total, (rows.shape[0], *shape))

    return _one(call, (push, pull))


def _total(call: Call) -> Edges:
    """Sums and means."""
    if call.kwargs:
        return None
    shape, made = call.shape(call.args[0]), call.shape(call.outputs[0])
    dims = sorted({d % len(shape) for d in call.argument("dim") or range(len(shape))}) if shape else []
    kept = tuple([1 if d in dims else size for d, size in enumerate(shape)])
    count = math.prod([shape[d] for d in dims])
    is_mean = call.op in (aten.mean.default, aten.mean.dim)
    if is_mean and not count:
        return None

    def scaled(rows: Staged) -> Staged:
        return torch.mul(rows, 1 / count) if is_mean and count > 1 else rows

    def push(program: Program, rows: Staged) -> Staged:
        total = torch.sum(rows, [d + 1 for d in dims]) if dims else rows
        return torch.reshape(scaled(total), (rows.shape[0], *made))

    def pull(program: Program, rows: Staged) -> Staged:
        return torch.broadcast_to(torch.reshape(scaled(rows), (rows.shape[0], *kept)), (rows.shape[0], *shape))

    return _one(call, (push, pull))


def _places(call: Call) -> Callable[[Program], list[Any]] | None:
    """Arrays of places, or masks, with the rows before them; None where they do not stand side by side."""
    places = call.args[1]
    here = [number for number, place in enumerate(places) if place is not None]
    if not here or here[-1] - here[0] + 1 != len(here) or any([call.is_active(places[number]) for number in here]):
        return None
    return lambda program: [None, *[place if place is None else call.stage(program, place) for place in places]]


def _placed(program: Program, rows: Staged, shape: Sequence[int], places: list[Any], adds: bool) -> Staged:
    zeros = program.call(aten.new_zeros.default, rows, [rows.shape[0], *shape])
    found: Staged = program.call(aten.index_put.default, zeros, places, rows, adds)
    return found


def _at(program: Program, rows: Staged, places: list[Any]) -> Staged:
    found: Staged = program.call(aten.index.Tensor, rows, places)
    return found


def _chosen(call: Call) -> Edges:
    """Elements chosen by arrays of places, or by masks."""
    places, shape = _places(call), call.shape(call.args[0])
    if places is None:
        return None
    return _one(call, (
        lambda program, rows: _at(program, rows, places(program)),
        lambda program, rows: _placed(program, rows, shape, places(program), True),
    ))  # fmt: skip


def _put(call: Call) -> Edges:
    """Elements at such places replaced, or added to."""
    base, arrays, source = call.args[:3]
    places, adds = _places(call), call.argument("accumulate")
    made, like = call.tensor(call.outputs[0]), call.tensor(source)
    if places is None or call.tensor(base).dtype != made.dtype or like.dtype != made.dtype:
        return None
    tensors = [call.tensor(array) for array in arrays if array is not None]
    masks = [tensor.dim() if tensor.dtype in (torch.bool, torch.uint8) else 0 for tensor in tensors]
    wide = max([1 if mask else tensor.dim() for mask, tensor in zip(masks, tensors, strict=True)])
    rank = made.dim() - sum([mask or 1 for mask in masks]) + wide
    found = []

    def cleared(program: Program, rows: Staged) -> Staged:
        if adds:
            return rows
        zero = torch.zeros((), dtype=made.dtype, device=made.device)
        kept: Staged = program.call(aten.index_put.default, rows, places(program), program.constant(zero), False)
        return kept

    if call.is_active(base):
        found.append(complex_edge(call, base, (cleared, cleared)))
    if call.is_active(source):
        found.append(complex_edge(call, source, (
            lambda program, rows: _placed(program, aligned(rows, rank), made.shape, places(program), adds),
            lambda program, rows: summed_to(_at(program, rows, places(program)), like),
        )))  # fmt: skip
    return found


def _written(ways: Callable[[Call], Ways]) -> Callable[[Call], Edges]:
    """A tensor a part of which is replaced: what is below that part goes."""

    def edges(call: Call) -> Edges:
        base, source = call.args[:2]
        made = call.tensor(call.outputs[0])
        if call.tensor(base).dtype != made.dtype or call.tensor(source).dtype != made.dtype:
            return None
        take, put = ways(call)
        shape, rest, dim = call.shape(source), list(call.args[3:]), call.argument("dim") % made.dim()
        found = []

        def cleared(program: Program, rows: Staged) -> Staged:
            zeros = program.call(aten.new_zeros.default, rows, [rows.shape[0], *shape])
            cut: Staged = program.call(call.op, rows, zeros, dim + 1, *rest)
            return cut

        if call.is_active(base):
            found.append(complex_edge(call, base, (cleared, cleared)))
        if call.is_active(source):
            found.append(complex_edge(call, source, (put, take)))
        return found

    return edges


def _in_slice(call: Call) -> Ways:
    shape = call.out_shape
    dim, start, end, step = _given(call, "dim", "start", "end", "step")
    return _sliced(shape, dim % len(shape), start, end, step)


def _in_row(call: Call) -> Ways:
    shape = call.out_shape
    dim, index = _given(call, "dim", "index")
    place = (dim % len(shape) + 1, index)

    def put(program: Program, rows: Staged) -> Staged:
        found: Staged = program.call(aten.select_backward.default, rows, [rows.shape[0], *shape], *place)
        return found

    return _op(aten.select.int, *place), put


def _copied(call: Call) -> Edges:
    """All of a tensor replaced; nothing of the old values stays."""
    source, made = call.args[1], call.tensor(call.outputs[0])
    if not call.is_active(source):
        return []
    like = call.tensor(source)
    if like.is_complex() and not made.is_complex():
        return None

    def push(program: Program, rows: Staged) -> Staged:
        rows = rows if rows.dtype == made.dtype else rows.to(made.dtype)
        return torch.broadcast_to(aligned(rows, made.dim()), (rows.shape[0], *made.shape))

    return [complex_edge(call, source, (push, lambda program, rows: summed_to(rows, like)))]


def _selected(call: Call, choices: Sequence[tuple[Any, Any, bool]]) -> Edges:
    """Values where a mask is true, or where it is false: ``(value, mask, wanted)`` each."""
    made, found = call.tensor(call.outputs[0]), []
    for item, mask, wanted in choices:
        if not call.is_active(item):
            continue
        like = call.tensor(item)

        def held(program: Program, rows: Staged, mask: Any = mask, wanted: bool = wanted) -> Staged:
            chosen = call.stage(program, mask)
            return torch.where(chosen, rows, 0.0) if wanted else torch.where(chosen, 0.0, rows)

        def push(program: Program, rows: Staged, held: Any = held) -> Staged:
            rows = aligned(rows if rows.dtype == made.dtype else rows.to(made.dtype), made.dim())
            value: Staged = held(program, rows)
            return torch.broadcast_to(value, (rows.shape[0], *made.shape))

        def pull(program: Program, rows: Staged, held: Any = held, like: torch.Tensor = like) -> Staged:
            return summed_to(held(program, rows), like)

        found.append(complex_edge(call, item, (push, pull)))
    return found


def _where(call: Call) -> Edges:
    mask, one, other = call.args
    return _selected(call, [(one, mask, True), (other, mask, False)])


def _masked(call: Call) -> Edges:
    return _selected(call, [(call.args[0], call.args[1], False)])


def _from_number(call: Call) -> Edges:
    """A number minus a tensor."""
    if len(call.args) > 2 or call.kwargs:
        return None
    item, made = call.args[0], call.tensor(call.outputs[0])
    like = call.tensor(item)

    def push(program: Program, rows: Staged) -> Staged:
        return torch.neg(rows if rows.dtype == made.dtype else rows.to(made.dtype))

    return _one(call, (push, lambda program, rows: torch.neg(summed_to(rows, like))))


def component_edges(call: Call, inputs: Sequence[int]) -> Edges:
    """The real or the imaginary part of a complex tensor at once, which torch reads by way of both; None for other calls.

    Args:
        call: any call.
        inputs: slots that the way must not pass by.
    """
    if call.op is not aten.select.int or not call.is_slot(call.args[0]):
        return None
    pairs = call.producer(call.args[0])
    if pairs is None or pairs.op is not aten.view_as_real.default or call.args[0].index in inputs:
        return None
    item, rank, index = pairs.args[0], len(call.shape(call.args[0])), call.args[2] % 2
    if not call.is_active(item) or call.args[1] % rank != rank - 1:
        return None
    made = call.tensor(call.outputs[0])

    def push(program: Program, rows: Staged) -> Staged:
        return torch.imag(rows) if index else torch.real(rows)

    def pull(program: Program, rows: Staged) -> Staged:
        zero = program.constant(torch.zeros((), dtype=made.dtype, device=made.device))
        return torch.complex(zero, rows) if index else torch.complex(rows, zero)

    return [complex_edge(call, item, (push, pull))]


def _nothing(call: Call) -> Edges:
    """What is written over everything depends on nothing that was there."""
    return []


#: How complex calls are linearised; None for a call that is left to torch's own formula.
PARTS: dict[Any, Callable[[Call], Edges]] = {
    aten.slice.Tensor: _slice,
    aten.slice_backward.default: _slice_back,
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default), _split),
    aten.cat.default: _joined,
    aten.constant_pad_nd.default: _pad,
    aten.flip.default: _flip,
    aten.roll.default: _roll,
    **dict.fromkeys((aten.tril.default, aten.triu.default), _triangle),
    aten.diagonal.default: _diagonal,
    aten.diagonal_backward.default: _diagonal_back,
    aten.unfold.default: _unfold,
    aten.unfold_backward.default: _unfold_back,
    aten.repeat.default: _repeat,
    **dict.fromkeys((aten.sum.default, aten.mean.default, aten.mean.dim), _total),
    aten.index.Tensor: _chosen,
    aten.index_put.default: _put,
    aten.slice_scatter.default: _written(_in_slice),
    aten.select_scatter.default: _written(_in_row),
    aten.copy.default: _copied,
    aten.where.self: _where,
    aten.masked_fill.Scalar: _masked,
    aten.rsub.Scalar: _from_number,
    **dict.fromkeys((aten.zero.default, aten.fill.Scalar), _nothing),
}

__all__ = ["PARTS", "component_edges"]
