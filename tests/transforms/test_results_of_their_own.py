"""Results belong to the caller: writing to one changes no later result, of this function or of another with the same plan."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

import chainrule

N = 6

#: Functions to a number, many with a constant Hessian or gradient.
NUMBERS = {
    "neighbours": lambda x: (x[1:] * x[:-1]).sum(),
    "square of a sum": lambda x: x.sum() ** 2,
    "cumulated": lambda x: (x.cumsum(0) * x).sum(),
    "linear": lambda x: 2 * x.sum(),
    "two of them": lambda x: x[0] * x[1],
    "curved": lambda x: x.sin().sum(),
}

#: Functions to a vector, many with a constant Jacobian.
VECTORS = {
    "stencil": lambda x: x.roll(1) - 2 * x + x.roll(-1),
    "selected": lambda x: x[::2].clone(),
    "both equal": lambda x: (x.roll(1) - x, x.roll(1) - x),
    "joined": lambda x: torch.cat([x, x]),
    "cumulated": lambda x: x.cumsum(0),
    "curved": lambda x: x * x,
}


def _directions(x):
    return torch.linspace(-1, 1, len(x), dtype=x.dtype)


OF_NUMBERS = {
    "hessian": lambda f, x: chainrule.hessian(f)(x),
    "hessian, sparse_coo": lambda f, x: chainrule.hessian(f, layout="sparse_coo")(x),
    "hessian, sparse_csr": lambda f, x: chainrule.hessian(f, layout="sparse_csr")(x),
    "diagonal of the operator": lambda f, x: chainrule.hessian(f, layout="operator")(x).diagonal(),
    "jacfwd(jacrev)": lambda f, x: chainrule.jacfwd(chainrule.jacrev(f))(x),
    "jacobian(grad)": lambda f, x: chainrule.jacobian(chainrule.grad(f))(x),
    "hvp": lambda f, x: chainrule.hvp(f, (x,), (_directions(x),)),
    "jvp(grad)": lambda f, x: chainrule.jvp(chainrule.grad(f), (x,), (_directions(x),)),
    "vmap(grad)": lambda f, x: chainrule.vmap(chainrule.grad(f))(torch.stack([x, 2 * x])),
    "vmap(hessian)": lambda f, x: chainrule.vmap(chainrule.hessian(f))(torch.stack([x, 2 * x])),
    "laplacian": lambda f, x: chainrule.laplacian(f)(x),
    "third derivative": lambda f, x: chainrule.jacobian(chainrule.hessian(f))(x),
}

OF_VECTORS = {
    "jacobian": lambda f, x: chainrule.jacobian(f)(x),
    "jacobian, sparse_coo": lambda f, x: chainrule.jacobian(f, layout="sparse_coo")(x),
    "jacfwd, sparse_csr": lambda f, x: chainrule.jacfwd(f, layout="sparse_csr")(x),
    "linear_map, sparse": lambda f, x: chainrule.linear_map(f, x).sparse(),
    "gram": lambda f, x: chainrule.linear_map(f, x).gram().dense(),
    "jacobian(jacobian)": lambda f, x: chainrule.jacobian(chainrule.jacobian(f))(x),
    "vmap(jacobian)": lambda f, x: chainrule.vmap(chainrule.jacobian(f))(torch.stack([x, 2 * x])),
    "jvp": lambda f, x: chainrule.jvp(f, (x,), (_directions(x),)),
}


def _values(tensor):
    if tensor.layout == torch.sparse_coo:
        return tensor._values()
    return tensor.values() if tensor.layout == torch.sparse_csr else tensor


def _as_dense(tensor):
    return tensor.to_dense() if tensor.layout != torch.strided else tensor.clone()


def _check(transform, func):
    expected = None
    for _ in range(4):
        x = torch.arange(1.0, N + 1, dtype=torch.float64)
        leaves = tree_leaves(transform(func, x))
        found = [_as_dense(leaf) for leaf in leaves]
        if expected is None:
            expected = found
        # The same calls on the same numbers.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        for leaf in leaves:
            before = [_as_dense(other) for other in leaves]
            _values(leaf).fill_(77)
            for other, kept in zip(leaves, before, strict=True):
                if other is not leaf:
                    torch.testing.assert_close(_as_dense(other), kept, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("transform", OF_NUMBERS)
def test_writing_to_a_result_changes_no_later_one(transform, name):
    _check(OF_NUMBERS[transform], NUMBERS[name])


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("transform", OF_VECTORS)
def test_writing_to_a_result_of_a_vector_changes_no_later_one(transform, name):
    _check(OF_VECTORS[transform], VECTORS[name])


def test_a_damped_hessian_leaves_the_plan_of_an_equal_function_alone():
    x = torch.ones(4, dtype=torch.float64)
    chainrule.hessian(lambda x: (x[1:] * x[:-1]).sum())(x).diagonal().add_(10.0)
    again = chainrule.hessian(lambda z: (z[1:] * z[:-1]).sum())(x)
    assert torch.equal(again, torch.diag(x[1:], 1) + torch.diag(x[1:], -1))


def test_compiled_sparse_results_are_their_own():
    compiled = chainrule.compile(chainrule.jacobian(VECTORS["stencil"], layout="sparse_coo"))
    x = torch.ones(N, dtype=torch.float64)
    first = compiled(x).to_dense()
    for _ in range(3):
        found = compiled(x)
        assert torch.equal(found.to_dense(), first)
        found._values().fill_(5)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # NumPy about torch's method
@pytest.mark.parametrize(
    "func",
    [
        lambda x: (torch.from_numpy(x.numpy() ** 2) * x).sum(),
        lambda x: (torch.as_tensor(np.asarray(x)) * x).sum(),
        lambda x: (torch.tensor(np.array(x)) * x).sum(),
        lambda x: (torch.from_numpy(np.from_dlpack(x)) * x).sum(),
        lambda x: torch.as_tensor(np.cosh(x)).sum(),
    ],
)
@pytest.mark.parametrize(
    "transform",
    [
        chainrule.grad,
        chainrule.jacfwd,
        chainrule.hessian,
        chainrule.laplacian,
        lambda f: chainrule.jacobian(f, layout="sparse_coo"),
        lambda f: lambda x: chainrule.jvp(f, (x,), (x,)),
        lambda f: lambda x: chainrule.vmap(chainrule.grad(f))(x[None]),
        lambda f: lambda x: chainrule.linear_map(f, x),
    ],
)
def test_arrays_of_what_is_differentiated_are_refused(transform, func):
    x = torch.rand(3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"numpy|__array__|__dlpack__"):
        transform(func)(x)


def test_arrays_of_what_is_not_differentiated_are_constants():
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    detached = chainrule.grad(lambda x: (torch.from_numpy(x.detach().numpy() ** 2) * x).sum())
    assert torch.equal(detached(x), x**2)
    forced = chainrule.grad(lambda x: (torch.from_numpy(x.numpy(force=True)) * x).sum())
    assert torch.equal(forced(x), x)
    weights = chainrule.jacobian(lambda x: torch.from_numpy(x.new_full((2,), 3.0).numpy()) * x)
    assert torch.equal(weights(x), torch.eye(2, dtype=torch.float64) * 3)
