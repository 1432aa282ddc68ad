"""Section A: the computations of the Jacobians-and-Hessians notes on ``tanh(W x + b)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import chainrule
from benchmarks.workload import Expression, Targets, Workload

tf = torch.func
Tensor = torch.Tensor


def predict(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """One tanh layer."""
    return F.linear(x, weight, bias).tanh()


def summed(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """The layer on a batch, summed over the batch."""
    return predict(weight, bias, x).sum(0)


def sine_sum(x: Tensor) -> Tensor:
    """A scalar function with a diagonal Hessian."""
    return x.sin().sum()


def _layer(inputs: int, outputs: int, batch: int | None = None) -> Callable[[], tuple[Tensor, ...]]:
    def make() -> tuple[Tensor, ...]:
        shape = (inputs,) if batch is None else (batch, inputs)
        tensors = (torch.randn(outputs, inputs), torch.randn(outputs), torch.randn(shape))
        return tuple(t.double() for t in tensors)

    return make


def _jax_predict(jax: Any) -> Callable[..., Any]:
    return lambda weight, bias, x: jax.numpy.tanh(x @ weight.T + bias)


# --- formulas written by hand ---------------------------------------------------------------------------------------


def _slope(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    value = predict(weight, bias, x)
    return 1 - value * value


def _curvature(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    value = predict(weight, bias, x)
    return -2 * value * (1 - value * value)


def hand_jacobian(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Shape (outputs, inputs), or (batch, outputs, inputs) for a batch."""
    return _slope(weight, bias, x).unsqueeze(-1) * weight


def hand_hessian(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Shape (outputs, inputs, inputs)."""
    return (_curvature(weight, bias, x).unsqueeze(-1) * weight).unsqueeze(-1) * weight.unsqueeze(-2)


def hand_batched_hessian(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Shape (batch, outputs, inputs, inputs)."""
    outer = weight.unsqueeze(-1) * weight.unsqueeze(-2)
    return _curvature(weight, bias, x)[..., None, None] * outer


def hand_full_jacobian(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Shape (batch, outputs, batch, inputs), zero off the diagonal of the batch."""
    batch, inputs = x.shape
    full = x.new_zeros(batch, weight.shape[0], batch, inputs)
    full.diagonal(0, 0, 2).copy_(hand_jacobian(weight, bias, x).movedim(0, -1))
    return full


def hand_summed_jacobian(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Shape (outputs, batch, inputs)."""
    return _slope(weight, bias, x).t().unsqueeze(-1) * weight.unsqueeze(1)


def hand_parameter_jacobian(weight: Tensor, bias: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes (outputs, outputs, inputs) and (outputs, outputs)."""
    slope = _slope(weight, bias, x)
    full = x.new_zeros(weight.shape[0], *weight.shape)
    full.diagonal(0, 0, 1).copy_((slope.unsqueeze(-1) * x).t())
    return full, torch.diag(slope)


# --- torch.func -----------------------------------------------------------------------------------------------------


def _jacobians(function: Expression, argnums: int | tuple[int, ...], chunks: tuple[int, ...] = ()) -> dict[str, Expression]:
    found: dict[str, Expression] = {
        "jacrev": tf.jacrev(function, argnums=argnums),
        "jacfwd": tf.jacfwd(function, argnums=argnums),
    }
    for chunk in chunks:
        found[f"jacrev chunk {chunk}"] = tf.jacrev(function, argnums=argnums, chunk_size=chunk)
    return found


def _hessians(function: Expression, chunks: tuple[int, ...] = ()) -> dict[str, Expression]:
    found: dict[str, Expression] = {
        "hessian": tf.hessian(function, argnums=2),
        "jacfwd(jacfwd)": tf.jacfwd(tf.jacfwd(function, argnums=2), argnums=2),
    }
    if not chunks:
        found["jacrev(jacrev)"] = tf.jacrev(tf.jacrev(function, argnums=2), argnums=2)
        found["jacrev(jacfwd)"] = tf.jacrev(tf.jacfwd(function, argnums=2), argnums=2)
    for chunk in chunks:  # without chunks, reverse over reverse takes seconds and gigabytes here
        found[f"jacrev(jacrev) chunk {chunk}"] = tf.jacrev(tf.jacrev(function, argnums=2), argnums=2, chunk_size=chunk)
    return found


def _per_sample(transforms: Mapping[str, Expression]) -> dict[str, Expression]:
    return {f"vmap({name})": tf.vmap(made, in_dims=(None, None, 0)) for name, made in transforms.items()}


def _summed_jacobian(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return tf.jacrev(summed, argnums=2)(weight, bias, x).movedim(1, 0)


def _summed_hessian(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    def inner(x: Tensor) -> Tensor:
        return tf.jacrev(summed, argnums=2)(weight, bias, x).sum(1)

    return tf.jacrev(inner)(x).movedim(2, 0)


def _rows_by_vmap(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    value, pullback = tf.vjp(partial(predict, weight, bias), x)
    return tf.vmap(pullback)(torch.eye(value.numel(), dtype=x.dtype, device=x.device))[0]


def _rows_by_loop(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    tracked = x.detach().requires_grad_()
    units = torch.eye(weight.shape[0], dtype=x.dtype, device=x.device)
    return torch.stack([torch.autograd.grad(predict(weight, bias, tracked), tracked, unit)[0] for unit in units])


def _hvp_forward_reverse(x: Tensor, tangent: Tensor) -> Tensor:
    return tf.jvp(tf.grad(sine_sum), (x,), (tangent,))[1]


def _hvp_reverse_reverse(x: Tensor, tangent: Tensor) -> Tensor:
    return tf.vjp(tf.grad(sine_sum), x)[1](tangent)[0]


def _our_forward_reverse(x: Tensor, tangent: Tensor) -> Tensor:
    return chainrule.jvp(chainrule.grad(sine_sum), (x,), (tangent,))[1]


def _our_reverse_reverse(x: Tensor, tangent: Tensor) -> Tensor:
    return chainrule.vjp(chainrule.grad(sine_sum), x)[1](tangent)[0]


# --- JAX ------------------------------------------------------------------------------------------------------------


def _jax_jacobian(jax: Any) -> dict[str, Expression]:
    function = _jax_predict(jax)
    return {"jacrev": jax.jacrev(function, argnums=2), "jacfwd": jax.jacfwd(function, argnums=2)}


def _jax_hessian(jax: Any) -> dict[str, Expression]:
    function = _jax_predict(jax)
    return {
        "hessian": jax.hessian(function, argnums=2),
        "jacfwd(jacfwd)": jax.jacfwd(jax.jacfwd(function, argnums=2), argnums=2),
    }


def _jax_per_sample(make: Callable[[Any], dict[str, Expression]], jax: Any) -> dict[str, Expression]:
    return {f"vmap({name})": jax.vmap(made, in_axes=(None, None, 0)) for name, made in make(jax).items()}


def _jax_summed(jax: Any) -> dict[str, Expression]:
    function = _jax_predict(jax)
    return {"jacrev": jax.jacrev(lambda weight, bias, x: function(weight, bias, x).sum(0), argnums=2)}


def _jax_parameters(jax: Any) -> dict[str, Expression]:
    return {"jacrev": jax.jacrev(_jax_predict(jax), argnums=(0, 1))}


def _jax_hvp(jax: Any) -> dict[str, Expression]:
    gradient = jax.grad(lambda x: jax.numpy.sin(x).sum())
    return {
        "jvp(grad)": lambda x, tangent: jax.jvp(gradient, (x,), (tangent,))[1],
        "vjp(grad)": lambda x, tangent: jax.vjp(gradient, x)[1](tangent)[0],
    }


# --- the rows -------------------------------------------------------------------------------------------------------


def _layer_jacobian(key: str, inputs: int, outputs: int, targets: Targets, **options: Any) -> Workload:
    return Workload(
        key=key,
        title=f"Jacobian wrt x, {inputs}→{outputs}",
        inputs=_layer(inputs, outputs),
        ours={"jacobian": chainrule.jacobian(predict, argnums=2)},
        peers=_jacobians(predict, 2) | {"vmap(vjp)": _rows_by_vmap},
        hand=hand_jacobian,
        jax=_jax_jacobian,
        targets=targets,
        **options,
    )


def _hvp(key: str, title: str, ours: Mapping[str, Expression]) -> Workload:
    return Workload(
        key=key,
        title=f"Hessian-vector product of sin(x).sum(), n=2048, {title}",
        inputs=lambda: (torch.randn(2048).double(), torch.randn(2048).double()),
        ours=ours,
        peers={"jvp(grad)": _hvp_forward_reverse, "vjp(grad)": _hvp_reverse_reverse},
        hand=lambda x, tangent: -x.sin() * tangent,
        jax=_jax_hvp,
        targets=Targets(4, None, 1),
    )


def _both(one: Expression, two: Expression) -> Expression:
    return lambda *args: (one(*args), two(*args))


def _growth(sizes: tuple[int, ...]) -> dict[int, Workload]:
    # Reverse mode would need an identity matrix of the output's size squared.
    forward = {"jacfwd": tf.jacfwd(predict, argnums=2)}
    return {size: replace(_layer_jacobian("A2", 32, size, Targets()), peers=forward) for size in sizes}


_ours_batched = chainrule.vmap(chainrule.jacobian(predict, argnums=2), in_dims=(None, None, 0))
_ours_batched_hessian = chainrule.vmap(chainrule.hessian(predict, argnums=2), in_dims=(None, None, 0))

WORKLOADS: tuple[Workload, ...] = (
    _layer_jacobian("A1", 16, 16, Targets(3, None, 1)),
    _layer_jacobian("A2", 32, 2048, Targets(8, 2, 2), sizes=_growth((4096, 16384, 65536, 262144))),
    _layer_jacobian("A3", 2048, 32, Targets(5, 2.5, 3)),
    Workload(
        key="A4",
        title="Hessian wrt x, 512→32",
        inputs=_layer(512, 32),
        ours={"hessian": chainrule.hessian(predict, argnums=2)},
        peers=_hessians(predict, (64,)),
        hand=hand_hessian,
        jax=_jax_hessian,
        targets=Targets(2.5, 1.2, 1.5),
    ),
    Workload(
        key="A5",
        title="Jacobian per sample, B=64, 31→33",
        inputs=_layer(31, 33, 64),
        ours={"vmap(jacobian)": _ours_batched},
        peers=_per_sample(_jacobians(predict, 2)) | {"jacrev of the sum": _summed_jacobian},
        hand=hand_jacobian,
        jax=partial(_jax_per_sample, _jax_jacobian),
        targets=Targets(6, 2.5, 3),
    ),
    Workload(
        key="A6",
        title="Hessian per sample, B=64, 31→33",
        inputs=_layer(31, 33, 64),
        ours={"vmap(hessian)": _ours_batched_hessian},
        peers=_per_sample(_hessians(predict)) | {"jacrev of the summed jacrev": _summed_hessian},
        hand=hand_batched_hessian,
        jax=partial(_jax_per_sample, _jax_hessian),
        targets=Targets(8, 1.5, 5),
    ),
    Workload(
        key="A7",
        title="full Jacobian of the batch, and its summed-output form",
        inputs=_layer(31, 33, 64),
        ours={"jacobian": _both(chainrule.jacobian(predict, argnums=2), chainrule.jacobian(summed, argnums=2))},
        peers={
            name: _both(full, tf.jacrev(summed, argnums=2)) for name, full in _jacobians(predict, 2, (128, 512)).items()
        },
        hand=_both(hand_full_jacobian, hand_summed_jacobian),
        targets=Targets(15, 2, 3),
    ),
    Workload(
        key="A7f",
        title="part of A7: full Jacobian, (64, 33)×(64, 31)",
        inputs=_layer(31, 33, 64),
        ours={"jacobian": chainrule.jacobian(predict, argnums=2)},
        peers=_jacobians(predict, 2, (128, 512)),
        hand=hand_full_jacobian,
        jax=_jax_jacobian,
    ),
    Workload(
        key="A7s",
        title="part of A7: Jacobian of the output summed over the batch, (33,)×(64, 31)",
        inputs=_layer(31, 33, 64),
        ours={"jacobian": chainrule.jacobian(summed, argnums=2)},
        peers=_jacobians(summed, 2),
        hand=hand_summed_jacobian,
        jax=_jax_summed,
    ),
    _hvp("A8f", "forward over reverse", {"jvp(grad)": _our_forward_reverse}),
    _hvp("A8r", "reverse over reverse", {"vjp(grad)": _our_reverse_reverse}),
    Workload(
        key="A9",
        title="Jacobian wrt (W, b), D=256",
        inputs=_layer(256, 256),
        ours={"jacobian": chainrule.jacobian(predict, argnums=(0, 1))},
        peers={"jacrev": tf.jacrev(predict, argnums=(0, 1))}
        | {f"jacrev chunk {c}": tf.jacrev(predict, argnums=(0, 1), chunk_size=c) for c in (32, 64, 128)},
        hand=hand_parameter_jacobian,
        jax=_jax_parameters,
        targets=Targets(1.2, 1.1, 1.2),
    ),
    Workload(
        key="A10",
        title="Jacobian 16→16 against the loop over unit vectors",
        inputs=_layer(16, 16),
        ours={"jacobian": chainrule.jacobian(predict, argnums=2)},
        peers={"autograd.grad in a loop": _rows_by_loop},
        targets=Targets(8, None, None),
    ),
)
