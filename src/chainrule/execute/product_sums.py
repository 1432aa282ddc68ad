"""Matrix products that are added to something: the sum is made inside the product (``addmm``), with no pass of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from chainrule.calls import FUNCTIONS
from chainrule.execute.reuse import WHOLE_VIEWS
from chainrule.maps.staging import Instruction, Program, Ref, reads
from chainrule.shapes import broadcast_shapes

aten = torch.ops.aten

#: The products, and what adds to them.
_ADDED: dict[Any, Callable[..., Any]] = {torch.mm: torch.addmm, torch.bmm: torch.baddbmm, torch.mv: torch.addmv}

#: Calls that keep the order of the elements, with the shape as their argument.
_RESHAPES = frozenset(
    {torch.reshape, torch.Tensor.reshape, torch.Tensor.view, aten._unsafe_view.default._op, aten._unsafe_view.default}
)
_TURNS = frozenset({torch.t, torch.Tensor.t})

#: Calls that need no memory, mostly.
_VIEWS = WHOLE_VIEWS | {torch.Tensor.expand, torch.broadcast_to, aten.expand.default._op}

#: Within how many calls before the sum a product is looked for.
_NEAR = 16


class _Term(NamedTuple):
    """A summand.

    Attributes:
        slot: its value.
        sign: whether it is added or subtracted.
        product: the product that it is, or is a view of.
        view: the view.
    """

    slot: int
    sign: int
    product: Instruction | None = None
    view: Instruction | None = None


def with_added_products(
    program: Program, kept: list[Instruction], wanted: Sequence[int], own: set[int], touched: Callable[[Instruction], bool]
) -> list[Instruction]:
    """The instructions, sums with matrix products in them as products that add.

    Args:
        program: the program, for the kinds of its values.
        kept: its instructions.
        wanted: the slots of its results.
        own: the results, and what they are views of.
        touched: whether an instruction reads or makes memory that is written to.
    """
    if not any(_called(i) in _ADDED for i in kept):
        return kept
    sums = _Sums(program, kept, wanted, own, touched)
    for number in reversed(range(len(kept))):
        if id(kept[number]) not in sums.gone:
            sums.rewrite(number)
    if not sums.gone:
        return kept
    found: list[Instruction] = []
    for number, instruction in enumerate(kept):
        if id(instruction) not in sums.gone:
            found.append(instruction)
        found += sums.behind.get(number, ())
    return found


class _Sums:
    def __init__(
        self,
        program: Program,
        kept: list[Instruction],
        wanted: Sequence[int],
        own: set[int],
        touched: Callable[[Instruction], bool],
    ) -> None:
        self.program, self.kept, self.own, self.touched = program, kept, own, touched
        self.kinds = program.kinds
        self.uses = Counter(slot for i in kept for slot in reads(i))
        self.uses.update(wanted)
        self.makers = {slot: (number, i) for number, i in enumerate(kept) for slot in i.outputs}
        self.last = {slot: number for number, i in enumerate(kept) for slot in reads(i)}
        # Calls that others stand for, and these by the number of the call that they come behind.
        self.gone: set[int] = set()
        self.behind: dict[int, list[Instruction]] = {}

    def rewrite(self, number: int) -> None:
        """Put other calls in the place of a sum, if it is one with products."""
        instruction = self.kept[number]
        if not self.is_sum(instruction):
            return
        (out,) = instruction.outputs
        terms: list[_Term] = []
        inside: list[Instruction] = []
        self.collect(instruction, 1, self.kinds[out], number, (terms, inside))
        if out in self.own and any(term.product is not None and term.view is None for term in terms):
            # The last call makes a result, which must be no view: what is a view of a product is added before.
            terms = [term if term.view is None else _Term(term.slot, term.sign) for term in terms]
        products = [term for term in terms if term.product is not None]
        others = [term for term in terms if term.product is None]
        if not products or any(self.kinds[term.slot][1:] != self.kinds[out][1:] for term in terms):
            return
        products.sort(key=lambda term: self.place(_product(term).outputs[0]))
        made = _Maker(self.program, self.place, self.place(_product(products[0]).outputs[0]))
        total = self.total(made, products, others)
        if total is None or len(made.calls) >= len(inside) + 1 + sum([1 + (t.view is not None) for t in products]):
            return
        last = made.calls[-1]
        if last.outputs != (total,) or self.kinds[total] != self.kinds[out] or (_is_view(last) and out in self.own):
            return
        if any(self.keeps_more(*moved) for moved in made.moved):
            return
        made.calls[-1] = last._replace(outputs=(out,))
        self.gone.update(map(id, (instruction, *inside)))
        for term in products:
            self.gone.update(id(part) for part in (term.product, term.view) if part is not None)
        by_place: dict[int, list[Instruction]] = {}
        for call, place in zip(made.calls, made.places.values(), strict=True):
            by_place.setdefault(place, []).append(call)
        for place, calls in by_place.items():
            self.behind[place] = calls + self.behind.get(place, [])

    def place(self, slot: int) -> int:
        """The number of the call that makes a value; -1 for what the program is given."""
        return self.makers[slot][0] if slot in self.makers else -1

    def keeps_more(self, product: Instruction, place: int) -> bool:
        """Whether a product made later keeps larger factors alive than the product is."""
        kept = {slot for slot in map(self.root, reads(product)) if self.place(slot) >= 0 and self.last[slot] < place}
        return sum([self.kinds[slot][0].numel() for slot in kept]) > self.kinds[product.outputs[0]][0].numel()

    def root(self, slot: int) -> int:
        """What a value is a view of."""
        while slot in self.makers and (maker := self.makers[slot][1]).function in _VIEWS and isinstance(maker.args[0], Ref):
            slot = maker.args[0].slot
        return slot

    def total(self, made: _Maker, products: list[_Term], others: list[_Term]) -> int | None:
        """The slot of the sum."""
        plain = [term for term in products if term.view is None]
        shaped: dict[Any, list[_Term]] = {}
        turned: list[_Term] = []
        for term in products:
            if term.view is not None and _called(term.view) in _TURNS:
                turned.append(term)
            elif term.view is not None:
                shaped.setdefault(self.kinds[_product(term).outputs[0]][0], []).append(term)
        if others and all(term.sign < 0 for term in others):
            return None
        total: int | None = None
        for term in sorted(others, key=lambda term: -term.sign):
            total = term.slot if total is None else made.added(total, term.slot, term.sign)
        whole = self.kinds[products[0].slot]
        alone = len(plain) > 0
        if not plain and total is not None and len(shaped) == 1 and not turned:
            # A bias of the last dimension is one of the product, too.
            (group,) = shaped.values()
            size, last = self.kinds[total][0], self.kinds[_product(group[0]).outputs[0]][0][-1]
            if len(size) == 1 and size[0] == last == whole[0][-1]:
                total = self.onto(made, total, group)
                return None if total is None else made.view(total, whole[0])
        if plain and (total := self.onto(made, total, plain)) is None:
            return None
        for group in shaped.values():
            if alone and total is not None:
                flat = made.view(total, self.kinds[_product(group[0]).outputs[0]][0])
                part = self.onto(made, flat, group)
                total = None if part is None else made.view(part, whole[0])
                if total is None:
                    return None
                continue
            part = self.onto(made, None, group)
            if part is None:
                return None
            part = made.view(part, whole[0])
            total = part if total is None else made.added(total, part, 1)
        if turned:
            part = self.onto(made, None, turned)
            if part is None:
                return None
            part = made.turn(part)
            total = part if total is None else made.added(total, part, 1)
        return total

    def onto(self, made: _Maker, total: int | None, terms: list[_Term]) -> int | None:
        """A sum of products of one shape, on top of ``total``."""
        for term in terms if total is not None else sorted(terms, key=lambda term: -term.sign):
            product = _product(term)
            if total is None:
                if term.sign < 0:
                    return None
                total = made.product(product, product)
                continue
            kwargs = {"alpha": -1} if term.sign < 0 else {}
            added = product._replace(function=_ADDED[_called(product)], args=(Ref(total), *product.args), kwargs=kwargs)
            total = made.product(product, added)
        return total

    def is_sum(self, instruction: Instruction) -> bool:
        args = instruction.args
        if _called(instruction) not in (torch.add, torch.sub) or instruction.kwargs or len(args) != 2 or instruction.keep:
            return False
        if not all(isinstance(item, Ref) and item.slot in self.kinds for item in args) or self.touched(instruction):
            return False
        kind = self.kinds.get(instruction.outputs[0])
        return kind is not None and (kind[1].is_floating_point or kind[1].is_complex) and kind[0].numel() > 0

    def collect(
        self, instruction: Instruction, sign: int, kind: Any, number: int, found: tuple[list[_Term], list[Instruction]]
    ) -> None:
        """The summands of a sum, and the sums that are parts of it."""
        terms, inside = found
        signs = (sign, -sign if _called(instruction) is torch.sub else sign)
        for item, side in zip(instruction.args, signs, strict=True):
            slot = item.slot
            place, maker = self.makers.get(slot, (-1, None))
            near = maker is not None and number - place <= _NEAR and self.uses[slot] == 1 and self.kinds.get(slot) == kind
            if not near or maker is None or self.touched(maker):
                terms.append(_Term(slot, side))
            elif self.is_sum(maker):
                parts: tuple[list[_Term], list[Instruction]] = ([], [])
                self.collect(maker, side, kind, number, parts)
                if any(term.product is not None for term in parts[0]):
                    terms += parts[0]
                    inside += [maker, *parts[1]]
                else:  # one without products stays as it is
                    terms.append(_Term(slot, side))
            else:
                terms.append(self.term(slot, side, maker, number))

    def term(self, slot: int, sign: int, maker: Instruction, number: int) -> _Term:
        if self.is_product(maker):
            return _Term(slot, sign, maker)
        if not (_called(maker) in _RESHAPES or _called(maker) in _TURNS) or maker.kwargs or not isinstance(maker.args[0], Ref):
            return _Term(slot, sign)
        source = maker.args[0].slot
        place, product = self.makers.get(source, (-1, None))
        if product is None or self.uses[source] > 1 or number - place > _NEAR or not self.is_product(product):
            return _Term(slot, sign)
        if self.touched(product) or source not in self.kinds:
            return _Term(slot, sign)
        return _Term(slot, sign, product, maker)

    def is_product(self, instruction: Instruction) -> bool:
        if _called(instruction) not in _ADDED or instruction.kwargs or instruction.keep:
            return False
        return all(isinstance(item, Ref) and self.kinds.get(item.slot, "")[1:] == self.kinds[instruction.outputs[0]][1:]
                   for item in instruction.args)  # fmt: skip


class _Maker:
    """Calls in place of others.

    Args:
        program: the program.
        place: where a value of the program is made.
        first: before which place none of the calls is to stand.

    Attributes:
        calls: the calls.
        places: for each its result, and where it is made.
        moved: products that are made later than they were, and where.
    """

    def __init__(self, program: Program, place: Callable[[int], int], first: int) -> None:
        self.program, self.place, self.first = program, place, first
        self.calls: list[Instruction] = []
        self.places: dict[int, int] = {}
        self.moved: list[tuple[Instruction, int]] = []

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kind: Any, **kwargs: Any) -> int:
        slot = self.program.new_slot()
        self.program.kinds[slot] = kind
        call = Instruction(function, args, kwargs, (slot,), False)
        self.places[slot] = max([self.first, *[self.places.get(read, self.place(read)) for read in reads(call)]])
        self.calls.append(call)
        return slot

    def product(self, before: Instruction, call: Instruction) -> int:
        """A product, no earlier than it was."""
        place = self.place(before.outputs[0])
        slot = self.call(call.function, call.args, self.program.kinds[before.outputs[0]], **call.kwargs)
        if self.places[slot] > place:
            self.moved.append((before, self.places[slot]))
        self.places[slot] = max(self.places[slot], place)
        return slot

    def added(self, one: int, two: int, sign: int) -> int:
        """A sum or difference."""
        first, second = self.program.kinds[one], self.program.kinds[two]
        kind = (broadcast_shapes(first[0], second[0]), *first[1:])
        return self.call(torch.add if sign > 0 else torch.sub, (Ref(one), Ref(two)), kind)

    def view(self, slot: int, shape: Sequence[int]) -> int:
        """A value in another shape."""
        kind = self.program.kinds[slot]
        return self.call(torch.reshape, (Ref(slot), [*shape]), (torch.Size(shape), *kind[1:]))

    def turn(self, slot: int) -> int:
        """A matrix transposed."""
        kind = self.program.kinds[slot]
        return self.call(torch.t, (Ref(slot),), (torch.Size(kind[0][::-1]), *kind[1:]))


def _called(instruction: Instruction) -> Any:
    return FUNCTIONS.get(instruction.function, instruction.function)


def _is_view(instruction: Instruction) -> bool:
    return instruction.function is torch.reshape or instruction.function is torch.t


def _product(term: _Term) -> Instruction:
    assert term.product is not None
    return term.product


__all__ = ["with_added_products"]
