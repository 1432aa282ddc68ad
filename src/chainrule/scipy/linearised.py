"""Vector functions with their Jacobians, as solvers ask for them: one point after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from chainrule.scipy.functions import FEW, TorchFunction, matrix
from chainrule.scipy.replays import Replayed
from chainrule.transforms.jacobian_map import linear_map
from chainrule.transforms.jacobians import jacobian

_FLOAT64 = np.dtype(np.float64)
_from_numpy, _is_grad_enabled, _set_grad_enabled = torch.from_numpy, torch.is_grad_enabled, torch._C._set_grad_enabled

#: A Jacobian of at most so many entries is computed along with the value: a solver that rejects a step asks for it in vain.
_SMALL = 1 << 14


class Linearised:
    """A vector function at one point: its value, and its Jacobian in the layout that a solver takes, from one run.

    Attributes:
        value: the value, a float64 array ``(m,)``.
    """

    __slots__ = ("_array", "_check", "_found", "_function", "_layout", "value")

    def __init__(self, function: TorchFunction, found: Any, output: Any, layout: str) -> None:
        self._check: Any = None
        self._function, self._found, self._layout = function, found, layout
        self.value = function.vector(output)
        self._array: np.ndarray | None = None

    def jacobian(self) -> Any:
        """The Jacobian: a new array, a ``csr_array`` or a ``LinearOperator``."""
        if self._check is not None:
            check, self._check = self._check, None
            found = self._computed()
            with self._function.named():
                if isinstance(found, LinearOperator) and math.prod(found.shape) <= _SMALL:
                    found = matrix(self._function, self._found.dense(flat=True), found.shape, "Jacobian")
                if not isinstance(found, LinearOperator):
                    check(found)
        found = self._computed()
        return aslinearoperator(found) if self._layout == "operator" and found.__class__ is np.ndarray else found

    def _computed(self) -> Any:
        """The Jacobian; of an operator it may be the array."""
        if self._array is not None:
            return self._array.copy()
        found = self._found
        if found.__class__ is np.ndarray:
            with self._function.named():
                self._function.check(found, "Jacobian")
            self._array = found
            return found.copy()
        if self._layout == "dense" and found.__class__ is torch.Tensor and found.dim() == 2 and found.numel() <= FEW:
            self._array = self._small(found)  # MINPACK asks for the first one twice
            return self._array.copy()
        with self._function.named():
            if self._layout == "operator" and not isinstance(found, torch.Tensor):
                return found.scipy()
            if not isinstance(found, torch.Tensor):
                found = found.dense(flat=True)
            return matrix(self._function, found, tuple(found.shape), "Jacobian")

    def _small(self, found: torch.Tensor) -> np.ndarray:
        try:
            rows = found.tolist()
            array = np.array(rows, dtype=np.float64)
            if not rows or not rows[0]:
                return array.reshape(found.shape)
            total = sum(map(sum, rows))
            if total != total:
                self._function.check(array, "Jacobian")
        except Exception as error:
            self._function.named().note(error)
            raise
        return array


class Linearisation:
    """A vector function to be linearised at one point after the other.

    Args:
        function: the user's function, for messages.
        vector: the function of tensors that is linearised.
        key: tells it apart from others that are made of the user's function.
        layout: the layout of its Jacobians.
        argnum: the argument that it is differentiated with respect to.
    """

    def __init__(
        self, function: TorchFunction, vector: Callable[..., torch.Tensor], key: Hashable, layout: str, argnum: int = 0
    ) -> None:
        self._function, self._vector, self._layout, self._argnum = function, vector, layout, argnum
        self._entries = 0
        self._is_first = True
        # The patterns of `jacobian` are planned once per signature, those of maps once per map.
        form, kind = ("sparse", "sparse_coo") if layout == "sparse" else ("dense", "dense")
        self._both: Any = function.derived(
            ("jacobian", key, form), lambda: jacobian(twice(vector), argnum, has_aux=True, layout=kind), vector
        )
        # Small functions are mostly what is around them: for these, the call that takes fewest steps.
        is_usual = layout == "dense" and self._both.__class__ is Replayed and function.device is None
        self._usual: Any = self._both.usual if is_usual else None  # type: ignore[attr-defined]

    def at(self, args: Sequence[Any], rest: tuple[Any, ...] = ()) -> Linearised:
        """The function at a point that is given by arrays, with further arguments of SciPy's."""
        found = self._at(args, rest)
        if self._is_first:
            self._is_first = False
            given = [np.array(a) if isinstance(a, np.ndarray) else a for a in args]
            check, vector, argnum = self._function.check_first, self._vector, self._argnum
            found._check = lambda array: check(vector, given, rest, array, argnum=argnum)
        return found

    def begin(self) -> None:
        """Look at the zeros of the next Jacobian as those of the first one of a solve."""
        self._is_first = True
        self._function.begin()

    @property
    def _is_computed(self) -> bool:
        """Whether the Jacobian is computed along with the value.

        Products with a small one are few of NumPy's calls, and as a map each of them would be a run of its own.
        """
        if self._layout == "operator":
            return 0 < self._entries <= _SMALL
        return self._layout == "sparse" or self._entries <= _SMALL

    def _at(self, args: Sequence[Any], rest: tuple[Any, ...]) -> Linearised:
        if rest:
            if self._is_computed:
                found, output = self._function.run(self._both, args, rest)
                self._entries = math.prod(found.shape)
                return Linearised(self._function, found, output, self._layout)
            return self._mapped((*map(self._function.tensor, args), *self._function.extra(rest)))
        if self._usual is not None and len(args) == 1 and self._entries <= _SMALL:
            x = args[0]
            if x.__class__ is np.ndarray and x.dtype is _FLOAT64:
                both = self._both.arrays(args)
                if both is not None:
                    found, output = both
                    return Linearised(self._function, found, output, "dense")
                found, output = self._usual([_from_numpy(x.copy())])
                self._entries = found.numel()
                return Linearised(self._function, found, output, "dense")
        if self._is_computed:
            found, output = self._function.run(self._both, args)
            self._entries = math.prod(found.shape)
            return Linearised(self._function, found, output, self._layout)
        return self._mapped(tuple(map(self._function.tensor, args)))

    def __call__(self, *args: Any) -> Linearised:
        """The function at a point."""
        if self._is_computed:
            found, output = self._both(*args)
            self._entries = found.numel()
            return Linearised(self._function, found, output, self._layout)
        return self._mapped(args)

    def _mapped(self, args: tuple[Any, ...]) -> Linearised:
        kept = linear_map(self._vector, *args, argnums=self._argnum)
        self._entries = math.prod(kept.shape)
        return Linearised(self._function, kept, kept.output, self._layout)


class Points:
    """A linearisation that is kept as long as a solver stays at a point.

    Args:
        function: the user's function.
        linearise: gives it at other points.
    """

    __slots__ = ("_found", "_function", "_linearise", "_point")

    def __init__(self, function: TorchFunction, linearise: Linearisation) -> None:
        self._function, self._linearise = function, linearise
        self._point: Any = None
        self._found: Any = None

    def at(self, x: np.ndarray, rest: tuple[Any, ...]) -> Linearised:
        """The function at a point, with further arguments of SciPy's."""
        function, linearise = self._function, self._linearise
        found: Linearised
        state = function.state(rest) if rest else None
        if state is NotImplemented or x.__class__ is not np.ndarray or x.dtype is not _FLOAT64:
            found = function.once("run", (x, *rest), lambda: linearise.at((x,), rest))
            return found
        point = x.tobytes() if state is None else (x.tobytes(), state)
        if point == self._point:
            found = self._found
            return found
        enabled = _is_grad_enabled()
        _set_grad_enabled(False)
        try:
            found = self._found = linearise.at((x,), rest)
            self._point = point
            return found
        except Exception as error:
            self._point = None
            function.named().note(error)
            raise
        finally:
            _set_grad_enabled(enabled)


def twice(vector: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """A function that returns its value twice: as what is differentiated, and beside the derivative."""

    def of(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = vector(*args)
        return found, found

    return of


__all__ = ["Linearisation", "Linearised", "Points", "twice"]
