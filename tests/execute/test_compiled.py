"""Graphs run by the inductor compiler: the code alone where torch does nothing around it, guarded as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

import chainrule
from chainrule.execute import compiled as compiled_graphs

Tensor = torch.Tensor
WEIGHT = torch.randn(5, 4, dtype=torch.float64)


def layer(x: Tensor) -> Tensor:
    return torch.tanh(WEIGHT @ x) + 2.5


def made(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], Any]:
    """The function, compiled for these arguments, and what runs its graph."""
    compiled = chainrule.compile(function, backend="inductor")
    compiled(*args)
    graph = compiled._held(*args)  # type: ignore[attr-defined]
    return compiled, graph.run


def test_the_code_alone_agrees() -> None:
    function = chainrule.jacobian(layer)
    compiled, run = made(function, torch.randn(4, dtype=torch.float64))
    assert hasattr(run, "code")
    for _ in range(4):
        x = torch.randn(4, dtype=torch.float64)
        expected = torch.func.jacrev(layer)(x)
        found = compiled(x)
        torch.testing.assert_close(found, expected)
        found.zero_()
        torch.testing.assert_close(run([x, *compiled._held(x).closed])[0], expected)  # type: ignore[attr-defined]
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), expected)


def test_what_was_closed_over_is_read_anew() -> None:
    weight = torch.randn(3, 4, dtype=torch.float64)
    compiled, run = made(chainrule.jacobian(lambda x: torch.tanh(weight @ x)), torch.randn(4, dtype=torch.float64))
    assert hasattr(run, "code")
    for _ in range(4):
        x = torch.randn(4, dtype=torch.float64)
        weight.add_(1.0)
        torch.testing.assert_close(compiled(x), torch.func.jacrev(lambda x: torch.tanh(weight @ x))(x))


def test_other_shapes_and_strides_are_compiled_anew() -> None:
    def function(x: Tensor) -> Tensor:
        return (x * x).sin() + x

    compiled, run = made(function, torch.randn(4, 6))
    assert hasattr(run, "code")
    compiled(torch.randn(4, 6))
    compiled(torch.randn(4, 6))
    for x in (torch.randn(6, 4).T, torch.randn(4, 12)[:, ::2], torch.randn(4, 6, dtype=torch.float64), torch.randn(1, 6)):
        misses = compiled.cache_info().misses  # type: ignore[attr-defined]
        for _ in range(3):
            torch.testing.assert_close(compiled(x), function(x))
        assert compiled.cache_info().misses == misses + 1  # type: ignore[attr-defined]


def test_results_of_one_value_are_two_tensors() -> None:
    compiled, run = made(lambda x: (x + 1, x + 1, x.sin()), torch.randn(5))
    assert hasattr(run, "code")
    for _ in range(3):
        x = torch.randn(5)
        first, second, _ = compiled(x)
        first.zero_()
        torch.testing.assert_close(second, x + 1)


@pytest.mark.parametrize(
    "function",
    [lambda x: (x, x[0], x + 1), lambda x: x + torch.rand(2, 3), lambda x: x.sin()],
    ids=["views of inputs", "random numbers", "a graph"],
)
def test_others_keep_what_torch_does(function: Callable[..., Any], request: pytest.FixtureRequest) -> None:
    graph = request.node.callspec.id == "a graph"
    compiled, run = made(function, torch.randn(2, 3, requires_grad=graph))
    assert not hasattr(run, "code")
    x = torch.randn(2, 3, requires_grad=graph)
    for _ in range(3):
        found = compiled(x)
        if graph:
            torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], x.cos())
        elif isinstance(found, tuple):
            assert found[0].data_ptr() == found[1].data_ptr() == x.data_ptr()
        else:
            assert bool(((found - x) >= 0).all()) and not torch.equal(found, compiled(x))


def test_without_autograd_leaves_may_require_it() -> None:
    function = chainrule.jacobian(layer)
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        compiled, run = made(function, x)
        assert hasattr(run, "code")
        for _ in range(3):
            found = compiled(x)
            assert not found.requires_grad
            torch.testing.assert_close(found, torch.func.jacrev(layer)(x))
    found = compiled(x)
    assert found.requires_grad
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    torch.testing.assert_close(gradient, torch.func.grad(lambda x: torch.func.jacrev(layer)(x).square().sum())(x.detach()))


@pytest.mark.parametrize("function", [lambda x: x.sin() * 2.0, lambda x: (x.sin() * 2.0, x)[0], lambda x: x.clone().sin_().mul_(2)])
def test_tangents_of_forward_mode_are_carried(function: Callable[..., Any]) -> None:
    compiled, _ = made(function, torch.randn(4))
    for _ in range(3):
        x, tangent = torch.randn(4), torch.randn(4)
        torch.testing.assert_close(compiled(x), x.sin() * 2.0)
        with forward_ad.dual_level():
            primal, found = forward_ad.unpack_dual(compiled(forward_ad.make_dual(x, tangent)))
            assert found is not None
            torch.testing.assert_close(primal, x.sin() * 2.0)
            torch.testing.assert_close(found, tangent * x.cos() * 2.0)


def test_code_that_calls_torch_compares_what_it_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    original = compiled_graphs._is_self_contained

    def noted(codes: Any) -> bool:
        seen.append(original(codes))
        return seen[-1]

    monkeypatch.setattr(compiled_graphs, "_is_self_contained", noted)
    matrix = torch.randn(4, 4, dtype=torch.float64)
    function = lambda x: torch.linalg.qr(matrix * x).R.abs()  # noqa: E731
    compiled, _ = made(function, torch.randn(4, dtype=torch.float64))
    x = torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), function(x))
    assert seen == [False]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_what_was_closed_over_may_be_negated_when_it_is_read(requires_grad: bool) -> None:
    """Generated code reads memory, in which the sign is not."""
    complex_values = torch.randn(4, dtype=torch.complex128)
    negated, replaced = complex_values.conj().imag, torch.randn(4, dtype=torch.float64)
    assert negated.is_neg()
    compiled = chainrule.compile(chainrule.grad(lambda x: (x.sin() * negated * replaced).sum()), backend="inductor")
    for number in range(5):
        if number == 3:
            replaced.data = complex_values.conj().imag
        x = torch.randn(4, dtype=torch.float64, requires_grad=requires_grad)
        torch.testing.assert_close(compiled(x), x.cos() * negated * replaced)
