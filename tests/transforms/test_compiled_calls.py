"""Calls of compiled functions, from the third one on: one function compares the arguments, replays, and builds the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

import chainrule
from chainrule.execute.reuse import SMALLEST, written_over
from chainrule.transforms.compile import _Compiled
from tests.transforms.test_compile import CASES, energy, field, randn, same

Tensor = torch.Tensor

#: Rows of enough float64 numbers for results to be written over operands.
N = 4 * SMALLEST // 8 // 64


def graph(compiled: _Compiled, *args: Any) -> Any:
    found = compiled.held(*args)
    assert found is not None
    return found


def short(compiled: _Compiled, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    """The result of the first of the functions that takes the arguments; NotImplemented if none does."""
    for call in compiled.calls:
        found = call(args, kwargs or {})
        if found is not NotImplemented:
            return found
    return NotImplemented


def warm(function: Callable[..., Any], *args: Any, **kwargs: Any) -> _Compiled:
    compiled = _Compiled(function, "replay")
    for _ in range(2):
        compiled(args, kwargs)
    assert len(compiled.calls) == 1
    return compiled


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_function_itself(name: str, dtype: torch.dtype) -> None:
    function, inputs = CASES[name]

    def fresh() -> tuple[Any, ...]:
        return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and mixed else t, inputs())

    mixed = name in ("pytrees", "argnums", "scalar", "empty", "diagonal", "half open")  # the others close over float64
    compiled = warm(function, *fresh())
    for _ in range(3):
        args = fresh()
        kept = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, args)
        found = short(compiled, args)
        assert found is not NotImplemented
        same(found, function(*args))
        for one, other in zip(tree_leaves(args), tree_leaves(kept), strict=True):
            assert torch.equal(one, other)


LARGE: dict[str, Callable[[Tensor], Any]] = {
    "chain": lambda x: (x.sin().exp() * x.cos()).square().add(1.0).sqrt(),
    "read twice": lambda x: (y := torch.relu(x)) * y.sin() + y,
    "views": lambda x: (x.sin().T.reshape(-1, N).exp() + 1.0, x.cos().reshape(-1)),
    "views of arguments": lambda x: (x.T, x.reshape(-1) * 2.0, x[: N // 2].exp()),
    "results that share memory": lambda x: (y := x.exp(), y.T, y[1:], y * 2.0),
    "an operand that is a result": lambda x: (y := x.exp(), y * 2.0, y.neg()),
    "in place": lambda x: x.exp().mul_(2.0).add_(x).sin() * 3.0,
    "in place through a view": lambda x: ((y := x.exp()), y[0].zero_(), y * 2.0 + y.sin())[2],
    "copied into zeros": lambda x: (z := torch.zeros(64, N, dtype=x.dtype), z.T.copy_(x.sin()), z.cos() * z)[2],
    "split": lambda x: sum(part.exp() * 2.0 for part in x.exp().split(N // 2)),
    "unbound": lambda x: torch.stack([p.sin() + 1.0 for p in x.exp().reshape(2, -1, 64).unbind(0)]),
    "slices": lambda x: (y := x.exp())[1:] - y[:-1] * y[1:].square(),
    "transposed operands": lambda x: (x.exp().T * 2.0 + x.sin().T).exp(),
    "scattered": lambda x: x.exp().scatter_add(0, torch.arange(N).flip(0)[:, None].expand(N, 64), x.sin()),
    "jacobian": lambda x: chainrule.vmap(chainrule.jacobian(lambda r: torch.tanh(r[:8] * r[8:16]).square()))(x),
    "gradient": chainrule.grad(lambda x: (torch.relu(x @ x[:64].T).sin() * torch.softmax(x, 1)).square().sum()),
    "hvp": lambda x: chainrule.hvp(lambda y: (y.sin() * y.exp()).sum(), (x,), (x,)),
    "layers": chainrule.grad(lambda x: F.gelu(F.layer_norm(x, (64,))).square().sum()),
    "powers": lambda x: (x.exp() ** 3 + x.exp().log() ** 2).abs().erf().expm1().log1p(),
    "normalised": lambda x: F.log_softmax(F.linear(x, x[:64]), 1) * 2.0 - 1.0,
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_large_results(name: str) -> None:
    """What is written over is nobody's: results stay as they were, arguments too, and layouts may be others in each call."""
    function = LARGE[name]
    compiled = chainrule.compile(function)
    layouts: list[Callable[[Tensor], Tensor]] = [lambda t: t, lambda t: t, lambda t: t, lambda t: t.T.contiguous().T,
                                                 lambda t: t.T.contiguous().T, lambda t: torch.stack([t, t], 1)[:, 0]]  # fmt: skip
    earlier: list[tuple[Any, Any]] = []
    for layout in layouts:
        x = layout(torch.randn(N, 64, dtype=torch.float64))
        kept, found = x.clone(), compiled(x)
        # The same kernels on other layouts: sums of at most 64 * N numbers in another order.
        for one, other in zip(tree_leaves(found), tree_leaves(function(x)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
        assert torch.equal(x, kept)
        earlier.append((found, tree_map(torch.clone, found)))
    for found, copy in earlier:
        same(found, copy)


def test_results_are_written_over_dead_operands_only_without_autograd() -> None:
    compiled = warm(LARGE["chain"], torch.randn(N, 64))
    x = torch.randn(N, 64)
    calls = graph(compiled, x).run.instructions
    assert [written_over(i) is not None for i in calls].count(True) == len(calls) - 2  # all but the two that read the argument
    y = torch.randn(N, 64, requires_grad=True)
    joined = warm(LARGE["chain"], y)
    assert not any(written_over(i) is not None for i in graph(joined, y).run.instructions)
    (found,) = torch.autograd.grad(joined((y,), {}).sum(), y)
    (wanted,) = torch.autograd.grad(LARGE["chain"](y).sum(), y)
    torch.testing.assert_close(found, wanted)


def test_calls_per_plan() -> None:
    weight, bias = torch.randn(16, 16), torch.randn(16)
    counts = {}
    for name, function, x in (
        ("jacobian", chainrule.jacobian(lambda x: F.linear(x, weight, bias).tanh()), torch.randn(16)),
        ("per sample", chainrule.vmap(chainrule.jacobian(lambda x: F.linear(x, weight, bias).tanh())), torch.randn(8, 16)),
        ("hvp", lambda x: chainrule.jvp(chainrule.grad(lambda y: y.sin().sum()), (x,), (x,))[1], torch.randn(16)),
    ):
        counts[name] = len(graph(warm(function, x), x).run.instructions)
    # linear, tanh, 1 - y * y, its rows, the product; sin, its negative, the product.
    assert counts == {"jacobian": 5, "per sample": 5, "hvp": 3}


def test_other_arguments_are_left_to_the_signature() -> None:
    x = randn(3, 4)
    compiled = warm(chainrule.jacobian(torch.sin), x)
    assert short(compiled, (randn(3, 4),)) is not NotImplemented
    others = [randn(4, 3), randn(4, 3).T, x.float(), randn(3, 4).requires_grad_(), randn(6, 4)[::2], randn(3, 4)[None], torch.conj(x + 0j),
              x.to_sparse(), 1.0, [x], (x,), {"x": x}, None]  # fmt: skip
    for other in others:
        assert short(compiled, (other,)) is NotImplemented
    assert short(compiled, (x, x)) is NotImplemented
    assert short(compiled, (x,), {"y": x}) is NotImplemented
    for other in others[:6]:
        for _ in range(3):
            same(compiled((other,), {}), chainrule.jacobian(torch.sin)(other))


def test_torch_in_another_state_is_left_to_the_signature() -> None:
    x = randn(3)
    compiled = warm(lambda x: x * torch.ones(()), x)
    states = [torch.no_grad(), torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"), torch.device("cpu"),
              torch.utils._python_dispatch.TorchDispatchMode(), torch.overrides.BaseTorchFunctionMode()]  # fmt: skip
    for state in states:
        with state:
            assert short(compiled, (x,)) is NotImplemented
    torch.set_default_dtype(torch.float64)
    try:
        assert short(compiled, (x,)) is NotImplemented
    finally:
        torch.set_default_dtype(torch.float32)
    assert short(compiled, (x,)) is not NotImplemented
    assert chainrule.explain(compiled.function)(x) is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_requires_grad_is_seen_without_grad_mode(mode: Callable[[], Any]) -> None:
    compiled = _Compiled(lambda x: x * 2 if x.requires_grad else x * 3, "replay")
    plain, tracked = torch.ones(2), torch.ones(2, requires_grad=True)
    for _ in range(4):
        with mode():
            assert compiled((plain,), {}).tolist() == [3, 3]
            assert compiled((tracked,), {}).tolist() == [2, 2]
            assert short(compiled, (tracked,)) is NotImplemented or short(compiled, (tracked,)).tolist() == [2, 2]
            assert short(compiled, (plain,)) is NotImplemented or short(compiled, (plain,)).tolist() == [3, 3]


@pytest.mark.parametrize("size", [4, N])
def test_tangents_of_torch_are_carried(size: int) -> None:
    x = torch.randn(size, 64, dtype=torch.float64)
    compiled = warm(LARGE["chain"], x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x.cos())
        for _ in range(2):
            found, wanted = (forward_ad.unpack_dual(f) for f in (compiled((dual,), {}), LARGE["chain"](dual)))
            torch.testing.assert_close(found.primal, wanted.primal)
            torch.testing.assert_close(found.tangent, wanted.tangent)
    assert short(compiled, (x,)) is not NotImplemented


def test_closed_over_tensors() -> None:
    weight = randn(4, 4)
    model = torch.nn.Linear(4, 4).double()

    def function(x: Tensor) -> Tensor:
        return chainrule.jacobian(lambda y: torch.tanh(model(y) @ weight))(x)

    x = randn(4)
    compiled = warm(function, x)
    with torch.no_grad():
        weight.mul_(2)  # in place: seen by the next call
        model.weight.add_(1)
    same(short(compiled, (x,)), function(x))
    weight = randn(4, 4)  # replaced: recorded anew
    assert short(compiled, (x,)) is NotImplemented
    for _ in range(3):
        same(compiled((x,), {}), function(x))
    model.weight.data = model.weight.data.T
    assert short(compiled, (x,)) is NotImplemented
    same(compiled((x,), {}), function(x))
    model.bias.requires_grad_(False)
    assert short(compiled, (x,)) is NotImplemented
    same(compiled((x,), {}), function(x))


def test_structures_and_static_values() -> None:
    def function(tree: Any, power: Any = 2, *, names: Any = ("a",)) -> Any:
        total = tree["x"] ** power + sum(tree["rest"])
        return {"total": total, "names": names, "power": power, "pair": (total[0], [tree["x"]])}

    def tree() -> Any:
        return {"x": randn(3), "rest": [randn(3), (randn(3)).clone()]}

    compiled = warm(function, tree(), 3, names=("b", None))
    given = tree()
    found = short(compiled, (given, 3), {"names": ("b", None)})
    same(found, function(given, 3, names=("b", None)))
    assert found["pair"][1][0] is given["x"]
    assert tree_flatten(found)[1] == tree_flatten(function(given, 3, names=("b", None)))[1]
    for args, kwargs in (
        ((given, 3.0), {"names": ("b", None)}), ((given, True), {"names": ("b", None)}), ((given, 3), {"names": ["b", None]}),
        ((given, 3), {"names": ("b", 0)}), ((given, 3), {}), ((given,), {"names": ("b", None)}),
        (({"rest": given["rest"], "x": given["x"]}, 3), {"names": ("b", None)}), (({**given, "y": 1}, 3), {"names": ("b", None)}),
        (({"x": given["x"], "rest": [given["x"], given["x"]]}, 3), {"names": ("b", None)}),
    ):  # fmt: skip
        assert short(compiled, args, kwargs) is NotImplemented
    zero = warm(lambda x, s: torch.copysign(x, torch.tensor(s)), torch.ones(2), 0.0)
    assert short(zero, (torch.ones(2), -0.0)) is NotImplemented
    assert short(zero, (torch.ones(2), 0.0)).tolist() == [1, 1]


def test_results_are_never_handed_out_twice() -> None:
    function = chainrule.jacobian(field)
    compiled = warm(function, randn(4))
    inputs = [randn(4) for _ in range(5)]
    found = [short(compiled, (x,)) for x in inputs]
    for x, result in zip(inputs, found, strict=True):
        same(result, function(x))
    assert len({result.data_ptr() for result in found}) == len(found)
    found[0].zero_()
    same(short(compiled, (inputs[1],)), function(inputs[1]))


def test_errors_are_those_of_torch_and_leave_nothing_behind() -> None:
    def function(x: Tensor, index: Tensor) -> Tensor:
        return x.exp().index_select(0, index)

    compiled = warm(function, torch.ones(3), torch.tensor([0, 1]))
    with pytest.raises((IndexError, RuntimeError)):
        short(compiled, (torch.ones(3), torch.tensor([0, 9])))
    same(short(compiled, (torch.ones(3), torch.tensor([2, 1]))), function(torch.ones(3), torch.tensor([2, 1])))


def test_they_are_counted_bounded_and_cleared() -> None:
    compiled = _Compiled(chainrule.grad(energy_of_any), "replay")
    for size in range(2, 14):
        for _ in range(3):
            compiled.function(torch.ones(size))
            compiled((torch.ones(size),), {})
    assert len(compiled.calls) == 8
    before = compiled.cache_info()
    assert short(compiled, (torch.ones(13),)) is not NotImplemented
    assert compiled.cache_info().hits == before.hits + 1
    for _ in range(5):  # none is made for one signature again and again
        compiled((torch.ones(2),), {})
    assert len(compiled.calls) == 8
    compiled.cache_clear()
    assert compiled.calls == () and short(compiled, (torch.ones(3),)) is NotImplemented


def energy_of_any(x: Tensor) -> Tensor:
    return (x.sin() * x).sum()


def test_long_programs_are_called() -> None:
    def function(x: Tensor) -> Tensor:
        for _ in range(70):
            x = torch.sin(x) * 2.0
        return x

    x = randn(3)
    compiled = warm(function, x)
    assert "found" in compiled.calls[0].__code__.co_varnames
    same(short(compiled, (x,)), function(x))


@pytest.mark.parametrize("name", ["jacrev", "vmap hessian", "pytrees"])
def test_without_torch_guards(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has no such guards there are no such functions, and the results are the same."""
    monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")  # type: ignore[attr-defined]
    function, inputs = CASES[name]
    compiled = _Compiled(function, "replay")
    for _ in range(3):
        args = inputs()
        same(compiled(args, {}), function(*args))
    assert not compiled.calls
    assert energy(randn(4)).dim() == 0
