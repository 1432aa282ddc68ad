"""Users' autograd.Functions inside of a transformed function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.func

import chainrule


def x() -> torch.Tensor:
    return torch.randn(4, dtype=torch.float64)


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
