"""What torch takes for a derivative where there is none, by its version."""

from __future__ import annotations

import torch
from torch.torch_version import TorchVersion

#: From torch 2.14 on ``clamp`` between numbers has the derivative zero at its bounds, and ``fmax``, ``fmin`` and ``clamp``
#: between tensors share it at ties, as ``maximum`` does; before, all of it belonged to the first argument.
TIES_ARE_SHARED = TorchVersion(torch.__version__) >= (2, 14)

__all__ = ["TIES_ARE_SHARED"]
