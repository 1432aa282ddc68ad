"""Products of maps with relations to several targets: joined on all of them at once, in the number of products."""

from __future__ import annotations

import pytest
import torch

import chainrule

DOUBLE = torch.float64


def crossing(x):
    return x.permute(2, 0, 1).reshape(x.shape[2], -1) * x.reshape(x.shape[2], -1)


def twice(x):
    flat = x.reshape(-1)
    return flat.reshape(-1, 6).t().reshape(-1, 4).t().reshape(-1) * flat


def repeats(x):
    flat = x.reshape(-1)
    return flat.repeat(2) * flat.repeat_interleave(2)


@pytest.mark.parametrize("function", [crossing, twice, lambda x: twice(twice(x)), repeats, lambda x: repeats(twice(x))])
@pytest.mark.parametrize("shape", [(2, 3, 4), (4, 3, 2)])
def test_products(function, shape):
    x = torch.randn(shape, dtype=DOUBLE)
    ours = chainrule.linear_map(function, x)
    dense = torch.func.jacrev(function)(x).reshape(-1, x.numel())
    for found, expected in ((ours.gram(), dense @ dense.T), (ours.normal(), dense.T @ dense)):
        sparse = found.sparse(flat=True)
        # Sums of at most 48 products of numbers of size about one.
        torch.testing.assert_close(sparse.to_dense(), expected, rtol=1e-11, atol=1e-11)
        assert sparse._nnz() == int((expected != 0).sum())


def test_large_products_are_linear():
    """24 000 columns: the products of all pairs that agree in one digit only would be tens of millions."""
    x = torch.randn(20, 30, 40, dtype=DOUBLE)
    assert chainrule.linear_map(crossing, x).gram().sparse(flat=True)._nnz() <= 3 * x.numel()


def test_hessian_of_a_triangle_of_a_diagonal():
    """Chains of relations are shortened before they are joined: joins of joins would never end."""
    function = lambda x: (torch.diag(x).triu() ** 2).sum()  # noqa: E731
    x = torch.randn(6, dtype=DOUBLE)
    found = chainrule.hessian(function, layout="sparse_coo")(x)
    torch.testing.assert_close(found.to_dense(), 2 * torch.eye(6, dtype=DOUBLE))
    assert found._nnz() == 6
