"""What a rule is: one declaration per ATen overload, from which every mode follows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch._ops import OpOverload

from chainrule.maps.compose import Workspace
from chainrule.maps.linear_map import LinearMap, Operator
from chainrule.maps.nodes import Node, leaf, masking
from chainrule.maps.poles import has_poles
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Dims, Factor, OneHot, Term, dims_of, new_axes

#: Numbers of this size and above are arrays: the product of two may be infinite in single precision.
_LARGEST_SCALE = 1e18

_SOFTMAX = frozenset({
    torch.ops.aten._softmax.default, torch.ops.aten._log_softmax.default, torch.ops.aten.logsumexp.default,
})  # fmt: skip


class Flags(Protocol):
    """A flag for each slot."""

    def __getitem__(self, slot: int, /) -> bool:
        """The flag of a slot."""
        ...


class TapeView(Protocol):
    """The part of a tape that rules may look at."""

    @property
    def values(self) -> list[Any]:
        """What each slot holds."""
        ...

    @property
    def active(self) -> Flags:
        """Whether what a slot holds depends on the inputs."""
        ...

    @property
    def records(self) -> Sequence[Any]:
        """The ops, in order."""
        ...


class Call:
    """One recorded op as a rule sees it: shapes and static arguments now, tensor values only when they are staged.

    Attributes:
        op: the overload.
        args: positional arguments; a tensor is a ``Slot``.
        kwargs: keyword arguments by name.
        outputs: slots of the outputs.
        workspace: dtype, device and shared nodes of the plan.
    """

    def __init__(self, record: Any, tape: TapeView, workspace: Workspace) -> None:
        self.op: OpOverload = record.op
        self.args: tuple[Any, ...] = record.args
        self.kwargs: dict[str, Any] = dict(record.kwargs)
        self.outputs: tuple[int, ...] = record.outputs
        self.is_tuple: bool = record.is_tuple
        self.workspace = workspace
        self._tape = tape

    @property
    def batch(self) -> int:
        """How many samples of surrounding vmaps the op runs on."""
        slots = [item.index for item in self.args if self.is_slot(item)] + [slot for slot in self.outputs if slot >= 0]
        return max(batch_of(self._tape.values[slot]) for slot in slots)

    def tensor(self, slot: Any) -> torch.Tensor:
        """The tensor in a slot: only its shape, dtype and device may be looked at."""
        value = self._tape.values[slot if isinstance(slot, int) else slot.index]
        assert isinstance(value, torch.Tensor)
        return value

    def shape(self, slot: Any) -> tuple[int, ...]:
        """The shape of the tensor in a slot."""
        return tuple(self.tensor(slot).shape)

    def is_slot(self, item: Any) -> bool:
        """Whether an argument is a tensor."""
        return type(item).__name__ == "Slot"

    def is_active(self, item: Any) -> bool:
        """Whether an argument is a tensor that depends on the inputs."""
        return self.is_slot(item) and self._tape.active[item.index]

    def producer(self, item: Any) -> Any:
        """The recorded op whose only output an argument is; None for an input, or one output of several."""
        known: dict[int, Any] | None = self.workspace.producers
        if known is None:
            known = self.workspace.producers = {r.outputs[0]: r for r in self._tape.records if len(r.outputs) == 1}
        return known.get(item.index) if self.is_slot(item) else None

    def stage(self, program: Program, item: Any) -> Any:
        """The staged value of an argument (numbers and other static arguments stay what they are)."""
        if self.is_slot(item):
            return self._input(program, item.index)
        if isinstance(item, tuple):
            return [self.stage(program, element) for element in item]
        return item

    def operand(self, program: Program, item: Any) -> Any:
        """The staged value of an operand of an element-wise op, in the dtype that the op computes in.

        The derivative of a quotient by integers has the precision of the quotient. Masks stay what they are.
        """
        if not self.is_slot(item):
            return self.stage(program, item)
        staged = self.stage(program, item)
        wanted = self._tape.values[self.outputs[0]].dtype
        if staged.dtype == wanted or staged.dtype == torch.bool or staged.dtype.is_complex:
            return staged
        return staged.to(wanted) if wanted.is_floating_point or wanted.is_complex else staged

    def stage_output(self, program: Program, number: int = 0) -> Staged:
        """The staged value of an output."""
        return self._input(program, self.outputs[number])

    def _input(self, program: Program, slot: int) -> Staged:
        if program.infinite_input is None:
            program.infinite_input = _Poles(self._tape.records)
        return program.input(slot, self._tape.values[slot])

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape of the first output."""
        return tuple(self._tape.values[self.outputs[0]].shape)

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by its schema name, its schema default, or ``default``."""
        for position, argument in enumerate(self.op._schema.arguments):
            if argument.name == name:
                if position < len(self.args):
                    return self.args[position]
                if name in self.kwargs:
                    return self.kwargs[name]
                return argument.default_value if argument.has_default_value() else default
        return default

    def position(self, name: str) -> int:
        """The position of a named argument in the schema."""
        return next(i for i, a in enumerate(self.op._schema.arguments) if a.name == name)

    def bound(self) -> dict[str, Any]:
        """All arguments by name, defaults included."""
        return {a.name: self.argument(a.name) for a in self.op._schema.arguments}


class _Poles:
    """Which values of a tape may be infinite although its inputs are finite: those after a quotient or a logarithm.

    It stays with a program, so that it holds the records alone: the values would live as long as a plan.
    """

    def __init__(self, records: Sequence[Any]) -> None:
        self._records = records
        self._found: set[int] | None = None

    def __call__(self, key: Any) -> bool:
        """Whether the value in a slot may be that."""
        if self._found is None:
            found: set[int] = set()
            chosen: set[int] = set()
            self._found = found
            for record in self._records:
                slots = [item.index for item in _flat(record.args) if type(item).__name__ == "Slot"]
                if not found.isdisjoint(slots) or has_poles(record.op, record.args):
                    found.update(record.outputs)
                elif record.op in _SOFTMAX and not chosen.isdisjoint(slots):
                    # `where(mask, x, -inf)`, whose number stands in a tensor: rows that are masked as a whole become NaN.
                    found.update(record.outputs)
                elif record.op is torch.ops.aten.where.self:
                    chosen.update(record.outputs)
        return key in self._found


def _flat(args: Iterable[Any]) -> Iterable[Any]:
    for item in args:
        if item.__class__ is tuple or item.__class__ is list:
            yield from item
        else:
            yield item


@dataclass(frozen=True)
class Edge:
    """The local Jacobian of output ``output`` (its number) with respect to the tensor in slot ``source``."""

    source: int
    output: int
    map: LinearMap


Linearize = Callable[[Call], Iterable[Edge]]


@dataclass(frozen=True)
class Rule:
    """One op's declaration.

    Attributes:
        family: the family's name, for ``explain``.
        linearize: the local Jacobians of a recorded call with respect to its active tensor arguments.
        reads: whether these need the values of the op's inputs or outputs.
        batch: how the op runs on batched arguments; None for the way its schema suggests
            (:mod:`chainrule.rules.batching`).
        kind: ``structured`` or ``opaque``.
    """

    family: str
    linearize: Linearize
    reads: bool = True
    batch: Callable[..., Any] | None = None
    kind: str = "structured"


def single(call: Call, item: Any, terms: Sequence[Term], operators: Sequence[Operator] = (), output: int = 0) -> Edge:
    """The edge from one tensor argument, given its terms."""
    out_shape = call.shape(call.outputs[output])
    return Edge(item.index, output, LinearMap(out_shape, call.shape(item), tuple(terms), tuple(operators)))


def value_node(call: Call, item: Any, sizes: Iterable[int] | None = None) -> Node:
    """A dense node that holds an argument's value (viewed with ``sizes``); shared by all rules of a plan."""
    shape = call.shape(item)
    wanted = shape if sizes is None else tuple(sizes)
    exact = _coefficient_dtype(call.tensor(item).dtype, call.tensor(call.outputs[0]).dtype, call.workspace.dtype)
    key = ("value", item.index, wanted, exact)
    node = call.workspace.memo.get(key)
    if node is None:

        def stage(program: Program) -> Staged:
            value = call.stage(program, item)
            if exact is not None:
                value = program.call(torch.ops.aten._to_copy.default, value, dtype=exact)
            return value if wanted == shape else torch.reshape(value, wanted)

        node = call.workspace.memo[key] = masking(leaf(wanted, stage, label="value", batch=batch_of(call.tensor(item))))
        node.slot = item.index
    return node


@functools.cache
def _coefficient_dtype(given: torch.dtype, computed: torch.dtype, plan: torch.dtype) -> torch.dtype | None:
    """The dtype that a value is converted to where it is a coefficient of a map; None for its own.

    Sums of truth values, and of small integers, are not their sums as numbers. A factor of lower precision than the product it
    stands in is multiplied in that of the product: so it is with what comes after it in a chain, which is multiplied first here.
    """
    if not (given.is_floating_point or given.is_complex):
        return plan
    if not (computed.is_floating_point or computed.is_complex):
        return None
    wide = torch.promote_types(given, computed)
    wanted = wide if given.is_complex else wide.to_real()
    return None if wanted == given else wanted


def formula_node(call: Call, sizes: Iterable[int], formula: Callable[[Program], Any], label: str = "", flops: int = 0) -> Node:
    """A dense node computed from the call's values by ``formula``; numbers and broadcastable results are expanded."""
    shape = tuple(sizes)

    def stage(program: Program) -> Staged:
        value = formula(program)
        if not isinstance(value, Staged):
            return program.call(torch.full, shape, value, dtype=call.workspace.dtype, device=call.workspace.device)
        return value if tuple(value.shape) == shape else program.view_of(value, lambda v: torch.broadcast_to(v, shape))

    numel = 1
    for size in shape:
        numel *= size
    return leaf(shape, stage, flops=flops or numel, label=label or call.op.name(), batch=call.batch)


def batch_of(tensor: Any) -> int:
    """How many samples of surrounding vmaps a tensor holds beside its own shape."""
    samples = 1
    while tensor.__class__ is not torch.Tensor and (value := getattr(tensor, "value", None)) is not None:
        if tensor.batched:
            samples *= value.shape[0]
        tensor = value
    return samples


def broadcast_axes(shape: tuple[int, ...], out_axes: Sequence[Axis]) -> Dims:
    """The dimensions of an operand that was broadcast to ``out_axes``: a stretched dimension carries no axis."""
    offset = len(out_axes) - len(shape)
    return tuple(
        () if size == 1 and out_axes[offset + d].size != 1 else (out_axes[offset + d],) for d, size in enumerate(shape)
    )


def diagonal_term(
    shape: tuple[int, ...], out_axes: Sequence[Axis], factors: Sequence[Factor] = (), scale: float = 1.0
) -> Term:
    """The term of an element-wise op: the operand's (broadcast) axes are the output's."""
    return Term(dims_of(out_axes), broadcast_axes(shape, out_axes), tuple(factors), (), scale)


def multiple_term(call: Call, shape: tuple[int, ...], out_axes: Sequence[Axis], number: Any) -> Term:
    """The term of an element-wise op whose derivative is a number.

    What is infinite, or may be in a product, stands in an array: a scale is multiplied with zeros of masks and paddings, too,
    and zero times infinity is NaN.
    """
    if abs(number) <= _LARGEST_SCALE:
        return diagonal_term(shape, out_axes, scale=number)
    dtype = call.workspace.dtype
    # Beyond the range of the dtype it is what the op itself makes of it.
    if dtype.is_floating_point and abs(number) > torch.finfo(dtype).max:
        number = math.copysign(math.inf, number)
    node = formula_node(call, (axis.size for axis in out_axes), lambda program: number, label="number")
    return diagonal_term(shape, out_axes, [Factor(node, tuple(out_axes))])


__all__ = [
    "Axis", "Call", "Edge", "Factor", "LinearMap", "OneHot", "Operator", "Rule", "Term", "broadcast_axes",
    "diagonal_term", "dims_of", "formula_node", "multiple_term", "new_axes", "single", "value_node",
]  # fmt: skip
