"""The cheapest way to call an op from Python: the same kernels, less work on the way to them.

Torch's own functions parse their arguments about half a microsecond faster than its generic op objects. A Python number
among the arguments is made into a tensor in each call, which takes longer than most small kernels; a constant without
dimensions gives the same values and is made once.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from math import prod
from typing import Any

import torch

from chainrule import norms
from chainrule.shortcuts import FLOATING

aten = torch.ops.aten

_SAME_NAME = (
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "ceil", "cos", "cosh", "digamma", "erf", "erfc",
    "erfinv", "exp", "exp2", "expm1", "floor", "lgamma", "log", "log10", "log1p", "log2", "logical_not", "neg",
    "reciprocal", "round", "rsqrt", "sigmoid", "sign", "sgn", "sin", "sinh", "sqrt", "square", "tan", "tanh", "trunc", "relu",
    "mm", "bmm", "mv", "dot", "addmm", "addmv", "baddbmm", "matmul", "addcmul", "addcdiv", "t", "unsqueeze", "clone",
    "permute", "flip", "roll", "gather", "index_select", "maximum", "minimum", "cat", "stack", "diagonal", "tril", "triu",
    "cumsum", "complex", "logaddexp", "detach", "reshape", "outer", "logical_and", "logical_or", "nan_to_num",
    "zeros_like", "ones_like", "diag_embed", "movedim", "_softmax", "_log_softmax", "_softmax_backward_data",
    "_log_softmax_backward_data", "scatter_add", "index_add", "index_copy", "as_strided",
    "convolution", "constant_pad_nd", "cumprod", "embedding", "logcumsumexp", "logsumexp", "native_group_norm", "select_scatter",
    "slice_scatter", "take", "trace", "_adaptive_avg_pool2d", "_fft_c2c", "_fft_c2r", "_fft_r2c", "_prelu_kernel",
)  # fmt: skip

#: Those that torch keeps elsewhere; not the losses, whose functions do without the mean where they are not told.
_IN_NN = ("elu", "gelu", "glu", "hardswish", "hardtanh", "im2col", "leaky_relu", "softplus")

_OVERLOADS = {
    "mul.Tensor": torch.mul, "add.Tensor": torch.add, "sub.Tensor": torch.sub, "div.Tensor": torch.div,
    "div.Tensor_mode": torch.div, "rsub.Scalar": torch.rsub, "rsub.Tensor": torch.rsub,
    "pow.Tensor_Scalar": torch.pow, "pow.Tensor_Tensor": torch.pow, "pow.Scalar": torch.pow,
    "transpose.int": torch.transpose, "select.int": torch.select, "sum.dim_IntList": torch.sum, "sum.default": torch.sum,
    "mean.dim": torch.mean, "mean.default": torch.mean, "squeeze.dim": torch.squeeze, "squeeze.dims": torch.squeeze,
    "squeeze.default": torch.squeeze, "where.self": torch.where, "gt.Scalar": torch.gt, "gt.Tensor": torch.gt,
    "ge.Scalar": torch.ge, "ge.Tensor": torch.ge, "lt.Scalar": torch.lt, "lt.Tensor": torch.lt, "le.Scalar": torch.le,
    "le.Tensor": torch.le, "eq.Scalar": torch.eq, "eq.Tensor": torch.eq, "ne.Scalar": torch.ne, "ne.Tensor": torch.ne,
    "view.default": torch.Tensor.view, "expand.default": torch.Tensor.expand, "amax.default": torch.amax,
    "amin.default": torch.amin, "narrow.default": torch.narrow, "linear.default": torch._C._nn.linear,
    "scatter.src": torch.scatter, "unbind.int": torch.unbind, "remainder.Scalar": torch.remainder,
    "copy_.default": torch.Tensor.copy_, "add_.Tensor": torch.Tensor.add_, "sub_.Tensor": torch.Tensor.sub_,
    "mul_.Tensor": torch.Tensor.mul_, "div_.Tensor": torch.Tensor.div_, "clamp_.default": torch.Tensor.clamp_,
    "fill_.Scalar": torch.Tensor.fill_, "fill_.Tensor": torch.Tensor.fill_, "zero_.default": torch.Tensor.zero_,
    "masked_fill_.Scalar": torch.Tensor.masked_fill_, "masked_fill_.Tensor": torch.Tensor.masked_fill_,
    "relu_.default": torch.Tensor.relu_, "index_add_.default": torch.Tensor.index_add_,
    "scatter_.src": torch.Tensor.scatter_,
    "scatter_.value": torch.Tensor.scatter_, "var.correction": torch.var, "std.correction": torch.std,
    "prod.default": torch.prod, "repeat.default": torch.Tensor.repeat, "xlogy.Tensor": torch.xlogy,
    "bernoulli_.float": torch.Tensor.bernoulli_, "einsum.default": torch._C._VariableFunctions.einsum,  # type: ignore[attr-defined]
}  # fmt: skip


#: The dtypes of most kernels; for them a number and a constant of the other argument's dtype are the same to the last bit.
REAL = (torch.float32, torch.float64)

_PYTHON = torch._C.DispatchKey.Python

#: From this size on the C library sets memory past the caches; beyond so many threads torch's loop, which shares the work, is as
#: fast.
_BEYOND_CACHES = 1 << 25
_FEW_THREADS = 2


def is_seen() -> bool:
    """Whether a mode takes notice of the ops that run: one that has called a kernel itself has excluded all modes from it."""
    return bool(torch._C._len_torch_dispatch_stack()) and not torch._C._dispatch_tls_is_dispatch_key_excluded(_PYTHON)


def col2im(columns: torch.Tensor, *sizes: Any) -> torch.Tensor:
    """The op of that name, into memory of the result's size: its own result keeps as much as its argument takes."""
    if columns.__class__ is not torch.Tensor or columns.requires_grad or is_seen():
        found: torch.Tensor = aten.col2im.default(columns, *sizes)
        return found
    out = columns.new_empty(0)
    aten.col2im.out(columns, *sizes, out=out)
    return out


_pool: Callable[..., Any] = torch._C._nn.max_pool2d_with_indices  # type: ignore[attr-defined]

#: With fewer channels than a register holds, or fewer elements, the kernels for channels that stand last gain nothing.
_CHANNELS_OF_A_REGISTER = 8
_WORTH_MOVING = 1 << 14


def max_pool2d_with_indices(x: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The op of that name. With the channels last its kernel is several times faster, which pays for moving them."""
    found: tuple[torch.Tensor, torch.Tensor]
    if x.__class__ is torch.Tensor and not x.requires_grad and x.dim() == 4 and x.shape[1] >= _CHANNELS_OF_A_REGISTER:
        cheap = x.is_cpu and x.dtype in REAL and x.numel() >= _WORTH_MOVING and x.is_contiguous()
        if cheap and not is_seen():
            last = x.contiguous(memory_format=torch.channels_last)
            found = _pool(last, *options)
            return found[0].contiguous(), found[1].contiguous()
    found = _pool(x, *options)
    return found


#: Of so few elements, windows that do not overlap are added place by place in less time than one after the other.
_FEW_PLACES = 4


def _places(whole: torch.Tensor, kernel_size: Any, stride: Any, padding: Any, divisor: int | None) -> list[torch.Tensor] | None:
    """What small windows that fill an image read, by the place in the window; None where there are others."""
    if whole.dim() != 4 or not whole.is_cpu or whole.dtype not in REAL or whole.numel() < _WORTH_MOVING or divisor is not None:
        return None
    kernel, step = [*kernel_size] * (3 - len(kernel_size)), [*(stride or kernel_size)]
    height, width = kernel
    if step * (3 - len(step)) != kernel or any(padding) or height * width > _FEW_PLACES or not whole.is_contiguous():
        return None
    count, channels, rows, columns = whole.shape
    if rows % height or columns % width:
        return None
    windows = whole.view(count, channels, rows // height, height, columns // width, width)
    return [windows[:, :, :, i, :, j] for i in range(height) for j in range(width)]


def _is_plain(*tensors: torch.Tensor) -> bool:
    return not is_seen() and not any(
        tensor.__class__ is not torch.Tensor or tensor.requires_grad for tensor in tensors
    )


def avg_pool2d(
    x: torch.Tensor, kernel_size: Any, stride: Any = (), padding: Any = (0,), ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """The op of that name. Small windows side by side are added place by place, which is several times faster."""
    places = _places(x, kernel_size, stride, padding, divisor_override) if _is_plain(x) else None
    if places is None:
        found: torch.Tensor = torch._C._nn.avg_pool2d(  # type: ignore[attr-defined]
            x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        )
        return found
    total = places[0] + places[1] if len(places) > 1 else places[0].clone()
    for place in places[2:]:
        total += place
    return total.div_(len(places))


def avg_pool2d_backward(
    cotangent: torch.Tensor, x: torch.Tensor, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool,
    count_include_pad: bool, divisor_override: int | None,
) -> torch.Tensor:  # fmt: skip
    """The op of that name, as :func:`avg_pool2d`."""
    made = x.new_empty(x.shape) if _is_plain(cotangent, x) and cotangent.dtype is x.dtype else None
    places = None if made is None else _places(made, kernel_size, stride, padding, divisor_override)
    if places is None or made is None:
        found: torch.Tensor = aten.avg_pool2d_backward.default(
            cotangent, x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        )
        return found
    share = cotangent / len(places)
    for place in places:
        place.copy_(share)
    return made


def _joins(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any([_has_graph(tensor) for tensor in tensors])


def _has_graph(tensor: Any) -> bool:
    while tensor.__class__ is not torch.Tensor and isinstance(stored := getattr(tensor, "value", None), torch.Tensor):
        tensor = stored  # what a vmap maps
    graph: bool = tensor.requires_grad
    return graph


def silu_backward(cotangent: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The op of that name, by ops that have derivatives where torch's autograd is to reach through it: torch has none for it."""
    if not _joins(cotangent, x):
        found: torch.Tensor = aten.silu_backward.default(cotangent, x)
        return found
    sigmoid = torch.sigmoid(x)
    return cotangent * (sigmoid * (1 + x * (1 - sigmoid)))


def mish_backward(cotangent: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The op of that name, as :func:`silu_backward`."""
    if not _joins(cotangent, x):
        found: torch.Tensor = aten.mish_backward.default(cotangent, x)
        return found
    tanh = torch.tanh(torch.nn.functional.softplus(x))
    return cotangent * (tanh + x * torch.sigmoid(x) * (1 - tanh * tanh))


def hardsigmoid_backward(cotangent: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The op of that name, as :func:`silu_backward`."""
    if not _joins(cotangent, x):
        found: torch.Tensor = aten.hardsigmoid_backward.default(cotangent, x)
        return found
    return torch.where((x > -3) & (x < 3), cotangent / 6, 0.0)


def new_zeros(source: torch.Tensor, size: Any, **kind: Any) -> torch.Tensor:
    """The op of that name. Of large results every line is written without being read before, which torch's own loop does not."""
    found: torch.Tensor
    if source.__class__ is not torch.Tensor or is_seen() or torch.get_num_threads() > _FEW_THREADS:
        found = source.new_zeros(size, **kind)
        return found
    count = prod(size)
    if count * source.element_size() < _BEYOND_CACHES or not source.is_cpu or any(kind[name] for name in kind.keys() - {"dtype"}):
        found = source.new_zeros(size, **kind)
        return found
    found = source.new_empty(size, **kind)
    ctypes.memset(found.data_ptr(), 0, count * found.element_size())
    return found


def _table() -> dict[Any, Callable[..., Any]]:
    found: dict[Any, Callable[..., Any]] = {
        aten.col2im.default._op: col2im,
        aten.silu_backward.default._op: silu_backward,
        aten.mish_backward.default._op: mish_backward,
        aten.hardsigmoid_backward.default._op: hardsigmoid_backward,
        aten.new_zeros.default._op: new_zeros,
        aten.max_pool2d_with_indices.default._op: max_pool2d_with_indices,
        aten.avg_pool2d.default._op: avg_pool2d,
        aten.avg_pool2d_backward.default._op: avg_pool2d_backward,
        aten.native_layer_norm.default._op: norms.native_layer_norm,
        aten.native_batch_norm.default._op: norms.native_batch_norm,
    }
    for name in _SAME_NAME:
        found[getattr(aten, name).default._op if name != "movedim" else aten.movedim.int._op] = getattr(torch, name)
    for name in _IN_NN:
        found[getattr(aten, name).default._op] = getattr(torch._C._nn, name)  # type: ignore[attr-defined]
    overloads: dict[str, Any] = _OVERLOADS
    for path, function in overloads.items():
        name, overload = path.split(".")
        found[getattr(getattr(aten, name), overload)._op] = function
    return found


#: Torch's own function for an op (its ``_op``), where it takes the same positional arguments.
FUNCTIONS = _table()

#: What functions of this package that look whether something follows a call are on tensors that nothing follows.
UNFOLLOWED: dict[Any, Callable[..., Any]] = {
    **norms.UNFOLLOWED,
    silu_backward: aten.silu_backward.default._op,
    mish_backward: aten.mish_backward.default._op,
    hardsigmoid_backward: aten.hardsigmoid_backward.default._op,
}

#: Functions of two tensors for which a tensor without dimensions is what a number is.
WITH_NUMBERS = frozenset(
    {torch.mul, torch.add, torch.sub, torch.div, torch.rsub, torch.gt, torch.ge, torch.lt, torch.le, torch.eq, torch.ne}
)

#: The same among those that write to the first.
WRITING_NUMBERS = frozenset({torch.Tensor.add_, torch.Tensor.sub_, torch.Tensor.mul_, torch.Tensor.div_})

#: Whole numbers up to this one are exact in double precision.
_LARGEST = 2.0**53

#: Constants without dimensions, by dtype and number.
CONSTANTS: dict[torch.dtype, dict[float, torch.Tensor]] = {torch.float32: {}, torch.float64: {}}


def fits(number: Any) -> bool:
    """Whether a number is the same as a constant of a floating-point dtype."""
    return type(number) in (int, float) and not abs(number) > _LARGEST


def number_constant(number: float, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """A number that :func:`fits` as a tensor without dimensions."""
    with torch.inference_mode(False), torch._C._DisableTorchDispatch():
        found = torch.tensor(number, dtype=dtype, device=device)
    found._chainrule_constant = True  # type: ignore[attr-defined]
    return found


def is_number_constant(tensor: torch.Tensor) -> bool:
    """Whether a tensor was made by :func:`number_constant`: nobody writes to it."""
    return getattr(tensor, "_chainrule_constant", False)


def shared_constant(number: Any, dtype: torch.dtype) -> Any:
    """A number as a constant that calls share and nobody writes to; the number itself where it has to stay one.

    Args:
        number: a Python number.
        dtype: the dtype of the tensor that it meets.
    """
    known = CONSTANTS.get(dtype)
    if known is None:
        return number
    found = known.get(number)
    if found is None:
        # Zero is left out: the key does not tell its signs apart.
        if not fits(number) or number == 0 or number != number:
            return number
        if len(known) >= 1024:
            known.clear()
        found = known[number] = number_constant(number, dtype)
    return found


#: Constants beside tensors, by number, sign, dtype and device.
_BESIDE: dict[Any, torch.Tensor] = {}


def constant_beside(number: Any, tensor: torch.Tensor) -> torch.Tensor | None:
    """A number as the constant that torch takes it for beside a floating-point tensor; calls share it, nobody writes to it.

    Args:
        number: a Python number.
        tensor: the tensor.

    Returns:
        The constant, without dimensions; None where it is not that (a tensor of whole numbers, a large number).
    """
    dtype = tensor.dtype
    if dtype not in FLOATING or number != number or (number.__class__ is int and abs(number) > _LARGEST):
        return None
    key = number, math.copysign(1.0, number), dtype, tensor.device
    found = _BESIDE.get(key)
    if found is None:
        if torch.finfo(dtype).max < abs(number) < math.inf:
            return None
        if len(_BESIDE) >= 1024:
            _BESIDE.clear()
        found = _BESIDE[key] = number_constant(number, dtype, tensor.device)
    return found
