"""Two vmaps around one another, run as one, give what two levels give."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chainrule
from chainrule.transforms import vmap as vmap_module


@pytest.fixture
def merged_runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Notes every run of two levels as one."""
    runs: list[Any] = []
    run = vmap_module.Mapping.run_merged

    def noted(self: Any, merged: Any) -> Any:
        runs.append(merged)
        return run(self, merged)

    monkeypatch.setattr(vmap_module.Mapping, "run_merged", noted)
    return runs


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def kernel(x: Tensor, y: Tensor) -> Tensor:
    return torch.exp(-(x - y).square().sum()) * (1 + x[0] * y[-1])


CASES: list[tuple[Callable[..., Any], Any, Any, Callable[[], tuple[Tensor, ...]]]] = [
    (kernel, (0, None), (None, 0), lambda: (draw(4, 3), draw(5, 3))),
    (kernel, (None, 0), (0, None), lambda: (draw(4, 3), draw(5, 3))),
    (kernel, (1, None), (None, -1), lambda: (draw(3, 4), draw(3, 5))),
    (kernel, 0, 0, lambda: (draw(4, 5, 3), draw(4, 5, 3))),
    (kernel, 0, (0, None), lambda: (draw(4, 5, 3), draw(4, 3))),
    (kernel, (1, 0), (0, 1), lambda: (draw(5, 4, 3), draw(4, 3, 5))),
    (kernel, (0, None), (0, None), lambda: (draw(1, 6, 3), draw(3))),
    (kernel, (0, 0), (None, 0), lambda: (draw(4, 3), draw(4, 1, 3))),
    (lambda x, y: {"sum": x.sum() + y, "fixed": torch.ones(2)}, (0, None), (None, 0), lambda: (draw(4, 3), draw(5, 3))),
    (lambda x, y: (x, y), (0, None), (None, 0), lambda: (draw(4, 3), draw(5, 3))),
    (lambda x, p: x @ p["w"] + p["b"], (0, None), (0, None), lambda: (draw(4, 5, 3), {"w": draw(3, 2), "b": draw(2)})),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_values(case: int, merged_runs: list[Any]) -> None:
    function, outer, inner, inputs = CASES[case]
    mapped = chainrule.vmap(chainrule.vmap(function, in_dims=inner), in_dims=outer)
    other = torch.func.vmap(torch.func.vmap(function, in_dims=inner), in_dims=outer)
    for _ in range(5):
        args = inputs()
        torch.testing.assert_close(mapped(*args), other(*args), rtol=1e-12, atol=1e-13)
    # What would have to be copied although both levels map it is left to two.
    assert bool(merged_runs) is (case != 5)


@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "hessian"])
def test_derivatives(transform: str, merged_runs: list[Any]) -> None:
    def nest(library: Any) -> Any:
        return library.vmap(library.vmap(getattr(library, transform)(kernel), in_dims=(None, 0)), in_dims=(0, None))

    for _ in range(4):
        x, y = draw(4, 3), draw(5, 3)
        torch.testing.assert_close(nest(chainrule)(x, y), nest(torch.func)(x, y), rtol=1e-11, atol=1e-12)
    assert len(merged_runs) == 4


def test_graphs_are_joined(merged_runs: list[Any]) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)).double()

    def slopes(library: Any, x: Tensor, y: Tensor) -> list[Tensor]:
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        out = library.vmap(library.vmap(lambda a, b: net(a * b), in_dims=(None, 0)), in_dims=(0, None))(x, y)
        return [out, *torch.autograd.grad(out.sin().sum(), [x, y, *net.parameters()])]

    for _ in range(5):
        x, y = draw(4, 3), draw(5, 3)
        torch.testing.assert_close(slopes(chainrule, x, y), slopes(torch.func, x, y), rtol=1e-10, atol=1e-12)
    assert len(merged_runs) == 5


def test_inside_of_other_transforms(merged_runs: list[Any]) -> None:
    """A derivative of two levels sees both dimensions."""

    def loss(library: Any) -> Any:
        both = library.vmap(library.vmap(kernel, in_dims=(None, 0)), in_dims=(0, None))
        return lambda x, y: both(x, y).sin().sum()

    x, y = draw(4, 3), draw(5, 3)
    for transform in ("grad", "hessian"):
        found, expected = (getattr(library, transform)(loss(library))(x, y) for library in (chainrule, torch.func))
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    three = [library.vmap(library.vmap(library.vmap(kernel))) for library in (chainrule, torch.func)]
    args = draw(2, 4, 5, 3), draw(2, 4, 5, 3)
    torch.testing.assert_close(three[0](*args), three[1](*args))


def test_large_arguments_are_not_copied(merged_runs: list[Any]) -> None:
    w, x = draw(4, 40, 40), draw(50, 40)
    found = chainrule.vmap(chainrule.vmap(lambda w, x: w @ x, in_dims=(None, 0)), in_dims=(0, None))(w, x)
    torch.testing.assert_close(found, torch.einsum("aij,bj->abi", w, x))
    assert not merged_runs


def test_who_wraps_a_mapped_function_is_asked() -> None:
    inner = chainrule.vmap(kernel)

    @functools.wraps(inner)
    def doubled(*args: Tensor) -> Tensor:
        return 2 * inner(*args)

    x, y = draw(4, 5, 3), draw(4, 5, 3)
    torch.testing.assert_close(chainrule.vmap(doubled)(x, y), 2 * chainrule.vmap(inner)(x, y))


def test_writes_reach_the_arguments(merged_runs: list[Any]) -> None:
    def write(x: Tensor, y: Tensor) -> Tensor:
        return x.mul_(2.0) + y

    for dims, shape in (((0, None), (4, 3)), ((0, 0), (4, 5, 3))):
        inner = (None if dims[1] is None else 0, 0)
        x, y = draw(*shape), draw(5, 3)
        given = x.clone()
        chainrule.vmap(chainrule.vmap(write, in_dims=inner), in_dims=(0, None))(given, y)
        torch.testing.assert_close(given, 2 * x)
    with pytest.raises(RuntimeError, match="differs between samples"):
        chainrule.vmap(chainrule.vmap(lambda x, y: x.mul_(y), in_dims=(None, 0)), in_dims=(0, None))(draw(4, 3), draw(5, 3))
    assert len(merged_runs) == 3


@pytest.mark.parametrize(
    ("outer", "inner", "shapes"),
    [((0, None), (0, 0), ((4, 5, 3), (6, 3))), ((0, None), (None, None), ((4, 3), (3,))), ((0, 0), (None, 0), ((4, 3), (0, 5, 3)))],
)
def test_errors_are_those_of_two_levels(outer: Any, inner: Any, shapes: Any, merged_runs: list[Any]) -> None:
    with pytest.raises(ValueError, match="vmap"):
        chainrule.vmap(chainrule.vmap(kernel, in_dims=inner), in_dims=outer)(*[draw(*shape) for shape in shapes])
    assert not merged_runs


def test_options_keep_two_levels(merged_runs: list[Any]) -> None:
    x = draw(4, 5, 3)
    for options in ({"out_dims": 1}, {"randomness": "different"}, {"chunk_size": 2}):
        found = chainrule.vmap(chainrule.vmap(lambda s: s.cumsum(0), **options))(x)
        expected = torch.func.vmap(torch.func.vmap(lambda s: s.cumsum(0), **options))(x)
        torch.testing.assert_close(found, expected)
    assert not merged_runs
    with pytest.raises(RuntimeError, match="random"):
        chainrule.vmap(chainrule.vmap(lambda s: s + torch.rand(3)))(x)
