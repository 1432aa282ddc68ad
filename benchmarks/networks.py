"""Small networks that several rows share: as plain functions, and as modules called with given parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Tensor = torch.Tensor


def mlp(x: Tensor, *parameters: Tensor) -> Tensor:
    """Linear layers with tanh between them; ``parameters`` are weight, bias, weight, bias, ..."""
    for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
        x = F.linear(x, weight, bias).tanh()
    return F.linear(x, parameters[-2], parameters[-1])


def scalar_mlp(x: Tensor, *parameters: Tensor) -> Tensor:
    """An ``mlp`` with one output, without the dimension of that output."""
    return mlp(x, *parameters).squeeze(-1)


def mlp_parameters(widths: Sequence[int]) -> tuple[Tensor, ...]:
    """Weights that keep activations of order one, and biases."""
    found = []
    for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
        found += [torch.randn(outputs, inputs) / math.sqrt(inputs), 0.1 * torch.randn(outputs)]
    return tuple(t.double() for t in found)


def mlp_inputs(widths: Sequence[int], batch: int) -> Callable[[], tuple[Tensor, ...]]:
    """Makes a batch of inputs and the parameters of an ``mlp``."""
    return lambda: (torch.randn(batch, widths[0]).double(), *mlp_parameters(widths))


def jax_mlp(jax: Any) -> Callable[..., Any]:
    """``mlp`` in JAX."""

    def function(x: Any, *parameters: Any) -> Any:
        for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
            x = jax.numpy.tanh(x @ weight.T + bias)
        return x @ parameters[-2].T + parameters[-1]

    return function


class Architecture:
    """A module without storage, to be called with parameters from elsewhere.

    Attributes:
        module: the module, on the meta device.
        names: the names of its parameters, in the module's order.
    """

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        with torch.device("meta"):
            self.module = make()
        self.shapes = {name: parameter.shape for name, parameter in self.module.named_parameters()}
        self.names = tuple(self.shapes)

    def parameters(self) -> tuple[Tensor, ...]:
        """New random parameters, in the order of ``names``; those of normalizations are around one."""
        found = []
        for name, shape in self.shapes.items():
            if len(shape) > 1:
                found.append(torch.randn(shape) / math.sqrt(shape[1:].numel()))
            else:
                found.append(("norm" in name and name.endswith("weight")) + 0.1 * torch.randn(shape))
        return tuple(t.double() for t in found)

    def named(self, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
        """The dictionary that ``functional_call`` takes."""
        return dict(zip(self.names, parameters, strict=True))

    def calling(self, library: Any) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
        """The network as a function of parameters and input, by a library's ``functional_call``."""

        def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return library.functional_call(self.module, parameters, (x,))

        return call


def mlp_architecture(widths: Sequence[int]) -> Architecture:
    """Linear layers with tanh between them."""

    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(inputs, outputs), nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    return Architecture(make)


def cnn_architecture(side: int = 28) -> Architecture:
    """Two 3×3 convolutions, pooling and a linear layer on one-channel images."""
    return Architecture(
        lambda: nn.Sequential(
            nn.Conv2d(1, 16, 3),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(-3),
            nn.Linear(32 * ((side - 4) // 2) ** 2, 10),
        )
    )


def encoder_architecture(width: int = 64, heads: int = 4) -> Architecture:
    """A transformer encoder block."""
    return Architecture(lambda: nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True))


def classifier_architecture(length: int, width: int, heads: int) -> Architecture:
    """A transformer encoder block and a linear layer on all its positions."""
    return Architecture(
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True),
            nn.Flatten(-2),
            nn.Linear(length * width, 10),
        )
    )


def cross_entropy(library: Any, architecture: Architecture) -> Callable[..., Tensor]:
    """The loss of a network as a function of parameters, input and targets."""
    call = architecture.calling(library)
    return lambda parameters, x, targets: F.cross_entropy(call(parameters, x), targets)
