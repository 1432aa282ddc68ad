"""What a nest is made of: the levels that transforms leave on the functions they return, and the plans of whole nests."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch.utils._pytree import TreeSpec

from chainrule.batching.mode import VmapMode
from chainrule.capture.tape import Tape
from chainrule.execute.cached_plans import COMPILING, CachedPlan
from chainrule.execute.collection import postponed_collection
from chainrule.execute.replay import compile_stages
from chainrule.transforms.arguments import LEAF, Argnums, is_tuple
from chainrule.transforms.trace import Traced
from chainrule.transforms.vmap import Mapping

Finish = Callable[[Traced, bool], Any]


@dataclass(slots=True)
class Level:
    """One derivative transform of a function.

    Attributes:
        func: the function.
        name: the transform's name, for messages.
        argnums: what is differentiated; None for all positional arguments.
        has_aux: whether the function returns ``(output, aux)``.
        finish: computes the transform's result (without aux) from a run; the flag is whether ``argnums`` is one.
        key: what the result depends on beside the run.
        owner: the function that carries this level.
        apart: whether the result of a run cannot be written down as a program that is replayed with other index tensors.
        respect_no_grad: whether steps under ``torch.no_grad()`` are constants, as for reverse mode (forward mode sees them).
        by_itself: whether a vmap of this level runs it alone, as an earlier call has shown that it must.
        chain: what stands inside of this level where it is part of a nest, once that was asked for (not the level itself: no
            cycle holds a user's function).
        route: the level's :class:`~chainrule.transforms.routes.Route`, once that was asked for; False where it has none.
    """

    func: Callable[..., Any]
    name: str
    argnums: Argnums | None
    has_aux: bool
    finish: Finish
    key: tuple[Any, ...]
    owner: Callable[[], Any] | None = None
    respect_no_grad: bool = True
    apart: Callable[[Traced], bool] | None = None
    by_itself: bool = False
    chain: Chain | None = None
    route: Any = None

    def mark(self, wrapper: Callable[..., Any]) -> None:
        """Put this level on the function that the transform returns."""
        self.owner = weakref.ref(wrapper)
        wrapper._chainrule_level = self  # type: ignore[attr-defined]


@dataclass(slots=True)
class Part:
    """The levels of a nest that have one tape, and what they have in common.

    Attributes:
        levels: the levels, innermost first.
        wanted: for each of them, the positions of what it differentiates, and whether that is one.
        traced: the run, as the innermost of these levels sees it.
        around: the mappings that lead from the part outside of this one to it, outermost first.
    """

    levels: Sequence[Level]
    wanted: Sequence[tuple[tuple[int, ...], bool]]
    traced: Traced
    around: Sequence[tuple[Mapping, VmapMode]] = ()


@dataclass(slots=True)
class Run:
    """One run of the innermost function of a nest, and the nest's cached plan.

    Attributes:
        parts: the parts of the nest, innermost first.
        values: all stored values of their tapes, those of the outermost first: what the plan reads.
        key: the key of the plan; None where there is none.
        cached: the plan for it.
    """

    parts: list[Part]
    values: list[Any]
    key: Any
    cached: Any

    @property
    def traced(self) -> Traced:
        """The run as it looks from outside."""
        return self.parts[-1].traced


#: The transforms whose levels are derivatives in reverse mode.
_REVERSE = frozenset({"grad", "grad_and_value", "vjp"})


def agree(levels: Sequence[Level], tape: Tape) -> bool:
    """Whether some levels take the same steps of a run for constants.

    Those under ``torch.no_grad()`` are constants for all levels of reverse mode, and forward mode sees them.
    """
    if not tape.saw_blocked:
        return True
    if tape.saw_cut:
        return False
    return all([level.key[0] in _REVERSE or (level.key[0] == "jacobian" and level.respect_no_grad) for level in levels])


#: Functions with a run that showed that their levels have to be run one by one: later nests do not try again.
_APART: weakref.WeakSet[Any] = weakref.WeakSet()


def note_apart(levels: Sequence[Level]) -> None:
    """Have the levels of a function, the innermost of which is given first, run one by one from now on."""
    for level in levels:
        level.route = None
    func = levels[0].func
    func = getattr(func, "__func__", func)  # a bound method is made anew each time
    if func.__class__ in _WITH_IDENTITY or isinstance(func, torch.nn.Module):
        _APART.add(func)


def is_apart(func: Any) -> bool:
    """Whether the levels of a function have to be run one by one."""
    if not _APART:
        return False
    func = getattr(func, "__func__", func)
    return (func.__class__ in _WITH_IDENTITY or isinstance(func, torch.nn.Module)) and func in _APART


#: Classes of functions that are compared by identity.
_WITH_IDENTITY = frozenset({FunctionType, partial})


def mark_of(func: Any) -> Level | Mapping | None:
    """What a transform left on a function. A decorator that copies attributes does not make its function carry a mark."""
    mark = getattr(func, "_chainrule_level", None)
    if mark is None or mark.owner is None or mark.owner() is not func:
        return None
    found: Level | Mapping = mark
    return found


def level_of(func: Any) -> Level | None:
    """The level that a function carries."""
    mark = mark_of(func)
    return mark if isinstance(mark, Level) else None


def mapping_of(func: Any) -> Mapping | None:
    """What ``vmap`` left on a function."""
    mark = mark_of(func)
    return mark if isinstance(mark, Mapping) else None


@dataclass(slots=True)
class Chain:
    """What a nest is made of, innermost first.

    Attributes:
        levels: the levels up to the first ``vmap``, those up to the next one, and so on.
        mappings: between two of these groups, the mappings from the outer to the inner one.
        has_aux: whether all functions return ``(output, aux)`` or none does; None where they differ.
    """

    levels: list[list[Level]]
    mappings: list[list[Mapping]]
    has_aux: bool | None


def chain_of(outer: Level) -> Chain | None:
    """The nest whose outermost level is given; None where it is no nest, or none that can run as a whole."""
    found = _chain_of(outer)
    return None if found is None or is_apart(found.levels[0][0].func) else found


def _chain_of(outer: Level) -> Chain | None:
    inner = level_of(outer.func)
    if inner is None:
        found = _whole_chain(outer)
        return found if len(found.levels) > 1 and found.has_aux is False else None
    if inner.chain is None and mark_of(inner.func) is None:  # two levels of a plain function
        return Chain([[inner, outer]], [], outer.has_aux) if inner.has_aux == outer.has_aux else None
    if (known := inner.chain) is None:  # what a function is made of stays as it is
        whole = _whole_chain(inner)
        known = inner.chain = Chain([*whole.levels[:-1], whole.levels[-1][:-1]], whole.mappings, whole.has_aux)
    if known.has_aux is not outer.has_aux or (len(known.levels) > 1 and outer.has_aux):
        return None
    return Chain([*known.levels[:-1], [*known.levels[-1], inner, outer]], known.mappings, outer.has_aux)


def _whole_chain(outer: Level) -> Chain:
    """All levels and mappings from one to the plain function."""
    chain, func = Chain([[outer]], [], outer.has_aux), outer.func
    while True:
        while (level := level_of(func)) is not None:
            chain.levels[0].insert(0, level)
            func = level.func
        passed = []
        while (mapping := mapping_of(func)) is not None:
            passed.append(mapping)
            func = mapping.func
        if level_of(func) is None:
            break  # a mapping of a plain function runs as it is
        chain.levels.insert(0, [])
        chain.mappings.insert(0, passed)
    if any([level.has_aux != outer.has_aux for levels in chain.levels for level in levels]):
        chain.has_aux = None
    return chain


@dataclass
class NestPlan(CachedPlan):
    """The program of a whole nest, and how its results are put together."""

    spec: Any = None
    sources: list[int | None] = field(default_factory=list)

    def structure(self) -> Any:
        """As for every plan; a result may be a value of the run."""
        if any([source is not None for source in self.sources]):
            return NotImplemented
        return None if self.spec is LEAF else is_tuple(self.spec) or self.spec


@dataclass(slots=True)
class Linearized:
    """The output of a function and the linear function that goes with it (its pullback or its pushforward).

    Attributes:
        leaves: the output's leaves.
        spec: their structure.
        active: which of them depend on the inputs.
        call: the linear function, from seeds to a tree.
        traced: the run.
        output: the output as the user gets it.
    """

    leaves: list[torch.Tensor]
    spec: TreeSpec
    active: list[int]
    call: Callable[[tuple[torch.Tensor, ...]], Any]
    traced: Traced
    output: Any


@dataclass
class LinearPlan(NestPlan):
    """The program of a nest under ``vjp`` or ``linearize``: the output first, then what depends on the seeds.

    Attributes:
        first: how many of the results belong to the output.
        active: which of the output's leaves depend on the inputs.
        out_spec: the output's structure.
        kept: the slots of those values of a run that the plan reads.
    """

    first: int = 0
    active: list[int] = field(default_factory=list)
    out_spec: Any = None
    kept: frozenset[int] = frozenset()

    def compile(self) -> None:
        """Make the two functions that replay the plan."""
        with COMPILING, postponed_collection():
            if self.recorded is not None:
                self.stages = compile_stages(*self.recorded, first=self.first)
                self.recorded = None
                if self.stages is not None:
                    source = self.stages.source
                    read = [key for key, slot in source.program.inputs.items() if slot in source.used and key.__class__ is int]
                    self.kept = frozenset(read) | frozenset([place for place in self.sources if place is not None])
                    self.quick = (self.stages,)
