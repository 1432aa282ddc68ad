"""Random compositions of transforms, up to three deep, of functions of trees with integer side inputs, against torch.func.

Left out is what torch.func has wrong (torch 2.13): negative argnums in `jacfwd`; higher forward derivatives of `layer_norm`, `det` and
`solve`; see the closed forms below.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.func
from torch.utils._pytree import tree_leaves, tree_map

import chainrule

Tensor = torch.Tensor
NET = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double().requires_grad_(False)
PARAMETERS = dict(NET.named_parameters())


def network(x: Tensor) -> Tensor:
    return torch.func.functional_call(NET, PARAMETERS, (x,))


FUNCTIONS: dict[str, Callable[[Tensor, Any, Tensor], Any]] = {
    "tree": lambda a, t, s: (a * t["x"]).sin() * t["y"][0].sum() + s[0],
    "several outputs": lambda a, t, s: {"o": (a * t["x"]).exp(), "p": [t["y"][0].sum() * a[s[0] % 3]]},
    "index": lambda a, t, s: a[s] * t["x"][s.flip(0)] ** 2,
    "network": lambda a, t, s: network(a * t["x"]).sin() * t["y"][0].sum(),
    "embedding": lambda a, t, s: torch.nn.functional.embedding(s, torch.stack([a, t["x"], a * t["x"]])) ** 2,
    "integers as numbers": lambda a, t, s: a * s.to(a.dtype)[:1] + t["x"].cumsum(0) * t["y"][0].prod(),
    "scatter": lambda a, t, s: torch.zeros_like(a).scatter_add(0, s, a[:2] * t["x"][:2]) ** 2,
    "writes": lambda a, t, s: a.clone().mul_(t["x"]).index_put_((s,), t["y"][0].sum().expand(2), accumulate=True).sin(),
    "one argument": lambda a, t, s: a**3,
    "mask": lambda a, t, s: torch.where(s.sum() > 1, a * t["x"], a.exp()),
    "products": lambda a, t, s: torch.outer(a, t["x"]) @ a * t["y"][0].sum(),
}


def scalar(out: Any) -> Any:
    return sum((leaf * leaf.cos()).sum() for leaf in tree_leaves(out))


def mapped(library: Any, f: Callable[..., Any], dims: tuple[Any, ...]) -> Callable[..., Any]:
    first, x, y, side, out = dims

    def stacked(leaf: Tensor, dim: int | None) -> Tensor:
        return leaf if dim is None else torch.stack([leaf, leaf.flip(0)] if leaf.dim() else [leaf, leaf], dim)

    def call(a: Tensor, t: Any, s: Tensor) -> Any:
        tree = {"x": stacked(t["x"], x), "y": [stacked(t["y"][0], y)]}
        in_dims = (first, {"x": x, "y": [y]}, side)
        return library.vmap(f, in_dims=in_dims, out_dims=out)(stacked(a, first), tree, stacked(s, side))

    return call


def pulled(library: Any, f: Callable[..., Any], a: Tensor, t: Any, s: Tensor) -> Any:
    out, pull = library.vjp(lambda a, t: f(a, t, s), a, t)
    return out, pull(tree_map(torch.cos, out))


TRANSFORMS: dict[str, Callable[[Any, Callable[..., Any], Any, tuple[Any, ...]], Callable[..., Any]]] = {
    "jacrev": lambda m, f, where, dims: m.jacrev(f, where),
    "jacfwd": lambda m, f, where, dims: m.jacfwd(f, where),
    "hessian": lambda m, f, where, dims: m.hessian(f, where),
    "grad": lambda m, f, where, dims: m.grad(lambda *args: scalar(f(*args)), where),
    "grad_and_value": lambda m, f, where, dims: m.grad_and_value(lambda *args: scalar(f(*args)), where),
    "grad with aux": lambda m, f, where, dims: m.grad(lambda *args: (scalar(f(*args)), {"aux": args[0] * 2}), where, has_aux=True),
    "jacrev with aux": lambda m, f, where, dims: m.jacrev(lambda *args: (f(*args), {"aux": args[0] * 2}), where, has_aux=True),
    "jvp": lambda m, f, where, dims: lambda a, t, s: m.jvp(
        lambda a, t: f(a, t, s), (a, t), (a.cos(), tree_map(torch.sin, t))
    ),
    "vjp": lambda m, f, where, dims: lambda a, t, s: pulled(m, f, a, t, s),
    "vmap": lambda m, f, where, dims: mapped(m, f, dims),
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_as_torch_func(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    function = FUNCTIONS[rng.choice(list(FUNCTIONS))]
    chain = rng.sample(list(TRANSFORMS), rng.choice([1, 2, 2, 3]))
    places = [rng.choice([0, 1, (0,), (0, 1), (1, 0)]) for _ in chain]
    dims = [
        (rng.choice([0, -1, 1]), rng.choice([0, 1, None]), rng.choice([None, 0]), rng.choice([None, 0, 1]), rng.choice([0, -1]))
        for _ in chain
    ]

    def nest(library: Any) -> Callable[..., Any]:
        made: Callable[..., Any] = function
        for name, where, at in zip(chain, places, dims, strict=True):
            made = TRANSFORMS[name](library, made, where, at)
        return made

    for _ in range(2):
        a, strided, y = torch.randn(3).double(), torch.randn(3, 2).double()[:, 0], torch.randn(rng.choice([(2,), ()])).double()
        args = a, {"x": strided, "y": [y]}, torch.tensor([0, 2])
        # Sums of a few dozen products, each of relative error 1e-16 or so, and derivatives of them.
        torch.testing.assert_close(nest(chainrule)(*args), nest(torch.func)(*args), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("forward", [False, True])
def test_where_torch_func_is_wrong(forward: bool) -> None:
    """Third derivatives in closed form."""
    inner = chainrule.jacfwd if forward else chainrule.jacrev
    x = torch.tensor([[0.3]], dtype=torch.float64)

    def third(f: Callable[[Tensor], Tensor]) -> Tensor:
        return inner(inner(inner(f)))(x).reshape(())

    solved = third(lambda x: torch.linalg.solve(x + 5, torch.ones(1, dtype=x.dtype)).reshape(()))
    torch.testing.assert_close(solved, (-6 / (x + 5) ** 4).reshape(()))
    root = (x + 3).reshape(())
    torch.testing.assert_close(third(lambda x: torch.linalg.det(x + 3).sin()), -root.cos())
    row = torch.randn(2, 3, dtype=torch.float64)

    def normalised(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)

    torch.testing.assert_close(
        inner(inner(lambda x: torch.nn.functional.layer_norm(x, (3,)) * x))(row),
        torch.func.jacrev(torch.func.jacrev(lambda x: normalised(x) * x))(row),
    )
    torch.testing.assert_close(chainrule.jacfwd(lambda a, b: a**3, -2)(row[0], row), torch.diag(3 * row[0] ** 2))
