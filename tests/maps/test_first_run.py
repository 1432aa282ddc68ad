"""The first run of a program lets large values go, and computes again what is asked for all the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import chainrule
from chainrule.execute.engine import CACHE
from chainrule.execute.workspace import observe
from chainrule.maps.first_run import FirstRun, forced
from chainrule.maps.nodes import Node, leaf
from chainrule.maps.staging import Program, Staged

SIZE = 200  # SIZE² numbers are large


def test_values_that_no_node_needs_are_let_go_and_computed_again() -> None:
    x = torch.randn(SIZE, SIZE)
    program = FirstRun()
    first = leaf(x.shape, lambda p: torch.tanh(p.input(0, x)))
    second = Node(x.shape, (first,), lambda p, value: torch.exp(value) + 1.0)
    third = Node(x.shape, (second,), lambda p, value: torch.sin(value))
    (made,) = forced(program, [third])
    assert made is not None and first.staged is not None and second.staged is not None
    for gone, expected in ((first.staged, x.tanh()), (second.staged, x.tanh().exp() + 1)):
        assert gone.slot not in program._large
        assert gone.shape == x.shape and gone.dtype == x.dtype
        torch.testing.assert_close(gone.value, expected, rtol=0, atol=0)
    calls = len(program.instructions)
    torch.testing.assert_close(torch.exp(first.staged).value, x.tanh().exp(), rtol=0, atol=0)  # the call is known
    assert len(program.instructions) == calls
    torch.testing.assert_close(made.value, (x.tanh().exp() + 1).sin(), rtol=0, atol=0)


def test_temporaries_of_one_node_are_let_go() -> None:
    x = torch.randn(SIZE, SIZE)

    def compute(program: Program) -> Staged:
        value = program.input(0, x)
        for _ in range(20):
            value = torch.tanh(value)
        return value

    program = FirstRun()
    _, space = observe(lambda: forced(program, [leaf(x.shape, compute)]))
    assert space.work + space.results <= 4 * x.nbytes


@pytest.mark.parametrize("function", [lambda x: x.prod(), lambda x: x.cumprod(0).sum()])
def test_first_calls_under_a_budget_hold_little_more_than_later_ones(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Planning tries some blocks, each of which is held with the indices of its plan: without any further factor of ``n``."""
    x = torch.rand(300) + 0.5
    transform = chainrule.hessian(function, max_memory="2MB")
    CACHE.clear()
    for _ in range(2):
        found, space = observe(lambda: transform(x))
        assert space.work <= 5 * 2e6
        torch.testing.assert_close(found, torch.func.hessian(function)(x), rtol=1e-3, atol=1e-3 * found.abs().max().item())
