"""Blocks of code without some or all of the modes that are on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch

from chainrule.dispatch import LightMode, _at, _count, _count_functions, _pop, _pop_function, _push, _push_function


@contextmanager
def unseen() -> Iterator[None]:
    """Run a block without any dispatch or function mode, but with the classes that torch functions leave a call to."""
    modes_off = [_pop_function() for _ in range(_count_functions())]
    try:
        with torch._C._DisableTorchDispatch():
            yield
    finally:
        for mode in reversed(modes_off):
            _push_function(mode)


@contextmanager
def outside() -> Iterator[None]:
    """Run a block outside of all modes; those that it enters itself see it."""
    functions = [_pop_function() for _ in range(_count_functions())]
    taken = [_pop(None) for _ in range(_count())]
    try:
        yield
    finally:
        for mode in reversed(taken):
            _push(mode)
        for mode in reversed(functions):
            _push_function(mode)


class modes_inside_off:  # noqa: N801 - used like torch.no_grad
    """Run a block without the modes inside of a mode."""

    __slots__ = ("_mode", "_taken")

    def __init__(self, mode: LightMode) -> None:
        self._mode = mode

    def __enter__(self) -> None:
        self._taken: list[Any] = []
        while _at(_count() - 1) is not self._mode:
            self._taken.append(_pop(None))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for mode in reversed(self._taken):
            _push(mode)


class without_mode(modes_inside_off):  # noqa: N801 - used like torch.no_grad
    """Run a block without a mode and those inside of it."""

    __slots__ = ()

    def __enter__(self) -> None:
        super().__enter__()
        self._taken.append(_pop(None))


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


@contextmanager
def without_modes() -> Iterator[None]:
    """Run a block without any of the dispatch modes that are on."""
    with ExitStack() as stack:
        for _ in range(_count()):
            stack.enter_context(without_innermost())
        yield
