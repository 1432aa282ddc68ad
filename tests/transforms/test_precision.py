"""Operands of other dtypes, signs of zeros, and tensor subclasses: derivatives are those of the function that ran."""

from __future__ import annotations

import math

import pytest
import torch

import chainrule

X = torch.tensor([2.0, 3.0], dtype=torch.float64)
INTEGERS = torch.tensor([3, 7])

MIXED = {
    "quotient by integers": lambda x: x / INTEGERS,
    "quotient by a number in a tensor": lambda x: x / torch.tensor(3),
    "quotient by float32": lambda x: x / torch.tensor([2.4062, 3.9336]),
    "quotient by half": lambda x: x / torch.tensor([2.4062, 3.9336]).half(),
    "quotient by booleans": lambda x: x / torch.tensor([True, True]),
    "power of integers": lambda x: INTEGERS**x,
    "power with integers": lambda x: x**INTEGERS,
    "xlogy": lambda x: torch.xlogy(x, INTEGERS),
    "atan2": lambda x: torch.atan2(x, INTEGERS),
    "fmod": lambda x: torch.fmod(x, INTEGERS),
    "where": lambda x: torch.where(x > 2.5, x, INTEGERS),
    "maximum": lambda x: torch.maximum(x * INTEGERS, torch.tensor([6.5, 6.5])),
    "product": lambda x: x * torch.tensor([2.4062, 3.9336]).half(),
}


@pytest.mark.parametrize("name", MIXED)
def test_operands_of_other_dtypes(name):
    function = MIXED[name]
    step = 1e-6
    # Central differences: truncation of size step squared, rounding of size 1e-16 / step.
    expected = torch.stack([(function(X + step * e) - function(X - step * e)) / (2 * step) for e in torch.eye(2, dtype=X.dtype)], 1)
    for transform in (chainrule.jacobian, chainrule.jacfwd, chainrule.jacrev):
        found = transform(function)(X)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found, torch.func.jacfwd(function)(X), rtol=1e-14, atol=1e-14)
    hessian = chainrule.hessian(lambda x: (function(x) ** 2).sum())(X)
    torch.testing.assert_close(hessian, torch.func.hessian(lambda x: (function(x) ** 2).sum())(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, k: torch.where(a > 1, a, k),
        lambda a, k: torch.clamp(a, max=k),
        lambda a, k: torch.maximum(a, k) * 2,
        lambda a, k: torch.relu(a) * k,
    ],
)
def test_masks_beside_another_dtype(function):
    x, k = torch.tensor([2.0, 3.0]), torch.tensor([4.0, 2.5], dtype=torch.float64)
    found = chainrule.jvp(lambda a: function(a, k), (x,), (x,))
    expected = torch.func.jvp(lambda a: function(a, k), (x,), (x,))
    torch.testing.assert_close(found, expected)


def test_zeros_of_either_sign_are_two_plans():
    for zero in (0.0, -0.0, 0.0, -0.0):
        found = chainrule.grad(lambda x, zero=zero: (x / zero).sum())(X)
        assert torch.equal(found, torch.full((2,), math.copysign(math.inf, zero), dtype=X.dtype))
        torch.testing.assert_close(chainrule.grad(lambda x, zero=zero: (x / torch.add(x, zero)).sum())(X), torch.zeros(2, dtype=X.dtype))


class Plain(torch.Tensor):
    """A class that adds nothing."""


class Counting(torch.Tensor):
    """A class with a handler of its own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("kind", [Plain, Counting])
@pytest.mark.parametrize("place", ["closed over", "input", "inside", "view", "in place", "outputs"])
def test_tensor_subclasses(kind, place):
    constant = torch.tensor([3.0, 4.0], dtype=torch.float64)
    special = constant.as_subclass(kind)
    functions = {
        "closed over": lambda x, s: (x * s).sin().sum(),
        "input": lambda x, s: (x * x).sum(),
        "inside": lambda x, s: ((x * 2).as_subclass(type(s)) ** 3).sum() if type(s) is kind else ((x * 2) ** 3).sum(),
        "view": lambda x, s: ((x * s).sin()[1:].reshape(1, 1) ** 2).sum(),
        "in place": lambda x, s: ((x * s).mul_(3) * x).sum(),
        "outputs": lambda x, s: (s * x).sum(),
    }
    function = functions[place]
    x = X.as_subclass(kind) if place == "input" else X
    for ours, theirs in ((chainrule.grad, torch.func.grad), (chainrule.hessian, torch.func.hessian)):
        found = ours(lambda x: function(x, special))(x)
        expected = theirs(lambda x: function(x, constant))(X)
        torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)
    tangent = chainrule.jvp(lambda x: function(x, special), (x,), (X,))[1]
    torch.testing.assert_close(tangent.as_subclass(torch.Tensor), torch.func.grad(lambda x: function(x, constant))(X) @ X)


def test_unique_values_are_no_constants():
    with pytest.raises(NotImplementedError, match="unique"):
        chainrule.grad(lambda x: x.unique().sum())(X)
    found = chainrule.jacobian(lambda x: x * x.unique(return_inverse=True)[1])(X)
    torch.testing.assert_close(found, torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float64)))


COEFFICIENTS = {
    "mask, scaled": (lambda x, a, b: (x > 2.5).to(a.dtype) * x * 0.1),
    "mask times a large number": (lambda x, a, b: (x > 2.5).to(a.dtype) * x * 1e5),
    "two products": (lambda x, a, b: a * (b * x)),
    "sum of products": (lambda x, a, b: (a * x).sum() - x * 0.1),
    "product and quotient": (lambda x, a, b: (a * x) / 3),
    "rolled": (lambda x, a, b: (a * (x.roll(1) - 2 * x))[[1, 0]] * b),
    "addcmul": (lambda x, a, b: torch.addcmul(b, x, a, value=0.3) * 0.7),
    "number in a tensor": (lambda x, a, b: a[0] * (b[1] * x) * 0.1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_coefficients_of_lower_precision(name, dtype):
    a, b = torch.tensor([0.8062, 1.9336]).to(dtype), torch.tensor([1.3, -0.7]).to(dtype)

    def function(x):
        return COEFFICIENTS[name](x, a, b)

    # What the function is in float64 alone: every coefficient is a number of float64, too.
    expected = torch.func.jacrev(lambda x: COEFFICIENTS[name](x, a.double(), b.double()))(X)
    for _ in range(4):
        for transform in (chainrule.jacobian, chainrule.jacfwd, chainrule.jacrev):
            torch.testing.assert_close(transform(function)(X), expected, rtol=1e-14, atol=1e-14)
        map_ = chainrule.linear_map(function, X)
        torch.testing.assert_close(map_.dense(), expected, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(map_ @ X, expected @ X, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(chainrule.jacobian(function, layout="sparse_coo")(X).to_dense(), expected, rtol=1e-14, atol=1e-14)
        gradient = chainrule.grad(lambda x: function(x).sum())(X)
        torch.testing.assert_close(gradient, expected.sum(0), rtol=1e-14, atol=1e-14)
        hessian = chainrule.hessian(lambda x: function(x).square().sum())(X)
        torch.testing.assert_close(hessian, 2 * expected.T @ expected, rtol=1e-14, atol=1e-12)
