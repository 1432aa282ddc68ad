"""The base class of the modes, in C where it could be compiled (``_shortcuts.c``) and in Python everywhere else.

Setting ``CHAINRULE_PURE_PYTHON=1`` in the environment before the import chooses Python.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

#: Dtypes of tensors that take no way of their own, and those among them that have derivatives.
FLOATING = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
REAL = FLOATING | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}

#: What a mode is to the base class.
NO_KIND, VMAP, TAPE = 0, 1, 2


class Handler:
    """What a mode's function handler reads; calls go to ``take_function``."""

    _depth = -1
    below: Any = None
    graphs = False
    kind = NO_KIND

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Take a function of the table."""
        return self.take_function(func, types, args, kwargs)

    def take_function(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Take a function of the table; given by the modes."""
        raise NotImplementedError

    def _run_common(self, facts: Any, args: tuple[Any, ...]) -> Any:
        """Run an op of plain arguments and record it, in C; NotImplemented, with nothing done, for others."""
        return NotImplemented


def configure(**known: Any) -> None:
    """Give the handlers the objects that they use; those in Python know them."""


def use_facts(facts: type) -> None:
    """Give the handlers the class of what is known of ops; those in Python know it."""


def use_state(*addresses: Any) -> None:
    """Give the handlers torch's functions on the state of its dispatcher; those in Python use their bindings."""


def read_state() -> tuple[bool, int, int, bool]:
    """What those functions say: functorch at work, the numbers of modes of either kind, functions shown to modes."""
    raise NotImplementedError


def set_excluded(excluded: bool) -> None:
    """Exclude the key of torch's Python handlers by those functions."""
    raise NotImplementedError


def set_functions(disabled: int) -> int:
    """Hide torch's functions from classes (1), from modes as well (2), or not (0); returns what it was."""
    raise NotImplementedError


class Method:
    """A function of the table as a method of `BatchTensor`, for which it needs no mode; there is none in Python."""

    def __init__(self, function: Any, otherwise: Any) -> None:
        raise NotImplementedError


def use_classes(batch_tensor: type, batched: type) -> None:
    """Give the handlers the classes of vmap; those in Python know them."""


#: Whether the handlers are compiled.
COMPILED = False

if not TYPE_CHECKING and os.environ.get("CHAINRULE_PURE_PYTHON", "0") in ("", "0"):
    try:
        from chainrule._shortcuts import (  # noqa: F401, F811 - in their place
            Handler,
            Method,
            configure,
            read_state,
            set_excluded,
            set_functions,
            use_classes,
            use_facts,
            use_state,
        )
    except ImportError:
        pass
    else:
        COMPILED = True
