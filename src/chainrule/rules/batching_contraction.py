"""Batching of matrix products: fold the batch into a free dimension where one side is the same for all samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor

from chainrule.maps.matrix_products import many_small, products_by_columns
from chainrule.rules.batching_base import Batched, BatchStrategy, bind, is_batched, logical_shape, physical, value_of
from chainrule.rules.batching_pointwise import align
from chainrule.rules.equations import einsum_letters, is_plain

aten = torch.ops.aten


def matrix_matrix(first: Any, second: Any, size: int) -> Tensor:
    """(n, k) @ (k, m), at least one batched, as a stored tensor (batch, n, m)."""
    a: Tensor = value_of(first)
    b: Tensor = value_of(second)
    if is_batched(first) and is_batched(second):
        return a.bmm(b)
    if is_batched(first):
        return _rows_product(a, b)
    n, m = a.shape[0], b.shape[2]
    if a.layout is not torch.strided:
        # A sparse matrix multiplies the columns of all samples at once.
        return a.mm(b.transpose(0, 1).reshape(b.shape[1], size * m)).view(n, size, m).transpose(0, 1)
    if m > n >= _FEW_ROWS or b.numel() * n < _SMALL:
        # Laid out by rows, the result has its long dimension last.
        return a.unsqueeze(0).expand(size, *a.shape).bmm(b)
    return _rows_product(b.transpose(1, 2), a.t()).transpose(1, 2)


#: A stack of matrices of fewer rows than this is slow as a stack, even with what it takes to copy it.
_FEW_ROWS = 32
#: Products of fewer multiply-adds than this are bound by the number of calls.
_SMALL = 1 << 16


def _rows_product(stack: Tensor, matrix: Tensor) -> Tensor:
    """(batch, n, k) @ (k, m), one matrix for the whole stack, as (batch, n, m).

    All rows make one product where they stand one after the other in memory. Where they do not, as in a stack of
    transposes, a copy that puts them so costs more than a product per sample does, unless these are thin.
    """
    size, n, k = stack.shape
    m = matrix.shape[1]
    if matrix.layout is not torch.strided:
        return stack.reshape(size * n, k).mm(matrix).view(size, n, m)
    if n >= _FEW_ROWS and not _mergeable(stack):
        return stack.bmm(matrix.unsqueeze(0).expand(size, k, m))
    rows = stack.reshape(size * n, k)
    if m < _FEW_ROWS <= n and stack.numel() * m >= _SMALL:
        # The long dimension goes last: matrix products fill thin rows slowly.
        return matrix.t().mm(rows.t()).view(m, size, n).permute(1, 2, 0)
    return rows.mm(matrix).view(size, n, m)


def _mergeable(stack: Tensor) -> bool:
    """Whether the first two dimensions are one in memory."""
    size, n, _ = stack.shape
    return size == 1 or n == 1 or stack.stride(0) == n * stack.stride(1)


def matrix_vector(first: Any, second: Any, size: int) -> Tensor:
    """(n, k) @ (k,) as a stored tensor (batch, n)."""
    a: Tensor = value_of(first)
    b: Tensor = value_of(second)
    if is_batched(first) and is_batched(second):
        return a.bmm(b.unsqueeze(2)).squeeze(2)
    if is_batched(first):
        _, n, k = a.shape
        return a.reshape(size * n, k).mv(b).view(size, n)
    return b.mm(a.t())


def vector_vector(first: Any, second: Any, size: int) -> Tensor:
    """(k,) · (k,) as a stored tensor (batch,)."""
    a: Tensor = value_of(first)
    b: Tensor = value_of(second)
    if is_batched(first) and is_batched(second):
        return a.unsqueeze(1).bmm(b.unsqueeze(2)).view(size)
    return a.mv(b) if is_batched(first) else b.mv(a)


def batch_matrix(first: Any, second: Any, size: int) -> Tensor:
    """(p, n, k) @ (p, k, m) as a stored tensor (batch, p, n, m)."""
    a: Tensor = value_of(first)
    b: Tensor = value_of(second)
    if is_batched(first) and is_batched(second):
        _, p, n, k = a.shape
        m = b.shape[3]
        if many_small(a, b):
            return products_by_columns(a, b)  # type: ignore[no-any-return]
        return a.reshape(size * p, n, k).bmm(b.reshape(size * p, b.shape[2], m)).view(size, p, n, m)
    if is_batched(first):
        _, p, n, k = a.shape
        folded = a.transpose(0, 1).reshape(p, size * n, k).bmm(b)
        return folded.view(p, size, n, b.shape[2]).transpose(0, 1)
    _, p, k, m = b.shape
    folded = a.bmm(b.permute(1, 2, 0, 3).reshape(p, k, size * m))
    return folded.view(p, a.shape[1], size, m).permute(2, 0, 1, 3)


def mm(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """Mm."""
    _check_ranks(func, args[:2], (2, 2))
    return Batched(matrix_matrix(args[0], args[1], size))


def mv(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """Mv."""
    _check_ranks(func, args[:2], (2, 1))
    return Batched(matrix_vector(args[0], args[1], size))


def dot(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """Dot and vdot."""
    _check_ranks(func, args[:2], (1, 1))
    first, second = args
    if func is aten.vdot.default:
        first = Batched(first.value.conj().resolve_conj()) if is_batched(first) else first.conj().resolve_conj()
    return Batched(vector_vector(first, second, size))


def bmm(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """Bmm."""
    _check_ranks(func, args[:2], (3, 3))
    return Batched(batch_matrix(args[0], args[1], size))


def _check_ranks(func: Any, args: Sequence[Any], ranks: tuple[int, ...]) -> None:
    for position, (arg, rank) in enumerate(zip(args, ranks, strict=True)):
        found = arg.rank if is_batched(arg) else arg.dim()
        if found != rank:
            raise RuntimeError(
                f"{func}: expected argument {position} to be of dimension {rank}, got {found} (in a vmap)"
            )


def add_product(product: Callable[[Any, Any, int], Tensor]) -> BatchStrategy:
    """``beta * self + alpha * product``: addmm, addmv, baddbmm and their like."""

    def add_scaled(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
        bound = bind(func, args, kwargs)
        names = list(bound)
        added, first, second = (bound[name] for name in names[:3])
        beta, alpha = bound["beta"], bound["alpha"]
        if func is aten.addmm.default and not is_batched(added) and not is_batched(second):
            a = first.value
            if added.dim() == 1 or added.shape[0] == 1:
                _, n, k = a.shape
                flat = func(added, a.reshape(size * n, k), second, beta=beta, alpha=alpha)
                return Batched(flat.view(size, n, second.shape[1]))
        if is_batched(first) or is_batched(second):
            result: Any = Batched(product(first, second, size))
        else:
            result = _unbatched_product(func, first, second)
        if alpha != 1:
            result = Batched(result.value * alpha) if is_batched(result) else result * alpha
        if beta == 0:
            return result if is_batched(result) else Batched(physical(result, size))
        if beta != 1:
            added = Batched(added.value * beta) if is_batched(added) else added * beta
        return align(aten.add.Tensor, [added, result], {}, size)

    return add_scaled


def _unbatched_product(func: Any, first: Tensor, second: Tensor) -> Tensor:
    if func is aten.addmm.default:
        return first.mm(second)
    if func is aten.addmv.default:
        return first.mv(second)
    if func is aten.addr.default:
        return first.unsqueeze(1) * second
    if func is aten.addbmm.default:
        return first.bmm(second).sum(0)
    return first.bmm(second)


def _outer(first: Any, second: Any, size: int) -> Tensor:
    a: Tensor = first.value.unsqueeze(2) if is_batched(first) else first.unsqueeze(1)
    b: Tensor = second.value.unsqueeze(1) if is_batched(second) else second
    return a * b


def _sum_batch_matrix(first: Any, second: Any, size: int) -> Tensor:
    return batch_matrix(first, second, size).sum(1)


def addmm_activation(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """_addmm_activation: addmm, then relu or gelu."""
    bound = bind(func, args, kwargs)
    added = CONTRACTIONS[aten.addmm.default](
        aten.addmm.default,
        [bound["self"], bound["mat1"], bound["mat2"]],
        {"beta": bound["beta"], "alpha": bound["alpha"]},
        size,
    )
    return Batched(aten.gelu.default(added.value, approximate="tanh") if bound["use_gelu"] else added.value.relu())


def linear(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """``linear`` that arrives whole: its input is batched, or its weight is a stack of matrices; others are split into parts."""
    item, weight = args[0], args[1]
    bias = args[2] if len(args) > 2 else None
    if not kwargs and is_batched(weight) and weight.rank == 2:
        rank = item.rank if is_batched(item) else item.dim()
        if rank not in (1, 2):
            return NotImplemented
        turned = Batched(weight.value.transpose(1, 2))
        product = matrix_matrix(item, turned, size) if rank == 2 else matrix_vector(weight, item, size)
        return Batched(product) if bias is None else align(aten.add.Tensor, [Batched(product), bias], {}, size)
    if kwargs or not is_batched(item) or is_batched(weight) or is_batched(bias) or weight.dim() != 2:
        return NotImplemented
    return Batched(torch._C._nn.linear(item.value, weight, bias))


def _vector_matrix(first: Any, second: Any, size: int) -> Tensor:
    if not is_batched(second):
        return torch.matmul(first.value, second)
    return matrix_vector(Batched(second.value.transpose(1, 2)), first, size)


_PRODUCTS = {(1, 2): _vector_matrix, (2, 2): matrix_matrix, (2, 1): matrix_vector, (1, 1): vector_vector}


def matmul(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """``matmul`` that arrives whole: of matrices and vectors, or of as many matrices on both sides, else it is split."""
    first, second = args
    for item in args:
        if not is_batched(item) and item.layout is not torch.strided:
            return NotImplemented
    ranks = tuple([item.rank if is_batched(item) else item.dim() for item in args])
    product = _PRODUCTS.get(ranks)
    if product is not None:
        return Batched(product(first, second, size))
    if not (is_batched(first) and is_batched(second)):
        return NotImplemented
    if first.rank != second.rank or first.rank < 3 or first.value.shape[:-2] != second.value.shape[:-2]:
        return NotImplemented
    return Batched(batch_matrix(first, second, size) if first.rank == 3 else torch.matmul(first.value, second.value))


@lru_cache(maxsize=1024)
def _batched_equation(equation: str, batched: tuple[bool, ...]) -> str:
    """The equation of an einsum, with one more letter for the samples; nothing where all letters are taken."""
    letters, output = einsum_letters(equation)
    samples = next((letter for letter in ascii_letters if letter not in equation), "")
    if not samples:
        return ""
    return ",".join([samples + own if has else own for own, has in zip(letters, batched, strict=True)]) + "->" + samples + output


def einsum(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """``einsum`` that arrives whole: the samples are one more dimension. One with traces or broadcasting is split into parts."""
    equation, operands = args[0], args[1]
    if len(args) > 2 or not kwargs.keys() <= {"path"}:
        return NotImplemented
    if not is_plain(equation, tuple([logical_shape(item) for item in operands])):
        return NotImplemented
    batched = tuple([is_batched(item) for item in operands])
    values = [value_of(item) for item in operands]
    if any([value.layout is not torch.strided for value in values]):
        return NotImplemented
    whole = _batched_equation(equation, batched)
    return Batched(func(whole, values, **kwargs)) if whole else NotImplemented


CONTRACTIONS: dict[Any, BatchStrategy] = {
    aten.einsum.default: einsum,
    aten.linear.default: linear,
    aten.matmul.default: matmul,
    aten.mm.default: mm,
    aten.mv.default: mv,
    aten.dot.default: dot,
    aten.vdot.default: dot,
    aten.bmm.default: bmm,
    aten.addmm.default: add_product(matrix_matrix),
    aten.addmv.default: add_product(matrix_vector),
    aten.addr.default: add_product(_outer),
    aten.addbmm.default: add_product(_sum_batch_matrix),
    aten.baddbmm.default: add_product(batch_matrix),
    aten._addmm_activation.default: addmm_activation,
}
