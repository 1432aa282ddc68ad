"""The callbacks of ``scipy.integrate.solve_bvp``: each point is computed once, and two Jacobians in one run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from chainrule.scipy.functions import TorchFunction
from chainrule.scipy.replays import Replayed
from chainrule.transforms.jacobians import jacobian

#: Jacobians are computed for at least so many columns at once, so that few shapes need a plan. An additional column costs far
#: less than a plan; where the blocks are large, there are fewer of these.
_COLUMNS = 64
_ENTRIES = 1 << 12

#: The number of values that are kept: SciPy asks again for those of the last mesh and its middles.
_KEPT = 2


class Values:
    """The values of a function at its last points.

    Args:
        function: the user's function.
        values: the function of tensors that is called.
        shape: the shape of a value, from the arguments.
        kept: how many values are kept.
    """

    def __init__(
        self, function: TorchFunction, values: Callable[..., Any], shape: Callable[..., tuple[int, ...]], kept: int
    ) -> None:
        self._function, self._values, self._shape = function, values, shape
        self._known: deque[tuple[tuple[Any, ...], np.ndarray]] = deque(maxlen=kept)
        #: The arguments of the last call.
        self.last: tuple[np.ndarray, ...] = ()

    def __call__(self, *args: np.ndarray) -> np.ndarray:
        """The value, a new array: SciPy writes to it."""
        self.last = args
        point = key(args)
        for known, value in self._known:
            if known == point:
                return value.copy()
        found = self._function.at(self._values, args, self._shape(*args))
        self._known.append((point, found))
        return found.copy()


class Columns:
    """The Jacobians of a right-hand side in its own column, for a mesh and for the middles of its intervals.

    SciPy asks for both one after the other, and has asked for the value in the middles before: that call says which they are.

    Args:
        right: the right-hand side.
        values: its values, as SciPy asks for them.
        parameters: whether there are unknown parameters.
    """

    def __init__(self, right: TorchFunction, values: Values, *, parameters: bool) -> None:
        self._right, self._values, self._parameters = right, values, parameters
        checked = right.checked
        if parameters:
            shifted = _shifted(checked, right.where)
            self._blocks = right.derived("shifts", lambda: jacobian(shifted, argnums=(2, 3)), shifted)
        else:
            summed = _summed(checked, right.where)
            self._blocks = right.derived("columns", lambda: jacobian(summed, argnums=1), summed)
        self._middles: tuple[tuple[Any, ...], Any] | None = None

    def __call__(self, x: np.ndarray, y: np.ndarray, *p: np.ndarray) -> Any:
        """The blocks ``(n, n, m)``, and ``(n, k, m)`` by the parameters if there are any."""
        known, self._middles = self._middles, None
        if known is not None and known[0] == key((x, y, *p)):
            return known[1]
        middle = self._values.last
        states, columns = y.shape
        together = _are_beside(middle, x, y, p)
        count = columns + len(middle[0]) if together else columns
        width = _width(count, states * (states + sum(map(len, p))))
        all_x, all_y = np.empty(width), np.empty((states, width))
        # In the order of the mesh, and the last column again to the end.
        step = 2 if together else 1
        all_x[:count:step], all_y[:, :count:step] = x, y
        if together:
            all_x[1:count:2], all_y[:, 1:count:2] = middle[0], middle[1]
        if width > count:
            all_x[count:], all_y[:, count:] = x[-1], y[:, -1:]
        found = self._blocks_at(all_x, all_y, p)
        if not together:
            return _given([block[..., :count] for block in found])
        self._middles = key(middle), _given([block[..., 1:count:2] for block in found])
        return _given([block[..., :count:2] for block in found])

    def _blocks_at(self, x: np.ndarray, y: np.ndarray, p: tuple[np.ndarray, ...]) -> list[np.ndarray]:
        right = self._right
        with right.named():
            if not self._parameters:
                return [right.array(right.run(self._blocks, (x, y), are_new=True), what="Jacobian")]
            found = right.run(self._blocks, (x, y, np.zeros(len(y)), p[0].copy()), are_new=True)
            return [right.array(block, what="Jacobian").transpose(0, 2, 1) for block in found]


class Ends:
    """The Jacobians of the boundary conditions; those that do not depend on the states, as a replay shows, are computed once.

    Args:
        ends: the conditions.
        jacobians: the function of tensors that gives them.
    """

    def __init__(self, ends: TorchFunction, jacobians: Callable[..., Any]) -> None:
        self._ends, self._jacobians = ends, jacobians
        self._constant: tuple[np.ndarray, ...] | None = None

    def __call__(self, *args: np.ndarray) -> tuple[np.ndarray, ...]:
        """One for each argument."""
        if self._constant is not None:
            return self._constant
        ends = self._ends
        with ends.named():
            found = tuple([ends.array(block, what="Jacobian") for block in ends.run(self._jacobians, args)])
        if isinstance(self._jacobians, Replayed) and self._jacobians.is_constant(args):
            self._constant = found
            for array in found:
                array.flags.writeable = False
        return found


def _given(blocks: list[np.ndarray]) -> Any:
    return blocks[0] if len(blocks) == 1 else tuple(blocks)


def key(args: tuple[np.ndarray, ...]) -> tuple[Any, ...]:
    """What tells points apart."""
    return tuple([(array.shape, array.tobytes()) for array in args])


def _are_beside(middle: tuple[np.ndarray, ...], x: np.ndarray, y: np.ndarray, p: tuple[np.ndarray, ...]) -> bool:
    """Whether a point has a column for each interval of a mesh, and the same parameters."""
    return (
        len(middle) == 2 + len(p)
        and middle[0].shape == (len(x) - 1,)
        and y.dtype == middle[1].dtype == np.float64
        and all(map(np.array_equal, middle[2:], p))
    )


def _width(columns: int, entries: int) -> int:
    """The number of columns that a Jacobian is computed for."""
    least = min(_COLUMNS, _ENTRIES // max(1, entries))
    # Sizes of three binary digits: at most a quarter more than there are.
    unit = 1 << max(0, columns.bit_length() - 3)
    return max(least, -(-columns // unit) * unit)


def _like_states(found: torch.Tensor, y: torch.Tensor, where: str) -> torch.Tensor:
    """The values of a right-hand side, checked to be as many as there are states."""
    if found.shape != y.shape:
        raise ValueError(f"{where} must return shape {tuple(y.shape)}, got {tuple(found.shape)}")
    return found


def _summed(function: Callable[..., torch.Tensor], where: str) -> Callable[..., torch.Tensor]:
    """A right-hand side summed over the columns: its Jacobian ``(n, n, m)`` is that of each column in its own place."""

    def summed(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return _like_states(function(x, y), y, where).sum(1)

    return summed


def _shifted(function: Callable[..., torch.Tensor], where: str) -> Callable[..., torch.Tensor]:
    """A right-hand side with one shift of all columns, whose Jacobian is ``df/dy``, transposed to ``(n, m, n)``.

    That by the parameters is ``df/dp``, ``(n, m, k)``.
    """

    def shifted(x: torch.Tensor, y: torch.Tensor, shift: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return _like_states(function(x, y + shift[:, None], p), y, where)

    return shifted


__all__ = ["Columns", "Ends", "Values", "key"]
