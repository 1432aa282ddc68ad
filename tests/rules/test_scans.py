"""Scans against torch's own derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import chainrule
from chainrule.execute.engine import CACHE
from chainrule.rules import scans

aten = torch.ops.aten

#: float64 round-off over a handful of products.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}

TABLE: dict[Any, Callable[[torch.Tensor, int], torch.Tensor]] = {
    aten.cumsum.default: torch.cumsum,
    aten.cumprod.default: torch.cumprod,
    aten.logcumsumexp.default: torch.logcumsumexp,
    aten.cummax.default: lambda x, dim: torch.cummax(x, dim).values,
    aten.cummin.default: lambda x, dim: torch.cummin(x, dim).values,
}

ROWS = [pytest.param(f, id=str(op)) for op, f in TABLE.items()]

Scan = Callable[[torch.Tensor, int], torch.Tensor]


def _values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_every_op_has_a_row() -> None:
    assert set(scans.RULES) == set(TABLE)


@pytest.mark.parametrize("scan", ROWS)
@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3), (2, 1, 3)], ids=str)
def test_jacobians_agree_with_torch(scan: Scan, shape: tuple[int, ...]) -> None:
    x = _values(*shape)
    for dim in range(max(len(shape), 1)):
        expected = torch.func.jacrev(scan)(x, dim)
        torch.testing.assert_close(chainrule.jacrev(scan)(x, dim), expected, **TOLERANCE)
        torch.testing.assert_close(chainrule.jacfwd(scan)(x, dim), expected, **TOLERANCE)


@pytest.mark.parametrize("scan", ROWS)
def test_second_order_and_vmap_agree_with_torch(scan: Scan) -> None:
    x = _values(3, 3)

    def energy(y: torch.Tensor) -> torch.Tensor:
        return (scan(y, 0) ** 2).sum()

    expected = torch.func.jacrev(torch.func.jacrev(energy))(x)
    torch.testing.assert_close(chainrule.jacfwd(chainrule.jacrev(energy))(x), expected, **TOLERANCE)
    each = torch.stack([torch.func.jacrev(scan)(row, 0) for row in x])
    torch.testing.assert_close(chainrule.vmap(chainrule.jacrev(lambda y: scan(y, 0)))(x), each, **TOLERANCE)


@pytest.mark.parametrize("zeros", [[0], [1], [1, 2], [0, 3], [0, 1, 2, 3]], ids=str)
def test_cumulative_products_with_zeros_to_second_order(zeros: list[int]) -> None:
    x = _values(4)
    x[zeros] = 0.0

    def total(y: torch.Tensor) -> torch.Tensor:
        return torch.cumprod(y, 0)

    # Written out as products, which torch differentiates without division.
    def written(y: torch.Tensor) -> torch.Tensor:
        steps = [y[0]]
        for k in range(1, 4):
            steps.append(steps[-1] * y[k])
        return torch.stack(steps)

    torch.testing.assert_close(chainrule.jacrev(total)(x), torch.func.jacrev(written)(x), **TOLERANCE)
    torch.testing.assert_close(chainrule.jacfwd(total)(x), torch.func.jacrev(written)(x), **TOLERANCE)
    second = chainrule.jacfwd(chainrule.jacrev(total))(x)
    torch.testing.assert_close(second, torch.func.jacfwd(torch.func.jacrev(written))(x), **TOLERANCE)


@pytest.mark.parametrize("scan", ROWS)
def test_ties_empty_and_single_precision(scan: Scan) -> None:
    for x in (torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0], dtype=torch.float64), _values(3).float()):
        torch.testing.assert_close(chainrule.jacrev(scan)(x, 0), torch.func.jacrev(scan)(x, 0))
    assert chainrule.jacrev(scan)(_values(0), 0).shape == (0, 0)


@pytest.mark.parametrize("scan", ROWS)
def test_directional_derivatives_agree_with_finite_differences(scan: Scan) -> None:
    x, step = _values(3, 2), 1e-6
    expected = (scan(x + step * x, 0) - scan(x - step * x, 0)) / (2 * step)
    # Central differences: the step squared and round-off over the step.
    torch.testing.assert_close(chainrule.jvp(lambda y: scan(y, 0), (x,), (x,))[1], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scan", ROWS)
@pytest.mark.parametrize("shape", [(3,), (8,), (5, 3), (2, 4, 3)], ids=str)
def test_long_lines_as_recurrences(scan: Scan, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Products without the triangle, and the derivatives of these."""
    monkeypatch.setattr(scans, "_SHORT", 2)
    CACHE.clear()
    x, v = _values(*shape), _values(2, *shape)[1]
    for dim in range(len(shape)):
        expected = torch.func.jacrev(scan)(x, dim).reshape(x.numel(), x.numel())
        for _ in range(2):  # planned, then replayed
            pushed = chainrule.jvp(lambda y, d=dim: scan(y, d), (x,), (v,))[1]
            torch.testing.assert_close(pushed.reshape(-1), expected @ v.reshape(-1), **TOLERANCE)
            (pulled,) = chainrule.vjp(lambda y, d=dim: scan(y, d), x)[1](v)
            torch.testing.assert_close(pulled.reshape(-1), expected.T @ v.reshape(-1), **TOLERANCE)
        # Linear in the tangent, at zero as everywhere.
        push = lambda t, d=dim: chainrule.jvp(lambda y: scan(y, d), (x,), (t,))[1]  # noqa: E731
        found = chainrule.jacrev(push)(torch.zeros_like(v)).reshape(expected.shape)
        torch.testing.assert_close(found, expected, **TOLERANCE)
        energy = lambda y, d=dim: (scan(y, d) ** 2).sum()  # noqa: E731
        torch.testing.assert_close(chainrule.hessian(energy)(x), torch.func.hessian(energy)(x), **TOLERANCE)
    CACHE.clear()


def test_long_cumulative_products_with_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scans, "_SHORT", 2)
    CACHE.clear()
    test_cumulative_products_with_zeros_to_second_order([0, 3])
    test_cumulative_products_with_zeros_to_second_order([1, 2])
    x, t = torch.tensor([2.0, 0.0, 3.0, 0.0, 5.0]), torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
    # Products of all others by hand: 1; 2; 2·3; nothing is left once two are zero.
    assert chainrule.jvp(lambda y: torch.cumprod(y, 0), (x,), (t,))[1].tolist() == [1.0, 2.0, 6.0, 0.0, 0.0]
    CACHE.clear()


#: Functions with a scan between other ops: what their Jacobians are read for must not need the triangle.
AROUND: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda x: (x**2).cumsum(0).sin(),
    "sum of a sum": lambda x: (x**2).cumsum(0).sin().cumsum(0) * x,
    "backwards": lambda x: (x**2).flip(0).cumsum(0).flip(0) * x,
    "product": lambda x: (x**2).cumprod(0).sin(),
    "logarithm": lambda x: (x * 2).logcumsumexp(0).sin(),
    "rows": lambda x: torch.outer(x, x.cos()).cumsum(0).sin().diagonal(),
    "columns": lambda x: torch.outer(x, x.cos()).cumprod(1).sin()[:, 1],
    "gathered": lambda x: x[torch.arange(len(x)).flip(0)].cumsum(0)[torch.arange(len(x)) // 2],
    "two": lambda x: x.cumsum(0) * x.cumprod(0) + x.roll(1).cumsum(0),
}


@pytest.mark.parametrize("name", AROUND)
def test_what_is_read_off_the_jacobian_of_a_scan(name: str) -> None:
    """Planned and replayed, with a zero among the values and without."""
    function = AROUND[name]
    for x in (_values(1, 7)[0], torch.tensor([0.5, -1.0, 0.0, 2.0, 1.5], dtype=torch.float64)):
        for _ in range(2):
            J, M = chainrule.linear_map(function, x), torch.func.jacrev(function)(x)
            torch.testing.assert_close(J.dense(), M, **TOLERANCE)
            torch.testing.assert_close(J.diagonal(), M.diagonal(), **TOLERANCE)
            torch.testing.assert_close(J.trace(), M.trace(), **TOLERANCE)
            torch.testing.assert_close(J.norm(), M.norm(), **TOLERANCE)
            torch.testing.assert_close(J.gram().diagonal(), (M @ M.T).diagonal(), **TOLERANCE)
            torch.testing.assert_close((J.normal() + 2 * J @ J).trace(), (M.T @ M + 2 * M @ M).trace(), **TOLERANCE)
            torch.testing.assert_close(chainrule.divergence(function)(x), M.trace(), **TOLERANCE)
    x = _values(1, 5)[0]
    read = lambda x: chainrule.linear_map(function, x).diagonal().square().sum()  # noqa: E731
    step = 1e-6 * torch.eye(5, dtype=torch.float64)
    # torch.func's second derivatives of logcumsumexp are wrong (torch 2.13): central differences, the step squared and
    # round-off over the step.
    expected = torch.stack([(read(x + e) - read(x - e)) / 2e-6 for e in step])
    torch.testing.assert_close(chainrule.grad(read)(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["sum", "product", "logarithm"])
def test_diagonals_of_long_scans_take_memory_in_their_length(name: str) -> None:
    """By the plan and by the allocator; the triangle would take 32 MB."""
    x = torch.rand(2000, dtype=torch.float64) + 0.5
    reads = {"diagonal": lambda J: J.diagonal(), "trace": lambda J: J.trace()}
    if name == "sum":
        reads |= {"norm": lambda J: J.norm(), "gram": lambda J: J.gram().diagonal(), "normal": lambda J: J.normal().trace()}
    for kind, read in reads.items():
        J = chainrule.linear_map(AROUND[name], x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            read(J)
        sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        assert max(sizes) <= 2 * x.numel() * 8, kind
