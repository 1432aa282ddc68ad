"""The batching tables: strategies by op, merged from the families."""

from __future__ import annotations

from typing import Any

import torch

from chainrule.rules.batching_base import BatchStrategy
from chainrule.rules.batching_contraction import CONTRACTIONS
from chainrule.rules.batching_indexing import INDEXING, INDEXING_INPLACE
from chainrule.rules.batching_layers import LAYERS
from chainrule.rules.batching_linalg import LINALG
from chainrule.rules.batching_losses import LOSSES
from chainrule.rules.batching_misc import DATA_DEPENDENT, FACTORIES, POINTWISE, POINTWISE_INPLACE
from chainrule.rules.batching_reductions import REDUCTIONS, SCANS
from chainrule.rules.batching_shift import METADATA_INPLACE, VIEWS


def merge(*tables: dict[Any, BatchStrategy]) -> dict[Any, BatchStrategy]:
    """One table of all; an op in two of them is a mistake.

    Raises:
        ValueError: an op is declared twice.

    """
    merged: dict[Any, BatchStrategy] = {}
    for table in tables:
        twice = merged.keys() & table.keys()
        if twice:
            raise ValueError(f"batching strategies declared twice: {sorted(map(str, twice))}")
        merged.update(table)
    return merged


BATCHING: dict[torch._ops.OpOverload, BatchStrategy] = merge(
    POINTWISE, VIEWS, REDUCTIONS, SCANS, CONTRACTIONS, LINALG, INDEXING, LAYERS, LOSSES, FACTORIES
)
INPLACE: dict[torch._ops.OpOverload, BatchStrategy] = merge(POINTWISE_INPLACE, INDEXING_INPLACE)

__all__ = ["BATCHING", "DATA_DEPENDENT", "INPLACE", "METADATA_INPLACE"]
