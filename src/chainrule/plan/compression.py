"""Compressed evaluation: columns that can be told apart afterwards are pushed through the function as one.

Sources: as for :mod:`chainrule.plan.colouring`.
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
from chainrule.plan.colouring import colour_columns, colour_symmetric
from chainrule.plan.elimination import Candidate
from chainrule.plan.graph import build_graph
from chainrule.plan.patterns import Key, read_node

#: What it costs to colour a matrix, for each of its entries, and to plan a compressed run, for each op, in multiply-adds: both
#: are done once.
_COLOURED, _TRACED = 1600.0, 1e6
#: For so many runs what is done once pays.
_RUNS = 100


class Compression:
    """Jacobians of some slots with respect to others, summed over the columns of each colour.

    Args:
        tape: the tape.
        sources: the slots differentiated with respect to; their elements are the columns, one slot after the other.
        outputs: the slots differentiated; their elements are the rows.
        dtype: the dtype of the maps.
        device: their device.
    """

    def __init__(
        self, tape: Any, sources: Sequence[int], outputs: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._workspace = Workspace(dtype, device)
        self._shapes = {slot: tuple(tape.values[slot].shape) for slot in (*sources, *outputs)}
        self._sources, self._outputs = list(sources), list(outputs)
        self._graph = build_graph(tape, self._sources, self._outputs, self._workspace)
        self.ops = len(self._graph.steps)
        self.rows = sum(math.prod(self._shapes[slot]) for slot in outputs)
        self.columns = sum(math.prod(self._shapes[slot]) for slot in sources)

    def compressed(self, count: int, colours: torch.Tensor | None = None) -> Node:
        """The compressed Jacobian, of shape ``(rows × count,)``.

        Args:
            count: the number of colours.
            colours: the colours of the columns; without them, the result is only good for its cost.
        """
        workspace, colour = self._workspace, Axis(count)
        seeds, start = {}, 0
        for slot in self._sources:
            shape = self._shapes[slot]
            stop = start + math.prod(shape)
            own = None if colours is None else colours[start:stop]
            seeds[slot] = self._seed(shape, colour, own)
            start = stop
        maps = elimination.sweep_forward(self._graph, seeds, self._outputs, workspace)
        parts = []
        for slot in self._outputs:
            shape = self._shapes[slot]
            parts.append(densify(maps.get(slot, LinearMap(shape, (count,))), workspace))

        def joined(program: Program, *values: Staged) -> Staged:
            flat = [torch.reshape(value, (-1,)) for value in values]
            return flat[0] if len(flat) == 1 else program.call(torch.cat, flat)

        moved = 0 if len(parts) == 1 else 2 * self.rows * count
        return Node((self.rows * count,), tuple(parts), joined, moved=moved, label="compressed columns")

    def _seed(self, shape: tuple[int, ...], colour: Axis, colours: torch.Tensor | None) -> LinearMap:
        dtype, count = self._workspace.dtype, colour.size

        def made(program: Program) -> Staged:
            assert colours is not None
            return program.constant(torch.nn.functional.one_hot(colours, count).to(dtype).reshape(*shape, count))

        axes = new_axes(shape)
        node = Node((*shape, count), (), made, label="seeds")
        return LinearMap(shape, (count,), (Term(dims_of(axes), ((colour,),), (Factor(node, (*axes, colour)),)),))

    def close(self) -> None:
        """Let go of what was shared while nodes were made."""
        self._workspace.memo.clear()


def by_columns(
    tape: Any, keys: dict[Key, torch.Tensor], least: float, dtype: torch.dtype, device: torch.device
) -> dict[Key, Node] | None:
    """Entries of Jacobians by colours of the columns of each input; None where that could not cost less.

    Args:
        tape: the tape.
        keys: by slots of output and input, row times the number of columns plus column of the entries.
        least: what they cost otherwise; infinite where colours are wanted in any case.
        dtype: the dtype of the maps.
        device: their device.
    """
    least -= _COLOURED / _RUNS * sum(places.numel() for places in keys.values())
    if least < 0:
        return None
    nodes: dict[Key, Node] = {}
    for source in dict.fromkeys(slot for _, slot in keys):
        own = {output: places for (output, slot), places in keys.items() if slot == source}
        work = Compression(tape, [source], list(own), dtype, device)
        # The fullest row has at least as many entries as rows have on average, and needs as many colours as it has entries.
        if _most(work, -(-sum(places.numel() for places in own.values()) // work.rows), least) is None:
            return None
        rows, columns = _stacked(tape, own, work.columns)
        most = _most(work, int(torch.bincount(rows).max()), least)
        colours = None if most is None else colour_columns(rows, columns, (work.rows, work.columns), most)
        if colours is None:
            return None
        colours = colours.to(device)
        count = int(colours.max()) + 1
        node, first = work.compressed(count, colours), 0
        places = rows * count + colours.index_select(0, columns)
        for output, part in own.items():
            nodes[output, source] = read_node(node, places[first : first + part.numel()])
            first += part.numel()
        work.close()
    return nodes


def by_stars(
    tape: Any, keys: dict[Key, torch.Tensor], numbers: dict[int, int], sources: Sequence[int], least: float,
    dtype: torch.dtype, device: torch.device,
) -> dict[Key, Node] | None:
    """Entries of a symmetric matrix by a star colouring of its rows; None where that could not cost less.

    Args:
        tape: the tape.
        keys: by slots of output and input, row times the number of columns plus column of the entries.
        numbers: by the slots of outputs, the number of the input that they are derivatives with respect to.
        sources: the slots of the inputs.
        least: what they cost otherwise; infinite where colours are wanted in any case.
        dtype: the dtype of the maps.
        device: their device.
    """
    least -= _COLOURED / _RUNS * sum(places.numel() for places in keys.values())
    if not keys or least < 0:
        return None
    outputs = sorted(numbers, key=lambda slot: numbers[slot])
    if [numbers[slot] for slot in outputs] != list(range(len(sources))):
        return None  # an input without curvature: its rows are missing
    work = Compression(tape, sources, outputs, dtype, device)
    size, firsts = work.columns, [0]
    for slot in sources:
        firsts.append(firsts[-1] + tape.values[slot].numel())
    lines = []
    for (output, source), places in keys.items():
        width = tape.values[source].numel()
        row = torch.div(places, width, rounding_mode="floor") + firsts[numbers[output]]
        lines.append((row, torch.remainder(places, width) + firsts[sources.index(source)]))
    rows, columns = (torch.cat(line) for line in zip(*lines, strict=True))
    off = int((rows > columns).sum()) or int((rows < columns).sum())
    # Two colours span a forest of stars, which has fewer edges than vertices: m edges need more than m / n colours.
    most = _most(work, off // size + 2 if off else 1, least)
    colours = None if most is None else colour_symmetric(rows, columns, size, most)
    if colours is None:
        return None
    colours = colours.to(device)
    count = int(colours.max()) + 1
    node = work.compressed(count, colours)
    places = star_places(rows, columns, colours, count, size)
    nodes, first = {}, 0
    for key, part in keys.items():
        nodes[key] = read_node(node, places[first : first + part.numel()])
        first += part.numel()
    work.close()
    return nodes


def star_places(rows: torch.Tensor, columns: torch.Tensor, colours: torch.Tensor, count: int, size: int) -> torch.Tensor:
    """Where the entries of a symmetric matrix stand in its compressed columns, of shape ``(size × count,)``.

    Args:
        rows: the rows of the entries: at least one of each pair of mirror images.
        columns: their columns.
        colours: a star colouring.
        count: the number of colours.
        size: the number of rows.
    """
    there = rows * count + colours.index_select(0, columns)
    mirrored = columns * count + colours.index_select(0, rows)
    # An entry and its mirror image may both be given: each counts once.
    low, high = torch.minimum(rows, columns), torch.maximum(rows, columns)
    pairs = torch.unique(low * size + high)
    low, high = torch.div(pairs, size, rounding_mode="floor"), torch.remainder(pairs, size)
    apart = low != high
    taken = torch.bincount(low * count + colours.index_select(0, high), minlength=size * count)
    low, high = low[apart], high[apart]
    taken += torch.bincount(high * count + colours.index_select(0, low), minlength=size * count)
    return torch.where(taken.index_select(0, there) == 1, there, mirrored)


def _stacked(tape: Any, keys: dict[int, torch.Tensor], columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows and columns of the blocks of one input, one output after the other."""
    rows, first = [], 0
    for slot, places in keys.items():
        rows.append(torch.div(places, columns, rounding_mode="floor") + first)
        first += tape.values[slot].numel()
    return torch.cat(rows), torch.remainder(torch.cat(list(keys.values())), columns)


def _most(work: Compression, fewest: int, least: float) -> int | None:
    """How many colours there may be at most for the compressed Jacobian to cost less; None if even the fewest cost more."""
    if math.isinf(least):
        return work.columns
    least -= _TRACED / _RUNS * work.ops
    if least < 0:
        return None
    cost = elimination.measure(Candidate("colours", {(0, 0): work.compressed(fewest)})).cost
    if cost >= least:
        return None
    further = elimination.measure(Candidate("colours", {(0, 0): work.compressed(fewest + 1)})).cost
    return fewest + int((least - cost) / max(further - cost, 1.0))


__all__ = ["Compression", "by_columns", "by_stars", "star_places"]
