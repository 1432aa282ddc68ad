"""Determinants, eigenvalues, singular values, QR, LU and what is solved with them, for real stacks of matrices.

Sources: M. B. Giles, "Collected matrix derivative results for forward and reverse mode algorithmic differentiation" (2008);
J. Townsend, "Differentiating the singular value decomposition" (2016); G. H. Golub and V. Pereyra, "The differentiation of
pseudo-inverses and nonlinear least squares problems whose variables separate" (1973); N. J. Higham, "Functions of
Matrices" (2008), chapter 10. Complex matrices keep torch's own formula.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from chainrule.maps.staging import Program, Staged
from chainrule.rules.base import Call, Edge, Rule
from chainrule.rules.families import operator_edge
from chainrule.rules.linalg_stacks import Stack, identity_like, padded, transposed
from chainrule.rules.opaque import opaque_edges

aten = torch.ops.aten


def _cofactors(call: Call, program: Program) -> Staged:
    """The derivative of the determinant: a polynomial up to size 3, ``det A · A⁻ᵀ`` above."""
    matrix = call.stage(program, call.args[0])
    size = matrix.shape[-1]
    if size <= 1:
        return torch.ones_like(matrix)
    if size == 2:
        counted = torch.arange(2, dtype=matrix.dtype, device=matrix.device)
        signs = program.constant(1 - 2 * torch.abs(counted - counted.unsqueeze(1)))
        return torch.flip(matrix, (-2, -1)) * signs
    if size == 3:
        return torch.linalg.cross(torch.roll(matrix, -1, -2), torch.roll(matrix, -2, -2), dim=-1)
    determinant = call.stage_output(program).reshape((*matrix.shape[:-2], 1, 1))
    # Singular to the last digit: the inverse has no digits then. (The factors may be those of the transposed matrix.)
    pivots = torch.abs(torch.diagonal(call.stage_output(program, 1), 0, -2, -1))
    least = torch.amax(torch.abs(matrix), (-2, -1)) * (size * torch.finfo(matrix.dtype).eps)
    singular = (torch.amin(pivots, -1) <= least).unsqueeze(-1).unsqueeze(-1)
    regular = torch.where(singular, identity_like(program, matrix, size), matrix)
    inverse = torch.linalg.inv_ex(regular)[0]
    # There, the first derivative is still a number; the square root marks those of higher order as undefined.
    undefined = torch.sqrt(torch.where(singular, determinant - determinant.detach(), 1.0))
    return torch.where(singular, _singular_cofactors(program, matrix.detach()) + undefined, transposed(inverse) * determinant)


def _singular_cofactors(program: Program, matrix: Staged) -> Staged:
    """``det A · A⁻ᵀ`` from one factorisation, in which a pivot that is zero has become a tiny one."""
    size = matrix.shape[-1]
    factors, pivots, _ = torch.linalg.lu_factor_ex(matrix)
    diagonal = torch.diagonal(factors, 0, -2, -1)
    limits = torch.finfo(matrix.dtype)
    tiny = torch.clamp(torch.amax(torch.abs(matrix), (-2, -1)).unsqueeze(-1) * limits.eps, limits.tiny)
    shift = torch.where(diagonal == 0, torch.broadcast_to(tiny, diagonal.shape), 0.0)
    places = program.constant(torch.arange(1, size + 1, dtype=torch.int32, device=matrix.device))
    swaps = torch.sum((pivots != places).to(torch.int64), -1)
    determinant = torch.prod(diagonal + shift, -1) * (1 - 2 * torch.remainder(swaps, 2))
    adjoint = torch.linalg.lu_solve(factors + torch.diag_embed(shift), pivots, identity_like(program, matrix, size))
    return transposed(adjoint) * determinant.unsqueeze(-1).unsqueeze(-1)


def _determinant(call: Call) -> Iterable[Edge]:
    item = call.args[0]
    if call.is_active(item):
        stack, size = Stack(call, item), call.shape(item)[-1]
        cofactors = stack.matrix(size, size, lambda program: _cofactors(call, program), size**3)
        yield stack.edge(item, 0, [stack.term("ij -> . ij", [cofactors])])


def _gaps(program: Program, values: Staged) -> Staged:
    """``1 / (values[k] - values[m])`` at row m and column k, zero on the diagonal."""
    size = values.shape[-1]
    eye = torch.eye(size, dtype=values.dtype, device=values.device)
    difference = values.unsqueeze(-2) - values.unsqueeze(-1)
    return program.constant(1.0 - eye) / (difference + program.constant(eye))


def _symmetric_eigen(call: Call) -> Iterable[Edge]:
    """``dλ = diag(Vᵀ dA V)`` and ``dV = V (F ∘ Vᵀ dA V)`` with ``F`` the inverse gaps, and dA symmetrised (Giles, 3.1)."""
    item = call.args[0]
    if not call.is_active(item):
        return
    stack, size = Stack(call, item), call.shape(item)[-1]
    whole = bool(call.argument("compute_v"))

    def vectors(program: Program) -> Staged:
        if whole:
            return call.stage_output(program, 1)
        return program.call(aten._linalg_eigh.default, call.stage(program, item), call.argument("UPLO"), True)[1]

    v = stack.matrix(size, size, vectors)
    yield stack.edge(item, 0, [stack.term("ak bk -> k ab", [v, v])])
    if whole:
        gaps = stack.matrix(size, size, lambda program: _gaps(program, call.stage_output(program, 0)))
        words = ("im mk am bk -> ik ab", "im mk ak bm -> ik ab")
        yield stack.edge(item, 1, [stack.term(word, [v, gaps, v, v], scale=0.5) for word in words])


def _singular_values(call: Call) -> Iterable[Edge]:
    """Townsend's formulas; of full matrices, the columns that belong to no singular value are taken for constants."""
    item = call.args[0]
    if not call.is_active(item):
        return
    stack = Stack(call, item)
    rows, columns = call.shape(item)[-2:]
    least = min(rows, columns)
    whole = bool(call.argument("compute_uv"))

    def parts(program: Program) -> tuple[Staged, Staged, Staged]:
        if not whole:
            found: tuple[Staged, Staged, Staged] = program.call(
                aten._linalg_svd.default, call.stage(program, item), False, True
            )
            return found
        u, s, vh = (call.stage_output(program, number) for number in range(3))
        return u[..., :least], s, vh[..., :least, :]

    def weights(program: Program, side: int) -> Staged:
        s = parts(program)[1]
        return _gaps(program, s * s) * s.unsqueeze(side)

    u = stack.matrix(rows, least, lambda program: parts(program)[0])
    vh = stack.matrix(least, columns, lambda program: parts(program)[2])
    yield stack.edge(item, 1, [stack.term("ak kb -> k ab", [u, vh])])
    if not whole:
        return
    wide, high = call.shape(call.outputs[0])[-1], call.shape(call.outputs[2])[-2]

    def left(program: Program) -> Staged:
        u, s, _ = parts(program)
        return u / s.unsqueeze(-2)

    def right(program: Program) -> Staged:
        _, s, vh = parts(program)
        return vh / s.unsqueeze(-1)

    def outside(program: Program, side: int) -> Staged:
        u, _, vh = parts(program)
        product = torch.matmul(u, transposed(u)) if side == 0 else torch.matmul(transposed(vh), vh)
        return identity_like(program, product, product.shape[-1]) - product

    def pad(stage: Any, height: int, width: int) -> int:
        return stack.matrix(height, width, lambda program: padded(stage(program), height, width))

    there, here = (pad(lambda program, s=side: weights(program, s), least, wide) for side in (-2, -1))
    u_out, vh_out = pad(lambda p: parts(p)[0], rows, wide), pad(lambda p: parts(p)[2], wide, columns)
    terms = [
        stack.term("im mc am cb -> ic ab", [u, there, u, vh_out]), stack.term("im mc ac mb -> ic ab", [u, here, u_out, vh])
    ]  # fmt: skip
    if rows > least:
        projector = stack.matrix(rows, rows, lambda program: outside(program, 0))
        terms.append(stack.term("ia cb -> ic ab", [projector, pad(right, wide, columns)]))
    yield stack.edge(item, 0, terms)
    there, here = (pad(lambda program, s=side: weights(program, s), least, high) for side in (-2, -1))
    u_out, vh_out = pad(lambda p: parts(p)[0], rows, high), pad(lambda p: parts(p)[2], high, columns)
    terms = [
        stack.term("mj mc am cb -> cj ab", [vh, here, u, vh_out]), stack.term("mj mc ac mb -> cj ab", [vh, there, u_out, vh])
    ]  # fmt: skip
    if columns > least:
        projector = stack.matrix(columns, columns, lambda program: outside(program, 1))
        terms.append(stack.term("bj ac -> cj ab", [projector, pad(left, rows, high)]))
    yield stack.edge(item, 2, terms)


def _triangular_inverse(program: Program, matrix: Staged, upper: bool, unit: bool = False) -> Staged:
    eye = identity_like(program, matrix, matrix.shape[-1])
    return aten.linalg_solve_triangular.default(matrix, eye, upper=upper, unitriangular=unit)


def _qr(call: Call) -> Iterable[Edge]:
    """``dQ = Q Ω + (1 - Q Qᵀ) dA R⁻¹`` and ``dR = Qᵀ dA - Ω R``; ``Ω`` is skew, with the lower part of ``Qᵀ dA R⁻¹``.

    The inverse is that of R's leading square block. Where torch has no derivative, its own formula says so.
    """
    item, mode = call.args[0], call.argument("mode")
    rows, columns = call.shape(item)[-2:]
    least = min(rows, columns)
    if not call.is_active(item):
        return
    if mode == "r" or (mode == "complete" and rows > columns):
        yield from opaque_edges(call)
        return
    stack = Stack(call, item)

    def inverse(program: Program) -> Staged:
        leading = call.stage_output(program, 1)[..., :least]
        return padded(_triangular_inverse(program, leading, True), columns, least)

    def outside(program: Program) -> Staged:
        q = call.stage_output(program, 0)
        return identity_like(program, q, rows) - torch.matmul(q, transposed(q))

    q = stack.matrix(rows, least, lambda program: call.stage_output(program, 0))
    r = stack.matrix(least, columns, lambda program: call.stage_output(program, 1))
    inverted = stack.matrix(columns, least, inverse, least**3)
    lower, upper = stack.lower(least, least), stack.upper(least, columns)
    terms = [
        stack.term("ip pq ap bq -> iq ab", [q, lower, q, inverted]),
        stack.term("ip qp aq bp -> iq ab", [q, lower, q, inverted], scale=-1.0),
    ]
    if rows > least:
        terms.append(stack.term("ia bq -> iq ab", [stack.matrix(rows, rows, outside), inverted]))
    yield stack.edge(item, 0, terms)
    yield stack.edge(item, 1, [
        stack.term("pb ap -> pb ab", [upper, q]),
        stack.term("pr pq ap bq qr -> pr ab", [upper, lower, q, inverted, r], scale=-1.0),
        stack.term("pr qp aq bp qr -> pr ab", [upper, lower, q, inverted, r]),
    ])  # fmt: skip


class _Factored:
    """``A = P L U`` with the inverses of the leading square blocks of L and U."""

    def __init__(self, call: Call, stack: Stack, compact: bool) -> None:
        self.call, self.stack, self.compact = call, stack, compact
        self.rows, self.columns = call.shape(call.args[0])[-2:]
        self.least = min(self.rows, self.columns)

    def parts(self, program: Program) -> tuple[Staged, Staged, Staged]:
        """P, L and U."""
        first, second = self.call.stage_output(program, 0), self.call.stage_output(program, 1)
        found: tuple[Staged, Staged, Staged] = (
            program.call(aten.lu_unpack.default, first, second)
            if self.compact
            else (first, second, self.call.stage_output(program, 2))
        )
        return found

    def left(self, height: int) -> int:
        """``L⁻¹ Pᵀ`` with zeros appended to ``height`` rows."""

        def stage(program: Program) -> Staged:
            p, lower, _ = self.parts(program)
            inverse = _triangular_inverse(program, lower[..., : self.least, :], False, True)
            return padded(torch.matmul(inverse, transposed(p[..., : self.least])), height, self.rows)

        return self.stack.matrix(height, self.rows, stage, self.least**3)

    def right(self, width: int) -> int:
        """``U⁻¹`` with zeros appended to the size of A's columns, and to ``width`` columns."""

        def stage(program: Program) -> Staged:
            inverse = _triangular_inverse(program, self.parts(program)[2][..., : self.least], True)
            return padded(inverse, self.columns, width)

        return self.stack.matrix(self.columns, width, stage, self.least**3)

    def lower_terms(self, width: int) -> list[Any]:
        """``dL = L tril(X, -1)`` with ``X = L⁻¹ Pᵀ dA U⁻¹``, or ``Pᵀ dA U⁻¹ - L triu(X)`` for a tall A."""
        stack, least = self.stack, self.least
        lower = stack.matrix(self.rows, least, lambda program: self.parts(program)[1])
        left, right = self.left(least), self.right(width)
        if self.rows == least:
            return [stack.term("ip pq pa bq -> iq ab", [lower, stack.lower(least, width), left, right])]
        permutation = stack.matrix(self.rows, self.rows, lambda program: transposed(self.parts(program)[0]))
        mask = stack.lower(self.rows, width)
        return [
            stack.term("iq ia bq -> iq ab", [mask, permutation, right]),
            stack.term("iq ip pq pa bq -> iq ab", [mask, lower, stack.upper(least, width), left, right], scale=-1.0),
        ]

    def upper_terms(self, height: int) -> list[Any]:
        """``dU = triu(X) U``, or ``L⁻¹ Pᵀ dA - tril(X, -1) U`` for a wide A."""
        stack, least = self.stack, self.least
        upper = stack.matrix(least, self.columns, lambda program: self.parts(program)[2])
        left, right = self.left(height), self.right(least)
        if self.columns == least:
            return [stack.term("pq pa bq qj -> pj ab", [stack.upper(height, least), left, right, upper])]
        mask = stack.upper(height, self.columns)
        return [
            stack.term("pb pa -> pb ab", [mask, left]),
            stack.term("pj pq pa bq qj -> pj ab", [mask, stack.lower(height, least), left, right, upper], scale=-1.0),
        ]


def _lu(call: Call) -> Iterable[Edge]:
    item = call.args[0]
    if call.is_active(item):
        factored = _Factored(call, Stack(call, item), False)
        yield factored.stack.edge(item, 1, factored.lower_terms(factored.least))
        yield factored.stack.edge(item, 2, factored.upper_terms(factored.least))


def _lu_factor(call: Call) -> Iterable[Edge]:
    """Both factors in one matrix."""
    item = call.args[0]
    if call.is_active(item):
        factored = _Factored(call, Stack(call, item), True)
        terms = [*factored.lower_terms(factored.columns), *factored.upper_terms(factored.rows)]
        yield factored.stack.edge(item, 0, terms)


def _lu_unpack(call: Call) -> Iterable[Edge]:
    """Two triangles of one matrix."""
    item = call.args[0]
    if not call.is_active(item) or not call.argument("unpack_data"):
        return
    stack = Stack(call, item)
    rows, columns = call.shape(item)[-2:]
    least = min(rows, columns)
    lower, upper = stack.lower(rows, least), stack.upper(least, columns)
    one, other = stack.selection(least, columns), stack.selection(least, rows)
    square_l, square_u = columns == least, rows == least
    yield stack.edge(item, 1, [
        stack.term("iq -> iq iq", [lower]) if square_l else stack.term("iq qb -> iq ib", [lower, one])
    ])  # fmt: skip
    yield stack.edge(item, 2, [
        stack.term("pj -> pj pj", [upper]) if square_u else stack.term("pj pa -> pj aj", [upper, other])
    ])  # fmt: skip


def _lu_solve(call: Call) -> Iterable[Edge]:
    """``M Y = B`` with ``M = P L U`` or its transpose, ``Y`` the solution or its transpose: ``dY = M⁻¹ (dB - dM Y)``."""
    factors, right = call.args[0], call.args[2]
    left, adjoint = bool(call.argument("left")), bool(call.argument("adjoint"))
    flipped = adjoint == left
    if call.shape(factors)[:-2] != call.shape(right)[:-2]:
        yield from opaque_edges(call)
        return
    stack, size = Stack(call, factors), call.shape(factors)[-1]
    free = call.out_shape[-1 if left else -2]
    result = "if" if left else "fi"

    def staged(program: Program) -> tuple[Staged, Staged, Staged, Staged, Staged]:
        given, pivots = call.stage(program, factors), call.stage(program, call.args[1])
        eye = identity_like(program, given, size)
        inverse = aten.linalg_lu_solve.default(given, pivots, eye, left=True, adjoint=flipped)
        solution = call.stage_output(program)
        p, lower, upper = program.call(aten.lu_unpack.default, given, pivots)
        return inverse, p, lower, upper, solution if left else transposed(solution)

    if call.is_active(right):
        inverted = stack.matrix(size, size, lambda program: staged(program)[0], size**3)
        equation = "ij -> if jf" if left else "ij -> fi fj"
        yield stack.edge(right, 0, [stack.term(equation, [inverted], {"f": free})])
    if not call.is_active(factors):
        return

    def before(program: Program, lower_part: bool) -> Staged:
        inverse, p, lower, upper, _ = staged(program)
        if flipped:
            return torch.matmul(inverse, transposed(upper)) if lower_part else inverse
        return torch.matmul(inverse, p if lower_part else torch.matmul(p, lower))

    def after(program: Program, lower_part: bool) -> Staged:
        _, p, lower, upper, y = staged(program)
        if not flipped:
            return torch.matmul(upper, y) if lower_part else y
        moved = torch.matmul(transposed(p), y)
        return moved if lower_part else torch.matmul(transposed(lower), moved)

    terms = []
    for lower_part, mask in ((True, stack.lower(size, size)), (False, stack.upper(size, size))):
        one = stack.matrix(size, size, lambda program, part=lower_part: before(program, part), size**3)
        two = stack.matrix(size, free, lambda program, part=lower_part: after(program, part))
        words = "ib ab af" if flipped else "ia ab bf"
        terms.append(stack.term(f"{words} -> {result} ab", [one, mask, two], scale=-1.0))
    yield stack.edge(factors, 0, terms)


def _cholesky_solved(call: Call, factor: Any, right: Any) -> Iterable[Edge]:
    """``dX = A⁻¹ (dB - (dL Lᵀ + L dLᵀ) X)`` for ``A = L Lᵀ``; the identity stands for B where there is none."""
    if right is not None and call.shape(factor)[:-2] != call.shape(right)[:-2]:
        yield from opaque_edges(call)
        return
    upper = bool(call.argument("upper"))
    stack, size = Stack(call, factor), call.shape(factor)[-1]
    free = call.out_shape[-1]

    def inverse(program: Program) -> Staged:
        if right is None:
            return call.stage_output(program)
        given = call.stage(program, factor)
        return torch.cholesky_solve(identity_like(program, given, size), given, upper)

    def times(program: Program, value: Staged) -> Staged:
        """``Lᵀ X``, or the same for the upper factor."""
        given = call.stage(program, factor)
        return torch.matmul(given if upper else transposed(given), value)

    inverted = stack.matrix(size, size, inverse, size**3)
    if call.is_active(right):
        yield stack.edge(right, 0, [stack.term("ij -> if jf", [inverted], {"f": free})])
    if call.is_active(factor):
        solution = stack.matrix(size, free, lambda program: call.stage_output(program))
        short = stack.matrix(size, free, lambda program: times(program, call.stage_output(program)))
        half = stack.matrix(size, size, lambda program: transposed(times(program, inverse(program))))
        plain, mixed = ("ib af", "ia bf") if upper else ("ia bf", "ib af")
        yield stack.edge(factor, 0, [
            stack.term(f"{plain} -> if ab", [inverted, short], scale=-1.0),
            stack.term(f"{mixed} -> if ab", [half, solution], scale=-1.0),
        ])  # fmt: skip


def _cholesky_solve(call: Call) -> Iterable[Edge]:
    yield from _cholesky_solved(call, call.args[1], call.args[0])


def _cholesky_inverse(call: Call) -> Iterable[Edge]:
    yield from _cholesky_solved(call, call.args[0], None)


def _complement(program: Program, one: Staged, two: Staged) -> Staged:
    product = torch.matmul(one, two)
    return identity_like(program, product, product.shape[-1]) - product


def _pseudo_inverse(call: Call) -> Iterable[Edge]:
    """``dP = -P dA P + P Pᵀ dAᵀ (1 - A P) + (1 - P A) dAᵀ Pᵀ P`` at constant rank (Golub and Pereyra)."""
    item = call.args[0]
    if not call.is_active(item):
        return
    stack = Stack(call, item)
    rows, columns = call.shape(item)[-2:]

    def both(program: Program) -> tuple[Staged, Staged]:
        return call.stage(program, item), call.stage_output(program)

    def product(program: Program, first: bool) -> Staged:
        p = call.stage_output(program)
        return torch.matmul(p, transposed(p)) if first else torch.matmul(transposed(p), p)

    p = stack.matrix(columns, rows, lambda program: call.stage_output(program))
    outer = stack.matrix(columns, columns, lambda program: product(program, True))
    inner = stack.matrix(rows, rows, lambda program: product(program, False))
    range_ = stack.matrix(rows, rows, lambda program: _complement(program, *both(program)))
    kernel = stack.matrix(columns, columns, lambda program: _complement(program, *both(program)[::-1]))
    yield stack.edge(item, 0, [
        stack.term("ia bj -> ij ab", [p, p], scale=-1.0),
        stack.term("ib aj -> ij ab", [outer, range_]),
        stack.term("ib aj -> ij ab", [kernel, inner]),
    ])  # fmt: skip


def _least_squares(call: Call) -> Iterable[Edge]:
    """``X = P B`` with the pseudo-inverse's derivative, and the squared residuals, whose derivative X does not enter."""
    matrix, right = call.args[0], call.args[1]
    shape, right_shape = call.shape(matrix), call.shape(right)
    vector = right_shape == shape[:-1]
    if not vector and right_shape[:-2] != shape[:-2]:
        yield from opaque_edges(call)
        return
    stack, (rows, columns) = Stack(call, matrix), shape[-2:]
    free = 1 if vector else right_shape[-1]
    f = "." if vector else "f"

    def staged(program: Program) -> tuple[Staged, Staged, Staged, Staged]:
        """A, its pseudo-inverse, the solution and the residual ``B - A X``."""
        a, b, x = call.stage(program, matrix), call.stage(program, right), call.stage_output(program)
        if vector:
            b, x = b.unsqueeze(-1), x.unsqueeze(-1)
        return a, torch.linalg.pinv(a), x, b - torch.matmul(a, x)

    def projected(program: Program) -> Staged:
        _, p, x, _ = staged(program)
        return torch.matmul(transposed(p), x)

    p = stack.matrix(columns, rows, lambda program: staged(program)[1], rows * columns * columns)
    solution = stack.matrix(columns, free, lambda program: staged(program)[2])
    residual = stack.matrix(rows, free, lambda program: staged(program)[3])
    squares = call.tensor(call.outputs[1]).numel() > 0
    if call.is_active(right):
        yield stack.edge(right, 0, [stack.term(f"ij -> i{f} j{f}", [p], {"f": free})])
        if squares:
            yield stack.edge(right, 1, [stack.term(f"af -> f a{f}", [residual], scale=2.0)])
    if call.is_active(matrix):
        outer = stack.matrix(columns, columns, lambda g: torch.matmul(staged(g)[1], transposed(staged(g)[1])))
        kernel = stack.matrix(columns, columns, lambda g: _complement(g, staged(g)[1], staged(g)[0]))
        yield stack.edge(matrix, 0, [
            stack.term(f"ia bf -> i{f} ab", [p, solution], scale=-1.0),
            stack.term(f"ib af -> i{f} ab", [outer, residual]),
            stack.term(f"ib af -> i{f} ab", [kernel, stack.matrix(rows, free, projected)]),
        ])  # fmt: skip
        if squares:
            yield stack.edge(matrix, 1, [stack.term("af bf -> f ab", [residual, solution], scale=-2.0)])


def _matrix_exponential(call: Call) -> Iterable[Edge]:
    """The Fréchet derivative is the corner block of ``exp [[A, E], [0, A]]`` (Higham, 10.6); its adjoint is that of ``Aᵀ``."""
    item = call.args[0]
    if not call.is_active(item):
        return
    shape = call.shape(item)
    size = shape[-1]

    def act(program: Program, rows: Staged, adjoint: bool) -> Staged:
        matrix = call.stage(program, item)
        matrix = torch.broadcast_to(transposed(matrix) if adjoint else matrix, rows.shape)
        top = torch.cat([matrix, rows], -1)
        bottom = torch.cat([torch.zeros_like(matrix), matrix], -1)
        return torch.linalg.matrix_exp(torch.cat([top, bottom], -2))[..., :size, size:]

    def push(c: Call, program: Program, rows: Staged, count: int) -> Staged:
        return act(program, rows, False)

    def pull(c: Call, program: Program, rows: Staged, count: int) -> Staged:
        return act(program, rows, True)

    diagonal = tuple((d, d) for d in range(len(shape) - 2))
    yield operator_edge(call, item, push, pull, diagonal, 100 * size * call.tensor(item).numel())


_FAMILY = "linear algebra"

RULES: dict[Any, Rule] = {
    aten._linalg_det.default: Rule(_FAMILY, _determinant),
    aten._linalg_eigh.default: Rule(_FAMILY, _symmetric_eigen),
    aten._linalg_svd.default: Rule(_FAMILY, _singular_values),
    aten.linalg_qr.default: Rule(_FAMILY, _qr),
    aten.linalg_lu.default: Rule(_FAMILY, _lu),
    aten.linalg_lu_factor_ex.default: Rule(_FAMILY, _lu_factor),
    aten.lu_unpack.default: Rule(_FAMILY, _lu_unpack),
    aten.linalg_lu_solve.default: Rule(_FAMILY, _lu_solve),
    aten.cholesky_solve.default: Rule(_FAMILY, _cholesky_solve),
    aten.cholesky_inverse.default: Rule(_FAMILY, _cholesky_inverse),
    aten.linalg_pinv.atol_rtol_tensor: Rule(_FAMILY, _pseudo_inverse),
    aten.linalg_lstsq.default: Rule(_FAMILY, _least_squares),
    aten.linalg_matrix_exp.default: Rule(_FAMILY, _matrix_exponential),
}

__all__ = ["RULES"]
