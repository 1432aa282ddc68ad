"""Contractions of second derivatives, and traces of first ones, that never form the Hessian or the Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from chainrule.capture.tape import Tape
from chainrule.execute.accounts import UNCACHED, account_of, current_ledger
from chainrule.execute.engine import execute
from chainrule.execute.replay import Source
from chainrule.plan.planner import Request
from chainrule.plan.second_order import Contracted, second_order
from chainrule.transforms.arguments import Argnums, tree_flatten, tree_unflatten
from chainrule.transforms.by_entries import hessian_by_entries, hessian_prefers_entries
from chainrule.transforms.contractions import Run, contraction
from chainrule.transforms.jacobians import hessian
from chainrule.transforms.levels import Finish, Level
from chainrule.transforms.nest import run_planned
from chainrule.transforms.trace import Traced, recording_on


def laplacian(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    return_value: bool = False,
    in_dims: Any = None,
) -> Callable[..., Any]:
    """Return a function that computes the Laplacian of ``func``: the trace of its Hessian.

    The Hessian is not formed: each op's own curvature is contracted with the forward derivatives of its arguments, which
    costs what the forward Laplacian costs.

    Args:
        func: a function of real floating-point tensors that returns tensors (any pytree), or ``(output, aux)`` with
            ``has_aux``.
        argnums: the positional arguments; the sum runs over all elements of all of them.
        has_aux: whether ``func`` returns a pair whose second entry is passed through.
        return_value: whether the output of ``func`` is returned as well.
        in_dims: the Laplacian per sample, as ``vmap(laplacian(func), in_dims)`` computes it: for each argument the dimension
            to map over, an int or a tuple of ints and None. By default nothing is mapped.

    Returns:
        A function returning a tree like the output's, each leaf of the shape and dtype of its output; ``(laplacian, aux)``
        with ``has_aux``, ``(laplacian, value)`` with ``return_value``, ``(laplacian, (value, aux))`` with both. With
        ``in_dims`` the samples stand in the first dimension of every tensor.

    Raises:
        RuntimeError: if arguments or outputs cannot be differentiated, or are complex.
        ValueError: if ``in_dims`` does not fit the arguments.

    Example:
        >>> import torch, chainrule
        >>> chainrule.laplacian(lambda x: (x ** 3).sum())(torch.tensor([1.0, 2.0]))
        tensor(18.)
        >>> chainrule.laplacian(lambda x: (x ** 3).sum(), in_dims=0)(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        tensor([18.,  6.])

    Source: Li et al., *A computational framework for neural network-based variational Monte Carlo with forward Laplacian*,
    Nature Machine Intelligence 6 (2024).
    """

    def finish(traced: Traced, single: bool) -> Any:
        leaves = []
        for leaf, parts in zip(traced.out_leaves, _contracted(traced, func, "laplacian", diagonal=False), strict=True):
            total = None
            for part in parts:
                if part is not None:
                    total = part if total is None else torch.add(total, part)
            leaves.append(torch.zeros_like(leaf) if total is None else total.to(leaf.dtype))
        return tree_unflatten(leaves, traced.out_spec)

    def add_up(blocks: list[torch.Tensor], leaf: torch.Tensor) -> torch.Tensor:
        return torch.stack([block.flatten(leaf.dim()).sum(-1) for block in blocks]).sum(0)

    checked, run = _seen_whole(finish, add_up, return_value)
    return contraction(
        func, "laplacian", argnums, checked, run, has_aux=has_aux, return_value=return_value, in_dims=in_dims,
        apart=partial(hessian_prefers_entries, diagonal=False),
    )  # fmt: skip


def hessian_diagonal(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    return_value: bool = False,
    in_dims: Any = None,
) -> Callable[..., Any]:
    """Return a function that computes the diagonal of the Hessian of ``func``.

    The Hessian is not formed, see :func:`laplacian`.

    Args:
        func: a function of real floating-point tensors that returns tensors (any pytree), or ``(output, aux)`` with
            ``has_aux``.
        argnums: the positional arguments to differentiate with respect to; an int, or a tuple or list of ints.
        has_aux: whether ``func`` returns a pair whose second entry is passed through.
        return_value: as in :func:`laplacian`.
        in_dims: the diagonal per sample, as in :func:`laplacian`.

    Returns:
        A function returning, for each output leaf, the tree of diagonals with respect to the arguments (a tuple when
        ``argnums`` is one), each of shape ``(*output.shape, *input.shape)``; with value and aux as in :func:`laplacian`.

    Raises:
        RuntimeError: if arguments or outputs cannot be differentiated, or are complex.
        ValueError: if ``in_dims`` does not fit the arguments.

    Example:
        >>> import torch, chainrule
        >>> chainrule.hessian_diagonal(lambda x: (x ** 3).sum())(torch.tensor([1.0, 2.0]))
        tensor([ 6., 12.])
    """

    def finish(traced: Traced, single: bool) -> Any:
        leaves = []
        for leaf, parts in zip(traced.out_leaves, _contracted(traced, func, "hessian_diagonal", diagonal=True), strict=True):
            blocks = [
                source.new_zeros((*leaf.shape, *source.shape)) if part is None else part.to(source.dtype)
                for part, source in zip(parts, traced.in_leaves, strict=True)
            ]
            tree = tree_unflatten(blocks, traced.in_spec)
            leaves.append(tree[0] if single else tree)
        return tree_unflatten(leaves, traced.out_spec)

    def collect(blocks: list[torch.Tensor], leaf: torch.Tensor) -> Any:
        return blocks

    checked, run = _seen_whole(finish, collect, return_value)
    return contraction(
        func, "hessian_diagonal", argnums, checked, run, has_aux=has_aux, return_value=return_value, in_dims=in_dims,
        apart=partial(hessian_prefers_entries, diagonal=True),
    )  # fmt: skip


class _HiddenSteps(Exception):  # noqa: N818 - never leaves this module
    """Steps were run under ``torch.no_grad()``: a Hessian's two derivatives see them differently."""

    def __init__(self, traced: Traced, single: bool) -> None:
        self.traced = traced
        self.single = single


def _seen_whole(
    finish: Finish, combine: Callable[[list[torch.Tensor], torch.Tensor], Any], return_value: bool
) -> tuple[Finish, Run]:
    """What finishes and what runs a level, where steps under ``torch.no_grad()`` make a detour by the Hessian."""

    def checked(traced: Traced, single: bool) -> Any:
        if traced.tape.saw_blocked:
            raise _HiddenSteps(traced, single)
        return finish(traced, single)

    def run(level: Level, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        try:
            return run_planned(level, args, kwargs)
        except _HiddenSteps as hidden:
            result, aux = _from_blocks(level, hidden, combine, args, kwargs)
            return ((result, hidden.traced.output()) if return_value else result), aux

    return checked, run


def _from_blocks(
    level: Level, hidden: _HiddenSteps, combine: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """From the diagonal blocks of the Hessian."""
    assert level.argnums is not None
    found = hessian(level.func, level.argnums, has_aux=level.has_aux)(*args, **kwargs)
    whole, aux = found if level.has_aux else (found, None)
    traced = hidden.traced
    blocks, count = tree_flatten(whole)[0], len(traced.in_leaves)
    results = []
    for number, leaf in enumerate(traced.out_leaves):
        diagonals = []
        for place, inner in enumerate(traced.in_leaves):
            block = blocks[(number * count + place) * count + place]
            entries = block.reshape((*leaf.shape, inner.numel(), inner.numel())).diagonal(0, -2, -1)
            diagonals.append(entries.reshape((*leaf.shape, *inner.shape)).clone())
        made = combine(diagonals, leaf)
        if isinstance(made, list):
            tree = tree_unflatten(made, traced.in_spec)
            made = tree[0] if hidden.single else tree
        results.append(made)
    return tree_unflatten(results, traced.out_spec), aux


def _contracted(
    traced: Traced, func: Callable[..., Any], name: str, *, diagonal: bool
) -> list[list[torch.Tensor | None]]:
    """For each output, the trace (or diagonal) of its Hessian with respect to each input; None for zero."""
    check_real(traced, func, name)
    return [
        [None] * len(traced.in_slots) if slot is None else _contracted_output(traced, leaf, slot, diagonal)
        for leaf, slot in zip(traced.out_leaves, traced.out_slots, strict=True)
    ]


def check_real(traced: Traced, func: Callable[..., Any], name: str) -> None:
    """Refuse complex inputs and outputs.

    Raises:
        RuntimeError: if there is one.
    """
    for kind, leaves in (("inputs", traced.in_leaves), ("outputs", traced.out_leaves)):
        for number, leaf in enumerate(leaves):
            if leaf.is_complex() or not leaf.dtype.is_floating_point:
                raise RuntimeError(
                    f"{name}: Expected all {kind} to be real and floating-point but received {leaf.dtype} at flattened "
                    f"position {number}"
                )


def write_account(tape: Tape, inputs: list[int], output: int, contracted: Contracted, diagonal: bool) -> None:
    """Put the account of a plan into the ledger, where one is kept."""
    ledger = current_ledger()
    if ledger is None or ledger is UNCACHED:
        return
    kind = "hessian_diagonal" if diagonal else "laplacian"
    request = Request(kind, tuple(inputs), (output,))
    source = Source(contracted.program, contracted.staged)
    source.observe(tape.values, ())
    calls = contracted.program.instructions
    ledger.accounts.append(
        account_of(tape, request, contracted.graph, "curvatures", [contracted.candidate], calls, source.memory())
    )


def _contracted_output(traced: Traced, leaf: torch.Tensor, slot: int, diagonal: bool) -> list[torch.Tensor | None]:
    tape, sources = traced.tape, traced.in_slots
    recording = recording_on(tape)
    if any(active and value.is_complex() for value, active in zip(tape.values, tape.active, strict=True)):
        return _from_hessian(traced, leaf, slot, diagonal)
    if leaf.numel() == 1:
        found: dict[int, torch.Tensor | None]
        if hessian_prefers_entries(traced, diagonal=diagonal):
            found = dict(zip(sources, hessian_by_entries(traced, slot, diagonal=diagonal), strict=True))
        else:
            contracted = second_order(tape, sources, slot, torch.ones_like(leaf), recording, diagonal=diagonal)
            write_account(tape, sources, slot, contracted, diagonal)
            found = {**contracted.results}
        shaped: list[torch.Tensor | None] = []
        for source, inner in zip(sources, traced.in_leaves, strict=True):
            part = found.get(source)
            shape = (*leaf.shape, *inner.shape) if diagonal else leaf.shape
            shaped.append(None if part is None else part.reshape(shape))
        return shaped
    # The contraction is linear in the cotangent of the output: its derivative with respect to it is what is wanted.
    cotangent = torch.zeros_like(leaf)
    number = tape.add_input(cotangent)
    with recording():
        contracted = second_order(tape, sources, slot, cotangent, nullcontext, diagonal=diagonal)
    write_account(tape, sources, slot, contracted, diagonal)
    made = contracted.results
    results: list[torch.Tensor | None] = []
    for source, inner in zip(sources, traced.in_leaves, strict=True):
        place = None if source not in made else tape.slot_of(made[source])
        if place is None or not tape.active[place]:
            results.append(None)
            continue
        jacobian = execute(tape, Request("jacobian", (number,), (place,), "auto"))[place, number]
        if jacobian is not None and diagonal:
            jacobian = jacobian.permute(*range(inner.dim(), jacobian.dim()), *range(inner.dim())).contiguous()
        results.append(jacobian)
    return results


def _from_hessian(traced: Traced, leaf: torch.Tensor, slot: int, diagonal: bool) -> list[torch.Tensor | None]:
    """By way of the whole Hessian: where values in between are complex, the curvatures of ops do not simply add up."""
    tape = traced.tape
    with recording_on(tape)():
        first = execute(tape, Request("jacobian", tuple(traced.in_slots), (slot,), "reverse"))
    results: list[torch.Tensor | None] = []
    for source, inner in zip(traced.in_slots, traced.in_leaves, strict=True):
        gradient = first.get((slot, source))
        place = None if gradient is None else tape.slot_of(gradient)
        whole = None
        if place is not None and tape.active[place]:
            whole = execute(tape, Request("jacobian", (source,), (place,), "auto")).get((place, source))
        if whole is None:
            results.append(None)
            continue
        entries = whole.reshape((*leaf.shape, inner.numel(), inner.numel())).diagonal(0, -2, -1)
        results.append(entries.reshape((*leaf.shape, *inner.shape)).clone() if diagonal else entries.sum(-1))
    return results


__all__ = ["hessian_diagonal", "laplacian"]
