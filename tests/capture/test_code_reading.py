"""What code names, and what it imports while it runs."""

# ruff: noqa: PLC0415 - imports inside of functions are what is read

import types

from chainrule.capture.code_reading import code_globals, code_imports, code_names


def test_names_of_inner_code():
    def outer(x):
        def inner(y):
            return missing_here + y.first.second  # noqa: F821

        return inner(x)

    assert {"missing_here", "first", "second"} <= code_names(outer.__code__)
    assert {"missing_here"} <= set(code_globals(outer.__code__))
    assert "first" not in set(code_globals(outer.__code__))


def test_names_in_strings():
    def by_string(thing):
        return getattr(thing, "hidden")  # noqa: B009

    def in_no_lookup(thing):
        return thing.shown + len("hidden")

    assert "hidden" in code_names(by_string.__code__)
    assert "hidden" not in code_names(in_no_lookup.__code__)


def test_imports_of_every_form():
    def function():
        import collections.abc
        from importlib import import_module, machinery

        def inner():
            import json.decoder as decoder

            return decoder

        return import_module("xml"), collections.abc, machinery, inner

    found = code_imports(function)
    assert {"collections", "collections.abc", "importlib", "importlib.machinery", "json", "json.decoder"} <= found
    assert "importlib.import_module" not in found
    assert "xml" in found


def test_relative_imports():
    text = "def function():\n    from . import one\n    from .two import three\n    from ..four import five\n"
    names: dict = {"__package__": "outer.inner"}
    exec(compile(text, "relative", "exec"), names)  # noqa: S102
    assert code_imports(names["function"]) >= {"outer", "outer.inner", "outer.inner.two", "outer.four"}
    beyond = types.FunctionType(names["function"].__code__, {"__package__": ""})
    assert code_imports(beyond) == set()  # it raises when it runs
