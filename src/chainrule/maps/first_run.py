"""The first run of a program, which records it, in little memory.

A program is recorded by running it, and whoever stages a value may ask for it until the plan is complete. Here large values
are let go as soon as nothing but the program refers to one, and no node that is still to be computed has it; a value that
somebody asks for all the same is computed again, by the calls that are recorded already.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from sys import getrefcount
from types import MethodType
from typing import Any

import torch
from torch.autograd import forward_ad

from chainrule.maps.dry_run import DryRun, is_dry
from chainrule.maps.nodes import Node, postorder
from chainrule.maps.staging import Instruction, Program, Ref, Staged, reads
from chainrule.settings import setting

#: From this size on, in bytes, a value is let go.
LARGE = 1 << 16

#: A record of so many elements, and of so many times those of the results, is not to be held as a whole where it need not be.
_LONG = 1 << 23
_TIMES = 10

_REFUSED: ContextVar[bool] = ContextVar("chainrule_long_records_refused", default=False)

#: The references to a value that nobody but its program has: those of three tables, and the one of who counts them.
_KNOWN_HERE = 4


class FirstRun(Program):
    """A program whose large values are let go as its nodes are computed."""

    def __init__(self) -> None:
        super().__init__()
        self._large: dict[int, Staged] = {}
        self._made: dict[int, Staged] = {}

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """As :meth:`Program.call`."""
        for slot in [slot for slot in self._large if getrefcount(self._large[slot]) <= _KNOWN_HERE]:
            del self._large.pop(slot).value
        before = len(self.instructions)
        results = super().call(function, *args, **kwargs)
        if len(self.instructions) > before:
            for staged in results if isinstance(results, tuple) else (results,):
                self._made[staged.slot] = staged
                value = staged.value
                # A graph holds its values anyhow; a bound method is code of a user's, which is not to run once more.
                if value.__class__ is torch.Tensor and value.nbytes >= LARGE and not value.requires_grad:
                    if function.__class__ is not MethodType:
                        self._large[staged.slot] = staged
        return results

    def let_go(self, needed: Collection[int]) -> None:
        """As :meth:`Program.let_go`."""
        for slot in [slot for slot in self._large if slot not in needed]:
            del self._large.pop(slot).value

    def computed_again(self, staged: Staged) -> torch.Tensor:
        """As :meth:`Program.computed_again`. From here on the value stays: it is shared by several."""
        held = {known.slot: known.value for known in self._input_values.values()} | self.constants
        calls, needed = list[Instruction](), {staged.slot}
        for instruction in reversed(self.instructions):
            if needed.isdisjoint(instruction.outputs):
                continue
            calls.append(instruction)
            for slot in reads(instruction):
                if slot not in held and slot not in needed:
                    if (value := _held(self._made[slot])) is None:
                        needed.add(slot)
                    else:
                        held[slot] = value
        for number, instruction in enumerate(reversed(calls)):
            args, kwargs = (_filled(tree, held) for tree in (instruction.args, instruction.kwargs))
            found = instruction.function(*args, **kwargs)
            held.update(zip(instruction.outputs, found if instruction.is_tuple else (found,), strict=True))
            del args, kwargs, found
            later = {slot for call in calls[: len(calls) - 1 - number] for slot in reads(call)} | {staged.slot}
            for slot in [slot for slot in held if slot not in later]:
                del held[slot]
        staged.value = held[staged.slot]
        return staged.value

    def forget_values(self) -> None:
        """As :meth:`Program.forget_values`."""
        super().forget_values()
        self._large.clear()
        self._made.clear()


def _held(staged: Staged) -> torch.Tensor | None:
    """The value, unless it was let go."""
    try:
        return object.__getattribute__(staged, "value")  # type: ignore[no-any-return]
    except AttributeError:
        return None


def _filled(tree: Any, values: Mapping[int, Any]) -> Any:
    if isinstance(tree, Ref):
        return values[tree.slot]
    if isinstance(tree, dict):
        return {name: _filled(item, values) for name, item in tree.items()}
    return type(tree)(_filled(item, values) for item in tree) if type(tree) in (list, tuple) else tree


class LongRecordError(Exception):
    """What would be recorded here takes more memory than it should."""


def without_long_records() -> AbstractContextManager[None]:
    """Inside, plans whose first run would hold many times their results raise a `LongRecordError` before they are run."""
    return setting(_REFUSED, True)


def first_run() -> Program:
    """A program to be recorded: one that lets large values go, where nothing follows its calls that would hold them.

    Where nothing is to be run (see :mod:`chainrule.maps.dry_run`), it is one without values.
    """
    if is_dry():
        return DryRun()
    followed = torch._C._len_torch_dispatch_stack() or forward_ad._current_level >= 0
    program = Program()
    return program if followed or program.mode is not None else FirstRun()


def forced(program: Program, roots: Sequence[Node | None]) -> list[Staged | None]:
    """Stage nodes and everything they need, as :meth:`Node.force` does for one; None stays None.

    Raises:
        LongRecordError: inside :func:`without_long_records`.
    """
    wanted = [node for node in roots if node is not None]
    if _REFUSED.get():
        held = sum([node.numel for node in postorder(wanted) if node.staged is None])
        if held >= _LONG and held >= _TIMES * sum([node.numel for node in wanted]):
            raise LongRecordError
    if isinstance(program, FirstRun):
        order = [node for node in postorder(wanted) if node.staged is None]
        last = {id(node): number for number, consumer in enumerate(order) for node in (consumer, *consumer.inputs)}
        last.update((id(node), len(order)) for node in wanted)
        dying: dict[int, list[Node]] = {}
        for node in order:
            dying.setdefault(last[id(node)], []).append(node)
        alive: dict[int, int] = {}
        for number, node in enumerate(order):
            slot = node.force(program).slot
            alive[slot] = alive.get(slot, 0) + 1
            for gone in dying.get(number, ()):
                assert gone.staged is not None
                alive[gone.staged.slot] -= 1
                if not alive[gone.staged.slot]:
                    del alive[gone.staged.slot]
            program.let_go(alive)
    return [None if node is None else node.force(program) for node in roots]


__all__ = ["FirstRun", "LongRecordError", "first_run", "forced", "without_long_records"]
