"""Dual tensors of torch's own forward mode, whose tangents a derivative transform cannot carry on.

A tape records below autograd, where these tangents are not seen: they would be lost. So they are refused. Nothing of this is
asked for while no level of ``torch.autograd.forward_ad`` is active.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import forward_ad

from chainrule.batching.tensor import BatchTensor
from chainrule.dispatch import undispatched

#: The state of torch's dispatcher outside of everything: below autograd, a tensor cannot be asked for its tangent.
_STATE = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


def refuse_duals(items: Iterable[Any], transform: str) -> None:
    """Refuse tensors, mapped ones and those in lists too, that carry a tangent of the active level.

    Args:
        items: what may be tensors.
        transform: who refuses.

    Raises:
        RuntimeError: if there is one.
    """
    if forward_ad._current_level < 0:
        return
    for item in items:
        if isinstance(item, (list, tuple)):
            refuse_duals(item, transform)
        elif isinstance(item, torch.Tensor) and _is_dual(item):
            raise RuntimeError(
                f"{transform}: a tensor that it is given, or that its function closes over, carries a tangent of "
                "torch.autograd.forward_ad. A chainrule transform does not see such tangents, and would lose them. Use "
                "chainrule.jvp (or chainrule.linearize) around it, in place of forward_ad.dual_level."
            )


def _is_dual(tensor: torch.Tensor) -> bool:
    while tensor.__class__ is BatchTensor:
        tensor = tensor.value  # type: ignore[attr-defined]
    if tensor.layout is not torch.strided or tensor.is_inference():
        return False
    with torch._C._ForceDispatchKeyGuard(*_STATE), undispatched():
        return forward_ad.unpack_dual(tensor).tangent is not None


__all__ = ["refuse_duals"]
