"""Matrix products laid out in memory like what they meet element by element.

A product of a long matrix with few columns is planned as the transpose of another one, for the kernel's sake (see
:mod:`chainrule.maps.matrix_products`). Where that meets a matrix that stands in memory by rows, an element-wise kernel has to
walk through both at once, which takes several times longer than the product saves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from chainrule.calls import FUNCTIONS
from chainrule.execute.renaming import renamed
from chainrule.execute.sharing import TRANSPOSES
from chainrule.maps.staging import Instruction, Program, Ref, reads

aten = torch.ops.aten

_BINARY = (
    "mul.Tensor", "add.Tensor", "sub.Tensor", "div.Tensor", "addcmul.default", "addcdiv.default", "where.self",
    "maximum.default", "minimum.default", "threshold_backward.default", "leaky_relu_backward.default",
    "hardtanh_backward.default", "hardsigmoid_backward.default", "hardswish_backward.default", "hardshrink_backward.default",
    "softshrink_backward.default", "elu_backward.default", "softplus_backward.default", "silu_backward.default",
    "mish_backward.default", "gelu_backward.default", "tanh_backward.default", "sigmoid_backward.default",
    "log_sigmoid_backward.default",
)  # fmt: skip
_UNARY = (
    "neg.default", "exp.default", "sin.default", "cos.default", "tanh.default", "sigmoid.default", "square.default",
    "sqrt.default", "rsqrt.default", "reciprocal.default", "pow.Tensor_Scalar", "rsub.Scalar", "relu.default",
)  # fmt: skip


def _calls(paths: Sequence[str]) -> set[Any]:
    found = set[Any]()
    for path in paths:
        name, overload = path.split(".")
        op = getattr(getattr(aten, name), overload)
        found |= {op, op._op, FUNCTIONS.get(op._op, op)}
    return found


#: Element by element, as plans and recordings call them.
_ELEMENTWISE = frozenset(_calls((*_BINARY, *_UNARY)))
_PRODUCTS = frozenset({torch.mm, aten.mm.default._op})

#: Narrower products gain more by their layout than it costs.
_NARROW = 16
#: In double precision, so do longer sums.
_LONG = 128


def with_even_layouts(
    program: Program, instructions: Sequence[Instruction], own: set[int], touched: Callable[[Instruction], bool]
) -> list[Instruction] | None:
    """The instructions, with transposed products that meet matrices by rows as products by rows.

    Args:
        program: the program.
        instructions: its instructions.
        own: values that must not share their memory.
        touched: whether an instruction reads or makes memory that is written to.

    Returns:
        The instructions, the transposes with their products among them; None where nothing changes.
    """
    found = _transposed_products(program, instructions, own, touched)
    turned = found.keys() & _beside_rows(program, instructions, found) if found else None
    if not turned:
        return None
    makers = {i.outputs[0]: i for i in instructions if i.function in TRANSPOSES and len(i.args) == 1}
    names: dict[int, int] = {}
    kept: list[Instruction] = []
    for instruction in instructions:
        if names:
            instruction = renamed(instruction, names)
        slot = instruction.outputs[0] if instruction.outputs else -1
        if slot not in turned:
            kept.append(instruction)
            continue
        product, args = found[slot], []
        for item in reversed(product.args):
            item = Ref(names.get(item.slot, item.slot))
            transpose = makers.get(item.slot)
            if transpose is None:
                transpose = instruction._replace(args=(item,), outputs=(program.new_slot(),))
                rows, columns = program.kinds[item.slot][0]
                program.kinds[transpose.outputs[0]] = torch.Size((columns, rows)), *program.kinds[item.slot][1:]
                program.shares[transpose.outputs[0]] = item.slot
                kept.append(transpose)
                args.append(Ref(transpose.outputs[0]))
            else:
                (source,) = transpose.args
                args.append(Ref(names.get(source.slot, source.slot)))
        made = names[slot] = program.new_slot()
        program.kinds[made] = program.kinds[slot]
        kept.append(product._replace(args=tuple(args), outputs=(made,)))
    return kept


def _transposed_products(
    program: Program, instructions: Sequence[Instruction], own: set[int], touched: Callable[[Instruction], bool]
) -> dict[int, Instruction]:
    """The products of which nothing but the transpose is read, by the slot of that, where both ways take about as long."""
    products = {i.outputs[0]: i for i in instructions if i.function in _PRODUCTS and len(i.args) == 2 and not i.kwargs}
    read: dict[int, int] = {}
    found: dict[int, Instruction] = {}
    for instruction in instructions:
        for slot in reads(instruction):
            read[slot] = read.get(slot, 0) + 1
        if instruction.function not in TRANSPOSES or len(instruction.args) != 1 or instruction.kwargs:
            continue
        (source,), (out,) = instruction.args, instruction.outputs
        product = products.get(source.slot) if isinstance(source, Ref) else None
        if product is None or out in own or source.slot in own or out not in program.kinds or touched(instruction):
            continue
        kinds = [program.kinds.get(item.slot) for item in product.args if isinstance(item, Ref)]
        if len(kinds) < 2 or None in kinds or touched(product):
            continue
        (rows, columns), dtype, _ = program.kinds[out]
        long = dtype is torch.float64 and kinds[1] is not None and kinds[1][0][0] > _LONG
        if columns >= _NARROW and rows > 1 and not long:
            found[out] = product
    return {out: product for out, product in found.items() if read.get(product.outputs[0]) == 1}


def _beside_rows(program: Program, instructions: Sequence[Instruction], products: dict[int, Instruction]) -> set[int]:
    """The values that meet, also by way of others, a matrix by rows, and none by columns that has to stay so."""
    kinds = program.kinds
    leader: dict[int, int] = {}

    def lead(slot: int) -> int:
        while (above := leader.setdefault(slot, slot)) != slot:
            leader[slot] = leader.setdefault(above, above)
            slot = above
        return slot

    made = dict[int, Instruction]()
    followed = set[int]()
    for instruction in instructions:
        made.update(dict.fromkeys(instruction.outputs, instruction))
        if instruction.function not in _ELEMENTWISE or len(instruction.outputs) != 1:
            continue
        (out,) = instruction.outputs
        shape = kinds[out][0] if out in kinds else None
        if shape is None or len(shape) != 2 or min(shape) < 2:
            continue
        whole = [slot for slot in reads(instruction) if slot in kinds and kinds[slot][0] == shape]
        for slot in whole:
            leader[lead(slot)] = lead(out)
        if whole:
            followed.add(out)
    by_rows, by_columns = set[int](), set[int]()
    for slot in leader:
        maker = made.get(slot)
        if slot in products or slot in followed:
            continue
        (by_columns if maker is not None and maker.function in TRANSPOSES else by_rows).add(lead(slot))
    return {slot for slot in leader if lead(slot) in by_rows - by_columns}


__all__ = ["with_even_layouts"]
