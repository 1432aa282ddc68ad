"""Losses that are recorded as their parts: all options and reductions, against torch.func sample by sample."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import chainrule

D = torch.float64
#: Sums of some hundred float64 products of numbers near 1, in another order.
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def _sign(*shape):
    return torch.where(torch.rand(shape, dtype=D) > 0.5, 1.0, -1.0).to(D)


def _normal(*shape):
    return torch.randn(shape, dtype=D)


def _unit(*shape):
    return torch.rand(shape, dtype=D) * 0.8 + 0.1


def _labels(*shape):
    """Distinct labels, ended by -1 somewhere or nowhere; what follows the end does not count."""
    rows = [torch.randperm(shape[-1]) for _ in range(shape[0] if len(shape) == 2 else 1)]
    for number, row in enumerate(rows):
        row[2 * number :: 3] = -1
    return torch.stack(rows).reshape(shape)


# By name: the loss, how many of its arguments are differentiated, and the arguments of one sample.
LOSSES = {
    "bce": (F.binary_cross_entropy, 2, lambda: (_unit(3, 4), _unit(3, 4))),
    "bce weighted": (lambda x, t, w, **r: F.binary_cross_entropy(x, t, w, **r), 2, lambda: (_unit(3, 4), _unit(3, 4), _unit(4))),
    "logits": (F.binary_cross_entropy_with_logits, 2, lambda: (_normal(3, 4), _unit(3, 4))),
    "logits weighted": (
        lambda x, t, w, p, **r: F.binary_cross_entropy_with_logits(x, t, w, pos_weight=p, **r), 2,
        lambda: (_normal(3, 4), _unit(3, 4), _unit(4), _unit(4)),
    ),
    "cosine similarity": (lambda x, y, reduction: F.cosine_similarity(x, y, dim=0), 2, lambda: (_normal(3, 2), _normal(3, 2))),
    "cosine of a row": (lambda x, y, t, **r: F.cosine_embedding_loss(x, y, t, 0.2, **r), 2, lambda: (_normal(4), _normal(4), _sign())),
    "cosine": (F.cosine_embedding_loss, 2, lambda: (_normal(3, 4), _normal(3, 4), _sign(3))),
    "hinge": (lambda x, t, **r: F.hinge_embedding_loss(x, t, 0.5, **r), 1, lambda: (_normal(3, 4), _sign(3, 4))),
    "hinge of others": (F.hinge_embedding_loss, 1, lambda: (_normal(4), torch.tensor([1, -1, 0, 2]))),
    "hinge broadcast": (F.hinge_embedding_loss, 1, lambda: (_normal(4), _sign(3, 1))),
    "kl": (F.kl_div, 2, lambda: (_normal(3, 4), _unit(3, 4))),
    "kl of logarithms": (lambda x, t, **r: F.kl_div(x, t, log_target=True, **r), 2, lambda: (_normal(4), _normal(4))),
    "l1": (F.l1_loss, 2, lambda: (_normal(3, 4), _normal(3, 4))),
    "poisson": (F.poisson_nll_loss, 2, lambda: (_normal(3, 4), _unit(3, 4))),
    "poisson of rates": (lambda x, t, **r: F.poisson_nll_loss(x, t, log_input=False, **r), 2, lambda: (_unit(4), _unit(4))),
    "poisson in full": (lambda x, t, **r: F.poisson_nll_loss(x, t, full=True, **r), 1, lambda: (_unit(4), 2 * _unit(4))),
    "ranking": (F.margin_ranking_loss, 3, lambda: (_normal(5), _normal(5), _sign(5))),
    "ranking, wide": (lambda x, y, t, **r: F.margin_ranking_loss(x, y, t, 0.3, **r), 2, lambda: (_normal(5), _normal(1), _sign(5))),
    "triplet": (F.triplet_margin_loss, 3, lambda: (_normal(3, 4), _normal(3, 4), _normal(3, 4))),
    "triplet swapped": (
        lambda x, y, z, **r: F.triplet_margin_loss(x, y, z, 0.5, 3, swap=True, **r), 3, lambda: (_normal(4), _normal(4), _normal(4))
    ),
    "margins": (F.multi_margin_loss, 1, lambda: (_normal(3, 4), torch.randint(4, (3,)))),
    "margin of a row": (F.multi_margin_loss, 1, lambda: (_normal(4), torch.randint(4, ()))),
    "margin of a list": (F.multi_margin_loss, 1, lambda: (_normal(4), torch.randint(4, (1,)))),
    "margins weighted": (
        lambda x, t, w, **r: F.multi_margin_loss(x, t, 1, 0.5, w, **r), 1, lambda: (_normal(3, 4), torch.randint(4, (3,)), _unit(4))
    ),
    "labels": (F.multilabel_margin_loss, 1, lambda: (_normal(3, 4), _labels(3, 4))),
    "labels of a row": (F.multilabel_margin_loss, 1, lambda: (_normal(5), _labels(5))),
}  # fmt: skip

#: Torch has no second derivatives of these.
_ONCE = ("margins", "margin of a row", "margin of a list", "margins weighted", "labels", "labels of a row")


def _samples(items):
    return [torch.stack(parts) for parts in zip(*items, strict=True)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")
def test_as_in_torch(name, reduction):
    loss, active, make = LOSSES[name]
    places = tuple(range(active))

    def function(*args):
        return loss(*args, reduction=reduction)

    def total(*args):
        return function(*args).square().sum()

    for _ in range(3):  # planned, then replayed
        samples = [make() for _ in range(3)]
        several, axes = _samples(samples), (0,) * len(samples[0])
        one = samples[0]
        torch.testing.assert_close(chainrule.vmap(function)(*several), torch.stack([function(*args) for args in samples]))
        transforms = [lambda m: m.grad(total, places), lambda m: m.jacrev(function, places)]
        if name not in _ONCE:
            transforms += [lambda m: m.jacfwd(function, places), lambda m: m.hessian(total, places)]
        for transform in transforms:
            expected = transform(torch.func)(*one)
            torch.testing.assert_close(transform(chainrule)(*one), expected, **TOLERANCE)
            each = torch.utils._pytree.tree_map(lambda *x: torch.stack(x), *[transform(torch.func)(*args) for args in samples])
            torch.testing.assert_close(chainrule.vmap(transform(chainrule), axes)(*several), each, **TOLERANCE)
            fixed = (0, *(None,) * (len(one) - 1))
            found = chainrule.vmap(transform(chainrule), fixed)(several[0], *one[1:])
            each = [transform(torch.func)(first, *one[1:]) for first in several[0]]
            torch.testing.assert_close(found, torch.utils._pytree.tree_map(lambda *x: torch.stack(x), *each), **TOLERANCE)
        gradient = torch.func.grad(lambda *args: sum(total(*row) for row in zip(*args, strict=True)), places)(*several)
        mapped = chainrule.grad(lambda *args: chainrule.vmap(total)(*args).sum(), places)(*several)
        torch.testing.assert_close(mapped, gradient, **TOLERANCE)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("target", [torch.tensor([3, 0, -1, 1]), torch.tensor([[3, -1, 2, 1], [-1, 0, 0, 0], [1, 1, 0, 2]])])
def test_labels_end_at_the_first_negative_one(target, reduction):
    """What torch's decomposition counts beyond it is left out, in the loss, its derivatives and the mask of the labels."""
    x = _normal(*target.shape)

    def function(x):
        return F.multilabel_margin_loss(x, target, reduction=reduction)

    torch.testing.assert_close(chainrule.jacrev(function)(x), torch.func.jacrev(function)(x), **TOLERANCE)
    found, mask = chainrule.vmap(lambda x: torch.ops.aten.multilabel_margin_loss_forward(x, target, 2))(x[None])
    value, labels = torch.ops.aten.multilabel_margin_loss_forward(x, target, 2)
    torch.testing.assert_close((found[0], mask[0]), (value, labels))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(3, 4), (5,), (1, 1), (1,), (2, 1), (7, 3)])
def test_labels_of_every_order(shape, reduction):
    """Torch has no second derivatives of this loss: central differences of its gradient."""

    def total(x, target):
        return F.multilabel_margin_loss(x * x, target, reduction=reduction).square().sum()

    gradient, step, rank = torch.func.grad(total), 1e-6, len(shape)
    for _ in range(4):
        x, target, v = _normal(*shape), _labels(*shape), _normal(*shape)
        several, targets = torch.stack([x, 2 * x]), torch.stack([target, _labels(*shape)])
        slope = (gradient(x + step * v, target) - gradient(x - step * v, target)) / (2 * step)
        ours = chainrule.grad(total)
        twice = chainrule.vmap(chainrule.hessian(total))(several, targets)[0]
        given = x.clone().requires_grad_()
        mapped = chainrule.vmap(ours, (0, None))(given[None], target)[0]
        for found in (
            chainrule.jvp(lambda x: ours(x, target), (x,), (v,))[1],
            (chainrule.hessian(total)(x, target) * v).flatten(-rank).sum(-1),
            (twice * v).flatten(-rank).sum(-1),
            chainrule.grad(lambda x: (ours(x, target) * v).sum())(x),
            torch.autograd.grad((ours(given, target) * v).sum(), given)[0],
            torch.autograd.grad((mapped * v).sum(), given)[0],
        ):
            # Rounding of 1e-16 over the step, of values of size ten.
            torch.testing.assert_close(found, slope, rtol=1e-6, atol=1e-7)
        both = chainrule.vmap(chainrule.vmap(ours))(several[None], targets[None])[0]
        torch.testing.assert_close(both, torch.stack([gradient(*pair) for pair in zip(several, targets, strict=True)]), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_by_one_kernel(dtype):
    x, target = _normal(6, 3, 4).to(dtype), torch.stack([_labels(3, 4) for _ in range(6)])
    for transform in (
        lambda lib: lib.grad(F.multilabel_margin_loss)(x[0], target[0]),
        lambda lib: torch.stack([lib.grad(F.multilabel_margin_loss)(*pair) for pair in zip(x, target, strict=True)]),
        lambda lib: lib.vmap(lib.grad(F.multilabel_margin_loss))(x, target),
    ):
        for _ in range(4):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                found = transform(chainrule)
            names = {event.name for event in profile.events()}
            assert "aten::multilabel_margin_loss_backward" in names
            assert not {"aten::gather", "aten::cumsum", "aten::clamp_min"} & names
        torch.testing.assert_close(found, transform(torch.func), **(TOLERANCE if dtype is D else {}))


def test_squared_margins_twice():
    """Torch has no second derivative here; the loss written out has."""
    x, target = _normal(5), torch.tensor(2)

    def written(x):
        return (0.5 - x[2] + x[[0, 1, 3, 4]]).relu().square().sum() / 5

    for _ in range(2):
        found = chainrule.hessian(lambda x: F.multi_margin_loss(x, target, 2, 0.5))(x)
        torch.testing.assert_close(found, torch.func.hessian(written)(x), **TOLERANCE)


@pytest.mark.parametrize("at", [0.0, 1.0])
def test_cross_entropy_at_the_ends(at):
    """Where the logarithm is cut off, the slope is torch's."""
    x = torch.full((2,), at, dtype=D)
    target = torch.tensor([0.0, 1.0], dtype=D)
    expected = torch.stack([torch.func.grad(F.binary_cross_entropy)(*pair) for pair in zip(x, target, strict=True)])
    torch.testing.assert_close(chainrule.vmap(chainrule.grad(F.binary_cross_entropy))(x, target), expected)


def test_wrong_shapes_are_refused_as_by_torch():
    with pytest.raises((RuntimeError, ValueError)):
        chainrule.grad(lambda x: F.multi_margin_loss(x, torch.tensor([0, 1])))(_normal(3, 4))
    with pytest.raises((RuntimeError, ValueError)):
        chainrule.grad(lambda x: F.multilabel_margin_loss(x, torch.tensor([0, 1])))(_normal(3))
    with pytest.raises((RuntimeError, ValueError)):
        chainrule.grad(lambda x: F.margin_ranking_loss(x, x[None], x))(_normal(3))


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 3.0], dtype=D)])
def test_multi_margin_loss_at_its_kink(p, weight):
    x, target = torch.tensor([[1.0, 0.0, -2.0], [0.0, 1.0, 3.0], [0.5, 0.5, -0.5]], dtype=D), torch.tensor([0, 1, 2])

    def loss(x):
        return F.multi_margin_loss(x, target, p=p, weight=weight)

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    for transform in (chainrule.grad, chainrule.jacfwd):
        torch.testing.assert_close(transform(loss)(x), leaf.grad, **TOLERANCE)
