"""Functions taken before torch's dispatcher: the record is the one that the dispatcher would have led to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import chainrule
from chainrule import dispatch
from chainrule.batching.mode import VmapMode
from chainrule.batching.tensor import BatchTensor
from chainrule.capture.tape import Tape
from chainrule.dispatch import KNOWS_STATE
from chainrule.functions import TABLE, methods
from chainrule.transforms.trace import trace

Tensor = torch.Tensor


@contextmanager
def by_the_dispatcher() -> Iterator[None]:
    """Run a block without taking functions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "TABLE", {})
        yield


def arguments(function: Any, entry: Any) -> list[tuple[Any, ...]]:
    """Argument lists that a function takes: tensors, numbers, several dtypes and ranks."""
    x = torch.rand(3, 4, dtype=torch.float64) * 0.5 + 0.25
    y = torch.rand(3, 4, dtype=torch.float64) * 0.5 + 0.25
    if entry.op is torch.ops.aten.linear.default:
        weight = torch.randn(5, 4, dtype=torch.float64)
        return [(x, weight), (x, weight, torch.randn(5, dtype=torch.float64)), (x, weight, None), (x[0], weight)]
    if entry.op is torch.ops.aten.matmul.default:
        return [(x, y.T.contiguous()), (x, y[0]), (x[0], y[0]), (x[None], y.T.contiguous()), (x[0], y.T.contiguous())]
    if entry.op is torch.ops.aten.where.self:
        return [(x > 0.5, x, y), (x > 0.5, x, y[0]), (x > 0.5, x, 2.0)]
    if entry.fewest == 1:
        return [(x,), (x.float(),), (x[0, 0],), (x[:0],), (x.T,)]
    found: list[tuple[Any, ...]] = [(x, y), (x, y[0]), (x, y[0, 0]), (x.float(), y[0, 0]), (x, y.float()), (x[0], y)]
    found += [(x, 2), (x, 0.5), (x, 0.0), (x, -0.0), (x, float("nan")), (x.float(), 1e-3), (x.float(), 2**60)]
    return found if entry.call in (torch.sub, torch.rsub) else [*found, (x, True)]  # torch subtracts no booleans


def recorded(call: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, list[Any], Any]:
    numbers = tuple(n for n, item in enumerate(args) if isinstance(item, Tensor) and item.dtype.is_floating_point)
    traced = trace(call, args, numbers, {}, "trace")
    records = [(r.op, r.args, r.kwargs, r.outputs) for r in traced.tape.records]
    return traced.out_leaves[0], records, traced.tape.signature(None)


@pytest.mark.parametrize("function", TABLE, ids=lambda f: f"{getattr(f, '__qualname__', f)}")
def test_same_record(function: Any) -> None:
    """Ops, arguments, signature and values agree, to the last bit."""
    for args in arguments(function, TABLE[function]):
        taken = recorded(function, args)
        with by_the_dispatcher():
            plain = recorded(function, args)
        assert repr(taken[1]) == repr(plain[1])
        assert repr(taken[2]) == repr(plain[2])
        assert torch.equal(taken[0].nan_to_num(), plain[0].nan_to_num()) and taken[0].dtype == plain[0].dtype


@pytest.mark.parametrize("function", TABLE, ids=lambda f: f"{getattr(f, '__qualname__', f)}")
def test_same_under_vmap(function: Any) -> None:
    """A mapped first argument, a mapped second one, and both."""
    for args in arguments(function, TABLE[function]):
        for which in ((0,), (1,), (0, 1)):
            if not all(n < len(args) and isinstance(args[n], Tensor) for n in which):
                continue
            mapped = [torch.stack([item, item * 0.75 if item.dtype.is_floating_point else ~item]) if n in which else item
                      for n, item in enumerate(args)]  # fmt: skip
            dims = tuple(0 if n in which else None for n in range(len(args)))
            found = chainrule.vmap(function, in_dims=dims)(*mapped)
            for sample in range(2):
                expected = function(*(item[sample] if n in which else item for n, item in enumerate(mapped)))
                assert found[sample].dtype == expected.dtype
                # A matrix product of a batch is summed in another order: 4 terms of size 1.
                torch.testing.assert_close(found[sample], expected, equal_nan=True)


def count_taken(function: Callable[..., Any], *args: Any, kind: Any = Tape) -> int:
    """How many calls were taken as functions."""
    taken = 0
    original = kind.run_function

    def counted(self: Any, entry: Any, given: tuple[Any, ...]) -> Any:
        nonlocal taken
        out = original(self, entry, given)
        taken += out is not NotImplemented
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "run_function", counted)
        for mode in (Tape, VmapMode):  # compiled short cuts do not ask the method
            patch.setattr(mode, "__torch_function__", mode.take_function)
        for name in methods() if KNOWS_STATE else ():
            patch.delattr(BatchTensor, name)
        function(*args)
    return taken


def layers(x: Tensor) -> Tensor:
    return (torch.tanh(x @ torch.eye(3)) * 2 - 1).sum()


def test_taken_in_every_nest() -> None:
    x = torch.randn(3)
    assert count_taken(chainrule.grad(layers), x) == 5
    assert count_taken(chainrule.vmap(chainrule.grad(lambda v: layers(v) if v.dim() else v)), torch.randn(2, 3)) == 5
    assert count_taken(chainrule.jacobian(chainrule.vmap(torch.sin)), x) == 1
    assert count_taken(chainrule.vmap(layers), torch.randn(2, 3), kind=VmapMode) == 4
    weight = torch.nn.Parameter(torch.randn(3, 3), requires_grad=False)
    assert count_taken(chainrule.jacobian(lambda v: torch.tanh(F.linear(v, weight))), x) == 2


def test_autocast_is_recorded() -> None:
    weight = torch.randn(3, 3)

    def product(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (x @ weight).float()

    x = torch.randn(3)
    records = recorded(product, (x,))[1]
    with by_the_dispatcher():
        assert repr(records) == repr(recorded(product, (x,))[1])


def test_a_users_modes_see_the_calls() -> None:
    seen: list[str] = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    x = torch.randn(3, dtype=torch.float64)
    for mode, name in ((Dispatch, "aten.sin.default"), (Function, "sin")):

        def inside(v: Tensor, mode: Any = mode) -> Tensor:
            with mode():
                return v.sin() * 2

        seen.clear()
        torch.testing.assert_close(chainrule.jacobian(inside)(x), torch.diag(2 * x.cos()))
        assert name in seen
        with mode():
            seen.clear()
            torch.testing.assert_close(chainrule.jacobian(lambda v: v.sin() * 2)(x), torch.diag(2 * x.cos()))
            assert seen


def test_a_tensor_subclass_is_left_to_itself() -> None:
    class Doubled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            with torch._C.DisableTorchFunctionSubclass():
                out = func(*(a.as_subclass(Tensor) if isinstance(a, cls) else a for a in args), **(kwargs or {}))
            return 2 * out if func is torch.Tensor.mul or func is torch.mul else out

    scale = torch.full((3,), 3.0).as_subclass(Doubled)
    found = chainrule.jacobian(lambda v: torch.mul(v, scale))(torch.randn(3))
    torch.testing.assert_close(found.as_subclass(Tensor), 6 * torch.eye(3))


def test_graphs_made_under_vmap() -> None:
    x = torch.randn(4, 3, dtype=torch.float64)

    def by_method(v: Tensor) -> Tensor:
        leaf = v.detach().requires_grad_()
        return torch.autograd.grad((leaf.sin() * 2).sum(), leaf)[0]

    def by_attribute(v: Tensor) -> Tensor:
        leaf = v.detach()
        leaf.requires_grad = True
        return torch.autograd.grad((leaf.sin() * 2).sum(), leaf)[0]

    for function in (by_method, by_attribute):
        torch.testing.assert_close(chainrule.vmap(function)(x), 2 * x.cos())
        nested = chainrule.vmap(lambda v, f=function: chainrule.vmap(f)(v.unsqueeze(0))[0])(x)
        torch.testing.assert_close(nested, 2 * x.cos())


def test_stacks_are_left_as_they_were() -> None:
    def fails(x: Tensor) -> Tensor:
        chainrule.vmap(torch.sin)(x)
        raise ValueError("mine")

    before = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
    for transform in (chainrule.grad, chainrule.vmap, chainrule.jacobian, lambda f: chainrule.vmap(chainrule.grad(f))):
        with pytest.raises(ValueError, match="mine"):
            transform(fails)(torch.randn(3, 2))
        assert (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()) == before
        assert not torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.Python)

    class Raises(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    with Raises(), pytest.raises(RuntimeError):
        chainrule.grad(lambda x: torch.matmul(x, torch.ones(7)))(torch.randn(3))
    with pytest.raises(RuntimeError):
        chainrule.grad(lambda x: torch.matmul(x, torch.ones(7)))(torch.randn(3))
    assert (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()) == before
    assert not torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.Python)


def test_default_device_context() -> None:
    x = torch.randn(3, dtype=torch.float64)
    with torch.device("cpu"):
        torch.testing.assert_close(chainrule.jacobian(lambda v: v.sin() * torch.ones(3))(x), torch.diag(x.cos()))
    found = chainrule.jacobian(lambda v: _under_device(v))(x)
    torch.testing.assert_close(found, torch.diag(x.cos()))


def _under_device(x: Tensor) -> Tensor:
    with torch.device("cpu"):
        return chainrule.vmap(lambda v: F.relu(v.sin()) - F.relu(-v.sin()))(x)
