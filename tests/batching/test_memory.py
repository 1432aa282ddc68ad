"""What a tensor of a vmapped function says of memory: copies where torch has them, and errors where there is none."""

from __future__ import annotations

import pytest
import torch

import chainrule


def _even_columns(x):
    y = x.clone()
    y[:, ::2].ravel().zero_()
    return y


def _column(x):
    y = x.clone()
    y[:, 0].ravel()[...] = 5.0
    return y


def _turned(x):
    y = x.clone()
    y.T.ravel().zero_()
    return y


def _whole(x):
    y = x.clone()
    y.ravel().mul_(2)
    return y


@pytest.mark.parametrize("function", [_even_columns, _column, _turned, _whole])
def test_ravel_is_a_copy_of_what_is_not_contiguous(function):
    """Even where `reshape` has a view."""
    for _ in range(4):
        x = torch.randn(3, 2, 4, dtype=torch.float64)
        torch.testing.assert_close(chainrule.vmap(function)(x), torch.stack([function(sample) for sample in x]))
        found = chainrule.vmap(chainrule.grad(lambda x: function(x).sin().sum()))(x)
        torch.testing.assert_close(found, torch.func.vmap(torch.func.grad(lambda x: function(x).sin().sum()))(x))


@pytest.mark.parametrize(
    "use",
    [
        lambda y: y.share_memory_(), lambda y: y.apply_(lambda v: v + 1), lambda y: y.map_(y, lambda a, b: a),
        lambda y: y.map2_(y, y, lambda a, b, c: a),
    ],
)  # fmt: skip
def test_memory_of_a_sample_is_refused(use):
    with pytest.raises(RuntimeError, match="no memory of their own"):
        chainrule.vmap(lambda x: use(x.sin()))(torch.randn(4, 3))
