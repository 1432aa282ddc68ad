"""Sums of many terms as one: taps that lead to the same places, against dense sums."""

from __future__ import annotations

import pytest
import torch

import chainrule
from chainrule.maps import stacks
from chainrule.maps.nodes import Node
from chainrule.maps.nonzeros import entries_of
from chainrule.maps.sparse import SparseWorkspace
from chainrule.maps.terms import Axis, Factor, Term

DOUBLE = torch.float64


def constant(value: torch.Tensor) -> Node:
    return Node(tuple(value.shape), (), lambda program: program.constant(value), label="test")


def gathered(workspace: SparseWorkspace, index: torch.Tensor, columns: int, values: torch.Tensor | None, scale: float) -> Term:
    """Rows that read one place each, with the values on them (None for ones)."""
    row, column = Axis(index.numel()), Axis(columns)
    factors = () if values is None else (Factor(constant(values), (row,)),)
    return Term(((row,),), ((column,),), factors, (workspace.relation(index, (row,), column),), scale)


def diagonal(size: int, values: torch.Tensor | None) -> Term:
    axis = Axis(size)
    return Term(((axis,),), ((axis,),), () if values is None else (Factor(constant(values), (axis,)),))


def dense_of(terms: list[Term], workspace: SparseWorkspace, shape: tuple[int, int]) -> torch.Tensor:
    """The sum of the entries of terms, listed one by one."""
    total = torch.zeros(shape[0] * shape[1], dtype=DOUBLE)
    for term in terms:
        entries = entries_of(term, workspace)
        sizes = tuple(axis.size for axis in entries.grid)
        value = entries.factor.node.force(workspace.program).value
        value = value.reshape([axis.size if axis in entries.factor.axes else 1 for axis in entries.grid]).expand(sizes).reshape(-1)
        total.index_add_(0, entries.keys, value if entries.kept is None else value[entries.kept])
    return total.reshape(shape)


@pytest.mark.parametrize("partial", [False, True])
def test_a_sum_of_gathers_is_one_term(monkeypatch: pytest.MonkeyPatch, partial: bool) -> None:
    """Equal indices are one tap; the values are those of the terms one by one, to rounding of sums of at most three."""
    monkeypatch.setattr(stacks, "_DISTINCT", 0.0)
    n = 11
    workspace = SparseWorkspace(DOUBLE, torch.device("cpu"))
    indices = [torch.arange(n).roll(shift) for shift in range(6)] + [torch.randint(0, n, (n,)) for _ in range(2)]
    if partial:
        indices = [torch.where(torch.rand(n) < 0.3, -1, index) for index in indices]
    terms = [gathered(workspace, i, n, torch.randn(n, dtype=DOUBLE) if number % 3 else None, 0.5) for number, i in
             enumerate([*indices, *indices[:5], indices[0]])]  # fmt: skip
    terms.append(diagonal(n, torch.randn(n, dtype=DOUBLE)))
    (one,) = stacks.stacked(terms, workspace, 12)
    (tap,) = set(one.onehots[0].sources) - {axis for dim in one.out_dims for axis in dim}
    assert tap.size == len(indices)  # a roll by nothing is the diagonal, also where places are missing
    wanted = dense_of(terms, workspace, (n, n))
    assert torch.allclose(dense_of([one], workspace, (n, n)), wanted, rtol=0, atol=1e-14)


def test_what_has_no_taps_stays() -> None:
    """Dense terms, few terms and terms with no place in common are left alone."""
    n = 5
    workspace = SparseWorkspace(DOUBLE, torch.device("cpu"))
    row, column = Axis(n), Axis(n)
    dense = Term(((row,),), ((column,),), (Factor(constant(torch.randn(n, n, dtype=DOUBLE)), (row, column)),))
    rolls = [gathered(workspace, torch.arange(n).roll(s), n, None, 1.0) for s in range(4)]
    assert stacks.stacked([dense, dense], workspace, 1) == [dense, dense]
    assert stacks.stacked(rolls, workspace, 12) == rolls
    found = stacks.stacked([dense, *rolls], workspace, 4)
    assert found[0] is dense and len(found) == 2


def test_taps_that_meet_are_added_up() -> None:
    """Where many taps lead to one place, entries are listed, each once."""
    n = 6
    workspace = SparseWorkspace(DOUBLE, torch.device("cpu"))
    terms = [gathered(workspace, torch.randint(0, n, (n,)), n, torch.randn(n, dtype=DOUBLE), 1.0) for _ in range(30)]
    (one,) = stacks.stacked(terms, workspace, 12)
    assert entries_of(one, workspace).keys.unique().numel() == entries_of(one, workspace).keys.numel() <= n * n
    wanted = dense_of(terms, workspace, (n, n))
    assert torch.allclose(dense_of([one], workspace, (n, n)), wanted, rtol=0, atol=1e-13)


def test_equal_indices_are_one_node_whatever_their_fingerprints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Indices are told apart by their elements."""
    monkeypatch.setattr(SparseWorkspace, "_fingerprint", lambda self, tensor: 0)
    workspace = SparseWorkspace(DOUBLE, torch.device("cpu"))
    one, two, three = (workspace.index(torch.tensor(places)) for places in ([0, 2], [0, 3], [0, 2]))
    assert one is three and one is not two


@pytest.mark.parametrize("shape", [(40,), (6, 7), (3, 1, 9)])
@pytest.mark.parametrize("steps", [1, 4, 7, 13])
def test_many_steps_of_a_stencil(shape: tuple[int, ...], steps: int) -> None:
    """Jacobian and Hessian of unrolled steps, first and second call; errors grow with the steps, a few ulps each."""

    def step(u: torch.Tensor) -> torch.Tensor:
        spread = sum(u.roll(s, d) - u for s in (-1, 1) for d in range(u.dim()))
        return u + 0.1 * spread + 0.05 * u * (1 - u)

    def unrolled(u: torch.Tensor) -> torch.Tensor:
        for _ in range(steps):
            u = step(u)
        return u

    sparse = chainrule.jacobian(unrolled, layout="sparse_coo")
    curved = chainrule.hessian(lambda u: (unrolled(u) ** 3).sum(), layout="sparse_coo")
    for _ in range(2):
        u = torch.rand(shape, dtype=DOUBLE)
        wanted = torch.func.jacrev(unrolled)(u)
        found = sparse(u)
        assert torch.allclose(found.to_dense(), wanted, rtol=0, atol=steps * 1e-14)
        assert found._nnz() == int((wanted != 0).sum())
        hessian = torch.func.hessian(lambda u: (unrolled(u) ** 3).sum())(u)
        assert torch.allclose(curved(u).to_dense(), hessian, rtol=0, atol=steps * 1e-12)
