"""Relations that lead back to where they came from: places that are selected along one dimension by those along the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import chainrule

COLUMNS = torch.tensor([[0], [1], [0]])
FIRST = torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64).expand(3, 2)


def written(x: Tensor) -> Tensor:
    y = x.clone()
    y[1:] = y[1:] + y[:-1].clone()
    return y


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows kept by a mask, columns by an index": lambda x: torch.where(
        FIRST > 0, torch.zeros(3, 2, dtype=x.dtype).scatter_add(1, COLUMNS, x.sum().reshape(1, 1).expand(3, 1)), 0.0
    ),
    "gather of what was written": lambda x: written(x).gather(1, COLUMNS).sum().sin(),
    "gather twice": lambda x: written(written(x).gather(1, COLUMNS.flip(0).expand(3, 2))).gather(0, COLUMNS[:2].T),
    "pooling of what was written": lambda x: torch.nn.functional.max_pool1d(written(x)[None], 2)[0].sum().cos(),
    "sums by index": lambda x: torch.zeros(2, 1, dtype=x.dtype)
    .index_add(0, COLUMNS[:, 0], written(x).gather(1, COLUMNS)).square(),
    "masked rows, then masked columns": lambda x: (
        torch.where(FIRST > 0, x.gather(1, COLUMNS.expand(3, 2)), 0.0).T.gather(1, COLUMNS[:2].expand(2, 2)).cumsum(1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_jacobians_and_hessians(name: str, layout: str) -> None:
    function = FUNCTIONS[name]

    def number(x: Tensor) -> Tensor:
        return function(x.sin()).sin().sum()

    for _ in range(3):
        x = torch.randn(3, 2, dtype=torch.float64)
        expected = torch.func.jacrev(function)(x)
        found = chainrule.jacobian(function, layout=layout)(x).to_dense()
        torch.testing.assert_close(found.reshape(expected.shape), expected)
        expected = torch.func.hessian(number)(x)
        found = chainrule.hessian(number, layout=layout)(x).to_dense()
        torch.testing.assert_close(found.reshape(expected.shape), expected)
        lower = chainrule.hessian(number, layout=layout, triangular="lower")(x).to_dense().reshape(6, 6)
        torch.testing.assert_close(lower, expected.reshape(6, 6).tril())


@pytest.mark.parametrize("seed", range(40))
def test_random_selections(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    rows, columns = int(integers(3)) + 2, int(integers(3)) + 2
    steps: list[Callable[[Tensor], Tensor]] = []
    n, m = rows, columns
    for _ in range(int(integers(6)) + 3):
        kind = int(integers(7))
        if kind == 0:
            index = integers(n, int(integers(4)) + 1, m)
            steps.append(lambda x, i=index: x.gather(0, i))  # type: ignore[misc]
            n = index.shape[0]
        elif kind == 1:
            index = integers(m, n, int(integers(4)) + 1)
            steps.append(lambda x, i=index: x.gather(1, i))  # type: ignore[misc]
            m = index.shape[1]
        elif kind == 2:
            keep = (integers(2, n, 1) > 0).expand(n, m) if int(integers(2)) else (integers(2, 1, m) > 0).expand(n, m)
            steps.append(lambda x, k=keep: torch.where(k, x, 0.0))  # type: ignore[misc]
        elif kind == 3:
            steps.append(written)
        elif kind == 4:
            index = integers(m + 1, n, m)
            steps.append(lambda x, i=index: x.new_zeros(x.shape[0], x.shape[1] + 1).scatter_add(1, i, x))  # type: ignore[misc]
            m += 1
        elif kind == 5:
            steps.append(lambda x: x.T)
            n, m = m, n
        else:
            steps.append(lambda x: x.sum(0, keepdim=True).expand(x.shape) * 1.5)

    def function(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    def number(x: Tensor) -> Tensor:
        return function(x.sin()).sum().sin()

    x = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(chainrule.jacobian(function, layout="sparse_coo")(x).to_dense(), torch.func.jacrev(function)(x))
    expected = torch.func.jacrev(torch.func.jacrev(number))(x)
    torch.testing.assert_close(chainrule.hessian(number, layout="sparse_coo")(x).to_dense(), expected)
