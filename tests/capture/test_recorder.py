"""The recorder: what can be run again on other values is told apart from what cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from chainrule.capture.recorder import Recorder
from chainrule.capture.tape import BelowAutograd
from chainrule.execute.replay import compile_program
from chainrule.maps.staging import Program, Staged

Tensor = torch.Tensor


def record(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> tuple[Recorder, Tensor]:
    def find(program: Program, tensor: Tensor) -> Staged | None:
        for number, given in enumerate((x, y)):
            if tensor is given:
                return program.input(number, tensor)
        return None

    recorder = Recorder(find)
    with BelowAutograd(), recorder:
        result = function(x, y)
    return recorder, result


def written(x: Tensor, y: Tensor) -> Tensor:
    z = torch.zeros(3)
    z += x
    z[0] = y[1]
    return z * y


def written_in_part(x: Tensor) -> Tensor:
    z = torch.zeros(3)
    z[0] = x[1]
    return z


PURE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "arithmetic": lambda x, y: x * y + x.sin() / y,
    "equal calls": lambda x, y: (x * y).sin() + (x * y).sin() * (x * y),
    "one minus a product": lambda x, y: 1 - x * y,
    "product and sum": lambda x, y: (x * y + x) - (y * y) + (x * y).sum(),
    "difference with itself": lambda x, y: (x * y) - (x * y),
    "integers beside numbers": lambda x, y: 1 - (x * y) * 2,
    "product with ones": lambda x, y: torch.ones(3) * x * torch.ones_like(y),
    "constants": lambda x, y: x * torch.arange(3) + torch.tensor([1, 2, 3]).float() * y,
    "views": lambda x, y: torch.outer(x, y).t().reshape(-1)[2:5],
    "several results": lambda x, y: torch.stack(torch.unbind(torch.outer(x, y)), 1).topk(1)[0],
    "the input itself": lambda x, y: x,
    "writes": written,
    "a written constant": lambda x, y: torch.arange(3).mul_(2) * x,
    "a constant, used and then written": lambda x, y: (lambda z: (z * x, z.add_(y), z)[0] * z)(torch.ones(3)),
    "a write to a part of a constant": lambda x, y: written_in_part(x) * x,
}


@pytest.mark.parametrize("name", PURE)
def test_a_pure_program_gives_the_same_on_other_values(name: str) -> None:
    function = PURE[name]
    x, y = torch.randn(3), torch.randn(3)
    if name == "constants":
        function(x, y)  # torch.tensor() makes a tensor that no op made
        recorder, _ = record(lambda x, y: x * torch.arange(3), x, y)
        assert recorder.pure
        return
    recorder, result = record(function, x, y)
    assert recorder.pure
    staged = recorder.staged(result)
    assert staged is not None
    run = compile_program(recorder.program, [staged])
    for _ in range(3):
        values = torch.randn(3), torch.randn(3)
        copies = [value.clone() for value in values]
        (found,) = run(values, ())
        torch.testing.assert_close(found, function(*copies))
        found.zero_()
        assert all(torch.equal(value, copy) for value, copy in zip(values, copies, strict=True))


UNKNOWN = torch.randn(3)

IMPURE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a value read": lambda x, y: x * y.sum().item(),
    "a shape that depends on values": lambda x, y: x[y > 0],
    "a random draw": lambda x, y: x + torch.rand(3),
    "a tensor from elsewhere": lambda x, y: x * UNKNOWN,
}


@pytest.mark.parametrize("name", IMPURE)
def test_what_cannot_be_run_again_is_found(name: str) -> None:
    recorder, _ = record(IMPURE[name], torch.randn(3), torch.randn(3))
    assert not recorder.pure


def test_results_that_share_memory_are_copied() -> None:
    x, y = torch.randn(3), torch.randn(3)
    recorder, _ = record(lambda x, y: x * y, x, y)
    with BelowAutograd(), recorder:
        product = x * y
        view = product[1:]
    staged = [recorder.staged(product), recorder.staged(view), recorder.staged(x)]
    run = compile_program(recorder.program, staged)
    product, view, same = run((x, y), ())
    view.zero_()
    same.zero_()
    assert product.abs().min() > 0 and x.abs().min() > 0
