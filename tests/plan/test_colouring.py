"""Colourings, and sparse Jacobians computed by them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import chainrule
from chainrule.plan.colouring import colour_columns


def _valid(mask, colours):
    for row in mask:
        own = colours[row]
        assert len(torch.unique(own)) == len(own)


@pytest.mark.parametrize("seed", range(12))
def test_columns_of_one_row_differ(seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(9, 14, generator=generator) < 0.05 * (1 + seed)
    rows, columns = torch.nonzero(mask).t()
    colours = colour_columns(rows, columns, (9, 14))
    _valid(mask, colours)
    assert colours.shape == (14,)


def test_bands_need_as_many_colours_as_they_are_wide():
    size = 40
    distance = torch.arange(size)[:, None] - torch.arange(size)
    for width in (1, 3, 5):
        mask = distance.abs() <= width // 2
        colours = colour_columns(*torch.nonzero(mask).t(), (size, size))
        _valid(mask, colours)
        assert int(colours.max()) + 1 == width


def test_nothing_to_colour():
    empty = torch.empty(0, dtype=torch.long)
    assert colour_columns(empty, empty, (3, 4)).tolist() == [0, 0, 0, 0]
    assert colour_columns(empty, empty, (0, 0)).tolist() == []


def test_the_planner_takes_colours_where_products_fill_in():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(4, 4, 3, dtype=torch.float64, generator=generator) for _ in range(4)]

    def function(x):
        for weight in weights:
            x = F.conv1d(x, weight, padding=1).tanh()
        return x

    x = torch.randn(1, 4, 60, dtype=torch.float64, generator=generator)
    sparse = chainrule.jacobian(function, layout="sparse_csr")
    account = chainrule.explain(sparse)(x).accounts[-1]
    assert {a["order"] for a in account.alternatives} >= {"reverse", "colours"}
    assert account.chosen == min(account.alternatives, key=lambda a: a["cost"])["order"] == "colours"
    expected = torch.func.jacrev(function)(x).reshape(240, 240)
    for _ in range(2):
        torch.testing.assert_close(sparse(x).to_dense(), expected, rtol=1e-10, atol=1e-10)
    # The same entries one by one, in a pinned order.
    torch.testing.assert_close(chainrule.jacrev(function, layout="sparse_csr")(x).to_dense(), expected, rtol=1e-10, atol=1e-10)
