"""Maps in coordinate form as sparse tensors."""

from __future__ import annotations

from typing import Any

import torch

from chainrule.transforms.spaces import Space


def sparse_blocks(found: dict[Any, Any], out_space: Space, in_space: Space, *, flat: bool) -> Any:
    """Put the coordinates of terms together as sparse tensors.

    Args:
        found: for each term, by ``("places" or "values", output, input, number)``, the flat places in its block and the
            entries (see :func:`chainrule.maps.coordinates.coordinates`).
        out_space: the space of the outputs.
        in_space: the space of the inputs.
        flat: whether to make one matrix instead of a tree of blocks.
    """
    entries: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for (kind, *block, number), places in found.items():
        if kind == "places":
            values = found["values", *block, number]
            present = places >= 0
            if not bool(present.all()):
                places, values = places[present], values[present]
            entries.setdefault((block[0], block[1]), []).append((places, values))
    if flat:
        return _matrix(entries, out_space, in_space)
    lines = []
    for o, (out_shape, out_dtype) in enumerate(zip(out_space.shapes, out_space.dtypes, strict=True)):
        line = []
        for i, (in_shape, in_dtype) in enumerate(zip(in_space.shapes, in_space.dtypes, strict=True)):
            shape = (*out_shape, *in_shape)
            places, values = _joined(entries.get((o, i), []), torch.promote_types(out_dtype, in_dtype), in_space.devices[i])
            line.append(_sparse(_unraveled(places, shape), values, shape))
        lines.append(in_space.tree(line))
    return out_space.tree(lines)


def _joined(
    entries: list[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    if not entries:
        return torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, dtype=dtype, device=device)
    return torch.cat([places for places, _ in entries]), torch.cat([values for _, values in entries]).to(dtype)


def _unraveled(places: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    digits: list[torch.Tensor] = []
    for size in reversed(shape):
        digits.append(torch.remainder(places, max(size, 1)))
        places = torch.div(places, max(size, 1), rounding_mode="floor")
    return torch.stack(digits[::-1]) if digits else torch.zeros(0, len(places), dtype=torch.int64, device=places.device)


def _sparse(indices: torch.Tensor, values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=False).coalesce()


def _matrix(
    entries: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]], out_space: Space, in_space: Space
) -> torch.Tensor:
    dtype, device = torch.promote_types(out_space.dtype, in_space.dtype), in_space.devices[0]
    parts = []
    for (o, i), block in entries.items():
        places, values = _joined(block, dtype, device)
        width = max(in_space.sizes[i], 1)
        rows = torch.div(places, width, rounding_mode="floor") + sum(out_space.sizes[:o])
        parts.append((rows, torch.remainder(places, width) + sum(in_space.sizes[:i]), values))
    if not parts:
        empty = torch.zeros(2, 0, dtype=torch.int64, device=device)
        return _sparse(empty, torch.zeros(0, dtype=dtype, device=device), (out_space.size, in_space.size))
    rows, columns, values = (torch.cat(column) for column in zip(*parts, strict=True))
    return _sparse(torch.stack([rows, columns]), values, (out_space.size, in_space.size))


__all__ = ["sparse_blocks"]
