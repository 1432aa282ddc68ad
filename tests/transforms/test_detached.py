"""What cuts a derivative inside nests: ``data`` and ``detach_`` for the innermost transform only, ``detach`` for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.func
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import chainrule

Tensor = torch.Tensor


def plain(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x * 1


CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "data": lambda x: x.data,
    "data of a result": lambda x: (x * 1).data,
    "data of a view": lambda x: x[:].data,
    "copy of data": lambda x: x.data.clone(),
    "detach": lambda x: x.detach(),
    "detach_": lambda x: (x * 1).detach_(),
    "no_grad": plain,
}

NESTS: dict[str, Callable[[Any, Any], Callable[[Tensor], Any]]] = {
    "grad": lambda m, f: m.grad(f),
    "tangent": lambda m, f: lambda x: m.jvp(f, (x,), (x,))[1],
    "reverse over reverse": lambda m, f: m.jacrev(m.grad(f)),
    "forward over reverse": lambda m, f: m.jacfwd(m.grad(f)),
    "reverse over forward": lambda m, f: m.jacrev(m.jacfwd(f)),
    "through functions": lambda m, f: m.grad(lambda x: m.grad(f)(x).sum()),
    "hessian": lambda m, f: m.hessian(f),
    "third order": lambda m, f: m.jacfwd(m.jacrev(m.grad(f))),
    "tangent of the gradient": lambda m, f: lambda x: m.jvp(m.grad(f), (x,), (x,))[1],
    "per sample": lambda m, f: lambda x: m.vmap(m.grad(f))(torch.stack([x, x.cos()])),
    "derivative of per sample": lambda m, f: lambda x: m.jacrev(m.vmap(m.grad(f)))(torch.stack([x, x.cos()])),
}


@pytest.mark.parametrize("nest", NESTS)
@pytest.mark.parametrize("cut", CUTS)
def test_as_in_torch_func(cut: str, nest: str) -> None:
    def function(x: Tensor) -> Tensor:
        return (x**3 * CUTS[cut](x) ** 2 * x.sum()).sum()

    for _ in range(2):
        x = torch.randn(3, dtype=torch.float64)
        torch.testing.assert_close(NESTS[nest](chainrule, function)(x), NESTS[nest](torch.func, function)(x))


@pytest.mark.parametrize("name", ["laplacian", "hessian_diagonal"])
def test_contractions_count_as_the_hessian(name: str) -> None:
    def function(x: Tensor) -> Tensor:
        return (x**3 * x.data**2).sum()

    x = torch.randn(3, dtype=torch.float64)
    diagonal = torch.func.hessian(function)(x).diagonal()
    expected = diagonal.sum() if name == "laplacian" else diagonal
    torch.testing.assert_close(getattr(chainrule, name)(function)(x), expected)
    torch.testing.assert_close(chainrule.hessian(function, layout="operator")(x).dense(), torch.func.hessian(function)(x))
    torch.testing.assert_close(chainrule.hessian(function, layout="sparse_coo")(x).to_dense(), torch.func.hessian(function)(x))


def test_writes_through_data_change_the_value_and_not_the_derivative() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2
        y.data.mul_(3)
        return (y**2).sum()

    x = torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(chainrule.grad(function)(x), 2 * (6 * x) * 2)


class Untouched(TorchFunctionMode):
    """A user's function mode that leaves calls as they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Passing(TorchDispatchMode):
    """A user's dispatch mode that leaves calls as they are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def written_through(x: Tensor) -> Tensor:
    y = x * 1
    y.data.mul_(2)
    return (y**2).sum()


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "data": lambda x: (x.data * x**2).sum(),
    "copy of data of a result": lambda x: ((x**2).data.clone() * x**2).sum(),
    "data, then linear": lambda x: ((x**2).data * x).sum(),
    "written through": written_through,
    "no_grad": lambda x: (plain(x) ** 2 * x**2).sum(),
}

SECOND: dict[str, Callable[[Any, Any], Callable[[Tensor], Tensor]]] = {
    "hessian": lambda m, f: m.hessian(f),
    "reverse over reverse": lambda m, f: m.jacrev(m.grad(f)),
    "forward over reverse": lambda m, f: m.jacfwd(m.grad(f)),
    "mapped": lambda m, f: lambda x: m.vmap(m.hessian(f))(torch.stack([x, x.cos()])),
    "tangent": lambda m, f: lambda x: m.jvp(m.grad(f), (x,), (x,))[1],
}


@pytest.mark.parametrize("nest", SECOND)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_as_plain(name: str, nest: str) -> None:
    x = torch.randn(3, dtype=torch.float64)
    expected = SECOND[nest](torch.func, FUNCTIONS[name])(x)
    ours = SECOND[nest](chainrule, FUNCTIONS[name])
    for call in (chainrule.compile(ours), ours, chainrule.compile(ours)):
        for _ in range(2):
            torch.testing.assert_close(call(x), expected)


@pytest.mark.parametrize("mode", [Untouched, Passing, lambda: torch.device("cpu")])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_data_under_modes_of_the_user(name: str, mode: Any) -> None:
    x = torch.randn(3, dtype=torch.float64)
    expected = torch.func.hessian(FUNCTIONS[name])(x)
    with mode():
        torch.testing.assert_close(chainrule.hessian(FUNCTIONS[name])(x), expected)
        reverse = torch.func.jacrev(torch.func.grad(FUNCTIONS[name]))(x)
        torch.testing.assert_close(chainrule.jacrev(chainrule.grad(FUNCTIONS[name]))(x), reverse)
        torch.testing.assert_close(chainrule.laplacian(FUNCTIONS[name])(x), expected.trace())


@pytest.mark.parametrize("mode", [Untouched, Passing])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_data_under_modes_inside(name: str, mode: Any) -> None:
    def function(x: Tensor) -> Tensor:
        with mode():
            return FUNCTIONS[name](x)

    x = torch.randn(3, dtype=torch.float64)
    expected = torch.func.hessian(FUNCTIONS[name])(x)
    for call in (chainrule.hessian(function), chainrule.jacfwd(chainrule.grad(function))):
        torch.testing.assert_close(call(x), expected)
        with mode():
            torch.testing.assert_close(call(x), expected)


@pytest.mark.parametrize("transform", [chainrule.laplacian, chainrule.hessian_diagonal, chainrule.hessian])
@pytest.mark.parametrize("compiled", [False, True])
def test_runs_that_look_alike_have_plans_of_their_own(transform: Any, compiled: bool) -> None:
    """Constants of all levels first, then of the innermost one only: the steps that are recorded are the same."""

    def constant(x: Tensor) -> Tensor:
        return ((x**2).detach() * x).sum()

    x = torch.randn(5, dtype=torch.float64)
    first = chainrule.compile(transform(constant)) if compiled else transform(constant)
    assert not first(x).any()
    function = FUNCTIONS["data, then linear"]
    whole = torch.func.hessian(function)(x)
    expected = {"laplacian": whole.trace(), "hessian_diagonal": whole.diagonal(), "hessian": whole}[transform.__name__]
    for _ in range(2):
        torch.testing.assert_close(transform(function)(x), expected)
    assert not transform(constant)(x).any()


@pytest.mark.parametrize("outer", ["grad", "jvp"])
@pytest.mark.parametrize("name", ["grad", "jvp", "jacfwd", "mapped", "mapped twice"])
def test_data_of_what_an_inner_function_makes_of_outer_variables(name: str, outer: str) -> None:
    """It belongs to the inner transform, which alone takes it for constant; the outer variable itself is one of the outer one."""

    def run(m: Any, cut: Any) -> Callable[[Tensor], Tensor]:
        def function(x: Tensor) -> Tensor:
            def inner(y: Tensor) -> Tensor:
                return y * cut(x) * x

            if name == "grad":
                return m.grad(lambda y: inner(y).sum())(x)
            if name == "jvp":
                return m.jvp(inner, (x,), (x.cos(),))[1]
            if name == "jacfwd":
                return m.jacfwd(inner)(x).sum(0)
            if name == "mapped":
                return m.vmap(m.grad(lambda y: inner(y).sum()))(torch.stack([x, x * x])).sum(0)
            rows = torch.stack([x, x * x])
            return m.vmap(lambda row: m.grad(lambda y: (y * cut(row) * x).sum())(x))(rows).sum(0)

        if outer == "grad":
            return m.grad(lambda x: function(x).sum())
        return lambda x: m.jvp(function, (x,), (x.sin(),))[1]

    x = torch.randn(3, dtype=torch.float64)
    cuts: list[Callable[[Tensor], Tensor]] = [lambda v: (v * 2).data, lambda v: (v * 2)[:].data * v]
    if name != "mapped twice":
        cuts.append(lambda v: v.data)
    for cut in cuts:
        expected = run(torch.func, cut)(x)
        for _ in range(2):
            torch.testing.assert_close(run(chainrule, cut)(x), expected)


def test_data_of_mapped_tensors_is_refused_where_it_would_cut() -> None:
    rows = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(chainrule.vmap(lambda row: row.data * 2)(rows), 2 * rows)
    for function in (
        lambda rows: chainrule.vmap(lambda row: row * row.data)(rows).sum(),
        lambda rows: chainrule.vmap(lambda row: row * (row * 2).data)(rows).sum(),
        lambda rows: chainrule.vmap(lambda row: chainrule.grad(lambda y: (y * row.data).sum())(row))(rows).sum(),
    ):
        with pytest.raises(RuntimeError, match="accessing `data` under vmap"):
            chainrule.grad(function)(rows)
