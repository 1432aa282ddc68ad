"""Hessians of losses, and the Gauss-Newton product (B1, B10, B15, B18)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import chainrule
from benchmarks import jax_peers
from benchmarks.networks import mlp_architecture
from benchmarks.peers import hessians
from benchmarks.workload import Expression, Targets, Workload

tf = torch.func
Tensor = torch.Tensor


def logistic_loss(parameters: Tensor, data: Tensor, labels: Tensor) -> Tensor:
    """The negative log-likelihood of logistic regression, labels 0 and 1."""
    logits = data @ parameters
    return F.softplus(logits).sum() - labels @ logits


def factorisation_loss(left: Tensor, right: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The squared error of a factorisation on the observed entries."""
    return (mask * (target - left @ right.t()) ** 2).sum()


def deep_loss(first: Tensor, x: Tensor, targets: Tensor, *others: Tensor) -> Tensor:
    """Softmax cross-entropy of tanh layers without bias."""
    for weight in (first, *others):
        x = (x @ weight.t()).tanh()
    return F.cross_entropy(x, targets)


# --- formulas written by hand ---------------------------------------------------------------------------------------


def hand_logistic_hessian(parameters: Tensor, data: Tensor, labels: Tensor) -> Tensor:
    """Xᵀ diag(s (1 − s)) X."""
    probability = (data @ parameters).sigmoid()
    return data.t() @ ((probability * (1 - probability)).unsqueeze(-1) * data)


def hand_factorisation_hessian(left: Tensor, right: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """2 Vᵀ diag(Ωᵢ) V for every row i of U, on the block diagonal. Shape (n, k, n, k)."""
    rows, rank = left.shape
    outer = (right.unsqueeze(-1) * right.unsqueeze(-2)).reshape(-1, rank * rank)
    hessian = left.new_zeros(rows, rank, rows, rank)
    hessian.diagonal(0, 0, 2).copy_((2 * mask @ outer).view(rows, rank, rank).permute(1, 2, 0))
    return hessian


def hand_deep_hessian(first: Tensor, x: Tensor, targets: Tensor, *others: Tensor) -> Tensor:
    """The Hessian of each sample wrt its first activations, contracted with the inputs' outer products.

    Per sample it is the sum over the layers of Jᵀ diag(cotangent · curvature) J, and Jᵀ (diag(p) − p pᵀ) J of the loss.
    """
    batch = x.shape[0]
    values, jacobians = [(x @ first.t()).tanh()], [torch.eye(first.shape[0], dtype=x.dtype, device=x.device)]
    for weight in others:
        slope = 1 - values[-1].square()
        jacobians.append(weight @ (slope.unsqueeze(-1) * jacobians[-1]))
        values.append((values[-1] @ weight.t()).tanh())
    last = (1 - values[-1].square()).unsqueeze(-1) * jacobians[-1]
    probability = values[-1].softmax(-1)
    spread = probability.unsqueeze(-1) * last
    hessian = last.mT @ (spread - probability.unsqueeze(-1) * spread.sum(1, keepdim=True))
    cotangent = probability - F.one_hot(targets, probability.shape[-1])
    for weight, value, jacobian in zip((None, *others)[::-1], values[::-1], jacobians[::-1], strict=True):
        cotangent = cotangent * (1 - value.square())
        curvature = -2 * value * cotangent
        if weight is None:
            hessian = hessian + torch.diag_embed(curvature)
        else:
            hessian = torch.baddbmm(hessian, jacobian.mT, curvature.unsqueeze(-1) * jacobian)
            cotangent = cotangent @ weight
    outer = (x.unsqueeze(-1) * x.unsqueeze(-2)).view(batch, -1) / batch
    product = hessian.reshape(batch, -1).t() @ outer
    size, inputs = first.shape
    return product.view(size, size, inputs, inputs).transpose(1, 2).contiguous()


def hand_gauss_newton(x: Tensor, targets: Tensor, *both: Tensor) -> list[Tensor]:
    """Tangents forward through the layers, the softmax's covariance, cotangents back."""
    parameters, tangents = both[: len(both) // 2], both[len(both) // 2 :]
    values, tangent = [x], None
    layers = list(zip(parameters[::2], parameters[1::2], tangents[::2], tangents[1::2], strict=True))
    for number, (weight, bias, weight_tangent, bias_tangent) in enumerate(layers):
        value = F.linear(values[-1], weight, bias)
        change = F.linear(values[-1], weight_tangent, bias_tangent)
        tangent = change if tangent is None else change + tangent @ weight.t()
        if number + 1 < len(layers):
            value = value.tanh()
            tangent = tangent * (1 - value * value)
        values.append(value)
    probability = values[-1].softmax(-1)
    spread = probability * tangent
    cotangent = (spread - probability * spread.sum(-1, keepdim=True)) / x.shape[0]
    found: list[Tensor] = []
    for number in reversed(range(len(layers))):
        found = [cotangent.t() @ values[number], cotangent.sum(0), *found]
        if number:
            cotangent = (cotangent @ layers[number][0]) * (1 - values[number] * values[number])
    return found


# --- chainrule and torch.func ---------------------------------------------------------------------------------------


def _gauss_newton(library: Any, way: str, widths: Sequence[int]) -> Expression:
    architecture = mlp_architecture(widths)
    call = architecture.calling(library)

    def product(x: Tensor, targets: Tensor, *both: Tensor) -> Any:
        primals, tangents = (architecture.named(part) for part in (both[: len(both) // 2], both[len(both) // 2 :]))
        function, loss = lambda p: call(p, x), lambda out: F.cross_entropy(out, targets)
        if way == "ggn":
            return library.ggn(function, loss, (primals,), (tangents,))
        if way == "linearize":
            value, push = library.linearize(function, primals)
            tangent = push(tangents)
        else:
            value, tangent = library.jvp(function, (primals,), (tangents,))
        pullback = library.vjp(function, primals)[1]
        if way == "jvp, softmax by hand, vjp":
            probability = value.softmax(-1)
            spread = probability * tangent
            change = (spread - probability * spread.sum(-1, keepdim=True)) / len(value)
        elif way == "double vjp":
            change = library.vjp(library.grad(loss), value)[1](tangent)[0]
        else:
            change = library.jvp(library.grad(loss), (value,), (tangent,))[1]
        return pullback(change)[0]

    return product


# --- JAX ------------------------------------------------------------------------------------------------------------


def _jax_logistic(jax: Any) -> dict[str, Expression]:
    def loss(parameters: Any, data: Any, labels: Any) -> Any:
        logits = data @ parameters
        return jax.nn.softplus(logits).sum() - labels @ logits

    return {"hessian": jax.hessian(loss)}


def _jax_factorisation(jax: Any) -> dict[str, Expression]:
    return {"hessian": jax.hessian(lambda left, right, target, mask: (mask * (target - left @ right.T) ** 2).sum())}


# --- the rows -------------------------------------------------------------------------------------------------------


def logistic_row(samples: int, features: int, **options: Any) -> Workload:
    """B1."""

    def make() -> tuple[Tensor, ...]:
        labels = torch.randint(0, 2, (samples,))
        return torch.randn(features).double() / math.sqrt(features), torch.randn(samples, features).double(), labels.double()

    return Workload(
        key="B1",
        title=f"Hessian of the logistic loss, X {samples}×{features}",
        inputs=make,
        ours={"hessian": chainrule.hessian(logistic_loss)},
        peers=hessians(logistic_loss),
        hand=hand_logistic_hessian,
        jax=_jax_logistic,
        targets=Targets(40, 1.5),
        **options,
    )


def gauss_newton_row(widths: Sequence[int], batch: int) -> Workload:
    """B10."""

    def make() -> tuple[Tensor, ...]:
        architecture = mlp_architecture(widths)
        targets = torch.randint(0, widths[-1], (batch,))
        return torch.randn(batch, widths[0]).double(), targets, *architecture.parameters(), *architecture.parameters()

    ways = ("jvp and vjp", "double vjp", "jvp, softmax by hand, vjp")
    ours = [*(["ggn"] if hasattr(chainrule, "ggn") else []), *ways, "linearize"]
    return Workload(
        key="B10",
        title=f"Gauss–Newton product, MLP {'-'.join(map(str, widths))} with softmax cross-entropy, batch {batch}",
        inputs=make,
        ours={way: _gauss_newton(chainrule, way, widths) for way in ours},
        peers={way: _gauss_newton(tf, way, widths) for way in ways},
        hand=hand_gauss_newton,
        jax=partial(jax_peers.gauss_newton_product, jax_peers.mlp_network),
        targets=Targets(1.2),
    )


def factorisation_row(rows: int, rank: int, chunks: Sequence[int | None], key: str = "B15") -> Workload:
    """B15, dense; where peers have no room, without them (no chunks)."""

    def make() -> tuple[Tensor, ...]:
        mask = torch.bernoulli(torch.full((rows, rows), 0.1))
        return tuple(t.double() for t in (torch.randn(rows, rank), torch.randn(rows, rank), torch.randn(rows, rows), mask))

    return Workload(
        key=key,
        title=f"Hessian wrt U of Σ Ω∘(T − U Vᵀ)², n=m={rows}, k={rank}, float64, dense",
        inputs=make,
        ours={"hessian": chainrule.hessian(factorisation_loss)},
        peers=hessians(factorisation_loss, chunks=chunks) if chunks else {},
        hand=hand_factorisation_hessian,
        jax=_jax_factorisation if chunks else None,
        targets=Targets(10 if chunks else None, 2),
        dtype=torch.float64,
    )


def deep_row(layers: int, width: int, batch: int, chunks: Sequence[int | None]) -> Workload:
    """B18."""

    def make() -> tuple[Tensor, ...]:
        weights = [torch.randn(width, width).double() / math.sqrt(width) for _ in range(layers)]
        return weights[0], torch.randn(batch, width).double(), torch.randint(0, width, (batch,)), *weights[1:]

    return Workload(
        key="B18",
        title=f"Hessian wrt the first weights, {layers} tanh layers {width}×{width}, cross-entropy, batch {batch}, float64",
        inputs=make,
        ours={"hessian": chainrule.hessian(deep_loss)},
        peers=hessians(deep_loss, chunks=chunks),
        hand=hand_deep_hessian,
        jax=jax_peers.deep_hessian,
        targets=Targets(4),
        dtype=torch.float64,
    )


WORKLOADS: tuple[Workload, ...] = (
    logistic_row(1000, 300, sizes={n: logistic_row(1000, n) for n in (200, 400, 800, 1600)}),
    gauss_newton_row((32, 128, 128, 10), 128),
    factorisation_row(300, 5, (None, 32, 128)),
    factorisation_row(1000, 5, (), key="B15l"),
    deep_row(10, 64, 64, (64, 256, 1024)),
)

#: The same rows at sizes that every test run can afford.
SMALL: tuple[Workload, ...] = (
    logistic_row(20, 6),
    gauss_newton_row((5, 8, 7, 4), 6),
    factorisation_row(7, 2, (None, 4)),
    factorisation_row(9, 2, (), key="B15l"),
    deep_row(4, 5, 6, (None, 4)),
)
