"""Softmax-like ops and normalisations: a diagonal and rank-one terms; every other dimension stays diagonal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from chainrule.maps.nodes import Node
from chainrule.maps.staging import Program
from chainrule.maps.terms import Axis, Factor, Term, dims_of, new_axes
from chainrule.rules.base import Call, Edge, Rule, formula_node, single

aten = torch.ops.aten

Axes = tuple[Axis, ...]


class _Lines:
    """The axes of an op that acts along one dimension and is diagonal in the others."""

    def __init__(self, call: Call) -> None:
        self.shape = call.out_shape
        dim: int = call.argument("dim")
        self.dim = dim % max(len(self.shape), 1)
        self.out: Axes = new_axes(self.shape)
        self.source: Axes = tuple(Axis(a.size) if d == self.dim else a for d, a in enumerate(self.out))

    def diagonal(self, *factors: Factor) -> Term:
        """A term that is diagonal in every dimension."""
        return Term(dims_of(self.out), dims_of(self.out), factors)

    def outer(self, *factors: Factor, scale: float = 1.0) -> Term:
        """A term that couples positions along the dimension."""
        return Term(dims_of(self.out), dims_of(self.source), factors, (), scale)


def _whole(call: Call, formula: Callable[[Program], Any]) -> Node:
    return formula_node(call, call.out_shape, formula)


def _probabilities(call: Call) -> Node:
    """Softmax from its result: the exponential of a log-softmax."""
    return _whole(call, lambda program: torch.exp(call.stage_output(program)))


def _softmax_terms(call: Call, y: Node) -> list[Term]:
    lines = _Lines(call)
    here, there = Factor(y, lines.out), Factor(y, lines.source)
    return [lines.diagonal(here), lines.outer(here, there, scale=-1.0)]


def _softmax(call: Call) -> Iterable[Edge]:
    item = call.args[0]
    if call.is_active(item):
        yield single(call, item, _softmax_terms(call, _whole(call, lambda program: call.stage_output(program))))


def _log_softmax(call: Call) -> Iterable[Edge]:
    item = call.args[0]
    if call.is_active(item):
        lines = _Lines(call)
        there = Factor(_probabilities(call), lines.source)
        yield single(call, item, [lines.diagonal(), lines.outer(there, scale=-1.0)])


def _softmax_backward(call: Call) -> Iterable[Edge]:
    """``y * (g - sum(g * y))``: symmetric in ``g``; with respect to ``y`` a diagonal and a rank-one term."""
    grad, output = call.args[0], call.args[1]
    y = _whole(call, lambda program: call.stage(program, output))
    if call.is_active(grad):
        yield single(call, grad, _softmax_terms(call, y))
    if call.is_active(output):
        lines = _Lines(call)

        def centred(program: Program) -> Any:
            g = call.stage(program, grad)
            return g - torch.sum(g * call.stage(program, output), dim=lines.dim, keepdim=True)

        g = _whole(call, lambda program: call.stage(program, grad))
        coupled = lines.outer(Factor(y, lines.out), Factor(g, lines.source), scale=-1.0)
        yield single(call, output, [lines.diagonal(Factor(_whole(call, centred), lines.out)), coupled])


def _log_softmax_backward(call: Call) -> Iterable[Edge]:
    """``g - exp(out) * sum(g)``."""
    grad, output = call.args[0], call.args[1]
    lines = _Lines(call)
    if call.is_active(grad):
        p = _whole(call, lambda program: torch.exp(call.stage(program, output)))
        yield single(call, grad, [lines.diagonal(), lines.outer(Factor(p, lines.out), scale=-1.0)])
    if call.is_active(output):

        def formula(program: Program) -> Any:
            total = torch.sum(call.stage(program, grad), dim=lines.dim, keepdim=True)
            return -torch.exp(call.stage(program, output)) * total

        yield single(call, output, [lines.diagonal(Factor(_whole(call, formula), lines.out))])


# Normalisations by statistics of groups of dimensions.


class _Groups:
    """An input seen as kept axes (one group of statistics each) and inner axes, over which the statistics are taken.

    Args:
        call: the call; its first argument is the input.
        sizes: the sizes of the axes of each of the input's dimensions.
        inner: positions, in the flat run of axes, that the statistics are taken over.
        weighted: positions that the weight and the bias carry.
        centred: whether the mean is subtracted.
    """

    def __init__(
        self, call: Call, sizes: Sequence[tuple[int, ...]], inner: Sequence[int], weighted: Sequence[int], centred: bool = True
    ) -> None:
        self.call = call
        self.sizes = tuple(sizes)
        flat = [size for dim in sizes for size in dim]
        self.full = tuple(flat)
        self.inner = set(inner)
        self.kept_sizes = tuple(s for n, s in enumerate(flat) if n not in self.inner)
        self.statistic = tuple(1 if n in self.inner else s for n, s in enumerate(flat))
        self.weighted = tuple(weighted)
        self.count = math.prod(s for n, s in enumerate(flat) if n in self.inner)
        self.centred = centred
        self.out: Axes = new_axes(flat)
        self.source: Axes = tuple(Axis(a.size) if n in self.inner else a for n, a in enumerate(self.out))
        self.kept: Axes = tuple(a for n, a in enumerate(self.out) if n not in self.inner)
        self.rstd_output = 2 if centred else 1

    def dims(self, axes: Axes) -> tuple[Axes, ...]:
        """Axes distributed over the input's dimensions."""
        dims, position = [], 0
        for dim in self.sizes:
            dims.append(axes[position : position + len(dim)])
            position += len(dim)
        return tuple(dims)

    def normalised(self) -> Node:
        """The input minus its mean, times the inverse deviation."""

        def formula(program: Program) -> Any:
            call = self.call
            x = torch.reshape(call.stage(program, call.args[0]), self.full)
            if self.centred:
                x = x - torch.reshape(call.stage_output(program, 1), self.statistic)
            return x * torch.reshape(call.stage_output(program, self.rstd_output), self.statistic)

        return formula_node(self.call, self.full, formula)

    def rate(self) -> Node:
        """The inverse deviation over the kept axes."""
        call, output = self.call, self.rstd_output
        return formula_node(call, self.kept_sizes, lambda p: torch.reshape(call.stage_output(p, output), self.kept_sizes))

    def weight(self, name: str = "weight") -> list[Factor]:
        """The weight as a factor over the output's axes; nothing when there is none."""
        call = self.call
        item = call.argument(name)
        if item is None:
            return []
        sizes = tuple(self.full[n] for n in self.weighted)
        node = formula_node(call, sizes, lambda p: torch.reshape(call.stage(p, item), sizes))
        return [Factor(node, tuple(self.out[n] for n in self.weighted))]

    def edges(self) -> Iterable[Edge]:
        """Every edge of the normalisation whose statistics are outputs of the call."""
        call, item = self.call, self.call.args[0]
        if not math.prod(self.full):
            return
        if call.is_active(item):
            yield single(call, item, self.input_terms())
            yield from self.statistic_edges()
        yield from self.affine_edges(self.normalised)

    def input_terms(self) -> list[Term]:
        """``weight * rstd * (identity - 1/N - x̂ x̂ᵀ/N)``."""
        rate, x = Factor(self.rate(), self.kept), self.normalised()
        weight = self.weight()
        out_dims, in_dims = self.dims(self.out), self.dims(self.source)
        share = -1.0 / self.count
        terms = [
            Term(out_dims, out_dims, (*weight, rate)),
            Term(out_dims, in_dims, (*weight, rate, Factor(x, self.out), Factor(x, self.source)), (), share),
        ]
        if self.centred:
            terms.append(Term(out_dims, in_dims, (*weight, rate), (), share))
        return terms

    def statistic_edges(self) -> Iterable[Edge]:
        """The mean and the inverse deviation as outputs of their own."""
        call, item = self.call, self.call.args[0]
        in_dims = self.dims(self.out)
        if self.centred:
            term = Term(self.statistic_dims(1), in_dims, (), (), 1.0 / self.count)
            yield single(call, item, [term], output=1)

        def formula(program: Program) -> Any:
            rate = torch.reshape(call.stage_output(program, self.rstd_output), self.kept_sizes)
            return rate * rate

        factors = (Factor(formula_node(call, self.kept_sizes, formula), self.kept), Factor(self.normalised(), self.out))
        term = Term(self.statistic_dims(self.rstd_output), in_dims, factors, (), -1.0 / self.count)
        yield single(call, item, [term], output=self.rstd_output)

    def statistic_dims(self, output: int) -> tuple[Axes, ...]:
        """The kept axes distributed over a statistic's dimensions (some of which have size one)."""
        shape = self.call.shape(self.call.outputs[output])
        kept = list(self.kept)
        dims: list[Axes] = []
        for size in shape:
            dims.append((kept.pop(0),) if kept and kept[0].size == size else ())
        return tuple(dims)

    def affine_edges(self, normalised: Callable[[], Node]) -> Iterable[Edge]:
        """The edges of the weight and the bias."""
        call = self.call
        own = tuple(self.out[n] for n in self.weighted)
        for name, carries in (("weight", True), ("bias", False)):
            item = call.argument(name)
            if item is None or not call.is_active(item):
                continue
            in_dims = dims_of(own) if len(call.shape(item)) == len(own) else (own,)
            factors = (Factor(normalised(), self.out),) if carries else ()
            yield single(call, item, [Term(self.dims(self.out), in_dims, factors)])


def _layer_norm(call: Call) -> Iterable[Edge]:
    shape = call.shape(call.args[0])
    first = len(shape) - len(call.argument("normalized_shape"))
    inner = range(first, len(shape))
    return _Groups(call, [(size,) for size in shape], inner, inner).edges()


def _rms_norm(call: Call) -> Iterable[Edge]:
    shape = call.shape(call.args[0])
    first = len(shape) - len(call.argument("normalized_shape"))
    inner = range(first, len(shape))
    return _Groups(call, [(size,) for size in shape], inner, inner, centred=False).edges()


def _group_norm(call: Call) -> Iterable[Edge]:
    shape = call.shape(call.args[0])
    groups: int = call.argument("group")
    sizes = [(shape[0],), (groups, shape[1] // groups), *((size,) for size in shape[2:])]
    return _Groups(call, sizes, range(2, len(shape) + 1), (1, 2)).edges()


def _batch_norm(training: Callable[[Call], bool]) -> Rule:
    def linearize(call: Call) -> Iterable[Edge]:
        shape = call.shape(call.args[0])
        inner = [d for d in range(len(shape)) if d != 1]
        groups = _Groups(call, [(size,) for size in shape], inner, (1,))
        return groups.edges() if training(call) else _fixed_batch_norm(call, groups)

    return Rule("normalisation", linearize)


def _fixed_batch_norm(call: Call, groups: _Groups) -> Iterable[Edge]:
    """With running statistics the op is element-wise."""
    mean, variance, eps = call.argument("running_mean"), call.argument("running_var"), call.argument("eps")
    channels = groups.kept_sizes

    def rate(program: Program) -> Any:
        return torch.rsqrt(call.stage(program, variance) + eps)

    def normalised() -> Node:
        def formula(program: Program) -> Any:
            centred = call.stage(program, call.args[0]) - torch.reshape(call.stage(program, mean), groups.statistic)
            return centred * torch.reshape(rate(program), groups.statistic)

        return formula_node(call, groups.full, formula)

    item = call.args[0]
    if call.is_active(item):
        dims = groups.dims(groups.out)
        factor = Factor(formula_node(call, channels, rate), groups.kept)
        yield single(call, item, [Term(dims, dims, (*groups.weight(), factor))])
    yield from groups.affine_edges(normalised)


def _flag(call: Call) -> bool:
    return bool(call.argument("training"))


_FLAGGED = _batch_norm(_flag)
_FIXED = _batch_norm(lambda call: False)
_TRAINED = _batch_norm(lambda call: True)
_SOFTMAX = Rule("normalisation", _softmax)

RULES: dict[Any, Rule] = {
    aten._softmax.default: _SOFTMAX,
    aten._safe_softmax.default: _SOFTMAX,
    aten._log_softmax.default: Rule("normalisation", _log_softmax),
    aten._softmax_backward_data.default: Rule("normalisation", _softmax_backward),
    aten._log_softmax_backward_data.default: Rule("normalisation", _log_softmax_backward),
    aten.native_layer_norm.default: Rule("normalisation", _layer_norm),
    aten.native_group_norm.default: Rule("normalisation", _group_norm),
    aten._fused_rms_norm.default: Rule("normalisation", _rms_norm),
    aten.native_batch_norm.default: _FLAGGED,
    aten._native_batch_norm_legit.default: _FLAGGED,
    aten._native_batch_norm_legit.no_stats: _FLAGGED,
    aten._native_batch_norm_legit_functional.default: _FLAGGED,
    aten._native_batch_norm_legit_no_training.default: _FIXED,
    aten._batch_norm_with_update.default: _TRAINED,
    aten._batch_norm_with_update_functional.default: _TRAINED,
    aten._batch_norm_no_update.default: _FIXED,
}

__all__ = ["RULES"]
