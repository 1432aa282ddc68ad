"""The last resort of batching: run the op once per sample and stack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chainrule.rules.batching_base import Batched, map_tensors


def loop_over_samples(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """Run `func` on each sample of its batched arguments and stack the results.

    An op that writes to a batched argument writes through the views of its samples.

    Raises:
        RuntimeError: the shape of a result depends on the sample.

    """
    if size == 0:
        sample = map_tensors(_zero_sample, [list(args), kwargs])
        return _empty_batch(func(*sample[0], **sample[1]))
    results = []
    for index in range(size):

        def select(x: Any, index: int = index) -> Any:
            return x.value.select(0, index) if x.__class__ is Batched else x

        sample = map_tensors(select, [list(args), kwargs])
        results.append(func(*sample[0], **sample[1]))
    return _stack(func, results)


def _zero_sample(x: Any) -> Any:
    return torch.zeros(x.shape, dtype=x.value.dtype, device=x.value.device) if x.__class__ is Batched else x


def _empty_batch(result: Any) -> Any:
    if isinstance(result, Tensor):
        return Batched(result.new_empty((0, *result.shape)))
    if isinstance(result, (list, tuple)):
        return tuple(_empty_batch(item) for item in result)
    return result


def _stack(func: Any, results: list[Any]) -> Any:
    first = results[0]
    if isinstance(first, Tensor):
        if any(result.shape != first.shape for result in results):
            raise RuntimeError(
                f"vmap: the shape of the result of {func} depends on the values of the sample (it is "
                f"{[tuple(result.shape) for result in results]}); such an op cannot be batched"
            )
        return Batched(torch.stack(results))
    if isinstance(first, (list, tuple)):
        return tuple(_stack(func, list(items)) for items in zip(*results, strict=True))
    if any(result != first for result in results):
        raise RuntimeError(f"vmap: {func} returned different Python values for different samples")
    return first
