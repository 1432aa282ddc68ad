"""Terms by their non-zeros: relations with known targets, sums of terms as one list of entries.

A plan of a sparse map is made for the *values* of its index tensors as well: every relation is held as a concrete tensor.
Relations that are equal are then one, a shift by nothing is a diagonal, and two relations with one target are joined like
two tables. What is left to compute in each run are the values of the entries.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy
import torch

from chainrule.maps.circles import opened
from chainrule.maps.coincidence import meeting, solve_affine
from chainrule.maps.compose import Workspace, keep_count, settle, without_repeats
from chainrule.maps.contract import transpose_to
from chainrule.maps.fixed_values import FixedValues, sources_of
from chainrule.maps.meeting_blocks import as_blocks, times_list
from chainrule.maps.nodes import Node, selecting
from chainrule.maps.nonzeros import MANY, count_entries, few_apart, fewer, over_grid, thinned, without_shared
from chainrule.maps.onehots import dense_relation, gather, mask_factor
from chainrule.maps.padded import Padded, padded_pairs, padded_places, room_for
from chainrule.maps.places import Places
from chainrule.maps.sorted_places import affine, join_equal
from chainrule.maps.stacks import stacked
from chainrule.maps.staging import Program, Staged, reads
from chainrule.maps.stencils import merge_taps
from chainrule.maps.terms import Axis, Factor, OneHot, Term
from chainrule.maps.unmapped import plain, unbatched
from chainrule.modes_off import unseen

#: From this many terms on, a dense block that they fill is made one.
_SOME = 3
#: A constant array with more than one in so many elements other than zero is a dense one, unless it is a mask.
_DENSE = 4
#: Arrays of up to so many elements, and triangles, are listed without the zeros that are known.
_LITTLE = 1 << 10


class SparseWorkspace(Workspace):
    """A workspace whose relations are concrete.

    Attributes:
        program: where indices are computed now, and values later.
        widened: the slots of tensors that depend on the inputs: what they select is any element.
        derived: the slots of constants that depend on the inputs: masks among them are values, of which nothing is known.
        values: the values of the tape.
        zeros: by slot, for values with zeros that are known, where the others are; None if nobody has looked.
        constants: the slots of constants of the tape: as long as nothing outside differentiates them, their zeros are known.
        picked: the slots of constants, made from the inputs, that are zero but where an op chose its elements.
        everywhere: whether what ops choose by value is any element.
        limit: ops with more entries than this are not listed; None for any number.
        by_rows: whether terms are kept by rows, some of which have no entries (see :mod:`chainrule.maps.row_form`).
        stacks: whether many terms become one over taps; not those of local Jacobians, whose products would multiply taps.
        is_same: whether an index is the same in every run, where a plan is made for any indices; None for one of these.
        padded: whether lists whose length follows from other values have room for a few more.
        masked: whether the zeros of masks that are tensors are left out of the pattern, which is then for these masks only.
            (Those that are the same in every run are always left out.)
        chosen: whether what ops choose by value has the places of this run, which the pattern is for then.
    """

    sparse = True

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        widened: frozenset[int] = frozenset(),
        program: Program | None = None,
        derived: frozenset[int] = frozenset(),
        masked: bool = True,
        chosen: bool = True,
    ) -> None:
        super().__init__(dtype, device)
        self.program = Program() if program is None else program
        self._given = len(self.program.instructions)
        self.widened = widened
        self.derived = derived
        self.masked = masked
        self.chosen = chosen
        self.limit: int | None = None
        self.everywhere = False
        self.stacks = True
        self.by_rows = False
        self.values: Sequence[Any] = ()
        self.zeros: dict[int, Places] | None = None
        self.constants: frozenset[int] = frozenset()
        self.picked: frozenset[int] = frozenset()
        self.is_same: Callable[[torch.Tensor], bool] | None = None
        self.padded = False
        self._nodes: dict[object, list[tuple[torch.Tensor, Node]]] = {}
        self._weights = numpy.empty(0, dtype=numpy.int64)
        self._known: dict[int, tuple[Node, Node]] = {}
        self.fixed = FixedValues(self.program, self._given)
        self._settled: set[int] = set()
        self._settled_inputs = self._settled_scanned = 0

    # Relations.

    @staticmethod
    def plain(tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as it is outside of a vmap (see :func:`plain`)."""
        return plain(tensor)

    def read(self, node: Node) -> torch.Tensor:
        """The concrete value of an index."""
        return plain(node.force(self.program).value)

    def from_tape(self, term: Term) -> Term:
        """The term of a rule with concrete relations."""
        kept, factors = [], term.factors
        for onehot in term.onehots:
            staged = onehot.index.force(self.program)
            if self.widened:
                inputs = sources_of(self.program, [staged])
                if not self.widened.isdisjoint(key for key in inputs if isinstance(key, int)):
                    factors = (*factors, dense_relation(onehot, self.dtype, self.memo))
                    continue
            self.fixed.relations.append(staged)
            kept.append(onehot)
        return self.canonical(self._without_zeros(term.having(factors=factors, onehots=tuple(kept))))

    def _without_zeros(self, term: Term) -> Term:
        """The term with each mask, whose zeros are known, as a list of the places where it is not zero."""
        outside = {axis for dim in term.out_dims for axis in dim}
        for factor in term.factors:
            if factor.node.zeros is not None:
                dims, make = factor.node.zeros
                places = torch.nonzero(make(self.device))
                term = term.having(onehots=(*term.onehots, *self._listed(places, [factor.axes[d] for d in dims])))
            if (known := self._known_places(factor.node)) is not None:
                found, masks, choices = known
                count, total = self._counted(found), factor.node.numel
                pointwise = all(axis in outside for dim in term.in_dims for axis in dim)
                few = total <= _LITTLE or 2 * count <= total + sum(factor.node.sizes)
                if count == total:
                    self.fixed.full.extend(masks)
                elif pointwise or few:
                    self.fixed.masks.extend(masks)
                    self.fixed.choices.extend(choices)
                    if self.is_padded(found):
                        term = self._with_room(term, factor.axes, found)
                    elif count == 0:
                        return term.having(scale=0.0)
                    else:
                        term = term.having(onehots=(*term.onehots, *self._listed(torch.nonzero(found), factor.axes)))
            choice = factor.node.is_choice and self.chosen and not self.everywhere
            if not choice and not factor.node.mask:
                continue
            staged = factor.node.force(self.program)
            if (not choice and not self._is_settled(staged)) or (value := unbatched(staged.value)) is None:
                continue
            if choice and self.is_padded(value):
                rest = tuple(f for f in term.factors if f is not factor)
                term = self._with_room(term.having(factors=rest), factor.axes, value)
                self.fixed.choices.append(staged)
                continue
            places = torch.nonzero(value)
            count, total = places.shape[0], value.numel()
            if count == total:
                if not choice:
                    self.fixed.full.append(staged)
                continue
            values = value[places.unbind(1)] if value.dim() else value.new_zeros(0)
            ones = bool((values == 1).all())
            # A few taps that much else runs over, as those of a kernel, or a sparse array; others are dense all the same.
            if not ones and not choice and count * _DENSE > total and total * _DENSE > count_entries(term):
                self.fixed.full.append(staged)
                continue
            (self.fixed.choices if choice else self.fixed.masks).append(staged)
            if count == 0:
                return term.having(scale=0.0)
            listed = self._listed(places, factor.axes)
            rest = tuple(f for f in term.factors if f is not factor)
            if not ones:
                constant = Node((count,), (), lambda program, found=values: program.constant(found), label="mask")
                rest = (*rest, Factor(constant, listed[0].sources))
            term = term.having(factors=rest, onehots=(*term.onehots, *listed))
        return term

    def is_padded(self, *read: torch.Tensor) -> bool:
        """Whether a list that follows from these values may be of another length in another run of the plan."""
        return self.padded and self.is_same is not None and not all(map(self.is_same, read))

    def _counted(self, found: torch.Tensor) -> int:
        """How often truth values hold; in another run of the plan that may be another number, where lists have room for it."""
        with unseen() if self.is_padded(found) else nullcontext():
            return int(found.sum())

    def _with_room(self, term: Term, axes: Sequence[Axis], value: torch.Tensor) -> Term:
        """The term times an array, as a list of fixed length of the places where it is not zero; truth values count as ones."""
        flags = value.reshape(-1) != 0
        if not bool(flags.all()):
            room, some = room_for(flags.sum())
            if not some:
                return term.having(scale=0.0)
            found = padded_places(flags, room)
        else:
            places = torch.arange(flags.numel(), device=self.device)
            room, found = flags.numel(), Padded(places, torch.ones_like(flags))
        places, stride = [], max(value.numel(), 1)
        for size in value.shape:
            stride //= max(size, 1)
            places.append(torch.div(found.places, stride, rounding_mode="floor") % size)
        counted = Axis(room)
        factors = [*term.factors, Factor(self._real(found.real), (counted,))]
        if value.dtype is not torch.bool:
            shares = value.reshape(-1).index_select(0, found.places)
            factors.append(Factor(Node((room,), (), lambda program: program.constant(shares), label="mask"), (counted,)))
        listed = [OneHot(self.index(p), (counted,), axis) for p, axis in zip(places, axes, strict=True)]
        return term.having(factors=tuple(factors), onehots=(*term.onehots, *listed))

    def _real(self, real: torch.Tensor) -> Node:
        """Ones for the elements of a list that count."""
        ones = real.to(self.dtype)
        return selecting(Node(ones.shape, (), lambda program: program.constant(ones), label="mask"))

    def _known_places(self, node: Node) -> tuple[torch.Tensor, list[Staged], list[Staged]] | None:
        """Where a value of the tape may be other than zero, and the masks and choices that say so; None if nothing is known."""
        place = None if self.zeros is None or node.slot is None else self.zeros.get(node.slot)
        if place is None:
            return None
        read = {slot: self.program.input(slot, self.values[slot]) for slot in sorted(place.reads)}
        masks = [staged for slot, staged in read.items() if slot not in self.picked]
        if not all(map(self._is_settled, masks)):
            return None
        found = place(self.device)
        choices = [staged for slot, staged in read.items() if slot in self.picked]
        return found.reshape(node.sizes) if found.numel() == node.numel else found.expand(node.sizes), masks, choices

    def is_readable(self, slot: int) -> bool:
        """Whether a value is a constant that may be read now, and is compared later: nothing outside sees it otherwise."""
        return (slot in self.constants or slot in self.picked) and slot not in self.widened

    def _listed(self, places: torch.Tensor, axes: Sequence[Axis]) -> list[OneHot]:
        """Relations from a new axis, which counts the rows of ``places``, to what stands in its columns."""
        counted = Axis(places.shape[0])
        return [OneHot(self.index(column), (counted,), axis) for column, axis in zip(places.unbind(1), axes, strict=True)]

    def _is_settled(self, staged: Staged) -> bool:
        """Whether a value is made from index tensors, masks and constants alone, none of which follow from inputs."""
        program = self.program
        if not self._settled_scanned:
            # What a recorded program has written to is left as it is.
            self._settled_scanned = self._given if program.writes else 0
        outside = self.derived | self.widened
        for key, slot in itertools.islice(program.inputs.items(), self._settled_inputs, None):
            known = isinstance(key, int) and key not in outside and slot in program.kinds
            if self.masked and known and (not program.kinds[slot][1].is_floating_point or key in self.constants):
                self._settled.add(slot)
        self._settled_inputs = len(program.inputs)
        for instruction in program.instructions[self._settled_scanned :]:
            read = reads(instruction)
            if all(slot in self._settled or slot in program.constants for slot in read) and not instruction.keep:
                self._settled.update(instruction.outputs)
        self._settled_scanned = len(program.instructions)
        return staged.slot in self._settled or staged.slot in program.constants

    def canonical(self, term: Term) -> Term:
        """The same term; equal relations share their index, those that say nothing are gone, and no factor repeats an axis."""
        while term.onehots:
            onehots: list[OneHot] = []
            same: dict[Axis, Axis] = {}
            ties: list[Axis] = []
            for onehot in term.onehots:
                found = self._concrete(onehot)
                if found.affine != (0, 1) or found.sources[0].size != found.target.size:
                    onehots.append(found)
                    continue
                ties.append(found.sources[0])
                target, source = _followed(found.target, same), _followed(found.sources[0], same)
                if target is not source:
                    same[target] = source
            term = term.having(onehots=tuple(onehots))
            if not ties:
                break
            term = self._without_circles(term.rename({axis: _followed(axis, same) for axis in same}))
            term = keep_count(term, tuple(dict.fromkeys(_followed(axis, same) for axis in ties)))
        return term

    def _without_circles(self, term: Term) -> Term:
        """The term after some of its axes have become one: factors and relations are read on their diagonals."""
        term = term.having(factors=tuple(without_repeats(factor, self.memo) for factor in term.factors))
        onehots: list[OneHot] = []
        scale = term.scale
        for onehot in term.onehots:
            if len(set(onehot.sources)) < len(onehot.sources):
                read = without_repeats(Factor(onehot.index, onehot.sources), self.memo)
                onehot = self._concrete(onehot._replace(index=read.node, sources=read.axes))
            if onehot.target not in onehot.sources:
                onehots.append(onehot)
                continue
            # A relation of an axis to itself holds where it takes the axis to the same place.
            place = over_grid(onehot, self, {axis: number for number, axis in enumerate(onehot.sources)})
            own = [-1 if axis is onehot.target else 1 for axis in onehot.sources]
            places = torch.nonzero(place == torch.arange(onehot.target.size, device=self.device).reshape(own))
            onehots.extend(self._listed(places, onehot.sources))
            scale = scale if places.shape[0] else 0.0
        return term.having(onehots=tuple(onehots), scale=scale)

    def _concrete(self, onehot: OneHot) -> OneHot:
        known = self._known.get(id(onehot.index))
        if known is None:
            node = self.index(self.read(onehot.index))
            self._known[id(onehot.index)] = onehot.index, node
            self._known[id(node)] = node, node
        else:
            node = known[1]
        affine, partial = node.facts
        return OneHot(node, onehot.sources, onehot.target, partial, affine)

    def index(self, tensor: torch.Tensor) -> Node:
        """The node of a concrete index; equal ones are one node."""
        tensor = tensor.to(torch.long).contiguous()
        key = (tuple(tensor.shape), self._fingerprint(tensor))
        known = self._nodes.setdefault(key, [])
        for value, node in known:
            if torch.equal(value, tensor):
                return node
        node = Node(tensor.shape, (), lambda program: program.constant(tensor), label="index")
        known.append((tensor, node))
        fixed = self.is_same is None or self.is_same(tensor)
        node.facts = affine(tensor) if fixed else None, bool((tensor < 0).any())
        node.force(self.program)
        return node

    def _fingerprint(self, tensor: torch.Tensor) -> int:
        """A number that is the same for equal tensors, and hardly ever for others: a sum with random weights."""
        if tensor.numel() > len(self._weights):
            self._weights = numpy.random.default_rng(0).integers(-(2**62), 2**62, 2 * tensor.numel())
        return int(numpy.dot(tensor.cpu().numpy().reshape(-1), self._weights[: tensor.numel()]))

    def relation(self, index: torch.Tensor, sources: tuple[Axis, ...], target: Axis) -> OneHot:
        """The relation of a concrete index; negative places have no target."""
        return self._concrete(OneHot(self.index(index), sources, target, True))

    def coincide(self, term: Term, one: OneHot, two: OneHot) -> Term:
        """Join two relations with one target: a new axis counts the pairs of sources that meet."""
        if one.affine is not None and two.affine is not None:
            solved = solve_affine(term, one, two, self)
            if solved is not None:
                return solved
        tied = meeting(term, one, two)
        shared = tuple(axis for axis in one.sources if axis in two.sources)
        left, right = (
            self.keys_of(h.sources, [pair[side] for pair in tied], shared) for side, h in enumerate((one, two))
        )
        pairs = None
        if (padded := self.is_padded(left, right)) and (found := padded_pairs(left, right)) is not None:
            first, second, real = found
            pairs = Axis(len(first))
            term = term.having(factors=(*term.factors, Factor(self._real(real), (pairs,))))
        elif not padded and self.limit is None and not shared:
            if (blocks := as_blocks(term, tied, left, right, self)) is not None:
                return blocks
        if pairs is None:
            size = math.prod(h.target.size for h, _ in tied) * math.prod(axis.size for axis in shared)
            first, second = join_equal(left, right, self.limit, size)
            pairs = Axis(len(first))
        gone = {id(h) for pair in tied for h in pair}
        onehots = [h for h in term.onehots if id(h) not in gone]
        for h, chosen in ((one, first), (two, second)):
            stride = math.prod(a.size for a in h.sources)
            for axis in h.sources:
                stride //= max(axis.size, 1)
                if h is one or axis not in shared:
                    onehots.append(OneHot(self.index(chosen // max(stride, 1) % max(axis.size, 1)), (pairs,), axis))
        for h, _ in tied:
            targets = self._spread(h, one.sources).index_select(0, first)
            onehots.append(OneHot(self.index(targets), (pairs,), h.target))
        if pairs.size == 0:
            return term.having(onehots=tuple(onehots), scale=0.0)
        return term.having(onehots=tuple(onehots))

    def push(self, term: Term) -> Term:
        """Every factor and relation is read at the sources of all its targets at once; inner targets go."""
        while term.onehots and term.scale != 0.0:
            step = self._push(term) or merge_taps(term, self)
            if step is None:
                return term
            term = step
        return term

    def _push(self, term: Term) -> Term | None:
        by_target: dict[Axis, list[OneHot]] = {}
        for onehot in term.onehots:
            by_target.setdefault(onehot.target, []).append(onehot)
        relations = {axis: several[0] for axis, several in by_target.items() if len(several) == 1}
        # Relations whose sources are no targets themselves: what others read of them is read at these sources.
        final = {axis: h for axis, h in relations.items() if not any(s in by_target for s in h.sources)}
        for h in term.onehots:
            read = [s for s in h.sources if s in by_target]
            if read and all(s in final for s in read):
                return term.having(onehots=tuple(self.chained(h, final) if o is h else o for o in term.onehots))
        if len(relations) < len(by_target):
            # Among those at the ends of chains, those that meet in most sources come first: all of their targets meet at once.
            twins = [several[:2] for several in by_target.values() if len(several) > 1]
            ends = [pair for pair in twins if not any(s in by_target for h in pair for s in h.sources)]
            one, two = max(ends or twins, key=lambda pair: min(h.index.numel for h in pair))
            return self.coincide(term, one, two)
        if len(final) < len(relations) and (found := opened(term, relations, self)) is not None:
            return found
        if self.limit is None and not self.padded and (multiplied := times_list(term, final, self)) is not None:
            return multiplied
        outer = term.outer_axes()
        factors = tuple(self.gathered(f, final) if any(a in final for a in f.axes) else f for f in term.factors)
        inner = [h for axis, h in final.items() if axis not in outer]
        if not inner:
            return term.having(factors=factors) if factors != term.factors else None
        kept = tuple(h for h in term.onehots if h.target in outer)
        for h in inner:
            if not self._concrete(h).partial:
                continue
            index = self.read(h.index)
            if self.by_rows and any(self._implies(o, h) for o in kept):
                continue
            if len(h.sources) == 1 and h.sources[0].size > 1:
                # The places that lead somewhere are all that is left of the source.
                left = torch.nonzero(index >= 0).squeeze(1)
                some = Axis(left.numel())
                here = OneHot(self.index(left), (some,), h.sources[0])
                inside = OneHot(self.index(index.index_select(0, left)), (some,), h.target)
                others = tuple(o for o in term.onehots if o is not h)
                if some.size == 0:
                    return term.having(onehots=others, scale=0.0)
                return term.having(onehots=(*others, here, inside))
            factors = (*factors, mask_factor(h, self.dtype, self.memo))
        sources = tuple(dict.fromkeys(axis for h in inner for axis in h.sources))
        return keep_count(term.having(factors=factors, onehots=kept), sources)

    def _implies(self, outer: OneHot, inner: OneHot) -> bool:
        """Whether the first relation has no target wherever the second has none, which is not often."""
        if not set(inner.sources).issubset(outer.sources):
            return False
        names = {axis: number for number, axis in enumerate(outer.sources)}
        missing = over_grid(inner, self, names) < 0
        if 2 * int(missing.sum()) > missing.numel():
            return False
        return not bool((missing & (over_grid(outer, self, names) >= 0)).any())

    def chained(self, outer: OneHot, final: dict[Axis, OneHot]) -> OneHot:
        """A relation whose sources are targets of others, as one from their sources."""
        grid, places, valid = self._places(outer.sources, final)
        index = self.read(outer.index).reshape(-1)
        found = index.index_select(0, places.reshape(-1)).reshape(places.shape)
        if valid is not None:
            found = torch.where(valid, found, -1)
        return self.relation(found, grid, outer.target)

    def _places(
        self, axes: Sequence[Axis], final: dict[Axis, OneHot]
    ) -> tuple[tuple[Axis, ...], torch.Tensor, torch.Tensor | None]:
        """Flat row-major positions over ``axes``, some of which are targets, over the grid of what they follow from.

        Where there is no target the position is that of the first element, and the third result is false.
        """
        every = (a for axis in axes for a in (final[axis].sources if axis in final else (axis,)))
        grid = tuple(dict.fromkeys(every))
        names = {axis: number for number, axis in enumerate(grid)}
        sizes = tuple(axis.size for axis in grid)
        places = torch.zeros((1,) * len(grid), dtype=torch.long, device=self.device)
        valid: torch.Tensor | None = None
        stride = 1
        for axis in reversed(axes):
            onehot = final.get(axis)
            if onehot is None:
                counted = torch.arange(axis.size, device=self.device) * stride
                places = places + counted.reshape([-1 if n == names[axis] else 1 for n in range(len(grid))])
            else:
                place = over_grid(onehot, self, names)
                if bool((place < 0).any()):
                    valid = place >= 0 if valid is None else valid & (place >= 0)
                    place = place.clamp(min=0)
                places = places + place * stride
            stride *= axis.size
        return grid, places.expand(sizes), None if valid is None else valid.expand(sizes)

    def gathered(self, factor: Factor, final: dict[Axis, OneHot]) -> Factor:
        """A factor read at the sources of all targets that it carries; zero where there is no target."""
        targets = [axis for axis in factor.axes if axis in final]
        if len(targets) == 1 and not set(final[targets[0]].sources).intersection(factor.axes):
            onehot = self._concrete(final[targets[0]])
            return gather(factor, onehot, self.memo)
        sources = {axis for target in targets for axis in final[target].sources}
        read = tuple(axis for axis in factor.axes if axis in final or axis in sources)
        rest = tuple(axis for axis in factor.axes if axis not in read)
        grid, places, valid = self._places(read, final)
        moved = transpose_to(factor, (*rest, *read), self.memo)
        node = self.index(places.reshape(-1) if valid is None else torch.where(valid, places, -1).reshape(-1))
        lead = tuple(axis.size for axis in rest)
        sizes = (*lead, *(axis.size for axis in grid))
        partial = valid is not None

        def compute(program: Program, value: Staged, index: Staged) -> Staged:
            flat = torch.reshape(value, (*lead, -1))
            taken = torch.index_select(flat, len(lead), torch.clamp(index, min=0) if partial else index)
            if partial:
                taken = torch.where(index >= 0, taken, 0.0)
            return torch.reshape(taken, sizes)

        key = ("gather", id(moved.node), lead, id(node), sizes)
        made = self.memo.get(key)
        if made is None:
            numel = math.prod(sizes)
            made = self.memo[key] = Node(sizes, (moved.node, node), compute, flops=numel, moved=2 * numel, label="gather")
        return Factor(made, (*rest, *grid))

    def _spread(self, onehot: OneHot, sources: Sequence[Axis]) -> torch.Tensor:
        """A relation's index, flat over more sources."""
        names = {axis: number for number, axis in enumerate(sources)}
        return over_grid(onehot, self, names).expand([axis.size for axis in sources]).reshape(-1)

    def keys_of(self, sources: Sequence[Axis], relations: Sequence[OneHot], shared: Sequence[Axis]) -> torch.Tensor:
        """For each source: all targets and the shared sources as one number, negative where there is no target."""
        flat = torch.arange(math.prod(axis.size for axis in sources), device=self.device)
        key = torch.zeros_like(flat)
        missing = torch.zeros_like(flat, dtype=torch.bool)
        for onehot in relations:
            index = self._spread(onehot, sources)
            key = key * onehot.target.size + index
            missing |= index < 0
        for axis in shared:
            after = math.prod(a.size for a in sources[list(sources).index(axis) + 1 :])
            key = key * axis.size + flat // max(after, 1) % max(axis.size, 1)
        return torch.where(missing, -1, key)

    # Sums.

    def compress(self, terms: Sequence[Term]) -> tuple[Term, ...]:
        """The same sum in fewer entries, where many terms meet."""
        if self.stacks:
            terms = stacked(terms, self, MANY)
        if len(terms) < _SOME:
            return tuple(terms)
        if self.by_rows and (apart := few_apart(terms, self)) is not None:
            return apart
        bare, restore = without_shared(terms)
        done = fewer(bare, self)
        # A sum may be tied to what the shared relations have for sources: they are chained.
        return tuple(terms) if len(done) == len(terms) else tuple(settle(restore(term), self) for term in done)

    def thinned(self, term: Term) -> Term:
        """The term in fewer entries, where many of its entries meet."""
        return thinned(term, self)


def _followed(axis: Axis, same: dict[Axis, Axis]) -> Axis:
    """The axis that an axis has become."""
    while axis in same:
        axis = same[axis]
    return axis


__all__ = ["SparseWorkspace"]
