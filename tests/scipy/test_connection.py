"""Zero derivatives of values that left torch are errors; other zeros are not."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")

from chainrule import scipy as solvers  # noqa: E402
from chainrule.scipy import connection  # noqa: E402

START = np.array([0.5, 1.5])


def without_grad(x):
    with torch.no_grad():
        return (x**2).sum()


def filled(x):
    out = torch.zeros(2, dtype=torch.float64)
    for n in range(2):
        out[n] = x[n].item() ** 2
    return out.sum()


def helper(x):
    return float((x**2).sum())


class Model:
    def loss(self, x):
        return x.new_tensor((x**2).sum().item())

    def __call__(self, x):
        return self.loss(x)


LEAVING = {
    "item": lambda x: torch.tensor(sum(v.item() ** 2 for v in x)),
    "float": lambda x: torch.tensor(float((x**2).sum()), dtype=torch.float64),
    "helper": lambda x: torch.tensor(helper(x), dtype=torch.float64),
    "numpy": lambda x: torch.from_numpy(np.exp(x.detach().numpy())).sum(),
    "detach": lambda x: (x.detach() ** 2).sum(),
    "data": lambda x: (x.data**2).sum(),
    "tolist": lambda x: torch.tensor(x.tolist()).double().sum(),
    "tensor": lambda x: (torch.tensor([x[0], x[1]], dtype=torch.float64) ** 2).sum(),
    "math": lambda x: torch.tensor(math.exp(x[0]) + math.exp(x[1])),
    "full": lambda x: torch.full((2,), x[0].item()).sum(),
    "no_grad": without_grad,
    "filled": filled,
    "method": Model().loss,
    "object": Model(),
}


@pytest.mark.parametrize("name", LEAVING)
def test_objectives_that_leave_torch(name):
    for method in ("BFGS", "trust-exact", "SLSQP"):
        for _ in range(3):
            with pytest.raises(RuntimeError, match=r"minimize.*its derivative.* is zero, but the values change"):
                solvers.minimize(LEAVING[name], START, method=method)


OTHERS = {
    "constant": lambda x: torch.tensor(3.0, dtype=torch.float64),
    "penalty": lambda x: torch.tensor(1e10, dtype=torch.float64) if x[0].item() < 1 else (x**2).sum(),
    "round": lambda x: x.round().sum(),
    "round at a jump": lambda x: (x + 0.5).round().sum() + (x - 0.5).round().sum(),
    "whole": lambda x: x.long().double().sum(),
    "compared": lambda x: (x > 0.5).double().sum() + (x == 0.5).double().sum(),
    "argmax": lambda x: x.argmax().double(),
    "relu": lambda x: torch.relu(x - 1.5).sum(),
    "stationary": lambda x: ((x - torch.tensor([0.5, 1.5])) ** 2).sum(),
    "stationary, of high order": lambda x: ((x - torch.tensor([0.5, 1.5])) ** 3).sum(),
    "random": lambda x: torch.rand((), dtype=torch.float64),
    "detached weights": lambda x: (x.detach() * (x - 1) ** 2).sum(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_zeros(name):
    for _ in range(3):
        solvers.minimize(OTHERS[name], START, options={"maxiter": 3})


def test_parts_that_leave_torch():
    with pytest.raises(RuntimeError, match="derivative by number 1 of what it is given"):
        solvers.minimize(lambda x: x[0] ** 2 + torch.tensor(x[1].item()) ** 2, START)
    with pytest.raises(RuntimeError, match="least_squares.*derivative of its value 1"):
        solvers.least_squares(lambda x: torch.stack([x.sum(), torch.tensor(float(x[1] ** 2)), x[0]]), START)
    with pytest.raises(RuntimeError, match="least_squares.*derivative of its value 1"):
        solvers.least_squares(lambda x: torch.stack([x.sum(), torch.tensor(float(x[1] ** 2)), x[0]]), START, layout="sparse")
    with pytest.raises(RuntimeError, match="root.*derivative of its value 0"):
        solvers.root(lambda x, k: torch.stack([torch.tensor(x[1].item() - k), x[0] - x[1]]).double(), START, args=(2.0,))
    with pytest.raises(RuntimeError, match="curve_fit.*derivative by number 1"):
        solvers.curve_fit(lambda t, a, b: a * torch.exp(-b.item() * t), np.linspace(0, 1, 9), np.linspace(0, 1, 9) ** 2)
    with pytest.raises(RuntimeError, match="solve_ivp.*derivative of its value 1"):
        solvers.solve_ivp(lambda t, y: torch.stack([-y[0], torch.tensor(-3.0 * y[1].item())]).double(), (0, 1), START, method="BDF")
    limit = solvers.nonlinear_constraint(lambda x: torch.tensor(x.square().sum().item(), dtype=torch.float64), 0, 1)
    with pytest.raises(RuntimeError, match="nonlinear_constraint.*its derivative is zero"):
        solvers.minimize(lambda x: (x**2).sum(), START, method="SLSQP", constraints=limit)


def test_parts_that_are_not_read():
    assert np.allclose(solvers.minimize(lambda x: (x[0] - float(torch.ones(()))) ** 2, START).x, [1.0, 1.5], atol=1e-6)
    times = np.linspace(0, 1, 5)
    solvers.solve_ivp(lambda t, y: torch.stack([t.cos(), t * float(torch.ones(()))]), (0, 1), START, method="BDF", t_eval=times)
    found = solvers.least_squares(lambda x: torch.stack([x[0] - 1, torch.tensor(2.0, dtype=torch.float64)]), START)
    assert np.allclose(found.x, [1.0, 1.5], atol=1e-3)


def test_zeros_are_looked_at_without_further_calls_where_nothing_leaves(monkeypatch):
    asked = []
    monkeypatch.setattr(connection, "_missing", lambda *args: asked.append(args) or "")

    def right(t, y):
        return torch.stack([t.cos(), t.sin()])

    def leaving(t, y):
        return torch.stack([t.cos(), y[1] * float(t)])

    solvers.solve_ivp(right, (0, 1), START, method="BDF")
    assert not asked
    solvers.solve_ivp(leaving, (0, 1), START, method="BDF")
    assert asked


def weighted(x, weight):
    return (x[0] - 1) ** 2 + weight * (x[1].item() - 2) ** 2


def test_zeros_are_looked_at_for_other_arguments_too():
    """A weight of zero hides what another one shows."""
    assert solvers.minimize(weighted, np.zeros(2), args=(0.0,)).success
    with pytest.raises(RuntimeError, match="values change with it"):
        solvers.minimize(weighted, np.zeros(2), args=(1.0,))


class Parent:
    def helper(self, value):
        return value.item()

    def __call__(self, x):
        return (x[0] - 1) ** 2 + (self.helper(x[1]) - 2) ** 2


class Child(Parent):
    pass


class Network(torch.nn.Module):
    def forward(self, x):
        return (x[0] - 1) ** 2 + (x[1].item() - 2) ** 2


def given_by(x, goal):
    return (x[0] - 1) ** 2 + (x[1].item() - goal) ** 2


HELPERS = {"leave": lambda value: value.item()}

PARTLY = {
    "partial": functools.partial(given_by, goal=2.0),
    "object": Child(),
    "method": Child().__call__,
    "module": Network(),
    "helper in a dictionary": lambda x: (x[0] - 1) ** 2 + (HELPERS["leave"](x[1]) - 2) ** 2,
    "numpy": lambda x: (x[0] - 1) ** 2 + (np.float64(x[1]) - 2) ** 2,
    "full": lambda x: (x[0] - 1) ** 2 + (torch.full((1,), x[1], dtype=torch.float64)[0] - 2) ** 2,
}


@pytest.mark.parametrize("name", PARTLY)
def test_one_of_two_unknowns_leaves_torch_somewhere_else(name):
    with pytest.raises(RuntimeError, match="derivative by number 1"):
        solvers.minimize(PARTLY[name], np.zeros(2))


@pytest.mark.parametrize("layout", ["dense", "sparse", "operator"])
def test_small_jacobians_of_any_layout_are_looked_at(layout):
    with pytest.raises(RuntimeError, match="values change with it"):
        solvers.least_squares(
            lambda x: torch.stack([x[0] - 1, torch.tensor(x[1].item() - 2.0, dtype=torch.float64)]), np.zeros(2), layout=layout
        )


def zero():
    return torch.zeros((), dtype=torch.float64)


def looped(x):
    total = x.new_zeros(())
    for v in x:
        if v > 0:
            total = total + v
    return total + 3.0


def counted_in(calls, function):
    def counted(*args):
        calls.append(1)
        return function(*args)

    return counted


KINKS = {
    "branch": lambda x: (x[0] - 1) ** 2 + (2 * x[1] if x[1] > 0 else zero()),
    "max": lambda x: (x[0] - 1) ** 2 + max(zero(), x[1]),
    "whole": lambda x: sum([v if v > 0 else zero() for v in x], zero()),
    "float": lambda x: sum([v if float(v) > 0 else zero() for v in x], zero()),
    "loop": looped,
    "both sides": lambda x: (x[0] - 1) ** 2 + (3 * x[1] if x[1] > 0 else zero() if x[1] == 0 else x[1]),
    "fine rounding": lambda x: ((x * 1e6).round() / 1e6 - 3).pow(2).sum(),
    "fine rounding of a part": lambda x: (x[0] - 1) ** 2 + ((x[1] * 1e6).round() / 1e6 - 3).pow(2) * float(1),
}


@pytest.mark.parametrize("name", KINKS)
@pytest.mark.parametrize("compiled", [False, None])
def test_kinks_and_rounding_are_no_missing_derivatives(name, compiled):
    for _ in range(3):
        solvers.minimize(KINKS[name], np.zeros(2), compiled=compiled, options={"maxiter": 3})


def test_kinks_of_vector_functions():
    """A contact and a diode, at the points where they begin."""

    def contact(t, y):
        return torch.stack([y[1], -100 * y[0] if y[0] < 0 else zero()])

    def diode(v):
        return torch.stack([v[0] - 1, 2 * v[1] if v[1] > 0 else zero(), 0.1 * (v[1] - 1)])

    found = solvers.solve_ivp(contact, (0, 0.2), [0.0, -1.0], method="Radau", rtol=1e-8, atol=1e-10)
    assert np.allclose(found.y[:, -1], [-np.sin(2.0) / 10, -np.cos(2.0)], atol=1e-5)
    assert np.allclose(solvers.least_squares(diode, np.zeros(2)).x, [1.0, 0.1 * 0.1 / 4.01], atol=1e-6)
    limit = solvers.nonlinear_constraint(lambda x: torch.stack([x[0] - x[1], x[1] if x[1] > 0 else zero()]), -1, 0.5)
    found = solvers.minimize(lambda x: ((x - 1) ** 2).sum(), np.zeros(2), method="SLSQP", constraints=limit)
    assert np.allclose(found.x, [1.0, 0.5], atol=1e-5)


def test_a_missing_derivative_beside_kinks_is_found():
    def some(x):
        kinks = sum([v if v > 0 else zero() for v in x[:4]], zero())
        return kinks + (x[4] - 1) ** 2 + (x[7].item() - 2) ** 2

    with pytest.raises(RuntimeError, match="derivative by number 7"):
        solvers.minimize(some, np.zeros(9))


def hidden(x):
    return (x[0] - 1) ** 2 + max(x[1].item() - 3.0, 0.0) ** 2 + max(x[1].item() - 3.0, 0.0)


def test_each_start_is_looked_at():
    assert solvers.minimize(hidden, np.array([0.0, 0.0])).success
    with pytest.raises(RuntimeError, match="derivative by number 1"):
        solvers.minimize(hidden, np.array([0.0, 9.0]))
    limit = solvers.nonlinear_constraint(lambda x: torch.stack([x[0], zero() + max(x[1].item() - 3.0, 0.0)]), -1, 9)
    for start in (0.0, 9.0):

        def solve(start=start):
            return solvers.minimize(lambda x: ((x - start) ** 2).sum(), np.full(2, start), method="SLSQP", constraints=limit)

        if start:
            with pytest.raises(RuntimeError, match="nonlinear_constraint.*derivative of its value 1"):
                solve()
        else:
            solve()


def test_a_solve_that_ends_at_its_first_point_is_looked_at():
    with pytest.raises(RuntimeError, match="derivative by number 1"):
        solvers.minimize(lambda x: (x[0] - 1) ** 2 + 1e-7 * x[0] + (x[1].item() - 2) ** 2, np.array([1.0, 0.0]))


@pytest.mark.parametrize("n", [30, 3000])
def test_many_unused_unknowns_take_few_runs(n):
    calls = []
    function = counted_in(calls, lambda x: torch.relu(x[:10]).sum() + (x[:10] ** 2).sum())
    found = solvers.minimize(function, np.zeros(n), method="L-BFGS-B", compiled=False)
    assert len(calls) < found.nfev + 40
    calls.clear()
    function = counted_in(calls, lambda x: sum([v if v > 0 else zero() for v in x], zero()))  # kinks alone
    solvers.minimize(function, np.zeros(n), method="L-BFGS-B", compiled=False, options={"maxiter": 0})
    assert len(calls) < 100


def test_one_missing_of_many():
    calls = []
    function = counted_in(calls, lambda x: ((x[:10] - 1) ** 2).sum() + (x[2000].item() - 2) ** 2)
    with pytest.raises(RuntimeError, match="derivative by number 2000"):
        solvers.minimize(function, np.zeros(3000), method="L-BFGS-B", compiled=False)
    assert len(calls) < 250


def test_zeros_that_do_not_last_take_no_further_runs():
    calls = []
    function = counted_in(calls, lambda x: (x[0] - 1) ** 2 + (x[1] - x[0] ** 2) ** 2 + 0 * float(1))
    found = solvers.minimize(function, np.zeros(2), compiled=False)
    assert len(calls) == found.nfev


def test_functions_without_a_module():
    space = {"torch": torch, "__name__": None}
    exec("def helper(v): return v.item()\ndef some(x): return (x[0] - 1) ** 2 + (helper(x[1]) - 2) ** 2", space)
    assert space["helper"].__module__ is None
    with pytest.raises(RuntimeError, match="derivative by number 1"):
        solvers.minimize(space["some"], np.zeros(2))
