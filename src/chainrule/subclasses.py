"""Tensor subclasses: which ones are plain tensors for a mode, and which run torch's ops in a way of their own."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor

_NO_DISPATCH = torch._C._disabled_torch_dispatch_impl

#: Whether a class is foreign, for those that were met.
_MET: dict[type, bool] = {torch.Tensor: False, torch.nn.Parameter: False}


def known(kind: type[torch.Tensor]) -> type[torch.Tensor]:
    """Declare a class with a dispatch of its own that the modes here know how to treat."""
    _MET[kind] = False
    return kind


def is_foreign(kind: type) -> bool:
    """Whether a class has a ``__torch_dispatch__`` that is not ours: the elements need not be where the memory seems to be.

    A fake tensor has no elements, and its mode takes every op.
    """
    found = _MET.get(kind)
    if found is None:
        found = _MET[kind] = kind.__torch_dispatch__ is not _NO_DISPATCH and not issubclass(kind, FakeTensor)  # type: ignore[attr-defined]
    return found


def is_bare(kind: type) -> bool:
    """Whether a class leaves torch's functions what they are, beside making their results its own."""
    own = getattr(kind.__torch_function__, "__func__", None)  # type: ignore[attr-defined]
    return own is torch.Tensor.__torch_function__.__func__ and not is_foreign(kind)  # type: ignore[attr-defined]


def refuse_foreign(tensor: torch.Tensor, transform: str) -> None:
    """Refuse a tensor of a foreign class.

    Raises:
        RuntimeError: if it is one.
    """
    if is_foreign(tensor.__class__):
        raise RuntimeError(
            f"{transform}: a {tensor.__class__.__name__} runs torch's ops in a way of its own (__torch_dispatch__), which "
            "chainrule does not see through. Use the tensors that it is made of."
        )


__all__ = ["is_bare", "is_foreign", "known", "refuse_foreign"]
