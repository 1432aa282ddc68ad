"""The families: constructors of rules from what an op's structure is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from chainrule.maps.linear_map import Operator
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Factor, IndexSpace, OneHot, Term, affine_onehot, dims_of, new_axes, regroup
from chainrule.rules.base import (
    Call,
    Edge,
    Rule,
    broadcast_axes,
    diagonal_term,
    formula_node,
    multiple_term,
    single,
    value_node,
)
from chainrule.rules.sparse_operands import operand_network


class Other:
    """A derivative that is another operand itself (``x * y``): that operand's own axes carry it, or it is a number."""

    def __init__(self, position: int) -> None:
        self.position = position


class Number:
    """A derivative that is a number made from the static arguments."""

    def __init__(self, function: Callable[..., float]) -> None:
        self.function = function


Derivative = float | Other | Number | Callable[..., Any] | None


def pointwise(*derivatives: Derivative, reads: bool | None = None) -> Rule:
    """An element-wise op, its tensor operands broadcast against each other.

    Args:
        derivatives: one per leading positional argument: a number, :class:`Other`, :class:`Number`, a function of
            ``(*args, out, **kwargs)`` in torch code that gives the element-wise derivative, or None for an
            argument with no derivative.
        reads: whether the derivatives read values (found out from their kinds when not given).
    """

    def linearize(call: Call) -> Iterable[Edge]:
        for position, derivative in enumerate(derivatives):
            item = call.args[position] if position < len(call.args) else None
            if derivative is None or not call.is_active(item):
                continue
            yield single(call, item, [_pointwise_term(call, call.shape(item), derivative)])

    if reads is None:
        reads = any(callable(d) or isinstance(d, Other) for d in derivatives)
    return Rule("pointwise", linearize, reads=reads)


def _pointwise_term(call: Call, shape: tuple[int, ...], derivative: Derivative) -> Term:
    axes = new_axes(call.out_shape)
    if isinstance(derivative, (int, float)):
        return multiple_term(call, shape, axes, float(derivative))
    if isinstance(derivative, Number):
        return multiple_term(call, shape, axes, derivative.function(*call.args, **call.kwargs))
    if isinstance(derivative, Other):
        other = call.args[derivative.position]
        if not call.is_slot(other):
            return multiple_term(call, shape, axes, other)
        return diagonal_term(shape, axes, [operand_factor(call, other, axes)])
    function = derivative
    assert function is not None

    def formula(program: Program) -> Any:
        staged = [call.operand(program, item) for item in call.args]
        kwargs = {name: call.operand(program, item) for name, item in call.kwargs.items()}
        return function(*staged, call.stage_output(program), **kwargs)

    node = formula_node(call, call.out_shape, formula)
    return diagonal_term(shape, axes, [Factor(node, axes)])


def operand_factor(call: Call, item: Any, axes: Sequence[Axis]) -> Factor:
    """An operand's value as a factor over those of the broadcast output's axes that it has."""
    dims = broadcast_axes(call.shape(item), axes)
    own = tuple(axis for dim in dims for axis in dim)
    return Factor(value_node(call, item, (axis.size for axis in own)), own)


def zero_derivative() -> Rule:
    """An op that is constant almost everywhere."""
    return Rule("constant", lambda call: (), reads=False)


def view(make: Callable[[Call], Term], reads: bool = False, family: str = "view") -> Rule:
    """An op of one tensor argument (the first) whose local Jacobian is one term without dense factors."""

    def linearize(call: Call) -> Iterable[Edge]:
        if call.is_active(call.args[0]):
            yield single(call, call.args[0], [make(call)])

    return Rule(family, linearize, reads=reads)


def reshape_term(in_shape: Sequence[int], out_shape: Sequence[int], device: torch.device) -> Term:
    """The term of a reshape: dimensions split and merged over common axes, else tied by index relations."""
    parts = common_splits(in_shape, out_shape)
    if parts is not None:
        flat = [Axis(size) for size in parts]
        return Term(take_axes(flat, out_shape), take_axes(flat, in_shape))
    out_axes, in_axes = new_axes(out_shape), new_axes(in_shape)
    return Term(dims_of(out_axes), dims_of(in_axes), (), tuple(regroup(out_axes, in_axes, device)))


def common_splits(one: Sequence[int], two: Sequence[int]) -> list[int] | None:
    """Sizes whose row-major runs make up both shapes, or None if their boundaries cross."""
    total = math.prod(one)
    if total == 0:
        return None
    bounds = sorted({bound for shape in (one, two) for bound in _suffix_products(shape)} | {1, total})
    sizes = []
    for low, high in zip(bounds, bounds[1:], strict=False):
        if high % low:
            return None
        sizes.append(high // low)
    return sizes[::-1]


def _suffix_products(shape: Sequence[int]) -> list[int]:
    products, running = [], 1
    for size in reversed(shape):
        running *= size
        products.append(running)
    return products


def take_axes(flat: Sequence[Axis], shape: Sequence[int]) -> tuple[tuple[Axis, ...], ...]:
    """Distribute a row-major run of axes over the dimensions of ``shape``."""
    dims: list[tuple[Axis, ...]] = []
    position = 0
    for size in shape:
        taken: list[Axis] = []
        have = 1
        while have < size:
            taken.append(flat[position])
            have *= flat[position].size
            position += 1
        dims.append(tuple(taken))
    return tuple(dims)


def contraction(equation: str, positions: Sequence[int], scale: Callable[[Call], float] | None = None) -> Rule:
    """An op that is an einsum of its tensor arguments at ``positions``."""

    def linearize(call: Call) -> Iterable[Edge]:
        yield from contraction_edges(call, equation, [call.args[p] for p in positions], 1.0 if scale is None else scale(call))

    return Rule("contraction", linearize)


def contraction_edges(call: Call, equation: str, operands: Sequence[Any], scale: float = 1.0) -> Iterable[Edge]:
    """The edges of an einsum: with respect to one operand, the others are the factors."""
    inputs, output = equation.split("->")
    letters = inputs.split(",")
    sizes: dict[str, int] = {}
    for names, item in zip(letters, operands, strict=True):
        sizes.update(zip(names, call.shape(item), strict=True))
    for number, item in enumerate(operands):
        if not call.is_active(item):
            continue
        axes = {name: Axis(size) for name, size in sizes.items()}
        others = [
            operand_network(call, other, [axes[name] for name in letters[k]]) for k, other in enumerate(operands) if k != number
        ]
        factors = tuple(factor for own, _ in others for factor in own)
        relations = tuple(relation for _, own in others for relation in own)
        out_dims = tuple((axes[name],) for name in output)
        in_dims = tuple((axes[name],) for name in letters[number])
        yield single(call, item, [Term(out_dims, in_dims, factors, relations, scale)])


def reduction_dims(call: Call, name: str = "dim") -> tuple[int, ...]:
    """The reduced dimensions of a reduction, normalised; all of them when none are named."""
    rank = len(call.shape(call.args[0]))
    dims = call.argument(name)
    if dims is None or dims in ((), []):
        return tuple(range(rank))
    if isinstance(dims, int):
        dims = (dims,)
    return tuple(sorted(d % rank for d in dims)) if rank else ()


def reduced_term(call: Call, dims: Sequence[int], factors: Callable[[tuple[Axis, ...]], Sequence[Factor]], scale: float) -> Term:
    """The term of a reduction over ``dims`` of the first argument (``keepdim`` is read off the output's rank)."""
    shape = call.shape(call.args[0])
    axes = new_axes(shape)
    keep = len(call.out_shape) == len(shape)
    out_dims: list[tuple[Axis, ...]] = []
    for d, axis in enumerate(axes):
        if d not in dims:
            out_dims.append((axis,))
        elif keep:
            out_dims.append(())
    return Term(tuple(out_dims), dims_of(axes), tuple(factors(axes)), (), scale)


def linear_reduction(scale: Callable[[Call, int], float]) -> Rule:
    """A sum over dimensions times a number that may depend on how many elements are summed."""

    def linearize(call: Call) -> Iterable[Edge]:
        item = call.args[0]
        if call.is_active(item):
            dims = reduction_dims(call)
            count = math.prod(call.shape(item)[d] for d in dims)
            if count:
                yield single(call, item, [reduced_term(call, dims, lambda axes: (), scale(call, count))])

    return Rule("reduction", linearize, reads=False)


def weighted_reduction(
    weights: Callable[[Call, Program, Callable[[Staged], Staged]], Any], chooses: Callable[[Call], bool] = lambda call: False
) -> Rule:
    """A reduction whose derivative is an array over its input: ``weights(call, program, spread)``.

    ``spread`` views an array of the output's shape so that it broadcasts against the input. ``chooses`` says whether the
    array is zero but where the op chose its elements.
    """

    def linearize(call: Call) -> Iterable[Edge]:
        item = call.args[0]
        if not call.is_active(item):
            return
        dims = reduction_dims(call)
        shape = call.shape(item)
        wide = tuple(1 if d in dims else size for d, size in enumerate(shape))

        def spread(value: Staged) -> Staged:
            return value if tuple(value.shape) == wide else torch.reshape(value, wide)

        node = formula_node(call, shape, lambda program: weights(call, program, spread))
        node.is_choice = chooses(call)
        yield single(call, item, [reduced_term(call, dims, lambda axes: (Factor(node, axes),), 1.0)])

    return Rule("reduction", linearize)


def slice_term(in_shape: Sequence[int], dim: int, start: int, step: int, length: int, space: IndexSpace) -> Term:
    """The term of a slice along one dimension."""
    in_axes = new_axes(in_shape)
    if start == 0 and step == 1 and length == in_shape[dim]:
        return Term(dims_of(in_axes), dims_of(in_axes))
    source = Axis(length)
    out_axes = (*in_axes[:dim], source, *in_axes[dim + 1 :])
    return Term(dims_of(out_axes), dims_of(in_axes), (), (affine_onehot(source, in_axes[dim], start, step, space),))


def operator(
    push: Callable[[Call, Program, Staged, int], Staged],
    pull: Callable[[Call, Program, Staged, int], Staged],
    position: int = 0,
    diagonal: Callable[[Call], tuple[tuple[int, int], ...]] = lambda call: (),
    flops: Callable[[Call], int] = lambda call: 0,
    reads: bool = True,
) -> Rule:
    """An op of one differentiable argument that is known by how it acts on rows of tangents and cotangents."""

    def linearize(call: Call) -> Iterable[Edge]:
        item = call.args[position]
        if call.is_active(item):
            yield operator_edge(call, item, push, pull, diagonal(call), flops(call))

    return Rule("operator", linearize, reads=reads)


def operator_edge(
    call: Call,
    item: Any,
    push: Callable[[Call, Program, Staged, int], Staged],
    pull: Callable[[Call, Program, Staged, int], Staged],
    diagonal: tuple[tuple[int, int], ...] = (),
    flops: int = 0,
    output: int = 0,
    terms: tuple[Term, ...] = (),
    structure: Callable[[], tuple[Term, ...]] | None = None,
    whole: bool = False,
) -> Edge:
    """An edge with one operator; ``push`` and ``pull`` get ``(call, program, rows, number of rows)``."""
    into, out = call.tensor(item).dtype, call.tensor(call.outputs[output]).dtype
    made = Operator(
        call.shape(call.outputs[output]),
        call.shape(item),
        lambda program, rows: push(call, program, _in_dtype(rows, into), rows.shape[0]),
        lambda program, rows: pull(call, program, _in_dtype(rows, out), rows.shape[0]),
        diagonal,
        flops,
        call.op.name(),
        terms,
        structure,
        whole,
    )
    return single(call, item, (), (made,), output)


def _in_dtype(rows: Staged, dtype: torch.dtype) -> Staged:
    """Rows as a kernel takes them: where a function converts, they have the dtype of another of its values."""
    same = rows.dtype == dtype or not (rows.dtype.is_floating_point and dtype.is_floating_point)
    return rows if same else rows.to(dtype)


__all__ = [
    "Number", "OneHot", "Other", "contraction", "contraction_edges", "linear_reduction", "operand_factor", "operator",
    "operator_edge", "pointwise", "reduced_term", "reduction_dims", "reshape_term", "slice_term", "view",
    "weighted_reduction", "zero_derivative",
]  # fmt: skip
