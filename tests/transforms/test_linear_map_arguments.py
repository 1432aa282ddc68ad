"""What linear maps and their products take, and what they refuse."""

from __future__ import annotations

import numpy
import pytest
import torch

import chainrule
from chainrule import linear_map
from tests.transforms.map_kinds import WEIGHT, flat, make_kinds, network, randn
from tests.transforms.test_linear_map import close, tanh_twice


def test_vectors_that_do_not_fit() -> None:
    J = linear_map(tanh_twice, randn(6))
    tree = linear_map(network, *make_kinds()["two arguments"].primals)
    with pytest.raises(ValueError, match=r"JacobianMap @ v: expected the shape \(6,\), or \(6, k\) for k at once, got \(5,\)"):
        J @ randn(5)
    with pytest.raises(TypeError, match=r"JacobianMap @ v: expected the dtype torch.float64, got torch.float32"):
        J @ torch.ones(6)
    with pytest.raises(ValueError, match=r"JacobianMap @ v: expected the structure"):
        J @ (randn(6),)
    with pytest.raises(TypeError, match=r"JacobianMap @ v: expected a Tensor, got <class 'float'>"):
        J @ 2.0
    with pytest.raises(ValueError, match=r"JacobianMap.matvec: expected leaves of shape"):
        J.matvec(randn(6, 2))
    with pytest.raises(ValueError, match=r"JacobianMap.matmat: expected leaves of \(\*shape, k\)"):
        J.matmat(randn(6))
    with pytest.raises(ValueError, match=r"TransposedMap @ v: leaf 1: expected the shape|TransposedMap @ v: expected"):
        tree.T @ randn(3, 3)
    parameters, x = make_kinds()["two arguments"].primals
    with pytest.raises(ValueError, match=r"JacobianMap @ v: leaf 3: expected the shape \(2, 3\), got \(2, 3, 4\)"):
        tree @ (parameters, randn(2, 3, 4))


def test_rows_that_do_not_fit() -> None:
    J = linear_map(lambda x: WEIGHT @ x, randn(6))  # 5×6
    with pytest.raises(ValueError, match=r"u @ JacobianMap: expected the shape \(5,\), or \(k, 5\) for k at once, got \(5, 2\)"):
        randn(5, 2) @ J
    with pytest.raises(TypeError, match=r"u @ JacobianMap: expected the dtype torch.float64, got torch.float32"):
        torch.ones(5) @ J


def test_arrays_and_sums() -> None:
    J = linear_map(lambda x: WEIGHT @ x, randn(6))
    dense = J.dense()
    close((numpy.float64(2.0) * J).dense(), 2 * dense)
    close((J * numpy.float32(2.0)).dense(), 2 * dense)
    close(sum([J, J, -J]).dense(), dense)
    assert +J is J
    for wrong in (lambda: numpy.ones(6) * J, lambda: J * numpy.ones(6), lambda: numpy.ones(5) + J):
        with pytest.raises(TypeError):
            wrong()
    for wrong in (lambda: numpy.ones(5) @ J, lambda: J @ numpy.ones(6)):
        with pytest.raises(TypeError, match="expected a Tensor, got <class 'numpy.ndarray'>"):
            wrong()


def test_maps_that_do_not_fit() -> None:
    J, K = linear_map(lambda x: WEIGHT @ x, randn(6)), linear_map(torch.sin, randn(4))
    with pytest.raises(ValueError, match=r"LinearMap @ LinearMap: the left map takes \(6,\) and the right one returns \(4,\)"):
        J @ K
    with pytest.raises(ValueError, match=r"LinearMap \+ LinearMap: the spaces differ"):
        J + K
    with pytest.raises(ValueError, match=r"expected a number or a real tensor of no dimensions"):
        J * torch.ones(2)
    for wrong in (lambda: J + 1, lambda: J * "a", lambda: J - 2.0, lambda: True * J, lambda: J / None):
        with pytest.raises(TypeError):
            wrong()


def test_indices_that_do_not_fit() -> None:
    J = linear_map(lambda x: WEIGHT @ x, randn(6))
    for wrong in (lambda: J.rows(5), lambda: J.columns([0, 6]), lambda: J[-6], lambda: J[0, 6]):
        with pytest.raises(IndexError, match="out of range"):
            wrong()
    with pytest.raises(IndexError, match="2 rows and 3 columns"):
        J[[0, 1], [0, 1, 2]]
    for key in (1.5, "a", None, (0, 1, 2), (..., 0, ...), torch.ones(2, 2, dtype=torch.int64), torch.ones(3, dtype=torch.bool), True):
        with pytest.raises(TypeError):
            J[key]
    with pytest.raises(TypeError, match="differs between the samples"):
        chainrule.vmap(lambda i: J.rows(i))(torch.arange(3))


def test_functions_that_have_no_map() -> None:
    with pytest.raises(RuntimeError, match="expected all outputs to be real and floating-point, got torch.int64"):
        linear_map(lambda x: x.argmax(), randn(3))
    with pytest.raises(RuntimeError, match="expected all inputs to be real"):
        linear_map(torch.sin, torch.randn(3, dtype=torch.complex64))
    with pytest.raises(RuntimeError, match="at least one positional argument"):
        linear_map(torch.sin)
    with pytest.raises(RuntimeError, match="at least one Tensor"):
        linear_map(lambda x: torch.ones(2), {})


def test_arguments() -> None:
    x, y = randn(3), randn(3)
    function = lambda x, y, scale=1.0: (x * y * scale, "aux")  # noqa: E731
    J, aux = linear_map(function, x, y, has_aux=True, scale=2.0)
    assert aux == "aux" and J.in_shape == (torch.Size([3]), torch.Size([3]))
    close(J @ (y, x), 2 * (y * y + x * x))
    J, _ = linear_map(function, x, y, argnums=1, has_aux=True)
    assert J.in_shape == torch.Size([3])
    close(J.diagonal(), x)
    J, _ = linear_map(function, x, y, argnums=[-1], has_aux=True)
    assert J.in_shape == (torch.Size([3]),)
    with pytest.raises(RuntimeError, match="got argnum=2"):
        linear_map(torch.mul, x, y, argnums=2)


def test_mixed_dtypes() -> None:
    a, b = torch.randn(3), randn(3)
    J = linear_map(lambda a, b: (a * b, a), a, b)
    assert J.dtype == torch.float64
    matrix = torch.zeros(6, 6, dtype=torch.float64)
    matrix[:3, :3], matrix[:3, 3:], matrix[3:, :3] = torch.diag(b), torch.diag(a.double()), torch.eye(3)
    torch.testing.assert_close(J.dense(flat=True), matrix)
    torch.testing.assert_close(flat(J @ (torch.ones(3), torch.ones(3, dtype=torch.float64))).double(), matrix.sum(1))
    torch.testing.assert_close(J.norm(), matrix.norm())
    torch.testing.assert_close(J.sparse(flat=True).to_dense(), matrix)
