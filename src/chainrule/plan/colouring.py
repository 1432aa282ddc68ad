"""Colourings of sparse patterns: columns, or rows and columns of a symmetric matrix, that may be computed as one.

Sources: Curtis, Powell and Reid, *On the estimation of sparse Jacobian matrices*, 1974; Gebremedhin, Manne and Pothen, *What
color is your Jacobian? Graph coloring for computing derivatives*, SIAM Review 47 (2005); Gebremedhin, Tarafdar, Manne and
Pothen, *New acyclic and star coloring algorithms with application to computing Hessians*, SIAM J. Sci. Comput. 29 (2007).
"""

from __future__ import annotations

import torch

from chainrule.maps.sorted_places import ordering, places_among


def colour_columns(
    rows: torch.Tensor, columns: torch.Tensor, shape: tuple[int, int], most: int | None = None
) -> torch.Tensor | None:
    """Colours of columns such that two columns with an entry in one row differ; greedy, fullest columns first.

    The time taken grows with the number of entries: the colours in use in a row are the bits of one number.

    Args:
        rows: the rows of the entries.
        columns: their columns.
        shape: the numbers of rows and columns.
        most: with more colours than this there is no result.

    Returns:
        The colour of every column, from 0 on; of a column without entries as well. None if there are too many.
    """
    own, starts, counts = _grouped(columns.cpu(), rows.cpu(), shape[1])
    used = [0] * shape[0]
    colours = [0] * shape[1]
    limit = 1 << most if most is not None else None
    for column in torch.argsort(counts, descending=True, stable=True).tolist():
        adjacent = own[starts[column] : starts[column + 1]]
        if not adjacent:
            break
        taken = 0
        for row in adjacent:
            taken |= used[row]
        free = ~taken & (taken + 1)
        if limit is not None and free >= limit:
            return None
        colours[column] = free.bit_length() - 1
        for row in adjacent:
            used[row] |= free
    return torch.tensor(colours, dtype=torch.long)


def colour_symmetric(
    rows: torch.Tensor, columns: torch.Tensor, size: int, most: int | None = None
) -> torch.Tensor | None:
    """A star colouring of a symmetric pattern: from the sums of the columns of each colour, every entry can be read.

    Rows (and columns) with an entry in common differ, and any path through four of them has at least three colours. So of an
    entry's row and column, one has a colour that none of the other's further neighbours has. Greedy, fullest rows first; the
    time taken grows with the number of entries.

    Args:
        rows: the rows of entries of which each stands for its mirror image, too; those on the diagonal are passed over.
        columns: their columns.
        size: the number of rows.
        most: with more colours than this there is no result.

    Returns:
        The colour of every row, from 0 on. None if there are too many.
    """
    rows, columns = rows.cpu(), columns.cpu()
    low, high = torch.minimum(rows, columns), torch.maximum(rows, columns)
    edges, _ = places_among((low * size + high)[low != high])
    low, high = torch.div(edges, max(size, 1), rounding_mode="floor"), torch.remainder(edges, max(size, 1))
    neighbours, starts, counts = _grouped(torch.cat([low, high]), torch.cat([high, low]), size)
    order = torch.argsort(counts, descending=True, stable=True).tolist()
    bits = [0] * size  # the colour, as a bit; 0 before there is one
    once, twice = [0] * size, [0] * size  # the colours of neighbours; those of several neighbours
    hubs = [0] * size  # the colours of those neighbours of which another neighbour has this one's colour
    first: dict[tuple[int, int], int] = {}  # the first neighbour of a colour
    limit = 1 << most if most is not None else None
    for vertex in order:
        adjacent = neighbours[starts[vertex] : starts[vertex + 1]]
        taken, several = once[vertex], twice[vertex]
        for other in adjacent:
            if bits[other]:
                # Between two of one colour, it must differ from their other neighbours; else from the centres of stars.
                taken |= once[other] if several & bits[other] else hubs[other]
        own = ~taken & (taken + 1)
        if limit is not None and own >= limit:
            return None
        bits[vertex] = own
        for other in adjacent:
            theirs = bits[other]
            if not once[other] & own:
                once[other] |= own
                first[other, own] = vertex
            else:
                if not twice[other] & own:
                    twice[other] |= own
                    hubs[first[other, own]] |= theirs
                hubs[vertex] |= theirs
            if several & theirs:
                hubs[other] |= own
    return torch.tensor([bit.bit_length() - 1 for bit in bits], dtype=torch.long)


def _grouped(by: torch.Tensor, values: torch.Tensor, count: int) -> tuple[list[int], list[int], torch.Tensor]:
    """Values group by group, where each group begins, and how many each has."""
    counts = torch.bincount(by, minlength=count)
    starts = torch.cat([counts.new_zeros(1), torch.cumsum(counts, 0)])
    return values.index_select(0, ordering(by)).tolist(), starts.tolist(), counts


__all__ = ["colour_columns", "colour_symmetric"]
