"""How many rows of a Jacobian fit a budget of bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from chainrule.batching.tensor import BatchTensor
from chainrule.capture.tape import Tape
from chainrule.execute.engine import CACHE
from chainrule.execute.memory import Watch
from chainrule.execute.prediction import Predictions, forget
from chainrule.plan.planner import Request
from chainrule.transforms.trace import Traced

#: A block is tried before it is taken, unless it is predicted to need at most this share of the budget.
_SURE = 0.5

#: By what the size of a block may grow from one trial to the next.
_GROWTH = 4


@dataclass
class _Count:
    """A number of rows that was found, kept in the cache of plans."""

    rows: int
    used: bool = False


def result_bytes(traced: Traced, number: int, cast: str) -> int:
    """The size of the Jacobians of one output with respect to all inputs."""
    out = traced.out_leaves[number]
    size = 0
    for leaf in traced.in_leaves:
        size += leaf.numel() * (out if cast == "output" else leaf).itemsize
    return out.numel() * size


def rows_within(traced: Traced, number: int, order: str, cast: str, budget: int, name: str, *, whole: bool) -> int:
    """How many rows of an output's Jacobians can be computed at once.

    The plans of blocks of growing size are made, until the next one would not fit: a plan for many rows may go another
    way than one for few. What was found is kept with the plans.

    Args:
        traced: the run.
        number: the output.
        order: the order of accumulation.
        cast: whose dtype the result has.
        budget: how many bytes may be allocated, the record of the run and the blocks included.
        name: the transform's name.
        whole: whether a result of full size is allocated beside the budget (which all rows at once are written to).

    Raises:
        MemoryError: if not even one row fits.
    """
    total = traced.out_leaves[number].numel()
    if total == 0:
        return 1
    samples = _samples(traced.out_leaves[number])
    key: Any = traced.tape.signature(("rows", traced.out_slots[number], order, cast, budget, whole, samples))
    try:
        known: Any = CACHE.get(key)
    except TypeError:
        key = known = None
    if known is None:
        trials = _Trials(traced, number, order, cast, whole)
        known = _Count(trials.most(budget, name))
        trials.forget_but(known.rows)
        if key is not None:
            CACHE.put(key, known)
    found: int = known.rows
    return found


def _samples(tensor: Any) -> int:
    """How many samples of the vmaps around stand in a tensor."""
    count = 1
    while tensor.__class__ is BatchTensor:
        count *= tensor.level.size if tensor.batched else 1
        tensor = tensor.value
    return count


class _Trials:
    """Blocks of rows of one output, and what they need."""

    def __init__(self, traced: Traced, number: int, order: str, cast: str, whole: bool) -> None:
        self.traced = traced
        self.number = number
        self.order = order
        self.cast = cast
        self.whole = whole
        self.total = traced.out_leaves[number].numel()
        self.samples = _samples(traced.out_leaves[number])
        self.size = result_bytes(traced, number, cast) * self.samples
        watch = Watch()
        watch.add_run(traced.tape)
        self.held = watch.held
        self.tried: dict[int, tuple[Tape, Request]] = {}
        self.predictions = Predictions()

    def needed(self, rows: int, budget: int) -> float:
        """The bytes that a block of so many rows needs, the record of the run included; it is run if that is in the budget."""
        # Apart, so that the tape is as it would be without the trial, and the plan serves the real block.
        traced = replace(self.traced, tape=self.traced.tape.fork())
        all_at_once = rows == self.total and self.whole
        assert (slot := traced.out_slots[self.number]) is not None
        wanted = slot if all_at_once else traced.rows(self.number, rows).slot
        request = Request("jacobian", tuple(traced.in_slots), (wanted,), self.order, (), self.cast)
        # The caller holds a block while the next one is computed; in a whole result it is copied at once.
        self.tried[rows] = traced.tape, request
        beside = self.held - self.size if all_at_once else self.held + (0 if self.whole else self.size * rows / self.total)
        memory = self.predictions.memory(traced.tape, request, budget - beside)
        # The same for all samples where the Jacobian does not depend on them.
        return self.held + memory.temporaries if all_at_once else beside + memory.peak

    def forget_but(self, rows: int) -> None:
        """Forget the plans that were made but the one for so many rows: they keep constants."""
        for number, (tape, request) in self.tried.items():
            if number != rows:
                forget(tape, request)

    def most(self, budget: int, name: str) -> int:
        """The most rows that fit, as far as trials tell."""
        fits, need = 1, self.needed(1, budget)
        if need > budget:
            mapped = f". Under vmap that is a row for each of {self.samples} samples: give vmap a chunk_size"
            raise MemoryError(
                f"{name}: one row of the Jacobian needs about {int(need)} bytes ({self.held} of them for the record of the "
                f"function's run), more than max_memory={budget}{mapped if self.samples > 1 else ''}"
            )
        rows = min(2, self.total)
        while rows > fits:
            found = self.needed(rows, budget)
            # Of few rows the most may be held elsewhere; of many it is their results.
            each = max((found - need) / (rows - fits), self.size / self.total, 1.0)
            if found > budget:
                # Between the two there may be a jump; what fits for sure is known.
                further = fits + int((budget - need) / each)
                if further <= fits or self.needed(further, budget) > budget:
                    return fits
                return further
            is_less, fits, need = found < need, rows, found
            if is_less:  # other calls, of whose growth nothing is known
                rows = min(self.total, _GROWTH * fits)
                continue
            everything = need + each * (self.total - fits)
            if everything <= budget * _SURE:
                return self.total
            if self.whole and everything - self.size <= budget and self.needed(self.total, budget) <= budget:
                return self.total
            rows = min(self.total, fits + int((budget - need) / each), _GROWTH * fits)
        return fits


__all__ = ["result_bytes", "rows_within"]
