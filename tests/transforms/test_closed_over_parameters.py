"""Functions that close over parameters which require grad: results join their graph, and the compiled handlers take the calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.func
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import chainrule
from chainrule.batching.mode import VmapMode
from chainrule.capture.tape import Tape
from chainrule.dispatch import KNOWS_STATE
from chainrule.shortcuts import COMPILED

DOUBLE = torch.float64


class Norm(nn.Module):
    """A layer norm in parts: torch.func's forward mode takes the saved mean of its own op for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if torch._C._functorch.peek_interpreter_stack() is None and torch._C._len_torch_dispatch_stack():
            return norm(x)
        centred = x - x.mean(-1, keepdim=True)
        return centred * ((centred * centred).mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight + norm.bias


class Tied(nn.Module):
    """Uses tensors that are computed of its parameters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight @ self.weight.t() / 4
        return torch.tanh(x @ kernel + kernel.diagonal()).roll(1, -1) * self.weight[0].exp()


class Writes(nn.Module):
    """Writes in place, and takes a step for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.linear(x).exp()
        out = torch.zeros_like(x) + 0.5
        out.copy_(self.linear(x).sin())
        out.mul_(x).add_(self.linear.bias)
        return out * scale.detach()


class Parts(nn.Module):
    """Views, lists of tensors, a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.linear(x).chunk(2, -1)
        both = torch.cat([first.sin(), second], -1).unflatten(-1, (2, 4))
        return (both[..., 0, :] * both[..., 1, :].softmax(-1) + self.linear.weight[0]).flip(-1)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "tanh": lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Softplus(), nn.Linear(6, 4)),
    "relu": lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.GELU()),
    "norm": lambda: nn.Sequential(nn.Linear(4, 4, bias=False), Norm(), nn.Sigmoid()),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(-1, (1, 4)), nn.Conv1d(1, 2, 3, padding=1), nn.Tanh(), nn.Flatten(-2), nn.Linear(8, 4)
    ),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "bilinear": lambda: Doubled(),
    "tied": Tied,
    "writes": Writes,
    "parts": Parts,
}


class Doubled(nn.Module):
    """A layer of two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(4, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.sin())


def scalar(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: (f(x) ** 2).sum()


def both_of_vjp(m: Any, f: Any, x: Tensor) -> Any:
    out, pull = m.vjp(f, x)
    return out, pull(torch.ones_like(out))[0]


TRANSFORMS: dict[str, Callable[[Any, Any, Tensor, Tensor], Any]] = {
    "vmap": lambda m, f, x, batch: m.vmap(f)(batch),
    "vmap of one": lambda m, f, x, batch: m.vmap(lambda a, b: f(a) * f(b), in_dims=(0, None))(batch, x),
    "vmap twice": lambda m, f, x, batch: m.vmap(m.vmap(f))(torch.stack([batch, 2 * batch])),
    "grad": lambda m, f, x, batch: m.grad(scalar(f))(x),
    "grad and value": lambda m, f, x, batch: m.grad_and_value(scalar(f))(x),
    "jacrev": lambda m, f, x, batch: m.jacrev(f)(x),
    "jacfwd": lambda m, f, x, batch: m.jacfwd(f)(x),
    "hessian": lambda m, f, x, batch: m.hessian(scalar(f))(x),
    "vjp": lambda m, f, x, batch: both_of_vjp(m, f, x),
    "jvp": lambda m, f, x, batch: m.jvp(f, (x,), (x.sin(),)),
    "vmap of jacrev": lambda m, f, x, batch: m.vmap(m.jacrev(f))(batch),
    "vmap of jacfwd": lambda m, f, x, batch: m.vmap(m.jacfwd(f))(batch),
    "vmap of grad": lambda m, f, x, batch: m.vmap(m.grad(scalar(f)))(batch),
    "vmap of hessian": lambda m, f, x, batch: m.vmap(m.hessian(scalar(f)))(batch),
    "vmap of a product": lambda m, f, x, batch: m.vmap(lambda a: m.jacrev(f)(a) @ f(a) * a.sum())(batch),
    "jacrev of vmap": lambda m, f, x, batch: m.jacrev(lambda b: m.vmap(f)(b).sum(0))(batch),
    "grad of vmap of grad": lambda m, f, x, batch: m.grad(lambda b: m.vmap(m.grad(scalar(f)))(b).sin().sum())(batch),
}


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(DOUBLE)
    torch.manual_seed(11)
    yield
    torch.set_default_dtype(torch.float32)


def flat(result: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in tree_leaves(result)])


def gradients(result: Any, leaves: list[Tensor]) -> list[Tensor]:
    """The gradients of a loss of a result, and of a loss of these."""
    values = flat(result)
    mark = torch.linspace(0.5, 1.5, values.numel())
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad((values * mark).sum(), leaves, create_graph=True, **options)
    loss = sum((gradient * gradient).sum() for gradient in first)
    second = torch.autograd.grad(loss, leaves, retain_graph=True, **options) if loss.requires_grad else ()
    return [*first, *second]


# Double precision; some thirty roundings of numbers up to some hundreds in values and first derivatives, a few more orders in
# the derivatives of those.
CLOSE = {"rtol": 1e-7, "atol": 1e-7}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("module", MODULES)
def test_values_and_gradients_are_those_of_torch_func(module: str, transform: str) -> None:
    net, call = MODULES[module](), TRANSFORMS[transform]
    for kind in ("parameters", "arguments", "computed arguments"):
        for _ in range(2):  # the first call plans, the second one replays
            x, batch = torch.randn(4), torch.randn(3, 4)
            leaves = [*net.parameters()]
            if kind != "parameters":
                leaves += [x.requires_grad_(), batch.requires_grad_()]
            given = (x.sin() + x, batch.exp()) if kind == "computed arguments" else (x, batch)
            ours, theirs = call(chainrule, net, *given), call(torch.func, net, *given)
            torch.testing.assert_close(flat(ours), flat(theirs), **CLOSE)
            for mine, expected in zip(gradients(ours, leaves), gradients(theirs, leaves), strict=True):
                torch.testing.assert_close(mine, expected, **CLOSE)


@pytest.mark.parametrize("transform", ["vmap", "jacrev", "hessian", "vmap of jacrev", "vmap of grad", "jvp"])
def test_gradients_are_those_of_finite_differences(transform: str) -> None:
    net, x, batch = MODULES["tanh"](), torch.randn(4), torch.randn(3, 4)
    parameters = [*net.parameters()]

    def loss() -> Tensor:
        return flat(TRANSFORMS[transform](chainrule, net, x, batch)).square().sum()

    found = torch.autograd.grad(loss(), parameters, allow_unused=True, materialize_grads=True)
    step = 1e-5  # central: an error of step² times a third derivative, and of rounding over step, both about 1e-9
    for parameter, gradient in zip(parameters, found, strict=True):
        place = parameter.numel() // 2
        entry = parameter.data.view(-1)
        kept = entry[place].item()
        ends = []
        for sign in (1, -1):
            entry[place] = kept + sign * step
            ends.append(loss().item())
        entry[place] = kept
        torch.testing.assert_close(gradient.view(-1)[place].item(), (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-6)


def test_float32() -> None:
    net, x, batch = MODULES["tanh"]().float(), torch.randn(4).float(), torch.randn(3, 4).float()
    for call in TRANSFORMS.values():
        for _ in range(2):
            ours, theirs = flat(call(chainrule, net, x, batch)), flat(call(torch.func, net, x, batch))
            assert ours.dtype is torch.float32
            # Some thirty roundings of 6e-8 each, relative to the largest entry.
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            one, two = (torch.autograd.grad(r.square().sum(), [*net.parameters()], allow_unused=True, materialize_grads=True)
                        for r in (ours, theirs))  # fmt: skip
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_a_training_step() -> None:
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    twin = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    twin.load_state_dict(net.state_dict())
    points = torch.randn(5, 2)

    def laplacian(f: Any) -> Any:
        return lambda x: torch.func.hessian(f)(x).diagonal().sum()

    steps = (
        (net, chainrule.vmap(chainrule.laplacian(lambda x: net(x).squeeze()))),
        (twin, torch.func.vmap(laplacian(lambda x: twin(x).squeeze()))),
    )
    for _ in range(3):
        for module, residual in steps:
            optimiser = torch.optim.SGD(module.parameters(), lr=0.05)
            optimiser.zero_grad()
            for _ in range(2):  # gradients add up
                residual(points).square().mean().backward()
            optimiser.step()
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


def test_hooks_parts_and_several_outputs() -> None:
    net, x, seen = nn.Linear(3, 3), torch.randn(3), []
    net.weight.register_hook(lambda gradient: seen.append(gradient.clone()))

    def function(m: Any) -> Any:
        return m.jacrev(lambda a: {"one": net(a).sin(), "two": (net(a) * a).sum(), "none": a * 2})(x)

    ours, theirs = function(chainrule), function(torch.func)
    for name in ("one", "two"):
        ours[name].square().sum().backward(retain_graph=True)
        mine, net.weight.grad = net.weight.grad, None
        theirs[name].square().sum().backward(retain_graph=True)
        torch.testing.assert_close(mine, net.weight.grad, **CLOSE)
        net.weight.grad = None
    assert len(seen) == 4 and not ours["none"].requires_grad


def test_auxiliary_values_join_the_graph() -> None:
    net, x = nn.Linear(3, 3), torch.randn(3)

    def function(a: Tensor) -> Any:
        out = net(a).tanh()
        return out.sum(), (out * 2, net.weight)

    gradient, (value, aux) = chainrule.grad_and_value(function, has_aux=True)(x)
    assert aux[1] is net.weight
    found = torch.autograd.grad((gradient.sum(), value, aux[0].sum()), net.weight, [torch.tensor(k) for k in (1.0, 2.0, 3.0)])
    theirs, (their_value, their_aux) = torch.func.grad_and_value(function, has_aux=True)(x)
    torch.testing.assert_close(
        found,
        torch.autograd.grad(theirs.sum() + 2 * their_value + 3 * their_aux[0].sum(), net.weight),
        **CLOSE,
    )


def test_a_closed_over_tensor_as_the_result() -> None:
    weight, x = torch.randn(3, requires_grad=True), torch.randn(2, 3)
    torch.testing.assert_close(chainrule.jacrev(lambda a: weight)(x[0]), torch.zeros(3, 3))
    mapped = chainrule.vmap(lambda a: weight)(x)
    mapped.sum().backward()
    torch.testing.assert_close(weight.grad, torch.full((3,), 2.0))


def test_a_change_after_the_forward_is_an_error() -> None:
    net, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), torch.randn(2, 3)
    for transform in (chainrule.vmap, chainrule.jacrev, lambda f: chainrule.vmap(chainrule.jacrev(f))):
        for _ in range(2):
            result = transform(net)(x)
            with torch.no_grad():
                net[2].weight.mul_(1.5)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                result.square().sum().backward()


def test_no_grad_around_and_frozen_parameters_give_no_graph() -> None:
    net, x, batch = MODULES["tanh"](), torch.randn(4), torch.randn(3, 4)
    for call in TRANSFORMS.values():
        expected = flat(call(chainrule, net, x, batch))
        with torch.no_grad():
            found = flat(call(chainrule, net, x, batch))
        assert expected.requires_grad and not found.requires_grad
        torch.testing.assert_close(found, expected.detach(), **CLOSE)
        net.requires_grad_(False)
        assert not flat(call(chainrule, net, x, batch)).requires_grad
        net.requires_grad_(True)


def test_an_outer_transform_differentiates_by_what_an_inner_one_closes_over() -> None:
    scale, x = torch.randn(3, requires_grad=True), torch.randn(3)

    def outer(m: Any) -> Any:
        return m.jacrev(lambda w: m.jacrev(lambda a: (a * w * scale).sin())(x).sum(0))(x.cos())

    ours, theirs = outer(chainrule), outer(torch.func)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    for one, two in zip(gradients(ours, [scale]), gradients(theirs, [scale]), strict=True):
        torch.testing.assert_close(one, two, **CLOSE)


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Mish])
@pytest.mark.parametrize("transform", ["grad", "jacrev", "vmap of grad", "hessian"])
def test_activations_whose_backward_torch_does_not_differentiate(activation: Any, transform: str) -> None:
    net, x, batch = nn.Sequential(nn.Linear(4, 4), activation()), torch.randn(4), torch.randn(3, 4)
    by_hand = {nn.SiLU: lambda h: h * torch.sigmoid(h), nn.Mish: lambda h: h * torch.tanh(F.softplus(h))}[activation]
    parameters = [*net.parameters()]
    for _ in range(2):
        ours = TRANSFORMS[transform](chainrule, net, x, batch)
        theirs = TRANSFORMS[transform](torch.func, lambda a: by_hand(net[0](a)), x, batch)
        for one, two in zip(gradients(ours, parameters), gradients(theirs, parameters), strict=True):
            torch.testing.assert_close(one, two, **CLOSE)


def test_an_opaque_formula_under_vmap() -> None:
    weight, batch = torch.randn(3, 3, requires_grad=True), torch.rand(4, 3)

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return cotangent * 3 * x**2

    for f in (lambda a: torch.special.i0e(a @ weight), lambda a: Cube.apply(a @ weight)):
        plain = (lambda a: (a @ weight) ** 3) if f(batch[0]).grad_fn is None or "Cube" in str(f(batch[0]).grad_fn) else f
        for _ in range(2):
            ours = chainrule.vmap(chainrule.jacrev(f))(batch)
            theirs = torch.func.vmap(torch.func.jacrev(plain))(batch)
            torch.testing.assert_close(ours, theirs, **CLOSE)
            one, two = (torch.autograd.grad(r.square().sum(), weight)[0] for r in (ours, theirs))
            torch.testing.assert_close(one, two, **CLOSE)


@pytest.mark.skipif(not (COMPILED and KNOWS_STATE), reason="the short cuts are not compiled here")
@pytest.mark.parametrize("transform", ["vmap", "jacrev", "vmap of jacrev", "grad of a sum"])
def test_the_compiled_handlers_take_the_calls(transform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, batch = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)), torch.randn(4), torch.randn(3, 4)
    call = TRANSFORMS.get(transform) or (lambda m, f, x, batch: m.grad(lambda a: f(a).sum())(x))
    for _ in range(2):
        call(chainrule, net, x, batch)
    taken: list[Any] = []
    for mode in (Tape, VmapMode):
        original = mode.take_function

        def noted(self: Any, func: Any, *args: Any, original: Any = original) -> Any:
            taken.append(func)
            return original(self, func, *args)

        dispatched = mode.__torch_dispatch__

        def arrived(self: Any, func: Any, *args: Any, original: Any = dispatched) -> Any:
            taken.append(func)
            return original(self, func, *args)

        monkeypatch.setattr(mode, "take_function", noted)
        monkeypatch.setattr(mode, "__torch_dispatch__", arrived)
    result = call(chainrule, net, x, batch)
    ours = [func for func in taken if func is not F.linear]  # a function of Python asks for its door first
    assert result.requires_grad and not ours, ours


def test_mapped_functions_are_evaluated_without_a_graph() -> None:
    net, batch = MODULES["tanh"](), torch.randn(3, 4)
    for call in (lambda m: m.vmap(net)(batch), lambda m: m.vmap(m.jacrev(net))(batch)):
        with torch.no_grad():
            found = [call(chainrule) for _ in range(2)]
        for result in found:
            assert not result.requires_grad
            torch.testing.assert_close(result, call(torch.func).detach(), **CLOSE)
        assert call(chainrule).requires_grad  # the plan that was recorded without graphs


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_mapped_gradients_of_recurrent_networks(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The states at the beginning are constants: products of them with parameters have one graph, and plans run on stored tensors."""
    net, batch = kind(3, 2, batch_first=True), torch.randn(4, 5, 3)

    def function(m: Any) -> Tensor:
        one = m.grad(lambda a: net(a)[0].sin().sum())
        found: Tensor = m.vmap(one)(batch) if m is chainrule else torch.stack([one(a) for a in batch])  # torch maps no GRU
        return found

    parameters = [*net.parameters()]
    for _ in range(3):
        ours, theirs = function(chainrule), function(torch.func)
        torch.testing.assert_close(ours, theirs, **CLOSE)
        for mine, expected in zip(gradients(ours, parameters), gradients(theirs, parameters), strict=True):
            torch.testing.assert_close(mine, expected, **CLOSE)
    arrived: list[Any] = []
    handler = VmapMode.__torch_dispatch__

    def counted(self: Any, func: Any, *rest: Any) -> Any:
        arrived.append(func)
        return handler(self, func, *rest)

    monkeypatch.setattr(VmapMode, "__torch_dispatch__", counted)
    function(chainrule)
    assert len(arrived) < 60  # the recording alone: a replay op by op would add some three hundred


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_and_statistics_are_those_of_the_call(training: bool, dropout: float) -> None:
    """Beside parameters that require grad: the same draw as torch's autograd makes, and buffers that are updated once a call."""
    layers = (nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(dropout), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 2))
    net = nn.Sequential(*layers).train(training)
    twin = copy.deepcopy(net)
    for _ in range(3):
        x = torch.randn(5, 4)
        torch.manual_seed(4)
        ours, value = chainrule.grad_and_value(lambda a: net(a).sin().sum())(x)
        torch.manual_seed(4)
        leaf = x.clone().requires_grad_()
        expected = twin(leaf).sin().sum()
        (theirs,) = torch.autograd.grad(expected, leaf, create_graph=True)
        torch.testing.assert_close((ours, value), (theirs, expected), **CLOSE)
        for m, result in ((net, ours), (twin, theirs)):
            m.zero_grad()
            (result * result).sum().backward()
        for one, two in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad, **CLOSE)
        for one, two in zip(net.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(one, two)
        with torch.no_grad():  # seen by the next call
            for one, two in zip(net.parameters(), twin.parameters(), strict=True):
                one.mul_(1.1), two.mul_(1.1)


class Layers(nn.Module):
    """Linear layers on matrices, on stacks of them, without a bias, and of a size of none; norms with and without weights."""

    def __init__(self, rows: tuple[int, ...]) -> None:
        super().__init__()
        self.rows = rows
        self.one, self.two, self.three = nn.Linear(4, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 1)
        self.norm, self.bias = nn.LayerNorm(5), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.one(x.expand(*self.rows, 4)))
        if not y.numel():
            return self.three(self.two(y)).square().sum()
        y = self.two(y) + self.normalised(y, None, self.bias)
        return self.three(self.normalised(y, self.norm.weight, self.norm.bias)).square().sum()

    def normalised(self, y: Tensor, weight: Tensor | None, bias: Tensor) -> Tensor:
        if torch._C._functorch.peek_interpreter_stack() is None:
            return F.layer_norm(y, (5,), weight, bias)
        # torch.func takes the mean and the scale of its own op for constants, and wants a weight beside a bias.
        centred = y - y.mean(-1, keepdim=True)
        scaled = centred * ((centred * centred).mean(-1, keepdim=True) + self.norm.eps).rsqrt()
        return scaled * (1 if weight is None else weight) + bias


@pytest.mark.parametrize("rows", [(3,), (2, 3), (1,), (0,), (1, 1), ()])
def test_derivatives_by_parameters_that_require_grad(rows: tuple[int, ...]) -> None:
    """Up to the third order, in the first calls and in replays."""
    torch.manual_seed(8)
    net = Layers(rows).to(DOUBLE)
    parameters, x = dict(net.named_parameters()), torch.randn(4, dtype=DOUBLE)

    def orders(library: Any) -> list[Tensor]:
        gradient = library.grad(lambda p: torch.func.functional_call(net, p, (x,)))(parameters)
        found = [gradient[name] for name in parameters]
        leaves = list(parameters.values())
        for create in (True, False):
            marks = [torch.arange(1.0, item.numel() + 1, dtype=DOUBLE).reshape(item.shape) for item in leaves]
            loss = sum((item.sin() * mark).sum() for item, mark in zip(found[-len(leaves) :], marks, strict=True))
            if not loss.requires_grad:  # type: ignore[union-attr]
                found += [torch.zeros_like(leaf) for leaf in leaves]  # zeros of zeros, where nothing has elements
                continue
            found += torch.autograd.grad(loss, leaves, create_graph=create, allow_unused=True, materialize_grads=True)  # type: ignore[arg-type]
        return [item.detach() for item in found]

    expected = orders(torch.func)
    for _ in range(4):
        torch.testing.assert_close(orders(chainrule), expected, **CLOSE)


@pytest.mark.skipif(not (COMPILED and KNOWS_STATE), reason="the short cuts are not compiled here")
def test_linear_layers_need_no_way_through_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    net, arrived = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), list[Any]()
    parameters, x = dict(net.named_parameters()), torch.randn(3, 4)
    gradient = chainrule.grad(lambda p: torch.func.functional_call(net, p, (x,)).square().sum())
    for _ in range(2):
        gradient(parameters)
    dispatched = Tape.__torch_dispatch__
    monkeypatch.setattr(Tape, "__torch_dispatch__", lambda self, func, *args: arrived.append(func) or dispatched(self, func, *args))
    found = gradient(parameters)
    assert all(item.requires_grad for item in found.values())
    assert not arrived, arrived


class Recurrent(nn.Module):
    """A recurrent network with gates, in steps."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.again = nn.Linear(3, 8), nn.Linear(2, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = state = x.new_zeros(x.shape[1], 2)
        for step in x:
            one, two, new, out = (self.entry(step) + self.again(hidden)).chunk(4, -1)
            state = two.sigmoid() * state + one.sigmoid() * new.tanh()
            hidden = out.sigmoid() * state.tanh()
        return hidden


def nodes_of(tensor: Tensor) -> int:
    seen: set[Any] = set()
    todo = [tensor.grad_fn]
    while todo:
        if (node := todo.pop()) is not None and node not in seen:
            seen.add(node)
            todo += [after for after, _ in node.next_functions]
    return len(seen)


@pytest.mark.parametrize("transform", ["grad", "vjp"])
def test_the_graph_of_a_recurrent_network_is_no_larger_than_with_torch_func(transform: str) -> None:
    torch.manual_seed(9)
    net, x = Recurrent().to(DOUBLE), torch.randn(6, 4, 3, dtype=DOUBLE)
    leaves = list(net.parameters())

    def derivative(library: Any) -> Tensor:
        if transform == "grad":
            return library.grad(lambda x: net(x).square().sum())(x)  # type: ignore[no-any-return]
        out, pull = library.vjp(net, x)
        first, second = pull(torch.ones_like(out))[0], pull(torch.full_like(out, 2.0))[0]
        torch.testing.assert_close(second, 2 * first)
        return first  # type: ignore[no-any-return]

    def orders(result: Tensor) -> list[Tensor]:
        found = list(torch.autograd.grad(result.sin().sum(), leaves, create_graph=True))
        return [result, *found, *torch.autograd.grad(sum(item.sin().sum() for item in found), leaves)]  # type: ignore[arg-type]

    theirs = derivative(torch.func)
    expected = orders(theirs)
    for number in range(4):
        ours = derivative(chainrule)
        assert number == 0 or nodes_of(ours) <= nodes_of(theirs)
        torch.testing.assert_close(orders(ours), expected, **CLOSE)
