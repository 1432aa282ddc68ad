"""Arrays of NumPy and of other libraries made of what is differentiated: refused, as torch refuses them.

What such a library computes is on no tape, so that its share of the derivative would be missing without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from chainrule.dispatch import TAKEN, LightMode

_CONVERSIONS = ("numpy", "__array__", "__dlpack__")


def _refusing(name: str) -> Callable[..., Any]:
    method = getattr(torch.Tensor, name)

    def convert(mode: LightMode, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if mode.belongs_to(tensor)[0] is not None and not kwargs.get("force", False):
            raise RuntimeError(
                f"chainrule: {name} of a tensor that is differentiated: what NumPy (or another library) computes of it would be "
                "a constant, its derivative missing. Compute it with torch, or use tensor.detach() where it is to be a constant."
            )
        return method(tensor, *args, **kwargs)

    return convert


def install() -> None:
    """Have the modes take torch's conversions to arrays."""
    for name in _CONVERSIONS:
        TAKEN[getattr(torch.Tensor, name)] = _refusing(name)


__all__ = ["install"]
