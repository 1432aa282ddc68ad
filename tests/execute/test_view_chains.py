"""Chains of views in fewer calls: the same elements in the same order, whatever the views."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from chainrule.execute.replay import compile_program
from chainrule.execute.simplify import simplify
from chainrule.maps.staging import Program

Tensor = torch.Tensor
SHAPES = ((2, 3, 4), (1, 6), (4,), (2, 1, 2, 3), (12, 1), (1, 1), (2, 2, 2, 2))


def reshaped(source: random.Random, count: int) -> list[int]:
    """A random shape of ``count`` elements, with some dimensions of size one."""
    shape = []
    while count > 1:
        divisors = [d for d in range(2, count + 1) if count % d == 0]
        shape.append(source.choice(divisors))
        count //= shape[-1]
    for _ in range(source.randrange(3)):
        shape.insert(source.randrange(len(shape) + 1), 1)
    return shape


def view(source: random.Random, tensor: Any, call: Callable[..., Any]) -> Any:
    """One random view."""
    rank, shape = len(tensor.shape), tuple(tensor.shape)
    kind = source.choice("reshape permute transpose squeeze unsqueeze t".split())
    if kind == "reshape":
        return call(torch.reshape, tensor, reshaped(source, math.prod(shape)))
    if kind == "permute" and rank:
        return call(torch.permute, tensor, [d - rank * source.randrange(2) for d in source.sample(range(rank), rank)])
    if kind == "transpose" and rank:
        return call(torch.transpose, tensor, source.randrange(rank), source.randrange(-rank, 0))
    if kind == "squeeze" and 1 in shape:
        return call(torch.squeeze, tensor, (shape.index(1),))
    if kind == "t" and rank <= 2:
        return call(torch.t, tensor)
    return call(torch.unsqueeze, tensor, source.randrange(rank + 1))


@pytest.mark.parametrize("seed", range(150))
def test_random_chains(seed: int) -> None:
    """With values that are read on the way, and results that are views themselves."""

    def build(values: list[Any], call: Callable[..., Any]) -> list[Any]:
        source, results = random.Random(seed), []
        for tensor in values:
            start = tensor
            for _ in range(source.randrange(1, 7)):
                tensor = view(source, tensor, call)
                if source.random() < 0.3:
                    results.append(call(torch.neg, tensor))
            results.append(tensor if source.random() < 0.3 else call(torch.sin, tensor))
            results.append(call(torch.cos, start))
        return results

    chosen = random.Random(seed).sample(SHAPES, 3)
    program = Program()
    staged = build([program.input(n, torch.randn(shape)) for n, shape in enumerate(chosen)], program.call)
    run = compile_program(program, staged)
    for _ in range(2):
        values = [torch.randn(shape[::-1]).permute(*range(len(shape) - 1, -1, -1)) for shape in chosen]  # any strides
        for found, want in zip(run(values, ()), build(values, lambda function, *args: function(*args)), strict=True):
            assert torch.equal(found, want)


def calls(program: Program, *wanted: int) -> list[str]:
    return [i.function.__name__ for i in simplify(program, wanted, program.constants)[0]]


def test_views_that_undo_one_another_are_no_calls() -> None:
    program = Program()
    x = program.input(0, torch.randn(2, 5, 8))
    shaped = torch.permute(torch.reshape(x, (2, 1, 5, 8)), (1, 0, 2, 3))
    out = torch.sin(torch.squeeze(shaped, (0,)))
    assert calls(program, out.slot) == ["sin"]
    heads = torch.permute(torch.reshape(torch.permute(x, (1, 0, 2)), (5, 16)), (1, 0))
    joined = torch.sin(torch.permute(torch.reshape(heads, (2, 8, 5)), (0, 2, 1)))
    assert calls(program, joined.slot) == ["sin"]


def test_several_views_are_one() -> None:
    program = Program()
    x = program.input(0, torch.randn(5, 2, 8))
    turned = torch.squeeze(torch.transpose(torch.unsqueeze(x, 0), 1, 2), (0,))
    out = torch.sin(torch.permute(turned, (0, 2, 1)))
    assert calls(program, out.slot) == ["permute", "sin"]
    flat = torch.sin(torch.reshape(torch.permute(torch.unsqueeze(x, 1), (1, 0, 2, 3)), (10, 8)))
    assert calls(program, flat.slot) == ["reshape", "sin"]
    # What would take a permutation and a reshape stays: the order in which these come decides about copies.
    heads = torch.transpose(torch.reshape(torch.squeeze(torch.unsqueeze(x, 0), (0,)), (5, 16)), 0, 1)
    assert calls(program, torch.sin(torch.unsqueeze(heads, 0)).slot)[-1] == "sin"


def test_no_elements_and_parts_of_dimensions() -> None:
    program = Program()
    x, y = program.input(0, torch.randn(0, 3)), program.input(1, torch.randn(6, 4))
    out = torch.sin(torch.reshape(torch.permute(x, (1, 0)), (0, 3)))
    # Three columns of eight are no dimensions of six rows of four, once these are turned.
    other = torch.sin(torch.permute(torch.reshape(torch.permute(y, (1, 0)), (3, 8)), (1, 0)))
    run = compile_program(program, [out, other])
    value = torch.randn(6, 4)
    found = run([torch.randn(0, 3), value], ())
    assert found[0].shape == (0, 3) and torch.equal(found[1], value.t().reshape(3, 8).t().sin())
