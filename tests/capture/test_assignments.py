"""``x[index] = value`` under the transforms: values and derivatives are those of the same assignments made by torch.

The functions are polynomials and sines of numbers near 1, in float64; central differences with a step of 1e-6 are right to
about 1e-9, far below the tolerance of 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import chainrule

Tensor = torch.Tensor

INDEX, MASK = torch.tensor([2, 0]), torch.tensor([True, False, True, True])


def _view_of_view(x: Tensor) -> None:
    x[1:][:, 0][1] = x[0, 1] * 2


def _seen_through_base(x: Tensor) -> None:
    row = x[1]
    x[:, 0] = 2.5
    row[1:] = row[0] * x[2, 1:]


ASSIGNMENTS: dict[str, Callable[[Tensor], Any]] = {
    "number": lambda x: x.__setitem__(0, 1.5),
    "whole number": lambda x: x.__setitem__((1, 2), 3),
    "row": lambda x: x.__setitem__(0, x[1] * x[2]),
    "broadcast": lambda x: x.__setitem__(slice(1, None), x[0]),
    "broadcast of a number": lambda x: x.__setitem__((slice(None), 1), x[0, 0] * 2),
    "leading dimensions": lambda x: x.__setitem__(0, x[1:2] * 2),
    "column": lambda x: x.__setitem__((slice(None), -1), x[:, 0].sin()),
    "steps": lambda x: x.__setitem__((slice(None, None, 2), slice(1, None)), x[1:3, 1:] * x[0, 0]),
    "everything": lambda x: x.__setitem__(slice(None), x.flip(0) * 2),
    "Ellipsis": lambda x: x.__setitem__((..., 0), x[..., 1]),
    "None": lambda x: x.__setitem__((None, 2), x[0]),
    "places": lambda x: x.__setitem__(INDEX, 0.5),
    "rows at places": lambda x: x.__setitem__(INDEX, x[1:3] * 2),
    "row at places": lambda x: x.__setitem__(INDEX, x[3].cos()),
    "mask": lambda x: x.__setitem__(MASK, 0.25),
    "mask of all": lambda x: x.__setitem__(x.detach() > 1, 0.0),
    "row where a mask is": lambda x: x.__setitem__(MASK, x[1] * 3),
    "other dtype": lambda x: x.__setitem__(0, torch.arange(3)),
    "place and slice": lambda x: x.__setitem__((INDEX, slice(1, None)), 2.0),
    "view of a view": _view_of_view,
    "view made before": _seen_through_base,
    "negative zero": lambda x: x.__setitem__(0, -0.0),
}  # fmt: skip


def written(name: str) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        y = x * x
        before = y.sin()
        ASSIGNMENTS[name](y)
        return (y * y).sin() + before

    return function


def slopes(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    found = []
    for place in range(x.numel()):
        step = torch.zeros_like(x)
        step.view(-1)[place] = 1e-6
        found.append((function(x + step) - function(x - step)) / 2e-6)
    return torch.stack(found, -1).unflatten(-1, x.shape)


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_derivatives(name: str) -> None:
    function = written(name)
    for _ in range(2):  # the second time a plan is known
        x = 0.5 + torch.rand(4, 3, dtype=torch.float64)
        expected, value = slopes(function, x), function(x)
        torch.testing.assert_close(chainrule.jacrev(function)(x), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(chainrule.jacfwd(function)(x), expected, rtol=1e-6, atol=1e-6)
        total, gradient = chainrule.grad_and_value(lambda x: function(x).sum())(x)[::-1]
        torch.testing.assert_close(total, value.sum())
        torch.testing.assert_close(gradient, expected.sum((0, 1)), rtol=1e-6, atol=1e-6)
    many = 0.5 + torch.rand(3, 4, 3, dtype=torch.float64)
    if name != "mask of all":  # the places differ between the samples there
        each = torch.stack([chainrule.jacrev(function)(x) for x in many])
        torch.testing.assert_close(chainrule.vmap(chainrule.jacrev(function))(many), each)


@pytest.mark.parametrize("name", ["number", "row", "places", "mask", "view made before"])
def test_second_derivatives(name: str) -> None:
    function, x = written(name), 0.5 + torch.rand(4, 3, dtype=torch.float64)
    gradient = chainrule.grad(lambda x: function(x).sum())
    torch.testing.assert_close(chainrule.jacrev(gradient)(x), slopes(gradient, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fails", [
    (IndexError, lambda x: x.__setitem__(9, 1.0)), (RuntimeError, lambda x: x.__setitem__(0, torch.ones(7))),
    (IndexError, lambda x: x.__setitem__((0, 0, 0), 1.0)), (TypeError, lambda x: x.__setitem__("a", 1.0)),
])  # fmt: skip
def test_errors_are_torchs(fails: tuple[type[Exception], Callable[[Tensor], Any]]) -> None:
    kind, assignment = fails

    def function(x: Tensor) -> Tensor:
        y = x * 2
        assignment(y)
        return y.sum()

    with pytest.raises(kind) as plain:
        function(torch.ones(4, 3))
    with pytest.raises(kind) as taken:
        chainrule.grad(function)(torch.ones(4, 3))
    assert str(plain.value) == str(taken.value)


def test_a_write_to_an_argument_is_seen() -> None:
    x = torch.rand(3, dtype=torch.float64)

    def function(x: Tensor, kept: Tensor) -> Tensor:
        kept[1] = 7.0
        kept += 1
        return (x * kept).sum()

    kept = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(chainrule.grad(function)(x, kept), torch.tensor([1.0, 8.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(kept, torch.tensor([1.0, 8.0, 1.0], dtype=torch.float64))
