"""A physics-informed network for the Helmholtz equation: Adam, then Gauss-Newton steps on the residual's Jacobian.

Solved is -laplacian(u) - k^2 u = f on the unit square with u = 0 on its boundary, for an f whose solution is known. The network
is made to vanish on the boundary by the factor 16 x (1 - x) y (1 - y), so the loss is the equation's residual alone, in
random points of the square. chainrule is used for the Laplacian per point (``vmap`` of ``laplacian``: no Hessian is formed),
for the loss's gradient through it, in two ways that people write (``grad``, and ``loss.backward()`` on parameters of torch), and
for the residual's Jacobian by the parameters (``linear_map`` of a function with a Laplacian in it). What to look for:

* Both gradients are the same, so a Laplacian can stand in a training loop that is otherwise torch's.
* Adam stalls, as it does on such losses. A few Gauss-Newton steps, each a linear system as large as the number of points with
  the matrix J J^T of ``gram()``, take the error down by orders of magnitude.
* The time of a step is printed beside that with the trace of a nested Hessian, which is how one writes it with torch.func.

Source: Raissi, Perdikaris and Karniadakis, *Physics-informed neural networks*, Journal of Computational Physics 378 (2019);
Jnini, Vella and Zeinhofer, *Gauss-Newton natural gradient descent for physics-informed computational fluid dynamics*,
2024; the damping: Nocedal and Wright, *Numerical Optimization*, 2nd ed., section 10.3.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from support import Report, main, seconds

import chainrule

Tensor = torch.Tensor
Parameters = dict[str, Tensor]

WAVENUMBER = 5.0


def exact(point: Tensor) -> Tensor:
    """The solution at a point of shape (2,)."""
    x, y = point
    return torch.sin(2 * math.pi * x) * torch.sin(math.pi * y) + x * (1 - x) * y * (1 - y) * torch.exp(2 * x)


def exact_laplacian(point: Tensor) -> Tensor:
    """Its Laplacian, by hand."""
    x, y = point
    wave = -5 * math.pi**2 * torch.sin(2 * math.pi * x) * torch.sin(math.pi * y)
    # with p = x (1 - x): (p e^2x)'' = (p'' + 4 p' + 4 p) e^2x = (2 - 4 x - 4 x²) e^2x
    return wave + torch.exp(2 * x) * ((2 - 4 * x - 4 * x * x) * y * (1 - y) - 2 * x * (1 - x))


def force(point: Tensor) -> Tensor:
    """The right-hand side that belongs to the exact solution."""
    return -exact_laplacian(point) - WAVENUMBER**2 * exact(point)


class Problem:
    """The network and the equation that it is to satisfy."""

    def __init__(self, width: int) -> None:
        layer, tanh = torch.nn.Linear, torch.nn.Tanh
        self.module = torch.nn.Sequential(layer(2, width), tanh(), layer(width, width), tanh(), layer(width, 1))

    def solution(self, parameters: Parameters, point: Tensor) -> Tensor:
        """The approximation at a point of shape (2,), zero on the boundary."""
        boundary = 16 * (point * (1 - point)).prod()
        return boundary * chainrule.functional_call(self.module, parameters, (point,)).squeeze(-1)

    def residual(self, parameters: Parameters, points: Tensor) -> Tensor:
        """The equation's residual at points of shape (n, 2), over sqrt(n)."""

        def at(point: Tensor) -> Tensor:
            laplacian = chainrule.laplacian(self.solution, argnums=1)(parameters, point)
            return -laplacian - WAVENUMBER**2 * self.solution(parameters, point) - force(point)

        return chainrule.vmap(at)(points) / math.sqrt(len(points))

    def loss(self, parameters: Parameters, points: Tensor) -> Tensor:
        return self.residual(parameters, points).square().sum()

    def nested_loss(self, library: Any, parameters: Parameters, points: Tensor) -> Tensor:
        """The same loss with the trace of a Hessian, in either library."""

        def solution(parameters: Parameters, point: Tensor) -> Tensor:
            boundary = 16 * (point * (1 - point)).prod()
            return boundary * library.functional_call(self.module, parameters, (point,)).squeeze(-1)

        def at(point: Tensor) -> Tensor:
            laplacian = library.hessian(solution, argnums=1)(parameters, point).trace()
            return -laplacian - WAVENUMBER**2 * solution(parameters, point) - force(point)

        return library.vmap(at)(points).square().mean()


# --- checks before training -------------------------------------------------------------------------------------------


def check_derivatives(report: Report, problem: Problem, points: Tensor) -> None:
    """The Laplacian and the gradient through it, each beside independent numbers."""
    parameters = {name: value.detach() for name, value in problem.module.named_parameters()}
    report.say(f"\nDerivatives, {len(points)} points, {sum(value.numel() for value in parameters.values())} parameters:")
    of_solution = chainrule.vmap(chainrule.laplacian(exact))(points)
    by_hand = exact_laplacian(points.mT)
    report.check("laplacian of the exact solution beside the one by hand", difference(of_solution, by_hand), below=1e-13)
    network = partial(problem.solution, parameters)
    of_network = chainrule.vmap(chainrule.laplacian(network))(points)
    # The second difference with step h leaves h² / 12 of fourth derivatives, and 8 eps / h² of rounding: 1e-6 and 2e-7.
    numeric = five_points(chainrule.vmap(network), points, 1e-4)
    report.check("laplacian of the network beside the five-point formula", difference(of_network, numeric), below=1e-5)

    gradient = chainrule.grad(problem.loss)(parameters, points)
    problem.loss(dict(problem.module.named_parameters()), points).backward()
    backward = {name: value.grad for name, value in problem.module.named_parameters()}
    report.check("chainrule.grad beside loss.backward()", largest_difference(gradient, backward), below=1e-12)
    nested = torch.func.grad(partial(problem.nested_loss, torch.func))(parameters, points)
    report.check("chainrule.grad beside torch.func through a Hessian's trace", largest_difference(gradient, nested), below=1e-12)
    direction = {name: torch.randn_like(value) for name, value in parameters.items()}
    slope = sum(float((gradient[name] * direction[name]).sum()) for name in direction)
    ahead, behind = (problem.loss(moved(parameters, direction, step), points) for step in (1e-5, -1e-5))
    numeric_slope = float(ahead - behind) / 2e-5
    report.check("gradient beside a finite difference of the loss", abs(slope / numeric_slope - 1), below=1e-6)


def five_points(function: Callable[[Tensor], Tensor], points: Tensor, step: float) -> Tensor:
    """The Laplacian by second differences."""
    shifts = step * torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    return (sum(function(points + shift) for shift in shifts) - 4 * function(points)) / step**2


def moved(parameters: Parameters, direction: Parameters, step: float) -> Parameters:
    """The parameters after a step."""
    return {name: value + step * direction[name] for name, value in parameters.items()}


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max())


def largest_difference(found: Parameters, expected: Parameters) -> float:
    """The same for all parameters."""
    return max(difference(found[name], expected[name]) for name in expected)


# --- training ---------------------------------------------------------------------------------------------------------


def train_with_adam(problem: Problem, steps: int, points: int) -> list[float]:
    """Torch's optimizer on fresh points in each step, with the gradient as one compiled graph; returns the losses."""
    parameters = {name: value.detach() for name, value in problem.module.named_parameters()}  # the module's own memory
    gradient_and_loss = chainrule.compile(chainrule.grad_and_value(problem.loss))
    optimizer = torch.optim.Adam(parameters.values(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        gradient, loss = gradient_and_loss(parameters, torch.rand(points, 2))
        for name, value in parameters.items():
            value.grad = gradient[name]
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def gauss_newton(problem: Problem, parameters: Parameters, points: Tensor, steps: int) -> tuple[Parameters, list[float]]:
    """Damped steps J^T (J J^T + damping)^-1 r; the damping falls while the loss does, and rises where it would not."""
    compiled = chainrule.compile(problem.loss)
    damping, loss, losses = 1.0, float(compiled(parameters, points)), []
    for _ in range(steps):
        jacobian = chainrule.linear_map(lambda at: problem.residual(at, points), parameters)
        values, vectors = torch.linalg.eigh(jacobian.gram().dense())
        projected = vectors.mT @ jacobian.output
        for _ in range(12):
            solved = vectors @ (projected / (values.clamp(min=0) + damping))
            proposal = moved(parameters, jacobian.T @ solved, -1.0)
            proposed = float(compiled(proposal, points))
            if proposed < loss:
                parameters, loss, damping = proposal, proposed, damping / 4
                break
            damping *= 3
        losses.append(loss)
    return parameters, losses


def relative_error(problem: Problem, parameters: Parameters) -> float:
    """The distance from the exact solution on a grid, relative, in the mean square."""
    grid = square(60)
    found = chainrule.vmap(partial(problem.solution, parameters))(grid)
    expected = exact(grid.mT)
    return float((found - expected).norm() / expected.norm())


def square(side: int) -> Tensor:
    """A grid of side² points."""
    return torch.cartesian_prod(*[torch.linspace(0, 1, side)] * 2)


def train(report: Report, problem: Problem, small: bool) -> tuple[Parameters, list[float], list[float]]:
    """Both stages, with what each has to reach."""
    adam_steps, newton_steps, count = (300, 15, 150) if small else (1000, 40, 400)
    adam = train_with_adam(problem, adam_steps, count)
    parameters = {name: value.detach() for name, value in problem.module.named_parameters()}
    after_adam = relative_error(problem, parameters)
    report.say(f"\nTraining: {adam_steps} steps of Adam, loss {adam[0]:.3g} to {adam[-1]:.3g}, relative error {after_adam:.2e}")
    report.check("loss after Adam over the first", adam[-1] / adam[0], below=0.1 if small else 1e-2)
    points = torch.rand(count, 2)
    parameters, newton = gauss_newton(problem, parameters, points, newton_steps)
    error = relative_error(problem, parameters)
    report.say(f"  {newton_steps} Gauss-Newton steps on {count} points: loss {newton[-1]:.3g}, relative error {error:.2e}")
    report.check("loss after Gauss-Newton over that after Adam", newton[-1] / adam[-1], below=1e-2 if small else 1e-3)
    report.check("relative error over that after Adam", error / after_adam, below=0.3)
    report.check("relative error", error, below=2e-2 if small else 1e-3)
    fresh = float(problem.loss(parameters, torch.rand(2000, 2)))
    report.say(f"  loss on fresh points {fresh:.3g}")
    return parameters, adam, newton


def compare_times(report: Report, problem: Problem, parameters: Parameters, count: int) -> None:
    """A gradient of the loss in all ways (printed, not checked: a clock is no witness)."""
    points = torch.rand(count, 2)
    tracked = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    step = chainrule.compile(chainrule.grad(problem.loss))
    ways = {
        "chainrule.laplacian, chainrule.grad": lambda: chainrule.grad(problem.loss)(parameters, points),
        "chainrule.laplacian, loss.backward()": lambda: problem.loss(tracked, points).backward(),
        "chainrule.compile of the first": lambda: step(parameters, points),
        "chainrule.hessian(...).trace()": lambda: chainrule.grad(partial(problem.nested_loss, chainrule))(parameters, points),
        "torch.func.hessian(...).trace()": lambda: torch.func.grad(partial(problem.nested_loss, torch.func))(parameters, points),
    }
    report.say(f"\nOne gradient of the loss, {count} points:")
    for call in ways.values():
        call()
    rounds = [{name: seconds(call) for name, call in ways.items()} for _ in range(7)]
    for name in ways:
        report.say(f"  {name:<38}{sorted(found[name] for found in rounds)[3] * 1e3:8.1f} ms")


def draw(report: Report, problem: Problem, parameters: Parameters, adam: list[float], newton: list[float]) -> None:
    """The solution, its error, and the loss."""
    if report.picture is None:
        return
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional

    figure = Figure(figsize=(15, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    grid = square(60)
    found = chainrule.vmap(partial(problem.solution, parameters))(grid)
    for ax, values, colours, title in (
        (left, found, "PuOr", "Solution"), (middle, found - exact(grid.mT), "RdBu_r", "Error"),
    ):  # fmt: skip
        bound = float(values.abs().max())
        image = values.reshape(60, 60).mT
        shown = ax.imshow(image, origin="lower", extent=(0, 1, 0, 1), cmap=colours, vmin=-bound, vmax=bound)
        figure.colorbar(shown, ax=ax)
        ax.set_title(title)
    right.semilogy(adam, lw=0.7, label="Adam")
    right.semilogy([len(adam) + k for k in range(len(newton))], newton, ".-", label="Gauss-Newton")
    right.set(xlabel="step", title="Loss")
    right.legend()
    report.save(figure)


def example(report: Report) -> None:
    torch.set_default_dtype(torch.float64)
    problem = Problem(16 if report.small else 32)
    check_derivatives(report, problem, 0.02 + 0.96 * torch.rand(100, 2))
    parameters, adam, newton = train(report, problem, report.small)
    compare_times(report, problem, parameters, 150 if report.small else 400)
    draw(report, problem, parameters, adam, newton)


if __name__ == "__main__":
    sys.exit(main(example, __doc__))
