"""Further arguments (SciPy's ``args``): replays take them as inputs, and never give what other ones gave."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")

from chainrule import scipy as solvers  # noqa: E402
from chainrule.scipy.extra_arguments import ExtraArguments, Keywords  # noqa: E402
from chainrule.scipy.functions import TorchFunction  # noqa: E402
from chainrule.scipy.linearised import Linearisation, Points  # noqa: E402
from chainrule.scipy.replays import ATTRIBUTE, CALLS, VALUES  # noqa: E402

TIMES = np.linspace(0, 2, 9)


def entries(function):
    """What is kept with a function, and how many graphs that has."""
    found = function.__dict__[ATTRIBUTE].entries if ATTRIBUTE in function.__dict__ else {}
    return {key: len(entry._graphs) for key, entry in found.items()}


def residuals(p, t, y):
    return p[0] * torch.exp(-p[1] * t) + p[2] - y


def rosenbrock(x, a, b):
    return (b * (x[1:] - x[:-1] ** 2) ** 2 + (a - x[:-1]) ** 2).sum()


def system(x, a, b):
    return torch.stack([x[0] ** 2 - a * x[1], torch.exp(-x[0]) + x[1] * x[0] - b, x[2] - x[0] * b])


def robertson(t, y, k1, k2, k3):
    a, b, c = y.unbind()
    r1, r2, r3 = k1 * a, k2 * b * b, k3 * b * c
    return torch.stack([r3 - r1, r1 - r2 - r3, r2])


def nested(x, rates, places, power):
    return (rates[0] * (x - places[0]) ** power + rates[1] * x.cos()).sum()


def with_tensor(x, weight, number):
    return ((weight @ x - number) ** 2).sum() + (x**4).sum()


def rates(generator):
    return tuple(float(k) for k in np.array([0.04, 3e4, 1e2]) * generator.uniform(0.9, 1.1, 3))


CASES = {
    "solve_ivp": (
        robertson, rates,
        lambda f, a, **k: solvers.solve_ivp(f, (0, 10), [1.0, 0, 0], method="BDF", rtol=1e-7, atol=1e-10, args=a, **k).y[:, -1]),
    "solve_ivp-numbers": (
        robertson, lambda g: tuple(map(np.float64, rates(g))),
        lambda f, a, **k: solvers.solve_ivp(f, (0, 10), [1.0, 0, 0], method="Radau", rtol=1e-7, atol=1e-10, args=a, **k).y[:, -1]),
    "solve_ivp-sparse": (
        robertson, rates,
        lambda f, a, **k: solvers.solve_ivp(
            f, (0, 10), [1.0, 0, 0], method="BDF", layout="sparse", rtol=1e-7, atol=1e-10, args=a, **k).y[:, -1]),
    "minimize": (
        rosenbrock, lambda g: (1.0, g.uniform(2, 9)), lambda f, a, **k: solvers.minimize(f, np.full(3, 0.4), args=a, **k).x),
    "minimize-hessian": (
        rosenbrock, lambda g: (1.0, g.uniform(2, 9)),
        lambda f, a, **k: solvers.minimize(f, np.full(3, 0.4), args=a, method="trust-exact", **k).x),
    "minimize-products": (
        rosenbrock, lambda g: (1.0, g.uniform(2, 9)),
        lambda f, a, **k: solvers.minimize(f, np.full(3, 0.4), args=a, method="trust-krylov", tol=1e-6, **k).x),
    "minimize-alone": (
        rosenbrock, lambda g: (1.0, g.uniform(2, 4)),
        lambda f, a, **k: solvers.minimize(f, np.full(2, 0.4), args=a, method="Nelder-Mead", tol=1e-10, **k).x),
    "minimize-nested": (
        nested, lambda g: ((2.0, g.uniform(0, 1)), (g.uniform(-1, 1),), 2),
        lambda f, a, **k: solvers.minimize(f, np.full(3, 0.4), args=a, tol=1e-10, **k).x),
    "minimize-tensor": (
        with_tensor, lambda g: (torch.from_numpy(g.standard_normal((2, 3))), g.uniform(0, 1)),
        lambda f, a, **k: solvers.minimize(f, np.full(3, 0.4), args=a, tol=1e-10, **k).x),
    "minimize-tensor-turned": (
        with_tensor, lambda g: (torch.from_numpy(g.standard_normal((3, 2))).T, g.uniform(0, 1)),
        lambda f, a, **k: solvers.minimize(f, np.full(3, 0.4), args=a, tol=1e-10, **k).x),
    "minimize-tensor-float32": (
        lambda x, w, n: with_tensor(x, w.double(), n), lambda g: (torch.from_numpy(g.standard_normal((2, 3))).float(), g.uniform(0, 1)),
        lambda f, a, **k: solvers.minimize(f, np.full(3, 0.4), args=a, tol=1e-10, **k).x),
    "minimize-tensor-graph": (
        with_tensor, lambda g: (torch.from_numpy(g.standard_normal((2, 3))).requires_grad_(), g.uniform(0, 1)),
        lambda f, a, **k: solvers.minimize(f, np.full(3, 0.4), args=a, tol=1e-10, **k).x),
    "least_squares": (
        residuals, lambda g: (TIMES, 2 * np.exp(-1.3 * TIMES) + g.uniform(0, 1)),
        lambda f, a, **k: solvers.least_squares(f, np.ones(3), args=a, xtol=1e-12, **k).x),
    "least_squares-float32": (
        residuals, lambda g: (TIMES.astype(np.float32), (2 * np.exp(-1.3 * TIMES) + g.uniform(0, 1))[::-1]),
        lambda f, a, **k: solvers.least_squares(f, np.ones(3), args=a, xtol=1e-12, **k).x),
    "least_squares-sparse": (
        residuals, lambda g: (TIMES, 2 * np.exp(-1.3 * TIMES) + g.uniform(0, 1)),
        lambda f, a, **k: solvers.least_squares(f, np.ones(3), args=a, xtol=1e-12, layout="sparse", **k).x),
    "least_squares-named": (
        residuals, lambda g: (torch.from_numpy(TIMES), 2 * torch.exp(-1.3 * torch.from_numpy(TIMES)) + g.uniform(0, 1)),
        lambda f, a, **k: solvers.least_squares(f, np.ones(3), args=a[:1], kwargs={"y": a[1]}, xtol=1e-12, **k).x),
    "root": (
        system, lambda g: (1.0, g.uniform(1, 1.3)), lambda f, a, **k: solvers.root(f, np.ones(3), args=a, tol=1e-12, **k).x),
    "root-lm": (
        system, lambda g: (1.0, g.uniform(1, 1.3)), lambda f, a, **k: solvers.root(f, np.ones(3), args=a, method="lm", tol=1e-12, **k).x),
}  # fmt: skip


def copied(function, *, named=False):
    """A function of its own, with nothing kept from other tests."""
    if named:
        return lambda p, t, y: function(p, t, y)
    return lambda *args: function(*args)


@pytest.mark.parametrize("name", CASES)
def test_each_solve_has_its_own_values(name):
    function, args_of, solve = CASES[name]
    own, generator = copied(function, named=name.endswith("named")), np.random.default_rng(len(name))
    for _ in range(CALLS + 4):
        args = args_of(generator)
        found, plain = solve(own, args), solve(own, args, compiled=False)
        assert np.allclose(found, plain, rtol=1e-5, atol=1e-7)
    if name != "minimize-products":  # products of one point come from one record
        assert sum(entries(own).values()) > 0
    assert len(entries(own)) <= 4  # none of one value alone


@pytest.mark.parametrize("name", CASES)
def test_values_and_derivatives_are_those_of_plain_calls(name):
    function, args_of, solve = CASES[name]
    own, generator = copied(function, named=name.endswith("named")), np.random.default_rng(1)
    for _ in range(3):
        args = args_of(generator)
        assert np.allclose(solve(own, args, compiled=True), solve(own, args, compiled=False), rtol=1e-5, atol=1e-7)


def test_arrays_that_change_in_place():
    for make in (np.array, torch.tensor):
        place = make([1.0, 2.0, 3.0]) if make is np.array else make([1.0, 2.0, 3.0], dtype=torch.float64)
        own = copied(lambda x, p: ((x - p) ** 2).sum())
        for step in range(2 * CALLS):
            found = solvers.minimize(own, np.zeros(3), args=(place,)).x
            assert np.allclose(found, np.asarray(place), atol=1e-6)
            place += step + 0.5
        assert sum(entries(own).values()) > 0


def test_arrays_that_a_callback_changes():
    own = copied(residuals)

    def solve(**options):
        data = 2 * np.exp(-1.3 * TIMES)
        seen = []

        def halved(x):
            data[:] = data / 2
            seen.append(x.copy())

        def other(p, t, y):
            return (residuals(p, t, y) ** 2).sum() + (p**2).sum() if options else (own(p, t, y) ** 2).sum() + (p**2).sum()

        solvers.minimize(other, np.ones(3), args=(TIMES, data), callback=halved, options={"maxiter": 5}, **options)
        return np.array(seen)

    for _ in range(6):
        assert np.allclose(solve(), solve(compiled=False), atol=1e-8)


def test_an_array_that_changes_where_a_solver_stands():
    function = TorchFunction(residuals, "least_squares", None, False, None, (TIMES, data := TIMES.copy()))
    linearise = Linearisation(function, residuals, "of a test", "dense")
    points, x = Points(function, linearise), np.ones(3)
    before = points.at(x, (TIMES, data)).value
    data += 1.0
    assert np.allclose(points.at(x, (TIMES, data)).value, before - 1.0)


def test_functions_that_look_at_numbers():
    def by_type(x, k):
        return ((x - (k if isinstance(k, float) else 5.0)) ** 2).sum()

    def by_type_at_times(x, k):
        return ((x - (k if isinstance(k, float) or k is None else 5.0) * (2.0 if isinstance(k, float) else 1.0)) ** 2).sum()

    def by_value(x, k):
        return ((x - (k if k > 0.5 else 2 * k)) ** 2).sum()

    def by_python(x, k):
        return ((x - math.exp(k)) ** 2).sum()

    def in_float32(x, k):
        return ((x - torch.arange(3) * k) ** 2).sum()

    for function in (by_type, by_type_at_times, by_value, by_python, in_float32):
        generator = np.random.default_rng(0)
        for _ in range(CALLS):
            k = (float(generator.uniform(0, 1)),)
            plain = solvers.minimize(function, np.zeros(3), args=k, compiled=False)
            for _ in range(2):
                found = solvers.minimize(function, np.zeros(3), args=k)
                assert found.nfev == plain.nfev
                # By type and in another precision all is as plain calls have it, to the last bits.
                assert np.allclose(found.x, plain.x, rtol=1e-13, atol=1e-13)


def test_a_type_that_matters_for_some_values_alone():
    def function(x, k):
        return ((x - k) ** 2).sum() if not isinstance(k, float) or k < 2 else ((x - 1) ** 2).sum()

    def of_tensors(x, k):
        return ((x - (k if isinstance(k, torch.Tensor) else min(k, 2.0))) ** 2).sum()

    for number in np.linspace(0, 1.9, CALLS):
        for f in (function, of_tensors):
            assert np.allclose(solvers.minimize(f, np.zeros(3), args=(float(number),)).x, number, atol=1e-6)
    assert np.allclose(solvers.minimize(of_tensors, np.zeros(3), args=(3.0,)).x, 2.0, atol=1e-6)
    assert np.allclose(solvers.minimize(function, np.zeros(3), args=(3.0,)).x, 1.0, atol=1e-6)


def test_errors_of_python_stay_errors():
    def divides(x, k):
        return ((x - 1 / k) ** 2).sum()

    def takes_roots(x, k):
        return ((x - (k**0.5).real) ** 2).sum() + 0 * x.sum()

    for number in np.linspace(1, 2, CALLS):
        assert np.allclose(solvers.minimize(divides, np.zeros(3), args=(float(number),)).x, 1 / number, atol=1e-6)
        solvers.minimize(takes_roots, np.zeros(3), args=(float(number),))
    assert sum(entries(divides).values()) > 0
    with pytest.raises(ZeroDivisionError):
        solvers.minimize(divides, np.zeros(3), args=(0.0,))
    assert np.allclose(solvers.minimize(divides, np.zeros(3), args=(4.0,)).x, 0.25, atol=1e-6)
    assert np.allclose(solvers.minimize(takes_roots, np.zeros(3), args=(-4.0,)).x, 0.0, atol=1e-6)  # Python has 2j


def test_functions_that_do_more_are_called_as_often_as_the_solver_asks():
    calls = []

    def counted(x, k):
        calls.append(k)
        return rosenbrock(x, 1.0, k)

    for number in np.linspace(1, 2, CALLS):
        calls.clear()
        found = solvers.minimize(counted, np.full(3, 0.5), args=(float(number),))
        assert len(calls) == found.nfev
        assert set(calls) == {number}


def test_methods_that_change_the_arguments():
    own = copied(rosenbrock)

    def method(fun, x0, args=(), jac=None, **_):
        value, gradient = fun(x0, 1.0, 7.0), jac(x0, *args)
        from scipy.optimize import OptimizeResult  # noqa: PLC0415 - as users write methods

        return OptimizeResult(x=x0, fun=value, jac=gradient, again=fun(x0, *args))

    x = np.array([0.3, 0.7, 0.2])
    for number in np.linspace(1, 2, 2 * CALLS):
        found = solvers.minimize(own, x, args=(1.0, float(number)), method=method)
        assert np.isclose(found.fun, float(rosenbrock(torch.from_numpy(x), 1.0, 7.0)))
        assert np.isclose(found.again, float(rosenbrock(torch.from_numpy(x), 1.0, number)))


def test_what_is_kept_is_bounded():
    own = copied(lambda x, n, word: ((x - n) ** 2).sum())
    for n in range(200):
        assert np.allclose(solvers.minimize(own, np.zeros(2), args=(n, str(n))).x, n, atol=1e-5)
    assert len(entries(own)) <= 128


def test_equal_numbers_of_other_kinds_are_others():
    own = copied(lambda x, n: ((x - (2.0 if n is True else n)) ** 2).sum())
    for _ in range(CALLS):
        assert np.allclose(solvers.minimize(own, np.zeros(2), args=(1,)).x, 1.0, atol=1e-6)
        assert np.allclose(solvers.minimize(own, np.zeros(2), args=(True,)).x, 2.0, atol=1e-6)
        assert np.allclose(solvers.minimize(own, np.zeros(2), args=(1.0,)).x, 1.0, atol=1e-6)
    for sign in (0.0, -0.0) * CALLS:
        copysign = solvers.minimize(zero := _signed, np.zeros(2), args=(sign,)).x
        assert np.allclose(copysign, math.copysign(1.0, sign), atol=1e-6)
    assert zero is _signed


def _signed(x, zero):
    return ((x - math.copysign(1.0, zero)) ** 2).sum()


def test_arguments_that_no_replay_takes():
    class Rates:
        slow = 2.0

    own = copied(lambda x, rates, places, items: ((x - rates.slow) ** 2).sum() * items[0] + (x[places] ** 2).sum())
    for _ in range(VALUES // 4):
        found = solvers.minimize(own, np.zeros(3), args=(Rates(), np.array([0, 1]), [1.0]))
        assert np.allclose(found.x, [1.0, 1.0, 2.0], atol=1e-5)
    assert sum(entries(own).values()) == 0


def test_one_argument_given_twice():
    own, place = copied(lambda x, p, q: ((x - p) ** 2).sum() + ((x - q) ** 2).sum()), torch.ones(3, dtype=torch.float64)
    for args in ((place, place), (place.numpy(), place.numpy()), (place.numpy(), place)) * CALLS:
        assert np.allclose(solvers.minimize(own, np.zeros(3), args=args).x, np.ones(3), atol=1e-6)


def test_arrays_are_not_written_to():
    def writes(x, place):
        place *= 2
        return ((x - place) ** 2).sum()

    for compiled in (None, True):
        place = np.ones(3)
        for _ in range(3):
            assert np.allclose(solvers.minimize(writes, np.zeros(3), args=(place,), compiled=compiled).x, 2.0, atol=1e-6)
            assert (place == 1).all()


def test_read_only_arrays():
    place = np.ones(3)
    place.flags.writeable = False
    own = copied(lambda x, p: ((x - p) ** 2).sum())
    for _ in range(CALLS):
        assert np.allclose(solvers.minimize(own, np.zeros(3), args=place).x, 1.0, atol=1e-6)


def test_arguments_that_are_no_inputs_are_replayed_as_before():
    own = copied(lambda x, p: ((x - p) ** 2).sum())
    for _ in range(CALLS):
        assert np.allclose(solvers.minimize(own, np.zeros(3), args=(np.ones(3),), device="cpu").x, 1.0, atol=1e-6)
    assert sum(entries(own).values()) > 0

    class Place:
        value = 2.0

    place = Place()

    def with_object(x, p):
        return ((x - p.value) ** 2).sum()

    for _ in range(4):
        assert np.allclose(solvers.minimize(with_object, np.zeros(3), args=(place,), compiled=True).x, 2.0, atol=1e-6)
    compiled = [e._compiled for e in with_object.__dict__[ATTRIBUTE].entries.values() if e._compiled is not None]
    assert [(c.cache_info().misses, c.cache_info().hits > 8) for c in compiled] == [(1, True)]


def test_arguments_in_a_list():
    own = copied(robertson)
    for _ in range(12):
        found = solvers.solve_ivp(own, (0, 1), [1.0, 0, 0], method="BDF", args=[0.04, 3e4, 1e2])
        assert found.success
    assert sum(entries(own).values()) > 0


def in_a_set(x, k):
    return ((x - (5.0 if k in {1.0, 3.0} else 2.0)) ** 2).sum() + k * (x**2).sum()


def in_a_dictionary(x, k):
    table = {1.0: 5.0, 3.0: 7.0}
    return ((x - (table[k] if k in table else 2.0)) ** 2).sum() + k * (x**2).sum()


def of_a_type(x, k):
    return ((x - 3) ** 2).sum() + (k * (x**2).sum() if isinstance(k, float) else (k * x.abs()).sum())


def no_tensor(x, k):
    return ((x - 3) ** 2).sum() + ((k * x.abs()).sum() if torch.is_tensor(k) else k * (x**2).sum())


@pytest.mark.parametrize("function", [in_a_set, in_a_dictionary, of_a_type, no_tensor])
def test_numbers_that_are_looked_up_or_asked_for_their_type_are_numbers(function):
    """Where all branches agree at the first point, comparing them there says nothing."""
    for k in [*np.linspace(0.05, 0.95, 2 * CALLS + 20).tolist(), 1.0, 3.0]:
        for _ in range(2):
            found = solvers.minimize(function, np.zeros(2), args=(k,), method="L-BFGS-B").x
        goal = {in_a_set: 5.0 if k in {1.0, 3.0} else 2.0, in_a_dictionary: {1.0: 5.0, 3.0: 7.0}.get(k, 2.0)}.get(function, 3.0)
        np.testing.assert_allclose(found, goal / (1 + k), rtol=1e-4)


def test_dictionaries_reach_the_function_themselves():
    """What a callback or the function itself writes to them is seen."""
    def objective(x, options):
        options["runs"] = options.get("runs", 0) + 1
        return (options["weight"] * (x - 1) ** 2).sum() + (x**2).sum() * (1 - options["weight"])

    for _ in range(4):
        options = {"weight": 0.2}

        def callback(intermediate_result, options=options):
            options["weight"] = 0.9

        found = solvers.minimize(objective, np.full(3, 5.0), args=(options,), callback=callback, method="BFGS")
        np.testing.assert_allclose(found.x, 0.9, rtol=1e-4)
        assert options["runs"] >= 3


def test_arguments_by_name_that_change_are_not_those_of_before():
    named = {"scale": 3.0, "goal": 1.0}
    given = (Keywords(named),)
    extra = ExtraArguments(given, are_static=False)
    assert extra.are(given)
    named["goal"] = 2.0
    assert not extra.are(given)

    def differences(x, scale, goal):
        return scale * (x - goal)

    for goal in range(CALLS + 4):
        found = solvers.least_squares(differences, np.zeros(2), kwargs={"scale": 3.0, "goal": float(goal)})
        np.testing.assert_allclose(found.x, goal, atol=1e-8)
