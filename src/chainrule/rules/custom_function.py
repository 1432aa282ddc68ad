"""Users' ``torch.autograd.Function``: the derivative is the one the user wrote, never that of its forward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import torch

from chainrule.maps.staging import Program, Staged
from chainrule.rules.base import Call, Edge, Rule
from chainrule.rules.families import operator_edge
from chainrule.rules.opaque import apart
from chainrule.rules.row_mapping import Rows


class FunctionContext:
    """The ``ctx`` of a user's function that runs without torch's own graph: what torch's has, and any attribute."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Any, ...] = ()
        self.saved_for_forward: tuple[Any, ...] = ()
        self.non_differentiable: tuple[Any, ...] = ()
        self.dirty_tensors: tuple[Any, ...] = ()
        self.materialize_grads = True

    def save_for_backward(self, *tensors: Any) -> None:
        """Keep tensors for ``backward``."""
        self.saved_tensors = tensors

    def save_for_forward(self, *tensors: Any) -> None:
        """Keep tensors for ``jvp``."""
        self.saved_for_forward = tensors
        if not self.saved_tensors:
            self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Any) -> None:
        """Name outputs that have no derivative."""
        self.non_differentiable = tensors

    def mark_dirty(self, *tensors: Any) -> None:
        """Name inputs that the forward writes to."""
        self.dirty_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """Whether missing cotangents are given as zeros (else as None)."""
        self.materialize_grads = value


class FunctionOp:
    """Stands for a call of a user's function on a tape: equal for the same function and static arguments.

    Args:
        function: the user's class.
        static: the arguments that are no tensors.
        layout: where all outputs are one vector on the tape, so that their cotangents reach ``backward`` together: the shape
            of each (None for one without a derivative). Otherwise None.
    """

    namespace = "autograd.Function"

    def __init__(
        self, function: Any, static: tuple[Any, ...], layout: tuple[tuple[int, ...] | None, ...] | None = None
    ) -> None:
        self.function = function
        self.static = static
        self.layout = layout
        self.tags: tuple[Any, ...] = ()

    def __eq__(self, other: object) -> bool:
        """Whether two calls have the same derivative, given the same tensors and context."""
        if not isinstance(other, FunctionOp):
            return False
        return self.function is other.function and self.static == other.static and self.layout == other.layout

    def __hash__(self) -> int:
        """A hash that agrees with equality."""
        return hash((FunctionOp, self.function))

    def name(self) -> str:
        """The user's name of the function."""
        return str(self.function.__name__)

    def __repr__(self) -> str:
        """The name, marked as a user's function."""
        return f"autograd.Function {self.name()}"


class FunctionAction:
    """Pullback and pushforward of a user's function from one input to one output.

    Args:
        function: the user's class.
        number: which argument of ``forward``.
        output: which output.
        kinds: shape and dtype of each argument (None for one that is no floating-point tensor).
        layout: as in :class:`FunctionOp`.
    """

    def __init__(
        self,
        function: Any,
        number: int,
        output: int,
        kinds: Sequence[tuple[torch.Size, torch.dtype] | None],
        layout: tuple[tuple[int, ...] | None, ...] | None = None,
    ) -> None:
        self.function = function
        self.layout = layout
        self.number = number
        self.output = output
        self.kinds = kinds
        self.pulling, self.pushing = Rows(), Rows()

    def _no_tangent(self, number: int, rows: torch.Tensor, materialize: bool) -> torch.Tensor | None:
        """The tangent of an argument that has none: zeros, unless the user asked for None."""
        kind = self.kinds[number]
        if kind is None or not materialize:
            return None
        return torch.zeros(kind[0], dtype=kind[1], device=rows.device)

    def _backward(self, row: torch.Tensor, like: torch.Tensor, context: Any, outputs: tuple[Any, ...]) -> torch.Tensor | None:
        if self.layout is not None:
            return self._of_number(self.function.backward(context, *_unpacked(row, self.layout)), like)
        materialize = getattr(context, "materialize_grads", True)
        cotangents: list[Any] = [
            row if n == self.output else (torch.zeros_like(out) if materialize and isinstance(out, torch.Tensor) else None)
            for n, out in enumerate(outputs)
        ]
        return self._of_number(self.function.backward(context, *cotangents), like)

    def _of_number(self, result: Any, like: torch.Tensor) -> torch.Tensor | None:
        """This gradient in its input's dtype; of a shape that the input broadcasts to, it is summed: as torch.autograd does."""
        found: torch.Tensor | None = result[self.number] if isinstance(result, (tuple, list)) else result
        if found is not None and found.dtype != like.dtype:
            if found.is_complex():
                raise RuntimeError(
                    f"chainrule: the backward of autograd.Function {self.function.__name__} returned a complex gradient at index "
                    f"{self.number}, for an input of {like.dtype}"
                )
            found = found.to(like.dtype)
        if found is None or found.shape == like.shape:
            return found
        have, want = tuple(found.shape), tuple(like.shape)
        extra = len(have) - len(want)
        if extra < 0 or any(wide != size != 1 for wide, size in zip(have[extra:], want, strict=True)):
            raise RuntimeError(
                f"chainrule: the backward of autograd.Function {self.function.__name__} returned an invalid gradient at index "
                f"{self.number} - got {list(have)} but expected shape compatible with {list(want)}"
            )
        spread = [d for d, wide in enumerate(have) if d < extra or wide != want[d - extra]]
        return found.sum(spread).reshape(want)

    def pull(self, rows: torch.Tensor, like: torch.Tensor, context: Any, *outputs: Any) -> torch.Tensor:
        """Cotangents ``(R, *out_shape)`` through the user's ``backward``."""

        def pull_one(row: torch.Tensor) -> torch.Tensor:
            result = self._backward(row, like, context, outputs)
            return torch.zeros_like(like) if result is None else result

        return self.pulling.through(pull_one, rows, like.shape)

    def push(self, rows: torch.Tensor, like: torch.Tensor, context: Any, *outputs: Any) -> torch.Tensor:
        """Tangents ``(R, *in_shape)`` through the user's ``jvp``, or the transpose of ``backward``."""
        out = outputs[self.output]
        if self.function.jvp is not torch.autograd.Function.jvp:
            return self._push_by_jvp(rows, context, out)
        return apart(self._push, rows, like, context, *outputs)

    def _push(self, rows: torch.Tensor, like: torch.Tensor, context: Any, *outputs: Any) -> torch.Tensor:
        out = outputs[self.output]
        if self.pulling.is_mappable and 1 < out.numel() <= rows.shape[0]:
            return self._push_dense(rows, like, context, outputs, out)
        try:
            return self._push_transposed(rows, like, context, outputs, out)
        except (RuntimeError, NotImplementedError):
            return self._push_dense(rows, like, context, outputs, out)

    def _push_by_jvp(self, rows: torch.Tensor, context: Any, out: torch.Tensor) -> torch.Tensor:
        if hasattr(context, "saved_for_forward") and isinstance(context, FunctionContext) and context.saved_for_forward:
            context.saved_tensors = context.saved_for_forward
        materialize = getattr(context, "materialize_grads", True)

        def push_one(row: torch.Tensor) -> torch.Tensor:
            tangents = [row if n == self.number else self._no_tangent(n, rows, materialize) for n in range(len(self.kinds))]
            result = self.function.jvp(context, *tangents)
            if self.layout is not None:
                result = packed(_filled(result, self.layout, out))
            elif isinstance(result, (tuple, list)):
                result = result[self.output]
            return torch.zeros_like(out) if result is None else result

        return self.pushing.through(push_one, rows, out.shape)

    def _push_transposed(
        self, rows: torch.Tensor, like: torch.Tensor, context: Any, outputs: tuple[Any, ...], out: torch.Tensor
    ) -> torch.Tensor:
        probe = torch.zeros_like(out).requires_grad_()
        pulled = self._backward(probe, like, context, outputs)
        if pulled is None:
            return rows.new_zeros((rows.shape[0], *out.shape))
        if not pulled.requires_grad:
            raise NotImplementedError("the user's backward is not differentiable")
        pushed = []
        for row in rows.unbind(0):
            (result,) = torch.autograd.grad(
                pulled, probe, row.to(pulled.dtype), retain_graph=True, create_graph=True, allow_unused=True
            )
            if result is None:
                raise NotImplementedError("the user's backward is differentiable by name only (`once_differentiable`)")
            pushed.append(result)
        return torch.stack(pushed) if pushed else rows.new_zeros((0, *out.shape))

    def _push_dense(
        self, rows: torch.Tensor, like: torch.Tensor, context: Any, outputs: tuple[Any, ...], out: torch.Tensor
    ) -> torch.Tensor:
        count = out.numel()
        basis = torch.eye(count, dtype=out.dtype, device=out.device).reshape(count, *out.shape)
        local = self.pull(basis, like, context, *outputs)
        flat = rows.reshape(rows.shape[0], -1) @ local.reshape(count, -1).t()
        return flat.reshape(rows.shape[0], *out.shape)


def packed(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Several tensors as one vector."""
    return torch.cat([part.reshape(-1) for part in parts])


def _unpacked(vector: torch.Tensor, layout: Sequence[tuple[int, ...] | None]) -> list[torch.Tensor | None]:
    sizes = [0 if shape is None else prod(shape) for shape in layout]
    parts = vector.split(sizes)
    return [None if shape is None else part.reshape(shape) for part, shape in zip(parts, layout, strict=True)]


def _filled(tangents: Sequence[Any], layout: Sequence[tuple[int, ...] | None], like: torch.Tensor) -> list[torch.Tensor]:
    """The tangents of the outputs that have some, zeros where the user gave None."""
    pairs = zip(tangents, layout, strict=True)
    return [like.new_zeros(shape) if item is None else item for item, shape in pairs if shape is not None]


def _kind(call: Call, item: Any) -> tuple[torch.Size, torch.dtype] | None:
    if not call.is_slot(item):
        return None
    value = call.tensor(item)
    known = isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
    return (value.shape, value.dtype) if known else None


def _linearize(call: Call) -> Iterable[Edge]:
    function = call.op.function  # type: ignore[attr-defined]
    context, arguments = call.args[0], call.args[1:]
    kinds = [_kind(call, item) for item in arguments]
    for number, item in enumerate(arguments):
        if not call.is_active(item):
            continue
        for output, slot in enumerate(call.outputs):
            if slot < 0 or not call.tensor(slot).dtype.is_floating_point:
                continue
            action = FunctionAction(function, number, output, kinds, call.op.layout)  # type: ignore[attr-defined]
            size = call.tensor(item).numel() + call.tensor(slot).numel()
            push, pull = _staged(action.push, item, context), _staged(action.pull, item, context)
            yield operator_edge(call, item, push, pull, (), size, output, whole=True)


def _staged(method: Any, item: Any, context: Any) -> Any:
    def act(call: Call, program: Program, rows: Staged, count: int) -> Staged:
        outputs = [None if slot < 0 else call.stage_output(program, n) for n, slot in enumerate(call.outputs)]
        result: Staged = program.call(method, rows, call.stage(program, item), call.stage(program, context), *outputs)
        return result

    return act


RULE = Rule("autograd.Function", _linearize, reads=True, kind="opaque")

__all__ = ["RULE", "FunctionContext", "FunctionOp", "packed"]
