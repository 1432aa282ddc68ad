"""Reductions of consecutive rows against torch's own autograd and the dense form."""

import pytest
import torch

import chainrule

D = torch.float64
LENGTHS = torch.tensor([2, 0, 3, 1])


def _summed(x, reduce):
    """By a loop over the segments; an empty one has the reduction's own value, which no input changes."""
    parts = []
    for part in x.split(LENGTHS.tolist()):
        if not len(part):
            parts.append(torch.zeros_like(x[0]))
        elif reduce in ("max", "min"):
            parts.append(getattr(part, f"a{reduce}")(0))
        else:
            parts.append(getattr(part, reduce)(0))
    return torch.stack(parts)


@pytest.mark.parametrize("marks", ["lengths", "offsets"])
@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 2, 2)])
@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "min", "prod"])
def test_segments(reduce, shape, marks):
    x = torch.randn(shape, dtype=D)
    given = {"lengths": LENGTHS} if marks == "lengths" else {"offsets": torch.tensor([0, 2, 2, 5, 6])}

    def function(x):
        found = torch.segment_reduce(x.sin(), reduce, **given)
        return torch.where((LENGTHS > 0).reshape(-1, *(1,) * (x.dim() - 1)), found, 0.0)

    def plain(x):
        return _summed(x.sin(), reduce)

    expected = torch.func.jacrev(plain)(x)
    tangent = torch.randn(shape, dtype=D)
    for _ in range(2):
        for transform in (chainrule.jacobian, chainrule.jacrev, chainrule.jacfwd):
            torch.testing.assert_close(transform(function)(x), expected)
        torch.testing.assert_close(chainrule.jvp(function, (x,), (tangent,))[1], torch.func.jvp(plain, (x,), (tangent,))[1])
        if reduce != "prod":
            found = chainrule.hessian(lambda x: function(x).square().sum())(x)
            torch.testing.assert_close(found, torch.func.hessian(lambda x: plain(x).square().sum())(x))


def test_ties_share():
    x = torch.tensor([1.0, 1.0, 0.5, 2.0, 2.0, 2.0], dtype=D)
    function = lambda x: torch.segment_reduce(x, "max", lengths=torch.tensor([3, 3]))  # noqa: E731
    share = torch.tensor([[0.5, 0.5, 0, 0, 0, 0], [0, 0, 0, 1 / 3, 1 / 3, 1 / 3]], dtype=D)
    torch.testing.assert_close(chainrule.jacobian(function)(x), share)
    leaf = x.clone().requires_grad_()
    function(leaf).sum().backward()
    torch.testing.assert_close(chainrule.grad(lambda x: function(x).sum())(x), leaf.grad)


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_the_pattern_is_that_of_the_segments(reduce):
    x = torch.randn(6, dtype=D)
    for lengths in (torch.tensor([2, 3, 1]), torch.tensor([1, 1, 4]), torch.tensor([2, 3, 1])):
        function = lambda x, n=lengths: torch.segment_reduce(x, reduce, lengths=n)  # noqa: E731
        found = chainrule.jacobian(function, layout="sparse_coo")(x)
        assert found._nnz() <= 6 if reduce == "max" else found._nnz() == 6  # an extremum chooses, until others were chosen twice
        torch.testing.assert_close(found.to_dense(), chainrule.jacobian(function)(x))
        expected = torch.stack([torch.autograd.grad(function(leaf := x.clone().requires_grad_())[row], leaf)[0] for row in range(3)])
        torch.testing.assert_close(found.to_dense(), expected)
