"""Jacobians and Hessians by torch.func, in chunks where the whole would not fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.workload import Expression

tf = torch.func
Tensor = torch.Tensor


def jacfwd(function: Expression, argnum: int = 0, chunk: int | None = None) -> Expression:
    """``torch.func.jacfwd``, which knows no chunks, with them."""
    if chunk is None:
        return tf.jacfwd(function, argnums=argnum)

    def jacobian(*args: Tensor) -> Tensor:
        x = args[argnum]

        def push(unit: Tensor) -> Tensor:
            return tf.jvp(lambda x: function(*args[:argnum], x, *args[argnum + 1 :]), (x,), (unit.view_as(x),))[1]

        columns = tf.vmap(push, out_dims=-1, chunk_size=chunk)(torch.eye(x.numel(), dtype=x.dtype, device=x.device))
        return columns.unflatten(-1, x.shape)

    return jacobian


def jacobians(function: Expression, argnum: int = 0, chunks: Sequence[int | None] = (None,)) -> dict[str, Expression]:
    """Reverse and forward, whole (None) and in chunks of the given numbers of rows or columns."""
    found: dict[str, Expression] = {}
    for chunk in chunks:
        suffix = "" if chunk is None else f", chunk {chunk}"
        found[f"jacrev{suffix}"] = tf.jacrev(function, argnums=argnum, chunk_size=chunk)
        found[f"jacfwd{suffix}"] = jacfwd(function, argnum, chunk)
    return found


def hessians(function: Expression, argnum: int = 0, chunks: Sequence[int | None] = (None,)) -> dict[str, Expression]:
    """Forward and reverse over reverse, whole (None) and in chunks of the given numbers of columns or rows."""
    gradient = tf.grad(function, argnums=argnum)
    return {f"{name[:6]}(grad){name[6:]}": made for name, made in jacobians(gradient, argnum, chunks).items()}
