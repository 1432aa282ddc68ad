"""``x[index] = value`` on a tape: a view of what the index chooses, and a write to that."""

from __future__ import annotations

from typing import Any

import torch

from chainrule.calls import constant_beside
from chainrule.dispatch import LightMode, seen_by
from chainrule.shortcuts import TAPE

#: Classes of the parts of an index that chooses a view.
_PLACES = frozenset((int, slice, type(None), type(...)))
_PARTS: Any = (torch.Tensor.__getitem__, torch.Tensor.fill_, torch.Tensor.expand, torch.Tensor.copy_, torch.Tensor.index_put_)
_CHOOSE, _FILL, _EXPAND, _COPY, _PUT = _PARTS


def assign(mode: LightMode, tensor: Any, index: Any, value: Any) -> Any:
    """Assign as torch does, in parts that a tape takes itself where they are plain."""
    if mode.kind == TAPE and mode.below is None and tensor.__class__ is torch.Tensor and tensor.dtype.is_floating_point:
        number = value.__class__ is float or value.__class__ is int
        if number or value.__class__ is torch.Tensor:
            parts = index if index.__class__ is tuple else (index,)
            if parts and all([part.__class__ in _PLACES for part in parts]):
                taken = _assign_to_view(mode, tensor, index, value, number)
            else:
                taken = index.__class__ is torch.Tensor and _assign_to_places(mode, tensor, index, value, number)
            if taken:
                return None
    return torch.Tensor.__setitem__(tensor, index, value)


def _assign_to_view(mode: LightMode, tensor: torch.Tensor, index: Any, value: Any, number: bool) -> bool:
    view = seen_by(mode, _CHOOSE, (tensor, index), {})
    if number:
        seen_by(mode, _FILL, (view, value), {})
        return True
    if value.shape != view.shape:
        if value.dim() > view.dim():  # torch drops dimensions before the others
            return False
        value = seen_by(mode, _EXPAND, (value, view.shape), {})
    seen_by(mode, _COPY, (view, value), {})
    return True


def _assign_to_places(mode: LightMode, tensor: torch.Tensor, index: torch.Tensor, value: Any, number: bool) -> bool:
    if index.dtype is torch.bool:
        if not index.dim():  # torch gives both a dimension for it
            return False
        room = tensor.dim() - index.dim() + 1
    elif index.dtype is torch.long:
        room = tensor.dim() + index.dim() - 1
    else:
        return False
    if number:
        value = constant_beside(value, tensor)
    if value is None or value.dtype is not tensor.dtype or value.dim() > room:
        return False
    seen_by(mode, _PUT, (tensor, (index,), value), {})
    return True
