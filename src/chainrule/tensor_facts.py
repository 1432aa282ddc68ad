"""Torch's own functions on a tensor, for the compiled handlers: its sizes, strides, dtype and device without an object for each.

They are part of the interface in C that torch keeps stable for compiled models. They are looked up by name and tried against what
the tensor says; where one is missing or disagrees, the tensor itself is asked.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from chainrule.shortcuts import COMPILED, REAL, read_tensor_facts, use_tensor_facts

_NAMES = ("dim", "sizes", "strides", "dtype", "layout", "device_type", "device_index")

_POINTER = ctypes.sizeof(ctypes.c_void_p)


def _offset(tensors: list[torch.Tensor]) -> int:
    """Where in the object of a tensor the pointer to its content is; 0 if it is not found."""
    places = range(2 * _POINTER, torch._C.TensorBase.__basicsize__ - _POINTER + 1, _POINTER)
    for place in places:
        if all(ctypes.c_void_p.from_address(id(tensor) + place).value == tensor._cdata for tensor in tensors):
            return place
    return 0


def find_tensor_facts() -> bool:
    """Give the compiled handlers the functions, and say whether they have them."""
    if not COMPILED:
        return False
    whole = torch.zeros(2, 3, 4)
    tensors = [whole, whole[1:, :, ::2], whole.permute(2, 0, 1), torch.zeros(()), torch.zeros(0, 2)]
    tensors.append(torch.nn.Parameter(torch.zeros(3)))
    tensors += [torch.zeros(1, 2).to(dtype) for dtype in REAL]
    offset = _offset(tensors)
    directory = Path(torch.__file__).parent / "lib"
    try:
        path = next(path for path in (directory / f"libtorch_cpu{end}" for end in (".so", ".dylib")) if path.exists())
        library = ctypes.CDLL(str(path))
        functions = [getattr(library, f"aoti_torch_get_{name}") for name in _NAMES]
    except (AttributeError, OSError, StopIteration):
        return False
    if not offset:
        return False

    def ask(name: str, tensor: torch.Tensor) -> int:
        found = ctypes.c_int32(-1)
        functions[_NAMES.index(name)](ctypes.c_void_p(id(tensor) + offset), ctypes.byref(found))
        return found.value

    codes = [ask("dtype", tensor) for tensor in tensors]
    if not all(0 <= code < 64 for code in codes):
        return False
    addresses = tuple(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
    use_tensor_facts(addresses, offset, ask("layout", whole), sum({1 << code for code in codes}))
    wanted = [(code, ask("device_type", whole), ask("device_index", whole)) for code in codes]
    if all(read_tensor_facts(t) == (*w, tuple(t.shape), t.stride()) for t, w in zip(tensors, wanted, strict=True)):
        return True
    use_tensor_facts(addresses, 0, 0, 0)
    return False


__all__ = ["find_tensor_facts"]
