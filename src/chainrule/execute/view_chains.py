"""Views of views with fewer calls: where reshapes and permutations one after the other do what one call does, or nothing.

Every dimension of a value is made of *atoms*: pieces of the dimensions of the value that a chain of views begins with, in the
order in which they follow one another there. A permutation moves atoms, a reshape splits and joins them; dimensions of size
one have none. Where a chain ends, its atoms say what is to be done at once (a transposition of strides: the tensor that
comes out has the elements of the chain's last one, in the same order).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch

from chainrule.execute.renaming import renamed
from chainrule.maps.staging import Instruction, Program, Ref, reads

aten = torch.ops.aten

#: Calls that keep the order of the elements.
_SHAPINGS = frozenset(
    {
        torch.reshape, torch.Tensor.reshape, torch.Tensor.view, torch.squeeze, torch.unsqueeze, aten.reshape.default._op,
        aten.view.default._op, aten._unsafe_view.default._op, aten.squeeze.default._op, aten.squeeze.dim._op,
        aten.squeeze.dims._op, aten.unsqueeze.default._op,
    }
)  # fmt: skip
_PERMUTATIONS = frozenset({torch.permute, torch.Tensor.permute, aten.permute.default._op})
_TRANSPOSITIONS = frozenset({torch.transpose, torch.Tensor.transpose, aten.transpose.int._op})
_TURNS = frozenset({torch.t, aten.t.default._op})

Atoms = tuple[int, ...]

#: Those that may have to copy.
_RESHAPES = frozenset({torch.reshape, torch.Tensor.reshape, aten.reshape.default._op, aten._unsafe_view.default._op})


class _Link(NamedTuple):
    """A value in a chain of views.

    Attributes:
        chain: the chain.
        dims: the atoms of its dimensions.
        calls: how many calls lead to it that serve nothing else.
        reshapes: how many of these may copy.
    """

    chain: _Chain
    dims: list[Atoms]
    calls: int
    reshapes: int


class _Chain:
    """The views of one value.

    Attributes:
        root: the value.
        shape: its shape.
        dims: the atoms of its dimensions, as they were at first.
        order: its atoms, in its own order.
        sizes: their sizes.
        split: those that were split, and into what.
    """

    def __init__(self, root: int, shape: Sequence[int]) -> None:
        self.root, self.shape = root, tuple(shape)
        self.sizes: dict[int, int] = {}
        self.order: list[int] = []
        self.split: dict[int, tuple[int, int]] = {}
        self.dims: list[Atoms] = []
        for size in self.shape:
            self.dims.append(() if size == 1 else (self._new(size),))
            self.order += self.dims[-1]

    def _new(self, size: int) -> int:
        self.sizes[atom := len(self.sizes)] = size
        return atom

    def refined(self, dims: Sequence[Atoms]) -> list[Atoms]:
        """Dimensions in terms of the atoms as they are by now."""
        return [tuple(piece for atom in dim for piece in self._pieces(atom)) for dim in dims]

    def _pieces(self, atom: int) -> list[int]:
        if atom not in self.split:
            return [atom]
        return [piece for half in self.split[atom] for piece in self._pieces(half)]

    def reshaped(self, dims: Sequence[Atoms], shape: Sequence[int]) -> list[Atoms] | None:
        """The dimensions after a reshape; None where a dimension would hold a part of an atom."""
        waiting = [atom for dim in dims for atom in dim][::-1]
        found: list[Atoms] = []
        for size in shape:
            taken: list[int] = []
            rest = size
            while rest != 1:
                atom = waiting.pop()
                have = self.sizes[atom]
                if rest % have:
                    if have % rest:
                        return None
                    halves = self._new(rest), self._new(have // rest)
                    self.split[atom] = halves
                    place = self.order.index(atom)
                    self.order[place : place + 1] = halves
                    waiting.append(halves[1])
                    atom, have = halves[0], rest
                taken.append(atom)
                rest //= have
            found.append(tuple(taken))
        return found

    def call(self, dims: Sequence[Atoms], shape: Sequence[int]) -> tuple[Callable[..., Any], list[int]] | None:
        """The one call that leads from the root to such dimensions, and its argument; None where it takes more."""
        if [atom for dim in dims for atom in dim] == self.order:
            return torch.reshape, [*shape]
        own = self.refined(self.dims)
        places: dict[Atoms, list[int]] = {}
        for number, atoms in enumerate(own):
            places.setdefault(atoms, []).append(number)
        if Counter(own) != Counter(dims):
            return None
        return torch.permute, [places[atoms].pop(0) for atoms in dims]


def with_short_chains(
    program: Program, kept: Sequence[Instruction], own: set[int], touched: Callable[[Instruction], bool]
) -> list[Instruction]:
    """The instructions, with chains of views as one call, or none, where that says the same.

    Args:
        program: the program, for the shapes of its values.
        kept: its instructions.
        own: results, and what they are views of: they stay as they are.
        touched: whether an instruction reads or makes memory that is written to.
    """
    views: dict[int, _Link] = {}
    uses = Counter(slot for i in kept for slot in reads(i))
    ends = {slot for i in kept if not _is_view(program, i, own, touched) for slot in reads(i)} | own
    names: dict[int, int] = {}
    made: dict[Any, int] = {}
    found: list[Instruction] = []
    for instruction in kept:
        found.append(renamed(instruction, names) if names else instruction)
        if not _is_view(program, instruction, own, touched):
            continue
        (out,), source = instruction.outputs, instruction.args[0].slot
        after = program.kinds[out][0]
        if (before := views.get(source)) is None:
            chain = _Chain(source, program.kinds[source][0])
            before = views[source] = _Link(chain, chain.dims, 0, 0)
        chain = before.chain
        dims = _moved(chain, chain.refined(before.dims), instruction, after)
        if dims is None:
            continue
        # Calls that something else needs, too, would stay.
        alone = uses[source] == 1 and source not in ends
        copies = instruction.function in _RESHAPES
        views[out] = link = _Link(
            chain, dims, (before.calls if alone else 0) + 1, (before.reshapes if alone else 0) + copies
        )
        if out not in ends:
            continue
        call = chain.call(dims, after)
        # More calls than one could copy what this order of theirs does not.
        if call is None:
            continue
        function, argument = call
        same = function is torch.reshape and tuple(after) == chain.shape
        if link.calls <= (not same) or (function is torch.reshape and not same and not link.reshapes):
            continue
        found.pop()
        slot = names.get(chain.root, chain.root)
        if not same:
            key = (slot, function, tuple(argument))
            if key not in made:
                made[key] = program.new_slot()
                program.kinds[made[key]] = program.kinds[out]
                found.append(Instruction(function, (Ref(slot), argument), {}, (made[key],), False))
            slot = made[key]
        names[out] = slot
    return found


def _is_view(
    program: Program, instruction: Instruction, own: set[int], touched: Callable[[Instruction], bool]
) -> bool:
    function = instruction.function
    if not (function in _SHAPINGS or function in _PERMUTATIONS or function in _TRANSPOSITIONS or function in _TURNS):
        return False
    if instruction.kwargs or not isinstance(instruction.args[0], Ref) or instruction.keep or instruction.writes:
        return False
    source, (out,) = instruction.args[0].slot, instruction.outputs
    before, after = program.kinds.get(source), program.kinds.get(out)
    if before is None or after is None or out in own or not prod(before[0]) or touched(instruction):
        return False
    return prod(before[0]) == prod(after[0]) and before[1:] == after[1:]


def _moved(chain: _Chain, dims: list[Atoms], instruction: Instruction, after: Sequence[int]) -> list[Atoms] | None:
    """The dimensions of the result of a view."""
    if instruction.function in _SHAPINGS:
        return chain.reshaped(dims, after)
    rank = len(dims)
    if instruction.function in _PERMUTATIONS:
        given = instruction.args[1:] if instruction.args[1].__class__ is int else instruction.args[1]
        order = [number % rank for number in given]
    elif rank < 2:
        order = [*range(rank)]
    else:
        one, other = instruction.args[1:] if instruction.function in _TRANSPOSITIONS else (0, 1)
        order = [*range(rank)]
        order[one], order[other] = order[other], order[one]
    return [dims[number] for number in order]
