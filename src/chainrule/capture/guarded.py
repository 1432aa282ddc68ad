"""A recorder of computations that look at values: what was seen is compared in every replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from chainrule.capture.recorder import Recorder, _is_gather, _staged_in

_BY_VALUE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class OtherCourseError(Exception):
    """A replay saw something else than the recorded run: it never reaches a user."""


class GuardedRecorder(Recorder):
    """Writes down a run with what it read of values and the shapes that followed from them.

    A replay raises :class:`OtherCourseError` as soon as it sees something else; then the run would have taken another course.
    """

    takes_functions = False

    def is_same(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is the same in every run."""
        staged = self.staged(tensor)
        return staged is not None and staged.slot in self.program.constants

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an op and append it."""
        if not any(tag in func.tags for tag in _BY_VALUE) or _is_gather(func, args) or func._schema.is_mutable:
            return super().__torch_dispatch__(func, types, args, kwargs)
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        lowered = self._staged(args)
        named = {name: self._staged((item,))[0] for name, item in kwargs.items()}
        self._alive.append(out)
        tensors = [out] if isinstance(out, torch.Tensor) else list(out) if isinstance(out, tuple) else []
        if all(staged.slot in self.program.constants for staged in _staged_in((lowered, tuple(named.values())))):
            self.known.update((id(tensor), self.program.constant(tensor)) for tensor in tensors)
        elif tensors:
            self.program.append(_sized(func, [t.shape for t in tensors]), lowered, named, out, self.known, keep=True)
        elif out != out:
            self.pure = False
        else:
            self.program.append(_expected(func, out), lowered, named, None, self.known, keep=True)
        return out

    def _is_fixed(self, out: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a result is the same in every run: indices and masks of any size are kept."""
        if out.dtype.is_floating_point or out.dtype.is_complex:
            return super()._is_fixed(out, args, kwargs)
        constants = self.program.constants
        if id(out) in self.known or out.__class__ is not torch.Tensor:
            return False
        return all(staged.slot in constants for staged in _staged_in((args, tuple(kwargs.values()))))


def _sized(func: Callable[..., Any], shapes: Sequence[torch.Size]) -> Callable[..., Any]:
    """An op whose results have to have these shapes."""

    def sized(*args: Any, **kwargs: Any) -> Any:
        found = func(*args, **kwargs)
        for tensor, shape in zip([found] if isinstance(found, torch.Tensor) else found, shapes, strict=True):
            if tensor.shape != shape:
                raise OtherCourseError
        return found

    return sized


def _expected(func: Callable[..., Any], value: Any) -> Callable[..., None]:
    """An op that has to give this value."""

    def expected(*args: Any, **kwargs: Any) -> None:
        if func(*args, **kwargs) != value:
            raise OtherCourseError

    return expected


__all__ = ["GuardedRecorder", "OtherCourseError"]
