"""What a call on mapped tensors depends on but for their values: its signature."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chainrule.batching.mode import VmapMode
from chainrule.batching.tensor import BatchTensor
from chainrule.capture.slots import has_negative_zero, signs_of
from chainrule.rules.batching_base import Batched
from chainrule.shortcuts import REAL, configure

#: Numbers that are kept; then all are forgotten.
_MOST = 4096

#: What stands for itself in a signature.
CONSTANTS = frozenset({bool, int, str, type(None), type(Ellipsis), torch.dtype, torch.device, torch.layout, torch.memory_format})

#: Classes of tensors of which no more is known than what a signature says.
TENSORS = frozenset({Tensor, torch.nn.Parameter})

#: Numbers for what a signature says of a tensor: shape, dtype, strides, device.
NUMBERS: dict[Any, int] = {}
_FREENUMBERS = itertools.count()

_NUMERIC = (*REAL, torch.complex64, torch.complex128)

_strided = torch.strided
_default_dtype = torch.get_default_dtype

def new_number(key: Any) -> int:
    """The number of what a signature says of a tensor for the first time."""
    if len(NUMBERS) > _MOST:
        NUMBERS.clear()  # numbers are not given twice
    number = NUMBERS[key] = next(_FREENUMBERS)
    return number


def signature_of(
    function: Any, mode: VmapMode, args: Sequence[Any], kwargs: dict[str, Any] | None, values: list[Tensor]
) -> tuple[Any, ...] | None:
    """What a call depends on but for the values of the tensors; None for one that is left to its own way."""
    signature: list[Any] = [function, _default_dtype()]  # which numbers take
    if not _read(args, mode, signature, values):
        return None
    for name, item in (kwargs or {}).items():
        signature.append(name)
        if not _read((item,), mode, signature, values):
            return None
    return tuple(signature)


def _read(items: Sequence[Any], mode: VmapMode, signature: list[Any], values: list[Tensor]) -> bool:
    """Write down the signature of some arguments, and the tensors among them; whether they can be replayed."""
    for item in items:
        kind = item.__class__
        if kind is BatchTensor:
            if item.level is not mode or item.requires_grad:
                return False
            value, batch = item.inner, None
            if value.__class__ is Batched:
                batch, value = value, value.value
        elif kind in TENSORS:
            value, batch = item, None
        elif kind in CONSTANTS:
            signature.append(kind)
            signature.append(item)
            continue
        elif kind is float:
            # No number, which might be that of a tensor; two zeros are one to a dictionary.
            signature.append(float if math.copysign(1.0, item) > 0 else "-")
            signature.append(item)
            continue
        elif kind is complex:
            signature.append(signs_of(item) if has_negative_zero(item) else complex)
            signature.append(item)
            continue
        elif kind is slice:
            signature.append(slice)
            if not _read((item.start, item.stop, item.step), mode, signature, values):
                return False
            continue
        elif kind is list or kind is tuple or kind is torch.Size:
            signature.append(kind)
            signature.append(len(item))
            if not _read(item, mode, signature, values):
                return False
            continue
        else:
            return False
        # What is the same for all samples is of the level nevertheless, where the function made it: its views are.
        own = batch is None and value is not item
        signature.append((batch is not None) + 2 * value.requires_grad + 4 * own)
        for place, other in enumerate(values):
            if other is value:
                signature.append(-1 - place)
                break
        else:
            number = signature_number(value) if batch is None or not hasattr(batch, "signature") else batch.signature
            if number is None:
                return False
            if batch is not None:
                batch.signature = number
            signature.append(number)
            values.append(value)
    return True


def signature_number(value: Tensor) -> int | None:
    """The number of what a signature says of a tensor; None for one that is left to its own way."""
    dtype = value.dtype
    if value.__class__ not in TENSORS or dtype not in _NUMERIC or value.layout is not _strided or value.is_conj():
        return None
    key = (value.shape, dtype, value.stride(), value.device)
    found = NUMBERS.get(key)
    return new_number(key) if found is None else found


configure(numbers=NUMBERS, new_number=new_number, constants_of_calls=CONSTANTS, default_dtype=_default_dtype)

__all__ = ["CONSTANTS", "NUMBERS", "TENSORS", "signature_number", "signature_of"]
