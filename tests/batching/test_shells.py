"""Tensors of a level that were let go and are the next ones: nothing of what they were may be seen."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from chainrule import grad, jacrev, vmap
from chainrule.batching.tensor import BatchTensor
from chainrule.dispatch import KNOWS_STATE

needs_state = pytest.mark.skipif(not KNOWS_STATE, reason="tensors are kept by the compiled handlers alone")

X = torch.linspace(0.5, 2.0, 12, dtype=torch.float64).reshape(3, 4)


def again(function: Callable[..., Any], *args: Tensor, times: int = 4, **options: Any) -> None:
    """Compare several calls with torch's."""
    expected = torch.func.vmap(function, **options)(*args)
    for _ in range(times):
        torch.testing.assert_close(vmap(function, **options)(*args), expected)


@needs_state
def test_one_that_is_let_go_is_the_next_one() -> None:
    met: list[int] = []

    def chain(x: Tensor) -> Tensor:
        for _ in range(4):
            x = x.sin()
            met.append(id(x))
        return x

    again(chain, X)
    met.clear()
    vmap(chain)(X)
    assert len(set(met)) < 4


def test_it_has_nothing_of_what_it_was() -> None:
    found: list[Any] = []

    def leave(x: Tensor) -> Tensor:
        first = x * 2
        first.note = "kept"  # type: ignore[attr-defined]
        second = x * 3
        second.__dict__["hidden"] = 1
        third = x * 5
        third.requires_grad_()
        fourth = x * 7
        fourth.t_() if fourth.dim() == 2 else fourth.unsqueeze_(0)
        fifth = x * 11
        fifth.add_(1.0)
        del first, second, third, fourth, fifth
        for number in range(8):
            y = x * number
            found.append((dict(y.__dict__), y.requires_grad, tuple(y.shape), y.stride(), y._version))
        return x

    for _ in range(4):
        found.clear()
        vmap(leave)(X)
        assert all(entry == ({}, False, (4,), (1,), 0) for entry in found)


def test_weak_references_do_not_find_the_next_one() -> None:
    def refer(x: Tensor) -> Tensor:
        y = x.cos()
        reference = weakref.ref(y)
        del y
        z = x.cos()
        assert reference() is None
        return z

    for _ in range(4):
        torch.testing.assert_close(vmap(refer)(X), X.cos())


def test_what_is_kept_elsewhere_is_kept() -> None:
    kept: list[Any] = []

    def keep(x: Tensor) -> Tensor:
        y = x.exp()
        kept.append(y.inner)  # type: ignore[attr-defined]
        del y
        return (x * 2).sin()

    for _ in range(3):
        kept.clear()
        vmap(keep)(X)
        torch.testing.assert_close(kept[0].value, X.exp())


def test_memory_is_let_go_with_it() -> None:
    seen: list[Any] = []

    def large(x: Tensor) -> Tensor:
        y = x * 2
        seen.append(weakref.ref(y.value))  # type: ignore[attr-defined]
        del y
        assert seen[-1]() is None
        return x + 1

    for _ in range(4):
        vmap(large)(X)


def test_cycles_are_collected() -> None:
    def circle(x: Tensor) -> Tensor:
        cycle: list[Any] = [x * 2, x.sin(), x[1:]]
        cycle.append(cycle)
        del cycle
        gc.collect()
        y = x
        for _ in range(6):
            y = y.cos() + x[0]
        return y

    def plain(x: Tensor) -> Tensor:
        y = x
        for _ in range(6):
            y = y.cos() + x[0]
        return y

    for _ in range(4):
        torch.testing.assert_close(vmap(circle)(X), torch.func.vmap(plain)(X))


def test_inference_mode() -> None:
    def steps(x: Tensor) -> Tensor:
        return (x.reshape(2, 2).T.flatten() * 2).unsqueeze(0).squeeze(0) + x[0]

    for _ in range(3):
        again(steps, X, times=2)
        with torch.inference_mode():
            again(steps, X, times=2)


def test_threads() -> None:
    failed: list[BaseException] = []

    def steps(x: Tensor) -> Tensor:
        for number in range(5):
            x = (x.sin() + x[number % 2]).reshape(2, 2).T.flatten()
        return x

    expected = torch.func.vmap(steps)(X)

    def work() -> None:
        try:
            for _ in range(30):
                torch.testing.assert_close(vmap(steps)(X), expected)
        except BaseException as error:  # noqa: BLE001 - told by the test
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@pytest.mark.parametrize("size", [1, 2, 5])
def test_views_of_many_kinds(size: int) -> None:
    x = torch.randn(size, 3, 4, dtype=torch.float64)

    def views(x: Tensor) -> tuple[Tensor, ...]:
        return (
            x[0], x[-1], x[:, 1], x[1:, ::2], x[..., None], x[None], x.T, x.mT, x.T[2], x[1][2], x[2, 3], x[0][1:], x[:, 0][1],
            x.transpose(0, 1)[1], x.reshape(4, 3)[1], x[1:][0], x.T.reshape(12)[5:],
        )  # fmt: skip

    again(views, x)
    again(views, x.transpose(1, 2).contiguous().transpose(1, 2))
    again(views, x.permute(1, 0, 2), in_dims=1)
    nested = vmap(vmap(lambda row: (row[0] * row, row[1:] - row[:-1], row[::3])))
    expected = torch.func.vmap(torch.func.vmap(lambda row: (row[0] * row, row[1:] - row[:-1], row[::3])))(x)
    for _ in range(4):
        torch.testing.assert_close(nested(x), expected)


def test_attributes_say_what_torch_says() -> None:
    def ask(x: Tensor) -> Tensor:
        assert (x.shape, x.dim(), x.ndim, x.size(), x.size(0), x.size(-1)) == (torch.Size([4]), 1, 1, torch.Size([4]), 4, 4)
        assert (x.numel(), x.stride(), x.is_contiguous(), x.is_floating_point(), x.is_complex()) == (4, (1,), True, True, False)
        assert (x.dtype, x.device, x.layout, x.is_cuda) == (torch.float64, torch.device("cpu"), torch.strided, False)
        with pytest.raises(AttributeError):
            x.shape = (2, 2)  # type: ignore[misc, assignment]
        with pytest.raises(IndexError):
            x.size(3)
        return x

    for _ in range(3):
        vmap(ask)(X)
    assert BatchTensor.shape.__doc__ == Tensor.shape.__doc__
    assert isinstance(vmap(lambda x: x * x.shape[0])(X), Tensor)


def test_function_modes_of_a_user_see_attributes() -> None:
    class Seeing(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(getattr(func, "__name__", "") if not hasattr(func, "__self__") else func.__self__.__name__)
            return func(*args, **(kwargs or {}))

    names: list[str] = []

    def ask(x: Tensor) -> Tensor:
        with Seeing():
            assert x.shape == (4,)
            assert x.dim() == 1
            return torch.nn.functional.relu(x).reshape(2, 2).T.T.reshape(4)

    for _ in range(3):
        names.clear()
        torch.testing.assert_close(vmap(ask)(X), X)
        assert {"shape", "dim", "relu", "T"} <= set(names)


MASK = torch.tensor([True, False, True, True])
CONSTANT = torch.arange(4.0, dtype=torch.float64)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.where(x > 1, x, -x),
        lambda x: torch.where(MASK, x, CONSTANT),
        lambda x: torch.where(MASK, CONSTANT, x),
        lambda x: torch.where(x > 1, CONSTANT, x),
        lambda x: torch.where(x > 1, CONSTANT, 2 * CONSTANT),
        lambda x: torch.where(x > 1, x, 0.0),
        lambda x: torch.where(x[0] > 1, x, -x),
        lambda x: CONSTANT * x,
        lambda x: torch.add(CONSTANT, x),
        lambda x: torch.pow(CONSTANT, x),
        lambda x: torch.sub(CONSTANT, x[0]),
        lambda x: CONSTANT.reshape(2, 2) * x[1],
        lambda x: torch.zeros(4, dtype=x.dtype) + x,
        lambda x: x * torch.ones_like(x) + torch.eye(4, dtype=x.dtype)[1],
        lambda x: torch.eye(2, dtype=x.dtype) - x[0],
        lambda x: CONSTANT.float() + x,
        lambda x: torch.arange(4) * x,
        lambda x: CONSTANT[0] * x[0],
        lambda x: CONSTANT > x,
        lambda x: torch.full((), 2.0, dtype=x.dtype) ** x,
        lambda x: torch.ones(3, 4, dtype=x.dtype) + x,
    ],
)
def test_constants_beside(function: Callable[[Tensor], Tensor]) -> None:
    again(function, X)
    x = X.clone().requires_grad_()
    for _ in range(3):
        found, expected = vmap(function)(x), torch.func.vmap(function)(x)
        torch.testing.assert_close(found, expected)
        if expected.requires_grad:
            torch.testing.assert_close(torch.autograd.grad(found.sum(), x), torch.autograd.grad(expected.sum(), x))


def test_constants_with_graphs() -> None:
    weight = CONSTANT.clone().requires_grad_()
    for _ in range(4):
        found = vmap(lambda x: torch.where(x > 1, weight, x) + weight * x)(X)
        expected = torch.func.vmap(lambda x: torch.where(x > 1, weight, x) + weight * x)(X)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), weight), torch.autograd.grad(expected.sum(), weight))


def test_derivatives_around_and_inside() -> None:
    def steps(x: Tensor) -> Tensor:
        return (torch.nn.functional.relu(x[1:] - x[0]) * x.reshape(2, 2).T.flatten()[1:]).sum()

    for _ in range(4):
        torch.testing.assert_close(vmap(grad(steps))(X), torch.func.vmap(torch.func.grad(steps))(X))
        torch.testing.assert_close(
            jacrev(lambda x: vmap(steps)(x))(X), torch.func.jacrev(lambda x: torch.func.vmap(steps)(x))(X)
        )
