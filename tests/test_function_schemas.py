"""Functions that are read by the schemas of their ops: each call gives what torch gives, compiled and not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import chainrule
from chainrule.function_schemas import BySchema, by_schema
from chainrule.shortcuts import COMPILED
from chainrule.transforms.trace import trace
from tests.readings import same

Tensor = torch.Tensor

_DRAWN = torch.Generator().manual_seed(3)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=_DRAWN)


INDEX, MASK, OTHER, SQUARE = torch.tensor([2, 0, 1]), torch.eye(4, dtype=torch.bool)[:3], drawn(3, 4), drawn(4, 4)
BATCH, IMAGE = drawn(3, 4, 2), drawn(2, 3, 2, 2)
CLASSES = torch.tensor([[0, 2, 1, 1]])


def _batch_norm(x: Tensor) -> Tensor:
    return torch.batch_norm(x, OTHER[0], OTHER[1], None, None, True, 0.1, 1e-5, False)


nn: Any = torch._C._nn


def _cell(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


_IN_PARTS = ("scaled_dot_product_attention", "cross_entropy_loss", "multi_margin_loss", "multilabel_margin_loss", "cosine_embedding_loss",
             "linalg_cross", "linalg_solve",
             "triplet_margin_loss", "pairwise_distance", "poisson_nll_loss", "hinge_embedding_loss")  # fmt: skip

#: Of a matrix of shape (3, 4).
CALLS: dict[str, Callable[[Tensor], Any]] = {
    "addcdiv": lambda x: torch.addcdiv(x, OTHER, x.exp()) + x.addcdiv(x, x.exp(), value=0.5),
    "addcmul": lambda x: torch.addcmul(x, OTHER, x) + x.addcmul(x, x),
    "addmm": lambda x: torch.addmm(x[0], x, SQUARE) + x.addmm(x, SQUARE, beta=0.5) + torch.addmm(input=OTHER, mat1=x, mat2=SQUARE),
    "addmv": lambda x: torch.addmv(x[:, 0], x, x[0]) + x[:, 1].addmv(x, OTHER[0]),
    "argmax": lambda x: x.argmax(1) * x.sum() + torch.argmax(x) + x.argmax(dim=0, keepdim=True).sum(),
    "argmin": lambda x: x.argmin(1) * x.sum() + torch.argmin(x, 1),
    "atan2": lambda x: torch.atan2(x, OTHER) + x.atan2(x + 3),
    "baddbmm": lambda x: torch.baddbmm(x[:, :2, None], x[:, None, :].expand(3, 2, 4), BATCH) + x[:, :2, None].baddbmm(BATCH.mT, BATCH),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True) + _batch_norm(x),
    # Shares that stay away from one, of which the loss takes the difference.
    "binary_cross_entropy": lambda x: nn.binary_cross_entropy((x / 4).sigmoid(), OTHER.sigmoid(), None, 0),
    "binary_cross_entropy_with_logits": lambda x: torch.binary_cross_entropy_with_logits(x, OTHER, OTHER[0], None, 1) * x,
    "cosine_embedding_loss": lambda x: torch.cosine_embedding_loss(x, OTHER, INDEX - 1, 0.1, 2),
    "hinge_embedding_loss": lambda x: torch.hinge_embedding_loss(x, OTHER.sign(), 0.5, 0),
    "huber_loss": lambda x: nn.huber_loss(x, OTHER, 1, 0.5),
    "l1_loss": lambda x: nn.l1_loss(x, OTHER, 0),
    "margin_ranking_loss": lambda x: torch.margin_ranking_loss(x, OTHER, OTHER.sign(), 0.5, 1),
    # Torch has no second derivatives of some losses.
    "multi_margin_loss": lambda x: nn.multi_margin_loss(x.detach(), INDEX, 1, 0.5, None, 0) * x.sum(1),
    "multilabel_margin_loss": lambda x: nn.multilabel_margin_loss(x[0].detach(), torch.tensor([2, 0, -1, 1]), 2) * x,
    "soft_margin_loss": lambda x: nn.soft_margin_loss(x.detach(), OTHER.sign(), 0) * x,
    "pairwise_distance": lambda x: torch.pairwise_distance(x, OTHER, 3.0) + torch.pairwise_distance(x, OTHER, keepdim=False),
    "poisson_nll_loss": lambda x: torch.poisson_nll_loss(x, OTHER, True, False, 1e-8, 0),
    "smooth_l1_loss": lambda x: nn.smooth_l1_loss(x, OTHER, 1, 0.5),
    "triplet_margin_loss": lambda x: torch.triplet_margin_loss(x, OTHER, x * 2, 0.5, reduction=0),
    "bmm": lambda x: torch.bmm(x[:, None], BATCH) + x[:, None].bmm(BATCH),
    "chunk": lambda x: x.chunk(2)[0].sum() + torch.chunk(x, 3, dim=1)[1].prod() + x.chunk(chunks=2, dim=-1)[1].sum(),
    "clamp": lambda x: x.clamp(-0.5, 0.5) + torch.clamp(x, max=0.3) + x.clamp(min=0) + x.clamp(OTHER, OTHER + 1),
    "clamp_max": lambda x: x.clamp_max(0.1) + torch.clamp_max(x, 0),
    "clamp_min": lambda x: x.clamp_min(0.1) + torch.clamp_min(x, min=0),
    "clone": lambda x: x.clone() + torch.clone(x.t()).t() + x.clone(memory_format=torch.contiguous_format),
    "conv1d": lambda x: torch.conv1d(x[None], OTHER[:, :3, None]) + F.conv1d(x, OTHER[:, :3, None], OTHER[:, 0], 1, 0),
    "conv2d": lambda x: F.conv2d(x.reshape(1, 3, 2, 2), IMAGE, x[0, :2], padding=1) + F.conv2d(x.view(1, 3, 2, 2), IMAGE, None, 1, 1),
    "conv3d": lambda x: torch.conv3d(x.reshape(1, 3, 2, 2, 1), IMAGE[..., None]),
    "cosine_similarity": lambda x: F.cosine_similarity(x, OTHER) + torch.cosine_similarity(x, OTHER, 1, 1e-6),
    "cumprod": lambda x: x.cumprod(0) + torch.cumprod(x, dim=1),
    "cumsum": lambda x: x.cumsum(0) + torch.cumsum(x, dim=-1) + x.cumsum(0, dtype=torch.float64),
    "detach": lambda x: x.detach() * x + torch.detach(x),
    "diag_embed": lambda x: x.diag_embed().sum(1) + torch.diag_embed(x, dim1=0, dim2=1).sum(0).t(),
    "diagonal": lambda x: x.diagonal().sum() + torch.diagonal(x, 1).sum() + x.diagonal(offset=-1, dim1=1, dim2=0).sum(),
    "dot": lambda x: torch.dot(x[0], x[1]) + x[0].dot(OTHER[0]),
    "dropout": lambda x: F.dropout(x, 0.5, False) + torch.dropout(x, 0.0, True),
    "embedding": lambda x: F.embedding(INDEX, x) + torch.embedding(x, INDEX),
    "elu": lambda x: F.elu(x) + nn.elu(x, 0.5),
    "flip": lambda x: x.flip(0) + torch.flip(x, (0, 1)) + x.flip(0, 1) + x.flip([1]),
    "gru_cell": lambda x: torch.gru_cell(x, x[:, :2], _cell(6, 4), _cell(6, 2), _cell(6), _cell(6)),
    "lstm_cell": lambda x: torch.lstm_cell(x, (x[:, :2], x[:, 2:]), _cell(8, 4), _cell(8, 2), _cell(8), _cell(8))[1],
    "lstm": lambda x: torch.lstm(x[None], [_cell(1, 1, 2)] * 2, [_cell(8, 4), _cell(8, 2)], False, 1, 0.0, False, False, True)[0],
    "gru": lambda x: torch.gru(x[None], _cell(1, 3, 2), [_cell(6, 4), _cell(6, 2)], False, 1, 0.0, False, False, batch_first=False)[0],
    "rnn_tanh": lambda x: torch.rnn_tanh(x[None], _cell(1, 3, 2), [_cell(2, 4), _cell(2, 2)], False, 1, 0.0, False, False, False)[0],
    "rnn_relu": lambda x: torch.rnn_relu(x[None], _cell(1, 3, 2), [_cell(2, 4), _cell(2, 2)], False, 1, 0.0, False, False, False)[0],
    "rnn_relu_cell": lambda x: torch.rnn_relu_cell(x, x[:, :2], _cell(2, 4), _cell(2, 2)),
    "rnn_tanh_cell": lambda x: torch.rnn_tanh_cell(x, x[:, :2], w_ih=_cell(2, 4), w_hh=_cell(2, 2), b_ih=_cell(2), b_hh=_cell(2)),
    "gather": lambda x: x.gather(0, CLASSES) + torch.gather(x, dim=0, index=CLASSES),
    "hardtanh": lambda x: F.hardtanh(x) + nn.hardtanh(x, -0.5, 0.25),
    "glu": lambda x: F.glu(x) + nn.glu(x, 1),
    "hardswish": lambda x: F.hardswish(x) + nn.hardswish(x * 2),
    "hypot": lambda x: torch.hypot(x, OTHER) + x.hypot(x + 3),
    "index_add": lambda x: x.index_add(0, INDEX, OTHER) + torch.index_add(x, 0, INDEX, x, alpha=2.0),
    "index_copy": lambda x: x.index_copy(1, INDEX, OTHER[:, :3] * x[:, :1]) + torch.index_copy(x, 0, INDEX[:1], x[1:2]),
    "index_select": lambda x: x.index_select(0, INDEX) + torch.index_select(x, dim=0, index=INDEX),
    "isfinite": lambda x: torch.isfinite(x) * x + torch.where(x.isfinite(), x, x * 2),
    "isnan": lambda x: torch.where(torch.isnan(x), x, x.exp()) + x.isnan(),
    "layer_norm": lambda x: F.layer_norm(x, (4,)) + torch.layer_norm(x, [4], OTHER[1], OTHER[0]),
    "leaky_relu": lambda x: F.leaky_relu(x) + nn.leaky_relu(x, 0.2),
    "lerp": lambda x: x.lerp(OTHER, 0.3) + torch.lerp(OTHER, x, x),
    "linalg_vector_norm": lambda x: torch.linalg.vector_norm(x, dim=1, keepdim=True) * x + torch.linalg.vector_norm(x, 3, (0, 1)),
    "logcumsumexp": lambda x: x.logcumsumexp(1) + torch.logcumsumexp(x, dim=0),
    "logaddexp": lambda x: torch.logaddexp(x, OTHER) + x.logaddexp(x * 2),
    "logsumexp": lambda x: x.logsumexp(1).sum() + torch.logsumexp(x, (0, 1)) + x.logsumexp(dim=0, keepdim=True),
    "masked_fill": lambda x: x.masked_fill(MASK, 0.0) + x.masked_fill(MASK, x[0, 0]) + torch.masked_fill(x, MASK, -1),
    "max": lambda x: x.max() + torch.max(x, 1)[0].sum() + x.max(0, keepdim=True).values.sum() + torch.max(x, OTHER).sum(),
    "maximum": lambda x: torch.maximum(x, OTHER) + x.maximum(OTHER),
    "min": lambda x: x.min() + torch.min(x, 1)[0].sum() + x.min(dim=0)[0].sum() + x.min(OTHER).sum(),
    "minimum": lambda x: torch.minimum(x, OTHER) + x.minimum(OTHER),
    "mish": lambda x: F.mish(x) + nn.mish(x * 2),
    "outer": lambda x: torch.outer(x[0], OTHER[:, 1]) + x[1].outer(x[:, 0]) + torch.outer(x[0], OTHER[:, 1].float()),
    "mm": lambda x: torch.mm(x, SQUARE) + x.mm(SQUARE),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x, OTHER, x)
    + F.scaled_dot_product_attention(x, x, OTHER, is_causal=True)
    + F.scaled_dot_product_attention(x, x, x, torch.eye(x.shape[0], dtype=torch.bool), scale=0.3),
    "cross_entropy_loss": lambda x: nn.cross_entropy_loss(x, torch.arange(x.shape[0]), None, 1)
    + nn.cross_entropy_loss(x, torch.arange(x.shape[0]), None, 2, -100, 0.1),
    "nll_loss_nd": lambda x: nn.nll_loss_nd(x, torch.arange(x.shape[0]), None, 0, 1),
    "mse_loss": lambda x: F.mse_loss(x, OTHER, reduction="sum") + nn.mse_loss(x, OTHER, 0) + nn.mse_loss(x, OTHER, 1),
    "mv": lambda x: torch.mv(x, OTHER[0]) + x.mv(x[1]),
    "pad": lambda x: F.pad(x, (1, 0, 2, 1)) + nn.pad(x, (1, 0, 2, 1), value=2.0) + F.pad(x[None], (1, 0, 2, 1), mode="reflect")[0],
    "pow": lambda x: torch.pow(2, x) + 0.5**x + torch.pow(self=1.5, exponent=x),
    "prod": lambda x: x.prod() + torch.prod(x, 1).sum() + x.prod(dim=0, keepdim=True).sum(),
    "repeat": lambda x: x.repeat(2, 1) + x.repeat((2, 1)) + x.repeat([2, 1]),
    "scatter_add": lambda x: x.scatter_add(0, CLASSES, OTHER[:1]) + torch.scatter_add(x, 0, CLASSES, x[1:2]),
    "select": lambda x: x.select(0, 1) + torch.select(x, 0, index=-1),
    "sort": lambda x: x.sort()[0] + torch.sort(x, -1, True)[0] + x.sort(dim=0).values + x.sort(stable=True)[0],
    "softshrink": lambda x: F.softshrink(x) + nn.softshrink(x, 0.25),
    "split": lambda x: x.split(2)[0].sum() + torch.split(x, [1, 3], dim=1)[1].prod() + x.split((1, 2))[1].sum(),
    "trace": lambda x: torch.trace(x) * x + x.trace(),
    "tril": lambda x: x.tril() + torch.tril(x, 1) + x.tril(diagonal=-1),
    "triu": lambda x: x.triu() + torch.triu(x, -1),
    "unbind": lambda x: x.unbind()[1] * 2 + x.unbind(dim=0)[0] + torch.unbind(x, 1)[0].sum(),
    "xlogy": lambda x: torch.xlogy(x, OTHER.exp()) + x.xlogy(x.exp()),
    "unflatten": lambda x: x.unflatten(1, (2, 2)) + x.unflatten(-1, [2, -1]),
    "clamp in place": lambda x: x.clone().clamp_(-0.5, 1) + x.clone().clamp_(max=0.3) + x.clone().clamp_max_(1).clamp_min_(-1.5),
    "copies and numbers in place": lambda x: x.clone().copy_(x[0] * x) + x.clone().fill_(2.0) * x + x.clone().zero_()
    + x.clone().fill_(x[0, 0]),
    "masked_fill_": lambda x: x.clone().masked_fill_(MASK, 0.5) + x.clone().masked_fill_(MASK, x[0, 0]),
    "at places in place": lambda x: x.clone().index_add_(0, CLASSES[0, :2], x[:2])
    + x.clone().index_copy_(dim=1, index=torch.tensor([2, 0]), source=x[:, :2])
    + x.clone().scatter_(0, CLASSES, x[:1])
    + x.clone().scatter_(0, CLASSES, 0.5)
    + x.clone().scatter_add_(0, CLASSES, OTHER[:1]),
    "one by one in place": lambda x: x.clone().exp_() + (x + 9).log_() + x.clone().neg_().cos_() + (x + 9).sqrt_(),
    "functions in place": lambda x: (x + 9).reciprocal_() + (x + 9).rsqrt_() + x.clone().relu_() + x.clone().sigmoid_(),
    "add": lambda x: torch.add(x, OTHER, alpha=2) + x.add(x, alpha=0.5) + x.add(other=OTHER),
    "sub": lambda x: torch.sub(x, OTHER, alpha=2) + x.sub(x, alpha=0.5) + torch.sub(x, 2, alpha=3),
    "block_diag": lambda x: torch.block_diag(x, x * 2, OTHER[0]),
    "diag": lambda x: x.diag().sum() + torch.diag(x[0], 1).sum() + x.diag(diagonal=-1).sum(),
    # Torch has no derivative of it.
    "floor_divide": lambda x: torch.floor_divide(x.detach(), 0.3) * x + (x.detach() // OTHER) * x + (x.detach() // 2) * x,
    "fmod": lambda x: torch.fmod(x, 0.3) + x.fmod(OTHER + 4),
    "gelu": lambda x: F.gelu(x) + F.gelu(x, approximate="tanh") + nn.gelu(x, approximate="none"),
    "kron": lambda x: torch.kron(x, OTHER[:2]).sum(1) + x[0].kron(OTHER).sum() + torch.kron(x[0], x[1]).sum(),
    "linalg_cross": lambda x: torch.linalg.cross(x[:, :3], OTHER[:, 1:]) + torch.linalg.cross(x[:, :2], OTHER[:, :2], dim=0).sum(),
    "linalg_det": lambda x: torch.linalg.det(x[:, :3]) + x[:, 1:].det() + torch.det(torch.stack([x[:, 1:], x[:, :3]])),
    "linalg_inv": lambda x: torch.linalg.inv(x[:, :3] + 3 * SQUARE[:3, :3]) + torch.inverse(x[:, 1:] + 4 * torch.eye(3)),
    "linalg_cholesky": lambda x: torch.linalg.cholesky(x[:, :3] @ x[:, :3].mT + 3 * torch.eye(3))
    + torch.linalg.cholesky(x[:, 1:] @ x[:, 1:].mT + 4 * torch.eye(3), upper=True),
    "linalg_multi_dot": lambda x: torch.linalg.multi_dot([x, SQUARE, x.t()]) + torch.linalg.multi_dot((x, OTHER.t())),
    "linalg_solve": lambda x: torch.linalg.solve(x[:, :3] + 4 * torch.eye(3), OTHER[:, 0])
    + torch.linalg.solve(x[:, 1:] + 4 * torch.eye(3), OTHER)[:, 1]
    + torch.linalg.solve(x[:, 1:] + 4 * torch.eye(3), OTHER[:, :3], left=False)[0],
    "nan_to_num": lambda x: x.nan_to_num() + torch.nan_to_num(x, 1.0, posinf=2.0),
    "remainder": lambda x: x % 0.7 + torch.remainder(x, OTHER + 4) + x.remainder(0.3),
    "topk": lambda x: x.topk(2)[0] + torch.topk(x, 2, 1, False).values + x.topk(k=2, dim=-1, sorted=False)[0],
    "numbers and tensors in place": lambda x: x.clone().pow_(2).lerp_(OTHER, 0.3) + x.clone().lerp_(OTHER, OTHER) + (x + 9).pow_(OTHER),
    "sums in place": lambda x: x.clone().addcmul_(x, OTHER, value=0.5) + x.clone().addcdiv_(x, OTHER.exp()),
    "rounded in place": lambda x: x.clone().ceil_() * x + x.clone().floor_() + x.clone().round_() * 2,
    "special in place": lambda x: x.clone().erf_() + x.clone().expm1_() + (x + 9).log1p_() + x.clone().square_() + (x + 0.1).abs_(),
    "activations in place": lambda x: F.elu_(x.clone()) + F.hardtanh_(x.clone()) + F.leaky_relu_(x.clone(), 0.2)
    + nn.silu_(x.clone()),
    "all": lambda x: (x > 0).all() * x + torch.all(x > 0, 1)[:, None] * x + (x > 0).all(dim=0, keepdim=True) * x,
    "any": lambda x: (x > 0).any() * x + torch.any(x > 0, dim=1)[:, None] * x + (x > 1).any(0) * x,
    "avg_pool2d": lambda x: F.avg_pool2d(x[None], 2, 1) + nn.avg_pool2d(x[None], (1, 2), stride=1, padding=(0, 1))[..., :2, :3],
    "bucketize": lambda x: torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0], dtype=x.dtype)) * x
    + torch.bucketize(x.detach(), torch.tensor([0.0, 0.5], dtype=x.dtype), right=True) * x,
    "celu": lambda x: F.celu(x) + torch.celu(x, 0.5),
    "cholesky_solve": lambda x: torch.cholesky_solve(x[:, :2], SQUARE[:3, :3].tril() + 3 * torch.eye(3))
    + torch.cholesky_solve(x[:, 2:], (SQUARE[:3, :3].triu() + 3 * torch.eye(3)), True),
    "clip": lambda x: x.clip(-0.5, 0.5) + torch.clip(x, max=0.3) + x.clip(min=0),
    "copysign": lambda x: torch.copysign(x, OTHER) + x.copysign(-1.0),
    "count_nonzero": lambda x: torch.count_nonzero(x > 0) * x + x.count_nonzero() + torch.count_nonzero(x, dim=0) * x,
    "cummax": lambda x: torch.cummax(x, 0)[0] + x.cummax(dim=1).values,
    "cummin": lambda x: torch.cummin(x, 0).values + x.cummin(1)[0],
    "hardshrink": lambda x: F.hardshrink(x) + torch.hardshrink(x, 0.25) + x.hardshrink(),
    "hardsigmoid": lambda x: F.hardsigmoid(x.detach()) * x + nn.hardsigmoid(x.detach() * 2) * x,  # no second derivatives
    "heaviside": lambda x: torch.heaviside(x.detach(), OTHER) * x + x.detach().heaviside(OTHER) * x,
    "linalg_matrix_power": lambda x: torch.linalg.matrix_power(x[:, 1:], 2) + torch.linalg.matrix_power(x[:, :3], n=3),
    "linalg_qr": lambda x: torch.linalg.qr(x[:, :3] + 3 * torch.eye(3)).R + torch.linalg.qr(x[:, 1:] + 4 * torch.eye(3), "reduced")[1],
    "logdet": lambda x: torch.logdet(x[:, :3] @ x[:, :3].mT + torch.eye(3)) + (x[:, 1:] @ x[:, 1:].mT + torch.eye(3)).logdet(),
    "log_sigmoid": lambda x: F.logsigmoid(x) + nn.log_sigmoid(x * 2),
    "logit": lambda x: torch.logit(x.sigmoid()) + (x / 9 + 0.5).logit(1e-6),
    "masked_select": lambda x: x.detach().masked_select(MASK) * x[:, 0] + torch.masked_select(OTHER, mask=MASK) * x[:, 1],
    "nansum": lambda x: torch.nansum(x) + x.nansum(1)[:, None] * x,
    "round": lambda x: torch.round(x) * x + x.round(decimals=1),
    "searchsorted": lambda x: torch.searchsorted(torch.tensor([-1.0, 0.0, 1.0], dtype=x.dtype), x.detach()) * x
    + torch.searchsorted(torch.tensor([0.0, 0.5], dtype=x.dtype), x.detach(), right=True) * x,
    "selu": lambda x: F.selu(x) + torch.selu(x * 2),
    "sign": lambda x: torch.sign(x) * x + x.sgn() * x * x + torch.sgn(x) + x.sign(),
    "take": lambda x: torch.take(x, INDEX) + x.take(index=INDEX + 4),
    "threshold": lambda x: F.threshold(x, 0.1, 0.2) + torch.threshold(x, -0.5, value=1.0),
    "extremes of two": lambda x: torch.max(x, x.sin()) + x.min(other=x.cos() - 1) * torch.min(x, 0.3 * x) + torch.max(x.exp(), other=x),
    "in place with a value": lambda x: x.clone().addcmul_(x, x.sin(), value=0.5).addcdiv_(x, x.exp(), value=-2.0),
    "more in place": lambda x: x.clone().sin_() + x.clone().tanh_() + x.clone().tril_() + x.clone().triu_(1),
}  # fmt: skip


def value() -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64)


@pytest.mark.parametrize("name", CALLS)
def test_as_in_torch(name: str) -> None:
    """Values and derivatives of order one and two agree, the first time and with the plan that was kept."""
    function, x = CALLS[name], value()
    # Some are recorded in parts: sums of a few numbers of order one, in another order than in torch's kernel.
    unit = 64 * torch.finfo(x.dtype).eps if name in _IN_PARTS else 0.0
    traced = trace(function, (x,), (0,), {}, "trace").out_leaves[0]
    torch.testing.assert_close(traced, function(x), rtol=unit, atol=unit)

    def loss(x: Tensor) -> Tensor:
        return (function(x * x) ** 2).sum()

    expected, hessian = torch.func.grad(loss)(x), torch.func.hessian(loss)(x)
    # Sums of at most a hundred terms in double precision.
    for _ in range(2):
        torch.testing.assert_close(chainrule.grad(loss)(x), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(chainrule.jacobian(function)(x), torch.func.jacrev(function)(x), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(chainrule.hessian(loss)(x), hessian, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("batch_norm", "dropout")])
def test_as_in_torch_for_a_batch(name: str) -> None:
    """In a vmap, and recorded inside of one."""
    function, many = CALLS[name], torch.stack([value() for _ in range(3)])

    def loss(x: Tensor) -> Tensor:
        return (function(x * x) ** 2).sum()

    each = torch.stack([torch.func.grad(loss)(x) for x in many])
    torch.testing.assert_close(chainrule.vmap(function)(many), torch.stack([function(x) for x in many]))
    for _ in range(2):
        torch.testing.assert_close(chainrule.vmap(chainrule.grad(loss))(many), each, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(chainrule.grad(lambda m: chainrule.vmap(loss)(m).sum())(many), each, rtol=1e-10, atol=1e-10)


class Watch(torch.overrides.TorchFunctionMode):
    """Keeps the calls of functions that are read by a schema."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[BySchema, tuple[Any, ...], dict[str, Any]]] = []
        self.seen: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(getattr(func, "__name__", ""))
        if (reading := by_schema().get(func)) is not None:
            self.calls.append((reading, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not COMPILED, reason="nothing is compiled here")
@pytest.mark.parametrize("name", CALLS)
def test_read_as_in_python(name: str) -> None:
    """The compiled reader and the one in Python agree, also on calls that are none."""
    from chainrule._shortcuts import read  # noqa: PLC0415 - there is none where nothing is compiled

    with Watch() as watch:
        CALLS[name](value())
    assert watch.calls
    for reading, args, kwargs in watch.calls:
        spelled = [(args, kwargs), (args[:-1], kwargs), ((*args, 1), kwargs), ((*args, None), {}), (args, {"dim": 1}), ((), {})]
        spelled += [((value(), other), {}) for other in (True, 1.5, "1", [1, True], (1, 2), [], [value()], torch.Size([1]), (value(), 1))]
        for given, named in spelled:
            assert same(read(reading, given, named), reading(given, named)), (given, named)


def test_every_function_has_a_row() -> None:
    """The functions are called above."""
    with Watch() as watch:
        for function in CALLS.values():
            function(value())
    assert {getattr(function, "__name__", "") for function in by_schema()} <= watch.seen
