"""Calls that write their result over an operand that nobody reads again: large results need no memory of their own.

Memory that was just given out has to be mapped by the system page by page when it is first written to, which for results
of more than some hundred kilobytes takes longer than an element-wise kernel does.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from chainrule.calls import FUNCTIONS, UNFOLLOWED
from chainrule.execute.products import DistinctRows, FilledRows, symmetric_product
from chainrule.maps.assembly import assembled
from chainrule.maps.staging import Instruction, Program, Ref, reads, refs
from chainrule.norms import layer_norm_backward

aten = torch.ops.aten

#: Results of fewer bytes than this come from memory that is mapped already.
SMALLEST = 1 << 16

#: Element by element, and with the argument ``out``: each operand of the result's kind may be written over.
POINTWISE = frozenset(
    {
        torch.mul, torch.add, torch.sub, torch.div, torch.addcmul, torch.addcdiv, torch.neg, torch.exp, torch.sqrt, torch.rsqrt,
        torch.reciprocal, torch.sin, torch.cos, torch.tanh, torch.sigmoid, torch.square, torch.where, torch.log, torch.log1p,
        torch.expm1, torch.erf, torch.abs, torch.pow,
    }
)  # fmt: skip

_BACKWARD = tuple(
    getattr(aten, f"{name}_backward")
    for name in (
        "threshold", "leaky_relu", "hardtanh", "hardsigmoid", "hardshrink", "softshrink", "elu", "softplus", "silu", "gelu",
        "tanh", "sigmoid", "log_sigmoid",
    )
)  # fmt: skip

#: The variants of ops that write where they are told, and the name of that argument.
_WRITING = {
    call: (op.grad_input, "grad_input")
    for op in _BACKWARD
    for call in (op.default, op.default._op, FUNCTIONS.get(op.default._op, op.default._op))
}

#: Keyword arguments that do not stand in the way of such a variant.
_OPTIONS = frozenset({"value", "alpha", "approximate"})

#: With the argument ``out``; the first operand may be written over, and the result is memory that nothing else uses.
_THROUGH = frozenset({torch.tril, torch.triu, torch.cumsum})

#: The same, of calls that add to what is there or put it in places.
_ON_FIRST = frozenset({torch.scatter_add, torch.scatter, torch.index_add})

#: The same, of products that add to what is there.
_ADDED_PRODUCTS = frozenset({torch.addmm, torch.baddbmm, torch.addmv})

#: Functions (beside those above) whose results are memory that nothing else uses.
_FRESH = frozenset(
    {
        torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.addmv, torch.mv, torch.dot, torch.sum, torch.zeros, torch.ones,
        torch.clone, torch.Tensor.clone, torch.cat, torch.stack, torch.gather, torch.index_select, torch.maximum, torch.minimum,
        assembled, layer_norm_backward, symmetric_product,
    }
)  # fmt: skip

#: Ops whose results are new tensors, as plans and recordings call them.
_FRESH_OPS = frozenset(
    call
    for op in (
        aten.convolution_backward.default, aten.convolution.default, aten.native_layer_norm_backward.default,
        aten._softmax_backward_data.default, aten._log_softmax_backward_data.default, aten.col2im.default, aten.mm.default,
        aten.bmm.default, aten.zeros.default, aten.new_zeros.default, aten.scatter_add.default, aten.scatter.src,
        aten.clone.default, aten.linear.default, aten._softmax.default, aten._log_softmax.default,
        aten.native_layer_norm.default, aten.max_pool2d_with_indices.default, aten.index_add.default,
    )
    for call in (op, op._op, FUNCTIONS.get(op._op, op._op))
)  # fmt: skip

#: Views of all that their first argument holds.
WHOLE_VIEWS = frozenset(
    {
        torch.reshape, torch.permute, torch.t, torch.unsqueeze, torch.squeeze, torch.transpose, torch.movedim, torch.flatten,
        torch.swapaxes, torch.Tensor.reshape, torch.Tensor.view, torch.Tensor.unsqueeze, torch.Tensor.squeeze,
        torch.Tensor.transpose, torch.Tensor.permute, torch.Tensor.unflatten, torch.Tensor.flatten,
        aten.reshape.default._op, aten.view.default._op, aten.transpose.int._op, aten.permute.default._op, aten.t.default._op,
        aten.unsqueeze.default._op, aten.squeeze.dim._op, aten.squeeze.dims._op,
    }
)  # fmt: skip


def reusing(program: Program, instructions: Sequence[Instruction], kept: Iterable[int | None]) -> list[Instruction] | None:
    """The same instructions, with results written over what is read for the last time; None where nothing changes.

    They are for plain tensors: with torch's autograd or a dispatch mode on, such calls are refused or recorded as writes.

    Args:
        program: the program, for the sizes of its values.
        instructions: those of a block that is run as a whole.
        kept: what is read after the block.
    """
    if program.literal:
        return None
    kept = list(kept)
    cheaper = _in_shape(program, [_scattered(program, _unfollowed(instruction)) for instruction in instructions], kept)
    cheaper = _deferred(program, cheaper, kept)
    changed = len(cheaper) < len(instructions) or any(map(operator.is_not, cheaper, instructions))
    instructions, lives = cheaper, _Lives(program, cheaper, kept)
    found: list[Instruction] = []
    for number, instruction in enumerate(instructions):
        place = _place(program, lives, number, instruction)
        if place is None:
            found.append(instruction)
            continue
        lives.take_over(place.slot, instruction.outputs[0])
        if instruction.function is assembled:
            found.append(instruction._replace(kwargs={"owned": True}))
            continue
        function, name = _WRITING.get(instruction.function, (instruction.function, "out"))
        found.append(instruction._replace(function=function, kwargs={**instruction.kwargs, name: place}))
    return found if lives.joined or changed else None


def _unfollowed(instruction: Instruction) -> Instruction:
    """Torch's own function, where another one stands in its place that looks whether something follows the call."""
    function = UNFOLLOWED.get(instruction.function)
    return instruction if function is None else instruction._replace(function=function)


def _scattered(program: Program, instruction: Instruction) -> Instruction:
    """Sums into a vector by the kernel that takes a quarter less time; in a batch it would want the places of each sample."""
    if instruction.function is not torch.index_add or instruction.kwargs or len(instruction.args) != 4:
        return instruction
    kinds = [program.kinds.get(item.slot) if isinstance(item, Ref) else None for item in instruction.args[::2]]
    if any(kind is None or len(kind[0]) != 1 for kind in kinds) or kinds[1][1] is not torch.long:  # type: ignore[index]
        return instruction
    return instruction._replace(function=torch.scatter_add)


def scattered(
    function: Callable[..., Any], shape: Sequence[int], index: torch.Tensor, source: torch.Tensor, **kind: Any
) -> torch.Tensor:
    """Values at their places among zeros, counted through all of a shape: a tensor of its own, which later calls may write over.

    Args:
        function: ``torch.scatter``, ``scatter_add`` or ``index_add``.
        shape: the shape of the result.
        index: the places.
        source: the values.
        kind: dtype and device of the result.
    """
    whole = torch.zeros(shape, **kind)
    flat = whole.view(-1)
    function(flat, 0, index, source, out=flat)
    return whole


def _in_shape(program: Program, instructions: list[Instruction], kept: Sequence[int | None]) -> list[Instruction]:
    """Large zeros, scattered into and then brought into shape, as one call: what is a view cannot be given away."""
    uses = Counter(slot for instruction in instructions for slot in reads(instruction))
    uses.update(slot for slot in kept if slot is not None)
    producers = {slot: i for i in instructions for slot in i.outputs}
    joined: dict[int, Instruction | None] = {}
    for shaped in instructions:
        if shaped.function is not torch.reshape or len(shaped.args) != 2 or not isinstance(shaped.args[0], Ref) or shaped.kwargs:
            continue
        filled, size = producers.get(shaped.args[0].slot), program.kinds.get(shaped.outputs[0])
        if filled is None or filled.function not in _ON_FIRST or filled.kwargs or filled.keep or len(filled.args) != 4:
            continue
        if size is None or size[0].numel() * size[1].itemsize < SMALLEST or filled.args[1] not in (0, -1):
            continue
        zeros = producers.get(filled.args[0].slot) if isinstance(filled.args[0], Ref) else None
        if zeros is None or zeros.function is not torch.zeros or not {"dtype", "device"}.issuperset(zeros.kwargs):
            continue
        flat = program.kinds.get(zeros.outputs[0])
        if flat is None or len(flat[0]) != 1 or not all(isinstance(item, Ref) for item in filled.args[2:]):
            continue
        if uses[zeros.outputs[0]] == 1 == uses[filled.outputs[0]]:
            args = (filled.function, tuple(size[0]), *filled.args[2:])
            joined |= {id(zeros): None, id(shaped): None}
            joined[id(filled)] = shaped._replace(function=scattered, args=args, kwargs=zeros.kwargs)
    return [found for i in instructions if (found := joined.get(id(i), i)) is not None] if joined else instructions


def _deferred(program: Program, instructions: list[Instruction], kept: Sequence[int | None]) -> list[Instruction]:
    """The same, with element-wise calls behind the last reader of an operand, which they may be written over there.

    In ``x + f(x)`` the sum that reads `x` first is computed when `f` has read it. What a call reads beside that is kept no longer
    for it, unless it is small beside the result.
    """
    lives = _Lives(program, instructions, kept)
    writing = [number for number, instruction in enumerate(instructions) if instruction.writes]
    first: dict[int, int] = {}
    for number, instruction in enumerate(instructions):
        for slot in reads(instruction):
            first.setdefault(lives.root(slot), number)
            first.setdefault(slot, number)
    behind: dict[int, list[int]] = {}
    moved: set[int] = set()
    for number in reversed(range(len(instructions))):
        instruction = instructions[number]
        if instruction.function not in POINTWISE or len(instruction.outputs) != 1:
            continue
        if _place(program, lives, number, instruction) is not None:
            continue
        out = instruction.outputs[0]
        for item in instruction.args:
            last = lives.last.get(lives.root(item.slot), -1) if isinstance(item, Ref) else -1
            if not number < last < min(first.get(out, len(instructions)), len(instructions)) or last in moved:
                continue
            if any(number < place <= last for place in writing):
                continue
            if _place(program, lives, last, instruction) != item or not all(
                lives.last.get(lives.root(slot), -1) >= last or 4 * _size(program, lives.root(slot)) <= _size(program, out)
                for slot in reads(instruction)
                if slot in lives.producers or slot in program.inputs.values()
            ):
                continue
            behind.setdefault(last, []).append(number)
            moved.add(number)
            break
    if not moved:
        return instructions
    found: list[Instruction] = []
    for number, instruction in enumerate(instructions):
        if number not in moved:
            found.append(instruction)
        found += [instructions[other] for other in sorted(behind.get(number, ()))]
    return found


def _size(program: Program, slot: int) -> int:
    kind = program.kinds.get(slot)
    return 0 if kind is None else kind[0].numel() * kind[1].itemsize


def written_over(instruction: Instruction) -> int | None:
    """The slot that an instruction of :func:`reusing` writes its result over, None where it makes a new one."""
    if instruction.function is assembled:
        place = instruction.args[1] if instruction.kwargs else None
    else:
        place = instruction.kwargs.get("out", instruction.kwargs.get("grad_input"))
    return place.slot if isinstance(place, Ref) else None


def _place(program: Program, lives: _Lives, number: int, instruction: Instruction) -> Ref | None:
    """The operand that may be written over."""
    if instruction.function is torch.where and not all(isinstance(item, Ref) for item in instruction.args):
        return None  # with numbers it has no argument ``out``
    if instruction.function in POINTWISE or instruction.function in _WRITING:
        operands = instruction.args
    elif instruction.function in _ON_FIRST or instruction.function in _THROUGH or instruction.function in _ADDED_PRODUCTS:
        operands = instruction.args[:1]
    elif instruction.function is assembled:
        operands = instruction.args[1:2]
    else:
        return None
    if instruction.function is torch.where and not all(isinstance(item, Ref) for item in instruction.args):
        return None  # with a number, torch takes no ``out``
    if instruction.keep or len(instruction.outputs) != 1 or not _OPTIONS.issuperset(instruction.kwargs):
        return None
    out = instruction.outputs[0]
    kind = program.kinds.get(out)
    if kind is None or kind[0].numel() * kind[1].itemsize < SMALLEST:
        return None
    for item in operands:
        if not isinstance(item, Ref) or program.kinds.get(item.slot) != kind:
            continue
        if lives.ends(item.slot, number, instruction) and not (lives.is_kept(out) and lives.is_view(item.slot)):
            return item
    return None


class _Lives:
    """Which values of a block share memory, and until when it is read."""

    def __init__(self, program: Program, instructions: Sequence[Instruction], kept: Iterable[int | None]) -> None:
        self.instructions = instructions
        fresh = [i for i in instructions if is_fresh(i.function) or _converts(program, i)]
        self.fresh = {slot for instruction in fresh for slot in instruction.outputs}
        self.producers = {slot: i for i in instructions for slot in i.outputs}
        self.joined: dict[int, int] = {}
        self.last: dict[int, int] = {}
        for number, instruction in enumerate(instructions):
            for slot in reads(instruction):
                self.last[self.root(slot)] = number
        self.kept = {slot for slot in kept if slot is not None}
        self.last.update((self.root(slot), len(instructions)) for slot in self.kept)
        # A result that may be a view of an argument behind the first one: that argument's memory is left alone.
        unknown = [i for i in instructions if self.fresh.isdisjoint(i.outputs) and i.function not in WHOLE_VIEWS]
        behind = [slot for i in unknown for slot in refs((i.args[1:], tuple(i.kwargs.values())))]
        self.last.update((self.root(slot), len(instructions)) for slot in behind)

    def root(self, slot: int) -> int:
        """The value whose memory a value uses, or may use."""
        while True:
            if slot in self.joined:
                slot = self.joined[slot]
                continue
            producer = self.producers.get(slot)
            if producer is None or slot in self.fresh or not producer.args:
                return slot
            first = producer.args[0]
            if not isinstance(first, Ref):
                return slot
            slot = first.slot

    def is_view(self, slot: int) -> bool:
        """Whether a value does not hold all that its memory holds, as the calls made it."""
        while slot in self.joined:
            slot = self.joined[slot]
        return self.root(slot) != slot

    def is_kept(self, slot: int) -> bool:
        """Whether a value is read after the block."""
        return slot in self.kept

    def ends(self, slot: int, number: int, instruction: Instruction) -> bool:
        """Whether the memory of a value is the block's own, used by the value as a whole, and read last by an instruction.

        Element by element, the instruction may read the value twice, but no other view of that memory.
        """
        root, readers = self.root(slot), reads(instruction)
        if any(self.root(r) == root and r != slot for r in readers):
            return False
        if readers.count(slot) > 1 and instruction.function not in POINTWISE:
            return False
        producer = self.producers.get(root)
        if producer is None or root not in self.fresh or self.last.get(root) != number:
            return False
        while slot != root:
            if slot in self.joined:
                slot = self.joined[slot]
                continue
            view = self.producers[slot]
            if view.function not in WHOLE_VIEWS:
                return False
            slot = view.args[0].slot
        return True

    def take_over(self, place: int, out: int) -> None:
        """The result ``out`` stands in the memory of ``place`` from now on."""
        self.joined[out] = place
        self.last[self.root(place)] = self.last.get(out, -1)


def _converts(program: Program, instruction: Instruction) -> bool:
    """Whether a call makes a value of another dtype, which is no view."""
    if instruction.function is not torch.Tensor.to or instruction.kwargs or not isinstance(instruction.args[0], Ref):
        return False
    one, two = program.kinds.get(instruction.args[0].slot), program.kinds.get(instruction.outputs[0])
    return one is not None and two is not None and one[1] is not two[1]


def is_fresh(function: Callable[..., Any]) -> bool:
    """Whether the results of a function are memory that nothing else uses."""
    return (
        function is scattered or function in _FRESH_OPS or function in POINTWISE or function in _ON_FIRST or function in _FRESH
        or function in _THROUGH
        or function.__class__ in (DistinctRows, FilledRows)
        or function in _WRITING
    )


__all__ = ["POINTWISE", "WHOLE_VIEWS", "is_fresh", "reusing", "scattered", "written_over"]
