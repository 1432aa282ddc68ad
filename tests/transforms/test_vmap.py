"""The public vmap: conventions and exception types of torch.vmap, and what it does beyond."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state
from torch.utils._pytree import tree_flatten

from chainrule.transforms.vmap import vmap

X = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
Y = torch.arange(6.0, dtype=torch.float64).reshape(3, 2)

CALLS: dict[str, Callable[[Any], Any]] = {
    "in_dims int": lambda v: v(torch.sin)(X),
    "in_dims 1": lambda v: v(torch.sum, 1)(X),
    "in_dims negative": lambda v: v(torch.sum, -1)(X),
    "in_dims tuple": lambda v: v(torch.mul, (0, None))(X, X[0]),
    "in_dims nested": lambda v: v(lambda d, e: d["a"] + e[0], ({"a": 0, "b": None}, (1,)))({"a": X, "b": 3}, (X.t(),)),
    "in_dims prefix": lambda v: v(lambda d, s: d["a"].sum() + d["b"].sum() * s, (0, None))({"a": X, "b": Y}, 2),
    "in_dims list argument": lambda v: v(lambda pair: pair[0].sum() * pair[1], ([0, 1],))([X, Y.t()]),
    "keyword arguments whole": lambda v: v(lambda x, y: x * y)(X, y=torch.ones(4)),
    "keyword of the batch's size": lambda v: v(lambda x, y: x.sum() * y)(X, y=torch.ones(3)),
    "out_dims": lambda v: v(lambda x: x * 2, out_dims=1)(X),
    "out_dims negative": lambda v: v(lambda x: x * 2, out_dims=-1)(X),
    "out_dims tuple": lambda v: v(lambda x: (x, x.sum()), out_dims=(1, 0))(X),
    "out_dims tuple of one": lambda v: v(lambda x: x, out_dims=(1,))(X),
    "out_dims dict": lambda v: v(lambda x: {"a": x, "b": x.sum()}, out_dims={"a": 1, "b": 0})(X),
    "out_dims broadcast": lambda v: v(lambda x: [x, {"c": x}], out_dims=1)(X),
    "out_dims None": lambda v: v(lambda x: (x, 3), out_dims=(0, None))(X),
    "out_dims None tensor": lambda v: v(lambda x: (x, torch.ones(2)), out_dims=(0, None))(X),
    "constant output": lambda v: v(lambda x: torch.ones(2))(X),
    "captured output": lambda v: v(lambda x: Y)(X),
    "identity": lambda v: v(lambda x: x)(X),
    "empty batch": lambda v: v(lambda x: x.exp())(X[:0]),
    "partial": lambda v: v(functools.partial(torch.mul, other=2))(X),
    "chunks": lambda v: v(lambda x: (x.sum(), x * 2), out_dims=(0, 1), chunk_size=2)(X),
    "chunk larger than batch": lambda v: v(torch.sum, chunk_size=20)(X),
    "nested": lambda v: v(v(lambda x: x * 2))(X),
    "outer product": lambda v: v(v(torch.mul, (None, 0)), (0, None))(X[0], X[1]),
    "module": lambda v: v(torch.nn.ReLU())(X),
    "not contiguous": lambda v: v(lambda x: x.reshape(-1))(X.reshape(3, 2, 2).permute(2, 0, 1)),
    "promotion of a scalar": lambda v: v(lambda x: x[0] * torch.ones(2, dtype=torch.float32))(X),
    "promotion of an integer": lambda v: v(lambda x: x.sum() * torch.ones(2, dtype=torch.int32))(X.int()),
    "item of a constant": lambda v: v(lambda x: x * torch.tensor([2.0, 3.0]).max().item())(X),
    "loop over a sample": lambda v: v(lambda x: sum(a * i for i, a in enumerate(x)))(X),
    "single element": lambda v: v(lambda x: x)(X[:1]),
}

ERRORS: dict[str, Callable[[Any], Any]] = {
    "no inputs": lambda v: v(lambda: X)(),
    "in_dims None": lambda v: v(torch.sin, None)(X),
    "in_dims all None": lambda v: v(torch.sin, (None,))(X),
    "in_dims list": lambda v: v(torch.sin, [0])(X),
    "in_dims structure": lambda v: v(torch.mul, (0, 0, 0))(X, X),
    "in_dims float": lambda v: v(torch.sin, (0.5,))(X),
    "in_dims out of range": lambda v: v(torch.sin, 2)(X),
    "in_dims of a number": lambda v: v(lambda x, n: x * n, (0, 0))(X, 2),
    "sizes": lambda v: v(torch.mul)(X, X[:2]),
    "out_dims string": lambda v: v(torch.sin, out_dims="a")(X),
    "out_dims structure": lambda v: v(lambda x: (x, x), out_dims=(0, 0, 0))(X),
    "out_dims tuple for a tensor": lambda v: v(torch.sin, out_dims=(0, 0))(X),
    "out_dims out of range": lambda v: v(torch.sin, out_dims=2)(X),
    "out_dims None of a mapped output": lambda v: v(torch.sin, out_dims=None)(X),
    "not a tensor": lambda v: v(lambda x: 3)(X),
    "output None": lambda v: v(lambda x: None)(X),
    "randomness": lambda v: v(torch.sin, randomness="x")(X),
    "chunk_size": lambda v: v(torch.sin, chunk_size=0)(X),
    "item": lambda v: v(lambda x: x.sum().item())(X),
    "float": lambda v: v(lambda x: float(x.sum()))(X),
    "condition": lambda v: v(lambda x: x if x.sum() > 0 else -x)(X),
    "nonzero": lambda v: v(torch.nonzero)(X),
    "mask": lambda v: v(lambda x: x[x > 0])(X),
    "numpy": lambda v: v(lambda x: x.numpy())(X),
    "unique": lambda v: v(torch.unique)(X),
    "random": lambda v: v(lambda x: x + torch.rand(4))(X),
    "shape mismatch": lambda v: v(lambda x: x + torch.ones(3))(X),
    "mm of vectors": lambda v: v(lambda x: torch.mm(x, x))(X),
    "sum of a missing dimension": lambda v: v(lambda x: x.sum(1))(X),
}
CALLABLE_LATER = {"randomness", "chunk_size"}


@pytest.mark.parametrize("name", CALLS)
def test_as_torch(name: str) -> None:
    ours, spec = tree_flatten(CALLS[name](vmap))
    theirs, their_spec = tree_flatten(CALLS[name](torch.vmap))
    assert spec == their_spec
    for mine, wanted in zip(ours, theirs, strict=True):
        if isinstance(wanted, Tensor):
            assert type(mine) is Tensor
            torch.testing.assert_close(mine, wanted)
        else:
            assert mine == wanted


@pytest.mark.parametrize("name", ERRORS)
def test_errors_have_torchs_type(name: str) -> None:
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        ERRORS[name](torch.vmap)
    with pytest.raises(type(theirs.value)) as ours:
        ERRORS[name](vmap)
    assert str(ours.value)
    assert torch._C._len_torch_dispatch_stack() == 0


def test_three_levels() -> None:
    x = torch.randn(2, 3, 4)
    result = vmap(lambda a: vmap(lambda b: vmap(lambda c: c * b.sum() + a.sum())(b))(a))(x)
    torch.testing.assert_close(result, x * x.sum(2, keepdim=True) + x.sum((1, 2), keepdim=True))


def test_constant_output_is_moved() -> None:
    assert torch.equal(vmap(lambda x: torch.ones(2), out_dims=1)(X), torch.ones(2, 3))


@pytest.mark.parametrize("training", [True, False])
def test_modules(training: bool) -> None:
    torch.manual_seed(0)
    modules = [
        (torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.LayerNorm(5)), torch.randn(3, 2, 4)),
        (
            torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
            torch.randn(3, 2, 1, 6, 6),
        ),
        (torch.nn.BatchNorm2d(2, track_running_stats=not training), torch.randn(3, 4, 2, 3, 3)),
        (torch.nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), torch.randn(3, 2, 5, 4)),
        (torch.nn.LSTM(4, 3, num_layers=2), torch.randn(3, 5, 2, 4)),
        (torch.nn.GRU(4, 3, bidirectional=True), torch.randn(3, 5, 2, 4)),
        (torch.nn.MultiheadAttention(4, 2), torch.randn(3, 5, 4)),
    ]
    for module, x in modules:
        module.train(training)
        takes_three = isinstance(module, torch.nn.MultiheadAttention)

        def call(sample: Tensor, module: Any = module, takes_three: bool = takes_three) -> Tensor:
            result = module(sample, sample, sample) if takes_three else module(sample)
            return result[0] if isinstance(result, tuple) else result

        for setting in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with setting():
                wanted = torch.stack([call(sample) for sample in x])
                torch.testing.assert_close(vmap(call)(x), wanted, rtol=1e-4, atol=1e-5)


def test_batch_norm_statistics_of_a_module_are_not_mapped() -> None:
    with pytest.raises(RuntimeError, match="running"):
        vmap(torch.nn.BatchNorm1d(2))(torch.randn(3, 4, 2))


def test_batch_norm_statistics_that_are_mapped() -> None:
    def step(x: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = mean.clone(), variance.clone()
        return torch.nn.functional.batch_norm(x, mean, variance, training=True), mean, variance

    args = torch.randn(3, 4, 2), torch.zeros(3, 2), torch.ones(3, 2)
    wanted = [torch.stack(items) for items in zip(*[step(*a) for a in zip(*args, strict=True)], strict=True)]
    torch.testing.assert_close(list(vmap(step)(*args)), wanted)


def test_ensemble() -> None:
    models = [torch.nn.Linear(3, 2) for _ in range(4)]
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0])
    x = torch.randn(5, 3)
    result = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(result, torch.stack([m(x) for m in models]))


def test_gradients_reach_inputs_and_parameters() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh())
    x = torch.randn(5, 4, requires_grad=True)
    vmap(lambda s: module(s).sum())(x).sum().backward()
    wanted = torch.autograd.grad(module(x).sum(), [x, *module.parameters()])
    torch.testing.assert_close([x.grad, *[p.grad for p in module.parameters()]], list(wanted))


def test_gradient_taken_inside() -> None:
    x = torch.randn(5, 4)
    weight = torch.randn(4, requires_grad=True)

    def by_input(sample: Tensor) -> Tensor:
        sample = sample.clone().requires_grad_()
        (first,) = torch.autograd.grad((sample * weight).sin().sum(), sample, create_graph=True)
        return torch.autograd.grad(first.sum(), sample)[0]

    torch.testing.assert_close(vmap(by_input)(x).detach(), (-(x * weight).sin() * weight**2).detach())
    per_sample = vmap(lambda s: torch.autograd.grad((weight.sin() * s).sum(), weight)[0])(x)
    torch.testing.assert_close(per_sample.detach(), (weight.cos() * x).detach())


class Sevenfold(torch.autograd.Function):
    """The sine, with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 7


def test_autograd_function() -> None:
    x = torch.randn(3, 2)
    assert torch.equal(vmap(Sevenfold.apply)(x), x.sin())

    def inside(sample: Tensor) -> Tensor:
        sample = sample.clone().requires_grad_()
        return torch.autograd.grad(Sevenfold.apply(sample).sum(), sample)[0]

    assert torch.equal(vmap(inside)(x), torch.full((3, 2), 7.0))
    with pytest.raises(RuntimeError, match="autograd.Function"):
        vmap(lambda s: Sevenfold.apply(s) + s)(x.clone().requires_grad_())
    with torch.no_grad():
        vmap(Sevenfold.apply)(x.clone().requires_grad_())


def test_no_grad_inside() -> None:
    x = torch.randn(3, 2, requires_grad=True)

    def constant_factor(sample: Tensor) -> Tensor:
        with torch.no_grad():
            factor = sample.sin()
        return factor * sample

    (grad,) = torch.autograd.grad(vmap(constant_factor)(x).sum(), x)
    torch.testing.assert_close(grad, x.detach().sin())


def test_autocast() -> None:
    module = torch.nn.Linear(4, 3)
    x = torch.randn(5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outside = vmap(module)(x)
        assert outside.dtype == module(x).dtype == torch.bfloat16

    def inside(sample: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(sample)

    assert torch.equal(vmap(inside)(x), outside)


def test_conjugate_input() -> None:
    x = torch.randn(3, 2, dtype=torch.complex128)
    torch.testing.assert_close(vmap(lambda s: (s * 2).imag)(x.conj()), -2 * x.imag)
    torch.testing.assert_close(vmap(lambda s: s.conj().imag + s.conj().real)(x), x.real - x.imag)


def test_threads_are_independent() -> None:
    x = torch.randn(5, 3)
    results: dict[int, Tensor] = {}

    def work(number: int) -> None:
        for _ in range(20):
            results[number] = vmap(lambda s: vmap(lambda v: v * number)(s).sum())(x)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        torch.testing.assert_close(results[number], (x * number).sum(1))


def test_nothing_is_left_when_the_function_raises() -> None:
    def fail(x: Tensor) -> Tensor:
        raise KeyError("user")

    with pytest.raises(KeyError, match="user"):
        vmap(vmap(fail))(X)
    assert torch._C._len_torch_dispatch_stack() == 0


def test_print_inside(capsys: pytest.CaptureFixture[str]) -> None:
    def printing(x: Tensor) -> Tensor:
        print(x, torch.ones(2), f"{x.sum()}")
        return x

    vmap(vmap(printing))(X.reshape(3, 2, 2))
    assert "batched" in capsys.readouterr().out


def test_escaped_tensor() -> None:
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.extend([x * 2, torch.ones(2)])
        return x

    vmap(keep)(X)
    with pytest.raises(RuntimeError, match="escaped"):
        kept[0].sin()
    assert torch.equal(kept[1] + 1, torch.full((2,), 2.0))
    assert "BatchTensor" in repr(kept[0])


def test_constants_can_be_read() -> None:
    def read(x: Tensor) -> Tensor:
        assert torch.arange(3).tolist() == [0, 1, 2]
        assert torch.ones(2).numpy().sum() == 2
        assert bool(torch.ones(()) > 0)
        return x * float(torch.arange(3).sum())

    torch.testing.assert_close(vmap(read)(X), X * 3)


def test_item_error_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"vmap.*torch\.where"):
        vmap(lambda x: x if x.sum() > 0 else -x)(X)
