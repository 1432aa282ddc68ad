"""Normalisations whose results all have derivatives in torch's autograd, against the same in steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from chainrule import norms

Tensor = torch.Tensor
DOUBLE = torch.float64
EPS = 1e-5

#: The shape of the input, the dimensions of the statistics, that of the weight, and the op.
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], Callable[..., Any]]] = {
    "layer": ((3, 4), (1,), (4,), lambda x, w, b: norms.native_layer_norm(x, [4], w, b, EPS)),
    "layer, two dimensions": ((2, 3, 4), (1, 2), (3, 4), lambda x, w, b: norms.native_layer_norm(x, [3, 4], w, b, EPS)),
    "batch": ((5, 3), (0,), (1, 3), lambda x, w, b: norms.native_batch_norm(x, w, b, None, None, True, 0.1, EPS)),
    "batch of images": ((4, 3, 2), (0, 2), (1, 3, 1), lambda x, w, b: norms.native_batch_norm(x, w, b, None, None, True, 0.1, EPS)),
}


def in_steps(x: Tensor, weight: Tensor | None, bias: Tensor | None, dims: tuple[int, ...], beside: tuple[int, ...]) -> list[Tensor]:
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    scale = ((centred * centred).mean(dims, keepdim=True) + EPS).rsqrt()
    out = centred * scale
    if weight is not None and bias is not None:
        out = out * weight.reshape(beside) + bias.reshape(beside)
    return [out, mean, scale]


def derivatives(results: list[Tensor], leaves: list[Tensor], orders: int) -> list[Tensor]:
    """Those of a function of all results, and those of a function of these, and so on."""
    found: list[Tensor] = []
    for order in range(orders):
        marks = [torch.linspace(0.3, 1.7, r.numel(), dtype=DOUBLE) for r in results]
        loss = sum((r.reshape(-1) * mark).sin().sum() for r, mark in zip(results, marks, strict=True))
        results = list(torch.autograd.grad(loss, leaves, create_graph=order + 1 < orders, materialize_grads=True))
        found += results
    return found


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_derivatives_of_all_results_up_to_the_third(name: str, affine: bool) -> None:
    """In double precision; a dozen roundings of values up to some thousand in third derivatives."""
    shape, dims, beside, op = CASES[name]
    torch.manual_seed(3)
    x = torch.randn(shape, dtype=DOUBLE, requires_grad=True)
    own = [size for size in beside if size > 1]
    weight, bias = (torch.randn(own, dtype=DOUBLE, requires_grad=True) if affine else None for _ in range(2))
    leaves = [item for item in (x, weight, bias) if item is not None]
    for orders in (1, 2, 3):
        theirs = in_steps(x, weight, bias, dims, beside)
        out, *statistics = op(x, weight, bias)
        ours = [out, *(s.reshape(t.shape) for s, t in zip(statistics, theirs[1:], strict=True))]
        torch.testing.assert_close(ours, theirs)
        found, expected = derivatives(ours, leaves, orders), derivatives(theirs, leaves, orders)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("affine", [True, False])
def test_fixed_statistics(affine: bool) -> None:
    x = torch.randn(4, 3, 2, dtype=DOUBLE, requires_grad=True)
    weight, bias = (torch.randn(3, dtype=DOUBLE, requires_grad=True) if affine else None for _ in range(2))
    mean, variance = torch.randn(3, dtype=DOUBLE), torch.rand(3, dtype=DOUBLE) + 0.5
    ours = norms.native_batch_norm(x, weight, bias, mean, variance, False, 0.1, EPS)[0]
    column = (3, 1)
    theirs = (x - mean.reshape(column)) * (variance.reshape(column) + EPS).rsqrt()
    if weight is not None and bias is not None:
        theirs = theirs * weight.reshape(column) + bias.reshape(column)
    torch.testing.assert_close(ours, theirs)
    leaves = [item for item in (x, weight, bias) if item is not None]
    torch.testing.assert_close(derivatives([ours], leaves, 3), derivatives([theirs], leaves, 3), rtol=1e-9, atol=1e-9)


def test_torchs_own_is_called_where_nothing_requires_grad() -> None:
    x = torch.randn(3, 4)
    for found in (norms.native_layer_norm(x, [4], None, None, EPS), norms.native_batch_norm(x, None, None, None, None, True, 0.1, EPS)):
        assert all(result.grad_fn is None for result in found)
    low = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    assert "NativeLayerNorm" in str(norms.native_layer_norm(low, [4], None, None, EPS)[0].grad_fn)


def test_a_change_after_the_forward_is_an_error() -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    out = norms.native_layer_norm(x, [4], weight, None, EPS)[0]
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_derivatives_of_a_derivative_that_depends_on_nothing() -> None:
    """That by the bias is a sum of cotangents, here constants; the others depend on the input. In double precision."""
    torch.manual_seed(4)
    x = torch.randn(3, 4, dtype=DOUBLE, requires_grad=True)
    weight, bias = (torch.randn(4, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    found = []
    for out in (norms.native_layer_norm(x, [4], weight, bias, EPS)[0], in_steps(x, weight, bias, (1,), (1, 4))[0]):
        first = torch.autograd.grad(out.sum(0)[0], [x, weight, bias], create_graph=True)
        total = sum((item * torch.linspace(0.3, 1.7, item.numel(), dtype=DOUBLE).reshape(item.shape)).sum() for item in first)
        found.append(torch.autograd.grad(total, x)[0])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", ["layer", "batch"])
def test_a_bias_without_a_weight(kind: str) -> None:
    torch.manual_seed(5)
    x, bias = torch.randn(3, 4, dtype=DOUBLE, requires_grad=True), torch.randn(4, dtype=DOUBLE, requires_grad=True)
    dims = (1,) if kind == "layer" else (0,)
    if kind == "layer":
        out = norms.native_layer_norm(x, [4], None, bias, EPS)[0]
    else:
        out = norms.native_batch_norm(x, None, bias, None, None, True, 0.1, EPS)[0]
    expected = in_steps(x, None, None, dims, (1, 4))[0] + bias
    found = derivatives([out], [x, bias], 3)
    torch.testing.assert_close(found, derivatives([expected], [x, bias], 3), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mask", [[True, True, True], [True, False, False], [False, True, True], [True, False, True]])
@pytest.mark.parametrize("kind", ["layer", "batch"])
def test_the_derivative_as_a_function_of_all_its_tensors(kind: str, mask: list[bool]) -> None:
    """A mean and a scale that are not those of the input; finite differences in double precision."""
    torch.manual_seed(6)
    cotangent, x, weight = (torch.randn(s, dtype=DOUBLE, requires_grad=True) for s in ((3, 4), (3, 4), (4,)))
    sizes = (3, 1) if kind == "layer" else (4,)
    mean, scale = torch.randn(sizes, dtype=DOUBLE, requires_grad=True), (torch.rand(sizes, dtype=DOUBLE) + 0.5).requires_grad_()

    def derivative(*given: Tensor) -> list[Tensor]:
        c, x, mean, scale, weight = given
        if kind == "layer":
            found = norms.layer_norm_backward(c, x, [4], mean, scale, weight, weight, mask)
        else:
            found = norms.batch_norm_backward(c, x, weight, mean, scale, EPS, mask)
        return [item for item, wanted in zip(found, mask, strict=True) if wanted and item is not None]

    given = (cotangent, x, mean, scale, weight)
    assert torch.autograd.gradcheck(derivative, given)
    assert torch.autograd.gradgradcheck(derivative, given)


def test_statistics_of_another_tensor_count_by_themselves() -> None:
    """Those of `2 x`, which is no view of `x`: the derivative by `x` has a part of its own, and one through them."""
    torch.manual_seed(7)
    x, cotangent = torch.randn(3, 4, dtype=DOUBLE, requires_grad=True), torch.randn(3, 4, dtype=DOUBLE)

    def ours(x: Tensor) -> Tensor:
        _, mean, scale = norms.native_layer_norm(2 * x, [4], None, None, EPS)
        return norms.layer_norm_backward(cotangent, x, [4], mean, scale, None, None, [True, False, False])[0]  # type: ignore[return-value]

    assert torch.autograd.gradcheck(ours, (x,))
    assert torch.autograd.gradgradcheck(ours, (x,))
