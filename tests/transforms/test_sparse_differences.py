"""Every function of the sparse tests against finite differences at random points: an oracle without automatic differentiation.

Central differences with a step h and with 2h differ by three times the truncation error of the finer ones, to leading order; that,
and the rounding of the values over h, is the tolerance of each entry. (Hessians: differences of torch's gradients.)
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import chainrule
from tests.transforms.sparse_functions import HESSIANS, JACOBIANS

Function = Callable[[torch.Tensor], torch.Tensor]

STEP = 2.0**-13  # a power of two: adding and taking it away is almost exact


def differences(function: Function, x: torch.Tensor, step: float) -> torch.Tensor:
    """Central differences along all inputs, of shape ``(outputs, inputs)``."""
    shifts = (step * torch.eye(x.numel(), dtype=x.dtype)).reshape(x.numel(), *x.shape)
    columns = [(function(x + shift) - function(x - shift)).reshape(-1) / (2 * step) for shift in shifts]
    return torch.stack(columns, 1) if columns else torch.zeros(function(x).numel(), 0, dtype=x.dtype)


def agrees(found: torch.Tensor, function: Function, x: torch.Tensor) -> None:
    fine, coarse = differences(function, x, STEP), differences(function, x, 2 * STEP)
    value = function(x)
    largest = float(value.abs().max()) if value.numel() else 0.0
    # Values come with rounding errors of some 2⁻⁵² for each of up to a few hundred operations, on numbers of their size or of one.
    rounding = 400 * 2.0**-52 * (1 + largest) / STEP
    off = (found.reshape(fine.shape) - fine).abs() - (coarse - fine).abs()
    assert not bool((off > rounding).any()), float(off.max())
    # Where nothing is smooth enough for differences to mean something, they would agree with everything.
    assert float((coarse - fine).abs().median() if fine.numel() else 0.0) < 1e-4


def points(x: torch.Tensor) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(x.numel())
    return [torch.randn(x.shape, dtype=x.dtype, generator=generator) for _ in range(2)]


def test_there_are_enough_of_them() -> None:
    assert len(JACOBIANS) + len(HESSIANS) >= 60


@pytest.mark.parametrize("name", JACOBIANS)
def test_jacobians(name: str) -> None:
    function, x = JACOBIANS[name]
    for point in points(x):
        agrees(chainrule.jacobian(function, layout="sparse_coo")(point).to_dense(), function, point)


@pytest.mark.parametrize("name", HESSIANS)
def test_hessians(name: str) -> None:
    function, x = HESSIANS[name]
    for point in points(x):
        agrees(chainrule.hessian(function, layout="sparse_coo")(point).to_dense(), torch.func.jacrev(function), point)
