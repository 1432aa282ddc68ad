"""torch.autograd inside a transformed function: grad and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.func

import chainrule


def x() -> torch.Tensor:
    return torch.randn(4, dtype=torch.float64)


def slope(point: torch.Tensor, *, mark: bool, create_graph: bool = True) -> torch.Tensor:
    if mark:
        point = point.requires_grad_()
    value = point.sin() * point.exp()
    (found,) = torch.autograd.grad(value.sum(), point, create_graph=create_graph)
    return found


def first(point: torch.Tensor) -> torch.Tensor:
    return point.exp() * (point.sin() + point.cos())


def second(point: torch.Tensor) -> torch.Tensor:
    return 2 * point.cos() * point.exp()


def third(point: torch.Tensor) -> torch.Tensor:
    return 2 * (point.cos() - point.sin()) * point.exp()


@pytest.mark.parametrize("mark", [True, False])
def test_autograd_grad_inside(mark: bool) -> None:
    point = x()

    def function(p: torch.Tensor) -> torch.Tensor:
        return slope(p, mark=mark)

    for transform in (chainrule.jacrev, chainrule.jacfwd, chainrule.jacobian):
        for _ in range(2):
            torch.testing.assert_close(transform(function)(point).detach(), torch.diag(second(point)))
    torch.testing.assert_close(chainrule.grad(lambda p: function(p).sum())(point).detach(), second(point))
    torch.testing.assert_close(chainrule.hessian(lambda p: function(p).sum())(point).detach(), torch.diag(third(point)))
    torch.testing.assert_close(chainrule.vmap(chainrule.grad(function))(point).detach(), second(point))
    value, pull = chainrule.vjp(function, point)
    torch.testing.assert_close(value.detach(), first(point))
    torch.testing.assert_close(pull(torch.ones_like(point))[0].detach(), second(point))


def test_without_create_graph_the_inner_gradient_is_a_constant() -> None:
    assert not chainrule.jacrev(lambda p: slope(p, mark=False, create_graph=False))(x()).any()


def test_backward_inside() -> None:
    def function(p: torch.Tensor) -> torch.Tensor:
        (p**3).sum().backward(create_graph=True)
        assert p.grad is not None
        return p.grad * p

    point = x()
    torch.testing.assert_close(chainrule.jacrev(function)(point).detach(), torch.diag(9 * point**2))


def test_unused_inputs_are_torchs_error() -> None:
    def function(p: torch.Tensor) -> torch.Tensor:
        other = p * 2
        return torch.autograd.grad(p.sum(), other)[0]

    with pytest.raises(RuntimeError, match="not have been used"):
        chainrule.grad(lambda p: function(p).sum())(x())


@pytest.mark.parametrize("mark", [True, False])
def test_autograd_grad_inside_of_nests(mark: bool) -> None:
    points = torch.stack([x(), x()])

    def function(p: torch.Tensor) -> torch.Tensor:
        return slope(p, mark=mark) * p

    diagonals = torch.diag_embed(second(points) * points + first(points))
    torch.testing.assert_close(chainrule.vmap(chainrule.jacrev(function))(points).detach(), diagonals)
    torch.testing.assert_close(chainrule.vmap(chainrule.jacfwd(function))(points).detach(), diagonals)
    pushed = chainrule.jvp(function, (points[0],), (points[1],))[1]
    torch.testing.assert_close(pushed.detach(), diagonals[0] @ points[1])
    # Nothing requires grad below the inner vmap: an error in torch.func too, never a zero.
    for library in (torch.func, chainrule):
        with pytest.raises(RuntimeError, match="requires_grad_|does not require grad"):
            library.jacrev(library.vmap(function))(points)
    torch.testing.assert_close(chainrule.grad(lambda p: (p**2).sum())(points), 2 * points)


@pytest.mark.parametrize("create_graph", [True, False])
def test_backward_inside_with_and_without_a_graph(create_graph: bool) -> None:
    point = x()

    def function(p: torch.Tensor) -> torch.Tensor:
        (p**3).sum().backward(create_graph=create_graph)
        assert p.grad is not None
        return p.grad * p

    slope_ = 9 * point**2 if create_graph else 3 * point**2
    torch.testing.assert_close(chainrule.jacrev(function)(point), torch.diag(slope_))
    curve = 18 * point if create_graph else 0 * point
    torch.testing.assert_close(chainrule.hessian(lambda p: function(p).sum())(point), torch.diag(curve))


_LAYER, _WEIGHT = torch.nn.Linear(3, 3).double(), torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
_CONVOLUTION = torch.nn.Conv1d(1, 2, 2).double()
_NORM, _GROUPS = torch.nn.LayerNorm(3).double(), torch.nn.GroupNorm(1, 3).double()
_BATCHES = torch.nn.BatchNorm1d(3, track_running_stats=False).double()
_FIXED = torch.nn.BatchNorm1d(3).double().eval()


def _normalised(module, a, dim):
    """A normalisation; outside of a transform in parts, as torch's own has wrong third derivatives."""
    if torch._C._len_torch_dispatch_stack():
        return module(a)
    centred = a - a.mean(dim, keepdim=True)
    scale = ((centred * centred).mean(dim, keepdim=True) + module.eps).rsqrt()
    return centred * scale * module.weight + module.bias


_linear = torch.nn.functional.linear

JOINED = {
    "linear": lambda a: _LAYER(a).sin(),
    "products": lambda a: (a @ _WEIGHT).sin() * torch.square(a),
    "an active weight": lambda a: torch.nn.functional.linear(torch.ones_like(_WEIGHT), a.reshape(-1, 3)[:1] * _WEIGHT).sin(),
    "an active square weight": lambda a: _linear(a, a.reshape(-1, 3)[:1] * _WEIGHT, a.reshape(-1, 3)[0] + _LAYER.bias).sin(),
    "an active weight in turn": lambda a: _linear(_LAYER(a), (a.reshape(-1, 3)[:1].exp() * _WEIGHT).t()).sin(),
    "a part of an active weight": lambda a: _linear(_LAYER(a), (a.reshape(-1, 3)[:1].exp() * _WEIGHT)[1:]).sin(),
    "a row of an active weight": lambda a: _linear(_LAYER(a), (a.reshape(-1, 3)[:1].exp() * _WEIGHT)[1:2], _LAYER.bias[:1]).sin(),
    "a column of an active weight": lambda a: _linear(a[..., 1:2], (a.reshape(-1, 3)[:1].exp() * _WEIGHT)[:, 1:2]).sin(),
    "a weight that is there twice": lambda a: _linear(_linear(a, w := a.reshape(-1, 3)[:1].exp() * _WEIGHT, w[0]).sin(), w),
    "views": lambda a: torch.cat([_LAYER(a), a * _WEIGHT[0]], -1).reshape(-1).exp(),
    "convolution": lambda a: _CONVOLUTION(a.reshape(-1, 1, 3)).tanh(),
    "layer norm": lambda a: _normalised(_NORM, a, -1).sin() * a,
    "group norm": lambda a: _GROUPS(a.reshape(-1, 3)).sin(),
    "batch norm": lambda a: _normalised(_BATCHES, torch.cat([a.reshape(-1, 3), _WEIGHT]), 0).sin(),
    "fixed batch norm": lambda a: _FIXED(a.reshape(-1, 3)).sin(),
    "stacks": lambda a: ((s := (a * _WEIGHT[2]).expand(2, 2, 2, 3)) @ s.exp().transpose(-2, -1)).sin()[..., :1, :1],
    "stacks of views": lambda a: ((s := torch.stack([_LAYER(a).reshape(-1, 3)[:1]] * 4).view(2, 2, 1, 3)) @ s.mT).sin(),
    "a computed weight": lambda a: (a @ (_WEIGHT @ _WEIGHT.t())).sin() * _WEIGHT.exp()[0],
}


@pytest.mark.parametrize("wanted", ["weight", "argument", "value"])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 3)])
@pytest.mark.parametrize("name", JOINED)
def test_a_gradient_inside_of_a_function_that_closes_over_parameters(name, shape, wanted):
    """What torch's autograd keeps for its backward is known to the tape: the gradient inside is differentiated as well."""
    parameters = [_WEIGHT, *(p for m in (_LAYER, _CONVOLUTION, _NORM, _GROUPS, _BATCHES, _FIXED) for p in m.parameters())]

    def function(a):
        h = a * _WEIGHT[0] + a.sin()
        loss = JOINED[name](h).sum() * 1.5 + (a * _WEIGHT[1]).sin().sum()
        inputs = {"weight": parameters, "argument": [a], "value": [h]}[wanted]
        found = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
        return sum((gradient * gradient).sum() for gradient in found if gradient is not None)

    x = torch.randn(shape, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(function(leaf), leaf, create_graph=True)[0]
    by_weight = torch.autograd.grad(expected.sum(), _WEIGHT)[0]
    for given in (x, leaf):
        for transform in (chainrule.grad, chainrule.jacrev):
            for _ in range(2):
                found = transform(function)(given)
                torch.testing.assert_close(found, expected)
                torch.testing.assert_close(torch.autograd.grad(found.sum(), _WEIGHT)[0], by_weight)


@pytest.mark.parametrize("given", ["leaf", "plain"])
@pytest.mark.parametrize("rows", [(), (2,), (2, 2)])
def test_a_gradient_inside_where_a_weight_is_an_argument_and_closed_over(rows, given):
    """The transpose that torch's autograd keeps is one of the argument in one layer, and one of a constant in the other."""
    x = torch.randn(*rows, 3, dtype=torch.float64)
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=given == "leaf")
    mixed = torch.randn(3, 3, dtype=torch.float64)

    def function(w, other):
        h = _linear(_linear(x * _WEIGHT[0], w).sin(), other).sin()
        (found,) = torch.autograd.grad(_linear(h, mixed).sum(), _WEIGHT, create_graph=True)
        return (found * found).sum()

    first, second = (weight.detach().clone().requires_grad_() for _ in range(2))
    expected = torch.autograd.grad(function(first, second), first)[0]
    twice = torch.autograd.grad(function(first, first), first)[0]
    for _ in range(4):
        torch.testing.assert_close(chainrule.grad(lambda w: function(w, weight))(weight), expected)
        torch.testing.assert_close(chainrule.jacrev(lambda w: function(w, weight))(weight), expected)
        torch.testing.assert_close(chainrule.grad(lambda w: function(w, w))(weight), twice)


@pytest.mark.parametrize("shape", [(2, 2, 3), (1, 4, 3)])
def test_what_shares_memory_with_a_value_may_be_a_constant(shape):
    """Views that torch's autograd keeps are known by their memory; a detached tensor, and the argument itself, have that, too."""
    x = torch.randn(shape, dtype=torch.float64)

    def function(a, other):
        with torch.no_grad():
            view = a.view(-1, 3)
        loss = _LAYER(a).sin().sum() + (a * other.view(a.shape)).sum()
        (found,) = torch.autograd.grad(loss, _LAYER.weight, create_graph=True)
        constants = (a.detach().view(-1, 3), view, other, other.view(-1, 3))
        return (found * found).sum() + sum((_LAYER(item) * a.view(-1, 3)).sum() for item in constants)

    for _ in range(2):
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(function(leaf, x.view(-1, 3)), leaf)
        torch.testing.assert_close(chainrule.grad(lambda a: function(a, x.view(-1, 3)))(x), expected)


def test_a_gradient_by_closed_over_tensors_under_vmap():
    """Such a gradient differs between the samples; under more transforms than vmap an error says so."""
    x = torch.randn(4, 3, dtype=torch.float64)

    def function(a, weight=_WEIGHT):
        return (a @ weight).sin().sum() + _CONVOLUTION(a.reshape(1, 3)).sum() * weight[0].sum()

    found = chainrule.vmap(lambda a: torch.autograd.grad(function(a), _WEIGHT)[0])(x)
    torch.testing.assert_close(found, torch.func.vmap(torch.func.grad(function, 1), (0, None))(x, _WEIGHT.detach()))
    for mapped in (
        chainrule.grad(lambda a: torch.autograd.grad(function(a), _WEIGHT, create_graph=True)[0].square().sum()),
        lambda a: torch.autograd.grad(function(h := a * _WEIGHT[0]), h)[0],
        lambda a: function(a).backward() or a,
    ):
        with pytest.raises(RuntimeError, match="inside of a mapped function"):
            chainrule.vmap(mapped)(x)


def test_what_a_node_has_kept_is_the_value_that_it_was() -> None:
    """A result that torch's graph keeps comes back as another tensor object: d/dx of x exp(w x) is (1 + w x) exp(w x)."""
    point = x()
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def function(p: torch.Tensor) -> torch.Tensor:
        node: Any = (p * weight).exp().grad_fn
        return p * node._saved_result

    for _ in range(2):
        expected = (1 + weight * point) * (weight * point).exp()
        torch.testing.assert_close(chainrule.grad(lambda p: function(p).sum())(point), expected)
        torch.testing.assert_close(chainrule.jacrev(function)(point), torch.diag(expected))
        nested = chainrule.grad(lambda p: chainrule.grad(lambda q: function(q).sum())(p).sum())(point)
        torch.testing.assert_close(nested, (2 * weight + weight * weight * point) * (weight * point).exp())




@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 3)])
@pytest.mark.parametrize("kept", ["_saved_mat1", "_saved_mat2"])
def test_what_a_linear_layer_has_kept_is_a_view_of_its_argument(shape, kept) -> None:
    """The weight is kept as its transpose, an input of more dimensions as a matrix: the node's other objects are values as well."""
    point, weight = torch.randn(shape, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        node: Any = torch.nn.functional.linear(x, w, bias).grad_fn
        while not hasattr(node, kept):
            node = node.next_functions[0][0]
        value = getattr(node, kept)
        return (value**3 * torch.arange(3.0)).sum() + value.exp().sum() * x.sum() * w.sum()

    leaves = point.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = torch.autograd.grad(function(*leaves), leaves)
    for _ in range(3):
        for found in (chainrule.grad(function, (0, 1))(*leaves), chainrule.jacrev(function, (0, 1))(*leaves)):
            torch.testing.assert_close(found, expected)
