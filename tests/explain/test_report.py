"""``explain``: its text and its data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import chainrule
from chainrule.plan.patterns import dense_parts
from tests.transforms.test_blocks import peak_bytes


def test_text_names_ops_orders_and_costs() -> None:
    found = chainrule.explain(chainrule.jacobian(lambda x: torch.tanh(x).sum()))(torch.randn(4))
    text = str(found)
    for part in ("aten.tanh.default", "structured", "pointwise", "order:", "flops", "peak", "program:"):
        assert part in text
    assert torch.equal(found.result, chainrule.jacobian(lambda x: torch.tanh(x).sum())(torch.randn(4))) is False


def test_data_holds_every_alternative_of_a_free_choice() -> None:
    found = chainrule.explain(chainrule.jacobian(torch.sin))(torch.randn(4))
    orders = {alternative["order"] for alternative in found.data[0]["alternatives"]}
    assert {"forward", "reverse", "network", "greedy"} <= orders
    assert all(a["peak_bytes"] >= 0 and a["flops"] >= 0 for a in found.data[0]["alternatives"])


def test_pinned_orders_are_kept_and_compared() -> None:
    found = chainrule.explain(chainrule.jacfwd(torch.sin))(torch.randn(4))
    assert found.accounts[0].chosen == "forward"
    assert len(found.accounts[0].alternatives) > 1


def test_opaque_and_decomposed_ops_are_named() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, g):  # type: ignore[no-untyped-def]
            (x,) = ctx.saved_tensors
            return 3 * g * x**2

    found = chainrule.explain(chainrule.jacrev(Cube.apply))(torch.randn(3))
    assert any("Cube" in name for name in found.opaque)
    parts = chainrule.explain(chainrule.jacrev(lambda x: torch.einsum("ii->i", x)))(torch.randn(3, 3))
    assert any(op["kind"] == "decomposed" for op in parts.accounts[0].ops)


def test_nested_transforms_have_one_account_each() -> None:
    found = chainrule.explain(chainrule.hessian(lambda x: (x**3).sum()))(torch.randn(3))
    assert len(found.accounts) == 2
    assert found.accounts[0].output_shapes == [()]


def test_nothing_to_explain() -> None:
    assert "nothing" in str(chainrule.explain(chainrule.jacrev(lambda x: torch.ones(2)))(torch.randn(3)))


def test_contractions_are_explained() -> None:
    weight, x = torch.randn(5, 4), torch.randn(4)
    for transform, kind in (
        (chainrule.laplacian, "laplacian"),
        (chainrule.hessian_diagonal, "hessian_diagonal"),
        (chainrule.ntk, "gram"),
    ):
        account = chainrule.explain(transform(lambda x: torch.tanh(weight @ x).sum()))(x)
        (data,) = account.data
        assert data["kind"] == kind
        assert data["alternatives"][0]["flops"] > 0
        assert data["alternatives"][0]["peak_bytes"] > 0
        assert [op["op"] for op in data["ops"]] == ["aten.matmul.default", "aten.tanh.default", "aten.sum.default"]
        assert "tanh" in str(account)
    account = chainrule.explain(chainrule.divergence(lambda x: torch.tanh(weight.t() @ (weight @ x))))(x)
    assert account.data[0]["kind"] == "trace" and "trace of the Jacobian" in str(account)


WEIGHT = torch.randn(256, 256) / 16
NETWORK = torch.nn.Sequential(
    torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(8 * 15 * 15, 10)
).requires_grad_(False)


def field(x):
    return torch.tanh(WEIGHT.T @ torch.tanh(WEIGHT @ x))


def energy(x):
    return field(x).pow(2).sum()


CALLS = {
    "divergence": (chainrule.divergence(field), (256,)),
    "divergences": (chainrule.divergence(field, in_dims=0), (64, 256)),
    "laplacians": (chainrule.laplacian(energy, in_dims=0), (8, 256)),
    "diagonal": (chainrule.hessian_diagonal(energy), (256,)),
    "network": (chainrule.grad(lambda x: NETWORK(x).pow(2).sum()), (32, 3, 32, 32)),
    "network per sample": (chainrule.vmap(chainrule.grad(lambda x: NETWORK(x[None]).pow(2).sum())), (32, 3, 32, 32)),
    "hvp": (lambda x: chainrule.hvp(lambda x: field(x).pow(3).sum(), (x,), (x,)), (256, 400)),
    "jet": (lambda x: chainrule.jet(field, (x,), ([x, x, x],)), (256, 300)),
    "gradient": (chainrule.grad(lambda x: (x.sin() * x.exp() + x**2).sum()), (300000,)),
    "gradient in a gradient": (
        chainrule.grad(lambda x: chainrule.grad(lambda y: (y.sin() * y.exp()).sum())(x).sin().sum()), (300000,)
    ),
    "layer norm": (chainrule.grad(lambda x: torch.nn.functional.layer_norm(x, (256,)).pow(3).sum()), (1000, 256)),
    "sparse Hessian": (chainrule.hessian(lambda x: (x[1:] * x[:-1]).sin().sum(), layout="sparse_coo"), (50000,)),
    "third derivative": (chainrule.jacfwd(chainrule.jacrev(chainrule.grad(lambda x: (WEIGHT[:48, :48] @ x).sin().sum()))), (48,)),
    "mapped twice": (chainrule.vmap(chainrule.vmap(chainrule.grad(energy))), (20, 20, 256)),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_the_peak_is_that_of_the_whole_call(name):
    function, shape = CALLS[name]
    x = torch.randn(shape)
    explained = chainrule.explain(function)(x)
    measured = peak_bytes(lambda: function(x))
    assert abs(explained.peak / measured - 1) <= 0.25, (explained.peak, measured)
    assert "the whole call holds" in str(explained)


def test_random_numbers_are_not_used_up():
    function = chainrule.grad(lambda x: (x * torch.randn(3)).sum())
    torch.manual_seed(0)
    first, second = function(torch.ones(3)), function(torch.ones(3))
    torch.manual_seed(0)
    torch.testing.assert_close(chainrule.explain(function)(torch.ones(3)).result, first)
    torch.testing.assert_close(function(torch.ones(3)), second)


def test_the_peak_of_a_compiled_function_is_that_of_its_graph() -> None:
    transformed = chainrule.hessian(lambda x: ((WEIGHT[:40, :30] @ x)[:, None] * WEIGHT[:40]).pow(2).sum())
    compiled, x = chainrule.compile(transformed), torch.randn(30)
    for _ in range(3):  # a cold one, one with a graph, and one whose calls are written out
        assert chainrule.explain(compiled)(x).peak == peak_bytes(lambda: compiled(x)) > 0
    assert peak_bytes(lambda: transformed(x)) > 1.5 * peak_bytes(lambda: compiled(x))  # which runs what the Hessian needs alone
    assert chainrule.explain(transformed)(x).peak == peak_bytes(lambda: transformed(x))
    within = chainrule.explain(lambda x: compiled(x).sum())(x)
    assert within.peak >= peak_bytes(lambda: compiled(x))


def test_dense_parts_of_sparse_results_are_named() -> None:
    weight = torch.randn(5, 6)
    call = chainrule.jacobian(lambda x: torch.cat([x * x.roll(1), weight @ x]), layout="sparse_coo")
    found = chainrule.explain(call)(torch.randn(6))
    assert "5×6 (a dense block of 5 × 6)" in str(found)
    (block,) = found.data[0]["blocks"]
    assert sorted(block["parts"], key=str) == [(1, 5, 6), None, None]
    call = chainrule.jacobian(lambda x: x @ weight.T, layout="sparse_coo")
    assert "4 dense blocks of 5 × 6" in str(chainrule.explain(call)(torch.randn(4, 6)))
    assert "4 dense blocks of 5 × 6" in str(chainrule.explain(chainrule.vmap(call))(torch.randn(2, 4, 6)))


def test_dense_parts() -> None:
    places = torch.arange(36).reshape(6, 6)
    assert dense_parts(places[:4, 1:3].reshape(-1), 6) == (1, 4, 2)
    assert dense_parts(torch.cat([places[:2, 3:].reshape(-1), places[[3, 5], :3].reshape(-1)]), 6) == (2, 2, 3)
    # Rows and columns of three each, which are no blocks: a periodic stencil.
    stencil = torch.cat([places.diagonal(), places.roll(1, 1).diagonal(), places.roll(2, 1).diagonal()])
    assert dense_parts(stencil, 6) is None
    assert dense_parts(places.diagonal(), 6) is None
    assert dense_parts(places[0], 6) is None
    assert dense_parts(places[:, 0], 6) is None
    assert dense_parts(torch.cat([places[:2, :2].reshape(-1), places[3, 3:]]), 6) is None
    assert dense_parts(places[:0, 0], 6) is None


MLP = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).requires_grad_(False)
SWEEPS = {
    "jvp": (lambda x: chainrule.jvp(MLP, (x,), (x,)), 5 * 8 + 8 * 3),
    "vjp": (lambda x: chainrule.vjp(MLP, x)[1](torch.ones(3)), 5 * 8 + 8 * 3),
    "ggn": (lambda x: chainrule.ggn(MLP, lambda z: z.logsumexp(0), (x,), (x,)), 2 * (5 * 8 + 8 * 3)),
    "hvp": (lambda x: chainrule.hvp(lambda y: MLP(y).square().sum(), (x,), (x,)), 4 * (5 * 8 + 8 * 3)),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_sweeps_have_a_cost_per_step(name: str) -> None:
    """The products with the weights are counted, and the element-wise steps beside them are fewer."""
    function, products = SWEEPS[name]
    found = chainrule.explain(function)(torch.randn(5))
    steps = [step for account in found.accounts for step in account.steps]
    assert products <= sum(step["flops"] for step in steps) <= 2 * products
    assert all(step["bytes"] > 0 for step in steps)
    for account in found.accounts:
        assert sum(s["flops"] for s in account.steps) == account.alternatives[0]["flops"]
    assert "steps:" in str(found) and "0 flops       0 B moved" not in str(found)


def test_blocks_of_a_jacobian_are_explained_by_the_first() -> None:
    x = torch.randn(5)
    found = chainrule.explain(chainrule.jacobian_blocks(MLP, rows=2))(x)
    assert found.result.rows == slice(0, 2) and len(found.accounts) == 1 and found.peak > 0
    assert "Jacobian of outputs (2,) with respect to inputs (5,)" in str(found)


def test_a_plain_vmap_has_a_peak() -> None:
    found = chainrule.explain(chainrule.vmap(torch.sin))(torch.randn(100, 3))
    assert found.peak >= 1200 and "nothing was differentiated" in str(found) and "at the peak" in str(found)


def _map(x: torch.Tensor) -> chainrule.LinearMap:
    return chainrule.linear_map(MLP, x)


LINEAR_MAPS = {
    "dense": (lambda x: _map(x).dense(), "blocks of the Jacobian"),
    "rows": (lambda x: _map(x)[0], "blocks of the Jacobian"),
    "diagonal": (lambda x: chainrule.linear_map(torch.sin, x).diagonal(), "diagonal of the Jacobian"),
    "product": (lambda x: (_map(x) @ _map(x).T).dense(), "blocks of the Jacobian"),
    "sum": (lambda x: (_map(x) + _map(x)).dense(), "blocks of the Jacobian"),
    "trace of a product": (lambda x: (_map(x) @ _map(x).T).trace(), "trace of the Jacobian"),
}


@pytest.mark.parametrize("name", LINEAR_MAPS)
def test_linear_maps_are_explained(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    function, title = LINEAR_MAPS[name]
    x = torch.randn(5)
    found = chainrule.explain(function)(x)
    torch.testing.assert_close(found.result, function(x))
    assert title in str(found) and found.peak > 0 and "<svg" in found._repr_html_()
    found.save(tmp_path / "plan.svg")
    assert (tmp_path / "plan.svg").stat().st_size > 0


def _squares(x: torch.Tensor) -> torch.Tensor:
    return MLP(x).square().sum()


OPERATORS = {
    "jacobian": (chainrule.jacobian(lambda x: MLP(x), layout="operator"), ["pushforward (jvp)", "pullback (vjp)"]),
    "hessian": (chainrule.hessian(_squares, layout="operator"), ["Jacobian", "pushforward (jvp)"]),
    "with aux": (
        chainrule.jacobian(lambda x: (MLP(x), x), has_aux=True, layout="operator"),
        ["pushforward (jvp)", "pullback (vjp)"],
    ),
    "product": (lambda x: _map(x) @ _map(x).T, ["pushforward (jvp)", "pullback (vjp)"]),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_explained_by_a_product_from_each_side(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    function, titles = OPERATORS[name]
    x = torch.randn(5)
    found = chainrule.explain(function)(x)
    text = str(found)
    assert "its product with one vector" in text and "nothing was differentiated" not in text
    assert ("that of its transpose" in text) is ("pullback (vjp)" in titles)
    assert {title for title in ("Jacobian of", *titles) if title in text} >= set(titles)
    assert found.peak > 0 and "<svg" in found._repr_html_()
    found.save(tmp_path / "plan.svg")
    vector = torch.randn(3 if name == "product" else 5)
    made, wanted = (value[0] if isinstance(value, tuple) else value for value in (found.result, function(x)))
    torch.testing.assert_close(made @ vector, wanted @ vector)
