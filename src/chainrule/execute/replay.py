"""Replay: a recorded program as one straight-line Python function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from chainrule.maps.staging import Instruction, Program, Ref, Staged, freeze

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
    copied = _shared_results(program, wanted) if program.recorded else set()
    kept = list(program.instructions)
    if not program.writes:
        if program.recorded:
            kept = _share(kept, _roots(program, kept, [s for s in wanted if s is not None]), program.copies)
        kept = _needed(kept, [s for s in wanted if s is not None])
    namespace: dict[str, Any] = {}
    lines = ["def run(tape, seeds):"]
    used = {slot for instruction in kept for slot in _refs((instruction.args, tuple(instruction.kwargs.values())))}
    used.update(slot for slot in wanted if slot is not None)
    for key, slot in program.inputs.items():
        if slot in used:
            source = f"tape[{key}]" if isinstance(key, int) else f"seeds[{key[1]}]"
            lines.append(f"    v{slot} = {source}")
    for slot, tensor in program.constants.items():
        if slot in used:
            namespace[f"v{slot}"] = tensor
    constants = set(program.constants)
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
    runner.constants = list(program.constants.values())  # type: ignore[attr-defined]
    return runner


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


def _refs(tree: Any) -> list[int]:
    found: list[int] = []
    stack = [tree]
    while stack:
        item = stack.pop()
        if isinstance(item, Ref):
            found.append(item.slot)
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
    return found


def _shared_results(program: Program, wanted: Sequence[int | None]) -> set[int]:
    """The results (by number) of a recorded program that share memory with an input, a constant or another result."""
    producers = {slot: instruction for instruction in program.instructions for slot in instruction.outputs}
    taken: set[int] = set()
    shared: set[int] = set()
    for number, slot in enumerate(wanted):
        if slot is None:
            continue
        root = _root(program, producers, slot)
        if root in taken or root not in producers:
            shared.add(number)
        taken.add(root)
    return shared


def _root(program: Program, producers: dict[int, Instruction], slot: int) -> int:
    while slot in program.views:
        first = producers[slot].args[0]
        if not isinstance(first, Ref):
            break
        slot = first.slot
    return slot


def _roots(program: Program, kept: Sequence[Instruction], wanted: Sequence[int]) -> set[int]:
    """The results, and what they are views of."""
    producers = {slot: instruction for instruction in kept for slot in instruction.outputs}
    found: set[int] = set()
    for slot in wanted:
        found.add(slot)
        while slot in program.views and isinstance(first := producers[slot].args[0], Ref):
            slot = first.slot
            found.add(slot)
    return found


def _share(instructions: Sequence[Instruction], own: set[int], copies: dict[int, int]) -> list[Instruction]:
    """Run equal calls once, and no call that copies. Those in ``own`` give results that must not share their memory."""
    renamed: dict[int, int] = {}
    known: dict[Any, tuple[int, ...]] = {}
    kept: list[Instruction] = []
    for instruction in instructions:
        args, kwargs = _renamed(instruction.args, renamed), {k: _renamed(v, renamed) for k, v in instruction.kwargs.items()}
        instruction = instruction._replace(args=args, kwargs=kwargs)
        if not own.isdisjoint(instruction.outputs):
            kept.append(instruction)
            continue
        if len(instruction.outputs) == 1 and (source := copies.get(instruction.outputs[0])) is not None:
            renamed[instruction.outputs[0]] = renamed.get(source, source)
            continue
        try:
            key = (instruction.function, freeze(args), tuple((k, freeze(v)) for k, v in sorted(kwargs.items())))
            earlier = known.get(key)
        except TypeError:
            kept.append(instruction)
            continue
        if earlier is None:
            known[key] = instruction.outputs
            kept.append(instruction)
        else:
            renamed.update(zip(instruction.outputs, earlier, strict=True))
    return kept


def _renamed(tree: Any, names: dict[int, int]) -> Any:
    if isinstance(tree, Ref):
        return Ref(names.get(tree.slot, tree.slot))
    if isinstance(tree, list):
        return [_renamed(item, names) for item in tree]
    if type(tree) is tuple:
        return tuple(_renamed(item, names) for item in tree)
    return tree


def _needed(instructions: Sequence[Instruction], wanted: list[int]) -> list[Instruction]:
    needed = set(wanted)
    kept = []
    for instruction in reversed(instructions):
        if needed.intersection(instruction.outputs):
            needed.update(_refs((instruction.args, tuple(instruction.kwargs.values()))))
            kept.append(instruction)
    return kept[::-1]


def _last_uses(kept: list[Instruction], wanted: Sequence[int | None]) -> dict[int, list[int]]:
    last: dict[int, int] = {}
    for number, instruction in enumerate(kept):
        for slot in (*_refs((instruction.args, tuple(instruction.kwargs.values()))), *instruction.outputs):
            last[slot] = number
    result: dict[int, list[int]] = {}
    keep = set(wanted)
    for slot, number in last.items():
        if slot not in keep:
            result.setdefault(number, []).append(slot)
    return result
