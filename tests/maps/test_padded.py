"""Lists whose length follows from values, at a fixed length."""

import pytest
import torch

from chainrule.maps.padded import padded_pairs, padded_places, room_for
from chainrule.maps.sorted_places import join_equal


@pytest.mark.parametrize("seed", range(4))
def test_places_are_those_of_nonzero(seed):
    flags = torch.rand(50, generator=torch.Generator().manual_seed(seed)) < 0.3
    room, some = room_for(flags.sum())
    assert some
    found = padded_places(flags, room)
    expected = torch.nonzero(flags).squeeze(1)
    assert found.places.numel() == room
    assert torch.equal(found.places[found.real], expected)
    assert set(found.places.tolist()) == set(expected.tolist())


def test_no_places():
    assert not room_for(torch.zeros(5, dtype=torch.bool).sum())[1]


@pytest.mark.parametrize("seed", range(4))
def test_pairs_are_those_of_a_join(seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randint(-1, 9, (size,), generator=generator) for size in (13, 21))
    first, second, real = padded_pairs(left, right)
    expected = set(zip(*(side.tolist() for side in join_equal(left, right)), strict=True))
    pairs = list(zip(first[real].tolist(), second[real].tolist(), strict=True))
    assert len(pairs) == len(expected)
    assert set(pairs) == expected
    assert set(zip(first.tolist(), second.tolist(), strict=True)) == expected


def test_no_pairs():
    assert padded_pairs(torch.tensor([1, 2, -1]), torch.tensor([3, -1])) is None
    assert padded_pairs(torch.empty(0, dtype=torch.long), torch.tensor([3])) is None
