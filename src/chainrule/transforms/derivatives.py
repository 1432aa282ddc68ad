"""First-order transforms: grad, grad_and_value, vjp, jvp, linearize, and the second-order products hvp and vhp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from chainrule.dispatch import entry_point
from chainrule.transforms.arguments import Argnums, function_name, leaves_of, tree_flatten, tree_unflatten
from chainrule.transforms.graphs import with_graph
from chainrule.transforms.levels import Level, Linearized, mark_of
from chainrule.transforms.nest import NO_NEST, run_level, run_nest, run_pushed_nest
from chainrule.transforms.nest_linearized import run_linearized
from chainrule.transforms.repeated import Repeated, repeated
from chainrule.transforms.routes import (
    GRADIENT,
    jacobian_route,
    pushed_route,
    recorded_route,
    run_linearized_route,
    run_route,
)
from chainrule.transforms.trace import Traced, trace

#: In these calls of one linear function it is tried to find out what they have in common.
_LOOKS = (2, 3, 4)


def _zeros(result: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if result is None else result


def grad_and_value(func: Callable[..., Any], argnums: Argnums = 0, has_aux: bool = False) -> Callable[..., Any]:
    """Return a function that computes the gradient of ``func`` and its value.

    Args:
        func: a function that returns a scalar tensor (shape ``()``), or ``(scalar, aux)`` with ``has_aux``.
        argnums: the positional arguments to differentiate with respect to; an int, or a tuple or list of ints.
        has_aux: whether ``func`` returns a pair whose second entry is passed through.

    Returns:
        A function returning ``(gradient, value)``, or ``(gradient, (value, aux))``. The gradient has the structure,
        shapes and dtypes of the arguments.

    Raises:
        RuntimeError: if the output is not a scalar tensor, or the arguments cannot be differentiated.

    Example:
        >>> import torch, chainrule
        >>> chainrule.grad_and_value(lambda x: (x * x).sum())(torch.tensor([1.0, 2.0]))
        (tensor([2., 4.]), tensor(5.))
    """

    def finish(traced: Traced, single: bool) -> Any:
        return _finish_gradient(traced, single, func, "grad_and_value")

    level = Level(func, "grad_and_value", argnums, has_aux, finish, ("grad_and_value",))

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if (found := _routed(level, args, kwargs)) is not NotImplemented:
            gradient, value = found
            return gradient, value if value.requires_grad is False or torch.is_grad_enabled() else value.detach()
        (gradient, value), aux = run_level(level, args, kwargs)
        gradient = with_graph(gradient, args, argnums)
        return (gradient, (value, aux)) if has_aux else (gradient, value)

    wrapper = entry_point(wrapper, func)
    if not has_aux:  # the aux of this transform stands elsewhere
        level.mark(wrapper)
    return wrapper


def grad(func: Callable[..., Any], argnums: Argnums = 0, has_aux: bool = False) -> Callable[..., Any]:
    """Return a function that computes the gradient of ``func``.

    Args:
        func: a function that returns a scalar tensor (shape ``()``), or ``(scalar, aux)`` with ``has_aux``.
        argnums: the positional arguments to differentiate with respect to; an int, or a tuple or list of ints.
        has_aux: whether ``func`` returns a pair whose second entry is passed through.

    Returns:
        A function returning the gradient, or ``(gradient, aux)``.

    Raises:
        RuntimeError: if the output is not a scalar tensor, or the arguments cannot be differentiated.

    Example:
        >>> import torch, chainrule
        >>> chainrule.grad(torch.sin)(torch.tensor(0.0))
        tensor(1.)
    """

    def finish(traced: Traced, single: bool) -> Any:
        return _finish_gradient(traced, single, func, "grad")[0]

    level = Level(func, "grad", argnums, has_aux, finish, ("grad",))

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if (found := _routed(level, args, kwargs)) is not NotImplemented:
            return found[0]
        gradient, aux = run_level(level, args, kwargs)
        gradient = with_graph(gradient, args, argnums)
        return (gradient, aux) if has_aux else gradient

    wrapper = entry_point(wrapper, func)
    level.mark(wrapper)
    return wrapper


def _routed(level: Level, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The gradient and the value of a function that is no transform's, by its route; NotImplemented where there is none."""
    if (route := level.route) is None:
        made = None
        if not level.has_aux and mark_of(level.func) is None:
            made = jacobian_route(level.func, level.name, level.argnums, "reverse", "input", scalar=True)
        elif mark_of(level.func) is not None:
            return NotImplemented  # the route is that of the nest
        route = level.route = made or False
    if route is False or route.kind != GRADIENT:
        return NotImplemented
    traced, gradient, value = run_route(route, args, kwargs)
    if traced is None:
        return gradient, value
    if traced is NotImplemented:
        return NotImplemented
    traced.alone = True
    return _finish_gradient(traced, True, level.func, level.name)


def _finish_gradient(traced: Traced, single: bool, func: Callable[..., Any], name: str) -> tuple[Any, torch.Tensor]:
    value = _scalar_output(traced, func, name)
    if single and traced.alone and (block := traced.known_block("reverse")) is not None:
        return block, traced.release(value)
    slot = traced.out_slots[0]
    found = {} if slot is None else traced.run("jacobian", "reverse", outputs=[slot], last=traced.alone)
    leaves = [_zeros(found.get((slot, s)), leaf) for s, leaf in zip(traced.in_slots, traced.in_leaves, strict=True)]
    gradient = tree_unflatten(leaves, traced.in_spec)
    return (gradient[0] if single else gradient), traced.release(value)


def _scalar_output(traced: Traced, func: Callable[..., Any], name: str) -> torch.Tensor:
    label = function_name(func)
    if len(traced.out_leaves) != 1 or not traced.out_spec.is_leaf():
        raise RuntimeError(f"{name}({label}): expected {label} to return a scalar Tensor, got {traced.output()!r}")
    value = traced.out_leaves[0]
    if value.dim() != 0:
        raise RuntimeError(
            f"{name}({label}): expected {label} to return a scalar Tensor, got a tensor with {value.dim()} dims of shape "
            f"{tuple(value.shape)}. Maybe you wanted to use vjp or jacrev instead?"
        )
    if value.is_complex():
        raise RuntimeError(f"{name}({label}): grad can be created only for real scalar outputs but got {value.dtype}")
    return value


@entry_point
def vjp(func: Callable[..., Any], *primals: Any, has_aux: bool = False, **kwargs: Any) -> Any:
    """Run ``func`` and return its output and its pullback.

    Args:
        func: the function.
        primals: its positional arguments, all differentiated; pytrees of tensors.
        has_aux: whether ``func`` returns ``(output, aux)``.
        kwargs: passed to ``func``, not differentiated.

    Returns:
        ``(output, vjp_fn)`` or ``(output, vjp_fn, aux)``. ``vjp_fn(cotangents)`` takes cotangents in the output's
        structure and returns a tuple with one entry per primal. It can be called many times; the record of the run is
        kept as long as ``vjp_fn`` lives.

    Raises:
        RuntimeError: if outputs are not floating-point tensors, or the cotangents do not match the outputs.

    Example:
        >>> import torch, chainrule
        >>> _, pullback = chainrule.vjp(torch.sin, torch.zeros(2))
        >>> pullback(torch.ones(2))
        (tensor([1., 1.]),)
    """
    found = None
    alone = False
    if mark_of(func) is not None:
        found = run_linearized(Level(func, "vjp", None, has_aux, _no_finish, ("vjp",)), primals, kwargs, _pullback)
    if found is None:
        traced = None
        if _PULLED is not None and primals and not has_aux:
            traced = run_linearized_route(_PULLED, primals, kwargs, func)[0]
        if traced is None:
            traced = trace(func, primals, tuple(range(len(primals))), kwargs, "vjp", has_aux=has_aux, single=True)
        for leaf in traced.out_leaves:
            if not (leaf.dtype.is_floating_point or leaf.dtype.is_complex):
                raise RuntimeError(
                    f"vjp({function_name(func)}): all outputs must be floating-point or complex Tensors, got {leaf.dtype}"
                )
        found, alone = _pullback(traced), True
    leaves, out_spec, active, pull = found.leaves, found.spec, found.active, found.call
    inputs = tuple(found.traced.in_leaves)
    calls = 0 if alone and len(active) == len(leaves) else _LOOKS[-1]
    again: Repeated | None = None

    @entry_point
    def vjp_fn(cotangents: Any, retain_graph: bool = True, create_graph: bool | None = None) -> Any:
        """Pull cotangents back to the primals."""
        nonlocal again, calls
        given = leaves_of(cotangents, out_spec)
        if again is not None and given is not None and (pulled := again(given)) is not NotImplemented:
            return pulled
        if given is None:
            given, spec = tree_flatten(cotangents)
            if spec is not out_spec and spec != out_spec:
                raise RuntimeError(
                    "vjp: expected pytree structure of cotangents to be the same as pytree structure of outputs to the "
                    f"function. cotangents: {spec}, primal output: {out_spec}"
                )
        for number, (leaf, out) in enumerate(zip(given, leaves, strict=True)):
            check_seed(leaf, out, f"vjp: cotangent {number}", "output")
        pulled = pull(tuple([_match_dtype(given[number], leaves[number]) for number in active]))
        calls += 1
        if again is None and calls in _LOOKS:
            run = found.traced
            again = repeated(run, "pull", run.out_slots, given, run.in_slots, run.in_spec)  # type: ignore[arg-type]
        return with_graph(pulled, inputs) if found.traced.grad_enabled else pulled

    return (found.output, vjp_fn, found.traced.aux) if has_aux else (found.output, vjp_fn)


def _no_finish(traced: Traced, single: bool) -> Any:
    raise AssertionError("this level has a linear function in place of a result")


def _pullback(traced: Traced) -> Linearized:
    """The outputs of a run and its pullback."""
    active = [number for number, slot in enumerate(traced.out_slots) if slot is not None]
    return Linearized(
        traced.out_leaves, traced.out_spec, active, partial(pull_back, traced, active), traced, traced.output()
    )


def _pushforward(traced: Traced) -> Linearized:
    """The outputs of a run and its pushforward."""
    active = [number for number, slot in enumerate(traced.out_slots) if slot is not None]
    return Linearized(traced.out_leaves, traced.out_spec, active, partial(_pushed, traced), traced, traced.output())


def pull_back(traced: Traced, active: list[int], cotangents: tuple[torch.Tensor, ...]) -> Any:
    """The cotangents of the inputs, in their structure, from those of the ``active`` outputs."""
    seeds: tuple[Any, ...] = tuple([traced.out_slots[number] for number in active])
    found = traced.run("pull", seeds=seeds, tensors=cotangents) if active else {}
    results = [_zeros(found.get(s), leaf) for s, leaf in zip(traced.in_slots, traced.in_leaves, strict=True)]
    return tree_unflatten(results, traced.in_spec)


def check_seed(seed: Any, like: torch.Tensor, what: str, partner: str) -> None:
    """Refuse a tangent or cotangent that does not match the tensor it belongs to.

    Raises:
        RuntimeError: if it is no tensor, or differs in shape, kind of dtype or device.
    """
    if not isinstance(seed, torch.Tensor):
        raise RuntimeError(f"{what} must be a Tensor, got {type(seed)}")
    if seed.shape != like.shape:
        raise RuntimeError(
            f"{what}: mismatch in shape, it has shape {tuple(seed.shape)} and the {partner} has shape {tuple(like.shape)}"
        )
    if seed.is_complex() and not like.is_complex():
        raise RuntimeError(f"{what}: mismatch in dtype, it is {seed.dtype} and the {partner} is real: {like.dtype}")
    if seed.device != like.device:
        raise RuntimeError(f"{what}: mismatch in device, it is on {seed.device} and the {partner} is on {like.device}")


def check_floating(tangent: torch.Tensor, what: str) -> None:
    """Refuse tangents of whole numbers.

    Raises:
        ValueError: if the dtype is neither floating-point nor complex.
    """
    if not (tangent.is_floating_point() or tangent.is_complex()):
        raise ValueError(f"{what} must be floating point or complex, got {tangent.dtype}")


def _match_dtype(seed: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return seed if seed.dtype == like.dtype else seed.to(like.dtype)


def jvp(
    func: Callable[..., Any], primals: Any, tangents: Any, *, strict: bool = False, has_aux: bool = False, **kwargs: Any
) -> Any:
    """Run ``func`` and push tangents forward through it.

    Args:
        func: the function.
        primals: a tuple of its positional arguments; pytrees of floating-point tensors.
        tangents: a tuple of the same structure and shapes.
        strict: whether an output that is independent of the primals is an error instead of a zero tangent.
        has_aux: whether ``func`` returns ``(output, aux)``.
        kwargs: passed to ``func``, not differentiated.

    Returns:
        ``(output, output tangents)``, or ``(output, output tangents, aux)``.

    Raises:
        RuntimeError: if primals and tangents do not match, or, with ``strict``, an output is independent.
        ValueError: if a primal or a tangent has an integer dtype.

    Example:
        >>> import torch, chainrule
        >>> chainrule.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))
        (tensor(0.), tensor(1.))
    """
    return _jvp(func, primals, tangents, strict, has_aux, kwargs, "jvp")


@entry_point
def _jvp(
    func: Callable[..., Any], primals: Any, tangents: Any, strict: bool, has_aux: bool, kwargs: dict[str, Any], name: str
) -> Any:

    def finish(traced: Traced, single: bool) -> Any:
        return traced.output(), push_forward(traced, list(traced.seeds), name, last=True)

    nested = not strict and mark_of(func) is not None
    level = Level(func, name, None, has_aux, finish, ("jvp",)) if nested else None
    if not strict and not has_aux and primals.__class__ is tuple is tangents.__class__ and 0 < len(primals) == len(tangents):
        found = NotImplemented
        if level is None:
            found = _pushed_alone(func, primals, tangents, kwargs, name)
        elif len(primals) == 1:
            found = run_pushed_nest(level, primals, kwargs, tangents)
        if found is not NotImplemented:
            return found
    leaves = check_tangents(primals, tangents, name, "tangents")
    if level is not None and all([isinstance(leaf, torch.Tensor) for leaf in leaves]):
        result, aux = run_nest(level, primals, kwargs, tuple(leaves))
        if result is not NO_NEST:
            output, pushed = result[0], with_graph(result[1], primals)
            return (output, pushed, aux) if has_aux else (output, pushed)
    traced = trace(func, primals, tuple(range(len(primals))), kwargs, name, has_aux=has_aux, respect_no_grad=False)
    pushed = with_graph(push_forward(traced, leaves, name, last=True), primals)
    if strict and any(slot is None for slot in traced.out_slots):
        raise RuntimeError(
            f"{name}({function_name(func)}, primals, tangents, strict=True): the output of {function_name(func)} is "
            "independent of the inputs. This is not allowed with strict=True."
        )
    output = traced.output()
    return (output, pushed, traced.aux) if has_aux else (output, pushed)


_PULLED, _LINEARIZED = recorded_route(reverse=True), recorded_route(reverse=False)


def _pushed_alone(
    func: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> Any:
    """The output and the tangent of a plain function of tensors, where nothing is around; else NotImplemented."""
    if (route := pushed_route(len(primals))) is None:
        return NotImplemented
    traced, pushed, output = run_route(route, primals, kwargs, tangents, func, name)
    if traced is None:
        return (output if output.requires_grad is False or torch.is_grad_enabled() else output.detach()), pushed
    if traced is NotImplemented:
        return NotImplemented
    pushed = push_forward(traced, [*tangents], name, last=True)
    return traced.output(), pushed


def check_tangents(primals: Any, tangents: Any, name: str, kind: str) -> list[torch.Tensor]:
    """The leaves of tangents of the structure of ``primals``.

    Raises:
        RuntimeError: if the structures differ, or a primal is not a tensor.
    """
    if not isinstance(primals, tuple):
        raise RuntimeError(
            f"{name}(f, primals, {kind}): expected primals to be a tuple, got {type(primals)}. "
            "E.g. it should be valid to call f(*primals)."
        )
    primal_leaves, spec = tree_flatten(primals)
    leaves, tangent_spec = tree_flatten(tangents)
    if spec is not tangent_spec and spec != tangent_spec:
        raise RuntimeError(
            f"{name}(f, primals, {kind}): expected primals and {kind} to have the same python structure. For example, if "
            f"primals is a tuple of 3 tensors, {kind} also must be. Got primals with structure {spec} and {kind} with "
            f"structure {tangent_spec}"
        )
    if not leaves:
        raise RuntimeError(f"{name}(f, primals, {kind}): expected at least one Tensor in primals")
    for leaf in primal_leaves:
        if not isinstance(leaf, torch.Tensor):
            raise RuntimeError(f"{name}(f, primals, {kind}): expected primals to contain only Tensors, got {type(leaf)}")
    return leaves


def push_forward(traced: Traced, tangents: list[Any], name: str, convention: str = "output", *, last: bool = False) -> Any:
    """The tangents of the outputs, in their structure.

    Args:
        traced: the run.
        tangents: those of the inputs.
        name: the transform's name.
        convention: the request's ``cast``.
        last: whether nothing is asked of the run after this.

    Raises:
        RuntimeError: if a tangent does not match its primal.
        ValueError: if a tangent has an integer dtype.
    """
    return _pushed(traced, tuple(_checked(tangents, traced, name)), convention, last=last)


def _are_alike(tangents: list[Any], primals: Sequence[torch.Tensor]) -> bool:
    """Whether tangents are tensors of the shapes, dtypes and devices of their primals, as most are."""
    for one, two in zip(tangents, primals, strict=True):
        if not isinstance(one, torch.Tensor) or one.dtype is not two.dtype or one.shape != two.shape or one.device != two.device:
            return False
    return True


def _checked(tangents: list[Any], traced: Traced, name: str) -> list[torch.Tensor]:
    """Tangents that match the inputs, in their dtypes."""
    for number, (leaf, primal) in enumerate(zip(tangents, traced.in_leaves, strict=True)):
        check_seed(leaf, primal, f"{name}: tangent {number}", "primal")
        check_floating(leaf, f"{name}: tangent {number}")
    return [_match_dtype(t, primal) for t, primal in zip(tangents, traced.in_leaves, strict=True)]


def _pushed(traced: Traced, tensors: tuple[torch.Tensor, ...], convention: str = "output", *, last: bool = False) -> Any:
    found = {}
    if any(slot is not None for slot in traced.out_slots):
        found = traced.run("push", seeds=tuple(traced.in_slots), tensors=tensors, cast=convention, last=last)
    results = [
        _zeros(None if slot is None else found.get(slot), leaf)
        for slot, leaf in zip(traced.out_slots, traced.out_leaves, strict=True)
    ]
    return tree_unflatten(results, traced.out_spec)


@entry_point
def linearize(func: Callable[..., Any], *primals: Any, has_aux: bool = False, **kwargs: Any) -> Any:
    """Run ``func`` and return its output and its pushforward, a linear function that can be called many times.

    Args:
        func: the function.
        primals: its positional arguments, all differentiated; pytrees of floating-point tensors.
        has_aux: whether ``func`` returns ``(output, aux)``.
        kwargs: passed to ``func``, not differentiated.

    Returns:
        ``(output, jvp_fn)`` or ``(output, jvp_fn, aux)``; ``jvp_fn(*tangents)`` returns the output tangents.

    Raises:
        RuntimeError: if the tangents given to ``jvp_fn`` do not match the primals in structure, shape or dtype.
        ValueError: if a primal is not a floating-point or complex tensor.

    Example:
        >>> import torch, chainrule
        >>> _, push = chainrule.linearize(torch.sin, torch.zeros(2))
        >>> push(torch.ones(2))
        tensor([1., 1.])
    """
    found = None
    alone = False
    if mark_of(func) is not None:
        level = Level(func, "linearize", None, has_aux, _no_finish, ("linearize",))
        found = run_linearized(level, primals, kwargs, _pushforward)
    if found is None:
        traced = None
        if _LINEARIZED is not None and primals and not has_aux:
            traced = run_linearized_route(_LINEARIZED, primals, kwargs, func)[0]
        if traced is None:
            traced = trace(
                func, primals, tuple(range(len(primals))), kwargs, "linearize", has_aux=has_aux, respect_no_grad=False
            )
        found, alone = _pushforward(traced), True
    traced, push = found.traced, found.call
    inputs = tuple(traced.in_leaves)
    calls = 0 if alone else _LOOKS[-1]
    again: Repeated | None = None

    @entry_point
    def jvp_fn(*tangents: Any) -> Any:
        """Push tangents forward."""
        nonlocal again, calls
        leaves = leaves_of(tangents, traced.in_spec)
        if again is not None and leaves is not None and (pushed := again(leaves)) is not NotImplemented:
            return pushed
        if leaves is None:
            leaves, spec = tree_flatten(tangents)
            if spec is not traced.in_spec and spec != traced.in_spec:
                raise RuntimeError(
                    f"linearize: expected the tangents {spec} to have the same structure as the primals {traced.in_spec}"
                )
        if not _are_alike(leaves, traced.in_leaves):
            for number, (leaf, primal) in enumerate(zip(leaves, traced.in_leaves, strict=True)):
                if isinstance(leaf, torch.Tensor) and leaf.dtype != primal.dtype:
                    raise RuntimeError(
                        f"linearize: tangent {number}: mismatch in dtype, it is {leaf.dtype} and the primal is {primal.dtype}"
                    )
            leaves = _checked(leaves, traced, "linearize")
        pushed = push(tuple(leaves))
        calls += 1
        if again is None and calls in _LOOKS:
            again = repeated(traced, "push", traced.in_slots, leaves, traced.out_slots, traced.out_spec, "output")
        return with_graph(pushed, inputs) if traced.grad_enabled else pushed

    return (found.output, jvp_fn, found.traced.aux) if has_aux else (found.output, jvp_fn)


def hvp(
    func: Callable[..., Any], primals: Any, tangents: Any, *, has_aux: bool = False, **kwargs: Any
) -> Any:
    """The product of the Hessian of a scalar function with a vector, forward over reverse.

    Args:
        func: a function that returns a scalar tensor.
        primals: a tuple of its positional arguments; pytrees of floating-point tensors.
        tangents: a tuple of the same structure and shapes.
        has_aux: whether ``func`` returns ``(scalar, aux)``.
        kwargs: passed to ``func``.

    Returns:
        ``H v`` in the structure of ``primals`` (a single tree when there is one primal), or ``(H v, aux)``.

    Raises:
        RuntimeError: if the output is not a scalar, or primals and tangents do not match.

    Example:
        >>> import torch, chainrule
        >>> chainrule.hvp(lambda x: (x ** 3).sum(), (torch.ones(2),), (torch.tensor([1.0, 2.0]),))
        tensor([ 6., 12.])
    """
    count = len(primals) if isinstance(primals, tuple) else 1
    gradient = grad(func, argnums=0 if count == 1 else tuple(range(count)), has_aux=has_aux)
    result = _jvp(gradient, primals, tangents, False, has_aux, kwargs, "hvp")
    return (result[1], result[2]) if has_aux else result[1]


def vhp(
    func: Callable[..., Any], primals: Any, cotangents: Any, *, has_aux: bool = False, **kwargs: Any
) -> Any:
    """The product of a vector with the Hessian of a scalar function, reverse over reverse.

    Args:
        func: a function that returns a scalar tensor.
        primals: a tuple of its positional arguments; pytrees of floating-point tensors.
        cotangents: a tuple of the same structure and shapes.
        has_aux: whether ``func`` returns ``(scalar, aux)``.
        kwargs: passed to ``func``.

    Returns:
        ``v H`` in the structure of ``primals`` (a single tree when there is one primal), or ``(v H, aux)``.

    Raises:
        RuntimeError: if the output is not a scalar, or primals and cotangents do not match.

    Example:
        >>> import torch, chainrule
        >>> chainrule.vhp(lambda x: (x ** 3).sum(), (torch.ones(2),), (torch.tensor([1.0, 2.0]),))
        tensor([ 6., 12.])
    """
    check_tangents(primals, cotangents, "vhp", "cotangents")
    count = len(primals)
    gradient = grad(func, argnums=0 if count == 1 else tuple(range(count)), has_aux=has_aux)
    outcome = vjp(gradient, *primals, has_aux=has_aux, **kwargs)
    pulled = outcome[1](cotangents[0] if count == 1 else tuple(cotangents))
    result = pulled[0] if count == 1 else pulled
    return (result, outcome[2]) if has_aux else result
