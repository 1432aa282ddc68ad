"""Compiled calls with sparse results whose pattern depends on the values of index tensors."""

from __future__ import annotations

import pytest
import torch

import chainrule
from chainrule.capture.whole_recorder import CompileError
from chainrule.execute import engine
from chainrule.execute.memory import planned_peak
from tests.transforms.test_blocks import peak_bytes

LAYOUTS = ("sparse_coo", "sparse_csr")


def close(found, expected):
    torch.testing.assert_close(found.to_dense(), expected.reshape(found.shape), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_closed_over_indices(layout):
    index, weights = torch.tensor([0, 2, 2, 1]), torch.randn(4, dtype=torch.float64)

    def gathered(x):
        return weights * x[index] ** 2 + x.roll(1)[index]

    def energy(x):
        return ((x[index] - x[index.flip(0)]) ** 4).sum() + (x[index] * x).sin().sum()

    for make, peer, function in (
        (chainrule.jacobian, torch.func.jacrev, gathered), (chainrule.hessian, torch.func.hessian, energy),
    ):  # fmt: skip
        compiled = chainrule.compile(make(function, layout=layout))
        for _ in range(3):
            x = torch.randn(4, dtype=torch.float64)
            close(compiled(x), peer(function)(x))
        assert compiled.cache_info()[:3] == (2, 1, 0)
        before = index.clone()
        index.copy_(torch.tensor([3, 1, 0, 0]))  # in place: the graph is for other values
        close(compiled(x), peer(function)(x))
        close(compiled(x), peer(function)(x))
        assert compiled.cache_info()[:3] == (3, 2, 0)
        index.copy_(before)  # and the first one is used again
        close(compiled(x), peer(function)(x))
        assert compiled.cache_info()[:3] == (4, 2, 0)


def test_indices_as_arguments_and_computed_ones():
    def gathered(x, index):
        return x[index + 1] ** 2

    compiled = chainrule.compile(chainrule.jacobian(gathered, layout="sparse_coo"))
    x = torch.randn(5, dtype=torch.float64)
    for index in ([0, 3], [0, 3], [2, 2], [0, 3]):
        close(compiled(x, torch.tensor(index)), torch.func.jacrev(gathered)(x, torch.tensor(index)))
    assert compiled.cache_info()[:3] == (2, 2, 0)


def test_places_that_values_select():
    def ordered(x):
        return torch.sort(x**2)[0] * torch.where(x > 0, x, 2 * x)

    compiled = chainrule.compile(chainrule.jacobian(ordered, layout="sparse_coo"))
    for _ in range(4):
        x = torch.randn(3, dtype=torch.float64)
        close(compiled(x), torch.func.jacrev(ordered)(x))
        close(compiled(x), torch.func.jacrev(ordered)(x))
    assert compiled.cache_info().hits >= 4


def test_random_numbers_and_writes():
    index, seen = torch.tensor([0, 2, 2, 1]), torch.zeros(4, dtype=torch.float64)
    noisy = chainrule.compile(chainrule.jacobian(lambda x: (x[index] + torch.rand(4)) ** 2, layout="sparse_coo"))
    x = torch.ones(4, dtype=torch.float64)
    for values in ([0, 2, 2, 1], [1, 1, 1, 1], [0, 2, 2, 1]):
        index.copy_(torch.tensor(values))
        found = noisy(x).coalesce()
        assert found.indices()[1].tolist() == values

    def counting(x):
        seen.add_(1.0)
        return x[index] ** 2

    compiled = chainrule.compile(chainrule.jacobian(counting, layout="sparse_coo"))
    for count in range(1, 4):
        close(compiled(x), torch.func.jacrev(lambda x: x[index] ** 2)(x))
        assert bool((seen == count).all())


def test_gathers_and_masks():
    compiled = chainrule.compile(lambda x, index: x[index].sin() + x[:, index.remainder(2)].sum())
    x = torch.randn(3, 4)
    for index in ([0, 2, 2], [1, 1, 0]):
        index = torch.tensor(index)
        torch.testing.assert_close(compiled(x, index), x[index].sin() + x[:, index.remainder(2)].sum())
    assert compiled.cache_info()[:3] == (1, 1, 0)
    with pytest.raises(CompileError, match="depends on values"):
        chainrule.compile(lambda x, mask: x[mask])(x, torch.tensor([True, False, True]))


@pytest.mark.parametrize("kind", ["coo", "csr", "csc"])
@pytest.mark.parametrize("product", ["vector", "matrix"])
def test_closed_over_sparse_matrices(kind, product):
    """They are inputs of the graph: what is written into them is seen; one with more entries is recorded anew."""
    torch.manual_seed(0)
    dense = torch.randn(6, 5, dtype=torch.float64) * (torch.rand(6, 5) < 0.4)
    point = torch.randn((5,) if product == "vector" else (5, 3), dtype=torch.float64)
    matrix = None

    def function(x):
        return (matrix @ x).sin() if product == "vector" else torch.sparse.mm(matrix, x).sin()

    total = lambda f: lambda x: f(x).square().sum()  # noqa: E731
    transforms = {
        "value": (lambda f: f, lambda f: f),
        "jacobian": (chainrule.jacobian, torch.func.jacrev),
        "gradient": (lambda f: chainrule.grad(total(f)), lambda f: torch.func.grad(total(f))),
        "hessian": (lambda f: chainrule.hessian(total(f)), lambda f: torch.func.hessian(total(f))),
        "sparse": (lambda f: chainrule.jacobian(f, layout="sparse_coo"), torch.func.jacrev),
        "norm": (lambda f: lambda x: chainrule.linear_map(f, x).norm(), lambda f: lambda x: torch.func.jacrev(f)(x).norm()),
        "mapped": (
            lambda f: lambda x: chainrule.vmap(chainrule.jacobian(f))(torch.stack([x, 2 * x]))[1],
            lambda f: lambda x: torch.func.jacrev(f)(2 * x),
        ),
    }
    make = {"coo": torch.Tensor.to_sparse, "csr": torch.Tensor.to_sparse_csr, "csc": torch.Tensor.to_sparse_csc}[kind]
    for name, (ours, theirs) in transforms.items():
        plain, matrix = dense.clone(), make(dense)
        compiled, expected = chainrule.compile(ours(function)), theirs(lambda x: (plain @ x).sin())  # noqa: B023
        for call in range(6):
            if call == 3:
                (matrix._values() if kind == "coo" else matrix.values()).mul_(2.0)
                plain.mul_(2.0)
            found = compiled(point + call)
            found = found.to_dense() if found.layout is not torch.strided else found
            torch.testing.assert_close(found, expected(point + call), rtol=1e-9, atol=1e-9, msg=f"{name} {call}")
        assert compiled.cache_info()[:3] == (5, 1, 0), name
        plain[0, 0], plain[5, 4] = 3.0, -1.0
        matrix = make(plain)
        found = compiled(point)
        found = found.to_dense() if found.layout is not torch.strided else found
        torch.testing.assert_close(found, expected(point), rtol=1e-9, atol=1e-9, msg=name)


def test_a_sparse_matrix_that_gets_other_entries_in_place():
    matrix, point = torch.eye(4, dtype=torch.float64).to_sparse(), torch.rand(4, dtype=torch.float64)
    for layout in ("dense", "sparse_coo"):
        compiled = chainrule.compile(chainrule.jacobian(lambda x: (matrix @ x).sin(), layout=layout))
        for other in (torch.eye(4), torch.eye(4), torch.eye(4).flip(0), torch.eye(4) + 1, torch.eye(4)):
            new = other.double().to_sparse()
            matrix.sparse_resize_and_clear_((4, 4), 2, 0).copy_(new)
            expected = torch.func.jacrev(lambda x: (other.double() @ x).sin())(point)  # noqa: B023
            torch.testing.assert_close(compiled(point).to_dense() if layout != "dense" else compiled(point), expected)


OTHERS = {
    "compiled": lambda transform, x: chainrule.compile(transform)(x),
    "mapped": lambda transform, x: chainrule.vmap(transform)(torch.stack([x, 2 * x])),
    "watched": lambda transform, x: chainrule.explain(transform)(x),
}


@pytest.mark.parametrize("before", OTHERS)
def test_plain_hessians_go_the_same_way_whatever_was_called_before(before: str) -> None:
    """A record of the call, or a vmap, takes gradient and Hessian apart; a plain call has one program for both."""
    mask, data, other = torch.rand(40, 30) < 0.5, torch.randn(40, 30), torch.randn(30, 3)

    def energy(u):
        return (mask * (data - u @ other.T).square()).sum()

    x = torch.randn(40, 3)
    transform = chainrule.hessian(energy, layout="sparse_csr")
    engine.CACHE.clear()
    for _ in range(6):  # until it takes the shortest way
        expected = transform(x)
    def peak() -> int:  # a profiled call may let go of a value earlier
        return max(peak_bytes(lambda: transform(x)) for _ in range(4))

    alone, planned = peak(), planned_peak(lambda: transform(x))
    assert abs(planned / alone - 1) <= 0.25
    engine.CACHE.clear()
    for _ in range(2):
        OTHERS[before](transform, x)
    for _ in range(6):
        torch.testing.assert_close(transform(x).to_dense(), expected.to_dense())
    assert peak() == alone
    OTHERS[before](transform, x)
    assert planned_peak(lambda: transform(x)) == planned
    dense = torch.func.hessian(energy)(x).reshape(120, 120)
    torch.testing.assert_close(expected.to_dense(), dense, rtol=1e-4, atol=1e-4)  # of float32, sums of 30


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("known", [False, True])
def test_of_a_batch_whatever_was_called_before(layout, known):
    mask, index = torch.tensor([True, False, True, True]), torch.tensor([2, 0, 3, 1])
    functions = {
        "stencil": lambda x: x.roll(1) * x - 2 * x,
        "mask": lambda x: torch.where(mask, x.roll(1) * x, 0),
        "gathered": lambda x: x[index].sin() * x,
        "running": lambda x: x.cumsum(0) * x,
    }
    for function in functions.values():
        for transform, peer, own in (
            (chainrule.jacobian, torch.func.jacrev, function),
            (chainrule.hessian, torch.func.hessian, lambda x, f=function: f(x).sin().sum()),
        ):
            mapped = chainrule.vmap(transform(own, layout=layout))
            if known:  # its plan is there before the record of the call
                mapped(torch.randn(3, 4, dtype=torch.float64))
            compiled = chainrule.compile(mapped)
            for _ in range(4):
                batch = torch.randn(3, 4, dtype=torch.float64)
                close(compiled(batch), torch.stack([peer(own)(x) for x in batch]))


def test_of_a_batch_with_other_indices_and_masks():
    def function(x, index, mask):
        return torch.where(mask, x[index] * x, 0)

    compiled = chainrule.compile(chainrule.vmap(chainrule.jacobian(function, layout="sparse_coo"), in_dims=(0, None, None)))
    generator = torch.Generator().manual_seed(0)
    for call in range(6):
        batch = torch.randn(3, 5, dtype=torch.float64)
        if call != 2:
            index = torch.randint(0, 5, (5,), generator=generator)
            mask = torch.rand(5, generator=generator) > 0.5
        expected = torch.stack([torch.func.jacrev(function)(x, index, mask) for x in batch])
        close(compiled(batch, index, mask), expected)


@pytest.mark.parametrize("read", [lambda m: m.sparse().to_dense(), lambda m: m.gram().sparse().to_dense(), lambda m: m.gram().dense()])
def test_maps_of_a_batch(read):
    def function(x):
        return x.roll(1) * x

    compiled = chainrule.compile(chainrule.vmap(lambda x: read(chainrule.linear_map(function, x))))
    for _ in range(3):
        batch = torch.randn(3, 4, dtype=torch.float64)
        expected = torch.stack([read(chainrule.linear_map(function, x)) for x in batch])
        jacobians = torch.stack([torch.func.jacrev(function)(x) for x in batch])
        grams = jacobians @ jacobians.mT
        found = compiled(batch)
        assert found.layout is torch.strided
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert torch.allclose(found, jacobians) or torch.allclose(found, grams)
