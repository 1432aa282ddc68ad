"""Laplacian and diagonal of the Hessian against the whole Hessian, three fresh inputs each, and joined with the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.func
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import chainrule

Tensor = torch.Tensor


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


FIRST, BIAS, SECOND, LAST = real(8, 4), real(8), real(7, 8), real(7)


def network(x: Tensor) -> Tensor:
    return (LAST * torch.tanh(SECOND @ torch.tanh(FIRST @ x + BIAS))).sum()


def assigned(x: Tensor) -> Tensor:
    y = x.clone()
    y[1:] *= x[:-1]
    return y.sin().sum()


def branching(x: Tensor) -> Tensor:
    return (x**3).sum() if x.sum() > 0 else x.cos().sum()


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "cubes": (lambda x: (x**3).sum(), (4,)),
    "network": (network, (4,)),
    "vector output": (lambda x: SECOND @ torch.tanh(FIRST @ x), (4,)),
    "product with the sum": (lambda x: x.sin() * x.sum(), (4,)),
    "matrix": (lambda x: (x @ x.T).tanh(), (3, 2)),
    "product": (lambda x: x.prod(), (4,)),
    "softmax": (lambda x: x.softmax(-1), (4,)),
    "logsumexp": (lambda x: x.logsumexp(0), (4,)),
    "norm": (lambda x: x.norm(), (4,)),
    "layer norm": (lambda x: F.layer_norm(x, (4,)).sin().sum(), (4,)),
    "linear": (lambda x: x.sum(), (4,)),
    "constant": (lambda x: torch.ones(2, dtype=x.dtype), (4,)),
    "the input": (lambda x: x, (3,)),
    "inverse": (lambda x: torch.linalg.inv(x @ x.T + torch.eye(3, dtype=x.dtype)).sum(), (3, 3)),
    "scalar": (lambda x: x.sin(), ()),
    "size 1": (lambda x: x.exp(), (1,)),
    "size 0": (lambda x: x.sin().sum(), (0,)),
    "slices": (lambda x: (x[1:] * x[:-1]).sin().sum(), (5,)),
    "where": (lambda x: torch.where(x > 0, x**3, x**2).sum(), (5,)),
    "convolution": (lambda x: F.conv1d(x.reshape(1, 1, -1), torch.ones(1, 1, 3, dtype=x.dtype)).tanh().sum(), (6,)),
    "silu": (lambda x: F.silu(x).pow(2).sum(), (6,)),
    "eigenvalues": (lambda x: torch.linalg.eigvalsh(x + x.T).exp().sum(), (3, 3)),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x).sum(), (1, 3, 2)),
    "cumulative product": (lambda x: x.cumprod(0).sum(), (4,)),
    "assignment": (assigned, (4,)),
    "branch": (branching, (4,)),
    "Fourier transform": (lambda x: torch.fft.fft(x).abs(), (4,)),
    "complex powers": (lambda x: (torch.complex(x, x**2) ** 2).imag, (3,)),
    "complex eigenvalues": (lambda x: torch.linalg.eigvals(x.diag() + 0.1).abs(), (4,)),
    "sign": (lambda x: torch.sgn(x) * x, (2, 3)),
    "gradient inside": (lambda x: chainrule.grad(lambda y: (y**3).sum())(x).sin().sum(), (3,)),
}


def whole(function: Callable[..., Tensor], *args: Tensor, argnum: int = 0) -> Tensor:
    """The diagonal of the Hessian, taken from torch.func's whole Hessian."""
    size = args[argnum].numel()
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels of torch's attention have no forward mode
        found = torch.func.hessian(function, argnum)(*args)
    shape = found.shape[: found.dim() - 2 * args[argnum].dim()]
    return found.reshape((*shape, size, size)).diagonal(0, -2, -1).reshape((*shape, *args[argnum].shape))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_against_the_whole_hessian(name: str) -> None:
    function, shape = FUNCTIONS[name]
    oracle = function
    if name == "gradient inside":
        def oracle(x: Tensor) -> Tensor:
            return (3 * x**2).sin().sum()
    for _ in range(3):
        x = real(*shape)
        diagonal = whole(oracle, x)
        found = chainrule.hessian_diagonal(function)(x)
        assert found.dtype == x.dtype and not found.requires_grad
        torch.testing.assert_close(found, diagonal)
        total = diagonal.sum(tuple(range(diagonal.dim() - x.dim(), diagonal.dim()))) if x.dim() else diagonal
        torch.testing.assert_close(chainrule.laplacian(function)(x), total)


def test_against_finite_differences() -> None:
    x, step = real(4), 1e-4
    shifts = torch.eye(4, dtype=torch.float64) * step
    expected = torch.stack([(network(x + s) - 2 * network(x) + network(x - s)) / step**2 for s in shifts])
    torch.testing.assert_close(chainrule.hessian_diagonal(network)(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(chainrule.laplacian(network)(x), expected.sum(), atol=1e-5, rtol=1e-5)


def test_several_arguments() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return (x * y.sin()).sum() * x.exp().sum()

    for _ in range(3):
        x, y = real(4), real(4)
        parts = whole(function, x, y), whole(function, x, y, argnum=1)
        found = chainrule.hessian_diagonal(function, (0, 1))(x, y)
        assert isinstance(found, tuple)
        torch.testing.assert_close(found, parts)
        torch.testing.assert_close(chainrule.laplacian(function, (0, 1))(x, y), parts[0].sum() + parts[1].sum())
        torch.testing.assert_close(chainrule.laplacian(function, argnums=-1)(x, y), parts[1].sum())


def test_trees_and_aux() -> None:
    def function(point: dict[str, Tensor]) -> tuple[Tensor, str]:
        return (point["x"] ** 2 * point["y"]).sum(), "kept"

    point = {"x": real(3), "y": real(3)}
    diagonal, aux = chainrule.hessian_diagonal(function, has_aux=True)(point)
    assert aux == "kept"
    torch.testing.assert_close(diagonal, {"x": 2 * point["y"], "y": torch.zeros(3, dtype=torch.float64)})
    total, aux = chainrule.laplacian(function, has_aux=True)(point)
    assert aux == "kept"
    torch.testing.assert_close(total, (2 * point["y"]).sum())


def trace_of_hessian(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.func.hessian(function)(x).diagonal(0, -2, -1).sum(-1)


def test_per_sample_and_nested() -> None:
    oracle = trace_of_hessian(network)
    for _ in range(3):
        batch = real(5, 4)
        torch.testing.assert_close(chainrule.vmap(chainrule.laplacian(network))(batch), torch.func.vmap(oracle)(batch))
        x = real(4)
        torch.testing.assert_close(chainrule.laplacian(chainrule.laplacian(network))(x), trace_of_hessian(oracle)(x))
        torch.testing.assert_close(chainrule.grad(chainrule.laplacian(network))(x), torch.func.grad(oracle)(x))
        tangent = real(4)
        ours = chainrule.jvp(chainrule.laplacian(network), (x,), (tangent,))
        torch.testing.assert_close(ours, torch.func.jvp(oracle, (x,), (tangent,)))


def residual(library: Any, weight: Tensor, batch: Tensor) -> Tensor:
    def field(x: Tensor) -> Tensor:
        return (LAST * torch.tanh(SECOND @ torch.tanh(weight @ x + BIAS))).sum()

    operator = chainrule.laplacian(field) if library is chainrule else trace_of_hessian(field)
    return library.vmap(operator)(batch).square().mean()


def test_the_loss_of_a_pde_solver() -> None:
    for _ in range(3):
        batch, weight = real(5, 4), real(8, 4)
        expected = torch.func.grad(lambda w: residual(torch.func, w, batch))(weight)
        torch.testing.assert_close(chainrule.grad(lambda w: residual(chainrule, w, batch))(weight), expected)
        parameter = weight.clone().requires_grad_()
        residual(chainrule, parameter, batch).backward()
        torch.testing.assert_close(parameter.grad, expected)


def test_without_gradients_around() -> None:
    x = real(4)
    expected = trace_of_hessian(network)(x)
    with torch.no_grad():
        torch.testing.assert_close(chainrule.laplacian(network)(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(chainrule.laplacian(network)(x), expected)
    torch.testing.assert_close(chainrule.laplacian(network)(x), expected)


@pytest.mark.parametrize("transform", [chainrule.laplacian, chainrule.hessian_diagonal])
def test_bad_input(transform: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match=transform.__name__):
        transform(lambda x: x.sum())(torch.arange(3))
    with pytest.raises(RuntimeError, match=transform.__name__):
        transform(lambda x: x.sum(), argnums=2)(real(3))
    with pytest.raises(RuntimeError, match=transform.__name__):
        transform(lambda x: 3.0)(real(3))
    torch.testing.assert_close(chainrule.laplacian(network)(torch.zeros(4).double()), trace_of_hessian(network)(torch.zeros(4).double()))


def test_steps_under_no_grad_count_as_in_the_hessian() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            held = x.sin()
        return held * x

    for _ in range(2):
        x = real(3)
        diagonal = whole(function, x)
        torch.testing.assert_close(chainrule.hessian_diagonal(function)(x), diagonal)
        torch.testing.assert_close(chainrule.laplacian(function)(x), diagonal.sum(-1))
        batch = real(2, 3)
        expected = torch.stack([whole(function, row).sum(-1) for row in batch])
        torch.testing.assert_close(chainrule.vmap(chainrule.laplacian(function))(batch), expected)
    (first, second), aux = chainrule.hessian_diagonal(lambda x, y: (function(x).sum() * y, 3), (0, 1), has_aux=True)(x, x[0])
    assert aux == 3
    torch.testing.assert_close((first, second), (whole(lambda x: function(x).sum(), x) * x[0], torch.zeros_like(x[0])))


def test_views_of_contiguous_copies_are_replayed() -> None:
    def function(x: Tensor) -> Tensor:
        return (x**2).reshape(6, 2).t().contiguous().view(3, 4).sin().sum()

    for _ in range(3):
        x = real(3, 4)
        ours = chainrule.jvp(chainrule.grad(function), (x,), (x.cos(),))
        torch.testing.assert_close(ours, torch.func.jvp(torch.func.grad(function), (x,), (x.cos(),)))
        torch.testing.assert_close(chainrule.laplacian(function)(x), whole(function, x).sum())
