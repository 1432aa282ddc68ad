"""A `vmap` of a derivative transform runs as a whole: one run of the function a call, and right values in every call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.func

import chainrule
from chainrule.execute.cached_plans import CachedPlan
from chainrule.transforms import routes

Tensor = torch.Tensor


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


class Field:
    """A function that depends on what stands outside of its arguments, and counts its runs."""

    def __init__(self, *, scalar: bool) -> None:
        self.scalar = scalar
        self.runs = 0
        self.change(True, 0.5)

    def change(self, branch: bool, number: float) -> None:
        self.weight, self.branch, self.number = real(4, 3), branch, number

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.runs += 1
        h = torch.tanh(self.weight @ x) * self.number
        h = h.sin() if self.branch else h * y.sum()
        return h.exp().sum() if self.scalar else h


#: Transforms in a library, and whether the function has to be scalar.
TRANSFORMS: dict[str, tuple[Callable[[Any], Callable[..., Any]], bool]] = {
    "jacrev": (lambda m: m.jacrev, False),
    "jacfwd": (lambda m: m.jacfwd, False),
    "grad": (lambda m: m.grad, True),
    "value and gradient": (lambda m: m.grad_and_value, True),
    "two arguments": (lambda m: lambda f: m.grad(f, argnums=(0, 1)), True),
    "hessian": (lambda m: m.hessian, True),
    "three levels": (lambda m: lambda f: m.jacfwd(m.jacrev(m.grad(f))), True),
}


def compare(found: Any, wanted: Any) -> None:
    # Float64 and fewer than a hundred operations on numbers near one: far below 1e-11 of rounding.
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("in_dims", [0, (0, None), (1, 0), (-1, None)])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_values_and_runs(name: str, in_dims: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, scalar = TRANSFORMS[name]
    field = Field(scalar=scalar)
    ours = chainrule.vmap(made(chainrule)(field), in_dims=in_dims)
    theirs = torch.func.vmap(made(torch.func)(field), in_dims=in_dims)
    replays: list[bool] = []
    outside = CachedPlan.run_stored

    def noted(self: CachedPlan, *args: Any) -> Any:
        found = outside(self, *args)
        replays.append(found is not None)
        return found

    monkeypatch.setattr(CachedPlan, "run_stored", noted)
    by_route = routes.call_mapped

    def noted_route(*args: Any) -> Any:
        found = by_route(*args)
        if found is not NotImplemented and found[0]:
            replays.append(True)
        return found

    monkeypatch.setattr(routes, "call_mapped", noted_route)
    first = 0 if isinstance(in_dims, int) else in_dims[0]
    for call, (branch, number) in enumerate([(True, 0.5)] * 4 + [(False, 0.5), (False, 2.0), (True, 0.5), (False, 0.5)]):
        field.change(branch, number)
        x, y = real(5, 3), real(5, 2)
        args = (x.t().contiguous() if first else x, y)
        before = field.runs
        found = ours(*args)
        assert field.runs == before + 1
        compare(found, theirs(*args))
        if call == 3:
            assert replays[-1]


def test_other_shapes_and_strides() -> None:
    field = Field(scalar=False)
    ours, theirs = chainrule.vmap(chainrule.jacrev(field)), torch.func.vmap(torch.func.jacrev(field))
    for _ in range(3):
        for x in (real(5, 3), real(2, 3), real(3, 5).t(), real(5, 6)[:, ::2], real(1, 3).expand(5, 3), real(5, 3).float().double()):
            y = real(x.shape[0], 2)
            compare(ours(x, y), theirs(x, y))


def test_results_elsewhere_and_keywords() -> None:
    def scaled(x: Tensor, *, scale: Tensor) -> Tensor:
        return (x * scale).sin()

    for out_dims in (0, 1, -1):
        ours = chainrule.vmap(chainrule.jacrev(scaled), out_dims=out_dims)
        for _ in range(4):
            x, scale = real(5, 3), real(3)
            theirs = torch.func.vmap(torch.func.jacrev(partial(scaled, scale=scale)), out_dims=out_dims)
            compare(ours(x, scale=scale), theirs(x))


def test_a_result_that_is_the_same_for_all_samples() -> None:
    weight = real(4, 3)
    ours, theirs = (m.vmap(m.jacrev(lambda x: weight @ x)) for m in (chainrule, torch.func))
    for _ in range(4):
        x = real(5, 3)
        compare(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["jacrev", "jacfwd", "hessian"])
def test_steps_without_gradients(name: str) -> None:
    def partly(x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = x.sin()
        return (x * hidden).sum()

    ours, theirs = (m.vmap(getattr(m, name)(partly)) for m in (chainrule, torch.func))
    for _ in range(4):
        x = real(5, 3)
        compare(ours(x), theirs(x))


def test_laplacian_with_steps_without_gradients() -> None:
    def partly(x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = x.sin()
        return (x * x * hidden).sum()

    ours = chainrule.vmap(chainrule.laplacian(partly))
    theirs = torch.func.vmap(lambda x: torch.func.hessian(partly)(x).trace())
    for _ in range(4):
        x = real(5, 3)
        compare(ours(x), theirs(x))


def test_graphs() -> None:
    weight = real(4, 3).requires_grad_()
    for _ in range(4):
        x = real(5, 3).requires_grad_()
        found = []
        for m in (chainrule, torch.func):
            result = m.vmap(m.jacrev(lambda x: torch.tanh(weight @ x)))(x)
            found.append((result.detach(), *torch.autograd.grad(result.sin().sum(), (weight, x))))
        compare(found[0], found[1])
        with torch.no_grad():
            assert not chainrule.vmap(chainrule.jacrev(lambda x: torch.tanh(weight @ x)))(x).requires_grad


def test_errors_leave_no_level() -> None:
    def fails(x: Tensor) -> Tensor:
        raise ValueError("of the function")

    for _ in range(2):
        with pytest.raises(ValueError, match="of the function"):
            chainrule.vmap(chainrule.jacrev(fails))(real(5, 3))
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch._C._len_torch_function_stack() == 0


def test_random_numbers() -> None:
    def noisy(x: Tensor) -> Tensor:
        return x * torch.rand(3, dtype=torch.float64)

    for randomness in ("same", "different"):
        ours = chainrule.vmap(chainrule.jacrev(noisy), randomness=randomness)
        for _ in range(4):
            found = ours(real(5, 3)).diagonal(0, -2, -1)
            assert bool((found[0] == found[1]).all()) is (randomness == "same")
    with pytest.raises(RuntimeError, match="random"):
        chainrule.vmap(chainrule.jacrev(noisy))(real(5, 3))
