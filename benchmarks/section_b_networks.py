"""Jacobians and gradients of networks wrt inputs and parameters (B3 to B8, B16, B17)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import chainrule
from benchmarks import jax_peers
from benchmarks.networks import (
    Architecture,
    classifier_architecture,
    cnn_architecture,
    cross_entropy,
    encoder_architecture,
    mlp_architecture,
)
from benchmarks.peers import jacobians
from benchmarks.workload import Expression, Targets, Workload

tf = torch.func
Tensor = torch.Tensor


def attention(x: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One head of self-attention, written out."""
    scores = (x @ queries) @ (x @ keys).mT / math.sqrt(queries.shape[1])
    return scores.softmax(-1) @ (x @ values)


def convolutions(x: Tensor, first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor) -> Tensor:
    """Two 3×3 convolutions that keep the size, tanh between them."""
    return F.conv2d(F.conv2d(x, first, first_bias, padding=1).tanh(), second, second_bias, padding=1)


# --- formulas written by hand ---------------------------------------------------------------------------------------


def _signals(x: Tensor, parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs of every layer, and the derivatives of all outputs wrt its results, (batch, outputs, width) each."""
    weights, biases = parameters[::2], parameters[1::2]
    values = [x]
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        values.append(F.linear(values[-1], weight, bias).tanh())
    signals = []
    signal = weights[-1]
    for number in range(len(weights) - 2, -1, -1):
        signal = signal * (1 - values[number + 1].square()).unsqueeze(1)
        signals.append(signal)
        signal = signal @ weights[number] if number else signal
    return values, signals[::-1]


def hand_parameter_jacobian(x: Tensor, *parameters: Tensor) -> list[Tensor]:
    """Outer products of backpropagated signals and activations; block-diagonal for the last layer."""
    values, signals = _signals(x, parameters)
    batch, outputs = x.shape[0], parameters[-1].shape[0]
    found: list[Tensor] = []
    for value, signal in zip(values[:-1], signals, strict=True):
        found += [signal.unsqueeze(-1) * value[:, None, None, :], signal]
    last = x.new_zeros(batch, outputs, *parameters[-2].shape)
    last.diagonal(0, 1, 2).copy_(values[-1].unsqueeze(-1).expand(-1, -1, outputs))
    unit = torch.eye(outputs, dtype=x.dtype, device=x.device).repeat(batch, 1, 1)
    return [*found, last, unit]


def hand_ntk(x: Tensor, *parameters: Tensor) -> Tensor:
    """The sum over layers of (Gram matrix of activations + 1) ∘ (Gram matrix of signals). (batch, outputs, batch, outputs)."""
    values, signals = _signals(x, parameters)
    batch, outputs = x.shape[0], parameters[-1].shape[0]
    kernel = x.new_zeros(batch, outputs, batch, outputs)
    for value, signal in zip(values[:-1], signals, strict=True):
        flat = signal.reshape(batch * outputs, -1)
        kernel.addcmul_((value @ value.t() + 1)[:, None, :, None], (flat @ flat.t()).view_as(kernel))
    kernel.diagonal(0, 1, 3).add_((values[-1] @ values[-1].t() + 1).unsqueeze(-1))
    return kernel


def hand_loss_gradient(architecture: Architecture, x: Tensor, targets: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """Plain autograd."""
    tracked = [p.detach().requires_grad_() for p in parameters]
    loss = cross_entropy(tf, architecture)(architecture.named(tracked), x, targets)
    return torch.autograd.grad(loss, tracked)


def hand_cnn_jacobian(
    x: Tensor, first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor, last: Tensor, _: Tensor
) -> Tensor:
    """The rows of the last weights, unpooled, and pulled through both convolutions. Shape (batch, outputs, 1, side, side).

    The last pullback is one product and the sum over its windows: a third of what a convolution takes.
    """
    count, batch = last.shape[0], x.shape[0]
    inner = F.conv2d(x, first, first_bias).relu()
    outer = F.conv2d(inner, second, second_bias).relu()
    pooled, places = F.max_pool2d(outer, 2, return_indices=True)
    cotangents = last.view(count, 1, *pooled.shape[1:]) * (pooled > 0)
    planes = x.new_zeros(count, *outer.flatten(2).shape)
    planes.scatter_(3, places.flatten(2).expand(count, -1, -1, -1), cotangents.flatten(3))
    signals = F.conv_transpose2d(planes.view(-1, *outer.shape[1:]), second).view(count, *inner.shape)
    masked = torch.ops.aten.threshold_backward(signals, inner.expand_as(signals), 0).view(count * batch, inner.shape[1], -1)
    columns = torch.bmm(first.flatten(1).t().expand(count * batch, -1, -1), masked)
    return F.fold(columns, x.shape[2:], first.shape[2:]).view(count, *x.shape).movedim(1, 0)


def hand_attention_jacobian(x: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """J[i, a, j, b] = Pᵢⱼ (Wv[b, a] + c (Vⱼₐ − Oᵢₐ) rᵢᵦ) + δᵢⱼ c Cᵢ[a, b], with r = Q Wkᵀ and c the scale.

    Cᵢ is the covariance under Pᵢ of the values and the keys pulled back through Wq.
    """
    length, width = x.shape
    size = values.shape[1]
    scale = 1 / math.sqrt(queries.shape[1])
    key, value = x @ keys, x @ values
    pulled_queries, pulled_keys = (x @ queries) @ keys.t(), key @ queries.t()
    weighting = ((x @ queries) @ key.t() * scale).softmax(-1)
    output = weighting @ value
    constant = values.t() - scale * output.unsqueeze(-1) * pulled_queries.unsqueeze(1)
    left = torch.stack([weighting.unsqueeze(1).expand(-1, size, -1), scale * weighting.unsqueeze(1) * value.t()], -1)
    right = torch.stack([constant, pulled_queries.unsqueeze(1).expand(-1, size, -1)], -2)
    jacobian = left @ right
    means = output.unsqueeze(-1) * (weighting @ pulled_keys).unsqueeze(1)
    covariance = (value.t() * weighting.unsqueeze(1)) @ pulled_keys - means
    jacobian.diagonal(0, 0, 2).add_((scale * covariance).permute(1, 2, 0))
    return jacobian.view(length, size, length, width)


# --- chainrule and torch.func ---------------------------------------------------------------------------------------


def _named(architecture: Architecture, transformed: Expression) -> Expression:
    """An expression of (x, *parameters) from a transform's result, a function of (parameters, x)."""
    return lambda x, *parameters: transformed(architecture.named(parameters), x)


def _summed(call: Expression) -> Expression:
    return lambda parameters, x: call(parameters, x).sum(0)


def _moved(transformed: Expression) -> Expression:
    return lambda parameters, x: transformed(parameters, x).movedim(1, 0)


def _contracted(jacobian: Expression) -> Expression:
    """The kernel as the NTK tutorial contracts the per-sample Jacobians, leaf by leaf."""

    def kernel(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        leaves = [leaf.flatten(2) for leaf in jacobian(parameters, x).values()]
        return torch.stack([torch.einsum("naf,mbf->namb", leaf, leaf) for leaf in leaves]).sum(0)

    return kernel


def _gram(jacobian: Expression) -> Expression:
    """The same as one matrix product."""

    def kernel(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        leaves = list(jacobian(parameters, x).values())
        rows = torch.cat([leaf.flatten(2) for leaf in leaves], -1)
        flat = rows.flatten(0, 1)
        return (flat @ flat.t()).view(*rows.shape[:2], *rows.shape[:2])

    return kernel


def _gram_by_leaf(jacobian: Expression) -> Expression:
    """The same, one matrix product per leaf."""

    def kernel(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        leaves = list(jacobian(parameters, x).values())
        shape = leaves[0].shape[:2]
        flat = [leaf.flatten(2).flatten(0, 1) for leaf in leaves]
        return sum(leaf @ leaf.t() for leaf in flat).view(*shape, *shape)  # type: ignore[union-attr]

    return kernel


def _kernel_products(call: Expression) -> Expression:
    """The NTK tutorial's kernel-vector products: no Jacobian, a vjp and a jvp per pair of samples."""

    def kernel(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        def pair(first: Tensor, second: Tensor) -> Tensor:
            def product(unit: Tensor) -> Tensor:
                pulled = tf.vjp(lambda p: call(p, first), parameters)[1](unit)
                return tf.jvp(lambda p: call(p, second), (parameters,), pulled)[1]

            size = parameters[list(parameters)[-1]].shape[0]
            return tf.vmap(product)(torch.eye(size, dtype=x.dtype, device=x.device))

        return tf.vmap(tf.vmap(pair, (None, 0)), (0, None))(x, x).transpose(1, 2)

    return kernel


def _kernel_products_of_batch(call: Expression) -> Expression:
    """A vjp and a jvp of the whole batch per output of every sample."""

    def kernel(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        value, pullback = tf.vjp(lambda p: call(p, x), parameters)

        def product(unit: Tensor) -> Tensor:
            return tf.jvp(lambda p: call(p, x), (parameters,), pullback(unit.view_as(value)))[1]

        rows = tf.vmap(product)(torch.eye(value.numel(), dtype=x.dtype, device=x.device))
        return rows.view(*value.shape, *value.shape)

    return kernel


def _with_math_attention(expression: Expression) -> Expression:
    """The fused attention kernels have no batching rules in torch.func; the plain formula has."""

    def run(*args: Tensor) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return expression(*args)

    return run


# --- JAX ------------------------------------------------------------------------------------------------------------


def _jax_attention(jax: Any) -> dict[str, Expression]:
    def function(x: Any, queries: Any, keys: Any, values: Any) -> Any:
        scores = (x @ queries) @ (x @ keys).T / math.sqrt(queries.shape[1])
        return jax.nn.softmax(scores, -1) @ (x @ values)

    return {"jacrev": jax.jacrev(function), "jacfwd": jax.jacfwd(function)}


# --- the rows -------------------------------------------------------------------------------------------------------


def _network_inputs(architecture: Architecture, *shape: int, classes: int = 0) -> Callable[[], tuple[Tensor, ...]]:
    def make() -> tuple[Tensor, ...]:
        targets = (torch.randint(0, classes, shape[:1]),) if classes else ()
        return torch.randn(shape).double(), *targets, *architecture.parameters()

    return make


def parameter_jacobian_row(widths: Sequence[int], batch: int) -> Workload:
    """B3."""
    architecture = mlp_architecture(widths)
    ours, theirs = architecture.calling(chainrule), architecture.calling(tf)
    in_dims = (None, 0)
    return Workload(
        key="B3",
        title=f"per-sample Jacobian wrt the parameters, tanh MLP {'-'.join(map(str, widths))}, batch {batch}",
        inputs=_network_inputs(architecture, batch, widths[0]),
        ours={"vmap(jacobian)": _named(architecture, chainrule.vmap(chainrule.jacobian(ours), in_dims=in_dims))},
        peers={
            "vmap(jacrev)": _named(architecture, tf.vmap(tf.jacrev(theirs), in_dims=in_dims)),
            "vmap(jacrev), chunk 8": _named(architecture, tf.vmap(tf.jacrev(theirs), in_dims=in_dims, chunk_size=8)),
        },
        hand=hand_parameter_jacobian,
        jax=partial(jax_peers.per_sample_parameter_jacobian, jax_peers.mlp_network),
        targets=Targets(1.5, 1.5),
    )


def ntk_row(widths: Sequence[int], batch: int) -> Workload:
    """B4."""
    architecture = mlp_architecture(widths)
    call, theirs = architecture.calling(chainrule), architecture.calling(tf)
    in_dims = (None, 0)
    jacobian = chainrule.vmap(chainrule.jacobian(call), in_dims=in_dims)
    peer = tf.vmap(tf.jacrev(theirs), in_dims=in_dims)
    ours = {"vmap(jacobian) contracted": _contracted(jacobian), "Gram matrix of vmap(jacobian)": _gram_by_leaf(jacobian)}
    if hasattr(chainrule, "ntk"):
        ours = {"ntk": chainrule.ntk(call)} | ours
    peers = {
        "vmap(jacrev) contracted": _contracted(peer),
        "Gram matrix of vmap(jacrev)": _gram(peer),
        "Gram matrices of vmap(jacrev)": _gram_by_leaf(peer),
        "kernel-vector products": _kernel_products(theirs),
        "kernel-vector products of the batch": _kernel_products_of_batch(theirs),
    }
    return Workload(
        key="B4",
        title=f"empirical NTK, tanh MLP {'-'.join(map(str, widths))}, batch {batch}",
        inputs=_network_inputs(architecture, batch, widths[0]),
        ours={name: _named(architecture, made) for name, made in ours.items()},
        peers={name: _named(architecture, made) for name, made in peers.items()},
        hand=hand_ntk,
        jax=partial(jax_peers.ntk, jax_peers.mlp_network),
        targets=Targets(20, 2),
    )


def cnn_jacobian_row(side: int, batch: int) -> Workload:
    """B5."""
    architecture = cnn_architecture(side)
    call, theirs = architecture.calling(chainrule), architecture.calling(tf)
    in_dims = (None, 0)
    ours = {
        "vmap(jacobian)": chainrule.vmap(chainrule.jacobian(call, argnums=1), in_dims=in_dims),
        "jacobian of the sum": _moved(chainrule.jacobian(_summed(call), argnums=1)),
    }
    peers = {
        "vmap(jacrev)": tf.vmap(tf.jacrev(theirs, argnums=1), in_dims=in_dims),
        "vmap(jacrev), chunk 4": tf.vmap(tf.jacrev(theirs, argnums=1), in_dims=in_dims, chunk_size=4),
        "jacrev of the sum": _moved(tf.jacrev(_summed(theirs), argnums=1)),
        "jacrev of the sum, chunk 1": _moved(tf.jacrev(_summed(theirs), argnums=1, chunk_size=1)),
    }
    return Workload(
        key="B5",
        title=f"Jacobian of a CNN wrt its input {side}×{side}, batch {batch}",
        inputs=_network_inputs(architecture, batch, 1, side, side),
        ours={name: _named(architecture, made) for name, made in ours.items()},
        peers={name: _named(architecture, made) for name, made in peers.items()},
        hand=hand_cnn_jacobian,
        jax=partial(jax_peers.per_sample_jacobian, jax_peers.cnn_network),
        targets=Targets(1.5),
    )


def _with_targets(architecture: Architecture, transformed: Expression) -> Expression:
    return lambda x, targets, *parameters: transformed(architecture.named(parameters), x, targets)


def per_sample_gradient_row(side: int, batch: int) -> Workload:
    """B6."""
    architecture = cnn_architecture(side)
    in_dims = (None, 0, 0)
    ours = chainrule.vmap(chainrule.grad(cross_entropy(chainrule, architecture)), in_dims=in_dims)
    gradient = tf.grad(cross_entropy(tf, architecture))
    peers = {
        "vmap(grad)": tf.vmap(gradient, in_dims=in_dims),
        "vmap(grad), chunk 8": tf.vmap(gradient, in_dims=in_dims, chunk_size=8),
    }
    return Workload(
        key="B6",
        title=f"per-sample gradients of a CNN {side}×{side}, batch {batch}",
        inputs=_network_inputs(architecture, batch, 1, side, side, classes=10),
        ours={"vmap(grad)": _with_targets(architecture, ours)},
        peers={name: _with_targets(architecture, made) for name, made in peers.items()},
        jax=partial(jax_peers.per_sample_gradient, jax_peers.cnn_network),
        targets=Targets(1),
    )


def _by_autograd(architecture: Architecture) -> Expression:
    """The gradient by ``torch.autograd.grad``, as a training step has it."""
    loss = cross_entropy(torch.func, architecture)

    def gradient(x: Tensor, targets: Tensor, *parameters: Tensor) -> Any:
        leaves = architecture.named([p.detach().requires_grad_() for p in parameters])
        found = torch.autograd.grad(loss(leaves, x, targets), list(leaves.values()))
        return dict(zip(leaves, found, strict=True))

    return gradient


def _loss_gradient_row(
    key: str,
    title: str,
    architecture: Architecture,
    network: jax_peers.Network,
    shape: Sequence[int],
    hand: Expression | None = None,
) -> Workload:
    return Workload(
        key=key,
        title=f"gradient of the loss wrt all parameters, {title}",
        inputs=_network_inputs(architecture, *shape, classes=10),
        ours={"grad": _with_targets(architecture, chainrule.grad(cross_entropy(chainrule, architecture)))},
        peers={"grad": _with_targets(architecture, tf.grad(cross_entropy(tf, architecture)))},
        autograd=_by_autograd(architecture),
        jax=partial(jax_peers.loss_gradient, network),
        hand=hand,
        targets=Targets(1),
    )


def loss_gradient_row(widths: Sequence[int], batch: int) -> Workload:
    """B7."""
    architecture = mlp_architecture(widths)
    title = f"tanh MLP {'-'.join(map(str, widths))}, batch {batch}"
    hand = partial(hand_loss_gradient, architecture)
    return _loss_gradient_row("B7", title, architecture, jax_peers.mlp_network, (batch, widths[0]), hand)


def cnn_gradient_row(side: int, batch: int) -> Workload:
    """B7c."""
    title = f"CNN {side}×{side}, batch {batch}"
    return _loss_gradient_row("B7c", title, cnn_architecture(side), jax_peers.cnn_network, (batch, 1, side, side))


def transformer_gradient_row(length: int, width: int, heads: int, batch: int) -> Workload:
    """B7t."""
    architecture = classifier_architecture(length, width, heads)
    title = f"transformer encoder block and a linear layer, sequence {length}, width {width}, {heads} heads, batch {batch}"
    network = partial(jax_peers.classifier_network, heads)
    return _loss_gradient_row("B7t", title, architecture, network, (batch, length, width))


def encoder_row(length: int, width: int, heads: int, chunks: Sequence[int | None]) -> Workload:
    """B8."""
    architecture = encoder_architecture(width, heads)
    ours = _named(architecture, chainrule.jacobian(architecture.calling(chainrule), argnums=1))
    peers = jacobians(architecture.calling(tf), 1, chunks)
    return Workload(
        key="B8",
        title=f"Jacobian of a transformer encoder block wrt its input, sequence {length}, width {width}, {heads} heads",
        inputs=_network_inputs(architecture, length, width),
        ours={"jacobian": ours, "jacobian, plain attention": _with_math_attention(ours)},
        peers={name: _with_math_attention(_named(architecture, made)) for name, made in peers.items()},
        jax=partial(jax_peers.input_jacobian, partial(jax_peers.encoder_network, heads)),
        targets=Targets(1.5),
    )


def attention_row(key: str, length: int, width: int, chunks: Sequence[int | None]) -> Workload:
    """B16."""

    def make() -> tuple[Tensor, ...]:
        weights = [torch.randn(width, width) / math.sqrt(width) for _ in range(3)]
        return tuple(t.double() for t in (torch.randn(length, width), *weights))

    return Workload(
        key=key,
        title=f"Jacobian of a self-attention head, X {length}×{width}",
        inputs=make,
        ours={"jacobian": chainrule.jacobian(attention)},
        peers=jacobians(attention, 0, chunks),
        hand=hand_attention_jacobian,
        jax=_jax_attention,
        targets=Targets(10, 1.5),
    )


def convolution_row(channels: int, side: int, chunks: Sequence[int | None]) -> Workload:
    """B17, dense."""

    def make() -> tuple[Tensor, ...]:
        shape = (channels, channels, 3, 3)
        weights = [part for _ in range(2) for part in (torch.randn(shape) / math.sqrt(9 * channels), torch.randn(channels))]
        return tuple(t.double() for t in (torch.randn(1, channels, side, side), *weights))

    return Workload(
        key="B17",
        title=f"Jacobian of conv · tanh · conv, {channels} channels, {side}×{side}, dense",
        inputs=make,
        ours={"jacobian": chainrule.jacobian(convolutions)},
        peers=jacobians(convolutions, 0, chunks),
        jax=jax_peers.convolutions_jacobian,
        targets=Targets(5),
    )


_MLP = (32, 128, 128, 10)

WORKLOADS: tuple[Workload, ...] = (
    parameter_jacobian_row(_MLP, 32),
    ntk_row(_MLP, 32),
    cnn_jacobian_row(28, 32),
    per_sample_gradient_row(28, 32),
    loss_gradient_row(_MLP, 128),
    cnn_gradient_row(28, 32),
    transformer_gradient_row(32, 64, 4, 16),
    encoder_row(32, 64, 4, (64, 256)),
    attention_row("B16", 128, 64, (64, 256)),
    attention_row("B16s", 32, 64, (None, 64, 256)),
    convolution_row(16, 16, (64, 256)),
)

#: The same rows at sizes that every test run can afford.
SMALL: tuple[Workload, ...] = (
    parameter_jacobian_row((5, 8, 7, 4), 3),
    ntk_row((5, 8, 7, 4), 3),
    cnn_jacobian_row(8, 3),
    per_sample_gradient_row(8, 3),
    loss_gradient_row((5, 8, 7, 10), 3),
    cnn_gradient_row(8, 3),
    transformer_gradient_row(4, 8, 2, 3),
    encoder_row(4, 8, 2, (None, 8)),
    attention_row("B16", 5, 4, (8,)),
    attention_row("B16s", 3, 4, (None, 8)),
    convolution_row(2, 4, (8,)),
)
