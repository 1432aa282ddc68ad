"""Derivatives of higher order along a curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from chainrule.execute.engine import execute
from chainrule.plan.planner import Request
from chainrule.transforms.arguments import tree_unflatten
from chainrule.transforms.derivatives import check_seed
from chainrule.transforms.nest import Level, run_planned
from chainrule.transforms.trace import Traced, fresh_alias, recording_on


def jet(func: Callable[..., Any], primals: Any, series: Any) -> tuple[Any, Any]:
    """Push a Taylor series through ``func``: the derivatives of ``t ↦ func(x(t))`` up to some order at ``t = 0``.

    The curves are ``x(t) = x + h₁ t + h₂ t²/2! + … + h_K t^K/K!``: the coefficients are derivatives, not divided by
    factorials, as in JAX. With ``h₁ = v`` and the rest zero, the results are ``func(x)``, ``f'v``, ``f''[v, v]``, …

    Args:
        func: a function of floating-point tensors that returns tensors (any pytree).
        primals: a tuple of its positional arguments, tensors.
        series: a tuple with one list (or tuple) of ``K`` tensors of the primal's shape for each primal.

    Returns:
        ``(outputs, output series)``: the output, and a tree of its structure with a list of ``K`` tensors at each leaf.

    Raises:
        RuntimeError: if primals and series do not match, or an output is not a floating-point tensor.

    Example:
        >>> import torch, chainrule
        >>> zero, one = torch.zeros(()), torch.ones(())
        >>> chainrule.jet(torch.exp, (zero,), ([one, zero, zero],))
        (tensor(1.), [tensor(1.), tensor(1.), tensor(1.)])

    Source: Griewank and Walther, *Evaluating Derivatives*, 2nd ed., chapter 13; Bettencourt, Johnson, Duvenaud,
    *Taylor-mode automatic differentiation for higher-order derivatives in JAX* (2019).
    """
    leaves = _check(primals, series)
    order = len(leaves[0]) if leaves else 0

    def finish(traced: Traced, single: bool) -> Any:
        for number, (leaf, coefficients) in enumerate(zip(traced.in_leaves, leaves, strict=True)):
            for coefficient in coefficients:
                check_seed(coefficient, leaf, f"jet: series of primal {number}", "primal")
        return traced.output(), _coefficients(traced, order)

    seeds = tuple([coefficient for coefficients in leaves for coefficient in coefficients])
    level = Level(func, "jet", tuple(range(len(leaves))), False, finish, ("jet", order))
    (output, found), _ = run_planned(level, primals, {}, seeds)
    return output, found


def _check(primals: Any, series: Any) -> list[Sequence[torch.Tensor]]:
    """One sequence of coefficients for each primal, all of one length."""
    if not isinstance(primals, tuple) or not isinstance(series, (tuple, list)):
        raise RuntimeError(
            f"jet(f, primals, series): expected primals to be a tuple and series a tuple of lists, got {type(primals)} and "
            f"{type(series)}"
        )
    if len(primals) != len(series):
        raise RuntimeError(f"jet(f, primals, series): got {len(primals)} primals and {len(series)} series")
    for number, (primal, coefficients) in enumerate(zip(primals, series, strict=True)):
        if not isinstance(primal, torch.Tensor):
            raise RuntimeError(f"jet(f, primals, series): expected primals to be Tensors, got {type(primal)}")
        if not isinstance(coefficients, (tuple, list)) or len(coefficients) != len(series[0]):
            raise RuntimeError(
                f"jet(f, primals, series): expected each series to be a list of {len(series[0])} Tensors like the first, got "
                f"{coefficients!r} for primal {number}"
            )
    return list(series)


def _coefficients(traced: Traced, order: int) -> Any:
    """The coefficients of the outputs. Each order is the derivative of the one before along the curve of all inputs."""
    tape, count = traced.tape, len(traced.in_slots)
    recording = recording_on(tape)
    curve = [[fresh_alias(traced.seeds[number * order + k]) for k in range(order)] for number in range(count)]
    curve = [
        [h.to(leaf.dtype) for h in coefficients] for coefficients, leaf in zip(curve, traced.in_leaves, strict=True)
    ]
    places = [[tape.add_input(h) for h in coefficients[: order - 1]] for coefficients in curve]
    slots = list(traced.out_slots)
    found: list[list[torch.Tensor]] = [[] for _ in slots]
    for k in range(order):
        inputs = [*traced.in_slots, *(places[number][j] for j in range(k) for number in range(count))]
        tangents = [curve[number][j] for j in range(k + 1) for number in range(count)]
        outputs = tuple(slot for slot in slots if slot is not None)
        pushed = {}
        if outputs:
            with recording():
                request = Request("push", tuple(inputs), outputs, "auto", tuple(inputs), "output")
                pushed = execute(tape, request, tuple(tangents))
        for number, (slot, leaf) in enumerate(zip(slots, traced.out_leaves, strict=True)):
            value = None if slot is None else pushed.get(slot)
            found[number].append(torch.zeros_like(leaf) if value is None else value)
            place = None if value is None else tape.slot_of(value)
            slots[number] = place if place is not None and tape.active[place] else None
    return tree_unflatten(found, traced.out_spec)
