"""Functions that are put in the place of torch's: what they compute is seen in every call, and gone when they are."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import chainrule
from chainrule.function_globals import PLACES, calls_torch

#: Some hundred roundings of numbers near one, in double precision.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}

#: More calls than a vmap takes until it replays.
CALLS = 4


def tripled(function):
    return lambda *args, **kwargs: 3 * function(*args, **kwargs)


def softmax(scores, dim):
    return 3 * scores.softmax(dim)


def dropout(value, p):
    return 3 * value


PATCHES = {
    "linear": (F, "linear", tripled(F.linear)), "softmax": (F, "softmax", softmax), "dropout": (F, "dropout", dropout),
    "torch.layer_norm": (torch, "layer_norm", tripled(torch.layer_norm)),
}  # fmt: skip


def patched(name):
    return mock.patch.object(*PATCHES[name])


def network(size):
    """Attention with weights, and a norm, of a signature of their own."""
    torch.manual_seed(size)
    inner = nn.MultiheadAttention(6, 2, dropout=1e-30).double().requires_grad_(False)

    def function(x):
        out, weights = inner(x, x, x)
        return F.layer_norm(out, (6,)).sin().sum(-1) + out.cos().sum(-1) + weights.square().sum(-1)

    return function, torch.randn(size, 6, dtype=torch.float64)


def gradient(library, function):
    return library.grad(lambda x: function(x).square().sum())


def mapped(library, function):
    return lambda x: library.vmap(function, randomness="same")(torch.stack([x, x.cos()]))


def mapped_gradient(library, function):
    return mapped(library, gradient(library, function))


TRANSFORMS = {
    "jacrev": lambda library, function: library.jacrev(function),
    "grad": gradient, "vmap": mapped, "vmap of grad": mapped_gradient,
    "jacrev of grad": lambda library, function: library.jacrev(gradient(library, function)),
}  # fmt: skip


def agree(transform, function, x):
    expected = TRANSFORMS[transform](torch.func, function)(x)
    for _ in range(CALLS):
        torch.testing.assert_close(TRANSFORMS[transform](chainrule, function)(x), expected, **CLOSE)
    return expected


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_holds_while_it_is_there(name, transform):
    for first in (True, False):  # whether the first calls with the signature are those under the patch
        function, x = network(2 + 2 * [*PATCHES].index(name) + first)
        clean = None if first else agree(transform, function, x)
        with patched(name):
            other = agree(transform, function, x)
        again = agree(transform, function, x)
        assert clean is None or torch.equal(again, clean)
        assert not torch.allclose(again, other)


def test_a_module_that_was_never_patched():
    function, x = network(40)
    other, _ = network(41)
    with patched("linear"):
        agree("jacrev", function, x)
    agree("jacrev", other, x)


def test_torchs_own_functions_are_known():
    functions = (F.multi_head_attention_forward, F.layer_norm, F.normalize, F.max_pool2d, torch.norm, torch.Tensor.__rdiv__)
    for function in functions:
        assert PLACES[function]
        assert calls_torch(function)


@pytest.mark.parametrize(
    ("function", "owner", "name"),
    [
        (F.layer_norm, torch, "layer_norm"), (F.multi_head_attention_forward, torch, "bmm"),
        (F.multi_head_attention_forward, torch.Tensor, "mean"), (F.multi_head_attention_forward, torch._VF, "dropout"),
        (F.multi_head_attention_forward, F, "softmax"), (F.multi_head_attention_forward, F, "_canonical_mask"),
    ],
)  # fmt: skip
def test_patches_are_found(function, owner, name):
    with mock.patch.object(owner, name, tripled(getattr(owner, name))):
        assert not calls_torch(function)
    assert calls_torch(function)


@pytest.mark.parametrize("name", ["softmax", "relu", "layer_norm", "normalize"])
def test_a_replacement_that_calls_the_original_is_applied_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original's door shows a mode the replacement."""
    arguments: dict[str, tuple[object, ...]] = {"softmax": (-1,), "layer_norm": ((4,),)}
    original = getattr(F, name)

    def function(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = getattr(F, name)(x, *arguments.get(name, ()))
        return out

    for factor in (1.0, 3.0, 1.0):
        with monkeypatch.context() as patch:
            if factor != 1.0:
                patch.setattr(F, name, lambda *args, **kwargs: factor * original(*args, **kwargs))
            for _ in range(4):
                x = torch.randn(3, 4, dtype=torch.float64)
                expected = torch.autograd.functional.jacobian(function, x)
                for transform in (chainrule.jacrev, chainrule.jacfwd):
                    torch.testing.assert_close(transform(function)(x), expected, rtol=1e-10, atol=1e-12)
                mapped = chainrule.vmap(lambda row: function(row[None]))(x)
                torch.testing.assert_close(mapped, torch.stack([function(row[None]) for row in x]), rtol=1e-12, atol=1e-12)
