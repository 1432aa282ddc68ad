"""Functions that name dimensions and sizes: each spelling gives what torch gives, in every transform."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import chainrule
from chainrule.function_arguments import READINGS, Joined, Over
from chainrule.function_schemas import by_schema
from chainrule.shortcuts import COMPILED
from chainrule.transforms.trace import trace
from tests.readings import same

Tensor = torch.Tensor

SPELLINGS: dict[str, Callable[[Tensor], Any]] = {
    "view": lambda x: x.view(4, 3, 2),
    "view of a list": lambda x: x.view([6, -1]),
    "view by keyword": lambda x: x.view(size=(6, 4)),
    "view of a size": lambda x: x.view(x.shape),
    "contiguous": lambda x: x.contiguous().view(-1) + x.transpose(0, 1).contiguous().view(-1),
    "reshape": lambda x: x.reshape(-1),
    "reshape of a transpose": lambda x: x.transpose(0, 1).reshape(3, 8),
    "torch.reshape": lambda x: torch.reshape(x, (4, -1)),
    "permute": lambda x: x.permute(2, 0, -2),
    "torch.permute": lambda x: torch.permute(x, (1, 2, 0)),
    "transpose": lambda x: x.transpose(-1, 0),
    "transpose by keyword": lambda x: x.transpose(dim0=0, dim1=1),
    "unsqueeze": lambda x: x.unsqueeze(-1),
    "swapaxes": lambda x: x.swapaxes(0, -1) + torch.swapdims(x, 2, 0),
    "narrow": lambda x: x.narrow(-1, 1, 2) + torch.narrow(x, 2, 0, 2),
    "narrow from the end": lambda x: x.narrow(2, -3, 2),
    "narrow to nothing": lambda x: x.narrow(1, 3, 0),
    "movedim": lambda x: x.movedim(0, -1) + torch.movedim(x, -3, 2),
    "movedim back": lambda x: x.movedim(2, 0) + x.movedim(-1, -3),
    "movedim of several": lambda x: x.movedim((0, 1), (1, 2)),
    "vstack": lambda x: torch.vstack([x, x.sin()]) + torch.row_stack((x, x)),
    "vstack of rows": lambda x: torch.vstack([x[0, 0], x[1, 1]]),
    "hstack": lambda x: torch.hstack([x, x.sin()]),
    "hstack of vectors": lambda x: torch.hstack([x[0, 0], x[1, 1], x[0, 2]]),
    "squeeze": lambda x: x[:1].squeeze(0),
    "squeeze of nothing": lambda x: x.squeeze(1),
    "squeeze of all": lambda x: x[:1].squeeze(),
    "t": lambda x: x[0].t(),
    "t of a vector": lambda x: x[0, 0].t(),
    "T": lambda x: x[0].T,
    "roll": lambda x: x.roll(1, 0),
    "roll of two": lambda x: torch.roll(x, (1, -2), (0, -1)),
    "roll by keyword": lambda x: torch.roll(x, -1, dims=1),
    "roll of everything": lambda x: x.roll(5),
    "cat": lambda x: torch.cat([x, x.sin()]),
    "cat along": lambda x: torch.cat((x[:, 1:], x[:, :1]), 1),
    "cat by keyword": lambda x: torch.cat([x, x], dim=-1),
    "cat with constants": lambda x: torch.cat([torch.ones(1, 3, 4, dtype=x.dtype), x * 2, torch.zeros(2, 3, 4, dtype=x.dtype)]),
    "cat of dtypes": lambda x: torch.cat([x, torch.ones(2, 3, 4, dtype=torch.float32)]),
    "cat of an empty one": lambda x: torch.cat([torch.ones(0, dtype=x.dtype), x]),
    "concat": lambda x: torch.concat([x, x]),
    "concatenate": lambda x: torch.concatenate([x, x], 2),
    "cat of one": lambda x: torch.cat([x]),
    "cat of constants": lambda x: torch.cat([torch.ones(2, dtype=x.dtype), torch.ones(2, dtype=x.dtype)]).sum() * x,
    "stack": lambda x: torch.stack([x[0], x[1] * x[0]]),
    "stack along": lambda x: torch.stack((x, x.exp()), -1),
    "stack of numbers": lambda x: torch.stack([x[0, 0, 0], x[0, 1, 2], torch.tensor(2.0, dtype=x.dtype)]),
    "stack of a written one": lambda x: torch.stack([x.clone().mul_(2), x]),
    "mT": lambda x: x.mT,
    "expand": lambda x: x[:, :1].expand(2, 5, 4),
    "expand -1": lambda x: x[None].expand([6, -1, -1, -1]),
    "flatten": lambda x: x.flatten(),
    "flatten one": lambda x: x.flatten(1),
    "flatten two": lambda x: torch.flatten(x, 0, -2),
    "flatten of a transpose": lambda x: x.mT.flatten(1, 2),
    "flatten of one dimension": lambda x: x.flatten(1, 1),
    "flatten of a scalar": lambda x: x[0, 0, 0].flatten(),
    "softmax": lambda x: x.softmax(-1),
    "softmax by keyword": lambda x: torch.softmax(x, dim=0),
    "softmax with a dtype": lambda x: x.softmax(1, dtype=torch.float64),
    "log_softmax": lambda x: torch.log_softmax(x, 1),
    "softmax of a scalar": lambda x: x[0, 0, 0].softmax(0),
    "sum": lambda x: x.sum(),
    "sum over one": lambda x: x.sum(1),
    "sum over two": lambda x: torch.sum(x, (0, -1), keepdim=True),
    "sum by keyword": lambda x: x.sum(dim=-1, keepdim=True),
    "sum over none": lambda x: x.sum(()),
    "sum of booleans": lambda x: (x > 0).sum(1) * x.sum(1),
    "sum of a scalar": lambda x: x[0, 0, 0].sum(0),
    "mean": lambda x: x.mean(),
    "mean over one": lambda x: x.mean(-1, True),
    "mean with a dtype": lambda x: x.mean(1, dtype=torch.float64),
    "amax": lambda x: x.amax(1),
    "amin": lambda x: x.amin((0, 2)),
    "number": lambda x: x[1],
    "negative number": lambda x: x[:, -1],
    "number behind": lambda x: x[:, :, 0],
    "slice": lambda x: x[1:],
    "slice with a step": lambda x: x[:, ::2],
    "slice to a negative": lambda x: x[:, :-1],
    "slice past the end": lambda x: x[:, 1:99],
    "empty slice": lambda x: x[:, 2:1],
    "whole": lambda x: x[:],
    "None": lambda x: x[:, None],
    "None behind": lambda x: x[:, :, :, None],
    "two numbers": lambda x: x[0, 1],
    "Ellipsis": lambda x: x[..., 0],
    "tensor": lambda x: x[torch.tensor([1, 0])],
    "mask": lambda x: x[0][torch.tensor([True, False, True])],
    "boolean": lambda x: x[True],
    "two slices": lambda x: x[1:, :2],
    "slices and a number": lambda x: x[:, 1:, 2],
    "number and None": lambda x: x[0, None, :, -1],
    "three numbers": lambda x: x[1, 2, 3],
    "Ellipsis between": lambda x: x[0, ..., 1:3],
    "None and Ellipsis": lambda x: x[None, ..., ::2, None],
    "Ellipsis and whole": lambda x: x[..., :, 1],
    "slice and tensor": lambda x: x[:, 1:, torch.tensor([3, 0, 0])],
    "tensor behind": lambda x: x[..., torch.tensor([[1, 0], [2, 2]])],
    "number and tensor": lambda x: x[1, torch.tensor([2, 0])],
    "two tensors": lambda x: x[torch.tensor([1, 0]), torch.tensor([2, 1])],
    "tensors apart": lambda x: x[torch.tensor([1, 0]), :, torch.tensor([2, 1])],
    "tensor and None": lambda x: x[torch.tensor([1, 0]), None],
    "tensor of a number": lambda x: x[torch.tensor(1)],
    "list": lambda x: x[[1, 0]],
    "einsum": lambda x: torch.einsum("ijk,ijl->ikl", x, x),
    "added in place": lambda x: x.clone().add_(x.sin()).add_(1.5),
    "subtracted in place": lambda x: x.clone().sub_(x.sin()).sub_(torch.ones(4, dtype=x.dtype)),
    "multiplied in place": lambda x: x.clone().mul_(x.sin()).mul_(2),
    "divided in place": lambda x: x.clone().div_(x.cos() + 3),
    "add_ with a factor": lambda x: x.clone().add_(x.sin(), alpha=2),
    "operators in place": lambda x: operator.itruediv(operator.imul(operator.isub(operator.iadd(x.clone(), 1), x.sin()), x), 2),
    "index_put_": lambda x: x.clone().index_put_((torch.tensor([1]), torch.tensor([2])), x[:1, 0]),
    "index_put_ of a mask": lambda x: x.clone().index_put_([torch.tensor([True, False])], torch.tensor(2.0, dtype=x.dtype)),
    "index_put_ that adds": lambda x: x.clone().index_put_((torch.tensor([1, 1]),), x[:1], accumulate=True),
    "index_put": lambda x: x.index_put((torch.tensor([1]), torch.tensor([2])), x[:1, 0]) + x.index_put((torch.tensor([1]),), x[:1, :1] * 2),
    "einsum of three": lambda x: torch.einsum("ijk,ijl,lm->ikm", x, x, x[0, 0].outer(x[1, 1])),
    "einsum of one": lambda x: torch.einsum("ijk->ki", x),
    "var": lambda x: x.var() + x.var(1).sum() + torch.var(x, (0, 2), True).sum() + x.var(1, False, True).sum(),
    "var of named ones": lambda x: x.var(dim=-1, correction=0) + x.var(unbiased=False) + x.var([1, 2], keepdim=True)[..., 0],
    "var of a flag": lambda x: x.var(True) + torch.var(x, False) + torch.var(x, dim=None, correction=2),
    "std": lambda x: x.std(1) + x.std() + torch.std(x, dim=1, unbiased=True) + x.std(correction=2, keepdim=True)[0],
    "where": lambda x: x.where(x > 0, x * 2) + x.where(torch.tensor(True), 0.0),
    "norm": lambda x: x.norm() + x.norm(dim=1).sum() + x.norm(3).sum() + x.norm(2, (0, 1), True).sum() + x.norm(p="fro", dim=(0, 2)).sum(),
    "torch.norm": lambda x: torch.norm(x) + torch.norm(x, 2.5, dim=-1).sum() + torch.norm(x, dim=[0, 1], keepdim=True).sum(),
    "torch.linalg.norm": lambda x: torch.linalg.norm(x) + torch.linalg.norm(x, dim=1).sum() + torch.linalg.norm(x, 3, 1, True).sum(),
    "torch.linalg.norm of a matrix": lambda x: torch.linalg.norm(x, dim=(0, 1)) + torch.linalg.norm(x[0], "fro"),
    "power of a number": lambda x: 2**x + 0.5**x,
    "over": lambda x: 1 / (x + 9) + 1.0 / (x + 7) + 2 / (x + 9) - torch.ones(4, dtype=x.dtype) / (x + 9),
    "expand_as": lambda x: x[:, :1].expand_as(x) * x,
    "view_as": lambda x: x.view_as(torch.ones(4, 6)) * 2 + x.view_as(other=torch.ones(4, 6)),
    "broadcast_to": lambda x: torch.broadcast_to(x[0, :1], (3, 4)) * x + x[0, 0].broadcast_to((3, 4)) + torch.broadcast_to(x[0, 0], size=(3, 4)),
    "ravel": lambda x: torch.ravel(x) + x.mT.ravel() + x[0, 0, 0].ravel(),
    "squeeze without dimensions": lambda x: x[:1, :, :1].squeeze() + torch.squeeze(x[:, 0, 0][None])[0] + x[0, 0, 0].squeeze(),
    "special functions": lambda x: torch.special.expit(x) + torch.special.xlogy(x, x.exp()) + torch.special.xlogy(x, 2.0),
    "broadcast_tensors": lambda x: torch.mul(*torch.broadcast_tensors(x, x[:1, :1])) + torch.mul(*torch.broadcast_tensors(x, x.sin())),
    "meshgrid": lambda x: torch.mul(*torch.meshgrid(x[0, 0], x[1, 1, 1:], indexing="ij"))
    + torch.mul(*torch.meshgrid(x[0, 0, 1:], x[1, 1], indexing="xy")),
    "tensordot": lambda x: torch.tensordot(x, x[0].t(), 1) + torch.tensordot(x, x[0], dims=([2], [1])),
    "tensordot of two": lambda x: torch.tensordot(x, x, ([0, -1], [0, 2])) + torch.tensordot(x[0, 0], x[0, 0], 1),
    "tensordot of none": lambda x: torch.tensordot(x[0, 0], x[1, 1], 0),
    # Torch has no second derivatives of it forward over reverse.
    "cdist": lambda x: torch.cdist(x.detach(), x.detach().sin() + 1) * x[..., :3],
    "F.dropout": lambda x: F.dropout(x, 0.5, False) + F.dropout(x, 0.0),
    "F.mse_loss": lambda x: F.mse_loss(x, x.sin()) + F.mse_loss(x, x.cos(), reduction="sum") + F.mse_loss(x, x.exp(), reduction="none"),
    "F.l1_loss": lambda x: F.l1_loss(x, x.sin() + 9) + F.l1_loss(x, x.cos() - 9, reduction="none"),
    "roll all by keyword": lambda x: torch.roll(x, shifts=1, dims=0) + x.roll(shifts=(1, -1), dims=(0, 2)) + x.roll(1, dims=-1),
    "in place": lambda x: F.relu(x.clone(), inplace=True) + F.silu(x * 2, inplace=True),
    "in place with a factor": lambda x: x.clone().add_(x.sin(), alpha=0.5).sub_(x * x, alpha=-2).add_(x.exp(), alpha=0.0),
    "F.softmax": lambda x: F.softmax(x, dim=1),
    "F.log_softmax": lambda x: F.log_softmax(x, -1),
}


def value() -> Tensor:
    return torch.randn(2, 3, 4, dtype=torch.float64)


def scalar(spelling: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    return lambda x: (spelling(x * x) ** 3).sum()


@pytest.mark.parametrize("name", SPELLINGS)
def test_as_in_torch(name: str) -> None:
    """Values, strides seen by the function, and derivatives of order one and two agree in each nest of transforms."""
    spelling = SPELLINGS[name]
    x, many = value(), torch.stack([value() for _ in range(3)])
    # Distances are recorded in parts, products over dimensions may be: sums of a few numbers, in another order than in torch's kernel.
    unit = 64 * torch.finfo(x.dtype).eps if name.startswith(("cdist", "tensordot")) else 0.0
    torch.testing.assert_close(trace(spelling, (x,), (0,), {}, "trace").out_leaves[0], spelling(x), rtol=unit, atol=unit)
    batched = name in ("mask", "boolean")  # torch.vmap has no rule for these
    if not batched:
        torch.testing.assert_close(chainrule.vmap(spelling)(many), torch.vmap(spelling)(many))
    loss = scalar(spelling)
    torch.testing.assert_close(chainrule.grad(loss)(x), torch.func.grad(loss)(x))
    each = torch.stack([torch.func.grad(loss)(sample) for sample in many])
    torch.testing.assert_close(chainrule.vmap(chainrule.grad(loss))(many), each)
    torch.testing.assert_close(chainrule.grad(lambda m: chainrule.vmap(loss)(m).sum())(many), each)
    hessian = torch.func.hessian(loss)(x)
    torch.testing.assert_close(chainrule.grad(lambda z: chainrule.grad(loss)(z).sum())(x), hessian.sum((0, 1, 2)))


def test_distances() -> None:
    """A gradient, the first time and with the plan that was kept."""

    def loss(x: Tensor) -> Tensor:
        return (torch.cdist(x, x.sin() + 1) ** 3).sum() + torch.cdist(x, x.exp() + 2, p=3.0).sum()

    for _ in range(2):
        x = value()
        torch.testing.assert_close(chainrule.grad(loss)(x), torch.func.grad(loss)(x))


@pytest.mark.parametrize(
    ("view", "number"), [(SPELLINGS[name], n) for n, name in enumerate(("view", "transpose", "number", "mT", "slice", "None"))]
)
def test_writes_through_views(view: Callable[[Tensor], Tensor], number: int) -> None:
    """A view that was taken early is one: what is written to it arrives in its base, and the other way round."""

    def function(x: Tensor) -> Tensor:
        y = x * 2
        part = view(y)
        part.mul_(3.0)
        y.add_(x)
        return (y**2).sum() + (part**3).sum()

    x, many = value(), torch.stack([value() for _ in range(3)])
    torch.testing.assert_close(chainrule.grad(function)(x), torch.func.grad(function)(x))
    torch.testing.assert_close(
        chainrule.vmap(chainrule.grad(function))(many), torch.stack([torch.func.grad(function)(m) for m in many])
    )


@pytest.mark.parametrize(
    "spelling",
    [
        lambda x: x.view(5), lambda x: x.transpose(0, 7), lambda x: x[9], lambda x: x[:, 3], lambda x: x.sum(4),
        lambda x: x[0, 0, 0, 0],
    ],
)  # fmt: skip
def test_errors_are_torchs(spelling: Callable[[Tensor], Tensor]) -> None:
    """What torch refuses is refused, with torch's kind of error."""
    with pytest.raises((RuntimeError, IndexError)) as expected:
        spelling(value())
    with pytest.raises(expected.type):
        chainrule.grad(lambda x: spelling(x).sum())(value())
    with pytest.raises((RuntimeError, IndexError)):
        chainrule.vmap(spelling)(torch.stack([value(), value()]))


class Watch(torch.overrides.TorchFunctionMode):
    """Keeps the calls of functions whose reading is in C, too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (reading := READINGS.get(func)).__class__ in (Joined, Over):
            self.calls.append((reading, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not COMPILED, reason="nothing is compiled here")
def test_read_as_in_python() -> None:
    """The compiled readings of joined tensors and of reductions agree with those in Python, also on calls that are none."""
    from chainrule._shortcuts import read  # noqa: PLC0415 - there is none where nothing is compiled

    with Watch() as watch:
        for spelling in SPELLINGS.values():
            spelling(value())
    assert {reading.op for reading, _, _ in watch.calls} == {
        reading.op for reading in READINGS.values() if isinstance(reading, (Joined, Over))
    }
    others: list[Any] = [
        True, 1.5, "1", None, [1, True], (1, 2), [], (), [value()], [value(), value()[0]], [value(), value().float()], value(),
        torch.nn.Parameter(value()), [torch.nn.Parameter(value())] * 2, torch.ones(2, dtype=torch.int64), torch.Size([1]), 2**70,
    ]  # fmt: skip
    for reading, args, kwargs in watch.calls:
        spelled = [(args, kwargs), ((*args, 1), kwargs), ((*args, None), {}), ((*args, 0, True, True), {}), ((), {})]
        for other in others:
            spelled += [(args, {"dim": other}), (args, {"dim": 1, "keepdim": other}), ((*args, other), {}), ((*args, 1, other), {})]
            spelled += [((other,), {}), ((other, 1), {}), ((other,), {"dim": 1}), (args, {"dtype": other})]
        for given, named in spelled:
            try:
                expected: Any = reading(given, named)
            except AttributeError:  # the first argument is no tensor, which torch does not show
                continue
            assert same(read(reading, given, named), expected), (given, named)


def test_empty_and_complex() -> None:
    """Batches of nothing, samples of nothing and complex values take torch's way."""
    empty = torch.randn(0, 2, 3, 4, dtype=torch.float64)
    for name in ("view", "transpose", "number", "sum over one", "softmax", "flatten"):
        assert chainrule.vmap(SPELLINGS[name])(empty).shape == (0, *SPELLINGS[name](value()).shape)
    nothing = torch.randn(3, 0, dtype=torch.float64)
    torch.testing.assert_close(chainrule.vmap(lambda x: x.sum(0))(nothing), nothing.sum(1))
    z = torch.randn(2, 3, 4, dtype=torch.complex128)
    found = chainrule.vmap(lambda x: x.transpose(0, 1).sum(0).reshape(-1))(z)
    torch.testing.assert_close(found, z.transpose(1, 2).sum(1))


def _with(function: Callable[..., Tensor], other: Tensor, x: Tensor) -> Tensor:
    return function(x, other)


def test_numbers_beside_batched_tensors() -> None:
    """Tensors without the batch broadcast against the sample, whatever their rank."""
    many = torch.randn(3, 4, 5, dtype=torch.float64)
    for shape in ((5,), (4, 5), (2, 4, 5), (), (4, 1), (1,)):
        other = torch.randn(shape, dtype=torch.float64)
        for function in (torch.add, torch.mul, torch.sub, torch.div):
            both = functools.partial(_with, function, other)
            torch.testing.assert_close(chainrule.vmap(both)(many), torch.vmap(both)(many))
    scalars = torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(chainrule.vmap(lambda x: x * many[0])(scalars), torch.vmap(lambda x: x * many[0])(scalars))


def test_every_function_has_a_row() -> None:
    """The functions of the table are called by the spellings above."""
    seen: set[Any] = set()

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        for spelling in SPELLINGS.values():
            spelling(value())
    names = {getattr(function, "__name__", "") for function in seen}
    assert {getattr(function, "__name__", "") for function in READINGS.keys() - by_schema().keys()} <= names


@pytest.mark.parametrize("equation", ["hi,hj,j->i", "ih,jh,j->i"])
def test_one_tensor_given_twice_is_not_two(equation: str) -> None:
    one, two = torch.randn(3, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    for first, second in ((one, one), (one, two), (two, one), (two, two), (one, one)):

        def function(x: Tensor, first: Tensor = first, second: Tensor = second) -> Tensor:
            return torch.einsum(equation, first, second, x.tanh())

        x = torch.randn(3, dtype=torch.float64)
        value, pull = chainrule.vjp(function, x)
        torch.testing.assert_close(value, function(x))
        torch.testing.assert_close(pull(torch.ones_like(value))[0], torch.func.vjp(function, x)[1](torch.ones_like(value))[0])
        torch.testing.assert_close(chainrule.jacrev(function)(x), torch.func.jacrev(function)(x))


@pytest.mark.skipif(not COMPILED, reason="nothing is compiled here")
def test_what_was_read_is_kept_with_the_signs_of_zeros() -> None:
    """A reading in Python is asked once for each call that differs from the others, also by the sign of a zero."""
    from chainrule._shortcuts import read  # noqa: PLC0415 - there is none where nothing is compiled

    asked: list[float] = []

    def reading(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        asked.append(kwargs["p"])
        return torch.ops.aten.dropout.default, (args[0], kwargs["p"], True)

    x = value()
    for share in (0.0, -0.0, 0.5, 0.0, -0.0, 0.5):
        found = read(reading, (x,), {"p": share})[1][1]
        assert str(found) == str(share)
    assert [str(share) for share in asked] == ["0.0", "-0.0", "0.5"]
