"""Functions with sparse derivatives, for the tests of sparse layouts: ``name: (function, input)``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

GENERATOR = torch.Generator().manual_seed(0)


def numbers(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=GENERATOR)


def integers(high, *shape):
    return torch.randint(0, high, shape, generator=GENERATOR)


SOURCE, TARGET = integers(6, 13), integers(6, 13)
WEIGHT = numbers(13).abs()
COUPLING = numbers(3, 3)
KERNEL1, KERNEL2, KERNEL3 = numbers(2, 1, 3), numbers(2, 1, 3, 3), numbers(1, 1, 2, 2, 2)
DENSE = numbers(4, 6)


def periodic(u):
    return sum(u.roll(s, d) for d in range(u.dim()) for s in (1, -1)) - 2 * u.dim() * u


def clamped(u):
    """A stencil with values of zero outside, by padding."""
    total = -2 * u.dim() * u
    for d in range(u.dim()):
        pads = [0, 0] * (u.dim() - 1 - d) + [1, 1]
        wide = F.pad(u, pads)
        total = total + wide.narrow(d, 0, u.shape[d]) + wide.narrow(d, 2, u.shape[d])
    return total


def concatenated(u):
    """A periodic stencil along the first dimension, by slices."""
    return torch.cat([u[-1:], u[:-1]]) + torch.cat([u[1:], u[:1]]) - 2 * u


def upwind(u):
    """Transport with a velocity of either sign."""
    velocity = u.sin()
    return torch.where(velocity > 0, velocity * (u - u.roll(1, 0)), velocity * (u.roll(-1, 0) - u))


def brusselator(x):
    u, v = x[0], x[1]
    product = u * u * v
    return torch.stack([1 + product - 4.4 * u + periodic(u), 3.4 * u - product + periodic(v)])


def block_coupled(x):
    """Three fields, coupled at each place by a matrix."""
    return (COUPLING @ x.tanh()) * x + periodic(x[0]) * x


def graph(x):
    """A nonlinear Laplacian of a graph."""
    return torch.zeros_like(x).index_add(0, TARGET, WEIGHT.reshape(-1, *(1,) * (x.dim() - 1)) * (x[SOURCE] - x[TARGET]).tanh())


def written(x):
    y = x.clone()
    y[1:-1] = x[2:] * x[:-2]
    y[0] = x[0] ** 3
    return y


def recurrence(x):
    """Each value from the two before it, for some steps."""
    for _ in range(3):
        x = torch.cat([x[:2], 0.5 * x[2:] + x[1:-1].sin() * x[:-2]])
    return x


def runge_kutta(x):
    step = lambda y: 0.1 * brusselator(y)  # noqa: E731
    k1 = step(x)
    k2 = step(x + k1 / 2)
    return x + k2


def repeated(x, function=periodic, count=4):
    for _ in range(count):
        x = x + 0.1 * function(x).tanh()
    return x


def tridiagonal(x):
    return x[:-2] * x[1:-1] + x[1:-1] ** 2 * x[2:]


def columns(x):
    """By hand, a column at a time."""
    a, b, c = x.unbind(1)
    return torch.stack([a * b, b * c.exp(), c * a.roll(1), a + 1], 1)


JACOBIANS = {
    "identity": (lambda x: x * 1.0, numbers(5)),
    "pointwise": (lambda x: x.sin() * x, numbers(4, 3)),
    "scalar": (lambda x: x.exp(), numbers()),
    "sum": (lambda x: x.sum(), numbers(3, 2)),
    "empty": (lambda x: x.sin(), numbers(0)),
    "empty rows": (lambda x: x[:, :0], numbers(3, 2)),
    "one": (lambda x: x**2, numbers(1, 1)),
    "constant": (lambda x: torch.ones(3, dtype=x.dtype) + 0 * x.detach().sum(), numbers(4)),
    "nowhere": (lambda x: x.sign() + x.floor(), numbers(4)),
    "periodic 1-D": (periodic, numbers(8)),
    "periodic 2-D": (periodic, numbers(5, 6)),
    "periodic 3-D": (periodic, numbers(3, 4, 3)),
    "periodic of size two": (periodic, numbers(2, 2)),
    "clamped 1-D": (clamped, numbers(7)),
    "clamped 2-D": (clamped, numbers(4, 5)),
    "clamped 3-D": (clamped, numbers(3, 2, 4)),
    "concatenated": (concatenated, numbers(6, 3)),
    "upwind": (upwind, numbers(9)),
    "upwind 2-D": (upwind, numbers(5, 4)),
    "brusselator": (brusselator, numbers(2, 5, 4)),
    "block coupled": (block_coupled, numbers(3, 7)),
    "graph": (graph, numbers(6)),
    "graph of vectors": (graph, numbers(6, 3)),
    "graph twice": (lambda x: graph(graph(x)), numbers(6)),
    "graph and stencil": (lambda x: periodic(graph(x).sin()), numbers(6)),
    "scattered": (lambda x: torch.zeros(6, dtype=x.dtype).index_add(0, TARGET, x[SOURCE] ** 2), numbers(6)),
    "scatter_add": (lambda x: torch.zeros(6, dtype=x.dtype).scatter_add(0, TARGET, x.sin()), numbers(13)),
    "gather": (lambda x: x.gather(1, TARGET[:9].reshape(3, 3) % 4) ** 2, numbers(3, 4)),
    "take": (lambda x: x.take(SOURCE.reshape(13, 1)), numbers(2, 4)),
    "index two": (lambda x: x[SOURCE % 4, TARGET % 5] ** 2, numbers(4, 5)),
    "index_put": (lambda x: torch.zeros(6, dtype=x.dtype).index_put((TARGET,), x[SOURCE % 6], accumulate=True), numbers(6)),
    "index_select": (lambda x: x.index_select(1, TARGET).sin(), numbers(2, 6)),
    "embedding": (lambda x: F.embedding(TARGET, x), numbers(6, 2)),
    "written": (written, numbers(7)),
    "recurrence": (recurrence, numbers(9)),
    "runge kutta": (runge_kutta, numbers(2, 4, 5)),
    "repeated stencil": (repeated, numbers(12, 11)),
    "repeated graph": (lambda x: repeated(x, graph, 5), numbers(6)),
    "tridiagonal": (tridiagonal, numbers(9)),
    "columns": (columns, numbers(5, 3)),
    "slice": (lambda x: x[1:] * x[:-1], numbers(6, 2)),
    "strided": (lambda x: x[::2] * x[1::2].exp(), numbers(8)),
    "slice of slice": (lambda x: x[1:][::2][1:], numbers(9)),
    "flip": (lambda x: x.flip(0) * x, numbers(5, 2)),
    "transpose": (lambda x: x.t() * x, numbers(4, 4)),
    "reshape": (lambda x: x.reshape(3, 4).roll(1, 0).reshape(-1), numbers(12)),
    "crossing reshape": (lambda x: x.reshape(4, 3)[:, 1:].reshape(2, 4).sin(), numbers(3, 4)),
    "flat roll": (lambda x: x.roll(1) * x, numbers(3, 4)),
    "diagonal": (lambda x: x.diagonal() ** 2, numbers(4, 4)),
    "diag_embed": (lambda x: torch.diag_embed(x.sin()), numbers(4)),
    "tril": (lambda x: x.tril() * 2, numbers(4, 4)),
    "unfold": (lambda x: x.unfold(0, 3, 1).prod(-1), numbers(8)),
    "expand": (lambda x: x[:, None].expand(3, 4) * x[:, None], numbers(3)),
    "repeat": (lambda x: x.repeat(2, 3), numbers(2, 2)),
    "pad reflect": (lambda x: F.pad(x[None], (2, 1), mode="reflect")[0], numbers(2, 5)),
    "pad circular": (lambda x: F.pad(x[None], (2, 1), mode="circular")[0] ** 2, numbers(2, 5)),
    "pad replicate": (lambda x: F.pad(x[None], (2, 1), mode="replicate")[0], numbers(2, 5)),
    "conv1d": (lambda x: F.conv1d(x[None, None], KERNEL1, padding=1).tanh(), numbers(7)),
    "conv2d": (lambda x: F.conv2d(x[None, None], KERNEL2, stride=2, padding=1), numbers(5, 6)),
    "conv3d": (lambda x: F.conv3d(x[None, None], KERNEL3), numbers(3, 4, 3)),
    "conv_transpose": (lambda x: F.conv_transpose1d(x[None], KERNEL1, stride=2), numbers(2, 5)),
    "conv of conv": (lambda x: F.conv2d(F.conv2d(x[None, None], KERNEL2, padding=1).tanh(), KERNEL2.transpose(0, 1), padding=1), numbers(5, 4)),
    "avg_pool": (lambda x: F.avg_pool2d(x[None], 3, 2, 1, count_include_pad=False), numbers(2, 6, 5)),
    "avg_pool ceil": (lambda x: F.avg_pool1d(x[None], 3, 2, ceil_mode=True), numbers(2, 8)),
    "max_pool": (lambda x: F.max_pool2d(x[None], 2), numbers(2, 4, 6)),
    "max": (lambda x: x.max(1).values, numbers(4, 5)),
    "sort": (lambda x: x.sort(0).values ** 2, numbers(5, 3)),
    "topk": (lambda x: x.topk(2).values, numbers(3, 5)),
    "cumsum": (lambda x: x.cumsum(0), numbers(4, 2)),
    "relu": (lambda x: (x - x.roll(1)).relu(), numbers(8)),
    "masked_fill": (lambda x: x.masked_fill(WEIGHT[:6] > 0.5, 0.0) * x, numbers(6)),
    "masked_select": (lambda x: x[WEIGHT[:6] > 0.5] ** 2, numbers(6)),
    "rows": (lambda x: x.softmax(1), numbers(3, 4)),
    "norms": (lambda x: x.norm(dim=1), numbers(4, 3)),
    "row products": (lambda x: x @ x[0], numbers(4, 3)),
    "dense": (lambda x: (DENSE @ x).sin(), numbers(6)),
    "dense of sparse": (lambda x: DENSE @ periodic(x.sin()), numbers(6)),
    "batched product": (lambda x: torch.bmm(x, x.transpose(1, 2)), numbers(3, 2, 2)),
    "cross": (lambda x: torch.linalg.cross(x, x.roll(1, 0)), numbers(4, 3)),
    "inverse blocks": (lambda x: torch.linalg.inv(x + 3 * torch.eye(2, dtype=x.dtype)), numbers(3, 2, 2)),
    "not contiguous": (lambda x: x.sin() + x.roll(1, 1), numbers(4, 6).t()),
    "expanded input": (lambda x: x * x.roll(1, 0), numbers(4, 1).expand(4, 3)),
}

#: Functions that only move elements: the pattern is that of the non-zeros exactly.
INDEX_ONLY = (
    "identity", "gather", "take", "index_select", "embedding", "slice of slice", "reshape", "repeat", "pad reflect",
    "pad replicate", "scatter_add", "diag_embed", "max", "max_pool", "sort", "topk", "periodic of size two", "cumsum",
)  # fmt: skip

HESSIANS = {
    "rosenbrock": (lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum(), numbers(9)),
    "cubes": (lambda x: (x**3).sum(), numbers(3, 2)),
    "p-Laplacian": (lambda x: sum(((x.roll(1, d) - x) ** 4).sum() for d in range(2)), numbers(4, 5)),
    "graph energy": (lambda x: (WEIGHT * (x[SOURCE] - x[TARGET]) ** 4).sum(), numbers(6)),
    "rows": (lambda x: x.logsumexp(1).sum(), numbers(4, 3)),
    "where": (lambda x: torch.where(x > 0, x**3, x.sin()).sum(), numbers(7)),
    "written": (lambda x: (written(x) ** 2).sum(), numbers(6)),
    "linear": (lambda x: (x * WEIGHT[:5]).sum(), numbers(5)),
    "scalar": (lambda x: x**3, numbers()),
    "empty": (lambda x: (x**2).sum(), numbers(0)),
    "vector": (lambda x: x.sin(), numbers(5)),
    "vector of stencils": (lambda x: periodic(x**2) * x, numbers(6)),
    "graph of graph": (lambda x: (graph(x) ** 2).sum(), numbers(6)),
    "convolution": (lambda x: (F.conv1d(x[None, None], KERNEL1).tanh() ** 2).sum(), numbers(6)),
    "sorted": (lambda x: (x.sort().values ** 3 * WEIGHT[:6]).sum(), numbers(6)),
    "action": (lambda x: (x[1:] * x[:-1].exp()).sum() + (brusselator(x.reshape(2, 2, 3)) ** 2).sum(), numbers(12)),
    "dense": (lambda x: (DENSE @ x).pow(4).sum(), numbers(6)),
}
