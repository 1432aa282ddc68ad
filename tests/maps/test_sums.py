"""Sums of terms: stacked products and terms on diagonals, against the definition of a term and against einsum."""

from __future__ import annotations

from unittest import mock

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chainrule.maps import sums
from chainrule.maps.assembly import assembled
from chainrule.maps.compose import Workspace
from chainrule.maps.linear_map import LinearMap, densify
from chainrule.maps.nodes import leaf
from chainrule.maps.staging import Program
from chainrule.maps.terms import Axis, Factor, Term
from tests.maps.test_linear_maps import CPU, F64, SETTINGS, brute_map, check, dense_node, maps, shapes


def everywhere():
    """Small results are summed as large ones are."""
    return mock.patch.multiple(sums, MANY=1, SAVING=0, _SHORT=1)


@st.composite
def full_terms(draw, sizes):
    """A term over dimensions of ``sizes``, dense or with one diagonal, made of a few factors."""
    rng = numpy.random.default_rng(draw(st.integers(0, 2**16)))
    dims = [Axis(size) for size in sizes]
    if draw(st.integers(0, 3)) == 0:
        equal = [(i, j) for i in range(len(dims)) for j in range(i) if sizes[i] == sizes[j]]
        if equal:
            one, two = draw(st.sampled_from(equal))
            dims[one] = dims[two]
    axes = list(dict.fromkeys(dims))
    factors = []
    for _ in range(draw(st.integers(0, 3))):
        own = draw(st.lists(st.sampled_from(axes), unique=True, max_size=3))
        factors.append(Factor(dense_node(rng.standard_normal([a.size for a in own])), tuple(own)))
    half = len(dims) // 2
    scale = draw(st.sampled_from([1.0, 1.0, -2.5]))
    return Term(tuple((a,) for a in dims[:half]), tuple((a,) for a in dims[half:]), tuple(factors), (), scale)


@SETTINGS
@given(st.data())
def test_sums_of_random_maps(data):
    linear_map = data.draw(maps(data.draw(shapes()), data.draw(shapes()), 4, within_sides=True))
    with everywhere():
        check(linear_map, brute_map(linear_map))


@SETTINGS
@given(st.data())
def test_sums_of_full_terms(data):
    sizes = tuple(data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=4)))
    terms = tuple(data.draw(full_terms(sizes)) for _ in range(data.draw(st.integers(2, 5))))
    half = len(sizes) // 2
    linear_map = LinearMap(sizes[:half], sizes[half:], terms)
    with everywhere():
        check(linear_map, brute_map(linear_map))


def outer_sum(sizes, equations, *, mask=None, diagonal=False):
    """The map of a sum of products over the axes a, b, c, and the same by einsum."""
    axes = {name: Axis(size) for name, size in zip("abc", sizes, strict=True)}
    out_dims, in_dims = ((axes["a"],), (axes["b"],)), ((axes["c"],),)
    terms, expected = [], torch.zeros(sizes, dtype=F64)
    for equation in equations:
        values = [torch.randn([axes[n].size for n in part], dtype=F64) for part in equation.split(",")]
        nodes = [dense_node(value) for value in values]
        if mask is not None and not terms:
            kept = mask(values[0])
            nodes[0] = leaf(kept.shape, lambda p, kept=kept: p.constant(kept).to(F64), label="mask")
            values[0] = kept.to(F64)
            values[1] = values[1].fill_(torch.inf)
            nodes[1] = dense_node(values[1])
        parts = equation.split(",")
        factors = tuple(Factor(n, tuple(axes[a] for a in part)) for n, part in zip(nodes, parts, strict=True))
        terms.append(Term(out_dims, in_dims, factors))
        ones = torch.ones(sizes, dtype=F64)
        product = torch.einsum(f"{equation},abc->abc", *values, ones)
        expected += torch.where(torch.isnan(product), 0.0, product)
    if diagonal:
        value = torch.randn(sizes[0], sizes[1], dtype=F64)
        terms.append(Term(out_dims, ((axes["a"],),), (Factor(dense_node(value), (axes["a"], axes["b"])),)))
        torch.diagonal(expected, 0, 0, 2).add_(value.t())
    return LinearMap(sizes[:2], sizes[2:], tuple(terms)), expected


def dense(linear_map):
    program = Program()
    node = densify(linear_map, Workspace(F64, CPU))
    return node, node.force(program).value, [i.function for i in program.instructions]


@pytest.mark.parametrize("diagonal", [False, True])
def test_one_product_of_matrices(diagonal):
    linear_map, expected = outer_sum((40, 50, 40), ["ab,ac", "ab,c", "b,c"], diagonal=diagonal)
    node, found, called = dense(linear_map)
    assert node.label == "stacked products"
    assert called.count(torch.add) == 0
    assert called.count(sums.product_on_diagonals) == diagonal
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)  # sums of three products of numbers near one


def test_common_factors_are_taken_out_first():
    axes = [Axis(40), Axis(50), Axis(40)]
    out_dims, in_dims = ((axes[0],), (axes[1],)), ((axes[2],),)
    common, one, two = (torch.randn(n, dtype=F64) for n in (40, 50, 50))
    last = torch.randn(40, dtype=F64)
    shared = dense_node(common)
    terms = tuple(
        Term(out_dims, in_dims, (Factor(shared, (axes[0],)), Factor(dense_node(v), (axes[1],)), *extra))
        for v, extra in ((one, ()), (two, (Factor(dense_node(last), (axes[2],)),)))
    )
    node, found, _ = dense(LinearMap((40, 50), (40,), terms))
    assert node.label != "stacked products"
    expected = common[:, None, None] * (one[:, None] + two[:, None] * last)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_what_does_not_pay_is_added():
    # Each stack would be as large as the result: its rows and columns are tied by a factor over all axes.
    linear_map, expected = outer_sum((40, 50, 40), ["abc", "ab,c"])
    node, found, _ = dense(linear_map)
    assert node.label != "stacked products"
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_a_diagonal_is_added_to_what_is_not_a_product():
    linear_map, expected = outer_sum((40, 50, 40), ["abc"], diagonal=True)
    _, found, called = dense(linear_map)
    assert called.count(assembled) == 1
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_masks_select_in_a_stack():
    """Zero where the mask is, although the other factor is infinite there."""
    linear_map, expected = outer_sum((40, 50, 40), ["ab,c", "b,c", "a,c"], mask=lambda v: v > 0, diagonal=True)
    node, found, called = dense(linear_map)
    assert node.label == "stacked products"
    assert sums.product_on_diagonals not in called
    assert not found.isnan().any()
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
