"""The Brusselator on a periodic square: a stiff system of partial differential equations, integrated implicitly.

Two chemicals react and diffuse on the unit square, with a source of the first in a disc:

    u' = 1 + u² v - 4.4 u + d ∇²u + 5 · [(x - 0.3)² + (y - 0.6)² <= 0.01]
    v' = 3.4 u - u² v + d ∇²v

On N×N cells that are 2 N² ordinary differential equations. Diffusion makes them stiff: an explicit method would need steps of
about 1 / (4 d N²) for its stability alone. An implicit step solves a nonlinear system by Newton's method instead, and
that needs the Jacobian of the right-hand side, which has 12 N² entries that are not zero among 4 N⁴.

chainrule is used for that Jacobian: ``chainrule.jacobian(right_hand_side, layout="sparse_csr")`` reads its pattern and its values
off the torch function as it is written (``torch.roll`` for the neighbours); nobody writes down the pattern, colours it, or
differentiates by hand. It feeds SciPy's sparse LU in an integrator that is written out here, and then SciPy's own integrators
by ``chainrule.scipy.solve_ivp``.

Sources: the problem is BRUSS-2D of E. Hairer, G. Wanner, *Solving Ordinary Differential Equations II*, IV.10, with d = 0.1 as
there, and the source on from the start. The method is TR-BDF2: M. Hosea, L. Shampine, *Analysis and implementation of
TR-BDF2*, Applied Numerical Mathematics 20 (1996).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy import integrate, sparse
from scipy.sparse.linalg import splu
from support import Report, main, seconds, to_scipy

import chainrule
import chainrule.scipy

DIFFUSION = 0.1


@dataclass
class Brusselator:
    """The right-hand side on ``size``×``size`` cells, of states of shape ``(2 * size**2,)``."""

    size: int

    def __post_init__(self) -> None:
        self.grid = torch.linspace(0, 1, self.size, dtype=torch.float64)
        self.source = 5.0 * ((self.grid[:, None] - 0.3) ** 2 + (self.grid - 0.6) ** 2 <= 0.01)
        self.jacobian = chainrule.jacobian(self, layout="sparse_csr")

    def start(self) -> torch.Tensor:
        bump = (self.grid * (1 - self.grid)) ** 1.5
        u, v = (22 * bump).expand(self.size, -1), (27 * bump)[:, None].expand(-1, self.size)
        return torch.stack([u, v]).reshape(-1)

    def __call__(self, state: torch.Tensor) -> torch.Tensor:
        fields = state.view(2, self.size, self.size)
        neighbours = fields.roll(1, 1) + fields.roll(-1, 1) + fields.roll(1, 2) + fields.roll(-1, 2)
        u, v = fields[0], fields[1]
        reacting = u * u * v
        reaction = torch.stack([1 + reacting - 4.4 * u + self.source, 3.4 * u - reacting])
        return (reaction + DIFFUSION * (self.size - 1) ** 2 * (neighbours - 4 * fields)).reshape(-1)


@dataclass
class Newton:
    """Solves ``z - known - c f(z) = 0``, the equation of an implicit stage, with one factorised matrix ``1 - c J``."""

    function: Brusselator
    factorisations: int = 0
    iterations: int = 0
    _factorised: object = field(default=None, repr=False)

    def linearise(self, point: torch.Tensor, c: float) -> None:
        """Factorise the matrix at a point."""
        matrix = sparse.identity(len(point), format="csc") - c * to_scipy(self.function.jacobian(point)).tocsc()
        # The pattern is symmetric (a neighbour has me as its neighbour), which this ordering is made for.
        self._factorised = splu(matrix, permc_spec="MMD_AT_PLUS_A")
        self.factorisations += 1

    def linear_solve(self, right: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._factorised.solve(right.numpy()))

    def errors(self, known: torch.Tensor, guess: torch.Tensor, c: float, limit: int, *, fresh: bool) -> Iterator[tuple]:
        """The iterates and the sizes of their updates; ``fresh`` factorises anew in each, which is Newton's own method."""
        for _ in range(limit):
            if fresh:
                self.linearise(guess, c)
            update = self.linear_solve(known + c * self.function(guess) - guess)
            guess = guess + update
            self.iterations += 1
            yield guess, float(update.abs().max())

    def solve(self, known: torch.Tensor, guess: torch.Tensor, c: float, tolerance: float) -> torch.Tensor | None:
        """The stage, with the matrix that there is (simplified Newton); None where it does not converge in 8 iterations."""
        before = math.inf
        for found, change in self.errors(known, guess, c, 8, fresh=False):
            if change < tolerance:
                return found
            if not change < 2 * before:
                return None
            before = change
        return None


class TrBdf2:
    """The trapezoidal rule to ``t + γ h``, then the second backward differentiation formula to ``t + h``.

    Second order, L-stable; both stages have the same matrix. A third-order combination of the stages gives the error.
    """

    GAMMA = 2 - math.sqrt(2)
    DIAGONAL = GAMMA / 2
    WEIGHT = math.sqrt(2) / 4
    ERROR = ((1 - WEIGHT) / 3 - WEIGHT, (3 * WEIGHT + 1) / 3 - WEIGHT, DIAGONAL / 3 - DIAGONAL)

    def __init__(self, function: Brusselator) -> None:
        self.function, self.newton = function, Newton(function)
        self.steps = self.rejected = 0

    def step(self, state: torch.Tensor, h: float, tolerance: float) -> tuple[torch.Tensor, float] | None:
        """The next state and an estimate of its error; None where Newton's method does not converge."""
        c, newton = self.DIAGONAL * h, self.newton
        newton.linearise(state, c)
        slope = self.function(state)
        middle = newton.solve(state + c * slope, state + self.GAMMA * h * slope, c, tolerance)
        if middle is None:
            middle = newton.solve(state + c * slope, state, c, tolerance)
        if middle is None:
            return None
        middle_slope = (middle - state) / c - slope
        known = state + self.WEIGHT * h * (slope + middle_slope)
        end = newton.solve(known, middle, c, tolerance)
        if end is None:
            return None
        slopes = (slope, middle_slope, (end - known) / c)
        raw = h * sum(weight * s for weight, s in zip(self.ERROR, slopes, strict=True))
        # Solving with the matrix once more keeps the estimate bounded in the stiff directions (Hosea and Shampine).
        return end, float(newton.linear_solve(raw).abs().max())

    def fixed(self, state: torch.Tensor, until: float, steps: int) -> torch.Tensor:
        """``steps`` equal steps."""
        for _ in range(steps):
            state = self.step(state, until / steps, 1e-11)[0]
        return state

    def adaptive(self, state: torch.Tensor, times: list[float], tolerance: float) -> list[torch.Tensor]:
        """The states at some times, in steps whose estimated error is below ``tolerance`` in every cell."""
        t, h, found = 0.0, 1e-4, []
        for until in times:
            while until - t > 1e-12:
                last = h >= until - t
                tried = min(h, until - t)
                result = self.step(state, tried, 0.01 * tolerance)
                if result is None or result[1] > tolerance:
                    self.rejected += 1
                    h = 0.25 * tried if result is None else tried * max(0.2, 0.9 * (tolerance / result[1]) ** (1 / 3))
                    continue
                state, t = result[0], until if last else t + tried
                self.steps += 1
                wanted = tried * min(3.0, 0.9 * (tolerance / max(result[1], 1e-300)) ** (1 / 3))
                h = max(h, wanted) if last else wanted
            found.append(state)
        return found


def by_hand(size: int) -> tuple:
    """The right-hand side in numpy and the pattern of its Jacobian, written down by hand: what chainrule spares a user."""
    index = np.arange(size * size).reshape(size, size)
    ring = [index] + [np.roll(index, shift, axis) for shift in (1, -1) for axis in (0, 1)]
    rows, columns = np.tile(index.ravel(), 5), np.concatenate([r.ravel() for r in ring])
    stencil = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(size**2, size**2))
    pattern = sparse.block_array([[stencil, sparse.identity(size**2)], [sparse.identity(size**2), stencil]]).tocsr()
    laplacian = DIFFUSION * (size - 1) ** 2 * (stencil - 5 * sparse.identity(size**2)).tocsr()
    grid = np.linspace(0, 1, size)
    source = 5.0 * ((grid[:, None] - 0.3) ** 2 + (grid - 0.6) ** 2 <= 0.01).ravel()

    def right_hand_side(t: float, state: np.ndarray) -> np.ndarray:
        u, v = state[: size**2], state[size**2 :]
        first = 1 + u * u * v - 4.4 * u + source + laplacian @ u
        return np.concatenate([first, 3.4 * u - u * u * v + laplacian @ v])

    return right_hand_side, pattern


def check_jacobian(report: Report, function: Brusselator, state: torch.Tensor) -> None:
    """Its entries against the pattern by hand, its products against finite differences, its cost."""
    jacobian, n = function.jacobian(state), len(state)
    report.say(f"{n} unknowns; Jacobian: {jacobian.values().numel()} non-zeros, {n * n} entries if dense")
    places = to_scipy(jacobian)
    places.data = np.ones_like(places.data)  # u² is an entry where u is zero, too
    differing = places != (by_hand(function.size)[1] != 0).astype(float)
    report.check("entries in which the pattern differs from the one by hand", differing.nnz, below=1)
    worst = 0.0
    for _ in range(5):
        direction = torch.randn(n, dtype=torch.float64)
        # The function is a cubic: a central difference errs by its third derivative, h² · O(1), and by rounding, ε / h · |f|.
        h = 1e-5
        difference = (function(state + h * direction) - function(state - h * direction)) / (2 * h)
        worst = max(worst, float((jacobian @ direction - difference).norm() / difference.norm()))
    report.check("Jacobian times a vector, against finite differences (relative)", worst, below=1e-8)
    costs = [min(seconds(lambda call=call: call(state)) for _ in range(5)) for call in (function.jacobian, function)]
    report.say(f"one Jacobian: {1e3 * costs[0]:.2f} ms; one right-hand side: {1e3 * costs[1]:.2f} ms")


def check_newton(report: Report, function: Brusselator, state: torch.Tensor) -> None:
    """Newton's method on one large implicit Euler step: every update is about the square of the one before."""
    h = 0.3
    sizes = [size for _, size in Newton(function).errors(state, state, h, 8, fresh=True)]
    report.say("updates of Newton's method: " + ", ".join(f"{size:.1e}" for size in sizes))
    useful = [size for size in sizes if size > 1e-13]  # behind that there is only rounding
    order = math.log(useful[-1] / useful[-2]) / math.log(useful[-2] / useful[-3])
    report.check("order of convergence of Newton's method, distance from 2", abs(order - 2), below=0.4)
    report.check("last update", sizes[-1], below=1e-12)


def check_order(report: Report, function: Brusselator, state: torch.Tensor) -> None:
    """The error of fixed steps falls with the square of the step."""
    interval = 0.2
    right, pattern = by_hand(function.size)
    exact = integrate.solve_ivp(
        right, (0, interval), state.numpy(), method="Radau", jac_sparsity=pattern, rtol=1e-10, atol=1e-10, t_eval=[interval]
    ).y[:, 0]
    method = TrBdf2(function)
    errors = [float(np.abs(method.fixed(state, interval, steps).numpy() - exact).max()) for steps in (8, 16, 32)]
    report.say("errors with 8, 16, 32 steps: " + ", ".join(f"{e:.2e}" for e in errors))
    order = math.log2(errors[-2] / errors[-1])
    report.check("order of convergence of TR-BDF2, distance from 2", abs(order - 2), below=0.15)


def draw(report: Report, size: int, times: list[float], states: list[torch.Tensor]) -> None:
    import matplotlib.pyplot as plt  # noqa: PLC0415 - needed for the picture alone

    figure, axes = plt.subplots(2, len(times), figsize=(2.6 * len(times), 5.4), layout="constrained", squeeze=False)
    for row, name in enumerate("uv"):
        fields = [state.view(2, size, size)[row] for state in states]
        low, high = min(f.min().item() for f in fields), max(f.max().item() for f in fields)
        for axis, t, shown in zip(axes[row], times, fields, strict=True):
            image = axis.imshow(shown.T, origin="lower", extent=(0, 1, 0, 1), vmin=low, vmax=high, cmap="viridis")
            axis.set(title=f"{name}, t = {t:g}", xticks=[], yticks=[])
        figure.colorbar(image, ax=axes[row].tolist(), shrink=0.9)
    figure.suptitle(f"Brusselator on {size}×{size} cells")
    report.save(figure)


def example(report: Report) -> None:
    size, times = (16, [0.0, 0.5, 1.0, 2.0]) if report.small else (48, [0.0, 0.5, 1.0, 2.0, 4.0, 6.0])
    function = Brusselator(size)
    start = function.start()
    check_jacobian(report, function, start)
    check_newton(report, function, start)
    check_order(report, function, start)

    tolerance = 1e-4
    method = TrBdf2(function)
    states: list[torch.Tensor] = []
    spent = seconds(lambda: states.extend(method.adaptive(start, times[1:], tolerance)))
    newton = method.newton
    report.say(
        f"TR-BDF2 to t = {times[-1]:g}: {method.steps} steps ({method.rejected} rejected), {newton.factorisations} "
        f"factorisations, {newton.iterations} Newton iterations, {spent:.1f} s"
    )
    explicit = 8 * DIFFUSION * (size - 1) ** 2 * times[-1] / 2.785
    report.say(f"(an explicit method of fourth order needs {explicit:.0f} steps to be stable)")
    report.check("steps, beside those that an explicit method needs", method.steps / explicit, below=1 if report.small else 0.2)

    right, pattern = by_hand(size)
    options = {"method": "BDF", "t_eval": times[1:], "rtol": 1e-8, "atol": 1e-8}
    reference = integrate.solve_ivp(right, (0, times[-1]), start.numpy(), jac_sparsity=pattern, **options)
    worst = max(float(np.abs(s.numpy() - r).max()) for s, r in zip(states, reference.y.T, strict=True))
    # Errors of single steps add up, and grow where the reaction is unstable; they stay a modest multiple of one.
    report.check("TR-BDF2 against SciPy's BDF with finite differences", worst, below=100 * tolerance)

    exact = chainrule.scipy.solve_ivp(lambda t, y: function(y), (0, times[-1]), start.numpy(), layout="sparse", **options)
    distance = float(np.abs(exact.y - reference.y).max())
    report.check("SciPy's BDF with chainrule's Jacobian, against that with finite differences", distance, below=1e-5)
    report.say(f"right-hand sides evaluated: {exact.nfev} with chainrule's Jacobian, {reference.nfev} + differences without")

    draw(report, size, times, [start, *states])


if __name__ == "__main__":
    sys.exit(main(example, __doc__))
