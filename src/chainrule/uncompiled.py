"""Functions that ``torch.compile`` wraps run uncompiled inside of a transform: dynamo can trace neither tensors nor modes there.

The wrapper asks for torch's stance (``torch.compiler.set_stance``) at every call. Once dynamo is there, that is an object which
answers ``"force_eager"`` to threads in which a transform is at work, and what the user has set to all others.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

_dynamo = torch._C._dynamo.eval_frame
_SKIPPED = _dynamo._FrameExecStrategy(_dynamo._FrameAction.SKIP, _dynamo._FrameAction.SKIP)


def hide_code(code: CodeType) -> None:
    """Keep dynamo out of some code and of what it calls."""
    _dynamo.set_code_exec_strategy(code, _SKIPPED)


def hide_from_dynamo(function: Function) -> Function:
    """Keep ``torch.compile`` out of a function and of what it calls: it runs as it is, between compiled parts.

    This is what ``torch.compiler.disable`` does, without its cost per call and without importing the compiler.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    hide_code(function.__code__)  # type: ignore[attr-defined]
    return function


def refusal_of_operators(which: Any) -> str:
    """What is said of torch's operators that take functions, which are no ops."""
    return (
        f"chainrule cannot transform torch's operator {which} (torch.cond, torch.while_loop, scan ...). Use torch.where, or "
        "branch in Python: a transform follows the branch that is taken."
    )


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
