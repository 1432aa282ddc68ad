"""Whether a function does nothing but compute with torch, as its code shows: then a replay of its calls leaves nothing out."""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
import math
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

#: Instructions that compute, call, or store to local variables, by the beginning of their names. No others are accepted: not
#: those that write to globals, attributes and items, import, yield, enter contexts or catch exceptions.
_INSTRUCTIONS = (
    "LOAD_", "STORE_FAST", "BUILD_", "BINARY_", "UNARY_", "COMPARE_OP", "IS_OP", "CONTAINS_OP",
    "CALL", "PRECALL", "KW_NAMES", "PUSH_NULL", "POP_TOP", "POP_ITER", "RETURN_VALUE", "RETURN_CONST", "RESUME", "NOP",
    "NOT_TAKEN", "COPY", "SWAP", "JUMP_", "POP_JUMP_", "FOR_ITER", "GET_ITER", "END_FOR", "UNPACK_", "MAKE_",
    "SET_FUNCTION_ATTRIBUTE", "LIST_", "DICT_", "MAP_ADD", "EXTENDED_ARG", "CACHE", "RAISE_VARARGS", "TO_BOOL", "RERAISE",
)  # fmt: skip
#: Instructions that may look for an object by its hash or its identity.
_LOOKS = ("CONTAINS_OP", "IS_OP", "BUILD_SET", "BUILD_MAP", "SET_ADD", "MAP_ADD", "BUILD_CONST_KEY_MAP", "DICT_", "SET_UPDATE")
#: Functions that tell tensors from numbers.
_ASKING = frozenset({"isinstance", "is_tensor", "is_storage", "isscalar", "is_nonzero", "result_type", "can_cast"})
_OF_GENERATORS = ("YIELD_VALUE", "RETURN_GENERATOR")
_CONSTANT = ("LOAD_CONST", "LOAD_SMALL_INT")
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
        "backward", "data", "data_ptr", "from_file", "grad", "item", "module_load", "numpy", "pin_memory", "retain_grad",
        "storage", "tolist", "untyped_storage",
    }
)  # fmt: skip

#: Functions that write to their arguments (running statistics, norms of embeddings), or do by an option.
_WRITES = ("batch_norm", "instance_norm", "native_batch_norm", "embedding", "fused_moving_avg", "miopen_", "cudnn_batch_norm")

#: Functions that draw random numbers, or start from some, by the beginning of their names; `empty` is whatever is in memory.
_RANDOM = (
    "rand", "normal", "bernoulli", "binomial", "multinomial", "poisson", "rrelu", "gumbel_softmax", "fractional_max_pool",
    "scaled_dot_product_attention", "multi_head_attention", "lstm", "gru", "rnn_", "pca_lowrank", "svd_lowrank", "lobpcg",
    "empty", "new_empty",
)  # fmt: skip

#: Options that make a function write to what it is given.
_WRITING_OPTIONS = frozenset({"out", "inplace"})

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType)


def _attributes() -> Iterator[str]:
    """What may be read of a module or value: tensors' methods and torch's functions, constants."""
    yield from dir(torch.Tensor)
    yield from dir(torch._C._VariableFunctions)
    yield from dir(math)
    for space in _SPACES:
        yield from (name for name, value in vars(space).items() if isinstance(value, _FUNCTIONS) or callable(value))
    yield from ("nn", "functional", "linalg", "special", "fft", "newaxis")
    yield from (name for name, value in vars(torch).items() if isinstance(value, torch.dtype))
    yield from (name for name in torch.functional.__all__)


def _is_harmless(name: str) -> bool:
    """Whether what torch has under this name neither writes to tensors (a name that ends in ``_`` does) nor draws numbers."""
    if name.startswith(("_", "register", *_RANDOM, *_WRITES)) or name.endswith("_") or "dropout" in name or name in _IMPURE:
        return False
    packet = getattr(torch.ops.aten, name, None)
    for overload in packet.overloads() if isinstance(packet, torch._ops.OpOverloadPacket) else ():
        found = getattr(packet, overload)
        returned = any(argument.is_out for argument in found._schema.arguments)
        if torch.Tag.nondeterministic_seeded in found.tags or (found._schema.is_mutable and not returned):
            return False
    return True


#: Lists that code may read are its own.
_ATTRIBUTES = frozenset({"append", "extend", *filter(_is_harmless, _attributes())})

#: Functions that take ``inplace``, which may be given by position.
_INPLACE = frozenset(
    name
    for name, value in vars(torch.nn.functional).items()
    if isinstance(value, types.FunctionType) and "inplace" in inspect.signature(value).parameters
)

_MODULES = frozenset({torch, torch.nn, math, np, *_SPACES})
_CONSTANTS = (int, float, complex, str, bytes, type(None), type(Ellipsis), slice, range, torch.dtype, torch.device, torch.Size)


def only_computes(function: Any) -> bool:
    """Whether a function of Python visibly does nothing but compute with torch on its arguments and what it closes over.

    Its code, and that of the functions that it names, is looked through. False where that does not show: for objects, modules and
    bound methods, for containers that could be filled, for code that imports, writes to attributes, items, tensors or variables
    outside of the function, draws random numbers, or calls something unknown. Of augmented assignments only sums (and so on)
    that start from a constant are accepted: any other variable may be another name of a tensor from outside.
    """
    return isinstance(function, types.FunctionType) and _function(function, {})


def _function(function: types.FunctionType, seen: dict[int, Any]) -> bool:
    if id(function) in seen:
        return True
    seen[id(function)] = function
    cells = [cell.cell_contents for cell in function.__closure__ or () if not _is_empty(cell)]
    values = [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    names = _all_names(function.__code__)
    missing = object()
    for name in names - {""}:
        value = function.__globals__.get(name, getattr(builtins, name, missing))
        if value is not missing:  # otherwise it raises a NameError
            values.append(value)
    return "" not in names and all(_value(value, seen) for value in values)


def looks_at_types(function: Any) -> bool:
    """Whether a function of which :func:`only_computes` is true, or one that it calls, may ask for the type of something.

    Or for the identity, which tensors are looked up by in sets and dictionaries.
    """
    seen: dict[int, Any] = {}
    _function(function, seen)
    return any(_looks(found.__code__) for found in seen.values())


@functools.lru_cache(maxsize=1 << 8)
def _looks(code: types.CodeType) -> bool:
    if not _ASKING.isdisjoint(code.co_names) or any(i.opname.startswith(_LOOKS) for i in dis.get_instructions(code)):
        return True
    return any(_looks(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))


def _is_empty(cell: Any) -> bool:
    try:
        return cell.cell_contents is None
    except ValueError:
        return True


@functools.lru_cache(maxsize=1 << 8)
def _all_names(code: types.CodeType) -> frozenset[str]:
    return frozenset(_names(code, frozenset()))


def _names(code: types.CodeType, outer: frozenset[str]) -> Iterator[str]:
    """The globals that code reads, and an empty name where it does something else than compute."""
    # A generator expression ends within the call that it is made for.
    allowed = (*_INSTRUCTIONS, *_OF_GENERATORS) if code.co_name == "<genexpr>" else _INSTRUCTIONS
    instructions = list(dis.get_instructions(code))
    if _writes_tensors(code, instructions):
        yield ""
    for instruction in instructions:
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


def _writes_tensors(code: types.CodeType, instructions: list[dis.Instruction]) -> bool:
    """Whether code may write to a tensor: by an option of a function, or by an augmented assignment."""
    constants = list(_flat(code.co_consts))  # names of keywords are among them
    if not _WRITING_OPTIONS.isdisjoint(c for c in constants if isinstance(c, str)):
        return True
    if any(c is True for c in constants) and not _INPLACE.isdisjoint(code.co_names):
        return True
    # Variables that may be another name of something from outside: arguments, and what is stored otherwise than from a constant.
    arguments = code.co_argcount + code.co_kwonlyargcount
    arguments += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    others: set[Any] = {*code.co_varnames[:arguments]}
    augmented: set[Any] = set()
    before: dis.Instruction | None = None
    for instruction in instructions:
        kind, name = instruction.opname, instruction.argval
        follows = before is not None and _is_augmented(before)
        if kind.startswith("STORE_FAST"):
            stored, *further = name if isinstance(name, tuple) else (name,)
            if kind == "STORE_FAST_STORE_FAST":
                others.update(further)
            if follows:
                augmented.add(stored)
            elif before is None or before.opname not in _CONSTANT or instruction.is_jump_target:
                others.add(stored)
        elif follows:
            return True
        if kind not in ("CACHE", "EXTENDED_ARG", "NOP"):
            before = instruction
    return not augmented.isdisjoint(others)


def _is_augmented(instruction: dis.Instruction) -> bool:
    return instruction.opname == "BINARY_OP" and instruction.argrepr.endswith("=")


def _flat(constants: tuple[Any, ...]) -> Iterator[Any]:
    for constant in constants:
        if isinstance(constant, tuple):
            yield from _flat(constant)
        else:
            yield constant


def _value(value: Any, seen: dict[int, Any]) -> bool:
    """Whether a value that a function reads is a constant, a tensor, or something that only computes."""
    if isinstance(value, str) and value in _WRITING_OPTIONS:
        return False
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


__all__ = ["looks_at_types", "only_computes"]
