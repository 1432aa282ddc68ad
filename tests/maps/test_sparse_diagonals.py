"""Sparse maps where a diagonal meets itself: factors with both axes on it, and blocks of it on both sides of a sum."""

from __future__ import annotations

import pytest
import torch

import chainrule

DOUBLE = torch.float64
#: Sums of at most a few hundred products of numbers of size about ten.
CLOSE = {"rtol": 1e-11, "atol": 1e-10}
COLUMNS = torch.tensor([0.5, -1.5, 2.0], dtype=DOUBLE)


def slices_over_slices(x):
    y = torch.slice_scatter(x, x[:2], 0, 2, 4)
    return y @ y[:, :1] + y


def doubled(x):
    y = torch.cat([x[:2], x[:2]])
    return y @ y


def swapped(x):
    y = torch.cat([x[2:], x[:2]])
    return y @ y + y.t() @ torch.diag(x[0])


#: Functions with the shapes that they are tried at.
FUNCTIONS = {
    "rows": (lambda x: torch.diag(x[1]) @ x, [(2, 2), (4, 4), (3, 3)]),
    "rows, wide": (lambda x: torch.diag(x[:, 0]) @ x, [(2, 3), (3, 1), (1, 4), (1, 1)]),
    "columns": (lambda x: x @ torch.diag(x[:, 1]), [(2, 2), (4, 4)]),
    "columns, wide": (lambda x: x @ torch.diag(x[0]), [(2, 3), (3, 1), (1, 4)]),
    "squares": (lambda x: torch.diag(x) @ x, [(4,), (1,)]),
    "row by diagonal": (lambda x: x @ torch.diag(x), [(3,)]),
    "outer": (lambda x: torch.diag(x) @ torch.outer(x, x), [(3,), (1,)]),
    "constant columns": (lambda x: torch.diag(x) @ (x[:, None] * COLUMNS), [(4,), (2,), (1,)]),
    "between diagonals": (lambda x: torch.diag(x) @ torch.diag(x.sin()) @ torch.diag(x), [(3,)]),
    "einsum": (lambda x: torch.einsum("ij,jk->ik", torch.diag(x[1]), x), [(3, 3)]),
    "stack": (lambda x: torch.diag_embed(x) @ x[..., None], [(2, 3), (3, 2)]),
    "diagonal of a product": (lambda x: torch.diag_embed((x @ x).diagonal()) @ x[:, :1] + x, [(3, 3), (4, 4)]),
    "other diagonal": (lambda x: torch.diag(x[1:], 1) @ x + torch.diag(x[:-1], -1) @ x, [(4,)]),
    "trace": (lambda x: torch.diag(x[0]).trace() * (torch.diag(x[1]) @ x), [(3, 3)]),
    "triangle": (lambda x: torch.diag(x[0]).tril() @ x.triu(), [(3, 3)]),
    "slices over slices": (slices_over_slices, [(4, 4)]),
    "doubled": (doubled, [(4, 4)]),
    "swapped": (swapped, [(4, 4)]),
}
CASES = [(name, shape) for name, (_, shapes) in FUNCTIONS.items() for shape in shapes]


def point(shape):
    return torch.randn(shape, dtype=DOUBLE)


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_jacobian(name, shape, layout):
    function, x = FUNCTIONS[name][0], point(shape)
    expected = torch.func.jacrev(function)(x)
    for transform in (chainrule.jacobian, chainrule.jacrev, chainrule.jacfwd):
        found = transform(function, layout=layout)(x).to_dense()
        torch.testing.assert_close(found.reshape(expected.shape), expected, **CLOSE)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_linear_map(name, shape):
    function, x = FUNCTIONS[name][0], point(shape)
    found = chainrule.linear_map(function, x)
    dense = torch.func.jacrev(function)(x).reshape(-1, x.numel())
    torch.testing.assert_close(found.sparse(flat=True).to_dense(), dense, **CLOSE)
    torch.testing.assert_close(found.gram().sparse(flat=True).to_dense(), dense @ dense.T, **CLOSE)
    torch.testing.assert_close(found.norm(), dense.norm(), **CLOSE)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_hessian(name, shape):
    function, x = FUNCTIONS[name][0], point(shape)
    energy = lambda u: (function(u) ** 2).sum()  # noqa: E731
    expected = torch.func.hessian(energy)(x)
    found = chainrule.hessian(energy, layout="sparse_coo")(x).to_dense()
    # Fourth powers of such sums.
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11 * (1 + float(expected.abs().max())))


def test_pattern_of_a_scaled_row():
    """``out[i, j] = x[1, i] x[i, j]`` has two numbers in a row at most, and no row is dense."""
    x = point((5, 5))
    found = chainrule.jacobian(lambda u: torch.diag(u[1]) @ u, layout="sparse_coo")(x)
    assert found._nnz() == 25 + 25 - 1


def test_empty():
    x = torch.zeros(0, 3, dtype=DOUBLE)
    found = chainrule.jacobian(lambda u: torch.diag(u[:, 0]) @ u, layout="sparse_coo")(x)
    assert found.shape == (0, 3, 0, 3)
    assert found._nnz() == 0


def test_mapped_index_under_vmap_is_refused():
    """Its samples are not compared: an index that all of them share is passed as one."""
    x, index = point((3, 4)), torch.tensor([0, 2, 1])
    sparse = chainrule.jacobian(lambda u, i: u[i], layout="sparse_coo")
    with pytest.raises(RuntimeError, match="in_dims=None"):
        chainrule.vmap(sparse)(x, index.expand(3, 3).clone())
    found = chainrule.vmap(sparse, in_dims=(0, None))(x, index)
    torch.testing.assert_close(found.to_dense()[1], torch.eye(4, dtype=DOUBLE)[index])
