"""Ops that move elements: Jacobians, second derivatives, batches, and that nothing becomes dense on the way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import chainrule
from chainrule.capture.tape import Tape
from chainrule.maps.nodes import postorder
from chainrule.plan.planner import Request, plan
from chainrule.rules.table import POLICY
from tests.rules.selection_oracle import check_first_order, check_second_order, check_under_vmap, parametrized, points

aten = torch.ops.aten

CASES = {
    "view": (lambda x: x.view(3, 2), [(2, 3)]),
    "reshape across": (lambda x: x.reshape(3, 4), [(2, 6)]),
    "reshape not dividing": (lambda x: x.reshape(4, 9), [(6, 6)]),
    "reshape scalar": (lambda x: x.reshape(1, 1), [()]),
    "flatten": (lambda x: x.flatten(1), [(2, 1, 3)]),
    "unflatten": (lambda x: x.unflatten(-1, (2, -1)), [(2, 4)]),
    "squeeze": (lambda x: (x.squeeze(), x.squeeze(1), x.squeeze((0, -1))), [(2, 1, 1)]),
    "unsqueeze": (lambda x: (x.unsqueeze(0), x.unsqueeze(-1)), [(3,)]),
    "permute": (lambda x: x.permute(2, 0, -2), [(2, 3, 4)]),
    "transpose": (lambda x: x.transpose(-1, 0), [(2, 3, 2)]),
    "t": (lambda x: x.t(), [(2, 3)]),
    "movedim": (lambda x: x.movedim((0, 1), (-1, 0)), [(2, 3, 2)]),
    "expand": (lambda x: x.expand(2, 3, 4), [(3, 1)]),
    "expand scalar": (lambda x: x.expand(2, 1), [()]),
    "expand to nothing": (lambda x: x.expand(0, 3), [(3,)]),
    "expand_copy": (lambda x: aten.expand_copy(x, [2, 2]), [(2, 1)]),
    "repeat": (lambda x: x.repeat(2, 1, 3), [(2, 2)]),
    "tile": (lambda x: x.tile(2), [(2, 2)]),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 1), [(2, 3)]),
    "flip": (lambda x: x.flip(0, -1), [(2, 1, 3)]),
    "flip scalar": (lambda x: x.flip(()), [()]),
    "roll": (lambda x: x.roll(-1, 1), [(2, 3)]),
    "roll two": (lambda x: x.roll((5, 1), (0, -1)), [(3, 4)]),
    "roll flat": (lambda x: x.roll(2), [(2, 3)]),
    "roll twice the same dim": (lambda x: x.roll((1, 1), (0, 0)), [(5,)]),
    "rot90": (lambda x: tuple(torch.rot90(x, k, (0, 2)) for k in range(-1, 3)), [(2, 3, 4)]),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 1)), [(2, 3)]),
    "pad negative": (lambda x: F.pad(x, (-1, -1)), [(2, 4)]),
    "pad mixed": (lambda x: F.pad(x, (-1, 2), value=3.0), [(2, 3)]),
    "reflection_pad1d": (lambda x: F.pad(x, (2, 1), mode="reflect"), [(1, 3)]),
    "reflection_pad2d": (lambda x: F.pad(x, (1, 2, 1, 0), mode="reflect"), [(1, 3, 3)]),
    "reflection_pad3d": (lambda x: F.pad(x, (1, 1, 0, 1, 1, 0), mode="reflect"), [(1, 2, 2, 2)]),
    "replication_pad1d": (lambda x: F.pad(x, (2, 1), mode="replicate"), [(2, 2)]),
    "replication_pad2d": (lambda x: F.pad(x, (1, 0, 2, 1), mode="replicate"), [(1, 2, 2)]),
    "replication_pad3d": (lambda x: F.pad(x, (1, 0, 2, 1, 0, 1), mode="replicate"), [(1, 2, 1, 2)]),
    "circular pad": (lambda x: F.pad(x, (2, 1), mode="circular"), [(1, 3)]),
    "cat": (lambda x, y: torch.cat([x, y, x * y[:, :2]], -1), [(2, 2), (2, 3)]),
    "cat with empty": (lambda x, y: torch.cat([torch.zeros(0, dtype=x.dtype), x, y]), [(2, 2), (0, 2)]),
    "stack": (lambda x, y: torch.stack([x, y, x], 1), [(2, 3), (2, 3)]),
    "stack scalars": (lambda x, y: torch.stack([x, y]), [(), ()]),
    "hstack": (lambda x, y: torch.hstack([x, y]), [(2,), (3,)]),
    "block_diag": (lambda x, y, z: torch.block_diag(x, y, z), [(2, 2), (3,), ()]),
    "select": (lambda x: x.select(-2, -1), [(2, 3, 2)]),
    "select to a scalar": (lambda x: x[1], [(3,)]),
    "slice": (lambda x: x[:, 1:], [(2, 3)]),
    "slice with step": (lambda x: x[..., 1::2], [(2, 6)]),
    "slice beyond the end": (lambda x: x[-2:10], [(3,)]),
    "empty slice": (lambda x: x[2:2], [(3, 2)]),
    "slice of slice": (lambda x: x[1:][::2][:2], [(7,)]),
    "narrow": (lambda x: x.narrow(1, 1, 2), [(2, 4)]),
    "split": (lambda x: x.split(2, 1), [(2, 5)]),
    "split_with_sizes": (lambda x: x.split([1, 0, 2]), [(3,)]),
    "chunk": (lambda x: x.chunk(2, -1), [(2, 5)]),
    "unbind": (lambda x: x.unbind(1), [(2, 3)]),
    "tensor_split": (lambda x: x.tensor_split((1, 3)), [(4,)]),
    "unfold": (lambda x: x.unfold(-1, 3, 2), [(2, 7)]),
    "unfold overlapping": (lambda x: x.unfold(0, 2, 1), [(4, 2)]),
    "unfold scalar": (lambda x: x.unfold(0, 1, 1), [()]),
    "im2col": (lambda x: F.unfold(x, 2, dilation=1, padding=1, stride=2), [(1, 2, 3, 2)]),
    "col2im": (lambda x: F.fold(x, (3, 2), 2, padding=1), [(1, 4, 12)]),
    "as_strided": (lambda x: (x * 1).as_strided((2, 3), (1, 2), 1), [(3, 4)]),
    "as_strided overlapping": (lambda x: (x * 1).as_strided((3, 2), (1, 1)), [(4,)]),
    "diagonal": (lambda x: x.diagonal(), [(3, 3)]),
    "diagonal offset": (lambda x: (x.diagonal(1, 0, 2), x.diagonal(-1, -1, 0)), [(3, 2, 4)]),
    "empty diagonal": (lambda x: x.diagonal(3), [(2, 3)]),
    "diag": (lambda x: (torch.diag(x), torch.diag(torch.diag(x, 1), -1)), [(3,)]),
    "diag_embed": (lambda x: torch.diag_embed(x, -1, 0, 2), [(2, 3)]),
    "tril": (lambda x: (x.tril(), x.tril(-1)), [(3, 4)]),
    "triu": (lambda x: (x.triu(), x.triu(1)), [(2, 3, 2)]),
    "trace": (lambda x: torch.trace(x), [(3, 2)]),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), [(1, 4, 2, 1)]),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), [(1, 2, 4)]),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 2), [(1, 4, 2, 1)]),
    "copy": (lambda x, y: aten.copy(x, y), [(2, 3), (3,)]),
    "fill": (lambda x, y: (aten.fill(x, y), aten.fill(x, 2.0), aten.zero(x) + x), [(2, 3), ()]),
    "empty": (lambda x: (x.reshape(3, 0), x.flip(0), x.t(), torch.cat([x, x]), x.roll(1)), [(0, 3)]),
    "select_backward": (lambda x: aten.select_backward(x, [3, 2], 0, -1), [(2,)]),
    "slice_backward": (lambda x: aten.slice_backward(x, [5, 2], 0, 1, 9, 2), [(2, 2)]),
    "diagonal_backward": (lambda x: aten.diagonal_backward(x, [3, 2, 3], 0, 0, 2), [(2, 3)]),
    "unfold_backward": (lambda x: aten.unfold_backward(x, [5], 0, 3, 1), [(3, 3)]),
    "select_scatter": (lambda x, y: torch.select_scatter(x, y, 1, -1), [(2, 3), (2,)]),
    "slice_scatter": (lambda x, y: torch.slice_scatter(x, y, 0, 1, step=2), [(4, 2), (2, 2)]),
    "diagonal_scatter": (lambda x, y: torch.diagonal_scatter(x, y, 1), [(3, 3), (2,)]),
    "as_strided_scatter": (lambda x, y: torch.as_strided_scatter(x, y, (2, 2), (1, 2), 1), [(3, 2), (2, 2)]),
}

#: torch.func's own Jacobian is wrong (as_strided_scatter: the identity for the base) or not defined.
WITHOUT_ORACLE = {"as_strided_scatter", "copy"}
#: as_strided has no meaning for one sample of a batch; the batch's memory is laid out in another way.
WITHOUT_VMAP = {"as_strided", "as_strided overlapping", "as_strided_scatter"}


@pytest.mark.parametrize("name", CASES)
def test_first_order(name):
    function, shapes = CASES[name]
    check_first_order(function, points(*shapes), name not in WITHOUT_ORACLE)


@pytest.mark.parametrize("name", CASES)
def test_non_contiguous_inputs(name):
    function, shapes = CASES[name]
    if name in ("view", "as_strided_scatter"):
        pytest.skip("a view needs contiguous memory")
    inputs = tuple(torch.stack([x, -x], -1)[..., 0] for x in points(*shapes))
    check_first_order(function, inputs, False)


@parametrized({name: row for name, row in CASES.items() if name not in WITHOUT_ORACLE})
def test_second_order(function, shapes):
    check_second_order(function, points(*shapes))


@parametrized({name: row for name, row in CASES.items() if name not in WITHOUT_VMAP})
def test_under_vmap(function, shapes):
    check_under_vmap(function, points(*shapes))


# Structure: what the plan holds, not how long it takes.


def planned_nodes(function, x, order):
    tape = Tape(POLICY)
    slot = tape.add_input(x.clone())
    with tape.recording():
        out = function(tape.values[slot])
    request = Request("jacobian", (slot,), (tape.slots[id(out)],), order)
    (candidate,) = [c for c in plan(tape, request, ()).candidates if c.name == order]
    return candidate, postorder(candidate.nodes.values())


STRUCTURED = {
    "reshape": lambda x: x.reshape(8, 4, 5).reshape(4, 40),
    "permute": lambda x: x.permute(1, 0).reshape(2, 80),
    "slice": lambda x: x[2:, ::2],
    "slice of slice": lambda x: x[1:][:, 3:7][::2],
    "roll": lambda x: x.roll(3, 0),
    "flip": lambda x: x.flip(0, 1),
    "cat": lambda x: torch.cat([x[:2], x[2:] * 2]),
    "all": lambda x: torch.cat([x.t().reshape(16, 10).roll(1, 0)[1:5], x.flip(1).reshape(16, 10)[3:6]]).reshape(-1),
    "pad": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 4)),
    "select": lambda x: x[3],
    "diagonal": lambda x: x.diagonal(2),
    "pixel shuffle": lambda x: torch.nn.functional.pixel_shuffle(x.reshape(1, 4, 4, 10), 2),
    "slice_scatter": lambda x: torch.slice_scatter(x, x[:3] * 2, 0, 5, 8),
}


@pytest.mark.parametrize("order", ["reverse", "forward"])
@pytest.mark.parametrize("name", STRUCTURED)
def test_no_dense_product_in_the_jacobian(name, order):
    function = STRUCTURED[name]
    x = torch.linspace(0, 1, 160, dtype=torch.float64).reshape(16, 10)
    candidate, nodes = planned_nodes(function, x, order)
    labels = [node.label for node in nodes]
    assert "product" not in labels
    assert "eye" not in labels
    assert not [label for label in labels if "relation" in label]
    # Nothing but the result itself is as large as an input-by-input matrix.
    output = function(x).numel() * x.numel()
    assert candidate.flops <= 3 * output
    got = chainrule.jacrev(function)(x)
    torch.testing.assert_close(got, torch.func.jacrev(function)(x))


def test_a_diagonal_through_moves_costs_its_entries():
    """A pointwise function between moves: one number per element, written once."""
    x = torch.linspace(0, 1, 200, dtype=torch.float64)
    candidate, nodes = planned_nodes(lambda x: x.reshape(10, 20).t().sin().roll(3, 0).reshape(-1)[10:], x, "reverse")
    assert "eye" not in [node.label for node in nodes]
    assert candidate.flops <= 30 * 200 < 190 * 200


@pytest.mark.parametrize("item", [1, slice(1, 2)])
def test_as_strided_beyond_its_argument(item):
    """What is read beside the argument has no derivative, as with torch."""
    x = points((4,))[0]
    wanted = torch.func.jacrev(lambda x: (x * 1)[item].as_strided((3,), (1,), 0))(x)
    for transform in (chainrule.jacobian, chainrule.jacrev, chainrule.jacfwd):
        torch.testing.assert_close(transform(lambda x: (x * 1)[item].as_strided((3,), (1,), 0))(x), wanted)


@pytest.mark.parametrize(("shape", "shifts", "dims"), [
    ((5,), (2,), (0,)), ((4, 6), (1,), (0,)), ((4, 6), (1, -2), (0, 1)), ((3, 1, 4), (7, 1, -3), (0, 1, 2)), ((2, 3, 4), (1,), (1,)),
    ((0, 3), (1,), (1,)), ((4, 6), (4,), (0,)), ((3, 4), (1, 2), (1, 1)),
])  # fmt: skip
def test_rolls_are_pulled_back_by_reading(shape, shifts, dims):
    """A roll back reads each element at its place: nothing is added up; in every mode, and with a graph."""
    x = torch.randn(shape, dtype=torch.float64)

    def function(x):
        return x.sin().roll(shifts, dims).roll(shifts, dims).cos()

    def loss(x):
        return (function(x) ** 3).sum()

    for _ in range(4):
        out, pull = chainrule.vjp(function, x)
        cotangent = torch.randn_like(out)
        torch.testing.assert_close(pull(cotangent), torch.func.vjp(function, x)[1](cotangent))
        for transform in (chainrule.jacobian, chainrule.jacrev, chainrule.jacfwd):
            torch.testing.assert_close(transform(function)(x), torch.func.jacrev(function)(x))
        torch.testing.assert_close(chainrule.hessian(loss)(x), torch.func.hessian(loss)(x))
        both = torch.stack([x, 2 * x])
        torch.testing.assert_close(chainrule.vmap(chainrule.grad(loss))(both), torch.func.vmap(torch.func.grad(loss))(both))
        joined = x.clone().requires_grad_()
        torch.testing.assert_close(
            torch.autograd.grad((chainrule.grad(loss)(joined) ** 2).sum(), joined),
            torch.autograd.grad((torch.func.grad(loss)(joined) ** 2).sum(), joined),
        )
    calls = str(chainrule.explain(lambda x: chainrule.vjp(function, x)[1](x))(x).data)
    assert "index_add" not in calls
