"""Pullbacks and pushforwards that are called again and again: each call does what the first one did, whatever has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map

import chainrule
from chainrule.transforms import derivatives
from chainrule.transforms.arguments import tree_flatten as flatten
from chainrule.transforms.repeated import builder

Tensor = torch.Tensor


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def network(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.tanh(torch.tanh(x @ parameters["one"]) @ parameters["two"] + parameters["bias"])


def parameters() -> dict[str, Tensor]:
    return {"one": randn(3, 4), "two": randn(4, 2), "bias": randn(2)}


CASES: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]] = {
    "one": (lambda x: torch.tanh(x) * x, lambda: (randn(4),)),
    "two": (lambda x, y: torch.tanh(x) * y.sin(), lambda: (randn(4), randn(4))),
    "parameters": (network, lambda: (parameters(), randn(5, 3))),
    "lists": (lambda xs: {"a": [xs[0].sin(), (xs[1].exp(),)], "b": xs[0] * xs[1]}, lambda: ([randn(3), randn(3)],)),
    "scalars": (lambda x: (x.sin() * x.cos()).sum(), lambda: (randn(3, 2),)),
    "empty": (lambda x: x.sin() * x, lambda: (randn(0, 2),)),
    "twice": (lambda x: (y := x.sin() * x, y), lambda: (randn(3),)),
    "independent": (lambda x: (x.sin(), torch.ones(2, dtype=torch.float64)), lambda: (randn(3),)),
    "unused": (lambda x, y: x.sin() * 2.0, lambda: (randn(3), randn(2))),
    "itself": (lambda x: x, lambda: (randn(3),)),
}  # fmt: skip


def same(found: Any, expected: Any) -> None:
    ours, theirs = tree_flatten(found), tree_flatten(expected)
    assert ours[1] == theirs[1]
    torch.testing.assert_close(ours[0], theirs[0])


@pytest.fixture
def shortened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was found for calls to come."""
    found: list[Any] = []
    original = derivatives.repeated

    def noted(*args: Any) -> Any:
        found.append(original(*args))
        return found[-1]

    monkeypatch.setattr(derivatives, "repeated", noted)
    return found


@pytest.mark.parametrize("name", CASES)
def test_each_call_agrees_with_torch(name: str, shortened: list[Any]) -> None:
    function, make = CASES[name]
    primals = make()
    output, pull = chainrule.vjp(function, *primals)
    pulled = torch.func.vjp(function, *primals)[1]
    push = chainrule.linearize(function, *primals)[1]
    for _ in range(5):
        seeds = tree_map(torch.randn_like, output)
        same(pull(seeds), pulled(seeds))
        tangents = tree_map(torch.randn_like, primals)
        same(push(*tangents), torch.func.jvp(function, primals, tangents)[1])
    if name in ("one", "two", "parameters", "lists", "scalars"):
        assert len(shortened) == 2 and all(shortened)


def test_results_are_the_callers_own() -> None:
    _, pull = chainrule.vjp(network, parameters(), randn(5, 3))
    seed = randn(5, 2)
    expected = pull(seed)
    for _ in range(4):
        found = pull(seed)
        same(found, expected)
        tree_map(lambda leaf: leaf.zero_(), found)


def test_wrong_seeds_are_refused_in_each_call(shortened: list[Any]) -> None:
    x = randn(4)
    _, pull = chainrule.vjp(lambda x: torch.tanh(x) * x, x)
    push = chainrule.linearize(lambda x: torch.tanh(x) * x, x)[1]
    for _ in range(3):
        pull(randn(4)), push(randn(4))
    assert all(shortened)
    for wrong in (randn(5), randn(4, 1), torch.randn(4, dtype=torch.complex128), 1.0, (randn(4),)):
        with pytest.raises(RuntimeError, match=r"mismatch|structure|must be a Tensor"):
            pull(wrong)
        with pytest.raises(RuntimeError, match=r"mismatch|structure|must be a Tensor"):
            push(wrong)
    with pytest.raises(RuntimeError, match="dtype"):
        push(torch.randn(4))
    seed = torch.randn(4)
    torch.testing.assert_close(pull(seed)[0], pull(seed.double())[0])
    assert pull(seed)[0].dtype is torch.float64


def test_modes_of_autograd_may_change(shortened: list[Any]) -> None:
    weight, x = randn(4, 4).requires_grad_(), randn(4)
    function = lambda x: torch.tanh(weight @ x)  # noqa: E731
    _, pull = chainrule.vjp(function, x)
    push = chainrule.linearize(function, x)[1]
    reference = lambda weight, seed: torch.func.vjp(lambda x: torch.tanh(weight @ x), x)[1](seed)[0].square().sum()  # noqa: E731
    for _ in range(4):
        seed = randn(4)
        found, pushed = pull(seed)[0], push(seed)
        assert found.requires_grad and pushed.requires_grad
        (gradient,) = torch.autograd.grad(found.square().sum(), weight, retain_graph=True)
        torch.testing.assert_close(gradient, torch.func.grad(reference)(weight.detach(), seed))
        with torch.no_grad():
            pushed_before = pushed.detach()
            for linear in (pull, push):
                (without,) = tree_flatten(linear(seed))[0]
                assert not without.requires_grad
            torch.testing.assert_close(without, pushed_before)
    assert any(shortened)


def test_seeds_may_require_grad() -> None:
    x = randn(4)
    _, pull = chainrule.vjp(lambda x: torch.tanh(x) * x, x)
    for _ in range(5):
        seed = randn(4).requires_grad_()
        (gradient,) = torch.autograd.grad(pull(seed)[0].sum(), seed)
        torch.testing.assert_close(gradient, (1 - torch.tanh(x) ** 2) * x + torch.tanh(x))


def test_inputs_that_come_to_require_grad_have_a_graph() -> None:
    x = randn(4)
    _, pull = chainrule.vjp(lambda x: torch.tanh(x) * 2.0, x)
    for _ in range(4):
        assert not pull(randn(4))[0].requires_grad
    x.requires_grad_()
    assert pull(randn(4))[0].requires_grad


def test_transforms_around_see_each_call() -> None:
    x = randn(4)
    function = lambda x: torch.tanh(x) * x  # noqa: E731
    _, pull = chainrule.vjp(function, x)
    push = chainrule.linearize(function, x)[1]
    slope = torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]
    for _ in range(4):
        seed, seeds = randn(4), randn(3, 4)
        torch.testing.assert_close(pull(seed)[0], slope * seed)
        torch.testing.assert_close(push(seed), slope * seed)
        torch.testing.assert_close(chainrule.vmap(lambda s: pull(s)[0])(seeds), slope * seeds)
        torch.testing.assert_close(chainrule.vmap(push)(seeds), slope * seeds)
        torch.testing.assert_close(chainrule.grad(lambda s: pull(s)[0].square().sum())(seed), 2 * slope**2 * seed)
        torch.testing.assert_close(chainrule.jacrev(push)(seed), slope.diag())


def test_accounts_and_compiled_functions_see_each_call() -> None:
    x = randn(4)
    _, pull = chainrule.vjp(lambda x: torch.tanh(x) * x, x)
    for _ in range(4):
        pull(randn(4))
    assert "pull" in str(chainrule.explain(lambda s: pull(s)[0])(randn(4)))
    compiled = chainrule.compile(lambda s: pull(s)[0])
    for _ in range(4):
        seed = randn(4)
        torch.testing.assert_close(compiled(seed), pull(seed)[0])


@pytest.mark.parametrize("tree", [1, (1, 2), [1, [2, 3]], {"a": 1, "b": (2, {"c": 3}, [])}, ({"a": 1, "b": 2},), (None, 1)])
def test_trees_are_put_together(tree: Any) -> None:
    leaves, spec = flatten(tree)
    assert builder(spec)(leaves) == tree
    assert builder(spec)(tuple(leaves)) == tree
