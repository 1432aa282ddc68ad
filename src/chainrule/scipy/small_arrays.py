"""Graphs of small arrays as code of NumPy's, whose calls take a third of the time of torch's where there are few numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from chainrule.execute.replay import Source
from chainrule.maps.staging import Instruction, Ref
from chainrule.transforms.compile import Graph

#: Arrays of more numbers are left to torch: the calls themselves are a small part of what they cost.
_NUMBERS = 1 << 12

#: So many runs have to give what the graph gives before the code is trusted; after so many that do not, it is refused. (Where
#: all results are rounding errors, as at an optimum, they differ.)
_COMPARED = 2
_DIFFERENT = 4

Arrays = tuple[np.ndarray, ...]


class SmallArrays:
    """A graph as code of NumPy's: from arrays of its arguments to new arrays.

    Args:
        graph: the graph.
        run: the code.
    """

    __slots__ = ("_closed", "_different", "_graph", "_run", "_same", "holds")

    def __init__(self, graph: Graph, run: Callable[[Sequence[Any]], Arrays]) -> None:
        self._graph, self._run = graph, run
        self._closed, self._same, self._different = graph.closed, 0, 0
        #: Whether the graph still stands for the function.
        self.holds = graph.surroundings.is_same if graph.is_alone else graph.holds

    def __call__(self, arrays: Sequence[np.ndarray]) -> Arrays | None:
        """The results; None if they are not those of the graph."""
        given: Any = [*arrays, *[tensor.numpy() for tensor in self._closed]] if self._closed else arrays
        found = self._run(given)
        if self._same < _COMPARED:
            expected = self._graph.run([*map(torch.tensor, arrays), *self._closed])  # type: ignore[misc]
            if not all(map(_is_same, found, expected)):
                self._different += 1
                return None
            self._same += 1
        return found

    @property
    def is_refused(self) -> bool:
        """Whether it was seen to give something else than the graph."""
        return self._different >= _DIFFERENT


def _is_same(found: np.ndarray, expected: torch.Tensor) -> bool:
    values = expected.numpy()
    if found.shape != values.shape or found.dtype != values.dtype:
        return False
    known = values[np.isfinite(values)]
    scale = float(np.abs(known).max()) if known.size else 0.0
    return np.allclose(found, values, rtol=1e-10, atol=1e-12 * scale, equal_nan=True)


def small_arrays(graph: Graph) -> SmallArrays | None:
    """A graph as code of NumPy's; None where an array is large, or is none of float64, or a call is none of those known here."""
    flat = graph.flat
    beside = graph.expected or graph.statics or graph.asked or graph.grads
    if graph.run is None or flat is None or flat.joined or beside or not graph.is_flat or not all(map(_is_known, graph.closed)):
        return None
    source = Source(flat.program, flat.results, spelled=False)
    try:
        return SmallArrays(graph, _Code(source).compiled())
    except _Unknown:
        return None


def _is_known(tensor: torch.Tensor) -> bool:
    """Whether a tensor that a function closes over can be read as an array."""
    return (
        tensor.__class__ is torch.Tensor and tensor.dtype in (torch.float64, torch.int64) and tensor.is_cpu
        and tensor.layout is torch.strided and not tensor.requires_grad and not tensor.is_neg()
    )  # fmt: skip


class _Unknown(Exception):  # noqa: N818 - never reaches a user
    """Something is left to torch."""


class _Code:
    """The lines of a program."""

    def __init__(self, source: Source) -> None:
        self.source, self.program = source, source.program
        self.namespace: dict[str, Any] = {"np": np, "empty": np.empty, "zeros": np.zeros, "new": _new}
        self.namespace["check_index"] = _check_index
        for name in {*_UNARY.values(), *_BINARY.values(), *_COMPARISONS.values(), "where", "power", "dot", "concatenate"}:
            self.namespace[f"np_{name}"] = getattr(np, name)
        self.namespace["np_sum"] = np.add.reduce
        self.lines: list[str] = []
        #: Values that share memory with another: their results are copied.
        self.shared = {*self.program.inputs.values(), *source.constants}
        #: Of views, the value whose memory they are; and those values that are written to.
        self.roots: dict[int, int] = {}
        for i in source.kept:
            if self.name(i) in _VIEWS and isinstance(i.args[0], Ref):
                self.roots.update(dict.fromkeys(i.outputs, self.root(i.args[0])))
        self.shared.update(self.roots)
        self.written = {self.roots.get(slot, slot) for i in source.kept for slot in i.writes}
        self.is_turned = False
        #: Zeros in the order of C.
        self.fresh = {slot for i in source.kept if self.name(i) in ("new_zeros", "zeros") for slot in i.outputs}
        #: Vectors of whole numbers, constants or closed over.
        self.indices: set[int] = set()
        #: Truth values: what comparisons return, and other functions select by.
        self.truths: set[int] = set()

    def compiled(self) -> Callable[[Sequence[Any]], Arrays]:
        inputs = []
        for n, slot in self.program.inputs.items():
            if slot in self.source.used:
                inputs.append(f"    v{slot} = given[{n}]")
                size, dtype, _ = self.program.kinds[slot]
                if dtype == torch.int64 and len(size) == 1 and size.numel() <= _NUMBERS:
                    self.indices.add(slot)
                    inputs.append(f"    check_index(v{slot})")
        for slot, tensor in self.source.constants.items():
            if slot in self.source.used and tensor.dtype == torch.int64 and tensor.dim() == 1 and tensor.numel() <= _NUMBERS:
                self.indices.add(slot)
            elif slot in self.source.used and tensor.dtype == torch.bool and tensor.dim() and tensor.numel() <= _NUMBERS:
                self.truths.add(slot)
        given = {*self.program.inputs.values(), *self.source.constants} & self.source.used
        for slot in given - self.indices - self.truths:
            self.check(slot)
        for slot, tensor in self.source.constants.items():
            if slot in self.indices or slot in self.truths:
                self.namespace[f"v{slot}"] = tensor.numpy()
            elif slot in self.source.used:
                self.namespace[f"v{slot}"] = tensor.numpy() if tensor.dim() else float(tensor)
        for instruction in self.source.kept:
            self.add(instruction)
        results, seen = [], set[int]()
        for wanted in self.source.wanted:
            if wanted is None or wanted in self.indices or wanted in self.truths:
                raise _Unknown
            taken = wanted in self.shared or wanted in seen or not self.shape(wanted) or self.is_turned
            seen.add(wanted)
            results.append(f"new(v{wanted})" if taken else f"v{wanted}")
        lines = ["def run(given):", *inputs, *self.lines, f"    return ({', '.join(results)},)"]
        exec(compile("\n".join(lines), "<chainrule, small arrays>", "exec"), self.namespace)  # noqa: S102 - made here
        return np.errstate(all="ignore")(self.namespace["run"])  # type: ignore[no-any-return]

    def check(self, slot: int) -> None:
        kind = self.program.kinds.get(slot)
        if slot in self.source.constants:
            tensor = self.source.constants[slot]
            # A single number takes part in what the others are, as in Python.
            is_number = not tensor.dim() and tensor.dtype in (torch.float32, torch.int64)
            kind = tensor.shape, torch.float64 if is_number else tensor.dtype, tensor.device
            if tensor.layout != torch.strided or tensor.requires_grad or tensor.is_conj() or tensor.is_neg():
                raise _Unknown
        if kind is None or kind[1] != torch.float64 or kind[2].type != "cpu" or kind[0].numel() > _NUMBERS:
            raise _Unknown

    def shape(self, slot: int) -> tuple[int, ...]:
        return tuple(self.program.kinds[slot][0]) if slot in self.program.kinds else tuple(self.source.constants[slot].shape)

    def name(self, instruction: Instruction) -> str:
        return _name(self.program.overloads.get(instruction.function, instruction.function))

    def root(self, x: Ref) -> int:
        return self.roots.get(x.slot, x.slot)

    def add(self, instruction: Instruction) -> None:
        """The lines of a call."""
        name, args = self.name(instruction), instruction.args
        if name in _COMPARISONS or name == "logical_not":
            (slot,) = instruction.outputs
            shape, dtype, device = self.program.kinds[slot]
            if dtype != torch.bool or device.type != "cpu" or shape.numel() > _NUMBERS:
                raise _Unknown
            self.truths.add(slot)
        elif not (name == "where" and all(self.is_number(x) for x in args[1:])):  # a choice of numbers is exact in any dtype
            for slot in instruction.outputs:
                self.check(slot)
        if instruction.keep:
            raise _Unknown
        make = getattr(self, f"_{name.lstrip('_')}", None)
        if instruction.writes and name != "copy_":
            raise _Unknown
        # What is written to may share its memory by indices only: a change of shape may be a copy here.
        if name in _VIEWS and name not in ("select", "slice", "diagonal") and self.root(args[0]) in self.written:
            raise _Unknown
        out = instruction.outputs[0] if instruction.outputs else -1
        if make is None and not any(name in table for table in (_UNARY, _BINARY, _INFIX, _COMPARISONS)):
            raise _Unknown
        try:
            if make is not None:
                line = make(instruction, *args, **instruction.kwargs)
            elif name in _COMPARISONS:
                a, b = args
                line = f"np_{_COMPARISONS[name]}({self.of(a)}, {self.of(b)})"
            elif name in _UNARY:
                (x,) = args
                line = f"np_{_UNARY[name]}({self.of(x)})"
            else:
                a, b = args
                if instruction.kwargs.get("alpha", 1) != 1 or instruction.kwargs.keys() - {"alpha"}:
                    raise _Unknown
                if name in _INFIX:
                    line = f"{self.of(a)} {_INFIX[name]} {self.of(b)}"
                else:
                    line = f"np_{_BINARY[name]}({self.of(a)}, {self.of(b)})"
        except (TypeError, ValueError):
            raise _Unknown from None  # arguments that are not known here
        if instruction.is_tuple:
            names = "".join(f"v{slot}, " for slot in instruction.outputs)
            self.lines.append(f"    {names}= {line}")
        elif instruction.outputs:
            self.lines.append(f"    v{out} = {line}")
        else:
            self.lines.append(f"    {line}")

    def is_number(self, x: Any) -> bool:
        """Whether something is a constant number."""
        return isinstance(x, Ref) and x.slot in self.source.constants and not self.source.constants[x.slot].dim()

    def of(self, item: Any) -> str:
        """An operand."""
        if isinstance(item, Ref):
            if item.slot in self.indices or item.slot in self.truths:
                raise _Unknown
            return f"v{item.slot}"
        if item.__class__ in (int, float):
            if not math.isfinite(item):
                raise _Unknown
            return f"({float(item)!r})"
        raise _Unknown

    def _out(self, instruction: Instruction) -> tuple[int, ...]:
        return self.shape(instruction.outputs[0])

    # --- indices --------------------------------------------------------------------------------------------------

    def _select(self, instruction: Instruction, x: Ref, dim: int, index: int) -> str:
        dim %= len(self.shape(x.slot))
        place = ":, " * dim + str(_whole(index))
        # With numbers in place of arrays calls take less time, but what is written to has to be an array.
        return f"v{x.slot}[{place}{', ...' if self.root(x) in self.written else ''}]"

    def _slice(
        self, instruction: Instruction, x: Ref, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
    ) -> str:
        dim %= len(self.shape(x.slot))
        size = self.shape(x.slot)[dim]
        first, last, stride = slice(start, end, step).indices(size)
        return f"v{x.slot}[{':, ' * dim}{_whole(first)}:{_whole(last)}:{_whole(stride)}]"

    def _unbind(self, instruction: Instruction, x: Ref, dim: int = 0) -> str:
        dim %= len(self.shape(x.slot))
        if len(self.shape(x.slot)) == 1:
            return f"v{x.slot}.tolist()"
        return f"v{x.slot}" if dim == 0 else f"np.moveaxis(v{x.slot}, {dim}, 0)"

    def _diagonal(self, instruction: Instruction, x: Ref, offset: int = 0, dim1: int = 0, dim2: int = 1) -> str:
        if self.root(x) not in self.written:
            return f"v{x.slot}.diagonal({_whole(offset)}, {_whole(dim1)}, {_whole(dim2)})"
        # NumPy's own diagonals are read-only.
        shape, (length,) = self.shape(x.slot), self._out(instruction)
        if x.slot not in self.fresh or len(shape) != 2 or (dim1 % 2, dim2 % 2) != (0, 1) or not length:
            raise _Unknown
        first, step = max(offset, -offset * shape[1]), shape[1] + 1
        return f"v{x.slot}.reshape(-1)[{first}:{first + (length - 1) * step + 1}:{step}]"

    def _reshaped(self, instruction: Instruction, x: Ref, *_: Any) -> str:
        given = f"v{x.slot}" if self.shape(x.slot) else f"new(v{x.slot})"
        return f"{given}.reshape({self._out(instruction)})"

    _reshape = _view = _unsafe_view = _squeeze = _unsqueeze = _flatten = _unflatten = _reshaped

    def turn(self, x: Ref) -> None:
        """Results may have another order in memory, from now on."""
        if not self.shape(x.slot):
            raise _Unknown
        self.is_turned = True

    def _expand(self, instruction: Instruction, x: Ref, *_: Any, implicit: bool = False) -> str:
        return f"np.broadcast_to(v{x.slot}, {self._out(instruction)})"

    def _permute(self, instruction: Instruction, x: Ref, dims: Sequence[int]) -> str:
        self.turn(x)
        return f"v{x.slot}.transpose({tuple(map(_whole, dims))})"

    def _transpose(self, instruction: Instruction, x: Ref, first: int, second: int) -> str:
        self.turn(x)
        return f"v{x.slot}.swapaxes({_whole(first)}, {_whole(second)})"

    def _t(self, instruction: Instruction, x: Ref) -> str:
        self.turn(x)
        return f"v{x.slot}.T"

    def _alias(self, instruction: Instruction, x: Ref) -> str:
        return f"v{x.slot}"

    _detach = _alias

    # --- new arrays -----------------------------------------------------------------------------------------------

    def _clone(self, instruction: Instruction, x: Ref, *, memory_format: Any = None) -> str:
        return f"new(v{x.slot})"

    _contiguous = _clone

    def _new_zeros(self, instruction: Instruction, *_: Any, pin_memory: Any = None, **options: Any) -> str:
        return f"zeros({self._out(instruction)})"

    _zeros = _zeros_like = _new_zeros

    def _stack(self, instruction: Instruction, parts: Sequence[Ref], dim: int = 0) -> str:
        out, shape = f"v{instruction.outputs[0]}", self._out(instruction)
        dim %= len(shape)
        if len(shape) == 1 and len(parts) > 1:
            return f"np.array(({', '.join(map(self.of, parts))}))"
        self.lines.append(f"    {out} = empty({shape})")
        self.lines += [f"    {out}[{':, ' * dim}{n}] = {self.of(part)}" for n, part in enumerate(parts)]
        return out

    def _cat(self, instruction: Instruction, parts: Sequence[Ref], dim: int = 0) -> str:
        shape = self._out(instruction)
        if any(len(self.shape(part.slot)) != len(shape) for part in parts):
            raise _Unknown  # empty vectors, which torch leaves out
        return f"np_concatenate(({''.join(self.of(part) + ', ' for part in parts)}), {dim % len(shape)})"

    def _roll(self, instruction: Instruction, x: Ref, shifts: Any, dims: Any = ()) -> str:
        (shift,) = shifts if isinstance(shifts, list | tuple) else (shifts,)
        shape = self.shape(x.slot)
        (dim,) = (dims if isinstance(dims, list | tuple) else (dims,)) or (0,) * len(shape)
        dim %= len(shape)
        if not shape[dim]:
            raise _Unknown
        first, before = shape[dim] - _whole(shift) % shape[dim], ":, " * dim
        return f"np_concatenate((v{x.slot}[{before}{first}:], v{x.slot}[{before}:{first}]), {dim})"

    def _constant_pad_nd(self, instruction: Instruction, x: Ref, pad: Sequence[int], value: float = 0) -> str:
        out, shape = f"v{instruction.outputs[0]}", self._out(instruction)
        if value != 0 or any(number < 0 for number in pad):
            raise _Unknown
        size = self.shape(x.slot)
        starts = [0] * len(size)
        for n in range(len(pad) // 2):
            starts[-1 - n] = _whole(pad[2 * n])
        self.lines.append(f"    {out} = zeros({shape})")
        places = ", ".join(f"{start}:{start + length}" for start, length in zip(starts, size, strict=True))
        self.lines.append(f"    {out}[{places}] = v{x.slot}")
        return out

    def _copy_(self, instruction: Instruction, x: Ref, y: Ref, non_blocking: bool = False) -> str:  # noqa: FBT001, FBT002
        root = self.root(x)
        if root in self.program.inputs.values() or root in self.source.constants or not self.shape(root):
            raise _Unknown
        # What indices were made of has to be an array of the program's own.
        return f"v{x.slot}[...] = {self.of(y)}"

    # --- numbers --------------------------------------------------------------------------------------------------

    def _rsub(self, instruction: Instruction, x: Any, y: Any, alpha: Any = 1) -> str:
        if alpha != 1:
            raise _Unknown
        return f"{self.of(y)} - {self.of(x)}"

    def _square(self, instruction: Instruction, x: Ref) -> str:
        return f"{self.of(x)} * {self.of(x)}"

    def _sign(self, instruction: Instruction, x: Ref) -> str:
        # Of what is not a number NumPy has none, and torch 0.
        return f"1.0 * np_greater({self.of(x)}, 0.0) - np_less({self.of(x)}, 0.0)"

    def _reciprocal(self, instruction: Instruction, x: Ref) -> str:
        return f"np.true_divide(1.0, {self.of(x)})"

    def _rsqrt(self, instruction: Instruction, x: Ref) -> str:
        return f"np.true_divide(1.0, np_sqrt({self.of(x)}))"

    def _sigmoid(self, instruction: Instruction, x: Ref) -> str:
        return f"1.0 / (1.0 + np_exp(-{self.of(x)}))"

    def _div(self, instruction: Instruction, x: Any, y: Any, *, rounding_mode: Any = None) -> str:
        if rounding_mode is not None:
            raise _Unknown
        return f"np.true_divide({self.of(x)}, {self.of(y)})"

    def _pow(self, instruction: Instruction, x: Any, power: Any) -> str:
        base = self.of(x)
        if isinstance(x, Ref) and not isinstance(power, Ref):
            if power == 2:
                return f"{base} * {base}"
            if power == 3:
                return f"{base} * {base} * {base}"
        # Of the negative infinity torch has no root, and NumPy has zero.
        if not isinstance(power, Ref) and power == -0.5:
            return f"np.true_divide(1.0, np_sqrt({base}))"
        if not isinstance(power, Ref) and power == 0.5:
            return f"np_sqrt({base})"
        return f"np_power({base}, {self.of(power)})"

    def _addcmul(self, instruction: Instruction, x: Ref, a: Any, b: Any, *, value: Any = 1) -> str:
        product = f"{self.of(a)} * {self.of(b)}"
        return f"{self.of(x)} + {product if value == 1 else f'{self.of(value)} * ({product})'}"

    def _sum(
        self, instruction: Instruction, x: Ref, dim: Any = None, keepdim: bool = False, *, dtype: Any = None  # noqa: FBT001, FBT002
    ) -> str:
        if dtype not in (None, torch.float64) or not self.shape(x.slot):
            raise _Unknown
        dims = None if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
        return f"np_sum({self.of(x)}, axis={dims or None}, keepdims={bool(keepdim)})"

    def _dot(self, instruction: Instruction, x: Ref, y: Ref) -> str:
        return f"np_dot({self.of(x)}, {self.of(y)})"

    _mv = _mm = _dot

    def _addmv(self, instruction: Instruction, x: Ref, a: Ref, b: Ref, *, beta: Any = 1, alpha: Any = 1) -> str:
        product = f"np_dot({self.of(a)}, {self.of(b)})"
        product = product if alpha == 1 else f"{self.of(alpha)} * {product}"
        if beta == 0:  # NaN in what is not read stays out
            return f"{product} + zeros({self._out(instruction)})"
        return f"{self.of(x)} + {product}" if beta == 1 else f"{self.of(beta)} * {self.of(x)} + {product}"

    _addmm = _addmv

    def _mean(
        self, instruction: Instruction, x: Ref, dim: Any = None, keepdim: bool = False, *, dtype: Any = None  # noqa: FBT001, FBT002
    ) -> str:
        count = math.prod(self.shape(x.slot)) / max(1, math.prod(self._out(instruction)))
        if not count:
            raise _Unknown
        return f"{self._sum(instruction, x, dim, keepdim, dtype=dtype)} / {count!r}"

    # --- truth values ---------------------------------------------------------------------------------------------

    def truth(self, x: Any) -> str:
        """What to select by."""
        if not isinstance(x, Ref) or x.slot not in self.truths:
            raise _Unknown
        return f"v{x.slot}"

    def _where(self, instruction: Instruction, condition: Ref, x: Any, y: Any) -> str:
        return f"np_where({self.truth(condition)}, {self.of(x)}, {self.of(y)})"

    def _masked_fill(self, instruction: Instruction, x: Any, mask: Ref, value: Any) -> str:
        return f"np_where({self.truth(mask)}, {self.of(value)}, {self.of(x)})"

    def _to(self, instruction: Instruction, x: Ref, *_: Any, **options: Any) -> str:
        # The result is one of float64.
        return f"{self.truth(x)}.astype(np.float64)" if x.slot in self.truths else f"new({self.of(x)})"

    def _logical_not(self, instruction: Instruction, x: Ref) -> str:
        return f"~{self.truth(x)}"

    def _threshold_backward(self, instruction: Instruction, gradient: Ref, x: Ref, threshold: float) -> str:
        return f"np_where({self.of(x)} <= {self.of(threshold)}, 0.0, {self.of(gradient)})"

    _to_copy = _to

    # --- index tensors --------------------------------------------------------------------------------------------

    def index(self, index: Any) -> str:
        """An index tensor."""
        if not isinstance(index, Ref) or index.slot not in self.indices:
            raise _Unknown
        return f"v{index.slot}"

    def _index_select(self, instruction: Instruction, x: Ref, dim: int, index: Ref) -> str:
        return f"{self.of(x)}.take({self.index(index)}, {_whole(dim)})"

    def _index_add(self, instruction: Instruction, x: Ref, dim: int, index: Ref, source: Ref, *, alpha: Any = 1) -> str:
        out, shape, at = f"v{instruction.outputs[0]}", self.shape(x.slot), self.index(index)
        if alpha != 1 or not shape:
            raise _Unknown
        places, before = self.source.constants.get(index.slot), ":, " * (dim % len(shape))
        self.lines.append(f"    {out} = new({self.of(x)})")
        if places is not None and len(set(places.tolist())) == places.numel():
            self.lines.append(f"    {out}[{before}{at}] += {self.of(source)}")
        else:
            self.lines.append(f"    np.add.at({out}, ({before.replace(':', 'slice(None)')}{at},), {self.of(source)})")
        return out

    def _scatter(self, instruction: Instruction, x: Ref, dim: int, index: Ref, source: Any) -> str:
        out, at = f"v{instruction.outputs[0]}", self.index(index)
        places = self.source.constants.get(index.slot)
        if places is None or dim not in (0, -1) or len(self.shape(x.slot)) != 1 or not isinstance(source, Ref):
            raise _Unknown
        # One that is written twice holds whatever torch writes last.
        if len(set(places.tolist())) < places.numel() or any(place < 0 for place in places.tolist()):
            raise _Unknown
        self.lines.append(f"    {out} = new({self.of(x)})")
        self.lines.append(f"    {out}[{at}] = {self.of(source)}[:{places.numel()}]")
        return out


def _new(x: Any) -> np.ndarray:
    """An array of its own."""
    return np.array(x, dtype=np.float64, order="C")


def _check_index(index: np.ndarray) -> None:
    """Raise what torch raises for negative indices, which NumPy counts from the end."""
    if index.size and index.min() < 0:
        raise IndexError("index out of range in self")


def _whole(number: Any) -> int:
    if number.__class__ is not int:
        raise _Unknown
    return int(number)


def _name(function: Any) -> str:
    """What an overload or a function of torch's is called."""
    if isinstance(function, torch._ops.OpOverload):
        return function._schema.name.removeprefix("aten::") if function.namespace == "aten" else "?"
    name = getattr(function, "__name__", "?")
    return name if function in (getattr(torch, name, None), getattr(torch.Tensor, name, None)) else "?"


_UNARY = {
    "neg": "negative", "exp": "exp", "log": "log", "sin": "sin", "cos": "cos", "tan": "tan", "tanh": "tanh", "sinh": "sinh",
    "cosh": "cosh", "sqrt": "sqrt", "abs": "abs", "expm1": "expm1", "log1p": "log1p", "atan": "arctan", "asin": "arcsin",
    "acos": "arccos", "log2": "log2", "log10": "log10", "exp2": "exp2",
}  # fmt: skip

_INFIX = {"add": "+", "sub": "-", "mul": "*"}

_COMPARISONS = {"gt": "greater", "ge": "greater_equal", "lt": "less", "le": "less_equal", "eq": "equal", "ne": "not_equal"}

_BINARY = {"matmul": "matmul", "bmm": "matmul", "maximum": "maximum", "minimum": "minimum", "atan2": "arctan2"}

_VIEWS = frozenset(
    {
        "select", "slice", "unbind", "reshape", "view", "_unsafe_view", "squeeze", "unsqueeze", "flatten", "unflatten", "permute",
        "transpose", "t", "alias", "detach", "diagonal", "expand",
    }
)  # fmt: skip

__all__ = ["SmallArrays", "small_arrays"]
