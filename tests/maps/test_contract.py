"""Lowering of contractions: results, whatever the kernels are given, and the layout that they work in."""

from __future__ import annotations

import itertools

import pytest
import torch

from chainrule.maps.contract import contract
from chainrule.maps.contraction_order import contraction_order
from chainrule.maps.staging import Program
from chainrule.maps.terms import Axis, Factor
from tests.maps.test_linear_maps import F64, dense_node

SIZES = [(1, 1, 1), (3, 0, 2), (70, 40, 30), (600, 40, 3), (3, 40, 600), (600, 128, 64), (600, 128, 65), (64, 128, 64)]


def laid_out(shape: tuple[int, ...], order: tuple[int, ...]) -> torch.Tensor:
    """Random numbers, stored with their dimensions in ``order``."""
    stored = torch.randn([shape[place] for place in order], dtype=F64)
    return stored.permute([order.index(place) for place in range(len(shape))])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("keep", ["mn", "nm"])
def test_matrix_products(sizes: tuple[int, ...], keep: str) -> None:
    axes = dict(zip("mkn", map(Axis, sizes), strict=True))
    for one, two in itertools.product(((0, 1), (1, 0)), repeat=2):
        x, y = laid_out((sizes[0], sizes[1]), one), laid_out((sizes[1], sizes[2]), two)
        factors = [
            Factor(dense_node(x), (axes["m"], axes["k"])),
            Factor(dense_node(y), (axes["k"], axes["n"])),
        ]
        found = contract(factors, [axes[name] for name in keep], {})
        expected = torch.einsum(f"mk,kn->{keep}", x, y)
        # Sums of at most 128 products.
        torch.testing.assert_close(found.node.force(Program()).value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_thin_product_is_stored_with_its_long_dimension_last(order: tuple[int, int]) -> None:
    m, k, n = Axis(600), Axis(128), Axis(10)
    factors = [Factor(dense_node(torch.randn(600, 128)), (m, k)), Factor(dense_node(torch.randn(128, 10)), (k, n))]
    keep = [(m, n)[place] for place in order]
    found = contract([factors[place] for place in order], keep, {}).node.force(Program()).value
    assert found.stride(order.index(0)) == 1


def test_a_product_is_laid_out_as_its_reader_wants_it() -> None:
    m, k, n = Axis(70), Axis(40), Axis(70)
    one, two = Factor(dense_node(torch.randn(70, 40)), (m, k)), Factor(dense_node(torch.randn(40, 70)), (k, n))
    for factors in ([one, two], [two, one]):
        program = Program()
        assert contract(factors, [m, n], {}).node.force(program).value.is_contiguous()


@pytest.mark.parametrize("sizes", [(3000, 1, 8, 8), (3000, 5, 5, 5), (6000, 5, 5, 1), (9000, 3, 8, 1), (5, 3, 4, 2), (0, 3, 4, 2), (1, 1, 1, 1)])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_stacks_of_small_matrices(sizes: tuple[int, ...], order: tuple[int, ...]) -> None:
    b, m, k, n = map(Axis, sizes)
    x, y = laid_out(sizes[:3], order), laid_out((sizes[0], *sizes[2:]), order)
    factors = [Factor(dense_node(x), (b, m, k)), Factor(dense_node(y), (b, k, n))]
    program = Program()
    found = contract(factors, [b, m, n], {}).node.force(program).value
    # Sums of at most eight products.
    torch.testing.assert_close(found, torch.bmm(x, y), rtol=1e-13, atol=1e-13)
    if order[-1] == 0 and sizes[0] >= 3000:  # the stack is innermost: passes over it, and no product per matrix
        assert torch.bmm not in [i.function for i in program.instructions]


def test_many_vectors_times_small_matrices() -> None:
    b, k, n = Axis(6000), Axis(5), Axis(5)
    x, y = laid_out((6000, 5), (1, 0)), laid_out((6000, 5, 5), (1, 2, 0))
    for factors in ([Factor(dense_node(x), (b, k)), Factor(dense_node(y), (b, k, n))],
                    [Factor(dense_node(y), (b, k, n)), Factor(dense_node(x), (b, k))]):  # fmt: skip
        found = contract(factors, [b, n], {}).node.force(Program()).value
        torch.testing.assert_close(found, torch.einsum("bk,bkn->bn", x, y), rtol=1e-13, atol=1e-13)


def test_order_with_axes_of_one_operand():
    """An axis that one operand alone carries is summed in passing: the cheapest pair still comes first."""
    c, h, batch, alone, taps = (Axis(size) for size in (8, 64, 32, 1, 9))
    cotangent, mask, patches = (c, h), (alone, c, h, batch), (h, taps, batch)
    factors = [Factor(dense_node(torch.randn([axis.size for axis in axes], dtype=F64)), axes) for axes in (cotangent, mask, patches)]
    assert contraction_order(factors, (c, taps, batch)) == [(0, 1), (0, 1)]
    found = contract(factors, (c, taps, batch), {}).node.force(Program()).value
    wanted = torch.einsum("ch,achb,htb->ctb", *(factor.node.force(Program()).value for factor in factors))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("large_first", [False, True])
@pytest.mark.parametrize("columns", [1, 2, 16, 17])
def test_thin_products_that_a_stack_runs_along(columns: int, large_first: bool) -> None:
    """``sum_b S[b, k, j] u[b, j]``: multiplied and summed where few of them stand along the stack, a matrix product otherwise."""
    b, k, j = Axis(5), Axis(columns), Axis(32)
    large, small = torch.randn(5, columns, 32, dtype=F64), torch.randn(5, 32, dtype=F64)
    for keep in ((j, k), (k, j)):
        program = Program()
        factors = [Factor(dense_node(large), (b, k, j)), Factor(dense_node(small), (b, j))]
        found = contract(factors if large_first else factors[::-1], keep, {})
        names = "".join("jk"[(j, k).index(axis)] for axis in found.axes)
        wanted = torch.einsum(f"bkj,bj->{names}", large, small)
        torch.testing.assert_close(found.node.force(program).value, wanted)
        assert any(i.function in (torch.bmm, torch.matmul) for i in program.instructions) == (columns > 16)
