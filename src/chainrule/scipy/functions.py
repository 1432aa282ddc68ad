"""A torch function as SciPy calls one: arrays in, checked arrays out, and what was computed at the last point."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from scipy import sparse

from chainrule.scipy.connection import check_connected
from chainrule.scipy.extra_arguments import ExtraArguments, Unknown
from chainrule.scipy.plain_code import looks_at_types
from chainrule.scipy.replays import CALLS, VALUES, Replayed, has_disagreed, replayed

Device = torch.device | str | None

_FLOAT64 = np.dtype(np.float64)
_vdot, _array = np.vdot, np.array
_from_numpy, _is_grad_enabled, _set_grad_enabled = torch.from_numpy, torch.is_grad_enabled, torch._C._set_grad_enabled

LAYOUTS = ("dense", "sparse", "operator")

#: Up to so many numbers go through a list of Python's, which takes fewer calls than an array that is copied and checked.
FEW = 64


class TorchFunction:
    """A user's function with the name of the solver that it is for.

    Attributes:
        function: the function of tensors.
        caller: the solver's name, for messages.
        device: where its arguments are put; None for the CPU.
        allow_nan: whether NaN in values and derivatives goes on to SciPy.
        checked: the function itself, its result checked to be one real tensor.
        where: the solver and the function, as messages begin.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        caller: str,
        device: Device,
        allow_nan: bool,
        compiled: bool | None = False,
        args: Any = (),
    ) -> None:
        if not callable(function):
            raise TypeError(f"chainrule.scipy.{caller}: expected a function of tensors, got {type(function).__name__}")
        if compiled is not None and not isinstance(compiled, bool):
            raise TypeError(f"chainrule.scipy.{caller}: compiled must be True, False or None, got {compiled!r}")
        self.function, self.caller, self.device, self.allow_nan = function, caller, device, allow_nan
        self.where = f"chainrule.scipy.{caller}: the function {getattr(function, '__qualname__', None) or repr(function)}"
        self.checked = _checked(function, self.where)
        self._compiled = compiled
        self._extra = self._bound(args)
        self._is_connected = False
        #: The first zeros of a solve, and what looks at them.
        self._pending: tuple[np.ndarray, Callable[[], None]] | None = None
        self._at: tuple[Any, ...] | None = None
        # As long as they are here, no other objects have their identities.
        self._objects: tuple[Any, ...] = ()
        self._known: dict[str, Any] = {}
        self._readers: set[str] = set()

    def _bound(self, args: Any) -> ExtraArguments | None:
        """Further arguments that a replay can take; None where there are none, or calls with them are plain."""
        if not isinstance(args, tuple | list) or not args or self._compiled is False or self.device is not None:
            return None
        try:
            # What is recorded unasked is known to be harmless where tensors stand for numbers: nothing is written to them.
            extra = ExtraArguments(tuple(args), are_static=self._compiled is True or has_disagreed(self.function))
            if extra.form.floats and looks_at_types(self.function):
                extra = ExtraArguments(tuple(args), are_static=True)
            return extra
        except Unknown:
            return None

    def _known_extra(self, values: Any, args: Sequence[Any], rest: tuple[Any, ...]) -> ExtraArguments | None:
        """Further arguments that a function made of this one can be replayed with here; None if a call has to be plain."""
        extra = self._extra
        if extra is None or values.__class__ is not Replayed or not extra.are(rest):
            return None
        if not extra.agreed and values.has_graphs:
            extra.agreed = values.is_trusted or values.agrees([*map(self.tensor, args), *extra.tensors(are_new=True)])
            if not extra.agreed:
                self._extra = None
                return None
        return extra

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The function itself, its result checked to be one real tensor."""
        found: torch.Tensor = self.checked(*args, **kwargs)
        return found

    def derived(
        self,
        key: Hashable,
        make: Callable[[], Callable[..., Any]],
        value: Callable[..., Any] | None = None,
        others: Sequence[TorchFunction] = (),
        after: int = CALLS,
    ) -> Callable[..., Any]:
        """What a solver calls at every point: ``make()``, a function of tensors made of this one, replayed where that is allowed.

        Args:
            key: what it is; with the solver's name it has to tell apart all that ``make`` closes over beside the function.
            make: makes it.
            value: the part of it that only runs the function; None for the function itself.
            others: further functions of the user's that it calls.
            after: after how many calls it may be replayed.
        """
        if self._compiled is False:
            return make()
        key = (self.caller, key)
        forced, functions = self._compiled is True, [other.function for other in others]
        form = None if self._extra is None else self._extra.form
        value = value or self.checked
        return replayed(self.function, key, make, value, is_forced=forced, others=functions, after=after, form=form)

    def values(self, key: Hashable, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of tensors that only runs and checks this one, for solvers that ask for many values."""
        return self.derived(("value", key), lambda: function, function, after=VALUES)

    def tensor(self, array: Any) -> torch.Tensor:
        """A new float64 tensor of an array's values, on the device."""
        # A copy: SciPy writes to its arrays in place. (torch.tensor takes ten times as long for small ones.)
        copied = np.array(array, order="C")
        if copied.dtype != np.float64:
            if copied.dtype.kind == "c":
                raise TypeError(f"{self.where} is given complex values; only real ones are supported")
            copied = copied.astype(np.float64)
        found = torch.from_numpy(copied)
        return found if self.device is None else found.to(self.device)

    def extra(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Further arguments: arrays of floats become tensors, anything else stays what it is."""
        if not args:
            return args
        return tuple(self.tensor(a) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a for a in args)

    def state(self, rest: tuple[Any, ...]) -> Any:
        """What tells these further arguments from themselves at another time; NotImplemented if that is not known."""
        extra = self._extra
        return NotImplemented if extra is None or not extra.are(rest) else extra.state()

    def array(self, result: Any, shape: tuple[int, ...] | None = None, what: str = "value") -> np.ndarray:
        """A tensor's values as a new float64 array; or such an array itself.

        Raises:
            ValueError: if the shape is another than ``shape``, or a value is NaN.
        """
        if shape is not None and result.shape != shape:
            raise ValueError(f"{self.where} must return shape {shape}, got {tuple(result.shape)}")
        if result.__class__ is np.ndarray:
            self.check(result, what)
            return result  # type: ignore[no-any-return]
        if result.dim() < 2 and result.numel() <= FEW:
            numbers = result.tolist()
            total = sum(numbers) if numbers.__class__ is list else numbers
            # The sum is NaN, too, where infinities of both signs meet.
            if total != total and not self.allow_nan and (result.dim() == 0 or any(number != number for number in numbers)):
                self._refuse_nan(what)
            return np.array(numbers, dtype=np.float64)
        if result.requires_grad or not result.is_cpu:
            result = result.detach().cpu()
        values = result.numpy()
        values = values.copy() if values.dtype == np.float64 else values.astype(np.float64)
        self.check(values, what)
        return values

    def vector(self, result: Any) -> np.ndarray:
        """The same as :meth:`array`, in fewer steps for a few numbers in a row."""
        if result.__class__ is torch.Tensor and result.dim() == 1 and result.numel() <= FEW:
            numbers = result.tolist()
            total = sum(numbers)
            if total == total:
                return _array(numbers, _FLOAT64)
        return self.array(result)

    def check(self, values: np.ndarray, what: str) -> None:
        """Raise a ValueError if a value is NaN."""
        if self.allow_nan:
            return
        # A sum of squares is NaN where one of the numbers is, and takes a tenth of the time for a few of them.
        total = _vdot(values, values)
        if total != total:
            self._refuse_nan(what)

    def _refuse_nan(self, what: str) -> NoReturn:
        raise ValueError(f"{self.where}: its {what} is NaN here (allow_nan=True passes it on to SciPy)")

    def check_first(
        self,
        vector: Callable[..., torch.Tensor],
        args: Sequence[Any],
        rest: tuple[Any, ...],
        found: Any,
        *,
        argnum: int = 0,
        is_whole: bool = True,
    ) -> None:
        """Look at the zeros of the first derivative of a solve: see :func:`check_connected`."""
        if not self._is_connected:
            self._is_connected = True
            given = (*(self.tensor(a) if isinstance(a, np.ndarray) else a for a in args), *self.extra(rest))
            check_connected(self.function, self.where, vector, given, argnum, found, is_whole=is_whole)

    def check_gradient(
        self, vector: Callable[..., torch.Tensor], x: np.ndarray, rest: tuple[Any, ...], found: np.ndarray
    ) -> None:
        """The same for gradients; one that is zero in part is looked at if the part is zero at the next point, too."""
        if not self._is_connected:
            if found.all():
                self._is_connected = True
            elif not found.any():
                self.check_first(vector, (x,), rest, found)
            else:
                self._is_connected = True
                given, first = (self.tensor(x), *self.extra(rest)), found.copy()
                self._pending = (
                    found == 0,
                    lambda: check_connected(self.function, self.where, vector, given, 0, first, is_whole=True),
                )
        elif self._pending is not None:
            if (self._pending[0] & (found == 0)).any():
                self.check_pending()
            self._pending = None

    def check_pending(self) -> None:
        """Look at zeros of a first derivative that no other one followed."""
        if self._pending is not None:
            check, self._pending = self._pending[1], None
            with self.named():
                check()

    def begin(self) -> None:
        """Look at the zeros of the next derivative as those of the first one of a solve."""
        self._is_connected = False

    def named(self) -> Named:
        """Leaves exceptions as they are, with a note that names the function; without autograd."""
        return Named(self.where)

    def run(
        self, values: Callable[..., Any], args: Sequence[Any], rest: tuple[Any, ...] = (), *, are_new: bool = False
    ) -> Any:
        """What a function made of this one gives for arguments of SciPy's: tensors, or new arrays.

        Args:
            values: the function of tensors.
            args: the arguments.
            rest: further arguments of SciPy's.
            are_new: whether nobody else has these arrays, and they are contiguous ones of float64.
        """
        if rest:
            return self._run_with(values, args, rest)
        if values.__class__ is Replayed and self.device is None:
            found = values.arrays(args)  # type: ignore[attr-defined]
            if found is not None:
                return found
            if are_new:
                return values.usual(list(map(_from_numpy, args)))  # type: ignore[attr-defined]
            tensors = []
            for array in args:
                if array.__class__ is not np.ndarray or array.dtype is not _FLOAT64:
                    break
                tensors.append(_from_numpy(array.copy()))
            else:
                return values.usual(tensors)  # type: ignore[attr-defined]
        return values(*map(self.tensor, args))

    def _run_with(self, values: Any, args: Sequence[Any], rest: tuple[Any, ...]) -> Any:
        extra = self._known_extra(values, args, rest)
        if extra is None:
            unbound = values.unbound if values.__class__ is Replayed else values
            return unbound(*map(self.tensor, args), *self.extra(rest))
        arrays = extra.arrays()
        if arrays is not None:
            found = values.arrays((*args, *arrays))
            if found is not None:
                return found
        tensors = [*map(self.tensor, args), *extra.tensors(are_new=self._compiled is True)]
        return values(*tensors) if arrays is None else values.usual(tensors)

    def at(
        self,
        values: Callable[..., torch.Tensor],
        args: Sequence[Any],
        shape: tuple[int, ...] | None = None,
        rest: tuple[Any, ...] = (),
    ) -> np.ndarray:
        """The same as an array, for callbacks that are called many times.

        Args:
            values: the function of tensors.
            args: the arguments, arrays.
            shape: the shape that the array must have; None for any.
            rest: further arguments of SciPy's.
        """
        enabled = _is_grad_enabled()
        _set_grad_enabled(False)
        try:
            return self.array(self.run(values, args, rest), shape)
        except Exception as error:
            self.named().note(error)
            raise
        finally:
            _set_grad_enabled(enabled)

    def callback(self, values: Callable[..., torch.Tensor]) -> Callable[[Any], np.ndarray]:
        """The same as :meth:`at` for one argument, in as few steps as a small function's own call needs to be most of it.

        Args:
            values: the function of tensors.
        """
        if values.__class__ is not Replayed or self.device is not None:
            return lambda x: self.at(values, (x,))
        usual: Callable[..., torch.Tensor] = values.usual  # type: ignore[attr-defined]
        known, plain, arrays = values.known, values.plain, values.arrays  # type: ignore[attr-defined]

        def call(x: Any) -> np.ndarray:
            if x.__class__ is not np.ndarray or x.dtype is not _FLOAT64:
                return self.at(values, (x,))
            enabled = _is_grad_enabled()
            if enabled:
                _set_grad_enabled(False)
            try:
                array: np.ndarray | None = arrays((x,))
                if array is not None:
                    self.check(array, "value")
                    return array
                last = known.get((x.shape,))
                tensor = _from_numpy(x.copy())
                found = plain(tensor) if last is not None and last[1] is None else usual([tensor])
                if found.dim() == 1 and found.numel() <= FEW:
                    numbers = found.tolist()
                    total = sum(numbers)
                    if total == total:
                        return _array(numbers, _FLOAT64)
                return self.array(found)
            except Exception as error:
                self.named().note(error)
                raise
            finally:
                if enabled:
                    _set_grad_enabled(True)

        return call

    def once(self, key: str, at: tuple[Any, ...], compute: Callable[[], Any], reader: str | None = None) -> Any:
        """What ``compute`` returns, remembered under ``key`` as long as the point stays the same.

        With a ``reader`` it is remembered for one reading by each: callbacks that outlive a solve may start the next one at the
        point where the last one ended, with other values in the function's closure.
        """
        point = tuple([_value(item) for item in at])
        if point != self._at or reader in self._readers:
            self._at, self._objects, self._known = point, at, {}
            self._readers = set()
        if reader is not None:
            self._readers.add(reader)
        if key not in self._known:
            with Named(self.where):
                result = compute()
            self._known[key] = result
        return self._known[key]


class Named:
    """See :meth:`TorchFunction.named`."""

    __slots__ = ("_enabled", "_where")

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        self._enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        torch._C._set_grad_enabled(self._enabled)
        if isinstance(error, Exception):
            self.note(error)

    def note(self, error: Exception) -> None:
        """Add the note to an exception that does not name the function."""
        if self._where not in str(error):
            error.add_note(f"(raised in {self._where})")


def _checked(function: Callable[..., Any], where: str) -> Callable[..., torch.Tensor]:
    """A function whose result is checked to be one real tensor: a closure, so that compiled calls watch what it reads."""

    def checked(*args: Any, **kwargs: Any) -> torch.Tensor:
        return check_real(function(*args, **kwargs), where)

    return checked


def check_real(result: Any, where: str) -> torch.Tensor:
    """A result that is one real tensor; a TypeError otherwise."""
    if not isinstance(result, torch.Tensor):
        raise TypeError(f"{where} must return a tensor, got {type(result).__name__}")
    if not result.dtype.is_floating_point:
        raise TypeError(f"{where} must return real floating point numbers, got {result.dtype}")
    return result


def scalar_of(function: TorchFunction) -> Callable[..., torch.Tensor]:
    """A function whose value is checked to be one number."""
    checked, where = function.checked, function.where

    def scalar(*args: Any) -> torch.Tensor:
        value = checked(*args)
        if value.dim():
            raise ValueError(f"{where} must return a scalar (shape ()), got shape {tuple(value.shape)}")
        return value

    return scalar


def vector_of(function: TorchFunction) -> Callable[..., torch.Tensor]:
    """A function whose value is checked to be a vector."""
    checked, where = function.checked, function.where

    def vector(*args: Any) -> torch.Tensor:
        value = checked(*args)
        if value.dim() != 1:
            raise ValueError(f"{where} must return a vector, got shape {tuple(value.shape)}")
        return value

    return vector


def _value(item: Any) -> Any:
    """What tells an argument from others: the bits of an array (SciPy writes to its arrays in place), a number, an object."""
    if item.__class__ is np.ndarray and not item.dtype.hasobject:
        return item.shape, item.dtype, item.tobytes()
    if item.__class__ is torch.Tensor:
        return id(item), None if item.is_inference() else item._version
    return float(item) if isinstance(item, float) else (None, id(item))


def matrix(function: TorchFunction, found: Any, shape: tuple[int, ...], what: str) -> Any:
    """A dense or COO derivative as a numpy array or a ``scipy.sparse.csr_array`` of a given shape."""
    if found.__class__ is np.ndarray or found.layout == torch.strided:
        return function.array(found if found.shape == shape else found.reshape(shape), what=what)
    rows, columns = found.indices().cpu().numpy()
    values = function.array(found.values(), what=what)
    return sparse.csr_array((values, (rows, columns)), shape=shape)


def check_layout(layout: str, caller: str, allowed: tuple[str, ...] = LAYOUTS) -> None:
    """Raise a ValueError if a layout is not among those that a solver takes."""
    if layout not in allowed:
        raise ValueError(f"chainrule.scipy.{caller}: layout must be one of {', '.join(allowed)} here, got {layout!r}")


def check_absent(options: dict[str, Any], names: tuple[str, ...], caller: str) -> None:
    """Raise a TypeError if an option is given that chainrule sets itself."""
    for name in names:
        if name in options:
            raise TypeError(f"chainrule.scipy.{caller}: {name} is derived from the function and cannot be given")


__all__ = [
    "FEW", "LAYOUTS", "Device", "TorchFunction", "check_absent", "check_layout", "check_real", "matrix", "scalar_of", "vector_of",
]  # fmt: skip
