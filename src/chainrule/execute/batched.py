"""Replaying a plan under ``vmap`` on the stored tensors: the batched form of a program is recorded once, then replayed.

A program that runs under a vmap would pass every call through the vmap's handler. What the handler does depends on
shapes only, so the ops that it runs on the stored tensors are recorded as a program of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _get_dispatch_stack_at

from chainrule.batching.mode import VmapMode
from chainrule.batching.tensor import BatchTensor, wrap_batched, wrap_constant
from chainrule.capture.recorder import Recorder
from chainrule.dispatch import undispatched
from chainrule.maps.staging import Program, Staged
from chainrule.modes_off import without_innermost
from chainrule.rules.batching_base import Batched

Runner = Callable[[Sequence[Any], Sequence[Any]], tuple[Any, ...]]
Key = tuple[Any, ...]

_strided = torch.strided


class Stored(NamedTuple):
    """What a replay on stored tensors needs.

    Attributes:
        mode: the vmap.
        tensors: the tensors behind the values.
        key: what the batched program depends on beside the plan: which of them are batched, and their layouts.
        joined: whether some of the tensors have a graph, which the results are to join.
    """

    mode: VmapMode
    tensors: list[torch.Tensor]
    key: Key
    joined: bool


def stored_under_vmap(values: Sequence[Any]) -> Stored | None:
    """What a replay on stored tensors needs, when a vmap is the only active mode.

    Returns:
        It; None when the wrapped tensors have a graph of their own, or a value belongs to another level.
    """
    mode = _get_dispatch_stack_at(0)
    return None if mode.__class__ is not VmapMode or mode.size == 0 else stored_values(values, mode)


def stored_values(values: Sequence[Any], mode: VmapMode) -> Stored | None:
    """What a replay on the stored tensors of a vmap needs; None as for :func:`stored_under_vmap`."""
    tensors: list[torch.Tensor] = []
    parts: list[Any] = [mode.size]
    joined = False
    for value in values:
        if value.__class__ is BatchTensor:
            if value.level is not mode or value.requires_grad:
                return None
            value = value.inner
            if value.__class__ is Batched:
                value = value.value
                parts.append(True)
            if value.__class__ is BatchTensor:
                return None
        elif not isinstance(value, torch.Tensor):
            return None
        if value.is_complex() and value.is_conj():
            return None
        joined = joined or value.requires_grad
        tensors.append(value)
        parts.append(value.shape)
        parts.append(value.stride() if (layout := value.layout) is _strided else layout)
    if joined and mode._records and not torch.is_grad_enabled():
        return None
    return Stored(mode, tensors, tuple(parts), joined)


def without_graphs(stored: Stored, values: Sequence[Any]) -> tuple[list[Any], list[torch.Tensor]]:
    """The same values and stored tensors without their graphs: what autograd makes of views is not known to a recorder."""
    with undispatched():
        tensors = [tensor.detach() for tensor in stored.tensors]
    bare: list[Any] = []
    for value, tensor in zip(values, tensors, strict=True):
        if value.__class__ is not BatchTensor:
            bare.append(tensor)
        elif value.inner.__class__ is Batched:
            bare.append(wrap_batched(Batched(tensor), stored.mode))
        else:
            bare.append(wrap_constant(tensor, stored.mode))
    return bare, tensors


def same_stored(tensor: BatchTensor) -> BatchTensor | None:
    """A new tensor object over the same stored tensor, when no outer mode and no autograd has to see an alias."""
    mode = tensor.level
    inner = tensor.inner
    if inner.__class__ is not Batched or inner.value.requires_grad or tensor.requires_grad or inner.value.is_complex():
        return None
    if torch._C._len_torch_dispatch_stack() != 1 or _get_dispatch_stack_at(0) is not mode:
        return None
    return wrap_batched(inner, mode)


def record_batched(
    run: Callable[[], tuple[Any, ...]], mode: VmapMode, inputs: Sequence[torch.Tensor], constants: Sequence[torch.Tensor]
) -> tuple[tuple[Any, ...], Program, list[Staged | None], list[bool]] | None:
    """Run a program under its vmap and record what it does to the stored tensors.

    Args:
        run: runs the program.
        mode: the vmap.
        inputs: the tensors behind the program's inputs.
        constants: the constants of the program.

    Returns:
        The results, the batched program, its results, and which of them are batched; the last three are what
        :func:`wrap` needs later. None instead of the record when a result cannot be traced.
    """
    numbers = {id(tensor): number for number, tensor in enumerate(inputs)}
    fixed = {id(tensor) for tensor in constants}

    def find(program: Program, tensor: torch.Tensor) -> Staged | None:
        number = numbers.get(id(tensor))
        if number is not None:
            return program.input(number, tensor)
        return program.constant(tensor) if id(tensor) in fixed else None

    recorder = Recorder(find)
    loops = len(mode.fallbacks)
    with without_innermost(), recorder, mode.inside():
        results = run()
    staged: list[Staged | None] = []
    batched: list[bool] = []
    for result in results:
        if result is None:
            staged.append(None)
            batched.append(False)
            continue
        tensor = result.value if result.__class__ is BatchTensor else result
        known = recorder.staged(tensor)
        if known is None or not recorder.pure or len(mode.fallbacks) > loops:
            return results, Program(), [], []
        staged.append(known)
        batched.append(result.__class__ is BatchTensor and result.batched)
    return results, recorder.program, staged, batched


def wrap(results: Sequence[Any], batched: Sequence[bool], mode: VmapMode) -> list[Any]:
    """Stored results as tensors of the vmap's level."""
    return [
        None if r is None else wrap_batched(Batched(r), mode) if flag else wrap_constant(r, mode)
        for r, flag in zip(results, batched, strict=True)
    ]
