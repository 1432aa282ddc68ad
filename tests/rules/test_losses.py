"""Negative log-likelihoods: with weights, smoothing and ignored targets, against torch.func."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import chainrule

D = torch.float64


def _loss(shape, reduction, weighted, smoothing, ignored):
    """A cross-entropy of logits of a shape; a part of the targets, or all of them, is ignored."""
    classes = shape[0] if len(shape) == 1 else shape[1]
    target = torch.randint(0, classes, () if len(shape) == 1 else (shape[0], *shape[2:]))
    flat = target.reshape(-1)
    flat[: flat.numel() if ignored == "all" else flat.numel() // 2] = -100
    weight = torch.rand(classes, dtype=D) if weighted else None

    def loss(logits):
        return F.cross_entropy(logits, target, weight=weight, label_smoothing=smoothing, reduction=reduction)

    return loss


_OPTIONS = list(itertools.product(("mean", "sum", "none"), (False, True), (0.0, 0.2), ("some", "all")))


@pytest.mark.parametrize("shape", [(5,), (4, 5), (1, 5), (3, 1), (3, 5, 2), (2, 5, 3, 2)])
@pytest.mark.parametrize(("reduction", "weighted", "smoothing", "ignored"), _OPTIONS)
def test_cross_entropy(shape, reduction, weighted, smoothing, ignored):
    loss = _loss(shape, reduction, weighted, smoothing, ignored)

    def total(logits):
        return loss(logits).sum()

    for _ in range(2):  # planned, then replayed
        logits = torch.randn(shape, dtype=D)
        stack = torch.stack([logits, 2 * logits])
        for transform in (
            lambda m: m.grad_and_value(total)(logits),  # noqa: B023 - called in this turn
            lambda m: m.jacrev(loss)(logits),  # noqa: B023
            lambda m: m.hessian(total)(logits),  # noqa: B023
            lambda m: m.vmap(m.grad(total))(stack),  # noqa: B023
            lambda m: m.grad(lambda rows: m.vmap(total)(rows).sum())(stack),  # noqa: B023
        ):
            torch.testing.assert_close(transform(chainrule), transform(torch.func), equal_nan=True)


@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_but_ignored_targets_has_no_slope(weighted):
    """A mean over no target is NaN, and constant: all transforms say so, as torch's reverse mode does."""
    loss = _loss((4, 5), "mean", weighted, 0.1, "all")
    logits = torch.randn(4, 5, dtype=D)
    value, tangent = chainrule.jvp(loss, (logits,), (torch.randn(4, 5, dtype=D),))
    assert value.isnan()
    assert tangent == 0
    for transform in (chainrule.jacfwd, chainrule.jacrev, chainrule.jacobian):
        assert torch.equal(transform(loss)(logits), torch.zeros(4, 5, dtype=D))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_samples(reduction):
    """The Hessian has no entries (torch.func's raises there)."""
    loss = _loss((0, 5), reduction, True, 0.2, "some")
    logits = torch.zeros(0, 5, dtype=D)

    def total(logits):
        return loss(logits).sum()

    expected = torch.func.grad_and_value(total)(logits)
    torch.testing.assert_close(chainrule.grad_and_value(total)(logits), expected, equal_nan=True)
    assert chainrule.hessian(total)(logits).shape == (0, 5, 0, 5)
