"""Layers: convolutions and dropout.

A convolution is bilinear. With respect to its input it acts on rows of tangents and cotangents, folded into the batch;
with respect to its weight it is a contraction with the patches of the input, so that samples stay apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch

from chainrule.maps.nodes import leaf
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Factor, Term, dims_of, new_axes
from chainrule.rules.base import Call, Edge, Rule, diagonal_term, formula_node, single
from chainrule.rules.families import operator_edge

aten = torch.ops.aten


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
        if not self.transposed and all(s == 1 for s in self.stride) and min(reach, default=0) >= 0:
            # A convolution with the flipped kernel, which is the faster of two kernels in most shapes.
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
    return operator_edge(call, item, push, pull, ((0, 0),), call.tensor(call.outputs[0]).numel() * taps)


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
    if geometry.transposed or min(geometry.padding, default=0) < 0:
        pairs = tuple(axis for pair in zip(kernel, places, strict=True) for axis in pair)
        stage = partial(_gathered_patches, call, geometry, item)
    else:
        pairs = (*places, *kernel)
        stage = partial(_viewed_patches, call, geometry, item)
    axes = (n, g, inner, *pairs)
    sizes = tuple(axis.size for axis in axes)
    node = leaf(sizes, lambda program: torch.reshape(stage(program), sizes), flops=0, label="patches")
    return Term(out_dims, (*in_dims, *dims_of(kernel)), (Factor(node, axes),))


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


RULES: dict[Any, Rule] = {
    aten.convolution.default: Rule("convolution", _convolution),
    aten.native_dropout.default: Rule("pointwise", _native_dropout),
}
