"""Products of stencils against torch.func and finite differences in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import chainrule
from chainrule.execute import engine
from chainrule.maps.band_entries import embed_bands

Tensor = torch.Tensor


def randn(*shape: int) -> Tensor:
    """A normal sample seeded by its shape."""
    generator = torch.Generator().manual_seed(sum((k + 1) * size for k, size in enumerate(shape)))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


FIRST, SECOND, GROUPED = randn(8, 4, 3, 3), randn(4, 8, 3, 3), randn(4, 2, 3, 3)

CASES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "one": (lambda x: F.conv2d(x, FIRST, padding=1), (1, 4, 13, 11)),
    "two": (lambda x: F.conv2d(F.conv2d(x, FIRST, padding=1).tanh(), SECOND, padding=1), (1, 4, 13, 11)),
    "batch, no padding": (lambda x: F.conv2d(F.conv2d(x, FIRST).tanh(), SECOND), (2, 4, 11, 12)),
    "stride and dilation": (
        lambda x: F.conv2d(F.conv2d(x, FIRST, padding=2, dilation=2).tanh(), SECOND, padding=1, stride=2), (1, 4, 13, 12),
    ),
    "stride first": (lambda x: F.conv2d(F.conv2d(x, FIRST, stride=3).relu(), SECOND, padding=2, dilation=2), (1, 4, 23, 20)),
    "groups": (lambda x: F.conv2d(F.conv2d(x, GROUPED, padding=1, groups=2).tanh(), GROUPED, groups=2), (1, 4, 9, 12)),
    "one dimension": (lambda x: F.conv1d(F.conv1d(x, FIRST[..., 0], padding=1).sin(), SECOND[..., 1], padding=3), (2, 4, 31)),
    "three in a row": (
        lambda x: F.conv1d(F.conv1d(F.conv1d(x, FIRST[..., 0]).sin(), SECOND[..., 1]).tanh(), FIRST[..., 2]), (1, 4, 31),
    ),
    "three dimensions": (lambda x: F.conv3d(x, FIRST[..., None], padding=1).tanh(), (1, 4, 7, 6, 5)),
    "transposed": (lambda x: F.conv_transpose2d(F.conv2d(x, FIRST).tanh(), FIRST, stride=2, padding=1), (1, 4, 9, 8)),
    "pooled": (lambda x: F.max_pool2d(F.conv2d(x, FIRST, padding=1).relu(), 2), (1, 4, 11, 10)),
    "averaged": (lambda x: F.avg_pool2d(F.conv2d(x, FIRST, padding=1).tanh(), 2), (1, 4, 11, 10)),
    "residual": (lambda x: x + F.conv2d(F.conv2d(x, FIRST, padding=1).tanh(), SECOND, padding=1), (1, 4, 12, 10)),
    "few input channels": (lambda x: F.conv2d(x, FIRST[:, :1], stride=2, padding=1).sin().sum((2, 3)), (2, 1, 12, 11)),
    "few input channels, one dimension": (lambda x: F.conv1d(x, FIRST[:, :2, 0], dilation=2).sin().sum(2), (2, 2, 17)),
    "no samples": (lambda x: F.conv2d(x, FIRST, padding=1).tanh(), (0, 4, 9, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("transform", [chainrule.jacobian, chainrule.jacrev, chainrule.jacfwd])
def test_jacobians(name: str, transform: Callable[..., Callable[..., Tensor]]) -> None:
    """To 1e-10: float64 rounding over sums of at most 1e3 terms of size about ten."""
    function, shape = CASES[name]
    x = randn(*shape)
    wanted = torch.func.jacrev(function)(x)
    for _ in range(2):  # planned, then replayed
        torch.testing.assert_close(transform(function)(x), wanted, atol=1e-10, rtol=1e-8)


def test_against_finite_differences() -> None:
    """Central differences with step 1e-5: an error of about 1e-10 times third derivatives, and 1e-11 of rounding."""
    function, shape = CASES["stride and dilation"]
    x, step = randn(*shape), 1e-5
    found = chainrule.jacobian(function)(x).flatten(-4)
    for place in range(0, x.numel(), 37):
        unit = torch.zeros(x.numel(), dtype=x.dtype)
        unit[place] = step
        around = [function(x + sign * unit.view(shape)) for sign in (1, -1)]
        torch.testing.assert_close(found[..., place], (around[0] - around[1]) / (2 * step), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("name", ["two", "stride and dilation", "few input channels"])
def test_under_vmap(name: str) -> None:
    function, shape = CASES[name]
    x = torch.stack([randn(*shape), 0.5 * randn(*shape)])
    wanted = torch.stack([torch.func.jacrev(function)(one) for one in x])
    for _ in range(2):
        torch.testing.assert_close(chainrule.vmap(chainrule.jacobian(function))(x), wanted, atol=1e-10, rtol=1e-8)


SMALL: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "two dimensions": (lambda x: F.conv2d(F.conv2d(x[None], FIRST[:, :1], padding=1).tanh(), SECOND[:1], padding=1)[0], (1, 7, 6)),
    "one dimension": (
        lambda x: F.conv1d(F.conv1d(x[None], FIRST[:, :1, 0], padding=1).sin(), SECOND[:1, :, 1], padding=2, dilation=2)[0], (1, 13),
    ),
    "one place": (lambda x: F.conv1d(F.conv1d(x[None], FIRST[:, :1, 0], padding=1).sin(), SECOND[:1, :, 1], padding=1)[0], (1, 1)),
    "groups": (lambda x: F.conv2d(F.conv2d(x[None], GROUPED, padding=1, groups=2).sin(), GROUPED, padding=1, groups=2)[0], (4, 5, 4)),
    "three dimensions": (
        lambda x: F.conv3d(F.conv3d(x[None], FIRST[:, :1, ..., None], padding=(1, 1, 0)).sin(), SECOND[:1, ..., None], padding=1)[0],
        (1, 4, 3, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("batch", [0, 1, 4])
@pytest.mark.parametrize("transform", ["jacobian", "jacfwd"])
def test_small_ones_under_vmap(name: str, batch: int, transform: str) -> None:
    """Each call takes a way of its own; results are the caller's."""
    function, shape = SMALL[name]
    mapped = chainrule.vmap(getattr(chainrule, transform)(function))
    for _ in range(5):
        x = torch.randn(batch, *shape, dtype=torch.float64)
        found = mapped(x)
        if not batch:
            assert found.shape == (0, *function(torch.zeros(shape, dtype=torch.float64)).shape, *shape)
            continue
        wanted = torch.func.vmap(torch.func.jacrev(function))(x)
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-8)
        found.fill_(1.0)


def test_bands_are_written_into_the_stored_result() -> None:
    """A replay under vmap runs on stored tensors: no call of it is taken by the mode."""
    function, shape = SMALL["two dimensions"]
    engine.CACHE.clear()
    mapped = chainrule.vmap(chainrule.jacobian(function))
    for _ in range(4):
        mapped(torch.randn(3, *shape, dtype=torch.float64))
    plans = [plan for plan in engine.CACHE.plans.values() if plan.batched]
    assert plans
    assert all(runner is not None for plan in plans for runner, _ in plan.batched.values())


@pytest.mark.parametrize("name", ["two dimensions", "one dimension"])
def test_results_under_vmap_have_graphs(name: str) -> None:
    function, shape = SMALL[name]
    mapped = chainrule.vmap(chainrule.jacobian(function))
    for _ in range(4):
        x = torch.randn(3, *shape, dtype=torch.float64, requires_grad=True)
        found, wanted = mapped(x), torch.func.vmap(torch.func.jacrev(function))(x)
        seed = torch.randn_like(wanted)
        (one,), (other,) = torch.autograd.grad(found, x, seed), torch.autograd.grad(wanted, x, seed)
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)


def test_nested() -> None:
    """The Jacobian of a contraction of a Jacobian."""

    def by(library: object) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            jacobian = library.jacrev(lambda y: F.conv1d(F.conv1d(y, FIRST[..., 0]).tanh(), SECOND[..., 0]))(x)  # type: ignore[attr-defined]
            return jacobian.square().sum((0, 1, 3, 4))

        return library.jacrev(inner)(randn(1, 4, 30))  # type: ignore[attr-defined]

    torch.testing.assert_close(by(chainrule), by(torch.func), atol=1e-8, rtol=1e-8)


def test_entries_are_written_in_boxes() -> None:
    """A tridiagonal matrix: entry (row, place) stands at column row + place - 1."""
    values = randn(5, 3)
    boxes = (((0, 1), (1, 2)), ((1, 0), (3, 3)), ((4, 0), (1, 2)))
    found = embed_bands(values, (5, 5), (6, 1), -1, boxes)
    wanted = sum(torch.diag(values[max(0, -k) : 5 - max(0, k), k + 1], k) for k in (-1, 0, 1))
    torch.testing.assert_close(found, wanted)
