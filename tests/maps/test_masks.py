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


MASKS = {
    "relu": F.relu,
    "clamp": lambda x: x.clamp(min=0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0.0),
    "maximum": lambda x: torch.maximum(x, torch.tensor(0.0, dtype=D)),
    "twice": lambda x: (2 * x.relu()).clamp(min=0),
}
SLOPES = {"sqrt": torch.sqrt, "log": torch.log, "power": lambda x: x**0.5, "reciprocal": lambda x: 1 / x}
READINGS = {
    "row": lambda x: x[0],
    "column": lambda x: x.unbind(1)[0],
    "turned": lambda x: x[None].transpose(1, 2)[0, 0],
    "slice": lambda x: x[:2, 1:],
    "flip": lambda x: x.flip(0)[:1],
    "roll": lambda x: x.roll(1, 1),
    "list": lambda x: x[torch.tensor([0, 1]), torch.tensor([0, 2])],
    "mask": lambda x: x[torch.tensor([True, False, True])],
    "split": lambda x: x.split(2, 1)[0],
    "gather": lambda x: x.gather(1, torch.tensor([[0, 2], [1, 1], [1, 0]])),
    "sort": lambda x: x.sort(1)[0],
    "max": lambda x: x.max(1)[0],
    "median": lambda x: x.median(1)[0],
    "diagonal": torch.diagonal,
    "twice a row": lambda x: 2 * x[0],
}


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("mask", MASKS)
def test_entries_read_behind_a_mask_and_a_slope_without_bounds(mask, slope):
    x = torch.tensor([[-1.0, 4.0, 9.0, 2.0], [3.0, -2.0, 0.5, -0.3], [1.0, 2.0, 3.0, 5.0]], dtype=D)
    for name, read in READINGS.items():

        def function(x, read=read):
            return read(SLOPES[slope](MASKS[mask](x)))

        def total(x):
            return function(x).sum()  # noqa: B023 - called in this turn

        for transform, f in (("grad", total), ("jacrev", function), ("jacfwd", function)):
            ours, theirs = getattr(chainrule, transform)(f), getattr(torch.func, transform)(f)(x)
            for _ in range(2):
                found = ours(x)
                known = ~torch.isnan(theirs)
                assert not torch.isnan(found[known]).any(), (name, transform)
                torch.testing.assert_close(found[known & ~torch.isnan(found)], theirs[known & ~torch.isnan(found)])
