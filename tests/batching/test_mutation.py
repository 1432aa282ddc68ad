"""In-place writes, views and `out=` inside a mapped function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from chainrule.transforms.vmap import vmap

Function = Callable[[Tensor], object]


def fill_fresh(x: Tensor) -> Tensor:
    out = torch.zeros(3, dtype=x.dtype)
    out[0] = x.sum()
    out[1:] = x[:2]
    return out


def views_around_the_write(x: Tensor) -> tuple[Tensor, ...]:
    out = torch.zeros(2, 3, dtype=x.dtype)
    before = out[1]
    deep = before[1:]
    out[1, 2] = x[0]
    after = out.t()
    after[0].add_(x[1])
    deep.mul_(2)
    return out, before, deep, after


def write_through_view(x: Tensor) -> Tensor:
    out = torch.arange(6, dtype=x.dtype)
    out.view(2, 3)[1].copy_(x)
    return out


def write_into_expanded(x: Tensor) -> Tensor:
    out = torch.zeros(1, dtype=x.dtype).expand(3).clone()
    out += x
    return out


def transposed_in_place(x: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.zeros(2, 3, dtype=x.dtype)
    row = out[0]
    out.t_()
    out[1, 0] = x[2]
    return out, row


def unsqueezed_in_place(x: Tensor) -> Tensor:
    x = x.clone()
    x.unsqueeze_(0)
    x.t_()
    return x.squeeze_(1)


def chain_of_views(x: Tensor) -> Tensor:
    x = x.clone()
    x[1:] += x[:1]
    view = x[::2]
    view.mul_(3)
    x[0], x[1] = x[1].clone(), x[0].clone()
    return x


def masked_assignment(x: Tensor) -> Tensor:
    x = x.clone()
    x[x > 0] = -1
    x[torch.tensor([0, 2])] += 1
    return x


def masked_assignment_of_batched_scalar(x: Tensor) -> Tensor:
    out = torch.zeros(3, dtype=x.dtype)
    out[x > 0] = x.sum()
    return out


def out_keyword(x: Tensor) -> Tensor:
    first = torch.empty(3, dtype=x.dtype)
    torch.add(x, 1, out=first)
    values, indices = torch.empty(2, dtype=x.dtype), torch.empty(2, dtype=torch.long)
    torch.topk(x, 2, out=(values, indices))
    return torch.cat([first, values, indices])


def strided_write(x: Tensor) -> Tensor:
    out = torch.zeros(2, 3, dtype=x.dtype).t()
    out.as_strided((3,), (1,), 1).copy_(x)
    return out


def functional_in_place(x: Tensor) -> Tensor:
    out = torch.zeros(3, 2, dtype=x.dtype)
    out.index_add_(0, torch.tensor([0, 2, 2]), torch.stack([x, x], 1))
    out.scatter_(0, torch.tensor([[1, 1]]), x[:2].unsqueeze(0))
    out.clamp_(max=x[0])
    out.cumsum_(0)
    out.masked_fill_(out > 2, 0.5)
    return out.fill_diagonal_(4)


def zero_then_add(x: Tensor) -> Tensor:
    total = torch.zeros((), dtype=x.dtype)
    for value in x:
        total += value
    return total


FUNCTIONS = [
    fill_fresh,
    views_around_the_write,
    write_through_view,
    write_into_expanded,
    transposed_in_place,
    unsqueezed_in_place,
    chain_of_views,
    masked_assignment,
    masked_assignment_of_batched_scalar,
    out_keyword,
    strided_write,
    functional_in_place,
    zero_then_add,
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_writes(function: Function) -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    samples = [function(sample) for sample in x.clone()]
    results = vmap(function)(x)
    if isinstance(results, Tensor):
        results, samples = (results,), [(sample,) for sample in samples]
    for result, *wanted in zip(results, *samples, strict=True):
        torch.testing.assert_close(result, torch.stack(wanted))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_writes_nested(function: Function) -> None:
    x = torch.randn(2, 3, 3, dtype=torch.float64)

    def first(sample: Tensor) -> Tensor:
        result = function(sample)
        return result if isinstance(result, Tensor) else result[0]  # type: ignore[index]

    wanted = torch.stack([torch.stack([first(sample) for sample in rows]) for rows in x.clone()])
    torch.testing.assert_close(vmap(vmap(first))(x), wanted)
    torch.testing.assert_close(
        vmap(lambda a, b: vmap(lambda r: first(r + a))(b), (0, None))(x[:, 0] * 0, x[0]),
        wanted[:1].expand(2, -1, *wanted.shape[2:]),
    )


@pytest.mark.parametrize(
    "function", [f for f in FUNCTIONS if f not in (out_keyword, masked_assignment, views_around_the_write)]
)
def test_gradient_through_writes(function: Function) -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def first(sample: Tensor) -> Tensor:
        result = function(sample * weight)
        return result if isinstance(result, Tensor) else result[0]  # type: ignore[index]

    wanted = torch.autograd.grad(torch.stack([first(sample) for sample in x]).pow(2).sum(), (x, weight))
    actual = torch.autograd.grad(vmap(first)(x).pow(2).sum(), (x, weight))
    torch.testing.assert_close(actual, wanted)


def test_input_is_written_as_in_torch() -> None:
    ours, theirs = torch.ones(3, 2), torch.ones(3, 2)
    vmap(lambda x: x.add_(1))(ours)
    torch.vmap(lambda x: x.add_(1))(theirs)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "write",
    [
        lambda captured, x: captured.add_(x),
        lambda captured, x: captured[0].copy_(x[0]),
        lambda captured, x: captured.index_put_((torch.tensor([0]),), x[:1]),
        lambda captured, x: torch.add(x, 1, out=captured),
    ],
)
def test_write_of_a_mapped_value_to_a_captured_tensor_is_refused(write: Callable[[Tensor, Tensor], Tensor]) -> None:
    captured = torch.zeros(3)
    with pytest.raises(RuntimeError, match="outside"):
        vmap(lambda x: write(captured, x))(torch.ones(2, 3))
    assert torch.equal(captured, torch.zeros(3))


def test_write_of_a_constant_to_a_captured_tensor() -> None:
    captured = torch.zeros(3)
    vmap(lambda x: x + captured.add_(1))(torch.ones(2, 3))
    assert torch.equal(captured, torch.ones(3))


def test_stale_saved_tensor_is_noticed() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    result = vmap(lambda sample: sample.sigmoid().add_(1))(x)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        result.sum().backward()


def test_in_place_shape_is_that_of_the_sample() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        vmap(lambda x: x.clone().add_(torch.ones(1, 3)))(torch.ones(2, 3))


@pytest.mark.parametrize("other", ["number", "vector", "batched", "itself", "short"])
def test_arithmetic_in_place(other: str) -> None:
    """The tensor that was written is returned, and the memory of the caller changes where torch's does."""
    vector = torch.rand(4)

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        beside: Any = {"number": 1.5, "vector": vector, "batched": y, "itself": x, "short": y[0]}[other]
        z = x.clone()
        part = z[0]
        assert z.add_(beside) is z
        z *= 2
        assert z.sub_(beside).sqrt_() is z
        z /= 3.0
        x.mul_(beside)
        return z, part, x + 1

    for _ in range(4):
        x, y = torch.rand(3, 2, 4) + 1, torch.rand(3, 2, 4) / 4
        own, torchs = x.clone(), x.clone()
        found, expected = vmap(function)(own, y), torch.vmap(function)(torchs, y)
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, equal_nan=True)
        torch.testing.assert_close(own, torchs)
