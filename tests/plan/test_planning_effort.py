"""How much work planning is, counted: products of maps, nodes and calls of a first call grow with the tape, no faster."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import chainrule
from benchmarks.scientific import brusselator, brusselator_state, sliced
from chainrule.execute import engine
from chainrule.maps import nonzeros
from chainrule.maps.compose import Workspace
from chainrule.maps.nodes import Node
from chainrule.maps.staging import Program
from chainrule.maps.terms import Axis, affine_onehot, fixed_index
from chainrule.plan import elimination
from chainrule.plan import second_order as plan_of_second_order

Tensor = torch.Tensor
DOUBLE = torch.float64
PARAMETERS = torch.tensor([1.1, 0.4, 0.1, 0.4, 2.0, 1.0], dtype=DOUBLE)


def predator_prey(steps: int) -> Callable[[Tensor], Tensor]:
    """An ODE solved by the midpoint rule: a loop over single elements."""

    def slope(state: Tensor, rates: Tensor) -> Tensor:
        product = state[0] * state[1]
        return torch.stack([rates[0] * state[0] - rates[1] * product, rates[2] * product - rates[3] * state[1]])

    def final(parameters: Tensor) -> Tensor:
        rates, state = parameters[:4], parameters[4:]
        for _ in range(steps):
            state = state + 0.1 * slope(state + 0.05 * slope(state, rates), rates)
        return ((state - 1.0) ** 2).sum()

    return final


def recurrence(steps: int) -> Callable[[Tensor], Tensor]:
    """A loop over a matrix product."""
    weight = torch.linspace(-0.4, 0.5, 36, dtype=DOUBLE).reshape(6, 6)

    def final(x: Tensor) -> Tensor:
        state = x
        for _ in range(steps):
            state = torch.tanh(weight @ state) + 0.1 * x
        return (state * state).sum()

    return final


TRANSFORMS: dict[str, Callable[[Any, Callable[[Tensor], Tensor]], Callable[[Tensor, Tensor], Any]]] = {
    "grad": lambda library, f: lambda x, v: library.grad(f)(x),
    "hessian": lambda library, f: lambda x, v: library.hessian(f)(x),
    "jvp of grad": lambda library, f: lambda x, v: library.jvp(library.grad(f), (x,), (v,))[1],
    "vjp of grad": lambda library, f: lambda x, v: library.vjp(library.grad(f), x)[1](v)[0],
}


@pytest.fixture(autouse=True)
def _planned_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first runs of long tapes are planned here like those of others (see tests/execute/test_sweeps.py)."""
    monkeypatch.setattr(engine, "RUNS", 0)


def effort(monkeypatch: pytest.MonkeyPatch, function: Callable[[Tensor, Tensor], Any]) -> dict[str, int]:
    """What the first call of a function does."""
    counts = {"products": 0, "nodes": 0, "calls": 0}

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        return run

    engine.CACHE.clear()
    with monkeypatch.context() as patch:
        patch.setattr(elimination, "compose", counted("products", elimination.compose))
        patch.setattr(Node, "__init__", counted("nodes", Node.__init__))
        patch.setattr(Program, "call", counted("calls", Program.call))
        function(PARAMETERS, torch.ones_like(PARAMETERS))
    engine.CACHE.clear()
    return counts


@pytest.mark.parametrize("loop", [predator_prey, recurrence])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_effort_is_linear_in_the_length_of_a_loop(monkeypatch: pytest.MonkeyPatch, loop: Any, name: str) -> None:
    """Beyond 64 vertices, each further step adds what the one before it did, to a few per cent for what meets at the inputs."""
    found = {steps: effort(monkeypatch, TRANSFORMS[name](chainrule, loop(steps))) for steps in (20, 30, 40)}
    for kind in ("products", "nodes", "calls"):
        first, second = found[30][kind] - found[20][kind], found[40][kind] - found[30][kind]
        assert 0 < second <= 1.02 * first + 2, (kind, found)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_long_tape_takes_one_product_per_edge(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Of a plan that is mostly calls, one order is looked at: each local map is multiplied once per level of the nest."""
    function = TRANSFORMS[name](chainrule, predator_prey(20))
    found = effort(monkeypatch, function)
    accounts = chainrule.explain(function)(PARAMETERS, torch.ones_like(PARAMETERS)).accounts
    assert len(accounts) == (1 if name == "grad" else 2)
    assert found["products"] <= sum(len(account.edges) for account in accounts)


def python_calls(function: Callable[[], Any]) -> int:
    """How many functions of Python and C a first call of a function calls."""
    count = 0

    def counted(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    engine.CACHE.clear()
    profile = sys.getprofile()
    sys.setprofile(counted)
    try:
        function()
    finally:
        sys.setprofile(profile)
        engine.CACHE.clear()
    return count


def runge_kutta(steps: int) -> Callable[[Tensor], Tensor]:
    """An ODE of a vector solved by the classical method, of some 64 ops a step."""
    weight = torch.linspace(-0.4, 0.5, 36, dtype=DOUBLE).reshape(6, 6)

    def slope(x: Tensor) -> Tensor:
        return torch.tanh(weight @ x) - 0.1 * x**3

    def final(x: Tensor) -> Tensor:
        for _ in range(steps):
            first = slope(x)
            second = slope(x + 0.05 * first)
            third = slope(x + 0.05 * second)
            x = x + 0.1 / 6 * (first + 2 * second + 2 * third + slope(x + 0.1 * third))
        return (x**2).sum()

    return final


@pytest.mark.parametrize("loop", [predator_prey, runge_kutta])
@pytest.mark.parametrize("transform", [chainrule.laplacian, chainrule.hessian_diagonal, chainrule.hessian])
def test_calls_of_python_are_linear_in_the_length_of_a_loop(loop: Any, transform: Any) -> None:
    """All that planning calls: also what looks at the tape once per op, which products and nodes do not show.

    The bound is 5 % for sets and dictionaries that grow, and for what is kept from earlier calls: twice as many where one
    look at the whole tape per op is a quarter of the calls.
    """
    function = transform(loop(2))
    function(PARAMETERS)  # what is made once and for all
    found = {steps: python_calls(lambda s=steps: transform(loop(s))(PARAMETERS)) for steps in (8, 12, 16)}
    first, second = found[12] - found[8], found[16] - found[12]
    assert 0 < second <= 1.05 * first, found


@pytest.mark.parametrize("loop", [predator_prey, runge_kutta])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_calls_until_a_plan_is_replayed_are_linear_in_the_length_of_a_loop(loop: Any, name: str) -> None:
    """The first call plans and the second makes the function that replays the plan; the bound is that of the first alone."""

    def both(steps: int) -> None:
        function = TRANSFORMS[name](chainrule, loop(steps))
        for _ in range(2):
            function(PARAMETERS, torch.ones_like(PARAMETERS))

    both(2)  # what is made once and for all
    found = {steps: python_calls(lambda s=steps: both(s)) for steps in (12, 16, 20)}
    first, second = found[16] - found[12], found[20] - found[16]
    assert 0 < second <= 1.05 * first, found


@pytest.mark.parametrize("mapped", [False, True])
def test_calls_until_a_laplacian_is_replayed_are_linear_in_the_length_of_a_loop(mapped: bool) -> None:
    """With memory that is written to for its slices; under vmap the calls are recorded a second time."""

    def several(steps: int) -> None:
        function = chainrule.laplacian(predator_prey(steps))
        function = chainrule.vmap(function) if mapped else function
        for _ in range(2):
            function(PARAMETERS.expand(3, 6).clone() if mapped else PARAMETERS)

    several(2)  # what is made once and for all
    found = {steps: python_calls(lambda s=steps: several(s)) for steps in (12, 16, 20)}
    first, second = found[16] - found[12], found[20] - found[16]
    assert 0 < second <= 1.05 * first, found


def test_a_sparse_plan_lists_no_places_that_its_entries_leave_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stencil's terms share a diagonal; the dense block beside it has as many places as a row has, times the grid."""
    listed: list[int] = []
    original = nonzeros.block_keys

    def counted(*args: Any) -> Tensor:
        keys = original(*args)
        listed.append(keys.numel())
        return keys

    monkeypatch.setattr(nonzeros, "block_keys", counted)
    engine.CACHE.clear()
    found = chainrule.jacobian(brusselator(sliced), layout="sparse_csr")(brusselator_state(16))
    assert all(count <= found.values().numel() for count in listed)


def test_a_graph_of_an_op_does_not_look_at_the_whole_tape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Second derivatives make small graphs for each op: they may look at what it uses, not at all that there is."""

    class Slots(list[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("looked at all slots")

    original = plan_of_second_order.build_graph

    def build(part: Any, *rest: Any) -> Any:
        part.values, part.active = Slots(part.values), Slots(part.active)
        return original(part, *rest)

    monkeypatch.setattr(plan_of_second_order, "build_graph", build)
    engine.CACHE.clear()
    function = runge_kutta(2)
    found = chainrule.laplacian(function)(PARAMETERS)
    torch.testing.assert_close(found, torch.func.hessian(function)(PARAMETERS).trace())


def test_orders_are_compared_where_that_may_pay() -> None:
    """A long loop over few elements is planned in one order, a shorter one in two; loops over large matrices in several."""

    def function(x: Tensor, steps: int) -> Tensor:
        state = x
        for _ in range(steps):
            state = torch.sin(state) @ state + x
        return state

    def orders(size: int, steps: int) -> list[str]:
        x = torch.eye(size, dtype=DOUBLE) / 9
        account = chainrule.explain(chainrule.jacobian(lambda x: function(x, steps)))(x).accounts[-1]
        return [alternative["order"] for alternative in account.alternatives]

    assert orders(2, 180) == ["reverse"]
    assert orders(2, 40) == ["reverse", "forward"]
    assert {"reverse", "forward", "network"} <= set(orders(12, 40))


def test_a_long_tape_is_swept_from_the_smaller_side() -> None:
    def widening(x: Tensor) -> Tensor:
        state = x[:, None].expand(2, 6)
        for _ in range(40):
            state = torch.sin(state) + x[:, None]
        return state

    account = chainrule.explain(chainrule.jacobian(widening))(torch.ones(2, dtype=DOUBLE)).accounts[-1]
    assert account.chosen == "forward"


@pytest.mark.parametrize("loop", [predator_prey, recurrence])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_derivatives_of_long_loops(loop: Any, name: str) -> None:
    """Both sides are exact apart from rounding: 2e-16 a step, through some forty steps and ten ops each."""
    function, x, v = loop(40), PARAMETERS + 0.1 * torch.rand(6, dtype=DOUBLE), torch.randn(6, dtype=DOUBLE)
    expected = TRANSFORMS[name](torch.func, function)(x, v)
    transformed = TRANSFORMS[name](chainrule, function)
    for _ in range(2):  # planned, and replayed
        torch.testing.assert_close(transformed(x, v), expected, rtol=1e-10, atol=1e-10)


def test_a_nest_inside_of_another_transform() -> None:
    """A nest that is recorded while an outer transform records: its calls are handed on to the outer one's tape."""

    def function(x: Tensor) -> Tensor:
        return torch.exp(torch.sin(x) * x).sum()

    def products(library: Any, x: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        def inner(y: Tensor) -> Tensor:
            return library.jvp(library.grad(function), (y,), (v,))[1]  # type: ignore[no-any-return]

        rows = torch.stack([x, 2 * x, w])
        return (
            library.jvp(inner, (x,), (w,))[1], library.vjp(inner, x)[1](w)[0], library.jacrev(inner)(x),
            library.vmap(inner)(rows), library.vmap(library.jacfwd(inner))(rows),
        )  # fmt: skip

    x, v, w = (torch.randn(5, dtype=DOUBLE) for _ in range(3))
    expected = products(torch.func, x, v, w)
    engine.CACHE.clear()
    for _ in range(3):
        torch.testing.assert_close(products(chainrule, x, v, w), expected)


def test_equal_relations_are_one_node() -> None:
    workspace = Workspace(DOUBLE, torch.device("cpu"))
    source, target = Axis(3), Axis(9)
    one, two = (affine_onehot(source, target, 1, 2, workspace) for _ in range(2))
    assert one.index is two.index
    assert affine_onehot(source, target, 2, 2, workspace).index is not one.index
    assert fixed_index(target, 4, workspace).index is fixed_index(Axis(7), 4, workspace).index


def test_the_garbage_collector_is_as_it_was() -> None:
    """It is off while a plan is made, and while the code that replays it is; it stays off where it was."""
    engine.CACHE.clear()
    for _ in range(2):
        chainrule.hessian(recurrence(3))(PARAMETERS)
        assert gc.isenabled()
    gc.disable()
    try:
        engine.CACHE.clear()
        for _ in range(2):
            chainrule.hessian(recurrence(3))(PARAMETERS)
            assert not gc.isenabled()
    finally:
        gc.enable()


def test_terms_that_hardly_meet_are_listed_once(monkeypatch):
    """A stencil of many taps: its entries were listed after each further one."""
    size, listings = 80, []
    listed = nonzeros.listed
    monkeypatch.setattr(nonzeros, "listed", lambda entries, places=None: listings.append(len(entries)) or listed(entries, places))

    def stencil(x):
        u = x.reshape(size, size)
        total = sum(u.roll((i, j), (0, 1)) * (1.5 + i * i + 3 * j) for i in range(-2, 3) for j in range(-2, 3))
        return (total * u).reshape(-1)

    x = torch.randn(size * size, dtype=torch.float64)
    found = chainrule.jacobian(stencil, layout="sparse_coo")(x)
    assert len(listings) <= 2
    vector = torch.randn(size * size, dtype=torch.float64)
    expected = torch.func.jvp(stencil, (x,), (vector,))[1]
    product = torch.sparse.mm(found, vector[:, None])[:, 0]
    # Sums of 25 products of numbers of up to about 20.
    torch.testing.assert_close(product, expected, rtol=1e-11, atol=1e-11)
