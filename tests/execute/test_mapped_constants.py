"""Calls under vmap whose results are the same for all samples, replayed: factories and what is made like a mapped tensor.

Comparisons are exact: these calls compute nothing.
"""

import pytest
import torch
from torch import Tensor

import chainrule

#: Calls before a signature is recorded, those that replay, and one more.
CALLS = 6

FACTORIES = {
    "ones_like": torch.ones_like,
    "zeros_like": torch.zeros_like,
    "full_like": lambda x: torch.full_like(x, 2.5),
    "new_zeros": lambda x: x.new_zeros(3),
    "new_full": lambda x: x.new_full((2, 3), -1.0),
    "eye": lambda x: torch.eye(4),
    "arange": lambda x: torch.arange(4.0),
    "arange of numbers": lambda x: torch.arange(x.shape[0]),
    "linspace": lambda x: torch.linspace(0, 1, 5),
    "zeros": lambda x: torch.zeros(x.shape),
    "large": lambda x: torch.ones(20, 30),
    "float64": lambda x: torch.ones_like(x, dtype=torch.float64),
    "tensor": lambda x: torch.tensor([1.0, 2.0]),
    "number": lambda x: torch.tensor(3),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_the_same_in_each_call(name: str) -> None:
    make = FACTORIES[name]
    x = torch.randn(5, 4)
    expected = torch.func.vmap(make)(x)
    for _ in range(CALLS):
        found = chainrule.vmap(make)(x)
        assert found.dtype is expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["ones_like", "new_zeros", "eye", "large", "tensor"])
def test_writes_stay_in_their_call(name: str) -> None:
    make = FACTORIES[name]
    x = torch.arange(5.0)[:, None].expand(5, 4).contiguous()

    def alike(row: Tensor) -> Tensor:
        first, second = make(row), make(row)
        first.add_(1.0)
        first[0] = 7.0
        return torch.stack([first, second])

    def own(row: Tensor) -> Tensor:
        first, second = make(row).clone() if name == "tensor" else make(row), make(row)
        first[1] = row[0]
        return first + second

    expected = torch.stack([alike(row) for row in x]), torch.stack([own(row) for row in x])
    for _ in range(CALLS):
        assert torch.equal(chainrule.vmap(alike)(x), expected[0])
        if name != "tensor":  # made of Python numbers it is a tensor from outside of the level
            assert torch.equal(chainrule.vmap(own)(x), expected[1])


def test_the_default_dtype_is_looked_at() -> None:
    x = torch.randn(3, 2)
    for _ in range(CALLS):
        assert chainrule.vmap(lambda row: torch.eye(3))(x).dtype is torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        for _ in range(CALLS):
            assert chainrule.vmap(lambda row: torch.eye(3))(x).dtype is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_random_numbers_are_drawn_each_time() -> None:
    x = torch.zeros(3, 4)
    for randomness in ("same", "different"):
        draw = chainrule.vmap(lambda row: torch.rand(4) + torch.rand_like(row), randomness=randomness)
        found = [draw(x) for _ in range(CALLS)]
        assert len({tuple(item.flatten().tolist()) for item in found}) == CALLS
    with pytest.raises(RuntimeError, match="randomness"):
        chainrule.vmap(lambda row: torch.rand(4))(x)


def test_inside_of_derivatives() -> None:
    def turned(t: Tensor) -> Tensor:
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        rows = [torch.stack([t.cos(), -t.sin(), zero]), torch.stack([t.sin(), t.cos(), zero]), torch.stack([zero, zero, one])]
        return torch.eye(3, dtype=t.dtype) @ torch.stack(rows) @ torch.arange(3, dtype=t.dtype)

    x = torch.randn(5, dtype=torch.float64)
    # Sums of three products of numbers below three: rounding stays below ten units in the last place of them.
    tolerance = {"rtol": 0.0, "atol": 100 * torch.finfo(torch.float64).eps}
    for _ in range(CALLS):
        torch.testing.assert_close(chainrule.vmap(turned)(x), torch.func.vmap(turned)(x), **tolerance)
        for name in ("jacrev", "jacfwd"):
            expected = torch.func.vmap(getattr(torch.func, name)(turned))(x)
            torch.testing.assert_close(chainrule.vmap(getattr(chainrule, name)(turned))(x), expected, **tolerance)
        found = chainrule.jacrev(lambda v: chainrule.vmap(turned)(v))(x)
        torch.testing.assert_close(found, torch.func.jacrev(lambda v: torch.func.vmap(turned)(v))(x), **tolerance)


@pytest.mark.parametrize("name", ["ones", "zeros_like", "new_full", "linspace"])
def test_writes_into_a_result_are_not_seen_by_later_calls(name: str) -> None:
    """Also not those of the call that was recorded, whose result the function has in its hands."""
    make = {
        "ones": lambda x: torch.ones(4).mul_(2),
        "zeros_like": lambda x: torch.zeros_like(x).add_(torch.arange(4)),
        "new_full": lambda x: x.new_full((4,), 3.0).cumsum_(0),
        "linspace": lambda x: torch.linspace(0, 1, 4).sub_(1),
    }[name]
    x = torch.randn(3, 4)
    expected = torch.stack([make(row) * row for row in x])
    for _ in range(CALLS):
        torch.testing.assert_close(chainrule.vmap(lambda row: make(row) * row)(x), expected, rtol=0, atol=0)
