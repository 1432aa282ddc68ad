"""Norms of maps whose entries have squares outside of their dtype's range."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import chainrule
from chainrule.execute.memory import watching

Tensor = torch.Tensor

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.rand(5, 7, dtype=torch.float64, generator=GENERATOR) + 0.1

#: Functions of seven elements, linear in the last argument.
FUNCTIONS: dict[str, Callable[[Tensor, float], Tensor | tuple[Tensor, ...]]] = {
    "diagonal": lambda x, scale: x * x * scale,
    "dense": lambda x, scale: (WEIGHT.to(x) @ x) * scale,
    "differences": lambda x, scale: (x[1:] - 2 * x[:-1]) * scale,
    "one row": lambda x, scale: (x * scale).sum(),
    "triangle": lambda x, scale: x.cumsum(0) * scale,
    "several": lambda x, scale: ((x * scale).sin() * 0 + x * scale, x[:3] * scale),
}
#: Scales whose squares are infinite or zero in the dtype, while they are not.
SCALES = {
    torch.float64: (1e200, 1e-200), torch.float32: (1e25, 1e-25), torch.bfloat16: (1e25, 1e-25), torch.float16: (1e3, 1e-4),
}  # fmt: skip


@pytest.mark.parametrize("dtype", SCALES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_norms_out_of_the_range_of_squares(name: str, dtype: torch.dtype) -> None:
    """The norm is homogeneous: that of the map without the scale, in float64, times the scale."""
    function = FUNCTIONS[name]
    for scale in SCALES[dtype]:
        for _ in range(4):  # planned, replayed, by fresh values
            x = torch.rand(7, dtype=dtype, generator=GENERATOR) + 0.5
            found = chainrule.linear_map(lambda x: function(x, scale), x).norm()  # noqa: B023
            blocks = torch.func.jacrev(lambda x: function(x, 1.0))(x.double())
            blocks = blocks if isinstance(blocks, tuple) else (blocks,)
            expected = torch.cat([block.reshape(-1) for block in blocks]).norm() * scale
            assert found.dtype == dtype and found.shape == ()
            # Each entry, and each of their 50 squares at most, is rounded once or twice.
            torch.testing.assert_close(found.double(), expected, rtol=50 * torch.finfo(dtype).eps, atol=0.0)


def test_sums_and_products_of_maps() -> None:
    x = torch.rand(6, generator=GENERATOR) + 0.5
    one, two = (chainrule.linear_map(f, x) for f in (lambda x: x**2 * 1e16, lambda x: x.cumsum(0) * 1e16))
    dense = [m.dense().double() for m in (one, two)]
    close = {"rtol": 1e-5, "atol": 0.0, "check_dtype": False}
    torch.testing.assert_close((1e5 * (one + two)).norm(), (1e5 * (dense[0] + dense[1])).norm(), **close)
    torch.testing.assert_close((one.T @ two).norm(), (dense[0].T @ dense[1]).norm(), **close)


def test_rows_of_windows_of_running_sums() -> None:
    """The sum of the squares of all rows is taken row by row, where one contraction would make the matrix."""
    x = torch.rand(2000, dtype=torch.float64, generator=GENERATOR)

    def windows(x: Tensor) -> Tensor:
        total = x.square().cumsum(0)
        return total[7:] - total[:-7]

    found = chainrule.linear_map(windows, x)
    found.norm()  # planned
    with watching() as watch:
        found.norm()
    assert watch.peak <= 8 * 50 * 2000  # the matrix takes forty times that, blocks of it four times
    torch.testing.assert_close(found.norm(), torch.func.jacfwd(windows)(x).norm())


def test_the_derivative_of_a_scaled_norm() -> None:
    """That of the norm in float64; zero where the norm is."""
    x = (torch.rand(6, generator=GENERATOR) + 0.5).requires_grad_()
    (found,) = torch.autograd.grad(chainrule.linear_map(lambda x: x**3 * 1e22, x).norm(), x)
    y = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad((3 * y**2 * 1e22).norm(), y)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0.0)
    nothing = torch.zeros(6, requires_grad=True)
    norm = chainrule.linear_map(lambda x: x**2, nothing).norm()
    assert float(norm.detach()) == 0.0
    assert torch.equal(torch.autograd.grad(norm, nothing)[0], torch.zeros(6))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_entries_that_are_not_finite(bad: float) -> None:
    weights = torch.tensor([1e20, bad, 0.0, 3.0])
    norm = chainrule.linear_map(lambda x: x * weights, torch.rand(4, generator=GENERATOR)).norm()
    torch.testing.assert_close(norm, torch.tensor(bad), equal_nan=True)


def test_large_maps_with_few_entries() -> None:
    """The entries are listed: rows of a dense matrix would be a hundred thousand times as many."""
    x = torch.rand(100_000, generator=GENERATOR) + 1
    found = chainrule.linear_map(lambda x: x**2 * 1e25, x).norm()
    torch.testing.assert_close(found.double(), (2e25 * x.double()).norm(), rtol=1e-5, atol=0.0)


def test_inside_of_transforms_no_value_is_read() -> None:
    x = torch.rand(3, 4, generator=GENERATOR) + 0.5
    norm = lambda x: chainrule.linear_map(torch.square, x).norm()  # noqa: E731
    torch.testing.assert_close(chainrule.vmap(norm)(x), (2 * x).norm(dim=1))
    torch.testing.assert_close(chainrule.grad(norm)(x[0]), 2 * x[0] / x[0].norm())
    compiled = chainrule.compile(norm)
    for row in x:
        torch.testing.assert_close(compiled(row), (2 * row).norm())
