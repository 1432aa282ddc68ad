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
from chainrule.dispatch import again, undispatched
from chainrule.execute.replay import part_constants
from chainrule.maps.staging import Program, Staged
from chainrule.modes_off import outside, without_innermost
from chainrule.rules.batching_base import Batched

Runner = Callable[[Any, Any], tuple[Any, ...]]
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


def stored_values(values: Sequence[Any], mode: VmapMode, *, nested: bool = False) -> Stored | None:
    """What a replay on the stored tensors of a vmap needs; None as for :func:`stored_under_vmap`.

    With ``nested`` the stored tensors may be those of a vmap around this one, and the key says which of them are the same.
    """
    tensors: list[torch.Tensor] = []
    parts: list[Any] = [mode.size]
    joined = False
    for value in values:
        if value.__class__ is BatchTensor:
            if value.requires_grad:
                return None
            if value.level is mode:
                value = value.inner
                if value.__class__ is Batched:
                    value = value.value
                    parts.append(True)
            if value.__class__ is BatchTensor and not nested:
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
    if nested and len(places := {id(tensor): place for place, tensor in enumerate(tensors)}) < len(tensors):
        parts.append(tuple([places[id(tensor)] for tensor in tensors]))
    return Stored(mode, tensors, tuple(parts), joined)


def nested_values(values: Sequence[Any], modes: int) -> Stored | None:
    """What a replay on stored tensors needs under a vmap that stands in other modes; None as for :func:`stored_under_vmap`.

    Args:
        values: what the plan reads.
        modes: how many modes are on.
    """
    mode = _get_dispatch_stack_at(modes - 1)
    if mode.__class__ is not VmapMode or mode.size == 0 or torch._C._len_torch_function_stack():
        return None
    return stored_values(values, mode, nested=True)


def record_apart(
    runner: Runner, needs: Sequence[Any], stored: Stored, values: Sequence[Any]
) -> tuple[Program, list[Staged | None], list[bool]] | None:
    """Record what a program does to stored tensors on others like them, of one sample of the vmaps around, outside of all modes.

    Args:
        runner: runs the program.
        needs: what it reads: numbers of tape values, and ``("seed", number)``.
        stored: the tensors.
        values: the values that they stand behind, in the order of ``needs``.

    Returns:
        The batched program, its results, and which of them are batched; None where it cannot be recorded.
    """
    made: dict[int, torch.Tensor] = {}
    with undispatched():
        for tensor in stored.tensors:
            if id(tensor) not in made:
                sample = _sample_of(tensor)
                if sample is None:
                    return None
                made[id(tensor)] = sample.detach()
    tensors = [made[id(tensor)] for tensor in stored.tensors]
    mode = stored.mode
    given = _in_place_of(values, tensors, mode)
    tape, seeds = dict[Any, Any](), dict[Any, Any]()
    for key, value in zip(needs, given, strict=True):
        if key.__class__ is int:
            tape[key] = value
        else:
            seeds[key[1]] = value
    with outside(), mode.outside(), again(mode):
        outcome = record_batched(lambda: runner(tape, seeds), mode, tensors, runner.constants)  # type: ignore[attr-defined]
    assert outcome is not None
    results, program, staged, flags = outcome
    if not staged:
        return None
    part_constants(program, results)
    return program, staged, flags


def _sample_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The plain tensor of one sample of the vmaps around; None where there is no sample."""
    if not isinstance(tensor, BatchTensor):
        return tensor
    inner = tensor.inner
    if inner.__class__ is not Batched:
        return _sample_of(inner)
    whole = _sample_of(inner.value)
    return whole[0] if whole is not None and len(whole) else None


def _in_place_of(values: Sequence[Any], tensors: Sequence[torch.Tensor], mode: VmapMode) -> list[Any]:
    """Values with other tensors behind them."""
    made: list[Any] = []
    for value, tensor in zip(values, tensors, strict=True):
        if value.__class__ is not BatchTensor or value.level is not mode:
            made.append(tensor)
        elif value.inner.__class__ is Batched:
            made.append(wrap_batched(Batched(tensor), mode))
        else:
            made.append(wrap_constant(tensor, mode))
    return made


def without_graphs(stored: Stored, values: Sequence[Any]) -> tuple[list[Any], list[torch.Tensor]]:
    """The same values and stored tensors without their graphs: what autograd makes of views is not known to a recorder."""
    with undispatched():
        tensors = [tensor.detach() for tensor in stored.tensors]
    return _in_place_of(values, tensors, stored.mode), tensors


def same_stored(tensor: BatchTensor) -> BatchTensor | None:
    """A new tensor object over the same stored tensor, when no autograd has to see an alias.

    Modes around the level have one value and need no other name for it.
    """
    mode = tensor.level
    inner = tensor.inner
    if inner.__class__ is not Batched or inner.value.requires_grad or tensor.requires_grad or inner.value.is_complex():
        return None
    depth = torch._C._len_torch_dispatch_stack()
    if not depth or _get_dispatch_stack_at(depth - 1) is not mode:
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
