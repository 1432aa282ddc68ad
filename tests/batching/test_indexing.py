"""Indices with integers that differ between the samples, beside a loop over the samples with Python numbers in their place.

All comparisons are exact: indexing rounds nothing.
"""

import random

import pytest
import torch
from torch import Tensor

import chainrule

POSITIONS = torch.tensor([0, 2, -1, 1])


def _table(*shape: int) -> Tensor:
    return torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64).view(shape)


#: What an index is, by a position.
INDICES = {
    "i": lambda i: i,
    "(i,)": lambda i: (i,),
    "i, :": lambda i: (i, slice(None)),
    "0, i": lambda i: (0, i),
    ":, i": lambda i: (slice(None), i),
    "..., i": lambda i: (Ellipsis, i),
    "i, None": lambda i: (i, None),
    "i, i": lambda i: (i, i),
    "i, 1:, i": lambda i: (i, slice(1, None), i),
    "i, ::2, None, i": lambda i: (i, slice(None, None, 2), None, i),
    "i, ..., i": lambda i: (i, Ellipsis, i),
    "-1, i": lambda i: (-1, i),
    "i, list": lambda i: (i, torch.tensor([0, 2, 1, 1])),
    "i, :, list": lambda i: (i, slice(None), torch.tensor([0, 2])),
    "list, :, i": lambda i: (torch.tensor([0, 2]), slice(None), i),
    "list, i, list": lambda i: (torch.tensor([0, 2]), i, torch.tensor([1, 1])),
    "i, mask": lambda i: (i, torch.tensor([True, False, True])),
    "i, mask of two": lambda i: (i, torch.eye(3) > 0),
    "number, i": lambda i: (torch.tensor(1), i),
}


@pytest.mark.parametrize("name", INDICES)
def test_get_is_what_numbers_give(name: str) -> None:
    index = INDICES[name]
    table = _table(3, 3, 3)
    parameter = torch.nn.Parameter(table.clone())
    expected = torch.stack([table[index(int(i))] for i in POSITIONS])
    stacked = torch.stack([table * (1 + n) for n in range(4)])
    expected_of_own = torch.stack([own[index(int(i))] for own, i in zip(stacked, POSITIONS, strict=True)])
    for _ in range(4):  # the calls after the first ones replay
        assert torch.equal(chainrule.vmap(lambda i: table[index(i)])(POSITIONS), expected)
        assert torch.equal(chainrule.vmap(lambda i: parameter[index(i)])(POSITIONS), expected)
        assert torch.equal(chainrule.vmap(lambda t, i: t[index(i)], in_dims=(None, 0))(table, POSITIONS), expected)
        assert torch.equal(chainrule.vmap(lambda t, i: t[index(i)])(stacked, POSITIONS), expected_of_own)
    nested = chainrule.vmap(lambda t: chainrule.vmap(lambda i: t[index(i)])(POSITIONS))(stacked)
    assert torch.equal(nested, torch.stack([torch.stack([own[index(int(i))] for i in POSITIONS]) for own in stacked]))
    around = chainrule.vmap(lambda i: chainrule.vmap(lambda t: t[index(i)])(stacked))(POSITIONS)
    assert torch.equal(around, nested.transpose(0, 1))


@pytest.mark.parametrize("name", INDICES)
def test_put_is_what_numbers_give(name: str) -> None:
    index = INDICES[name]
    shape = torch.zeros(3, 3, 3)[index(0)].shape
    values = _table(4, *shape)

    def written(i: Tensor | int, value: Tensor | float) -> Tensor:
        found = torch.zeros(3, 3, 3, dtype=torch.float64)
        found[index(i)] = value
        return found

    expected = torch.stack([written(int(i), value) for i, value in zip(POSITIONS, values, strict=True)])
    for _ in range(4):
        assert torch.equal(chainrule.vmap(written)(POSITIONS, values), expected)
        assert torch.equal(chainrule.vmap(lambda i: written(i, 2.0))(POSITIONS), (expected > 0) * 2.0)


@pytest.mark.parametrize("name", INDICES)
def test_derivatives_are_those_of_the_loop(name: str) -> None:
    index = INDICES[name]
    table = _table(3, 3, 3)

    def loop(t: Tensor) -> Tensor:
        return torch.stack([t[index(int(i))] ** 2 for i in POSITIONS])

    expected = torch.func.jacrev(loop)(table)
    for _ in range(2):
        for jacobian in (chainrule.jacrev, chainrule.jacfwd):
            found = jacobian(lambda t: chainrule.vmap(lambda i: t[index(i)] ** 2)(POSITIONS))(table)
            assert torch.equal(found, expected)
        found = chainrule.vmap(lambda i: chainrule.jacrev(lambda t: t[index(i)] ** 2)(table))(POSITIONS)
        assert torch.equal(found, expected)
        found = chainrule.vmap(chainrule.grad(lambda t, i: (t[index(i)] ** 2).sum()), in_dims=(None, 0))(table, POSITIONS)
        assert torch.equal(found, expected.view(4, -1, 3, 3, 3).sum(1))


def test_parameters_are_reached_by_backward() -> None:
    parameter = torch.nn.Parameter(_table(3, 2))
    chainrule.vmap(lambda i: parameter[i] ** 2)(POSITIONS).sum().backward()
    expected = 2 * parameter.detach() * torch.tensor([[1.0], [1.0], [2.0]])  # how often each row was taken
    assert torch.equal(parameter.grad, expected)


def test_random_indices() -> None:
    choose = random.Random(0)
    for _ in range(60):
        shape = [choose.randint(2, 4) for _ in range(choose.randint(1, 4))]
        table = _table(*shape)
        numbers = [torch.tensor([choose.randrange(-size, size) for _ in range(3)]) for size in shape]
        parts: list[object] = []
        mapped = 0
        for size, number in zip(shape, numbers, strict=True):
            kind = choose.choice(["mapped", "mapped", "number", "slice", "list", "none"])
            mapped += kind == "mapped"
            parts.append({
                "mapped": number, "number": choose.randrange(-size, size), "slice": slice(choose.randrange(size), None),
                "list": [choose.randrange(size) for _ in range(2)], "none": slice(None),
            }[kind])  # fmt: skip
            if choose.random() < 0.2:
                parts.append(None)
        if not mapped:
            continue
        places = [n for n, part in enumerate(parts) if isinstance(part, Tensor)]

        def taken(
            t: Tensor, *positions: Tensor | int, parts: list[object] = parts, places: list[int] = places
        ) -> Tensor:
            own = [torch.tensor(part) if isinstance(part, list) else part for part in parts]
            for place, position in zip(places, positions, strict=True):
                own[place] = position
            return t[tuple(own)]

        columns = [parts[place] for place in places]
        expected = torch.stack([taken(table, *[int(column[n]) for column in columns]) for n in range(3)])
        for _ in range(4):
            found = chainrule.vmap(taken, in_dims=(None, *[0] * len(columns)))(table, *columns)
            assert torch.equal(found, expected), parts


def test_slice_bounds_stay_an_error() -> None:
    table = _table(3, 3)
    with pytest.raises(RuntimeError, match="asked for the Python value"):
        chainrule.vmap(lambda i: table[:i])(POSITIONS)


def test_writing_into_a_table_from_outside_is_refused() -> None:
    table = _table(3, 3)

    def write(i: Tensor) -> Tensor:
        table[i] = 0.0
        return table.sum()

    with pytest.raises(RuntimeError, match="came from outside"):
        chainrule.vmap(write)(POSITIONS)
    assert torch.equal(table, _table(3, 3))


def test_an_index_that_is_mapped_may_be_assigned_to() -> None:
    def write(row: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        row = row.clone()
        row[place] = 7.0
        torch.Tensor.__setitem__(row, place - 1, row[place] * 2)
        return row

    rows, places = torch.zeros(3, 4), torch.tensor([1, 3, 2])
    expected = torch.zeros(3, 4)
    expected[torch.arange(3), places] = 7.0
    expected[torch.arange(3), places - 1] = 14.0
    for _ in range(4):
        assert torch.equal(chainrule.vmap(write)(rows, places), expected)
