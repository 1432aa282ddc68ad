"""Products with masks select: zero where the mask is, whatever else stands there."""

import math

import pytest
import torch
import torch.nn.functional as F

import chainrule

D = torch.float64


def _set(x):
    y = x * 1
    y[x <= 0] = 0.0
    return y


def _fill_row(x):
    y = x * 1
    y[0] = 0.0
    y[-1:] = 0.0
    return y


FUNCTIONS = {
    "written by a mask": _set,
    "written at an index": _fill_row,
    "index_fill": lambda x: x.index_fill(0, torch.tensor([0, 3]), 0.0),
    "index_put": lambda x: x.index_put((torch.tensor([0, 3]),), torch.zeros((), dtype=D)),
    "scatter": lambda x: x.scatter(0, torch.tensor([0, 3]), 0.0),
    "tril": lambda x: torch.outer(x, x).abs().tril(-1).triu(-2),
    "maximum": lambda x: torch.maximum(x, torch.tensor(0.0, dtype=D)),
    "minimum": lambda x: -torch.minimum(-x, torch.tensor(0.0, dtype=D)),
    "masked_fill": lambda x: x.masked_fill(x <= 0, 0.0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "relu": F.relu,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_slopes_without_bounds_behind_a_mask(name):
    """The square root has an infinite slope where zeros were written; torch's reverse mode gives zero there."""
    function = FUNCTIONS[name]

    def total(x):
        return function(x).sqrt().sum()

    for values in ([-1.0, 1.0, 4.0, -2.0], [-3.0, 2.0, 5.0, -0.5]):
        x = torch.tensor(values, dtype=D)
        torch.testing.assert_close(chainrule.grad(total)(x), torch.func.grad(total)(x))
        torch.testing.assert_close(chainrule.jacrev(total)(x), torch.func.jacrev(total)(x))
        rows = torch.stack([x, 2 * x])
        torch.testing.assert_close(chainrule.vmap(chainrule.grad(total))(rows), torch.stack([torch.func.grad(total)(r) for r in rows]))


def test_ties_of_maximum():
    """Where both are equal each gets a half; the derivative of what follows is multiplied by it."""
    x = torch.tensor([1.0, 2.0, -1.0], dtype=D)

    def total(a, b):
        return (torch.maximum(a, b) ** 3 * torch.minimum(a, b)).sum()

    y = torch.tensor([1.0, -2.0, -1.0], dtype=D)
    for argnums in (0, 1, (0, 1)):
        torch.testing.assert_close(chainrule.grad(total, argnums)(x, y), torch.func.grad(total, argnums)(x, y))
        torch.testing.assert_close(chainrule.hessian(total, argnums)(x, y), torch.func.hessian(total, argnums)(x, y))


MASKS = {
    "relu": F.relu,
    "clamp": lambda x: x.clamp(min=0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0.0),
    "maximum": lambda x: torch.maximum(x, torch.tensor(0.0, dtype=D)),
    "twice": lambda x: (2 * x.relu()).clamp(min=0),
}
SLOPES = {"sqrt": torch.sqrt, "log": torch.log, "power": lambda x: x**0.5, "reciprocal": lambda x: 1 / x}
READINGS = {
    "row": lambda x: x[0],
    "column": lambda x: x.unbind(1)[0],
    "turned": lambda x: x[None].transpose(1, 2)[0, 0],
    "slice": lambda x: x[:2, 1:],
    "flip": lambda x: x.flip(0)[:1],
    "roll": lambda x: x.roll(1, 1),
    "list": lambda x: x[torch.tensor([0, 1]), torch.tensor([0, 2])],
    "mask": lambda x: x[torch.tensor([True, False, True])],
    "split": lambda x: x.split(2, 1)[0],
    "gather": lambda x: x.gather(1, torch.tensor([[0, 2], [1, 1], [1, 0]])),
    "sort": lambda x: x.sort(1)[0],
    "max": lambda x: x.max(1)[0],
    "median": lambda x: x.median(1)[0],
    "diagonal": torch.diagonal,
    "twice a row": lambda x: 2 * x[0],
}


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("mask", MASKS)
def test_entries_read_behind_a_mask_and_a_slope_without_bounds(mask, slope):
    x = torch.tensor([[-1.0, 4.0, 9.0, 2.0], [3.0, -2.0, 0.5, -0.3], [1.0, 2.0, 3.0, 5.0]], dtype=D)
    for name, read in READINGS.items():

        def function(x, read=read):
            return read(SLOPES[slope](MASKS[mask](x)))

        def total(x):
            return function(x).sum()  # noqa: B023 - called in this turn

        for transform, f in (("grad", total), ("jacrev", function), ("jacfwd", function)):
            ours, theirs = getattr(chainrule, transform)(f), getattr(torch.func, transform)(f)(x)
            for _ in range(2):
                found = ours(x)
                known = ~torch.isnan(theirs)
                assert not torch.isnan(found[known]).any(), (name, transform)
                torch.testing.assert_close(found[known & ~torch.isnan(found)], theirs[known & ~torch.isnan(found)])


ROWS, COLUMNS = torch.tensor([True, False, True]), torch.tensor([True, False, True, True])
ENTRIES = torch.tensor([[True, True, False, True], [False] * 4, [True, False, True, True]])


def _written(x):
    y = x.clone()
    y[1] = 0.0
    return y


#: Masks over fewer axes than what follows.
PARTIAL_MASKS = {
    "rows": lambda x: torch.where(ROWS[:, None], x, 0.0),
    "columns": lambda x: torch.where(COLUMNS, x, 0.0),
    "entries": lambda x: torch.where(ENTRIES, x, 0.0),
    "filled": lambda x: x.masked_fill(~ROWS[:, None], 0.0),
    "written": _written,
    "maximum": lambda x: torch.maximum(x - 2.0, torch.zeros(4, dtype=D)),
    "two": lambda x: torch.where(COLUMNS, torch.where(ROWS[:, None], x, 0.0), 0.0),
    "triangle after abs": lambda x: x.abs().tril(),
}
STEEP = {
    "sqrt": torch.sqrt,
    "power": lambda x: x.abs() ** 0.3,
    "log": torch.log,
    "product": lambda x: x * x.log(),
    "normed": lambda x: x / x.norm(dim=-1, keepdim=True),
    "norms": lambda x: x.square().sum(1).sqrt()[:, None],
}
REDUCTIONS = {
    "all": lambda x: x,
    "amax": lambda x: x.amax(1),
    "amax of columns": lambda x: x.amax(0),
    "row": lambda x: x[torch.tensor([0, 1])],
    "column": lambda x: x[:, 0],
    "sum": lambda x: x.sum(1),
    "mean": lambda x: x.mean(),
    "norm": lambda x: x.norm(dim=1),
    "flip": lambda x: x.flip(0),
    "product": lambda x: x @ torch.ones(x.shape[1], 2, dtype=D),
    "softmax": lambda x: x.softmax(1),
    "logsumexp": lambda x: x.logsumexp(0),
    "deviation": lambda x: x.std(0),
    "triangle": torch.tril,
    "prod": lambda x: x.prod(1),
    "gram": lambda x: x.T @ x,
}


def _checked(found, expected, where):
    """NaN nowhere where torch has a number, and that number."""
    known = ~torch.isnan(expected)
    assert not torch.isnan(found[known]).any(), where
    torch.testing.assert_close(found[known], expected[known])


@pytest.mark.parametrize("slope", STEEP)
@pytest.mark.parametrize("mask", PARTIAL_MASKS)
def test_masks_over_fewer_axes_than_the_slope(mask, slope):
    """Which factor meets the mask first is the planner's choice; the result is zero where the mask is, whichever it is."""
    generator = torch.Generator().manual_seed(3)
    x = 0.1 + torch.rand(3, 4, dtype=D, generator=generator)
    first = [*PARTIAL_MASKS].index(mask) + 3 * [*STEEP].index(slope)
    for name in [*REDUCTIONS][first % 5 :: 5]:

        def function(x, reduce=REDUCTIONS[name]):
            return reduce(STEEP[slope](PARTIAL_MASKS[mask](x)))

        def total(x):
            return function(x).sum()  # noqa: B023 - called in this turn

        tangent, cotangent = torch.rand(3, 4, dtype=D), torch.rand(function(x).shape, dtype=D)
        rows = torch.stack([x, 0.5 * x])
        for _ in range(2):
            _checked(chainrule.jacrev(function)(x), torch.func.jacrev(function)(x), (name, "jacrev"))
            _checked(chainrule.jacobian(function)(x), torch.func.jacrev(function)(x), (name, "jacobian"))
            _checked(chainrule.jacfwd(function)(x), torch.func.jacfwd(function)(x), (name, "jacfwd"))
            _checked(chainrule.grad(total)(x), torch.func.grad(total)(x), (name, "grad"))
            (found,), (expected,) = (m.vjp(function, x)[1](cotangent) for m in (chainrule, torch.func))
            _checked(found, expected, (name, "vjp"))
            found, expected = (m.jvp(function, (x,), (tangent,))[1] for m in (chainrule, torch.func))
            _checked(found, expected, (name, "jvp"))
            found, expected = (m.vmap(m.grad(total))(rows) for m in (chainrule, torch.func))
            _checked(found, expected, (name, "vmap of grad"))


def test_a_mask_costs_nothing_where_all_is_finite():
    """A product with a mask selects; products of what it gave are plain ones, unless the other factor may be infinite."""
    x = torch.rand(5, dtype=D)
    for function, count in (
        (lambda x: x.relu().sin().exp() * 2.0, 1),
        (lambda x: x.relu().sin().sqrt() * 2.0, 2),
        (lambda x: x.relu().pow(3).tanh(), 1),
    ):
        program = str(chainrule.explain(chainrule.jacfwd(function))(x)).partition("program:")[2]
        found = [word.strip(" ,").partition("×") for word in program.split() if "threshold_backward" in word]
        assert sum(int(times or 1) for _, _, times in found) == count, program


#: Masks with halves at ties, and masks of ones: both select, also from infinities that nothing told of beforehand.
EXTREMA = {
    "maximum": lambda x: torch.maximum(x, torch.zeros(4, dtype=D)),
    "maximum, second": lambda x: torch.maximum(torch.zeros(4, dtype=D), x),
    "minimum": lambda x: torch.minimum(x, torch.zeros(4, dtype=D)),
    "max": lambda x: torch.max(x, torch.zeros(4, dtype=D)),
    "min": lambda x: torch.min(x, torch.zeros(4, dtype=D)),
    "maximum of itself": lambda x: torch.maximum(x, x.flip(0)),
    "scaled": lambda x: -torch.minimum(-2 * x, torch.zeros(4, dtype=D)) * 3,
    "both": lambda x: torch.maximum(torch.minimum(x, torch.ones(4, dtype=D)), torch.zeros(4, dtype=D)),
    "relu": F.relu,
}


@pytest.mark.parametrize("name", EXTREMA)
def test_extrema_before_closed_over_infinities(name):
    extremum = EXTREMA[name]
    infinite = torch.tensor([float("inf"), 1.5, float("-inf"), 2.5], dtype=D)
    for x in ([-1.25, 2.0, -3.0, 0.0], [1.25, -2.0, 3.0, 0.0]):
        x = torch.tensor(x, dtype=D)
        rows = torch.stack([x, -x])
        for function in (lambda x: extremum(x) * infinite, lambda x: infinite * extremum(x) * 2.0):

            def total(x, function=function):
                return function(x).sum()

            for _ in range(2):  # the second time by the cached plan
                found, expected = (m.grad(total)(x) for m in (chainrule, torch.func))
                _same(found, expected)
                (found,), (expected,) = (m.vjp(function, x)[1](x.abs()) for m in (chainrule, torch.func))
                _same(found, expected)
                _same(chainrule.vmap(chainrule.grad(total))(rows), torch.func.vmap(torch.func.grad(total))(rows))
                _same(chainrule.jacobian(function)(x), torch.func.jacrev(function)(x))


def _same(found, expected):
    """Equal where torch has numbers: products of zeros that it does not know as such are NaN there."""
    assert not (found.isnan() & ~expected.isnan()).any(), (found, expected)
    known = ~expected.isnan()
    torch.testing.assert_close(found[known], expected[known])


@pytest.mark.parametrize("extremum", [torch.maximum, torch.minimum])
def test_extrema_of_nan(extremum):
    nan = float("nan")
    x, y = torch.tensor([[nan, 1.0, nan, 2.0, 3.0], [1.0, nan, nan, 2.0, 1.0]], dtype=D)
    weights = torch.arange(1.0, 6.0, dtype=D)
    found, expected = (m.grad(lambda x, y: (extremum(x, y) * weights).sum(), (0, 1))(x, y) for m in (chainrule, torch.func))
    torch.testing.assert_close(found, expected)


READ = {
    "slice": lambda x: x[1:3],
    "index": lambda x: x[torch.tensor([0, 2])],
    "relu": F.relu,
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(x <= 0, 0.0),
    "clamp": lambda x: x.clamp(-1, 1),
    "relu6": F.relu6,
    "softshrink": F.softshrink,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "triu": lambda x: x.reshape(2, 2).triu(),
}
NUMBERS = {
    "infinity": lambda y: y * math.inf,
    "two that overflow": lambda y: y * 1e200 * 1e200,
    "a quotient": lambda y: y / 1e-200 * 1e200,
}


def agree(function, x, names=("grad", "jacrev")):
    """First and second call; the slope of hardsigmoid in torch is 1/6 in single precision."""
    for name in names:
        inner = (lambda y: function(y).sum()) if name == "grad" else function
        ours, theirs = (getattr(m, name)(inner) for m in (chainrule, torch.func))
        for _ in range(2):
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", READ)
def test_zeros_win_over_numbers(name, number):
    """What is not read, or masked, has the derivative zero whatever the rest is multiplied with."""
    agree(lambda x: NUMBERS[number](READ[name](x)), torch.tensor([-4.0, 0.5, 4.0, -0.3], dtype=D), ("grad",))


@pytest.mark.parametrize("values", [[math.inf, -math.inf, 1.0, -4.0], [math.nan, 5.0, -3.5, 0.0], [800.0, -800.0, -2.9, 3.1]])
@pytest.mark.parametrize("after", ["sqrt", "log", "reciprocal", "square", "exp"])
@pytest.mark.parametrize("name", ["hardsigmoid", "hardswish"])
def test_flat_pieces_of_hard_activations(name, after, values):
    agree(lambda x: getattr(torch, after)(getattr(F, name)(x)), torch.tensor(values, dtype=D), ("grad",))
    x = torch.tensor([-5.0, -1.0, 2.0, 4.0], dtype=D)

    def total(x, written=False):
        # torch has no second derivative of hardsigmoid.
        value = F.relu6(x + 3) / 6 * (x if name == "hardswish" else 1) if written else getattr(F, name)(x)
        return (value + 1).log().sum()

    expected = torch.func.hessian(total)(x, True)
    torch.testing.assert_close(chainrule.hessian(total)(x), expected, rtol=1e-7, atol=1e-7)
    x.requires_grad_()
    (found,) = torch.autograd.grad(chainrule.grad(total)(x).sum(), x)
    torch.testing.assert_close(found, expected.sum(0), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("after", [torch.sqrt, torch.log, torch.reciprocal])
def test_windows_beside_a_pole(after):
    """Elements of a window that are not its maximum: zero also where the maximum has an infinite slope."""
    x = torch.tensor([0.0, -1.0, 1.0, -2.0], dtype=D)

    def function(x):
        return after(F.max_pool1d(x[None], 2)[0])

    slopes = torch.func.vmap(torch.func.grad(after))(torch.tensor([0.0, 1.0], dtype=D))
    expected = torch.zeros(2, 4, dtype=D)
    expected[0, 0], expected[1, 2] = slopes
    for _ in range(2):
        torch.testing.assert_close(chainrule.jacrev(function)(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_numbers_beyond_the_range_of_the_dtype(dtype):
    """They are infinite there, as they are to the op itself."""
    x = torch.tensor([-1.0, 1.0], dtype=dtype)
    for function in (lambda x: (x * 1e200).sum(), lambda x: (x.relu() * 1e200).sum()):
        for name in ("grad", "hessian"):
            expected = getattr(torch.func, name)(function)(x)
            for _ in range(2):
                torch.testing.assert_close(getattr(chainrule, name)(function)(x), expected, rtol=0, atol=0)
