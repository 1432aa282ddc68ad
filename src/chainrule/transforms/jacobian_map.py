"""The Jacobian of a recorded run as a linear map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from chainrule.dispatch import entry_point
from chainrule.plan.algebra import Expression, Jacobian
from chainrule.transforms.arguments import Argnums, function_name, resolve_argnums, tree_flatten
from chainrule.transforms.linear_map import LinearMap
from chainrule.transforms.map_frame import Frame
from chainrule.transforms.spaces import Space
from chainrule.transforms.steps import refuse_hidden
from chainrule.transforms.tensor_hooks import refuse_hooks
from chainrule.transforms.trace import Traced, trace


class JacobianMap(LinearMap):
    """The Jacobian of a recorded run.

    Attributes:
        output: what the function returned.
    """

    def __init__(self, traced: Traced, in_space: Space, *, symmetric: bool = False) -> None:
        super().__init__(Space.of(traced.out_leaves, traced.out_spec), in_space, symmetric=symmetric)
        self.run = traced
        self.output = traced.output()

    def _expression(self, frame: Frame) -> Expression:
        traced = self.run
        offset = frame.place(traced.tape)
        return Jacobian(
            tuple(slot + offset for slot in traced.in_slots),
            tuple(None if slot is None else slot + offset for slot in traced.out_slots),
        )

    def _push(self, leaves: list[torch.Tensor], columns: int | None) -> list[torch.Tensor]:
        traced, space = self.run, self.out_space
        after = () if columns is None else (columns,)
        found: dict[Any, torch.Tensor | None] = {}
        if any(slot is not None for slot in traced.out_slots):
            found = traced.run("push", seeds=tuple(traced.in_slots), tensors=tuple(leaves))
        results = [None if slot is None else found.get(slot) for slot in traced.out_slots]
        return [space.zeros(n, space.dtypes[n], after=after) if r is None else r for n, r in enumerate(results)]

    def _pull(self, leaves: list[torch.Tensor], columns: int | None) -> list[torch.Tensor]:
        traced, space = self.run, self.in_space
        after = () if columns is None else (columns,)
        pairs = [(slot, leaf) for slot, leaf in zip(traced.out_slots, leaves, strict=True) if slot is not None]
        found: dict[Any, torch.Tensor | None] = {}
        if pairs:
            found = traced.run("pull", seeds=tuple(slot for slot, _ in pairs), tensors=tuple(leaf for _, leaf in pairs))
        results = [found.get(slot) for slot in traced.in_slots]
        return [
            space.zeros(n, space.dtypes[n], after=after) if r is None else r if columns is None else r.movedim(0, -1)
            for n, r in enumerate(results)
        ]


def linear_map(
    func: Callable[..., Any], *primals: Any, argnums: Argnums | None = None, has_aux: bool = False, **kwargs: Any
) -> Any:
    """The Jacobian of ``func`` at ``primals``, as an object; ``func`` runs once.

    Args:
        func: a function of tensors that returns tensors (any pytree), or ``(output, aux)`` with ``has_aux``.
        primals: its positional arguments.
        argnums: which of them are differentiated; an int, or a tuple or list of ints; all by default. The map takes a tuple
            with an entry for each; where ``argnums`` is an int, or there is only one primal, it takes that entry itself.
        has_aux: whether ``func`` returns a pair whose second entry is passed through.
        kwargs: passed to ``func``, not differentiated.

    Returns:
        The :class:`LinearMap`, or ``(map, aux)``. The output of ``func`` is its attribute ``output``. The record of the run
        is kept as long as the map lives, and refers to the primals: do not write to them in between.

    Raises:
        RuntimeError: if arguments or outputs cannot be differentiated, or are complex.

    Example:
        >>> import torch, chainrule
        >>> J = chainrule.linear_map(lambda x: torch.sin(x[1:] * x[:-1]), torch.zeros(4))
        >>> J.shape
        (3, 4)
        >>> J @ torch.ones(4)
        tensor([0., 0., 0.])

    Source: the algebra of structured maps follows Rader, Lyons and Kidger, *Lineax: unified linear solves and linear
    least-squares in JAX and Equinox* (2023).
    """
    if not primals:
        raise RuntimeError(f"linear_map({function_name(func)}): expected at least one positional argument")
    if argnums is None:
        argnums = 0 if len(primals) == 1 else tuple(range(len(primals)))
    found, aux = jacobian_map(func, primals, argnums, has_aux, kwargs, "linear_map")
    return (found, aux) if has_aux else found


def jacobian_map(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    argnums: Argnums,
    has_aux: bool,
    kwargs: dict[str, Any],
    name: str,
    *,
    respect_no_grad: bool = True,
) -> tuple[JacobianMap, Any]:
    """Run a function and return the map of its Jacobian, and the auxiliary output.

    Raises:
        RuntimeError: if arguments or outputs cannot be differentiated, or are complex.
    """
    where, single = resolve_argnums(argnums, len(args), name)
    traced = trace(func, args, where, kwargs, name, has_aux=has_aux, respect_no_grad=respect_no_grad)
    refuse_hidden(traced.hidden, name)
    refuse_hooks(traced.tape, f"{name} as a linear map")
    return JacobianMap(traced, input_space(traced, args, where, single, func, name)), traced.aux


def input_space(
    traced: Traced, args: Sequence[Any], where: tuple[int, ...], single: bool, func: Callable[..., Any], name: str
) -> Space:
    """The space of the differentiated arguments of a run, whose outputs are checked as well.

    Raises:
        RuntimeError: if there are none, or a tensor is complex or no floating-point tensor.
    """
    label = f"{name}({function_name(func)})"
    if not traced.in_leaves:
        raise RuntimeError(f"{label}: expected at least one Tensor among the differentiated arguments")
    for kind, leaves in (("inputs", traced.in_leaves), ("outputs", traced.out_leaves)):
        for number, leaf in enumerate(leaves):
            if not leaf.dtype.is_floating_point:
                raise RuntimeError(
                    f"{label}: expected all {kind} to be real and floating-point, got {leaf.dtype} at flattened position {number}"
                )
    spec = tree_flatten(args[where[0]])[1] if single else traced.in_spec
    return Space.of(traced.in_leaves, spec)


def operator_transform(
    func: Callable[..., Any], argnums: Argnums, has_aux: bool, name: str, *, respect_no_grad: bool = True
) -> Callable[..., Any]:
    """The function that ``jacobian(func, layout="operator")`` and its like return."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        found, aux = jacobian_map(func, args, argnums, has_aux, kwargs, name, respect_no_grad=respect_no_grad)
        return (found, aux) if has_aux else found

    return entry_point(wrapper, func)


__all__ = ["JacobianMap", "input_space", "jacobian_map", "linear_map", "operator_transform"]
