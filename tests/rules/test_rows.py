"""The kernels that ops have for one cotangent, and losses recorded whole: against torch.func, at every order.

The tolerance is that of float64 sums of a few hundred products in another order: 1e-10 relative to results of order one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import chainrule
from chainrule.execute import engine
from chainrule.execute.cached_plans import CachedPlan
from chainrule.rules.rows import KERNELS
from chainrule.rules.table import RULES

tf = torch.func
Tensor = torch.Tensor
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def R(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


TARGETS = torch.tensor([0, 3, -100, 2, 2, 1])
IGNORED = torch.full((6,), -100)
WEIGHT, BIAS, MIXED, IMAGES = R(5), R(5), R(6, 5), R(3, 2, 4, 3)

CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "softmax": (lambda x: (torch.softmax(x, -1) * MIXED).sum(), (R(6, 5),)),
    "softmax along the first dimension": (lambda x: (torch.softmax(x, 0) * MIXED).square().sum(), (R(6, 5),)),
    "softmax of one": (lambda x: (torch.softmax(x, 0) * x).sum(), (R(1),)),
    "log-softmax": (lambda x: (torch.log_softmax(x.tanh(), 1) * MIXED).sum(), (R(6, 5),)),
    "log-softmax of a transposed tensor": (lambda x: (torch.log_softmax(x.T, 1) * MIXED).sum(), (R(5, 6),)),
    "layer norm": (lambda x, w, b: (F.layer_norm(x, (5,), w, b) * MIXED).sum(), (R(6, 5), R(5), R(5))),
    "layer norm with fixed parameters": (lambda x: (F.layer_norm(x, (5,), WEIGHT, BIAS) * MIXED).sum(), (R(6, 5),)),
    "layer norm of fixed inputs": (lambda w, b: (F.layer_norm(MIXED, (5,), w, b) ** 3).sum(), (R(5), R(5))),
    "layer norm over two dimensions": (lambda x: (F.layer_norm(x, (6, 5)) * MIXED).sin().sum(), (R(2, 6, 5),)),
    "layer norm of what is its weight": (lambda x: (F.layer_norm(x, (5,), x) * MIXED[0]).sum(), (R(5),)),
    "batch norm": (
        lambda x, w, b: (F.batch_norm(x, None, None, w, b, training=True) * MIXED).square().sum(), (R(6, 5), R(5), R(5)),
    ),
    "batch norm of images": (
        lambda x: (F.batch_norm(x, None, None, training=True) * IMAGES).sum(), (R(3, 2, 4, 3),),
    ),
    "tanh": (lambda x: (torch.tanh(x) * MIXED).square().sum(), (R(6, 5),)),
    "sigmoid": (lambda x: (torch.sigmoid(x) * MIXED).square().sum(), (R(6, 5),)),
    "gelu": (lambda x: (F.gelu(x) * MIXED).square().sum(), (R(6, 5),)),
    "gelu by tanh": (lambda x: (F.gelu(x, approximate="tanh") * MIXED).square().sum(), (R(6, 5),)),
    "silu": (lambda x: (F.silu(x) * MIXED).square().sum(), (R(6, 5),)),
    "mish": (lambda x: (F.mish(x) * MIXED).square().sum(), (R(6, 5),)),
    "softplus": (lambda x: (F.softplus(x, 2.0, 1.0) * MIXED).square().sum(), (R(6, 5),)),
    "elu": (lambda x: (F.elu(x, 1.3) * MIXED).square().sum(), (R(6, 5),)),
    "selu": (lambda x: (F.selu(x) * MIXED).square().sum(), (R(6, 5),)),
    # Torch takes the reciprocal of alpha in single precision; that of 2 is exact.
    "celu": (lambda x: (F.celu(x, 2.0) * MIXED).square().sum(), (R(6, 5),)),
    "a broadcast cotangent": (lambda x: (torch.softmax(x, -1).mean(0) * MIXED[0]).sum(), (R(6, 5),)),
    "a constant cotangent": (lambda x: torch.tanh(x).sum() + torch.log_softmax(x, -1).mean(), (R(6, 5),)),
    "a cotangent of picked entries": (lambda x: torch.log_softmax(x, -1)[2, 1] ** 2, (R(6, 5),)),
    "cross-entropy": (lambda x: F.cross_entropy(x.sin(), TARGETS), (R(6, 5),)),
    "cross-entropy, summed": (lambda x: F.cross_entropy(x, TARGETS, reduction="sum") ** 2, (R(6, 5),)),
    "cross-entropy of each": (lambda x: (F.cross_entropy(x, TARGETS, reduction="none") * MIXED[:, 0]).sum(), (R(6, 5),)),
    "cross-entropy with another class ignored": (lambda x: F.cross_entropy(x, TARGETS.clamp(0), ignore_index=2), (R(6, 5),)),
    "cross-entropy of one class": (lambda x: F.cross_entropy(x, torch.zeros(6, dtype=torch.long)), (R(6, 1),)),
    "cross-entropy of one sample": (lambda x: F.cross_entropy(x, torch.tensor([3])), (R(1, 5),)),
    "cross-entropy without a batch": (lambda x: F.cross_entropy(x, torch.tensor(3)), (R(5),)),
    "cross-entropy with weights": (lambda x: F.cross_entropy(x, TARGETS, WEIGHT.exp()), (R(6, 5),)),
    "cross-entropy, smoothed": (lambda x: F.cross_entropy(x * x, TARGETS, label_smoothing=0.1), (R(6, 5),)),
    "cross-entropy, smoothed and summed": (
        lambda x: F.cross_entropy(x, TARGETS, reduction="sum", label_smoothing=0.3) ** 2, (R(6, 5),),
    ),
    "cross-entropy of each, smoothed": (
        lambda x: (F.cross_entropy(x, TARGETS, reduction="none", label_smoothing=1.0) ** 2).sum(), (R(6, 5),),
    ),
    "negative log-likelihood": (lambda x: F.nll_loss(x.sin(), TARGETS) ** 2, (R(6, 5),)),
    "cosine similarity": (lambda x, y: (F.cosine_similarity(x, y) ** 2).sum(), (R(6, 5), R(6, 5))),
    "cosine similarity to a constant": (lambda x: F.cosine_similarity(x, MIXED, dim=0).sin().sum(), (R(6, 5),)),
    "cosine similarity with small norms": (lambda x: F.cosine_similarity(x * 1e-3, MIXED, eps=0.1).sum(), (R(6, 5),)),
    "cosine similarity, broadcast": (lambda x: F.cosine_similarity(x, MIXED).sin().sum(), (R(1, 5),)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str) -> None:
    function, args = CASES[name]
    every = tuple(range(len(args)))
    wanted = tf.grad(function, every)(*args)
    for _ in range(3):  # planned, compiled, replayed
        for found, expected in zip(chainrule.grad(function, every)(*args), wanted, strict=True):
            torch.testing.assert_close(found, expected, **CLOSE)
    if "small norms" in name:  # as torch defines it, the clamp of the norms does not stop their derivative
        return
    step = 1e-6
    for number, gradient in enumerate(chainrule.grad(function, every)(*args)):
        direction = torch.randn_like(args[number])
        moved = [[a + sign * step * direction if n == number else a for n, a in enumerate(args)] for sign in (1, -1)]
        slope = (function(*moved[0]) - function(*moved[1])) / (2 * step)
        # Central differences: the third derivative times step², and rounding of the function over the step.
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_pullbacks_and_values(name: str) -> None:
    function, args = CASES[name]
    cotangent = R()
    value, pull = chainrule.vjp(function, *args)
    expected, theirs = tf.vjp(function, *args)
    torch.testing.assert_close(value, expected, **CLOSE)
    for _ in range(2):
        for found, wanted in zip(pull(cotangent), theirs(cotangent), strict=True):
            torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_derivatives_of_gradients(name: str) -> None:
    function, args = CASES[name]
    tangent = torch.randn_like(args[0])
    theirs = tf.grad(lambda x: (tf.grad(function)(x, *args[1:]) * tangent).sum())(args[0])
    ours = chainrule.grad(lambda x: (chainrule.grad(function)(x, *args[1:]) * tangent).sum())(args[0])
    torch.testing.assert_close(ours, theirs, **CLOSE)
    ours = chainrule.jvp(lambda x: chainrule.grad(function)(x, *args[1:]), (args[0],), (tangent,))[1]
    torch.testing.assert_close(ours, theirs, **CLOSE)
    torch.testing.assert_close(chainrule.hessian(function)(*args), tf.jacrev(tf.grad(function))(*args), **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_several(name: str) -> None:
    function, args = CASES[name]
    several = torch.stack([args[0], 2 * args[0], args[0].flip(0)])
    ours = chainrule.vmap(lambda x: chainrule.grad(function)(x, *args[1:]))(several)
    wanted = torch.stack([tf.grad(function)(x, *args[1:]) for x in several])
    torch.testing.assert_close(ours, wanted, **CLOSE)


@pytest.mark.parametrize("name", ["softmax", "log-softmax", "layer norm", "batch norm", "gelu", "cross-entropy"])
def test_autograd_through_gradients(name: str) -> None:
    function, args = CASES[name]
    leaf = args[0].clone().requires_grad_()
    ours = torch.autograd.grad(chainrule.grad(function)(leaf, *args[1:]).square().sum(), leaf)[0]
    twin = args[0].clone().requires_grad_()
    first = torch.autograd.grad(function(twin, *args[1:]), twin, create_graph=True)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(first.square().sum(), twin)[0], **CLOSE)


def test_no_target_counts() -> None:
    """Torch divides by nothing: its loss is no number, and its gradient zero."""
    found = chainrule.grad(lambda x: F.cross_entropy(x, IGNORED))(MIXED)
    assert not found.isfinite().all() or not found.any()
    summed = chainrule.grad(lambda x: F.cross_entropy(x, IGNORED, reduction="sum"))(MIXED)
    torch.testing.assert_close(summed, torch.zeros_like(MIXED))


def test_targets_out_of_range_are_refused() -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        chainrule.grad(lambda x: F.cross_entropy(x, torch.tensor([0, 1, 2, 3, 4, 5])))(MIXED)


def test_mixed_dtypes_keep_theirs() -> None:
    x = R(6, 5, dtype=torch.float32)
    found = chainrule.grad(lambda x: (torch.softmax(x, -1, dtype=torch.float64) * MIXED).sum())(x)
    assert found.dtype == torch.float32
    wanted = tf.grad(lambda x: (torch.softmax(x, -1, dtype=torch.float64) * MIXED).sum())(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)  # of float32


def _calls(function: Callable[..., Tensor], *args: Tensor) -> list[str]:
    engine.CACHE.clear()
    for _ in range(3):
        chainrule.grad(function)(*args)
    (plan,) = engine.CACHE._plans.values()
    assert isinstance(plan, CachedPlan) and plan.runner is not None
    kept = plan.runner.source_of.kept  # type: ignore[attr-defined]
    return [str(getattr(i.function, "__name__", i.function)).removesuffix(".default") for i in kept]


def test_one_call_for_a_row() -> None:
    assert _calls(lambda x: F.cross_entropy(x, TARGETS), MIXED) == ["nll_loss_backward", "_log_softmax_backward_data"]
    assert _calls(lambda x: (F.layer_norm(x, (5,)) * MIXED).sum(), MIXED)[-1] == "layer_norm_backward"


def test_kernels_are_for_ops_with_rules() -> None:
    assert KERNELS.keys() <= RULES.keys()
