"""Whether a zero derivative is that of the values: they may have left torch on the way (``.item()``), or have been detached."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from chainrule.capture.code_reading import code_names
from chainrule.scipy.plain_code import only_computes
from chainrule.transforms.sparsity import sparsity

#: What code names that takes values out of torch, or out of derivatives.
_LEAVING = frozenset(
    {
        "item", "tolist", "numpy", "float", "int", "complex", "detach", "data", "no_grad", "inference_mode", "set_grad_enabled",
        "full", "new_full", "full_like", "fill", "linspace", "logspace", "arange", "scalar_tensor", "tensor", "as_tensor",
        "asarray", "Tensor", "FloatTensor", "DoubleTensor", "new_tensor", "from_numpy", "math", "array",
    }
)  # fmt: skip

#: The step of a difference, relative to a value; and how far the ratio of differences may be from that of their steps.
_STEP = 1e-4
_RATIO = 0.1

#: Differences that are smaller than this, relative to the values, may be rounding errors.
_LEAST = 1e-8

#: Functions whose zeros were looked at, and with which further arguments; so many are kept.
_SEEN: weakref.WeakKeyDictionary[Any, set[Any]] = weakref.WeakKeyDictionary()
_KEPT = 256


def check_connected(
    user: Any, where: str, vector: Callable[..., torch.Tensor], args: Sequence[Any], argnum: int, found: Any, *, is_whole: bool
) -> None:
    """Raise an error if a derivative is zero where torch has no path, and the values change all the same.

    Zero rows and columns are looked at: of a derivative that is zero as a whole, and otherwise where the function's code names
    something that takes values out of torch. They have to be empty in the structural pattern, too, and differences of the
    values have to be there and in proportion to their steps: jumps and random numbers are no derivatives.

    Args:
        user: the user's function.
        where: the solver and the function, as messages begin.
        vector: the function of tensors that was differentiated.
        args: its arguments.
        argnum: the argument that it was differentiated with respect to, a vector.
        found: the derivative, an array ``(n,)`` or ``(m, n)``, or a sparse matrix.
        is_whole: whether a derivative that is zero as a whole is looked at in any case.

    Raises:
        RuntimeError: the derivative is missing.
    """
    rows, columns = _zeros(found)
    if not (rows.any() or columns.any()) or not (rows.size and columns.size):
        return
    is_function = isinstance(user, types.FunctionType)
    # The zeros of one weight say nothing about those of another.
    others = tuple([_value(item) for number, item in enumerate(args) if number != argnum])
    if (is_function and others in _SEEN.get(user, ())) or not ((is_whole and rows.all()) or _may_leave(user)):
        return
    message = _missing(vector, args, argnum, rows, columns)
    if message:
        raise RuntimeError(
            f"{where}: {message} is zero, but the values change with it. Values that leave torch (.item(), float(), .tolist(), "
            "torch.tensor([x[0]])), or are detached, have no derivative: compute with the tensors themselves."
        )
    if is_function:
        seen = _SEEN.setdefault(user, set())
        if len(seen) >= _KEPT:
            seen.clear()
        seen.add(others)


def _value(item: Any) -> Any:
    """What tells a value from others; of an object that could change, nothing does."""
    if isinstance(item, torch.Tensor) and item.layout is torch.strided and not item.is_complex():
        return item.shape, item.dtype, item.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(item, (int, float, str, bytes, type(None))):
        return item.__class__, item
    return object()


def _zeros(found: Any) -> tuple[np.ndarray, np.ndarray]:
    """The rows and columns that are zero."""
    if found.__class__ is np.ndarray:
        entries = (found if found.ndim == 2 else found[None]) != 0
    else:
        entries = found != 0
    return tuple(np.asarray(entries.sum(axis)).reshape(-1) == 0 for axis in (1, 0))  # type: ignore[return-value]


def _may_leave(user: Any) -> bool:
    """Whether the code of a function, or of one that it calls, names something by which values leave torch, or is not known."""
    if not only_computes(user):
        return True
    pending, seen = [user], set[int]()
    while pending:
        item = pending.pop()
        item = getattr(item, "__func__", item)
        if not isinstance(item, types.FunctionType):
            item = vars(type(item)).get("__call__")
        if not isinstance(item, types.FunctionType) or id(item) in seen:
            continue
        seen.add(id(item))
        names = code_names(item.__code__)
        if not _LEAVING.isdisjoint(names):
            return True
        read = [item.__globals__.get(name) for name in names]
        for cell in item.__closure__ or ():
            try:
                read.append(cell.cell_contents)
            except ValueError:
                continue
        if any(value is np for value in read):  # it takes numbers out of tensors by many names
            return True
        own = (types.FunctionType, types.MethodType)
        pending += [f for f in read if isinstance(f, own) and not f.__module__.startswith(("torch.", "chainrule."))]
    return False


def _missing(
    vector: Callable[..., torch.Tensor], args: Sequence[Any], argnum: int, rows: np.ndarray, columns: np.ndarray
) -> str:
    """Which derivative is missing, in words; empty if none is known to be."""
    x = args[argnum].detach()

    def at(place: np.ndarray) -> np.ndarray:
        given = list(args)
        given[argnum] = torch.from_numpy(place).to(x.device)
        value: np.ndarray = vector(*given).detach().cpu().double().numpy().reshape(-1)
        return value

    def without_path(axis: int) -> np.ndarray:
        """The rows or columns that torch can have no path for."""
        found = np.ones((rows if axis == 0 else columns).size, dtype=bool)
        found[sparsity(vector, *args, argnums=argnum, global_=True).indices[axis].cpu().numpy()] = False
        return found

    try:
        point = x.cpu().numpy().copy()
        # The pattern of a long function takes longer than some calls of it.
        changed = _changes(at, point, np.ones(point.size)) & rows if rows.any() else rows
        if changed.any():
            changed &= without_path(0)
            if changed.any():
                return "its derivative" if changed.all() else f"the derivative of its value {int(changed.argmax())}"
        if columns.any() and _changes(at, point, columns.astype(np.float64)).any():
            for number in np.flatnonzero(columns & without_path(1)):
                if _changes(at, point, np.eye(point.size)[number]).any():
                    return f"its derivative by number {number} of what it is given"
    except Exception:  # noqa: BLE001 - a solver does not ask at these points
        return ""
    return ""


def _changes(at: Callable[[np.ndarray], np.ndarray], point: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Which values change in proportion to small steps."""
    step = _STEP * np.maximum(1.0, np.abs(point)) * direction * (1 + np.arange(point.size) * 0.618 % 1) / 2
    whole, again, half = (at(point + s) - at(point - s) for s in (step, step, step / 2))
    least = _LEAST * np.maximum(np.abs(at(point)), _STEP)
    with np.errstate(all="ignore"):
        return (np.abs(half) > least) & (np.abs(whole / half - 2) < _RATIO) & (whole == again)


__all__ = ["check_connected"]
