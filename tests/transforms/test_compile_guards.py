"""What a compiled function may read beside values: guarded, or refused with a clear error; never replayed wrongly."""

from __future__ import annotations

import copy
import io
import os
import pickle
import warnings
from collections.abc import Callable
from os import environ
from typing import Any

import pytest
import torch

import chainrule
from chainrule import CompileError

Tensor = torch.Tensor
X = torch.tensor([1.0, 2.0, 3.0])
KNOWN = torch.tensor([1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * float(os.environ["CHAINRULE_TEST"]),
        lambda x: x * float(os.getenv("CHAINRULE_TEST", "1")),
        lambda x: x * float(environ["CHAINRULE_TEST"]),
    ],
)
def test_the_environment_is_watched(function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = chainrule.compile(function)
    for value in ("2", "5", "2", "5"):
        monkeypatch.setenv("CHAINRULE_TEST", value)
        torch.testing.assert_close(compiled(X), X * float(value))
    assert compiled.cache_info().misses == 2


def test_arguments_that_are_one_object() -> None:
    def function(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return a + 2 * b + (100 * c if a is b else c)

    compiled = chainrule.compile(function)
    y = X + 1
    for args in ((X, X, y), (X, y, X), (y, X, X), (X, X, X), (X, X.clone(), y)):
        for _ in range(3):
            torch.testing.assert_close(compiled(*args), function(*args))
    assert compiled.cache_info().misses == 5 and compiled.cache_info().hits == 10


def test_a_write_to_an_argument_is_seen_through_the_same_argument() -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        a.add_(1)
        return b * 2

    compiled = chainrule.compile(function)
    for _ in range(3):
        a, b = X.clone(), X.clone()
        torch.testing.assert_close(compiled(a, a), 2 * (X + 1))
        torch.testing.assert_close(a, X + 1)
        torch.testing.assert_close(compiled(a, b), 2 * X)


def test_an_argument_is_no_closed_over_object() -> None:
    """Documented: inside, an argument is a new object for the same memory, even where it is closed over as well."""
    compiled = chainrule.compile(lambda x: x * 2 if x is KNOWN else x * 3)
    for x in (KNOWN, X):
        torch.testing.assert_close(compiled(x), x * 3)


def save(x: Tensor) -> Any:
    stream = io.BytesIO()
    torch.save(x, stream)
    stream.seek(0)
    return torch.load(stream) * 2


PLACES: dict[str, Callable[[Tensor], Any]] = {
    "data_ptr": lambda x: x * float(x.data_ptr() % 128 == 0),
    "storage_offset": lambda x: x + x.storage_offset(),
    "untyped_storage": lambda x: x * x.untyped_storage().nbytes(),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)) * 2,  # noqa: S301 - its own
    "save": save,
    "deepcopy": lambda x: copy.deepcopy(x) * 2,
    "version": lambda x: x * x._version,
    "is_leaf": lambda x: x * 2 if x.is_leaf else x * 3,
    "grad_fn": lambda x: x * 2 if x.grad_fn is None else x * 3,
}


@pytest.mark.parametrize("name", PLACES)
def test_what_lies_behind_a_tensor_is_refused(name: str) -> None:
    compiled = chainrule.compile(PLACES[name])
    for _ in range(2):
        with pytest.raises(CompileError):
            compiled(X)


def test_asking_inside_of_constants_and_results_is_no_obstacle() -> None:
    def function(x: Tensor) -> Tensor:
        kept = torch.arange(3.0)
        if not kept.data_ptr() or kept.storage_offset():
            raise ValueError
        y = x * 2
        if not y.is_leaf or y.grad_fn is not None:
            raise ValueError
        return y + kept

    compiled = chainrule.compile(function)
    for x in (X, X + 1):
        torch.testing.assert_close(compiled(x), 2 * x + torch.arange(3.0))


def test_a_refusal_that_the_function_catches_is_a_refusal() -> None:
    def function(x: Tensor) -> Tensor:
        try:
            return x.sin() if x.sum() > 0 else x.cos()
        except Exception:
            return x.tan()

    with pytest.raises(CompileError, match="read the value"):
        chainrule.compile(function)(X)


def branching(x: Tensor) -> Any:
    return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))


def test_operators_on_functions_are_refused() -> None:
    with pytest.raises(CompileError, match=r"torch\.cond"):
        chainrule.compile(branching)(X)
    for transform in (chainrule.jacobian, chainrule.grad, chainrule.vmap):
        with pytest.raises(RuntimeError, match=r"torch\.cond.*torch\.where"):
            transform(branching)(X)


def test_scripted_functions() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")

        @torch.jit.script
        def branch(x: Tensor) -> Tensor:
            if bool(x.sum() > 0):
                return x.sin()
            return x.cos()

        traced = torch.jit.trace(lambda x: x.sin() * 2, X)  # type: ignore[no-untyped-call]
    with pytest.raises(CompileError, match="read the value"):
        chainrule.compile(lambda x: branch(x) * 2)(X)
    compiled = chainrule.compile(chainrule.grad(lambda x: traced(x).sum()))
    for x in (X, -X):
        torch.testing.assert_close(compiled(x), 2 * x.cos())


def test_a_device_around_and_inside() -> None:
    def inside(x: Tensor) -> Any:
        with torch.device("meta"):
            shape = torch.zeros(4)
        return x * 2, shape

    compiled = chainrule.compile(inside)
    for x in (X, X + 1):
        doubled, shape = compiled(x)
        torch.testing.assert_close(doubled, 2 * x)
        assert shape.device.type == "meta" and shape.shape == (4,)
    around = chainrule.compile(lambda x: (x * 2, torch.zeros(3)))
    assert around(X)[1].device.type == "cpu"
    with torch.device("meta"):
        assert around(X)[1].device.type == "meta"
    assert around(X)[1].device.type == "cpu"


NESTED = {number: [number] for number in range(25_000)}
SCALE = {"s": 1.0}


def test_large_tables_are_watched_as_a_whole() -> None:
    numbers = [float(number) for number in range(30_000)]
    words = {f"word {number}": number for number in range(30_000)}
    compiled = chainrule.compile(lambda x: x * numbers[29_999] + words["word 7"])
    torch.testing.assert_close(compiled(X), X * 29_999.0 + 7)
    numbers[29_999] = 3.0
    torch.testing.assert_close(compiled(X), X * 3.0 + 7)
    words["word 7"] = 8
    torch.testing.assert_close(compiled(X), X * 3.0 + 8)
    words["another"] = 8
    torch.testing.assert_close(compiled(X), X * 3.0 + 8)
    assert compiled.cache_info().misses == 4
    torch.testing.assert_close(compiled(X), X * 3.0 + 8)
    assert compiled.cache_info().hits == 1


def test_more_than_can_be_watched_is_an_error() -> None:
    compiled = chainrule.compile(lambda x: x * SCALE["s"] + len(NESTED))
    for _ in range(2):
        with pytest.raises(CompileError, match="20000 values outside of its arguments"):
            compiled(X)


def test_plain_calls_before_change_nothing() -> None:
    """Plans that were made under ``vmap`` hold no tensor of it."""
    weight = torch.randn(3, 3, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            z = x**2
        return (z * x).sum() + torch.tanh(weight @ x).prod()

    ours = chainrule.vmap(chainrule.hessian(function))
    x = torch.randn(2, 3, dtype=torch.float64)
    expected = torch.func.vmap(torch.func.hessian(function))(x)
    for _ in range(2):
        torch.testing.assert_close(ours(x), expected)
    compiled = chainrule.compile(ours)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected)
    assert compiled.cache_info().hits == 1


def test_a_gradient_that_decides_a_branch_is_watched() -> None:
    p = torch.nn.Parameter(torch.ones(3))

    def function(x: Tensor) -> Tensor:
        return x * 2 if p.grad is None else x * 3

    inside = chainrule.grad(lambda x: (x**2).sum() * (2 if p.grad is None else 3))
    for compiled, plain in ((chainrule.compile(function), function), (chainrule.compile(inside), inside)):
        for gradient in (None, torch.ones(3), None, torch.zeros(3)):
            p.grad = gradient
            for _ in range(4):
                torch.testing.assert_close(compiled(X), plain(X))
        p.grad = None
        assert compiled.cache_info().misses == 2  # type: ignore[attr-defined]


def test_a_gradient_of_another_kind_is_watched() -> None:
    p = torch.nn.Parameter(torch.ones(3))

    def function(x: Tensor) -> Tensor:
        return x * (p.grad.stride(0) if p.grad is not None else 7)

    compiled = chainrule.compile(function)
    for gradient in (torch.ones(3), torch.ones(6)[::2], torch.ones(3), None):
        p.grad = gradient
        for _ in range(4):
            torch.testing.assert_close(compiled(X), function(X))


def test_gradients_that_nobody_reads_are_not_watched() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    gradient = chainrule.grad  # a name that is no attribute of a tensor
    compiled = chainrule.compile(lambda x: gradient(lambda x: (x**2 * p).sum())(x).sum() + chainrule.grad(torch.sum)(x).sum())
    for _ in range(6):
        p.grad = None
        compiled(X).backward()
    assert compiled.cache_info().misses == 1


def test_the_gradient_of_an_argument_is_refused() -> None:
    compiled = chainrule.compile(lambda x: x * 2 if x.grad is None else x * 3)
    with pytest.raises(CompileError, match="grad of an argument"):
        compiled(X)


def test_what_was_put_on_a_tensor_is_watched() -> None:
    q = torch.ones(3)

    def function(x: Tensor) -> Tensor:
        return x * getattr(q, "scale", 2.0) * (q.factor if hasattr(q, "factor") else 1)  # type: ignore[attr-defined]

    compiled = chainrule.compile(function)

    def check() -> None:
        for _ in range(4):
            torch.testing.assert_close(compiled(X), function(X))

    check()
    for scale in (5.0, 6.0, 5.0):
        q.scale = scale  # type: ignore[attr-defined]
        check()
    q.factor = torch.tensor(3.0)  # type: ignore[attr-defined]
    check()
    q.factor.add_(1)  # type: ignore[attr-defined]
    check()
    misses = compiled.cache_info().misses
    del q.scale  # type: ignore[attr-defined]
    check()
    assert compiled.cache_info().misses == misses + 1


def test_what_the_code_does_not_name_on_a_tensor_may_change() -> None:
    q = torch.ones(3)
    q.count = 0  # type: ignore[attr-defined]
    compiled = chainrule.compile(lambda x: x * q)
    for number in range(5):
        q.count = number  # type: ignore[attr-defined]
        compiled(X)
    assert compiled.cache_info().misses == 1


def test_a_tensor_that_autograd_forbids_to_use_again() -> None:
    def function(x: Tensor) -> Tensor:
        h = x * 2
        a, b = torch.chunk(h, 2)
        y = torch.cat([b, a])
        h.zero_()
        return y * 3

    compiled = chainrule.compile(function)
    for _ in range(3):
        x = torch.randn(4, requires_grad=True)
        found = compiled(x)
        torch.testing.assert_close(found, function(x))
        torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), x)[0] for y in (found, function(x))))
    assert compiled.cache_info().eager == 2


@pytest.mark.parametrize(
    "function",
    [
        chainrule.hessian(lambda x: x.sum()),
        chainrule.jacfwd(lambda x: x * torch.ones(3) + torch.zeros(3)),
        chainrule.hessian(lambda x: (x[[0, 1, 1]] * x.flip(0)).sum()),
        lambda x: (chainrule.hessian(lambda x: (x**2).sum())(x) @ x).sin(),
    ],
)
def test_a_constant_result_keeps_its_graph(function: Callable[..., Any]) -> None:
    compiled = chainrule.compile(function)
    for _ in range(4):
        x = torch.randn(3, requires_grad=True)
        found, wanted = compiled(x), function(x)
        assert found.requires_grad and wanted.requires_grad
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (found, wanted)))
        with torch.no_grad():
            assert not compiled(x).requires_grad
        assert not compiled(x.detach()).requires_grad


@pytest.mark.parametrize("shown", [str, repr, lambda x: f"{x}", lambda x: f"{x.sum()}"])
def test_the_text_of_a_tensor_is_a_read(shown: Any) -> None:
    def function(x: Tensor) -> Tensor:
        return (x * len(shown(x * 1000))).sum()

    for transform in (chainrule.grad, chainrule.jacfwd, chainrule.vmap):
        with pytest.raises((CompileError, RuntimeError), match=r"took the values|read the value|Python value"):
            chainrule.compile(transform(function))(X)
    text = str(torch.ones(2))
    torch.testing.assert_close(chainrule.compile(chainrule.grad(lambda x: (x * len(text)).sum()))(X), len(text) * torch.ones_like(X))


def test_slices_are_static_arguments() -> None:
    compiled = chainrule.compile(chainrule.grad(lambda x, part: x[part].square().sum()))
    for part in (slice(0, 2), slice(1, None), slice(0, 2), slice(None, None, 2)):
        expected = torch.zeros_like(X)
        expected[part] = 2 * X[part]
        torch.testing.assert_close(compiled(X, part), expected)


def test_the_error_names_an_argument_without_a_hash() -> None:
    compiled = chainrule.compile(chainrule.grad(lambda x, options, other=None: x.sum()))
    with pytest.raises(TypeError, match=r"args\[1\]\['b'\] is not: unhashable type: 'set'"):
        compiled(X, {"a": 1, "b": {1, 2}})
    with pytest.raises(TypeError, match=r"other\[0\] is not: unhashable type: 'set'"):
        compiled(X, 1, other=[{1}])
