"""Whether the functions that torch has in Python still call what they called when this package was imported.

What such a function runs is kept and replayed (:mod:`chainrule.capture.composites`, :mod:`chainrule.execute.mapped_calls`). That
holds as long as its body finds torch's own functions under the names that it reads: somebody may put others in their place
(``F.linear = ...``, ``mock.patch``). For every function these places are known; they are looked at before anything is kept or
replayed.
"""

from __future__ import annotations

import gc
import math
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from chainrule.shortcuts import configure

#: What stands for a name that is not in a namespace.
_ABSENT = ...

#: Names that lead to function modes.
_DOORS = frozenset(("handle_torch_function", "has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"))

#: Where attributes are found elsewhere, unless somebody sets them here.
_INHERITING = (torch.Tensor, torch._VF)

_MODULES: tuple[Any, ...] = (
    F, torch.functional, torch._tensor, torch, torch._C, torch._C._nn, torch._C._linalg, torch.linalg, torch._VF,  # type: ignore[attr-defined]
    torch.nn._reduction, math,
)  # fmt: skip

#: Kinds of functions that nobody writes in Python.
_BUILTIN = frozenset(
    (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType)
)

#: Kinds of functions that stand in no other's place.
_NEVER_REPLACED = _BUILTIN | {torch._ops.OpOverload}

_Place = tuple[dict[str, Any], str, Any]


def _namespace(owner: Any) -> dict[str, Any]:
    """The dictionary of a module or a class itself, which the compiled handlers read."""
    names = vars(owner)
    return names if isinstance(names, dict) else gc.get_referents(names)[0]


#: By the identity of a namespace: its owner, itself, and what was in it.
_SPACES = {
    id(names): (owner, names, dict(names)) for owner in (*_MODULES, torch.Tensor) for names in (_namespace(owner),)
}  # fmt: skip


def _names(code: types.CodeType) -> Iterator[str]:
    """The names of globals and attributes that code reads."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _found(space: int, names: set[str]) -> Iterator[_Place]:
    """The functions, classes and modules that have one of some names in a namespace."""
    owner, now, then = _SPACES[space]
    for name in names & then.keys():
        if callable(then[name]) or isinstance(then[name], types.ModuleType):
            yield now, name, then[name]
    if owner in _INHERITING:
        for name in sorted(names - then.keys()):
            if hasattr(torch._C.TensorBase if owner is torch.Tensor else owner.vf, name):
                yield now, name, _ABSENT


def _collect(function: types.FunctionType, places: dict[tuple[int, str], _Place], seen: set[Any]) -> bool:
    """Add the places that a function reads, and those that it calls; whether torch's own functions are there."""
    if function in seen:
        return True
    seen.add(function)
    inner = [cell.cell_contents for cell in function.__closure__ or ()]
    spaces = [id(function.__globals__), id(_namespace(torch.Tensor))]
    if spaces[0] in _SPACES:
        names = set(_names(function.__code__)) - _DOORS
        for space in spaces:  # which grows
            for place in _found(space, names):
                places[space, place[1]] = place
                inner.append(place[2])
                owned = id(_namespace(place[2])) if isinstance(place[2], (types.ModuleType, type)) else None
                if owned in _SPACES and owned not in spaces:
                    spaces.append(owned)
    called = [item for item in inner if item.__class__ is types.FunctionType]
    return all([item.__globals__.get("__name__", "").startswith("torch") for item in called]) and all(
        [_collect(item, places, seen) for item in called]
    )


class _Places(dict[Any, tuple[Any, ...] | None]):
    """The places that functions read, found out when they are asked for: namespaces, names and contents, one after the other."""

    def __missing__(self, function: Any) -> tuple[Any, ...] | None:
        places: dict[tuple[int, str], _Place] = {}
        own = _collect(function, places, set())
        found = self[function] = tuple([item for place in places.values() for item in place]) if own else None
        return found


#: By function; None for one that called something else than torch's own functions from the beginning.
PLACES = _Places()
configure(places=PLACES)


def calls_torch(function: types.FunctionType) -> bool:
    """Whether a function that torch has in Python calls torch's own functions."""
    places = PLACES[function]
    if places is None:
        return False
    rest = iter(places)
    return all([names.get(name, _ABSENT) is content for names, name, content in zip(rest, rest, rest, strict=True)])


def original_of(function: Any) -> Any:
    """Torch's own function where another one stands in its place now; None for any other function.

    The door of a function of torch in Python tells modes its name's content, which is the replacement if that is what called it.
    """
    if function.__class__ in _NEVER_REPLACED or function.__class__ is types.FunctionType and _is_torch(function):
        return None
    for _, now, then in _SPACES.values():
        for name, content in now.items():
            if content is function and (original := then.get(name)) is not None and original is not function:
                return original
    return None


def _is_torch(function: types.FunctionType) -> bool:
    name: str = function.__globals__.get("__name__", "")
    return name == "torch" or name.startswith("torch.")


__all__ = ["PLACES", "calls_torch", "original_of"]
