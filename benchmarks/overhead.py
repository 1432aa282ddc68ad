"""Where the microseconds of a small call go: recording, signature lookup, replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.benchmark import Timer

import chainrule
from benchmarks.measure import peak_memory
from benchmarks.recording import recording_costs
from benchmarks.section_a import predict
from chainrule.capture.tape import Tape
from chainrule.execute import engine, planning
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
    found["  one of its ops by itself (torch.sin)"] = timed(torch.sin, x)
    found["  recorded on a tape"] = recorded
    found["  recording, per op"] = (recorded - plain) / OPS
    found["  its Jacobian, the whole call"] = timed(chainrule.jacobian(chain), x)
    found.update(_pieces("  its Jacobian,", chain, (x,), timed))
    arguments = (torch.randn(16), torch.randn(16, 16), torch.randn(16))
    found["layer 16→16 (A1): plain call"] = timed(layer, *arguments)
    found["  A1, the whole call"] = timed(chainrule.jacobian(layer), *arguments)
    found.update(_pieces("  A1,", layer, arguments, timed))
    for kind, (plain, recorded) in recording_costs().items():
        found[f"recording {kind} of 4×4 values, over the plain call"] = max(0.0, recorded - plain)
    return found


def _pieces(
    prefix: str, function: Callable[..., Any], args: tuple[torch.Tensor, ...], timed: Callable[..., float]
) -> dict[str, float]:
    def record() -> Traced:
        return trace(function, args, (0,), {}, "jacobian")

    traced = record()
    request = Request("jacobian", tuple(traced.in_slots), tuple(s for s in traced.out_slots if s is not None), "auto")
    engine.execute(traced.tape, request)
    key = planning.key_of(traced.tape, request, ())
    cached = engine.CACHE.get(key)
    assert cached is not None
    cached.run(traced.tape.values, ())
    replay = timed(lambda: cached.run(traced.tape.values, ()))
    calls = len(chainrule.explain(chainrule.jacobian(function))(*args).accounts[-1].calls)
    return {
        f"{prefix} recording, arguments checked": timed(record),
        f"{prefix} signature and plan lookup": timed(lambda: engine.CACHE.get(planning.key_of(traced.tape, request, ()))),
        f"{prefix} replay": replay,
        f"{prefix} replay, per ATen call ({calls} of them), its kernel included": replay / calls,
    }


def deep(x: torch.Tensor) -> torch.Tensor:
    """A long chain, whose record is what costs memory."""
    for _ in range(10):
        x = (x.sin() * 1.1).tanh()
    return x.sum()


def product_memory(device: str) -> dict[str, dict[str, int]]:
    """The peak memory of a Hessian-vector product, forward and reverse over reverse, in bytes."""

    def forward(library: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, v: library.jvp(library.grad(function), (x,), (v,))[1]

    def reverse(library: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, v: library.vjp(library.grad(function), x)[1](v)[0]

    found: dict[str, dict[str, int]] = {}
    cases = {"sin(x).sum(), n=2048": (lambda x: torch.sin(x).sum(), 2048), "chain of 30 ops, n=100 000": (deep, 100_000)}
    for name, (function, n) in cases.items():
        x, v = torch.randn(n, device=device), torch.randn(n, device=device)
        entry = found[name] = {}
        for title, library in (("chainrule", chainrule), ("torch.func", torch.func)):
            for order, make in (("forward", forward), ("reverse", reverse)):
                product = make(library, function)
                for _ in range(3):
                    product(x, v)
                entry[f"{title}, {order} over reverse"] = peak_memory(product, (x, v), device)
    return found
