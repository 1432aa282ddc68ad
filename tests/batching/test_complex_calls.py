"""Functions of complex values under vmap: calls that were made before are replayed; lazily conjugated views are copies."""

import pytest
import torch

import chainrule
from chainrule.batching.mode import VmapMode
from chainrule.dispatch import KNOWS_STATE

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


def _promoted(x, z):
    """Real and complex samples of several ranks, and numbers."""
    scale = x.sum() * torch.eye(3, dtype=z.dtype) - 1j * torch.sin(x)[0] * torch.ones(2, 3, 3, dtype=x.dtype)
    return (scale * z).sum(0) / (2 - 0.5j) + x * 2j - z.abs() ** 2


def _built_on(x, z):
    """Tensors of numbers, one of which is written to."""
    padded = torch.zeros(5, 3, dtype=z.dtype)
    padded[1:4] = z * torch.linspace(0, 1, 3)
    return torch.full((3,), 1j) * padded.sum(0) + torch.arange(3) * x


def _windows(x, z):
    spectrum = torch.stft(x.repeat(8), 8, hop_length=4, window=torch.hann_window(8, dtype=x.dtype), return_complex=True)
    return spectrum.mH.real.sum(0) + z.conj().imag.sum()


def _circuit(x, z):
    state = torch.einsum("ij,j->i", z, torch.exp(-0.5j * x))
    state = torch.polar(state.abs(), state.angle() + x) @ z.mT
    return torch.einsum("i,ij,j->", state.conj(), z + z.mH, state).real.reshape(1)


@pytest.mark.parametrize("function", [_promoted, _built_on, _windows, _circuit])
def test_derivatives_of_samples(function):
    """Of each call, run, recorded or replayed: values, gradients and tangents, against torch.func and finite differences."""
    def loss(x, z):
        return torch.view_as_real(function(x, z) + 0j).square().sum()

    for number in range(5):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(4, 3, dtype=torch.float64, generator=generator)
        z = torch.randn(4, 3, 3, dtype=C128, generator=generator)
        samples = list(zip(x, z, strict=True))
        torch.testing.assert_close(chainrule.vmap(function)(x, z), torch.stack([function(*sample) for sample in samples]))
        ours = chainrule.vmap(chainrule.grad(loss, (0, 1)))(x, z)
        theirs = zip(*[torch.func.grad(loss, (0, 1))(*sample) for sample in samples], strict=True)
        torch.testing.assert_close(ours, tuple([torch.stack(parts) for parts in theirs]))
        torch.testing.assert_close(chainrule.grad(lambda x, z: chainrule.vmap(loss)(x, z).sum(), (0, 1))(x, z), ours)
        along = torch.randn(4, 3, dtype=torch.float64, generator=generator), torch.randn(4, 3, 3, dtype=C128, generator=generator)
        _, pushed = chainrule.vmap(lambda x, z, u, v: chainrule.jvp(loss, (x, z), (u, v)))(x, z, *along)
        torch.testing.assert_close(pushed, (ours[0] * along[0]).sum(-1) + (ours[1].conj() * along[1]).real.sum((-2, -1)))
        step = 1e-6
        sides = [torch.stack([loss(*s) for s in zip(x + h * along[0], z + h * along[1], strict=True)]) for h in (step, -step)]
        torch.testing.assert_close(pushed, (sides[0] - sides[1]) / (2 * step), rtol=1e-5, atol=1e-5)


def test_numbers_with_zeros_below_zero():
    """Two numbers that are equal and have zeros of different signs: on the cut of the logarithm these decide."""
    z = torch.ones(2, 3, dtype=C128)
    for number in (complex(-1.0, 0.0), complex(-1.0, -0.0)):
        for _ in range(4):
            function = lambda z, number=number: (z.real * number).log().imag  # noqa: E731
            torch.testing.assert_close(chainrule.vmap(function)(z), function(z))
            torch.testing.assert_close(chainrule.vmap(lambda z, f=function: chainrule.jvp(f, (z,), (z,))[0])(z), function(z))


def _complex_ops_seen_in_python(transform, *args):
    """How many dispatches of a transform of samples reach Python, once its calls are known."""
    for _ in range(6):
        transform(*args)
    seen = []
    before = VmapMode.__torch_dispatch__

    def dispatch(self, func, types, args=(), kwargs=None):
        seen.append(func)
        return before(self, func, types, args, kwargs)

    VmapMode.__torch_dispatch__ = dispatch
    try:
        transform(*args)
    finally:
        VmapMode.__torch_dispatch__ = before
    return seen


@pytest.mark.skipif(not KNOWS_STATE, reason="what the compiled handlers take")
@pytest.mark.parametrize("function", [_promoted, _built_on, _windows, _products, _chain, _built])
def test_known_calls_do_not_reach_python(function):
    x, z = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, 3, dtype=C128)
    args = (x, z) if function.__code__.co_argcount == 2 else (z,)
    assert _complex_ops_seen_in_python(chainrule.vmap(function), *args) == []


@pytest.mark.skipif(not KNOWS_STATE or torch.__version__ < "2.13", reason="what the compiled handlers take, of these parts of einsum")
def test_known_calls_on_a_tape_do_not_reach_python():
    def loss(z, w):
        mixed = torch.einsum("ij,jk->ik", z * 2j, w) + z.conj() @ w
        return (torch.fft.ifft(torch.fft.fft(mixed) * w).real * z.imag).sum() + mixed.abs().sum()

    z, w = torch.randn(4, 3, 3, dtype=C128), torch.randn(3, 3, dtype=C128)
    assert _complex_ops_seen_in_python(chainrule.vmap(chainrule.grad(loss), (0, None)), z, w) == []


def test_writes_through_lazy_conjugation_are_refused_in_nests():
    def function(z):
        y = z.clone()
        y.mH.mul_(0)
        return y

    for _ in range(3):
        with pytest.raises(RuntimeError, match="writes through a conjugated view"):
            chainrule.vmap(chainrule.vmap(function))(torch.randn(2, 3, 3, 3, dtype=C128))


def test_numbers_that_differ_in_the_sign_of_a_zero():
    """They are equal to a dictionary."""
    x = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    for number in (complex(0.0, -0.0), complex(-0.0, 0.0), complex(-0.0, -0.0), complex(0.0, 0.0)):
        def function(v, number=number):
            return torch.where(v > 0, number, v + 0j).angle()

        def quotient(v, number=number):
            return (number / v).imag.reciprocal()

        for _ in range(4):
            for f in (function, quotient):
                expected = torch.stack([f(sample) for sample in x])
                found = chainrule.vmap(f)(x)
                assert torch.equal(found, expected) and torch.equal(found.signbit(), expected.signbit())


@pytest.mark.parametrize("number", [1j, 2.0, True, complex(-0.0, 0.0)])
def test_numbers_are_written_to_places_that_are_picked(number):
    constant = torch.randn(2, 2, dtype=C128)

    def function(x):
        z = constant.clone()
        z[torch.tensor([0])] = number
        z[1] = number
        return z * x

    for _ in range(4):
        x = torch.randn(3, 2, 2, dtype=C128)
        torch.testing.assert_close(chainrule.vmap(function)(x), torch.stack([function(sample) for sample in x]))
