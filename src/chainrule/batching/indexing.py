"""Indices that hold numbers which differ between the samples: ``table[i]``, ``table[:, i]``, ``table[i, 1:, j] = value``.

Torch reads an integer tensor without dimensions in an index as a Python number, which a tensor that is mapped has not. Here
such a call becomes ops that take the tensor as it is; each sample gets what a number in its place would give it. A mask without
dimensions is read so, too: where it is written through, a sample either gets the values or keeps its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from chainrule.batching.tensor import BatchTensor
from chainrule.dispatch import OTHERWISE
from chainrule.rules.batching_indexing import DYNAMIC_MASK

_getitem: Callable[..., Tensor] = Tensor.__getitem__
_setitem: Callable[..., None] = Tensor.__setitem__

#: The dtypes of numbers in an index; uint8 is a mask there.
_INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8})

_MASKS = frozenset({torch.bool, torch.uint8})

#: Indices that are the same for all samples.
_NEVER_MAPPED = frozenset({int, slice, Tensor, type(None), type(Ellipsis)})


def is_mapped(index: Any) -> bool:
    """Whether an index holds an integer or a single truth value that differs between samples, and otherwise what is read here."""
    if index.__class__ in _NEVER_MAPPED:
        return False
    if index.__class__ is not tuple:
        return index.__class__ is BatchTensor and (_is_number(index) or _is_truth(index)) and _differs(index)
    found = False
    for item in index:
        if item.__class__ is BatchTensor and item.dim() == 0:
            differs = _differs(item)
            if item.dtype not in _INTEGERS and not (differs and item.dtype in _MASKS):
                return False
            found = found or differs
        elif not (item is None or item is Ellipsis or item.__class__ in (slice, int) or isinstance(item, Tensor)):
            return False
        elif isinstance(item, Tensor) and item.dim() == 0 and item.dtype not in _INTEGERS:
            return False
    return found


def _is_number(item: Any) -> bool:
    return isinstance(item, Tensor) and item.dim() == 0 and item.dtype in _INTEGERS


def _is_truth(item: Any) -> bool:
    return isinstance(item, Tensor) and item.dim() == 0 and item.dtype in _MASKS


def _differs(tensor: Any) -> bool:
    while tensor.__class__ is BatchTensor:
        if tensor.batched:
            return True
        tensor = tensor.inner
    return False


def get(tensor: Tensor, index: Any) -> Tensor:
    """``tensor[index]`` for an index of which :func:`is_mapped` is true.

    Raises:
        RuntimeError: if the index holds a truth value, with which the result has one entry or none.
    """
    if any(map(_is_truth, _items(index))):
        raise RuntimeError(DYNAMIC_MASK)
    view, indices, numbers = _split(tensor, index)
    if len(indices) == 1:
        ((dim, position),) = indices.items()
        # Negative ones count from the end.
        position = position.to(torch.int64)
        position = torch.where(position < 0, position + view.shape[dim], position).reshape(1)
        return torch.index_select(view, dim, position).squeeze(dim)
    view, listed = _adjacent(view, indices, numbers)
    found: Tensor = torch.ops.aten.index.Tensor(view, listed)
    return found


def put(tensor: Tensor, index: Any, value: Any) -> None:
    """``tensor[index] = value`` for an index of which :func:`is_mapped` is true.

    Raises:
        RuntimeError: if the index holds a truth value beside other tensors.
    """
    if any(map(_is_truth, _items(index))):
        _put_where(tensor, _items(index), value)
        return
    view, indices, numbers = _split(tensor, index)
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=view.dtype, device=view.device)
    value = value.to(view.dtype)
    if len(indices) == 1:
        ((dim, position),) = indices.items()
        position = position.to(torch.int64)
        position = torch.where(position < 0, position + view.shape[dim], position).reshape(1)
        shape = [*view.shape[:dim], *view.shape[dim + 1 :]]
        while value.dim() > len(shape) and value.shape[0] == 1:
            value = value.squeeze(0)
        view.index_copy_(dim, position, value.expand(shape).unsqueeze(dim))
        return
    view, listed = _adjacent(view, indices, numbers)
    torch.ops.aten.index_put_.default(view, listed, value)


def _items(index: Any) -> tuple[Any, ...]:
    return index if index.__class__ is tuple else (index,)


def _put_where(tensor: Tensor, items: tuple[Any, ...], value: Any) -> None:
    """Write where a truth value is true. It makes a dimension of one entry, at its place, that the value may have, too."""
    tensors = [number for number, item in enumerate(items) if isinstance(item, Tensor)]
    if len(tensors) > 1:
        raise RuntimeError(DYNAMIC_MASK)
    place = tensors[0]
    truth = items[place] != 0 if items[place].dtype is torch.uint8 else items[place]
    whole = tensor[(*items[:place], None, *items[place + 1 :])]
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=whole.dtype, device=whole.device)
    value = value.to(whole.dtype)
    while value.dim() > whole.dim() and value.shape[0] == 1:
        value = value.squeeze(0)
    whole.copy_(torch.where(truth, value.expand(whole.shape), whole))


def _split(tensor: Tensor, index: Any) -> tuple[Tensor, dict[int, Tensor], list[int]]:
    """The tensor with the basic parts of an index taken.

    Returns:
        That view, the tensors of the index by the dimension of the view that they begin at, and those dimensions that have
        a number.
    """
    items = _items(index)
    used = sum(_dimensions(item) for item in items)
    basic: list[Any] = []
    indices: dict[int, Tensor] = {}
    numbers: list[int] = []
    dim = 0
    for item in items:
        if isinstance(item, Tensor):
            indices[dim] = item
            if item.dim() == 0:
                numbers.append(dim)
            basic.extend([slice(None)] * _dimensions(item))
            dim += _dimensions(item)
            continue
        basic.append(item)
        dim += tensor.dim() - used if item is Ellipsis else int(item.__class__ is not int)
    whole = slice(None)
    plain = all([item.__class__ is slice and item == whole for item in basic]) and len(basic) <= tensor.dim()
    return (tensor if plain else tensor[tuple(basic)]), indices, numbers


def _dimensions(item: Any) -> int:
    """How many dimensions a part of an index takes."""
    if item is None or item is Ellipsis:
        return 0
    return item.dim() if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) else 1


def _adjacent(view: Tensor, indices: dict[int, Tensor], numbers: list[int]) -> tuple[Tensor, list[Tensor | None]]:
    """The same with the dimensions that have numbers before the first one that has more: there they are no dimensions at all.

    Where tensors in an index stand apart, torch moves what they give to the front, and numbers are not among those.
    """
    others = [dim for dim in indices if dim not in numbers]
    order: list[int] = [dim for dim in range(view.dim()) if not others or dim not in numbers]
    if others:
        place = order.index(others[0])
        order[place:place] = numbers
        if order != list(range(view.dim())):
            view = view.permute(order)
    listed: list[Tensor | None] = []
    dims = iter(order)
    for dim in dims:
        item = indices.get(dim)
        listed.append(item)
        for _ in range(0 if item is None else _dimensions(item) - 1):
            next(dims)
    while listed[-1] is None:
        listed.pop()
    return view, listed


def _getting(tensor: Tensor, index: Any) -> Callable[[], Tensor] | None:
    return partial(get, tensor, index) if is_mapped(index) else None


def _putting(tensor: Tensor, index: Any, value: Any) -> Callable[[], None] | None:
    return partial(put, tensor, index, value) if is_mapped(index) else None


OTHERWISE[_getitem] = _getting
OTHERWISE[_setitem] = _putting


def _get_of_mapped(self: BatchTensor, index: Any) -> Tensor:
    """As for every tensor; an integer that differs between the samples may be an index too."""
    return get(self, index) if is_mapped(index) else _getitem(self, index)


def _put_into_mapped(self: BatchTensor, index: Any, value: Any) -> None:
    """As for every tensor; an integer that differs between the samples may be an index too."""
    if is_mapped(index):
        put(self, index, value)
    else:
        _setitem(self, index, value)


# Where the level stands among the function modes it takes the call by OTHERWISE; elsewhere the tensor's own methods do.
BatchTensor.__getitem__ = _get_of_mapped  # type: ignore[assignment,method-assign]
BatchTensor.__setitem__ = _put_into_mapped  # type: ignore[assignment,method-assign]
