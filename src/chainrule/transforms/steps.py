"""Forward mode inside of reverse mode, where a part of the function runs under ``torch.no_grad()``.

Such steps are constants for reverse mode, and forward mode sees them, with what torch computes for their tangents still under
``no_grad``: a constant for the reverse mode around it. Tangents are therefore pushed from one stretch of the run to the
next, those of hidden steps with gradients off, instead of being planned as a whole. A hidden write changes what a tangent holds
and not what the reverse mode knows of it, as with the primal.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from chainrule.capture.tape import Tape
from chainrule.dispatch import LightMode
from chainrule.execute.engine import execute
from chainrule.plan.graph import argument_slots
from chainrule.plan.planner import Request

Tensor = torch.Tensor


class HiddenSteps(LightMode):
    """Notes which records of a tape are made under ``torch.no_grad()``.

    Args:
        tape: the tape, which is recording.

    Attributes:
        records: the places of these records.
        written: for the slots of what was written then, those of what had stood there.
    """

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape
        self.records: set[int] = set()
        self.written: dict[int, int] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run an op.

        Raises:
            RuntimeError: if a hidden step writes a constant over all of a tensor that depends on the inputs.
        """
        tape = self._tape
        if torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        targets = self._targets(func, args, kwargs or {})
        for item in tree_leaves((args, kwargs)):
            if isinstance(item, Tensor):
                # A view of what was written is read anew, which is no hidden step.
                tape.slot_of(item)
        before = [tape.slot_of(tensor) for tensor in targets]
        first = len(tape.records)
        out = func(*args, **(kwargs or {}))
        made = range(first, len(tape.records))
        self.records.update(made)
        found = {slot for number in made for slot in tape.records[number].outputs}
        for tensor, old in zip(targets, before, strict=True):
            if old is None or old in self._made or not tape.active[old]:
                continue
            new = tape.slot_of(tensor)
            if new is None or not tape.active[new]:
                raise RuntimeError(
                    f"{func} writes a constant under torch.no_grad() over a tensor that depends on the inputs: a reverse "
                    "transform around a forward one keeps the derivative of the tangent there, which is not computed. Write "
                    "it outside of no_grad, or make a new tensor."
                )
            if new != old:
                self.written[new] = old
                found.discard(new)
        self._made |= found
        return out

    def _targets(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors that an op writes to, and those that they are views of."""
        if not func._schema.is_mutable or torch.Tag.inplace_view in func.tags:
            return []
        targets: dict[int, Tensor] = {}
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            item = args[place] if place < len(args) else kwargs.get(argument.name)
            for tensor in item if isinstance(item, (list, tuple)) else (item,):
                if isinstance(tensor, Tensor):
                    targets.update((id(t), t) for t in self._tape.alias.chain(tensor))
        return list(targets.values())


def is_inside_reverse() -> bool:
    """Whether a transform is running that takes steps under ``torch.no_grad()`` for constants."""
    modes = (torch._C._get_dispatch_stack_at(place) for place in range(torch._C._len_torch_dispatch_stack()))
    return any(isinstance(mode, Tape) and mode.respect_no_grad for mode in modes)


def refuse_hidden(hidden: set[int], name: str) -> None:
    """Refuse what is not computed stretch by stretch.

    Raises:
        RuntimeError: if there are hidden steps.
    """
    if hidden:
        raise RuntimeError(
            f"{name}: a part of the function runs under torch.no_grad(), and a reverse transform around it takes that for "
            "constant. There only jvp, linearize, and jacfwd and hessian with the dense layout can do that."
        )


def run_in_steps(tape: Tape, steps: HiddenSteps, request: Request, tensors: Sequence[Tensor]) -> dict[Any, Tensor | None]:
    """What :func:`chainrule.execute.engine.execute` gives for a push, or a Jacobian, stretch by stretch.

    Args:
        tape: the finished tape.
        steps: which records were made under ``torch.no_grad()``, and what they wrote to.
        request: what is asked.
        tensors: the tangents of a push.

    Raises:
        RuntimeError: for another kind of request.
    """
    if request.kind not in ("push", "jacobian"):
        refuse_hidden(steps.records, "a forward transform")
    if request.kind == "push":
        return _pushed(tape, steps, request.outputs, dict(zip(request.seeds, tensors, strict=True)))
    found: dict[Any, Tensor | None] = {}
    for source in dict.fromkeys(request.inputs):
        value = tape.values[source]
        count = value.numel()
        columns = torch.eye(count, dtype=value.dtype, device=value.device).reshape((*value.shape, count))
        for slot, column in _pushed(tape, steps, request.outputs, {source: columns}).items():
            found[slot, source] = None if column is None else column.reshape((*tape.values[slot].shape, *value.shape))
    return found


def _pushed(tape: Tape, steps: HiddenSteps, outputs: Sequence[int], tangents: dict[int, Tensor]) -> dict[Any, Tensor | None]:
    """The tangents of the outputs, by slot."""
    numbered = list(enumerate(tape.records))
    last_use = {slot: number for number, record in numbered for slot in argument_slots(record)}
    last_use.update((slot, len(numbered)) for slot in outputs)
    pieces, ended = [], 0
    for number, record in numbered:
        pieces.append((number in steps.records, ended))
        for slot in record.outputs:
            if slot in steps.written:
                # The tangent of what was written is needed as soon as it is known: a stretch ends there.
                ended += 1
                last_use[steps.written[slot]] = max(last_use.get(steps.written[slot], -1), number)
                last_use.setdefault(slot, number)
    for (is_hidden, _), stretch in itertools.groupby(numbered, lambda item: pieces[item[0]]):
        part = list(stretch)
        first, last = part[0][0], part[-1][0]
        records = [record for _, record in part]
        sources = sorted({slot for record in records for slot in argument_slots(record) if slot in tangents})
        targets = tuple([slot for record in records for slot in record.outputs if slot >= 0 and last_use.get(slot, -1) > last])
        if sources and targets:
            piece = tape.fork()
            piece.records, piece.inputs = records, sources
            piece.key.append(("stretch", first, last))
            request = Request("push", tuple(sources), targets, "auto", tuple(sources), "output")
            with torch.no_grad() if is_hidden else nullcontext():
                found = execute(piece, request, [tangents[slot] for slot in sources])
            tangents.update({slot: tangent for slot, tangent in found.items() if tangent is not None})
        for slot in records[-1].outputs:
            if (old := tangents.get(steps.written.get(slot, -1))) is not None:
                tangents[slot] = _written_over(old, tangents.get(slot))
    return {slot: tangents.get(slot) for slot in outputs}


def _written_over(old: Tensor, new: Tensor | None) -> Tensor:
    """A tangent that now holds ``new`` (None: zeros), and whose derivative is that of ``old``."""
    made = old.clone()
    with torch.no_grad():
        if new is None:
            made.zero_()
        else:
            made.copy_(new)
    return made


__all__ = ["HiddenSteps", "is_inside_reverse", "refuse_hidden", "run_in_steps"]
