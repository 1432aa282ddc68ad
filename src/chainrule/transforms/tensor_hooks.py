"""Torch's hooks inside of a transformed function: ``register_hook`` is heeded as in torch.func, the others are refused.

A tape has no graph of torch's to hang hooks on. A tensor with hooks gets an op of its own on the tape, between what made it and
all that reads it: the identity, which gives cotangents to the hooks on their way back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from chainrule.capture.slots import slot_object
from chainrule.capture.tape import Tape
from chainrule.dispatch import TAKEN, LightMode
from chainrule.rules.tensor_hooks import HOOKED, Hooks

#: The transforms that give cotangents to hooks.
HEEDING = frozenset({"grad", "grad_and_value", "hessian", "jacobian", "jacrev", "vjp"})


def _register_hook(mode: LightMode, tensor: torch.Tensor, hook: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
    """``Tensor.register_hook``, on the innermost tape that the tensor belongs to."""
    found, stored = mode.belongs_to(tensor)
    if found is None or (not found.reverse and tensor.requires_grad):  # a graph of torch's own
        return torch.Tensor.register_hook(tensor, hook)
    if stored is not tensor or not isinstance(found, Tape) or not found.reverse:
        raise RuntimeError(
            "cannot register a hook on a tensor that doesn't require gradient: chainrule gives gradients to the hooks of tensors "
            "in functions of grad, vjp and jacrev, not to those in forward transforms or in a vmap within a derivative"
        )
    slot = found.slot_of(tensor)
    assert slot is not None
    hooks = found.hooks.get(slot)
    if hooks is None:
        hooks = found.hooks[slot] = Hooks()
        found.insert_after(slot, HOOKED, (slot_object(found.add_object(hooks)),))
    handle = RemovableHandle(hooks.functions)
    hooks.functions[handle.id] = hook
    return handle


def _refusing(name: str, way_out: str) -> Callable[..., Any]:
    method = getattr(torch.Tensor, name)

    def refuse(mode: LightMode, tensor: torch.Tensor, *args: Any) -> Any:
        if mode.belongs_to(tensor)[0] is None:
            return method(tensor, *args)
        raise RuntimeError(f"chainrule: Tensor.{name} inside of a transformed function has nothing to act on. {way_out}")

    return refuse


def refuse_hooks(tape: Tape, transform: str) -> None:
    """Refuse a run of which a transform would not heed the hooks.

    Raises:
        RuntimeError: if there are hooks.
    """
    if tape.hooks:
        raise RuntimeError(
            f"{transform}: the function calls Tensor.register_hook, which chainrule heeds in grad, vjp, jacrev and hessian with "
            "dense results, and in what is made of them. Use these, or call the hook's function on the gradient yourself."
        )


def install() -> None:
    """Have the modes take torch's hooks."""
    TAKEN[torch.Tensor.register_hook] = _register_hook
    TAKEN[torch.Tensor.retain_grad] = _refusing(
        "retain_grad",
        "The gradient with respect to an intermediate value is that of a function of it: split the function there, "
        "or add zeros to the value and differentiate with respect to them.",
    )
    TAKEN[torch.Tensor.register_post_accumulate_grad_hook] = _refusing(
        "register_post_accumulate_grad_hook", "Nothing is accumulated in a transform: call the function on its result."
    )


__all__ = ["HEEDING", "install", "refuse_hooks"]
