"""Reverse and forward mode through conversions: kernels get cotangents and tangents of the dtype that they work in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.func
import torch.nn.functional as F

import chainrule

Tensor = torch.Tensor

WEIGHT = torch.randn(2, 1, 3)
CLASSES = torch.tensor([1, 0, 5, 2])
GRID = torch.rand(1, 3, 3, 2) * 2 - 1

#: Functions whose local Jacobian is a kernel, of a matrix of shape (4, 6).
KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "softmax": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "cross_entropy": lambda x: F.cross_entropy(x, CLASSES),
    "conv1d": lambda x: F.conv1d(x[:, None], WEIGHT),
    "conv_transpose1d": lambda x: F.conv_transpose1d(x[:, None], WEIGHT.transpose(0, 1)),
    "grid_sample": lambda x: F.grid_sample(x[None, None], GRID, align_corners=False),
    "cholesky": lambda x: torch.linalg.cholesky(x @ x.T + torch.eye(4)),
    "silu": F.silu,
}

TRANSFORMS: dict[str, Callable[..., Callable[[Tensor], Tensor]]] = {
    "grad": lambda m, f: m.grad(lambda x: f(x).sum()),
    "jacrev": lambda m, f: m.jacrev(f),
    "hessian": lambda m, f: m.hessian(lambda x: f(x).sum()),
    "vmap of grad": lambda m, f: lambda x: m.vmap(m.grad(lambda x: f(x).sum()))(torch.stack([x, 2 * x])),
    "jvp": lambda m, f: lambda x: m.jvp(f, (x,), (x.cos(),))[1],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", KERNELS)
def test_converted_after_a_kernel(name: str, transform: str, dtype: torch.dtype) -> None:
    if name == "grid_sample" and transform in ("hessian", "jvp"):
        pytest.skip("torch has no such derivative of it")
    function, make = KERNELS[name], TRANSFORMS[transform]

    def converted(x: Tensor) -> Tensor:
        return function(x).to(dtype).sin().to(torch.float32)

    # Numbers near one, sums of at most 24, some tens of roundings: of float32 below 1e-4; of bfloat16's eight bits below 0.2.
    close = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.2}
    for _ in range(3):
        x = torch.rand(4, 6)
        torch.testing.assert_close(make(chainrule, converted)(x), make(torch.func, converted)(x), **close)


def test_autocast() -> None:
    weight = torch.randn(6, 3)

    def loss(x: Tensor) -> Tensor:
        return F.gelu(F.layer_norm(x, (6,)) @ weight).float().sum()

    for _ in range(3):
        x = torch.rand(4, 6)
        with torch.autocast("cpu", torch.bfloat16):
            found = chainrule.grad(loss)(x)
        torch.testing.assert_close(found, torch.func.grad(loss)(x), rtol=0.1, atol=0.3)
        assert found.dtype == torch.float32


def test_sparse_hessian_where_the_default_dtype_is_another() -> None:
    def energy(u: Tensor) -> Tensor:
        y = u + 0.5 * u**2
        return (y * torch.tanh(y.roll(2))).sum()

    x = torch.randn(12)
    torch.set_default_dtype(torch.float64)
    try:
        for _ in range(3):
            found = chainrule.hessian(energy, layout="sparse_coo")(x)
            torch.testing.assert_close(found.to_dense(), torch.func.hessian(energy)(x), rtol=1e-4, atol=1e-4)
    finally:
        torch.set_default_dtype(torch.float32)
