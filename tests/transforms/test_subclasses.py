"""Tensor subclasses under `vmap`, and classes that run torch's ops in a way of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.func
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

import chainrule

Tensor = torch.Tensor


class Named(Tensor):
    """A subclass that is nothing more than its name."""


def wrapper_class(*, hidden: bool) -> Any:
    """A class whose elements are in a tensor that it holds."""

    class Wrapper(Tensor):
        @staticmethod
        def __new__(cls, held: Tensor) -> Any:
            made: Any = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)
            made.held = held
            return made

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*(a.held if isinstance(a, cls) else a for a in args), **(kwargs or {}))
            return cls(out) if isinstance(out, Tensor) else out

    if hidden:  # as most such classes have it
        Wrapper.__torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[method-assign, assignment]
    return Wrapper


PLAIN = torch.randn(4, 3, dtype=torch.float64)
NAMED = torch.randn(4, 3, dtype=torch.float64).as_subclass(Named)

CASES: dict[str, Callable[[Any], Tensor]] = {
    "argument": lambda m: m.vmap(lambda a: (a * 2).sum())(NAMED),
    "another dimension": lambda m: m.vmap(lambda a: (a * 2).sum(), in_dims=1)(NAMED),
    "closed over": lambda m: m.vmap(lambda a: (a * NAMED[0]).sin() + NAMED.sum())(PLAIN),
    "closed over, first": lambda m: m.vmap(lambda a: torch.outer(NAMED[0], a).exp())(PLAIN),
    "shared argument": lambda m: m.vmap(lambda a, b: a @ b.T, in_dims=(0, None))(PLAIN, NAMED),
    "gradient per sample": lambda m: m.vmap(m.grad(lambda a: (a * NAMED[0] * a).sum()))(PLAIN),
    "derivative of per sample": lambda m: m.jacrev(m.vmap(lambda a: (a * NAMED[0]).sin()))(PLAIN),
}


@pytest.mark.parametrize("name", CASES)
def test_subclasses_that_are_plain_tensors(name: str) -> None:
    found, expected = CASES[name](chainrule), CASES[name](torch.func)
    torch.testing.assert_close(found.as_subclass(Tensor), expected.as_subclass(Tensor))


def test_a_subclass_cannot_hold_a_mapped_tensor() -> None:
    with pytest.raises(RuntimeError, match="makes tensors of a subclass so"):
        chainrule.vmap(lambda a: (a.as_subclass(Named) * 2).sum())(PLAIN)
    kept: list[Tensor] = []
    chainrule.vmap(lambda a: kept.append(a) or a)(PLAIN)
    with pytest.raises(RuntimeError, match="escaped from its vmap"):
        kept[0] * 2


@pytest.mark.parametrize("hidden", [False, True])
def test_classes_with_a_dispatch_of_their_own(hidden: bool) -> None:
    held = wrapper_class(hidden=hidden)(PLAIN)
    for name, call in {
        "grad": lambda: chainrule.grad(lambda a: (a.sin() * a).sum())(held),
        "vmap": lambda: chainrule.vmap(lambda a: a.sin() * 2)(held),
        "chainrule": lambda: chainrule.grad(lambda a: (a.sin() * held).sum())(PLAIN),
    }.items():
        with pytest.raises(RuntimeError, match=f"{name}: a Wrapper runs torch's ops in a way of its own"):
            call()
    found: Any = chainrule.vmap(lambda a: a.sin() * held[0])(PLAIN)
    torch.testing.assert_close(found.held, PLAIN.sin() * PLAIN[0])


def _sine(a: Tensor) -> Tensor:
    return a.sin() * a.sum()


FAKES: dict[str, Callable[[Any], Any]] = {
    "jvp": lambda fake: chainrule.jvp(torch.sin, (fake,), (fake,)),
    "vjp": lambda fake: chainrule.vjp(_sine, fake)[1](fake),
    "jacrev": lambda fake: chainrule.jacrev(_sine)(fake),
    "jacobian": lambda fake: chainrule.jacobian(_sine)(fake),
    "hessian": lambda fake: chainrule.hessian(lambda a: _sine(a).sum())(fake),
    "grad": lambda fake: chainrule.grad(lambda a: _sine(a).sum())(fake),
    "vmap": lambda fake: chainrule.vmap(_sine)(fake),
    "vmap of a gradient": lambda fake: chainrule.vmap(chainrule.grad(lambda a: _sine(a).sum()))(fake[:, None]),
}


@pytest.mark.parametrize("name", FAKES)
def test_fake_tensors_need_their_mode(name: str) -> None:
    mode = FakeTensorMode()
    fake = mode.from_tensor(torch.randn(4))
    with pytest.raises(RuntimeError, match=f"{name.split()[0]}: a FakeTensor has no elements outside of its mode"):
        FAKES[name](fake)
    with mode:
        FAKES[name](fake)  # a plan of its own, also for the calls that follow
        assert all(isinstance(leaf, FakeTensor) for leaf in tree_leaves(FAKES[name](fake)))
    with pytest.raises(RuntimeError, match="outside of its mode"):
        FAKES[name](fake)


def test_fake_tensors_beside_real_ones() -> None:
    mode = FakeTensorMode()
    fake, real = mode.from_tensor(torch.randn(4)), torch.randn(4)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a.sin() * b).sum()

    for _ in range(2):
        chainrule.grad(product)(real, real)
    for call in (
        lambda: chainrule.grad(product)(real, fake),
        lambda: chainrule.jacobian(lambda a: a.sin() * fake)(real),
        lambda: chainrule.jacobian(lambda a: a * torch.nn.Parameter(fake))(real),
        lambda: chainrule.vmap(lambda a: a * fake)(torch.randn(3, 4)),
        lambda: chainrule.jvp(_sine, (real,), (fake,)),
        lambda: chainrule.vjp(_sine, real)[1](fake),
    ):
        with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):  # torch's own
            call()
