"""Functions of complex values under vmap: calls that were made before are replayed; lazily conjugated views are copies."""

import pytest
import torch

import chainrule

C128 = torch.complex128


def _chain(z):
    return torch.fft.fft(z * 1j + z.conj(), dim=-1).abs()


def _products(z):
    return (z @ z.mH).real + (z.mH @ z).imag


def _views(z):
    return torch.view_as_real(torch.where(z.real > 0, z, z.conj_physical())) * z.conj().imag.unsqueeze(-1)


def _written(z):
    y = z.clone().mul_(2 + 1j)
    y.real.mul_(2.0)
    y[0] = z[1].conj()
    return y


def _built(z):
    return torch.complex(z.imag, z.real.exp()).angle() + torch.cat([z, z.conj()]).sum(0)


@pytest.mark.parametrize("conjugated", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("function", [_chain, _products, _views, _written, _built])
def test_each_call_is_that_of_the_samples(function, conjugated, requires_grad):
    """In turn: the first calls are run, later ones replayed, of tensors with the lazy bit and without."""
    for number in range(5):
        z = torch.randn(4, 3, 3, dtype=C128, generator=torch.Generator().manual_seed(number)).requires_grad_(requires_grad)
        given = z.conj() if conjugated and number % 2 == 0 else z
        expected = torch.stack([function(sample) for sample in given])
        found = chainrule.vmap(function)(given)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(chainrule.vmap(chainrule.vmap(function))(given[None]), expected[None])
        if requires_grad:
            (ours,), (theirs,) = (torch.autograd.grad(out.abs().sum(), z) for out in (found, expected))
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("write", [
    lambda y: y.conj().mul_(2j), lambda y: y.conj().imag.add_(1.0), lambda y: y.mH.fill_(1.0), lambda y: y.conj()[0].zero_(),
])  # fmt: skip
def test_writes_through_lazy_conjugation_are_refused(write):
    """They would be lost, as the view is a copy under vmap; in each call, replayed or not."""
    def function(z):
        y = z.clone()
        write(y)
        return y

    for _ in range(4):
        chainrule.vmap(lambda z: z.conj() * 2)(torch.randn(2, 3, 3, dtype=C128))
        with pytest.raises(RuntimeError, match="writes through a conjugated view"):
            chainrule.vmap(function)(torch.randn(2, 3, 3, dtype=C128))
    found = chainrule.vmap(lambda z: z.conj_physical().mul_(2j))(z := torch.randn(2, 3, dtype=C128))
    torch.testing.assert_close(found, z.conj() * 2j)
