"""What plans need is told before they run, and those that need too much are not run."""

from __future__ import annotations

import pytest
import torch

from chainrule import vmap
from chainrule.execute.engine import CACHE
from chainrule.execute.prediction import Predictions, forget
from chainrule.plan.planner import Request
from chainrule.transforms.trace import trace
from tests.transforms.test_blocks import peak_bytes

WEIGHT = torch.randn(500, 500)


def test_a_plan_over_the_limit_is_not_run() -> None:
    traced = trace(lambda x: torch.tanh(WEIGHT @ torch.tanh(WEIGHT @ x)), (torch.randn(500),), (0,), {}, "jacobian")
    (output,) = traced.out_slots
    assert output is not None
    request = Request("jacobian", tuple(traced.in_slots), (output,), "auto", (), "input")
    result = 4 * 500 * 500
    assert peak_bytes(lambda: Predictions().memory(traced.tape, request, result // 2)) < result // 2
    memory = Predictions().memory(traced.tape, request, result // 2)
    assert memory.results == result
    assert memory.peak > result
    assert Predictions().memory(traced.tape, request).peak == memory.peak
    known = len(CACHE)
    forget(traced.tape, request)
    assert len(CACHE) == known - 1


@pytest.mark.parametrize("rows", [3, 90])
def test_a_plan_over_the_limit_is_not_run_on_the_samples_of_a_vmap(rows: int) -> None:
    samples = torch.randn(rows, 300)
    told: list[int] = []

    def call(x: torch.Tensor) -> torch.Tensor:
        traced = trace(lambda y: torch.cumsum(y.sin(), 0).exp(), (x,), (0,), {}, "jacobian")
        (output,) = traced.out_slots
        assert output is not None
        request = Request("jacobian", tuple(traced.in_slots), (output,), "auto", (), "input")
        result = rows * 4 * 300 * 300
        assert peak_bytes(lambda: told.append(Predictions().memory(traced.tape, request, result // 2).peak)) < result // 2
        told.append(Predictions().memory(traced.tape, request).peak)
        return x

    vmap(call)(samples)
    first, run = told
    assert rows * 4 * 300 * 300 < run <= first <= 2.5 * run
