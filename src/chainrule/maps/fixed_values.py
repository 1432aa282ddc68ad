"""What a sparse plan takes for the same in every run: indices, masks, choices, and what follows from them alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chainrule.maps.staging import Program, Staged, reads

#: Of larger arrays so many elements are looked at; where less than one in so many is not zero, the array is mostly zero.
_LOOKS, _FULL = 256, 4


class FixedValues:
    """The values of a program that a plan was made for.

    Args:
        program: the program.
        given: how many of its instructions stood in it before planning began.

    Attributes:
        relations: the indices that the pattern was made from.
        masks: the masks whose zeros were left out.
        choices: what ops chose, where only that is in the pattern.
        full: masks and constants that had hardly any zeros to leave out.
    """

    def __init__(self, program: Program, given: int) -> None:
        self.program = program
        self.relations: list[Staged] = []
        self.masks: list[Staged] = []
        self.choices: list[Staged] = []
        self.full: list[Staged] = []
        self._given = given
        self._known = False
        self._slots: set[int] = set()
        self._scanned = 0

    def guards(self, staged: Sequence[Staged]) -> tuple[dict[object, int], list[Staged]]:
        """What indices were computed from: inputs of an integer dtype by key, and those indices that read other inputs."""
        exact: dict[object, int] = {}
        computed: list[Staged] = []
        inputs = sources_of(self.program, staged)
        if staged is self.masks:
            return inputs, []
        if staged is self.choices:
            return {}, list(staged)
        if all(not self.program.kinds[slot][1].is_floating_point for slot in inputs.values()):
            return inputs, []
        for index in staged:
            own = sources_of(self.program, [index])
            if any(self.program.kinds[slot][1].is_floating_point for slot in own.values()):
                computed.append(index)
            else:
                exact.update(own)
        return exact, computed

    def filled(self) -> tuple[int, ...]:
        """The slots of the tape that what was full follows from."""
        found = sources_of(self.program, self.full).items()
        values = {known.slot: known.value for known in self.program._input_values.values()}
        return tuple(key for key, slot in found if isinstance(key, int) and slot in values and not is_mostly_zero(values[slot]))

    def exact(self) -> dict[object, int]:
        """The inputs that are the same in every run with these indices and masks."""
        return self.guards(self.relations)[0] | self.guards(self.masks)[0]

    def __contains__(self, staged: Staged) -> bool:
        """Whether a value is the same in every run with these indices."""
        if not self._known:
            self._known = True
            self._slots.update(self.exact().values())
            # What a recorded program has written to is left as it is.
            self._scanned = self._given if self.program.writes else 0
        for instruction in self.program.instructions[self._scanned :]:
            read = reads(instruction)
            if all(slot in self._slots or slot in self.program.constants for slot in read) and not instruction.keep:
                self._slots.update(instruction.outputs)
        self._scanned = len(self.program.instructions)
        return staged.slot in self._slots or staged.slot in self.program.constants


def is_mostly_zero(tensor: torch.Tensor) -> bool:
    """Whether most elements of an array are zero, by a look at a few; small ones are not looked at."""
    if tensor.numel() < _LOOKS or tensor.layout is not torch.strided:
        return False
    few = max(2, round(_LOOKS ** (1 / tensor.dim())))
    seen = tensor[tuple([slice(None, None, max(size // few, 1)) for size in tensor.shape])]
    return int(torch.count_nonzero(seen)) * _FULL < seen.numel()


def sources_of(program: Program, staged: Sequence[Staged]) -> dict[object, int]:
    """The inputs that values depend on."""
    wanted = {s.slot for s in staged}
    for instruction in reversed(program.instructions):
        if not wanted.isdisjoint(instruction.outputs):
            wanted.update(reads(instruction))
    return {key: slot for key, slot in program.inputs.items() if slot in wanted}


__all__ = ["FixedValues", "is_mostly_zero", "sources_of"]
