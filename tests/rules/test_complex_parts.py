"""Complex values of which parts are taken, placed, joined or summed: both modes, order two, and under vmap."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

import chainrule
from chainrule.rules.opaque import OpaqueAction
from tests.rules.test_complex_moves import two_numbers

Tensor = torch.Tensor
DOUBLE, COMPLEX = torch.float64, torch.complex128
PLACES, ONCE, MASK = torch.tensor([2, 0, 2]), torch.tensor([3, 1]), torch.tensor([True, False, True])
ZERO = torch.zeros((), dtype=COMPLEX)


def put(shape: tuple[int, ...], where: object, what: Tensor) -> Tensor:
    """A part of an array of ones written over."""
    out = torch.ones(shape, dtype=COMPLEX)
    out[where] = what
    return out * out


#: From a complex matrix (3, 4), and the real one that it was made from.
STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "slices": lambda z, x: z[1:, ::2] * z[:-1, -2:] + z[::3, 1:2],
    "a slice of no element": lambda z, x: z[3:].sum(0) + z[0],
    "padding": lambda z, x: F.pad(z, (1, 2, -1, 2)) + F.pad(z, (1, 2, 0, 1), value=2.0),
    "cat": lambda z, x: torch.cat([z, z[1:] * z[:2], z[:0]], 0),
    "cat in the last dimension": lambda z, x: torch.cat([z, torch.ones(3, 1, dtype=COMPLEX), z * 2], -1),
    "cat of two kinds": lambda z, x: torch.cat([z, x], -1),
    "split": lambda z, x: z.split(2)[0] * z.split(2)[1] + z.chunk(2, 1)[1].sum() + z.split([1, 3], -1)[1][:, :1].sum(),
    "flip and roll": lambda z, x: z.flip(0, -1) * z.roll(2, -1) + z.roll((1, 2), (0, 1)) + z.roll(3),
    "triangles": lambda z, x: z.tril() * z + z.triu(1),
    "diagonal": lambda z, x: z.diagonal() + z.t().diagonal(-1) * z[0, 0],
    "windows": lambda z, x: z.unfold(1, 2, 1) * z.unfold(-1, 3, 1)[:, :1, :2],
    "repeat": lambda z, x: z.repeat(2, 1, 2) * z.repeat(1, 2),
    "sums and means": lambda z, x: z * z.mean() + z.sum() * z.mean(-1, keepdim=True) + z.mean((0, 1)),
    "index": lambda z, x: z[PLACES] * z[:, PLACES].sum() + z[PLACES, PLACES][0] + z[MASK].sum() + z[None, :, PLACES][0, :, :1],
    "index apart": lambda z, x: z.reshape(3, 2, 2)[PLACES, :, torch.tensor([0, 1, 1])],
    "a slice written": lambda z, x: put((4, 5), (slice(0, 3), slice(1, None)), z),
    "steps written": lambda z, x: put((5, 4), (slice(0, None, 2),), z) + put((1, 4), 0, z[1]),
    "a row written": lambda z, x: put((2, 3, 4), (1,), z),
    "real values written": lambda z, x: put((4, 4), (slice(1, None),), x) + z[0],
    "written over": lambda z, x: put((3, 4), ..., z[:1]),
    "elements written": lambda z, x: put((4, 4), (ONCE,), z[:1]) + put((4, 4), (slice(None), ONCE), z[0, :2]).sum(),
    "elements added": lambda z, x: (z * z).index_put((PLACES, PLACES), z[1, :3], accumulate=True),
    "where": lambda z, x: torch.where(x > 0, z, z[0] * z) + torch.where(x[:, :1] > 0, ZERO, z[0]),
    "masked": lambda z, x: z.masked_fill(x > 0, 2.0) * z,
    "from a number": lambda z, x: (1 - z) * (2j - x),
    "addmm": lambda z, x: torch.addmm(z[0, :3], z, z.t()) + torch.baddbmm(z[None, :, :3], z[None], z.t()[None])[0],
    "scaled addmm": lambda z, x: torch.addmm(z[0, :3], z, z.t(), alpha=2, beta=0.5),
    "numbers": lambda z, x: z.mul(2.5) * x.mul(1 - 2j) / 2,
    "components": lambda z, x: z.real * z.imag.sin() + z[0].real + (z * z).imag + torch.view_as_real(z)[..., 1:].sum(-1),
    "components of a conjugate": lambda z, x: z.conj().imag * z[0].real + z.conj().real,
    "Fourier": lambda z, x: torch.fft.rfft2(x, (4, 3))[:2, :2] * torch.fft.fft(z, 6)[:2, 1:3] + torch.fft.irfft(z, 9).sum(),
}  # fmt: skip


def made(step: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Two real numbers from twelve."""

    def function(x: Tensor) -> Tensor:
        real = x.reshape(3, 4)
        return two_numbers(step(torch.exp(1j * real) * (1 + real), real))

    return function


@pytest.mark.parametrize("name", STEPS)
def test_derivatives(name: str) -> None:
    """Some hundred terms of size one to a thousand: 1e-10 is a thousand times their rounding."""
    function, x = made(STEPS[name]), torch.randn(12, dtype=DOUBLE)
    close = {"rtol": 1e-10, "atol": 1e-10}
    expected, second = torch.func.jacrev(function)(x), torch.func.jacrev(torch.func.jacrev(function))(x)
    rows = x + torch.randn(2, 12, dtype=DOUBLE)
    cotangent, tangent = torch.randn(2, dtype=DOUBLE), torch.randn(12, dtype=DOUBLE)
    for _ in range(4):  # planned, and replayed in several ways
        for transform in (chainrule.jacrev, chainrule.jacfwd, chainrule.jacobian):
            torch.testing.assert_close(transform(function)(x), expected, **close)
        torch.testing.assert_close(chainrule.vjp(function, x)[1](cotangent)[0], cotangent @ expected, **close)
        torch.testing.assert_close(chainrule.jvp(function, (x,), (tangent,))[1], expected @ tangent, **close)
        torch.testing.assert_close(chainrule.hessian(function)(x), second, **close)
        if "mask" not in name and name != "index":  # whose shapes depend on no mapped value, but torch.vmap does not know it
            mapped = chainrule.vmap(chainrule.jacrev(function))(rows)
            torch.testing.assert_close(mapped, torch.stack([torch.func.jacrev(function)(row) for row in rows]), **close)
    step = 1e-6 * tangent
    slope = (function(x + step) - function(x - step)) / 2e-6
    torch.testing.assert_close(expected @ tangent, slope, rtol=1e-6, atol=1e-6)


#: Those that torch's own formulas serve.
_TORCHS = frozenset({
    "cat of two kinds", "index apart", "real values written", "scaled addmm", "flip and roll",
    "components of a conjugate"})  # fmt: skip


@pytest.mark.parametrize("name", [name for name in STEPS if name not in _TORCHS])
def test_torchs_formulas_are_left_aside(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them takes as long as ten products."""

    def refuse(*args: object) -> None:
        raise AssertionError("torch's own formula was used")

    monkeypatch.setattr(OpaqueAction, "pull", refuse)
    monkeypatch.setattr(OpaqueAction, "push", refuse)
    function, x = made(STEPS[name]), torch.randn(12, dtype=DOUBLE)
    third = chainrule.grad(lambda x: chainrule.hessian(function)(x).sum())(x)
    expected = torch.func.grad(lambda x: torch.func.jacrev(torch.func.jacrev(function))(x).sum())(x)
    torch.testing.assert_close(third, expected, rtol=1e-10, atol=1e-10)


def test_gradients_by_both_components_inside() -> None:
    """The array that holds both is an input there: the way to each component passes by it."""

    def inner(x: Tensor) -> Tensor:
        y = x * 1.0
        z = torch.fft.rfft(y)
        both = torch.view_as_real(z)
        total = (both[..., 0] ** 2 + both[..., 1] * both[..., 0].sin()).sum()
        found = torch.autograd.grad(total, (y, both, z), create_graph=True)
        return (found[0] ** 2).sum() + (found[1] ** 3).sum() + found[2].real.sin().sum() + (found[2].imag ** 2).sum()

    for _ in range(4):
        x = torch.randn(6, dtype=DOUBLE, requires_grad=True)
        (expected,) = torch.autograd.grad(inner(x), x)
        torch.testing.assert_close(chainrule.grad(inner)(x.detach()), expected)


def test_where_real_and_complex_values_meet() -> None:
    """Torch's own formula for that has no second derivative."""
    mixed = made(lambda z, x: torch.where(x > 0, x, z) * torch.where(x < 0.5, z[1], x[:1]))
    alike = made(lambda z, x: torch.where(x > 0, x.to(COMPLEX), z) * torch.where(x < 0.5, z[1], x[:1].to(COMPLEX)))
    for _ in range(4):
        x = torch.randn(12, dtype=DOUBLE)
        for transform in (chainrule.jacrev, chainrule.jacfwd, chainrule.hessian):
            torch.testing.assert_close(transform(mixed)(x), transform(alike)(x), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(chainrule.jacrev(mixed)(x), torch.func.jacrev(alike)(x), rtol=1e-10, atol=1e-10)


def test_complex_inputs() -> None:
    """Cotangents and tangents of complex inputs are in torch's convention."""

    def function(z: Tensor, w: Tensor) -> Tensor:
        out = torch.cat([F.pad(z[:, 1:], (0, 1)), w], 0).roll(1, 0) * 2j
        out[:1, :2] = w[2, 1:]
        return torch.addmm(out[0], out, w.flip(0)).mean(0)

    z, w = torch.randn(2, 3, dtype=COMPLEX), torch.randn(3, 3, dtype=COMPLEX)
    bar, tangents = torch.randn(3, dtype=COMPLEX), (torch.randn_like(z), torch.randn_like(w))
    for _ in range(4):
        out, pull = chainrule.vjp(function, z, w)
        torch.testing.assert_close(pull(bar), torch.func.vjp(function, z, w)[1](bar))
        pushed = chainrule.jvp(function, (z, w), tangents)
        torch.testing.assert_close(pushed, torch.func.jvp(function, (z, w), tangents))


@pytest.mark.parametrize("write", [lambda y: y.zero_(), lambda y: y.fill_(2.0), lambda y: y[1:].zero_()])
def test_complex_values_that_are_written_over(write):
    def function(x):
        z = torch.complex(x, x.sin())
        y = z * 2
        write(y)
        y[0].mul_(z[2])
        return (y * y.conj()).real.sum() + z.abs().sum()

    for _ in range(3):
        x = torch.randn(4, 3, dtype=torch.float64)
        expected = torch.stack([torch.autograd.functional.jacobian(function, row) for row in x])
        torch.testing.assert_close(chainrule.grad(function)(x[0]), expected[0])
        torch.testing.assert_close(chainrule.jacfwd(function)(x[0]), expected[0])
        torch.testing.assert_close(chainrule.vmap(chainrule.grad(function))(x), expected)
