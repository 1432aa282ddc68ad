"""What plans cost, without a clock: calls, multiply-adds, bytes moved, peak bytes. A plan that costs more fails.

After a change that is meant to change plans: ``python -m tests.plan.test_plan_costs`` writes the figures anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import chainrule
from chainrule.execute import engine, memory, replay
from chainrule.execute.memory import watching
from chainrule.execute.replay import Source
from chainrule.maps.staging import refs
from tests.execute.test_memory import CASES as MEMORY_CASES
from tests.execute.test_memory import KERNEL, NET, PARAMETERS, Tensor, by_parameters, logistic

FIGURES = Path(__file__).with_name("plan_costs.json")
WIDE, TALL = torch.randn(64, 8), torch.randn(8, 64)
HEAD = torch.randn(3, 16, 16) / 4
TARGET = torch.randint(0, 7, (30,))


def chain(x: Tensor) -> Tensor:
    for _ in range(5):
        x = torch.sin(x) * torch.exp(-x) + x
    return x


def factors(u: Tensor) -> Tensor:
    return ((u @ TALL[:, :20] - 1.0) ** 2).sum()


def stencil(x: Tensor) -> Tensor:
    return torch.roll(x, 1, 0) + torch.roll(x, -1, 0) - 2 * x + x**3


def attention_head(x: Tensor) -> Tensor:
    return torch.softmax(x @ HEAD[0] @ (x @ HEAD[1]).T, -1) @ (x @ HEAD[2])


def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.cross_entropy(by_parameters(p, x), TARGET)


CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    **MEMORY_CASES,
    "chain of element-wise ops": (chainrule.jacobian(chain), (torch.randn(50),)),
    "gradient of a chain": (chainrule.grad(lambda x: chain(x).sum()), (torch.randn(50),)),
    "second derivative of a chain": (chainrule.vmap(chainrule.grad(chainrule.grad(chain))), (torch.randn(50),)),
    "wide then tall": (chainrule.jacobian(lambda x: torch.tanh(TALL @ torch.tanh(WIDE @ x))), (torch.randn(8),)),
    "tall then wide": (chainrule.jacobian(lambda x: torch.tanh(WIDE @ torch.tanh(TALL @ x))), (torch.randn(64),)),
    "relu layers": (chainrule.jacobian(lambda x: torch.relu(TALL @ torch.relu(WIDE @ x))), (torch.randn(8),)),
    "factorisation": (chainrule.hessian(factors), (torch.randn(12, 8),)),
    "stencil": (chainrule.jacobian(stencil), (torch.randn(30),)),
    "softmax": (chainrule.vmap(chainrule.jacobian(lambda x: torch.softmax(x, 0))), (torch.randn(5, 20),)),
    "layer norm": (chainrule.jacobian(lambda x: F.layer_norm(x, (20,))), (torch.randn(5, 20),)),
    "cross-entropy": (chainrule.grad(loss), (PARAMETERS, torch.randn(30, 12))),
    "Gauss-Newton product": (
        lambda p, x: chainrule.ggn(lambda q: by_parameters(q, x), lambda z: F.cross_entropy(z, TARGET), (p,), (p,)),
        (PARAMETERS, torch.randn(30, 12)),
    ),
    "third order": (chainrule.jacfwd(chainrule.hessian(lambda x: torch.tanh(x).prod())), (torch.rand(6) + 0.5,)),
    "Newton step": (lambda t: torch.linalg.solve(chainrule.hessian(logistic)(t) + torch.eye(40), chainrule.grad(logistic)(t)), (torch.randn(40),)),
    "matrix inverse": (chainrule.jacobian(torch.linalg.inv), (torch.randn(6, 6) + 6 * torch.eye(6),)),
    "two convolutions": (
        chainrule.jacobian(lambda x: F.conv2d(torch.tanh(F.conv2d(x, KERNEL)), KERNEL.transpose(0, 1))), (torch.randn(1, 3, 8, 8),),
    ),
    "recurrence": (chainrule.jacobian(lambda x: _recurrence(x)), (torch.randn(6),)),
    "hvp": (lambda p, x: chainrule.hvp(lambda q: loss(q, x), (p,), (p,)), (PARAMETERS, torch.randn(30, 12))),
    "many tangents": (
        lambda x, v: chainrule.vmap(chainrule.linearize(NET, x)[1])(v), (torch.randn(12), torch.randn(40, 12)),
    ),
    "many cotangents": (lambda x, v: chainrule.vmap(chainrule.vjp(NET, x)[1])(v), (torch.randn(12), torch.randn(40, 7))),
    "many tangents of parameters": (
        lambda p, x, v: chainrule.vmap(chainrule.linearize(lambda q: by_parameters(q, x), p)[1])(v),
        (PARAMETERS, torch.randn(30, 12), {name: torch.randn(40, *p.shape) for name, p in PARAMETERS.items()}),
    ),
    "many cotangents to parameters": (
        lambda p, x, v: chainrule.vmap(chainrule.vjp(lambda q: by_parameters(q, x), p)[1])(v),
        (PARAMETERS, torch.randn(30, 12), torch.randn(40, 30, 7)),
    ),
    "large attention": (chainrule.jacobian(attention_head), (torch.randn(24, 16),)),
}  # fmt: skip


def _recurrence(x: Tensor) -> Tensor:
    state = x
    for _ in range(6):
        state = torch.tanh(WIDE[:6, :6] @ state + x)
    return state


def figures(name: str) -> dict[str, int]:
    """The figures of one case, as plans are on a processor of one kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        patch.setattr(memory, "LANES", 8)
        for module in (memory, replay):  # the work space of kernels is another on each processor
            patch.setattr(module, "observable", lambda **_: False)
        engine.CACHE.clear()
        try:
            return _figures(name)
        finally:
            engine.CACHE.clear()


def _figures(name: str) -> dict[str, int]:
    function, args = CASES[name]
    compiled = chainrule.compile(function)
    compiled(*args)
    cells = [cell.cell_contents for cell in compiled.__closure__ or ()]
    flat = next(cell for cell in cells if hasattr(cell, "_flat"))._flat(args, {})
    source = Source(flat.program, flat.results)
    moved = 0
    kinds = flat.program.kinds
    for instruction in source.kept:
        slots = [slot for slot in instruction.outputs if slot not in flat.program.shares]
        if slots or instruction.writes:
            read = refs((instruction.args, tuple(instruction.kwargs.values())))
            moved += sum(prod(kinds[s][0]) * kinds[s][1].itemsize for s in (*slots, *read) if s in kinds)
    flops = sum(step["flops"] for account in chainrule.explain(function)(*args).accounts for step in account.steps)
    for _ in range(2):
        function(*args)
    with watching() as watch:
        function(*args)
    return {"calls": len(source.kept), "moved": moved, "flops": flops, "peak": watch.peak}


@pytest.mark.parametrize("name", CASES)
def test_plans_cost_no_more(name: str) -> None:
    """No figure grows; one that shrinks by a tenth is to be written down too."""
    known = json.loads(FIGURES.read_text())[name]
    found = figures(name)
    grown = {key: (known[key], value) for key, value in found.items() if value > known[key]}
    assert not grown, f"{name} costs more than in {FIGURES.name} (was, is): {grown}"
    shrunk = {key: (known[key], value) for key, value in found.items() if value < 0.9 * known[key]}
    assert not shrunk, f"{name} costs less than in {FIGURES.name}; write it down with python -m {__name__}: {shrunk}"


def test_every_case_is_known() -> None:
    assert json.loads(FIGURES.read_text()).keys() == CASES.keys()


if __name__ == "__main__":
    FIGURES.write_text(json.dumps({name: figures(name) for name in CASES}, indent=1, sort_keys=True) + "\n")
