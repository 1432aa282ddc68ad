"""Linear maps as SciPy's linear operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from chainrule.transforms.linear_map import LinearMap


def scipy_operator(linear_map: LinearMap) -> Any:
    """A ``scipy.sparse.linalg.LinearOperator`` with the products of a map, on flattened float64 arrays.

    Raises:
        ImportError: if scipy is not installed.
    """
    try:
        from scipy.sparse.linalg import LinearOperator  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ImportError("LinearMap.scipy: needs scipy; install chainrule[scipy]") from error

    def product(of: LinearMap) -> Any:
        def apply(array: Any) -> Any:
            if np.iscomplexobj(array):  # the map is real
                return apply(array.real) + 1j * apply(array.imag)
            # A copy: scipy's arrays may be read-only, or of another dtype or layout.
            vector = torch.from_numpy(np.array(array, dtype=np.float64))
            if vector.dim() == 2 and vector.shape[1] == 1:
                vector = vector[:, 0]
            columns = int(vector.shape[1]) if vector.dim() == 2 else None
            with torch.no_grad():
                leaves = of._push(of.in_space.unflatten(vector), columns)
                found = of.out_space.flatten([leaf.to("cpu", torch.float64) for leaf in leaves], columns)
            return found.numpy().reshape(of.shape[0], *array.shape[1:])

        return apply

    forward, backward = product(linear_map), product(linear_map.T)
    return LinearOperator(
        linear_map.shape, matvec=forward, rmatvec=backward, matmat=forward, rmatmat=backward, dtype=np.float64
    )


__all__ = ["scipy_operator"]
