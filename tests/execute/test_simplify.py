"""Simplified programs compute what the calls compute one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chainrule
from chainrule.execute.replay import compile_program, owned
from chainrule.execute.simplify import simplify
from chainrule.maps.staging import Program

Tensor = torch.Tensor
SHAPES = ((3,), (2, 3), (), (2, 1))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("mul add sub rsub neg sin view".split()), st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=14),
       st.lists(st.integers(0, 99), min_size=1, max_size=3), st.booleans())
def test_random_programs(steps: list[tuple[str, int, int]], chosen: list[int], recorded: bool) -> None:
    dtypes = (torch.float64, torch.float64, torch.float32, torch.float64)
    inputs = [torch.rand(shape, dtype=dtype) + 0.5 for shape, dtype in zip(SHAPES, dtypes, strict=True)]
    program = Program()
    program.recorded = recorded

    def build(values: list[Tensor], call: object) -> list[Tensor]:
        made = list(values)
        for name, one, other in steps:
            a, b = made[one % len(made)], made[other % len(made)]
            if name in ("mul", "add", "sub"):
                made.append(call(getattr(torch, name), a, b))  # type: ignore[operator]
            elif name == "rsub":
                made.append(call(torch.rsub, a, 1 if other % 2 else 2))  # type: ignore[operator]
            elif name == "view":
                made.append(call(torch.unsqueeze, a, 0) if a.ndim < 3 else call(torch.neg, a))  # type: ignore[operator]
            else:
                made.append(call(getattr(torch, name), a))  # type: ignore[operator]
        return [made[number % len(made)] for number in chosen]

    staged = build([program.input(number, value) for number, value in enumerate(inputs)], program.call)  # type: ignore[misc]
    run = compile_program(program, staged)  # type: ignore[arg-type]
    for _ in range(2):
        values = [torch.rand_like(value) + 0.5 for value in inputs]
        expected = build(values, lambda function, *args: function(*args))
        for found, want in zip(run(values, ()), expected, strict=True):
            torch.testing.assert_close(found, want)


def calls(program: Program, *wanted: int) -> list[str]:
    return [getattr(i.function, "__name__", "?") for i in simplify(program, wanted, program.constants)[0]]


def test_one_minus_a_product_is_one_call() -> None:
    program = Program()
    x = program.input(0, torch.randn(3))
    slope = 1 - x * x
    assert calls(program, slope.slot) == ["addcmul"]
    square = x * x
    assert calls(program, slope.slot, square.slot) == ["mul", "sub"]


def test_other_dtypes_are_left_alone() -> None:
    program = Program()
    x, y = program.input(0, torch.randn(3)), program.input(1, torch.randn(3, dtype=torch.float64))
    mixed = program.call(torch.add, x * y, x)
    assert calls(program, mixed.slot) == ["mul", "add"]
    whole = program.input(2, torch.arange(3))
    assert calls(program, (1 - whole * whole).slot) == ["mul", "rsub"]


def test_calls_that_nothing_needs_are_dropped() -> None:
    program = Program()
    x = program.input(0, torch.randn(3))
    program.call(torch.exp, x)
    wanted = program.call(torch.sin, x)
    assert calls(program, wanted.slot) == ["sin"]


def test_what_is_the_same_in_every_run_is_computed_once() -> None:
    program = Program()
    x = program.input(0, torch.randn(3))
    ones = program.call(torch.ones, (3,))
    wanted = program.call(torch.mul, x, program.call(torch.unsqueeze, ones, 0))
    assert calls(program, wanted.slot) == ["mul"]
    # Not a result, nor what a result is a view of: each run returns its own.
    view = program.call(torch.unsqueeze, ones, 0)
    assert calls(program, view.slot) == ["ones", "unsqueeze"]
    run = compile_program(program, [view, wanted])
    first, _ = run([torch.randn(3)], ())
    first.zero_()
    assert run([torch.randn(3)], ())[0].tolist() == [[1.0, 1.0, 1.0]]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("mul add sin view add_ copy_ zeros".split()), st.integers(0, 99), st.integers(0, 99)),
                min_size=1, max_size=14), st.lists(st.integers(0, 99), min_size=1, max_size=3))
def test_random_programs_that_write(steps: list[tuple[str, int, int]], chosen: list[int]) -> None:
    """What is written to, through whichever view, has the same values after each replay: results and inputs."""

    def function(*values: Tensor) -> list[Tensor]:
        made = list(values)
        for name, one, other in steps:
            a, b = made[one % len(made)], made[other % len(made)]
            if name == "view":
                made.append(a.view(3)[1:].expand(2) if a.numel() == 3 else a.flip(0))
            elif name == "zeros":
                made.append(torch.zeros(3, dtype=torch.float64))
            elif a.shape != b.shape:
                made.append(a * 2 + 1)
            elif name == "add_":
                a.add_(b.clone(), alpha=0.5)
            elif name == "copy_":
                a.copy_(b.clone())
            else:
                made.append(a.sin() if name == "sin" else getattr(torch, name)(a, b))
        return [made[number % len(made)] * 1.5 for number in chosen]

    compiled = chainrule.compile(function)
    for _ in range(3):
        values = [torch.rand(3, dtype=torch.float64) for _ in range(2)]
        twins = [value.clone() for value in values]
        torch.testing.assert_close(compiled(*values), function(*twins))
        torch.testing.assert_close(values, twins)


def test_what_is_transposed_twice_is_itself() -> None:
    program = Program()
    program.recorded = True
    x = program.input(0, torch.randn(2, 3, 4))
    back = program.call(torch.transpose, program.call(torch.transpose, x, 1, 2), 2, 1)
    other = program.call(torch.transpose, program.call(torch.transpose, x, 1, 2), 0, 1)
    assert calls(program, program.call(torch.sin, back).slot) == ["sin"]
    assert calls(program, program.call(torch.sin, other).slot) == ["permute", "sin"]


def written_before_read(x: Tensor) -> Tensor:
    basis = torch.zeros_like(x)
    basis[1].fill_(2.0)
    basis[:2].add_(1.0)
    return (basis * x).cumsum(0)


def read_between_writes(x: Tensor) -> Tensor:
    basis = torch.zeros_like(x)
    basis[1] = 2.0
    before = basis * x
    basis[2] = 3.0
    return before - basis * x


def written_with_a_value(x: Tensor) -> Tensor:
    basis = torch.ones_like(x)
    basis[0] = x[1]
    basis[1] = 5.0
    return basis.sin() * x


def written_and_returned(x: Tensor) -> tuple[Tensor, Tensor]:
    basis = x.new_ones(x.shape[0])
    basis[1:] *= 4.0
    return basis, basis[1:] * x[1:]


def ones_only(x: Tensor) -> tuple[Tensor, Tensor]:
    scaled = torch.ones_like(x) * x
    return scaled, scaled * torch.ones_like(x) + 1.0


@pytest.mark.parametrize(
    ("function", "most"),
    [(written_before_read, 2), (read_between_writes, None), (written_with_a_value, None), (written_and_returned, None), (ones_only, 2)],
)
def test_memory_of_fixed_values(function: Callable[[Tensor], Tensor], most: int | None) -> None:
    """What is filled with the same numbers in every run is filled once, unless something else happens to it."""
    compiled = chainrule.compile(function)
    kept = []
    for _ in range(4):
        x = torch.randn(4, dtype=torch.float64)
        kept.append((compiled(x), function(x)))
    for found, expected in kept:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    source = compiled.source(torch.randn(4, dtype=torch.float64))
    assert most is None or source.count(" = f") <= most, source
    derivative = chainrule.compile(chainrule.jacrev(function))
    for _ in range(3):
        x = torch.randn(4, dtype=torch.float64)
        torch.testing.assert_close(derivative(x), torch.func.jacfwd(function)(x))


def test_a_bias_and_a_product_with_a_transpose_are_one_call() -> None:
    program = Program()
    x, weight, bias = (program.input(n, torch.randn(shape)) for n, shape in enumerate([(2, 3), (4, 3), (4,)]))
    turned = torch.t(weight)
    out = torch.addmm(bias, x, turned)
    assert calls(program, out.slot) == ["linear"]
    assert calls(program, out.slot, turned.slot) == ["t", "addmm"]  # the transpose is wanted as well
    values = [torch.randn(2, 3), torch.randn(3, 4).t(), torch.randn(4)]
    assert torch.equal(compile_program(program, [out])(values, ())[0], torch.addmm(values[2], values[0], values[1].t()))
    scaled = torch.addmm(bias, x, turned, alpha=2)
    matrix = torch.addmm(program.input(3, torch.randn(2, 4)), x, turned)
    assert calls(program, scaled.slot) == ["t", "addmm"]
    assert calls(program, matrix.slot) == ["t", "addmm"]


def test_slices_of_known_shapes_are_narrowed() -> None:
    x = torch.arange(20.0).reshape(4, 5)
    for places in (slice(1, 3), slice(None, -1), slice(-2, None), slice(1, 100), slice(2, 2), slice(0, 4, 2)):
        for dim in (0, 1, -1):
            function = chainrule.compile(lambda t, dim=dim, places=places: torch.ops.aten.slice.Tensor(
                t * 2.0, dim, places.start, places.stop, places.step or 1) + 1.0)  # fmt: skip
            for _ in range(2):
                assert torch.equal(function(x), torch.ops.aten.slice.Tensor(x * 2.0, dim, places.start, places.stop, places.step or 1) + 1.0)


def test_sums_into_vectors_and_aliases() -> None:
    program = Program()
    base, places = program.input(0, torch.zeros(5)), program.constant(torch.tensor([0, 0, 3]))
    out = torch.index_add(base, 0, places, program.input(1, torch.ones(3)))
    run = compile_program(program, [out])
    plain = [i.function for i in run.source_of.plain]  # type: ignore[attr-defined]
    assert torch.scatter_add in plain and torch.index_add not in plain
    for _ in range(2):
        values = [torch.randn(5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]
        kept = values[0].clone()
        assert torch.equal(run.plain(values, ())[0], run(values, ())[0])  # type: ignore[attr-defined]
        assert torch.equal(values[0], kept)


def test_large_views_of_small_fixed_values() -> None:
    for function, x in (
        (chainrule.vmap(chainrule.hessian(lambda s: s.sum())), torch.randn(2, 64)),
        (chainrule.vmap(chainrule.jacrev(lambda s: s[:32] - s[32:])), torch.randn(300, 64)),
    ):
        compiled = chainrule.compile(function)
        for _ in range(3):
            first = compiled(x)
            assert torch.equal(first, function(x))
            if first.is_contiguous():
                first.fill_(7.0)  # what a caller does with a result is his own


def test_a_broadcast_to_as_many_elements_need_not_be_copied() -> None:
    program = Program()
    x = program.input(0, torch.randn(3, dtype=torch.float64))
    result = program.call(torch.broadcast_to, x * x, (1, 3))
    wide = program.call(torch.broadcast_to, x * x, (2, 3))
    found, other = owned(program, [result, wide])
    assert found is result
    assert other is not wide
    value = torch.randn(3, dtype=torch.float64)
    first, second = compile_program(program, [found, other])([value], ())
    torch.testing.assert_close(first, (value * value)[None])
    torch.testing.assert_close(second, (value * value).expand(2, 3))
    second[0].zero_()
    assert second[1].abs().sum() > 0
    torch.testing.assert_close(first, (value * value)[None])


def test_a_real_and_an_imaginary_part_are_put_together_at_once() -> None:
    """What is the same part twice, or is used elsewhere, stays a sum."""
    for shaped in (False, True):
        program = Program()
        x, y = program.input(0, torch.randn(2, 3)), program.input(1, torch.randn(2, 3))
        zero = program.constant(torch.zeros(()))
        real, imaginary = torch.complex(x, zero), torch.complex(zero, y)
        halves = [torch.reshape(half, (3, 2)) if shaped else half for half in (imaginary, real)]
        total = torch.add(*halves)
        assert calls(program, total.slot) == ["complex", "reshape"][: 1 + shaped]
        assert calls(program, total.slot, halves[0].slot).count("add") == 1
        values = [torch.randn(2, 3), torch.randn(2, 3)]
        found = compile_program(program, [total])(values, ())[0]
        torch.testing.assert_close(found, torch.complex(*values).reshape(total.shape))
        twice = torch.add(real, torch.complex(y, zero))
        assert calls(program, twice.slot).count("complex") == 2
