"""Whether places hold what they held, in C and in Python."""

from __future__ import annotations

import collections
import gc
import importlib.util
import operator
import sys
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import chainrule.shortcuts
from chainrule.capture.surroundings import same
from chainrule.shortcuts import ATTRIBUTE, CELL, EMPTY, EQUAL, ITEM, LACKS, SIZE, TABLE, TYPE


def _in_python() -> Any:
    """The class as it is where nothing is compiled."""
    path = Path(chainrule.shortcuts.__file__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHAINRULE_PURE_PYTHON", "1")
        spec = importlib.util.spec_from_file_location("shortcuts_in_python", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    assert not module.COMPILED
    return module.Watch


WATCHES = [chainrule.shortcuts.Watch, _in_python()]
NAN = float("nan")


class Holder:
    def __init__(self, value: Any) -> None:
        self.value = value


def _cell(value: Any) -> Any:
    return types.CellType(value)


def _changes() -> list[tuple[str, tuple[Any, ...], Callable[[], Any], bool]]:
    """A place, what is done to it, and whether it then holds what it held."""
    one, other = object(), object()
    cell, emptied, table, items, holder, ordered = _cell(one), _cell(one), {"a": one, 3: one}, [one, one], Holder(one), collections.OrderedDict(a=one)
    numbers, size, double, texts, flag = {"a": 1.5, "n": NAN, "z": 0.0}, {1: 1}, Holder(10**20), {"s": "ab" * 40}, _cell(True)

    whole, listed, counted, kept = {"a": one, "n": 1.5}, [one, 1.5], {"a": one}, {"a": one, "b": one}
    kind, base, plain = type("Kind", (), {"scale": one}), type("Base", (Holder,), {}), Holder(one)
    names, members = tuple(vars(kind)), tuple(v if k == "scale" else NotImplemented for k, v in vars(kind).items())
    lacking, hooks, many = {"a": one}, collections.OrderedDict[str, Any](), [one] * 3

    def turned() -> None:
        kept["a"] = kept.pop("a")

    def empty() -> None:
        del emptied.cell_contents

    return [
        ("cell", (CELL, cell, None, one, False), lambda: setattr(cell, "cell_contents", other), False),
        ("emptied cell", (CELL, emptied, None, one, False), empty, False),
        ("item", (ITEM, table, "a", one, False), lambda: table.update(a=other), False),
        ("number as key", (ITEM, table, 3, one, False), lambda: table.update({3: one}), True),
        ("item that is gone", (ITEM, dict(a=one), "b", one, False), lambda: None, False),
        ("item of a list", (ITEM, items, 1, one, False), lambda: items.__setitem__(1, other), False),
        ("shorter list", (ITEM, [one], 1, one, False), lambda: None, False),
        ("other mapping", (ITEM, ordered, "a", one, False), lambda: ordered.update(a=other), False),
        ("mapping as it was", (ITEM, collections.OrderedDict(a=one), "a", one, False), lambda: None, True),
        ("attribute", (ATTRIBUTE, holder, "value", one, False), lambda: setattr(holder, "value", other), False),
        ("no attribute", (ATTRIBUTE, holder, "nothing", one, False), lambda: None, False),
        ("size", (SIZE, size, None, 1, False), lambda: size.update({2: 2}), False),
        ("equal", (EQUAL, operator.eq, [1, 2], [1, 2], False), lambda: None, True),
        ("not equal", (EQUAL, operator.eq, [1, 2], [1, 3], False), lambda: None, False),
        ("same number", (ITEM, numbers, "a", 1.5, True), lambda: numbers.update(a=float("1.5")), True),
        ("same nan", (ITEM, numbers, "n", NAN, True), lambda: numbers.update(n=float("nan")), True),
        ("other zero", (ITEM, numbers, "z", 0.0, True), lambda: numbers.update(z=-0.0), False),
        ("same long number", (ATTRIBUTE, double, "value", 10**20, True), lambda: setattr(double, "value", int("1" + "0" * 20)), True),
        ("same text", (ITEM, texts, "s", texts["s"], True), lambda: texts.update(s="".join(["ab"] * 40)), True),
        ("table", (TABLE, whole, ("a", "n"), (one, 1.5), (False, True)), lambda: whole.update(a=other), False),
        ("table of same numbers", (TABLE, {"n": float("1.5")}, ("n",), (1.5,), (True,)), lambda: None, True),
        ("table of other numbers", (TABLE, whole, ("a", "n"), (NotImplemented, 1.5), (False, True)), lambda: whole.update(n=2), False),
        ("any value", (TABLE, counted, ("a",), (NotImplemented,), False), lambda: counted.update(a=other), True),
        ("larger table", (TABLE, counted, ("a",), (NotImplemented,), False), lambda: counted.update(b=other), False),
        ("other key", (TABLE, {"b": one}, ("a",), (one,), False), lambda: None, False),
        ("table in another order", (TABLE, kept, ("a", "b"), (one, one), False), turned, True),
        ("list", (TABLE, listed, (0, 1), (one, 1.5), (False, True)), lambda: listed.__setitem__(0, other), False),
        ("list that is shorter", (TABLE, many, (0, 1, 2), (one,) * 3, False), many.clear, False),
        ("class", (TABLE, kind, names, members, False), lambda: setattr(kind, "scale", other), False),
        ("type", (TYPE, plain, None, Holder, False), lambda: setattr(plain, "__class__", base), False),
        ("lacking", (LACKS, lacking, None, ("b", "c"), False), lambda: lacking.update(c=one), False),
        ("lacking still", (LACKS, {"a": one}, None, ("b", "c"), False), lambda: None, True),
        ("empty", (EMPTY, None, None, ({}, hooks), False), lambda: hooks.update(a=one), False),
        ("not by value", (CELL, flag, None, True, False), lambda: setattr(flag, "cell_contents", 1), False),
    ]  # fmt: skip


@pytest.mark.parametrize("watch", WATCHES)
def test_changes_are_seen(watch: Any) -> None:
    for name, place, change, holds in _changes():
        made = watch(same, (place,))
        gone = any(word in name for word in ("gone", "shorter list", "no attribute", "not equal", "other key"))
        assert made() is not gone, name
        change()
        assert made() is holds, name
        assert watch(same, (place, place))() is holds


@pytest.mark.parametrize("watch", WATCHES)
def test_all_places_count_and_errors_pass(watch: Any) -> None:
    table = {"a": 1, "b": 2}
    places = tuple((ITEM, table, key, value, True) for key, value in table.items())
    assert watch(same, ())() is True
    made = watch(same, places)
    assert made() is True
    table["b"] = 3
    assert made() is False

    def fails(one: Any, two: Any) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        watch(same, ((EQUAL, fails, 1, 2, False),))()


@pytest.mark.parametrize(
    "place",
    [
        (TABLE, (1, 2), (0, 1), (1, 2), False), (TABLE, {}, [], (), False), (TABLE, {"a": 1}, ("a",), (), False),
        (TABLE, {"a": 1}, ("a",), (1,), (True, True)), (LACKS, [], None, ("a",), False), (LACKS, {}, None, ["a"], False),
        (EMPTY, None, None, [{}], False), (EMPTY, None, None, ((),), False), (ITEM, {}, "a", 1), ("item", {}, "a", 1, False),
    ],
)  # fmt: skip
def test_places_are_checked(place: Any) -> None:
    if not chainrule.shortcuts.COMPILED:
        pytest.skip("the class in C reads their memory")
    with pytest.raises(TypeError, match="Watch"):
        chainrule.shortcuts.Watch(same, (place,))


@pytest.mark.parametrize("watch", WATCHES)
def test_nothing_is_left_behind(watch: Any) -> None:
    holder = Holder(None)
    holder.value = watch(same, ((ATTRIBUTE, holder, "__class__", Holder, False),))  # a cycle
    assert holder.value() is True
    gone = weakref.ref(holder)
    del holder
    gc.collect()
    assert gone() is None
    value = object()
    table = {"a": value}
    made = watch(
        same,
        (
            (ITEM, table, "a", value, False), (CELL, _cell(value), None, value, False), (TABLE, [value], (0,), (value,), False),
            (TABLE, table, ("a",), (value,), False), (TYPE, value, None, object, False), (LACKS, table, None, ("b",), False),
            (TABLE, {"a": 1.5}, ("a",), (float("1.5"),), (True,)), (EMPTY, None, None, ({},), False),
        ),
    )  # fmt: skip
    before = sys.getrefcount(value)
    for _ in range(100):
        assert made()
    assert sys.getrefcount(value) == before
