"""Layers whose parameters require grad: recorded in parts that torch's autograd sees as they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import chainrule
from chainrule.capture.tape import Tape
from chainrule.shortcuts import COMPILED

DOUBLE = torch.float64


class Attention(nn.Module):
    """Causal attention of linear functions of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The attention, of four dimensions."""
        query, key = self.query(x.transpose(0, 1)).transpose(0, 1), self.key(x)
        return F.scaled_dot_product_attention(query.unsqueeze(1), key.unsqueeze(1), x.unsqueeze(1), is_causal=True).squeeze(1)


class Pieces(nn.Module):
    """Views of a product with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The pieces in another order."""
        one, two = (x @ self.weight).chunk(2, -1)
        return torch.cat([two.relu(), one.unflatten(-1, (2, 2)).flatten(-2)], -1) * self.weight[0]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 8),
    "linear without bias": lambda: nn.Linear(8, 8, bias=False),
    "layer norm": lambda: nn.LayerNorm(8),
    "attention": Attention,
    "pieces": Pieces,
    "encoder": lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True),
    "encoder, transposed": lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, norm_first=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_reach_the_parameters(name: str) -> None:
    """Through derivatives by the input, as in torch.func: some hundred products of size one, in double precision."""
    torch.manual_seed(0)
    layer = LAYERS[name]().to(DOUBLE)
    parameters = list(layer.parameters())

    def function(x: torch.Tensor) -> torch.Tensor:
        return layer(x).sin().mean((0, 1))

    def reached(library: object, x: torch.Tensor) -> list[torch.Tensor]:
        jacobian = library.jacrev(function)(x)  # type: ignore[attr-defined]
        # No third derivatives: torch's layer norm has wrong ones.
        total = (jacobian * torch.arange(jacobian.numel()).reshape(jacobian.shape)).sum()
        return [jacobian, *torch.autograd.grad(total, [x, *parameters], materialize_grads=True)]

    for _ in range(2):
        x = torch.randn(2, 3, 8, dtype=DOUBLE).requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # torch has no second derivative of the others
            torch.testing.assert_close(reached(chainrule, x), reached(torch.func, x), rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not COMPILED, reason="autograd's own calls are kept from the handlers in C only")
@pytest.mark.parametrize("name", [name for name in LAYERS if "encoder" not in name])
def test_nothing_goes_through_torchs_dispatcher(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each op on that way costs several times the op itself."""
    arrived: list[str] = []
    handler = Tape.__torch_dispatch__

    def counted(self: Tape, func: object, *rest: object) -> object:
        arrived.append(str(func))
        return handler(self, func, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Tape, "__torch_dispatch__", counted)
    layer = LAYERS[name]().to(DOUBLE)
    chainrule.grad(lambda x: layer(x).sum())(torch.randn(2, 3, 8, dtype=DOUBLE))
    assert arrived == []


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 2, 4, 5), (3, 5)])
def test_a_layer_that_a_vmap_hands_on(shape, bias):
    """Weights with a graph that are differentiated: the layer is recorded in parts, by the tape around the vmap."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    weight = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    added = torch.randn(2, dtype=torch.float64, requires_grad=True) if bias else None

    def layer(x, weight):
        return torch.nn.functional.linear(x, weight, added)

    for _ in range(3):
        ways = []
        for library in (chainrule, torch.func):
            found = library.grad(lambda x, w: library.vmap(layer, in_dims=(0, None))(x, w).sin().sum(), (0, 1))(x, weight)  # noqa: B023
            ways.append((found, torch.autograd.grad(sum(one.square().sum() for one in found), weight)))
        torch.testing.assert_close(*ways, rtol=1e-12, atol=1e-12)
