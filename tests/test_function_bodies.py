"""The bodies of torch's Python functions: the same values, and the calls in them are taken."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import chainrule
from chainrule.function_bodies import body_of

Tensor = torch.Tensor


def test_which_have_one() -> None:
    """Functions in Python with a door to function modes, and no others."""
    assert body_of(F.layer_norm) is body_of(F.layer_norm) is not None
    assert body_of(torch.sin) is None
    assert body_of(F.max_pool2d) is body_of(F.max_pool2d) is not None
    assert body_of(len) is None
    assert body_of(torch.Tensor.__rtruediv__) is not None


def test_globals_are_read_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that a user replaces is the one that is called."""
    body = body_of(F.normalize)
    assert body is not None
    x = torch.randn(3, 4)
    torch.testing.assert_close(body(x, dim=1), F.normalize(x, dim=1))
    monkeypatch.setattr(F, "torch", torch)
    monkeypatch.setitem(F.__dict__, "handle_torch_function", None)
    torch.testing.assert_close(body(x, p=1.0), F.normalize(x, p=1.0))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": lambda x: F.layer_norm(x, (4,), torch.arange(4.0).double(), eps=1e-3),
    "softmax": lambda x: F.softmax(x, dim=0),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "mse_loss": lambda x: F.mse_loss(x, x.detach() + 1, reduction="sum"),
    "huber_loss": lambda x: F.huber_loss(x, x.detach() * 3),
    "cross_entropy": lambda x: F.cross_entropy(x, torch.tensor([1, 0, 3])),
    "cross_entropy, ignored": lambda x: F.cross_entropy(x, torch.tensor([1, -100, 3]), reduction="none"),
    "cross_entropy, smoothed": lambda x: F.cross_entropy(x, torch.tensor([1, 0, 3]), label_smoothing=0.1),
    "nll_loss": lambda x: F.nll_loss(x, torch.tensor([1, -100, 3]), reduction="sum"),
    "dropout of nothing": lambda x: F.dropout(x, 0.0),
    "normalize": lambda x: F.normalize(x, dim=1),
    "glu": lambda x: F.glu(x),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "einsum of a list": lambda x: torch.einsum("ij,kj->ik", [x, x.sin()]),
    "einsum of one": lambda x: torch.einsum("ij->j", x),
    "einsum of three": lambda x: torch.einsum("ij,kj,k->i", x, x, x[:, 0]),
    "einsum of a diagonal": lambda x: torch.einsum("ii->i", x[:, :3]),
    "einsum that broadcasts": lambda x: torch.einsum("...j,kj", x, x),
    "operators": lambda x: 1 / (x + 9) + 2.0**x + (2 - x) + x.T.__rmatmul__(x)[:, :1],
    "split": lambda x: torch.split(x, 2, 1)[0],
    "attention": lambda x: F.multi_head_attention_forward(
        x[:, None], x[:, None], x[:, None], 4, 2, torch.eye(4).repeat(3, 1).double(), None, None, None, False, 0.0,
        torch.eye(4).double(), None, need_weights=False,
    )[0],
    "conv1d": lambda x: F.conv1d(x[None], torch.arange(6.0).double().view(1, 3, 2)),
    "conv1d of a sample": lambda x: F.conv1d(x, torch.arange(6.0).double().view(1, 3, 2), padding=1),
    "max_pool1d": lambda x: F.max_pool1d(x[None], 2),
    "max_pool2d": lambda x: F.max_pool2d(x[None], 2, 1, return_indices=False),
    "max_pool2d and places": lambda x: F.max_pool2d(x[None], 2, return_indices=True)[0],
    "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x, 2),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "lstm_cell": lambda x: torch.lstm_cell(x, (x[:, :2], x[:, 2:]), *weights(8, 4, 2))[0],
    "gru_cell": lambda x: torch.gru_cell(x, x[:, :2], *weights(6, 4, 2)),
    "gru": lambda x: torch.gru(x[:, None], x[:1, :2].expand(4, 1, 2), list(gru_weights()), True, 2, 0.0, False, True, False)[0],
    "gru, batch first": lambda x: torch.gru(x[None], x[:1, None, 2:], list(weights(6, 4, 2)), True, 1, 0.0, False, False, True)[1],
}  # fmt: skip


@functools.cache
def weights(rows: int, inputs: int, hidden: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, inputs), (rows, hidden), (rows,), (rows,))
    return tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)


def gru_weights() -> list[Tensor]:
    """Two layers, two directions, of width 2."""
    return [*weights(6, 4, 2), *weights(6, 4, 2), *weights(6, 4, 2), *weights(6, 4, 2)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_in_torch(name: str) -> None:
    """Values, gradients, and per-sample gradients agree with torch's autograd; second derivatives with torch.func."""
    function = FUNCTIONS[name]
    function(torch.zeros(3, 4, dtype=torch.float64))  # draws the weights

    def loss(x: Tensor) -> Tensor:
        return (function(x) ** 2).sum()

    # Torch's fused attention has no second derivative.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _compare(function, loss)


def _compare(function: Callable[[Tensor], Tensor], loss: Callable[[Tensor], Tensor]) -> None:
    many = torch.randn(3, 3, 4, dtype=torch.float64)
    gradients = []
    for sample in many:
        leaf = sample.clone().requires_grad_()
        gradients += torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(chainrule.vjp(function, many[0])[0], function(many[0]))
    torch.testing.assert_close(chainrule.grad(loss)(many[0]), gradients[0])
    torch.testing.assert_close(chainrule.vmap(chainrule.grad(loss))(many), torch.stack(gradients))
    v = torch.randn(3, 4, dtype=torch.float64)
    leaf = many[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first, leaf, v) if first.requires_grad else (torch.zeros_like(v),)
    torch.testing.assert_close(chainrule.hvp(loss, (many[0],), (v,)), second)
