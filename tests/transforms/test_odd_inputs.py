"""Budgets, blocks, chunks, compiled calls and accounts on odd inputs: empty, strided, half precision, threads, errors."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils._pytree import tree_leaves

import chainrule

Tensor = torch.Tensor


def function(x: Tensor) -> Tensor:
    return torch.tanh(x.sin() * 2).cumsum(0)


INPUTS: dict[str, Tensor] = {
    "empty": torch.randn(0),
    "one": torch.randn(1),
    "no rows": torch.randn(0, 3),
    "no columns": torch.randn(3, 0),
    "transposed": torch.randn(6, 4).t(),
    "strided": torch.randn(10)[::2],
    "expanded": torch.randn(1).expand(5),
    "double": torch.randn(5, dtype=torch.float64),
    "half": torch.randn(5).half(),
    "bfloat16": torch.randn(5).bfloat16(),
}
TRANSFORMS: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "budget": lambda f: chainrule.jacobian(f, max_memory="1MB"),
    "small budget": lambda f: chainrule.jacrev(f, max_memory="5KB"),
    "rows": lambda f: chainrule.jacrev(f, chunk_size=2),
    "columns": lambda f: chainrule.jacfwd(f, chunk_size=2),
    "compiled": lambda f: chainrule.compile(chainrule.jacobian(f)),
    "compiled rows": lambda f: chainrule.compile(chainrule.jacobian(f, chunk_size=2)),
    "compiled budget": lambda f: chainrule.compile(chainrule.jacobian(f, max_memory="1MB")),
    "explained": lambda f: lambda x: chainrule.explain(chainrule.jacobian(f))(x).result,
}


def assert_close(found: Any, wanted: Any) -> None:
    """Two orders of operations; a half-precision number has three digits (bfloat16: two), the sums a few terms."""
    for one, two in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        assert one.shape == two.shape and one.dtype == two.dtype
        limit = 8 * torch.finfo(two.dtype).eps
        torch.testing.assert_close(one, two, rtol=limit, atol=limit * max(1.0, float(two.abs().max()) if two.numel() else 1.0))


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_odd_inputs(kind: str, name: str) -> None:
    x = INPUTS[name]
    wanted, transformed = torch.func.jacrev(function)(x), TRANSFORMS[kind](function)
    for _ in range(3):
        assert_close(transformed(x), wanted)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("options", [{}, {"rows": 2}, {"max_memory": "5KB"}])
def test_blocks_of_odd_inputs(options: dict[str, Any], name: str) -> None:
    x = INPUTS[name]
    wanted = torch.func.jacrev(function)(x).reshape(x.numel(), *x.shape)
    blocks = list(chainrule.jacobian_blocks(function, **options)(x))
    assert_close(torch.cat([wanted[:0], *(block.jacobian for block in blocks)]), wanted)


class OwnError(Exception):
    pass


def failing(x: Tensor) -> Tensor:
    raise OwnError


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_errors_of_the_function_leave_nothing_behind(kind: str) -> None:
    with pytest.raises(OwnError):
        TRANSFORMS[kind](failing)(torch.ones(3))
    assert torch.is_grad_enabled()
    assert not torch._C._len_torch_dispatch_stack() and not torch._C._len_torch_function_stack()
    assert not torch._C._autograd._profiler_enabled()


def test_iterators_side_by_side_and_left_early() -> None:
    x, y = torch.randn(5), torch.randn(5)
    first, second = chainrule.jacobian_blocks(function, rows=1)(x), chainrule.jacobian_blocks(function, rows=2)(y)
    rows, others = [], []
    for _ in range(3):
        rows.append(next(first).jacobian)
        others.append(next(second).jacobian)
    first.close()
    assert_close(torch.cat(rows), torch.func.jacrev(function)(x)[:3])
    assert_close(torch.cat(others), torch.func.jacrev(function)(y))


@pytest.mark.parametrize("kind", ["budget", "compiled", "explained"])
def test_threads(kind: str) -> None:
    transformed, problems = TRANSFORMS[kind](function), list[Exception]()
    inputs = [torch.randn(3 + number % 4) for number in range(12)]

    def work(start: int) -> None:
        try:
            for number in range(4):
                x = inputs[(start + number) % len(inputs)]
                assert_close(transformed(x), torch.func.jacrev(function)(x))
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_predictions_change_nothing() -> None:
    """The calls that are run once more for a prediction draw no random numbers and update no statistics."""
    x = torch.randn(8, 4)
    norm = torch.nn.BatchNorm1d(4).requires_grad_(False)
    found = []
    for kind in ("compiled", "budget", "explained"):
        module = copy.deepcopy(norm)
        transformed = TRANSFORMS[kind](lambda x, m=module: F.dropout(m(x), 0.5).sum(0))
        torch.manual_seed(0)
        for _ in range(2):
            result = transformed(x)
        found.append((result, module.running_mean, torch.rand(1)))
    for other in found[1:]:
        assert_close(other, found[0])
