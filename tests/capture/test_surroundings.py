"""What a compiled function reads beside its arguments: a change of any of it is seen by the next call."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

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


class Thrice(Attribute):
    scale = 3.0


class ThriceModule(OfModule):
    scale = 3.0


class Lazy:
    __slots__ = ("later",)


class Meta(type):
    value = 1.0

    @property
    def scale(cls) -> float:
        return cls.value


class OtherMeta(Meta):
    value = 3.0


class Level(enum.Enum):
    ONE = 1

    def scale(self) -> float:
        return SCALES["enum"]


class Number(float):
    def scaled(self) -> float:
        return self * SCALES["number"]


class Pair(NamedTuple):
    one: float

    def scale(self) -> float:
        return SCALES["pair"]


SCALES = {"enum": 1.0, "number": 1.0, "pair": 1.0}


def _class_of_object() -> tuple[Any, Any]:
    item = Attribute()
    return item, lambda: setattr(item, "__class__", Thrice)


def _class_of_module() -> tuple[Any, Any]:
    module = nn.Sequential(OfModule())
    return module, lambda: setattr(module[0], "__class__", ThriceModule)


def _class_of_layer() -> tuple[Any, Any]:
    layer = nn.Identity()
    kind = type("Cubed", (nn.Module,), {"forward": lambda self, x: 3 * x, "__module__": __name__})
    return lambda x: layer((x**2).sum()), lambda: setattr(layer, "__class__", kind)


def _dictionary_of_object() -> tuple[Any, Any]:
    item = Attribute()
    return item, lambda: setattr(item, "__dict__", {"scale": 3.0})


def _dictionary_of_function() -> tuple[Any, Any]:
    def inner() -> float:
        return inner.scale  # type: ignore[attr-defined, no-any-return]

    inner.scale = 1.0  # type: ignore[attr-defined]
    return lambda x: (x**2).sum() * inner(), lambda: setattr(inner, "__dict__", {"scale": 3.0})


def _bases() -> tuple[Any, Any]:
    kind = type("Derived", (Attribute,), {"__module__": __name__})
    return kind(), lambda: setattr(kind, "__bases__", (Thrice,))


def _unset_slot() -> tuple[Any, Any]:
    item = Lazy()
    return lambda x: (x**2).sum() * getattr(item, "later", 1.0), lambda: setattr(item, "later", 3.0)


def _unset_slot_of_base() -> tuple[Any, Any]:
    item = type("Sub", (Lazy,), {"__slots__": (), "__module__": __name__})()
    return lambda x: (x**2).sum() * getattr(item, "later", 1.0), lambda: setattr(item, "later", 3.0)


def _deleted_slot() -> tuple[Any, Any]:
    item = Slots()
    return lambda x: (x**2).sum() * getattr(item, "scale", 3.0), lambda: delattr(item, "scale")


def _metaclass_attribute() -> tuple[Any, Any]:
    meta = type(Meta)("Own", (Meta,), {"value": 1.0, "__module__": __name__})
    kind = meta("Kind", (), {"__module__": __name__})
    return lambda x: (x**2).sum() * kind.scale, lambda: setattr(meta, "value", 3.0)


def _metaclass_of_instance() -> tuple[Any, Any]:
    meta = type(Meta)("Own", (Meta,), {"value": 1.0, "__module__": __name__})
    item = meta("Kind", (), {"__module__": __name__})()
    return lambda x: (x**2).sum() * type(item).scale, lambda: setattr(meta, "value", 3.0)


def _other_metaclass() -> tuple[Any, Any]:
    kind = Meta("Kind", (), {"__module__": __name__})
    return lambda x: (x**2).sum() * kind.scale, lambda: setattr(kind, "__class__", OtherMeta)


def _parameters_of_module() -> tuple[Any, Any]:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(torch.ones(1, 1, dtype=torch.float64), requires_grad=False)
    other = {"weight": nn.Parameter(3 * torch.ones(1, 1, dtype=torch.float64), requires_grad=False), "bias": None}
    return lambda x: (layer((x**2)[:, None])).sum(), lambda: layer.__dict__.update(_parameters=other)


def _hooks_of_module() -> tuple[Any, Any]:
    module = OfModule()
    hooks = collections.OrderedDict({0: lambda module, args, out: 3 * out})
    return module, lambda: setattr(module, "_forward_hooks", hooks)


def _replaced_hook() -> tuple[Any, Any]:
    module = OfModule()
    handle = module.register_forward_hook(lambda module, args, out: 1 * out)
    return module, lambda: module._forward_hooks.update({handle.id: lambda module, args, out: 3 * out})


def _fields_of_partial() -> tuple[Any, Any]:
    def scaled(x: torch.Tensor, scale: float) -> torch.Tensor:
        return (x**2).sum() * scale

    function = functools.partial(scaled, scale=1.0)
    return function, lambda: function.__setstate__((scaled, (), {"scale": 3.0}, {}))  # type: ignore[attr-defined]


def _attribute_of_partial() -> tuple[Any, Any]:
    function = functools.partial(lambda: 0.0)
    function.scale = 1.0  # type: ignore[attr-defined]
    return lambda x: (x**2).sum() * function.scale, lambda: setattr(function, "scale", 3.0)  # type: ignore[attr-defined]


def _keyword_defaults() -> tuple[Any, Any]:
    def function(x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return (x**2).sum() * scale

    return function, lambda: function.__kwdefaults__.update(scale=3.0)  # type: ignore[attr-defined]


def _code() -> tuple[Any, Any]:
    def inner(x: torch.Tensor) -> torch.Tensor:
        return (x**2).sum()

    return lambda x: inner(x), lambda: setattr(inner, "__code__", (lambda x: 3 * (x**2).sum()).__code__)


def _cell_that_is_filled() -> tuple[Any, Any]:
    cell = types.CellType()

    def read(x: torch.Tensor) -> torch.Tensor:
        try:
            return (x**2).sum() * scale
        except NameError:
            return (x**2).sum()

    if cell is None:
        scale = 1.0
    function = types.FunctionType(read.__code__, globals(), "read", None, (cell,))
    return function, lambda: setattr(cell, "cell_contents", 3.0)


def _added_getattr() -> tuple[Any, Any]:
    kind = type("Empty", (), {"__module__": __name__})
    item = kind()
    return lambda x: (x**2).sum() * getattr(item, "scale", 1.0), lambda: setattr(kind, "__getattr__", lambda self, name: 3.0)


def _module_in_object() -> tuple[Any, Any]:
    module = types.ModuleType("settings")
    module.scale = 1.0  # type: ignore[attr-defined]
    holder = types.SimpleNamespace(settings=module)
    return lambda x: (x**2).sum() * holder.settings.scale, lambda: setattr(module, "scale", 3.0)


def _name_that_a_module_lacks() -> tuple[Any, Any]:
    module = types.ModuleType("settings")
    return lambda x: (x**2).sum() * getattr(module, "scale", 1.0), lambda: setattr(module, "scale", 3.0)


def _getattr_of_a_python_module() -> tuple[Any, Any]:
    module = types.ModuleType("settings")
    module.__getattr__ = lambda name: 1.0  # type: ignore[method-assign, attr-defined]
    return lambda x: (x**2).sum() * module.scale, lambda: setattr(module, "__getattr__", lambda name: 3.0)


def _class_of_a_python_module() -> tuple[Any, Any]:
    module = types.ModuleType("settings")
    kind = type("Own", (types.ModuleType,), {"scale": property(lambda self: 3.0), "__module__": __name__})
    return lambda x: (x**2).sum() * getattr(module, "scale", 1.0), lambda: setattr(module, "__class__", kind)


def _builtin_that_is_shadowed() -> tuple[Any, Any]:
    names: dict[str, Any] = {"__name__": __name__}
    exec("def function(x):\n    return (x**2).sum() * abs(1.0)\n", names)
    return names["function"], lambda: names.update(abs=lambda number: 3.0)


def _value_of_an_ordered_dictionary() -> tuple[Any, Any]:
    table = collections.OrderedDict(scale=1.0)
    return lambda x: (x**2).sum() * table["scale"], lambda: table.update(scale=3.0)


def _forward_of_a_library() -> tuple[Any, Any]:
    layer = nn.Identity()
    patch = pytest.MonkeyPatch()
    return lambda x: layer((x**2).sum()), _undone(patch, nn.Identity)


def _undone(patch: pytest.MonkeyPatch, kind: type) -> Callable[[], None]:
    PATCHES.append(patch)
    return lambda: patch.setattr(kind, "forward", lambda self, x: 3 * x)


PATCHES: list[pytest.MonkeyPatch] = []

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
    "the class of an object": _class_of_object,
    "the class of a module": _class_of_module,
    "the class of a layer": _class_of_layer,
    "the dictionary of an object": _dictionary_of_object,
    "the dictionary of a function": _dictionary_of_function,
    "the bases of a class": _bases,
    "a slot that was not set": _unset_slot,
    "a slot of a base that was not set": _unset_slot_of_base,
    "a slot that is deleted": _deleted_slot,
    "an attribute of a metaclass": _metaclass_attribute,
    "an attribute of the metaclass of an instance": _metaclass_of_instance,
    "the metaclass": _other_metaclass,
    "the parameters of a module": _parameters_of_module,
    "the hooks of a module": _hooks_of_module,
    "a hook in the place of another": _replaced_hook,
    "the fields of a partial": _fields_of_partial,
    "an attribute of a partial": _attribute_of_partial,
    "a default of a keyword": _keyword_defaults,
    "the code of a function": _code,
    "a cell that was empty": _cell_that_is_filled,
    "a __getattr__ that is added": _added_getattr,
    "what a method of an enum reads": lambda: (
        functools.partial(lambda x, level: (x**2).sum() * level.scale(), level=Level.ONE), lambda: SCALES.update(enum=3.0)
    ),
    "what a method of a number reads": lambda: (
        functools.partial(lambda x, number: (x**2).sum() * number.scaled(), number=Number(1.0)), lambda: SCALES.update(number=3.0)
    ),
    "what a method of a named tuple reads": lambda: (
        functools.partial(lambda x, pair: (x**2).sum() * pair.scale(), pair=Pair(1.0)), lambda: SCALES.update(pair=3.0)
    ),
    "a module of Python in an object": _module_in_object,
    "a name that a module of Python lacks": _name_that_a_module_lacks,
    "the __getattr__ of a module of Python": _getattr_of_a_python_module,
    "the class of a module of Python": _class_of_a_python_module,
    "a builtin that is shadowed": _builtin_that_is_shadowed,
    "an ordered dictionary": _value_of_an_ordered_dictionary,
    "the forward of a layer's class": _forward_of_a_library,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_seen(name: str) -> None:
    function, change = CHANGES[name]()
    compiled = chainrule.compile(chainrule.grad(function))
    x = ones()
    for _ in range(4):
        torch.testing.assert_close(compiled(x), 2 * x)
    assert compiled.cache_info().hits == 3
    try:
        change()
        for _ in range(2):
            torch.testing.assert_close(compiled(x), 6 * x)
        assert compiled.cache_info().hits == 4
    finally:
        while PATCHES:
            PATCHES.pop().undo()


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
