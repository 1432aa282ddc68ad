"""Laplace approximations of two Bayesian networks, with the prior's precision chosen by the marginal likelihood.

A network is fitted with a Gaussian prior on its parameters, then its posterior is approximated by a Gaussian around the fit whose
precision is H = J^T L J + delta: the Gauss-Newton matrix, with J the Jacobian of the outputs by the parameters, L the second
derivatives of the loss by the outputs, and delta the prior's precision. The regression treats all of its parameters so, the
classifier those of its last layer. The determinant of H also gives the marginal likelihood (the evidence), whose maximum
chooses delta and the variance of the noise without any data held out.

chainrule is used for the fits (``chainrule.scipy.minimize``), for J as an object (``linear_map``, whose ``normal()`` and
``gram()`` are J^T J and J J^T), per-sample Jacobians (``vmap`` of ``grad``), Gauss-Newton products (``ggn``), and the
derivatives of the evidence. What to look for: everything is computed twice, with matrices as large as the number of
parameters and with matrices as large as the number of samples, which Woodbury's formula says is the same.

Source: MacKay, *A practical Bayesian framework for backpropagation networks*, Neural Computation 4 (1992); Immer, Korzepa and
Bauer, *Improving predictions of Bayesian neural nets via local linearization*, AISTATS 2021; Daxberger et al., *Laplace
redux*, NeurIPS 2021.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from support import Report, main

import chainrule
from chainrule.scipy import minimize

Tensor = torch.Tensor


def network(sizes: tuple[int, ...], parameters: Tensor, x: Tensor) -> Tensor:
    """A tanh network with one output: inputs (..., d), outputs (...); all parameters in one vector, layer after layer."""
    start = 0
    for inputs, outputs in pairwise(sizes):
        middle, end = start + inputs * outputs, start + (inputs + 1) * outputs
        x = F.linear(x, parameters[start:middle].reshape(outputs, inputs), parameters[middle:end])
        x, start = (torch.tanh(x) if end < len(parameters) else x), end
    return x.squeeze(-1)


def initial(sizes: tuple[int, ...]) -> Tensor:
    """Random parameters."""
    layers = [torch.cat([torch.randn(n * m) / math.sqrt(n), torch.zeros(m)]) for n, m in pairwise(sizes)]
    return torch.cat(layers)


# --- the approximation ------------------------------------------------------------------------------------------------


@dataclass
class Laplace:
    """A Gaussian around a fit.

    Attributes:
        model: parameters (p,) and inputs (n, d) to outputs (n,).
        center: the parameters at the fit, of shape (p,).
        x: the inputs of the data.
        curvature: the second derivative of each sample's loss by its output, of shape (n,).
        delta: the prior's precision.
    """

    model: Callable[[Tensor, Tensor], Tensor]
    center: Tensor
    x: Tensor
    curvature: Tensor
    delta: float

    def __post_init__(self) -> None:
        root = self.curvature.sqrt()
        self.jacobian = chainrule.linear_map(lambda parameters: root * self.model(parameters, self.x), self.center)

    def at(self, x: Tensor) -> chainrule.LinearMap:
        """The Jacobian elsewhere."""
        return chainrule.linear_map(lambda parameters: self.model(parameters, x), self.center)

    def precision(self) -> Tensor:
        """H, as large as the parameters."""
        return self.jacobian.normal().dense() + self.delta * torch.eye(len(self.center))

    def kernel(self) -> Tensor:
        """I + J J^T / delta, as large as the data."""
        return torch.eye(len(self.x)) + self.jacobian.gram().dense() / self.delta

    def variance_by_weights(self, x: Tensor) -> Tensor:
        """The variances of the outputs at x: the diagonal of J_x H^-1 J_x^T."""
        there = self.at(x).dense()
        return (there * torch.linalg.solve(self.precision(), there.mT).mT).sum(1)

    def variance_by_kernel(self, x: Tensor) -> Tensor:
        """The same by Woodbury's formula, as Gaussian process regression has it."""
        there = self.at(x)
        cross = (there @ self.jacobian.T).dense() / self.delta
        prior = there.gram().diagonal() / self.delta
        return prior - (cross * torch.linalg.solve(self.kernel(), cross.mT).mT).sum(1)

    def log_determinants(self) -> tuple[float, float]:
        """log det H, directly and by Sylvester's identity."""
        direct = torch.linalg.slogdet(self.precision()).logabsdet
        return float(direct), float(len(self.center) * math.log(self.delta) + torch.linalg.slogdet(self.kernel()).logabsdet)


def check_laplace(report: Report, posterior: Laplace, loss: Callable[[Tensor], Tensor], elsewhere: Tensor) -> None:
    """Every part of the approximation by two routes; ``loss`` is that of the outputs."""
    model, center, x = posterior.model, posterior.center, posterior.x
    per_sample = chainrule.vmap(lambda one: chainrule.grad(lambda parameters: model(parameters, one))(center))(x)
    curvature = chainrule.hessian(loss)(model(center, x))
    dense = per_sample.mT @ curvature @ per_sample
    # Products are sums of n terms of the size of the largest entries; solutions lose the condition of their matrix more.
    rounding = 10 * torch.finfo(center.dtype).eps * math.sqrt(len(x))
    by_products = chainrule.vmap(lambda v: chainrule.ggn(lambda p: model(p, x), loss, (center,), (v,)))(torch.eye(len(center)))
    report.check("ggn on all unit vectors, beside J^T L J", difference(by_products, dense), below=rounding)
    here = posterior.at(x)
    by_maps = here.T @ chainrule.hessian(loss, layout="operator")(here.output) @ here
    report.check("composition of three maps, beside J^T L J", difference(by_maps.dense(), dense), below=rounding)
    normal = posterior.jacobian.normal().dense()
    report.check("linear_map(...).normal(), beside J^T L J", difference(normal, dense), below=rounding)
    step = 1e-5 * torch.randn(len(center))
    # A step of 1e-5 leaves its square times third derivatives, and eps over it of rounding.
    numeric = (model(center + step, x) - model(center - step, x)) / 2
    report.check("Jacobian, beside a finite difference", difference(per_sample @ step, numeric), below=1e-6)
    by_weights, by_kernel = posterior.variance_by_weights(elsewhere), posterior.variance_by_kernel(elsewhere)
    condition = float(torch.linalg.cond(posterior.precision()))
    allowed = rounding * condition
    report.check("predictive variance by weights and by kernel", difference(by_weights, by_kernel), below=allowed)
    one, other = posterior.log_determinants()
    report.check("log det of the precision, both ways", abs(one - other) / abs(one), below=allowed)


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max())


# --- regression: all parameters, and two hyperparameters --------------------------------------------------------------


def curve(x: Tensor) -> Tensor:
    """What the regression is to find."""
    return torch.sin(1.6 * x[:, 0]) + 0.3 * x[:, 0]


def seen(samples: int) -> tuple[Tensor, Tensor]:
    """Noisy values of the curve on two intervals, with a gap between them."""
    x = torch.cat([torch.rand(samples // 2) * 2.5 - 4, torch.rand(samples - samples // 2) * 2.5 + 1.5])[:, None]
    return x, curve(x) + 0.15 * torch.randn(samples)


def negative_log_joint(model: Callable[..., Tensor], x: Tensor, y: Tensor, logs: Tensor, parameters: Tensor) -> Tensor:
    """Of the data and the parameters, with ``logs`` the logarithms of the prior's precision and of the noise's variance."""
    delta, noise = logs.exp()
    fit = (y - model(parameters, x)).square() / noise + logs[1] + math.log(2 * math.pi)
    prior = delta * parameters.square() - logs[0] + math.log(2 * math.pi)
    return (fit.sum() + prior.sum()) / 2


def regression(report: Report, samples: int, width: int) -> dict[str, Tensor]:
    """Fit, choose both hyperparameters, check; returns what there is to draw."""
    x, y = seen(samples)
    model, center = partial(network, (1, width, 1)), initial((1, width, 1))
    report.say(f"\nRegression: {samples} samples, full Laplace approximation on {len(center)} parameters")

    def negative_evidence(logs: Tensor, center: Tensor, eigenvalues: Tensor) -> Tensor:
        """By the eigenvalues of J J^T: the determinant for any hyperparameters costs nothing then."""
        log_determinant = len(center) * logs[0] + torch.log1p(eigenvalues / logs.sum().exp()).sum()
        return negative_log_joint(model, x, y, logs, center) + (log_determinant - len(center) * math.log(2 * math.pi)) / 2

    logs = torch.tensor([1.0, 0.1]).log()
    for _ in range(8):  # fit, then choose the hyperparameters for the fit, in turn
        objective = partial(negative_log_joint, model, x, y, logs)
        center = torch.from_numpy(minimize(objective, center, method="trust-krylov", options={"gtol": 1e-6}).x)
        eigenvalues = torch.linalg.eigvalsh(chainrule.linear_map(partial(model, x=x), center).gram().dense()).clamp(min=0)
        chosen = minimize(negative_evidence, logs, args=(center, eigenvalues), method="trust-exact", options={"gtol": 1e-10})
        logs = torch.from_numpy(chosen.x)
    delta, noise = logs.exp().tolist()
    report.say(f"  chosen: precision of the prior {delta:.3f}, noise {math.sqrt(noise):.3f} (behind the data: 0.150)")

    posterior = Laplace(model, center, x, torch.full_like(y, 1 / noise), delta)
    grid = torch.linspace(-6, 6, 200)[:, None]
    check_laplace(report, posterior, lambda output: (output - y).square().sum() / (2 * noise), grid)
    check_evidence(report, posterior, y, noise, -float(chosen.fun))
    unseen, values = seen(2000)
    deviation = (posterior.variance_by_kernel(unseen) + noise).sqrt()
    inside = float(((model(center, unseen) - values).abs() < 1.96 * deviation).double().mean())
    # Off by the binomial spread of 2000 draws (three of 0.5 %), and by what the noise is misjudged by from so few samples,
    # 1 / sqrt(2 n), three of which move a normal quantile's probability by 3 * 1.96 * 2 * density(1.96) = 0.69 times that.
    allowed = 0.015 + 0.69 / math.sqrt(2 * samples)
    report.check(f"95 % bands hold {100 * inside:.1f} % of unseen data, distance", abs(inside - 0.95), below=allowed)
    width_of = posterior.variance_by_kernel(torch.tensor([[0.0], [2.75]])).sqrt()
    report.check("uncertainty where there is data over that in the gap", float(width_of[1] / width_of[0]), below=0.5)
    variance = posterior.variance_by_kernel(grid)
    return {"x": x, "y": y, "grid": grid, "mean": model(center, grid), "variance": variance, "noise": logs[1].exp()}


def check_evidence(report: Report, posterior: Laplace, y: Tensor, noise: float, evidence: float) -> None:
    """The evidence beside that of a Gaussian process, and the hyperparameters beside MacKay's equations for them."""
    center, delta, x = posterior.center, posterior.delta, posterior.x
    there = posterior.at(x)
    covariance = there.gram().dense() / delta + noise * torch.eye(len(x))
    process = torch.distributions.MultivariateNormal(there.output - there @ center, covariance)
    # The network linearised at the fit is exactly Gaussian; both numbers are the same where the fit is stationary.
    gap = abs(float(process.log_prob(y)) - evidence)
    report.check("log evidence beside the linearised model's Gaussian process", gap, below=1e-6)
    determined = len(center) - delta * float(torch.linalg.inv(posterior.precision()).trace())
    residual = float((y - there.output).square().sum())
    # At the maximum both hold exactly; the solver stops at gradients of 1e-10 where they are differences of such terms.
    report.say(f"  {determined:.1f} of {len(center)} parameters are determined by the data")
    size = float(center.square().sum())
    report.check("MacKay: delta |w|^2 beside their number", abs(delta * size / determined - 1), below=1e-5)
    report.check("MacKay: noise beside |r|^2 / (n - number)", abs(noise * (len(x) - determined) / residual - 1), below=1e-5)


# --- classification: the last layer -----------------------------------------------------------------------------------


def moons(samples: int) -> tuple[Tensor, Tensor]:
    """Two interleaved half circles, and to which of them a point belongs."""
    angle, label = math.pi * torch.rand(samples), torch.arange(samples) % 2
    arc = torch.stack([torch.cos(angle), torch.sin(angle) - 0.25], 1) * torch.where(label == 0, 1.0, -1.0)[:, None]
    return arc + label[:, None] * torch.tensor([1.0, 0.0]) + 0.2 * torch.randn(samples, 2), label.double()


def classification(report: Report, samples: int, width: int) -> dict[str, Tensor]:
    """Fit all parameters, then treat those of the last layer as uncertain; returns what there is to draw."""
    x, label = moons(samples)
    sizes = (2, width, width, 1)
    start = initial(sizes)
    head = width + 1  # the last layer's weights and its bias
    report.say(f"\nClassification: {samples} samples, Laplace approximation on the last {head} of {len(start)} parameters")

    def loss(output: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output, label, reduction="sum")

    def objective(parameters: Tensor) -> Tensor:
        return loss(network(sizes, parameters, x)) + 0.05 * parameters.square().sum() / 2

    fitted = torch.from_numpy(minimize(objective, start, method="L-BFGS-B", options={"maxiter": 300}).x)
    body, last = fitted[:-head], fitted[-head:]

    def model(last: Tensor, x: Tensor) -> Tensor:
        return network(sizes, torch.cat([body, last]), x)

    def refit(delta: Tensor, last: Tensor) -> Tensor:
        """The last layer for another prior: a convex problem."""
        def penalised(last: Tensor) -> Tensor:
            return loss(model(last, x)) + delta * last.square().sum() / 2

        return torch.from_numpy(minimize(penalised, last, method="trust-exact", options={"gtol": 1e-8}).x)

    def posterior(delta: Tensor, last: Tensor) -> Laplace:
        probability = torch.sigmoid(model(last, x))
        return Laplace(model, last, x, probability * (1 - probability), float(delta))

    evidences = []
    for delta in torch.logspace(-5, 1, 13):
        last = refit(delta, last)
        fit = -float(loss(model(last, x))) - delta * float(last.square().sum()) / 2
        evidences.append(fit + (head * math.log(delta) - posterior(delta, last).log_determinants()[1]) / 2)
    best = torch.logspace(-5, 1, 13)[evidences.index(max(evidences))]
    last = refit(best, last)
    report.say(f"  chosen: precision of the prior {best:.3g}")
    report.check("its logarithm, from the middle of the range that was tried", abs(math.log10(best) + 2), below=2.9)
    laplace = posterior(best, last)
    axis = torch.linspace(-3, 4, 50)
    grid = torch.cartesian_prod(axis, axis - 0.5)
    check_laplace(report, laplace, loss, grid)
    features = hidden(sizes, body, x)
    formula = features.mT @ (laplace.curvature[:, None] * features)
    normal = laplace.jacobian.normal().dense()
    report.check("normal() beside the last layer's closed form", difference(normal, formula), below=1e-13)

    unseen, truth = moons(2000)
    wrong = float(((predictive(laplace, unseen) > 0.5) != (truth > 0.5)).double().mean())
    report.check("share of unseen points that are classified wrongly", wrong, below=0.15)
    far = 50 * torch.nn.functional.normalize(torch.randn(500, 2), dim=1)
    alone, averaged = doubt(torch.sigmoid(model(last, far))), doubt(predictive(laplace, far))
    report.check(f"far from all data: doubt of the fit alone ({alone:.4f}) over the approximation's", alone / averaged, below=0.7)
    fit, averaged = torch.sigmoid(model(last, grid)), predictive(laplace, grid)
    return {"x": x, "label": label, "axis": axis, "fit": fit, "predictive": averaged}


def hidden(sizes: tuple[int, ...], body: Tensor, x: Tensor) -> Tensor:
    """The features that the last layer sees, and a one for its bias."""
    width = sizes[-2]
    first, second = body[: 3 * width], body[3 * width :]
    x = torch.tanh(F.linear(x, first[: 2 * width].reshape(width, 2), first[2 * width :]))
    x = torch.tanh(F.linear(x, second[: width * width].reshape(width, width), second[width * width :]))
    return torch.cat([x, torch.ones(len(x), 1)], 1)


def predictive(posterior: Laplace, x: Tensor) -> Tensor:
    """The probability of class one, the last layer's uncertainty averaged over (MacKay's probit formula)."""
    spread = 1 + math.pi / 8 * posterior.variance_by_weights(x)
    return torch.sigmoid(posterior.model(posterior.center, x) / spread.sqrt())


def doubt(probability: Tensor) -> float:
    """The mean probability of the less likely class."""
    return float(torch.minimum(probability, 1 - probability).mean())


def draw(report: Report, curve_fit: dict[str, Tensor], classes: dict[str, Tensor]) -> None:
    """The bands of the regression, and the probabilities of the classifier with and without its uncertainty."""
    if report.picture is None:
        return
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional

    figure = Figure(figsize=(15, 4), layout="constrained")
    bands, *maps = figure.subplots(1, 3)
    grid, mean = curve_fit["grid"][:, 0], curve_fit["mean"]
    for factor, alpha in ((1, 0.35), (2, 0.2)):
        deviation, label = factor * curve_fit["variance"].sqrt(), f"{factor} standard deviation{'s' * (factor - 1)}"
        bands.fill_between(grid, mean - deviation, mean + deviation, color="tab:blue", alpha=alpha, lw=0, label=label)
    noisy = 2 * (curve_fit["variance"] + curve_fit["noise"]).sqrt()
    bands.plot(grid, torch.stack([mean - noisy, mean + noisy], 1), color="tab:blue", lw=0.6, ls=":")
    bands.plot(grid, mean, label="fit")
    bands.plot(grid, curve(curve_fit["grid"]), "k--", lw=1, label="behind the data")
    bands.plot(curve_fit["x"][:, 0], curve_fit["y"], "k.", ms=4)
    bands.set(title="Regression: full Laplace approximation", ylim=(-5, 5))
    bands.legend(loc="lower right")
    axis = classes["axis"]
    for ax, name, title in zip(maps, ("fit", "predictive"), ("fit alone", "last-layer Laplace"), strict=True):
        values = classes[name].reshape(50, 50).mT
        filled = ax.contourf(axis, axis - 0.5, values, levels=torch.linspace(0, 1, 11), cmap="RdBu_r")
        ax.scatter(*classes["x"].mT, c=classes["label"], cmap="RdBu_r", edgecolors="k", linewidths=0.4, s=12)
        ax.set(title=f"Probability of red: {title}")
    figure.colorbar(filled, ax=maps)
    report.save(figure)


def example(report: Report) -> None:
    torch.set_default_dtype(torch.float64)
    curve_fit = regression(report, *((50, 8) if report.small else (160, 40)))
    classes = classification(report, *((100, 8) if report.small else (300, 20)))
    draw(report, curve_fit, classes)


if __name__ == "__main__":
    sys.exit(main(example, __doc__))
