"""Python's garbage collector stays off while a plan is made: plans are many small objects that all live until it is done."""

from __future__ import annotations

import gc
from types import TracebackType


class postponed_collection:  # noqa: N801 - used like torch.no_grad
    """Run a block without the garbage collector.

    The collector looks at all new objects again and again as their number grows; none of a plan's is garbage before the end.
    """

    __slots__ = ("_was_on",)

    def __enter__(self) -> None:
        self._was_on = gc.isenabled()
        gc.disable()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._was_on:
            gc.enable()


__all__ = ["postponed_collection"]
