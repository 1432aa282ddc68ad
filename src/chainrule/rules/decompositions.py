"""Ops that are recorded in parts: torch's own decomposition table, restricted to where it is exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch._decomp import core_aten_decompositions, decomposition_table
from torch._ops import OpOverload

from chainrule.rules import attention, layers
from chainrule.rules.direct import has_classes, nll_loss, smoothed
from chainrule.rules.direct_losses import multi_margin_loss, multilabel_margin_loss

aten = torch.ops.aten
Tensor = torch.Tensor


def composite(op: OpOverload) -> Callable[..., Any] | None:
    """Torch's composite implementation of an op, for ops that are nothing but a composition of others."""
    if not op._can_decompose():
        return None
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    if torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key):
        # Torch has some of these in Python too, which takes ten times as long.
        return partial(op._op_dk, key)
    return op.decompose


def _dropout(input: Tensor, p: float, train: bool) -> Tensor:
    """Dropout with the draw that torch makes on the same device (fused on accelerators, one bernoulli else)."""
    if not train or p == 0 or input.numel() == 0:
        return input
    if p == 1:
        return input * torch.zeros((), dtype=input.dtype, device=input.device)
    if input.device.type == "cuda":
        return torch.native_dropout(input, p, train)[0]
    noise = torch.empty_like(input).bernoulli_(1 - p)
    return input * noise.div_(1 - p)


def _cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Cosine similarity; as in torch, the clamp of the norms does not stop their derivative."""
    dtype = torch.promote_types(x1.dtype, x2.dtype)
    x1, x2 = torch.broadcast_tensors(x1.to(dtype), x2.to(dtype))
    return torch.sum(_normalised(x1, dim, eps) * _normalised(x2, dim, eps), dim)


def _normalised(x: Tensor, dim: int, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, 2, dim, keepdim=True)
    return x / (norm + (norm.clamp_min(eps) - norm).detach())


def _rrelu(
    input: Tensor,
    lower: float = 0.125,
    upper: float = 0.3333333333333333,
    training: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A leaky ReLU whose slope is drawn in training and fixed otherwise."""
    if not training:
        return torch.nn.functional.leaky_relu(input, (lower + upper) / 2)
    noise = torch.ones_like(input)
    _, drawn = aten.rrelu_with_noise_functional.default(input.detach(), noise, lower, upper, True, generator)
    return input * drawn


def _distances(difference: Tensor, p: float) -> Tensor:
    """The p-norm over the last dimension, whose derivative at zero is zero in every order."""
    if p == 0:
        return torch.ne(difference, 0).to(difference.dtype).sum(-1)
    if p == 2:
        power = (difference * difference).sum(-1)
    else:
        size = difference.abs()
        if p == 1:
            return size.sum(-1)
        if p == math.inf:
            return size.amax(-1) if difference.shape[-1] else size.sum(-1)
        nothing = torch.eq(size, 0)
        power = (size.masked_fill(nothing, 1.0) ** p).masked_fill(nothing, 0.0).sum(-1)
    together = torch.eq(power, 0)
    apart = power.masked_fill(together, 1.0)
    return (apart.sqrt() if p == 2 else apart ** (1 / p)).masked_fill(together, 0.0)


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    return _distances(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def _pdist(input: Tensor, p: float = 2.0) -> Tensor:
    first, second = torch.triu_indices(input.shape[0], input.shape[0], 1, device=input.device).unbind(0)
    return _distances(torch.index_select(input, 0, first) - torch.index_select(input, 0, second), p)


def _cross(input: Tensor, other: Tensor, dim: int = -1) -> Tensor:
    """The cross product along a dimension of size 3."""
    input, other = torch.broadcast_tensors(input, other)
    return input.roll(-1, dim) * other.roll(-2, dim) - input.roll(-2, dim) * other.roll(-1, dim)


def _stft(
    self: Tensor, n_fft: int, hop_length: int | None = None, win_length: int | None = None, window: Tensor | None = None,
    normalized: bool = False, onesided: bool | None = None, return_complex: bool | None = None,
    align_to_window: bool | None = None,
) -> Tensor:  # fmt: skip
    """A transform of each window, cut out by ``unfold``; torch's own parts for what it refuses or warns of."""
    hop, width = n_fft // 4 if hop_length is None else hop_length, n_fft if win_length is None else win_length
    known = self.dim() in (1, 2) and self.numel() and 0 < n_fft <= self.shape[-1] and hop > 0 and 0 < width <= n_fft
    numbers = self.is_floating_point() or self.is_complex()
    fits = window is not None and tuple(window.shape) == (width,) and window.device == self.device
    half = onesided and (self.is_complex() or (window is not None and window.is_complex()))  # an error
    if not (known and numbers and fits and return_complex and align_to_window is None) or half:
        full: Tensor = _COMPOSITE_STFT(
            self, n_fft, hop_length, win_length, window, normalized, onesided, return_complex, align_to_window
        )
        return full
    assert window is not None
    if width < n_fft:
        before = (n_fft - width) // 2
        window = torch.constant_pad_nd(window, (before, n_fft - width - before))
    frames = self.unfold(-1, n_fft, hop) * window
    scaling = 1 if normalized else 0
    if frames.is_complex():
        found: Tensor = aten._fft_c2c.default(frames, [frames.dim() - 1], scaling, True)
    else:
        found = aten._fft_r2c.default(frames, [frames.dim() - 1], scaling, True if onesided is None else onesided)
    return found.transpose(-2, -1)


def _index_reduce(self: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True) -> Tensor:
    """``scatter_reduce`` with the index along one dimension."""
    if self.dim() == 0:
        return _index_reduce(self.reshape(1), 0, index, source.reshape(1), reduce, include_self=include_self).reshape(())
    shape = [-1 if axis == dim % self.dim() else 1 for axis in range(self.dim())]
    places = index.to(torch.long).reshape(shape).expand_as(source)
    reduced: Tensor = aten.scatter_reduce.two(self, dim, places, source, reduce, include_self=include_self)
    return reduced


def _linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None, reduction: str,
    ignore_index: int, label_smoothing: float, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss without its precomputed gradients, which the op makes only for tensors that require grad."""
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
    loss = torch.nn.functional.cross_entropy(
        logits, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    return loss, input.new_zeros((0, 0)), input.new_zeros((0, 0)), input.new_zeros((0,))


def _linear_cross_entropy_no_reduction(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None, ignore_index: int,
    *options: Any
) -> Tensor:  # fmt: skip
    return _linear_cross_entropy(input, linear_weight, target, linear_bias, weight, "none", ignore_index, 0.0)[0]


_NONE, _MEAN = 0, 1


def _nll_loss(self: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The negative log-likelihood of the targets' classes, and the total of their weights."""
    low = self.dtype in (torch.float16, torch.bfloat16)
    if low or self.dim() == 0 or self.shape[:1] != (target.shape[:1] or self.shape[:1]):
        if self.dim() > 2:
            flat = self.movedim(1, -1).flatten(0, -2)
            loss, total = _TORCH_NLL(flat, target.flatten(), weight, reduction, ignore_index)
            return loss.reshape(target.shape) if reduction == _NONE else loss, total
        full: tuple[Tensor, Tensor] = _TORCH_NLL(self, target, weight, reduction, ignore_index)
        return full
    return nll_loss(_call, self, target, weight, reduction, ignore_index)


def _call(op: OpOverload, *args: Any, **kwargs: Any) -> Any:
    return op(*args, **kwargs)


def _nll_loss_nd(
    self: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = _MEAN, ignore_index: int = -100
) -> Tensor:
    if not has_classes(self, target):
        raised: Tensor = _COMPOSITE_NLL(self, target, weight, reduction, ignore_index)
        return raised
    return _nll_loss(self, target, weight, reduction, ignore_index)[0]


def _cross_entropy(
    self: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = _MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The softmax cross-entropy with one class for each sample; torch's own parts for every other case."""
    if self.dtype in (torch.float16, torch.bfloat16) or not has_classes(self, target):
        full: Tensor = _COMPOSITE_CROSS_ENTROPY(self, target, weight, reduction, ignore_index, label_smoothing)
        return full
    logarithms = aten._log_softmax.default(self, 0 if self.dim() == 1 else 1, False)
    loss, total = _nll_loss(logarithms, target, weight, reduction, ignore_index)
    if not label_smoothing:
        return loss
    return smoothed(_call, loss, total, logarithms, target, weight, reduction, ignore_index, label_smoothing)


def _margin_loss(parts: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """A loss in parts of our own: torch's count labels behind the first -1, and give a single row's loss a dimension.

    Args:
        parts: runs the parts.
        otherwise: torch's decomposition, for nothing at all and for what it refuses.
    """

    def decompose(*args: Any, **kwargs: Any) -> Any:
        found = parts(_call, *args, **kwargs)
        return otherwise(*args, **kwargs) if found is NotImplemented else found

    return decompose


_FROM_TORCH = """
    multi_margin_loss multilabel_margin_loss_forward binary_cross_entropy
    binary_cross_entropy_with_logits soft_margin_loss
    addr renorm reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
    pixel_shuffle pixel_unshuffle channel_shuffle
""".split()


def _torch_table() -> dict[Any, Callable[..., Any]]:
    core = core_aten_decompositions()
    found = {}
    for name in _FROM_TORCH:
        op = getattr(aten, name).default
        function = core.get(op) or decomposition_table.get(op)
        if function is not None:
            found[op] = function
    return found


_TORCH_NLL = core_aten_decompositions().get(aten.nll_loss_forward.default) or decomposition_table[aten.nll_loss_forward.default]
_COMPOSITE_NLL: Any = composite(aten.nll_loss_nd.default)
_COMPOSITE_STFT: Any = composite(aten.stft.default)
_COMPOSITE_CROSS_ENTROPY: Any = composite(aten.cross_entropy_loss.default)

_IN_TORCH = _torch_table()

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    **_IN_TORCH,
    **{
        op: _margin_loss(parts, _IN_TORCH[op])
        for op, parts in (
            (aten.multi_margin_loss.default, multi_margin_loss),
            (aten.multilabel_margin_loss_forward.default, multilabel_margin_loss),
        )
        if op in _IN_TORCH
    },
    aten.nll_loss_forward.default: _nll_loss,
    aten.nll_loss2d_forward.default: _nll_loss,
    aten.nll_loss_nd.default: _nll_loss_nd,
    aten.cross_entropy_loss.default: _cross_entropy,
    aten._native_multi_head_attention.default: attention.native_multi_head_attention,
    aten._transformer_encoder_layer_fwd.default: attention.transformer_encoder_layer,
    aten.scaled_dot_product_attention.default: attention.scaled_dot_product_attention,
    aten._scaled_dot_product_flash_attention_for_cpu.default: attention.flash_attention_for_cpu,
    aten._scaled_dot_product_efficient_attention.default: attention.efficient_attention,
    aten._scaled_dot_product_flash_attention.default: attention.flash_attention,
    aten.convolution_backward.default: layers.backward_in_parts,
    aten.dropout.default: _dropout,
    aten.cosine_similarity.default: _cosine_similarity,
    aten.rrelu.default: _rrelu,
    aten.cdist.default: _cdist,
    aten._cdist_forward.default: _cdist,
    aten._pdist_forward.default: _pdist,
    aten.linalg_cross.default: _cross,
    aten.stft.default: _stft,
    aten.index_reduce.default: _index_reduce,
}

#: The same for ops that torch registers when they are first used, by name.
LATE_DECOMPOSITIONS: dict[str, Callable[..., Any]] = {
    "torch_nn::_linear_cross_entropy_batch_chunked": _linear_cross_entropy,
    "torch_nn::_linear_cross_entropy_batch_chunked_no_reduction": _linear_cross_entropy_no_reduction,
}

__all__ = ["DECOMPOSITIONS", "JOINED", "LATE_DECOMPOSITIONS", "composite"]


_TORCH_BATCH_NORM = decomposition_table[aten.native_batch_norm.default]


def _batch_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    training: bool, momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Batch normalisation whose running statistics are updated by the kernel, as constants: torch's parts write their graph."""
    if not training or (running_mean is None and running_var is None):
        parts: tuple[Tensor, Tensor, Tensor] = _TORCH_BATCH_NORM(
            input, weight, bias, running_mean, running_var, training, momentum, eps
        )
        return parts
    aten.native_batch_norm.default(input.detach(), None, None, running_mean, running_var, True, momentum, eps)
    found: tuple[Tensor, Tensor, Tensor] = _TORCH_BATCH_NORM(input, weight, bias, None, None, True, 0.0, eps)
    return found


#: Ops whose rules read results that torch's autograd takes for constants (saved means, ``rstd``). When torch's own
#: graph has to reach through a derivative (an argument requires grad), they are recorded in parts instead.
JOINED: dict[Any, Callable[..., Any]] = {
    op: decomposition_table[op]
    for op in (
        aten.native_layer_norm.default,
        aten._native_batch_norm_legit.no_stats,
        aten._native_batch_norm_legit_functional.default,
        aten._fused_rms_norm.default,
    )
    if op in decomposition_table
} | {aten.native_batch_norm.default: _batch_norm}
