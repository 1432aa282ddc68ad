"""Contractions in every broadcasting form, against torch.func in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import chainrule
from tests.rules.test_layers import check, randn

CASES: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "mm": (torch.mm, (randn(2, 3), randn(3, 4))),
    "bmm": (torch.bmm, (randn(2, 2, 3), randn(2, 3, 1))),
    "mv": (torch.mv, (randn(2, 3), randn(3))),
    "dot": (torch.dot, (randn(3), randn(3) + 1)),
    "vdot": (torch.vdot, (randn(3), randn(3) + 1)),
    "addmm": (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2.0), (randn(4), randn(2, 3), randn(3, 4))),
    "addmv": (lambda c, a, b: torch.addmv(c, a, b, beta=0.5), (randn(2), randn(2, 3), randn(3))),
    "addr": (lambda c, a, b: torch.addr(c, a, b, alpha=3.0), (randn(2, 3), randn(2), randn(3))),
    "baddbmm": (lambda c, a, b: torch.baddbmm(c, a, b, alpha=2.0), (randn(2, 1, 4), randn(2, 2, 3), randn(2, 3, 4))),
    "addbmm": (torch.addbmm, (randn(2, 4), randn(3, 2, 2), randn(3, 2, 4))),
    "matmul_vector_left": (torch.matmul, (randn(3), randn(2, 3, 4))),
    "matmul_vector_right": (torch.matmul, (randn(2, 2, 3), randn(3))),
    "matmul_broadcast": (torch.matmul, (randn(2, 1, 2, 3), randn(3, 3, 2))),
    "matmul_fold": (torch.matmul, (randn(2, 2, 3), randn(3, 2))),
    "linear": (F.linear, (randn(2, 2, 3), randn(4, 3), randn(4))),
    "bilinear": (F.bilinear, (randn(2, 3), randn(2, 4), randn(2, 3, 4), randn(2))),
    "outer": (torch.outer, (randn(2), randn(3))),
    "kron": (torch.kron, (randn(2, 3), randn(2, 2))),
    "cross": (torch.linalg.cross, (randn(2, 3), randn(2, 3) + 1)),
    "cross_broadcast": (torch.linalg.cross, (randn(1, 3), randn(2, 3))),
    "tensordot": (lambda a, b: torch.tensordot(a, b, dims=([1, 0], [0, 1])), (randn(2, 3), randn(3, 2, 2))),
    "einsum_chain": (lambda a, b, c: torch.einsum("ij,jk,ik->i", a, b, c), (randn(2, 3), randn(3, 4), randn(2, 4))),
    "einsum_trace": (lambda a: torch.einsum("ii->", a), (randn(3, 3),)),
    "einsum_diagonal": (lambda a, b: torch.einsum("bii,i->bi", a, b), (randn(2, 3, 3), randn(3))),
    "einsum_ellipsis": (lambda a, b: torch.einsum("...ij,...j->...i", a, b), (randn(2, 2, 3), randn(3))),
    "repeated_operand": (lambda a: a @ a.mT @ a, (randn(2, 3),)),
    "squared_matrix": (lambda a: a @ a, (randn(3, 3),)),
    "squared_stack": (lambda a: torch.matmul(a, a), (randn(2, 1, 3, 3),)),
    "squared_vector": (lambda a: a @ a, (randn(4),)),
    "einsum_same_twice": (lambda a: torch.einsum("ij,jk->ki", a, a), (randn(3, 3),)),
    "einsum_vectors": (lambda a: torch.einsum("i,j->ij", a, a), (randn(3),)),
    "einsum_one_operand": (lambda a: torch.einsum("ijk->kj", a), (randn(2, 3, 4),)),
    "einsum_implicit_output": (lambda a, b: torch.einsum("ij,jk", a, b), (randn(2, 3), randn(3, 4))),
    "einsum_summed_alone": (lambda a, b: torch.einsum("ij,k->k", a, b), (randn(2, 3), randn(4))),
    "empty_contraction": (torch.mm, (randn(2, 0), randn(0, 3))),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_product(name: str) -> None:
    """Every mode agrees with torch.func."""
    check(*CASES[name])


@pytest.mark.parametrize("convert", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
@pytest.mark.parametrize("is_leaf", [False, True])
def test_results_join_the_graph_of_a_constant_sparse_matrix(convert: Callable[..., Any], is_leaf: bool) -> None:
    dense = torch.randn(4, 4, dtype=torch.float64) * (torch.rand(4, 4) > 0.4)
    x = torch.randn(4, dtype=torch.float64)

    def function(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return (matrix @ x[:, None].sin())[:, 0] ** 2

    expected_of = {
        "jacobian": torch.func.jacrev(function), "jacfwd": torch.func.jacfwd(function), "coo": torch.func.jacrev(function),
        "hessian": torch.func.hessian(lambda x, a: function(x, a).sin().sum()),
    }  # fmt: skip
    found_of = {
        "jacobian": chainrule.jacobian(function), "jacfwd": chainrule.jacfwd(function),
        "coo": lambda x, a: chainrule.jacobian(function, layout="sparse_coo")(x, a).to_dense(),
        "hessian": chainrule.hessian(lambda x, a: function(x, a).sin().sum()),
    }  # fmt: skip
    for name, found in found_of.items():
        leaf = dense.clone().requires_grad_()
        expected = torch.autograd.grad((expected_of[name](x, leaf) ** 2).sum(), leaf)[0]
        for _ in range(3):
            if is_leaf:
                wanted = given = convert(dense).requires_grad_()
            else:
                wanted = dense.clone().requires_grad_()
                given = convert(wanted)
            (gradient,) = torch.autograd.grad((found(x, given) ** 2).sum(), wanted)
            gradient = gradient.to_dense() if gradient.layout is not torch.strided else gradient
            stored = dense != 0
            torch.testing.assert_close(gradient[stored], expected[stored], rtol=1e-10, atol=1e-10)


def test_entries_that_torch_has_no_derivative_of() -> None:
    places, values = torch.tensor([[0, 0, 1], [1, 1, 0]]), torch.ones(3, dtype=torch.float64)
    matrix = torch.sparse_coo_tensor(places, values, (2, 2)).requires_grad_()
    with pytest.raises(RuntimeError, match="not coalesced"):
        chainrule.jacobian(lambda x: torch.sparse.mm(matrix, x[:, None]))(torch.ones(2, dtype=torch.float64))
    assert chainrule.explain(chainrule.jacobian(lambda x: matrix.detach() @ x))(torch.ones(2, dtype=torch.float64)).peak > 0
