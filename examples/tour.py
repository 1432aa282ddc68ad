"""A tour of Jacobians and Hessians: chainrule beside torch.func, one computation after another.

Every step computes the same thing twice, checks that both results agree, and takes the time of both.
Run it with ``make demo``; ``--quick`` (or ``--small``) takes less time. The exit status is 0 only if everything agrees.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer

import chainrule

Tensor = torch.Tensor


def predict(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """The function under study: one layer with a tanh."""
    return F.linear(x, weight, bias).tanh()


def predict_summed(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """The layer on a batch, its outputs summed over the batch."""
    return predict(weight, bias, x).sum(0)


def sine_sum(x: Tensor) -> Tensor:
    """A scalar function whose Hessian is diagonal."""
    return x.sin().sum()


def layer(inputs: int, outputs: int, batch: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Random weights, bias and input (a batch of inputs where ``batch`` is given)."""
    shape = (inputs,) if batch is None else (batch, inputs)
    return torch.randn(outputs, inputs), torch.randn(outputs), torch.randn(shape)


@dataclass(frozen=True)
class Step:
    """One computation of the tour.

    Attributes:
        title: what is computed.
        said: a sentence about it.
        arguments: the tensors.
        ours: the computation in chainrule.
        theirs: the computation in torch.
    """

    title: str
    said: str
    arguments: tuple[Tensor, ...]
    ours: Callable[..., Any]
    theirs: Callable[..., Any]


@dataclass(frozen=True)
class Outcome:
    """What a step gave: sizes, the largest relative difference, seconds of ours and of theirs."""

    step: Step
    shapes: tuple[tuple[int, ...], ...]
    difference: float
    agrees: bool
    ours: float
    theirs: float


# --- torch's side where it is more than one call --------------------------------------------------------------------


def rows_one_by_one(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """A Jacobian row by row: one backward pass per unit vector."""
    tracked = x.detach().requires_grad_()
    units = torch.eye(weight.shape[0], dtype=x.dtype)
    return torch.stack([torch.autograd.grad(predict(weight, bias, tracked), tracked, unit)[0] for unit in units])


def rows_by_vmap(library: Any, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """A Jacobian by a pullback that is vectorised over unit vectors, in either library."""
    _, pullback = library.vjp(partial(predict, weight, bias), x)
    (rows,) = library.vmap(pullback)(torch.eye(weight.shape[0], dtype=x.dtype))
    return rows


def hvp_forward_over_reverse(library: Any, x: Tensor, tangent: Tensor) -> Tensor:
    """The pushforward of the gradient."""
    return library.jvp(library.grad(sine_sum), (x,), (tangent,))[1]


def hvp_reverse_over_reverse(library: Any, x: Tensor, tangent: Tensor) -> Tensor:
    """The pullback of the gradient."""
    return library.vjp(library.grad(sine_sum), x)[1](tangent)[0]


def summed_jacobian(library: Any, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Jacobians of all samples from the Jacobian of the sum: sample i's output depends on sample i only."""
    return library.jacrev(predict_summed, argnums=2)(weight, bias, x).movedim(1, 0)


# --- the steps ------------------------------------------------------------------------------------------------------


def steps() -> Iterator[Step]:
    """The computations, in order."""
    torch.manual_seed(0)
    func = torch.func
    small = layer(16, 16)
    jacobian = chainrule.jacobian(predict, argnums=2)
    yield Step(
        "Jacobian 16→16, against a loop",
        "The plain way: one call of autograd.grad per row.",
        small, jacobian, rows_one_by_one,
    )  # fmt: skip
    yield Step(
        "the same, vmap over a pullback",
        "The rows are independent, so the pullback can be vectorised.",
        small, partial(rows_by_vmap, chainrule), partial(rows_by_vmap, func),
    )  # fmt: skip
    yield Step(
        "jacrev, argnums=2",
        "The two in one call.",
        small, chainrule.jacrev(predict, argnums=2), func.jacrev(predict, argnums=2),
    )  # fmt: skip
    yield Step(
        "jacrev, argnums=(0, 1)",
        "With respect to the weights and the bias; the first block is mostly zeros.",
        small, chainrule.jacrev(predict, argnums=(0, 1)), func.jacrev(predict, argnums=(0, 1)),
    )  # fmt: skip
    for inputs, outputs, said in (
        (32, 2048, "Tall: few inputs, many outputs, where torch.func wants forward mode."),
        (2048, 32, "Wide: many inputs, few outputs, where torch.func wants reverse mode."),
    ):
        shape = layer(inputs, outputs)
        for name in ("jacfwd", "jacrev"):
            ours, theirs = getattr(chainrule, name), getattr(func, name)
            yield Step(f"{name} {inputs}→{outputs}", said, shape, ours(predict, argnums=2), theirs(predict, argnums=2))
        best = func.jacfwd if inputs < outputs else func.jacrev
        said = "chainrule.jacobian picks the order itself; torch.func gets its better one."
        yield Step(f"jacobian {inputs}→{outputs}", said, shape, jacobian, best(predict, argnums=2))
    wide = layer(512, 32)
    yield Step(
        "hessian 512→32",
        "A Jacobian of a Jacobian: 32 × 512 × 512 numbers.",
        wide, chainrule.hessian(predict, argnums=2), func.hessian(predict, argnums=2),
    )  # fmt: skip
    yield Step(
        "jacfwd(jacfwd) 512→32",
        "Forward over forward.",
        wide, nested(chainrule.jacfwd), nested(func.jacfwd),
    )  # fmt: skip
    yield Step(
        "jacrev(jacrev) 128→32",
        "Reverse over reverse, smaller, as torch.func needs gigabytes for it at 512.",
        layer(128, 32), nested(chainrule.jacrev), nested(func.jacrev),
    )  # fmt: skip
    batch = layer(31, 33, 64)
    dims = (None, None, 0)
    yield Step(
        "Jacobian per sample, 64 × 31→33",
        "vmap over the samples.",
        batch,
        chainrule.vmap(chainrule.jacrev(predict, argnums=2), in_dims=dims),
        func.vmap(func.jacrev(predict, argnums=2), in_dims=dims),
    )
    yield Step(
        "the same, by the summed output",
        "Summing over the batch keeps the samples apart in the input.",
        batch, partial(summed_jacobian, chainrule), partial(summed_jacobian, func),
    )  # fmt: skip
    yield Step(
        "Hessian per sample, 64 × 31→33",
        "vmap over a Hessian.",
        batch,
        chainrule.vmap(chainrule.hessian(predict, argnums=2), in_dims=dims),
        func.vmap(func.hessian(predict, argnums=2), in_dims=dims),
    )
    vectors = (torch.randn(2048), torch.randn(2048))
    yield Step(
        "hvp n=2048, forward over reverse",
        "The Hessian times a vector, without the Hessian.",
        vectors, partial(hvp_forward_over_reverse, chainrule), partial(hvp_forward_over_reverse, func),
    )  # fmt: skip
    yield Step(
        "hvp n=2048, reverse over reverse",
        "The same by two pullbacks.",
        vectors, partial(hvp_reverse_over_reverse, chainrule), partial(hvp_reverse_over_reverse, func),
    )  # fmt: skip


def nested(transform: Callable[..., Any]) -> Callable[..., Any]:
    """A Jacobian transform applied to itself."""
    return transform(transform(predict, argnums=2), argnums=2)


# --- running them ---------------------------------------------------------------------------------------------------


def largest_difference(ours: Any, theirs: Any) -> float:
    """The largest difference of two results, relative to the largest entry; infinite where the shapes differ."""
    first, second = tree_leaves(ours), tree_leaves(theirs)
    if [leaf.shape for leaf in first] != [leaf.shape for leaf in second]:
        return float("inf")
    worst = 0.0
    for one, other in zip(first, second, strict=True):
        scale = max(other.abs().max().item(), 1e-30)
        worst = max(worst, (one - other).abs().max().item() / scale)
    return worst


def agreement(step: Step) -> tuple[float, tuple[tuple[int, ...], ...]]:
    """The largest relative difference in float64, over a first call and one that reuses the plan."""
    arguments = tuple(argument.double() for argument in step.arguments)
    expected = step.theirs(*arguments)
    difference = max(largest_difference(step.ours(*arguments), expected) for _ in range(2))
    return difference, tuple(tuple(leaf.shape) for leaf in tree_leaves(expected))


def seconds(function: Callable[..., Any], arguments: tuple[Tensor, ...], budget: float) -> float:
    """The median time of a call, after one that is not counted."""
    function(*arguments)
    timer = Timer("f(*a)", globals={"f": function, "a": arguments})
    return timer.blocked_autorange(min_run_time=budget).median


def run(step: Step, budget: float) -> Outcome:
    """Compare and time one step."""
    difference, shapes = agreement(step)
    ours, theirs = seconds(step.ours, step.arguments, budget), seconds(step.theirs, step.arguments, budget)
    # float64 rounding, times the cancellation in 1 - tanh² where tanh saturates
    return Outcome(step, shapes, difference, difference < 1e-9, ours, theirs)


def row(outcome: Outcome) -> str:
    """A line of the table."""
    shapes = " ".join("×".join(map(str, shape)) or "()" for shape in outcome.shapes)
    verdict = "agree" if outcome.agrees else f"DIFFER by {outcome.difference:.1e}"
    return (
        f"{outcome.step.title:<34}{shapes:<22}{outcome.ours * 1e6:>12.0f}{outcome.theirs * 1e6:>14.0f}"
        f"{outcome.theirs / outcome.ours:>10.1f}×  {verdict}"
    )


HEADER = f"{'computation':<34}{'result':<22}{'chainrule µs':>12}{'torch µs':>14}{'speed-up':>11}  result"


def plan_text() -> str:
    """The plan of the wide Jacobian."""
    torch.manual_seed(0)
    explain = getattr(chainrule, "explain", None)
    if explain is None:
        return "this version has no explain"
    return str(explain(chainrule.jacobian(predict, argnums=2))(*layer(2048, 32)))


def main(arguments: list[str] | None = None) -> int:
    """Run the tour; 0 if everything agrees."""
    parser = argparse.ArgumentParser(description="chainrule beside torch.func")
    parser.add_argument("--quick", "--small", action="store_true", help="measure for a shorter time")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    budget = 0.02 if given.quick else 0.3
    print(f"chainrule {chainrule.__version__}, torch {torch.__version__}, float32 on one CPU thread; agreement in float64\n")
    print(HEADER)
    outcomes = []
    for step in steps():
        outcome = run(step, budget)
        outcomes.append(outcome)
        print(row(outcome), flush=True)
    print("\nThe plan of the Jacobian 2048→32:\n")
    print(plan_text())
    failed = [outcome for outcome in outcomes if not outcome.agrees]
    print(f"\n{len(outcomes) - len(failed)} of {len(outcomes)} computations agree.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
