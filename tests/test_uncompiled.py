"""Functions that torch.compile wraps, inside of transforms."""

from __future__ import annotations

import pytest
import torch

import chainrule

X = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


def _plain(x):
    return x.sin() * 2


TRANSFORMS = {
    "jacrev": chainrule.jacrev,
    "jacfwd": chainrule.jacfwd,
    "vmap": chainrule.vmap,
    "grad": lambda f: chainrule.grad(lambda x: f(x).sum()),
    "hessian": lambda f: chainrule.hessian(lambda x: f(x).sum()),
    "vmap(grad)": lambda f: chainrule.vmap(chainrule.grad(f)),
    "vjp": lambda f: lambda x: chainrule.vjp(f, x)[1](torch.ones_like(x))[0],
    "compile": lambda f: chainrule.compile(chainrule.jacrev(f)),
}


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_compiled_function(name, fullgraph):
    compiled = torch.compile(lambda x: x.sin() * 2, backend="eager", fullgraph=fullgraph)
    transform = TRANSFORMS[name]
    expected = transform(_plain)(X)
    for _ in range(3):
        torch.testing.assert_close(transform(compiled)(X), expected)
        torch.testing.assert_close(transform(lambda x: compiled(x))(X), expected)


def test_a_compiled_module():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh()).double()
    compiled = torch.compile(module, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(chainrule.jacrev(compiled)(X), chainrule.jacrev(module)(X))


def test_it_is_compiled_outside_of_transforms():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: x.cos() * 3, backend=backend)
    torch.testing.assert_close(chainrule.grad(lambda x: compiled(x).sum())(X), -3 * X.sin())
    assert not graphs
    torch.testing.assert_close(compiled(X), 3 * X.cos())
    assert len(graphs) == 1
    torch.testing.assert_close(chainrule.grad(lambda x: compiled(x).sum())(X), -3 * X.sin())
    torch.testing.assert_close(compiled(X), 3 * X.cos())
    assert len(graphs) == 1


def test_a_users_stance_stays():
    compiled = torch.compile(lambda x: x.exp() * 3, backend="eager")
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(chainrule.grad(lambda x: compiled(x).sum())(X), 3 * X.exp())
        with pytest.raises(RuntimeError, match="Detected recompile"):
            compiled(X)
    torch.testing.assert_close(compiled(X), 3 * X.exp())
