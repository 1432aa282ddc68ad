"""The rows' computations in JAX, for ``jax.jit``: every function takes the ``jax`` module, which is optional.

Parameters come as tuples in the order in which PyTorch's modules name them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.networks import jax_mlp
from benchmarks.overhead import OPS
from benchmarks.workload import Expression

#: A network of (parameters, x), made from the ``jax`` module.
Network = Callable[[Any], Callable[[tuple[Any, ...], Any], Any]]
Made = dict[str, Expression]


# --- networks -------------------------------------------------------------------------------------------------------


def mlp_network(jax: Any) -> Callable[[tuple[Any, ...], Any], Any]:
    """Linear layers with tanh between them."""
    function = jax_mlp(jax)
    return lambda parameters, x: function(x, *parameters)


def _convolution(jax: Any, x: Any, weight: Any, bias: Any, padding: str) -> Any:
    return jax.lax.conv_general_dilated(x, weight, (1, 1), padding) + bias[:, None, None]


def cnn_network(jax: Any) -> Callable[[tuple[Any, ...], Any], Any]:
    """Two 3×3 convolutions, pooling and a linear layer on a batch of images, or on one."""
    relu = jax.nn.relu

    def network(parameters: tuple[Any, ...], x: Any) -> Any:
        first, first_bias, second, second_bias, weight, bias = parameters
        images = x if x.ndim == 4 else x[None]
        hidden = relu(_convolution(jax, images, first, first_bias, "VALID"))
        hidden = relu(_convolution(jax, hidden, second, second_bias, "VALID"))
        window = (1, 1, 2, 2)
        hidden = jax.lax.reduce_window(hidden, -math.inf, jax.lax.max, window, window, "VALID")
        found = hidden.reshape(len(images), -1) @ weight.T + bias
        return found if x.ndim == 4 else found[0]

    return network


def encoder_network(heads: int, jax: Any) -> Callable[[tuple[Any, ...], Any], Any]:
    """A transformer encoder block that normalizes after each sum, on (..., length, width)."""
    numpy = jax.numpy

    def normalized(x: Any, weight: Any, bias: Any) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        return centred / numpy.sqrt((centred * centred).mean(-1, keepdims=True) + 1e-5) * weight + bias

    def attention(x: Any, weight: Any, bias: Any) -> Any:
        *batch, length, width = x.shape
        parts = (x @ weight.T + bias).reshape(*batch, length, 3, heads, width // heads)
        queries, keys, values = (numpy.swapaxes(parts[..., i, :, :], -3, -2) for i in range(3))
        scores = queries @ numpy.swapaxes(keys, -1, -2) / math.sqrt(width // heads)
        return numpy.swapaxes(jax.nn.softmax(scores, -1) @ values, -3, -2).reshape(x.shape)

    def network(parameters: tuple[Any, ...], x: Any) -> Any:
        into, into_bias, out, out_bias, first, first_bias, second, second_bias, *norms = parameters
        x = normalized(x + attention(x, into, into_bias) @ out.T + out_bias, *norms[:2])
        return normalized(x + jax.nn.relu(x @ first.T + first_bias) @ second.T + second_bias, *norms[2:])

    return network


def classifier_network(heads: int, jax: Any) -> Callable[[tuple[Any, ...], Any], Any]:
    """A transformer encoder block and a linear layer on all its positions, for a batch."""
    encoder = encoder_network(heads, jax)

    def network(parameters: tuple[Any, ...], x: Any) -> Any:
        return encoder(parameters[:-2], x).reshape(len(x), -1) @ parameters[-2].T + parameters[-1]

    return network


def _cross_entropy(jax: Any, logits: Any, targets: Any) -> Any:
    """The mean over a batch, or the loss of one sample."""
    logarithms = jax.nn.log_softmax(logits, -1)
    return -jax.numpy.take_along_axis(logarithms, targets[..., None], -1).mean()


def _loss(network: Network, jax: Any) -> Callable[..., Any]:
    call = network(jax)
    return lambda parameters, x, targets: _cross_entropy(jax, call(parameters, x), targets)


# --- Jacobians and gradients of networks ----------------------------------------------------------------------------


def per_sample_parameter_jacobian(network: Network, jax: Any) -> Made:
    """B3."""
    mapped = jax.vmap(jax.jacrev(network(jax)), in_axes=(None, 0))
    return {"vmap(jacrev)": lambda x, *parameters: mapped(parameters, x)}


def ntk(network: Network, jax: Any) -> Made:
    """B4."""
    mapped = jax.vmap(jax.jacrev(network(jax)), in_axes=(None, 0))
    numpy = jax.numpy

    def contracted(x: Any, *parameters: Any) -> Any:
        leaves = [leaf.reshape(*leaf.shape[:2], -1) for leaf in mapped(parameters, x)]
        return sum(numpy.einsum("naf,mbf->namb", leaf, leaf) for leaf in leaves)

    return {"vmap(jacrev) contracted": contracted}


def per_sample_jacobian(network: Network, jax: Any) -> Made:
    """B5."""
    mapped = jax.vmap(jax.jacrev(network(jax), argnums=1), in_axes=(None, 0))
    return {"vmap(jacrev)": lambda x, *parameters: mapped(parameters, x)}


def input_jacobian(network: Network, jax: Any) -> Made:
    """B8."""
    call = network(jax)
    ways = {"jacrev": jax.jacrev(call, argnums=1), "jacfwd": jax.jacfwd(call, argnums=1)}
    return {name: partial(_with_parameters, made) for name, made in ways.items()}


def _with_parameters(function: Expression, x: Any, *parameters: Any) -> Any:
    return function(parameters, x)


def per_sample_gradient(network: Network, jax: Any) -> Made:
    """B6."""
    mapped = jax.vmap(jax.grad(_loss(network, jax)), in_axes=(None, 0, 0))
    return {"vmap(grad)": lambda x, targets, *parameters: mapped(parameters, x, targets)}


def loss_gradient(network: Network, jax: Any) -> Made:
    """B7."""
    gradient = jax.grad(_loss(network, jax))
    return {"grad": lambda x, targets, *parameters: gradient(parameters, x, targets)}


def convolutions_jacobian(jax: Any) -> Made:
    """B17."""

    def function(x: Any, first: Any, first_bias: Any, second: Any, second_bias: Any) -> Any:
        hidden = jax.numpy.tanh(_convolution(jax, x, first, first_bias, "SAME"))
        return _convolution(jax, hidden, second, second_bias, "SAME")

    return {"jacrev": jax.jacrev(function), "jacfwd": jax.jacfwd(function)}


# --- curvature ------------------------------------------------------------------------------------------------------


def gauss_newton_product(network: Network, jax: Any) -> Made:
    """B10."""
    call = network(jax)

    def product(hessian_product: Expression, x: Any, targets: Any, *both: Any) -> Any:
        half = len(both) // 2
        function, loss = partial(_of_parameters, call, x), partial(_of_logits, jax, targets)
        value, tangent = jax.jvp(function, (both[:half],), (both[half:],))
        change = hessian_product(jax.grad(loss), value, tangent)
        return jax.vjp(function, both[:half])[1](change)[0]

    return {
        "jvp and vjp": partial(product, lambda gradient, value, tangent: jax.jvp(gradient, (value,), (tangent,))[1]),
        "double vjp": partial(product, lambda gradient, value, tangent: jax.vjp(gradient, value)[1](tangent)[0]),
    }


def _of_parameters(call: Callable[..., Any], x: Any, parameters: Any) -> Any:
    return call(parameters, x)


def _of_logits(jax: Any, targets: Any, logits: Any) -> Any:
    return _cross_entropy(jax, logits, targets)


def deep_hessian(jax: Any) -> Made:
    """B18."""

    def loss(first: Any, x: Any, targets: Any, *others: Any) -> Any:
        for weight in (first, *others):
            x = jax.numpy.tanh(x @ weight.T)
        return _cross_entropy(jax, x, targets)

    return {"hessian": jax.hessian(loss)}


def biharmonic(jax: Any) -> Made:
    """B19, the Laplacian of the Laplacian, each by derivatives along unit vectors."""
    function = jax_mlp(jax)

    def laplacian(inner: Expression, way: str) -> Expression:
        def along(x: Any, unit: Any) -> Any:
            if way == "jvp(grad)":
                return jax.jvp(jax.grad(inner), (x,), (unit,))[1] @ unit
            return jax.jvp(lambda x: jax.jvp(inner, (x,), (unit,))[1], (x,), (unit,))[1]

        return lambda x: jax.vmap(along, in_axes=(None, 0))(x, jax.numpy.eye(len(x), dtype=x.dtype)).sum(0)

    def made(outer: str, inner: str) -> Expression:
        def of_batch(x: Any, *parameters: Any) -> Any:
            return jax.vmap(laplacian(laplacian(lambda x: function(x, *parameters)[0], inner), outer))(x)

        return of_batch

    ways = (("jvp(jvp)", "jvp(jvp)"), ("jvp(grad)", "jvp(jvp)"))
    return {f"{outer} of {inner}": made(outer, inner) for outer, inner in ways}


# --- calls ----------------------------------------------------------------------------------------------------------


def _chain(jax: Any, x: Any) -> Any:
    for _ in range(OPS // 4):
        x = jax.numpy.tanh(jax.numpy.sin(x) * 0.5 + 1.0)
    return x


def chain_vmap(jax: Any) -> Made:
    """B12."""
    return {"vmap": jax.vmap(partial(_chain, jax))}


def chain_jvp(jax: Any) -> Made:
    """B13."""
    return {"jvp": lambda x, tangent: jax.jvp(partial(_chain, jax), (x,), (tangent,))}


def chain_vjp(jax: Any) -> Made:
    """B13."""

    def pulled(x: Any, cotangent: Any) -> Any:
        value, pullback = jax.vjp(partial(_chain, jax), x)
        return value, pullback(cotangent)[0]

    return {"vjp": pulled}


def chain_gradient(jax: Any) -> Made:
    """B13."""
    return {"grad": jax.grad(lambda x: _chain(jax, x).sum())}


def chain_linearize(jax: Any) -> Made:
    """B13."""

    def pushed(x: Any, tangent: Any) -> Any:
        value, push = jax.linearize(partial(_chain, jax), x)
        return value, push(tangent)

    return {"linearize": pushed}


def network_vmap(network: Network, jax: Any) -> Made:
    """B12."""
    mapped = jax.vmap(network(jax), in_axes=(None, 0))
    return {"vmap": lambda x, *parameters: mapped(parameters, x)}


def many_tangents(network: Network, arrival: str, jax: Any) -> Made:
    """B14: one by one is a loop inside of the compiled call."""
    call = network(jax)

    def pushed(x: Any, *both: Any) -> Any:
        half = len(both) // 2
        push = jax.linearize(partial(_of_parameters, call, x), both[:half])[1]
        return jax.lax.map(push, both[half:]) if arrival == "one by one" else jax.vmap(push)(both[half:])

    return {"lax.map(linearize)" if arrival == "one by one" else "vmap(linearize)": pushed}


def many_cotangents(network: Network, arrival: str, jax: Any) -> Made:
    """B14."""
    call = network(jax)

    def pulled(x: Any, units: Any, *parameters: Any) -> Any:
        pullback = jax.vjp(partial(_of_parameters, call, x), parameters)[1]
        return jax.lax.map(pullback, units)[0] if arrival == "one by one" else jax.vmap(pullback)(units)[0]

    return {"lax.map(vjp)" if arrival == "one by one" else "vmap(vjp)": pulled}
