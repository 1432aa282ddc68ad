"""``chainrule.compile``: what it returns is what the function returns, call after call, and what it cannot do it says."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils._pytree import tree_leaves

import chainrule
from chainrule import CompileError

HAS_CUDA = torch.cuda.is_available()

Tensor = torch.Tensor


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


WEIGHT, BIAS = randn(5, 4), randn(5)


def field(x: Tensor) -> Tensor:
    return torch.tanh(F.linear(x, WEIGHT, BIAS))


def energy(x: Tensor) -> Tensor:
    return (field(x) ** 2).sum() * torch.sin(x).sum()


def block(x: Tensor) -> Tensor:
    return torch.relu(x @ WEIGHT.T) @ WEIGHT


def pulled(x: Tensor, v: Tensor) -> Any:
    out, pull = chainrule.vjp(field, x)
    return out, pull(v)[0]


def linearized(x: Tensor, v: Tensor) -> Any:
    out, push = chainrule.linearize(field, x)
    return out, push(v)


def attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x @ WEIGHT.T, x @ WEIGHT.T, x)


CASES: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]] = {
    "plain": (field, lambda: (randn(4),)),
    "jacrev": (chainrule.jacrev(field), lambda: (randn(4),)),
    "jacfwd": (chainrule.jacfwd(field), lambda: (randn(4),)),
    "jacobian": (chainrule.jacobian(field), lambda: (randn(3, 4),)),
    "hessian": (chainrule.hessian(energy), lambda: (randn(4),)),
    "grad": (chainrule.grad(energy), lambda: (randn(4),)),
    "grad_and_value": (chainrule.grad_and_value(energy), lambda: (randn(4),)),
    "jvp": (lambda x, v: chainrule.jvp(field, (x,), (v,)), lambda: (randn(4), randn(4))),
    "vjp inside": (pulled, lambda: (randn(4), randn(5))),
    "linearize inside": (linearized, lambda: (randn(4), randn(4))),
    "hvp": (lambda x, v: chainrule.hvp(energy, (x,), (v,)), lambda: (randn(4), randn(4))),
    "vmap": (chainrule.vmap(field), lambda: (randn(3, 4),)),
    "vmap hessian": (chainrule.vmap(chainrule.hessian(energy)), lambda: (randn(3, 4),)),
    "vmap jacfwd": (chainrule.vmap(chainrule.jacfwd(field)), lambda: (randn(3, 4),)),
    "hessian hessian": (chainrule.hessian(chainrule.hessian(energy)), lambda: (randn(4),)),
    "jacrev jacrev": (chainrule.jacrev(chainrule.jacrev(field)), lambda: (randn(4),)),
    "jacfwd vmap grad": (chainrule.jacfwd(chainrule.vmap(chainrule.grad(energy))), lambda: (randn(2, 4),)),
    "laplacian": (chainrule.laplacian(energy), lambda: (randn(4),)),
    "vmap laplacian": (chainrule.vmap(chainrule.laplacian(energy)), lambda: (randn(3, 4),)),
    "hessian_diagonal": (chainrule.hessian_diagonal(energy), lambda: (randn(4),)),
    "divergence": (chainrule.vmap(chainrule.divergence(block)), lambda: (randn(3, 4),)),
    "ntk": (chainrule.ntk(lambda w, x: torch.tanh(x @ w)), lambda: (randn(4, 3), randn(2, 4))),
    "jet": (lambda x, a, b: chainrule.jet(field, (x,), ([a, b],)), lambda: (randn(4), randn(4), randn(4))),
    "attention": (chainrule.jacrev(attention), lambda: (randn(3, 4),)),
    "pytrees": (
        chainrule.jacrev(lambda p, x: {"y": torch.tanh(p["w"] @ x) + p["b"][0]}),
        lambda: ({"w": randn(3, 4), "b": [randn(3)]}, randn(4)),
    ),
    "aux": (chainrule.grad(lambda x: (energy(x), {"field": field(x), "name": "aux", "count": 3}), has_aux=True), lambda: (randn(4),)),
    "argnums": (chainrule.jacobian(lambda x, y: x[:, None] * torch.sin(y), argnums=(0, 1)), lambda: (randn(3), randn(2))),
    "scalar": (chainrule.grad(chainrule.grad(torch.sin)), lambda: (randn(),)),
    "empty": (chainrule.jacobian(torch.sin), lambda: (randn(0),)),
    "in place": (chainrule.jacobian(lambda x: torch.zeros_like(x).index_add_(0, torch.tensor([0, 0, 1]), x[:3].sin())), lambda: (randn(4),)),
    "diagonal": (chainrule.jacobian(torch.sin), lambda: (randn(3, 4),)),
    "convolution": (chainrule.jacobian(lambda x: F.conv1d(x, WEIGHT[None, :1, :3].contiguous())), lambda: (randn(2, 1, 6),)),
    "non-contiguous": (chainrule.jacobian(block), lambda: (randn(4, 3).T,)),
    "constant": (chainrule.jacobian(lambda x: torch.arange(3.0, dtype=torch.float64)), lambda: (randn(4),)),
    "solve": (lambda x: torch.linalg.solve(chainrule.hessian(energy)(x) + 9 * torch.eye(4, dtype=torch.float64), x), lambda: (randn(4),)),
    "half open": (chainrule.jacobian(lambda x: (x, x.reshape(2, 2).T)), lambda: (randn(4),)),
}  # fmt: skip


def same(found: Any, expected: Any) -> None:
    pairs = list(zip(tree_leaves(found), tree_leaves(expected), strict=True))
    for one, other in pairs:
        if isinstance(other, Tensor):
            torch.testing.assert_close(one, other)
        else:
            assert one == other
    assert torch.utils._pytree.tree_flatten(found)[1] == torch.utils._pytree.tree_flatten(expected)[1]


@pytest.mark.parametrize("name", CASES)
def test_replays_agree(name: str) -> None:
    function, inputs = CASES[name]
    compiled = chainrule.compile(function)
    for _ in range(4):
        args = inputs()
        same(compiled(*args), function(*args))
    assert compiled.cache_info()[:3] == (3, 1, 0)


@pytest.mark.parametrize("name", ["jacrev", "vmap hessian", "hessian hessian", "aux", "in place", "pytrees", "laplacian"])
def test_graph_module_agrees(name: str) -> None:
    function, inputs = CASES[name]
    compiled = chainrule.compile(function)
    args = inputs()
    expected = function(*args)
    module = compiled.graph(*args)
    assert isinstance(module, torch.fx.GraphModule)
    placeholders = [node.target for node in module.graph.nodes if node.op == "placeholder"]
    given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    assert len(placeholders) >= len(given)
    assert "def run" in compiled.source(*args)
    if len(placeholders) == len(given):
        torch.testing.assert_close(list(module(*given)), [leaf for leaf in tree_leaves(expected) if isinstance(leaf, Tensor)])


@pytest.mark.parametrize("name", ["jacrev", "vmap hessian", "laplacian", "pytrees"])
def test_inductor_agrees(name: str) -> None:
    function, inputs = CASES[name]
    compiled = chainrule.compile(function, backend="inductor")
    for _ in range(3):
        args = inputs()
        same(compiled(*args), function(*args))
    assert compiled.cache_info().hits == 2


def test_results_are_the_callers_own() -> None:
    compiled = chainrule.compile(lambda x: (chainrule.jacobian(lambda y: WEIGHT @ y)(x), torch.arange(3), x.sin()))
    x = randn(4)
    for _ in range(3):
        first, second, third = compiled(x)
        torch.testing.assert_close(first, WEIGHT)
        assert second.tolist() == [0, 1, 2]
        torch.testing.assert_close(third, x.sin())
        for result in (first, second, third):
            result.zero_()
    assert WEIGHT.abs().sum() > 0


def test_views_and_inputs_stay_what_they_are() -> None:
    compiled = chainrule.compile(lambda x: (x, x[0], x + 1))
    for _ in range(3):
        x = randn(2, 3)
        whole, row, _ = compiled(x)
        assert whole is x
        row.fill_(7.0)
        assert bool((x[0] == 7.0).all())


def test_new_signatures_are_recorded() -> None:
    function = chainrule.jacobian(lambda x, power=2, *, shift=0.0: x**power + shift * x)
    compiled = chainrule.compile(function)
    x = randn(4)
    calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = [
        (x, (), {}), (randn(5), (), {}), (x.float(), (), {}), (randn(8)[::2], (), {}), (x, (3,), {}), (x, (3.0,), {}),
        (x, (2,), {"shift": 1.5}), (x, (2,), {"shift": 2.5}),
    ]  # fmt: skip
    for _ in range(2):
        for value, args, kwargs in calls:
            same(compiled(value, *args, **kwargs), function(value, *args, **kwargs))
    info = compiled.cache_info()
    assert (info.misses, info.hits) == (len(calls), len(calls))
    with pytest.raises(TypeError, match="hashable"):
        compiled(x, {1, 2})


def test_the_same_tensor_twice_is_two_inputs() -> None:
    compiled = chainrule.compile(lambda x, y: x * 2 + y)
    x, y = randn(3), randn(3)
    compiled(x, x)
    same(compiled(x, y), x * 2 + y)


def test_grad_mode_is_part_of_the_signature() -> None:
    compiled = chainrule.compile(chainrule.grad(lambda x: ((x * 2).sum() if torch.is_grad_enabled() else (x * 3).sum())))
    x = randn(3)
    plain = chainrule.grad(lambda x: (x * 2).sum())(x)
    for _ in range(2):
        same(compiled(x), plain)
        with torch.no_grad():
            compiled(x)
        with torch.inference_mode():
            compiled(x)
    assert compiled.cache_info().misses == 3


def test_optimiser_steps_are_seen() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    twin = copy.deepcopy(model)
    compiled = chainrule.compile(chainrule.jacobian(model))
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    x = randn(4)
    for _ in range(4):
        expected = chainrule.jacobian(model)(x)
        same(compiled(x), expected)
        optimiser.zero_grad()
        model(x).pow(2).sum().backward()
        optimiser.step()
    assert compiled.cache_info()[:2] == (3, 1)
    assert not torch.allclose(compiled(x), chainrule.jacobian(twin)(x))


def test_results_join_autograd() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def residual(x: Tensor) -> Tensor:
        return chainrule.vmap(chainrule.laplacian(lambda y: model(y)[0]))(x) + model(x.detach() * 2)[:, 0].detach()

    compiled = chainrule.compile(residual)
    for _ in range(3):
        x = randn(5, 4).requires_grad_()
        wanted = [x, *model.parameters()]
        expected = torch.autograd.grad(residual(x).pow(2).sum(), wanted, allow_unused=True)
        found = torch.autograd.grad(compiled(x).pow(2).sum(), wanted, allow_unused=True)
        for one, other in zip(found, expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other)
    assert compiled.cache_info()[:2] == (2, 1)


def test_no_grad_blocks_stay_without_graph() -> None:
    weight = randn(4).requires_grad_()

    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = (weight * x).sum()
        return scale * weight * x

    compiled = chainrule.compile(function)
    for _ in range(3):
        x = randn(4)
        (found,) = torch.autograd.grad(compiled(x).sum(), weight)
        (expected,) = torch.autograd.grad(function(x).sum(), weight)
        torch.testing.assert_close(found, expected)


def test_own_autograd_functions_keep_their_backward() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * 100

    compiled = chainrule.compile(lambda x: Double.apply(x).sum())
    for _ in range(3):
        x = randn(3).requires_grad_()
        (found,) = torch.autograd.grad(compiled(x), x)
        torch.testing.assert_close(found, torch.full_like(x, 100.0))
    inside = chainrule.compile(chainrule.grad(lambda x: Double.apply(x).sum()))
    for _ in range(3):
        torch.testing.assert_close(inside(randn(3)), torch.full((3,), 100.0, dtype=torch.float64))


class Holder:
    def __init__(self) -> None:
        self.scale = 2.0
        self.table = {"shift": 1.0}
        self.items = [randn(4)]

    def energy(self, x: Tensor) -> Tensor:
        return self.scale * (x**2).sum() + self.table["shift"] * (x * self.items[0]).sum()


GLOBAL_SCALE = 1.0


def global_energy(x: Tensor) -> Tensor:
    return GLOBAL_SCALE * helper(x)


def helper(x: Tensor) -> Tensor:
    return (x**3).sum() * GLOBAL_SCALE


def test_replaced_surroundings_are_recorded_anew() -> None:
    holder = Holder()
    compiled = chainrule.compile(chainrule.grad(holder.energy))
    x = randn(4)

    def check() -> None:
        for _ in range(2):
            same(compiled(x), chainrule.grad(holder.energy)(x))

    check()
    holder.scale = 3.0
    check()
    holder.table["shift"] = 5.0
    check()
    holder.items[0] = randn(4)
    check()
    holder.items[0].mul_(2)
    check()
    assert compiled.cache_info().misses == 4
    holder.scale = 2.0
    holder.table["shift"] = 1.0
    check()


def test_replaced_closures_and_globals_are_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = chainrule.compile(chainrule.grad(global_energy))
    x = randn(4)
    same(compiled(x), 3 * x**2)
    same(compiled(x), 3 * x**2)
    monkeypatch.setitem(globals(), "GLOBAL_SCALE", 2.0)
    same(compiled(x), 12 * x**2)
    monkeypatch.setitem(globals(), "helper", torch.sum)
    same(compiled(x), torch.full_like(x, 2.0))
    scale = randn(4)
    closed = chainrule.compile(chainrule.grad(lambda x: (scale * x).sum()))
    for _ in range(2):
        same(closed(x), scale)
    scale = randn(4)
    for _ in range(2):
        same(closed(x), scale)


def test_modules_in_training_and_in_evaluation() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    twin = copy.deepcopy(model)
    compiled = chainrule.compile(chainrule.grad(lambda x: model(x).pow(2).sum()))
    expected = chainrule.grad(lambda x: twin(x).pow(2).sum())
    for training in (True, True, True, False, False, True, False):
        model.train(training)
        twin.train(training)
        x = randn(6, 4)
        same(compiled(x), expected(x))
        same(list(model.buffers()), list(twin.buffers()))
    assert compiled.cache_info().misses == 2
    model[0].weight = nn.Parameter(randn(3, 4))
    x = randn(6, 4)
    model.eval()
    same(compiled(x), chainrule.grad(lambda x: model(x).pow(2).sum())(x))


def test_random_numbers_are_drawn_anew() -> None:
    compiled = chainrule.compile(chainrule.grad(lambda x: F.dropout(x, 0.5).pow(2).sum()))
    plain = chainrule.grad(lambda x: F.dropout(x, 0.5).pow(2).sum())
    x = randn(64)
    torch.manual_seed(3)
    expected = [plain(x) for _ in range(3)]
    torch.manual_seed(3)
    for want in expected:
        same(compiled(x), want)
    two = chainrule.compile(lambda x: (torch.rand_like(x), torch.rand_like(x), x))
    for _ in range(3):
        a, b, _ = two(x)
        assert not torch.equal(a, b)


def test_writes_to_arguments_and_closures_happen_in_each_call() -> None:
    counter = torch.zeros(())

    def function(x: Tensor, buffer: Tensor) -> Tensor:
        counter.add_(1)
        buffer[0] = x.sum()
        return buffer * x + counter

    compiled = chainrule.compile(function)
    for number in range(1, 4):
        x, buffer = randn(3), randn(3)
        other = buffer.clone()
        other[0] = x.sum()
        same(compiled(x, buffer), other * x + number)
        same(buffer, other)
        assert counter.item() == number


def branch(x: Tensor) -> Tensor:
    return x.sin() if x.sum() > 0 else x.cos()


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "branch": branch,
    "branch under grad": chainrule.grad(lambda x: branch(x).sum()),
    "item": lambda x: x * x[0].item(),
    "float": lambda x: x * float(x[0]),
    "tolist": lambda x: x * x.tolist()[0],
    "numpy": lambda x: x * torch.from_numpy(x.detach().numpy() * 2),
    "nonzero": lambda x: x[x > 0],
    "unique": lambda x: torch.unique(x),
    "closed over": chainrule.jacobian(lambda x: x if WEIGHT.sum() > 1e9 else 2 * x),
    "allclose": lambda x: x if torch.allclose(x, x) else -x,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_depends_on_values_is_refused(name: str) -> None:
    compiled = chainrule.compile(REFUSED[name])
    for _ in range(2):
        with pytest.raises(CompileError, match="value"):
            compiled(randn(4))
    same(chainrule.compile(torch.sin)(torch.zeros(3)), torch.zeros(3))


def test_checks_are_made_in_each_call() -> None:
    compiled = chainrule.compile(chainrule.grad(lambda a: torch.linalg.inv(a).sum()))
    for _ in range(2):
        a = randn(3, 3)
        same(compiled(a), chainrule.grad(lambda a: torch.linalg.inv(a).sum())(a))
    with pytest.raises(torch.linalg.LinAlgError):
        compiled(torch.zeros(3, 3, dtype=torch.float64))


def test_values_of_constants_may_be_read() -> None:
    compiled = chainrule.compile(lambda x: x * torch.arange(4).sum().item() if torch.ones(2).sum() > 1 else x)
    for _ in range(3):
        x = randn(4)
        same(compiled(x), 6 * x)


def test_functions_as_results_run_without_a_graph() -> None:
    compiled = chainrule.compile(lambda x: chainrule.vjp(field, x))
    for _ in range(3):
        x, v = randn(4), randn(5)
        out, pull = compiled(x)
        same(out, field(x))
        same(pull(v), chainrule.vjp(field, x)[1](v))
    assert compiled.cache_info().eager == 2
    with pytest.raises(CompileError, match="function"):
        compiled.graph(randn(4))


def test_inside_of_other_transforms() -> None:
    compiled = chainrule.compile(chainrule.grad(energy))
    x = randn(3, 4)
    same(chainrule.vmap(compiled)(x), chainrule.vmap(chainrule.grad(energy))(x))
    same(chainrule.jacrev(compiled)(x[0]), chainrule.hessian(energy)(x[0]))
    assert "structured" in str(chainrule.explain(compiled)(x[0])) or chainrule.explain(compiled)(x[0]).accounts


def test_changing_surroundings_end_without_a_graph() -> None:
    state = {"step": 0}

    def function(x: Tensor) -> Tensor:
        state["step"] += 1
        return x * state["step"]

    compiled = chainrule.compile(function)
    x = randn(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(40):
            before = state["step"]
            found = compiled(x)
            assert state["step"] > before
            same(found, x * state["step"])
    assert any("step" in str(warning.message) for warning in caught)
    assert compiled.cache_info().eager > 10


def test_threads_share_graphs() -> None:
    compiled = chainrule.compile(chainrule.hessian(energy))
    inputs = [randn(4) for _ in range(8)]
    found: dict[int, Tensor] = {}

    def work(number: int) -> None:
        for _ in range(5):
            found[number] = compiled(inputs[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, x in enumerate(inputs):
        same(found[number], chainrule.hessian(energy)(x))


def test_a_failed_call_leaves_nothing_behind() -> None:
    failing = True

    def function(x: Tensor) -> Tensor:
        if failing:
            raise KeyError("mine")
        return x.sin()

    compiled = chainrule.compile(function)
    with pytest.raises(KeyError, match="mine"):
        compiled(randn(3))
    assert torch._C._len_torch_dispatch_stack() == 0
    failing = False
    x = randn(3)
    same(compiled(x), x.sin())


def test_backends_are_checked() -> None:
    with pytest.raises(ValueError, match="backend"):
        chainrule.compile(torch.sin, backend="fast")
    if not HAS_CUDA:
        with pytest.raises(CompileError, match="CUDA"):
            chainrule.compile(torch.sin, backend="cudagraphs")(randn(3))


@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
def test_cuda_graphs_agree() -> None:
    weight = WEIGHT.cuda()
    function = chainrule.jacobian(lambda x: (torch.tanh(weight @ x), x))
    compiled = chainrule.compile(function, backend="cudagraphs")
    for _ in range(4):
        x = randn(4).cuda()
        same(compiled(x), function(x))
    weight.mul_(2)
    same(compiled(x), function(x))


def test_many_signatures_stay_bounded() -> None:
    compiled = chainrule.compile(lambda x, n: x * n)
    x = randn(2)
    for number in range(100):
        same(compiled(x, number), x * number)
    assert compiled.cache_info().size <= 64
    compiled.cache_clear()
    assert compiled.cache_info() == (0, 0, 0, 0)


#: What torch.compile over nests of torch.func refuses or gets wrong.
UNDER_TORCH_COMPILE = ("jacrev", "jacfwd", "hessian", "vmap hessian", "vmap jacfwd", "hessian hessian", "laplacian", "vjp inside", "ntk")  # fmt: skip


@pytest.mark.parametrize("name", UNDER_TORCH_COMPILE)
def test_under_torch_compile(name: str) -> None:
    function, inputs = CASES[name]
    torch._dynamo.reset()

    def around(*args: Any) -> Any:
        return function(*[2 * arg for arg in args])

    # The eager backend: what is tested is who runs what, not the code generator.
    direct, wrapped = torch.compile(function, backend="eager"), torch.compile(around, backend="eager")
    for _ in range(2):
        args = inputs()
        same(direct(*args), function(*args))
        same(wrapped(*args), around(*args))


def test_pullback_out_of_torch_compile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: chainrule.vjp(field, 2 * x), backend="eager")
    for _ in range(2):
        x, v = randn(4), randn(5)
        out, pull = compiled(x)
        same(out, field(2 * x))
        same(pull(v), chainrule.vjp(field, 2 * x)[1](v))


def test_whole_graph_under_torch_compile_is_a_clear_error() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: chainrule.jacrev(field)(x) + 1, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(randn(4))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind: Callable[..., nn.Module]) -> None:
    """One recording serves all calls, although the layers list their parameters anew in each."""
    layer = kind(3, 4, batch_first=True).double()
    gradient = chainrule.grad(lambda p, x: (chainrule.functional_call(layer, p, (x,))[0] ** 2).sum())
    compiled = chainrule.compile(gradient)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    for _ in range(4):
        x = randn(2, 5, 3)
        same(compiled(parameters, x), gradient(parameters, x))
    assert compiled.cache_info().misses == 1
