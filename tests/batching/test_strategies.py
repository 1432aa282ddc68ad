"""Every family of batching strategy against a loop over the samples, mapped and unmapped, plain and nested."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

import chainrule
from chainrule.batching.mode import VmapMode
from chainrule.transforms.vmap import vmap

Function = Callable[..., Any]
BATCH, OUTER = 3, 2

# name -> (function, shapes of one sample). "+" marks a positive argument, "s" a symmetric positive definite one,
# and an int after "i" an integer argument below that bound.
POINTWISE: dict[str, tuple[Function, list[Any]]] = {
    "sin": (torch.sin, [(4,)]),
    "add_ranks": (torch.add, [(3, 4), (4,)]),
    "mul_scalar_first": (torch.mul, [(), (2, 3)]),
    "sub_alpha": (lambda a, b: torch.sub(a, b, alpha=2), [(2, 3), (3,)]),
    "pow": (torch.pow, [("+", 3), (2, 1)]),
    "where": (lambda a, b: torch.where(a > 0, a, b), [(2, 3), (3,)]),
    "clamp": (lambda a, b: torch.clamp(a, min=b), [(4,), ()]),
    "lerp": (torch.lerp, [(3,), (2, 3), ()]),
    "addcmul": (lambda a, b, c: torch.addcmul(a, b, c, value=0.5), [(3,), (2, 1), (2, 3)]),
    "masked_fill": (lambda a, b: a.masked_fill(a > 0, b), [(2, 3), ()]),
    "gelu": (F.gelu, [(5,)]),
    "cast": (lambda a: a.to(torch.float32) * 2, [(2, 2)]),
    "to_int": (lambda a: (a * 10).long(), [(3,)]),
    "complex": (
        lambda a, b: torch.complex(a, b).conj().abs() * torch.view_as_real(torch.complex(a, b)).sum(),
        [(3,), (3,)],
    ),
    "empty": (lambda a, b: a * b, [(0, 3), (3,)]),
    "huber": (lambda a, b: F.huber_loss(a, b), [(3, 2), (3, 2)]),
    "mse_none": (lambda a, b: F.mse_loss(a, b, reduction="none"), [(3,), (3,)]),
    "floor_divide": (lambda a, b: torch.floor_divide(a, b), [(3,), ("+", 3)]),
}
VIEWS: dict[str, tuple[Function, list[Any]]] = {
    "reshape": (lambda a: a.reshape(-1, 2), [(4, 3)]),
    "reshape_transposed": (lambda a: a.t().reshape(-1), [(4, 3)]),
    "view_dims": (lambda a: a.view(2, -1, 1), [(4, 3)]),
    "permute": (lambda a: a.permute(2, 0, 1), [(2, 3, 4)]),
    "transpose_negative": (lambda a: a.transpose(-1, 0), [(2, 3, 4)]),
    "squeeze": (lambda a: a.squeeze(), [(1, 3, 1)]),
    "squeeze_dim": (lambda a: a.squeeze(-1).squeeze(0), [(3, 1)]),
    "unsqueeze": (lambda a: a.unsqueeze(-1).unsqueeze(0), [(3,)]),
    "expand": (lambda a: a.expand(2, -1, 4), [(3, 1)]),
    "index": (lambda a: a[..., 1:, None, ::2][0], [(2, 3, 4)]),
    "select": (lambda a: a.select(-1, -1), [(2, 3)]),
    "diagonal": (lambda a: a.diagonal(1, -2, -1), [(2, 3, 4)]),
    "diag_embed": (lambda a: torch.diag_embed(a, 1), [(2, 3)]),
    "unfold": (lambda a: a.unfold(-1, 2, 1), [(2, 5)]),
    "unfold_scalar": (lambda a: a.unfold(0, 1, 1), [()]),
    "split": (lambda a: a.split([1, 2], -1), [(2, 3)]),
    "chunk": (lambda a: a.chunk(2, 0), [(5, 2)]),
    "unbind": (lambda a: a.unbind(1), [(2, 3)]),
    "cat": (lambda a, b: torch.cat([a, b], -1), [(2, 3), (2, 1)]),
    "stack": (lambda a, b: torch.stack([a, b, a], -1), [(2,), (2,)]),
    "pad": (lambda a: F.pad(a, (1, 2), value=3.0), [(2, 3)]),
    "roll": (lambda a: torch.roll(a, (1, -1), (0, 1)), [(3, 4)]),
    "roll_flat": (lambda a: torch.roll(a, 2), [(3, 4)]),
    "flip": (lambda a: a.flip(0, -1), [(3, 4)]),
    "repeat": (lambda a: a.repeat(2, 1, 3), [(2, 3)]),
    "tile": (lambda a: a.tile(2), [()]),
    "tril": (lambda a: torch.tril(a) + torch.triu(a, 1), [(2, 3, 3)]),
    "as_strided": (lambda a: a.as_strided((2, 2), (1, 2), 1), [(6,)]),
    "movedim": (lambda a: a.movedim(0, -1), [(2, 3, 4)]),
    "view_as_complex": (lambda a: torch.view_as_complex(a).imag, [(3, 2)]),
    "meshgrid": (lambda a, b: torch.meshgrid(a, b, indexing="ij"), [(2,), (3,)]),
    "repeat_interleave": (lambda a: a.repeat_interleave(2, -1), [(2, 3)]),
}
REDUCTIONS: dict[str, tuple[Function, list[Any]]] = {
    "sum": (torch.sum, [(3, 4)]),
    "sum_scalar": (lambda a: a.sum(0), [()]),
    "sum_dims": (lambda a: a.sum((-1, 0), keepdim=True), [(2, 3, 4)]),
    "sum_dtype": (lambda a: a.sum(dtype=torch.float32), [(3,)]),
    "mean": (torch.mean, [(3, 4)]),
    "prod": (lambda a: (torch.prod(a), a.prod(-1)), [(3, 2)]),
    "max": (lambda a: (a.max(), a.max(-1).values, a.min(0).indices), [(3, 4)]),
    "amax": (lambda a: (a.amax(), a.amin((0, -1))), [(3, 4)]),
    "argmax": (lambda a: (a.argmax(), a.argmin(-1, keepdim=True), a.argmax(keepdim=True)), [(3, 4)]),
    "var": (lambda a: (a.var(), a.std(0), torch.var_mean(a, (0, 1), correction=0)), [(3, 4)]),
    "norm": (lambda a: (a.norm(), a.norm(1, -1), torch.linalg.norm(a), torch.linalg.norm(a, 1)), [(3, 4)]),
    "logsumexp": (lambda a: (a.logsumexp(-1), a.logsumexp((0, 1))), [(3, 4)]),
    "any_all": (lambda a: ((a > 0).any(), (a > 0).all(-1), (a > 9).any(0)), [(3, 4)]),
    "median": (lambda a: (a.median(), a.median(-1).values, a.nanmedian()), [(3, 5)]),
    "aminmax": (lambda a: (*torch.aminmax(a), *torch.aminmax(a, dim=-1, keepdim=True)), [(3, 4)]),
    "count_nonzero": (lambda a: (a > 0).count_nonzero(), [(3, 4)]),
    "cumsum": (lambda a: (a.cumsum(-1), a.cumprod(0)), [(3, 4)]),
    "cumsum_scalar": (lambda a: a.cumsum(0), [()]),
    "logcumsumexp": (lambda a: a.logcumsumexp(0), [(3, 2)]),
    "cummax": (lambda a: torch.cummax(a, -1), [(2, 4)]),
    "sort": (lambda a: (*a.sort(-1), a.argsort(0)), [(3, 4)]),
    "topk": (lambda a: a.topk(2, dim=0), [(4, 2)]),
    "kthvalue": (lambda a: a.kthvalue(2, -1), [(2, 4)]),
    "softmax": (lambda a: (a.softmax(-1), a.log_softmax(0)), [(3, 4)]),
    "softmax_scalar": (lambda a: a.softmax(0), [()]),
    "renorm": (lambda a: a.renorm(2, 0, 0.5), [(3, 4)]),
    "trace": (torch.trace, [(3, 4)]),
    "searchsorted": (lambda a, b: torch.searchsorted(a.sort().values, b), [(5,), (2, 3)]),
    "diff": (lambda a: torch.diff(a, dim=0), [(4, 2)]),
    "trapezoid": (lambda a: torch.trapezoid(a, dx=0.5), [(2, 4)]),
    "cov": (torch.cov, [(3, 5)]),
    "quantile": (lambda a: torch.quantile(a, 0.3, dim=-1), [(2, 5)]),
}
if torch.__version__ < "2.12":  # whose autograd does not know it
    del REDUCTIONS["aminmax"]
CONTRACTIONS: dict[str, tuple[Function, list[Any]]] = {
    "mm": (torch.mm, [(2, 3), (3, 4)]),
    "mv": (torch.mv, [(2, 3), (3,)]),
    "dot": (torch.dot, [(3,), (3,)]),
    "bmm": (torch.bmm, [(2, 2, 3), (2, 3, 4)]),
    "vector_matrix": (torch.matmul, [(3,), (3, 4)]),
    "matmul_broadcast": (torch.matmul, [(2, 1, 2, 3), (5, 3, 2)]),
    "matmul_vector": (torch.matmul, [(2, 4, 3), (3,)]),
    "addmm": (lambda a, b, c: torch.addmm(a, b, c, beta=0.5, alpha=2), [(4,), (2, 3), (3, 4)]),
    "addmv": (torch.addmv, [(2,), (2, 3), (3,)]),
    "addr": (torch.addr, [(2, 3), (2,), (3,)]),
    "baddbmm": (torch.baddbmm, [(4,), (2, 2, 3), (2, 3, 4)]),
    "linear": (F.linear, [(2, 3), (4, 3), (4,)]),
    "linear_vector": (F.linear, [(3,), (4, 3), (4,)]),
    "bilinear": (F.bilinear, [(2, 3), (2, 4), (5, 3, 4)]),
    "outer": (torch.outer, [(2,), (3,)]),
    "kron": (torch.kron, [(2, 3), (2, 2)]),
    "einsum": (lambda a, b: torch.einsum("ij,kj->ik", a, b), [(2, 3), (4, 3)]),
    "einsum_trace": (lambda a: torch.einsum("ii->i", a), [(3, 3)]),
    "tensordot": (lambda a, b: torch.tensordot(a, b, dims=2), [(2, 3, 4), (3, 4, 2)]),
    "vdot_complex": (lambda a, b: torch.vdot(torch.complex(a, b), torch.complex(b, a)).abs(), [(3,), (3,)]),
    "cdist": (torch.cdist, [(2, 3), (4, 3)]),
    "cross": (torch.linalg.cross, [(2, 3), (2, 3)]),
    "solve": (torch.linalg.solve, [("s", 3), (3, 2)]),
    "solve_vector": (torch.linalg.solve, [("s", 3), (3,)]),
    "inverse": (torch.linalg.inv, [("s", 3)]),
    "cholesky": (torch.linalg.cholesky, [("s", 3)]),
    "cholesky_solve": (lambda a, b: torch.cholesky_solve(b, torch.linalg.cholesky(a)), [("s", 3), (3, 2)]),
    "det": (lambda a: (torch.linalg.det(a), torch.linalg.slogdet(a)), [("s", 3)]),
    "eigh": (torch.linalg.eigvalsh, [("s", 3)]),
    "svd": (torch.linalg.svdvals, [(3, 2)]),
    "qr": (lambda a: torch.linalg.qr(a).R.abs(), [(3, 2)]),
    "triangular_solve": (lambda a, b: torch.linalg.solve_triangular(torch.tril(a), b, upper=False), [("s", 3), (3, 2)]),
    "matrix_exp": (torch.linalg.matrix_exp, [(3, 3)]),
    "pinv": (torch.linalg.pinv, [(3, 2)]),
    "lstsq": (lambda a, b: torch.linalg.lstsq(a, b).solution, [(4, 2), (4, 3)]),
    "fft": (lambda a: torch.view_as_real(torch.fft.fft(a, dim=0)), [(4, 3)]),
    "rfft2": (lambda a: torch.fft.irfft2(torch.fft.rfft2(a)), [(2, 4, 6)]),
}
INDEXING: dict[str, tuple[Function, list[Any]]] = {
    "index": (lambda a, i: a[i], [(4, 3), ("i4", 2)]),
    "index_middle": (lambda a, i: a[:, i], [(2, 4, 3), ("i4", 2, 2)]),
    "index_two": (lambda a, i, j: a[:, i, j], [(2, 4, 3), ("i4", 2, 1), ("i3", 2)]),
    "index_apart": (lambda a, i, j: a[i, :, j], [(4, 2, 3), ("i4", 2), ("i3", 2)]),
    "index_mask": (lambda a: a[torch.tensor([True, False, True])], [(3, 2)]),
    "gather": (lambda a, i: a.gather(1, i), [(3, 4), ("i4", 3, 2)]),
    "gather_scalar": (lambda a, i: a.gather(0, i), [(3,), ("i3",)]),
    "take_along_dim": (lambda a, i: torch.take_along_dim(a, i, 0), [(3, 4), ("i3", 2, 4)]),
    "scatter": (lambda a, i, s: a.scatter(0, i, s), [(4, 3), ("i1", 1, 3), (1, 3)]),
    "scatter_add": (lambda a, i, s: a.scatter_add(-1, i, s), [(2, 3), ("i3", 2, 5), (2, 5)]),
    "scatter_reduce": (lambda a, i, s: a.scatter_reduce(0, i, s, "amax"), [(3,), ("i3", 5), (5,)]),
    "index_select": (lambda a, i: a.index_select(1, i), [(2, 4), ("i4", 3)]),
    "index_add": (lambda a, i, s: a.index_add(0, i, s, alpha=2), [(4, 2), ("i4", 3), (3, 2)]),
    "index_copy": (lambda a, s: a.index_copy(1, torch.tensor([2, 0]), s), [(2, 4), (2, 2)]),
    "index_fill": (lambda a, i: a.index_fill(0, i, 7.0), [(4, 2), ("i4", 2)]),
    "index_put": (lambda a, i, s: a.index_put((i,), s, accumulate=True), [(4, 2), ("i4", 3), (2,)]),
    "index_put_middle": (
        lambda a, s: torch.ops.aten.index_put(a, [None, torch.tensor([3, 1])], s),
        [(2, 4, 2), (2, 2, 2)],
    ),
    "take": (torch.take, [(3, 4), ("i9", 2, 2)]),
    "put": (lambda a, s: a.put(torch.tensor([1, 5]), s), [(3, 4), (2,)]),
    "embedding": (lambda w, i: F.embedding(i, w), [(5, 3), ("i5", 2, 2)]),
    "embedding_bag": (lambda w, i: F.embedding_bag(i, w, mode="sum"), [(5, 3), ("i5", 2, 2)]),
    "one_hot": (lambda i: F.one_hot(i, 5), [("i5", 3)]),
    "cross_entropy": (lambda a, t: F.cross_entropy(a, t, label_smoothing=0.1), [(4, 3), ("i3", 4)]),
    "nll_none": (lambda a, t: F.nll_loss(a, t, reduction="none"), [(4, 3), ("i3", 4)]),
    "masked_select": (lambda a: a.masked_select(torch.tensor([True, False, True])), [(2, 3)]),
    "masked_scatter": (lambda a, b: a.masked_scatter(a > 0, b), [(2, 3), (2, 3)]),
    "bucketize": (lambda a, b: torch.bucketize(a, b.sort().values), [(2, 2), (4,)]),
}
LAYERS: dict[str, tuple[Function, list[Any]]] = {
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, padding=1), [(2, 3, 6), (4, 3, 3), (4,)]),
    "conv2d": (lambda x, w: F.conv2d(x, w, stride=2), [(1, 2, 5, 5), (3, 2, 3, 3)]),
    "conv2d_groups": (lambda x, w, b: F.conv2d(x, w, b, groups=2), [(2, 4, 4, 4), (6, 2, 3, 3), (6,)]),
    "conv2d_unbatched": (lambda x, w: F.conv2d(x, w, dilation=2), [(2, 5, 5), (3, 2, 2, 2)]),
    "conv_transpose": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, groups=2),
        [(1, 4, 3, 3), (4, 3, 2, 2), (6,)],
    ),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), [(2, 3, 4, 4)]),
    "max_pool_unbatched": (lambda x: F.max_pool2d(x, 2, return_indices=True), [(3, 4, 4)]),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3, 1, 1), [(2, 3, 4, 4)]),
    "adaptive_avg_pool": (lambda x: F.adaptive_avg_pool2d(x, (2, 1)), [(2, 3, 4, 4)]),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), [(1, 2, 3, 3)]),
    "reflect": (lambda x: F.pad(x, (1, 1), mode="reflect"), [(2, 3, 4)]),
    "im2col": (lambda x: F.unfold(x, 2), [(2, 3, 4, 4)]),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), [(1, 4, 2, 2)]),
    "grid_sample": (lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False), [(1, 2, 4, 4), (1, 3, 3, 2)]),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (4,), w, b), [(2, 3, 4), (4,), (4,)]),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), [(2, 4, 3), (4,), (4,)]),
    "batch_norm_training": (lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), [(4, 3, 2), (3,), (3,)]),
    "batch_norm_eval": (lambda x, m, v: F.batch_norm(x, m, v), [(4, 3), (3,), ("+", 3)]),
    "instance_norm": (F.instance_norm, [(2, 3, 4)]),
    "attention": (lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True), [(2, 3, 4), (2, 3, 4)]),
    "attention_4d": (
        lambda q, k, m: F.scaled_dot_product_attention(q, k, k, attn_mask=m),
        [(2, 2, 3, 4), (2, 2, 5, 4), (3, 5)],
    ),
    "prelu": (F.prelu, [(2, 3), (3,)]),
    "glu": (F.glu, [(2, 4)]),
    "ctc_loss": (
        lambda x: F.ctc_loss(
            x.log_softmax(-1), torch.ones(1, 2, dtype=torch.long), torch.tensor([4]), torch.tensor([2])
        ),
        [(4, 1, 3)],
    ),
}
TABLE = {
    f"{family}/{name}": entry
    for family, entries in {
        "pointwise": POINTWISE,
        "views": VIEWS,
        "reductions": REDUCTIONS,
        "contractions": CONTRACTIONS,
        "indexing": INDEXING,
        "layers": LAYERS,
    }.items()
    for name, entry in entries.items()
}


def make(shape: Any, lead: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A fresh argument with leading dimensions `lead`."""
    kind, sizes = (shape[0], shape[1:]) if shape and isinstance(shape[0], str) else ("", shape)
    if kind.startswith("i"):
        return torch.randint(0, int(kind[1:]), (*lead, *sizes), generator=generator)
    if kind == "s":
        root = torch.randn(*lead, sizes[0], sizes[0], generator=generator, dtype=torch.float64)
        return root @ root.mT + sizes[0] * torch.eye(sizes[0], dtype=torch.float64)
    value = torch.randn((*lead, *sizes), generator=generator, dtype=torch.float64)
    return value.abs() + 0.5 if kind == "+" else value


def looped(function: Function, args: list[torch.Tensor], in_dims: tuple[int | None, ...]) -> list[torch.Tensor]:
    """What vmap means: one call per sample, stacked."""
    size = next(a.shape[d] for a, d in zip(args, in_dims, strict=True) if d is not None)
    samples = [
        tree_leaves(function(*[a if d is None else a.select(d, b).clone() for a, d in zip(args, in_dims, strict=True)]))
        for b in range(size)
    ]
    return [torch.stack(items) for items in zip(*samples, strict=True)]


def assert_same(actual: Any, expected: list[torch.Tensor]) -> None:
    """Equal up to rounding: a different order of a few dozen float64 additions."""
    leaves = tree_leaves(actual)
    assert len(leaves) == len(expected)
    for ours, wanted in zip(leaves, expected, strict=True):
        tolerance = 1e-5 if wanted.dtype == torch.float32 else 1e-9
        torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", TABLE)
def test_strategy(name: str) -> None:
    function, shapes = TABLE[name]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    for mapped in itertools.product([True, False], repeat=len(shapes)):
        if not any(mapped):
            continue
        args = [make(s, (BATCH,) if m else (), generator) for s, m in zip(shapes, mapped, strict=True)]
        in_dims = tuple(0 if m else None for m in mapped)
        assert_same(vmap(function, in_dims)(*args), looped(function, args, in_dims))


@pytest.mark.parametrize("name", TABLE)
def test_last_dimension_is_mapped(name: str) -> None:
    function, shapes = TABLE[name]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    args = [make(s, (BATCH,), generator).movedim(0, -1) for s in shapes]
    assert_same(vmap(function, -1)(*args), looped(function, args, tuple(a.dim() - 1 for a in args)))


@pytest.mark.parametrize("name", TABLE)
def test_nested(name: str) -> None:
    function, shapes = TABLE[name]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    args = [make(s, (OUTER, BATCH) if i == 0 else (BATCH,), generator) for i, s in enumerate(shapes)]
    outer = (0,) + (None,) * (len(shapes) - 1)
    expected = looped(lambda *a: looped(function, list(a), (0,) * len(a)), args, outer)
    assert_same(vmap(vmap(function), outer)(*args), expected)


@pytest.mark.parametrize("sizes", [(40, 7, 40), (40, 50, 8), (8, 50, 40), (36, 37, 50), (50, 37, 36), (3, 0, 2), (0, 3, 2), (64, 1, 64)])
@pytest.mark.parametrize("batch", [0, 1, 9])
def test_products_with_one_matrix_for_all_samples(sizes: tuple[int, int, int], batch: int) -> None:
    """Thin and wide, small and large, and in each layout: they run by different kernels."""
    n, k, m = sizes
    for flipped, on_the_left in itertools.product([False, True], repeat=2):
        shape = (k, m) if on_the_left else (n, k)
        stack = torch.randn(batch, *(shape[::-1] if flipped else shape), dtype=torch.float64)
        stack = stack.mT if flipped else stack
        shared = torch.randn(*((n, k) if on_the_left else (k, m)), dtype=torch.float64)
        function = (lambda a: shared @ a) if on_the_left else (lambda a: a @ shared)  # noqa: B023
        expected = torch.matmul(shared, stack) if on_the_left else torch.matmul(stack, shared)
        # Sums of at most 50 products.
        torch.testing.assert_close(vmap(function)(stack), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [(300, 3, 4, 5), (600, 1, 5, 8), (600, 5, 5, 1), (2, 3, 4, 5)])
def test_stacks_of_small_matrices(sizes: tuple[int, int, int, int]) -> None:
    """Where the stack is innermost in memory they are multiplied by passes over it."""
    p, n, k, m = sizes
    a = torch.randn(9, n, k, p, dtype=torch.float64).permute(0, 3, 1, 2)
    b = torch.randn(9, k, m, p, dtype=torch.float64).permute(0, 3, 1, 2)
    expected = torch.matmul(a, b)
    # Sums of at most five products.
    torch.testing.assert_close(vmap(torch.bmm)(a, b), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(vmap(torch.bmm)(a.contiguous(), b.contiguous()), expected, rtol=1e-13, atol=1e-13)


LOOPED = {"layers/ctc_loss", "indexing/masked_scatter"}


@pytest.mark.parametrize("name", TABLE)
def test_only_known_ops_run_by_a_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, shapes = TABLE[name]
    found: list[str] = []
    original = VmapMode.__init__

    def noting(self: VmapMode, *args: Any) -> None:
        original(self, *args)
        self.fallbacks = found

    monkeypatch.setattr(VmapMode, "__init__", noting)
    generator = torch.Generator().manual_seed(0)
    vmap(function)(*[make(s, (BATCH,), generator) for s in shapes])
    assert bool(found) == (name in LOOPED), found


@pytest.mark.parametrize("name", [n for n in TABLE if n.split("/")[0] in ("pointwise", "views", "contractions")])
def test_empty_batch(name: str) -> None:
    function, shapes = TABLE[name]
    generator = torch.Generator().manual_seed(0)
    one = tree_leaves(function(*[make(s, (), generator) for s in shapes]))
    results = tree_leaves(vmap(function)(*[make(s, (0,), generator) for s in shapes]))
    for result, sample in zip(results, one, strict=True):
        assert result.shape == (0, *sample.shape)
        assert result.dtype == sample.dtype


FLOATING = [
    n
    for n in TABLE
    if not any(
        w in n
        for w in (
            "to_int",
            "any_all",
            "floor_divide",
            "argmax",
            "batch_norm_eval",
            "one_hot",
            "search",
            "bucketize",
            "count",
        )
    )
]


def total(outputs: Any) -> torch.Tensor:
    """A scalar that depends on every differentiable output."""
    return sum((x * x).sum() for x in tree_leaves(outputs) if x.is_floating_point() and x.requires_grad)  # type: ignore[return-value]


@pytest.mark.parametrize("name", FLOATING)
def test_gradient_outside(name: str) -> None:
    function, shapes = TABLE[name]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    args = [make(s, (BATCH,) if i == 0 else (), generator) for i, s in enumerate(shapes)]
    for a in args:
        if a.is_floating_point():
            a.requires_grad_()
    wanted = [a for a in args if a.requires_grad]
    in_dims = (0,) + (None,) * (len(args) - 1)
    expected = torch.autograd.grad(total(looped(function, args, in_dims)), wanted, allow_unused=True)
    actual = torch.autograd.grad(total(vmap(function, in_dims)(*args)), wanted, allow_unused=True)
    for ours, right in zip(actual, expected, strict=True):
        if right is not None:
            tolerance = 1e-4 if name == "pointwise/cast" else 1e-7
            torch.testing.assert_close(ours, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FLOATING)
def test_gradient_inside(name: str) -> None:
    function, shapes = TABLE[name]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    args = [make(s, (BATCH,), generator) for s in shapes]

    def gradient(*values: torch.Tensor) -> Any:
        leaves = [v.detach().requires_grad_() if v.is_floating_point() else v for v in values]
        wanted = [v for v in leaves if v.is_floating_point()]
        return torch.autograd.grad(total(function(*leaves)), wanted, allow_unused=True, materialize_grads=True)

    expected = looped(gradient, args, (0,) * len(args))
    tolerance = 1e-4 if name == "pointwise/cast" else 1e-7
    for ours, right in zip(vmap(gradient)(*args), expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(2, 4, 3), (1, 4, 3, 2), (2, 4, 3, 2, 2)])
def test_channel_shuffle_of_any_rank(shape: tuple[int, ...]) -> None:
    """The channels come second in a sample of any rank."""
    x = torch.randn(3, *shape)
    expected = torch.stack([torch.nn.functional.channel_shuffle(sample, 2) for sample in x])
    torch.testing.assert_close(chainrule.vmap(lambda s: torch.nn.functional.channel_shuffle(s, 2))(x), expected)


@pytest.mark.parametrize("include_self", [True, False])
def test_derivative_of_a_scattered_product(include_self: bool) -> None:
    """Torch's own formula asks for a number in Python; this one can be batched."""
    x, source = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    index = torch.tensor([0, 1, 1, 0])

    def total(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return x.scatter_reduce(0, index, source, "prod", include_self=include_self).sin().sum()

    expected = torch.stack([torch.func.grad(total, 1)(x[k], source[k]) for k in range(2)])
    torch.testing.assert_close(chainrule.vmap(chainrule.grad(total, 1))(x, source), expected)


@pytest.mark.parametrize(
    "index",
    [
        lambda i: i,
        lambda i: (i, slice(None)),
        lambda i: (slice(0, 2), i),
        lambda i: (Ellipsis, i),
        lambda i: (None, i, 1),
        lambda i: (1, None, i, slice(1, None)),
        lambda i: (slice(None), 0, i),
    ],
)
def test_mapped_integers_as_index(index):
    x, positions = torch.randn(4, 3, 3, 3), torch.tensor([0, 2, -1, 1])

    def read(x, i):
        return x[index(i)]

    def written(x, i):
        y = x.clone()
        y[index(i)] = x.sum()
        return y * x

    def filled(x, i):
        y = x.clone()
        y[index(i)] = 2.5
        return y

    for function in (read, written, filled):
        expected = torch.stack([function(a, int(i)) for a, i in zip(x, positions, strict=True)])
        torch.testing.assert_close(chainrule.vmap(function)(x, positions), expected)
    found = chainrule.vmap(chainrule.jacrev(lambda x, i: (x[index(i)] ** 2).sum()))(x, positions)
    expected = torch.stack([chainrule.jacrev(lambda a: (a[index(int(i))] ** 2).sum())(a) for a, i in zip(x, positions, strict=True)])  # noqa: B023
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo])
def test_products_with_a_constant_sparse_matrix(layout):
    dense = torch.randn(5, 8, dtype=torch.float64).relu()
    matrix = dense.to_sparse(layout=layout)
    columns, rows = torch.randn(3, 8, 2, dtype=torch.float64), torch.randn(3, 40, 5, dtype=torch.float64)
    for product, plain, x in (
        (lambda x: matrix @ x, lambda x: dense @ x, columns),
        (lambda x: (matrix @ x).sin(), lambda x: (dense @ x).sin(), columns),
        (lambda x: torch.sparse.mm(matrix, x), lambda x: dense @ x, columns),
        (lambda x: x @ matrix, lambda x: x @ dense, rows),
    ):
        torch.testing.assert_close(chainrule.vmap(product)(x), plain(x))
        expected = torch.func.vmap(torch.func.jacrev(plain))(x)
        torch.testing.assert_close(chainrule.vmap(chainrule.jacobian(product))(x), expected)
        gradient = torch.func.grad(lambda x: plain(x).square().sum())(x)  # noqa: B023 - called in this turn
        found = chainrule.grad(lambda x: chainrule.vmap(product)(x).square().sum())(x)  # noqa: B023
        torch.testing.assert_close(found, gradient)


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc, torch.sparse_coo])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_products_of_any_memory_layout_with_a_constant_sparse_matrix(layout, dim):
    """torch multiplies a sparse matrix only with a stack that is one matrix in memory; here the samples need not be that."""
    dense = torch.randn(5, 8, dtype=torch.float64).relu()
    matrix = dense.to_sparse(layout=layout)
    for product, plain, shape in (
        (lambda x: x @ matrix, lambda x: x @ dense, (3, 40, 5)),
        (lambda x: torch.mm(x, matrix).sin(), lambda x: (x @ dense).sin(), (3, 40, 5)),
        (lambda x: x.mT @ matrix, lambda x: x.mT @ dense, (3, 5, 4)),
        (lambda x: matrix @ x, lambda x: dense @ x, (3, 8, 2)),
        (lambda x: matrix @ x, lambda x: dense @ x, (3, 8)),
        (lambda x: x @ matrix, lambda x: x @ dense, (3, 5)),
    ):
        if dim == len(shape):
            continue
        x = torch.randn(shape, dtype=torch.float64).movedim(0, dim).contiguous()
        for _ in range(4):  # the calls are recorded, then replayed
            torch.testing.assert_close(chainrule.vmap(product, in_dims=dim)(x), torch.func.vmap(plain, in_dims=dim)(x))
        expected = torch.func.vmap(torch.func.jacrev(plain), in_dims=dim)(x)
        for _ in range(2):
            torch.testing.assert_close(chainrule.vmap(chainrule.jacobian(product), in_dims=dim)(x), expected)
            torch.testing.assert_close(chainrule.vmap(chainrule.jacfwd(product), in_dims=dim)(x), expected)


@pytest.mark.parametrize(
    "options", [{}, {"offset": 1}, {"offset": -2, "dim1": 0, "dim2": -1}, {"dim1": -1, "dim2": 0}, {"dim1": 1, "dim2": 0}]
)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (0,), (2, 2, 2)])
def test_diag_embed(shape, options):
    for _ in range(4):
        x = torch.randn(4, *shape, dtype=torch.float64)
        expected = torch.stack([torch.diag_embed(sample, **options) for sample in x])
        found = chainrule.vmap(lambda x: torch.diag_embed(x, **options))
        torch.testing.assert_close(found(x), expected)
        torch.testing.assert_close(chainrule.vmap(found)(x[None])[0], expected)
