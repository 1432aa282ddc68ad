"""Further arguments of a solver's function (SciPy's ``args``) as inputs of what is replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from chainrule.maps.staging import Program, reads

_FLOAT64 = np.dtype(np.float64)
_from_numpy = torch.from_numpy

#: Leaves of a form: numbers (Python's and NumPy's), arrays, tensors.
_FLOAT, _NUMBER, _ARRAY, _TENSOR = "float", "number", "array", "tensor"

#: Arguments of these classes are a part of the form.
_STATIC = (int, bool, str, bytes, type(None), np.int64, np.int32, np.bool_, torch.dtype, torch.device)

#: Of tensors with more numbers, a change is read off their version.
_COMPARED = 1 << 12


class Unknown(Exception):  # noqa: N818 - never reaches a user
    """An argument is none that a replay could take."""


class Keywords:
    """Arguments by name, as one further argument."""

    __slots__ = ("given",)

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given


class Form:
    """How further arguments are made of numbers, arrays and tensors; equal forms take the same.

    Args:
        node: the arguments, with kinds in the place of leaves.
        kinds: those kinds, in order.
    """

    __slots__ = ("_hash", "floats", "kinds", "node")

    def __init__(self, node: Any, kinds: tuple[str, ...]) -> None:
        self.node, self.kinds = node, kinds
        #: Where numbers are, counted from the end.
        self.floats = tuple(n - len(kinds) for n, kind in enumerate(kinds) if kind in (_FLOAT, _NUMBER))
        self._hash = hash(node)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Form) and self.node == other.node

    def tracked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function of leading arguments and leaves, with tensors in the place of numbers."""
        node, count = self.node, len(self.kinds)

        def tracked(*given: Any) -> Any:
            first = len(given) - count
            return function(*given[:first], *_rebuilt(node, iter(given[first:])))

        return tracked

    def plain(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function of leading arguments and leaves, with the numbers themselves, and copies of arrays."""
        node, kinds = self.node, self.kinds
        count = len(kinds)

        def plain(*given: Any) -> Any:
            first = len(given) - count
            leaves = map(_original, kinds, given[first:])
            return function(*given[:first], *_rebuilt(node, leaves))

        return plain


def _original(kind: str, leaf: torch.Tensor) -> Any:
    if kind is _TENSOR:
        return leaf
    if kind is _ARRAY:
        return leaf.clone()
    return leaf.item() if kind is _FLOAT else np.float64(leaf.item())


def _rebuilt(node: Any, leaves: Iterator[Any]) -> Any:
    if node.__class__ is str:
        return next(leaves)
    kind, value, parts = node
    if kind is tuple:
        return tuple([_rebuilt(part, leaves) for part in parts])
    if kind is Keywords:
        return Keywords(dict(zip(value, [_rebuilt(part, leaves) for part in parts], strict=True)))
    return value


class ExtraArguments:
    """The further arguments of one solve.

    Args:
        args: the arguments.
        are_static: whether numbers are a part of the form.

    Raises:
        Unknown: there is one that a replay could not take.

    Attributes:
        args: the arguments, as given.
        form: their form.
        agreed: whether the function is known to give the same for tensors in the place of numbers; True without any.
    """

    __slots__ = ("_arrays", "_items", "_named", "agreed", "args", "form")

    def __init__(self, args: tuple[Any, ...], *, are_static: bool) -> None:
        self.args = args
        self._items: list[tuple[str, Any]] = []
        #: Arguments by name, and the dictionary that they may be changed in.
        self._named: tuple[dict[str, Any], tuple[Any, ...]] | None = None
        node = tuple, None, tuple([self._node(item, are_static=are_static, is_outermost=True) for item in args])
        self.form = Form(node, tuple([kind for kind, _ in self._items]))
        self.agreed = not self.form.floats
        #: Numbers as arrays and tensors, which nobody writes to.
        self._arrays = [np.array(item) if kind in (_FLOAT, _NUMBER) else None for kind, item in self._items]

    def _node(self, item: Any, *, are_static: bool, is_outermost: bool = False) -> Any:
        kind = item.__class__
        if kind is float or kind is np.float64:
            if are_static:
                return kind, item, (float(item).hex(),)
            return self._leaf(_FLOAT if kind is float else _NUMBER, item)
        if kind is torch.Tensor:
            return self._leaf(_TENSOR, item)
        # Arrays that are inside of something reach the function as they are.
        if isinstance(item, np.ndarray) and item.dtype.kind == "f" and is_outermost:
            return self._leaf(_ARRAY, item)
        if kind is tuple:
            return tuple, None, tuple([self._node(part, are_static=are_static) for part in item])
        if kind is Keywords and all(key.__class__ is str for key in item.given):
            self._named = item.given, (*item.given.keys(), *item.given.values())
            return kind, tuple(item.given), tuple([self._node(part, are_static=are_static) for part in item.given.values()])
        if kind in _STATIC:
            return kind, item, ()
        raise Unknown

    def _leaf(self, kind: str, item: Any) -> str:
        self._items.append((kind, item))
        return kind

    def are(self, args: tuple[Any, ...]) -> bool:
        """Whether arguments are these, each the same object."""
        mine = self.args
        if self._named is not None:
            given, items = self._named
            now = (*given.keys(), *given.values())
            if len(now) != len(items) or not all([a is b for a, b in zip(now, items, strict=True)]):
                return False
        if args is mine:
            return True
        return len(args) == len(mine) and all([a is b for a, b in zip(args, mine, strict=True)])

    def arrays(self) -> list[np.ndarray] | None:
        """The leaves as contiguous arrays of float64 with what they hold now; None where a tensor is none of that kind."""
        found = []
        for (kind, item), known in zip(self._items, self._arrays, strict=True):
            if known is not None:
                found.append(known)
            elif kind is _ARRAY:
                if item.__class__ is np.ndarray and item.dtype is _FLOAT64 and item.flags.carray:
                    found.append(item)
                else:
                    found.append(np.array(item, dtype=np.float64, order="C", subok=False))
            elif _is_usual(item):
                found.append(item.numpy())
            else:
                return None
        return found

    def tensors(self, *, are_new: bool) -> list[torch.Tensor]:
        """The leaves as tensors.

        Args:
            are_new: whether those of numbers and arrays have memory of their own.
        """
        found = []
        for (kind, item), known in zip(self._items, self._arrays, strict=True):
            if known is not None:
                found.append(_from_numpy(known.copy() if are_new else known))
            elif kind is _TENSOR:
                found.append(item)
            elif are_new or not (item.__class__ is np.ndarray and item.dtype is _FLOAT64 and item.flags.carray):
                found.append(_from_numpy(np.array(item, dtype=np.float64, order="C", subok=False)))
            else:
                found.append(_from_numpy(item))
        return found

    def state(self) -> Any:
        """What tells the values of the leaves from others at another time."""
        return tuple([_state(item) for (kind, item) in self._items if kind is _ARRAY or kind is _TENSOR])


def _is_usual(tensor: torch.Tensor) -> bool:
    return (
        tensor.dtype is torch.float64 and tensor.is_cpu and tensor.layout is torch.strided and not tensor.requires_grad
        and tensor.is_contiguous() and not tensor.is_neg()
    )  # fmt: skip


def _state(item: Any) -> Any:
    if item.__class__ is torch.Tensor:
        if _is_usual(item) and item.numel() <= _COMPARED:
            item = item.numpy()
        else:
            return id(item), None if item.is_inference() else item._version
    return item.shape, item.tobytes()


#: What Python computes with numbers alone otherwise than torch: it raises errors, and has complex results.
_RAISES = frozenset(
    {
        "div", "true_divide", "divide", "reciprocal", "pow", "float_power", "floor_divide", "remainder", "fmod", "round", "floor",
    }
)  # fmt: skip


def only_scales(program: Program, floats: Sequence[int]) -> bool:
    """Whether a recorded program does nothing with its numbers that Python would do otherwise, whatever they are.

    They are combined with tensors of float64 alone, and not divided and raised to powers with each other.

    Args:
        program: the program.
        floats: which of its inputs are numbers.
    """
    numbers = {program.inputs[n] for n in floats if n in program.inputs}
    for instruction in program.instructions:
        read = reads(instruction)
        if numbers.isdisjoint(read):
            continue
        tensors = [slot for slot in (*read, *instruction.outputs) if slot not in program.constants]
        if any(program.kinds[slot][1] != torch.float64 for slot in tensors):
            return False
        if any(program.constants[slot].dtype != torch.float64 for slot in read if slot in program.constants):
            return False
        if numbers.issuperset(read):
            function = program.overloads.get(instruction.function, instruction.function)
            if getattr(function, "__name__", "?").strip("_").split(".")[0] in _RAISES:
                return False
            numbers.update(instruction.outputs)
    return True


def same_values(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether results are the same but for rounding."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    known = expected[expected.isfinite()]
    scale = float(known.abs().max()) if known.numel() else 0.0
    return torch.allclose(found, expected, rtol=1e-10, atol=1e-12 * scale, equal_nan=True)


__all__ = ["ExtraArguments", "Form", "Keywords", "Unknown", "same_values"]
