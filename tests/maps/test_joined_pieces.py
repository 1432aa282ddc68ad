"""Sums of terms that fill different slices of one position are one concatenation."""

from __future__ import annotations

import pytest
import torch

import chainrule

DATA = torch.linspace(-1, 2, 5, dtype=torch.float64)

#: Functions whose Jacobian with respect to one vector has parts that come from slices of it.
FUNCTIONS = {
    "elements": lambda p: p[0] * torch.exp(-p[1] * DATA) + p[2],
    "unbind": lambda p: sum(a * DATA**n for n, a in enumerate(p.unbind())),
    "last first": lambda p: p[-1] * DATA.sin() + p[0] * DATA + p[1] ** 2,
    "gap": lambda p: p[0] * DATA + p[2] * DATA.cos(),
    "parts": lambda p: DATA[:, None] * p[:2].sin().sum() * p[2:] if p.numel() > 2 else DATA * p[0],
    "overlap": lambda p: torch.outer(DATA, p[1:] * p[:-1]) + torch.outer(DATA, p[:-1]),
    "matrices": lambda p: torch.outer(DATA, p[:2]) @ torch.ones(2, 3, dtype=p.dtype) + torch.outer(DATA**2, p[1:2] * p[2:]).sum(1)[:, None],
    "diagonals": lambda p: torch.cat([p[:2] * p[1:3], p[2:] ** 2]),
    "scalar": lambda p: p[0] * p[1] + p[2] ** 2,
    "row": lambda p: p.view(1, 3)[:, 0] * DATA + p.view(1, 3)[:, 1] * p.view(1, 3)[:, 2],
    "mixed dtypes": lambda p: p[0].float() * DATA.float() + (p[1] * DATA).float() + p[2],
}  # fmt: skip


@pytest.mark.parametrize("transform", ["jacobian", "jacfwd", "jacrev"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_jacobians(name, transform):
    function, p = FUNCTIONS[name], torch.randn(3, dtype=torch.float64)
    tolerance = 1e-12 if name != "mixed dtypes" else 1e-6  # rounding, of a few operations
    expected = torch.func.jacfwd(function)(p)
    for run in (getattr(chainrule, transform)(function), chainrule.compile(getattr(chainrule, transform)(function))):
        torch.testing.assert_close(run(p).double(), expected.double(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(run(p).double(), expected.double(), rtol=tolerance, atol=tolerance)
    batch = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(
        chainrule.vmap(getattr(chainrule, transform)(function))(batch).double(),
        torch.func.vmap(torch.func.jacfwd(function))(batch).double(),
        rtol=tolerance, atol=tolerance,
    )  # fmt: skip


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "mixed dtypes"])
def test_second_order(name):
    function, p = FUNCTIONS[name], torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(chainrule.hessian(function)(p), torch.func.hessian(function)(p), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        chainrule.jacrev(chainrule.jacfwd(function))(p), torch.func.hessian(function)(p), rtol=1e-11, atol=1e-11
    )


def test_columns_of_single_elements_are_one_stack():
    def model(p):
        return p[0] * torch.exp(-p[1] * DATA) + p[2]

    compiled = chainrule.compile(chainrule.jacobian(model))
    graph = compiled.graph(torch.ones(3, dtype=torch.float64))
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("stack" in name or "cat" in name for name in names) == 1
    assert not any("zeros" in name or "copy_" in name or "pad" in name for name in names)
