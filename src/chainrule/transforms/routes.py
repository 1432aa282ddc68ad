"""The way of a transform that nothing is around: run, key, look-up and replay in one call, where the handlers are compiled.

A transform of a plain function of one tensor always does the same around the run of that function. What it needs for that is
kept in a `Route`, with which the compiled handlers do all of it (``csrc/runs.h``). Where they leave something to Python, the run
goes on as every other one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from chainrule.capture.tape import Tape, facts_of
from chainrule.dispatch import KNOWS_STATE
from chainrule.execute import engine
from chainrule.execute.mapped_calls import CALLS
from chainrule.plan.planner import Request
from chainrule.rules.table import POLICY
from chainrule.shortcuts import call_alone, call_mapped
from chainrule.transforms.arguments import LEAF, PLAIN_ARGUMENT, tree_flatten
from chainrule.transforms.trace import Traced, block_request, traced_run

#: What the plan of a route belongs to, as the compiled handlers number it.
JACOBIAN, GRADIENT, PUSHED, NEST, LINEARIZED, RECORDED = range(6)


class Route(NamedTuple):
    """What is always the same for one transform of one function.

    Attributes:
        function: the innermost function, which returns no aux; None where the route is for any.
        tape: the class of the tape.
        facts: what is known of ops.
        policy: the policy of the tape.
        respect_no_grad: as for a tape.
        reverse: likewise.
        kernels: likewise.
        number: which argument is differentiated; None for all of them.
        kind: ``JACOBIAN``, ``GRADIENT``, ``PUSHED`` (a tangent; all three by one request), ``NEST``, ``LINEARIZED`` (a nest
            under ``vjp`` or ``linearize``), or ``RECORDED`` (the run alone).
        extras: what the key of a plan holds beside the run: by twice the slot of the output, and one more with gradients on.
        plans: the plans that are known, by their keys.
        extra: makes an entry of ``extras`` of the slot and of whether gradients are on.
        dims: the dimension that each argument is mapped over (or all), for a vmap.
        calls: what a level of vmap knows of earlier calls.
        name: the name of the innermost transform, for messages.
    """

    function: Callable[..., Any] | None
    tape: type[Tape]
    facts: dict[int, Any]
    policy: Any
    respect_no_grad: bool
    reverse: bool
    kernels: bool
    number: int | None
    kind: int
    extras: dict[int, Any]
    plans: dict[Any, Any]
    extra: Callable[[int, bool], Any]
    dims: Any = None
    calls: Any = None
    name: str = ""


def route_of(
    function: Callable[..., Any] | None,
    name: str,
    number: Any,
    kind: int,
    extra: Callable[[int, bool], Any],
    *,
    respect_no_grad: bool = True,
    kernels: bool = False,
    dims: Any = None,
) -> Route | None:
    """The route of a transform, see there; None where it has none: it differentiates more than one argument, by one number."""
    if not KNOWS_STATE or (number is not None and (number.__class__ is not int or number < 0)):
        return None
    return Route(
        function, Tape, facts_of(POLICY), POLICY, respect_no_grad, respect_no_grad, kernels, number, kind, {}, engine.CACHE.plans,
        extra, dims, CALLS, name,
    )  # fmt: skip


def jacobian_route(
    function: Callable[..., Any],
    name: str,
    number: Any,
    order: str,
    cast: str,
    *,
    respect_no_grad: bool = True,
    scalar: bool = False,
) -> Route | None:
    """The route of a Jacobian, or of the gradient of a scalar, of a function that is no transform's."""

    def extra(slot: int, grad_enabled: bool) -> Any:
        return block_request(0, slot, order, cast, True)

    kind = GRADIENT if scalar else JACOBIAN
    return route_of(function, name, number, kind, extra, respect_no_grad=respect_no_grad, kernels=scalar)


@lru_cache(maxsize=256)
def pushed_route(count: int) -> Route | None:
    """The route of the push of tangents of so many arguments through any function."""
    slots = tuple(range(count))

    def extra(slot: int, grad_enabled: bool) -> Any:
        return Request("push", slots, (slot,), "auto", slots, "output", True)

    return route_of(None, "jvp", None, PUSHED, extra, respect_no_grad=False)


def recorded_route(*, reverse: bool) -> Route | None:
    """The route of a run of any function of tensors, of which cotangents (in reverse mode) or tangents are asked later."""

    def extra(slot: int, grad_enabled: bool) -> Any:
        raise NotImplementedError

    return route_of(None, "vjp" if reverse else "linearize", None, RECORDED, extra, respect_no_grad=reverse, kernels=reverse)


def run_route(
    route: Route, args: tuple[Any, ...], kwargs: dict[str, Any], seeds: tuple[Any, ...] = (), function: Any = None,
    name: str | None = None,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Run a transform.

    Args:
        route: its route.
        args: the user's arguments.
        kwargs: the user's keyword arguments.
        seeds: the tangents that the outermost transform was given.
        function: the function, where the route is for any.
        name: the transform's name, likewise.

    Returns:
        The run, where it has to go on in Python, None, and the level of vmap that it belongs to; None, the result, and the output
        of the function; NotImplemented in the place of the run, with nothing done, where it has to go its usual way.
    """
    if function is not None:
        found = call_alone(route, args, kwargs, seeds, function)
    else:
        function = route.function
        found = call_alone(route, args, kwargs, seeds) if route.dims is None else call_mapped(route, args, kwargs)
    if found is NotImplemented:
        return NotImplemented, None, None
    if found[0]:
        return None, found[1], found[2]
    _, mode, tape, leaf, output, grad_enabled, _ = found
    return _traced(tape, output, leaf, function, name or route.name, grad_enabled), None, mode


def _traced(tape: Tape, output: Any, leaf: Any, function: Any, name: str, grad_enabled: bool) -> Traced:
    """A run that goes on in Python, from its input, or a tuple of all of them."""
    leaves = [*leaf] if leaf.__class__ is tuple else [leaf]
    spec = tree_flatten(tuple(leaves))[1]
    return traced_run(tape, output, leaves, spec, [*range(len(leaves))], [None] * len(leaves), function, name, grad_enabled)


def run_linearized_route(
    route: Route, args: tuple[Any, ...], kwargs: dict[str, Any], function: Callable[..., Any]
) -> tuple[Any, Any]:
    """Run a nest under ``vjp`` or ``linearize``, as :func:`run_route`.

    Returns:
        The run and its plan, if that is known; two Nones, with nothing done, where it has to go its usual way.
    """
    found = call_alone(route, args, kwargs, (), function)
    if found is NotImplemented:
        return None, None
    tape, leaf, output, grad_enabled, plan, _ = found
    if plan is None:
        return _traced(tape, output, leaf, function, route.name, grad_enabled), None
    return Traced(tape, [leaf], PLAIN_ARGUMENT, [0], [output], LEAF, [tape.slots[id(output)]], None, grad_enabled, [None]), plan
