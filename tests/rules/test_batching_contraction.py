"""Contractions of mapped operands: one call with one more dimension."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

import chainrule
from chainrule.rules.batching_base import Batched
from chainrule.rules.batching_contraction import einsum

DOUBLE = torch.float64
SIZES = {"i": 2, "j": 3, "k": 4, "l": 1, "z": 0}
EQUATIONS = [
    "ij,j->i", "ij,jk->ki", "ij,kj", "ij,ij->", "i,j->ij", "ijk,kj->ik", "ij,jk,ki->i", ",i->i", "lj,jk->lk", "iz,zj->ij", "ijk->kji", "ij->",
    "ii->i", "...j,jk->...k",
]  # fmt: skip
TRANSFORMS = {
    "plain": lambda api, f, all_: f,
    "grad": lambda api, f, all_: api.grad(lambda *args: f(*args).sin().sum(), argnums=all_),
    "jacrev": lambda api, f, all_: api.jacrev(f, argnums=all_),
    "jvp": lambda api, f, all_: lambda *args: api.jvp(f, args, tuple(arg.cos() for arg in args)),
    "vjp": lambda api, f, all_: lambda *args: api.vjp(f, *args)[1](f(*args).cos()),
    "hessian": lambda api, f, all_: api.hessian(lambda *args: f(*args).sin().sum()),
}


def operands(equation, mapped):
    parts = equation.split("->")[0].split(",")
    generator = torch.Generator().manual_seed(len(equation))
    shapes = [[SIZES[letter] for letter in part.replace("...", "i")] for part in parts]
    return [
        torch.randn((*((3,) if has else ()), *shape), dtype=DOUBLE, generator=generator)
        for shape, has in zip(shapes, mapped(len(parts)), strict=True)
    ]


MAPPED = {
    "all": lambda count: [True] * count,
    "the first": lambda count: [True] + [False] * (count - 1),
    "the last": lambda count: [False] * (count - 1) + [True],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("mapped", MAPPED)
@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum(equation, mapped, transform):
    args = operands(equation, MAPPED[mapped])
    in_dims = tuple(0 if has else None for has in MAPPED[mapped](len(args)))
    everything = tuple(range(len(args)))
    own, peer = (
        api.vmap(TRANSFORMS[transform](api, lambda *leaves: torch.einsum(equation, *leaves), everything), in_dims=in_dims)
        for api in (chainrule, torch.func)
    )
    if "z" in equation and transform in ("jacrev", "hessian"):  # torch.func raises for inputs of no elements
        for leaf in pytree.tree_leaves(own(*args)):
            assert leaf.shape[0] == 3 and not leaf.any()
        return
    expected = pytree.tree_leaves(peer(*args))
    for _ in range(3):
        for one, two in zip(pytree.tree_leaves(own(*args)), expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_nested_maps_and_all_letters():
    one, two = torch.randn(2, 3, 4, 5, dtype=DOUBLE), torch.randn(3, 5, 4, dtype=DOUBLE)
    product = lambda a, b: torch.einsum("ij,ji->i", a, b)  # noqa: E731
    nested = chainrule.vmap(chainrule.vmap(product), in_dims=(0, None))(one, two)
    torch.testing.assert_close(nested, torch.einsum("xyij,yji->xyi", one, two), rtol=1e-12, atol=1e-12)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    large = torch.randn((2, *(1,) * 26), dtype=DOUBLE)
    other = torch.randn((1,) * 26, dtype=DOUBLE)
    found = chainrule.vmap(lambda a: torch.einsum(f"{letters[:26]},{letters[26:]}->", a, other))(large)
    torch.testing.assert_close(found, large.reshape(2) * other.reshape(()), rtol=1e-12, atol=1e-12)


def test_what_is_split_into_parts():
    square = Batched(torch.ones(2, 3, 3))
    func = torch.ops.aten.einsum.default
    assert einsum(func, ["ii->i", [square]], {}, 2) is NotImplemented
    assert einsum(func, ["...j->...", [square]], {}, 2) is NotImplemented
    assert einsum(func, ["ij->ji", [square]], {}, 2).value.shape == (2, 3, 3)
