"""Zeros that are known before the run: overwritten and masked places, constants, and what stands in padded values."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import chainrule
from chainrule.execute.engine import CACHE
from chainrule.maps.nonzeros import _turn_of

DOUBLE = torch.float64
#: Sums of at most a few hundred products of numbers of size below about 100, in float64.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}

GENERATOR = torch.Generator().manual_seed(3)
MASK = torch.tensor([1, 0, 1, 0, 0, 1, 0, 0], dtype=torch.bool)
PLACES = torch.tensor([0, 3])
GROUPS = torch.tensor([0, 1, 0, 2, 1, 2, 2, 0])
MATRIX = torch.randn(4, 4, dtype=DOUBLE, generator=GENERATOR)
SPARSE = (torch.rand(6, 6, dtype=DOUBLE, generator=GENERATOR) * (torch.rand(6, 6, generator=GENERATOR) < 0.3)).to_sparse()
CROSS = torch.tensor([[0, 1.0, 0], [1, -4, 1], [0, 1, 0]], dtype=DOUBLE)[None, None]


def boundary(u):
    y = u.roll(1) + u.roll(-1) - 2 * u
    y[0] = 0
    y[-1] = u[-1] - 1.0
    return y


def boundary_of_a_square(u):
    y = u.roll(1, 0) + u.roll(-1, 0) + u.roll(1, 1) + u.roll(-1, 1) - 4 * u
    y[0] = 0
    y[-1] = 0
    y[:, 0] = u[:, 0]
    y[:, -1] = 0
    return y


def by_mask(u, mask=MASK, value=0.0):
    y = u.roll(1) + u.roll(-1) - 2 * u
    y[mask] = value
    return y


def kept_by_mask(u):
    y = u.roll(1) + u.roll(-1) - 2 * u
    y[MASK] = u[MASK] - 3
    return y


def written_before(u):
    u = u.clone()
    u[0] = 0
    u[-1] = u[-2]
    return u[2:] + u[:-2] - 2 * u[1:-1]


def by_elements(u):
    y = torch.zeros_like(u)
    for i in range(1, 5):
        y[i] = u[i - 1] - 2 * u[i] + u[i + 1]
    y[0] = u[0]
    return y


def extrema(x, reduce="amax"):
    return torch.zeros(3, dtype=DOUBLE).scatter_reduce(0, GROUPS, x, reduce, include_self=False)


#: Functions whose Jacobians' patterns are those of the non-zeros at a random point, and the shape of the input.
EXACT = {
    "boundary": (boundary, 8),
    "boundary of a square": (boundary_of_a_square, (4, 5)),
    "mask": (by_mask, 8),
    "kept by a mask": (kept_by_mask, 8),
    "written before": (written_before, 8),
    "by elements": (by_elements, 8),
    "slice_scatter": (lambda x: x.slice_scatter(x[:3] * 2, 0, 2, 5), 8),
    "slice_scatter of a constant": (lambda x: x.slice_scatter(torch.zeros(3, dtype=DOUBLE), 0, 2, 5), 8),
    "select_scatter": (lambda x: x.select_scatter(x[0] * 2, 0, 2), (4, 3)),
    "diagonal_scatter": (lambda x: x.diagonal_scatter(x[0]), (4, 4)),
    "index_copy": (lambda x: x.index_copy(0, PLACES, x[1:3] ** 2), 8),
    "index_put": (lambda x: x.index_put((PLACES,), x[1:3] ** 2), 8),
    "index_put by a mask": (lambda x: x.index_put((MASK,), x[1:4] ** 2), 8),
    "index_fill": (lambda x: x.index_fill(0, PLACES, 1.0), 8),
    "scatter": (lambda x: x.scatter(0, PLACES, x[1:3] * 3), 8),
    "put": (lambda x: x.put(PLACES, x[1:3] * 2), 8),
    "masked_fill": (lambda x: (x.roll(1) - x).masked_fill(MASK, 0.0), 8),
    "masked_scatter": (lambda x: x.masked_scatter(MASK, x[1:5] * 2), 8),
    "where": (lambda x: torch.where(MASK, x.roll(1), x.roll(-1) * x), 8),
    "product with a mask": (lambda x: x.roll(1) * MASK, 8),
    "product with numbers": (lambda x: x.roll(1) * MASK.to(DOUBLE), 8),
    "tril": (lambda x: x.tril() * 2, (4, 4)),
    "triu": (lambda x: x.triu(1).sin(), (4, 4)),
    "cumprod": (lambda x: x.cumprod(0), 6),
    "diag": (lambda x: torch.diag(x) @ MATRIX, 4),
    "two diagonal matrices": (lambda x: torch.diag(x) @ torch.diag(x**2), 4),
    "kron": (lambda x: torch.kron(x, torch.eye(2, dtype=DOUBLE)), (2, 2)),
    "masked operand": (lambda x: x.masked_fill(MASK, 0) * x.roll(1), 8),
    "operand filled at places": (lambda x: x.index_fill(0, PLACES, 0.0) * x.roll(1), 8),
    "operand of where": (lambda x: torch.where(MASK, x.roll(2), 0.0) * x.roll(1), 8),
    "operand beside zeros": (lambda x: torch.cat([x[:5], x.new_zeros(3)]) * x.roll(1), 8),
    "interleaved with zeros": (lambda x: torch.stack([x, x.new_zeros(8)], 1).reshape(-1) * torch.cat([x, x.roll(1)]), 8),
    "scattered operand": (lambda x: x.new_zeros(8).scatter(0, PLACES, x[1:3]) * x.roll(1), 8),
    "accumulated operand": (lambda x: x.new_zeros(8).index_put((PLACES,), x[1:3], accumulate=True) * x.roll(1), 8),
    "summed operand": (lambda x: x.new_zeros(8).index_add(0, GROUPS, x)[:4] * x[2:6], 8),
    "blocks": (lambda x: torch.block_diag(x[:4].reshape(2, 2), x[4:].reshape(2, 2)) @ x[:4], 8),
    "product of blocks": (lambda x: torch.block_diag(x[:4].reshape(2, 2), x[4:].reshape(2, 2)).matrix_power(2), 8),
    "zeros read by an index": (lambda x: x.masked_fill(MASK, 0)[GROUPS] * x.roll(1), 8),
    "zeros in parts": (lambda x: x.masked_fill(MASK, 0).split(4)[1] * x[:4], 8),
    "difference of what is zero": (lambda x: (x.masked_fill(MASK, 0) - 2 * x.roll(1).masked_fill(MASK, 0)) * x.roll(3), 8),
    "quotient of masked values": (lambda x: (x * MASK) / (x.roll(1) * MASK + 1), 8),
    "masked numerator": (lambda x: x.masked_fill(MASK, 0) / (x.roll(1) + 1), 8),
    "masked numerator over a sum": (lambda x: (x * MASK) / (1 + (x * MASK).dot(x * MASK)), 8),
    "masked denominator": (lambda x: x.roll(2) / (x * MASK + 1), 8),
    "square of a masked value": (lambda x: x.masked_fill(MASK, 0) ** 2 * x.roll(2), 8),
    "cube of a masked value": (lambda x: (x * MASK).pow(3) * x.roll(2), 8),
    "addcmul": (lambda x: torch.addcmul(x * MASK, x * MASK, x.roll(1)), 8),
    "addcmul of a column": (lambda x: torch.addcmul(x, x[:, :1] * MASK[:4, None], x), (4, 3)),
    "addcdiv": (lambda x: torch.addcdiv(x * MASK, x * MASK, x.roll(1)), 8),
    "sum with a number": (lambda x: (x.masked_fill(MASK, 0) - 1) * x.roll(3), 8),
    "kernel": (lambda x: F.conv2d(x[None, None], CROSS), (5, 5)),
    "sparse.mm": (lambda x: torch.sparse.mm(SPARSE, x.reshape(6, 2)), 12),
    "sparse @": (lambda x: SPARSE @ x, 6),
    "@ sparse": (lambda x: x @ SPARSE, 6),
    "csr @": (lambda x: SPARSE.to_sparse_csr() @ x.sin(), 6),
    "csc @": (lambda x: SPARSE.to_sparse_csc() @ x[:, None], 6),
}

#: The same of Hessians.
EXACT_HESSIANS = {
    "products of slices": (lambda x: sum(x[i - 1 : i + 1].prod() for i in range(1, 6)), 6),
    "longer products of slices": (lambda x: sum(x[i - 1 : i + 2].prod() for i in range(1, 6)), 8),
    "windows": (lambda x: x.unfold(0, 3, 1).prod(-1).sum(), 8),
    "squares of slices": (lambda x: sum((x[i : i + 2] ** 2).sum() ** 2 for i in range(5)), 6),
    "boundary": (lambda x: (boundary(x) ** 4).sum(), 8),
    "mask": (lambda x: (by_mask(x) ** 4).sum(), 8),
    "selected": (lambda x: (x.roll(1) * x)[MASK].sum(), 8),
    "where": (lambda x: torch.where(MASK, x**2 * x.roll(1), x**3).sum(), 8),
    "tril": (lambda x: (x.tril() ** 3).sum(), (3, 3)),
    "masked operand": (lambda x: (x.masked_fill(MASK, 0) * x.roll(1)).square().sum(), 8),
    "blocks": (lambda x: (torch.block_diag(x[:4].reshape(2, 2), x[4:].reshape(2, 2)) @ x[:4]).pow(3).sum(), 8),
    "accumulated": (lambda x: (x.new_zeros(8).index_put((PLACES,), x[1:3], accumulate=True) * x.roll(1)).pow(2).sum(), 8),
    "circular": (lambda x: (F.conv2d(F.pad(x[None, None], (1, 1, 1, 1), mode="circular"), CROSS).tanh() ** 2).sum(), (5, 6)),
    "quotients": (lambda x: ((x * MASK) / (x.roll(1) * MASK + 1)).square().sum(), 8),
    "masked numerator": (lambda x: (x.masked_fill(MASK, 0) / (x.roll(1) + 1)).pow(2).sum(), 8),
    "sparse energy": (lambda x: (SPARSE @ x).pow(3).sum(), 6),
}


def point(shape, seed=0):
    return torch.rand(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)) + 0.3


def dense(function, x):
    """The Jacobian by single cotangents: sparse products have no rule in torch.func's vmap."""
    return torch.autograd.functional.jacobian(function, x)


@pytest.mark.parametrize("name", EXACT)
def test_jacobian(name):
    function, shape = EXACT[name]
    for seed in range(2):
        x = point(shape, seed)
        expected = dense(function, x)
        found = chainrule.jacobian(function, layout="sparse_coo")(x)
        torch.testing.assert_close(found.to_dense(), expected, **CLOSE)
        torch.testing.assert_close(chainrule.jacobian(function)(x), expected, **CLOSE)
        torch.testing.assert_close(chainrule.jacfwd(function)(x), expected, **CLOSE)
        assert torch.equal(found.indices(), expected.to_sparse().coalesce().indices())


@pytest.mark.parametrize("reduce", ["amax", "amin"])
def test_scattered_extrema(reduce):
    """The extremum of each place, whatever was chosen in the calls before."""
    function = lambda x: extrema(x, reduce)  # noqa: E731
    chainrule.execute.engine.CACHE.clear()
    for seed in range(6):
        x = point(8, seed)
        found, expected = chainrule.jacobian(function, layout="sparse_coo")(x), dense(function, x)
        torch.testing.assert_close(found.to_dense(), expected, **CLOSE)
        assert torch.equal(found.indices(), expected.to_sparse().indices())


@pytest.mark.parametrize("name", EXACT_HESSIANS)
def test_hessian(name):
    function, shape = EXACT_HESSIANS[name]
    x = point(shape)
    expected = torch.autograd.functional.hessian(function, x)
    found = chainrule.hessian(function, layout="sparse_coo")(x)
    torch.testing.assert_close(found.to_dense(), expected, **CLOSE)
    # Rounding leaves numbers of 1e-16 in the oracle where terms cancel.
    assert found._nnz() == int((expected.abs() > 1e-13).sum())


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_other_masks_are_other_patterns(layout):
    """Whatever masks come, values are right; masks that change all the time become values."""
    sparse = chainrule.jacobian(lambda u, m: by_mask(u, m, u[0]), layout=layout)
    mask = MASK.clone()
    counts = []
    for seed in range(6):
        mask.numpy()[:] = torch.rand(8, generator=torch.Generator().manual_seed(seed)).numpy() > 0.5  # behind torch's back
        x = point(8, seed)
        expected = torch.func.jacrev(lambda u: by_mask(u, mask, u[0]))(x)  # noqa: B023 - called at once
        found = sparse(x, mask)
        torch.testing.assert_close(found.to_dense(), expected, **CLOSE)
        counts.append(found._nnz())
    assert counts[-1] == counts[-2] == 8 * 3 + 8 - 3  # everything that some mask could leave


def test_constants_of_floating_point():
    """Zeros of a constant are used as long as it is one, and nobody differentiates with respect to it."""
    weight = MASK.to(DOUBLE)
    function = lambda x, w: x.roll(1) * w  # noqa: E731
    sparse = chainrule.jacobian(function, layout="sparse_coo")
    x = point(8)
    assert sparse(x, weight)._nnz() == 3
    tracked = weight.clone().requires_grad_()
    found = sparse(x, tracked)
    assert found._nnz() == 8
    (gradient,) = torch.autograd.grad(found.to_dense().sum(), tracked)
    torch.testing.assert_close(gradient, torch.ones(8, dtype=DOUBLE), **CLOSE)
    total = lambda w: chainrule.linear_map(lambda y: function(y, w), x).sparse(flat=True).to_dense().sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="inside of a function that is differentiated"):
        chainrule.grad(total)(weight)
    torch.testing.assert_close(sparse(x, weight + 1).to_dense(), torch.func.jacrev(function)(x, weight + 1), **CLOSE)


def test_masks_of_the_inputs_are_values():
    function = lambda x: torch.where((x > 0.8) & MASK, x.roll(1), x)  # noqa: E731
    sparse = chainrule.jacobian(function, layout="sparse_coo")
    for seed in range(3):
        x = point(8, seed)
        assert sparse(x)._nnz() == 16
        torch.testing.assert_close(sparse(x).to_dense(), torch.func.jacrev(function)(x), **CLOSE)


def test_masks_under_vmap():
    """A mask for all samples is used; one for each is not."""
    x = torch.stack([point(8, seed) for seed in range(3)])
    masks = torch.stack([MASK, ~MASK, MASK])
    own = chainrule.vmap(chainrule.jacobian(by_mask, layout="sparse_coo"))(x, masks)
    shared = chainrule.vmap(chainrule.jacobian(by_mask, layout="sparse_coo"))(x)
    for number in range(3):
        expected = torch.func.jacrev(by_mask)(x[number])
        torch.testing.assert_close(shared.to_dense()[number], expected, **CLOSE)
        expected = torch.func.jacrev(lambda u: by_mask(u, masks[number]))(x[number])  # noqa: B023 - called at once
        torch.testing.assert_close(own.to_dense()[number], expected, **CLOSE)
    assert shared._nnz() == 3 * 15


def test_other_sparse_matrices():
    """A plan follows where the entries of a constant sparse matrix stand."""
    sparse = chainrule.jacobian(lambda x, matrix: matrix @ x.sin(), layout="sparse_coo")
    plain = chainrule.jacobian(lambda x, matrix: matrix @ x.sin())
    x = point(6)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        matrix = torch.rand(6, 6, dtype=DOUBLE, generator=generator) * (torch.rand(6, 6, generator=generator) < 0.4)
        for given in (matrix.to_sparse(), matrix.to_sparse_csr()):
            torch.testing.assert_close(sparse(x, given).to_dense(), matrix * x.cos(), **CLOSE)
            torch.testing.assert_close(plain(x, given), matrix * x.cos(), **CLOSE)


def test_masks_in_a_compiled_function():
    """What is replayed with other masks has the places of all of them."""

    def entries(x, mask):
        return chainrule.jacobian(lambda y: torch.where(mask, y.roll(1), y**2), layout="sparse_coo")(x).to_dense()

    x = point(8)
    entries(x, MASK)  # a plan for this mask is there
    compiled = chainrule.compile(entries)
    for mask in (MASK, ~MASK, MASK):
        torch.testing.assert_close(compiled(x, mask), torch.func.jacrev(lambda y: torch.where(mask, y.roll(1), y**2))(x), **CLOSE)  # noqa: B023


def test_triangles_are_listed_without_their_zeros():
    for size in (1, 2, 3, 8, 50):
        x = point(size)
        found = chainrule.jacobian(lambda x: torch.outer(x, x).tril() @ x, layout="sparse_coo")(x)
        assert found._nnz() == size * (size + 1) // 2
        torch.testing.assert_close(found.to_dense(), torch.func.jacrev(lambda x: torch.outer(x, x).tril() @ x)(x), **CLOSE)


#: Functions whose zeros follow from what changes between calls: a number, a mask, places, a constant.
CHANGING = {
    "number": lambda x, number, mask, places, weight: x.masked_fill(MASK, number) * x.roll(1),
    "number at places": lambda x, number, mask, places, weight: x.index_fill(0, PLACES, number) * x.roll(1),
    "number around": lambda x, number, mask, places, weight: F.pad(x[:6], (1, 1), value=number) * x,
    "number of a factor": lambda x, number, mask, places, weight: (x.masked_fill(MASK, 0) * number + number) * x.roll(1),
    "number of where": lambda x, number, mask, places, weight: torch.where(MASK, x, number) * x.roll(1),
    "scattered number": lambda x, number, mask, places, weight: x.scatter(0, PLACES, number) * x.roll(1),
    "mask": lambda x, number, mask, places, weight: x.masked_fill(mask, 0) * x.roll(1),
    "places": lambda x, number, mask, places, weight: x.new_zeros(8).index_put((places,), x[1:3]) * x.roll(1),
    "constant": lambda x, number, mask, places, weight: x.new_zeros(8).add(weight).scatter(0, places, x[1:3]) * x.roll(1),
    "constant factor": lambda x, number, mask, places, weight: (x * weight).sin() * x.roll(1),
    "constant beside": lambda x, number, mask, places, weight: torch.cat([x[:4], weight[4:]]) * x.roll(1),
    "mask of the inputs": lambda x, number, mask, places, weight: x.masked_fill(x > 0.8, 0) * x.roll(1),
    "constant of the inputs": lambda x, number, mask, places, weight: torch.cat([x[:4], x.detach()[4:] * weight[4:]]) * x.roll(1),
    "written constant": lambda x, number, mask, places, weight: torch.cat([x, weight.mul_(1)])[4:12] * x.roll(1),
}


@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.parametrize("seed", range(3))
def test_zeros_that_change(name, seed):
    """Whatever comes and in whatever order, no entry is missing: the dense Jacobian and Hessian are the sparse ones."""
    function, generator = CHANGING[name], torch.Generator().manual_seed(seed)
    chainrule.execute.engine.CACHE.clear()
    for _ in range(7):
        mask, places = torch.rand(8, generator=generator) > 0.5, torch.randperm(8, generator=generator)[:2]
        number = float(torch.randint(0, 3, (), generator=generator))
        weight = torch.randint(-1, 2, (8,), generator=generator).to(DOUBLE)
        given = (number, mask, places, weight)
        x = torch.rand(8, dtype=DOUBLE, generator=generator) + 0.3
        found = chainrule.jacobian(function, layout="sparse_coo")(x, *given)
        torch.testing.assert_close(found.to_dense(), torch.autograd.functional.jacobian(lambda x: function(x, *given), x), **CLOSE)  # noqa: B023
        energy = lambda x, *given: function(x, *given).pow(2).sum()  # noqa: E731
        found = chainrule.hessian(energy, layout="sparse_coo")(x, *given)
        torch.testing.assert_close(found.to_dense(), torch.autograd.functional.hessian(lambda x: energy(x, *given), x), **CLOSE)  # noqa: B023


def squares(left, right, target, mask):
    return (mask * (target - left @ right.t()) ** 2).sum()


def drawn(rows, columns, rank, share):
    mask = (torch.rand(rows, columns, generator=GENERATOR) < share).to(DOUBLE)
    shapes = (rows, rank), (columns, rank), (rows, columns)
    return *(torch.randn(shape, dtype=DOUBLE, generator=GENERATOR) for shape in shapes), mask


def masked_plans():
    return [plan for plans in CACHE.plans.values() for plan in getattr(plans, "plans", ()) if plan.masks.reads]


def test_a_sum_over_a_mask_is_a_product_where_all_places_are_taken():
    hessian = chainrule.hessian(squares, layout="sparse_coo")
    CACHE.clear()
    for _ in range(4):
        given = drawn(40, 40, 3, 0.2)
        expected = torch.func.hessian(squares)(*given)
        found = hessian(*given)
        torch.testing.assert_close(found.to_dense(), expected, **CLOSE)
        assert found.values().numel() == 40 * 3 * 3
    assert not masked_plans()  # one plan serves all masks


def test_a_mask_that_leaves_places_out_is_listed():
    hessian = chainrule.hessian(squares, layout="sparse_coo")
    for _ in range(3):
        CACHE.clear()
        given = drawn(40, 40, 3, 0.2)
        given[-1][:30] = 0
        found = hessian(*given)
        torch.testing.assert_close(found.to_dense(), torch.func.hessian(squares)(*given), **CLOSE)
        assert found.values().numel() == 10 * 3 * 3
        assert masked_plans()


def test_few_entries_of_a_large_mask_are_listed():
    hessian = chainrule.hessian(squares, layout="sparse_coo")
    CACHE.clear()
    given = drawn(100, 4000, 3, 0.001)
    given[-1][:, 0] = 1
    found = hessian(*given)
    torch.testing.assert_close(found.to_dense(), torch.func.hessian(squares)(*given), **CLOSE)
    assert masked_plans()


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: torch.einsum("ij,kj->ki", x.sin(), MATRIX[:, : x.shape[1]]), (5, 3)),
        (lambda x: torch.einsum("bij,kj->kbi", x.tanh(), MATRIX[:, : x.shape[-1]]), (2, 5, 4)),
        (lambda x: x.permute(2, 0, 1).sin(), (2, 3, 4)),
        (lambda x: x.expand(3, *x.shape).permute(2, 0, 1) * x.t()[:, None], (4, 5)),
        (lambda x: x.permute(1, 2, 0).sin().sum(1), (2, 3, 4)),
        (lambda x: x.t() * 2, (1, 4)),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_entries_come_to_stand_in_line(function, shape, layout):
    jacobian = chainrule.jacobian(function, layout=layout)
    earlier = []
    for number in range(4):
        x = torch.randn(shape, dtype=DOUBLE, generator=GENERATOR)
        if number == 3:
            x = torch.randn(shape[::-1], dtype=DOUBLE, generator=GENERATOR).permute(*reversed(range(len(shape))))
        expected = torch.func.jacrev(function)(x)
        found = jacobian(x)
        torch.testing.assert_close(found.to_dense().reshape(expected.shape), expected, **CLOSE)
        assert found.values().is_contiguous()
        earlier.append((found.values(), found.values().clone()))
    assert all(torch.equal(values, copy) for values, copy in earlier)


@pytest.mark.parametrize(
    ("sizes", "dims"), [((3, 4), (1, 0)), ((2, 3, 4), (2, 0, 1)), ((2, 3, 4), (0, 2, 1)), ((2, 2, 2, 2), (3, 1, 0, 2))]
)
def test_turns(sizes, dims):
    places = torch.empty(math.prod(sizes), dtype=torch.long)
    lined = torch.arange(places.numel()).reshape(sizes).permute(dims).reshape(-1)
    places[lined] = torch.arange(places.numel())
    shape, turned = _turn_of(places)
    values = torch.randn(places.numel(), generator=GENERATOR)
    expected = torch.empty_like(values)
    expected[places] = values
    assert torch.equal(values.reshape(shape).permute(turned).reshape(-1), expected)


@pytest.mark.parametrize("places", [[1, 0], [0, 2, 1, 3, 5, 4], [0, 3, 1, 4, 2, 6, 5, 7], [2, 1, 0], [0, 1, 3, 2]])
def test_other_orders_are_no_turns(places):
    assert _turn_of(torch.tensor(places)) is None


@pytest.mark.parametrize("first", ["sparse", "full"])
@pytest.mark.parametrize("kind", ["matrix", "mask"])
@pytest.mark.parametrize("transform", [chainrule.jacobian, chainrule.hessian])
def test_full_constants_leave_those_with_zeros_alone(first, kind, transform):
    """Functions of one record share plans: none has the entries that the constant of another one needs."""
    n = 300
    if kind == "matrix":
        constants = {"sparse": torch.eye(n) + torch.eye(n).roll(1, 0), "full": torch.randn(n, n)}
    else:
        constants = {"sparse": torch.arange(n) % 30 == 0, "full": torch.ones(n, dtype=torch.bool)}
    constants = {name: c.double() if kind == "matrix" else c for name, c in constants.items()}

    def function(x, constant):
        out = constant @ (x * x) if kind == "matrix" else torch.where(constant, (x * x).cumsum(0), 0)
        return out if transform is chainrule.jacobian else (out * out).sum()

    counts = {"sparse": [], "full": []}
    for name in (first, "full", "sparse", "sparse", "full", "sparse"):
        constant, x = constants[name], torch.randn(n, dtype=torch.float64)
        found = transform(lambda v, c=constant: function(v, c), layout="sparse_coo")(x)
        peer = torch.func.jacrev if transform is chainrule.jacobian else torch.func.hessian
        torch.testing.assert_close(found.to_dense(), peer(lambda v, c=constant: function(v, c))(x), rtol=1e-10, atol=1e-10)
        counts[name].append(found._nnz())
    alone = {"matrix": {chainrule.jacobian: 2 * n, chainrule.hessian: 3 * n}}.get(kind, {}).get(transform)
    assert len(set(counts["sparse"])) == len(set(counts["full"])) == 1
    assert alone is None or counts["sparse"][0] == alone
    assert counts["sparse"][0] < counts["full"][0]


def test_a_constant_that_looks_sparse_and_is_not():
    """Most of what is looked at is zero: planned once more, and no more."""
    n = 96
    matrix = torch.randn(n, n, dtype=torch.float64)
    few = n // 16
    for transform in range(4):
        jacobian = chainrule.jacobian(lambda x: matrix @ (x * x), layout="sparse_coo")
        x = torch.randn(n, dtype=torch.float64)
        torch.testing.assert_close(jacobian(x).to_dense(), 2 * matrix * x, rtol=1e-12, atol=1e-12)
        if transform == 0:
            matrix[::few, ::few] = 0.0
        if transform == 1:
            kept = {id(plan) for plans in CACHE.plans.values() for plan in getattr(plans, "plans", ())}
    assert kept == {id(plan) for plans in CACHE.plans.values() for plan in getattr(plans, "plans", ())}
