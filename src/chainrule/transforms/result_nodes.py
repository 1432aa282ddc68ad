"""Results of transforms as one node of torch's graph.

Where arguments require grad, a result has to be a part of their graph. Running the function and the plan with torch's autograd
on would build a node for each call, whether somebody asks for a backward or not, and it takes ops apart that are recorded whole
otherwise. Here the transform runs on the same values without a graph, and what comes out is tied to the arguments by a single
node. Its backward is a level of ``vjp`` around the levels so far, on the tape that is there: one cached program, as for every
nest. A backward with ``create_graph`` gives such a node once more, so that all orders are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._pytree import TreeSpec

from chainrule.capture.tape import GraphNeededError
from chainrule.dispatch import functions_are_replaced
from chainrule.execute import engine
from chainrule.execute.accounts import current_ledger
from chainrule.execute.memory import current_watch
from chainrule.transforms.arguments import PLAIN_ARGUMENT, resolve_argnums, tree_flatten, tree_unflatten
from chainrule.transforms.graphs import with_graph
from chainrule.transforms.levels import Level, NestPlan, Part, Run, is_apart, mark_of, note_apart
from chainrule.transforms.nest import finish_run
from chainrule.transforms.nest_runs import key_and_plan
from chainrule.transforms.trace import Traced, trace

#: What hooks are on that see to what graphs keep (checkpointing): they want to have each tensor of these.
_saved_hooks = torch._C._autograd._top_saved_tensors_default_hooks

#: Classes of arguments about which nothing has to be asked.
_CLASSES = frozenset({torch.Tensor, torch.nn.Parameter})


def _may_join(func: Callable[..., Any], given: Sequence[Any]) -> bool:
    """Whether a transform can run without graphs, and one node tie its results to the tensors that are differentiated."""
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() or _saved_hooks(True) is not None:
        return False
    joined = False
    for leaf in given:
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
    leaves, spec = tree_flatten(tuple([args[number] for number in positions]))
    if not _may_join(level.func, leaves) or (traced := _traced(level, args, positions, kwargs, leaves, spec)) is None:
        return NotImplemented
    slots: list[int] = []
    if level.has_aux:
        aux_leaves, aux_spec = tree_flatten(traced.aux)
        known = [traced.tape.slots.get(id(leaf)) if isinstance(leaf, torch.Tensor) else None for leaf in aux_leaves]
        slots = [slot for slot in known if slot is not None]

    def finish(here: Traced, _: bool) -> Any:
        in_leaves, in_slots = here.in_leaves[: spec.num_leaves], here.in_slots[: spec.num_leaves]
        own = replace(here, in_spec=spec, in_leaves=in_leaves, in_slots=in_slots, columns=[None] * len(in_slots))
        return level.finish(own, single), [here.tape.values[slot] for slot in slots]

    # The structure of the arguments does not matter here: of the result only the leaves go on.
    inner = Level(level.func, level.name, argnums, False, finish, (*level.key, "joined", tuple(slots)))
    constants = _take_graphs(traced)
    result, result_spec = tree_flatten(level.finish(traced, single))
    _, found = _tied(traced, inner, leaves, constants, [*result, *[traced.tape.values[slot] for slot in slots]])
    result = tree_unflatten(found[: len(result)], result_spec)
    if not level.has_aux:
        return result, None
    tied = iter(found[result_spec.num_leaves :])
    aux_leaves = [leaf if slot is None else next(tied) for leaf, slot in zip(aux_leaves, known, strict=True)]
    return result, tree_unflatten(aux_leaves, aux_spec)


@dataclass(slots=True)
class JoinedRun:
    """A run on arguments without their graphs, whose outputs are tied to these.

    Attributes:
        traced: the run.
        output: the outputs, in their structure.
        aux: likewise.
        inputs: what they are tied to, and all other arguments.
        computation: the outputs that depend on the arguments, as their function.
    """

    traced: Traced
    output: Any
    aux: Any
    inputs: list[torch.Tensor]
    computation: Computation

    def tie(self, pulled: Any, cotangents: Sequence[torch.Tensor]) -> Any:
        """What was pulled back from all outputs that depend on the arguments, tied to arguments and cotangents."""
        if not torch.is_grad_enabled():
            return pulled
        if not cotangents:  # nothing depends on the arguments
            return with_graph(pulled, tuple(self.inputs))
        leaves, spec = tree_flatten(pulled)
        outer = self.computation.seeded(cotangents, tuple(range(len(leaves))), filled=True)
        inputs = [*self.inputs, *cotangents]
        outer.joined = tuple([number for number, leaf in enumerate(inputs) if leaf.requires_grad])
        return tree_unflatten(_node(outer, leaves, [inputs[number] for number in outer.joined]), spec)


def joined_run(func: Callable[..., Any], primals: tuple[Any, ...], kwargs: dict[str, Any], has_aux: bool) -> JoinedRun | None:
    """A run for ``vjp`` of a function of arguments with graphs; None, with nothing done, where it has to go its usual way."""
    if not torch.is_grad_enabled():
        return None
    leaves, spec = tree_flatten(primals)
    if not _may_join(func, leaves):
        return None
    level = Level(func, "vjp", None, has_aux, _no_finish, ())
    traced = _traced(level, primals, tuple(range(len(primals))), kwargs, leaves, spec)
    return None if traced is None else _joined_outputs(func, traced, leaves, has_aux)


def _no_finish(traced: Traced, single: bool) -> Any:
    raise AssertionError("this level is for a run only")


def _joined_outputs(func: Callable[..., Any], traced: Traced, leaves: list[torch.Tensor], has_aux: bool) -> JoinedRun:
    tape = traced.tape
    aux_leaves, aux_spec = tree_flatten(traced.aux) if has_aux else ([], None)
    known = [tape.slots.get(id(leaf)) if isinstance(leaf, torch.Tensor) else None for leaf in aux_leaves]
    slots = [slot for slot in (*traced.out_slots, *known) if slot is not None]

    def finish(here: Traced, _: bool) -> Any:
        return [here.tape.values[slot] for slot in slots]

    level = Level(func, "vjp", None, False, finish, ("vjp", "joined outputs", tuple(slots)))
    constants = _take_graphs(traced)
    # What is written to an output later is seen, by its version.
    results = [
        value.clone() if value._is_view() or slot in traced.in_slots else value.detach()
        for slot, value in [(slot, tape.values[slot]) for slot in slots]
    ]
    computation, tied = _tied(traced, level, leaves, constants, results)
    found = iter(tied)
    out = [leaf if slot is None else next(found) for leaf, slot in zip(traced.out_leaves, traced.out_slots, strict=True)]
    aux = [leaf if slot is None else next(found) for leaf, slot in zip(aux_leaves, known, strict=True)]
    inputs = [*leaves, *[tensor for _, tensor in constants]]
    output = tree_unflatten(out, traced.out_spec)
    return JoinedRun(traced, output, tree_unflatten(aux, aux_spec) if aux_spec is not None else None, inputs, computation)


def _traced(
    level: Level, args: tuple[Any, ...], positions: tuple[int, ...], kwargs: dict[str, Any], leaves: list[torch.Tensor],
    spec: TreeSpec,
) -> Traced | None:  # fmt: skip
    """A run of a level's function on arguments without their graphs; None where levels have to be run one by one."""
    try:
        traced = trace(
            level.func, args, positions, kwargs, level.name, has_aux=level.has_aux, single=True, joined=(leaves, spec)
        )
    except GraphNeededError:
        note_apart([level])
        return None
    if traced.tape.hooks or traced.tape.saw_cut:
        note_apart([level])
        return None
    return traced


def _take_graphs(traced: Traced) -> list[tuple[int, torch.Tensor]]:
    """Make the values on a tape values without a graph; returns the constants among them that had one, and their slots.

    They (closed-over parameters, other arguments) are inputs of what a run computes, as the differentiated arguments are.
    """
    tape, constants = traced.tape, []
    for slot, value in enumerate(tape.values):
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            continue
        tape.kept.append(value)  # by whose identity the slot may be known
        if not tape.active[slot]:
            constants.append((slot, value))
        bare = tape.values[slot] = value.detach()
        tape.slots[id(bare)] = slot
    traced.out_leaves = [
        leaf if slot is None else tape.values[slot] for slot, leaf in zip(traced.out_slots, traced.out_leaves, strict=True)
    ]
    return constants


def _tied(
    traced: Traced, level: Level, arguments: Sequence[torch.Tensor], constants: Sequence[tuple[int, torch.Tensor]],
    results: list[Any],
) -> tuple[Computation, list[Any]]:  # fmt: skip
    """Results of a level of a run, as a function of the arguments and the constants that have a graph, and tied to these."""
    tape, inputs = traced.tape, [*arguments, *[tensor for _, tensor in constants]]
    joined = [number for number, leaf in enumerate(inputs) if leaf.requires_grad]
    for slot, _ in constants:
        tape.active[slot] = True
        tape.inputs.append(slot)
    in_slots = [*traced.in_slots, *[slot for slot, _ in constants]]
    in_leaves = [tape.values[slot] for slot in in_slots]
    traced = replace(traced, in_slots=in_slots, in_leaves=in_leaves, in_spec=PLAIN_ARGUMENT, columns=[None] * len(in_slots))
    computation = Computation(traced, [level], tuple(joined))
    return computation, _node(computation, results, [inputs[number] for number in joined])


@dataclass(slots=True)
class Computation:
    """Levels on a run whose values have no graph, as a function of the inputs of its tape.

    Attributes:
        traced: the run; its inputs are the arguments, and the cotangents that levels of it were given (their structure is not
            told).
        levels: the levels, innermost first; each one after the first pulls cotangents of the results of the one before back.
        joined: which of the inputs have a graph.
        versions: those of the values on the tape when they were computed.
    """

    traced: Traced
    levels: list[Level]
    joined: tuple[int, ...]
    versions: list[int | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        values = self.traced.tape.values
        try:
            self.versions = [value._version for value in values]
        except (AttributeError, RuntimeError):  # other objects, and tensors of the inference mode
            self.versions = [_version(value) for value in values]

    def seeded(self, cotangents: Sequence[torch.Tensor | None], wanted: tuple[int, ...], *, filled: bool = False) -> Computation:
        """What pulls cotangents of the results back to the `wanted` inputs, as a function of the inputs and the cotangents.

        With ``filled``, there are zeros where nothing depends on an input.
        """
        tape = self.traced.tape.fork()
        mask = tuple([number for number, cotangent in enumerate(cotangents) if cotangent is not None])
        in_slots = [*self.traced.in_slots]
        level = _pull(self.levels[0].func, wanted, mask, len(in_slots), filled=filled)
        for number in mask:
            in_slots.append(tape.add_input(cotangents[number].detach()))  # type: ignore[union-attr]
        in_leaves = [tape.values[slot] for slot in in_slots]
        traced = replace(
            self.traced, tape=tape, in_slots=in_slots, in_leaves=in_leaves, grad_enabled=torch.is_grad_enabled(),
            columns=[None] * len(in_slots),
        )  # fmt: skip
        joined = (*self.joined, *range(len(self.traced.in_slots), len(in_slots)))
        made = Computation(traced, [*self.levels, level], joined)
        made.versions[: len(self.versions)] = self.versions
        return made

    def pulled(self, cotangents: Sequence[torch.Tensor | None]) -> tuple[Computation | None, dict[int, torch.Tensor]]:
        """The cotangents of those inputs that have a graph, as far as the results depend on them.

        The first of the two is what computes them, as a function of the inputs and the cotangents, where gradients are on.
        """
        made = self.seeded(cotangents, self.joined)
        traced, levels, number = made.traced, made.levels, len(made.traced.in_slots)
        if traced.grad_enabled:  # what the levels record is not to stand on its tape
            traced = replace(traced, tape=traced.tape.fork())
        tape, values = traced.tape, [*traced.tape.values]
        wanted = [(tuple(range(number)), False)] * len(levels)
        key, cached = key_and_plan(levels, wanted, traced)
        tape.settle()
        found = finish_run(Run([Part(levels, wanted, traced)], tape.values, key, cached))
        self._refuse_written(values, key)
        known = {id(value) for value in values}
        outer = made if traced.grad_enabled else None
        return outer, {number: leaf.clone() if id(leaf) in known else leaf for number, leaf in found.items()}

    def _refuse_written(self, values: Sequence[Any], key: Any) -> None:
        """Refuse derivatives at values that were written to since they were computed.

        Raises:
            RuntimeError: if there are such values among those that were read.
        """
        plan: Any = None if key is None else engine.CACHE.plans.get(key)
        if plan.__class__ is NestPlan:
            needs = plan.needs if plan.recorded is None else plan.recorded[0].inputs
            read = [slot for slot in needs if slot.__class__ is int]
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


def _pull(func: Callable[..., Any], wanted: tuple[int, ...], mask: tuple[int, ...], count: int, *, filled: bool) -> Level:
    """The level that pulls cotangents of some results back to some inputs.

    Args:
        func: the innermost function.
        wanted: those inputs.
        mask: the results.
        count: how many inputs there are, after which the cotangents come.
        filled: whether there are zeros where nothing depends on an input.
    """

    def finish(traced: Traced, _: bool) -> dict[int, torch.Tensor]:
        seeds: dict[int, torch.Tensor] = {}
        constant = filled
        for place, number in enumerate(mask):
            slot = traced.out_slots[number]
            if slot is None:
                constant = True
                continue
            seed = traced.tape.values[traced.in_slots[count + place]]
            seeds[slot] = seeds[slot] + seed if slot in seeds else seed
        inputs = [traced.in_slots[number] for number in wanted]
        found: dict[Any, Any] = {}
        if seeds:
            found = traced.run("pull", seeds=(*seeds,), tensors=(*seeds.values(),), outputs=[*seeds], inputs=inputs)
        pairs = [*zip(wanted, inputs, strict=True)]
        pulled = {number: leaf for number, slot in pairs if (leaf := found.get(slot)) is not None}
        if constant or not pulled:  # a derivative that no value goes into has a graph of zeros, as with torch's formulas
            for number, slot in pairs:
                if number not in pulled:
                    pulled[number] = torch.zeros_like(traced.tape.values[slot])
            pulled = {number: pulled[number] for number, _ in pairs}
        return pulled

    return Level(func, "vjp", None, False, finish, ("vjp", "joined", wanted, mask, count, filled))


class _Node(torch.autograd.Function):
    """Results that are there already, as a function of inputs."""

    @staticmethod
    def forward(ctx: Any, computation: Computation, tied: list[bool], results: list[torch.Tensor], *tensors: torch.Tensor) -> Any:
        """The tensors are the inputs that have a graph."""
        ctx.computation, ctx.tied = computation, tied
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        those = iter(cotangents)
        given = [next(those) if tied else None for tied in ctx.tied]
        pull = _pulled_rows if any([item is not None and _is_batched(item) for item in given]) else _pulled
        found = pull(ctx.computation, ctx.saved_tensors, given)
        return None, None, None, *[found.get(number) for number in ctx.computation.joined]


def _pulled(
    computation: Computation, inputs: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor | None]
) -> dict[int, torch.Tensor]:
    """The cotangents of inputs, with a graph where gradients are on."""
    outer, found = computation.pulled(cotangents)
    if outer is None:
        return found
    given = [*inputs, *[cotangent for cotangent in cotangents if cotangent is not None]]
    outer.joined = tuple([number for number, leaf in zip(outer.joined, given, strict=True) if leaf.requires_grad])
    leaves = _node(outer, list(found.values()), [leaf for leaf in given if leaf.requires_grad])
    return dict(zip(found, leaves, strict=True))


#: Whether a tensor is a batch of torch's own (``is_grads_batched``).
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def _pulled_rows(
    computation: Computation, inputs: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor | None]
) -> dict[int, torch.Tensor]:
    """As :func:`_pulled`, of each sample of such batches by itself."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    batches = [item for item in cotangents if item is not None and _is_batched(item)]
    size = torch._remove_batch_dim(batches[0], level, 0, 0).shape[0]
    given = [None if item is None else torch._remove_batch_dim(item, level, size, 0) for item in cotangents]
    rows = [
        _pulled(computation, inputs, [None if item is None else item[number] for item in given]) for number in range(size)
    ]
    names = rows[0] if rows else {}
    return {name: torch._add_batch_dim(torch.stack([row[name] for row in rows]), 0, level) for name in names}


#: As torch has it, without a look at the modes that are on.
_apply = super(torch.autograd.Function, _Node).apply


def _node(computation: Computation, results: list[Any], inputs: list[torch.Tensor]) -> list[Any]:
    """Results as functions of inputs; those that have a graph are constants with respect to all of these."""
    known = computation.traced.tape.slots
    # The tape holds its values as they are, without a graph; of views torch would refuse writes.
    found = [leaf.clone() if id(leaf) in known or leaf._is_view() else leaf for leaf in results]
    tied = [leaf.is_floating_point() and not leaf.requires_grad for leaf in found]
    if any(tied) and inputs:
        leaves = iter(_apply(computation, tied, [leaf for leaf, is_tied in zip(found, tied, strict=True) if is_tied], *inputs))
        found = [next(leaves) if is_tied else leaf for leaf, is_tied in zip(found, tied, strict=True)]
    return found
