"""Jacobians that are larger than memory, block by block."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from chainrule.dispatch import LightMode, entry_point
from chainrule.execute.planning import frugal
from chainrule.transforms.arguments import Argnums, check_whole, function_name, resolve_argnums, tree_unflatten
from chainrule.transforms.budget import rows_within
from chainrule.transforms.jacobians import Chunks, check_real, row_blocks
from chainrule.transforms.trace import Traced, trace

#: Rows per block when neither ``rows`` nor ``max_memory`` is given: as many as take this many bytes.
_DEFAULT = 1 << 28


def _versions(traced: Traced) -> list[tuple[weakref.ref[torch.Tensor], int]]:
    """The tensors of a run, and how often each was written to; they are not kept alive."""
    return [
        (weakref.ref(value), value._version)
        for value in (*traced.in_leaves, *traced.tape.values)
        if isinstance(value, torch.Tensor) and not value.is_inference()
    ]


def _check_versions(
    versions: list[tuple[weakref.ref[torch.Tensor], int]], func: Callable[..., Any], name: str
) -> None:
    for reference, version in versions:
        value = reference()
        if value is not None and value._version != version:
            raise RuntimeError(
                f"{name}({function_name(func)}): a tensor that {function_name(func)} reads (an argument, a parameter, or what it "
                f"closes over), of shape {tuple(value.shape)}, was written to between two blocks; the blocks to come would mix "
                "old and new values. Write to it after the last block, or give copies (x.clone())."
            )


def _check_constant(traced: Traced, func: Callable[..., Any], name: str) -> None:
    for tensor in (*traced.in_leaves, *traced.tape.values):
        found = tensor
        for mode in reversed(_get_current_dispatch_mode_stack()):
            if not isinstance(mode, LightMode) or not isinstance(found, torch.Tensor):
                continue
            if mode.reverse and mode.is_active(found):
                raise RuntimeError(
                    f"{name}({function_name(func)}): a transform around it differentiates with respect to what the blocks depend "
                    "on, but blocks are constants for it. Use jacrev or jacobian there, or, where they are to be constants, "
                    "x.detach() or torch.no_grad()."
                )
            found = mode.unwrapped(found)


class RowBlock(NamedTuple):
    """Some rows of a Jacobian.

    Attributes:
        output: the number of the output among the leaves of what the function returns.
        rows: which elements of that output (flattened) they belong to.
        jacobian: the rows: the tree of the arguments (a tuple when ``argnums`` is one), each leaf of shape
            ``(rows.stop - rows.start, *input.shape)``.
    """

    output: int
    rows: slice
    jacobian: Any


def jacobian_blocks(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    rows: int | None = None,
    max_memory: int | str | None = None,
    progress: bool = False,
    callback: Callable[[RowBlock], Any] | None = None,
) -> Callable[..., Any]:
    """Return a function that computes the Jacobian of ``func`` in blocks of rows, one at a time.

    Only one block is held at once, so that a Jacobian larger than memory can be written to disk or reduced. ``func`` runs
    once, and one plan serves all blocks of an output; each block costs its rows only. For a Hessian, give it the
    gradient: ``jacobian_blocks(chainrule.grad(f))``.

    Args:
        func: a function of tensors that returns tensors (any pytree).
        argnums: the positional arguments to differentiate with respect to; an int, or a tuple or list of ints.
        rows: elements of an output per block; by default as many as fit `max_memory`.
        max_memory: how much may be allocated: bytes, or a string like ``"512MB"``; 256 MiB by default.
        progress: whether to show the progress (needs tqdm).
        callback: called with each block, in order, in place of an iterator.

    Returns:
        A function with the arguments of ``func`` that returns an iterator of :class:`RowBlock`; with ``callback`` it
        returns None. The last block of an output may be smaller. Blocks are not part of autograd's graph, and inside of a
        reverse transform (``grad``, ``vjp``, ``jacrev``) they are computed of constants only.

        ``func`` runs when the first block is asked for, and later blocks read the values of that run. Between two blocks
        nothing may be written into a tensor that it reads (an argument, a parameter, what it closes over): the next block is
        refused then. Writes that autograd does not notice either, through ``.data`` or NumPy, are not noticed here.

    Raises:
        TypeError: if ``rows`` is no int.
        ValueError: if ``rows`` or ``max_memory`` is not positive, or both are given.
        MemoryError: if ``max_memory`` is too little for a single row.
        RuntimeError: if arguments or outputs cannot be differentiated; when the next block is asked for after a tensor that
            ``func`` reads was written to; if a reverse transform around it differentiates with respect to what they depend on.

    Example:
        >>> import torch, chainrule
        >>> x = torch.arange(1.0, 5.0)
        >>> gram = torch.zeros(4, 4)
        >>> for block in chainrule.jacobian_blocks(torch.square, rows=2)(x):
        ...     gram += block.jacobian.T @ block.jacobian
        >>> gram.diagonal()
        tensor([ 4., 16., 36., 64.])

    """
    name = "jacobian_blocks"
    check_whole(rows, name, "rows")
    if rows is not None and rows <= 0:
        raise ValueError(f"{name}: rows should be greater than 0, got {rows}")
    if rows is not None and max_memory is not None:
        raise ValueError(f"{name}: give rows or max_memory, not both")
    chunks = Chunks(None, _DEFAULT if max_memory is None else max_memory, progress, name)

    def iterate(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[RowBlock]:
        positions, single = resolve_argnums(argnums, len(args), name)
        graded = torch.is_grad_enabled()
        with torch.no_grad(), frugal():
            traced = trace(func, args, positions, kwargs, name)
            if graded:
                _check_constant(traced, func, name)
            check_real(traced, func, name, "input")
            assert chunks.budget is not None
            sizes = [
                rows
                if rows is not None
                else leaf.numel()
                if slot is None
                else rows_within(traced, number, "auto", "input", chunks.budget, name, whole=False)
                for number, (leaf, slot) in enumerate(zip(traced.out_leaves, traced.out_slots, strict=True))
            ]

        versions = _versions(traced)

        def made(count: int, parts: dict[int, torch.Tensor]) -> Any:
            leaves = [
                part if (part := parts.get(slot)) is not None else leaf.new_zeros((count, *leaf.shape))
                for slot, leaf in zip(traced.in_slots, traced.in_leaves, strict=True)
            ]
            tree = tree_unflatten(leaves, traced.in_spec)
            return tree[0] if single else tree

        totals = [leaf.numel() for leaf in traced.out_leaves]
        with chunks.shown(sum(-(-total // max(size, 1)) for total, size in zip(totals, sizes, strict=True))) as advance:
            for number, (total, size) in enumerate(zip(totals, sizes, strict=True)):
                size = max(1, min(size, total))
                if total == 0:
                    continue
                if traced.out_slots[number] is None:
                    for start in range(0, total, size):
                        stop = min(start + size, total)
                        yield RowBlock(number, slice(start, stop), made(stop - start, {}))
                        advance()
                    continue
                with torch.no_grad():
                    block = traced.rows(number, size)
                    pieces = row_blocks(traced, number, block, "auto", "input")
                while True:
                    _check_versions(versions, func, name)
                    # The caller's code between two blocks runs under his own settings.
                    with torch.no_grad():
                        found = next(pieces, None)
                    if found is None:
                        break
                    start, parts = found
                    stop = min(start + size, total)
                    yield RowBlock(number, slice(start, stop), made(stop - start, parts))
                    advance()

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        blocks = iterate(args, kwargs)
        if callback is None:
            return blocks
        for block in blocks:
            callback(block)
        return None

    return entry_point(wrapper, func)
