"""Functions that ``torch.compile`` wraps run uncompiled inside of a transform: dynamo can trace neither tensors nor modes there.

The wrapper asks for torch's stance (``torch.compiler.set_stance``) at every call. Once dynamo is there, that is an object which
answers ``"force_eager"`` to threads in which a transform is at work, and what the user has set to all others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class StanceHere:
    """The user's stance, but for threads in which a transform is at work.

    Args:
        stance: what the user has set.
        at_work: whether a transform is at work in this thread.
    """

    def __init__(self, stance: Any, at_work: Callable[[], bool]) -> None:
        self._stance = stance
        self._at_work = at_work

    @property
    def stance(self) -> Any:
        """The name of the stance."""
        return "force_eager" if self._at_work() else self._stance.stance

    def __getattr__(self, name: str) -> Any:
        """Everything else is the user's."""
        return getattr(self._stance, name)


def run_uncompiled(dynamo: Any, at_work: Callable[[], bool]) -> None:
    """Have wrapped functions run as they are where a transform is at work.

    Args:
        dynamo: the module ``torch._dynamo.eval_frame``; None if it is not loaded.
        at_work: whether a transform is at work in this thread.
    """
    stance = getattr(dynamo, "_stance", None)
    if stance is not None and stance.__class__ is not StanceHere:
        dynamo._stance = StanceHere(stance, at_work)


__all__ = ["StanceHere", "run_uncompiled"]
