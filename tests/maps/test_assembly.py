"""Sums of terms written into one array: values against torch.func, calls and memory against what the array itself takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import chainrule
from chainrule.maps.assembly import Assembly, Write, assembled
from chainrule.maps.entries import Layout

Function = Callable[[torch.Tensor], torch.Tensor]

#: Results have at least 2^16 entries: smaller ones are as well added.
SIZE = 300

#: Beside the result there are vectors; nothing of its size, which would make 1.5 or more.
LITTLE = 1.1


def _matrix(seed: int, rows: int = SIZE, columns: int = SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator) / columns**0.5


A, B = _matrix(0), _matrix(1)

FUNCTIONS: dict[str, Function] = {
    "diagonal added to a product": lambda x: A @ x.tanh() + x**3,
    "identity, product and rows": lambda x: (A @ x.tanh() + B @ x.sin() + x).tanh(),
    "blocks": lambda x: torch.cat([A @ x.tanh(), B @ x.sin()]),
    "a block and a diagonal": lambda x: torch.cat([A @ x.tanh(), x.sin()]),
    "a gap between blocks": lambda x: torch.cat([A @ x.tanh(), torch.zeros(40, dtype=x.dtype), B.T @ x]),
    "blocks of columns": lambda x: A[:, :200] @ x[:200].sin() + torch.cat([x[250:] ** 2, B[50:, :100] @ x[150:250]]),
    "stacked diagonals": lambda x: torch.stack([x.sin(), x.cos(), x * x]),
    "outer product": lambda x: x[:30, None] * x[None, :40],
    "differences": lambda x: x[:30, None] - x[None, :40],
    "every other element": lambda x: torch.stack([x[::2].sin(), x[1::2].cos(), x[:150] * x[150:]]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sums_of_parts(name: str) -> None:
    function, kept = FUNCTIONS[name], []
    transforms = [chainrule.jacobian(function), chainrule.jacrev(function), chainrule.compile(chainrule.jacobian(function))]
    for transform in transforms:
        for seed in range(3):
            x = _matrix(seed + 5, SIZE, 1).flatten()
            found, expected = transform(x), torch.func.jacfwd(function)(x)
            # Sums of a few products: round-off near 1e-15.
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            kept.append((found, found.clone()))
    assert len({found.untyped_storage().data_ptr() for found, _ in kept}) == len(kept)
    assert all(torch.equal(found, copy) for found, copy in kept)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_of_the_size_of_the_result_is_made_beside_it(name: str) -> None:
    x = _matrix(9, SIZE, 1).flatten()
    explained = chainrule.explain(chainrule.jacobian(FUNCTIONS[name]))(x)
    result = explained.result
    limit = 2.1 if name == "blocks of columns" else LITTLE
    assert explained.peak < limit * result.numel() * result.element_size()


def test_under_vmap_and_in_nests() -> None:
    function, inputs = FUNCTIONS["a block and a diagonal"], _matrix(3, 2, SIZE)
    found = chainrule.vmap(chainrule.jacobian(function))(inputs)
    torch.testing.assert_close(found, torch.func.vmap(torch.func.jacfwd(function))(inputs), rtol=1e-12, atol=1e-12)
    outer, x = FUNCTIONS["outer product"], inputs[0]
    second = chainrule.jacobian(lambda s: chainrule.jacobian(outer)(s * x).sum((0, 1)))(x.new_tensor(1.0))
    expected = torch.func.jacfwd(lambda s: torch.func.jacfwd(outer)(s * x).sum((0, 1)))(x.new_tensor(1.0))
    torch.testing.assert_close(second, expected, rtol=1e-12, atol=1e-12)


def test_an_array_that_others_read_is_copied() -> None:
    base, value = torch.zeros(3, 3), torch.ones(3)
    plan = Assembly((3, 3), torch.float32, (), (Write(Layout((3, 3), (), ((0, 1),)), adds=True),))
    assert torch.equal(assembled(plan, base, value), torch.eye(3))
    assert torch.equal(base, torch.zeros(3, 3))
    assert assembled(plan, base, value, owned=True).data_ptr() == base.data_ptr()
    assert torch.equal(base, torch.eye(3))
