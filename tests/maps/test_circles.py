"""Indices along one dimension after reductions by index along another: relations that lead in a circle."""

from __future__ import annotations

import pytest
import torch

import chainrule

pytestmark = pytest.mark.filterwarnings("ignore:index_reduce:UserWarning")

DOUBLE = torch.float64
PLACES = torch.tensor([1, 2, 2])


def scattered(x, reduce):
    shape = (3, *x.shape[1:])
    places = PLACES.reshape(-1, *[1] * (x.dim() - 1)).expand(x.shape)
    return torch.ones(shape, dtype=DOUBLE).scatter_reduce(0, places, x, reduce)


def indexed(x, reduce):
    return torch.ones((3, *x.shape[1:]), dtype=DOUBLE).index_reduce(0, PLACES, x, reduce)


READS = {
    "sort": lambda y: y.sort(1).values,
    "max": lambda y: y.max(1).values,
    "gather": lambda y: y.gather(1, torch.tensor([[0, 1], [1, 1], [3, 0]])),
    "argsort": lambda y: y.gather(1, y.argsort(1)),
    "cummax": lambda y: y.cummax(1).values,
    "max_pool1d": lambda y: torch.nn.functional.max_pool1d(y[None], 2, stride=1)[0],
}


def expect_matrix(function, x):
    """Every sparse form of the Jacobian against torch's, over calls with new values."""
    jacobian = chainrule.jacobian(function, layout="sparse_coo")
    operator = chainrule.jacobian(function, layout="operator")
    for _ in range(3):
        expected = torch.autograd.functional.jacobian(function, x)
        for found in (jacobian(x).to_dense(), operator(x).sparse().to_dense()):
            # Products of at most four numbers of size about one, in another order.
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        places = chainrule.sparsity(function, x, global_=True)
        pattern = torch.zeros(places.shape, dtype=torch.bool)
        pattern[places.indices[0], places.indices[1]] = True
        assert not bool(((expected.reshape(pattern.shape) != 0) & ~pattern).any())
        x = x.flip(1) * 1.25


@pytest.mark.parametrize("reduce", ["prod", "mean", "amin"])
@pytest.mark.parametrize("first", [scattered, indexed])
@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_reads_across(first, reduce, read):
    expect_matrix(lambda x: read(first(x, reduce)), torch.rand(3, 4, dtype=DOUBLE) + 0.5)


def test_circle_of_three():
    """Three dimensions, each read by an index that the other two choose."""
    tables = [torch.randint(2, (3, 3, 3), generator=torch.Generator().manual_seed(n)) for n in range(3)]

    def function(x):
        y = scattered(x, "prod")
        y = torch.ones(3, 3, 3, dtype=DOUBLE).scatter_reduce(1, tables[0], y, "prod")
        return y.gather(2, tables[1]).scatter_reduce(0, tables[2], y, "mean")

    expect_matrix(function, torch.rand(3, 3, 3, dtype=DOUBLE) + 0.5)


def test_hessian():
    function = lambda x: (scattered(x, "prod").sort(1).values ** 2).sum()  # noqa: E731
    x = torch.rand(3, 4, dtype=DOUBLE) + 0.5
    expected = torch.autograd.functional.hessian(function, x)
    found = chainrule.hessian(function, layout="sparse_coo")(x).to_dense()
    # Sums of at most eight products of numbers of size about one.
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_no_place_in_common():
    """Relations that never meet leave no entry."""

    def function(x):
        y = torch.ones(3, 4, dtype=DOUBLE).index_reduce(0, torch.tensor([2, 2, 2]), x, "prod")
        return y[:2].gather(1, torch.tensor([[0, 1], [1, 1]]))

    x = torch.rand(3, 4, dtype=DOUBLE) + 0.5
    assert chainrule.jacobian(function, layout="sparse_coo")(x)._nnz() == 0
