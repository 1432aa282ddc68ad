"""The Jacobian as an object: one suite that maps of every kind, and maps made of them, go through.

The oracle is the dense matrix by torch.func. Tolerances: an entry of a result is a sum of at most n products of at most five
factors, so that its error is bounded by a small multiple of n·eps times the product of their sizes; `close` allows
64·n·eps times the largest entry (at least one).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

import chainrule
from chainrule import LinearMap, linear_map
from tests.transforms.map_kinds import KERNEL, WEIGHT, Kind, flat, make_kinds, matrix_of, network, randn

Tensor = torch.Tensor

KINDS = list(make_kinds())


def kind_of(name: str) -> Kind:
    torch.manual_seed(len(name))
    return make_kinds()[name]


def close(found: Any, expected: Tensor, size: int = 64) -> None:
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    tolerance = 64 * max(size, 8) * torch.finfo(expected.dtype).eps * scale
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def vector_in(space: Any, *columns: int) -> tuple[Any, Tensor]:
    """A random element of a space (or several), as a tree and flattened."""
    vector = torch.randn(space.size, *columns, dtype=space.dtype)
    return space.tree(space.unflatten(vector)), vector


def flat_columns(tree: Any, *columns: int) -> Tensor:
    return torch.cat([leaf.flatten(0, leaf.dim() - 1 - len(columns)) if leaf.dim() > len(columns) else leaf[None] for leaf in pytree.tree_leaves(tree)])


def check_products(J: LinearMap, matrix: Tensor) -> None:  # noqa: N803
    assert J.shape == tuple(matrix.shape) and J.dtype == matrix.dtype
    for of, dense in ((J, matrix), (J.T, matrix.T), (J.mT, matrix.T)):
        for columns in ((), (3,), (1,), (0,)):
            tree, vector = vector_in(of.in_space, *columns)
            for _ in range(2):  # the second time replays
                product = of @ tree
                assert pytree.tree_map(lambda leaf: leaf.shape, product) == pytree.tree_map(
                    lambda shape, c=columns: torch.Size([*shape, *c]), of.out_shape, is_leaf=lambda s: isinstance(s, torch.Size)
                )
                close(flat_columns(product, *columns), dense @ vector, max(dense.shape))
        for rows in ((), (3,), (1,), (0,), (of.shape[0],)):  # on the left they are the rows of a matrix, square ones, too
            stacked = torch.randn(*rows, of.shape[0], dtype=of.out_space.dtype)
            behind = of.out_space.unflatten(stacked.movedim(0, -1) if rows else stacked)
            left = of.out_space.tree([leaf.movedim(-1, 0) if rows else leaf for leaf in behind])
            found = pytree.tree_leaves(left @ of)
            close(torch.cat([leaf.reshape(*rows, size) for leaf, size in zip(found, of.in_space.sizes, strict=True)], -1), stacked @ dense, max(dense.shape))
            close(flat_columns(of.matmat(tree) if columns else of.matvec(tree), *columns), dense @ vector, max(dense.shape))


def check_dense(J: LinearMap, matrix: Tensor) -> None:  # noqa: N803
    close(J.dense(flat=True), matrix)
    close(J.T.dense(flat=True), matrix.T)
    blocks = pytree.tree_leaves(J.dense())
    assert len(blocks) == len(J.out_space.shapes) * len(J.in_space.shapes)
    for number, block in enumerate(blocks):
        o, i = divmod(number, len(J.in_space.shapes))
        assert block.shape == (*J.out_space.shapes[o], *J.in_space.shapes[i])
        rows = slice(sum(J.out_space.sizes[:o]), sum(J.out_space.sizes[: o + 1]))
        columns = slice(sum(J.in_space.sizes[:i]), sum(J.in_space.sizes[: i + 1]))
        close(block.reshape(J.out_space.sizes[o], J.in_space.sizes[i]), matrix[rows, columns])
    close(J.sparse(flat=True).to_dense(), matrix)
    sparse = pytree.tree_leaves(J.sparse())
    for part, block in zip(sparse, blocks, strict=True):
        assert part.layout is torch.sparse_coo and part.is_coalesced()
        close(part.to_dense(), block)
    close(J.norm(), matrix.norm(), matrix.numel())


def check_parts(J: LinearMap, matrix: Tensor) -> None:  # noqa: N803
    m, n = matrix.shape
    if not m or not n:
        assert J.rows([]) is not None and J.columns([]) is not None
        return
    some, others = torch.randint(-m, m, (4,)), torch.randint(-n, n, (4,))
    stacked = torch.cat([leaf.reshape(4, math.prod(leaf.shape[1:])) for leaf in pytree.tree_leaves(J.rows(some))], 1)
    close(stacked, matrix[some])
    close(torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(J.rows(m - 1))]), matrix[-1])
    close(flat_columns(J.columns(others), 4), matrix[:, others])
    close(flat_columns(J.columns(0)), matrix[:, 0])
    close(J.block(some, others), matrix[some][:, others])
    close(J[some, others], matrix[some, others])
    close(J[-1, 0], matrix[-1, 0])


@pytest.mark.parametrize("name", ["dense", "trees", "parameters", "element-wise 2-d", "scalar"])
def test_indexing(name: str) -> None:
    function, primals = kind_of(name)
    J, matrix = linear_map(function, *primals), matrix_of(function, primals)
    m, n = matrix.shape
    some, others = torch.randint(-m, m, (4,)), torch.randint(-n, n, (4,))
    for key in (0, -1, slice(None), slice(0, m, 2), some, some.tolist()):
        close(J[key], matrix[key])
        close(J[key, n - 1], matrix[key, n - 1])
        close(J[key, 1:], matrix[key, 1:])
        close(J.T[key if n == m else 0], matrix.T[key if n == m else 0])
    close(J[:, others], matrix[:, others])
    for key in (..., (..., 0), (0, ...), (..., others), (some, ...), (0, ..., 0)):
        close(J[key], matrix[key])
    mask = torch.rand(m) > 0.5
    close(J[mask], matrix[mask])
    close(J[range(m)], matrix)
    close(J[::-1], matrix.flip(0))
    close(J.block([0], []), matrix[:1, :0])


def check_diagonal(J: LinearMap, matrix: Tensor) -> None:  # noqa: N803
    if J.in_space.shapes != J.out_space.shapes:
        with pytest.raises(ValueError, match="diagonal: needs a map of a space to itself"):
            J.diagonal()
        with pytest.raises(ValueError, match="trace: needs a map of a space to itself"):
            J.trace()
        return
    close(flat(J.diagonal()), matrix.diagonal())
    close(J.trace(), matrix.trace(), matrix.shape[0])


def check_structure(J: LinearMap, matrix: Tensor) -> None:  # noqa: N803
    account = J.structure()
    assert len(account.blocks) == len(J.out_space.shapes) * len(J.in_space.shapes)
    assert f"{matrix.shape[0]}×{matrix.shape[1]}" in str(account)
    assert account.dense_bytes == matrix.numel() * matrix.element_size()


def check_all(J: LinearMap, matrix: Tensor) -> None:  # noqa: N803
    check_products(J, matrix)
    check_dense(J, matrix)
    check_parts(J, matrix)
    check_diagonal(J, matrix)
    check_structure(J, matrix)


@pytest.mark.parametrize("name", KINDS)
def test_jacobian(name: str) -> None:
    function, primals = kind_of(name)
    check_all(linear_map(function, *primals), matrix_of(function, primals))


@pytest.mark.parametrize("name", KINDS)
def test_transpose(name: str) -> None:
    function, primals = kind_of(name)
    J = linear_map(function, *primals)
    check_all(J.T, matrix_of(function, primals).T)
    assert J.T.T is J


@pytest.mark.parametrize("name", KINDS)
def test_gram(name: str) -> None:
    function, primals = kind_of(name)
    matrix = matrix_of(function, primals)
    gram = linear_map(function, *primals).gram()
    assert gram.symmetric and gram.T is gram
    check_all(gram, matrix @ matrix.T)


@pytest.mark.parametrize("name", KINDS)
def test_normal(name: str) -> None:
    function, primals = kind_of(name)
    matrix = matrix_of(function, primals)
    check_all(linear_map(function, *primals).normal(), matrix.T @ matrix)


@pytest.mark.parametrize("name", KINDS)
def test_sums_and_multiples(name: str) -> None:
    function, primals = kind_of(name)
    matrix = matrix_of(function, primals)
    J = linear_map(function, *primals)
    K = linear_map(function, *pytree.tree_map(lambda t: t + 0.5, primals))
    other = matrix_of(function, pytree.tree_map(lambda t: t + 0.5, primals))
    factor = torch.tensor(-1.5, dtype=J.dtype)
    check_all(2 * J - factor * K, 2 * matrix + 1.5 * other)
    check_all(-(J / 4) + J, 0.75 * matrix)


def curve(*leaves: Tensor) -> Any:
    """Couples neighbours in the first leaf; element-wise in the others."""
    first = leaves[0]
    mixed = torch.roll(first.reshape(-1), 1).reshape(first.shape) * first
    return (mixed, *(torch.sin(leaf) for leaf in leaves[1:]))


@pytest.mark.parametrize("name", KINDS)
def test_composition(name: str) -> None:
    """With a map from another run: the two records are planned as one."""
    function, primals = kind_of(name)
    J = linear_map(function, *primals)

    def after(output: Any) -> Any:
        leaves, spec = pytree.tree_flatten(output)
        return pytree.tree_unflatten(list(curve(*leaves)), spec)

    output = pytree.tree_map(lambda t: t.detach().clone(), J.output)
    matrix = matrix_of(after, (output,)) @ matrix_of(function, primals)
    product = linear_map(after, output) @ J
    check_all(product, matrix)
    check_all(J.T @ linear_map(after, output).normal() @ J, matrix.T @ matrix)


SMOOTH = [name for name in KINDS if name not in ("float32", "trees", "empty output", "constant")]


@pytest.mark.parametrize("name", SMOOTH)
def test_finite_differences(name: str) -> None:
    """A second oracle. Central differences with h = 1e-5 err by h² times third derivatives and by eps/h: below 1e-8 here."""
    function, primals = kind_of(name)
    J = linear_map(function, *primals)
    tree, vector = vector_in(J.in_space)
    arguments = (tree,) if len(primals) == 1 else tree

    def moved(step: float) -> Tensor:
        return flat(function(*pytree.tree_map(lambda x, v: x + step * v, primals, tuple(arguments))))

    expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
    scale = max(1.0, float(vector.norm())) ** 3
    torch.testing.assert_close(flat(J @ tree), expected, rtol=1e-7, atol=1e-8 * scale)


SCALARS: dict[str, Callable[..., Tensor]] = {
    "separable": lambda x: (x**3).sum(),
    "chain": lambda x: ((x[1:] - x[:-1] ** 2) ** 2).sum() + torch.sin(x).sum(),
    "dense": lambda x: torch.exp(torch.tanh(WEIGHT @ x)).sum(),
    "linear": lambda x: x.sum() * 2,
    "constant": lambda x: torch.ones((), dtype=x.dtype),
    "convolution": lambda x: (torch.nn.functional.conv1d(x[None, None], KERNEL) ** 4).sum(),
    "norm": lambda x: torch.linalg.vector_norm(x) * x[0],
}


@pytest.mark.parametrize("name", SCALARS)
def test_hessian(name: str) -> None:
    torch.manual_seed(1)
    function, x = SCALARS[name], randn(6)
    H = chainrule.hessian(function, layout="operator")(x)
    matrix: Tensor = torch.func.hessian(function)(x)
    assert isinstance(H, LinearMap) and H.symmetric and H.T is H
    check_all(H, matrix)
    check_all(H, matrix)
    close(H.output, torch.func.grad(function)(x))
    check_all(2.0 * H + linear_map(torch.square, x), 2 * matrix + torch.diag(2 * x))


def test_symmetric_maps_of_scalar_leaves() -> None:
    a, b = torch.tensor(2.0, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    hessian = chainrule.hessian(lambda a, b: a * a * b, argnums=(0, 1), layout="operator")(a, b)
    torch.testing.assert_close(hessian.dense(flat=True), torch.tensor([[6.0, 4.0], [4.0, 0.0]], dtype=torch.float64))
    assert torch.stack([torch.stack(row) for row in hessian.dense()]).equal(hessian[:, :])
    gram = chainrule.linear_map(lambda a: (a * 2, a * a), a).gram()
    torch.testing.assert_close(gram.dense(flat=True), torch.tensor([[4.0, 8.0], [8.0, 16.0]], dtype=torch.float64))


def test_hessian_of_trees() -> None:
    torch.manual_seed(0)
    p, x = make_kinds()["two arguments"].primals

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return (network(p, x) ** 3).sum()

    leaves, spec = pytree.tree_flatten(((p, x),))
    flat_loss = lambda v: loss(  # noqa: E731
        *pytree.tree_unflatten([a.reshape(t.shape) for a, t in zip(v.split([t.numel() for t in leaves]), leaves, strict=True)], spec)[0]
    )
    matrix = torch.func.hessian(flat_loss)(flat((p, x)))
    H, aux = chainrule.hessian(lambda p, x: (loss(p, x), "aux"), argnums=(0, 1), layout="operator", has_aux=True)(p, x)
    assert aux == "aux"
    check_all(H, matrix)
    single = chainrule.hessian(loss, argnums=0, layout="operator")(p, x)
    assert set(single.in_shape) == {"first", "bias", "second"}


@pytest.mark.parametrize("transform", [chainrule.jacobian, chainrule.jacrev, chainrule.jacfwd])
def test_layout(transform: Any) -> None:
    x = randn(6)
    J = transform(lambda x: torch.tanh(WEIGHT @ x), layout="operator")(x)
    close(J.dense(), torch.func.jacrev(lambda x: torch.tanh(WEIGHT @ x))(x))
    J, aux = transform(lambda y, x: (torch.tanh(WEIGHT @ x) * y, 3), argnums=(1,), layout="operator", has_aux=True)(2.0, x)
    assert aux == 3 and isinstance(J.in_shape, tuple) and len(J.in_shape) == 1
    for options in ({"chunk_size": 2}, {"progress": True}):
        with pytest.raises(ValueError, match="layout='dense', not 'operator'"):
            transform(torch.sin, layout="operator", **options)
    with pytest.raises(ValueError, match="layout should be one of .*, got 'csc'"):
        transform(torch.sin, layout="csc")


def test_layout_of_hessians() -> None:
    with pytest.raises(ValueError, match="layout should be"):
        chainrule.hessian(torch.sum, layout="nothing")
    with pytest.raises(ValueError, match="expected sin to return one scalar Tensor"):
        chainrule.hessian(torch.sin, layout="operator")(randn(3))


def no_grad_inside(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x * 2
    return scale * x


def test_steps_under_no_grad_are_constant_as_in_the_transform() -> None:
    x = randn(3)
    for transform in (chainrule.jacobian, chainrule.jacrev, chainrule.jacfwd):
        J = transform(no_grad_inside, layout="operator")(x)
        close(J.dense(), transform(no_grad_inside)(x))
        close(J @ torch.ones_like(x), J.dense().sum(1))
    H = chainrule.hessian(lambda x: no_grad_inside(x).sum(), layout="operator")(x)
    close(H.dense(), chainrule.hessian(lambda x: no_grad_inside(x).sum())(x))
    close(H.diagonal(), H.dense().diagonal())


@pytest.mark.parametrize("tracked", [False, True])
def test_value_and_gradient_of_a_hessian_with_steps_under_no_grad(tracked: bool) -> None:
    calls = []

    def energy(x: Tensor) -> Tensor:
        calls.append(1)
        return (no_grad_inside(x) * x.roll(1)).sum() * len(calls)

    x = randn(3).requires_grad_(tracked)
    H, aux = chainrule.hessian(lambda x: (energy(x), "aux"), layout="operator", has_aux=True)(x)
    number, calls[:] = len(calls), [1] * (len(calls) - 1)
    assert aux == "aux"
    # All are of one run of the function.
    plain = x.detach()
    close(H.value.detach(), energy(plain))
    calls[:] = [1] * (number - 1)
    close(H.output.detach(), torch.func.grad(energy)(plain))
    calls[:] = [1] * (number - 1)
    whole = torch.func.hessian(energy)(plain)
    close(H.dense().detach(), whole)
    close(H.trace().detach(), whole.trace())
    close((H.T @ torch.ones_like(plain)).detach(), whole.sum(0))
    assert not torch.equal(whole, whole.T)
    assert H.value.requires_grad == tracked


# Nests


def reading(function: Callable[..., Any], matrix: Callable[..., Any]) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """Results of maps as functions of the primal, beside the same by torch.func."""
    u, v = randn(6), randn(6)
    square = lambda x: linear_map(function, x)  # noqa: E731
    return {
        "matvec": (lambda x: square(x) @ v, lambda x: matrix(x) @ v),
        "transposed": (lambda x: square(x).T @ u, lambda x: matrix(x).T @ u),
        "diagonal": (lambda x: square(x).diagonal(), lambda x: matrix(x).diagonal()),
        "trace": (lambda x: square(x).trace(), lambda x: matrix(x).trace()),
        "gram": (lambda x: square(x).gram().dense(), lambda x: matrix(x) @ matrix(x).T),
        "normal": (lambda x: square(x).normal() @ v, lambda x: matrix(x).T @ (matrix(x) @ v)),
        "norm": (lambda x: square(x).norm(), lambda x: matrix(x).norm()),
        "rows": (lambda x: square(x).rows([1, 3]), lambda x: matrix(x)[[1, 3]]),
        "entries": (lambda x: square(x)[[1, 3], [0, 0]], lambda x: matrix(x)[[1, 3], [0, 0]]),
        "scaled": (lambda x: (x.sum() * square(x) + square(x)).dense(), lambda x: (x.sum() + 1) * matrix(x)),
        "composed": (lambda x: (square(x) @ square(x)).trace(), lambda x: (matrix(x) @ matrix(x)).trace()),
    }


def tanh_twice(x: Tensor) -> Tensor:
    return torch.tanh(WEIGHT.T @ torch.tanh(WEIGHT @ x)) * torch.roll(x, 1)


NESTS = list(reading(torch.sin, torch.sin))


@pytest.mark.parametrize("name", NESTS)
@pytest.mark.parametrize("nest", ["grad", "jacrev", "jacfwd", "hessian", "vmap", "jvp", "vmap of jacrev", "autograd"])
def test_inside_transforms(name: str, nest: str) -> None:
    torch.manual_seed(2)
    ours, theirs = reading(tanh_twice, torch.func.jacrev(tanh_twice))[name]
    x, batch = randn(6), randn(4, 6)

    def both(ours: Any, theirs: Any, x: Tensor) -> None:
        for _ in range(2):
            close(ours(x), theirs(x), 512)

    if nest == "grad":
        both(chainrule.grad(lambda x: ours(x).sin().sum()), torch.func.grad(lambda x: theirs(x).sin().sum()), x)
    elif nest == "vmap":
        both(chainrule.vmap(ours), torch.func.vmap(theirs), batch)
    elif nest == "jvp":
        both(
            lambda x: chainrule.jvp(ours, (x,), (torch.ones_like(x),))[1],
            lambda x: torch.func.jvp(theirs, (x,), (torch.ones_like(x),))[1],
            x,
        )
    elif nest == "vmap of jacrev":
        both(chainrule.vmap(chainrule.jacrev(ours)), torch.func.vmap(torch.func.jacrev(theirs)), batch)
    elif nest == "autograd":
        x.requires_grad_()
        (found,) = torch.autograd.grad(ours(x).sin().sum(), x)
        close(found, torch.func.grad(lambda x: theirs(x).sin().sum())(x.detach()), 512)
    else:
        both(getattr(chainrule, nest)(ours), getattr(torch.func, nest)(theirs), x)


@pytest.mark.parametrize("name", ["diagonal", "trace", "dense", "product"])
def test_hessian_maps_inside_transforms(name: str) -> None:
    torch.manual_seed(3)
    function, v = SCALARS["dense"], randn(6)
    read: dict[str, Any] = {
        "diagonal": (lambda H: H.diagonal(), lambda m: m.diagonal()),
        "trace": (lambda H: H.trace(), lambda m: m.trace()),
        "dense": (lambda H: H.dense(), lambda m: m),
        "product": (lambda H: H @ v, lambda m: m @ v),
    }
    ours = lambda x: read[name][0](chainrule.hessian(function, layout="operator")(x))  # noqa: E731
    theirs = lambda x: read[name][1](torch.func.hessian(function)(x))  # noqa: E731
    x, batch = randn(6), randn(3, 6)
    for _ in range(2):
        close(chainrule.jacrev(ours)(x), torch.func.jacrev(theirs)(x), 512)
        close(chainrule.vmap(ours)(batch), torch.func.vmap(theirs)(batch), 512)


def test_vectors_and_factors_are_differentiated() -> None:
    x, v, a = randn(6), randn(6), torch.tensor(0.7, dtype=torch.float64)
    J = linear_map(tanh_twice, x)
    matrix = torch.func.jacrev(tanh_twice)(x)
    close(chainrule.grad(lambda v: (J @ v).sin().sum())(v), torch.func.grad(lambda v: (matrix @ v).sin().sum())(v))
    close(chainrule.jacrev(lambda v: J.gram() @ v)(v), matrix @ matrix.T)
    close(chainrule.vmap(lambda v: J @ v)(randn(3, 6)).T[0, :0], matrix[0, :0])
    close(chainrule.grad(lambda a: (a * J + J).dense().sin().sum())(a), torch.func.grad(lambda a: (a * matrix + matrix).sin().sum())(a))
    v.requires_grad_()
    (found,) = torch.autograd.grad((v @ J).square().sum(), v)
    close(found, 2 * matrix @ (matrix.T @ v.detach()))


def test_second_order_through_two_methods() -> None:
    x = randn(6).requires_grad_()
    J = linear_map(tanh_twice, x)
    (found,) = torch.autograd.grad(J.trace() * J.norm(), x, create_graph=True)
    matrix = torch.func.jacrev(tanh_twice)
    expected = torch.func.grad(lambda x: matrix(x).trace() * matrix(x).norm())(x.detach())
    close(found.detach(), expected, 512)


def test_no_grad_around() -> None:
    x = randn(6).requires_grad_()
    with torch.no_grad():
        J = linear_map(tanh_twice, x)
        assert not (J @ torch.ones_like(x)).requires_grad
        assert not J.diagonal().requires_grad and not J.dense().requires_grad and not J.output.requires_grad
    expected = torch.func.jacrev(tanh_twice)(x.detach()).trace()  # torch.func under inference_mode is 0 in some versions
    with torch.inference_mode():
        close(linear_map(tanh_twice, x.detach()).trace(), expected)


# One run of the function, and plans that are kept


def test_the_function_runs_once() -> None:
    runs = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return tanh_twice(x)

    x = randn(6)
    J = linear_map(counted, x)
    for of in (J, J.T, J.gram(), J + J, 2 * J):
        of @ x
        of.dense(), of.norm(), of.diagonal(), of.trace(), of.rows([0]), of.columns([1]), of[0, 0], of.sparse(), of.structure()
    close(J.output, tanh_twice(x))
    assert runs == 1
    H = chainrule.hessian(lambda x: counted(x).sum(), layout="operator")(x)
    H @ x, H.diagonal(), H.trace(), H.dense(), H.norm()
    assert runs == 2


def test_products_replay_what_depends_on_the_vector() -> None:
    """A product after the first calls only what the vector changes."""
    x, v = randn(300), randn(300)
    J = linear_map(lambda x: torch.exp(torch.sin(torch.cos(x) * x) + 2 * x), x)
    J @ v, J @ v
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        J @ v
    names = [event.name for event in recorded.events()]
    assert not {"aten::sin", "aten::cos", "aten::exp"}.intersection(names), names
    assert names.count("aten::mul") + names.count("aten::addcmul") <= 6, names


# What a map tells


def test_structure_is_readable() -> None:
    account = str(linear_map(lambda x: torch.sin(x) * 2, randn(1000)).structure())
    assert account.splitlines() == [
        "JacobianMap(1000×1000, float64, (1000,) -> (1000,)): 7.812 KiB in terms, 7.629 MiB if dense",
        "  output 0, input 0 (1000×1000):",
        "    (i) × (i): [i] (1000,) 7.812 KiB; diagonal in i (1000); 1000 entries",
    ]
    sliced = linear_map(lambda x: x[2:5], randn(9)).structure()
    assert sliced.blocks[0].terms[0].entries == 3 and "index[i]" in str(sliced)
    assert "zero" in str(linear_map(lambda x: torch.ones(2), randn(3)).structure())


def test_explained() -> None:
    explanation = chainrule.explain(lambda x: linear_map(tanh_twice, x).gram().trace())(randn(6))
    assert "trace" in str(explanation)


def test_compiled() -> None:
    v = randn(6)
    read = lambda x: linear_map(tanh_twice, x).gram() @ v + linear_map(tanh_twice, x).diagonal()  # noqa: E731
    compiled = chainrule.compile(read)
    for _ in range(3):
        x = randn(6)
        matrix = torch.func.jacrev(tanh_twice)(x)
        close(compiled(x), matrix @ (matrix.T @ v) + matrix.diagonal())


@pytest.mark.parametrize("name", ["rows", "columns", "block", "entries"])
def test_an_index_given_to_a_compiled_call(name):
    """What is chosen depends on the values of the index: they are compared, and another choice is recorded anew."""
    read = {
        "rows": lambda J, i: J.rows(i), "columns": lambda J, i: J.columns(i), "block": lambda J, i: J.block(i, i),
        "entries": lambda J, i: J[i, i],
    }[name]  # fmt: skip
    function = lambda x, i: read(chainrule.linear_map(lambda y: y[1:] * y[:-1], x), i)  # noqa: E731
    compiled, x = chainrule.compile(function), torch.rand(5, dtype=torch.float64)
    for index in ([0, 1], [0, 1], [2, 3], [1, 1], [2, 3]):
        torch.testing.assert_close(compiled(x, torch.tensor(index)), function(x, torch.tensor(index)))
    assert compiled.cache_info().hits == 2
    listed = chainrule.compile(lambda x: read(chainrule.linear_map(lambda y: y[1:] * y[:-1], x), [0, 2]))
    for scale in (1, 2, 3):
        torch.testing.assert_close(listed(scale * x), function(scale * x, [0, 2]))


@pytest.mark.parametrize("name", ["graph", "twice", "gram", "hessian"])
def test_the_account_of_a_graph_names_its_entries(name):
    """Not the dense matrix that a sum over its edges would be contracted to."""
    source, target = torch.randint(0, 400, (2, 900))

    def graph(x):
        return torch.zeros_like(x).index_add(0, target, (x[source] - x[target]).tanh())

    x = torch.rand(400, dtype=torch.float64)
    found = {
        "graph": lambda: chainrule.linear_map(graph, x),
        "twice": lambda: chainrule.linear_map(lambda x: graph(graph(x)), x),
        "gram": lambda: chainrule.linear_map(graph, x).gram(),
        "hessian": lambda: chainrule.hessian(lambda x: graph(x).square().sum(), layout="operator")(x),
    }[name]()
    account = found.structure()
    (block,) = account.blocks
    entries = sum(term.entries for term in block.terms)
    assert entries >= torch.count_nonzero(found.dense(flat=True))
    assert account.bytes == 8 * entries < account.dense_bytes / 2
    assert name != "graph" or (entries == 2 * 900 and "i = index[k]; j = index[k]; 900 entries" in str(account))
