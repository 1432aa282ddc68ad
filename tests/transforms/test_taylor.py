"""Taylor series through functions, against nested forward derivatives of a curve and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import permutations

import pytest
import torch
import torch.func

import chainrule

Tensor = torch.Tensor


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


FIRST, SECOND = real(6, 4), real(3, 6)


def written(x: Tensor) -> Tensor:
    y = x.clone()
    y[1:] += x[:-1] ** 2
    return y.sin()


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "element-wise": torch.sin,
    "network": lambda x: torch.tanh(SECOND @ torch.tanh(FIRST @ x)).sum(),
    "vector output": lambda x: SECOND @ torch.tanh(FIRST @ x),
    "product": lambda x: x.prod() * x,
    "linear": lambda x: 2 * x,
    "independent": torch.ones_like,
    "softmax": lambda x: x.softmax(0),
    "power": lambda x: (x * x + 1).log() ** 1.5,
    "writes": written,
}


def curve_derivatives(function: Callable[[Tensor], Tensor], x: Tensor, series: list[Tensor]) -> list[Tensor]:
    def along(t: Tensor) -> Tensor:
        return function(x + sum(t ** (k + 1) / math.factorial(k + 1) * h for k, h in enumerate(series)))

    found = []
    for _ in series:
        along = torch.func.jacfwd(along)
        found.append(along(torch.zeros((), dtype=x.dtype)))
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_against_nested_derivatives(name: str) -> None:
    function = FUNCTIONS[name]
    for _ in range(3):
        x, series = real(4), [real(4) for _ in range(4)]
        output, found = chainrule.jet(function, (x,), (series,))
        torch.testing.assert_close(output, function(x))
        torch.testing.assert_close(found, curve_derivatives(function, x, series))


def test_closed_form_of_high_order() -> None:
    x, one, zero = real(), torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    _, found = chainrule.jet(torch.sin, (x,), ([one, zero, zero, zero, zero, zero],))
    expected = [torch.sin(x + k * math.pi / 2) for k in range(1, 7)]
    torch.testing.assert_close(found, expected)


def test_several_primals_and_trees() -> None:
    x, y = real(3), real(3)
    hs, gs = [real(3), real(3)], [real(3), real(3)]
    (product, total), (first, second) = chainrule.jet(lambda a, b: (a * b, a.sum()), (x, y), (hs, gs))
    torch.testing.assert_close((product, total), (x * y, x.sum()))
    torch.testing.assert_close(first, [hs[0] * y + x * gs[0], hs[1] * y + 2 * hs[0] * gs[0] + x * gs[1]])
    torch.testing.assert_close(second, [hs[0].sum(), hs[1].sum()])
    assert chainrule.jet(torch.sin, (x,), ([],)) [1] == []
    same = chainrule.jet(lambda a: a**3, (x,), ([x, x],))[1]
    torch.testing.assert_close(same, [3 * x**3, 6 * x**3 + 3 * x**3])


def test_under_vmap_and_joined() -> None:
    batch, series = real(5, 4), [real(5, 4), real(5, 4)]
    function = FUNCTIONS["network"]
    for _ in range(2):
        found = chainrule.vmap(lambda x, h, g: chainrule.jet(function, (x,), ([h, g],))[1][1])(batch, *series)
        expected = torch.stack([curve_derivatives(function, x, [h, g])[1] for x, h, g in zip(batch, *series, strict=True)])
        torch.testing.assert_close(found, expected)
    x, h, zero = real(3).requires_grad_(), real(3).requires_grad_(), torch.zeros(3, dtype=torch.float64)
    second = chainrule.jet(lambda a: (a**3).sum(), (x,), ([h, zero],))[1][1]
    torch.testing.assert_close(torch.autograd.grad(second, (x, h)), (6 * h * h, 12 * x * h))
    torch.testing.assert_close(
        chainrule.grad(lambda a: chainrule.jet(lambda b: (b**3).sum(), (a,), ([h.detach(), zero],))[1][1])(x.detach()),
        6 * h.detach() ** 2,
    )


def test_bad_input() -> None:
    x = real(3)
    for primals, series in ((x, ([x],)), ((x,), ([x], [x])), ((x,), (x,)), ((x,), ([real(4)],)), ((3.0,), ([x],)), ((x, x), ([x], [x, x]))):
        with pytest.raises(RuntimeError, match="jet"):
            chainrule.jet(lambda *a: a[0], primals, series)
    assert chainrule.jet(torch.sin, (x,), ([x],))[1][0].shape == (3,)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_determinant_along_a_line(size: int) -> None:
    """Against the polynomial `det(A + tV)` in exact rational numbers; nested `torch.func.jvp` is wrong from order two on."""
    a, v = torch.randn(2, size, size, dtype=torch.float64).unbind(0)
    exact = [[(Fraction(p), Fraction(q)) for p, q in zip(*rows, strict=True)] for rows in zip(a.tolist(), v.tolist(), strict=True)]
    coefficients = [Fraction(0)] * (size + 4)
    for order in permutations(range(size)):
        sign = (-1) ** sum(order[i] > order[j] for i in range(size) for j in range(i + 1, size))
        product = [Fraction(sign)]
        for i, j in enumerate(order):
            constant, slope = exact[i][j]
            product = [constant * p + slope * q for p, q in zip([*product, Fraction(0)], [Fraction(0), *product], strict=True)]
        for power, part in enumerate(product):
            coefficients[power] += part
    zero = torch.zeros_like(v)
    value, series = chainrule.jet(torch.linalg.det, (a,), ([v, zero, zero],))
    for order, found in enumerate([value, *series]):
        wanted = float(coefficients[order] * math.factorial(order))
        assert abs(float(found) - wanted) <= 1e-10 * (1 + abs(wanted))  # condition numbers of a few thousand


def hidden(x: Tensor) -> Tensor:
    with torch.no_grad():
        z = x**2
    return (z * x).sum()


def test_forward_mode_sees_steps_without_gradients() -> None:
    """As ``jvp``, here and in torch.func: ``torch.no_grad`` is about reverse mode."""
    for _ in range(2):
        x, v = real(3), real(3)
        first, second = chainrule.jet(hidden, (x,), ([v, torch.zeros_like(v)],))[1]
        torch.testing.assert_close(first, torch.func.jvp(hidden, (x,), (v,))[1])
        torch.testing.assert_close(first, chainrule.jvp(hidden, (x,), (v,))[1])
        torch.testing.assert_close(second, (6 * x * v**2).sum())
        mapped = chainrule.vmap(lambda x: chainrule.jet(hidden, (x,), ([v],))[1][0])(torch.stack([x, x]))
        torch.testing.assert_close(mapped, torch.stack([first, first]))


def test_series_that_are_no_lists() -> None:
    x = real(3)
    for series in ((x,), ([x], x)):
        with pytest.raises(RuntimeError, match=r"series of primal \d to be a list with one coefficient per order"):
            chainrule.jet(torch.add, (x, x)[: len(series)], series)
    with pytest.raises(RuntimeError, match="list of 1 coefficients like the first, got 2 for primal 1"):
        chainrule.jet(torch.add, (x, x), ([x], [x, x]))


@pytest.mark.parametrize("coefficient", [1.0, None, [torch.ones(3)], torch.ones(2), torch.ones(3, dtype=torch.long)])
def test_coefficients_are_checked(coefficient):
    kind = ValueError if isinstance(coefficient, torch.Tensor) and coefficient.dtype == torch.long else RuntimeError
    with pytest.raises(kind, match="jet"):
        chainrule.jet(torch.sin, (torch.ones(3),), ([coefficient],))
