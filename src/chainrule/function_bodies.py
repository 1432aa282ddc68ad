"""The bodies of torch's functions that are written in Python, without the door that leads to function modes.

Such a function (``F.layer_norm``, ``F.multi_head_attention_forward``) first asks whether a function mode is on, and hands
itself to it. What it calls after that is hidden from the mode. Its body alone, with that question answered by no, can be run
with the mode on: the calls in it are then taken one by one.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

_NOBODY: dict[str, Any] = dict.fromkeys(
    ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), lambda *items: False
)


class _Globals(dict[str, Any]):
    """The globals of a module, looked up when they are read, but for those names."""

    def __init__(self, module: types.ModuleType) -> None:
        super().__init__(_NOBODY)
        self._module = module.__dict__

    def __missing__(self, name: str) -> Any:
        return self._module[name]


_OPEN = {id(module.__dict__): _Globals(module) for module in (F, torch.functional)}
_BODIES: dict[Any, Callable[..., Any] | None] = {}

#: What the operators of tensors are that torch has in Python (``1 / x``, ``2 ** x``): a door around a function.
_OPERATOR = "_handle_torch_function_and_wrap_type_error_to_not_implemented.<locals>.wrapped"

#: What F.max_pool2d and its like are: two functions, one of which is called, by a flag among the arguments.
_CHOICE = "boolean_dispatch.<locals>.fn"


def body_of(function: Any) -> Callable[..., Any] | None:
    """The body of a function, None where it has none that can be run so."""
    try:
        return _BODIES[function]
    except KeyError:
        body = _BODIES[function] = _made(function)
        return body


def _made(function: Any) -> Callable[..., Any] | None:
    if function.__class__ is types.FunctionType and function.__qualname__ == _CHOICE:
        return _choosing(function)
    if function.__class__ is types.FunctionType and function.__code__.co_qualname == _OPERATOR:
        # What it makes of a TypeError is made of it by the door that has been gone through.
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        return next((cell.cell_contents for name, cell in cells if name == "f"), None)
    if function.__class__ is not types.FunctionType or "handle_torch_function" not in function.__code__.co_names:
        return None
    names = _OPEN.get(id(function.__globals__))
    if names is None:
        return None
    body = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def _choosing(function: types.FunctionType) -> Callable[..., Any] | None:
    """A choice between two functions as one between their bodies."""
    cells: list[types.CellType] = []
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        content = cell.cell_contents
        if name in ("if_true", "if_false"):
            content = body_of(content)
            if content is None:
                return None
        cells.append(types.CellType(content))
    return types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells))
