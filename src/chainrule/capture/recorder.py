"""The recorder: every op that reaches it, written down as a program that can be replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NoReturn

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from chainrule.calls import is_number_constant
from chainrule.dispatch import LightMode, again
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

#: Whether an op has to run in each run of the program, by its identity (see :func:`_is_kept`).
_KEPT_OPS: dict[int, tuple[Any, bool]] = {}

#: Whether an op is a composition of others, likewise (see :func:`_is_composite`).
_COMPOSITE_OPS: dict[int, tuple[Any, bool]] = {}

_any_autocast = torch._C._is_any_autocast_enabled

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
        )
        if keep:
            self._on_unrepeatable(func)
        keep = keep or (out is None and not written)
        two = func is aten.mul.Tensor and isinstance(args[0], torch.Tensor) and isinstance(args[1], torch.Tensor)
        if two and args[0].numel() < args[1].numel():
            lowered = lowered[::-1]  # the larger one first decides how torch walks through the result
        if not (keep or written) and isinstance(out, torch.Tensor) and self._is_fixed(out, lowered, named):
            same = func is aten.detach.default or func is aten.alias.default
            self.known[id(out)] = staged = lowered[0] if same else self.program.constant(out)
            if func.is_view and not same:
                self._recipes[staged.slot] = (func, lowered, named)
        else:
            slots = tuple([staged.slot for t in written if (staged := self.known.get(id(t))) is not None])
            self._append(func, lowered, named, out, slots, keep=keep)

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


#: Compositions of ops of which some read values, or have results whose shape depends on values: recorded in parts, which say so.
_BY_VALUE = frozenset(
    {
        aten.where.default, aten.nonzero_numpy.default, aten.argwhere.default, aten.one_hot.default,
        aten.repeat_interleave.self_Tensor, aten.tensor_split.tensor_indices_or_sections, aten.narrow.Tensor,
        aten.ctc_loss.Tensor, aten.histogramdd.default, aten.histogramdd.int_bins, aten.histogramdd.TensorList_bins,
        aten._pad_packed_sequence.default,
    }
)  # fmt: skip

#: Ops that read some of their arguments' values in their kernels, though no tag says so, and where those stand.
_READING = {
    aten._pack_padded_sequence.default: 1, aten.lstm.data: 1, aten.gru.data: 1, aten.rnn_tanh.data: 1, aten.rnn_relu.data: 1,
}  # fmt: skip

#: What sparse tensors have beside a shape.
_SPARSE_SHAPES = frozenset({aten._nnz.default, aten.dense_dim.default, aten.sparse_dim.default})


class CompileError(RuntimeError):
    """A function cannot be turned into a flat graph, because what it computes depends on more than shapes."""


class WholeRecorder(Recorder):
    """Records a whole call. Tensors that it meets on the way are inputs; what cannot be replayed is refused.

    Args:
        leaves: the tensors that the call is given.
        generators: the generators of random numbers that were there before the call, beside torch's own.
        closed: the tensors that are closed over, as far as they are known before the call.

    Attributes:
        found: the other tensors that were met, in the order of their inputs.
        random: whether random numbers are drawn.
        joined: whether one of the inputs requires grad.
        obstacle: why a replay could compute something else, although nothing had to be refused.
        asked: tensors that were there before the call and were asked for their ``grad``, by identity, and what that is.
        conditions: values of the program, and what they have to be for a replay to be right.
        refusal: the first error of this kind that was raised, should the function catch it.
        paused: whether calls are none of the recorded call's, and may read values.
    """

    supports_higher_order_operators = True
    takes_functions = False

    def __init__(
        self, leaves: Sequence[torch.Tensor], generators: Sequence[torch.Generator] = (), closed: Sequence[torch.Tensor] = ()
    ) -> None:
        super().__init__(self._input)
        self.found: list[torch.Tensor] = []
        self.random = False
        self.obstacle = ""
        self.refusal: CompileError | None = None
        self.paused = False
        # By address: torch hands generators over as other Python objects.
        self._states = {_address_of(g): (g, g.get_state()) for g in (torch.default_generator, *generators)}
        self._memory: set[int] = set()
        self._given_memory = {_address(leaf) for leaf in leaves if leaf.layout is torch.strided} - {0}
        self._closed = {id(tensor): tensor for tensor in closed}
        self.conditions: list[tuple[Staged, torch.Tensor]] = []
        self.joined = any(leaf.requires_grad for leaf in leaves)
        self.asked: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._count = len(leaves)
        self._numbers = {id(leaf): number for number, leaf in enumerate(leaves)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an op and append it."""
        if self.paused:
            return func(*args, **(kwargs or {}))
        if not isinstance(func, OpOverload):
            self.refuse(
                f"torch's operator {func} on functions (torch.cond, torch.while_loop, scan ...) cannot be recorded. Use "
                "torch.where, or call the function without compile."
            )
        if func in _BY_VALUE:
            with again(self):
                return func.decompose(*args, **(kwargs or {}))
        if func in _READING:
            self._on_read(func, [*self._staged((args[_READING[func]],))])
        random = torch.Tag.nondeterministic_seeded in func.tags
        if random:
            self._check_states((*args, *(kwargs or {}).values()))
        if torch.Tag.inplace_view in func.tags and func is not aten.detach_.default and self._is_input(args[0]):
            self.refuse(f"{func} gives an argument, or a closed-over tensor, another shape or memory")
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        except (torch.linalg.LinAlgError, IndexError):
            # Where the function goes on from here depends on values.
            self.obstacle = f"{func} raised an error that depends on values, which the function caught"
            raise
        if random:
            self._states = {address: (g, g.get_state()) for address, (g, _) in self._states.items()}
        for made in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(made, torch.Tensor) and not func.is_view and made.layout is torch.strided and made.numel():
                self._memory.add(_address(made))
        self._memory.discard(0)
        return out

    def refuse(self, why: str) -> NoReturn:
        """Say why the call cannot be recorded.

        Raises:
            CompileError: always.
        """
        error = CompileError(f"chainrule.compile: {why}")
        self.refusal = self.refusal or error
        raise error

    def _check_states(self, given: Sequence[Any]) -> None:
        """Whether the state of a generator was set, or numbers drawn, by something that is not recorded."""
        if any(isinstance(item, torch.Generator) and _address_of(item) not in self._states for item in given):
            self.obstacle = "it draws from a generator of random numbers that it makes itself"
        elif any(not torch.equal(generator.get_state(), state) for generator, state in self._states.values()):
            self.obstacle = "it sets the state of a generator of random numbers (a seed)"

    def is_given(self, tensor: Any) -> bool:
        """Whether a tensor is an argument of the call."""
        return isinstance(tensor, torch.Tensor) and self._numbers.get(id(tensor), self._count) < self._count

    def is_computed(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a result of calls that were recorded."""
        known = self.known.get(id(tensor))
        return known is not None and known.slot not in self.program.inputs.values()

    def take_constants(self, tensors: Sequence[torch.Tensor]) -> None:
        """Take tensors that no op has met yet for constants: those of a plan, which nothing writes to."""
        for tensor in tensors:
            if id(tensor) not in self.known:
                self.known[id(tensor)] = self.program.constant(tensor)
                self._alive.append(tensor)

    def _is_input(self, tensor: Any) -> bool:
        staged = self.staged(tensor) if isinstance(tensor, torch.Tensor) else None
        return staged is not None and staged.slot in self.program.inputs.values()

    def finish(self) -> None:
        """The call has ended."""
        with torch._C._DisableTorchDispatch():
            self._check_states(())

    def _input(self, program: Program, tensor: torch.Tensor) -> Staged:
        number = self._numbers.get(id(tensor))
        if number is None and is_number_constant(tensor):
            return program.constant(tensor)
        if number is None and tensor.layout is torch.strided and tensor.numel() and _address(tensor) in self._memory:
            self.refuse(
                "the values of a computed tensor were taken to another one in a way that torch does not show "
                "(nn.Parameter(...), deepcopy, from_numpy). Use clone() or detach()."
            )
        if number is None:
            if tensor.__class__ is not torch.Tensor and not isinstance(tensor, torch.nn.Parameter):
                name = type(tensor).__name__
                self.refuse(f"a tensor of type {name} was used; only plain ones can be")
            if id(tensor) not in self._closed and tensor.layout is torch.strided and _address(tensor) in self._given_memory:
                self.obstacle = (
                    "the values of an argument were taken to another tensor in a way that torch does not show "
                    "(nn.Parameter(...), as_subclass, to_dlpack)"
                )
            number = self._numbers[id(tensor)] = self._count + len(self.found)
            self.found.append(tensor)
            self.joined = self.joined or tensor.requires_grad
        return program.input(number, tensor)

    def values(self) -> list[torch.Tensor]:
        """The tensors that were met."""
        return [staged.value for staged in self.known.values()]

    def depends(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is computed from inputs of the program."""
        known = self.known.get(id(tensor))
        # One that no op has met was there before: its values can change.
        return known is None or known.slot not in self.program.constants

    def _on_read(self, func: Any, read: list[Staged]) -> None:
        if func in _SPARSE_SHAPES and all(staged.slot in self.program.inputs.values() for staged in read):
            return  # compared as shapes are
        if any(staged.slot not in self.program.constants for staged in read):
            self.refuse_read(func)

    def refuse_read(self, reader: Any) -> NoReturn:
        """Refuse what a graph cannot depend on.

        Raises:
            CompileError: always.
        """
        self.refuse(
            f"{reader} read the value of a tensor into Python (a branch, .item(), int(), bool()). A graph "
            "cannot depend on values: use torch.where (for torch.distributions, validate_args=False), or call the function "
            "without compile."
        )

    def _on_unrepeatable(self, func: Any) -> None:
        if func is aten.as_strided.default:
            self.program.literal = True
        elif torch.Tag.nondeterministic_seeded in func.tags:
            self.random = True
        else:
            self.refuse(
                f"the shape of the result of {func} depends on values. A graph has fixed shapes: use "
                "torch.where or a mask, or call the function without compile."
            )

    def expect(self, tensor: torch.Tensor, known: torch.Tensor) -> None:
        """A replay is right only while a tensor, which has no derivatives, has the values that it has in this run."""
        (staged,) = self._staged((tensor,))
        if staged.slot not in self.program.constants and all(staged.slot != other.slot for other, _ in self.conditions):
            self.conditions.append((staged, known))

    def _on_shared_write(self, func: Any) -> None:
        self.refuse(f"{func} writes to memory that several constants share")


def whole_recorder() -> WholeRecorder | None:
    """The recorder of a whole call that sees this call, unless another one does, too."""
    if not torch._C._len_torch_dispatch_stack():
        return None
    found = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Recorder)]
    return found[0] if len(found) == 1 and isinstance(found[0], WholeRecorder) else None


@contextmanager
def rehearsed() -> Iterator[WholeRecorder | None]:
    """While a plan is made; yields the recorder of a whole call, which is to consist of the calls of a replay of the plan.

    What was called inside is part of the recorded call only where something uses its result.
    """
    recorder = whole_recorder()
    if recorder is None:
        yield None
        return
    program = recorder.program
    start, literal = len(program.instructions), program.literal
    yield recorder
    program.instructions[start:] = [instruction._replace(keep=False) for instruction in program.instructions[start:]]
    program.literal = literal


@contextmanager
def unrecorded() -> Iterator[None]:
    """Run a block that is no part of a call that is recorded, under the other modes that are on."""
    recorder = whole_recorder()
    if recorder is None or recorder.paused:
        yield
        return
    recorder.paused = True
    try:
        yield
    finally:
        recorder.paused = False


def _address(tensor: torch.Tensor) -> int:
    """Where the values of a tensor are; 0 for torch's zeros without memory, of which backward formulas make some."""
    return 0 if tensor._is_zerotensor() else tensor.untyped_storage().data_ptr()


def _address_of(generator: torch.Generator) -> int:
    return int(generator._cdata)  # type: ignore[attr-defined]
