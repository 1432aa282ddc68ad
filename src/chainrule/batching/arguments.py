"""The arguments of calls on mapped tensors: what stands for them, and what that says of the call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from chainrule.batching.tensor import BatchTensor
from chainrule.rules.batching_base import Batched
from chainrule.subclasses import is_foreign


class Stored:
    """What stands for tensors among the arguments of a strategy, and what that says of the call.

    Attributes:
        batched: whether one of them carries the batch.
        joined: whether one of them has a graph.
        lazy: whether one of them is complex, and may be conjugated when it is read.
        refused: whether one of them is left to torch's dispatcher.
    """

    __slots__ = ("batched", "joined", "lazy", "mode", "refused")

    def __init__(self, mode: Any) -> None:
        self.mode = mode
        self.batched = self.joined = self.lazy = self.refused = False

    def take(self, item: Tensor) -> Any:
        """What stands for a tensor."""
        inner: Any = item
        value: Any = item
        if item.__class__ is BatchTensor:
            if item.level is not self.mode or item.requires_grad:
                self.refused = True
                return item
            inner = value = item.inner
            if inner.__class__ is Batched:
                self.batched, value = True, inner.value
        elif item.__class__ is not Tensor and is_foreign(item.__class__):
            self.refused = True
            return item
        self.lazy = self.lazy or value.is_complex()
        self.joined = self.joined or value.requires_grad
        return inner


# The code of torch's own `torch.autograd.Function.apply`, a Python function up to torch 2.13. Later it is one in C, and
# `autograd_bridge` adds the function that calls it.
APPLY_CODES: list[Any] = [
    method.__func__.__code__ for method in (torch.autograd.Function.__dict__["apply"],) if isinstance(method, classmethod)
]


def refuse_hidden_backward(func: Any, inner: Sequence[Any]) -> None:
    """Refuse a user's `torch.autograd.Function` on a value whose gradient is recorded outside of vmap.

    Its forward runs without recording, so that the gradient of the result would silently be nothing: the user's
    backward belongs to the tensors that the function sees, and the gradient is wanted of the stored ones.

    Raises:
        RuntimeError: the op runs inside such a forward.

    """
    values = [item.value if item.__class__ is Batched else item for item in inner]
    if not any(isinstance(value, Tensor) and value.requires_grad for value in values):
        return
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code in APPLY_CODES:
            raise RuntimeError(
                f"vmap: a torch.autograd.Function was applied (it ran {func}) to a tensor that requires a gradient "
                "outside of vmap. Its backward would not be used, and the gradient would be lost. Take the gradient "
                "with a chainrule transform, or inside the mapped function, or detach the inputs."
            )
        frame = frame.f_back  # type: ignore[assignment]


def has_tensor(items: Any, which: Callable[[Tensor], bool]) -> bool:
    """Whether one of the tensors in some items is such a one: for the following two."""
    for item in items:
        if item.__class__ is Batched:
            item = item.value
        if isinstance(item, Tensor):
            if which(item):
                return True
        elif isinstance(item, (list, tuple)) and has_tensor(item, which):
            return True
    return False


def has_graph(tensor: Tensor) -> bool:
    """Whether calls on a tensor have to be seen by autograd."""
    return tensor.requires_grad
