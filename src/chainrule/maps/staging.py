"""Staged tensors: write a computation once as ordinary torch code, run it now and replay it later.

A :class:`Program` is a straight line of calls.  A :class:`Staged` stands for one value of it.  Torch functions and
operators applied to a staged value run at once on the real tensor behind it *and* append one instruction, so that the
first execution of a plan is also its recording.  Later executions replay the instructions on other tensors without any
planning (see :mod:`chainrule.execute`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from chainrule.dispatch import mode_aside, seen_by
from chainrule.maps.poles import has_poles

aten = torch.ops.aten

#: Classes whose objects are tensors and nothing more.
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})

#: Element-wise functions whose results are new tensors.
_FRESH = frozenset(
    {
        torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.addcmul, torch.eq, torch.where,
        aten.add.Tensor._op, aten.sub.Tensor._op, aten.mul.Tensor._op, aten.div.Tensor._op, aten.neg.default._op,
    }
)  # fmt: skip


class Ref(NamedTuple):
    """A place in a program: instruction results and inputs are numbered alike."""

    slot: int


class Instruction(NamedTuple):
    """One call of a straight-line program; ``args`` and ``kwargs`` hold :class:`Ref` where a tensor goes.

    Attributes:
        function: what is called.
        args: its positional arguments.
        kwargs: its keyword arguments.
        outputs: the slots of its results.
        is_tuple: whether it returns several.
        writes: the slots of the arguments that it writes to.
        keep: whether it has to run once in each run, whoever needs its results (it draws random numbers).
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int, ...]
    is_tuple: bool
    writes: tuple[int, ...] = ()
    keep: bool = False


def _lower(tree: Any) -> Any:
    """Replace staged values by references, and lists by tuples-of-the-same-kind, recursively."""
    if isinstance(tree, Staged):
        return Ref(tree.slot)
    if isinstance(tree, (list, tuple)):
        lowered = [Ref(item.slot) if item.__class__ is Staged else _lower(item) for item in tree]
        return lowered if isinstance(tree, list) else tuple(lowered)
    return tree


def _real(tree: Any) -> Any:
    if isinstance(tree, Staged):
        return tree.value
    if isinstance(tree, (list, tuple)):
        values = [_real(item) for item in tree]
        return values if isinstance(tree, list) else tuple(values)
    return tree


def refs(tree: Any) -> list[int]:
    """The slots that arguments refer to."""
    found: list[int] = []
    stack = [tree]
    while stack:
        item = stack.pop()
        if isinstance(item, Ref):
            found.append(item.slot)
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
    return found


def reads(instruction: Instruction) -> list[int]:
    """The slots that an instruction refers to."""
    found: list[int] = []
    for item in instruction.args:
        kind = item.__class__
        if kind is Ref:
            found.append(item.slot)
        elif kind is list or kind is tuple:
            found.extend(refs(item))
    if instruction.kwargs:
        found.extend(refs(tuple(instruction.kwargs.values())))
    return found


def freeze(tree: Any) -> Any:
    """Return a hashable picture of lowered arguments (types kept apart: ``1`` is not ``1.0`` is not ``True``)."""
    if isinstance(tree, Ref):
        return tree
    if isinstance(tree, (list, tuple)):
        return tuple([item if item.__class__ is Ref else freeze(item) for item in tree])
    if isinstance(tree, torch.Tensor):
        return ("tensor", id(tree))
    return (type(tree), tree)


def _counts_alike(tensor: torch.Tensor, sizes: Sequence[int]) -> bool:
    """Whether a tensor has as many elements as sizes say."""
    return all([size >= 0 for size in sizes]) and tensor.numel() == math.prod(sizes)


class Program:
    """A straight line of calls, recorded while it first runs.

    Inputs are named by arbitrary hashable keys (a tape slot, a seed's number); constants are tensors kept in the program.
    """

    def __init__(self) -> None:
        self.instructions: list[Instruction] = []
        self.inputs: dict[Any, int] = {}
        self.constants: dict[int, torch.Tensor] = {}
        self._input_values: dict[Any, Staged] = {}
        self._known: dict[Any, Any] = {}
        self._slots = 0
        self.writes = False
        # Shape, dtype and device of the values, by slot.
        self.kinds: dict[int, tuple[torch.Size, torch.dtype, torch.device]] = {}
        # Of a recorded program: the results of view ops, which share memory with their first argument.
        self.views: set[int] = set()
        # Results that share their memory with an argument, with the slot of that argument.
        self.shares: dict[int, int] = {}
        # Of a recorded program: results of ``view`` itself, which are replayed by ``reshape``.
        self.strict: set[int] = set()
        # Of a recorded program: results that equal an earlier value, with the slot of that value.
        self.copies: dict[int, int] = {}
        self.recorded = False
        # Whether the memory layout of the values matters: then the calls are left as they are.
        self.literal = False
        # The overloads of torch that are called, by what calls them.
        self.overloads: dict[Any, Any] = {}
        # Numbers that were made from truth values, by slot, with what a product with them selects by (see
        # maps/contract.py): where it is positive if it is of the number's dtype, where it is true otherwise.
        self.masks: dict[int, Staged] = {}
        # Those of them that hold other numbers than ones where they are not zero. What they select by may be of size 1 in
        # dimensions along which it is the same.
        self.graded: set[int] = set()
        # Those of the graded ones that select from whatever they multiply, as exact ones do: torch's own rule masks there.
        self.selecting: set[int] = set()
        # Of slopes, by slot: what computes the product of a value of their shape and dtype with them in one call.
        self.products: dict[int, Callable[[Staged], Staged]] = {}
        # Of sums of products with masks: what makes a mask that holds where none of their terms is masked.
        self.summed_masks: dict[int, Callable[[], Staged]] = {}
        # Whether an input may hold an infinity although all numbers that are given are finite; None where nothing says so.
        self.infinite_input: Callable[[Any], bool] | None = None
        self._infinite: dict[int, bool] = {}
        self._scanned = 0
        # The mode that sees the calls of this first run although its look at functions is off (see chainrule/dispatch.py).
        self.mode = mode_aside()

    def view_of(self, value: Staged, view: Callable[[Staged], Staged]) -> Staged:
        """A view of a value (another shape, other places of dimensions); one of a mask is a mask."""
        made = view(value)
        mask = self.masks.get(value.slot)
        if mask is not None and made.slot != value.slot:
            if mask.slot != value.slot and mask.shape != value.shape:
                mask = torch.broadcast_to(mask, tuple(value.shape))
            self.masks[made.slot] = made if mask.slot == value.slot else view(mask)
            for kind in (self.graded, self.selecting):
                if value.slot in kind:
                    kind.add(made.slot)
        return made

    def scaled(self, value: Staged, scale: float) -> Staged:
        """A value times a number; a mask stays one."""
        made: Staged = self.call(torch.mul, value, scale)
        if (mask := self.masks.get(value.slot)) is not None:
            self.masks[made.slot] = mask
            self.graded.add(made.slot)
            if value.slot in self.selecting:
                self.selecting.add(made.slot)
        return made

    def note_mask(self, value: Staged, mask: Staged, *, strict: bool = False) -> Staged:
        """A value that is zero where ``mask`` is, noted: a product with it is zero there, whatever else is multiplied.

        What else is multiplied is looked at only where it may be infinite by what made it, unless the mask is ``strict``.
        """
        self.masks[value.slot] = mask
        self.graded.add(value.slot)
        if strict:
            self.selecting.add(value.slot)
        return value

    def has_to_select(self, mask: Staged, other: Staged) -> bool:
        """Whether the zeros of a graded mask have to be written into its product with ``other``."""
        return mask.slot in self.selecting or self.may_be_infinite(other)

    def may_be_infinite(self, value: Staged) -> bool:
        """Whether a value may hold an infinity (or NaN) although all numbers that are given are finite: a slope of ``sqrt``."""
        known = self._infinite
        keys: dict[int, Any] = {}

        def is_infinite(slot: int) -> bool:
            if slot not in known:
                if not keys:
                    keys.update((slot, key) for key, slot in self.inputs.items())
                known[slot] = self.infinite_input is not None and slot in keys and self.infinite_input(keys[slot])
            return known[slot]

        for instruction in self.instructions[self._scanned :]:
            found = has_poles(instruction.function, instruction.args) or any(map(is_infinite, reads(instruction)))
            known.update(dict.fromkeys(instruction.outputs, found))
        self._scanned = len(self.instructions)
        return is_infinite(value.slot)

    def let_go(self, needed: Collection[int]) -> None:
        """Let large values go whose slots do not stand in ``needed``: only some programs do that (see maps/first_run.py)."""

    def computed_again(self, staged: Staged) -> torch.Tensor:
        """The value of a slot that was let go."""
        raise AttributeError(f"slot {staged.slot} has no value")

    def forget_values(self) -> None:
        """Drop the tensors of the first run, and what was known of them."""
        self._input_values.clear()
        self._known.clear()
        self.masks.clear()
        self.graded.clear()
        self.selecting.clear()
        self.products.clear()
        self.infinite_input = None
        self.mode = None

    def new_slot(self) -> int:
        """A slot that nothing uses."""
        slot = self._slots
        self._slots += 1
        return slot

    def input(self, key: Any, value: torch.Tensor) -> Staged:
        """Return the staged value of the input called ``key``; ``value`` is what it is in this first run."""
        staged = self._input_values.get(key)
        if staged is None:
            slot = self.new_slot()
            self.inputs[key] = slot
            staged = self._input_values[key] = Staged(self, slot, value)
            if isinstance(value, torch.Tensor):
                self.kinds[slot] = (value.shape, value.dtype, value.device)
        return staged

    def constant(self, value: torch.Tensor) -> Staged:
        """Return a staged value for a tensor that is the same in every run (an index relation, a mask)."""
        slot = self.new_slot()
        self.constants[slot] = value
        self.kinds[slot] = (value.shape, value.dtype, value.device)
        return Staged(self, slot, value)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run ``function`` on the values behind the staged arguments and record the call.

        The same call on the same values is recorded once: later requests return the first result.
        """
        lowered = _lower(args)
        lowered_kwargs = {name: _lower(item) for name, item in kwargs.items()} if kwargs else {}
        try:
            named = tuple([(n, freeze(v)) for n, v in sorted(lowered_kwargs.items())]) if kwargs else ()
            key: Any = (function, freeze(lowered), named)
            known = self._known.get(key)
        except TypeError:
            key, known = None, None
        if known is not None:
            return known
        real = [item.value if item.__class__ is Staged else _real(item) for item in args]
        if function is torch.broadcast_to and _counts_alike(*real):
            function = torch.reshape  # which need not be copied to be a result
        named_real = {name: _real(item) for name, item in kwargs.items()} if kwargs else {}
        result = self._run(function, real, named_real)
        staged = self._record(function, lowered, lowered_kwargs, result)
        if function not in _FRESH:
            self._note_memory(staged, args)
        if key is not None:
            self._known[key] = staged
        if function is torch.Tensor.to and isinstance(args[0], Staged) and args[0].value.dtype is torch.bool:
            real = staged.dtype.is_floating_point
            self.masks[staged.slot] = staged if real else args[0]
        return staged

    def _run(self, function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
        if self.mode is not None:
            return seen_by(self.mode, function, args, kwargs)
        return function(*args, **kwargs)

    def append(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        known: dict[int, Staged],
        *,
        writes: tuple[int, ...] = (),
        keep: bool = False,
    ) -> None:
        """Append a call that ran already; its results are entered into ``known``.

        Args:
            function: what was called.
            args: its positional arguments.
            kwargs: its keyword arguments.
            result: what it returned; None, or a tensor that is known, for a call that only writes.
            known: the program's values, by the identity of their tensors.
            writes: the slots that it wrote to.
            keep: whether it has to run in each run (see :class:`Instruction`).
        """
        lowered = _lower(args)
        named = {name: _lower(item) for name, item in kwargs.items()}
        self.writes = self.writes or bool(writes)
        if result is None or (isinstance(result, torch.Tensor) and id(result) in known):
            self.instructions.append(Instruction(function, lowered, named, (), False, writes, keep))
            return
        staged = self._record(function, lowered, named, result)
        if function not in _FRESH:
            self._note_memory(staged, args)
        if writes or keep:
            self.instructions[-1] = self.instructions[-1]._replace(writes=writes, keep=keep)
        items = staged if isinstance(staged, tuple) else (staged,)
        for item in items:
            if item.value is not None:
                known[id(item.value)] = item

    def _note_memory(self, results: Any, args: tuple[Any, ...]) -> None:
        source = next((item for item in args if isinstance(item, Staged)), None)
        if source is None or source.value.__class__ not in _PLAIN or source.value.layout is not torch.strided:
            return
        memory = source.value.untyped_storage()._cdata
        for staged in results if isinstance(results, tuple) else (results,):
            value = staged.value
            if value.__class__ is torch.Tensor and value.layout is torch.strided and value.untyped_storage()._cdata == memory:
                self.shares[staged.slot] = source.slot

    def _record(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        if isinstance(result, torch.Tensor):
            slot = self.new_slot()
            self.instructions.append(Instruction(function, args, kwargs, (slot,), False))
            self.kinds[slot] = (result.shape, result.dtype, result.device)
            return Staged(self, slot, result)
        if isinstance(result, (list, tuple)):
            staged = tuple(Staged(self, self.new_slot(), item) for item in result)
            self.kinds.update(
                (s.slot, (s.value.shape, s.value.dtype, s.value.device)) for s in staged if isinstance(s.value, torch.Tensor)
            )
            self.instructions.append(Instruction(function, args, kwargs, tuple(s.slot for s in staged), True))
            return staged
        raise TypeError(f"a staged call must return tensors, {function} returned {type(result)}")


class Staged:
    """A value of a :class:`Program`; torch functions, operators and tensor methods on it are recorded."""

    __slots__ = ("program", "slot", "value")

    def __init__(self, program: Program, slot: int, value: torch.Tensor) -> None:
        self.program = program
        self.slot = slot
        self.value = value

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Record ``func``; torch calls this for every torch function that receives a staged value."""
        return _find_program((args, kwargs)).call(func, *args, **(kwargs or {}))

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor behind this value."""
        kind = self.program.kinds.get(self.slot)
        return self.value.shape if kind is None else kind[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensor behind this value."""
        kind = self.program.kinds.get(self.slot)
        return self.value.dtype if kind is None else kind[1]

    @property
    def device(self) -> torch.device:
        """The device of the tensor behind this value."""
        kind = self.program.kinds.get(self.slot)
        return self.value.device if kind is None else kind[2]

    @property
    def ndim(self) -> int:
        """The number of dimensions of the tensor behind this value."""
        return len(self.shape)

    def dim(self) -> int:
        """The number of dimensions of the tensor behind this value."""
        return len(self.shape)

    def numel(self) -> int:
        """The number of elements of the tensor behind this value."""
        return self.shape.numel()

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one entry of it, of the tensor behind this value."""
        return self.shape if dim is None else self.shape[dim]

    def is_complex(self) -> bool:
        """Whether the tensor behind this value is complex."""
        return self.dtype.is_complex

    def is_floating_point(self) -> bool:
        """Whether the tensor behind this value is of a floating-point dtype."""
        return self.dtype.is_floating_point

    def __getattr__(self, name: str) -> Any:
        """Return the tensor method called ``name``, recorded when it is called."""
        if name == "value":
            return self.program.computed_again(self)
        method = getattr(torch.Tensor, name)
        if not callable(method):
            raise AttributeError(f"a staged tensor has no attribute {name!r}: only methods are recorded")

        def recorded(*args: Any, **kwargs: Any) -> Any:
            return self.program.call(method, self, *args, **kwargs)

        return recorded

    def __bool__(self) -> bool:
        """Refuse: a plan must not depend on values."""
        raise TypeError("a rule branched on the value of a tensor: a plan is made from structure alone")

    def __neg__(self) -> Any:
        return self.program.call(torch.neg, self)

    def __add__(self, other: Any) -> Any:
        return self.program.call(torch.add, self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self.program.call(torch.sub, self, other)

    def __rsub__(self, other: Any) -> Any:
        return self.program.call(torch.rsub, self, other)

    def __mul__(self, other: Any) -> Any:
        return self.program.call(torch.mul, self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self.program.call(torch.div, self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return self.program.call(torch.mul, self.program.call(torch.reciprocal, self), other)

    def __pow__(self, other: Any) -> Any:
        return self.program.call(torch.pow, self, other)

    def __matmul__(self, other: Any) -> Any:
        return self.program.call(torch.matmul, self, other)

    def __gt__(self, other: Any) -> Any:
        return self.program.call(torch.gt, self, other)

    def __ge__(self, other: Any) -> Any:
        return self.program.call(torch.ge, self, other)

    def __lt__(self, other: Any) -> Any:
        return self.program.call(torch.lt, self, other)

    def __le__(self, other: Any) -> Any:
        return self.program.call(torch.le, self, other)

    def __eq__(self, other: object) -> Any:  # type: ignore[override]
        return self.program.call(torch.eq, self, other)

    def __ne__(self, other: object) -> Any:  # type: ignore[override]
        return self.program.call(torch.ne, self, other)

    __hash__ = object.__hash__

    def __and__(self, other: Any) -> Any:
        return self.program.call(torch.logical_and, self, other)

    def __or__(self, other: Any) -> Any:
        return self.program.call(torch.logical_or, self, other)

    def __invert__(self) -> Any:
        return self.program.call(torch.logical_not, self)

    def __getitem__(self, index: Any) -> Any:
        return self.program.call(torch.Tensor.__getitem__, self, index)


def _find_program(tree: Any) -> Program:
    stack = [tree]
    while stack:
        item = stack.pop()
        if isinstance(item, Staged):
            return item.program
        if isinstance(item, (list, tuple)):
            stack.extend(item)
        elif isinstance(item, dict):
            stack.extend(item.values())
    raise TypeError("no staged tensor among the arguments")
