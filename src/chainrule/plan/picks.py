"""Constants of a tape that hold what an op chose.

The gradient of an extremum is its cotangent times the shares of the elements in it. These are found by comparing, and so are
constant where a second derivative is taken: the tape of that has their values, and nothing of how they came about. They are zero
wherever the op's own derivative is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from chainrule.maps.nodes import Node
from chainrule.maps.sparse import SparseWorkspace
from chainrule.maps.unmapped import unbatched
from chainrule.plan.graph import Graph

aten = torch.ops.aten

#: Ops that move elements and do nothing else to them: a gradient may hold the shares at the places from where they were moved.
_MOVES = frozenset(
    {
        aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.squeeze.default, aten.squeeze.dim,
        aten.squeeze.dims, aten.unsqueeze.default, aten.slice.Tensor, aten.select.int, aten.transpose.int, aten.t.default,
        aten.permute.default, aten.flip.default, aten.roll.default, aten.clone.default, aten.alias.default,
        aten.diagonal.default, aten.unfold.default, aten.index_select.default, aten.gather.default, aten.take.default,
        aten.index.Tensor,
    }
)  # fmt: skip


def picked_slots(tape: Any, graph: Graph, workspace: SparseWorkspace) -> frozenset[int]:
    """The slots of constants made from the inputs that are zero wherever an op of the graph did not choose.

    None where the pattern does not depend on what ops choose. A constant that has these zeros for another reason is taken for
    such shares as well: the plan is for its zeros then, too, and compares them in every call.
    """
    if not tape.derived or not workspace.chosen or workspace.everywhere or not (choices := list(_choices(graph))):
        return frozenset()
    open_slots = {slot: places for slot in tape.derived - workspace.widened if (places := _places(tape, slot)) is not None}
    if not open_slots:
        return frozenset()
    made_by = {output: record for record in tape.records for output in record.outputs}
    every: dict[tuple[int, torch.device], list[torch.Tensor]] = {}
    for source, node in choices:
        if (value := unbatched(node.force(workspace.program).value)) is not None:
            for chosen in _before_moves(tape, made_by, source, value.reshape(-1) != 0):
                every.setdefault((chosen.numel(), chosen.device), []).append(chosen)
    return frozenset(
        slot for slot, places in open_slots.items() if _are_chosen(places, every.get((places.numel(), places.device), []))
    )


def _places(tape: Any, slot: int) -> torch.Tensor | None:
    """Where a constant is other than zero, flat; None for an index, and where it has no zeros."""
    value = tape.values[slot]
    if value.__class__ is not torch.Tensor or value.layout is not torch.strided or tape.active[slot]:
        return None
    if not (value.dtype.is_floating_point or value.dtype is torch.bool):
        return None
    places: torch.Tensor = value.reshape(-1) != 0
    return None if bool(places.all()) else places


def _are_chosen(places: torch.Tensor, every: list[torch.Tensor]) -> bool:
    """Whether these are places that an op chose: all, some (of a product of several shares), or those of several (a sum)."""
    if any(torch.equal(places, chosen) for chosen in every):
        return True
    if not bool(places.any()):
        return False
    rest = places.clone()
    for chosen in every:
        if not bool((places & ~chosen).any()):
            return True
        if not bool((chosen & ~places).any()):
            rest &= ~chosen
    return not bool(rest.any())


def _choices(graph: Graph) -> Iterator[tuple[int, Node]]:
    """What ops chose, and the slots from which."""
    for edges in graph.into.values():
        for source, local in edges:
            for term in local.terms:
                yield from ((source, factor.node) for factor in term.factors if factor.node.is_choice)


def _before_moves(tape: Any, made_by: dict[int, Any], slot: int, chosen: torch.Tensor) -> Iterator[torch.Tensor]:
    """Chosen places of a value, and the same of those that it was moved from."""
    yield chosen
    while chosen.numel() == tape.values[slot].numel() and (record := made_by.get(slot)) is not None and record.op in _MOVES:
        origin = record.args[0].index
        before = tape.values[origin]
        numbers = torch.arange(before.numel(), device=chosen.device).reshape(before.shape)
        moved = record.op(numbers, *[_plain(tape, item) for item in record.args[1:]], **dict(record.kwargs))
        counts = torch.zeros(before.numel(), dtype=torch.long, device=chosen.device)
        slot, chosen = origin, counts.index_add(0, moved.reshape(-1), chosen.to(torch.long)) != 0
        yield chosen


def _plain(tape: Any, item: Any) -> Any:
    """An argument of an op with values for slots."""
    if isinstance(item, tuple | list):
        return [_plain(tape, element) for element in item] if type(item) in (tuple, list) else tape.values[item.index]
    return item


__all__ = ["picked_slots"]
