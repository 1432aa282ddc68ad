"""Hooks of a user on a tensor: what ``Tensor.register_hook`` makes of the cotangent that arrives there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch

from chainrule.maps.staging import Program, Staged
from chainrule.rules.base import Call, Edge, Rule
from chainrule.rules.families import operator_edge


class HookedOp:
    """Stands on a tape between what made a tensor with hooks and those who read it: the identity, but for cotangents."""

    namespace = "Tensor"
    tags: tuple[Any, ...] = ()

    def name(self) -> str:
        """The name of torch's method."""
        return "register_hook"

    def __repr__(self) -> str:
        """The method."""
        return "Tensor.register_hook"


HOOKED = HookedOp()


class Hooks:
    """The hooks of one tensor.

    Attributes:
        functions: by number, in the order of their registration; torch's handles remove them.
    """

    def __init__(self) -> None:
        self.functions: OrderedDict[int, Callable[[torch.Tensor], torch.Tensor | None]] = OrderedDict()

    def __call__(self, cotangent: torch.Tensor) -> torch.Tensor:
        """What the hooks make of a cotangent.

        Raises:
            RuntimeError: if a hook returns something else than a tensor of the cotangent's shape, or None.
        """
        for function in list(self.functions.values()):
            result = function(cotangent)
            if result is None:
                continue
            if not isinstance(result, torch.Tensor) or result.shape != cotangent.shape:
                found = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
                raise RuntimeError(
                    f"Tensor.register_hook: a hook has to return None or a tensor of the gradient's shape "
                    f"{tuple(cotangent.shape)}, got {found}"
                )
            cotangent = result
        return cotangent


def _pull(rows: torch.Tensor, hooks: Hooks) -> torch.Tensor:
    """Cotangents ``(R, *shape)`` through the hooks, one after the other: a hook need not be linear."""
    return torch.stack([hooks(row).to(rows.dtype) for row in rows.unbind(0)]) if rows.shape[0] else rows


def _linearize(call: Call) -> Iterable[Edge]:
    hooks, source = call.args

    def pull(call: Call, program: Program, rows: Staged, count: int) -> Staged:
        result: Staged = program.call(_pull, rows, call.stage(program, hooks))
        return result

    def push(call: Call, program: Program, rows: Staged, count: int) -> Staged:
        raise RuntimeError(
            "chainrule: Tensor.register_hook acts on gradients, and forward derivatives have none. Use grad, vjp or jacrev."
        )

    yield operator_edge(call, source, push, pull, whole=True)


RULE = Rule("Tensor.register_hook", _linearize, reads=True, kind="opaque")

__all__ = ["HOOKED", "RULE", "HookedOp", "Hooks"]
