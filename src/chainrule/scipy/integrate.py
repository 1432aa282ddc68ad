"""``scipy.integrate``'s ``solve_ivp`` and ``solve_bvp`` with Jacobians of torch functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import integrate

from chainrule.scipy.boundary import Columns, Ends, Values
from chainrule.scipy.functions import Device, TorchFunction, check_absent, check_layout, matrix
from chainrule.transforms.jacobians import jacobian


def solve_ivp(
    fun: Callable[..., Any],
    t_span: Any,
    y0: Any,
    method: Any = "RK45",
    *,
    layout: str = "dense",
    args: tuple[Any, ...] | None = None,
    device: Device = None,
    allow_nan: bool = False,
    compiled: bool | None = None,
    **options: Any,
) -> Any:
    """``scipy.integrate.solve_ivp`` of a torch right-hand side, with its exact Jacobian for Radau, BDF and LSODA.

    Args:
        fun: ``fun(t, y)`` (and ``args``) with ``t`` a float64 tensor of shape ``()``, ``y`` of shape ``(n,)``; returns ``(n,)``.
        t_span: the interval, as in SciPy.
        y0: the first state.
        method: as in SciPy; explicit methods get no Jacobian.
        layout: the Jacobian's form, ``"dense"`` or ``"sparse"`` (Radau and BDF).
        args: further arguments, as in :func:`minimize`; SciPy hands them to its ``events`` too, as given.
        device: as in :func:`minimize`.
        allow_nan: as in :func:`minimize`.
        compiled: as in :func:`minimize`.
        options: SciPy's own: ``t_eval``, ``dense_output``, ``events`` (of numpy arrays), tolerances and so on.

    Returns:
        SciPy's result object.

    Raises:
        TypeError: if ``fun`` does not return a real tensor, or ``jac``, ``jac_sparsity`` or ``vectorized`` is given.
        ValueError: if its value has a wrong shape, or it or its Jacobian contains NaN; if the method does not take the layout.

    Example:
        >>> import numpy as np, torch
        >>> from chainrule.scipy import solve_ivp
        >>> stiff = solve_ivp(lambda t, y: -1000 * (y - torch.cos(t)), (0, 1), np.zeros(1), method="Radau")
        >>> bool(stiff.success), bool(abs(stiff.y[0, -1] - np.cos(1.0)) < 2e-3)
        (True, True)
    """
    check_absent(options, ("jac", "jac_sparsity", "vectorized"), "solve_ivp")
    check_layout(layout, "solve_ivp", ("dense", "sparse"))
    function = TorchFunction(fun, "solve_ivp", device, allow_nan, compiled, args)
    checked, where, shape = function.checked, function.where, (int(np.size(y0)),)
    kind = "sparse_coo" if layout == "sparse" else "dense"

    def vector(t: Any, y: Any, *rest: Any) -> Any:
        found = checked(t, y, *rest)
        if tuple(found.shape) != shape:
            raise ValueError(f"{where} must return shape {shape}, got {tuple(found.shape)}")
        return found

    # Values are asked for far more often than Jacobians, and not at the same points: they are computed alone.
    values = function.values(shape, vector)
    jacobians = function.derived(("jacobian", shape, kind), lambda: jacobian(vector, argnums=1, layout=kind), vector)

    def value(t: float, y: np.ndarray, *rest: Any) -> np.ndarray:
        return function.at(values, (np.array(t), y), None, rest)

    def derivative(t: float, y: np.ndarray, *rest: Any) -> Any:
        with function.named():
            found = function.run(jacobians, (np.array(t), y), rest)
            array = matrix(function, found, (shape[0], shape[0]), "Jacobian")
            function.check_first(vector, (np.array(t), y), rest, array, argnum=1, is_whole=False)
            return array

    solver = {"radau": integrate.Radau, "bdf": integrate.BDF, "lsoda": integrate.LSODA}.get(str(method).lower(), method)
    is_implicit, is_lsoda = (
        isinstance(solver, type) and issubclass(solver, kind) for kind in ((integrate.Radau, integrate.BDF), integrate.LSODA)
    )
    if is_implicit or is_lsoda:
        options["jac"] = derivative
    if layout == "sparse" and not is_implicit:
        raise ValueError(f"chainrule.scipy.solve_ivp: method {method!r} takes no sparse Jacobian; Radau and BDF do")
    return integrate.solve_ivp(value, t_span, y0, method=method, args=args, **options)


def solve_bvp(
    fun: Callable[..., Any],
    bc: Callable[..., Any],
    x: Any,
    y: Any,
    p: Any = None,
    *,
    device: Device = None,
    allow_nan: bool = False,
    compiled: bool | None = None,
    **options: Any,
) -> Any:
    """``scipy.integrate.solve_bvp`` of a torch system, with the exact Jacobians of the right-hand side and the conditions.

    As in SciPy the right-hand side is vectorised: each column of its result depends on the same column of ``y`` alone. All
    columns are differentiated together, with respect to one shift of them all.

    Args:
        fun: ``fun(x, y)`` or ``fun(x, y, p)`` with ``x`` of shape ``(m,)``, ``y`` of shape ``(n, m)``, ``p`` of shape ``(k,)``;
            returns ``(n, m)``.
        bc: ``bc(ya, yb)`` or ``bc(ya, yb, p)`` with states of shape ``(n,)``; returns ``(n + k,)``.
        x: the first mesh.
        y: the first guess, ``(n, m)``.
        p: the first guess of the parameters, ``(k,)``, or None.
        device: as in :func:`minimize`.
        allow_nan: as in :func:`minimize`.
        compiled: as in :func:`minimize`.
        options: SciPy's own: ``S``, ``tol``, ``max_nodes``, ``verbose``, ``bc_tol``.

    Returns:
        SciPy's result object.

    Raises:
        TypeError: if a function does not return a real tensor, or a Jacobian is given.
        ValueError: if a value has a wrong shape, or a value or a Jacobian contains NaN.

    Example:
        >>> import numpy as np, torch
        >>> from chainrule.scipy import solve_bvp
        >>> def bratu(x, y):
        ...     return torch.stack([y[1], -torch.exp(y[0])])
        >>> def ends(left, right):
        ...     return torch.stack([left[0], right[0]])
        >>> found = solve_bvp(bratu, ends, np.linspace(0, 1, 5), np.zeros((2, 5)))
        >>> bool(found.success), round(float(found.sol(0.5)[0]), 3)
        (True, 0.141)
    """
    check_absent(options, ("fun_jac", "bc_jac"), "solve_bvp")
    right, ends = (TorchFunction(f, "solve_bvp", device, allow_nan, compiled) for f in (fun, bc))
    states, parameters = np.shape(y)[0], 0 if p is None else int(np.size(p))
    given = (0, 1) if p is None else (0, 1, 2)
    count, checked, where = states + parameters, ends.checked, ends.where

    def residuals(*args: Any) -> Any:
        found = checked(*args)
        if tuple(found.shape) != (count,):
            raise ValueError(f"{where} must return shape {(count,)}, got {tuple(found.shape)}")
        return found

    jacobians = ends.derived(("ends", given, count), lambda: jacobian(residuals, argnums=given), residuals)
    value = Values(right, right.values(given, right.checked), lambda x, y, *p: y.shape, 2)
    conditions = Values(ends, ends.values(given, ends.checked), lambda *_: (count,), 1)
    derivative = Columns(right, value, parameters=p is not None)
    return integrate.solve_bvp(
        value, conditions, x, y, p=p, fun_jac=derivative, bc_jac=Ends(ends, jacobians), **options
    )


__all__ = ["solve_bvp", "solve_ivp"]
