"""Where the microseconds of a small call go: recording, signature lookup, replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.benchmark import Timer

import chainrule
from benchmarks.section_a import predict
from chainrule.capture.tape import Tape
from chainrule.execute import engine
from chainrule.plan.planner import Request
from chainrule.rules.table import POLICY
from chainrule.transforms.trace import Traced, trace

OPS = 20


def chain(x: torch.Tensor) -> torch.Tensor:
    """Twenty element-wise ops."""
    for _ in range(OPS // 4):
        x = (x.sin() * 0.5 + 1.0).tanh()
    return x


def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The layer of section A with ``x`` first."""
    return predict(weight, bias, x)


def overhead_budget(threads: int, seconds: float = 0.3) -> dict[str, float]:
    """The pieces of a Jacobian's call, in seconds per call unless the name says otherwise."""

    def timed(function: Callable[..., Any], *args: Any) -> float:
        function(*args)
        timer = Timer("f(*a)", globals={"f": function, "a": args}, num_threads=threads)
        return timer.blocked_autorange(min_run_time=seconds).median

    def plain_record(x: torch.Tensor) -> Tape:
        tape = Tape(POLICY)
        alias = torch.ops.aten.alias.default(x)
        tape.add_input(alias)
        with tape:
            chain(alias)
        return tape

    found: dict[str, float] = {}
    x = torch.randn(16)
    plain, recorded = timed(chain, x), timed(plain_record, x)
    found[f"chain of {OPS} pointwise ops, n=16: plain call"] = plain
    found["  recorded on a tape"] = recorded
    found["  recording, per op"] = (recorded - plain) / OPS
    found["  its Jacobian, the whole call"] = timed(chainrule.jacobian(chain), x)
    found.update(_pieces("  its Jacobian,", chain, (x,), timed))
    arguments = (torch.randn(16), torch.randn(16, 16), torch.randn(16))
    found["layer 16→16 (A1): plain call"] = timed(layer, *arguments)
    found["  A1, the whole call"] = timed(chainrule.jacobian(layer), *arguments)
    found.update(_pieces("  A1,", layer, arguments, timed))
    return found


def _pieces(
    prefix: str, function: Callable[..., Any], args: tuple[torch.Tensor, ...], timed: Callable[..., float]
) -> dict[str, float]:
    def record() -> Traced:
        return trace(function, args, (0,), {}, "jacobian")

    traced = record()
    request = Request("jacobian", tuple(traced.in_slots), tuple(s for s in traced.out_slots if s is not None), "auto")
    engine.execute(traced.tape, request)
    key = engine._key(traced.tape, request, ())
    cached = engine.CACHE.get(key)
    assert cached is not None
    cached.run(traced.tape.values, ())
    return {
        f"{prefix} recording, arguments checked": timed(record),
        f"{prefix} signature and plan lookup": timed(lambda: engine.CACHE.get(engine._key(traced.tape, request, ()))),
        f"{prefix} replay": timed(lambda: cached.run(traced.tape.values, ())),
    }
