"""The predicted peak memory is what a call holds at once, as the allocator's events tell."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import chainrule
from chainrule.execute.memory import watching
from tests.transforms.test_blocks import peak_bytes

Tensor = torch.Tensor


OUTER, INNER = torch.randn(100, 50), torch.randn(120, 100)


def mlp(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).requires_grad_(False)


NET, SCALAR = mlp(12, 48, 48, 7), mlp(12, 64, 64, 1)
PARAMETERS = dict(NET.named_parameters())
WEIGHT, BIAS = torch.randn(32, 512), torch.randn(32)
X, Y = torch.randn(200, 40), (torch.rand(200) > 0.5).float()
KERNEL = torch.randn(6, 3, 3, 3)


def predict(x: Tensor) -> Tensor:
    return torch.tanh(F.linear(x, WEIGHT, BIAS))


def by_parameters(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.func.functional_call(NET, p, (x,))


def logistic(theta: Tensor) -> Tensor:
    scores = X @ theta
    return F.softplus(scores).sum() - Y @ scores


def attention(x: Tensor) -> Tensor:
    return torch.softmax(x @ x.T / 4, -1) @ x


def scalar(x: Tensor) -> Tensor:
    return SCALAR(x)[0]


CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "jacobian of predict": (chainrule.jacobian(predict), (torch.randn(512),)),
    "jacrev of predict": (chainrule.jacrev(predict), (torch.randn(512),)),
    "jacfwd of predict": (chainrule.jacfwd(predict), (torch.randn(512),)),
    "hessian of predict": (chainrule.hessian(predict), (torch.randn(512),)),
    "vmap jacobian of predict": (chainrule.vmap(chainrule.jacobian(predict)), (torch.randn(16, 512),)),
    "batch jacobian of predict": (chainrule.jacobian(predict), (torch.randn(6, 512),)),
    "parameter jacobian": (chainrule.jacobian(by_parameters), (PARAMETERS, torch.randn(30, 12))),
    "per-sample parameter jacobian": (
        chainrule.vmap(chainrule.jacobian(by_parameters), in_dims=(None, 0)), (PARAMETERS, torch.randn(30, 12)),
    ),
    "per-sample gradients": (
        chainrule.vmap(chainrule.grad(lambda p, x: by_parameters(p, x).pow(2).sum()), in_dims=(None, 0)),
        (PARAMETERS, torch.randn(30, 12)),
    ),
    "gradient": (chainrule.grad(lambda p, x: by_parameters(p, x).pow(2).sum()), (PARAMETERS, torch.randn(30, 12))),
    "logistic gradient": (chainrule.grad(logistic), (torch.randn(40),)),
    "logistic hessian": (chainrule.hessian(logistic), (torch.randn(40),)),
    "laplacian": (chainrule.vmap(chainrule.laplacian(scalar)), (torch.randn(20, 12),)),
    "hessian diagonal": (chainrule.vmap(chainrule.hessian_diagonal(scalar)), (torch.randn(20, 12),)),
    "vmap hessian": (chainrule.vmap(chainrule.hessian(scalar)), (torch.randn(20, 12),)),
    "divergence": (chainrule.vmap(chainrule.divergence(lambda x: NET(x)[:7].repeat(2)[:12])), (torch.randn(20, 12),)),
    "ntk": (chainrule.ntk(by_parameters), (PARAMETERS, torch.randn(9, 12))),
    "convolution": (chainrule.jacobian(lambda x: torch.tanh(F.conv2d(x, KERNEL))), (torch.randn(1, 3, 10, 10),)),
    "attention": (chainrule.jacobian(attention), (torch.randn(24, 8),)),
    "attention of a batch": (chainrule.vmap(chainrule.jacobian(attention)), (torch.randn(4, 24, 8),)),
    "element-wise": (chainrule.jacobian(torch.sin), (torch.randn(300),)),
    "hvp": (lambda x, v: chainrule.jvp(chainrule.grad(logistic), (x,), (v,)), (torch.randn(40), torch.randn(40))),
    "sparse hessian": (
        chainrule.hessian(lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum(), layout="sparse_coo"),
        (torch.randn(4000),),
    ),
    "sparse jacobian": (
        chainrule.jacobian(lambda x: torch.roll(x, 1) * x.sin() - x**2, layout="sparse_coo"), (torch.randn(4000),),
    ),
    "chunks": (chainrule.jacobian(predict, chunk_size=8), (torch.randn(512),)),
}  # fmt: skip


def check_predicted_peak(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """The predicted peak is within 25 % of the measured one."""
    for _ in range(3):
        function(*args)
    with watching() as watch:
        function(*args)
    gc.collect()  # what would be freed meanwhile was not allocated by the call
    measured = peak_bytes(lambda: function(*args))
    assert watch.peak > 0
    assert abs(watch.peak / measured - 1) <= 0.25, (watch.peak, measured)


@pytest.mark.parametrize("name", CASES)
def test_predicted_peak(name: str) -> None:
    check_predicted_peak(*CASES[name])


OVER_SAMPLES = {
    "laplacian": lambda f: chainrule.laplacian(f, in_dims=0),
    "hessian diagonal": lambda f: chainrule.vmap(chainrule.hessian_diagonal(f)),
    "jacrev": lambda f: chainrule.vmap(chainrule.jacrev(f)),
    "hessian": lambda f: chainrule.vmap(chainrule.hessian(f)),
    "grad": lambda f: chainrule.vmap(chainrule.grad(f)),
    "grad of grad": lambda f: chainrule.vmap(chainrule.grad(lambda x: chainrule.grad(f)(x).square().sum())),
}  # fmt: skip


@pytest.mark.parametrize("name", OVER_SAMPLES)
def test_gradients_over_derivatives_per_sample_count_what_the_outer_tape_holds_once(name: str) -> None:
    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return OVER_SAMPLES[name](lambda x: by_parameters(p, x).sum())(x).square().mean()

    check_predicted_peak(chainrule.grad(loss), (PARAMETERS, torch.randn(40, 12)))


def test_values_of_a_run_that_has_ended_are_held_no_longer() -> None:
    """Of a derivative computed before only its result counts, and of a nest no values that its pullback does not read."""

    def after_another(x: Tensor, v: Tensor) -> Tensor:
        first = chainrule.jvp(logistic, (x,), (v,))[1]
        return chainrule.vjp(chainrule.grad(logistic), x)[1](first * v)[0]

    check_predicted_peak(after_another, (torch.randn(40), torch.randn(40)))

    def product(x: Tensor, v: Tensor) -> Tensor:
        return chainrule.vjp(chainrule.grad(lambda x: x.sin().sum()), x)[1](v)[0]

    check_predicted_peak(product, (torch.randn(2048), torch.randn(2048)))


@pytest.mark.parametrize("mapped", [1, 2])
def test_explained_peak_under_vmap(mapped: int) -> None:
    """What `explain` says is the memory of the whole batch, not of a sample."""
    transform = chainrule.jacobian(lambda x: torch.tanh(INNER @ torch.tanh(OUTER @ x)))
    x = torch.randn(*[6, 8][:mapped], OUTER.shape[1])
    for _ in range(mapped):
        transform = chainrule.vmap(transform)
    for _ in range(3):
        transform(x)
    (account,) = chainrule.explain(transform)(x).accounts
    measured = peak_bytes(lambda: transform(x))
    assert abs(account.memory["peak"] / measured - 1) <= 0.25, (account.memory, measured)
    assert account.memory["results"] == 4 * INNER.shape[0] * OUTER.shape[1] * x.shape[:-1].numel()


@pytest.mark.parametrize("name", ["hessian of predict", "parameter jacobian", "jacobian of predict", "element-wise"])
def test_no_temporary_of_the_size_of_the_result(name: str) -> None:
    function, args = CASES[name]
    for _ in range(3):
        result = function(*args)
    size = sum(leaf.nbytes for leaf in torch.utils._pytree.tree_leaves(result))
    del result
    assert peak_bytes(lambda: function(*args)) < 1.3 * size


def long_chain(x: Tensor) -> Tensor:
    for _ in range(10):
        x = torch.tanh(1.1 * torch.sin(x))
    return x.sum()


def test_reverse_over_reverse_holds_no_more_than_torch() -> None:
    """Values of the run that no pullback reads are let go, and cheap ones are computed again where they are read."""
    x, v = torch.randn(100_000), torch.randn(100_000)

    def product(library: Any) -> Callable[[], Any]:
        return lambda: library.vjp(library.grad(long_chain), x)[1](v)[0]

    ours, theirs = product(chainrule), product(torch.func)
    for _ in range(3):
        torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-5)  # 30 ops of float32 in another order
    assert peak_bytes(ours) <= peak_bytes(theirs)


def test_what_is_computed_late_serves_every_pull() -> None:
    x, v = torch.randn(20_000, dtype=torch.float64), torch.randn(20_000, dtype=torch.float64)
    w = torch.randn(20_000, dtype=torch.float64)
    expected = [torch.func.vjp(torch.func.grad(long_chain), x)[1](seed)[0] for seed in (v, w)]
    for _ in range(3):
        value, pull = chainrule.vjp(chainrule.grad(long_chain), x)
        torch.testing.assert_close(value, torch.func.grad(long_chain)(x))
        torch.testing.assert_close(pull(v)[0], expected[0])
        with torch.no_grad():
            torch.testing.assert_close(pull(w)[0], expected[1])
        with torch.inference_mode():
            torch.testing.assert_close(pull(v)[0], expected[0])
        _, push = chainrule.linearize(chainrule.grad(long_chain), x)
        torch.testing.assert_close(push(w), expected[1])
        twice = chainrule.vjp(lambda v: pull(v)[0], v)[1]  # a pullback is linear, and symmetric here
        torch.testing.assert_close(twice(w)[0], expected[1])


def test_pullbacks_of_values_with_a_graph() -> None:
    x = torch.randn(20_000, dtype=torch.float64, requires_grad=True)
    v = torch.randn(20_000, dtype=torch.float64)
    for _ in range(3):
        _, pull = chainrule.vjp(chainrule.grad(long_chain), x)
        (found,) = torch.autograd.grad((pull(v)[0] * v).sum(), x)
        expected = torch.func.grad(lambda x: (torch.func.vjp(torch.func.grad(long_chain), x)[1](v)[0] * v).sum())(x.detach())
        torch.testing.assert_close(found, expected)


def _layers(activation: type[torch.nn.Module], *, requires_grad: bool) -> torch.nn.Module:
    made = torch.nn.Sequential(torch.nn.Linear(50, 200), activation(), torch.nn.Linear(200, 20))
    return made.requires_grad_(requires_grad)


OF_MODULES: dict[str, Callable[[Any], tuple[Callable[..., Any], Tensor]]] = {
    "vjp": lambda net: (lambda x: chainrule.vjp(net, x)[1](torch.ones(20)), torch.randn(50)),
    "vjp of a batch": (lambda net: (lambda x: chainrule.vjp(net, x)[1](torch.ones(30, 20)), torch.randn(30, 50))),
    "grad": lambda net: (chainrule.grad(lambda x: net(x).sum()), torch.randn(50)),
    "hessian": lambda net: (chainrule.hessian(lambda x: net(x).square().sum()), torch.randn(50)),
    "hvp": lambda net: (lambda x: chainrule.hvp(lambda y: net(y).square().sum(), (x,), (x,)), torch.randn(50)),
    "laplacian": lambda net: (chainrule.laplacian(lambda x: net(x).square().sum()), torch.randn(50)),
    "ggn": lambda net: (lambda x: chainrule.ggn(net, lambda z: z.logsumexp(0), (x,), (x,)), torch.randn(50)),
    "jacfwd": lambda net: (chainrule.jacfwd(net), torch.randn(50)),
    "linearize, and a list of tangents": lambda net: (
        lambda x: torch.stack([push(v) for push in (chainrule.linearize(net, x)[1],) for v in torch.eye(50)]), torch.randn(50)
    ),
    "vmap": lambda net: (chainrule.vmap(net), torch.randn(30, 50)),
}  # fmt: skip


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("activation", [torch.nn.Tanh, torch.nn.ReLU, torch.nn.GELU])
@pytest.mark.parametrize("name", OF_MODULES)
def test_explained_peak_of_modules(name: str, activation: type[torch.nn.Module], requires_grad: bool) -> None:
    """Weights are parameters: their transposes are views, and what autograd keeps for its graph counts."""
    function, x = OF_MODULES[name](_layers(activation, requires_grad=requires_grad))
    for _ in range(3):
        function(x)
    peak, measured = chainrule.explain(function)(x).peak, peak_bytes(lambda: function(x))
    assert abs(peak / measured - 1) <= 0.25, (peak, measured)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", ["vjp", "vjp of a batch", "grad", "hessian", "hvp", "laplacian", "ggn", "jacfwd"])
def test_plans_know_what_autograd_keeps(name: str, requires_grad: bool) -> None:
    """The prediction of the plans alone, without a look at a call: transposes of parameters are views, graphs keep values."""
    function, x = OF_MODULES[name](_layers(torch.nn.Tanh, requires_grad=requires_grad))
    check_predicted_peak(function, (x,))


def test_plans_know_the_work_space_of_functions_that_stand_for_ops() -> None:
    """A maximum over windows is computed with the channels last, by copies that are as large as what it reads and gives."""
    check_predicted_peak(chainrule.grad(lambda x: F.max_pool2d(F.conv2d(x, KERNEL), 2).sum()), (torch.randn(8, 3, 34, 34),))
    pooled = chainrule.grad(lambda x: F.max_pool2d(x, 2).square().sum())
    check_predicted_peak(pooled, (torch.randn(8, 16, 32, 32),))


def test_plans_know_what_graphs_of_opaque_ops_keep() -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(8, 16, batch_first=True)
    check_predicted_peak(chainrule.jacobian(lambda x: layer(x)[0]), (torch.randn(2, 5, 8),))


def test_plans_know_what_graphs_keep_under_vmap() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    check_predicted_peak(chainrule.vmap(chainrule.jacobian(lambda x: layer(x[None])[0])), (torch.randn(4, 6, 32),))


def test_results_count_as_long_as_somebody_has_them() -> None:
    def one_by_one(x: Tensor) -> list[Tensor]:
        push = chainrule.linearize(lambda x: x.sin().cumsum(0), x)[1]
        return [push(x * k) for k in range(20)]

    with watching() as watch:
        found = one_by_one(torch.randn(1000))
        held = watch.held
        assert held >= sum(result.nbytes for result in found)
        del found
        one_by_one(torch.randn(1000))
    check_predicted_peak(one_by_one, (torch.randn(1000),))


def test_forward_over_reverse_holds_no_more_than_reverse_over_reverse() -> None:
    """A tangent through the gradient lets go of the run's values as it goes."""

    def chained(x: Tensor) -> Tensor:
        for _ in range(10):
            x = (x.sin() * 1.1).tanh()
        return x.sum()

    x, v = torch.randn(5000), torch.randn(5000)
    ways = {
        "forward": lambda: chainrule.jvp(chainrule.grad(chained), (x,), (v,))[1],
        "hvp": lambda: chainrule.hvp(chained, (x,), (v,)),
        "reverse": lambda: chainrule.vjp(chainrule.grad(chained), x)[1](v)[0],
    }
    peaks = {}
    for name, way in ways.items():
        for _ in range(3):
            way()
        peaks[name] = peak_bytes(way)
    assert peaks["forward"] <= 0.9 * peaks["reverse"] and peaks["hvp"] <= 0.9 * peaks["reverse"], peaks


CONVOLUTIONS = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 9, 5)).requires_grad_(False)
ENCODER = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True).requires_grad_(False)
PLACED = torch.randperm(2000)


def double(x: Tensor) -> Tensor:
    return torch.tanh(OUTER.double() @ x)  # a constant that is made in the run


WITH_GRAPHS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "a constant made in the run": (chainrule.jacobian(double), (torch.randn(50, dtype=torch.float64),)),
    # Products and convolutions go other ways where autograd makes a graph of them.
    "convolutions": (chainrule.jacobian(CONVOLUTIONS), (torch.randn(2, 3, 8, 8),)),
    "convolution gradient": (
        chainrule.grad(lambda x: F.conv2d(x, KERNEL, padding=1).tanh().square().sum()), (torch.randn(8, 3, 24, 24),)
    ),
    "chunks": (chainrule.jacobian(predict, chunk_size=8), (torch.randn(512),)),
    "chunks of samples": (
        chainrule.vmap(chainrule.grad(lambda p, x: by_parameters(p, x).pow(2).sum()), in_dims=(None, 0), chunk_size=10),
        (PARAMETERS, torch.randn(40, 12)),
    ),
    "layers per sample": (chainrule.vmap(chainrule.grad(lambda x: ENCODER(x[None]).square().sum())), (torch.randn(8, 20, 32),)),
    "divergence": (chainrule.vmap(chainrule.divergence(lambda x: NET(x)[:7].repeat(2)[:12])), (torch.randn(100, 12),)),
    "value and tangent": (
        lambda x, v: chainrule.jvp(lambda z: torch.tanh(z @ OUTER.T) @ OUTER, (x,), (v,)), (torch.randn(100, 50), torch.randn(100, 50)),
    ),
    "sparse": (chainrule.jacobian(lambda x: F.relu(x[1:] - x[:-1]) ** 2, layout="sparse_coo"), (torch.randn(4000),)),
}  # fmt: skip


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", WITH_GRAPHS)
def test_predicted_peak_of_inputs_with_a_graph(name: str, requires_grad: bool) -> None:
    function, args = WITH_GRAPHS[name]
    args = torch.utils._pytree.tree_map(lambda leaf: leaf.detach().clone().requires_grad_(requires_grad), args)
    check_predicted_peak(function, args)


COMPILED: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    # What the result needs alone is computed.
    "hessian of a quadratic": (chainrule.hessian(lambda x: ((OUTER @ x)[:, None] * OUTER).pow(2).sum()), (torch.randn(50),)),
    "written into views": (chainrule.jacobian(lambda x: torch.tanh(x @ OUTER.T)), (torch.randn(8, 50),)),
    "a check that raises": (
        chainrule.jacobian(lambda b: torch.linalg.solve(OUTER[:, :50].T @ OUTER + 9 * torch.eye(50), b).tanh()), (torch.randn(50),)
    ),
    "random numbers": (chainrule.grad(lambda x: (x * torch.rand(9000)).square().sum()), (torch.randn(9000),)),
    "a sparse result": (chainrule.jacobian(lambda x: x[PLACED].sin() * x, layout="sparse_coo"), (torch.randn(2000),)),
    "a sparse result by rows": (chainrule.jacobian(lambda x: x[PLACED].sin() * x, layout="sparse_csr"), (torch.randn(2000),)),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_predicted_peak_of_compiled_functions(name: str) -> None:
    """It is that of the graph, which is what runs."""
    function, args = COMPILED[name]
    compiled = chainrule.compile(function)
    check_predicted_peak(compiled, args)
    check_predicted_peak(function, args)
    check_predicted_peak(compiled, args)


def test_random_numbers_are_drawn_as_without_a_watch() -> None:
    compiled = chainrule.compile(chainrule.grad(lambda x: (x * torch.rand(20)).square().sum()))
    x = torch.ones(20)
    compiled(x)
    torch.manual_seed(0)
    expected = [compiled(x), compiled(x)]
    torch.manual_seed(0)
    with watching():
        found = [compiled(x), compiled(x)]
    assert all(map(torch.equal, found, expected)) and not torch.equal(*found)
