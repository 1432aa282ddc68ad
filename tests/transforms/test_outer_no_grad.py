"""Under an outer ``torch.no_grad()`` results have no graph, mapped or not; forward transforms around it see through it."""

import pytest
import torch

import chainrule

F64 = torch.float64

INNER = {
    "grad": lambda m, w: m.grad(lambda x: (x.sin() * w).sum()),
    "grad_and_value": lambda m, w: m.grad_and_value(lambda x: (x.sin() * w).sum()),
    "vjp": lambda m, w: lambda x: (lambda out, pull: (out * 2, *pull(out)))(*m.vjp(lambda x: x.sin() * w, x)),
    "jvp": lambda m, w: lambda x: m.jvp(lambda x: x.sin() * w, (x,), (x,)),
    "jacfwd": lambda m, w: lambda x: (m.jacfwd(lambda x: x.sin() * w)(x),),
    "has_aux": lambda m, w: m.grad(lambda x: ((x.sin() * w).sum(), x.cos()), has_aux=True),
}


def _points(parameters):
    x = torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    w = torch.randn(2, dtype=F64, generator=torch.Generator().manual_seed(1))
    return x.requires_grad_("x" in parameters), w.requires_grad_("w" in parameters)


@pytest.mark.parametrize("parameters", ["x", "w", "xw"])
@pytest.mark.parametrize("name", INNER)
def test_results_have_no_graph(name, parameters):
    x, w = _points(parameters)
    with torch.no_grad():
        expected = torch.func.vmap(INNER[name](torch.func, w))(x)
        for _ in range(3):
            for mapped, points in ((chainrule.vmap(INNER[name](chainrule, w)), x),
                                   (chainrule.vmap(chainrule.vmap(INNER[name](chainrule, w))), x[None])):
                found = torch.utils._pytree.tree_leaves(mapped(points))
                assert not any(leaf.requires_grad for leaf in found)
                for leaf, wanted in zip(found, torch.utils._pytree.tree_leaves(expected), strict=True):
                    torch.testing.assert_close(leaf.reshape(wanted.shape), wanted)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("name", INNER)
def test_transforms_around_see_what_torch_sees(name, mapped):
    """Reverse mode takes what runs under no_grad for constant, forward mode does not, whether the input requires grad or not."""
    def outer(m, transform, x, w):
        def function(x):
            inner = INNER[name](m, w)
            with torch.no_grad():
                return tuple(m.vmap(inner)(x) if mapped else inner(x[0]))

        return getattr(m, transform)(function)(x)

    for parameters in ("", "x"):
        x, w = _points(parameters)
        for transform in ("jacfwd", "jacrev"):
            expected = torch.utils._pytree.tree_leaves(outer(torch.func, transform, x, w))
            for _ in range(2):
                found = torch.utils._pytree.tree_leaves(outer(chainrule, transform, x, w))
                for leaf, wanted in zip(found, expected, strict=True):
                    torch.testing.assert_close(leaf.detach(), wanted.detach())
