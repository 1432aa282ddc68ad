"""What plans need at once, told before they run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from chainrule.batching.tensor import BatchTensor
from chainrule.capture.numbers import note_numbers
from chainrule.execute import engine
from chainrule.execute.accounts import current_ledger, uncollected
from chainrule.execute.cached_plans import CachedPlan
from chainrule.execute.memory import Memory, watching
from chainrule.execute.planning import key_of, planned_dry
from chainrule.execute.sweeps import Seen
from chainrule.plan.algebra import AlgebraRequest, predicted_peak
from chainrule.plan.planner import Request


def predicted(tape: Any, request: Request, limit: float = math.inf) -> Memory:
    """The memory of the plan of a request, which is made if it is not known, and run unless it needs more than `limit`.

    A run tells the work space of its calls, too. A plan that cannot be made without running it is run in any case.
    """
    mapped = any([value.__class__ is BatchTensor for value in tape.values])  # a plan knows the sizes of one sample
    if not mapped and current_ledger() is None and (known := _known_plan(tape, request)) is not None:
        known.compile()
        source = known.runner.source_of  # type: ignore[union-attr]
        memory: Memory = source.memory()
        if memory.peak > limit:
            return memory
    with watching() as watch, uncollected():
        for _ in range(3 if mapped else 2):  # the first time plans, the second under a vmap finds the form on stored tensors
            engine.execute(tape, request)
    return Memory(watch.results, watch.peak)


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


def peak_elements(tape: Any, request: AlgebraRequest, seeds: Sequence[torch.Tensor] = (), *, apart: bool = True) -> int:
    """The most elements that the cheapest plan of a request holds at once; predicted once per signature, nothing is run.

    Args:
        tape: the tape.
        request: what is asked.
        seeds: the seed tensors.
        apart: whether plans that read sums term by term count.
    """
    key: Any = ("peak", apart, key_of(tape, request, seeds))
    try:
        known: Any = engine.CACHE.get(key)
    except TypeError:  # an unhashable static argument
        return predicted_peak(tape, request, seeds, apart=apart)
    if known is None:
        known = KnownPeak(predicted_peak(tape, request, seeds, apart=apart))
        engine.CACHE.put(key, known)
    return int(known.elements)
