"""Functions that close over a module as it is, its parameters requiring grad: every result joins their graph (B20)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

import chainrule
from benchmarks.networks import Architecture, encoder_architecture, mlp_architecture
from benchmarks.workload import Expression, Targets, Workload

tf = torch.func
Tensor = torch.Tensor


class Held:
    """A module with parameters of its own, the same ones for each dtype and device.

    Args:
        architecture: what the module is.
    """

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture
        self._made: dict[Any, nn.Module] = {}

    def module(self, x: Tensor) -> nn.Module:
        """The module for inputs like ``x``."""
        made = self._made.get((x.dtype, x.device))
        if made is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                parameters = [p.to(x) for p in self._architecture.parameters()]
            made = copy.deepcopy(self._architecture.module).to_empty(device=x.device).to(x.dtype)
            made.load_state_dict(self._architecture.named(parameters))
            self._made[x.dtype, x.device] = made.eval()
        return made


def _sum(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).sum()


def _vmap(library: Any, net: nn.Module, x: Tensor) -> Tensor:
    return library.vmap(net)(x)


def _grad(library: Any, net: nn.Module, x: Tensor) -> Tensor:
    return library.grad(partial(_sum, net))(x)


def _jacrev(library: Any, net: nn.Module, x: Tensor) -> Tensor:
    return library.jacrev(net)(x)


def _mapped_jacrev(library: Any, net: nn.Module, x: Tensor) -> Tensor:
    return library.vmap(library.jacrev(net))(x)


def _residuals(library: Any, net: nn.Module, x: Tensor) -> Tensor:
    """Laplacians at the points, and the sines of the values."""

    def field(point: Tensor) -> Tensor:
        return net(point).squeeze(-1)

    if library is chainrule:
        found = chainrule.vmap(chainrule.laplacian(field))(x)
    else:
        found = tf.vmap(lambda point: tf.jacfwd(tf.jacrev(field))(point).diagonal().sum())(x)
    return found + net(x).squeeze(-1).sin()


def _step(library: Any, net: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    loss = _residuals(library, net, x).square().mean()
    return torch.autograd.grad(loss, list(net.parameters()), allow_unused=True, materialize_grads=True)


def _row(
    key: str, title: str, held: Held, shape: Sequence[int], name: str, function: Expression, target: float,
    hand: Expression | None = None,
) -> Workload:  # fmt: skip
    def expression(library: Any) -> Expression:
        return lambda x: function(library, held.module(x), x)

    return Workload(
        key=key,
        title=title,
        inputs=lambda: (torch.randn(tuple(shape)).double(),),
        ours={name: expression(chainrule)},
        peers={name: expression(tf)},
        hand=None if hand is None else lambda x: hand(held.module(x), x),
        targets=Targets(target),
        compiled=False,
    )


def module_rows(widths: Sequence[int], batch: int, points: int, encoder: Sequence[int]) -> tuple[Workload, ...]:
    """B20, for a tanh MLP, a scalar field of three coordinates and a small encoder layer."""
    names = "-".join(map(str, widths))
    field = (3, *widths[1:-1], 1)
    net, scalar = (Held(mlp_architecture(w)) for w in (widths, field))
    of = f"of a closed-over tanh MLP {names}, parameters requiring grad"
    step = f"PINN step (Laplacian, loss, backward), {points} points, closed-over tanh MLP {'-'.join(map(str, field))}"
    layer = f"grad of a closed-over TransformerEncoderLayer, eval mode, d={encoder[1]}, length {encoder[0]}"
    return (
        _row("B20a", f"vmap {of}, {batch} rows", net, (batch, widths[0]), "vmap", _vmap, 1, lambda module, x: module(x)),
        _row("B20b", f"grad {of}", net, (widths[0],), "grad", _grad, 1),
        _row("B20c", f"jacrev {of}", net, (widths[0],), "jacrev", _jacrev, 1),
        _row("B20d", f"vmap(jacrev) {of}, {batch} rows", net, (batch, widths[0]), "vmap(jacrev)", _mapped_jacrev, 1),
        _row("B20e", step, scalar, (points, 3), "vmap(laplacian)", _step, 1),
        _row("B20f", layer, Held(encoder_architecture(encoder[1])), encoder, "grad", _grad, 1),
    )


WORKLOADS: tuple[Workload, ...] = module_rows((8, 32, 8), 16, 64, (5, 16))
SMALL: tuple[Workload, ...] = module_rows((3, 5, 2), 4, 6, (3, 8))
