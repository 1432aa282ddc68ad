"""Nonlinear programs in the form that cyipopt's ``Problem`` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from chainrule.scipy.functions import Device, TorchFunction, scalar_of, vector_of
from chainrule.scipy.linearised import twice
from chainrule.transforms.derivatives import grad, grad_and_value
from chainrule.transforms.jacobians import hessian, jacobian
from chainrule.transforms.sparsity import sparsity


class NLPProblem:
    """The callbacks of a nonlinear program, sparse and exact; made by :func:`nlp_problem`.

    Attributes:
        n: the number of variables.
        m: the number of constraints.
    """

    def __init__(self, objective: TorchFunction, constraints: TorchFunction | None, x0: np.ndarray) -> None:
        self._objective, self._constraints = objective, constraints
        self.n = x0.size
        x = objective.tensor(x0)
        scalar, vector = scalar_of(objective), _no_constraints if constraints is None else vector_of(constraints)
        with (constraints or objective).named():
            self.m = vector(x).numel()
            pattern = sparsity(vector, x, global_=True).indices if self.m else None
        empty = np.empty((2, 0), dtype=np.int64)
        self._jacobian_structure = empty if pattern is None else pattern.cpu().numpy()
        lagrangian = _lagrangian(scalar, vector if self.m else None)
        with objective.named():
            multipliers = torch.ones(self.m, dtype=torch.float64, device=x.device)
            scalar(x)
            rows, columns = sparsity(grad(lagrangian), x, x.new_ones(()), multipliers, global_=True).indices.cpu().numpy()
        lower = rows >= columns
        self._hessian_structure = np.stack([rows[lower], columns[lower]])
        self._slopes = objective.derived("gradient", lambda: grad_and_value(scalar), scalar)
        if constraints is not None:
            self._rows = constraints.derived(
                "jacobian", lambda: jacobian(twice(vector), has_aux=True, layout="sparse_coo"), vector
            )
        others = [constraints] if constraints is not None and self.m else []
        self._curvatures = objective.derived(
            "hessian", lambda: hessian(lagrangian, layout="sparse_coo", triangular="lower"), lagrangian, others
        )

    def _gradient_and_value(self, x: np.ndarray, reader: str) -> tuple[np.ndarray, float]:
        function = self._objective

        def compute() -> tuple[np.ndarray, float]:
            gradient, value = self._slopes(function.tensor(x))
            return function.array(gradient, what="gradient"), float(function.array(value))

        return function.once("run", (x,), compute, reader)

    def objective(self, x: np.ndarray) -> float:
        """The value at ``x``."""
        return self._gradient_and_value(x, "value")[1]

    def gradient(self, x: np.ndarray) -> np.ndarray:
        """The gradient at ``x``, ``(n,)``; computed with the value."""
        return self._gradient_and_value(x, "gradient")[0].copy()

    def _jacobian_and_value(self, x: np.ndarray, reader: str) -> tuple[np.ndarray, np.ndarray]:
        function = self._constraints
        if function is None or not self.m:
            return np.empty(0), np.empty(0)

        def compute() -> tuple[np.ndarray, np.ndarray]:
            found, value = self._rows(function.tensor(x))
            entries = _placed(function, found, self._jacobian_structure, "Jacobian")
            return entries, function.array(value, (self.m,))

        return function.once("run", (x,), compute, reader)

    def constraints(self, x: np.ndarray) -> np.ndarray:
        """The constraints' values at ``x``, ``(m,)``."""
        return self._jacobian_and_value(x, "value")[1].copy()

    def jacobianstructure(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the constraints' Jacobian, for all ``x``."""
        return self._jacobian_structure[0].copy(), self._jacobian_structure[1].copy()

    def jacobian(self, x: np.ndarray) -> np.ndarray:
        """The values at :meth:`jacobianstructure`; computed with those of the constraints."""
        return self._jacobian_and_value(x, "jacobian")[0].copy()

    def hessianstructure(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the lower triangle of the Lagrangian's Hessian, for all ``x`` and multipliers."""
        return self._hessian_structure[0].copy(), self._hessian_structure[1].copy()

    def hessian(self, x: np.ndarray, lagrange: np.ndarray, obj_factor: float) -> np.ndarray:
        """The values at :meth:`hessianstructure` of the Hessian of ``obj_factor * objective + lagrange · constraints``."""
        function = self._objective
        with function.named():
            given = function.tensor(x), function.tensor(obj_factor), function.tensor(lagrange)
            return _placed(function, self._curvatures(*given), self._hessian_structure, "Hessian")


def _no_constraints(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(0)


def _lagrangian(scalar: Callable[..., torch.Tensor], vector: Callable[..., torch.Tensor] | None) -> Callable[..., torch.Tensor]:
    """``factor · scalar(x) + multipliers · vector(x)``."""
    if vector is None:
        return lambda x, factor, multipliers: factor * scalar(x)

    def lagrangian(x: torch.Tensor, factor: torch.Tensor, multipliers: torch.Tensor) -> torch.Tensor:
        return factor * scalar(x) + (multipliers * vector(x)).sum()

    return lagrangian


def _placed(function: TorchFunction, found: torch.Tensor, structure: np.ndarray, what: str) -> np.ndarray:
    """The values of a coalesced COO matrix at the entries of a structure that holds its own; zero elsewhere."""
    width = max(found.shape[1], 1)
    here = (found.indices()[0] * width + found.indices()[1]).cpu().numpy()
    places = structure[0] * width + structure[1]
    values = function.array(found.values(), what=what)
    if np.array_equal(here, places):
        return values
    at = np.searchsorted(places, here)
    known = np.isin(here, places)
    # A replay may hold zeros that the structure leaves out.
    if (values[~known] != 0).any():
        raise ValueError(
            f"{function.where}: the pattern of its {what} is larger here than at the first point, as if Python had taken "
            "another branch"
        )
    out = np.zeros(places.size)
    out[at[known]] = values[known]
    return out


def nlp_problem(
    objective: Callable[..., Any],
    x0: Any,
    constraints: Callable[..., Any] | None = None,
    *,
    device: Device = None,
    allow_nan: bool = False,
    compiled: bool | None = None,
) -> NLPProblem:
    """Return the callbacks of a nonlinear program for interior-point solvers, in the form that cyipopt takes.

    The structures are read off the functions once, for all values (:func:`chainrule.sparsity` with ``global_=True``).

    Args:
        objective: a function of a float64 tensor of shape ``(n,)`` that returns a real tensor of shape ``()``.
        x0: a point of shape ``(n,)`` at which the structure is read.
        constraints: a function of the same tensor that returns shape ``(m,)``; None for no constraints.
        device: as in :func:`minimize`.
        allow_nan: as in :func:`minimize`.
        compiled: as in :func:`minimize`.

    Returns:
        An object for ``cyipopt.Problem(n=problem.n, m=problem.m, problem_obj=problem, lb=..., ub=..., cl=..., cu=...)``.

    Raises:
        TypeError: if a function does not return a real tensor.
        ValueError: if ``x0`` is no vector, the objective no scalar, the constraints no vector; when called, if a value or
            derivative is NaN.

    Example:
        >>> import numpy as np
        >>> from chainrule.scipy import nlp_problem
        >>> problem = nlp_problem(lambda x: (x**2).sum(), np.ones(3), lambda x: x[1:] * x[:-1])
        >>> problem.jacobianstructure()[1], problem.jacobian(np.array([1.0, 2.0, 3.0]))
        (array([0, 1, 1, 2]), array([2., 1., 3., 2.]))
    """
    point = np.asarray(x0, dtype=np.float64)
    if point.ndim != 1:
        raise ValueError(f"chainrule.scipy.nlp_problem: x0 must be a vector, got shape {point.shape}")
    found = TorchFunction(objective, "nlp_problem", device, allow_nan, compiled)
    limits = None if constraints is None else TorchFunction(constraints, "nlp_problem", device, allow_nan, compiled)
    return NLPProblem(found, limits, point)


__all__ = ["NLPProblem", "nlp_problem"]
