"""Equal calls of a recorded call run once, whichever transform made them and however they are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import chainrule
from chainrule.execute.replay import Source

Tensor = torch.Tensor
DOUBLE = torch.float64
WEIGHT, BIAS = torch.randn(6, 4, dtype=DOUBLE), torch.randn(6, dtype=DOUBLE)


def calls(function: Callable[..., Any], *args: Tensor) -> list[str]:
    """The names of the calls of the graph that a call is compiled to."""
    compiled = chainrule.compile(function)
    compiled(*args)
    cells = [cell.cell_contents for cell in compiled.__closure__ or ()]
    flat = next(cell for cell in cells if hasattr(cell, "_flat"))._flat(args, {})
    return [getattr(i.function, "__name__", "") for i in Source(flat.program, flat.results).kept]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ["tanh", "sigmoid", "exp"])
def test_a_function_its_gradient_and_its_hessian_share(name: str, first: bool) -> None:
    """The product, the function and its slope are made once, whether the derivatives were planned before or not."""
    function = getattr(torch, name)

    def loss(x: Tensor) -> Tensor:
        return function(WEIGHT @ x + BIAS).sum()  # type: ignore[no-any-return]

    def together(library: Any, x: Tensor) -> tuple[Tensor, ...]:
        return loss(x), library.grad(loss)(x), library.hessian(loss)(x)

    x = torch.randn(4, dtype=DOUBLE)
    if not first:
        for _ in range(2):
            chainrule.grad(loss)(x), chainrule.hessian(loss)(x)
    found = calls(lambda x: together(chainrule, x), x)
    assert found.count(name) == 1
    assert found.count("addcmul") + found.count("sub") <= (0 if name == "exp" else 2 if name == "sigmoid" else 1)
    # The product with the matrix and that with its transpose; the Hessian's.
    assert sum([found.count(product) for product in ("mv", "addmv", "matmul")]) == 2
    assert found.count("mm") == 1
    compiled = chainrule.compile(lambda x: together(chainrule, x))
    for _ in range(3):
        x = torch.randn(4, dtype=DOUBLE)
        torch.testing.assert_close(compiled(x), together(torch.func, x))


@pytest.mark.parametrize(
    ("one", "two", "count"),
    [
        (lambda x, y: x * y, lambda x, y: y * x, 1),
        (lambda x, y: x + y, lambda x, y: y + x, 1),
        (lambda x, y: x - y, lambda x, y: y - x, 2),
        (lambda x, y: x / y, lambda x, y: y / x, 2),
        (lambda x, y: 2 * x, lambda x, y: x * 2.0, 1),
        (lambda x, y: 1 - x, lambda x, y: torch.rsub(x, 1), 1),
        (lambda x, y: 1 - x, lambda x, y: x - 1, 2),
        (lambda x, y: x * 0.0, lambda x, y: x * -0.0, 2),
        (lambda x, y: WEIGHT @ x, lambda x, y: torch.mv(WEIGHT, x), 1),
        (lambda x, y: x.double() + 1, lambda x, y: x.float() + 1, 3),
    ],
)
def test_calls_that_are_the_same(one: Callable[..., Tensor], two: Callable[..., Tensor], count: int) -> None:
    """In any order of their operands where these commute, and in any spelling; signs of zeros and dtypes are kept apart."""

    def both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sin(one(x, y)), torch.cos(two(x, y))

    x, y = torch.rand(2, 4, dtype=DOUBLE)
    found = [name for name in calls(both, x, y) if name not in ("sin", "cos")]
    assert len(found) == count, found
    compiled = chainrule.compile(both)
    for _ in range(3):
        x, y = torch.randn(2, 4, dtype=DOUBLE)
        for mine, exact in zip(compiled(x, y), both(x, y), strict=True):
            assert torch.equal(mine, exact) and mine.dtype == exact.dtype


def test_results_that_are_equal_have_memory_of_their_own() -> None:
    compiled = chainrule.compile(lambda x, y: (x * y, y * x, chainrule.grad(lambda x: (x * y).sum())(x)))
    x, y = torch.rand(2, 4, dtype=DOUBLE)
    for _ in range(3):
        one, two, three = compiled(x, y)
        one.zero_()
        torch.testing.assert_close(two, x * y)
        three.zero_()
        torch.testing.assert_close(y.sum(), compiled(x, y)[2].sum())


def test_values_that_are_written_to_are_not_shared() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        first = x * 2
        first.add_(1)
        return F.relu(first), torch.sin(x * 2)

    compiled = chainrule.compile(function)
    for _ in range(3):
        x = torch.randn(4, dtype=DOUBLE)
        torch.testing.assert_close(compiled(x), function(x))
