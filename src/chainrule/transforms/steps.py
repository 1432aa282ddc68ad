"""Forward mode inside of reverse mode, where a part of the function runs under ``torch.no_grad()``.

Such steps are constants for reverse mode, and forward mode sees them, with what torch computes for their tangents still under
``no_grad``: a constant for the reverse mode around it. Tangents are therefore pushed from one stretch of the run to the
next, those of hidden steps with gradients off, instead of being planned as a whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

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
    """

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape
        self.records: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run an op."""
        first = len(self._tape.records)
        out = func(*args, **(kwargs or {}))
        if not torch.is_grad_enabled():
            self.records.update(range(first, len(self._tape.records)))
        return out


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


def run_in_steps(tape: Tape, hidden: set[int], request: Request, tensors: Sequence[Tensor]) -> dict[Any, Tensor | None]:
    """What :func:`chainrule.execute.engine.execute` gives for a push, or a Jacobian, stretch by stretch.

    Args:
        tape: the finished tape.
        hidden: the places of the records that were made under ``torch.no_grad()``.
        request: what is asked.
        tensors: the tangents of a push.

    Raises:
        RuntimeError: for another kind of request.
    """
    if request.kind not in ("push", "jacobian"):
        refuse_hidden(hidden, "a forward transform")
    if request.kind == "push":
        return _pushed(tape, hidden, request.outputs, dict(zip(request.seeds, tensors, strict=True)))
    found: dict[Any, Tensor | None] = {}
    for source in dict.fromkeys(request.inputs):
        value = tape.values[source]
        count = value.numel()
        columns = torch.eye(count, dtype=value.dtype, device=value.device).reshape((*value.shape, count))
        for slot, column in _pushed(tape, hidden, request.outputs, {source: columns}).items():
            found[slot, source] = None if column is None else column.reshape((*tape.values[slot].shape, *value.shape))
    return found


def _pushed(tape: Tape, hidden: set[int], outputs: Sequence[int], tangents: dict[int, Tensor]) -> dict[Any, Tensor | None]:
    """The tangents of the outputs, by slot."""
    numbered = list(enumerate(tape.records))
    last_use = {slot: number for number, record in numbered for slot in argument_slots(record)}
    last_use.update((slot, len(numbered)) for slot in outputs)
    for is_hidden, stretch in itertools.groupby(numbered, lambda item: item[0] in hidden):
        part = list(stretch)
        first, last = part[0][0], part[-1][0]
        records = [record for _, record in part]
        sources = sorted({slot for record in records for slot in argument_slots(record) if slot in tangents})
        targets = tuple([slot for record in records for slot in record.outputs if slot >= 0 and last_use.get(slot, -1) > last])
        if not sources or not targets:
            continue
        piece = tape.fork()
        piece.records, piece.inputs = records, sources
        piece.key.append(("stretch", first, last))
        request = Request("push", tuple(sources), targets, "auto", tuple(sources), "output")
        with torch.no_grad() if is_hidden else nullcontext():
            found = execute(piece, request, [tangents[slot] for slot in sources])
        tangents.update({slot: tangent for slot, tangent in found.items() if tangent is not None})
    return {slot: tangents.get(slot) for slot in outputs}


__all__ = ["HiddenSteps", "is_inside_reverse", "refuse_hidden", "run_in_steps"]
