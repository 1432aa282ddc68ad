"""Plans under a vmap that stands in other modes are replayed on the stored tensors, and give what torch.func gives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

import chainrule
from chainrule.batching.mode import VmapMode

Tensor = torch.Tensor
Params = tuple[Tensor, ...]


def _model(params: Params, x: Tensor) -> Tensor:
    return torch.tanh(x @ params[0] + params[1]) @ params[2]


def _adapted(library: Any, steps: int) -> Callable[..., Tensor]:
    """The loss of parameters after some steps on each task: an inner gradient under a vmap."""

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(_model(params, x), y)

    def task(params: Params, x: Tensor, y: Tensor) -> Tensor:
        for _ in range(steps):
            slopes = library.grad(loss)(params, x, y)
            params = tuple([p - 0.1 * s for p, s in zip(params, slopes, strict=True)])
        return loss(params, y, x)

    return lambda params, x, y: library.vmap(task, in_dims=(None, 0, 0))(params, x, y).mean()


def _tangent_kernel(library: Any) -> Callable[..., Tensor]:
    """The second form of torch's tutorial: a pullback and a pushforward under three vmaps."""

    def entry(params: Params, one: Tensor, other: Tensor) -> Tensor:
        output, pull = library.vjp(lambda p: _model(p, one), params)

        def column(cotangent: Tensor) -> Tensor:
            _, pushed = library.jvp(lambda p: _model(p, other), (params,), pull(cotangent))
            return pushed

        return library.vmap(column)(torch.eye(output.numel(), dtype=output.dtype))

    rows = library.vmap(entry, in_dims=(None, None, 0))
    return library.vmap(rows, in_dims=(None, 0, None))


def _same_twice(library: Any) -> Callable[..., Tensor]:
    """A tensor that stands at two places of one plan, in some calls."""

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return library.grad(lambda u, v: (torch.sin(u) * torch.exp(v) * u).sum(), argnums=(0, 1))(a, b)

    def both(a: Tensor, b: Tensor) -> Tensor:
        found = library.vmap(lambda u, v: (*inner(u, u), *inner(u, v), *inner(v, v), *inner(v, u)))(a, b)
        return sum([(n + 1) * (f * f).sum() for n, f in enumerate(found)])

    return both


def _inputs(seed: int) -> tuple[Params, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return (draw(3, 5), draw(5), draw(5, 3)), draw(4, 6, 3), draw(4, 6, 3)


@pytest.mark.parametrize("joined", [False, True], ids=["plain", "parameters requiring grad"])
@pytest.mark.parametrize("grad", [True, False], ids=["", "under no_grad"])
@pytest.mark.parametrize("steps", [1, 2])
def test_gradients_through_inner_steps_are_torch_funcs(steps: int, grad: bool, joined: bool) -> None:
    mine = chainrule.grad(_adapted(chainrule, steps))
    theirs = torch.func.grad(_adapted(torch.func, steps))
    for seed in range(5):
        params, x, y = _inputs(seed)
        given = tuple([p.clone().requires_grad_(joined) for p in params])
        with nullcontext() if grad else torch.no_grad():
            found = mine(given, x, y)
        torch.testing.assert_close(found, theirs(params, x, y))
        assert all([f.requires_grad is (joined and grad) for f in found])


def test_second_order_through_inner_steps_is_that_of_finite_differences() -> None:
    mine = chainrule.grad(_adapted(chainrule, 2))
    for seed in range(3):
        params, x, y = _inputs(seed)
        direction = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        given = tuple([p.clone().requires_grad_() for p in params])
        (found,) = torch.autograd.grad((mine(given, x, y)[1] * direction).sum(), given[1])
        step = 1e-5
        shifted = [mine((params[0], params[1] + sign * step * direction, params[2]), x, y)[1] for sign in (1, -1)]
        torch.testing.assert_close(found, (shifted[0] - shifted[1]) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("points", [(4, 2), (1, 3)])
def test_tangent_kernels_are_torch_funcs(points: tuple[int, int]) -> None:
    mine, theirs = _tangent_kernel(chainrule), _tangent_kernel(torch.func)
    for seed in range(5):
        params, x, y = _inputs(seed)
        one, other = x[0, : points[0]], y[0, : points[1]]
        torch.testing.assert_close(mine(params, one, other), theirs(params, one, other))


def test_the_same_tensor_at_two_places_is_not_taken_for_two() -> None:
    mine, theirs = chainrule.grad(_same_twice(chainrule)), torch.func.grad(_same_twice(torch.func))
    for seed in range(5):
        _, x, y = _inputs(seed)
        torch.testing.assert_close(mine(x, y), theirs(x, y))
        torch.testing.assert_close(mine(x, x), theirs(x, x))


def test_an_inner_write_to_an_argument_is_seen_by_the_transform_around() -> None:
    def sample(x: Tensor) -> Tensor:
        y = x * 1
        slope = chainrule.grad(lambda u: u.mul_(2).sin().sum())(y)
        return (slope * y).sum()

    for seed in range(4):
        _, x, _ = _inputs(seed)
        found = chainrule.grad(lambda x: chainrule.vmap(sample)(x).sum())(x)
        torch.testing.assert_close(found, 4 * torch.cos(2 * x) - 8 * x * torch.sin(2 * x))


def test_an_inner_plan_under_two_modes_passes_the_vmap_no_op(monkeypatch: pytest.MonkeyPatch) -> None:
    def slopes(x: Tensor) -> Tensor:
        return chainrule.vmap(chainrule.grad(lambda u: (torch.tanh(torch.sin(u)) ** 2).sum()))(x)

    outer = chainrule.grad(lambda x: torch.stack([(slopes(x) * w).sum() for w in (x, x * 2)]).sum())
    _, x, _ = _inputs(0)
    ops: list[str] = []
    dispatch = VmapMode.__torch_dispatch__

    def noting(self: VmapMode, func: Any, *args: Any, **kwargs: Any) -> Any:
        ops.append(str(func))
        return dispatch(self, func, *args, **kwargs)

    for _ in range(4):
        outer(x)
    monkeypatch.setattr(VmapMode, "__torch_dispatch__", noting)
    outer(x)
    assert not [op for op in ops if "mul" in op or "cos" in op or "rsub" in op]
