"""Arrays with named dimensions as they meet others: in another order, with further dimensions, of one dtype."""

from __future__ import annotations

import torch

from chainrule.maps.staging import Staged


def permute(value: Staged, permutation: tuple[int, ...]) -> Staged:
    """Permute dimensions; nothing is recorded for the identity."""
    if permutation == tuple(range(len(permutation))):
        return value
    if len(permutation) == 2:
        return torch.t(value)
    return torch.permute(value, permutation)


def expand_to(value: Staged, names: tuple[int, ...], order: tuple[int, ...]) -> Staged:
    """View ``value`` (dimensions called ``names``) so that it broadcasts against dimensions called ``order``."""
    if names == order:
        return value
    wanted = tuple(name for name in order if name in names)
    if wanted != names:
        value = permute(value, tuple(names.index(name) for name in wanted))
    for position, name in enumerate(order[order.index(wanted[0]) :] if wanted else ()):
        if name not in names:
            value = torch.unsqueeze(value, position)
    return value


def of_one_dtype(x: Staged, y: Staged) -> tuple[Staged, Staged]:
    """Two arrays in the dtype of their product."""
    if x.dtype == y.dtype:
        return x, y
    dtype = torch.promote_types(x.dtype, y.dtype)
    return (x if x.dtype == dtype else x.to(dtype)), (y if y.dtype == dtype else y.to(dtype))


__all__ = ["expand_to", "of_one_dtype", "permute"]
