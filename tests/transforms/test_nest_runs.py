"""A nest of transforms runs the user's function once, also where steps of it run under ``torch.no_grad()``.

State and randomness in the function would advance too often otherwise. Values are compared with torch.func in float64, by the
default tolerances of ``torch.testing``: both compute the same derivatives, in another order of sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import chainrule
from chainrule.execute.engine import CACHE

CONSTANT = torch.rand(4, dtype=torch.float64)


def real(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64)


def select() -> None:
    torch.zeros(4)[0] = 1.0


def copy_to_slice() -> None:
    torch.zeros(4, dtype=torch.float64)[1:].copy_(CONSTANT[1:])


def copy_to_data() -> None:
    torch.zeros(4, dtype=torch.float64).data.copy_(CONSTANT)


def concatenate_out() -> None:
    torch.cat([CONSTANT, CONSTANT], out=torch.zeros(8, dtype=torch.float64))


def normalize_out() -> None:
    functional.normalize(CONSTANT, dim=0, out=torch.zeros(4, dtype=torch.float64))


def divide_out() -> None:
    torch.div(CONSTANT, CONSTANT[:1].expand(4), out=torch.zeros(4, dtype=torch.float64))


def compute() -> None:
    torch.stack([CONSTANT * 2 + 1, CONSTANT]).reshape(-1).chunk(2)


STEPS: list[Callable[[], None]] = [select, copy_to_slice, copy_to_data, concatenate_out, normalize_out, divide_out, compute]


def diagonal(m: Any, f: Any, x: Tensor) -> Tensor:
    return chainrule.hessian_diagonal(f)(x) if m is chainrule else torch.func.hessian(f)(x).diagonal()


def trace(m: Any, f: Any, x: Tensor) -> Tensor:
    return chainrule.laplacian(f)(x) if m is chainrule else torch.func.hessian(f)(x).trace()


#: With the module of transforms, the function and its argument.
REVERSE: dict[str, Callable[[Any, Any, Tensor], Any]] = {
    "grad": lambda m, f, x: m.grad(f)(x),
    "jacrev(grad)": lambda m, f, x: m.jacrev(m.grad(f))(x),
    "jacrev(jacrev)": lambda m, f, x: m.jacrev(m.jacrev(f))(x),
    "jacrev(jacrev(grad))": lambda m, f, x: m.jacrev(m.jacrev(m.grad(f)))(x),
    "vjp of grad": lambda m, f, x: m.vjp(m.grad(f), x)[1](torch.ones_like(x)),
    "vmap(grad)": lambda m, f, x: m.vmap(m.grad(f))(x.expand(3, 4) * torch.arange(1, 4)[:, None]),
    "vmap(jacrev(grad))": lambda m, f, x: m.vmap(m.jacrev(m.grad(f)))(x.expand(3, 4) * torch.arange(1, 4)[:, None]),
    "jacrev(vmap(grad))": lambda m, f, x: m.jacrev(m.vmap(m.grad(f)))(x.expand(3, 4) * torch.arange(1, 4)[:, None]),
}
FORWARD: dict[str, Callable[[Any, Any, Tensor], Any]] = {
    "hessian": lambda m, f, x: m.hessian(f)(x),
    "jacfwd(grad)": lambda m, f, x: m.jacfwd(m.grad(f))(x),
    "jvp of grad": lambda m, f, x: m.jvp(m.grad(f), (x,), (torch.ones_like(x),)),
    "vmap(hessian)": lambda m, f, x: m.vmap(m.hessian(f))(x.expand(3, 4) * torch.arange(1, 4)[:, None]),
    "linearize of grad": lambda m, f, x: (
        chainrule.linearize(chainrule.grad(f), x)[1](torch.ones_like(x))
        if m is chainrule
        else torch.func.jvp(torch.func.grad(f), (x,), (torch.ones_like(x),))[1]
    ),
}
DETOUR: dict[str, Callable[[Any, Any, Tensor], Any]] = {"laplacian": trace, "hessian_diagonal": diagonal}
ALL = {**REVERSE, **FORWARD, **DETOUR}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ALL)
def test_steps_under_no_grad_on_constants(name: str, step: Callable[[], None]) -> None:
    runs = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        with torch.no_grad():
            step()
        return (x**3).sum() * runs

    for _ in range(3):
        x, runs = real(4), 0
        found = ALL[name](chainrule, counted, x)
        assert runs == 1
        runs = 0
        torch.testing.assert_close(found, ALL[name](torch.func, counted, x))


def held(x: Tensor) -> Tensor:
    with torch.no_grad():
        power = x**2
        part = power[1:] * 2
    return (power * x**3).sum() + (part * x[1:] ** 2).sum()


def written(x: Tensor) -> Tensor:
    power = x**2
    with torch.no_grad():
        power[0] = 3.0
        power.mul_(x)
    return (power * x**3).sum()


def data(x: Tensor) -> Tensor:
    return (x.data**2 * x**3).sum()


def detached(x: Tensor) -> Tensor:
    return ((x**2).detach_() * x**3).sum()


@pytest.mark.parametrize("function", [held, written, data, detached])
@pytest.mark.parametrize("name", ALL)
def test_steps_under_no_grad_on_what_is_differentiated(name: str, function: Callable[[Tensor], Tensor]) -> None:
    """Reverse levels agree on what is constant. With forward levels the first run shows that they do not; later calls know."""
    runs = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return function(x)

    for call in range(3):
        x, runs = real(4), 0
        found = ALL[name](chainrule, counted, x)
        once = call > 0 or (name in REVERSE and function in (held, written))
        assert runs <= (1 if once else 2) + (name in DETOUR)
        torch.testing.assert_close(found, ALL[name](torch.func, counted, x))


@pytest.mark.parametrize("name", ["hessian", "jacrev(grad)", "jvp of grad", "laplacian"])
def test_random_numbers_beside_steps_under_no_grad(name: str) -> None:
    def noisy(x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = CONSTANT[:2].sum() + functional.dropout(CONSTANT, 0.5).sum()
        return (functional.dropout(x, 0.5, training=True) ** 3 * scale).sum()

    for seed in range(3):
        x = real(4)
        torch.manual_seed(seed)
        found, state = ALL[name](chainrule, noisy, x), torch.get_rng_state()
        torch.manual_seed(seed)
        scale = CONSTANT[:2].sum() + functional.dropout(CONSTANT, 0.5).sum()
        mask = functional.dropout(torch.ones_like(x), 0.5, training=True)
        assert torch.equal(state, torch.get_rng_state())
        torch.testing.assert_close(found, ALL[name](torch.func, lambda y: ((y * mask) ** 3 * scale).sum(), x))  # noqa: B023


def test_one_power_iteration_of_a_spectral_norm() -> None:
    layer = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(4, 3).double()).requires_grad_(False)
    norm = layer.parametrizations.weight[0]
    for _ in range(3):
        before = {key: value.clone() for key, value in layer.state_dict().items()}
        chainrule.hessian(lambda x: layer(x).sin().sum())(real(4))
        after = norm._u.clone()
        layer.load_state_dict(before)
        layer(real(4))
        torch.testing.assert_close(after, norm._u)


@pytest.mark.parametrize("kind", ["jvp of grad", "jvp of hessian", "hvp"])
def test_one_tensor_as_two_tangents_in_the_first_call(kind: str) -> None:
    """The program that the first call makes serves calls with two tangents, too."""
    weights = torch.rand(3, dtype=torch.float64)

    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((x * y * 0.37).sigmoid() ** 2 * weights).sum()

    def found(m: Any, x: torch.Tensor, y: torch.Tensor, t: torch.Tensor, u: torch.Tensor) -> Any:
        if kind == "hvp" and m is chainrule:
            return chainrule.hvp(f, (x, y), (t, u))
        inner = m.hessian if kind == "jvp of hessian" else m.grad
        result = m.jvp(inner(f, argnums=(0, 1)), (x, y), (t, u))
        return result[1] if kind == "hvp" else result

    CACHE.plans.clear()
    for number in range(4):
        x, y, t, u = torch.randn(4, 3, dtype=torch.float64).unbind()
        if not number:
            u = t
        torch.testing.assert_close(found(chainrule, x, y, t, u), found(torch.func, x, y, t, u))


def test_a_tangent_that_the_function_reads() -> None:
    constant = torch.randn(3, dtype=torch.float64)

    def f(x: torch.Tensor) -> torch.Tensor:
        return ((x * constant).sin() ** 2).sum()

    for tangent in (constant, torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)):
        x = torch.randn(3, dtype=torch.float64)
        expected = torch.func.jvp(torch.func.grad(f), (x,), (tangent,))
        torch.testing.assert_close(chainrule.jvp(chainrule.grad(f), (x,), (tangent,)), expected)
