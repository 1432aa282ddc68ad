"""torch's own forward mode around chainrule: refused by derivatives, carried on by `vmap`.

Sizes and magnitudes are near one, in double precision: the tolerance of 1e-12 is some thousand units in the last place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

import chainrule
from chainrule.execute.mapped_calls import CALLS

pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture
def double() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def scalar(x: torch.Tensor) -> torch.Tensor:
    return (x * x * x.sin()).sum()


def vector(x: torch.Tensor) -> torch.Tensor:
    return x**3


DERIVATIVES: dict[str, Callable[[torch.Tensor], Any]] = {
    "grad": chainrule.grad(scalar),
    "vjp": lambda x: chainrule.vjp(vector, x),
    "jvp": lambda x: chainrule.jvp(vector, (x,), (torch.ones_like(x.detach()),)),
    "linearize": lambda x: chainrule.linearize(vector, x),
    "jacobian": chainrule.jacobian(vector),
    "jacrev": chainrule.jacrev(vector),
    "jacfwd": chainrule.jacfwd(vector),
    "hessian": chainrule.hessian(scalar),
    "hessian_diagonal": chainrule.hessian_diagonal(scalar),
    "laplacian": chainrule.laplacian(scalar),
    "linear_map": lambda x: chainrule.linear_map(vector, x).dense(),
    "nest": chainrule.jacfwd(chainrule.jacrev(scalar)),
    "mapped": chainrule.vmap(chainrule.grad(scalar)),
    "mapped twice": lambda x: chainrule.vmap(chainrule.vmap(chainrule.grad(scalar)))(torch.stack([x, x])),
    "inside out": chainrule.grad(lambda x: chainrule.vmap(scalar)(x).sum()),
}


@pytest.mark.parametrize("size", [3, 20_000])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_a_derivative_refuses_dual_tensors_in_each_call(name: str, size: int) -> None:
    transformed = DERIVATIVES[name]
    x = torch.linspace(0.1, 1.0, size if name in ("grad", "vjp", "jvp", "mapped") else 3)
    transformed(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        for _ in range(3):
            with pytest.raises(RuntimeError, match=r"chainrule\.jvp"):
                transformed(dual)
        transformed(x)  # without a tangent


CLOSED: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "product": lambda x, w: chainrule.grad(lambda x: (x * w).sum())(x),
    "computed": lambda x, w: chainrule.grad(lambda x: (x * w.sin()).sum())(x),
    "unused": lambda x, w: chainrule.grad(lambda x: x.sum() + 0 * w.sin().sum())(x),
    "argument": lambda x, w: chainrule.jacobian(lambda x, w: torch.outer(x, w), argnums=0)(x, w),
    "keyword": lambda x, w: chainrule.jacrev(lambda x, w: torch.cat([x, x * w]))(x, w=w),
    "under vmap": lambda x, w: chainrule.vmap(chainrule.grad(lambda x: (x * w).sum()))(x),
    "mapped": lambda x, w: chainrule.vmap(chainrule.grad(lambda x, w: (x * w).sum()))(x, w),
    "in a nest": lambda x, w: chainrule.jacfwd(chainrule.jacrev(lambda x: (x**2 * w).sum()))(x),
    "cotangent": lambda x, w: chainrule.vjp(torch.sin, x)[1](w),
    "tangent": lambda x, w: chainrule.jvp(torch.sin, (x,), (w,)),
    "tangent of a nest": lambda x, w: chainrule.jvp(chainrule.grad(scalar), (x,), (w,)),
    "pushed": lambda x, w: chainrule.linearize(chainrule.grad(scalar), x)[1](w),
}


@pytest.mark.parametrize("name", CLOSED)
def test_a_derivative_refuses_what_else_it_uses(name: str) -> None:
    x = torch.linspace(0.1, 1.0, 4)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.cos(), torch.ones_like(x))
        for _ in range(3):
            with pytest.raises(RuntimeError, match=r"chainrule\.jvp"):
                CLOSED[name](x, dual)
        for _ in range(2):
            CLOSED[name](x, x.cos())


class Square(torch.autograd.Function):
    """A function of the user's, whose calls a tape does not see op by op."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return 2 * cotangents[0] * ctx.saved_tensors[0]


def test_functions_of_the_user_refuse_dual_tensors() -> None:
    x = torch.linspace(0.1, 1.0, 4)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.cos(), torch.ones_like(x))
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"chainrule\.jvp"):
                chainrule.grad(lambda x: (Square.apply(dual) * x).sum())(x)


UNTIED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "detached": lambda x, w: (x**2 * w.detach()).sum(),
    "compared": lambda x, w: torch.where(x > w, x**2, x**3).sum(),
    "read": lambda x, w: (x**2 * w.detach()[0].item()).sum() if w.detach()[0] > 0 else x.sum(),
    "shape": lambda x, w: (x**2 * w.shape[0]).sum(),
    "ones": lambda x, w: (x**2 * torch.ones_like(w)).sum(),
}


@pytest.mark.parametrize("name", UNTIED)
def test_what_has_no_tangent_in_torch_either_is_taken(name: str) -> None:
    x, w = torch.linspace(0.1, 1.0, 4), torch.full((4,), 0.5)
    wanted = chainrule.grad(lambda x: UNTIED[name](x, w))(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(w, torch.ones_like(w))
        for _ in range(3):
            torch.testing.assert_close(chainrule.grad(lambda x: UNTIED[name](x, dual))(x), wanted, rtol=0, atol=0)


MAPPED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "pointwise": lambda x: (x * x * x.sin()).exp() + 2 * x,
    "method": lambda x: x.add(1.0).mul(x),
    "shapes": lambda x: x.reshape(2, -1).t().flip(0).sum(1),
    "softmax": lambda x: torch.softmax(x, 0) @ x,
    "index": lambda x: x[1:] * x[:-1] + x[[0, 0, 1]],
    "layer": lambda x: torch.nn.functional.layer_norm(x, (4,)),
    "linalg": lambda x: torch.linalg.solve(torch.outer(x, x) + torch.eye(4), x),
    "nested": lambda x: chainrule.vmap(lambda y: (y * x).sin().sum())(x),
    "written": lambda x: x.clone().mul_(x),
    "cat": lambda x: torch.cat([x, x.cumsum(0)]),
}


@pytest.mark.parametrize("rows", [3, 5_000])
@pytest.mark.parametrize("name", MAPPED)
def test_vmap_carries_tangents(name: str, rows: int) -> None:
    function = MAPPED[name]
    mapped = chainrule.vmap(function)
    x = torch.linspace(0.1, 1.0, rows * 4).reshape(rows, 4)
    tangent = x.cos()
    samples = range(rows) if rows < 10 else (0, 1, rows // 2, rows - 1)
    for _ in range(4):
        mapped(x)  # so that calls are known that could be replayed
    for _ in range(4):
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(mapped(forward_ad.make_dual(x, tangent)))
        assert found.tangent is not None
        for sample in samples:
            with forward_ad.dual_level():
                wanted = forward_ad.unpack_dual(function_of(name, x[sample], tangent[sample]))
            torch.testing.assert_close(found.primal[sample], wanted.primal, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found.tangent[sample], wanted.tangent, rtol=1e-12, atol=1e-12)


def function_of(name: str, x: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
    """A function of a dual tensor, by torch alone."""
    dual = forward_ad.make_dual(x, tangent)
    if name == "nested":
        return torch.stack([(y * dual).sin().sum() for y in dual])
    return MAPPED[name](dual)


def test_vmap_over_a_plain_tensor_with_a_dual_beside_it() -> None:
    x, w = torch.linspace(0.1, 1.0, 12).reshape(3, 4), torch.linspace(1.0, 2.0, 4)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(w, torch.ones_like(w))
        for _ in range(4):
            tangent = forward_ad.unpack_dual(chainrule.vmap(lambda y: (y * dual).sin())(x)).tangent
            assert tangent is not None
            torch.testing.assert_close(tangent, (x * w).cos() * x, rtol=1e-12, atol=1e-12)


def test_replays_are_not_recorded_under_a_forward_level() -> None:
    x = torch.linspace(0.1, 1.0, 21).reshape(3, 7)
    known = dict(CALLS.known)
    with forward_ad.dual_level():
        for _ in range(4):
            chainrule.vmap(lambda y: y.roll(3).flip(0).logsumexp(0))(forward_ad.make_dual(x, x))
    assert dict(CALLS.known) == known


COMPILED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "chain": lambda x: (x * 2).sin() * x,
    "view": lambda x: x.reshape(2, 2).t() * 3,
    "linear": lambda x: x * torch.ones(4),
    "mapped": chainrule.vmap(lambda x: x.sin() * x),
}


@pytest.mark.parametrize("warm", [0, 1, 3])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_functions_carry_tangents(name: str, warm: int) -> None:
    function = COMPILED[name]
    compiled = chainrule.compile(function)
    x = torch.linspace(0.1, 1.0, 4)
    for _ in range(warm):
        compiled(x)
    with forward_ad.dual_level():
        for _ in range(3):
            found, wanted = (forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))) for f in (compiled, function))
            torch.testing.assert_close(found.primal, wanted.primal, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found.tangent, wanted.tangent, rtol=1e-12, atol=1e-12)
        if not warm:
            with pytest.raises(chainrule.CompileError, match="dual_level"):
                compiled.graph(x)  # type: ignore[attr-defined]
    for _ in range(4):
        torch.testing.assert_close(compiled(x), function(x), rtol=1e-12, atol=1e-12)
    assert compiled.cache_info().misses == 1  # type: ignore[attr-defined]


def test_a_compiled_derivative_refuses_dual_tensors_before_it_has_a_graph() -> None:
    compiled = chainrule.compile(chainrule.grad(scalar))
    x = torch.linspace(0.1, 1.0, 4)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"chainrule\.jvp"):
        compiled(forward_ad.make_dual(x, x.cos()))
    compiled(x)
    for _ in range(3):
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(compiled(forward_ad.make_dual(x, x.cos()))).tangent
        assert found is not None
        torch.testing.assert_close(found, chainrule.hvp(scalar, (x,), (x.cos(),)), rtol=1e-12, atol=1e-12)
