"""Linear functions that are called again and again: pullbacks and pushforwards of one run, with what does not change found once.

From its third call on, a function that :func:`~chainrule.transforms.derivatives.vjp` or ``linearize`` returned compares its
seeds with those of the second call, and the state of torch, and runs the part of the plan that depends on seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._pytree import TreeSpec

from chainrule.capture.tape import Tape
from chainrule.execute.accounts import read_ledger
from chainrule.execute.engine import repeated_request
from chainrule.execute.memory import current_watch
from chainrule.transforms.arguments import tree_unflatten
from chainrule.transforms.trace import Traced

#: From seeds to a tree; NotImplemented where something is not as it was.
Repeated = Callable[[Sequence[Any]], Any]

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})

_modes = torch._C._len_torch_dispatch_stack
_grad_enabled, _inference = torch.is_grad_enabled, torch.is_inference_mode_enabled


def repeated(
    traced: Traced, kind: str, seeds: Sequence[int], given: Sequence[Any], wanted: Sequence[int | None], spec: TreeSpec,
    cast: str = "input",
) -> Repeated | None:
    """What does for further seeds like ``given`` what a call with these has just done; None where that has to go the whole way.

    Args:
        traced: the run.
        kind: ``"pull"`` or ``"push"``.
        seeds: the slots that seeds belong to.
        given: seeds.
        wanted: the slots of the results; None for one that is zero.
        spec: the structure of the results.
        cast: as the request has it.
    """
    tape = traced.tape
    leaves = (*traced.in_leaves, *traced.out_leaves)
    if tape.__class__ is not Tape or tape.hooks or traced.steps is not None or _modes() or None in wanted:
        return None
    if not all([leaf.__class__ in _PLAIN for leaf in leaves]) or not all([seed.__class__ is torch.Tensor for seed in given]):
        return None
    found = repeated_request(tape, traced.request(kind, seeds=tuple(seeds), cast=cast), given)
    if found is None or not {*wanted} <= {*found.keys}:
        return None
    grad, inference, apply, values, known = _grad_enabled(), _inference(), found.apply, tape.values, found.known
    order = tuple([found.keys.index(slot) for slot in wanted])
    places = None if order == tuple(range(len(found.keys))) else order
    kinds = [(seed.shape, seed.dtype, seed.device) for seed in given]
    followed = [leaf.requires_grad for leaf in leaves]
    if grad and any(followed[: len(traced.in_leaves)]):
        return None
    build = builder(spec)

    def call(seeds: Sequence[Any]) -> Any:
        if _modes() or _grad_enabled() is not grad or _inference() is not inference or forward_ad._current_level >= 0:
            return NotImplemented
        if read_ledger() is not None or current_watch() is not None:
            return NotImplemented
        for seed, (shape, dtype, device) in zip(seeds, kinds, strict=True):
            if seed.__class__ is not torch.Tensor or seed.dtype is not dtype or seed.shape != shape or seed.device != device:
                return NotImplemented
        if grad and [leaf.requires_grad for leaf in leaves] != followed:
            return NotImplemented
        results = apply(values, known, seeds)
        return build(results if places is None else [results[place] for place in places])

    return call


def builder(spec: TreeSpec, start: int = 0) -> Callable[[Sequence[Any]], Any]:
    """What puts the leaves of a tree together that stand from the place ``start`` on in a sequence."""
    kind, stop = spec.type, start + spec.num_leaves
    if kind is None:
        return itemgetter(start)
    if kind is not tuple and kind is not list and kind is not dict:
        return lambda leaves: tree_unflatten([*leaves[start:stop]], spec)
    keys = spec.context
    if all([child.type is None for child in spec._children]):
        if kind is dict:
            return lambda leaves: dict(zip(keys, leaves[start:stop], strict=True))
        return lambda leaves: kind(leaves[start:stop])
    parts: list[Callable[[Sequence[Any]], Any]] = []
    for child in spec._children:
        parts.append(builder(child, start))
        start += child.num_leaves
    if kind is dict:
        return lambda leaves: {key: part(leaves) for key, part in zip(keys, parts, strict=True)}
    return lambda leaves: kind([part(leaves) for part in parts])


__all__ = ["Repeated", "builder", "repeated"]
