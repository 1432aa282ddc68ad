"""Element-wise rules whose derivatives read the op's arguments by their schema names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Factor, Term, dims_of, new_axes
from chainrule.rules.base import Call, Edge, Rule, broadcast_axes, diagonal_term, formula_node, multiple_term, single

#: Reductions of losses, as ATen numbers them.
MEAN = 1


class Arguments:
    """The staged arguments of a call, read by name; ``out`` and ``out1`` are its outputs.

    An argument is staged when it is read, so a formula keeps only what it uses.
    """

    def __init__(self, call: Call, program: Program) -> None:
        self._call = call
        self._program = program

    def __getattr__(self, name: str) -> Any:
        """Return the staged argument ``name``."""
        return self._call.operand(self._program, self._call.argument(name))

    @property
    def out(self) -> Any:
        """The first output."""
        return self._call.stage_output(self._program)

    @property
    def out1(self) -> Any:
        """The second output."""
        return self._call.stage_output(self._program, 1)

    def producer(self, name: str) -> Any:
        """The op that made the argument ``name``; None where that is not known."""
        record = self._call.producer(self._call.argument(name))
        return None if record is None else record.op

    def mask(self, number: Staged, kept: Staged) -> Staged:
        """The number, noted as a mask: a product with it keeps what stands where ``kept``, of its dtype, is positive or NaN."""
        self._program.masks[number.slot] = kept
        return number

    def by_kernel(self, kernel: Callable[..., Any], *args: Any, **options: Any) -> Staged:
        """A derivative as what a backward op makes of ones, noted: that op multiplies a value of its shape in one call.

        Args:
            kernel: the op; its first argument is what it multiplies.
            args: its other arguments; the first tensor among them has the derivative's shape.
            options: its keyword arguments.
        """
        program = self._program

        def product(value: Staged) -> Staged:
            found: Staged = program.call(kernel, value, *args, **options)
            return found

        like = next(item for item in args if isinstance(item, Staged))
        slope = product(torch.ones_like(like))  # type: ignore[arg-type]
        program.products[slope.slot] = product
        return slope

    def graded(self, number: Staged) -> Staged:
        """The number, noted as a mask: a product with it is zero where it is, whatever else is multiplied there."""
        return self._program.note_mask(number, number, strict=True)

    def behind(self, mask: Staged, number: Staged) -> Staged:
        """The number, noted as zero where a mask is: so is a product with it, whatever else is multiplied there."""
        return self._program.note_mask(number, mask, strict=True)

    @property
    def loss_scale(self) -> float:
        """The number that a loss's reduction multiplies each element with."""
        return loss_scale(self._call)


class Over:
    """A derivative that depends on one operand alone: it is computed over that operand's own axes.

    Args:
        name: the operand's name.
        function: from the staged operand to the derivative.
    """

    def __init__(self, name: str, function: Callable[[Any], Any]) -> None:
        self.name = name
        self.function = function


class ZeroWith:
    """A derivative that is zero where an argument, or the output, is.

    Args:
        name: the name of what it is zero with; ``out`` for the output.
        function: the derivative over the output's shape.
        holds: whether that is so for a call.
    """

    def __init__(
        self, name: str, function: Callable[[Arguments], Any], holds: Callable[[Call], bool] = lambda call: True
    ) -> None:
        self.name = name
        self.function = function
        self.holds = holds

    def slot(self, call: Call) -> int | None:
        """The slot of what it is zero with; None where it is not."""
        if not self.holds(call):
            return None
        if self.name == "out":
            return call.outputs[0]
        item = call.argument(self.name)
        return item.index if call.is_slot(item) else None


class Static:
    """A derivative that is a number made from the static arguments."""

    def __init__(self, function: Callable[[Call], float]) -> None:
        self.function = function


Derivative = float | Over | ZeroWith | Static | Callable[[Arguments], Any]

#: The op by which a product with a mask of numbers is computed: it lets pass what the mask keeps.
_SELECTS = torch.ops.aten.threshold_backward.default


def elementwise(**derivatives: Derivative) -> Rule:
    """An element-wise op, its operands broadcast against each other.

    Args:
        derivatives: by argument name (``self_`` stands for ``self``): a number, :class:`Static`, :class:`Over`, or a
            function of :class:`Arguments` that gives the derivative over the output's shape. An argument that is not
            named has no derivative.
    """
    named = {name.rstrip("_"): derivative for name, derivative in derivatives.items()}

    def linearize(call: Call) -> Iterable[Edge]:
        for name, derivative in named.items():
            item = call.argument(name)
            if call.is_active(item):
                yield single(call, item, [_term(call, item, derivative)])

    reads = any(not isinstance(d, (int, float, Static)) for d in named.values())
    return Rule("pointwise", linearize, reads=reads)


def _term(call: Call, item: Any, derivative: Derivative) -> Term:
    axes = new_axes(call.out_shape)
    shape = call.shape(item)
    if isinstance(derivative, (int, float)):
        return multiple_term(call, shape, axes, float(derivative))
    if isinstance(derivative, Static):
        return multiple_term(call, shape, axes, float(derivative.function(call)))
    if isinstance(derivative, Over):
        return _over(call, shape, derivative)
    function = derivative.function if isinstance(derivative, ZeroWith) else derivative
    node = formula_node(call, call.out_shape, lambda program: function(Arguments(call, program)))
    node.slot = derivative.slot(call) if isinstance(derivative, ZeroWith) else None
    node.mask = call.op is _SELECTS
    return diagonal_term(shape, axes, [Factor(node, axes)])


def _over(call: Call, shape: tuple[int, ...], derivative: Over) -> Term:
    axes = new_axes(call.out_shape)
    other = call.argument(derivative.name)
    if not call.is_slot(other):
        return multiple_term(call, shape, axes, float(derivative.function(other)))
    own = tuple(axis for dim in broadcast_axes(call.shape(other), axes) for axis in dim)
    sizes = tuple(axis.size for axis in own)

    def formula(program: Program) -> Any:
        staged = call.operand(program, other)
        result = derivative.function(staged)
        result = result.reshape(sizes) if hasattr(result, "shape") and tuple(result.shape) != sizes else result
        return result.to(call.workspace.dtype) if result.dtype != call.workspace.dtype else result

    node = formula_node(call, sizes, formula)
    node.mask = True
    return diagonal_term(shape, axes, [Factor(node, own)])


def loss(**derivatives: Callable[[Arguments], Any]) -> Rule:
    """An element-wise loss of operands that broadcast against each other, with ATen's ``reduction`` argument.

    Args:
        derivatives: by argument name, the derivative of one element's loss over the broadcast shape.
    """
    named = {name.rstrip("_"): derivative for name, derivative in derivatives.items()}

    def linearize(call: Call) -> Iterable[Edge]:
        shape = broadcast_shape(call)
        for name, derivative in named.items():
            item = call.argument(name)
            if call.is_active(item):
                yield single(call, item, list(_loss_terms(call, item, shape, derivative)))

    return Rule("loss", linearize)


def _loss_terms(call: Call, item: Any, shape: tuple[int, ...], derivative: Callable[[Arguments], Any]) -> Iterable[Term]:
    axes = new_axes(shape)
    numel = 1
    for size in shape:
        numel *= size
    reduction = call.argument("reduction", MEAN)
    if not numel:
        return
    node = formula_node(call, shape, lambda program: derivative(Arguments(call, program)))
    in_dims = broadcast_axes(call.shape(item), axes)
    out_dims = dims_of(axes) if reduction == 0 else ()
    yield Term(out_dims, in_dims, (Factor(node, axes),), (), 1.0 / numel if reduction == MEAN else 1.0)


def broadcast_shape(call: Call) -> tuple[int, ...]:
    """The shape to which a call's leading tensor arguments broadcast."""
    shape: list[int] = []
    for item in call.args:
        if not call.is_slot(item):
            continue
        own = call.shape(item)
        shape = [1] * (len(own) - len(shape)) + shape
        for position, size in enumerate(reversed(own), 1):
            if size != 1:
                shape[-position] = size
    return tuple(shape)


def loss_scale(call: Call) -> float:
    """The number that a mean reduction multiplies each element with."""
    count = 1
    for size in broadcast_shape(call):
        count *= size
    return 1.0 / max(count, 1) if call.argument("reduction", MEAN) == MEAN else 1.0


__all__ = ["Arguments", "Over", "Static", "ZeroWith", "broadcast_shape", "elementwise", "loss", "loss_scale"]
