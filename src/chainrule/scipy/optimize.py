"""``scipy.optimize.minimize`` and its constraints, with derivatives of torch functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import optimize, sparse

from chainrule.scipy.functions import (
    Device,
    TorchFunction,
    check_absent,
    check_layout,
    matrix,
    scalar_of,
)
from chainrule.scipy.lengths import Length
from chainrule.scipy.linearised import Linearisation, Linearised
from chainrule.transforms.derivatives import grad_and_value
from chainrule.transforms.jacobians import hessian

_WITHOUT_GRADIENT = frozenset({"nelder-mead", "powell", "cobyla", "cobyqa"})
_WITH_PRODUCTS = frozenset({"newton-cg", "trust-ncg", "trust-krylov"})
#: Products are made of Hessians of at most so many rows.
_HELD = 128

_WITH_HESSIAN = frozenset({"trust-exact", "dogleg"})


class _Objective:
    """The callbacks of a scalar function: value and gradient in one run, Hessians once per point."""

    def __init__(self, function: TorchFunction, layout: str) -> None:
        self.function, self.layout = function, layout
        self._scalar = scalar = scalar_of(function)
        self._values = function.values("scalar", scalar)
        self._both = function.derived("gradient", lambda: grad_and_value(scalar), scalar)
        kind = "sparse_coo" if layout == "sparse" else "dense"
        self._hessian = function.derived(("hessian", kind), lambda: hessian(scalar, layout=kind), scalar)
        #: How many products were asked for at the last point, and whether they are made of the Hessian itself.
        self._asked: tuple[bytes, int] = b"", 0
        self._is_held = False

    def _run(self, x: np.ndarray, args: tuple[Any, ...]) -> tuple[float, np.ndarray]:
        def compute() -> tuple[float, np.ndarray]:
            gradient, value = self._call(self._both, x, args)
            slope = self.function.array(gradient, what="gradient")
            self.function.check_gradient(self._scalar, x, args, slope)
            return float(self.function.array(value)), slope

        found: tuple[float, np.ndarray] = self.function.once("run", (x, *args), compute)
        return found

    def _call(self, values: Callable[..., Any], x: np.ndarray, args: tuple[Any, ...]) -> Any:
        return self.function.run(values, (x,), args)

    def plain(self, x: np.ndarray, *args: Any) -> float:
        with self.function.named():
            value = self._call(self._values, x, args)
            return float(self.function.array(value))

    def value(self, x: np.ndarray, *args: Any) -> float:
        return self._run(x, args)[0]

    def gradient(self, x: np.ndarray, *args: Any) -> np.ndarray:
        return self._run(x, args)[1].copy()

    def _operator(self, x: np.ndarray, args: tuple[Any, ...]) -> Any:
        def compute() -> Any:
            return hessian(self._scalar, layout="operator")(self.function.tensor(x), *self.function.extra(args)).scipy()

        return self.function.once("operator", (x, *args), compute)

    def _holds(self, x: np.ndarray) -> bool:
        """Whether products are made of the Hessian: it is small, and half as many as it has rows were asked for at a point.

        It takes no more than a product for each of its rows, and far less where it is replayed.
        """
        if not self._is_held and x.size <= _HELD and self.layout != "sparse":
            point, (last, count) = x.tobytes(), self._asked
            self._is_held = point != last and 2 * count >= x.size
            self._asked = point, count + 1 if point == last else 1
        return self._is_held

    def product(self, x: np.ndarray, vector: np.ndarray, *args: Any) -> np.ndarray:
        if self._holds(x):
            return self._matrix(x, args) @ vector  # type: ignore[no-any-return]
        operator = self._operator(x, args)
        with self.function.named():
            found = operator @ vector
            self.function.check(found, "Hessian-vector product")
            return found

    def hessian(self, x: np.ndarray, *args: Any) -> Any:
        return self._operator(x, args) if self.layout == "operator" else self._matrix(x, args).copy()

    def _matrix(self, x: np.ndarray, args: tuple[Any, ...]) -> Any:
        def compute() -> Any:
            found = self._call(self._hessian, x, args)
            return matrix(self.function, found, (x.size, x.size), "Hessian")

        return self.function.once("hessian", (x, *args), compute)


def minimize(
    fun: Callable[..., Any],
    x0: Any,
    args: Any = (),
    method: Any = None,
    *,
    layout: str | None = None,
    device: Device = None,
    allow_nan: bool = False,
    compiled: bool | None = None,
    **options: Any,
) -> Any:
    """``scipy.optimize.minimize`` of a torch function, with its exact gradient and, where the method uses it, Hessian.

    The value and the gradient come from one run. Newton-CG, trust-ncg and trust-krylov get products with the Hessian from one
    record per point; trust-exact and dogleg get the dense Hessian, and trust-constr the Hessian in ``layout``.

    Args:
        fun: a function of a float64 tensor of shape ``(n,)`` (and ``args``) that returns a real tensor of shape ``()``.
        x0: the first point, ``(n,)``.
        args: further arguments; numpy arrays of floats reach ``fun`` as float64 tensors, others unchanged. (In a replay, tensors
            stand for floats, too, where that makes no difference.)
        method: as in SciPy. Methods without derivatives get none.
        layout: the Hessian's form: ``"dense"``, ``"operator"`` (products), or ``"sparse"`` (CSR; trust-constr alone).
            None takes what the method is made for.
        device: where the function runs; None for the CPU.
        allow_nan: whether NaN goes on to SciPy; it raises otherwise.
        compiled: whether calls are replayed by :func:`chainrule.compile`. None replays those that repeat, where the code of
            the function visibly does nothing but compute; True all of them; False none.
        options: ``bounds``, ``constraints`` (SciPy's own, or :func:`nonlinear_constraint`), ``tol``, ``options``, ``callback``.

    Returns:
        SciPy's ``OptimizeResult``.

    Raises:
        TypeError: if ``fun`` does not return a real tensor, or a derivative is given.
        ValueError: if ``fun`` does not return a scalar; if its value or a derivative is NaN; if the method does not take
            the layout.
        RuntimeError: if the gradient is zero because values left torch on the way (``.item()``) or are detached.

    Example:
        >>> import numpy as np
        >>> from chainrule.scipy import minimize
        >>> result = minimize(lambda x: ((x - 1) ** 4 + x**2).sum(), np.zeros(3), method="trust-exact")
        >>> bool(result.success), result.x.round(3)
        (True, array([0.41, 0.41, 0.41]))
    """
    check_absent(options, ("jac", "hess", "hessp"), "minimize")
    name = method.lower() if isinstance(method, str) else method
    if not isinstance(args, tuple):
        args = (args,)
    function = TorchFunction(fun, "minimize", device, allow_nan, compiled, args)
    objective = _Objective(function, layout or "dense")
    _begin(options.get("constraints"))
    if isinstance(name, str | None) and name != "trust-constr" and "constraints" in options:
        options["constraints"] = _first_order(options["constraints"])
    if isinstance(name, str) and name in _WITHOUT_GRADIENT:
        return optimize.minimize(objective.plain, x0, args=args, method=method, **options)
    derivatives: dict[str, Any] = {"jac": objective.gradient}
    if name in _WITH_PRODUCTS or callable(name):
        check_layout(layout or "operator", f"minimize(method={method!r})", ("dense", "operator"))
        if layout == "dense":
            derivatives["hess"] = objective.hessian
        else:
            derivatives["hessp"] = objective.product
    elif name in _WITH_HESSIAN:
        check_layout(objective.layout, f"minimize(method={method!r})", ("dense",))
        derivatives["hess"] = objective.hessian
    elif name == "trust-constr":
        check_layout(objective.layout, "minimize(method='trust-constr')")
        derivatives["hess"] = objective.hessian
    elif layout is not None:
        raise ValueError(f"chainrule.scipy.minimize: method {method!r} uses no Hessian, so layout={layout!r} has no meaning")
    found = optimize.minimize(objective.value, x0, args=args, method=method, **derivatives, **options)
    function.check_pending()
    return found


def _begin(constraints: Any) -> None:
    """Let constraints forget of earlier solves how many values they have, and look at the zeros of their derivatives again."""
    for constraint in constraints if isinstance(constraints, list | tuple) else (constraints,):
        if isinstance(constraint, _Constraint):
            constraint.length.forget()
            constraint.linearise.begin()


def _first_order(constraints: Any) -> Any:
    """Constraints for a method that uses dense Jacobians and no Hessians, and would warn of those that are given."""
    if isinstance(constraints, list | tuple):
        return [_first_order(constraint) for constraint in constraints]
    if not isinstance(constraints, _Constraint):
        return constraints

    def jacobian(x: np.ndarray) -> np.ndarray:
        found = constraints.jac(x)
        return found.toarray() if sparse.issparse(found) else found

    return optimize.NonlinearConstraint(
        constraints.fun, constraints.lb, constraints.ub, jac=jacobian, keep_feasible=constraints.keep_feasible
    )


class _Constraint(optimize.NonlinearConstraint):  # type: ignore[misc]
    """A constraint with exact second derivatives.

    Attributes:
        length: how many values it has.
        linearise: gives its values and Jacobians.
    """

    length: Length
    linearise: Linearisation


def nonlinear_constraint(
    fun: Callable[..., Any],
    lb: Any,
    ub: Any,
    *,
    layout: str = "dense",
    keep_feasible: Any = False,
    device: Device = None,
    allow_nan: bool = False,
    compiled: bool | None = None,
) -> Any:
    """A ``scipy.optimize.NonlinearConstraint``, ``lb <= fun(x) <= ub``, with the exact derivatives of a torch function.

    Its Jacobian and the Hessian of ``v · fun(x)`` are in ``layout``; a Jacobian as an operator does not exist in SciPy.

    Args:
        fun: a function of a float64 tensor of shape ``(n,)`` that returns a real tensor of shape ``(m,)`` or ``()``.
        lb: lower bounds, as in SciPy.
        ub: upper bounds, as in SciPy.
        layout: ``"dense"`` or ``"sparse"`` (CSR; for trust-constr).
        keep_feasible: as in SciPy.
        device: as in :func:`minimize`.
        allow_nan: as in :func:`minimize`.
        compiled: as in :func:`minimize`.

    Returns:
        SciPy's object.

    Raises:
        ValueError: if the layout is unknown; when called, if ``fun`` returns a matrix, NaN, or another number of values than
            at the first point of a solve.

    Example:
        >>> import numpy as np
        >>> from chainrule.scipy import minimize, nonlinear_constraint
        >>> circle = nonlinear_constraint(lambda x: (x**2).sum(), 1.0, 1.0)
        >>> minimize(lambda x: x.sum(), np.array([-1.0, 0.0]), method="SLSQP", constraints=circle).x.round(4)
        array([-0.7071, -0.7071])
    """
    check_layout(layout, "nonlinear_constraint", ("dense", "sparse"))
    function = TorchFunction(fun, "nonlinear_constraint", device, allow_nan, compiled)
    checked, where, kind = function.checked, function.where, "sparse_coo" if layout == "sparse" else "dense"

    def vector(x: Any) -> Any:
        found = checked(x)
        if found.dim() > 1:
            raise ValueError(f"{where} must return a vector, got shape {tuple(found.shape)}")
        return found.reshape(-1)

    def weighted(x: Any, weights: Any) -> Any:
        found = vector(x)
        if found.shape != weights.shape:
            raise ValueError(f"{where} must return shape {tuple(weights.shape)}, as at other points, got {tuple(found.shape)}")
        return (weights * found).sum()

    length = Length(where)
    linearise = Linearisation(function, vector, "constraint", layout)
    curvatures = function.derived(("hessian", kind), lambda: hessian(weighted, layout=kind), weighted)

    def at(x: np.ndarray, reader: str) -> Linearised:
        found: Linearised = function.once("run", (x,), lambda: linearise.at((x,)), reader)
        return found

    def value(x: np.ndarray) -> np.ndarray:
        return length.checked(at(x, "value").value.copy())

    def jacobian(x: np.ndarray) -> Any:
        point = at(x, "jacobian")
        length.checked(point.value)
        return point.jacobian()

    def curvature(x: np.ndarray, weights: np.ndarray) -> Any:
        with function.named():
            found = function.run(curvatures, (x, weights))
            return matrix(function, found, (x.size, x.size), "Hessian")

    made = _Constraint(value, lb, ub, jac=jacobian, hess=curvature, keep_feasible=keep_feasible)
    made.length, made.linearise = length, linearise
    return made


__all__ = ["minimize", "nonlinear_constraint"]
