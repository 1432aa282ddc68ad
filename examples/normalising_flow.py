"""A continuous normalising flow: a density on the plane, learned by moving points along a differential equation.

A network gives a velocity v(x, t). Points of the data flow from t = 0 to t = 1, to where a standard normal density is to
be found; the logarithm of the density changes along the way by the divergence of v:

    log p(x(0)) = log N(x(1)) + ∫ div v(x(t), t) dt.

The network is trained by maximum likelihood on two moons. Flowing backwards from normal numbers draws samples.

chainrule is used for the divergence, exactly and for each point of a batch: ``vmap(divergence(v))`` contracts the layers'
Jacobians to their trace, where Hutchinson's estimator would add noise. The gradient of the likelihood goes through it
(``grad_and_value``, so second derivatives of the network), and ``chainrule.compile`` replays that as one list of calls.
``vmap(jacobian(flow))`` gives the density in another way, by the determinant of the whole flow's Jacobian, as a check.

Sources: R. Chen et al., *Neural ordinary differential equations*, NeurIPS 2018; W. Grathwohl et al., *FFJORD: free-form
continuous dynamics for scalable reversible generative models*, ICLR 2019; the energy: C. Finlay et al., *How to train your
neural ODE*, ICML 2020.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from support import Report, main, seconds

import chainrule

Parameters = dict[str, torch.Tensor]

SIZE, NOISE = 1.4, 0.15  # of the half circles, and of the points about them
ENERGY = 0.02


def arcs(angle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two half circles about zero. Shapes (n, 2)."""
    upper = SIZE * torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1)
    return upper, -upper


def moons(count: int) -> torch.Tensor:
    """Points on the half circles, with noise. Shape (count, 2)."""
    upper, lower = arcs(torch.pi * torch.rand(count, dtype=torch.float64))
    points = torch.where(torch.arange(count)[:, None] % 2 == 0, upper, lower)
    return points + NOISE * torch.randn(count, 2, dtype=torch.float64)


def true_log_density(points: torch.Tensor) -> torch.Tensor:
    """The logarithm of the density that ``moons`` draws from, by the midpoint rule over both half circles. Shape (n,)."""
    middles = torch.cat(arcs(torch.pi * (torch.arange(400, dtype=torch.float64) + 0.5) / 400))
    each = -0.5 * torch.cdist(points, middles).square() / NOISE**2 - math.log(2 * math.pi * NOISE**2)
    return each.logsumexp(1) - math.log(len(middles))


def log_normal(x: torch.Tensor) -> torch.Tensor:
    return -0.5 * x.square().sum(1) - math.log(2 * math.pi)


def network(width: int) -> Parameters:
    """The parameters of three layers; the time goes into the first two. The last begins small: the flow near rest."""
    shapes = {
        "first": (width, 2), "first_bias": (width,), "first_time": (width,), "second": (width, width), "second_bias": (width,),
        "second_time": (width,), "last": (2, width), "last_bias": (2,),
    }  # fmt: skip
    found = {name: torch.randn(shape, dtype=torch.float64) / math.sqrt(shape[-1]) for name, shape in shapes.items()}
    return found | {"last": 0.1 * found["last"], "last_bias": torch.zeros(2, dtype=torch.float64)}


def velocity(x: torch.Tensor, t: float, p: Parameters) -> torch.Tensor:
    """The velocity at one point. Shape (2,)."""
    hidden = torch.tanh(p["first"] @ x + p["first_bias"] + t * p["first_time"])
    hidden = torch.tanh(p["second"] @ hidden + p["second_bias"] + t * p["second_time"])
    return p["last"] @ hidden + p["last_bias"]


def velocity_and_divergence(x: torch.Tensor, t: float, p: Parameters) -> tuple[torch.Tensor, torch.Tensor]:
    """Both at one point, from one run of the network."""

    def twice(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = velocity(x, t, p)
        return found, found

    divergence, moving = chainrule.divergence(twice, has_aux=True)(x)
    return moving, divergence


#: Of a batch of points, (n, 2): velocities (n, 2) and divergences (n,).
of_batch = chainrule.vmap(velocity_and_divergence, in_dims=(0, None, None))


@dataclass(frozen=True)
class Flow:
    """The differential equation from t = 0 to t = 1 by so many steps of the classical Runge-Kutta method."""

    steps: int

    def integrate(self, slope: Callable[..., tuple], *state: torch.Tensor, back: bool = False) -> tuple:
        """What points, and what is summed up on their way, become. ``slope(x, t)`` gives the derivatives of all."""
        h, t = 1 / self.steps, 0.0
        if back:
            h, t = -h, 1.0
        for _ in range(self.steps):
            one = slope(state[0], t)
            two = slope(state[0] + h / 2 * one[0], t + h / 2)
            three = slope(state[0] + h / 2 * two[0], t + h / 2)
            four = slope(state[0] + h * three[0], t + h)
            stages = zip(state, one, two, three, four, strict=True)
            state = tuple(old + h / 6 * (a + 2 * b + 2 * c + d) for old, a, b, c, d in stages)
            t += h
        return state

    def along(self, p: Parameters, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logarithm of the density at points (n, 2), and the energy ∫ |v|² dt of their ways. Shapes (n,)."""

        def slope(x: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            moving, divergence = of_batch(x, t, p)
            return moving, divergence, moving.square().sum(1)

        zero = torch.zeros(len(x), dtype=x.dtype)
        end, change, energy = self.integrate(slope, x, zero, zero)
        return log_normal(end) + change, energy

    def log_density(self, p: Parameters, x: torch.Tensor) -> torch.Tensor:
        return self.along(p, x)[0]

    def loss(self, p: Parameters, x: torch.Tensor) -> torch.Tensor:
        """Minus the log-likelihood, and a little of the energy: straight ways are integrated well in few steps."""
        log_density, energy = self.along(p, x)
        return (ENERGY * energy - log_density).mean()

    def to_normal(self, x: torch.Tensor, p: Parameters) -> torch.Tensor:
        """Where one point ends. Shape (2,)."""
        return self.integrate(lambda x, t: (velocity(x, t, p),), x)[0]

    def sample(self, p: Parameters, normal: torch.Tensor) -> torch.Tensor:
        """Points of the density, from normal numbers (n, 2), backwards."""
        move = chainrule.vmap(velocity, in_dims=(0, None, None))
        return self.integrate(lambda x, t: (move(x, t, p),), normal, back=True)[0]


def train(report: Report, flow: Flow, p: Parameters, steps: int, batch: int) -> Parameters:
    """Adam with a rate that falls to zero."""
    gradient = chainrule.compile(chainrule.grad_and_value(flow.loss))
    p = {name: value.clone() for name, value in p.items()}
    optimiser = torch.optim.Adam(p.values(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    recent = []
    for number in range(steps):
        found, loss = gradient(p, moons(batch))
        for name, value in p.items():
            value.grad = found[name]
        optimiser.step()
        schedule.step()
        recent.append(float(loss))
        if (number + 1) % (steps // 5) == 0:
            report.say(f"  step {number + 1}: {sum(recent) / len(recent):.4f} nats per point")
            recent = []
    return p


def check_derivatives(report: Report, flow: Flow, p: Parameters) -> None:
    """The divergence against the trace of the Jacobian and differences; the gradient of the loss; the compiled form."""
    x, t, h = torch.randn(50, 2, dtype=torch.float64), 0.3, 1e-5
    divergence = of_batch(x, t, p)[1]
    jacobians = chainrule.vmap(chainrule.jacobian(velocity), in_dims=(0, None, None))(x, t, p)
    error = (divergence - jacobians.diagonal(dim1=1, dim2=2).sum(1)).abs().max()
    report.check("divergence against the trace of the Jacobian", float(error), below=1e-13)
    moved = [of_batch(x + sign * h * unit, t, p)[0] for unit in torch.eye(2).double() for sign in (1, -1)]
    difference = ((moved[0] - moved[1])[:, 0] + (moved[2] - moved[3])[:, 1]) / (2 * h)
    report.check("divergence against finite differences", float((divergence - difference).abs().max()), below=1e-8)

    gradient, value = chainrule.grad_and_value(flow.loss)(p, x)
    direction = {name: torch.randn_like(part) for name, part in p.items()}
    ends = [flow.loss({name: part + sign * h * direction[name] for name, part in p.items()}, x) for sign in (1, -1)]
    exact = sum((gradient[name] * part).sum() for name, part in direction.items())
    error = (exact - (ends[0] - ends[1]) / (2 * h)).abs() / exact.abs()
    report.check("gradient of the loss against finite differences (relative)", float(error), below=1e-6)

    compiled = chainrule.compile(chainrule.grad_and_value(flow.loss))
    again, other = compiled(p, x)
    error = max((again[name] - part).abs().max() for name, part in gradient.items())
    report.check("the same, compiled", float(max(error, (other - value).abs())), below=1e-12)
    forms = chainrule.grad_and_value(flow.loss), compiled
    times = [min(seconds(lambda call=call: call(p, x)) for _ in range(3)) for call in forms]
    report.say(f"loss and gradient of 50 points: {1e3 * times[0]:.0f} ms, compiled {1e3 * times[1]:.0f} ms")


def check_density(report: Report, flow: Flow, p: Parameters) -> None:
    """It integrates to one, agrees with the determinant of the flow's Jacobian, and the flow runs backwards."""
    side, half = 120, 4.5
    grid = torch.linspace(-half, half, side, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)
    mass = flow.log_density(p, points).exp().sum() * (2 * half / (side - 1)) ** 2
    report.check("mass of the density on a grid, distance from 1", float((mass - 1).abs()), below=1e-2)

    x, errors, returns = moons(200), [], []
    for finer in (flow, Flow(2 * flow.steps)):
        jacobians = chainrule.vmap(chainrule.jacobian(finer.to_normal), in_dims=(0, None))(x, p)
        ends = chainrule.vmap(finer.to_normal, in_dims=(0, None))(x, p)
        by_determinant = log_normal(ends) + torch.linalg.slogdet(jacobians).logabsdet
        errors.append(float((finer.log_density(p, x) - by_determinant).abs().mean()))
        returns.append(float((finer.sample(p, ends) - x).norm(dim=1).mean()))
    # Both densities are right up to the error of the integration, which a halved step makes 2⁴ times smaller.
    report.check("log-density by divergence against that by determinant, mean", errors[1], below=1e-3)
    report.check("there and back, mean distance", returns[1], below=1e-3)
    report.check("how much half the step leaves of the first", errors[1] / errors[0], below=1 / 8)
    report.check("how much half the step leaves of the second", returns[1] / returns[0], below=1 / 8)


def draw(report: Report, flow: Flow, p: Parameters, samples: torch.Tensor) -> None:
    import matplotlib.pyplot as plt  # noqa: PLC0415 - needed for the picture alone

    figure, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained", sharex=True, sharey=True)
    grid = torch.linspace(-3, 3, 120, dtype=torch.float64)
    density = flow.log_density(p, torch.cartesian_prod(grid, grid)).exp().view(120, 120)
    data = moons(len(samples))
    axes[0].scatter(*data.T, s=2)
    axes[0].set_title("data")
    axes[1].imshow(density.T, origin="lower", extent=(-3, 3, -3, 3), cmap="viridis")
    axes[1].set_title("density learned")
    axes[2].scatter(*samples.T, s=2)
    axes[2].set_title("samples")
    axes[3].scatter(*chainrule.vmap(flow.to_normal, in_dims=(0, None))(data, p).T, s=2)
    axes[3].set_title("where the data end")
    for axis in axes:
        axis.set(aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
    report.save(figure)


def example(report: Report) -> None:
    flow, width, steps, batch = (Flow(4), 32, 240, 128) if report.small else (Flow(6), 32, 1000, 256)
    start = network(width)
    check_derivatives(report, flow, start)
    report.say("training:")
    trained: list[Parameters] = []
    spent = seconds(lambda: trained.append(train(report, flow, start, steps, batch)))
    report.say(f"  {steps} steps of {batch} points: {spent:.1f} s")

    p, unseen, finer = trained[0], moons(4000), Flow(2 * flow.steps)
    before, after = (float(finer.log_density(q, unseen).mean()) for q in (start, p))
    gaussian = torch.distributions.MultivariateNormal(unseen.mean(0), torch.cov(unseen.T))
    normal, true = float(gaussian.log_prob(unseen).mean()), float(true_log_density(unseen).mean())
    report.say(f"log-likelihood of unseen points, nats: {before:.3f} before, {after:.3f} after")
    report.say(f"    {normal:.3f} for the best normal distribution, {true:.3f} for the true density")
    divergence = true - after
    report.check("Kullback-Leibler distance from the true density, nats", divergence, below=0.35 if report.small else 0.15)
    # Gibbs' inequality, up to the deviation of a mean of 4000 differences of size below one.
    report.check("log-likelihood above that of the true density", -divergence, below=0.02)
    report.check("the distance, beside that of the best normal distribution", divergence / (true - normal), below=0.5)
    samples = finer.sample(p, torch.randn(4000, 2, dtype=torch.float64))
    stray, own = (float((true_log_density(points) < -6).double().mean()) for points in (samples, unseen))
    report.say(f"points where the true density is below exp(-6): {stray:.1%} of the samples, {own:.1%} of the data")
    report.check("share of stray samples", stray, below=0.15 if report.small else 0.08)
    check_density(report, flow, p)
    draw(report, finer, p, samples)


if __name__ == "__main__":
    sys.exit(main(example, __doc__))
