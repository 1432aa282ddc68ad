"""Values, structures, shapes and dtypes of every transform over functions × argument structures, against torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.func
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import chainrule
from chainrule.execute import planning
from chainrule.plan.planner import plan


class Case(NamedTuple):
    """A function, its arguments, and the argnums to try."""

    function: Callable[..., Any]
    args: Callable[[], tuple[Any, ...]]
    argnums: tuple[Any, ...] = (0,)


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


W = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3).sin()

CASES: dict[str, Case] = {
    "tanh": Case(torch.tanh, lambda: (r(3),)),
    "affine": Case(lambda x: W @ x + 1, lambda: (r(3),), (0, -1, (0,))),
    "two arguments": Case(lambda x, y: x * y.sum(), lambda: (r(3), r(2)), (0, 1, -1, (0, 1), (1, 0))),
    "two outputs": Case(lambda x: (x.sin(), x[:1]), lambda: (r(3),)),
    "list of outputs": Case(lambda x: [x, x * 2], lambda: (r(2),)),
    "dict out": Case(lambda x: {"a": x**2, "b": x.sum()}, lambda: (r(3),)),
    "nested out": Case(lambda x: {"a": [x, (x.sum(), x * x)]}, lambda: (r(2),)),
    "dict in": Case(lambda d: d["a"] * d["b"].sum(), lambda: ({"a": r(3), "b": r(2)},)),
    "nested in": Case(lambda d, y: d["a"][0] * d["a"][1].prod() + y, lambda: ({"a": [r(2), r(3)]}, r(2)), (0, 1, (0, 1))),
    "tuple in": Case(lambda p: p[0] @ p[1], lambda: ((r(2, 3), r(3)),)),
    "dict in dict out": Case(lambda d: {"o": d["a"], "p": [d["a"].sum() * d["b"]]}, lambda: ({"a": r(3), "b": r(2)},)),
    "scalar to scalar": Case(lambda x: x**3, lambda: (r(),)),
    "scalar to vector": Case(lambda x: x * torch.arange(3.0, dtype=torch.float64), lambda: (r(),)),
    "vector to scalar": Case(lambda x: (x**2).sum(), lambda: (r(4),)),
    "matrix": Case(lambda x: x @ x.t(), lambda: (r(2, 3),)),
    "empty input": Case(lambda x: x * 2, lambda: (r(0),)),
    "empty output": Case(lambda x: x[:0], lambda: (r(3),)),
    "empty inner": Case(lambda x: x[:0].sum() + x, lambda: (r(3),)),
    "zero rows": Case(lambda x: x.sum(0), lambda: (r(0, 3),)),
    "size one": Case(lambda x: x.reshape(1, 1) * x, lambda: (r(1),)),
    "non-contiguous": Case(lambda x: x.sin() @ x.t(), lambda: (r(3, 2).t(),)),
    "strided": Case(lambda x: x * 2, lambda: (r(6)[::2],)),
    "expanded": Case(lambda x: x.cos(), lambda: (r(1).expand(3),)),
    "unused input": Case(lambda x, y: x * 2, lambda: (r(2), r(3)), (0, 1, (0, 1))),
    "independent output": Case(lambda x: (x, torch.ones(2, dtype=torch.float64)), lambda: (r(2),)),
    "wholly independent": Case(lambda x: torch.ones(2, dtype=torch.float64), lambda: (r(3),)),
    "repeated output": Case(lambda x: (lambda y: (y, y))(x.sin()), lambda: (r(2),)),
    "input returned": Case(lambda x: x, lambda: (r(3),)),
    "input returned twice": Case(lambda x: (x, x), lambda: (r(2),)),
    "input among outputs": Case(lambda x, y: (x, y * x), lambda: (r(2), r(2)), (0, (0, 1))),
    "detached part": Case(lambda x: x * x.detach(), lambda: (r(3),)),
    "branch": Case(lambda x: x**2 if x.sum() > 0 else -x, lambda: (r(3).abs(),)),
    "loop": Case(lambda x: sum((x**k for k in range(1, 4)), torch.zeros_like(x)), lambda: (r(3),)),
    "integer argument": Case(lambda x, i: x[i], lambda: (r(5), torch.tensor([0, 2])), (0,)),
    "plain number argument": Case(lambda x, k: x * k, lambda: (r(2), 3.0), (0,)),
    "mixed dtypes": Case(lambda x, y: (x.double() * y).sum() + y, lambda: (r(2).float(), r(2)), (0, 1, (0, 1))),
    "cast": Case(lambda x: x.float() * 2, lambda: (r(3),)),
    "broadcast": Case(lambda x, y: x[:, None] * y[None], lambda: (r(2), r(3)), ((0, 1),)),
    "reduce": Case(lambda x: (x.mean(0), x.var(1), x.amax(-1)), lambda: (r(3, 4),)),
    "softmax": Case(lambda x: torch.log_softmax(x, -1) * torch.softmax(x, 0), lambda: (r(2, 3),)),
    "matrix inverse": Case(lambda x: torch.linalg.inv(x + 4 * torch.eye(3, dtype=torch.float64)), lambda: (r(3, 3),)),
    "in place": Case(lambda x: x.clone().mul_(x).add_(1).sin_(), lambda: (r(3),)),
    "views": Case(lambda x: x.view(2, 3).t().reshape(-1).roll(1), lambda: (r(6),)),
    "cat stack split": Case(lambda x: torch.cat([torch.stack(x.split(2)).sum(0), x]), lambda: (r(4),)),
    "index": Case(lambda x: x[[2, 0]] * x[1:3], lambda: (r(4),)),
    "einsum": Case(lambda x, y: torch.einsum("bi,bj->ij", x, y), lambda: (r(2, 3), r(2, 2)), (0, (1, 0))),
    "residual": Case(lambda x: x + torch.tanh(x @ W @ W.t()) + x * 2, lambda: (r(4),)),
    "complex inside": Case(lambda x: torch.fft.fft(x).abs(), lambda: (r(4),)),
}


def same(ours: Any, theirs: Any) -> None:
    mine, my_spec = tree_flatten(ours)
    others, their_spec = tree_flatten(theirs)
    assert my_spec == their_spec
    for one, two in zip(mine, others, strict=True):
        assert one.shape == two.shape
        assert one.dtype == two.dtype
        tolerance = 1e-9 if one.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


def grid() -> list[Any]:
    return [pytest.param(case, n, id=f"{name}-{n}") for name, case in CASES.items() for n in case.argnums]


@pytest.mark.parametrize("transform", ["jacrev", "jacfwd"])
@pytest.mark.parametrize(("case", "argnums"), grid())
def test_jacobians(case: Case, argnums: Any, transform: str) -> None:
    args = case.args()
    ours = getattr(chainrule, transform)(case.function, argnums=argnums)(*args)
    # torch.func.jacfwd returns zeros for a negative argnum, and refuses expanded inputs.
    oracle = torch.func.jacrev if argnums == -1 or case is CASES["expanded"] else getattr(torch.func, transform)
    same(ours, oracle(case.function, argnums=argnums)(*args))


@pytest.mark.parametrize(("case", "argnums"), grid())
def test_jacobian_in_the_cheapest_order(case: Case, argnums: Any) -> None:
    args = case.args()
    same(chainrule.jacobian(case.function, argnums=argnums)(*args), torch.func.jacrev(case.function, argnums=argnums)(*args))


@pytest.mark.parametrize(("case", "argnums"), grid())
def test_hessian(case: Case, argnums: Any) -> None:
    args = case.args()

    def theirs(*inputs: Any) -> Any:
        inner = torch.func.jacrev(case.function, argnums=argnums)
        try:
            return torch.func.jacfwd(inner, argnums=argnums)(*inputs)
        except (NotImplementedError, RuntimeError):  # an op without forward mode, or one that writes
            return torch.func.jacrev(inner, argnums=argnums)(*inputs)

    same(chainrule.hessian(case.function, argnums=argnums)(*args), theirs(*args))


def scalar(function: Callable[..., Any]) -> Callable[..., Any]:
    def summed(*args: Any) -> Any:
        leaves = tree_flatten(function(*args))[0]
        return sum((leaf.double() ** 2).sum() for leaf in leaves)

    return summed


@pytest.mark.parametrize(("case", "argnums"), grid())
def test_gradients(case: Case, argnums: Any) -> None:
    args = case.args()
    function = scalar(case.function)
    same(chainrule.grad(function, argnums=argnums)(*args), torch.func.grad(function, argnums=argnums)(*args))
    same(
        chainrule.grad_and_value(function, argnums=argnums)(*args),
        torch.func.grad_and_value(function, argnums=argnums)(*args),
    )


def differentiable(args: tuple[Any, ...]) -> bool:
    return all(isinstance(a, torch.Tensor) and a.is_floating_point() for a in tree_flatten(args)[0])


@pytest.mark.parametrize("case", [pytest.param(c, id=n) for n, c in CASES.items() if differentiable(c.args())])
def test_pullback_pushforward_and_linearize(case: Case) -> None:
    args = case.args()
    output, pull = chainrule.vjp(case.function, *args)
    expected, their_pull = torch.func.vjp(case.function, *args)
    same(output, expected)
    cotangents = tree_map(torch.randn_like, output)
    same(pull(cotangents), their_pull(cotangents))
    tangents = tree_map(torch.randn_like, args)
    owned = tree_map(torch.Tensor.contiguous, (args, tangents))  # torch.func.jvp refuses expanded inputs
    theirs = torch.func.jvp(case.function, *owned)
    same(chainrule.jvp(case.function, args, tangents), theirs)
    output, push = chainrule.linearize(case.function, *args)
    same((output, push(*tangents)), theirs)
    same(push(*tangents), theirs[1])


@pytest.mark.parametrize("case", [pytest.param(c, id=n) for n, c in CASES.items() if differentiable(c.args())])
def test_against_central_differences(case: Case) -> None:
    args = case.args()
    if any(leaf.dtype != torch.float64 for leaf in tree_flatten((args, case.function(*args)))[0]):
        return
    if case is CASES["detached part"]:
        return  # a difference sees through detach
    tangents = tree_map(torch.randn_like, args)
    step = 1e-6

    def moved(sign: float) -> list[torch.Tensor]:
        shifted = [a + sign * step * t for a, t in zip(tree_flatten(args)[0], tree_flatten(tangents)[0], strict=True)]
        return tree_flatten(case.function(*torch.utils._pytree.tree_unflatten(shifted, tree_flatten(args)[1])))[0]

    pushed = tree_flatten(chainrule.jvp(case.function, args, tangents)[1])[0]
    for plus, minus, derivative in zip(moved(1.0), moved(-1.0), pushed, strict=True):
        # error of a central difference: step^2 times the third derivative, plus rounding / step
        torch.testing.assert_close(derivative, (plus - minus) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["jacrev", "jacfwd", "jacobian", "hessian", "grad"])
def test_better_than_torch_func(name: str) -> None:
    transform = getattr(chainrule, name)

    def function(x: torch.Tensor, y: torch.Tensor, *, power: int = 2) -> torch.Tensor:
        return (x**power * y).sum()

    x, y = r(3), r(3)
    plain = transform(lambda a, b: function(a, b, power=3), argnums=(0, 1))(x, y)
    same(transform(function, argnums=[0, 1])(x, y, power=3), plain)
    derivative, aux = transform(lambda a: (function(a, y), {"note": "text", "value": a}), has_aux=True)(x)
    same(derivative, transform(lambda a: function(a, y))(x))
    assert aux["note"] == "text"
    torch.testing.assert_close(aux["value"], x)
    if name != "grad":
        same(transform(function, chunk_size=2)(x, y), transform(function)(x, y))


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(("case", "argnums"), grid())
def test_chunks_are_the_same_jacobian(case: Case, argnums: Any, size: int) -> None:
    args = case.args()
    theirs = torch.func.jacrev(case.function, argnums=argnums)(*args)
    for name in ("jacrev", "jacobian"):
        same(getattr(chainrule, name)(case.function, argnums=argnums, chunk_size=size)(*args), theirs)
    whole = chainrule.jacfwd(case.function, argnums=argnums)(*args)  # compared with torch.func above
    same(chainrule.jacfwd(case.function, argnums=argnums, chunk_size=size)(*args), whole)


@pytest.mark.parametrize("name", ["jacrev", "jacfwd", "jacobian", "hessian"])
def test_chunks_in_nests_and_in_torchs_graph(name: str) -> None:
    weight = r(4, 5).requires_grad_()
    x, batch = r(5).requires_grad_(), r(3, 5)

    def function(a: torch.Tensor) -> torch.Tensor:
        return torch.tanh(weight @ a) * a.sum()

    chunked = getattr(chainrule, name)(function, chunk_size=3)
    theirs = torch.func.hessian(function) if name == "hessian" else torch.func.jacrev(function)
    same(chainrule.vmap(chunked)(batch), torch.func.vmap(theirs)(batch))
    for outer in ("jacrev", "jacfwd", "jacobian"):
        same(getattr(chainrule, outer)(chunked, chunk_size=4)(x), torch.func.jacrev(theirs)(x))
    same(
        torch.autograd.grad((chunked(x) ** 3).sum(), (x, weight)),
        torch.autograd.grad((theirs(x) ** 3).sum(), (x, weight)),
    )


class Largest(TorchDispatchMode):
    """The size of the largest tensor that an op allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func._schema.returns[0].alias_info and isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("name", ["jacrev", "jacfwd", "jacobian"])
def test_chunks_bound_the_intermediate_results_with_one_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wide, few = 96, 5
    inner, outer = r(wide, wide), r(wide, wide)
    # Few rows to keep, or few columns: what is large is the Jacobian between, and it must not be.
    first, last = (r(wide, wide), r(few, wide)) if name != "jacfwd" else (r(wide, few), r(wide, wide))

    def function(x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(inner @ torch.tanh(outer @ (first @ x)))
        return last @ torch.sin(hidden)

    x = r(first.shape[1])
    expected = torch.func.jacrev(function)(x)
    planned = []
    monkeypatch.setattr(planning, "plan", lambda *args, **kwargs: planned.append(1) or plan(*args, **kwargs))
    transform = getattr(chainrule, name)(function, chunk_size=2)
    for _ in range(2):
        with Largest() as largest:
            found = transform(x)
        same(found, expected)
    assert len(planned) == 1
    # The result, or a block of two rows or columns at the widest place; never wide × wide.
    assert largest.numel <= max(expected.numel(), 2 * wide)


def test_products_with_the_hessian() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return (x**3).sum() * x[0] + torch.sin(x).prod()

    x, v = r(4), r(4)
    expected = torch.func.hessian(function)(x) @ v
    torch.testing.assert_close(chainrule.hvp(function, (x,), (v,)), expected)
    torch.testing.assert_close(chainrule.vhp(function, (x,), (v,)), expected)
    both = chainrule.hvp(lambda a, b: (a**2 * b).sum(), (x, v), (v, x))
    same(both, (2 * v * v + 2 * x * x, 2 * x * v))
