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
