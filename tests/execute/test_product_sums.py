"""Sums with matrix products in them: made inside the products, the same numbers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import chainrule
from chainrule.execute.replay import compile_program
from chainrule.execute.simplify import simplify
from chainrule.maps.staging import Program
from tests.execute.test_sharing import calls

tf = torch.func
Tensor = torch.Tensor
DOUBLE = torch.float64


def _make(build: Callable[[list[Any], Callable[..., Any]], list[Any]], values: list[Tensor]) -> tuple[Program, list[Any]]:
    program = Program()
    staged = [program.input(number, value) for number, value in enumerate(values)]
    return program, build(staged, program.call)


def _plain(build: Callable[[list[Any], Callable[..., Any]], list[Any]], values: list[Tensor]) -> list[Tensor]:
    return build(values, lambda function, *args, **kwargs: function(*args, **kwargs))


def _functions(program: Program, results: list[Any]) -> list[str]:
    kept, _ = simplify(program, [result.slot for result in results], program.constants)
    return [i.function.__name__ for i in kept]


def _summand(source: random.Random, values: list[Any], call: Callable[..., Any]) -> Any:
    """A value that can be added to one of 6 rows and 4 columns."""
    x, w, base, bias, column, stack, second, row = values
    kind = source.choice("mm turned shaped base bias column row scaled twice".split())
    if kind == "mm":
        return call(torch.mm, x, w)
    if kind == "turned":
        return call(torch.t, call(torch.mm, call(torch.t, w), call(torch.t, x)))
    if kind == "shaped":
        return call(torch.reshape, call(torch.bmm, stack, second), [6, 4])
    if kind == "scaled":
        return call(torch.mul, call(torch.mm, x, w), row)
    if kind == "twice":
        product = call(torch.mm, x, w)
        return call(torch.add, product, call(torch.sin, product))
    return {"base": base, "bias": bias, "column": column, "row": row}[kind]


@pytest.mark.parametrize("seed", range(150))
def test_random_sums(seed: int) -> None:
    """Sums and differences of products, views of products, values of smaller shapes and values that are read elsewhere, too."""

    def build(values: list[Any], call: Callable[..., Any]) -> list[Any]:
        source, results = random.Random(seed), []
        for _ in range(2):
            total = _summand(source, values, call)
            for _ in range(source.randrange(1, 5)):
                other = _summand(source, values, call)
                one, two = (total, other) if source.random() < 0.6 else (other, total)
                total = call(source.choice((torch.add, torch.add, torch.sub)), one, two)
                if source.random() < 0.2:
                    results.append(total)
            results.append(call(torch.add, total, values[2]) if len(total.shape) < 2 else total)
        return results

    generator = torch.Generator().manual_seed(seed)
    shapes = ((6, 5), (5, 4), (6, 4), (4,), (6, 1), (2, 3, 5), (2, 5, 4), (1, 4))
    values = [torch.randn(shape, dtype=DOUBLE, generator=generator) for shape in shapes]
    program, results = _make(build, values)
    run = compile_program(program, results, views=True)
    for _ in range(2):
        values = [torch.randn(shape, dtype=DOUBLE, generator=generator) for shape in shapes]
        before = [value.clone() for value in values]
        for found in (run(values, ()), run.plain(values, ())):  # type: ignore[attr-defined]
            for one, other in zip(found, _plain(build, values), strict=True):
                torch.testing.assert_close(one, other.expand_as(one), rtol=1e-12, atol=1e-12)
        assert all(map(torch.equal, values, before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128, torch.int64])
def test_which_dtypes(dtype: torch.dtype) -> None:
    def build(values: list[Any], call: Callable[..., Any]) -> list[Any]:
        return [call(torch.add, values[0], call(torch.mm, values[1], values[2]))]

    values = [(torch.randn(3, 3) * 5).to(dtype) for _ in range(3)]
    program, results = _make(build, values)
    assert ("addmm" in _functions(program, results)) is (dtype is not torch.int64)
    torch.testing.assert_close(compile_program(program, results)(values, ())[0], values[0] + values[1] @ values[2])


def test_products_that_stay() -> None:
    """What is read twice, of another dtype, or a result itself."""

    def build(values: list[Any], call: Callable[..., Any]) -> list[Any]:
        x, y, half = values
        result, again = call(torch.mm, x, y), call(torch.mm, y, x)
        return [result, call(torch.add, result, x), call(torch.add, again, call(torch.sin, again)),
                call(torch.add, call(torch.mm, y, y), half)]  # fmt: skip

    values = [torch.randn(3, 3, dtype=DOUBLE), torch.randn(3, 3, dtype=DOUBLE), torch.randn(3, 3)]
    program, results = _make(build, values)
    assert "addmm" not in _functions(program, results)
    for one, other in zip(compile_program(program, results)(values, ()), _plain(build, values), strict=True):
        torch.testing.assert_close(one, other)


def test_a_product_far_before_its_sum_stays() -> None:
    """Its factors would be kept until then."""

    def build(values: list[Any], call: Callable[..., Any]) -> list[Any]:
        x, y = values
        product, other = call(torch.mm, x, y), x
        for _ in range(30):
            other = call(torch.sin, other)
        return [call(torch.add, product, other)]

    program, results = _make(build, [torch.randn(3, 3), torch.randn(3, 3)])
    assert "addmm" not in _functions(program, results)


def _network(x: Tensor, w: Tensor, b: Tensor, v: Tensor, c: Tensor) -> Tensor:
    return F.linear(F.linear(x, w, b).tanh(), v, c)


def _parameters(rows: tuple[int, ...], seed: int, *front: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*front, *shape, dtype=DOUBLE, generator=generator) for shape in ((*rows, 5), (7, 5), (7,), (3, 7), (3,))]


@pytest.mark.parametrize("rows", [(4,), (2, 3), (1,), (0,), ()])
def test_tangents_of_networks(rows: tuple[int, ...]) -> None:
    def along(library: Any, *both: Tensor) -> Tensor:
        return library.jvp(_network, both[:5], both[5:])[1]  # type: ignore[no-any-return]

    compiled = chainrule.compile(lambda *both: along(chainrule, *both))
    for seed in range(4):
        both = _parameters(rows, seed) + _parameters(rows, seed + 10)
        wanted = along(tf, *both)
        for found in (along(chainrule, *both), compiled(*both)):
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
        step = 1e-6
        moved = [p + sign * step * t for sign in (1, -1) for p, t in zip(both[:5], both[5:], strict=True)]
        difference = (_network(*moved[:5]) - _network(*moved[5:])) / (2 * step)
        torch.testing.assert_close(along(chainrule, *both), difference, rtol=1e-6, atol=1e-6)
    if rows == (4,):
        found = Counter(calls(lambda *given: along(chainrule, *given), *both))
        # The value of the first layer; each layer's tangent is three summands, in no call but its two products.
        assert (found["addmm"] + found["linear"], found["mm"], found["add"]) == (5, 0, 0)


def test_many_tangents_and_second_derivatives() -> None:
    def many(library: Any, x: Tensor, *both: Tensor) -> Tensor:
        if library is tf:
            return tf.vmap(lambda *t: tf.jvp(lambda *p: _network(x, *p), both[:4], t)[1])(*both[4:])  # type: ignore[no-any-return]
        push = library.linearize(lambda *p: _network(x, *p), *both[:4])[1]
        return library.vmap(push)(*both[4:])  # type: ignore[no-any-return]

    def curved(library: Any, x: Tensor, *both: Tensor) -> tuple[Tensor, ...]:
        gradient = library.grad(lambda *p: _network(x, *p).square().sum(), argnums=(0, 1, 2, 3))
        return library.jvp(gradient, both[:4], tuple(t[0] for t in both[4:]))[1]  # type: ignore[no-any-return]

    for seed in range(4):
        inputs = [*_parameters((4,), seed), *_parameters((4,), seed + 10, 6)[1:]]
        torch.testing.assert_close(many(chainrule, *inputs), many(tf, *inputs), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(curved(chainrule, *inputs), curved(tf, *inputs), rtol=1e-11, atol=1e-11)
    found = Counter(calls(lambda *given: many(chainrule, *given), *inputs))
    # The last layer's shares are a result: one of its sums is a call of its own.
    assert (found["baddbmm"], found["bmm"], found["mm"], found["add"]) == (2, 0, 1, 1)


def test_under_transforms_and_with_graphs() -> None:
    """The products that add are mapped, differentiated again and joined to graphs as others are."""

    def pushed(library: Any, x: Tensor, tangent: Tensor) -> Tensor:
        return library.jvp(lambda x: x.sin() + x @ x + torch.mv(x, x[0]), (x,), (tangent,))[1]  # type: ignore[no-any-return]

    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x, tangent = (torch.randn(2, 3, 3, dtype=DOUBLE, generator=generator) for _ in range(2))
        for dims in ((0, 0), (0, None), (None, 0)):
            one, two = (t if dim == 0 else t[0] for t, dim in zip((x, tangent), dims, strict=True))
            found = chainrule.vmap(lambda a, b: pushed(chainrule, a, b), in_dims=dims)(one, two)
            wanted = tf.vmap(lambda a, b: pushed(tf, a, b), in_dims=dims)(one, two)
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        again = chainrule.jacobian(lambda a: pushed(chainrule, a, tangent[0]))(x[0])
        torch.testing.assert_close(again, tf.jacrev(lambda a: pushed(tf, a, tangent[0]))(x[0]), rtol=1e-12, atol=1e-12)
        leaf = x[0].clone().requires_grad_()
        (found,) = torch.autograd.grad(pushed(chainrule, leaf, tangent[0]).square().sum(), leaf)
        wanted = tf.grad(lambda a: pushed(tf, a, tangent[0]).square().sum())(x[0])
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
