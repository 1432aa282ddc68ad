"""Modules called with other tensors than their own, against torch.func.functional_call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import chainrule
from chainrule.transforms import modules


def r(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


class Counting(nn.Module):
    """Writes to one buffer, assigns another, and assigns a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(r(3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.register_buffer("total", r(3))
        self.register_buffer("nothing", None)
        self.register_parameter("absent", None)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.calls.add_(1)
        self.total = self.total + x.detach()
        out: Tensor = self.weight * x * scale + self.total + self.calls
        return out


class Removing(nn.Module):
    """Gives up a buffer during the call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", r(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x * self.kept
        del self.kept
        return out


class Naming(nn.Linear):
    """Names its parameters in another way."""

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
        for name, value in super().named_parameters(prefix, recurse, remove_duplicate):
            yield "own_" + name, value


class Plain(nn.Linear):
    """Has a tensor that is not registered."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.shift = r(3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shift


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    return net


def shared() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer)


def parametrized() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    parametrize.register_parametrization(net[0], "weight", nn.Tanh())
    return net


MODULES: dict[str, Callable[[], nn.Module]] = {
    "layers": lambda: nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 3, bias=False))),
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
    "counting": Counting, "removing": Removing, "tied": tied, "shared": shared, "parametrized": parametrized,
    "naming": lambda: Naming(3, 3),
    "plain": Plain, "recurrent": lambda: nn.GRU(3, 2),
}  # fmt: skip


def state_of(module: nn.Module) -> dict[str, Tensor]:
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name.removeprefix("own_"): value for name, value in named}


def outcome(call: Any, module: nn.Module, tensors: Any, *args: Any, **kwargs: Any) -> Any:
    """What a call gives or raises, what it leaves in the dictionary, and whether the module has its own tensors again."""
    before, names = state_of(module), [*tensors]
    try:
        out = call(module, tensors, *args, **kwargs)
        found: Any = out[0] if isinstance(out, tuple) else out
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        found = type(error), str(error)
    after = state_of(module)
    if call is chainrule.functional_call:  # torch leaves what it was given in a module that stands twice
        assert all(after.get(name) is before[name] for name in names if name in before)
    return found, tensors


def compare(name: str, tensors: Callable[[nn.Module], dict[str, Any]], *args: Any, **kwargs: Any) -> None:
    outcomes = []
    for call in (chainrule.functional_call, torch.func.functional_call):
        torch.manual_seed(1)
        module = MODULES[name]().double()
        given = {key: value.clone() if isinstance(value, Tensor) else value for key, value in tensors(module).items()}
        outcomes.append(outcome(call, module, given, *args, **kwargs))
    (ours, kept), (theirs, expected) = outcomes
    if not isinstance(ours, Tensor):
        assert ours == theirs
    else:
        torch.testing.assert_close(ours, theirs)
    if name != "removing":  # torch leaves a mark of its own in the dictionary
        torch.testing.assert_close(kept, expected)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_results_and_what_is_left_behind(name: str, strict: bool) -> None:
    x = r(4, 3)
    x = x[0] if name in ("counting", "removing", "plain") else x
    compare(name, lambda m: {key: value.detach() + 1 for key, value in state_of(m).items()}, (x,), strict=strict)
    compare(name, lambda m: {}, (x,), strict=strict)
    compare(name, lambda m: dict([*((k, v.detach() * 2) for k, v in state_of(m).items())][-1:]), x, strict=strict)
    compare(name, lambda m: {"unknown": r(3)}, x, strict=strict)
    compare(name, lambda m: {next(iter(state_of(m))): 3.0}, x, strict=strict)
    compare(name, lambda m: {key: value.detach() + 1 for key, value in m.named_parameters()}, (r(5, 7, 9),), strict=strict)


def test_names_that_are_not_registered_and_keywords() -> None:
    compare("plain", lambda m: {"shift": torch.ones(3, dtype=torch.float64)}, (r(3),))
    compare("parametrized", lambda m: {"0.weight": torch.ones(3, 3, dtype=torch.float64)}, (r(3),))
    compare("counting", lambda m: {"weight": torch.ones(3, dtype=torch.float64)}, (r(3),), {"scale": 2.0})
    compare("tied", lambda m: {"0.weight": torch.ones(3, 3, dtype=torch.float64)}, (r(3),))
    compare("tied", lambda m: {"0.weight": torch.ones(3, 3, dtype=torch.float64)}, (r(3),), tie_weights=False)
    compare("shared", lambda m: {"0.weight": torch.ones(3, 3, dtype=torch.float64)}, (r(3),))


def test_gradients_through_what_a_module_has_assigned() -> None:
    net, x = Counting(), r(3)
    state = {name: value.detach() for name, value in state_of(net).items()}

    def loss(transforms: Any) -> Any:
        def function(weight: Tensor) -> Tensor:
            tensors = {**{name: value.clone() for name, value in state.items()}, "weight": weight}
            first = transforms.functional_call(net, tensors, (x,))
            second: Tensor = transforms.functional_call(net, tensors, (x,)).sin()
            return (first * second).sum()

        return transforms.grad(function)(state["weight"])

    for _ in range(4):
        torch.testing.assert_close(loss(chainrule), loss(torch.func))


def test_the_way_of_its_own_is_taken_for_plain_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "stateless", None)
    net = MODULES["layers"]()
    chainrule.functional_call(net, dict(net.named_parameters()), (torch.ones(3),), strict=True)
    with pytest.raises(AttributeError):
        chainrule.functional_call(tied(), {}, (torch.ones(3),))
