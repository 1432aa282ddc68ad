"""Terms in coordinate form: where the entries of a term stand, and what they are, without the zeros between them."""

from __future__ import annotations

import math

import torch

from chainrule.maps.compose import Workspace, dense_factor
from chainrule.maps.contract import expand_to, permute
from chainrule.maps.nodes import Node
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Term


def coordinates(term: Term, workspace: Workspace) -> tuple[Node, Node]:
    """The entries of a settled term that are not structurally zero.

    Args:
        term: a settled term: its axes are outer ones, and no dense factor carries an axis that a relation ties.
        workspace: where its nodes are made.

    Returns:
        The flat places of the entries in the dense array over output and input (int64; negative where a relation has no
        target: there is no entry), and the entries, each of shape ``(n,)``.
    """
    positions = [axis for side in (term.out_dims, term.in_dims) for dim in side for axis in dim]
    tied = {h.target for h in term.onehots}
    grid = list(dict.fromkeys(axis for axis in positions if axis not in tied and axis.size != 1))
    names = {axis: number for number, axis in enumerate(grid)}
    sizes = tuple(axis.size for axis in grid)
    strides: dict[Axis, int] = {}
    stride = 1
    for axis in reversed(positions):
        strides[axis] = strides.get(axis, 0) + stride
        stride *= axis.size
    order = tuple(range(len(grid)))
    factor = dense_factor(term, grid, workspace)
    have = tuple(names[axis] for axis in factor.axes)
    relations = [h for h in term.onehots if h.target.size != 1 or h.partial]
    count = math.prod(sizes)

    def own_places(device: torch.device) -> torch.Tensor:
        places = torch.zeros(sizes, dtype=torch.long, device=device)
        for axis, number in names.items():
            counted = torch.arange(axis.size, device=device) * strides[axis]
            places = places + counted.reshape([-1 if n == number else 1 for n in order])
        return places

    def find(program: Program, *indices: Staged) -> Staged:
        places = program.constant(own_places(workspace.device))
        absent: Staged | None = None
        for relation, index in zip(relations, indices, strict=True):
            sources = tuple(axis for axis in relation.sources if axis in names)
            index = torch.reshape(index, tuple(axis.size for axis in sources))
            ordered = sorted(sources, key=lambda axis: names[axis])
            index = permute(index, tuple(sources.index(axis) for axis in ordered))
            index = expand_to(index, tuple(names[axis] for axis in ordered), order)
            if relation.partial:
                missing = index < 0
                absent = missing if absent is None else torch.logical_or(absent, missing)
            places = places + index * strides[relation.target]
        if absent is not None:
            places = torch.where(absent, -1, places)
        return torch.reshape(places, (-1,))

    def read(program: Program, value: Staged) -> Staged:
        return torch.reshape(torch.broadcast_to(expand_to(value, have, order), sizes), (-1,))

    places = Node((count,), tuple(h.index for h in relations), find, moved=count, label="places")
    return places, Node((count,), (factor.node,), read, moved=count, label="entries")


__all__ = ["coordinates"]
