"""Jacobians and Hessians as dense tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from chainrule.dispatch import entry_point
from chainrule.execute.memory import free_memory, parse_bytes
from chainrule.execute.planning import frugal
from chainrule.shortcuts import FLOATING
from chainrule.transforms.arguments import (
    PLAIN_ARGUMENT,
    Argnums,
    check_whole,
    function_name,
    resolve_argnums,
    tree_unflatten,
)
from chainrule.transforms.assembling import Assembled
from chainrule.transforms.budget import result_bytes, rows_within
from chainrule.transforms.graphs import with_graph
from chainrule.transforms.hessian_map import hessian_transform
from chainrule.transforms.jacobian_map import operator_transform
from chainrule.transforms.levels import Level, mark_of
from chainrule.transforms.nest import NO_NEST, run_nest
from chainrule.transforms.routes import jacobian_route, run_route
from chainrule.transforms.sparse import SPARSE, sparse_hessian, sparse_jacobian
from chainrule.transforms.trace import Block, Traced, trace


def jacrev(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
    _preallocate_and_copy: bool = False,
    max_memory: int | str | None = None,
    progress: bool = False,
    layout: str = "dense",
) -> Callable[..., Any]:
    """Return a function that computes the Jacobian of ``func``, accumulated in reverse order.

    Args:
        func: a function of tensors that returns tensors (any pytree), or ``(output, aux)`` with ``has_aux``.
        argnums: the positional arguments to differentiate with respect to; an int, or a tuple or list of ints.
        has_aux: whether ``func`` returns a pair whose second entry is passed through.
        chunk_size: how many rows (elements of an output) to compute at once, which bounds the memory of intermediate
            results; None for all. One plan serves all chunks.
        max_memory: in place of ``chunk_size``, how much may be allocated beside the result: bytes, or a string like
            ``"512MB"``; under ``vmap`` by all samples together. The rows of a chunk are chosen by what the plans are predicted to
            need. The first call makes the plans, and keeps masks and indices for them beside that. A function with an op that is
            known only by running it is tried with blocks of growing size in that call. By default a result of more than a
            quarter of a gigabyte is computed in chunks where the free memory of the device asks for it.
        progress: whether to show the progress over the chunks (needs tqdm).
        layout: ``"dense"`` for tensors; ``"sparse_coo"`` or ``"sparse_csr"`` for sparse tensors (see ``docs/sparse.md``): their
            pattern is read off the structure of ``func``, planned once per signature and value of its index tensors, and may
            hold explicit zeros; ``"operator"`` for a :class:`~chainrule.LinearMap` that forms no matrix (see
            :func:`chainrule.linear_map`). Sparse tensors and operators take no chunks.

    Returns:
        A function returning, for each output leaf, the tree of Jacobians with respect to the arguments (a tuple when
        ``argnums`` is one), each of shape ``(*output.shape, *input.shape)`` and of the input's dtype; or
        ``(jacobian, aux)``.

    Raises:
        RuntimeError: if arguments or outputs cannot be differentiated.
        TypeError: if ``chunk_size`` is no int.
        ValueError: if ``chunk_size`` or ``max_memory`` is not positive, both are given, or either with a sparse layout; if the
            layout is unknown.
        MemoryError: if ``max_memory`` is too little for a single row.

    Example:
        >>> import torch, chainrule
        >>> chainrule.jacrev(lambda x: x * x)(torch.tensor([1.0, 2.0]))
        tensor([[2., 0.],
                [0., 4.]])
    """
    chunks = Chunks(chunk_size, max_memory, progress, "jacrev")
    if chunks.layout(layout) == "operator":
        return operator_transform(func, argnums, has_aux, "jacrev")
    if layout in SPARSE:
        check = partial(check_real, func=func, name="jacrev", cast="input")
        return sparse_jacobian(func, argnums, has_aux, layout, "jacrev", "reverse", "input", check)
    return _jacobian_transform(func, argnums, has_aux, chunks, "jacrev", "reverse", "input")


def jacfwd(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    randomness: str = "error",
    chunk_size: int | None = None,
    progress: bool = False,
    layout: str = "dense",
) -> Callable[..., Any]:
    """Return a function that computes the Jacobian of ``func``, accumulated in forward order.

    Args:
        func: a function of tensors that returns tensors (any pytree), or ``(output, aux)`` with ``has_aux``.
        argnums: the positional arguments to differentiate with respect to; an int, or a tuple or list of ints.
        has_aux: whether ``func`` returns a pair whose second entry is passed through.
        randomness: accepted for the sake of torch.func's signature. ``func`` runs once here, whatever the number of
            columns, so that a random op in it is the same for all of them.
        chunk_size: how many columns (elements of an input) to compute at once, which bounds the memory of intermediate
            results; None for all. ``func`` still runs once, but on a copy: a write to its argument stays inside.
        progress: as in :func:`jacrev`.
        layout: as in :func:`jacrev`.

    Returns:
        As :func:`jacrev`, with Jacobians of the output's dtype.

    Raises:
        RuntimeError: if arguments or outputs cannot be differentiated, or ``randomness`` is unknown.
        TypeError: if ``chunk_size`` is no int.
        ValueError: if ``chunk_size`` or ``max_memory`` is not positive, both are given, or either with a sparse layout; if the
            layout is unknown.
        MemoryError: if ``max_memory`` is too little for a single row.

    Example:
        >>> import torch, chainrule
        >>> chainrule.jacfwd(lambda x: x * x)(torch.tensor([1.0, 2.0]))
        tensor([[2., 0.],
                [0., 4.]])
    """
    if randomness not in ("error", "different", "same"):
        raise RuntimeError(f"jacfwd: only allowed values for randomness are 'error', 'different', or 'same'. Got {randomness}")
    chunks = Chunks(chunk_size, None, progress, "jacfwd")
    if chunks.layout(layout) == "operator":
        return operator_transform(func, argnums, has_aux, "jacfwd", respect_no_grad=False)
    if layout in SPARSE:
        check = partial(check_real, func=func, name="jacfwd", cast="output")
        return sparse_jacobian(func, argnums, has_aux, layout, "jacfwd", "forward", "output", check)
    return _jacobian_transform(func, argnums, has_aux, chunks, "jacfwd", "forward", "output")


def jacobian(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
    max_memory: int | str | None = None,
    progress: bool = False,
    layout: str = "dense",
) -> Callable[..., Any]:
    """Return a function that computes the Jacobian of ``func`` in the order that costs least.

    Forward, reverse, greedy vertex elimination and an optimised contraction of the whole network of local Jacobians
    are compared by predicted cost; :func:`chainrule.explain` shows the comparison.

    Args:
        func: a function of tensors that returns tensors (any pytree), or ``(output, aux)`` with ``has_aux``.
        argnums: the positional arguments to differentiate with respect to; an int, or a tuple or list of ints.
        has_aux: whether ``func`` returns a pair whose second entry is passed through.
        chunk_size: as in :func:`jacrev`.
        max_memory: as in :func:`jacrev`.
        progress: as in :func:`jacrev`.
        layout: as in :func:`jacrev`.

    Returns:
        As :func:`jacrev`.

    Raises:
        RuntimeError: if arguments or outputs cannot be differentiated.
        TypeError: if ``chunk_size`` is no int.
        ValueError: if ``chunk_size`` or ``max_memory`` is not positive, both are given, or either with a sparse layout; if the
            layout is unknown.
        MemoryError: if ``max_memory`` is too little for a single row.

    Example:
        >>> import torch, chainrule
        >>> chainrule.jacobian(lambda x: x[:1] * 3)(torch.tensor([1.0, 2.0]))
        tensor([[3., 0.]])
    """
    chunks = Chunks(chunk_size, max_memory, progress, "jacobian")
    if chunks.layout(layout) == "operator":
        return operator_transform(func, argnums, has_aux, "jacobian")
    if layout in SPARSE:
        check = partial(check_real, func=func, name="jacobian", cast="input")
        return sparse_jacobian(func, argnums, has_aux, layout, "jacobian", "auto", "input", check)
    return _jacobian_transform(func, argnums, has_aux, chunks, "jacobian", "auto", "input")


def hessian(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
    max_memory: int | str | None = None,
    progress: bool = False,
    layout: str = "dense",
    triangular: str | None = None,
) -> Callable[..., Any]:
    """Return a function that computes the Hessian of ``func``: the Jacobian of its Jacobian.

    Args:
        func: a function of tensors that returns tensors (any pytree), or ``(output, aux)`` with ``has_aux``.
        argnums: the positional arguments to differentiate with respect to; an int, or a tuple or list of ints.
        has_aux: whether ``func`` returns a pair whose second entry is passed through.
        chunk_size: how many rows of the outer Jacobian (elements of the first derivative) to compute at once; None for
            all. The first derivative itself is computed whole.
        max_memory: as in :func:`jacrev`.
        progress: as in :func:`jacrev`.
        layout: as in :func:`jacrev`; an operator is symmetric, and ``func`` has to return a scalar for it.
        triangular: for a sparse layout, ``"lower"`` or ``"upper"`` for that triangle alone (of the matrix of all blocks, diagonal
            included).

    Returns:
        A function returning, for each output leaf, the tree over the arguments of trees over the arguments of blocks of
        shape ``(*output.shape, *first input.shape, *second input.shape)``; or ``(hessian, aux)``.

    Raises:
        RuntimeError: if arguments or outputs cannot be differentiated.
        TypeError: if ``chunk_size`` is no int.
        ValueError: if ``chunk_size`` or ``max_memory`` is not positive, both are given, or either with a sparse layout; if the
            layout is unknown.
        MemoryError: if ``max_memory`` is too little for a single row.

    Example:
        >>> import torch, chainrule
        >>> chainrule.hessian(lambda x: (x ** 3).sum())(torch.tensor([1.0, 2.0]))
        tensor([[ 6.,  0.],
                [ 0., 12.]])
    """
    chunks = Chunks(chunk_size, max_memory, progress, "hessian")
    if triangular not in (None, "lower", "upper"):
        raise ValueError(f"hessian: triangular should be 'lower', 'upper' or None, got {triangular!r}")
    if triangular is not None and layout not in SPARSE:
        raise ValueError(f"hessian: triangular is for the sparse layouts, not {layout!r}")
    if chunks.layout(layout) == "operator":
        return hessian_transform(func, argnums, has_aux)
    if layout in SPARSE:
        check = partial(check_real, func=func, name="hessian", cast="input")
        return sparse_hessian(func, argnums, has_aux, layout, triangular, check)
    inner = _jacobian_transform(func, argnums, has_aux, Chunks(None, None, False, "hessian"), "hessian", "reverse", "input")
    return _jacobian_transform(inner, argnums, has_aux, chunks, "hessian", "auto", "output", respect_no_grad=False)


class Chunks:
    """How a Jacobian is divided.

    Args:
        size: rows (or columns) per chunk.
        max_memory: in its place, how much may be allocated.
        progress: whether to show the progress.
        name: the transform's name.

    Raises:
        TypeError: if the size is no int.
        ValueError: if the numbers do not fit.
    """

    def __init__(self, size: int | None, max_memory: int | str | None, progress: bool, name: str) -> None:
        check_whole(size, name, "chunk_size")
        if size is not None and size <= 0:
            raise ValueError(f"{name}: `chunk_size` should be greater than 0, got {size}.")
        if size is not None and max_memory is not None:
            raise ValueError(f"{name}: give chunk_size or max_memory, not both")
        self.size = size
        self.budget = None if max_memory is None else parse_bytes(max_memory, name)
        self.progress = progress
        self.name = name
        self.given = size is not None or max_memory is not None

    def layout(self, layout: str) -> str:
        """The layout of the result, checked.

        Raises:
            ValueError: if there is no such layout, or it has no chunks and some are asked for.
        """
        known = ("dense", *SPARSE, "operator")
        if layout not in known:
            raise ValueError(f"{self.name}: layout should be one of {', '.join(map(repr, known))}, got {layout!r}")
        if layout != "dense" and (self.given or self.progress):
            raise ValueError(f"{self.name}: chunk_size, max_memory and progress are for layout='dense', not {layout!r}")
        return layout

    @contextmanager
    def shown(self, total: int) -> Iterator[Callable[[], Any]]:
        """A progress bar over so many chunks, if it was asked for; yields what moves it on."""
        if not self.progress or total == 0:
            with nullcontext():
                yield lambda: None
            return
        try:
            from tqdm.auto import tqdm  # noqa: PLC0415 - optional
        except ImportError as error:
            raise ImportError(f"{self.name}: progress=True needs tqdm; install chainrule[progress]") from error
        with tqdm(total=total, desc=self.name) as bar:
            yield lambda: bar.update(1)

    def sizes(self, traced: Traced, order: str, cast: str) -> list[int] | None:
        """The rows per chunk for each output; None if all are computed at once."""
        if self.size is not None:
            return [self.size] * len(traced.out_leaves)
        budget = self.budget
        if budget is None:
            wanted = 0
            for number in range(len(traced.out_leaves)):
                wanted += result_bytes(traced, number, cast)
            if wanted < _LARGE or torch._C._len_torch_dispatch_stack():
                return None
            free = free_memory(traced.out_leaves[0].device)
            if free is None:
                return None
            if wanted > free:
                raise MemoryError(
                    f"{self.name}: the result needs {wanted} bytes, and {free} are free. Use chainrule.jacobian_blocks to "
                    "compute it in blocks that are written to disk or reduced, or an operator (vjp, jvp) in its place."
                )
            budget = free - wanted
        return [
            leaf.numel() if slot is None else rows_within(traced, n, order, cast, budget, self.name, whole=True)
            for n, (leaf, slot) in enumerate(zip(traced.out_leaves, traced.out_slots, strict=True))
        ]


#: From this size on, in bytes, a result is compared with the free memory.
_LARGE = 1 << 28

#: The most bytes of a real number.
_WIDEST = 8


def _jacobian_transform(
    func: Callable[..., Any],
    argnums: Argnums,
    has_aux: bool,
    chunks: Chunks,
    name: str,
    order: str,
    cast: str,
    *,
    respect_no_grad: bool = True,
) -> Callable[..., Any]:
    column_block = chunks.size if order == "forward" else None
    respect_no_grad = respect_no_grad and order != "forward"

    def finish(traced: Traced, single: bool) -> Any:
        check_real(traced, func, name, cast)
        found: dict[Any, torch.Tensor | None] = {}
        if any(slot is not None for slot in traced.out_slots):
            found = traced.run("jacobian", order, cast=cast, last=traced.alone)
        return tree_unflatten(_blocks(traced, found, cast, single), traced.out_spec)

    level = Level(func, name, argnums, has_aux, finish, ("jacobian", order, cast), respect_no_grad=respect_no_grad)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if chunks.budget is None:
            result, aux = computed(args, kwargs)
        else:
            with frugal():
                result, aux = computed(args, kwargs)
        result = with_graph(result, args, argnums)
        return (result, aux) if has_aux else result

    plain = mark_of(func) is None

    def computed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if not chunks.given and not plain:
            result, aux = run_nest(level, args, kwargs)
            if result is not NO_NEST:
                return result, aux
        traced: Any = NotImplemented
        if plain and not chunks.given and not has_aux:
            if (route := level.route) is None:
                made = jacobian_route(func, name, argnums, order, cast, respect_no_grad=respect_no_grad)
                route = level.route = made or False
            if route:
                traced, result, _ = run_route(route, args, kwargs)
                if traced is None:
                    return result, None
        positions, single = resolve_argnums(argnums, len(args), name)
        if traced is NotImplemented:
            traced = trace(
                func, args, positions, kwargs, name, has_aux=has_aux, respect_no_grad=respect_no_grad, column_block=column_block
            )
        if single and not chunks.given and (block := _known(traced, order, cast)) is not None:
            return tree_unflatten([block], traced.out_spec), traced.aux
        sizes = [1] if column_block is not None else chunks.sizes(traced, order, cast)
        if sizes is None:
            traced.alone = True
            return finish(traced, single), traced.aux
        check_real(traced, func, name, cast)
        found: dict[Any, torch.Tensor | None] = {}
        if any(slot is not None for slot in traced.out_slots):
            if column_block is not None:
                found = _by_columns(traced, cast, chunks.shown)
            else:
                found = _by_rows(traced, order, cast, sizes, chunks.shown)
        return tree_unflatten(_blocks(traced, found, cast, single), traced.out_spec), traced.aux

    wrapper = entry_point(wrapper, func)
    if not chunks.given:
        level.mark(wrapper)
    return wrapper


def _known(traced: Traced, order: str, cast: str) -> torch.Tensor | None:
    """The Jacobian of one real output with respect to one argument, of a size that needs no chunks, by a plan that is known."""
    out, leaf = traced.out_leaves[0], traced.in_leaves[0]
    if out.dtype not in FLOATING or leaf.dtype not in FLOATING or out.numel() * leaf.numel() * _WIDEST >= _LARGE:
        return None
    return traced.known_block(order, cast)


def row_blocks(
    traced: Traced, number: int, block: Block, order: str, cast: str
) -> Iterator[tuple[int, dict[int, torch.Tensor]]]:
    """The rows of the Jacobians of one output, a block of them at a time: where each starts, and its parts by input slot."""
    for start, skipped in block.positions():
        results = traced.run("jacobian", order, cast=cast, outputs=[block.slot])
        rows = {source: part[skipped:] for (_, source), part in results.items() if part is not None}
        del results  # nothing of this block is held here while the next one is computed
        yield start, rows
        del rows


def _by_rows(
    traced: Traced, order: str, cast: str, sizes: Sequence[int], shown: Callable[..., Any]
) -> dict[Any, torch.Tensor | None]:
    """The Jacobians, ``sizes`` elements of each output at a time."""
    numbers = {slot: number for number, slot in enumerate(traced.out_slots) if slot is not None}
    split = {slot: traced.rows(n, sizes[n]) for slot, n in numbers.items() if traced.out_leaves[n].numel() > sizes[n]}
    whole = [slot for slot in numbers if slot not in split]
    found = traced.run("jacobian", order, cast=cast, outputs=whole) if whole else {}
    with shown(sum(-(-block.total // block.size) for block in split.values())) as advance:
        for slot, block in split.items():
            parts: dict[int, Assembled] = {}
            for start, rows in row_blocks(traced, numbers[slot], block, order, cast):
                while rows:
                    source, part = rows.popitem()
                    parts.setdefault(source, Assembled(block.total)).add(start, part)
                    del part
                advance()
            for source, assembled in parts.items():
                rows_of = assembled.result()
                found[slot, source] = rows_of.reshape(*traced.out_leaves[numbers[slot]].shape, *rows_of.shape[1:])
    return found


def _by_columns(traced: Traced, cast: str, shown: Callable[..., Any]) -> dict[Any, torch.Tensor | None]:
    """The Jacobians, a block of the elements of an input at a time."""
    outputs = [slot for slot in dict.fromkeys(traced.out_slots) if slot is not None]
    pairs = list(zip(traced.in_slots, traced.columns, strict=True))
    whole = [slot for slot, block in pairs if block is None]
    found = traced.run("jacobian", "forward", cast=cast, inputs=whole) if whole else {}
    with shown(sum(-(-block.total // block.size) for _, block in pairs if block is not None)) as advance:
        for leaf, block in zip(traced.in_leaves, traced.columns, strict=True):
            if block is None:
                continue
            parts: dict[int, Assembled] = {}
            for start, skipped in block.positions():
                results = traced.run("jacobian", "forward", cast=cast, inputs=[block.slot])
                for slot in outputs:
                    if (part := results.pop((slot, block.slot), None)) is not None:
                        parts.setdefault(slot, Assembled(block.total, -1)).add(start, part[..., skipped:])
                    part = None
                advance()
            for slot, assembled in parts.items():
                columns = assembled.result()
                found[slot, block.slot] = columns.reshape(*columns.shape[:-1], *leaf.shape)
    return found


def check_real(traced: Traced, func: Callable[..., Any], name: str, cast: str) -> None:
    """Refuse complex arguments and outputs.

    Raises:
        RuntimeError: if there are some, or an output cannot have a derivative.
    """
    for number, leaf in enumerate(traced.in_leaves):
        if leaf.is_complex():
            raise RuntimeError(
                f"{name}: Expected all inputs to be real but received complex tensor at flattened input idx: {number}"
            )
    for number, leaf in enumerate(traced.out_leaves):
        if leaf.is_complex():
            raise RuntimeError(
                f"{name}: Expected all outputs to be real but received complex tensor at flattened output idx: {number}"
            )
        if cast == "input" and not leaf.dtype.is_floating_point:
            raise RuntimeError(f"{name}({function_name(func)}): all outputs must be floating-point Tensors, got {leaf.dtype}")


def _blocks(traced: Traced, found: dict[Any, torch.Tensor | None], cast: str, single: bool) -> list[Any]:
    """For each output leaf, its blocks in the structure of the arguments."""
    if single and len(traced.out_slots) == 1 and traced.in_spec is PLAIN_ARGUMENT:
        (slot,), (source,) = traced.out_slots, traced.in_slots
        if (block := found.get((slot, source))) is not None:
            return [block]
    blocks = []
    given: set[Any] = set()
    for slot, out in zip(traced.out_slots, traced.out_leaves, strict=True):
        row = []
        for source, leaf in zip(traced.in_slots, traced.in_leaves, strict=True):
            block = found.get((slot, source))
            if block is None:
                dtype = out.dtype if cast == "output" else leaf.dtype
                block = leaf.new_zeros((*out.shape, *leaf.shape), dtype=dtype)
            elif (slot, source) in given:
                block = block.clone()
            given.add((slot, source))
            row.append(block)
        tree = tree_unflatten(row, traced.in_spec)
        blocks.append(tree[0] if single else tree)
    return blocks
