"""The recorder: every op that reaches it, written down as a program that can be replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch

from chainrule.dispatch import LightMode, undispatched
from chainrule.functions import Function
from chainrule.maps.staging import Program, Staged

aten = torch.ops.aten

#: Ops of which a replay could give something else than the recorded run says.
_UNREPEATABLE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)

#: Ops that update running statistics without saying so in their schema.
HIDDEN_WRITES = frozenset({aten.native_batch_norm.default, aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default})

#: Ops whose answer to Python depends on the kind of tensor only, not on its values.
_QUERIES = frozenset({aten.cudnn_is_acceptable.default})

#: Where the share of the values that an op drops at random stands among its arguments.
_DROPPING = {aten._scaled_dot_product_flash_attention_for_cpu.default: 3}

#: Ops whose results are contiguous and start their memory, whatever the layouts of their arguments.
_OF_OWN_LAYOUT = frozenset({
    aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format, aten.new_zeros.default,
    aten.new_ones.default, aten.new_full.default, aten.new_empty.default,
})  # fmt: skip

#: Ops whose result is their argument.
_ALIASES = frozenset({aten.detach.default, aten.alias.default})

#: Whether an op has to run in each run of the program, by its identity (see :func:`_is_kept`).
_KEPT_OPS: dict[int, tuple[Any, bool]] = {}

#: Whether an op is a composition of others, likewise (see :func:`_is_composite`).
_COMPOSITE_OPS: dict[int, tuple[Any, bool]] = {}

_any_autocast = torch._C._is_any_autocast_enabled

#: The least number of products for a matrix in a stack for which torch asks the library of the processor.
_BY_KERNEL = 400

_RESHAPES = (aten.view.default, aten._unsafe_view.default)

#: Larger constants (in elements) are made anew in each run: indices and masks, and numbers.
_KEPT = 1 << 17
_SMALL = 64


class Recorder(LightMode):
    """Writes down the ops that reach it as a program.

    Args:
        find: gives the input of the program that a tensor stands for, or None when it is none.

    Attributes:
        program: the program so far.
        known: its values, by the identity of their tensors.
        pure: whether a replay on other inputs computes the same: no op read a value into Python, drew a random number or
            used a tensor of unknown origin.
    """

    takes_functions = True
    # Whether a view by strides of memory that the program lays out itself is a view like any other.
    knows_layouts = True

    def __init__(self, find: Callable[[Program, torch.Tensor], Staged | None]) -> None:
        super().__init__()
        self.program = Program()
        self.program.recorded = True
        self.known: dict[int, Staged] = {}
        self.pure = True
        self._find = find
        # How the constants that are views of others are made.
        self._recipes: dict[int, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}
        # The constants by their memory, as far as they were looked at.
        self._in_memory: dict[int, list[int]] = {}
        self._placed = 0
        # The identities of the tensors that are constants, by slot, as far as ``known`` was looked at.
        self._identities: dict[int, list[int]] = {}
        self._identified = 0
        # Slots of values that have the same layout in each run.
        self._laid_out: set[int] = set()
        # The identities in ``known`` must stay taken.
        self._alive: list[Any] = []

    def run_function(self, function: Function, args: tuple[Any, ...]) -> Any:
        """Run a function that is one op on each element, and append the op: what arrives at the dispatcher, without the way."""
        if not function.pointwise or not function.fewest <= len(args) <= function.most or _any_autocast():
            return NotImplemented
        op = function.op
        for number, item in enumerate(args):
            kind = item.__class__
            if kind is torch.Tensor:
                if item.requires_grad or item.is_complex():
                    return NotImplemented
            elif number == 1 and function.number_op is not None and (kind is float or kind is int):
                op = function.number_op
            else:
                return NotImplemented
        if _is_composite(op):
            return NotImplemented
        out = function.call(*args) if self.below is None else self.below.run_function(function, args)
        if out is NotImplemented:
            return out
        self._note(op, self._staged(args), {}, out, args)
        self._alive.append(out)
        return out

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an op and append it."""
        kwargs = kwargs or {}
        written = self._written(func, args, kwargs) if func._schema.is_mutable or func in HIDDEN_WRITES else []
        out = func(*args, **kwargs)
        if func in _QUERIES:
            return out
        if func is aten.as_strided.default and not kwargs and (windows := _windows(*args)) is not None:
            func, args = aten.unfold.default, (args[0], *windows)
        lowered = self._staged(args)
        named = {name: self._staged((item,))[0] for name, item in kwargs.items()}
        # Without a result: a write, or a check that raises.
        if not (out is None or isinstance(out, torch.Tensor) or (isinstance(out, (list, tuple)) and _all_tensors(out))):
            # A value read into Python; ops on dtypes and shapes have no tensor among their arguments.
            self._on_read(func, _staged_in((lowered, tuple(named.values()))))
        else:
            self._note(func, lowered, named, out, args, written)
        self._alive.append(out)
        return out

    def _note(
        self, func: Any, lowered: tuple[Any, ...], named: dict[str, Any], out: Any, args: tuple[Any, ...],
        written: Sequence[torch.Tensor] = (),
    ) -> None:  # fmt: skip
        """Write down an op that ran: as a call, or its result as a constant."""
        keep = _is_kept(func) and not (
            _is_gather(func, args) or _draws_nothing(func, args) or self._has_fixed_shape(func, lowered, named)
            or self._has_fixed_layout(func, lowered)
        )
        if keep:
            self._on_unrepeatable(func)
        keep = keep or (out is None and not written)
        if func is aten.bmm.default and args[0].shape[1] * args[0].shape[2] * args[1].shape[2] >= _BY_KERNEL:
            lowered = tuple([self._as_matrices(one, item) for one, item in zip(args, lowered, strict=True)])
        two = func is aten.mul.Tensor and isinstance(args[0], torch.Tensor) and isinstance(args[1], torch.Tensor)
        if two and args[0].numel() < args[1].numel():
            lowered = lowered[::-1]  # the larger one first decides how torch walks through the result
        if not (keep or written) and isinstance(out, torch.Tensor) and self._is_fixed(out, lowered, named):
            same = func in _ALIASES
            self.known[id(out)] = staged = lowered[0] if same else self.program.constant(out)
            if func.is_view and not same:
                self._recipes[staged.slot] = (func, lowered, named)
        else:
            slots = tuple([staged.slot for t in written if (staged := self.known.get(id(t))) is not None])
            self._append(func, lowered, named, out, slots, keep=keep)
        laid_out = func in _OF_OWN_LAYOUT or (func in _ALIASES and lowered[0].slot in self._laid_out)
        if laid_out and out.__class__ is torch.Tensor and out.is_contiguous():
            self._laid_out.add(self.known[id(out)].slot)

    def _as_matrices(self, tensor: torch.Tensor, staged: Staged) -> Staged:
        """A stack of matrices, copied where torch would multiply them one by one: both their strides are other than 1."""
        _, rows, columns = tensor.shape
        _, down, along = tensor.stride()
        own = tensor.__class__ is torch.Tensor and tensor.is_cpu and len(tensor) > 1
        if not own or (along == 1 and (rows == 1 or down >= columns)) or (down == 1 and (columns == 1 or along >= rows)):
            return staged
        made: dict[int, Staged] = {}
        with undispatched():
            copy = tensor.clone(memory_format=torch.contiguous_format)
        self.program.append(torch.clone, (staged,), {"memory_format": torch.contiguous_format}, copy, made)
        self._alive.append(copy)
        return made[id(copy)]

    def _on_read(self, func: Any, read: list[Staged]) -> None:
        """A value of the program was read into Python."""
        self.pure = self.pure and not read

    def _on_unrepeatable(self, func: Any) -> None:
        """A replay of an op could give something else."""
        self.pure = False

    def _on_unknown(self, tensor: torch.Tensor) -> None:
        """A tensor of unknown origin was used; it is a constant of the program."""
        self.pure = False

    def _on_shared_write(self, func: Any) -> None:
        """A write to memory that several constants share."""
        self.pure = False

    def _written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The tensors that an op writes to. A constant that is about to be written becomes a copy of itself."""
        constants = self.program.constants
        written: list[torch.Tensor] = []
        if func in HIDDEN_WRITES:
            # Running statistics: the fourth and the fifth argument, if the sixth says that this is training.
            written.extend(t for t in args[3:5] if isinstance(t, torch.Tensor) and args[5])
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            target = args[position] if position < len(args) else kwargs.get(argument.name)
            written.extend(t for t in (target if isinstance(target, (list, tuple)) else (target,)) if isinstance(t, torch.Tensor))
        for tensor in written:
            known = self.known.get(id(tensor))
            if known is None:
                self._staged((tensor,))
            elif known.slot in constants:
                self._unfold(constants[known.slot].untyped_storage()._cdata, func)
        return written

    def _unfold(self, memory: int, func: Any) -> None:
        """Constants of one memory, about to be written: from here on they are a copy, and views of that copy."""
        constants, copies = self.program.constants, dict[int, Staged]()
        for slot in islice(constants, self._placed, None):
            self._in_memory.setdefault(constants[slot].untyped_storage()._cdata, []).append(slot)
        self._placed = len(constants)
        shared = self._in_memory[memory]
        for number, slot in enumerate(shared):
            tensor = constants[slot]
            recipe = self._recipes.get(slot)
            if (recipe is None) != (number == 0):
                self._on_shared_write(func)
                return
            made: dict[int, Staged] = {}
            if recipe is None:
                self.program.append(torch.clone, (Staged(self.program, slot, tensor),), {}, tensor, made)
            else:
                function, args, kwargs = recipe
                self._append(function, [copies.get(a.slot, a) if isinstance(a, Staged) else a for a in args], kwargs, tensor,
                             (), keep=False, known=made)  # fmt: skip
            copies[slot] = made[id(tensor)]
        for slot in shared:
            constants[slot] = kept = constants[slot].clone()
            self._alive.append(kept)
        del self._in_memory[memory]
        self._rename(copies)

    def _rename(self, copies: dict[int, Staged]) -> None:
        """Tensors that were constants are something else from here on, by the slots that they had."""
        for identity, staged in islice(self.known.items(), self._identified, None):
            if staged.slot in self.program.constants:
                self._identities.setdefault(staged.slot, []).append(identity)
        self._identified = len(self.known)
        for slot, copy in copies.items():
            if slot in self._laid_out:
                self._laid_out.add(copy.slot)
            for identity in self._identities.pop(slot, ()):
                if self.known[identity].slot == slot:
                    self.known[identity] = copy

    def _append(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        out: Any,
        writes: tuple[int, ...],
        *,
        keep: bool,
        known: dict[int, Staged] | None = None,
    ) -> None:
        known = self.known if known is None else known
        program = self.program
        before = program._slots
        # The strides of a replay may be others: `reshape` makes do with all that `view` did with those of this run.
        function = aten.reshape.default if func in _RESHAPES else func
        program.overloads[function._op] = function
        program.append(function._op, tuple(args), kwargs, out, known, writes=writes, keep=keep)
        if func.is_view:
            program.views.update(range(before, program._slots))
            if func is aten.view.default:
                program.strict.update(range(before, program._slots))
                program.overloads[aten.view.default._op] = aten.view.default
        elif func is aten.mul.Tensor:
            # A product with ones (the cotangent of a scalar) is the other factor.
            for one, other in ((args[0], args[1]), (args[1], args[0])):
                if _is_one(program, one) and isinstance(other, Staged) and _same(other.value, out):
                    program.copies[self.known[id(out)].slot] = other.slot
                    break

    def _has_fixed_shape(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether an op whose result's shape depends on values has constants only (a mask that was made of shapes)."""
        if torch.Tag.dynamic_output_shape not in func.tags or torch.Tag.nondeterministic_seeded in func.tags:
            return False
        return all(staged.slot in self.program.constants for staged in _staged_in((args, tuple(kwargs.values()))))

    def _has_fixed_layout(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Whether an op is a view by strides of memory that is laid out alike in each run, at a place that is given."""
        return (
            self.knows_layouts and func is aten.as_strided.default and len(args) == 4 and args[3] is not None
            and args[0].slot in self._laid_out
        )

    def _is_fixed(self, out: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a result is an index, a mask or a small number that is the same in every run: it is kept."""
        constants = self.program.constants
        if any([item.__class__ is Staged and item.slot not in constants for item in args]):
            return False
        number = out.dtype.is_floating_point or out.dtype.is_complex
        if out.numel() > (_SMALL if number else _KEPT) or id(out) in self.known or out.__class__ is not torch.Tensor:
            return False
        return all(staged.slot in constants for staged in _staged_in((args, tuple(kwargs.values()))))

    def staged(self, tensor: torch.Tensor) -> Staged | None:
        """What a tensor is in the program: a value of it, an input, or None."""
        found = self.known.get(id(tensor))
        if found is None:
            found = self._find(self.program, tensor)
            if found is not None:
                self.known[id(tensor)] = found
                self._alive.append(tensor)
        return found

    def _staged(self, items: Sequence[Any]) -> tuple[Any, ...]:
        found: list[Any] = []
        for item in items:
            if isinstance(item, torch.Tensor):
                known = self.staged(item)
                if known is None:
                    self._on_unknown(item)
                    known = self.known[id(item)] = self.program.constant(item)
                    self._alive.append(item)
                found.append(known)
            elif isinstance(item, (list, tuple)):
                found.append(list(self._staged(item)))
            else:
                found.append(item)
        return tuple(found)


def _windows(
    base: torch.Tensor, size: Sequence[int], strides: Sequence[int], offset: int | None = None
) -> tuple[int, int, int] | None:
    """The windows along a dimension that a view by strides is, as ``stft`` makes it: dimension, size and step; else None."""
    own, shape = base.stride(), base.shape
    if len(size) != len(shape) + 1 or offset not in (None, base.storage_offset()):
        return None
    for dim, (stride, length) in enumerate(zip(own, shape, strict=True)):
        if stride > 0 and strides[-1] == stride and strides[dim] >= stride and strides[dim] % stride == 0 and size[-1] <= length:
            step = strides[dim] // stride
            count = (length - size[-1]) // step + 1
            if [*size[:-1]] == [*shape[:dim], count, *shape[dim + 1 :]] and [*strides[:-1]] == [
                *own[:dim], strides[dim], *own[dim + 1 :]
            ]:
                return dim, size[-1], step
    return None


def _is_gather(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an op reads at places given by whole numbers: with masks among them its result's shape depends on values."""
    return func is aten.index.Tensor and all(i is None or i.dtype not in (torch.bool, torch.uint8) for i in args[1])


def _draws_nothing(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an op that may drop values at random drops none."""
    place = _DROPPING.get(func)
    return place is not None and (len(args) <= place or args[place] == 0.0)


def _is_kept(func: Any) -> bool:
    """Whether a replay of an op could give something else than the recorded run says."""
    known = _KEPT_OPS.get(id(func))
    if known is None:
        keep = func is aten.as_strided.default or any(tag in func.tags for tag in _UNREPEATABLE)
        known = _KEPT_OPS[id(func)] = (func, keep)  # the overload stays alive, and with it its identity
    return known[1]


def _is_composite(op: Any) -> bool:
    """Whether an op arrives at the dispatcher in parts."""
    known = _COMPOSITE_OPS.get(id(op))
    if known is None:
        known = _COMPOSITE_OPS[id(op)] = (op, op._can_decompose())
    return known[1]


def _is_one(program: Program, item: Any) -> bool:
    if not isinstance(item, Staged):
        return False
    constant = program.constants.get(item.slot)
    return constant is not None and constant.numel() <= _SMALL and bool((constant == 1).all())


def _same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return tensor.shape == other.shape and tensor.dtype == other.dtype and tensor.device == other.device


def _staged_in(tree: Any) -> list[Staged]:
    found: list[Staged] = []
    stack = [tree]
    while stack:
        item = stack.pop()
        if isinstance(item, Staged):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
    return found


def _all_tensors(items: Sequence[Any]) -> bool:
    return all(item is None or isinstance(item, torch.Tensor) for item in items)
