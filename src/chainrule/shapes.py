"""Shapes that broadcast."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def broadcast_shapes(*shapes: Sequence[int]) -> torch.Size:
    """As ``torch.broadcast_shapes``, which imports half a second's worth of torch when it is first called."""
    sizes = [1] * max(map(len, shapes), default=0)
    for shape in shapes:
        for place, size in enumerate(reversed(shape), 1):
            if size != 1 and sizes[-place] != size:
                if sizes[-place] != 1:
                    return torch.broadcast_shapes(*[tuple(shape) for shape in shapes])  # type: ignore[no-untyped-call, no-any-return]
                sizes[-place] = size
    return torch.Size(sizes)


__all__ = ["broadcast_shapes"]
