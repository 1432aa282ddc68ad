"""What the code of a function names: globals, attributes, and the modules that it imports while it runs."""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Iterator
from importlib.util import resolve_name

#: How code imports by the value of a string, or looks names up by it.
_IMPORTERS = frozenset({"import_module", "__import__", "modules"})
_IMPORT = dis.opmap["IMPORT_NAME"]
_LOOKUPS = frozenset({"getattr", "hasattr", "attrgetter", "globals", "vars", "__dict__", "setattr"})


def code_names(code: types.CodeType) -> set[str]:
    """The globals and attributes that code names, and that the code inside of it does.

    Code that looks names up by strings (``getattr``) names those strings, too; names that it computes do not show.
    """
    names = set(_names(code))
    return names if names.isdisjoint(_LOOKUPS) else names | set(code_strings(code))


def code_strings(code: types.CodeType) -> Iterator[str]:
    """The strings in code."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from code_strings(constant)
        else:
            yield from _strings_in(constant)


@functools.lru_cache(maxsize=1 << 10)  # reading code takes longer than all else that is done with it
def code_globals(code: types.CodeType) -> frozenset[str]:
    """The names among them that are looked up, or set, as globals."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL")}
    return frozenset(found.union(*(code_globals(c) for c in code.co_consts if isinstance(c, types.CodeType))))


def code_imports(function: types.FunctionType) -> set[str]:
    """The full names of the modules that the code of a function imports, and of the packages that they are in.

    For ``from package import name`` that is ``package``, and ``package.name`` where it is a module. Relative names are resolved
    as Python does. For calls of importlib they are the strings in the code that can be names of modules.
    """
    package = function.__globals__.get("__package__") or ""
    found: set[str] = set()
    for name in _imported(function.__code__, package):
        parts = name.split(".")
        found.update(".".join(parts[: count + 1]) for count in range(len(parts)))
    if not _IMPORTERS.isdisjoint(_names(function.__code__)):
        texts = set(code_strings(function.__code__))
        found.update(text for text in texts if all(part.isidentifier() for part in text.split(".")))
    return found


def _imported(code: types.CodeType, package: str) -> Iterator[str]:
    level, name = 0, ""
    numbers: list[object] = []
    imports = _IMPORT in code.co_code[::2]  # operations stand at even places
    for instruction in dis.get_instructions(code) if imports else ():
        if instruction.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
            numbers.append(instruction.argval)
        elif instruction.opname == "IMPORT_NAME":
            # Before it come its level (how many dots) and the names that are taken from it.
            level = next((n for n in reversed(numbers) if isinstance(n, int)), 0)
            name = _absolute("." * level + instruction.argval, package)
            if name:
                yield name
        elif instruction.opname == "IMPORT_FROM" and name:
            inner, outer = f"{name}.{instruction.argval}", sys.modules.get(name)
            # One that is not there yet may be a module that is about to be imported.
            if inner in sys.modules or (outer is not None and instruction.argval not in vars(outer)):
                yield inner
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _imported(constant, package)


def _absolute(name: str, package: str) -> str:
    """The full name of a module; empty where there is none."""
    try:
        return resolve_name(name, package)
    except ImportError:
        return ""


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _strings_in(constant: object) -> Iterator[str]:
    if isinstance(constant, str):
        yield constant
    elif isinstance(constant, (tuple, frozenset)):
        for item in constant:
            yield from _strings_in(item)


__all__ = ["code_globals", "code_imports", "code_names", "code_strings"]
