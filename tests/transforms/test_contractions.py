"""`in_dims`, `argnums`, `has_aux` and `return_value` of the transforms that contract derivatives.

The oracles are those transforms' definitions written with torch.func. Tolerances are those of `assert_close` in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.func
from torch.utils._pytree import tree_leaves, tree_map

import chainrule
from chainrule.execute import engine, planning

Tensor = torch.Tensor
WEIGHT = torch.randn(4, 4, dtype=torch.float64)


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def field(x: Tensor, scale: Tensor) -> Tensor:
    return torch.tanh(WEIGHT[: len(x), : len(x)] @ x * scale.sum()) * x.sum()


def trace_of_jacobian(x: Tensor, scale: Tensor) -> Tensor:
    return torch.func.jacrev(field)(x, scale).trace()


def traces_of_hessian(x: Tensor, scale: Tensor) -> Tensor:
    return torch.func.hessian(field)(x, scale).diagonal(0, -2, -1).sum(-1)


def diagonal_of_hessian(x: Tensor, scale: Tensor) -> Tensor:
    return torch.func.hessian(field)(x, scale).diagonal(0, -2, -1)


def kernel(x: Tensor, scale: Tensor) -> Tensor:
    jacobian = torch.func.jacrev(field)(x, scale)
    return jacobian @ jacobian.T


TRANSFORMS: dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]] = {
    "divergence": (chainrule.divergence, trace_of_jacobian),
    "laplacian": (chainrule.laplacian, traces_of_hessian),
    "hessian_diagonal": (chainrule.hessian_diagonal, diagonal_of_hessian),
    "ntk": (chainrule.ntk, kernel),
}

#: in_dims, and the shapes of the two arguments for samples of shapes (3,) and (2,).
MAPPED: list[tuple[Any, tuple[int, ...], tuple[int, ...]]] = [
    (0, (5, 3), (5, 2)),
    ((0, None), (5, 3), (2,)),
    ((1, 0), (3, 5), (5, 2)),
    ((-1, -2), (3, 5), (5, 2)),
    ((None, 1), (3,), (2, 5)),
    (0, (1, 3), (1, 2)),
    (0, (5, 1), (5, 1)),
]


@pytest.mark.parametrize("in_dims", MAPPED, ids=lambda case: str(case))
@pytest.mark.parametrize("name", TRANSFORMS)
def test_per_sample(name: str, in_dims: Any) -> None:
    dims, *shapes = in_dims
    transform, expected = TRANSFORMS[name]
    args = [real(*shape) for shape in shapes]
    found = transform(field, in_dims=dims)(*args)
    torch.testing.assert_close(found, torch.func.vmap(expected, dims)(*args))
    derivative, value = transform(field, in_dims=dims, return_value=True)(*args)
    torch.testing.assert_close((derivative, value), (found, torch.func.vmap(field, dims)(*args)))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_no_samples(name: str) -> None:
    transform, expected = TRANSFORMS[name]
    shape = expected(real(3), real(2)).shape  # torch.func has no Jacobian of no samples
    derivative, value = transform(field, in_dims=(0, None), return_value=True)(real(0, 3), real(2))
    assert derivative.shape == (0, *shape)
    assert value.shape == (0, 3)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_per_sample_has_the_plan_of_vmap(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.CACHE.clear()
    transform, _ = TRANSFORMS[name]
    x, scale = real(5, 3), real(2)
    expected = chainrule.vmap(transform(field), (0, None))(x, scale)
    plans = len(engine.CACHE)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("planned again")

    monkeypatch.setattr(planning, "plan", refuse)
    torch.testing.assert_close(transform(field, in_dims=(0, None))(x, scale), expected)
    assert len(engine.CACHE) == plans


@pytest.mark.parametrize("name", TRANSFORMS)
def test_value_and_aux(name: str) -> None:
    transform, expected = TRANSFORMS[name]
    x, scale = real(5, 3), real(5, 2)

    def with_aux(x: Tensor, scale: Tensor) -> Any:
        return field(x, scale), {"sum": x.sum(), "name": "aux", "none": None}

    derivative, (value, aux) = transform(with_aux, has_aux=True, return_value=True)(x[0], scale[0])
    torch.testing.assert_close((derivative, value), (expected(x[0], scale[0]), field(x[0], scale[0])))
    assert aux["name"] == "aux"
    torch.testing.assert_close(aux["sum"], x[0].sum())
    derivative, aux = transform(with_aux, has_aux=True, in_dims=0)(x, scale)
    torch.testing.assert_close(derivative, torch.func.vmap(expected)(x, scale))
    torch.testing.assert_close(aux.pop("sum"), x.sum(1))
    assert aux == {"name": "aux", "none": None}
    derivative, (value, aux) = transform(with_aux, has_aux=True, return_value=True, in_dims=0)(x, scale)
    torch.testing.assert_close(value, torch.func.vmap(field)(x, scale))
    torch.testing.assert_close(aux["sum"], x.sum(1))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_derivatives_of_it_and_further_vmaps(name: str) -> None:
    transform, expected = TRANSFORMS[name]
    x, scale = real(2, 5, 3), real(2)

    def ours(x: Tensor, scale: Tensor) -> Tensor:
        derivative, value = transform(field, return_value=True, in_dims=(0, None))(x, scale)
        return derivative.square().sum() + value.sum()

    def theirs(x: Tensor, scale: Tensor) -> Tensor:
        return torch.func.vmap(expected, (0, None))(x, scale).square().sum() + torch.func.vmap(field, (0, None))(x, scale).sum()

    torch.testing.assert_close(
        chainrule.grad(ours, argnums=(0, 1))(x[0], scale), torch.func.grad(theirs, argnums=(0, 1))(x[0], scale)
    )
    torch.testing.assert_close(
        chainrule.vmap(transform(field, in_dims=(0, None)), (0, None))(x, scale),
        torch.func.vmap(torch.func.vmap(expected, (0, None)), (0, None))(x, scale),
    )
    joined = scale.clone().requires_grad_()
    (found,) = torch.autograd.grad(ours(x[0], joined), joined)
    torch.testing.assert_close(found, torch.func.grad(theirs, argnums=1)(x[0], scale))


@pytest.mark.parametrize("name", ["laplacian", "hessian_diagonal"])
def test_the_value_beside_steps_under_no_grad(name: str) -> None:
    def hidden(x: Tensor) -> Tensor:
        with torch.no_grad():
            factor = x.sin()
        return (factor * x**3).sum()

    x = real(5, 3)
    derivative, value = getattr(chainrule, name)(hidden, return_value=True, in_dims=0)(x)
    torch.testing.assert_close(value, (x.sin() * x**3).sum(1))
    whole = torch.func.vmap(torch.func.hessian(hidden))(x).diagonal(0, -2, -1)
    torch.testing.assert_close(derivative, whole if name == "hessian_diagonal" else whole.sum(1))


def test_in_a_nest_with_values() -> None:
    def function(x: Tensor) -> Tensor:
        return (x**4).sum()

    x = real(3)
    first, value = chainrule.jacobian(chainrule.laplacian(function, return_value=True))(x)
    torch.testing.assert_close((first, value), (24 * x, 4 * x**3))
    found, aux = chainrule.grad(chainrule.laplacian(lambda x: (function(x), x.sum()), has_aux=True), has_aux=True)(x)
    torch.testing.assert_close((found, aux), (24 * x, x.sum()))


def test_trees_of_arguments_per_sample() -> None:
    tree = {"a": real(5, 3), "b": [real(3), real(2, 5)]}
    dims = {"a": 0, "b": [None, 1]}

    def function(tree: Any) -> Tensor:
        return (tree["a"] ** 2 * tree["b"][0]).sum() * tree["b"][1].prod()

    found = chainrule.laplacian(function, in_dims=(dims,))(tree)
    blocks = torch.func.vmap(torch.func.hessian(function), (dims,))(tree)
    own = [blocks["a"]["a"], blocks["b"][0]["b"][0], blocks["b"][1]["b"][1]]
    expected = sum(block.diagonal(0, -2, -1).sum(-1) for block in own)
    torch.testing.assert_close(found, expected)


def model(weights: Any, x: Tensor) -> Tensor:
    return torch.tanh(weights["w"] @ x + weights["b"])


def loss(y: Tensor) -> Tensor:
    return torch.logsumexp(y, 0)


def gauss_newton(weights: Any, x: Tensor, tangent: Any) -> Any:
    output, pushed = torch.func.jvp(lambda w: model(w, x), (weights,), (tangent,))
    curved = torch.func.hessian(loss)(output) @ pushed
    return torch.func.vjp(lambda w: model(w, x), weights)[1](curved)[0]


def test_gauss_newton_products_of_chosen_arguments_per_sample() -> None:
    weights = {"w": real(2, 3), "b": real(2)}
    tangent = tree_map(torch.randn_like, weights)
    x = real(3, 5)
    torch.testing.assert_close(
        chainrule.ggn(model, loss, (weights, x[:, 0]), tangent, argnums=0), gauss_newton(weights, x[:, 0], tangent)
    )
    (one,) = chainrule.ggn(model, loss, (weights, x[:, 0]), (tangent,), argnums=[0])
    torch.testing.assert_close(one, gauss_newton(weights, x[:, 0], tangent))
    several = tree_map(lambda leaf: leaf.expand(5, *leaf.shape), weights)
    tangents = tree_map(torch.randn_like, several)
    found = chainrule.ggn(model, loss, (several, x), tangents, argnums=0, in_dims=(0, 1))
    torch.testing.assert_close(found, torch.func.vmap(gauss_newton, (0, 1, 0))(several, x, tangents))
    found, aux = chainrule.ggn(
        lambda w, x, flip: (model(w, x), flip), loss, (several, x), tangents, argnums=0, in_dims=(0, 1), has_aux=True, flip=True
    )
    assert aux is True
    torch.testing.assert_close(found, torch.func.vmap(gauss_newton, (0, 1, 0))(several, x, tangents))


def test_the_gauss_newton_matrix_as_a_map() -> None:
    weights, x = {"w": real(2, 3), "b": real(2)}, real(3)
    matrix = chainrule.ggn(model, loss, (weights, x), argnums=0, layout="operator")
    assert matrix.symmetric
    tangent = tree_map(torch.randn_like, weights)
    torch.testing.assert_close(matrix @ tangent, gauss_newton(weights, x, tangent))
    jacobian = torch.cat(
        [leaf.flatten(1) for leaf in tree_leaves(torch.func.jacrev(model)(weights, x))], 1
    )
    dense = jacobian.T @ torch.func.hessian(loss)(model(weights, x)) @ jacobian
    torch.testing.assert_close(matrix.dense(flat=True), dense)
    torch.testing.assert_close(matrix.trace(), dense.trace())
    torch.testing.assert_close(torch.cat([leaf.flatten() for leaf in tree_leaves(matrix.diagonal())]), dense.diagonal())
    pair, aux = chainrule.ggn(lambda w, x: (model(w, x), "aux"), loss, (weights, x), layout="operator", has_aux=True)
    assert aux == "aux"
    assert pair.shape == (11, 11)
    # A tree as the model's output, and derivatives with respect to the primals.
    def diagonal(library: Any, x: Tensor) -> Tensor:
        outputs = lambda x: {"a": x.sin(), "b": x.sum()}  # noqa: E731
        cost = lambda y: (y["a"].exp().sum() * y["b"])  # noqa: E731
        if library is chainrule:
            return chainrule.ggn(outputs, cost, (x,), layout="operator").diagonal()
        whole = lambda x: torch.cat([x.sin(), x.sum()[None]])  # noqa: E731
        jacobian = torch.func.jacrev(whole)(x)
        return (jacobian.T @ torch.func.hessian(lambda y: y[:-1].exp().sum() * y[-1])(whole(x)) @ jacobian).diagonal()

    torch.testing.assert_close(
        chainrule.jacrev(lambda x: diagonal(chainrule, x))(x), torch.func.jacrev(lambda x: diagonal(torch.func, x))(x)
    )


def test_taylor_series_of_trees_and_chosen_arguments() -> None:
    tree, side = {"x": real(3), "y": real()}, torch.arange(3)
    first, second = (tree_map(torch.randn_like, tree) for _ in range(2))

    def function(tree: Any, side: Tensor, power: int) -> Tensor:
        return (tree["x"] * side) ** power * tree["y"].sin()

    def along(t: Tensor) -> Tensor:
        point = tree_map(lambda p, a, b: p + a * t + b * t**2 / 2, tree, first, second)
        return function(point, side, 3)

    zero = torch.zeros((), dtype=torch.float64)
    expected = [torch.func.jacfwd(along)(zero), torch.func.jacfwd(torch.func.jacfwd(along))(zero)]
    output, series = chainrule.jet(function, (tree, side), [first, second], argnums=0, power=3)
    torch.testing.assert_close((output, series), (function(tree, side, 3), expected))
    output, series = chainrule.jet(function, (tree, side), ([first, second],), argnums=(0,), power=3)
    torch.testing.assert_close(series, expected)


def test_taylor_series_per_sample_with_aux() -> None:
    x, v, w = real(3, 5), real(3, 5), real(3, 5)
    scale = real(3)

    def function(x: Tensor, scale: Tensor) -> Any:
        return (x.sin() * scale).sum(), {"x": x, "kind": "aux"}

    output, series, aux = chainrule.jet(
        function, (x, scale), [v, w], argnums=0, has_aux=True, in_dims=(1, None)
    )
    torch.testing.assert_close(output, (x.sin() * scale[:, None]).sum(0))
    expected = [(x.cos() * v * scale[:, None]).sum(0), ((x.cos() * w - x.sin() * v**2) * scale[:, None]).sum(0)]
    torch.testing.assert_close(series, expected)
    torch.testing.assert_close(aux["x"], x.T)
    assert aux["kind"] == "aux"


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "argnum out of range": (
        lambda: chainrule.laplacian(field, argnums=2)(real(3), real(2)), RuntimeError,
        "laplacian: got argnum=2, but only 2 positional inputs",
    ),
    "repeated argnums": (
        lambda: chainrule.ntk(field, argnums=(0, 0))(real(3), real(2)), RuntimeError, "ntk: argnums elements must be unique",
    ),
    "integer input": (
        lambda: chainrule.divergence(torch.sin)(torch.arange(3)), RuntimeError,
        "divergence: only Tensors of floating point and complex dtype can be differentiated, got torch.int64",
    ),
    "in_dims of a wrong kind": (
        lambda: chainrule.divergence(torch.sin, in_dims=[0])(real(3, 3)), ValueError,
        r"divergence\(sin, in_dims=\[0\], ...\)\(<inputs>\): expected `in_dims` to be int or a",
    ),
    "in_dims out of range": (
        lambda: chainrule.laplacian(torch.sum, in_dims=2)(real(3, 3)), ValueError,
        r"laplacian\(sum, in_dims=2, ...\)\(<inputs>\): Got in_dim=2 for some input",
    ),
    "in_dims of another structure": (
        lambda: chainrule.ntk(torch.sin, in_dims=(0, 0))(real(3, 3)), ValueError, r"ntk\(sin, in_dims=\(0, 0\), ...\).*structure",
    ),
    "nothing mapped": (
        lambda: chainrule.hessian_diagonal(torch.sum, in_dims=(None,))(real(3)), ValueError,
        r"hessian_diagonal\(sum\): Expected at least one Tensor to vmap over",
    ),
    "different sizes": (
        lambda: chainrule.divergence(field, in_dims=0)(real(3, 3), real(2, 2)), ValueError,
        r"divergence\(field\): Expected all tensors to have the same size in the mapped dimension, got sizes \[3, 2\]",
    ),
    "another shape per sample": (
        lambda: chainrule.divergence(torch.sum, in_dims=0)(real(3, 3)), RuntimeError,
        r"divergence\(sum\): expected an output of the shape of its argument, \(3,\), got \(\)",
    ),
    "primals of a product": (
        lambda: chainrule.ggn(torch.sin, torch.sum, [real(3)], [real(3)]), RuntimeError,
        r"ggn\(f, loss, primals, tangents\): expected primals to be a tuple, got <class 'list'>",
    ),
    "argnum of a product": (
        lambda: chainrule.ggn(torch.sin, torch.sum, (real(3),), real(3), argnums=1), RuntimeError,
        "ggn: got argnum=1, but only 1 positional inputs",
    ),
    "in_dims of a product": (
        lambda: chainrule.ggn(torch.sin, torch.sum, (real(3),), (real(3),), in_dims=(0, 0)), ValueError,
        r"ggn\(sin, in_dims=\(0, 0\), ...\): in_dims is not compatible with the structure of the primals",
    ),
    "missing tangents": (
        lambda: chainrule.ggn(torch.sin, torch.sum, (real(3),)), RuntimeError, "the same python structure",
    ),
    "unknown layout": (
        lambda: chainrule.ggn(torch.sin, torch.sum, (real(3),), layout="dense"), ValueError, "layout should be 'operator'",
    ),
    "tangents for a map": (
        lambda: chainrule.ggn(torch.sin, torch.sum, (real(3),), (real(3),), layout="operator"), ValueError, "got tangents",
    ),
    "a map per sample": (
        lambda: chainrule.ggn(torch.sin, torch.sum, (real(3, 3),), layout="operator", in_dims=0), ValueError, "stacked",
    ),
    "a loss that is no scalar": (
        lambda: chainrule.ggn(torch.sin, torch.sin, (real(3),), layout="operator"), ValueError, "one scalar Tensor",
    ),
    "argnum of a series": (
        lambda: chainrule.jet(torch.sin, (real(3),), [real(3)], argnums=1), RuntimeError,
        "jet: got argnum=1, but only 1 positional inputs",
    ),
    "integer primal": (
        lambda: chainrule.jet(torch.sin, (torch.arange(3),), ([real(3)],)), RuntimeError, "jet: only Tensors of floating point",
    ),
    "structure of a series": (
        lambda: chainrule.jet(lambda d: d["x"], ({"x": real(3)},), ([real(3)],)), RuntimeError,
        "expected the coefficients of primal 0 to have its structure",
    ),
    "shape of a series": (
        lambda: chainrule.jet(torch.sin, (real(3),), ([real(2)],)), RuntimeError, "jet: series of primal 0",
    ),
    "in_dims of a series": (
        lambda: chainrule.jet(torch.sin, (real(3, 2),), ([real(3, 2)],), in_dims=2), ValueError, "jet.*Got in_dim=2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected(name: str) -> None:
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()
