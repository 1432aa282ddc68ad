"""Sparse layouts under vmap: empty batches, chunks, other output dimensions, and what is kept between calls."""

from __future__ import annotations

import gc

import pytest
import torch

import chainrule
from chainrule.batching.tensor import BatchTensor
from chainrule.execute.engine import CACHE

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
def test_no_tensor_of_a_level_is_kept(layout: str) -> None:
    """A pattern that was found under nested vmaps, and refused there, is one of plain numbers to whom it serves next."""
    X = torch.randn(5, 6, dtype=torch.float64)  # noqa: N806
    CACHE.clear()
    gc.collect()
    before = _alive()  # of tests before, whose tracebacks may be kept
    index = torch.tensor([3, 0, 0, 5, 1])
    for function in (lambda x: x[1:] * x[:-1], lambda x: x[index] ** 2, lambda x: torch.where(index > 1, x[:5] ** 2, x[1:])):
        for call in (chainrule.jacobian(function, layout=layout), chainrule.hessian(lambda x: function(x).sum(), layout=layout)):
            for x, depth in ((X[None], 2), (X[None, None], 3)):
                for _ in range(2):
                    with pytest.raises(RuntimeError, match="nested"):
                        nested = call
                        for _ in range(depth):
                            nested = chainrule.vmap(nested)
                        nested(x)
            for batch in (X[:0], X, X[:0]):
                found = chainrule.vmap(call)(batch).to_dense()
                expected = torch.stack([call(row).to_dense() for row in X])[: len(batch)]
                torch.testing.assert_close(found, expected.reshape(found.shape))
    gc.collect()
    assert _alive() <= before


def _alive() -> set[int]:
    return {id(one) for one in gc.get_objects() if type(one) is BatchTensor}


def neighbours(x: torch.Tensor) -> torch.Tensor:
    return x[1:] * x[:-1]


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
@pytest.mark.parametrize("size", [1, 2, 5, 7])
def test_chunks_are_put_together(layout: str, size: int) -> None:
    X = torch.randn(5, 6, dtype=torch.float64)  # noqa: N806
    for _ in range(2):
        found = chainrule.vmap(chainrule.jacobian(neighbours, layout=layout), chunk_size=size)(X)
        assert found.layout is getattr(torch, layout)
        assert torch.equal(found.to_dense(), torch.func.vmap(torch.func.jacrev(neighbours))(X))
        assert layout == "sparse_csr" or found.is_coalesced()


@pytest.mark.parametrize("dim", [1, 2, -1, -3])
@pytest.mark.parametrize("size", [None, 2])
def test_batch_at_another_dimension(dim: int, size: int | None) -> None:
    X = torch.randn(5, 6, dtype=torch.float64)  # noqa: N806
    found = chainrule.vmap(chainrule.jacobian(neighbours, layout="sparse_coo"), out_dims=dim, chunk_size=size)(X)
    assert found.is_coalesced()
    assert torch.equal(found.to_dense(), torch.func.vmap(torch.func.jacrev(neighbours), out_dims=dim)(X))
    by_rows = chainrule.vmap(chainrule.jacobian(neighbours, layout="sparse_csr"), out_dims=dim, chunk_size=size)
    if dim == -3:
        assert torch.equal(by_rows(X).to_dense(), torch.func.vmap(torch.func.jacrev(neighbours))(X))
    else:
        with pytest.raises(RuntimeError, match="with the batch in front only"):
            by_rows(X)


def test_chunks_with_different_patterns() -> None:
    """What each sample of a chunk shares may differ between the chunks: one tensor holds that in coordinate form only."""
    X = torch.randn(4, 6, dtype=torch.float64)  # noqa: N806
    seen = []

    def changing(x: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        return x[: 2] * x[1:3] if len(seen) % 2 else x[:2]

    with pytest.raises(RuntimeError, match="different chunks"):
        chainrule.vmap(chainrule.jacobian(changing, layout="sparse_csr"), chunk_size=2)(X)
    seen.clear()
    found = chainrule.vmap(chainrule.jacobian(changing, layout="sparse_coo"), chunk_size=2)(X).to_dense()
    seen.clear()
    assert torch.equal(found, chainrule.vmap(chainrule.jacobian(changing), chunk_size=2)(X))
