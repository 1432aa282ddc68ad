"""What extrema chose, by value or by an index: sparse Jacobians and Hessians have those places, in every call."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import chainrule
from chainrule.execute.engine import CACHE
from tests.transforms.test_sparse_masks import CLOSE, DOUBLE, GROUPS, point

#: What an op chooses by value, without an index of its own.
CHOSEN = {
    "max": lambda x: x.max() * x,
    "amax": lambda x: x.reshape(2, 4).amax(1)[:, None] * x.reshape(2, 4),
    "median": lambda x: x.median() * x.roll(1),
    "aminmax": lambda x: torch.stack(x.aminmax())[:, None] * x[:3],
    "scatter": lambda x: torch.zeros(4, dtype=DOUBLE).scatter_reduce(0, GROUPS, x, "amax"),
    "scatter into": lambda x: x[:4].scatter_reduce(0, GROUPS, x**2, "amin") * x[:4],
    "inner": lambda x: (x.roll(1) * x).max() * x,
    "norm": lambda x: torch.linalg.vector_norm(x, math.inf) * x,
    "norms of rows": lambda x: torch.linalg.vector_norm(x.reshape(2, 4), -math.inf, 1, keepdim=True) * x.reshape(2, 4),
    "dist": lambda x: torch.dist(x, x.flip(0).square(), math.inf) * x,
}
#: The oracle where some versions of torch have no derivative.
CHOSEN_IN_TORCH = {"aminmax": lambda x: torch.stack([x.amin(), x.amax()])[:, None] * x[:3]}


@pytest.mark.parametrize("name", CHOSEN)
def test_extrema_have_the_places_that_they_chose(name):
    """The pattern is that of the point, whatever was chosen in the calls before; ties share; globally all that could be chosen."""
    function, written = CHOSEN[name], CHOSEN_IN_TORCH.get(name, CHOSEN[name])
    sparse, points = chainrule.jacobian(function, layout="sparse_coo"), [point(8, seed) + 1.5 for seed in range(4)]
    points.append(torch.tensor([1.0, 2.0, 2.0, 1.0, 1.0, 2.0, 1.0, 2.0], dtype=DOUBLE))
    compiled = chainrule.compile(sparse)
    chainrule.execute.engine.CACHE.clear()
    curvatures: dict[int, torch.Tensor] = {}
    for number, x in enumerate([points[0], points[1], points[0], *points, *points]):
        dense = torch.func.jacrev(written)(x)
        found, there = sparse(x), dense.reshape(-1, 8) != 0
        torch.testing.assert_close(found.to_dense(), dense, **CLOSE)
        torch.testing.assert_close(compiled(x).to_dense(), dense, **CLOSE)
        tracked = sparse(x.clone().requires_grad_()).detach()
        torch.testing.assert_close(tracked.to_dense(), dense, **CLOSE)
        assert torch.equal(tracked.indices(), found.indices())
        local, whole = (torch.as_tensor(chainrule.sparsity(function, x, global_=g).scipy().toarray()) > 0 for g in (False, True))
        assert found._nnz() == int(local.sum())
        if x is not points[-1]:
            assert found._nnz() == int(there.sum())
        assert not (there & ~local).any()
        assert not (local & ~whole).any()
        energy = lambda x: function(x).square().sum()  # noqa: E731
        hessian = chainrule.hessian(energy, layout="sparse_coo")(x)
        torch.testing.assert_close(hessian.to_dense(), torch.func.hessian(lambda x: written(x).square().sum())(x), **CLOSE)
        assert torch.equal(hessian.indices(), curvatures.setdefault(id(x), hessian.indices())), number


def windows(x):
    parts = [x[i : i + 3] for i in range(6)]
    return torch.stack([(part - part.max()).pow(3).sum() for part in parts]).sum()


#: Scalars that curve at what they chose without an index; their Hessians have no zeros but structural ones at a generic point.
CURVED = {
    "max": lambda x: (x - x.max()).pow(2).sum(),
    "extent": lambda x: ((x - x.min()) / (x.max() - x.min())).pow(3).sum(),
    "amax of rows": lambda x: (x.reshape(2, 4) - x.reshape(2, 4).amax(1, keepdim=True)).exp().pow(2).sum(),
    "amin of columns": lambda x: (x.reshape(2, 4).sin().amin(0) * x[:4]).pow(2).sum(),
    "aminmax": lambda x: (x * x.aminmax()[0] + x.aminmax()[1]).pow(3).sum(),
    "median": lambda x: (x - x.median()).pow(3).sum(),
    "modulus": lambda x: (x / x.abs().max()).pow(3).sum(),
    "norm": lambda x: (x / torch.linalg.vector_norm(x, math.inf)).pow(3).sum(),
    "unfold": lambda x: (x.unfold(0, 3, 1).amax(1) * x[1:-1]).pow(2).sum(),
    "windows": windows,
    "scatter": lambda x: (torch.zeros(3, dtype=DOUBLE).scatter_reduce(0, GROUPS, x.exp(), "amax") * x[:3]).pow(2).sum(),
    "segments": lambda x: torch.segment_reduce(x.sin(), "max", lengths=torch.tensor([3, 5])).pow(3).sum(),
    "layers": lambda x: (F.gelu(x.reshape(2, 4).tanh().amax(1)).max() * x).pow(3).sum(),
}


#: The same where torch, or some versions of it, have no second derivatives.
IN_TORCH = {
    "aminmax": lambda x: (x * x.amin() + x.amax()).pow(3).sum(),
    "segments": lambda x: torch.stack([x[:3].sin().max(), x[3:].sin().max()]).pow(3).sum(),
}


@pytest.mark.parametrize("name", CURVED)
def test_hessians_have_the_places_that_extrema_chose(name):
    """In every way to a Hessian, whatever was chosen in the calls before; of ties all that share."""
    function = CURVED[name]
    gradient = chainrule.grad(function)
    ways = {
        "coo": chainrule.hessian(function, layout="sparse_coo"),
        "csr": chainrule.hessian(function, layout="sparse_csr"),
        "operator": lambda x: chainrule.hessian(function, layout="operator")(x).sparse(),
        "levels": chainrule.jacobian(gradient, layout="sparse_coo"),
        "map": lambda x: chainrule.linear_map(gradient, x).sparse(),
    }
    halves = {half: chainrule.hessian(function, layout="sparse_coo", triangular=half) for half in ("lower", "upper")}
    ties = torch.tensor([1.0, 2.0, 2.0, 1.0, 1.0, 2.0, 1.0, 2.0], dtype=DOUBLE)
    points = [*(point(8, seed) + 1.5 for seed in range(3)), ties]
    chainrule.execute.engine.CACHE.clear()
    for number in (0, 0, 0, 1, 2, 3, 3, 0, 1, 2):
        x = points[number]
        expected = torch.autograd.functional.hessian(IN_TORCH.get(name, function), x)
        there = expected.abs() > 1e-13  # where terms cancel, the oracle has what rounding left
        pattern = torch.as_tensor(chainrule.sparsity(gradient, x).scipy().toarray()) > 0
        assert not (there & ~pattern).any()
        for way, transform in ways.items():
            found = transform(x)
            torch.testing.assert_close(found.to_dense(), expected, **CLOSE)
            if x is not ties:
                assert found._nnz() == int(there.sum()) == int(pattern.sum()), (way, number)
        for half, transform in halves.items():
            found, cut = transform(x), torch.tril if half == "lower" else torch.triu
            torch.testing.assert_close(found.to_dense(), cut(expected), **CLOSE)
            if x is not ties:
                assert found._nnz() == int(cut(there).sum())
        everywhere = torch.as_tensor(chainrule.sparsity(gradient, x, global_=True).scipy().toarray()) > 0
        assert not (pattern & ~everywhere).any()
        assert x is ties or int(everywhere.sum()) > int(there.sum())


def test_a_large_hessian_through_an_extremum_is_linear_in_its_size():
    x = point(3_000)
    found = chainrule.hessian(lambda x: (x - x.max()).pow(2).sum(), layout="sparse_coo")(x)
    assert found._nnz() == 3 * x.numel() - 2
    rows, columns = found.indices()
    best = x.argmax()
    expected = torch.where(rows == columns, 2.0, -2.0) + torch.where((rows == best) & (columns == best), 2.0 * x.numel() - 4, 0.0)
    torch.testing.assert_close(found.values(), expected.to(DOUBLE), **CLOSE)


@pytest.mark.parametrize("kind", ["jacobian", "hessian"])
def test_what_a_run_chose_is_computed_once_for_all_patterns(kind):
    function = lambda x: ((x.unfold(0, 3, 1).amax(1) * 0.5) ** 3).sum()  # noqa: E731
    transform = (
        chainrule.hessian(function, layout="sparse_coo") if kind == "hessian"
        else chainrule.jacobian(lambda x: x.unfold(0, 3, 1).amax(1) * x[1:-1], layout="sparse_coo")
    )  # fmt: skip
    chainrule.execute.engine.CACHE.clear()
    points = [point(12, seed) for seed in range(5)]
    transform_all = lambda: [transform(x) for x in points]  # noqa: E731
    first = transform_all()
    transform_all()  # what comes again gets a plan of its own
    plans = [plan for kept in CACHE.plans.values() for plan in getattr(kept, "plans", ()) if plan.choices.reads]
    assert len(plans) == len(points)
    runs: list[int] = []
    for number, plan in enumerate(plans):
        compute = plan.choices.computed
        plan.choices.computed = lambda values, seeds, number=number, compute=compute: runs.append(number) or compute(values, seeds)
    for x, expected in zip(points, first, strict=True):
        runs.clear()
        found = transform(x)
        assert len(runs) == 1
        assert torch.equal(found.indices(), expected.indices())
        assert torch.equal(found.values(), expected.values())


def test_choices_of_other_calls_are_computed_apart():
    """Of two extrema one may have no zeros at a point: its plan compares less than another one."""
    function = lambda x: torch.stack([x.max() * x[0], x[:2].amax() * x[1]])  # noqa: E731
    sparse = chainrule.jacobian(function, layout="sparse_coo")
    chainrule.execute.engine.CACHE.clear()
    tied = torch.tensor([3.0, 3.0, 1.0], dtype=DOUBLE)
    points = [tied, tied.flip(0), torch.tensor([1.0, 2.0, 2.0], dtype=DOUBLE), torch.full((3,), 2.0, dtype=DOUBLE), point(3)]
    for x in (*points, *points, *reversed(points)):
        torch.testing.assert_close(sparse(x).to_dense(), torch.func.jacrev(function)(x), **CLOSE)


def test_masks_of_the_inputs_are_no_choices():
    """What a comparison with something else cuts off stays in the pattern, beside an extremum."""
    function = lambda x: (x.relu() * x.max()).pow(2).sum()  # noqa: E731
    x = torch.tensor([1.0, -2.0, 3.0, 2.0, -1.0], dtype=DOUBLE)
    found = chainrule.hessian(function, layout="sparse_coo")(x)
    torch.testing.assert_close(found.to_dense(), torch.func.hessian(function)(x), **CLOSE)
    assert found._nnz() == 3 * 5 - 2


#: The same under other transforms, and what is chosen by an index.
HISTORIES = {
    "amax": lambda x: (x.roll(1) * x).amax() ** 2,
    "columns": lambda x: (x.reshape(2, 4) * x.sin().reshape(2, 4)).amax(0).pow(2).sum(),
    "max with indices": lambda x: x.reshape(2, 4).max(0).values.pow(3).sum(),
    "sort": lambda x: x.sort().values.diff().pow(2).sum(),
    "extrema of pairs": lambda x: torch.maximum(x**2, x.roll(1) ** 3).square().sum(),
    "clamp": lambda x: (x * x.roll(1)).clamp(0.6, 1.2).pow(3).sum(),
    "twice": lambda x: (x.reshape(2, 4).amax(1) * x.median()).amin() ** 2,
}


@pytest.mark.parametrize("name", HISTORIES)
@pytest.mark.parametrize("kind", ["hessian", "levels", "jacobian", "map", "vmap", "tracked"])
def test_patterns_do_not_depend_on_the_calls_before(name, kind):
    """Ten calls at five points: pattern and values are those of a first call at the point, the true pattern is in it."""
    function = HISTORIES[name]
    if kind == "vmap" and name in ("max with indices", "sort"):
        pytest.skip("an index of each sample is refused")
    transforms = {
        "hessian": chainrule.hessian(function, layout="sparse_coo"),
        "levels": chainrule.jacobian(chainrule.grad(function), layout="sparse_coo"),
        "jacobian": chainrule.jacobian(lambda x: torch.stack([function(x), function(x.flip(0))]), layout="sparse_coo"),
        "map": lambda x: chainrule.linear_map(chainrule.grad(function), x).sparse(),
        "vmap": lambda x: chainrule.vmap(chainrule.hessian(function, layout="sparse_coo"))(x[None])[0],
        "tracked": lambda x: chainrule.hessian(function, layout="sparse_coo")(x.clone().requires_grad_()).detach(),
    }
    twice = lambda x: torch.func.jacrev(lambda x: torch.stack([function(x), function(x.flip(0))]))(x)  # noqa: E731
    transform, expected = transforms[kind], twice if kind == "jacobian" else torch.func.hessian(function)
    points, fresh = [point(8, seed) for seed in range(5)], []
    for x in points:
        chainrule.execute.engine.CACHE.clear()
        fresh.append(transform(x).coalesce())
    chainrule.execute.engine.CACHE.clear()
    for number in (0, 1, 2, 3, 4, 4, 2, 0, 3, 1):
        found = transform(points[number]).coalesce()
        assert torch.equal(found.indices(), fresh[number].indices())
        torch.testing.assert_close(found.to_dense(), expected(points[number]), **CLOSE)


def test_norms_of_order_one_and_signs_are_constant():
    x = point(12).reshape(3, 4)
    norms = lambda x: torch.linalg.vector_norm(x, 1, 1)  # noqa: E731
    assert chainrule.hessian(lambda x: norms(x).sum(), layout="sparse_coo")(x)._nnz() == 0
    found = chainrule.hessian(lambda x: (norms(x) ** 2).sum(), layout="sparse_coo")(x)
    torch.testing.assert_close(found.to_dense(), torch.func.hessian(lambda x: (norms(x) ** 2).sum())(x), **CLOSE)
    assert found._nnz() == 3 * 4 * 4
    assert chainrule.jacobian(lambda x: torch.sgn(x) * x, layout="sparse_coo")(x)._nnz() == x.numel()
