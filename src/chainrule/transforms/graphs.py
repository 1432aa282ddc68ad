"""Derivatives that do not depend on what they are taken at, as part of the graph of inputs that require grad."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

from chainrule.batching.tensor import BatchTensor, wrap_batched, wrap_constant
from chainrule.capture.whole_recorder import whole_recorder
from chainrule.dispatch import undispatched
from chainrule.rules.batching_base import Batched
from chainrule.transforms.arguments import Argnums, tree_flatten

_count = torch._C._len_torch_dispatch_stack
_at = torch._C._get_dispatch_stack_at


class _Constant(torch.autograd.Function):
    """A value that is constant in tensors that require grad, as part of their graph: the gradients are zeros."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*inputs)
        # No view for autograd, which would refuse writes to it.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            found: torch.Tensor = torch.ops.aten.alias.default(value)
        return found

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return (None, *(torch.zeros_like(leaf) for leaf in ctx.saved_tensors))


#: As torch has it, without a look at the modes that are on.
_join = super(torch.autograd.Function, _Constant).apply


def with_graph(result: Any, args: tuple[Any, ...], argnums: Argnums | None = None) -> Any:
    """A derivative, as part of the graph of what it was taken at, where it is not already.

    A derivative that no value goes into (that of ``relu``, whose slopes are constant piece by piece, or of ``x * 0.0``) has no
    graph of its own. With torch's formulas there is one, of zeros: ``backward()`` of a penalty on a gradient works whatever the
    function.

    Args:
        result: the derivative, a tree of tensors.
        args: the arguments of the transformed function.
        argnums: which of them were differentiated; None for all.
    """
    if argnums.__class__ is int:
        only = args[argnums]  # type: ignore[index]
        if only.__class__ is torch.Tensor and not only.requires_grad:
            return result
    if _is_joined(result):
        return result
    if argnums is not None:
        args = (args[argnums],) if argnums.__class__ is int else tuple([args[n] for n in argnums])  # type: ignore[index, union-attr]
    leaves: list[torch.Tensor] = []
    _collect(args, leaves)
    if not leaves or not torch.is_grad_enabled():
        return result
    count = _count()
    if count and not (count == 1 and whole_recorder() is not None):
        if not all([getattr(_at(place), "maps", False) for place in range(count)]):
            return result  # a derivative is around, which looks at what it differentiates itself
        with undispatched():
            return tree_map(lambda leaf: _joined(leaf, leaves), result)
    return tree_map(lambda leaf: _joined(leaf, leaves), result)


def _is_joined(item: Any) -> bool:
    """Whether all of a tree are plain tensors with a graph."""
    if item.__class__ is torch.Tensor:
        return bool(item.requires_grad)
    if item.__class__ is tuple or item.__class__ is list:
        return all([_is_joined(one) for one in item])
    return item.__class__ is dict and all([_is_joined(one) for one in item.values()])


def _collect(item: Any, leaves: list[torch.Tensor]) -> None:
    """Append the tensors that require grad, those behind mapped ones among them."""
    while item.__class__ is BatchTensor:
        item = item.value
    if isinstance(item, torch.Tensor):
        if item.requires_grad:
            leaves.append(item)
    elif item.__class__ is tuple or item.__class__ is list:
        for one in item:
            _collect(one, leaves)
    elif item.__class__ is dict:
        for one in item.values():
            _collect(one, leaves)
    elif item is not None and not isinstance(item, (int, float, str)):
        for one in tree_flatten(item)[0]:
            if one is not item:
                _collect(one, leaves)


def _joined(leaf: Any, leaves: list[torch.Tensor]) -> Any:
    if leaf.__class__ is BatchTensor:
        stored = _joined(leaf.value, leaves)
        if stored is leaf.value:
            return leaf
        return wrap_batched(Batched(stored), leaf.level) if leaf.batched else wrap_constant(stored, leaf.level)
    if not isinstance(leaf, torch.Tensor) or leaf.requires_grad or not (leaf.is_floating_point() or leaf.is_complex()):
        return leaf
    return _join(leaf, *leaves)
