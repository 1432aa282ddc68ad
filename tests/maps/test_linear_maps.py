"""Every kind of factor, alone and in random networks, against the definition of a term evaluated by brute force."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chainrule.maps.compose import Workspace, settle
from chainrule.maps.linear_map import LinearMap, Operator, add_maps, compose, densify
from chainrule.maps.nodes import leaf
from chainrule.maps.staging import Program
from chainrule.maps.terms import (
    Axis,
    Factor,
    OneHot,
    Term,
    affine_onehot,
    constant_index,
    dims_of,
    fixed_index,
    identity,
    new_axes,
)
from chainrule.rules.families import reshape_term, slice_term

torch.set_num_threads(1)

CPU = torch.device("cpu")
F64 = torch.float64

SETTINGS = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def dense_node(array):
    tensor = torch.as_tensor(array, dtype=F64)
    return leaf(tuple(tensor.shape), lambda program: program.constant(tensor), label="value")


def index_node(array):
    tensor = torch.as_tensor(array, dtype=torch.long)
    return constant_index(tuple(tensor.shape), lambda device: tensor, CPU)


def brute(term, out_shape, in_shape):
    """The definition in the docstring of ``chainrule.maps.terms``, entry by entry."""
    axes = list(term.all_axes())
    where = {axis: number for number, axis in enumerate(axes)}
    factors = [(f.node._compute(Program()).value.numpy(), [where[a] for a in f.axes]) for f in term.factors]
    relations = [
        (h.index._compute(Program()).value.numpy(), [where[a] for a in h.sources], where[h.target]) for h in term.onehots
    ]
    result = numpy.zeros((math.prod(out_shape), math.prod(in_shape)))

    def flat(dims, point):
        position = 0
        for axis in itertools.chain.from_iterable(dims):
            position = position * axis.size + point[where[axis]]
        return position

    for point in itertools.product(*(range(axis.size) for axis in axes)):
        if all(index[tuple(point[s] for s in sources)] == point[target] for index, sources, target in relations):
            entry = term.scale * math.prod(values[tuple(point[a] for a in own)] for values, own in factors)
            result[flat(term.out_dims, point), flat(term.in_dims, point)] += entry
    return result.reshape((*out_shape, *in_shape))


def brute_map(linear_map):
    total = numpy.zeros((*linear_map.out_shape, *linear_map.in_shape))
    for term in linear_map.terms:
        total += brute(term, linear_map.out_shape, linear_map.in_shape)
    return total


def value(node):
    return node.force(Program()).value.numpy()


def check(linear_map, expected, workspace=None):
    got = value(densify(linear_map, workspace or Workspace(F64, CPU)))
    assert got.dtype == numpy.float64
    assert got.shape == expected.shape
    # Sums of at most a few hundred products of numbers near one.
    numpy.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-11)


def as_matrix(array, out_shape, in_shape):
    return array.reshape(math.prod(out_shape), math.prod(in_shape))


def composed(left, right, one, two):
    product = as_matrix(one, left.out_shape, left.in_shape) @ as_matrix(two, right.out_shape, right.in_shape)
    return product.reshape((*left.out_shape, *right.in_shape))


# Random networks.


@st.composite
def splits(draw, size):
    """Sizes of axes that make up a dimension of ``size``."""
    if size in (0, 1):
        return draw(st.sampled_from([[size], [] if size == 1 else [size]]))
    choices = [[size]] + [[a, size // a] for a in range(2, size) if size % a == 0]
    return draw(st.sampled_from(choices))


@st.composite
def terms(draw, out_shape, in_shape, within_sides=False):
    """A random network from ``in_shape`` to ``out_shape``."""
    rng = numpy.random.default_rng(draw(st.integers(0, 2**16)))
    pools: list[list[Axis]] = [[], []]
    dims = []
    for side, shape in enumerate((out_shape, in_shape)):
        made = []
        for size in shape:
            dim = []
            for part in draw(splits(size)):
                candidates = [a for a in pools[0] + (pools[1] if within_sides else []) if a.size == part]
                if side == 0 and not within_sides:
                    candidates = []
                candidates = [a for a in candidates if within_sides or a not in pools[1]]
                if candidates and draw(st.booleans()):
                    dim.append(draw(st.sampled_from(candidates)))
                else:
                    dim.append(Axis(part))
                pools[side].append(dim[-1])
            made.append(tuple(dim))
        dims.append(tuple(made))
    axes = list(dict.fromkeys(pools[0] + pools[1]))
    axes += [Axis(draw(st.integers(1, 3))) for _ in range(draw(st.integers(0, 2)))]
    order = draw(st.permutations(axes)) if axes else []
    factors = []
    for _ in range(draw(st.integers(0, 3))):
        own = draw(st.lists(st.sampled_from(axes), unique=True, max_size=3)) if axes else []
        factors.append(Factor(dense_node(rng.standard_normal([a.size for a in own])), tuple(own)))
    onehots = []
    for position, target in enumerate(order):
        if target.size == 0 or not draw(st.integers(0, 2)) == 0:
            continue
        for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
            sources = draw(st.lists(st.sampled_from(order[:position]), unique=True, max_size=2)) if position else []
            if any(a.size == 0 for a in sources):
                continue
            onehots.append(draw(relations(rng, tuple(sources), target)))
    scale = draw(st.sampled_from([1.0, 1.0, -2.5]))
    return Term(dims[0], dims[1], tuple(factors), tuple(onehots), scale)


@st.composite
def relations(draw, rng, sources, target):
    if not sources and draw(st.booleans()):
        return fixed_index(target, draw(st.integers(0, target.size - 1)), Workspace(F64, CPU))
    if len(sources) == 1 and draw(st.booleans()):
        size, extent = sources[0].size, target.size
        steps = [s for s in (-2, -1, 1, 2) if abs(s) * (size - 1) < extent]
        if steps:
            step = draw(st.sampled_from(steps))
            reach = step * (size - 1)
            start = draw(st.integers(max(0, -reach), extent - 1 - max(0, reach)))
            return affine_onehot(sources[0], target, start, step, Workspace(F64, CPU))
    partial = draw(st.booleans())
    index = rng.integers(-1 if partial else 0, target.size, [a.size for a in sources])
    return OneHot(index_node(index), sources, target, partial)


def shapes(largest=4, rank=2):
    return st.lists(st.integers(1, largest), max_size=rank).map(tuple)


@st.composite
def maps(draw, out_shape, in_shape, count=1, within_sides=False):
    found = [draw(terms(out_shape, in_shape, within_sides)) for _ in range(draw(st.integers(1, count)))]
    return LinearMap(out_shape, in_shape, tuple(found))


@SETTINGS
@given(st.data())
def test_dense_form_of_a_random_map(data):
    linear_map = data.draw(maps(data.draw(shapes()), data.draw(shapes()), 3, within_sides=True))
    check(linear_map, brute_map(linear_map))


@SETTINGS
@given(st.data())
def test_many_terms_are_merged(data):
    linear_map = data.draw(maps(data.draw(shapes(3)), data.draw(shapes(3)), 7))
    check(linear_map, brute_map(linear_map))


@SETTINGS
@given(st.data())
def test_transpose(data):
    linear_map = data.draw(maps(data.draw(shapes()), data.draw(shapes()), 2))
    expected = as_matrix(brute_map(linear_map), linear_map.out_shape, linear_map.in_shape).T
    check(linear_map.transpose(), expected.reshape((*linear_map.in_shape, *linear_map.out_shape)))


@SETTINGS
@given(st.data(), st.booleans())
def test_compose(data, eager):
    a, b, c = (data.draw(shapes()) for _ in range(3))
    left, right = data.draw(maps(a, b, 2)), data.draw(maps(b, c, 2))
    workspace = Workspace(F64, CPU)
    joined = compose(left, right, workspace, eager=eager)
    check(joined, composed(left, right, brute_map(left), brute_map(right)), workspace)


@SETTINGS
@given(st.data(), st.booleans())
def test_compose_three(data, eager):
    a, b, c, d = (data.draw(shapes(3)) for _ in range(4))
    one, two, three = data.draw(maps(a, b)), data.draw(maps(b, c)), data.draw(maps(c, d))
    workspace = Workspace(F64, CPU)
    half = compose(two, three, workspace, eager=eager)
    joined = compose(one, half, workspace, eager=eager)
    expected = as_matrix(composed(two, three, brute_map(two), brute_map(three)), b, d)
    expected = (as_matrix(brute_map(one), a, b) @ expected).reshape((*a, *d))
    check(joined, expected, workspace)


@SETTINGS
@given(st.data(), st.booleans())
def test_add(data, force):
    a, b = data.draw(shapes(3)), data.draw(shapes(3))
    parts = [data.draw(maps(a, b, 2)) for _ in range(3)]
    workspace = Workspace(F64, CPU)
    total = add_maps(parts, workspace, force=force)
    if force:
        assert len(total.terms) == 1
    check(total, sum(brute_map(part) for part in parts), workspace)


@SETTINGS
@given(st.data(), st.booleans(), st.sampled_from([(), (1,), (3,)]))
def test_apply_to_one_and_many(data, forward, rows):
    linear_map = data.draw(maps(data.draw(shapes()), data.draw(shapes()), 2))
    shape = linear_map.in_shape if forward else linear_map.out_shape
    seed = numpy.random.default_rng(0).standard_normal((*rows, *shape))
    lead, axes = new_axes(rows), new_axes(shape)
    term = Term(dims_of(axes), dims_of(lead), (Factor(dense_node(seed), (*lead, *axes)),))
    tangents = LinearMap(shape, rows, (term,))
    workspace = Workspace(F64, CPU)
    matrix = as_matrix(brute_map(linear_map), linear_map.out_shape, linear_map.in_shape)
    columns = seed.reshape(-1, math.prod(shape)).T
    if forward:
        joined = compose(linear_map, tangents, workspace, eager=True)
        check(joined, (matrix @ columns).reshape((*linear_map.out_shape, *rows)), workspace)
    else:
        joined = compose(tangents.transpose(), linear_map, workspace, eager=True)
        check(joined, (columns.T @ matrix).reshape((*rows, *linear_map.in_shape)), workspace)


@SETTINGS
@given(st.data())
def test_settling_changes_nothing(data):
    a, b = data.draw(shapes(3)), data.draw(shapes(3))
    term = data.draw(terms(a, b, within_sides=True))
    workspace = Workspace(F64, CPU)
    settled = settle(term, workspace)
    outer = settled.outer_axes()
    assert all(axis in outer or axis.size == 1 for axis in settled.carried_axes())
    check(LinearMap(a, b, (settled,)), brute(term, a, b), workspace)


# Operators (maps known by how they act) beside terms.


def matrix_operator(matrix, out_shape, in_shape):
    weights = torch.as_tensor(as_matrix(matrix, out_shape, in_shape))
    return Operator(
        out_shape,
        in_shape,
        lambda program, rows: (rows.reshape(rows.shape[0], -1) @ program.constant(weights.t())).reshape(-1, *out_shape),
        lambda program, rows: (rows.reshape(rows.shape[0], -1) @ program.constant(weights)).reshape(-1, *in_shape),
        label="matrix",
    )


@SETTINGS
@given(st.data(), st.booleans())
def test_compose_with_an_operator(data, on_the_left):
    a, b, c = (data.draw(shapes(3)) for _ in range(3))
    rng = numpy.random.default_rng(1)
    workspace = Workspace(F64, CPU)
    if on_the_left:
        matrix = rng.standard_normal((*a, *b))
        left, right = LinearMap(a, b, (), (matrix_operator(matrix, a, b),)), data.draw(maps(b, c, 2))
        expected = composed(left, right, matrix, brute_map(right))
    else:
        matrix = rng.standard_normal((*b, *c))
        left, right = data.draw(maps(a, b, 2)), LinearMap(b, c, (), (matrix_operator(matrix, b, c),))
        expected = composed(left, right, brute_map(left), matrix)
    check(compose(left, right, workspace, eager=True), expected, workspace)


# Shapes and structure.


@pytest.mark.parametrize(
    ("one", "two"),
    [((6,), (2, 3)), ((2, 3), (3, 2)), ((2, 3), (6,)), ((4, 6), (3, 8)), ((1, 4), (4, 1, 1)), ((2, 2, 3), (3, 4)), ((), (1,)),
     ((5, 7), (7, 5)), ((1,), ())],
)
@pytest.mark.parametrize("eager", [True, False])
def test_reshapes_split_and_merge_axes(one, two, eager):
    """Through ``one -> two -> one``, with a diagonal in between, also where the sizes do not divide each other."""
    workspace = Workspace(F64, CPU)
    there = LinearMap(two, one, (reshape_term(one, two, CPU),))
    back = LinearMap(one, two, (reshape_term(two, one, CPU),))
    diagonal = numpy.random.default_rng(0).standard_normal(two)
    axes = new_axes(two)
    middle = LinearMap(two, two, (Term(dims_of(axes), dims_of(axes), (Factor(dense_node(diagonal), axes),)),))
    check(there, numpy.eye(math.prod(one)).reshape(*two, *one), workspace)
    through = compose(back, compose(middle, there, workspace, eager=eager), workspace, eager=eager)
    check(through, numpy.diag(diagonal.reshape(-1)).reshape((*one, *one)), workspace)


def test_a_diagonal_stays_diagonal():
    workspace = Workspace(F64, CPU)
    size = 50
    total = LinearMap((size,), (size,), (identity((size,)),))
    for _ in range(4):
        axes = new_axes((size,))
        factor = Factor(dense_node(numpy.random.default_rng(0).standard_normal(size)), axes)
        diagonal = LinearMap((size,), (size,), (Term(dims_of(axes), dims_of(axes), (factor,)),))
        total = compose(diagonal, total, workspace, eager=True)
    (term,) = total.terms
    assert term.out_dims == term.in_dims
    assert sum(f.node.numel for f in term.factors) == size


def test_slices_of_slices_stay_affine():
    workspace = Workspace(F64, CPU)
    first = LinearMap((10,), (24,), (slice_term((24,), 0, 3, 2, 10, workspace),))
    second = LinearMap((4,), (10,), (slice_term((10,), 0, 1, 2, 4, workspace),))
    joined = compose(second, first, workspace, eager=True)
    (term,) = joined.terms
    assert not term.factors
    (relation,) = term.onehots
    assert relation.affine == (5, 4)
    check(joined, brute_map(joined), workspace)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_zero_size(shape):
    workspace = Workspace(F64, CPU)
    zero = LinearMap(shape, shape, (identity(shape),))
    check(zero, numpy.zeros((*shape, *shape)))
    check(compose(zero, zero, workspace, eager=True), numpy.zeros((*shape, *shape)), workspace)
    axes, other = new_axes(shape), new_axes((2,))
    summed = LinearMap((2,), shape, (Term(dims_of(other), dims_of(axes)),))
    spread = LinearMap(shape, (2,), (Term(dims_of(axes), dims_of(other)),))
    check(compose(summed, spread, workspace, eager=True), numpy.zeros((2, 2)), workspace)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_the_workspace_s(dtype):
    workspace = Workspace(dtype, CPU)
    part = LinearMap((2,), (5,), (slice_term((5,), 0, 1, 2, 2, workspace),))
    out, inner = Axis(5), Axis(2)
    relation = OneHot(index_node([[0, -1], [1, 1], [-1, 2], [4, 0], [3, 3]]), (out, inner), Axis(5), True)
    masked = LinearMap((5,), (2,), (Term(((out,),), ((inner,),), (), (relation,)),))
    for linear_map in (part, part.transpose(), masked, compose(part, masked, workspace, eager=True)):
        assert densify(linear_map, workspace).force(Program()).value.dtype == dtype
