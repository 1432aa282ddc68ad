"""Products with equal rows, or with a symmetric result, are computed once, and only those."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import chainrule
from chainrule.execute import products, symmetry
from chainrule.execute.products import DistinctRows, symmetric_product
from chainrule.execute.replay import Source
from chainrule.execute.symmetry import with_symmetry
from chainrule.maps.staging import Instruction, Program, Staged

SIZE, UNITS = 4, 6


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small products are rewritten, too."""
    for name, value in {"_LARGE": 1, "_BLOCKED": 1, "_WORTH": 0, "LEAST_SYMMETRIC": 2}.items():
        monkeypatch.setattr(symmetry, name, value)
    gc.collect()
    yield


def staged(build: Callable[..., Staged], *tensors: Tensor) -> tuple[list[Instruction], set[Any]]:
    """The calls of a program, rewritten where they can be, and the kinds of what is in the place of products."""
    program = Program()
    inputs = [program.input(number, tensor) for number, tensor in enumerate(tensors)]
    build(*inputs)
    found = with_symmetry(program, program.instructions) or program.instructions
    kinds = {i.function if i.function is symmetric_product else i.function.__class__ for i in found}
    return found, kinds & {symmetric_product, DistinctRows}


def rows(pairs: Staged, weights: Staged) -> Staged:
    """A product with weights along the last dimension of (batch, i, j, units)."""
    flat: Any = torch.reshape(pairs, (-1, pairs.shape[-1]))  # type: ignore[arg-type]
    found: Staged = torch.mm(flat, weights)  # type: ignore[arg-type, assignment]
    return found


def outer(one: Any, two: Any, scale: Any) -> Any:
    return torch.mul(torch.mul(torch.unsqueeze(one, 2), torch.unsqueeze(two, 1)), scale)


JACOBIAN, OTHER = torch.randn(3, SIZE, UNITS), torch.randn(3, SIZE, UNITS)
SCALE, WEIGHTS = torch.randn(3, 1, 1, UNITS), torch.randn(UNITS, UNITS)

SYMMETRIC: dict[str, Callable[..., Any]] = {
    "outer product": lambda j, o, s, w: rows(outer(j, j, s), w),
    "both orders": lambda j, o, s, w: rows(torch.add(outer(j, o, s), outer(o, j, s)), w),
    "scaled in one factor": lambda j, o, s, w: rows(
        torch.mul(torch.unsqueeze(torch.mul(j, torch.reshape(s, (3, 1, UNITS))), 2), torch.unsqueeze(j, 1)), w
    ),
    "through a layer": lambda j, o, s, w: rows(
        torch.addcmul(
            torch.mul(torch.reshape(rows(outer(j, j, s), w), (3, SIZE, SIZE, UNITS)), s),
            torch.unsqueeze(o, 2), torch.unsqueeze(o, 1),
        ), w,
    ),
    "element by element": lambda j, o, s, w: rows(torch.tanh(outer(j, j, s)), w),
    "turned": lambda j, o, s, w: rows(
        torch.permute(torch.permute(outer(j, j, s), (3, 0, 1, 2)), (1, 3, 2, 0)), w
    ),
    "summed": lambda j, o, s, w: rows(
        torch.sum(torch.mul(torch.unsqueeze(outer(j, j, s), 0), torch.reshape(s, (3, 1, 1, 1, UNITS))), [0]), w
    ),
}  # fmt: skip

DIFFERENT: dict[str, Callable[..., Any]] = {
    "two factors": lambda j, o, s, w: rows(outer(j, o, s), w),
    "a difference of both orders": lambda j, o, s, w: rows(torch.sub(outer(j, o, s), outer(o, j, s)), w),
    "one order twice": lambda j, o, s, w: rows(torch.add(outer(j, o, s), outer(j, o, s)), w),
    "a quotient": lambda j, o, s, w: rows(torch.div(torch.unsqueeze(j, 2), torch.unsqueeze(j, 1)), w),
    "one direction weighted": lambda j, o, s, w: rows(
        torch.mul(outer(j, j, s), torch.reshape(torch.reshape(o, (-1,))[:SIZE], (1, SIZE, 1, 1))), w
    ),
    "a layer on one direction": lambda j, o, s, w: rows(
        outer(j, torch.reshape(torch.mm(torch.reshape(j, (-1, UNITS)), w), (3, SIZE, UNITS)), s), w
    ),
    "moved along one direction": lambda j, o, s, w: rows(outer(j, torch.roll(j, 1, 1), s), w),
}  # fmt: skip


@pytest.mark.parametrize("name", SYMMETRIC)
def test_equal_rows_are_found(name: str) -> None:
    found, kinds = staged(SYMMETRIC[name], JACOBIAN, OTHER, SCALE, WEIGHTS)
    assert kinds == {DistinctRows}, [i.function for i in found]


@pytest.mark.parametrize("name", DIFFERENT)
def test_rows_that_differ_are_left_alone(name: str) -> None:
    assert not staged(DIFFERENT[name], JACOBIAN, OTHER, SCALE, WEIGHTS)[1]


def test_three_directions_that_may_change_places() -> None:
    def build(j: Any, w: Any) -> Any:
        one, two, three = [torch.reshape(j, shape) for shape in ((UNITS, SIZE, 1, 1), (UNITS, 1, SIZE, 1), (UNITS, 1, 1, SIZE))]
        pairs = torch.mul(torch.mul(one, two), three)
        return torch.mm(torch.reshape(torch.permute(pairs, (1, 2, 3, 0)), (-1, UNITS)), w)

    found, kinds = staged(build, torch.randn(UNITS, SIZE), WEIGHTS)
    assert kinds == {DistinctRows}
    (call,) = [i.function for i in found if isinstance(i.function, DistinctRows)]
    assert call.chosen.numel() == SIZE * (SIZE + 1) * (SIZE + 2) // 6


def test_symmetric_results_are_found() -> None:
    x, d = torch.randn(20, 7), torch.randn(20, 1)
    assert staged(lambda x, d: torch.mm(torch.t(x), torch.mul(d, x)), x, d)[1] == {symmetric_product}
    assert staged(lambda x, d: torch.mm(torch.t(torch.mul(d, x)), torch.mul(x, d)), x, d)[1] == {symmetric_product}
    assert staged(lambda x, d: torch.mm(x, torch.t(x)), x, d)[1] == {symmetric_product}
    assert not staged(lambda x, y: torch.mm(torch.t(x), y), x, torch.randn(20, 7))[1]
    assert not staged(lambda x, y: torch.mm(torch.t(x), torch.sub(x, y)), x, torch.randn(20, 7))[1]
    assert not staged(lambda x, d: torch.mm(torch.t(x), torch.mul(torch.tanh(x), d)), x, d)[1]


@pytest.mark.parametrize("size", [2, 3, 4, 7, 100, 301])
def test_symmetric_product(size: int) -> None:
    x, d = torch.randn(5, size, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    found = symmetric_product(x.t(), d * x)
    torch.testing.assert_close(found, x.t() @ (d * x))


def network(*sizes: int) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    weights = [
        torch.randn(after, before, dtype=torch.float64, generator=generator) / before**0.5
        for before, after in zip(sizes, sizes[1:], strict=False)
    ]

    def function(x: Tensor) -> Tensor:
        for weight in weights[:-1]:
            x = torch.tanh(weight @ x)
        return (weights[-1] @ x).sum()

    return function, weights


def rewritten() -> set[str]:
    """What stands in the plans that are kept, of the calls above."""
    calls = [i.function for item in gc.get_objects() if type(item) is Source for i in item.plain or ()]
    return {"rows"} & {"rows" for c in calls if isinstance(c, DistinctRows)} | {"half" for c in calls if c is symmetric_product}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_biharmonic_operator(dtype: torch.dtype) -> None:
    function, weights = network(5, 64, 64, 64, 1)
    x = torch.randn(6, 5, dtype=dtype)
    for number, weight in enumerate(weights):
        weights[number] = weight.to(dtype)
    transform = chainrule.vmap(chainrule.laplacian(chainrule.laplacian(function)))

    def traced(x: Tensor) -> Tensor:
        inner = lambda x: torch.einsum("ii->", torch.func.hessian(function)(x))  # noqa: E731
        return torch.einsum("ii->", torch.func.hessian(inner)(x))

    for _ in range(4):
        x = torch.randn_like(x)
        torch.testing.assert_close(transform(x), torch.func.vmap(traced)(x), rtol=1e-9 if dtype.itemsize == 8 else 1e-3, atol=1e-4)
    assert "rows" in rewritten()
    leaf = x.clone().requires_grad_()
    transform(leaf).sum().backward()
    other = x.clone().requires_grad_()
    torch.func.vmap(traced)(other).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-8 if dtype.itemsize == 8 else 1e-2, atol=1e-3)


def test_hessian_of_a_sum_over_data() -> None:
    x, y = torch.randn(40, 13, dtype=torch.float64), (torch.rand(40) > 0.5).double()

    def loss(t: Tensor) -> Tensor:
        return torch.nn.functional.softplus(x @ t).sum() - y @ (x @ t)

    transform = chainrule.hessian(loss)
    for _ in range(4):
        t = torch.randn(13, dtype=torch.float64)
        found = transform(t)
        torch.testing.assert_close(found, torch.func.hessian(loss)(t))
    assert "half" in rewritten()
    compiled = chainrule.compile(transform)
    for _ in range(3):
        t = torch.randn(13, dtype=torch.float64)
        torch.testing.assert_close(compiled(t), torch.func.hessian(loss)(t))
    leaf = torch.randn(13, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(transform(leaf).square().sum(), leaf)
    (expected,) = torch.autograd.grad(torch.func.hessian(loss)(leaf).square().sum(), leaf)
    torch.testing.assert_close(found, expected)


def test_small_products_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert not staged(SYMMETRIC["outer product"], JACOBIAN, OTHER, SCALE, WEIGHTS)[1]
    assert products.LEAST_SYMMETRIC > 64
