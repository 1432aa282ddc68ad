"""Code for one row of cotangents or tangents on all rows at once: a level of vmap around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from chainrule.batching.mode import VmapMode
from chainrule.batching.tensor import BatchTensor, wrap_batched
from chainrule.rules.batching_base import Batched
from chainrule.rules.row_mapping import RowMapping


def mapped(action: Callable[[Tensor], Any], rows: Tensor) -> Any:
    """The results of ``action`` on each of the rows (tensors, None, or tuples of them), with the rows in front.

    Raises:
        RuntimeError: the code does something that one call cannot do for several rows.
    """
    mode = VmapMode(rows.shape[0])
    mode.hides_data = True
    with mode:
        results = action(wrap_batched(Batched(rows), mode))
    return _outside(results, mode)


def _outside(result: Any, mode: VmapMode) -> Any:
    if isinstance(result, (tuple, list)):
        return tuple([_outside(item, mode) for item in result])
    if not isinstance(result, Tensor):
        return result
    if result.__class__ is BatchTensor and result.level is mode:
        if result.batched:
            return result.value
        result = result.value
    return result.unsqueeze(0).expand(mode.size, *result.shape)


RowMapping.mapper = mapped

__all__ = ["mapped"]
