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


def _node(tensor: torch.Tensor) -> Any:
    """The node of autograd's graph that a tensor comes from, if it may be used there."""
    try:
        return tensor.grad_fn
    except RuntimeError:  # one of several views made at once, of what was written to since
        return None


class OtherObjects:
    """Finds the slot of the value that another tensor object stands for. It holds no values, which the tape may let go."""

    def __init__(self) -> None:
        self._nodes_indexed = 0
        self._by_node: dict[tuple[int, int], int] = {}
        self._memory_indexed = 0
        self._by_memory: dict[Any, int] = {}

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
                self._by_node[id(node), value.output_nr] = slot
        self._nodes_indexed = len(values)
        found = self._by_node.get((id(tensor.grad_fn), tensor.output_nr))
        if found is None or _node(values[found]) is not tensor.grad_fn:
            return None
        return found if values[found].shape == tensor.shape else None


__all__ = ["OtherObjects"]
