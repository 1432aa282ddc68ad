"""Swinging up a cart-pole with a bounded force: optimal control by direct collocation.

A cart on a rail carries a pole that hangs down. Which force on the cart, of at most 11 N, has the pole standing upright, at
rest and one metre to the right, after two seconds, with the least effort ∫ u² dt? Direct collocation makes states and forces at
the ends and in the middle of each interval the unknowns of one nonlinear program, and demands that a cubic through the states
obeys the equations of motion (Hermite-Simpson). Each interval knows only its neighbours, so all derivatives are sparse.

chainrule is used for all of them: ``chainrule.scipy.nlp_problem`` takes the objective and the constraints as torch functions
and gives the gradient, the sparse Jacobian of the constraints and the sparse Hessian of the Lagrangian with their patterns, in
the form that cyipopt takes. The solver is written out: a primal-dual interior-point method, whose every step is one sparse
linear system. ``chainrule.scipy.minimize`` with SciPy's SLSQP has to find the same minimum of a coarse program.

Sources: problem and collocation: M. Kelly, *An introduction to trajectory optimization*, SIAM Review 59 (2017); interior point:
J. Nocedal, S. Wright, *Numerical Optimization*, chapter 19.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch
from scipy import integrate, sparse
from scipy.optimize import Bounds
from scipy.sparse.linalg import splu
from support import Report, main, seconds

import chainrule.scipy

CART, POLE, LENGTH, GRAVITY = 1.0, 0.3, 0.5, 9.81  # kg, kg, m, m/s²
DURATION, DISTANCE, FORCE, RAIL = 2.0, 1.0, 11.0, 2.0  # s, m, N, m
TARGET = np.array([DISTANCE, np.pi, 0.0, 0.0])


def motion(state: torch.Tensor, force: torch.Tensor) -> torch.Tensor:
    """The derivative of position, angle and their velocities. Shapes (n, 4) and (n,)."""
    _, angle, speed, turning = state.unbind(-1)
    sine, cosine = angle.sin(), angle.cos()
    heavy = CART + POLE * sine**2
    pull = LENGTH * POLE * sine * turning**2
    acceleration = (pull + force + POLE * GRAVITY * cosine * sine) / heavy
    angular = -(pull * cosine + force * cosine + (CART + POLE) * GRAVITY * sine) / (LENGTH * heavy)
    return torch.stack([speed, turning, acceleration, angular], -1)


@dataclass(frozen=True)
class Collocation:
    """The nonlinear program on so many intervals.

    Its unknowns are the states at the ends of the intervals, then the forces there and in the middle.
    """

    intervals: int

    @property
    def step(self) -> float:
        return DURATION / self.intervals

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States, (intervals + 1, 4), and forces, (2 * intervals + 1,)."""
        ends = 4 * (self.intervals + 1)
        return x[:ends].view(-1, 4), x[ends:]

    def effort(self, x: torch.Tensor) -> torch.Tensor:
        """∫ u² dt by Simpson's rule."""
        force = self.split(x)[1]
        return self.step / 6 * (force[:-1:2] ** 2 + 4 * force[1::2] ** 2 + force[2::2] ** 2).sum()

    def defects(self, x: torch.Tensor) -> torch.Tensor:
        """What has to vanish: the equations of motion in each interval, the start and the target."""
        states, force = self.split(x)
        slope = motion(states, force[::2])
        before, after = states[:-1], states[1:]
        middle = (before + after) / 2 + self.step / 8 * (slope[:-1] - slope[1:])
        simpson = self.step / 6 * (slope[:-1] + 4 * motion(middle, force[1::2]) + slope[1:])
        return torch.cat([(after - before - simpson).reshape(-1), states[0], states[-1] - torch.from_numpy(TARGET)])

    def start(self) -> np.ndarray:
        """A straight line from start to target, without force."""
        line = np.linspace(0, 1, self.intervals + 1)[:, None] * TARGET
        return np.concatenate([line.ravel(), np.zeros(2 * self.intervals + 1)])

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        free = np.tile([RAIL, np.inf, np.inf, np.inf], self.intervals + 1)
        upper = np.concatenate([free, np.full(2 * self.intervals + 1, FORCE)])
        return -upper, upper


@dataclass
class Point:
    """An iterate: unknowns, multipliers of the constraints, and of the lower and the upper bounds."""

    x: np.ndarray
    multipliers: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


def is_positive(matrix: sparse.csr_array) -> bool:
    """Whether a symmetric matrix is positive definite: elimination along its diagonal meets positive pivots alone.

    With a large multiple of JᵀJ added to it, a Hessian is positive definite if it is so where J vanishes (Debreu's lemma).
    """
    options = {"SymmetricMode": True}
    factors = splu(matrix.tocsc(), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options)
    return bool((factors.U.diagonal() > 0).all())


class InteriorPoint:
    """minimise f(x) where c(x) = 0 and lower <= x <= upper, for a problem with cyipopt's methods.

    The bounds become a barrier, μ times the logarithms of the distances. Newton's method on the optimality conditions
    is a step of one symmetric sparse system; the step is shortened to stay inside the bounds, and until it lowers an exact
    penalty function.
    """

    def __init__(self, problem: chainrule.scipy.NLPProblem, lower: np.ndarray, upper: np.ndarray) -> None:
        self.problem, self.lower, self.upper = problem, lower, upper
        self.has_lower, self.has_upper = np.isfinite(lower), np.isfinite(upper)
        self.iterations, self.shift, self.penalty = 0, 0.0, 1.0

    def jacobian(self, x: np.ndarray) -> sparse.csr_array:
        places = self.problem.jacobianstructure()
        return sparse.csr_array((self.problem.jacobian(x), places), shape=(self.problem.m, self.problem.n))

    def hessian(self, point: Point) -> sparse.csr_array:
        places = self.problem.hessianstructure()
        shape = (self.problem.n, self.problem.n)
        triangle = sparse.csr_array((self.problem.hessian(point.x, point.multipliers, 1.0), places), shape=shape)
        return triangle + sparse.tril(triangle, -1).T

    def gaps(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distances to the bounds; one where there is none."""
        return np.where(self.has_lower, x - self.lower, 1.0), np.where(self.has_upper, self.upper - x, 1.0)

    def residual(self, point: Point, barrier: float = 0.0) -> float:
        """The largest violation of the optimality conditions (Karush, Kuhn and Tucker)."""
        stationary = self.problem.gradient(point.x) + self.jacobian(point.x).T @ point.multipliers - point.lower + point.upper
        near = [g * m - barrier * h for g, m, h in zip(
            self.gaps(point.x), (point.lower, point.upper), (self.has_lower, self.has_upper), strict=True)]
        return max(np.abs(part).max() for part in (stationary, self.problem.constraints(point.x), *near))

    def barrier_value(self, x: np.ndarray, barrier: float) -> float:
        return self.problem.objective(x) - barrier * sum(np.log(gap).sum() for gap in self.gaps(x))

    def slope(self, x: np.ndarray, barrier: float) -> np.ndarray:
        below, above = self.gaps(x)
        return self.problem.gradient(x) - barrier * (self.has_lower / below - self.has_upper / above)

    def curvature(self, point: Point) -> sparse.csr_array:
        """The Hessian of the Lagrangian and that of the barrier."""
        below, above = self.gaps(point.x)
        return self.hessian(point) + sparse.diags_array(point.lower / below + point.upper / above)

    def direction(self, point: Point, barrier: float) -> tuple[np.ndarray, np.ndarray]:
        """The step of the unknowns and the new multipliers of the constraints.

        Where the curvature along the constraints is not positive the step could lead to a saddle, and the Hessian is shifted.
        """
        problem, jacobian, curvature = self.problem, self.jacobian(point.x), self.curvature(point)
        shift = self.shift / 3 if self.shift > 1e-5 else 0.0
        while not is_positive(curvature + shift * sparse.identity(problem.n) + 1e6 * jacobian.T @ jacobian):
            shift = max(1e-4, 4 * shift)
        self.shift = shift
        matrix = sparse.block_array([[curvature + shift * sparse.identity(problem.n), jacobian.T], [jacobian, None]])
        right = -np.concatenate([self.slope(point.x, barrier), problem.constraints(point.x)])
        found = splu(matrix.tocsc()).solve(right)
        return found[: problem.n], found[problem.n :]

    def longest(self, point: Point, step: np.ndarray) -> float:
        """How much of the step leaves at least a small part of the distance to each bound."""
        below, above = self.gaps(point.x)
        ratios = [0.995 * g[c] / -s[c] for g, s, has in ((below, step, self.has_lower), (above, -step, self.has_upper))
                  for c in (has & (s < 0),)]
        return min(1.0, *(part.min(initial=1.0) for part in ratios))

    def advance(self, point: Point, barrier: float) -> Point:
        """One step with a line search on the barrier problem's exact penalty function."""
        step, multipliers = self.direction(point, barrier)
        below, above = self.gaps(point.x)
        lower = np.where(self.has_lower, barrier / below - point.lower / below * step, 0.0)
        upper = np.where(self.has_upper, barrier / above + point.upper / above * step, 0.0)
        self.penalty = max(self.penalty, 1.5 * np.abs(multipliers).max())
        violation = np.abs(self.problem.constraints(point.x)).sum()
        expected = self.slope(point.x, barrier) @ step - self.penalty * violation
        before = self.barrier_value(point.x, barrier) + self.penalty * violation
        length = self.longest(point, step)
        for _ in range(30):
            x = point.x + length * step
            value = self.barrier_value(x, barrier) + self.penalty * np.abs(self.problem.constraints(x)).sum()
            if value <= before + 1e-4 * length * expected + 1e-12 * abs(before):
                break
            length /= 2
        near = self.gaps(x)
        sides = (self.has_lower, point.lower, lower, near[0]), (self.has_upper, point.upper, upper, near[1])
        dual = [
            np.where(has, np.clip(old + length * (new - old), barrier / gap / 1e10, 1e10 * barrier / gap), 0.0)
            for has, old, new, gap in sides
        ]
        return Point(x, point.multipliers + length * (multipliers - point.multipliers), *dual)

    def solve(self, x: np.ndarray, tolerance: float) -> Point:
        """The solution, by a falling sequence of barriers."""
        barrier = 0.1
        below, above = self.gaps(x)
        point = Point(x, np.zeros(self.problem.m), barrier * self.has_lower / below, barrier * self.has_upper / above)
        while self.iterations < 300:
            if self.residual(point) < tolerance:
                break
            while self.residual(point, barrier) < 10 * barrier and barrier > tolerance / 20:
                barrier = max(tolerance / 20, min(0.2 * barrier, barrier**1.5))
                self.penalty = 1.0
            point = self.advance(point, barrier)
            self.iterations += 1
        return point


def check_derivatives(report: Report, solver: InteriorPoint, start: np.ndarray) -> None:
    """Jacobian and Hessian against central differences in a random direction, at a random point; how sparse they are."""
    problem, random = solver.problem, np.random.default_rng(0)
    x = start + 0.3 * random.standard_normal(problem.n)
    multipliers, direction = random.standard_normal(problem.m), random.standard_normal(problem.n)
    point, h = Point(x, multipliers, x, x), 1e-5

    def slope(x: np.ndarray) -> np.ndarray:
        return problem.gradient(x) + solver.jacobian(x).T @ multipliers

    matrices = {
        "Jacobian of the constraints": (solver.jacobian(x), problem.constraints),
        "Hessian of the Lagrangian": (solver.hessian(point), slope),
    }
    # A central difference errs by h² times a third derivative of order one to a hundred, and by rounding of 1e-16 / h.
    for name, (exact, function) in matrices.items():
        difference = (function(x + h * direction) - function(x - h * direction)) / (2 * h)
        error = np.linalg.norm(exact @ direction - difference) / np.linalg.norm(difference)
        report.check(f"{name}, against finite differences (relative)", error, below=1e-7)
        rows, columns = exact.shape
        report.say(f"    {rows}×{columns}: {exact.nnz} non-zeros, {exact.nnz / rows / columns:.2%}")


def least_curvature(solver: InteriorPoint, point: Point) -> float:
    """The smallest eigenvalue of the barrier problem's Hessian along the constraints; positive at a strict minimum."""
    _, _, basis = np.linalg.svd(solver.jacobian(point.x).toarray())
    along = basis[solver.problem.m :].T
    return float(np.linalg.eigvalsh(along.T @ solver.curvature(point) @ along)[0])


def check_against_slsqp(report: Report, program: Collocation, effort: float) -> None:
    """SciPy's SLSQP, with chainrule's gradients and no second derivatives, must not find less effort."""
    constraint = chainrule.scipy.nonlinear_constraint(program.defects, 0.0, 0.0)
    found = chainrule.scipy.minimize(
        program.effort, program.start(), method="SLSQP", constraints=constraint, bounds=Bounds(*program.bounds()),
        options={"maxiter": 300, "ftol": 1e-10},
    )  # fmt: skip
    report.say(f"{program.intervals} intervals: SLSQP {found.nit} iterations, effort {found.fun:.6f}, here {effort:.6f}")
    report.check("violation of the constraints by SLSQP's solution", np.abs(constraint.fun(found.x)).max(), below=1e-7)
    report.check("effort above that of SLSQP (relative)", effort / found.fun - 1, below=1e-6)


def between(force: np.ndarray) -> np.ndarray:
    """The quadratics through three forces per interval, at 21 places of each."""
    place = np.linspace(0, 1, 21)
    shapes = np.stack([(1 - place) * (1 - 2 * place), 4 * place * (1 - place), place * (2 * place - 1)])
    return np.stack([force[:-1:2], force[1::2], force[2::2]], 1) @ shapes


def simulate(program: Collocation, x: np.ndarray) -> integrate.OdeSolution:
    """The motion under the forces that were found, by SciPy's integrator: quadratics through three forces per interval."""
    force = x[4 * (program.intervals + 1) :]

    def current(t: float) -> float:
        number = min(int(t / program.step), program.intervals - 1)
        s = t / program.step - number
        left, middle, right = force[2 * number : 2 * number + 3]
        return left * (1 - s) * (1 - 2 * s) + 4 * middle * s * (1 - s) + right * s * (2 * s - 1)

    def slope(t: float, y: np.ndarray) -> np.ndarray:
        """Newton's second law as two equations for two accelerations, where the program has them solved by hand."""
        mass = np.array([[CART + POLE, POLE * LENGTH * np.cos(y[1])], [np.cos(y[1]), LENGTH]])
        load = np.array([current(t) + POLE * LENGTH * y[3] ** 2 * np.sin(y[1]), -GRAVITY * np.sin(y[1])])
        return np.concatenate([y[2:], np.linalg.solve(mass, load)])

    options = {"rtol": 1e-9, "atol": 1e-9, "max_step": program.step / 2, "dense_output": True}
    return integrate.solve_ivp(slope, (0, DURATION), np.zeros(4), **options).sol


def draw(report: Report, program: Collocation, x: np.ndarray, motion_of: integrate.OdeSolution) -> None:
    import matplotlib.pyplot as plt  # noqa: PLC0415 - needed for the picture alone

    figure, (above, middle, below) = plt.subplots(
        3, 1, figsize=(8, 9), layout="constrained", gridspec_kw={"height_ratios": [1.4, 1, 1]})
    moments = np.linspace(0, DURATION, 25)
    colours = plt.get_cmap("viridis")(moments / DURATION)
    for (position, angle, *_), colour in zip(motion_of(moments).T, colours, strict=True):
        above.plot([position, position + LENGTH * np.sin(angle)], [0, -LENGTH * np.cos(angle)], color=colour, lw=1.5)
        above.plot(position + LENGTH * np.sin(angle), -LENGTH * np.cos(angle), "o", color=colour)
        above.plot(position, 0, "s", color=colour, ms=9)
    above.set(title="the pole, dark to light", aspect="equal", xlabel="m")
    states = x[: 4 * (program.intervals + 1)].reshape(-1, 4)
    ends, fine = np.linspace(0, DURATION, program.intervals + 1), np.linspace(0, DURATION, 400)
    for column, name in enumerate(("position, m", "angle, rad", "speed, m/s", "turning, rad/s")):
        (line,) = middle.plot(fine, motion_of(fine)[column], label=name)
        middle.plot(ends, states[:, column], ".", color=line.get_color(), ms=4)
    middle.legend(ncols=2, fontsize="small")
    middle.set(title="collocation (dots) and the simulated motion (lines)")
    below.plot(np.linspace(0, DURATION, 2 * program.intervals + 1), x[4 * (program.intervals + 1) :], ".-")
    for limit in (-FORCE, FORCE):
        below.axhline(limit, color="grey", ls=":")
    below.set(title="force, N", xlabel="s")
    report.save(figure)


def example(report: Report) -> None:
    program = Collocation(30 if report.small else 100)
    start = program.start()
    problem = chainrule.scipy.nlp_problem(program.effort, start, program.defects)
    solver = InteriorPoint(problem, *program.bounds())
    check_derivatives(report, solver, start)

    points: list[Point] = []
    spent = seconds(lambda: points.append(solver.solve(start, 1e-8)))
    x = points[0].x
    report.say(f"interior point: {solver.iterations} iterations, {spent:.1f} s, effort {problem.objective(x):.5f} N² s")
    report.check("violation of the optimality conditions", solver.residual(points[0]), below=1e-8)
    report.check("violation of the constraints", np.abs(problem.constraints(x)).max(), below=1e-9)
    force = program.split(torch.from_numpy(x))[1].numpy()
    report.say(f"the force is at its limit in {(np.abs(force) > FORCE - 1e-4).sum()} of {force.size} places")
    # The bounds hold at the unknowns alone; the quadratics through them may swing out where the force leaves its limit.
    report.check("force beyond the limit between these places, N", np.abs(between(force)).max() - FORCE, below=0.2)
    report.check("negative curvature along the constraints (a minimum has none)", -least_curvature(solver, points[0]), below=0)

    found = simulate(program, x)
    error = np.abs(found(DURATION) - TARGET).max()
    # The error of the collocation, which the motion amplifies: upright, it is unstable.
    report.check("distance from the target in a simulation under this force", error, below=0.1 if report.small else 2e-3)

    coarse = Collocation(30)
    if coarse != program:
        problem = chainrule.scipy.nlp_problem(coarse.effort, coarse.start(), coarse.defects)
        x_coarse = InteriorPoint(problem, *coarse.bounds()).solve(coarse.start(), 1e-8).x
    else:
        x_coarse = x
    check_against_slsqp(report, coarse, problem.objective(x_coarse))
    draw(report, program, x, found)


if __name__ == "__main__":
    sys.exit(main(example, __doc__))
