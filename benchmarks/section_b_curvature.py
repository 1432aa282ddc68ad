"""Section B, second order: Hessians, Laplacians, diagonals, divergences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import chainrule
from benchmarks.networks import dense_layers, mlp, scalar_mlp
from benchmarks.workload import Expression, Targets, Workload

tf = torch.func
Tensor = torch.Tensor


# --- B1: logistic regression ------------------------------------------------------------------------------------------


def _logistic_loss(t: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    scores = features @ t
    return F.softplus(scores).sum() - labels @ scores


def hand_logistic(t: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Shape (n, n)."""
    p = torch.sigmoid(features @ t)
    return features.t() @ (features * (p * (1 - p)).unsqueeze(-1))


def _logistic(size: int, samples: int, **options: Any) -> Workload:
    return Workload(
        key="B1",
        title=f"Hessian of the logistic loss, X {samples}×{size}",
        inputs=lambda: (
            torch.randn(size).double() / 10, torch.randn(samples, size).double(), (torch.rand(samples) > 0.5).double()
        ),
        ours={"hessian": chainrule.hessian(_logistic_loss)},
        peers={
            "hessian": tf.hessian(_logistic_loss),
            "jacrev(jacrev)": tf.jacrev(tf.jacrev(_logistic_loss)),
            "jacfwd(grad)": tf.jacfwd(tf.grad(_logistic_loss)),
        },
        hand=hand_logistic,
        targets=Targets(40, 1.5),
        **options,
    )  # fmt: skip


# --- B2, B11, B19: Laplacians and diagonals ---------------------------------------------------------------------------


def hand_diagonal(x: Tensor, *layers: Tensor) -> Tensor:
    """The diagonal of the Hessian of a tanh network with one output, by pushing first and second derivatives forward."""
    weight, bias = layers[0], layers[1]
    hidden = torch.tanh(torch.addmm(bias, x, weight.t()))
    slope = 1 - hidden * hidden
    first = slope.unsqueeze(1) * weight.t()
    second = (-2 * hidden * slope).unsqueeze(1) * (weight * weight).t()
    for weight, bias in zip(layers[2:-2:2], layers[3:-2:2], strict=True):
        first, second = first @ weight.t(), second @ weight.t()
        hidden = torch.tanh(torch.addmm(bias, hidden, weight.t()))
        slope = (1 - hidden * hidden).unsqueeze(1)
        second = slope * second + (-2 * hidden).unsqueeze(1) * slope * first * first
        first = slope * first
    return second @ layers[-2][0]


def hand_laplacian(x: Tensor, *layers: Tensor) -> Tensor:
    """The forward Laplacian: hidden values, their Jacobians and their Laplacians, layer by layer."""
    weight, bias = layers[0], layers[1]
    hidden = torch.tanh(torch.addmm(bias, x, weight.t()))
    slope = 1 - hidden * hidden
    first = slope.unsqueeze(1) * weight.t()
    second = -2 * hidden * slope * (weight * weight).sum(1)
    for weight, bias in zip(layers[2:-2:2], layers[3:-2:2], strict=True):
        first, second = first @ weight.t(), second @ weight.t()
        hidden = torch.tanh(torch.addmm(bias, hidden, weight.t()))
        slope = 1 - hidden * hidden
        second = slope * second - 2 * hidden * slope * (first * first).sum(1)
        first = slope.unsqueeze(1) * first
    return second @ layers[-2][0]


def _curvatures(function: Expression) -> dict[str, Expression]:
    """Ways to the diagonal of the Hessian of a function of one sample."""

    def whole(transform: Callable[..., Any]) -> Expression:
        return lambda x, *layers: transform(function)(x, *layers).diagonal(0, -2, -1)

    def by_products(x: Tensor, *layers: Tensor) -> Tensor:
        gradient = tf.grad(partial(_flipped, function, layers))
        units = torch.eye(len(x), dtype=x.dtype, device=x.device)
        return tf.vmap(lambda unit: unit @ tf.jvp(gradient, (x,), (unit,))[1])(units)

    def by_tangents(x: Tensor, *layers: Tensor) -> Tensor:
        inside = partial(_flipped, function, layers)
        units = torch.eye(len(x), dtype=x.dtype, device=x.device)

        def second(unit: Tensor) -> Tensor:
            return tf.jvp(lambda y: tf.jvp(inside, (y,), (unit,))[1], (x,), (unit,))[1]

        return tf.vmap(second)(units)

    return {
        "hessian": whole(tf.hessian),
        "jvp(grad) of unit vectors": by_products,
        "jvp(jvp) of unit vectors": by_tangents,
    }


def _flipped(function: Expression, layers: tuple[Tensor, ...], x: Tensor) -> Any:
    return function(x, *layers)


def _per_sample(function: Expression, count: int, module: Any = tf) -> Expression:
    found: Expression = module.vmap(function, in_dims=(0, *(None,) * count))
    return found


def _total(function: Expression) -> Expression:
    return lambda x, *layers: function(x, *layers).sum(-1)


def _network_inputs(batch: int, widths: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(batch, widths[0]).double(), *dense_layers(widths))


def _laplacian(key: str, batch: int, widths: tuple[int, ...], targets: Targets, **options: Any) -> Workload:
    count = 2 * len(widths) - 2
    return Workload(
        key=key,
        title=f"Laplacian of a tanh MLP {'-'.join(map(str, widths))}, batch {batch}",
        inputs=_network_inputs(batch, widths),
        ours={"vmap(laplacian)": _per_sample(chainrule.laplacian(scalar_mlp), count, chainrule)},
        peers={f"vmap({name})": _per_sample(_total(made), count) for name, made in _curvatures(scalar_mlp).items()},
        hand=hand_laplacian,
        targets=targets,
        **options,
    )


def _bilaplacian_peers(function: Expression) -> dict[str, Expression]:
    def trace(inner: Expression) -> Expression:
        return lambda x, *layers: tf.hessian(inner)(x, *layers).diagonal(0, -2, -1).sum(-1)

    found = {"hessian of the hessian": trace(trace(function))}
    for name, made in _curvatures(function).items():
        if name != "hessian":
            found[name] = _total(_curvatures(_total(made))[name])
    return found


# --- B9: divergence ---------------------------------------------------------------------------------------------------


def hand_divergence(x: Tensor, *layers: Tensor) -> Tensor:
    """For two hidden layers: the product of the outer weights does not depend on the sample."""
    w1, b1, w2, b2, w3, _ = layers
    h1 = torch.tanh(torch.addmm(b1, x, w1.t()))
    h2 = torch.tanh(torch.addmm(b2, h1, w2.t()))
    return (((1 - h2 * h2) @ (w2 * (w1 @ w3).t())) * (1 - h1 * h1)).sum(-1)


def _traces() -> dict[str, Expression]:
    def products(x: Tensor, *layers: Tensor) -> Tensor:
        units = torch.eye(len(x), dtype=x.dtype, device=x.device)
        return tf.vmap(lambda unit: unit @ tf.jvp(lambda y: mlp(y, *layers), (x,), (unit,))[1])(units).sum()

    return {
        "jacrev": lambda x, *layers: tf.jacrev(mlp)(x, *layers).trace(),
        "jacfwd": lambda x, *layers: tf.jacfwd(mlp)(x, *layers).trace(),
        "jvp of unit vectors": products,
    }


# --- B15: matrix factorisation, B18: a deep network -------------------------------------------------------------------


def _factorisation(left: Tensor, right: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    return (mask * (target - left @ right.t()) ** 2).sum()


def hand_factorisation(left: Tensor, right: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Shape (n, k, n, k): one block of k² numbers for each row."""
    n, k = left.shape
    blocks = 2 * (mask @ (right.unsqueeze(-1) * right.unsqueeze(1)).flatten(1)).unflatten(1, (k, k))
    found = left.new_zeros(n, k, n, k)
    found.diagonal(0, 0, 2).copy_(blocks.movedim(0, -1))
    return found


def _factors() -> tuple[Tensor, ...]:
    n, k = 300, 5
    return (
        torch.randn(n, k).double(), torch.randn(n, k).double(), torch.randn(n, n).double(), (torch.rand(n, n) < 0.1).double()
    )  # fmt: skip


def _deep_loss(first: Tensor, x: Tensor, labels: Tensor, *rest: Tensor) -> Tensor:
    for weight in (first, *rest[:-1]):
        x = torch.tanh(x @ weight.t())
    return F.cross_entropy(x @ rest[-1].t(), labels)


def _deep() -> tuple[Tensor, ...]:
    weights = [torch.randn(64, 64).double() / 8 for _ in range(10)]
    return (weights[0], torch.randn(64, 64).double(), torch.randint(64, (64,)), *weights[1:])


_WIDE = (50, 768, 768, 512, 512, 1)
_PLANE = (64, 128, 128, 128, 1)

WORKLOADS: tuple[Workload, ...] = (
    _logistic(300, 1000, sizes={n: _logistic(n, 1000) for n in (50, 100, 200, 400)}),
    _laplacian(
        "B2", 32, _PLANE, Targets(25, 2),
        sizes={n: _laplacian("B2", 32, (n, 128, 128, 128, 1), Targets()) for n in (16, 32, 64, 128)},
    ),
    Workload(
        key="B9",
        title="divergence of an MLP field 64-128-128-64, batch 64",
        inputs=_network_inputs(64, (64, 128, 128, 64)),
        ours={"vmap(divergence)": _per_sample(chainrule.divergence(mlp), 6, chainrule)},
        peers={f"vmap({name})": _per_sample(made, 6) for name, made in _traces().items()},
        hand=hand_divergence,
        targets=Targets(10, 2),
    ),
    Workload(
        key="B11",
        title="diagonal of the Hessian of B2's network",
        inputs=_network_inputs(32, _PLANE),
        ours={"vmap(hessian_diagonal)": _per_sample(chainrule.hessian_diagonal(scalar_mlp), 8, chainrule)},
        peers={f"vmap({name})": _per_sample(made, 8) for name, made in _curvatures(scalar_mlp).items()},
        hand=hand_diagonal,
        targets=Targets(10, 2),
    ),
    Workload(
        key="B15",
        title="Hessian wrt U of (Ω∘(T − U Vᵀ)²).sum(), n=300, k=5, dense",
        inputs=_factors,
        ours={"hessian": chainrule.hessian(_factorisation)},
        peers={"hessian": tf.hessian(_factorisation), "jacrev(grad)": tf.jacrev(tf.grad(_factorisation))}
        | {f"jacrev(grad) chunk {c}": tf.jacrev(tf.grad(_factorisation), chunk_size=c) for c in (64, 256)},
        hand=hand_factorisation,
        targets=Targets(10, 2),
        dtype=torch.float64,
    ),
    Workload(
        key="B18",
        title="Hessian wrt the first weights of ten 64×64 tanh layers and cross-entropy, batch 64",
        inputs=_deep,
        ours={"hessian": chainrule.hessian(_deep_loss)},
        peers={f"jacrev(grad) chunk {c}": tf.jacrev(tf.grad(_deep_loss), chunk_size=c) for c in (64, 512)}
        | {"jacfwd(grad)": tf.jacfwd(tf.grad(_deep_loss))},
        targets=Targets(4),
        dtype=torch.float64,
    ),
    _laplacian("B19a", 1, _WIDE, Targets(1.8, 1.2), dtype=torch.float64),
    _laplacian("B19b", 256, _WIDE, Targets(1.8, 1.2), dtype=torch.float64),
    Workload(
        key="B19c",
        title="biharmonic of a tanh MLP 5-768-768-512-512-1, batch 64",
        inputs=_network_inputs(64, (5, *_WIDE[1:])),
        ours={"vmap(laplacian(laplacian))": _per_sample(chainrule.laplacian(chainrule.laplacian(scalar_mlp)), 10, chainrule)},
        peers={f"vmap({name})": _per_sample(made, 10) for name, made in _bilaplacian_peers(scalar_mlp).items()},
        targets=Targets(1.8),
        dtype=torch.float64,
    ),
)  # fmt: skip
