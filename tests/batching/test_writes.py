"""Writes in place under vmap give what the loop over the samples gives, through views, and to tensors made inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import chainrule
from chainrule.batching.mode import VmapMode
from chainrule.dispatch import KNOWS_STATE
from chainrule.shortcuts import COMPILED

Tensor = torch.Tensor


def _made_inside(x: Tensor) -> Tensor:
    y = torch.zeros(3, dtype=x.dtype)
    z = y.add_(x)
    assert z is y
    return z * 2


def _through_a_view(x: Tensor) -> Tensor:
    y = x.clone()
    assert y.mul_(2) is y
    y[1:].add_(1).clamp_(max=1.5)
    y[0] = x[1]
    return y


def _view_of_one_made_inside(x: Tensor) -> Tensor:
    y = torch.ones(2, 3, dtype=x.dtype)
    row = y[1]
    row.copy_(x)
    y.mul_(x)
    return y + row.fill_(x[0])


WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "made inside": _made_inside,
    "through a view": _through_a_view,
    "view of one made inside": _view_of_one_made_inside,
    "constant": lambda x: x.clone().add_(torch.arange(3.0, dtype=x.dtype)).sub_(1).div_(2),
    "at places": lambda x: x.clone().index_put_((torch.tensor([2, 0]),), x[:2]).masked_fill_(torch.tensor([True, False, False]), 4),
    "added at places": lambda x: x.clone().index_add_(0, torch.tensor([1, 1]), x[1:]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_as_in_a_loop(name: str) -> None:
    function, x = WRITES[name], torch.rand(4, 3, dtype=torch.float64)
    for _ in range(4):  # calls that are made again may be replayed
        torch.testing.assert_close(chainrule.vmap(function)(x), torch.stack([function(sample) for sample in x]))
    many = torch.rand(2, 4, 3, dtype=torch.float64)
    twice = chainrule.vmap(chainrule.vmap(function))(many)
    torch.testing.assert_close(twice, torch.stack([torch.stack([function(sample) for sample in part]) for part in many]))
    loss = lambda x: function(x).square().sum()  # noqa: E731
    slopes = torch.stack([torch.func.grad(loss)(sample) for sample in x])
    torch.testing.assert_close(chainrule.vmap(chainrule.grad(loss))(x), slopes)
    torch.testing.assert_close(chainrule.grad(lambda x: chainrule.vmap(loss)(x).sum())(x), slopes)


def test_constants_from_outside() -> None:
    """What every sample would write there can be written; what differs between them cannot."""
    x, kept = torch.rand(4, 3), torch.zeros(3)
    torch.testing.assert_close(chainrule.vmap(lambda x: x + kept.add_(1))(x), x + 1)
    assert kept.eq(1).all()
    with pytest.raises(RuntimeError, match="would write a value that differs between samples"):
        chainrule.vmap(lambda x: kept.add_(x))(x)
    assert kept.eq(1).all()


@pytest.mark.parametrize("write", [lambda x: x.clone().add_(torch.ones(2, 3)), lambda x: x.clone().copy_(torch.ones(2, 3))])
def test_shapes_that_do_not_fit(write: Callable[[Tensor], Any]) -> None:
    with pytest.raises(RuntimeError):
        chainrule.vmap(write)(torch.rand(4, 3))


def test_a_factor_with_a_graph() -> None:
    factor = torch.rand(3, requires_grad=True)
    x = torch.rand(4, 3)
    found = chainrule.vmap(lambda x: (x * 1.0).mul_(factor))(x)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), factor)[0], x.sum(0))


def _put(index: Any, value: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor], Tensor]:
    def write(matrix: Tensor, row: Tensor) -> Tensor:
        made = matrix.clone()
        made[index] = value(matrix, row)
        return made

    return write


ASSIGNMENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a component": _put((0, -1), lambda m, r: r[1]),
    "one from all": _put(1, lambda m, r: r[0]),
    "a row": _put(-1, lambda m, r: r),
    "a column": _put((..., 2), lambda m, r: r),
    "with a new dimension": _put((slice(1, 3), None, 2), lambda m, r: r[2]),
    "every other row": _put(slice(None, None, 2), lambda m, r: r),
    "all": _put(..., lambda m, r: m * 2),
    "a number": _put((2, slice(1, None)), lambda m, r: 2.5),
    "a truth value": _put((2, 2), lambda m, r: True),
    "the same for all samples": _put((slice(0, 2), 1), lambda m, r: torch.tensor([1.0, 2.0], dtype=m.dtype)),
    "another dtype": _put((0, 0), lambda m, r: r[1].float()),
    "more dimensions than there are": _put((0, 0), lambda m, r: r[:1]),
    "nothing": _put((0, slice(2, 2)), lambda m, r: r[:0]),
    "a part of itself": _put(0, lambda m, r: m[1]),
}


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_assignments_are_those_of_torch_func(name: str) -> None:
    write = ASSIGNMENTS[name]
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        matrix = torch.randn(5, 4, 4, dtype=torch.float64, generator=generator)
        row = torch.randn(5, 4, dtype=torch.float64, generator=generator)
        expected = torch.func.vmap(write)(matrix, row)
        assert torch.equal(chainrule.vmap(write)(matrix, row), expected)
        assert torch.equal(chainrule.vmap(write, in_dims=(2, 1))(matrix.movedim(0, 2), row.t()), expected)


def test_an_assignment_to_what_was_the_same_for_all_samples_reaches_its_views() -> None:
    def write(x: Tensor) -> tuple[Tensor, ...]:
        matrix = torch.zeros_like(x.expand(3, 3)).clone()
        row, turned = matrix[1], matrix.t()
        matrix[0, 0] = x
        row[2] = x * 2
        matrix[2] = 1.5
        turned[0, 2] = x
        return matrix, row, turned

    for seed in range(3):
        x = torch.randn(5, generator=torch.Generator().manual_seed(seed))
        for mine, theirs in zip(chainrule.vmap(write)(x), torch.func.vmap(write)(x), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("index", [(9,), (0, 0, 0), (0, 9)])
def test_an_assignment_that_does_not_fit_raises_what_torch_says_of_a_sample(index: Any) -> None:
    def write(matrix: Tensor, x: Tensor) -> Tensor:
        matrix = matrix.clone()
        matrix[index] = x
        return matrix

    with pytest.raises(IndexError) as expected:
        torch.func.vmap(write)(torch.randn(5, 4, 4), torch.randn(5))
    with pytest.raises(IndexError) as found:
        chainrule.vmap(write)(torch.randn(5, 4, 4), torch.randn(5))
    assert str(found.value) == str(expected.value)


@pytest.mark.skipif(not (COMPILED and KNOWS_STATE), reason="the short cuts are not compiled here")
def test_assignments_do_not_pass_through_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("an op came through the dispatcher")

    def write(matrix: Tensor, x: Tensor) -> Tensor:
        matrix[0, 1] = x
        matrix[1] = x
        matrix[2, 1:] = 3.0
        return matrix

    monkeypatch.setattr(VmapMode, "__torch_dispatch__", never)
    matrix, x = torch.zeros(5, 3, 3), torch.arange(5.0)
    chainrule.vmap(write)(matrix, x)
    assert torch.equal(matrix[:, 1], x[:, None].expand(5, 3))


@pytest.mark.parametrize("number", [1.5, 2, True])
def test_a_number_is_copied(number: Any) -> None:
    def write(x: Tensor) -> Tensor:
        matrix, view = x.repeat(4, 1), x * x
        matrix.copy_(number)
        view[1:].copy_(number)
        return matrix * x + view * x

    x = torch.randn(3, 5, dtype=torch.float64)
    for _ in range(4):
        torch.testing.assert_close(chainrule.vmap(write)(x), torch.stack([write(row) for row in x]))
        for transform in (chainrule.jacrev, chainrule.jacfwd):
            expected = torch.stack([torch.func.jacrev(write)(row) for row in x])
            torch.testing.assert_close(chainrule.vmap(transform(write))(x), expected)


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.repeat(4, 1).fill_(x[:1]),
        lambda x: x.repeat(4, 1).fill_(torch.ones(1)),
        lambda x: torch.zeros(5).fill_(x[:1]),
        lambda x: torch.fill(x, x[:1]),
    ],
)
def test_fill_takes_no_value_with_dimensions(write: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 5)
    for transformed in (chainrule.vmap(write), chainrule.vmap(chainrule.jacrev(write))):
        for _ in range(3):
            with pytest.raises(RuntimeError, match="fill_ only supports 0-dimension value tensor but got tensor with 1 dimensions"):
                transformed(x)


@pytest.mark.parametrize("values", [lambda x: x.expand(3, 2, 5), lambda x: torch.ones(3, 2, 5), lambda x: x.expand(2, 1, 5)])
@pytest.mark.parametrize("made", [lambda x: torch.zeros(4, 5) * x.sum(), lambda x: torch.zeros(4, 5)])
def test_values_with_more_dimensions_than_the_places(made: Callable[[Tensor], Tensor], values: Callable[[Tensor], Tensor]) -> None:
    def write(x: Tensor) -> Tensor:
        matrix = made(x)
        matrix[torch.tensor([0, 1])] = values(x)
        return matrix * x

    x = torch.randn(3, 5)
    for transformed in (chainrule.vmap(write), chainrule.vmap(chainrule.jacrev(write))):
        for _ in range(3):
            with pytest.raises(RuntimeError, match=r"shape mismatch: value tensor of shape .* cannot be broadcast to indexing result"):
                transformed(x)
