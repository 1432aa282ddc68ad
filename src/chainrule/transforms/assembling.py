"""Results that are computed in parts, put together in memory that is allocated once."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from chainrule.batching.tensor import BatchTensor
from chainrule.dispatch import undispatched
from chainrule.execute.batched import wrap
from chainrule.execute.memory import counted, current_watch


class Assembled:
    """A tensor that is put together from parts, in memory that is allocated once where that is possible.

    Tensors whose calls somebody follows are concatenated at the end.

    Args:
        total: the size of the dimension that the parts stand along.
        dim: that dimension.
    """

    def __init__(self, total: int, dim: int = 0) -> None:
        self._total = total
        self._dim = dim
        self._whole: torch.Tensor | None = None
        self._level: Any = None
        self._filled = 0
        self._parts: list[torch.Tensor] = []

    def add(self, start: int, part: torch.Tensor) -> None:
        """The part that begins at `start`; one comes after the other."""
        dim = self._dim % part.dim()
        if self._whole is None and not self._parts and (stored := _stored(part)) is not None:
            self._level = part.level if isinstance(part, BatchTensor) else None
            place = dim + (stored is not part)
            shape = (*stored.shape[:place], self._total, *stored.shape[place + 1 :])
            with undispatched():
                self._whole = stored.new_empty(shape)
            if (watch := current_watch()) is not None:
                watch.held += self._whole.nbytes
        if self._whole is None:
            self._parts.append(part)
            return
        if not self._suits(part, dim):
            self._parts = [self._here(self._whole.narrow(dim + (self._level is not None), 0, self._filled)), part]
            self._whole = None
            return
        if self._level is None:
            self._whole.narrow(dim, start, part.shape[dim]).copy_(part)
        else:
            with undispatched():
                self._whole.narrow(dim + 1, start, part.shape[dim]).copy_(part.value)  # type: ignore[attr-defined]
        self._filled = start + part.shape[dim]

    def result(self) -> torch.Tensor:
        """All parts."""
        if self._whole is not None:
            return self._here(self._whole)
        return counted(lambda: torch.cat(self._parts, self._dim))

    def _here(self, stored: torch.Tensor) -> torch.Tensor:
        if self._level is None:
            return stored
        (found,) = wrap([stored], [True], self._level)
        return found

    def _suits(self, part: torch.Tensor, dim: int) -> bool:
        """Whether a part is of the kind that the whole was allocated for."""
        stored, whole = _stored(part), self._whole
        if stored is None or whole is None or (part.level if isinstance(part, BatchTensor) else None) is not self._level:
            return False
        dim += stored is not part
        rest = [size for place, size in enumerate(stored.shape) if place != dim]
        return stored.dtype is whole.dtype and rest == [size for place, size in enumerate(whole.shape) if place != dim]


def _stored(part: torch.Tensor) -> torch.Tensor | None:
    """The plain tensor that is, or stands behind, a part whose calls nobody else follows; None where there is none."""
    modes = torch._C._len_torch_dispatch_stack()
    if forward_ad._current_level >= 0:
        return None
    stored: Any = part
    if part.__class__ is BatchTensor:
        if modes != 1 or not part.batched or torch._C._get_dispatch_stack_at(0) is not part.level:  # type: ignore[attr-defined]
            return None
        stored = part.value  # type: ignore[attr-defined]
    elif modes:  # a tape takes one concatenation better than many writes
        return None
    return stored if stored.__class__ is torch.Tensor and not stored.requires_grad and stored.layout is torch.strided else None


__all__ = ["Assembled"]
