"""Local Jacobians of ops on stacks of matrices, written as products of named factors; the stack's dimensions stay diagonal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from chainrule.maps.nodes import Node, leaf
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Factor, Term, constant_index, dims_of, new_axes
from chainrule.rules.base import Call, Edge, single

Stage = Callable[[Program], Staged]


class Stack:
    """The batch dimensions of a call on stacks of matrices, and the factors that its terms share.

    Args:
        call: the call.
        item: the argument whose leading dimensions are the stack's.
    """

    def __init__(self, call: Call, item: Any) -> None:
        value = call.tensor(item)
        self.call = call
        self.batch = new_axes(call.shape(item)[:-2])
        self.dtype, self.device = value.dtype, value.device
        self._nodes: list[tuple[Node, bool]] = []

    def matrix(self, rows: int, columns: int, stage: Stage, flops: int = 0) -> int:
        """A factor made of one matrix per entry of the stack; returns its number."""
        sizes = (*(axis.size for axis in self.batch), rows, columns)
        node = leaf(sizes, stage, flops=flops or math.prod(sizes), label=self.call.op.name(), batch=self.call.batch)
        return self._add(node, True)

    def constant(self, make: Callable[[torch.dtype], torch.Tensor]) -> int:
        """A factor that is the same matrix in every run, such as a mask."""
        made = make(self.dtype)
        return self._add(constant_index(made.shape, lambda device: make(self.dtype).to(device), self.device), False)

    def lower(self, rows: int, columns: int) -> int:
        """Ones below the diagonal."""
        return self.constant(lambda dtype: torch.ones((rows, columns), dtype=dtype).tril(-1))

    def upper(self, rows: int, columns: int) -> int:
        """Ones on and above the diagonal."""
        return self.constant(lambda dtype: torch.ones((rows, columns), dtype=dtype).triu())

    def selection(self, rows: int, columns: int) -> int:
        """The leading part of an identity."""
        return self.constant(lambda dtype: torch.eye(rows, columns, dtype=dtype))

    def _add(self, node: Node, stacked: bool) -> int:
        self._nodes.append((node, stacked))
        return len(self._nodes) - 1

    def term(self, equation: str, factors: Sequence[int], sizes: dict[str, int] | None = None, scale: float = 1.0) -> Term:
        """A product of factors.

        Args:
            equation: the dimensions of each factor, ``->``, those of the output and those of the input, one letter each,
                as in ``"ia bj -> ij ab"``; a ``.`` stands for no dimension.
            factors: the factors' numbers.
            sizes: sizes of letters that no factor has.
            scale: a number to multiply with.
        """
        words, result = (side.split() for side in equation.split("->"))
        axes = {letter: Axis(size) for letter, size in (sizes or {}).items()}
        made = []
        for word, number in zip(words, factors, strict=True):
            node, stacked = self._nodes[number]
            for letter, size in zip(word, node.sizes[-len(word) :], strict=True):
                if axes.setdefault(letter, Axis(size)).size != size:
                    raise AssertionError(f"two sizes for {letter} in {equation}")
            own = tuple(axes[letter] for letter in word)
            made.append(Factor(node, (*self.batch, *own) if stacked else own))
        batch = dims_of(self.batch)
        out_dims, in_dims = ((*batch, *((axes[letter],) for letter in word if letter != ".")) for word in result)
        return Term(out_dims, in_dims, tuple(made), (), scale)

    def edge(self, item: Any, output: int, terms: Sequence[Term]) -> Edge:
        """The edge from an argument to an output."""
        return single(self.call, item, terms, output=output)


def identity_like(program: Program, matrix: Staged, size: int) -> Staged:
    """The identity of a size, for each matrix of a stack."""
    eye = program.constant(torch.eye(size, dtype=matrix.dtype, device=matrix.device))
    return torch.broadcast_to(eye, (*matrix.shape[:-2], size, size))


def padded(matrix: Staged, rows: int, columns: int) -> Staged:
    """A matrix with zeros appended below and to the right."""
    missing = rows - matrix.shape[-2], columns - matrix.shape[-1]
    return torch.constant_pad_nd(matrix, [0, missing[1], 0, missing[0]]) if any(missing) else matrix


def transposed(matrix: Staged) -> Staged:
    """Rows and columns exchanged."""
    return torch.transpose(matrix, -2, -1)


__all__ = ["Stack", "identity_like", "padded", "transposed"]
