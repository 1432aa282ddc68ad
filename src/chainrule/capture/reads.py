"""What a recorded call may not do with values: take them out of torch, or ask for what differs from call to call."""

from __future__ import annotations

import sys
from typing import Any

import torch

from chainrule.capture.whole_recorder import WholeRecorder
from chainrule.dispatch import FunctionWatch


class NoReads(FunctionWatch):
    """Refuses the conversions to Python values and to other libraries that torch's dispatcher does not see.

    Args:
        recorder: knows which tensors are computed from the inputs.
    """

    def __init__(self, recorder: WholeRecorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, if it leaves the values where they are."""
        if self._recorder.paused:
            return super().__torch_function__(func, types, args, kwargs)
        if func in _NUMBERS and any(map(self._recorder.depends, _tensors(args[:1]))):
            self._recorder.refuse_read(func.__name__)
        if func in _HIDDEN_CALLS or (
            func in _CONVERSIONS and any(map(self._recorder.depends, _tensors(_read_by(func, args, kwargs or {}))))
        ):
            name = getattr(func, "__name__", func)
            self._recorder.refuse(
                f"{name} took the values of a tensor out of torch, or put others in; what Python or NumPy "
                "computes would not be computed again. Compute it with torch, or call the function without compile."
            )
        if func in _PLACES and not _asked_by_chainrule() and any(map(self._recorder.depends, _tensors(args[:1]))):
            self._recorder.refuse(
                f"{getattr(func, '__name__', func)} asks where in memory a tensor lies, which is another place in each call "
                "(pickle and torch.save ask, too). Call the function without compile."
            )
        if func in _GRAPHS and args and not _asked_by_chainrule() and self._recorder.is_given(args[0]):
            self._recorder.refuse(
                f"{_GRAPHS[func]} of an argument was read, which is not the same in each call. Call the function without compile."
            )
        if func == _GRAD and not _asked_by_chainrule():
            return self._gradient_of(args[0])
        return super().__torch_function__(func, types, args, kwargs)

    def _gradient_of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The `grad` of a tensor, which is what it is for this call."""
        if self._recorder.is_given(tensor):
            self._recorder.refuse(
                "the grad of an argument was read, which is not the same in each call. Give it as an argument, or call the "
                "function without compile."
            )
        found = tensor.grad
        if not self._recorder.is_computed(tensor) and (found is None or not self._recorder.is_computed(found)):
            self._recorder.asked.setdefault(id(tensor), (tensor, found))
        return found


_GRAD = torch.Tensor.grad.__get__  # type: ignore[union-attr]

#: Read the values of tensors (in lists of tensors, too) where the dispatcher does not see it.
_MAKERS = frozenset(
    {
        torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor, torch.Tensor.new, torch.sparse_coo_tensor,
        torch.sparse_compressed_tensor, torch.sparse_csr_tensor, torch.sparse_csc_tensor, torch.sparse_bsr_tensor,
        torch.sparse_bsc_tensor,
    }
)  # fmt: skip
_INDEXED = frozenset({torch.Tensor.__getitem__, torch.Tensor.__setitem__})
_SPLITS = frozenset({torch.tensor_split, torch.Tensor.tensor_split})
_CONVERSIONS = frozenset(
    {
        torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__, torch.Tensor.__dlpack__, torch.Tensor.__deepcopy__,
        torch.Tensor.__reduce_ex__, torch.Tensor.__repr__, torch.Tensor.__format__, *_MAKERS, *_SPLITS,
        *_INDEXED,
    }
)  # fmt: skip

#: Read one value, for Python or for torch's constructors by type (``torch.Tensor([x[0]])``), which the dispatcher does not see.
_NUMBERS = frozenset(getattr(torch.Tensor, f"__{name}__") for name in ("float", "int", "index", "complex", "bool"))

#: Where a tensor lies in memory.
_PLACES = frozenset(
    {
        torch.Tensor.data_ptr, torch.Tensor.untyped_storage, torch.Tensor.storage, torch.Tensor.storage_offset,
        torch.Tensor._typed_storage,  # type: ignore[attr-defined]
    }
)  # fmt: skip

#: Properties by which a tensor is tied to what happened before.
_GRAPHS: dict[Any, str] = {
    getattr(torch.Tensor, name).__get__: name for name in ("is_leaf", "grad_fn", "_version", "output_nr")
}

#: Compute with values, or replace them, where the dispatcher does not see it.
_HIDDEN_CALLS = frozenset({torch.Tensor.apply_, torch.Tensor.map_, torch.Tensor.data.__set__})  # type: ignore[attr-defined]


def _asked_by_chainrule() -> bool:
    """Whether a handler of this package, and not the function, has called what is looked at."""
    caller: str = sys._getframe(2).f_globals.get("__name__", "")
    return caller.startswith("chainrule.")


def _read_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a conversion reads."""
    if func in _SPLITS:
        return [*args[1:2], *kwargs.values()]
    if func in _MAKERS:
        # A tensor itself is copied by an op; what is inside of a list is read.
        return [item for item in (*args, *kwargs.values()) if isinstance(item, (list, tuple))]
    if func in _INDEXED:
        index = args[1]
        return [item for item in index if isinstance(item, (list, tuple))] if isinstance(index, (list, tuple)) else []
    return args[:1]


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [tensor for item in tree for tensor in _tensors(item)] if isinstance(tree, (list, tuple)) else []
