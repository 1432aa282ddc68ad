"""The compiled short cuts do what the Python methods do, and leave nothing behind."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F

import chainrule
from chainrule.batching.tensor import BatchTensor
from chainrule.capture.tape import Tape
from chainrule.dispatch import KNOWS_STATE
from chainrule.functions import methods
from chainrule.rules.table import POLICY
from chainrule.shortcuts import COMPILED

compiled_only = pytest.mark.skipif(not COMPILED, reason="the short cuts are not compiled here")


def recorded(function, *args):
    """The result and the record of a function of tensors, and the method that took each call."""
    tape = Tape(POLICY)
    aliases = [arg.detach() for arg in args]
    for alias in aliases:
        tape.add_input(alias)
    with tape.recording():
        out = function(*aliases)
    return out, tape.records, tape.key, tape.active


NAN = float("nan")
WEIGHT = torch.nn.Parameter(torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3))
SCALED = (WEIGHT * 2.0).exp()

FUNCTIONS = {
    "unary": lambda x: x.sin().tanh(),
    "numbers": lambda x: (x * 2.5 + 1) / 3 - 0.5,
    "other numbers": lambda x: 2 * x**2 - (1.5 - x),
    "zero and nan": lambda x: (x + 0.0) * -0.0 + NAN,
    "big number": lambda x: x * 2.0**70,
    "two tensors": lambda x: x * x.cos() + torch.ones_like(x) / x,
    "constant first": lambda x: torch.full((3, 3), 2.0, dtype=x.dtype) * x,
    "two constants": lambda x: x + torch.sin(torch.ones(3, dtype=x.dtype)) * 2,
    "linear": lambda x: F.linear(x, torch.eye(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype)),
    "linear without bias": lambda x: F.linear(x, torch.eye(3, dtype=x.dtype)),
    "matmul": lambda x: x @ x.t(),
    "comparison": lambda x: torch.where(x > 0.1, x, x.exp()),
    "comparison of tensors": lambda x: torch.where(x > x.t(), x, x.exp()),
    "reductions": lambda x: x.sum() * x.mean(),
    "mixed dtypes": lambda x: x * torch.arange(3) + torch.ones(3, dtype=torch.float32),
    "complex": lambda x: torch.abs(x * torch.tensor(1j)),
    "parameter": lambda x: x * torch.nn.Parameter(torch.ones(3, dtype=x.dtype)),
    "linear with a graph": lambda x: torch.tanh(F.linear(x, WEIGHT, WEIGHT[0])) * 2.0,
    "weights with a graph": lambda x: (x * SCALED + WEIGHT).sin() @ SCALED - torch.where(x > 0.1, WEIGHT, x),
    "views of a graph": lambda x: (x @ WEIGHT).reshape(-1, 3).t() * SCALED[0],
    "weights without a graph": lambda x: _without_grad(x * WEIGHT) + x,
    "no grad": lambda x: _without_grad(x) + x,
    "in place": lambda x: x.clone().add_(1.0).sin(),
    "views": lambda x: x[1:].t().unsqueeze(0).expand(2, 3, 2).reshape(-1).view(3, 4)[:, 0] + x[..., -1],
    "views of constants": lambda x: torch.ones(3, 3, dtype=x.dtype)[1:].t()[:, :1] * x,
    "writes through views": lambda x: _written(x * 2)[1:] + x[:-1],
    "rolls and joins": lambda x: torch.cat([x.roll(1, 0), torch.stack([x[0], torch.ones(3, dtype=x.dtype), x[0]])], 1),
    "several results": lambda x: x.unbind()[0] + x.split(2, 1)[0].sum(1) + x.chunk(3, dim=1)[1].sum(),
    "reductions over dimensions": lambda x: x.sum(1) * x.mean(0, keepdim=True) + x.amax(-1) + x.logsumexp(0) + x.cumsum(1),
    "constants of the shape": lambda x: torch.zeros_like(x) + x.new_ones(3) * x + x.detach() * x + (x.detach() > 0) * x,
    "by schema": lambda x: x.clamp(-1.0, 1.0).masked_fill(x > 0, 0.5).index_select(0, torch.tensor([1, 0])).clone(),
    "minus zero": lambda x: x.clamp(min=-0.0) + x.masked_fill(x > 0, -0.0),
    "layer in parts": lambda x: F.layer_norm(x, (3,)) + F.pad(x, (1, 0))[:, 1:],
    "half": lambda x: x.to(torch.float16).sin().to(x.dtype),
}


def _written(y):
    part = y[:, 1]
    part.mul_(3.0)
    y[0].add_(part)
    return y


def _without_grad(x):
    with torch.no_grad():
        return x.sin() * 2


def said_by_composites(key):
    """Whether calls of many ops stand in a key by their numbers, which Python's handlers do not give."""
    return any(isinstance(item, tuple) and isinstance(item[0], int) for item in key)


@compiled_only
@pytest.mark.parametrize("name", FUNCTIONS)
def test_record_is_that_of_python(name, monkeypatch):
    function, x = FUNCTIONS[name], torch.randn(3, 3, dtype=torch.float64)
    quick = recorded(function, x)
    monkeypatch.setattr(Tape, "__torch_function__", Tape.take_function)
    plain = recorded(function, x)
    torch.testing.assert_close(quick[0], plain[0], rtol=0, atol=0, equal_nan=True)
    for found, expected in zip(quick[1:], plain[1:], strict=True):
        assert found == expected or said_by_composites(found)
    assert [type(record) for record in quick[1]] == [type(record) for record in plain[1]]


@compiled_only
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("in_dim", [0, 1])
def test_vmap_is_that_of_python(name, in_dim, monkeypatch):
    function, x = FUNCTIONS[name], torch.randn(3, 3, 3, dtype=torch.float64)
    kinds = []

    def seen(sample):
        out = function(sample)
        kinds.append((type(out), out.shape, out.stride(), out.dtype, out.value.requires_grad, out.batched))
        return out

    def outcome():
        try:
            return chainrule.vmap(seen, in_dim)(x)
        except RuntimeError as error:  # writing a mapped value into a tensor from outside, say
            return str(error)

    quick = outcome()
    monkeypatch.setattr("chainrule.batching.mode.VmapMode.__torch_function__", chainrule.batching.mode.VmapMode.take_function)
    if KNOWS_STATE:
        for method in methods():
            monkeypatch.delattr(BatchTensor, method)
    plain = outcome()
    assert isinstance(quick, str) == isinstance(plain, str)
    if not isinstance(quick, str):
        torch.testing.assert_close(quick, plain, rtol=0, atol=0, equal_nan=True)
        assert kinds[0] == kinds[1]


@compiled_only
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in ("complex", "half", "two constants")])
def test_tape_under_vmap_is_that_of_python(name, monkeypatch):
    function, x = FUNCTIONS[name], torch.randn(3, 3, 3, dtype=torch.float64)
    tapes = []
    original = Tape.__init__

    def noted(self, *args, **kwargs):
        original(self, *args, **kwargs)
        tapes.append(self)

    monkeypatch.setattr(Tape, "__init__", noted)
    monkeypatch.setattr("chainrule.transforms.routes.call_mapped", lambda *_: NotImplemented)  # which makes its tape itself

    def outcome():
        tapes.clear()
        try:
            out = chainrule.vmap(chainrule.grad(lambda a: function(a).sum()))(x)
        except RuntimeError as error:
            return str(error), ()
        return out, (tapes[0].key, tapes[0].active, [tuple(record) for record in tapes[0].records])

    quick = outcome()
    monkeypatch.setattr(Tape, "__torch_function__", Tape.take_function)
    plain = outcome()
    for found, expected in zip(quick[1], plain[1], strict=True):
        assert found == expected or said_by_composites(found)
    if isinstance(quick[0], str):
        assert quick[0] == plain[0]
    else:
        # The second run replays what the first one recorded, where a product and a sum are rounded once.
        torch.testing.assert_close(quick[0], plain[0], rtol=1e-14, atol=1e-14, equal_nan=True)


def test_an_error_of_the_op_arrives_and_nothing_stays_off():
    x = torch.randn(4, 3)

    def wrong(a):
        try:
            a + torch.ones(5)
        except RuntimeError as error:
            assert "must match" in str(error)
        else:
            raise AssertionError("no error")
        return (a * 2.0).sum()

    torch.testing.assert_close(chainrule.grad(wrong)(x), torch.full((4, 3), 2.0))
    torch.testing.assert_close(chainrule.vmap(wrong)(x), 2 * x.sum(1))
    with pytest.raises(RuntimeError, match="must match"):
        chainrule.grad(lambda a: (a + torch.ones(5)).sum())(x)
    weight = torch.randn(5, requires_grad=True)
    for transform in (chainrule.grad, chainrule.vmap, lambda f: chainrule.vmap(chainrule.grad(f))):
        with pytest.raises(RuntimeError, match="must match"):
            transform(lambda a: (a * weight).sum())(x)
    assert torch._C._len_torch_dispatch_stack() == 0 == torch._C._len_torch_function_stack()
    assert not torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.Python)
    assert (weight * 2).requires_grad


def test_nothing_is_held():
    x = torch.randn(3, 3)
    seen = []

    def f(a):
        b = (a.sin() * 2.0 + a).tanh()
        seen.append(weakref.ref(b))
        return b.sum()

    gc.disable()
    try:
        chainrule.grad(f)(x)
        chainrule.vmap(f)(x)
        chainrule.vmap(chainrule.grad(f))(x)
        assert len(seen) == 3 and all(reference() is None for reference in seen)
    finally:
        gc.enable()


def test_refused_calls_leave_references_alone():
    """Arguments that the short cuts leave to Python at every place: a graph, a complex tensor, no batch, another dtype."""
    plain = torch.randn(3, 4)
    others = [torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, dtype=torch.complex64), torch.ones(3, 4, dtype=torch.int64)]
    for other in others:
        before = sys.getrefcount(other)
        for _ in range(50):
            chainrule.vmap(torch.mul)(plain, other)
            chainrule.vmap(torch.mul)(other, plain)
            chainrule.vmap(torch.mul, (0, None))(plain, other[0])
            chainrule.jvp(lambda a, other=other: a * other + other * a, (plain,), (plain,))
        assert abs(sys.getrefcount(other) - before) < 20


def test_references_are_balanced():
    x, bias = torch.randn(3, 3), torch.randn(3)
    weight = torch.nn.Parameter(torch.randn(3))
    scaled = weight * 2
    x, bias, index = torch.randn(3, 3), torch.randn(3), torch.tensor([0, 2])

    def run():
        chainrule.grad(lambda a: ((a * weight + scaled).sin() * a).sum())(x)
        chainrule.vmap(chainrule.grad(lambda a: ((a * weight + scaled).sin() * a).sum()))(x)
        chainrule.grad(lambda a: ((a * 3.5 + bias).sin() * a).sum())(x)
        chainrule.vmap(lambda a: (a * 3.5).sin() + a)(x)
        chainrule.grad(lambda a: torch.cat([a[1:, :2], a.roll(1, 0)[:2, index]], 1).split(2, 1)[0].logsumexp(0).sum())(x)
        chainrule.grad(lambda a: chainrule.grad(lambda b: (b.t()[..., None] * bias).clamp(0, 1).sum())(a).sum())(x)
        for refused in (lambda a: a[5], lambda a: a.view(7), lambda a: a.gather(0, bias), lambda a: a[index, True]):
            with contextlib.suppress(IndexError, RuntimeError):
                chainrule.grad(refused)(x)

    run()
    counted = (x, bias, weight, scaled, torch.float32, torch.sin, torch.mul, BatchTensor, Tape, None, True)
    counted = (x, bias, index, slice, torch.float32, Ellipsis, torch.Tensor.roll, torch.ops.aten.slice.Tensor, torch.sin, torch.mul, BatchTensor, Tape, None, True)
    before = [sys.getrefcount(item) for item in counted]
    for _ in range(200):
        run()
    after = [sys.getrefcount(item) for item in counted]
    # Caches and the interpreter itself keep a few; a reference that is lost or kept per call would be hundreds.
    assert all(abs(new - old) < 100 for new, old in zip(after, before, strict=True)), (before, after)


def test_python_alone():
    """The package works in the same way where nothing was compiled."""
    program = (
        "import torch, chainrule\n"
        "from chainrule.shortcuts import COMPILED\n"
        "assert not COMPILED\n"
        "x = torch.randn(3, 4, dtype=torch.float64)\n"
        "f = lambda a: ((a * 2.5 + 1).sin() * a).sum()\n"
        "torch.testing.assert_close(chainrule.grad(f)(x), torch.func.grad(f)(x))\n"
        "torch.testing.assert_close(chainrule.vmap(chainrule.hessian(f))(x), torch.vmap(torch.func.hessian(f))(x))\n"
    )
    environment = os.environ | {"CHAINRULE_PURE_PYTHON": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=300)


@pytest.mark.filterwarnings("ignore:Truncating the start/stop/step of slice")
@pytest.mark.parametrize("index", [slice(None, 2**65), slice(0, 2**70), (slice(None), slice(0, 2**66))])
def test_slices_to_numbers_of_many_digits(index):
    x = torch.arange(6.0, dtype=torch.float64).reshape(3, 2)
    torch.testing.assert_close(chainrule.grad(lambda x: (x[index] ** 2).sum())(x), 2 * x)
