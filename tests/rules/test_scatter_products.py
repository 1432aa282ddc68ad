"""``scatter_reduce`` against torch.func and closed forms in float64."""

from __future__ import annotations

import pytest
import torch

import chainrule
from tests.rules.test_layers import assert_same, check, randn

INDEX = torch.tensor([[0, 1, 1, 0], [2, 0, 0, 0]])
JOINED = {"sum": torch.add, "mean": lambda x, s: (x + s) / 2, "prod": torch.mul, "amax": torch.maximum}
SCALARS = [((4,), (1,), ()), ((4,), (), (1,)), ((4,), (), ()), ((), (1,), ()), ((), (), (1,))]


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("reduce", ["sum", "mean", "prod"])
def test_scatter_reduce(reduce: str, include_self: bool) -> None:
    """Every mode, for two dimensions and for one."""

    def function(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return x.scatter_reduce(1, INDEX, source, reduce, include_self=include_self)

    check(function, (randn(2, 3), randn(2, 4)))
    check(lambda x, s: x.scatter_reduce(0, INDEX[1], s, reduce, include_self=include_self), (randn(3), randn(4)))
    account = chainrule.explain(chainrule.hessian(lambda x: function(x, x.repeat(1, 2)[:, :4]).sin().sum()))(randn(2, 3))
    assert not account.opaque


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("reduce", ["sum", "mean", "prod", "amax"])
@pytest.mark.parametrize(("own", "place", "sources"), SCALARS)
def test_scalars_stand_for_vectors_of_one_element(
    own: tuple[int, ...], place: tuple[int, ...], sources: tuple[int, ...], reduce: str, include_self: bool
) -> None:
    """Against what the one element of the source and the one of its place make together."""
    x, source, index = randn(*own), randn(*sources), torch.full(place, 2 if own else 0)

    def function(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return x.scatter_reduce(0, index, source, reduce, include_self=include_self)

    def plain(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        joined = JOINED[reduce](x, source) if include_self else source
        return torch.where(torch.arange(4) == 2, joined, x) if own else joined.reshape(())

    for _ in range(2):
        for name in ("jacrev", "jacfwd", "hessian"):
            wanted = getattr(torch.func, name)(lambda x, s: plain(x.sin(), s.exp()), (0, 1))(x, source)
            assert_same(getattr(chainrule, name)(lambda x, s: function(x.sin(), s.exp()), (0, 1))(x, source), wanted)
        xs, each = torch.stack([x, x + 1]), torch.stack([source, source - 1])
        wanted = torch.func.vmap(torch.func.jacfwd(plain, (0, 1)))(xs, each)
        assert_same(chainrule.vmap(chainrule.jacrev(function, (0, 1)))(xs, each), wanted)


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("zeros", [[], [1], [1, 2]])
def test_product_with_zeros(zeros: list[int], include_self: bool) -> None:
    """Each derivative is the product of the others, also where some of these vanish."""
    x, source = randn(2), randn(4)
    source[zeros] = 0.0
    index = torch.tensor([0, 0, 0, 1])

    def function(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return x.scatter_reduce(0, index, source, "prod", include_self=include_self)

    def defined(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        own = x if include_self else torch.ones_like(x)
        return torch.stack([own[0] * source[0] * source[1] * source[2], own[1] * source[3]])

    wanted = torch.func.jacrev(defined, (0, 1))(x, source)
    assert_same(chainrule.jacrev(function, (0, 1))(x, source), wanted)
    assert_same(chainrule.jacfwd(function, (0, 1))(x, source), wanted)
    wanted = torch.func.hessian(lambda s: defined(x, s).sum())(source)
    got = chainrule.hessian(lambda s: function(x, s).sum())(source)
    if len(zeros) < 2:
        assert_same(got, wanted)
    else:
        assert not got.isfinite().all()


def test_bilinear_layer_is_structured() -> None:
    """The product of three tensors with sums."""
    layer = torch.nn.Bilinear(3, 4, 2, dtype=torch.float64)
    check(layer, (randn(5, 3), randn(5, 4)))
    first, second = randn(5, 3), randn(5, 4)
    check(lambda w: torch.nn.functional.bilinear(first, second, w), (randn(2, 3, 4),))
    account = chainrule.explain(chainrule.jacrev(layer, (0, 1)))(randn(5, 3), randn(5, 4))
    assert not account.opaque


@pytest.mark.skipif(not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="needs a newer torch")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_chunked_linear_cross_entropy(reduction: str) -> None:
    """An op that computes its gradients in advance, but only for tensors that require grad, against the loss's definition."""
    functional = torch.nn.functional
    options = pytest.importorskip("torch.nn.modules.linear_cross_entropy_options").LinearCrossEntropyOptions(batch_chunk_size=2)
    x, w, target = randn(5, 3), randn(4, 3), torch.tensor([0, 1, -100, 3, 2])

    def chunked(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return functional.linear_cross_entropy(x, w, target, reduction=reduction, options=options)

    def defined(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(x @ w.mT, target, reduction=reduction)

    wanted = torch.func.jacrev(defined, (0, 1))(x, w)
    assert_same(chainrule.jacrev(chunked, (0, 1))(x, w), wanted)
    assert_same(chainrule.jacfwd(chunked, (0, 1))(x, w), wanted)
    total = lambda f: lambda x: f(x, w).sin().sum()  # noqa: E731
    assert_same(chainrule.hessian(total(chunked))(x), torch.func.hessian(total(defined))(x))
    stacked = torch.stack([x, 2 * x])
    single = torch.stack([torch.func.grad(total(defined))(sample) for sample in stacked])
    assert_same(chainrule.vmap(chainrule.grad(total(chunked)))(stacked), single)
    source = stacked.clone().requires_grad_()
    (outer,) = torch.autograd.grad(chainrule.vmap(total(chunked))(source).sum(), source)
    assert_same(outer, single)


@pytest.mark.filterwarnings("ignore:index_reduce.*beta")
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("reduce", ["prod", "mean", "amax", "amin"])
@pytest.mark.parametrize(("shape", "dim"), [((6,), 0), ((6, 3), 0), ((3, 6), -1), ((2, 6, 2), 1), ((0, 3), 0), ((), 0)])
def test_index_reduce(shape, dim, reduce, include):
    """In all transforms as in torch.func, and with as many entries as there are elements in a sparse Jacobian."""
    count = shape[dim] if shape else 1
    index = torch.randint(0, 4 if shape else 1, (count,))
    sizes = list(shape)
    if shape:
        sizes[dim] = 4

    def reduced(base, source):
        return base.index_reduce(dim, index, source, reduce, include_self=include)

    def total(base, source):
        return reduced(base, source).sin().sum()

    for _ in range(2):
        base, source = torch.randn(sizes, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
        for transform in (
            lambda m: m.jacrev(reduced, (0, 1))(base, source),  # noqa: B023 - called in this turn
            lambda m: m.grad(total, (0, 1))(base, source),  # noqa: B023
        ):
            torch.testing.assert_close(transform(chainrule), transform(torch.func))
        if source.numel():
            rows = torch.stack([base, 2 * base]), torch.stack([source, source])
            expected = torch.stack([torch.func.grad(total)(*row) for row in zip(*rows, strict=True)])
            torch.testing.assert_close(chainrule.vmap(chainrule.grad(total))(*rows), expected)
        tangent = torch.randn_like(source)
        pushed = chainrule.jvp(lambda s: reduced(base, s), (source,), (tangent,))[1]  # noqa: B023
        dense = torch.func.jacrev(reduced, 1)(base, source)
        torch.testing.assert_close(pushed, (dense.flatten(len(sizes)) @ tangent.flatten()).reshape(sizes))
        found = chainrule.jacobian(reduced, 1, layout="sparse_coo")(base, source)
        torch.testing.assert_close(found.to_dense().reshape(dense.shape), dense)
        assert found.coalesce()._nnz() <= max(source.numel(), 1)


def test_ties_with_what_is_left_out() -> None:
    """The largest values are equal to the target's own, which is left out: torch's derivative counts it among them all the same."""
    places = torch.tensor([0, 0, 1, 1, 2, 0])

    def scattered(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(3, dtype=x.dtype).scatter_reduce(0, places, x, "amax", include_self=False)

    def by_parts(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[places == place].amax() for place in range(3)])

    for _ in range(3):
        x = torch.randn(6, dtype=torch.float64).clamp(max=0).round()
        expected = torch.func.jacrev(by_parts)(x)
        torch.testing.assert_close(chainrule.jacobian(scattered)(x), expected, rtol=0, atol=1e-15)
        found = chainrule.jacobian(scattered, layout="sparse_coo")(x)
        torch.testing.assert_close(found.to_dense(), expected, rtol=0, atol=1e-15)


def test_second_derivatives_where_several_factors_are_zero() -> None:
    """They are undefined here, and torch raises: no number is returned for them; first derivatives are right."""
    places = torch.tensor([0, 0, 0, 1])

    def product(x: torch.Tensor) -> torch.Tensor:
        return torch.ones(2, dtype=x.dtype).scatter_reduce(0, places, x, "prod").sum()

    x = torch.tensor([0.0, 0.0, 3.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(chainrule.grad(product)(x), torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=x.dtype))
    assert chainrule.hessian(product)(x)[:2, :2].isnan().all()
    x[1] = 2.0
    expected = torch.zeros(4, 4, dtype=x.dtype)
    expected[0, 1] = expected[1, 0] = 3.0
    expected[0, 2] = expected[2, 0] = 2.0
    torch.testing.assert_close(chainrule.hessian(product)(x), expected)
