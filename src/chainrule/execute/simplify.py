"""Simplification of programs before they are run again: equal calls once, no call for nothing, pairs of calls as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from chainrule.calls import number_constant
from chainrule.dispatch import undispatched
from chainrule.execute.destinations import with_destinations
from chainrule.execute.joins import with_joins
from chainrule.execute.layouts import with_even_layouts
from chainrule.execute.product_sums import with_added_products
from chainrule.execute.renaming import renamed
from chainrule.execute.sharing import TRANSPOSES, share
from chainrule.execute.slopes import with_slope_kernels
from chainrule.execute.spelling import spell
from chainrule.execute.turning import turned
from chainrule.execute.view_chains import with_short_chains
from chainrule.maps.staging import Instruction, Program, Ref, reads

aten = torch.ops.aten

_SHAPINGS = (torch.reshape, torch.broadcast_to, aten.reshape.default._op, aten.expand.default._op)
_RESHAPES = (torch.reshape, aten.reshape.default._op, aten.view.default._op, torch.Tensor.view)
_ADDED_PRODUCT = (torch.addmm, aten.addmm.default._op)
_ALIAS = aten.alias.default._op
_PRODUCT = (torch.mul, aten.mul.Tensor._op)
_ONE_MINUS = (torch.rsub, aten.rsub.Scalar._op)
_SUM = (torch.add, aten.add.Tensor._op)
_COMPLEX = (torch.complex, aten.complex.default._op)
_DIFFERENCE = (torch.sub, aten.sub.Tensor._op)


#: Calls that make tensors from nothing.
_CREATIONS = frozenset({torch.zeros, torch.ones, torch.eye, torch.arange, torch.full})

#: Calls that take shape, dtype and device from their first argument, and no value.
_LIKE = frozenset(
    {
        torch.zeros_like, torch.ones_like, torch.full_like, torch.Tensor.new_zeros, torch.Tensor.new_ones, torch.Tensor.new_full,
        aten.zeros_like.default._op, aten.ones_like.default._op, aten.full_like.default._op,
        aten.new_zeros.default._op, aten.new_ones.default._op, aten.new_full.default._op,
    }
)  # fmt: skip

#: Results of at most this many elements that are the same in every run are computed once.
_FOLDED = 4096


def simplify(
    program: Program, wanted: Sequence[int], constants: dict[int, torch.Tensor], *, spelled: bool = True
) -> tuple[list[Instruction], dict[int, torch.Tensor]]:
    """The instructions that the results ``wanted`` (slots) need, and constants that they need beside the program's own.

    What is written to, and what shares memory with it, keeps its calls and their order.

    Args:
        program: the program.
        wanted: the slots of its results.
        constants: its constants.
        spelled: whether calls are put in their cheapest form, with numbers as constants.
    """
    kept = list(program.instructions)
    memory = _Memory(program)
    if program.literal:
        kept = _needed(kept, wanted, memory)
        return spell(program, kept) if spelled else (kept, {})
    if program.recorded:
        # Without the calls that made a plan: its replay follows them.
        kept = _needed(kept, wanted, memory)
        own = _roots(program, kept, wanted)
        unwritten = {slot: value for slot, value in constants.items() if slot not in memory.written}
        kept = share(program, kept, own, unwritten, memory.touched)
        if (again := turned(program, kept, own, memory.touched)) is not None:
            kept = share(program, again, own, unwritten, memory.touched)
    kept = _without_noops(program, _needed(kept, wanted, memory), wanted)
    if (even := with_even_layouts(program, kept, _roots(program, kept, wanted), memory.touched)) is not None:
        kept = _needed(even, wanted, memory)
    kept = with_short_chains(program, kept, _roots(program, kept, wanted), memory.touched)
    kept, folded = _fold(program, kept, wanted, constants, memory)
    kept = _without_ones(program, kept, wanted, {**constants, **folded}, memory)
    kept = with_joins(program, kept, wanted, memory.touched)
    joined = with_added_products(program, kept, wanted, _roots(program, kept, wanted), memory.touched)
    layered = _with_components(program, _with_layers(program, joined, wanted, memory), wanted, {**constants, **folded}, memory)
    fused, made = _fuse(program, layered, wanted, memory)
    known = {slot: value for slot, value in {**constants, **folded, **made}.items() if slot not in memory.written}
    fused = with_slope_kernels(program, fused, wanted, known, memory.touched)
    if program.recorded and (joined is not kept or len(fused) < len(layered)):
        # Plans that were made before have fused their calls already: only now are others equal to these.
        unwritten = {slot: value for slot, value in constants.items() if slot not in memory.written}
        fused = share(program, fused, _roots(program, fused, wanted), {**unwritten, **made}, memory.touched)
    kept = with_destinations(program, _needed(fused, wanted, memory), wanted)
    kept = [_as_view(program, i) if memory.touched(i) else i for i in kept]
    cheapest, numbers = spell(program, kept) if spelled else (kept, {})
    if numbers and not program.writes:
        cheapest = _needed(cheapest, wanted, memory)
    return cheapest, {**folded, **made, **numbers}


class _Memory:
    """Which values share memory with one that is written to."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.producers = {slot: i for i in program.instructions for slot in i.outputs} if program.writes else {}
        self._known: dict[int, int] = {}
        self.written = {self.root(slot) for i in program.instructions for slot in i.writes}

    def root(self, slot: int) -> int:
        """The value whose memory a value uses; inputs may share theirs, and count as one."""
        known = self._known.get(slot)
        if known is None:
            found = root(self.program, self.producers, slot)
            known = self._known[slot] = found if found in self.producers or found in self.program.constants else -1
        return known

    def touched(self, instruction: Instruction) -> bool:
        """Whether an instruction reads or makes something that is written to."""
        written, known = self.written, self._known
        if not written:
            return False
        for slot in (*instruction.outputs, *reads(instruction)):
            place = known.get(slot)
            if (self.root(slot) if place is None else place) in written:
                return True
        return False

    def roots(self, instruction: Instruction, *, reading: bool = True) -> set[int]:
        """The memory that an instruction makes and, where ``reading``, the memory that it is given."""
        slots = (*instruction.outputs, *(reads(instruction) if reading else ()))
        return {self.root(slot) for slot in slots}


def _as_view(program: Program, instruction: Instruction) -> Instruction:
    """What was a view of memory that is written to must not become a copy."""
    if instruction.function is aten.reshape.default._op and program.strict.issuperset(instruction.outputs):
        return instruction._replace(function=aten.view.default._op)
    return instruction


def _without_noops(program: Program, kept: list[Instruction], wanted: Sequence[int]) -> list[Instruction]:
    """Leave out views of the shape that their argument has; results stay tensors of their own."""
    names: dict[int, int] = {}
    own = set(wanted)
    left: list[Instruction] = []
    for instruction in kept:
        if names:
            instruction = renamed(instruction, names)
        if (instruction.function in _SHAPINGS or instruction.function is _ALIAS) and isinstance(instruction.args[0], Ref):
            (out,), source = instruction.outputs, instruction.args[0].slot
            kind, before = program.kinds.get(out), program.kinds.get(source)
            if out not in own and kind is not None and before is not None and kind[0] == before[0]:
                names[out] = source
                continue
        left.append(instruction)
    return left


def _fold(
    program: Program, kept: list[Instruction], wanted: Sequence[int], constants: dict[int, torch.Tensor], memory: _Memory
) -> tuple[list[Instruction], dict[int, torch.Tensor]]:
    """Compute small values once that are the same in every run. Results, and what they may be views of, stay calls.

    Memory that is written to is folded as a whole, if only fixed values are written, and before anything else reads it.
    """
    groups = memory.written & memory.producers.keys()
    while True:
        chosen = _fixed_calls(program, kept, wanted, constants, memory, groups)
        open_groups = _open_groups(kept, chosen, memory, groups)
        if not open_groups:
            break
        groups -= open_groups
    values = dict(constants)
    folded: dict[int, torch.Tensor] = {}
    with torch.inference_mode(False), torch.no_grad(), undispatched():
        for number in sorted(chosen):
            instruction = kept[number]
            if instruction.function in _LIKE:
                # Only the kind of the first argument matters.
                shape, dtype, device = program.kinds[instruction.args[0].slot]
                arguments = (torch.empty(shape, dtype=dtype, device=device), *instruction.args[1:])
            else:
                arguments = _valued(instruction.args, values)
            named = {name: _valued(item, values) for name, item in instruction.kwargs.items()}
            result = instruction.function(*arguments, **named)
            for slot in instruction.outputs:
                values[slot] = folded[slot] = result
    return [instruction for number, instruction in enumerate(kept) if number not in chosen], folded


def _without_ones(
    program: Program, kept: list[Instruction], wanted: Sequence[int], constants: dict[int, torch.Tensor], memory: _Memory
) -> list[Instruction]:
    """Leave out products with ones; results stay tensors of their own."""
    names: dict[int, int] = {}
    ones: dict[int, bool] = {}
    own = _roots(program, kept, wanted)
    left: list[Instruction] = []
    for instruction in kept:
        if names:
            instruction = renamed(instruction, names)
        args = instruction.args
        if instruction.function in _PRODUCT and not instruction.kwargs and all(isinstance(a, Ref) for a in args):
            (out,) = instruction.outputs
            factors = [a.slot for a in args if not _is_one(a.slot, constants, ones)]
            if len(factors) == 1 and out not in own and program.kinds.get(out) == program.kinds.get(factors[0], out):
                if not memory.touched(instruction):
                    names[out] = factors[0]
                    continue
        left.append(instruction)
    return left


def _is_one(slot: int, constants: dict[int, torch.Tensor], known: dict[int, bool]) -> bool:
    """Whether a value is a small constant of ones."""
    if slot not in known:
        value = constants.get(slot)
        known[slot] = False
        if value is not None and value.is_cpu and value.numel() <= _FOLDED:
            with undispatched():
                known[slot] = bool((value == 1).all())
    return known[slot]


def _fixed_calls(
    program: Program,
    kept: list[Instruction],
    wanted: Sequence[int],
    constants: dict[int, torch.Tensor],
    memory: _Memory,
    groups: set[int],
) -> set[int]:
    """The calls (by number) whose small results are the same in every run, if so are the written-to ``groups``."""
    fixed = set(constants)
    makers: dict[int, int] = {}
    chosen: set[int] = set()
    for number, instruction in enumerate(kept):
        read = reads(instruction)
        model = instruction.args[0] if instruction.function in _LIKE else None
        like = isinstance(model, Ref) and model.slot in program.kinds
        if like:
            read = read[1:]
        if not (like or read or instruction.function in _CREATIONS) or not fixed.issuperset(read):
            continue
        if instruction.keep or instruction.is_tuple or len(instruction.outputs) > 1:
            continue
        if memory.written and not memory.roots(instruction, reading=not like).isdisjoint(memory.written - groups):
            continue
        kinds = [program.kinds.get(slot) for slot in (*instruction.outputs, *instruction.writes)]
        if kinds and all(kind is not None and kind[0].numel() <= _FOLDED for kind in kinds):
            fixed.update(instruction.outputs)
            makers.update(dict.fromkeys(instruction.outputs, number))
            chosen.add(number)
    pending = list(_roots(program, kept, wanted))
    while pending:
        number = makers.pop(pending.pop(), -1)
        if number >= 0:
            chosen.discard(number)
            pending.extend(reads(kept[number]))
    # What stays has to be computed of what stays.
    known = set(constants)
    for number in sorted(chosen):
        instruction = kept[number]
        if known.issuperset(reads(instruction)[1 if instruction.function in _LIKE else 0 :]):
            known.update(instruction.outputs)
        else:
            chosen.discard(number)
    return chosen


def _open_groups(kept: list[Instruction], chosen: set[int], memory: _Memory, groups: set[int]) -> set[int]:
    """Memory that a call makes or writes to which is not chosen, or that such a call reads before the last write."""
    found: set[int] = set()
    if not groups:
        return found
    # Memory that a call which is not chosen has read: no more writes may come.
    ended: set[int] = set()
    for number, instruction in enumerate(kept):
        made = {memory.root(slot) for slot in (*instruction.outputs, *instruction.writes)}
        if number not in chosen:
            found |= made & groups
            ended |= memory.roots(instruction) & groups
        else:
            found |= made & ended
    return found


def _valued(tree: Any, values: dict[int, torch.Tensor]) -> Any:
    if isinstance(tree, Ref):
        return values[tree.slot]
    if isinstance(tree, (list, tuple)):
        return type(tree)(_valued(item, values) for item in tree)
    return tree


def _with_layers(program: Program, kept: list[Instruction], wanted: Sequence[int], memory: _Memory) -> list[Instruction]:
    """A bias and the product with a transposed matrix as the one call that does the same (``linear``)."""
    uses = Counter(slot for i in kept for slot in reads(i))
    uses.update(wanted)
    transposed = {
        i.outputs[0]: i.args[0] for i in kept
        if i.function in TRANSPOSES and (set(i.args[1:]) in (set(), {0, 1})) and not i.kwargs and uses[i.outputs[0]] == 1
        and isinstance(i.args[0], Ref) and not memory.touched(i)
    }  # fmt: skip
    gone: set[int] = set()
    found: list[Instruction] = []
    for instruction in kept:
        args, kinds = instruction.args, program.kinds
        plain = instruction.function in _ADDED_PRODUCT and len(args) == 3 and not instruction.kwargs
        if plain and not memory.touched(instruction):
            bias, x, matrix = args
            known = kinds.get(bias.slot) if isinstance(bias, Ref) else None
            if known is not None and len(known[0]) == 1 and isinstance(matrix, Ref) and matrix.slot in transposed:
                gone.add(matrix.slot)
                instruction = instruction._replace(function=torch._C._nn.linear, args=(x, transposed[matrix.slot], bias))
        found.append(instruction)
    return [i for i in found if gone.isdisjoint(i.outputs)] if gone else kept


class _Half(NamedTuple):
    """The real or the imaginary part (``place`` 0 or 1) as a complex number: from what, how it is shaped then, and the values."""

    part: Ref
    place: int
    shaping: Instruction | None
    slots: tuple[int, ...]


def _with_components(
    program: Program, kept: list[Instruction], wanted: Sequence[int], constants: dict[int, torch.Tensor], memory: _Memory
) -> list[Instruction]:
    """A real part and an imaginary part, added as complex numbers, as the one call that puts them together."""
    if sum([i.function in _COMPLEX for i in kept]) < 2:
        return kept
    uses = Counter(slot for i in kept for slot in reads(i))
    uses.update(wanted)
    halves: dict[int, _Half] = {}
    for i in kept:
        if i.kwargs or len(i.outputs) != 1 or uses[i.outputs[0]] != 1 or memory.touched(i):
            continue
        first = i.args[0] if i.args else None
        if i.function in _COMPLEX and all([isinstance(a, Ref) for a in i.args]):
            empty = [_is_zero(a.slot, constants) for a in i.args]
            if sum(empty) == 1:
                place = empty.index(False)
                halves[i.outputs[0]] = _Half(i.args[place], place, None, i.outputs)
        elif i.function in _RESHAPES and isinstance(first, Ref) and first.slot in halves:
            half = halves[first.slot]
            halves[i.outputs[0]] = half._replace(shaping=i, slots=(*half.slots, *i.outputs))
    gone: set[int] = set()
    found: list[Instruction] = []
    for i in kept:
        pair = [halves.get(a.slot) if isinstance(a, Ref) else None for a in i.args] if i.function in _SUM and not i.kwargs else []
        if len(pair) != 2 or pair[0] is None or pair[1] is None or memory.touched(i):
            found.append(i)
            continue
        real, imaginary = (pair[0], pair[1]) if pair[0].place == 0 else (pair[1], pair[0])
        kinds = [program.kinds.get(half.part.slot) for half in (real, imaginary)]
        shapes = [program.kinds[half.slots[-1]][0] for half in (real, imaginary)]
        if imaginary.place != 1 or real.place != 0 or kinds[0] is None or kinds[0] != kinds[1] or shapes[0] != shapes[1]:
            found.append(i)
            continue
        gone.update(real.slots, imaginary.slots)
        if real.shaping is None and imaginary.shaping is None:
            found.append(i._replace(function=torch.complex, args=(real.part, imaginary.part)))
            continue
        whole = program.new_slot()
        program.kinds[whole] = (kinds[0][0], *program.kinds[i.outputs[0]][1:])
        found.append(Instruction(torch.complex, (real.part, imaginary.part), {}, (whole,), False))
        found.append(Instruction(torch.reshape, (Ref(whole), list(shapes[0])), {}, i.outputs, False))
    return [i for i in found if gone.isdisjoint(i.outputs)] if gone else kept


def _is_zero(slot: int, constants: dict[int, torch.Tensor]) -> bool:
    """Whether a value is the constant zero, without dimensions."""
    value = constants.get(slot)
    if value is None or not value.is_cpu or value.dim():
        return False
    with undispatched():
        return not value.item()


def _fuse(
    program: Program, kept: list[Instruction], wanted: Sequence[int], memory: _Memory
) -> tuple[list[Instruction], dict[int, torch.Tensor]]:
    """``1 - a * b`` and ``c + a * b`` as one pass over memory (``addcmul``)."""
    uses = Counter(slot for i in kept for slot in reads(i))
    uses.update(wanted)
    products = {
        i.outputs[0]: i for i in kept
        if i.function in _PRODUCT and not i.kwargs and uses[i.outputs[0]] == 1 and all(isinstance(a, Ref) for a in i.args)
        and not memory.touched(i)
    }  # fmt: skip
    kinds = program.kinds
    ones: dict[Any, int] = {}
    made: dict[int, torch.Tensor] = {}
    fused: dict[int, Instruction | None] = {}

    def one(dtype: torch.dtype, device: torch.device) -> int:
        slot = ones.get((dtype, device))
        if slot is None:
            slot = ones[dtype, device] = program.new_slot()
            made[slot] = number_constant(1, dtype, device)
        return slot

    def same_kind(slots: Sequence[int]) -> bool:
        found = [kinds.get(slot) for slot in slots]
        return all(f is not None and f[1:] == found[0][1:] and f[1].is_floating_point for f in found)  # type: ignore[index]

    for number, instruction in enumerate(kept):
        function, args = instruction.function, instruction.args
        if instruction.kwargs or len(instruction.outputs) != 1 or len(args) != 2:
            continue
        if memory.written and not memory.roots(instruction, reading=False).isdisjoint(memory.written):
            continue  # what is read stays read at this place
        out = instruction.outputs[0]
        base: int | None = None
        product: Instruction | None = None
        sign = 1
        if function in _ONE_MINUS and isinstance(args[0], Ref) and type(args[1]) in (int, float) and args[1] == 1:
            product, sign = products.get(args[0].slot), -1
            if product is not None and same_kind((out, *(a.slot for a in product.args))):
                base = one(*kinds[out][1:])
        elif function in _SUM or function in _DIFFERENCE:
            if not all(isinstance(a, Ref) for a in args):
                continue
            places = (1,) if function in _DIFFERENCE else (1, 0)
            for place in places:
                product, sign = products.get(args[place].slot), -1 if function in _DIFFERENCE else 1
                if product is None or product.outputs[0] in fused or args[0] == args[1]:
                    continue
                other = args[1 - place].slot
                if not same_kind((out, other, *(a.slot for a in product.args))):
                    continue
                if kinds[out][0] == kinds[other][0] == kinds[product.outputs[0]][0]:
                    base = other
                    break
        if base is None or product is None:
            continue
        fused[product.outputs[0]] = None
        kwargs = {"value": sign} if sign != 1 else {}
        kept[number] = Instruction(torch.addcmul, (Ref(base), *product.args), kwargs, instruction.outputs, False)
    return [i for i in kept if not (len(i.outputs) == 1 and i.outputs[0] in fused)], made


def shared_results(program: Program, wanted: Sequence[int | None]) -> set[int]:
    """The results (by number) of a recorded program that share memory with an input, a constant or another result."""
    producers = {slot: instruction for instruction in program.instructions for slot in instruction.outputs}
    taken: set[int] = set()
    shared: set[int] = set()
    for number, slot in enumerate(wanted):
        if slot is None:
            continue
        memory = root(program, producers, slot)
        if memory in taken or memory not in producers:
            shared.add(number)
        taken.add(memory)
    return shared


def root(program: Program, producers: dict[int, Instruction], slot: int) -> int:
    """The value whose memory a value of a recorded program uses."""
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
        while slot in program.views and slot in producers and isinstance(first := producers[slot].args[0], Ref):
            slot = first.slot
            found.add(slot)
    return found


def _needed(instructions: Sequence[Instruction], wanted: Sequence[int], memory: _Memory) -> list[Instruction]:
    """The instructions that the results need, and those that write to what is seen outside or needed later."""
    needed = set(wanted)
    # The memory of what is needed, with that of inputs always among it.
    held = {-1, *map(memory.root, needed)} if memory.written else set[int]()
    kept = []
    for instruction in reversed(instructions):
        use = instruction.keep or not needed.isdisjoint(instruction.outputs)
        if not use and instruction.writes:
            use = not held.isdisjoint(map(memory.root, instruction.writes))
        if use:
            needed.update(read := reads(instruction))
            if memory.written:
                held.update(map(memory.root, read))
            kept.append(instruction)
    return kept[::-1]
