"""Torch's own functions on the state of its dispatcher, for the compiled handlers.

Their bindings for Python take as long as a handler's own work. The functions themselves are exported by torch's libraries;
they are looked up by name, tried against the bindings, and left alone where one is missing or says something else.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from chainrule.shortcuts import COMPILED, read_state, set_excluded, set_functions, use_state

#: The library of each function and its name there, as compilers for Linux and macOS write it.
_FUNCTIONS = (
    ("c10", "_ZN3c104impl29tls_set_dispatch_key_excludedENS_11DispatchKeyEb"),
    ("c10", "_ZN3c104impl28tls_is_dispatch_key_includedENS_11DispatchKeyE"),
    ("c10", "_ZN3c104impl20TorchDispatchModeTLS9stack_lenEv"),
    ("torch_cpu", "_ZN2at4impl22PythonTorchFunctionTLS9stack_lenEv"),
    ("torch_cpu", "_ZN2at4impl27torch_function_mode_enabledEv"),
    ("torch_cpu", "_ZN2at4impl22PythonTorchFunctionTLS18set_disabled_stateENS0_26TorchFunctionDisabledStateE"),
    ("torch_cpu", "_ZN2at4impl22PythonTorchFunctionTLS18get_disabled_stateEv"),
    ("c10", "_ZN3c104impl28tls_is_dispatch_key_excludedENS_11DispatchKeyE"),
    ("c10", "_ZN3c108GradMode10is_enabledEv"),
)

_PYTHON = torch._C.DispatchKey.Python
_SNAPSHOT = torch._C.DispatchKey.PythonTLSSnapshot
_FUNCTORCH = torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode
_VIEWS = torch._C.DispatchKey.ADInplaceOrView
_CONJUGATE = torch._C.DispatchKey.Conjugate

#: What :data:`chainrule.capture.tape.BelowAutograd` leaves out.
_AUTOGRAD = tuple(
    getattr(torch._C.DispatchKey, name)
    for name in ("ADInplaceOrView", "AutogradOther", "AutogradFunctionality", "AutogradNestedTensor")
)
#: The keys of autocast, one for each kind of device, stand together.
_AUTOCAST = sorted(
    int(getattr(torch._C.DispatchKey, name)) for name in torch._C.DispatchKey.__members__ if name.startswith("Autocast")
)
_AUTOGRAD_NUMBERS = tuple(int(key) for key in _AUTOGRAD)


def _addresses() -> list[int] | None:
    """Where the functions are; None if one is missing."""
    directory = Path(torch.__file__).parent / "lib"
    found = []
    try:
        for library, name in _FUNCTIONS:
            path = next(path for path in (directory / f"lib{library}{end}" for end in (".so", ".dylib")) if path.exists())
            found.append(ctypes.cast(getattr(ctypes.CDLL(str(path)), name), ctypes.c_void_p).value or 0)
    except (AttributeError, OSError, StopIteration):
        return None
    return found


def find_state() -> bool:
    """Give the compiled handlers the functions, and say whether they have them."""
    addresses = _addresses() if COMPILED else None
    if addresses is None:
        return False
    keys: tuple[Any, ...] = (_PYTHON, _SNAPSHOT, _FUNCTORCH, _VIEWS, _CONJUGATE)
    use_state(*addresses, *[int(key) for key in keys], _AUTOCAST[0], _AUTOCAST[-1], _AUTOGRAD_NUMBERS)
    if _agrees():
        return True
    use_state(*[0] * (len(_FUNCTIONS) + 7), _AUTOGRAD_NUMBERS)
    return False


def _says() -> bool:
    """Whether the functions say what the bindings say."""
    functions = torch._C._len_torch_function_stack()
    bindings = torch._C._dispatch_tls_is_dispatch_key_included(_FUNCTORCH), torch._C._len_torch_dispatch_stack(), functions
    return read_state() == (*bindings, functions > 0, torch._C._is_any_autocast_enabled(), torch.is_grad_enabled())


def _follows() -> bool:
    """Whether they follow autocast, and gradients being switched off."""
    right = True
    for device in ("cpu", "cuda", "xpu"):
        before = torch.is_autocast_enabled(device)
        for enabled in (True, False):
            torch.set_autocast_enabled(device, enabled)
            right = right and _says()
        torch.set_autocast_enabled(device, before)
    with torch.no_grad():
        right = right and _says()
    with torch.enable_grad():
        return right and _says()


def _agrees() -> bool:
    """Whether the functions say and do what the bindings do, here and under a mode of each kind."""
    right = _says() and _follows()
    torch._C._push_on_torch_function_stack(BaseTorchFunctionMode())
    torch._C._push_on_torch_dispatch_stack(TorchDispatchMode())
    try:
        right = right and _says()
        with torch._C.DisableTorchFunction():
            right = right and not read_state()[3]
        before = set_functions(2)
        right = right and before == 0 and not torch._C._is_torch_function_mode_enabled() and set_functions(before) == 2
        right = right and torch._C._is_torch_function_mode_enabled()
    finally:
        torch._C._pop_torch_dispatch_stack(None)
        torch._C._pop_torch_function_stack()
    outside = torch._C._dispatch_tls_local_exclude_set().raw_repr()
    with torch._C._AutoDispatchBelowADInplaceOrView():
        below = torch._C._dispatch_tls_local_exclude_set().raw_repr()
        for key in _AUTOGRAD:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        right = right and torch._C._dispatch_tls_local_exclude_set().raw_repr() == outside
        for key in _AUTOGRAD:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, True)
        right = right and torch._C._dispatch_tls_local_exclude_set().raw_repr() == below
    keys = (_PYTHON, _SNAPSHOT)
    excluded_before = [torch._C._dispatch_tls_is_dispatch_key_excluded(key) for key in keys]
    try:
        for excluded in (True, False):
            set_excluded(excluded)
            right = right and all(torch._C._dispatch_tls_is_dispatch_key_excluded(key) is excluded for key in keys)
    finally:
        for place, key in enumerate(keys):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, excluded_before[place])
    return right
