"""Torch's hooks, and `requires_grad`, inside of transformed functions, against torch.func."""

from __future__ import annotations

import pytest
import torch

import chainrule

X = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


def _hook(tensor, function):
    if tensor.requires_grad:
        tensor.register_hook(function)


def _reversal(x):
    y = x.sin()
    _hook(y, lambda g: -g)
    return y * x


def _clipped(x):
    y = x * 2
    z = y * 3 + y.sum()  # read before the hooks are there
    _hook(y, lambda g: g.clamp(max=4.0))
    _hook(y, lambda g: g * 10 + 1)
    return z + y * y


def _of_an_input(x):
    _hook(x, lambda g: -g)
    return (x * 2).exp()


def _of_an_output(x):
    y = (x * 2).exp()
    _hook(y, lambda g: -3 * g * g)
    return y


def _around_a_write(x):
    y = x.sin()
    _hook(y, lambda g: -g)
    y = y.clone()
    y.mul_(x)
    _hook(y, lambda g: g * g)
    return y.cumsum(0)


def _of_parts(x):
    first, second = torch.split(x.cos(), [1, 2])
    _hook(first, lambda g: g * 7)
    _hook(second, lambda g: None)
    return torch.cat([second * x[:2], first])


def _reading(x):
    y = x * x
    _hook(y, lambda g: torch.where(g > 2, g * x, 0 * g))
    return y * y


def _removed(x):
    y = x.sin()
    if y.requires_grad:
        handle = y.register_hook(lambda g: -g)
        y.register_hook(lambda g: 2 * g)
        handle.remove()
    return y * x


FUNCTIONS = [_reversal, _clipped, _of_an_input, _of_an_output, _around_a_write, _of_parts, _reading, _removed]


def _transforms(package):
    def summed(function):
        return lambda x: function(x).sum()

    def pulled(function):
        def run(x):
            out, pull = package.vjp(function, x)
            return pull(1.5 * torch.ones_like(out))[0]

        return run

    return {
        "grad": lambda f: package.grad(summed(f)),
        "jacrev": package.jacrev,
        "vjp": pulled,
        "hessian": lambda f: package.hessian(summed(f)),
        "jacfwd": package.jacfwd,
        "jvp": lambda f: lambda x: package.jvp(f, (x,), (torch.ones_like(x),))[1],
        "jvp(grad)": lambda f: lambda x: package.jvp(package.grad(summed(f)), (x,), (torch.ones_like(x),))[1],
        "grad(grad)": lambda f: package.grad(lambda x: package.grad(summed(f))(x).sum()),
        "jacrev(jacrev)": lambda f: package.jacrev(package.jacrev(f)),
        "grad(vmap)": lambda f: package.grad(lambda x: package.vmap(f)(torch.stack([x, x])).sum()),
        "vmap(jacrev)": lambda f: lambda x: package.vmap(package.jacrev(f))(torch.stack([x, 2 * x])),
        "vmap(hessian)": lambda f: lambda x: package.vmap(package.hessian(summed(f)))(torch.stack([x, 2 * x])),
    }


@pytest.mark.parametrize("name", _transforms(chainrule))
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__[1:])
def test_hooks_as_in_torch_func(function, name):
    expected = _transforms(torch.func)[name](function)(X)
    transform = _transforms(chainrule)[name]
    for _ in range(3):  # made, and by a known plan
        torch.testing.assert_close(transform(function)(X), expected)


def test_a_known_plan_calls_the_hook_of_its_run():
    for factor in (1.0, 2.0, 3.0):

        def function(x, factor=factor):
            y = x.sin()
            y.register_hook(lambda g: factor * g)
            return (y * x).sum()

        torch.testing.assert_close(chainrule.grad(function)(X), torch.func.grad(function)(X))
        several = torch.stack([X, 2 * X])
        torch.testing.assert_close(
            chainrule.vmap(chainrule.grad(function))(several), torch.func.vmap(torch.func.grad(function))(several)
        )


def test_compiled():
    scale = [2.0]

    def function(x):
        y = x * 2
        y.register_hook(lambda g: -g * scale[0])
        return (y * y).sum()

    compiled = chainrule.compile(chainrule.grad(function))
    for scale[0] in (2.0, 3.0):
        for number in range(3):
            x = X * (number + 1)
            torch.testing.assert_close(compiled(x), -scale[0] * 8 * x)


def test_autograd_inside():
    def function(x):
        y = x.sin()
        _hook(y, lambda g: -g)
        return torch.autograd.grad((y * x).sum(), y, create_graph=True)[0]

    torch.testing.assert_close(chainrule.jacrev(function)(X), torch.func.jacrev(function)(X))


def test_requires_grad_as_in_torch_func():
    def function(x):
        return (x if x.requires_grad else 5 * x).sum()

    for package in (chainrule, torch.func):
        torch.testing.assert_close(package.grad(function)(X), torch.ones_like(X))
        torch.testing.assert_close(package.vmap(package.grad(function))(X[None])[0], torch.ones_like(X))
        torch.testing.assert_close(package.jvp(function, (X,), (X,))[1], 5 * X.sum())
        torch.testing.assert_close(package.vmap(function)(X[None])[0], 5 * X.sum())
        torch.testing.assert_close(package.grad(lambda x: package.vmap(function)(x[None])[0])(X), 5 * torch.ones_like(X))
        torch.testing.assert_close(package.grad(lambda x: function(torch.ones(3)) * x.sum())(X), 15 * torch.ones_like(X))
        torch.testing.assert_close(package.grad(lambda x: function(x.detach()) + x.sum())(X), torch.ones_like(X))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (chainrule.jacfwd, "doesn't require gradient: chainrule gives"),
        (lambda f: lambda x: chainrule.grad(lambda x: chainrule.vmap(f)(x[None])[0])(x), "doesn't require gradient"),
        (chainrule.laplacian, "laplacian: the function calls Tensor.register_hook"),
        (lambda f: chainrule.hessian(f, layout="sparse_coo"), "sparse layout: the function calls"),
        (lambda f: chainrule.hessian(f, layout="operator"), "as a linear map: the function calls"),
        (lambda f: lambda x: chainrule.linear_map(f, x), "linear_map: the function calls"),
    ],
)
def test_where_hooks_are_not_heeded(transform, message):
    def function(x):
        y = x * 2
        y.register_hook(lambda g: -g)
        return (y * y).sum()

    with pytest.raises(RuntimeError, match=message):
        transform(function)(X)


@pytest.mark.parametrize("method", ["retain_grad", "register_post_accumulate_grad_hook"])
def test_what_has_nothing_to_act_on(method):
    def function(x):
        y = x * 2
        getattr(y, method)(*[lambda tensor: None][: method != "retain_grad"])
        return y.sum()

    with pytest.raises(RuntimeError, match=f"Tensor.{method} inside of a transformed function"):
        chainrule.grad(function)(X)


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_modules(kind):
    module = torch.nn.Linear(3, 3).double().requires_grad_(False)
    getattr(module, kind)(lambda module, *cotangents: None)
    for transform in (chainrule.grad, lambda f: lambda x: chainrule.vmap(chainrule.grad(f))(x[None])):
        with pytest.raises(RuntimeError, match="full backward hooks of modules"):
            transform(lambda x: module(x).sum())(X)


@pytest.mark.parametrize("result", [torch.ones(2), 1.0])
def test_what_a_hook_returns(result):
    def function(x):
        y = x * 2
        y.register_hook(lambda g: result)
        return y.sum()

    with pytest.raises(RuntimeError, match="a hook has to return None or a tensor of the gradient's shape"):
        chainrule.grad(function)(X)


def test_outside_of_transforms():
    x = X.clone().requires_grad_()
    y = x * 2
    y.register_hook(lambda g: -g)
    y.retain_grad()
    # Tensors with a graph of torch's own keep their hooks inside of a transform.
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)

    def function(x):
        product = weight * 3
        product.register_hook(lambda g: -g)
        return (product * x).sum()

    (y.sum() + chainrule.jvp(function, (X,), (X,))[1]).backward()
    torch.testing.assert_close(x.grad, -2 * torch.ones_like(X))
    torch.testing.assert_close(weight.grad, -3 * X)
