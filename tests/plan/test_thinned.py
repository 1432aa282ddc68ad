"""Lists of entries of which many meet are summed before they are multiplied further."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

import chainrule
from tests.transforms.test_blocks import peak_bytes


def test_the_hessian_of_overlapping_windows_is_planned_in_a_few_entries_each() -> None:
    size = 64

    def energy(x: torch.Tensor) -> torch.Tensor:
        windows = F.unfold(x.reshape(1, 1, size, size), 3, padding=1)
        return (F.fold(windows.sin(), (size, size), 3, padding=1) ** 2).sum()

    x = torch.randn(size * size, dtype=torch.float64)
    found: list[torch.Tensor] = []
    # Of the 81 products that meet in each entry at most those of one factor are held at once.
    assert peak_bytes(lambda: found.append(chainrule.hessian(energy, layout="sparse_coo")(x))) < 24_000 * size * size
    (hessian,) = found
    count = F.fold(F.unfold(torch.ones(1, 1, size, size, dtype=x.dtype), 3, padding=1), (size, size), 3, padding=1).reshape(-1)
    # Each pixel's sine is added as often as windows hold it.
    expected = 2 * count**2 * (2 * x).cos()
    assert hessian._nnz() == size * size
    torch.testing.assert_close(torch.sparse.mm(hessian, torch.ones(size * size, 1, dtype=x.dtype))[:, 0], expected)
