"""The callbacks of a nonlinear program: structure and values are the dense derivatives, at every point."""

from __future__ import annotations

import numpy as np
import pytest
import torch

scipy_optimize = pytest.importorskip("scipy.optimize")

from chainrule import scipy as chainrule_scipy  # noqa: E402
from tests.scipy.problems import coupled, rosenbrock  # noqa: E402


def selecting(x):
    """What is selected changes from point to point."""
    return torch.cat([x.sort().values[:2], x.max()[None] * x[1], torch.where(x > 0, x**2, x)])


@pytest.mark.parametrize("constraints", [coupled, selecting, None])
def test_structure_and_values_are_dense(constraints):
    problem = chainrule_scipy.nlp_problem(rosenbrock, np.linspace(0.1, 1, 6), constraints)
    generator = np.random.default_rng(5)
    for _ in range(4):
        x, factor, weights = generator.normal(size=6), 0.7, generator.normal(size=problem.m)
        at, v = torch.tensor(x), torch.tensor(weights)
        assert np.isclose(problem.objective(x), rosenbrock(at).item(), rtol=1e-14)
        assert np.allclose(problem.gradient(x), torch.func.grad(rosenbrock)(at).numpy(), rtol=1e-12)

        def lagrangian(x, factor=factor, v=v):
            value = factor * rosenbrock(x)
            return value if constraints is None else value + (v * constraints(x)).sum()

        dense = np.zeros((6, 6))
        dense[problem.hessianstructure()] = problem.hessian(x, weights, factor)
        assert np.allclose(dense, np.tril(torch.func.hessian(lagrangian)(at).numpy()), rtol=1e-12, atol=1e-12)
        dense = np.zeros((problem.m, 6))
        dense[problem.jacobianstructure()] = problem.jacobian(x)
        if constraints is None:
            assert problem.m == 0 and problem.constraints(x).shape == (0,)
        else:
            assert np.allclose(dense, torch.func.jacrev(constraints)(at).numpy(), rtol=1e-13)
            assert np.allclose(problem.constraints(x), constraints(at).numpy(), rtol=1e-14)


@pytest.mark.parametrize("constraints", [coupled, None])
def test_replayed_callbacks_are_the_plain_ones(constraints):
    """What an interior-point method calls is replayed once it repeats; other constraints of the same objective are not mixed up."""
    start = np.linspace(0.1, 1, 6)
    problems = {
        compiled: chainrule_scipy.nlp_problem(rosenbrock, start, constraints, compiled=compiled) for compiled in (False, None, True)
    }
    other = chainrule_scipy.nlp_problem(rosenbrock, start, lambda x: x[:1] * x[1:2], compiled=True)
    generator = np.random.default_rng(6)
    for _ in range(16):
        x, weights = generator.normal(size=6), generator.normal(size=problems[False].m)
        plain = problems[False]
        for problem in (problems[None], problems[True]):
            assert np.isclose(problem.objective(x), plain.objective(x), rtol=1e-14)
            for name, arguments in (("gradient", ()), ("jacobian", ()), ("constraints", ()), ("hessian", (weights, 0.7))):
                found, expected = (getattr(p, name)(x, *arguments) for p in (problem, plain))
                assert np.allclose(found, expected, rtol=1e-13, atol=1e-13), name
        assert np.allclose(other.jacobian(x), x[1::-1], rtol=1e-13)
        dense = np.zeros((6, 6))
        dense[other.hessianstructure()] = other.hessian(x, np.ones(1), 0.0)
        expected = np.zeros((6, 6))
        expected[1, 0] = 1.0
        assert np.allclose(dense, expected, atol=1e-13)


def test_replays_read_what_is_replaced():
    scale = torch.ones(3, dtype=torch.float64)

    def objective(x):
        return (scale * x**2).sum()

    problem = chainrule_scipy.nlp_problem(objective, np.ones(3), compiled=True)
    for value in (1.0, 3.0, 5.0):
        scale.fill_(value)
        x = np.array([1.0, 2.0, value])
        assert np.allclose(problem.gradient(x), 2 * value * x)
    with pytest.raises(TypeError, match="compiled must be"):
        chainrule_scipy.nlp_problem(objective, np.ones(3), compiled="yes")


def test_structure_is_sparse_and_unique():
    problem = chainrule_scipy.nlp_problem(rosenbrock, np.ones(50), lambda x: x[1:] * x[:-1])
    rows, columns = problem.jacobianstructure()
    assert len(rows) == 98 and len(set(zip(rows, columns, strict=True))) == 98
    rows, columns = problem.hessianstructure()
    assert len(rows) == 99 and (rows >= columns).all()


def test_another_branch_is_an_error():
    def branching(x):
        return x[:1] * x[1:2] if x[0] > 0 else x[1:2] * x[2:3]

    problem = chainrule_scipy.nlp_problem(rosenbrock, np.ones(3), branching)
    with pytest.raises(ValueError, match="another branch"):
        problem.jacobian(-np.ones(3))


def test_runs_are_shared():
    calls = []

    def counted(x):
        calls.append(1)
        return coupled(x)

    problem = chainrule_scipy.nlp_problem(rosenbrock, np.ones(4), counted)
    calls.clear()
    problem.constraints(np.zeros(4))
    problem.jacobian(np.zeros(4))
    assert len(calls) == 1


def test_with_cyipopt():
    cyipopt = pytest.importorskip("cyipopt", exc_type=ImportError)
    x0 = np.linspace(0.2, 0.6, 8)
    lower, upper = np.array([1.0] + [-2e19] * 7), np.array([2.0] + [0.3] * 7)
    callbacks = chainrule_scipy.nlp_problem(rosenbrock, x0, coupled)
    problem = cyipopt.Problem(n=8, m=8, problem_obj=callbacks, lb=np.full(8, -2.0), ub=np.full(8, 2.0), cl=lower, cu=upper)
    problem.add_option("print_level", 0)
    x, info = problem.solve(x0)
    ours = chainrule_scipy.minimize(
        rosenbrock, x0, method="SLSQP", bounds=scipy_optimize.Bounds(-2, 2),
        constraints=chainrule_scipy.nonlinear_constraint(coupled, lower, upper),
    )  # fmt: skip
    assert info["status"] == 0
    assert np.isclose(info["obj_val"], ours.fun, rtol=1e-4)


def test_arguments():
    with pytest.raises(ValueError, match="x0 must be a vector"):
        chainrule_scipy.nlp_problem(rosenbrock, np.ones((2, 2)))
    with pytest.raises(ValueError, match="must return a scalar"):
        chainrule_scipy.nlp_problem(coupled, np.ones(3))
    with pytest.raises(ValueError, match="must return a vector"):
        chainrule_scipy.nlp_problem(rosenbrock, np.ones(3), rosenbrock)


MASK = torch.tensor([1, 0, 1, 0, 0, 1], dtype=torch.bool)


@pytest.mark.parametrize("compiled", [None, True, False])
def test_zeros_of_masks_are_no_part_of_a_structure(compiled):
    """Records hold them, plain calls do not: the structure is the same."""
    masked = lambda x: x.masked_fill(MASK, 0) * x.roll(1)  # noqa: E731
    energy = lambda x: (x**2).sum() + (masked(x) ** 2).sum()  # noqa: E731
    problem = chainrule_scipy.nlp_problem(energy, np.linspace(0.1, 1, 6), masked, compiled=compiled)
    generator = np.random.default_rng(1)
    for _ in range(16):
        x, weights = generator.normal(size=6), generator.normal(size=6)
        at, v = torch.tensor(x), torch.tensor(weights)
        dense = np.zeros((6, 6))
        dense[problem.jacobianstructure()] = problem.jacobian(x)
        assert np.allclose(dense, torch.func.jacrev(masked)(at).numpy(), rtol=1e-13)
        dense = np.zeros((6, 6))
        dense[problem.hessianstructure()] = problem.hessian(x, weights, 0.7)
        expected = torch.func.hessian(lambda x: 0.7 * energy(x) + (v * masked(x)).sum())(at)  # noqa: B023 - called at once
        assert np.allclose(dense, np.tril(expected.numpy()), rtol=1e-12, atol=1e-13)
