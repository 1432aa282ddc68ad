"""Jacobians under a memory budget and in streamed blocks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import chainrule
from chainrule import RowBlock, jacobian_blocks
from chainrule.execute import memory
from chainrule.execute.engine import CACHE
from chainrule.transforms import jacobians

Tensor = torch.Tensor
WEIGHT = torch.randn(40, 30, dtype=torch.float64)


def field(x: Tensor) -> Tensor:
    return torch.tanh(WEIGHT @ torch.sin(x)).reshape(8, 5)


def peak_bytes(call: Any) -> int:
    """The most that a call holds at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    del result
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("rows", [1, 3, 7, 40, 100])
def test_blocks_are_the_rows(rows: int) -> None:
    x = torch.randn(30, dtype=torch.float64)
    whole = torch.func.jacrev(field)(x).reshape(40, 30)
    end = 0
    for block in jacobian_blocks(field, rows=rows)(x):
        assert isinstance(block, RowBlock)
        assert block.rows.start == end and block.output == 0
        end = block.rows.stop
        torch.testing.assert_close(block.jacobian, whole[block.rows])
    assert end == 40


def test_blocks_of_trees() -> None:
    def function(p: dict[str, Tensor], scale: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y = torch.tanh(p["w"] @ x) * scale
        return y, p["b"].sum(), torch.arange(3.0, dtype=torch.float64), y[:0]

    p = {"w": torch.randn(6, 4, dtype=torch.float64), "b": torch.randn(2, dtype=torch.float64)}
    scale, x = torch.randn((), dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    expected = torch.func.jacrev(function, argnums=(0, 1))(p, scale, x)
    seen = []
    for number, rows, (tree, by_scale) in jacobian_blocks(function, argnums=(0, 1), rows=4)(p, scale, x):
        want_tree, want_scale = expected[number]
        for name in p:
            flat = want_tree[name].reshape(-1, *p[name].shape)
            torch.testing.assert_close(tree[name], flat[rows])
        torch.testing.assert_close(by_scale, want_scale.reshape(-1)[rows])
        seen.append((number, rows.start, rows.stop))
    assert seen == [(0, 0, 4), (0, 4, 6), (1, 0, 1), (2, 0, 3)]


def test_blocks_of_a_hessian() -> None:
    def energy(x: Tensor) -> Tensor:
        return field(x).pow(2).sum()

    x = torch.randn(30, dtype=torch.float64)
    rows = [block.jacobian for block in jacobian_blocks(chainrule.grad(energy), rows=8)(x)]
    torch.testing.assert_close(torch.cat(rows), torch.func.hessian(energy)(x))


def test_the_function_runs_once_and_a_plan_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def function(x: Tensor) -> Tensor:
        runs.append(1)
        return torch.cumsum(torch.sin(x), 0)

    x = torch.randn(100, dtype=torch.float64)
    blocks = list(jacobian_blocks(function, rows=9)(x))
    assert len(blocks) == 12 and len(runs) == 1
    torch.testing.assert_close(torch.cat([b.jacobian for b in blocks]), torch.func.jacrev(torch.cumsum, 0)(x, 0) * torch.cos(x))


def test_streaming_to_disk_holds_one_block(tmp_path: Path) -> None:
    """A Jacobian 40 times larger than what may be allocated, written to a file."""
    n = 600
    weight = torch.randn(n, n, dtype=torch.float64) / n**0.5
    x = torch.randn(n, dtype=torch.float64)
    stored = np.memmap(tmp_path / "jacobian.bin", dtype=np.float64, mode="w+", shape=(n, n))

    def run() -> None:
        def keep(block: RowBlock) -> None:
            stored[block.rows] = block.jacobian.numpy()

        assert jacobian_blocks(lambda x: torch.tanh(weight @ x), max_memory=8 * n * n // 40, callback=keep)(x) is None

    run()
    expected = (1 - torch.tanh(weight @ x) ** 2)[:, None] * weight
    np.testing.assert_allclose(np.asarray(stored), expected.numpy())
    assert peak_bytes(run) <= 8 * n * n // 40


@pytest.mark.parametrize("transform", [chainrule.jacobian, chainrule.jacrev])
def test_a_budget_bounds_what_is_held_beside_the_result(transform: Any) -> None:
    """The layers between would need three times the result; the budget is a fifth of it."""
    n = 300
    first, second = (torch.randn(n, n, dtype=torch.float64) / n**0.5 for _ in range(2))

    def function(x: Tensor) -> Tensor:
        return torch.tanh(second @ torch.tanh(first @ x))

    x = torch.randn(n, dtype=torch.float64)
    budget = 8 * n * n // 5
    bounded = transform(function, max_memory=budget)
    torch.testing.assert_close(bounded(x), torch.func.jacrev(function)(x))
    bounded(x)
    result = 8 * n * n
    assert peak_bytes(lambda: transform(function)(x)) - result > 2 * budget
    assert peak_bytes(lambda: bounded(x)) - result <= budget


def _rolled(x: Tensor) -> Tensor:
    for _ in range(20):
        x = torch.cat([x[1:], (x[0] * x[1]).sin()[None]])
    return x


@pytest.mark.parametrize(
    ("transform", "oracle", "function"),
    [
        (chainrule.hessian, torch.func.hessian, lambda x: x.prod()),
        (chainrule.hessian, torch.func.hessian, lambda x: torch.logcumsumexp(x, 0).square().sum()),
        (chainrule.jacobian, torch.func.jacrev, _rolled),
        (chainrule.jacrev, torch.func.jacrev, _rolled),
    ],
)
@pytest.mark.parametrize("share", [1.2])
def test_a_budget_holds_from_the_first_call_on(transform: Any, oracle: Any, function: Any, share: float) -> None:
    """Blocks that do not fit are not tried. What plans keep (masks, indices) and unknown work space come on top."""
    x = torch.rand(200) / 4 + 0.9
    result = x.nbytes * x.numel()
    budget = int(share * result)
    bounded = transform(function, max_memory=budget)
    CACHE.clear()
    found: list[Tensor] = []
    peaks = [peak_bytes(lambda: found.append(bounded(x)) or found.clear()) for _ in range(3)]
    assert max(peaks) <= 1.6 * (result + budget)
    assert max(peaks[1:]) <= 1.3 * (result + budget)
    expected = oracle(function)(x)
    scale = expected.abs().max().item()
    torch.testing.assert_close(bounded(x), expected, rtol=1e-3, atol=1e-4 * scale)


INNER, OUTER = torch.randn(50, 60), torch.randn(90, 50)
MAPPED: dict[str, tuple[Any, Any, Tensor, float]] = {
    "softmax": (chainrule.jacrev, lambda x: torch.softmax(x, 0), torch.randn(30, 100), 0.1),
    "spectrum": (chainrule.jacobian, lambda x: torch.fft.rfft(x).abs(), torch.randn(20, 128), 0.2),
    "layers": (chainrule.jacrev, lambda x: torch.tanh(OUTER @ torch.tanh(INNER @ x)), torch.randn(40, 60), 0.4),
    "running products": (chainrule.jacobian, lambda x: x.sin().cumsum(0).cos().cumprod(0), torch.rand(20, 80), 0.5),
    "hessian": (chainrule.hessian, lambda x: torch.tanh(INNER @ x).pow(3).sum(), torch.randn(40, 60), 0.5),
    "hessian of a spectrum": (chainrule.hessian, lambda x: torch.fft.rfft(x).abs().sum(), torch.randn(20, 64), 0.3),
}


@pytest.mark.parametrize("name", MAPPED)
def test_a_budget_holds_for_all_samples_of_a_batch(name: str) -> None:
    """Beside the results of the whole batch; they are allocated once."""
    transform, function, x, share = MAPPED[name]
    oracle = torch.func.hessian if transform is chainrule.hessian else torch.func.jacrev
    expected = torch.func.vmap(oracle(function))(x)
    budget = int(share * expected.nbytes)
    mapped, free = chainrule.vmap(transform(function, max_memory=budget)), chainrule.vmap(transform(function))
    for _ in range(4):
        torch.testing.assert_close(mapped(x), expected, rtol=1e-3, atol=1e-4)
        free(x)
    assert peak_bytes(lambda: free(x)) - expected.nbytes > budget  # the budget does bound something
    assert peak_bytes(lambda: mapped(x)) - expected.nbytes <= 1.05 * budget


def test_a_budget_that_is_too_little_for_a_batch_names_the_way_out() -> None:
    x = torch.rand(20, 80)
    function = lambda x: x.sin().cumsum(0).cos().cumprod(0)  # noqa: E731
    bounded = chainrule.jacobian(function, max_memory=20_000)
    with pytest.raises(MemoryError, match="a row for each of 20 samples: give vmap a chunk_size"):
        chainrule.vmap(bounded)(x)
    torch.testing.assert_close(chainrule.vmap(bounded, chunk_size=1)(x), torch.func.vmap(torch.func.jacrev(function))(x))
    # What was found for one size of a batch is not taken for another one.
    assert chainrule.vmap(bounded)(x[:1]).shape == (1, 80, 80)
    with pytest.raises(MemoryError, match="for each of 19 samples"):
        chainrule.vmap(bounded)(x[:19])


def test_a_budget_for_a_hessian() -> None:
    first = torch.randn(200, 100, dtype=torch.float64)

    def energy(x: Tensor) -> Tensor:
        return torch.tanh(first @ x).pow(3).sum()

    x = torch.randn(100, dtype=torch.float64)
    torch.testing.assert_close(chainrule.hessian(energy, max_memory="100KB")(x), torch.func.hessian(energy)(x))
    torch.testing.assert_close(chainrule.hessian(energy, max_memory="1GiB")(x), torch.func.hessian(energy)(x))


def test_too_small_a_budget_is_an_error() -> None:
    x = torch.randn(30, dtype=torch.float64)
    with pytest.raises(MemoryError, match="max_memory"):
        chainrule.jacobian(field, max_memory=100)(x)
    with pytest.raises(MemoryError, match="max_memory"):
        list(jacobian_blocks(field, max_memory=100)(x))


def test_results_beyond_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(30, dtype=torch.float64)
    expected = torch.func.jacrev(field)(x)
    result = 8 * 40 * 30
    monkeypatch.setattr(jacobians, "_LARGE", 1)
    monkeypatch.setattr(jacobians, "free_memory", lambda device: result - 1)
    with pytest.raises(MemoryError, match="jacobian_blocks"):
        chainrule.jacobian(field)(x)
    monkeypatch.setattr(jacobians, "free_memory", lambda device: result + 5000)
    torch.testing.assert_close(chainrule.jacobian(field)(x), expected)
    monkeypatch.setattr(jacobians, "free_memory", lambda device: None)
    torch.testing.assert_close(chainrule.jacobian(field)(x), expected)


def test_free_memory_of_this_machine() -> None:
    free = memory.free_memory(torch.device("cpu"))
    assert free is None or 1 << 20 < free < 1 << 50
    assert memory.free_memory(torch.device("meta")) is None


@pytest.mark.parametrize(("given", "found"), [(7, 7), ("7", 7), ("1.5kB", 1500), ("2 MiB", 1 << 21), ("3GB", 3 * 10**9)])
def test_sizes(given: int | str, found: int) -> None:
    assert memory.parse_bytes(given, "t") == found


@pytest.mark.parametrize("given", ["", "MB", "-3MB", "3 apples", 0, -1, True, 2.5])
def test_sizes_that_are_none(given: Any) -> None:
    with pytest.raises(ValueError, match="max_memory"):
        memory.parse_bytes(given, "t")


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="not both"):
        chainrule.jacobian(field, chunk_size=3, max_memory=10)
    with pytest.raises(ValueError, match="rows"):
        jacobian_blocks(field, rows=0)
    with pytest.raises(ValueError, match="not both"):
        jacobian_blocks(field, rows=2, max_memory=10)
    with pytest.raises(RuntimeError, match="complex"):
        list(jacobian_blocks(lambda x: x, rows=1)(torch.randn(3, dtype=torch.complex128)))


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    x = torch.randn(30, dtype=torch.float64)
    chainrule.jacobian(field, chunk_size=8, progress=True)(x)
    chainrule.jacfwd(field, chunk_size=8, progress=True)(x)
    list(jacobian_blocks(field, rows=8, progress=True)(x))
    shown = capsys.readouterr().err
    assert "5/5" in shown and "4/4" in shown and "jacobian_blocks" in shown


def test_progress_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="progress"):
        chainrule.jacobian(field, chunk_size=8, progress=True)(torch.randn(30, dtype=torch.float64))


def test_the_callers_settings_hold_between_blocks() -> None:
    x = torch.randn(30, dtype=torch.float64)
    for block in jacobian_blocks(field, rows=20)(x):
        assert torch.is_grad_enabled()
        assert not block.jacobian.requires_grad


@pytest.mark.parametrize("what", ["input", "part of the input", "closed over", "parameter"])
def test_writes_between_blocks_are_refused(what: str) -> None:
    weight, layer = torch.randn(6, 4, dtype=torch.float64), torch.nn.Linear(4, 6, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        y = torch.sin(weight @ x)
        y[1:] *= 2  # the function's own writes are none between blocks
        return y * layer(x)

    x = torch.randn(4, dtype=torch.float64)
    whole = torch.func.jacrev(function)(x)
    for block in jacobian_blocks(function, rows=2)(x):
        torch.testing.assert_close(block.jacobian, whole[block.rows])
    blocks = jacobian_blocks(function, rows=2)(x)
    next(blocks)
    written = {"input": x, "part of the input": x[1:], "closed over": weight, "parameter": layer.weight}[what]
    with torch.no_grad():
        written.mul_(2)
    with pytest.raises(RuntimeError, match="was written to between two blocks"):
        next(blocks)


@pytest.mark.parametrize("rows", [1.5, "x"])
def test_rows_have_to_be_whole(rows: Any) -> None:
    with pytest.raises(TypeError, match="jacobian_blocks: rows should be an int greater than 0"):
        jacobian_blocks(field, rows=rows)


REVERSE: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Any]]] = {
    "grad": chainrule.grad,
    "jacrev": chainrule.jacrev,
    "vjp": lambda f: lambda x: chainrule.vjp(f, x)[1](torch.ones((), dtype=torch.float64)),
    "hessian": chainrule.hessian,
    "grad of vmap": lambda f: chainrule.grad(lambda x: chainrule.vmap(f)(x.expand(2, -1)).sum()),
    "vmap of grad": lambda f: lambda x: chainrule.vmap(chainrule.grad(f))(x.expand(2, -1)),
    "compiled": lambda f: chainrule.compile(chainrule.grad(f)),
}


def _of_argument(x: Tensor) -> Tensor:
    return torch.stack([block.jacobian.sum() for block in jacobian_blocks(lambda y: y**3, rows=1)(x)]).sum()


def _of_closed_over(x: Tensor) -> Tensor:
    fixed = torch.ones(3, dtype=torch.float64)
    return torch.stack([block.jacobian.sum() for block in jacobian_blocks(lambda y: x * y, rows=1)(fixed)]).sum()


@pytest.mark.parametrize("function", [_of_argument, _of_closed_over])
@pytest.mark.parametrize("transform", REVERSE)
def test_gradients_through_blocks_are_refused(transform: str, function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, dtype=torch.float64)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="blocks are constants"):
            REVERSE[transform](function)(x)


def test_blocks_of_constants_and_tangents_of_blocks() -> None:
    for _ in range(3):
        x = torch.randn(3, dtype=torch.float64)
        share = 3 * x.square().sum()
        detached = chainrule.grad(lambda y: y.square().sum() * _of_argument(y.detach()))(x)
        torch.testing.assert_close(detached, 2 * x * share)

        def without_grad(y: Tensor) -> Tensor:
            with torch.no_grad():
                constant = _of_argument(y)
            return y.square().sum() * constant

        torch.testing.assert_close(chainrule.grad(without_grad)(x), 2 * x * share)
        torch.testing.assert_close(chainrule.jacfwd(_of_argument)(x), 6 * x)
