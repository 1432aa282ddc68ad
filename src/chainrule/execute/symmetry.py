"""Symmetric products once: of rows that equal each other, and of the two halves of a symmetric result, one is computed.

Derivatives of higher order are symmetric in their directions: the Hessian of each unit of a layer, pushed forward, has equal
rows at (i, j) and (j, i). Nothing says so in a program that was made by differentiating twice. It is found in what a value
is made of: written down with a name for each index, a symmetric value stays the same when two of its indices change places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import torch

from chainrule.calls import FUNCTIONS
from chainrule.dispatch import undispatched
from chainrule.execute.products import LEAST_SYMMETRIC, DistinctRows, symmetric_product
from chainrule.execute.reuse import WHOLE_VIEWS
from chainrule.maps.staging import Instruction, Program, Ref

aten = torch.ops.aten

#: The multiply-adds that a product has to save for each element that is moved for it.
_WORTH = 48

#: The least multiply-adds of a product whose factors are looked at, and of one whose result is computed by blocks.
_LARGE = 1 << 22
_BLOCKED = 1 << 26

#: How many values are looked at for one question.
_PATIENCE = 4000

_TURNS = frozenset({torch.permute, torch.t, torch.transpose, torch.Tensor.transpose, torch.Tensor.permute, torch.swapaxes})
_ORDERED = WHOLE_VIEWS - _TURNS - {torch.movedim}
_COPIES: tuple[Any, ...] = (torch.clone, torch.Tensor.clone, torch.Tensor.contiguous)
_SPREADS = frozenset({torch.broadcast_to, torch.Tensor.expand, aten.expand.default._op})
_PRODUCTS = frozenset({torch.mm, torch.bmm})

#: Element by element, of one argument.
_SINGLE = frozenset(
    {
        torch.neg, torch.exp, torch.sqrt, torch.rsqrt, torch.reciprocal, torch.sin, torch.cos, torch.tanh, torch.sigmoid,
        torch.log, torch.log1p, torch.expm1, torch.erf, torch.abs, torch.square, torch.sign,
    }
)  # fmt: skip

#: The same, of several, whose order counts.
_SEVERAL = frozenset({torch.sub, torch.div, torch.pow, torch.where, torch.rsub})

_ELEMENTWISE = _SPREADS | _SINGLE | _SEVERAL | {torch.mul, torch.add, torch.addcmul}

#: An index: its name and size. Of each dimension of a value, the indices that it is made of.
_Index = tuple[int, int]
_Dims = tuple[tuple[_Index, ...], ...]


def with_symmetry(program: Program, instructions: Sequence[Instruction]) -> list[Instruction] | None:
    """The same instructions, large products with equal rows or a symmetric result computed once; None where there are none.

    They are for plain tensors that nothing follows.

    Args:
        program: the program, for the sizes of its values.
        instructions: those of a block that is run as a whole.
    """
    if program.literal or program.writes:
        return None
    forms: _Forms | None = None
    found: list[Instruction] = []
    for instruction in instructions:
        work = _work(program, instruction)
        if work >= _LARGE:
            forms = forms or _Forms(program, instructions)
            instruction = _once(program, forms, instruction, work)
        found.append(instruction)
    return found if any(one is not two for one, two in zip(found, instructions, strict=True)) else None


def _work(program: Program, instruction: Instruction) -> int:
    """The multiply-adds of a matrix product on a processor; 0 for other calls."""
    if FUNCTIONS.get(instruction.function, instruction.function) is not torch.mm or instruction.kwargs or instruction.keep:
        return 0
    if len(instruction.args) != 2 or not all(isinstance(item, Ref) for item in instruction.args):
        return 0
    kinds = [program.kinds.get(slot) for slot in (instruction.args[0].slot, instruction.args[1].slot, instruction.outputs[0])]
    if any(kind is None or kind[2].type != "cpu" or kind[1] not in (torch.float32, torch.float64) for kind in kinds):
        return 0
    return prod(kinds[0][0]) * kinds[1][0][1]  # type: ignore[index]


def _once(program: Program, forms: _Forms, instruction: Instruction, work: int) -> Instruction:
    """A product, as one that computes less, if it has equal rows or is symmetric."""
    left, out = instruction.args[0].slot, instruction.outputs[0]
    rows, inner = program.kinds[left][0]
    columns = program.kinds[out][0][1]
    factors = forms.sizes(left)[0]
    if (groups := forms.symmetric(left, 0)) and columns:
        with undispatched():
            chosen, places = _representatives(factors, groups)
        saved = (rows - chosen.numel()) * inner * columns
        if saved > _WORTH * (chosen.numel() * inner + rows * columns):
            return instruction._replace(function=DistinctRows(chosen, places))
    if rows == columns >= LEAST_SYMMETRIC and work >= _BLOCKED and forms.mirrored(out):
        return instruction._replace(function=symmetric_product)
    return instruction


def _representatives(factors: Sequence[int], groups: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of rows counted by several indices, those whose indices are sorted within each group, and which one each row is."""
    places = [*torch.meshgrid(*[torch.arange(size) for size in factors], indexing="ij")]
    for group in groups:
        ordered = torch.stack([places[n] for n in group]).sort(0).values
        for number, place in zip(group, ordered, strict=True):
            places[number] = place
    flat = torch.zeros_like(places[0])
    for size, place in zip(factors, places, strict=True):
        flat = flat * size + place
    chosen, inverse = torch.unique(flat.flatten(), return_inverse=True)
    return chosen, inverse


class _TooLong(Exception):
    """A question that takes too long to answer."""


class _Forms:
    """What values are made of, with names for their indices.

    A form is a number: equal forms are equal values. Products and sums do not keep the order of their parts.
    """

    def __init__(self, program: Program, instructions: Sequence[Instruction]) -> None:
        self.program = program
        self.makers = {slot: i for i in instructions for slot in i.outputs if len(i.outputs) == 1}
        self.known: dict[Any, int] = {}
        self.parts: dict[int, tuple[str, tuple[int, ...]]] = {}
        self._forms: dict[tuple[int, _Dims], int] = {}
        self._sizes: dict[int, tuple[tuple[int, ...], ...]] = {}
        self.left = 0

    def symmetric(self, slot: int, dim: int) -> list[list[int]]:
        """Groups of indices of a dimension (by number) that may change places."""
        sizes = self.sizes(slot)
        factors = sizes[dim]
        names = iter(range(sum(map(len, sizes))))
        dims: _Dims = tuple([tuple([(next(names), size) for size in item]) for item in sizes])
        groups: list[list[int]] = []
        for number, index in enumerate(dims[dim]):
            for group in groups:
                if factors[group[0]] == factors[number] and self._same(slot, dims, dims[dim][group[0]], index):
                    group.append(number)
                    break
            else:
                groups.append([number])
        return [group for group in groups if len(group) > 1]

    def mirrored(self, slot: int) -> bool:
        """Whether a square matrix is symmetric."""
        size = self.program.kinds[slot][0][0]
        one, two = (0, size), (1, size)
        return self._same(slot, ((one,), (two,)), one, two)

    def _same(self, slot: int, dims: _Dims, one: _Index, two: _Index) -> bool:
        self.left = _PATIENCE
        changed = {one: two, two: one}
        try:
            return self.form(slot, dims) == self.form(slot, tuple([tuple([changed.get(i, i) for i in d]) for d in dims]))
        except _TooLong:
            return False

    def shape(self, slot: int) -> tuple[int, ...] | None:
        kind = self.program.kinds.get(slot)
        return None if kind is None else tuple(kind[0])

    def sizes(self, slot: int) -> tuple[tuple[int, ...], ...]:
        """The indices, by their sizes, that each dimension of a value is made of."""
        found = self._sizes.get(slot)
        if found is None:
            # Values are made one after the other: those that this one is made of are asked first, without recursion.
            pending = [slot]
            while pending:
                top = pending[-1]
                missing = [s for s in self._sources(top) if s not in self._sizes]
                if missing:
                    pending += missing
                else:
                    self._sizes[top] = self._made_of(top)
                    pending.pop()
            found = self._sizes[slot]
        return found

    def _sources(self, slot: int) -> list[int]:
        maker = self.makers.get(slot)
        if maker is None:
            return []
        return [item.slot for item in maker.args if isinstance(item, Ref) and self.shape(item.slot) is not None]

    def _made_of(self, slot: int) -> tuple[tuple[int, ...], ...]:
        shape, maker = self.shape(slot) or (), self.makers.get(slot)
        plain = tuple([(size,) if size != 1 else () for size in shape])
        if maker is None or 0 in shape or not maker.args or not isinstance(maker.args[0], Ref):
            return plain
        function = FUNCTIONS.get(maker.function, maker.function)
        first = maker.args[0].slot
        before = self.shape(first)
        if before is None:
            return plain
        sizes = self._sizes[first]
        if function in _COPIES:
            return sizes
        if function in _ORDERED:
            flat = [size for item in sizes for size in item]
            return _refined(flat, shape) or plain
        if (order := _order(function, maker, len(before))) is not None:
            return tuple([sizes[n] for n in order])
        if function is torch.mm:
            return sizes[0], self._sizes[maker.args[1].slot][1]
        if function is torch.bmm:
            other = self._sizes[maker.args[1].slot]
            return max(sizes[0], other[0], key=len), sizes[1], other[2]
        if function in _ELEMENTWISE:
            found: list[tuple[int, ...]] = [*plain]
            for source in self._sources(slot):
                items, own = self._sizes[source], self.shape(source) or ()
                for number, size in enumerate(own[::-1], 1):
                    if size == shape[-number] and len(items[-number]) > len(found[-number]):
                        found[-number] = items[-number]
            return tuple(found)
        return plain

    def form(self, slot: int, dims: _Dims) -> int:
        """The form of a value with these indices."""
        key = (slot, dims)
        found = self._forms.get(key)
        if found is None:
            self.left -= 1
            if self.left < 0:
                raise _TooLong
            try:
                found = self._form(slot, dims)
            except RecursionError:
                raise _TooLong from None
            self._forms[key] = found
        return found

    def _number(self, key: Any) -> int:
        return self.known.setdefault(key, len(self.known))

    def _joined(self, kind: str, forms: Sequence[int]) -> int:
        """A product or sum, its parts that are of the same kind taken apart."""
        parts: list[int] = []
        for form in forms:
            inner = self.parts.get(form)
            parts.extend(inner[1] if inner is not None and inner[0] == kind else (form,))
        if len(parts) == 1:
            return parts[0]
        content = tuple(sorted(parts))
        number = self._number((kind, content))
        self.parts[number] = kind, content
        return number

    def _operand(self, item: Any, dims: _Dims) -> int:
        """The form of an operand that is spread over these dimensions."""
        if not isinstance(item, Ref):
            return self._number(("number", type(item), item))
        shape = self.shape(item.slot) or ()
        own = dims[len(dims) - len(shape) :]
        return self.form(item.slot, tuple([() if size == 1 else d for size, d in zip(shape, own, strict=True)]))

    def _form(self, slot: int, dims: _Dims) -> int:
        maker = self.makers.get(slot)
        leaf = ("value", slot, dims)
        if maker is None or maker.keep or not maker.args or any(self.shape(s) is None for s in _slots(maker)):
            return self._number(leaf)
        function, args = FUNCTIONS.get(maker.function, maker.function), maker.args
        if function in (torch.mul, torch.add) and len(args) == 2 and not maker.kwargs:
            return self._joined(function.__name__, [self._operand(item, dims) for item in args])
        if function is torch.square and not maker.kwargs:
            return self._joined("mul", [self._operand(args[0], dims)] * 2)
        if function is torch.addcmul and set(maker.kwargs) <= {"value"} and len(args) == 3:
            factors = [self._operand(item, dims) for item in args[1:]]
            if "value" in maker.kwargs:
                factors.append(self._operand(maker.kwargs["value"], ()))
            return self._joined("add", [self._operand(args[0], dims), self._joined("mul", factors)])
        if (function in _SINGLE or function in _SEVERAL) and not maker.kwargs:
            return self._number((function, tuple([self._operand(item, dims) for item in args])))
        if not isinstance(args[0], Ref):
            return self._number(leaf)
        before = self.shape(args[0].slot) or ()
        if function in _COPIES:
            return self.form(args[0].slot, dims)
        if function in _ORDERED:
            parts = _regrouped([index for item in dims for index in item], before)
            return self._number(leaf) if parts is None else self.form(args[0].slot, parts)
        if function in _SPREADS:
            return self._operand(args[0], dims)
        if (order := _order(function, maker, len(before))) is not None:
            back = [dims[order.index(n)] for n in range(len(before))]
            return self.form(args[0].slot, tuple(back))
        if function in _PRODUCTS and not maker.kwargs:
            bound = self._bound(slot, 0, self.sizes(args[0].slot)[-1])
            left, right = (*dims[:-1], bound), (*dims[:-2], bound, dims[-1])
            factors = [self._operand(args[0], left), self._operand(args[1], right)]
            return self._contracted(bound, self._joined("mul", factors))
        if function is torch.sum and len(args) == 2 and not maker.kwargs and isinstance(args[1], (list, tuple)):
            over, rest = {n % len(before) for n in args[1]}, iter(dims)
            sizes = self.sizes(args[0].slot)
            given = [self._bound(slot, n, sizes[n]) if n in over else next(rest, ()) for n in range(len(before))]
            return self._contracted([i for n in over for i in given[n]], self.form(args[0].slot, tuple(given)))
        return self._number(leaf)

    def _bound(self, slot: int, dim: int, sizes: Sequence[int]) -> tuple[_Index, ...]:
        """Names for indices that a sum runs over."""
        return tuple([(-1 - n - 64 * (dim + 16 * slot), size) for n, size in enumerate(sizes)])

    def _contracted(self, bound: Sequence[_Index], form: int) -> int:
        return self._number(("contracted", tuple(sorted(bound)), form))


def _slots(maker: Instruction) -> Iterator[int]:
    return (item.slot for item in maker.args if isinstance(item, Ref))


def _order(function: Callable[..., Any], maker: Instruction, count: int) -> tuple[int, ...] | None:
    """Which dimension of its argument each one of a result is; None for calls that do not reorder dimensions."""
    args = maker.args[1:]
    if function is torch.t and not args:
        return tuple(range(count))[::-1]
    if function in (torch.transpose, torch.Tensor.transpose, torch.swapaxes) and len(args) == 2 and count:
        order = list(range(count))
        one, two = args[0] % count, args[1] % count
        order[one], order[two] = two, one
        return tuple(order)
    if function in (torch.permute, torch.Tensor.permute) and len(args) == 1 and isinstance(args[0], (list, tuple)):
        return tuple([n % count for n in args[0]])
    return None


def _refined(flat: Sequence[int], shape: Sequence[int]) -> tuple[tuple[int, ...], ...] | None:
    """The indices of each dimension of a shape, for values that are counted by indices of the sizes `flat`, one after the other.

    An index that stands for several dimensions becomes one for each of them.
    """
    rest = list(flat)
    found: list[tuple[int, ...]] = []
    for size in shape:
        taken: list[int] = []
        while size > 1:
            if not rest:
                return None
            first = rest.pop(0)
            if size % first == 0:
                taken.append(first)
                size //= first
            elif first % size == 0:
                taken.append(size)
                rest.insert(0, first // size)
                size = 1
            else:
                return None
        found.append(tuple(taken))
    return None if rest else tuple(found)


def _regrouped(flat: Sequence[_Index], shape: Sequence[int]) -> _Dims | None:
    """Indices as they make up the dimensions of a shape; None if one would have to be split."""
    rest, found = list(flat), list[tuple[_Index, ...]]()
    for size in shape:
        taken: list[_Index] = []
        while size > 1:
            if not rest or size % rest[0][1]:
                return None
            index = rest.pop(0)
            taken.append(index)
            size //= index[1]
        found.append(tuple(taken))
    return None if rest else tuple(found)


__all__ = ["with_symmetry"]
