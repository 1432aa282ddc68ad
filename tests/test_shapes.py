"""Shapes that broadcast, beside torch's own function."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from chainrule.shapes import broadcast_shapes

CASES: list[tuple[tuple[int, ...], ...]] = [
    (), ((),), ((3,), ()), ((2, 1), (3,)), ((1,), (0,)), ((4, 1, 3), (2, 1), (1,)), ((0, 1), (1, 5)), ((1, 1), (1,)),
    (torch.Size([2, 3]), (3,)),
]  # fmt: skip


@pytest.mark.parametrize("shapes", CASES, ids=str)
def test_shapes_that_broadcast(shapes: tuple[tuple[int, ...], ...]) -> None:
    found = broadcast_shapes(*shapes)
    assert isinstance(found, torch.Size)
    assert found == torch.broadcast_tensors(*[torch.empty(shape) for shape in shapes])[0].shape if shapes else found == ()


@pytest.mark.parametrize("shapes", [((2,), (3,)), ((0,), (2,)), ((2, 3), (2,))], ids=str)
def test_shapes_that_do_not(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(RuntimeError) as ours:
        broadcast_shapes(*shapes)
    with pytest.raises(RuntimeError) as theirs:
        torch.broadcast_shapes(*shapes)
    assert str(ours.value) == str(theirs.value)


def test_first_jacobians_import_no_compiler() -> None:
    """What ``torch.broadcast_shapes`` imports is not there after an indexing, a running sum and an operation under vmap."""
    code = """
import sys, torch, chainrule
x = torch.rand(4, 5)
rows, columns = torch.tensor([[0], [2]]), torch.tensor([1, 3])
chainrule.jacobian(lambda x: x[rows, columns].sin())(x)
chainrule.linear_map(lambda x: x.reshape(-1).cumsum(0), x).norm()
chainrule.vmap(lambda x: torch.where(x > 0, x, 1.0) * x[columns].sum())(x)
assert "torch.fx.experimental.symbolic_shapes" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
