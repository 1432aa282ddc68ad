"""A Jacobian and its transpose share their products in a Hessian, however their masks are spelled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import chainrule

GENERATOR = torch.Generator().manual_seed(0)
#: Inputs, width, outputs: the mask is multiplied with the smaller matrix.
SIZES = [(10, 20, 15), (15, 20, 10)]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "abs": torch.abs,
    "clamp": lambda t: t.clamp(-1, 1),
    "where": lambda t: torch.where(t > 0, t, 0.0),
}


class _Products(TorchDispatchMode):
    """Counts the matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_jacobian_is_made_once(name: str, sizes: tuple[int, int, int]) -> None:
    n, width, m = sizes
    first, second = (torch.randn(*shape, dtype=torch.float64, generator=GENERATOR) for shape in ((width, n), (m, width)))

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (second @ ACTIVATIONS[name](first @ x)).square().sum()

    transform, compiled = chainrule.hessian(loss), chainrule.compile(chainrule.hessian(loss))
    for seed in range(3):
        x = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        expected = torch.func.hessian(loss)(x)
        for function in (transform, compiled):
            # Sums of 300 products of numbers near 1: round-off near 1e-13.
            torch.testing.assert_close(function(x), expected, rtol=1e-11, atol=1e-11)
    with _Products() as seen:
        transform(x)
    # The Jacobian, and its square.
    assert seen.count == 2
