"""Batching of indexing with tensors: index, index_put and the ops that reduce to them, embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chainrule.rules.batching_base import (
    Batched,
    BatchStrategy,
    bind,
    is_batched,
    logical_rank,
    logical_shape,
    physical,
    value_of,
    wrap_dim,
)
from chainrule.shapes import broadcast_shapes

aten = torch.ops.aten

DYNAMIC_MASK = (
    "vmap: indexing with a boolean mask that differs between samples gives each sample a result of its own shape, "
    "which cannot be batched. Use torch.where(mask, x, other), or masked_fill, instead."
)


class IndexLayout:
    """Where the indexed dimensions of a call stand.

    Attributes:
        indices: one entry per leading dimension of self: None, or an integer tensor (maybe `Batched`).
        first: the first indexed dimension.
        adjacent: whether the indexed dimensions are next to each other; if not, the index dimensions go to the front.
        rank: the rank of the broadcast index.

    """

    __slots__ = ("adjacent", "first", "indices", "rank")

    def __init__(self, indices: Sequence[Any], shape: Sequence[int]) -> None:
        self.indices = _without_masks(indices, shape)
        used = [position for position, index in enumerate(self.indices) if index is not None]
        self.first = used[0] if used else 0
        self.adjacent = not used or used[-1] - used[0] + 1 == len(used)
        self.rank = max((logical_rank(index) for index in self.indices if index is not None), default=0)

    @property
    def any_batched(self) -> bool:
        """Whether some index differs between samples."""
        return any(is_batched(index) for index in self.indices)

    def stored(self) -> list[Any]:
        """The stored indices, batched ones with their rank padded to `rank`."""
        stored = []
        for index in self.indices:
            if is_batched(index):
                value = index.value
                value = value.reshape([value.shape[0]] + [1] * (self.rank + 1 - value.dim()) + list(value.shape[1:]))
                stored.append(value)
            else:
                stored.append(index)
        return stored


def _without_masks(indices: Sequence[Any], shape: Sequence[int]) -> list[Any]:
    """Boolean masks as the integer indices that they stand for, in a tensor of this shape."""
    result: list[Any] = []
    for index in indices:
        if index is not None and value_of(index).dtype in (torch.bool, torch.uint8):
            if is_batched(index) or _differs_outside(index):
                raise RuntimeError(DYNAMIC_MASK)
            if index.dim() == 0:
                raise RuntimeError("vmap: indexing with a 0-dimensional mask is not supported; use an integer index")
            _check_mask(index.shape, shape, len(result))
            result.extend(aten.nonzero.default(index).unbind(1))
        else:
            result.append(index)
    return result


def _check_mask(mask: Sequence[int], shape: Sequence[int], first: int) -> None:
    """Raise torch's error where a mask is not as long as the dimensions from `first` on that it stands for."""
    if first + len(mask) > len(shape):
        raise IndexError(f"too many indices for tensor of dimension {len(shape)}")
    if list(shape[first : first + len(mask)]) != list(mask):
        differing = next(i for i, (n, m) in enumerate(zip(shape[first:], mask, strict=False)) if n != m)
        raise IndexError(
            f"The shape of the mask {list(mask)} at index {differing} does not match the shape of the indexed tensor "
            f"{list(shape)} at index {first + differing}"
        )


def _differs_outside(tensor: Any) -> bool:
    """Whether a tensor that is the same for all samples here differs between those of a level around this one."""
    while (batched := getattr(tensor, "batched", None)) is not None:
        if batched:
            return True
        tensor = tensor.inner
    return False


def _sample_index(size: int, rank: int, like: Tensor) -> Tensor:
    return torch.arange(size, device=like.device).view([size] + [1] * rank)


def _first_index(layout: IndexLayout) -> Tensor:
    value: Tensor = value_of(next(index for index in layout.indices if index is not None))
    return value


def index(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """index.Tensor and _unsafe_index."""
    source, indices = args[0], args[1]
    if _zero_dim_mask(indices):
        return NotImplemented
    layout = IndexLayout(indices, logical_shape(source))
    stored = layout.stored()
    if not any(item is not None for item in stored):
        return Batched(aten.alias.default(source.value))
    if not layout.any_batched:
        result = func(source.value, [None, *stored])
        return Batched(result if layout.adjacent else result.movedim(layout.rank, 0))
    if not is_batched(source):
        result = func(source, stored)
        return Batched(result.movedim(layout.first, 0) if layout.adjacent else result)
    sample = _sample_index(size, layout.rank, _first_index(layout))
    result = func(source.value, [sample, *stored])
    if layout.adjacent and layout.first > 0:
        # Physically the indices are not adjacent, so that their dimensions came to the front.
        order = [0, *range(1 + layout.rank, 1 + layout.rank + layout.first), *range(1, 1 + layout.rank)]
        order += range(len(order), result.dim())
        result = result.permute(order)
    return Batched(result)


def _zero_dim_mask(indices: Sequence[Any]) -> bool:
    return any(
        item is not None and value_of(item).dtype in (torch.bool, torch.uint8) and logical_rank(item) == 0
        for item in indices
    )


def _result_shape(layout: IndexLayout, shape: Sequence[int]) -> list[int]:
    """The logical shape of the indexed result."""
    broadcast = broadcast_shapes(*[logical_shape(item) for item in layout.indices if item is not None])
    rest = [n for n, item in zip(shape, layout.indices, strict=False) if item is None] + list(
        shape[len(layout.indices) :]
    )
    if layout.adjacent:
        return [*rest[: layout.first], *broadcast, *rest[layout.first :]]
    return [*broadcast, *rest]


def _write_indexed(target: Tensor, layout: IndexLayout, values: Any, accumulate: bool, size: int) -> None:
    """Write `values` into the stored tensor, one index for the sample in front."""
    shape = _result_shape(layout, target.shape[1:])
    stored_values = physical(values, size)
    while stored_values.dim() - 1 < len(shape):
        stored_values = stored_values.unsqueeze(1)
    while stored_values.dim() - 1 > len(shape):
        if stored_values.shape[1] != 1:
            raise RuntimeError(
                f"shape mismatch: value tensor of shape {list(logical_shape(values))} cannot be broadcast to indexing result of "
                f"shape {shape}"
            )
        stored_values = stored_values.squeeze(1)
    sample = _sample_index(size, layout.rank, _first_index(layout))
    if layout.adjacent and layout.first > 0:
        stored_values = stored_values.expand([size, *shape])
        order = [0, *range(1 + layout.first, 1 + layout.first + layout.rank), *range(1, 1 + layout.first)]
        order += range(len(order), stored_values.dim())
        stored_values = stored_values.permute(order)
    aten.index_put_.default(target, [sample, *layout.stored()], stored_values, accumulate)


def index_put(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """index_put and _unsafe_index_put: on a copy."""
    bound = bind(func, args, kwargs)
    if _zero_dim_mask(bound["indices"]):
        return NotImplemented
    if _is_masked_write(bound["indices"], bound["values"], bound.get("accumulate", False)):
        return Batched(_masked(physical(bound["self"], size), bound["indices"], bound["values"]))
    target = physical(bound["self"], size).clone()
    layout = IndexLayout(bound["indices"], target.shape[1:])
    _write_indexed(target, layout, bound["values"], bound.get("accumulate", False), size)
    return Batched(target)


def index_put_inplace(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """index_put_ and _index_put_impl_ on a batched `self`."""
    bound = bind(func, args, kwargs)
    indices, values = bound["indices"], bound["values"]
    if _is_masked_write(indices, values, bound["accumulate"]):
        args[0].value.copy_(_masked(args[0].value, indices, values))
        return args[0]
    target = args[0].value
    _write_indexed(target, IndexLayout(indices, target.shape[1:]), values, bound["accumulate"], size)
    return args[0]


def _is_masked_write(indices: Sequence[Any], values: Any, accumulate: bool) -> bool:
    """Whether one number is written where a mask that differs between samples says, and nothing else is in the index."""
    used = [item for item in indices if item is not None]
    if len(used) != 1 or accumulate or logical_rank(values):
        return False
    mask = used[0]
    return value_of(mask).dtype in (torch.bool, torch.uint8) and (is_batched(mask) or _differs_outside(mask))


def _masked(target: Tensor, indices: Sequence[Any], values: Any) -> Tensor:
    """What ``x[mask] = scalar`` makes of the stored ``x``: it has a fixed shape whatever the mask is."""
    position = next(i for i, item in enumerate(indices) if item is not None)
    mask = value_of(indices[position])
    if mask.dtype is torch.uint8:
        mask = mask != 0
    first, own = (mask.shape[0], mask.shape[1:]) if is_batched(indices[position]) else (1, mask.shape)
    _check_mask(own, target.shape[1:], position)
    shape = [first] + [1] * position + list(own)
    mask = mask.reshape(shape + [1] * (target.dim() - len(shape)))
    value = values.value.reshape([-1] + [1] * (target.dim() - 1)) if is_batched(values) else values
    return torch.where(mask, value.to(target.dtype), target)


def _positions(dim: int, index_tensor: Any) -> list[Any]:
    return [None] * dim + [index_tensor]


def index_select(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """index_select."""
    source, dim, chosen = args
    rank = logical_rank(source)
    dim = wrap_dim(dim, rank)
    if not is_batched(chosen):
        value = source.value if rank else source.value.unsqueeze(1)
        return Batched(
            func(value, dim + 1, chosen).reshape([size, *([-1] if rank else [])])
            if not rank
            else func(value, dim + 1, chosen)
        )
    chosen = _at_least_vector(chosen)
    if rank == 0:
        value = source.value.unsqueeze(1) if is_batched(source) else source.unsqueeze(0)
        source = Batched(value) if is_batched(source) else value
        result = index(aten.index.Tensor, [source, [chosen]], {}, size)
        return Batched(result.value.squeeze(1))
    return index(aten.index.Tensor, [source, _positions(dim, chosen)], {}, size)


def _at_least_vector(chosen: Any) -> Any:
    if logical_rank(chosen) > 0:
        return chosen
    return Batched(chosen.value.unsqueeze(1)) if is_batched(chosen) else chosen.unsqueeze(0)


def _write_along(accumulate: bool) -> BatchStrategy:
    """index_add and index_copy: write `source` at `index` along one dimension."""

    def write_along(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
        bound = bind(func, args, kwargs)
        target, chosen = bound["self"], _at_least_vector(bound["index"])
        source = bound["source"]
        rank = logical_rank(target)
        dim = wrap_dim(bound["dim"], rank)
        written = physical(target, size) if rank else physical(target, size).unsqueeze(1)
        source = _at_least_vector(source)
        if bound.get("alpha", 1) != 1:
            source = Batched(source.value * bound["alpha"]) if is_batched(source) else source * bound["alpha"]
        if not is_batched(chosen):  # several times as fast as with an index for the sample
            whole = aten.index_add if accumulate else aten.index_copy
            result = whole.default(written, dim + 1, chosen, physical(source, size))
            return Batched(result if rank else result.squeeze(1))
        value = written.clone()
        _write_indexed(value, IndexLayout(_positions(dim, chosen), value.shape[1:]), source, accumulate, size)
        return Batched(value if rank else value.squeeze(1))

    return write_along


def index_fill(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """index_fill, by a mask: a repeated index counts once, also in the gradient of the value."""
    source, dim, chosen, filled = args
    rank = logical_rank(source)
    dim = wrap_dim(dim, rank)
    value = physical(source, size)
    index_value = physical(_at_least_vector(chosen), size)
    length = value.shape[dim + 1] if rank else 1
    mask = torch.zeros([size, length], dtype=torch.bool, device=value.device)
    mask.scatter_(1, torch.where(index_value < 0, index_value + length, index_value), True)
    mask = mask.reshape([size] + [1] * dim + [length] + [1] * (rank - dim - 1)) if rank else mask.reshape(size)
    if is_batched(filled):
        filled = filled.value.reshape([size] + [1] * rank)
    if isinstance(filled, Tensor):
        return Batched(torch.where(mask, filled.to(value.dtype), value))
    return Batched(value.masked_fill(mask, filled))


def index_reduce(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """index_reduce: fold the sample into the index."""
    bound = bind(func, args, kwargs)
    target, dim = bound.pop("self"), bound.pop("dim")
    if is_batched(bound["index"]) or logical_rank(target) == 0:
        return NotImplemented
    dim = wrap_dim(dim, logical_rank(target))
    bound["source"] = physical(bound["source"], size)
    return Batched(func(physical(target, size), dim + 1, **bound))


def take(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """take: index into the flattened tensor."""
    source, chosen = args
    if not is_batched(source):
        return Batched(func(source, chosen.value))
    flat = source.value.reshape(size, source.shape.numel())
    return index(aten.index.Tensor, [Batched(flat), [chosen]], {}, size)


def put(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """put: write into the flattened tensor."""
    bound = bind(func, args, kwargs)
    target = physical(bound["self"], size)
    flat = target.reshape(size, -1 if target.numel() else 0).clone()
    source = physical(bound["source"], size)
    shape = logical_shape(bound["index"])
    layout = IndexLayout([bound["index"]], flat.shape[1:])
    _write_indexed(flat, layout, Batched(source.reshape([size, *shape])), bound["accumulate"], size)
    return Batched(flat.reshape(target.shape))


def embedding(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """embedding: rows of a matrix."""
    weight, chosen = args[0], args[1]
    if not is_batched(weight):
        return Batched(func(weight, chosen.value, *args[2:], **kwargs))
    bound = bind(func, args, kwargs)
    if bound["scale_grad_by_freq"]:
        rows, positions = physical(weight, size), physical(chosen, size)
        results = [func(rows[b], positions[b], *args[2:], **kwargs) for b in range(size)]
        return Batched(torch.stack(results)) if results else NotImplemented
    result = index(aten.index.Tensor, [weight, [chosen]], {}, size)
    differentiated = weight.value.requires_grad or torch._C._len_torch_dispatch_stack() > 0
    if bound["padding_idx"] >= 0 and differentiated:
        padded = physical(chosen, size).eq(bound["padding_idx"]).unsqueeze(-1)
        result = Batched(torch.where(padded, result.value.detach(), result.value))
    return result


def embedding_dense_backward(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """embedding_dense_backward: the samples are rows of one long table."""
    grad, chosen, rows, padding, by_frequency = args
    grad_value, index_value = physical(grad, size), physical(chosen, size)
    offsets = _sample_index(size, index_value.dim() - 1, index_value) * rows
    table = func(grad_value, index_value + offsets, size * rows, -1, by_frequency).view(
        size, rows, grad_value.shape[-1]
    )
    if padding >= 0:
        keep = torch.arange(rows, device=table.device).ne(padding).unsqueeze(1)
        table = torch.where(keep, table, torch.zeros((), dtype=table.dtype, device=table.device))
    return Batched(table)


def embedding_bag(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """_embedding_bag, sample by sample.

    The caller takes the variant without a gradient when the tensor that it sees requires none; the stored one may.
    """
    if not size:
        return NotImplemented
    bound = bind(func, args, kwargs)
    results = [
        aten._embedding_bag.default(*[x.value[b] if is_batched(x) else x for x in bound.values()]) for b in range(size)
    ]
    return tuple(Batched(torch.stack(items)) for items in zip(*results, strict=True))


INDEXING: dict[Any, BatchStrategy] = {
    aten.index.Tensor: index,
    aten._unsafe_index.Tensor: index,
    aten.index_put.default: index_put,
    aten._unsafe_index_put.default: index_put,
    aten.index_select.default: index_select,
    aten.index_add.default: _write_along(True),
    aten.index_copy.default: _write_along(False),
    aten.index_fill.int_Scalar: index_fill,
    aten.index_fill.int_Tensor: index_fill,
    aten.index_reduce.default: index_reduce,
    aten.take.default: take,
    aten.put.default: put,
    aten.embedding.default: embedding,
    aten.embedding_dense_backward.default: embedding_dense_backward,
    aten._embedding_bag.default: embedding_bag,
    aten._embedding_bag_forward_only.default: embedding_bag,
}
INDEXING_INPLACE: dict[Any, BatchStrategy] = {
    aten.index_put_.default: index_put_inplace,
    aten._index_put_impl_.default: index_put_inplace,
}
