"""Bad input gives a clear error of torch.func's type that names the transform, and the next call works."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import chainrule
from chainrule import grad, grad_and_value, hessian, jacfwd, jacobian, jacrev, jvp, linearize, vjp, vmap

X = torch.arange(3.0, dtype=torch.float64)
JACOBIANS = (jacrev, jacfwd, jacobian, hessian)


def square(x: Any) -> Any:
    return x * x


def raises(kind: type[Exception], call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    # state intact: the next call works
    assert torch.equal(jacrev(square)(X), torch.diag(2 * X))
    assert torch.equal(vmap(square)(X), X * X)
    assert torch._C._len_torch_dispatch_stack() == 0


@pytest.mark.parametrize("transform", [*JACOBIANS, grad, grad_and_value])
@pytest.mark.parametrize(
    ("argnums", "words"),
    [(5, ("argnum=5", "1 positional")), (-2, ("argnum=-2",)), ((), ("non-empty",)), ((0, 0), ("unique",)), ("0", ("int",)), (1.0, ("int",))],
)
def test_argnums(transform: Any, argnums: Any, words: tuple[str, ...]) -> None:
    name = transform.__name__
    raises(RuntimeError, lambda: transform(lambda x: square(x).sum(), argnums=argnums)(X), name, *words)


@pytest.mark.parametrize("transform", [*JACOBIANS, grad])
def test_inputs_that_are_not_differentiable(transform: Any) -> None:
    name = transform.__name__
    raises(ValueError, lambda: transform(lambda x: X.sum() * x)(2.0), name, "float")
    raises(ValueError, lambda: transform(lambda x: X.sum())(None), name, "NoneType")
    kind = ValueError if transform in (jacfwd, hessian) else RuntimeError  # torch.func's forward mode has the former
    raises(kind, lambda: transform(lambda x: x.sum() * 1.0)(torch.arange(3)), name, "int64")


@pytest.mark.parametrize("transform", JACOBIANS)
@pytest.mark.parametrize("output", [None, (), 1.0, "text", [X, 3]])
def test_outputs_that_are_no_tensors(transform: Any, output: Any) -> None:
    raises(RuntimeError, lambda: transform(lambda x: output)(X), transform.__name__)


@pytest.mark.parametrize("transform", [jacrev, jacobian, hessian])
def test_integer_outputs(transform: Any) -> None:
    raises(RuntimeError, lambda: transform(lambda x: x.long())(X), "int64")


@pytest.mark.parametrize("transform", JACOBIANS)
def test_complex_is_refused_by_jacobians(transform: Any) -> None:
    raises(RuntimeError, lambda: transform(square)(X + 0j), transform.__name__, "complex")
    raises(RuntimeError, lambda: transform(lambda x: x + 0j)(X), transform.__name__, "complex")


@pytest.mark.parametrize("transform", [*JACOBIANS, grad, grad_and_value])
def test_aux_without_a_pair(transform: Any) -> None:
    raises(RuntimeError, lambda: transform(lambda x: x.sum(), has_aux=True)(X), transform.__name__, "has_aux")


@pytest.mark.parametrize("transform", JACOBIANS)
@pytest.mark.parametrize("size", [0, -1])
def test_chunk_size(transform: Any, size: int) -> None:
    raises(ValueError, lambda: transform(square, chunk_size=size), transform.__name__, "chunk_size")


@pytest.mark.parametrize("transform", [*JACOBIANS, chainrule.vmap])
@pytest.mark.parametrize("size", [1.5, "x", [2], True])
def test_chunk_size_is_whole(transform: Any, size: Any) -> None:
    raises(TypeError, lambda: transform(square, chunk_size=size), transform.__name__, "chunk_size", "int", repr(size))


def test_grad_needs_a_real_scalar() -> None:
    raises(RuntimeError, lambda: grad(square)(X), "grad", "scalar", "(3,)")
    raises(RuntimeError, lambda: grad(lambda x: x[:1])(X), "scalar")
    raises(RuntimeError, lambda: grad(lambda x: 2.0)(X), "grad")
    raises(RuntimeError, lambda: grad(lambda x: (x.sum(), x.sum()))(X), "grad")
    raises(RuntimeError, lambda: grad(lambda x: (x + 0j).sum())(X), "real")


def test_cotangents() -> None:
    _, pull = vjp(lambda x: (x, x), X)
    raises(RuntimeError, lambda: pull(X), "vjp", "structure")
    raises(RuntimeError, lambda: pull((X, X[:2])), "vjp", "(2,)", "(3,)")
    raises(RuntimeError, lambda: pull((X, 1.0)), "vjp", "float")
    raises(RuntimeError, lambda: pull((X, X.to("meta"))), "vjp", "meta")
    raises(RuntimeError, lambda: vjp(lambda x: x.long(), X), "vjp", "int64")
    raises(RuntimeError, lambda: pull((X + 1j, X)), "vjp", "cotangent 0", "complex128", "float64")
    raises(RuntimeError, lambda: pull(X, X), "vjp", "structure")  # one argument, as in torch.func
    raises(RuntimeError, lambda: pull([X, X]), "vjp", "structure")
    raises(TypeError, lambda: pull(), "cotangents")
    raises(RuntimeError, lambda: vjp(square, torch.arange(3)), "vjp", "int64")
    (result,) = pull((X.float(), X), retain_graph=False)  # another floating dtype is cast, as in torch.func
    assert result.dtype == torch.float64


def test_tangents() -> None:
    raises(RuntimeError, lambda: jvp(square, [X], [X]), "jvp", "tuple")
    raises(RuntimeError, lambda: jvp(square, X, X), "jvp", "tuple")
    raises(RuntimeError, lambda: jvp(square, (X,), (X, X)), "jvp", "structure")
    raises(RuntimeError, lambda: jvp(square, (X,), (X[:2],)), "jvp", "(2,)", "(3,)")
    raises(RuntimeError, lambda: jvp(square, (X,), (X.to("meta"),)), "jvp", "meta")
    raises(RuntimeError, lambda: jvp(lambda x: torch.ones(2), (X,), (X,), strict=True), "independent")
    raises(RuntimeError, lambda: jvp(square, (2.0,), (1.0,)), "jvp", "float")
    raises(RuntimeError, lambda: jvp(square, (X,), (1.0,)), "jvp", "tangent 0", "float")
    raises(RuntimeError, lambda: jvp(square, (X,), (X + 1j,)), "jvp", "tangent 0", "complex128", "float64")
    raises(ValueError, lambda: jvp(square, (X,), (torch.arange(3),)), "jvp", "tangent 0", "int64")
    raises(ValueError, lambda: jvp(square, (torch.arange(3),), (torch.arange(3),)), "jvp", "int64")
    raises(RuntimeError, lambda: jvp(lambda: X, (), ()), "jvp", "at least one")
    _, tangent = jvp(square, (X,), (X.float(),))  # another floating dtype is cast, as in torch.func
    assert tangent.dtype == torch.float64
    raises(RuntimeError, lambda: linearize(square, X)[1](X, X), "linearize", "structure")
    raises(RuntimeError, lambda: linearize(square, X)[1](X[:2]), "linearize", "(2,)", "(3,)")
    raises(RuntimeError, lambda: linearize(square, X)[1](X.float()), "linearize", "float32", "float64")
    raises(RuntimeError, lambda: linearize(square, X)[1](X.to("meta")), "linearize", "meta")
    raises(ValueError, lambda: linearize(square, torch.arange(3)), "linearize", "int64")


def test_products_with_the_hessian_name_themselves() -> None:
    def cube(x: torch.Tensor) -> torch.Tensor:
        return (x**3).sum()

    raises(RuntimeError, lambda: chainrule.hvp(cube, X, X), "hvp", "tuple")
    raises(RuntimeError, lambda: chainrule.vhp(cube, X, X), "vhp", "tuple")
    raises(RuntimeError, lambda: chainrule.hvp(cube, (X,), (X, X)), "hvp", "tangents", "structure")
    raises(RuntimeError, lambda: chainrule.vhp(cube, (X,), (X, X)), "vhp", "cotangents", "structure")
    raises(RuntimeError, lambda: chainrule.hvp(cube, (X,), (X[:2],)), "hvp", "(2,)", "(3,)")
    raises(ValueError, lambda: chainrule.hvp(cube, (torch.arange(3),), (X,)), "hvp", "int64")


BAD_CALLS: dict[str, Callable[[Any], Any]] = {
    **{
        f"{name}: {what}": lambda m, name=name, call=call: call(getattr(m, name))
        for name in ("grad", "grad_and_value", "jacrev", "jacfwd", "hessian")
        for what, call in {
            "integer input": lambda t: t(lambda x: x.sum() * 1.0)(torch.arange(3)),
            "nothing returned": lambda t: t(lambda x: None)(X),
            "number returned": lambda t: t(lambda x: 1.0)(X),
            "no arguments": lambda t: t(lambda: X.sum())(),
            "argnums out of range": lambda t: t(square, argnums=3)(X),
            "argnums empty": lambda t: t(square, argnums=())(X),
            "argnums repeated": lambda t: t(square, argnums=(0, 0))(X),
            "argnums of text": lambda t: t(square, argnums="0")(X),
        }.items()
    },
    "jacrev: integer output": lambda m: m.jacrev(lambda x: x.long())(X),
    "jacrev: chunk_size": lambda m: m.jacrev(square, chunk_size=0)(X),
    "jacrev: aux": lambda m: m.jacrev(lambda x: (x, x, x), has_aux=True)(X),
    "jacrev: aux in a list": lambda m: m.jacrev(lambda x: [x, x], has_aux=True)(X),
    "jacfwd: randomness": lambda m: m.jacfwd(square, randomness="some")(X),
    "vjp: integer input": lambda m: m.vjp(square, torch.arange(3)),
    "vjp: structure": lambda m: m.vjp(lambda x: (x, x), X)[1](X),
    "vjp: shape": lambda m: m.vjp(square, X)[1](X[:2]),
    "vjp: complex cotangent": lambda m: m.vjp(square, X)[1](X + 1j),
    "vjp: no cotangent": lambda m: m.vjp(square, X)[1](),
    "jvp: integer input": lambda m: m.jvp(square, (torch.arange(3),), (X,)),
    "jvp: integer tangent": lambda m: m.jvp(square, (X,), (torch.arange(3),)),
    "jvp: number": lambda m: m.jvp(square, (2.0,), (1.0,)),
    "jvp: shape": lambda m: m.jvp(square, (X,), (X[:2],)),
    "jvp: strict": lambda m: m.jvp(lambda x: torch.ones(2), (X,), (X,), strict=True),
    "linearize: integer input": lambda m: m.linearize(square, torch.arange(3)),
    "linearize: dtype": lambda m: m.linearize(square, X)[1](X.float()),
    "linearize: shape": lambda m: m.linearize(square, X)[1](X[:2]),
    "vmap: sizes": lambda m: m.vmap(torch.add)(X, X[:2]),
    "vmap: nothing mapped": lambda m: m.vmap(square, in_dims=None)(X),
    "vmap: no inputs": lambda m: m.vmap(lambda: X)(),
    "vmap: out_dims": lambda m: m.vmap(square, out_dims=3)(X),
    "vmap: number returned": lambda m: m.vmap(lambda x: 3)(X),
    "vmap: chunk_size": lambda m: m.vmap(square, chunk_size=0)(X),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_exception_types_are_those_of_torch_func(name: str) -> None:
    with warnings.catch_warnings(), pytest.raises(Exception) as theirs:
        warnings.simplefilter("ignore")  # torch.func.linearize traces, and warns on the way
        BAD_CALLS[name](torch.func)
    raises(theirs.type, lambda: BAD_CALLS[name](chainrule))


def test_integer_outputs_where_torch_func_has_zeros() -> None:
    for name in ("grad", "jacfwd"):
        ours = getattr(chainrule, name)(lambda x: x.long().sum())(X)
        theirs = getattr(torch.func, name)(lambda x: x.long().sum())(X)
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype


def test_vmap_arguments() -> None:
    raises(ValueError, lambda: vmap(torch.add)(X, X[:2]), "vmap", "3", "2")
    raises(ValueError, lambda: vmap(square, in_dims=1)(X), "vmap")
    raises(ValueError, lambda: vmap(square, in_dims=[0])(X), "in_dims")
    raises(ValueError, lambda: vmap(lambda: X)(), "no inputs")
    raises(ValueError, lambda: vmap(lambda x: 3)(X), "vmap", "int")
    raises(RuntimeError, lambda: vmap(square, randomness="some"), "randomness")
    raises(RuntimeError, lambda: vmap(lambda x: x if x > 0 else -x)(X), "vmap")
    raises(RuntimeError, lambda: vmap(lambda x: x * x.item())(X), "vmap", "item")
    raises(RuntimeError, lambda: vmap(lambda x: torch.randn(2) + x)(X), "vmap", "random")


@pytest.mark.parametrize("transform", [*JACOBIANS, grad, vmap])
def test_an_exception_in_the_function_surfaces_as_itself(transform: Any) -> None:
    class Own(Exception):
        pass

    def failing(x: torch.Tensor) -> torch.Tensor:
        torch.sin(x)
        raise Own("mine")

    raises(Own, lambda: transform(failing)(X), "mine")


def test_a_chainrule_transform_inside_torch_func_is_refused() -> None:
    raises(RuntimeError, lambda: torch.func.grad(lambda x: grad(lambda y: (y * x).sum())(X).sum())(X), "torch.func")
    raises(RuntimeError, lambda: torch.func.vmap(jacrev(square))(X[None]), "torch.func")
    raises(RuntimeError, lambda: torch.func.jacrev(vmap(square))(X), "vmap", "torch.func")


def test_names_of_partials_do_not_print_tensors() -> None:
    bound = functools.partial(lambda w, x: w * x, torch.zeros(50))
    with pytest.raises(RuntimeError) as caught:
        grad(bound)(torch.ones(50))
    assert "0., 0." not in str(caught.value)


def test_zero_size_tensors_are_fine() -> None:
    empty = torch.zeros(0, dtype=torch.float64)
    for transform in (jacrev, jacfwd, jacobian):
        assert transform(square)(empty).shape == (0, 0)
        assert transform(lambda x: x.sum())(empty).shape == (0,)
    assert hessian(lambda x: (x**2).sum())(empty).shape == (0, 0)
    assert grad(lambda x: (x**2).sum())(empty).shape == (0,)
    assert chainrule.hvp(lambda x: (x**2).sum(), (empty,), (empty,)).shape == (0,)
