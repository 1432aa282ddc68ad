"""Tensors that a mapped function makes, and writes values of the samples to: they carry the batch from there on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import chainrule
from chainrule.batching.level import Level
from chainrule.batching.mode import VmapMode
from chainrule.dispatch import KNOWS_STATE
from chainrule.execute.mapped_calls import CALLS, Replay
from chainrule.shortcuts import COMPILED

D = torch.float64
compiled_only = pytest.mark.skipif(not (COMPILED and KNOWS_STATE), reason="the compiled handlers do it")


def rows(x: Tensor) -> Tensor:
    out = torch.zeros(2, 3, dtype=x.dtype)
    out[0] = x[:3]
    out[1, -1] = x[-1] * x[0]
    return out


def columns(x: Tensor) -> Tensor:
    out = torch.ones(3, 2, dtype=x.dtype).t()
    out[1] = x[:3]
    return out


def scalar(x: Tensor) -> Tensor:
    out = torch.full((), 2.0, dtype=x.dtype)
    out[...] = x[1]
    return out * x


def empty(x: Tensor) -> Tensor:
    out = torch.zeros(0, 2, dtype=x.dtype)
    out[:, 0] = x[0]
    return out.sum() + x


def expanded_one(x: Tensor) -> Tensor:
    out = torch.zeros(1, 1, dtype=x.dtype)
    out[0, 0] = x[2]
    return out.expand(2, 3)


def after_a_view(x: Tensor) -> Tensor:
    out = torch.zeros(4, dtype=x.dtype)
    part = out[1:]
    out[2] = x[0]
    part[0] = x[1]
    return torch.cat([out, part])


def kept_beside(x: Tensor) -> Tensor:
    out = torch.zeros(2, dtype=x.dtype)
    before = out.clone()
    out[0] = x[3]
    out += 1.0
    before[1] = x[0]
    return out * before


def whole_numbers(x: Tensor) -> Tensor:
    out = torch.zeros(2, dtype=torch.long)
    out[0] = (x[0] > 0).long()
    return out * x[:2]


def constants_like(x: Tensor) -> Tensor:
    zero = torch.zeros_like(x[0])
    one = torch.ones_like(zero)
    one_more = torch.full_like(one, 3.0)
    out = torch.stack([x[0], one, zero, one_more, x[-1]])
    one.mul_(x[1])
    return torch.cat([out, one[None], torch.ones_like(zero)[None]])


FUNCTIONS = [rows, columns, scalar, empty, expanded_one, after_a_view, kept_beside, whole_numbers, constants_like]


def _looped(f: Any, x: Tensor) -> Tensor:
    return torch.stack([f(row) for row in x.unbind(0)])


@pytest.mark.parametrize("f", FUNCTIONS)
@pytest.mark.parametrize("batch", [1, 3])
def test_each_sample_has_its_own(f: Any, batch: int) -> None:
    mapped = chainrule.vmap(f)
    for _ in range(5):
        x = torch.randn(batch, 4, dtype=D)
        torch.testing.assert_close(mapped(x), _looped(f, x))
        turned = torch.randn(4, batch, dtype=D)
        torch.testing.assert_close(chainrule.vmap(f, in_dims=1)(turned), _looped(f, turned.t()))


@pytest.mark.parametrize("f", FUNCTIONS)
def test_derivatives_and_nests(f: Any) -> None:
    for _ in range(3):
        x = torch.randn(2, 3, 4, dtype=D)
        flat = x.flatten(0, 1)
        found = chainrule.vmap(chainrule.vmap(f))(x)
        torch.testing.assert_close(found.flatten(0, 1), _looped(f, flat))
        expected = torch.stack([torch.autograd.functional.jacobian(f, row) for row in flat])
        torch.testing.assert_close(chainrule.vmap(chainrule.jacrev(f))(flat), expected)
        whole = chainrule.jacfwd(chainrule.vmap(f))(flat)
        blocks = torch.stack([whole[n].select(-2, n) for n in range(len(flat))])
        torch.testing.assert_close(blocks, expected)


def test_a_graph_reaches_the_results() -> None:
    for _ in range(4):
        x = torch.randn(3, 4, dtype=D, requires_grad=True)
        found, expected = chainrule.vmap(rows)(x), _looped(rows, x)
        weights = torch.randn_like(expected)
        (one,), (other,) = (torch.autograd.grad((item * weights).sum(), x) for item in (found, expected))
        torch.testing.assert_close(one, other)


def test_outside_tensors_are_refused() -> None:
    outside = torch.zeros(4, dtype=D)

    def write(x: Tensor) -> Tensor:
        outside[0] = x[0]
        return x

    with pytest.raises(RuntimeError, match="came from outside"):
        chainrule.vmap(write)(torch.randn(3, 4, dtype=D))
    assert outside.eq(0).all()


@compiled_only
def test_whole_tensors_take_no_way_through_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a tensor was upgraded in Python")

    x = torch.randn(3, 4, dtype=D)
    mapped = chainrule.vmap(rows)
    for _ in range(3):
        mapped(x)
    monkeypatch.setattr(Level, "upgrade", refuse)
    torch.testing.assert_close(mapped(x), _looped(rows, x))


@compiled_only
def test_what_is_made_of_constants_is_replayed() -> None:
    CALLS.known.clear()
    mapped = chainrule.vmap(constants_like)
    for _ in range(5):
        mapped(torch.randn(3, 4, dtype=D))
    found = {key[0]: value for key, value in CALLS.known.items() if key[0] in (torch.ones_like, torch.full_like)}
    assert set(found) == {torch.ones_like, torch.full_like}
    assert all(isinstance(value, Replay) for value in found.values())


@pytest.mark.parametrize("transform", ["vmap", "vmap of grad"])
def test_a_graph_that_is_written_to_a_tensor(transform: str) -> None:
    weight = torch.randn(4, dtype=D, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        out = torch.zeros(4, dtype=D) + 0.5
        out.copy_((weight * x).sin())
        out.mul_(x).add_(weight)
        return out

    def total(x: Tensor) -> Tensor:
        return f(x).square().sum()

    for _ in range(4):
        x = torch.randn(3, 4, dtype=D)
        found = chainrule.vmap(f if transform == "vmap" else chainrule.grad(total))(x)
        leaf = x.clone().requires_grad_()
        written = (weight * leaf).sin() * leaf + weight
        expected = written if transform == "vmap" else torch.autograd.grad(written.square().sum(), leaf, create_graph=True)[0]
        torch.testing.assert_close(found, expected)
        weights = torch.randn_like(x)
        (one,), (other,) = (torch.autograd.grad((item * weights).sum(), weight, retain_graph=True) for item in (found, expected))
        torch.testing.assert_close(one, other)


ACTIVATIONS = {
    "abs_": lambda y: y.abs_(),
    "copysign_": lambda y: y.copysign_(y.detach().sin()),
    "hardswish": lambda y: torch.nn.functional.hardswish(y, inplace=True),
    "mish": lambda y: torch.nn.functional.mish(y, inplace=True),
    "threshold": lambda y: torch.nn.functional.threshold(y, 0.1, 0.2, inplace=True),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_backward_through_writes_of_functions(name):
    """What torch's autograd keeps of the argument is not written to."""
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def function(sample):
        y = sample * 2
        returned = ACTIVATIONS[name](y)
        return (y * returned * sample).sum()

    expected = torch.stack([function(sample) for sample in x])
    found = chainrule.vmap(function)(x)
    torch.testing.assert_close(found, expected)
    slopes = torch.autograd.grad(expected.sum(), x, create_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], slopes)
    mapped = chainrule.vmap(chainrule.grad(function))(x)
    torch.testing.assert_close(mapped, slopes)
    torch.testing.assert_close(
        torch.autograd.grad(mapped.square().sum(), x)[0], torch.autograd.grad(slopes.square().sum(), x)[0]
    )


def _slices(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[1:] += x[:-1]
    return out


def _under_another_dimension(x: Tensor) -> Tensor:
    out = torch.ones_like(x).t()[None] * 1.0
    part = out[0]
    whole = torch.zeros_like(x).t().unsqueeze(0)
    whole.sub_(x.t())
    return whole + part.sum()


def _one_of_several(x: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.zeros_like(x)
    first, rest = out[:1], out[1:]
    rest[0].add_(x[2])
    return out, first


@compiled_only
@pytest.mark.parametrize("function", [_slices, _under_another_dimension, _one_of_several])
def test_views_of_constants_and_first_writes_need_no_way_through_the_dispatcher(
    function: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived: list[Any] = []
    handler = VmapMode.__torch_dispatch__

    def note(self: VmapMode, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arrived.append(func)
        return handler(self, func, types, args, kwargs)

    monkeypatch.setattr(VmapMode, "__torch_dispatch__", note)
    for _ in range(5):
        x = torch.randn(4, 3, 4, dtype=D)
        torch.testing.assert_close(chainrule.vmap(function)(x), torch.func.vmap(function)(x))
        by_samples = chainrule.vmap(chainrule.vmap(function))(torch.stack([x, x.cos()]))
        torch.testing.assert_close(by_samples, torch.func.vmap(torch.func.vmap(function))(torch.stack([x, x.cos()])))
    arrived.clear()
    chainrule.vmap(function)(x)
    assert not arrived
