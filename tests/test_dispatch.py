"""How modes are entered and left: what the compiled handlers do is what the Python methods of the same meaning do."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch as modes

import chainrule
from chainrule.batching.mode import VmapMode
from chainrule.capture.tape import Tape
from chainrule.dispatch import FunctionWatch, LightMode
from chainrule.rules.table import POLICY
from chainrule.shortcuts import Handler
from chainrule.transforms.duals import WatchfulTape


def _stacks():
    functions = [torch._C._get_function_stack_at(n) for n in range(torch._C._len_torch_function_stack())]
    dispatch = [torch._C._get_dispatch_stack_at(n) for n in range(torch._C._len_torch_dispatch_stack())]
    flags = modes._is_in_torch_dispatch_mode, modes._is_in_non_infra_torch_dispatch_mode
    return functions, dispatch, flags


def _kinds(stacks):
    return [[type(mode) for mode in stack] for stack in stacks[:2]], stacks[2]


class _Foreign(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _Seeing(modes.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def _tape():
    return Tape(POLICY)


def _watchful():
    return WatchfulTape(POLICY, respect_no_grad=True, kernels=False, transform="jvp")


def _mapping():
    return VmapMode(3, "error", None)


NESTS = [
    [_tape], [_mapping], [_tape, _tape], [_mapping, _tape], [_tape, _mapping, _tape], [_watchful], [_tape, _watchful], [_Foreign, _tape],
    [_Seeing, _tape], [_tape, _Seeing, _tape], [_tape, _Foreign, _mapping, _tape], [_watchful, _watchful],
]  # fmt: skip


def _walk(nest, enter, leave):
    """What is seen on the way in and out of a nest of modes."""
    seen, entered = [], []
    for make in nest:
        mode = make()
        (enter if isinstance(mode, LightMode) else type(mode).__enter__)(mode)
        entered.append(mode)
        state = (mode._depth, type(mode.below), len(mode._entered)) if isinstance(mode, LightMode) else None
        seen.append((_kinds(_stacks()), state))
    for mode in reversed(entered):
        (leave if isinstance(mode, LightMode) else lambda mode: type(mode).__exit__(mode, None, None, None))(mode)
        seen.append((_kinds(_stacks()), (mode._depth, mode.below, mode._entered) if isinstance(mode, LightMode) else None))
    return seen


@pytest.mark.parametrize("nest", NESTS)
def test_both_ways_of_entering_are_one(nest):
    before = _stacks()
    in_python = _walk(nest, LightMode._enter, LightMode._exit)
    assert _stacks() == before
    assert _walk(nest, Handler.__enter__, lambda mode: Handler.__exit__(mode, None, None, None)) == in_python
    assert _stacks() == before


def test_a_mode_is_entered_again_inside_of_itself():
    tape, before = _tape(), _stacks()
    with tape:
        inside = _stacks()
        with tape:
            assert tape._depth == 2
            assert tape.below is tape
        assert _stacks() == inside
        assert (tape._depth, tape.below) == (1, None)
    assert _stacks() == before
    assert tape._entered == []


def test_data_is_watched_where_the_tape_cannot_stand():
    with _Foreign(), _tape():
        assert isinstance(torch._C._get_function_stack_at(1), FunctionWatch)
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("transform", [
    chainrule.jacobian, chainrule.grad, chainrule.vmap, lambda f: chainrule.vmap(chainrule.jacobian(f)),
    lambda f: chainrule.jacfwd(chainrule.grad(f)), lambda f: lambda x: chainrule.jvp(chainrule.grad(f), (x,), (x,)),
    lambda f: lambda x: chainrule.vjp(chainrule.grad(f), x),
])  # fmt: skip
def test_an_exception_leaves_nothing_behind(transform):
    def fails(x):
        y = x.sin()
        raise KeyError("of the user") if y.dim() < 2 else AssertionError

    x, before = torch.randn(3, dtype=torch.float64), _stacks()
    for _ in range(2):
        with pytest.raises(KeyError, match="of the user"):
            transform(fails)(x)
        assert _stacks() == before
        assert torch.is_grad_enabled()
        expected = torch.func.jacrev(torch.sin)(x)
        assert torch.equal(chainrule.jacobian(torch.sin)(x), expected)


def test_threads_have_stacks_of_their_own():
    x = torch.randn(8, dtype=torch.float64)
    wanted = torch.func.hessian(lambda x: (x.sin() * x).sum())(x)
    errors = []

    def work():
        try:
            for _ in range(20):
                found = chainrule.hessian(lambda x: (x.sin() * x).sum())(x)
                torch.testing.assert_close(found, wanted)  # other orders of the same sums
                assert torch._C._len_torch_dispatch_stack() == torch._C._len_torch_function_stack() == 0
        except BaseException as error:  # noqa: BLE001 - shown below
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
