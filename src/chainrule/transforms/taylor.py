"""Derivatives of higher order along a curve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from chainrule.execute.engine import execute
from chainrule.plan.planner import Request
from chainrule.transforms.arguments import Argnums, tree_flatten, tree_unflatten
from chainrule.transforms.contractions import chosen_primals, dims_of_primals
from chainrule.transforms.derivatives import check_floating, check_seed
from chainrule.transforms.graphs import with_graph
from chainrule.transforms.levels import Level
from chainrule.transforms.nest import run_planned
from chainrule.transforms.steps import refuse_hidden
from chainrule.transforms.trace import Traced, fresh_alias, recording_on
from chainrule.transforms.vmap import per_sample


def jet(
    func: Callable[..., Any],
    primals: Any,
    series: Any,
    *,
    argnums: Argnums | None = None,
    has_aux: bool = False,
    in_dims: Any = None,
    **kwargs: Any,
) -> Any:
    """Push a Taylor series through ``func``: the derivatives of ``t ↦ func(x(t))`` up to some order at ``t = 0``.

    The curves are ``x(t) = x + h₁ t + h₂ t²/2! + … + h_K t^K/K!``: the coefficients are derivatives, not divided by
    factorials, as in JAX. With ``h₁ = v`` and the rest zero, the results are ``func(x)``, ``f'v``, ``f''[v, v]``, …

    Args:
        func: a function that returns tensors (any pytree).
        primals: a tuple of its positional arguments; pytrees of floating-point tensors where they have a series.
        series: a tuple with one list (or tuple) of ``K`` trees of the primal's structure and shapes for each such primal; that
            list itself where ``argnums`` is an int.
        argnums: which of the primals have a series; an int, or a tuple or list of ints; all by default.
        has_aux: whether ``func`` returns ``(output, aux)``.
        in_dims: the series per sample, as under ``vmap``: for each primal (and the coefficients of its series) the dimension
            to map over, an int or a tuple of ints and None. By default nothing is mapped.
        kwargs: passed to ``func``.

    Returns:
        ``(outputs, output series)`` or ``(outputs, output series, aux)``: the output, and a tree of its structure with a list
        of ``K`` tensors at each leaf.

    Raises:
        RuntimeError: if primals and series do not match, or an output is not a floating-point tensor.
        ValueError: if ``in_dims`` does not fit the primals, or a coefficient has an integer dtype.

    Example:
        >>> import torch, chainrule
        >>> zero, one = torch.zeros(()), torch.ones(())
        >>> chainrule.jet(torch.exp, (zero,), ([one, zero, zero],))
        (tensor(1.), [tensor(1.), tensor(1.), tensor(1.)])

    Source: Griewank and Walther, *Evaluating Derivatives*, 2nd ed., chapter 13; Bettencourt, Johnson, Duvenaud,
    *Taylor-mode automatic differentiation for higher-order derivatives in JAX* (2019).
    """
    where, single = chosen_primals(primals, argnums, _CALL)
    given = (series,) if single else series
    leaves, order = _check(tuple([primals[number] for number in where]), given)
    if in_dims is not None:
        dims = dims_of_primals(func, primals, in_dims, "jet")

        def pushed(primals: Any, series: Any) -> Any:
            return jet(func, primals, series, argnums=argnums, has_aux=has_aux, **kwargs)

        dims_of_series = tuple([type(one)([dims[number]] * order) for number, one in zip(where, given, strict=True)])
        mapped = per_sample(pushed, (dims, dims_of_series[0] if single else dims_of_series), "jet", has_aux=has_aux)
        return mapped(primals, series if single else tuple(given))

    def finish(traced: Traced, single: bool) -> Any:
        refuse_hidden(traced.hidden, "jet")
        for number, (leaf, coefficients) in enumerate(zip(traced.in_leaves, leaves, strict=True)):
            for coefficient in coefficients:
                check_seed(coefficient, leaf, f"jet: series of primal {number}", "primal")
        return traced.output(), tree_map(traced.release, _coefficients(traced, order))

    seeds = tuple([coefficient for coefficients in leaves for coefficient in coefficients])
    level = Level(func, "jet", where, has_aux, finish, ("jet", order), respect_no_grad=False)
    (output, found), aux = run_planned(level, primals, kwargs, seeds)
    found = with_graph(found, primals, where)
    return (output, found, aux) if has_aux else (output, found)


_CALL = "jet(f, primals, series)"


def _check(primals: tuple[Any, ...], series: Any) -> tuple[list[list[torch.Tensor]], int]:
    """For each leaf of the primals its coefficients, and how many these are.

    Raises:
        RuntimeError: if primals and series do not match.
        ValueError: if a coefficient has an integer dtype.
    """
    if not isinstance(series, (tuple, list)):
        raise RuntimeError(f"{_CALL}: expected series to be a tuple of lists, got {type(series)}")
    if len(primals) != len(series):
        raise RuntimeError(f"{_CALL}: got {len(primals)} primals and {len(series)} series")
    leaves: list[list[torch.Tensor]] = []
    for number, coefficients in enumerate(series):
        if not isinstance(coefficients, (tuple, list)):
            raise RuntimeError(
                f"{_CALL}: expected the series of primal {number} to be a list with one coefficient per order, as [v] is for the "
                f"first order, got {type(coefficients)}"
            )
    order = len(series[0]) if series else 0
    for number, (primal, coefficients) in enumerate(zip(primals, series, strict=True)):
        if len(coefficients) != order:
            raise RuntimeError(
                f"{_CALL}: expected each series to be a list of {order} coefficients like the first, got {len(coefficients)} "
                f"for primal {number}"
            )
        primal_leaves, spec = tree_flatten(primal)
        for leaf in primal_leaves:
            if not isinstance(leaf, torch.Tensor):
                raise RuntimeError(f"{_CALL}: expected primals to contain only Tensors, got {type(leaf)}")
        columns = []
        for coefficient in coefficients:
            column, found = tree_flatten(coefficient)
            if found != spec:
                raise RuntimeError(
                    f"{_CALL}: expected the coefficients of primal {number} to have its structure, {spec}, got {found}"
                )
            for leaf in column:
                if not isinstance(leaf, torch.Tensor):
                    raise RuntimeError(f"{_CALL}: series of primal {number} must hold Tensors, got {type(leaf)}")
                check_floating(leaf, f"jet: series of primal {number}")
            columns.append(column)
        leaves.extend([column[n] for column in columns] for n in range(len(primal_leaves)))
    return leaves, order


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
