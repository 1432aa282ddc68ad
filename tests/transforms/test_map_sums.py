"""Sums of maps of low rank and sparse ones: what is read off them is contracted term by term."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import chainrule

DOUBLE = torch.float64
RANK = 3


def functions(size):
    """Functions of a vector whose Jacobians are sums of which none is the square of numbers that it stands for."""
    generator = torch.Generator().manual_seed(0)
    left, right, other = (torch.randn(size, RANK, dtype=DOUBLE, generator=generator) / size**0.5 for _ in range(3))
    order = torch.randperm(size, generator=generator)
    blocks = torch.randn(size // 4, 4, 4, dtype=DOUBLE, generator=generator)
    heads, tails = (torch.randint(size, (2 * size,), generator=generator) for _ in range(2))
    weights = torch.randn(2 * size, dtype=DOUBLE, generator=generator)
    kernel = torch.tensor([[[1.0, -2.0, 1.0]]], dtype=DOUBLE)

    def low(x):
        return left @ torch.tanh(right.T @ x)

    def blockwise(x):
        return torch.einsum("bi,bij->bj", x.reshape(-1, 4), blocks).sin().reshape(-1)

    def graph(x):
        return torch.zeros_like(x).index_add(0, heads, weights * (x[tails] * x[heads]).sin())

    def channels(x):
        features = x.reshape(-1, 2)
        there = torch.zeros_like(features).index_add(0, heads % (size // 2), features[tails % (size // 2)].sin())
        return there.reshape(-1)

    return {
        "graph": lambda x: low(x) + graph(x),
        "two graphs": lambda x: low(x) + graph(x) + torch.zeros_like(x).scatter_add(0, tails, (x[heads] * weights).exp()),
        "graph of channels": lambda x: low(x) + channels(x),
        "diagonal": lambda x: low(x) + x**2,
        "roll": lambda x: low(x) + x.roll(1) ** 2,
        "stencil": lambda x: low(x) + x.roll(1) - 2 * x + x.roll(-1) + x**3,
        "convolution": lambda x: low(x) + torch.nn.functional.conv1d(x[None, None], kernel, padding=1)[0, 0].tanh(),
        "permutation": lambda x: low(x) + x[order].sin(),
        "sort": lambda x: low(x) + x.sort().values ** 2,
        "blocks": lambda x: low(x) + blockwise(x),
        "blocks and diagonal": lambda x: blockwise(x) + x**2,
        "running sum": lambda x: x.sin().cumsum(0) + x**2,
        "two": lambda x: low(x) + other @ (left.T @ x).sin(),
        "residual": lambda x: (lambda y: y + other @ torch.tanh(left.T @ y))(x + low(x)),
    }


READ = {
    "diagonal": (lambda J: J.diagonal(), lambda M: M.diagonal()),
    "trace": (lambda J: J.trace(), lambda M: M.trace()),
    "norm": (lambda J: J.norm(), lambda M: M.norm()),
    "gram": (lambda J: J.gram().diagonal(), lambda M: (M @ M.T).diagonal()),
    "normal": (lambda J: J.normal().diagonal(), lambda M: (M.T @ M).diagonal()),
    "gram trace": (lambda J: J.gram().trace(), lambda M: (M @ M.T).trace()),
    "sum": (lambda J: (J + 0.5 * J.T).norm(), lambda M: (M + 0.5 * M.T).norm()),
    "product": (lambda J: (J @ J).trace(), lambda M: (M @ M).trace()),
    "entries": (lambda J: J[[0, 7, 60], [0, 6, 3]], lambda M: M[[0, 7, 60], [0, 6, 3]]),
}


def expected_matrix(function, x):
    return torch.autograd.functional.jacobian(function, x, create_graph=x.requires_grad)


@pytest.mark.parametrize("name", functions(4))
def test_values_in_every_call(name):
    function = functions(64)[name]
    for seed in range(3):
        x = torch.randn(64, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
        matrix = expected_matrix(function, x)
        found = chainrule.linear_map(function, x)
        for ours, theirs in READ.values():
            # Sums of at most some thousand products of numbers of size about one.
            torch.testing.assert_close(ours(found), theirs(matrix), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["diagonal", "stencil", "permutation", "graph", "two graphs"])
@pytest.mark.parametrize("read", ["diagonal", "norm", "normal", "product"])
def test_derivatives(name, read):
    """What is read off can be differentiated with respect to the point."""
    function, (ours, theirs) = functions(64)[name], READ[read]
    x = torch.randn(64, dtype=DOUBLE, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (expected,) = torch.autograd.grad(theirs(expected_matrix(function, x)).square().sum(), x)
    (found,) = torch.autograd.grad(ours(chainrule.linear_map(function, x)).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    read_off = lambda y: ours(chainrule.linear_map(function, y)).square().sum()  # noqa: E731
    torch.testing.assert_close(chainrule.grad(read_off)(x.detach()), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", functions(4))
def test_no_square_is_made(name):
    size = 4096
    found = chainrule.linear_map(functions(size)[name], torch.randn(size, dtype=DOUBLE))
    for ours, _ in READ.values():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            ours(found)
        largest = max(event.self_cpu_memory_usage for event in recorded.events())
        # A square takes 134 MB; factors, their products and indices of pairs some numbers for each row.
        assert largest < 64 * 8 * size


@pytest.mark.parametrize("name", ["graph", "two graphs", "graph of channels"])
def test_lists_under_vmap(name):
    function = functions(64)[name]
    samples = torch.randn(3, 64, dtype=DOUBLE)
    for read in ("norm", "gram", "normal", "product"):
        ours, theirs = READ[read]
        for _ in range(2):
            found = chainrule.vmap(lambda x, ours=ours: ours(chainrule.linear_map(function, x)))(samples)
            expected = torch.stack([theirs(expected_matrix(function, x)) for x in samples])
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_rectangular_and_empty():
    left, right = torch.randn(300, 2, dtype=DOUBLE), torch.randn(2, 200, dtype=DOUBLE)

    def function(x):
        return left @ (right @ x).sin() + torch.cat([x**2, x[:100].cos()])

    x = torch.randn(200, dtype=DOUBLE)
    matrix = expected_matrix(function, x)
    found = chainrule.linear_map(function, x)
    torch.testing.assert_close(found.norm(), matrix.norm(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.gram().diagonal(), (matrix @ matrix.T).diagonal(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.normal().diagonal(), (matrix.T @ matrix).diagonal(), rtol=1e-11, atol=1e-11)
    empty = chainrule.linear_map(lambda y: y.sum() * y + y**2, torch.zeros(0, dtype=DOUBLE))
    assert float(empty.norm()) == 0.0
    assert empty.diagonal().shape == (0,)


@pytest.mark.parametrize("size", [1, 2, 5, 6])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.flip(0), lambda x: x + x.flip(0), lambda x: (x - x.flip(0)) / 2, lambda x: x.sin() + 2 * x.flip(0),
        lambda x: x.flip(0) + x.cumsum(0), lambda x: x - x.roll(1) + x.flip(0),
        lambda x: torch.stack([x, x.flip(0)]).flip(0, 1).sum(0) * 3,
    ],
)  # fmt: skip
def test_what_leads_back_to_where_it_came_from_is_counted(function, size):
    x = torch.randn(size, dtype=DOUBLE)
    found, matrix = chainrule.linear_map(function, x), expected_matrix(function, x)
    gram = found.gram()
    for ours, theirs in (
        ((found @ found).trace(), (matrix @ matrix).trace()),
        ((found @ found @ found).trace(), (matrix @ matrix @ matrix).trace()),
        ((found + found.T).norm(), (matrix + matrix.T).norm()),
        (gram.norm(), (matrix @ matrix.T).norm()),
        ((gram @ gram).trace(), (matrix @ matrix.T @ matrix @ matrix.T).trace()),
        ((found @ found).diagonal(), (matrix @ matrix).diagonal()),
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_norm_of_zeros_has_the_derivative_zero():
    x = torch.zeros(3, dtype=DOUBLE)
    read = lambda y: chainrule.linear_map(torch.square, y).norm()  # noqa: E731
    assert torch.equal(chainrule.grad(read)(x), x)
    tracked = x.clone().requires_grad_()
    read(tracked).backward()
    assert torch.equal(tracked.grad, x)
    assert read(torch.full_like(x, torch.nan)).isnan()
