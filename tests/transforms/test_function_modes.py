"""A user's function modes around transforms, and tensors that left their vmap, inside of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import chainrule


class AddForMul(TorchFunctionMode):
    """Makes products sums."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("mul", "__mul__"):
            return torch.add(*args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, None) for name in ("grad", "jacobian", "hessian", "laplacian", "hessian_diagonal")]
    + [(name, "sparse_coo") for name in ("jacobian", "hessian")],
)
def test_what_runs_under_a_function_mode_is_not_for_later_runs(name: str, layout: str | None) -> None:
    x = torch.tensor([0.5, 1.0, 0.3], dtype=torch.float64)
    number = 1.0 + 0.01 * sum(map(ord, name)) + (layout is not None)  # a plan of its own

    def function(x: torch.Tensor) -> torch.Tensor:
        return ((x.tanh() + number).exp()).sum()

    transform = getattr(chainrule, name)(function, **({} if layout is None else {"layout": layout}))
    with AddForMul():
        transform(x)
    matrix = torch.func.hessian(function)(x)
    expected = {
        "grad": torch.func.grad(function)(x), "jacobian": torch.func.grad(function)(x), "hessian": matrix,
        "laplacian": matrix.trace(), "hessian_diagonal": matrix.diagonal(),
    }[name]  # fmt: skip
    for _ in range(2):
        found = transform(x)
        torch.testing.assert_close(found if layout is None else found.to_dense(), expected)


def test_a_default_device_is_no_such_mode() -> None:
    x = torch.rand(3, dtype=torch.float64)
    expected = torch.func.hessian(lambda x: (x.sin() * torch.ones(3, dtype=x.dtype)).sum())(x)
    with torch.device("cpu"):
        found = chainrule.hessian(lambda x: (x.sin() * torch.ones(3, dtype=x.dtype)).sum())(x)
    torch.testing.assert_close(found, expected)


ESCAPED = {
    "product": lambda y, k: (y * k).sum(),
    "function of it": lambda y, k: (y * k.sin()).sum(),
    "linear": lambda y, k: F.linear(y, k[None]).sum(),
    "where": lambda y, k: torch.where(k > 0, y, k).sum(),
    "stack": lambda y, k: torch.stack([y, k]).sum(),
    "cat": lambda y, k: torch.cat([k, y]).sum(),
    "dot": lambda y, k: y @ k,
    "in place": lambda y, k: (y * 1).add_(k).sum(),
}


@pytest.mark.parametrize("name", ESCAPED)
def test_tensors_that_left_their_vmap_are_refused_by_every_transform(name: str) -> None:
    x = torch.rand(3, 4, dtype=torch.float64)
    kept: list[torch.Tensor] = []
    chainrule.vmap(lambda a: kept.append(a.exp()) or a)(x)

    def function(y: torch.Tensor) -> torch.Tensor:
        return ESCAPED[name](y, kept[0])

    v = torch.ones(4, dtype=torch.float64)
    calls = {
        "grad": lambda: chainrule.grad(function)(x[0]),
        "jvp": lambda: chainrule.jvp(function, (x[0],), (v,)),
        "vjp": lambda: chainrule.vjp(function, x[0]),
        "jacobian": lambda: chainrule.jacobian(function)(x[0]),
        "hessian": lambda: chainrule.hessian(function)(x[0]),
        "vmap of grad": lambda: chainrule.vmap(chainrule.grad(function))(x),
        "laplacian": lambda: chainrule.laplacian(function)(x[0]),
    }
    for call in calls.values():
        with pytest.raises(RuntimeError, match="escaped"):
            call()


def test_data_of_a_mapped_tensor_cannot_be_replaced() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        y.data = x.cos()
        return y.exp()

    for transform in (chainrule.vmap(function), chainrule.vmap(chainrule.vmap(function))):
        with pytest.raises(RuntimeError, match=r"\.data"):
            transform(torch.rand(2, 3, 4))
    x = torch.rand(2, 3)
    torch.testing.assert_close(chainrule.vmap(lambda x: x.sin().data + 1)(x), x.sin() + 1)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5), (2, 3, 2, 2), (2, 3, 2, 1, 2)], ids=str)
def test_weighted_cross_entropy_of_many_dimensions(shape: tuple[int, ...], smoothing: float, reduction: str) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    target = torch.randint(0, 3, (shape[0], *shape[2:]))
    target.view(-1)[0] = -100
    weight = torch.rand(3, dtype=torch.float64)

    def function(x: torch.Tensor) -> torch.Tensor:
        return (F.cross_entropy(x, target, weight, reduction=reduction, label_smoothing=smoothing) ** 2).sum()

    torch.testing.assert_close(chainrule.grad(function)(x), torch.func.grad(function)(x))
    torch.testing.assert_close(chainrule.hessian(function)(x), torch.func.hessian(function)(x))
    stacked = torch.stack([x, 2 * x])
    expected = torch.stack([torch.func.grad(function)(sample) for sample in stacked])
    torch.testing.assert_close(chainrule.vmap(chainrule.grad(function))(stacked), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cross_entropy_of_many_dimensions_in_half_precision(dtype: torch.dtype) -> None:
    x, target = torch.randn(2, 3, 2, 2), torch.randint(0, 3, (2, 2, 2))
    found = chainrule.grad(lambda x: F.cross_entropy(x, target))(x.to(dtype))
    expected = torch.func.grad(lambda x: F.cross_entropy(x, target))(x.to(dtype).float())
    # Eight entries of at most 1/8, with some ten roundings each.
    torch.testing.assert_close(found.float(), expected, atol=10 * torch.finfo(dtype).eps / 8, rtol=10 * torch.finfo(dtype).eps)
