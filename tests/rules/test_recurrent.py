"""LSTM layers that torch runs as one kernel, in float32; the oracle is torch's own composition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import chainrule
from chainrule.rules import opaque, recurrent

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {}, "batch first": {"batch_first": True}, "both directions": {"bidirectional": True}, "no bias": {"bias": False},
    "layers": {"num_layers": 2, "bidirectional": True},
}  # fmt: skip

#: Outputs, the last hidden state, the last cell state, and all of them.
LOSSES = {
    "output": lambda out, hidden, cell: out.sin().sum(),
    "hidden": lambda out, hidden, cell: (hidden * hidden).sum(),
    "cell": lambda out, hidden, cell: cell.sin().sum(),
    "all": lambda out, hidden, cell: (out * out).sum() + hidden.sin().sum() * cell.sum(),
}

#: float32, sums of some hundred numbers of size one.
CLOSE: dict[str, float] = {"rtol": 1e-3, "atol": 1e-4}


def layers(options: dict[str, Any]) -> tuple[nn.LSTM, nn.LSTM]:
    layer = nn.LSTM(3, 4, **options)
    twin = nn.LSTM(3, 4, **options).double()
    twin.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    return layer, twin


def inputs(layer: nn.LSTM, steps: int = 5, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    count = layer.num_layers * (1 + layer.bidirectional)
    shape = (batch, steps, 3) if layer.batch_first else (steps, batch, 3)
    return torch.randn(shape), torch.randn(count, batch, 4), torch.randn(count, batch, 4)


def loss_of(layer: nn.LSTM, name: str) -> Any:
    def loss(parameters: dict[str, Tensor], x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        out, (hidden, cell) = torch.func.functional_call(layer, parameters, (x, (h, c)))
        found: Tensor = LOSSES[name](out, hidden, cell)
        return found

    return loss


def leaves_in_double(layer: nn.LSTM, given: tuple[Tensor, ...]) -> tuple[Any, ...]:
    parameters = {name: value.detach().double().requires_grad_() for name, value in layer.named_parameters()}
    return parameters, *(item.double().requires_grad_() for item in given)


def compare(found: Any, expected: Any) -> None:
    largest = max(other.abs().max().item() for other in expected)
    for one, other in zip(tree_leaves(found), expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=CLOSE["rtol"], atol=CLOSE["atol"] * max(1.0, largest))


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_and_their_gradients(options: str, name: str, requires_grad: bool) -> None:
    """By the kernel of the derivative, where nothing requires grad, and by a formula that is differentiated again."""
    layer, twin = layers(OPTIONS[options])
    parameters = {name: value.detach().requires_grad_(requires_grad) for name, value in layer.named_parameters()}
    loss = loss_of(layer, name)
    for _ in range(3):
        given = inputs(layer)
        leaves = leaves_in_double(layer, given)
        expected = torch.autograd.grad(loss_of(twin, name)(*leaves), tree_leaves(leaves), create_graph=True)
        found = chainrule.grad(loss, (0, 1, 2, 3))(parameters, *given)
        compare(found, expected)
        wanted = torch.autograd.grad(sum((g * g).sum() for g in expected), tree_leaves(leaves))

        def penalty(*items: Any) -> Tensor:
            return sum((g * g).sum() for g in tree_leaves(chainrule.grad(loss, (0, 1, 2, 3))(*items)))

        compare(chainrule.grad(penalty, (0, 1, 2, 3))(parameters, *given), wanted)
        if requires_grad:
            total = sum((g * g).sum() for g in tree_leaves(found))
            compare(torch.autograd.grad(total, [*parameters.values()]), wanted[: len(parameters)])


@pytest.mark.parametrize("options", OPTIONS)
def test_rows_of_cotangents(options: str) -> None:
    """Jacobians and mapped cotangents pull several rows at once, and mapped inputs a row each."""
    layer, twin = layers(OPTIONS[options])
    x, h, c = inputs(layer, 3)
    wanted = torch.func.jacrev(lambda a: twin(a, (h.double(), c.double()))[0])(x.double())
    found = chainrule.jacrev(lambda a: layer(a, (h, c))[0])(x)
    torch.testing.assert_close(found.double(), wanted, **CLOSE)
    out, pull = chainrule.vjp(lambda a: layer(a, (h, c))[0], x)
    rows = torch.randn(3, *out.shape)
    torch.testing.assert_close(chainrule.vmap(pull)(rows)[0].double(), torch.tensordot(rows.double(), wanted, out.dim()), **CLOSE)
    points = torch.stack([x, x.sin()])
    mapped = chainrule.vmap(chainrule.grad(lambda a: layer(a, (h, c))[0].sin().sum()))(points)
    single = torch.stack([torch.func.grad(lambda a: twin(a, (h.double(), c.double()))[0].sin().sum())(p.double()) for p in points])
    torch.testing.assert_close(mapped.double(), single, **CLOSE)


@pytest.mark.parametrize("shape", [(1, 2), (4, 1), (1, 1)])
def test_a_state_that_stands_twice(shape: tuple[int, int]) -> None:
    """One tensor as the hidden state and the cell state gets the sum of both cotangents; one step, one sample."""
    layer, twin = layers({})
    for requires_grad in (False, True):
        layer.requires_grad_(requires_grad)
        x, h, _ = inputs(layer, *shape)
        wanted = torch.func.grad(lambda s: twin(x.double(), (s, s))[0].sin().sum())(h.double())
        for _ in range(3):
            found = chainrule.grad(lambda s: layer(x, (s, s))[0].sin().sum())(h)
            torch.testing.assert_close(found.double(), wanted, **CLOSE)


def test_the_kernel_is_taken_where_nothing_differentiates_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own formula is not asked; neither are the gates, if nothing requires grad."""
    ways: list[str] = []
    for place in ("_by_kernel", "_by_gates"):
        way = getattr(recurrent, place)
        monkeypatch.setattr(recurrent, place, lambda *args, way=way, place=place: ways.append(place) or way(*args))
    monkeypatch.setattr(opaque, "own_gradients", None)
    layer, _ = layers({"batch_first": True})
    (x, _, _), cotangent = inputs(layer), torch.randn(2, 5, 4)
    for requires_grad, way in ((True, "_by_gates"), (False, "_by_kernel")):
        layer.requires_grad_(requires_grad)
        for _ in range(3):
            ways.clear()
            chainrule.vjp(lambda a: layer(a)[0], x)[1](cotangent)
            assert ways == [way]
