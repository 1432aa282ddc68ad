"""A torch function as SciPy calls one: arrays in, checked arrays out, and what was computed at the last point."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from scipy import sparse

from chainrule.transforms.jacobian_map import linear_map
from chainrule.transforms.jacobians import jacobian

Device = torch.device | str | None

LAYOUTS = ("dense", "sparse", "operator")


class TorchFunction:
    """A user's function with the name of the solver that it is for.

    Attributes:
        function: the function of tensors.
        caller: the solver's name, for messages.
        device: where its arguments are put; None for the CPU.
        allow_nan: whether NaN in values and derivatives goes on to SciPy.
    """

    def __init__(self, function: Callable[..., Any], caller: str, device: Device, allow_nan: bool) -> None:
        if not callable(function):
            raise TypeError(f"chainrule.scipy.{caller}: expected a function of tensors, got {type(function).__name__}")
        self.function, self.caller, self.device, self.allow_nan = function, caller, device, allow_nan
        self.name = getattr(function, "__qualname__", None) or repr(function)
        self._at: tuple[Any, ...] | None = None
        self._known: dict[str, Any] = {}
        self._readers: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The function itself, its result checked to be one real tensor."""
        result = self.function(*args, **kwargs)
        if not isinstance(result, torch.Tensor):
            raise TypeError(f"{self.where} must return a tensor, got {type(result).__name__}")
        if not result.dtype.is_floating_point:
            raise TypeError(f"{self.where} must return real floating point numbers, got {result.dtype}")
        return result

    @property
    def where(self) -> str:
        """The solver and the function, as messages begin."""
        return f"chainrule.scipy.{self.caller}: the function {self.name}"

    def tensor(self, array: Any) -> torch.Tensor:
        """A new float64 tensor of an array's values, on the device."""
        array = np.asarray(array)
        if np.iscomplexobj(array):
            raise TypeError(f"{self.where} is given complex values; only real ones are supported")
        # A copy: SciPy writes to its arrays in place. (torch.tensor takes ten times as long for small ones.)
        found = torch.from_numpy(np.array(array, dtype=np.float64))
        return found if self.device is None else found.to(self.device)

    def extra(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Further arguments: arrays of floats become tensors, anything else stays what it is."""
        return tuple(self.tensor(a) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a for a in args)

    def array(self, result: torch.Tensor, shape: tuple[int, ...] | None = None, what: str = "value") -> np.ndarray:
        """A tensor's values as a new float64 array.

        Raises:
            ValueError: if the shape is another than ``shape``, or a value is NaN.
        """
        if shape is not None and tuple(result.shape) != shape:
            raise ValueError(f"{self.where} must return shape {shape}, got {tuple(result.shape)}")
        values = np.array(result.detach().cpu().numpy(), dtype=np.float64)
        self.check(values, what)
        return values

    def check(self, values: np.ndarray, what: str) -> None:
        """Raise a ValueError if a value is NaN."""
        if not self.allow_nan and np.isnan(values).any():
            raise ValueError(f"{self.where}: its {what} is NaN here (allow_nan=True passes it on to SciPy)")

    @contextmanager
    def named(self) -> Iterator[None]:
        """Leaves exceptions as they are, with a note that names the function."""
        try:
            with torch.no_grad():
                yield
        except Exception as error:
            if self.where not in str(error):
                error.add_note(f"(raised in {self.where})")
            raise

    def once(self, key: str, at: tuple[Any, ...], compute: Callable[[], Any], reader: str | None = None) -> Any:
        """What ``compute`` returns, remembered under ``key`` as long as the point stays the same.

        With a ``reader`` it is remembered for one reading by each: callbacks that outlive a solve may start the next one at the
        point where the last one ended, with other values in the function's closure.
        """
        if self._at is None or reader in self._readers or not _same(self._at, at):
            # SciPy writes to its arrays in place.
            self._at, self._known = tuple(a.copy() if isinstance(a, np.ndarray) else a for a in at), {}
            self._readers = set()
        if reader is not None:
            self._readers.add(reader)
        if key not in self._known:
            with self.named():
                result = compute()
            self._known[key] = result
        return self._known[key]


def _same(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    """Whether two points are the same, element by element; what is no array or number has to be the same object."""
    return len(first) == len(second) and all(
        np.array_equal(a, b) if isinstance(a, np.ndarray | float) and isinstance(b, np.ndarray | float) else a is b
        for a, b in zip(first, second, strict=True)
    )


def matrix(function: TorchFunction, found: torch.Tensor, shape: tuple[int, ...], what: str) -> Any:
    """A dense or COO derivative as a numpy array or a ``scipy.sparse.csr_array`` of a given shape."""
    if found.layout == torch.strided:
        return function.array(found.reshape(shape), what=what)
    rows, columns = found.indices().cpu().numpy()
    values = function.array(found.values(), what=what)
    return sparse.csr_array((values, (rows, columns)), shape=shape)


class Linearised:
    """A vector function at one point: its value, and its Jacobian in the layout that a solver takes, from one run.

    Attributes:
        value: the value, a float64 array ``(m,)``.
    """

    def __init__(
        self, function: TorchFunction, vector: Callable[..., torch.Tensor], layout: str, args: tuple[Any, ...], argnum: int = 0
    ) -> None:
        self._function, self._layout = function, layout
        if layout == "sparse":
            # The patterns of `jacobian` are planned once per signature, those of maps once per map.
            self._found, output = jacobian(_twice(vector), argnum, has_aux=True, layout="sparse_coo")(*args)
        else:
            self._found = linear_map(vector, *args, argnums=argnum)
            output = self._found.output
        self.value = function.array(output)

    def jacobian(self) -> Any:
        """The Jacobian: a new array, a ``csr_array`` or a ``LinearOperator``."""
        with self._function.named():
            if self._layout == "operator":
                return self._found.scipy()
            found = self._found if self._layout == "sparse" else self._found.dense(flat=True)
            return matrix(self._function, found, tuple(found.shape), "Jacobian")


def _twice(vector: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def of(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = vector(*args)
        return found, found

    return of


def check_layout(layout: str, caller: str, allowed: tuple[str, ...] = LAYOUTS) -> None:
    """Raise a ValueError if a layout is not among those that a solver takes."""
    if layout not in allowed:
        raise ValueError(f"chainrule.scipy.{caller}: layout must be one of {', '.join(allowed)} here, got {layout!r}")


def check_absent(options: dict[str, Any], names: tuple[str, ...], caller: str) -> None:
    """Raise a TypeError if an option is given that chainrule sets itself."""
    for name in names:
        if name in options:
            raise TypeError(f"chainrule.scipy.{caller}: {name} is derived from the function and cannot be given")


__all__ = ["LAYOUTS", "Device", "Linearised", "TorchFunction", "check_absent", "check_layout", "matrix"]
