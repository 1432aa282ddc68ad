"""``grid_sample``: each output mixes the inputs next to a place, which the grid names; linear, cubic and nearest interpolation.

Along each dimension of space an output reads two taps (four for cubic interpolation, one for nearest places). So the local
Jacobian with respect to the input has, per dimension, a factor of weights and a one-hot of places; that with respect to the grid
is dense over coordinates alone. Source of coordinates, paddings and their one-sided derivatives:
``aten/src/ATen/native/GridSamplerUtils.h``. A grid of an affine map (``affine_grid``) is a product with constant coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from chainrule.maps.nodes import leaf
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Factor, OneHot, Term, dims_of, new_axes
from chainrule.rules.base import Call, Edge, Rule, formula_node, single
from chainrule.rules.conventions import clamp_inside

aten = torch.ops.aten

_BILINEAR, _NEAREST, _BICUBIC = 0, 1, 2
_TAPS = {_BILINEAR: 2, _NEAREST: 1, _BICUBIC: 4}
_BORDER, _REFLECTION = 1, 2


class _Taps(NamedTuple):
    """What outputs read along one dimension of space: arrays ``(N, taps, *out)``, the outputs next to each other in memory."""

    places: Any
    weights: Any
    slopes: Any


def _reflected(place: Any, low: float, span: float) -> tuple[Any, Any]:
    """Places reflected at ``low`` and ``low + span`` until they lie between, and the derivative."""
    if not span:
        return torch.zeros_like(place), torch.zeros_like(place)
    shifted = place - low
    sign = torch.where(shifted < 0, -1.0, torch.ones_like(place))
    shifted = torch.abs(shifted)
    rest = torch.fmod(shifted, span)
    is_even = torch.fmod(torch.floor(shifted / span), 2) == 0
    return torch.where(is_even, rest + low, span + low - rest), torch.where(is_even, sign, -sign)


def _cubic(share: Any) -> tuple[Any, Any]:
    """Weights of the four taps next to a place (Keys' kernel, 1981, with a = -3/4, as in torch), and their derivatives."""
    a = -0.75

    def outer(x: Any) -> tuple[Any, Any]:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a, (3 * a * x - 10 * a) * x + 8 * a

    def inner(x: Any) -> tuple[Any, Any]:
        return ((a + 2) * x - (a + 3)) * x * x + 1, (3 * (a + 2) * x - 2 * (a + 3)) * x

    found = outer(share + 1), inner(share), inner(1 - share), outer(2 - share)
    weights = torch.stack([weight for weight, _ in found], 1)
    return weights, torch.stack([found[0][1], found[1][1], -found[2][1], -found[3][1]], 1)


def _cubic_taps(place: Any, size: int, padding: int, align: bool, stretch: float) -> _Taps:
    """Each tap is padded by itself: beyond a border it reads the border, or the reflected place."""
    first = torch.floor(place)
    weights, slopes = _cubic(place - first)
    places: Any = torch.stack([first - 1, first, first + 1, first + 2], 1)
    if padding == _REFLECTION:
        places = _reflected(places, *((0.0, size - 1.0) if align else (-0.5, float(size))))[0]
    if padding in (_BORDER, _REFLECTION):
        return _Taps(torch.clamp(places, 0, size - 1).to(torch.long), weights, slopes * stretch)
    inside = torch.logical_and(places >= 0, places < size)
    found = torch.where(inside, places, 0.0).to(torch.long)
    return _Taps(found, torch.where(inside, weights, 0.0), torch.where(inside, slopes * stretch, 0.0))


def _taps(call: Call, program: Program, dim: int) -> _Taps:
    """The taps along a dimension of the input's space, the first of which is 0; the grid names the last one first."""
    item, grid, mode, padding, align = call.args[:5]
    space = call.shape(item)[2:]
    size = space[dim]
    place = torch.select(call.stage(program, grid), -1, len(space) - 1 - dim)
    stretch = (size - 1) / 2 if align else size / 2
    place = place * stretch + (size - 1) / 2
    if mode == _BICUBIC:
        return _cubic_taps(place, size, padding, align, stretch)
    slope: Any = None
    if padding == _REFLECTION:
        place, slope = _reflected(place, *((0.0, size - 1.0) if align else (-0.5, float(size))))
    if padding in (_BORDER, _REFLECTION):
        inner = torch.logical_and(place > 0, place < size - 1)
        slope = torch.where(inner, torch.ones_like(place) if slope is None else slope, 0.0)
        place = clamp_inside(place, 0.0, size - 1.0)
    if mode == _NEAREST:
        places = torch.unsqueeze(torch.round(place), 1)
        weights = torch.ones_like(places)
        slopes = torch.zeros_like(places)
    else:
        first = torch.floor(place)
        share = place - first
        places = torch.stack([first, first + 1], 1)
        weights = torch.stack([1 - share, share], 1)
        rise = torch.full_like(place, stretch) if slope is None else slope * stretch
        slopes = torch.stack([-rise, rise], 1)
    inside = torch.logical_and(places >= 0, places < size)
    found = torch.where(inside, places, 0.0).to(torch.long)
    return _Taps(found, torch.where(inside, weights, 0.0), torch.where(inside, slopes, 0.0))


def _input_term(call: Call) -> Term:
    out, whole = new_axes(call.out_shape), new_axes(call.shape(call.args[0]))
    samples, channels, *outputs = out
    count = _TAPS[call.args[2]]
    factors, relations = [], []
    for dim, target in enumerate(whole[2:]):
        axes = (samples, Axis(count), *outputs)
        sizes = tuple(axis.size for axis in axes)
        weights = formula_node(call, sizes, lambda program, d=dim: _taps(call, program, d).weights, label="taps")
        places = leaf(sizes, lambda program, d=dim: _taps(call, program, d).places, label="index")
        factors.append(Factor(weights, axes))
        relations.append(OneHot(places, axes, target))
    in_dims = ((samples,), (channels,), *((axis,) for axis in whole[2:]))
    return Term(dims_of(out), in_dims, tuple(factors), tuple(relations))


def _by_grid(call: Call, program: Program) -> Staged:
    """The derivative by the coordinates: an array ``(N, dimensions of space, C, *out)``."""
    samples, channels, *space = call.shape(call.args[0])
    outputs, rank, count = call.out_shape[2:], len(space), _TAPS[call.args[2]]
    taps = [_taps(call, program, dim) for dim in range(rank)]

    def spread(array: Any, dim: int) -> Any:
        shape = [1] * rank
        shape[dim] = count
        return torch.reshape(array, (samples, *shape, math.prod(outputs)))

    def merged(factors: Iterable[Any]) -> Any:
        product: Any = None
        for factor in factors:
            product = factor if product is None else product * factor
        return torch.reshape(product, (samples, 1, count**rank, math.prod(outputs)))

    place: Any = None
    for dim, tap in enumerate(taps):
        own = spread(tap.places, dim)
        place = own if place is None else place * space[dim] + own
    full = (samples, channels, count**rank * math.prod(outputs))
    place = torch.broadcast_to(torch.reshape(place, (samples, 1, full[2])), full)
    values = torch.reshape(call.stage(program, call.args[0]), (samples, channels, math.prod(space)))
    values = torch.reshape(torch.gather(values, 2, place), (samples, channels, count**rank, math.prod(outputs)))
    found = []
    for coordinate in reversed(range(rank)):
        rates = merged(spread(tap.slopes if dim == coordinate else tap.weights, dim) for dim, tap in enumerate(taps))
        found.append(torch.reshape(torch.sum(values * rates, 2), (samples, channels, *outputs)))
    stacked: Staged = torch.stack(found, 1)  # type: ignore[assignment]
    return stacked


def _grid_sampler(call: Call) -> Iterable[Edge]:
    item, grid, mode = call.args[:3]
    if not call.tensor(call.outputs[0]).numel():
        return
    if call.is_active(item):
        yield single(call, item, [_input_term(call)])
    if call.is_active(grid) and mode != _NEAREST:
        out, coordinates = new_axes(call.out_shape), Axis(len(call.out_shape) - 2)
        axes = (out[0], coordinates, *out[1:])
        sizes = tuple(axis.size for axis in axes)
        node = formula_node(call, sizes, lambda program: _by_grid(call, program), flops=math.prod(sizes) * _TAPS[mode] ** 2)
        in_dims = ((out[0],), *((axis,) for axis in out[2:]), (coordinates,))
        yield single(call, grid, [Term(dims_of(out), in_dims, (Factor(node, axes),))])


def _base_grid(space: Sequence[int], align: bool, like: torch.Tensor) -> torch.Tensor:
    """The homogeneous coordinates of places, the last dimension of space first: ``(*space, rank + 1)``."""
    rank = len(space)
    parts = []
    for dim, size in reversed([*enumerate(space)]):
        steps = torch.linspace(-1, 1, size, dtype=torch.float64) if size > 1 else torch.zeros(size, dtype=torch.float64)
        steps = steps.to(device=like.device, dtype=like.dtype)
        steps = steps if align or not size else steps * (size - 1) / size
        parts.append(steps.reshape([-1 if d == dim else 1 for d in range(rank)]).expand(*space))
    return torch.stack([*parts, torch.ones_like(parts[0])], -1)


def _affine_grid(call: Call) -> Iterable[Edge]:
    theta, size, align = call.args[:3]
    if not call.is_active(theta):
        return
    space, like = size[2:], call.tensor(theta)
    samples, rows, columns = new_axes(like.shape)
    places = new_axes(space)
    axes = (*places, columns)
    node = leaf(
        tuple(axis.size for axis in axes), lambda program: program.constant(_base_grid(space, align, like)), label="base grid"
    )
    out_dims = ((samples,), *dims_of(places), (rows,))
    yield single(call, theta, [Term(out_dims, ((samples,), (rows,), (columns,)), (Factor(node, axes),))])


_RULE = Rule("resampling", _grid_sampler)

RULES: dict[Any, Rule] = {
    aten.grid_sampler_2d.default: _RULE,
    aten.grid_sampler_3d.default: _RULE,
    aten.affine_grid_generator.default: Rule("resampling", _affine_grid, reads=False),
}

__all__ = ["RULES"]
