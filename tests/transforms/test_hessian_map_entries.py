"""Diagonals and traces of Hessians on graphs: read off the non-zeros where curvatures would hold a dense matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import chainrule

Tensor = torch.Tensor


def energy_of_a_graph(nodes: int) -> Callable[[Tensor], Tensor]:
    """The squares of the sums over each node's edges."""
    source, target = torch.randint(0, nodes, (2, 4 * nodes))

    def energy(x: Tensor) -> Tensor:
        flow = torch.zeros(nodes, dtype=x.dtype).index_add(0, target, (x[source] - x[target]).tanh())
        return (flow**2).sum()

    return energy


class Largest(TorchDispatchMode):
    """The number of elements of the largest result of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        made = [item.numel() for item in tree_leaves(found) if isinstance(item, torch.Tensor) and not func.is_view]
        self.elements = max([self.elements, *made])
        return found


@pytest.mark.parametrize("nodes", [1, 7, 400])
def test_graphs(nodes: int) -> None:
    """Sums of some tens of terms of size one or so, in another order: 1e-12 is a hundred times their rounding."""
    energy = energy_of_a_graph(nodes)
    for _ in range(3):  # planned, known, and at other points
        x = torch.randn(nodes, dtype=torch.float64)
        expected = torch.func.hessian(energy)(x)
        found = chainrule.hessian(energy, layout="operator")(x)
        torch.testing.assert_close(found.diagonal(), expected.diagonal(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.trace(), expected.trace(), rtol=1e-12, atol=1e-11)


def test_several_inputs() -> None:
    source, target = torch.randint(0, 300, (2, 900))

    def energy(tree: dict[str, Tensor]) -> Tensor:
        flow = torch.zeros(300, dtype=torch.float64).index_add(0, target, tree["weight"] * tree["x"][source].sin())
        return (flow**3).sum()

    tree = {"x": torch.randn(300, dtype=torch.float64), "weight": torch.randn(900, dtype=torch.float64)}
    whole = torch.func.hessian(energy)(tree)
    found = chainrule.hessian(energy, layout="operator")(tree)
    diagonal = found.diagonal()
    for name in tree:
        torch.testing.assert_close(diagonal[name], whole[name][name].diagonal(), rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(found.trace(), sum(whole[n][n].trace() for n in tree), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("what", ["diagonal", "trace"])
def test_no_matrix_is_made(what: str) -> None:
    """Some hundred numbers a node, against as many as there are nodes."""
    nodes = 2000
    energy, x = energy_of_a_graph(nodes), torch.randn(nodes, dtype=torch.float64)
    found = chainrule.hessian(energy, layout="operator")(x)
    with Largest() as largest:
        getattr(found, what)()
    assert 0 < largest.elements < nodes * nodes // 10


def test_dense_hessians_are_not_made_for_their_diagonals() -> None:
    """Of a layer, curvatures hold its weights; the Hessian has no zeros to leave out."""
    weight = torch.randn(20, 600, dtype=torch.float64) / 30

    def energy(x: Tensor) -> Tensor:
        return torch.tanh(weight @ x).square().sum()

    x = torch.randn(600, dtype=torch.float64)
    found = chainrule.hessian(energy, layout="operator")(x)
    with Largest() as largest:
        diagonal = found.diagonal()
    assert largest.elements <= weight.numel()
    torch.testing.assert_close(diagonal, torch.func.hessian(energy)(x).diagonal())
