"""Tapes read as one, and tapes that go on from a finished one."""

from __future__ import annotations

import torch

from chainrule.capture.joined import JoinedTape
from chainrule.execute.engine import execute
from chainrule.plan.planner import Request
from chainrule.transforms.trace import trace


def test_requests_on_either_part_of_joined_tapes() -> None:
    x, y = torch.randn(3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    functions = (lambda x: torch.sin(x) * x, lambda y: torch.cumsum(torch.exp(y)[[0, 2]], 0))
    runs = [trace(f, (v,), (0,), {}, "test") for f, v in zip(functions, (x, y), strict=True)]
    joined = JoinedTape([run.tape for run in runs])
    assert joined.offsets == [0, len(runs[0].tape.values)]
    assert joined.inputs == [run.in_slots[0] + offset for run, offset in zip(runs, joined.offsets, strict=True)]
    for run, offset, function, value in zip(runs, joined.offsets, functions, (x, y), strict=True):
        (slot,), (source,) = run.out_slots, run.in_slots
        assert slot is not None
        key = (slot + offset, source + offset)
        for _ in range(2):
            found = execute(joined, Request("jacobian", key[1:], key[:1]))[key]
            torch.testing.assert_close(found, torch.func.jacrev(function)(value))
    again = JoinedTape([run.tape for run in runs])
    assert joined.signature(0) == again.signature(0)
    assert joined.signature(0) != JoinedTape([runs[1].tape, runs[0].tape]).signature(0)


def test_a_fork_leaves_its_origin_as_it_was() -> None:
    run = trace(lambda x: x * x, (torch.ones(3),), (0,), {}, "test")
    before, fork = run.tape.signature(0), run.tape.fork()
    assert fork.signature(0) == before
    with fork.recording():
        torch.sin(run.out_leaves[0])
    assert len(fork.records) == len(run.tape.records) + 1
    assert run.tape.signature(0) == before
