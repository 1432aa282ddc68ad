"""What a compiled function reads beside its arguments: a change of any of it is seen by the next call."""

from __future__ import annotations

import collections
import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import chainrule

SCALE = 1.0


def ones() -> torch.Tensor:
    return torch.ones(2, dtype=torch.float64)


class Attribute:
    scale = 1.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return (x**2).sum() * self.scale


class OfModule(nn.Module):
    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self._options = {"scale": 1.0}
        self._function: Callable[[Any], Any] = lambda x: x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self._function(x) ** 2).sum() * self.scale * self._options["scale"]


class Reading:
    @property
    def of_property(self) -> float:
        return SCALE

    @staticmethod
    def of_static() -> float:
        return SCALE

    @functools.lru_cache  # noqa: B019 - what is tested
    def of_cached(self) -> Callable[[], float]:
        return lambda: SCALE

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return (x**2).sum() * self.of_property * self.of_static() * self.of_cached()()


class Slots:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


def _instance_over_class() -> tuple[Any, Any]:
    item = Attribute()
    return item, lambda: setattr(item, "scale", 3.0)


def _subclass_over_class() -> tuple[Any, Any]:
    kind = type("Sub", (Attribute,), {"__module__": __name__})
    return kind(), lambda: setattr(kind, "scale", 3.0)


def _module_over_class() -> tuple[Any, Any]:
    module = OfModule()
    return module, lambda: setattr(module, "scale", 3.0)


def _private_of_module() -> tuple[Any, Any]:
    module = OfModule()
    return module, lambda: module._options.update(scale=3.0)


def _private_function_of_module() -> tuple[Any, Any]:
    module = OfModule()
    return module, lambda: setattr(module, "_function", lambda x: 3**0.5 * x)


def _forward_of_module() -> tuple[Any, Any]:
    module = OfModule()
    return module, lambda: setattr(module, "forward", lambda x: 3 * (x**2).sum())


def _contained(container: Any, read: Callable[[Any], float], change: Callable[[Any], Any]) -> tuple[Any, Any]:
    return lambda x: (x**2).sum() * read(container), lambda: change(container)


def _slots() -> tuple[Any, Any]:
    item = Slots()
    return lambda x: (x**2).sum() * item.scale, lambda: setattr(item, "scale", 3.0)


def _function_attribute() -> tuple[Any, Any]:
    def function(x: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = (x**2).sum() * function.scale  # type: ignore[attr-defined]
        return scaled

    function.scale = 1.0  # type: ignore[attr-defined]
    return function, lambda: setattr(function, "scale", 3.0)


def _default_argument() -> tuple[Any, Any]:
    def function(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return (x**2).sum() * scale

    return function, lambda: setattr(function, "__defaults__", (3.0,))


def _user_module() -> tuple[Any, Any]:
    module = types.ModuleType("settings")
    module.inner = types.SimpleNamespace(scale=1.0)  # type: ignore[attr-defined]
    return lambda x: (x**2).sum() * module.inner.scale, lambda: setattr(module.inner, "scale", 3.0)


def _learning_rate() -> tuple[Any, Any]:
    optimiser = torch.optim.SGD([ones()], lr=1.0)
    return lambda x: (x**2).sum() * optimiser.param_groups[0]["lr"], lambda: optimiser.param_groups[0].update(lr=3.0)


def _inspected_shape() -> tuple[Any, Any]:
    other = torch.ones(1)
    return lambda x: (x**2).sum() * other.shape[0], lambda: other.resize_(3)


def _gradient() -> tuple[Any, Any]:
    weight = ones().requires_grad_()
    weight.grad = ones()
    return lambda x: (x**2 * weight.grad).sum(), lambda: setattr(weight, "grad", 3 * ones())


CHANGES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "an attribute of an instance, over one of its class": _instance_over_class,
    "an attribute of a subclass, over one of its base": _subclass_over_class,
    "an attribute of a module, over one of its class": _module_over_class,
    "a private dictionary of a module": _private_of_module,
    "a private function of a module": _private_function_of_module,
    "the forward of a module": _forward_of_module,
    "a dictionary with keys that are tuples": lambda: _contained(
        {("a", 1): 1.0}, lambda d: d["a", 1], lambda d: d.update({("a", 1): 3.0})
    ),
    "a deque": lambda: _contained(collections.deque([1.0]), lambda d: d[0], lambda d: d.__setitem__(0, 3.0)),
    "a set": lambda: _contained({1.0}, sum, lambda s: s.add(2.0)),
    "an array of NumPy": lambda: _contained(np.ones(2), lambda a: float(a[0]), lambda a: a.fill(3.0)),
    "slots": _slots,
    "an attribute of a function": _function_attribute,
    "a default argument": _default_argument,
    "an object in a module": _user_module,
    "the settings of an optimiser": _learning_rate,
    "the shape of a tensor that no op uses": _inspected_shape,
    "the gradient of a parameter": _gradient,
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_seen(name: str) -> None:
    function, change = CHANGES[name]()
    compiled = chainrule.compile(chainrule.grad(function))
    x = ones()
    for _ in range(2):
        torch.testing.assert_close(compiled(x), 2 * x)
    assert compiled.cache_info().hits == 1
    change()
    for _ in range(2):
        torch.testing.assert_close(compiled(x), 6 * x)
    assert compiled.cache_info().hits == 2


def test_what_methods_of_all_kinds_read(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = chainrule.compile(chainrule.grad(Reading()))
    x = ones()
    torch.testing.assert_close(compiled(x), 2 * x)
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    torch.testing.assert_close(compiled(x), 16 * x)


def test_a_negative_zero_is_another_number() -> None:
    sign = 0.0

    def closed(x: torch.Tensor) -> torch.Tensor:
        return torch.copysign(x, torch.full((2,), sign, dtype=torch.float64))

    compiled = chainrule.compile(closed)
    torch.testing.assert_close(compiled(ones()), ones())
    sign = -0.0
    torch.testing.assert_close(compiled(ones()), -ones())
    given = chainrule.compile(lambda x, s: torch.copysign(x, torch.full((2,), s, dtype=torch.float64)))
    torch.testing.assert_close(given(ones(), 0.0), ones())
    torch.testing.assert_close(given(ones(), -0.0), -ones())


@dataclasses.dataclass(frozen=True)
class Options:
    scale: Any


def test_objects_as_arguments() -> None:
    """Their attributes are watched, and equal objects of other types inside are others."""
    compiled = chainrule.compile(lambda x, options: x * options.scale)
    options = types.SimpleNamespace(scale=torch.tensor(2.0, dtype=torch.float64))
    with pytest.raises(TypeError, match="hashable"):
        compiled(ones(), options)
    item = Attribute()
    torch.testing.assert_close(compiled(ones(), item), ones())
    item.scale = 3.0
    torch.testing.assert_close(compiled(ones(), item), 3 * ones())
    item.scale = torch.tensor(4.0, dtype=torch.float64)  # type: ignore[assignment]
    torch.testing.assert_close(compiled(ones(), item), 4 * ones())
    filled = chainrule.compile(lambda x, options: torch.full_like(x, 0).to(torch.tensor(options.scale).dtype))
    assert filled(ones(), Options(1)).dtype == torch.int64
    assert filled(ones(), Options(1.0)).dtype == torch.get_default_dtype()
