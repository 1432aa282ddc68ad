"""Replay: a recorded program as one straight-line Python function."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload

from chainrule.batching.tensor import BatchTensor
from chainrule.dispatch import undispatched
from chainrule.execute.memory import Memory, predict
from chainrule.execute.renaming import renamed
from chainrule.execute.reuse import reusing
from chainrule.execute.row_blocks import with_filled_rows
from chainrule.execute.simplify import root, shared_results, simplify
from chainrule.execute.symmetry import with_symmetry
from chainrule.execute.workspace import Saved, Space, observable, of_instructions, same_draws, saved_by_instructions
from chainrule.maps.staging import Instruction, Program, Ref, Staged, reads
from chainrule.shortcuts import configure

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


#: Calls that take no longer than reading and writing their tensors.
_CHEAP = frozenset({torch.mul, torch.add, torch.sub, torch.rsub, torch.neg, torch.addcmul})

#: From this size on, in bytes, memory counts more than a call.
_LARGE = 1 << 16

#: How many such calls may take the place of a value that is kept, and within how many calls it is kept after a use.
_LONGEST = 2
_NEAR = 8


class Spent(list[Any]):
    """Values that nobody needs any more once a plan has taken them from the list."""


configure(spent=Spent)


def owned(program: Program, results: Sequence[Staged | None]) -> list[Staged | None]:
    """Copy those results that share memory with an input, a constant, another result, or themselves (broadcast)."""
    producers = {slot: instruction for instruction in program.instructions for slot in instruction.outputs}
    taken: set[int] = set()
    fresh: list[Staged | None] = []
    for staged in results:
        if staged is None:
            fresh.append(None)
            continue
        memory, broadcast = _memory(staged.slot, producers)
        if memory is None or memory in taken or broadcast:
            copy = program.call(torch.Tensor.clone, staged, memory_format=torch.contiguous_format)
            staged = _again(program, staged) if memory in taken or copy.slot in taken else copy
            memory = staged.slot
        taken.add(memory)
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


def part_constants(program: Program, results: Iterable[Any]) -> None:
    """Copy the constants of a program that are results of the run it was made of: whoever got those may write to them."""
    if not program.constants:
        return
    with undispatched():
        stored = [item.value if item.__class__ is BatchTensor else item for item in results]
        given = {value.untyped_storage()._cdata for value in stored if value.__class__ is torch.Tensor and not value.is_sparse}
        for slot, value in program.constants.items():
            if value.untyped_storage()._cdata in given:
                program.constants[slot] = value.clone()


def bare(staged: Staged | None) -> Staged | None:
    """A result without its value."""
    return None if staged is None else Staged(staged.program, staged.slot, None)  # type: ignore[arg-type]


def without_values(program: Program) -> Program:
    """Drop the tensors of the recording run, so that a cached plan holds no memory."""
    program.forget_values()
    program.constants = {slot: settled(value) for slot, value in program.constants.items()}
    return program


def compile_program(program: Program, results: Sequence[Staged | None], *, views: bool = False) -> Runner:
    """Make a Python function ``run(tape values, seeds)`` that executes the instructions the results need.

    Inputs are keyed ``int`` (a tape slot) or ``("seed", number)``. The function's attribute ``plain`` does the same on tensors
    that nothing follows (see :func:`~chainrule.execute.reuse.reusing`), in less memory.

    Args:
        program: the program.
        results: its results.
        views: whether a result may be an input or a view of one; otherwise results are tensors of their own.
    """
    source = Source(program, results)
    if views:
        source.copied.difference_update(source.of_inputs())
    inputs = source.inputs(source.used)
    if inputs:
        source.namespace["Spent"] = Spent
        inputs.append("    if tape.__class__ is Spent: tape.clear()")
    returned = source.returned(range(len(source.wanted)))

    def compiled(name: str, instructions: list[Instruction]) -> Any:
        block = source.block(instructions, source.wanted)
        return source.compiled([f"def {name}(tape, seeds):", *inputs, *block, returned], name)

    runner: Runner = compiled("run", source.kept)
    halved = with_symmetry(program, source.kept)
    filled = with_filled_rows(program, halved or source.kept, source.wanted) or halved
    source.plain = reusing(program, filled or source.kept, source.wanted) or filled
    runner.plain = runner if source.plain is None else compiled("run_plain", source.plain)  # type: ignore[attr-defined]
    runner.constants = list(source.constants.values())  # type: ignore[attr-defined]
    runner.source_of = source  # type: ignore[attr-defined]
    return runner


class Stages(NamedTuple):
    """A program in two parts.

    Attributes:
        prepare: from the tape values, what does not depend on the seeds: the results that come first, and what the second
            part needs.
        apply: from the tape values, what the first part left, and the seeds: the other results.
        source: the program.
        parts: for each part its instructions, its results, and those of them (by number) that are copied at the end.
    """

    prepare: Callable[[Sequence[Any]], tuple[tuple[Any, ...], tuple[Any, ...]]]
    apply: Callable[[Sequence[Any], tuple[Any, ...], Sequence[torch.Tensor]], tuple[Any, ...]]
    source: Source
    parts: tuple[tuple[list[Instruction], list[int | None], set[int]], ...]

    def memory(self, part: int, tape: Sequence[Any], seeds: Sequence[torch.Tensor]) -> Memory:
        """What a run of one part on these values allocates."""
        saved = self.source.observe(tape, seeds, calls=[*self.parts[0][0], *self.parts[1][0]])
        return predict(self.source.program, *self.parts[part], inside=self.source.inside, saved=saved)


def compile_stages(program: Program, results: Sequence[Staged | None], first: int = 0) -> Stages | None:
    """A program as two functions, so that what does not depend on its seeds is computed once for many of them.

    Args:
        program: the program.
        results: its results.
        first: how many of the results belong to the first part; they must not depend on the seeds.

    Returns:
        The two functions; None when the first part would be empty or the program writes to its values.
    """
    if program.writes:
        return None
    source = Source(program, results)
    late = {slot for key, slot in program.inputs.items() if not isinstance(key, int)}
    early: list[Instruction] = []
    rest: list[Instruction] = []
    for instruction in source.kept:
        depends = not late.isdisjoint(reads(instruction))
        (rest if depends else early).append(instruction)
        if depends:
            late.update(instruction.outputs)
    if not early and not first:
        return None
    numbers = range(len(source.wanted))
    rest = _computed_late(source, early, rest)
    made = {slot for instruction in early for slot in instruction.outputs}
    read = {slot for instruction in rest for slot in reads(instruction)}
    later = [source.wanted[number] for number in numbers[first:]]
    # A result of the second part that does not depend on the seeds must be a new tensor in each call.
    wanted = source.wanted
    source.copied.update(n for n in numbers[first:] if wanted[n] is not None and wanted[n] not in late)
    passed = sorted(made & (read | {slot for slot in later if slot is not None}))
    kept = [*(source.wanted[number] for number in numbers[:first]), *passed]
    early = _read_by(early, kept)
    given = ", ".join(f"v{slot}" for slot in passed)
    prepared = source.returned(numbers[:first])[len("    return ") :]
    used_early = {slot for i in early for slot in reads(i)}
    used_early.update(slot for slot in kept if slot is not None)
    used_late = read | {slot for slot in later if slot is not None}
    lines = ["def prepare(tape):", *source.inputs(used_early), *source.block(early, kept)]
    lines.append(f"    return ({prepared}, ({given}{',' if len(passed) == 1 else ''}))")
    lines += ["", "def apply(tape, known, seeds):"]
    if passed:
        lines.append(f"    {given}{',' if len(passed) == 1 else ''} = known")
    lines += [*source.inputs(used_late), *source.block(rest, later), source.returned(numbers[first:])]
    copied = {n - first for n in source.copied if n >= first}
    return Stages(
        source.compiled(lines, "prepare"),
        source.compiled(lines, "apply"),
        source,
        ((early, kept, {n for n in source.copied if n < first}), (rest, later, copied)),
    )


def _computed_late(source: Source, early: list[Instruction], rest: list[Instruction]) -> list[Instruction]:
    """The second part of a program, with values computed where they are read in place of being kept for it.

    These are large values that one or two cheap calls make of what the second part reads anyhow. What is read again much
    later is computed again.

    Args:
        source: the program.
        early: its first part.
        rest: its second part.
    """
    program = source.program
    recipes = _recipes(source, early, {slot for i in rest for slot in reads(i)})
    found: list[Instruction] = []
    copies: dict[int, tuple[int, int]] = {}
    for number, instruction in enumerate(rest):
        names: dict[int, int] = {}
        for slot in reads(instruction):
            if slot not in recipes:
                continue
            copy, used = copies.get(slot, (-1, -_NEAR - 1))
            if number - used > _NEAR:
                inner: dict[int, int] = {}
                for part in recipes[slot]:
                    copy = inner[part.outputs[0]] = program.new_slot()
                    program.kinds[copy] = program.kinds[part.outputs[0]]
                    found.append(renamed(part, inner)._replace(outputs=(copy,)))
            copies[slot] = copy, number
            names[slot] = copy
        found.append(renamed(instruction, names) if names else instruction)
    return found


def _recipes(source: Source, early: list[Instruction], late: set[int]) -> dict[int, tuple[Instruction, ...]]:
    """How those values of the first part are computed that need not be kept for the second, which reads ``late``."""
    made = {slot for instruction in early for slot in instruction.outputs}
    fixed = (late & {*source.program.inputs.values()}) | source.constants.keys()
    wanted = {slot for slot in source.wanted if slot is not None}
    found: dict[int, tuple[Instruction, ...]] = {}
    for instruction in early:
        slot = instruction.outputs[0] if len(instruction.outputs) == 1 else -1
        if slot not in late or slot in wanted or instruction.function not in _CHEAP or instruction.keep:
            continue
        kind, read = source.program.kinds.get(slot), set(reads(instruction))
        if kind is None or kind[0].numel() * kind[1].itemsize < _LARGE or not read <= fixed | (late & made):
            continue
        recipe = {part.outputs[0]: part for r in sorted(read) for part in found.get(r, ())}
        if len(recipe) < _LONGEST:
            found[slot] = (*recipe.values(), instruction)
    return found


def _read_by(instructions: list[Instruction], wanted: Sequence[int | None]) -> list[Instruction]:
    """Those instructions that some results need."""
    needed, found = set(wanted), list[Instruction]()
    for instruction in reversed(instructions):
        if instruction.keep or not needed.isdisjoint(instruction.outputs):
            needed.update(reads(instruction))
            found.append(instruction)
    return found[::-1]


class Source:
    """A program on its way to Python code."""

    def __init__(self, program: Program, results: Sequence[Staged | None], *, spelled: bool = True) -> None:
        self.program = program
        self.wanted = [None if staged is None else staged.slot for staged in results]
        self.copied = shared_results(program, self.wanted) if program.recorded else set()
        own = program.constants = {slot: settled(tensor) for slot, tensor in program.constants.items()}
        program.instructions = [_settled_call(instruction) for instruction in program.instructions]
        self.kept, made = simplify(program, [s for s in self.wanted if s is not None], own, spelled=spelled)
        self.used = {slot for i in self.kept for slot in reads(i)}
        self.used.update(slot for slot in self.wanted if slot is not None)
        self.constants = {**own, **made}
        self.namespace: dict[str, Any] = {f"v{slot}": t for slot, t in self.constants.items() if slot in self.used}
        self.names: dict[int, str] = {}
        # What the instructions allocate, once it was observed; and those of `plain`.
        self.inside: dict[int, Space] = {}
        self.inside_plain: dict[int, Space] = {}
        # What autograd keeps of them, by the inputs with a graph, and the number of seeds.
        self.saved: dict[Any, dict[int, Saved]] = {}
        # The instructions as they are run on tensors that nothing follows, where these differ.
        self.plain: list[Instruction] | None = None

    def memory(
        self, spent: Mapping[int, tuple[int, int]] | None = None, saved: Mapping[int, Saved] | None = None, *, plain: bool = True
    ) -> Memory:
        """What a run allocates, beside inputs that are let go (see :func:`~chainrule.execute.memory.predict`).

        It is a run on tensors that nothing follows if it is ``plain``.
        """
        kept, inside = self._as_run(plain=plain)
        return predict(self.program, kept, self.wanted, self.copied, spent, inside, saved)

    def _as_run(self, *, plain: bool) -> tuple[list[Instruction], dict[int, Space]]:
        """The instructions as they are run, and what they were seen to allocate."""
        return (self.plain, self.inside_plain) if plain and self.plain is not None else (self.kept, self.inside)

    def observe(
        self, tape: Sequence[Any], seeds: Sequence[torch.Tensor], *, undispatched: bool = False,
        calls: Sequence[Instruction] | None = None, plain: bool = True,
    ) -> Mapping[int, Saved]:
        """Find out the work space of the instructions on these values, where that is possible and not known yet.

        With ``plain``, of those that are run on tensors that nothing follows: the others may hold more than the run does.

        Returns:
            What autograd keeps of them (or of ``calls``), if these values have a graph.
        """
        if not observable(undispatched=undispatched):
            return {}
        given = {
            slot: tape[key] if isinstance(key, int) else seeds[key[1]]
            for key, slot in self.program.inputs.items()
            if slot in self.used and (isinstance(key, int) or key[1] < len(seeds))
        }
        joined = frozenset(s for s, v in given.items() if isinstance(v, torch.Tensor) and v.requires_grad)
        kept, inside = self._as_run(plain=plain and not joined)
        values = {**given, **self.constants}
        if not all(i.outputs[0] in inside for i in kept if i.outputs):
            with same_draws(kept, values.values()):
                inside.update(of_instructions(kept, values) or {})
        if not joined or not torch.is_grad_enabled() or not inside:
            return {}
        key = joined, len(seeds)
        if key not in self.saved:
            with same_draws(kept, values.values()):
                self.saved[key] = saved_by_instructions(self.kept if calls is None else calls, values)
        return self.saved[key]

    def let_go(self) -> list[torch.Tensor]:
        """Let go of the constants that no call reads; returns the others."""
        self.constants = {slot: value for slot, value in self.constants.items() if slot in self.used}
        self.program.constants = {slot: value for slot, value in self.program.constants.items() if slot in self.used}
        return list(self.constants.values())

    def of_inputs(self) -> set[int]:
        """The results (by number) that are inputs or views of them."""
        producers = {slot: instruction for instruction in self.program.instructions for slot in instruction.outputs}
        given = set(self.program.inputs.values())
        return {n for n, slot in enumerate(self.wanted) if slot is not None and root(self.program, producers, slot) in given}

    def inputs(self, used: set[int]) -> list[str]:
        """The lines that read the inputs among ``used``."""
        return [
            f"    v{slot} = tape[{key}]" if isinstance(key, int) else f"    v{slot} = seeds[{key[1]}]"
            for key, slot in self.program.inputs.items()
            if slot in used
        ]

    def block(self, instructions: list[Instruction], kept: Sequence[int | None]) -> list[str]:
        """The lines of some instructions; values are dropped after their last use, apart from those ``kept``."""
        last = _last_uses(instructions, kept)
        lines: list[str] = []
        for number, instruction in enumerate(instructions):
            lines.append("    " + _line(instruction, self.namespace, self.names))
            dead = [f"v{slot}" for slot in last.get(number, ()) if slot not in self.constants]
            if dead:
                lines.append(f"    del {', '.join(dead)}")
        return lines

    def returned(self, numbers: range) -> str:
        """The line that returns some of the results."""
        names = ["None" if self.wanted[n] is None else f"v{self.wanted[n]}" for n in numbers]
        items = ", ".join(f"{name}.clone()" if n in self.copied else name for n, name in zip(numbers, names, strict=True))
        return f"    return ({items}{',' if len(names) == 1 else ''})"

    def compiled(self, lines: list[str], name: str) -> Any:
        """The function called ``name``."""
        text = "\n".join(lines)
        exec(compile(text, "<chainrule plan>", "exec"), self.namespace)  # noqa: S102 - our own generated source
        function = self.namespace[name]
        function.source = text
        return function


def settled(tensor: torch.Tensor) -> torch.Tensor:
    """A constant as it is outside of the transforms and of the inference mode in which it was made."""
    while tensor.__class__ is BatchTensor and not tensor.batched:  # type: ignore[attr-defined]
        tensor = tensor.inner  # type: ignore[attr-defined]
    if tensor.is_inference():
        with torch.inference_mode(False), undispatched():
            tensor = tensor.clone()
    return tensor


def _settled_call(instruction: Instruction) -> Instruction:
    """A call, with the tensors that stand among its arguments themselves settled."""
    args = _settled_within(instruction.args)
    kwargs = {name: _settled_within(item) for name, item in instruction.kwargs.items()}
    same = args is instruction.args and all(kwargs[name] is item for name, item in instruction.kwargs.items())
    return instruction if same else instruction._replace(args=args, kwargs=kwargs)


def _settled_within(item: Any) -> Any:
    if isinstance(item, torch.Tensor):
        return settled(item)
    if item.__class__ is not tuple and item.__class__ is not list:
        return item
    items = [_settled_within(element) for element in item]
    return item if all(map(operator.is_, items, item)) else type(item)(items)


def _line(instruction: Instruction, namespace: dict[str, Any], names: dict[int, str]) -> str:
    function = instruction.function
    name = names.get(id(function))
    if name is None:
        name = names[id(function)] = f"f{len(names)}"
        namespace[name] = function._op if function.__class__ is OpOverload else function
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
        for slot in (*reads(instruction), *instruction.outputs):
            last[slot] = number
    result: dict[int, list[int]] = {}
    keep = set(wanted)
    for slot, number in last.items():
        if slot not in keep:
            result.setdefault(number, []).append(slot)
    return result
