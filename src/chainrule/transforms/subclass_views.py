"""``x.as_subclass(torch.Tensor)``, by which libraries built on tensor subclasses take a plain tensor out of one of theirs.

Torch makes the result below its modes, as an object that no tape has seen: the derivative would be missing without a word.
Inside of a transform it is a view, as any other; elsewhere torch's own method does it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from chainrule.dispatch import LightMode

_own = torch.Tensor.as_subclass


@functools.wraps(_own)
def _as_subclass(tensor: torch.Tensor, cls: Any) -> Any:
    if cls is torch.Tensor and isinstance(_get_current_dispatch_mode(), LightMode):
        with torch._C.DisableTorchFunctionSubclass():
            return torch.ops.aten.alias.default(tensor)
    return _own(tensor, cls)


def install() -> None:
    """Put the method in the place of torch's own."""
    torch.Tensor.as_subclass = _as_subclass  # type: ignore[method-assign, assignment]


__all__ = ["install"]
