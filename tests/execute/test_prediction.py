"""What plans need is told before they run, and those that need too much are not run."""

from __future__ import annotations

import torch

from chainrule.execute.engine import CACHE
from chainrule.execute.prediction import forget, predicted
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
    assert peak_bytes(lambda: predicted(traced.tape, request, result // 2)) < result // 2
    memory = predicted(traced.tape, request, result // 2)
    assert memory.results == result
    assert memory.peak > result
    assert predicted(traced.tape, request).peak == memory.peak
    known = len(CACHE)
    forget(traced.tape, request)
    assert len(CACHE) == known - 1
