"""A readable account of the terms that a linear map consists of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from chainrule.execute.sparse import terms_described
from chainrule.maps.nonzeros import count_entries
from chainrule.maps.terms import Axis, Dims, Term
from chainrule.plan.algebra import AlgebraRequest, described
from chainrule.plan.sparse import SparseExpression

if TYPE_CHECKING:
    from chainrule.transforms.linear_map import LinearMap


#: Ops with more entries than this are not listed: to know where they stand would take as long as the map itself.
_LISTED = 1 << 20


@dataclass(frozen=True)
class TermStructure:
    """One term of a block: a product of arrays over named axes.

    Attributes:
        rows: for each output dimension, the names of its axes (``"i"``, or ``"i·j"`` for several).
        columns: the same for each input dimension.
        sizes: the sizes of the axes by name.
        diagonal: the axes that stand on both sides: nothing is stored for them.
        relations: axes that follow from others by an index, as ``(axis, axes that it follows from)``: slices, gathers.
        factors: the arrays: their axes, their shape and their bytes.
        entries: how many entries the term has; several of them may stand at one place of the block.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    sizes: dict[str, int]
    diagonal: tuple[str, ...]
    relations: tuple[tuple[str, tuple[str, ...]], ...]
    factors: tuple[tuple[tuple[str, ...], tuple[int, ...], int], ...]
    entries: int

    @property
    def bytes(self) -> int:
        """The bytes of the arrays."""
        return sum(size for _, _, size in self.factors)

    def __str__(self) -> str:
        arrays = " · ".join(f"[{', '.join(axes)}] {tuple(shape)} {_bytes(size)}" for axes, shape, size in self.factors)
        text = f"({', '.join(self.rows)}) × ({', '.join(self.columns)}): {arrays or 'ones'}"
        if self.diagonal:
            text += f"; diagonal in {', '.join(f'{axis} ({self.sizes[axis]})' for axis in self.diagonal)}"
        for target, sources in self.relations:
            text += f"; {target} = index[{', '.join(sources)}]"
        return f"{text}; {self.entries} entries"


@dataclass(frozen=True)
class BlockStructure:
    """The block of one output leaf and one input leaf.

    Attributes:
        output: the number of the output leaf.
        input: the number of the input leaf.
        shape: the numbers of rows and columns.
        terms: its terms; none for a block of zeros.
        dense_bytes: what it would take as a dense array.
    """

    output: int
    input: int
    shape: tuple[int, int]
    terms: tuple[TermStructure, ...]
    dense_bytes: int

    @property
    def bytes(self) -> int:
        """The bytes of the terms' arrays."""
        return sum(term.bytes for term in self.terms)


@dataclass(frozen=True)
class Structure:
    """What a linear map consists of.

    Attributes:
        title: the map in one line.
        blocks: its blocks, row by row.
    """

    title: str
    blocks: tuple[BlockStructure, ...]

    @property
    def bytes(self) -> int:
        """The bytes of the arrays of all terms."""
        return sum(block.bytes for block in self.blocks)

    @property
    def dense_bytes(self) -> int:
        """What the map would take as a dense matrix."""
        return sum(block.dense_bytes for block in self.blocks)

    def __str__(self) -> str:
        lines = [f"{self.title}: {_bytes(self.bytes)} in terms, {_bytes(self.dense_bytes)} if dense"]
        for block in self.blocks:
            lines.append(f"  output {block.output}, input {block.input} ({block.shape[0]}×{block.shape[1]}):")
            lines.extend(f"    {term}" for term in block.terms)
            if not block.terms:
                lines.append("    zero")
        return "\n".join(lines)


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} B"


def structure_of(tape: Any, request: AlgebraRequest, seeds: Sequence[torch.Tensor], linear_map: LinearMap) -> Structure:
    """The account of a map, whose blocks are what ``request`` asks for."""
    found = described(tape, request, seeds)
    out_space, in_space = linear_map.out_space, linear_map.in_space
    # Sums over relations (a scatter into the nodes of a graph) are dense where they are contracted, and few entries where
    # these are listed.
    rows, columns = linear_map.shape
    listed = terms_described(tape, SparseExpression(request.expression), seeds, min(_LISTED, rows * columns)) or {}
    blocks = []
    for o, height in enumerate(out_space.sizes):
        for i, width in enumerate(in_space.sizes):
            size = torch.promote_types(out_space.dtypes[o], in_space.dtypes[i]).itemsize
            terms = tuple(_term(term, size) for term in found.get((o, i), ()))
            few = tuple(_term(term, size) for term in listed.get((o, i), ()))
            if few and sum(term.entries for term in few) < sum(term.entries for term in terms):
                terms = few
            blocks.append(BlockStructure(o, i, (height, width), terms, height * width * size))
    return Structure(repr(linear_map), tuple(blocks))


def _term(term: Term, itemsize: int) -> TermStructure:
    names: dict[Axis, str] = {}

    def name(axis: Axis) -> str:
        if axis not in names:
            number, letters = len(names), "ijklmnopqrstuvwxyzabcdefgh"
            names[axis] = letters[number % 26] + (str(number // 26) if number >= 26 else "")
        return names[axis]

    def side(dims: Dims) -> tuple[str, ...]:
        return tuple("·".join(name(axis) for axis in dim if axis.size != 1) or "1" for dim in dims)

    rows, columns = side(term.out_dims), side(term.in_dims)
    inside = [{axis for dim in dims for axis in dim if axis.size != 1} for dims in (term.out_dims, term.in_dims)]
    for onehot in term.onehots:  # what they follow from need not be a dimension itself
        for axis in onehot.sources:
            name(axis)
    factors = tuple(
        (tuple(name(axis) for axis in f.axes), tuple(axis.size for axis in f.axes), f.node.numel * itemsize)
        for f in term.factors
    )
    relations = tuple((name(h.target), tuple(name(axis) for axis in h.sources)) for h in term.onehots if h.target.size != 1)
    diagonal = tuple(names[axis] for axis in names if axis in inside[0] and axis in inside[1])
    sizes = {label: axis.size for axis, label in names.items()}
    return TermStructure(rows, columns, sizes, diagonal, relations, factors, count_entries(term))


__all__ = ["BlockStructure", "Structure", "TermStructure", "structure_of"]
