"""The opaque fallback: torch's own formula of a single op, in every mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils._pytree import tree_leaves

import chainrule
from chainrule.rules import opaque
from chainrule.rules.table import rule_for
from tests.rules.sweep_operator_database import sweep
from tests.rules.test_layers import assert_same, check, check_first, randn

aten = torch.ops.aten

CASES: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "matrix_exp": (torch.linalg.matrix_exp, (randn(2, 3, 3),)),
    "several_outputs": (lambda a: torch.linalg.qr(a), (randn(3, 2),)),
    "one_of_several_outputs": (lambda a: torch.linalg.qr(a)[1], (randn(3, 2),)),
    "unpool": (lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), (randn(1, 2, 4, 4),)),
}


def regular(size: int) -> torch.Tensor:
    """A matrix whose factorisations are all well conditioned."""
    return randn(size, size) + torch.diag(torch.arange(1.0, size + 1, dtype=torch.float64))


@pytest.mark.parametrize("name", CASES)
def test_opaque(name: str) -> None:
    """Every mode agrees with torch.func."""
    check(*CASES[name])


def test_kind_is_named() -> None:
    """An op without a rule says so."""
    assert rule_for(aten.linalg_householder_product.default).kind == "opaque"


def test_forward_mode_of_an_op_whose_backward_has_no_derivative() -> None:
    """The local Jacobian is built from pullbacks where the pullback itself cannot be differentiated."""
    targets, lengths = torch.tensor([[1, 2, 1], [1, 1, 2]]), [[6, 6], [3, 2]]

    def loss(x: torch.Tensor) -> torch.Tensor:
        return F.ctc_loss(F.log_softmax(x, -1), targets, *lengths)

    x = randn(6, 2, 4)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(leaf), leaf)
    assert_same(chainrule.jacrev(loss)(x), wanted)
    assert_same(chainrule.jacfwd(loss)(x), wanted)


def test_result_joins_torch_autograd() -> None:
    """A Jacobian through an opaque op has a gradient when its input requires one."""
    x = randn(3, 3).requires_grad_()
    (got,) = torch.autograd.grad(chainrule.jacrev(torch.linalg.matrix_exp)(x).sin().sum(), x)
    wanted = torch.func.grad(lambda y: torch.func.jacrev(torch.linalg.matrix_exp)(y).sin().sum())(x.detach())
    assert_same(got, wanted)


TRANSFORMED: dict[str, Callable[[Callable[..., Any], torch.Tensor], Any]] = {
    "jacrev": lambda f, x: chainrule.jacrev(f)(x),
    "jacfwd": lambda f, x: chainrule.jacfwd(f)(x),
    "jvp": lambda f, x: chainrule.jvp(f, (x,), (x,)),
    "vjp": lambda f, x: chainrule.vjp(f, x)[1](f(x)),
    "linearize": lambda f, x: chainrule.linearize(f, x)[1](x),
    "hessian": lambda f, x: chainrule.hessian(lambda y: f(y).sin().sum())(x),
    "forward over reverse": lambda f, x: chainrule.jacfwd(chainrule.jacrev(f))(x),
    "reverse over forward": lambda f, x: chainrule.jacrev(chainrule.jacfwd(f))(x),
    "forward over forward": lambda f, x: chainrule.jacfwd(chainrule.jacfwd(f))(x),
    "third": lambda f, x: chainrule.jacfwd(chainrule.hessian(lambda y: f(y).sin().sum()))(x),
    "jvp of jvp": lambda f, x: chainrule.jvp(lambda y: chainrule.jvp(f, (y,), (x,))[1], (x,), (x,)),
    "vmap of jacrev": lambda f, x: chainrule.vmap(chainrule.jacrev(f))(torch.stack([x, 1.1 * x])),
    "vmap of jacfwd": lambda f, x: chainrule.vmap(chainrule.jacfwd(f))(torch.stack([x, 1.1 * x])),
    "jacfwd of vmap": lambda f, x: chainrule.jacfwd(chainrule.vmap(f))(torch.stack([x, 1.1 * x])),
    "jacfwd of vmap of jacfwd": lambda f, x: chainrule.jacfwd(chainrule.vmap(chainrule.jacfwd(f)))(torch.stack([x, 1.1 * x])),
}
FORMULAS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "householder": lambda x: torch.linalg.householder_product(x.tril(-1) + torch.eye(3, dtype=x.dtype), x[0]),
    "complex_eigenvalues": lambda x: torch.linalg.eigvals(x).abs(),
    "fft": lambda x: torch.fft.fft(x).abs(),
    "unpool": lambda x: F.max_unpool2d(*F.max_pool2d(x[None, None], 2, 1, return_indices=True), 2, 1).exp(),
}


#: Those that run for minutes: third derivatives through a formula of many small steps.
LONG = {("householder", name) for name in ("third", "reverse over forward", "forward over reverse")}
PAIRS = [
    pytest.param(f, t, marks=pytest.mark.slow if (f, t) in LONG else (), id=f"{f}-{t}") for f in FORMULAS for t in TRANSFORMED
]


@pytest.mark.parametrize(("formula", "transform"), PAIRS)
def test_result_has_a_graph_only_where_an_input_has_one(formula: str, transform: str) -> None:
    """Torch's graph of the single op stays inside, in the planned and in the replayed run; gradients are joined to the input's."""
    f, run = FORMULAS[formula], TRANSFORMED[transform]
    x = regular(3)
    plain = tree_leaves(run(f, x))
    for leaf in (*plain, *tree_leaves(run(f, x))):
        assert not leaf.requires_grad and leaf.grad_fn is None
    assert not x.requires_grad
    assert_same(plain, tree_leaves(run(f, x.clone())))
    with torch.no_grad():
        assert not any(leaf.requires_grad for leaf in tree_leaves(run(f, x)))
    source = x.clone().requires_grad_()
    joined = tree_leaves(run(f, source))
    assert_same([leaf.detach() for leaf in joined], plain)
    assert all(leaf.requires_grad for leaf in joined)


@pytest.mark.parametrize("formula", FORMULAS)
def test_derivative_of_a_batched_derivative(formula: str) -> None:
    """A vmap between two derivatives: what torch saves for the backward is no constant for the outer one."""
    f, x = FORMULAS[formula], torch.stack([regular(3), 1.1 * regular(3)])
    wanted = torch.func.jacrev(torch.func.vmap(torch.func.jacrev(f)))(x)
    assert_same(chainrule.jacrev(chainrule.vmap(chainrule.jacrev(f)))(x), wanted)
    assert_same(chainrule.jacfwd(chainrule.vmap(chainrule.jacfwd(f)))(x), wanted)


def test_cotangent_that_requires_grad() -> None:
    """A pullback through an opaque op is differentiable with respect to its cotangent alone."""
    x, cotangent = regular(3), randn(3, 3).requires_grad_()
    pulled = chainrule.vjp(FORMULAS["fft"], x)[1](cotangent)[0]
    (got,) = torch.autograd.grad(pulled.sum(), cotangent)
    assert_same(got, chainrule.jvp(FORMULAS["fft"], (x,), (torch.ones_like(x),))[1])


def test_nested_transforms_keep_their_perturbations_apart() -> None:
    """An inner derivative through an opaque op is differentiated by the outer one."""
    x = randn(2, 2)

    def nested(transforms: Any) -> Any:
        return transforms.jacrev(lambda y: transforms.jacrev(lambda z: torch.linalg.matrix_exp(z * y))(x))(x)

    assert_same(nested(chainrule), nested(torch.func))


def test_index_relations_of_an_op_without_rows() -> None:
    """An output with no elements has an empty Jacobian."""
    check_first(torch.linalg.matrix_exp, (torch.zeros(0, 2, 2, dtype=torch.float64),))


#: Where torch.func is the one that is wrong, or gives another dtype in its reverse mode.
EXPECTED = {
    # mean and rstd: torch's derivatives of them are zero
    "native_layer_norm",
    # in forward mode torch's Jacobian of a cast has the dtype of the input
    "bfloat16", "float", "half",
    # torch.func disagrees with finite differences
    "as_strided_scatter",
    # NaN times the zeros of a basis vector: torch.func has NaN off the diagonal, here the diagonal alone has
    "__rpow__", "special.entr",
}  # fmt: skip


@pytest.mark.slow
def test_operator_database() -> None:
    """Nothing in PyTorch's operator database is wrong or fails where torch.func answers."""
    assert set(sweep(lambda name: True)) <= EXPECTED


def test_one_pullback_for_all_tensors() -> None:
    """The cotangents of all arguments of an opaque op come from one run of torch's formula."""
    lstm = torch.nn.LSTM(3, 4, batch_first=True)
    parameters = {name: p.detach() for name, p in lstm.named_parameters()}
    x = torch.randn(2, 5, 3)

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        out: torch.Tensor = chainrule.functional_call(lstm, parameters, (x,))[0]
        return (out**2).sum()

    report = chainrule.explain(chainrule.grad(loss))(parameters)
    assert sum(call["call"] == "pull" for account in report.accounts for call in account.calls) == 1
    expected = torch.func.grad(lambda p: (torch.func.functional_call(lstm, p, (x,))[0] ** 2).sum())(parameters)
    torch.testing.assert_close(chainrule.grad(loss)(parameters), expected)


def test_a_real_operand_beside_a_complex_one() -> None:
    """In closed form: torch's own backward of such a `where` raises."""
    condition = torch.tensor([True, False, True])
    x, tangent = torch.randn(2, 3, dtype=torch.float64).unbind(0)
    other, cotangent = torch.randn(2, 3, dtype=torch.complex128).unbind(0)
    kept = torch.where(condition, tangent, 0).to(torch.complex128)
    for function, active in (
        (lambda x: torch.where(condition, x, other), condition),
        (lambda x: torch.where(~condition, other, x), condition),
        (lambda x: torch.where(condition, x, other.sum()), condition),
    ):
        torch.testing.assert_close(chainrule.jvp(function, (x,), (tangent,))[1], kept)
        (pulled,) = chainrule.vjp(function, x)[1](cotangent)
        torch.testing.assert_close(pulled, torch.where(active, cotangent.real, 0))
        found = chainrule.vmap(lambda x, f=function: chainrule.jvp(f, (x,), (tangent,))[1])(torch.stack([x, x]))
        torch.testing.assert_close(found, torch.stack([kept, kept]))
    hessian = chainrule.hessian(lambda x: torch.where(condition, x, other).abs().pow(2).sum())(x)
    torch.testing.assert_close(hessian, torch.diag(2 * condition.to(torch.float64)))


def test_formula_is_differentiated_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pullback that nobody differentiates takes torch's kernel for it, which for layers of cells has no derivative of its own."""
    monkeypatch.setattr(opaque, "PULLBACKS", {})
    layer = torch.nn.LSTM(3, 4, num_layers=2)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def output(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return chainrule.functional_call(layer, parameters, (x,))[0]

    asked: list[bool] = []
    own = opaque.own_gradients

    def gradients(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["create_graph"])
        return own(*args, **kwargs)

    monkeypatch.setattr(opaque, "own_gradients", gradients)
    for _ in range(4):
        x, cotangent = torch.randn(5, 2, 3), torch.randn(5, 2, 4)
        leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}, x.clone().requires_grad_()
        wanted = torch.autograd.grad((torch.func.functional_call(layer, leaves[0], (leaves[1],))[0] * cotangent).sum(), tree_leaves(leaves))
        asked.clear()
        found = chainrule.vjp(output, parameters, x)[1](cotangent)
        assert asked
        assert not any(asked)
        for one, other in zip(tree_leaves(found), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # float32, sums of some tens of numbers

    def penalty(transforms: Any, x: torch.Tensor) -> torch.Tensor:
        call = torch.func.functional_call
        total = transforms.grad(lambda x: (call(layer, parameters, (x,))[0] ** 2).sum())(x)
        return (total * total).sum()

    x = torch.randn(5, 2, 3)
    wanted_penalty = torch.func.grad(lambda x: penalty(torch.func, x))(x)
    torch.testing.assert_close(chainrule.grad(lambda x: penalty(chainrule, x))(x), wanted_penalty, rtol=1e-4, atol=1e-5)
    leaf = x.clone().requires_grad_()
    penalty(chainrule, leaf).backward()
    torch.testing.assert_close(leaf.grad, wanted_penalty, rtol=1e-4, atol=1e-5)
