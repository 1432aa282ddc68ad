"""torch.autograd inside a transformed function: grad, backward, users' Functions, checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.func
import torch.utils.checkpoint

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


class OldStyle(torch.autograd.Function):
    """x**3 with a deliberately wrong backward: whoever differentiates the forward is found out."""

    @staticmethod
    def forward(ctx: Any, point: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(point)
        return point**3

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> torch.Tensor:
        (point,) = ctx.saved_tensors
        return cotangent * 5 * point**2


class NewStyle(torch.autograd.Function):
    @staticmethod
    def forward(point: torch.Tensor) -> torch.Tensor:
        return point**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    backward = OldStyle.backward

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor) -> torch.Tensor:
        (point,) = ctx.saved_tensors
        return tangent * 5 * point**2


@pytest.mark.parametrize("kind", [OldStyle, NewStyle])
def test_a_users_function_keeps_its_own_backward(kind: Any) -> None:
    point = x()
    wanted = torch.diag(5 * point**2)
    for transform in (chainrule.jacrev, chainrule.jacfwd, chainrule.jacobian):
        for _ in range(2):
            torch.testing.assert_close(transform(kind.apply)(point), wanted)
    torch.testing.assert_close(chainrule.grad(lambda p: (kind.apply(p) * p).sum())(point), 6 * point**3)
    torch.testing.assert_close(chainrule.hessian(lambda p: kind.apply(p).sum())(point), torch.diag(10 * point))
    nested = chainrule.jacrev(chainrule.jacrev(lambda p: kind.apply(p).sum()))
    torch.testing.assert_close(nested(point), torch.diag(10 * point))
    torch.testing.assert_close(chainrule.vmap(chainrule.grad(kind.apply))(point), 5 * point**2)
    torch.testing.assert_close(chainrule.grad(lambda p: chainrule.vmap(kind.apply)(p).sum())(point), 5 * point**2)
    joined = point.clone().requires_grad_()
    (outer,) = torch.autograd.grad(chainrule.grad(lambda p: kind.apply(p).sum())(joined).sum(), joined)
    torch.testing.assert_close(outer, 10 * point)


def test_a_users_function_of_several_tensors() -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, power: int) -> tuple[torch.Tensor, torch.Tensor]:
            ctx.save_for_backward(a, b)
            ctx.power = power
            return a * b, a + b

        @staticmethod
        def backward(ctx: Any, first_: torch.Tensor, second_: torch.Tensor) -> Any:
            a, b = ctx.saved_tensors
            return first_ * b * ctx.power + second_, first_ * a + second_, None

    a, b = x(), x()

    def function(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        product, total = Product.apply(one, two, 3)
        return product + total

    found = chainrule.jacrev(function, argnums=(0, 1))(a, b)
    torch.testing.assert_close(found, (torch.diag(3 * b + 1), torch.diag(a + 1)))
    torch.testing.assert_close(chainrule.jacfwd(function, argnums=(0, 1))(a, b), found)


class TwoRules(NewStyle):
    """A jvp that is neither the truth nor the transpose of the backward: each mode shows which one it used."""

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor) -> torch.Tensor:
        (point,) = ctx.saved_tensors
        return tangent * 7 * point**2


def test_each_mode_uses_its_own_rule() -> None:
    point = x()
    torch.testing.assert_close(chainrule.jacrev(TwoRules.apply)(point), torch.diag(5 * point**2))
    torch.testing.assert_close(chainrule.vjp(TwoRules.apply, point)[1](point)[0], 5 * point**3)
    torch.testing.assert_close(chainrule.jacfwd(TwoRules.apply)(point), torch.diag(7 * point**2))
    torch.testing.assert_close(chainrule.jvp(TwoRules.apply, (point,), (point,))[1], 7 * point**3)
    torch.testing.assert_close(chainrule.linearize(TwoRules.apply, point)[1](point), 7 * point**3)
    torch.testing.assert_close(chainrule.vmap(chainrule.grad(TwoRules.apply))(point), 5 * point**2)
    torch.testing.assert_close(chainrule.vmap(chainrule.jacfwd(TwoRules.apply))(point), 7 * point**2)
    torch.testing.assert_close(chainrule.vmap(TwoRules.apply)(point), point**3)


class OwnVmap(torch.autograd.Function):
    """The vmap rule adds a mark, so that it shows whether it ran."""

    @staticmethod
    def forward(point: torch.Tensor) -> torch.Tensor:
        return point**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    backward = OldStyle.backward

    @staticmethod
    def vmap(info: Any, in_dims: Any, point: torch.Tensor) -> Any:
        return point**3 + 100, in_dims[0]


def test_a_users_vmap_rule_is_used() -> None:
    point = x()
    expected = torch.func.vmap(OwnVmap.apply)(point)
    torch.testing.assert_close(expected, point**3 + 100)
    torch.testing.assert_close(chainrule.vmap(OwnVmap.apply)(point), expected)


def test_parts_of_a_users_function_without_derivative() -> None:
    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> Any:
            positive = a > 0
            ctx.mark_non_differentiable(positive)
            return a * b, positive

        @staticmethod
        def backward(ctx: Any, cotangent: torch.Tensor, _: Any) -> Any:
            return cotangent * 4, None

    class Raising(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: torch.Tensor) -> torch.Tensor:
            return a.clone()

        @staticmethod
        def backward(ctx: Any, cotangent: torch.Tensor) -> torch.Tensor:
            raise KeyError("own")

    point = x()
    found = chainrule.jacrev(lambda a, b: Marked.apply(a, b)[0], argnums=(0, 1))(point, point)
    torch.testing.assert_close(found, (4 * torch.eye(4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)))
    with pytest.raises(KeyError, match="own"):
        chainrule.grad(lambda a: Raising.apply(a).sum())(point)
    assert torch._C._len_torch_dispatch_stack() == 0


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


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_under_vmap_and_with_parameters(reentrant: bool) -> None:
    weight, point = x().requires_grad_(), x()

    def plain(p: torch.Tensor) -> torch.Tensor:
        return torch.sin(p * weight) * p.sum()

    def saved(p: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(plain, p, use_reentrant=reentrant)

    rows = torch.stack([point, 2 * point])
    torch.testing.assert_close(chainrule.vmap(saved)(rows), torch.func.vmap(plain)(rows))
    torch.testing.assert_close(chainrule.vmap(chainrule.jacrev(saved))(rows), torch.func.vmap(torch.func.jacrev(plain))(rows))
    mine = torch.autograd.grad((chainrule.jacrev(saved)(point) ** 2).sum(), weight)
    torch.testing.assert_close(mine, torch.autograd.grad((torch.func.jacrev(plain)(point) ** 2).sum(), weight))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("transform", [chainrule.jacrev, chainrule.jacfwd, chainrule.hessian])
def test_checkpointing(reentrant: bool, transform: Any) -> None:
    def function(p: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(torch.sin, p, use_reentrant=reentrant)

    point = x()
    torch.testing.assert_close(transform(function)(point), transform(torch.sin)(point))


def scalar(function: Any) -> Any:
    return lambda p: function(p).sin().sum()


CHECKPOINTED: dict[str, Any] = {
    "jacobian": (lambda f: chainrule.jacobian(f), lambda f: torch.func.jacrev(f), False),
    "jacrev": (lambda f: chainrule.jacrev(f), lambda f: torch.func.jacrev(f), False),
    "jacfwd": (lambda f: chainrule.jacfwd(f), lambda f: torch.func.jacrev(f), False),
    "grad": (lambda f: chainrule.grad(scalar(f)), lambda f: torch.func.grad(scalar(f)), False),
    "hessian": (lambda f: chainrule.hessian(scalar(f)), lambda f: torch.func.hessian(scalar(f)), False),
    "vmap": (lambda f: chainrule.vmap(f), lambda f: torch.func.vmap(f), True),
    "vmap of grad": (
        lambda f: chainrule.vmap(chainrule.grad(scalar(f))), lambda f: torch.func.vmap(torch.func.grad(scalar(f))), True
    ),
    "vmap of hessian": (
        lambda f: chainrule.vmap(chainrule.hessian(scalar(f))), lambda f: torch.func.vmap(torch.func.hessian(scalar(f))), True
    ),
    "grad of vmap": (
        lambda f: chainrule.grad(lambda p: chainrule.vmap(f)(p).sin().sum()),
        lambda f: torch.func.grad(lambda p: torch.func.vmap(f)(p).sin().sum()), True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_backward_to_the_parameters_of_a_checkpointed_layer(name: str, reentrant: bool, requires_grad: bool) -> None:
    ours, theirs, batched = CHECKPOINTED[name]
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()

    def plain(p: torch.Tensor) -> torch.Tensor:
        return network(p) + p  # type: ignore[no-any-return]

    def saved(p: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(network, p, use_reentrant=reentrant) + p  # type: ignore[no-any-return]

    def gradients(result: torch.Tensor) -> Any:
        wanted = list(network.parameters())
        return torch.autograd.grad((result**2).sum(), wanted, allow_unused=True, materialize_grads=True)

    transform = ours(saved)
    for _ in range(4):
        point = torch.randn(2, 3, dtype=torch.float64) if batched else torch.randn(3, dtype=torch.float64)
        expected = gradients(theirs(plain)(point))
        found = gradients(transform(point.requires_grad_(requires_grad)))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_checkpointing_around_a_transform_computes_anew() -> None:
    runs, weight = [0], x().requires_grad_()

    def cubed(p: torch.Tensor) -> torch.Tensor:
        runs[0] += 1
        return chainrule.grad(lambda q: (q**3 * weight).sum())(p)  # type: ignore[no-any-return]

    point = x().requires_grad_()
    for _ in range(2):  # plans are made
        cubed(point)
    runs[0] = 0
    result = torch.utils.checkpoint.checkpoint(cubed, point, use_reentrant=False)
    assert runs[0] == 1
    found = torch.autograd.grad(result.sum(), (point, weight))
    assert runs[0] == 2
    torch.testing.assert_close(found, (6 * point * weight, 3 * point**2))


def test_torch_outside_of_transforms_is_untouched() -> None:
    point = x().requires_grad_()
    (plain,) = torch.autograd.grad((point**2).sum(), point)
    torch.testing.assert_close(plain, 2 * point.detach())
    OldStyle.apply(point).sum().backward()
    torch.testing.assert_close(point.grad, 5 * point.detach() ** 2)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(torch.ones(()), torch.ones(()))


class MatrixVector(torch.autograd.Function):
    """A product with forward and backward rules, in the form in which every argument has a tangent."""

    @staticmethod
    def forward(matrix, vector):
        return matrix @ vector

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, cotangent):
        matrix, vector = ctx.saved_tensors
        return cotangent[:, None] * vector, matrix.T @ cotangent

    @staticmethod
    def jvp(ctx, matrix_tangent, vector_tangent):
        matrix, vector = ctx.saved_tensors
        return matrix_tangent @ vector + matrix @ vector_tangent


def test_arguments_without_tangent_have_zeros():
    for _ in range(2):
        matrix, vector = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
        found = chainrule.jacfwd(MatrixVector.apply, (0, 1))(matrix, vector)
        torch.testing.assert_close(found, torch.func.jacfwd(torch.mv, (0, 1))(matrix, vector))
        torch.testing.assert_close(chainrule.jacfwd(lambda x: MatrixVector.apply(matrix, x))(vector), matrix)
        second = chainrule.jacfwd(chainrule.jacfwd(lambda x: MatrixVector.apply(matrix, x).sin()))(vector)
        torch.testing.assert_close(second, torch.func.hessian(lambda x: (matrix @ x).sin())(vector))


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


JOINED = {
    "linear": lambda a: _LAYER(a).sin(),
    "products": lambda a: (a @ _WEIGHT).sin() * torch.square(a),
    "an active weight": lambda a: torch.nn.functional.linear(torch.ones_like(_WEIGHT), a.reshape(-1, 3)[:1] * _WEIGHT).sin(),
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


class _Clip(torch.autograd.Function):
    """The identity, with a backward that is not linear: it has to be given whole cotangents."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent.clamp(max=4.0) * 10 + 1


def test_backward_that_is_not_linear():
    def function(x):
        y = _Clip.apply(x.sin())
        return (y * 3 + y + y.sum()) * torch.stack([y[0], y[1], y[2]]) * torch.ones(4, 1, dtype=x.dtype)

    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    several = torch.stack([x, 2 * x])
    expected = torch.func.vmap(torch.func.jacrev(function))(several)
    for _ in range(3):
        torch.testing.assert_close(chainrule.jacrev(function)(x), expected[0])
        torch.testing.assert_close(chainrule.vmap(chainrule.jacrev(function))(several), expected)
        out, pull = chainrule.vjp(function, x)
        torch.testing.assert_close(pull(torch.ones_like(out)), torch.func.vjp(function, x)[1](torch.ones_like(out)))


class _ClippedPair(torch.autograd.Function):
    """Two values of two inputs, and indices; the backward bounds what both outputs send."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, y):
        return x * y, (x + y).sum(), torch.arange(3)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx, product, total, _):
        x, y = ctx.saved_tensors
        return (product * y + total).clamp(-1, 1), product * x * total


@pytest.mark.parametrize("writes", [False, True])
def test_backward_of_several_outputs_that_is_not_linear(writes):
    """All cotangents reach it at once, also where an output is written to."""

    def function(x):
        product, total, places = _ClippedPair.apply(x, x.sin())
        if writes:
            product.mul_(2)
        return (product.square() * total).sum() + places.sum()

    def several(x):
        return torch.stack([function(x), function(2 * x)])

    x = torch.randn(3, 4, dtype=torch.float64)
    expected = torch.func.vmap(torch.func.grad(function))(x)
    for _ in range(3):
        torch.testing.assert_close(torch.stack([chainrule.grad(function)(row) for row in x]), expected)
        torch.testing.assert_close(chainrule.vmap(chainrule.grad(function))(x), expected)
        torch.testing.assert_close(chainrule.jacrev(several)(x), torch.func.jacrev(several)(x))


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


def test_a_function_that_keeps_its_result() -> None:
    """Its backward reads what it has kept: a function of the input for the derivative of the derivative."""

    class Exp(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, p: torch.Tensor) -> torch.Tensor:
            out = p.exp()
            ctx.save_for_backward(out)
            return out

        @staticmethod
        def backward(ctx: Any, cotangent: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            (out,) = ctx.saved_tensors
            return cotangent * out

    point = x()
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def function(p: torch.Tensor) -> torch.Tensor:
        return Exp.apply(p * weight).sum()  # type: ignore[no-any-return, no-untyped-call]

    for _ in range(2):
        expected = torch.diag(weight**2 * (weight * point).exp())
        torch.testing.assert_close(chainrule.hessian(function)(point), expected)
        torch.testing.assert_close(chainrule.jacrev(chainrule.grad(function))(point), expected)
