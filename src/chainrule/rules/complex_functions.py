"""Functions of complex values: Fourier transforms, and functions of each element.

Maps of complex tensors are R-linear, as :mod:`chainrule.rules.complex_moves` has it. A holomorphic function multiplies tangents
by its derivative, and cotangents by the conjugate of that (torch's manual, "Autograd for Complex Numbers"). A Fourier transform
multiplies by a matrix ``F[k, n] = exp(-2 pi i k n / N)`` in some dimensions, whose adjoint is the transform with the other sign.
The transforms between real arrays and one half of a Hermitian spectrum leave out what the symmetry gives: the adjoint of the
one is the other, with the weight of what stands for two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from chainrule.maps.staging import Program, Staged
from chainrule.rules.base import Call, Edge
from chainrule.rules.complex_moves import aligned, complex_edge, conjugated, summed_to

aten = torch.ops.aten


def _transform(op: Any, *arguments: Any) -> Callable[[Program, Staged], Staged]:
    def act(program: Program, rows: Staged) -> Staged:
        found: Staged = program.call(op, rows, *arguments)
        return found

    return act


def _under_rows(dims: Iterable[int], rank: int) -> list[int]:
    return [d % rank + 1 for d in dims]


def _complex_transform(call: Call) -> Iterable[Edge]:
    item, dims, norm, forward = call.args
    if not call.is_active(item):
        return []
    under = _under_rows(dims, len(call.shape(item)))
    push, pull = (_transform(aten._fft_c2c.default, under, norm, way) for way in (forward, not forward))
    return [complex_edge(call, item, (push, pull))]


def _real_transform(call: Call) -> Iterable[Edge]:
    """Of a real array, the whole spectrum or the half of it that says all."""
    item, dims, norm, onesided = call.args
    if not call.is_active(item):
        return []
    shape = call.shape(item)
    under = _under_rows(dims, len(shape))
    last, size = under[-1], shape[under[-1] - 1]

    def pull(program: Program, rows: Staged) -> Staged:
        if onesided:
            # With zeros for the half that is not given: nothing is symmetric here.
            missing = [0, 0] * (rows.dim() - 1 - last) + [0, size - rows.shape[last]]
            rows = torch.constant_pad_nd(rows, missing) if missing[-1] else rows
        return torch.real(program.call(aten._fft_c2c.default, rows, under, norm, False))

    def pull_hermitian(program: Program, rows: Staged) -> Staged:
        found: Staged = program.call(aten._fft_c2r.default, _weighted(program, rows, last, size, 0.5), under, norm, size)
        return found

    # Elsewhere than on the CPU, transforms to real arrays may read the imaginary parts of what is real by symmetry.
    onto_real = pull_hermitian if onesided and call.tensor(item).is_cpu else pull
    return [complex_edge(call, item, (_transform(aten._fft_r2c.default, under, norm, onesided), onto_real))]


def _transform_to_real(call: Call) -> Iterable[Edge] | None:
    """The real array of half a spectrum."""
    item, dims, norm, size = call.args
    if not call.is_active(item):
        return []
    shape = call.shape(item)
    under = _under_rows(dims, len(shape))
    last = under[-1]
    if shape[last - 1] != size // 2 + 1:
        return None

    def pull(program: Program, rows: Staged) -> Staged:
        return _weighted(program, program.call(aten._fft_r2c.default, rows, under, norm, True), last, size, 2.0)

    return [complex_edge(call, item, (_transform(aten._fft_c2r.default, under, norm, size), pull))]


def _weighted(program: Program, rows: Staged, dim: int, size: int, weight: float) -> Staged:
    """Half spectra of ``size`` numbers, what stands for two of these numbers times a weight."""
    half = rows.shape[dim]
    weights = torch.ones(half, dtype=rows.dtype, device=rows.device)
    weights[1 : (size - 1) // 2 + 1].fill_(weight)  # an assignment of a number makes a tensor of it that no recorder has seen
    found: Staged = torch.mul(rows, program.constant(weights.reshape(half, *[1] * (rows.dim() - 1 - dim))))
    return found


def _real_if(rows: Staged, like: torch.Tensor) -> Staged:
    return torch.real(rows) if rows.is_complex() and not like.is_complex() else rows


def _holomorphic(derivative: Callable[[Staged, Staged], Any]) -> Callable[[Call], Iterable[Edge]]:
    """A function of each element by its derivative, made from its argument and its value."""

    def edges(call: Call) -> Iterable[Edge]:
        item = call.args[0]
        if not call.is_active(item):
            return []

        def push(program: Program, rows: Staged) -> Staged:
            return torch.mul(rows, derivative(call.stage(program, item), call.stage_output(program)))

        def pull(program: Program, rows: Staged) -> Staged:
            return torch.mul(rows, torch.conj_physical(derivative(call.stage(program, item), call.stage_output(program))))

        return [complex_edge(call, item, (push, pull))]

    return edges


def _power(call: Call) -> Iterable[Edge] | None:
    item, exponent = call.args
    if not exponent or not call.is_active(item):
        return None
    like = call.tensor(item)

    def derivative(program: Program) -> Staged:
        value = call.stage(program, item)
        return torch.mul(value if exponent == 2 else torch.pow(value, exponent - 1), exponent)

    def push(program: Program, rows: Staged) -> Staged:
        return torch.mul(rows, derivative(program))

    def pull(program: Program, rows: Staged) -> Staged:
        return _real_if(torch.mul(rows, conjugated(derivative(program))), like)

    return [complex_edge(call, item, (push, pull))]


def _magnitude(call: Call) -> Iterable[Edge] | None:
    item = call.args[0]
    if not call.is_active(item):
        return []

    def push(program: Program, rows: Staged) -> Staged:
        return torch.real(torch.mul(rows, torch.conj_physical(torch.sgn(call.stage(program, item)))))

    def pull(program: Program, rows: Staged) -> Staged:
        return torch.mul(rows, torch.sgn(call.stage(program, item)))

    return [complex_edge(call, item, (push, pull))]


def _direction(call: Call) -> Iterable[Edge]:
    """``z / |z|``: what is across the direction, by the length. The map is its own adjoint."""
    item = call.args[0]
    if not call.is_active(item):
        return []

    def turn(program: Program, rows: Staged) -> Staged:
        direction, length = call.stage_output(program), torch.abs(call.stage(program, item))
        along = torch.mul(torch.real(torch.mul(rows, torch.conj_physical(direction))), direction)
        return torch.where(torch.eq(length, 0), 0.0, torch.div(torch.sub(rows, along), length))

    return [complex_edge(call, item, (turn, turn))]


def _angle(call: Call) -> Iterable[Edge]:
    """The imaginary part of the logarithm; 0 at the origin, as torch has it."""
    item = call.args[0]
    if not call.is_active(item):
        return []

    def rate(program: Program) -> Staged:
        value = call.stage(program, item)
        square = torch.add(torch.square(torch.real(value)), torch.square(torch.imag(value)))
        return torch.where(torch.eq(square, 0), 0.0, torch.div(torch.mul(value, 1j), square))

    def push(program: Program, rows: Staged) -> Staged:
        return torch.real(torch.mul(rows, torch.conj_physical(rate(program))))

    def pull(program: Program, rows: Staged) -> Staged:
        return torch.mul(rows, rate(program))

    return [complex_edge(call, item, (push, pull))]


def _spread(rows: Staged, shape: tuple[int, ...]) -> Staged:
    """Rows of a result, broadcast where the operand was the smaller one."""
    return rows if tuple(rows.shape[1:]) == shape else torch.broadcast_to(rows, (rows.shape[0], *shape))


def _quotient(call: Call) -> Iterable[Edge] | None:
    if call.kwargs:
        return None
    made = call.shape(call.outputs[0])
    over, under = call.args
    found = []
    if call.is_active(over):
        like = call.tensor(over)

        def push(program: Program, rows: Staged) -> Staged:
            return _spread(torch.div(aligned(rows, len(made)), call.stage(program, under)), made)

        def pull(program: Program, rows: Staged) -> Staged:
            return summed_to(torch.div(rows, conjugated(call.stage(program, under))), like)

        found.append(complex_edge(call, over, (push, pull)))
    if call.is_active(under):
        beside = call.tensor(under)

        def rate(program: Program) -> Staged:
            return torch.neg(torch.div(call.stage_output(program), call.stage(program, under)))

        def push_under(program: Program, rows: Staged) -> Staged:
            return _spread(torch.mul(aligned(rows, len(made)), rate(program)), made)

        def pull_under(program: Program, rows: Staged) -> Staged:
            return summed_to(torch.mul(rows, torch.conj_physical(rate(program))), beside)

        found.append(complex_edge(call, under, (push_under, pull_under)))
    return found


def _of_parts(call: Call) -> Iterable[Edge]:
    """A complex tensor from its real and its imaginary part."""
    out = call.tensor(call.outputs[0])
    made = tuple(out.shape)
    found = []
    for item, unit, part in zip(call.args, (1.0, 1j), (torch.real, torch.imag), strict=True):
        if not call.is_active(item):
            continue
        like = call.tensor(item)

        def push(program: Program, rows: Staged, unit: complex = unit) -> Staged:
            rows = _spread(aligned(rows, len(made)), made).to(out.dtype)
            return rows if unit == 1 else torch.mul(rows, unit)

        def pull(program: Program, rows: Staged, part: Any = part, like: torch.Tensor = like) -> Staged:
            return summed_to(part(rows), like)

        found.append(complex_edge(call, item, (push, pull)))
    return found


def _of_length_and_angle(call: Call) -> Iterable[Edge]:
    """``length * exp(i angle)``: also where the length is zero or below, as torch's own formula does not have it."""
    made = call.out_shape
    length, angle = call.args

    def by_length(program: Program) -> Staged:
        turn = call.stage(program, angle)
        return torch.complex(torch.cos(turn), torch.sin(turn))

    def by_angle(program: Program) -> Staged:
        return torch.mul(call.stage_output(program), 1j)

    found = []
    for item, rate in ((length, by_length), (angle, by_angle)):
        if not call.is_active(item):
            continue
        like = call.tensor(item)

        def push(program: Program, rows: Staged, rate: Callable[[Program], Staged] = rate) -> Staged:
            return _spread(torch.mul(aligned(rows, len(made)), rate(program)), made)

        def pull(
            program: Program, rows: Staged, rate: Callable[[Program], Staged] = rate, like: torch.Tensor = like
        ) -> Staged:
            return summed_to(torch.real(torch.mul(rows, torch.conj_physical(rate(program)))), like)

        found.append(complex_edge(call, item, (push, pull)))
    return found


def _converted(call: Call) -> Iterable[Edge]:
    """Another dtype: what is real is a complex number without an imaginary part, and the other way round."""
    item = call.args[0]
    given, made = call.tensor(item).dtype, call.tensor(call.outputs[0]).dtype

    def convert(program: Program, rows: Staged, wanted: torch.dtype) -> Staged:
        rows = rows if wanted.is_complex or not rows.is_complex() else torch.real(rows)
        return rows if rows.dtype == wanted else rows.to(wanted)

    ways = partial(convert, wanted=made), partial(convert, wanted=given)
    return [complex_edge(call, item, ways)] if call.is_active(item) else []


def _square_of(value: Staged) -> Staged:
    return torch.mul(value, value)


#: How complex calls are linearised; None for a call that is left to torch's own formula.
FUNCTIONS: dict[Any, Callable[[Call], Iterable[Edge] | None]] = {
    aten._fft_c2c.default: _complex_transform,
    aten._fft_r2c.default: _real_transform,
    aten._fft_c2r.default: _transform_to_real,
    aten.exp.default: _holomorphic(lambda x, y: y),
    aten.log.default: _holomorphic(lambda x, y: torch.reciprocal(x)),
    aten.sqrt.default: _holomorphic(lambda x, y: torch.reciprocal(torch.mul(y, 2))),
    aten.sin.default: _holomorphic(lambda x, y: torch.cos(x)),
    aten.cos.default: _holomorphic(lambda x, y: torch.neg(torch.sin(x))),
    aten.sinh.default: _holomorphic(lambda x, y: torch.cosh(x)),
    aten.cosh.default: _holomorphic(lambda x, y: torch.sinh(x)),
    aten.tanh.default: _holomorphic(lambda x, y: torch.rsub(_square_of(y), 1)),
    aten.sigmoid.default: _holomorphic(lambda x, y: torch.mul(y, torch.rsub(y, 1))),
    aten.reciprocal.default: _holomorphic(lambda x, y: torch.neg(_square_of(y))),
    aten.pow.Tensor_Scalar: _power,
    aten.abs.default: _magnitude,
    aten.sgn.default: _direction,
    aten.angle.default: _angle,
    aten.div.Tensor: _quotient,
    aten.complex.default: _of_parts,
    aten.polar.default: _of_length_and_angle,
    aten._to_copy.default: _converted,
}

__all__ = ["FUNCTIONS"]
