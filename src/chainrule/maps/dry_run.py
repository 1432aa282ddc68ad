"""Recording a program without running it: on tensors that have shapes and no memory.

The first run of a plan holds more than its replays do, and a plan that is made to find out what it needs should not need it.
Here the calls are made on torch's ``meta`` device, while the program that is written down is the one of the true device.
Only what shapes decide can be recorded so; code of a user's, and calls that look at values, cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch

from chainrule.dispatch import undispatched
from chainrule.maps.staging import Program, Ref, Staged, refs
from chainrule.settings import setting

_META = torch.device("meta")

_DRY: ContextVar[bool] = ContextVar("chainrule_dry", default=False)

#: Whether programs are recorded without being run.
is_dry = _DRY.get


class NotDryError(Exception):
    """This program cannot be recorded without running it."""


def dry() -> AbstractContextManager[None]:
    """Programs that are made inside are recorded on tensors without memory."""
    return setting(_DRY, True)


class DryRun(Program):
    """A program that is recorded on tensors without memory.

    Raises:
        NotDryError: by its methods, where that is not possible.
    """

    def __init__(self) -> None:
        super().__init__()
        # The calls of a replay are seen by it.
        self.mode = None

    def input(self, key: Any, value: torch.Tensor) -> Staged:
        """As :meth:`Program.input`."""
        known = key in self._input_values
        staged = super().input(key, value)
        if not known and isinstance(value, torch.Tensor):
            with undispatched():
                staged.value = shadow(value)
        return staged

    def constant(self, value: torch.Tensor) -> Staged:
        """As :meth:`Program.constant`."""
        if value.is_meta:  # made of values that are not there
            raise NotDryError("a constant is made of the values of a run")
        staged = super().constant(value)
        with undispatched():
            staged.value = shadow(value)
        return staged

    def _run(self, function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
        if function.__class__ is MethodType:
            raise NotDryError("code of a user's is run by the real run alone")
        with undispatched(), torch.no_grad():
            return function(*[_shadowed(item) for item in args], **{name: _shadowed(item) for name, item in kwargs.items()})

    def _record(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        staged = super()._record(function, args, kwargs, result)
        device = self._device(args, kwargs)
        for item in staged if isinstance(staged, tuple) else (staged,):
            if (kind := self.kinds.get(item.slot)) is not None:
                self.kinds[item.slot] = (kind[0], kind[1], device)
        return staged

    def _device(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
        """The device of the result of a call."""
        for item in (*kwargs.values(), *args):
            if isinstance(item, torch.device):
                return item
        if isinstance(named := kwargs.get("device"), str):
            return torch.device(named)
        read = refs((args, tuple(kwargs.values())))
        # A number may stand on the CPU beside arrays of another device.
        several = [self.kinds[slot] for slot in read if slot in self.kinds]
        return max(several, key=lambda kind: len(kind[0]))[2] if several else torch.get_default_device()


def shadow(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape, dtype and strides without memory.

    Raises:
        NotDryError: if it has another layout, or views of it are more than strides tell.
    """
    if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
        raise NotDryError("no plain tensor")
    strides = tensor.stride() if tensor.__class__ in (torch.Tensor, torch.nn.Parameter) else None
    if strides is None:
        return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device=_META)
    return torch.empty_strided(tuple(tensor.shape), strides, dtype=tensor.dtype, device=_META)


def _shadowed(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree if tree.is_meta else shadow(tree)
    if isinstance(tree, torch.device):
        return _META
    if type(tree) in (list, tuple):
        return type(tree)(map(_shadowed, tree))
    return tree


def is_complete(program: DryRun) -> bool:
    """Whether no call refers to a tensor without memory."""

    def is_real(tree: Any) -> bool:
        if isinstance(tree, torch.Tensor):
            return not tree.is_meta
        if isinstance(tree, Ref):
            return True
        return all(map(is_real, tree)) if isinstance(tree, (list, tuple)) else True

    return all(is_real(i.args) and is_real(list(i.kwargs.values())) for i in program.instructions)
