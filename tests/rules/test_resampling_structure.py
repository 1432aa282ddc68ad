"""Sparse patterns and values of resampling ops, against the op applied to each unit tensor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import chainrule

MODES = (
    ("nearest", 1), ("nearest", 2), ("nearest", 3), ("nearest-exact", 1), ("nearest-exact", 2), ("linear", 1), ("bilinear", 2),
    ("bicubic", 2), ("trilinear", 3),
)  # fmt: skip
SIZES = (
    {"scale_factor": 2}, {"scale_factor": 1.7}, {"scale_factor": 0.6}, {"size": (5, 7, 3)}, {"size": (1, 1, 1)},
    {"scale_factor": 1.7, "recompute_scale_factor": True},
)  # fmt: skip


def cases():
    for mode, rank in MODES:
        linear = mode in ("linear", "bilinear", "bicubic", "trilinear")
        for options in SIZES:
            given = {k: v[:rank] if k == "size" else v for k, v in options.items()}
            for corners in (False, True) if linear else (None,):
                for antialias in (False, True) if mode in ("bilinear", "bicubic") and not corners else (False,):
                    yield rank, {"mode": mode, "align_corners": corners, "antialias": antialias, **given}


def check(function, shape, dtype=torch.float64):
    """The function is linear: its matrix has the images of the unit tensors as columns."""
    x = torch.randn(shape, dtype=dtype)
    units = torch.eye(x.numel(), dtype=dtype).reshape(-1, *shape)
    expected = torch.stack([function(unit).reshape(-1) for unit in units], 1)
    found = chainrule.jacobian(function, layout="sparse_csr")(x)
    assert found.values().numel() == int((expected != 0).sum()), "no entry that is zero"
    torch.testing.assert_close(found.to_dense(), expected)
    normal = chainrule.hessian(lambda x: 0.5 * (function(x) ** 2).sum(), layout="sparse_csr")(x)
    torch.testing.assert_close(normal.to_dense(), expected.T @ expected)


@pytest.mark.parametrize(("rank", "options"), list(cases()), ids=str)
def test_interpolation(rank, options):
    check(lambda x: F.interpolate(x, **options), (1, 2, *(6, 4, 5)[:rank]))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 6, 9])
def test_adaptive_average(rank, size):
    check(lambda x: getattr(F, f"adaptive_avg_pool{rank}d")(x, size), (1, 2, *(6, 4, 5)[:rank]))


def test_single_precision():
    check(lambda x: F.interpolate(x, scale_factor=(1.3, 2.1), mode="bilinear"), (2, 1, 7, 5), torch.float32)
    check(lambda x: F.interpolate(x, scale_factor=(1.3, 2.1)), (1, 2, 7, 5), torch.float32)


def test_long_dimensions():
    """Linear in the size: two taps of each of 400 000 places, of 200 000."""
    x = torch.randn(1, 1, 200_000, dtype=torch.float64)
    function = lambda x: F.interpolate(x, scale_factor=2, mode="linear")  # noqa: E731
    found = chainrule.jacobian(function, layout="sparse_csr")(x)
    torch.testing.assert_close(found @ x.reshape(-1, 1), function(x).reshape(-1, 1))
    assert found.values().numel() == 2 * 400_000 - 2
