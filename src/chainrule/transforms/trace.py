"""Running a function under a tape: fresh aliases in, outputs and their slots out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_map

from chainrule.batching.tensor import BatchTensor
from chainrule.capture.tape import Tape
from chainrule.execute.batched import same_stored
from chainrule.execute.engine import execute
from chainrule.plan.planner import Request
from chainrule.rules.table import POLICY
from chainrule.transforms.arguments import flatten_inputs, flatten_outputs, refuse_inside_torch_func, split_aux, tree_unflatten

aten = torch.ops.aten


@dataclass
class Traced:
    """One recorded run.

    Attributes:
        tape: the finished tape.
        in_leaves: the user's input tensors that are differentiated.
        in_spec: their structure.
        in_slots: their slots.
        out_leaves: the outputs as the user gets them.
        out_spec: their structure.
        out_slots: slots of the outputs, None for one that does not depend on the inputs.
        aux: the auxiliary output.
    """

    tape: Tape
    in_leaves: list[torch.Tensor]
    in_spec: TreeSpec
    in_slots: list[int]
    out_leaves: list[torch.Tensor]
    out_spec: TreeSpec
    out_slots: list[int | None]
    aux: Any
    grad_enabled: bool

    def output(self) -> Any:
        """The outputs in the user's structure."""
        return tree_unflatten([self.release(leaf) for leaf in self.out_leaves], self.out_spec)

    def release(self, leaf: torch.Tensor) -> torch.Tensor:
        """An output as it leaves the transform: without a graph when gradients are off around it."""
        if not self.grad_enabled and leaf.requires_grad:
            return leaf.detach()
        return leaf

    def run(self, kind: str, order: str = "auto", seeds: tuple[int, ...] = (), tensors: tuple[torch.Tensor, ...] = (),
            cast: str = "input", outputs: list[int] | None = None) -> dict[Any, torch.Tensor | None]:
        """Execute a request on the tape."""
        wanted = [slot for slot in self.out_slots if slot is not None] if outputs is None else outputs
        request = Request(kind, tuple(self.in_slots), tuple(wanted), order, seeds, cast)
        return execute(self.tape, request, tensors)


def fresh_alias(tensor: torch.Tensor) -> torch.Tensor:
    """A new tensor object for the same value and memory: the identity by which this transform knows its input."""
    if tensor.__class__ is BatchTensor and (again := same_stored(tensor)) is not None:
        return again
    return aten.alias.default(tensor)


def trace(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    argnums: tuple[int, ...],
    kwargs: dict[str, Any],
    transform: str,
    *,
    has_aux: bool = False,
    respect_no_grad: bool = True,
) -> Traced:
    """Run ``function(*args, **kwargs)`` under a tape whose inputs are the tensors in ``args[argnums]``."""
    refuse_inside_torch_func(transform)
    in_leaves, in_spec = flatten_inputs(tuple(args[number] for number in argnums), transform)
    grad_enabled = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [fresh_alias(leaf) for leaf in in_leaves]
        tape = Tape(POLICY, respect_no_grad=respect_no_grad)
        in_slots = [tape.add_input(alias) for alias in aliases]
        called = list(args)
        for number, value in zip(argnums, tree_unflatten(aliases, in_spec), strict=True):
            called[number] = value
        with tape.recording():
            output = function(*called, **kwargs)
    aux = None
    if has_aux:
        output, aux = split_aux(output, transform, function)
    out_leaves, out_spec = flatten_outputs(output, transform, function)
    out_slots = [_active_slot(tape, leaf) for leaf in out_leaves]
    if not grad_enabled:
        aux = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) and leaf.requires_grad else leaf, aux)
    return Traced(tape, in_leaves, in_spec, in_slots, out_leaves, out_spec, out_slots, aux, grad_enabled)


def _active_slot(tape: Tape, leaf: torch.Tensor) -> int | None:
    slot = tape.slot_of(leaf)
    return slot if slot is not None and tape.active[slot] else None
