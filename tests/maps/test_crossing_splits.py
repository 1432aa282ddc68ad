"""Dimensions that are split in two ways at once, in traces, diagonals and products of maps with themselves."""

from __future__ import annotations

import pytest
import torch

import chainrule

DOUBLE = torch.float64


@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 8, 9, 10, 12, 15, 20])
def test_repeats_of_both_kinds(n, copies):
    def function(x):
        return x.repeat(copies) * x.repeat_interleave(copies)

    x = torch.randn(n, dtype=DOUBLE)
    jacobian = chainrule.linear_map(function, x)
    dense = torch.func.jacrev(function)(x)
    gram, normal = dense @ dense.T, dense.T @ dense
    # Sums of at most 60 x 60 products of numbers of size one.
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(jacobian.norm(), dense.norm(), **close)
    for ours, expected in ((jacobian.gram(), gram), (jacobian @ jacobian.T, gram), (jacobian.normal(), normal)):
        torch.testing.assert_close(ours.trace(), expected.trace(), **close)
        torch.testing.assert_close(ours.diagonal(), expected.diagonal(), **close)
        torch.testing.assert_close(ours.norm(), expected.norm(), **close)
        torch.testing.assert_close(ours.dense(), expected, **close)
    hessian = torch.func.hessian(lambda x: function(x).pow(3).sum())(x)
    ours = chainrule.hessian(lambda x: function(x).pow(3).sum(), layout="operator")(x)
    torch.testing.assert_close(ours.trace(), hessian.trace(), **close)
    torch.testing.assert_close(ours.diagonal(), hessian.diagonal(), **close)
    torch.testing.assert_close(chainrule.laplacian(lambda x: function(x).pow(3).sum())(x), hessian.trace(), **close)


@pytest.mark.parametrize("shape", [(2, 3), (3, 4), (4, 4), (3, 2, 2), (5, 1), (2, 6)])
def test_stencils_of_views(shape):
    def function(x):
        grid = x.view(shape)
        around = sum(grid.roll(step, dim) for step in (1, -1) for dim in range(len(shape)))
        return ((around - 4 * grid) * grid).pow(3).sum()

    x = torch.randn(shape, dtype=DOUBLE).flatten()
    hessian = torch.func.hessian(function)(x)
    torch.testing.assert_close(chainrule.laplacian(function)(x), hessian.trace(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(chainrule.hessian_diagonal(function)(x), hessian.diagonal(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(chainrule.hessian(function, layout="operator")(x).norm(), hessian.norm(), rtol=1e-10, atol=1e-10)


def test_transposed_and_plain_reshapes():
    def function(x):
        return x.permute(2, 0, 1).reshape(4, -1) * x.reshape(4, -1)

    x = torch.randn(2, 3, 4, dtype=DOUBLE)
    dense = torch.func.jacrev(function)(x).reshape(24, 24)
    ours = chainrule.linear_map(function, x)
    torch.testing.assert_close(ours.gram().trace(), (dense @ dense.T).trace())
    torch.testing.assert_close(ours.norm(), dense.norm())
