"""``x[index] = value`` in a transform under `vmap`: as for each sample alone, and as torch's own assignments.

The functions are sines, squares and products of numbers near 1, in float64: central differences with a step of 1e-6 are right
to about 1e-9.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import chainrule
from chainrule.batching.mode import VmapMode
from chainrule.capture.tape import Tape
from chainrule.dispatch import KNOWS_STATE

CONSTANT = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def _assembled(x: Tensor) -> Tensor:
    out = x.new_zeros(3, 3)
    out[0, 0], out[0, -1] = x[0, 0].cos(), -x[0, 1].sin()
    out[1, 1] = 1.0
    out[2] = x[1, :3] * x[0, :3]
    return out @ out


def _of_outer_zeros(x: Tensor) -> Tensor:
    out = torch.zeros(2, 3, dtype=x.dtype)
    row = out[1]
    out[:, 1] = x[0, 1].sin()
    out[0] = CONSTANT
    row[0] = x[1, 0] * row[1]
    return out * x[:2, :3]


def _rows_of_views(x: Tensor) -> Tensor:
    y = x * x
    before, row = y.sin(), y[1]
    y[0, 1:] = y[1, 1:] * 2
    row[0] = row[1] * y[0, 1]
    y.t()[2] = row[0]
    return y * before


def _ellipsis(x: Tensor) -> Tensor:
    y = torch.stack([x, x.cos()])
    y[..., :2, :2] = x[:2, :2].exp()
    y[..., 2] = 0.25 * x[1, 2]
    y[:, 0, 0] = 3.0
    return y * y


def _steps_and_none(x: Tensor) -> Tensor:
    y = x * 2
    y[None, ::2, 1:] = x[0, 1:] * x[1, 0]
    y[1][None, 0] = -0.0
    y[2:9] = x[:1] ** 2
    y[5:9] = x[:1]
    return y.sin()


def _twice_with_reads(x: Tensor) -> Tensor:
    y = x * 1.0
    product = y * y
    y[0] = y[1].exp()
    square = y * y
    y[0] = y[2] * y[0]
    y[0, 0] = y[0, 0] * y[0, 1]
    return product + square * y


def _cut(x: Tensor) -> Tensor:
    y = x * x
    y[0] = x[1].detach() * 2
    y[1] = (x[1] > 1).to(x.dtype)
    with torch.no_grad():
        y[2, 0] = 7.0
    return y * x


def _other_dtype(x: Tensor) -> Tensor:
    y = x * x
    y[0] = torch.arange(3)
    y[1, 0] = x[0, 0].float()
    return y * y


PLACES = (torch.tensor([0, 2, 2]), torch.tensor([1, 0, 2]))
MASK = torch.tensor([[True, False, True], [False, False, True], [True, True, False]])


def _whole(x: Tensor) -> Tensor:
    """Methods that write to all of a tensor, or of a view."""
    y, z = x.new_zeros(3, 3), x * 2
    y[0].copy_(x[1] * x[2])
    y[1].fill_(0.5)
    row = z[1]
    square = z * z
    z.copy_(y.sin())
    row.zero_()
    y[2, 1:].copy_(row[:1] + x[0, 0])
    z.diagonal().copy_(x[0]).mul_(x[1])
    return z @ y + square


def _at_places(x: Tensor) -> Tensor:
    y, z = torch.zeros(3, 3, dtype=x.dtype), x.exp()
    y.index_put_(PLACES, x[1] * x[0])
    before = z * y
    z[PLACES] = x[2]
    z[MASK] = y[MASK] * 3
    z[PLACES[:1]] = 0.25
    y[PLACES[1][:2]] = z[:2] * x[0]
    return before + z * y


def _chain_of_frames(x: Tensor) -> Tensor:
    pose = torch.eye(3, dtype=x.dtype)
    for number in range(3):
        frame = torch.eye(3, dtype=x.dtype)
        cosine, sine = x[number, 0].cos(), x[number, 0].sin()
        frame[0, 0] = frame[1, 1] = cosine
        frame[0, 1], frame[1, 0] = -sine, sine
        frame[:2, 2] = torch.stack([cosine, CONSTANT[number] * sine])
        pose = pose @ frame
    return pose


FUNCTIONS = [_whole, _at_places, _chain_of_frames, _assembled, _of_outer_zeros, _rows_of_views, _ellipsis, _steps_and_none, _twice_with_reads, _cut, _other_dtype]
DIFFERENTIABLE = [f for f in FUNCTIONS if f not in (_cut, _other_dtype)]
#: Torch's own autograd refuses the others, which overwrite what a derivative reads.
BY_TORCH = [f for f in FUNCTIONS if f not in (_whole, _at_places, _of_outer_zeros, _rows_of_views, _twice_with_reads)]


def samples(count: int = 4) -> Tensor:
    return 0.5 + torch.rand(count, 3, 3, dtype=torch.float64)


def slopes(function: Callable[[Tensor], Tensor], x: Tensor, width: float = 1e-6) -> Tensor:
    found = []
    for place in range(x.numel()):
        step = torch.zeros_like(x)
        step.view(-1)[place] = width
        found.append((function(x + step) - function(x - step)) / (2 * width))
    return torch.stack(found, -1).unflatten(-1, x.shape)


@pytest.mark.parametrize("function", DIFFERENTIABLE)
@pytest.mark.parametrize("transform", [chainrule.jacrev, chainrule.jacfwd])
def test_differences(function: Callable[[Tensor], Tensor], transform: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    mapped = chainrule.vmap(transform(function))
    for _ in range(4):
        many = samples()
        expected = torch.stack([slopes(function, x) for x in many])
        torch.testing.assert_close(mapped(many), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("function", DIFFERENTIABLE)
def test_second_differences(function: Callable[[Tensor], Tensor]) -> None:
    mapped = chainrule.vmap(chainrule.hessian(function))
    for _ in range(3):
        many = samples(2)
        expected = torch.stack([slopes(lambda x: slopes(function, x, 1e-4), x, 1e-4) for x in many])
        # Differences of fourth derivatives times 1e-8, and rounding of 1e-16 over 1e-8.
        torch.testing.assert_close(mapped(many), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", BY_TORCH)
@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
def test_samples_alone(function: Callable[[Tensor], Tensor], transform: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    mapped = chainrule.vmap(getattr(chainrule, transform.__name__)(function))
    if function is _cut and transform is not torch.func.jacrev:
        pytest.skip("torch's forward mode differentiates what is written under no_grad")
    for count in (4, 4, 4, 4, 1, 0):
        many = samples(count)
        expected = [transform(function)(x) for x in many]
        found = mapped(many)
        torch.testing.assert_close(found, torch.stack(expected) if count else found.new_empty(found.shape))


@pytest.mark.parametrize("function", [f for f in DIFFERENTIABLE if f in BY_TORCH])
def test_graphs_and_inner_maps(function: Callable[[Tensor], Tensor]) -> None:
    for _ in range(3):
        many = samples().requires_grad_()
        weight = samples()

        def total(transforms: object, many: Tensor, weight: Tensor = weight) -> Tensor:
            gradient = transforms.vmap(transforms.grad(lambda x: function(x).sum()))(many)  # type: ignore[attr-defined]
            return (gradient * weight).sum()

        (found,) = torch.autograd.grad(total(chainrule, many), many)
        expected = torch.stack([
            (torch.func.hessian(lambda x: function(x).sum())(x.detach()) * w[..., None, None]).sum((0, 1))
            for x, w in zip(many, weight, strict=True)
        ])
        torch.testing.assert_close(found, expected)
        rows = chainrule.jacrev(chainrule.vmap(function))(many.detach())
        each = [torch.func.jacrev(function)(x) for x in many.detach()]
        for place, expected in enumerate(each):
            torch.testing.assert_close(rows[place][..., place, :, :], expected)
        twice = chainrule.vmap(chainrule.vmap(chainrule.jacrev(function)))(many.detach().unflatten(0, (2, 2)))
        torch.testing.assert_close(twice, torch.stack(each).unflatten(0, (2, 2)))


def test_parts_pass_no_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    arrived: list[str] = []
    handler = Tape.__torch_dispatch__

    def listening(self, func, types, args=(), kwargs=None):
        arrived.append(str(func))
        return handler(self, func, types, args, kwargs)

    def function(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[0, 1] = x[0, 0] * 2
        out[..., :2, 2] = x[0, 1] * x[1, :2]
        return out

    many = samples()
    monkeypatch.setattr(Tape, "__torch_dispatch__", listening)
    found = chainrule.vmap(chainrule.jacrev(function))(many)
    assert not [name for name in arrived if "copy" in name]
    torch.testing.assert_close(found, torch.stack([torch.func.jacrev(function)(x) for x in many]))


@pytest.mark.skipif(not KNOWS_STATE, reason="the compiled handlers take these calls")
def test_methods_pass_no_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    arrived: list[str] = []
    for mode in (Tape, VmapMode):
        handler = mode.__torch_dispatch__

        def listening(self, func, types, args=(), kwargs=None, handler=handler):
            arrived.append(str(func))
            return handler(self, func, types, args, kwargs)

        monkeypatch.setattr(mode, "__torch_dispatch__", listening)

    def function(x: Tensor) -> Tensor:
        out = x * 2
        out.copy_(x.sin())
        out.index_put_(PLACES, x[0] * x[1])
        out[MASK] = 0.5
        out[PLACES] = x[1]
        out.fill_(2.0)
        return out[:2, 1].zero_() * x[0, 0]

    many = samples()
    for _ in range(4):
        arrived.clear()
        found = chainrule.vmap(function)(many)
        slope = chainrule.vmap(chainrule.jacrev(function))(many)
    assert not [name for name in arrived if "_." in name]
    torch.testing.assert_close(found, torch.stack([function(x) for x in many]))
    torch.testing.assert_close(slope, torch.stack([torch.func.jacrev(function)(x) for x in many]))


WRITTEN: list[Callable[[Tensor, Tensor, float], Any]] = [
    lambda y, v, n: y.__setitem__((0, 1), v[0, 1]), lambda y, v, n: y.__setitem__((1, slice(1, None)), v[2, :2]),
    lambda y, v, n: y.__setitem__((slice(None), 2), n), lambda y, v, n: y.__setitem__((..., 0), v[1]),
    lambda y, v, n: y.__setitem__((slice(None), slice(0, 2)), v[:, 1:]), lambda y, v, n: y[1].copy_(v[0] * n),
    lambda y, v, n: y.copy_(v), lambda y, v, n: y[2].fill_(n), lambda y, v, n: y[:, 1].zero_(),
    lambda y, v, n: y.index_put_(PLACES, v[2]), lambda y, v, n: y.__setitem__(PLACES, v[1]),
    lambda y, v, n: y.__setitem__(MASK, n), lambda y, v, n: y[:2].mul_(v[1:]), lambda y, v, n: y.t()[0].add_(v[0]),
    lambda y, v, n: y.__setitem__((1, 1), CONSTANT[1]), lambda y, v, n: y.view(-1)[2:5].copy_(v[0]),
    lambda y, v, n: y[0].unsqueeze(0).sub_(n), lambda y, v, n: y.diagonal().copy_(v[2]),
]  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_writes_in_any_order(seed: int) -> None:
    draw = random.Random(seed)
    steps = [(draw.choice(WRITTEN), draw.randrange(6), draw.uniform(-1.0, 1.0), draw.random() < 0.3) for _ in range(6)]

    def function(x: Tensor, mapped: bool) -> Tensor:
        held = [x * x, x.new_zeros(3, 3), torch.eye(3, dtype=x.dtype), x.sin()]
        values = [x, x.cos(), torch.ones(3, 3, dtype=x.dtype), held[0], held[1], held[3].t()]
        views, total = [one[1] for one in held], torch.zeros((), dtype=x.dtype)
        for number, (write, place, value, reads) in enumerate(steps):
            target = held[number % 4]
            # A copy, so that nothing is written from the memory that it is written to; torch's vmap writes to no constants.
            given = values[place].clone() + 0 * x if mapped or number % 4 > 1 else values[place].clone()
            if reads:
                total = total + (target * given).sum() * views[number % 4].prod()
            write(target, given, value)
        return total + sum([(one * one).sin() for one in held]) + torch.stack(views).sum()  # type: ignore[no-any-return]

    for mapped in (True, False):
        alone = partial(function, mapped=mapped)
        for call in range(4):
            many = samples(1 + call % 3)
            found = chainrule.vmap(alone)(many)
            torch.testing.assert_close(found, torch.stack([alone(x) for x in many]))
            slope = chainrule.vmap(chainrule.jacrev(alone) if call % 2 else chainrule.jacfwd(alone))(many)
            expected = torch.stack([slopes(alone, x) for x in many])
            torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(chainrule.jacrev(alone)(many[0]), expected[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fails", [
    (IndexError, lambda x: x.__setitem__((0, 9), 1.0)), (RuntimeError, lambda x: x.__setitem__(0, torch.ones(7))),
    (IndexError, lambda x: x.__setitem__((0, 0, 0), 1.0)), (RuntimeError, lambda x: x.__setitem__(0, x.sum(1)[:2])),
])  # fmt: skip
def test_errors(fails: tuple[type[Exception], Callable[[Tensor], None]]) -> None:
    kind, assignment = fails

    def function(x: Tensor) -> Tensor:
        y = x * 2
        assignment(y)
        return y.sum()

    with pytest.raises(kind):
        chainrule.vmap(chainrule.grad(function))(samples())


def test_mapped_arguments_are_written() -> None:
    x, kept = torch.rand(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)

    def function(x: Tensor, kept: Tensor) -> Tensor:
        kept[1] = 7.0
        kept[0] = x[1]
        return (x * kept).sum()

    version = kept._version
    found = chainrule.vmap(chainrule.grad(function))(x, kept)
    torch.testing.assert_close(found, torch.stack([x[:, 1], 7.0 + x[:, 0], torch.zeros(2, dtype=torch.float64)], 1))
    torch.testing.assert_close(kept[:, 0], x[:, 1])
    assert kept._version > version
    closed = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="outside the vmapped function"):
        chainrule.vmap(chainrule.grad(lambda x: (closed.__setitem__(0, x[0]), (closed * x).sum())[1]))(x)


@pytest.mark.parametrize("index", [torch.tensor([2, 0]), torch.tensor([True, False, True]), MASK, PLACES, 1, (0, slice(1, None))])
@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("transform", [chainrule.jacrev, chainrule.jacfwd, chainrule.jacobian])
def test_truth_values(transform: Any, value: bool, index: Any) -> None:
    def function(x: Tensor) -> Tensor:
        y, z = x * x, torch.zeros(3, 3, dtype=x.dtype)
        z[0] = x[1]
        y[index] = value
        z[index] = value
        return y * z * x + y + z

    mapped = chainrule.vmap(transform(function))
    for _ in range(4):
        many = samples()
        torch.testing.assert_close(mapped(many), torch.stack([torch.func.jacrev(function)(x) for x in many]))
