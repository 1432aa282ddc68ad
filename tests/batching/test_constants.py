"""What is the same for all samples, under a tape on a vmap: it is run at once, and views and writes of it are what they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import chainrule
from chainrule.batching.mode import VmapMode
from chainrule.capture.tape import Tape

Tensor = torch.Tensor
LENGTHS = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)


def _arm(q: Tensor, p: Tensor) -> Tensor:
    zero, one = torch.zeros_like(q[0]), torch.ones_like(q[0])
    place = torch.stack([zero, zero, one])
    for n in range(3):
        c, s = torch.cos(q[n]), torch.sin(q[n])
        rows = [torch.stack([c, -s, LENGTHS[n] * c]), torch.stack([s, c, LENGTHS[n] * s]), torch.stack([zero, zero, one])]
        place = torch.stack(rows) @ place
    return place[:2].sum() * p.sum()


def _writes_to_shaped(q: Tensor, p: Tensor) -> Tensor:
    made = torch.zeros_like(q)
    part = made[1:]
    made[1] = q[0] * 2
    part[1] = p[0]
    return (made * q).sum() + (part * part).sum()


def _writes_through_views_of_constants(q: Tensor, p: Tensor) -> Tensor:
    made = torch.ones(3, dtype=q.dtype)
    part = made[:2]
    made[0] = 4.0
    before = (part * q[:2]).sum()
    made.mul_(2.0)
    return before + (part * q[1:]).sum() * p.sum()


def _active_into_constants(q: Tensor, p: Tensor) -> Tensor:
    made = torch.zeros_like(p)
    part = made[1:]
    part.copy_(p[:2] * 3)
    return (made * q).sum()


def _new_each_time(q: Tensor, p: Tensor) -> Tensor:
    first, second = q.new_zeros(3), q.new_zeros(3)
    first.add_(1.0)
    second.add_(q)
    return (first * q * q).sum() + (second * p).sum()


FUNCTIONS = [_arm, _writes_to_shaped, _writes_through_views_of_constants, _active_into_constants, _new_each_time]


@pytest.mark.parametrize("argnums", [0, 1])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_are_those_of_finite_differences(function: Callable[..., Tensor], argnums: int) -> None:
    gradient = chainrule.vmap(chainrule.grad(function, argnums=argnums), in_dims=(0, None))
    generator = torch.Generator().manual_seed(5)
    step = 1e-6
    for _ in range(5):
        q = torch.randn(4, 3, dtype=torch.float64, generator=generator)
        p = torch.randn(3, dtype=torch.float64, generator=generator)
        found = gradient(q, p)
        for sample in range(4):
            for place in range(3):
                values = []
                for sign in (1, -1):
                    moved = [q[sample].clone(), p.clone()]
                    moved[argnums][place] += sign * step
                    values.append(function(*moved))
                expected = (values[0] - values[1]) / (2 * step)
                torch.testing.assert_close(found[sample, place], expected, rtol=1e-6, atol=1e-7)


def test_constants_do_not_pass_through_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = chainrule.vmap(chainrule.jacrev(lambda q: _arm(q, LENGTHS)))
    q = torch.randn(4, 3, dtype=torch.float64)
    for _ in range(4):
        mapped(q)
    ops: list[str] = []
    for kind in (Tape, VmapMode):
        dispatch = kind.__torch_dispatch__

        def noting(self: Any, func: Any, *args: Any, dispatch: Any = dispatch, **kwargs: Any) -> Any:
            ops.append(str(func))
            return dispatch(self, func, *args, **kwargs)

        monkeypatch.setattr(kind, "__torch_dispatch__", noting)
    mapped(q)
    assert not [op for op in ops if "stack" in op or "_like" in op]
    assert ops.count("aten.select.int") <= 2
