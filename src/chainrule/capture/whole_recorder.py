"""The recorder of a whole call, which is to be replayed as one graph: it refuses what a replay would get wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from chainrule.calls import is_number_constant
from chainrule.capture.recorder import Recorder
from chainrule.dispatch import again
from chainrule.maps.staging import Program, Staged

aten = torch.ops.aten

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
    knows_layouts = False

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


__all__ = ["CompileError", "WholeRecorder", "rehearsed", "unrecorded", "whole_recorder"]
