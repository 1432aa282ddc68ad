"""Torch's functions that name dimensions and sizes, as a user spells them, and the op that each spelling is.

``x.view(2, 3)``, ``x.view((2, 3))`` and ``x.view(size=(2, 3))`` are one op with one list of arguments. A *reading* takes the
arguments of a call and returns that op with its positional arguments, or None for spellings that it leaves to torch's
dispatcher (which also reports the errors).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from chainrule.function_schemas import by_schema

aten = torch.ops.aten

#: From the arguments of a function to the op and its arguments.
Reading = Callable[[tuple[Any, ...], dict[str, Any]], tuple[Any, tuple[Any, ...]] | None]


def _sizes(op: Any) -> Reading:
    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]] | None:
        if kwargs or len(args) < 2:
            return None
        sizes = args[1] if len(args) == 2 and args[1].__class__ is not int else args[1:]
        if not isinstance(sizes, (tuple, list)) or not all([size.__class__ is int for size in sizes]):
            return None
        return op, (args[0], list(sizes))

    return read


def _places(op: Any, count: int) -> Reading:
    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]] | None:
        if kwargs or len(args) != count + 1 or not all([place.__class__ is int for place in args[1:]]):
            return None
        return op, args

    return read


def _swapped(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]] | None:
    return (aten.transpose.int, (args[0], -2, -1)) if len(args) == 1 and args[0].dim() > 1 else None


def _turned(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]] | None:
    return (aten.transpose.int, (args[0], 0, 1)) if len(args) == 1 and args[0].dim() == 2 else None


def _narrowed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]] | None:
    if kwargs or len(args) != 4 or not all([place.__class__ is int for place in args[1:]]):
        return None
    tensor, dim, start, length = args
    rank = tensor.dim()
    if not -rank <= dim < rank or start < 0 or length < 0 or start + length > tensor.shape[dim]:
        return None
    return aten.slice.Tensor, (tensor, dim % rank, start, start + length, 1)


def _moved(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]] | None:
    if kwargs or len(args) != 3 or not all([place.__class__ is int for place in args[1:]]):
        return None
    rank = args[0].dim()
    if not all([-rank <= place < rank for place in args[1:]]):
        return None
    order = [*range(rank)]
    order.insert(args[2] % rank, order.pop(args[1] % rank))
    return aten.permute.default, (args[0], order)


def _beside(dim: int) -> Reading:
    """Tensors of two dimensions or more side by side."""
    joined = Joined(aten.cat.default)

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]] | None:
        read = joined((*args, dim), {}) if len(args) == 1 and not kwargs else None
        return read if read is not None and read[1][0][0].dim() > 1 else None

    return read


def _flattened(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]] | None:
    if kwargs or len(args) > 3:
        return None
    first, last = args[1] if len(args) > 1 else 0, args[2] if len(args) > 2 else -1
    if first.__class__ is not int or last.__class__ is not int:
        return None
    shape = args[0].shape
    rank = len(shape)
    first, last = (first + rank if first < 0 else first), (last + rank if last < 0 else last)
    if not 0 <= first < last < rank:
        return None
    return aten.reshape.default, (args[0], [*shape[:first], shape[first : last + 1].numel(), *shape[last + 1 :]])


def _along(op: Any, *after: Any) -> Reading:
    """A function of one dimension, without a dtype."""

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]] | None:
        if kwargs:
            if len(args) != 1 or len(kwargs) != 1 or "dim" not in kwargs:
                return None
            args = (args[0], kwargs["dim"])
        if len(args) != 2 or args[1].__class__ is not int or not args[0].is_floating_point():
            return None
        return op, (*args, *after)

    return read


def _without(reading: Reading, neutral: dict[str, Any]) -> Reading:
    """A reading of a function that is always shown some named arguments, which mean nothing by default."""

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]] | None:
        return reading(args, {name: item for name, item in kwargs.items() if name not in neutral or item != neutral[name]})

    return read


def _rolled(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]] | None:
    """A roll along named dimensions."""
    if kwargs:
        if len(args) != 2 or len(kwargs) != 1 or "dims" not in kwargs:
            return None
        args = (*args, kwargs["dims"])
    if len(args) != 3:
        return None
    if args[1].__class__ is args[2].__class__ is int:
        return aten.roll.default, (args[0], [args[1]], [args[2]])
    lists = []
    for item in args[1:]:
        items = [item] if item.__class__ is int else item
        if not isinstance(items, (tuple, list)) or not items or not all([number.__class__ is int for number in items]):
            return None
        lists.append([*items])
    return (aten.roll.default, (args[0], *lists)) if len(lists[0]) == len(lists[1]) else None


def _computed(op: Any) -> Reading:
    """A tensor computed with another one, or a number, in place."""

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]] | None:
        if kwargs or len(args) != 2 or not (args[1].__class__ in (int, float) or isinstance(args[1], torch.Tensor)):
            return None
        return op, args

    return read


def _put(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]] | None:
    """A write at places that tensors name."""
    if kwargs or len(args) != 3 or not isinstance(args[1], (tuple, list)):
        return None
    if not all([isinstance(item, torch.Tensor) for item in (*args[1], args[2])]):
        return None
    return aten.index_put_.default, (args[0], [*args[1]], args[2])


class Joined(NamedTuple):
    """The reading of a function of a list of tensors of one dtype and a dimension; the compiled handlers have it in C, too.

    Attributes:
        op: the op.
    """

    op: Any

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]] | None:
        """Read a call."""
        if kwargs:
            if len(args) != 1 or len(kwargs) != 1 or "dim" not in kwargs:
                return None
            args = (args[0], kwargs["dim"])
        if not 1 <= len(args) <= 2 or not isinstance(args[0], (tuple, list)) or not args[0]:
            return None
        first, dim = args[0][0], args[1] if len(args) > 1 else 0
        if dim.__class__ is not int or not isinstance(first, torch.Tensor):
            return None
        dtype, rank = first.dtype, first.dim()
        for item in args[0]:
            if not isinstance(item, torch.Tensor) or item.dtype is not dtype or item.dim() != rank:
                return None
        return self.op, ([*args[0]], dim)


def _contracted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]] | None:
    """An einsum of one or two tensors: of more, torch chooses an order first."""
    if kwargs or len(args) < 2 or args[0].__class__ is not str:
        return None
    operands = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
    if not 1 <= len(operands) <= 2 or not all([isinstance(operand, torch.Tensor) for operand in operands]):
        return None
    return aten.einsum.default, (args[0], [*operands])


_OVER = frozenset({"dim", "keepdim"})


class Over(NamedTuple):
    """The reading of a reduction over dimensions, without a dtype; likewise.

    Attributes:
        op: the op.
        whole: the op of a call without dimensions; None where that is left to torch.
    """

    op: Any
    whole: Any = None

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]] | None:
        """Read a call."""
        if not kwargs and len(args) == 1:
            return None if self.whole is None else (self.whole, args)
        if not 1 <= len(args) <= 3 or not _OVER.issuperset(kwargs) or not args[0].is_floating_point():
            return None
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
        if dims.__class__ is int:
            dims = [dims]
        elif not isinstance(dims, (tuple, list)) or not dims or not all([dim.__class__ is int for dim in dims]):
            return None
        return (self.op, (args[0], list(dims), keep)) if keep.__class__ is bool else None


_WHOLE = slice(None)


def _chosen(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]] | None:
    """An index of which one part is a number, a slice or None, and the others are whole dimensions."""
    tensor, index = args
    rank, dim = tensor.dim(), 0
    if index.__class__ is int:
        return (aten.select.int, (tensor, 0, index)) if rank and -tensor.shape[0] <= index < tensor.shape[0] else None
    if index.__class__ is tuple:
        parts = [n for n, item in enumerate(index) if item.__class__ is not slice or item != _WHOLE]
        if len(parts) != 1 or len(index) > rank + (index[parts[0]] is None):
            return None
        dim = parts[0]
        index = index[dim]
    if not (index.__class__ is int or index.__class__ is slice or index is None):
        return None
    if index is None:
        return aten.unsqueeze.default, (tensor, dim)
    if not rank:
        return None
    size = tensor.shape[dim]
    if isinstance(index, int):
        return (aten.select.int, (tensor, dim, index)) if -size <= index < size else None
    start = 0 if index.start is None else index.start
    stop = sys.maxsize if index.stop is None else index.stop
    step = 1 if index.step is None else index.step
    if not (start.__class__ is stop.__class__ is step.__class__ is int) or step < 1:
        return None
    if start == 0 and stop >= size and step == 1:  # the tensor itself
        return None
    return aten.slice.Tensor, (tensor, dim, start, stop, step)


def _table() -> dict[Any, Reading]:
    tensor: Any = torch.Tensor
    found: dict[Any, Reading] = {
        **by_schema(),
        tensor.contiguous: lambda args, kwargs: None if kwargs or len(args) > 1 else (aten.contiguous.default, args),
        tensor.view: _sizes(aten.view.default),
        tensor.permute: _sizes(aten.permute.default),
        tensor.expand: _sizes(aten.expand.default),
        tensor.T.__get__: _turned,
        tensor.mT.__get__: _swapped,
        tensor.__getitem__: _chosen,
        tensor.index_put_: _put,
        torch.einsum: _contracted,
    }
    for name in ("add", "sub", "mul", "div"):
        found[getattr(tensor, f"{name}_")] = _computed(getattr(aten, f"{name}_").Tensor)
    readings: dict[str, Any] = {
        "reshape": _sizes(aten.reshape.default),
        "transpose": _places(aten.transpose.int, 2),
        "swapaxes": _places(aten.transpose.int, 2),
        "swapdims": _places(aten.transpose.int, 2),
        "narrow": _narrowed,
        "movedim": _moved,
        "unsqueeze": _places(aten.unsqueeze.default, 1),
        "squeeze": _places(aten.squeeze.dim, 1),
        "t": _turned,
        "flatten": _flattened,
        "roll": _rolled,
        "softmax": _along(aten._softmax.default, False),
        "log_softmax": _along(aten._log_softmax.default, False),
        "sum": Over(aten.sum.dim_IntList, aten.sum.default),
        "mean": Over(aten.mean.dim, aten.mean.default),
        "amax": Over(aten.amax.default),
        "amin": Over(aten.amin.default),
    }
    for name, reading in readings.items():
        found[getattr(torch, name)] = found[getattr(tensor, name)] = reading
    joined: dict[Any, Any] = dict.fromkeys((torch.cat, torch.concat, torch.concatenate), Joined(aten.cat.default))
    joined[torch.stack] = Joined(aten.stack.default)
    found |= joined
    found |= {torch.vstack: _beside(0), torch.row_stack: _beside(0), torch.hstack: _beside(1)}
    for function, op in ((F.softmax, aten._softmax.default), (F.log_softmax, aten._log_softmax.default)):
        found[function] = _without(_along(op, False), {"_stacklevel": 3, "dtype": None})
    return found


#: By the function as torch shows it to a function mode.
READINGS = _table()
