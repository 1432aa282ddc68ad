"""Colourings, and sparse Jacobians computed by them."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import chainrule
from chainrule.execute import engine
from chainrule.plan import compression, sparse
from chainrule.plan.colouring import colour_columns, colour_symmetric
from chainrule.plan.compression import star_places
from tests.transforms.sparse_functions import HESSIANS


def _valid(mask, colours):
    for row in mask:
        own = colours[row]
        assert len(torch.unique(own)) == len(own)


@pytest.mark.parametrize("seed", range(12))
def test_columns_of_one_row_differ(seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(9, 14, generator=generator) < 0.05 * (1 + seed)
    rows, columns = torch.nonzero(mask).t()
    colours = colour_columns(rows, columns, (9, 14))
    _valid(mask, colours)
    assert colours.shape == (14,)


def test_bands_need_as_many_colours_as_they_are_wide():
    size = 40
    distance = torch.arange(size)[:, None] - torch.arange(size)
    for width in (1, 3, 5):
        mask = distance.abs() <= width // 2
        colours = colour_columns(*torch.nonzero(mask).t(), (size, size))
        _valid(mask, colours)
        assert int(colours.max()) + 1 == width


def test_nothing_to_colour():
    empty = torch.empty(0, dtype=torch.long)
    assert colour_columns(empty, empty, (3, 4)).tolist() == [0, 0, 0, 0]
    assert colour_columns(empty, empty, (0, 0)).tolist() == []


def test_the_planner_takes_colours_where_products_fill_in():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(4, 4, 3, dtype=torch.float64, generator=generator) for _ in range(6)]

    def function(x):
        for weight in weights:
            x = F.conv1d(x, weight, padding=1).tanh()
        return x

    x = torch.randn(1, 4, 60, dtype=torch.float64, generator=generator)
    jacobian = chainrule.jacobian(function, layout="sparse_csr")
    account = chainrule.explain(jacobian)(x).accounts[-1]
    assert {a["order"] for a in account.alternatives} >= {"reverse", "colours"}
    assert account.chosen == min(account.alternatives, key=lambda a: a["cost"])["order"] == "colours"
    expected = torch.func.jacrev(function)(x).reshape(240, 240)
    for _ in range(2):
        torch.testing.assert_close(jacobian(x).to_dense(), expected, rtol=1e-10, atol=1e-10)
    # The same entries one by one, in a pinned order.
    torch.testing.assert_close(chainrule.jacrev(function, layout="sparse_csr")(x).to_dense(), expected, rtol=1e-10, atol=1e-10)


def test_too_many_colours() -> None:
    rows, columns = torch.nonzero(torch.ones(3, 5, dtype=torch.bool)).t()
    assert colour_columns(rows, columns, (3, 5), most=4) is None
    assert colour_columns(rows, columns, (3, 5), most=5).max() == 4
    rows, columns = torch.nonzero(torch.ones(5, 5, dtype=torch.bool)).t()
    assert colour_symmetric(rows, columns, 5, most=4) is None
    assert colour_symmetric(rows, columns, 5, most=5).max() == 4


# Star colourings


@st.composite
def symmetric_patterns(draw):
    size = draw(st.integers(1, 14))
    pairs = [(i, j) for i in range(size) for j in range(i)]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=40)) if pairs else []
    mask = torch.eye(size, dtype=torch.bool)
    for i, j in edges:
        mask[i, j] = mask[j, i] = True
    return mask


def neighbours_of(mask):
    return [[j for j in row.nonzero().reshape(-1).tolist() if j != i] for i, row in enumerate(mask)]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(symmetric_patterns())
def test_star_colourings(mask):
    """Adjacent vertices differ, and every path on four vertices has three colours; every entry can be read."""
    size = len(mask)
    colours = colour_symmetric(*torch.nonzero(mask).t(), size)
    adjacent = neighbours_of(mask)
    for one in range(size):
        for two in adjacent[one]:
            assert colours[one] != colours[two]
            for three, four in itertools.product(adjacent[two], range(size)):
                if four in adjacent[three] and len({one, two, three, four}) == 4:
                    assert len({int(colours[v]) for v in (one, two, three, four)}) >= 3
    generator = torch.Generator().manual_seed(size)
    matrix = torch.randn(size, size, dtype=torch.float64, generator=generator)
    matrix = torch.where(mask, matrix + matrix.T, 0.0)
    count = int(colours.max()) + 1
    compressed = matrix @ F.one_hot(colours, count).double()
    for part in (mask, mask.tril(), mask.triu()):
        rows, columns = torch.nonzero(part).t()
        found = compressed.reshape(-1)[star_places(rows, columns, colours, count, size)]
        torch.testing.assert_close(found, matrix[part])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(symmetric_patterns())
def test_as_few_star_colours_as_columns_of_one_row_need(mask):
    size = len(mask)
    entries = torch.nonzero(mask).t()
    assert colour_symmetric(*entries, size).max() <= colour_columns(*entries, (size, size)).max()


def test_known_numbers_of_star_colours():
    size = 30
    distance = torch.arange(size)[:, None] - torch.arange(size)
    arrow = torch.eye(size, dtype=torch.bool)
    arrow[7] = arrow[:, 7] = True
    rim = (distance.abs() <= 1) | (distance.abs() == size - 1)
    for mask, most, by_columns in ((arrow, 2, size), (distance.abs() <= 1, 3, 3), (rim, 4, 3), (distance == 0, 1, 1)):
        entries = torch.nonzero(mask).t()
        assert colour_symmetric(*entries, size).max() + 1 <= most
        assert colour_columns(*entries, (size, size)).max() + 1 >= by_columns
    assert colour_symmetric(*torch.nonzero(arrow).t(), size).max() + 1 == 2
    empty = torch.empty(0, dtype=torch.long)
    assert colour_symmetric(empty, empty, 3).tolist() == [0, 0, 0]
    assert colour_symmetric(empty, empty, 0).tolist() == []


def mixing(x, weights):
    for weight in weights:
        x = F.conv1d(x, weight, padding=1).tanh()
    return x


def convolution_weights(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


WEIGHTS = convolution_weights(*[(4, 4, 3)] * 3)
LAYERS = convolution_weights((2, 16), (16, 16), (16, 16))


def arrow_loss(x):
    """Each element meets the first one in a network."""
    y = torch.stack([x[1:], x[:1].expand(len(x) - 1)], 1)
    for layer in LAYERS:
        y = torch.tanh(y @ layer)
    return (y * y).sum() + (x**4).sum()


@pytest.fixture
def by_stars(monkeypatch):
    """Star colours are taken whatever they cost; the number of plans that had them."""
    settled, count = sparse._settled, [0]

    def only_stars(candidates, *others):
        stars = [pair for pair in candidates if pair[0].name == "star colours"]
        count[0] += len(stars)
        return settled(stars or candidates, *others)

    engine.CACHE.clear()
    monkeypatch.setattr(sparse, "_settled", only_stars)
    monkeypatch.setattr(compression, "_COLOURED", 0.0)
    monkeypatch.setattr(compression, "_most", lambda *args: 10**6)
    yield count
    engine.CACHE.clear()


@pytest.mark.parametrize("name", [name for name, (function, x) in HESSIANS.items() if function(x).dim() == 0])
def test_hessians_by_stars(name, by_stars):
    function, x = HESSIANS[name]
    expected = torch.func.hessian(function)(x)
    shape = (x.numel(), x.numel())
    for triangular, part in ((None, expected), ("lower", expected.reshape(shape).tril()), ("upper", expected.reshape(shape).triu())):
        found = chainrule.hessian(function, layout="sparse_coo", triangular=triangular)(x).to_dense()
        torch.testing.assert_close(found.reshape(shape), part.reshape(shape), rtol=1e-10, atol=1e-10)
    assert by_stars[0] == (3 if expected.any() else 0)


def test_the_planner_takes_stars_where_products_fill_in():
    """In all layouts and triangles; they equal the dense Hessian."""
    weights = convolution_weights(*[(4, 4, 3)] * 4)
    function = lambda x: (mixing(x.reshape(1, 4, -1), weights) ** 2).sum()  # noqa: E731
    x = torch.randn(160, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.3
    expected = torch.func.hessian(function)(x)
    account = chainrule.explain(chainrule.hessian(function, layout="sparse_coo"))(x).accounts[-1]
    assert account.chosen == min(account.alternatives, key=lambda a: a["cost"])["order"] == "star colours"
    for triangular, part in ((None, expected), ("lower", expected.tril()), ("upper", expected.triu())):
        hessian = chainrule.hessian(function, layout="sparse_coo", triangular=triangular)
        for _ in range(2):
            torch.testing.assert_close(hessian(x).to_dense(), part, rtol=1e-9, atol=1e-9)
    operator = chainrule.hessian(function, layout="operator")(x)
    torch.testing.assert_close(operator.sparse().to_dense(), expected, rtol=1e-9, atol=1e-9)


def test_hessian_of_two_arguments_by_stars(by_stars):
    function = lambda x, y: arrow_loss(torch.cat([y, x])) + (x * y).pow(3).sum()  # noqa: E731
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(n, dtype=torch.float64, generator=generator) * 0.3 for n in (40, 1))
    expected = torch.func.hessian(function, (0, 1))(x, y)
    found = chainrule.hessian(function, (0, 1), layout="sparse_coo")(x, y)
    lower = chainrule.hessian(function, (0, 1), layout="sparse_coo", triangular="lower")(x, y)
    for i, j in itertools.product(range(2), repeat=2):
        torch.testing.assert_close(found[i][j].to_dense(), expected[i][j], rtol=1e-9, atol=1e-9)
        part = expected[i][j] if i > j else expected[i][j].tril() if i == j else 0 * expected[i][j]
        torch.testing.assert_close(lower[i][j].to_dense(), part, rtol=1e-9, atol=1e-9)
    assert by_stars[0] == 2
