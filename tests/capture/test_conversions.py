"""Conversions of dtype and ``torch.where`` beside numbers, as they are recorded: against torch.func, and by closed forms."""

from __future__ import annotations

import math

import pytest
import torch

import chainrule
from chainrule.calls import constant_beside
from chainrule.capture.slots import Slot
from chainrule.transforms.trace import trace

aten = torch.ops.aten
NUMBERS = (0.0, -0.0, 1, 2.5, -3, math.inf, -math.inf, 1e30, True)


def _same(ours, theirs):
    """Equal to the last bit, as nothing but selections, casts and single products is computed."""
    assert ours.dtype is theirs.dtype
    assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))
    assert torch.equal(torch.signbit(ours), torch.signbit(theirs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", NUMBERS)
def test_where_beside_a_number(number, dtype):
    """Values and derivatives, the second time by the plan that is kept."""
    x = torch.randn(4, 3, dtype=dtype)
    mask = torch.tensor([True, False, True])
    for choose in (lambda y: torch.where(mask, y, number), lambda y: torch.where(y > 0, number, y)):
        for _ in range(2):
            value, pull = chainrule.vjp(choose, x)
            expected, theirs = torch.func.vjp(choose, x)
            _same(value, expected)
            cotangent = torch.randn(4, 3).to(dtype)
            _same(pull(cotangent)[0], theirs(cotangent)[0])
            _same(chainrule.jacobian(choose)(x), torch.func.jacrev(choose)(x))


def test_where_with_another_number_each_time():
    """The numbers are values and no part of the plan."""
    x = torch.randn(5, dtype=torch.float64)
    for number in (0.5, 1.5, 2.5, -1.0):
        found = chainrule.jacobian(lambda y, number=number: torch.where(y > 0, y, number) ** 2)(x)
        torch.testing.assert_close(found, torch.diag(torch.where(x > 0, 2 * x, 0.0)))  # two roundings of numbers near one


def test_where_is_recorded_as_the_op_of_three_tensors():
    """In one record, with the constant as a value of the tape."""
    x = torch.randn(3)
    tape = trace(lambda y: torch.where(y > 0, y, 0.5), (x,), (0,), {}, "jacobian").tape
    assert [record.op for record in tape.records] == [aten.where.self]
    assert [value.item() for value in tape.values if value.dim() == 0] == [0.5]


def test_where_of_whole_numbers_is_left_alone():
    """Torch's promotion decides: a float beside whole numbers is of the default dtype."""
    x, whole = torch.randn(3), torch.arange(3)
    for choose in (lambda y: y * torch.where(y > 0, whole, 0.5), lambda y: y * torch.where(y > 0, whole, 2)):
        for _ in range(2):
            _same(chainrule.jacobian(choose)(x), torch.func.jacrev(choose)(x))


def test_constants_are_shared_by_what_they_are():
    """Signs of zero and dtypes are told apart; what is no constant of the dtype is none."""
    x = torch.zeros(1)
    assert constant_beside(0.5, x) is constant_beside(0.5, x)
    assert math.copysign(1, constant_beside(-0.0, x).item()) == -1
    assert math.copysign(1, constant_beside(0.0, x).item()) == 1
    assert constant_beside(0.5, x.double()).dtype is torch.float64
    assert constant_beside(0.5, x.long()) is None
    assert constant_beside(math.nan, x) is None
    assert constant_beside(2**60, x) is None
    assert constant_beside(1e300, x) is None
    assert constant_beside(1e300, x.double()).item() == 1e300


@pytest.mark.parametrize("convert", [
    lambda y: y.to(torch.float32), lambda y: y.to(dtype=torch.float32), lambda y: y.float(), lambda y: y.double(),
    lambda y: y.to(torch.float64), lambda y: y.to(torch.bfloat16), lambda y: y.to("cpu", torch.float32),
    lambda y: y.to(y), lambda y: y.to(torch.float32, copy=True), lambda y: (y * 3).to(torch.int64).to(torch.float32) + y.float(),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_conversions(convert, dtype):
    """Gradients pass through a conversion, rounded as torch rounds them."""
    x = torch.randn(3, 2, dtype=dtype)
    for _ in range(2):
        _same(chainrule.jacrev(convert)(x), torch.func.jacrev(convert)(x))
        _same(chainrule.vmap(chainrule.jacobian(convert))(x), torch.func.vmap(torch.func.jacrev(convert))(x))
        def squared(y):
            return (convert(y) ** 2).sum()
        _same(chainrule.grad(squared)(x), torch.func.grad(squared)(x))
        torch.testing.assert_close(chainrule.hessian(squared)(x), torch.func.hessian(squared)(x))


def test_a_conversion_is_one_record():
    """As the dispatcher shows it."""
    x = torch.randn(3)
    tape = trace(lambda y: y.double(), (x,), (0,), {}, "jacobian").tape
    (record,) = tape.records
    assert (record.op, record.args, record.kwargs) == (aten._to_copy.default, (Slot(0),), (("dtype", torch.float64),))


def test_conversions_under_no_grad_and_of_graphs():
    """Constants under ``no_grad``; a closed-over tensor with a graph keeps it."""
    x = torch.randn(3)

    def hidden(y):
        with torch.no_grad():
            return y.double() + 0 * y
    assert torch.equal(chainrule.jacrev(lambda y: hidden(y) * y)(x), torch.diag(x.double()).float())
    weight = torch.randn(3, requires_grad=True)
    chainrule.grad(lambda y: (y.double() * torch.where(y > 0, weight, 0.5).double()).sum())(x).sum().backward()
    assert torch.equal(weight.grad, (x > 0).float())


def test_a_written_tensor_is_converted_as_it_is_now():
    """Writes before and after a conversion."""
    x = torch.randn(3)

    def written(y):
        y = y * 2
        before = y.double()
        y.mul_(3)
        return before * y.double() + torch.where(y > 0, y, 0.25).double()
    for _ in range(2):
        torch.testing.assert_close(chainrule.jacobian(written)(x), torch.func.jacrev(written)(x))


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_a_tensor_that_is_there_already(device):
    """Is returned as it is, by each of the transforms, and nothing is recorded."""
    x = torch.randn(3, 2, dtype=torch.float64)
    same = []

    def function(y):
        z = y * 2
        same.append(z.to(device) is z)
        return (z.to(device) ** 3).sum() * len(z)

    for _ in range(3):
        torch.testing.assert_close(chainrule.grad(function)(x), 72 * x**2)
        torch.testing.assert_close(chainrule.vmap(chainrule.grad(lambda y: (y.to(device) ** 2).sum() * len(y)))(x), 4 * x)
    assert all(same)
    tape = trace(lambda y: y.sin().to(device), (x,), (0,), {}, "jacobian").tape
    assert [record.op for record in tape.records] == [aten.sin.default]


def test_a_device_that_is_not_there():
    """A conversion to another device is recorded as before: to the one of tensors without memory."""
    x = torch.randn(3, dtype=torch.float64)
    out, _ = chainrule.vjp(lambda y: y.to("meta"), x)
    assert out.device.type == "meta"
