"""Fourier transforms and functions of complex elements: both modes, order two, under vmap, and complex inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import chainrule
from chainrule.rules.opaque import OpaqueAction

Tensor = torch.Tensor
DOUBLE, COMPLEX = torch.float64, torch.complex128
OTHER = torch.randn(3, 4, dtype=COMPLEX, generator=torch.Generator().manual_seed(5))

#: From a complex matrix (3, 4), none of whose elements is near a pole, and the real one that it was made from.
STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "exp": lambda z, x: z.exp(),
    "log": lambda z, x: z.log(),
    "sqrt": lambda z, x: z.sqrt(),
    "sin, cos": lambda z, x: z.sin() * z.cos(),
    "sinh, cosh": lambda z, x: z.sinh() * z.cosh(),
    "tanh": lambda z, x: (z / 3).tanh(),
    "sigmoid": lambda z, x: (z / 3).sigmoid(),
    "reciprocal": lambda z, x: z.reciprocal() + 1 / z,
    "powers": lambda z, x: z**2 + z**3 + z**-1.5 + z ** (1 + 1j) + z**1,
    "real base": lambda z, x: z * (x.square() + 1) ** (0.5 - 1j),
    "abs": lambda z, x: z.abs() * z / z.abs().sum(),
    "sgn": lambda z, x: z.sgn() * x + (z * z).sgn(),
    "angle": lambda z, x: z.angle() * x + (z * z.conj() * (1 + x * 1j)).angle(),
    "quotients": lambda z, x: z / (1 + 2j) + (2 - 1j) / z + OTHER / z + z / OTHER + x / z + z / (1 + x * x),
    "broadcast quotients": lambda z, x: z / z[:, :1] + z[0] / z + z[0, 0] / z[1:].sum(),
    "complex": lambda z, x: torch.complex(x, x[0]) * torch.complex(z.real, x.sum()) * torch.complex(x.tanh(), OTHER.real),
    "converted": lambda z, x: z.to(torch.complex64).to(COMPLEX) * 0 + x.to(COMPLEX) * z,
    "fft": lambda z, x: torch.fft.fft(z) + torch.fft.ifft(z, norm="ortho") + torch.fft.fft(x, dim=0, norm="forward"),
    "fft of several": lambda z, x: torch.fft.fft2(z) * torch.fft.ifft2(x),
    "rfft": lambda z, x: torch.fft.rfft(x) * torch.fft.rfft(z.real, n=5) + torch.fft.rfft(x[:, :3], norm="ortho").sum(),
    "rfft of several": lambda z, x: torch.fft.rfft2(x, dim=(1, 0)) + torch.fft.rfft2(z.imag, norm="forward").sum(),
    "rfft of one": lambda z, x: torch.fft.rfft(x[:, :1]) * z,
    "irfft": lambda z, x: torch.fft.irfft(z).sum() + torch.fft.irfft(z, n=7)[:, :4] + torch.fft.irfft(z, n=2, norm="ortho").mean(),
    "irfft of several": lambda z, x: torch.fft.irfft2(z, s=(3, 5))[:, :4] * z.abs() + torch.fft.irfft2(z, dim=(1, 0)).sum(),
    "hfft": lambda z, x: torch.fft.hfft(z)[:, :4] * torch.fft.ihfft(x).sum(),
}


def made(step: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A real function of twelve real numbers."""

    def function(x: Tensor) -> Tensor:
        real = x.reshape(3, 4)
        y = step(torch.exp(1j * real.tanh()) * (1.5 + real.sin()), real)
        weight = torch.linspace(-1, 1, y.numel(), dtype=DOUBLE).reshape(y.shape)
        y = y.to(COMPLEX)
        return torch.stack([(weight * y.real).sum(), ((y * -1j).real * weight**2).sum()])

    return function


@pytest.mark.parametrize("name", STEPS)
def test_derivatives(name: str) -> None:
    """Some hundred terms of size one to a hundred: 1e-10 is a thousand times their rounding."""
    function, x = made(STEPS[name]), torch.randn(12, dtype=DOUBLE, generator=torch.Generator().manual_seed(6))
    close = {"rtol": 1e-10, "atol": 1e-10}
    if name == "real base":  # torch.func drops the imaginary part of its tangents
        expected = torch.func.jacrev(function)(x)
        second = torch.func.jacrev(torch.func.jacrev(function))(x)
    else:
        expected, second = torch.func.jacfwd(function)(x), torch.func.hessian(function)(x)
    if name == "converted":
        close = {"rtol": 1e-5, "atol": 1e-5}
    rows = torch.stack([x, x / 2])
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
        return torch.fft.fft(z.exp() / w).abs() * torch.fft.irfft(w, n=5)[:, :3] * (z * w).sqrt()

    z, w = torch.randn(2, 3, dtype=COMPLEX), torch.randn(2, 3, dtype=COMPLEX)
    bar, tangents = torch.randn(2, 3, dtype=COMPLEX), (torch.randn_like(z), torch.randn_like(w))
    for _ in range(2):
        out, pull = chainrule.vjp(function, z, w)
        torch.testing.assert_close(pull(bar), torch.func.vjp(function, z, w)[1](bar))
        pushed = chainrule.jvp(function, (z, w), tangents)
        torch.testing.assert_close(pushed, torch.func.jvp(function, (z, w), tangents))


def test_a_convolution_needs_no_formula_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """In either mode, and twice."""

    def refuse(*args: object) -> None:
        raise AssertionError("torch's own formula was used")

    def function(x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(x.flip(0)) / 3, n=6).tanh().sum()

    monkeypatch.setattr(OpaqueAction, "pull", refuse)
    monkeypatch.setattr(OpaqueAction, "push", refuse)
    x = torch.randn(6, dtype=DOUBLE)
    torch.testing.assert_close(chainrule.hessian(function)(x), torch.func.hessian(function)(x))


def test_directions_at_the_origin() -> None:
    """As torch has them: no derivative where there is no direction."""
    z = torch.tensor([0.0, 1 + 2j, -3.0, 2j], dtype=COMPLEX)
    tangent, bar = torch.randn(4, dtype=COMPLEX), torch.randn(4, dtype=COMPLEX)
    for function in (torch.sgn, torch.angle):
        for _ in range(3):
            out, pull = chainrule.vjp(function, z)
            given = bar.to(out.dtype) if out.is_complex() else bar.real
            torch.testing.assert_close(pull(given), torch.func.vjp(function, z)[1](given))
            torch.testing.assert_close(chainrule.jvp(function, (z,), (tangent,)), torch.func.jvp(function, (z,), (tangent,)))
