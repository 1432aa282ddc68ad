"""To append to tests/capture/test_assignments.py together with writes_0d_mask.patch."""

import pytest
import torch
import torch.distributions as D
from torch import Tensor

import chainrule


@pytest.mark.parametrize("value", [1.0, -1.0])
@pytest.mark.parametrize("written", [lambda x: x.sin(), lambda x: x[x > 0] ** 2, lambda x: 3.0, lambda x: x.detach()])
def test_a_mask_without_dimensions(value, written):
    def function(x: Tensor) -> Tensor:
        made = x.clone()
        made[x > 0] = written(x)
        return made * x

    for _ in range(4):
        x = torch.tensor(value, dtype=torch.float64) + 0.1 * torch.rand((), dtype=torch.float64)
        torch.testing.assert_close(chainrule.jacobian(function)(x), torch.func.jacrev(function)(x))


def test_divergence_of_single_distributions():
    def function(x: Tensor) -> Tensor:
        return D.kl_divergence(D.Bernoulli(logits=x[0]), D.Bernoulli(logits=x[1])) + D.StudentT(x[2].exp() + 3, x[3]).stddev

    for _ in range(4):
        x = torch.randn(4, dtype=torch.float64)
        torch.testing.assert_close(chainrule.grad(function)(x), torch.func.grad(function)(x))
        torch.testing.assert_close(chainrule.hessian(function)(x), torch.func.hessian(function)(x))
