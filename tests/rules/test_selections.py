"""Selections by index tensors and masks: Jacobians, second derivatives, batches, and their structure."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import chainrule
from tests.rules.selection_oracle import (
    assert_same,
    check_first_order,
    check_second_order,
    check_under_vmap,
    leaves,
    parametrized,
    points,
)

aten = torch.ops.aten


def ix(*values):
    return torch.tensor(values)


MASK = torch.tensor([[True, False, True], [False, False, True]])
EMPTY = torch.zeros(0, dtype=torch.long)

CASES = {
    "index vector": (lambda x: x[ix(2, 0, 2, -1)], [(3, 2)]),
    "index matrix": (lambda x: x[torch.tensor([[1, 0], [2, 2]])], [(3,)]),
    "index second dim": (lambda x: x[:, ix(1, 1, 0)], [(2, 3)]),
    "index two adjacent": (lambda x: x[ix(0, 1, 1), ix(2, 0, -1)], [(2, 3)]),
    "index two broadcast": (lambda x: x[torch.tensor([[0], [1]]), ix(2, 0, 1)], [(2, 3, 2)]),
    "index two apart": (lambda x: x[ix(0, 1), :, ix(1, 0)], [(2, 3, 2)]),
    "index after slice": (lambda x: x[1:, None, ix(0, 0)], [(3, 2)]),
    "index by a number and a vector": (lambda x: x[1, ix(0, 2)], [(2, 3)]),
    "index size one with longer": (lambda x: x[ix(1), ix(0, 2, 1)], [(2, 3)]),
    "index empty": (lambda x: x[EMPTY], [(3, 2)]),
    "index into nothing": (lambda x: x[EMPTY], [(0, 2)]),
    "mask": (lambda x: x[MASK], [(2, 3)]),
    "mask of leading dims": (lambda x: x[MASK], [(2, 3, 2)]),
    "mask of one dim": (lambda x: x[:, torch.tensor([True, False, True])], [(2, 3)]),
    "mask beside an index": (lambda x: x[torch.tensor([True, True]), ix(2, 0)], [(2, 3)]),
    "mask that selects nothing": (lambda x: x[torch.zeros(2, 3, dtype=torch.bool)], [(2, 3)]),
    "mask scalar": (lambda x: x[torch.tensor(True)], [(2,)]),
    "index_put": (lambda x, v: x.index_put((ix(0, 2),), v), [(3, 2), (2, 2)]),
    "index_put broadcast": (lambda x, v: x.index_put((ix(0, 2), ix(1, 0)), v), [(3, 2), ()]),
    "index_put one of two": (lambda x, v: x.index_put((ix(0, 2),), v), [(3, 2), (2,)]),
    "index_put accumulate": (lambda x, v: x.index_put((ix(0, 2, 0),), v, accumulate=True), [(3, 2), (3, 2)]),
    "index_put accumulate scalar": (lambda x, v: x.index_put((ix(0, 2, 0),), v, accumulate=True), [(3, 2), ()]),
    "index_put mask": (lambda x, v: x.index_put((MASK,), v), [(2, 3), (3,)]),
    "index_put mask scalar": (lambda x, v: x.index_put((MASK,), v), [(2, 3), ()]),
    "index_put after none": (lambda x, v: aten.index_put(x, [None, ix(2, 0)], v), [(2, 3), (2, 2)]),
    "index_put apart": (lambda x, v: aten.index_put(x, [ix(0, 1), None, ix(1, 0)], v), [(2, 3, 2), (2, 3)]),
    "index_put empty": (lambda x, v: x.index_put((EMPTY,), v), [(3, 2), (0, 2)]),
    "index_select": (lambda x: x.index_select(-1, ix(2, 0, 0)), [(2, 3)]),
    "index_select scalar": (lambda x: x.index_select(0, ix(0)), [()]),
    "index_select by scalar": (lambda x: x.index_select(0, torch.tensor(1)), [(3, 2)]),
    "index_select empty": (lambda x: x.index_select(0, EMPTY), [(3, 2)]),
    "index_add": (lambda x, s: x.index_add(1, ix(2, 0, 2), s, alpha=-2), [(2, 3), (2, 3)]),
    "index_add scalar": (lambda x, s: x.index_add(0, ix(0), s), [(), ()]),
    "index_copy": (lambda x, s: x.index_copy(0, ix(2, 0), s), [(3, 2), (2, 2)]),
    "index_fill": (lambda x: x.index_fill(1, ix(2, 0), 3.0), [(2, 3)]),
    "index_fill tensor": (lambda x, v: x.index_fill(-1, ix(1, 1), v), [(2, 3), ()]),
    "index_fill scalar": (lambda x, v: x.index_fill(0, ix(0), v), [(), ()]),
    "gather": (lambda x: x.gather(1, torch.tensor([[2, 0, 2, 1], [1, 1, 0, 0]])), [(2, 3)]),
    "gather of a part": (lambda x: x.gather(0, torch.tensor([[1, 0]])), [(2, 3)]),
    "gather scalar": (lambda x: x.gather(0, torch.tensor(0)), [()]),
    "gather nothing": (lambda x: x.gather(0, EMPTY), [(2, 3)]),
    "take_along_dim": (lambda x: torch.take_along_dim(x, torch.tensor([[1, 0]]), 1), [(3, 2)]),
    "scatter": (lambda x, s: x.scatter(1, torch.tensor([[2, 0], [1, 2]]), s), [(2, 3), (2, 2)]),
    "scatter of a part": (lambda x, s: x.scatter(0, torch.tensor([[1, 0]]), s), [(2, 3), (2, 3)]),
    "scatter from a wider source": (lambda x, s: x.scatter(1, torch.tensor([[1]]), s), [(2, 3), (4, 5)]),
    "scatter value": (lambda x: x.scatter(1, torch.tensor([[2, 0], [1, 2]]), 5.0), [(2, 3)]),
    "scatter nothing": (lambda x, s: x.scatter(0, EMPTY, s), [(2,), (2,)]),
    "scatter scalar": (lambda x, s: x.scatter(0, torch.tensor(0), s), [(), ()]),
    "scatter of a scalar": (lambda x, s: x.scatter(0, ix(2), s), [(4,), ()]),
    "scatter in place of a scalar": (lambda x, s: (x * 1).scatter_(-1, ix(2), s), [(4,), ()]),
    "scatter at a scalar": (lambda x, s: x.scatter(0, torch.tensor(2), s), [(4,), (1,)]),
    "scatter of a scalar at a scalar": (lambda x, s: x.scatter(0, torch.tensor(2), s), [(4,), ()]),
    "scatter into a scalar": (lambda x, s: x.scatter(0, ix(0), s), [(), (1,)]),
    "scatter_add of a scalar": (lambda x, s: x.scatter_add(0, ix(2), s), [(4,), ()]),
    "scatter_add into a scalar": (lambda x, s: x.scatter_add(0, ix(0), s), [(), (1,)]),
    "scatter_add": (lambda x, s: x.scatter_add(0, torch.tensor([[1, 1, 0], [1, 0, 0]]), s), [(2, 3), (2, 3)]),
    "scatter_add of a part": (lambda x, s: x.scatter_add(0, torch.tensor([[1, 0]]), s), [(2, 3), (2, 2)]),
    "scatter reduce": (lambda x, s: x.scatter_reduce(0, ix(0, 1, 0), s, "prod"), [(2,), (3,)]),
    "take": (lambda x: x.take(torch.tensor([[5, 0], [-1, 3]])), [(2, 3)]),
    "put": (lambda x, s: x.put(torch.tensor([[4, 1]]), s), [(2, 3), (2,)]),
    "put accumulate": (lambda x, s: x.put(ix(4, 1, 4), s, accumulate=True), [(2, 3), (3,)]),
    "masked_fill": (lambda x: x.masked_fill(MASK, 2.0), [(2, 3)]),
    "masked_fill tensor": (lambda x, v: x.masked_fill(MASK, v), [(2, 3), ()]),
    "masked_fill broadcast": (lambda x, v: x.masked_fill(MASK[:, :1], v), [(2, 3), ()]),
    "masked_fill stretched": (lambda x: torch.masked_fill(x, MASK, 0.5), [(3,)]),
    "masked_select": (lambda x: x.masked_select(MASK), [(2, 3)]),
    "masked_select stretched": (lambda x: x.masked_select(MASK), [(2, 1)]),
    "masked_select none": (lambda x: x.masked_select(~MASK & MASK), [(2, 3)]),
    "masked_scatter": (lambda x, s: x.masked_scatter(MASK, s), [(2, 3), (2, 2)]),
    "masked_scatter of a scalar": (lambda x, s: x.masked_scatter(ix(0, 1, 0) > 0, s), [(3,), ()]),
    "masked_scatter of a scalar nowhere": (lambda x, s: x.masked_scatter(torch.tensor(False), s), [(), ()]),
    "embedding": (lambda w: F.embedding(torch.tensor([[1, 0], [1, 3]]), w), [(4, 2)]),
    "embedding scalar index": (lambda w: F.embedding(torch.tensor(2), w), [(4, 2)]),
    "embedding_dense_backward": (lambda g: aten.embedding_dense_backward(g, ix(1, 0, 1), 3, -1, False), [(3, 2)]),
    "embedding_bag sum": (lambda w: F.embedding_bag(ix(1, 0, 3, 1), w, ix(0, 3), mode="sum"), [(4, 2)]),
    "embedding_bag mean": (lambda w: F.embedding_bag(ix(1, 0, 3, 1), w, ix(0, 3, 3), mode="mean"), [(4, 2)]),
    "embedding_bag max": (lambda w: F.embedding_bag(ix(1, 0, 3, 1), w, ix(0, 2), mode="max"), [(4, 2)]),
    "embedding_bag matrix": (lambda w: F.embedding_bag(torch.tensor([[1, 0], [3, 1]]), w, mode="mean"), [(4, 2)]),
    "embedding_bag weighted": (
        lambda w, p: F.embedding_bag(ix(1, 0, 3), w, ix(0, 2), mode="sum", per_sample_weights=p), [(4, 2), (3,)]),
    "embedding_bag last offset": (
        lambda w: F.embedding_bag(ix(1, 0, 3), w, ix(0, 2, 3), mode="sum", include_last_offset=True), [(4, 2)]),
    "index from values": (lambda x: x[x.argsort()], [(5,)]),
    "gather from values": (lambda x: x.gather(1, x.argsort(1)), [(2, 3)]),
    "two gathers": (lambda x: x[ix(2, 0, 1)][:, ix(1, 1)].gather(0, torch.tensor([[0, 2]])), [(3, 2)]),
    "scatter of a gather": (lambda x: torch.zeros(4, dtype=x.dtype).index_add(0, ix(3, 3, 1), x[ix(0, 2, 2)]), [(3,)]),
}

#: torch.func has no batching rule for some step of its Jacobian, or a formula that fails on these shapes.
WITHOUT_ORACLE = {
    "embedding_bag max", "scatter nothing", "put", "put accumulate",
    "scatter of a part", "scatter from a wider source", "scatter_add of a part", "scatter at a scalar",
}  # fmt: skip
#: The oracle is not defined for second order.
WITHOUT_SECOND = WITHOUT_ORACLE | {"index_select by scalar", "masked_select none", "masked_scatter of a scalar"} | {name for name in CASES if name.startswith("embedding_bag")}


@pytest.mark.parametrize("name", CASES)
def test_first_order(name):
    function, shapes = CASES[name]
    check_first_order(function, points(*shapes), name not in WITHOUT_ORACLE)


@parametrized({name: row for name, row in CASES.items() if name not in WITHOUT_SECOND})
def test_second_order(function, shapes):
    check_second_order(function, points(*shapes))


#: The backward formula of scatter_reduce("prod") asks for a value, which differs between the samples of a batch.
WITHOUT_VMAP = {"scatter reduce"}


@parametrized({name: row for name, row in CASES.items() if name not in WITHOUT_VMAP})
def test_under_vmap(function, shapes):
    check_under_vmap(function, points(*shapes))


@pytest.mark.parametrize("name", ["index two broadcast", "scatter", "masked_scatter", "take", "embedding"])
def test_non_contiguous_inputs(name):
    function, shapes = CASES[name]
    check_first_order(function, tuple(torch.stack([x, -x], -1)[..., 0] for x in points(*shapes)), False)


def test_padding_rows_get_no_derivative():
    index = ix(1, 0, 1, 2)
    (w,) = points((3, 2))
    for function in (
        lambda w: F.embedding(index, w, padding_idx=1),
        lambda w: F.embedding(index, w, scale_grad_by_freq=True),
        lambda w: F.embedding_bag(index, w, ix(0, 3), mode="mean", padding_idx=1),
        lambda w: F.embedding_bag(index, w, ix(0, 3), mode="sum", padding_idx=1),
    ):
        expected = torch.autograd.functional.jacobian(function, w)
        for transform in (chainrule.jacrev, chainrule.jacobian):
            assert_same(transform(function)(w), expected)


def test_a_cached_plan_reads_the_new_indices():
    (x,) = points((5,))
    jacobian = chainrule.jacrev(lambda x, index, mask: torch.cat([x[index] * 2, x.masked_fill(mask, 0.0)]))
    for index, mask in ((ix(0, 3), x > 0), (ix(4, 4), x < 0)):
        expected = torch.func.jacrev(lambda x: torch.cat([x[index] * 2, x.masked_fill(mask, 0.0)]))(x)
        assert_same(jacobian(x, index, mask), expected)


def test_a_cached_plan_reads_masks_of_other_counts():
    (x, v) = points((5,), ())

    def function(x, v):
        return x.index_put((x > 0.3,), v)

    for shift in (0.0, 0.5, -2.0):
        expected = torch.func.jacrev(lambda x, v: torch.where(x > 0.3, v, x), (0, 1))(x + shift, v)
        assert_same(chainrule.jacrev(function, (0, 1))(x + shift, v), expected)


def test_directional_derivatives():
    for name in ("index two apart", "index_put mask", "scatter_add", "embedding_bag mean", "masked_scatter"):
        function, shapes = CASES[name]
        inputs = points(*shapes)
        tangents = tuple(x.sin() for x in inputs)
        jacobian = chainrule.jacrev(function, tuple(range(len(inputs))))(*inputs)
        expected = sum(torch.tensordot(j, t, t.ndim) for j, t in zip(jacobian, tangents, strict=True))
        out, pushed = chainrule.jvp(function, inputs, tangents)
        assert_same(pushed, expected)
        seed = out.cos()
        _, pull = chainrule.vjp(function, *inputs)
        assert_same(pull(seed), [torch.tensordot(seed, j, seed.ndim) for j in leaves(jacobian)])


def test_float32_stays_float32():
    x = points((3, 2))[0].float()
    for function in (lambda x: x[ix(0, 2)], lambda x: x.masked_fill(x > 0, 0.0), lambda x: x.index_put((ix(0),), x[1])):
        assert chainrule.jacrev(function)(x).dtype == torch.float32
        assert chainrule.jacfwd(function)(x).dtype == torch.float32


def test_padding_rows_of_an_embedding_are_constant_whatever_the_nest() -> None:
    weight, index = torch.randn(4, 3, dtype=torch.float64), torch.tensor([1, 2, 1, 3])

    def embedded(weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(index, weight, padding_idx=1)

    expected = chainrule.jacrev(embedded)(weight)
    assert not expected[:, :, 1].any()
    assert expected[:, :, 2].any()
    torch.testing.assert_close(chainrule.jacrev(chainrule.vmap(embedded))(weight[None])[0, :, :, 0], expected)
    torch.testing.assert_close(chainrule.vmap(chainrule.jacrev(embedded))(weight[None])[0], expected)


def test_scattered_sums_may_leave_sources_out() -> None:
    index, source = torch.tensor([0, 2, 1]), torch.randn(5, dtype=torch.float64)
    expected = torch.zeros(4, 5, dtype=torch.float64)
    expected[index, torch.arange(3)] = 1.0
    for transform in (chainrule.jacfwd, chainrule.jacrev):
        found = transform(lambda y: torch.zeros(4, dtype=y.dtype).scatter_reduce(0, index, y, "sum"))(source)
        torch.testing.assert_close(found, expected)


def test_padding_of_embeddings_in_both_modes():
    """Torch's forward mode looks tangents up like values; its reverse mode leaves out the row of padding."""
    index = torch.tensor([0, 2, 1, 2])

    def embedded(weight):
        return torch.nn.functional.embedding(index, weight, padding_idx=2)

    def energy(weight):
        return embedded(weight).sum() ** 2 + (embedded(weight) ** 3).sum()

    transforms = (
        lambda m, w, v: m.jvp(embedded, (w,), (v,)),
        lambda m, w, v: m.jacfwd(embedded)(w),
        lambda m, w, v: m.jacrev(embedded)(w),
        lambda m, w, v: m.vjp(embedded, w)[1](v),
        lambda m, w, v: m.hessian(energy)(w),
        lambda m, w, v: m.jacfwd(m.jacfwd(energy))(w),
        lambda m, w, v: m.jacrev(m.jacfwd(energy))(w),
        lambda m, w, v: m.jacrev(m.jacrev(energy))(w),
        lambda m, w, v: m.jvp(m.grad(energy), (w,), (v,)),
        lambda m, w, v: m.grad(lambda w: m.jvp(energy, (w,), (v,))[1])(w),
        lambda m, w, v: m.vmap(m.jacfwd(embedded))(torch.stack([w, v])),
    )
    for _ in range(2):
        w, v = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
        for transform in transforms:
            torch.testing.assert_close(transform(chainrule, w, v), transform(torch.func, w, v))
        torch.testing.assert_close(chainrule.jacfwd(embedded, layout="sparse_coo")(w).to_dense(), torch.func.jacfwd(embedded)(w))
        there = chainrule.linear_map(embedded, w)
        torch.testing.assert_close((there @ v * v).sum(), (there.T @ v * v).sum())
