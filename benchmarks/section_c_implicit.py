"""Section C: a step of implicit Euler (C4), and Hessian-vector products through an ODE's solution (C6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.optimize._numdiff import approx_derivative, group_columns
from scipy.sparse.linalg import splu

import chainrule
from benchmarks.measure import peak_memory
from benchmarks.report import size as bytes_text
from benchmarks.scientific import brusselator, brusselator_state, hand_brusselator, rolled
from benchmarks.section_c_sparse import Coloured
from benchmarks.workload import Expression, Targets, Workload

tf = torch.func
Tensor = torch.Tensor

#: A time step at which Newton's method takes a handful of iterations from the initial values.
STEP = 0.02

#: The relative size of the last Newton correction.
CORRECTION = 1e-9

#: What makes the right-hand side's value and its Jacobian as a SciPy matrix, at a point.
Derivative = Callable[[np.ndarray], tuple[np.ndarray, Any]]


# --- C4 -------------------------------------------------------------------------------------------------------------


def implicit_step(derivative: Derivative, state: np.ndarray) -> tuple[np.ndarray, int]:
    """The solution of ``y = state + STEP f(y)`` by Newton's method with a sparse LU factorisation, and its iterations."""
    y, identity = state.copy(), sparse.identity(state.size, format="csc")
    for iteration in range(1, 30):
        value, jacobian = derivative(y)
        # The pattern is symmetric: the ordering made for that halves the factors, and the time, of the default one.
        factors = splu((identity - STEP * jacobian).tocsc(), permc_spec="MMD_AT_PLUS_A")
        correction = factors.solve(y - state - STEP * value)
        y -= correction
        if np.abs(correction).max() <= CORRECTION * np.abs(y).max():
            return y, iteration
    raise ArithmeticError("Newton's method did not converge")


def _csr(found: Tensor) -> Any:
    parts = (found.values(), found.col_indices(), found.crow_indices())
    return sparse.csr_matrix(tuple(part.numpy() for part in parts), shape=tuple(found.shape))


class Brusselator:
    """The right-hand side on flat NumPy arrays, and its Jacobian in several ways."""

    def __init__(self, side: int) -> None:
        self.side, self.shape = side, (2, side, side)
        self.rhs = brusselator(rolled)
        self._exact = chainrule.jacobian(self._twice, has_aux=True, layout="sparse_csr")

    def _twice(self, state: Tensor) -> tuple[Tensor, Tensor]:
        value = self.rhs(state)
        return value, value

    def tensor(self, y: np.ndarray) -> Tensor:
        """The array as the right-hand side takes it."""
        return torch.from_numpy(y).view(self.shape)

    def value(self, y: np.ndarray) -> np.ndarray:
        """The right-hand side."""
        return self.rhs(self.tensor(y)).reshape(-1).numpy()

    def exact(self, y: np.ndarray) -> tuple[np.ndarray, Any]:
        """Value and Jacobian by chainrule, in one run."""
        jacobian, value = self._exact(self.tensor(y))
        return value.reshape(-1).numpy(), _csr(jacobian)

    @property
    def pattern(self) -> tuple[Any, np.ndarray]:
        """The known pattern and the groups of columns that share no row, made once."""
        return _pattern(self.side)

    def differences(self, method: str) -> Derivative:
        """Value, and Jacobian by finite differences along the groups."""

        def derivative(y: np.ndarray) -> tuple[np.ndarray, Any]:
            value = self.value(y)
            return value, approx_derivative(self.value, y, method=method, f0=value, sparsity=self.pattern)

        return derivative

    @property
    def coloured(self) -> Derivative:
        """Value, and Jacobian by torch.func along the groups."""
        compressed = _compressed(self.side)
        return lambda y: (self.value(y), _csr(compressed(self.tensor(y))))


@lru_cache(maxsize=2)
def _pattern(side: int) -> tuple[Any, np.ndarray]:
    structure = _csr(hand_brusselator(torch.ones_like(brusselator_state(side))))
    structure.data[:] = 1
    return structure, group_columns(structure)


@lru_cache(maxsize=2)
def _compressed(side: int) -> Coloured:
    return Coloured(brusselator(rolled), hand_brusselator(brusselator_state(side)))


def implicit_row(key: str, side: int) -> Workload:
    """C4."""
    problem = Brusselator(side)

    def step(derivative: Callable[[], Derivative]) -> Expression:
        def run(state: Tensor) -> Tensor:
            return torch.from_numpy(implicit_step(derivative(), state.reshape(-1).numpy())[0])

        return run

    ways: dict[str, Callable[[], Derivative]] = {
        "chainrule": lambda: problem.exact,
        "2-point differences": lambda: problem.differences("2-point"),
        "3-point differences": lambda: problem.differences("3-point"),
        "torch.func, coloured": lambda: problem.coloured,
    }

    def account(state: Tensor) -> Mapping[str, str]:
        start = state.reshape(-1).numpy()
        solution = implicit_step(problem.exact, start)[0]
        by_hand = _csr(hand_brusselator(problem.tensor(solution)))
        largest = abs(by_hand).max()
        found = {}
        for name, way in ways.items():
            error = abs(way()(solution)[1] - by_hand).max() / largest
            found[name] = f"{implicit_step(way(), start)[1]} Newton iterations, Jacobian off by {error:.1e} of its largest entry"
        return found

    return Workload(
        key=key,
        title=f"a step of implicit Euler on C1, {side}×{side}, Newton with SciPy's sparse LU",
        inputs=lambda: (brusselator_state(side),),
        ours={"exact Jacobian": step(ways["chainrule"])},
        peers={},
        targets=Targets(differences_eager=1),
        dtype=torch.float64,
        # Newton's last correction is CORRECTION at most, with exact Jacobians its square is left.
        tolerance=10 * CORRECTION,
        coloured={"vmap(jvp)": step(ways["torch.func, coloured"])},
        differences={name: step(ways[name]) for name in ("2-point differences", "3-point differences")},
        account=account,
        solve=True,
    )


# --- C6 -------------------------------------------------------------------------------------------------------------


def predator_prey(state: Tensor, rates: Tensor) -> Tensor:
    """The equations of Lotka and Volterra for a state of shape (2,) and four rates."""
    product = state[0] * state[1]
    return torch.stack([rates[0] * state[0] - rates[1] * product, rates[2] * product - rates[3] * state[1]])


def final_distance(steps: int) -> Callable[[Tensor], Tensor]:
    """The squared distance to a target after steps of RK4, as a function of the rates and the start, shape (6,)."""

    def loss(parameters: Tensor) -> Tensor:
        rates, state, h = parameters[:4], parameters[4:], 10.0 / steps
        for _ in range(steps):
            first = predator_prey(state, rates)
            second = predator_prey(state + 0.5 * h * first, rates)
            third = predator_prey(state + 0.5 * h * second, rates)
            fourth = predator_prey(state + h * third, rates)
            state = state + h / 6 * (first + 2 * second + 2 * third + fourth)
        return ((state - 1.0) ** 2).sum()

    return loss


def _product(library: Any, function: Expression, order: str) -> Expression:
    gradient = library.grad(function)
    if order == "jvp(grad)":
        return lambda x, v: library.jvp(gradient, (x,), (v,))[1]
    return lambda x, v: library.vjp(gradient, x)[1](v)[0]


def ode_row(key: str, order: str, steps: int) -> Workload:
    """C6."""
    loss = final_distance(steps)
    orders = ("jvp(grad)", "vjp(grad)")
    ours, peers = ({order: _product(library, loss, order) for order in orders} for library in (chainrule, tf))

    def account(x: Tensor, v: Tensor) -> Mapping[str, str]:
        measured = {f"chainrule {order}": ours[order], **{f"torch.func {name}": made for name, made in peers.items()}}
        return {f"peak memory of {name}": bytes_text(peak_memory(made, (x, v), str(x.device))) for name, made in measured.items()}

    return Workload(
        key=key,
        title=f"Hessian-vector product through {steps} RK4 steps, {order}",
        inputs=lambda: (torch.tensor([1.1, 0.4, 0.1, 0.4, 2.0, 1.0]).double(), torch.randn(6, dtype=torch.float64)),
        ours={order: ours[order]},
        peers=peers,
        targets=Targets(1),
        dtype=torch.float64,
        function=lambda x, v: loss(x),
        account=account,
        compiled=False,  # thousands of calls: recording them anew takes minutes
        large=steps > 10,
    )


WORKLOADS: tuple[Workload, ...] = (
    implicit_row("C4", 32), implicit_row("C4l", 64), ode_row("C6f", "jvp(grad)", 100), ode_row("C6r", "vjp(grad)", 100),
)  # fmt: skip

#: The same rows at sizes that every test run can afford.
SMALL: tuple[Workload, ...] = (
    implicit_row("C4", 6), implicit_row("C4l", 5), ode_row("C6f", "jvp(grad)", 3), ode_row("C6r", "vjp(grad)", 2),
)  # fmt: skip
