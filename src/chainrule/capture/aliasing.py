"""Writes to memory made functional: after a write, the written tensor and every view of its memory are new values.

A write is really executed (the user sees the memory change), and recorded as the functional op that gives the same
values. The new value then travels up the chain of views to the tensor that owns the memory (``select_scatter`` and its
like) and from there, on demand, down to every other view.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch._ops import OpOverload

from chainrule.capture.schema import OpFacts
from chainrule.capture.slots import Slot, slot_object
from chainrule.capture.view_tables import (
    ALWAYS_VIEWS,
    EXPANDED_WRITES,
    IN_PLACE_VIEWS,
    INVERSES,
    OTHER_NUMBERS,
    OVERLAPPING,
    SCATTERS,
    SCATTERS_BY_ID,
)
from chainrule.dispatch import again
from chainrule.modes_off import without_mode
from chainrule.shortcuts import configure

if TYPE_CHECKING:
    from chainrule.capture.tape import Tape

aten = torch.ops.aten


class Link(NamedTuple):
    """How a view was made: ``view = op(parent, *args, **kwargs)`` (its ``output``-th result)."""

    view: torch.Tensor
    parent: torch.Tensor
    op: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class AliasTracker:
    """The views that were made while a tape was active, and what writes do to them."""

    def __init__(self, tape: Tape) -> None:
        # Weak, so that a tape is freed with its last user and not by the garbage collector.
        self._tape = weakref.ref(tape)
        self.links: dict[int, Link] = {}
        self.roots: dict[int, torch.Tensor] = {}
        self.families: dict[int, list[torch.Tensor]] = {}
        self.has_writes = False
        self._read_slots: set[int] = set()
        self._scanned = 0

    @property
    def tape(self) -> Tape:
        """The tape that this belongs to."""
        tape = self._tape()
        assert tape is not None
        return tape

    def _settle_views(self) -> None:
        pending = self.tape.pending
        for op, args, kwargs, out in pending:
            self._note_view(op, args, kwargs or {}, out)
        pending.clear()

    def _note_view(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Remember that ``out`` is a view of the first argument."""
        parent = args[0]
        if isinstance(out, torch.Tensor):
            # ``reshape`` and ``contiguous`` may have made a copy.
            if out is not parent and ((id(op) in ALWAYS_VIEWS and _are_own(out, parent)) or _shares_memory(out, parent)):
                self._link(out, parent, op, args[1:], kwargs)
            return
        for position, view in enumerate(out):
            self._link(view, parent, *_one_of_many(op, args, kwargs, position, out))

    def _link(
        self, view: torch.Tensor, parent: torch.Tensor, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.links[id(view)] = Link(view, parent, op, args, kwargs)
        root = self.roots.get(id(parent), parent)
        self.roots[id(view)] = root
        self.families.setdefault(id(root), []).append(view)

    def note_same(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Note that a tensor of another class is a value: writes to either are writes to both."""
        if tensor is not value and id(tensor) not in self.links and id(tensor) not in self.families:
            self._link(tensor, value, aten.alias.default, (), {})

    def resolve(self, tensor: torch.Tensor) -> int | None:
        """The slot of a view whose memory was written through another tensor: read it anew from its parent."""
        slot = self.tape.slots.get(id(tensor))
        if slot is not None:
            return slot
        self._settle_views()
        link = self.links.get(id(tensor))
        if link is None:
            return None
        parent = self.resolve(link.parent)
        if parent is None:
            return None
        slot = self.tape.record_value(link.op, (parent,), link.args, link.kwargs, tensor)
        root = self.roots[id(tensor)]
        self.families.setdefault(id(root), []).append(tensor)
        return slot

    def kept_view(self, tensor: torch.Tensor, slot: int, turned: bool) -> int | None:
        """The slot of a view of the value in ``slot`` that torch's autograd made by itself; None for one that a view op made.

        Args:
            tensor: the view.
            slot: the value's.
            turned: whether it is the transpose of the value.
        """
        self._settle_views()
        tape = self.tape
        if id(tensor) in self.links or not tape.active[slot]:
            return None
        if turned:
            return tape.record_value(aten.t.default, (slot,), (), {}, tensor)
        if tape.values[slot].shape == tensor.shape:
            return slot
        return tape.record_value(aten.view.default, (slot,), ([*tensor.shape],), {}, tensor)

    def chain(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensor, what it is a view of, what that is a view of, and so on."""
        self._settle_views()
        found = [tensor]
        while (link := self.links.get(id(found[-1]))) is not None:
            found.append(link.parent)
        return found

    def run_write(self, op: OpOverload, facts: OpFacts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Execute an op that writes to its arguments and record what it did as new values."""
        tape = self.tape
        self._settle_views()
        written = self._written(facts, args, kwargs)
        known = any(id(t) in tape.slots or id(t) in self.links or id(t) in self.families for t in written)
        inputs = args
        if facts.is_out:
            kwargs_in = {name: item for name, item in kwargs.items() if name not in facts.writes}
        else:
            kwargs_in = kwargs
        touched = tape.touches(inputs) or tape.touches(kwargs_in.values())
        if not touched and not known:
            return tape.outside(op, *args, **kwargs)
        if op in IN_PLACE_VIEWS:
            return self._turn_into_view(op, args, kwargs)
        if op in EXPANDED_WRITES:
            with again(tape):
                return EXPANDED_WRITES[op](*args, **kwargs)
        if facts.functional is None and touched and facts.random and op._can_decompose():
            with again(tape):  # dropout keeps a part of the values
                return op.decompose(*args, **kwargs)
        blocked = tape.is_blocked(args, kwargs)
        constant = facts.functional is None or blocked or not touched or tape.facts(facts.functional).inactive
        if facts.functional is None and touched and any(tape.is_active(t) for t in written) and not _is_random(op):
            raise RuntimeError(f"chainrule: {op} writes to a tensor that depends on the inputs and has no functional form")
        lowered = None if constant else (tape.lower(inputs), tape.lower_kwargs(kwargs_in))
        if lowered is not None and facts.functional is not None and tape.reads_values(facts.functional):
            _collect_slots(lowered[0], self._read_slots)
        shapes = [tensor.shape for tensor in written]
        reshaping = torch.Tag.inplace_view in op.tags
        for tensor in written:
            if reshaping:
                self._keep_shape(tensor)
            else:
                self._save_old(tensor)
        # As in torch, a write under no_grad changes the memory and not the derivative.
        hidden = blocked and not reshaping and not facts.is_out
        roots = [self.roots.get(id(tensor), tensor) for tensor in written]
        kept = [self.resolve(root) if hidden and tape.is_active(root) else None for root in roots]
        if op is aten.detach_.default:
            # For the transforms around this one the tensor stays what it is.
            tape.saw_blocked = tape.saw_cut = True
            result = args[0]
        else:
            result = tape.outside(op, *args, **kwargs)
        self.has_writes = True
        if constant:
            for tensor, root, slot in zip(written, roots, kept, strict=True):
                if slot is None:
                    self._forget(tensor)
                else:
                    self._climb(root, tape.record_value(aten.alias.default, (slot,), (), {}, root))
            return result
        assert lowered is not None
        assert facts.functional is not None
        self._publish(facts.functional, lowered, written, shapes, reshaping, result)
        return result

    def write_plainly(self, facts: OpFacts, args: tuple[Any, ...]) -> Any:
        """The commonest writes, to one plain tensor that depends on the inputs and keeps its shape: as :meth:`run_write`.

        Returns:
            The written tensor; NotImplemented, with nothing written, for other calls.
        """
        tape, target, functional = self.tape, args[0], facts.functional
        if functional is None or not facts.rewrites or not target.dtype.is_floating_point:
            return NotImplemented
        if tape.pending:
            self._settle_views()
        if not tape.touches(args):
            if id(target) in tape.slots or id(target) in self.links or id(target) in self.families:
                return NotImplemented
            return tape.run_seen(facts.fast, args)
        twin = tape.facts(functional)
        if facts.random or twin.inactive or (tape.respect_no_grad and not torch.is_grad_enabled()):
            return NotImplemented
        lowered = tape.lower(args)
        if twin.reads or (twin.reads is None and tape.reads_values(functional)):
            _collect_slots(lowered, self._read_slots)
        self._save_old(target)
        tape.run_seen(facts.fast, args)
        self.has_writes = True
        tape.append_record(twin, lowered, (), target)
        self._climb(target, len(tape.values) - 1)
        return target

    def assign(self, target: torch.Tensor, parts: list[tuple[OpOverload, tuple[int, ...]]], value: torch.Tensor) -> bool:
        """Write to a part of a tensor of the vmap below the tape, which nobody sees the views of that lead there.

        Args:
            target: the tensor.
            parts: the views, one of the other, that choose the part; with their arguments.
            value: what is written; it may be narrower than the part.

        Returns:
            False, with nothing written, for what the level leaves to torch, where constants replace what is known, and where the
            tensor shows one place of memory several times.
        """
        tape = self.tape
        level: Any = tape.below
        changes = tape.is_active(value)
        if (not changes and tape._derived) or any([self.links[id(one)].op in OVERLAPPING for one in self.chain(target)[:-1]]):
            return False
        known = id(target) in tape.slots or id(target) in self.links or id(target) in self.families
        if not changes and not (known and tape.is_active(target)):
            return not known and level.write_part(target, parts, value) is not None
        with without_mode(tape):
            found = level.choose(target, parts, value)
            if found is None:
                return False
            views, part, wide = found
            slot = tape._slot_or_constant(value if changes else wide)
            if changes and wide is not value:
                slot = tape.record_value(aten.expand.default, (slot,), ([*wide.shape],), {}, wide)
            old = self.resolve(target)
            olds = [tape.constant(target) if old is None else old]
            for (op, args), view in zip(parts, views, strict=False):
                olds.append(tape.record_value(op, (olds[-1],), args, {}, view))
            self._save_old(target)
            level.copy_part(part, wide)
            self.has_writes = True
            for place in reversed(range(len(parts))):
                op, args = parts[place]
                parent = views[place - 1] if place else target
                scatter = SCATTERS_BY_ID.get(id(op))
                if scatter is None:
                    back, args = INVERSES[op](parent, args)
                    slot = tape.record_value(back, (slot,), args, {}, parent)
                    continue
                lowered = slot_object(olds[place]), slot_object(slot), *args
                if tape.active[olds[place]] or tape.active[slot]:
                    tape.append_record(tape.facts(scatter), lowered, (), parent)
                    slot = len(tape.values) - 1
                else:
                    slot = tape.constant(parent)
            self._climb(target, slot)
        return True

    def _publish(
        self,
        functional: OpOverload,
        lowered: tuple[Any, Any],
        written: list[torch.Tensor],
        shapes: list[torch.Size],
        reshaping: bool,
        result: Any,
    ) -> None:
        tape = self.tape
        # Ops that return something besides what they write (batch norm): the functional form returns both, in this order.
        results = list(result) if isinstance(result, (list, tuple)) else [result]
        extra = results if len(functional._schema.returns) == len(results) + len(written) else []
        slots = tape.record_lowered(functional, *lowered, [*extra, *written])
        for tensor, slot in zip(extra, slots, strict=False):
            tape.slots[id(tensor)] = slot
        slots = slots[len(extra) :]
        for tensor, slot, shape in zip(written, slots, shapes, strict=True):
            if tensor.shape != shape or reshaping:
                # An in-place change of shape (``squeeze_``), or an out= argument that was resized: it owns its memory from
                # now on.
                self.links.pop(id(tensor), None)
                self.roots.pop(id(tensor), None)
            self._climb(tensor, slot)

    def _turn_into_view(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An in-place change of shape: the tensor becomes a view of a stand-in that takes its former place."""
        tape, tensor = self.tape, args[0]
        slot = tape.slot_of(tensor)
        stand_in = tape.outside(aten.alias.default, tensor)
        self._replace(tensor, stand_in)
        for number, value in enumerate(tape.values):
            if value is tensor:
                tape.values[number] = stand_in
        tape.kept.extend((tensor, stand_in))
        if tape.slots.pop(id(tensor), None) is not None or slot is not None:
            assert slot is not None
            tape.slots[id(stand_in)] = slot
        result = tape.outside(op, *args, **kwargs)
        self._link(tensor, stand_in, IN_PLACE_VIEWS[op], args[1:], kwargs)
        self.has_writes = True
        if slot is not None:
            tape.record_value(IN_PLACE_VIEWS[op], (slot,), args[1:], kwargs, tensor)
        return result

    def _replace(self, tensor: torch.Tensor, stand_in: torch.Tensor) -> None:
        """Let ``stand_in`` take the place of ``tensor`` among the views."""
        old, new = id(tensor), id(stand_in)
        if old in self.links:
            self.links[new] = self.links.pop(old)._replace(view=stand_in)
            self.roots[new] = self.roots.pop(old)
        for key, link in self.links.items():
            if link.parent is tensor:
                self.links[key] = link._replace(parent=stand_in)
        for key, root in self.roots.items():
            if root is tensor:
                self.roots[key] = stand_in
        if old in self.families:
            self.families[new] = self.families.pop(old)
        for root_id, members in self.families.items():
            self.families[root_id] = [stand_in if member is tensor else member for member in members]

    def _written(self, facts: OpFacts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        written: list[torch.Tensor] = []
        for name in facts.writes:
            position = facts.argument_names.index(name)
            item = args[position] if position < len(args) else kwargs.get(name)
            if isinstance(item, torch.Tensor):
                written.append(item)
            elif isinstance(item, (list, tuple)):
                written.extend(t for t in item if isinstance(t, torch.Tensor))
        return written

    def _family(self, tensor: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        root = self.roots.get(id(tensor), tensor)
        return root, self.families.get(id(root), [])

    def _save_old(self, tensor: torch.Tensor) -> None:
        """Keep copies of the old values that some derivative reads, before the memory is overwritten."""
        tape = self.tape
        root, members = self._family(tensor)
        self._scan_reads()
        for member in {id(m): m for m in (root, *members)}.values() if members else (root,):
            slot = tape.slots.get(id(member))
            if slot is not None and slot in self._read_slots and tape.values[slot] is member:
                clone = tape.outside(torch.clone, member) if member.requires_grad else tape.run_seen(torch.clone, (member,))
                self._stand_in(slot, clone)
                tape.kept.append(member)

    def _keep_shape(self, tensor: torch.Tensor) -> None:
        """Keep the tape's value as it was before its shape is changed in place."""
        tape = self.tape
        slot = tape.slots.get(id(tensor))
        if slot is not None and tape.values[slot] is tensor:
            self._stand_in(slot, tape.outside(aten.alias.default, tensor))
            tape.kept.append(tensor)

    def _stand_in(self, slot: int, tensor: torch.Tensor) -> None:
        """Let another tensor hold the value of a slot; whoever computes with it later computes with that slot."""
        self.tape.values[slot] = tensor
        self.tape.slots[id(tensor)] = slot

    def _scan_reads(self) -> None:
        tape = self.tape
        known = tape._facts
        for record in tape.records[self._scanned :]:
            facts = known.get(id(record.op))
            if tape.reads_values(record.op) if facts is None or facts.reads is None else facts.reads:
                self._read_slots.update(record.outputs)
                _collect_slots(record.args, self._read_slots)
                if record.kwargs:
                    _collect_slots([item for _, item in record.kwargs], self._read_slots)
        self._scanned = len(tape.records)

    def _forget(self, tensor: torch.Tensor) -> None:
        """The memory now holds constants: a later use of any of its tensors is a new constant."""
        root, members = self._family(tensor)
        slots = self.tape.slots
        link = self.links.get(id(tensor))
        if link is None:
            for member in (root, *members):
                self.tape.kept.append(member)
                slots.pop(id(member), None)
            return
        if any(id(m) in slots for m in (root, *members)):
            # Part of a known tensor became constant: the rest of it did not.
            self._climb(tensor, self._fresh_constant(tensor))

    def _fresh_constant(self, tensor: torch.Tensor) -> int:
        self.tape.slots.pop(id(tensor), None)
        return self.tape.constant(tensor)

    def _climb(self, tensor: torch.Tensor, slot: int) -> None:
        """Write the new value of a view back into its parents, and make every other view of the memory stale."""
        tape = self.tape
        chain = [tensor]
        link = self.links.get(id(tensor))
        while link is not None:
            path = self._overlapping_path(link)
            parent = path[-1].parent
            old = self.resolve(parent)
            if old is None:
                old = tape.constant(parent)
            if path[-1] is link and path[-1].op not in OVERLAPPING:
                slot = self._write_back(link, old, slot, parent)
            else:
                slot = self._write_places(path, old, slot)
            chain.append(parent)
            link = self.links.get(id(parent))
        root, members = self._family(tensor)
        if not members:
            return
        on_chain = {id(t) for t in chain}
        stale = [m for m in members if id(m) not in on_chain]
        for member in stale:
            tape.kept.append(member)
            tape.slots.pop(id(member), None)
        self.families[id(root)] = [m for m in members if id(m) in on_chain]

    def _overlapping_path(self, link: Link) -> list[Link]:
        """The link alone, or the links up to the last one above it whose view shows one place of memory several times."""
        path, last = [link], 0
        while (above := self.links.get(id(path[-1].parent))) is not None:
            path.append(above)
            if above.op in OVERLAPPING:
                last = len(path) - 1
        return path[: last + 1]

    def _write_places(self, path: list[Link], old: int, slot: int) -> int:
        """Record a tensor's new value where views between it and the written one show one place of memory several times.

        Those between are read anew from it later: a write to one row of ``x.expand(3, n)`` is seen in all of them.
        """
        tape, parent = self.tape, path[-1].parent
        if parent.ndim == 0:
            return tape.record_value(aten.view.default, (slot,), ((),), {}, parent)
        places = tape.outside(torch.arange, parent.numel(), device=parent.device).view(parent.shape)
        for link in reversed(path):
            if link.op in OTHER_NUMBERS:
                raise RuntimeError(f"chainrule: in-place write through views by {path[-1].op} and {link.op} is not supported")
            places = tape.outside(link.op, places, *link.args, **link.kwargs)
        indices = tuple(slot_object(tape.constant(i)) for i in torch.unravel_index(places, tuple(parent.shape)))
        if not (tape.active[old] or tape.active[slot]):
            return tape.constant(parent)
        lowered = slot_object(old), indices, slot_object(slot)
        return tape.record_lowered(aten.index_put.default, lowered, (), [parent])[0]

    def _write_back(self, link: Link, parent_slot: int, slot: int, parent: torch.Tensor) -> int:
        """Record the parent's new value: its old one with the view's new value written into it."""
        tape = self.tape
        scatter = SCATTERS_BY_ID.get(id(link.op))
        if scatter is not None and not link.kwargs and (tape.active[parent_slot] or tape.active[slot]) and _are_own(parent):
            lowered = slot_object(parent_slot), slot_object(slot), *tape.lower(link.args)
            tape.append_record(tape.facts(scatter), lowered, (), parent)
            return len(tape.values) - 1
        if link.op in (aten.detach.default,):
            # Writing through .detach() or .data changes the memory and not the derivative.
            return tape.record_value(aten.alias.default, (parent_slot,), (), {}, parent)
        scatter = SCATTERS.get(link.op)
        if scatter is not None:
            return tape.record_value(scatter, (parent_slot, slot), link.args, link.kwargs, parent)
        inverse = INVERSES.get(link.op)
        if inverse is None:
            raise RuntimeError(f"chainrule: in-place write through a view made by {link.op} is not supported")
        op, arguments = inverse(parent, link.args)
        return tape.record_value(op, (slot,), arguments, {}, parent)


def _collect_slots(tree: Any, into: set[int]) -> None:
    for item in tree:
        if item.__class__ is Slot:
            into.add(item[0])
        elif item.__class__ is tuple or item.__class__ is list:
            _collect_slots(item, into)


def _is_random(op: OpOverload) -> bool:
    return torch.Tag.nondeterministic_seeded in op.tags


def _one_of_many(
    op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], position: int, outputs: Any
) -> tuple[OpOverload, tuple[Any, ...], dict[str, Any]]:
    """The single view op that gives one result of ``split``, ``unbind`` and their like."""
    name = op._schema.name
    arguments = dict(zip((a.name for a in op._schema.arguments), args, strict=False)) | kwargs
    dim = arguments.get("dim", 0)
    if name == "aten::unbind":
        return aten.select.int, (dim, position), {}
    if name in ("aten::split", "aten::split_with_sizes", "aten::chunk", "aten::tensor_split"):
        start = sum(o.shape[dim] for o in outputs[:position])
        return aten.slice.Tensor, (dim, start, start + outputs[position].shape[dim], 1), {}
    return op, args[1:], kwargs


def _shares_memory(view: torch.Tensor, parent: torch.Tensor) -> bool:
    view, parent = _stored(view), _stored(parent)
    if type(view) is not torch.Tensor or type(parent) is not torch.Tensor or view.layout != torch.strided:
        return True
    if parent.layout != torch.strided:
        return False  # the entries of a constant sparse tensor
    return view.untyped_storage()._cdata == parent.untyped_storage()._cdata


def _are_own(*tensors: torch.Tensor) -> bool:
    """Whether tensors are torch's own, of floating-point numbers, each at its place in memory."""
    return all([t.__class__ is torch.Tensor and t.layout is torch.strided and t.dtype.is_floating_point for t in tensors])


def _stored(tensor: Any) -> Any:
    """The plain tensor behind the wrappers of batches."""
    while type(tensor) is not torch.Tensor and isinstance(getattr(tensor, "value", None), torch.Tensor):
        tensor = tensor.value
    return tensor


configure(always_views=ALWAYS_VIEWS, scatters=SCATTERS_BY_ID, link=Link)
