"""Hares and lynxes: how the solution of a differential equation depends on its parameters, and what data say about them.

The Lotka-Volterra equations for a prey h and its predator l, h' = (α - β l) h and l' = (δ h - γ) l, are fitted to the pelts that
the Hudson's Bay Company bought from 1900 to 1920. They are solved for the logarithms of h and l by the classical Runge-Kutta
method. Unknown are the logarithms of α, β, γ, δ and of both populations in 1900.

chainrule differentiates one step of the method, at all steps together: ``vmap(jacobian(step))`` and ``vmap(hessian(step))``.
The chain rule along the trajectory is then a recursion of small matrices, which gives the sensitivities of first and
second order of the whole solution, exactly as the method computes it (Gauss and Newton fit with the first). For a few
steps, ``jvp`` and ``linear_map`` go through the loop itself and must agree.

Sources: the data: E. Odum, *Fundamentals of Ecology* (1953), as in B. Carpenter, *Predator-prey population dynamics: the
Lotka-Volterra model in Stan* (2018), whose posterior means the fit is compared with; sensitivities: E. Hairer, S. Nørsett, G.
Wanner, *Solving Ordinary Differential Equations I*, I.14.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import numpy as np
import torch
from scipy import integrate, optimize
from support import Report, main

import chainrule

# In thousands, from 1900 on.
HARES = (30, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22, 25.4, 27.1, 40.3, 57, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6, 16.2, 24.7)
LYNXES = (4, 6.1, 9.8, 35.2, 59.4, 41.7, 19, 13, 8.3, 9.1, 7.4, 8, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6)
DATA = torch.tensor([HARES, LYNXES], dtype=torch.float64).log().T
NAMES = ("α", "β", "γ", "δ", "hares in 1900", "lynxes in 1900")
#: Posterior means and standard deviations of Carpenter's Bayesian fit.
PUBLISHED = np.array([[0.55, 0.028, 0.80, 0.024, 33.96, 5.95], [0.064, 0.004, 0.091, 0.004, 2.86, 0.53]])


def slope(z: torch.Tensor, logarithms: torch.Tensor) -> torch.Tensor:
    """The derivatives of log h and log l, for the logarithms of α, β, γ, δ."""
    birth, hunting, death, feeding = logarithms.exp().unbind()
    hares, lynxes = z.exp().unbind()
    return torch.stack([birth - hunting * lynxes, feeding * hares - death])


def step(z: torch.Tensor, logarithms: torch.Tensor, h: float) -> torch.Tensor:
    """One step of the classical Runge-Kutta method."""
    one = slope(z, logarithms)
    two = slope(z + h / 2 * one, logarithms)
    three = slope(z + h / 2 * two, logarithms)
    four = slope(z + h * three, logarithms)
    return z + h / 6 * (one + 2 * two + 2 * three + four)


@dataclass(frozen=True)
class Solver:
    """Solutions over ``years``, with so many steps in each, as functions of the six unknowns."""

    per_year: int
    years: int = len(HARES) - 1

    def solution(self, unknowns: torch.Tensor) -> torch.Tensor:
        """The logarithms of both populations after each step. Shape (steps + 1, 2)."""
        states = [unknowns[4:]]
        for _ in range(self.years * self.per_year):
            states.append(step(states[-1], unknowns[:4], 1 / self.per_year))
        return torch.stack(states)

    def yearly(self, unknowns: torch.Tensor) -> torch.Tensor:
        return self.solution(unknowns)[:: self.per_year]

    def first_order(self, unknowns: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The derivatives of all states by the unknowns. Shape (steps + 1, 2, 6).

        A step z' = s(z, p) gives S' = ∂s/∂z S + ∂s/∂p, with ∂s/∂z and ∂s/∂p of all steps from one call.
        """
        of_step = chainrule.jacobian(step, argnums=(0, 1))
        by_state, by_rates = chainrule.vmap(of_step, in_dims=(0, None, None))(states[:-1], unknowns[:4], 1 / self.per_year)
        found = [torch.cat([torch.zeros(2, 4), torch.eye(2)], 1).double()]
        for a, b in zip(by_state, by_rates, strict=True):
            found.append(a @ found[-1] + torch.cat([b, b.new_zeros(2, 2)], 1))
        return torch.stack(found)

    def second_order(self, unknowns: torch.Tensor, states: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """The second derivatives of all states by the unknowns. Shape (steps + 1, 2, 6, 6).

        With W = (S; ∂p) the derivatives of what goes into a step: T' = ∂s/∂z T + Wᵀ ∂²s W.
        """
        rates, h = unknowns[:4], 1 / self.per_year
        by_state = chainrule.vmap(chainrule.jacobian(step), in_dims=(0, None, None))(states[:-1], rates, h)
        blocks = chainrule.vmap(chainrule.hessian(step, argnums=(0, 1)), in_dims=(0, None, None))(states[:-1], rates, h)
        curvature = torch.cat([torch.cat(row, -1) for row in blocks], -2)
        found = [torch.zeros(2, 6, 6).double()]
        for a, c, s in zip(by_state, curvature, first, strict=False):
            into = torch.cat([s, torch.eye(4, 6).double()])
            found.append(torch.einsum("ij,jkl->ikl", a, found[-1]) + into.T @ c @ into)
        return torch.stack(found)


def variational(unknowns: torch.Tensor) -> np.ndarray:
    """Yearly states and their derivatives by SciPy, from the variational equations, which are derived by hand here.

    S' = ∂f/∂z S + ∂f/∂p, along with z' = f. Shape (years + 1, 2, 7), the state first.
    """
    birth, hunting, death, feeding = unknowns[:4].exp().numpy()

    def right(t: float, flat: np.ndarray) -> np.ndarray:
        block = flat.reshape(2, 7)
        hares, lynxes = np.exp(block[:, 0])
        by_state = np.array([[0, -hunting * lynxes], [feeding * hares, 0]])
        derivatives = by_state @ block[:, 1:]
        derivatives[:, :4] += [[birth, -hunting * lynxes, 0, 0], [0, 0, -death, feeding * hares]]
        value = [[birth - hunting * lynxes], [feeding * hares - death]]
        return np.hstack([value, derivatives]).ravel()

    start = np.hstack([unknowns[4:, None].numpy(), np.zeros((2, 4)), np.eye(2)]).ravel()
    years = np.arange(len(HARES))
    found = integrate.solve_ivp(right, (0, years[-1]), start, method="DOP853", t_eval=years, rtol=1e-12, atol=1e-12)
    return found.y.T.reshape(-1, 2, 7)


def check_first_order(report: Report, unknowns: torch.Tensor) -> None:
    """Against the variational equations, finite differences, and derivatives through the loop."""
    exact = variational(unknowns)
    errors = []
    for per_year in (8, 16):
        solver = Solver(per_year)
        states = solver.solution(unknowns)
        first = solver.first_order(unknowns, states)[::per_year].numpy()
        errors.append(np.abs(first - exact[:, :, 1:]).max() / np.abs(exact[:, :, 1:]).max())
    report.say(f"against the variational equations, 8 and 16 steps a year: {errors[0]:.1e}, {errors[1]:.1e}")
    order = math.log2(errors[0] / errors[1])
    report.check("order of convergence of the sensitivities, distance from 4", abs(order - 4), below=0.3)

    first, direction, h = solver.first_order(unknowns, states), torch.randn(6).double(), 1e-5
    difference = (solver.solution(unknowns + h * direction) - solver.solution(unknowns - h * direction)) / (2 * h)
    error = (first @ direction - difference).norm() / difference.norm()
    # h² times a third derivative, which grows with the cube of time.
    report.check("sensitivities of the method itself, against finite differences (relative)", float(error), below=1e-6)

    short = Solver(2, years=4)
    states = short.solution(unknowns)
    first = short.first_order(unknowns, states)
    pushed = chainrule.jvp(short.solution, (unknowns,), (direction,))[1]
    report.check("jvp through the loop, against the recursion", float((pushed - first @ direction).abs().max()), below=1e-12)
    through, cotangent = chainrule.linear_map(short.solution, unknowns), torch.randn(9, 2).double()
    pulled = torch.einsum("ti,tij->j", cotangent, first)
    report.check("linear_map through the loop, transposed", float((through.T @ cotangent - pulled).abs().max()), below=1e-12)


def check_second_order(report: Report, solver: Solver, unknowns: torch.Tensor) -> None:
    """The remainder of Taylor's formula of order two falls with the cube of the change."""
    states = solver.solution(unknowns)
    first = solver.first_order(unknowns, states)
    second = solver.second_order(unknowns, states, first)
    report.check("asymmetry of the second derivatives", float((second - second.mT).abs().max() / second.abs().max()), below=1e-12)
    direction = torch.randn(6).double()
    h = 1e-5
    moved = [solver.first_order(u, solver.solution(u)) for u in (unknowns + h * direction, unknowns - h * direction)]
    difference = (moved[0] - moved[1]) / (2 * h)
    error = (second @ direction - difference).norm() / difference.norm()
    report.check("second-order sensitivities, against differences of the first (relative)", float(error), below=1e-6)
    remainders = []
    for size in (2e-3, 1e-3):
        change = size * direction
        predicted = states + first @ change + 0.5 * (second @ change) @ change
        remainders.append(float((solver.solution(unknowns + change) - predicted).abs().max()))
    order = math.log2(remainders[0] / remainders[1])
    report.check("order of the remainder of the second-order prediction, distance from 3", abs(order - 3), below=0.2)


def fit(report: Report, solver: Solver, unknowns: torch.Tensor) -> torch.Tensor:
    """Gauss-Newton steps on the logarithms of data, halved until they improve the fit."""
    cost = (solver.yearly(unknowns) - DATA).square().sum()
    for number in range(30):
        states = solver.solution(unknowns)
        jacobian = solver.first_order(unknowns, states)[:: solver.per_year].reshape(-1, 6)
        residuals = (states[:: solver.per_year] - DATA).reshape(-1)
        change = torch.linalg.lstsq(jacobian, -residuals[:, None]).solution[:, 0]
        length = 1.0
        while not (tried := (solver.yearly(unknowns + length * change) - DATA).square().sum()) <= cost and length > 1e-6:
            length /= 2
        unknowns, cost = unknowns + length * change, tried
        report.say(f"  step {number + 1}: sum of squares {float(cost):.6f}, length {length:g}")
        if change.abs().max() < 1e-8:
            break
    report.check("gradient of the fit", float((jacobian.T @ residuals).abs().max()), below=1e-6)
    return unknowns


def check_fit(report: Report, solver: Solver, unknowns: torch.Tensor, deviations: torch.Tensor) -> None:
    """The same minimum by SciPy without derivatives, and the published one."""

    def residuals(x: np.ndarray) -> np.ndarray:
        rates, years = np.exp(x[:4]), np.arange(len(HARES))

        def right(t: float, z: np.ndarray) -> list[float]:
            return [rates[0] - rates[1] * math.exp(z[1]), rates[3] * math.exp(z[0]) - rates[2]]

        found = integrate.solve_ivp(right, (0, 20), x[4:], method="DOP853", t_eval=years, rtol=1e-10, atol=1e-10)
        return (found.y.T - DATA.numpy()).ravel()

    independent = optimize.least_squares(residuals, unknowns.numpy() + 0.02, x_scale="jac", xtol=1e-10, ftol=1e-12)
    # The Runge-Kutta method errs by 1e-5 with 8 steps a year; SciPy's finite differences let it stop a little early.
    error = np.abs(independent.x - unknowns.numpy()).max()
    report.check("unknowns against SciPy's fit with finite differences", error, below=1e-3)
    values = unknowns.exp().numpy()
    for name, value, deviation, mean, spread in zip(NAMES, values, deviations.numpy(), *PUBLISHED, strict=True):
        report.say(f"  {name}: {value:.4g} ± {value * deviation:.2g} (published {mean:g} ± {spread:g})")
    distance = np.abs(values - PUBLISHED[0]) / PUBLISHED[1]
    report.check("largest distance from the published fit, in its standard deviations", distance.max(), below=1)
    ratio = np.abs(np.log(values * deviations.numpy() / PUBLISHED[1])).max()
    report.check("largest ratio of standard deviations, as a logarithm", ratio, below=math.log(1.5))


def draw(report: Report, solver: Solver, unknowns: torch.Tensor, covariance: torch.Tensor, noise: float) -> None:
    import matplotlib.pyplot as plt  # noqa: PLC0415 - needed for the picture alone

    states = solver.solution(unknowns)
    first = solver.first_order(unknowns, states)
    spread = (first @ covariance @ first.mT).diagonal(dim1=1, dim2=2).sqrt()
    years = 1900 + np.arange(len(HARES))
    fine = 1900 + np.arange(len(states)) / solver.per_year
    figure, axes = plt.subplots(3, 1, figsize=(8, 10), layout="constrained", sharex=True)
    for column, (name, colour) in enumerate((("hares", "C0"), ("lynxes", "C3"))):
        z, s = states[:, column], spread[:, column]
        axes[0].plot(years, DATA[:, column].exp(), "o", color=colour)
        axes[0].plot(fine, z.exp(), color=colour, label=name)
        axes[0].fill_between(fine, (z - 2 * s).exp(), (z + 2 * s).exp(), color=colour, alpha=0.3)
        outer = 2 * (s.square() + noise**2).sqrt()
        axes[0].fill_between(fine, (z - outer).exp(), (z + outer).exp(), color=colour, alpha=0.1)
        for number, unknown in enumerate(NAMES):
            axes[1 + column].plot(fine, first[:, column, number], label=unknown)
        axes[1 + column].set(title=f"relative change of {name}, per relative change of")
    axes[0].set(title="pelts in thousands: data, fit, two standard deviations of the fit and of an observation", ylim=(0, 140))
    axes[0].legend()
    axes[1].legend(ncols=2, fontsize="small")
    axes[2].set_xticks(years[::4])
    report.save(figure)


def example(report: Report) -> None:
    solver = Solver(8 if report.small else 32)
    report.say("Gauss-Newton:")
    guess = torch.tensor([0.5, 0.02, 1.0, 0.02, HARES[0], LYNXES[0]], dtype=torch.float64).log()
    unknowns = fit(report, solver, guess)
    jacobian = solver.first_order(unknowns, solver.solution(unknowns))[:: solver.per_year].reshape(-1, 6)
    variance = (solver.yearly(unknowns) - DATA).square().sum() / (len(jacobian) - 6)
    covariance = variance * torch.linalg.inv(jacobian.T @ jacobian)
    check_fit(report, solver, unknowns, covariance.diagonal().sqrt())
    check_first_order(report, unknowns)
    check_second_order(report, solver, unknowns)
    draw(report, solver, unknowns, covariance, float(variance.sqrt()))


if __name__ == "__main__":
    sys.exit(main(example, __doc__))
