"""Slopes of tanh and sigmoid inside the products that read them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import chainrule
from chainrule.execute.simplify import simplify
from chainrule.maps.staging import Program, Staged

aten = torch.ops.aten
KERNELS = {aten.tanh_backward.default._op, aten.sigmoid_backward.default._op}


def programs(build: Callable[[Program, Staged, Staged], tuple[Staged, ...]], y: torch.Tensor, g: torch.Tensor) -> list[object]:
    program = Program()
    wanted = build(program, program.input("y", y), program.input("g", g))
    kept, _ = simplify(program, [staged.slot for staged in wanted], dict(program.constants))
    return [instruction.function for instruction in kept]


def test_what_is_joined() -> None:
    y, g = torch.rand(3, 4), torch.rand(3, 4)
    assert programs(lambda p, y, g: (g * (1 - y * y),), y, g) == [aten.tanh_backward.default._op]
    assert programs(lambda p, y, g: ((1 - y * y) * g,), y, g) == [aten.tanh_backward.default._op]
    assert programs(lambda p, y, g: (g * (y * (1 - y)),), y, g) == [aten.sigmoid_backward.default._op]
    assert programs(lambda p, y, g: ((1 - y) * y * g,), y, g) == [aten.sigmoid_backward.default._op]


def test_what_is_left() -> None:
    y, g = torch.rand(3, 4), torch.rand(3, 4)
    for build in (
        lambda p, y, g: (g * (s := 1 - y * y), s.sin()),  # read twice
        lambda p, y, g: (g * (s := 1 - y * y), s),  # a result
        lambda p, y, g: (g * (2 - y * y),),
        lambda p, y, g: (g * (1 - y * g),),
        lambda p, y, g: (g * (g * (1 - y)),),
        lambda p, y, g: (g * (y * (s := 1 - y)), s),
    ):
        assert KERNELS.isdisjoint(programs(build, y, g))
    assert KERNELS.isdisjoint(programs(lambda p, y, g: (g * (1 - y * y),), y, torch.rand(2, 3, 4)))
    assert KERNELS.isdisjoint(programs(lambda p, y, g: (g * (1 - y * y),), y.to(torch.complex64), g.to(torch.complex64)))


ACTIVATIONS = {
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "gelu": F.gelu, "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu, "mish": F.mish, "softplus": lambda x: F.softplus(x, 2.0, 1.5), "logsigmoid": F.logsigmoid,
    "elu": lambda x: F.elu(x, 0.7), "celu": lambda x: F.celu(x, 0.7), "selu": F.selu, "glu": lambda x: F.glu(x, 0),
    "glu along columns": F.glu, "hardswish": F.hardswish,
}  # fmt: skip


@pytest.mark.parametrize("shape", [(6, 8), (256, 130), (0, 2), (2, 1, 4)])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_in_networks(name: str, shape: tuple[int, ...]) -> None:
    """First and second order, large enough for results that are written over what is read for the last time."""
    act = ACTIVATIONS[name]
    if 1 in (shape[0], shape[-1]) and "glu" in name:
        return
    torch.manual_seed(len(name))
    weight = torch.randn(shape[-1], shape[-1], dtype=torch.float64) / max(shape[-1], 1)

    def f(x: torch.Tensor) -> torch.Tensor:
        return act(F.linear(x.sin() * 3, weight))

    for _ in range(4):
        x, v = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
        out, pull = chainrule.vjp(f, x)
        wanted, theirs = torch.func.vjp(f, x)
        u = torch.randn_like(wanted)
        torch.testing.assert_close(out, wanted)
        torch.testing.assert_close(pull(u)[0], theirs(u)[0])
        torch.testing.assert_close(chainrule.jvp(f, (x,), (v,))[1], torch.func.jvp(f, (x,), (v,))[1])

        def loss(x: torch.Tensor) -> torch.Tensor:
            return (f(x) ** 2).sum()

        got = chainrule.jvp(chainrule.grad(loss), (x,), (v,))[1]
        torch.testing.assert_close(got, torch.func.jvp(torch.func.grad(loss), (x,), (v,))[1])
        torch.testing.assert_close(
            chainrule.vmap(chainrule.grad(loss))(torch.stack([x, v])), torch.vmap(torch.func.grad(loss))(torch.stack([x, v]))
        )
    x.requires_grad_()
    ours, theirs = (torch.autograd.grad(module.vjp(f, x)[1](u)[0].sin().sum(), x)[0] for module in (chainrule, torch.func))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_cotangents_that_are_the_same_for_all_samples(name: str, dtype: torch.dtype) -> None:
    """Kernels of single precision do not all broadcast."""
    act = ACTIVATIONS[name]
    x, u = torch.randn(3, 6, 8).to(dtype), act(torch.randn(6, 8)).to(dtype)
    exact = torch.func.vmap(lambda x: torch.func.vjp(act, x)[1](u.double())[0])(x.double())

    def pulled(module: object, x: torch.Tensor) -> torch.Tensor:
        return module.vjp(act, x)[1](u)[0]  # type: ignore[attr-defined, no-any-return]

    # Not below 1e-7: torch rounds the rate of celu to single precision.
    close = dict.fromkeys(("rtol", "atol"), max(64 * torch.finfo(dtype).eps, 1e-7))
    for _ in range(4):
        torch.testing.assert_close(chainrule.vmap(lambda x: pulled(chainrule, x))(x).double(), exact, **close)
        summed = chainrule.vmap(chainrule.grad(lambda x: act(x.flatten()).sum()))(x)
        if "glu" not in name:
            wanted = torch.func.vmap(torch.func.grad(lambda x: act(x).sum()))(x.double())
            torch.testing.assert_close(summed.double(), wanted, **close)
