"""Logistic regression by Newton's method, with the exact Hessian and standard errors that a simulation confirms.

The maximum-likelihood fit of P(y = 1 | x) = 1 / (1 + exp(-x.w)) is found in three ways: by Newton's method written out below
with ``chainrule.hessian``, by SciPy's trust-region and Newton-CG methods through ``chainrule.scipy.minimize``, and by
SciPy's BFGS, which knows nothing but the values of the function. What to look for:

* The Hessian's plan is the product X^T D X that a statistician would write, though the function says nothing of it.
* Newton's error is squared in each step. The theory says more: the next error is half of H^-1 T[e, e], with T the third
  derivative and e the error. T[e, e] is a pushforward of a Hessian-vector product.
* Standard errors are the square roots of the diagonal of H^-1. To check them, the whole fit is repeated on hundreds
  of simulated responses at once: ``vmap`` over the Newton step, Hessian and all.

Source: Hastie, Tibshirani and Friedman, *The Elements of Statistical Learning*, 2nd ed., section 4.4; Nocedal and Wright,
*Numerical Optimization*, 2nd ed., theorem 3.5.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy import optimize
from support import Report, main, seconds

import chainrule
from chainrule.scipy import minimize

Tensor = torch.Tensor
EPS = torch.finfo(torch.float64).eps


def negative_log_likelihood(features: Tensor, response: Tensor, weight: Tensor) -> Tensor:
    """The objective: features of shape (n, d), responses of zeros and ones (n,), weights (d,)."""
    return F.binary_cross_entropy_with_logits(features @ weight, response, reduction="sum")


def simulate(samples: int, dimension: int) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated features with a constant one in front, responses drawn from the model, and the weights behind them."""
    mixing = torch.eye(dimension - 1) + 0.4 * torch.randn(dimension - 1, dimension - 1) / math.sqrt(dimension)
    features = torch.cat([torch.ones(samples, 1), torch.randn(samples, dimension - 1) @ mixing], 1)
    weight = 1.5 * torch.randn(dimension) / math.sqrt(dimension)
    return features, torch.bernoulli(torch.sigmoid(features @ weight)), weight


def newton_step(features: Tensor, response: Tensor, weight: Tensor) -> Tensor:
    """One full step. From weights of zero the likelihood of a logistic model seldom needs a shorter one."""
    objective = partial(negative_log_likelihood, features, response)
    return weight - torch.linalg.solve(chainrule.hessian(objective)(weight), chainrule.grad(objective)(weight))


def newton(features: Tensor, response: Tensor, steps: int) -> list[Tensor]:
    """All iterates, from zero."""
    iterates = [torch.zeros(features.shape[1])]
    for _ in range(steps):
        iterates.append(newton_step(features, response, iterates[-1]))
    return iterates


@dataclass
class Fit:
    """A problem with its Newton iterates, and what follows from the last of them."""

    features: Tensor
    response: Tensor
    iterates: list[Tensor]
    covariance: Tensor

    @property
    def optimum(self) -> Tensor:
        return self.iterates[-1]

    @property
    def standard_errors(self) -> Tensor:
        return self.covariance.diagonal().sqrt()

    @property
    def errors(self) -> list[float]:
        return [float((iterate - self.optimum).norm()) for iterate in self.iterates[:-1]]


def fit_by_newton(report: Report, features: Tensor, response: Tensor) -> Fit:
    """Fit, and check the optimum, the Hessian and the rate of convergence."""
    objective = partial(negative_log_likelihood, features, response)
    hessian = chainrule.hessian(objective)
    iterates = newton(features, response, 9)
    optimum = iterates[-1]
    fit = Fit(features, response, iterates, torch.linalg.inv(hessian(optimum)))

    report.say("\nNewton's method, distance to the optimum: " + " ".join(f"{error:.1e}" for error in fit.errors))
    # The score equations X^T (p - y) = 0, without any derivative: what rounding leaves is eps times the size of the terms.
    probability = torch.sigmoid(features @ optimum)
    terms = features.mT @ (probability - response)
    scale = (features.abs().mT @ (probability - response).abs()).max()
    report.check("score equations at the optimum, relative to their terms", float(terms.abs().max() / scale), below=1e-13)
    formula = features.mT @ ((probability * (1 - probability))[:, None] * features)
    report.check("Hessian beside X^T D X, relative", difference(hessian(optimum), formula), below=1e-13)
    report.check("Hessian beside the finite difference of the gradient", finite_difference_error(objective, optimum), below=1e-7)

    # The last step that starts far above rounding; its prediction is good up to terms of the third order in the error.
    before = max(k for k, error in enumerate(fit.errors) if error > 1e-5)
    error = iterates[before] - optimum
    _, bend = chainrule.jvp(lambda w: chainrule.hvp(objective, (w,), (error,)), (optimum,), (error,))
    predicted = fit.covariance @ bend / 2
    # The next order of Taylor's series: the ratio of third to second order is the size of x.e for the worst sample.
    allowed = 4 * float((features @ error).abs().max())
    report.check(
        f"step {before + 1}: the new error beside H^-1 T[e, e] / 2, relative",
        difference(iterates[before + 1] - optimum, predicted), below=allowed,
    )  # fmt: skip
    ratios = [math.log(b / a) for a, b in zip(fit.errors[:-1], fit.errors[1:], strict=True) if b > 1e-13]
    report.check("order of convergence, distance from 2 at the last steps", abs(ratios[-1] / ratios[-2] - 2), below=0.5)
    return fit


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max())


def finite_difference_error(objective: Callable[[Tensor], Tensor], weight: Tensor) -> float:
    """The Hessian's product with a vector beside a central difference of gradients."""
    direction = torch.randn_like(weight)
    direction /= direction.norm()
    step = 1e-5  # the error is about step² / 6, and eps / step from rounding
    gradient = chainrule.grad(objective)
    numeric = (gradient(weight + step * direction) - gradient(weight - step * direction)) / (2 * step)
    return difference(chainrule.hessian(objective)(weight) @ direction, numeric)


def fit_by_scipy(report: Report, fit: Fit) -> dict[str, list[float]]:
    """SciPy's methods with and without derivatives; returns the distances to the optimum of each, iterate by iterate."""
    objective, start = partial(negative_log_likelihood, fit.features, fit.response), np.zeros(fit.features.shape[1])
    optimum = fit.optimum.numpy()
    paths: dict[str, list[float]] = {}

    def run(method: str, **options: object) -> optimize.OptimizeResult:
        path = [start]
        if method == "BFGS":
            value = lambda w: float(objective(torch.from_numpy(w)))  # noqa: E731 - numpy in, a number out
            found = optimize.minimize(value, start, method=method, callback=lambda w: path.append(w.copy()))
        else:
            found = minimize(objective, start, method=method, callback=lambda w: path.append(w.copy()), **options)
        paths[method] = [float(np.linalg.norm(w - optimum)) for w in path]
        report.say(f"  {method:<14}{found.nit:>5} iterations, {found.nfev:>6} values of f, distance {paths[method][-1]:.1e}")
        return found

    report.say("\nSciPy, the first three with chainrule's derivatives, BFGS with SciPy's finite differences:")
    results = {
        "trust-exact": run("trust-exact", options={"gtol": 1e-8}),
        "trust-krylov": run("trust-krylov", options={"gtol": 1e-8}),
        "Newton-CG": run("Newton-CG", options={"xtol": 1e-10}),
        "BFGS": run("BFGS"),
    }
    value, dimension = float(objective(fit.optimum)), len(start)
    reach = float(torch.linalg.matrix_norm(fit.covariance, 2))  # a point with gradient g is at most |g| times this away
    # Trust regions judge steps by values, and these are all the same where e.H e / 2 is below their rounding.
    for method in ("trust-exact", "trust-krylov", "Newton-CG"):
        report.check(f"{method}: distance to Newton's optimum", paths[method][-1], below=2 * math.sqrt(2 * EPS * value * reach))
    # BFGS stops at entries of 1e-5 in the gradient; forward differences leave in them what rounding leaves of the value.
    blur = 1e-5 + EPS * value / math.sqrt(EPS)
    report.check(
        "BFGS by finite differences: distance to Newton's optimum", paths["BFGS"][-1],
        below=2 * math.sqrt(dimension) * blur * reach,
    )  # fmt: skip
    evaluations = results["trust-exact"].nfev / results["BFGS"].nfev
    report.check("function evaluations of trust-exact over those of BFGS", evaluations, below=0.1)
    return paths


def confirm_standard_errors(report: Report, fit: Fit, repetitions: int) -> Tensor:
    """The spread of the estimates over simulated responses, beside the standard errors."""
    probability = torch.sigmoid(fit.features @ fit.optimum)
    responses = torch.bernoulli(probability.expand(repetitions, -1))
    step = chainrule.vmap(partial(newton_step, fit.features))
    weights = fit.optimum.expand(repetitions, -1)
    for _ in range(6):
        weights = step(responses, weights)
    objective = partial(negative_log_likelihood, fit.features)
    gradients = chainrule.vmap(chainrule.grad(objective, argnums=1))(responses, weights)
    report.say(f"\nStandard errors, against {repetitions} simulated data sets fitted together:")
    report.check("largest gradient after the refits", float(gradients.abs().max()), below=1e-8)
    spread = weights.std(0) / fit.standard_errors
    # A standard deviation of R draws is known to one part in sqrt(2 R): four of these for the worst of all coefficients,
    # and the estimates spread by a little more than the limit of many samples says, by about d / n.
    allowed = 4 / math.sqrt(2 * repetitions) + 2 * fit.features.shape[1] / fit.features.shape[0]
    worst = float((spread - 1).abs().max())
    report.check("spread of the estimates over the standard errors, distance from 1", worst, below=allowed)
    return weights.std(0)


def explain_and_time(report: Report, fit: Fit) -> None:
    """The Hessian's plan, and its time beside that of torch.func (printed, not checked: a clock is no witness)."""
    objective = partial(negative_log_likelihood, fit.features, fit.response)
    report.say("\nThe plan of the Hessian:")
    report.say(str(chainrule.explain(chainrule.hessian(objective))(fit.optimum)))
    ours, theirs = chainrule.hessian(objective), torch.func.hessian(objective)
    report.check("Hessian beside torch.func's, relative", difference(ours(fit.optimum), theirs(fit.optimum)), below=1e-13)
    times = [(seconds(lambda: ours(fit.optimum)), seconds(lambda: theirs(fit.optimum))) for _ in range(7)]
    mine, other = (sorted(column)[3] * 1e3 for column in zip(*times, strict=True))
    report.say(f"  one Hessian: {mine:.2f} ms, torch.func.hessian {other:.2f} ms")


def draw(report: Report, fit: Fit, paths: dict[str, list[float]], spread: Tensor, truth: Tensor) -> None:
    """The convergence of all methods, and the coefficients with their intervals."""
    if report.picture is None:
        return
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogy(fit.errors, "o-", label="Newton, written out")
    for method, path in paths.items():
        left.semilogy([max(distance, 1e-16) for distance in path], ".-", alpha=0.8, label=f"{method} (SciPy)")
    left.set(xlabel="iteration", ylabel="distance to the optimum", title="Convergence", ylim=(1e-16, None))
    left.legend(loc="upper right")
    place = np.arange(len(truth))
    right.errorbar(place - 0.15, fit.optimum, 1.96 * fit.standard_errors, fmt="o", ms=4, capsize=2, label="estimate, 95 % by H⁻¹")
    right.errorbar(place + 0.15, fit.optimum, 1.96 * spread, fmt="none", capsize=2, color="gray", label="95 % by simulation")
    right.plot(place, truth, "kx", label="behind the data")
    right.set(xlabel="coefficient", title="Coefficients")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)
    report.save(figure)


def example(report: Report) -> None:
    torch.set_default_dtype(torch.float64)
    samples, dimension, repetitions = (500, 8, 200) if report.small else (5000, 40, 500)
    features, response, truth = simulate(samples, dimension)
    report.say(f"{samples} samples, {dimension} features")
    fit = fit_by_newton(report, features, response)
    paths = fit_by_scipy(report, fit)
    spread = confirm_standard_errors(report, fit, repetitions)
    explain_and_time(report, fit)
    draw(report, fit, paths, spread, truth)


if __name__ == "__main__":
    sys.exit(main(example, __doc__))
