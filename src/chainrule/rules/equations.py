"""The equations of ``einsum``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch


def einsum_letters(equation: str) -> tuple[list[str], str]:
    """The letters of the operands and of the output."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if not arrow:
        output = "".join(sorted(letter for letter in set(inputs) - {","} if inputs.count(letter) == 1))
    return inputs.split(","), output


def is_plain_einsum(args: tuple[Any, ...]) -> bool:
    """Whether an einsum names each dimension of each operand once, and broadcasts none."""
    if len(args) < 2:
        return False
    return is_plain(args[0], tuple([operand.shape for operand in args[1]]))


@lru_cache(maxsize=1024)
def is_plain(equation: str, shapes: tuple[torch.Size, ...]) -> bool:
    """Whether an equation names each dimension of operands of these shapes once, and broadcasts none."""
    letters, output = einsum_letters(equation)
    if len(letters) != len(shapes) or len(set(output)) != len(output):
        return False
    sizes: dict[str, int] = {}
    for names, shape in zip(letters, shapes, strict=True):
        if len(names) != len(shape) or len(set(names)) != len(names) or not (names.isalpha() or not names):
            return False
        for name, size in zip(names, shape, strict=True):
            if sizes.setdefault(name, size) != size:
                return False
    return sizes.keys() >= set(output)


def are_alike(operands: Sequence[torch.Tensor]) -> bool:
    """Whether operands are real, or at most two and complex: then there are derivatives of the whole."""
    kinds = {operand.is_complex() for operand in operands}
    return True not in kinds or (False not in kinds and len(operands) <= 2)


__all__ = ["are_alike", "einsum_letters", "is_plain", "is_plain_einsum"]
