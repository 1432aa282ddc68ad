"""Replayed calls on mapped tensors with a graph: the results join the graph of closed-over parameters as in torch.func."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import chainrule
from chainrule.batching.mode import VmapMode
from chainrule.execute import mapped_calls
from chainrule.execute.mapped_calls import CALLS, Replay

Tensor = torch.Tensor
CALLS_UNTIL_REPLAYED = mapped_calls._UNRECORDED + 1
INDEX = torch.tensor([2, 0, 1])


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    """Each test begins without known calls, in double precision; what is known is not lost."""
    before = dict(CALLS.known)
    CALLS.known.clear()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(3)
    yield
    torch.set_default_dtype(torch.float32)
    CALLS.known.clear()
    CALLS.known.update(before)


def replays() -> int:
    return sum(isinstance(found, Replay) and found.run is not None for found in CALLS.known.values())


#: Functions of a matrix (3, 4) that has a graph, of a weight (5, 4), a bias (5,) and a vector (4,) that have one, too.
FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "stack": lambda x, w, b, v: torch.stack([x, x * v], -1),
    "cat": lambda x, w, b, v: torch.cat([x, w, x[:1]], 0),
    "index": lambda x, w, b, v: x[INDEX] + w[1:4][INDEX],
    "slices": lambda x, w, b, v: x[1:, ::2] + x[:-1, [0, 2]],
    "where": lambda x, w, b, v: torch.where(x > 0, x, v),
    "linear": lambda x, w, b, v: F.linear(x, w, b),
    "linear of a vector": lambda x, w, b, v: F.linear(x[0], w, b),
    "linear of mapped": lambda x, w, b, v: F.linear(x, x[:2], x[0, :2]),
    "bilinear": lambda x, w, b, v: F.bilinear(x, x, w[:, :, None] * w[:, None, :], b),
    "matmul": lambda x, w, b, v: x @ x.mT @ x,
    "einsum": lambda x, w, b, v: torch.einsum("ij,kj->ik", x, w),
    "softmax": lambda x, w, b, v: (x * v).softmax(-1),
    "logsumexp": lambda x, w, b, v: x.logsumexp(-1),
    "norm": lambda x, w, b, v: torch.linalg.vector_norm(x, dim=-1),
    "layer norm": lambda x, w, b, v: F.layer_norm(x, (4,), v, w[0]),
    "group norm": lambda x, w, b, v: F.group_norm(x.reshape(1, 4, 3), 2, v, w[0]),
    "batch norm": lambda x, w, b, v: F.batch_norm(x, None, None, v, w[0], training=True),
    "convolution": lambda x, w, b, v: F.conv1d(x[None], w[:, :3, None] * v[:3], b, padding=1),
    "transposed": lambda x, w, b, v: F.conv_transpose1d(x[None], w[:3, :, None].expand(3, 4, 2), v),
    "sorted": lambda x, w, b, v: torch.stack(x.sort(dim=-1, descending=True).values.unbind(-1)),
    "reduction": lambda x, w, b, v: x.sum(dim=-1, keepdim=True) * x.amax(0),
    "sizes": lambda x, w, b, v: x.reshape(2, -1)[:, :6].expand(3, 2, 6).permute(2, 0, 1),
    "solve": lambda x, w, b, v: torch.linalg.solve(x @ x.mT + torch.eye(3), x),
    "diagonal": lambda x, w, b, v: torch.diag(x[0]),
    "pad": lambda x, w, b, v: F.pad(x, (1, 2), value=3.0),
    "cross entropy": lambda x, w, b, v: F.cross_entropy(x, INDEX, label_smoothing=0.1),
    "losses": lambda x, w, b, v: F.huber_loss(x, w[:3]) + F.binary_cross_entropy_with_logits(x, w[:3].sigmoid()),
    "embedding": lambda x, w, b, v: F.embedding(INDEX, w * v) * x,
    "padded embedding": lambda x, w, b, v: F.embedding(INDEX, (w[:3] * x)[:, :2], padding_idx=0),
    "detached": lambda x, w, b, v: x * (x * v).detach() + w[0],
    "similarity": lambda x, w, b, v: F.cosine_similarity(x, w[:3], dim=-1),
    "attention": lambda x, w, b, v: F.scaled_dot_product_attention(x[None, None], w[None, None], w[None, None]),
    "pooling": lambda x, w, b, v: F.max_pool1d(x[None], 2) + F.avg_pool1d(x[None], 2),
    "written": lambda x, w, b, v: (x * 1.0).mul_(v).add_(w[0]),
    "written through a view": lambda x, w, b, v: (lambda y: (y[1:].mul_(v), y)[1])(x * 1.0),
    "set": lambda x, w, b, v: (lambda y: (y.__setitem__(0, v), y)[1])(x * 1.0),
    "parts of a parameter": lambda x, w, b, v: x * w.chunk(2)[0] + w.t()[:, 0] * w.split(2)[1][:1],
    "nothing dropped": lambda x, w, b, v: F.dropout(x, 0.5, training=False) * v,
    "chosen numbers": lambda x, w, b, v: x.clamp(-0.5, 0.5) * x.abs() ** 1.5 - x.cumsum(0),
}


def parameters() -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in ((5, 4), (5,), (4,), (3, 4))]


def gradients(out: Tensor, leaves: list[Tensor], seed: Tensor) -> list[Tensor]:
    found = torch.autograd.grad((out.sin() * seed).sum(), leaves, allow_unused=True, materialize_grads=True)
    return [*found]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("python", [False, True])
def test_values_and_gradients(name: str, python: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if python:
        monkeypatch.setattr(VmapMode, "__torch_function__", VmapMode.take_function)
    function = FUNCTIONS[name]
    for call in range(CALLS_UNTIL_REPLAYED + 2):
        leaves = parameters()
        x = torch.randn(6, 3, 4)
        w, b, v, s = leaves

        def mapped(sample: Tensor, w: Tensor = w, b: Tensor = b, v: Tensor = v, s: Tensor = s) -> Tensor:
            return function(sample * s + s, w, b, v)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.func's loops
            expected = torch.func.vmap(mapped)(x)
        found = chainrule.vmap(mapped)(x)
        # Sums in another order: a few roundings of numbers of order one.
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        assert found.requires_grad == expected.requires_grad
        seed = torch.randn_like(expected)
        slopes = zip(gradients(found, leaves, seed), gradients(expected, leaves, seed), strict=True)
        for slope, other in slopes:
            torch.testing.assert_close(slope, other, rtol=1e-9, atol=1e-10, msg=f"{name}, call {call}")


@pytest.mark.parametrize("name", ["linear", "layer norm", "stack", "cat", "index", "softmax", "cross entropy", "sizes", "where", "pad"])
def test_derivatives_under_vmap(name: str) -> None:
    function = FUNCTIONS[name]
    for _ in range(CALLS_UNTIL_REPLAYED + 2):
        leaves = parameters()
        x = torch.randn(6, 3, 4)
        w, b, v, s = leaves

        def loss(sample: Tensor, w: Tensor = w, b: Tensor = b, v: Tensor = v, s: Tensor = s) -> Tensor:
            return function(sample * s + s, w, b, v).square().sum()

        for transform in ("grad", "jacfwd") if name != "layer norm" else ("grad",):
            expected = torch.func.vmap(getattr(torch.func, transform)(loss))(x)
            found = chainrule.vmap(getattr(chainrule, transform)(loss))(x)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
            seed = torch.randn_like(expected)
            for slope, other in zip(gradients(found, leaves, seed), gradients(expected, leaves, seed), strict=True):
                torch.testing.assert_close(slope, other, rtol=1e-8, atol=1e-9)


def test_a_parameter_in_and_out_of_the_graph() -> None:
    weight = torch.randn(5, 4)
    x = torch.randn(6, 3, 4)
    mapped = chainrule.vmap(lambda s: F.pad(F.linear(s, weight), (1, 1)))
    for _ in range(2 * CALLS_UNTIL_REPLAYED + 2):
        weight.requires_grad_(not weight.requires_grad)
        found = mapped(x)
        assert found.requires_grad is weight.requires_grad
        if weight.requires_grad:
            (slope,) = torch.autograd.grad(found.sum(), weight)
            torch.testing.assert_close(slope, x.sum((0, 1)).expand(5, 4))
        with torch.no_grad():
            assert not mapped(x).requires_grad
    assert replays()


def test_random_numbers_are_drawn_once() -> None:
    """Recording a call leaves the generator alone."""
    weight = torch.randn(4, requires_grad=True)
    x = torch.ones(6, 4)
    mapped = chainrule.vmap(lambda s: F.dropout(s * weight, 0.5, training=True), randomness="different")
    found = []
    for _ in range(CALLS_UNTIL_REPLAYED + 2):
        torch.manual_seed(5)
        found.append(torch.cat([mapped(x), mapped(x)]))
    assert all(torch.equal(item, found[0]) for item in found)


def test_statistics_are_updated_once() -> None:
    norm = nn.BatchNorm1d(4)
    other = nn.BatchNorm1d(4)
    x = torch.randn(5, 8, 4)
    for _ in range(CALLS_UNTIL_REPLAYED + 2):
        scale = torch.ones(4, requires_grad=True)
        torch.testing.assert_close(chainrule.vmap(lambda s: F.linear(s * scale, norm.weight.diag()), in_dims=0)(x), x)
        torch.testing.assert_close(norm(x[0] * scale), other(x[0]))
        torch.testing.assert_close(norm.running_mean, other.running_mean)


def test_large_tensors_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_calls, "_LARGEST_COPY", 100)
    weight = torch.randn(5, 4, requires_grad=True)
    for _ in range(CALLS_UNTIL_REPLAYED + 2):
        x = torch.randn(6, 3, 4)
        torch.testing.assert_close(chainrule.vmap(lambda s: F.pad(s * weight[0], (1, 1)))(x), F.pad(x * weight[0], (1, 1)))
    assert not replays()


def test_modules_train() -> None:
    """Steps of a mapped module, its parameters changing in place."""

    def train(library: Any) -> Tensor:
        torch.manual_seed(0)
        net = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        for _ in range(CALLS_UNTIL_REPLAYED + 4):
            optimizer.zero_grad()
            library.vmap(net)(torch.randn(6, 3, 4)).square().mean().backward()
            optimizer.step()
        return torch.cat([parameter.detach().reshape(-1) for parameter in net.parameters()])

    torch.testing.assert_close(train(chainrule), train(torch.func), rtol=1e-9, atol=1e-10)
