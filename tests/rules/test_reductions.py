"""Reductions against torch's own derivatives and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import chainrule
from chainrule.rules import reductions

aten = torch.ops.aten

#: float64 round-off over sums of a few elements.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}

Function = Callable[[torch.Tensor], torch.Tensor]


def _values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


TABLE: dict[Any, list[Function]] = {
    aten.sum.default: [torch.sum],
    aten.sum.dim_IntList: [lambda x: x.sum(-1), lambda x: x.sum((0, -1), keepdim=True)],
    aten.mean.default: [torch.mean],
    aten.mean.dim: [lambda x: x.mean(-1), lambda x: x.mean(0, keepdim=True)],
    aten.nansum.default: [lambda x: x.nansum(-1)],
    aten.logsumexp.default: [lambda x: x.logsumexp(-1), lambda x: x.logsumexp((0, -1))],
    aten.prod.default: [torch.prod],
    aten.prod.dim_int: [lambda x: x.prod(-1), lambda x: x.prod(0, keepdim=True)],
    aten.var.correction: [lambda x: x.var(-1), lambda x: x.var(correction=0), lambda x: x.var((0, -1), keepdim=True)],
    aten.std.correction: [lambda x: x.std(-1), lambda x: x.std(correction=0)],
    aten.var_mean.correction: [lambda x: torch.stack(torch.var_mean(x, -1))],
    aten.std_mean.correction: [lambda x: torch.stack(torch.std_mean(x, 0))],
    aten.linalg_vector_norm.default: [
        lambda x, p=p: torch.linalg.vector_norm(x, p, dim=-1) for p in (0, 0.5, 1, 1.5, 2, 3, 4.5, math.inf, -math.inf)
    ],
    aten.norm.Scalar: [lambda x: aten.norm.Scalar(x, 3)],
    aten.norm.ScalarOpt_dim: [lambda x: aten.norm.ScalarOpt_dim(x, 2, [-1])],
    aten.norm.ScalarOpt_dim_dtype: [lambda x: aten.norm.ScalarOpt_dim_dtype(x, 2, [-1], False, dtype=torch.float64)],
    aten.norm.ScalarOpt_dtype: [lambda x: aten.norm.ScalarOpt_dtype(x, 2, dtype=torch.float64)],
    aten.dist.default: [lambda x, p=p: torch.dist(x, 0.5 * x * x, p) for p in (1, 2, 3, math.inf)],
    aten.amax.default: [lambda x: x.amax(-1), lambda x: x.amax((0, -1)), lambda x: x.amax()],
    aten.amin.default: [lambda x: x.amin(0, keepdim=True)],
    aten.aminmax.default: [lambda x: torch.stack(tuple(torch.aminmax(x, dim=-1)))],
    aten.max.default: [torch.max],
    aten.min.default: [torch.min],
    aten.median.default: [torch.median],
    aten.nanmedian.default: [torch.nanmedian],
    aten.max.dim: [lambda x: x.max(-1).values, lambda x: x.max(0, keepdim=True).values],
    aten.min.dim: [lambda x: x.min(0).values],
    aten.median.dim: [lambda x: x.median(-1).values],
    aten.nanmedian.dim: [lambda x: x.nanmedian(-1, keepdim=True).values],
    aten.mode.default: [lambda x: torch.mode(x, 0).values],
    aten.kthvalue.default: [lambda x: x.kthvalue(2, -1).values],
    aten.sort.default: [lambda x: x.sort(-1).values, lambda x: x.sort(0, descending=True).values],
    aten.sort.stable: [lambda x: x.sort(dim=0, stable=True).values],
    aten.topk.default: [lambda x: x.topk(2, -1).values],
}

# aminmax has no derivative in torch's own autograd before 2.12.
ROWS = [
    pytest.param(f, id=f"{op}-{n}")
    for op, functions in TABLE.items()
    for n, f in enumerate(functions)
    if op != aten.aminmax.default or torch.__version__ >= "2.12"
]


def test_every_op_has_a_row() -> None:
    assert set(reductions.RULES) == set(TABLE)


def _both_modes(function: Function, x: torch.Tensor) -> None:
    expected = torch.func.jacrev(function)(x)
    torch.testing.assert_close(chainrule.jacrev(function)(x), expected, **TOLERANCE)
    torch.testing.assert_close(chainrule.jacfwd(function)(x), expected, **TOLERANCE)


@pytest.mark.parametrize("function", ROWS)
def test_jacobians_agree_with_torch(function: Function) -> None:
    for x in (_values(2, 3), _values(4, 2).t()):
        _both_modes(function, x)


@pytest.mark.parametrize("function", ROWS)
def test_second_order_agrees_with_torch(function: Function) -> None:
    x = _values(2, 3)

    def energy(y: torch.Tensor) -> torch.Tensor:
        return (function(y) ** 2).sum()

    expected = torch.func.jacrev(torch.func.jacrev(energy))(x)
    torch.testing.assert_close(chainrule.jacfwd(chainrule.jacrev(energy))(x), expected, **TOLERANCE)


@pytest.mark.parametrize("function", ROWS)
def test_vmap_over_the_jacobian(function: Function) -> None:
    batch = _values(2, 2, 3)
    expected = torch.stack([torch.func.jacrev(function)(x) for x in batch])
    torch.testing.assert_close(chainrule.vmap(chainrule.jacrev(function))(batch), expected, **TOLERANCE)


@pytest.mark.parametrize("function", ROWS)
def test_directional_derivatives_agree_with_finite_differences(function: Function) -> None:
    x, step = _values(2, 3), 1e-6
    expected = (function(x + step * x) - function(x - step * x)) / (2 * step)
    # Central differences: the step squared and round-off over the step.
    torch.testing.assert_close(chainrule.jvp(function, (x,), (x,))[1], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("zeros", [0, 1, 2, 3])
def test_products_with_zeros_to_second_order(zeros: int) -> None:
    x = _values(4)
    x[:zeros] = 0.0
    _both_modes(torch.prod, x)
    expected = torch.func.hessian(torch.prod)(x)
    torch.testing.assert_close(chainrule.jacfwd(chainrule.jacrev(torch.prod))(x), expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["amax", "amin", "max", "min"])
def test_ties_share_the_derivative(name: str) -> None:
    x = torch.tensor([1.0, 2.0, 2.0, 1.0], dtype=torch.float64)
    _both_modes(lambda y: getattr(y, name)(), x)


def test_ties_of_an_op_that_picks_go_to_its_index() -> None:
    x = torch.tensor([[1.0, 2.0, 2.0], [3.0, 3.0, 1.0]], dtype=torch.float64)
    _both_modes(lambda y: y.max(1).values, x)
    _both_modes(lambda y: y.min(0).values, x)


@pytest.mark.parametrize("order", [0, 0.5, 1, 1.5, 2, 3, math.inf, -math.inf])
def test_norms_of_zero_have_the_zero_subgradient(order: float) -> None:
    _both_modes(lambda y: torch.linalg.vector_norm(y, order), torch.zeros(3, dtype=torch.float64))


def test_flat_deviation_has_the_zero_subgradient() -> None:
    _both_modes(lambda y: torch.std(y), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(
    "function", [torch.sum, torch.mean, torch.prod, torch.amax, torch.max, torch.median, lambda x: x.max(0).values,
                 lambda x: torch.linalg.vector_norm(x), lambda x: torch.logsumexp(x, 0), lambda x: x.prod(0)]
)  # fmt: skip
def test_scalars_and_single_elements(function: Function) -> None:
    _both_modes(function, _values())
    _both_modes(function, _values(1))


def test_empty_sums() -> None:
    for function in (torch.sum, torch.prod, lambda x: x.sum(0), lambda x: torch.linalg.vector_norm(x)):
        _both_modes(function, _values(0))
    _both_modes(lambda x: x.sum(0), _values(0, 2))


def test_single_precision() -> None:
    x = _values(2, 3).float()
    torch.testing.assert_close(chainrule.jacrev(torch.std)(x), torch.func.jacrev(torch.std)(x))


@pytest.mark.parametrize("function", [
    lambda x: x.norm(dim=1).sum(), lambda x: torch.linalg.vector_norm(x, dim=1).sum(), lambda x: x.norm(),
    lambda x: (x / (1 + x.norm(dim=1, keepdim=True))).pow(2).sum(),
])  # fmt: skip
def test_second_derivatives_of_norms_of_zeros(function) -> None:
    """Zero where the norm is, as in torch's forward over reverse mode."""
    zeros, mixed = torch.zeros(3, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    mixed[1] = 0
    for x in (zeros, mixed):
        ones = torch.ones_like(x)
        expected = torch.func.hessian(function)(x)
        for _ in range(3):
            torch.testing.assert_close(chainrule.hessian(function)(x), expected)
            torch.testing.assert_close(chainrule.jacrev(chainrule.jacrev(function))(x), expected)
            product = chainrule.jvp(chainrule.grad(function), (x,), (ones,))[1]
            torch.testing.assert_close(product, torch.func.jvp(torch.func.grad(function), (x,), (ones,))[1])
