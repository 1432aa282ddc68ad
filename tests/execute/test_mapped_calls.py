"""Replayed calls on mapped tensors give what the calls give in their own way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import chainrule
from chainrule.batching.mode import VmapMode
from chainrule.execute import mapped_calls, mapped_signatures
from chainrule.execute.mapped_calls import CALLS, Replay

Tensor = torch.Tensor
CALLS_UNTIL_REPLAYED = mapped_calls._UNRECORDED + 1


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    """Each test begins without known calls; what is known is not lost."""
    before = dict(CALLS.known)
    CALLS.known.clear()
    yield
    CALLS.known.clear()
    CALLS.known.update(before)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def replays() -> int:
    return sum(isinstance(found, Replay) for found in CALLS.known.values())


WEIGHT = draw(5, 4)
INDEX = torch.tensor([2, 0, 1])
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "stack": lambda x: torch.stack([x, x * 2], -1),
    "cat": lambda x: torch.cat([x, x[:1]], 0),
    "index": lambda x: x[INDEX],
    "slices": lambda x: x[1:, ::2] + x[:-1, [0, 2]],
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "linear of mapped": lambda x: F.linear(x, x[:2], x[0, :2]),
    "matmul of mapped": lambda x: x @ x.mT,
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, WEIGHT),
    "softmax": lambda x: x.softmax(-1),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "layer norm": lambda x: F.layer_norm(x, (4,)),
    "several results": lambda x: torch.stack(x.sort(dim=-1, descending=True).values.unbind(-1)),
    "reduction": lambda x: x.sum(dim=-1, keepdim=True) * x.amax(0),
    "sizes": lambda x: x.reshape(2, -1)[:, :6].expand(3, 2, 6).permute(2, 0, 1),
    "solve": lambda x: torch.linalg.solve(x @ x.mT + torch.eye(3, dtype=x.dtype), x),
    "diagonal": lambda x: torch.diag(x[0]),
    "pad": lambda x: F.pad(x, (1, 2), value=3.0),
    "cross entropy": lambda x: F.cross_entropy(x, INDEX, label_smoothing=0.1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_replays_on_other_values(name: str) -> None:
    function = FUNCTIONS[name]
    mapped = chainrule.vmap(function)
    kept = []
    for _ in range(CALLS_UNTIL_REPLAYED + 2):
        x = draw(6, 3, 4)
        kept.append((mapped(x), torch.stack([function(sample) for sample in x])))
    assert replays()
    for found, expected in kept:
        # Sums in another order: a few roundings of numbers of order one.
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_under_vmap(name: str) -> None:
    def loss(x: Tensor) -> Tensor:
        return FUNCTIONS[name](x).square().sum()

    for transform in ("grad", "hessian"):
        mapped = chainrule.vmap(getattr(chainrule, transform)(loss))
        for _ in range(CALLS_UNTIL_REPLAYED + 1):
            x = draw(4, 3, 4)
            expected = torch.stack([getattr(chainrule, transform)(loss)(sample) for sample in x])
            torch.testing.assert_close(mapped(x), expected, rtol=1e-9, atol=1e-9)


def test_one_signature_one_replay() -> None:
    mapped = chainrule.vmap(lambda x, y: torch.cat([x, y]))
    x, y = draw(3, 2), draw(3, 2)
    for _ in range(CALLS_UNTIL_REPLAYED):
        assert torch.equal(mapped(x, x), torch.cat([x, x], 1))
    for _ in range(CALLS_UNTIL_REPLAYED + 1):  # the same tensor twice is another call than two tensors alike
        assert torch.equal(mapped(x, y), torch.cat([x, y], 1))
        assert torch.equal(mapped(x, x), torch.cat([x, x], 1))
    assert replays() == 2
    turned = draw(2, 3).t()
    for _ in range(CALLS_UNTIL_REPLAYED + 1):  # other strides
        assert torch.equal(mapped(turned, x), torch.cat([turned, x], 1))
    assert replays() == 3
    larger = draw(3, 9)
    for begin in range(CALLS_UNTIL_REPLAYED + 3):  # parts of a larger tensor differ in where they begin
        part = larger[:, begin : begin + 2]
        assert torch.equal(mapped(part, part), torch.cat([part, part], 1))


@pytest.mark.parametrize(
    "numbers", [(0.0, -0.0), (1, 1.0, True), (torch.float32, torch.float64), (float("nan"), float("inf"), 2.5)]
)
def test_constants_are_told_apart(numbers: tuple[Any, ...]) -> None:
    x = torch.tensor([[1.5, -2.0], [0.0, 3.0]], dtype=torch.float64)
    for number in numbers:

        def function(sample: Tensor, number: Any = number) -> Tensor:
            if isinstance(number, torch.dtype):
                return torch.cumsum(sample, 0, dtype=number)
            return F.pad(sample, (1, 0), value=number)

        for _ in range(CALLS_UNTIL_REPLAYED + 1):
            found, expected = chainrule.vmap(function)(x), torch.stack([function(sample) for sample in x])
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(torch.signbit(found), torch.signbit(expected))


def test_the_default_dtype_is_part_of_a_signature() -> None:
    x = torch.arange(6).reshape(2, 3)
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            for _ in range(CALLS_UNTIL_REPLAYED + 1):
                assert chainrule.vmap(lambda s: torch.where(s > 1, s, 1.5))(x).dtype is dtype
    finally:
        torch.set_default_dtype(before)


def test_checks_without_a_result() -> None:
    x = torch.eye(3, dtype=torch.float64).expand(4, 3, 3) * 2.0
    loss = lambda m: torch.linalg.inv(m).square().sum()  # noqa: E731 - mapped twice
    for _ in range(CALLS_UNTIL_REPLAYED + 2):
        m = x + 0.1 * draw(4, 3, 3)
        torch.testing.assert_close(chainrule.vmap(chainrule.grad(loss))(m), torch.func.vmap(torch.func.grad(loss))(m))
        torch.testing.assert_close(chainrule.vmap(lambda s: torch.linalg.inv(torch.linalg.inv(torch.linalg.inv(s))))(m), torch.linalg.inv(m))


def test_views_stay_views() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 1.0
        part = y[1:].unsqueeze(0)
        part.mul_(2.0)
        return y

    for _ in range(CALLS_UNTIL_REPLAYED + 2):
        x = draw(4, 3)
        expected = x.clone()
        expected[:, 1:] *= 2.0
        assert torch.equal(chainrule.vmap(function)(x), expected)


def test_results_are_not_written_over() -> None:
    mapped = chainrule.vmap(lambda x: F.pad(x, (1, 1)))
    kept = []
    for _ in range(CALLS_UNTIL_REPLAYED + 3):
        x = draw(2, 3)
        found = mapped(x)
        kept.append((found, F.pad(x, (1, 1))))
        found_again = mapped(x)
        found_again.zero_()
    for found, expected in kept:
        assert torch.equal(found, expected)


def test_what_is_not_replayed() -> None:
    """Random numbers, writes to arguments, and queries keep their own way."""
    x = draw(3, 4)
    drawn = chainrule.vmap(lambda s: s + torch.rand_like(s), randomness="different")
    assert len({drawn(x).sum().item() for _ in range(CALLS_UNTIL_REPLAYED + 3)}) == CALLS_UNTIL_REPLAYED + 3
    for _ in range(CALLS_UNTIL_REPLAYED + 2):
        given = x.clone()
        chainrule.vmap(lambda s: s.index_fill_(0, torch.tensor([1]), 0.0))(given)
        assert torch.equal(given, x.index_fill(1, torch.tensor([1]), 0.0))
    weight = draw(4).requires_grad_()
    for _ in range(CALLS_UNTIL_REPLAYED + 2):
        (slope,) = torch.autograd.grad(chainrule.vmap(lambda s: torch.cat([s, s * weight]))(x).sum(), weight)
        torch.testing.assert_close(slope, x.sum(0))


def test_errors_stay_errors() -> None:
    mapped = chainrule.vmap(lambda m: torch.linalg.cholesky(m))
    good, bad = torch.eye(3).expand(4, 3, 3).contiguous(), -torch.eye(3).expand(4, 3, 3).contiguous()
    for _ in range(CALLS_UNTIL_REPLAYED + 2):
        torch.testing.assert_close(mapped(good), good)
    with pytest.raises(torch.linalg.LinAlgError):
        mapped(bad)
    torch.testing.assert_close(mapped(good), good)


def test_changing_numbers_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_calls, "_MOST", 20)
    x = draw(2, 3)
    for number in range(100):
        assert torch.equal(chainrule.vmap(lambda s, number=number: F.pad(s, (1, 0), value=float(number)))(x), F.pad(x, (1, 0), value=number))
    assert len(CALLS.known) <= 21


def test_the_python_handlers_replay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = chainrule.vmap(lambda x: torch.cat([x.softmax(0), x[1:]]) @ WEIGHT[:3].mT[:4, :2].mT.new_ones(7, 2))
    for _ in range(CALLS_UNTIL_REPLAYED + 1):
        x = draw(3, 4)
        compiled = mapped(x)
    found = replays()
    monkeypatch.setattr(VmapMode, "__torch_function__", VmapMode.take_function)
    assert torch.equal(mapped(x), compiled)
    assert replays() >= found  # and of the functions that the compiled handlers take themselves


def test_a_number_is_not_taken_for_a_tensor() -> None:
    """What a signature says of a tensor is a number as well; the call with that number is another one."""
    x, y = draw(3, 7), draw(3, 7).exp() + 1
    for _ in range(CALLS_UNTIL_REPLAYED + 1):
        torch.testing.assert_close(chainrule.vmap(lambda x, y: torch.fmod(x, y))(x, y), torch.fmod(x, y))
    number = float(mapped_signatures.NUMBERS[(y.shape, y.dtype, y.stride(), y.device)])
    expected = torch.fmod(x, number)
    for _ in range(CALLS_UNTIL_REPLAYED + 1):
        found = chainrule.vmap(lambda x: torch.fmod(x, number))(x)
        torch.testing.assert_close(found, expected, equal_nan=True)
        torch.testing.assert_close(chainrule.vmap(lambda x, y: torch.fmod(x, y))(x, y), torch.fmod(x, y))


def _sine_and_cosine(x):
    sine, cosine = torch.empty(3), torch.empty(3)
    torch.sin(x, out=sine)
    torch.cos(x, out=cosine)
    return sine + 2 * cosine


def _cumulated(x):
    return torch.cumsum(x, 0, out=torch.empty(3))


def _normalised(x):
    target = torch.zeros(3)
    torch.nn.functional.normalize(x, dim=0, out=target)
    return target * 2


@pytest.mark.parametrize("function", [_sine_and_cosine, _cumulated, _normalised])
def test_targets_that_are_the_same_for_all_samples_are_written_in_each_call(function):
    mapped = chainrule.vmap(function)
    for _ in range(7):
        x = torch.rand(2, 3)
        torch.testing.assert_close(mapped(x), torch.stack([function(row) for row in x]))


def test_lists_of_constants_alone_are_replayed() -> None:
    """Indices of a tensor that is the same for all samples."""
    pictures = torch.randn(1, 2, 4)
    for _ in range(6):
        x = torch.randn(3)
        found = chainrule.vmap(lambda x: x * F.interpolate(pictures, scale_factor=2).sum())(x)
        torch.testing.assert_close(found, x * F.interpolate(pictures, scale_factor=2).sum())


def test_zeros_without_memory_are_not_what_is_recorded() -> None:
    constant = torch.randn(3, dtype=torch.float64)
    function = chainrule.vmap(lambda x: torch.cat([constant, x, constant]))
    for _ in range(5):
        assert torch.equal(function(torch._efficientzerotensor((2, 3), dtype=torch.float64))[:, 3:6], torch.zeros(2, 3, dtype=torch.float64))
    for _ in range(5):
        x = torch.randn(2, 3, dtype=torch.float64)
        assert torch.equal(function(x)[:, 3:6], x)
