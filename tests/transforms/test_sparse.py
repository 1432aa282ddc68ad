"""Sparse layouts against torch.func's dense derivatives, and their patterns against true non-zeros."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import chainrule
from chainrule.execute import sparse as execute_sparse
from chainrule.execute.memory import watching
from chainrule.transforms import sparse as transforms_sparse
from tests.transforms.sparse_functions import HESSIANS, INDEX_ONLY, JACOBIANS

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")

#: Sums of at most a few hundred products of numbers of size below about 100, in float64.
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def well_formed(found):
    """A COO tensor whose indices are sorted and stand once each."""
    again = torch.sparse_coo_tensor(found.indices(), found.values(), found.shape, check_invariants=True).coalesce()
    assert found.is_coalesced()
    assert found.indices().dtype == torch.long
    assert torch.equal(again.indices(), found.indices())


def fresh(x):
    return torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("transform", ["jacobian", "jacfwd", "jacrev"])
@pytest.mark.parametrize("name", JACOBIANS)
def test_jacobian(name, transform):
    function, x = JACOBIANS[name]
    sparse = getattr(chainrule, transform)(function, layout="sparse_coo")
    for point in (x, fresh(x), x):
        expected = torch.func.jacrev(function)(point)
        found = sparse(point)
        assert found.shape == expected.shape
        well_formed(found)
        torch.testing.assert_close(found.to_dense(), expected, **TOLERANCE)


@pytest.mark.parametrize("name", JACOBIANS)
def test_rows(name):
    function, x = JACOBIANS[name]
    found = chainrule.jacobian(function, layout="sparse_csr")(x)
    expected = torch.func.jacrev(function)(x)
    torch.sparse_csr_tensor(found.crow_indices(), found.col_indices(), found.values(), found.shape, check_invariants=True)
    torch.testing.assert_close(found.to_dense(), expected.reshape(function(x).numel(), x.numel()), **TOLERANCE)


@pytest.mark.parametrize("name", INDEX_ONLY)
def test_pattern_of_moves_is_exact(name):
    function, x = JACOBIANS[name]
    found = chainrule.jacobian(function, layout="sparse_coo")(x)
    expected = torch.func.jacrev(function)(x).to_sparse().coalesce()
    assert torch.equal(found.indices(), expected.indices())


def differences(function, x, step=1e-5):
    """Central differences, column by column."""
    columns = []
    for number in range(x.numel()):
        shift = torch.zeros(x.numel(), dtype=x.dtype)
        shift[number] = step
        shift = shift.reshape(x.shape)
        columns.append((function(x + shift) - function(x - shift)).reshape(-1) / (2 * step))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("name", ["brusselator", "upwind", "graph twice", "recurrence", "conv of conv", "columns", "written", "block coupled"])
def test_against_differences(name):
    function, x = JACOBIANS[name]
    found = chainrule.jacobian(function, layout="sparse_csr")(x).to_dense()
    # Truncation of order step² times third derivatives, and rounding of order 1e-16 / step, on values below 100.
    torch.testing.assert_close(found, differences(function, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", HESSIANS)
def test_hessian(name):
    function, x = HESSIANS[name]
    size = x.numel()
    for point in (x, fresh(x), x):
        expected = torch.func.hessian(function)(point)
        found = chainrule.hessian(function, layout="sparse_coo")(point)
        assert found.shape == expected.shape
        well_formed(found)
        torch.testing.assert_close(found.to_dense(), expected, **TOLERANCE)
        blocks = expected.reshape(expected.numel() // max(size * size, 1), size, size)
        for triangular, part in (("lower", blocks.tril()), ("upper", blocks.triu())):
            half = chainrule.hessian(function, layout="sparse_coo", triangular=triangular)(point)
            well_formed(half)
            torch.testing.assert_close(half.to_dense().reshape(part.shape), part, **TOLERANCE)
    rows = chainrule.hessian(function, layout="sparse_csr")(x)
    torch.testing.assert_close(rows.to_dense(), expected.reshape(rows.shape), **TOLERANCE)


def test_tight_patterns():
    for name, count in (("brusselator", 2 * 20 * 6), ("periodic 2-D", 30 * 5), ("tridiagonal", 7 * 3), ("clamped 2-D", 20 * 5 - 18)):
        function, x = JACOBIANS[name]
        assert chainrule.jacobian(function, layout="sparse_coo")(x)._nnz() == count
    function, x = HESSIANS["rosenbrock"]
    assert chainrule.hessian(function, layout="sparse_coo")(x)._nnz() == 3 * 9 - 2


# Random programs of moves and element-wise functions.


@st.composite
def programs(draw):
    size = draw(st.integers(1, 6))
    shape = draw(st.sampled_from([(size,), (size, 2), (3, size)]))
    steps = draw(st.lists(st.tuples(st.integers(0, 13), st.integers(0, 2**16)), min_size=1, max_size=5))
    return shape, steps


def run(program, x):
    _, steps = program
    for kind, seed in steps:
        random = numpy.random.default_rng(seed)
        length = x.shape[0]
        index = torch.tensor(random.integers(0, length, random.integers(1, 6)))
        if kind == 0:
            x = x.roll(seed % 3, seed % x.dim())
        elif kind == 1:
            x = x[index]
        elif kind == 2:
            x = torch.zeros((length + 1, *x.shape[1:]), dtype=x.dtype).index_add(0, torch.tensor(random.integers(0, length, length)), x)
        elif kind == 3:
            x = x * x.flip(0)
        elif kind == 4:
            x = torch.cat([x, x[: 1 + seed % length]])
        elif kind == 5:
            x = torch.where(x > 0, x.sin(), x**2)
        elif kind == 6:
            x = torch.nn.functional.pad(x, (seed % 2, (seed >> 1) % 2))
        elif kind == 7:
            x = x.reshape(-1)
        elif kind == 8:
            x = x[::2] * x[:1]
        elif kind == 9:
            x = x.clone()
            x[torch.tensor(random.random(tuple(x.shape)) > 0.6)] = 0
        elif kind == 10:
            ends = torch.tensor(random.integers(0, length, (2, 5)))
            x = torch.zeros_like(x).index_add(0, ends[0], x[ends[0]] - 2 * x[ends[1]])
        elif kind == 11:
            y = x.roll(1, 0) - x
            y[0] = x[-1] ** 2
            y[-1] = 0
            x = y
        elif kind == 12:
            x = torch.where(torch.tensor(random.random(tuple(x.shape)) > 0.5), x.roll(1, 0), x**2)
        else:
            x = x.cumprod(seed % x.dim())
    return x


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(programs(), st.integers(0, 2**16))
def test_random_programs(program, seed):
    x = torch.rand(program[0], dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.1
    function = lambda y: run(program, y)  # noqa: E731
    expected = torch.func.jacrev(function)(x)
    found = chainrule.jacobian(function, layout="sparse_coo")(x)
    well_formed(found)
    torch.testing.assert_close(found.to_dense(), expected, **TOLERANCE)
    matrix, jacobian = expected.reshape(-1, x.numel()), chainrule.linear_map(function, x)
    torch.testing.assert_close(jacobian.gram().sparse(flat=True).to_dense(), matrix @ matrix.T, **TOLERANCE)
    torch.testing.assert_close(jacobian.normal().diagonal().reshape(-1), (matrix.T @ matrix).diagonal(), **TOLERANCE)
    torch.testing.assert_close(jacobian.norm(), matrix.norm(), **TOLERANCE)
    loss = lambda y: (run(program, y) ** 2).sum()  # noqa: E731
    curvature = chainrule.hessian(loss, layout="sparse_coo")(x)
    torch.testing.assert_close(curvature.to_dense(), torch.func.hessian(loss)(x), **TOLERANCE)


# What plans depend on.


def test_plan_follows_the_values_of_index_tensors():
    index = torch.tensor([0, 2, 1])
    function = lambda x: x[index] * x  # noqa: E731
    sparse = chainrule.jacobian(function, layout="sparse_coo")
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    for values in ([0, 2, 1], [1, 1, 1], [2, 0, 1], [0, 2, 1]):
        index.numpy()[:] = values  # behind torch's back: no version counts it
        torch.testing.assert_close(sparse(x).to_dense(), torch.func.jacrev(function)(x))


def test_plan_follows_what_sort_selects():
    function = lambda x: x.sort().values * x  # noqa: E731
    sparse = chainrule.jacobian(function, layout="sparse_coo")
    for seed in range(6):
        x = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(sparse(x).to_dense(), torch.func.jacrev(function)(x))


def test_plan_follows_strides():
    function = lambda x: x.as_strided((2, 2), (1, 2)) ** 2  # noqa: E731
    sparse = chainrule.jacobian(lambda x: function(x * 1.0), layout="sparse_coo")
    x = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(sparse(x).to_dense(), torch.func.jacrev(lambda y: function(y * 1.0))(x))
    other = torch.randn(3, 2, dtype=torch.float64).t()
    torch.testing.assert_close(sparse(other).to_dense(), chainrule.jacobian(lambda y: function(y * 1.0))(other))


def test_masks_are_values():
    """A branch by `where` changes values, not the pattern: both sides are in it."""
    function = lambda x: torch.where(x > 0, x.roll(1), x.roll(-1) * x)  # noqa: E731
    sparse = chainrule.jacobian(function, layout="sparse_coo")
    one, two = (torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert torch.equal(sparse(one).indices(), sparse(two).indices())


# Structures.


def test_trees_and_argnums():
    def function(a, b):
        return {"p": a["x"] * b, "q": [b.sum(), a["y"][:, None] * b]}, "aux"

    a = {"x": torch.randn(3, dtype=torch.float64), "y": torch.randn(2, dtype=torch.float64)}
    b = torch.randn(3, dtype=torch.float64)
    expected, _ = torch.func.jacrev(lambda a, b: (function(a, b)[0], b), (0, 1), has_aux=True)(a, b)
    found, aux = chainrule.jacobian(function, (0, 1), has_aux=True, layout="sparse_coo")(a, b)
    assert aux == "aux"
    flat, spec = torch.utils._pytree.tree_flatten(found)
    wanted, other = torch.utils._pytree.tree_flatten(expected)
    assert spec == other
    for one, two in zip(flat, wanted, strict=True):
        well_formed(one)
        torch.testing.assert_close(one.to_dense(), two, **TOLERANCE)


def test_hessian_of_two_arguments():
    function = lambda a, b: (a[:, None] * b[None]).sin().sum() + (a**3).sum()  # noqa: E731
    a, b = torch.randn(3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    expected = torch.func.hessian(function, (0, 1))(a, b)
    found = chainrule.hessian(function, (0, 1), layout="sparse_coo")(a, b)
    lower = chainrule.hessian(function, (0, 1), layout="sparse_coo", triangular="lower")(a, b)
    for i in range(2):
        for j in range(2):
            torch.testing.assert_close(found[i][j].to_dense(), expected[i][j], **TOLERANCE)
            part = expected[i][j] if i > j else expected[i][j].tril() if i == j else 0 * expected[i][j]
            torch.testing.assert_close(lower[i][j].to_dense(), part, **TOLERANCE)


def chosen_for(function, *args, argnums=0):
    return chainrule.explain(chainrule.hessian(function, argnums, layout="sparse_coo"))(*args).accounts[-1]


def test_one_triangle_is_computed():
    """Of a symmetric Hessian the upper triangle is read from the lower one; the result is symmetric to the last bit."""
    x = torch.randn(40, dtype=torch.float64)
    account = chosen_for(rosenbrock, x)
    assert account.chosen.endswith("one triangle")
    whole = next(a for a in account.alternatives if a["order"] + ", one triangle" == account.chosen)
    assert next(a for a in account.alternatives if a["order"] == account.chosen)["cost"] < whole["cost"]
    found = chainrule.hessian(rosenbrock, layout="sparse_coo")(x).to_dense()
    assert torch.equal(found, found.T)


def test_blocks_of_a_symmetric_hessian_are_computed_once():
    """Blocks (i, j) and (j, i) of three arguments; one argument has no curvature, one is passed twice."""
    a, b, c = (torch.randn(n, dtype=torch.float64) for n in (4, 5, 3))
    function = lambda a, b, c: (a[:, None] * b.exp()).sum() + (c * a[:3] ** 2).sum() + b.prod()  # noqa: E731
    expected = torch.func.hessian(function, (2, 0, 1))(a, b, c)
    assert chosen_for(function, a, b, c, argnums=(2, 0, 1)).chosen.endswith("one triangle")
    for _ in range(2):
        found = chainrule.hessian(function, (2, 0, 1), layout="sparse_coo")(a, b, c)
        for i in range(3):
            for j in range(3):
                well_formed(found[i][j])
                torch.testing.assert_close(found[i][j].to_dense(), expected[i][j], **TOLERANCE)
                assert torch.equal(found[i][j].to_dense(), found[j][i].to_dense().T)
    both = lambda a, b: (a * b[0]).sin().sum() + (a + b).pow(3).sum()  # noqa: E731
    expected = torch.func.hessian(both, (0, 1))(a, a)
    found = chainrule.hessian(both, (0, 1), layout="sparse_coo")(a, a)
    for i in range(2):
        for j in range(2):
            torch.testing.assert_close(found[i][j].to_dense(), expected[i][j], **TOLERANCE)


class Bent(torch.autograd.Function):
    """A user's derivative that is no gradient: its own derivative is not symmetric."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        return cotangent * x.roll(1) ** 2


def test_hessians_that_are_not_symmetric_are_computed_whole():
    def blocked(x):
        with torch.no_grad():
            fixed = x.roll(1) ** 2
        return (fixed * x).sum()

    x = torch.randn(5, dtype=torch.float64)
    for function in (lambda x: Bent.apply(x).sum(), blocked):
        dense = chainrule.hessian(function)(x)
        assert not torch.equal(dense, dense.T)
        found = chainrule.hessian(function, layout="sparse_coo")(x).to_dense()
        torch.testing.assert_close(found, dense)
    torch.testing.assert_close(chainrule.hessian(blocked)(x), torch.func.hessian(blocked)(x))
    with pytest.raises(RuntimeError, match="runs under no_grad"):
        chainrule.hessian(lambda x: blocked(x)[None], layout="sparse_coo")(x)


def blocked_pair(x, y):
    with torch.no_grad():
        fixed = x.roll(1)
    return ((x + y) ** 2 * fixed).sum() + (y[1:] * fixed[:-1] ** 2).sum()


def equal_gradients(x, y):
    """One value is the gradient by both arguments."""
    with torch.no_grad():
        fixed = (x * 2).sum()
    return ((x + y) ** 3).sum() + 0 * fixed


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
@pytest.mark.parametrize("function", [blocked_pair, equal_gradients])
def test_triangles_of_hessians_that_are_not_symmetric(function, layout):
    for seed in range(4):
        x, y = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for argnums in (0, 1, (0, 1), (1, 0)):
            whole = torch.func.hessian(function, argnums)(x, y)
            for triangular, cut in (("lower", torch.tril), ("upper", torch.triu)):
                transform = chainrule.hessian(lambda *a: (function(*a), 3), argnums, has_aux=True, layout=layout, triangular=triangular)
                found, aux = transform(x, y)
                assert aux == 3
                if isinstance(argnums, int):
                    torch.testing.assert_close(found.to_dense(), cut(whole))
                    continue
                for row in range(2):
                    for column in range(2):
                        block = found[row][column]
                        if row == column:
                            torch.testing.assert_close(block.to_dense(), cut(whole[row][column]))
                        elif (row > column) == (triangular == "lower"):
                            torch.testing.assert_close(block.to_dense(), whole[row][column])
                        else:
                            assert block.values().numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype(dtype):
    x = torch.randn(5, dtype=dtype)
    function = lambda y: y.roll(1) * y  # noqa: E731
    assert chainrule.jacobian(function, layout="sparse_csr")(x).dtype == dtype


def test_results_do_not_share_memory():
    function = lambda x: x * torch.arange(4.0)  # noqa: E731
    sparse = chainrule.jacobian(function, layout="sparse_coo")
    first, second = sparse(torch.ones(4)), sparse(torch.ones(4))
    first.values().zero_()
    assert second.values().sum() == 6
    assert sparse(torch.ones(4)).values().sum() == 6
    x = torch.ones(4)
    squared = chainrule.jacobian(lambda y: 0.5 * y * y, layout="sparse_coo")(x)
    squared.values().zero_()
    assert x.sum() == 4


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x[0] * x[1:]).sin().sum(),
        lambda x: torch.stack([a * b for a, b in zip(*x.view(2, -1).unbind(0), strict=True)]).cos().sum(),
        lambda x: torch.select_scatter(x.sin(), x[1] ** 2, 0, 3).prod(),
        lambda x: torch.slice_scatter(x.sin(), x[:2] ** 2, 0, 1, 5, 2).prod(),
        lambda x: (x.repeat(2) ** 3).index_select(0, torch.tensor([0, 5, 5])).prod(),
    ],
    ids=["select", "unbind", "select_scatter", "slice_scatter", "repeat"],
)
def test_hessian_is_planned_once(function, monkeypatch):
    planned = []
    for module in (transforms_sparse, execute_sparse):
        plan = module.plan_sparse
        monkeypatch.setattr(module, "plan_sparse", lambda *args, plan=plan, **options: planned.append(args) or plan(*args, **options))
    hessian = chainrule.hessian(function, layout="sparse_coo")
    hessian(torch.randn(6, dtype=torch.float64))
    assert planned
    planned.clear()
    for _ in range(2):
        x = torch.randn(6, dtype=torch.float64)
        torch.testing.assert_close(hessian(x).to_dense(), torch.func.hessian(function)(x), **TOLERANCE)
    assert not planned


def test_values_carry_a_graph():
    x = torch.randn(6, dtype=torch.float64, requires_grad=True)
    function = lambda y: y.roll(1) * y**2  # noqa: E731
    found = chainrule.jacobian(function, layout="sparse_coo")(x)
    (found.to_dense() ** 2).sum().backward()
    (expected,) = torch.autograd.grad((torch.func.jacrev(function)(x) ** 2).sum(), x)
    torch.testing.assert_close(x.grad, expected, **TOLERANCE)


SPARSE_INSIDE = {
    "sparse_coo": (chainrule.jacobian(lambda y: y**3, layout="sparse_coo"), "layout='dense'"),
    "sparse_csr": (chainrule.jacobian(lambda y: y**3, layout="sparse_csr"), "layout='dense'"),
    "hessian": (chainrule.hessian(lambda y: (y**3).sum(), layout="sparse_coo"), "layout='dense'"),
    "map": (lambda x: chainrule.linear_map(lambda y: y**3, x).sparse(), r"dense\(\)"),
    "hessian map": (lambda x: chainrule.hessian(lambda y: (y**3).sum(), layout="operator")(x).sparse(), r"dense\(\)"),
}

DIFFERENTIATED = {
    "grad": lambda f, x: chainrule.grad(f)(x),
    "vjp": lambda f, x: chainrule.vjp(f, x)[1](torch.ones(())),
    "jvp": lambda f, x: chainrule.jvp(f, (x,), (x,)),
    "linearize": lambda f, x: chainrule.linearize(f, x),
    "jacobian": lambda f, x: chainrule.jacobian(f)(x),
    "jacfwd": lambda f, x: chainrule.jacfwd(f)(x),
    "jacrev": lambda f, x: chainrule.jacrev(f)(x),
    "sparse jacobian": lambda f, x: chainrule.jacobian(f, layout="sparse_coo")(x),
    "hessian": lambda f, x: chainrule.hessian(f)(x),
    "linear_map": lambda f, x: chainrule.linear_map(f, x),
    "grad of vmap": lambda f, x: chainrule.grad(lambda y: chainrule.vmap(f)(y[None]).sum())(x),
    "vmap of grad": lambda f, x: chainrule.vmap(chainrule.grad(f))(x[None]),
}


@pytest.mark.parametrize("inner", SPARSE_INSIDE)
@pytest.mark.parametrize("outer", DIFFERENTIATED)
def test_derivative_of_a_sparse_result_is_refused(outer, inner):
    """Each time, not only when plans are made; the message says what to do."""
    make, advice = SPARSE_INSIDE[inner]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"inside of a function that is differentiated.* Use {advice} there, or make"):
            DIFFERENTIATED[outer](lambda x: make(x).to_dense().sum(), torch.randn(3))


@pytest.mark.parametrize("inner", SPARSE_INSIDE)
def test_vmap_of_a_sparse_result(inner):
    make, _ = SPARSE_INSIDE[inner]
    batch = torch.randn(4, 3, dtype=torch.float64)
    expected = torch.diag_embed(6 * batch if inner.startswith("hessian") else 3 * batch**2)
    torch.testing.assert_close(chainrule.vmap(make)(batch).to_dense(), expected)


def test_sparse_inside_of_a_function_that_does_not_depend_on_it():
    def function(x):
        fixed = chainrule.jacobian(lambda y: y**2, layout="sparse_coo")(torch.ones(3)).to_dense()
        return fixed @ x

    torch.testing.assert_close(chainrule.jacobian(function)(torch.randn(3)), 2 * torch.eye(3))


def test_jacobian_of_a_gradient():
    function, x = HESSIANS["rosenbrock"]
    found = chainrule.jacobian(chainrule.grad(function), layout="sparse_coo")(x)
    torch.testing.assert_close(found.to_dense(), torch.func.hessian(function)(x), **TOLERANCE)


@pytest.mark.parametrize("transform", ["jacobian", "jacfwd", "jacrev", "hessian"])
def test_errors(transform):
    make = getattr(chainrule, transform)
    with pytest.raises(ValueError, match="layout should be one of"):
        make(torch.sin, layout="sparse")
    with pytest.raises(ValueError, match="for layout='dense'"):
        make(torch.sin, layout="sparse_coo", chunk_size=2)
    with pytest.raises(RuntimeError, match="real"):
        make(lambda x: x.real.sum(), layout="sparse_coo")(torch.ones(2, dtype=torch.complex64))


def test_complex_values_are_refused():
    function = lambda x: torch.fft.rfft(x).abs()  # noqa: E731
    with pytest.raises(RuntimeError, match="complex values between"):
        chainrule.jacobian(function, layout="sparse_coo")(torch.randn(5))
    with pytest.raises(RuntimeError, match="complex values between"):
        chainrule.hessian(lambda x: function(x).sum(), layout="sparse_coo")(torch.randn(5))
    assert len(chainrule.sparsity(function, torch.randn(5))) == 15


def test_ops_without_structure():
    for function in (lambda x: torch.linalg.svdvals(x.reshape(2, 3)), lambda x: torch.linalg.det(x[:4].reshape(2, 2))):
        x = torch.randn(6, dtype=torch.float64)
        found = chainrule.jacobian(function, layout="sparse_coo")(x)
        torch.testing.assert_close(found.to_dense(), torch.func.jacrev(function)(x), **TOLERANCE)


def test_hessian_values_carry_a_graph():
    x = torch.randn(6, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        x.grad = None
        (chainrule.hessian(rosenbrock, layout="sparse_coo")(x).to_dense() ** 2).sum().backward()
        (expected,) = torch.autograd.grad((torch.func.hessian(rosenbrock)(x) ** 2).sum(), x)
        torch.testing.assert_close(x.grad, expected, **TOLERANCE)
    with torch.no_grad():
        assert not chainrule.hessian(rosenbrock, layout="sparse_coo")(x).requires_grad


def test_compile():
    function = lambda x: x.roll(1) * x**2  # noqa: E731
    compiled = chainrule.compile(chainrule.jacobian(function, layout="sparse_csr"))
    for seed in range(3):
        x = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(compiled(x).to_dense(), torch.func.jacrev(function)(x), **TOLERANCE)


def test_triangular_errors():
    with pytest.raises(ValueError, match="triangular should be"):
        chainrule.hessian(torch.sum, layout="sparse_coo", triangular="low")
    with pytest.raises(ValueError, match="for the sparse layouts"):
        chainrule.hessian(torch.sum, triangular="lower")


# Sizes.


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


@pytest.mark.parametrize("size", [1000, 10_000])
def test_no_temporary_of_dense_size(size):
    """Of a matrix of size × size with 3 (or 5) entries per row, a few vectors of entries are held at a time."""
    x = torch.randn(size, dtype=torch.float64)
    field = torch.randn(size // 10, 10, dtype=torch.float64)
    function, _ = JACOBIANS["periodic 2-D"]
    for sparse, point, each in (
        (chainrule.hessian(rosenbrock, layout="sparse_coo"), x, 3),
        (chainrule.jacobian(lambda u: function(u.sin()) * u, layout="sparse_csr"), field, 5),
    ):
        for _ in range(2):
            with watching() as watch:
                sparse(point)
        # Values of the run (some 20 vectors of inputs), values of the terms, their concatenation, the result.
        assert watch.peak < (20 + 4 * each) * 8 * size


def test_entries_grow_with_the_size_only():
    counts = []
    for size in (200, 400):
        account = chainrule.explain(chainrule.hessian(rosenbrock, layout="sparse_coo"))(torch.randn(size, dtype=torch.float64))
        assert account.accounts[-1].kind == "sparse"
        counts.append((account.accounts[-1].alternatives[0]["bytes"], len(account.accounts[-1].calls)))
    # Twice the size: the same calls on twice the elements.
    assert counts[1][0] <= 2.01 * counts[0][0]
    assert counts[1][1] == counts[0][1]


def test_explain_says_what_is_dense():
    matrix = torch.randn(4, 5, dtype=torch.float64)
    x = torch.randn(5, dtype=torch.float64)
    text = str(chainrule.explain(chainrule.jacobian(lambda y: matrix @ y, layout="sparse_coo"))(x))
    assert "block 4 × 5: 20 entries, structurally dense" in text
    text = str(chainrule.explain(chainrule.jacobian(lambda y: y * y.roll(1), layout="sparse_coo"))(x))
    assert "block 5 × 5: 10 entries, 40 % of the places" in text


# Under vmap.


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
def test_vmap(layout):
    index = torch.tensor([1, 0, 3, 2, 2])
    batch = torch.randn(4, 5, dtype=torch.float64)
    for function in (lambda x: x.roll(1) * x**2, lambda x: x[index] ** 2, lambda x: 2 * x, lambda x: x.sign()):
        transformed = chainrule.vmap(chainrule.jacobian(function, layout=layout))
        expected = torch.func.vmap(torch.func.jacrev(function))(batch)
        for _ in range(3):
            found = transformed(batch)
            assert found.shape == (4, 5, 5)
            torch.testing.assert_close(found.to_dense(), expected, **TOLERANCE)
    found = chainrule.vmap(chainrule.hessian(rosenbrock, layout=layout))(batch)
    torch.testing.assert_close(found.to_dense(), torch.func.vmap(torch.func.hessian(rosenbrock))(batch), **TOLERANCE)


def test_vmap_errors():
    batch = torch.randn(4, 5)
    with pytest.raises(RuntimeError, match="must be the same for all samples"):
        chainrule.vmap(chainrule.jacobian(lambda x: x.sort().values, layout="sparse_coo"))(batch)
    with pytest.raises(RuntimeError, match="not under nested ones"):
        chainrule.vmap(chainrule.vmap(chainrule.jacobian(torch.sin, layout="sparse_coo")))(batch[None])
