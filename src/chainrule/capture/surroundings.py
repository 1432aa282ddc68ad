"""What a function reads beside its arguments: closures, globals, attributes, and a test whether any of it was replaced."""

from __future__ import annotations

import array
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
from chainrule.capture.whole_recorder import CompileError
from chainrule.shortcuts import ATTRIBUTE, CELL, EMPTY, EQUAL, ITEM, LACKS, SIZE, TABLE, TYPE, Watch

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

#: Hooks that a module keeps under other names.
_HOOKS_OF_MODULES = frozenset(
    {"_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"}
)

#: Arrays of NumPy with more elements are not compared.
_ARRAY = 1 << 16

#: Containers with more entries are named as a whole.
_MANY = 64

#: Hooks that run for all modules.
_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")

#: More values than these cannot be watched.
_LIMIT = 20_000

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
        self._conditions: list[tuple[int, Any, Any, Any, Any]] = []
        self._places: list[tuple[str, Callable[[], Any], Any]] = []
        self.changed = ""
        self.tensors: list[torch.Tensor] = []
        self.generators: list[torch.Generator] = []
        self.iterators: list[str] = []
        # What the code may name attributes by, and modules of Python that are kept in objects.
        self._words: set[str] = set()
        self._kept_modules: list[tuple[types.ModuleType, str]] = []
        asked = 0
        pending = [(root, "the function") for root in roots]
        while pending or asked < len(self.tensors) or (pending := self._of_kept_modules()):
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
            if id(item) in self._seen or _is_plain(item):
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
        self._conditions.append((kind, container, key, value, _by_value(value)))
        self._places.append((where, read, value))

    def _entries(self, table: Any, keys: Iterable[Any], where: str) -> Iterator[tuple[Any, str]]:
        """Watch some entries of a dictionary."""
        for key in keys:
            value = table[key]
            name = _named_entry(where, key)
            self._watch(ITEM, table, key, value, name, functools.partial(table.__getitem__, key))
            yield value, name

    def _table(self, container: Any, where: str, apart: Iterable[Any] = ()) -> Iterator[tuple[Any, str]]:
        """Watch all entries of a dictionary, a list or a class, but for the values of those apart."""
        apart = frozenset(apart)
        table = vars(container) if isinstance(container, type) else container
        if isinstance(table, dict):
            keys, values = tuple(table), list(dict.values(table))
        elif isinstance(table, types.MappingProxyType):
            keys, values = tuple(table), list(table.values())
        else:
            keys, values = tuple(range(len(table))), list(table)
        kept = tuple([NotImplemented if key in apart else value for key, value in zip(keys, values, strict=True)])
        flags = tuple(map(_by_value, kept))
        condition = (TABLE, container, keys, kept, flags if any(flags) else False)
        self._conditions.append(condition)
        whole = len(keys) > _MANY
        if whole:
            self._places.append((where, Watch(same, (condition,)), True))
        for key, value in zip(keys, values, strict=True):
            if key not in apart:
                name = _named_entry(where, key)
                if not whole:
                    self._places.append((name, functools.partial(_entry, table, key), value))
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
            for part in ("func", "args", "keywords"):
                value = getattr(item, part)
                self._watch(ATTRIBUTE, item, part, value, f"{where}'s arguments", functools.partial(getattr, item, part))
                yield value, where if part == "func" else f"{where}'s arguments"
            yield from self._own(item, where)
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
        elif isinstance(item, types.ModuleType):
            self._kept_modules.append((item, where))
        elif not isinstance(item, types.BuiltinFunctionType):
            yield from self._object(item, where)

    def _object(self, item: Any, where: str) -> Iterator[tuple[Any, str]]:
        """A container, or an object with attributes."""
        if isinstance(item, (dict, list)):
            yield from self._table(item, where)
        elif isinstance(item, types.MappingProxyType):
            self._size(item)
            yield from self._entries(item, list(item), where)
        elif isinstance(item, collections.deque):
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
        yield from self._own(item, where)
        yield from self._class(type(item), where)
        for base in type(item).__mro__:
            for key, member in vars(base).items():
                if not isinstance(member, types.MemberDescriptorType) or _from_library(base):
                    continue
                try:
                    value = member.__get__(item)
                except AttributeError:
                    self._equal(item, member, f"{where}.{key}", _is_unset)
                    continue
                self._watch(ATTRIBUTE, item, key, value, f"{where}.{key}", functools.partial(getattr, item, key))
                yield value, f"{where}.{key}"

    def _own(self, item: Any, where: str, apart: Iterable[str] = ()) -> Iterator[tuple[Any, str]]:
        """The class of an object, and what it keeps under names."""
        self._conditions.append((TYPE, item, None, type(item), False))
        self._places.append((f"the class of {where}", functools.partial(type, item), type(item)))
        table = getattr(item, "__dict__", None)
        if isinstance(table, dict):
            read = functools.partial(getattr, item, "__dict__")
            self._watch(ATTRIBUTE, item, "__dict__", table, f"__dict__ of {where}", read)
            yield from self._table(table, where, apart)

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
        self._watch(ATTRIBUTE, function, "__dict__", own, f"__dict__ of {function.__name__}", lambda: function.__dict__)
        yield from self._table(own, function.__name__, _OF_FUNCTIONS)
        self._words |= {*names, *code_strings(function.__code__)}
        yield from self._globals(function.__globals__, names)
        absent = set(code_globals(function.__code__)) - function.__globals__.keys()
        self._absent(function.__globals__, absent, "the global `{}`")
        yield from self._imports(function, names)

    def _imports(self, function: types.FunctionType, names: set[str]) -> Iterator[tuple[Any, str]]:
        """The modules that code imports when it runs."""
        for name in sorted(filter(_is_of_user, code_imports(function))):
            module = sys.modules.get(name)
            if module is None:
                self._absent(sys.modules, [name], "the module `{}`")
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
        self._conditions.append((TYPE, module, None, type(module), False))
        self._places.append((f"the class of {where}", functools.partial(type, module), type(module)))
        yield from self._class(type(module), where)
        # A module may answer for names that it lacks.
        asked = {*names, "__getattr__"}
        self._absent(table, asked - table.keys(), where + ".{}")
        for key in sorted(asked & table.keys()):
            value = table[key]
            if isinstance(value, types.ModuleType):
                yield from self._named(value, names, f"{where}.{key}")
                continue
            self._watch(ITEM, table, key, value, f"{where}.{key}", functools.partial(table.__getitem__, key))
            yield value, f"{where}.{key}"

    def _class(self, kind: type, where: str) -> Iterator[tuple[Any, str]]:
        """The methods and attributes of a class and its bases, apart from those of libraries."""
        if (kind, "class") in self._seen:
            return
        if not _from_library(kind):
            read = functools.partial(getattr, kind, "__mro__")
            self._watch(ATTRIBUTE, kind, "__mro__", kind.__mro__, f"the bases of {kind.__name__}", read)
        for base in kind.__mro__:
            if _from_library(base) or (base, "class") in self._seen:
                continue
            self._seen[base, "class"] = base
            slots = {key for key, value in vars(base).items() if isinstance(value, types.MemberDescriptorType)}
            yield from self._table(base, where, slots | _OF_CLASSES)
            self._conditions.append((TYPE, base, None, type(base), False))
            self._places.append((f"the class of {base.__name__}", functools.partial(type, base), type(base)))
            yield from self._class(type(base), f"the class of {base.__name__}")

    def _module(self, module: torch.nn.Module, where: str) -> Iterator[tuple[Any, str]]:
        empty: list[Any] = []
        for value, name in self._own(module, where, _OF_MODULES):
            key = name.rpartition(".")[2]
            if key in _HOOKS_OF_MODULES or (key.endswith("_hooks") and isinstance(value, dict)):
                if value:
                    yield from ((hook, f"a hook of {where}") for hook, _ in self._table(value, name))
                elif isinstance(value, dict):
                    empty.append(value)
            elif key not in ("_parameters", "_buffers", "_modules"):
                yield value, name
            elif value:
                yield from self._table(value, where)
            elif isinstance(value, dict):
                empty.append(value)
        self._conditions.append((EMPTY, None, None, tuple(empty), False))
        kind = type(module)
        if _from_library(kind) and (kind, "forward") not in self._seen:
            self._seen[kind, "forward"] = kind
            self._watch(ATTRIBUTE, kind, "forward", kind.forward, f"forward of {kind.__name__}", lambda: kind.forward)
        yield from self._class(kind, where)

    def _absent(self, table: dict[str, Any], names: Iterable[str], where: str) -> None:
        """Watch that a dictionary has none of some names."""
        names = tuple(sorted(names))
        if names:
            self._conditions.append((LACKS, table, None, names, False))
            self._places.extend((where.format(name), functools.partial(table.get, name), None) for name in names)

    def _of_kept_modules(self) -> list[tuple[Any, str]]:
        """What the code may read of modules of Python that are kept in objects."""
        words = set(self._words)
        return [found for module, where in self._kept_modules for found in self._named(module, words, where)]


def _is_plain(item: Any) -> bool:
    """Whether an object is its value, and has no attributes of a user's."""
    return isinstance(item, _PLAIN) and _from_library(type(item))


def _by_value(value: Any) -> bool:
    return not isinstance(value, (bool, type(None))) and _is_plain(value)


def _named_entry(where: str, key: Any) -> str:
    return f"{where}.{key}" if isinstance(key, str) else f"{where}[{key}]"


def _entry(table: Any, key: Any) -> Any:
    return dict.__getitem__(table, key) if isinstance(table, dict) else table[key]


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


def _is_empty(cell: Any, expected: bool) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - raises where there is none
    except ValueError:
        return expected
    return not expected


def _is_unset(item: Any, member: Any) -> bool:
    try:
        member.__get__(item)
    except AttributeError:
        return True
    return False


def _equal_sets(container: set[Any], kept: frozenset[Any]) -> bool:
    return container == kept


def _still(read: Callable[[], Any], value: Any) -> bool:
    try:
        found = read()
    except (KeyError, IndexError, ValueError, AttributeError):
        return False
    return found is value or (isinstance(value, _PLAIN) and same(found, value))
