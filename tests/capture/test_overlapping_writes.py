"""Writes through views that show one place of memory several times: the values are those of the memory, in every mode."""

import pytest
import torch

import chainrule

F64 = torch.float64


def _row_of_expanded(x):
    y = x.sin()
    rows = y.expand(3, *y.shape)
    rows[1].mul_(x)
    return rows.sum(0) + 2 * y


def _assigned_row(x):
    y = x.sin()
    rows = y.unsqueeze(0).expand(3, *y.shape)
    rows[2] = x * x
    return rows.cos() * y


def _window(x):
    y = x.reshape(-1).exp()
    y.unfold(0, 2, 1)[0].mul_(x.reshape(-1)[:2])
    return y


def _diagonal_of_expanded(x):
    y = x.reshape(-1).sin()
    square = y.expand(y.shape[0], y.shape[0])
    square.diagonal().mul_(x.sum())
    return square.sum(1) + y


def _twice_expanded_then_transposed(x):
    y = x * x
    many = y.expand(2, *y.shape).expand(4, 2, *y.shape).transpose(0, 1)
    many[0, 3].add_(x.exp())
    many[1, 0].mul_(2.0)
    return many[1, 2] * y


def _constant_row(x):
    y = x.sin()
    y.expand(3, *y.shape)[0].fill_(2.0)
    return y * x


FUNCTIONS = [
    _row_of_expanded, _assigned_row, _window, _diagonal_of_expanded, _twice_expanded_then_transposed, _constant_row,
]  # fmt: skip


def _differences(function, x, step=1e-6):
    columns = []
    for place in range(x.numel()):
        change = torch.zeros(x.numel(), dtype=F64)
        change[place] = step
        change = change.view(x.shape)
        columns.append((function(x + change) - function(x - change)) / (2 * step))
    out = function(x.clone())
    return torch.stack(columns, -1).reshape(tuple(out.shape) + tuple(x.shape))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(2,), (3, 2)])
def test_jacobians_are_the_differences(function, shape):
    """Central differences are right to step² and to the rounding of values of order one, 1e-9 together."""
    for seed in range(2):
        x = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))
        expected = _differences(function, x)
        for transform in (chainrule.jacrev, chainrule.jacfwd, chainrule.jacobian):
            torch.testing.assert_close(transform(function)(x.clone()), expected, atol=1e-7, rtol=1e-7)
        for _ in range(2):
            batch = torch.stack([x, x * 0.5])
            found = chainrule.vmap(chainrule.jacrev(function))(batch)
            torch.testing.assert_close(found, torch.stack([expected, _differences(function, x * 0.5)]), atol=1e-7, rtol=1e-7)


def test_scalars_and_one_row():
    for shape, count in (((), 3), ((), 1), ((2,), 1)):
        x = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(3))

        def function(x, count=count):
            y = x.sin()
            rows = y.expand(count, *y.shape)
            rows[0].mul_(x)
            return rows.sum(0) * y

        torch.testing.assert_close(chainrule.jacobian(function)(x), _differences(function, x), atol=1e-7, rtol=1e-7)


def test_agrees_with_torch_where_torch_is_right():
    """torch.func writes tangents in place, too: it is right where what is added does not depend on what is overwritten."""
    x = torch.randn(4, dtype=F64)

    def function(x):
        y = x.sin()
        y.expand(3, 4)[1].add_(x.exp())
        return y

    torch.testing.assert_close(chainrule.jacfwd(function)(x), torch.func.jacfwd(function)(x))
    torch.testing.assert_close(chainrule.hessian(lambda x: function(x).sum())(x), torch.diag(-x.sin() + x.exp()))


def test_a_write_to_all_rows_is_refused_as_by_torch():
    with pytest.raises(RuntimeError, match="single memory location"):
        chainrule.jacobian(lambda x: (x * 2).expand(3, 2).mul_(2.0))(torch.ones(2))
