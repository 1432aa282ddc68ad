"""Sparse Jacobians and Hessians whose indices are others in every call: planning is recorded, and replayed."""

import pytest
import torch

import chainrule
from chainrule.execute.engine import CACHE
from chainrule.execute.open_plans import OpenPlan
from chainrule.execute.sparse_plans import SparsePlans

DOUBLE = torch.float64
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
N = 24
PLACES = torch.tensor([3, 1, 1, 0, 2, 4, 3, 0, 1, 2, 2, 4])
MASK = torch.arange(N) % 3 == 1
KERNEL = torch.tensor([[[1.0, -2.0, 1.5]]], dtype=DOUBLE)

FUNCTIONS = {
    "rows": lambda x: x.view(6, 4).amax(1) * 2,
    "rows by index": lambda x: x.view(6, 4).max(1).values.sin(),
    "columns": lambda x: x.view(6, 4).min(0, keepdim=True).values * x.view(6, 4),
    "windows": lambda x: x.unfold(0, 3, 1).amax(1) * x[1:-1],
    "pool": lambda x: torch.nn.functional.max_pool2d(x.view(1, 1, 4, 6), 3, stride=1).exp(),
    "one": lambda x: x * x.max(),
    "one by index": lambda x: x.max(0).values * x[:5],
    "sort": lambda x: x.sort().values.diff() ** 2,
    "topk": lambda x: x.view(4, 6).topk(3, 1).values.prod(1),
    "gather": lambda x: x.gather(0, x.view(6, 4).argmax(1) + torch.arange(6) * 4) ** 2,
    "stencil before": lambda x: (x[1:] - x[:-1]).unfold(0, 3, 2).amax(1) ** 2,
    "stencil after": lambda x: torch.nn.functional.conv1d(x.view(8, 3).amax(1).view(1, 1, -1), KERNEL),
    "ties": lambda x: x.relu().view(12, 2).amax(1) * 3,
    "masked": lambda x: x.masked_fill(MASK, 0).view(6, 4).amax(1) * 2,
    "segments": lambda x: torch.zeros(5, dtype=DOUBLE).scatter_reduce(0, PLACES, x[:12], "amax", include_self=False) ** 2,
    "norm": lambda x: torch.linalg.vector_norm(x.view(6, 4), float("inf"), 1) * x[:6],
    "nested": lambda x: x.view(2, 3, 4).amax(2).amax(1) ** 2,
    "two": lambda x: x.view(6, 4).amax(1) * x.view(6, 4).amin(1),
}


def _points(seed, count=7):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(N, dtype=DOUBLE, generator=generator) for _ in range(count)]


def _anew(transform, x):
    """What a call gives that nothing is known for."""
    kept = dict(CACHE.plans)
    CACHE.clear()
    found = transform(x)
    CACHE.clear()
    for key, plan in kept.items():
        CACHE.put(key, plan)
    return found


def _opened():
    return [plans for plans in CACHE.plans.values() if isinstance(plans, SparsePlans) and plans.opened is not None]


def _check(transform, dense, points):
    for x in points:
        found, expected = transform(x), _anew(transform, x)
        torch.testing.assert_close(found.to_dense(), dense(x), **CLOSE)
        assert torch.equal(found.indices(), expected.indices())
        torch.testing.assert_close(found.values(), expected.values(), **CLOSE)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_jacobians(name):
    CACHE.clear()
    function = FUNCTIONS[name]
    _check(chainrule.jacobian(function, layout="sparse_coo"), torch.func.jacrev(function), _points(1))
    assert _opened()


@pytest.mark.filterwarnings("ignore:.*unfold_backward.*:UserWarning")
@pytest.mark.parametrize("triangular", [None, "lower", "upper"])
@pytest.mark.parametrize("name", ["rows", "rows by index", "windows", "one", "sort", "stencil after", "ties", "norm"])
def test_hessians(name, triangular):
    CACHE.clear()
    function = lambda x: (FUNCTIONS[name](x).sin() ** 2).sum()  # noqa: E731
    part = {None: lambda h: h, "lower": torch.tril, "upper": torch.triu}[triangular]
    hessian = torch.func.hessian(function)
    transform = chainrule.hessian(function, layout="sparse_coo", triangular=triangular)
    _check(transform, lambda x: part(hessian(x)), _points(2))
    assert _opened()


def test_blocks_of_several_arguments():
    CACHE.clear()
    function = lambda x, y: (torch.stack([x, y, x * y]).amax(0) ** 3).sum()  # noqa: E731
    transform = chainrule.hessian(function, (0, 1), layout="sparse_csr", triangular="lower")
    for x, y in zip(_points(3), _points(4), strict=True):
        found, expected = transform(x, y), torch.func.hessian(function, (0, 1))(x, y)
        for i in range(2):
            for j in range(2):
                part = torch.tril(expected[i][j]) if i == j else expected[i][j] * (i > j)
                torch.testing.assert_close(found[i][j].to_dense(), part, **CLOSE)
    assert _opened()


def test_float32_in_and_out():
    CACHE.clear()
    function = lambda x: x.float().view(6, 4).amax(1) * 2  # noqa: E731
    transform = chainrule.jacobian(function, layout="sparse_coo")
    for x in _points(5):
        expected = torch.func.jacrev(function)(x)
        torch.testing.assert_close(transform(x).to_dense(), expected)
        assert transform(x).dtype is _anew(transform, x).dtype
    assert _opened()


def test_values_carry_a_graph():
    CACHE.clear()
    function = FUNCTIONS["windows"]
    transform = chainrule.jacobian(lambda x: function(x) ** 2, layout="sparse_coo")
    for x in _points(6):
        given = x.requires_grad_()
        found, expected = (torch.autograd.grad(run(given).values().sin().sum(), given)[0] for run in (transform, transform))
        anew = torch.autograd.grad(_anew(transform, given).values().sin().sum(), given)[0]
        torch.testing.assert_close(found, anew, **CLOSE)
        torch.testing.assert_close(expected, anew, **CLOSE)
    assert _opened()


def test_what_comes_again_gets_a_plan_of_its_own():
    CACHE.clear()
    transform = chainrule.jacobian(FUNCTIONS["rows"], layout="sparse_coo")
    points = _points(7, 5)
    counts = []
    for _ in range(3):
        for x in points:
            torch.testing.assert_close(transform(x).to_dense(), torch.func.jacrev(FUNCTIONS["rows"])(x), **CLOSE)
        counts.append([len(plans.plans) for plans in CACHE.plans.values() if isinstance(plans, SparsePlans)])
    assert counts == [[2], [5], [5]]


def test_another_course_is_planned_anew():
    """Without ties, with some, and with more than a list has room for."""
    CACHE.clear()
    function = lambda x: x.view(60, 2).amax(1) * x.view(60, 2).sum(1)  # noqa: E731
    transform = chainrule.jacobian(function, layout="sparse_coo")
    generator = torch.Generator().manual_seed(8)
    for tied in (0, 0, 0, 0, 5, 7, 9, 60, 3, 0, 1):
        x = torch.randn(60, 2, dtype=DOUBLE, generator=generator)
        x[:tied, 1] = x[:tied, 0]
        x = x.reshape(-1)
        found, expected = transform(x), _anew(transform, x)
        torch.testing.assert_close(found.to_dense(), torch.func.jacrev(function)(x), **CLOSE)
        assert torch.equal(found.indices(), expected.indices())


def test_an_infinite_slope_counts_once():
    """Elements of a list that stand twice are masked: infinity times zero is no number."""
    CACHE.clear()
    function = lambda x: x.relu().sqrt().view(12, 2).amax(1)  # noqa: E731
    transform = chainrule.jacobian(function, layout="sparse_coo")
    for x in _points(9):
        torch.testing.assert_close(transform(x).values(), _anew(transform, x).values(), equal_nan=True, **CLOSE)
    assert _opened()


def test_nothing_is_read_off_a_record_under_vmap():
    CACHE.clear()
    transform = chainrule.jacobian(FUNCTIONS["rows"], layout="sparse_coo")
    for x in _points(10):
        transform(x)
    points = torch.stack(_points(11, 3))
    found = chainrule.vmap(transform)(points)
    torch.testing.assert_close(found.to_dense(), torch.func.vmap(torch.func.jacrev(FUNCTIONS["rows"]))(points), **CLOSE)


def test_a_call_runs_the_record_alone(monkeypatch):
    CACHE.clear()
    runs = []
    run = OpenPlan.run
    monkeypatch.setattr(OpenPlan, "run", lambda self, values: runs.append(len(values)) or run(self, values))
    transform = chainrule.jacobian(FUNCTIONS["rows by index"], layout="sparse_coo")
    points = _points(12)
    for x in points:
        transform(x)
    (plans,) = _opened()
    assert len(runs) == len(points) - 2
    assert len(plans.plans) == 2
