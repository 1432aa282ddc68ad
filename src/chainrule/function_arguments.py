"""Torch's functions that name dimensions and sizes, as a user spells them, and the op that each spelling is.

``x.view(2, 3)``, ``x.view((2, 3))`` and ``x.view(size=(2, 3))`` are one op with one list of arguments. A *reading* takes the
arguments of a call and returns that op with its positional arguments, or None for spellings that it leaves to torch's
dispatcher (which also reports the errors).
"""

from __future__ import annotations

import string
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch.backends import opt_einsum as _opt_einsum

from chainrule.function_schemas import by_schema

aten = torch.ops.aten

#: From the arguments of a function to the op and its arguments; those that are given by name only may follow, as sorted pairs.
Reading = Callable[[tuple[Any, ...], dict[str, Any]], tuple[Any, ...] | None]


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
        names = ("shifts", "dims")[len(args) - 1 :]
        if len(kwargs) != len(names) or not kwargs.keys() <= {*names}:
            return None
        args = (*args, *[kwargs[name] for name in names])
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

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        if len(args) != 2 or not (args[1].__class__ in (int, float) or isinstance(args[1], torch.Tensor)):
            return None
        if not kwargs:
            return op, args
        factor = kwargs.get("alpha") if len(kwargs) == 1 else None
        return (op, args, (("alpha", factor),)) if factor.__class__ in (int, float) else None

    return read


def _put(op: Any) -> Reading:
    """Values at places that tensors name."""

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        if kwargs or len(args) != 3 or not isinstance(args[1], (tuple, list)):
            return None
        if not all([isinstance(item, torch.Tensor) for item in (*args[1], args[2])]):
            return None
        return op, (args[0], [*args[1]], args[2])

    return read


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


opt_einsum: Any = _opt_einsum

#: The orders in which torch contracts three tensors or more, by equation, shapes and strategy.
_PATHS: dict[Any, tuple[int, ...]] = {}


def _contracted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """An einsum; of three tensors or more in the order that torch chooses."""
    if kwargs or len(args) < 2 or args[0].__class__ is not str:
        return None
    operands = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
    if not operands or not all([isinstance(operand, torch.Tensor) for operand in operands]):
        return None
    if len(operands) < 3 or not opt_einsum.enabled or not opt_einsum.is_available():
        return aten.einsum.default, (args[0], [*operands])
    shapes = tuple([operand.shape for operand in operands])
    key = args[0], shapes, opt_einsum.strategy
    path = _PATHS.get(key)
    if path is None:
        try:
            chosen = opt_einsum.get_opt_einsum().contract_path(args[0], *shapes, shapes=True, optimize=opt_einsum.strategy)[0]
        except (ValueError, IndexError, KeyError, TypeError):  # torch says what is wrong
            return None
        if len(_PATHS) >= 1024:
            _PATHS.clear()
        path = _PATHS[key] = tuple([place for pair in chosen for place in pair])
    return aten.einsum.default, (args[0], [*operands]), (("path", path),)


def _moments(op: Any) -> Reading:
    """A variance or a standard deviation, in each of its spellings."""

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        # var(unbiased), var(dim, unbiased, keepdim), and by name var(dim, correction, keepdim)
        if len(args) > 4 or not _MOMENTS.issuperset(kwargs) or not args[0].is_floating_point():
            return None
        given = args[1:]
        if given and given[0].__class__ is bool:
            given = (None, *given)
            if len(given) > 2 or kwargs:
                return None
        if len(given) + len(kwargs) > 3 or ("unbiased" in kwargs and "correction" in kwargs):
            return None
        dims = given[0] if given else kwargs.get("dim")
        unbiased = given[1] if len(given) > 1 else kwargs.get("unbiased")
        keep = given[2] if len(given) > 2 else kwargs.get("keepdim", False)
        correction = kwargs.get("correction") if unbiased is None else int(unbiased)
        if dims.__class__ is int:
            dims = [dims]
        plain = dims is None or (isinstance(dims, (tuple, list)) and all([dim.__class__ is int for dim in dims]))
        if not plain or keep.__class__ is not bool or unbiased.__class__ not in (bool, type(None)):
            return None
        if correction.__class__ not in (int, type(None)):
            return None
        pairs = (*((("correction", correction),) if correction is not None else ()), *((("keepdim", True),) if keep else ()))
        read = op, (args[0],) if dims is None else (args[0], [*dims])
        return (*read, pairs) if pairs else read

    return read


_MOMENTS = frozenset({"dim", "unbiased", "keepdim", "correction"})


def _or_in_place(op: Any) -> Reading:
    """A function of one tensor that may write its result to that."""
    return lambda args, kwargs: (op, args) if len(args) == 1 and kwargs == {"inplace": True} else None


def _choice(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """A choice between tensors, as a method of the first."""
    if kwargs or len(args) != 3 or not all([isinstance(item, torch.Tensor) for item in args]):
        return None
    return aten.where.self, (args[1], args[0], args[2])


def _normed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """``torch.norm``, which is a vector norm of the dimensions for all orders that are numbers."""
    names = ("p", "dim", "keepdim", "out", "dtype")
    values = dict(zip(names, args[1:], strict=False))
    if len(args) > 6 or values.keys() & kwargs.keys() or not kwargs.keys() <= {*names, "input"}:
        return None
    values |= kwargs
    order, dim = values.get("p", "fro"), values.get("dim")
    if values.get("out") is not None or values.get("dtype") is not None or "input" in kwargs:
        return None
    if order == "fro":
        if not (dim is None or dim.__class__ is int or (isinstance(dim, (tuple, list)) and len(dim) <= 2)):
            return None
        order = 2
    return _vector_norm(args[0], order, dim, values.get("keepdim", False))


def _normed_by_method(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """The method, which takes no place to put the result."""
    return _normed((*args[:4], None, *args[4:]) if len(args) > 4 else args, kwargs)


def _linalg_normed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """``torch.linalg.norm`` where it is a vector norm."""
    names = ("ord", "dim", "keepdim")
    values = dict(zip(names, args[1:], strict=False))
    if len(args) > 4 or values.keys() & kwargs.keys() or not kwargs.keys() <= {*names}:
        return None
    values |= kwargs
    order, dim = values.get("ord"), values.get("dim")
    if order is None:
        order = 2.0
    elif dim.__class__ is not int:
        return None
    return _vector_norm(args[0], order, dim, values.get("keepdim", False))


def _vector_norm(tensor: Any, order: Any, dim: Any, keep: Any) -> tuple[Any, ...] | None:
    if order.__class__ not in (int, float) or keep.__class__ is not bool or not tensor.is_floating_point():
        return None
    if not tensor.is_cpu or tensor.layout is not torch.strided:
        return None
    dims = [dim] if dim.__class__ is int else dim
    if dims is not None and not (isinstance(dims, (tuple, list)) and all([item.__class__ is int for item in dims])):
        return None
    op = aten.linalg_vector_norm.default
    if keep:
        return op, (tensor, order, dims if dims is None else [*dims], True)
    if dims is not None:
        return op, (tensor, order, [*dims])
    return op, (tensor,) if order == 2 and order.__class__ is int else (tensor, order)


def _power_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """``2 ** x``."""
    plain = not kwargs and len(args) == 2 and args[1].__class__ in (int, float)
    return (aten.pow.Scalar, (args[1], args[0])) if plain else None


def _one_over(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """``1 / x``: torch multiplies the reciprocal by the number, which changes nothing here."""
    plain = not kwargs and len(args) == 2 and args[1].__class__ in (int, float) and args[1] == 1
    return (aten.reciprocal.default, (args[0],)) if plain and args[0].is_floating_point() else None


def _widened(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    if kwargs or len(args) != 2 or not isinstance(args[1], torch.Tensor):
        return None
    return aten.expand.default, (args[0], [*args[1].shape])


def _viewed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    if kwargs or len(args) != 2 or not isinstance(args[1], torch.Tensor):
        return None
    return aten.view.default, (args[0], [*args[1].shape])


def _squeezed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    if kwargs or len(args) > 2:
        return None
    if len(args) == 1:
        return aten.squeeze.default, args
    return (aten.squeeze.dim, args) if args[1].__class__ is int else None


def _one(op: Any) -> Reading:
    """A function of one tensor."""
    return lambda args, kwargs: (op, args) if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor) else None


def _pair(op: Any) -> Reading:
    """A function of two tensors of one dtype."""

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        if kwargs or len(args) != 2 or not all([isinstance(item, torch.Tensor) for item in args]):
            return None
        return (op, args) if args[0].dtype is args[1].dtype else None

    return read


def _spread(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """Tensors that are broadcast against each other."""
    tensors = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
    if kwargs or not tensors or not all([isinstance(item, torch.Tensor) for item in tensors]):
        return None
    return aten.broadcast_tensors.default, ([*tensors],)


def _grid(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """A grid with matrix indexing; without a word on that torch warns."""
    if kwargs != {"indexing": "ij"} or not args or not all([isinstance(item, torch.Tensor) for item in args]):
        return None
    return aten.meshgrid.default, ([*args],)


def _compared(op: Any) -> Reading:
    """A loss of two tensors of one shape."""

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        reduction = _REDUCTIONS.get(kwargs.get("reduction", "mean"))
        if len(args) != 2 or reduction is None or any(kwargs.get(name) is not None for name in kwargs.keys() - {"reduction"}):
            return None
        first, second = args
        if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)) or first.shape != second.shape:
            return None
        return (op, (first, second, reduction)) if first.dtype is second.dtype else None

    return read


_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def _dropped(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    share = kwargs.get("p")
    if len(args) != 1 or kwargs.get("inplace") is not False or share.__class__ is not float or not 0 <= share <= 1:
        return None
    training = kwargs.get("training")
    return (aten.dropout.default, (args[0], share, training)) if training.__class__ is bool else None


def _contracted_over(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """``torch.tensordot``: over as many of the last and the first dimensions, or over those that are named."""
    if not 2 <= len(args) <= 3 or not kwargs.keys() <= {"dims", "out"} or kwargs.get("out") is not None:
        return None
    if not all([isinstance(item, torch.Tensor) for item in args[:2]]) or (len(args) == 3 and "dims" in kwargs):
        return None
    dims, rank = args[2] if len(args) == 3 else kwargs.get("dims", 2), args[0].dim()
    if dims.__class__ is int:
        if not 0 <= dims <= min(rank, args[1].dim()):
            return None
        pair = [*range(rank - dims, rank)], [*range(dims)]
    elif isinstance(dims, (tuple, list)) and len(dims) == 2:
        first, second = ([item] if item.__class__ is int else item for item in dims)
        for item in (first, second):
            if not isinstance(item, (tuple, list)) or not all([dim.__class__ is int for dim in item]):
                return None
        pair = [*first], [*second]
    else:
        return None
    return _as_einsum(args[0], args[1], [dim % max(rank, 1) for dim in pair[0]], [dim % max(args[1].dim(), 1) for dim in pair[1]])


def _as_einsum(one: torch.Tensor, two: torch.Tensor, first: list[int], second: list[int]) -> tuple[Any, ...] | None:
    """A sum over pairs of dimensions."""
    rank = one.dim() + two.dim()
    if one.dtype is not two.dtype or len(first) != len(second) or rank > len(string.ascii_letters):
        return None
    if len({*first}) != len(first) or len({*second}) != len(second) or (first and not (one.dim() and two.dim())):
        return None
    pairs = [*zip(first, second, strict=True)]
    if any(one.shape[a] != two.shape[b] for a, b in pairs):
        return None
    names, others = [*string.ascii_letters[: one.dim()]], [*string.ascii_letters[one.dim() : rank]]
    for a, b in pairs:
        others[b] = names[a]
    kept = [name for dim, name in enumerate(names) if dim not in first]
    kept += [name for dim, name in enumerate(others) if dim not in second]
    return aten.einsum.default, (f"{''.join(names)},{''.join(others)}->{''.join(kept)}", [one, two])


def _distances(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    if len(args) != 2 or not kwargs.keys() <= {"p", "compute_mode"}:
        return None
    order = kwargs.get("p", 2.0)
    return (aten.cdist.default, (*args, order)) if order.__class__ is float else None


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
        torch.broadcast_to: _sizes(aten.expand.default),
        tensor.broadcast_to: _sizes(aten.expand.default),
        tensor.T.__get__: _turned,
        tensor.mT.__get__: _swapped,
        tensor.__getitem__: _chosen,
        tensor.index_put_: _put(aten.index_put_.default),
        tensor.index_put: _put(aten.index_put.default),
        tensor.where: _choice,
        tensor.norm: _normed_by_method,
        torch.norm: _normed,
        torch.linalg.norm: _linalg_normed,
        tensor.__rpow__: _power_of,
        tensor.__rdiv__: _one_over,
        tensor.expand_as: _widened,
        tensor.view_as: _viewed,
        torch.special.xlogy: _pair(aten.xlogy.Tensor),
        torch.special.expit: _one(aten.sigmoid.default),
        torch.broadcast_tensors: _spread,
        torch.meshgrid: _grid,
        torch.tensordot: _contracted_over,
        torch.cdist: _distances,
        F.dropout: _dropped,
        F.relu: _or_in_place(aten.relu_.default),
        F.silu: _or_in_place(aten.silu_.default),
        F.mse_loss: _compared(aten.mse_loss.default),
        F.l1_loss: _compared(aten.l1_loss.default),
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
        "squeeze": _squeezed,
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
    for name in ("var", "std"):
        found[getattr(torch, name)] = found[getattr(tensor, name)] = _moments(getattr(aten, name).correction)
    joined: dict[Any, Any] = dict.fromkeys((torch.cat, torch.concat, torch.concatenate), Joined(aten.cat.default))
    joined[torch.stack] = Joined(aten.stack.default)
    found |= joined
    found |= {torch.vstack: _beside(0), torch.row_stack: _beside(0), torch.hstack: _beside(1)}
    for function, op in ((F.softmax, aten._softmax.default), (F.log_softmax, aten._log_softmax.default)):
        found[function] = _without(_along(op, False), {"_stacklevel": 3, "dtype": None})
    return found


#: By the function as torch shows it to a function mode.
READINGS = _table()
