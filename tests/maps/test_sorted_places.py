"""Numbers in order, and pairs of equal ones: by sorting, and by counting where all numbers are few."""

import pytest
import torch

from chainrule.maps.sorted_places import TooManyError, join_equal, places_among


@pytest.mark.parametrize("count", [0, 1, 7, 200])
@pytest.mark.parametrize("size", [1, 9, 1000])
def test_places_by_counting_are_those_by_sorting(count, size):
    numbers = torch.randint(0, size, (count,), generator=torch.Generator().manual_seed(count + size))
    for found, expected in zip(places_among(numbers, size), places_among(numbers), strict=True):
        assert torch.equal(found, expected)
    found, places = places_among(numbers, size)
    assert found.tolist() == sorted(set(numbers.tolist()))
    assert torch.equal(found[places], numbers)


@pytest.mark.parametrize("counts", [(0, 5), (5, 0), (6, 40), (40, 6), (30, 30)])
@pytest.mark.parametrize("size", [1, 8, 1000])
def test_pairs_by_counting_are_those_by_sorting(counts, size):
    generator = torch.Generator().manual_seed(sum(counts) + size)
    left, right = (torch.randint(-2, size, (count,), generator=generator) for count in counts)
    pairs = [sorted(zip(*(side.tolist() for side in join_equal(left, right, size=s)), strict=True)) for s in (None, size)]
    expected = [(i, j) for i, a in enumerate(left.tolist()) for j, b in enumerate(right.tolist()) if a == b >= 0]
    assert pairs == [expected, expected]
    if expected:
        with pytest.raises(TooManyError):
            join_equal(left, right, len(expected) - 1, size)
