"""Fourier transforms and real functions through complex values, against torch.func in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

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
