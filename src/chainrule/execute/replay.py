"""Replay: a recorded program as one straight-line Python function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from chainrule.batching.tensor import BatchTensor
from chainrule.execute.simplify import refs, shared_results, simplify
from chainrule.maps.staging import Instruction, Program, Ref, Staged

Runner = Callable[[Sequence[Any], Sequence[torch.Tensor]], tuple[Any, ...]]

#: Functions whose result shares memory with their first argument (or may do so).
_VIEWS = frozenset(
    {
        torch.reshape, torch.permute, torch.t, torch.unsqueeze, torch.squeeze, torch.narrow, torch.broadcast_to,
        torch.transpose, torch.diagonal, torch.select, torch.movedim, torch.Tensor.__getitem__, torch.Tensor.to,
        torch.Tensor.expand, torch.Tensor.reshape, torch.Tensor.view, torch.Tensor.unsqueeze, torch.Tensor.squeeze,
        torch.Tensor.transpose, torch.Tensor.permute, torch.Tensor.unflatten, torch.Tensor.flatten, torch.flatten,
        torch.real, torch.imag, torch.conj, torch.view_as_real, torch.view_as_complex, torch.Tensor.conj, torch.unbind,
        torch.split, torch.Tensor.detach, torch.Tensor.contiguous, torch.atleast_1d, torch.swapaxes, torch.expand_copy,
    }
)  # fmt: skip


def owned(program: Program, results: Sequence[Staged | None]) -> list[Staged | None]:
    """Copy those results that share memory with an input, a constant, another result, or themselves (broadcast)."""
    producers = {slot: instruction for instruction in program.instructions for slot in instruction.outputs}
    taken: set[int] = set()
    fresh: list[Staged | None] = []
    for staged in results:
        if staged is None:
            fresh.append(None)
            continue
        root, broadcast = _memory(staged.slot, producers)
        if root is None or root in taken or broadcast:
            copy = torch.Tensor.clone
            if root in taken:
                staged = _again(program, staged)
            else:
                staged = program.call(copy, staged, memory_format=torch.contiguous_format)
        else:
            taken.add(root)
        fresh.append(staged)
    return fresh


def _again(program: Program, staged: Staged) -> Staged:
    # A second copy of the same value must be a new instruction, not the shared one.
    value = staged.value.clone(memory_format=torch.contiguous_format)
    return program._record(
        torch.Tensor.clone, (Ref(staged.slot),), {"memory_format": torch.contiguous_format}, value
    )


def _memory(slot: int, producers: dict[int, Instruction]) -> tuple[int | None, bool]:
    broadcast = False
    while True:
        instruction = producers.get(slot)
        if instruction is None:
            return None, broadcast
        if instruction.function not in _VIEWS:
            return slot, broadcast
        broadcast = broadcast or instruction.function in (torch.broadcast_to, torch.Tensor.expand)
        first = instruction.args[0]
        if not isinstance(first, Ref):
            return slot, broadcast
        slot = first.slot


def compile_program(program: Program, results: Sequence[Staged | None]) -> Runner:
    """Make a Python function ``run(tape values, seeds)`` that executes the instructions the results need.

    Inputs are keyed ``int`` (a tape slot) or ``("seed", number)``.
    """
    wanted = [None if staged is None else staged.slot for staged in results]
    copied = shared_results(program, wanted) if program.recorded else set()
    kept, made = simplify(program, [s for s in wanted if s is not None])
    namespace: dict[str, Any] = {}
    lines = ["def run(tape, seeds):"]
    used = {slot for instruction in kept for slot in refs((instruction.args, tuple(instruction.kwargs.values())))}
    used.update(slot for slot in wanted if slot is not None)
    for key, slot in program.inputs.items():
        if slot in used:
            source = f"tape[{key}]" if isinstance(key, int) else f"seeds[{key[1]}]"
            lines.append(f"    v{slot} = {source}")
    constants = {**{slot: _settled(tensor) for slot, tensor in program.constants.items()}, **made}
    for slot, tensor in constants.items():
        if slot in used:
            namespace[f"v{slot}"] = tensor
    last = _last_uses(kept, wanted)
    names: dict[int, str] = {}
    for number, instruction in enumerate(kept):
        lines.append("    " + _line(instruction, namespace, names))
        dead = [f"v{slot}" for slot in last.get(number, ()) if slot not in constants]
        if dead:
            lines.append(f"    del {', '.join(dead)}")
    names_of = ["None" if slot is None else f"v{slot}" for slot in wanted]
    returned = ", ".join(f"{name}.clone()" if number in copied else name for number, name in enumerate(names_of))
    lines.append(f"    return ({returned}{',' if len(wanted) == 1 else ''})")
    exec(compile("\n".join(lines), "<chainrule plan>", "exec"), namespace)  # noqa: S102 - our own generated source
    runner: Runner = namespace["run"]
    runner.source = "\n".join(lines)  # type: ignore[attr-defined]
    runner.constants = list(constants.values())  # type: ignore[attr-defined]
    return runner


def _settled(tensor: torch.Tensor) -> torch.Tensor:
    """A constant as it is outside of the transforms and of the inference mode in which it was made."""
    while tensor.__class__ is BatchTensor and not tensor.batched:  # type: ignore[attr-defined]
        tensor = tensor.inner  # type: ignore[attr-defined]
    if tensor.is_inference():
        with torch.inference_mode(False), torch._C._DisableTorchDispatch():
            tensor = tensor.clone()
    return tensor


def _line(instruction: Instruction, namespace: dict[str, Any], names: dict[int, str]) -> str:
    function = instruction.function
    name = names.get(id(function))
    if name is None:
        name = names[id(function)] = f"f{len(names)}"
        namespace[name] = function
    parts = [_expression(item, namespace) for item in instruction.args]
    parts += [f"{key}={_expression(item, namespace)}" for key, item in instruction.kwargs.items()]
    targets = ", ".join(f"v{slot}" for slot in instruction.outputs)
    if instruction.is_tuple and len(instruction.outputs) == 1:
        targets += ","
    call = f"{name}({', '.join(parts)})"
    return f"{targets} = {call}" if targets else call


def _expression(item: Any, namespace: dict[str, Any]) -> str:
    if isinstance(item, Ref):
        return f"v{item.slot}"
    if isinstance(item, list):
        return "[" + ", ".join(_expression(element, namespace) for element in item) + "]"
    if type(item) is tuple:
        inner = ", ".join(_expression(element, namespace) for element in item)
        return f"({inner}{',' if len(item) == 1 else ''})"
    if item is None or type(item) in (int, bool, str):
        return repr(item)
    name = f"c{len(namespace)}"
    namespace[name] = item
    return name


def _last_uses(kept: list[Instruction], wanted: Sequence[int | None]) -> dict[int, list[int]]:
    last: dict[int, int] = {}
    for number, instruction in enumerate(kept):
        for slot in (*refs((instruction.args, tuple(instruction.kwargs.values()))), *instruction.outputs):
            last[slot] = number
    result: dict[int, list[int]] = {}
    keep = set(wanted)
    for slot, number in last.items():
        if slot not in keep:
            result.setdefault(number, []).append(slot)
    return result
