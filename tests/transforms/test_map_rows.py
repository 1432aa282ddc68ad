"""Rows, columns and blocks of products and sums of linear maps: what is held has as many rows as are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import chainrule
from chainrule import LinearMap, linear_map
from chainrule.execute import engine
from chainrule.execute.memory import watching
from chainrule.plan import algebra
from tests.transforms.map_kinds import randn
from tests.transforms.test_blocks import peak_bytes
from tests.transforms.test_linear_map import close

LARGE = 2000
CHOSEN = [1, 5, 7]


def large_functions() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Functions whose products have no factors that a contraction could meet without a matrix of 2000×2000 (32 MB)."""
    torch.manual_seed(0)
    n = LARGE
    p, q, index = torch.randperm(n), torch.randperm(n), torch.randint(n, (n,))
    source, target = torch.randint(n, (2 * n,)), torch.randint(n, (2 * n,))
    return {
        "permuted": lambda x: x[p].sin() + x[q],
        "gathered": lambda x: x[index] * x,
        "scattered": lambda x: torch.zeros_like(x).index_add(0, index, x * x),
        "graph": lambda x: torch.zeros_like(x).index_add(0, target, (x[source] - x[target]).tanh()),
        "running sum": lambda x: x.sin().cumsum(0),
        "running sum of permuted": lambda x: x[p].cumsum(0),
        "two running sums": lambda x: x.cumsum(0)[p].sin().cumsum(0),
        "there and back": lambda x: x.sin().cumsum(0).flip(0).cos().cumsum(0),
    }


def products(J: LinearMap) -> dict[str, LinearMap]:
    """Products of a square map, and sums and multiples of these."""
    return {
        "gram": J.gram(),
        "normal": J.normal(),
        "square": J @ J,
        "sum": J.normal() + 2 * J,
        "transposed": (J @ J.normal()).T,
    }


def of_matrix(full: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same products of a matrix."""
    normal = full.T @ full
    return {
        "gram": full @ full.T,
        "normal": normal,
        "square": full @ full,
        "sum": normal + 2 * full,
        "transposed": normal @ full.T,
    }


READ: dict[str, Callable[[LinearMap], Any]] = {
    "rows": lambda L: L.rows(CHOSEN),
    "columns": lambda L: L.columns(CHOSEN),
    "block": lambda L: L.block(CHOSEN, CHOSEN[1:]),
    "slice": lambda L: L[3:6],
}


@pytest.mark.parametrize("name", list(large_functions()))
@pytest.mark.parametrize("method", READ)
def test_rows_of_products_make_no_matrix(name: str, method: str) -> None:
    """By the plan's own account, and by the allocator's: a fraction of a matrix; and they are the rows of products with vectors."""
    x = randn(LARGE)
    J = linear_map(large_functions()[name], x)
    unit = torch.zeros(LARGE, 3, dtype=torch.float64)
    unit[[3, 4, 5] if method == "slice" else CHOSEN, range(3)] = 1
    for product, L in products(J).items():
        found = READ[method](L)
        with watching() as watch:
            READ[method](L)
        assert watch.peak <= 8 * 120 * LARGE, f"{product}: {watch.peak} bytes planned"
        held = peak_bytes(lambda: READ[method](L))  # noqa: B023
        assert held <= 8 * 150 * LARGE, f"{product}: {held} bytes allocated"
        expected = L @ unit if method == "columns" else (L.T @ unit).T
        close(found, expected[:, CHOSEN[1:]] if method == "block" else expected, LARGE**2)


def several(x: torch.Tensor, y: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {"one": x.sin() * y["a"].sum(), "two": [y["b"].cumsum(0) * x[0], y["a"]], "three": torch.ones(2, dtype=torch.float64)}


def of_several() -> tuple[LinearMap, torch.Tensor]:
    x, y = randn(4), {"a": randn(2, 3), "b": randn(3)}
    J = linear_map(several, x, y)
    found = torch.func.jacrev(several, argnums=(0, 1))(x, y)
    leaves = pytree.tree_leaves(found)
    shapes = [4, 3, 6, 2]
    rows = [torch.cat([leaf.reshape(size, -1) for leaf in leaves[3 * n : 3 * n + 3]], 1) for n, size in enumerate(shapes)]
    return J, torch.cat(rows)


@pytest.mark.parametrize("way", ["selected", "filled"])
@pytest.mark.parametrize("last", [False, True], ids=["from rows", "from columns"])
def test_every_way_on_several_leaves(way: str, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the sweeps, where the others would be chosen; an output is an input, and one depends on none."""
    taken = []

    def chosen(found: Any) -> Any:
        some = [candidate for candidate in found if candidate.name == way]
        taken.extend(some)
        return (some or found)[-1 if last else 0]

    monkeypatch.setattr(algebra, "_best", chosen)
    monkeypatch.setattr(algebra, "_WIDE", -1)
    engine.CACHE.clear()
    torch.manual_seed(1)
    J, full = of_several()
    gram, normal = full @ full.T, full.T @ full
    kinds = {
        "gram": (J.gram(), gram),
        "normal": (J.normal(), normal),
        "third": ((J @ J.normal()) * torch.tensor(2.0, dtype=torch.float64) - J, 2 * full @ normal - full),
        "transposed": ((J @ J.normal() / 2 + J).T, (full @ normal / 2 + full).T),
    }
    for L, expected in kinds.values():
        m, n = expected.shape
        for rows, columns in (([0, -1, 5, 5], [12, 3]), ([], [1]), (torch.arange(m) % 2 == 0, slice(None, None, 3)), (2, [0])):
            height = expected[rows].reshape(-1, n)
            found = pytree.tree_leaves(L.rows(rows))
            count = height.shape[0]
            close(torch.cat([leaf.reshape(count, leaf.numel() // count if count else 0) for leaf in found], 1), height[:, : n if count else 0], 200)
            width = pytree.tree_leaves(L.columns(columns))
            close(torch.cat([leaf.reshape(-1, expected[:, columns].shape[1]) for leaf in width]), expected[:, columns], 200)
            close(L.block(rows, columns), height[:, columns], 200)
            close(L[rows, :], expected[rows], 200)
    assert taken


@pytest.mark.parametrize("way", ["selected", "filled"])
def test_every_way_inside_of_other_transforms(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algebra, "_best", lambda found: ([c for c in found if c.name == way] or found)[0])
    monkeypatch.setattr(algebra, "_WIDE", -1)
    engine.CACHE.clear()
    torch.manual_seed(2)
    index = torch.tensor([3, 0, 0, 2, 4])
    x, several_x, scale = randn(5), randn(3, 5), randn(1)[0]

    def function(x: torch.Tensor) -> torch.Tensor:
        return x[index] * x.sin().cumsum(0)

    def rows(x: torch.Tensor, scale: torch.Tensor = scale) -> torch.Tensor:
        J = linear_map(function, x)
        return (scale * J.gram() + J @ J).rows([1, 4]) * x

    def expected(x: torch.Tensor, scale: torch.Tensor = scale) -> torch.Tensor:
        full = torch.func.jacrev(function)(x)
        return (scale * full @ full.T + full @ full)[[1, 4]] * x

    for _ in range(3):
        close(rows(x), expected(x), 100)
        close(chainrule.vmap(rows)(several_x), torch.func.vmap(expected)(several_x), 100)
        close(chainrule.jacobian(rows)(x), torch.func.jacrev(expected)(x), 1000)
        found = chainrule.grad(lambda scale: rows(x, scale).sum())(scale)
        close(found, torch.func.grad(lambda scale: expected(x, scale).sum())(scale), 1000)
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(rows(leaf).square().sum(), leaf)
        close(gradient, torch.func.grad(lambda x: expected(x).square().sum())(x), 1000)


def test_under_torch_compile() -> None:
    x = torch.randn(5, dtype=torch.float64)

    def read(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        J = linear_map(lambda x: x.sin() * x.roll(1), x)
        return J.rows([1, 3]), J.columns([0]), J.block([1], [2, 0]), J[1], J.gram().rows([2])

    compiled = torch.compile(read, backend="eager")
    for _ in range(2):
        for found, wanted in zip(compiled(x), read(x), strict=True):
            torch.testing.assert_close(found, wanted)
