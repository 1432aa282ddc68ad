"""First runs of long tapes: what they give, how much of them is planned, and when a plan takes over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import chainrule
from chainrule.execute import engine, planning, sweeps
from chainrule.execute.cached_plans import CachedPlan
from chainrule.maps.entries import embed_diagonals, pad_zeros
from chainrule.transforms.levels import NestPlan

tf = torch.func
Tensor = torch.Tensor
DOUBLE = torch.float64

#: As many ops as this are a long tape here, which is swept so often.
FEW, RUNS = 40, 6


@pytest.fixture(autouse=True)
def _short_is_long(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sweeps, "LONG", FEW)
    monkeypatch.setattr(engine, "RUNS", RUNS)
    forget()
    yield
    forget()


def forget() -> None:
    engine.CACHE.clear()
    sweeps._STEPS.clear()
    sweeps._SCHEDULES.clear()


def oscillators(steps: int) -> Callable[[Tensor], Tensor]:
    """A loop over single elements, with a step size that is a number."""

    def final(x: Tensor) -> Tensor:
        state = x[:3]
        for _ in range(steps):
            slope = torch.stack([state[1] * x[3], -state[0] * state[2], state[0] - x[4] * state[2] ** 2])
            state = state + 0.05 * slope
        return state

    return final


def layers(steps: int) -> Callable[[Tensor], Tensor]:
    """A loop over matrix products, views, reductions and masks."""
    weight = torch.linspace(-0.4, 0.5, 25, dtype=DOUBLE).reshape(5, 5)

    def final(x: Tensor) -> Tensor:
        state = x.expand(2, 5)
        for number in range(steps):
            state = torch.tanh(state @ weight) + torch.where(state > 0, state, state.exp() - 1)
            state = torch.cat([state[:, 2:], state[:, :2].flip(1)], 1) / (1 + state.square().sum(1, keepdim=True))
            state = state - state.mean() + 0.1 * number * x[torch.tensor([4, 0, 0, 1, 2])]
        return state

    return final


LOOPS = {"oscillators": oscillators, "layers": layers}


def loss(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x).square().sum()


def pushed(library: Any, function: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """By ``linearize``, which warns in torch.func: there ``jvp`` is the reference."""
    found = chainrule.linearize(function, x)[1](v) if library is chainrule else tf.jvp(function, (x,), (v,))[1]
    assert isinstance(found, Tensor)
    return found


TRANSFORMS: dict[str, Callable[[Any, Callable[[Tensor], Tensor]], Callable[[Tensor, Tensor], Any]]] = {
    "grad": lambda m, f: lambda x, v: m.grad(loss(f))(x),
    "grad and value": lambda m, f: lambda x, v: m.grad_and_value(loss(f))(x),
    "jacrev": lambda m, f: lambda x, v: m.jacrev(f)(x),
    "jacfwd": lambda m, f: lambda x, v: m.jacfwd(f)(x),
    "jvp": lambda m, f: lambda x, v: m.jvp(f, (x,), (v,)),
    "vjp": lambda m, f: lambda x, v: m.vjp(loss(f), x)[1](v[0]),
    "linearize": lambda m, f: lambda x, v: pushed(m, f, x, v),
    "hessian": lambda m, f: lambda x, v: m.hessian(loss(f))(x),
    "hessian of several": lambda m, f: lambda x, v: m.hessian(f)(x),
    "jvp of grad": lambda m, f: lambda x, v: m.jvp(m.grad(loss(f)), (x,), (v,)),
    "vjp of grad": lambda m, f: lambda x, v: m.vjp(m.grad(loss(f)), x)[1](v),
    "linearize of grad": lambda m, f: lambda x, v: pushed(m, m.grad(loss(f)), x, v),
    "grad of a grad inside": lambda m, f: lambda x, v: m.grad(lambda y: (2 * m.grad(loss(f))(y * y) * v).sum())(x),
    "third order": lambda m, f: lambda x, v: m.jvp(m.hessian(loss(f)), (x,), (v,))[1],
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_run_agrees_with_torch_func(loop: str, name: str) -> None:
    """Six runs are swept, of a nest of two three (the first finds the steps), one is planned, one is compiled, one replayed.

    Rounding is 2e-16 an op, of which there are some hundred.
    """
    function = LOOPS[loop](4)
    ours, theirs = (TRANSFORMS[name](library, function) for library in (chainrule, tf))
    for _ in range(RUNS + 3):
        x, v = torch.randn(5, dtype=DOUBLE), torch.randn(5, dtype=DOUBLE)
        torch.testing.assert_close(ours(x, v), theirs(x, v), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["jacrev", "jacfwd", "hessian"])
def test_several_arguments_and_outputs(name: str) -> None:
    """Blocks that are zero, shapes of several dimensions, single elements, and results that are arguments."""

    def function(x: Tensor, y: dict[str, Tensor], z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state, other = x, y["a"]
        for _ in range(12):
            state = torch.sin(state) * state.sum(0) + z * 0.1
            other = other * torch.cos(other)
        return state, other.sum(), other

    for _ in range(RUNS + 2):
        args = torch.randn(2, 3, dtype=DOUBLE), {"a": torch.randn(4, dtype=DOUBLE)}, torch.randn((), dtype=DOUBLE)
        ours, theirs = (getattr(library, name)(function, argnums=(0, 1, 2))(*args) for library in (chainrule, tf))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def planned_ops(monkeypatch: pytest.MonkeyPatch, function: Callable[[], Any]) -> tuple[int, int]:
    """How many ops are planned by themselves in a first run, and how many tapes are planned as a whole."""
    counts = [0, 0]

    def counted(place: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            counts[place] += 1
            return original(*args, **kwargs)

        return run

    forget()
    with monkeypatch.context() as patch:
        patch.setattr(sweeps, "plan", counted(0, sweeps.plan))
        patch.setattr(planning, "plan", counted(1, planning.plan))
        function()
    return counts[0], counts[1]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_first_run_plans_the_steps_of_a_loop_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Ten or twenty steps are as much to plan as five."""
    x, v = torch.rand(5, dtype=DOUBLE), torch.rand(5, dtype=DOUBLE)
    short, middle, long = (
        planned_ops(monkeypatch, lambda s=steps: TRANSFORMS[name](chainrule, oscillators(s))(x, v)) for steps in (5, 10, 20)
    )
    assert short == middle == long
    assert 0 < long[0] < 200
    assert not long[1]


def kept() -> list[Any]:
    return [plan for plan in engine.CACHE._plans.values() if isinstance(plan, CachedPlan)]


@pytest.mark.parametrize("name", ["grad", "jacfwd", "jvp", "hessian", "vjp of grad"])
def test_a_later_run_makes_the_plan(name: str) -> None:
    x, v = torch.rand(5, dtype=DOUBLE), torch.rand(5, dtype=DOUBLE)
    function = TRANSFORMS[name](chainrule, oscillators(4))
    runs = math.ceil(RUNS / (2 if name in ("hessian", "vjp of grad") else 1))
    for number in range(runs + 2):
        assert bool(kept()) == (number > runs)
        function(x, v)


@pytest.mark.parametrize("name", ["grad", "jacrev", "jacfwd", "hessian"])
def test_later_sweeps_look_nothing_up(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What an earlier run found out is kept: from the third run on (the second compiles the steps) no op is described."""
    described: list[Any] = []
    original = sweeps.described
    monkeypatch.setattr(sweeps, "described", lambda *args: described.append(1) or original(*args))
    function, reference = (TRANSFORMS[name](library, oscillators(4)) for library in (chainrule, tf))
    for number in range(RUNS // 2):
        x, v = torch.rand(5, dtype=DOUBLE), torch.rand(5, dtype=DOUBLE)
        torch.testing.assert_close(function(x, v), reference(x, v))
        if number != 1:
            assert bool(described) == (number == 0)
        described.clear()


def test_another_branch_is_another_sweep() -> None:
    """A schedule belongs to the ops of a run, not to the function."""

    def function(x: Tensor) -> Tensor:
        state = x
        for _ in range(FEW):
            state = torch.sin(state) if x[0].item() > 0 else torch.cos(state)
        return state.sum()

    for number in range(2 * RUNS):
        x = torch.rand(4, dtype=DOUBLE) + 0.1
        x = -x if number % 2 else x
        torch.testing.assert_close(chainrule.grad(function)(x), tf.grad(function)(x))


def test_what_does_not_depend_on_the_input_may_change_in_kind() -> None:
    """A parameter in place of a tensor, and one that requires grad."""
    weight = torch.rand(4, dtype=DOUBLE)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        for _ in range(FEW):
            x = torch.sin(x * weight)
        return x.sum()

    for number in range(2 * RUNS):
        x, given = torch.rand(4, dtype=DOUBLE), torch.nn.Parameter(weight) if number % 2 else weight
        found, expected = (m.grad(function)(x, given) for m in (chainrule, tf))
        torch.testing.assert_close(found, expected)
        assert found.requires_grad == expected.requires_grad
        if found.requires_grad:
            ours, theirs = (torch.autograd.grad(result.sum(), given)[0] for result in (found, expected))
            torch.testing.assert_close(ours, theirs)


def test_each_pullback_of_a_run_counts() -> None:
    x = torch.rand(5, dtype=DOUBLE)
    _, pull = chainrule.vjp(oscillators(4), x)
    _, expected = tf.vjp(oscillators(4), x)
    for number in range(RUNS + 3):
        assert bool(kept()) == (number > RUNS)
        cotangent = torch.randn(3, dtype=DOUBLE)
        torch.testing.assert_close(pull(cotangent), expected(cotangent))


def test_short_tapes_and_large_tensors_are_planned_at_once() -> None:
    chainrule.grad(loss(oscillators(1)))(torch.rand(5, dtype=DOUBLE))
    assert len(kept()) == 1
    engine.CACHE.clear()
    large = torch.rand(sweeps._SMALL + 1, dtype=DOUBLE)

    def function(x: Tensor) -> Tensor:
        for _ in range(FEW):
            x = torch.sin(x)
        return x.sum()

    chainrule.grad(function)(large)
    assert len(kept()) == 1


def test_zeros_that_meet_infinities_are_left_to_a_plan() -> None:
    """The slope of a root is infinite at zero; the others do not depend on that element."""

    def function(x: Tensor) -> Tensor:
        state = x.sqrt()
        for _ in range(FEW):
            state = torch.sin(state)
        return state

    x = torch.tensor([0.0, 0.5, 0.7], dtype=DOUBLE)
    single = chainrule.jacrev(lambda y: function(y).sum())
    for transform in (chainrule.jacrev, chainrule.jacfwd, chainrule.jacobian):
        for _ in range(RUNS + 2):
            found = transform(function)(x)
            assert torch.equal(found, torch.diag(found.diagonal()))
            torch.testing.assert_close(found.diagonal(), single(x))


def test_results_are_tensors_of_their_own() -> None:
    """Not the seed, not an argument, and not one another."""

    def function(x: Tensor) -> Tensor:
        state = x
        for _ in range(FEW):
            state = state + 1.0
        return state

    x, seed = torch.rand(3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)
    for _ in range(3):
        (pulled,) = chainrule.vjp(function, x)[1](seed)
        pushed = chainrule.jvp(function, (x,), (seed,))[1]
        for result in (pulled, pushed):
            result.mul_(2.0)
        assert torch.equal(seed, torch.ones(3, dtype=DOUBLE))


def test_a_first_run_joins_the_graph_of_its_arguments() -> None:
    x = torch.rand(5, dtype=DOUBLE, requires_grad=True)
    function = loss(layers(4))
    for _ in range(4):
        (found,) = torch.autograd.grad(chainrule.grad(function)(x).sum(), x)
        torch.testing.assert_close(found, tf.hessian(function)(x.detach()).sum(0))


def test_what_is_compiled_is_planned() -> None:
    x = torch.rand(5, dtype=DOUBLE)
    compiled = chainrule.compile(chainrule.grad(loss(oscillators(4))))
    expected = tf.grad(loss(oscillators(4)))(x)
    torch.testing.assert_close(compiled(x), expected)
    assert not any(isinstance(plan, sweeps.Seen) for plan in engine.CACHE._plans.values())


def test_under_vmap() -> None:
    x = torch.rand(3, 5, dtype=DOUBLE)
    function = loss(layers(4))
    for _ in range(3):
        torch.testing.assert_close(chainrule.vmap(chainrule.grad(function))(x), tf.vmap(tf.grad(function))(x))
        torch.testing.assert_close(chainrule.vmap(chainrule.hessian(function))(x), tf.vmap(tf.hessian(function))(x))


def test_plans_of_ops_tell_numbers_of_different_kinds_apart() -> None:
    def function(x: Tensor) -> Tensor:
        for number in (0.0, -0.0, 0, 1.0, 1, True, 2.0, 2):
            for _ in range(FEW // 8 + 1):
                x = torch.pow(torch.cos(x) + 1.5, number) + x / (number or 1) + torch.atan2(x, x * 0 + number)
        return x.sum()

    x = torch.rand(3, dtype=DOUBLE) + 0.5
    for _ in range(3):
        torch.testing.assert_close(chainrule.grad(function)(x), tf.grad(function)(x))


def test_a_nest_that_is_swept_leaves_the_run_as_it_was() -> None:
    """The plan that is made after all, as the sweep met NaN, sees the tape of the function alone."""

    def function(x: Tensor) -> Tensor:
        return (oscillators(4)(x) / 0.0).sum()

    x, v = torch.rand(5, dtype=DOUBLE), torch.rand(5, dtype=DOUBLE)
    found = [chainrule.jvp(chainrule.grad(function), (x,), (v,)) for _ in range(RUNS)]
    for later in found[1:]:
        torch.testing.assert_close(later, found[0], equal_nan=True)
    assert any(isinstance(plan, NestPlan) for plan in kept())


def test_padding_is_what_writing_into_zeros_gives() -> None:
    value = torch.rand(2, 3, dtype=DOUBLE)
    cases: list[tuple[Tensor, tuple[int, ...], tuple[int, ...], tuple[tuple[int, int, int, int], ...]]] = [
        (value, (5, 3), (5, 3), ((0, 2, 1, 2),)),
        (value, (4, 7), (28,), ((0, 1, 1, 2), (1, 0, 1, 3))),
        (value[0, 0], (6,), (6,), ((0, 4, 1, 1),)),
        (value[:, :1], (4, 5), (2, 10), ((0, 0, 1, 2),)),
        (value[:0], (3, 3), (3, 3), ((0, 1, 1, 0),)),
    ]
    for given, sizes, shape, slices in cases:
        expected = embed_diagonals(given, sizes, (), shape, slices)
        assert torch.equal(pad_zeros(given, sizes, shape, slices), expected)
