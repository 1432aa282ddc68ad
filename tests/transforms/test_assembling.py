"""Results in parts are put together in memory that is allocated once, or concatenated where somebody follows the calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import chainrule
from chainrule.transforms.assembling import Assembled
from tests.transforms.test_blocks import peak_bytes

Tensor = torch.Tensor


def real(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("kinds", ["alike", "graph", "later graph", "other dtype", "other shape"])
def test_parts_of_all_kinds(dim: int, kinds: str) -> None:
    parts = [real(3, 4) for _ in range(3)]
    if kinds == "graph":
        parts[0].requires_grad_()
    if kinds == "later graph":
        parts[1].requires_grad_()
    if kinds == "other dtype":
        parts = [parts[0].float(), parts[1].float(), parts[2]]
    if kinds == "other shape":
        parts[2] = parts[2].narrow(dim, 0, 2)
    size = sum(part.shape[dim] for part in parts)
    assembled, start = Assembled(size, dim), 0
    for part in parts:
        assembled.add(start, part)
        start += part.shape[dim]
    found, expected = assembled.result(), torch.cat(parts, dim)
    assert found.dtype is expected.dtype and torch.equal(found, expected)
    for part in parts:
        if part.requires_grad:
            weight = real(*expected.shape)
            assert torch.equal(*(torch.autograd.grad((whole * weight).sum(), part)[0] for whole in (found, expected)))


@pytest.mark.parametrize("out_dims", [0, 1, 2, -1])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_chunks_of_a_batch(out_dims: int, chunk: int) -> None:
    x = real(7, 3, 4)
    mapped = [library.vmap(lambda x: (x @ x.T, x.sin()), out_dims=(out_dims, 0), chunk_size=chunk) for library in (chainrule, torch.func)]
    for found, expected in zip(mapped[0](x), mapped[1](x), strict=True):
        torch.testing.assert_close(found, expected)


def test_chunks_with_a_graph_and_under_transforms() -> None:
    x = real(5, 3)

    def loss(library: Any) -> Any:
        return lambda x: library.vmap(lambda x: x.sin() * x.prod(), chunk_size=2)(x).square().sum()

    expected = torch.func.grad(loss(torch.func))(x)
    torch.testing.assert_close(chainrule.grad(loss(chainrule))(x), expected)
    leaf = x.clone().requires_grad_()
    loss(chainrule)(leaf).backward()
    torch.testing.assert_close(leaf.grad, expected)
    for mapped in (chainrule.vmap(loss(chainrule)), chainrule.jvp):
        if mapped is chainrule.jvp:
            found, wanted = chainrule.jvp(loss(chainrule), (x,), (x,)), torch.func.jvp(loss(torch.func), (x,), (x,))
            torch.testing.assert_close(found, wanted)
        else:
            torch.testing.assert_close(mapped(real(4, 5, 3).copy_(x)), torch.func.vmap(loss(torch.func))(real(4, 5, 3).copy_(x)))


def test_chunks_whose_results_differ_in_dtype() -> None:
    """Control flow over the size of the chunk: the last one has another dtype."""

    def function(x: Tensor) -> Tensor:
        return x.sin() if seen.append(1) or len(seen) < 3 else x.sin().float()

    seen: list[int] = []
    x = real(5, 3)
    found = chainrule.vmap(function, chunk_size=2)(x)
    assert found.dtype is torch.float64
    torch.testing.assert_close(found, x.sin(), rtol=1e-6, atol=1e-6)


def test_a_chunked_batch_is_held_once() -> None:
    weight, x = torch.randn(60, 50), torch.randn(40, 50)
    mapped = chainrule.vmap(chainrule.jacrev(lambda x: torch.tanh(weight @ x)), chunk_size=4)
    for _ in range(3):
        result = mapped(x)
    torch.testing.assert_close(result, torch.func.vmap(torch.func.jacrev(lambda x: torch.tanh(weight @ x)))(x))
    assert peak_bytes(lambda: mapped(x)) <= 1.2 * result.nbytes  # a tenth of it is a chunk


def test_parts_of_a_vmap_stand_in_one_plain_tensor() -> None:
    stored: list[Any] = []

    def call(x: Tensor) -> Tensor:
        assembled = Assembled(6)
        for start in (0, 3):
            assembled.add(start, x * 2)
        result = assembled.result()
        stored.append(result.value)  # type: ignore[attr-defined]
        return result.reshape(2, 3)

    x = real(4, 3)
    assert torch.equal(chainrule.vmap(call)(x), torch.stack((x * 2, x * 2), 1))
    assert stored[0].__class__ is Tensor
