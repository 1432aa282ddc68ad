"""Plain networks of tensors that the workloads share."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def dense_layers(widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Weights and biases of a dense network, in turn, in float64."""
    made: list[Tensor] = []
    for inputs, outputs in itertools.pairwise(widths):
        made += [torch.randn(outputs, inputs).double() / inputs**0.5, torch.randn(outputs).double() / 4]
    return tuple(made)


def mlp(x: Tensor, *layers: Tensor) -> Tensor:
    """A tanh network without activation at its end; ``x`` is one sample or a batch."""
    for weight, bias in zip(layers[:-2:2], layers[1:-2:2], strict=True):
        x = torch.tanh(F.linear(x, weight, bias))
    return F.linear(x, layers[-2], layers[-1])


def unbatched_mlp(x: Tensor, *layers: Tensor) -> Tensor:
    """The same on one sample."""
    return mlp(x, *layers)


def scalar_mlp(x: Tensor, *layers: Tensor) -> Tensor:
    """The sum of the outputs for one sample."""
    return mlp(x, *layers).sum()
