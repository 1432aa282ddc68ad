"""The opaque fallback: torch's own formula of a single op, in every mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import chainrule
from chainrule.rules.table import rule_for
from tests.rules.sweep_operator_database import sweep
from tests.rules.test_layers import assert_same, check, check_first, randn

aten = torch.ops.aten

CASES: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "matrix_exp": (torch.linalg.matrix_exp, (randn(2, 3, 3),)),
    "several_outputs": (lambda a: torch.linalg.qr(a), (randn(3, 2),)),
    "one_of_several_outputs": (lambda a: torch.linalg.qr(a)[1], (randn(3, 2),)),
    "unpool": (lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), (randn(1, 2, 4, 4),)),
}


@pytest.mark.parametrize("name", CASES)
def test_opaque(name: str) -> None:
    """Every mode agrees with torch.func."""
    check(*CASES[name])


def test_kind_is_named() -> None:
    """An op without a rule says so."""
    assert rule_for(aten.linalg_matrix_exp.default).kind == "opaque"


def test_forward_mode_of_an_op_whose_backward_has_no_derivative() -> None:
    """The local Jacobian is built from pullbacks where the pullback itself cannot be differentiated."""
    targets, lengths = torch.tensor([[1, 2, 1], [1, 1, 2]]), [[6, 6], [3, 2]]

    def loss(x: torch.Tensor) -> torch.Tensor:
        return F.ctc_loss(F.log_softmax(x, -1), targets, *lengths)

    x = randn(6, 2, 4)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(leaf), leaf)
    assert_same(chainrule.jacrev(loss)(x), wanted)
    assert_same(chainrule.jacfwd(loss)(x), wanted)


def test_result_joins_torch_autograd() -> None:
    """A Jacobian through an opaque op has a gradient when its input requires one."""
    x = randn(3, 3).requires_grad_()
    (got,) = torch.autograd.grad(chainrule.jacrev(torch.linalg.matrix_exp)(x).sin().sum(), x)
    wanted = torch.func.grad(lambda y: torch.func.jacrev(torch.linalg.matrix_exp)(y).sin().sum())(x.detach())
    assert_same(got, wanted)


def test_nested_transforms_keep_their_perturbations_apart() -> None:
    """An inner derivative through an opaque op is differentiated by the outer one."""
    x = randn(2, 2)

    def nested(transforms: Any) -> Any:
        return transforms.jacrev(lambda y: transforms.jacrev(lambda z: torch.linalg.matrix_exp(z * y))(x))(x)

    assert_same(nested(chainrule), nested(torch.func))


def test_index_relations_of_an_op_without_rows() -> None:
    """An output with no elements has an empty Jacobian."""
    check_first(torch.linalg.matrix_exp, (torch.zeros(0, 2, 2, dtype=torch.float64),))


#: Where torch.func is the one that is wrong, or gives another dtype in its reverse mode.
EXPECTED = {"native_layer_norm", "bfloat16", "float", "half"}


@pytest.mark.slow
def test_operator_database() -> None:
    """Nothing in PyTorch's operator database is wrong or fails where torch.func answers."""
    assert set(sweep(lambda name: True)) <= EXPECTED
