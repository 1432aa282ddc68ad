"""Normalisations that torch's autograd reaches through in every order, each as one node of its graph.

Torch's own nodes take the mean and the scale that these ops return for constants, and their second derivatives are written
down with such constants: what reads the two (as plans do), or differentiates a third time, would get wrong derivatives
without a word. Here all results have derivatives, by formulas of which torch's autograd knows each step; where nothing is
differentiated further the kernels of torch do the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

aten = torch.ops.aten

Tensor = torch.Tensor

#: The dtypes whose statistics are computed, and kept, in the dtype itself.
_DTYPES = (torch.float32, torch.float64)


class _Kind(Protocol):
    """Which normalisation it is, and its static arguments."""

    def run(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The result, the mean and the scale, by torch's kernel."""
        ...

    def pull(
        self, cotangent: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, mask: list[bool]
    ) -> Sequence[Tensor | None]:
        """The cotangents of input, weight and bias, by torch's kernel."""
        ...

    def beside(self, item: Tensor, x: Tensor) -> Tensor:
        """A mean, scale or weight that broadcasts against the input."""
        ...

    def own(self, x: Tensor) -> Sequence[int]:
        """The shape of a weight or bias."""
        ...


class _Layer(NamedTuple):
    """Over the last dimensions."""

    shape: list[int]
    eps: float

    def run(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_layer_norm(x, self.shape, weight, bias, self.eps)

    def pull(
        self, cotangent: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, mask: list[bool]
    ) -> Sequence[Tensor | None]:
        found: Sequence[Tensor | None] = aten.native_layer_norm_backward.default(
            cotangent, x, self.shape, mean, scale, weight, weight, mask
        )
        return found

    def beside(self, item: Tensor, x: Tensor) -> Tensor:
        return item

    def own(self, x: Tensor) -> Sequence[int]:
        return self.shape


class _Batch(NamedTuple):
    """Over all dimensions but the second one."""

    momentum: float
    eps: float

    def run(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_batch_norm(x, weight, bias, None, None, True, self.momentum, self.eps)

    def pull(
        self, cotangent: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, mask: list[bool]
    ) -> Sequence[Tensor | None]:
        found: Sequence[Tensor | None] = aten.native_batch_norm_backward.default(
            cotangent, x, weight, None, None, mean, scale, True, self.eps, mask
        )
        return found

    def beside(self, item: Tensor, x: Tensor) -> Tensor:
        return item.reshape(-1, *([1] * (x.dim() - 2)))

    def own(self, x: Tensor) -> Sequence[int]:
        return (x.shape[1],)


class _Normalised(torch.autograd.Function):
    """The op; its three results have derivatives."""

    @staticmethod
    def forward(
        ctx: Any, kind: _Kind, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, mean, scale = kind.run(x, weight, bias)
        ctx.kind = kind
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.set_materialize_grads(False)
        return out, mean, scale

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        kind, (x, weight, mean, scale) = ctx.kind, ctx.saved_tensors
        cotangent, of_mean, of_scale = cotangents
        mask = [*ctx.needs_input_grad[1:]]
        found: list[Tensor | None] = [None, None, None]
        if cotangent is not None:
            pulled = _pulled(kind, cotangent, x, mean, scale, weight, mask)
            found = [item if wanted else None for item, wanted in zip(pulled, mask, strict=True)]
        if mask[0] and (of_mean is not None or of_scale is not None):
            share = mean.numel() / x.numel()
            rows = torch.zeros_like(x) if found[0] is None else found[0]
            if of_mean is not None:
                rows = rows + kind.beside(of_mean, x) * share
            if of_scale is not None:
                rate = kind.beside(scale, x)
                slope = kind.beside(of_scale, x) * rate * rate * rate * -share
                rows = torch.addcmul(rows, slope, x - kind.beside(mean, x))
            found[0] = rows
        return None, *found


class _Fixed(torch.autograd.Function):
    """The op over batches, with statistics that are constants."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Buffers may be updated before the backward, which wants them as they are now.
        ctx.save_for_backward(x, weight, mean.clone(), variance.clone())
        ctx.eps = eps
        out, empty, too = torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)
        ctx.mark_non_differentiable(empty, too)
        return out, empty, too

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, *_: Any) -> tuple[Any, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        sizes = [-1, *([1] * (x.dim() - 2))]
        scale = torch.rsqrt(variance + ctx.eps)
        found: list[Tensor | None] = [None, None, None]
        if ctx.needs_input_grad[0]:
            found[0] = cotangent * (scale if weight is None else scale * weight).reshape(sizes)
        shape = scale.reshape(sizes).shape
        if ctx.needs_input_grad[1]:
            normalised = (x - mean.reshape(sizes)) * scale.reshape(sizes)
            found[1] = (cotangent * normalised).sum_to_size(shape).reshape(scale.shape)
        if ctx.needs_input_grad[2]:
            found[2] = cotangent.sum_to_size(shape).reshape(scale.shape)
        return *found, None, None, None


def _are_statistics(edges: Sequence[tuple[Any, int]]) -> bool:
    """Whether the mean and the scale are those of the input, by the edges of a cotangent, an input, a mean and a scale."""
    _, of_input, (node, mean), (other, scale) = edges[:4]
    if node is None or node is not other or (mean, scale) != (1, 2) or node.name() != "_NormalisedBackward":
        return False
    found: bool = node.next_functions[0] == of_input
    return found


class _Pulled(torch.autograd.Function):
    """The kernel of the derivative, itself with derivatives by all of its tensors."""

    @staticmethod
    def forward(
        ctx: Any, kind: _Kind, mask: list[bool], cotangent: Tensor, x: Tensor, mean: Tensor, scale: Tensor,
        weight: Tensor | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        ctx.kind, ctx.mask = kind, mask
        ctx.save_for_backward(cotangent, x, mean, scale, weight)
        ctx.set_materialize_grads(False)
        return tuple(_kernel(kind, cotangent, x, mean, scale, weight, mask))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        """The mean and the scale count by themselves, if they are not known to be those of the input.

        With the projection `p(v) = v - mean(v) - n mean(v n)` on what the normalised `n` leaves free, the first result is
        `scale p(weight cotangent)`. This `p` is symmetric: it is the kernel again that pulls back through it.
        """
        kind: _Kind = ctx.kind
        cotangent, x, mean, scale, weight = ctx.saved_tensors
        of_cotangent, *of_others, of_weight = ctx.needs_input_grad[2:]
        by_rows, by_weight, by_bias = cotangents
        found: list[Tensor | None] = [None] * 5
        rate, centre = kind.beside(scale, x), kind.beside(mean, x)
        share, shape = mean.numel() / x.numel(), rate.shape
        normalised = (x - centre) * rate
        along: Tensor | None = None  # the cotangent of the normalised input
        projected: Tensor | None = None
        weighted = cotangent
        if by_rows is not None:
            projected = _pulled(kind, by_rows, x, mean, scale, None, [True, False, False])[0]
            assert projected is not None
            found[0] = projected
            if weight is not None:
                factor = kind.beside(weight, x)
                weighted, found[0] = cotangent * factor, projected * factor
                if of_weight:
                    found[4] = (cotangent * projected).sum_to_size(factor.shape).reshape(weight.shape)
            if any(of_others):
                one = (by_rows * normalised).sum_to_size(shape)
                two = (weighted * normalised).sum_to_size(shape)
                along = torch.addcmul(by_rows * two, weighted, one) * (rate * -share)
        if by_weight is not None:
            own = kind.beside(by_weight, x)
            found[0] = own * normalised if found[0] is None else torch.addcmul(found[0], own, normalised)
            along = own * cotangent if along is None else torch.addcmul(along, own, cotangent)
        if by_bias is not None:
            own = kind.beside(by_bias, x)
            found[0] = own.expand_as(x) if found[0] is None else found[0] + own
        if any(of_others) and along is not None and _are_statistics(ctx.next_functions):
            found[1] = _pulled(kind, along, x, mean, scale, None, [True, False, False])[0]
            if projected is not None and found[1] is not None:
                slope = (projected * weighted).sum_to_size(shape) * rate * -share
                found[1] = torch.addcmul(found[1], normalised, slope)
        elif any(of_others) and along is not None:
            found[1] = rows = along * rate
            found[2] = rows.sum_to_size(shape).neg().reshape(mean.shape)
            by_scale = along * normalised
            if projected is not None:
                by_scale = torch.addcmul(by_scale, projected, weighted)
            found[3] = (by_scale.sum_to_size(shape) / rate).reshape(scale.shape)
        if not of_cotangent:
            found[0] = None
        return None, None, *found


def _in_parts(
    kind: _Kind, mask: list[bool], cotangent: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None
) -> list[Tensor | None]:
    """What the kernel of the derivative computes, as a function of its arguments in steps that all have derivatives."""
    rate = kind.beside(scale, x)
    normalised = (x - kind.beside(mean, x)) * rate
    found: list[Tensor | None] = [None, None, None]
    if mask[0]:
        weighted = cotangent if weight is None else cotangent * kind.beside(weight, x)
        share, shape = mean.numel() / x.numel(), rate.shape
        by_mean = weighted.sum_to_size(shape) * share
        by_scale = (weighted * normalised).sum_to_size(shape) * share
        found[0] = rate * (weighted - by_mean - normalised * by_scale)
    if weight is not None and mask[1]:
        found[1] = (cotangent * normalised).sum_to_size(kind.beside(weight, x).shape).reshape(weight.shape)
    if mask[2]:
        found[2] = _of_bias(kind, cotangent, x)
    return found


def _of_bias(kind: _Kind, cotangent: Tensor, x: Tensor) -> Tensor:
    """The cotangent of the bias."""
    own = kind.own(x)
    return cotangent.sum_to_size(kind.beside(cotangent.new_empty(own), x).shape).reshape(own)


def _kernel(
    kind: _Kind, cotangent: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, mask: list[bool]
) -> Sequence[Tensor | None]:
    """The cotangents by torch's kernel, which wants a weight where there is a bias."""
    if weight is not None or not mask[2]:
        return kind.pull(cotangent, x, mean, scale, weight, mask)
    found = kind.pull(cotangent, x, mean, scale, weight, [*mask[:2], False])
    return found[0], found[1], _of_bias(kind, cotangent, x)


#: As torch has them, without a look at the modes that are on.
_normalise = super(torch.autograd.Function, _Normalised).apply
_pull = super(torch.autograd.Function, _Pulled).apply
_fix = super(torch.autograd.Function, _Fixed).apply


def _joins(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any([tensor is not None and tensor.requires_grad for tensor in tensors])


def _pulled(
    kind: _Kind, cotangent: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, mask: list[bool]
) -> Sequence[Tensor | None]:
    if not _joins(cotangent, x, mean, scale, weight):
        return _kernel(kind, cotangent, x, mean, scale, weight, mask)
    if torch._C._len_torch_dispatch_stack():  # modes are to see what has derivatives
        return _in_parts(kind, mask, cotangent, x, mean, scale, weight)
    found: Sequence[Tensor | None] = _pull(kind, mask, cotangent, x, mean, scale, weight)
    return found


def _layer(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _normalise(_Layer(shape, eps), x, weight, bias)  # type: ignore[no-any-return]


def _batch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, variance: Tensor | None, training: bool,
    momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not training:
        return _fix(x, weight, bias, mean, variance, eps)  # type: ignore[no-any-return]
    return _normalise(_Batch(momentum, eps), x, weight, bias)  # type: ignore[no-any-return]


#: Ops as one node each, with derivatives of all results; for calls that :func:`may_join` takes, where no mode looks on.
JOINING: dict[Any, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    aten.native_layer_norm.default: _layer,
    aten.native_batch_norm.default: _batch,
}


def may_join(op: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call can be one node of a graph with derivatives in every order.

    Args:
        op: one of :data:`JOINING`.
        args: its arguments.
    """
    x, weight = args[0], args[2 if op is aten.native_layer_norm.default else 1]
    if op is aten.native_batch_norm.default and not (x.is_cpu and (not args[5] or (args[3] is None and args[4] is None))):
        return False
    return x.dtype in _DTYPES and x.numel() > 0 and (weight is None or weight.dtype is x.dtype)


def native_layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The op of that name; where torch's autograd has to see it, and nothing else, all results have derivatives."""
    if _joins(x, weight, bias) and not torch._C._len_torch_dispatch_stack():
        if may_join(aten.native_layer_norm.default, (x, shape, weight)):
            return _layer(x, shape, weight, bias, eps)
    return torch.native_layer_norm(x, shape, weight, bias, eps)


def native_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, variance: Tensor | None, training: bool,
    momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The op of that name, likewise."""
    given = (x, weight, bias, mean, variance, training, momentum, eps)
    if _joins(x, weight, bias) and not torch._C._len_torch_dispatch_stack():
        if may_join(aten.native_batch_norm.default, given):
            return _batch(*given)
    return torch.native_batch_norm(*given)


def layer_norm_backward(
    cotangent: Tensor, x: Tensor, shape: list[int], mean: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None,
    mask: list[bool],
) -> Sequence[Tensor | None]:  # fmt: skip
    """``native_layer_norm_backward`` as a function of all of its tensors, with derivatives by each of them."""
    if not _joins(cotangent, x, mean, scale, weight):
        found: Sequence[Tensor | None] = aten.native_layer_norm_backward.default(
            cotangent, x, shape, mean, scale, weight, bias, mask
        )
        return found
    return _pulled(_Layer(shape, 0.0), cotangent, x, mean, scale, weight, mask)


def batch_norm_backward(
    cotangent: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, scale: Tensor, eps: float, mask: list[bool]
) -> Sequence[Tensor | None]:
    """``native_batch_norm_backward`` of the batch's own statistics, likewise."""
    return _pulled(_Batch(0.0, eps), cotangent, x, mean, scale, weight, mask)


#: What the functions above are on tensors that nothing follows.
UNFOLLOWED: dict[Any, Callable[..., Any]] = {
    native_layer_norm: torch.native_layer_norm,
    native_batch_norm: torch.native_batch_norm,
    layer_norm_backward: aten.native_layer_norm_backward.default._op,
}

__all__ = [
    "JOINING", "UNFOLLOWED", "batch_norm_backward", "layer_norm_backward", "may_join", "native_batch_norm", "native_layer_norm",
]  # fmt: skip
