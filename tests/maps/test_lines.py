"""Lines of places: which of them are one."""

import pytest
import torch

from chainrule.maps import lines
from chainrule.maps.lines import Lines, join_lines


def joined(*parts, size=6, counted=True):
    return join_lines([Lines([torch.tensor(part) for part in parts], size, counted)])


def test_lines_that_agree_where_both_lead_somewhere_are_one():
    found = joined([[1, 2, -1, -1]], [[-1, -1, 3, 4], [0, 1, 2, 3]], [[1, -1, 3, 4]])
    assert found.count == 2 and found.place.tolist() == [0, 0, 1, 0]
    assert found.places[0].tolist() == [[1, 2, 3, 4], [0, 1, 2, 3]]
    assert [None if own is None else own[0].tolist() for own in found.missing] == [
        [[True, True, False, False]], [[False, False, True, True], [True] * 4], [[True, False, True, True]],
    ]  # fmt: skip


def test_distances_are_counted_around_the_ends():
    found = joined([[1, 2, 3, -1]], [[-1, -1, -1, 0]], size=4)
    assert found.count == 1 and found.places[0].tolist() == [[1, 2, 3, 0]]


@pytest.mark.parametrize("counted", [True, False])
def test_lines_that_contradict_each_other_stay_apart(counted):
    found = joined([[1, 2, -1, 5]], [[1, 2, 3, 4]], [[1, 2, -1, 5]], counted=counted)
    assert found.count == 2 and found.place.tolist() == [0, 1, 0]
    assert found.places[0].tolist() == [[1, 2, -1, 5], [1, 2, 3, 4]]


def test_rows_that_no_line_reads_have_no_entry_along_several_dimensions():
    """One line misses the first row, the other one the first column: their union misses only the corner."""
    full, cut = torch.tensor([[0, 1, 2]]), torch.tensor([[-1, 1, 2]])
    found = join_lines([Lines([full, cut], 3, True), Lines([cut, full], 3, True)])
    assert found.count == 2
    found = join_lines([Lines([full, cut], 3, True), Lines([full, cut], 3, True)])
    assert found.count == 1 and found.missing[0] is None and found.missing[1] is not None


def test_equal_fingerprints_do_not_make_lines_equal(monkeypatch):
    """Were all fingerprints the same, each tap would stay by itself."""
    monkeypatch.setattr(lines, "_fingerprints", lambda number, own: torch.zeros(own.shape[0], dtype=torch.long))
    found = joined([[0, 1], [0, 2]], [[0, 1]])
    assert found.count == 3 and found.place.tolist() == [0, 1, 2]
