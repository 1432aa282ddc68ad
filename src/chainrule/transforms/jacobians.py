"""Jacobians and Hessians as dense tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.utils._pytree import tree_map

from chainrule.dispatch import hide_from_dynamo
from chainrule.transforms.arguments import PLAIN_ARGUMENT, Argnums, function_name, resolve_argnums, tree_flatten, tree_unflatten
from chainrule.transforms.nest import NO_NEST, Level, level_of, run_nest
from chainrule.transforms.trace import Traced, trace


def jacrev(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
    _preallocate_and_copy: bool = False,
) -> Callable[..., Any]:
    """Return a function that computes the Jacobian of ``func``, accumulated in reverse order.

    Args:
        func: a function of tensors that returns tensors (any pytree), or ``(output, aux)`` with ``has_aux``.
        argnums: the positional arguments to differentiate with respect to; an int, or a tuple or list of ints.
        has_aux: whether ``func`` returns a pair whose second entry is passed through.
        chunk_size: how many rows (elements of an output) to compute at once, which bounds the memory of intermediate
            results; None for all. One plan serves all chunks.

    Returns:
        A function returning, for each output leaf, the tree of Jacobians with respect to the arguments (a tuple when
        ``argnums`` is one), each of shape ``(*output.shape, *input.shape)`` and of the input's dtype; or
        ``(jacobian, aux)``.

    Raises:
        RuntimeError: if arguments or outputs cannot be differentiated.
        ValueError: if ``chunk_size`` is not positive.

    Example:
        >>> import torch, chainrule
        >>> chainrule.jacrev(lambda x: x * x)(torch.tensor([1.0, 2.0]))
        tensor([[2., 0.],
                [0., 4.]])
    """
    return _jacobian_transform(func, argnums, has_aux, chunk_size, "jacrev", "reverse", "input")


def jacfwd(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    randomness: str = "error",
    chunk_size: int | None = None,
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

    Returns:
        As :func:`jacrev`, with Jacobians of the output's dtype.

    Raises:
        RuntimeError: if arguments or outputs cannot be differentiated, or ``randomness`` is unknown.
        ValueError: if ``chunk_size`` is not positive.

    Example:
        >>> import torch, chainrule
        >>> chainrule.jacfwd(lambda x: x * x)(torch.tensor([1.0, 2.0]))
        tensor([[2., 0.],
                [0., 4.]])
    """
    if randomness not in ("error", "different", "same"):
        raise RuntimeError(f"jacfwd: only allowed values for randomness are 'error', 'different', or 'same'. Got {randomness}")
    return _jacobian_transform(func, argnums, has_aux, chunk_size, "jacfwd", "forward", "output")


def jacobian(
    func: Callable[..., Any], argnums: Argnums = 0, *, has_aux: bool = False, chunk_size: int | None = None
) -> Callable[..., Any]:
    """Return a function that computes the Jacobian of ``func`` in the order that costs least.

    Forward, reverse, greedy vertex elimination and an optimised contraction of the whole network of local Jacobians
    are compared by predicted cost; :func:`chainrule.explain` shows the comparison.

    Args:
        func: a function of tensors that returns tensors (any pytree), or ``(output, aux)`` with ``has_aux``.
        argnums: the positional arguments to differentiate with respect to; an int, or a tuple or list of ints.
        has_aux: whether ``func`` returns a pair whose second entry is passed through.
        chunk_size: as in :func:`jacrev`.

    Returns:
        As :func:`jacrev`.

    Raises:
        RuntimeError: if arguments or outputs cannot be differentiated.
        ValueError: if ``chunk_size`` is not positive.

    Example:
        >>> import torch, chainrule
        >>> chainrule.jacobian(lambda x: x[:1] * 3)(torch.tensor([1.0, 2.0]))
        tensor([[3., 0.]])
    """
    return _jacobian_transform(func, argnums, has_aux, chunk_size, "jacobian", "auto", "input")


def hessian(
    func: Callable[..., Any], argnums: Argnums = 0, *, has_aux: bool = False, chunk_size: int | None = None
) -> Callable[..., Any]:
    """Return a function that computes the Hessian of ``func``: the Jacobian of its Jacobian.

    Args:
        func: a function of tensors that returns tensors (any pytree), or ``(output, aux)`` with ``has_aux``.
        argnums: the positional arguments to differentiate with respect to; an int, or a tuple or list of ints.
        has_aux: whether ``func`` returns a pair whose second entry is passed through.
        chunk_size: how many rows of the outer Jacobian (elements of the first derivative) to compute at once; None for
            all. The first derivative itself is computed whole.

    Returns:
        A function returning, for each output leaf, the tree over the arguments of trees over the arguments of blocks of
        shape ``(*output.shape, *first input.shape, *second input.shape)``; or ``(hessian, aux)``.

    Raises:
        RuntimeError: if arguments or outputs cannot be differentiated.
        ValueError: if ``chunk_size`` is not positive.

    Example:
        >>> import torch, chainrule
        >>> chainrule.hessian(lambda x: (x ** 3).sum())(torch.tensor([1.0, 2.0]))
        tensor([[ 6.,  0.],
                [ 0., 12.]])
    """
    _check_chunk_size(chunk_size, "hessian")
    inner = _jacobian_transform(func, argnums, has_aux, None, "hessian", "reverse", "input")
    return _jacobian_transform(inner, argnums, has_aux, chunk_size, "hessian", "auto", "output", respect_no_grad=False)


def _jacobian_transform(
    func: Callable[..., Any],
    argnums: Argnums,
    has_aux: bool,
    chunk_size: int | None,
    name: str,
    order: str,
    cast: str,
    *,
    respect_no_grad: bool = True,
) -> Callable[..., Any]:
    _check_chunk_size(chunk_size, name)
    column_block = chunk_size if order == "forward" else None
    respect_no_grad = respect_no_grad and order != "forward"

    def finish(traced: Traced, single: bool) -> Any:
        _check_real(traced, func, name, cast)
        found: dict[Any, torch.Tensor | None] = {}
        if any(slot is not None for slot in traced.out_slots):
            found = traced.run("jacobian", order, cast=cast)
        return tree_unflatten(_blocks(traced, found, cast, single), traced.out_spec)

    level = Level(func, name, argnums, has_aux, finish, ("jacobian", order, cast))
    forward = order == "forward" or name == "hessian"

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result, aux = computed(args, kwargs)
        if forward and torch.is_grad_enabled() and torch._C._len_torch_dispatch_stack() == 0:
            result = _joined(result, args, argnums)
        return (result, aux) if has_aux else result

    def computed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if chunk_size is None and level_of(func) is not None:
            result, aux = run_nest(level, args, kwargs)
            if result is not NO_NEST:
                return result, aux
        positions, single = resolve_argnums(argnums, len(args), name)
        traced = trace(
            func, args, positions, kwargs, name, has_aux=has_aux, respect_no_grad=respect_no_grad, column_block=column_block
        )
        if chunk_size is None:
            return finish(traced, single), traced.aux
        _check_real(traced, func, name, cast)
        found: dict[Any, torch.Tensor | None] = {}
        if any(slot is not None for slot in traced.out_slots):
            if order == "forward":
                found = _by_columns(traced, cast)
            else:
                found = _by_rows(traced, order, cast, chunk_size)
        return tree_unflatten(_blocks(traced, found, cast, single), traced.out_spec), traced.aux

    wrapper = wraps(func)(wrapper)
    if chunk_size is None:
        level.mark(wrapper)
    return hide_from_dynamo(wrapper)


class _Constant(torch.autograd.Function):
    """A value that is constant in tensors that require grad, as part of their graph: the gradients are zeros."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*inputs)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return (None, *(torch.zeros_like(leaf) for leaf in ctx.saved_tensors))


def _joined(result: Any, args: tuple[Any, ...], argnums: Argnums) -> Any:
    """As with torch's forward mode, a result that does not depend on its inputs is part of their graph nevertheless."""
    numbers = (argnums,) if isinstance(argnums, int) else argnums
    leaves: list[torch.Tensor] = []
    for number in numbers:
        item = args[number]
        found = (item,) if isinstance(item, torch.Tensor) else tree_flatten(item)[0]
        leaves.extend(leaf for leaf in found if leaf.requires_grad)
    if not leaves:
        return result
    return tree_map(lambda r: r if r.requires_grad else _Constant.apply(r, *leaves), result)


def _check_chunk_size(chunk_size: int | None, name: str) -> None:
    if chunk_size is not None and chunk_size <= 0:
        raise ValueError(f"{name}: `chunk_size` should be greater than 0, got {chunk_size}.")


def _by_rows(traced: Traced, order: str, cast: str, size: int) -> dict[Any, torch.Tensor | None]:
    """The Jacobians, ``size`` elements of an output at a time."""
    numbers = {slot: number for number, slot in enumerate(traced.out_slots) if slot is not None}
    split = {slot: traced.rows(n, size) for slot, n in numbers.items() if traced.out_leaves[n].numel() > size}
    whole = [slot for slot in numbers if slot not in split]
    found = traced.run("jacobian", order, cast=cast, outputs=whole) if whole else {}
    for slot, block in split.items():
        parts: dict[int, list[torch.Tensor]] = {}
        for skipped in block.positions():
            results = traced.run("jacobian", order, cast=cast, outputs=[block.slot])
            for source in traced.in_slots:
                if (part := results.get((block.slot, source))) is not None:
                    parts.setdefault(source, []).append(part[skipped:])
        shape = traced.out_leaves[numbers[slot]].shape
        for source, rows in parts.items():
            found[slot, source] = torch.cat(rows).reshape(*shape, *rows[0].shape[1:])
    return found


def _by_columns(traced: Traced, cast: str) -> dict[Any, torch.Tensor | None]:
    """The Jacobians, a block of the elements of an input at a time."""
    outputs = [slot for slot in dict.fromkeys(traced.out_slots) if slot is not None]
    blocks = zip(traced.in_slots, traced.columns, strict=True)
    whole = [slot for slot, block in blocks if block is None]
    found = traced.run("jacobian", "forward", cast=cast, inputs=whole) if whole else {}
    for leaf, block in zip(traced.in_leaves, traced.columns, strict=True):
        if block is None:
            continue
        parts: dict[int, list[torch.Tensor]] = {}
        for skipped in block.positions():
            results = traced.run("jacobian", "forward", cast=cast, inputs=[block.slot])
            for slot in outputs:
                if (part := results.get((slot, block.slot))) is not None:
                    parts.setdefault(slot, []).append(part[..., skipped:])
        for slot, columns in parts.items():
            found[slot, block.slot] = torch.cat(columns, -1).reshape(*columns[0].shape[:-1], *leaf.shape)
    return found


def _check_real(traced: Traced, func: Callable[..., Any], name: str, cast: str) -> None:
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
