"""Where torch.autograd meets a tape: ``torch.autograd.grad`` and ``autograd.Function`` inside a transformed function."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from chainrule.capture.tape import Tape

_STATE = threading.local()


@contextmanager
def entered(tape: Tape) -> Iterator[None]:
    """Make ``tape`` the innermost one of this thread."""
    stack = tapes()
    stack.append(tape)
    try:
        yield
    finally:
        stack.pop()


def tapes() -> list[Tape]:
    """The tapes that are recording in this thread, outermost first."""
    stack: list[Tape] | None = getattr(_STATE, "tapes", None)
    if stack is None:
        stack = _STATE.tapes = []
    return stack
