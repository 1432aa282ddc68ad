"""Section C: SciPy's solvers driven by torch functions (C5): exact derivatives, finite differences, torch.func's derivatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import integrate, optimize, sparse
from scipy.optimize._numdiff import approx_derivative

import chainrule.scipy
from benchmarks.scientific import rosenbrock
from benchmarks.workload import Expression, Targets, Workload

tf = torch.func
Tensor = torch.Tensor


# --- what the drivers share -----------------------------------------------------------------------------------------


class Counted:
    """A function that counts its runs; what derivatives batch is one run."""

    def __init__(self, function: Expression) -> None:
        self.function, self.runs = function, 0

    def __call__(self, *args: Any) -> Any:
        self.runs += 1
        return self.function(*args)


def _numpy(function: Expression) -> Expression:
    """A torch function as SciPy calls it, in the fewest steps: arrays become views, numbers stay numbers, no graph is kept."""
    view, array = torch.from_numpy, np.ndarray

    @torch.no_grad()
    def of(*args: Any) -> Any:
        found = function(*[view(a) if isinstance(a, array) else a for a in args])
        return found.numpy() if found.dim() else found.item()

    return of


def _at_last_point(compute: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], Any]:
    """What was computed at the last point, as an expert keeps it for callbacks that share work."""
    kept: list[Any] = [None, None]

    def of(x: np.ndarray) -> Any:
        if kept[0] is None or not np.array_equal(kept[0], x):
            kept[:] = x.copy(), compute(x)
        return kept[1]

    return of


@dataclass(frozen=True)
class Problem:
    """A problem for a solver.

    Attributes:
        title: what it is.
        function: the torch function.
        start: the first point.
        solve: solves it with chainrule.scipy's derivatives.
        by_torch: the same with torch.func's, by name.
        by_differences: the same with finite differences.
        tolerance: how far the optima may be apart, relative to the largest unknown.
        by_value: whether the objective is compared, where the optimum is not one point.
        large: whether the finite differences take too long for a quick run.
    """

    title: str
    function: Expression
    start: np.ndarray
    solve: Callable[[Expression, np.ndarray], Any]
    by_torch: Mapping[str, Callable[[Expression, np.ndarray], Any]]
    by_differences: Mapping[str, Callable[[Expression, np.ndarray], Any]]
    tolerance: float
    by_value: bool = False
    large: bool = False


def _optimum(found: Any, *, by_value: bool) -> Tensor:
    if found.status < 0:
        raise ArithmeticError(f"the solver failed: {found.message}")
    return torch.from_numpy(np.array([found.fun] if by_value else found.x))


def row(key: str, problem: Problem) -> Workload:
    """C5."""

    def expression(way: Callable[[Expression, np.ndarray], Any]) -> Expression:
        return lambda start: _optimum(way(problem.function, start.numpy()), by_value=problem.by_value)

    def account(start: Tensor) -> Mapping[str, str]:
        ways = {"chainrule": problem.solve, **problem.by_torch, **problem.by_differences}
        found = {}
        for name, way in ways.items():
            counted = Counted(problem.function)
            result = way(counted, start.numpy())
            value = result.cost if hasattr(result, "cost") else result.fun
            found[name] = f"{counted.runs} runs of the function, {result.nfev} evaluations, objective {value:.9g}"
        return found

    return Workload(
        key=key,
        title=problem.title,
        inputs=lambda: (torch.from_numpy(problem.start),),
        ours={"chainrule.scipy": expression(problem.solve)},
        peers={name: expression(way) for name, way in problem.by_torch.items()},
        targets=Targets(1 if problem.by_torch else None, differences_eager=1),
        dtype=torch.float64,
        tolerance=problem.tolerance,
        differences={name: expression(way) for name, way in problem.by_differences.items()},
        account=account,
        solve=True,
        large=problem.large,
    )


# --- Newton-CG ------------------------------------------------------------------------------------------------------


def newton_cg(**options: Any) -> dict[str, Any]:
    """The three ways to drive Newton-CG."""

    def ours(function: Expression, start: np.ndarray) -> Any:
        return chainrule.scipy.minimize(function, start, method="Newton-CG", options=options)

    def by_torch(order: str) -> Callable[[Expression, np.ndarray], Any]:
        def solve(function: Expression, start: np.ndarray) -> Any:
            both = tf.grad_and_value(function)
            gradient = tf.grad(function)
            at = _at_last_point(lambda x: tuple(part.numpy() for part in both(torch.tensor(x))))

            def product(x: np.ndarray, vector: np.ndarray) -> np.ndarray:
                x, v = torch.tensor(x), torch.tensor(vector)
                return (tf.jvp(gradient, (x,), (v,))[1] if order == "jvp" else tf.vjp(gradient, x)[1](v)[0]).numpy()

            return optimize.minimize(
                lambda x: float(at(x)[1]), start, method="Newton-CG", jac=lambda x: at(x)[0], hessp=product, options=options
            )

        return solve

    def by_differences(function: Expression, start: np.ndarray) -> Any:
        value = _numpy(function)

        def gradient(x: np.ndarray) -> np.ndarray:
            return approx_derivative(value, x, method="3-point")

        # Without products SciPy takes differences of the gradient; the step suits what rounding leaves of central differences.
        return optimize.minimize(value, start, method="Newton-CG", jac=gradient, options={**options, "eps": 1e-4})

    return {
        "solve": ours,
        "by_torch": {"torch.func, jvp(grad)": by_torch("jvp"), "torch.func, vjp(grad)": by_torch("vjp")},
        "by_differences": {"3-point differences, and of gradients": by_differences},
    }


def logistic(samples: int, features: int) -> Problem:
    """A regularised logistic regression."""
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(samples, features, dtype=torch.float64, generator=drawn)
    truth = torch.randn(features, dtype=torch.float64, generator=drawn)
    y = torch.bernoulli(torch.sigmoid(x @ truth), generator=drawn)

    def loss(weights: Tensor) -> Tensor:
        scores = x @ weights
        return (torch.nn.functional.softplus(scores) - y * scores).sum() + 0.5 * (weights * weights).sum()

    title = f"Newton-CG: logistic regression, {samples} samples, {features} features"
    return Problem(title, loss, np.zeros(features), **newton_cg(xtol=1e-6), tolerance=1e-4)


def cluster(*sides: int) -> Problem:
    """The energy of Lennard-Jones atoms near a minimum; rotations leave it as it is."""
    lines = [torch.arange(float(side), dtype=torch.float64) for side in sides]
    places = torch.cartesian_prod(*lines) * 1.1
    first, second = torch.triu_indices(len(places), len(places), 1)

    def energy(x: Tensor) -> Tensor:
        atoms = x.view(-1, 3)
        inverse = 1 / ((atoms[first] - atoms[second]) ** 2).sum(-1) ** 3
        return 4 * (inverse * inverse - inverse).sum()

    def both(x: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.tensor(x, requires_grad=True)
        value = energy(point)
        value.backward()
        return value.item(), point.grad.numpy()

    # From the lattice, between several minima, rounding decides which one a solver finds; from near a minimum all find that.
    drawn = torch.Generator().manual_seed(0)
    apart = places + 0.03 * torch.randn(places.shape, dtype=torch.float64, generator=drawn)
    relaxed = torch.tensor(optimize.minimize(both, apart.reshape(-1).numpy(), jac=True, method="BFGS").x)
    start = relaxed + 0.05 * torch.randn(relaxed.shape, dtype=torch.float64, generator=drawn)

    title = f"Newton-CG: a Lennard-Jones cluster of {len(places)} atoms"
    ways = newton_cg(xtol=1e-6)
    return Problem(title, energy, start.numpy(), **ways, tolerance=1e-4, by_value=True, large=len(places) > 4)


# --- trust-constr ---------------------------------------------------------------------------------------------------


def _sparse_or_dense(found: Tensor, *, is_sparse: bool) -> Any:
    return sparse.csr_matrix(found.numpy()) if is_sparse else found.numpy()


def trust_constr(constraint: Expression | None, bounds: Any, **options: Any) -> dict[str, Any]:
    """The three ways to drive trust-constr; the constraint is to be zero."""
    common = {"method": "trust-constr", "bounds": bounds, "options": options}

    def ours(function: Expression, start: np.ndarray) -> Any:
        constraints = [] if constraint is None else [chainrule.scipy.nonlinear_constraint(constraint, 0, 0, layout="sparse")]
        return chainrule.scipy.minimize(function, start, layout="sparse", constraints=constraints, **common)

    def by_torch(function: Expression, start: np.ndarray) -> Any:
        both, hessian = tf.grad_and_value(function), tf.hessian(function)
        at = _at_last_point(lambda x: tuple(part.numpy() for part in both(torch.tensor(x))))
        constraints = []
        if constraint is not None:
            jacobian, curvature = tf.jacrev(constraint), tf.hessian(lambda x, v: (v * constraint(x)).sum())
            constraints = [
                optimize.NonlinearConstraint(
                    _numpy(constraint), 0, 0,
                    jac=lambda x: _sparse_or_dense(jacobian(torch.tensor(x)), is_sparse=True),
                    hess=lambda x, v: _sparse_or_dense(curvature(torch.tensor(x), torch.tensor(v)), is_sparse=True),
                )
            ]  # fmt: skip
        return optimize.minimize(
            lambda x: float(at(x)[1]), start, jac=lambda x: at(x)[0], constraints=constraints,
            hess=lambda x: _sparse_or_dense(hessian(torch.tensor(x)), is_sparse=True), **common,
        )  # fmt: skip

    def by_differences(method: str) -> Callable[[Expression, np.ndarray], Any]:
        def solve(function: Expression, start: np.ndarray) -> Any:
            constraints = []
            if constraint is not None:
                constraints = [optimize.NonlinearConstraint(_numpy(constraint), 0, 0, jac=method, hess=optimize.BFGS())]
            return optimize.minimize(
                _numpy(function), start, jac=method, hess=optimize.BFGS(), constraints=constraints, **common
            )

        return solve

    return {
        "solve": ours,
        "by_torch": {"torch.func, hessian and jacrev": by_torch},
        "by_differences": {f"{method} differences, BFGS": by_differences(method) for method in ("2-point", "3-point")},
    }


def membrane(side: int) -> Problem:
    """The surface of least area over a square with a given edge, above an obstacle."""
    line = torch.linspace(0, 1, side + 2, dtype=torch.float64)
    edge = torch.sin(np.pi * line)[:, None] * (2 * line - 1)[None, :] ** 2
    centre = ((line[1:-1, None] - 0.5).abs() < 0.2) & ((line[None, 1:-1] - 0.5).abs() < 0.2)
    obstacle = torch.where(centre, 0.6, -np.inf).reshape(-1).numpy()

    def area(x: Tensor) -> Tensor:
        inner = torch.cat([edge[1:-1, :1], x.view(side, side), edge[1:-1, -1:]], 1)
        z = torch.cat([edge[:1], inner, edge[-1:]])
        down, right = z[1:, :-1] - z[:-1, :-1], z[:-1, 1:] - z[:-1, :-1]
        up, left = z[1:, 1:] - z[:-1, 1:], z[1:, 1:] - z[1:, :-1]
        squared = (side + 1) ** 2
        return ((1 + squared * (down**2 + right**2)).sqrt() + (1 + squared * (up**2 + left**2)).sqrt()).sum() / (2 * squared)

    bounds = optimize.Bounds(obstacle, np.inf)
    ways = trust_constr(None, bounds, gtol=1e-7, xtol=1e-9, maxiter=3000)
    title = f"trust-constr: least area over an obstacle, {side}×{side}, sparse Hessian"
    return Problem(title, area, np.full(side * side, 0.7), **ways, tolerance=1e-3, large=side > 4)


def trajectory(knots: int) -> Problem:
    """A vehicle with quadratic drag is driven a distance in a time with least effort; the trapezoidal rule is the constraint."""
    step = 2.0 / (knots - 1)
    ends = torch.tensor([[0.0, 0.0], [3.0, 0.0]], dtype=torch.float64)

    def effort(x: Tensor) -> Tensor:
        force = x.view(knots, 3)[:, 2]
        return step * 0.5 * (force[1:] ** 2 + force[:-1] ** 2).sum()

    def defects(x: Tensor) -> Tensor:
        path = x.view(knots, 3)
        states, force = path[:, :2], path[:, 2]
        slopes = torch.stack([states[:, 1], force - 0.4 * states[:, 1] ** 2], 1)
        rule = states[1:] - states[:-1] - 0.5 * step * (slopes[1:] + slopes[:-1])
        return torch.cat([rule.reshape(-1), (states[0] - ends[0]), (states[-1] - ends[1])])

    start = np.stack([np.linspace(0, 3, knots), np.full(knots, 1.5), np.ones(knots)], 1).reshape(-1)
    title = f"trust-constr: a vehicle driven with least effort, {knots} knots, sparse constraints and Hessians"
    ways = trust_constr(defects, None, gtol=1e-6, xtol=1e-8, maxiter=2000)
    return Problem(title, effort, start, **ways, tolerance=1e-3)


# --- least_squares --------------------------------------------------------------------------------------------------


def least_squares(structure: Any = None, **options: Any) -> dict[str, Any]:
    """The three ways to drive least_squares; with a structure the Jacobian is sparse."""
    layout = "dense" if structure is None else "sparse"

    def ours(function: Expression, start: np.ndarray) -> Any:
        return chainrule.scipy.least_squares(function, start, layout=layout, **options)

    def by_torch(mode: Callable[[Expression], Expression]) -> Callable[[Expression, np.ndarray], Any]:
        def solve(function: Expression, start: np.ndarray) -> Any:
            jacobian = mode(function)

            def derivative(x: np.ndarray) -> Any:
                return _sparse_or_dense(jacobian(torch.tensor(x)), is_sparse=structure is not None)

            return optimize.least_squares(_numpy(function), start, jac=derivative, **options)

        return solve

    def by_differences(function: Expression, start: np.ndarray) -> Any:
        return optimize.least_squares(_numpy(function), start, jac_sparsity=structure, **options)

    return {
        "solve": ours,
        "by_torch": {"torch.func, jacfwd": by_torch(tf.jacfwd), "torch.func, jacrev": by_torch(tf.jacrev)},
        "by_differences": {"2-point differences": by_differences},
    }


def spectrum(peaks: int, samples: int) -> Problem:
    """Gaussian peaks over a slope, fitted to noisy samples."""
    place = torch.linspace(0, 10, samples, dtype=torch.float64)
    centres = torch.linspace(1.5, 8.5, peaks, dtype=torch.float64)
    truth = torch.cat([torch.full((peaks,), 2.0), centres, torch.full((peaks,), 0.5), torch.tensor([0.3, 0.05])]).double()

    def model(x: Tensor) -> Tensor:
        heights, middles, widths = x[:-2].view(3, peaks, 1)
        return (heights * torch.exp(-(((place - middles) / widths) ** 2))).sum(0) + x[-2] + x[-1] * place

    drawn = torch.Generator().manual_seed(0)
    measured = model(truth) + 0.05 * torch.randn(samples, dtype=torch.float64, generator=drawn)
    start = truth * (1 + 0.1 * torch.randn(truth.shape, dtype=torch.float64, generator=drawn))
    title = f"least_squares: {peaks} peaks of a spectrum, {samples} samples"
    ways = least_squares(xtol=1e-10, ftol=1e-10)
    return Problem(title, lambda x: model(x) - measured, start.numpy(), **ways, tolerance=1e-5)


def broyden(size: int) -> Problem:
    """Broyden's tridiagonal system, the sparse example of SciPy's documentation."""

    def residuals(x: Tensor) -> Tensor:
        ends = x.new_zeros(1)
        return (3 - x) * x + 1 - torch.cat([ends, x[:-1]]) - 2 * torch.cat([x[1:], ends])

    structure = sparse.diags_array([1.0, 1.0, 1.0], offsets=[-1, 0, 1], shape=(size, size)).tolil()
    title = f"least_squares: Broyden's tridiagonal system, n={size}, sparse Jacobian"
    return Problem(title, residuals, np.full(size, -1.0), **least_squares(structure, tr_solver="lsmr"), tolerance=1e-4)


# --- small problems: what a call costs decides -----------------------------------------------------------------------


def small(solve: Callable[..., Any], by_scipy: Callable[..., Any]) -> dict[str, Any]:
    """Two ways to drive a solver: exact derivatives, and SciPy's own finite differences."""
    return {"solve": solve, "by_torch": {}, "by_differences": {"2-point differences": by_scipy}}


def decay_fit(samples: int) -> Problem:
    """A model of three parameters, fitted by ``curve_fit``."""
    place = np.linspace(0, 4, samples)
    measured = 2.5 * np.exp(-1.3 * place) + 0.5 + 0.01 * np.random.default_rng(0).standard_normal(samples)

    def model(x: Tensor, amplitude: Tensor, rate: Tensor, offset: Tensor) -> Tensor:
        return amplitude * torch.exp(-rate * x) + offset

    def found(result: Any) -> Any:
        x, _, more, _, _ = result
        return optimize.OptimizeResult(x=x, nfev=more["nfev"], fun=float((more["fvec"] ** 2).sum()), status=0)

    def ours(function: Expression, start: np.ndarray) -> Any:
        return found(chainrule.scipy.curve_fit(function, place, measured, p0=start, full_output=True))

    def by_scipy(function: Expression, start: np.ndarray) -> Any:
        return found(optimize.curve_fit(_numpy(function), place, measured, p0=start, full_output=True))

    title = f"curve_fit: three parameters of a decay, {samples} samples"
    return Problem(title, model, np.ones(3), **small(ours, by_scipy), tolerance=1e-5)


def bratu(knots: int) -> Problem:
    """Bratu's boundary value problem, by ``solve_bvp``; the unknown is the state in the middle."""
    mesh = np.linspace(0, 1, knots)

    def right(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[1], -torch.exp(y[0])])

    def ends(left: Tensor, right: Tensor) -> Tensor:
        return torch.stack([left[0], right[0]])

    def found(result: Any) -> Any:
        return optimize.OptimizeResult(x=result.sol(0.5), nfev=result.niter, fun=result.rms_residuals.max(), status=result.status)

    def ours(function: Expression, start: np.ndarray) -> Any:
        return found(chainrule.scipy.solve_bvp(function, ends, mesh, start.reshape(2, knots)))

    def by_scipy(function: Expression, start: np.ndarray) -> Any:
        return found(integrate.solve_bvp(_numpy(function), _numpy(ends), mesh, start.reshape(2, knots)))

    title = f"solve_bvp: Bratu's problem, {knots} knots"
    return Problem(title, right, np.zeros(2 * knots), **small(ours, by_scipy), tolerance=1e-6)


def robertson(until: float) -> Problem:
    """Robertson's stiff kinetics, by ``solve_ivp`` with Radau's method."""

    def rates(t: Tensor, y: Tensor) -> Tensor:
        a, b, c = 0.04 * y[0], 3e7 * y[1] ** 2, 1e4 * y[1] * y[2]
        return torch.stack([-a + c, a - b - c, b])

    def found(result: Any) -> Any:
        return optimize.OptimizeResult(x=result.y[:, -1], nfev=result.nfev, fun=result.t[-1], status=result.status)

    def ours(function: Expression, start: np.ndarray) -> Any:
        return found(chainrule.scipy.solve_ivp(function, (0, until), start, method="Radau"))

    def by_scipy(function: Expression, start: np.ndarray) -> Any:
        return found(integrate.solve_ivp(_numpy(function), (0, until), start, method="Radau"))

    title = f"solve_ivp: Robertson's kinetics until {until:g}, Radau"
    # Both integrate to a relative error of 1e-3 per step.
    return Problem(title, rates, np.array([1.0, 0.0, 0.0]), **small(ours, by_scipy), tolerance=1e-3)


def chain(size: int, method: str) -> Problem:
    """The chained Rosenbrock function by a method that uses gradients."""
    common = {"method": method, "options": {"gtol": 1e-5}}

    def ours(function: Expression, start: np.ndarray) -> Any:
        return chainrule.scipy.minimize(function, start, **common)

    def by_scipy(function: Expression, start: np.ndarray) -> Any:
        return optimize.minimize(_numpy(function), start, **common)

    title = f"minimize: the Rosenbrock chain, n={size}, {method}"
    return Problem(title, rosenbrock, np.full(size, 0.5), **small(ours, by_scipy), tolerance=1e-3)


_SMALL_PROBLEMS = (decay_fit(50), bratu(5), robertson(1e3), chain(2, "L-BFGS-B"), chain(5, "BFGS"))

WORKLOADS: tuple[Workload, ...] = tuple(
    row(f"C5{letter}", problem)
    for letter, problem in zip(
        "abcdefghijk",
        (logistic(500, 10), cluster(2, 2, 2), membrane(8), trajectory(20), spectrum(4, 400), broyden(2000), *_SMALL_PROBLEMS),
        strict=True,
    )
)

#: The same rows at sizes that every test run can afford.
SMALL: tuple[Workload, ...] = tuple(
    row(f"C5{letter}", problem)
    for letter, problem in zip(
        "abcdefghijk",
        (logistic(30, 3), cluster(2, 1, 2), membrane(4), trajectory(6), spectrum(1, 30), broyden(20), *_SMALL_PROBLEMS),
        strict=True,
    )
)
