"""Laplacians, diagonals of Hessians and divergences on graphs and grids: what they cost is what their entries cost.

The sums are of some tens of terms of size one or so, in another order than torch.func's: 1e-11 is some thousand times their
rounding. Maps are large enough (more than a megabyte when dense) for the two ways to be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import chainrule
from benchmarks.scientific import brusselator, brusselator_state, rolled, sliced
from chainrule.execute import engine

Tensor = torch.Tensor
DOUBLE = torch.float64
NODES = 380


def edges(nodes: int) -> tuple[Tensor, Tensor]:
    source, target = torch.randint(0, nodes, (2, 3 * nodes))
    return source, target


def energy(u: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The squares of the flows into the nodes of a graph."""
    flow = torch.zeros_like(u).index_add(0, target, torch.sin(u[source]) * u[target])
    return (flow**2).sum()


def differences(u: Tensor, source: Tensor, target: Tensor) -> Tensor:
    return ((u[source] - u[target]) ** 2).sum() + (u**4).sum()


def field(u: Tensor, source: Tensor, target: Tensor) -> Tensor:
    return torch.zeros_like(u).index_add(0, target, torch.sin(u[source] - u[target]) * u[target])


def diagonal(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda u, *rest: torch.func.hessian(function)(u, *rest).diagonal()


def trace(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda u, *rest: torch.func.jacrev(function)(u, *rest).reshape(u.numel(), -1).trace()


def gradient(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.func.grad(function)  # type: ignore[no-any-return]


CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "diagonal": (chainrule.hessian_diagonal(energy), diagonal(energy)),
    "laplacian": (chainrule.laplacian(energy), trace(gradient(energy))),
    "differences": (chainrule.hessian_diagonal(differences), diagonal(differences)),
    "divergence": (chainrule.divergence(field), trace(field)),
    "twice": (chainrule.divergence(lambda u, *e: field(field(u, *e), *e)), trace(lambda u, *e: field(field(u, *e), *e))),
    "gradient of the laplacian": (chainrule.grad(chainrule.laplacian(energy)), gradient(trace(gradient(energy)))),
    "gradient of a function of it": (
        chainrule.grad(lambda u, *e: torch.sin(chainrule.laplacian(energy)(u, *e))),
        gradient(lambda u, *e: torch.sin(trace(gradient(energy))(u, *e))),
    ),
    "gradient of the divergence": (chainrule.grad(chainrule.divergence(field)), gradient(trace(field))),
    "value": (chainrule.laplacian(energy, return_value=True), lambda u, *e: (trace(gradient(energy))(u, *e), energy(u, *e))),
}


@pytest.mark.parametrize("name", CASES)
def test_graphs(name: str) -> None:
    """Planned, known, on another graph, and at another point of that."""
    ours, reference = CASES[name]
    engine.CACHE.clear()
    one, two = edges(NODES), edges(NODES)
    for graph in (one, one, two, two, one):
        u = torch.randn(NODES, dtype=DOUBLE)
        torch.testing.assert_close(ours(u, *graph), reference(u, *graph), rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("name", ["laplacian", "diagonal", "divergence"])
def test_under_vmap_and_compile(name: str) -> None:
    """Samples that share their indices have one pattern, and a recorded call compares those that it was made with."""
    ours, reference = CASES[name]
    graph, points = edges(NODES), torch.randn(2, NODES, dtype=DOUBLE)
    expected = torch.stack([reference(u, *graph) for u in points])
    mapped = chainrule.vmap(ours, in_dims=(0, None, None))
    compiled = chainrule.compile(ours)
    for _ in range(2):
        torch.testing.assert_close(mapped(points, *graph), expected, rtol=1e-11, atol=1e-10)
        for u, one in zip(points, expected, strict=True):
            torch.testing.assert_close(compiled(u, *graph), one, rtol=1e-11, atol=1e-10)
            torch.testing.assert_close(ours(u, *graph), one, rtol=1e-11, atol=1e-10)


def test_other_graphs_after_compile() -> None:
    ours, reference = CASES["laplacian"]
    engine.CACHE.clear()
    compiled, u = chainrule.compile(ours), torch.randn(NODES, dtype=DOUBLE)
    for graph in (edges(NODES), edges(NODES)):
        for function in (compiled, ours):
            torch.testing.assert_close(function(u, *graph), reference(u, *graph), rtol=1e-11, atol=1e-10)


def test_tangents() -> None:
    graph, u, v = edges(NODES), torch.randn(NODES, dtype=DOUBLE), torch.randn(NODES, dtype=DOUBLE)
    expected = torch.func.jvp(lambda u: diagonal(energy)(u, *graph), (u,), (v,))[1]
    for _ in range(2):
        found = chainrule.jvp(lambda u: chainrule.hessian_diagonal(energy)(u, *graph), (u,), (v,))[1]
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("stencil", [rolled, sliced])
def test_the_brusselator(stencil: Callable[[Tensor], Tensor]) -> None:
    """Its coefficients are of size 10·N², here some thousands: the trace has some 1e6 times the rounding of 2e-16."""
    rhs = brusselator(stencil)
    state = brusselator_state(14) + torch.rand(2, 14, 14, dtype=DOUBLE)
    reference = trace(lambda u: rhs(u).reshape(-1))
    for _ in range(2):
        torch.testing.assert_close(chainrule.divergence(rhs)(state), reference(state), rtol=1e-10, atol=1e-6)


def test_several_inputs_and_aux() -> None:
    source, target = edges(NODES)

    def function(tree: dict[str, Tensor]) -> tuple[Tensor, int]:
        flow = torch.zeros(NODES, dtype=DOUBLE).index_add(0, target, tree["weight"] * tree["u"][source].sin())
        return (flow**3).sum() + tree["scale"] ** 3, 7

    tree = {
        "u": torch.randn(NODES, dtype=DOUBLE), "weight": torch.randn(3 * NODES, dtype=DOUBLE),
        "scale": torch.tensor(2.0, dtype=DOUBLE), "unused": torch.ones(0, 3, dtype=DOUBLE),
    }  # fmt: skip
    whole = torch.func.hessian(lambda tree: function(tree)[0])(tree)
    for _ in range(2):
        found, aux = chainrule.hessian_diagonal(function, has_aux=True)(tree)
        assert aux == 7
        for name, leaf in tree.items():
            expected = whole[name][name].reshape(leaf.numel(), leaf.numel()).diagonal().reshape(leaf.shape)
            torch.testing.assert_close(found[name], expected, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("name", ["diagonal", "laplacian", "differences", "divergence", "brusselator"])
def test_the_bytes_of_a_plan_are_linear_in_the_nodes(name: str) -> None:
    """Of a matrix, there would be as many numbers per node as there are nodes."""
    nodes = 4000
    if name == "brusselator":
        found = chainrule.explain(chainrule.divergence(brusselator(sliced)))(brusselator_state(45))
    else:
        found = chainrule.explain(CASES[name][0])(torch.randn(nodes, dtype=DOUBLE), *edges(nodes))
    for account in found.accounts:
        (taken,) = [a for a in account.alternatives if a["order"] == account.chosen]
        assert taken["peak_bytes"] <= 200 * 8 * nodes


def test_a_network_keeps_its_forward_maps() -> None:
    """Where the Hessian is dense, curvatures are contracted, whatever its size."""
    first, second = torch.randn(8, 400, dtype=DOUBLE) / 20, torch.randn(8, 8, dtype=DOUBLE)

    def function(x: Tensor) -> Tensor:
        return torch.tanh(second @ torch.tanh(first @ x)).sum()

    x = torch.randn(400, dtype=DOUBLE)
    found = chainrule.explain(chainrule.laplacian(function))(x)
    assert [account.chosen for account in found.accounts] == ["curvatures"]
    torch.testing.assert_close(chainrule.laplacian(function)(x), trace(gradient(function))(x), rtol=1e-11, atol=1e-11)
