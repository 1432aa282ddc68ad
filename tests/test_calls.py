"""The cheapest spellings of calls that are functions of this package: the values of torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chainrule import calls

KINDS: list[dict[str, Any]] = [{}, {"pin_memory": False}, {"dtype": torch.float64}, {"dtype": torch.int64, "device": None}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(), (0, 3), (5, 7), [6, 2]])
@pytest.mark.parametrize("smallest", [0, 64, 1 << 25])
def test_new_zeros(kind: dict[str, Any], size: Any, smallest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_BEYOND_CACHES", smallest)
    source = torch.randn(3)
    dirty = source.new_empty(size, dtype=kind.get("dtype")).fill_(7)  # memory that is likely to be given out again
    del dirty
    found, wanted = calls.new_zeros(source, size, **kind), source.new_zeros(size, **kind)
    assert torch.equal(found, wanted)
    assert (found.dtype, found.device, found.shape, found.stride()) == (wanted.dtype, wanted.device, wanted.shape, wanted.stride())


def test_new_zeros_of_other_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_BEYOND_CACHES", 0)
    assert not calls.new_zeros(torch.randn(3, requires_grad=True), (2,)).requires_grad
    assert calls.new_zeros(torch.randn(3, device="meta"), (2,)).device.type == "meta"
    threads = torch.get_num_threads()
    for number in (1, threads):
        torch.set_num_threads(number)
        assert calls.new_zeros(torch.randn(3), (1 << 12,)).count_nonzero() == 0
    torch.set_num_threads(threads)
    with torch.inference_mode():
        assert calls.new_zeros(torch.randn(3), (2,)).is_inference()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 16, 24, 24), (3, 9, 31, 22), (2, 4, 60, 60), (16, 24, 24), (0, 16, 24, 24)])
@pytest.mark.parametrize("options", [([2, 2],), ([3, 2], [2, 1], [1, 0]), ([2, 2], [1, 2], [0, 0], [2, 1], True)])
def test_max_pool2d(shape: Any, dtype: torch.dtype, options: Any) -> None:
    x = torch.randint(-3, 3, shape).to(dtype)  # with many ties
    if x.numel():
        x.flatten()[::7] = torch.nan
    for given in (x, x.transpose(-1, -2)):
        found = calls.max_pool2d_with_indices(given, *options)
        wanted = torch.ops.aten.max_pool2d_with_indices.default(given, *options)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
            assert one.stride() == other.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 16, 24, 24), (3, 9, 32, 20), (1, 2, 150, 60), (16, 24, 24), (0, 16, 24, 24)])
@pytest.mark.parametrize(
    "options",
    [
        ([2],), ([2, 2],), ([2, 2], [2, 2]), ([1, 2],), ([4, 1],), ([1],), ([3, 2], [2, 1], [1, 0]), ([2, 2], [2], [0, 0], True),
        ([2, 2], [], [0], False, True, 3), ([2, 2], [2, 1]),
    ],
)  # fmt: skip
def test_avg_pool2d(shape: Any, dtype: torch.dtype, options: Any) -> None:
    x = torch.randn(shape).to(dtype)
    if x.numel():
        x.flatten()[::7] = torch.nan
    for given in (x, x.transpose(-1, -2)):
        found, wanted = calls.avg_pool2d(given, *options), torch.ops.aten.avg_pool2d.default(given, *options)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
        assert found.stride() == wanted.stride()
        all_options = (*options, *([], [0], False, True, None)[len(options) - 1 :])
        cotangent = torch.randn(wanted.shape).to(dtype)
        pulled = calls.avg_pool2d_backward(cotangent, given, *all_options)
        torch.testing.assert_close(
            pulled, torch.ops.aten.avg_pool2d_backward.default(cotangent, given, *all_options), rtol=0, atol=0, equal_nan=True
        )


def test_average_pooling_of_what_requires_grad() -> None:
    x = torch.randn(2, 16, 24, 24, requires_grad=True)
    (found,) = torch.autograd.grad(calls.avg_pool2d(x, [2, 2]).sin().sum(), x)
    (wanted,) = torch.autograd.grad(torch.nn.functional.avg_pool2d(x, 2).sin().sum(), x)
    torch.testing.assert_close(found, wanted)
    cotangent = torch.randn(2, 16, 12, 12, requires_grad=True)
    made = calls.avg_pool2d_backward(cotangent, x.detach(), [2, 2], [], [0], False, True, None)
    assert torch.equal(torch.autograd.grad(made.sum(), cotangent)[0], torch.ones_like(cotangent))


_X, _V = torch.linspace(-2.0, 3.0, 16, dtype=torch.float64).reshape(4, 4), torch.linspace(0.5, 2.0, 4, dtype=torch.float64)
_IMAGE, _WEIGHTS = torch.linspace(-1.0, 1.0, 288, dtype=torch.float64).sin().reshape(2, 4, 6, 6), torch.ones(4, 4, 3, 3, dtype=torch.float64)
_PLACES, _COMPLEX = torch.tensor([2, 0, 1]), torch.complex(_X, _X.cos())

#: Arguments of ops that are called by torch's own functions: with the defaults, and without.
SPELLED: dict[str, list[tuple[Any, ...]]] = {
    "convolution.default": [
        (_IMAGE, _WEIGHTS, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        (_IMAGE, _WEIGHTS, _V, [2, 1], [1, 0], [1, 2], True, [0, 0], 1),
    ],
    "constant_pad_nd.default": [(_X, [1, 2]), (_X, [1, -1], 2.5), (_X, [0, 1, 2, 0], 3)],
    "cumprod.default": [(_X, 0), (_X, -1)],
    "embedding.default": [(_X, _PLACES), (_X, _PLACES, 1), (_X, _PLACES, -1, False, False)],
    "logcumsumexp.default": [(_X, 0)],
    "logsumexp.default": [(_X, [1]), (_X, [0, 1], True), (_X, [-1], False)],
    "native_group_norm.default": [(_IMAGE, _V, _V, 2, 4, 36, 2, 1e-5), (_IMAGE, None, None, 2, 4, 36, 2, 1e-3)],
    "select_scatter.default": [(_X, _V, 0, 1), (_X, _V, 1, -1)],
    "slice_scatter.default": [(_X, _X[:2], 0, 1, 3), (_X, _X[:, :2], 1, 0, 4, 2), (_X, _X)],
    "take.default": [(_X, _PLACES)],
    "trace.default": [(_X,)],
    "_adaptive_avg_pool2d.default": [(_IMAGE, [2, 3])],
    "_fft_c2c.default": [(_COMPLEX, [1], 0, True), (_COMPLEX, [0, 1], 1, False)],
    "_fft_c2r.default": [(_COMPLEX, [1], 0, 6), (_COMPLEX, [1], 2, 7)],
    "_fft_r2c.default": [(_X, [1], 0, True), (_X, [0, 1], 1, False)],
    "_prelu_kernel.default": [(_X, _V)],
    "elu.default": [(_X,), (_X, 0.5), (_X, 0.5, 2.0, 3.0), (_X, 1, 1, 1)],
    "gelu.default": [(_X,)],
    "glu.default": [(_X,), (_X, 0)],
    "hardswish.default": [(_X,)],
    "hardtanh.default": [(_X,), (_X, -0.5, 0.5), (_X, 0, 6)],
    "im2col.default": [(_IMAGE, [2, 2], [1, 1], [0, 0], [1, 1])],
    "leaky_relu.default": [(_X,), (_X, 0.3)],
    "softplus.default": [(_X,), (_X, 2.0, 0.5), (_X, 2, 20)],
    "prod.default": [(_X,)],
    "repeat.default": [(_X, [2, 1]), (_V, [2, 3]), (_V.sum(), [])],
    "xlogy.Tensor": [(_X, _X.abs())],
    "max_pool2d_with_indices.default": [(_IMAGE, [2, 2]), (_IMAGE, [2, 3], [1, 1], [1, 1], [1, 1], True), (_IMAGE[0], [2], [])],
    "avg_pool2d.default": [(_IMAGE, [2, 2]), (_IMAGE, [3], [2], [1], True, False, None), (_IMAGE, [3, 2], [], [0], False, True, 3)],
}


@pytest.mark.parametrize("name", SPELLED)
def test_torchs_own_functions_take_the_ops_arguments(name: str) -> None:
    packet, overload = name.split(".")
    op = getattr(getattr(torch.ops.aten, packet), overload)
    assert calls.FUNCTIONS[op._op] is not op._op
    for args in SPELLED[name]:
        found, wanted = calls.FUNCTIONS[op._op](*args), op(*args)
        for one, other in zip(*(item if isinstance(item, tuple) else (item,) for item in (found, wanted)), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
            assert one.stride() == other.stride()


@pytest.mark.parametrize("reduction", [(), (0,), (1,), (2,)])
@pytest.mark.parametrize("name", ["mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss"])
def test_losses_take_the_mean_where_they_are_not_told(name: str, reduction: Any) -> None:
    op = getattr(torch.ops.aten, name).default
    assert torch.equal(calls.FUNCTIONS.get(op._op, op._op)(_X, _X.cos(), *reduction), op(_X, _X.cos(), *reduction))
