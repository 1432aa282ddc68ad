"""Calls on plain tensors: what says that they are plain, and how they run where no other mode has to know."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from chainrule.calls import shared_constant
from chainrule.capture.schema import OpFacts
from chainrule.functions import Function
from chainrule.subclasses import is_foreign


def have_stored_graphs(args: Iterable[Any]) -> bool:
    """Whether what a mapped tensor stands for, at some depth, has a graph of torch's."""
    if not torch.is_grad_enabled():
        return False
    for item in args:
        while hasattr(item, "level"):
            item = item.inner if isinstance(item.inner, torch.Tensor) else item.inner.value
            if item.requires_grad:
                return True
    return False


def is_elsewhere(tensor: torch.Tensor) -> bool:
    """Whether the elements of a tensor are not where they seem to be, and no mode sees to that: only its class says what is."""
    level = getattr(tensor, "level", None)
    return is_foreign(tensor.__class__) or (level is not None and not level.running)


def are_plain(args: Iterable[Any], *, joined: bool = False) -> bool:
    """Whether all tensors are torch's own, real, and (unless ``joined``) without a graph."""
    for item in args:
        if isinstance(item, torch.Tensor):
            if item.is_complex() or (item.requires_grad and not joined):
                return False
            if item.__class__ is not torch.Tensor and not (joined and item.__class__ is torch.nn.Parameter):
                return False
        elif (item.__class__ is list or item.__class__ is tuple) and not are_plain(item, joined=joined):
            return False
    return True


def run_alone(facts: OpFacts, args: tuple[Any, ...]) -> Any:
    """Run an op as it arrives at the handler."""
    if facts.numbers and args[-1].__class__ is float and len(args) == 2 and _is_seen_by_none(args[0]):
        return facts.fast(args[0], shared_constant(args[1], args[0].dtype))
    return facts.fast(*args)


def run_function_alone(function: Function, args: tuple[Any, ...]) -> Any:
    """Run a function of the table by torch itself."""
    if function.numbers and (args[1].__class__ is float or args[1].__class__ is int) and args[0].__class__ is torch.Tensor:
        return function.call(args[0], shared_constant(args[1], args[0].dtype))
    return function.call(*args)


def _is_seen_by_none(tensor: Any) -> bool:
    """Whether a number beside a tensor may be a constant: no other mode sees the call."""
    return tensor.__class__ is torch.Tensor and not torch._C._len_torch_dispatch_stack()
