"""Lazy dense arrays: the factors' values, known by size and cost before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from chainrule.maps.staging import Program, Staged

#: An element read or written costs about as much as this many multiply-adds.
MOVED_COST = 4.0

#: A call costs about as much as this many multiply-adds before its kernel starts.
CALL_COST = 20_000


class Node:
    """A dense array to be computed: its sizes, the nodes it needs, its cost, and how to stage it.

    Attributes:
        sizes: the array's shape.
        numel: the number of its elements.
        inputs: the nodes whose values ``compute`` receives.
        flops: multiply-adds of this step alone.
        bytes: elements read and written by this step alone, in elements (not yet times the item size).
        batch: the samples of a surrounding ``vmap`` that this array differs between, 1 for none: its cost is this many times
            that of one sample.
        label: a word for ``explain``.
        digit: for an index that is a digit of another one, ``(that index's node, stride, size, how many places it
            counts)``: ``that // stride % size``.
        distinct: for an index, those of its dimensions along which no two entries are the same (with the others held fixed).
        inverse: for an index that is a permutation, what makes the index of the way back; None where that is not known.
        merge: a way to multiply this array with another one and sum without making this array (see
            :data:`chainrule.maps.contract.Merge`); None where there is none.
        sums: makes its sum over one of its dimensions without the rest; None where it is summed as it is.
        diagonal: two of its dimensions, and what makes its diagonal in them (which stands last) without the rest; None where
            there is no such way.
        is_indicator: whether it holds zeros and ones only, so that it is its own square.
        is_choice: whether it is zero but where an op chose its elements (an extremum, of which ties have their shares).
        running: the matrices that it holds, if these are made by a recurrence (see :mod:`chainrule.maps.running`).
        mask: whether its zeros may be known before the run: a mask, or an operand that may be one.
        zeros: which of its dimensions a constant mask stands over, outside of which it is zero, and what makes that on a
            device; None where nothing is known.
        slot: for a value of the tape, and what is zero where that is, its slot.
        facts: for an index with a known value, ``(start, step)`` if it is affine, and whether some of it is negative.
    """

    __slots__ = (
        "_compute", "batch", "bytes", "diagonal", "digit", "distinct", "facts", "flops", "inputs", "inverse", "is_choice",
        "is_indicator", "label", "mask", "merge", "numel", "running", "sizes", "slot", "staged", "sums", "zeros",
    )  # fmt: skip

    def __init__(
        self,
        sizes: Iterable[int],
        inputs: tuple[Node, ...],
        compute: Callable[..., Staged],
        *,
        flops: int = 0,
        moved: int = 0,
        label: str = "",
        batch: int = 1,
    ) -> None:
        self.batch: int = max([batch, *[node.batch for node in inputs]])
        self.sizes = tuple(sizes)
        self.numel = math.prod(self.sizes)
        self.inputs = inputs
        self._compute = compute
        self.flops = flops
        self.bytes = moved
        self.label = label
        self.staged: Staged | None = None
        self.digit: tuple[Node, int, int, int] | None = None
        self.distinct: frozenset[int] = frozenset()
        self.inverse: Callable[[], Node] | None = None
        self.mask = False
        self.slot: int | None = None
        self.zeros: tuple[tuple[int, ...], Callable[[torch.device], torch.Tensor]] | None = None
        self.merge: Any = None
        self.running: Any = None
        self.sums: Callable[[int], Node] | None = None
        self.diagonal: tuple[int, int, Callable[[], Node]] | None = None
        self.is_indicator = self.is_choice = False
        self.facts: tuple[tuple[int, int] | None, bool] = (None, False)

    def force(self, program: Program) -> Staged:
        """Stage this node and everything it needs into ``program`` (once)."""
        if self.staged is None:
            for node in postorder([self]):
                if node.staged is None:
                    node.staged = node._compute(program, *[item.staged for item in node.inputs])
                    if tuple(node.staged.shape) != node.sizes:
                        raise AssertionError(
                            f"{node.label or 'a node'} was declared with sizes {node.sizes} and gave {tuple(node.staged.shape)}"
                        )
        assert self.staged is not None
        return self.staged


def postorder(roots: Iterable[Node]) -> list[Node]:
    """Return the nodes that ``roots`` need, each after its inputs; staged nodes are leaves."""
    done: set[int] = set()
    order: list[Node] = []
    stack: list[tuple[Node, bool]] = [(root, False) for root in reversed(list(roots))]
    while stack:
        node, expanded = stack.pop()
        if id(node) in done:
            continue
        if expanded:
            done.add(id(node))
            order.append(node)
            continue
        stack.append((node, True))
        if node.staged is None:
            stack.extend((item, False) for item in reversed(node.inputs) if id(item) not in done)
    return order


def leaf(
    sizes: Iterable[int], thunk: Callable[[Program], Any], *, flops: int = 0, label: str = "", batch: int = 1
) -> Node:
    """A node that needs no other node: a value of the tape, or a rule's formula over such values."""
    shape = tuple(sizes)
    return Node(shape, (), thunk, flops=flops, moved=math.prod(shape) if flops else 0, label=label, batch=batch)


def masking(node: Node) -> Node:
    """The node, noted as a mask."""
    node.mask = True
    return node


def choosing(node: Node) -> Node:
    """The node, noted as what an op chose."""
    node.is_choice = True
    return node


def selecting(node: Node) -> Node:
    """The node, noted as a mask of zeros and ones.

    An element-wise product with it is zero where it is, whatever the other factor holds there (``inf``, NaN), as in torch's
    own derivatives of writes.
    """
    compute = node._compute

    def noted(program: Program, *values: Staged) -> Staged:
        made = compute(program, *values)
        program.masks.setdefault(made.slot, made)
        return made

    node._compute = noted
    return masking(node)


def reshaped(node: Node, sizes: Iterable[int]) -> Node:
    """The same array with axes split or merged."""
    shape = tuple(sizes)
    if shape == node.sizes:
        return node
    return Node(shape, (node,), lambda program, value: program.view_of(value, lambda v: v.reshape(shape)), label="reshape")
