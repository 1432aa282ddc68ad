"""Batching: tensors that carry a hidden batch dimension, and the dispatch mode that runs ops on them."""

from chainrule.batching.mode import VmapMode
from chainrule.batching.rows import mapped
from chainrule.batching.tensor import BatchTensor

__all__ = ["BatchTensor", "VmapMode", "mapped"]
