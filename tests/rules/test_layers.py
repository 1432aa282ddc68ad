"""Layers against torch.func in float64: both modes, second order, batched."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils._pytree import tree_leaves

import chainrule
from chainrule.rules import layers


def randn(*shape: int) -> torch.Tensor:
    """A reproducible normal sample; its size seeds it."""
    generator = torch.Generator().manual_seed(sum((k + 1) * size for k, size in enumerate(shape)))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def scalar(function: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """A scalar function whose Hessian sees every output of ``function``."""

    def total(*args: torch.Tensor) -> torch.Tensor:
        return sum((leaf.sin() * 1.3 + leaf * leaf).sum() for leaf in tree_leaves(function(*args)))

    return total


def assert_same(got: Any, wanted: Any) -> None:
    """The same leaves, to 1e-9: float64 rounding over at most 1e4 terms of size one."""
    ours, theirs = tree_leaves(got), tree_leaves(wanted)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-7)


def check_first(function: Callable[..., Any], arguments: tuple[torch.Tensor, ...]) -> None:
    """Both modes against torch.func's reverse mode."""
    argnums = tuple(range(len(arguments)))
    wanted = torch.func.jacrev(function, argnums)(*arguments)
    assert_same(chainrule.jacrev(function, argnums)(*arguments), wanted)
    assert_same(chainrule.jacfwd(function, argnums)(*arguments), wanted)


def check(function: Callable[..., Any], arguments: tuple[torch.Tensor, ...]) -> None:
    """First order in both modes, the Hessian of a scalar of it, and per-sample gradients under vmap."""
    check_first(function, arguments)
    argnums = tuple(range(len(arguments)))
    total = scalar(function)
    wanted = torch.func.jacrev(torch.func.jacrev(total, argnums), argnums)(*arguments)
    assert_same(chainrule.hessian(total, argnums)(*arguments), wanted)
    batched = tuple(torch.stack([a, 0.9 * a, 1.1 * a]) for a in arguments)
    single = [torch.func.grad(total, argnums)(*(b[k] for b in batched)) for k in range(3)]
    got = chainrule.vmap(chainrule.grad(total, argnums))(*batched)
    assert_same(got, [torch.stack(items) for items in zip(*single, strict=True)])


CASES: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, padding=1), (randn(2, 2, 5), randn(3, 2, 3), randn(3))),
    "conv1d_unbatched": (lambda x, w: F.conv1d(x, w, stride=2), (randn(2, 6), randn(1, 2, 3))),
    "conv2d_strided": (lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1), (randn(2, 2, 5, 4), randn(3, 2, 3, 2), randn(3))),
    "conv2d_groups": (lambda x, w: F.conv2d(x, w, groups=2, dilation=2, padding=1), (randn(1, 4, 5, 4), randn(4, 2, 3, 2))),
    "conv2d_same": (lambda x, w: F.conv2d(x, w, padding="same"), (randn(1, 1, 3, 4), randn(2, 1, 2, 2))),
    "conv3d": (lambda x, w: F.conv3d(x, w), (randn(1, 1, 3, 3, 3), randn(2, 1, 2, 2, 2))),
    "conv_transpose1d": (
        lambda x, w: F.conv_transpose1d(x, w, stride=1, dilation=2, output_padding=1), (randn(2, 2, 3), randn(2, 3, 2))
    ),
    "conv_transpose2d": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, padding=1, output_padding=1, groups=2),
        (randn(1, 2, 3, 4), randn(2, 2, 3, 3), randn(4)),
    ),
    "max_pool1d": (lambda x: F.max_pool1d(x, 2), (randn(2, 2, 5),)),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1), (randn(2, 2, 4, 5),)),
    "max_pool3d": (lambda x: F.max_pool3d(x, 2), (randn(1, 2, 3, 4, 4),)),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, (3, 2)), (randn(2, 2, 4, 5),)),
    "avg_pool1d": (lambda x: F.avg_pool1d(x, 2), (randn(2, 2, 5),)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), (randn(2, 2, 4, 5),)),
    "avg_pool2d_unbatched": (lambda x: F.avg_pool2d(x, 2, ceil_mode=True), (randn(2, 4, 5),)),
    "avg_pool3d": (lambda x: F.avg_pool3d(x, 2), (randn(1, 2, 3, 4, 4),)),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (3, 2)), (randn(2, 2, 4, 5),)),
    "adaptive_avg_pool3d": (lambda x: F.adaptive_avg_pool3d(x, (2, 2, 1)), (randn(1, 2, 3, 4, 2),)),
    "lp_pool2d": (lambda x: F.lp_pool2d(x, 2, 2), (randn(1, 2, 4, 4),)),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), (randn(1, 2, 3, 2),)),
    "linear1d": (lambda x: F.interpolate(x, size=5, mode="linear"), (randn(1, 2, 3),)),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"), (randn(1, 2, 3, 4),)),
    "bicubic": (lambda x: F.interpolate(x, size=(4, 5), mode="bicubic", align_corners=True), (randn(1, 1, 3, 4),)),
    "trilinear": (lambda x: F.interpolate(x, size=(3, 2, 4), mode="trilinear"), (randn(1, 1, 2, 3, 2),)),
    "grid_sample": (lambda x, g: F.grid_sample(x, g, align_corners=False), (randn(1, 2, 4, 4), 0.4 * randn(1, 3, 2, 2))),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), (randn(1, 4, 2, 2),)),
    "unfold": (lambda x: F.unfold(x, 2), (randn(1, 2, 3, 3),)),
    "cross_entropy": (lambda x: F.cross_entropy(x, torch.tensor([0, 2, 1])), (randn(3, 4),)),
    "cross_entropy_ignored": (
        lambda x: F.cross_entropy(x, torch.tensor([0, -100, 1]), weight=torch.arange(1.0, 5.0, dtype=x.dtype)), (randn(3, 4),)
    ),
    "nll_2d": (lambda x: F.nll_loss(x, torch.tensor([[[0, 2], [1, 1]]]), reduction="none"), (randn(1, 3, 2, 2),)),
    "cosine_similarity": (lambda x, y: F.cosine_similarity(x, y), (randn(3, 4), randn(3, 4) + 1.0)),
    "multi_head": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), (randn(1, 2, 3, 4), randn(1, 2, 5, 4), randn(1, 2, 5, 3))),
}  # fmt: skip


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention written out."""
    return torch.softmax(query @ key.mT / query.shape[-1] ** 0.5 + mask, -1) @ value


#: Before 2.12, torch does not differentiate the gradient of grid_sample.
UNKNOWN = {"multi_head"} if torch.__version__ >= "2.12" else {"multi_head", "grid_sample"}


@pytest.mark.parametrize("name", [name for name in CASES if name not in UNKNOWN])
def test_layer(name: str) -> None:
    """Every mode agrees with torch.func."""
    check(*CASES[name])


@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "float"])
def test_attention_at_second_order(mask: str) -> None:
    """The fused kernels have no second derivative in torch: the oracle is attention written out."""
    arguments = CASES["multi_head"][1]
    keep = torch.ones(3, 5, dtype=torch.bool)
    keep = keep.tril() if mask == "causal" else keep
    if mask == "boolean":
        keep = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    added = randn(3, 5) if mask == "float" else torch.zeros(3, 5, dtype=torch.float64).masked_fill(~keep, -torch.inf)
    given = {"none": {}, "causal": {"is_causal": True}, "boolean": {"attn_mask": keep}, "float": {"attn_mask": added}}[mask]

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, **given)

    def written(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, added)

    wanted = torch.func.jacrev(written, (0, 1, 2))(*arguments)
    assert_same(chainrule.jacrev(ours, (0, 1, 2))(*arguments), wanted)
    assert_same(chainrule.jacfwd(ours, (0, 1, 2))(*arguments), wanted)
    assert_same(
        chainrule.hessian(scalar(ours), (0, 1, 2))(*arguments), torch.func.hessian(scalar(written), (0, 1, 2))(*arguments)
    )


def test_attention_of_a_row_without_keys_has_no_derivative() -> None:
    """A fully masked row is constant: its derivative is zero and not a NaN."""
    q, k, v = CASES["multi_head"][1]
    keep = torch.ones(3, 5, dtype=torch.bool)
    keep[1] = False
    jacobian = chainrule.jacrev(lambda q: F.scaled_dot_product_attention(q, k, v, attn_mask=keep))(q)
    assert torch.isfinite(jacobian).all()
    assert (jacobian[0, :, 1] == 0).all()


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_distances(p: float) -> None:
    """Distances against the norm written out; torch's own backward of cdist is wrong under its vmap."""
    x, y = randn(3, 2), randn(4, 2)

    def written(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x[:, None] - y).abs().pow(p).sum(-1).pow(1 / p)

    def ours(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cdist(x, y, p)

    assert_same(chainrule.jacrev(ours, (0, 1))(x, y), torch.func.jacrev(written, (0, 1))(x, y))
    assert_same(chainrule.jacfwd(ours, (0, 1))(x, y), torch.func.jacrev(written, (0, 1))(x, y))
    assert_same(chainrule.hessian(scalar(ours), (0, 1))(x, y), torch.func.hessian(scalar(written), (0, 1))(x, y))
    apart = torch.func.jacrev(lambda x: (x[[0, 0, 1]] - x[[1, 2, 2]]).abs().pow(p).sum(-1).pow(1 / p))(x)
    assert_same(chainrule.jacrev(lambda x: F.pdist(x, p))(x), apart)


def test_distance_of_a_point_to_itself_has_no_derivative() -> None:
    """As in torch, the derivative at distance zero is zero."""
    x = randn(3, 2)
    jacobian = chainrule.jacrev(lambda y: torch.cdist(x, y))(x.clone())
    assert torch.isfinite(jacobian).all()
    assert (jacobian[range(3), range(3)] == 0).all()


@pytest.mark.parametrize("function", [lambda x: F.dropout(x, 0.4), lambda x: F.rrelu(x, training=True), lambda x: torch.native_dropout(x, 0.4, True)[0]])
def test_random_layers_differentiate_the_draw_that_was_made(function: Callable[..., Any]) -> None:
    """The Jacobian is the diagonal of the slopes of torch's own draw."""
    x = randn(5, 4)
    torch.manual_seed(3)
    slopes = function(x) / x
    for transform in (chainrule.jacrev, chainrule.jacfwd):
        torch.manual_seed(3)
        assert_same(transform(function)(x).reshape(20, 20), torch.diag(slopes.flatten()))


@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
def test_recurrent_layers(kind: type[torch.nn.Module]) -> None:
    """A recurrent layer with respect to its input."""
    torch.manual_seed(0)
    check_first(kind(2, 3, bidirectional=True).double(), (randn(3, 1, 2),))


def test_weight_map_of_a_convolution_keeps_samples_apart() -> None:
    """The per-sample weight gradients come without a loop over samples, in closed form."""
    x, w = randn(3, 2, 4, 4), randn(2, 2, 3, 3)
    got = chainrule.jacrev(lambda w: F.conv2d(x, w).sum((1, 2, 3)))(w)
    patches = F.unfold(x, 3).reshape(3, 2, 3, 3, 4).sum(-1)
    assert_same(got, patches[:, None].expand(3, 2, 2, 3, 3))


def test_clamp_under_no_grad_keeps_the_derivative() -> None:
    """``gaussian_nll_loss`` clamps its variance in place under ``no_grad``: in torch that hides the clamp only."""
    x, y, variance = randn(4), randn(4) + 1.0, randn(4) ** 2 + 0.1
    function = F.gaussian_nll_loss
    assert_same(chainrule.jacrev(function, (0, 1, 2))(x, y, variance), torch.func.jacrev(function, (0, 1, 2))(x, y, variance))


def test_grid_samples_of_volumes_per_sample() -> None:
    volume, grids = randn(1, 1, 2, 2, 2), randn(2, 1, 1, 1, 2, 3) * 0.5

    def sampled(grid: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.grid_sample(volume, grid, align_corners=False)

    for _ in range(2):
        # torch.func does not map the gradient before 2.12.
        expected = torch.stack([torch.autograd.functional.jacobian(sampled, grid) for grid in grids])
        torch.testing.assert_close(chainrule.vmap(chainrule.jacrev(sampled))(grids), expected)


WEIGHT_CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ((3, 5, 7, 6), (4, 5, 3, 2), {}),
    "one sample": ((1, 4, 6, 5), (2, 4, 2, 2), {}),
    "one channel": ((3, 1, 5, 5), (2, 1, 3, 3), {}),
    "stride that leaves a rest": ((2, 4, 8, 7), (3, 4, 3, 2), {"stride": 3}),
    "padded and dilated": ((2, 4, 7, 6), (3, 4, 3, 2), {"padding": (2, 1), "dilation": (2, 1)}),
    "grouped": ((2, 6, 6, 5), (4, 3, 3, 2), {"groups": 2, "padding": 1}),
    "kernel of the input's size": ((2, 4, 3, 3), (5, 4, 3, 3), {}),
    "one dimension": ((2, 4, 9), (3, 4, 4), {"stride": 2}),
    "three dimensions": ((2, 4, 4, 3, 4), (2, 4, 2, 2, 3), {}),
}
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@pytest.mark.parametrize("name", WEIGHT_CASES)
def test_gradients_of_weights(name: str) -> None:
    """First and second order, of a batch and per sample, with respect to the weight and with both."""
    shape, kernel, settings = WEIGHT_CASES[name]
    convolve = _CONVOLVE[len(shape) - 2]
    x, weight, tangent = randn(*shape), randn(*kernel), randn(*kernel)

    def loss(library: Any, w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(convolve(x, w, **settings)).pow(2).sum()

    def results(library: Any) -> list[Any]:
        one = partial(loss, library)
        return [
            library.grad(one)(weight, x),
            library.grad(one, argnums=(0, 1))(weight, x),
            library.vmap(library.grad(lambda w, s: one(w, s[None])), in_dims=(None, 0))(weight, x),
            library.vmap(library.grad(lambda w, s: one(w, s)), in_dims=(0, None))(torch.stack([weight, 2 * weight]), x),
            library.jvp(library.grad(lambda w: one(w, x)), (weight,), (tangent,))[1],
            library.vjp(library.grad(lambda w: one(w, x)), weight)[1](tangent)[0],
            library.jacrev(lambda w: convolve(x, w, **settings).sum((0, 2)))(weight),
            library.vmap(library.jacrev(lambda w, s: convolve(s[None], w, **settings)), in_dims=(None, 0))(weight, x),
            library.jvp(library.grad(one, argnums=(0, 1)), (weight, x), (tangent, torch.ones_like(x)))[1],
        ]

    torch.testing.assert_close(results(chainrule), results(torch.func))


def test_gradients_of_weights_join_autograd() -> None:
    x, weight = randn(2, 4, 5, 5).requires_grad_(), randn(3, 4, 2, 2).requires_grad_()

    def penalty(library: Any) -> Any:
        found = library.grad(lambda w: torch.tanh(F.conv2d(x, w)).sum())(weight)
        return torch.autograd.grad(found.pow(2).sum(), (x, weight))

    torch.testing.assert_close(penalty(chainrule), penalty(torch.func))


@pytest.mark.parametrize("pool", [2, 3])
def test_per_sample_gradients_of_single_samples(pool):
    """A convolutional network on `x[None]`: maxima over windows that are apart (2) or overlap (3)."""
    weights = {
        "one": torch.randn(4, 2, 3, 3, dtype=torch.float64), "bias": torch.randn(4, dtype=torch.float64),
        "two": torch.randn(8, 4, 3, 3, dtype=torch.float64), "last": torch.randn(3, 8 * 9, dtype=torch.float64),
    }  # fmt: skip

    def loss(weights, x, target):
        inner = torch.nn.functional.conv2d(x[None], weights["one"], weights["bias"]).relu()
        inner = torch.nn.functional.conv2d(inner, weights["two"]).relu()
        inner = torch.nn.functional.max_pool2d(inner, pool, stride=2, padding=pool // 3)
        return torch.nn.functional.cross_entropy(inner.flatten(1) @ weights["last"].T, target[None])

    for _ in range(2):  # planned, then replayed
        x, target = torch.randn(5, 2, 10, 10, dtype=torch.float64), torch.arange(5) % 3
        found, wanted = (m.vmap(m.grad(loss), in_dims=(None, 0, 0))(weights, x, target) for m in (chainrule, torch.func))
        torch.testing.assert_close(found, wanted)


def test_a_sum_of_terms_is_convolved_once() -> None:
    """The derivative of a normalisation is a sum of three terms: they are added up before they meet a convolution."""
    generator = torch.Generator().manual_seed(0)
    weight, head, images = (
        torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((8, 3, 3, 3), (10, 512), (4, 3, 8, 8))
    )

    def model(image: torch.Tensor) -> torch.Tensor:
        return head @ F.group_norm(F.conv2d(image[None], weight, padding=1), 2).sin().reshape(-1)

    jacobians = chainrule.vmap(chainrule.jacrev(model))
    expected = torch.func.vmap(torch.func.jacrev(model))(images)
    for _ in range(3):
        torch.testing.assert_close(jacobians(images), expected)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        jacobians(images)
    (columns,) = [event.count for event in seen.key_averages() if event.key == "aten::col2im"]
    assert columns == 1


@pytest.mark.parametrize(
    ("shape", "weight", "options"),
    [
        ((3, 2, 7), (4, 2, 3), {"padding": 1}), ((2, 4, 6, 5), (6, 2, 3, 2), {"groups": 2, "stride": 2}),
        ((2, 3, 6, 5), (3, 1, 2, 2), {"groups": 3, "dilation": 2}), ((1, 1, 5, 5), (1, 1, 1, 1), {}),
        ((2, 2, 4, 4, 3), (3, 2, 2, 2, 2), {}), ((0, 2, 5, 5), (3, 2, 3, 3), {}), ((2, 2, 5, 5), (3, 2, 3, 3), {"padding": "same"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("turned", [False, True])
def test_tangents_of_the_weight_are_convolved(shape: Any, weight: Any, options: Any, turned: bool) -> None:
    """One tangent, a stack of them, tangents of each sample, and the derivative of all this."""
    if turned:
        options = {name: value for name, value in options.items() if value != "same"}
        groups = options.get("groups", 1)
        weight = (shape[1], weight[0] // groups, *weight[2:])
    convolve = [[F.conv1d, F.conv2d, F.conv3d], [F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d]][turned][len(shape) - 3]
    x, w, tangents, inputs = randn(*shape), randn(*weight), randn(5, *weight), randn(5, *shape)

    def pushed(module: Any, w: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return module.jvp(lambda w: convolve(x, w, **options).tanh(), (w,), (t,))[1]

    for _ in range(4):
        assert_same(pushed(chainrule, w, tangents[0], x), pushed(torch.func, w, tangents[0], x))
        for dims in ((None, 0, None), (None, None, 0), (None, 0, 0), (0, 0, 0)):
            given = tangents.flip(0) if dims[0] == 0 else w, tangents if dims[1] == 0 else tangents[0], inputs if dims[2] == 0 else x
            assert_same(
                chainrule.vmap(partial(pushed, chainrule), dims)(*given), torch.vmap(partial(pushed, torch.func), dims)(*given)
            )
        ours, theirs = (
            module.grad(lambda w, module=module: pushed(module, w, tangents[0], x).sin().sum())(w) for module in (chainrule, torch.func)
        )
        assert_same(ours, theirs)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize(("shape", "options"), [((2, 3, 7, 6), {"padding": 1}), ((2, 1, 9, 7), {"stride": 2, "padding": (1, 0)})])
def test_a_gradient_that_is_differentiated_sums_no_columns(
    shape: tuple[int, ...], options: dict[str, Any], requires_grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few channels: by sums of columns where it is the last derivative, else by a convolution, as its derivative is one."""
    summed: list[Any] = []
    monkeypatch.setattr(layers, "col2im", lambda *args, way=layers.col2im: summed.append(args) or way(*args))
    x = torch.randn(shape[0] + requires_grad, *shape[1:], dtype=torch.float64)  # plans of their own
    weight = torch.randn(5, shape[1], 3, 3, dtype=torch.float64, requires_grad=requires_grad)

    def penalty(transforms: Any, w: torch.Tensor) -> torch.Tensor:
        slope = transforms.grad(lambda a: torch.nn.functional.conv2d(a, w, **options).tanh().sum())(x)
        return ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()

    expected = torch.func.grad(lambda w: penalty(torch.func, w))(weight)
    summed.clear()
    for _ in range(4):
        torch.testing.assert_close(chainrule.grad(lambda w: penalty(chainrule, w))(weight), expected)
    assert not summed
    assert torch.isfinite(penalty(chainrule, weight.detach()))
    assert summed


_TURNED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
TURNED_CASES: dict[str, Any] = {
    "plain": ((2, 4, 5, 4), (4, 3, 3, 2), {}),
    "strided": ((2, 4, 3, 4), (4, 5, 3, 3), {"stride": 2, "padding": 1, "output_padding": (1, 0)}),
    "dilated": ((1, 2, 4, 3), (2, 1, 2, 3), {"dilation": (1, 2), "padding": 1}),
    "larger than what is read": ((2, 4, 3, 3), (4, 2, 2, 2), {"stride": 1, "dilation": 3, "output_padding": 2}),
    "grouped": ((2, 4, 3, 3), (4, 2, 2, 2), {"groups": 2, "stride": 2}),
    "one dimension": ((2, 4, 6), (4, 3, 4), {"stride": 3, "output_padding": 2}),
    "three dimensions": ((1, 4, 2, 3, 2), (4, 2, 2, 2, 3), {"stride": 2}),
    "from one value": ((3, 2, 1, 1), (2, 3, 3, 1), {"stride": 2}),
}


@pytest.mark.parametrize("name", TURNED_CASES)
def test_gradients_of_weights_of_transposed_convolutions(name: str) -> None:
    """Up to third order, of a batch and per sample: torch's kernel with input and cotangent in each other's place."""
    shape, kernel, settings = TURNED_CASES[name]
    convolve = _TURNED[len(shape) - 2]
    x, weight, tangent = randn(*shape), randn(*kernel), randn(*kernel)

    def loss(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(convolve(x, w, **settings)).pow(2).sum()

    def along(library: Any) -> Any:
        return lambda w: (library.grad(loss)(w, x) * tangent).sum().sin()

    def results(library: Any) -> list[Any]:
        return [
            library.grad(loss)(weight, x),
            library.grad(loss, argnums=(0, 1))(weight, x),
            library.vmap(library.grad(lambda w, s: loss(w, s[None])), in_dims=(None, 0))(weight, x),
            library.vmap(library.grad(loss), in_dims=(0, None))(torch.stack([weight, 2 * weight]), x),
            library.vjp(library.grad(loss), weight, x)[1](tangent),
            library.grad(along(library))(weight),
            library.jvp(library.grad(along(library)), (weight,), (tangent,))[1],
        ]

    expected = results(torch.func)
    for _ in range(4):
        torch.testing.assert_close(results(chainrule), expected)
    joined = weight.clone().requires_grad_()
    slope = chainrule.grad(loss)(joined, x)
    wanted = torch.func.vjp(torch.func.grad(lambda w: loss(w, x)), weight)[1](torch.ones_like(weight))[0]
    torch.testing.assert_close(torch.autograd.grad(slope.sum(), joined)[0], wanted)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_penalty_on_gradients_reads_no_patches(mapped: bool) -> None:
    """The gradient of a convolution by its input is a transposed one, whose weight is differentiated without an index."""
    x, weight = torch.randn(5, 8, 14, 14), torch.randn(12, 8, 3, 3)

    def penalty(transforms: Any, w: torch.Tensor) -> torch.Tensor:
        def slope(sample: torch.Tensor) -> torch.Tensor:
            return F.conv2d(sample, w, stride=2, padding=1).tanh().sum()

        gradient = transforms.grad(slope)
        return (transforms.vmap(lambda s: gradient(s[None])) if mapped else gradient)(x).square().sum()

    expected = torch.func.grad(lambda w: penalty(torch.func, w))(weight)
    for _ in range(4):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            found = chainrule.grad(lambda w: penalty(chainrule, w))(weight)
        # Sums of up to 5·49·9 products of numbers of size ten in float32.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)
        names = {event.name for event in profile.events()}
        assert "aten::index_select" not in names
        assert "aten::convolution_backward" in names


@pytest.mark.parametrize("channels", [1, 4])
def test_weights_of_transposed_convolutions_per_sample_read_no_patches(channels: int) -> None:
    """Those would be read by index, with zeros between what they read: several times the work of the kernel."""
    weight, x = torch.randn(channels, 4, 3, 3, dtype=torch.float64), torch.randn(5, channels, 6, 6, dtype=torch.float64)

    def loss(w: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose2d(sample[None], w, stride=2).square().sum()

    expected = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x)
    for _ in range(4):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            found = chainrule.vmap(chainrule.grad(loss), in_dims=(None, 0))(weight, x)
        torch.testing.assert_close(found, expected)
        assert "aten::index_select" not in {event.name for event in profile.events()}
