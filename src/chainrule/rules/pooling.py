"""Pooling and resampling: maxima keep the index relation that the op returns; averages and resamplings are linear."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from chainrule.maps.nodes import leaf
from chainrule.maps.onehots import digit
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Factor, OneHot, Term, constant_index, dims_of, new_axes
from chainrule.rules.base import Call, Edge, Rule, single
from chainrule.rules.families import operator_edge

aten = torch.ops.aten


def _are_apart(call: Call, rank: int) -> bool:
    """Whether no two windows of a maximum share an element."""
    kernel = call.argument("kernel_size")
    stride, dilation = (call.argument(name) for name in ("stride", "dilation"))
    reach = [(kernel[d % len(kernel)] - 1) * dilation[d % len(dilation)] + 1 for d in range(rank)]
    return all(n <= (stride or kernel)[d % len(stride or kernel)] for d, n in enumerate(reach))


def _are_parts(call: Call, rank: int) -> bool:
    """The same for windows that adapt: they do not overlap where their number divides the size."""
    return all(n and not size % n for size, n in zip(call.shape(call.args[0])[-rank:], call.out_shape[-rank:], strict=True))


def _maximum(rank: int, are_apart: Callable[[Call, int], bool] = lambda call, rank: False) -> Rule:
    """A maximum over windows of the last ``rank`` dimensions; its second output holds flat places in the plane.

    Args:
        rank: the number of spatial dimensions.
        are_apart: whether no two windows of a call share an element.
    """

    def linearize(call: Call) -> Iterable[Edge]:
        item = call.args[0]
        if not call.is_active(item):
            return
        shape = call.shape(item)
        sources = new_axes(call.out_shape)
        lead = len(shape) - rank
        targets = new_axes(shape[lead:])
        onehots, stride, total = [], 1, math.prod(shape[lead:])
        flat = leaf(call.out_shape, lambda program: call.stage_output(program, 1), label="index")
        if are_apart(call, rank):
            flat.distinct = frozenset(range(lead, len(shape)))
        for target in reversed(targets):
            onehots.append(OneHot(digit(flat, stride, target.size, total), sources, target))
            stride *= target.size
        yield single(
            call, item, [Term(dims_of(sources), dims_of((*sources[:lead], *targets)), (), tuple(reversed(onehots)))]
        )

    return Rule("selection", linearize)


def _folded(
    rank: int,
    forward: Callable[[Call, Staged, tuple[int, ...]], Staged],
    backward: Callable[..., Staged],
    structure: Callable[[Call, tuple[int, ...], tuple[int, ...]], Term] | None = None,
) -> Rule:
    """A linear op on the last ``rank`` dimensions that acts on rows folded into the batch.

    Args:
        rank: the number of spatial dimensions.
        forward: ``(call, values, folded output shape)``: the op on folded rows.
        backward: ``(call, values, folded input shape)``: its transpose.
        structure: ``(call, output shape, input shape)``: the same as a term.
    """

    def linearize(call: Call) -> Iterable[Edge]:
        item = call.args[0]
        if not call.is_active(item):
            return
        in_shape, out_shape = call.shape(item), call.out_shape
        lead = len(in_shape) - rank

        def acting(action: Callable[..., Staged], source: tuple[int, ...], target: tuple[int, ...]) -> Callable[..., Staged]:
            def act(c: Call, program: Program, rows: Staged, count: int) -> Staged:
                channels = source[lead - 1]
                numel = count
                for size in source[: lead - 1]:
                    numel *= size
                folded = torch.reshape(rows, (numel, channels, *source[lead:]))
                done = action(c, folded, (numel, target[lead - 1], *target[lead:]))
                return torch.reshape(done, (count, *target))

            return act

        diagonal = tuple((d, d) for d in range(lead))
        size = call.tensor(item).numel() + call.tensor(call.outputs[0]).numel()
        push, pull = acting(forward, in_shape, out_shape), acting(backward, out_shape, in_shape)
        terms = None if structure is None else lambda: (structure(call, out_shape, in_shape),)
        yield operator_edge(call, item, push, pull, diagonal, size, structure=terms)

    return Rule("resampling", linearize, reads=False)


def _average(rank: int, op: Any, transpose: Any) -> tuple[Rule, Rule]:
    """An average pooling and its backward op, which is its transpose."""
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")

    def statics(call: Call) -> list[Any]:
        return [list(v) if isinstance(v, tuple) else v for v in (call.argument(name) for name in names)]

    def forward(call: Call, value: Staged, shape: tuple[int, ...]) -> Staged:
        return op(value, *statics(call))

    def backward(call: Call, value: Staged, shape: tuple[int, ...]) -> Staged:
        return transpose(value, value.new_zeros(shape), *statics(call))

    def forward_of_backward(call: Call, value: Staged, shape: tuple[int, ...]) -> Staged:
        size = (value.shape[0], *call.shape(call.args[1])[-rank - 1 :])
        return transpose(value, value.new_zeros(size), *statics(call))

    def transposed(call: Call, out_shape: tuple[int, ...], in_shape: tuple[int, ...]) -> Term:
        return _windows(call, rank, in_shape, out_shape).transpose()

    windows = partial(_windows_of, rank)
    return _folded(rank, forward, backward, windows), _folded(rank, forward_of_backward, forward, transposed)


def _windows_of(rank: int, call: Call, out_shape: tuple[int, ...], in_shape: tuple[int, ...]) -> Term:
    return _windows(call, rank, out_shape, in_shape)


def _windows(call: Call, rank: int, out_shape: tuple[int, ...], in_shape: tuple[int, ...]) -> Term:
    """An average over windows: which element each tap reads, and the share of each window, one dimension at a time."""
    kernel, stride, padding = (call.argument(name) for name in ("kernel_size", "stride", "padding"))
    divisor, device = call.argument("divisor_override"), call.workspace.device
    lead = len(in_shape) - rank
    axes = new_axes(in_shape[:lead])
    places, read, factors, relations = [], [], [], []
    for d in range(rank):
        size, width = in_shape[lead + d], kernel[d % len(kernel)]
        step, pad = (stride or kernel)[d % len(stride or kernel)], padding[d % len(padding)]
        place, tap, target = Axis(out_shape[lead + d]), Axis(width), Axis(size)

        def positions(dev: torch.device, s: int = step, p: int = pad, n: int = size, o: int = place.size,
                      w: int = width) -> torch.Tensor:
            found = torch.arange(w, device=dev)[:, None] + torch.arange(o, device=dev) * s - p
            return torch.where((found >= 0) & (found < n), found, -1)

        def shares(dev: torch.device, s: int = step, p: int = pad, n: int = size, o: int = place.size,
                   w: int = width) -> torch.Tensor:
            first = torch.arange(o, device=dev) * s - p
            last = torch.clamp(first + w, max=n + p)
            if not call.argument("count_include_pad"):
                first, last = torch.clamp(first, min=0), torch.clamp(last, max=n)
            return torch.reciprocal((last - first).to(call.workspace.dtype))

        relations.append(OneHot(constant_index((width, place.size), positions, device), (tap, place), target, True))
        if divisor is None:
            factors.append(Factor(constant_index((place.size,), shares, device), (place,)))
        places.append(place)
        read.append(target)
    scale = 1.0 if divisor is None else 1.0 / divisor
    return Term(dims_of((*axes, *places)), dims_of((*axes, *read)), tuple(factors), tuple(relations), scale)


#: The size of the dimensions that are left as they are while one is looked at (some kernels misread a size of one).
_BESIDE = 2


def _resampled(
    rank: int, forward: Callable[..., Staged], backward: Callable[..., Staged], along: Callable[..., torch.Tensor]
) -> tuple[Rule, Rule]:
    """A resampling that acts on one dimension after the other, and its backward op.

    Args:
        rank: the number of spatial dimensions.
        forward: as for :func:`_folded`.
        backward: as for :func:`_folded`.
        along: ``(call, values, dimension, size)``: the op on one dimension of some rows, to ``size`` places.
    """

    def structure(call: Call, out_shape: tuple[int, ...], in_shape: tuple[int, ...]) -> Term:
        lead = len(in_shape) - rank
        axes = new_axes(in_shape[:lead])
        places, read, factors, relations = [], [], [], []
        for d, (size, wanted) in enumerate(zip(in_shape[lead:], out_shape[lead:], strict=True)):
            positions, weights = _taps(call, along, rank, d, size, wanted)
            tap, place, target = Axis(len(positions)), Axis(wanted), Axis(size)
            shape, device = (tap.size, wanted), call.workspace.device
            relations.append(OneHot(constant_index(shape, positions.to, device), (tap, place), target, True))
            factors.append(Factor(constant_index(shape, weights.to(call.workspace.dtype).to, device), (tap, place)))
            places.append(place)
            read.append(target)
        return Term(dims_of((*axes, *places)), dims_of((*axes, *read)), tuple(factors), tuple(relations))

    def transposed(call: Call, out_shape: tuple[int, ...], in_shape: tuple[int, ...]) -> Term:
        return structure(call, in_shape, out_shape).transpose()

    return _folded(rank, forward, backward, structure), _folded(rank, backward, forward, transposed)


def _taps(
    call: Call, along: Callable[..., torch.Tensor], rank: int, d: int, size: int, wanted: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each of ``wanted`` places reads of ``size``: positions (-1 for none) and weights, both ``(taps, wanted)``.

    They are found by applying the op to combs: no place reads two teeth of one, and the same teeth weighted by their
    positions tell which one it is.
    """
    period = 4 * math.ceil(max(1.0, size / wanted)) + 4
    dtype = call.tensor(call.args[0]).dtype
    dtype = dtype if dtype.itemsize >= torch.float32.itemsize else torch.float32
    count = min(period, size)
    position = torch.arange(size)
    comb = (position % period == torch.arange(count)[:, None]).to(dtype)
    along_d = [size if e == d else 1 for e in range(rank)]
    whole = [size if e == d else _BESIDE for e in range(rank)]

    def resampled(teeth: torch.Tensor) -> torch.Tensor:
        values = teeth.reshape(count, 1, *along_d).expand(count, 1, *whole).contiguous()
        return along(call, values, d, wanted).movedim(2 + d, 1).reshape(count, wanted, -1)[..., 0]

    weights, moments = resampled(comb), resampled(comb * (position + 1))
    found = torch.where(weights != 0, (moments / weights).round().to(torch.long) - 1, -1)
    order = torch.argsort((found < 0).to(torch.int8), dim=0, stable=True)
    most = int((found >= 0).sum(0).max())
    return found.gather(0, order)[:most], weights.gather(0, order)[:most]


def _adaptive(rank: int, op: Any, transpose: Any) -> tuple[Rule, Rule]:
    def forward(call: Call, value: Staged, shape: tuple[int, ...]) -> Staged:
        return op(value, list(shape[2:]))

    def backward(call: Call, value: Staged, shape: tuple[int, ...]) -> Staged:
        return transpose(value, value.new_zeros(shape))

    def along(call: Call, values: torch.Tensor, d: int, size: int) -> torch.Tensor:
        return op(values, [size if e == d else _BESIDE for e in range(rank)])

    return _resampled(rank, forward, backward, along)


_AVERAGE2 = _average(2, aten.avg_pool2d.default, aten.avg_pool2d_backward.default)
_AVERAGE3 = _average(3, aten.avg_pool3d.default, aten.avg_pool3d_backward.default)
_ADAPTIVE2 = _adaptive(2, aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d_backward.default)
_ADAPTIVE3 = _adaptive(3, aten._adaptive_avg_pool3d.default, aten._adaptive_avg_pool3d_backward.default)


def _upsampling(rank: int, op: Any, transpose: Any) -> tuple[Rule, Rule]:
    """An interpolation to a larger or smaller grid, and its backward op."""

    def extras(call: Call) -> list[Any]:
        known = ("align_corners", *(("scales",) if rank == 1 else ("scales_d", "scales_h", "scales_w")[-rank:]))
        names = {argument.name for argument in call.op._schema.arguments}
        return [call.argument(name) for name in known if name in names]

    def forward(call: Call, value: Staged, shape: tuple[int, ...]) -> Staged:
        return op(value, list(shape[2:]), *extras(call))

    def backward(call: Call, value: Staged, shape: tuple[int, ...]) -> Staged:
        return transpose(value, list(value.shape[2:]), list(shape), *extras(call))

    def along(call: Call, values: torch.Tensor, d: int, size: int) -> torch.Tensor:
        given = extras(call)
        scales = [scale if e == d else None for e, scale in enumerate(given[-rank:])]
        return op(values, [size if e == d else _BESIDE for e in range(rank)], *given[:-rank], *scales)

    return _resampled(rank, forward, backward, along)


_UPSAMPLINGS = {
    "upsample_nearest1d": 1, "_upsample_nearest_exact1d": 1, "upsample_linear1d": 1,
    "upsample_nearest2d": 2, "_upsample_nearest_exact2d": 2, "upsample_bilinear2d": 2, "upsample_bicubic2d": 2,
    "_upsample_bilinear2d_aa": 2, "_upsample_bicubic2d_aa": 2,
    "upsample_nearest3d": 3, "_upsample_nearest_exact3d": 3, "upsample_trilinear3d": 3,
}  # fmt: skip


def _upsampling_rules() -> dict[Any, Rule]:
    rules: dict[Any, Rule] = {}
    for name, rank in _UPSAMPLINGS.items():
        op, transpose = getattr(aten, name).default, getattr(aten, f"{name}_backward").default
        rules[op], rules[transpose] = _upsampling(rank, op, transpose)
    return rules


RULES: dict[Any, Rule] = {
    aten.max_pool2d_with_indices.default: _maximum(2, _are_apart),
    aten.max_pool3d_with_indices.default: _maximum(3, _are_apart),
    aten.adaptive_max_pool2d.default: _maximum(2, _are_parts),
    aten.adaptive_max_pool3d.default: _maximum(3, _are_parts),
    aten.fractional_max_pool2d.default: _maximum(2),
    aten.fractional_max_pool3d.default: _maximum(3),
    aten.avg_pool2d.default: _AVERAGE2[0],
    aten.avg_pool2d_backward.default: _AVERAGE2[1],
    aten.avg_pool3d.default: _AVERAGE3[0],
    aten.avg_pool3d_backward.default: _AVERAGE3[1],
    aten._adaptive_avg_pool2d.default: _ADAPTIVE2[0],
    aten._adaptive_avg_pool2d_backward.default: _ADAPTIVE2[1],
    aten._adaptive_avg_pool3d.default: _ADAPTIVE3[0],
    aten._adaptive_avg_pool3d_backward.default: _ADAPTIVE3[1],
    **_upsampling_rules(),
}
