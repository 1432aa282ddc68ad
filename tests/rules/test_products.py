"""Contractions in every broadcasting form, against torch.func in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

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
