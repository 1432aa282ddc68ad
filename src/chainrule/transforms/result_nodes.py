"""Results of transforms as one node of torch's graph.

Where arguments require grad, a result has to be a part of their graph. Running the function and the plan with torch's autograd on
would build a node for each call, whether somebody asks for a backward or not, and it takes ops apart that are recorded whole
otherwise. Here the transform runs on the same values without a graph, and what comes out is tied to the arguments by a single node.
Its backward is a level of ``vjp`` around the levels so far, on the tape that is there: one cached program, as for every nest. A
backward with ``create_graph`` gives such a node once more, so that all orders are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.autograd import forward_ad

from chainrule.dispatch import functions_are_replaced
from chainrule.execute import engine
from chainrule.execute.accounts import current_ledger
from chainrule.execute.memory import current_watch
from chainrule.transforms.arguments import resolve_argnums, structure_key, tree_flatten, tree_unflatten
from chainrule.transforms.levels import Level, NestPlan, Part, Run, is_apart, mark_of, note_apart
from chainrule.transforms.nest import finish_run, key_and_plan
from chainrule.transforms.trace import Traced, trace

#: Classes of arguments about which nothing has to be asked.
_CLASSES = frozenset({torch.Tensor, torch.nn.Parameter})


def _may_join(func: Callable[..., Any], given: Sequence[Any]) -> bool:
    """Whether a transform can run without graphs, and one node tie its results to the arguments that are differentiated."""
    if not torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    joined = False
    for leaf in given if all([item.__class__ in _CLASSES for item in given]) else tree_flatten(tuple(given))[0]:
        if leaf.__class__ not in _CLASSES or leaf.layout is not torch.strided or not leaf.dtype.is_floating_point:
            return False
        joined = joined or leaf.requires_grad
    return (
        joined and forward_ad._current_level < 0 and current_ledger() is None and current_watch() is None
        and not torch._C._are_functorch_transforms_active() and mark_of(func) is None and not is_apart(func)
        and not functions_are_replaced()
    )  # fmt: skip


def run_joined(level: Level, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a level of a plain function and its aux, tied to arguments with a graph by one node.

    NotImplemented, with nothing done, where it has to go the usual way.
    """
    argnums = level.argnums
    if argnums.__class__ is int and 0 <= argnums < len(args):  # type: ignore[operator]
        only = args[argnums]  # type: ignore[index]
        if only.__class__ is torch.Tensor and not only.requires_grad:
            return NotImplemented
    if argnums is None or not torch.is_grad_enabled():
        return NotImplemented
    positions, single = resolve_argnums(argnums, len(args), level.name)
    if not _may_join(level.func, [args[number] for number in positions]):
        return NotImplemented
    if (traced := _traced(level, args, positions, kwargs)) is None:
        return NotImplemented
    own_spec, aux_leaves, aux_spec = traced.in_spec, [], None
    if level.has_aux:
        aux_leaves, aux_spec = tree_flatten(traced.aux)
    beside = [n for n, leaf in enumerate(aux_leaves) if isinstance(leaf, torch.Tensor) and traced.tape.slots.get(id(leaf)) is not None]
    slots = [traced.tape.slots[id(aux_leaves[n])] for n in beside]

    def finish(here: Traced, _: bool) -> Any:
        count = own_spec.num_leaves
        own = replace(here, in_spec=own_spec, in_leaves=here.in_leaves[:count], in_slots=here.in_slots[:count], columns=[None] * count)
        return level.finish(own, single), [here.tape.values[slot] for slot in slots]

    key = (*level.key, "joined", structure_key(own_spec), single, tuple(slots))
    inner = Level(level.func, level.name, argnums, False, finish, key)
    result, found = _tied(traced, [inner], args, positions, level.finish(traced, single), [aux_leaves[n] for n in beside])
    if level.has_aux:
        for n, leaf in zip(beside, found, strict=True):
            aux_leaves[n] = leaf
        return result, tree_unflatten(aux_leaves, aux_spec)
    return result, None


def _traced(level: Level, args: tuple[Any, ...], positions: tuple[int, ...], kwargs: dict[str, Any]) -> Traced | None:
    """A run of a level's function on arguments without their graphs; None where levels have to be run one by one."""
    bare = [*args]
    for number in positions:
        leaves, spec = tree_flatten(args[number])
        bare[number] = tree_unflatten([leaf.detach() for leaf in leaves], spec)
    traced = trace(level.func, tuple(bare), positions, kwargs, level.name, has_aux=level.has_aux, single=True)
    tape = traced.tape
    if tape.hooks or tape.saw_cut:
        note_apart([level])
        return None
    return traced


def _tied(
    traced: Traced, levels: list[Level], args: tuple[Any, ...], positions: tuple[int, ...], *results: Any
) -> Any:
    """Results that are computed by levels of a run, tied to the arguments of it."""
    leaves, spec = tree_flatten(results)
    inputs = tree_flatten(tuple([args[number] for number in positions]))[0]
    joined = tuple([number for number, leaf in enumerate(inputs) if leaf.requires_grad])
    traced = replace(traced, in_leaves=[traced.tape.values[slot] for slot in traced.in_slots])
    computation = Computation(traced, levels, joined)
    return tree_unflatten(_node(computation, leaves, [inputs[number] for number in joined]), spec)


@dataclass(slots=True)
class Computation:
    """Levels on a run whose values have no graph, as a function of the inputs of its tape.

    Attributes:
        traced: the run; its inputs are the arguments, and the cotangents that levels of it were given.
        levels: the levels, innermost first; each one after the first pulls cotangents of the results of the one before back.
        joined: which of the inputs have a graph.
        versions: those of the values on the tape when they were computed.
    """

    traced: Traced
    levels: list[Level]
    joined: tuple[int, ...]
    versions: list[int | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.versions = [_version(value) for value in self.traced.tape.values]

    def pulled(self, cotangents: Sequence[torch.Tensor | None]) -> tuple[Computation | None, dict[int, torch.Tensor]]:
        """The cotangents of those inputs that have a graph, as far as the results depend on them.

        The first of the two is what computes them, as a function of the inputs and the cotangents, where gradients are on.
        """
        tape = self.traced.tape.fork()
        mask = tuple([number for number, cotangent in enumerate(cotangents) if cotangent is not None])
        in_slots = [*self.traced.in_slots]
        level = _pull(self.levels[0].func, self.joined, mask, len(in_slots))
        for number in mask:
            in_slots.append(tape.add_input(cotangents[number].detach()))  # type: ignore[union-attr]
        in_leaves = [tape.values[slot] for slot in in_slots]
        traced = replace(
            self.traced, tape=tape, in_slots=in_slots, in_leaves=in_leaves, in_spec=tree_flatten(tuple(in_leaves))[1],
            grad_enabled=torch.is_grad_enabled(), columns=[None] * len(in_slots),
        )  # fmt: skip
        levels, values = [*self.levels, level], [*tape.values]
        outer = None
        if traced.grad_enabled:  # what the levels record is not to stand on its tape
            outer = Computation(replace(traced, tape=tape.fork()), levels, (*self.joined, *range(len(self.traced.in_slots), len(in_slots))))
        wanted = [(tuple(range(len(in_slots))), False)] * len(levels)
        key, cached = key_and_plan(levels, wanted, traced)
        tape.settle()
        found = finish_run(Run([Part(levels, wanted, traced)], tape.values, key, cached))
        self._refuse_written(values, key)
        known = {id(value) for value in values}
        return outer, {number: leaf.clone() if id(leaf) in known else leaf for number, leaf in found.items()}

    def _refuse_written(self, values: Sequence[Any], key: Any) -> None:
        """Refuse derivatives at values that were written to since they were computed.

        Raises:
            RuntimeError: if there are such values among those that were read.
        """
        plan: Any = None if key is None else engine.CACHE.plans.get(key)
        if plan.__class__ is NestPlan and plan.needs:
            read = [slot for slot in plan.needs if slot.__class__ is int]
        else:
            read = [slot for slot, active in enumerate(self.traced.tape.active) if active]
        for slot in read:
            if slot < len(self.versions) and self.versions[slot] != _version(values[slot]):
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor "
                    f"of shape {tuple(values[slot].shape)} that a chainrule transform has read, computed or returned"
                )


def _version(value: Any) -> int | None:
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else None


def _pull(func: Callable[..., Any], joined: tuple[int, ...], mask: tuple[int, ...], count: int) -> Level:
    """The level that pulls cotangents of some results back to the inputs that have a graph.

    Args:
        func: the innermost function.
        joined: those inputs.
        mask: the results.
        count: how many inputs there are, after which the cotangents come.
    """

    def finish(traced: Traced, _: bool) -> dict[int, torch.Tensor]:
        seeds: dict[int, torch.Tensor] = {}
        constant = False
        for place, number in enumerate(mask):
            slot = traced.out_slots[number]
            if slot is None:
                constant = True
                continue
            seed = traced.tape.values[traced.in_slots[count + place]]
            seeds[slot] = seeds[slot] + seed if slot in seeds else seed
        inputs = [traced.in_slots[number] for number in joined]
        found: dict[Any, Any] = {}
        if seeds:
            found = traced.run("pull", seeds=(*seeds,), tensors=(*seeds.values(),), outputs=[*seeds], inputs=inputs)
        pulled = {}
        for number, slot in zip(joined, inputs, strict=True):
            if (leaf := found.get(slot)) is not None:
                pulled[number] = leaf
            elif constant:  # a derivative that no value goes into has a graph of zeros, as with torch's formulas
                pulled[number] = torch.zeros_like(traced.tape.values[slot])
        return pulled

    return Level(func, "vjp", None, False, finish, ("vjp", "joined", joined, mask, count))


class _Node(torch.autograd.Function):
    """Results that are there already, as a function of inputs."""

    @staticmethod
    def forward(ctx: Any, computation: Computation, results: list[torch.Tensor], *tensors: torch.Tensor) -> Any:
        """The tensors are inputs with a graph, and those results that have one of their own."""
        ctx.computation = computation
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[: len(computation.joined)])
        ctx.own = [number for number, leaf in enumerate(results) if leaf.requires_grad]
        if not ctx.own:
            return tuple(results)
        with torch._C._AutoDispatchBelowADInplaceOrView():  # no views for autograd, which would refuse writes to them
            return tuple([torch.ops.aten.alias.default(leaf) if leaf.requires_grad else leaf for leaf in results])

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        inputs, computation = ctx.saved_tensors, ctx.computation
        outer, found = computation.pulled(cotangents)
        if outer is not None:
            given = [*inputs, *[cotangent for cotangent in cotangents if cotangent is not None]]
            numbers = [*found]
            outer.joined = tuple([number for number, leaf in zip(outer.joined, given, strict=True) if leaf.requires_grad])
            leaves = _node(outer, list(found.values()), [leaf for leaf in given if leaf.requires_grad])
            found = dict(zip(numbers, leaves, strict=True))
        return None, None, *[found.get(number) for number in computation.joined], *[cotangents[number] for number in ctx.own]


#: As torch has it, without a look at the modes that are on.
_apply = super(torch.autograd.Function, _Node).apply


def _node(computation: Computation, results: list[torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Results as functions of inputs."""
    floating = [number for number, leaf in enumerate(results) if leaf.is_floating_point() or leaf.is_complex()]
    if not floating or not inputs:
        return results
    known = computation.traced.tape.slots
    given = []
    for leaf in results:
        # The tape holds its values as they are, without a graph; of views torch would refuse writes.
        given.append(leaf.clone() if id(leaf) in known or leaf._is_view() else leaf)
    tied = _apply(computation, [given[n] for n in floating], *inputs, *[given[n] for n in floating if given[n].requires_grad])
    for number, leaf in zip(floating, tied, strict=True):
        given[number] = leaf
    return given
