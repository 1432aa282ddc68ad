"""What the compiled handlers read of a tensor is what the tensor says."""

from __future__ import annotations

import pytest
import torch

import chainrule
from chainrule.dispatch import KNOWS_TENSORS
from chainrule.execute import mapped_signatures
from chainrule.shortcuts import REAL, read_tensor_facts

known_only = pytest.mark.skipif(not KNOWS_TENSORS, reason="torch's functions on tensors are not known here")

WHOLE = torch.arange(24.0).reshape(2, 3, 4)
TENSORS = [
    WHOLE, WHOLE[1:, :, ::2], WHOLE.permute(2, 0, 1), torch.zeros(()), torch.zeros(0, 3), torch.zeros(3).expand(2, 3),
    torch.nn.Parameter(torch.zeros(5)), torch.zeros(2, requires_grad=True), torch.zeros(1, 1, 1, 1, 1, 1, 1, 1),
    *[torch.ones(2, 1).to(dtype) for dtype in sorted(REAL, key=str)],
]  # fmt: skip


@known_only
@pytest.mark.parametrize("tensor", TENSORS, ids=lambda tensor: f"{tensor.dtype}{tuple(tensor.shape)}{tensor.stride()}")
def test_read(tensor):
    found = read_tensor_facts(tensor)
    assert found is not None
    assert found[3:] == (tuple(tensor.shape), tensor.stride())


@known_only
def test_dtypes_are_told_apart():
    found = [read_tensor_facts(torch.ones(2).to(dtype)) for dtype in REAL]
    assert len({item[0] for item in found if item is not None}) == len(REAL)


@known_only
@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(2, dtype=torch.complex64), torch.zeros(3, 3).to_sparse(), torch.zeros(1, 1, 1, 1, 1, 1, 1, 1, 1)],
    ids=["complex", "sparse", "nine dimensions"],
)
def test_left_to_the_tensor(tensor):
    assert read_tensor_facts(tensor) is None


@known_only
def test_foreign_objects():
    assert read_tensor_facts(object()) is None
    assert read_tensor_facts(3) is None


def test_signatures_by_strides_and_shapes():
    """The same function of tensors that differ in one of them alone, again and again: each gets what belongs to it."""
    weight = torch.randn(3, 3, dtype=torch.float64)

    def function(x):
        return torch.nn.functional.layer_norm(x, (3,), weight[0], weight[1]).reshape(-1).sin()

    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in ((4, 3), (2, 2, 3))]
    inputs += [torch.randn(3, 4, dtype=torch.float64).t(), torch.randn(8, 3, dtype=torch.float64)[::2]]
    inputs.append(torch.randn(1, 3, dtype=torch.float64).expand(4, 3))
    for _ in range(4):
        for x in inputs:
            cotangent = torch.randn(x.numel(), dtype=torch.float64)
            out, pull = chainrule.vjp(function, x)
            wanted, theirs = torch.func.vjp(function, x)
            torch.testing.assert_close(out, wanted)
            torch.testing.assert_close(pull(cotangent), theirs(cotangent))


def test_numbers_that_are_given_up():
    """When all signatures are forgotten, what is known of them in memory is, too: both sides go on agreeing."""

    def function(x):
        return torch.nn.functional.softmax(torch.nn.functional.layer_norm(x, (4,)), dim=-1)

    for _ in range(3):
        for rows in range(1, 5):
            x, tangent = torch.randn(rows, 4, dtype=torch.float64), torch.randn(rows, 4, dtype=torch.float64)
            found = chainrule.jvp(function, (x,), (tangent,))
            torch.testing.assert_close(found, torch.func.jvp(function, (x,), (tangent,)))
            mapped = chainrule.vmap(function)(x)
            torch.testing.assert_close(mapped, torch.func.vmap(function)(x))
        mapped_signatures.NUMBERS.clear()
