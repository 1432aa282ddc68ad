"""Products of two arrays with named dimensions that are zero where masks among their factors are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from chainrule.maps.matrix_products import matrix_product
from chainrule.maps.staging import Program, Staged
from chainrule.maps.views import expand_to, of_one_dtype

aten = torch.ops.aten


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
    x, y = of_one_dtype(x, y)
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
            value, mask = of_one_dtype(value, mask)
    if mask.dtype == value.dtype:
        # The kernel of relu's derivative: several times faster than `where`.
        return program.call(  # type: ignore[no-any-return]
            aten.threshold_backward.default, expand_to(value, names, order), mask, 0
        )
    return torch.where(mask, expand_to(value, names, order), 0.0)


def summed_product(
    program: Program, x: Staged, left: tuple[int, ...], y: Staged, right: tuple[int, ...],
    groups: tuple[tuple[int, ...], ...], sizes: dict[int, int],
) -> Staged:  # fmt: skip
    """A contraction with summed axes. A mask over none of these is a mask of the result as well."""
    order = tuple(name for group in groups[:3] for name in group)
    selectors = [_mask_over(program, value, names, groups[3]) for value, names in ((x, left), (y, right))]
    one, two = of_one_dtype(_cleared(program, x, left, y, right), _cleared(program, y, right, x, left))
    made = matrix_product(one, left, two, right, groups, sizes)
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


def sum_over(program: Program, value: Staged, gone: tuple[int, ...]) -> Staged:
    """A sum over dimensions ``gone``; a mask over none of these is a mask of the sum as well."""
    made: Staged = torch.sum(value, gone)
    found = _mask_over(program, value, tuple(range(value.ndim)), gone) if value.slot in program.masks else None
    return _noted(program, made, [found and found[0]])


__all__ = ["outer_product", "sum_over", "summed_product"]
