"""One dense row times a local Jacobian, by a kernel of the op's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from chainrule.maps.compose import Workspace, dense_factor, settle
from chainrule.maps.nodes import Node
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Factor, Term, dims_of, new_axes
from chainrule.maps.views import expand_to


class Row(NamedTuple):
    """How an op pulls one cotangent back.

    Attributes:
        pull: from the cotangent of the op's output, in its shape, to that of its input.
        label: the op's name, for ``explain``.
    """

    pull: Callable[[Program, Staged], Staged]
    label: str


def is_dense_row(terms: Sequence[Term], out_shape: tuple[int, ...]) -> bool:
    """Whether a map is one row all of whose entries are held: nothing is gained by its structure."""
    if out_shape or len(terms) != 1 or terms[0].onehots:
        return False
    axes = [axis for dim in terms[0].in_dims for axis in dim if axis.size != 1]
    return len(set(axes)) == len(axes) and terms[0].carried_axes().issuperset(axes)


def pulled(term: Term, row: Row, in_shape: tuple[int, ...], workspace: Workspace) -> Term:
    """A dense row (see :func:`is_dense_row`) times a map to tensors of its own shape from tensors of ``in_shape``."""
    term = settle(term, workspace)
    axes = list(dict.fromkeys(axis for dim in term.in_dims for axis in dim))
    out_shape = tuple(math.prod(axis.size for axis in dim) for dim in term.in_dims)
    factor = dense_factor(term, axes, workspace)
    names = {axis: number for number, axis in enumerate(axes)}
    have, want = tuple(names[axis] for axis in factor.axes), tuple(range(len(axes)))

    def compute(program: Program, value: Staged) -> Staged:
        value = expand_to(value, have, want)
        return row.pull(program, value if tuple(value.shape) == out_shape else torch.reshape(value, out_shape))

    size, moved = math.prod(in_shape), math.prod(out_shape) + math.prod(in_shape)
    node = Node(in_shape, (factor.node,), compute, flops=size, moved=moved, label=row.label)
    inner = new_axes(in_shape)
    return Term((), dims_of(inner), (Factor(node, inner),))


__all__ = ["Row", "is_dense_row", "pulled"]
