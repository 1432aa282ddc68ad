"""The calls of a transform that nothing is around, which compiled handlers do in one piece: values, errors, graphs, modes, memory."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.func

import chainrule
from chainrule.dispatch import KNOWS_STATE
from chainrule.execute.engine import CACHE
from chainrule.transforms import routes

Tensor = torch.Tensor


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def compare(found: Any, wanted: Any) -> None:
    # Float64 and fewer than a hundred operations on numbers near one: far below 1e-11 of rounding.
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def field(x: Tensor) -> Tensor:
    return (x.sin() * x.sum()).cumsum(0)


def energy(x: Tensor) -> Tensor:
    return field(x).square().sum()


def pulled(m: Any) -> Callable[[Tensor], Any]:
    return lambda x: m.vjp(m.grad(energy), x)[1](x.cos())


def pushed(m: Any) -> Callable[[Tensor], Any]:
    return lambda x: m.jvp(m.grad(energy), (x,), (x.cos(),))


#: Transforms in a library.
TRANSFORMS: dict[str, Callable[[Any], Callable[[Tensor], Any]]] = {
    "jacrev": lambda m: m.jacrev(field),
    "jacfwd": lambda m: m.jacfwd(field),
    "grad": lambda m: m.grad(energy),
    "grad_and_value": lambda m: m.grad_and_value(energy),
    "hessian": lambda m: m.hessian(energy),
    "three levels": lambda m: m.jacfwd(m.jacrev(m.grad(energy))),
    "jvp": lambda m: lambda x: m.jvp(field, (x,), (x.cos(),)),
    "vjp of grad": pulled,
    "jvp of grad": pushed,
    "vmap of jacrev": lambda m: lambda x: m.vmap(m.jacrev(field))(torch.stack([x, -x])),
    "vmap of hessian": lambda m: lambda x: m.vmap(m.hessian(energy))(torch.stack([x, -x])),
    "vmap of grad_and_value": lambda m: lambda x: m.vmap(m.grad_and_value(energy))(torch.stack([x, -x])),
    "vmap of a view": lambda m: lambda x: m.vmap(m.grad(energy))(torch.stack([x, x, -x])[1:]),
}


def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of a route found its result."""
    found: list[bool] = []

    def noting(call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            out = call(*args)
            found.append(out is not NotImplemented and (out[0] is True or (len(out) == 6 and out[4] is not None)))
            return out

        return noted

    for name in ("call_alone", "call_mapped"):
        monkeypatch.setattr(routes, name, noting(getattr(routes, name)))
    return found


@pytest.mark.parametrize("name", TRANSFORMS)
def test_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    CACHE.clear()  # a full one may drop a plan between two calls
    found = counted(monkeypatch)
    ours, theirs = (TRANSFORMS[name](m) for m in (chainrule, torch.func))
    for size in (3, 1, 3):
        for _ in range(4):
            x = real(size)
            compare(ours(x), theirs(x))
            with torch.no_grad():
                compare(ours(x), theirs(x))
            assert torch.is_grad_enabled()
    if name != "vmap of grad_and_value":  # the value is one of the run, which Python puts into the result
        assert any(found[-1:]) is KNOWS_STATE


@pytest.mark.parametrize("name", TRANSFORMS)
def test_arguments_with_graphs(name: str) -> None:
    ours, theirs = (TRANSFORMS[name](m) for m in (chainrule, torch.func))
    for _ in range(4):
        ours(real(3))
        x = real(3).requires_grad_()
        found = []
        for made in (ours, theirs):
            leaves = torch.utils._pytree.tree_leaves(made(x))
            found.append(torch.autograd.grad(torch.stack([leaf.sin().sum() for leaf in leaves if leaf.requires_grad]).sum(), x)[0])
        compare(*found)


@pytest.mark.parametrize("mapped", [False, True])
def test_errors_leave_nothing_behind(mapped: bool) -> None:
    def fails(x: Tensor) -> Tensor:
        x.sin()
        raise ValueError("of the function")

    transform = chainrule.vmap(chainrule.jacrev(fails)) if mapped else chainrule.jacrev(fails)
    for grad_enabled in (True, False):
        for _ in range(2):
            with torch.set_grad_enabled(grad_enabled), pytest.raises(ValueError, match="of the function"):
                transform(real(2, 3))
    assert torch._C._len_torch_dispatch_stack() == torch._C._len_torch_function_stack() == 0
    assert torch.is_grad_enabled()
    assert torch.ones(2, requires_grad=True).sin().grad_fn is not None


#: Transforms with seeds, of a function of one tensor and a seed.
SEEDED: dict[str, Callable[[Any, Callable[..., Any], Tensor, Tensor], Any]] = {
    "jvp": lambda m, f, x, t: m.jvp(f, (x,), (t,)),
    "jvp of grad": lambda m, f, x, t: m.jvp(m.grad(lambda x: f(x).square().sum()), (x,), (t,)),
    "jvp of jacrev": lambda m, f, x, t: m.jvp(m.jacrev(f), (x,), (t,)),
    "vjp": lambda m, f, x, t: m.vjp(f, x)[1](t),
    "vjp of grad": lambda m, f, x, t: m.vjp(m.grad(lambda x: f(x).square().sum()), x)[1](t),
    "linearize": lambda m, f, x, t: (m.linearize(f, x)[1](t) if m is chainrule else m.jvp(f, (x,), (t,))[1]),
}


@pytest.mark.parametrize("name", SEEDED)
def test_seeds(name: str) -> None:
    # The same function with other seeds in turn: of another dtype or memory layout, with a graph, of other sizes.
    made = SEEDED[name]
    for _ in range(4):
        for size in (3, 1, 0, 3):
            x, t = real(size), real(size)
            compare(made(chainrule, field, x, t), made(torch.func, field, x, t))
            with torch.no_grad():
                compare(made(chainrule, field, x, t), made(torch.func, field, x, t))
        x, t = real(3), real(6)[::2]
        compare(made(chainrule, field, x, t), made(torch.func, field, x, t))
        if name != "linearize":  # which refuses other dtypes, as torch's does
            compare(made(chainrule, field, x, t.float()), made(chainrule, field, x, t.float().double()))
        for shape in ((2,), (3, 1), ()):
            with pytest.raises(RuntimeError, match="mismatch in shape"):
                made(chainrule, field, x, real(*shape))
        with pytest.raises(RuntimeError, match="mismatch in dtype|is complex|and the primal is"):
            made(chainrule, field, x, torch.randn(3, dtype=torch.complex128))
        gradients = []
        t = t.clone().requires_grad_()
        for m in (chainrule, torch.func):
            leaves = torch.utils._pytree.tree_leaves(made(m, field, x, t))
            total = torch.stack([leaf.sin().sum() for leaf in leaves if leaf.requires_grad]).sum()
            gradients.append(torch.autograd.grad(total, t)[0])
        compare(*gradients)


@pytest.mark.parametrize("name", SEEDED)
def test_seeds_beside_parameters(name: str) -> None:
    weight = real(3).requires_grad_()

    def layer(x: Tensor) -> Tensor:
        return (x * weight).tanh() + x.sin()

    for _ in range(4):
        x, t = real(3), real(3)
        gradients = []
        for m in (chainrule, torch.func):
            leaves = torch.utils._pytree.tree_leaves(SEEDED[name](m, layer, x, t))
            total = torch.stack([leaf.sin().sum() for leaf in leaves if leaf.requires_grad]).sum()
            gradients.append(torch.autograd.grad(total, weight)[0])
        compare(*gradients)
        with torch.no_grad():
            assert not any(leaf.requires_grad for leaf in torch.utils._pytree.tree_leaves(SEEDED[name](chainrule, layer, x, t)))


def mixed(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return (x.sin() * y).sum(0) + z.exp()


@pytest.mark.parametrize("graph", [False, True])
def test_several_arguments(graph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    CACHE.clear()
    found = counted(monkeypatch)
    for _ in range(4):
        primals = real(2, 3), real(3), real(1)
        tangents = real(2, 3), real(3), real(1)
        cotangent = real(3)
        if graph:
            primals[1].requires_grad_()
            tangents[0].requires_grad_()
        compare(*(m.jvp(mixed, primals, tangents) for m in (chainrule, torch.func)))
        compare(chainrule.linearize(mixed, *primals)[1](*tangents), torch.func.jvp(mixed, primals, tangents)[1])
        compare(*(m.vjp(mixed, *primals)[1](cotangent) for m in (chainrule, torch.func)))
        with torch.no_grad():
            compare(*(m.jvp(mixed, primals, tangents) for m in (chainrule, torch.func)))
        same = real(2, 2)
        compare(*(m.jvp(torch.matmul, (same, same), (same, same.cos())) for m in (chainrule, torch.func)))
        compare(*(m.vjp(torch.matmul, same, same)[1](same) for m in (chainrule, torch.func)))
        compare(*(m.jvp(lambda x, y: x * 2, (same, same), (same, same)) for m in (chainrule, torch.func)))
        compare(*(m.vjp(lambda x, y: x * 2, same, same)[1](same) for m in (chainrule, torch.func)))
        compare(*(m.jvp(lambda x, y: y, (same, same), (same, same.sin())) for m in (chainrule, torch.func)))
        compare(*(m.jvp(lambda x, y: (x * y, [y.sin()]), (same, same), (same, same.sin())) for m in (chainrule, torch.func)))
    for seeds in ((real(2, 3), real(3)), (real(2, 3), real(2), real(1)), ()):
        with pytest.raises(RuntimeError, match="structure|mismatch in shape"):
            chainrule.jvp(mixed, (real(2, 3), real(3), real(1)), seeds)
    assert any(found) is KNOWS_STATE


def test_functions_share_the_route_of_a_nest(monkeypatch: pytest.MonkeyPatch) -> None:
    CACHE.clear()
    found = counted(monkeypatch)
    for number in range(6):  # other functions in each call, which record the same

        def scaled(x: Tensor, number: int = number % 2) -> Tensor:
            return (x.sin() if number else x.cos()).sum()

        x, t = real(3), real(3)
        compare(*(m.jvp(m.grad(scaled), (x,), (t,)) for m in (chainrule, torch.func)))
        compare(*(m.vjp(m.grad(scaled), x)[1](t) for m in (chainrule, torch.func)))
        compare(*(m.jvp(scaled, (x,), (t,)) for m in (chainrule, torch.func)))
    assert (found[-3:] == [True] * 3) is KNOWS_STATE


def test_what_a_function_does_between_calls() -> None:
    state: dict[str, Any] = {"weight": real(3), "number": 2.0, "step": False}

    def changing(x: Tensor) -> Tensor:
        out = x * state["weight"] * state["number"]
        if state["step"]:
            with torch.no_grad():
                hidden = x.sin()
            out = out * hidden
        return out.exp()

    for made in (lambda m: m.jacrev(changing), lambda m: m.vmap(m.jacrev(changing))):
        ours, theirs = made(chainrule), made(torch.func)
        for number in (2.0, 2.0, -1.5, 0.5, 3.0, 2.0):
            for step in (False, True):
                for weight in (real(3), real(3).requires_grad_(), torch.nn.Parameter(real(3))):
                    state.update(weight=weight, number=number, step=step)
                    x = real(3, 3) * 0.1
                    found, wanted = ours(x), theirs(x)
                    compare(found, wanted)
                    assert found.requires_grad == weight.requires_grad


def test_structures_numbers_and_other_arguments() -> None:
    def several(x: Tensor, *, scale: float) -> dict[str, Any]:
        return {"a": x * scale, "b": (x.sum(), x)}

    for scale in (2.0, 3.0, 4.0, 5.0):
        x = real(3)
        compare(chainrule.jacrev(several)(x, scale=scale), torch.func.jacrev(partial(several, scale=scale))(x))
    with pytest.raises(RuntimeError, match="scalar"):
        chainrule.grad(field)(real(3))
    with pytest.raises(RuntimeError):
        chainrule.jacrev(field)(torch.ones(3, dtype=torch.int64))
    assert chainrule.jacrev(lambda x: torch.ones(2))(torch.ones(3)).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("name", ["jacrev", "hessian", "vmap of jacrev"])
def test_calls_leave_no_garbage(name: str) -> None:
    made, x = TRANSFORMS[name](chainrule), real(3)
    for _ in range(3):
        made(x)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(50):
        made(x)
    assert len(gc.get_objects()) < before + 50
    assert gc.collect() < 50


def test_threads() -> None:
    made, wrong = chainrule.vmap(chainrule.jacrev(field)), []

    def run() -> None:
        for _ in range(30):
            x = real(2, 3)
            if not torch.allclose(made(x), torch.stack([torch.autograd.functional.jacobian(field, row) for row in x])):
                wrong.append(x)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
