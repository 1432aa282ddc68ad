"""The Hessian of a scalar function as a symmetric linear map."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from chainrule.capture.tape import BelowAutograd, Tape
from chainrule.dispatch import entry_point
from chainrule.plan.second_order import HoldsMore, second_order
from chainrule.transforms.arguments import Argnums, function_name, resolve_argnums
from chainrule.transforms.derivatives import grad_and_value
from chainrule.transforms.jacobian_map import JacobianMap, input_space, jacobian_map
from chainrule.transforms.levels import Level
from chainrule.transforms.map_entries import held_by_entries
from chainrule.transforms.nest import run_recorded
from chainrule.transforms.spaces import Space
from chainrule.transforms.tensor_hooks import refuse_hooks
from chainrule.transforms.trace import Traced, active_slot, trace


class HessianMap(JacobianMap):
    """The Hessian of a scalar function: the Jacobian of its gradient.

    Args:
        value: what the function returned.
        gradient: the run that made the gradient.
        in_space: the space of the input.
        function: the function's run, on whose tape the gradient is recorded; None where it is not, and the map is not symmetric.

    Attributes:
        value: what the function returned.
        output: its gradient, in the structure of the input.
    """

    def __init__(self, value: Any, gradient: Traced, in_space: Space, function: Traced | None) -> None:
        super().__init__(gradient, in_space, symmetric=function is not None)
        self.value = value
        # Where values in between are complex, the curvatures of ops do not simply add up.
        is_complex = function and any(isinstance(v, torch.Tensor) and v.is_complex() for v in function.tape.values)
        self._function = None if is_complex else function

    def diagonal(self) -> Any:
        """The diagonal, as :func:`chainrule.hessian_diagonal` computes it: the Hessian is not formed.

        Where that would hold more than the Hessian's non-zeros (scatters into the nodes of a graph), it is read off them.

        Returns:
            A tree of the input's structure and shapes.
        """
        parts = self._contracted(diagonal=True)
        return super().diagonal() if parts is None else self.in_space.tree(parts)

    def trace(self) -> torch.Tensor:
        """The trace, as :func:`chainrule.laplacian` computes it, or read off the non-zeros as :meth:`diagonal` is."""
        parts = self._contracted(diagonal=False)
        if parts is None:
            return super().trace()
        total = None
        for part in parts:
            total = part.to(self.dtype) if total is None else torch.add(total, part.to(self.dtype))
        assert total is not None
        return total

    def _contracted(self, *, diagonal: bool) -> list[torch.Tensor] | None:
        """The diagonal of the block of each input with itself, or its sum; None where curvatures are not the way to it."""
        run = self._function
        if run is None:
            return None
        limit = held_by_entries(self, "diagonal" if diagonal else "trace")

        def finish(traced: Traced, single: bool) -> list[torch.Tensor]:
            (value,), (slot,) = traced.out_leaves, traced.out_slots
            found: dict[int, torch.Tensor] = {}
            if slot is not None:
                recording = partial(_recording, traced.tape)
                seed = torch.ones_like(value)
                found = second_order(traced.tape, traced.in_slots, slot, seed, recording, diagonal=diagonal, limit=limit).results
            parts = []
            for source, leaf in zip(traced.in_slots, traced.in_leaves, strict=True):
                shape = leaf.shape if diagonal else ()
                if (part := found.get(source)) is None:
                    part = torch.zeros(shape, dtype=leaf.dtype, device=leaf.device)
                parts.append(part.reshape(shape).to(leaf.dtype))
            return parts

        whole = replace(run, in_leaves=[run.tape.values[slot] for slot in run.in_slots])
        name = "hessian_diagonal" if diagonal else "laplacian"
        level = Level(_no_function, name, None, False, finish, (name, "map", limit is None))
        try:
            found: list[torch.Tensor] = run_recorded(level, whole)
        except HoldsMore:
            self._function = None
            return None
        return found


def _no_function(*args: Any) -> Any:
    raise AssertionError("this level is run on a run that is there already")


@contextmanager
def _recording(tape: Tape) -> Iterator[None]:
    with torch.enable_grad(), tape.recording():
        yield


def hessian_map(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    argnums: Argnums,
    has_aux: bool,
    kwargs: dict[str, Any],
    name: str = "hessian",
) -> tuple[JacobianMap, Any]:
    """Run a scalar function, and return the map of its Hessian and the auxiliary output.

    Raises:
        RuntimeError: if arguments or the output cannot be differentiated, or are complex.
        ValueError: if the output is no scalar.
    """
    where, single = resolve_argnums(argnums, len(args), name)
    traced = trace(func, args, where, kwargs, name, has_aux=has_aux)
    refuse_hooks(traced.tape, f"{name} as a linear map")
    space = input_space(traced, args, where, single, func, name)
    label = function_name(func)
    if len(traced.out_leaves) != 1 or traced.out_leaves[0].dim():
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in traced.out_leaves)
        raise ValueError(
            f"{name}({label}, layout='operator'): expected {label} to return one scalar Tensor, got shapes {shapes}. For other "
            "functions, linear_map(jacrev(function), ...) is the derivative of the Jacobian as a map."
        )
    if traced.tape.saw_blocked:
        # Only the first of the two derivatives takes what runs under no_grad for constant: not one tape, and not symmetric.
        first = grad_and_value(func, argnums, has_aux)
        found, rest = jacobian_map(first, args, argnums, True, kwargs, name, respect_no_grad=False)
        value, aux = rest if has_aux else (rest, None)
        return HessianMap(value, found.run, found.in_space, None), aux
    tape, (slot,) = traced.tape, traced.out_slots
    leaves: list[torch.Tensor | None] = [None] * len(traced.in_slots)
    if slot is not None:
        torch._C._set_grad_enabled(True)
        try:
            with BelowAutograd(), tape:
                found_by_key = traced.run("jacobian", "reverse", outputs=[slot])
        finally:
            torch._C._set_grad_enabled(traced.grad_enabled)
        leaves = [found_by_key.get((slot, source)) for source in traced.in_slots]
    gradient = [
        torch.zeros_like(primal) if leaf is None else leaf for leaf, primal in zip(leaves, traced.in_leaves, strict=True)
    ]
    slots = [active_slot(tape, leaf) for leaf in gradient]
    run = replace(traced, out_leaves=gradient, out_spec=space.spec, out_slots=slots)
    return HessianMap(traced.output(), run, space, traced), traced.aux


def hessian_transform(func: Callable[..., Any], argnums: Argnums, has_aux: bool) -> Callable[..., Any]:
    """The function that ``hessian(func, layout="operator")`` returns."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        found, aux = hessian_map(func, args, argnums, has_aux, kwargs)
        return (found, aux) if has_aux else found

    return entry_point(wrapper, func)


__all__ = ["HessianMap", "hessian_map", "hessian_transform"]
