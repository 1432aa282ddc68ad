"""``least_squares``, ``root`` and ``curve_fit`` of SciPy, with Jacobians of torch functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import optimize

from chainrule.scipy.extra_arguments import Keywords
from chainrule.scipy.functions import (
    Device,
    TorchFunction,
    check_absent,
    check_layout,
    check_real,
)
from chainrule.scipy.lengths import Length
from chainrule.scipy.linearised import Linearisation, Linearised, Points


def least_squares(
    fun: Callable[..., Any],
    x0: Any,
    *,
    layout: str = "dense",
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    device: Device = None,
    allow_nan: bool = False,
    compiled: bool | None = None,
    **options: Any,
) -> Any:
    """``scipy.optimize.least_squares`` of a torch function's residuals, with their exact Jacobian.

    Residuals and Jacobian at a point come from one run.

    Args:
        fun: a function of a float64 tensor of shape ``(n,)`` (and ``args``, ``kwargs``) that returns residuals of shape ``(m,)``,
            or one of shape ``()``.
        x0: the first point.
        layout: the Jacobian's form: ``"dense"``, ``"sparse"`` (CSR) or ``"operator"`` (products); the last two with ``lsmr``.
        args: further arguments, as in :func:`minimize`.
        kwargs: further arguments by name, given to ``fun`` unchanged.
        device: as in :func:`minimize`.
        allow_nan: as in :func:`minimize`.
        compiled: as in :func:`minimize`.
        options: SciPy's own: ``bounds``, ``method``, ``loss``, ``tr_solver``, ``x_scale``, tolerances and so on.

    Returns:
        SciPy's ``OptimizeResult``.

    Raises:
        TypeError: if ``fun`` does not return a real tensor, or ``jac`` is given.
        ValueError: if residuals are no vector, are more or less than at the first point, or contain NaN, as their Jacobian
            must not; if the layout is unknown.

    Example:
        >>> import numpy as np, torch
        >>> from chainrule.scipy import least_squares
        >>> def residuals(x):
        ...     return torch.cat([10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]])
        >>> least_squares(residuals, np.full(4, 0.5), layout="sparse").x.round(6)
        array([1., 1., 1., 1.])
    """
    check_layout(layout, "least_squares")
    check_absent(options, ("jac", "jac_sparsity"), "least_squares")
    if layout != "dense":
        options.setdefault("tr_solver", "lsmr")
    args, named = tuple(args), Keywords(kwargs) if kwargs else None
    function = TorchFunction(fun, "least_squares", device, allow_nan, compiled, (*args, named) if named else args)
    checked, where = function.checked, function.where

    def residuals(x: Any, *rest: Any) -> Any:
        found = checked(x, *rest[:-1], **rest[-1].given) if named else checked(x, *rest)
        if found.dim() > 1:
            raise ValueError(f"{where} must return a vector, got shape {tuple(found.shape)}")
        return found.reshape(-1)

    length = Length(where)
    at = Points(function, Linearisation(function, residuals, ("residuals", bool(named)), layout)).at

    def value(x: np.ndarray, *rest: Any) -> np.ndarray:
        return length.checked(at(x, (*rest, named) if named else rest).value.copy())

    def derivative(x: np.ndarray, *rest: Any) -> Any:
        return at(x, (*rest, named) if named else rest).jacobian()

    return optimize.least_squares(value, x0, jac=derivative, args=args, **options)


def root(
    fun: Callable[..., Any],
    x0: Any,
    args: Any = (),
    method: str = "hybr",
    *,
    device: Device = None,
    allow_nan: bool = False,
    compiled: bool | None = None,
    **options: Any,
) -> Any:
    """``scipy.optimize.root`` of a torch function, with its exact Jacobian for the methods that use one (hybr, lm).

    Args:
        fun: a function of a float64 tensor of shape ``(n,)`` (and ``args``) that returns shape ``(n,)`` (``(m,)`` with lm).
        x0: the first point.
        args: further arguments, as in :func:`minimize`.
        method: as in SciPy.
        device: as in :func:`minimize`.
        allow_nan: as in :func:`minimize`.
        compiled: as in :func:`minimize`.
        options: ``tol``, ``callback``, ``options``.

    Returns:
        SciPy's ``OptimizeResult``.

    Raises:
        TypeError: if ``fun`` does not return a real tensor, or ``jac`` is given.
        ValueError: if its value has a wrong shape, or it or its Jacobian contains NaN.

    Example:
        >>> import numpy as np, torch
        >>> from chainrule.scipy import root
        >>> root(lambda x: torch.stack([x[0] ** 2 - x[1], x[1] - 4]), np.array([1.0, 1.0])).x.round(6)
        array([2., 4.])
    """
    check_absent(options, ("jac",), "root")
    function = TorchFunction(fun, "root", device, allow_nan, compiled, args if isinstance(args, tuple) else (args,))
    where, size, is_square = function.where, np.size(x0), method != "lm"

    def vector(x: Any, *rest: Any) -> Any:
        found = fun(x, *rest)
        if found.__class__ is not torch.Tensor or found.dtype is not torch.float64:
            check_real(found, where)
        dim = found.dim()
        if dim == 1 and found.numel() == size:
            return found
        if dim > 1 or is_square and found.numel() != size:
            raise ValueError(f"{where} must return shape {(size,)}, got {tuple(found.shape)}")
        return found if dim == 1 else found.reshape(-1)

    value, derivative = _both(function, vector) if method == "lm" else _apart(function, vector, size, method == "hybr")
    if method in ("hybr", "lm"):
        options["jac"] = derivative
    return optimize.root(value, x0, args=args, method=method, **options)


Callback = Callable[..., np.ndarray]


def _apart(
    function: TorchFunction, vector: Callable[..., Any], size: int, is_derived: bool
) -> tuple[Callback, Callback]:
    """Values and Jacobians for a method that asks for many values and few Jacobians, as Broyden's updates do.

    Args:
        function: the user's function.
        vector: the same with its value checked.
        size: the number of unknowns.
        is_derived: whether the method asks for a Jacobian where it asks for its first value.
    """
    values = function.values(size, vector)
    call = function.callback(values)
    at = Points(function, Linearisation(function, vector, size, "dense")).at
    # SciPy looks at the first point, and MINPACK asks there twice: once for the number of values.
    first = 3 if is_derived else 0

    def value(x: np.ndarray, *rest: Any) -> np.ndarray:
        nonlocal first
        if first:
            first -= 1
            return at(x, rest).value.copy()
        return function.at(values, (x,), None, rest) if rest else call(x)

    def derivative(x: np.ndarray, *rest: Any) -> np.ndarray:
        found: np.ndarray = at(x, rest).jacobian()
        return found

    return value, derivative


def _both(function: TorchFunction, vector: Callable[..., Any]) -> tuple[Callback, Callback]:
    """Values and Jacobians for a method that asks for the Jacobian at most points."""
    at = Points(function, Linearisation(function, vector, "residuals", "dense")).at

    def value(x: np.ndarray, *rest: Any) -> np.ndarray:
        return at(x, rest).value.copy()

    def derivative(x: np.ndarray, *rest: Any) -> np.ndarray:
        found: np.ndarray = at(x, rest).jacobian()
        return found

    return value, derivative


def curve_fit(
    f: Callable[..., Any],
    xdata: Any,
    ydata: Any,
    *args: Any,
    device: Device = None,
    allow_nan: bool = False,
    compiled: bool | None = None,
    **options: Any,
) -> Any:
    """``scipy.optimize.curve_fit`` of a torch model, with its exact Jacobian by the parameters.

    Args:
        f: ``f(x, *parameters)`` with ``x`` a float64 tensor of ``xdata``'s shape and parameters of shape ``()``; returns shape
            ``(m,)``.
        xdata: the independent variable; arrays become tensors, other objects reach ``f`` unchanged.
        ydata: the data, ``(m,)``.
        args: ``p0``, ``sigma``, ``absolute_sigma``, ``check_finite``, ``bounds``, ``method``, as in SciPy.
        device: as in :func:`minimize`.
        allow_nan: as in :func:`minimize`.
        compiled: as in :func:`minimize`.
        options: SciPy's own.

    Returns:
        The parameters and their covariance (and more with ``full_output``), as in SciPy.

    Raises:
        TypeError: if ``f`` does not return a real tensor, or ``jac`` is given.
        ValueError: if a value or the Jacobian is NaN, or ``f`` returns no vector of as many values as there are in ``ydata``.

    Example:
        >>> import numpy as np, torch
        >>> from chainrule.scipy import curve_fit
        >>> x = np.linspace(0, 1, 20)
        >>> found, covariance = curve_fit(lambda x, a, b: a * torch.exp(-b * x), x, 2 * np.exp(-3 * x))
        >>> found.round(6)
        array([2., 3.])
    """
    check_absent(options, ("jac",), "curve_fit")
    if len(args) > 6:
        raise TypeError("chainrule.scipy.curve_fit: jac is derived from the function and cannot be given")
    function = TorchFunction(f, "curve_fit", device, allow_nan, compiled)
    checked, where = function.checked, function.where

    def model(data: Any, parameters: Any) -> Any:
        found = checked(data, *parameters.unbind())
        if found.dim() != 1:
            raise ValueError(f"{where} must return a vector, got shape {tuple(found.shape)}")
        return found

    linearise = Linearisation(function, model, "model", "dense", 1)
    count = None if options.get("nan_policy") == "omit" else np.size(ydata)

    def at(data: Any, parameters: tuple[Any, ...]) -> Linearised:
        def compute() -> Linearised:
            if isinstance(data, np.ndarray):
                return linearise.at((data, np.array(parameters, dtype=np.float64)))
            return linearise(data, function.tensor(parameters))

        found: Linearised = function.once("run", (data, *parameters), compute)
        return found

    # SciPy reads the number of parameters off the signature.
    @functools.wraps(f)
    def value(data: Any, *parameters: Any) -> np.ndarray:
        found = at(data, parameters).value
        if count is not None and found.size != count:
            raise ValueError(f"{where} must return shape {(count,)}, one value for each of ydata, got {found.shape}")
        return found.copy()

    def derivative(data: Any, *parameters: Any) -> np.ndarray:
        return at(data, parameters).jacobian()

    if len(args) > 1:
        args = (args[0], _deviations(args[1], ydata), *args[2:])
    elif "sigma" in options:
        options["sigma"] = _deviations(options["sigma"], ydata)
    return optimize.curve_fit(value, xdata, ydata, *args, jac=derivative, **options)


def _deviations(sigma: Any, ydata: Any) -> Any:
    """One standard deviation for all data as one for each: with a Jacobian given, SciPy takes a number for a covariance."""
    return np.full(np.size(ydata), np.asarray(sigma).item()) if sigma is not None and np.size(sigma) == 1 else sigma


__all__ = ["curve_fit", "least_squares", "root"]
