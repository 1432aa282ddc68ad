"""Two vmaps around one another, run as one, give what two levels give."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chainrule
from chainrule.transforms import vmap as vmap_module


@pytest.fixture
def merged_runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Notes every run of two levels as one."""
    runs: list[Any] = []
    run = vmap_module.Mapping.run_merged

    def noted(self: Any, merged: Any) -> Any:
        runs.append(merged)
        return run(self, merged)

    monkeypatch.setattr(vmap_module.Mapping, "run_merged", noted)
    return runs


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def kernel(x: Tensor, y: Tensor) -> Tensor:
    return torch.exp(-(x - y).square().sum()) * (1 + x[0] * y[-1])


CASES: list[tuple[Callable[..., Any], Any, Any, Callable[[], tuple[Tensor, ...]]]] = [
    (kernel, (0, None), (None, 0), lambda: (draw(4, 3), draw(5, 3))),
    (kernel, (None, 0), (0, None), lambda: (draw(4, 3), draw(5, 3))),
    (kernel, (1, None), (None, -1), lambda: (draw(3, 4), draw(3, 5))),
    (kernel, 0, 0, lambda: (draw(4, 5, 3), draw(4, 5, 3))),
    (kernel, 0, (0, None), lambda: (draw(4, 5, 3), draw(4, 3))),
    (kernel, (1, 0), (0, 1), lambda: (draw(5, 4, 3), draw(4, 3, 5))),
    (kernel, (0, None), (0, None), lambda: (draw(1, 6, 3), draw(3))),
    (kernel, (0, 0), (None, 0), lambda: (draw(4, 3), draw(4, 1, 3))),
    (lambda x, y: {"sum": x.sum() + y, "fixed": torch.ones(2)}, (0, None), (None, 0), lambda: (draw(4, 3), draw(5, 3))),
    (lambda x, y: (x, y), (0, None), (None, 0), lambda: (draw(4, 3), draw(5, 3))),
    (lambda x, p: x @ p["w"] + p["b"], (0, None), (0, None), lambda: (draw(4, 5, 3), {"w": draw(3, 2), "b": draw(2)})),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_values(case: int, merged_runs: list[Any]) -> None:
    function, outer, inner, inputs = CASES[case]
    mapped = chainrule.vmap(chainrule.vmap(function, in_dims=inner), in_dims=outer)
    other = torch.func.vmap(torch.func.vmap(function, in_dims=inner), in_dims=outer)
    for _ in range(5):
        args = inputs()
        torch.testing.assert_close(mapped(*args), other(*args), rtol=1e-12, atol=1e-13)
    # What would have to be copied although both levels map it is left to two.
    assert bool(merged_runs) is (case != 5)


@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "hessian"])
def test_derivatives(transform: str, merged_runs: list[Any]) -> None:
    def nest(library: Any) -> Any:
        return library.vmap(library.vmap(getattr(library, transform)(kernel), in_dims=(None, 0)), in_dims=(0, None))

    for _ in range(4):
        x, y = draw(4, 3), draw(5, 3)
        torch.testing.assert_close(nest(chainrule)(x, y), nest(torch.func)(x, y), rtol=1e-11, atol=1e-12)
    assert len(merged_runs) in (3, 4)  # the first call of a function is watched


def test_graphs_are_joined(merged_runs: list[Any]) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)).double()

    def slopes(library: Any, x: Tensor, y: Tensor) -> list[Tensor]:
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        out = library.vmap(library.vmap(lambda a, b: net(a * b), in_dims=(None, 0)), in_dims=(0, None))(x, y)
        return [out, *torch.autograd.grad(out.sin().sum(), [x, y, *net.parameters()])]

    for _ in range(5):
        x, y = draw(4, 3), draw(5, 3)
        torch.testing.assert_close(slopes(chainrule, x, y), slopes(torch.func, x, y), rtol=1e-10, atol=1e-12)
    assert len(merged_runs) == 4


def test_inside_of_other_transforms(merged_runs: list[Any]) -> None:
    """A derivative of two levels sees both dimensions."""

    def loss(library: Any) -> Any:
        both = library.vmap(library.vmap(kernel, in_dims=(None, 0)), in_dims=(0, None))
        return lambda x, y: both(x, y).sin().sum()

    x, y = draw(4, 3), draw(5, 3)
    for transform in ("grad", "hessian"):
        found, expected = (getattr(library, transform)(loss(library))(x, y) for library in (chainrule, torch.func))
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    three = [library.vmap(library.vmap(library.vmap(kernel))) for library in (chainrule, torch.func)]
    args = draw(2, 4, 5, 3), draw(2, 4, 5, 3)
    torch.testing.assert_close(three[0](*args), three[1](*args))


def test_large_arguments_are_not_copied(merged_runs: list[Any]) -> None:
    w, x = draw(4, 40, 40), draw(50, 40)
    found = chainrule.vmap(chainrule.vmap(lambda w, x: w @ x, in_dims=(None, 0)), in_dims=(0, None))(w, x)
    torch.testing.assert_close(found, torch.einsum("aij,bj->abi", w, x))
    assert not merged_runs


def test_who_wraps_a_mapped_function_is_asked() -> None:
    inner = chainrule.vmap(kernel)

    @functools.wraps(inner)
    def doubled(*args: Tensor) -> Tensor:
        return 2 * inner(*args)

    x, y = draw(4, 5, 3), draw(4, 5, 3)
    torch.testing.assert_close(chainrule.vmap(doubled)(x, y), 2 * chainrule.vmap(inner)(x, y))


def test_writes_reach_the_arguments(merged_runs: list[Any]) -> None:
    def write(x: Tensor, y: Tensor) -> Tensor:
        return x.mul_(2.0) + y

    for dims, shape in (((0, None), (4, 3)), ((0, 0), (4, 5, 3))):
        inner = (None if dims[1] is None else 0, 0)
        x, y = draw(*shape), draw(5, 3)
        given = x.clone()
        chainrule.vmap(chainrule.vmap(write, in_dims=inner), in_dims=(0, None))(given, y)
        torch.testing.assert_close(given, 2 * x)
    with pytest.raises(RuntimeError, match="vmap"):
        chainrule.vmap(chainrule.vmap(lambda x, y: x.mul_(y), in_dims=(None, 0)), in_dims=(0, None))(draw(4, 3), draw(5, 3))
    assert not merged_runs


def pair(library: Any, function: Callable[..., Any], other: int | None = None) -> Callable[..., Any]:
    """Two levels, the second argument (and a third) mapped by the inner one only."""
    count = function.__code__.co_argcount - 1
    return library.vmap(library.vmap(function, in_dims=(0, *[0] * count)), in_dims=(0, *[other] * count))


def test_writes_with_graphs_and_aliases() -> None:
    def slope(library: Any) -> Tensor:
        leaf = torch.ones(2).requires_grad_()
        y = leaf * 1
        pair(library, lambda x, a: x + a.mul_(3))(torch.ones(2, 2), y)
        return torch.autograd.grad(y.sum(), leaf)[0]

    for _ in range(3):
        torch.testing.assert_close(slope(chainrule), slope(torch.func))

    def aliased(library: Any) -> tuple[Tensor, Tensor]:
        y, x = torch.arange(20.0).reshape(4, 5), torch.ones(3, 4, 5)

        def read(x: Tensor, a: Tensor) -> Tensor:
            a.add_(1)
            return x + y.sum()

        def twice(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            a.add_(1)
            return b * 1 + x

        return pair(library, read)(x, y), pair(library, twice)(x, y, y)

    for _ in range(3):
        torch.testing.assert_close(aliased(chainrule), aliased(torch.func))


def test_writes_that_earlier_calls_did_not_do(merged_runs: list[Any]) -> None:
    state = {"writes": False, "fails": False}

    def function(x: Tensor, a: Tensor) -> Tensor:
        if state["writes"]:
            a.fill_(float("nan"))
        if state["fails"]:
            raise KeyError("a")
        return x + a

    mapped = pair(chainrule, function)
    x, y = draw(4, 5), draw(5)
    for _ in range(3):
        torch.testing.assert_close(mapped(x, y), x + y)
    assert len(merged_runs) == 2
    state["writes"] = True
    assert mapped(x, y).isnan().all() and y.isnan().all()
    assert len(merged_runs) == 3
    mapped(x, y)
    assert len(merged_runs) == 3

    state["writes"] = False
    failing = pair(chainrule, lambda x, a: function(x, a))
    for _ in range(2):
        failing(x, draw(5))
    state.update(writes=True, fails=True)
    y = draw(5)
    with pytest.raises(KeyError):
        failing(x, y)
    assert y.isnan().all()


def test_a_leaf_is_written_without_grad() -> None:
    def write(x: Tensor, a: Tensor) -> Tensor:
        with torch.no_grad():
            a.add_(1)
        return x * 2

    y = torch.zeros(5).requires_grad_()
    for number in range(3):
        pair(chainrule, write)(draw(4, 5), y)
        assert (y == number + 1).all()


class OwnSize(torch.autograd.Function):
    """A function whose rule reads the size of its level."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
        return x.sin() * info.batch_size, in_dims[0]


def test_rules_of_functions_see_their_level(merged_runs: list[Any]) -> None:
    x = draw(3, 4, 5)
    for _ in range(3):
        torch.testing.assert_close(chainrule.vmap(chainrule.vmap(OwnSize.apply))(x), 4 * x.sin())
    own = [False]

    def sometimes(x: Tensor) -> Tensor:
        return OwnSize.apply(x) if own[0] else x  # type: ignore[no-untyped-call,no-any-return]

    mapped = chainrule.vmap(chainrule.vmap(sometimes))
    for _ in range(2):
        mapped(x)
    assert merged_runs
    own[0] = True
    torch.testing.assert_close(mapped(x), 4 * x.sin())


@pytest.mark.parametrize(
    ("outer", "inner", "shapes"),
    [((0, None), (0, 0), ((4, 5, 3), (6, 3))), ((0, None), (None, None), ((4, 3), (3,))), ((0, 0), (None, 0), ((4, 3), (0, 5, 3)))],
)
def test_errors_are_those_of_two_levels(outer: Any, inner: Any, shapes: Any, merged_runs: list[Any]) -> None:
    with pytest.raises(ValueError, match="vmap"):
        chainrule.vmap(chainrule.vmap(kernel, in_dims=inner), in_dims=outer)(*[draw(*shape) for shape in shapes])
    assert not merged_runs


def test_options_keep_two_levels(merged_runs: list[Any]) -> None:
    x = draw(4, 5, 3)
    for options in ({"out_dims": 1}, {"randomness": "different"}, {"chunk_size": 2}):
        found = chainrule.vmap(chainrule.vmap(lambda s: s.cumsum(0), **options))(x)
        expected = torch.func.vmap(torch.func.vmap(lambda s: s.cumsum(0), **options))(x)
        torch.testing.assert_close(found, expected)
    assert not merged_runs
    with pytest.raises(RuntimeError, match="random"):
        chainrule.vmap(chainrule.vmap(lambda s: s + torch.rand(3)))(x)


def sliced(x: Tensor) -> Tensor:
    return x[1:] * x[:-1]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
def test_sparse_results_are_refused_as_by_two_levels(layout: str) -> None:
    x = draw(2, 3, 5)
    for _ in range(3):
        torch.testing.assert_close(chainrule.vmap(chainrule.vmap(sliced))(x), x[..., 1:] * x[..., :-1])
        with pytest.raises(RuntimeError, match="nested"):
            chainrule.vmap(chainrule.vmap(chainrule.jacobian(sliced, layout=layout)))(x)
