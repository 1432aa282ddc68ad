"""Torch's Python functions reach modes, and classes, by the compiled door as by torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import overrides
from torch.overrides import TorchFunctionMode

import chainrule
from chainrule.dispatch import KNOWS_STATE, LightMode
from chainrule.shortcuts import COMPILED

compiled_only = pytest.mark.skipif(not (COMPILED and KNOWS_STATE), reason="the door is not compiled here")


class _Names(TorchFunctionMode):
    def __init__(self):
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append((function.__name__, types, len(args), sorted(kwargs or {})))
        return function(*args, **(kwargs or {}))


class _Own(torch.Tensor):
    seen: list = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        _Own.seen.append(function.__name__)
        return super().__torch_function__(function, types, args, kwargs or {})


@compiled_only
def test_it_stands_where_functions_look():
    for module in (F, torch.functional, torch._tensor):
        assert module.handle_torch_function is not overrides.handle_torch_function


def test_modes_of_others():
    """A user's mode is shown the same functions with the same arguments."""
    x, weight = torch.randn(3, 4), torch.nn.Parameter(torch.ones(4))
    with _Names() as mode:
        F.softmax(x, dim=0)
        F.layer_norm(x, (4,), weight=weight)
        1 / x
        torch.einsum("ij->j", x)
    wanted = [
        ("softmax", (torch.Tensor,), 1, ["_stacklevel", "dim", "dtype"]),
        ("layer_norm", (torch.Tensor,), 2, ["bias", "eps", "weight"]),
    ]
    found = [item for item in mode.names if item[0] in ("softmax", "layer_norm", "einsum")]
    assert found[0] == wanted[0]
    assert wanted[1] in found
    assert "einsum" in [name for name, *_ in found]


def test_a_mode_inside_of_a_transform():
    """It sees the calls of the function, and the derivative is right."""
    x = torch.randn(3, 4, dtype=torch.float64)
    mode = _Names()

    def function(x):
        with mode:
            return F.softmax(F.relu(x), dim=-1).square().sum()

    for _ in range(3):
        mode.names.clear()
        torch.testing.assert_close(chainrule.grad(function)(x), torch.func.grad(function)(x))
        assert [name for name, *_ in mode.names].count("softmax") >= 2


def test_classes_of_others():
    x = torch.randn(3, 4).as_subclass(_Own)
    _Own.seen.clear()
    assert isinstance(F.softmax(x, dim=1), _Own)
    assert "softmax" in _Own.seen


def test_beside_a_class_of_others_in_a_transform():
    """A constant of a user's class is told by its class, in the transform as without it."""
    own = torch.randn(4, dtype=torch.float64).as_subclass(_Own)
    x = torch.randn(3, 4, dtype=torch.float64)

    def function(x):
        return F.linear(F.relu(x), torch.ones(2, 4, dtype=torch.float64)).sum() + F.cosine_similarity(x, own.expand(3, 4)).sum()

    plain = torch.func.grad(lambda x: F.relu(x).sum() * 2 + F.cosine_similarity(x, own.as_subclass(torch.Tensor).expand(3, 4)).sum())
    for _ in range(3):
        torch.testing.assert_close(chainrule.grad(function)(x).as_subclass(torch.Tensor), plain(x))


@pytest.mark.parametrize("wrong", [lambda x: F.softmax(x, dim=7), lambda x: F.layer_norm(x, (5,)), lambda x: F.relu(x, inplace=3, much=1)])
def test_errors_leave_the_modes_as_they_were(wrong):
    x = torch.randn(3, 4)
    seen = []

    def function(x):
        before = torch._C._len_torch_function_stack()
        with pytest.raises((IndexError, RuntimeError, TypeError)):
            wrong(x)
        seen.append(torch._C._len_torch_function_stack() - before)
        return x.sin().sum()

    for _ in range(3):
        torch.testing.assert_close(chainrule.grad(function)(x), x.cos())
    assert seen == [0, 0, 0]
    assert torch._C._len_torch_function_stack() == 0


@compiled_only
def test_the_mode_is_off_while_it_handles(monkeypatch):
    """As by torch's own door, a mode does not see what its handler calls."""
    depths = []
    plain = LightMode.take_function

    def look(self, *args, **kwargs):
        depths.append(torch._C._len_torch_function_stack())
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(LightMode, "take_function", look)
    x = torch.randn(3, 4)
    chainrule.grad(lambda x: F.kl_div(F.log_softmax(x, dim=1), torch.softmax(x, 1), reduction="batchmean"))(x)
    assert depths
    assert max(depths) <= 1


def test_without_classes():
    """Where torch shows nothing to classes, modes are shown functions without them, and a transform is right."""
    x = torch.randn(3, 4, dtype=torch.float64)

    def function(x):
        with torch._C.DisableTorchFunctionSubclass():
            return F.softmax(x, dim=-1).square().sum()

    for _ in range(3):
        torch.testing.assert_close(chainrule.grad(function)(x), torch.func.grad(function)(x))


def test_scripts_and_symbolic_traces():
    """Torch's own readers of these functions find what they expect."""
    x = torch.randn(3, 4)
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Softmax(dim=-1))
    traced = torch.fx.symbolic_trace(layer)
    torch.testing.assert_close(traced(x), layer(x))
    names = [getattr(node.target, "__name__", "") for node in torch.fx.symbolic_trace(lambda x: F.softmax(x, dim=0)).graph.nodes]
    assert "softmax" in names
