"""Functions that torch itself composes of ops: replayed on the tape, and right in every call."""

from __future__ import annotations

import warnings

import pytest
import torch

import chainrule
from chainrule.capture.composites import COMPOSITES, Composite
from chainrule.dispatch import KNOWS_STATE
from chainrule.shortcuts import COMPILED

replayed_only = pytest.mark.skipif(not (COMPILED and KNOWS_STATE), reason="composites are replayed by the compiled handlers")

D = torch.float64
CLOSE = {"rtol": 1e-8, "atol": 1e-10}

INDEX = torch.tensor([[2, 0, 1, 1]])
CONSTANT = torch.linspace(-1.0, 2.0, 16, dtype=D).reshape(4, 4)

FUNCTIONS = {
    "cross": lambda x: torch.cross(x[:, :3], CONSTANT[:, :3], dim=1),
    "max_pool1d": lambda x: torch.max_pool1d(x[None], 2),
    "max_pool2d": lambda x: torch.nn.functional.max_pool2d(x[None, None], 2),
    "adaptive_max_pool2d": lambda x: torch.nn.functional.adaptive_max_pool2d(x[None, None], 3),
    "conv_transpose2d": lambda x: torch.conv_transpose2d(x[None, None], CONSTANT[None, None]),
    "eigh": lambda x: torch.linalg.eigh(x + x.mT)[0],
    "slogdet": lambda x: torch.linalg.slogdet(x)[1],
    "prelu": lambda x: torch.prelu(x, x[0].mean()[None]),
    "relu6": lambda x: torch.nn.functional.relu6(4 * x),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 0),
    "cartesian_prod": lambda x: torch.cartesian_prod(x[0], x[1]),
    "column_stack": lambda x: torch.column_stack([x, x.sin()]),
    "tile": lambda x: x.tile(2),
    "vander": lambda x: torch.linalg.vander(x[0]),
    "trapezoid": lambda x: torch.trapezoid(x),
    "diff": lambda x: x.diff(),
    "take_along_dim": lambda x: torch.take_along_dim(x, INDEX, 0),
    "renorm": lambda x: x.renorm(2, 0, 0.5),
    "gradient": lambda x: torch.gradient(x[0])[0],
    "matrix_exp": lambda x: torch.linalg.matrix_exp(x),
    "rfft": lambda x: torch.view_as_real(torch.fft.rfft(x)),
    "unfold": lambda x: torch.nn.functional.unfold(x[None, None], 2),
}

TRANSFORMS = {
    "grad": lambda library, f, x: library.grad(lambda x: f(x).sin().sum())(x),
    "jacfwd": lambda library, f, x: library.jacfwd(f)(x),
    "vjp": lambda library, f, x: library.vjp(f, x)[1](f(x).detach().cos())[0],
    "grad of grad": lambda library, f, x: library.grad(lambda x: library.grad(lambda x: f(x).sin().sum())(x).cos().sum())(x),
    "vmap of grad": lambda library, f, x: library.vmap(library.grad(lambda x: f(x).sin().sum()))(torch.stack([x, x.cos()])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_call_is_right(name, transform):
    torch.manual_seed(0)
    for call in range(4):  # heard, replayed, and with a tensor that requires grad
        x = torch.randn(4, 4, dtype=D).requires_grad_(call == 3)
        found = TRANSFORMS[transform](chainrule, FUNCTIONS[name], x)
        expected = TRANSFORMS[transform](torch.func, FUNCTIONS[name], x)
        torch.testing.assert_close(found, expected, **CLOSE)
        if expected.requires_grad and transform != "grad of grad":
            weights = torch.randn_like(expected)
            one, other = (
                torch.autograd.grad((item * weights).sum() + 0 * x.sum(), x)[0] for item in (found, expected)
            )  # fmt: skip
            torch.testing.assert_close(one, other, **CLOSE)


def _replays(f, x):
    """Whether a composite was found for a function in two calls."""
    COMPOSITES.clear()
    for _ in range(2):
        chainrule.jvp(f, (x,), (x,))
    return any(isinstance(found, Composite) for found in COMPOSITES.values())


@replayed_only
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_ops_are_replayed(name):
    assert _replays(FUNCTIONS[name], torch.randn(4, 4, dtype=D))


@pytest.mark.parametrize("split", [torch.tensor_split, torch.Tensor.tensor_split])
def test_numbers_that_torch_reads_in_memory(split):
    """Where to split is read in a tensor, without an op."""
    x = torch.randn(6, dtype=D)
    for place in (1, 2, 4, 5, 2):
        found = chainrule.grad(lambda x: split(x, torch.tensor([place]))[0].square().sum())(x)  # noqa: B023
        torch.testing.assert_close(found, torch.where(torch.arange(6) < place, 2 * x, 0.0))


def test_lengths_that_torch_reads_in_memory():
    x = torch.randn(7, 1, 4, dtype=D).log_softmax(-1)
    target = torch.tensor([[1, 2, 3]])

    def loss(x, length):
        return torch.nn.functional.ctc_loss(x, target, torch.tensor([7]), torch.tensor([length]), reduction="sum")

    for length in (3, 2, 1, 3):
        for _ in range(2):
            found = chainrule.grad(loss)(x, length)
            leaf = x.clone().requires_grad_()
            torch.testing.assert_close(found, torch.autograd.grad(loss(leaf, length), leaf)[0], **CLOSE)


def test_warnings_of_torch_are_given_in_every_call():
    x = torch.randn(1, dtype=D)
    for _ in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            chainrule.jvp(lambda x: torch.cov(x), (x,), (x,))
        assert any("degrees of freedom" in str(warning.message) for warning in caught)


def test_another_number_is_another_call():
    x = torch.randn(4, 4, dtype=D)
    for shift in (1, 2, 3, 1):
        for _ in range(2):
            found = chainrule.jvp(lambda x: x.tile(shift).renorm(2, 0, 0.25 * shift), (x,), (x,))  # noqa: B023
            expected = torch.func.jvp(lambda x: x.tile(shift).renorm(2, 0, 0.25 * shift), (x,), (x,))  # noqa: B023
            torch.testing.assert_close(found, expected, **CLOSE)
