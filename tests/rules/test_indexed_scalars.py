"""Indexed ops on scalars and with scalar indices: the values sample by sample, also where torch.func's are others."""

import pytest
import torch

import chainrule

F64 = torch.float64


def _differences(function, x, step=1e-6):
    columns = []
    for place in range(x.numel()):
        change = torch.zeros(x.numel(), dtype=F64)
        change[place] = step
        change = change.view(x.shape)
        columns.append((function(x + change) - function(x - change)) / (2 * step))
    return torch.stack(columns, -1).reshape(tuple(function(x).shape) + tuple(x.shape))


REDUCED = [(kind, within) for kind in ("mean", "prod", "amax", "amin") for within in (True, False)]


def _functions():
    one, zero = torch.tensor([2]), torch.tensor([0])
    yield lambda x: x.index_copy(0, one, x[1] * x[0])
    yield lambda x: x.index_copy(0, torch.tensor(1), x.sum())
    yield lambda x: x[0].index_copy(0, zero, x[1].exp())
    yield lambda x: x.index_add(0, one, (x[3] * x[0]).reshape(1))
    yield lambda x: x.index_fill(0, one, x[1].sin()) if x.ndim else x
    for kind, within in REDUCED:
        yield lambda x, k=kind, w=within: x[0].index_reduce(0, zero, x[1] * 2, k, include_self=w)
        yield lambda x, k=kind, w=within: x.index_reduce(0, one, (x[1] * x[0]).reshape(1), k, include_self=w)


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("function", list(_functions()))
def test_jacobians_are_the_differences(function):
    """Central differences of step 1e-6 of values of order one are right to about 1e-9."""
    x = torch.randn(4, dtype=F64, generator=torch.Generator().manual_seed(5))
    expected = _differences(function, x)
    for transform in (chainrule.jacrev, chainrule.jacfwd, chainrule.jacobian):
        for _ in range(2):
            torch.testing.assert_close(transform(function)(x), expected, atol=1e-7, rtol=1e-7)
    xs = torch.stack([x, 0.5 * x])
    mapped = chainrule.vmap(chainrule.jacrev(function))(xs)
    torch.testing.assert_close(mapped, torch.stack([expected, _differences(function, 0.5 * x)]), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("dim", [0, -1])
def test_mapped_calls_are_those_of_the_samples(dim):
    """torch.vmap fills all samples with the last value, and returns (3, 4) for the scalar index."""
    x, values, place = torch.randn(4, dtype=F64), torch.randn(3, dtype=F64), torch.tensor([0, 2])
    rows, places = torch.randn(3, 4, dtype=F64), torch.tensor([0, 1, 3])
    for function, arguments in (
        (lambda v: x.index_fill(dim, place, v), (values,)),
        (lambda r, v: r.index_fill(dim, place, v), (rows, values)),
        (lambda r: r.index_select(dim, torch.tensor(1)), (rows,)),
        (lambda r, i: r.index_select(dim, i), (rows, places)),
        (lambda i: x.index_select(dim, i), (places,)),
        (lambda v: v.index_select(dim, torch.tensor(0)), (values,)),
    ):
        expected = torch.stack([function(*sample) for sample in zip(*arguments, strict=True)])
        for _ in range(2):
            torch.testing.assert_close(chainrule.vmap(function)(*arguments), expected)
