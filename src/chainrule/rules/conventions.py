"""What torch takes for a derivative where there is none, by its version."""

from __future__ import annotations

from typing import Any

import torch
from torch.torch_version import TorchVersion

#: From torch 2.14 on ``clamp`` between numbers has the derivative zero at its bounds, and ``fmax``, ``fmin`` and ``clamp``
#: between tensors share it at ties, as ``maximum`` does; before, all of it belonged to the first argument.
TIES_ARE_SHARED = TorchVersion(torch.__version__) >= (2, 14)


def clamp_inside(x: Any, low: float, high: float) -> Any:
    """A clamp for formulas, with the derivative zero at its bounds in every version."""
    return torch.nn.functional.hardtanh(x, low, high)


def clamp_up_to(x: Any, low: float | None, high: float | None) -> Any:
    """A clamp for formulas, with the derivative one at its bounds in every version."""
    found = torch.clamp(x, low, high)
    return torch.where(found == x, x, found) if TIES_ARE_SHARED else found


__all__ = ["TIES_ARE_SHARED", "clamp_inside", "clamp_up_to"]
