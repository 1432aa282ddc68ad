"""``x[index] = value`` on a tape: a view of what the index chooses, and a write to that."""

from __future__ import annotations

from typing import Any

import torch

from chainrule.calls import constant_beside
from chainrule.dispatch import LightMode, seen_by
from chainrule.shortcuts import TAPE

aten = torch.ops.aten

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
    elif mode.kind == TAPE and mode.below is not None and _assign_to_mapped(mode, tensor, index, value):
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


def _assign_to_mapped(mode: Any, tensor: torch.Tensor, index: Any, value: Any) -> bool:
    """The same for a part of a tensor of the vmap around a tape, where nothing else is around: False leaves it to torch."""
    if getattr(tensor, "level", None) is not mode.below or not tensor.dtype.is_floating_point or not mode.stands_on_level():
        return False
    if value.__class__ is float or value.__class__ is int:
        value = constant_beside(value, tensor)
    if not isinstance(value, torch.Tensor):
        return False
    parts = parts_of(tuple(tensor.shape), index if index.__class__ is tuple else (index,))
    return bool(parts) and mode.alias.assign(tensor, parts, value)


def parts_of(shape: tuple[int, ...], index: tuple[Any, ...]) -> list[tuple[Any, tuple[int, ...]]]:
    """The ops, with their arguments after the tensor, that choose a view one after the other; none if torch has to see to it."""
    if not all([item.__class__ in _PLACES for item in index]):
        return []
    named = sum([item is not None and item is not ... for item in index])
    if named > len(shape) or sum([item is ... for item in index]) > 1:
        return []
    parts: list[tuple[Any, tuple[int, ...]]] = []
    dim = source = 0
    for item in index:
        if item is ...:
            dim, source = dim + len(shape) - named, source + len(shape) - named
        elif item is None:
            parts.append((aten.unsqueeze.default, (dim,)))
            dim += 1
        elif item.__class__ is int:
            size = shape[source]
            if not -size <= item < size:
                return []
            parts.append((aten.select.int, (dim, item)))
            source += 1
        else:
            size = shape[source]
            ends = [item.start, item.stop, item.step]
            if not all([end is None or end.__class__ is int for end in ends]) or (item.step is not None and item.step < 1):
                return []
            start, stop, step = item.indices(size)
            if (start, stop, step) != (0, size, 1):
                parts.append((aten.slice.Tensor, (dim, start, max(start, stop), step)))
            dim, source = dim + 1, source + 1
    return parts
