"""Layers: convolutions and dropout.

A convolution is bilinear. With respect to its input it acts on rows of tangents and cotangents, folded into the batch;
with respect to its weight it is a contraction with the patches of the input, so that samples stay apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch

from chainrule.calls import col2im
from chainrule.dispatch import is_differentiated
from chainrule.maps.contract import Merge
from chainrule.maps.nodes import leaf
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Factor, Term, dims_of, new_axes, shift_onehot
from chainrule.maps.views import permute
from chainrule.rules.base import Call, Edge, Rule, batch_of, diagonal_term, formula_node, single, value_node
from chainrule.rules.families import operator_edge

aten = torch.ops.aten

#: Fewer input channels than this: a matrix product with patches or columns is faster than the kernels of convolutions.
_FEW_CHANNELS = 4

#: So many elements of patches are in the caches when they are multiplied: for samples apart that is faster than the kernels too.
_FEW_PATCHES = 1 << 20


class Geometry:
    """The static arguments of a convolution, one number per spatial dimension."""

    def __init__(self, call: Call) -> None:
        shape, self.weight = call.shape(call.args[0]), call.shape(call.args[1])
        rank = len(shape) - 2
        self.input, self.output = shape[2:], call.out_shape[2:]
        self.kernel = self.weight[2:]
        self.stride = _spread(call.argument("stride"), rank)
        self.padding = _spread(call.argument("padding"), rank)
        self.dilation = _spread(call.argument("dilation"), rank)
        self.transposed = bool(call.argument("transposed"))
        self.output_padding = _spread(call.argument("output_padding"), rank)
        self.groups: int = call.argument("groups")

    def apply(self, rows: Staged, weight: Staged) -> Staged:
        """The convolution without its bias."""
        return aten.convolution.default(
            rows, weight, None, self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups
        )

    def apply_transposed(self, rows: Staged, weight: Staged) -> Staged:
        """The transpose of the convolution with respect to its input."""
        reach = [d * (k - 1) - p for d, k, p in zip(self.dilation, self.kernel, self.padding, strict=True)]
        plain = not self.transposed and min(self.padding, default=0) >= 0
        if plain and self.groups == 1 and len(self.kernel) in (1, 2) and self._few_channels(rows):
            return self._by_columns(rows, weight)
        if plain and all(s == 1 for s in self.stride) and min(reach, default=0) >= 0 and _flipped_is_faster(rows):
            flipped = torch.flip(weight, tuple(range(2, weight.ndim)))
            if self.groups == 1:
                flipped = torch.transpose(flipped, 0, 1)
            else:
                outer, inner = self.weight[0] // self.groups, self.weight[1]
                flipped = torch.reshape(flipped, (self.groups, outer, inner, *self.kernel))
                flipped = torch.reshape(torch.transpose(flipped, 1, 2), (self.groups * inner, outer, *self.kernel))
            return aten.convolution.default(
                rows, flipped, None, self.stride, reach, self.dilation, False, self.output_padding, self.groups
            )
        extra = [0] * len(self.kernel)
        if not self.transposed:
            extra = [
                size - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
                for size, out, s, p, d, k in zip(
                    self.input, self.output, self.stride, self.padding, self.dilation, self.kernel, strict=True
                )
            ]
        pulled = aten.convolution.default(
            rows, weight, None, self.stride, self.padding, self.dilation, not self.transposed, extra, self.groups
        )
        for d, size in enumerate(self.input):
            if pulled.shape[2 + d] != size:
                pulled = torch.narrow(pulled, 2 + d, 0, size)
        return pulled

    def reads_back(self) -> bool:
        """Whether a convolution that is not transposed takes the finer side to the coarser one in its whole size."""
        if not self.transposed:
            return True
        reached = (
            (fine + 2 * p - d * (k - 1) - 1) // s + 1
            for fine, s, p, d, k in zip(self.output, self.stride, self.padding, self.dilation, self.kernel, strict=True)
        )
        return tuple(reached) == tuple(self.input)

    def _few_channels(self, rows: Staged) -> bool:
        """Whether most of a register would be left empty by a kernel that takes channels side by side.

        Where that is differentiated, it is a convolution all the same: its derivative is one, and that of sums of columns reads
        them by index.
        """
        if is_differentiated():
            return False
        return rows.device.type == "cpu" and not rows.dtype.is_complex and self.weight[1] < _FEW_CHANNELS

    def _by_columns(self, rows: Staged, weight: Staged) -> Staged:
        """The transpose as one matrix product, to what each output sends to each of its taps, and their sum."""
        count, outer, inner = rows.shape[0], self.weight[0], self.weight[1]
        matrix = torch.t(torch.reshape(weight, (outer, inner * prod(self.kernel))))
        columns = torch.matmul(matrix, torch.reshape(rows, (count, outer, prod(self.output))))
        # One spatial dimension is two, the first of size one.
        lead = [1] * (2 - len(self.kernel))
        size, kernel = [*lead, *self.input], [*lead, *self.kernel]
        dilation, stride = [*lead, *self.dilation], [*lead, *self.stride]
        padding = [*(0 for _ in lead), *self.padding]
        summed = columns.program.call(col2im, columns, size, kernel, dilation, padding, stride)
        return torch.reshape(summed, (count, inner, *self.input))

    def taps(self, d: int, device: torch.device) -> torch.Tensor:
        """Which input a tap of the kernel reads for each output: ``(kernel, output)``; the input's size for none."""
        k = torch.arange(self.kernel[d], device=device)[:, None] * self.dilation[d]
        o = torch.arange(self.output[d], device=device)[None, :]
        size = self.input[d]
        if self.transposed:
            place = o + self.padding[d] - k
            read = torch.div(place, self.stride[d], rounding_mode="floor")
            missing = (place % self.stride[d] != 0) | (read < 0) | (read >= size)
        else:
            read = o * self.stride[d] - self.padding[d] + k
            missing = (read < 0) | (read >= size)
        return torch.where(missing, size, read)


def _flipped_is_faster(rows: Staged) -> bool:
    """Whether a convolution with the flipped kernel is faster than a transposed one: in most shapes, with wide registers."""
    return rows.device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _spread(values: Sequence[int] | int, rank: int) -> list[int]:
    items = [values] if isinstance(values, int) else list(values)
    return items * rank if len(items) == 1 else items


def _convolution(call: Call) -> Iterable[Edge]:
    item, weight, bias = call.args[:3]
    geometry = Geometry(call)
    if call.is_active(item):
        yield _input_edge(call, geometry, item, weight)
    if call.is_active(weight):
        yield single(call, weight, [_weight_term(call, geometry, item)])
    if bias is not None and call.is_active(bias):
        axes = new_axes(call.out_shape)
        yield single(call, bias, [Term(dims_of(axes), ((axes[1],),))])


def _input_edge(call: Call, geometry: Geometry, item: Any, weight: Any) -> Edge:
    def folded(rows: Staged) -> Staged:
        return torch.reshape(rows, (rows.shape[0] * rows.shape[1], *rows.shape[2:]))

    def unfolded(rows: Staged, shape: tuple[int, ...], count: int) -> Staged:
        return torch.reshape(rows, (count, *shape))

    def push(c: Call, program: Program, rows: Staged, count: int) -> Staged:
        return unfolded(geometry.apply(folded(rows), c.stage(program, weight)), c.out_shape, count)

    def pull(c: Call, program: Program, rows: Staged, count: int) -> Staged:
        return unfolded(geometry.apply_transposed(folded(rows), c.stage(program, weight)), c.shape(item), count)

    taps = 1
    for size in geometry.weight[1:]:
        taps *= size
    flops = call.tensor(call.outputs[0]).numel() * taps
    terms = (_stencil_term(call, geometry, item, weight),)
    return operator_edge(call, item, push, pull, ((0, 0),), flops, terms=terms, structure=lambda: terms)


def _stencil_term(call: Call, geometry: Geometry, item: Any, weight: Any) -> Term:
    """The weight, and for each spatial dimension the shift ``fine == stride * coarse + dilation * tap - padding``.

    The fine side is the input; of a transposed convolution it is the output.
    """
    groups = geometry.groups
    n, g = Axis(call.shape(item)[0]), Axis(groups)
    outer, inner = Axis(call.out_shape[1] // groups), Axis(call.shape(item)[1] // groups)
    kernel = new_axes(geometry.kernel)
    fine, coarse = new_axes(geometry.input), new_axes(geometry.output)
    if geometry.transposed:
        fine, coarse = coarse, fine
    memo, device = call.workspace.memo, call.workspace.device
    steps = tuple(zip(geometry.stride, geometry.dilation, strict=True))
    shifts = tuple(
        shift_onehot((coarse[d], kernel[d]), fine[d], -geometry.padding[d], steps[d], memo, device) for d in range(len(kernel))
    )
    axes = (g, inner, outer, *kernel) if geometry.transposed else (g, outer, inner, *kernel)
    factor = Factor(value_node(call, weight, [axis.size for axis in axes]), axes)
    made, read = (fine, coarse) if geometry.transposed else (coarse, fine)
    return Term(((n,), (g, outer), *dims_of(made)), ((n,), (g, inner), *dims_of(read)), (factor,), shifts)


def _weight_term(call: Call, geometry: Geometry, item: Any) -> Term:
    """Contraction of the input's patches, one group at a time, with the weight."""
    batch, channels = call.shape(item)[:2]
    groups = geometry.groups
    n, g = Axis(batch), Axis(groups)
    inner = Axis(channels // groups)
    outer = Axis(call.out_shape[1] // groups)
    kernel, places = new_axes(geometry.kernel), new_axes(geometry.output)
    out_dims = ((n,), (g, outer), *dims_of(places))
    in_dims = ((g, inner), (outer,)) if geometry.transposed else ((g, outer), (inner,))
    gathered = geometry.transposed or min(geometry.padding, default=0) < 0
    stage = partial(_gathered_patches if gathered else _viewed_patches, call, geometry, item)
    axes = _patch_axes(geometry, (n, g, inner), kernel, places)
    sizes = tuple(axis.size for axis in axes)
    node = leaf(sizes, lambda program: torch.reshape(stage(program), sizes), label="patches", batch=batch_of(call.tensor(item)))
    merges = [partial(_convolved, call, geometry, item, axes[:3], kernel, places)]
    if groups == 1 and min(geometry.padding, default=0) >= 0 and geometry.reads_back():
        merges.append(partial(_weight_gradient, call, geometry, item))
    node.merge = partial(_first_merge, merges)
    return Term(out_dims, (*in_dims, *dims_of(kernel)), (Factor(node, axes),))


def _first_merge(merges: Sequence[Callable[..., Merge | None]], *factors: Any) -> Merge | None:
    return next((found for merge in merges if (found := merge(*factors)) is not None), None)


def _convolved(
    call: Call, geometry: Geometry, item: Any, own: tuple[Axis, ...], own_kernel: tuple[Axis, ...], own_places: tuple[Axis, ...],
    patches: Factor, other: Factor, still: set[Axis],
) -> Merge | None:  # fmt: skip
    """Patches times tangents of the weight, summed over the taps: a convolution, for which no patches are needed."""
    if len(set(patches.axes)) < len(patches.axes):
        return None
    named = dict(zip(_patch_axes(geometry, own, own_kernel, own_places), patches.axes, strict=True))
    n, group, inner = (named[axis] for axis in own)
    kernel, places = tuple(named[axis] for axis in own_kernel), tuple(named[axis] for axis in own_places)
    carried = set(other.axes)
    if any(axis in still or (axis not in carried and axis.size != 1) for axis in (inner, *kernel)):
        return None
    if any(axis in carried or axis not in still for axis in (n, *places)):
        return None
    if group.size != 1 and (group not in carried or group not in still):
        return None
    if patches.node.batch > 1 and other.node.batch > 1:
        return None
    rest = tuple(axis for axis in other.axes if axis not in (group, inner, *kernel))
    rows = prod(axis.size for axis in rest)
    order = (group, inner, *rest, *kernel) if geometry.transposed else (group, *rest, inner, *kernel)
    read = tuple(other.axes.index(axis) for axis in order if axis in carried)
    axes = (n, *((group,) if group in still else ()), *rest, *places)
    filters = (group.size * inner.size, rows) if geometry.transposed else (group.size * rows, inner.size)

    def compute(program: Program, value: Staged) -> Staged:
        item_value = call.stage(program, item)
        if value.dtype != item_value.dtype:
            value = value.to(item_value.dtype)
        weight = torch.reshape(permute(value, read), (*filters, *geometry.kernel))
        return torch.reshape(geometry.apply(item_value, weight), tuple(axis.size for axis in axes))

    moved = other.node.numel + call.tensor(item).numel() + prod(axis.size for axis in axes)
    return Merge(axes, compute, moved)


def _patch_axes(
    geometry: Geometry, lead: tuple[Axis, ...], kernel: tuple[Axis, ...], places: tuple[Axis, ...]
) -> tuple[Axis, ...]:
    """The axes of patches: of the batch, groups and channels, then of places and taps."""
    if geometry.transposed or min(geometry.padding, default=0) < 0:
        return (*lead, *(axis for pair in zip(kernel, places, strict=True) for axis in pair))
    return (*lead, *places, *kernel)


def _weight_gradient(
    call: Call, geometry: Geometry, item: Any, patches: Factor, other: Factor, still: set[Axis]
) -> Merge | None:
    """Cotangents times patches, summed over the places, by torch's kernel for the gradient of the weight.

    A transposed convolution has the same gradient, with its input and its cotangent in each other's place.
    """
    rank = len(geometry.kernel)
    n, group, inner = patches.axes[:3]
    places, kernel = patches.axes[3 : 3 + rank], patches.axes[3 + rank :]
    if geometry.transposed:
        kernel, places = patches.axes[3::2], patches.axes[4::2]
    carried = set(other.axes)
    if len(set(patches.axes)) < len(patches.axes) or call.tensor(item).dtype.is_complex:
        return None
    if any(axis in still or (axis not in carried and axis.size != 1) for axis in places):
        return None
    if any(axis in carried or axis not in still for axis in (inner, *kernel)):
        return None
    apart = n in still
    if n not in carried and (apart or n.size != 1):
        return None
    if apart or (patches.node.batch > 1 and other.node.batch > 1):
        samples = max(patches.node.batch, other.node.batch)
        small = inner.size < _FEW_CHANNELS or patches.node.numel * samples <= _FEW_PATCHES
        # The patches of a transposed convolution are read by index, and have zeros between what they read.
        if prod(geometry.kernel) == 1 or (small and not geometry.transposed):
            return None
    rest = tuple(axis for axis in other.axes if axis not in (n, group, *places))
    front = tuple(axis for axis in (n, group) if axis in still)
    rows = prod(axis.size for axis in rest)
    read = tuple(other.axes.index(axis) for axis in (n, group, *rest, *places) if axis in carried)
    axes = (*front, inner, *rest, *kernel) if geometry.transposed else (*front, *rest, inner, *kernel)

    def compute(program: Program, value: Staged) -> Staged:
        item_value = call.stage(program, item)
        channels, count = inner.size, n.size
        if value.dtype != item_value.dtype:
            value = value.to(item_value.dtype)
        value = permute(value, read)
        if apart:
            value = torch.reshape(value, (1, count * rows, *geometry.output))
            item_value = torch.reshape(item_value, (1, count * channels, *geometry.input))
        else:
            value = torch.reshape(value, (count, rows, *geometry.output))
        if geometry.transposed:
            value, item_value, rows_in, filters = item_value, value, rows, channels
        else:
            rows_in, filters = channels, rows
        weight = item_value.new_empty((filters * (count if apart else 1), rows_in, *geometry.kernel))
        found = aten.convolution_backward.default(
            value, item_value, weight, None, geometry.stride, geometry.padding, geometry.dilation, False, [0] * rank,
            count if apart else 1, [False, True, False],
        )[1]  # fmt: skip
        return torch.reshape(found, tuple(axis.size for axis in axes))

    moved = other.node.numel + call.tensor(item).numel() + prod(axis.size for axis in axes)
    return Merge(axes, compute, moved)


def backward_in_parts(
    grad: torch.Tensor, item: torch.Tensor, weight: torch.Tensor, bias_sizes: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, output_mask: Any,
) -> tuple[None, torch.Tensor, None]:  # fmt: skip
    """The gradient of a convolution's weight as a product with patches: what is recorded, to be differentiated again."""
    rank = weight.dim() - 2
    for d, amount in enumerate(_spread(padding, rank)):
        if amount:
            item = torch.constant_pad_nd(item, [0, 0] * (rank - 1 - d) + [amount, amount])
    for d, (size, step, spread) in enumerate(zip(weight.shape[2:], _spread(stride, rank), _spread(dilation, rank), strict=True)):
        item = item.unfold(2 + d, (size - 1) * spread + 1, step)
        item = item[..., ::spread] if spread != 1 else item
    count = grad.shape[0]
    filters, channels = weight.shape[:2]
    per_group = filters // groups
    cotangents = grad.reshape(count, groups, per_group, -1).permute(1, 2, 0, 3).reshape(groups, per_group, -1)
    taps = item.reshape(count, groups, channels, *item.shape[2:])
    order = (1, 0, *range(3, 3 + rank), 2, *range(3 + rank, 3 + 2 * rank))
    patches = taps.permute(order).reshape(groups, cotangents.shape[2], -1)
    return None, torch.bmm(cotangents, patches).reshape(weight.shape), None


def only_weight(args: tuple[Any, ...]) -> bool:
    """Whether a convolution's backward gives the gradient of the weight alone, in the form that is recorded in parts."""
    return len(args) == 11 and not args[7] and list(args[10]) == [False, True, False] and min(args[5], default=0) >= 0


def _viewed_patches(call: Call, geometry: Geometry, item: Any, program: Program) -> Staged:
    """The patches as overlapping views of the padded input: ``(batch, channels, *outputs, *kernel)``."""
    value = call.stage(program, item)
    if any(geometry.padding):
        value = torch.constant_pad_nd(value, [p for p in reversed(geometry.padding) for _ in range(2)], 0)
    rank = len(geometry.kernel)
    for d in range(rank):
        reach = (geometry.kernel[d] - 1) * geometry.dilation[d] + 1
        value = value.unfold(2 + d, reach, geometry.stride[d])
        if geometry.dilation[d] != 1:
            value = value[..., :: geometry.dilation[d]]
    return value


def _gathered_patches(call: Call, geometry: Geometry, item: Any, program: Program) -> Staged:
    """The patches read by index: ``(batch, channels, kernel, outputs, kernel, outputs, …)``."""
    device = call.tensor(item).device
    value = call.stage(program, item)
    rank = len(geometry.kernel)
    value = torch.constant_pad_nd(value, (0, 1) * rank, 0)
    for d in range(rank):
        taps = program.constant(geometry.taps(d, device).reshape(-1))
        value = torch.index_select(value, 2 + d, taps)
    return value


def _native_dropout(call: Call) -> Iterable[Edge]:
    """The drawn mask, an output of the op, times its scale."""
    item, p, train = call.args[0], call.args[1], call.argument("train")
    axes = new_axes(call.out_shape)
    if not call.is_active(item):
        return
    if train is False:
        yield single(call, item, [diagonal_term(call.shape(item), axes)])
        return
    dtype = call.tensor(call.outputs[0]).dtype
    node = formula_node(call, call.out_shape, lambda program: call.stage_output(program, 1).to(dtype), "mask")
    scale = 0.0 if p == 1 else 1.0 / (1.0 - p)
    yield single(call, item, [diagonal_term(call.shape(item), axes, [Factor(node, axes)], scale)])


#: Ops that have a composite form: which calls are recorded whole nevertheless.
WHOLE: dict[Any, Callable[[tuple[Any, ...], bool, Callable[[Any], bool]], bool]] = {
    aten.convolution_backward.default: lambda args, kernels, is_active: not only_weight(args)
}

RULES: dict[Any, Rule] = {
    aten.convolution.default: Rule("convolution", _convolution),
    aten.native_dropout.default: Rule("pointwise", _native_dropout),
}
