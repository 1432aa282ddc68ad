"""Whether a zero derivative is that of the values: they may have left torch on the way (``.item()``), or have been detached."""

from __future__ import annotations

import types
from collections import deque
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

#: The step of a difference, relative to a value; and how far ratios of differences may be from those of their steps.
_STEP = 1e-4
_RATIO = 0.1

#: A far smaller step, relative to the other, that tells slopes from values that are rounded; and how far it may be off.
_FINE = 3e-3
_FINE_RATIO = 0.5

#: A central difference that is smaller than this, relative to those to one side, is that of a square.
_EVEN = 1e-3

#: Differences that are smaller than this, relative to the values, may be rounding errors.
_LEAST = 1e-8

#: How many groups of columns are looked at that change values otherwise than by a slope.
_GROUPS = 16


def check_connected(
    user: Any, where: str, vector: Callable[..., torch.Tensor], args: Sequence[Any], argnum: int, found: Any, *, is_whole: bool
) -> None:
    """Raise an error if a derivative is zero where torch has no path, and the values change all the same.

    Zero rows and columns are looked at: of a derivative that is zero as a whole, and otherwise where the function's code names
    something that takes values out of torch. They have to be empty in the structural pattern, too, and differences of the
    values have to be there, in proportion to their steps and the same forward and backward: jumps, kinks (where torch's
    derivative is that of one side) and random numbers are no missing derivatives.

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
    if not ((is_whole and rows.all()) or _may_leave(user)):
        return
    message = _missing(vector, args, argnum, rows, columns)
    if message:
        raise RuntimeError(
            f"{where}: {message} is zero, but the values change with it. Values that leave torch (.item(), float(), .tolist(), "
            "torch.tensor([x[0]])), or are detached, have no derivative: compute with the tensors themselves."
        )


def _zeros(found: Any) -> tuple[np.ndarray, np.ndarray]:
    """The rows and columns that are zero."""
    if found.__class__ is np.ndarray:
        entries = (found if found.ndim == 2 else found[None]) != 0
    else:
        entries = found != 0
    return tuple(np.asarray(entries.sum(axis)).reshape(-1) == 0 for axis in (1, 0))  # type: ignore[return-value]


def _may_leave(user: Any) -> bool:
    """Whether the code of a function, or of one that it calls, names something by which values leave torch, or is not known."""
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
        pending += [f for f in read if isinstance(f, own) and not (f.__module__ or "").startswith(("torch.", "chainrule."))]
    return not only_computes(user)


def _missing(
    vector: Callable[..., torch.Tensor], args: Sequence[Any], argnum: int, rows: np.ndarray, columns: np.ndarray
) -> str:
    """Which derivative is missing, in words; empty if none is known to be."""
    x = args[argnum].detach()

    def at(place: np.ndarray) -> tuple[np.ndarray, bool]:
        """Values, and whether they are computed finely."""
        given = list(args)
        given[argnum] = torch.from_numpy(place).to(x.device)
        value = vector(*given).detach()
        return value.cpu().double().numpy().reshape(-1), value.dtype == torch.float64

    def without_path(axis: int) -> np.ndarray:
        """The rows or columns that torch can have no path for."""
        found = np.ones((rows if axis == 0 else columns).size, dtype=bool)
        found[sparsity(vector, *args, argnums=argnum, global_=True).indices[axis].cpu().numpy()] = False
        return found

    try:
        point = x.cpu().numpy().copy()
        # The pattern of a long function takes longer than some calls of it.
        changed = _changes(at, point, np.ones(point.size))[0] & rows if rows.any() else rows
        if changed.any():
            changed &= without_path(0)
            if changed.any():
                return "its derivative" if changed.all() else f"the derivative of its value {int(changed.argmax())}"
        if columns.any() and _changes(at, point, columns.astype(np.float64))[1]:
            number = _missing_column(at, point, np.flatnonzero(columns & without_path(1)))
            return "" if number is None else f"its derivative by number {number} of what it is given"
    except Exception:  # noqa: BLE001 - a solver does not ask at these points
        return ""
    return ""


_Values = Callable[[np.ndarray], tuple[np.ndarray, bool]]


def _missing_column(at: _Values, point: np.ndarray, numbers: np.ndarray) -> int | None:
    """One of some numbers by which values change in proportion; None if none is found by halving a bounded number of groups."""
    groups, left, here = deque([numbers]), _GROUPS, at(point)
    while groups and left:
        group = groups.popleft()
        if not group.size:
            continue
        direction = np.zeros(point.size)
        direction[group] = 1
        slopes, moves = _changes(at, point, direction, here)
        halves = (group[: group.size // 2], group[group.size // 2 :])
        if slopes.any():
            if group.size > 1:
                groups.extendleft(halves)
            elif _changes(at, point, direction)[0].any():
                return int(group[0])
        elif moves and group.size > 1:  # some may have a slope, and others a kink
            left -= 1
            groups.extend(halves)
    return None


def _changes(
    at: _Values, point: np.ndarray, direction: np.ndarray, known: tuple[np.ndarray, bool] | None = None
) -> tuple[np.ndarray, bool]:
    """Which values have a slope, the same to both sides and for steps of all sizes; and whether any changes otherwise.

    Args:
        at: the values at a point, and whether they are computed finely.
        point: where.
        direction: the direction of the steps.
        known: what ``at`` gives here. The values are not looked at for more than kinks and jumps then.
    """
    step = _STEP * np.maximum(1.0, np.abs(point)) * direction * (1 + np.arange(point.size) * 0.618 % 1) / 2
    here, is_fine = known or at(point)
    least = _LEAST * np.maximum(np.abs(here), _STEP)

    def sides(step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return at(point + step)[0] - here, here - at(point - step)[0]

    forward, backward = sides(step)
    # At a minimum, where zeros are most common, both sides change alike.
    moved = np.abs(forward + backward) > np.maximum(least, _EVEN * np.maximum(np.abs(forward), np.abs(backward)))
    if not moved.any():
        return moved, False
    if known is None:
        moved &= at(point + step)[0] - here == forward  # it is not random
        if not moved.any():
            return moved, False
    half_forward, half_backward = sides(step / 2)
    whole, half = forward + backward, half_forward + half_backward
    moved &= np.abs(whole) < 4 * np.abs(half)  # of higher order it is eight times as much
    with np.errstate(all="ignore"):
        slopes = moved & (np.abs(half) > least) & (np.abs(whole / half - 2) < _RATIO)
        slopes &= np.abs(half_forward - half_backward) < _RATIO * np.abs(half) / 2
        if known is None and is_fine and slopes.any():
            fine = sum(sides(step * _FINE))
            is_rounding = np.abs(whole) * _FINE < 1e3 * np.finfo(np.float64).eps * np.abs(here)
            slopes &= is_rounding | (np.abs(fine / (whole * _FINE) - 1) < _FINE_RATIO)
    return slopes, bool(moved.any())


__all__ = ["check_connected"]
