"""What plans need at once, told before they run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch

from chainrule.batching.tensor import BatchTensor
from chainrule.capture.numbers import note_numbers
from chainrule.execute import engine
from chainrule.execute.accounts import current_ledger, uncollected
from chainrule.execute.cached_plans import CachedPlan
from chainrule.execute.memory import Memory, predict, watching
from chainrule.execute.planning import key_of, planned_dry
from chainrule.execute.replay import Source
from chainrule.execute.sweeps import Seen
from chainrule.maps.staging import reads
from chainrule.plan.algebra import AlgebraRequest, predicted_peak
from chainrule.plan.planner import Request


class Predictions:
    """What plans of one tape need, told before they run.

    Attributes:
        ratio: what the last run under a vmap needed, for what the sizes of one sample had told.
    """

    def __init__(self) -> None:
        self.ratio = 1.0

    def memory(self, tape: Any, request: Request, limit: float = math.inf) -> Memory:
        """The memory of the plan of a request, which is made if it is not known, and run unless it needs more than `limit`.

        A run tells the work space of its calls, too. A plan that cannot be made without running it is run in any case.
        """
        mapped = any([value.__class__ is BatchTensor for value in tape.values])
        told: Memory | None = None
        if current_ledger() is None and (known := _known_plan(tape, request)) is not None:
            known.compile()
            source = known.runner.source_of  # type: ignore[union-attr]
            told = _of_samples(source, tape.values) if mapped else source.memory()
            expected = told.peak * self.ratio
            if expected > limit:
                return Memory(told.results, math.ceil(expected))
        with watching() as watch, uncollected():
            for _ in range(3 if mapped else 2):  # one plans, where that is not done; one finds the form on a vmap's tensors
                engine.execute(tape, request)
        if mapped and told is not None and told.peak:
            self.ratio = watch.peak / told.peak
        return Memory(watch.results, watch.peak)


def _of_samples(source: Source, values: Sequence[Any]) -> Memory:
    """The memory of a plan, which knows the sizes of one sample, on the values of a vmap."""
    program = copy(source.program)
    levels = {slot: _levels(values[key]) for key, slot in program.inputs.items() if isinstance(key, int)}
    for instruction in program.instructions:
        met = {level for slot in reads(instruction) for level in levels.get(slot, ())}
        levels.update((slot, met) for slot in instruction.outputs)
    program.kinds = {
        slot: (torch.Size((*(level.size for level in levels.get(slot, ())), *kind[0])), *kind[1:])
        for slot, kind in program.kinds.items()
    }
    return predict(program, source.kept, source.wanted, source.copied)


def _levels(value: Any) -> set[Any]:
    """The vmaps whose samples a value has."""
    found = set()
    while value.__class__ is BatchTensor:
        if value.batched:
            found.add(value.level)
        value = value.value
    return found


def forget(tape: Any, request: Request) -> None:
    """Forget the plan of a request, and the constants that it keeps."""
    try:
        engine.CACHE.drop(key_of(tape, request, ()))
    except TypeError:  # an unhashable static argument: it was not kept
        return


def _known_plan(tape: Any, request: Request) -> CachedPlan | None:
    """The plan of a Jacobian, made without being run if it is not known; None where that is not possible."""
    key: Any = key_of(tape, request, ())
    try:
        cached: Any = engine.CACHE.get(key)
    except TypeError:  # an unhashable static argument
        return None
    if cached is None or cached.__class__ is Seen:
        note_numbers(tape)
        cached = planned_dry(tape, request, ())
        if cached is not None:
            engine.CACHE.put(key, cached)
    return cached if cached.__class__ is CachedPlan and not cached.staged else None


@dataclass
class KnownPeak:
    """What a plan of a signature holds at once.

    Attributes:
        elements: how many elements.
        used: for the cache.
    """

    elements: int
    used: bool = False


def peak_elements(
    tape: Any, request: AlgebraRequest, seeds: Sequence[torch.Tensor] = (), left_out: frozenset[str] = frozenset()
) -> int:
    """The most elements that the cheapest plan of a request holds at once; predicted once per signature, nothing is run.

    Args:
        tape: the tape.
        request: what is asked.
        seeds: the seed tensors.
        left_out: plans that do not count, by their names.
    """
    key: Any = ("peak", left_out, key_of(tape, request, seeds))
    try:
        known: Any = engine.CACHE.get(key)
    except TypeError:  # an unhashable static argument
        return predicted_peak(tape, request, seeds, left_out)
    if known is None:
        known = KnownPeak(predicted_peak(tape, request, seeds, left_out))
        engine.CACHE.put(key, known)
    return int(known.elements)
