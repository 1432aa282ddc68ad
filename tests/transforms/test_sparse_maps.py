"""Linear maps as sparse tensors: against their dense matrices, by plans that are made once per signature."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import chainrule
from chainrule import linear_map
from chainrule.execute import engine
from chainrule.execute import sparse as execute_sparse
from tests.transforms.map_kinds import make_kinds, matrix_of, randn
from tests.transforms.sparse_functions import HESSIANS, JACOBIANS

#: Sums of at most a few hundred products of numbers of size below about 100, in float64.
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The requests that are planned, as they are."""
    requests: list[Any] = []
    original = execute_sparse.plan_sparse

    def noting(tape: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        requests.append(request)
        return original(tape, request, *args, **kwargs)

    engine.CACHE.clear()
    monkeypatch.setattr(execute_sparse, "plan_sparse", noting)
    return requests


def upwind(u: torch.Tensor) -> torch.Tensor:
    return torch.where(u > 0, u - torch.roll(u, 1), torch.roll(u, -1) - u) * u


def chain(x: torch.Tensor) -> torch.Tensor:
    return ((x[1:] - x[:-1] ** 2) ** 2).sum()


ALGEBRA = {
    "itself": (lambda J, K: J, lambda j, k: j),
    "transpose": (lambda J, K: J.T, lambda j, k: j.T),
    "sum": (lambda J, K: J + K, lambda j, k: j + k),
    "difference": (lambda J, K: J - 3 * K, lambda j, k: j - 3 * k),
    "multiple": (lambda J, K: J * torch.tensor(2.0, dtype=torch.float64) / 4, lambda j, k: j / 2),
    "product": (lambda J, K: J.T @ K, lambda j, k: j.T @ k),
    "gram": (lambda J, K: J.gram(), lambda j, k: j @ j.T),
    "normal": (lambda J, K: J.normal() + K.normal(), lambda j, k: j.T @ j + k.T @ k),
    "longer": (lambda J, K: (J.T @ K).T @ (J.T @ K) + J.normal(), lambda j, k: (j.T @ k).T @ (j.T @ k) + j.T @ j),
}


@pytest.mark.parametrize("name", ALGEBRA)
def test_expressions(name: str, planned: list[Any]) -> None:
    """Made anew each time, planned once; other values of the same signature need no other plan."""
    of_maps, of_matrices = ALGEBRA[name]
    first = lambda x: torch.sin(x[1:]) * x[:-1]  # noqa: E731
    second = lambda x: x[1:] ** 3 + x[2:].sum() * x[0]  # noqa: E731
    for _ in range(3):
        x = randn(6)
        found = of_maps(linear_map(first, x), linear_map(second, x))
        expected = of_matrices(matrix_of(first, (x,)), matrix_of(second, (x,)))
        block = found.sparse()
        assert block.is_coalesced()
        torch.testing.assert_close(block.to_dense(), expected, **TOLERANCE)
        torch.testing.assert_close(found.sparse(flat=True).to_dense(), expected, **TOLERANCE)
    assert len(planned) <= 4, "two requests, and that for the Jacobian itself"


@pytest.mark.parametrize("name", ["trees", "two arguments", "same twice", "constant", "empty input", "empty output", "scalar", "float32"])
def test_trees(name: str, planned: list[Any]) -> None:
    kind = make_kinds()[name]
    expected = matrix_of(kind.function, kind.primals)
    for _ in range(2):
        J = linear_map(kind.function, *kind.primals)
        torch.testing.assert_close(J.sparse(flat=True).to_dense(), expected)
        for one, two in zip(pytree.tree_leaves(J.sparse()), pytree.tree_leaves(J.dense()), strict=True):
            assert one.dtype == two.dtype
            torch.testing.assert_close(one.to_dense(), two)
    count = len(planned)
    J = linear_map(kind.function, *kind.primals)
    J.sparse(), J.sparse(flat=True)
    assert len(planned) == count


@pytest.mark.parametrize("name", JACOBIANS)
def test_functions(name: str) -> None:
    """The pattern is that of the sparse Jacobian."""
    function, x = JACOBIANS[name]
    found = linear_map(function, x).sparse()
    expected = chainrule.jacobian(function, layout="sparse_coo")(x)
    assert torch.equal(found.indices(), expected.indices())
    torch.testing.assert_close(found.to_dense(), torch.func.jacrev(function)(x), **TOLERANCE)


@pytest.mark.parametrize("name", [name for name, (function, x) in HESSIANS.items() if function(x).dim() == 0])
def test_hessians(name: str, planned: list[Any]) -> None:
    function, x = HESSIANS[name]
    expected = torch.func.hessian(function)(x)
    for _ in range(3):
        found = chainrule.hessian(function, layout="operator")(x).sparse()
        torch.testing.assert_close(found.to_dense(), expected, **TOLERANCE)
    assert len(planned) <= 2


def test_hessian_of_a_tree() -> None:
    function = lambda p: (p["a"][:, None] * p["b"][None]).sin().sum() + (p["a"] ** 3).sum()  # noqa: E731
    p = {"a": randn(3), "b": randn(4)}
    expected = torch.func.hessian(lambda v: function({"a": v[:3], "b": v[3:]}))(torch.cat([p["a"], p["b"]]))
    H = chainrule.hessian(function, layout="operator")(p)
    torch.testing.assert_close(H.sparse(flat=True).to_dense(), expected, **TOLERANCE)
    torch.testing.assert_close(H.sparse()["b"]["a"].to_dense(), expected[3:, :3], **TOLERANCE)
    torch.testing.assert_close(H.normal().sparse(flat=True).to_dense(), expected @ expected, **TOLERANCE)


def test_plans_follow_index_tensors(planned: list[Any]) -> None:
    x = randn(4)
    for values in ([0, 2, 1, 1], [3, 3, 0, 1], [0, 2, 1, 1]):
        index = torch.tensor(values)
        function = lambda y, index=index: y[index] * y  # noqa: E731
        J = linear_map(function, x)
        matrix = torch.func.jacrev(function)(x)
        torch.testing.assert_close(J.sparse().to_dense(), matrix, **TOLERANCE)
        torch.testing.assert_close(J.gram().sparse().to_dense(), matrix @ matrix.T, **TOLERANCE)
    assert len(planned) == 4  # each of two patterns, for each of two maps


def test_only_values_are_computed_again() -> None:
    """What a further map's sparse form calls is what the sparse Jacobian calls: no indices are made."""
    x = randn(50)
    sparse = chainrule.jacobian(upwind, layout="sparse_coo")
    J = linear_map(upwind, x)
    for _ in range(2):
        sparse(x), J.sparse()
    other = linear_map(upwind, x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        other.sparse()
    names = [event.name for event in recorded.events()]
    assert not {"aten::sort", "aten::searchsorted", "aten::div", "aten::_coalesce", "aten::nonzero"}.intersection(names), names


def test_values_carry_a_graph() -> None:
    x = randn(6).requires_grad_()
    (linear_map(upwind, x).normal().sparse().to_dense() ** 2).sum().backward()
    matrix = torch.func.jacrev(upwind)(x)
    (expected,) = torch.autograd.grad(((matrix.T @ matrix) ** 2).sum(), x)
    torch.testing.assert_close(x.grad, expected, **TOLERANCE)


def test_under_vmap() -> None:
    batch = randn(4, 6)
    expected = torch.func.vmap(torch.func.jacrev(upwind))(batch)
    for _ in range(3):
        found = chainrule.vmap(lambda x: linear_map(upwind, x).sparse())(batch)
        torch.testing.assert_close(found.to_dense(), expected, **TOLERANCE)
        gram = chainrule.vmap(lambda x: linear_map(upwind, x).gram().sparse(flat=True))(batch)
        torch.testing.assert_close(gram.to_dense(), expected @ expected.mT, **TOLERANCE)


def test_complex_values_are_refused() -> None:
    with pytest.raises(RuntimeError, match="complex values between"):
        linear_map(lambda x: torch.fft.rfft(x).abs(), randn(5)).sparse()


def test_large_products_stay_sparse() -> None:
    """A product of stencils with 100 000 rows: linear in its entries."""
    x = randn(100_000)
    J = linear_map(lambda u: torch.roll(u, 1) * u, x)
    assert J.normal().sparse()._nnz() == 3 * 100_000
    assert (J.T + J).sparse()._nnz() == 3 * 100_000
