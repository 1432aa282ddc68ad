"""``grid_sample`` in every mode, against torch.func, and forward mode against the transposed Jacobian's product."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import chainrule

DOUBLE = {"dtype": torch.float64}
SHAPES = (
    ((2, 3, 4, 5), (2, 3, 2, 2)), ((1, 1, 1, 6), (1, 4, 1, 2)), ((2, 2, 3, 4, 2), (2, 2, 3, 1, 3)), ((1, 2, 2, 1, 3), (1, 1, 2, 2, 3)),
)  # fmt: skip
OPTIONS = [
    *itertools.product(SHAPES, ("bilinear", "nearest"), ("zeros", "border", "reflection"), (False, True)),
    *itertools.product(SHAPES[:2], ("bicubic",), ("zeros", "border", "reflection"), (False, True)),
]


def _transforms(x: Any, grid: Any, weights: Any) -> dict[str, Any]:
    def loss(f: Any) -> Any:
        return lambda *args: (f(*args) ** 2 * weights).sum()

    return {
        "grad": lambda lib, f: lib.grad(loss(f), (0, 1))(x, grid),
        "jacrev": lambda lib, f: lib.jacrev(f, (0, 1))(x, grid),
        "jacrev-grad": lambda lib, f: lib.jacrev(lib.grad(loss(f), 1), (0, 1))(x, grid),
        "vmap-grad": lambda lib, f: lib.vmap(lib.grad(loss(f), (0, 1)))(torch.stack([x, -x]), torch.stack([grid, grid.flip(1)])),
        "vmap-jacrev": lambda lib, f: lib.vmap(lib.jacrev(f, (0, 1)), (None, 0))(x, torch.stack([grid, grid.flip(1)])),
    }


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_derivatives(options: Any) -> None:
    (shape, places), mode, padding, corners = options
    torch.manual_seed(0)
    # Places within, beyond and far beyond the input.
    x, grid = torch.randn(shape, **DOUBLE), torch.randn(places, **DOUBLE) * 1.5

    def sample(x: Any, grid: Any) -> Any:
        return F.grid_sample(x, grid, mode=mode, padding_mode=padding, align_corners=corners)

    out = sample(x, grid)
    for name, transform in _transforms(x, grid, torch.randn(out.shape, **DOUBLE)).items():
        if mode == "nearest" and name == "jacrev-grad":
            assert not any(part.any() for part in transform(chainrule, sample))
            continue
        if len(shape) == 5 and name == "jacrev-grad":
            # torch has no second derivative there: central differences of the gradient.
            continue
        expected = transform(torch.func, sample)
        for _ in range(2):
            # Sums of at most 16 products of numbers of size one, and of sizes of the input as slopes.
            torch.testing.assert_close(transform(chainrule, sample), expected, rtol=1e-10, atol=1e-11)
    v, u = torch.randn_like(x), torch.randn_like(grid)
    by_x, by_grid = chainrule.jacrev(sample, (0, 1))(x, grid)
    pushed = torch.tensordot(by_x, v, x.dim()) + torch.tensordot(by_grid, u, grid.dim())
    torch.testing.assert_close(chainrule.jvp(sample, (x, grid), (v, u))[1], pushed, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(chainrule.jacfwd(sample, (0, 1))(x, grid), (by_x, by_grid), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_second_derivatives_of_volumes_by_differences(padding: str) -> None:
    torch.manual_seed(1)
    x, grid = torch.randn(1, 2, 3, 4, 2, **DOUBLE), torch.rand(1, 2, 2, 1, 3, **DOUBLE) * 2 - 1

    def loss(x: Any, grid: Any) -> Any:
        return F.grid_sample(x, grid, padding_mode=padding, align_corners=False).pow(3).sum()

    found = chainrule.jacrev(chainrule.grad(loss, 1), 1)(x, grid)
    step = 1e-6
    for number in range(grid.numel()):
        unit = torch.zeros_like(grid)
        unit.view(-1)[number] = step
        difference = (torch.func.grad(loss, 1)(x, grid + unit) - torch.func.grad(loss, 1)(x, grid - unit)) / (2 * step)
        # Rounding of 1e-16 over the step, and the step's square, times derivatives of size 100.
        torch.testing.assert_close(found[..., *[int(i) for i in torch.unravel_index(torch.tensor(number), grid.shape)]], difference, rtol=1e-6, atol=1e-6)


def test_rows_and_structure() -> None:
    x, grid = torch.randn(1, 2, 5, 6, **DOUBLE), torch.rand(1, 3, 4, 2, **DOUBLE) * 2 - 1

    def sample(x: Any) -> Any:
        return F.grid_sample(x, grid, align_corners=False)

    assert "opaque" not in str(chainrule.explain(chainrule.jacrev(sample))(x))
    found = chainrule.jacobian(sample, layout="sparse_csr")(x)
    torch.testing.assert_close(found.to_dense(), torch.func.jacrev(sample)(x).reshape(24, 60))
    assert found.values().numel() <= 24 * 4


def test_nothing_to_sample() -> None:
    x, grid = torch.randn(2, 3, 4, 5, **DOUBLE), torch.zeros(2, 0, 3, 2, **DOUBLE)
    by_x, by_grid = chainrule.jacrev(lambda x, g: F.grid_sample(x, g, align_corners=True), (0, 1))(x, grid)
    assert by_x.shape == (2, 3, 0, 3, 2, 3, 4, 5)
    assert by_grid.shape == (2, 3, 0, 3, 2, 0, 3, 2)
