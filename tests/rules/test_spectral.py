"""Fourier transforms and real functions through complex values, against torch.func in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import chainrule
from chainrule.transforms import nest, nest_parts, nest_records
from tests.rules.test_layers import check, randn

CASES: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "fft_magnitude": (lambda x: torch.fft.fft(x).abs(), (randn(5),)),
    "fft_angle": (lambda x: torch.fft.fft(x).angle().cos(), (randn(5),)),
    "rfft_parts": (lambda x: torch.view_as_real(torch.fft.rfft(x, norm="ortho")), (randn(5),)),
    "irfft_even": (lambda x: torch.fft.irfft(torch.fft.rfft(x) * 2j, n=6), (randn(6),)),
    "irfft_odd": (lambda x: torch.fft.irfft(torch.fft.rfft(x) * (1 + 2j), n=5, norm="forward"), (randn(5),)),
    "irfft_two_dimensions": (lambda x: torch.fft.irfft2(torch.fft.rfft2(x) ** 2, s=(3, 4)), (randn(3, 4),)),
    "fft_two_dimensions": (lambda x: torch.fft.fft2(x).imag, (randn(3, 4),)),
    "convolution_theorem": (lambda x, y: torch.fft.ifft(torch.fft.fft(x) * torch.fft.fft(y)).real, (randn(4), randn(4))),
    "correlation": (lambda x: (torch.fft.fft(x).conj() * torch.fft.fft(x.flip(0))).real, (randn(5),)),
    "exponential": (lambda x: torch.exp(1j * x).imag, (randn(4),)),
    "view_as_complex": (lambda x: torch.view_as_complex(x).prod().abs(), (randn(3, 2),)),
    "polar": (lambda r, t: torch.polar(r.abs(), t).imag, (randn(3), randn(3))),
    "complex": (lambda a, b: (torch.complex(a, b) ** 3).real, (randn(3), randn(3))),
    "complex_matrix": (lambda a, b: (torch.complex(a, b) @ torch.complex(b, a)).abs(), (randn(3, 3), randn(3, 3) + 1.0)),
    "spectrogram": (
        lambda x: torch.stft(x, 4, window=torch.ones(4, dtype=x.dtype), return_complex=True).abs() ** 2, (randn(9),)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_spectral(name: str) -> None:
    """Every mode agrees with torch.func."""
    check(*CASES[name])


STFT = [
    {"n_fft": 8}, {"n_fft": 5, "hop_length": 3, "center": False}, {"n_fft": 8, "win_length": 5, "normalized": True},
    {"n_fft": 8, "hop_length": 20}, {"n_fft": 4, "onesided": False, "pad_mode": "constant"}, {"n_fft": 17, "center": False},
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:A window was not provided")
@pytest.mark.parametrize("options", STFT, ids=str)
@pytest.mark.parametrize("window", [None, torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(17,), (2, 17), (1, 17)])
def test_short_time_transforms(options, window, shape):
    """Signals and batches of them, windows shorter than the transform, hops longer than it; against torch's own autograd."""
    if window is torch.complex128:
        options = {**options, "onesided": False}
    width = options.get("win_length", options["n_fft"])
    torch.manual_seed(0)
    given = None if window is None else torch.randn(width, dtype=window)

    def spectrum(x):
        return torch.view_as_real(torch.stft(x, window=given, return_complex=True, **options))

    def power(x):
        return spectrum(x).square().sum().sin()

    for _ in range(3):
        x = torch.randn(shape, dtype=torch.float64)
        expected = torch.autograd.functional.jacobian(spectrum, x)
        for transform in (chainrule.jacrev, chainrule.jacfwd):
            torch.testing.assert_close(transform(spectrum)(x), expected, rtol=1e-10, atol=1e-11)
        gradient = torch.autograd.functional.jacobian(power, x)
        torch.testing.assert_close(chainrule.grad(power)(x), gradient, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(chainrule.vmap(chainrule.grad(power))(x[None]), gradient[None], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(chainrule.vmap(spectrum)(x[None]), spectrum(x)[None], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(
        chainrule.hessian(power)(x), torch.autograd.functional.hessian(power, x), rtol=1e-9, atol=1e-9
    )


def test_short_time_transforms_that_torch_refuses():
    for options in ({"n_fft": 40, "center": False}, {"n_fft": 8, "hop_length": 0}, {"n_fft": 8, "win_length": 9}):
        with pytest.raises(RuntimeError):
            chainrule.jacrev(lambda x, o=options: torch.stft(x, return_complex=True, window=torch.ones(8), **o).abs())(torch.ones(16))


@pytest.mark.parametrize("sizes", [((3,), (3,)), ((3, 1), (2,)), ((), (3,)), ((2,), ()), ((), ())], ids=str)
def test_polar(sizes):
    """Lengths of either sign and zero, by their parts: torch's own formula takes negative lengths for positive ones."""
    torch.manual_seed(0)
    length, angle = (torch.randn(size, dtype=torch.float64) for size in sizes)
    length = torch.where(length > 1, 0.0, length)

    def parts(length, angle):
        return torch.stack([length * angle.cos(), length * angle.sin()], -1)

    def polar(length, angle):
        return torch.view_as_real(torch.polar(length, angle))

    for argnum in (0, 1):
        expected = torch.func.jacrev(parts, argnum)(length, angle)
        for transform in (chainrule.jacrev, chainrule.jacfwd):
            torch.testing.assert_close(transform(polar, argnum)(length, angle), expected)
        for _ in range(3):
            mapped = chainrule.vmap(chainrule.jacrev(polar, argnum))(length[None], angle[None])
            torch.testing.assert_close(mapped, expected[None])
        second = torch.func.hessian(lambda *args: parts(*args).sin().sum(), argnum)(length, angle)
        found = chainrule.hessian(lambda *args: polar(*args).sin().sum(), argnum)(length, angle)
        torch.testing.assert_close(found, second)


def test_second_derivatives_through_half_spectra_are_one_program(monkeypatch):
    """The weights of what stands for two numbers of the whole spectrum are known to the recorder: levels are run one by one once."""
    runs = []
    monkeypatch.setattr(nest_records, "run_parts", lambda *args: runs.append(args) or nest_parts.run_parts(*args))
    monkeypatch.setattr(nest, "run_parts", lambda *args: runs.append(args) or nest_parts.run_parts(*args))

    def loss(x):
        return torch.fft.irfft(torch.fft.rfft(x.sin()) * (1 + 2j), n=6).pow(3).sum()

    hessian = chainrule.hessian(loss)
    for number in range(4):
        x = randn(6) + number
        torch.testing.assert_close(hessian(x), torch.func.hessian(loss)(x))
    assert len(runs) == 1
