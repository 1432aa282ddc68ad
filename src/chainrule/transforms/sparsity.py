"""The pattern of a Jacobian, without its values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chainrule.plan.sparse import SparseRequest, find_patterns
from chainrule.transforms.arguments import Argnums, resolve_argnums, tree_flatten
from chainrule.transforms.trace import Traced, trace


@dataclass(frozen=True)
class Sparsity:
    """Where a Jacobian may have non-zeros.

    Attributes:
        indices: rows and columns, sorted, each pair once. Shape ``(2, count)``, int64.
        shape: the numbers of rows (elements of all outputs) and of columns (elements of all inputs).
    """

    indices: torch.Tensor
    shape: tuple[int, int]

    @property
    def rows(self) -> torch.Tensor:
        """The rows of the entries. Shape ``(count,)``."""
        return self.indices[0]

    @property
    def columns(self) -> torch.Tensor:
        """The columns of the entries. Shape ``(count,)``."""
        return self.indices[1]

    def __len__(self) -> int:
        """The number of entries."""
        return self.indices.shape[1]

    @property
    def density(self) -> float:
        """The share of the entries in all of the matrix; 0 for an empty one."""
        return len(self) / max(self.shape[0] * self.shape[1], 1)

    def dense(self) -> torch.Tensor:
        """The pattern as a mask of shape ``shape``."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.indices.device)
        mask[self.rows, self.columns] = True
        return mask

    def scipy(self) -> Any:
        """The pattern as a ``scipy.sparse.csr_array`` of ones (int8).

        Raises:
            ImportError: without SciPy.
        """
        try:
            from scipy import sparse  # noqa: PLC0415 - optional
        except ImportError as error:
            raise ImportError("Sparsity.scipy needs SciPy; install chainrule[scipy]") from error
        rows, columns = self.indices.cpu().numpy()
        ones = torch.ones(len(self), dtype=torch.int8).numpy()
        return sparse.csr_array((ones, (rows, columns)), shape=self.shape)

    def spy(self, ax: Any = None, **options: Any) -> Any:
        """Draw the entries as points.

        Args:
            ax: the matplotlib axes to draw on; the current ones by default.
            options: passed to ``Axes.plot``.

        Returns:
            The axes.

        Raises:
            ImportError: without matplotlib.
        """
        if ax is None:
            try:
                from matplotlib import pyplot  # noqa: PLC0415 - optional
            except ImportError as error:
                raise ImportError("Sparsity.spy needs matplotlib; install chainrule[plot]") from error
            ax = pyplot.gca()
        size = max(0.3, min(6.0, 300 / max(*self.shape, 1)))
        rows, columns = self.indices.cpu().numpy()
        ax.plot(columns, rows, **{"marker": "s", "markersize": size, "linestyle": "none", "color": "black", **options})
        ax.set_xlim(-0.5, self.shape[1] - 0.5)
        ax.set_ylim(self.shape[0] - 0.5, -0.5)
        ax.set_aspect("equal")
        ax.set_title(f"{self.shape[0]} × {self.shape[1]}, {len(self)} entries")
        return ax


def sparsity(func: Callable[..., Any], *args: Any, argnums: Argnums = 0, global_: bool = False) -> Sparsity:
    """Return the structural pattern of the Jacobian of ``func`` at ``args``.

    It is read off the structure of the function, not off values: every true non-zero is in it. Both sides of a ``where`` and
    what a ``relu`` cuts off belong to it. The outputs' elements, one output after the other, are the rows; the inputs'
    elements are the columns.

    Args:
        func: a function of tensors that returns tensors (any pytree).
        args: its arguments.
        argnums: the positional arguments whose elements are the columns; an int, or a tuple or list of ints.
        global_: whether what ``max``, ``sort``, a mask or an index computed from the inputs selects here is widened to everything
            that it could select at other values. (A branch of Python is not seen: the pattern is that of this run.)

    Returns:
        The pattern.

    Raises:
        RuntimeError: if arguments or outputs cannot be differentiated.

    Example:
        >>> import torch, chainrule
        >>> chainrule.sparsity(lambda x: x[1:] * x[:-1], torch.ones(3)).indices
        tensor([[0, 0, 1, 1],
                [0, 1, 1, 2]])
    """
    positions, _ = resolve_argnums(argnums, len(args), "sparsity")
    if global_:
        leaves = tree_flatten(tuple(args[number] for number in positions))[0]
        with _Dependents(leaves) as dependents:
            traced = trace(func, args, positions, {}, "sparsity")
        tape = traced.tape
        widened = frozenset(
            slot for slot, value in enumerate(tape.values)
            if isinstance(value, torch.Tensor) and not value.dtype.is_floating_point and id(value) in dependents.known
        )  # fmt: skip
    else:
        traced, widened = trace(func, args, positions, {}, "sparsity"), frozenset()
    shape = sum(leaf.numel() for leaf in traced.out_leaves), sum(leaf.numel() for leaf in traced.in_leaves)
    keys = list(_keys(traced, widened, shape[1], everywhere=global_))
    whole = torch.cat(keys).sort().values if keys else torch.empty(0, dtype=torch.long, device=traced.in_leaves[0].device)
    columns = max(shape[1], 1)
    return Sparsity(torch.stack([torch.div(whole, columns, rounding_mode="floor"), torch.remainder(whole, columns)]), shape)


def _keys(traced: Traced, widened: frozenset[int], columns: int, *, everywhere: bool) -> Iterator[torch.Tensor]:
    """The entries of the blocks as numbers: row of the whole times ``columns`` plus column of the whole."""
    outputs = tuple(slot for slot in traced.out_slots if slot is not None)
    if not outputs:
        return
    found = find_patterns(traced.tape, SparseRequest(tuple(traced.in_slots), outputs), widened, everywhere=everywhere)
    row = 0
    for slot, out in zip(traced.out_slots, traced.out_leaves, strict=True):
        column = 0
        for source, leaf in zip(traced.in_slots, traced.in_leaves, strict=True):
            pattern = found.get((slot, source)) if slot is not None else None
            if pattern is not None:
                rows = torch.div(pattern.keys, pattern.columns, rounding_mode="floor") + row
                yield rows * columns + torch.remainder(pattern.keys, pattern.columns) + column
            column += leaf.numel()
        row += out.numel()


class _Dependents(TorchDispatchMode):
    """Notes which tensors are computed from given ones, indices and masks included."""

    def __init__(self, given: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {id(tensor): tensor for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read = tree_flatten((args, kwargs))[0]
        if any(id(item) in self.known for item in read if isinstance(item, torch.Tensor)):
            written = args[:1] if func._schema.is_mutable else ()
            for item in tree_flatten((out, written))[0]:
                if isinstance(item, torch.Tensor):
                    self.known[id(item)] = item
        return out


__all__ = ["Sparsity", "sparsity"]
