"""What capture needs to know of an op: its schema's memory facts, and how it is to be recorded."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch._ops import OpOverload

from chainrule.calls import FUNCTIONS, UNFOLLOWED, WITH_NUMBERS, WRITING_NUMBERS
from chainrule.norms import JOINING

aten = torch.ops.aten

#: How an op is recorded that torch's autograd has to see.
PARTS, WHOLE, LINEAR, MATMUL = range(4)

#: Compositions of which torch's autograd keeps no values but the arguments and the result.
_TRANSPARENT = frozenset({aten.square.default, aten.reshape.default, aten.contiguous.default})

#: Contractions that are recorded whole of complex tensors, too.
_CONTRACTIONS = frozenset({aten.einsum.default})

#: Products of which that holds for some ranks (see :attr:`OpFacts.joining`).
_PRODUCTS = {aten.linear.default: LINEAR, aten.matmul.default: MATMUL}


def linear_of_vector(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A linear layer on a vector, of which autograd keeps the vector itself and not a view of it."""
    return torch.mv(weight, x) if bias is None else torch.addmv(bias, weight, x)


def are_stacked_alike(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether a product of two stacks of matrices, or of a stack and a matrix, keeps views of them for autograd, no copies."""
    shape, other = first.shape, second.shape
    rank = len(shape)
    if rank < 3 or not first.numel() or not second.numel():
        return False
    if len(other) == 2:
        return first.is_contiguous()
    if len(other) != rank or shape[:-2] != other[:-2]:
        return False
    return rank == 3 or (_is_one_stack(first) and _is_one_stack(second))


def _is_one_stack(tensor: torch.Tensor) -> bool:
    """Whether the dimensions before the last two are one in memory, too."""
    if tensor.dim() == 4:
        size, inner = tensor.shape[0], tensor.shape[1]
        return size == 1 or inner == 1 or tensor.stride(0) == inner * tensor.stride(1)
    dims = [(size, step) for size, step in zip(tensor.shape[:-2], tensor.stride(), strict=False) if size != 1]
    return all(step == size * inner for (_, step), (size, inner) in itertools.pairwise(dims))


class Policy(Protocol):
    """How ops are recorded; given by the layer that knows the rules."""

    def is_inactive(self, op: OpOverload) -> bool:
        """Whether the op's outputs do not depend differentiably on its inputs."""

    def expansion(self, op: OpOverload) -> Callable[..., Any] | None:
        """A function that computes the op by other ops, to be recorded in its place; None to record the op itself."""

    def whole(self, op: OpOverload) -> Callable[[tuple[Any, ...], bool, Callable[[Any], bool]], bool] | None:
        """For an op with an expansion: which calls are recorded as they are all the same.

        The function gets the arguments, whether kernels of the op's own are wanted, and what says whether an argument is active.
        """

    def direct(self, op: OpOverload) -> Callable[..., Any] | None:
        """A function of ``run(op, *args)`` and the arguments that computes the op by others, each run by ``run``.

        It returns NotImplemented, with nothing run, for calls that it does not take.
        """

    def joined_expansion(self, op: OpOverload) -> Callable[..., Any] | None:
        """As `expansion`, for calls that torch's own autograd has to reach through."""

    def joined_direct(self, op: OpOverload) -> Callable[..., Any] | None:
        """As `direct`, for such calls."""

    def reads_values(self, op: OpOverload) -> bool:
        """Whether the op's derivative needs the values of its inputs or outputs."""


class OpFacts:
    """The facts about an overload that capture needs, read once per policy.

    Attributes:
        writes: names of the arguments that the op writes to (``self`` of an in-place op, ``out`` of an out variant …).
        is_out: whether it is an out variant (the old content of what it writes does not matter).
        is_view: whether a result is a view of the first argument.
        functional: the overload that computes the same values without writing, or None when torch has none.
        argument_names: the positional argument names, in order.
        inactive: whether the outputs are constants for differentiation.
        shaped: whether an inactive op reads nothing of its arguments but their shapes.
        expansion: the composite form that is recorded instead of the op, or None.
        direct: a composite form whose parts are handed to the tape one by one, or None.
        whole: which calls of an op that has an expansion are recorded as they are.
        joined: the composite form that is recorded when an argument requires grad, or None.
        alone: runs the op as one node of torch's graph, all of whose results have derivatives, where no other mode sees it;
            None for ops that need no help for that.
        joined_direct: such a form whose parts are handed to the tape one by one, or None.
        composite: whether torch defines the op as a composition of others.
        joining: whether the op may be recorded whole where torch's autograd has to see it, too. What autograd keeps for the
            backward must be tensors that the tape knows, since a backward inside of the function is recorded as well: ``WHOLE``
            where it is so, ``LINEAR`` and ``MATMUL`` where it is so for matrices (and, by :func:`linear_of_vector`, vectors),
            ``PARTS`` where it is not.
        common: whether nothing but "run it and record it" has to happen.
        plain: whether that is so for tensors that are real and have no graph.
        with_complex: whether that is so for complex tensors: torch's autograd sees such calls, and compositions come in parts,
            but for contractions that are recorded whole.
        call: the op without the Python layer of its overload object.
        fast: what calls it with positional arguments at the least cost.
        unfollowed: the same where torch's autograd does not see the call.
        rewrites: whether the op does nothing but give new values to its first argument, which keeps its shape.
        random: whether the values are drawn.
        one: whether the op returns one tensor.
        reads: whether the op's derivative needs the values of its inputs or outputs; None until that was asked.
        numbers: whether a number as its second argument may be given as a constant.
    """

    __slots__ = (
        "alone", "argument_names", "call", "common", "composite", "direct", "expansion", "fast", "functional", "inactive",
        "is_out", "is_view", "joined", "joined_direct", "joining", "numbers", "one", "op", "plain", "random", "reads", "rewrites",
        "shaped", "unfollowed", "whole", "with_complex", "writes",
    )  # fmt: skip

    def __init__(self, op: OpOverload, policy: Policy) -> None:
        schema = op._schema
        self.op = op
        self.call = op._op
        self.alone = JOINING.get(op)
        self.fast = FUNCTIONS.get(op._op, op._op)
        self.unfollowed = UNFOLLOWED.get(self.fast, self.fast)
        self.numbers = self.fast in WITH_NUMBERS or self.fast in WRITING_NUMBERS
        self.argument_names = tuple(a.name for a in schema.arguments)
        self.writes = tuple(a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)
        self.is_out = any(a.is_out for a in schema.arguments)
        self.is_view = not self.writes and any(a.alias_info is not None for a in schema.arguments)
        self.one = len(schema.returns) == 1 and str(schema.returns[0].type) == "Tensor"
        self.reads: bool | None = None
        self.functional = functional_twin(op) if self.writes else None
        whole = self.writes == self.argument_names[:1] and not self.is_out and self.one
        self.rewrites = whole and torch.Tag.inplace_view not in op.tags
        self.random = torch.Tag.nondeterministic_seeded in op.tags
        self.inactive = not self.writes and policy.is_inactive(op)
        name = schema.name.split("::")[1]
        self.shaped = self.inactive and (name.endswith("_like") or name.startswith("new_"))
        self.expansion = None if self.writes or self.inactive else policy.expansion(op)
        self.whole = policy.whole(op)
        self.composite = op._can_decompose() and not self.writes
        self.joining = WHOLE if not self.composite or op in _TRANSPARENT else _PRODUCTS.get(op, PARTS)
        self.joined = None if self.writes else policy.joined_expansion(op)
        parts = self.joined is not None or self.expansion is not None
        self.joined_direct = None if self.writes else policy.joined_direct(op)
        self.direct = None if self.writes or not parts else policy.direct(op)
        apart = self.expansion is not None or self.writes or self.inactive or (self.is_view and not schema.arguments)
        self.plain = not apart
        self.common = self.plain and self.joined is None
        self.with_complex = op in _CONTRACTIONS or (self.common and self.alone is None and not self.composite)


def functional_twin(op: OpOverload) -> OpOverload | None:
    """The functional overload behind an in-place or out one, found by its schema: same arguments, nothing written."""
    name = op._schema.name.split("::")[1]
    namespace = getattr(torch.ops, op.namespace)
    wanted = [(a.name, str(a.type)) for a in op._schema.arguments if not a.is_out]
    for candidate in (name[:-1] if name.endswith("_") and not name.endswith("__") else name, name + "_functional"):
        packet = getattr(namespace, candidate, None)
        if packet is None:
            continue
        for overload in packet.overloads():
            found = getattr(packet, overload)
            arguments = found._schema.arguments
            if any(a.is_out or (a.alias_info is not None and a.alias_info.is_write) for a in arguments):
                continue
            if [(a.name, str(a.type)) for a in arguments] == wanted:
                return found
    return None
