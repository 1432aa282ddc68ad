"""What a function reads beside its arguments: closures, globals, attributes, and a test whether any of it was replaced."""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

#: Values that are compared, where everything else is told apart by identity.
_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size, enum.Enum, range)

#: Packages whose functions read no state that a user replaces.
_LIBRARIES = ("torch", "chainrule", "numpy", "scipy", "builtins", "functools", "math", "operator", "collections", "itertools")

#: More than this many values are not watched.
_LIMIT = 20_000


class Surroundings:
    """The values that a function found outside of its arguments when it was recorded.

    They are followed through closures, default arguments, the globals that the code names, bound objects and their
    attributes, modules with their parameters and buffers, `functools.partial`, lists, tuples and dictionaries. Not
    followed: objects without ``__dict__``, and whatever is computed by calls (files, the time, Python's random numbers).

    Args:
        roots: the functions and other objects to start from.

    Attributes:
        changed: where something was replaced, in words, once :meth:`hold` has said no.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self._seen: dict[int, Any] = {}
        self._conditions: list[str] = []
        self._names: dict[str, Any] = {"same": _same}
        self._places: list[tuple[str, Callable[[], Any], Any]] = []
        self.changed = ""
        pending = [(root, "the function") for root in roots]
        while pending and len(self._places) < _LIMIT:
            item, where = pending.pop()
            if id(item) in self._seen or isinstance(item, (*_PLAIN, torch.Tensor)):
                continue
            self._seen[id(item)] = item
            pending.extend(self._inside(item, where))
        body = " and ".join(self._conditions) or "True"
        gone = "(AttributeError, KeyError, IndexError, ValueError)"
        text = f"def hold():\n    try:\n        return {body}\n    except {gone}:\n        return False\n"
        exec(compile(text, "<chainrule guard>", "exec"), self._names)  # noqa: S102 - our own generated source
        self._hold: Callable[[], bool] = self._names["hold"]

    def hold(self) -> bool:
        """Whether everything is as it was."""
        if self._hold():
            return True
        self.changed = next((where for where, read, value in self._places if not _still(read, value)), "a container")
        return False

    def _name(self, item: Any) -> str:
        name = f"v{len(self._names)}"
        self._names[name] = item
        return name

    def _watch(self, container: Any, access: str, value: Any, where: str, read: Callable[[], Any]) -> None:
        place = f"{self._name(container)}{access}"
        kept = self._name(value)
        plain = isinstance(value, _PLAIN) and not isinstance(value, (bool, type(None)))
        self._conditions.append(f"({place} is {kept} or same({place}, {kept}))" if plain else f"{place} is {kept}")
        self._places.append((where, read, value))

    def _entries(self, table: dict[Any, Any], keys: Iterable[Any], where: str) -> Iterator[tuple[Any, str]]:
        for key in keys:
            if not isinstance(key, (str, int)):
                continue
            value = table[key]
            name = f"{where}.{key}" if isinstance(key, str) else f"{where}[{key}]"
            self._watch(table, f"[{key!r}]", value, name, functools.partial(table.__getitem__, key))
            yield value, name

    def _inside(self, item: Any, where: str) -> Iterator[tuple[Any, str]]:
        if isinstance(item, types.FunctionType):
            yield from self._function(item)
        elif isinstance(item, types.MethodType):
            yield item.__func__, where
            yield item.__self__, type(item.__self__).__name__
        elif isinstance(item, functools.partial):
            yield item.func, where
            yield item.args, f"{where}'s arguments"
            yield item.keywords, f"{where}'s arguments"
        elif isinstance(item, dict):
            self._size(item)
            yield from self._entries(item, list(item), where)
        elif isinstance(item, (list, tuple)):
            if isinstance(item, list):
                self._size(item)
            for number, value in enumerate(item):
                if isinstance(item, list):
                    self._watch(item, f"[{number}]", value, f"{where}[{number}]", functools.partial(item.__getitem__, number))
                yield value, f"{where}[{number}]"
        elif isinstance(item, torch.nn.Module):
            yield from self._module(item, where)
        elif not isinstance(item, (type, types.ModuleType, types.BuiltinFunctionType)) and not _from_library(type(item)):
            table = getattr(item, "__dict__", None)
            if isinstance(table, dict):
                yield from self._entries(table, list(table), where)
            yield from self._methods(type(item), where)

    def _size(self, container: Any) -> None:
        self._conditions.append(f"len({self._name(container)}) == {len(container)}")

    def _function(self, function: types.FunctionType) -> Iterator[tuple[Any, str]]:
        level = getattr(function, "_chainrule_level", None)
        if level is not None:
            yield level.func, function.__name__
        for cell, name in zip(function.__closure__ or (), function.__code__.co_freevars, strict=True):
            try:
                value = cell.cell_contents
            except ValueError:
                continue
            if isinstance(value, types.ModuleType):
                continue
            self._watch(cell, ".cell_contents", value, f"`{name}`", functools.partial(getattr, cell, "cell_contents"))
            yield value, f"`{name}`"
        yield function.__defaults__ or (), f"the defaults of {function.__name__}"
        yield function.__kwdefaults__ or {}, f"the defaults of {function.__name__}"
        if _from_library(function):
            return
        names = set(_names(function.__code__))
        table = function.__globals__
        for name in sorted(names & table.keys()):
            value = table[name]
            if isinstance(value, (types.ModuleType, type)):
                if not _is_library(getattr(value, "__module__", None) or getattr(value, "__name__", "")):
                    attributes = vars(value)
                    known = [n for n in sorted(names & attributes.keys()) if isinstance(attributes[n], (*_PLAIN, torch.Tensor))]
                    for key in known:
                        self._watch(value, f".{key}", attributes[key], f"{name}.{key}", functools.partial(getattr, value, key))
                    for key in sorted(names & attributes.keys()):
                        if isinstance(attributes[key], types.FunctionType):
                            yield attributes[key], f"{name}.{key}"
                continue
            self._watch(table, f"[{name!r}]", value, f"the global `{name}`", functools.partial(table.__getitem__, name))
            yield value, f"the global `{name}`"

    def _methods(self, kind: type, where: str) -> Iterator[tuple[Any, str]]:
        for base in kind.__mro__:
            if not _from_library(base):
                yield from ((value, where) for value in vars(base).values() if isinstance(value, types.FunctionType))

    def _module(self, module: torch.nn.Module, where: str) -> Iterator[tuple[Any, str]]:
        table = module.__dict__
        for key, value in table.items():
            if key.endswith("_hooks") or key in ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"):
                if value.__class__ is not bool and hasattr(value, "__len__"):
                    self._size(value)
                    if value:
                        yield from ((hook, f"a hook of {where}") for hook in value.values())
            elif isinstance(value, (*_PLAIN, torch.Tensor)):
                self._watch(table, f"[{key!r}]", value, f"{where}.{key}", functools.partial(table.__getitem__, key))
            elif key in ("_parameters", "_buffers", "_modules"):
                self._size(value)
                yield from self._entries(value, list(value), where)
            elif not key.startswith("_"):
                self._watch(table, f"[{key!r}]", value, f"{where}.{key}", functools.partial(table.__getitem__, key))
                yield value, f"{where}.{key}"
        yield from self._methods(type(module), where)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_library(name: str | None) -> bool:
    return (name or "").partition(".")[0] in _LIBRARIES


def _from_library(item: Any) -> bool:
    return _is_library(getattr(item, "__module__", None))


def _same(value: Any, other: Any) -> bool:
    """Equal and of one type (a NaN is the same as a NaN)."""
    return type(value) is type(other) and (value == other or (value != value and other != other))


def _still(read: Callable[[], Any], value: Any) -> bool:
    try:
        found = read()
    except (KeyError, IndexError, ValueError, AttributeError):
        return False
    return found is value or (isinstance(value, _PLAIN) and _same(found, value))
