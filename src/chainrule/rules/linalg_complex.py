"""The singular value decomposition of complex matrices, whose vectors are defined up to phases, and their QR decomposition.

Torch's own formula uses that a function of *all* outputs does not depend on the phases. Here each output is differentiated
by itself, so the phases have to be chosen once for all: the derivative of each pair of vectors turns both of them by half of
what the matrix asks for, in opposite directions. Maps of complex matrices are R-linear, in torch's convention: a cotangent's
pullback is the adjoint with respect to the real part of the inner product.

Source: J. Townsend, "Differentiating the singular value decomposition" (2016), with conjugate transposes and a phase.
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

Action = Callable[["_Decomposed", Staged], Staged]


def _adjoint(matrix: Staged) -> Staged:
    return torch.conj(torch.transpose(matrix, -2, -1))


class _Decomposed:
    """``A = U S Vᴴ`` with as many columns as singular values, and the inverse gaps of their squares."""

    def __init__(self, call: Call, program: Program) -> None:
        if call.argument("compute_uv"):
            u, s, vh = (call.stage_output(program, number) for number in range(3))
        else:
            u, s, vh = program.call(aten._linalg_svd.default, call.stage(program, call.args[0]), False, True)
        size = s.shape[-1]
        self.u, self.s, self.vh = u[..., :size], s, vh[..., :size, :]
        eye = torch.eye(size, dtype=s.dtype, device=s.device)
        square = s * s
        difference = square.unsqueeze(-2) - square.unsqueeze(-1)
        gaps = program.constant(1.0 - eye) / (difference + program.constant(eye))
        self.here, self.there = gaps * s.unsqueeze(-1), gaps * s.unsqueeze(-2)

    def projected(self, rows: Staged) -> Staged:
        """``Uᴴ dA V``."""
        return torch.matmul(torch.matmul(_adjoint(self.u), rows), _adjoint(self.vh))

    def turn(self, matrix: Staged) -> Staged:
        """The imaginary diagonal over twice the singular values: half of the phase."""
        angle = torch.imag(torch.diagonal(matrix, 0, -2, -1)) / (self.s * 2.0)
        return torch.diag_embed(torch.complex(torch.zeros_like(angle), angle))

    def beside(self, rows: Staged, left: bool) -> Staged:
        """The part of some columns outside of U's range, or of some rows outside of V's."""
        if left:
            return rows - torch.matmul(self.u, torch.matmul(_adjoint(self.u), rows))
        return rows - torch.matmul(torch.matmul(rows, _adjoint(self.vh)), self.vh)


def _push_u(d: _Decomposed, rows: Staged) -> Staged:
    p = d.projected(rows)
    inside = p * d.there + _adjoint(p) * d.here + d.turn(p)
    outside = d.beside(torch.matmul(rows, _adjoint(d.vh)), True) / d.s.unsqueeze(-2)
    return torch.matmul(d.u, inside) + outside


def _pull_u(d: _Decomposed, rows: Staged) -> Staged:
    m = torch.matmul(_adjoint(d.u), rows)
    inside = m * d.there + _adjoint(m * d.here) + d.turn(m)
    return torch.matmul(torch.matmul(d.u, inside) + d.beside(rows, True) / d.s.unsqueeze(-2), d.vh)


def _push_s(d: _Decomposed, rows: Staged) -> Staged:
    return torch.real(torch.diagonal(d.projected(rows), 0, -2, -1))


def _pull_s(d: _Decomposed, rows: Staged) -> Staged:
    return torch.matmul(d.u * rows.unsqueeze(-2), d.vh)


def _push_vh(d: _Decomposed, rows: Staged) -> Staged:
    p = d.projected(rows)
    inside = p * d.here + _adjoint(p) * d.there - d.turn(p)
    outside = d.beside(torch.matmul(_adjoint(d.u), rows), False) / d.s.unsqueeze(-1)
    return torch.matmul(_adjoint(inside), d.vh) + outside


def _pull_vh(d: _Decomposed, rows: Staged) -> Staged:
    m = _adjoint(torch.matmul(rows, _adjoint(d.vh)))
    inside = m * d.here + _adjoint(m * d.there) - d.turn(m)
    return torch.matmul(d.u, torch.matmul(inside, d.vh) + d.beside(rows, False) / d.s.unsqueeze(-1))


def _singular_values(call: Call) -> Iterable[Edge]:
    """The three outputs; columns of full matrices that belong to no singular value are taken for constants."""
    item = call.args[0]
    shape = call.shape(item)
    rank = len(shape)
    least = min(shape[-2:])
    both: tuple[tuple[Action, Action, int | None], ...] = (
        (_push_u, _pull_u, rank - 1), (_push_s, _pull_s, None), (_push_vh, _pull_vh, rank - 2)
    )  # fmt: skip
    for output, (forward, backward, dim) in enumerate(both):
        if not call.is_active(item) or not call.tensor(call.outputs[output]).numel():
            continue
        full = None if dim is None else call.shape(call.outputs[output])[dim]

        def push(c: Call, program: Program, rows: Staged, count: int, f: Any = forward, d: Any = dim, n: Any = full) -> Staged:
            pushed = f(_Decomposed(c, program), rows)
            if d is None or n == least:
                return pushed
            missing = [0, n - least] if d == rank - 1 else [0, 0, 0, n - least]
            return torch.constant_pad_nd(pushed, missing)

        def pull(c: Call, program: Program, rows: Staged, count: int, b: Any = backward, d: Any = dim) -> Staged:
            return b(_Decomposed(c, program), rows if d is None else torch.narrow(rows, d + 1, 0, least))

        flops = 8 * least * call.tensor(item).numel()
        yield operator_edge(call, item, push, pull, (), flops, output)


class _Orthogonal:
    """``A = Q R`` with real numbers on R's diagonal, and the inverse of R's leading square block."""

    def __init__(self, call: Call, program: Program) -> None:
        self.q, self.r = call.stage_output(program, 0), call.stage_output(program, 1)
        size, columns = self.r.shape[-2:]
        eye = program.constant(torch.eye(size, dtype=self.r.dtype, device=self.r.device))
        leading = self.r[..., :size]
        inverse = aten.linalg_solve_triangular.default(leading, torch.broadcast_to(eye, leading.shape), upper=True)
        self.inverse = torch.constant_pad_nd(inverse, [0, 0, 0, columns - size]) if columns > size else inverse

    def skew(self, m: Staged) -> Staged:
        """The skew-Hermitian matrix with the lower part of ``m`` and the imaginary part of its diagonal."""
        lower = torch.tril(m, -1)
        return lower - _adjoint(lower) + self._diagonal(m)

    def unskew(self, w: Staged) -> Staged:
        """The adjoint of that."""
        return torch.tril(w - _adjoint(w), -1) + self._diagonal(w)

    def _diagonal(self, m: Staged) -> Staged:
        angle = torch.imag(torch.diagonal(m, 0, -2, -1))
        return torch.diag_embed(torch.complex(torch.zeros_like(angle), angle))

    def push(self, rows: Staged, output: int) -> Staged:
        """``dQ = Q Ω + (1 - Q Qᴴ) dA R⁻¹`` and ``dR = Qᴴ dA - Ω R``."""
        projected = torch.matmul(_adjoint(self.q), rows)
        omega = self.skew(torch.matmul(projected, self.inverse))
        if output == 1:
            return torch.triu(projected - torch.matmul(omega, self.r))
        moved = torch.matmul(rows, self.inverse)
        return moved + torch.matmul(self.q, omega - torch.matmul(_adjoint(self.q), moved))

    def pull(self, rows: Staged, output: int) -> Staged:
        """The adjoint."""
        right = _adjoint(self.inverse)
        if output == 1:
            rows = torch.triu(rows)
            inner = self.unskew(torch.matmul(rows, _adjoint(self.r)))
            return torch.matmul(self.q, rows - torch.matmul(inner, right))
        inner = torch.matmul(_adjoint(self.q), rows)
        return torch.matmul(rows + torch.matmul(self.q, self.unskew(inner) - inner), right)


def _qr(call: Call) -> Iterable[Edge] | None:
    """Both factors; None where torch says that there is no derivative."""
    item, mode = call.args[0], call.argument("mode")
    rows, columns = call.shape(item)[-2:]
    if mode == "r" or (mode == "complete" and rows > columns):
        return None

    def push(c: Call, program: Program, rows: Staged, count: int, output: int) -> Staged:
        return _Orthogonal(c, program).push(rows, output)

    def pull(c: Call, program: Program, rows: Staged, count: int, output: int) -> Staged:
        return _Orthogonal(c, program).pull(rows, output)

    flops = 8 * min(rows, columns) * call.tensor(item).numel()
    return [
        operator_edge(call, item, partial(push, output=output), partial(pull, output=output), (), flops, output)
        for output in range(2)
        if call.is_active(item)
    ]


#: How complex calls are linearised whose formula in torch cannot be taken output by output, or writes in place.
COMPLEX: dict[Any, Callable[[Call], Iterable[Edge] | None]] = {
    aten._linalg_svd.default: _singular_values,
    aten.linalg_qr.default: _qr,
}

__all__ = ["COMPLEX"]
