"""The base class of the modes, and the guards of compiled functions: in C where that was compiled, in Python elsewhere.

Setting ``CHAINRULE_PURE_PYTHON=1`` in the environment before the import chooses Python.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

#: Dtypes of tensors that take no way of their own, and those among them that have derivatives.
FLOATING = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
REAL = FLOATING | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
#: Dtypes of tensors that torch's autograd has to see.
COMPLEX = frozenset({torch.complex64, torch.complex128})

#: The keys of torch's dispatcher that stand for autocast.
AUTOCAST_KEYS = functools.reduce(
    torch._C.DispatchKeySet.__or__,
    (
        torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, "Autocast" + device))
        for device in ("CPU", "CUDA", "XPU", "MPS", "HPU", "PrivateUse1")
    ),
)

#: What a mode is to the base class.
NO_KIND, VMAP, TAPE = 0, 1, 2


class Handler:
    """What a mode's function handler reads; calls go to ``take_function``."""

    _depth = -1
    below: Any = None
    graphs = False
    kind = NO_KIND
    heard: Any = None

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Take a function of the table."""
        return self.take_function(func, types, args, kwargs)

    def take_function(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Take a function of the table; given by the modes."""
        raise NotImplementedError

    def __enter__(self) -> Any:
        """Enter the mode."""
        return self._enter()

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Leave the mode."""
        self._exit()

    def _enter(self) -> Any:
        """Enter the mode; given by the modes."""
        raise NotImplementedError

    def _exit(self) -> None:
        """Leave the mode; given by the modes."""
        raise NotImplementedError

    def _begin(self, facts: dict[int, Any], policy: Any, respect_no_grad: bool, kernels: bool) -> None:
        """Make the tables of a tape, which takes what is active now for what lies outside of it."""
        tape: Any = self
        tape.values, tape.active, tape.key, tape.records, tape.pending, tape._entered = [], [], [], [], [], []
        tape.inputs, tape.kept, tape.derived = [], [], set()
        tape.slots, tape._derived, tape.prepared, tape.hooks, tape.sources = {}, {}, {}, {}, {}
        tape._alias = tape._origin = None
        tape._facts, tape.policy = facts, policy
        tape._outside = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
        tape.respect_no_grad = respect_no_grad
        tape.kernels = kernels
        tape.kind = TAPE
        tape.meets_saved = False

    def _begin_level(self, size: int, randomness: str, calls: Any, nested: bool, guarded: bool) -> None:
        """Begin a level of vmap, which takes what is active now for what lies outside of it."""
        level: Any = self
        level._entered, level.fallbacks = [], []
        level._include = torch._C._dispatch_tls_local_include_set()
        level._exclude = torch._C._dispatch_tls_local_exclude_set() | AUTOCAST_KEYS
        level.size, level.randomness, level._calls = size, randomness, calls
        level.kind = VMAP
        level._records = torch.is_grad_enabled()
        level._nested, level._always_guard = nested, guarded

    def _run_recorded(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function below autograd with this tape on, in C where the dispatcher's state is known."""
        raise NotImplementedError

    def _run_common(self, facts: Any, args: tuple[Any, ...]) -> Any:
        """Run an op of plain arguments and record it, in C; NotImplemented, with nothing done, for others."""
        return NotImplemented

    def _run_part_at_once(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a part of an op and record it."""
        return self._run_part_here(op, *args, **kwargs)

    def _run_part_here(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a part of an op and record it; given by the tape."""
        raise NotImplementedError

    def _run_seen(self, call: Any, args: tuple[Any, ...]) -> Any:
        """Call a function on tensors without a graph so that torch notes views and writes, in C; else NotImplemented."""
        return NotImplemented


def configure(**known: Any) -> None:
    """Give the handlers the objects that they use; those in Python know them."""


def use_facts(facts: type) -> None:
    """Give the handlers the class of what is known of ops; those in Python know it."""


def use_state(*addresses: Any) -> None:
    """Give the handlers torch's functions on the state of its dispatcher; those in Python use their bindings."""


def use_tensor_facts(addresses: tuple[int, ...], offset: int, strided: int, real: int) -> None:
    """Give the handlers torch's functions on a tensor; those in Python ask the tensor."""


def read_tensor_facts(tensor: Any) -> tuple[int, int, int, tuple[int, ...], tuple[int, ...]] | None:
    """What those functions say of a real tensor: dtype, device and its index by their numbers, sizes and strides."""
    return None


def read_state() -> tuple[bool, int, int, bool, bool, bool]:
    """What those functions say: functorch at work, the numbers of modes of either kind, functions shown, autocast, gradients."""
    raise NotImplementedError


def set_excluded(excluded: bool) -> None:
    """Exclude the key of torch's Python handlers by those functions."""
    raise NotImplementedError


def set_functions(disabled: int) -> int:
    """Hide torch's functions from classes (1), from modes as well (2), or not (0); returns what it was."""
    raise NotImplementedError


def call_alone(
    route: Any, args: tuple[Any, ...], kwargs: dict[str, Any], seeds: tuple[Any, ...] = (), function: Any = None
) -> Any:
    """Run a transform that nothing is around by its route, and replay the plan that is known for the run.

    With a function in the place of the route's own, seeds have to be plain and as the argument that is differentiated.

    Returns:
        ``(True, result, output of the function)``; ``(False, None, tape, leaf, output, whether gradients are on, arguments)``
        where the plan is left to Python; NotImplemented, with nothing done, where all is. In Python that is always so.
    """
    return NotImplemented


def call_mapped(route: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As :func:`call_alone` for a vmap of a transform; a run has its level in the place of None, and the mapped arguments."""
    return NotImplemented


def handle_torch_function(function: Any, relevant: Any, *args: Any, **kwargs: Any) -> Any:
    """Hand a function that torch has in Python to the innermost mode, in C; otherwise torch's own does it."""
    raise NotImplementedError


class Method:
    """A function of the table as a method of `BatchTensor`, for which it needs no mode; there is none in Python."""

    def __init__(self, function: Any, otherwise: Any) -> None:
        raise NotImplementedError


class Property:
    """An attribute of `BatchTensor` for which it needs no mode; there is none in Python."""

    def __init__(self, asked: Any, replayed: Any) -> None:
        raise NotImplementedError


def use_classes(batch_tensor: type, batched: type) -> None:
    """Give the handlers the classes of vmap; those in Python know them."""


#: How a :class:`Watch` reads a place.
CELL, ITEM, ATTRIBUTE, SIZE, EQUAL, TABLE, TYPE, LACKS, EMPTY = range(9)


def _same_table(container: Any, keys: tuple[Any, ...], values: tuple[Any, ...], by_value: Any, same: Any) -> bool:
    """Whether a dictionary, a list or a class has these entries; NotImplemented stands for any value."""
    table = vars(container) if isinstance(container, type) else container
    if len(table) != len(keys):
        return False
    found = list(table) if isinstance(table, list) else [table[key] for key in keys] if not isinstance(table, dict) else [
        dict.__getitem__(table, key) for key in keys
    ]
    return all(
        value is NotImplemented or one is value or (bool(by_value) and by_value[number] and same(one, value))
        for number, (one, value) in enumerate(zip(found, values, strict=True))
    )


class Watch:
    """Called, it says whether places hold what they held.

    Args:
        same: whether two plain values are the same.
        places: each is ``(kind, container, key, value, by_value)``: the content of a cell, an item, an attribute has to be
            ``value`` itself, or the same by value; the size or the class of the container has to be ``value``; for ``EQUAL``, the
            container is a function that is given key and value; for ``TABLE`` it is a dictionary, a list or a class, with a tuple
            of all keys and one of their values (NotImplemented where it may be any), and ``by_value`` is False or says it of each
            entry; for ``LACKS`` it is a dictionary that has none of the names in ``value``; for ``EMPTY`` the value is a tuple of
            dictionaries without entries.
    """

    def __init__(self, same: Callable[[Any, Any], bool], places: tuple[tuple[int, Any, Any, Any, Any], ...]) -> None:
        names: dict[str, Any] = {"same": same, "same_table": _same_table}
        conditions = []
        for number, (kind, container, key, value, by_value) in enumerate(places):
            c, k, v = (f"{letter}{number}" for letter in "ckv")
            names.update({c: container, k: key, v: value})
            found = {CELL: f"{c}.cell_contents", ITEM: f"{c}[{k}]", ATTRIBUTE: f"getattr({c}, {k})"}.get(kind, "")
            one = {
                SIZE: f"len({c}) == {v}", EQUAL: f"{c}({k}, {v})", TABLE: f"same_table({c}, {k}, {v}, {by_value!r}, same)",
                TYPE: f"type({c}) is {v}", LACKS: f"{c}.keys().isdisjoint({v})",
                EMPTY: f"not any({v})",
            }.get(kind, f"{found} is {v}")  # fmt: skip
            conditions.append(f"({one} or same({found}, {v}))" if found and by_value else one)
        text = f"def holds():\n    return bool({' and '.join(conditions) or True})\n"
        exec(compile(text, "<chainrule guard>", "exec"), names)  # noqa: S102 - our own generated source
        self._holds: Callable[[], bool] = names["holds"]

    def __call__(self) -> bool:
        """Whether they do; a place that is gone does not."""
        try:
            return self._holds()
        except (AttributeError, LookupError, ValueError):
            return False


#: Whether the handlers are compiled.
COMPILED = False

if not TYPE_CHECKING and os.environ.get("CHAINRULE_PURE_PYTHON", "0") in ("", "0"):
    try:
        from chainrule._shortcuts import (  # noqa: F401, F811 - in their place
            Handler,
            Method,
            Property,
            Watch,
            call_alone,
            call_mapped,
            configure,
            handle_torch_function,
            read_state,
            read_tensor_facts,
            set_excluded,
            set_functions,
            use_classes,
            use_facts,
            use_state,
            use_tensor_facts,
        )
    except ImportError:
        pass
    else:
        COMPILED = True
