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
    """

    call: Callable[..., Any]
    op: Any
    number_op: Any = None
    fewest: int = 1
    most: int = 1
    numbers: bool = False
    pointwise: bool = True
    mapped: bool = True


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

_BINARY = ("add", "sub", "mul", "div")

_COMPARISONS = ("gt", "ge", "lt", "le", "eq", "ne")

_CALLS: dict[Any, Callable[..., Any]] = {F.relu: torch.relu, F.silu: torch._C._nn.silu}


def _table() -> dict[Any, Function]:
    found: dict[Any, Function] = {}
    for name in _UNARY:
        entry = Function(getattr(torch, name), getattr(aten, name).default)
        found[getattr(torch, name)] = found[getattr(torch.Tensor, name)] = entry
    for function, op in _ACTIVATIONS.items():
        found[function] = Function(_CALLS.get(function, function), op)
    for name in _BINARY:
        call = getattr(torch, name)
        op = getattr(aten, name).Tensor
        entry = Function(call, op, op, 2, 2, call in WITH_NUMBERS)
        found[call] = found[getattr(torch.Tensor, name)] = entry
    for name in _COMPARISONS:
        call = getattr(torch, name)
        packet = getattr(aten, name)
        entry = Function(call, packet.Tensor, packet.Scalar, 2, 2, call in WITH_NUMBERS)
        found[call] = found[getattr(torch.Tensor, name)] = entry
    power = Function(torch.pow, aten.pow.Tensor_Tensor, aten.pow.Tensor_Scalar, 2, 2)
    found[torch.pow] = found[torch._C.TensorBase.pow] = power
    found[torch.Tensor.pow] = found[torch.Tensor.__pow__] = power
    reverse = Function(torch.rsub, aten.rsub.Tensor, aten.rsub.Scalar, 2, 2, torch.rsub in WITH_NUMBERS)
    found[torch.rsub] = found[torch.Tensor.__rsub__] = reverse
    found[torch.where] = Function(torch.where, aten.where.self, None, 3, 3)
    product = Function(torch.matmul, aten.matmul.default, None, 2, 2, pointwise=False)
    found[torch.matmul] = found[torch.Tensor.matmul] = found[torch.Tensor.__matmul__] = product
    found[torch._C._nn.linear] = Function(torch._C._nn.linear, aten.linear.default, None, 2, 3, pointwise=False)
    for name in ("sum", "mean"):
        entry = Function(getattr(torch, name), getattr(aten, name).default, pointwise=False, mapped=False)
        found[getattr(torch, name)] = found[getattr(torch.Tensor, name)] = entry
    return found


#: By the function as torch shows it to a function mode.
TABLE = _table()

#: Named arguments that change nothing.
NEUTRAL: tuple[dict[str, Any], ...] = ({"inplace": False},)

#: What makes a tensor require a gradient.
MAKING_GRAPHS = frozenset(
    {torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__}  # type: ignore[attr-defined]
)


def _comparisons() -> frozenset[Any]:
    methods = [*_COMPARISONS, *(f"__{name}__" for name in _COMPARISONS)]
    return frozenset((*(getattr(torch, name) for name in _COMPARISONS), *(getattr(torch.Tensor, name) for name in methods)))


#: Functions without derivatives.
COMPARISONS = _comparisons()

_FACTORIES = (torch.arange, torch.eye, torch.full, torch.linspace, torch.ones, torch.zeros)

#: Functions that make new tensors, or return their argument: on constants nothing of them is recorded.
FRESH = frozenset(
    (*COMPARISONS, *_FACTORIES, *(getattr(torch.Tensor, name) for name in ("bool", "double", "float", "int", "long", "to")))
)
