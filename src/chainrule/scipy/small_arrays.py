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

#: The results of so many runs are compared with those of the graph.
_COMPARED = 2

Arrays = tuple[np.ndarray, ...]


class SmallArrays:
    """A graph as code of NumPy's: from arrays of its arguments to new arrays.

    Args:
        graph: the graph.
        run: the code.
    """

    __slots__ = ("_closed", "_compared", "_graph", "_run", "holds", "is_refused")

    def __init__(self, graph: Graph, run: Callable[[Sequence[Any]], Arrays]) -> None:
        self._graph, self._run = graph, run
        self._closed, self._compared = graph.closed, 0
        self.is_refused = False
        #: Whether the graph still stands for the function.
        self.holds = graph.surroundings.is_same if graph.is_alone else graph.holds

    def __call__(self, arrays: Sequence[np.ndarray]) -> Arrays | None:
        """The results; None if they are not those of the graph."""
        given: Any = [*arrays, *[tensor.numpy() for tensor in self._closed]] if self._closed else arrays
        found = self._run(given)
        if self._compared < _COMPARED:
            self._compared += 1
            expected = self._graph.run([*map(torch.tensor, arrays), *self._closed])  # type: ignore[misc]
            self.is_refused = not all(map(_is_same, found, expected))
            if self.is_refused:
                return None
        return found


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
    if graph.run is None or flat is None or graph.expected or graph.statics or graph.asked or graph.grads or flat.joined or not graph.is_flat:
        return None
    if any(t.requires_grad or t.is_neg() or t.__class__ not in (torch.Tensor, torch.nn.Parameter) or t.dtype != torch.float64 or not t.is_cpu or t.layout != torch.strided for t in graph.closed):
        return None
    source = Source(flat.program, flat.results, spelled=False)
    try:
        return SmallArrays(graph, _Code(source).compiled())
    except _Unknown:
        return None


class _Unknown(Exception):  # noqa: N818 - never reaches a user
    """Something is left to torch."""


class _Code:
    """The lines of a program."""

    def __init__(self, source: Source) -> None:
        self.source, self.program = source, source.program
        self.namespace: dict[str, Any] = {"np": np, "empty": np.empty, "zeros": np.zeros, "new": _new}
        for name in {*_UNARY.values(), *_BINARY.values(), "power", "dot", "concatenate"}:
            self.namespace[f"np_{name}"] = getattr(np, name)
        self.namespace["np_sum"] = np.add.reduce
        self.lines: list[str] = []
        #: Values that share memory with another: their results are copied.
        self.shared = {*self.program.inputs.values(), *source.constants}
        self.writes = any(i.writes for i in source.kept)
        #: Of a program that writes: what may be written to, with the value whose memory it is.
        self.roots: dict[int, int] = {}
        self.is_turned = False
        #: Constant vectors of whole numbers.
        self.indices: set[int] = set()

    def compiled(self) -> Callable[[Sequence[Any]], Arrays]:
        inputs = [f"    v{slot} = given[{n}]" for n, slot in self.program.inputs.items() if slot in self.source.used]
        for slot, tensor in self.source.constants.items():
            if slot in self.source.used and tensor.dtype == torch.int64 and tensor.dim() == 1 and tensor.numel() <= _NUMBERS:
                self.indices.add(slot)
        for slot in self.source.used - self.indices:
            self.check(slot)
        for slot, tensor in self.source.constants.items():
            if slot in self.indices:
                self.namespace[f"v{slot}"] = tensor.numpy()
            elif slot in self.source.used:
                self.namespace[f"v{slot}"] = tensor.numpy() if tensor.dim() else tensor.item()
        for instruction in self.source.kept:
            self.add(instruction)
        results, seen = [], set[int]()
        for slot in self.source.wanted:
            if slot is None or slot in self.indices:
                raise _Unknown
            shape = self.shape(slot)
            taken = slot in self.shared or slot in seen or not shape or self.is_turned
            seen.add(slot)
            results.append(f"new(v{slot})" if taken else f"v{slot}")
        lines = ["def run(given):", *inputs, *self.lines, f"    return ({', '.join(results)},)"]
        exec(compile("\n".join(lines), "<chainrule, small arrays>", "exec"), self.namespace)  # noqa: S102 - made here
        return np.errstate(all="ignore")(self.namespace["run"])  # type: ignore[no-any-return]

    def check(self, slot: int) -> None:
        kind = self.program.kinds.get(slot)
        if slot in self.source.constants:
            tensor = self.source.constants[slot]
            kind = tensor.shape, tensor.dtype, tensor.device
            if tensor.layout != torch.strided or tensor.requires_grad or tensor.is_conj() or tensor.is_neg():
                raise _Unknown
        if kind is None or kind[1] != torch.float64 or kind[2].type != "cpu" or kind[0].numel() > _NUMBERS:
            raise _Unknown

    def shape(self, slot: int) -> tuple[int, ...]:
        return tuple(self.program.kinds[slot][0]) if slot in self.program.kinds else tuple(self.source.constants[slot].shape)

    def add(self, instruction: Instruction) -> None:
        """The lines of a call."""
        for slot in instruction.outputs:
            self.check(slot)
        if instruction.keep:
            raise _Unknown
        function = self.program.overloads.get(instruction.function, instruction.function)
        name = _name(function)
        make = getattr(self, f"_{name}", None)
        args = instruction.args
        if instruction.writes:
            if name != "copy_":
                raise _Unknown
        elif self.writes:
            # Where a value is written to, no other may share its memory than by indices.
            if name not in ("select", "slice") and name in _VIEWS:
                raise _Unknown
        out = instruction.outputs[0] if instruction.outputs else -1
        if name in _VIEWS:
            self.shared.update(instruction.outputs)
            if isinstance(args[0], Ref):
                for slot in instruction.outputs:
                    self.roots[slot] = self.roots.get(args[0].slot, args[0].slot)
        if make is None and name not in _UNARY and name not in _BINARY and name not in _INFIX:
            raise _Unknown
        try:
            if make is not None:
                line = make(instruction, *args, **instruction.kwargs)
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
        except TypeError:
            raise _Unknown from None  # arguments that are not known here
        if instruction.is_tuple:
            names = "".join(f"v{slot}, " for slot in instruction.outputs)
            self.lines.append(f"    {names}= {line}")
        elif instruction.outputs:
            self.lines.append(f"    v{out} = {line}")
        else:
            self.lines.append(f"    {line}")

    def of(self, item: Any) -> str:
        """An operand."""
        if isinstance(item, Ref):
            if item.slot in self.indices:
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
        return f"v{x.slot}[{place}{', ...' if self.writes else ''}]"

    def _slice(
        self, instruction: Instruction, x: Ref, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
    ) -> str:
        dim %= len(self.shape(x.slot))
        size = self.shape(x.slot)[dim]
        first, last, stride = slice(start, end, step).indices(size)
        return f"v{x.slot}[{':, ' * dim}{_whole(first)}:{_whole(last)}:{_whole(stride)}]"

    def _unbind(self, instruction: Instruction, x: Ref, dim: int = 0) -> str:
        dim %= len(self.shape(x.slot))
        if dim == 0 and self.shape(x.slot):
            return f"v{x.slot}.tolist()" if len(self.shape(x.slot)) == 1 else f"v{x.slot}"
        raise _Unknown

    def _reshaped(self, instruction: Instruction, x: Ref, *_: Any) -> str:
        return f"v{x.slot}.reshape({self._out(instruction)})" if self.shape(x.slot) else f"new(v{x.slot}).reshape({self._out(instruction)})"

    _reshape = _view = __unsafe_view = _squeeze = _unsqueeze = _flatten = _unflatten = _reshaped

    def turn(self, x: Ref) -> None:
        """Results may have another order in memory, from now on."""
        if not self.shape(x.slot):
            raise _Unknown
        self.is_turned = True

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
        root = self.roots.get(x.slot, x.slot)
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

    def _mean(
        self, instruction: Instruction, x: Ref, dim: Any = None, keepdim: bool = False, *, dtype: Any = None  # noqa: FBT001, FBT002
    ) -> str:
        count = math.prod(self.shape(x.slot)) / max(1, math.prod(self._out(instruction)))
        if not count:
            raise _Unknown
        return f"{self._sum(instruction, x, dim, keepdim, dtype=dtype)} / {count!r}"

    # --- constant indices -----------------------------------------------------------------------------------------

    def index(self, index: Any) -> str:
        """An index tensor."""
        if not isinstance(index, Ref) or index.slot not in self.indices:
            raise _Unknown
        return f"v{index.slot}"

    def _index_select(self, instruction: Instruction, x: Ref, dim: int, index: Ref) -> str:
        return f"{self.of(x)}.take({self.index(index)}, {_whole(dim)})"

    def _index_add(self, instruction: Instruction, x: Ref, dim: int, index: Ref, source: Ref, *, alpha: Any = 1) -> str:
        places, out = self.source.constants.get(index.slot), f"v{instruction.outputs[0]}"
        if alpha != 1 or places is None or len(set(places.tolist())) != places.numel() or not self.shape(x.slot):
            raise _Unknown
        self.lines.append(f"    {out} = new({self.of(x)})")
        self.lines.append(f"    {out}[{':, ' * (dim % len(self.shape(x.slot)))}{self.index(index)}] += {self.of(source)}")
        return out


def _new(x: Any) -> np.ndarray:
    """An array of its own."""
    return np.array(x, dtype=np.float64, order="C")


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

_BINARY = {"matmul": "matmul", "bmm": "matmul", "maximum": "maximum", "minimum": "minimum", "atan2": "arctan2"}

_VIEWS = frozenset(
    {
        "select", "slice", "unbind", "reshape", "view", "_unsafe_view", "squeeze", "unsqueeze", "flatten", "unflatten", "permute",
        "transpose", "t", "alias", "detach",
    }
)  # fmt: skip

__all__ = ["SmallArrays", "small_arrays"]
