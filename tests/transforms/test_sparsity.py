"""The pattern alone: true non-zeros are in it, and what it is on request for all values."""

from __future__ import annotations

import pytest
import torch

import chainrule
from tests.transforms.sparse_functions import INDEX_ONLY, JACOBIANS


@pytest.mark.parametrize("name", JACOBIANS)
def test_true_pattern_within_local_within_global(name):
    function, x = JACOBIANS[name]
    true = torch.func.jacrev(function)(x).reshape(function(x).numel(), x.numel()) != 0
    local = chainrule.sparsity(function, x)
    everywhere = chainrule.sparsity(function, x, global_=True)
    assert local.shape == tuple(true.shape)
    assert not bool((true & ~local.dense()).any())
    assert not bool((local.dense() & ~everywhere.dense()).any())
    if name in INDEX_ONLY:
        assert torch.equal(true, local.dense())
    assert torch.equal(local.indices, torch.nonzero(local.dense()).t())
    layout = chainrule.jacobian(function, layout="sparse_csr")(x)
    assert len(local) == layout.values().numel()


def test_global_holds_at_other_points():
    for function in (
        lambda x: x.sort().values * x, lambda x: x.max() * x, lambda x: torch.where(x > 0, x.roll(1), x.roll(-1)),
        lambda x: x.gather(0, x.argsort()), lambda x: x.relu(), lambda x: x.topk(2).values,
    ):  # fmt: skip
        pattern = chainrule.sparsity(function, torch.arange(5.0), global_=True).dense()
        for seed in range(10):
            x = torch.randn(5, generator=torch.Generator().manual_seed(seed))
            assert not bool(((torch.func.jacrev(function)(x) != 0) & ~pattern).any())


def test_selections_here_and_anywhere():
    x = torch.tensor([3.0, 1.0, 2.0])
    assert chainrule.sparsity(lambda y: y.sort().values, x).indices.tolist() == [[0, 1, 2], [1, 2, 0]]
    assert len(chainrule.sparsity(lambda y: y.sort().values, x, global_=True)) == 9
    assert len(chainrule.sparsity(lambda y: y[y > 1.5], x)) == 2
    assert len(chainrule.sparsity(lambda y: y[y > 1.5], x, global_=True)) == 6


def test_constant_selections_are_not_widened():
    index = torch.tensor([2, 0, 0])
    assert len(chainrule.sparsity(lambda y: y[index], torch.ones(3), global_=True)) == 3


def test_trees():
    pattern = chainrule.sparsity(lambda a, b: (a * b, b.sum()), torch.ones(2), torch.ones(2), argnums=(0, 1))
    assert pattern.shape == (3, 4)
    assert pattern.dense().int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]]
    assert len(chainrule.sparsity(lambda a: a.detach(), torch.ones(2))) == 0
    assert pattern.density == pytest.approx(6 / 12)


def test_scipy():
    pytest.importorskip("scipy")
    pattern = chainrule.sparsity(lambda x: x[1:] * x[:-1], torch.ones(3)).scipy()
    assert pattern.toarray().tolist() == [[1, 1, 0], [0, 1, 1]]


def test_spy():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = chainrule.sparsity(lambda x: x.roll(1), torch.ones(4)).spy()
    (line,) = axes.get_lines()
    assert list(zip(line.get_ydata(), line.get_xdata(), strict=True)) == [(0, 3), (1, 0), (2, 1), (3, 2)]


def test_pattern_of_a_large_grid_takes_little():
    """Three stencils reach 25 values from each place."""
    function, _ = JACOBIANS["periodic 2-D"]

    def steps(x):
        for _ in range(3):
            x = function(x).sin()
        return x

    pattern = chainrule.sparsity(steps, torch.ones(60, 60))
    assert len(pattern) == 60 * 60 * 25
