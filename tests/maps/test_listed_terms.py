"""Loops over single elements: their gradients list the places, and their sparse Hessians hold what is not zero."""

from __future__ import annotations

import pytest
import torch

import chainrule

DOUBLE = torch.float64


def chain(x):
    return sum(x[i] * x[i - 1] for i in range(1, x.shape[0]))


def stacked(x):
    return torch.stack([(x[i] * x[i - 1]).sin() for i in range(1, x.shape[0])]).pow(3).sum()


def slices(x):
    return (x[:2] ** 3).sum() + (x[5:6] ** 3).sum() + (x[7:8] ** 2 * x[2]).sum()


def repeated(x):
    return x[3] * x[3] * x[1] + x[3].sin() + x[1].exp() * x[0] + x[3] ** 3 + x[0] * x[6] + x[3] * x[5] + x[5] ** 2


def unordered(x):
    return sum((x[i] * (k + 1.5)).sin() * x[(i * 3 + 1) % x.shape[0]] for k, i in enumerate((7, 0, 3, 5, 2, 2)))


FUNCTIONS = (chain, stacked, slices, repeated, unordered)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("n", [8, 13])
def test_gradients_and_hessians(function, n):
    x = torch.randn(n, dtype=DOUBLE)
    expected = torch.func.hessian(function)(x)
    for _ in range(2):  # planned, and replayed
        torch.testing.assert_close(chainrule.grad(function)(x), torch.func.grad(function)(x))
        torch.testing.assert_close(chainrule.hessian(function)(x), expected)
        torch.testing.assert_close(chainrule.jacfwd(chainrule.grad(function))(x), expected)
        found = chainrule.hessian(function, layout="sparse_coo")(x)
        torch.testing.assert_close(found.to_dense(), expected)
        x = torch.randn(n, dtype=DOUBLE)
        expected = torch.func.hessian(function)(x)
    batch = torch.randn(3, n, dtype=DOUBLE)
    torch.testing.assert_close(
        chainrule.vmap(chainrule.grad(function))(batch), torch.stack([torch.func.grad(function)(row) for row in batch])
    )


@pytest.mark.parametrize("function", [chain, stacked, slices])
@pytest.mark.parametrize("n", [10, 40])
def test_nothing_but_non_zeros(function, n):
    x = torch.randn(n, dtype=DOUBLE)
    found = chainrule.hessian(function, layout="sparse_coo")(x)
    assert found._nnz() == int((torch.func.hessian(function)(x) != 0).sum())


def test_a_gradient_of_many_elements_is_few_calls():
    x = torch.randn(50, dtype=DOUBLE)
    calls = chainrule.explain(chainrule.grad(chain))(x).accounts[0].calls
    assert len(calls) < 10


def test_rows_and_blocks():
    def function(x):
        return sum((x[i] * x[i - 1]).sin().sum() for i in range(1, 6)) + sum(x[:, j].prod() * x[j, j] for j in range(3))

    x = torch.randn(6, 3, dtype=DOUBLE)
    torch.testing.assert_close(chainrule.grad(function)(x), torch.func.grad(function)(x))
    torch.testing.assert_close(chainrule.hessian(function)(x), torch.func.hessian(function)(x))
    torch.testing.assert_close(chainrule.hessian(function, layout="sparse_coo")(x).to_dense(), torch.func.hessian(function)(x))


def test_jacobians_of_several_outputs():
    def function(x):
        return torch.stack([x[i] * x[(i + 1) % 7] - x[(i + 3) % 7] ** 2 + (x[i - 1] if i > 2 else 0.0) for i in range(7)])

    x = torch.randn(7, dtype=DOUBLE)
    expected = torch.func.jacrev(function)(x)
    for transform in (chainrule.jacobian, chainrule.jacrev, chainrule.jacfwd):
        torch.testing.assert_close(transform(function)(x), expected)
        sparse = transform(function, layout="sparse_coo")(x)
        torch.testing.assert_close(sparse.to_dense(), expected)
        assert sparse._nnz() == int((expected != 0).sum())
