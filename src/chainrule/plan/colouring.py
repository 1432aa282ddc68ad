"""Compressed evaluation: columns that share no row are pushed through the function together.

Source: Curtis, Powell and Reid, *On the estimation of sparse Jacobian matrices*, 1974; the greedy colouring of columns at
distance two is that of Gebremedhin, Manne and Pothen, *What color is your Jacobian?*, SIAM Review 47 (2005).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from chainrule.maps.compose import Workspace
from chainrule.maps.linear_map import LinearMap, densify
from chainrule.maps.nodes import Node
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Factor, Term, dims_of, new_axes
from chainrule.plan import elimination
from chainrule.plan.graph import build_graph


def colour_columns(rows: torch.Tensor, columns: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Colours of columns such that two columns with an entry in one row differ; greedy, fullest columns first.

    Args:
        rows: the rows of the entries.
        columns: their columns.
        shape: the numbers of rows and columns.

    Returns:
        The colour of every column, from 0 on; of a column without entries as well.
    """
    rows, columns = rows.cpu(), columns.cpu()
    order = torch.argsort(columns, stable=True)
    counts = torch.bincount(columns, minlength=shape[1])
    parts = rows.index_select(0, order).split(counts.tolist())
    width = max(int(torch.bincount(rows, minlength=shape[0]).max()), 1) if rows.numel() else 1
    used = torch.zeros(shape[0], width, dtype=torch.bool)
    colours = torch.zeros(shape[1], dtype=torch.long)
    for column in torch.argsort(counts, descending=True, stable=True).tolist():
        own = parts[column]
        if not own.numel():
            break
        free = torch.logical_not(used.index_select(0, own).any(0)).nonzero()
        if free.numel():
            colour = int(free[0])
        else:
            colour = used.shape[1]
            used = torch.cat([used, torch.zeros(shape[0], max(colour // 4, 1), dtype=torch.bool)], 1)
        used[own, colour] = True
        colours[column] = colour
    return colours


def compressed_nodes(
    tape: Any, source: int, keys: dict[int, torch.Tensor], dtype: torch.dtype, device: torch.device
) -> dict[int, Node]:
    """The values at ``keys`` of the Jacobians of some outputs with respect to one input, from compressed columns.

    Args:
        tape: the tape.
        source: the input's slot.
        keys: by output slot, row times the number of columns plus column.
        dtype: the dtype of the maps.
        device: their device.
    """
    shape = tuple(tape.values[source].shape)
    columns = math.prod(shape)
    rows_of, columns_of, first = [], [], 0
    for slot, places in keys.items():
        rows_of.append(torch.div(places, columns, rounding_mode="floor") + first)
        columns_of.append(torch.remainder(places, columns))
        first += tape.values[slot].numel()
    colours = colour_columns(torch.cat(rows_of), torch.cat(columns_of), (first, columns)).to(device)
    count = int(colours.max()) + 1
    workspace = Workspace(dtype, device)

    def seeds(program: Program) -> Staged:
        made = torch.nn.functional.one_hot(colours, count).to(dtype).reshape(*shape, count)
        return program.constant(made)

    axes, colour = new_axes(shape), Axis(count)
    node = Node((*shape, count), (), seeds, label="seeds")
    seed = LinearMap(shape, (count,), (Term(dims_of(axes), ((colour,),), (Factor(node, (*axes, colour)),)),))
    graph = build_graph(tape, [source], list(keys), workspace)
    maps = elimination.sweep_forward(graph, {source: seed}, list(keys), workspace)
    found = {slot: _read(densify(maps[slot], workspace), keys[slot], colours, columns, count) for slot in keys}
    workspace.memo.clear()
    return found


def _read(node: Node, keys: torch.Tensor, colours: torch.Tensor, columns: int, count: int) -> Node:
    """The entries, read from the compressed Jacobian."""
    rows = torch.div(keys, columns, rounding_mode="floor")
    places = rows * count + colours.index_select(0, torch.remainder(keys, columns))

    def compute(program: Program, value: Staged) -> Staged:
        return torch.index_select(torch.reshape(value, (-1,)), 0, program.constant(places))

    return Node((keys.numel(),), (node,), compute, flops=keys.numel(), moved=2 * keys.numel(), label="entries")


def worth_colouring(keys: Sequence[torch.Tensor], columns: int, cost: float) -> bool:
    """Whether computing entries one by one costs so much, and rows are so sparse, that colours could be cheaper."""
    count = sum(places.numel() for places in keys)
    if not count or cost < 50.0 * count:
        return False
    rows = (torch.div(places, columns, rounding_mode="floor") for places in keys)
    fullest = max(int(torch.unique_consecutive(r, return_counts=True)[1].max()) for r in rows)
    return fullest * 4 <= columns


__all__ = ["colour_columns", "compressed_nodes", "worth_colouring"]
