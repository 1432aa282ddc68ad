"""Contraction of factors: the order from opt_einsum, each pair lowered to the fewest torch calls."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from chainrule.maps import running_products as running
from chainrule.maps.contraction_order import contraction_order
from chainrule.maps.matrix_products import many_small, plain_product, products_by_columns
from chainrule.maps.nodes import Node
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Factor

aten = torch.ops.aten

#: Of so few matrix-vector products, along which a stack runs in memory for so long, multiplying and summing takes less time.
_FEW_DOTS = 16
_LONG_RUN = 16


def contract(factors: Sequence[Factor], keep: Sequence[Axis], memo: dict[object, Node]) -> Factor:
    """Multiply ``factors``, sum every axis that is not in ``keep``, and return one factor over the kept carried axes.

    Args:
        factors: at least one factor.
        keep: the axes that survive; the result has those of them that some factor carries, in this order.
        memo: nodes already made in this plan, so that equal contractions are one node.
    """
    result = contract_any(factors, keep, memo)
    carried = set(result.axes)
    return transpose_to(result, [axis for axis in keep if axis in carried], memo)


def contract_any(factors: Sequence[Factor], keep: Sequence[Axis], memo: dict[object, Node]) -> Factor:
    """As :func:`contract`, with the axes in whatever order the last step gives them."""
    operands = _without_squares(factors)
    kept = set(keep)
    if len(operands) > 2:
        for left, right in contraction_order(operands, keep):
            second = operands.pop(right)
            first = operands.pop(left)
            still = kept.union(axis for factor in operands for axis in factor.axes)
            operands.append(_pair(first, second, still, memo, keep))
    if len(operands) == 2:
        operands = [_pair(operands[0], operands[1], kept, memo, keep)]
    return _sum_axes(operands[0], kept, memo)


def _without_squares(factors: Sequence[Factor]) -> list[Factor]:
    """The factors, those that are their own square once."""
    if not any(factor.node.is_indicator for factor in factors):
        return list(factors)
    found: dict[object, Factor] = {}
    for number, factor in enumerate(factors):
        found.setdefault((id(factor.node), factor.axes) if factor.node.is_indicator else number, factor)
    return list(found.values())


def _sum_axes(factor: Factor, kept: set[Axis], memo: dict[object, Node]) -> Factor:
    gone = tuple(i for i, axis in enumerate(factor.axes) if axis not in kept)
    if not gone:
        return factor
    axes = tuple(axis for axis in factor.axes if axis in kept)
    key = ("sum", id(factor.node), gone)
    node = memo.get(key)
    if node is None and (known := factor.node.sums) is not None:
        rest = Factor(known(gone[0]), (*factor.axes[: gone[0]], *factor.axes[gone[0] + 1 :]))
        node = memo[key] = _sum_axes(rest, kept, memo).node
    if node is None and factor.node.running is not None:
        for i in gone:
            if (found := running.summed(factor, factor.axes[i], memo)) is not None:
                rest = transpose_to(found, [axis for axis in factor.axes if axis in found.axes], memo)
                node = memo[key] = _sum_axes(rest, kept, memo).node
                break
    if node is None and all(factor.axes[i].size == 1 for i in gone):
        node = memo[key] = Node(
            (axis.size for axis in axes), (factor.node,),
            lambda program, value: program.view_of(value, lambda v: torch.squeeze(v, gone)), label="squeeze",
        )  # fmt: skip
    if node is None:
        node = memo[key] = Node(
            (axis.size for axis in axes),
            (factor.node,),
            lambda program, value: _sum_over(program, value, gone),
            flops=factor.node.numel,
            moved=factor.node.numel,
            label="sum",
        )
    return Factor(node, axes)


def _sum_over(program: Program, value: Staged, gone: tuple[int, ...]) -> Staged:
    made: Staged = torch.sum(value, gone)
    found = _mask_over(program, value, tuple(range(value.ndim)), gone) if value.slot in program.masks else None
    return _noted(program, made, [found and found[0]])


def transpose_to(factor: Factor, order: Sequence[Axis], memo: dict[object, Node]) -> Factor:
    """Permute a factor's axes (a view)."""
    axes = tuple(order)
    if axes == factor.axes:
        return factor
    permutation = tuple(factor.axes.index(axis) for axis in axes)
    key = ("permute", id(factor.node), permutation)
    node = memo.get(key)
    if node is None:
        node = memo[key] = Node(
            (axis.size for axis in axes), (factor.node,),
            lambda program, value: program.view_of(value, lambda v: permute(v, permutation)), label="permute",
        )  # fmt: skip
        if factor.node.running is not None:
            node.running = factor.node.running.placed(permutation)
    return Factor(node, axes)


def permute(value: Staged, permutation: tuple[int, ...]) -> Staged:
    """Permute dimensions; nothing is recorded for the identity."""
    if permutation == tuple(range(len(permutation))):
        return value
    if len(permutation) == 2:
        return torch.t(value)
    return torch.permute(value, permutation)


def _pair(
    first: Factor, second: Factor, still: set[Axis], memo: dict[object, Node], wanted: Sequence[Axis]
) -> Factor:
    """Contract two factors; axes outside ``still`` are summed. ``wanted`` is the order of the final result."""
    if first.node.running is not None or second.node.running is not None:
        found = _running_product(first, second, still, memo, wanted)
        if found is not None:
            return found
    return _plain_pair(first, second, still, memo, wanted)


def _running_product(
    first: Factor, second: Factor, still: set[Axis], memo: dict[object, Node], wanted: Sequence[Axis]
) -> Factor | None:
    """A product with matrices that are made by recurrences: summed by these, or of their kind itself and then summed."""
    for one, two in ((first, second), (second, first)):
        if (found := _merged(one, two, still, memo) or running.summed_product(one, two, still, memo)) is not None:
            return _sum_axes(found, still, memo)
    middle = running.middle(first, second)
    every = {*first.axes, *second.axes} if middle is None else {*first.axes, *second.axes} - ({middle} - still)
    if every <= still:
        return None
    found = _plain_pair(first, second, still | every, memo, wanted)
    if found.node.running is None:
        read = running.read_product(first, second, still, memo)
        return read if read is None else _sum_axes(read, still, memo)
    return _sum_axes(found, still, memo)


def _plain_pair(
    first: Factor, second: Factor, still: set[Axis], memo: dict[object, Node], wanted: Sequence[Axis]
) -> Factor:
    merged = _merged(first, second, still, memo) or _merged(second, first, still, memo)
    if merged is not None:
        return merged
    # An axis that only one of them carries and nobody needs is summed before the product.
    both = set(first.axes) & set(second.axes)
    first = _sum_axes(first, still | both, memo)
    second = _sum_axes(second, still | both, memo)
    summed = [axis for axis in first.axes if axis in both and axis not in still]
    if summed and _stands_before(second, first, both, wanted):
        first, second = second, first
    names: dict[Axis, int] = {}
    left = tuple(names.setdefault(axis, len(names)) for axis in first.axes)
    right = tuple(names.setdefault(axis, len(names)) for axis in second.axes)
    gone = tuple(names[axis] for axis in summed)
    key = ("pair", id(first.node), left, id(second.node), right, gone)
    batch = [axis for axis in first.axes if axis in both and axis in still]
    left_only = [axis for axis in first.axes if axis not in both]
    right_only = [axis for axis in second.axes if axis not in both]
    if summed:
        axes = tuple(batch + left_only + right_only)
    else:
        axes = _product_order(first, second, wanted)
    key = (*key, tuple(names[axis] for axis in axes))
    node = memo.get(key)
    if node is None:
        groups = (
            tuple(names[a] for a in batch),
            tuple(names[a] for a in left_only),
            tuple(names[a] for a in right_only),
            gone,
        )
        order = tuple(names[a] for a in axes)
        sizes = {names[a]: a.size for a in names}
        flops = math.prod(sizes.values())
        moved = first.node.numel + second.node.numel + math.prod(a.size for a in axes)

        def compute(program: Program, x: Staged, y: Staged) -> Staged:
            if not gone:
                return outer_product(program, x, left, y, right, order)
            return _summed_product(program, x, left, y, right, groups, sizes)

        node = memo[key] = Node(
            (a.size for a in axes), (first.node, second.node), compute, flops=flops, moved=moved, label="product"
        )
        node.running = running.of_product(first, second, axes, summed)
    return Factor(node, axes)


class Merge(NamedTuple):
    """A product that is computed without one of its factors.

    What a node's ``merge`` attribute, called with the factor, the other factor and the axes that survive, returns.

    Attributes:
        axes: the axes of the result.
        compute: makes it from the value of the other factor.
        moved: elements read and written.
    """

    axes: tuple[Axis, ...]
    compute: Callable[[Program, Staged], Staged]
    moved: int


def _merged(first: Factor, second: Factor, still: set[Axis], memo: dict[object, Node]) -> Factor | None:
    """The contraction of two factors by a way of the first one's own, if it has one for this."""
    if first.node.merge is None or second.node.running is not None:
        return None
    second = _sum_axes(second, still | set(first.axes), memo)
    found: Merge | None = first.node.merge(first, second, still)
    if found is None:
        return None
    names: dict[Axis, int] = {}
    places = (tuple(names.setdefault(a, len(names)) for a in axes) for axes in (first.axes, second.axes, found.axes))
    key = ("merge", id(first.node), id(second.node), *places)
    node = memo.get(key)
    if node is None:
        flops = math.prod(axis.size for axis in names)
        sizes = (axis.size for axis in found.axes)
        batch = first.node.batch
        node = memo[key] = Node(
            sizes, (second.node,), found.compute, flops=flops, moved=found.moved, label="product", batch=batch
        )
    return Factor(node, found.axes)


def _stands_before(one: Factor, two: Factor, both: set[Axis], wanted: Sequence[Axis]) -> bool:
    """Whether the first free axis of ``one`` comes before that of ``two`` in the order that the reader wants."""
    places = {axis: place for place, axis in enumerate(wanted)}
    firsts = [next((places[a] for a in f.axes if a not in both and a in places), None) for f in (one, two)]
    return None not in firsts and firsts[0] < firsts[1]  # type: ignore[operator]


def _product_order(first: Factor, second: Factor, wanted: Sequence[Axis]) -> tuple[Axis, ...]:
    """The axis order of an element-wise product.

    That of the larger operand, so that it is not permuted; but a product larger than both is laid out as its reader wants it.
    Where the reader sums some of its axes, each axis that is new to the larger operand stands among the others as the reader has
    it: a matrix product of them is then copied into a result in longer runs.
    """
    big, small = (first, second) if len(first.axes) >= len(second.axes) else (second, first)
    extra = [axis for axis in small.axes if axis not in big.axes]
    places = {axis: place for place, axis in enumerate(wanted)}
    if extra and places.keys() >= {*extra, *big.axes}:
        return tuple(sorted((*extra, *big.axes), key=places.__getitem__))
    placed = [axis for axis in extra if axis in places and axis.size > 1]
    order = [*(axis for axis in extra if axis not in placed), *big.axes]
    for axis in sorted(placed, key=places.__getitem__):
        known = [(number, places[other] > places[axis]) for number, other in enumerate(order) if other in places]
        later = next((number for number, after in known if after), None)
        order.insert(later if later is not None else known[-1][0] + 1 if known else 0, axis)
    return tuple(order)


def _common_dtype(x: Staged, y: Staged) -> tuple[Staged, Staged]:
    if x.dtype == y.dtype:
        return x, y
    dtype = torch.promote_types(x.dtype, y.dtype)
    return (x if x.dtype == dtype else x.to(dtype)), (y if y.dtype == dtype else y.to(dtype))


def outer_product(
    program: Program, x: Staged, left: tuple[int, ...], y: Staged, right: tuple[int, ...], order: tuple[int, ...]
) -> Staged:
    """The product of two arrays whose dimensions are called ``left`` and ``right``, over dimensions ``order``.

    It is zero where one of them is a mask that is zero, whatever the other one holds there (``inf``, NaN), and from then on
    a mask itself: which of several factors meets the mask first is the planner's choice, and must not matter.
    """
    if program.summed_masks:
        _note_summed(program, x, y)
        _note_summed(program, y, x)
    if x.slot in program.masks or y.slot in program.masks:
        return _masked_product(program, x, left, y, right, order)
    return _plain_outer(program, x, left, y, right, order)


def _plain_outer(
    program: Program, x: Staged, left: tuple[int, ...], y: Staged, right: tuple[int, ...], order: tuple[int, ...]
) -> Staged:
    if (fused := _fused(program, x, left, y, right, order)) is not None:
        return program.products[fused.slot](y if fused is x else x)
    x, y = _common_dtype(x, y)
    if left == right == order and x.value.shape == y.value.shape:
        made: Staged = program.call(torch.mul, x, y)
        return made
    return _broadcast_product(program, x, left, y, right, order)


def _fused(
    program: Program, x: Staged, left: tuple[int, ...], y: Staged, right: tuple[int, ...], order: tuple[int, ...]
) -> Staged | None:
    """The factor that has a kernel for its product with the other one; None where there is none for these shapes and dtypes."""
    if not program.products or not left == right == order or x.shape != y.shape or x.dtype != y.dtype:
        return None
    return next((value for value in (x, y) if value.slot in program.products), None)


def _masked_product(
    program: Program, x: Staged, left: tuple[int, ...], y: Staged, right: tuple[int, ...], order: tuple[int, ...]
) -> Staged:
    masks, graded = program.masks, program.graded
    exact = [value.slot in masks and value.slot not in graded for value in (x, y)]
    selectors = [
        expand_to(masks[value.slot], names, order) if value.slot in masks else None
        for value, names in ((x, left), (y, right))
    ]
    if all(exact):
        made = _plain_outer(program, x, left, y, right, order)
        if made.dtype.is_floating_point:
            masks[made.slot] = made
        return made
    fused = _fused(program, x, left, y, right, order)
    if exact[0] or exact[1]:
        number, value, names, mask = (x, y, right, selectors[0]) if exact[0] else (y, x, left, selectors[1])
        assert mask is not None
        product = program.products.get(number.slot) if fused is not None else None
        made = _selected(program, value, names, mask, order) if product is None else product(value)
    else:
        made = _plain_outer(program, x, left, y, right, order)
        for mask, value, other in zip(selectors, (x, y), (y, x), strict=True):
            if mask is not None and value is not fused and program.has_to_select(value, other):
                made = _selected(program, made, order, mask, order)
    noted = _noted(program, made, selectors)
    if all(one or value.slot in program.selecting for one, value in zip(exact, (x, y), strict=True)):
        program.selecting.add(noted.slot)
    return noted


def _noted(program: Program, made: Staged, selectors: Sequence[Staged | None]) -> Staged:
    """A product, noted as zero wherever one of its factors is."""
    found = [mask for mask in selectors if mask is not None]
    if not found or not made.dtype.is_floating_point or made.slot in program.masks:
        return made
    mask = found[0]
    if len(found) > 1:
        one, two = (m if m.dtype == torch.bool else torch.gt(m, 0) for m in found)
        mask = torch.logical_and(one, two)
    if mask.ndim < made.ndim:
        mask = torch.reshape(mask, ((1,) * (made.ndim - mask.ndim) + tuple(mask.shape)))
    return program.note_mask(made, mask)


def _broadcast_product(
    program: Program, x: Staged, left: tuple[int, ...], y: Staged, right: tuple[int, ...], order: tuple[int, ...]
) -> Staged:
    if x.numel() < y.numel():
        # The larger one first: it decides how torch lays the result out and walks through it.
        x, left, y, right = y, right, x, left
    one, two = expand_to(x, left, order), expand_to(y, right, order)
    size = math.prod(max(a, b) for a, b in itertools.zip_longest(reversed(one.shape), reversed(two.shape), fillvalue=1))
    return program.call(torch.mul, _laid_out(one, size), _laid_out(two, size))


def _laid_out(value: Staged, size: int) -> Staged:
    """A permuted operand of a product of ``size`` elements that is much larger: copied, or the product is permuted like it."""
    if size < 4 * value.numel():
        return value
    strides = [stride for stride, n in zip(value.value.stride(), value.shape, strict=True) if n != 1 and stride]
    if all(a >= b for a, b in itertools.pairwise(strides)):
        return value
    return value.contiguous()


def _selected(
    program: Program, value: Staged, names: tuple[int, ...], mask: Staged, order: tuple[int, ...]
) -> Staged:
    """A value over dimensions ``order``, zero where the mask is, whatever it holds there (``inf``, NaN)."""
    if mask.dtype != torch.bool and mask.dtype != value.dtype:
        if value.dtype.is_complex:
            mask = torch.ne(mask, 0)
        else:
            value, mask = _common_dtype(value, mask)
    if mask.dtype == value.dtype:
        # The kernel of relu's derivative: several times faster than `where`.
        return program.call(  # type: ignore[no-any-return]
            aten.threshold_backward.default, expand_to(value, names, order), mask, 0
        )
    return torch.where(mask, expand_to(value, names, order), 0.0)


def expand_to(value: Staged, names: tuple[int, ...], order: tuple[int, ...]) -> Staged:
    """View ``value`` (dimensions called ``names``) so that it broadcasts against dimensions called ``order``."""
    if names == order:
        return value
    wanted = tuple(name for name in order if name in names)
    if wanted != names:
        value = permute(value, tuple(names.index(name) for name in wanted))
    for position, name in enumerate(order[order.index(wanted[0]) :] if wanted else ()):
        if name not in names:
            value = torch.unsqueeze(value, position)
    return value


def _summed_product(
    program: Program, x: Staged, left: tuple[int, ...], y: Staged, right: tuple[int, ...],
    groups: tuple[tuple[int, ...], ...], sizes: dict[int, int],
) -> Staged:  # fmt: skip
    """A contraction with summed axes. A mask over none of these is a mask of the result as well."""
    order = tuple(name for group in groups[:3] for name in group)
    selectors = [_mask_over(program, value, names, groups[3]) for value, names in ((x, left), (y, right))]
    one, two = _common_dtype(_cleared(program, x, left, y, right), _cleared(program, y, right, x, left))
    made = _matrix_product(one, left, two, right, groups, sizes)
    found: list[Staged | None] = [None, None]
    for number, (selector, other) in enumerate(zip(selectors, (y, x), strict=True)):
        if selector is not None:
            mask, names = selector
            found[number] = mask = expand_to(mask, names, order)
            if program.may_be_infinite(other):
                made = _selected(program, made, order, mask, order)
    noted = _noted(program, made, found)
    if noted.slot not in program.masks and noted.dtype.is_floating_point:
        for value, names in ((x, left), (y, right)):
            mask = program.masks.get(value.slot)
            if mask is not None:
                program.summed_masks[noted.slot] = lambda mask=mask, names=names: _any_of(mask, names, groups[3], order)
    return noted


def _any_of(mask: Staged, names: tuple[int, ...], gone: tuple[int, ...], order: tuple[int, ...]) -> Staged:
    """Where a sum over dimensions ``gone`` has a term that a mask keeps, over dimensions ``order``."""
    kept = tuple(name for name in names if name not in gone)
    dims = tuple(place for place, name in enumerate(names) if name in gone)
    found = torch.any(mask if mask.dtype == torch.bool else torch.gt(mask, 0), dims[0])
    for number, dim in enumerate(dims[1:], 1):
        found = torch.any(found, dim - number)
    return _broadcast_to(found, kept, order)


def _note_summed(program: Program, value: Staged, other: Staged) -> None:
    """Note a sum as zero where it has none but masked terms, beside a factor that may be infinite (a row of NaN)."""
    mask = program.summed_masks.get(value.slot)
    if mask is not None and value.slot not in program.masks and program.may_be_infinite(other):
        program.note_mask(value, mask())


def _cleared(program: Program, value: Staged, names: tuple[int, ...], other: Staged, others: tuple[int, ...]) -> Staged:
    """A factor that may be infinite, zero where a mask of the other one is that stands over dimensions of both alone."""
    mask = program.masks.get(other.slot)
    if mask is None or not program.may_be_infinite(value):
        return value
    shared = tuple(name for name, size in zip(others, mask.shape, strict=True) if size != 1)
    if not shared or not set(shared) <= set(names):
        return value
    mask = torch.reshape(mask, [size for size in mask.shape if size != 1])
    return _selected(program, value, names, _broadcast_to(mask, shared, names), names)


def _broadcast_to(mask: Staged, names: tuple[int, ...], order: tuple[int, ...]) -> Staged:
    """A view that broadcasts against all of the dimensions ``order``."""
    viewed = expand_to(mask, names, order)
    missing = len(order) - viewed.ndim
    return torch.reshape(viewed, ((1,) * missing + tuple(viewed.shape))) if missing else viewed


def _mask_over(
    program: Program, value: Staged, names: tuple[int, ...], gone: tuple[int, ...]
) -> tuple[Staged, tuple[int, ...]] | None:
    """The mask of a value, over the dimensions that are not ``gone``; None where it stands over some of these."""
    mask = program.masks.get(value.slot)
    if mask is None or any(mask.shape[names.index(name)] != 1 for name in gone if value.shape[names.index(name)] != 1):
        return None
    kept = tuple(name for name in names if name not in gone)
    return torch.reshape(mask, [mask.shape[names.index(name)] for name in kept]), kept


def _matrix_product(
    x: Staged,
    left: tuple[int, ...],
    y: Staged,
    right: tuple[int, ...],
    groups: tuple[tuple[int, ...], ...],
    sizes: dict[int, int],
) -> Staged:
    """Lower a contraction with summed axes to dot, mv, mm or bmm, with the fewest reshapes."""
    batch, left_only, right_only, gone = groups
    if not batch and len(gone) == len(left) == len(right):
        if len(gone) == 1:
            return torch.dot(x, y)
        if left == right:
            return torch.sum(torch.mul(x, y))
    if batch and _is_thin(x, left, y, right, groups, sizes):
        # Matrix products of single rows are slower than multiplying and summing.
        order = batch + left_only + right_only
        if not left_only and not right_only:
            product = torch.mul(expand_to(x, left, order + gone), expand_to(y, right, order + gone))
            return torch.sum(product, tuple(range(len(order), len(order) + len(gone))))
        if len(left) < len(right):
            x, left, y, right = y, right, x, left
        total = torch.sum(torch.mul(x, expand_to(y, right, left)), tuple(left.index(name) for name in gone))
        kept = [name for name in left if name not in gone]
        return permute(total, tuple(kept.index(name) for name in order))
    b, m, n, k = (math.prod(sizes[name] for name in group) for group in groups)
    if batch and len(gone) == 1 and len(left_only) < 2 and len(right_only) < 2:
        rows, columns = batch + left_only + gone, batch + gone + right_only
        one, two = expand_to(x, left, rows), expand_to(y, right, columns)
        one = one if left_only else torch.unsqueeze(one, -2)
        two = two if right_only else torch.unsqueeze(two, -1)
        if many_small(one.value, two.value):
            return _view(products_by_columns(one, two), [sizes[name] for name in batch + left_only + right_only])
    x_shape = ([b] if batch else []) + ([m] if left_only else []) + [k]
    y_shape = ([b] if batch else []) + [k] + ([n] if right_only else [])
    if batch and not left_only:
        x_shape.insert(1, 1)
    if batch and not right_only:
        y_shape.append(1)
    x = _matrix(x, left, (batch, left_only, gone), x_shape)
    y = _matrix(y, right, (batch, gone, right_only), y_shape)
    result = torch.bmm(x, y) if batch else plain_product(x, y)
    return _view(result, [sizes[name] for name in batch + left_only + right_only])


def _is_thin(
    x: Staged, left: tuple[int, ...], y: Staged, right: tuple[int, ...],
    groups: tuple[tuple[int, ...], ...], sizes: dict[int, int],
) -> bool:  # fmt: skip
    """Whether the products of a stack are one dot product each, or a few of operands that stand in memory along the stack."""
    batch, left_only, right_only, _ = groups
    if not left_only and not right_only:
        return True
    if left_only and right_only or math.prod(sizes[name] for name in left_only + right_only) > _FEW_DOTS:
        return False
    last = next((name for name in reversed(batch) if sizes[name] != 1), None)
    if last is None or sizes[last] < _LONG_RUN:
        return False
    return all(value.value.stride(names.index(last)) == 1 for value, names in ((x, left), (y, right)))


def _matrix(
    value: Staged, names: tuple[int, ...], groups: tuple[tuple[int, ...], ...], shape: list[int]
) -> Staged:
    """View a value as a matrix (or a stack of them), with ``groups`` of its dimensions as stack, rows and columns.

    Where that takes a copy, the transpose is copied instead if torch walks through memory better so.
    """
    batch, rows, columns = groups
    order, flipped = batch + rows + columns, batch + columns + rows
    if rows and columns and _copying(value, names, (batch, columns, rows)) < _copying(value, names, groups):
        turned = permute(value, tuple(names.index(name) for name in flipped))
        return torch.transpose(_view(turned, [*shape[:-2], shape[-1], shape[-2]]), -1, -2)
    return _view(permute(value, tuple(names.index(name) for name in order)), shape)


def _copying(value: Staged, names: tuple[int, ...], groups: tuple[tuple[int, ...], ...]) -> float:
    """What it costs to lay a value out with these groups of dimensions merged: 0 for a view; short runs cost more."""
    strides = dict(zip(names, value.value.stride(), strict=True))
    sizes = dict(zip(names, value.shape, strict=True))
    merged = True
    for group in groups:
        axes = [name for name in group if sizes[name] != 1]
        merged = merged and all(strides[a] == strides[b] * sizes[b] for a, b in itertools.pairwise(axes))
    if merged:
        return 0.0
    run = 1
    for name in reversed([name for group in groups for name in group]):
        if sizes[name] != 1 and strides[name] != run:
            break
        run *= sizes[name]
    return value.numel() * (1 + 8 / max(run, 1))


def _view(value: Staged, shape: list[int]) -> Staged:
    return value if list(value.shape) == shape else torch.reshape(value, shape)
