"""The recorder: every op that reaches it, written down as a program that can be replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from chainrule.dispatch import LightMode
from chainrule.maps.staging import Program, Staged

aten = torch.ops.aten

#: Ops of which a replay could give something else than the recorded run says.
_UNREPEATABLE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)

_RESHAPES = (aten.view.default, aten._unsafe_view.default)

#: Larger constants (in elements) are made anew in each run: indices and masks, and numbers.
_KEPT = 1 << 17
_SMALL = 64


class Recorder(LightMode):
    """Writes down the ops that reach it as a program.

    Args:
        find: gives the input of the program that a tensor stands for, or None when it is none.

    Attributes:
        program: the program so far.
        known: its values, by the identity of their tensors.
        pure: whether a replay on other inputs computes the same: no op read a value into Python, drew a random number or
            used a tensor of unknown origin.
    """

    def __init__(self, find: Callable[[Program, torch.Tensor], Staged | None]) -> None:
        super().__init__()
        self.program = Program()
        self.program.recorded = True
        self.known: dict[int, Staged] = {}
        self.pure = True
        self._find = find
        # The identities in ``known`` must stay taken.
        self._alive: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an op and append it."""
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            self._prepare_write(func, args, kwargs)
        out = func(*args, **kwargs)
        lowered = self._staged(args)
        named = {name: self._staged((item,))[0] for name, item in kwargs.items()}
        if not (isinstance(out, torch.Tensor) or (isinstance(out, (list, tuple)) and _all_tensors(out))):
            # A value read into Python; ops on dtypes and shapes have no tensor among their arguments.
            self.pure = self.pure and not _staged_in((lowered, tuple(named.values())))
        else:
            if func is aten.as_strided.default or any(tag in func.tags for tag in _UNREPEATABLE):
                self.pure = False
            if func is aten.mul.Tensor and isinstance(args[1], torch.Tensor) and args[0].numel() < args[1].numel():
                lowered = lowered[::-1]  # the larger one first decides how torch walks through the result
            if isinstance(out, torch.Tensor) and self._is_fixed(out, lowered, named):
                same = func is aten.detach.default or func is aten.alias.default
                self.known[id(out)] = lowered[0] if same else self.program.constant(out)
            else:
                self._append(func, lowered, named, out)
        self._alive.append(out)
        return out

    def _prepare_write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A constant that is about to be written to becomes a copy of itself in the program."""
        constants = self.program.constants
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            target = args[position] if position < len(args) else kwargs.get(argument.name)
            for tensor in target if isinstance(target, (list, tuple)) else (target,):
                known = self.known.get(id(tensor))
                if known is None or known.slot not in constants:
                    continue
                memory = tensor.untyped_storage()._cdata
                if sum(other.untyped_storage()._cdata == memory for other in constants.values()) > 1:
                    self.pure = False
                    continue
                constants[known.slot] = kept = tensor.clone()
                self._alive.append(kept)
                copies: dict[int, Staged] = {}
                self.program.append(torch.clone, (known,), {}, tensor, copies)
                for number in [number for number, staged in self.known.items() if staged is known]:
                    self.known[number] = copies[id(tensor)]

    def _append(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        program = self.program
        before = program._slots
        # The strides of a replay may be others: `reshape` makes do with all that `view` did with those of this run.
        function = aten.reshape.default if func in _RESHAPES else func
        program.append(function._op, args, kwargs, out, self.known)
        if func.is_view:
            program.views.update(range(before, program._slots))
        elif func is aten.mul.Tensor:
            # A product with ones (the cotangent of a scalar) is the other factor.
            for one, other in ((args[0], args[1]), (args[1], args[0])):
                if _is_one(program, one) and isinstance(other, Staged) and _same(other.value, out):
                    program.copies[self.known[id(out)].slot] = other.slot
                    break

    def _is_fixed(self, out: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a result is an index, a mask or a small number that is the same in every run: it is kept."""
        number = out.dtype.is_floating_point or out.dtype.is_complex
        if out.numel() > (_SMALL if number else _KEPT) or id(out) in self.known or out.__class__ is not torch.Tensor:
            return False
        constants = self.program.constants
        return all(staged.slot in constants for staged in _staged_in((args, tuple(kwargs.values()))))

    def staged(self, tensor: torch.Tensor) -> Staged | None:
        """What a tensor is in the program: a value of it, an input, or None."""
        found = self.known.get(id(tensor))
        if found is None:
            found = self._find(self.program, tensor)
            if found is not None:
                self.known[id(tensor)] = found
                self._alive.append(tensor)
        return found

    def _staged(self, items: Sequence[Any]) -> tuple[Any, ...]:
        found: list[Any] = []
        for item in items:
            if isinstance(item, torch.Tensor):
                known = self.staged(item)
                if known is None:
                    self.pure = False
                    known = self.known[id(item)] = self.program.constant(item)
                    self._alive.append(item)
                found.append(known)
            elif isinstance(item, (list, tuple)):
                found.append(list(self._staged(item)))
            else:
                found.append(item)
        return tuple(found)


def _is_one(program: Program, item: Any) -> bool:
    if not isinstance(item, Staged):
        return False
    constant = program.constants.get(item.slot)
    return constant is not None and constant.numel() <= _SMALL and bool((constant == 1).all())


def _same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return tensor.shape == other.shape and tensor.dtype == other.dtype and tensor.device == other.device


def _staged_in(tree: Any) -> list[Staged]:
    found: list[Staged] = []
    stack = [tree]
    while stack:
        item = stack.pop()
        if isinstance(item, Staged):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
    return found


def _all_tensors(items: Sequence[Any]) -> bool:
    return all(isinstance(item, torch.Tensor) for item in items)
