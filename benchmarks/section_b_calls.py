"""Rows bound by calls rather than arithmetic: vmap, jvp, vjp, grad and linearize on small functions (B12 to B14)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

import chainrule
from benchmarks import jax_peers
from benchmarks.networks import Architecture, mlp_architecture
from benchmarks.overhead import OPS, chain
from benchmarks.workload import Expression, Targets, Workload

tf = torch.func
Tensor = torch.Tensor


def chain_sum(x: Tensor) -> Tensor:
    """The chain of pointwise ops as a scalar function."""
    return chain(x).sum()


# --- the transforms, of either library ------------------------------------------------------------------------------


def _jvp(library: Any, x: Tensor, tangent: Tensor) -> Any:
    return library.jvp(chain, (x,), (tangent,))


def _vjp(library: Any, x: Tensor, cotangent: Tensor) -> Any:
    value, pullback = library.vjp(chain, x)
    return value, pullback(cotangent)[0]


def _linearize(library: Any, x: Tensor, tangent: Tensor) -> Any:
    value, push = library.linearize(chain, x)
    return value, push(tangent)


def _vmapped_network(library: Any, architecture: Architecture) -> Expression:
    mapped = library.vmap(architecture.calling(library), in_dims=(None, 0))
    return lambda x, *parameters: mapped(architecture.named(parameters), x)


def _split(architecture: Architecture, both: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    half = len(both) // 2
    return architecture.named(both[:half]), architecture.named(both[half:])


def _tangents(library: Any, way: str, architecture: Architecture, x: Tensor, *both: Tensor) -> Any:
    """The derivatives along many tangents of the parameters, of shape (batch, outputs): a list, or with a leading dimension."""
    parameters, tangents = _split(architecture, both)
    call = architecture.calling(library)
    if "linearize" in way:
        push = library.linearize(lambda p: call(p, x), parameters)[1]
    else:

        def push(tangent: dict[str, Tensor]) -> Tensor:
            return library.jvp(lambda p: call(p, x), (parameters,), (tangent,))[1]

    if "vmap" in way:
        return library.vmap(push)(tangents)
    columns = {name: leaf.unbind() for name, leaf in tangents.items()}
    count = len(columns[architecture.names[0]])
    return [push({name: leaves[i] for name, leaves in columns.items()}) for i in range(count)]


def _cotangents(library: Any, way: str, architecture: Architecture, x: Tensor, units: Tensor, *parameters: Tensor) -> Any:
    """The pullbacks of many cotangents to the parameters: a list, or each leaf with a leading dimension for them."""
    call = architecture.calling(library)
    pullback = library.vjp(lambda p: call(p, x), architecture.named(parameters))[1]
    if "vmap" in way:
        return library.vmap(pullback)(units)[0]
    return [pullback(unit)[0] for unit in units]


def _stacked(column: str, found: Any, inputs: tuple[Tensor, ...]) -> Any:
    """Results that came one by one, with a leading dimension for them."""
    each = [tree_leaves(item) for item in found]
    return [torch.stack(leaves) for leaves in zip(*each, strict=True)]


# --- formulas written by hand ---------------------------------------------------------------------------------------


def hand_chain_tangent(x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative along a tangent."""
    for _ in range(OPS // 4):
        tangent = tangent * x.cos() * 0.5
        x = (x.sin() * 0.5 + 1.0).tanh()
        tangent = tangent * (1 - x * x)
    return x, tangent


def hand_chain_gradient(x: Tensor) -> Tensor:
    """The gradient of the sum."""
    return hand_chain_tangent(x, torch.ones_like(x))[1]


def hand_tangents(x: Tensor, *both: Tensor) -> Tensor:
    """Tangents of all weights, layer by layer, each layer's share added in its product. Shape (tangents, batch, outputs)."""
    half = len(both) // 2
    pushed: Tensor | None = None
    for number in range(0, half, 2):
        weight, bias, along, along_bias = both[number], both[number + 1], both[half + number], both[half + number + 1]
        count = along.shape[0]
        new = torch.baddbmm(along_bias.unsqueeze(1), x.expand(count, *x.shape), along.mT)
        if pushed is not None:
            new.flatten(0, 1).addmm_(pushed.flatten(0, 1), weight.t())
        if number + 2 < half:
            x = F.linear(x, weight, bias).tanh()
            new.mul_(1 - x * x)
        pushed = new
    assert pushed is not None
    return pushed


def hand_tangents_one_by_one(x: Tensor, *both: Tensor) -> list[tuple[Tensor]]:
    """One tangent of all weights after the other; the activations are computed once."""
    half = len(both) // 2
    weights, activations, slopes = both[:half:2], [x], list[Tensor]()
    for weight, bias in zip(weights[:-1], both[1 : half - 2 : 2], strict=True):
        value = F.linear(activations[-1], weight, bias).tanh()
        activations.append(value)
        slopes.append(1 - value * value)
    found: list[tuple[Tensor]] = []
    for along in zip(*both[half:], strict=True):
        pushed = F.linear(x, along[0], along[1]) * slopes[0]
        for number in range(1, len(weights)):
            shared = F.linear(activations[number], along[2 * number], along[2 * number + 1])
            pushed = torch.addmm(shared, pushed, weights[number].t())
            if number < len(slopes):
                pushed = pushed.mul_(slopes[number])
        found.append((pushed,))
    return found


def hand_cotangents_one_by_one(x: Tensor, units: Tensor, *parameters: Tensor) -> list[list[Tensor]]:
    """One cotangent after the other; the activations are computed once."""
    activations, slopes = [x], list[Tensor]()
    for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
        value = F.linear(activations[-1], weight, bias).tanh()
        activations.append(value)
        slopes.append(1 - value * value)
    pulled: list[list[Tensor]] = []
    for signal in units:
        found: list[Tensor] = []
        for number in reversed(range(len(activations))):
            found = [signal.t() @ activations[number], signal.sum(0), *found]
            if number:
                signal = (signal @ parameters[2 * number]).mul_(slopes[number - 1])
        pulled.append(found)
    return pulled


def hand_cotangents(x: Tensor, units: Tensor, *parameters: Tensor) -> list[Tensor]:
    """Cotangents with the samples first, so that the gradient of a weight is one product for all of them."""
    activations = [x]
    for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
        activations.append(F.linear(activations[-1], weight, bias).tanh())
    signal = units.transpose(0, 1).contiguous()
    found: list[Tensor] = []
    for weight, value in zip(parameters[-2::-2], activations[::-1], strict=True):
        batch, count, size = signal.shape
        found = [(signal.view(batch, -1).t() @ value).view(count, size, -1), signal.sum(0), *found]
        if value is not x:
            signal = (signal.view(-1, size) @ weight).view(batch, count, -1).mul_((1 - value * value).unsqueeze(1))
    return found


# --- the rows -------------------------------------------------------------------------------------------------------


def _row(
    key: str,
    title: str,
    inputs: Callable[[], tuple[Tensor, ...]],
    expressions: Callable[[Any], Mapping[str, Expression]],
    target: float,
    hand: Expression | None,
    jax: Callable[[Any], Mapping[str, Expression]],
) -> Workload:
    ours, peers = expressions(chainrule), expressions(tf)
    return Workload(
        key=key, title=title, inputs=inputs, ours=ours, peers=peers, hand=hand, jax=jax, targets=Targets(target),
        reduced=_stacked if "one by one" in title else None,
    )  # fmt: skip


def _chain_row(
    key: str, title: str, name: str, function: Expression, target: float, jax: Callable[[Any], Mapping[str, Expression]]
) -> Workload:
    return _row(
        key,
        f"{title} of a chain of {OPS} pointwise ops, n=16",
        lambda: (torch.randn(16).double(), torch.randn(16).double()),
        lambda library: {name: partial(function, library)},
        target,
        hand_chain_tangent,
        jax,
    )


def network_vmap_row(widths: Sequence[int], batch: int) -> Workload:
    """B12, the network."""
    architecture = mlp_architecture(widths)
    call = architecture.calling(tf)
    return _row(
        "B12b",
        f"vmap of a tanh MLP {'-'.join(map(str, widths))} over {batch} rows",
        lambda: (torch.randn(batch, widths[0]).double(), *architecture.parameters()),
        lambda library: {"vmap": _vmapped_network(library, architecture)},
        1,
        lambda x, *parameters: call(architecture.named(parameters), x),
        partial(jax_peers.network_vmap, jax_peers.mlp_network),
    )


def many_tangents_row(key: str, arrival: str, widths: Sequence[int], batch: int, count: int) -> Workload:
    """B14, forward: tangents that come one by one, as in an iterative solver, or all at once."""
    architecture = mlp_architecture(widths)

    def make() -> tuple[Tensor, ...]:
        tangents = [torch.randn(count, *shape).double() for shape in architecture.shapes.values()]
        return torch.randn(batch, widths[0]).double(), *architecture.parameters(), *tangents

    def expressions(library: Any) -> dict[str, Expression]:
        names = ["linearize", "jvp"] if library is tf else ["linearize"]
        ways = [f"{name}, one by one" if arrival == "one by one" else f"vmap({name})" for name in names]
        return {way: partial(_tangents, library, way, architecture) for way in ways}

    network = f"tanh MLP {'-'.join(map(str, widths))}, batch {batch}"
    hand = hand_tangents_one_by_one if arrival == "one by one" else hand_tangents
    title = f"linearize once, {count} tangents of the parameters {arrival}, {network}"
    return _row(key, title, make, expressions, 2, hand, partial(jax_peers.many_tangents, jax_peers.mlp_network, arrival))


def many_cotangents_row(key: str, arrival: str, widths: Sequence[int], batch: int, count: int) -> Workload:
    """B14, reverse."""
    architecture = mlp_architecture(widths)

    def make() -> tuple[Tensor, ...]:
        units = torch.randn(count, batch, widths[-1])
        return torch.randn(batch, widths[0]).double(), units.double(), *architecture.parameters()

    def expressions(library: Any) -> dict[str, Expression]:
        way = "vjp, one by one" if arrival == "one by one" else "vmap(vjp)"
        return {way: partial(_cotangents, library, way, architecture)}

    network = f"tanh MLP {'-'.join(map(str, widths))}, batch {batch}"
    hand = hand_cotangents_one_by_one if arrival == "one by one" else hand_cotangents
    title = f"vjp once, {count} cotangents to the parameters {arrival}, {network}"
    return _row(key, title, make, expressions, 2, hand, partial(jax_peers.many_cotangents, jax_peers.mlp_network, arrival))


def many_rows(widths: Sequence[int], batch: int, count: int) -> tuple[Workload, ...]:
    """B14."""
    return (
        many_tangents_row("B14a", "one by one", widths, batch, count),
        many_cotangents_row("B14b", "one by one", widths, batch, count),
        many_tangents_row("B14c", "at once", widths, batch, count),
        many_cotangents_row("B14d", "at once", widths, batch, count),
    )


_MLP = (32, 128, 128, 10)

_CHAINS: tuple[Workload, ...] = (
    _row(
        "B12a",
        f"vmap of a chain of {OPS} pointwise ops on 8×16",
        lambda: (torch.randn(8, 16).double(),),
        lambda library: {"vmap": library.vmap(chain)},
        1,
        chain,
        jax_peers.chain_vmap,
    ),
    _chain_row("B13a", "jvp", "jvp", _jvp, 1.3, jax_peers.chain_jvp),
    _chain_row("B13b", "vjp and its function", "vjp", _vjp, 1.3, jax_peers.chain_vjp),
    _row(
        "B13c",
        f"grad of a chain of {OPS} pointwise ops, n=16",
        lambda: (torch.randn(16).double(),),
        lambda library: {"grad": library.grad(chain_sum)},
        1.3,
        hand_chain_gradient,
        jax_peers.chain_gradient,
    ),
    _chain_row("B13d", "linearize and its function", "linearize", _linearize, 100, jax_peers.chain_linearize),
)

WORKLOADS: tuple[Workload, ...] = (
    *_CHAINS,
    network_vmap_row(_MLP, 32),
    *many_rows(_MLP, 32, 100),
)

#: The same rows at sizes that every test run can afford.
SMALL: tuple[Workload, ...] = (
    *_CHAINS,
    network_vmap_row((5, 8, 7, 4), 3),
    *many_rows((5, 8, 7, 4), 3, 4),
)
