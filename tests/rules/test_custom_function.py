"""Users' ``torch.autograd.Function``: several rows go through a ``backward`` at once where it takes them, else one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd.function import once_differentiable

import chainrule
from chainrule.rules.row_mapping import RowMapping, Rows

DOUBLE = {"dtype": torch.float64}


class Layer(torch.autograd.Function):
    """``tanh(x @ w)``; what it counts is how often ``backward`` runs."""

    runs = 0

    @staticmethod
    def forward(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> Any:
        Layer.runs += 1
        x, w, y = ctx.saved_tensors
        inner = cotangent * (1 - y * y)
        by_x = torch.zeros_like(x)
        by_x += w @ inner
        return by_x, torch.outer(x, inner) if ctx.needs_input_grad[1] else None


class Branching(Layer):
    """It looks at the values of a cotangent."""

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> Any:
        x, w, y = ctx.saved_tensors
        if not cotangent.any():
            return torch.zeros_like(x), torch.zeros_like(w)
        return Layer.backward(ctx, cotangent)


class Address(Layer):
    """It takes the address of a cotangent, as a kernel of its own would."""

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> Any:
        cotangent.data_ptr()
        return Layer.backward(ctx, cotangent)


class Once(Layer):
    """Its backward is not to be differentiated."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: torch.Tensor) -> Any:
        return Layer.backward(ctx, cotangent)


class Pair(torch.autograd.Function):
    """Two outputs, one of them without a derivative, and missing cotangents as None."""

    @staticmethod
    def forward(x: torch.Tensor) -> Any:
        return x.sin(), x > 0, x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, one: Any, mask: Any, two: Any) -> Any:
        (x,) = ctx.saved_tensors
        parts = [part for part in (None if one is None else one * x.cos(), None if two is None else 2 * two * x) if part is not None]
        return sum(parts) if parts else None


class Product(torch.autograd.Function):
    """``x * y``; its gradients have the shape of the product, which torch.autograd sums to those of the inputs."""

    @staticmethod
    def forward(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> Any:
        x, y = ctx.saved_tensors
        return cotangent * y, cotangent * x


class Cut(Product):
    """A gradient of fewer elements than the input."""

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> Any:
        return cotangent[..., :1], None


def _layer(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x @ w)


TRANSFORMS = {
    "jacrev": lambda lib, f, x, w: lib.jacrev(f, (0, 1))(x[0], w[0]),
    "jacfwd": lambda lib, f, x, w: lib.jacfwd(f, (0, 1))(x[0], w[0]),
    "jvp": lambda lib, f, x, w: lib.jvp(lambda p: f(p, w[0]), (x[0],), (x[1],))[1],
    "vmap-jacrev": lambda lib, f, x, w: lib.vmap(lib.jacrev(f, (0, 1)), (0, None))(x, w[0]),
    "vmap-vmap-jacrev": lambda lib, f, x, w: lib.vmap(lambda p: lib.vmap(lambda q: lib.jacrev(f)(p, q))(w))(x),
    "jacrev-jacrev": lambda lib, f, x, w: lib.jacrev(lib.jacrev(f))(x[0], w[0]),
    "grad-jacrev": lambda lib, f, x, w: lib.grad(lambda p: lib.jacrev(f)(p, w[0]).square().sum())(x[0]),
}


@pytest.mark.parametrize("sizes", [(4, 3), (1, 5), (5, 1)])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("function", [Layer, Branching, Address, Once])
def test_rows_agree_with_the_plain_function(function: Any, name: str, sizes: tuple[int, int]) -> None:
    if function is Once and name in ("jacrev-jacrev", "grad-jacrev"):
        pytest.skip("not differentiable twice")
    if function in (Branching, Address) and name.startswith("vmap"):
        pytest.skip("asks a mapped tensor for what it does not have, as in torch.func")
    torch.manual_seed(0)
    x, w = torch.randn(3, sizes[0], **DOUBLE), torch.randn(3, *sizes, **DOUBLE)
    expected = TRANSFORMS[name](torch.func, _layer, x, w)
    for _ in range(2):
        # Sums of at most 15 products of numbers of size one.
        torch.testing.assert_close(TRANSFORMS[name](chainrule, function.apply, x, w), expected, rtol=1e-12, atol=1e-13)


BROADCAST = {
    "grad": lambda lib, f, x, y: lib.grad(lambda p, q: f(p.sin(), q).pow(3).sum(), (0, 1))(x[0], y[0]),
    "jacrev": lambda lib, f, x, y: lib.jacrev(f, (0, 1))(x[0], y[0]),
    "jacfwd": lambda lib, f, x, y: lib.jacfwd(f, (0, 1))(x[0], y[0]),
    "hessian": lambda lib, f, x, y: lib.hessian(lambda p, q: f(p.sin(), q).pow(3).sum(), (0, 1))(x[0], y[0]),
    "vjp": lambda lib, f, x, y: lib.vjp(f, x[0], y[0])[1](torch.ones_like(x[0] * y[0])),
    "vmap-jacrev": lambda lib, f, x, y: lib.vmap(lib.jacrev(f, (0, 1)))(x, y),
    "vmap-grad": lambda lib, f, x, y: lib.vmap(lib.grad(lambda p, q: f(p, q).pow(3).sum()), (0, None))(x, y[0]),
}


@pytest.mark.parametrize("sizes", [((), (3,)), ((3,), (2, 3)), ((2, 1), (3, 1, 4)), ((), (1,))])
@pytest.mark.parametrize("name", BROADCAST)
def test_gradients_of_a_broadcast_shape_are_summed(name: str, sizes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    x, y = torch.randn(2, *sizes[0], **DOUBLE), torch.randn(2, *sizes[1], **DOUBLE)
    expected = BROADCAST[name](torch.func, torch.mul, x, y)
    for _ in range(2):
        # Sums of at most 24 products of numbers of size ten.
        torch.testing.assert_close(BROADCAST[name](chainrule, Product.apply, x, y), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["grad", "jacrev", "jacfwd", "vmap-jacrev"])
def test_gradients_of_another_shape_are_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"Cut returned an invalid gradient at index 0 - got \[3, 1\] .* \[3, 2\]"):
        BROADCAST[name](chainrule, Cut.apply, torch.randn(2, 3, 2, **DOUBLE), torch.randn(2, 3, 2, **DOUBLE))


def test_all_rows_are_one_call_of_backward() -> None:
    x, w = torch.randn(6, **DOUBLE), torch.randn(6, 9, **DOUBLE)
    for _ in range(2):
        Layer.runs = 0
        chainrule.jacrev(Layer.apply)(x, w)
        assert Layer.runs == 1
    Layer.runs = 0
    chainrule.vmap(chainrule.jacrev(Layer.apply), (0, None))(torch.randn(4, 6, **DOUBLE), w)
    assert Layer.runs == 1


def test_several_outputs_and_missing_cotangents() -> None:
    x = torch.randn(5, **DOUBLE)
    one, mask, two = chainrule.jacrev(lambda p: (Pair.apply(p)[0], Pair.apply(p)[1].to(p.dtype), Pair.apply(p)[2]))(x)
    torch.testing.assert_close(one, torch.diag(x.cos()))
    torch.testing.assert_close(two, torch.diag(2 * x))
    assert not mask.any()


def test_an_action_that_cannot_be_mapped_is_not_tried_again() -> None:
    tries = []

    def action(row: torch.Tensor) -> torch.Tensor:
        tries.append(row)
        return row * row.sum().item()

    rows, values = Rows(), torch.randn(3, 2)
    expected = values * values.sum(1, keepdim=True)
    assert RowMapping.mapper is not None
    torch.testing.assert_close(rows.through(action, values, (2,)), expected)
    assert len(tries) == 1 + 3 and not rows.is_mappable
    torch.testing.assert_close(rows.through(action, values, (2,)), expected)
    assert len(tries) == 1 + 6


def test_rows_of_an_action() -> None:
    rows, values = Rows(), torch.randn(3, 2)
    for count in (0, 1, 3):
        torch.testing.assert_close(rows.through(lambda row: row.sin(), values[:count], (2,)), values[:count].sin())
    assert rows.is_mappable


@pytest.mark.parametrize("kept", [torch.float32, torch.float16, torch.int32, torch.float64])
@pytest.mark.parametrize("mapped", [True, False])
def test_gradients_of_another_dtype_are_of_the_inputs(kept: torch.dtype, mapped: bool) -> None:
    """As torch.autograd does, which converts what a backward returns; the values are whole numbers, exact in each dtype."""

    class Doubled(torch.autograd.Function):
        generate_vmap_rule = mapped

        @staticmethod
        def forward(x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, cotangent: torch.Tensor) -> torch.Tensor:
            return (2 * cotangent).to(kept)

    x = torch.tensor([1.0, -3.0, 2.0], **DOUBLE)
    for transform in (chainrule.jacrev, chainrule.jacfwd, chainrule.jacobian):
        for _ in range(2):
            torch.testing.assert_close(transform(Doubled.apply)(x), 2 * torch.eye(3, **DOUBLE))
    torch.testing.assert_close(chainrule.jvp(Doubled.apply, (x,), (x,))[1], 2 * x)
    torch.testing.assert_close(chainrule.grad(lambda x: Doubled.apply(x).sum())(x), torch.full((3,), 2.0, **DOUBLE))
    torch.testing.assert_close(chainrule.vmap(chainrule.jacfwd(Doubled.apply))(x[:, None]), torch.full((3, 1, 1), 2.0, **DOUBLE))


def test_complex_gradients_of_real_inputs_are_refused() -> None:
    class Turned(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, cotangent: torch.Tensor) -> torch.Tensor:
            return torch.complex(cotangent, cotangent)

    for transform in (chainrule.jacrev, chainrule.jacfwd):
        with pytest.raises(RuntimeError, match="returned a complex gradient at index 0"):
            transform(Turned.apply)(torch.ones(2, **DOUBLE))


class Cubed(torch.autograd.Function):
    """The older style, with the context in ``forward``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * cotangent


class Sine(torch.autograd.Function):
    """A static argument, and a forward derivative of its own."""

    @staticmethod
    def forward(x: torch.Tensor, factor: float) -> torch.Tensor:
        return factor * x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> Any:
        return ctx.factor * ctx.saved_tensors[0].cos() * cotangent, None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, _: Any) -> torch.Tensor:
        return ctx.factor * ctx.saved_tensors[0].cos() * tangent


# Functions of a vector to a number, with users' functions and without.
SCALARS = {
    "context in forward": (lambda x: Cubed.apply(x).sum() * x.prod(), lambda x: (x**3).sum() * x.prod()),
    "static": (lambda x: Sine.apply(Sine.apply(x, 2.0), 0.5).prod(), lambda x: (0.5 * (2.0 * x.sin()).sin()).prod()),
    "several outputs": (lambda x: (Pair.apply(x)[0] * Pair.apply(x)[2]).prod(), lambda x: (x.sin() * x * x).prod()),
    "two inputs": (lambda x: Product.apply(x, x.cos()).prod(), lambda x: (x * x.cos()).prod()),
}


@pytest.mark.parametrize("name", SCALARS)
def test_traces_and_diagonals_of_hessians(name: str) -> None:
    function, plain = SCALARS[name]
    hessian = torch.func.jacrev(torch.func.jacrev(plain))
    rows = torch.randn(4, 3, 4, **DOUBLE)
    checks: dict[str, tuple[Any, Any]] = {
        "laplacian": (chainrule.laplacian(function), lambda x: hessian(x).trace()),
        "diagonal": (chainrule.hessian_diagonal(function), lambda x: hessian(x).diagonal()),
        "compiled": (chainrule.compile(chainrule.laplacian(function)), lambda x: hessian(x).trace()),
        "gradient": (chainrule.grad(chainrule.laplacian(function)), torch.func.grad(lambda x: hessian(x).trace())),
    }
    mapped = {
        "in_dims": chainrule.laplacian(function, in_dims=0),
        "vmap": chainrule.vmap(chainrule.laplacian(function)),
        "compiled": chainrule.compile(chainrule.vmap(chainrule.laplacian(function))),
    }
    for batch in rows:  # the first call plans, later ones replay
        for transformed, expected in checks.values():
            torch.testing.assert_close(transformed(batch[0]), expected(batch[0]))
        traces = torch.stack([hessian(x).trace() for x in batch])
        for transformed in mapped.values():
            torch.testing.assert_close(transformed(batch), traces)


class Doubling(torch.autograd.Function):
    """It writes to its argument and returns it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(x.mul_(2))
        return x

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> torch.Tensor:
        return 2 * cotangent


@pytest.mark.parametrize("name", ["grad", "hessian", "laplacian"])
def test_torchs_backward_reaches_through_what_is_written(name: str) -> None:
    def written(x: torch.Tensor) -> torch.Tensor:
        return (Doubling.apply(x.sin()) ** 3).sum()

    def plain(x: torch.Tensor) -> torch.Tensor:
        return ((2 * x.sin()) ** 3).sum()

    for _ in range(3):
        x = torch.randn(3, **DOUBLE).requires_grad_()
        found, expected = (
            torch.autograd.grad(getattr(chainrule, name)(f)(x).sum(), x)[0] for f in (written, plain)
        )
        torch.testing.assert_close(found, expected)


def _between(x: torch.Tensor) -> torch.Tensor:
    y = x.sin()
    product = y * y
    Doubling.apply(y)
    return (product * y).sum()


def _of_a_part(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    Doubling.apply(y[1:])
    return (y * y).sum()


@pytest.mark.parametrize(
    ("function", "written"),
    [
        (lambda x: Doubling.apply(x.exp()).sum(), lambda x: (2 * x.exp()).sum()),
        (_between, lambda x: (2 * x.sin() ** 3).sum()),
        (_of_a_part, lambda x: (torch.cat([x[:1], 2 * x[1:]]) ** 2).sum()),
    ],
)
def test_what_was_written_over_is_still_read_as_it_was(function: Any, written: Any) -> None:
    for _ in range(3):
        x = torch.randn(4, dtype=torch.float64)
        torch.testing.assert_close(chainrule.grad(function)(x), torch.func.grad(written)(x))
        torch.testing.assert_close(chainrule.jacrev(chainrule.grad(function))(x), torch.func.hessian(written)(x))
        batch = torch.randn(3, 4, dtype=torch.float64)
        expected = torch.func.vmap(torch.func.grad(written))(batch)
        torch.testing.assert_close(chainrule.vmap(chainrule.grad(function))(batch), expected)
