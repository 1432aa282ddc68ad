"""What the handler must know about an ATen op, worked out once per op from its schema and the rule tables."""

from __future__ import annotations

from typing import Any

import torch
from torch._decomp import decomposition_table
from torch._ops import OpOverload

from chainrule.calls import FUNCTIONS, WITH_NUMBERS
from chainrule.rules.batching import BATCHING, DATA_DEPENDENT, INPLACE
from chainrule.rules.batching_base import BatchStrategy, checked_write, is_composite
from chainrule.rules.batching_pointwise import align, align_inplace, align_kwargs
from chainrule.rules.decompositions import DECOMPOSITIONS, LATE_DECOMPOSITIONS
from chainrule.uncompiled import refusal_of_operators

# Kinds of op, as the handler treats them.
FUNCTIONAL, VIEW, INPLACE_KIND, OUT = range(4)

#: Ops with an error in torch's decomposition. Derivatives of a mean over no target are NaN there, and zero in the kernel; labels
#: behind the first -1 count; and the loss of a single row has a dimension.
_OWN_DECOMPOSITIONS = frozenset({
    torch.ops.aten.nll_loss_forward.default, torch.ops.aten.nll_loss2d_forward.default,
    torch.ops.aten.multilabel_margin_loss_forward.default, torch.ops.aten.multi_margin_loss.default,
})  # fmt: skip

# Decompositions that break what a batched run needs (they read values, or are not functional).
_NO_DECOMPOSITION: frozenset[str] = frozenset({"aten::empty_like", "aten::new_empty"})


class OpEntry:
    """How one op is batched.

    Attributes:
        strategy: the strategy for a call with a batched argument, or None for the fallbacks.
        kind: FUNCTIONAL, VIEW, INPLACE_KIND (writes to its first argument) or OUT (writes to a keyword).
        op: the op.
        fast: what calls it with positional arguments at the least cost.
        numbers: whether a number as its second argument may be given as a constant.
        aliases: whether the op makes or writes through an alias, so that autograd must see it.
        pointwise: whether the strategy is `align` and there is one result.
        random: whether the op draws random numbers.
        composite: whether torch defines the op by others, with no kernel of its own.
        decomposition: torch's decomposition, or None.
        functional: for an in-place or ``out=`` op, the op without the write.
        data_dependent: the message of the error for a batched argument, or None.
        out_names: the names of the arguments that an ``out=`` op writes.

    """

    __slots__ = (
        "aliases",
        "composite",
        "data_dependent",
        "decomposition",
        "fast",
        "functional",
        "kind",
        "numbers",
        "op",
        "out_names",
        "pointwise",
        "random",
        "strategy",
    )

    def __init__(self, func: Any) -> None:
        schema = func._schema
        self.op = func
        self.fast = FUNCTIONS.get(func._op, func._op)
        self.numbers = self.fast in WITH_NUMBERS
        written = [argument for argument in schema.arguments if argument.is_write]
        self.out_names = [argument.name for argument in written]
        self.random = torch.Tag.nondeterministic_seeded in func.tags
        self.composite = is_composite(func)
        self.decomposition = LATE_DECOMPOSITIONS.get(schema.name)
        if self.decomposition is None and schema.name not in _NO_DECOMPOSITION:
            own = DECOMPOSITIONS.get(func) if func in _OWN_DECOMPOSITIONS else None
            self.decomposition = own or decomposition_table.get(func)
        self.data_dependent = DATA_DEPENDENT.get(func)
        self.functional = None
        self.kind = FUNCTIONAL
        if written:
            self.kind = OUT if all(argument.kwarg_only for argument in written) else INPLACE_KIND
            self.functional = _functional_variant(func, self.kind)
        elif func.is_view:
            self.kind = VIEW
        self.aliases = self.kind != FUNCTIONAL
        self.strategy = self._find_strategy(func)
        self.pointwise = self.strategy is align and len(func._schema.returns) == 1

    def _find_strategy(self, func: Any) -> BatchStrategy | None:
        pointwise = torch.Tag.pointwise in func.tags and not self.random
        if self.kind == INPLACE_KIND:
            found: BatchStrategy | None = INPLACE.get(func)
            if found is None and pointwise and func._schema.arguments[0].is_write:
                found = align_inplace
            return None if found is None else checked_write(found)
        strategy = BATCHING.get(func)
        if strategy is None and pointwise and self.kind == FUNCTIONAL:
            by_keyword = any(a.kwarg_only and "Tensor" in str(a.type) for a in func._schema.arguments)
            lists = any("List[Tensor]" in str(a.type) for a in func._schema.arguments)
            strategy = None if lists else align_kwargs if by_keyword else align
        return strategy


def _functional_variant(func: Any, kind: int) -> Any:
    """``add`` for ``add_``, ``add.Tensor`` for ``add.out``; None if there is none."""
    namespace, _, name = func._schema.name.partition("::")
    overload = func._schema.overload_name
    if kind == INPLACE_KIND:
        if not name.endswith("_"):
            return None
        packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
        if packet is None:
            return None
        same = getattr(packet, overload or "default", None)
        if same is not None:
            return same
        wanted = [(a.name, str(a.type)) for a in func._schema.arguments]
    else:
        packet = getattr(getattr(torch.ops, namespace), name)
        wanted = [(a.name, str(a.type)) for a in func._schema.arguments if not a.is_write]
    for other in packet.overloads():
        candidate = getattr(packet, other)
        arguments = candidate._schema.arguments
        names = [(a.name, str(a.type)) for a in arguments]
        if names[: len(wanted)] == wanted and not any(a.is_write for a in arguments):
            return candidate
    return None


# By the identity of the op, whose own hash is slow; the entry keeps the op alive.
_ENTRIES: dict[int, OpEntry] = {}


def entry_of(func: Any) -> OpEntry:
    """The entry of an op, made at its first use (a pure memo: two threads would make equal ones).

    Raises:
        RuntimeError: if it is one of torch's operators on functions.
    """
    entry = _ENTRIES.get(id(func))
    if entry is None:
        if not isinstance(func, OpOverload):
            raise RuntimeError(refusal_of_operators(f"{func} on functions"))
        entry = _ENTRIES[id(func)] = OpEntry(func)
    return entry
