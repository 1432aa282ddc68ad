"""Products with masks select: zero where the mask is, whatever else stands there."""

import pytest
import torch
import torch.nn.functional as F

import chainrule

D = torch.float64


def _set(x):
    y = x * 1
    y[x <= 0] = 0.0
    return y


def _fill_row(x):
    y = x * 1
    y[0] = 0.0
    y[-1:] = 0.0
    return y


FUNCTIONS = {
    "written by a mask": _set,
    "written at an index": _fill_row,
    "index_fill": lambda x: x.index_fill(0, torch.tensor([0, 3]), 0.0),
    "index_put": lambda x: x.index_put((torch.tensor([0, 3]),), torch.zeros((), dtype=D)),
    "scatter": lambda x: x.scatter(0, torch.tensor([0, 3]), 0.0),
    "tril": lambda x: torch.outer(x, x).abs().tril(-1).triu(-2),
    "maximum": lambda x: torch.maximum(x, torch.tensor(0.0, dtype=D)),
    "minimum": lambda x: -torch.minimum(-x, torch.tensor(0.0, dtype=D)),
    "masked_fill": lambda x: x.masked_fill(x <= 0, 0.0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "relu": F.relu,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_slopes_without_bounds_behind_a_mask(name):
    """The square root has an infinite slope where zeros were written; torch's reverse mode gives zero there."""
    function = FUNCTIONS[name]

    def total(x):
        return function(x).sqrt().sum()

    for values in ([-1.0, 1.0, 4.0, -2.0], [-3.0, 2.0, 5.0, -0.5]):
        x = torch.tensor(values, dtype=D)
        torch.testing.assert_close(chainrule.grad(total)(x), torch.func.grad(total)(x))
        torch.testing.assert_close(chainrule.jacrev(total)(x), torch.func.jacrev(total)(x))
        rows = torch.stack([x, 2 * x])
        torch.testing.assert_close(chainrule.vmap(chainrule.grad(total))(rows), torch.stack([torch.func.grad(total)(r) for r in rows]))


def test_ties_of_maximum():
    """Where both are equal each gets a half; the derivative of what follows is multiplied by it."""
    x = torch.tensor([1.0, 2.0, -1.0], dtype=D)

    def total(a, b):
        return (torch.maximum(a, b) ** 3 * torch.minimum(a, b)).sum()

    y = torch.tensor([1.0, -2.0, -1.0], dtype=D)
    for argnums in (0, 1, (0, 1)):
        torch.testing.assert_close(chainrule.grad(total, argnums)(x, y), torch.func.grad(total, argnums)(x, y))
        torch.testing.assert_close(chainrule.hessian(total, argnums)(x, y), torch.func.hessian(total, argnums)(x, y))
