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
    assert not [one for one in gc.get_objects() if type(one) is BatchTensor]
