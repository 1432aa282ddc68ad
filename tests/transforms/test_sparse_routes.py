"""Sparse layouts of functions that nothing is around: one plan for every run is replayed by the compiled handlers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import chainrule
from chainrule.dispatch import KNOWS_STATE
from chainrule.execute.engine import CACHE
from chainrule.transforms import sparse

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")

Tensor = torch.Tensor
#: Fewer than a hundred operations on numbers near one, in float64.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def stencil(x: Tensor) -> Tensor:
    return torch.cat([x[1:] * x[:-1], x[-1:].sin()])


def energy(x: Tensor) -> Tensor:
    return (stencil(x) ** 3).sum()


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The runs for which a plan was looked for in Python."""
    CACHE.clear()
    runs: list[Any] = []
    for name in ("find_plan", "_curvature"):
        original = getattr(sparse, name)
        monkeypatch.setattr(sparse, name, lambda *args, _original=original, **more: [runs.append(args), _original(*args, **more)][1])
    return runs


def compare(found: Tensor, expected: Tensor, layout: str) -> None:
    assert found.layout is getattr(torch, layout)
    shape = expected.shape if layout == "sparse_coo" else found.shape
    torch.testing.assert_close(found.to_dense(), expected.reshape(shape), **CLOSE)
    values = found.values()
    again = (
        torch.sparse_coo_tensor(found.indices(), values, found.shape, check_invariants=True)
        if layout == "sparse_coo"
        else torch.sparse_csr_tensor(found.crow_indices(), found.col_indices(), values, found.shape, check_invariants=True)
    )
    torch.testing.assert_close(again.to_dense(), found.to_dense())


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
@pytest.mark.parametrize("name", ["jacobian", "jacrev", "jacfwd", "hessian"])
def test_calls(name: str, layout: str, planned: list[Any]) -> None:
    function = energy if name == "hessian" else stencil
    transform = getattr(chainrule, name)(function, layout=layout)
    oracle = torch.func.hessian(energy) if name == "hessian" else torch.func.jacrev(stencil)
    earlier = []
    for size in (5, 5, 5, 1, 2, 5, 1):
        x = real(size)
        found = transform(x)
        compare(found, oracle(x), layout)
        earlier.append((found.values(), found.values().clone()))
    assert all(torch.equal(values, copy) for values, copy in earlier)  # each result has memory of its own
    # A first run plans; the plan of a Hessian is handed on in the second one.
    assert len(planned) == (7 if not KNOWS_STATE else 5 if name == "hessian" else 3)


@pytest.mark.parametrize("triangular", ["lower", "upper", None])
def test_triangles_have_their_own_plans(triangular: str | None) -> None:
    transform = chainrule.hessian(energy, layout="sparse_csr", triangular=triangular)
    for _ in range(4):
        x = real(6)
        expected = torch.func.hessian(energy)(x)
        expected = {"lower": expected.tril(), "upper": expected.triu(), None: expected}[triangular]
        compare(transform(x), expected, "sparse_csr")


def test_further_arguments() -> None:
    def function(scale: Any, x: Tensor, power: int = 2, shift: Tensor | None = None) -> Tensor:
        found = (scale * x) ** power
        return found if shift is None else found[1:] + shift

    transform = chainrule.jacobian(function, argnums=1, layout="sparse_coo")
    for power in (2, 2, 3, 2):
        scale, x, shift = real(4), real(4), real(3)
        expected = torch.func.jacrev(lambda x, power=power, scale=scale, shift=shift: function(scale, x, power, shift))(x)
        compare(transform(scale, x, power, shift=shift), expected, "sparse_coo")
        expected = torch.func.jacrev(lambda x, power=power: function(2.0, x, power))(x)
        compare(transform(2.0, x, power=power), expected, "sparse_coo")
    with pytest.raises(RuntimeError, match="argnum"):
        transform(1.0)


def test_a_plan_for_some_indices_serves_no_others(planned: list[Any]) -> None:
    index = torch.tensor([0, 2, 1])
    transform = chainrule.jacobian(lambda x: x[index].sin(), layout="sparse_coo")
    for values in ([0, 2, 1], [0, 2, 1], [2, 2, 0], [1, 1, 1], [0, 2, 1]):
        index.copy_(torch.tensor(values))
        x = real(3)
        compare(transform(x), torch.func.jacrev(lambda x: x[index].sin())(x), "sparse_coo")
    assert len(planned) == 5


def test_a_mask_that_is_left_out_is_looked_at(planned: list[Any]) -> None:
    mask = torch.tensor([True, False, True, True])
    transform = chainrule.jacobian(lambda x: torch.where(mask, x.sin(), 0.0), layout="sparse_csr")
    for values in ([1, 0, 1, 1], [1, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1], [1, 0, 0, 0]):
        mask.copy_(torch.tensor(values, dtype=torch.bool))
        x = real(4)
        compare(transform(x), torch.diag(x.cos() * mask), "sparse_csr")


def test_graphs_reach_what_requires_grad() -> None:
    weight = real(4).requires_grad_()
    transform = chainrule.jacobian(lambda x: weight * x.sin(), layout="sparse_coo")
    for _ in range(3):
        x = real(4)
        (found,) = torch.autograd.grad(transform(x).values().sum(), weight)
        torch.testing.assert_close(found, x.cos(), **CLOSE)
    for needs in (True, False, True):
        x = real(4).requires_grad_(needs)
        made = chainrule.jacobian(stencil, layout="sparse_coo")(x)
        assert made.values().requires_grad is needs
        if needs:
            (found,) = torch.autograd.grad(made.values().square().sum(), x)
            (expected,) = torch.autograd.grad(torch.func.jacrev(stencil)(x).square().sum(), x)
            torch.testing.assert_close(found, expected, **CLOSE)


def test_gradients_are_off() -> None:
    transform = chainrule.hessian(energy, layout="sparse_coo")
    for enabled in (True, False, False, True, True):
        with torch.set_grad_enabled(enabled):
            x = real(5).requires_grad_()
            assert transform(x).values().requires_grad is enabled
            compare(transform(x.detach()), torch.func.hessian(energy)(x.detach()), "sparse_coo")


def blocked(x: Tensor) -> Tensor:
    with torch.no_grad():
        factor = x.sin()
    return factor * x


def test_constants_by_no_grad() -> None:
    for name in ("jacobian", "jacrev", "jacfwd"):
        transform = getattr(chainrule, name)(blocked, layout="sparse_coo")
        for _ in range(3):
            x = real(3)
            oracle = torch.func.jacfwd if name == "jacfwd" else torch.func.jacrev
            compare(transform(x), oracle(blocked)(x), "sparse_coo")


def test_around_and_inside_of_others() -> None:
    inner = chainrule.jacobian(chainrule.grad(energy), layout="sparse_coo")
    outer = chainrule.vmap(chainrule.jacobian(stencil, layout="sparse_coo"))
    for _ in range(4):
        x = real(5)
        compare(inner(x), torch.func.hessian(energy)(x), "sparse_coo")
        compare(chainrule.jacobian(stencil, layout="sparse_coo")(x), torch.func.jacrev(stencil)(x), "sparse_coo")
        rows = real(3, 5)
        torch.testing.assert_close(outer(rows).to_dense(), torch.func.vmap(torch.func.jacrev(stencil))(rows), **CLOSE)
        with pytest.raises(RuntimeError, match="a sparse result inside of a function that is differentiated"):
            chainrule.jacobian(lambda x: chainrule.jacobian(stencil, layout="sparse_coo")(x).to_dense())(x)


def test_errors_of_the_function_leave_nothing_behind() -> None:
    calls: list[bool] = []

    def function(x: Tensor) -> Tensor:
        calls.append(True)
        if len(calls) == 3:
            raise ValueError("in the third run")
        return x.sin()

    transform = chainrule.jacobian(function, layout="sparse_coo")
    for number in range(1, 6):
        x = real(3)
        if number == 3:
            with pytest.raises(ValueError, match="in the third run"):
                transform(x)
            continue
        compare(transform(x), torch.diag(x.cos()), "sparse_coo")
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("change", [lambda x: (x, x.sin()), lambda x: x.sum() * torch.ones(2, 3, dtype=x.dtype), lambda x: x.detach()])
def test_other_results_take_the_usual_way(change: Callable[[Tensor], Any]) -> None:
    for _ in range(3):
        x = real(3)
        found = chainrule.jacobian(change, layout="sparse_coo")(x)
        expected = torch.func.jacrev(change)(x)
        for one, other in zip(*((t if isinstance(t, tuple) else (t,)) for t in (found, expected)), strict=True):
            compare(one, other, "sparse_coo")


def test_complex_results_are_refused() -> None:
    transform = chainrule.jacobian(lambda x: torch.complex(x, x), layout="sparse_coo")
    for _ in range(3):
        with pytest.raises(RuntimeError, match="complex"):
            transform(real(3))


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
def test_masks_that_are_always_others_are_values_of_one_plan(layout: str, planned: list[Any]) -> None:
    mask = torch.ones(4, dtype=torch.bool)
    transform = chainrule.jacobian(lambda x: torch.where(mask, x.sin(), x[:1]), layout=layout)
    for number in range(12):
        mask.copy_(torch.tensor([number & 8, number & 4, number & 2, number & 1]))
        x = real(4)
        compare(transform(x), torch.func.jacrev(lambda x: torch.where(mask, x.sin(), x[:1]))(x), layout)
        if number == 5:
            seen = len(planned)
    assert len(planned) == (seen if KNOWS_STATE else seen + 6)


def test_a_record_leaves_plain_calls_their_zeros_out() -> None:
    mask = torch.tensor([True, False, True, True])
    transform = chainrule.jacobian(lambda x: torch.where(mask, x.sin(), 0.0), layout="sparse_coo")
    compiled = chainrule.compile(transform)
    for _ in range(4):
        x = real(4)
        compare(compiled(x), torch.diag(x.cos() * mask), "sparse_coo")
        found = transform(x)
        compare(found, torch.diag(x.cos() * mask), "sparse_coo")
        assert found.values().numel() == 3
