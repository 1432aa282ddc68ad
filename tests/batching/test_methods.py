"""The methods of `BatchTensor` that need no function mode: they do what torch's own methods do."""

from __future__ import annotations

import inspect
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import chainrule
from chainrule.batching.tensor import BatchTensor
from chainrule.dispatch import KNOWS_STATE
from chainrule.functions import TABLE, WRITERS, methods

known_only = pytest.mark.skipif(not KNOWS_STATE, reason="the state of the dispatcher is not known here")


class Functions(TorchFunctionMode):
    """Notes the functions that it is shown."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Ops(TorchDispatchMode):
    """Notes the ops that it is shown."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Other(torch.Tensor):
    """A class with its own way to take functions."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return "taken"


def check(function, *args, in_dims=0):
    """As torch.func says, and as a loop does; bit by bit."""
    found = chainrule.vmap(function, in_dims)(*args)
    expected = torch.func.vmap(function, in_dims)(*args)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9, equal_nan=True)
    return found


def _arguments(name, dtype):
    entry = methods()[name]
    shape = (3, 4, 2)
    if dtype.is_floating_point:
        first, second = torch.rand(shape, dtype=dtype) * 0.8 + 0.1, torch.rand(shape, dtype=dtype) + 0.5
    else:
        first, second = torch.randint(1, 5, shape, dtype=dtype), torch.randint(1, 3, shape, dtype=dtype)
    return (first, second)[: entry.fewest]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("name", methods())
def test_methods_are_torchs(name, dtype):
    args = _arguments(name, dtype)

    def function(*samples):
        first = samples[0] * 1  # what the handlers made, of which more is known
        return getattr(first, name)(*samples[1:])

    try:
        expected = getattr(args[0] * 1, name)(*args[1:])
    except RuntimeError:
        with pytest.raises(RuntimeError):
            chainrule.vmap(function)(*args)
        return
    found = chainrule.vmap(function)(*args)
    assert found.dtype == expected.dtype and found.stride() == expected.stride()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [name for name, entry in methods().items() if entry.fewest == 2])
@pytest.mark.parametrize("number", [2, -1, 0.5, True, 0, 2**70])
def test_numbers_beside_them(name, number):
    x = torch.rand(3, 4, dtype=torch.float64) + 0.5

    def function(sample):
        return getattr(sample.sin(), name)(number)

    try:
        expected = function(x)
    except (RuntimeError, TypeError, OverflowError):
        with pytest.raises((RuntimeError, TypeError, OverflowError)):
            chainrule.vmap(function)(x)
        return
    found = chainrule.vmap(function)(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_operators_of_every_kind_of_operand():
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 1, dtype=torch.float64)
    constant, weight = torch.randn(4, dtype=torch.float64), torch.tensor(3.0)
    check(lambda a: 1 - a.sin() / constant, x)
    check(lambda a: constant / a.exp() - a.cos(), x)
    check(lambda a: weight * a.sin() + a.sin() * weight, x)
    check(lambda a, b: a.sin() * b.cos() + b.cos() * a.sin(), x, y)  # broadcast
    check(lambda a, b: (a.sin() * b[0]) ** 2, x, y)
    check(lambda a: a.sin() * torch.arange(4) - torch.ones(4, dtype=torch.float32), x)
    check(lambda a: a.sin() * 1j + a.sin(), x)
    check(lambda a: abs(-a.sin()) ** 2.5, x)
    check(lambda a: (a.sin() > 0.1) & (a.sin() <= constant), x)
    check(lambda a: (a.sin() == a.sin()) | (a.cos() != 1), x)
    check(lambda a: a.t().sin().t() * a.sin(), torch.randn(3, 4, 2, dtype=torch.float64))  # layouts that differ
    check(lambda a, b: a.sin() + b.sin(), x, torch.randn(4, 3, dtype=torch.float64), in_dims=(0, 1))


PRODUCTS = {
    "linear": lambda a, w, b: F.linear(a, w, b),
    "linear without bias": lambda a, w, b: F.linear(a, w, None) + F.linear(a, w),
    "linear with a scalar bias": lambda a, w, b: F.linear(a, w, b[0]),
    "linear, all mapped": lambda a, w, b: F.linear(a, w * a.sum(), b * a.sum()),
    "linear, the bias mapped": lambda a, w, b: F.linear(a, w, b * a.sum()),
    "linear, the weight mapped": lambda a, w, b: F.linear(a, w * a.sum(), b),
    "linear, constant input": lambda a, w, b: F.linear(w, w, a.sum() * b),
    "vector": lambda a, w, b: F.linear(a, b) if a.dim() else a,
    "matmul": lambda a, w, b: a @ w.t() if a.dim() else a,
    "matmul with a vector": lambda a, w, b: a @ w[0] if a.dim() else a,
    "matmul by matmul": lambda a, w, b: a @ a.t() if a.dim() == 2 else a * 2,
    "matmul with a stack": lambda a, w, b: a @ w.t().expand(2, 4, 4) if a.dim() == 2 else a * 2,
    "where": lambda a, w, b: torch.where(a > 0, a, a.sin()) + torch.where(a > 0, b, a),
    "power": lambda a, w, b: (a * a) ** 2 + (a * a + 1) ** b + 2**a,
    "other constants": lambda a, w, b: a * b + a / w - torch.ones(2, 4, 4, dtype=a.dtype) * a,
    "softplus": lambda a, w, b: F.softplus(a) + F.softplus(a, 2.0) + F.gelu(a) + F.gelu(a, approximate="tanh") + F.silu(a),
}


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4), (3, 4, 4), (3, 2, 2, 4), (1, 4), (0, 4)], ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_and_constants_beside(name, shape):
    function = PRODUCTS[name]
    x = torch.randn(shape, dtype=torch.float64)
    weight, bias = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def outcome(run):
        try:
            return run()
        except RuntimeError:
            return None

    found = outcome(lambda: chainrule.vmap(function, (0, None, None))(x, weight, bias))
    if shape[0] == 0:
        expected = outcome(lambda: function(torch.randn(shape[1:], dtype=torch.float64), weight, bias))
        assert (found is None) == (expected is None)
        assert found is None or found.shape == (0, *expected.shape)
        return
    expected = outcome(lambda: torch.stack([function(sample, weight, bias) for sample in x]))
    assert (found is None) == (expected is None)
    if found is None:
        return
    torch.testing.assert_close(found, expected)
    nested = chainrule.vmap(chainrule.grad(lambda a, w, b: (function(a, w, b) ** 2).sum(), (0, 1)), (0, None, None))
    theirs = torch.func.vmap(torch.func.grad(lambda a, w, b: (function(a, w, b) ** 2).sum(), (0, 1)), (0, None, None))
    torch.testing.assert_close(nested(x, weight, bias), theirs(x, weight, bias))


def test_named_arguments_and_operands_that_are_no_tensors():
    x = torch.rand(3, 4, dtype=torch.float64)
    check(lambda a: a.sin().add(a, alpha=2).div(3, rounding_mode="floor"), x)
    check(lambda a: a.sin().round(decimals=2), x)
    check(lambda a: a.sin().sub(other=a), x)

    def wrong(sample):
        with pytest.raises(TypeError):
            sample.sin() + "text"
        with pytest.raises(TypeError):
            sample.sin() - None
        with pytest.raises(TypeError):
            sample.sin(1)
        assert sample.sin().__add__("text") is NotImplemented
        assert (sample.sin() == None) is False and (sample.sin() != None) is True  # noqa: E711 - what is asked
        assert len({sample.sin(), sample}) == 2
        return sample * 2

    torch.testing.assert_close(chainrule.vmap(wrong)(x), x * 2)
    assert torch._C._len_torch_function_stack() == 0 and torch._C._is_torch_function_enabled()


def test_modes_inside_see_the_methods():
    x, functions, ops = torch.rand(3, 4), Functions(), Ops()

    def shown(sample):
        first = sample.sin()
        with functions:
            second = first.cos() * 2
        with ops:
            third = second.tanh()
        return third.exp()

    torch.testing.assert_close(chainrule.vmap(shown)(x), (x.sin().cos() * 2).tanh().exp())
    assert functions.names == ["cos", "mul"]
    assert "tanh" in ops.names and "exp" not in ops.names


def test_a_mode_outside_sees_the_functions():
    x, functions = torch.rand(3, 4), Functions()
    with functions:
        out = chainrule.vmap(lambda a: a.sin() * 2)(x)
    torch.testing.assert_close(out, x.sin() * 2)
    assert "sin" in functions.names and "mul" in functions.names


def test_classes_with_their_own_way_are_asked():
    other = torch.ones(4).as_subclass(Other)
    seen = []

    def function(sample):
        seen.append(sample.sin() * other)
        return sample

    chainrule.vmap(function)(torch.rand(3, 4))
    assert seen == ["taken"]


def test_functions_switched_off():
    def function(sample):
        with torch._C.DisableTorchFunction():
            inside = sample.sin() * 2
        assert torch._C._is_torch_function_mode_enabled()
        with torch._C.DisableTorchFunctionSubclass():
            inside = inside.cos() * 2
        return inside

    x = torch.rand(3, 4)
    torch.testing.assert_close(chainrule.vmap(function)(x), (x.sin() * 2).cos() * 2)


def test_errors_leave_everything_as_it_was():
    x = torch.rand(3, 4)

    def function(sample):
        with pytest.raises(RuntimeError, match="must match"):
            sample.sin() * torch.ones(5)
        with pytest.raises(RuntimeError, match="must match"):
            sample.sin() * sample.sin()[:3]
        return sample.sin() * 2

    torch.testing.assert_close(chainrule.vmap(function)(x), x.sin() * 2)
    for key in (torch._C.DispatchKey.Python, torch._C.DispatchKey.PythonTLSSnapshot):
        assert not torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    assert torch._C._is_torch_function_enabled() and not torch._C._is_torch_function_mode_enabled()


def test_levels_of_a_nest():
    x, y = torch.rand(3, 4, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)

    def outer(library):
        return library.vmap(lambda a: library.vmap(lambda b: (a.sin() * b.cos() + a.exp() * 2 - b).tanh())(y))(x)

    torch.testing.assert_close(outer(chainrule), outer(torch.func))

    def mixed(library):
        inner = library.grad(lambda a: ((a.sin() * 2 + a) ** 2).sum())
        return library.vmap(lambda a: inner(a.cos()) * a.sin())(x)

    torch.testing.assert_close(mixed(chainrule), mixed(torch.func))

    def outside(library):
        return library.jacrev(lambda z: library.vmap(lambda a: (a.sin() * 2 + a * z).tanh())(x))(y[0])

    torch.testing.assert_close(outside(chainrule), outside(torch.func))


@pytest.mark.parametrize("way", ["argument", "closure", "in place", "in place in a view", "inside"])
def test_graphs_of_autograd_are_kept(way):
    """A tensor may come to have a graph after the handlers have noted what they know of it."""
    x = torch.rand(3, 4, dtype=torch.float64)
    weight = torch.rand(4, dtype=torch.float64)

    def function(sample, weight):
        value = sample.sin()
        if way == "in place":
            value.add_(weight)
        elif way == "in place in a view":
            value[1:].copy_(weight[1:])
        elif way == "inside":
            with torch.enable_grad():
                value = value * weight
        else:
            value = value * weight if way == "closure" else value
        return (value.cos() * 2 + value).exp() * value.tanh()

    def gradients(run):
        inputs = [x.clone().requires_grad_(way in ("argument", "in place in a view")), weight.clone().requires_grad_()]
        return torch.autograd.grad(run(*inputs).sum(), inputs if inputs[0].requires_grad else inputs[1:], allow_unused=True)

    def mapped(a, w):
        return chainrule.vmap(function, (0, None))(a, w)

    def looped(a, w):
        return torch.stack([function(sample, w) for sample in a])

    for found, expected in zip(gradients(mapped), gradients(looped), strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected)


def test_shapes_that_are_changed_in_place():
    x = torch.rand(3, 4, 2, dtype=torch.float64)

    def function(sample):
        value = sample.sin()
        value.t_()
        first = value * 2
        value.unsqueeze_(0)
        return (value.cos() + first).squeeze_(0).exp()

    check(function, x)


def test_threads():
    x, kept = torch.rand(3, 4), []

    def function(sample):
        value = sample.sin()

        def elsewhere():
            try:
                value.cos()
            except RuntimeError as error:
                kept.append(str(error))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return value * 2

    torch.testing.assert_close(chainrule.vmap(function)(x), x.sin() * 2)
    assert len(kept) == 1 and "no mode is seen" in kept[0]


def test_a_tensor_that_escaped():
    kept = []
    chainrule.vmap(lambda a: kept.append(a.sin()) or a)(torch.rand(3, 4))
    with pytest.raises(RuntimeError, match="escaped"):
        kept[0].sin()
    with pytest.raises(RuntimeError, match="escaped"):
        chainrule.vmap(lambda a: a * kept[0].cos())(torch.rand(3, 4))


def test_torch_func_inside():
    x = torch.rand(3, 4)
    found = chainrule.vmap(lambda a: torch.func.vmap(lambda b: (b * a.sin()[0]).sin() * 2)(a.sin()))(x)
    torch.testing.assert_close(found, (x.sin() * x.sin()[:, :1]).sin() * 2)


@pytest.mark.parametrize("size", [0, 1])
def test_small_batches(size):
    for shape in ((size, 4), (size,)):
        x = torch.rand(shape)
        torch.testing.assert_close(chainrule.vmap(lambda a: (a.sin() * 2 + a).exp())(x), (x.sin() * 2 + x).exp())


@known_only
def test_methods_stand_on_the_class():
    for name, entry in methods().items():
        method = BatchTensor.__dict__[name]
        assert entry is (WRITERS[entry.call] if entry.writes else TABLE[getattr(torch, entry.call.__name__)])
        assert method.__name__ and callable(method)
        assert getattr(torch.Tensor, name) is not method
    assert inspect.isroutine(torch.Tensor.sin) and BatchTensor.sin.__doc__ == torch.Tensor.sin.__doc__


@known_only
@pytest.mark.parametrize("wrong", [(), (1, 2), (("too", "short"), len)])
def test_construction_of_methods(wrong):
    with pytest.raises(TypeError):
        type(BatchTensor.__dict__["sin"])(*wrong)
