"""Products of stencils: their patterns and values against torch.func, and what is listed for them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import chainrule
from chainrule.maps import stencils


def kernels(rank, channels, sizes):
    generator = torch.Generator().manual_seed(rank)
    shapes = zip(channels[1:], channels[:-1], sizes, strict=True)
    return [torch.randn(o, i, *[size] * rank, dtype=torch.float64, generator=generator) for o, i, size in shapes]


CASES = {
    "valid": (1, (2, 3, 2), (3, 3), {}),
    "padded": (1, (2, 3, 2), (3, 3), {"padding": 1}),
    "wide padding": (1, (1, 2, 1), (3, 5), {"padding": 4}),
    "dilated": (1, (2, 2, 2), (3, 3), {"padding": 2, "dilation": 2}),
    "stride": (1, (2, 3, 2), (3, 3), {"padding": 1, "stride": 2}),
    "even": (1, (2, 3, 2), (2, 4), {"padding": 1}),
    "three": (1, (2, 2, 2, 2), (3, 3, 3), {"padding": 1}),
    "plane": (2, (2, 3, 2), (3, 3), {"padding": 1}),
    "plane, stride": (2, (2, 2, 2), (3, 2), {"padding": 1, "stride": 2}),
    "space": (3, (1, 2, 1), (2, 3), {"padding": 1}),
}


@pytest.mark.parametrize("transform", ["jacobian", "jacfwd", "jacrev"])
@pytest.mark.parametrize("name", CASES)
def test_convolutions_of_convolutions(name, transform):
    rank, channels, sizes, options = CASES[name]
    weights = kernels(rank, channels, sizes)

    def function(x):
        for weight in weights:
            x = getattr(F, f"conv{rank}d")(x, weight, **options).sin()  # whose derivative rounds to no zeros
        return x

    x = torch.randn(1, channels[0], *(9, 8, 5)[:rank], dtype=torch.float64)
    expected = torch.func.jacrev(function)(x)
    found = getattr(chainrule, transform)(function, layout="sparse_coo")(x)
    # Sums of at most some hundred products of numbers of size one.
    torch.testing.assert_close(found.to_dense(), expected, rtol=1e-10, atol=1e-10)
    assert found._nnz() == int((expected != 0).sum()), "no entry that is zero"


def test_each_entry_is_listed_once(monkeypatch):
    """Of two convolutions by 3 × 3 taps, 25 entries for each row and channel are computed, not 81."""
    first, second = kernels(2, (4, 4, 4), (3, 3))
    function = lambda x: F.conv2d(F.conv2d(x, first, padding=1).tanh(), second, padding=1)  # noqa: E731
    x = torch.randn(1, 4, 10, 10, dtype=torch.float64)
    sizes = {}
    for cost in (stencils._LISTED_COST, 0):
        monkeypatch.setattr(stencils, "_LISTED_COST", cost)
        account = chainrule.explain(chainrule.jacrev(function, layout="sparse_coo"))(x).accounts[-1]
        sizes[cost] = max(torch.Size(step["shape"]).numel() for step in account.steps)
    assert sizes[100] <= 4 * 100 * 4 * 25
    assert sizes[0] == 4 * 100 * 4 * 81
