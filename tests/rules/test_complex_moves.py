"""Complex values that are rearranged, added or multiplied: both modes, order two, and under vmap."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import chainrule
from chainrule.rules.opaque import OpaqueAction

Tensor = torch.Tensor
DOUBLE, COMPLEX = torch.float64, torch.complex128
MATRIX = torch.randn(3, 4, dtype=COMPLEX, generator=torch.Generator().manual_seed(3))
VECTOR = torch.randn(4, dtype=COMPLEX, generator=torch.Generator().manual_seed(4))

#: From a complex matrix (3, 4), the real one that it was made from, and a vector (4,).
STEPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "conj": lambda z, x, v: z.conj(),
    "conj_physical": lambda z, x, v: torch.conj_physical(z) * z,
    "neg": lambda z, x, v: -z,
    "t": lambda z, x, v: z.t(),
    "t of a vector": lambda z, x, v: v.t(),
    "transpose": lambda z, x, v: z.transpose(-1, 0),
    "permute": lambda z, x, v: z.reshape(3, 2, 2).permute(2, 0, 1),
    "views": lambda z, x, v: z.view(2, 6).unsqueeze(1).squeeze(1).squeeze(),
    "clone": lambda z, x, v: z.t().clone(memory_format=torch.contiguous_format),
    "select": lambda z, x, v: z[1] * z[:, -2].sum() + z[-1, 2],
    "unbind": lambda z, x, v: z.unbind(-1)[2] * z.unbind()[1][1],
    "stack": lambda z, x, v: torch.stack([z, z.conj(), z], 1),
    "stack of two kinds": lambda z, x, v: torch.stack([z, x.to(COMPLEX)], -1),
    "pairs": lambda z, x, v: torch.view_as_real(z) ** 2,
    "numbers": lambda z, x, v: torch.view_as_complex(torch.stack([x, x**2], -1)),
    "square": lambda z, x, v: z * z,
    "product with a constant": lambda z, x, v: MATRIX * z * (1.5 - 2j) * 2.0,
    "broadcast product": lambda z, x, v: z * v * z[:, :1] * z[0, 0],
    "product with a real one": lambda z, x, v: x * z * x[0],
    "sums": lambda z, x, v: z + v - z[:, :1] + x - 2.0 + (1j - z),
    "scaled sum": lambda z, x, v: torch.add(z, v, alpha=2.5),
    "real sum": lambda z, x, v: x[0] - z,
    "mm": lambda z, x, v: z @ z.t() @ MATRIX,
    "mv": lambda z, x, v: z @ v + MATRIX @ v + z @ VECTOR,
    "sums over dimensions": lambda z, x, v: z.sum(-1, keepdim=True) + z.sum((0, 1)) * z.sum(0) + v.sum(),
    "expand": lambda z, x, v: z[:, :1].expand(3, 5) * v[0].expand(2, 3, 5),
    "bmm": lambda z, x, v: torch.bmm(z.view(2, 2, 3), torch.stack([z, z.conj()])),
    "of no element": lambda z, x, v: z[:, :0].t() @ z,
}


def two_numbers(y: Tensor) -> Tensor:
    """Two real numbers that depend on all real and imaginary parts."""
    weight = torch.linspace(-1, 1, y.numel(), dtype=DOUBLE).reshape(y.shape)
    return torch.stack([(weight * y.real).sum(), (y.abs() ** 2 * weight).sum() + ((y * -1j).real * weight**2).sum()])


def made(step: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A real function of twelve real numbers."""

    def function(x: Tensor) -> Tensor:
        real = x.reshape(3, 4)
        z = torch.exp(1j * real) * (1 + real)
        return two_numbers(step(z, real, z[0] * 2 + z[2]))

    return function


@pytest.mark.parametrize("name", STEPS)
def test_derivatives(name: str) -> None:
    """Some hundred terms of size one to ten: 1e-11 is a thousand times their rounding."""
    function, x = made(STEPS[name]), torch.randn(12, dtype=DOUBLE)
    close = {"rtol": 1e-11, "atol": 1e-11}
    expected, second = torch.func.jacrev(function)(x), torch.func.hessian(function)(x)
    rows = torch.stack([x, 2 * x])
    for _ in range(2):  # planned, and replayed
        for transform in (chainrule.jacrev, chainrule.jacfwd, chainrule.jacobian):
            torch.testing.assert_close(transform(function)(x), expected, **close)
        torch.testing.assert_close(chainrule.hessian(function)(x), second, **close)
        torch.testing.assert_close(chainrule.jacfwd(chainrule.jacfwd(function))(x), second, **close)
        mapped = chainrule.vmap(chainrule.jacrev(function))(rows)
        torch.testing.assert_close(mapped, torch.stack([torch.func.jacrev(function)(row) for row in rows]), **close)


def test_complex_inputs() -> None:
    """Cotangents and tangents of complex inputs are in torch's convention."""

    def function(z: Tensor, w: Tensor) -> Tensor:
        return (z.conj() * w[:2]).t() @ torch.stack([z[0], w[1]]) @ w[2] + w[0] * z[1, 1]

    z, w = torch.randn(2, 3, dtype=COMPLEX), torch.randn(3, 3, dtype=COMPLEX)
    bar, tangents = torch.randn(3, dtype=COMPLEX), (torch.randn_like(z), torch.randn_like(w))
    for _ in range(2):
        out, pull = chainrule.vjp(function, z, w)
        torch.testing.assert_close(pull(bar), torch.func.vjp(function, z, w)[1](bar))
        pushed = chainrule.jvp(function, (z, w), tangents)
        torch.testing.assert_close(pushed, torch.func.jvp(function, (z, w), tangents))


def test_torchs_formulas_are_left_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """One per row of rearrangements was most of the time that derivatives of complex steps took."""

    def refuse(*args: object) -> None:
        raise AssertionError("torch's own formula was used")

    def function(x: Tensor) -> Tensor:
        z = torch.view_as_complex(torch.stack([x, x**2], -1))
        y = torch.stack([(z * z.conj()).t() @ z, (z + z[0] - VECTOR * z).t()], 0)
        return (torch.view_as_real(y[0] @ y[1][2]) ** 2).sum()

    monkeypatch.setattr(OpaqueAction, "pull", refuse)
    monkeypatch.setattr(OpaqueAction, "push", refuse)
    x = torch.randn(4, 4, dtype=DOUBLE)
    third = lambda library: library.grad(lambda x: library.hessian(function)(x).sum())(x)  # noqa: E731
    torch.testing.assert_close(third(chainrule), third(torch.func))
