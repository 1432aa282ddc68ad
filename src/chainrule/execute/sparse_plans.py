"""Plans of sparse requests: what is kept of one per value of the index tensors, and which of them serves a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from chainrule.batching.tensor import BatchTensor
from chainrule.capture.recorder import Recorder
from chainrule.capture.whole_recorder import WholeRecorder, unrecorded, whole_recorder
from chainrule.dispatch import functions_are_replaced
from chainrule.execute.cached_plans import CachedPlan
from chainrule.execute.collection import postponed_collection
from chainrule.execute.open_plans import OpenPlan
from chainrule.execute.replay import Runner, Spent
from chainrule.maps.fixed_values import is_mostly_zero
from chainrule.maps.staging import Ref
from chainrule.maps.unmapped import plain, unbatched
from chainrule.modes_off import unseen
from chainrule.plan.patterns import Pattern

#: So many patterns are kept per signature.
_PATTERNS = 8

#: For so many other blocks it is known where a block meets them.
_MEETINGS = 4

#: From so many calls on with other indices than those of all plans, planning itself is recorded; after so many further ones
#: in which it took another course it is not. Of larger patterns it is not either: a record holds all that is made on the way.
_OTHERS, _FAILED, _LARGEST = 2, 3, 1 << 20

#: Weights of a sum that tells indices from others: the fractions of multiples of this.
_WEIGHT = 0.7548776662466927

#: So many times masks may be others than those of a plan; then they are values, as if they depended on the inputs.
_MASKS = 2


@contextmanager
def planning(tape: Any) -> Iterator[None]:
    """While a plan is made no other transform sees its calls, where that is possible; its results are those of a later run."""
    plainly = all(not isinstance(value, torch.Tensor) or value.__class__ is not BatchTensor for value in tape.values)
    with torch.no_grad(), postponed_collection(), unseen() if plainly else unrecorded():
        yield


@dataclass
class Layouts:
    """A pattern in the forms in which results hold it, made on request.

    Attributes:
        pattern: the pattern.

    Raises:
        RuntimeError: if the pattern differs between the samples of a vmap.
    """

    pattern: Pattern
    _coo: torch.Tensor | None = None
    _csr: tuple[torch.Tensor, torch.Tensor] | None = None
    _diagonal: tuple[torch.Tensor, torch.Tensor] | None = None
    _meetings: list[tuple[Layouts, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Take the pattern out of the vmap that it was found under: it outlives that, and is read by torch's kernels."""
        self.pattern = self.pattern._replace(keys=plain(self.pattern.keys))

    @property
    def coo(self) -> torch.Tensor:
        """The indices over all dimensions of output and input: ``(dimensions, entries)``."""
        if self._coo is None:
            pattern = self.pattern
            shape = (*pattern.out_shape, *pattern.in_shape)
            with unseen():  # a record of the call finds it as it is from the second call on: made
                indices = pattern.keys.new_empty((len(shape), pattern.keys.numel()))
                rest = pattern.keys
                for number in reversed(range(len(shape))):
                    torch.remainder(rest, max(shape[number], 1), out=indices[number])
                    rest = torch.div(rest, max(shape[number], 1), rounding_mode="floor")
            self._coo = indices
        return self._coo

    @property
    def csr(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the rows of the flattened block begin, and the columns."""
        if self._csr is None:
            keys, columns = self.pattern.keys, max(self.pattern.columns, 1)
            with unseen():
                starts = torch.arange(self.pattern.rows + 1, device=keys.device) * columns
                self._csr = torch.searchsorted(keys, starts), torch.remainder(keys, columns)
        return self._csr

    @property
    def diagonal(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Which entries stand on the diagonal, and their rows."""
        if self._diagonal is None:
            with unseen():
                rows, columns = self.pattern.places()
                chosen = torch.nonzero(rows == columns).squeeze(1)
                self._diagonal = chosen, rows.index_select(0, chosen)
        return self._diagonal

    def meets(self, right: Layouts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the diagonal of the product with another block is made of: entries of this one, their partners, and the rows."""
        for other, known in self._meetings:
            if other is right:
                return known
        with unseen():
            rows, _ = self.pattern.places()
            middle, columns = right.pattern.places()
            turned = columns * right.pattern.rows + middle
            order = torch.argsort(turned)
            turned = turned.index_select(0, order)
            places = torch.searchsorted(turned, self.pattern.keys).clamp(max=max(turned.numel() - 1, 0))
            chosen = torch.nonzero(turned.index_select(0, places) == self.pattern.keys).squeeze(1)
            found = chosen, order.index_select(0, places.index_select(0, chosen)), rows.index_select(0, chosen)
        self._meetings = [(right, found), *self._meetings[: _MEETINGS - 1]]
        return found


Found = dict[Any, tuple[torch.Tensor, Layouts]]


@dataclass
class Guard:
    """What a plan was made for.

    Attributes:
        exact: tape slots of index tensors or masks, and the values that the plan is for.
        computed: computes what is made from other tensors; None if there is nothing.
        expected: what it gave.
        steps: its calls, by which those that compute the same are known.
    """

    exact: list[tuple[int, torch.Tensor]]
    computed: Runner | None
    expected: list[torch.Tensor]
    steps: tuple[Any, ...] = ()

    @property
    def reads(self) -> bool:
        """Whether values are looked at at all."""
        return bool(self.exact) or self.computed is not None

    def fits(self, tape: Any) -> bool:
        """Whether the plan is for what stands on this tape."""
        recorder = whole_recorder()
        for slot, known in self.exact:
            if not _has(tape.values[slot], known, recorder):
                return False
        if self.computed is not None:
            found = self.computed(tape.values, ())
            return all(_has(one, two, recorder) for one, two in zip(found, self.expected, strict=True))
        return True


Choices = list[tuple[tuple[Any, ...], Sequence[torch.Tensor]]]


def _has_chosen(tape: Any, guard: Guard, known: Choices) -> bool:
    """Whether ops choose what they chose when a plan was made; derivatives see nothing of it.

    What they choose in this run is computed once for all plans that compute it by the same calls: `known` holds it.
    """
    if guard.computed is None:
        return True
    with planning(tape):
        found = next((values for steps, values in known if steps == guard.steps), None)
        if found is None:
            found = guard.computed(tape.values, ())
            known.append((guard.steps, found))
        return all(torch.equal(one, two) for one, two in zip(found, guard.expected, strict=True))


def steps_of(runner: Runner) -> tuple[Any, ...]:
    """The calls of a program, its values numbered in the order in which they are made: equal ones compute the same."""
    source = runner.source_of  # type: ignore[attr-defined]
    names: dict[int, Any] = {slot: ("input", key) for key, slot in source.program.inputs.items()}
    names.update((slot, ("constant", _Same(tensor))) for slot, tensor in source.constants.items())

    def named(tree: Any) -> Any:
        if isinstance(tree, Ref):
            return names[tree.slot]
        return type(tree)(map(named, tree)) if type(tree) in (list, tuple) else (type(tree), tree)

    calls = []
    for call in source.kept:
        calls.append((call.function, named(call.args), [(key, named(value)) for key, value in call.kwargs.items()]))
        names.update((slot, ("value", len(calls), number)) for number, slot in enumerate(call.outputs))
    return tuple(calls), tuple(None if slot is None else names[slot] for slot in source.wanted)


class _Same:
    """A constant that equals another one if its values do."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same) or self.tensor.dtype != other.tensor.dtype or self.tensor.device != other.tensor.device:
            return False
        return torch.equal(self.tensor, other.tensor)

    __hash__ = None  # type: ignore[assignment]


def may_choose(tape: Any) -> bool:
    """Whether choices by value may be looked at: they are those of one run, and the same for all samples of a vmap."""
    if not torch._C._len_torch_dispatch_stack():
        return True
    return not _recorded() and all(value.__class__ is not BatchTensor for value in tape.values)


def _mark(selected: torch.Tensor) -> float:
    """A number that is the same for equal tensors, and hardly ever for others."""
    numbers = torch.arange(1, selected.numel() + 1, dtype=torch.float64, device=selected.device)
    return float(torch.dot(selected.reshape(-1).to(torch.float64), numbers.mul_(_WEIGHT).frac_()))


def _may_open(tape: Any) -> bool:
    """Whether planning may be recorded, and replayed on these values: nothing is around."""
    if torch._C._len_torch_dispatch_stack() or functions_are_replaced() or forward_ad._current_level >= 0:
        return False
    return all(value.__class__ in (torch.Tensor, torch.nn.Parameter) for value in tape.values)


def _recorded() -> bool:
    """Whether the run is recorded to be replayed with other values: then none may be looked at that is not an index."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(isinstance(mode, Recorder) for mode in _get_current_dispatch_mode_stack())


def _has(value: torch.Tensor, known: torch.Tensor, recorder: WholeRecorder | None) -> bool:
    """Whether a tensor has known values; a record of the whole call is right only while it has them."""
    found = unbatched(value)
    if found is None or (known.dtype.is_floating_point and (value.requires_grad or torch._C._len_torch_dispatch_stack())):
        return False
    if recorder is None:
        return torch.equal(found, known)
    with unseen():
        if not torch.equal(found, known):
            return False
    recorder.expect(found, known)
    return True


@dataclass
class SparsePlan:
    """A plan for one value of the index tensors.

    Attributes:
        relations: the index tensors.
        masks: the masks whose zeros are left out.
        choices: what ops chose by value, where only that is in the pattern.
        values: computes the values of the entries.
        layouts: per block, where they stand.
        masked: whether zeros of masks would have been left out, had there been some.
        chosen: the same of what ops do not choose.
        way: how it accumulates.
        full: tape slots of masks and constants without zeros to leave out: where they have some, there is a better plan.
    """

    relations: Guard
    masks: Guard
    choices: Guard
    values: CachedPlan
    layouts: dict[tuple[int, int], Layouts]
    masked: bool = True
    chosen: bool = True
    way: str = ""
    full: tuple[int, ...] = ()

    @property
    def is_general(self) -> bool:
        """Whether it serves every run of its signature, whatever the values.

        One without masks is found where these were others in several runs, and serves all from then on; what is made for a
        record holds more zeros than plain calls have.
        """
        if not self.chosen or (not self.masked and _recorded()):
            return False
        return not (self.relations.reads or self.masks.reads or self.choices.reads or self.full)

    def is_wasteful(self, tape: Any) -> bool:
        """Whether it has entries for zeros of this run, which another plan would leave out."""
        if not self.full or _recorded():
            return False
        values = [unbatched(tape.values[slot]) for slot in self.full]
        with planning(tape):
            return any(is_mostly_zero(value) for value in values if value is not None)

    def run(self, tape: Any, seeds: Sequence[torch.Tensor] = (), *, last: bool = False) -> Found:
        """The values of a run; the `last` thing asked of a tape lets its values go as the plan has read them."""
        given = tape.values
        if last:
            given, tape.values = Spent(given), []
            tape.forget()
        values = self.values.run(given, seeds)
        return {block: (values[block], layout) for block, layout in self.layouts.items()}  # type: ignore[misc]


@dataclass
class Computed:
    """What a run gave that needed no plan of its own."""

    found: Found

    def run(self, tape: Any, seeds: Sequence[torch.Tensor] = (), *, last: bool = False) -> Found:
        """The values of the run."""
        return self.found


@dataclass
class SparsePlans:
    """The plans of one signature, the last used first.

    Attributes:
        plans: the plans.
        by_levels: for a Hessian, whether gradient and Hessian cannot be one program.
        other_masks: how often a plan was missing only because of its masks.
        others: how often a plan was missing because of its indices, or of what ops chose.
        opened: a plan for any of these, with whether it leaves out the zeros of masks.
        failed: how often such a plan was not to be had, or was for another course.
        marks: numbers that tell what the last runs of it selected: where that comes again, it gets a plan of its own.
        latest: what ops chose in the run that no plan was found for.
        used: for the cache.
    """

    plans: list[SparsePlan] = field(default_factory=list)
    by_levels: bool = False
    other_masks: int = 0
    others: int = 0
    opened: tuple[OpenPlan, bool] | None = None
    failed: int = 0
    marks: list[float] = field(default_factory=list)
    latest: Choices = field(default_factory=list)
    used: bool = False

    def find(self, tape: Any) -> SparsePlan | None:
        """The plan for the index tensors of a run."""
        others, recorded = False, _recorded()
        known: Choices = []
        masked, chosen = self.other_masks < _MASKS and not recorded, may_choose(tape)
        for number, plan in enumerate(self.plans):
            # What was planned for a record holds more zeros than plain calls have.
            if (masked and not plan.masked) or chosen != plan.chosen or not plan.relations.fits(tape):
                continue
            if (recorded and plan.masks.reads) or not _has_chosen(tape, plan.choices, known):
                continue
            if plan.masks.fits(tape):
                if plan.is_wasteful(tape):
                    continue
                if number:
                    self.plans.insert(0, self.plans.pop(number))
                return plan
            others = True
        self.latest = known
        self.other_masks += others
        self.others = 0 if others else self.others + bool(self.plans)
        return None

    def open(self, tape: Any, record: Callable[[str, bool, bool], OpenPlan | None]) -> Found | None:
        """What a plan for any indices gives for a run that no plan is for; None where there is none.

        Args:
            tape: the tape.
            record: makes one, given an order, whether zeros of masks are left out, and whether lists may be of other lengths.
        """
        if self.others < _OTHERS or self.failed > _FAILED or not _may_open(tape) or self._comes_again(tape):
            return None
        plan, masked = self.opened or (None, False)
        if plan is None or masked != self.masked:
            way = self.plans[0].way
            count = max((layout.pattern.keys.numel() for layout in self.plans[0].layouts.values()), default=0)
            plan = None
            if way.startswith(("forward", "reverse")) and count <= _LARGEST:
                plan = record("forward" if way.startswith("forward") else "reverse", self.masked, self.failed > 0)
            self.opened = None if plan is None else (plan, self.masked)
        found = None if plan is None else plan.run(tape.values)
        if found is None:
            self.failed += 1 if self.opened else _FAILED + 1
            self.opened = None
            return None
        self.failed = min(self.failed, 1)
        return {key: (values, Layouts(pattern)) for key, (values, pattern) in found.items()}

    def _comes_again(self, tape: Any) -> bool:
        """Whether a run selects what one of the last runs did that had no plan of their own."""
        guards = self.plans[0].relations, self.plans[0].choices
        latest, self.latest = self.latest, []
        with planning(tape):
            selected = [tape.values[slot] for guard in guards for slot, _ in guard.exact]
            for guard in guards:
                if guard.computed is not None:
                    found = next((values for steps, values in latest if steps == guard.steps), None)
                    selected += guard.computed(tape.values, ()) if found is None else found
            mark = sum(map(_mark, selected))
        known = mark in self.marks
        self.marks = [mark, *(other for other in self.marks if other != mark)][:_PATTERNS]
        return known

    @property
    def masked(self) -> bool:
        """Whether the zeros of masks are left out of the next plan: not where these were others in several runs."""
        return self.other_masks < _MASKS and not _recorded()

    def add(self, plan: SparsePlan) -> None:
        """Keep a plan, unless a user's function mode may have changed its calls."""
        if functions_are_replaced():
            return
        self.plans.insert(0, plan)
        del self.plans[_PATTERNS:]


__all__ = ["Computed", "Found", "Guard", "Layouts", "SparsePlan", "SparsePlans", "may_choose", "planning", "steps_of"]
