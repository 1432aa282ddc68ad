"""Ops that are recorded in parts: torch's own decomposition table, restricted to where it is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

aten = torch.ops.aten


def composite(op: OpOverload) -> Callable[..., Any] | None:
    """Torch's composite implementation of an op, for ops that are nothing but a composition of others."""
    if op._can_decompose():
        return op.decompose
    return None


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}
