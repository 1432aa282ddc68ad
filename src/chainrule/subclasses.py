"""Tensor subclasses: which ones are plain tensors for a mode, and which run torch's ops in a way of their own."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor

_NO_DISPATCH = torch._C._disabled_torch_dispatch_impl
_FAKE_MODE = torch._C._TorchDispatchModeKey.FAKE

#: Whether a class is foreign, for those that were met; None for fake tensors, where it depends on the modes.
_MET: dict[type, bool | None] = {torch.Tensor: False, torch.nn.Parameter: False}


def known(kind: type[torch.Tensor]) -> type[torch.Tensor]:
    """Declare a class with a dispatch of its own that the modes here know how to treat."""
    _MET[kind] = False
    return kind


def is_foreign(kind: type) -> bool:
    """Whether a class has a ``__torch_dispatch__`` that is not ours: the elements need not be where the memory seems to be.

    A fake tensor has no elements; where a ``FakeTensorMode`` is entered, it takes every op, and the class need not.
    """
    found = _MET.get(kind, _MET)
    if found is _MET:
        if issubclass(kind, FakeTensor):
            found = _MET[kind] = None
        else:
            found = _MET[kind] = kind.__torch_dispatch__ is not _NO_DISPATCH  # type: ignore[attr-defined]
    return not _fakes_are_seen() if found is None else bool(found)


def _fakes_are_seen() -> bool:
    return torch._C._get_dispatch_mode(_FAKE_MODE) is not None


def is_bare(kind: type) -> bool:
    """Whether a class leaves torch's functions what they are, beside making their results its own."""
    own = getattr(kind.__torch_function__, "__func__", None)  # type: ignore[attr-defined]
    return own is torch.Tensor.__torch_function__.__func__ and not is_foreign(kind)  # type: ignore[attr-defined]


def refuse_foreign(tensor: torch.Tensor, transform: str) -> None:
    """Refuse a tensor of a foreign class.

    Raises:
        RuntimeError: if it is one.
    """
    if not is_foreign(tensor.__class__):
        return
    if isinstance(tensor, FakeTensor):
        raise RuntimeError(
            f"{transform}: a FakeTensor has no elements outside of its mode. Call the transform within `with FakeTensorMode():`, "
            "where the result is a FakeTensor as well."
        )
    raise RuntimeError(
        f"{transform}: a {tensor.__class__.__name__} runs torch's ops in a way of its own (__torch_dispatch__), which "
        "chainrule does not see through. Use the tensors that it is made of."
    )


__all__ = ["is_bare", "is_foreign", "known", "refuse_foreign"]
