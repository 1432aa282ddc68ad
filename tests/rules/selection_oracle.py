"""The checks that every row of the tables of moving and selecting ops goes through."""

from __future__ import annotations

import pytest
import torch

import chainrule

torch.set_num_threads(1)

F64 = torch.float64


def points(*shapes):
    """Inputs whose elements are all different."""
    made = []
    for number, shape in enumerate(shapes):
        count = torch.Size(shape).numel()
        made.append((torch.arange(count, dtype=F64) * 0.37 + 0.6 * number + 0.21).cos().reshape(shape) * 1.3)
    return tuple(made)


def leaves(tree):
    return torch.utils._pytree.tree_leaves(tree)


def assert_same(got, expected, **tolerances):
    got, expected = leaves(got), leaves(expected)
    assert len(got) == len(expected)
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, **tolerances)


def finite_differences(function, inputs):
    """Central differences; the step makes the error of a smooth function of size one about 1e-9."""
    step = 1e-5
    result = []
    for number, x in enumerate(inputs):
        columns = []
        for place in range(x.numel()):
            moved = []
            for sign in (1, -1):
                shifted = x.clone(memory_format=torch.contiguous_format)
                shifted.view(-1)[place] += sign * step
                moved.append(leaves(function(*inputs[:number], shifted, *inputs[number + 1 :])))
            columns.append([(a - b) / (2 * step) for a, b in zip(*moved, strict=True)])
        outputs = leaves(function(*inputs))
        for k, out in enumerate(outputs):
            stacked = torch.stack([c[k] for c in columns], -1) if columns else out.new_zeros((*out.shape, 0))
            result.append((k, number, stacked.reshape((*out.shape, *x.shape))))
    return [jacobian for _, _, jacobian in sorted(result, key=lambda item: item[:2])]


def check_first_order(function, inputs, oracle=True):
    """Three orders of accumulation against finite differences and (where it is right) torch.func."""
    numbers = tuple(range(len(inputs)))
    expected = finite_differences(function, inputs)
    for transform in (chainrule.jacrev, chainrule.jacfwd, chainrule.jacobian):
        got = transform(function, numbers)(*inputs)
        assert_same(got, expected, rtol=1e-7, atol=1e-8)
        if oracle:
            assert_same(got, torch.func.jacrev(function, numbers)(*inputs))


def check_second_order(function, inputs):
    """With nonlinear functions before and after."""

    def wrapped(*args):
        return tuple(out.sin() for out in leaves(function(*(x * x + 0.3 * x for x in args))))

    # torch.func.jacfwd(jacrev) is wrong for fill and scatter_reduce in torch 2.13; jacrev(jacrev) is right.
    expected = torch.func.jacrev(torch.func.jacrev(wrapped))(*inputs)
    assert_same(chainrule.jacfwd(chainrule.jacrev(wrapped))(*inputs), expected)
    assert_same(chainrule.jacrev(chainrule.jacfwd(wrapped))(*inputs), expected)


def check_under_vmap(function, inputs):
    """Per-sample Jacobians and directional derivatives."""
    numbers = tuple(range(len(inputs)))
    batch = tuple(torch.stack([x, x * 0.5 + 0.2]) for x in inputs)
    samples = [chainrule.jacrev(function, numbers)(*(b[k] for b in batch)) for k in range(2)]
    expected = [torch.stack(pair) for pair in zip(*(leaves(s) for s in samples), strict=True)]
    assert_same(chainrule.vmap(chainrule.jacrev(function, numbers))(*batch), expected)
    assert_same(chainrule.vmap(chainrule.jacfwd(function, numbers))(*batch), expected)


def parametrized(cases):
    return pytest.mark.parametrize(("function", "shapes"), [pytest.param(*row, id=name) for name, row in cases.items()])
