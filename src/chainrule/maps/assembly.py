"""Sums of terms written into one array: the largest part makes it, the others are written or added where they stand.

Each term is read or made once and written once; nothing of the size of the result is made beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

from chainrule.calls import new_zeros
from chainrule.maps.entries import Layout, Part
from chainrule.maps.nodes import Node
from chainrule.maps.staging import Program, Staged

#: Zeros are written to the gaps between blocks where there are at most so many gaps, and everywhere where there are more.
_GAPS = 8


@dataclass(frozen=True)
class Write:
    """What is written to a part of an array.

    Attributes:
        layout: the part.
        adds: whether it is added to what stands there.
        call: what makes it of its two operands; empty where it is the one operand itself (see :data:`MAKERS`).
        order: which of the dimensions that ``call`` makes each dimension of the part is; empty where they are the same.
    """

    layout: Layout
    adds: bool
    call: str = ""
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class Assembly:
    """How an array is put together.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        gaps: the parts that nothing is written to, which are zeroed; None for the whole array.
        writes: what is written, in this order.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    gaps: tuple[Layout, ...] | None
    writes: tuple[Write, ...]


def assembled_node(base: Node | None, parts: Sequence[Part], shape: tuple[int, ...]) -> Node:
    """The sum of a dense array (or none) and of parts as one array of ``shape``."""
    if base is None:
        parts, blocks, gaps = _in_turn(parts, shape)
    else:
        parts, blocks, gaps = list(parts), 0, ()
    writes = tuple(
        Write(part.layout, base is not None or not all(_apart(part.layout, other.layout) for other in parts[:number]))
        for number, part in enumerate(parts)
    )

    def compute(program: Program, *values: Staged) -> Staged:
        whole, entries = (values[0], values[1:]) if base is not None else (None, values)
        dtype = values[0].dtype
        for value in values[1:]:
            dtype = torch.promote_types(dtype, value.dtype)
        if whole is not None and whole.dtype != dtype:
            whole = whole.to(dtype)
        read = [part.read(value) for part, value in zip(parts, entries, strict=True)]
        return program.call(assembled, Assembly(shape, dtype, gaps, writes), whole, *read)

    numel, entries = math.prod(shape), sum(math.prod(part.wide) for part in parts)
    written = sum(math.prod(part.wide) for part in parts[:blocks])
    inputs = (*(() if base is None else (base,)), *(part.node for part in parts))
    moved = (2 * numel if base is not None else numel - written) + 2 * entries
    return Node(shape, inputs, compute, flops=entries if base is not None else 0, moved=moved, label="assembled")


def _in_turn(parts: Sequence[Part], shape: tuple[int, ...]) -> tuple[list[Part], int, tuple[Layout, ...] | None]:
    """The parts as they are written, how many of them are blocks that need no zeros below them, and what else needs them."""
    sizes = parts[0].layout.sizes
    whole = [p for p in parts if not p.layout.pairs and p.layout.sizes == sizes and len(_cuts(p.layout)) == 1]
    best: tuple[list[Part], tuple[Layout, ...] | None] = [], None
    for place in dict.fromkeys(next(iter(_cuts(part.layout))) for part in whole):
        blocks = sorted((p for p in whole if place in _cuts(p.layout)), key=lambda p: _cuts(p.layout)[place][0])
        kept, gaps, end = list[Part](), list[Layout](), 0
        for part in blocks:
            start, step, length = _cuts(part.layout)[place]
            if step != 1 or start < end:
                continue
            if start > end:
                gaps.append(Layout(sizes, ((place, end, 1, start - end),), ()))
            kept.append(part)
            end = start + length
        if end < sizes[place]:
            gaps.append(Layout(sizes, ((place, end, 1, sizes[place] - end),), ()))
        if len(gaps) <= _GAPS and sum(p.node.numel for p in kept) > sum(p.node.numel for p in best[0]):
            best = kept, tuple(gaps)
    blocks, zeros = best
    others = [part for part in parts if not any(part is block for block in blocks)]
    every = not any(part.layout.pairs for part in parts) and sum(math.prod(p.wide) for p in parts) == math.prod(shape)
    if every and all(_apart(a.layout, b.layout) for n, a in enumerate(parts) for b in parts[:n]):
        return list(parts), len(parts), ()
    return [*blocks, *others], len(blocks), zeros


def _cuts(layout: Layout) -> dict[int, tuple[int, int, int]]:
    """The dimensions that are viewed in part: start, step and length."""
    return {
        place: (start, step, length) for place, start, step, length in layout.slices if length != layout.sizes[place]
    }


def _apart(one: Layout, two: Layout) -> bool:
    """Whether two parts are known to have no element in common."""
    if one.sizes != two.sizes:
        return False
    first, second = _cuts(one), _cuts(two)
    for place in first.keys() & second.keys():
        (a, step, count), (b, other, length) = first[place], second[place]
        if a + step * (count - 1) < b or b + other * (length - 1) < a or (step == other and (a - b) % step):
            return True
    return False


def assembled(plan: Assembly, base: torch.Tensor | None, *operands: torch.Tensor, owned: bool = False) -> torch.Tensor:
    """The sum of an array and of what is written to its parts.

    Args:
        plan: the parts.
        base: the array; None for zeros.
        *operands: those of each write in turn.
        owned: whether nobody else reads ``base``, so that its memory may become that of the result.

    Returns:
        A contiguous tensor with memory of its own.
    """
    if base is not None:
        result = base.contiguous() if owned else base.clone(memory_format=torch.contiguous_format)
    elif plan.gaps is None:
        source = operands[0]
        result = new_zeros(source, plan.shape) if source.dtype is plan.dtype else new_zeros(source, plan.shape, dtype=plan.dtype)
    else:
        result = operands[0].new_empty(plan.shape, dtype=plan.dtype)
        for gap in plan.gaps:
            gap.view(result).zero_()
    plain = _nothing_follows(operands)
    number = 0
    for write in plan.writes:
        view = write.layout.view(result)
        if not write.call:
            value = operands[number]
            number += 1
            if write.adds:
                view.add_(value)
            else:
                view.copy_(value)
            continue
        x, y = operands[number], operands[number + 1]
        number += 2
        view = view[(0,) * (view.dim() - max(x.dim(), y.dim()))]  # a part of one place in the dimensions in front
        if write.order:
            view = view.permute([write.order.index(place) for place in range(len(write.order))])
        if plain:
            _written(write, view, x, y)
        elif write.adds:
            view.add_(MAKERS[write.call](x, y))
        else:
            view.copy_(MAKERS[write.call](x, y))
    return result


def _nothing_follows(operands: Sequence[torch.Tensor]) -> bool:
    """Whether calls may write their results to given memory: no graph of autograd is made, and no mode sees them."""
    if torch._C._len_torch_dispatch_stack() or forward_ad._current_level >= 0:
        return False
    return all([value.__class__ is torch.Tensor and not value.requires_grad for value in operands])


#: What may be made where it is to stand, by name.
MAKERS = {"mul": torch.mul, "mm": torch.mm, "bmm": torch.bmm}


def _written(write: Write, view: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    if not write.adds:
        MAKERS[write.call](x, y, out=view)
    elif write.call == "mul":
        view.addcmul_(x, y)
    elif write.call == "mm":
        view.addmm_(x, y)
    else:
        view.baddbmm_(x, y)


__all__ = ["MAKERS", "Assembly", "Write", "assembled", "assembled_node"]
