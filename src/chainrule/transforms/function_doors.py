"""The door of torch's Python functions to function modes, compiled.

``F.softmax`` and its like first ask whether a function mode is on; if so, ``torch.overrides.handle_torch_function`` hands them
to it. In Python that takes longer than the mode's own work. The compiled one in its place does the same for a mode of this
package, and calls torch's own for everything else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import overrides

from chainrule.batching.tensor import BatchTensor
from chainrule.dispatch import KNOWS_STATE
from chainrule.shortcuts import configure, handle_torch_function

#: Where functions find their door.
_MODULES: tuple[Any, ...] = (F, torch.functional, torch._tensor)

_NAME = "handle_torch_function"


def install() -> None:
    """Put the compiled door in the place of torch's own (once), where it is there."""
    plain = overrides.handle_torch_function
    refused = torch._C._disabled_torch_function_impl
    if not KNOWS_STATE or any(kind.__torch_function__ is not refused for kind in (torch.nn.Parameter, BatchTensor)):
        return
    configure(door=plain)
    for module in _MODULES:
        if getattr(module, _NAME, None) is plain:
            setattr(module, _NAME, handle_torch_function)


__all__ = ["install"]
