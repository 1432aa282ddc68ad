"""Ops whose outputs are constants for differentiation: factories, comparisons, roundings, ``detach``."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

aten = torch.ops.aten

_INACTIVE_NAMES = frozenset(
    """
    detach detach_copy floor ceil round trunc fix frac_zero sign sgn_zero signbit heaviside floor_divide
    zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_empty new_full
    new_empty_strided empty_strided bernoulli multinomial poisson binomial _local_scalar_dense is_same_size
    normal normal_functional exponential geometric cauchy log_normal uniform random _is_all_true _is_any_true
    eq ne lt le gt ge logical_and logical_or logical_xor logical_not isnan isinf isfinite isposinf isneginf isreal
    argmax argmin argsort nonzero nonzero_static count_nonzero searchsorted bucketize histc bincount allclose equal
    is_nonzero any all one_hot nextafter_zero isclose isin
    _linalg_check_errors sym_size sym_stride sym_numel sym_storage_offset _assert_async _has_same_storage_numel
    zeros ones empty full arange linspace rand randn randint randperm eye scalar_tensor tril_indices triu_indices
    """.split()
)


def is_inactive(op: OpOverload) -> bool:
    """Whether an op's outputs never depend differentiably on its inputs."""
    return op.namespace == "aten" and op._schema.name.split("::")[1] in _INACTIVE_NAMES


__all__ = ["Any", "is_inactive"]
