"""How torch's dispatch modes are entered and left here: without the bookkeeping that costs a microsecond or two a time."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch.utils import _python_dispatch as modes
from torch.utils._python_dispatch import TorchDispatchMode

Function = TypeVar("Function", bound=Callable[..., Any])

_dynamo = torch._C._dynamo.eval_frame
_SKIPPED = _dynamo._FrameExecStrategy(_dynamo._FrameAction.SKIP, _dynamo._FrameAction.SKIP)

_push = torch._C._push_on_torch_dispatch_stack
_pop = torch._C._pop_torch_dispatch_stack


def hide_from_dynamo(function: Function) -> Function:
    """Keep ``torch.compile`` out of a function and of what it calls: it runs as it is, between compiled parts.

    This is what ``torch.compiler.disable`` does, without its cost per call and without importing the compiler.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    _dynamo.set_code_exec_strategy(function.__code__, _SKIPPED)  # type: ignore[attr-defined]
    return function


class LightMode(TorchDispatchMode):
    """A dispatch mode that stays out of compiled regions, may be entered again inside itself, and is cheap to enter."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch wraps the handler in a function that costs about 2 µs per op.
        return False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled regions run as they are."""
        return True

    def __init__(self) -> None:
        self._flags: list[tuple[bool, bool]] = []

    def __enter__(self) -> Self:
        self._flags.append((modes._is_in_torch_dispatch_mode, modes._is_in_non_infra_torch_dispatch_mode))
        modes._is_in_torch_dispatch_mode = modes._is_in_non_infra_torch_dispatch_mode = True
        _push(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        modes._is_in_torch_dispatch_mode, modes._is_in_non_infra_torch_dispatch_mode = self._flags.pop()
        _pop(None)


class without_innermost:  # noqa: N801 - used like torch.no_grad
    """Run a block without the innermost mode."""

    __slots__ = ("_mode",)

    def __enter__(self) -> Any:
        self._mode = _pop(None)
        return self._mode

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _push(self._mode)
