"""Running a function under a tape: fresh aliases in, outputs and their slots out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import TreeSpec, tree_map

from chainrule.batching.duals import refuse_duals
from chainrule.batching.mode import VmapMode
from chainrule.batching.tensor import BatchTensor
from chainrule.capture.numbers import numbers_to_values
from chainrule.capture.recorder import Recorder
from chainrule.capture.tape import BelowAutograd, Tape
from chainrule.execute.batched import same_stored
from chainrule.execute.engine import execute, execute_known
from chainrule.execute.memory import current_watch
from chainrule.plan.planner import Request
from chainrule.rules.table import POLICY
from chainrule.shortcuts import FLOATING
from chainrule.transforms.arguments import (
    LEAF,
    PLAIN_ARGUMENT,
    flatten_inputs,
    flatten_outputs,
    refuse_inside_torch_func,
    split_aux,
    tree_unflatten,
)
from chainrule.transforms.duals import WatchfulTape
from chainrule.transforms.steps import HiddenSteps, is_inside_reverse, run_in_steps
from chainrule.transforms.tensor_hooks import HEEDING, refuse_hooks

aten = torch.ops.aten

#: The classes of arguments about which nothing has to be asked but their dtype.
PLAIN_CLASSES = (torch.Tensor, BatchTensor)


@dataclass
class Block:
    """Some elements of a flattened tensor, chosen by an index that plans read as a value: one plan serves all blocks.

    Attributes:
        tape: where it stands.
        slot: the slot of the chosen elements.
        index: the slot of the index.
        size: how many elements a block has.
        total: how many the tensor has.
    """

    tape: Tape
    slot: int
    index: int
    size: int
    total: int

    def positions(self) -> Iterator[tuple[int, int]]:
        """Choose one block after the other; yields where it starts, and how many of its first elements were there before.

        The last block overlaps its predecessor instead of being shorter, which would be another plan.
        """
        for start in range(0, self.total, self.size):
            first = min(start, self.total - self.size)
            self.tape.values[self.index] = torch.arange(first, first + self.size, device=self.tape.values[self.index].device)
            yield start, start - first


@dataclass(slots=True)
class Traced:
    """One recorded run.

    Attributes:
        tape: the finished tape.
        in_leaves: the user's input tensors that are differentiated.
        in_spec: their structure.
        in_slots: their slots.
        out_leaves: the outputs as the user gets them.
        out_spec: their structure.
        out_slots: slots of the outputs, None for one that does not depend on the inputs.
        aux: the auxiliary output.
        grad_enabled: whether gradients were on around the transform.
        seeds: tangents of the inputs, where a nest is run as a whole.
        made: where a nest is recorded, the seeds that a linear part was recorded with.
        alone: whether the run serves one request only.
        columns: for each input, the block of it that stands for it on the tape; None where it stands for itself.
        steps: where a forward transform runs inside of a reverse one, what was done under ``torch.no_grad()``.
    """

    tape: Tape
    in_leaves: list[torch.Tensor]
    in_spec: TreeSpec
    in_slots: list[int]
    out_leaves: list[torch.Tensor]
    out_spec: TreeSpec
    out_slots: list[int | None]
    aux: Any
    grad_enabled: bool
    columns: list[Block | None]
    seeds: tuple[torch.Tensor, ...] = ()
    made: list[torch.Tensor] | None = None
    alone: bool = False
    steps: HiddenSteps | None = None

    @property
    def hidden(self) -> set[int]:
        """The records made under ``torch.no_grad()``, where a forward transform runs inside of a reverse one."""
        return set() if self.steps is None else self.steps.records

    def output(self) -> Any:
        """The outputs in the user's structure."""
        return tree_unflatten([self.release(leaf) for leaf in self.out_leaves], self.out_spec)

    def release(self, leaf: torch.Tensor) -> torch.Tensor:
        """An output as it leaves the transform: without a graph when gradients are off around it."""
        return leaf if self.grad_enabled else _without_graph(leaf)

    def run(self, kind: str, order: str = "auto", seeds: tuple[int, ...] = (), tensors: tuple[torch.Tensor, ...] = (),
            cast: str = "input", outputs: list[int] | None = None,
            inputs: list[int] | None = None, last: bool = False) -> dict[Any, torch.Tensor | None]:
        """Execute a request on the tape; the last one may let go of its values."""
        request = self.request(kind, order, seeds, cast, outputs, inputs)
        if self.steps is not None and self.steps.records:
            return run_in_steps(self.tape, self.steps, request, tensors)
        return execute(self.tape, request, tensors, last=last)

    def request(self, kind: str, order: str = "auto", seeds: tuple[int, ...] = (), cast: str = "input",
                outputs: list[int] | None = None, inputs: list[int] | None = None) -> Request:
        """What :meth:`run` asks."""
        wanted = [slot for slot in self.out_slots if slot is not None] if outputs is None else outputs
        # Under another transform, structure is worth more than a kernel.
        alone = not torch._C._len_torch_dispatch_stack()
        slots = tuple(self.in_slots if inputs is None else inputs)
        joined = alone and kind == "pull" and torch.is_grad_enabled() and any([leaf.requires_grad for leaf in self.out_leaves])
        mapped = not alone and is_only_mapped()
        return Request(kind, slots, tuple(wanted), order, seeds, cast, alone, joined=joined, mapped=mapped)

    def known_block(self, order: str, cast: str = "input") -> torch.Tensor | None:
        """The Jacobian of one output with respect to one argument, if its plan is known; nothing else is asked of the run then.

        None, with nothing done, where :meth:`run` has to be called.
        """
        if len(self.out_slots) != 1 or self.in_spec is not PLAIN_ARGUMENT or self.steps is not None:
            return None
        slot = self.out_slots[0]
        if slot is None:
            return None
        alone = not torch._C._len_torch_dispatch_stack()
        request = block_request(self.in_slots[0], slot, order, cast, alone, not alone and is_only_mapped())
        found = execute_known(self.tape, request)
        return None if found is None else found[0]

    def rows(self, number: int, size: int) -> Block:
        """Append the choice of ``size`` elements of an output to the tape."""
        leaf = self.out_leaves[number]
        index = torch.arange(size, device=leaf.device)
        with torch.enable_grad(), self.tape.recording():
            chosen = leaf.reshape(-1).index_select(0, index)
        slot, index_slot = self.tape.slot_of(chosen), self.tape.slot_of(index)
        assert slot is not None and index_slot is not None
        return Block(self.tape, slot, index_slot, size, leaf.numel())


@lru_cache(maxsize=1024)
def block_request(source: int, slot: int, order: str, cast: str, alone: bool, mapped: bool = False) -> Request:
    """The request for the Jacobian of one value with respect to another one."""
    return Request("jacobian", (source,), (slot,), order, (), cast, alone, mapped=mapped)


#: Modes that see what a plan does and do not differentiate it.
_NOT_DIFFERENTIATING = frozenset({VmapMode, Recorder})


def is_only_mapped() -> bool:
    """Whether one mapping or several are around, and nothing that differentiates what is done inside."""
    modes = [torch._C._get_dispatch_stack_at(place).__class__ for place in range(torch._C._len_torch_dispatch_stack())]
    return VmapMode in modes and _NOT_DIFFERENTIATING.issuperset(modes) and forward_ad._current_level < 0


def _without_graph(leaf: torch.Tensor) -> torch.Tensor:
    """The same value without a graph, on its own or on the tensors that mappings have stored, and constant for reverse tapes.

    A forward transform around this one sees through ``no_grad``, but not through ``detach``, which is not called for that reason.
    """
    if leaf.requires_grad:
        with torch.no_grad(), torch._C._AutoDispatchBelowADInplaceOrView():
            return aten.alias.default(leaf)
    stored: Any = leaf
    while stored.__class__ is BatchTensor:
        stored = stored.value
        if stored.requires_grad:
            with torch.no_grad():  # autograd sees views of mappings there, too
                return aten.clone.default(leaf)
    if not torch._C._len_torch_dispatch_stack():
        return leaf
    with torch.no_grad():
        return aten.alias.default(leaf)


def fresh_alias(tensor: torch.Tensor) -> torch.Tensor:
    """A new tensor object for the same value and memory: the identity by which this transform knows its input."""
    if tensor.__class__ is torch.Tensor and not tensor.requires_grad and not torch._C._len_torch_dispatch_stack():
        return tensor.detach()
    if tensor.__class__ is BatchTensor and (again := same_stored(tensor)) is not None:
        return again
    return aten.alias.default(tensor)


def trace(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    argnums: tuple[int, ...],
    kwargs: dict[str, Any],
    transform: str,
    *,
    has_aux: bool = False,
    respect_no_grad: bool = True,
    column_block: int | None = None,
    single: bool = False,
    owned: bool = False,
) -> Traced:
    """Run ``function(*args, **kwargs)`` under a tape whose inputs are the tensors in ``args[argnums]``.

    With ``column_block``, a tensor of more elements than that is represented on the tape by a block of them. With ``single``,
    only cotangents are pulled back, one at a time. Where a forward transform (one without ``respect_no_grad``) runs inside of a
    reverse one, the function is run a second time if steps of it are hidden from that. With ``owned``, mapped tensors were made
    for this run: nobody else knows them.
    """
    if not respect_no_grad and is_inside_reverse():
        given = (function, args, argnums, kwargs, transform, has_aux, column_block, single, False)
        traced = _trace(*given, respect_no_grad=True, forward=True)
        return _trace(*given, respect_no_grad=False, noted=True) if traced.tape.saw_blocked else traced
    return _trace(
        function, args, argnums, kwargs, transform, has_aux, column_block, single, owned, respect_no_grad=respect_no_grad
    )


def _trace(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    argnums: tuple[int, ...],
    kwargs: dict[str, Any],
    transform: str,
    has_aux: bool,
    column_block: int | None,
    single: bool,
    owned: bool,
    *,
    respect_no_grad: bool,
    noted: bool = False,
    forward: bool = False,
) -> Traced:
    """As :func:`trace`; with ``noted`` the records made under ``torch.no_grad()`` are written down.

    With ``forward`` the run is one of a forward transform, although such steps are constants.
    """
    refuse_inside_torch_func(transform)
    only: Any = args[argnums[0]] if len(argnums) == 1 else None
    plain = only.__class__ in PLAIN_CLASSES and only.dtype in FLOATING
    in_leaves, in_spec = (
        ([only], PLAIN_ARGUMENT) if plain else flatten_inputs(tuple([args[number] for number in argnums]), transform)
    )
    grad_enabled = torch.is_grad_enabled()
    if not grad_enabled:
        torch._C._set_grad_enabled(True)
    try:
        if owned:
            aliases = [leaf if leaf.__class__ is BatchTensor else fresh_alias(leaf) for leaf in in_leaves]
        else:
            aliases = [fresh_alias(in_leaves[0])] if plain else [fresh_alias(leaf) for leaf in in_leaves]
        kernels = single and not torch._C._len_torch_dispatch_stack()
        if forward_ad._current_level < 0:
            tape = Tape(POLICY, respect_no_grad=respect_no_grad, kernels=kernels)
        else:
            refuse_duals(in_leaves, transform)
            tape = WatchfulTape(POLICY, respect_no_grad=respect_no_grad, kernels=kernels, transform=transform)
        tape.reverse = respect_no_grad and not forward
        in_slots: list[int] = []
        columns: list[Block | None] = []
        for number, alias in enumerate(aliases):
            if column_block is None or alias.numel() <= column_block:
                in_slots.append(tape.add_input(alias))
                columns.append(None)
            else:
                aliases[number], block = _in_blocks(tape, alias, column_block)
                in_slots.append(block.slot)
                columns.append(block)
        called: Sequence[Any] = aliases if in_spec is PLAIN_ARGUMENT else tree_unflatten(aliases, in_spec)
        if len(argnums) < len(args) or argnums != tuple(range(len(args))):
            values, called = called, [*args]
            for number, value in zip(argnums, values, strict=True):
                called[number] = value
        steps = HiddenSteps(tape) if noted else None
        if steps is None:
            output = tape.run(function, tuple(called), kwargs)
        else:
            with BelowAutograd(), tape, steps:
                output = function(*called, **kwargs)
    finally:
        if not grad_enabled:
            torch._C._set_grad_enabled(False)
    traced = traced_run(tape, output, in_leaves, in_spec, in_slots, columns, function, transform, grad_enabled, has_aux=has_aux)
    traced.steps = steps
    return traced


def traced_run(
    tape: Tape,
    output: Any,
    in_leaves: list[torch.Tensor],
    in_spec: TreeSpec,
    in_slots: list[int],
    columns: list[Block | None],
    function: Callable[..., Any],
    transform: str,
    grad_enabled: bool,
    *,
    has_aux: bool = False,
) -> Traced:
    """A run that is over, from its tape and what the function returned."""
    if tape.hooks:
        if transform not in HEEDING:
            refuse_hooks(tape, transform)
        in_slots = [tape.sources.get(slot, slot) for slot in in_slots]
    aux = None
    if has_aux:
        output, aux = split_aux(output, transform, function)
        if not grad_enabled:
            aux = tree_map(lambda leaf: _without_graph(leaf) if isinstance(leaf, torch.Tensor) else leaf, aux)
    numbers_to_values(tape)
    out_leaves, out_spec = ([output], LEAF) if output.__class__ is torch.Tensor else flatten_outputs(output, transform, function)
    if (watch := current_watch()) is not None:
        watch.add_run(tape)
    out_slots = [active_slot(tape, out) for out in out_leaves]
    return Traced(tape, in_leaves, in_spec, in_slots, out_leaves, out_spec, out_slots, aux, grad_enabled, columns)


def _in_blocks(tape: Tape, tensor: torch.Tensor, size: int) -> tuple[torch.Tensor, Block]:
    """The same value, as a function of ``size`` of its elements, which are the input of the tape."""
    index = torch.arange(size, device=tensor.device)
    flat = tensor.reshape(-1)
    slot = tape.add_input(block := flat.index_select(0, index))
    with tape.recording():
        value = flat.index_copy(0, index, block).reshape(tensor.shape)
    index_slot = tape.slot_of(index)
    assert index_slot is not None
    return value, Block(tape, slot, index_slot, size, tensor.numel())


def active_slot(tape: Tape, leaf: torch.Tensor) -> int | None:
    """The slot of an output, None for one that does not depend on the inputs."""
    slot = tape.slots.get(id(leaf))
    if slot is None:
        slot = tape.slot_of(leaf)
    return slot if slot is not None and tape.active[slot] else None


def recording_on(tape: Tape) -> Callable[[], AbstractContextManager[Any]]:
    """Makes what runs inside be recorded on a tape, which may be recording already."""
    stack = _get_current_dispatch_mode_stack()
    if stack and stack[-1] is tape:
        return nullcontext

    @contextmanager
    def recording() -> Iterator[None]:
        with torch.enable_grad(), tape.recording():
            yield

    return recording
