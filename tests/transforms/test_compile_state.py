"""Python's own state around a compiled call: what the function changes, moves on, or imports while it runs."""

# ruff: noqa: PLC0415 - imports inside of functions are what is tested

import collections
import importlib
import itertools
import sys
import types
import warnings

import pytest
import torch

import chainrule
from chainrule.capture.whole_recorder import CompileError

TRANSFORMS = {
    "plain": lambda f: f,
    "grad": lambda f: chainrule.grad(lambda x: f(x).sum()),
    "vmap of jacobian": lambda f: chainrule.vmap(chainrule.jacobian(f)),
    "jacobian of jacobian": lambda f: chainrule.jacobian(lambda x: chainrule.jacobian(f)(x.sin())),
    "vjp": lambda f: lambda x: chainrule.vjp(f, x)[1](torch.ones_like(x)),
}


def counting_in_a_list():
    count = [0]

    def function(x):
        count[0] += 1
        return x * count[0]

    return function


def counting_in_a_closure():
    count = 0

    def function(x):
        nonlocal count
        count += 1
        return x * count

    return function


def counting_in_an_empty_cell():
    def function(x):
        nonlocal count
        try:
            count += 1
        except NameError:
            count = 1
        return x * count

    if False:
        count = 0
    return function


def counting_in_an_attribute():
    class Counter:
        count = 0

    counter = Counter()

    def function(x):
        counter.count += 1
        return x * counter.count

    return function


def counting_in_an_attribute_of_itself():
    def function(x):
        function.count = getattr(function, "count", 0) + 1
        return x * function.count

    return function


def appending():
    seen = []

    def function(x):
        seen.append(len(seen))
        return x * len(seen)

    return function


def turning():
    places = collections.deque([1.0, 2.0, 3.0])

    def function(x):
        places.rotate(1)
        return x * places[0]

    return function


def writing_bytes():
    content = bytearray([1])

    def function(x):
        content[0] += 1
        return x * content[0]

    return function


def toggling():
    state = [True]

    def function(x):
        state[0] = not state[0]
        return x * (3 if state[0] else 2)

    return function


def setting_up():
    known = {}

    def function(x):
        factor = known.setdefault("factor", 3.0)
        return x.sin() * factor

    return function


def moving_on():
    numbers = itertools.count(1)
    return lambda x: x * next(numbers)


def generating():
    numbers = (float(n) for n in range(1, 1000))
    return lambda x: x * next(numbers)


MAKERS = [
    counting_in_a_list, counting_in_a_closure, counting_in_an_empty_cell, counting_in_an_attribute,
    counting_in_an_attribute_of_itself, appending, turning, writing_bytes, toggling, setting_up, moving_on, generating,
]  # fmt: skip


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("make", MAKERS)
def test_calls_with_a_state_are_those_of_the_plain_function(make, transform):
    """Two functions with states of their own: one compiled, one plain; more calls than there are recordings."""
    compiled, plain = chainrule.compile(TRANSFORMS[transform](make())), TRANSFORMS[transform](make())
    x = torch.randn(3, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="chainrule.compile: .* was recorded")
        for _ in range(20):
            torch.testing.assert_close(compiled(x), plain(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_recording_runs_the_function_once(transform, capsys):
    def printing(x):
        print("run")
        return x.sin() * 2

    compiled = chainrule.compile(TRANSFORMS[transform](printing))
    x = torch.randn(3)
    for _ in range(3):
        compiled(x)
    assert capsys.readouterr().out == "run\n"
    assert compiled.cache_info()[:3] == (2, 1, 0)


def test_a_recording_is_that_of_a_replay_of_the_plans():
    """The first of two functions makes the plans, the second finds them: both get the same calls."""

    def network(x):
        return ((weight @ x).tanh() ** 2).sum()

    weight, x = torch.randn(4, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    sources = [chainrule.compile(chainrule.hessian(network)).source(x).count(" = f") for _ in range(2)]
    assert sources[0] == sources[1]


def test_what_a_first_call_sets_up_costs_one_recording():
    compiled = chainrule.compile(setting_up())
    x = torch.randn(3)
    for _ in range(4):
        compiled(x)
    assert compiled.cache_info()[:3] == (2, 2, 0)
    assert "def run" in chainrule.compile(setting_up()).source(x)


def test_why_there_is_no_graph():
    with pytest.raises(CompileError, match=r"the call itself changes `count`\[0\]"):
        chainrule.compile(counting_in_a_list()).graph(torch.ones(2))
    with pytest.raises(CompileError, match=r"it reads an iterator \(`numbers`\)"):
        chainrule.compile(moving_on()).graph(torch.ones(2))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the user that only a function imports."""
    inner = tmp_path / "chainrule_test_package"
    inner.mkdir()
    (inner / "__init__.py").write_text("")
    (inner / "settings.py").write_text("k = 2.0\n")
    (inner / "code.py").write_text("def scaled(x):\n    from .settings import k\n    return x * k\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield "chainrule_test_package"
    for name in [n for n in sys.modules if n.startswith("chainrule_test_package")]:
        del sys.modules[name]


def by_import(x):
    import chainrule_test_package.settings

    return x * chainrule_test_package.settings.k


def by_name(x):
    import chainrule_test_package.settings as settings

    return x * settings.k


def by_from(x):
    from chainrule_test_package.settings import k

    return x * k


def by_module_from(x):
    from chainrule_test_package import settings

    return x * settings.k


def by_inner_code(x):
    def factor():
        from chainrule_test_package.settings import k as number

        return number

    return x * factor()


def by_importlib(x):
    return x * importlib.import_module("chainrule_test_package.settings").k


def by_table(x):
    return x * sys.modules["chainrule_test_package.settings"].k


def by_relative_import(x):
    from chainrule_test_package.code import scaled

    return scaled(x)


IMPORTING = [by_import, by_name, by_from, by_module_from, by_inner_code, by_importlib, by_relative_import]


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("transform", ["plain", "grad"])
@pytest.mark.parametrize("function", IMPORTING)
def test_modules_imported_inside_are_watched(function, transform, is_there, package):
    if is_there:
        importlib.import_module(f"{package}.settings")
    compiled = chainrule.compile(TRANSFORMS[transform](function))
    x = torch.ones(2)
    for number in (2.0, 3.0, 4.0, 5.0):
        if number != 2.0 or is_there:
            sys.modules[f"{package}.settings"].k = number
        for _ in range(2):
            torch.testing.assert_close(compiled(x), torch.full((2,), number))


def test_a_module_found_in_the_table_of_modules(package):
    settings = importlib.import_module(f"{package}.settings")
    compiled = chainrule.compile(by_table)
    assert compiled(torch.ones(())) == 2
    settings.k = 3.0
    assert compiled(torch.ones(())) == 3


def test_a_replaced_module(package):
    importlib.import_module(f"{package}.settings")
    compiled = chainrule.compile(by_from)
    assert compiled(torch.ones(())) == 2
    other = sys.modules[f"{package}.settings"] = types.ModuleType(f"{package}.settings")
    other.k = 5.0
    assert compiled(torch.ones(())) == 5


def test_a_global_that_a_call_makes():
    names: dict = {}
    text = "def function(x):\n    global n\n    try:\n        n += 1\n    except NameError:\n        n = 1\n    return x * n\n"
    exec(compile(text, "globals", "exec"), names)  # noqa: S102
    compiled = chainrule.compile(names["function"])
    assert [compiled(torch.ones(())).item() for _ in range(4)] == [1, 2, 3, 4]
