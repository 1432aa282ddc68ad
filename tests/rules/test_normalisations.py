"""Softmax-like ops and normalisations against torch's own derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import chainrule
from chainrule.rules import normalisations

aten = torch.ops.aten

#: float64 round-off over sums of a few elements.
TOLERANCE = {"rtol": 1e-8, "atol": 1e-9}

Function = Callable[..., torch.Tensor]


def _values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _zeros_and_ones() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)


def _batch_norm_op(op: Any, *flags: Any) -> Function:
    return lambda x, w, b: op(x, w, b, *_zeros_and_ones(), *flags, 0.1, 1e-5)[0]


X = (2, 4, 3)
TABLE: dict[Any, tuple[Function, tuple[tuple[int, ...], ...]]] = {
    aten._softmax.default: (lambda x: torch.softmax(x, 1), (X,)),
    aten._safe_softmax.default: (lambda x: aten._safe_softmax(x, -1), (X,)),
    aten._log_softmax.default: (lambda x: torch.log_softmax(x, 0), (X,)),
    aten._softmax_backward_data.default: (
        lambda g, y: aten._softmax_backward_data(g, y, 1, torch.float64), ((3, 4), (3, 4))
    ),
    aten._log_softmax_backward_data.default: (
        lambda g, y: aten._log_softmax_backward_data(g, y, 1, torch.float64), ((3, 4), (3, 4))
    ),
    aten.native_layer_norm.default: (lambda x, w, b: F.layer_norm(x, (4, 3), w, b), (X, (4, 3), (4, 3))),
    aten.native_group_norm.default: (lambda x, w, b: F.group_norm(x, 2, w, b), (X, (4,), (4,))),
    aten._fused_rms_norm.default: (lambda x, w: F.rms_norm(x, (3,), w, 1e-5), (X, (3,))),
    aten.native_batch_norm.default: (lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), (X, (4,), (4,))),
    aten._native_batch_norm_legit.default: (_batch_norm_op(aten._native_batch_norm_legit, False), (X, (4,), (4,))),
    aten._native_batch_norm_legit.no_stats: (
        lambda x, w, b: aten._native_batch_norm_legit.no_stats(x, w, b, True, 0.1, 1e-5)[0], (X, (4,), (4,))
    ),
    aten._native_batch_norm_legit_functional.default: (
        _batch_norm_op(aten._native_batch_norm_legit, True), (X, (4,), (4,))
    ),
    aten._native_batch_norm_legit_no_training.default: (
        lambda x, w, b: F.batch_norm(x, *_zeros_and_ones(), w, b), (X, (4,), (4,))
    ),
}  # fmt: skip

#: Forms that only compilers and other devices dispatch; they share the rules above.
WITHOUT_ROW = {
    aten._batch_norm_with_update.default, aten._batch_norm_with_update_functional.default, aten._batch_norm_no_update.default
}  # fmt: skip

ROWS = [pytest.param(*row, id=str(op)) for op, row in TABLE.items()]


def _arguments(shapes: tuple[tuple[int, ...], ...]) -> tuple[torch.Tensor, ...]:
    return tuple(_values(*shape, seed=n) for n, shape in enumerate(shapes))


def test_every_op_has_a_row() -> None:
    assert set(normalisations.RULES) - WITHOUT_ROW == set(TABLE)


@pytest.mark.parametrize(("function", "shapes"), ROWS)
def test_jacobians_agree_with_torch(function: Function, shapes: Any) -> None:
    arguments = _arguments(shapes)
    numbers = tuple(range(len(arguments)))
    expected = torch.func.jacrev(function, numbers)(*arguments)
    torch.testing.assert_close(chainrule.jacrev(function, numbers)(*arguments), expected, **TOLERANCE)
    torch.testing.assert_close(chainrule.jacfwd(function, numbers)(*arguments), expected, **TOLERANCE)


@pytest.mark.parametrize(("function", "shapes"), ROWS)
def test_second_order_agrees_with_torch(function: Function, shapes: Any) -> None:
    arguments = _arguments(shapes)

    def energy(*values: torch.Tensor) -> torch.Tensor:
        return (function(*values) ** 3).sum()

    expected = torch.func.jacrev(torch.func.jacrev(energy))(*arguments)
    torch.testing.assert_close(chainrule.jacfwd(chainrule.jacrev(energy))(*arguments), expected, **TOLERANCE)


@pytest.mark.parametrize(("function", "shapes"), ROWS[:3])
def test_vmap_over_the_jacobian(function: Function, shapes: Any) -> None:
    batch = _values(2, *shapes[0])
    expected = torch.stack([torch.func.jacrev(function)(x) for x in batch])
    torch.testing.assert_close(chainrule.vmap(chainrule.jacrev(function))(batch), expected, **TOLERANCE)


def test_vmap_over_layer_norm() -> None:
    batch = _values(2, 3, 4)
    expected = torch.stack([torch.func.jacrev(lambda x: F.layer_norm(x, (4,)))(x) for x in batch])
    got = chainrule.vmap(chainrule.jacrev(lambda x: F.layer_norm(x, (4,))))(batch)
    torch.testing.assert_close(got, expected, **TOLERANCE)


@pytest.mark.parametrize(("function", "shapes"), ROWS)
def test_directional_derivatives_agree_with_finite_differences(function: Function, shapes: Any) -> None:
    first, *rest = _arguments(shapes)
    step = 1e-6
    expected = (function(first + step * first, *rest) - function(first - step * first, *rest)) / (2 * step)
    _, tangent = chainrule.jvp(lambda x: function(x, *rest), (first,), (first,))
    # Central differences: the step squared and round-off over the step.
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("number", [1, 2])
def test_statistics_are_differentiated_too(number: int) -> None:
    x = _values(3, 4)
    expected_of = {1: lambda v: v.mean(-1, keepdim=True), 2: lambda v: torch.rsqrt(v.var(-1, correction=0, keepdim=True) + 1e-5)}
    got = chainrule.jacrev(lambda v: aten.native_layer_norm(v, [4], None, None, 1e-5)[number])(x)
    torch.testing.assert_close(got, torch.func.jacrev(expected_of[number])(x), **TOLERANCE)


def test_running_statistics_end_as_after_one_plain_forward() -> None:
    x, (mean, variance), (plain_mean, plain_variance) = _values(*X), _zeros_and_ones(), _zeros_and_ones()
    chainrule.jacrev(lambda v: F.batch_norm(v, mean, variance, training=True))(x)
    F.batch_norm(x, plain_mean, plain_variance, training=True)
    torch.testing.assert_close(mean, plain_mean)
    torch.testing.assert_close(variance, plain_variance)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0)], ids=str)
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    x = _values(*shape)
    for function in (torch.softmax, torch.log_softmax):
        expected = torch.zeros((*shape, *shape), dtype=torch.float64)
        if x.numel():
            expected = torch.func.jacrev(lambda v, g=function: g(v, 0))(x)
        torch.testing.assert_close(chainrule.jacrev(lambda v, g=function: g(v, 0))(x), expected, **TOLERANCE)


def test_single_precision() -> None:
    x = _values(2, 5).float()
    torch.testing.assert_close(chainrule.jacrev(lambda v: torch.softmax(v, 1))(x), torch.func.jacrev(lambda v: torch.softmax(v, 1))(x))
