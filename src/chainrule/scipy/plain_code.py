"""Whether a function does nothing but compute with torch, as its code shows: then a replay of its calls leaves nothing out."""

from __future__ import annotations

import builtins
import dis
import math
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

#: Instructions that compute, call, or store to local variables, by the beginning of their names. No others are accepted: not
#: those that write to globals and attributes, import, yield, enter contexts or catch exceptions.
_INSTRUCTIONS = (
    "LOAD_", "STORE_FAST", "STORE_SUBSCR", "STORE_SLICE", "BUILD_", "BINARY_", "UNARY_", "COMPARE_OP", "IS_OP", "CONTAINS_OP",
    "CALL", "PRECALL", "KW_NAMES", "PUSH_NULL", "POP_TOP", "POP_ITER", "RETURN_VALUE", "RETURN_CONST", "RESUME", "NOP",
    "NOT_TAKEN", "COPY", "SWAP", "JUMP_", "POP_JUMP_", "FOR_ITER", "GET_ITER", "END_FOR", "UNPACK_", "MAKE_",
    "SET_FUNCTION_ATTRIBUTE", "LIST_", "DICT_", "MAP_ADD", "EXTENDED_ARG", "CACHE", "RAISE_VARARGS", "TO_BOOL", "RERAISE",
)  # fmt: skip
_OF_GENERATORS = ("YIELD_VALUE", "RETURN_GENERATOR")
_REFUSED = frozenset({"LOAD_BUILD_CLASS", "LOAD_NAME", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_GLOBALS", "LOAD_LOCALS"})

#: Functions of Python that only compute.
_BUILTINS = frozenset(
    {
        abs, all, any, bool, dict, divmod, enumerate, float, int, isinstance, len, list, map, max, min, pow, range, reversed,
        round, slice, sorted, sum, tuple, zip, AssertionError, IndexError, RuntimeError, TypeError, ValueError,
    }
)  # fmt: skip

_SPACES = (torch.nn.functional, torch.linalg, torch.special, torch.fft)

#: Attributes of torch's modules and tensors that change something else than a tensor, or read it from elsewhere.
_IMPURE = frozenset(
    {
        "apply_", "backward", "data", "data_ptr", "detach_", "from_file", "grad", "item", "map2_", "map_", "module_load", "numpy",
        "pin_memory", "requires_grad_", "resize_", "retain_grad", "set_", "share_memory_", "storage", "tolist", "untyped_storage",
    }
)  # fmt: skip

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType)


def _attributes() -> Iterator[str]:
    """What may be read of a module or value: tensors' methods and torch's functions, constants, methods of fresh lists."""
    yield from dir(torch.Tensor)
    yield from dir(torch._C._VariableFunctions)
    yield from dir(math)
    for space in _SPACES:
        yield from (name for name, value in vars(space).items() if isinstance(value, _FUNCTIONS) or callable(value))
    yield from ("nn", "functional", "linalg", "special", "fft", "newaxis", "append", "extend")
    yield from (name for name, value in vars(torch).items() if isinstance(value, torch.dtype))
    yield from (name for name in torch.functional.__all__)


_ATTRIBUTES = frozenset(n for n in _attributes() if not n.startswith(("_", "register")) and n not in _IMPURE)

_MODULES = frozenset({torch, torch.nn, math, np, *_SPACES})
_CONSTANTS = (int, float, complex, str, bytes, type(None), type(Ellipsis), slice, range, torch.dtype, torch.device, torch.Size)


def only_computes(function: Any) -> bool:
    """Whether a function of Python visibly does nothing but compute with torch on its arguments and what it closes over.

    Its code, and that of the functions that it names, is looked through. False where that does not show: for objects, modules and
    bound methods, for containers that could be filled, for code that imports, writes to attributes or variables outside of
    the function, or calls something unknown.
    """
    return isinstance(function, types.FunctionType) and _function(function, set())


def _function(function: types.FunctionType, seen: set[int]) -> bool:
    if id(function) in seen:
        return True
    seen.add(id(function))
    cells = [cell.cell_contents for cell in function.__closure__ or () if not _is_empty(cell)]
    values = [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    names = set(_names(function.__code__, frozenset()))
    missing = object()
    for name in names - {""}:
        value = function.__globals__.get(name, getattr(builtins, name, missing))
        if value is not missing:  # otherwise it raises a NameError
            values.append(value)
    return "" not in names and all(_value(value, seen) for value in values)


def _is_empty(cell: Any) -> bool:
    try:
        return cell.cell_contents is None
    except ValueError:
        return True


def _names(code: types.CodeType, outer: frozenset[str]) -> Iterator[str]:
    """The globals that code reads, and an empty name where it does something else than compute."""
    # A generator expression ends within the call that it is made for.
    allowed = (*_INSTRUCTIONS, *_OF_GENERATORS) if code.co_name == "<genexpr>" else _INSTRUCTIONS
    for instruction in dis.get_instructions(code):
        kind, name = instruction.opname, instruction.argval
        if kind == "LOAD_GLOBAL":
            yield name
        elif kind == "STORE_DEREF":
            if name not in code.co_cellvars and name not in outer:
                yield ""
        elif kind in ("LOAD_ATTR", "LOAD_METHOD"):
            if name not in _ATTRIBUTES:
                yield ""
        elif kind in _REFUSED or not kind.startswith(allowed):
            yield ""
    inside = outer | {*code.co_cellvars}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant, inside)


def _value(value: Any, seen: set[int]) -> bool:
    """Whether a value that a function reads is a constant, a tensor, or something that only computes."""
    if isinstance(value, _CONSTANTS) or value.__class__ in (torch.Tensor, torch.nn.Parameter):
        return True
    if isinstance(value, tuple):
        return all(_value(item, seen) for item in value)
    if isinstance(value, types.ModuleType):
        return value in _MODULES
    if isinstance(value, types.BuiltinFunctionType | type) and _is_hashable(value) and value in _BUILTINS:
        return True
    if not isinstance(value, _FUNCTIONS):
        return False
    if _of_torch(value) or value in vars(math).values():
        return True
    return isinstance(value, types.FunctionType) and _function(value, seen)


def _is_hashable(value: Any) -> bool:
    return getattr(value, "__hash__", None) is not None


def _of_torch(value: Any) -> bool:
    """Whether a function is one of torch's own, which carry no name of a module."""
    name = getattr(value, "__name__", "")
    return name in _ATTRIBUTES and any(getattr(space, name, None) is value for space in (torch, *_SPACES))


__all__ = ["only_computes"]
