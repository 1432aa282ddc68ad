"""Compiled calls of functions that index with computed numbers: no value is read, other calls take other places."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import chainrule


def written(x: Tensor) -> Tensor:
    y = x.clone()
    place = x.argmax()
    y[place] = y[place] * 3 + 1
    return y


def written_twice(x: Tensor) -> Tensor:
    y = torch.stack([x, x * 2])
    place = x.argmin()
    y[1, place] = 7 * x[0]
    y[:, place] += x.sum()
    return y


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "place": lambda x: x[x.argmax()] ** 2,
    "column": lambda x: torch.stack([x, x * x])[:, x.argmin()],
    "place and part": lambda x: torch.outer(x, x)[x.argmax(), 1:],
    "two places": lambda x: torch.outer(x, x)[x.argmax(), x.argmin()],
    "written": written,
    "written twice": written_twice,
    "from the end": lambda x: x[x.sort()[1][0] - 1] * x,
    "beside a list": lambda x: torch.outer(x, x)[torch.tensor([0, 2]), x.argmax()],
    "new dimensions": lambda x: torch.outer(x, x)[None, x.argmax(), ::2] * x[x.argmax(), ..., None],
}


@pytest.mark.parametrize("transform", ["jacrev", "hessian", "vmap", "vmap of jacfwd"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_computed_numbers(name: str, transform: str) -> None:
    function = FUNCTIONS[name]
    made = {
        "jacrev": chainrule.jacrev, "hessian": chainrule.hessian, "vmap": chainrule.vmap,
        "vmap of jacfwd": lambda f: chainrule.vmap(chainrule.jacfwd(f)),
    }[transform](function)  # fmt: skip
    compiled = chainrule.compile(made)
    for _ in range(4):
        x = torch.randn(*([3] if "vmap" in transform else []), 4, dtype=torch.float64)
        found = compiled(x)
        torch.testing.assert_close(found, made(x))
        if transform in ("jacrev", "hessian"):
            torch.testing.assert_close(found, getattr(torch.func, transform)(function)(x))
