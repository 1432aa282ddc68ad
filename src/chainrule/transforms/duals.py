"""The tape that is used while a level of torch's own forward mode is active."""

from __future__ import annotations

from typing import Any

from torch._ops import OpOverload

from chainrule.batching.duals import refuse_duals
from chainrule.capture.schema import Policy
from chainrule.capture.tape import Tape


class WatchfulTape(Tape):
    """A tape that is shown every op, and refuses the dual tensors among their arguments: their tangents would be lost.

    Args:
        policy: as for every tape.
        respect_no_grad: likewise.
        kernels: likewise.
        transform: the transform's name, for the message.
    """

    takes_functions = False

    def __init__(self, policy: Policy, *, respect_no_grad: bool, kernels: bool, transform: str) -> None:
        super().__init__(policy, respect_no_grad=respect_no_grad, kernels=kernels)
        self._transform = transform

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one op and record it."""
        if not self.facts(func).inactive:  # what has no derivative has no tangent in torch either
            refuse_duals((*args, *(kwargs or {}).values()), self._transform)
        return super().__torch_dispatch__(func, types, args, kwargs)


__all__ = ["WatchfulTape"]
