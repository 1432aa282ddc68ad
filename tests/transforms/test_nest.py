"""Nests that run as a whole: replayed on fresh values, and never where what they recorded no longer holds."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.func

import chainrule
from chainrule.execute import engine, planning
from chainrule.transforms import levels

Tensor = torch.Tensor


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def smooth(x: Tensor) -> Tensor:
    return torch.tanh(x * x.sum()) + x**3


def total(x: Tensor) -> Tensor:
    return smooth(x).sum()


NESTS: dict[str, Callable[[Any], Callable[[Tensor], Any]]] = {
    "hessian": lambda m: m.hessian(total),
    "hessian of a vector": lambda m: m.hessian(smooth),
    "forward over forward": lambda m: m.jacfwd(m.jacfwd(smooth)),
    "reverse over reverse": lambda m: m.jacrev(m.jacrev(smooth)),
    "reverse over forward": lambda m: m.jacrev(m.jacfwd(smooth)),
    "jacobian of the gradient": lambda m: m.jacfwd(m.grad(total)),
    "gradient of a gradient": lambda m: m.grad(lambda x: m.grad(total)(x).sum()),
    "third order": lambda m: m.jacfwd(m.jacrev(m.jacfwd(smooth))),
    "fourth order": lambda m: m.hessian(m.hessian(total)),
    "tangent of the gradient": lambda m: lambda x: m.jvp(m.grad(total), (x,), (x.cos(),)),
    "cotangent of the gradient": lambda m: lambda x: m.vjp(m.grad(total), x)[1](x.cos()),
    "per sample": lambda m: m.vmap(m.hessian(total)),
    "per sample twice": lambda m: m.vmap(m.vmap(m.hessian(lambda x: total(x[None])))),
    "derivative of per sample": lambda m: m.jacrev(m.vmap(m.grad(total))),
}


@pytest.mark.parametrize("name", NESTS)
def test_every_call_sees_its_own_values(name: str) -> None:
    ours, theirs = NESTS[name](chainrule), NESTS[name](torch.func)
    for _ in range(3):
        x = real(2, 3) if "per sample" in name else real(3)
        torch.testing.assert_close(ours(x), theirs(x))


def test_the_function_runs_once_and_a_second_call_does_not_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(x: Tensor) -> Tensor:
        calls.append(1)
        return total(x)

    derivative = chainrule.jacfwd(chainrule.jacrev(chainrule.grad(counted)))
    derivative(real(3))
    assert len(calls) == 1

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("planned again")

    monkeypatch.setattr(planning, "plan", refuse)
    x = real(3)
    torch.testing.assert_close(derivative(x), torch.func.jacfwd(torch.func.jacrev(torch.func.grad(total)))(x))
    assert len(calls) == 2


def components(x: Tensor) -> Tensor:
    """What systems of equations look like: single components, slices, and a stack of them."""
    rates, state = x[:2], x[2:]
    for _ in range(2):
        product = state[0] * state[1]
        state = state + 0.1 * torch.stack([rates[0] * state[0] - product, product - rates[1] * state[1]])
    return (state**2).sum()


@pytest.mark.parametrize("mode", ["jvp", "vjp"])
def test_a_nest_of_a_function_of_components_does_not_plan_twice(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def product(library: Any, x: Tensor, v: Tensor) -> Tensor:
        gradient = library.grad(components)
        return library.jvp(gradient, (x,), (v,))[1] if mode == "jvp" else library.vjp(gradient, x)[1](v)[0]

    product(chainrule, real(4), real(4))

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("planned again")

    monkeypatch.setattr(planning, "plan", refuse)
    x, v = real(4), real(4)
    torch.testing.assert_close(product(chainrule, x, v), product(torch.func, x, v))


def test_closed_over_values_are_read_each_time() -> None:
    scale = real(3)
    found = chainrule.hessian(lambda x: (scale * x**3).sum())
    for step in range(4):
        x = real(3)
        torch.testing.assert_close(found(x), torch.diag(6 * scale * x))
        if step == 1:
            scale.mul_(2)
        if step == 2:
            scale = real(3)


def test_python_numbers_and_branches_are_read_each_time() -> None:
    for factor in (2.0, 3.0, 2, True, 2.0):
        found = chainrule.hessian(lambda x, f=factor: (f * x**3).sum())(torch.ones(2, dtype=torch.float64))
        torch.testing.assert_close(found, 6.0 * factor * torch.eye(2, dtype=torch.float64))

    def branching(x: Tensor) -> Tensor:
        return (x**3).sum() if x.sum() > 0 else (x**2).sum()

    for sign in (1.0, -1.0, 1.0, -1.0):
        x = sign * real(3).abs()
        expected = torch.diag(6 * x) if sign > 0 else 2 * torch.eye(3, dtype=torch.float64)
        torch.testing.assert_close(chainrule.hessian(branching)(x), expected)


def test_masks_and_indices_are_read_each_time() -> None:
    for _ in range(4):
        index, mask, x = torch.randint(0, 5, (4,)), torch.rand(5) > 0.5, real(5)

        def function(y: Tensor, index: Tensor = index, mask: Tensor = mask) -> Tensor:
            return (y[index] ** 3).sum() + torch.where(mask, y**4, y**2).sum() + y.relu().pow(3).sum() + y.sort()[0][1] ** 3

        torch.testing.assert_close(chainrule.hessian(function)(x), torch.func.hessian(function)(x))


def test_random_numbers_are_drawn_each_time() -> None:
    def function(x: Tensor) -> Tensor:
        return (torch.rand(3, dtype=x.dtype) * x**3).sum()

    draws = [chainrule.hessian(function)(torch.ones(3, dtype=torch.float64)).diagonal() for _ in range(4)]
    assert all(not torch.equal(one, other) for i, one in enumerate(draws) for other in draws[:i])
    torch.manual_seed(3)
    drawn = chainrule.hessian(function)(torch.ones(3, dtype=torch.float64)).diagonal()
    torch.manual_seed(3)
    torch.testing.assert_close(drawn, 6 * torch.rand(3, dtype=torch.float64))


def test_results_do_not_share_memory() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum()

    x, y = real(3), real(3)
    for _ in range(3):
        (first, second), value = chainrule.grad_and_value(lambda a, b: chainrule.grad(function)(a, b).sum() + (a * b).sum(), (0, 1))(x, y)
        first.zero_()
        second.zero_()
        value.zero_()
        assert x.abs().min() > 0 and y.abs().min() > 0
    nested = chainrule.jacrev(chainrule.grad(function, (0, 1)), (0, 1))
    for _ in range(3):
        for row in nested(x, y):
            for block in row:
                block.fill_(7.0)
        (xx, xy), (yx, yy) = nested(x, y)
        eye = torch.eye(3, dtype=torch.float64)
        torch.testing.assert_close((xx, xy, yx, yy), (0 * eye, eye, eye, 0 * eye))


def test_differing_arguments_and_aux() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return (x.sin() * y**2).sum() * y.sum()

    def with_aux(x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return function(x, y), {"y": y.detach()}

    for _ in range(3):
        x, y = real(3), real(3)
        for inner, outer in ((0, 1), (1, 0), ((0, 1), 1), (1, (0, 1)), (-1, 0)):
            ours = chainrule.jacrev(chainrule.jacrev(function, inner), outer)(x, y)
            theirs = torch.func.jacrev(torch.func.jacrev(function, inner), outer)(x, y)
            torch.testing.assert_close(ours, theirs)
        ours, aux = chainrule.hessian(with_aux, has_aux=True)(x, y)
        torch.testing.assert_close(ours, torch.func.hessian(function)(x, y))
        assert torch.equal(aux["y"], y)


def test_a_decorated_transform_is_not_taken_for_the_transform() -> None:
    def doubled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(function)
        def wrapper(*args: Any) -> Tensor:
            return 2 * function(*args)

        return wrapper

    for _ in range(3):
        x = real(3)
        found = chainrule.jacfwd(doubled(chainrule.grad(total)))(x)
        torch.testing.assert_close(found, 2 * torch.func.hessian(total)(x))
    assert levels.level_of(doubled(chainrule.grad(total))) is None


def test_writes_inside() -> None:
    def function(x: Tensor) -> Tensor:
        y = x.clone()
        y[0] = y[1] * y[2]
        y *= x
        return y.pow(2).sum()

    def by_hand(x: Tensor) -> Tensor:
        return (x * torch.stack([x[1] * x[2], x[1], x[2]])).pow(2).sum()

    for _ in range(3):
        x = real(2, 3)
        expected = torch.func.vmap(torch.func.hessian(by_hand))(x)
        torch.testing.assert_close(chainrule.hessian(function)(x[0]), expected[0])
        torch.testing.assert_close(chainrule.vmap(chainrule.hessian(function))(x), expected)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 5 * x * x * cotangent  # not the cube's: it must be seen


def test_a_users_function_keeps_its_backward_in_a_nest() -> None:
    for _ in range(3):
        x = real(3)
        torch.testing.assert_close(chainrule.grad(lambda y: Cube.apply(y).sum())(x), 5 * x * x)
        torch.testing.assert_close(chainrule.hessian(lambda y: Cube.apply(y).sum())(x), torch.diag(10 * x))


def test_joins_the_graph_around_it() -> None:
    for _ in range(3):
        x, scale = real(3).requires_grad_(), real(3).requires_grad_()
        chainrule.hessian(lambda y: (scale * y**3).sum())(x).sum().backward()
        torch.testing.assert_close(x.grad, 6 * scale.detach())
        torch.testing.assert_close(scale.grad, 6 * x.detach())
        held = scale.detach()
        assert not chainrule.hessian(lambda y: (held * y**3).sum())(x.detach()).requires_grad  # noqa: B023 - called at once


def test_gradients_off_inside_and_around() -> None:
    def half(x: Tensor) -> Tensor:
        with torch.no_grad():
            held = x**2
        return (held * x**3).sum()

    for _ in range(3):
        x = real(3)
        torch.testing.assert_close(chainrule.jacrev(chainrule.grad(half))(x), torch.func.jacrev(torch.func.grad(half))(x))
        with torch.no_grad():
            torch.testing.assert_close(chainrule.hessian(total)(x), torch.func.hessian(total)(x))


def test_constants_made_in_inference_mode_or_under_vmap_serve_later_calls() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.linalg.cholesky(x @ x.T + 3 * torch.eye(3, dtype=x.dtype)).sin()

    engine.CACHE.clear()
    with torch.inference_mode():
        chainrule.jacrev(function)(real(3, 3))
        chainrule.vmap(chainrule.hessian(function))(real(2, 3, 3))
        chainrule.hessian(function)(real(3, 3))
    for transform, oracle in ((chainrule.jacrev, torch.func.jacrev), (chainrule.hessian, torch.func.hessian)):
        for _ in range(2):
            x = real(3, 3).requires_grad_()
            (found,) = torch.autograd.grad(transform(function)(x).square().sum(), x)
            (expected,) = torch.autograd.grad(oracle(function)(x).square().sum(), x)
            torch.testing.assert_close(found, expected)
            batch = real(2, 3, 3)
            torch.testing.assert_close(chainrule.vmap(transform(function))(batch), torch.func.vmap(oracle(function))(batch))


def test_an_error_leaves_the_next_call_whole() -> None:
    def function(x: Tensor) -> Tensor:
        if x[0] > 10:
            raise ValueError("too far")
        return total(x)

    derivative = chainrule.hessian(function)
    for _ in range(2):
        with pytest.raises(ValueError, match="too far"):
            derivative(torch.full((3,), 11.0, dtype=torch.float64))
        x = real(3)
        torch.testing.assert_close(derivative(x), torch.func.hessian(total)(x))


LINEAR: dict[str, Callable[[Any], Callable[[Tensor], Any]]] = {
    "gradient": lambda m: m.grad(total),
    "jacobian": lambda m: m.jacrev(smooth),
    "gradient of a gradient": lambda m: m.grad(lambda x: m.grad(total)(x).sum()),
    "gradient of a quadratic": lambda m: m.grad(lambda x: (x[:2] ** 2).sum() + x.sum()),
    "gradient of a linear function": lambda m: m.grad(lambda x: x.sum()),
    "gradient and value": lambda m: m.grad_and_value(total),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_functions_of_nests_serve_many_seeds(name: str) -> None:
    ours, theirs = LINEAR[name](chainrule), LINEAR[name](torch.func)
    for _ in range(3):
        x = real(3)
        output, pullback = chainrule.vjp(ours, x)
        expected, oracle = torch.func.vjp(theirs, x)
        torch.testing.assert_close(output, expected)
        kept = []
        for _ in range(3):
            cotangents = torch.utils._pytree.tree_map(torch.randn_like, expected)
            (found,) = pullback(cotangents)
            torch.testing.assert_close(found, oracle(cotangents)[0])
            kept.append(found.fill_(7.0))
        assert len({item.data_ptr() for item in kept}) == 3
        output, pushforward = chainrule.linearize(ours, x)
        torch.testing.assert_close(output, expected)
        for _ in range(3):
            tangent = real(3)
            torch.testing.assert_close(pushforward(tangent), torch.func.jvp(theirs, (x,), (tangent,))[1])


def test_linear_functions_of_nests_join_and_nest() -> None:
    for _ in range(2):
        x, scale, seed = real(3).requires_grad_(), real(3).requires_grad_(), real(3).requires_grad_()
        gradient = chainrule.grad(lambda y: (scale * y**3).sum())
        with torch.no_grad():
            _, pullback = chainrule.vjp(gradient, x)
            assert not pullback(seed)[0].requires_grad
        (found,) = pullback(seed)
        torch.testing.assert_close(
            torch.autograd.grad(found.sum(), (x, scale, seed)),
            (6 * scale * seed, 6 * x * seed, 6 * scale * x),
        )
        x, scale, seed = x.detach(), scale.detach(), seed.detach()
        _, pullback = chainrule.vjp(chainrule.grad(lambda y: (scale * y**3).sum()), x)
        dense = torch.diag(6 * scale * x)
        torch.testing.assert_close(chainrule.vmap(lambda v: pullback(v)[0])(torch.eye(3, dtype=x.dtype)), dense)
        torch.testing.assert_close(chainrule.jacrev(lambda v: pullback(v)[0])(seed), dense)
        torch.testing.assert_close(pullback(seed)[0], dense @ seed)
        hessian = chainrule.jacrev(lambda y: chainrule.vjp(chainrule.grad(lambda z: (scale * z**3).sum()), y)[1](seed)[0])(x)
        torch.testing.assert_close(hessian, torch.diag(6 * scale * seed))


def test_linear_functions_of_nests_check_their_seeds() -> None:
    x = real(3)
    for _ in range(2):
        _, pullback = chainrule.vjp(chainrule.grad(total), x)
        with pytest.raises(RuntimeError, match="shape"):
            pullback(real(4))
        with pytest.raises(RuntimeError, match="structure"):
            pullback((x, x))
        _, pushforward = chainrule.linearize(chainrule.grad(total), x)
        with pytest.raises(RuntimeError, match="structure"):
            pushforward(x, x)
        with pytest.raises(RuntimeError, match="dtype"):
            pushforward(x.float())
        torch.testing.assert_close(pullback(x)[0], torch.func.hessian(total)(x) @ x)


def test_a_pullback_of_a_plain_function_serves_many_seeds() -> None:
    weight = real(5, 4)
    for _ in range(3):  # planned, compiled, replayed
        x = real(4)
        _, pullback = chainrule.vjp(lambda y: torch.tanh(weight @ y), x)
        _, pushforward = chainrule.linearize(lambda y: torch.tanh(weight @ y), x)
        _, oracle = torch.func.vjp(lambda y: torch.tanh(weight @ y), x)
        for _ in range(3):
            seed, tangent = real(5), real(4)
            torch.testing.assert_close(pullback(seed), oracle(seed))
            torch.testing.assert_close(pushforward(tangent), torch.func.jvp(lambda y: torch.tanh(weight @ y), (x,), (tangent,))[1])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x @ x.t()).flatten().sin().sum(),
        lambda x: (x.reshape(3, 2) * x.t()).sum(0).sin(),
        lambda x: x.prod(),
        lambda x: (x.sin().t().reshape(-1) * x.reshape(-1)).sum(),
    ],
)
def test_other_strides_are_served(function: Callable[[Tensor], Tensor]) -> None:
    engine.CACHE.clear()
    layouts = (real(2, 3), real(3, 2).t(), real(2, 1).expand(2, 3), real(4, 6)[::2, ::2], real(2, 3))
    for x in layouts:
        torch.testing.assert_close(chainrule.hessian(function)(x), torch.func.hessian(function)(x.contiguous()))
        output, pullback = chainrule.vjp(chainrule.jacrev(function), x)
        expected, oracle = torch.func.vjp(torch.func.jacrev(function), x.contiguous())
        cotangent = torch.randn_like(expected)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(pullback(cotangent), oracle(cotangent))


def test_the_outer_derivative_of_a_hessian_sees_through_no_grad() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            held = x**2
        return (held * x).sum()

    for _ in range(3):
        x = real(3)
        torch.testing.assert_close(chainrule.hessian(function)(x), torch.func.hessian(function)(x))


def test_constant_derivatives_are_part_of_the_graph() -> None:
    for transform in (chainrule.hessian, chainrule.jacfwd):
        weight = real(3).requires_grad_()
        transform(lambda x: 2 * x)(weight).sum().backward()
        assert weight.grad is not None and not weight.grad.any()
        assert not transform(lambda x: 2 * x)(weight.detach()).requires_grad
        with torch.no_grad():
            assert not transform(lambda x: 2 * x)(weight).requires_grad


def test_nests_hold_functions_in_no_cycle():
    """What a nest is made of is kept with its levels, and goes with them without the garbage collector."""
    x = torch.randn(3, dtype=torch.float64)

    def made():
        def scalar(y):
            return (y.sin() * x).sum()

        gradient = chainrule.grad(scalar)
        for _ in range(2):
            chainrule.jvp(gradient, (x,), (x,))
            chainrule.vjp(gradient, x)
            chainrule.jacobian(chainrule.jacobian(gradient))(x)
        return weakref.ref(scalar)

    made()  # plans are made
    gc.disable()
    try:
        assert made()() is None
    finally:
        gc.enable()
