"""Nests of parameters as one vector, and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")

import chainrule  # noqa: E402
from chainrule import scipy as solvers  # noqa: E402


@pytest.mark.parametrize("tree", [
    {"a": torch.ones(2, 3), "b": [torch.tensor(2.0, dtype=torch.float64), (torch.zeros(0), torch.ones(1, dtype=torch.float16))]},
    torch.arange(6.0).view(2, 3).t(), (), torch.nn.Parameter(torch.ones(3)),
])  # fmt: skip
def test_there_and_back(tree):
    vector, restore = solvers.ravel(tree)
    assert vector.dtype == np.float64
    found, expected = (torch.utils._pytree.tree_flatten(t) for t in (restore(torch.from_numpy(vector)), tree))
    assert found[1] == expected[1]
    for one, two in zip(found[0], expected[0], strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)


@pytest.mark.parametrize(("method", "compiled"), [("BFGS", None), ("BFGS", True), ("trust-krylov", None), ("trust-exact", True)])
def test_a_module_is_fitted(method, compiled):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    x = torch.linspace(-1, 1, 12, dtype=torch.float64)[:, None]
    target = torch.tanh(2 * x) + 0.3
    start, restore = solvers.ravel(dict(model.named_parameters()))

    def loss(vector):
        return ((chainrule.functional_call(model, restore(vector), x) - target) ** 2).mean()

    before = loss(torch.from_numpy(start)).detach()
    found = solvers.minimize(loss, start, method=method, compiled=compiled, options={"maxiter": 60})
    assert found.fun < 1e-3 * before
    model.load_state_dict(restore(torch.from_numpy(found.x)))
    assert float(((model(x) - target) ** 2).mean().detach()) == pytest.approx(found.fun, rel=1e-9)


def test_errors():
    with pytest.raises(TypeError, match="got int"):
        solvers.ravel([1, 2])
    with pytest.raises(TypeError, match=r"got torch.int64"):
        solvers.ravel({"a": torch.ones(2), "b": torch.arange(2)})
    _, restore = solvers.ravel(torch.ones(3))
    with pytest.raises(ValueError, match="expected a vector of 3 values"):
        restore(torch.ones(2))
