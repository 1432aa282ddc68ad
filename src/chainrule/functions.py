"""Torch's functions as they stand in a user's code, and the ops that they are.

A dispatch mode sees an op at the end of a way through torch's dispatcher that takes several microseconds. Torch shows a
function to a function mode before it sets out on that way. For the functions of this table, which do nothing but call one
op, the modes of this package take the call there (:class:`chainrule.dispatch.LightMode`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from chainrule.calls import WITH_NUMBERS

aten = torch.ops.aten


class Function(NamedTuple):
    """A function that is one op.

    Attributes:
        call: the cheapest way to call the op.
        op: the op for tensors (and for numbers, where there is no other).
        number_op: the op when the second argument is a number; None if it may not be one.
        fewest: the least number of arguments.
        most: the greatest.
        numbers: whether the number may be given as a constant without dimensions.
        pointwise: whether it acts element by element.
        mapped: whether it takes a batch as one more dimension before the others: element by element, or along the last
            dimension of its first argument.
        keeps: whether the result has the dtype, the shape and the layout of the arguments where these are of one
            floating-point dtype, one shape and contiguous (a number beside them changes nothing).
        writes: whether it writes its result to the first argument, which it returns.
    """

    call: Callable[..., Any]
    op: Any
    number_op: Any = None
    fewest: int = 1
    most: int = 1
    numbers: bool = False
    pointwise: bool = True
    mapped: bool = True
    keeps: bool = False
    writes: bool = False


_UNARY = (
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh", "digamma", "erf", "erfc", "erfinv",
    "exp", "exp2", "expm1", "floor", "lgamma", "log", "log10", "log1p", "log2", "logical_not", "neg", "reciprocal", "relu",
    "round", "rsqrt", "sigmoid", "sign", "sin", "sinh", "sqrt", "square", "tan", "tanh", "trunc",
)  # fmt: skip

_ACTIVATIONS: dict[Any, Any] = {
    torch._C._nn.softplus: aten.softplus.default,
    torch._C._nn.gelu: aten.gelu.default,
    F.relu: aten.relu.default,
    F.silu: aten.silu.default,
}

#: Operators in place.
_IN_PLACE = {"add": "add", "sub": "sub", "mul": "mul", "truediv": "div"}

_BINARY = ("add", "sub", "mul", "div")

_COMPARISONS = ("gt", "ge", "lt", "le", "eq", "ne")

_CALLS: dict[Any, Callable[..., Any]] = {F.relu: torch.relu, F.silu: torch._C._nn.silu}


def _table() -> dict[Any, Function]:
    found: dict[Any, Function] = {}
    for name in _UNARY:
        entry = Function(getattr(torch, name), getattr(aten, name).default, keeps=name != "logical_not")
        found[getattr(torch, name)] = found[getattr(torch.Tensor, name)] = entry
    for function, op in _ACTIVATIONS.items():
        found[function] = Function(_CALLS.get(function, function), op, keeps=True)
    for name in _BINARY:
        call = getattr(torch, name)
        op = getattr(aten, name).Tensor
        entry = Function(call, op, op, 2, 2, call in WITH_NUMBERS, keeps=True)
        found[call] = found[getattr(torch.Tensor, name)] = entry
    for name in _COMPARISONS:
        call = getattr(torch, name)
        packet = getattr(aten, name)
        entry = Function(call, packet.Tensor, packet.Scalar, 2, 2, call in WITH_NUMBERS)
        found[call] = found[getattr(torch.Tensor, name)] = entry
    power = Function(torch.pow, aten.pow.Tensor_Tensor, aten.pow.Tensor_Scalar, 2, 2, keeps=True)
    found[torch.pow] = found[torch._C.TensorBase.pow] = power
    found[torch.Tensor.pow] = found[torch.Tensor.__pow__] = power
    reverse = Function(torch.rsub, aten.rsub.Tensor, aten.rsub.Scalar, 2, 2, torch.rsub in WITH_NUMBERS, keeps=True)
    found[torch.rsub] = found[torch.Tensor.__rsub__] = reverse
    found[torch.where] = Function(torch.where, aten.where.self, None, 3, 3)
    product = Function(torch.matmul, aten.matmul.default, None, 2, 2, pointwise=False)
    found[torch.matmul] = found[torch.Tensor.matmul] = found[torch.Tensor.__matmul__] = product
    found[torch._C._nn.linear] = Function(torch._C._nn.linear, aten.linear.default, None, 2, 3, pointwise=False)
    for name in ("sum", "mean"):
        entry = Function(getattr(torch, name), getattr(aten, name).default, pointwise=False, mapped=False)
        found[getattr(torch, name)] = found[getattr(torch.Tensor, name)] = entry
    return found


def _writers() -> dict[Any, Function]:
    found: dict[Any, Function] = {}
    for name in _UNARY:
        if (method := getattr(torch.Tensor, f"{name}_", None)) is not None:
            found[method] = Function(method, getattr(aten, f"{name}_").default, writes=True)
    for name in _BINARY:
        method, op = getattr(torch.Tensor, f"{name}_"), getattr(aten, f"{name}_").Tensor
        found[method] = Function(method, op, op, 2, 2, numbers=True, writes=True)
    return found


#: By the function as torch shows it to a function mode.
TABLE = _table()

#: Those that write to their first argument, element by element; a vmap calls them on stored tensors.
WRITERS = _writers()

def methods() -> dict[str, Function]:
    """The element-by-element functions that tensors have as methods, the operators among them, by name."""
    names = [*_UNARY, "relu", *_BINARY, *_COMPARISONS, "pow"]
    found = {name: TABLE[getattr(torch, name)] for name in names}
    operators = {
        "__neg__": "neg", "__abs__": "abs", "__add__": "add", "__radd__": "add", "__sub__": "sub", "__rsub__": "rsub",
        "__mul__": "mul", "__rmul__": "mul", "__truediv__": "div", "__pow__": "pow",
    }  # fmt: skip
    operators |= {f"__{name}__": name for name in _COMPARISONS}
    found |= {function.__name__: entry for function, entry in WRITERS.items()}
    found |= {f"__i{name}__": WRITERS[getattr(torch.Tensor, f"{function}_")] for name, function in _IN_PLACE.items()}
    return found | {operator: TABLE[getattr(torch, name)] for operator, name in operators.items()}


#: Methods of tensors that are replayed under a vmap where a call like them was made before.
REPLAYED = (
    "__getitem__", "amax", "amin", "chunk", "clamp", "clone", "cumsum", "diagonal", "dot", "expand", "expand_as", "flatten",
    "flip", "gather", "index_select", "logsumexp", "max", "mean", "min", "mm", "mv", "narrow", "permute", "prod", "repeat",
    "reshape", "select", "softmax", "split", "squeeze", "std", "sum", "swapaxes", "t", "transpose", "tril", "triu", "unbind",
    "unflatten", "unsqueeze", "var", "view", "float", "double",
)  # fmt: skip

#: Named arguments that change nothing.
NEUTRAL: tuple[dict[str, Any], ...] = ({"inplace": False},)

#: What makes a tensor require a gradient.
MAKING_GRAPHS = frozenset(
    {torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__}  # type: ignore[attr-defined]
)

#: Says of a tensor that a graph hangs on it: for a mode that pulls cotangents back, that it depends on inputs of that.
REQUIRES_GRAD = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]

#: Attributes and methods that say something of a tensor, and compute nothing.
ASKED = ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_cpu", "is_nested", "is_sparse")
QUERIES = ("dim", "size", "numel", "stride", "is_contiguous", "is_floating_point", "is_complex")

#: Attributes that are views.
TURNED = ("T", "mT")

#: What says something of a tensor, and computes nothing.
FACTS = frozenset(
    {
        *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_cpu")),
        *(getattr(torch.Tensor, name).__get__ for name in ("requires_grad", "is_nested", "is_sparse")),
        torch.Tensor.dim, torch.Tensor.size, torch.Tensor.numel, torch.Tensor.stride, torch.Tensor.is_contiguous,
        torch.Tensor.__len__, torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.is_floating_point, torch.is_complex,
    }
)  # fmt: skip

def _comparisons() -> frozenset[Any]:
    methods = [*_COMPARISONS, *(f"__{name}__" for name in _COMPARISONS)]
    return frozenset((*(getattr(torch, name) for name in _COMPARISONS), *(getattr(torch.Tensor, name) for name in methods)))


#: Functions without derivatives.
COMPARISONS = _comparisons()

#: Functions that make tensors of numbers, the same in every call.
MAKERS = frozenset({torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.zeros})
_FACTORIES = (*MAKERS, torch.tensor, torch.rand, torch.randn, torch.randint, torch.randperm)

_LIKE = ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
_NEW = ("new_zeros", "new_ones", "new_full", "new_empty")

#: Functions that read nothing of a tensor but its shape, dtype and device.
SHAPED = frozenset((*(getattr(torch, name) for name in _LIKE), *(getattr(torch.Tensor, name) for name in _NEW)))

#: Methods that change the dtype of a tensor.
CONVERTING = frozenset(getattr(torch.Tensor, name) for name in ("bool", "double", "float", "int", "long", "to"))

#: Functions that make new tensors, or return their argument: on constants nothing of them is recorded.
FRESH = COMPARISONS | SHAPED | CONVERTING | {*_FACTORIES}

#: Methods that change the dtype of a tensor, and to which: None for the one that is told.
CONVERSIONS: dict[Any, torch.dtype | None] = {
    torch.Tensor.to: None, torch.Tensor.float: torch.float32, torch.Tensor.double: torch.float64,
}  # fmt: skip
