"""Settings that hold inside of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def setting(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Inside, the variable has the value; afterwards the one that it had before."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


__all__ = ["setting"]
