"""Divergence, tangent kernel and Gauss-Newton products against dense Jacobians of torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.func
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

import chainrule

Tensor = torch.Tensor


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def layers(*sizes: int) -> torch.nn.Module:
    parts: list[torch.nn.Module] = []
    for one, two in zip(sizes[:-1], sizes[1:], strict=True):
        parts += [torch.nn.Linear(one, two, dtype=torch.float64), torch.nn.Tanh()]
    return torch.nn.Sequential(*parts[:-1]).requires_grad_(False)


FIELD = layers(4, 7, 6, 4)


def rotated(x: Tensor) -> Tensor:
    y = x.roll(1)
    y[0] += x[2]
    return y.sin() * x


FIELDS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "network": (FIELD, (4,)),
    "residual": (lambda x: x + FIELD(x).sin() * x.sum(), (4,)),
    "element-wise": (torch.sin, (5,)),
    "matrix": (lambda x: x @ x.T @ x, (3, 3)),
    "rectangle": (lambda x: (x @ x.T) @ x, (3, 2)),
    "scalar": (lambda x: x.exp() * x, ()),
    "size 1": (lambda x: x**3, (1,)),
    "size 0": (torch.sin, (0,)),
    "the input": (lambda x: x, (3,)),
    "independent": (torch.ones_like, (3,)),
    "permuted": (lambda x: x.flip(0) ** 2, (5,)),
    "writes": (rotated, (4,)),
    "softmax": (lambda x: x.softmax(0), (4,)),
    "sorted": (lambda x: x.sort()[0] * torch.arange(4, dtype=x.dtype), (4,)),
    "convolution": (lambda x: torch.conv1d(x[None, None], torch.ones(1, 1, 3, dtype=x.dtype), padding=1)[0, 0].tanh(), (6,)),
    "Fourier transform": (lambda x: torch.fft.ifft(torch.fft.fft(x) * torch.fft.fft(x).conj() * x.sin()).abs(), (5,)),
    "a gradient": (chainrule.grad(lambda x: FIELD(x).sin().sum()), (4,)),
}


def trace(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    size = x.numel()
    return torch.func.jacrev(function)(x).reshape(size, size).trace()


@pytest.mark.parametrize("name", FIELDS)
def test_divergence_is_the_trace(name: str) -> None:
    function, shape = FIELDS[name]
    oracle = torch.func.grad(lambda x: FIELD(x).sin().sum()) if name == "a gradient" else function
    for _ in range(3):
        x = real(*shape)
        found = chainrule.divergence(function)(x)
        assert found.shape == () and found.dtype == x.dtype
        torch.testing.assert_close(found, trace(oracle, x))


def test_divergence_per_sample_and_its_derivatives() -> None:
    for _ in range(3):
        batch, x = real(5, 4), real(4)
        torch.testing.assert_close(
            chainrule.vmap(chainrule.divergence(FIELD))(batch), torch.func.vmap(lambda x: trace(FIELD, x))(batch)
        )
        torch.testing.assert_close(
            chainrule.grad(chainrule.divergence(FIELD))(x), torch.func.grad(lambda x: trace(FIELD, x))(x)
        )
        leaf = x.clone().requires_grad_()
        chainrule.divergence(FIELD)(leaf).backward()
        torch.testing.assert_close(leaf.grad, torch.func.grad(lambda x: trace(FIELD, x))(x))


def test_divergence_of_trees() -> None:
    def function(state: dict[str, Tensor], other: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {"a": state["a"] ** 2 * other.sum(), "b": state["a"].sum() * state["b"]}, other * state["a"].prod()

    state, other = {"a": real(3), "b": real(2)}, real(4)
    expected = 2 * state["a"].sum() * other.sum() + 2 * state["a"].sum() + 4 * state["a"].prod()
    torch.testing.assert_close(chainrule.divergence(function, (0, 1))(state, other), expected)
    found, aux = chainrule.divergence(lambda x: (x**2, "aux"), has_aux=True)(other)
    torch.testing.assert_close(found, 2 * other.sum())
    assert aux == "aux"


def test_the_trace_of_a_network_forms_no_jacobian() -> None:
    wide = layers(30, 40, 40, 30)
    account = chainrule.explain(chainrule.divergence(wide))(real(30)).data[0]
    assert account["kind"] == "trace"
    best = min(account["alternatives"], key=lambda a: float(a["cost"]))
    assert best["flops"] < 1.2 * (30 * 40 * 40 + 3 * 40 * 40 + 500)


def gram(function: Callable[..., Tensor], *args: Any, argnums: Any = 0) -> Tensor:
    out = function(*args)
    jacobians = tree_leaves(torch.func.jacrev(function, argnums)(*args))
    total = sum(j.reshape(out.numel(), -1) @ j.reshape(out.numel(), -1).T for j in jacobians)
    assert isinstance(total, Tensor)
    return total.reshape((*out.shape, *out.shape))


def test_tangent_kernel_of_networks() -> None:
    network = layers(4, 7, 6, 3)
    convolution = torch.nn.Sequential(
        torch.nn.Conv1d(1, 3, 3, dtype=torch.float64), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(6, 2, dtype=torch.float64)
    ).requires_grad_(False)
    normalised = torch.nn.Sequential(
        torch.nn.Linear(4, 5, dtype=torch.float64), torch.nn.LayerNorm(5, dtype=torch.float64), torch.nn.Linear(5, 2, dtype=torch.float64)
    ).requires_grad_(False)
    for model, shape in ((network, (5, 4)), (convolution, (3, 1, 4)), (normalised, (3, 4))):
        def function(parameters: dict[str, Tensor], x: Tensor, model: torch.nn.Module = model) -> Tensor:
            found: Tensor = functional_call(model, parameters, (x,))
            return found

        for _ in range(2):
            parameters = {name: torch.randn_like(p) for name, p in model.named_parameters()}
            x = real(*shape)
            found = chainrule.ntk(function)(parameters, x)
            torch.testing.assert_close(found, gram(function, parameters, x))


def test_tangent_kernel_of_other_functions() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return (x[:, None] * y).sin().sum(0)

    for _ in range(3):
        x, y = real(3), real(3, 2)
        for argnums in (0, 1, (0, 1), -1):
            torch.testing.assert_close(chainrule.ntk(function, argnums)(x, y), gram(function, x, y, argnums=argnums))
        batch = real(4, 3)
        torch.testing.assert_close(
            chainrule.vmap(chainrule.ntk(function), in_dims=(0, None))(batch, y),
            torch.stack([gram(function, row, y) for row in batch]),
        )
    assert chainrule.ntk(lambda x: x.sum())(real(3)).shape == ()
    assert chainrule.ntk(torch.ones_like)(real(3)).tolist() == [[0.0] * 3] * 3
    assert chainrule.ntk(torch.sin)(real(0)).shape == (0, 0)
    kernel, aux = chainrule.ntk(lambda x: (x**2, 1), has_aux=True)(torch.ones(2))
    assert kernel.tolist() == [[4.0, 0.0], [0.0, 4.0]] and aux == 1


def test_gauss_newton_products() -> None:
    network = layers(4, 7, 3)
    x, target = real(5, 4), torch.tensor([0, 2, 1, 0, 2])

    def model(parameters: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(network, parameters, (x,))
        return found

    def loss(prediction: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(prediction, target)

    for _ in range(3):
        parameters = {name: torch.randn_like(p) for name, p in network.named_parameters()}
        tangents = {name: torch.randn_like(p) for name, p in network.named_parameters()}
        found = chainrule.ggn(model, loss, (parameters,), (tangents,))
        jacobian = torch.cat([j.reshape(15, -1) for j in torch.func.jacrev(model)(parameters).values()], 1)
        curvature = torch.func.hessian(loss)(model(parameters)).reshape(15, 15)
        vector = torch.cat([t.reshape(-1) for t in tangents.values()])
        expected = jacobian.T @ (curvature @ (jacobian @ vector))
        torch.testing.assert_close(torch.cat([found[name].reshape(-1) for name in parameters]), expected)
    torch.testing.assert_close(
        chainrule.grad(lambda v: chainrule.ggn(torch.sin, lambda y: (y**3).sum(), (x[0],), (v,)).sum())(x[1]),
        x[0].cos() ** 2 * 6 * x[0].sin(),
    )


def test_gauss_newton_of_several_arguments_with_aux() -> None:
    x, y, u, v = real(3), real(3), real(3), real(3)
    (gx, gy), aux = chainrule.ggn(
        lambda a, b: ({"out": a * b}, "aux"), lambda o: (o["out"] ** 2).sum(), (x, y), (u, v), has_aux=True
    )
    assert aux == "aux"
    pushed = 2 * (u * y + x * v)
    torch.testing.assert_close((gx, gy), (y * pushed, x * pushed))


@pytest.mark.parametrize("transform", [chainrule.divergence, chainrule.ntk])
def test_bad_input(transform: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match=transform.__name__):
        transform(lambda x: x)(torch.arange(3))
    with pytest.raises(RuntimeError, match=transform.__name__):
        transform(lambda x: x, argnums=1)(real(3))
    with pytest.raises(RuntimeError, match=transform.__name__):
        transform(lambda x: None)(real(3))
    with pytest.raises(RuntimeError, match=transform.__name__):
        transform(lambda x: (x, x))(real(3))
    with pytest.raises(RuntimeError, match=transform.__name__):
        transform(lambda x: x)(real(3).to(torch.complex128))
    torch.testing.assert_close(transform(torch.sin)(torch.zeros(2)).sum(), torch.tensor(2.0))


def test_bad_fields_and_losses() -> None:
    with pytest.raises(RuntimeError, match=r"divergence.*shape"):
        chainrule.divergence(lambda x: x[:2])(real(3))
    with pytest.raises(RuntimeError, match="scalar"):
        chainrule.ggn(torch.sin, torch.sin, (real(3),), (real(3),))
    with pytest.raises(RuntimeError, match="shape"):
        chainrule.ggn(torch.sin, torch.sum, (real(3),), (real(4),))
    with pytest.raises(RuntimeError, match="tuple"):
        chainrule.ggn(torch.sin, torch.sum, real(3), real(3))
