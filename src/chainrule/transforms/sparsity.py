"""The pattern of a Jacobian, without its values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chainrule.plan.patterns import Pattern
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
        tensors = [(slot, value) for slot, value in enumerate(traced.tape.values) if isinstance(value, torch.Tensor)]
        widened = frozenset(slot for slot, value in tensors if dependents.has(value))
        sized = frozenset(slot for slot, value in tensors if dependents.has_sized(value))
    else:
        traced, widened, sized = trace(func, args, positions, {}, "sparsity"), frozenset(), frozenset()
    shape = sum(leaf.numel() for leaf in traced.out_leaves), sum(leaf.numel() for leaf in traced.in_leaves)
    keys = list(_keys(traced, widened, sized, shape[1], everywhere=global_))
    whole = torch.cat(keys).sort().values if keys else torch.empty(0, dtype=torch.long, device=traced.in_leaves[0].device)
    columns = max(shape[1], 1)
    return Sparsity(torch.stack([torch.div(whole, columns, rounding_mode="floor"), torch.remainder(whole, columns)]), shape)


def _keys(
    traced: Traced, widened: frozenset[int], sized: frozenset[int], columns: int, *, everywhere: bool
) -> Iterator[torch.Tensor]:
    """The entries of the blocks as numbers: row of the whole times ``columns`` plus column of the whole."""
    outputs = tuple(slot for slot in traced.out_slots if slot is not None)
    if not outputs and not sized:
        return
    request = SparseRequest(tuple(traced.in_slots), outputs)
    found, unknown = find_patterns(traced.tape, request, widened, sized, everywhere=everywhere)
    row = 0
    for slot, out in zip(traced.out_slots, traced.out_leaves, strict=True):
        column = 0
        for source, leaf in zip(traced.in_slots, traced.in_leaves, strict=True):
            pattern = found.get((slot, source)) if slot is not None else None
            if source in unknown:
                every = torch.arange(out.numel() * leaf.numel(), device=leaf.device)
                pattern = Pattern(tuple(out.shape), tuple(leaf.shape), every)
            if pattern is not None:
                rows = torch.div(pattern.keys, max(pattern.columns, 1), rounding_mode="floor") + row
                yield rows * columns + torch.remainder(pattern.keys, max(pattern.columns, 1)) + column
            column += leaf.numel()
        row += out.numel()


class _Dependents(TorchDispatchMode):
    """Notes which tensors are computed from given ones, indices and masks included.

    What is written to memory is found again through every view of it.
    """

    def __init__(self, given: list[torch.Tensor]) -> None:
        super().__init__()
        self._known = {id(tensor): tensor for tensor in given}
        self._sized: dict[int, torch.Tensor] = {}
        self._written: dict[int, torch.UntypedStorage] = {}

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether the values of a tensor depend on the given ones."""
        return id(tensor) in self._known or (bool(self._written) and _memory(tensor) in self._written)

    def has_sized(self, tensor: torch.Tensor) -> bool:
        """Whether its shape does, or it is computed from one of such a shape."""
        return id(tensor) in self._sized

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = _tensors((args, kwargs))
        # Values may be written over by the call.
        depends, sized = any(map(self.has, read)), any(map(self.has_sized, read))
        sizes = depends and self._sizes(func, args)
        out = func(*args, **kwargs)
        if not depends:
            return out
        written = _tensors(_written_to(func, args, kwargs))
        for item in written:
            if (memory := _memory(item)) is not None:
                self._written[memory] = item.untyped_storage()
        for item in (*_tensors(out), *written):
            self._known[id(item)] = item
            if sized or sizes:
                self._sized[id(item)] = item
        return out

    def _sizes(self, func: Any, args: Any) -> bool:
        """Whether values among the arguments say how many elements are selected."""
        indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
        masks = any(isinstance(i, torch.Tensor) and i.dtype in _MASKS and self.has(i) for i in indices)
        if func in _BY_INDEX:
            return masks
        return torch.Tag.dynamic_output_shape in func.tags or func in _UNTAGGED or (masks and func.overloadpacket in _PUTS)


_MASKS = (torch.bool, torch.uint8)
_BY_INDEX = (torch.ops.aten.index.Tensor, torch.ops.aten._unsafe_index.Tensor)
#: Made of ops whose output's shape depends on values, and not tagged as such.
_UNTAGGED = (
    torch.ops.aten.where.default, torch.ops.aten.nonzero_numpy.default, torch.ops.aten.repeat_interleave.self_Tensor,
    torch.ops.aten.tensor_split.tensor_indices_or_sections,
)  # fmt: skip
_PUTS = (
    torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._unsafe_index_put, torch.ops.aten._index_put_impl,
    torch.ops.aten._index_put_impl_,
)  # fmt: skip


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [item for item in tree_flatten(tree)[0] if isinstance(item, torch.Tensor)]


def _written_to(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an op writes to."""
    if not func._schema.is_mutable:
        return []
    pairs = zip(func._schema.arguments, args, strict=False)
    given = [value for argument, value in pairs if argument.is_write]
    return given + [kwargs[a.name] for a in func._schema.arguments if a.is_write and a.name in kwargs]


def _memory(tensor: torch.Tensor) -> int | None:
    """The memory of a tensor; None where it has none of its own."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


__all__ = ["Sparsity", "sparsity"]
