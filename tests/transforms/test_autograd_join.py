"""Results join torch's autograd, and torch's contexts behave inside and around the transforms."""

from __future__ import annotations

import pytest
import torch
import torch.func

import chainrule


def r(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=grad)


def network(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x @ weight.t()) ** 2


CALLS = {
    "jacrev": lambda m, w, x: m.jacrev(network, argnums=1)(w, x),
    "jacfwd": lambda m, w, x: m.jacfwd(network, argnums=1)(w, x),
    "hessian": lambda m, w, x: m.hessian(network, argnums=1)(w, x),
    "grad": lambda m, w, x: m.grad(lambda a: network(w, a).sum())(x),
    "vjp": lambda m, w, x: m.vjp(lambda a: network(w, a), x)[1](torch.ones(2, dtype=torch.float64))[0],
    "jvp": lambda m, w, x: m.jvp(lambda a: network(w, a), (x,), (torch.ones_like(x),))[1],
    "linearize": lambda m, w, x: m.linearize(lambda a: network(w, a), x)[1](torch.ones_like(x)),
    "vmap": lambda m, w, x: m.vmap(lambda s: network(w, s * x))(torch.arange(3.0, dtype=torch.float64)),
    "vmap of jacrev": lambda m, w, x: m.vmap(lambda s: m.jacrev(network, argnums=1)(w, s * x))(torch.arange(3.0, dtype=torch.float64)),
    "value": lambda m, w, x: m.grad_and_value(lambda a: network(w, a).sum())(x)[1],
    "through a view": lambda m, w, x: m.jacrev(lambda a: network(w[:, :3], a[:3].view(3)))(x),
    "through a write": lambda m, w, x: m.jacrev(lambda a: written(w, a))(x),
}


def written(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(2, dtype=x.dtype)
    first = (weight[0] * x).sum()
    out[0] = first
    out[1] = x.sum() * first
    return out.sin()


@pytest.mark.parametrize("name", CALLS)
def test_backward_through_a_result(name: str) -> None:
    weight, x = r(2, 3, grad=True), r(3, grad=True)
    for _ in range(2):
        ours = CALLS[name](chainrule, weight, x)
        if name == "through a write":  # torch.func.jacrev refuses this function
            theirs = torch.autograd.functional.jacobian(lambda a: written(weight, a), x, create_graph=True)
        elif name == "linearize":  # torch.func.linearize warns about closed-over tensors
            theirs = CALLS["jvp"](torch.func, weight, x)
        else:
            theirs = CALLS[name](torch.func, weight, x)
        torch.testing.assert_close(ours, theirs)
        mark = torch.linspace(0.5, 1.5, ours.numel(), dtype=torch.float64).reshape(ours.shape)
        mine = torch.autograd.grad((ours * mark).sum(), (weight, x))
        others = torch.autograd.grad((theirs * mark).sum(), (weight, x))
        for one, two in zip(mine, others, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("transform", ["jacrev", "jacfwd", "hessian"])
@pytest.mark.parametrize("training", [True, False])
def test_parameters_of_modules_get_gradients(transform: str, training: bool) -> None:
    nn = torch.nn
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    net = net.double().train(training)

    def by_hand(a: torch.Tensor) -> torch.Tensor:
        # torch.func's forward mode takes the saved mean and rstd for constants here: it is no oracle for the modules.
        h = torch.tanh(net[0](a))
        h = standardise(h, (1,)) * net[2].weight + net[2].bias
        h = standardise(h.reshape(-1, 2, 4), (2,)).reshape(-1, 8) * net[3].weight + net[3].bias
        scaled = standardise(h, (0,)) if training else h / (1 + 1e-5) ** 0.5
        return net[5](scaled * net[4].weight + net[4].bias)

    def standardise(h: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
        centred = h - h.mean(dims, keepdim=True)
        return centred * ((centred * centred).mean(dims, keepdim=True) + 1e-5).rsqrt()

    x = r(5, 3)
    parameters = list(net.parameters())
    state = {name: buffer.clone() for name, buffer in net.named_buffers()}
    mine = getattr(chainrule, transform)(lambda a: (net(a) ** 2).sum())(x).square().sum()
    net.load_state_dict(state, strict=False)
    theirs = getattr(torch.func, transform)(lambda a: (by_hand(a) ** 2).sum())(x).square().sum()
    torch.testing.assert_close(mine, theirs)
    for one, two in zip(
        torch.autograd.grad(mine, parameters, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(theirs, parameters, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-7)


def test_no_grad_around_gives_results_without_a_graph() -> None:
    weight, x = r(2, 3, grad=True), r(3, grad=True)
    with torch.no_grad():
        found = chainrule.jacrev(network, argnums=1)(weight, x)
        gradient, value = chainrule.grad_and_value(lambda a: network(weight, a).sum())(x)
        output, pull = chainrule.vjp(lambda a: network(weight, a), x)
    assert not any(t.requires_grad for t in (found, gradient, value, output))
    torch.testing.assert_close(found, torch.func.jacrev(network, argnums=1)(weight, x).detach())


def test_no_grad_inside_stops_reverse_derivatives() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = x.sum()
        return x * scale

    x = r(3)
    torch.testing.assert_close(chainrule.jacrev(function)(x), torch.func.jacrev(function)(x))
    torch.testing.assert_close(chainrule.jacfwd(function)(x), torch.func.jacfwd(function)(x))
    with torch.no_grad():
        torch.testing.assert_close(chainrule.jacrev(function)(x), torch.eye(3, dtype=torch.float64) * x.sum())


def test_inference_mode() -> None:
    x = r(4)

    def function(a: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.softmax(a.reshape(2, 2) @ a.reshape(2, 2), -1)

    expected = torch.func.jacrev(function)(x)
    with torch.inference_mode():
        for transform in (chainrule.jacrev, chainrule.jacfwd, chainrule.jacobian):
            torch.testing.assert_close(transform(function)(x), expected)
        torch.testing.assert_close(chainrule.vmap(torch.sin)(x), x.sin())


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside: bool) -> None:
    weight, x = torch.randn(4, 8), torch.randn(8)

    def function(a: torch.Tensor) -> torch.Tensor:
        if inside:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return torch.nn.functional.linear(a, weight).float().tanh()
        return torch.nn.functional.linear(a, weight).float().tanh()

    def run() -> torch.Tensor:
        return chainrule.jacrev(function)(x)

    if inside:
        found = run()
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = run()
    exact = torch.func.jacrev(lambda a: torch.tanh(weight @ a))(x)
    # bfloat16 keeps 8 bits of mantissa
    torch.testing.assert_close(found, exact, rtol=0.06, atol=0.06)
    assert found.dtype == torch.float32


def test_torch_func_inside() -> None:
    x = r(3)
    cube = torch.diag(6 * x)
    torch.testing.assert_close(chainrule.jacrev(lambda a: torch.func.grad(lambda b: (b**3).sum())(a))(x), cube)
    torch.testing.assert_close(chainrule.jacfwd(lambda a: torch.func.grad(lambda b: (b**3).sum())(a))(x), cube)
    torch.testing.assert_close(chainrule.jacrev(lambda a: torch.func.vmap(torch.sin)(a))(x), torch.diag(x.cos()))
    torch.testing.assert_close(chainrule.vmap(lambda a: torch.func.grad(torch.sin)(a))(x), x.cos())
