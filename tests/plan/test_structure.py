"""The structure that plans must find, checked on predicted cost and on the calls, never on a clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import chainrule
from chainrule.execute.accounts import Account

F = torch.nn.functional


def predict(weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight, bias).tanh()


def account(transformed: Callable[..., Any], *args: Any) -> Account:
    return chainrule.explain(transformed)(*args).accounts[-1]


def chosen(found: Account) -> dict[str, Any]:
    return next(a for a in found.alternatives if a["order"] == found.chosen)


def calls(found: Account) -> list[str]:
    return [call["call"] for call in found.calls]


@pytest.mark.parametrize(("din", "dout"), [(32, 2048), (2048, 32), (1, 7), (7, 1)])
@pytest.mark.parametrize("transform", [chainrule.jacobian, chainrule.jacrev, chainrule.jacfwd])
def test_a_diagonal_times_a_matrix_costs_the_size_of_the_output(transform: Any, din: int, dout: int) -> None:
    args = torch.randn(dout, din), torch.randn(dout), torch.randn(din)
    found = account(transform(predict, argnums=2), *args)
    assert chosen(found)["flops"] <= 2 * din * dout + 2 * dout
    assert "eye" not in calls(found)
    assert "mm" not in calls(found)


def test_the_full_jacobian_of_a_batch_is_planned_as_small_blocks() -> None:
    batch, din, dout = 16, 5, 6
    args = torch.randn(dout, din), torch.randn(dout), torch.randn(batch, din)
    found = account(chainrule.jacobian(predict, argnums=2), *args)
    assert chosen(found)["flops"] <= 2 * batch * din * dout + 2 * batch * dout
    assert calls(found).count("embed_diagonals") == 1
    assert not {"eye", "mm", "bmm"} & set(calls(found))


def test_the_summed_output_form_needs_no_block_diagonal() -> None:
    args = torch.randn(6, 5), torch.randn(6), torch.randn(16, 5)
    found = account(chainrule.jacobian(lambda w, b, x: predict(w, b, x).sum(0), argnums=2), *args)
    assert chosen(found)["flops"] <= 2 * 16 * 5 * 6 + 2 * 16 * 6
    assert "embed_diagonals" not in calls(found)


def test_a_logistic_hessian_is_one_product_of_the_data_with_itself() -> None:
    rows, columns = 50, 20
    data, labels = torch.randn(rows, columns), torch.randn(rows)

    def loss(t: torch.Tensor) -> torch.Tensor:
        return F.softplus(data @ t).sum() - labels @ (data @ t)

    found = account(chainrule.hessian(loss), torch.randn(columns))
    products = [name for name in calls(found) if name in ("mm", "bmm", "matmul", "einsum")]
    assert products == ["mm"]
    assert chosen(found)["flops"] <= 1.3 * rows * columns * columns


def test_the_parameter_jacobian_of_a_layer_is_block_diagonal() -> None:
    size = 12
    args = torch.randn(size, size), torch.randn(size), torch.randn(size)
    found = account(chainrule.jacobian(predict, argnums=(0, 1)), *args)
    assert chosen(found)["flops"] <= 4 * size * size
    assert "eye" not in calls(found)


def test_a_chain_is_multiplied_in_the_cheapest_order() -> None:
    # 2 <- 40 <- 3 <- 40 <- 2: neither end-to-end order is optimal, the thin middle is.
    mats = [torch.randn(40, 2), torch.randn(3, 40), torch.randn(40, 3), torch.randn(2, 40)]

    def chain(x: torch.Tensor) -> torch.Tensor:
        for matrix in mats:
            x = matrix @ x
        return x

    tall = [torch.randn(60, 50), torch.randn(2, 60), torch.randn(60, 2), torch.randn(50, 60)]

    def bottleneck(x: torch.Tensor) -> torch.Tensor:
        for matrix in tall:
            x = matrix @ x
        return x

    for function, width in ((chain, 2), (bottleneck, 50)):
        found = account(chainrule.jacobian(function), torch.randn(width))
        best = chosen(found)
        assert all(best["cost"] <= other["cost"] for other in found.alternatives)
    optimum = 2 * 60 * 50 + 50 * 60 * 2 + 50 * 2 * 50
    assert best["flops"] <= 1.05 * optimum
    forward = next(a for a in found.alternatives if a["order"] == "forward")
    assert best["flops"] < 0.5 * forward["flops"]


def test_pinned_orders_differ_where_the_shape_does() -> None:
    wide = torch.randn(3, 50)

    def squeeze(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(wide @ torch.tanh(square @ torch.tanh(square @ x)))

    square = torch.randn(50, 50)
    reverse = chosen(account(chainrule.jacrev(squeeze), torch.randn(50)))
    forward = chosen(account(chainrule.jacfwd(squeeze), torch.randn(50)))
    assert reverse["flops"] < forward["flops"]
    assert chosen(account(chainrule.jacobian(squeeze), torch.randn(50)))["flops"] <= reverse["flops"]


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.reshape(3, 8),
        lambda x: x.reshape(-1),
        lambda x: x.permute(2, 0, 1),
        lambda x: x[:, 1:],
        lambda x: x[0],
        lambda x: x.roll(1, 0),
        lambda x: x.unsqueeze(0).transpose(1, 2).contiguous(),
    ],
    ids=["reshape", "flatten", "permute", "slice", "select", "roll", "transpose"],
)
def test_moving_elements_needs_no_dense_product(move: Callable[[torch.Tensor], torch.Tensor]) -> None:
    found = account(chainrule.jacobian(lambda x: move(torch.sin(x))), torch.randn(2, 3, 4))
    assert not {"mm", "bmm", "mv", "einsum"} & set(calls(found))
