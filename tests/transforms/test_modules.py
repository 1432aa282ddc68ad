"""nn.Modules: Jacobians wrt inputs and parameters, Hessian products, per-sample gradients, forward mode where torch has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.func
from torch import nn

import chainrule

F = nn.functional


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 2), (2, 3)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 2, stride=2, padding=1), (1, 2, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 2, 3, padding=1, groups=2), (2, 2, 4, 4)),
    "conv transposed": (lambda: nn.ConvTranspose2d(1, 2, 2, stride=2), (1, 1, 3, 3)),
    "pooling": (lambda: nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)), (2, 1, 8, 8)),
    "batch norm": (lambda: nn.BatchNorm1d(3), (4, 3)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(2), (3, 2, 2, 2)),
    "layer norm": (lambda: nn.LayerNorm(4), (2, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3)),
    "cnn": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2)), (2, 1, 6, 6)),
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2), nn.LogSoftmax(-1)), (2, 3)),
    "transformer layer": (lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.0), (1, 3, 4)),
}


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    make, shape = MODULES[name]
    return make().double(), r(*shape)


def without_state(module: nn.Module) -> nn.Module:
    """The module as torch.func can differentiate it in training: no running statistics to write to."""
    return chainrule.replace_all_batch_norm_modules_(module)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_jacobians_with_respect_to_input_and_parameters(name: str, training: bool) -> None:
    module, x = build(name)
    module.train(training)
    parameters = {key: value.detach() for key, value in module.named_parameters()} or {"none": r(1)}
    mine = chainrule.jacrev(module)(x), chainrule.jacfwd(module)(x)
    if "none" in parameters:
        torch.testing.assert_close(mine, (torch.func.jacrev(module)(x),) * 2)
        return
    by_parameters = chainrule.jacrev(lambda p: chainrule.functional_call(module, p, (x,)))(parameters)
    forward = chainrule.jacfwd(lambda p: chainrule.functional_call(module, p, (x,)))(parameters)
    if training:
        module = without_state(module)
    expected = torch.func.jacrev(module)(x)
    for found in mine:
        torch.testing.assert_close(found, expected)
    theirs = torch.func.jacrev(lambda p: torch.func.functional_call(module, p, (x,)))(parameters)
    assert by_parameters.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(by_parameters[key], theirs[key])
        torch.testing.assert_close(forward[key], theirs[key])


@pytest.mark.parametrize("name", MODULES)
def test_hessian_products(name: str) -> None:
    module, x = build(name)
    v = torch.randn_like(x)
    mine = chainrule.hvp(lambda a: (module(a) ** 2).sum(), (x,), (v,))
    reverse = chainrule.vhp(lambda a: (module(a) ** 2).sum(), (x,), (v,))
    module = without_state(module)
    # torch.func's forward mode through norms and attention is missing or partial: reverse over reverse is the oracle.
    _, pull = torch.func.vjp(torch.func.grad(lambda a: (module(a) ** 2).sum()), x) if name != "transformer layer" else (None, None)
    expected = pull(v)[0] if pull else difference(lambda a: chainrule.grad(lambda b: (module(b) ** 2).sum())(a), x, v)
    tolerance = 1e-8 if pull else 1e-5
    torch.testing.assert_close(mine.detach(), expected.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(reverse.detach(), expected.detach(), rtol=tolerance, atol=tolerance)


def difference(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    step = 1e-6
    return (function(x + step * v) - function(x - step * v)) / (2 * step)


def test_running_statistics_end_as_after_one_forward() -> None:
    for transform in (chainrule.jacrev, chainrule.jacfwd, chainrule.hessian):
        module, plain, x = nn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double(), r(5, 3)
        transform(lambda a, m=module: m(a).pow(2).sum())(x)
        plain(x)
        torch.testing.assert_close(module.running_mean, plain.running_mean)
        torch.testing.assert_close(module.running_var, plain.running_var)
        assert module.num_batches_tracked == 1


def test_per_sample_gradients() -> None:
    net, x = build("cnn")
    labels = torch.tensor([0, 1])
    parameters = {key: value.detach() for key, value in net.named_parameters()}

    def loss(p: Any, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(chainrule.functional_call(net, p, (image[None],)), label[None])

    found = chainrule.vmap(chainrule.grad(loss), in_dims=(None, 0, 0))(parameters, x, labels)
    for number in range(2):
        one = torch.autograd.grad(F.cross_entropy(net(x[number : number + 1]), labels[number : number + 1]), list(net.parameters()))
        for key, expected in zip(parameters, one, strict=True):
            torch.testing.assert_close(found[key][number], expected)


def test_an_ensemble() -> None:
    nets = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double() for _ in range(3)]
    parameters, buffers = chainrule.stack_module_state(nets)
    x = r(5, 3)
    found = chainrule.vmap(lambda p, b: chainrule.functional_call(nets[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([net(x) for net in nets]))
    found.sum().backward()
    assert all(p.grad is not None for p in parameters.values())


def test_embedding_and_dropout() -> None:
    table, index = nn.Embedding(5, 3).double(), torch.tensor([[0, 2], [2, 4]])
    found = chainrule.jacfwd(lambda w: chainrule.functional_call(table, {"weight": w}, (index,)))(table.weight.detach())
    expected = torch.func.jacrev(lambda w: F.embedding(index, w))(table.weight.detach())
    torch.testing.assert_close(found, expected)
    x = r(50)
    for transform in (chainrule.jacrev, chainrule.jacfwd):
        torch.manual_seed(3)
        jacobian = transform(lambda a: F.dropout(a, 0.5))(x)
        torch.manual_seed(3)
        torch.testing.assert_close(jacobian.diagonal() * x, F.dropout(x, 0.5))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind: Any) -> None:
    layer, x = kind(3, 2, num_layers=2, batch_first=True).double(), r(2, 4, 3)
    reverse = chainrule.jacrev(lambda a: layer(a)[0])(x)
    torch.testing.assert_close(chainrule.jacfwd(lambda a: layer(a)[0])(x), reverse)
    v = torch.randn_like(x)
    torch.testing.assert_close((reverse * v).sum((-3, -2, -1)), difference(lambda a: layer(a)[0], x, v), rtol=1e-6, atol=1e-6)


LSTM_OPTIONS: list[dict[str, Any]] = [
    {}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "batch_first": True}, {"proj_size": 2},
    {"num_layers": 2, "dropout": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("options", LSTM_OPTIONS)
def test_lstm_without_graphs(options: dict[str, Any]) -> None:
    """A layer in whose place torch has one kernel, where nothing requires grad."""
    layer = nn.LSTM(3, 4, **options).double().eval().requires_grad_(False)
    directions = 1 + layer.bidirectional

    def loss(x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        out, (hidden, cell) = layer(x, (h, c))
        return out.sin().sum() + (hidden * hidden).sum() + cell.exp().sum()

    for _ in range(4):
        x, c = r(2, 2, 3), r(layer.num_layers * directions, 2, 4)
        h = r(layer.num_layers * directions, 2, layer.proj_size or 4)
        (x2, h2, c2) = (t.clone().requires_grad_() for t in (x, h, c))
        expected = torch.autograd.grad(loss(x2, h2, c2), (x2, h2, c2))
        torch.testing.assert_close(chainrule.grad(loss, (0, 1, 2))(x, h, c), expected)
        along = sum((t * g).sum() for t, g in zip((x, h, c), expected, strict=True))
        torch.testing.assert_close(chainrule.jvp(loss, (x, h, c), (x, h, c))[1], along)
        if not layer.proj_size:
            found = chainrule.vmap(chainrule.grad(loss, (0, 1, 2)))(*(torch.stack([t, 2 * t]) for t in (x, h, c)))
            torch.testing.assert_close([t[0] for t in found], list(expected))


def test_attention() -> None:
    layer, x = nn.MultiheadAttention(4, 2, batch_first=True).double(), r(1, 3, 4)
    for weights in (True, False):
        reverse = chainrule.jacrev(lambda a, w=weights: layer(a, a, a, need_weights=w)[0])(x)
        torch.testing.assert_close(reverse, torch.func.jacrev(lambda a, w=weights: layer(a, a, a, need_weights=w)[0])(x))
        torch.testing.assert_close(chainrule.jacfwd(lambda a, w=weights: layer(a, a, a, need_weights=w)[0])(x), reverse)


FORWARD: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, ...]]] = {
    "sdpa": (lambda q: F.scaled_dot_product_attention(q, 2 * q, q.sin()), (1, 2, 3, 4)),
    "sdpa causal": (lambda q: F.scaled_dot_product_attention(q, 2 * q, q, is_causal=True), (1, 2, 3, 4)),
    "cdist": (lambda x: torch.cdist(x, x[:2] + 1), (3, 2)),
    "grid sample": (lambda g: F.grid_sample(image(), g.tanh(), align_corners=False), (1, 2, 2, 2)),
    "ctc": (lambda x: F.ctc_loss(x.log_softmax(-1), torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2])), (4, 1, 4)),
    "embedding bag": (lambda w: F.embedding_bag(torch.tensor([[0, 1], [1, 2]]), w, mode="mean"), (3, 2)),
    "layer norm": (lambda x: F.layer_norm(x, (4,)), (2, 4)),
}


def image() -> torch.Tensor:
    return torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(1, 1, 4, 4).cos()


@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode_where_torch_has_none(name: str) -> None:
    function, shape = FORWARD[name]
    x = r(*shape)
    # torch.func.jacrev of cdist is wrong where both arguments depend on the input: the norm written out is the oracle.
    written = (lambda a: (a[:, None] - (a[:2] + 1)[None]).square().sum(-1).sqrt()) if name == "cdist" else function
    reverse = torch.autograd.functional.jacobian(written, x)
    torch.testing.assert_close(chainrule.jacrev(function)(x), reverse)
    torch.testing.assert_close(chainrule.jacfwd(function)(x), reverse)
    v = torch.randn_like(x)
    torch.testing.assert_close(chainrule.jvp(function, (x,), (v,))[1], difference(function, x, v), rtol=1e-6, atol=1e-6)


def test_functionalize_and_functional_call_errors() -> None:
    def writes(a: torch.Tensor) -> torch.Tensor:
        a.add_(1)
        return a * 2

    x = r(3)
    before = x.clone()
    torch.testing.assert_close(chainrule.functionalize(writes)(x), (before + 1) * 2)
    torch.testing.assert_close(x, before + 1)
    with pytest.raises(RuntimeError, match="remove"):
        chainrule.functionalize(writes, remove="all")
    net = nn.Linear(2, 1)
    with pytest.raises(RuntimeError, match="Missing|missing"):
        chainrule.functional_call(net, {"weight": torch.ones(1, 2)}, torch.ones(2), strict=True)
    with pytest.raises(ValueError, match="several"):
        chainrule.functional_call(net, ({"bias": torch.ones(1)}, {"bias": torch.ones(1)}), torch.ones(2))
    with pytest.raises(TypeError):
        chainrule.functional_call(net, 3, torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="at least one"):
        chainrule.stack_module_state([])


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("masked", ["none", "padding", "causal"])
def test_torchs_inference_kernels_are_differentiated(norm_first: bool, masked: str) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.0, norm_first=norm_first, activation="gelu")
    layer = layer.double().eval().requires_grad_(False)
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double().eval().requires_grad_(False)
    x = r(2, 3, 4)
    padding = torch.tensor([[False, False, True], [False, False, False]]) if masked == "padding" else None
    causal = torch.triu(torch.ones(3, 3, dtype=torch.bool), 1) if masked == "causal" else None
    calls: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda a: layer(a, src_mask=causal, src_key_padding_mask=padding),
        lambda a: attention(a, a, a, attn_mask=causal, key_padding_mask=padding, need_weights=False)[0],
    ]
    v = torch.randn_like(x)
    for call in calls:
        found = chainrule.jacrev(call)(x)
        torch.testing.assert_close((found * v).sum((-3, -2, -1)), difference(call, x, v), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(chainrule.jacfwd(call)(x), found)
