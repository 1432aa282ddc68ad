"""The pattern for all values: whatever is computed from the inputs, however it is held, may select anything at other points."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import chainrule

N = 8


def _sampled(x, mode):
    grid = torch.stack([x.tanh(), x.new_zeros(N)], -1)[None, None]
    return F.grid_sample((x**2)[None, None, None], grid, mode=mode, align_corners=True)[0, 0, 0]


def _moved_volume(x):
    grid = torch.stack([x[:2].tanh(), x.new_zeros(2), x.new_zeros(2)], -1)[None, None, None]
    return F.grid_sample(x.view(1, 1, 2, 2, 2), grid.detach(), mode="nearest", align_corners=True)[0, 0, 0, 0]


def _permutation(x):
    matrix = x.new_zeros(N, N)
    matrix[torch.arange(N), x.argsort()] = 1.0
    return matrix @ x


def _diagonal_write(x):
    matrix = x.new_zeros(N, N)
    matrix.diagonal().copy_((x > 0).to(x))
    matrix.view(-1)[1:3] = x[:2].detach().sign()
    return matrix @ x


def _out(x):
    matrix = x.new_zeros(N, N)
    torch.mul(torch.eye(N, dtype=x.dtype), (x > 0).to(x), out=matrix)
    return matrix @ x


def _kernel(x):
    kernel = x.new_zeros(3)
    kernel[0], kernel[2:] = (x[0] > 0).to(x), x[1:2] > 0
    return F.conv1d(x[None, None], kernel[None, None], padding=1)[0, 0]


def _mask_by_slice(x):
    mask = torch.zeros(N, dtype=torch.bool)
    mask[:4].copy_(x[:4] > 0)
    return torch.where(mask, x.roll(1), 0.0)


def _mask_by_view(x):
    mask = torch.zeros(N, dtype=torch.bool)
    head = mask[:4]
    head |= x[:4] > 0
    return x.masked_fill(mask, 0) * x.roll(1)


def _mask_by_list(x):
    mask = torch.zeros(N, dtype=torch.bool)
    torch._foreach_copy_([mask[:4]], [x[:4] > 0])
    return torch.where(mask, x.roll(1), 0.0)


def _weights_by_view(x):
    weights = x.new_ones(N)
    part = weights[1:5]
    part[x[1:5] > 0] = 0
    return weights * x.roll(1)


def _index_by_slice(x):
    buffer = torch.zeros(3, dtype=torch.long)
    buffer[:1].copy_(x.argmax()[None])
    return x[buffer] ** 2


def _index_by_row(x):
    index = torch.zeros(2, 4, dtype=torch.long)
    index[0].copy_(x[:4].argsort())
    return x[index.view(-1)]


def _index_from_base(x):
    base = torch.arange(N)
    tail = base[2:]
    tail += (x[2:] > 0).long()
    return x[base.clamp(max=N - 1)] ** 2


def _masked_scatter(x):
    mask = torch.zeros(N, dtype=torch.bool)
    mask[2:6] = x[2:6] > 0
    return x.masked_scatter(mask, x.roll(1) ** 2)


def _scattered_columns(x):
    matrix = x.new_zeros(N, N)
    matrix.scatter_(1, x.argsort()[:, None], 1.0)
    return matrix.T @ x


def _kept_rows(x):
    rows = x.view(4, 2)
    return rows[rows[:, 0] > 0].sum(0) * x[:2]


def _put_by_mask(x):
    y = x.roll(1) ** 2
    y[x > 0] = x.sum()
    return y


def _nonzero(x):
    index = (x > 0).nonzero()[:, 0]
    return torch.zeros_like(x).index_copy(0, index, x[index] ** 2)


def _where_alone(x):
    (index,) = torch.where(x > 0.5)
    return torch.zeros_like(x).index_add(0, index, x[index] ** 3)


def _repeated(x):
    return x.repeat_interleave((x > 0.9).long()).sum() * x


def _differences(x):
    chosen = x[x > 0]
    return (chosen[1:] - chosen[:-1]).square().sum() * x[:3]


def _pairs(x):
    chosen = x[x > 0]
    return (chosen[:, None] - chosen[None]).triu(1).square().sum() * x


FUNCTIONS = {
    "grid_sample": lambda x: _sampled(x, "bilinear"),
    "grid_sample, nearest": lambda x: _sampled(x, "nearest"),
    "grid_sample, cubic": lambda x: _sampled(x, "bicubic"),
    "grid_sample of a detached grid": _moved_volume,
    "index_put of a constant matrix": _permutation,
    "writes to a diagonal and a view": _diagonal_write,
    "out=": _out,
    "kernel": _kernel,
    "mask through a slice": _mask_by_slice,
    "mask through a kept view": _mask_by_view,
    "mask through a list": _mask_by_list,
    "weights through a view": _weights_by_view,
    "index through a slice": _index_by_slice,
    "index through a row": _index_by_row,
    "index through its base": _index_from_base,
    "masked_scatter": _masked_scatter,
    "scattered columns": _scattered_columns,
}

#: The numbers of elements that are selected depend on the values, down to none.
SIZED = {
    "sum of the selected": lambda x: x[x > 0].sum() * x,
    "sum of the selected, detached": lambda x: x.masked_select(x.detach() > 0).sum() * x.roll(1),
    "rows": _kept_rows,
    "put by mask": _put_by_mask,
    "nonzero": _nonzero,
    "where": _where_alone,
    "repeat_interleave": _repeated,
    "differences of the selected": _differences,
    "pairs of the selected": _pairs,
}


def points(seeds=6):
    for seed in range(seeds):
        yield torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    yield from (-torch.ones(N, dtype=torch.float64), torch.linspace(1, 2, N, dtype=torch.float64))
    for count in (1, 2):
        x = -torch.linspace(1, 2, N, dtype=torch.float64)
        x[3 : 3 + count] = torch.tensor([1.5, 1.25], dtype=torch.float64)[:count]
        yield x


def check(function, derivative):
    every = [(x, derivative(x)) for x in points()]
    assert any(bool((one != 0).ne(two != 0).any()) for _, one in every for _, two in every), "the pattern does not change"
    for x, _ in every:
        pattern = chainrule.sparsity(function, x, global_=True).dense()
        assert not (chainrule.sparsity(function, x).dense() & ~pattern).any()
        for _, other in every:
            assert not ((other.reshape(pattern.shape) != 0) & ~pattern).any()


@pytest.mark.parametrize("name", [*FUNCTIONS, *SIZED])
def test_jacobians_at_other_points(name):
    function = {**FUNCTIONS, **SIZED}[name]
    check(function, lambda x: torch.autograd.functional.jacobian(function, x))


@pytest.mark.parametrize("name", SIZED)
def test_hessians_at_other_points(name):
    def energy(x):
        y = SIZED[name](x)
        return (y**2).sum() + (y * torch.linspace(0.5, 1, y.numel(), dtype=y.dtype)).sum()

    check(chainrule.grad(energy), lambda x: torch.autograd.functional.hessian(energy, x))


def test_what_is_constant_stays_narrow():
    x = torch.randn(N, dtype=torch.float64)
    mask = torch.tensor([True, False] * 4)

    def constant_writes(x):
        buffer, weights = torch.zeros(N, dtype=torch.long), torch.ones(N, dtype=x.dtype)
        buffer[2:].copy_(torch.arange(6))
        weights[:4] = 0
        return weights * x[buffer] + x.masked_fill(mask, 0) + x[:0].sum()

    here, everywhere = (chainrule.sparsity(constant_writes, x, global_=g) for g in (False, True))
    assert torch.equal(here.indices, everywhere.indices)
    # A written part of memory leaves ops that read none of it alone.
    narrow = chainrule.sparsity(lambda x: _mask_by_slice(x) + x[torch.arange(N).flip(0)], x, global_=True)
    eye = torch.eye(N, dtype=torch.bool)
    assert torch.equal(narrow.dense(), eye.roll(1, 0) | eye.flip(0))
    # Widened rows keep their columns.
    some = x.view(4, 2).abs().neg()
    some[0] = 1.0
    assert len(chainrule.sparsity(lambda a: a[a[:, 0] > 0].sum(0), some, global_=True)) == 8


def test_nlp_problems_of_such_functions():
    scipy = pytest.importorskip("chainrule.scipy")
    one, two = torch.linspace(-1, 1, N, dtype=torch.float64), torch.linspace(1, -0.8, N, dtype=torch.float64)
    for function in (FUNCTIONS["grid_sample"], _permutation, _mask_by_slice, SIZED["sum of the selected"]):
        at = -torch.ones_like(one) if function is SIZED["sum of the selected"] else one
        problem = scipy.nlp_problem(lambda x: (x**2).sum(), at.numpy(), function)
        found = torch.zeros(N, N, dtype=torch.float64)
        rows, columns = map(torch.as_tensor, problem.jacobianstructure())
        found[rows, columns] = torch.as_tensor(problem.jacobian(two.numpy()))
        torch.testing.assert_close(found, torch.autograd.functional.jacobian(function, two))
