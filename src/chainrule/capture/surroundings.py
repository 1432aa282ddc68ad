"""What a function reads beside its arguments: closures, globals, attributes, and a test whether any of it was replaced."""

from __future__ import annotations

import array
import builtins
import collections
import enum
import functools
import operator
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn.modules import module as torch_module

from chainrule.capture.code_reading import code_globals, code_imports, code_names, code_strings
from chainrule.capture.recorder import CompileError
from chainrule.shortcuts import ATTRIBUTE, CELL, EQUAL, ITEM, SIZE, Watch

#: Values that are compared, where everything else is told apart by identity.
_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size, enum.Enum, range)

#: Packages whose functions and classes hold no state that a user replaces.
_LIBRARIES = frozenset({"torch", "chainrule", "numpy", "scipy", *sys.stdlib_module_names} - {"__main__"})

#: Modules among them whose objects a user fills: plain records, optimisers, distributions.
_RECORDS = ("types", "argparse", "collections", "torch.optim", "torch.distributions", "torch.nn")

#: What every class has, and what changes by itself.
_OF_CLASSES = frozenset(
    {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__abstractmethods__", "_abc_impl"}
)

#: What chainrule and functools keep with a function.
_OF_FUNCTIONS = frozenset({"_chainrule_level", "_chainrule_replays", "__wrapped__"})

#: What torch keeps in each module for itself; recurrent layers list their parameters anew where these are replaced.
_OF_MODULES = frozenset(
    {
        "_non_persistent_buffers_set", "_load_state_dict_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
        "_flat_weights", "_flat_weight_refs",
    }
)  # fmt: skip

#: Arrays of NumPy with more elements are not compared.
_ARRAY = 1 << 16

#: Hooks that run for all modules.
_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")

#: More values than these cannot be watched.
_LIMIT = 20_000

#: Containers with more entries are compared as a whole.
_MANY = 64

#: How code reads the environment of the process.
_ENVIRONMENT = frozenset({"environ", "getenv", "environb", "getenvb"})


class Surroundings:
    """The values that a function found outside of its arguments when it was recorded.

    They are followed through closures, default arguments, the globals that the code names, bound objects with their
    attributes and classes, modules with their parameters and buffers, `functools.partial`, containers and arrays of NumPy.
    Not followed: objects of the standard library (but for `os.environ`) and of extension types, arrays of more than 65536
    elements, and whatever is computed by calls (files, the time, Python's random numbers).

    Args:
        roots: the functions and other objects to start from.

    Raises:
        CompileError: if there are more than 20 000 of them.

    Attributes:
        changed: where something was replaced, in words, once :meth:`hold` has said no.
        tensors: the tensors that were found.
        generators: the generators of random numbers that were found.
        iterators: where iterators and generators of Python were found, whose state does not show.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self._seen: dict[Any, Any] = {}
        self._conditions: list[tuple[int, Any, Any, Any, bool]] = []
        self._places: list[tuple[str, Callable[[], Any], Any]] = []
        self.changed = ""
        self.tensors: list[torch.Tensor] = []
        self.generators: list[torch.Generator] = []
        self.iterators: list[str] = []
        # What the code may name attributes by.
        self._words: set[str] = set()
        asked = 0
        pending = [(root, "the function") for root in roots]
        while pending or asked < len(self.tensors):
            if not pending:
                pending.extend(self._attributes(self.tensors[asked]))
                asked += 1
                continue
            item, where = pending.pop()
            if len(self._places) > _LIMIT:
                raise CompileError(
                    f"chainrule.compile: the function reads more than {_LIMIT} values outside of its arguments (where counting "
                    f"stopped: {where}). Each of them would have to be compared in each call: give them as arguments, put "
                    "numbers into tensors, or call the function without compile."
                )
            if id(item) in self._seen or isinstance(item, _PLAIN):
                continue
            self._seen[id(item)] = item
            if isinstance(item, torch.Tensor):
                self.tensors.append(item)
                continue
            pending.extend(self._inside(item, where))
        if any(isinstance(item, torch.nn.Module) for item in self._seen.values()):
            for hooks in _HOOKS:
                self._size(getattr(torch_module, hooks))
        self.is_same: Callable[[], bool] = Watch(same, tuple(self._conditions))

    def hold(self) -> bool:
        """Whether everything is as it was."""
        if self.is_same():
            return True
        self.changed = next((where for where, read, value in self._places if not _still(read, value)), "a container")
        return False

    def _watch(self, kind: int, container: Any, key: Any, value: Any, where: str, read: Callable[[], Any]) -> None:
        plain = isinstance(value, _PLAIN) and not isinstance(value, (bool, type(None)))
        self._conditions.append((kind, container, key, value, plain))
        self._places.append((where, read, value))

    def _entries(self, table: Any, keys: Iterable[Any], where: str) -> Iterator[tuple[Any, str]]:
        keys = list(keys)
        if len(keys) > _MANY and len(keys) == len(table):
            mapping = hasattr(table, "values")
            kept = (tuple(table), tuple(table.values())) if mapping else tuple(table)
            self._equal(table, kept, where, _same_entries if mapping else _same_items)
            yield from ((table[key], f"{where}.{key}" if isinstance(key, str) else f"{where}[{key}]") for key in keys)
            return
        for key in keys:
            value = table[key]
            name = f"{where}.{key}" if isinstance(key, str) else f"{where}[{key}]"
            self._watch(ITEM, table, key, value, name, functools.partial(table.__getitem__, key))
            yield value, name

    def _equal(self, container: Any, kept: Any, where: str, equal: Callable[[Any, Any], bool]) -> None:
        """Watch a container that is compared as a whole."""
        self._conditions.append((EQUAL, equal, container, kept, False))
        self._places.append((where, lambda: kept if equal(container, kept) else None, kept))

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
        elif isinstance(item, (staticmethod, classmethod, property, functools.cached_property)):
            yield getattr(item, "fget" if isinstance(item, property) else "func" if hasattr(item, "func") else "__func__"), where
        elif isinstance(item, functools._lru_cache_wrapper):
            yield item.__wrapped__, where
        elif isinstance(item, torch.nn.Module):
            yield from self._module(item, where)
        elif isinstance(item, torch.Generator):
            self.generators.append(item)
        elif isinstance(item, np.ndarray):
            if item.size <= _ARRAY and item.dtype != object:
                self._equal(item, item.copy(), where, _same_arrays)
        elif isinstance(item, type):
            yield from self._class(item, where)
        elif isinstance(item, type(os.environ)):
            self._environment(where)
        elif not isinstance(item, (types.ModuleType, types.BuiltinFunctionType)):
            yield from self._object(item, where)

    def _object(self, item: Any, where: str) -> Iterator[tuple[Any, str]]:
        """A container, or an object with attributes."""
        if isinstance(item, (dict, types.MappingProxyType)):
            self._size(item)
            yield from self._entries(item, list(item), where)
        elif isinstance(item, (list, collections.deque)):
            self._size(item)
            yield from self._entries(item, range(len(item)), where)
        elif isinstance(item, tuple):
            yield from ((value, f"{where}[{number}]") for number, value in enumerate(item))
        elif isinstance(item, set):
            self._equal(item, frozenset(item), where, _equal_sets)
            yield from ((value, where) for value in item)
        elif isinstance(item, (bytearray, array.array)):
            self._equal(item, item[:], where, operator.eq)
        elif isinstance(item, Iterator) and _from_library(type(item)):
            self.iterators.append(where)
        if _from_library(type(item)) and not type(item).__module__.startswith(_RECORDS):
            return
        table = getattr(item, "__dict__", None)
        if isinstance(table, dict):
            self._size(table)
            yield from self._entries(table, list(table), where)
        yield from self._class(type(item), where)
        for base in type(item).__mro__:
            for key, member in vars(base).items():
                if isinstance(member, types.MemberDescriptorType) and hasattr(item, key):
                    value = getattr(item, key)
                    self._watch(ATTRIBUTE, item, key, value, f"{where}.{key}", functools.partial(getattr, item, key))
                    yield value, f"{where}.{key}"

    def _environment(self, where: str) -> None:
        """Watch the variables of the process's environment."""
        table = vars(os.environ)["_data"]
        self._equal(table, dict(table), where, operator.eq)

    def _attributes(self, tensor: torch.Tensor) -> Iterator[tuple[Any, str]]:
        """What a user has put on a tensor, as far as the code names it."""
        table = tensor.__dict__
        self._size(table)
        yield from self._entries(table, [key for key in table if key in self._words], "a tensor")

    def _size(self, container: Any) -> None:
        self._conditions.append((SIZE, container, None, len(container), False))

    def _function(self, function: types.FunctionType) -> Iterator[tuple[Any, str]]:
        level = getattr(function, "_chainrule_level", None)
        if level is not None:
            yield level.func, function.__name__
        yield getattr(function, "__wrapped__", None), function.__name__
        names = code_names(function.__code__)
        for cell, name in zip(function.__closure__ or (), function.__code__.co_freevars, strict=True):
            try:
                value = cell.cell_contents
            except ValueError:
                self._equal(cell, True, f"`{name}`", _is_empty)
                continue
            if isinstance(value, types.ModuleType):
                yield from self._named(value, names, name)
                continue
            self._watch(CELL, cell, None, value, f"`{name}`", functools.partial(getattr, cell, "cell_contents"))
            yield value, f"`{name}`"
        yield function.__defaults__ or (), f"the defaults of {function.__name__}"
        yield function.__kwdefaults__ or {}, f"the defaults of {function.__name__}"
        if _from_library(function):
            return
        for part in ("__defaults__", "__kwdefaults__", "__code__"):
            value, read = getattr(function, part), functools.partial(getattr, function, part)
            self._watch(ATTRIBUTE, function, part, value, f"{part} of {function.__name__}", read)
        own = function.__dict__
        self._size(own)
        yield from self._entries(own, [key for key in own if key not in _OF_FUNCTIONS], function.__name__)
        self._words |= {*names, *code_strings(function.__code__)}
        yield from self._globals(function.__globals__, names)
        for name in set(code_globals(function.__code__)) - function.__globals__.keys() - vars(builtins).keys():
            self._equal(function.__globals__, name, f"the global `{name}`", _lacks)
        yield from self._imports(function, names)

    def _imports(self, function: types.FunctionType, names: set[str]) -> Iterator[tuple[Any, str]]:
        """The modules that code imports when it runs."""
        for name in sorted(filter(_is_of_user, code_imports(function))):
            module = sys.modules.get(name)
            if module is None:
                self._equal(sys.modules, name, f"the module `{name}`", _lacks)
                continue
            self._watch(ITEM, sys.modules, name, module, f"the module `{name}`", functools.partial(sys.modules.__getitem__, name))
            yield from self._named(module, names, name)

    def _globals(self, table: dict[str, Any], names: set[str]) -> Iterator[tuple[Any, str]]:
        for name in sorted(names & table.keys()):
            value = table[name]
            if isinstance(value, types.ModuleType):
                yield from self._named(value, names, name)
                continue
            self._watch(ITEM, table, name, value, f"the global `{name}`", functools.partial(table.__getitem__, name))
            yield value, f"the global `{name}`"

    def _named(self, module: types.ModuleType, names: set[str], where: str) -> Iterator[tuple[Any, str]]:
        """What the code may read of a module of the user."""
        if module is os and not names.isdisjoint(_ENVIRONMENT):
            self._environment("os.environ")
        if _is_library(module.__name__) or (id(module), frozenset(names)) in self._seen:
            return
        self._seen[id(module), frozenset(names)] = module
        table = vars(module)
        for key in sorted(names & table.keys()):
            value = table[key]
            if isinstance(value, types.ModuleType):
                yield from self._named(value, names, f"{where}.{key}")
                continue
            self._watch(ITEM, table, key, value, f"{where}.{key}", functools.partial(table.__getitem__, key))
            yield value, f"{where}.{key}"

    def _class(self, kind: type, where: str) -> Iterator[tuple[Any, str]]:
        """The methods and attributes of a class and its bases, apart from those of libraries."""
        for base in kind.__mro__:
            if _from_library(base) or (base, "class") in self._seen:
                continue
            self._seen[base, "class"] = base
            table = vars(base)
            self._size(table)
            slots = {key for key, value in table.items() if isinstance(value, types.MemberDescriptorType)}
            yield from self._entries(table, [key for key in table if key not in slots and key not in _OF_CLASSES], where)

    def _module(self, module: torch.nn.Module, where: str) -> Iterator[tuple[Any, str]]:
        table = module.__dict__
        self._size(table)
        for key, value in table.items():
            if key in _OF_MODULES:
                continue
            if key.endswith("_hooks") or key == "_forward_hooks_with_kwargs" or key == "_forward_pre_hooks_with_kwargs":
                if value.__class__ is not bool and hasattr(value, "__len__"):
                    self._size(value)
                    if value:
                        yield from ((hook, f"a hook of {where}") for hook in value.values())
            elif key in ("_parameters", "_buffers", "_modules"):
                self._size(value)
                yield from self._entries(value, list(value), where)
            else:
                self._watch(ITEM, table, key, value, f"{where}.{key}", functools.partial(table.__getitem__, key))
                yield value, f"{where}.{key}"
        yield from self._class(type(module), where)


def _is_of_user(name: str) -> bool:
    return not _is_library(name)


def _is_library(name: str | None) -> bool:
    return (name or "").partition(".")[0] in _LIBRARIES


def _from_library(item: Any) -> bool:
    return _is_library(getattr(item, "__module__", None))


def same(value: Any, other: Any) -> bool:
    """Equal and of one type (a NaN is the same as a NaN, a zero is not the same as a negative one)."""
    if type(value) is not type(other):
        return False
    if isinstance(value, (float, complex)):
        return repr(value) == repr(other)
    return bool(value == other)


def _same_arrays(array: Any, kept: Any) -> bool:
    return array.shape == kept.shape and array.dtype == kept.dtype and array.tobytes() == kept.tobytes()


def _same_items(container: Any, kept: tuple[Any, ...]) -> bool:
    return len(container) == len(kept) and all(map(operator.is_, container, kept))


def _same_entries(table: Any, kept: tuple[tuple[Any, ...], tuple[Any, ...]]) -> bool:
    return _same_items(table, kept[0]) and all(map(operator.is_, table.values(), kept[1]))


def _lacks(table: Any, name: str) -> bool:
    return name not in table


def _is_empty(cell: Any, expected: bool) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - raises where there is none
    except ValueError:
        return expected
    return not expected


def _equal_sets(container: set[Any], kept: frozenset[Any]) -> bool:
    return container == kept


def _still(read: Callable[[], Any], value: Any) -> bool:
    try:
        found = read()
    except (KeyError, IndexError, ValueError, AttributeError):
        return False
    return found is value or (isinstance(value, _PLAIN) and same(found, value))
