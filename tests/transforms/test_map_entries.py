"""Diagonals, traces, norms and entries of maps that are read off their non-zeros."""

from __future__ import annotations

import pytest
import torch

import chainrule
from chainrule.transforms import map_entries

DOUBLE = torch.float64
SIZE = 700
GENERATOR = torch.Generator().manual_seed(1)
SOURCE, TARGET = (torch.randint(SIZE, (3 * SIZE,), generator=GENERATOR) for _ in range(2))
WEIGHT = torch.rand(3 * SIZE, dtype=DOUBLE, generator=GENERATOR)
ROWS, COLUMNS = [1, 5, 9, int(TARGET[0])], [1, 6, 9, int(SOURCE[0])]


def graph(x, weight):
    return torch.zeros_like(x).index_add(0, TARGET, weight * (x[SOURCE] - x[TARGET]).tanh())


def jacobian(x, weight):
    return chainrule.linear_map(lambda y: graph(y, weight), x)


def matrix(x, weight):
    return torch.func.jacrev(graph)(x, weight)


READ = {
    "diagonal": (lambda J: J.diagonal(), lambda M: M.diagonal()),
    "trace": (lambda J: J.trace(), lambda M: M.trace()),
    "norm": (lambda J: J.norm(), lambda M: M.norm()),
    "gram": (lambda J: J.gram().diagonal(), lambda M: (M @ M.T).diagonal()),
    "normal": (lambda J: J.normal().trace(), lambda M: (M.T @ M).trace()),
    "sum": (lambda J: (J @ J + 2 * J.T - J).trace(), lambda M: (M @ M).trace() + M.trace()),
    "entries": (lambda J: J[ROWS, COLUMNS], lambda M: M[ROWS, COLUMNS]),
}


@pytest.mark.parametrize("name", READ)
def test_values_and_derivatives(name):
    ours, theirs = READ[name]
    x = torch.rand(SIZE, dtype=DOUBLE, generator=GENERATOR)
    assert map_entries.prefers_entries(jacobian(x, WEIGHT), "squares")
    # Sums of at most some thousand products of numbers of size one.
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(ours(jacobian(x, WEIGHT)), theirs(matrix(x, WEIGHT)), **close)
    expected = torch.func.grad(lambda w: theirs(matrix(x, w)).sum())(WEIGHT)
    torch.testing.assert_close(chainrule.grad(lambda w: ours(jacobian(x, w)).sum())(WEIGHT), expected, **close)
    tracked = WEIGHT.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ours(jacobian(x, tracked)).sum(), tracked)
    torch.testing.assert_close(gradient, expected, **close)
    batch = torch.stack([WEIGHT, 2 * WEIGHT])
    several = chainrule.vmap(lambda w: ours(jacobian(x, w)))(batch)
    torch.testing.assert_close(several[1], theirs(matrix(x, batch[1])), **close)


def test_several_leaves():
    """Blocks of several inputs and outputs of different shapes."""

    def function(p, q):
        joined = graph(torch.cat([p.reshape(-1), q]), WEIGHT)
        return joined[:600].reshape(20, 30), joined[600:] * q

    p, q = torch.rand(20, 30, dtype=DOUBLE, generator=GENERATOR), torch.rand(100, dtype=DOUBLE, generator=GENERATOR)
    ours = chainrule.linear_map(function, p, q)
    dense = ours.dense(flat=True)
    blocks = torch.func.jacrev(function, (0, 1))(p, q)
    expected = torch.cat([torch.cat([blocks[o][i].reshape(n, -1) for i in range(2)], 1) for o, n in enumerate((600, 100))])
    torch.testing.assert_close(dense, expected)
    diagonal = ours.diagonal()
    torch.testing.assert_close(torch.cat([diagonal[0].reshape(-1), diagonal[1]]), expected.diagonal())
    torch.testing.assert_close(ours.norm(), expected.norm())
    torch.testing.assert_close(ours[[3, 650, 699], [3, 10, 699]], expected[[3, 650, 699], [3, 10, 699]])


def with_target(x, target):
    return torch.zeros_like(x).index_add(0, target, x.index_select(0, SOURCE).sin() * x.index_select(0, target))


def test_in_a_compiled_function():
    """A record holds for the indices that it was made with: others are compared, and recorded anew."""
    x = torch.rand(SIZE, dtype=DOUBLE, generator=GENERATOR)
    for name, (ours, theirs) in READ.items():
        compiled = chainrule.compile(lambda x, target: ours(chainrule.linear_map(lambda y: with_target(y, target), x)))  # noqa: B023
        for target in (TARGET, TARGET.flip(0), TARGET):
            dense = torch.func.jacrev(with_target)(x, target)
            torch.testing.assert_close(compiled(x, target), theirs(dense), msg=name)
        # Diagonals and single entries are read off the factors, at any index.
        assert compiled.cache_info().misses == (1 if name in ("diagonal", "trace", "entries") else 2)


def test_under_vmap_with_an_index_for_each_sample():
    """There is no common pattern: the factors are contracted, or columns are taken a few at a time."""
    x = torch.rand(SIZE, dtype=DOUBLE, generator=GENERATOR)
    targets = torch.stack([TARGET, TARGET.flip(0)])
    for ours, theirs in (READ["diagonal"], READ["norm"], READ["gram"]):
        read = lambda target: ours(chainrule.linear_map(lambda y: with_target(y, target), x))  # noqa: B023, E731
        read(TARGET)  # what is known of one index is not used for several
        found = chainrule.vmap(read)(targets)
        expected = torch.stack([theirs(torch.func.jacrev(with_target)(x, target)) for target in targets])
        torch.testing.assert_close(found, expected)


def allocated(function, *args):
    """The most bytes that a call holds at once, by the allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function(*args)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("name", READ)
def test_no_array_of_dense_size_in_any_nest(name):
    """By the allocator, planning included: the matrix has 3.9 MB, its 5·SIZE entries at most 28 kB (and 28 kB of places)."""
    ours, _ = READ[name]
    x = torch.rand(SIZE, dtype=DOUBLE, generator=GENERATOR)
    read = lambda x: ours(jacobian(x, WEIGHT))  # noqa: E731
    total = lambda x: read(x).sum()  # noqa: E731
    nests = {
        "plain": (read, x), "vmap": (chainrule.vmap(read), x[None]), "compile": (chainrule.compile(read), x),
        "compile of vmap": (chainrule.compile(chainrule.vmap(read)), x[None]),
        "vmap of grad": (chainrule.vmap(chainrule.grad(total)), x[None]),
        "grad of vmap": (chainrule.grad(lambda xs: chainrule.vmap(total)(xs).sum()), x[None]),
        "compile of grad": (chainrule.compile(chainrule.grad(total)), x),
    }  # fmt: skip
    for nest, (function, point) in nests.items():
        for _ in range(2):
            assert allocated(function, point) < SIZE * SIZE * 8, nest
