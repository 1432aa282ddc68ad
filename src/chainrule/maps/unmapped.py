"""Tensors that patterns are read off, as they are outside of a vmap."""

from __future__ import annotations

import torch


def unbatched(tensor: torch.Tensor) -> torch.Tensor | None:
    """A tensor as it is outside of a vmap; None if there is one for each sample."""
    while tensor.__class__ is not torch.Tensor and hasattr(tensor, "batched"):
        if tensor.batched:
            return None
        tensor = tensor.inner  # type: ignore[attr-defined]
    return tensor


class MappedPatternError(RuntimeError):
    """The pattern is not the same for all samples of a vmap."""


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as it is outside of a vmap.

    Raises:
        MappedPatternError: if there is one for each sample.
    """
    found = unbatched(tensor)
    if found is None:
        raise MappedPatternError(
            "chainrule: under vmap, the pattern of a sparse result must be the same for all samples, but an index tensor (or "
            "what max, sort or a mask selects) is mapped over, one for each sample (equal ones are not told from others). Pass "
            "an index that all samples share with in_dims=None, use layout='dense', or loop over the samples."
        )
    return found


def kept(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor that outlives the transforms around: under a vmap, which wraps copies as well, it is none of its own.

    Raises:
        RuntimeError: if there is one for each sample.
    """
    return plain(plain(tensor).clone())


__all__ = ["MappedPatternError", "kept", "plain", "unbatched"]
