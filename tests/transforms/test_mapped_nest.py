"""Nests with a `vmap` between derivative transforms run as a whole: one plan, and right values in every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.func

import chainrule
from chainrule.execute import engine, planning

Tensor = torch.Tensor
WEIGHT = torch.randn(4, 3, dtype=torch.float64)


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def field(x: Tensor) -> Tensor:
    return torch.tanh(WEIGHT @ x) * x.sum()


def scalar(x: Tensor) -> Tensor:
    return field(x).sin().sum()


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    return (field(x) * scale.prod()).exp().sum()


def linearized(library: Any, function: Callable[[Tensor], Any], x: Tensor, tangent: Tensor) -> Any:
    """The product with the Jacobian; torch.func's own ``linearize`` warns."""
    if library is torch.func:
        return torch.func.jvp(function, (x,), (tangent,))[1]
    return chainrule.linearize(function, x)[1](tangent)


#: The nest in a library, and the shapes of its arguments.
NESTS: dict[str, tuple[Callable[[Any], Callable[..., Any]], tuple[tuple[int, ...], ...]]] = {
    "reverse over reverse": (lambda m: m.jacrev(m.vmap(m.jacrev(field))), ((5, 3),)),
    "forward over forward": (lambda m: m.jacfwd(m.vmap(m.jacfwd(field))), ((5, 3),)),
    "one sample": (lambda m: m.jacrev(m.vmap(m.jacrev(field))), ((1, 3),)),
    "over a hessian": (lambda m: m.jacrev(m.vmap(m.hessian(scalar))), ((5, 3),)),
    "hessian over a gradient": (lambda m: m.hessian(m.vmap(m.grad(scalar))), ((2, 3),)),
    "value and gradient": (lambda m: m.jacrev(m.vmap(m.grad_and_value(scalar))), ((2, 3),)),
    "two mappings": (lambda m: m.jacrev(m.vmap(m.vmap(m.jacrev(field)), in_dims=1)), ((2, 4, 3),)),
    "five levels": (lambda m: m.jacrev(m.vmap(m.jacfwd(m.vmap(m.jacrev(field))))), ((2, 2, 3),)),
    "mapped as a whole": (lambda m: m.vmap(m.jacrev(m.vmap(m.jacrev(field)))), ((2, 4, 3),)),
    "other dimensions": (lambda m: m.jacrev(m.vmap(m.jacrev(field), in_dims=1, out_dims=-1)), ((3, 5),)),
    "a shared argument": (lambda m: m.jacrev(m.vmap(m.grad(scaled, (0, 1)), (0, None)), argnums=1), ((5, 3), (2,))),
    "all arguments": (lambda m: m.jacrev(m.vmap(m.grad(scaled), (0, None)), argnums=(0, 1)), ((5, 3), (2,))),
    "another argument": (lambda m: m.jacrev(m.vmap(m.grad(scaled, 1), (0, None))), ((5, 3), (2,))),
    "moved side argument": (lambda m: m.jacrev(m.vmap(m.grad(scaled), (1, 1))), ((3, 5), (2, 5))),
    "gradient": (lambda m: lambda x: m.grad(lambda x: m.jacrev(m.vmap(m.grad(scalar)))(x).square().sum())(x), ((2, 3),)),
    "tangent": (lambda m: lambda x: m.jvp(m.vmap(m.jacrev(field)), (x,), (x.cos(),)), ((5, 3),)),
    "cotangent": (lambda m: lambda x: m.vjp(m.vmap(m.grad(scalar)), x)[1](x.cos()), ((5, 3),)),
    "linearized": (lambda m: lambda x: linearized(m, m.vmap(m.grad(scalar)), x, x.cos()), ((5, 3),)),
}


@pytest.mark.parametrize("name", NESTS)
def test_one_plan_for_all_calls(name: str) -> None:
    make, shapes = NESTS[name]
    engine.CACHE.clear()
    ours, theirs = make(chainrule), make(torch.func)
    for _ in range(3):
        args = [real(*shape) for shape in shapes]
        torch.testing.assert_close(ours(*args), theirs(*args))
    if name != "gradient":  # which goes through a function of the user's that holds the nest
        assert len(engine.CACHE) == 1


def test_the_function_runs_once_and_a_second_call_does_not_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(x: Tensor) -> Tensor:
        calls.append(1)
        return field(x)

    derivative = chainrule.jacrev(chainrule.vmap(chainrule.jacrev(counted)))
    derivative(real(5, 3))
    assert len(calls) == 1

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("planned again")

    monkeypatch.setattr(planning, "plan", refuse)
    x = real(5, 3)
    torch.testing.assert_close(derivative(x), torch.func.jacrev(torch.func.vmap(torch.func.jacrev(field)))(x))
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["laplacian", "divergence", "hessian_diagonal", "ntk"])
def test_contractions_per_sample_are_part_of_the_nest(name: str) -> None:
    def function(x: Tensor) -> Tensor:
        return torch.tanh(WEIGHT[:3] @ x) * x.sum()

    engine.CACHE.clear()
    transform = getattr(chainrule, name)
    for _ in range(2):
        x = real(4, 3)
        found = chainrule.jacrev(transform(function, in_dims=0))(x)
        torch.testing.assert_close(found, chainrule.jacrev(lambda x: torch.stack([transform(function)(one) for one in x]))(x))
    nests = [plan for plan in engine.CACHE._plans.values() if type(plan).__name__ == "NestPlan"]
    assert any(plan.used for plan in nests)


def test_closed_over_values_numbers_and_branches_are_read_each_time() -> None:
    scale = real(3)

    def nest(library: Any, factor: float) -> Callable[[Tensor], Tensor]:
        def function(x: Tensor) -> Tensor:
            return factor * (scale * x**3).sum()

        found: Callable[[Tensor], Tensor] = library.jacrev(library.vmap(library.grad(function)))
        return found

    for step, factor in enumerate((2.0, 3.0, 2, True, 2.5, 4.5, 0.5)):
        x = real(4, 3)
        torch.testing.assert_close(nest(chainrule, factor)(x), nest(torch.func, factor)(x))
        if step % 2:
            scale.mul_(1.5)


def test_random_numbers_are_drawn_each_time() -> None:
    def function(x: Tensor) -> Tensor:
        return (torch.rand_like(x) * x**3).sum()

    nest = chainrule.jacrev(chainrule.vmap(chainrule.grad(function), randomness="different"))
    draws = [nest(torch.ones(2, 3, dtype=torch.float64)).sum((0, 2)) for _ in range(3)]
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])


def test_trees_and_dimensions_by_name() -> None:
    def function(tree: Any) -> Any:
        return {"a": tree["x"] ** 2 * tree["y"].sum(), "b": [tree["y"].sin()]}

    for _ in range(2):
        tree = {"x": real(4, 2), "y": real(2, 4)}
        dims = {"a": {"x": 1, "y": 0}, "b": [{"x": 0, "y": -1}]}
        ours, theirs = (
            m.jacrev(m.vmap(m.jacrev(function), in_dims=({"x": 0, "y": 1},), out_dims=dims))(tree) for m in (chainrule, torch.func)
        )
        torch.testing.assert_close(ours, theirs)


def test_joins_the_graph_around_it_and_gradients_off() -> None:
    nest = chainrule.jacrev(chainrule.vmap(chainrule.jacrev(field)))
    expected = torch.func.jacrev(torch.func.vmap(torch.func.jacrev(field)))
    for _ in range(3):
        x = real(2, 3).requires_grad_()
        (found,) = torch.autograd.grad(nest(x).square().sum(), x)
        (wanted,) = torch.autograd.grad(expected(x).square().sum(), x)
        torch.testing.assert_close(found, wanted)
        with torch.no_grad():
            inside = nest(x)
        assert not inside.requires_grad
        torch.testing.assert_close(inside, expected(x).detach())


def test_writes_inside() -> None:
    def function(x: Tensor) -> Tensor:
        y = x.clone()
        y[0] *= x[1]
        y.sin_()
        return (y * x).sum()

    for _ in range(2):
        x = real(4, 3)
        torch.testing.assert_close(
            chainrule.jacrev(chainrule.vmap(chainrule.grad(function)))(x), torch.func.jacrev(torch.func.vmap(torch.func.grad(function)))(x)
        )


def test_no_samples() -> None:
    nest = chainrule.jacrev(chainrule.vmap(chainrule.jacrev(field)))
    for _ in range(2):
        assert nest(real(0, 3)).shape == (0, 4, 3, 0, 3)


def test_steps_under_no_grad() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            factor = x.sin()
        return (factor * x**3).sum()

    for _ in range(2):
        x = real(4, 3)
        torch.testing.assert_close(
            chainrule.jacrev(chainrule.vmap(chainrule.grad(function)))(x), torch.func.jacrev(torch.func.vmap(torch.func.grad(function)))(x)
        )


def test_errors_leave_the_next_call_whole() -> None:
    nest = chainrule.jacrev(chainrule.vmap(chainrule.grad(scalar), in_dims=1))
    with pytest.raises(ValueError, match="Got in_dim=1 for some input"):
        nest(real(3))
    with pytest.raises(RuntimeError, match="expected field to return a scalar Tensor"):
        chainrule.jacrev(chainrule.vmap(chainrule.grad(field)))(real(5, 3))
    x = real(3, 5)
    torch.testing.assert_close(nest(x), torch.func.jacrev(torch.func.vmap(torch.func.grad(scalar), in_dims=1))(x))


def test_compiled() -> None:
    nest = chainrule.compile(chainrule.jacrev(chainrule.vmap(chainrule.jacrev(field))))
    for _ in range(3):
        x = real(2, 3)
        torch.testing.assert_close(nest(x), torch.func.jacrev(torch.func.vmap(torch.func.jacrev(field)))(x))
