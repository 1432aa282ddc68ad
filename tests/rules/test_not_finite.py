"""What stands behind a mask is zero beside rows that softmax makes NaN; one-sided second derivatives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import chainrule

DOUBLE = {"dtype": torch.float64}

ATTENTION = {
    "masked_fill": lambda s, m, v: s.masked_fill(m, -math.inf).softmax(-1) @ v,
    "where": lambda s, m, v: torch.where(m, -math.inf, s).softmax(-1) @ v,
    "logsumexp": lambda s, m, v: s.masked_fill(m, -math.inf).logsumexp(-1),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_rows_that_are_masked_as_a_whole(name: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(4, 3, **DOUBLE), torch.randn(5, 3, **DOUBLE), torch.randn(5, 2, **DOUBLE)
    mask = torch.rand(4, 5) > 0.5
    mask[1] = True

    def attend(q: Any) -> Any:
        return ATTENTION[name](q @ k.T, mask, v)

    both = torch.stack([q, -q])
    for transform in (
        lambda lib: lib.grad(lambda q: attend(q).sum())(q),
        lambda lib: lib.grad(lambda q: attend(q).square().sum())(q),
        lambda lib: lib.jacrev(attend)(q),
        lambda lib: lib.vmap(lib.jacrev(attend))(both),
    ):
        expected = transform(torch.func)
        for _ in range(2):
            found = transform(chainrule)
            # Sums of at most ten products of numbers of size one; NaN stands where torch has it, or is zero.
            known = ~expected.isnan()
            torch.testing.assert_close(found[known], expected[known], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("function", [torch.nn.functional.elu, torch.nn.functional.celu, torch.nn.functional.selu])
def test_second_derivative_of_elu_at_zero(function: Any) -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -2.0], **DOUBLE)
    for transform in (lambda lib: lib.hessian(lambda x: function(x).sum())(x), lambda lib: lib.jacfwd(function)(x)):
        torch.testing.assert_close(transform(chainrule), transform(torch.func))


def test_log_ndtr_has_finite_second_derivatives() -> None:
    x = torch.tensor([800.0, 30.0, 5.0, 4.99, 0.0, -6.0, -800.0], **DOUBLE)
    slope = chainrule.vmap(chainrule.grad(torch.special.log_ndtr))(x)
    curvature = chainrule.vmap(chainrule.grad(chainrule.grad(torch.special.log_ndtr)))(x)
    assert curvature.isfinite().all()
    # -h (x + h) with the slope h; it cancels on the far left, where it is -1 + 1 / x**2 up to 1e-11.
    torch.testing.assert_close(curvature[:-1], (-slope * (x + slope))[:-1], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(curvature[-1], -1 + x[-1] ** -2, rtol=1e-10, atol=0)
