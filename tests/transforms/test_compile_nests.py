"""Every public transform, in every nest, compiled: graphs are of the values that they are given, whatever was called before."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

import chainrule
from chainrule import linear_map
from chainrule.execute import engine

DOUBLE = torch.float64
GENERATOR = torch.Generator().manual_seed(0)
N = 4
WEIGHT = torch.randn(N, N, dtype=DOUBLE, generator=GENERATOR)
INDEX, MASK = torch.tensor([2, 0, 1, 1]), torch.tensor([True, False, True, True])
FUNCTIONS = {
    "stencil": lambda x: x.roll(1) * x - 2 * x.sin(),
    "layer": lambda x: torch.tanh(WEIGHT @ x) * x,
    "gathered": lambda x: torch.where(MASK, x[INDEX].exp() * x, x),
}


def number_of(function):
    return lambda x: function(x).square().sum()


def pulled_back(function):
    def run(x):
        output, pull = chainrule.vjp(function, x)
        return pull(output.sin())[0]

    return run


def linearized(function):
    def run(x):
        output, push = chainrule.linearize(function, x)
        return output, push(x.cos())

    return run


MAPS = {
    "dense": lambda J: J.dense(),
    "sparse": lambda J: J.sparse(),
    "product": lambda J: J @ torch.ones(N, dtype=DOUBLE),
    "transposed product": lambda J: J.T @ torch.ones(N, dtype=DOUBLE),
    "rows on the left": lambda J: torch.eye(N, dtype=DOUBLE)[:2] @ J,
    "diagonal": lambda J: J.diagonal(),
    "trace": lambda J: (J @ J).trace(),
    "norm": lambda J: J.gram().norm(),
    "gram": lambda J: J.gram().dense(),
    "sparse gram": lambda J: J.gram().sparse(),
    "normal diagonal": lambda J: J.normal().diagonal(),
    "rows": lambda J: J.rows([0, 2]),
    "block": lambda J: J.block([0, 1], [1, 2]),
    "entries": lambda J: J[[0, 1], [1, 1]],
    "sum": lambda J: (J + J.T).dense(),
}
TRANSFORMS = {
    "grad": lambda f: chainrule.grad(number_of(f)),
    "grad_and_value": lambda f: chainrule.grad_and_value(number_of(f)),
    "jvp": lambda f: lambda x: chainrule.jvp(f, (x,), (x.cos(),)),
    "vjp": pulled_back,
    "linearize": linearized,
    "jacrev": chainrule.jacrev,
    "jacfwd": chainrule.jacfwd,
    "hessian": lambda f: chainrule.hessian(number_of(f)),
    "hvp": lambda f: lambda x: chainrule.hvp(number_of(f), (x,), (x.cos(),)),
    "laplacian": lambda f: chainrule.laplacian(number_of(f)),
    "hessian_diagonal": lambda f: chainrule.hessian_diagonal(number_of(f)),
    "divergence": chainrule.divergence,
    "jet": lambda f: lambda x: chainrule.jet(f, (x,), ((x.cos(), x.sin()),)),
    "coo": lambda f: chainrule.jacobian(f, layout="sparse_coo"),
    "csr": lambda f: chainrule.jacfwd(f, layout="sparse_csr"),
    "coo hessian": lambda f: chainrule.hessian(number_of(f), layout="sparse_coo"),
    "csr triangle": lambda f: chainrule.hessian(number_of(f), layout="sparse_csr", triangular="lower"),
    "hessian map": lambda f: lambda x: chainrule.hessian(number_of(f), layout="operator")(x).dense(),
} | {f"map, {name}": lambda f, read=read: lambda x: read(linear_map(f, x)) for name, read in MAPS.items()}


def batch_of(x):
    return torch.stack([x, 2 * x, x.sin()])


def total(tree):
    return sum(leaf.sin().sum() for leaf in pytree.tree_leaves(tree))


NESTS = {
    "alone": lambda transform: transform,
    "vmap": lambda transform: lambda x: chainrule.vmap(transform)(batch_of(x)),
    "vmap of vmap": lambda transform: lambda x: chainrule.vmap(chainrule.vmap(transform))(batch_of(x)[None]),
    "grad": lambda transform: chainrule.grad(lambda x: total(transform(x))),
    "jacfwd": lambda transform: chainrule.jacfwd(lambda x: pytree.tree_leaves(transform(x))[0]),
    "vmap of grad": lambda transform: lambda x: chainrule.vmap(chainrule.grad(lambda y: total(transform(y))))(batch_of(x)),
}


def leaves_of(tree):
    leaves = pytree.tree_leaves(tree)
    return [leaf if leaf.layout is torch.strided else leaf.to_dense() for leaf in leaves]


def check(function, transform, nest, calls_before):
    made = NESTS[nest](TRANSFORMS[transform](FUNCTIONS[function]))
    point = torch.randn(N, dtype=DOUBLE, generator=GENERATOR)
    try:
        made(point)
    except RuntimeError as refusal:  # sparse results inside of derivatives and of nested vmaps
        assert "sparse" in str(refusal)
        return
    engine.CACHE.clear()
    for _ in range(calls_before):
        made(point)
    compiled = chainrule.compile(made)
    for _ in range(3):
        point = torch.randn(N, dtype=DOUBLE, generator=GENERATOR)
        found = leaves_of(compiled(point))
        engine.CACHE.clear()
        # The first call of a plain one, which the other tests compare with torch.func.
        expected = leaves_of(NESTS[nest](TRANSFORMS[transform](FUNCTIONS[function]))(point))
        assert len(found) == len(expected)
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("calls_before", [0, 2])
@pytest.mark.parametrize("nest", ["alone", "vmap"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_compiled(transform, nest, calls_before):
    check("gathered", transform, nest, calls_before)


@pytest.mark.slow
@pytest.mark.parametrize("calls_before", [0, 2])
@pytest.mark.parametrize("nest", NESTS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_nest_compiled(function, transform, nest, calls_before):
    check(function, transform, nest, calls_before)
