"""Traces and diagonals of derivatives of tanh networks: Laplacians, a divergence, a Hessian's diagonal (B2, B9, B11, B19)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import chainrule
from benchmarks import jax_peers
from benchmarks.networks import jax_mlp, mlp, mlp_inputs, scalar_mlp
from benchmarks.workload import Expression, Targets, Workload

tf = torch.func
Tensor = torch.Tensor


def _units(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def _per_sample(library: Any, function: Expression, parameters: int) -> Expression:
    """The function of one sample on a batch; the parameters are shared."""
    return library.vmap(function, in_dims=(0, *[None] * parameters))


# --- formulas written by hand ---------------------------------------------------------------------------------------


def hand_laplacian(x: Tensor, *parameters: Tensor) -> Tensor:
    """Forward Laplacian: value, Jacobian and Laplacian of every layer in one matrix product. Shape (batch,)."""
    weights, biases = parameters[::2], parameters[1::2]
    hidden, jacobian = F.linear(x, weights[0], biases[0]), weights[0].t()
    norms, second = weights[0].square().sum(1), None
    for weight, bias in zip(weights[1:-1], biases[1:-1], strict=True):
        value, slope, laplacian = _tanh_laplacian(hidden, norms, second)
        rows = hidden.new_empty(x.shape[0], x.shape[1] + 2, hidden.shape[1])
        torch.mul(jacobian, slope.unsqueeze(1), out=rows[:, 2:])
        rows[:, 0], rows[:, 1] = value, laplacian
        rows = rows @ weight.t()
        hidden, second, jacobian = rows[:, 0] + bias, rows[:, 1], rows[:, 2:]
        norms = jacobian.square().sum(1)
    return (_tanh_laplacian(hidden, norms, second)[2] @ weights[-1].t()).squeeze(-1)


def _tanh_laplacian(hidden: Tensor, norms: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    value = hidden.tanh()
    slope = 1 - value * value
    laplacian = -2 * value * slope * norms
    return value, slope, laplacian if second is None else torch.addcmul(laplacian, slope, second)


def hand_hessian_diagonal(x: Tensor, *parameters: Tensor) -> Tensor:
    """The Jacobians forward, their squares weighted by cotangent times curvature. Shape (batch, inputs)."""
    weights, biases = parameters[::2], parameters[1::2]
    value, jacobian = x, None
    values, jacobians = [], []
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        jacobian = weight.t() if jacobian is None else jacobian @ weight.t()
        jacobians.append(jacobian)
        value = F.linear(value, weight, bias).tanh()
        values.append(value)
        jacobian = jacobian * (1 - value * value).unsqueeze(1)
    diagonal = torch.zeros_like(x)
    cotangent = weights[-1].expand(x.shape[0], -1)
    for weight, value, jacobian in zip(weights[-2::-1], values[::-1], jacobians[::-1], strict=True):
        cotangent = cotangent * (1 - value * value)
        weighting = -2 * value * cotangent
        squares = jacobian.square()
        diagonal += weighting @ squares.t() if squares.dim() == 2 else (squares @ weighting.unsqueeze(-1)).squeeze(-1)
        cotangent = cotangent @ weight
    return diagonal


def hand_divergence(x: Tensor, *parameters: Tensor) -> Tensor:
    """tr(W₃ D₂ W₂ D₁ W₁) = d₂ᵀ (W₂ ∘ (W₁ W₃)ᵀ) d₁, with the diagonals D of slopes. Shape (batch,)."""
    first, first_bias, second, second_bias, third, _ = parameters
    inner = F.linear(x, first, first_bias).tanh()
    outer = F.linear(inner, second, second_bias).tanh()
    weighting = second * (first @ third).t()
    return ((1 - outer * outer) @ weighting * (1 - inner * inner)).sum(-1)


def hand_biharmonic(x: Tensor, *parameters: Tensor) -> Tensor:
    """Value, Δ, Δ², ∂ᵢ, ∂ᵢΔ and ∂ᵢⱼ (i ≤ j) of every layer in one matrix product. Shape (batch,)."""
    weights, biases = parameters[::2], parameters[1::2]
    batch, size = x.shape
    upper = torch.triu_indices(size, size, device=x.device)
    position = torch.zeros(size, size, dtype=torch.long, device=x.device)
    position[upper[0], upper[1]] = position[upper[1], upper[0]] = torch.arange(upper.shape[1], device=x.device)
    rows = x.new_zeros(batch, 3 + 2 * size + upper.shape[1], weights[0].shape[0])
    rows[:, 0], rows[:, 3 : 3 + size] = x @ weights[0].t(), weights[0].t()
    for bias, weight in zip(biases[:-1], weights[1:], strict=True):
        rows = _tanh_biharmonic(rows, bias, upper, position) @ weight.t()
    return rows[:, 2, 0]


def _tanh_biharmonic(rows: Tensor, bias: Tensor, upper: Tensor, position: Tensor) -> Tensor:
    """The rows (value, Δ, Δ², ∂ᵢ, ∂ᵢΔ, ∂ᵢⱼ) of tanh from those of its argument."""
    size = position.shape[0]
    hidden, laplacian, bilaplacian = rows[:, 0] + bias, rows[:, 1], rows[:, 2]
    gradient, gradient_laplacian, mixed = rows[:, 3:].split([size, size, upper.shape[1]], 1)
    value = hidden.tanh()
    slope = 1 - value * value
    second = -2 * value * slope
    third = slope * (6 * value * value - 2)
    fourth = 8 * value * slope * (2 - 3 * value * value)
    square = gradient.square().sum(1)
    full = mixed[:, position]
    inner = torch.einsum("bjn,bijn->bin", gradient, full)  # half the gradient of square
    crossed = (gradient * gradient_laplacian).sum(1)
    half_square_laplacian = full.square().sum((1, 2)) + crossed
    result = torch.empty_like(rows)
    result[:, 0] = value
    result[:, 1] = second * square + slope * laplacian
    result[:, 2] = (
        (fourth * square + 2 * third * laplacian) * square
        + 4 * third * (gradient * inner).sum(1)
        + second * (2 * half_square_laplacian + laplacian.square() + 2 * crossed)
        + slope * bilaplacian
    )
    slopes, seconds = slope.unsqueeze(1), second.unsqueeze(1)
    result[:, 3 : 3 + size] = slopes * gradient
    result[:, 3 + size : 3 + 2 * size] = (
        (third * square + second * laplacian).unsqueeze(1) * gradient + 2 * seconds * inner + slopes * gradient_laplacian
    )
    result[:, 3 + 2 * size :] = seconds * gradient[:, upper[0]] * gradient[:, upper[1]] + slopes * mixed
    return result


# --- torch.func -----------------------------------------------------------------------------------------------------


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(0, -2, -1).sum(-1)


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(0, -2, -1)


def _of_matrix(contraction: Callable[[Tensor], Tensor], matrix: Expression) -> Expression:
    return lambda x, *parameters: contraction(matrix(x, *parameters))


def _directions_forward_reverse(x: Tensor, *parameters: Tensor, chunk_size: int | None = None) -> Tensor:
    """The derivative of the gradient along every unit vector, its own entry only. Shape (inputs, batch)."""
    gradient = tf.grad(lambda x: scalar_mlp(x, *parameters).sum())

    def along(unit: Tensor) -> Tensor:
        return tf.jvp(gradient, (x,), (unit.expand_as(x),))[1] @ unit

    return tf.vmap(along, chunk_size=chunk_size)(_units(x))


def _directions_reverse_reverse(x: Tensor, *parameters: Tensor, chunk_size: int | None = None) -> Tensor:
    _, pullback = tf.vjp(tf.grad(lambda x: scalar_mlp(x, *parameters).sum()), x)

    def along(unit: Tensor) -> Tensor:
        return pullback(unit.expand_as(x))[0] @ unit

    return tf.vmap(along, chunk_size=chunk_size)(_units(x))


def _directions_forward_forward(x: Tensor, *parameters: Tensor, chunk_size: int | None = None) -> Tensor:
    def along(unit: Tensor) -> Tensor:
        tangent = (unit.expand_as(x),)
        return tf.jvp(lambda x: tf.jvp(lambda x: scalar_mlp(x, *parameters), (x,), tangent)[1], (x,), tangent)[1]

    return tf.vmap(along, chunk_size=chunk_size)(_units(x))


def _second_directions(finish: Callable[[Tensor], Tensor], chunks: Sequence[int]) -> dict[str, Expression]:
    found: dict[str, Expression] = {}
    ways = {
        "jvp(grad)": _directions_forward_reverse,
        "vjp(grad)": _directions_reverse_reverse,
        "jvp(jvp)": _directions_forward_forward,
    }
    for name, way in ways.items():
        found[f"{name} along unit vectors"] = _of_matrix(finish, way)
        for chunk in chunks:
            found[f"{name} along unit vectors, chunk {chunk}"] = _of_matrix(finish, partial(way, chunk_size=chunk))
    return found


def _hessians(contraction: Callable[[Tensor], Tensor], parameters: int) -> dict[str, Expression]:
    ways = {
        "hessian": tf.hessian(scalar_mlp),
        "jacrev(jacrev)": tf.jacrev(tf.jacrev(scalar_mlp)),
    }
    name = contraction.__name__.strip("_")
    return {f"vmap({name}({way}))": _per_sample(tf, _of_matrix(contraction, made), parameters) for way, made in ways.items()}


def _field_forward(x: Tensor, *parameters: Tensor, chunk_size: int | None = None) -> Tensor:
    def along(unit: Tensor) -> Tensor:
        return tf.jvp(lambda x: mlp(x, *parameters), (x,), (unit.expand_as(x),))[1] @ unit

    return tf.vmap(along, chunk_size=chunk_size)(_units(x)).sum(0)


def _field_reverse(x: Tensor, *parameters: Tensor, chunk_size: int | None = None) -> Tensor:
    value, pullback = tf.vjp(lambda x: mlp(x, *parameters), x)

    def along(unit: Tensor) -> Tensor:
        return pullback(unit.expand_as(value))[0] @ unit

    return tf.vmap(along, chunk_size=chunk_size)(_units(value)).sum(0)


def _nested_laplacian(inner: str, outer: str) -> Expression:
    """The Laplacian of the Laplacian, each by derivatives along unit vectors."""

    def laplacian(function: Expression, way: str) -> Expression:
        def along(x: Tensor, unit: Tensor) -> Tensor:
            tangent = (unit.expand_as(x),)
            if way == "jvp(grad)":
                return tf.jvp(tf.grad(lambda x: function(x).sum()), (x,), tangent)[1] @ unit
            return tf.jvp(lambda x: tf.jvp(function, (x,), tangent)[1], (x,), tangent)[1]

        return lambda x: tf.vmap(along, in_dims=(None, 0))(x, _units(x)).sum(0)

    return lambda x, *parameters: laplacian(laplacian(lambda x: scalar_mlp(x, *parameters), inner), outer)(x)


# --- JAX ------------------------------------------------------------------------------------------------------------


def _jax_per_sample(contraction: str, order: int, parameters: int, jax: Any) -> dict[str, Expression]:
    function = jax_mlp(jax)
    matrix = jax.hessian(lambda x, *p: function(x, *p)[0]) if order == 2 else jax.jacrev(function)
    contracted = {"trace": jax.numpy.trace, "diagonal": jax.numpy.diagonal}[contraction]
    name = f"vmap({contraction}({'hessian' if order == 2 else 'jacrev'}))"
    return {name: jax.vmap(lambda x, *p: contracted(matrix(x, *p)), in_axes=(0, *[None] * parameters))}


# --- the rows -------------------------------------------------------------------------------------------------------


def laplacian_row(
    key: str, title: str, widths: Sequence[int], batch: int, targets: Targets, chunks: Sequence[int] = (), **options: Any
) -> Workload:
    """A Laplacian per sample."""
    count = 2 * (len(widths) - 1)
    function = chainrule.laplacian(scalar_mlp)
    return Workload(
        key=key,
        title=f"{title}, batch {batch}",
        inputs=mlp_inputs(widths, batch),
        ours={"vmap(laplacian)": _per_sample(chainrule, function, count), "laplacian of the batch": function},
        peers=_hessians(_trace, count) | _second_directions(lambda by_unit: by_unit.sum(0), chunks),
        hand=hand_laplacian,
        jax=partial(_jax_per_sample, "trace", 2, count),
        targets=targets,
        **options,
    )


def _laplacian_growth(sizes: Sequence[int]) -> dict[int, Workload]:
    return {n: laplacian_row("B2", f"input {n}", (n, 128, 128, 128, 1), 32, Targets(), (16,)) for n in sizes}


def hessian_diagonal_row(widths: Sequence[int], batch: int) -> Workload:
    """B11."""
    count = 2 * (len(widths) - 1)
    function = chainrule.hessian_diagonal(scalar_mlp)
    return Workload(
        key="B11",
        title=f"diagonal of the Hessian wrt the input, tanh MLP {'-'.join(map(str, widths))}, batch {batch}",
        inputs=mlp_inputs(widths, batch),
        ours={"vmap(hessian_diagonal)": _per_sample(chainrule, function, count)},
        peers=_hessians(_diagonal, count) | _second_directions(lambda by_unit: by_unit.t().contiguous(), (16,)),
        hand=hand_hessian_diagonal,
        jax=partial(_jax_per_sample, "diagonal", 2, count),
        targets=Targets(10, 2),
    )


def divergence_row(widths: Sequence[int], batch: int) -> Workload:
    """B9."""
    count = 2 * (len(widths) - 1)
    ours: dict[str, Expression] = {
        "vmap(trace(jacobian))": _per_sample(chainrule, _of_matrix(_trace, chainrule.jacobian(mlp)), count),
    }
    if hasattr(chainrule, "divergence"):
        ours = {"vmap(divergence)": _per_sample(chainrule, chainrule.divergence(mlp), count)} | ours
    return Workload(
        key="B9",
        title=f"divergence of an MLP field {'-'.join(map(str, widths))}, batch {batch}",
        inputs=mlp_inputs(widths, batch),
        ours=ours,
        peers={
            "vmap(trace(jacrev))": _per_sample(tf, _of_matrix(_trace, tf.jacrev(mlp)), count),
            "vmap(trace(jacfwd))": _per_sample(tf, _of_matrix(_trace, tf.jacfwd(mlp)), count),
            "jvp along unit vectors": _field_forward,
            "jvp along unit vectors, chunk 16": partial(_field_forward, chunk_size=16),
            "vjp along unit vectors": _field_reverse,
            "vjp along unit vectors, chunk 16": partial(_field_reverse, chunk_size=16),
        },
        hand=hand_divergence,
        jax=partial(_jax_per_sample, "trace", 1, count),
        targets=Targets(10, 2),
    )


def biharmonic_row(widths: Sequence[int], batch: int) -> Workload:
    """The biharmonic part of B19."""
    count = 2 * (len(widths) - 1)
    function = chainrule.laplacian(chainrule.laplacian(scalar_mlp))
    ways = (("jvp(jvp)", "jvp(jvp)"), ("jvp(jvp)", "jvp(grad)"), ("jvp(grad)", "jvp(jvp)"))
    return Workload(
        key="B19c",
        title=f"biharmonic operator of a tanh MLP {'-'.join(map(str, widths))}, float64, batch {batch}",
        inputs=mlp_inputs(widths, batch),
        ours={
            "vmap(laplacian(laplacian))": _per_sample(chainrule, function, count),
            "laplacian(laplacian) of the batch": function,
        },
        peers={f"{outer} of {inner}": _nested_laplacian(inner, outer) for inner, outer in ways},
        hand=hand_biharmonic,
        jax=jax_peers.biharmonic,
        targets=Targets(1.8, 1.2),
        dtype=torch.float64,
    )


def _deep(key: str, widths: Sequence[int], batch: int) -> Workload:
    title = f"Laplacian of a tanh MLP {'-'.join(map(str, widths))}, float64"
    row = laplacian_row(key, title, widths, batch, Targets(1.8, 1.2), () if batch == 1 else (10,), dtype=torch.float64)
    if batch == 1:
        return row
    # The others take many times as long here.
    kept = {name: made for name, made in row.peers.items() if "jvp" in name}
    return replace(row, peers=kept)


_B2 = (64, 128, 128, 128, 1)
_B19 = (768, 768, 512, 512, 1)

WORKLOADS: tuple[Workload, ...] = (
    laplacian_row(
        "B2",
        "Laplacian of a tanh MLP 64-128-128-128-1",
        _B2,
        32,
        Targets(25, 2),
        (16,),
        sizes=_laplacian_growth((64, 128, 256, 512)),
    ),
    divergence_row((64, 128, 128, 64), 64),
    hessian_diagonal_row(_B2, 32),
    _deep("B19a", (50, *_B19), 1),
    _deep("B19b", (50, *_B19), 256),
    biharmonic_row((5, *_B19), 64),
)

#: The same rows at sizes that every test run can afford.
SMALL: tuple[Workload, ...] = (
    laplacian_row("B2", "small", (6, 8, 7, 5, 1), 3, Targets(), (2,)),
    divergence_row((5, 8, 7, 5), 3),
    hessian_diagonal_row((6, 8, 7, 5, 1), 3),
    _deep("B19a", (5, 8, 7, 6, 5, 1), 1),
    _deep("B19b", (5, 8, 7, 6, 5, 1), 4),
    biharmonic_row((3, 8, 7, 6, 1), 4),
)
