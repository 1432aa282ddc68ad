"""The values of a tape behind tensor objects that were never recorded: torch hands some results back as new objects."""

from __future__ import annotations

from typing import Any

import torch


def _place(tensor: torch.Tensor) -> Any:
    """Where a tensor stands in memory; None if it does not, or without elements."""
    if tensor.layout is not torch.strided or not tensor.numel():
        return None
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return None
    return storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _elements(tensor: torch.Tensor, *, turned: bool = False) -> Any:
    """Which elements of memory a tensor holds (a matrix in `turned` order), whatever its shape; None without elements."""
    if (place := _place(tensor)) is None:
        return None
    storage, offset, shape, strides, dtype = place
    if turned:
        shape, strides = shape[::-1], strides[::-1]
    dims: list[tuple[int, int]] = []
    for size, step in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * step:
            dims[-1] = (dims[-1][0] * size, step)
        else:
            dims.append((size, step))
    return storage, offset, tuple(dims), dtype


def _node(tensor: torch.Tensor) -> Any:
    """The node of autograd's graph that a tensor comes from, if it may be used there."""
    try:
        return tensor.grad_fn
    except RuntimeError:  # one of several views made at once, of what was written to since
        return None


def _key(node: Any, tensor: torch.Tensor) -> tuple[int, int, str]:
    """What tells a result of a graph node. The node itself has a new object in Python each time in some versions of torch."""
    return node._sequence_nr(), tensor.output_nr, node.__class__.__name__


class OtherObjects:
    """Finds the slot of the value that another tensor object stands for. It holds no values, which the tape may let go."""

    def __init__(self) -> None:
        self._nodes_indexed = 0
        self._by_node: dict[tuple[int, int, str], int] = {}
        self._memory_indexed = 0
        self._by_memory: dict[Any, int] = {}
        self._elements_indexed = 0
        self._by_elements: dict[Any, list[int]] = {}

    def by_memory(self, tensor: torch.Tensor, values: list[Any]) -> int | None:
        """A class that torch wraps results in gives new objects for values that were recorded: find them by their memory."""
        for slot in range(self._memory_indexed, len(values)):
            value = values[slot]
            if isinstance(value, torch.Tensor) and (place := _place(value)) is not None:
                self._by_memory[place] = slot
        self._memory_indexed = len(values)
        place = _place(tensor)
        return None if place is None else self._by_memory.get(place)

    def by_node(self, tensor: torch.Tensor, values: list[Any]) -> int | None:
        """Autograd hands saved results back as new tensors of the same graph node: find the value by its node."""
        for slot in range(self._nodes_indexed, len(values)):
            value = values[slot]
            if isinstance(value, torch.Tensor) and (node := _node(value)) is not None:
                self._by_node[_key(node, value)] = slot
        self._nodes_indexed = len(values)
        found = self._by_node.get(_key(tensor.grad_fn, tensor))
        if found is None or _node(values[found]) is not tensor.grad_fn:
            return None
        return found if values[found].shape == tensor.shape else None

    def by_view(self, tensor: torch.Tensor, values: list[Any]) -> tuple[int, bool] | None:
        """Autograd keeps views of the arguments of composite ops: find the value of the same elements.

        Returns:
            Its slot, and whether the tensor is its transpose.
        """
        elements = _elements(tensor)
        if elements is None:
            return None
        for slot in range(self._elements_indexed, len(values)):
            value = values[slot]
            if isinstance(value, torch.Tensor) and (place := _elements(value)) is not None:
                self._by_elements.setdefault(place, []).append(slot)
        self._elements_indexed = len(values)
        found = self._viewed(tensor, elements, values)
        if found is not None:
            return found, False
        if tensor.dim() != 2:
            return None
        found = self._viewed(tensor, _elements(tensor, turned=True), values)
        return None if found is None else (found, True)

    def _viewed(self, tensor: torch.Tensor, elements: Any, values: list[Any]) -> int | None:
        """The slot of a value of these elements, of which the tensor is a view.

        Other tensors of this memory may be constants: those that are no views, or views of something else.
        """
        places = self._by_elements.get(elements)
        if places is None:
            return None
        node = _node(tensor)
        if node is None:
            base = tensor._base
            if base is not None:
                for slot in reversed(places):
                    if base is values[slot] or base is values[slot]._base:
                        return slot
            return None
        for _ in range(_MOST_VIEWS):
            if node is None or len(node.next_functions) != 1:
                break
            node, number = node.next_functions[0]
            for slot in reversed(places):
                if node is not None and _node(values[slot]) is node and values[slot].output_nr == number:
                    return slot
        return None


#: How many views one after the other a composite op makes of an argument.
_MOST_VIEWS = 3

__all__ = ["OtherObjects"]
