"""The cheapest way to call each op of a program from Python: the same kernels, less work on the way to them.

Torch's own functions parse their arguments about half a microsecond faster than its generic op objects. A Python number
among the arguments is made into a tensor in each call, which takes longer than most small kernels; a constant without
dimensions gives the same values and is made once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from chainrule.maps.staging import Instruction, Program, Ref

aten = torch.ops.aten

_SAME_NAME = (
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "ceil", "cos", "cosh", "digamma", "erf", "erfc",
    "erfinv", "exp", "exp2", "expm1", "floor", "lgamma", "log", "log10", "log1p", "log2", "logical_not", "neg",
    "reciprocal", "round", "rsqrt", "sigmoid", "sign", "sgn", "sin", "sinh", "sqrt", "square", "tan", "tanh", "trunc", "relu",
    "mm", "bmm", "mv", "dot", "addmm", "addmv", "baddbmm", "matmul", "addcmul", "addcdiv", "t", "unsqueeze", "clone",
    "permute", "flip", "roll", "gather", "index_select", "maximum", "minimum", "cat", "stack", "diagonal", "tril", "triu",
    "cumsum", "logaddexp", "detach", "reshape", "outer", "logical_and", "logical_or", "nan_to_num",
    "zeros_like", "ones_like", "diag_embed", "movedim",
)  # fmt: skip

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
    "amin.default": torch.amin, "narrow.default": torch.narrow,
}  # fmt: skip


def _table() -> dict[Any, Callable[..., Any]]:
    found: dict[Any, Callable[..., Any]] = {}
    for name in _SAME_NAME:
        found[getattr(aten, name).default._op if name != "movedim" else aten.movedim.int._op] = getattr(torch, name)
    for path, function in _OVERLOADS.items():
        name, overload = path.split(".")
        found[getattr(getattr(aten, name), overload)._op] = function
    return found


_FUNCTIONS = _table()

#: Functions of two tensors for which a tensor without dimensions is what a number is.
_WITH_NUMBERS = frozenset(
    {torch.mul, torch.add, torch.sub, torch.div, torch.rsub, torch.gt, torch.ge, torch.lt, torch.le, torch.eq, torch.ne}
)

_REAL = (torch.float32, torch.float64)

#: Whole numbers up to this one are exact in double precision.
_LARGEST = 2.0**53


def spell(program: Program, kept: Sequence[Instruction]) -> tuple[list[Instruction], dict[int, torch.Tensor]]:
    """The same instructions in their cheapest form, and the constants that they need.

    Args:
        program: the program they belong to.
        kept: the instructions.
    """
    made: dict[int, torch.Tensor] = {}
    numbers: dict[tuple[torch.dtype, str], int] = {}

    def constant(number: float, dtype: torch.dtype) -> int:
        # By its digits: 0.0 and -0.0 are equal, and nan is not.
        key = (dtype, repr(float(number)))
        slot = numbers.get(key)
        if slot is None:
            slot = numbers[key] = program.new_slot()
            with torch.inference_mode(False), torch._C._DisableTorchDispatch():
                made[slot] = torch.tensor(number, dtype=dtype, device="cpu")
        return slot

    spelled = []
    for instruction in kept:
        function = _FUNCTIONS.get(instruction.function)
        if function is not None:
            instruction = instruction._replace(function=function)
        if instruction.function in _WITH_NUMBERS and not instruction.kwargs and len(instruction.args) == 2:
            instruction = _without_number(program, instruction, constant)
        elif instruction.function is torch.pow and len(instruction.args) == 2 and not instruction.kwargs:
            instruction = _without_power(program, instruction)
        spelled.append(instruction)
    return spelled, made


def _without_number(
    program: Program, instruction: Instruction, constant: Callable[[float, torch.dtype], int]
) -> Instruction:
    tensor, number = instruction.args
    if not isinstance(tensor, Ref) or type(number) not in (int, float):
        return instruction
    kind = program.kinds.get(tensor.slot)
    if kind is None or kind[1] not in _REAL or abs(number) > _LARGEST:
        return instruction
    if instruction.function is torch.rsub:
        return instruction._replace(function=torch.sub, args=(Ref(constant(number, kind[1])), tensor))
    return instruction._replace(args=(tensor, Ref(constant(number, kind[1]))))


def _without_power(program: Program, instruction: Instruction) -> Instruction:
    base, exponent = instruction.args
    if type(exponent) not in (int, float) or exponent != 2 or not isinstance(base, Ref):
        return instruction
    kind = program.kinds.get(base.slot)
    if kind is None or kind[1] not in _REAL:
        return instruction
    return instruction._replace(function=torch.mul, args=(base, base))
