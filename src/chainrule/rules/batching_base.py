"""What every batching strategy shares: the ``Batched`` marker and a few helpers.

A strategy is ``strategy(func, args, kwargs, size) -> result``. In ``args`` and ``kwargs`` a tensor that carries
the batch is a `Batched` (batch dimension at physical dimension 0); every other tensor is the same for all
samples. The result uses the same convention. A strategy may return ``NotImplemented``: the caller then tries
torch's decomposition of the op, and at last a loop over the samples.

"Logical" means what the user's function sees (no batch dimension), "physical" what is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from chainrule.shortcuts import configure

BatchStrategy = Callable[[Any, Sequence[Any], dict[str, Any], int], Any]


#: The memory of results that are copies where torch has views, by its address, as long as it lives.
_COPIES: dict[int, StorageWeakRef] = {}
_MOST_COPIES = 4096
configure(copies=_COPIES)

#: How many writes come before it is looked again which of them live: as many as there are, so that a write looks at one or two.
_WRITES = [0]


def _forget_expired() -> None:
    for key in [key for key, known in _COPIES.items() if known.expired()]:
        del _COPIES[key]
    _WRITES[0] = len(_COPIES)


def _innermost(tensor: Tensor) -> Tensor:
    """What stores a tensor of several levels."""
    while getattr(tensor, "is_mapped", False):
        inner: Any = tensor.inner  # type: ignore[attr-defined]
        tensor = inner.value if inner.__class__ is Batched else inner
    return tensor


def stand_for_views(copy: Tensor) -> Tensor:
    """Note that a tensor is a copy where torch has a view: what is written to it would be lost."""
    if len(_COPIES) > _MOST_COPIES:
        _forget_expired()
    stored = _innermost(copy)
    if stored.__class__ is Tensor and stored.layout is torch.strided:
        storage = stored.untyped_storage()
        _COPIES[storage._cdata] = StorageWeakRef(storage)
    return copy


def stands_for_view(value: Tensor) -> bool:
    """Whether a tensor shares the memory of such a copy."""
    if not _COPIES or (value := _innermost(value)).__class__ is not Tensor or value.layout is not torch.strided:
        return False
    known = _COPIES.get(value.untyped_storage()._cdata)
    return known is not None and not known.expired()


def refuse_lost_write(func: Any, value: Tensor) -> None:
    """Raise where a write to a tensor would be to such a copy.

    Raises:
        RuntimeError: if the tensor shares its memory.
    """
    if stands_for_view(value):
        raise RuntimeError(
            f"vmap: {func} writes through a conjugated view (`conj()`, `mH`, or a part), which under chainrule.vmap is a copy. "
            "Write to the tensor itself, or call `conj_physical()` in the place of `conj()`."
        )


def checked_write(strategy: BatchStrategy) -> BatchStrategy:
    """A strategy of an op that writes to its first argument, which refuses what would be lost."""

    def write(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
        if _COPIES and args and args[0].__class__ is Batched:
            refuse_lost_write(func, args[0].value)
            _WRITES[0] -= 1
            if _WRITES[0] < 0:
                _forget_expired()  # writes are quicker where there are none
        return strategy(func, args, kwargs, size)

    return write


class Batched:
    """A physical tensor whose dimension 0 is the batch.

    Attributes:
        value: the tensor.
        dtype, sample: its dtype and the shape of one sample, where it is whole, floating-point and without a graph; may be unset.
        signature: the number of its shape, strides, dtype and device, once it was asked for.

    """

    __slots__ = ("dtype", "sample", "signature", "value")

    dtype: torch.dtype
    sample: tuple[int, ...]
    signature: int

    def __init__(self, value: Tensor) -> None:
        self.value = value

    @property
    def rank(self) -> int:
        """The logical rank."""
        return self.value.dim() - 1

    @property
    def shape(self) -> torch.Size:
        """The logical shape."""
        return self.value.shape[1:]

    def __repr__(self) -> str:
        return f"Batched({self.value!r})"


def is_batched(x: Any) -> bool:
    """Whether `x` carries the batch."""
    return x.__class__ is Batched


def logical_rank(x: Any) -> int:
    """The rank that the user's function sees."""
    rank: int = x.value.dim() - 1 if x.__class__ is Batched else x.dim()
    return rank


def logical_shape(x: Any) -> torch.Size:
    """The shape that the user's function sees."""
    shape: torch.Size = x.value.shape[1:] if x.__class__ is Batched else x.shape
    return shape


def physical(x: Any, size: int) -> Any:
    """`x` with a batch dimension at 0: a view for a batched one, expanded for a tensor, anything else as it is."""
    if x.__class__ is Batched:
        return x.value
    if isinstance(x, Tensor):
        return x.expand(size, *x.shape)
    return x


def value_of(x: Any) -> Any:
    """The stored tensor of `x`, whether batched or not."""
    return x.value if x.__class__ is Batched else x


def pad_rank(x: Any, rank: int) -> Any:
    """The stored tensor, ones inserted after the batch until the logical rank is `rank`; anything else as it is."""
    if x.__class__ is not Batched:
        return x
    value: Tensor = x.value
    missing = rank - (value.dim() - 1)
    for _ in range(missing):
        value = value.unsqueeze(1)
    return value


def wrap_dim(dim: int, rank: int) -> int:
    """`dim` as a non-negative logical dimension; a scalar counts as rank one, as in ATen."""
    limit = max(rank, 1)
    if not -limit <= dim < limit:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-limit}, {limit - 1}], but got {dim})")
    return dim % limit


def mark(result: Any) -> Any:
    """Every tensor of a result (a tensor, or a list or tuple of them) marked as batched."""
    if isinstance(result, Tensor):
        return Batched(result)
    if isinstance(result, (list, tuple)):
        return tuple(mark(item) for item in result)
    return result


def map_tensors(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `function` to every tensor or `Batched` in nested lists, tuples and dictionaries."""
    if tree.__class__ is Batched or isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, (list, tuple)):
        return [map_tensors(function, item) for item in tree]
    if isinstance(tree, dict):
        return {key: map_tensors(function, item) for key, item in tree.items()}
    return tree


def any_batched(*items: Any) -> bool:
    """Whether a `Batched` occurs in nested lists and tuples."""
    for item in items:
        if item.__class__ is Batched:
            return True
        if isinstance(item, (list, tuple)) and any_batched(*item):
            return True
    return False


def bind(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of an op by name, defaults filled in."""
    bound: dict[str, Any] = {}
    for position, argument in enumerate(func._schema.arguments):
        name = argument.name
        if position < len(args):
            bound[name] = args[position]
        elif name in kwargs:
            bound[name] = kwargs[name]
        else:
            bound[name] = argument.default_value
    return bound


def is_composite(func: Any) -> bool:
    """Whether torch defines the op by other ops, so that no kernel of its own is run."""
    try:
        return bool(func._can_decompose())
    except (AttributeError, RuntimeError):  # an overload that only TorchScript has
        return False
